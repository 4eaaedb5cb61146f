"""The lines of the language model: prefill, decoding, and a step of Soft-GRPO with its three parts."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import flops as fl
from experiments.benchmark.lines import Trainer, synthetic_noise, trained
from experiments.benchmark.measure import Work, traced_flops
from experiments.benchmark.world import World, synthetic_vectors
from genret.language.decoder import Decoder, DecoderConfig, empty_cache, init_lora
from genret.language.encoder import load_encoder
from genret.language.generation import generate
from genret.language.pretrained import load_language_model
from genret.r4t import policy as policies
from genret.r4t import prompts
from genret.r4t.folm import LanguagePolicy
from genret.r4t.rewards import Answer, Rewards, Scores
from genret.retrieval.index import ExactIndex
from genret.training import mesh as meshes
from genret.types import InputError, PyTree

SMOLLM2 = DecoderConfig(49152, 576, 30, 9, 3, 64, 1536, 1e-5, 1e5, tie_word_embeddings=True, qk_norm=False)
TINY = DecoderConfig(260, 32, 2, 4, 2, 8, 64, 1e-5, 1e4, tie_word_embeddings=True, qk_norm=False)
RANK, LAYERS, ALPHA, TEMPERATURE = 16, 10, 32.0, 0.9  # of experiments/configs/r4t.py


@dataclasses.dataclass(frozen=True)
class Language:
    """name: what it is, for the rows. decoder, params, encode and decode as in `LanguagePolicy`."""

    name: str
    decoder: Decoder
    params: PyTree
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


@functools.cache
def language(world: World) -> Language:
    """SmolLM2 where its package is installed, else random weights of its shape and tokens that are bytes."""
    dtype = jnp.dtype(world.scale.dtype)
    config, name = TINY, "random weights, tiny"
    if world.scale.language == "smollm2":
        try:
            found = load_language_model()
            decoder, tokenizer = Decoder(found.config, dtype=dtype), found.tokenizer
            return Language("SmolLM2-135M", decoder, found.params, tokenizer.encode, tokenizer.decode)
        except InputError:
            config, name = SMOLLM2, "random weights of SmolLM2-135M's shape"
    decoder = Decoder(config, dtype=dtype)
    one = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(decoder.init)(jax.random.key(0), one, one == 0)["params"]
    return Language(
        name, decoder, params, lambda text: list(text.encode()),
        lambda ids: "".join(chr(97 + i % 26) for i in ids),
    )  # fmt: skip


def asked(world: World) -> tuple[Any, Any]:
    """Prompt tokens i32[B, P] and their mask, no padding."""
    s, made = world.scale, language(world)
    shape = (s.lanes, s.prompt)
    tokens = np.random.default_rng(7).integers(0, min(256, made.decoder.config.vocab_size), shape)
    return jnp.asarray(tokens, jnp.int32), jnp.ones(shape, bool)


def _pass_flops(decoder: Decoder, params: PyTree, batch: int, columns: int, slots: int) -> float:
    """FLOPs of `columns` new columns against a cache of `slots`, with one head per row."""

    def forward(variables, tokens, mask, cache):
        h, cache = decoder.apply(variables, tokens, mask, cache, method="hidden")
        return decoder.apply(variables, h[:, -1], method="head"), cache

    tokens = jax.ShapeDtypeStruct((batch, columns), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch, columns), bool)
    cache = jax.eval_shape(lambda: empty_cache(decoder.config, batch, slots, decoder.dtype))
    return traced_flops(forward, {"params": params}, tokens, mask, cache)


def generated(world: World, new: int) -> Work:
    """`generate`: greedy, no stop token, so that every row takes all its columns."""
    s, made = world.scale, language(world)
    tokens, mask = asked(world)
    keys = jax.random.split(jax.random.key(0), s.lanes)
    config, itemsize = made.decoder.config, jnp.dtype(made.decoder.dtype).itemsize
    args = made.decoder, {"params": made.params}, tokens, mask, keys
    slots = s.prompt + new - 1
    counted = _pass_flops(made.decoder, made.params, s.lanes, s.prompt, slots)
    if new > 1:
        counted += (new - 1) * _pass_flops(made.decoder, made.params, s.lanes, 1, slots)
    about = f"{made.name}, {np.dtype(made.decoder.dtype).name}, batch {s.lanes}, prompt {s.prompt}, {new} new"
    prefill = new == 1
    return Work(
        lambda: generate(*args, max_new=new, temperature=0.0), about,
        s.lanes * (s.prompt if prefill else new), "tokens",
        fl.generation(config, s.lanes, s.prompt, new), fl.GENERATE, counted,
        None if prefill else fl.generation_bytes(config, s.lanes, s.prompt, new, itemsize), fl.TRAFFIC,
    )  # fmt: skip


def _rewards(world: World, queries: int) -> tuple[Rewards, str]:
    """Eq. 1's reward over `scale.items` contents, and how sub-queries are embedded."""
    name, width = "embeddings drawn, no encoder", world.width
    encode: Callable = lambda texts: _unit_rows(len(texts), width)  # noqa: E731
    if world.scale.language == "smollm2":
        try:
            encoder = load_encoder()
            encode = functools.partial(encoder.encode, max_tokens=32)
            name, width = "MiniLM", len(encode(["one"])[0])
        except InputError:
            pass
    x = synthetic_vectors(world.scale.items, width, seed=8)
    data = SimpleNamespace(embeddings=x, query_embeddings=x[:queries], references=None)
    return Rewards(data, ExactIndex(x, mesh=world.mesh), encode), name


def _unit_rows(count: int, width: int) -> np.ndarray:
    x = synthetic_noise(np.random.default_rng(count), (count, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _written(rng: np.random.Generator, count: int) -> list[Answer]:
    """`count` well-formed answers of K sub-queries nobody has asked before."""
    words = ["".join(map(chr, rng.integers(97, 123, 6))) for _ in range(64)]
    pick = rng.integers(0, 64, (count, prompts.K, 3))
    return [[" ".join(words[i] for i in one) for one in answer] for answer in pick]


def _policy(world: World) -> LanguagePolicy:
    """With LoRA factors, and no stop token, so that every answer takes all its tokens."""
    made, config = language(world), language(world).decoder.config
    decoder = made.decoder.clone(
        lora_rank=RANK, lora_layers=min(LAYERS, config.num_hidden_layers), lora_alpha=ALPHA
    )
    return LanguagePolicy(
        decoder, made.encode, made.decode, prompts.SHORT, (), world.scale.new, temperature=TEMPERATURE
    )


def _tuned(world: World, decoder: Decoder) -> str:
    return f"{language(world).name}, LoRA {RANK} in the top {decoder.lora_layers} layers"


def warm_start(world: World) -> Work:
    """A step on answers of ten sub-queries, as many as GRPO's update has."""
    s, rng, made = world.scale, np.random.default_rng(10), language(world)
    policy, batch = dataclasses.replace(_policy(world), max_new=10_000), s.rollout[0] * s.rollout[1]
    pairs = [("autumn evening", answer) for answer in _written(rng, batch)]
    stage = policies.make_warm_start_stage("warm", policy, made.params, pairs, batch=batch)
    text = policy.written(pairs)
    columns = text.tokens.shape[1] - text.start
    flops = fl.lora_update(policy.decoder, batch, text.start, columns, len(policy.prefix))
    return trained(
        world, stage, f"{_tuned(world, policy.decoder)}, {columns} tokens", flops, fl.LORA, batch, "answers",
        init_from=init_lora(policy.decoder, jax.random.key(0)),
    )  # fmt: skip


def grpo(world: World) -> Work:
    """Rollout, reward and update of one optimiser step.

    What is scored is as many well-formed answers of ten new sub-queries, since an untrained model writes few.
    """
    s, made, policy = world.scale, language(world), _policy(world)
    (count, group), config, decoder = s.rollout, made.decoder.config, policy.decoder
    queries = [f"{a} {b}" for a in ("autumn", "harbour") for b in ("evening", "market", "garden", "music")]
    queries = (queries * count)[: max(count, len(queries))]
    rewards, encoder = _rewards(world, len(queries))
    rng, rows = np.random.default_rng(9), np.arange(len(queries))
    reports: list[dict[str, Any]] = []

    def reward(at: np.ndarray, answers: Sequence[Sequence[Answer]]) -> Scores:
        return rewards(at, [_written(rng, len(answers[0])) for _ in answers])

    stage = policies.make_policy_stage(
        "grpo", policy, made.params, queries, rows, reward, count=count, group=group, report=reports.append
    )
    trainer = Trainer(stage, world.mesh, init_lora(decoder, jax.random.key(0)))
    updates: list[float] = []
    step = iter(range(1, 1_000_000))

    def call():
        batch = stage.batch(next(step), trainer.state.params)
        began = time.perf_counter()
        trainer.batch = meshes.place(batch, trainer.on_batch)
        out = jax.block_until_ready(trainer())
        updates.append(time.perf_counter() - began)
        return out

    def split() -> dict[str, Any]:
        trainer.memory.close()
        kept = reports[3:]  # one shaped the step, one compiled, one warmed up
        parts = {part: [r[f"{part}_s"] for r in kept] for part in ("rollout", "reward")}
        parts["update"] = updates[2:]
        medians = {f"{part}_s": float(np.median(values)) for part, values in parts.items()}
        shares = [100 * value / sum(medians.values()) for value in medians.values()]
        tokens = float(np.median([r["tokens"] for r in kept]))
        return medians | {
            "answers_per_s": count * group / sum(medians.values()),
            "tokens_per_s": tokens / medians["rollout_s"],
            "rollout_bandwidth_fraction": tokens / medians["rollout_s"] / kept[-1]["bound_tokens_s"],
            "note": "rollout : reward : update " + " : ".join(f"{share:.0f}" for share in shares),
        }  # fmt: skip

    prefix, width = len(policy.prefix), policy.asked(queries)[0].shape[1]
    answers, slots = count * group, prefix + width + s.new - 1
    sampled = _pass_flops(made.decoder, made.params, answers, width, slots)
    sampled += (s.new - 1) * _pass_flops(made.decoder, made.params, answers, 1, slots)
    flops = fl.generation(config, answers, width, s.new, prefix)
    flops += fl.lora_update(decoder, answers, width, s.new, prefix)
    return Work(
        call,
        f"{_tuned(world, decoder)}, {count} queries x {group} answers x {s.new} tokens; "
        f"reward: {encoder}, {len(rewards.data.embeddings)} contents",
        answers, "answers", flops, f"rollout: {fl.GENERATE}; update: {fl.LORA}", sampled + trainer.flops,
        after=split,
    )  # fmt: skip


LINES: dict[str, Callable[[World], Work]] = {
    "lm prefill": functools.partial(generated, new=1),
    "lm decode": lambda world: generated(world, world.scale.new),
    "train warm": warm_start,
    "grpo step": grpo,
}
