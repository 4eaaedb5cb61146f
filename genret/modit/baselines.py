"""What MO-DiT must beat: cheap queries, regressors and a discriminative encoder, on one label budget.

Every baseline that reads attribute labels reads those of `density.Labels` (and the predictor fitted on
them), never more. References at the end read what the question hides and bound what is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from genret.modit.density import Labels
from genret.modit.memory import Memory
from genret.modit.protocol import Contexts, Method, Searcher
from genret.modit.stages import TrainingSet, tail_batch
from genret.retrieval.ranking import rank
from genret.training.rows import read_all

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def seed_mean(embeddings: np.ndarray, contexts: Contexts) -> np.ndarray:
    """Normalised centroid of the seeds, f32[Q, D]."""
    given = contexts.seeds >= 0
    return unit((embeddings[contexts.seeds] * given[..., None]).sum(1))


def reach(embeddings: np.ndarray, contexts: Contexts, queries: np.ndarray, r: float) -> np.ndarray:
    """c_S + r (q - c_S), normalised: how far to go from the seed mean towards queries f32[Q, R, D], or
    past them. Every trained query model may choose r on validation, as steering chooses its strength."""
    start = seed_mean(embeddings, contexts)[:, None]
    return unit(start + r * (queries - start))


@dataclass(frozen=True)
class Baselines:
    """The fitted pieces that baselines share.

    normals: f32[M, D] linear-probe normals. gradient: (f32[Q, D], domain) -> unit gradient of the
    predicted log-odds of density. ridge: alpha -> weights (`fit_ridge`). memory: of the training cells.
    """

    searcher: Searcher
    data: TrainingSet
    labels: Labels
    predicted: np.ndarray
    normals: np.ndarray
    gradient: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ridge: dict[float, np.ndarray]
    memory: Memory

    @property
    def embeddings(self) -> np.ndarray:
        return self.searcher.catalogue.embeddings

    def mean(self, contexts: Contexts) -> np.ndarray:
        return seed_mean(self.embeddings, contexts)

    def medoid(self, contexts: Contexts, _: Any) -> np.ndarray:
        """The seed nearest to the others."""
        fit = np.einsum("qsd,qd->qs", self.embeddings[contexts.seeds], self.mean(contexts))
        best = np.where(contexts.seeds >= 0, fit, -np.inf).argmax(1)
        return self.embeddings[np.take_along_axis(contexts.seeds, best[:, None], 1)]

    def direction(self, contexts: Contexts, _: Any) -> np.ndarray:
        """Mean of the positives less mean of the negatives: the attribute without the pattern."""
        seen, x = self.labels.seen, self.embeddings
        ways = [x[seen[m] == 1].mean(0) - x[seen[m] == 0].mean(0) for m in range(len(seen))]
        return unit(np.stack(ways))[contexts.domain][:, None]

    def steering(self, contexts: Contexts, strength: float) -> np.ndarray:
        """q = c_S + s w_m (papers' C.8)."""
        return self._steered(self.mean(contexts), contexts, strength)

    def _steered(self, query: np.ndarray, contexts: Contexts, strength: float) -> np.ndarray:
        return unit(query + strength * self.normals[contexts.domain])[:, None]

    def predictor_step(self, contexts: Contexts, step: float) -> np.ndarray:
        """q = c_S + s ∇log-odds ρ̂_m(c_S) / ‖·‖."""
        c = self.mean(contexts)
        return unit(c + step * self.gradient(c, contexts.domain))[:, None]

    def rocchio(self, contexts: Contexts, setting: tuple[int, float, float]) -> np.ndarray:
        """q = c_S + β mean(pos) - γ mean(neg) over the known labels among the seed mean's top `depth`."""
        depth, beta, gamma = setting
        c = self.mean(contexts)
        top = self._top(c, contexts, depth)
        known = self.labels.seen[contexts.domain[:, None], top]
        found = self.embeddings[top]
        parts = [
            np.einsum("qnd,qn->qd", found, (known == v) / np.maximum((known == v).sum(1), 1)[:, None])
            for v in (1, 0)
        ]
        return unit(c + beta * parts[0] - gamma * parts[1])[:, None]

    def _top(self, queries: np.ndarray, contexts: Contexts, depth: int) -> np.ndarray:
        return rank(self.searcher.index, queries, depth, exclude=contexts.seeds)

    def reranked(self, contexts: Contexts, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """The seed mean's top `depth` judged items, best predicted density first: i32[Q, K], and the
        query that found them."""
        s, mean = self.searcher, self.mean(contexts)
        ids = rank(
            s.index, mean, depth, exclude=contexts.seeds,
            labels=s.catalogue.labels, domain=contexts.domain,
        )  # fmt: skip
        order = np.argsort(-self.predicted[contexts.domain[:, None], ids], axis=1, kind="stable")
        return np.take_along_axis(ids, order[:, : s.k], 1), mean[:, None]

    def nearest_tail(self, contexts: Contexts, _: Any) -> np.ndarray:
        """Tail centroid of the training cell nearest to the seed mean: a lookup."""
        return self.memory.nearest(self.mean(contexts), contexts.domain)[:, None]

    def ridge_query(self, contexts: Contexts, setting: tuple[float, float]) -> np.ndarray:
        """Ridge regression from the seed mean to the tail centroid, then steering."""
        alpha, strength = setting
        c = self.mean(contexts)
        features = np.concatenate([c, np.ones((len(c), 1), np.float32)], 1)
        query = unit(np.einsum("qf,qfd->qd", features, self.ridge[alpha][contexts.domain]))
        return self._steered(query, contexts, strength)

    def predicted_tail(self, contexts: Contexts, _: Any) -> np.ndarray:
        """Reference: centroid of the evaluation pattern's tail by predicted density."""
        return self._of_pattern(contexts, lambda rows, m: rows[_top_share(self.predicted[m, rows])])

    def true_positives(self, contexts: Contexts, _: Any) -> np.ndarray:
        """Reference: centroid of the evaluation pattern's items that carry the attribute."""
        labels = self.searcher.catalogue.labels
        return self._of_pattern(contexts, lambda rows, m: rows[labels[m, rows] == 1])

    def _of_pattern(self, contexts: Contexts, pick: Callable) -> np.ndarray:
        patterns, made = self.searcher.catalogue.patterns, {}
        pairs = list(zip(contexts.pattern.tolist(), contexts.domain.tolist(), strict=True))
        for p, m in set(pairs):
            made[p, m] = unit(self.embeddings[pick(np.flatnonzero(patterns == p), m)].mean(0))
        return np.stack([made[pair] for pair in pairs])[:, None]

    def methods(self) -> Iterator[Method]:
        """All of them, in the order of the table."""
        steps = STRENGTHS[1:]
        k, most = self.searcher.k, self.searcher.catalogue.num_items // 4
        depths = [min(d * k // 2, most) for d in (3, 5, 10, 20)]
        feedback = [min(d * k // 2, most) for d in (2, 5)]
        rocchio = [(d, b, g) for d in feedback for b in (0.25, 0.5, 1.0) for g in (0.0, 0.25)]
        alphas = tuple(self.ridge)
        yield Method("seed mean", lambda c, _: self.mean(c)[:, None], uses="nothing")
        yield Method("seed medoid", self.medoid, uses="nothing")
        yield Method("global attribute direction", self.direction)
        yield Method("linear-probe steering", self.steering, STRENGTHS)
        yield Method("predictor-gradient step", self.predictor_step, steps)
        yield Method("Rocchio feedback", self.rocchio, rocchio, probes=2)
        yield Method("predictor re-ranking", self.reranked, depths)
        yield Method("nearest training pattern's tail", self.nearest_tail)
        yield Method("ridge regressor", self.ridge_query, [(a, 0.0) for a in alphas])
        yield Method(
            "ridge regressor + steering",
            self.ridge_query,
            [(a, s) for a in alphas for s in STRENGTHS],
        )

    def references(self) -> Iterator[Method]:
        """Upper references; they read the evaluation pattern or the labels."""
        yield Method("reference: predicted tail of the pattern", self.predicted_tail, uses="pattern")
        yield Method("reference: true positives of the pattern", self.true_positives, uses="all labels")


def _top_share(score: np.ndarray, share: float = 0.1, least: int = 8) -> np.ndarray:
    return np.argsort(-score)[: max(least, int(np.ceil(share * len(score))))]


def fit_ridge(
    data: TrainingSet, *, seeds: int, alphas: tuple[float, ...] = (0.1, 1.0, 10.0), batches: int = 24,
    size: int = 1024, seed: int = 0,
) -> dict[float, np.ndarray]:  # fmt: skip
    """alpha -> weights f32[M, D+1, D], per domain, on the same (seeds, tail) pairs as SFT."""
    domains, width = len(data.density), data.embeddings.shape[1]
    gram = np.zeros((domains, width + 1, width + 1))
    cross = np.zeros((domains, width + 1, width))
    for step in range(batches):
        batch = read_all(tail_batch(np.random.default_rng([seed, 21, step]), data, size, seeds))
        x = unit(batch.condition.context.sum(1))
        x = np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64)
        for m in range(domains):
            here = (batch.condition.domain == m) & (batch.weight > 0)
            gram[m] += x[here].T @ x[here]
            cross[m] += x[here].T @ batch.target[here, 0]
    eye = np.eye(width + 1)
    return {a: np.linalg.solve(gram + a * eye, cross).astype(np.float32) for a in alphas}
