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
from genret.modit.protocol import Cell, Contexts, Method
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
        rollout: int = 0, seed: int = 0, null: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Unit-norm queries f32[Q, rows, D]; each of `rollout` rounds appends the query to the context
        and asks again, in blocks of one compiled shape. guidance 0 costs one network call, else two. null:
        ask under the null domain, as a model that has seen no attribute must be asked."""
        domain = np.full_like(contexts.domain, len(self.density)) if null else contexts.domain
        items = sort_by_density(contexts.seeds, self.density, contexts.domain)
        keys = jax.random.split(jax.random.key(seed), len(contexts))
        out = np.empty((len(contexts), rows, self.embeddings.shape[1]), np.float32)
        for start in range(0, len(contexts), self.block):
            at = np.arange(start, min(start + self.block, len(contexts)))
            padded = np.resize(at, self.block)
            given = condition(self.embeddings, items[padded], domain[padded])
            for turn in range(rollout + 1):
                w = np.float32(guidance) if guidance else None
                made = np.asarray(
                    self.retriever.generate(
                        self.params, self.space, given, keys[padded], w,
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
    stages: dict[str, MoDiT],
    plain: MoDiT,
    *,
    samples: int,
    guidance: tuple[float, ...],
    floor: dict[Cell, float],
    seed: int,
) -> list[Method]:
    """The lines of the table that the diffusion model is responsible for.

    stages: pretrain, cpt, sft. Validation picks stage (cpt or sft) and guidance for "MO-DiT", by Joint
    among the settings whose Purity stays above `floor`. plain: SFT
    by denoising alone, the paper's recipe, whose one-call query is the posterior mean and whose samples
    are those of its targets; the other kinds of query are shown on it, without guidance.
    """

    def chosen(contexts: Contexts, setting: Any) -> np.ndarray:
        stage, w = setting
        return stages[stage].queries(contexts, w)

    def at(model: MoDiT, **options: Any):
        return lambda contexts, w: model.queries(contexts, w, seed=seed, **options)

    def mean(contexts: Contexts, w: float) -> np.ndarray:
        q = plain.queries(contexts, w, method="heun", rows=samples, seed=seed).mean(
            1, keepdims=True
        )
        return q / np.linalg.norm(q, axis=-1, keepdims=True)

    def line(name: str, run: Any, calls: int, **more: Any) -> Method:
        return Method(name, run, (0.0,), calls=calls, **more)

    grid = [(s, w) for s in stages if s != "pretrain" for w in guidance]
    sample = at(plain, method="heun", rows=samples)
    return [
        Method("MO-DiT", chosen, grid, calls=lambda s: 2 if s[1] else 1, floor=floor),
        line("plain pretrained DiT", at(stages["pretrain"], null=True), 1, uses="nothing"),
        line("MO-DiT after CPT", at(stages["cpt"]), 1),
        line("MO-DiT after SFT", at(stages["sft"]), 1),
        line("SFT without retrieval term, posterior mean", at(plain), 1),
        line("  the same, roll-out of 1", at(plain, rollout=1), 2),
        line("  the same, roll-out of 2", at(plain, rollout=2), 3),
        line("  the same, one sample", at(plain, method="heun"), HEUN_CALLS),
        line(f"  the same, mean of {samples} samples", mean, samples * HEUN_CALLS),
        line(f"  the same, {samples} samples merged", sample, samples * HEUN_CALLS, probes=samples),
    ]
