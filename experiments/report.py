"""Report on a run: python -m experiments.report --workdir=runs/x

Reads workdir/results.jsonl (and config.json, the training logs and predictor_report.json where they
are), prints the table and the verdicts, and writes report.html and frontier.png beside them. A run
whose evaluation is still going on can be reported; methods that lack seeds are named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import report_page
from experiments.command import launch
from experiments.evaluate import read_rows
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

    @property
    def reference(self) -> np.ndarray:
        """bool[methods]: reads what the question hides."""
        return np.array([self.spread(m, "uses")[-1] not in ("nothing", "labels") for m in self.methods])

    @property
    def single_probe_baseline(self) -> np.ndarray:
        """bool[methods]: a rival of MO-DiT at its own number of index probes."""
        rivals = [not m.startswith(OURS) and self.spread(m, "probes")[-1] == 1 for m in self.methods]
        return np.array(rivals) & ~self.reference

    def spread(self, method: str, key: str) -> tuple[Any, Any]:
        """Least and largest `key` of a method's rows."""
        found = [row[key] for row in self.rows if row["method"] == method]
        return min(found), max(found)

    def cells(self, metric: str) -> np.ndarray:
        """Mean over seeds, f64[methods, splits, domains]."""
        return np.nanmean(self.values[metric], axis=1)

    def unfinished(self) -> dict[str, list[int]]:
        """method -> the seeds it lacks."""
        lacks = np.isnan(self.values["joint"]).any(axis=(2, 3))
        return {m: [s for s, gone in zip(self.seeds, lacks[i], strict=True) if gone]
                for i, m in enumerate(self.methods) if lacks[i].any()}  # fmt: skip


def read_results(path: Path) -> Results:
    """All rows of results.jsonl, references last.

    Raises InputError if there are none, if one cannot be read, or if they are of several catalogues,
    depths or sets of contexts: such numbers must not stand in one table.
    """
    try:
        rows = read_rows(path)
        index = {(r["method"], r["seed"], r["split"], r["domain"]): r for r in rows}
        hides = {r["method"]: r["uses"] not in ("nothing", "labels") for r in rows}
        mixed = {key: sorted({r[key] for r in rows}, key=str) for key in PROTOCOL}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(str(path), f"holds a row that is not ours ({error!r})", "evaluate again") from None
    if not rows:
        raise InputError(str(path), "holds no rows", "run experiments.evaluate with the same --workdir first")
    for key, found in mixed.items():
        if len(found) > 1:
            raise InputError(
                str(path), f"mixes {key} {' and '.join(map(str, found))}", "give each protocol its own --workdir"
            )
    methods = sorted(dict.fromkeys(r["method"] for r in rows), key=hides.get)  # stable: file order
    seeds, domains = sorted({r["seed"] for r in rows}), list(dict.fromkeys(r["domain"] for r in rows))
    splits = [s for s in SPLITS if any(r["split"] == s for r in rows)]
    values = {n: np.full((len(methods), len(seeds), len(splits), len(domains)), np.nan) for n in METRICS}
    hits: dict[tuple[str, str, str], list] = {}
    pattern: dict[tuple[str, str], np.ndarray] = {}
    for (method, seed, split, domain), row in index.items():
        at = methods.index(method), seeds.index(seed), splits.index(split), domains.index(domain)
        for name in METRICS:
            values[name][at] = row[name]
        asked = np.array(row["per_context"]["pattern"])
        if not np.array_equal(pattern.setdefault((split, domain), asked), asked):
            raise InputError(
                str(path), f"mixes sets of contexts in {split}/{domain} ({method}, seed {seed})",
                "evaluate again in a new --workdir",
            )  # fmt: skip
        hits.setdefault((method, split, domain), []).append(row["per_context"]["joint"])
    partial = np.isnan(values["joint"]).any(axis=(2, 3)) & ~np.isnan(values["joint"]).all(axis=(2, 3))
    if partial.any() or len(index) != len(rows):
        m, s = np.argwhere(partial)[0] if partial.any() else (0, 0)
        what = f"{methods[m]}, seed {seeds[s]}" if partial.any() else "a method and seed twice"
        raise InputError(str(path), f"has an incomplete or repeated set of cells ({what})", "evaluate again")
    mean = {cell: np.mean(lists, axis=0) / rows[0]["k"] for cell, lists in hits.items()}
    return Results(methods, seeds, splits, domains, values, mean, pattern, rows)


class Table(NamedTuple):
    """names: C columns. numbers, sd: f64[methods, C], sd NaN where it has no meaning or place.
    best: bool[methods, C], the best of the methods that are no references."""

    names: list[str]
    numbers: np.ndarray
    sd: np.ndarray
    best: np.ndarray


def make_table(r: Results) -> Table:
    """Joint per split (mean over domains; sd over seeds), Joint per cell, then the other metrics."""
    by_seed = r.values["joint"].mean(axis=3)  # [methods, seeds, splits]
    cells = r.cells("joint").reshape(len(r.methods), -1)
    others = np.stack([r.cells(m).mean(axis=(1, 2)) for m in METRICS[1:]], axis=1)
    numbers = np.concatenate([np.nanmean(by_seed, axis=1), cells, others], axis=1)
    sd = np.full(numbers.shape, np.nan)
    many = (~np.isnan(by_seed[:, :, 0])).sum(1) > 1
    sd[many, : len(r.splits)] = np.nanstd(by_seed[many], axis=1, ddof=1)
    names = [*r.splits, *(f"{s}/{d}" for s in r.splits for d in r.domains), *METRICS[1:]]
    best = (numbers == numbers[~r.reference].max(axis=0)) & ~r.reference[:, None]
    return Table(names, numbers, sd, best)


def short(x: float, sign: str = "") -> str:
    """Three decimals without the leading zero: .286, +.052, 1.00."""
    return f"{x:{sign}.3f}".replace("0.", ".", 1)[: 5 if sign else 4]


def span(least: Any, most: Any) -> str:
    """'35', or '1-2' where cells differ."""
    return str(most) if least == most else f"{least}-{most}"


def text_table(r: Results) -> str:
    """The table for a terminal. '*' stands before the best of a column, '>' before MO-DiT."""
    t, splits, domains = make_table(r), len(r.splits), len(r.domains)
    bare = [m.removeprefix("reference: ") for m in r.methods]
    wide = max(map(len, bare)) + 2
    mean = 10 if np.isfinite(t.sd).any() else 5
    tags = [d[:4] for d in r.domains]
    if len(set(tags)) < domains:
        tags = [f"d{i}" for i in range(domains)]
    heads = [s.split("_")[0].rjust(mean) for s in r.splits], [t.rjust(5) for t in tags] * splits
    top = " " * (wide + mean * splits + 2) + "  ".join(s.center(5 * domains) for s in r.splits)
    head = f"{f'Joint@{r.k}':>{wide}}" + "".join(heads[0]) + "  "
    head += "  ".join("".join(heads[1][:domains]) for _ in r.splits)
    lines = [top, head + "   attr  pur norm probes calls  reads"]
    rule = "-" * len(lines[1])
    lines.append(rule)
    for i, method in enumerate(r.methods):
        if r.reference[i] and not r.reference[i - 1]:
            lines += [rule, "references: they read what the question hides"]
        said = ["*"[: t.best[i, c]].rjust(1) + short(x) for c, x in enumerate(t.numbers[i])]
        for c in range(splits):
            sd = "±" + short(t.sd[i, c]) if np.isfinite(t.sd[i, c]) else ""
            said[c] += sd.ljust(mean - 5)
        parts = [said[:splits], *(said[splits + s * domains :][:domains] for s in range(splits)), said[-3:]]
        line = f"{'> ' if method == OURS else '  '}{bare[i]}".ljust(wide)
        line += "  ".join("".join(p) for p in parts)
        probes, calls = (span(*r.spread(method, key)) for key in ("probes", "calls"))
        lines.append(f"{line} {probes:>6} {calls:>5}  {r.spread(method, 'uses')[-1]}")
    legend = ", ".join(f"{t} = {d}" for t, d in zip(tags, r.domains, strict=True) if t != d)
    return "\n".join([*lines, rule, *([legend] if legend else [])])


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
        text = f"cells where MO-DiT is ahead of {name} in Joint@{r.k}, by {short((ours - rival).mean(), '+')} on average"
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
            out.append(Verdict(share, "of the distance from that best baseline to the true-positives centroid is closed"))
    if CENTROID in row:
        lost = purity[row[CENTROID]] - purity[row[OURS]]
        by_split = ", ".join(f"{short(x, '+')} {s}" for s, x in zip(r.splits, lost.mean(1), strict=True))
        s, d = np.unravel_index(lost.argmax(), lost.shape)
        text = f"most Purity lost against {CENTROID} in a cell ({r.splits[s]}/{r.domains[d]}); mean {by_split}"
        out.append(Verdict(short(lost.max(), "+"), text))
    recalls = [(q["ann_recall"], q["method"]) for q in r.rows if q["ann_recall"] is not None]
    if recalls:
        least = min(recalls)
        out.append(Verdict(f"{least[0]:.4f}", f"smallest recall of the {r.rows[0]['index']} index ({least[1]})"))
    return out


class Interval(NamedTuple):
    """MO-DiT minus `rival` in Joint, with its 95 % interval over patterns."""

    rival: str
    split: str
    domain: str
    mean: float
    low: float
    high: float


def intervals(r: Results) -> list[Interval]:
    """Paired bootstrap per cell and rival; hits are averaged over seeds first."""
    if OURS not in r.methods:
        return []
    return [
        Interval(rival, s, d, *paired_bootstrap(r.hits[OURS, s, d] - r.hits[rival, s, d], r.pattern[s, d]))
        for rival in (CENTROID, STEERING) if rival in r.methods
        for s in r.splits for d in r.domains
    ]  # fmt: skip


def protocol_line(r: Results) -> str:
    """What the figures were measured on."""
    patterns = len(set(np.concatenate(list(r.pattern.values())).tolist()))
    lookups = [f"{x:,}" for x in sorted({q["lookups"] for q in r.rows})]
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
    found = intervals(r)
    if found:
        rivals = list(dict.fromkeys(i.rival for i in found))
        wide = max(len(f"{i.split}/{i.domain}") for i in found) + 2
        lines += ["", "MO-DiT minus".ljust(wide) + "".join(n.ljust(26) for n in rivals) + "(95 % over patterns)"]
        for s in r.splits:
            for d in r.domains:
                here = [i for i in found if (i.split, i.domain) == (s, d)]
                said = [f"{short(i.mean, '+')} [{short(i.low, '+')}, {short(i.high, '+')}]" for i in here]
                lines.append(f"{s}/{d}".ljust(wide) + "".join(x.ljust(26) for x in said))
    lines += [f"unfinished: {m} lacks seeds {', '.join(map(str, s))}" for m, s in r.unfinished().items()]
    return "\n".join(lines)


def main(workdir: Path) -> None:
    """Print the report of a run and write its page."""
    r = read_results(workdir / "results.jsonl")
    print(text_report(r))
    page = report_page.write(
        workdir, r, make_table(r), protocol_line(r), verdicts(r), intervals(r)
    )
    print(f"\n{page}")


if __name__ == "__main__":
    launch(main, config=False)
