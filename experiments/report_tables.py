"""The tables of a report: their numbers, and how a terminal shows them."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from experiments.evidence import (
    PLAIN,
    Comparison,
    comparisons,
    natural_rival,
    pooled,
    short,
    short_p,
    table_verdicts,
    verdicts,
)
from experiments.report_rows import AGREEMENT, METRICS, Results
from genret.retrieval.significance import Paired

SIDES = {  # table -> (title, what the x of a curve is)
    "stages": ("Stage by stage", ""),
    "order": ("The order of the walks in CPT", ""),
    "pool": ("The candidate pool of HPPO", ""),
    "preconditioning": ("Preconditioning", ""),
    "query kind": ("Kinds of query", ""),
    "calls": ("Denoiser calls", "calls"),
    "guidance": ("Guidance", "w"),
    "steering": ("Steering", "s"),
}


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
    best = (numbers == numbers[~r.reference].max(axis=0, initial=-1)) & ~r.reference[:, None]
    return Table(numbers, sd, best)


def span(values: tuple[Any, Any]) -> str:
    """'35', or '1-2' where cells differ."""
    return "-".join(str(v) for v in dict.fromkeys(values))


def text_table(r: Results) -> str:
    """The table for a terminal. '*' stands before the best of a column, '>' before our method."""
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
        first = f"{'> ' if method == r.ours else '  '}{bare[i]}"
        lines.append(line(first, means, said[splits:-3], rest))
    legend = ", ".join(f"{t} = {d}" for t, d in zip(tags, r.domains, strict=True) if t != d)
    return "\n".join([*lines, lines[2], legend])


def interval(test: Paired) -> str:
    """+.011 [+.002, +.020]."""
    return f"{short(test.mean, '+')} [{short(test.low, '+')}, {short(test.high, '+')}]"


class Line(NamedTuple):
    """One row of a side table. joint, sd: f64[splits], sd over seeds, NaN for one; x: None off a curve.

    attribute_of, purity_of: f64[splits], and their means. gain: Joint minus that of `rival`, all cells
    pooled; None for the rival itself and on curves.
    """

    method: str
    x: float | None
    joint: np.ndarray
    sd: np.ndarray
    attribute_of: np.ndarray
    purity_of: np.ndarray
    calls: str
    rival: str | None
    gain: Paired | None

    @property
    def attribute(self) -> float:
        return self.attribute_of.mean()

    @property
    def purity(self) -> float:
        return self.purity_of.mean()


class Side(NamedTuple):
    """A table beside the main one: name, title, what its x is ('' where there is none), lines."""

    name: str
    title: str
    x: str
    lines: list[Line]


@functools.lru_cache(maxsize=4)
def sides(r: Results) -> list[Side]:
    """Every table but the main one, in the order of SIDES; curves are sorted by x."""
    names = sorted((n for n in r.tables if n != "main"), key=[*SIDES, *r.tables].index)
    out = []
    for name in names:
        methods = r.tables[name]
        title, x = SIDES.get(name, (name.capitalize(), "x"))
        curve = all(r.x(m) is not None for m in methods)
        if curve:
            methods = sorted(methods, key=r.x)
        part = r.part(methods)
        t, splits = make_table(part), len(r.splits)
        lines = []
        for i, method in enumerate(methods):
            rival = None if curve else natural_rival(name, methods, method)
            gain = pooled(r, method, rival) if rival else None
            attribute, purity = (r.cell(m, method).mean(axis=1) for m in ("attribute", "purity"))
            calls = span(r.spread(method, "calls"))
            means = t.numbers[i, :splits], t.sd[i, :splits]
            lines.append(Line(method, r.x(method), *means, attribute, purity, calls, rival, gain))
        out.append(Side(name, title, x if curve else "", lines))
    return out


def text_side(r: Results, side: Side) -> str:
    """A side table for a terminal, the command that makes it again, and what it shows."""
    first = [f"{line.x:g}" if side.x else line.method for line in side.lines]
    wide = max(len(side.x or side.title), *map(len, first)) + 2
    means = "".join(f"{s.split('_')[0]:>10}" for s in r.splits)
    lines = [f"{side.title}, mean Joint@{r.k} ± sd over seeds:"]
    rest = {"": "  calls  difference", "calls": ""}.get(side.x, "  calls")
    lines += [f"  {side.x:<{wide}}{means}   attr  pur{rest}"]
    for name, line in zip(first, side.lines, strict=True):
        joint = "".join(
            f"{short(x) + ('±' + short(sd) if np.isfinite(sd) else ''):>10}"
            for x, sd in zip(line.joint, line.sd, strict=True)
        )
        to = f"  {interval(line.gain)} to {line.rival}" if line.gain else ""
        calls = "" if side.x == "calls" else f" {line.calls:>6}"
        lines.append(f"  {name:<{wide}}{joint}   {short(line.attribute)} {short(line.purity)}{calls}{to}")
    lines += [f"  {v.figure:>7}  {v.text}" for v in table_verdicts(r, side.name)]
    return "\n".join(lines + again(r, side.name))


def detailed(r: Results) -> list[Comparison]:
    """The comparisons worth a table: not one that another has already made, cell for cell, nor that with
    the untrained query a second time."""
    seen: list[list] = []
    out = []
    for c in comparisons(r):
        if c.cells["joint"] not in seen and c.rival != PLAIN:
            out.append(c)
        seen.append(c.cells["joint"])
    return out


def text_comparison(c: Comparison) -> str:
    """One line per cell, a column per metric, and the rival where it differs from cell to cell."""
    wide = max(len(f"{x.split.split('_')[0]}/{x.domain}") for x in c.cells["joint"]) + 2
    lines = [
        f"{c.ours} minus {c.rival}:",
        f"  {'':<{wide}}" + "".join(f"{m.capitalize():<35}" for m in c.cells).rstrip(),
    ]
    for found in zip(*c.cells.values(), strict=True):
        said = "".join(f"{f'{x} p {short_p(x.p)} {x.verdict}':<35}" for x in found)
        rival = found[0].rival if c.picked else ""
        cell = f"{found[0].split.split('_')[0]}/{found[0].domain}"
        lines.append(f"  {cell:<{wide}}{said}{rival}".rstrip())
    return "\n".join(lines)


def again(r: Results, table: str) -> list[str]:
    """The commands that make a table again, for the seeds that it has, each after a '$'; none where the
    run's is not known."""
    train = r.about.command
    if not train:
        return []
    beside = {"checkpoints": r.about.checkpoints, "predictor": r.about.predictors}
    rows = beside.get(table) or [row for row in r.rows if (row.get("table") or "main") == table]
    seeds = "+".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    train = re.sub(r"\bseeds=[0-9+]+", f"seeds={seeds}", train)
    evaluate = train.replace("experiments.run", "experiments.evaluate")
    if table == "main":
        return [f"  $ {train}", f"  $ {evaluate}"]
    if table == "predictor":
        return [f"  $ {evaluate}"]
    if table == "checkpoints":
        folders = ",".join(dict.fromkeys(row["folder"] for row in r.about.checkpoints))
        return [f"  $ {evaluate} --checkpoints={folders}"]
    return [f"  $ {evaluate} --methods={shlex.quote(f'^{table}: ')}"]


class Step(NamedTuple):
    """Validation scores of one checkpoint, mean over seeds and domains. joint: f64[splits]."""

    folder: str
    step: int
    seeds: int
    joint: np.ndarray
    attribute: float
    purity: float


def steps(r: Results) -> list[Step]:
    """Every checkpoint of checkpoints.jsonl that all its seeds' cells were evaluated at, by folder."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in r.about.checkpoints:
        groups.setdefault((row["folder"], row["step"]), []).append(row)
    place = {folder: i for i, (folder, _) in reversed(list(enumerate(groups)))}
    out = []
    for (folder, step), rows in sorted(groups.items(), key=lambda item: (place[item[0][0]], item[0][1])):
        joint = [[row["joint"] for row in rows if row["split"] == s] for s in r.splits]
        if all(joint):
            rest = [float(np.mean([row[m] for row in rows])) for m in ("attribute", "purity")]
            seeds = len({row["seed"] for row in rows})
            out.append(Step(folder, step, seeds, np.array([np.mean(x) for x in joint]), *rest))
    return out


def text_steps(r: Results) -> str:
    """Checkpoints against step, '' where none was evaluated."""
    found = steps(r)
    if not found:
        return ""
    wide = max(len(s.folder) for s in found) + 2
    means = "".join(f"{s.split('_')[0]:>9}" for s in r.splits)
    lines = [f"checkpoints, one-call query on the validation contexts, mean Joint@{r.k}:"]
    lines += [f"  {'':<{wide}}{'step':>8} seeds{means}   attr  pur"]
    lines += [
        f"  {s.folder:<{wide}}{s.step:>8} {s.seeds:>5}{''.join(f'{short(x):>9}' for x in s.joint)}"
        f"   {short(s.attribute)} {short(s.purity)}"
        for s in found
    ]
    return "\n".join(lines + again(r, "checkpoints"))


def predictor_rows(rows: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """(predictor, probed, split, domain, *AGREEMENT) as text, mean over seeds; "-" where a predictor has no
    such figure. probed: the share of training items whose label it was fitted on."""
    groups: dict[tuple, list[list[float]]] = {}
    for row in rows:
        key = row["split"].replace("_", " "), row["domain"], row["predictor"], row.get("budget") or 0.0
        groups.setdefault(key, []).append([np.nan if row.get(m) is None else row[m] for m in AGREEMENT])
    return [
        (predictor, f"{budget:.0%}" if budget else "-", split, domain,
         *("-" if np.isnan(x) else short(x) for x in np.mean(values, axis=0)))
        for (split, domain, predictor, budget), values in sorted(groups.items(), key=lambda item: item[0])
    ]  # fmt: skip


PREDICTOR_HEAD = ("density predictor", "probed", "split", "attribute", *AGREEMENT)


def text_predictors(r: Results) -> str:
    """The same for a terminal; '' where no predictor was looked at."""
    rows = predictor_rows(r.about.predictors)
    said = ["".join(f"{x:<{w}}" for x, w in zip(row, (26, 8, 17, 16, 10, 9, 7, 11), strict=True)).rstrip()
            for row in (PREDICTOR_HEAD, *rows)]  # fmt: skip
    head = "within patterns, on test items, mean over seeds:"
    return "\n".join([head, *(f"  {line}" for line in said), *again(r, "predictor")]) if rows else ""


def protocol_line(r: Results) -> str:
    """What the figures were measured on."""
    patterns = len(set(np.concatenate(list(r.pattern.values())).tolist()))
    lookups = [f"{x:,}" for x in sorted({q["lookups"] for q in r.rows if q["uses"] == "labels"})]
    lookups = lookups or ["0"]
    return (
        f"{r.rows[0]['catalogue']}: {r.rows[0]['n_items']:,} items, K = {r.k}, "
        f"{sum(map(len, r.pattern.values())):,} contexts of {patterns:,} patterns, "
        f"{' to '.join(dict.fromkeys((lookups[0], lookups[-1])))} label look-ups, "
        f"{'seed' if len(r.seeds) == 1 else 'seeds'} {', '.join(map(str, r.seeds))}"
    )


def text_report(r: Results) -> str:
    """Everything the command prints."""
    main = r.part(r.tables["main"])
    parts = [protocol_line(r)]
    if main.methods:
        parts += ["\n".join([text_table(main), *again(r, "main")])]
    parts += ["\n".join(f"{v.figure:>9}  {v.text}" for v in verdicts(r))]
    found = detailed(r)
    if found:
        parts += ["Paired differences, 95 % intervals over patterns, p adjusted over the cells (Holm):"]
        parts += map(text_comparison, found)
        parts += (
            ["\n".join(["the rows of these differences:", *again(r, "main")])] if again(r, "main") else []
        )
    parts += [text_side(r, side) for side in sides(r)]
    parts += [text_steps(r)]
    parts += [text_predictors(r)]
    parts += ["\n".join(f"unfinished: {sentence}" for sentence in r.unfinished())]
    return "\n\n".join(filter(None, parts))
