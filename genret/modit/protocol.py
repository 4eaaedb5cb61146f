"""The evaluation protocol: contexts, methods, choice on validation, rows on test (papers' A.9).

A method turns contexts into queries (or straight into a ranking); everything after that is shared:
the full corpus is ranked, seeds are left out, unknown labels are skipped, and one row is written per
(method, domain, split). Settings are chosen per domain and split on that split's validation contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genret.catalogue.format import Catalogue
from genret.catalogue.splits import Splits
from genret.retrieval.index import Index, recall_by_score
from genret.retrieval.metrics import Judgement, judge, macro
from genret.retrieval.ranking import rank, rank_set
from genret.training import processes
from genret.types import InputError

SPLITS = ("item_holdout", "pattern_holdout")
Cell = tuple[int, int]
"""(index into SPLITS, domain)."""


@dataclass(frozen=True)
class Contexts:
    """Q questions. seeds: i32[Q, S] catalogue rows, padded with -1; domain, pattern: i32[Q]; split: i32[Q]
    index into SPLITS."""

    seeds: np.ndarray
    domain: np.ndarray
    pattern: np.ndarray
    split: np.ndarray

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, rows: np.ndarray) -> Contexts:
        """The contexts at `rows`."""
        return Contexts(self.seeds[rows], self.domain[rows], self.pattern[rows], self.split[rows])


def draw_contexts(
    catalogue: Catalogue,
    splits: Splits,
    stage: str,
    *,
    seeds: int = 8,
    least_seeds: int = 4,
    least_positives: int = 5,
    per_pattern: int = 2,
    patterns: int = 0,
    seed: int = 0,
) -> Contexts:
    """Contexts of `stage` (validation or test): up to `seeds` held-out items of one pattern that lack
    the attribute; one context where there are no more than `seeds` of them to choose from.

    A (pattern, domain) pair is asked only if it has `least_seeds` such items and `least_positives`
    items with the attribute. patterns: most patterns per (split, domain), a random choice; 0 takes all.
    Raises InputError when a domain of a split has no context.
    """
    found = []
    by_pattern = np.argsort(catalogue.patterns, kind="stable")  # one pass over N, not one for each pattern
    ends = np.searchsorted(catalogue.patterns, np.arange(catalogue.num_patterns + 1), sorter=by_pattern)
    for s, split in enumerate(SPLITS):
        holdout = splits.holdout(split, stage)
        rng = np.random.default_rng([seed, s, ("validation", "test").index(stage)])
        rows_of = [(int(p), by_pattern[ends[p] : ends[p + 1]]) for p in holdout.patterns]
        for m, name in enumerate(catalogue.attribute_names):
            before, asked = len(found), 0
            order = rng.permutation(len(rows_of)) if patterns else range(len(rows_of))
            for p, rows in (rows_of[i] for i in order):
                if patterns and asked == patterns:
                    break
                label = catalogue.labels[m, rows]
                lacking = rows[(label == 0) & holdout.items[rows]]
                if len(lacking) < least_seeds or (label == 1).sum() < least_positives:
                    continue
                asked += 1
                for _ in range(per_pattern if len(lacking) > seeds else 1):
                    chosen = rng.choice(lacking, min(seeds, len(lacking)), replace=False)
                    found.append((np.pad(chosen, (0, seeds - len(chosen)), constant_values=-1), m, p, s))
            if len(found) == before:
                raise InputError(
                    f"attribute/{name}",
                    f"no pattern of {split}/{stage} has {least_seeds} held-out items without it and "
                    f"{least_positives} with it",
                    "use larger patterns, or lower evaluation.least_seeds or least_positives",
                )
    seeds_, domain, pattern, split_ = (np.asarray(c, np.int32) for c in zip(*found, strict=True))
    return Contexts(seeds_, domain, pattern, split_)


@dataclass(frozen=True)
class Searcher:
    """The database as every method sees it. Probes are counted per context by the methods."""

    catalogue: Catalogue
    index: Index
    k: int

    def rank(self, queries: np.ndarray, contexts: Contexts) -> np.ndarray:
        """Top-K judged non-seed items i32[Q, K] of queries f32[Q, R, D], merged over R by best score."""
        shared = dict(exclude=contexts.seeds, labels=self.catalogue.labels, domain=contexts.domain)
        if queries.shape[1] == 1:
            return rank(self.index, queries[:, 0], self.k, **shared)
        return rank_set(self.index, queries, self.k, **shared)

    def judge(self, ids: np.ndarray, contexts: Contexts) -> Judgement:
        """Joint, Attribute, Purity and headroom of rankings i32[Q, K]."""
        c = self.catalogue
        return judge(
            ids, labels=c.labels, domain=contexts.domain, patterns=c.patterns,
            pattern=contexts.pattern, seeds=contexts.seeds,
        )  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One line of the table.

    run: (contexts, setting) -> queries f32[Q, R, D], or (ranking i32[Q, K], the queries behind it).
    grid: settings to choose from on validation, per cell; one setting means nothing to choose.
    probes: index probes per context. calls: network evaluations per context, or setting -> calls.
    uses: what it reads beyond seeds: 'nothing', 'labels' (the shared budget), or, as only references and
    one ablation do, 'pattern' or 'all labels', which the question hides.
    floor: least validation Purity per (split, domain) that a setting should keep, or a function giving it.
    table: the table of the report that the line belongs to; x: where it stands, if that is a curve.
    """

    name: str
    run: Callable[[Contexts, Any], np.ndarray | tuple[np.ndarray, np.ndarray]]
    grid: Sequence[Any] = (None,)
    probes: int = 1
    calls: int | Callable[[Any], int] = 0
    uses: str = "labels"
    floor: dict[Cell, float] | Callable[[], dict[Cell, float]] = field(default_factory=dict)
    table: str = "main"
    x: float | None = None


def ranking(method: Method, searcher: Searcher, contexts: Contexts, setting: Any):
    """(ids i32[Q, K], queries f32[Q, R, D])."""
    out = method.run(contexts, setting)
    if isinstance(out, tuple):
        return out
    if not np.isfinite(out).all():
        raise InputError(method.name, "made a query that is not finite", "check what it was fitted on")
    return searcher.rank(out, contexts), out


def choose(method: Method, searcher: Searcher, contexts: Contexts) -> dict[Cell, Any]:
    """(split, domain) -> the setting with the best validation Joint; ties go to the earlier setting.

    Settings whose validation Purity is below the method's floor are passed over, unless all are.
    """
    cells = _cells(contexts)
    if len(method.grid) == 1:
        return dict.fromkeys(cells, method.grid[0])
    score, floor = {}, method.floor() if callable(method.floor) else method.floor
    for setting in method.grid:
        joint, purity = validation_scores(method, searcher, contexts, setting)
        for cell in cells:
            score[cell, setting] = (purity[cell] >= floor.get(cell, 0.0), joint[cell])
    best = [max(range(len(method.grid)), key=lambda i: score[cell, method.grid[i]]) for cell in cells]
    # Every process has a ScaNN of its own, and rounding can flip a tie: all take what the first chose.
    best = processes.agreed("chosen settings", best)
    return {cell: method.grid[i] for cell, i in zip(cells, best, strict=True)}


def validation_scores(
    method: Method, searcher: Searcher, contexts: Contexts, setting: Any
) -> tuple[dict[Cell, float], dict[Cell, float]]:
    """Macro Joint and Purity per (split, domain), to six decimals: float32 is to break no tie."""
    scores = searcher.judge(ranking(method, searcher, contexts, setting)[0], contexts)
    at = {c: (contexts.split == c[0]) & (contexts.domain == c[1]) for c in _cells(contexts)}
    return tuple(
        {c: round(macro(values[here], contexts.pattern[here]), 6) for c, here in at.items()}
        for values in (scores.joint, scores.purity)
    )


def _cells(contexts: Contexts) -> list[Cell]:
    return sorted({*zip(contexts.split.tolist(), contexts.domain.tolist(), strict=True)})


def evaluate(
    method: Method,
    searcher: Searcher,
    exact: Index,
    validation: Contexts,
    test: Contexts,
    protocol: dict[str, Any],
    lookups: int,
) -> list[dict[str, Any]]:
    """Rows of one method, one per (split, domain), with hits per context for paired tests.

    lookups: distinct attribute look-ups of the shared training budget; a row counts them only where the
    method reads labels, and `tried` counts the settings that validation labels chose among.
    exact: measures the recall of `searcher.index` on this method's own queries.
    """
    chosen = choose(method, searcher, validation)
    rows = []
    for setting in dict.fromkeys(chosen.values()):
        cells = [cell for cell, s in chosen.items() if s == setting]
        here = np.any([(test.split == s) & (test.domain == m) for s, m in cells], axis=0)
        contexts = test.take(np.flatnonzero(here))
        ids, queries = ranking(method, searcher, contexts, setting)
        scores = searcher.judge(ids, contexts)
        for s, m in cells:
            at = np.flatnonzero((contexts.split == s) & (contexts.domain == m))
            pattern = contexts.pattern[at]
            row = {"method": method.name, "table": method.table, "x": method.x}
            row["domain"] = searcher.catalogue.attribute_names[m]
            row |= {
                "split": SPLITS[s],
                **protocol,
                "contexts": len(at),
                "patterns": len(set(pattern)),
            }
            for name in ("joint", "attribute", "purity", "headroom", "normalised_joint"):
                row[name] = round(macro(getattr(scores, name)[at], pattern), 6)
            row |= {"setting": setting, "probes": method.probes, "tried": len(method.grid)}
            known = int((searcher.catalogue.labels >= 0).sum())
            row["lookups"] = {"nothing": 0, "labels": lookups, "pattern": lookups}.get(method.uses, known)
            row["calls"] = method.calls(setting) if callable(method.calls) else method.calls
            row |= {"uses": method.uses, "index": searcher.index.name}
            row["ann_recall"] = _recall(searcher, exact, queries[at])
            hits = {
                n: np.rint(getattr(scores, n)[at] * searcher.k).astype(int).tolist()
                for n in ("joint", "attribute", "purity")
            }
            row["per_context"] = {"pattern": pattern.tolist(), **hits}
            rows.append(row)
    return rows


def _recall(searcher: Searcher, exact: Index, queries: np.ndarray, most: int = 256) -> float:
    flat = queries.reshape(-1, queries.shape[-1])[:most]
    found, best = (i.search(flat, searcher.k)[1] for i in (searcher.index, exact))
    return round(recall_by_score(found, best), 6)
