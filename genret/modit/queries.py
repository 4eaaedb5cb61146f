"""Queries of a trained MO-DiT: posterior mean, samples, their mean, and roll-outs.

A sample imitates one item and is a noisier query than a centroid, so the kind of query is always named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from genret.diffusion.edm import Space
from genret.diffusion.retriever import Retriever
from genret.modit.protocol import Contexts, Method
from genret.modit.stages import condition
from genret.modit.trajectories import sort_by_density
from genret.types import Condition, PyTree

HEUN_STEPS = 18
HEUN_CALLS = 2 * HEUN_STEPS - 1


@dataclass(frozen=True)
class MoDiT:
    """A trained model and what it needs to read a context: density f32[M, N] orders the seeds."""

    retriever: Retriever
    params: PyTree
    space: Space
    embeddings: np.ndarray
    density: np.ndarray
    block: int = 256

    def queries(
        self, contexts: Contexts, guidance: float, *, method: str = "posterior_mean", rows: int = 1,
        rollout: int = 0, seed: int = 0,
    ) -> np.ndarray:  # fmt: skip
        """Unit-norm queries f32[Q, rows, D]; each of `rollout` rounds appends the query to the context
        and asks again, in blocks of one compiled shape. guidance 0 costs one network call, else two."""
        items = sort_by_density(contexts.seeds, self.density, contexts.domain)
        keys = jax.random.split(jax.random.key(seed), len(contexts))
        out = np.empty((len(contexts), rows, self.embeddings.shape[1]), np.float32)
        for start in range(0, len(contexts), self.block):
            at = np.arange(start, min(start + self.block, len(contexts)))
            padded = np.resize(at, self.block)
            given = condition(self.embeddings, items[padded], contexts.domain[padded])
            for turn in range(rollout + 1):
                made = np.asarray(
                    self.retriever.generate(
                        self.params, self.space, given, keys[padded], np.float32(guidance) if guidance else None,
                        method=method, steps=HEUN_STEPS, rows=rows,
                    )
                )  # fmt: skip
                given = _append(given, made[:, 0]) if turn < rollout else given
            out[at] = made[: len(at)]
        return out


def _append(given: Condition, query: np.ndarray) -> Condition:
    """The context with one more item in the first free place (or a new one at the end)."""
    context = np.pad(np.asarray(given.context), ((0, 0), (0, 1), (0, 0)))
    mask = np.pad(np.asarray(given.mask), ((0, 0), (0, 1)))
    free = mask.sum(1)
    context[np.arange(len(query)), free], mask[np.arange(len(query)), free] = query, True
    return given.replace(context=context, mask=mask)


def model_methods(
    stages: dict[str, MoDiT], *, samples: int, guidance: tuple[float, ...], seed: int
) -> list[Method]:
    """The lines of the table that the diffusion model is responsible for.

    stages: name -> model. Validation picks stage and guidance for "MO-DiT"; the other kinds of query
    are shown at the last stage, without guidance.
    """
    final, last = list(stages)[-1], list(stages.values())[-1]
    def chosen(contexts: Contexts, setting: Any) -> np.ndarray:
        stage, w = setting
        return stages[stage].queries(contexts, w)

    def at_last(**options: Any):
        return lambda contexts, w: last.queries(contexts, w, seed=seed, **options)

    def mean(contexts: Contexts, w: float) -> np.ndarray:
        q = last.queries(contexts, w, method="heun", rows=samples, seed=seed).mean(1, keepdims=True)
        return q / np.linalg.norm(q, axis=-1, keepdims=True)

    grid = [(s, w) for s in stages if s != "pretrain" for w in guidance]
    methods = [Method("MO-DiT", chosen, grid, calls=lambda s: 2 if s[1] else 1)]
    for stage, model in stages.items():
        name = {"pretrain": "plain pretrained DiT"}.get(stage, f"MO-DiT after {stage}, posterior mean")
        methods.append(Method(name, lambda c, w, m=model: m.queries(c, w), (0.0,), calls=1,
                              uses="nothing" if stage == "pretrain" else "labels"))  # fmt: skip
    return methods + [
        Method(f"MO-DiT after {final}, roll-out of 1", at_last(rollout=1), (0.0,), calls=2),
        Method(f"MO-DiT after {final}, roll-out of 2", at_last(rollout=2), (0.0,), calls=3),
        Method(f"MO-DiT after {final}, one sample", at_last(method="heun"), (0.0,), calls=HEUN_CALLS),
        Method(f"MO-DiT after {final}, mean of {samples} samples", mean, (0.0,), calls=samples * HEUN_CALLS),
        Method(
            f"MO-DiT after {final}, {samples} samples merged", at_last(method="heun", rows=samples),
            (0.0,), probes=samples, calls=samples * HEUN_CALLS,
        ),
    ]  # fmt: skip
