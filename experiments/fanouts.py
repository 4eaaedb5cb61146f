"""The lines of R4T's tables: which sets each method answers with, and how all of them are scored alike."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.workdir import append_rows, read_rows
from genret.r4t import baselines
from genret.r4t.fanout import network_calls
from genret.r4t.folm import LanguagePolicy, collect_fanouts, sample_fanouts
from genret.r4t.items import nearest_items
from genret.r4t.rewards import OAR
from genret.retrieval import sets as metrics
from genret.training import preemption
from genret.training.log import Progress

if TYPE_CHECKING:
    from experiments.r4t import FanoutRun

FOLM, DIFFUSION, RANDOM, SINGLE = "R4T-FOLM", "R4T-Diffusion", "random pool", "no fan-out"


@dataclass(frozen=True)
class Fanout:
    """What a method answers to Q queries. vectors: f32[Q, k, D], rows to search with, zero where there is
    none. texts: the sub-queries, where it writes any. found: i32[Q, k, n], where it does its own search."""

    vectors: np.ndarray
    texts: list[list[str] | None] | None = None
    found: np.ndarray | None = None


@dataclass(frozen=True)
class FanoutMethod:
    """One line. run: (query rows i32[Q], seed) -> Fanout. draws: whether another seed gives another set.
    calls: network evaluations per query; 'tokens' for a language model."""

    name: str
    run: Callable[[np.ndarray, int], Fanout]
    draws: bool = False
    calls: int | str = 0


def all_methods(run: FanoutRun) -> Iterator[FanoutMethod]:
    """Chance, the query alone, re-ranking, the language models, the set models: loaded when they are run."""
    e, data, k = run.config.evaluation, run.data, run.config.k
    x, index = data.embeddings, run.index

    def line(name: str, make: Callable[[], baselines.Baseline], draws: bool = False, calls: int = 0):
        def answer(rows: np.ndarray, seed: int) -> Fanout:
            made = make()(data.query_embeddings[rows], k, seed)
            return Fanout(made if made.ndim == 3 else x[made])

        return FanoutMethod(name, answer, draws, calls)

    def alone(rows: np.ndarray, seed: int) -> Fanout:
        found = baselines.no_fanout(index)(data.query_embeddings[rows], k * _depth(run), seed)
        return Fanout(x[found[:, :k]], found=found.reshape(len(rows), k, -1))

    yield line(RANDOM, lambda: baselines.random_pool(len(x)), draws=True)
    yield FanoutMethod(SINGLE, alone)
    yield line("MMR re-ranking", lambda: baselines.mmr_reranking(index, x, pool=e.pool))
    yield line("DPP re-ranking", lambda: baselines.dpp_reranking(index, x, pool=e.pool))
    yield line("k-means of neighbours", lambda: baselines.neighbour_clusters(index, x, pool=e.pool))
    yield from _language(run)
    yield line("MSE set regressor", lambda: baselines.regressor(run.model("regressor")), calls=1)
    yield _drawn(run, DIFFUSION, "euler_maruyama", e.steps, e.guidance)
    yield _drawn(run, f"{DIFFUSION}, no guidance", "euler_maruyama", e.steps, 0.0)
    for steps in e.few:
        yield _drawn(run, f"{DIFFUSION}, Heun {steps}", "heun", steps, 0.0)


def _language(run: FanoutRun) -> Iterator[FanoutMethod]:
    def written(policy: Callable[[], LanguagePolicy], variables: Callable[[], Any]) -> Callable:
        def answer(rows: np.ndarray, seed: int) -> Fanout:
            asked = [run.data.queries[row] for row in rows]
            batch = run.config.language.batch
            texts = sample_fanouts(policy(), variables(), asked, jax.random.key(seed), batch=batch)
            return Fanout(run.rewards().embed(texts), texts)

        return answer

    def best(rows: np.ndarray, seed: int) -> Fanout:
        e, reward = run.config.evaluation, run.rewards()
        found = collect_fanouts(
            run.few_shot, run.base, run.data.queries, rows, jax.random.key(seed), reward,
            samples=e.best_of, batch=run.config.language.batch,
        )  # fmt: skip
        texts = dict(zip(found.rows.tolist(), (queries for _, queries in found.pairs), strict=True))
        answers = [texts.get(int(row)) for row in rows]
        return Fanout(reward.embed(answers), answers)

    def make(name: str, policy: Callable, variables: Callable) -> FanoutMethod:
        return FanoutMethod(name, written(policy, variables), draws=True, calls="tokens")

    yield make("zero-shot LM", lambda: run.zero_shot, lambda: run.base)
    yield make("few-shot LM", lambda: run.few_shot, lambda: run.base)
    yield FanoutMethod(f"Best-of-{run.config.evaluation.best_of} few-shot LM", best, calls="tokens")
    lines = {"warm": "warm-started LM", "folm": FOLM}
    if "rewards" in run.config.ablations:
        lines |= {"folm_grounded": f"{FOLM}, groundedness alone", "folm_aligned": f"{FOLM}, no diversity"}
    for folder, name in lines.items():
        yield make(name, lambda: run.policy, functools.cache(functools.partial(run.trained, folder)))


def _drawn(run: FanoutRun, name: str, method: str, steps: int, guidance: float) -> FanoutMethod:
    def answer(rows: np.ndarray, seed: int) -> Fanout:
        queries = run.data.query_embeddings[rows]
        made = run.model("diffusion").sets(
            queries, run.config.k, method=method, steps=steps, guidance=guidance, seed=seed
        )
        return Fanout(made)

    return FanoutMethod(name, answer, draws=True, calls=network_calls(method, steps, guidance))


def _depth(run: FanoutRun) -> int:
    return run.config.evaluation.depth if run.data.references is not None else 1


def score(run: FanoutRun, rows: np.ndarray, fanout: Fanout) -> dict[str, np.ndarray]:
    """Metrics f32[Q] of one answer to each query, the same for every method; a missing row counts as zero.

    groundedness: mean cosine of a row with the content nearest to it. diversity: (Vendi - 1) / (k - 1) of
    those contents. alignment: their mean cosine with the query. relevant: alignment × Vendi / k, the
    quality-weighted Vendi score (Nguyen and Dieng, ICML 2024): chance is last in it, as it is not
    in the composite, which has eq. 1's weights on the three and pays .6 for being in the pool at all.
    valid: 1 where the answer has any row. recall, hit, precision: of `depth` contents per row.
    """
    z, x, k = fanout.vectors, run.data.embeddings, fanout.vectors.shape[1]
    real = (z != 0).any(-1)
    ids, cosine = run.index.search(z.reshape(-1, z.shape[-1]), max(1, _depth(run)))
    ids, near = ids.reshape(*real.shape, -1), cosine[:, 0].reshape(real.shape)
    nearest = np.where(real, ids[..., 0], -1)
    contents = (x[np.maximum(nearest, 0)] * real[..., None]).astype(np.float32)
    query, vendi = run.data.query_embeddings[rows], np.asarray(metrics.vendi_groups(contents))
    made = {
        "groundedness": (near * real).sum(1) / k,
        "diversity": np.maximum(vendi - 1, 0) / max(k - 1, 1),
        "alignment": np.einsum("qkd,qd->q", contents, query) / k,
    }
    made["relevant"] = np.maximum(made["alignment"], 0) * vendi / k
    made["composite"] = sum(weight * made[name] for name, weight in OAR.items())
    made |= {
        "duplicates": metrics.duplicate_rate(nearest), "coherence": metrics.coherence(contents),
        "valid": real.any(1),
    }  # fmt: skip
    if run.data.references is not None:
        found = np.where(real[..., None], ids, -1) if fanout.found is None else fanout.found
        pool = metrics.found(found, [run.data.references[row] for row in rows])
        made |= {"recall": pool.recall, "hit": pool.hit, "precision": pool.precision}
    return {name: np.float32(values) for name, values in made.items()}


def over_runs(run: FanoutRun, fanouts: list[Fanout]) -> dict[str, float]:
    """Vendi over several draws, both of the paper's protocols (papers' B.8), means over queries: `runs` of
    the mean row of each draw, `rows` of all rows of all draws, each over the most it can be."""
    runs, rows = [], []
    for q in range(len(fanouts[0].vectors)):
        drawn = [f.vectors[q][(f.vectors[q] != 0).any(-1)] for f in fanouts]
        drawn = [rows_ for rows_ in drawn if len(rows_)]
        if len(drawn) > 1:
            runs.append(metrics.vendi_of_runs(drawn).share)
            rows.append(metrics.vendi_of_subqueries(drawn).share)
    return {"vendi_runs": float(np.mean(runs or [0.0])), "vendi_rows": float(np.mean(rows or [0.0]))}


def test_rows(run: FanoutRun) -> np.ndarray:
    """The test queries that are asked, i32[Q]: the same for every seed."""
    rows, most = run.data.rows("test"), run.config.evaluation.queries
    if most and most < len(rows):
        rows = np.sort(np.random.default_rng(93).choice(rows, most, replace=False))
    return rows


def evaluate_run(run: FanoutRun, results: Path, wanted: Callable[[str], bool]) -> None:
    """One row per method of one seed that has none yet."""
    done = {row["method"] for row in read_rows(results) if row["seed"] == run.seed}
    asked = [m for m in all_methods(run) if m.name not in done and wanted(m.name)]
    rows, e = test_rows(run), run.config.evaluation
    progress = Progress(f"evaluate seed {run.seed}", len(asked))
    for i, method in enumerate(asked):
        draws = [method.run(rows, 10_000 * run.seed + n) for n in range(e.runs if method.draws else 1)]
        found = score(run, rows, draws[0])
        row: dict[str, Any] = {"method": method.name, "data": run.data.name, "seed": run.seed}
        row |= {"queries": len(rows), "k": run.config.k, "calls": method.calls, "index": run.index.name}
        row |= {"contents": len(run.data.embeddings), "depth": _depth(run)}
        row |= {name: round(float(values.mean()), 6) for name, values in found.items()}
        row |= over_runs(run, draws) if len(draws) > 1 else {}
        row["per_query"] = {n: np.round(v, 4).tolist() for n, v in found.items()}
        row["shown"] = _shown(run, rows[: e.show], draws[0]) if method.name != RANDOM else []
        append_rows(results, [row])
        progress(i + 1, method.name)
        preemption.leave_if_due()


def _shown(run: FanoutRun, rows: np.ndarray, fanout: Fanout) -> list[dict[str, Any]]:
    """The first queries' answers for people: sub-queries where there are any, and the nearest contents."""
    out = []
    for q, row in enumerate(rows):
        z = fanout.vectors[q][(fanout.vectors[q] != 0).any(-1)]
        found = nearest_items(run.index, z[None])[0] if len(z) else []
        said = {"query": run.data.queries[row], "contents": [run.data.contents[i] for i in found]}
        out.append(said | ({"sub_queries": fanout.texts[q]} if fanout.texts else {}))
    return out


def time_run(run: FanoutRun, results: Path) -> None:
    """Latency rows of FOLM and of the diffusion samplers, per batch size: p50 and p95 seconds of a batch, the
    search of the contents included and split out. A warm-up call of each shape is left out."""
    e, rows = run.config.evaluation, run.data.rows("test")
    done = {(r["method"], r["batch"]) for r in read_rows(results) if r["seed"] == run.seed}
    timed = re.compile(rf"({FOLM}|{DIFFUSION}(, .*)?)$")
    lines = {m.name: m for m in all_methods(run) if timed.match(m.name)}
    for batch in e.latency:
        at = np.resize(rows, batch)
        for method in lines.values():
            if (method.name, batch) in done:
                continue
            took, search = [], []
            for n in range(e.repeats + 1):
                began = time.monotonic()
                made = method.run(at, n)
                drawn = time.monotonic()
                run.index.search(made.vectors.reshape(-1, made.vectors.shape[-1]), 1)
                search.append(time.monotonic() - drawn)
                took.append(time.monotonic() - began)
            row = {"method": method.name, "batch": batch, "seed": run.seed, "calls": method.calls}
            row |= {"p50": float(np.percentile(took[1:], 50)), "p95": float(np.percentile(took[1:], 95))}
            row |= {"search_p50": float(np.median(search[1:])), "repeats": e.repeats}
            row |= {"device": jax.devices()[0].device_kind, "k": run.config.k}
            append_rows(results, [row])
            print(f"{method.name}, batch {batch}: {row['p50']:.3f} s", flush=True)
            preemption.leave_if_due()
