"""How the fan-out policy is trained: the supervised warm start, and Soft-GRPO on its own rollouts.

Both go through `genret.training.loop.fit`; a rollout is `batch(step, params)`. The loss is in `grpo`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from genret.language.decoder import SHARDING_RULES
from genret.r4t.folm import LanguagePolicy, RewardFunction
from genret.r4t.grpo import SoftGRPO, advantages, agreement, soft_grpo
from genret.training import mesh as meshes
from genret.training import processes
from genret.training.log import memory_bandwidth
from genret.training.stage import Stage
from genret.types import Array, Draw, InputError, PyTree, Terms, reading


@struct.dataclass
class WrittenBatch:
    """Texts to imitate: tokens i32[B, L], mask and own bool[B, L] of `folm.Text`."""

    tokens: Array
    mask: Array
    own: Array


@struct.dataclass
class RolloutBatch:
    """Answers of a rollout: tokens i32[B, L], mask and own bool[B, L], old f32[B, L] ln π_old, advantage and
    weight f32[B] (0 in filtered groups). stats: name -> f32[B], one number of the whole rollout in all rows,
    so that the train step's weighted mean logs it as it is, filtered groups included (0 if all are)."""

    tokens: Array
    mask: Array
    own: Array
    old: Array
    advantage: Array
    weight: Array
    stats: dict[str, Array]


def make_warm_start_stage(
    folder: str, policy: LanguagePolicy, base: PyTree, pairs: Sequence[tuple[str, Sequence[str]]], *,
    batch: int, seed: int = 0,
) -> Stage:  # fmt: skip
    """Supervised next-token loss on (query, sub-queries) pairs under `policy.prompt`, answers' tokens alone,
    averaged over tokens. base: the pretrained weights, frozen where the decoder has LoRA factors; a decoder
    without starts from them (`fit(init_from=base)`).

    Raises InputError if there is no pair, or an answer has more tokens than the policy may write.
    """
    text = policy.written(pairs)

    def draw(step: int, _: PyTree) -> WrittenBatch:
        rng = np.random.default_rng([seed, 82, step])
        at = rng.choice(len(text.tokens), batch, replace=len(text.tokens) < batch)
        return WrittenBatch(text.tokens[at], text.mask[at], text.own[at])

    def loss(params: PyTree, frozen: PyTree, batch: WrittenBatch, draw: Draw) -> Terms:
        variables = policy.variables(params, frozen.get("base"))
        log_probs = policy.log_probs(variables, batch.tokens, batch.mask, text.start, temperature=1.0)
        count = batch.own.sum(1)
        total = -(log_probs * batch.own).sum(1)
        return Terms(total / count.clip(1), count.astype("float32"))

    return Stage(
        name=folder, init=policy.init, loss=loss, batch=draw, rules=SHARDING_RULES,
        frozen=_frozen(policy, base), card=policy.card,
    )  # fmt: skip


def make_policy_stage(
    folder: str, policy: LanguagePolicy, base: PyTree, queries: Sequence[str], rows: np.ndarray,
    reward: RewardFunction, *, count: int, group: int = 8, reuse: int = 1, options: SoftGRPO = SoftGRPO(),  # noqa: B008
    reference: PyTree | None = None, seed: int = 0, workdir: Path | str | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Stage:  # fmt: skip
    """Soft-GRPO on rollouts: `group` answers to each of `count` queries, drawn from the training rows i32[n]
    of `queries`, scored by `reward`; every rollout serves `reuse` optimiser steps.

    base: as for the warm start, whose parameters `fit` should start from. reference: a trained tree, frozen,
    for the KL to it. workdir: where rollouts are kept while reuse > 1, so that a run killed between two steps
    on one goes on with the same; `fit`'s own, say. report: gets each rollout's figures (`say` prints them).

    Raises InputError for sizes out of range, a greedy or truncated sampler (its log-probabilities are not
    those of what it drew), a reference weight without reference, or reuse without workdir.
    """
    if group < 2 or not 1 <= count <= len(rows) or reuse < 1:
        problem = f"{group} answers to {count} of {len(rows)} queries, {reuse} steps each"
        raise InputError("rollout", problem, "use 2 answers or more, and no more queries than there are")
    if not policy.temperature > 0 or policy.top_p < 1:
        problem = f"temperature {policy.temperature}, top_p {policy.top_p}"
        raise InputError("policy", problem, "train at a temperature above 0 and a top_p of 1")
    if (options.reference > 0) != (reference is not None):
        problem = f"weight {options.reference}, reference {'given' if reference is not None else 'missing'}"
        raise InputError("reference", problem, "give both or neither")
    if reuse > 1 and workdir is None:
        raise InputError("workdir", f"missing for {reuse} steps a rollout", "give fit's")
    draw_rollout = Rollouts(
        policy, _frozen(policy, base).get("base"), queries, np.asarray(rows), reward, count, group, reuse,
        seed, None if workdir is None else Path(workdir), report or say,
    )  # fmt: skip
    start = draw_rollout.tokens.shape[1]

    def loss(params: PyTree, frozen: PyTree, batch: RolloutBatch, draw: Draw) -> Terms:
        def log_probs(tree: PyTree) -> Array:
            variables = policy.variables(tree, frozen.get("base"))
            return policy.log_probs(variables, batch.tokens, batch.mask, start, policy.temperature)

        new = log_probs(params)
        fixed = log_probs(frozen["reference"]) if reference is not None else None
        terms = soft_grpo(new, batch.old, batch.own, batch.advantage, batch.weight, options, fixed)
        aux = terms.aux | agreement(new, batch.old, batch.own) | batch.stats
        return Terms(terms.loss, terms.weight, aux)

    frozen = _frozen(policy, base) | ({"reference": reference} if reference is not None else {})
    return Stage(
        name=folder, init=policy.init, loss=loss, batch=draw_rollout, rules=SHARDING_RULES, frozen=frozen,
        card=policy.card,
    )  # fmt: skip


@dataclass
class Rollouts:
    """(step, params) -> RolloutBatch. Queries and draws are functions of the seed and the rollout's number.

    Fields are `make_policy_stage`'s arguments. Wall time is told to `report` and is no part of the batch.
    """

    policy: LanguagePolicy
    base: PyTree
    queries: Sequence[str]
    rows: np.ndarray
    reward: RewardFunction
    count: int
    group: int
    reuse: int
    seed: int
    workdir: Path | None
    report: Callable[[dict[str, Any]], None]
    tokens: np.ndarray = field(init=False)
    mask: np.ndarray = field(init=False)
    _held: tuple[int, RolloutBatch] | None = None
    _ended: float | None = None

    def __post_init__(self) -> None:
        # One width for all training prompts, so that the train step compiles for few shapes.
        self.tokens, self.mask = self.policy.asked([self.queries[row] for row in self.rows])

    def __call__(self, step: int, params: PyTree) -> RolloutBatch:
        number = step // self.reuse
        if self._held is None or self._held[0] != number:
            batch = self._read(number) if self.reuse > 1 else None
            if batch is None:
                batch = self._make(number, params)
            self._held = number, batch
        return self._held[1]

    def _make(self, number: int, params: PyTree) -> RolloutBatch:
        jax.block_until_ready(params)  # the optimiser's time is not the sampler's
        began = time.monotonic()
        update = None if self._ended is None else began - self._ended
        rng = np.random.default_rng([self.seed, 81, number])
        at = rng.choice(len(self.rows), self.count, replace=False)
        size = self.count * self.group
        keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), size)
        if (mesh := meshes.mesh_of(params)) is not None:  # every device samples its share of the answers
            self.base, params = meshes.whole(self.base, mesh), meshes.whole(params, mesh)
        variables = self.policy.variables(params, self.base)
        of = np.repeat(np.arange(self.count), self.group)
        text, old, answers = self.policy.sample(variables, self.tokens[at], self.mask[at], keys, of)
        sampled = time.monotonic()
        groups = [answers[i : i + self.group] for i in range(0, size, self.group)]
        scores = self.reward(self.rows[at], groups)
        advantage, kept = advantages(scores.reward)
        stats = scores.summary() | {"kept": kept.mean(), "answer_tokens": text.own.sum() / size}
        self._ended = time.monotonic()
        batch = RolloutBatch(
            text.tokens, text.mask, text.own, old, advantage.ravel(),
            np.repeat(kept, self.group).astype(np.float32),
            {name: np.full(size, value, np.float32) for name, value in stats.items()},
        )  # fmt: skip
        if self.reuse > 1:
            self._write(number, batch)
        row = {"rollout": number, "answers": size, "tokens": int(text.own.sum())}
        ended = (np.isin(text.tokens, self.policy.stop) & text.own).any(1)
        row |= {"malformed": int((~scores.valid).sum()), "cut_short": int((~ended).sum())}
        row["filtered_groups"] = int((~kept).sum())
        # Every step of the decoding reads all weights: no faster than memory gives them.
        read = sum(x.size for x in jax.tree.leaves(variables)) * jnp.dtype(self.policy.decoder.dtype).itemsize
        steps = int(text.own.sum(1).max())
        row["bound_tokens_s"] = row["tokens"] / (steps * read / memory_bandwidth())
        row |= {"rollout_s": sampled - began, "reward_s": self._ended - sampled, "update_s": update}
        self.report(row | {name: float(value) for name, value in stats.items()})
        return batch

    @property
    def _card(self) -> str:
        return repr((self.count, self.group, self.reuse, self.seed, self.policy.card))

    def _path(self, number: int) -> Path:
        return self.workdir / "rollouts" / f"{number}.npz"

    def _write(self, number: int, batch: RolloutBatch) -> None:
        self._path(number).parent.mkdir(parents=True, exist_ok=True)
        arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        stats = {f"stats/{name}": values for name, values in arrays.pop("stats").items()}

        def write() -> None:
            temporary = self._path(number).with_suffix(".tmp.npz")
            np.savez_compressed(temporary, card=self._card, **arrays, **stats)
            os.replace(temporary, self._path(number))

        processes.once(f"rollout {number}", write)

    def _read(self, number: int) -> RolloutBatch | None:
        """A rollout that a killed run left; None where there is none, or it is of other options."""
        if not self._path(number).exists():
            return None
        with reading(path := self._path(number)), np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if str(arrays.pop("card")) != self._card:
            return None
        stats = {name.removeprefix("stats/"): arrays.pop(name) for name in list(arrays) if "/" in name}
        return RolloutBatch(stats=stats, **arrays)


def say(row: dict[str, Any]) -> None:
    """A rollout's figures for people: the third (the ones before it compile), and every tenth."""
    if row["update_s"] is None or (row["rollout"] % 10 and row["rollout"] != 2):
        return
    seconds = row["rollout_s"], row["reward_s"], row["update_s"]
    split = " : ".join(f"{100 * part / sum(seconds):.0f}" for part in seconds)
    parts = [name.removesuffix("_std") for name in row if name.endswith("_std")]
    means = ", ".join(f"{name} {row[name]:.3f} (std {row[name + '_std']:.3f})" for name in parts)
    print(
        f"rollout {row['rollout']}: reward {row['reward']:.4f}, {means}; {row['malformed']} of "
        f"{row['answers']} answers malformed, {row['cut_short']} of max_new tokens without an end, "
        f"{row['filtered_groups']} groups filtered; "
        f"{row['answers'] / sum(seconds):.1f} rollouts/s, {row['tokens'] / seconds[0]:.0f} tokens/s "
        f"({row['tokens'] / seconds[0] / row['bound_tokens_s']:.0%} of the memory-bandwidth bound), "
        f"rollout : reward : update {split}",
        flush=True,
    )


def _frozen(policy: LanguagePolicy, base: PyTree) -> dict[str, PyTree]:
    return {"base": base} if policy.decoder.lora_rank else {}
