"""The same work by PyTorch and transformers, from the same weights, on as many threads.

Before anything is timed the answers are compared: outputs of the network and of the sampler, the losses and
averaged parameters of three optimiser steps, and the first tokens of greedy decoding. PyTorch runs eagerly
and under torch.compile, with its fused AdamW, and draws its noise itself, as ours does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmark import peers_search
from experiments.benchmark.language import asked, language
from experiments.benchmark.lines import OPTIONS, Trainer
from experiments.benchmark.measure import Work, threads
from experiments.benchmark.peers_torch import TorchTrainer, device, of, torch_heun
from experiments.benchmark.world import World
from genret.diffusion import edm
from genret.diffusion.dit import SHARDING_RULES
from genret.diffusion.retriever import Retriever
from genret.language.decoder import DecoderConfig
from genret.language.generation import generate
from genret.modit.queries import HEUN_STEPS
from genret.training.loop import draw_for
from genret.training.stage import Stage
from genret.types import Batch, Draw, InputError, PyTree

TOLERANCE = 1e-4
STEPS = 3  # compared before timing
FIRST_TOKENS = 4  # of greedy decoding; later ones may part where two tokens tie


class PeerMismatch(AssertionError):
    """Ours and the peer's do not compute the same; nothing is timed."""


def require() -> None:
    """Raises InputError for a package that is missing, or a PyTorch that cannot reach JAX's device."""
    for name in ("torch", "faiss", "hnswlib", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise InputError("--peers", f"{name} is not installed", "pip install 'genret[peer]'")
    device()


def agree(name: str, ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> float:
    """The largest difference; raises PeerMismatch where it exceeds the tolerance."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    apart = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else math.inf
    if not apart <= tolerance:
        raise PeerMismatch(f"{name}: ours and the peer's differ by {apart:.3g}, more than {tolerance}")
    return apart


def _draws(retriever: Retriever, draw: Draw, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    """What `Retriever.loss` draws from these keys: dropped bool[B], σ f32[B], ε f32[B, K, D]."""
    keys = jax.vmap(lambda k: jax.random.split(k))(draw.key)
    dropped = jax.vmap(jax.random.uniform)(keys[:, 0]) < retriever.drop
    return dropped, edm.noise_level(draw.uniform, retriever.noise), edm.gaussian_noise(keys[:, 1], shape)


def _exactly(world: World) -> Retriever:
    """The retriever in float32, which is what two libraries can agree in."""
    return Retriever(world.retriever.model.clone(dtype=np.float32))


def check_training(world: World, batch: Batch) -> dict[str, float]:
    """Compares `STEPS` optimiser steps from the same noise: the largest difference of a loss, and the mean
    difference of the averaged parameters over their mean movement.

    Raises PeerMismatch where the one exceeds 1e-4 or the other 1 % (a gradient that is zero but for rounding,
    that of the keys' bias, moves a parameter at random).
    """
    retriever, options = _exactly(world), dataclasses.replace(OPTIONS, learning_rate=1e-3, warmup=1)
    stage = Stage(
        "peer", retriever.init, retriever.loss, lambda *_: batch, SHARDING_RULES, frozen=world.space
    )
    theirs = TorchTrainer(world, batch, options)
    with jax.default_matmul_precision("highest"):
        ours = Trainer(stage, world.mesh, world.params, options)
        apart = 0.0
        for number in range(STEPS):
            draw = draw_for(options.seed, ours.state.step, len(batch.target))
            drawn = map(of, _draws(retriever, draw, batch.target.shape[1:]))
            loss = ours()["loss"]
            apart = max(apart, agree(f"loss of step {number}", loss, theirs.step(*drawn).cpu()))
    names = {id(p): name for name, p in theirs.net.named_parameters()}
    difference = movement = 0.0
    for p, average in zip(theirs.parameters, theirs.ema, strict=True):
        name, value = names[id(p)], average.cpu().numpy()
        value = value.T if name.endswith(".weight") else value
        end, start = (np.asarray(_leaf(tree, name)) for tree in (ours.state.ema, world.params))
        difference += float(np.abs(end - value).sum())
        movement += float(np.abs(end - start).sum())
    return {"loss_apart": apart, "ema_apart": agree("averaged parameters", difference / movement, 0.0, 0.01)}


def _leaf(tree: PyTree, name: str) -> Any:
    """The flax leaf of a torch parameter: block_0/qkv/kernel of blocks.0.qkv.weight."""
    for key in name.replace("blocks.", "block_").replace(".weight", ".kernel").split("."):
        tree = tree[key]
    return tree["embedding"] if isinstance(tree, dict) else tree


def train(world: World, compiled: bool) -> Work:
    """The SFT step in PyTorch, after `check_training`."""
    batch = world.examples("sft", world.scale.batch)
    apart = check_training(world, batch)
    half = world.scale.dtype == "bfloat16"
    trainer = TorchTrainer(world, batch, OPTIONS, compiled=compiled, autocast=half)

    def call() -> None:
        trainer.step(*trainer.draw())
        trainer.wait()

    about = f"the same weights and batch of {len(batch.target)}; loss, backward, clipping, fused AdamW, EMA"
    more = {"peer_of": "train sft", "threads": threads()} | apart
    return Work(call, about, len(batch.target), "examples", more=more, warm=4)


def check_sampling(world: World, trainer: TorchTrainer, key: jax.Array) -> dict[str, float]:
    """Compares the network's output, and queries of Heun from the same noise. Raises PeerMismatch."""
    retriever, batch = _exactly(world), world.examples("sft", len(key))
    z, noise = np.asarray(edm.gaussian_noise(key, batch.target.shape[1:])), np.linspace(-1.5, 1, len(key))
    noise = noise.astype(np.float32)
    anchor = world.space.anchor(batch.condition)
    with jax.default_matmul_precision("highest"), trainer.torch.no_grad():
        apply = jax.jit(retriever.model.apply)
        ours = apply({"params": world.params}, z, noise, batch.condition, anchor)
        theirs = trainer.net(of(z), of(noise), trainer.context, trainer.mask, trainer.domain, of(anchor))
        network = agree("output of the network", ours, theirs.cpu())
        ours = retriever.generate(
            world.params, world.space, batch.condition, key, None, method="heun", steps=HEUN_STEPS
        )
        heun = agree("Heun's queries", ours, torch_heun(trainer, of(z)).cpu())
    return {"network_apart": network, "queries_apart": heun}


def sample(world: World, compiled: bool) -> Work:
    """Heun's queries in PyTorch, after `check_sampling`."""
    size = world.scale.batch
    batch, key = world.examples("sft", size), jax.random.split(jax.random.key(0), size)
    trainer = TorchTrainer(world, batch, OPTIONS)
    apart = check_sampling(world, trainer, key)
    trainer.autocast = world.scale.dtype == "bfloat16"
    net = trainer.torch.compile(trainer.denoise) if compiled else None

    def call() -> None:
        with trainer.torch.no_grad():
            torch_heun(trainer, trainer.torch.randn_like(trainer.target), net)
        trainer.wait()

    about = f"the same weights and {size} contexts, {2 * HEUN_STEPS - 1} network calls"
    more = {"peer_of": f"sample heun {HEUN_STEPS}", "threads": threads()} | apart
    return Work(call, about, size, "queries", more=more)


def llama(config: DecoderConfig, params: PyTree) -> Any:
    """transformers' Llama with these weights. Raises InputError for a model with query and key norms."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if config.qk_norm:
        raise InputError("peer", "query and key norms are not Llama's", "compare a Llama")
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k != "qk_norm"}
    made = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    state = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        *modules, leaf = (p.key for p in path)
        name = ".".join(modules).replace("layers_", "layers.")
        for part, home in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            name = _inside(name, part, home)
        name = name if name == "lm_head" else f"model.{name}"
        state[f"{name}.weight"] = of(np.asarray(x).T if leaf == "kernel" else x)
    missing, unknown = made.load_state_dict(state, strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise PeerMismatch(f"weights of transformers' Llama: missing {missing}, unknown {unknown}")
    made.tie_weights()
    return made.to(device()).eval()


def _inside(name: str, part: str, projections: Any) -> str:
    """layers.3.q_proj as layers.3.self_attn.q_proj."""
    head, _, last = name.rpartition(".")
    return f"{head}.{part}.{last}" if last in [f"{p}_proj" for p in projections] else name


def decode(world: World) -> Work:
    """transformers' greedy generate, after its first tokens are ours."""
    import torch

    made, (tokens, mask), new = language(world), asked(world), world.scale.new
    model = llama(made.decoder.config, made.params)
    prompt, present = of(tokens).long(), of(mask).long()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    exact = made.decoder.clone(dtype=np.float32)
    options = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new)

    @torch.no_grad()
    def call() -> Any:
        out = model.generate(prompt, attention_mask=present, **options)
        return out[:, prompt.shape[1] :].cpu().numpy()

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(
            generate(exact, {"params": made.params}, tokens, mask, keys, max_new=new, temperature=0.0).tokens
        )
    theirs = call()
    agree("first tokens", ours[:, :FIRST_TOKENS], theirs[:, :FIRST_TOKENS], 0)
    if world.scale.dtype == "bfloat16":
        model.to(torch.bfloat16)
    more = {"peer_of": "lm decode", "threads": threads(), "same_tokens": float((ours == theirs).mean())}
    about = f"transformers' generate, the same weights and prompts, {new} new tokens, greedy"
    return Work(call, about, len(tokens) * new, "tokens", more=more)


LINES: dict[str, Callable[[World], Work]] = {
    "torch eager sft": functools.partial(train, compiled=False),
    "torch compile sft": functools.partial(train, compiled=True),
    f"torch eager heun {HEUN_STEPS}": functools.partial(sample, compiled=False),
    f"torch compile heun {HEUN_STEPS}": functools.partial(sample, compiled=True),
    "transformers decode": decode,
    **peers_search.LINES,
}
