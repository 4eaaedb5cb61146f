"""Hybrid-Policy Preference Optimisation, MO-DiT's fourth stage (papers' A.8).

A round: draw training contexts, build their candidate pools with the parameters of the moment, label every
candidate by real retrieval, keep preference pairs. Then the reference-anchored DPO loss trains on them until
the next round. Rounds live inside `batch(step, params)`, so the stage runs through `fit` like any other.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from genret.diffusion.dit import SHARDING_RULES
from genret.diffusion.edm import Space
from genret.diffusion.preference import PairBatch, Preference, preference_loss
from genret.diffusion.retriever import Retriever
from genret.modit.baselines import unit
from genret.modit.candidates import FEEDBACK_NAME, Pool, draw_contexts, make_pool
from genret.modit.fitting import Fitted
from genret.modit.pairs import PairRule, Pairs, select_pairs
from genret.modit.protocol import Contexts
from genret.modit.queries import MoDiT
from genret.modit.stages import RetrievalTerm, TailBatch, condition, model_card, retrieval_batch
from genret.modit.trajectories import sort_by_density
from genret.retrieval.index import Index
from genret.retrieval.scoring import Counts, Scorer
from genret.training import processes
from genret.training.log import matmul_flops
from genret.training.mesh import with_rows
from genret.training.stage import Stage
from genret.types import Draw, InputError, PyTree, Terms, reading


@dataclass(frozen=True)
class Rounds:
    """steps: optimiser steps of a round. contexts: training contexts of a round. policy, samples: of the pool
    (`candidates.make_pool`). rule: which pairs are kept. feedback: candidates by relevance feedback, ours."""

    steps: int
    contexts: int
    policy: str = "hybrid"
    samples: int = 8
    rule: PairRule = PairRule()
    feedback: bool = True


@dataclass(frozen=True)
class Labeller:
    """Joint, Attribute and Purity of candidates on the training corpus, from labels already bought.

    HPPO buys no label of its own: an item whose label was never looked up is passed over, and the ranking
    filled from below. Purity is of the latent cell that the context was drawn from.
    """

    fitted: Fitted
    scorer: Scorer
    place: np.ndarray

    def __call__(self, pool: Pool, contexts: Contexts) -> Counts:
        """Counts i32[Q, C] of the pool's candidates."""
        seeds = np.where(contexts.seeds >= 0, self.place[contexts.seeds], -1)
        return self.scorer(
            pool.queries, domain=contexts.domain, partition=self.fitted.data.cells.run[contexts.pattern],
            pattern=contexts.pattern, exclude=seeds,
        )  # fmt: skip

    def feedback(self, queries: np.ndarray, contexts: Contexts) -> np.ndarray:
        """Relevance feedback on the model's own rankings, a unit direction f32[Q, D]: mean of the pattern's
        positives among the first 3K + S items less mean of what else is among the top K; 0 without either."""
        data, k = self.fitted.data, self.scorer.k
        rows = np.flatnonzero(self.place >= 0)
        ids, _ = self.scorer.index.search(queries, min(3 * k + contexts.seeds.shape[1], len(rows)))
        found = rows[ids]  # catalogue rows
        label = self.fitted.labels.seen[contexts.domain[:, None], found]
        usable = (label >= 0) & ~(found[:, :, None] == contexts.seeds[:, None]).any(-1)
        inside = data.cells.membership[data.cells.run[contexts.pattern][:, None], found]
        hit = usable & (label == 1) & (inside == contexts.pattern[:, None])
        miss = usable & ~hit & (np.cumsum(usable, 1) <= k)
        both = (hit.any(1) & miss.any(1))[:, None]
        x = data.embeddings[found]
        centroids = [
            np.einsum("qld,ql->qd", x, part / np.maximum(part.sum(1, keepdims=True), 1))
            for part in (hit, miss)
        ]
        return (unit(centroids[0] - centroids[1]) * both).astype(np.float32)


def make_labeller(fitted: Fitted, k: int, *, mesh: Mesh | None = None, index: Callable | None = None):
    """The labeller over training items with any label bought. index: rows f32[n, D] -> Index, to search
    with ScaNN instead of the exact search on the mesh."""
    data, seen = fitted.data, fitted.labels.seen
    rows = data.train[(seen[:, data.train] >= 0).any(0)]
    place = np.full(seen.shape[1], -1, np.int32)
    place[rows] = np.arange(len(rows))
    x = np.asarray(data.embeddings[rows])
    made: Index | None = index(x) if index else None
    membership = data.cells.membership[:, rows]
    return Labeller(fitted, Scorer(x, seen[:, rows], membership, k, mesh=mesh, index=made), place)


@dataclass
class Refresh:
    """The pairs of a round, kept in `folder` so that a run killed inside a round goes on with the same ones.

    model: parameters -> MoDiT. seeds: most per context. validate: scores to note with each round.
    """

    model: Callable[[PyTree], MoDiT]
    labeller: Labeller
    rounds: Rounds
    folder: Path
    seeds: int
    seed: int
    validate: Callable[[MoDiT], dict[str, float]]
    _held: tuple[int, dict[str, np.ndarray]] | None = None

    def __call__(self, number: int, params: PyTree) -> dict[str, np.ndarray]:
        """items i32[n, S], domain i32[n], winner and loser f32[n, D] of round `number`."""
        if self._held is None or self._held[0] != number:
            path = self.folder / f"pairs_{number}.npz"
            arrays = self._read(path)
            if arrays is None:
                self._make(number, params, path)
                arrays = self._read(path)
            self._held = number, arrays
        return self._held[1]

    def _read(self, path: Path) -> dict[str, np.ndarray] | None:
        """The arrays of a finished round; None where there is none, or it is of other options."""
        if not path.exists():
            return None
        with reading(path), np.load(path, allow_pickle=False) as arrays:
            return dict(arrays) if str(arrays.get("card")) == self._card else None

    @property
    def _card(self) -> str:
        bought = len(self.labeller.fitted.labels.probes), self.labeller.fitted.labels.lookups
        return repr((self.rounds, self.seeds, self.seed, self.labeller.scorer.k, bought))

    def _make(self, number: int, params: PyTree, path: Path) -> None:
        fitted, r = self.labeller.fitted, self.rounds
        rng = np.random.default_rng([self.seed, 61, number])
        began = time.monotonic()
        contexts = draw_contexts(rng, fitted.data, r.contexts, self.seeds)
        pool = make_pool(
            r.policy, self.model(params), fitted.data, fitted.labels, fitted.normals, fitted.gradient,
            self.labeller.feedback if r.feedback else None, contexts, samples=r.samples,
            seed=int(rng.integers(2**31)),
        )  # fmt: skip
        generated = time.monotonic()
        counts = self.labeller(pool, contexts)
        scored = time.monotonic()
        pairs = select_pairs(rng, pool, counts, r.rule)
        if not len(pairs):
            return self._repeat(number, path)
        report = {"round": number} | summary(pool, counts, pairs, self.labeller.scorer.k)
        rate = counts.joint.size / (scored - generated)
        flops = rate * self.labeller.scorer.flops
        report |= {"pool_s": generated - began, "candidates_per_s": rate, "scoring_flop_per_s": flops}
        report["scoring_of_matmul"] = flops / matmul_flops()
        report["corpus"] = int((self.labeller.place >= 0).sum())
        report["validation"] = self.validate(self.model(params))
        say(report)
        self.folder.mkdir(parents=True, exist_ok=True)
        items = sort_by_density(contexts.seeds, fitted.predicted, contexts.domain)
        at = pairs.context
        arrays = dict(items=items[at], domain=contexts.domain[at])
        arrays |= dict(winner=pool.queries[at, pairs.winner], loser=pool.queries[at, pairs.loser])
        arrays |= dict(report=json.dumps(report), card=self._card)
        processes.once(f"HPPO round {number}", lambda: _write(path, arrays))

    def _repeat(self, number: int, path: Path) -> None:
        """The pairs of the round before for a round that found none; raises InputError if there is none."""
        arrays, contexts = self._read(self.folder / f"pairs_{number - 1}.npz"), self.rounds.contexts
        if arrays is None:
            raise InputError(
                "hppo", f"none of {contexts} contexts yields a pair in round {number}",
                "lower hppo.pairs.margin, relax the filter or raise the label budget",
            )  # fmt: skip
        print(
            f"hppo round {number}: no pair in {contexts} contexts; those of the round before stay", flush=True
        )
        arrays["report"] = json.dumps(
            {"round": number, "contexts": contexts, "pairs": 0, "empty_pools": contexts}
        )
        processes.once(f"HPPO round {number}", lambda: _write(path, arrays))


def _write(path: Path, arrays: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    os.replace(temporary, path)


def summary(pool: Pool, counts: Counts, pairs: Pairs, k: int) -> dict[str, Any]:
    """What a round found, for its log: pairs, empty pools, and who wins."""
    winners = [pool.names[w] for w in pairs.winner]
    names, n = np.unique(winners, return_counts=True)
    gain = [
        float((c[pairs.context, pairs.winner] - c[pairs.context, pairs.loser]).mean() / k) for c in counts
    ]
    return {
        "contexts": len(counts.joint), "pairs": len(pairs), "empty_pools": pairs.empty,
        "dropped_for_share": pairs.lost, "on_policy_winners": float(pairs.own.mean()),
        "feedback_winners": float(np.mean([w.startswith(FEEDBACK_NAME) for w in winners])),
        "pair_gain": dict(zip(("joint", "attribute", "purity"), gain, strict=True)),
        "query": {n: float(c[:, -1].mean() / k) for n, c in counts._asdict().items()},
        "best": float(counts.joint.max(1).mean() / k),
        "winners": dict(sorted(zip(names.tolist(), n.tolist(), strict=True), key=lambda x: -x[1])),
    }  # fmt: skip


def say(report: dict[str, Any]) -> None:
    """One line per round, for people."""
    p, q = report["pair_gain"], report["query"]
    print(
        f"hppo round {report['round']}: {report['pairs']} pairs from {report['contexts']} contexts "
        f"({report['empty_pools']} empty), {report['on_policy_winners']:.0%} on-policy winners, "
        f"{report['feedback_winners']:.0%} of all by feedback; pair gain "
        f"J {p['joint']:+.3f} A {p['attribute']:+.3f} P {p['purity']:+.3f}; query J {q['joint']:.3f} of best "
        f"{report['best']:.3f}; {report['candidates_per_s']:.0f} candidates/s "
        f"over {report['corpus']} items with a label, "
        f"{report['scoring_of_matmul']:.0%} of a plain matmul's FLOP/s"
        + "".join(f"; validation {n} {v:.4f}" for n, v in report.get("validation", {}).items()),
        flush=True,
    )


@struct.dataclass
class HppoBatch:
    """B pairs, and F fresh contexts beside each for the retrieval-aware term, leaves [B, F, ...] (None
    without it): a round has only so many contexts, and the term would learn them by heart."""

    pairs: PairBatch
    fresh: TailBatch | None


def make_hppo_stage(
    folder: str, retriever: Retriever, space: Space, reference: PyTree, refresh: Refresh, *,
    preference: Preference, batch: int, fresh: int = 1, retrieval: RetrievalTerm | None = None,
    mesh: Mesh | None = None, seed: int = 0,
) -> Stage:  # fmt: skip
    """The stage that trains in `folder`. reference: parameters of the stage before, frozen; `fit` must start
    from them as well (`init_from`), else the loss does not begin at log 2. batch: pairs per step. retrieval:
    the retrieval-aware term, ours, on `fresh` contexts of its own per pair. mesh: that it will train on."""
    data = refresh.labeller.fitted.data
    frozen: dict[str, Any] = {"space": space, "reference": reference}
    corpus = None
    if retrieval:
        corpus = retrieval.over(data, seed)
        frozen |= {"table": np.asarray(data.embeddings), "corpus": corpus.rows}
    pair_loss = preference_loss(retriever, preference, with_rows(mesh) if mesh else None)

    def draw(step: int, params: PyTree) -> HppoBatch:
        pairs = refresh(step // refresh.rounds.steps, params)
        at = np.random.default_rng([seed, 62, step]).integers(0, len(pairs["domain"]), batch)
        given = condition(data.embeddings, pairs["items"][at], pairs["domain"][at])
        sides = (pairs[side][at][:, None] for side in ("winner", "loser"))
        made = PairBatch(given, *sides, np.ones(batch, np.float32))
        if not retrieval:
            return HppoBatch(made, None)
        rng = np.random.default_rng([seed, 63, step])
        return HppoBatch(made, retrieval_batch(rng, data, batch, refresh.seeds, corpus, beside=fresh))

    def loss(params: PyTree, frozen: PyTree, batch: HppoBatch, draw: Draw) -> Terms:
        terms = pair_loss(params, frozen, batch.pairs, draw)
        if not retrieval:
            return terms
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.fresh)
        found = retrieval(retriever, params, frozen, rows.examples.condition, rows.candidates)
        value = rows.examples.weight * found.loss  # of weight 0: a cell without a seed to draw
        value, aux = jax.tree.map(lambda x: x.reshape(-1, fresh).mean(1), (value, found.aux))
        return Terms(terms.loss + value, terms.weight, {"preference": terms.loss} | terms.aux | aux)

    return Stage(
        name=folder,
        init=retriever.init,
        loss=loss,
        batch=draw,
        rules=SHARDING_RULES,
        frozen=frozen,
        card=model_card(retriever.model, space),
    )
