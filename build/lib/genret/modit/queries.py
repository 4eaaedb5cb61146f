"""Queries of a trained MO-DiT: posterior mean, samples, their mean, and roll-outs.

A sample imitates one item and is a noisier query than a centroid, so the kind of query is always named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from genret.diffusion.edm import Space
from genret.diffusion.retriever import Retriever
from genret.modit.baselines import seed_mean, unit
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
        self, contexts: Contexts, guidance: float = 0.0, *, method: str = "posterior_mean", rows: int = 1,
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
    reaches: Sequence[float],
    guidance: Sequence[float],
    floor: dict[Cell, float],
    seed: int,
) -> list[Method]:
    """The lines of the table that the diffusion model is responsible for.

    stages: pretrain, cpt, sft. Validation picks (stage, guidance w, reach r) for "MO-DiT", by Joint among
    the settings whose Purity stays above `floor`: its query is c_S + r (q_w - c_S), as steering's is
    c_S + s w_m. plain: SFT by denoising alone, the paper's recipe, whose one-call query is the posterior
    mean; the other kinds of query are shown on it, without guidance.
    """

    def chosen(contexts: Contexts, setting: tuple[str, float, float]) -> np.ndarray:
        stage, w, reach = setting
        made = stages[stage].queries(contexts, w)
        start = seed_mean(plain.embeddings, contexts)[:, None]
        return unit(start + reach * (made - start))

    def at(model: MoDiT, **options: Any):
        return lambda contexts, _: model.queries(contexts, seed=seed, **options)

    def mean(contexts: Contexts, _: Any) -> np.ndarray:
        return unit(sample(contexts, None).mean(1, keepdims=True))

    trained = [s for s in stages if s != "pretrain"]
    grid = [(s, 0.0, r) for s in trained for r in reaches] + [(s, w, 1.0) for s in trained for w in guidance]
    sample, cost = at(plain, method="heun", rows=samples), samples * HEUN_CALLS
    return [
        Method("MO-DiT", chosen, grid, calls=lambda s: 2 if s[1] else 1, floor=floor),
        Method("plain pretrained DiT", at(stages["pretrain"], null=True), calls=1, uses="nothing"),
        Method("MO-DiT after CPT", at(stages["cpt"]), calls=1),
        Method("MO-DiT after SFT", at(stages["sft"]), calls=1),
        Method("plain SFT, posterior mean", at(plain), calls=1),
        Method("plain SFT, roll-out of 1", at(plain, rollout=1), calls=2),
        Method("plain SFT, roll-out of 2", at(plain, rollout=2), calls=3),
        Method("plain SFT, one sample", at(plain, method="heun"), calls=HEUN_CALLS),
        Method(f"plain SFT, mean of {samples} samples", mean, calls=cost),
        Method(f"plain SFT, {samples} samples merged", sample, probes=samples, calls=cost),
    ]
