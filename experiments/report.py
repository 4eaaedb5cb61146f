"""Report on a run: python -m experiments.report --workdir=runs/x

Reads workdir/results.jsonl (and config.json, the training logs and predictor_report.json where they
are), prints the table and the verdicts, and writes report.html and frontier.png beside them. A run
whose evaluation is still going on can be reported; methods that lack seeds are named.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import report_page
from experiments.command import launch
from experiments.report_page import short
from experiments.workdir import read_rows
from genret.modit.protocol import SPLITS
from genret.retrieval.significance import paired_bootstrap
from genret.types import InputError

OURS, CENTROID, PLAIN = "MO-DiT", "seed mean", "plain pretrained DiT"
STEERING, CEILING = "linear-probe steering", "reference: true positives of the pattern"
METRICS = ("joint", "attribute", "purity", "normalised_joint")
PROTOCOL = ("catalogue", "k", "n_items")


@dataclass(frozen=True)
class Results:
    """The rows of one catalogue under one protocol. Cells are (split, domain) pairs.

    values: metric -> f64[methods, seeds, splits, domains], NaN where a seed of a method is missing.
    hits: (method, split, domain) -> f64[Q], Joint per context averaged over seeds.
    pattern: (split, domain) -> i64[Q], the pattern of each context. rows: all of them, as read.
    """

    methods: list[str]
    seeds: list[int]
    splits: list[str]
    domains: list[str]
    values: dict[str, np.ndarray]
    hits: dict[tuple[str, str, str], np.ndarray]
    pattern: dict[tuple[str, str], np.ndarray]
    rows: list[dict[str, Any]]

    @property
    def k(self) -> int:
        return self.rows[0]["k"]

    @functools.cached_property
    def reference(self) -> np.ndarray:
        """bool[methods]: reads what the question hides."""
        return np.array([hidden(self.spread(m, "uses")[0]) for m in self.methods])

    @functools.cached_property
    def single_probe_baseline(self) -> np.ndarray:
        """bool[methods]: a rival of MO-DiT at its own number of index probes."""
        single = [self.spread(m, "probes")[1] == 1 for m in self.methods]
        return np.array(single) & [not m.startswith(OURS) for m in self.methods] & ~self.reference

    def spread(self, method: str, key: str) -> tuple[Any, Any]:
        """Least and largest `key` of a method's rows."""
        found = [row[key] for row in self.rows if row["method"] == method]
        return min(found), max(found)

    def cells(self, metric: str) -> np.ndarray:
        """Mean over the seeds there are, f64[methods, splits, domains]."""
        return np.nanmean(self.values[metric], axis=1)

    def unfinished(self) -> list[str]:
        """A sentence for each method that lacks seeds."""
        absent = np.isnan(self.values["joint"]).any(axis=(2, 3))
        return [
            f"{m} lacks seed {', '.join(map(str, np.array(self.seeds)[gone]))}"
            for m, gone in zip(self.methods, absent, strict=True)
            if gone.any()
        ]


def hidden(uses: str) -> bool:
    """Whether a row's `uses` names something that the question hides, as only references may."""
    return uses not in ("nothing", "labels")


def read_results(path: Path) -> Results:
    """All rows of results.jsonl, references last.

    Raises InputError if there are none, if one cannot be read or is there twice, or if they are of
    several catalogues, depths or sets of contexts: such numbers must not stand in one table.
    """

    def refuse(problem: str, fix: str) -> None:
        raise InputError(str(path), problem, fix)

    try:
        rows = read_rows(path)
        index = {(r["method"], r["seed"], r["split"], r["domain"]): r for r in rows}
        of_kind = {r["method"]: hidden(r["uses"]) for r in rows}  # in file order
        mixed = {key: sorted({r[key] for r in rows}, key=str) for key in PROTOCOL}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        refuse(f"holds a row that is not of an evaluation ({error!r})", "evaluate again")
    if not rows:
        refuse("holds no rows", "run experiments.evaluate with the same --workdir first")
    for key, found in mixed.items():
        if len(found) > 1:
            refuse(f"mixes {key} {' and '.join(map(str, found))}", "give each its own --workdir")
    if len(index) < len(rows):
        refuse("holds a row twice", "evaluate again in a new --workdir")
    methods = sorted(of_kind, key=of_kind.get)  # stable: file order, then references
    seeds = sorted({r["seed"] for r in rows})
    splits = [s for s in SPLITS if any(r["split"] == s for r in rows)]
    domains = list(dict.fromkeys(r["domain"] for r in rows))
    shape = len(methods), len(seeds), len(splits), len(domains)
    values = {name: np.full(shape, np.nan) for name in METRICS}
    hits: dict[tuple[str, str, str], list] = {}
    pattern: dict[tuple[str, str], np.ndarray] = {}
    for (method, seed, split, domain), row in index.items():
        at = methods.index(method), seeds.index(seed), splits.index(split), domains.index(domain)
        for name in METRICS:
            values[name][at] = row[name]
        asked = np.array(row["per_context"]["pattern"])
        if not np.array_equal(pattern.setdefault((split, domain), asked), asked):
            refuse(
                f"mixes sets of contexts in {split}/{domain} ({method}, seed {seed})",
                "give each its own --workdir",
            )
        hits.setdefault((method, split, domain), []).append(row["per_context"]["joint"])
    absent = np.isnan(values["joint"])
    for m, s in np.argwhere(absent.any(axis=(2, 3)) & ~absent.all(axis=(2, 3)))[:1]:
        refuse(f"lacks cells of {methods[m]}, seed {seeds[s]}", "evaluate again")
    mean = {cell: np.mean(lists, axis=0) / rows[0]["k"] for cell, lists in hits.items()}
    return Results(methods, seeds, splits, domains, values, mean, pattern, rows)


class Table(NamedTuple):
    """C columns: Joint per split, Joint per cell, then the other metrics.

    numbers, sd: f64[methods, C]; sd is over seeds and NaN where it has no meaning or place.
    best: bool[methods, C], the best of the methods that are no references.
    """

    numbers: np.ndarray
    sd: np.ndarray
    best: np.ndarray


def make_table(r: Results) -> Table:
    """Means over seeds; Joint per split is a mean over domains, other metrics over all cells."""
    by_seed = r.values["joint"].mean(axis=3)  # [methods, seeds, splits]
    cells = r.cells("joint").reshape(len(r.methods), -1)
    others = np.stack([r.cells(m).mean(axis=(1, 2)) for m in METRICS[1:]], axis=1)
    numbers = np.concatenate([np.nanmean(by_seed, axis=1), cells, others], axis=1)
    sd = np.full(numbers.shape, np.nan)
    many = (~np.isnan(by_seed[:, :, 0])).sum(1) > 1
    sd[many, : len(r.splits)] = np.nanstd(by_seed[many], axis=1, ddof=1)
    best = (numbers == numbers[~r.reference].max(axis=0)) & ~r.reference[:, None]
    return Table(numbers, sd, best)


def span(values: tuple[Any, Any]) -> str:
    """'35', or '1-2' where cells differ."""
    return "-".join(str(v) for v in dict.fromkeys(values))


def text_table(r: Results) -> str:
    """The table for a terminal. '*' stands before the best of a column, '>' before MO-DiT."""
    t, splits, domains = make_table(r), len(r.splits), len(r.domains)
    bare = [m.removeprefix("reference: ") for m in r.methods]
    name, mean = max(map(len, bare)) + 2, 10 if np.isfinite(t.sd).any() else 8
    tags = [d[:4].rstrip("_") for d in r.domains]
    if len(set(tags)) < domains:
        tags = [f"d{i}" for i in range(domains)]

    def line(first: str, means: list[str], cells: list[str], rest: str) -> str:
        groups = [cells[s * domains : (s + 1) * domains] for s in range(splits)]
        return first.ljust(name) + "  ".join("".join(g) for g in (means, *groups)) + rest

    means = [s.split("_")[0].rjust(mean) for s in r.splits]
    head = line("", means, [f"{t:>5}" for t in tags] * splits, "   attr  pur norm probes calls  reads")
    top = " " * name + f"mean Joint@{r.k}".rjust(mean * splits)
    lines = [top + "".join(f"  {s:>{5 * domains}}" for s in r.splits), head, "-" * len(head)]
    for i, method in enumerate(r.methods):
        if r.reference[i] and not r.reference[i - 1]:
            lines += [lines[2], "references: they read what the question hides"]
        said = [f"{'*' if t.best[i, c] else ' '}{short(x)}" for c, x in enumerate(t.numbers[i])]
        sds = ["±" + short(x) if np.isfinite(x) else "" for x in t.sd[i, :splits]]
        means = [(x + sd).ljust(mean) for x, sd in zip(said, sds, strict=False)]
        probes, calls = (span(r.spread(method, key)) for key in ("probes", "calls"))
        rest = f"  {''.join(said[-3:])} {probes:>6} {calls:>5}  {r.spread(method, 'uses')[0]}"
        first = f"{'> ' if method == OURS else '  '}{bare[i]}"
        lines.append(line(first, means, said[splits:-3], rest))
    legend = ", ".join(f"{t} = {d}" for t, d in zip(tags, r.domains, strict=True) if t != d)
    return "\n".join([*lines, lines[2], legend])


class Verdict(NamedTuple):
    """One finding: the figure, and what it is."""

    figure: str
    text: str


def verdicts(r: Results) -> list[Verdict]:
    """What the table says about MO-DiT; rivals that were not evaluated are passed over."""
    if OURS not in r.methods:
        return []
    joint, purity = r.cells("joint"), r.cells("purity")
    row = {m: i for i, m in enumerate(r.methods)}
    ours, cells, out = joint[row[OURS]], joint[0].size, []

    def ahead(rival: np.ndarray, name: str) -> None:
        mean = short((ours - rival).mean(), "+")
        text = f"cells where MO-DiT is ahead of {name} in Joint@{r.k}; {mean} on average"
        out.append(Verdict(f"{(ours > rival).sum()} of {cells}", text))

    encoders = [m for m in r.methods if m.startswith("contrastive encoder")]
    for name in (CENTROID, PLAIN, STEERING, *encoders):
        if name in row:
            ahead(joint[row[name]], name)
    if r.single_probe_baseline.any():
        best = joint[r.single_probe_baseline].max(axis=0)
        ahead(best, "the best single-probe baseline of each cell (picked on test)")
        if CEILING in row:
            gap = joint[row[CEILING]].mean() - best.mean()
            share = f"{(ours.mean() - best.mean()) / gap:.0%}" if gap > 0 else "none left"
            text = "of the distance from that best baseline to the true-positives centroid is closed"
            out.append(Verdict(share, text))
    if CENTROID in row:
        lost = purity[row[CENTROID]] - purity[row[OURS]]
        means = (f"{short(x)} on {s}" for s, x in zip(r.splits, lost.mean(1), strict=True))
        s, d = np.unravel_index(lost.argmax(), lost.shape)
        cell = f"{r.splits[s]}/{r.domains[d]}"
        text = f"Purity lost against {CENTROID} in the worst cell, {cell}; {' and '.join(means)}"
        out.append(Verdict(short(lost.max()), text))
    recalls = [(q["ann_recall"], q["method"]) for q in r.rows if q["ann_recall"] is not None]
    if recalls:
        least, method = min(recalls)
        text = f"smallest recall of the {r.rows[0]['index']} index ({method})"
        out.append(Verdict(f"{least:.4f}", text))
    return out


class Interval(NamedTuple):
    """MO-DiT minus `rival` in Joint in one cell, with its 95 % interval over patterns."""

    rival: str
    split: str
    domain: str
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{short(self.mean, '+')} [{short(self.low, '+')}, {short(self.high, '+')}]"


def intervals(r: Results) -> list[Interval]:
    """Paired bootstrap per cell and rival; hits are averaged over seeds first."""
    if OURS not in r.methods:
        return []
    return [
        Interval(m, s, d, *paired_bootstrap(r.hits[OURS, s, d] - r.hits[m, s, d], r.pattern[s, d]))
        for m in (CENTROID, STEERING) if m in r.methods
        for s in r.splits for d in r.domains
    ]  # fmt: skip


def protocol_line(r: Results) -> str:
    """What the figures were measured on."""
    patterns = len(set(np.concatenate(list(r.pattern.values())).tolist()))
    lookups = [f"{x:,}" for x in sorted({q["lookups"] for q in r.rows if q["uses"] == "labels"})]
    return (
        f"{r.rows[0]['catalogue']}: {r.rows[0]['n_items']:,} items, K = {r.k}, "
        f"{sum(map(len, r.pattern.values())):,} contexts of {patterns:,} patterns, "
        f"{' to '.join(dict.fromkeys((lookups[0], lookups[-1])))} label look-ups, "
        f"{'seed' if len(r.seeds) == 1 else 'seeds'} {', '.join(map(str, r.seeds))}"
    )


def text_report(r: Results) -> str:
    """Everything the command prints."""
    lines = [protocol_line(r), "", text_table(r), ""]
    lines += [f"{v.figure:>9}  {v.text}" for v in verdicts(r)]
    rivals: dict[str, str] = {}
    cells: dict[str, str] = {}
    for i in intervals(r):
        cell = f"{i.split}/{i.domain}"
        rivals[i.rival] = f"{i.rival:<26}"
        cells[cell] = cells.get(cell, "") + f"{i!s:<26}"
    if cells:
        wide = max(map(len, cells)) + 2
        lines += ["", f"{'MO-DiT minus':<{wide}}{''.join(rivals.values())}95 % over patterns"]
        lines += [f"{cell:<{wide}}{said}" for cell, said in cells.items()]
    return "\n".join(lines + [f"unfinished: {sentence}" for sentence in r.unfinished()])


def main(workdir: Path) -> None:
    """Print the report of a run and write its page."""
    r = read_results(workdir / "results.jsonl")
    print(text_report(r))
    predictors = report_page.predictor_rows(workdir)
    if predictors:
        names = ("density predictor", "split", "attribute", *report_page.AGREEMENT)
        print("\nwithin patterns, on test items:")
        for row in (names, *predictors):
            print("  " + "".join(f"{x:<{w}}" for x, w in zip(row, (26, 17, 16, 10, 9, 7, 11), strict=True)))
    page = report_page.write(workdir, r, make_table(r), protocol_line(r), verdicts(r), intervals(r))
    print(f"\n{page}")


if __name__ == "__main__":
    launch(main, config=False)
