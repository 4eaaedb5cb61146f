"""The lines of R4T's tables: which sets each method answers with, and how all of them are scored alike."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from experiments.command import matching
from experiments.workdir import append_rows, read_rows
from genret.diffusion.edm import SIGMA_MAX, SIGMA_MIN
from genret.diffusion.retriever import Method
from genret.r4t import baselines
from genret.r4t.fanout import grounded, network_calls
from genret.r4t.folm import LanguagePolicy, sample_fanouts
from genret.r4t.items import nearest_items
from genret.r4t.rewards import OAR
from genret.retrieval import sets as metrics
from genret.retrieval.index import Index
from genret.training import preemption
from genret.training.log import Progress
from genret.types import InputError

if TYPE_CHECKING:
    from experiments.r4t import FanoutRun

FOLM, DIFFUSION, RANDOM, SINGLE = "R4T-FOLM", "R4T-Diffusion", "random pool", "no fan-out"
UNGUIDED, ORACLE = f"{DIFFUSION}, no guidance", "few-shot LM, oracle"
OF_TWO = f"{FOLM}, ten of two"  # rows of two fan-outs, chosen as the diffusion's are
AS_DRAWN = f"{DIFFUSION}, as drawn"  # k rows and no choice among more, as a language model writes k
FEW = {"euler": "Euler", "heun": "Heun", "exponential": "DPM-Solver++"}  # samplers of few calls
PARTS = ("test", "validation")  # whose queries may be asked
ENCODED = 64  # tokens of a query that are encoded, as `catalogue.fanout` does


@dataclass(frozen=True)
class Fanout:
    """What a method answers to Q queries. vectors: f32[Q, k, D], rows to search with, zero where there is
    none. texts: the sub-queries, where it writes any. found: i32[Q, k, n], where it does its own search, and
    searched: the seconds of that."""

    vectors: np.ndarray
    texts: list[list[str] | None] | None = None
    found: np.ndarray | None = None
    searched: float = 0.0

    def first(self, count: int) -> Fanout:
        """Of the first `count` queries."""
        return Fanout(
            *(None if part is None else part[:count] for part in (self.vectors, self.texts, self.found))
        )


class TimedIndex:
    """An index that says what its searches took, in seconds."""

    def __init__(self, index: Index):
        self.index, self.name, self.num_items, self.seconds = index, index.name, index.num_items, 0.0

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        began = time.monotonic()
        found = self.index.search(queries, k)
        self.seconds += time.monotonic() - began
        return found


@dataclass(frozen=True)
class FanoutMethod:
    """One line. run: (query rows i32[Q], seed) -> Fanout. draws: whether another seed gives another set.
    calls: network evaluations per query; 'tokens' for a language model. reads: what it is told of the queries
    that no rival knows, as an oracle is."""

    name: str
    run: Callable[[np.ndarray, int], Fanout]
    draws: bool = False
    calls: int | str = 0
    reads: str = ""

    @property
    def embedded(self) -> bool:
        """Whether it starts from the query's embedding; a language model starts from its text."""
        return self.calls != "tokens"


def all_methods(run: FanoutRun) -> Iterator[FanoutMethod]:
    """Chance, the query alone, re-ranking, the language models, the set models: loaded when they are run."""
    e, data, k = run.config.evaluation, run.data, run.config.k
    x, index = data.embeddings, run.index

    def line(name: str, make: Callable[[], baselines.Baseline], draws: bool = False, calls: int = 0):
        def answer(rows: np.ndarray, seed: int) -> Fanout:
            made = make()(data.query_embeddings[rows], k, seed)
            return Fanout(made if made.ndim == 3 else x[made])

        return FanoutMethod(name, answer, draws, calls)

    def whole(make: Callable[[], baselines.Baseline]) -> Callable[[np.ndarray, int], Fanout]:
        """Of a method that is no fan-out: as many distinct contents as ten rows find, or all there are."""

        def answer(rows: np.ndarray, seed: int) -> Fanout:
            found = np.full((len(rows), k * _depth(run)), -1, np.int32)
            most = min(found.shape[1], len(x))
            found[:, :most] = make()(data.query_embeddings[rows], most, seed)
            return Fanout(x[found[:, :k]], found=found.reshape(len(rows), k, -1))

        return answer

    yield FanoutMethod(RANDOM, whole(lambda: baselines.random_pool(len(x))), draws=True)
    yield FanoutMethod(SINGLE, whole(lambda: baselines.no_fanout(index)))
    yield line("MMR re-ranking", lambda: baselines.mmr_reranking(index, x, pool=e.pool))
    yield line("DPP re-ranking", lambda: baselines.dpp_reranking(index, x, pool=e.pool))
    yield line("k-means of neighbours", lambda: baselines.neighbour_clusters(index, x, pool=e.pool))
    yield from _language(run)
    yield line("MSE set regressor", lambda: baselines.regressor(run.model("regressor")), calls=1)
    yield _drawn(run, DIFFUSION, "euler_maruyama", e.steps, e.guidance)
    yield _drawn(run, UNGUIDED, "euler_maruyama", e.steps, 0.0)
    yield _drawn(run, AS_DRAWN, "euler_maruyama", e.steps, 0.0, spare=False)
    for few in few_calls(e.few):
        yield _drawn(run, few.name, few.method, few.steps, 0.0, tuple(e.levels))


def of_checkpoint(run: FanoutRun, folder: str, step: int) -> Callable[[np.ndarray, int], Fanout]:
    """(query rows i32[Q], seed) -> answers of one checkpoint; the diffusion's by the last of
    `evaluation.few`."""
    e = run.config.evaluation
    if folder == "regressor":
        made = baselines.regressor(run.model(folder, step))
        return lambda rows, seed: Fanout(made(run.data.query_embeddings[rows], run.config.k, seed))
    if folder == "diffusion":
        few = [(f.method, f.steps, 0.0, tuple(e.levels)) for f in few_calls(e.few)[-1:]]
        how = few[0] if few else ("euler_maruyama", e.steps, 0.0)
        return _drawn(run, folder, *how, step=step).run
    return _written(run, lambda: run.policy, functools.cache(lambda: run.trained(folder, step)))


def _written(
    run: FanoutRun, policy: Callable[[], LanguagePolicy], variables: Callable[[], Any]
) -> Callable[[np.ndarray, int], Fanout]:
    """A language model's answers."""

    def answer(rows: np.ndarray, seed: int) -> Fanout:
        asked = [run.data.queries[row] for row in rows]
        batch = run.config.language.batch
        texts = sample_fanouts(policy(), variables(), asked, jax.random.key(seed), batch=batch)
        return Fanout(run.rewards().embed(rows, texts), texts)

    return answer


def _language(run: FanoutRun) -> Iterator[FanoutMethod]:
    written = functools.partial(_written, run)

    def best(rows: np.ndarray, seed: int) -> Fanout:
        n, reward = run.config.evaluation.best_of, run.rewards()
        texts = written(lambda: run.few_shot, lambda: run.base)(np.repeat(rows, n), seed).texts
        groups = [texts[i : i + n] for i in range(0, len(texts), n)]
        scores = reward(rows, groups)
        chosen = np.where(scores.valid, scores.reward, -np.inf).argmax(1)
        answers = [group[i] for group, i in zip(groups, chosen, strict=True)]  # None where all are malformed
        return Fanout(reward.embed(rows, answers), answers)

    def make(name: str, policy: Callable, variables: Callable) -> FanoutMethod:
        return FanoutMethod(name, written(policy, variables), draws=True, calls="tokens")

    yield make("zero-shot LM", lambda: run.zero_shot, lambda: run.base)
    yield make("few-shot LM", lambda: run.few_shot, lambda: run.base)
    # The training reward of weakly supervised data is the recall of what should be found: on queries that are
    # being evaluated, choosing by it is an oracle.
    oracle, best_of = run.data.references is not None, f"Best-of-{run.config.evaluation.best_of}"
    name = f"{best_of} {ORACLE if oracle else 'few-shot LM'}"
    yield FanoutMethod(name, best, draws=True, calls="tokens", reads="references" if oracle else "")
    lines = {"warm": "warm-started LM", "folm": FOLM}
    if "rewards" in run.config.ablations:
        lines |= {"folm_grounded": f"{FOLM}, groundedness alone", "folm_aligned": f"{FOLM}, no diversity"}
    for folder, name in lines.items():
        trained = functools.cache(functools.partial(run.trained, folder))
        yield make(name, lambda: run.policy, trained)
        if folder == "folm" and run.data.references is None:
            twice = written(lambda: run.policy, trained)
            yield FanoutMethod(OF_TWO, _of_two(run, twice), draws=True, calls="tokens")


def _of_two(run: FanoutRun, written: Callable[[np.ndarray, int], Fanout]) -> Callable:
    """As many candidates to a language model as the diffusion draws, and the same choice among them."""

    def answer(rows: np.ndarray, seed: int) -> Fanout:
        both = written(np.repeat(rows, 2), seed).vectors.reshape(len(rows), 2 * run.config.k, -1)
        made, ids = grounded(
            both, run.data.query_embeddings[rows], run.config.k, run.index, run.data.embeddings,
            weight=run.config.evaluation.grounded,
        )  # fmt: skip
        return Fanout(made, found=ids[..., None])

    return answer


class FewCalls(NamedTuple):
    """A few-call sampler, of `retriever.Method`, and its line of the table."""

    name: str
    method: Method
    steps: int


def few_calls(asked: Sequence[str]) -> list[FewCalls]:
    """ "heun 8" and the like, as `evaluation.few` has them. Raises InputError for another sampler."""
    found = []
    for each in asked:
        method, _, steps = each.partition(" ")
        if method not in FEW or not steps.isdigit() or not int(steps):
            fix = f"write one of {', '.join(FEW)} and its steps: 'heun 8'"
            raise InputError("evaluation.few", f"{each!r} is no sampler", fix)
        found.append(FewCalls(f"{DIFFUSION}, {FEW[method]} {steps}", method, int(steps)))
    return found


def _drawn(
    run: FanoutRun, name: str, method: Method, steps: int, guidance: float,
    levels: tuple[float, float] = (SIGMA_MIN, SIGMA_MAX), spare: bool = True, step: int | None = None,
) -> FanoutMethod:  # fmt: skip
    how = dict(method=method, steps=steps, guidance=guidance, levels=levels)

    def answer(rows: np.ndarray, seed: int) -> Fanout:
        data, model, k = run.data, run.model("diffusion", step), run.config.k
        queries = data.query_embeddings[rows]
        model = model if spare else dataclasses.replace(model, rows=k)
        if data.references is not None or model.rows == k:
            return Fanout(model.sets(queries, k, **how, seed=seed))
        index, weight = TimedIndex(run.index), run.config.evaluation.grounded
        made, ids = model.grounded(queries, k, index, data.embeddings, weight=weight, **how, seed=seed)
        return Fanout(made, found=ids[..., None], searched=index.seconds)

    return FanoutMethod(name, answer, draws=True, calls=network_calls(method, steps, guidance))


def _depth(run: FanoutRun) -> int:
    return run.config.evaluation.depth if run.data.references is not None else 1


def score(run: FanoutRun, rows: np.ndarray, fanout: Fanout) -> dict[str, np.ndarray]:
    """Metrics f32[Q] of one answer to each query, the same for every method; a missing row counts as zero.

    groundedness: mean cosine of a row with the content nearest to it. diversity: (Vendi - 1) / (k - 1) of
    those contents. alignment: their mean cosine with the query. relevant: alignment × Vendi / k, the
    quality-weighted Vendi score (Nguyen and Dieng, ICML 2024): chance is last in it, as it is not
    in the composite, which has eq. 1's weights on the three and pays .6 for being in the pool at all.
    valid: 1 where the answer has any row. recall, hit, precision: of `depth` contents per row. soft_coverage:
    mean over the reference set of the cosine with whichever of those nearest contents is nearest.
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
        wanted = [run.data.references[row] for row in rows]
        pool = metrics.found(found, wanted)
        made |= {"recall": pool.recall, "hit": pool.hit, "precision": pool.precision}
        made["soft_coverage"] = np.array(
            [
                metrics.soft_coverage(own[is_real], x[set_]) if is_real.any() else 0.0
                for own, is_real, set_ in zip(contents, real, wanted, strict=True)
            ]
        )
    return {name: np.float32(values) for name, values in made.items()}


def over_runs(draws: Sequence[np.ndarray]) -> dict[str, float]:
    """Vendi over draws f32[Q, k, D], both of the paper's protocols (papers' B.8), means over queries: `runs`
    of the mean row of each draw, `rows` of all rows of all draws, each over the most it can be. A query is
    left out where fewer than two draws have a row; where all are, nothing is said."""
    runs, rows = [], []
    for of_query in zip(*draws, strict=True):
        drawn = [own[(own != 0).any(-1)] for own in of_query]
        drawn = [own for own in drawn if len(own)]
        if len(drawn) > 1:
            runs.append(metrics.vendi_of_runs(drawn).share)
            rows.append(metrics.vendi_of_subqueries(drawn).share)
    found = {"vendi_runs": np.mean(runs), "vendi_rows": np.mean(rows)} if runs else {}
    return {name: round(float(value), 7) for name, value in found.items()}  # the rest is rounding


def asked_rows(run: FanoutRun, part: str = "") -> np.ndarray:
    """The queries of `part`, or of `evaluation.part`, that are asked, i32[Q]: the same for every seed."""
    rows, most = run.data.rows(part or run.config.evaluation.part), run.config.evaluation.queries
    if most and most < len(rows):
        rows = np.sort(np.random.default_rng(93).choice(rows, most, replace=False))
    return rows


def evaluate_run(run: FanoutRun, results: Path, methods: str = "") -> None:
    """One row per method of one seed that has none yet on this part of the queries; methods: only those with
    a match of this regular expression. Raises InputError for one that is none, or matches nothing."""
    rows, e = asked_rows(run), run.config.evaluation
    again = rows[: e.repeated or None]
    seen = [row for row in read_rows(results) if row["seed"] == run.seed]
    done = {row["method"] for row in seen if row.get("part", PARTS[0]) == e.part}
    named = {m.name: m for m in all_methods(run)}
    asked = [named[n] for n in matching("--methods", methods, named, "method") if n not in done]
    progress = Progress(f"evaluate seed {run.seed}", len(asked))
    for i, method in enumerate(asked):
        # All draws at once: a batch of another size would be compiled. Who does not draw answers as before.
        more = (e.runs - 1) * method.draws
        made = method.run(np.concatenate([rows, *[again] * more]), 10_000 * run.seed)
        first = made.first(len(rows))
        draws = [first.vectors[: len(again)]] * (e.runs - more)
        draws += np.split(made.vectors[len(rows) :], more) if more else []
        found = score(run, rows, first)
        row: dict[str, Any] = {"method": method.name, "data": run.data.name, "seed": run.seed}
        row |= {"part": e.part, "queries": len(rows), "runs": e.runs, "repeated": len(again)}
        row |= {"k": run.config.k, "calls": method.calls, "reads": method.reads, "index": run.index.name}
        row |= {"contents": len(run.data.embeddings), "depth": _depth(run)}
        row |= {name: round(float(values.mean()), 6) for name, values in found.items()}
        row |= over_runs(draws) if len(draws) > 1 else {}
        row["per_query"] = {n: np.round(v, 4).tolist() for n, v in found.items()}
        row["shown"] = _shown(run, rows[: e.show], first) if method.name != RANDOM else []
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
    """Latency rows of FOLM and of the diffusion samplers, per batch size: seconds from the queries' text to
    contents, and of them the encoding of the queries, for who starts from it, and the search; `alone` is all
    but the encoding. A batch that does not fit into memory gets a row that says so."""
    e, rows = run.config.evaluation, run.data.rows(PARTS[0])
    done = {(r["method"], r["batch"]) for r in read_rows(results) if r["seed"] == run.seed}
    timed = re.compile(rf"({FOLM}|{DIFFUSION}(, .*)?)$")
    lines = {m.name: m for m in all_methods(run) if timed.match(m.name)}
    for batch in e.latency:
        at = np.resize(rows, batch)
        for method in lines.values():
            if (method.name, batch) in done:
                continue
            row = {"method": method.name, "batch": batch, "seed": run.seed, "calls": method.calls}
            row |= {"device": jax.devices()[0].device_kind, "k": run.config.k, "repeats": e.repeats}
            try:
                row |= _seconds(run, method, at)
                said = f"{row['p50']:.3f} s"
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                row["skipped"] = said = "out of memory"
            append_rows(results, [row])
            print(f"{method.name}, batch {batch}: {said}", flush=True)
            preemption.leave_if_due()


def _seconds(run: FanoutRun, method: FanoutMethod, rows: np.ndarray) -> dict[str, Any]:
    """The times of a latency row, medians and every repeat's; a warm-up, which compiles, is left out."""
    texts = [run.data.queries[row] for row in rows]
    encode, alone, search = [], [], []
    for n in range(run.config.evaluation.repeats + 1):
        began, index = time.monotonic(), TimedIndex(run.index)
        if method.embedded:
            run.encoder.encode(texts, max_tokens=ENCODED, batch_size=128)
        encoded = time.monotonic()
        made = method.run(rows, n)
        if made.found is None:
            index.search(made.vectors.reshape(-1, made.vectors.shape[-1]), max(1, _depth(run)))
        encode.append(encoded - began if method.embedded else 0.0)
        alone.append(time.monotonic() - encoded)
        search.append(index.seconds + made.searched)
    total = np.add(encode, alone)[1:]
    row = {"p50": float(np.median(total)), "p95": float(np.percentile(total, 95))}
    row |= {"encode_p50": float(np.median(encode[1:])), "search_p50": float(np.median(search[1:]))}
    return row | {"seconds": total.tolist(), "alone": alone[1:]}
