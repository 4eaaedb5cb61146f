"""What the rows of a run prove: paired comparisons, and the verdicts that the report prints.

A comparison pairs two methods context by context: hits are averaged over seeds, whole patterns are
drawn again, and the p-values of one metric are adjusted for the cells (Holm). In a cell, a rival that is
"picked on test" is the best of a set by that cell's test Joint, which favours the rival.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.recipes import MEMORY, RECIPES, lines, rivals
from experiments.report_rows import COUNTED, ENCODER, HEADLINE, STAGED, Results
from genret.retrieval.significance import Paired, holm, paired_test

CENTROID, PLAIN, STEERING = "seed mean", "plain pretrained DiT", "linear-probe steering"
CEILING = "reference: true positives of the pattern"
SINGLE = "the best single-probe baseline of each cell (picked on test)"
ALPHA = 0.05


def short(x: float, sign: str = "") -> str:
    """Three decimals without the leading zero: .286, +.052, 1.00."""
    return f"{x:{sign}.3f}".replace("0.", ".", 1)[: 5 if sign else 4]


class Verdict(NamedTuple):
    """One finding: the figure, and what it is."""

    figure: str
    text: str


class Cell(NamedTuple):
    """Our method minus `rival` in one metric of one cell; p is adjusted over the cells."""

    split: str
    domain: str
    rival: str
    mean: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """gain or loss at adjusted p < .05, else tie."""
        return "tie" if self.p >= ALPHA else "gain" if self.mean > 0 else "loss"

    def __str__(self) -> str:
        return f"{short(self.mean, '+')} [{short(self.low, '+')}, {short(self.high, '+')}]"


class Comparison(NamedTuple):
    """`ours` minus a rival. cells: metric (joint, attribute, purity) -> one Cell per cell.

    picked: the rival is the best of several, another in each cell.
    """

    ours: str
    rival: str
    picked: bool
    cells: dict[str, list[Cell]]

    def count(self, metric: str, verdict: str) -> int:
        return sum(cell.verdict == verdict for cell in self.cells[metric])


def best_of(r: Results, methods: Sequence[str]) -> dict[tuple[str, str], str]:
    """Cell -> the method with the best test Joint there; ties go to the earlier method."""
    best = r.part(methods).cells("joint").reshape(len(methods), -1).argmax(axis=0)
    return {cell: methods[i] for cell, i in zip(r.cell_names, best, strict=True)}


def compare(r: Results, ours: str, rivals: Sequence[str], name: str = "") -> Comparison:
    """`ours` against one method, or against the best of several, picked per cell on test Joint."""
    rival, cells = best_of(r, rivals), {}
    for metric in COUNTED:
        found = [
            paired_test(r.hits[metric, ours, *at] - r.hits[metric, rival[at], *at], r.pattern[at])
            for at in r.cell_names
        ]
        adjusted = holm([test.p for test in found])
        cells[metric] = [
            Cell(*at, rival[at], *test[:3], float(p))
            for at, test, p in zip(r.cell_names, found, adjusted, strict=True)
        ]
    return Comparison(ours, name or rivals[0], len(rivals) > 1, cells)


def pooled(r: Results, one: str, other: str, metric: str = "joint") -> Paired:
    """One method minus another, averaged over the cells; a pattern is drawn with all its cells."""
    parts = [r.hits[metric, one, *at] - r.hits[metric, other, *at] for at in r.cell_names]
    patterns = [r.pattern[at] for at in r.cell_names]
    cell = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return paired_test(np.concatenate(parts), np.concatenate(patterns), cell)


def baselines(r: Results) -> list[str]:
    """The single-probe rivals of the main table; the contrastive encoders are compared for themselves."""
    main = r.part(r.tables["main"])
    return [
        m for m, ref in zip(main.methods, main.reference, strict=True)
        if not ref and r.spread(m, "probes")[1] == 1 and not m.startswith((STAGED, ENCODER))
    ]  # fmt: skip


def encoders(r: Results) -> list[str]:
    """The contrastive encoders of the main table, those with a memory of cells aside."""
    return [m for m in r.tables["main"] if m.startswith(ENCODER) and not m.endswith(MEMORY)]


def stage_rows(r: Results) -> list[str]:
    """Our rows of stages 1-3, of the main table and of the table of stages."""
    main = [m for m in r.tables["main"] if m.startswith(STAGED)]
    return [m for m in main + r.tables.get("stages", []) if "HPPO" not in m]


@functools.lru_cache(maxsize=4)
def comparisons(r: Results) -> tuple[Comparison, ...]:
    """Our method against its own earlier stages, its rivals' best, each encoder, and two fixed queries."""
    ours = r.ours
    if ours is None:
        return ()
    asked: list[tuple[list[str], str]] = []
    if ours == HEADLINE:
        staged = stage_rows(r)
        if STAGED in staged:
            asked.append(([STAGED], "MO-DiT, the best of stages 1-3 (chosen on validation)"))
        if len(staged) > 1:
            asked.append((staged, "the best row of stages 1-3 of each cell (picked on test)"))
    if baselines(r):
        asked.append((baselines(r), SINGLE))
    asked += [([m], m) for m in (*encoders(r), CENTROID, STEERING, PLAIN) if m in r.tables["main"]]
    found = [compare(r, ours, *rivals) for rivals in asked]
    if ours + MEMORY in r.tables["main"]:
        rivals = [m for m in r.tables["main"] if m.startswith(ENCODER)]
        if baselines(r):
            found.append(compare(r, ours + MEMORY, baselines(r), SINGLE))
        found += [compare(r, ours + MEMORY, [m]) for m in (ours, *rivals)]
    return tuple(found)


def compared(r: Results) -> set[str]:
    """The methods whose hits per context a comparison reads."""
    side = [m for name, methods in r.tables.items() for m in methods if name != "main" and r.x(m) is None]
    rivals = [m for m in (CENTROID, STEERING, PLAIN) if m in r.tables["main"]]
    ours = [m for m in r.tables["main"] if m.startswith((HEADLINE, ENCODER))]
    return {*baselines(r), *stage_rows(r), *side, *rivals, *ours} | ({r.ours} - {None})


def _say(r: Results, c: Comparison) -> Verdict:
    cells = c.cells["joint"]
    values = {m: r.cell("joint", m).ravel() for m in (c.ours, *(cell.rival for cell in cells))}
    ahead = values[c.ours] - [values[cell.rival][i] for i, cell in enumerate(cells)]
    gains, losses = (c.count("joint", v) for v in ("gain", "loss"))
    lower = [f"{cell.split}/{cell.domain}" for cell in c.cells["purity"] if cell.verdict == "loss"]
    where = f" ({', '.join(lower)})" if 0 < len(lower) < 3 else ""
    text = (
        f"cells where {c.ours} is ahead of {c.rival} in Joint@{r.k}; {short(ahead.mean(), '+')} on average; "
        f"significantly ahead in {gains}, behind in {losses}; "
        f"Purity significantly lower in {len(lower)}{where}, higher in {c.count('purity', 'gain')}"
    )
    return Verdict(f"{(ahead > 0).sum()} of {len(cells)}", text)


def verdicts(r: Results) -> list[Verdict]:
    """What the main table says about our method; rivals that were not evaluated are passed over."""
    if r.ours is None:
        return []
    out: list[Verdict] = []
    for c in comparisons(r):
        out.append(_say(r, c))
        if c.rival == SINGLE and CEILING in r.methods:
            best = r.part(baselines(r)).cells("joint").max(axis=0).mean()
            gap = r.cell("joint", CEILING).mean() - best
            share = f"{(r.cell('joint', c.ours).mean() - best) / gap:.0%}" if gap > 0 else "none left"
            text = f"of the distance from that baseline to the true-positives centroid is closed by {c.ours}"
            out.append(Verdict(share, text))
    if CENTROID in r.methods:
        lost = r.cell("purity", CENTROID) - r.cell("purity", r.ours)
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


def natural_rival(table: str, methods: Sequence[str], method: str) -> str | None:
    """What a line of a side table is held against: the one that `recipes.AGAINST` names, else the table's
    first line; None for that line itself, and where the one named was not evaluated."""
    named = {f"{table}: {line}": f"{table}: {other}" for line, other in rivals(table).items()}
    rival = named.get(method, None if named else methods[0])
    return rival if rival in methods and rival != method else None


def questions(table: str, methods: Sequence[str]) -> list[tuple[str, str, str]]:
    """(one, other, metric) of the differences that a side table is there to show: of Joint, but of Attribute
    and Purity where the Pareto filter is all that differs."""
    if not rivals(table):
        return []
    of_filter = {f"{table}: {line}" for folder, line in lines(table).items() if RECIPES[folder].filter}
    pairs = [(m, rival) for m in methods if (rival := natural_rival(table, methods, m))]
    return [
        (*pair, metric) for pair in pairs
        for metric in (("attribute", "purity") if pair[0] in of_filter else ("joint",))
    ]  # fmt: skip


@functools.lru_cache(maxsize=64)
def table_verdicts(r: Results, table: str) -> list[Verdict]:
    """The answers to `questions`, over all cells pooled; p-values are adjusted within the table."""
    asked = questions(table, r.tables[table])
    found = [pooled(r, *question) for question in asked]
    return [
        Verdict(
            short(test.mean, "+"),
            f"{metric.capitalize()}@{r.k} of {one} minus {other}, "
            f"[{short(test.low, '+')}, {short(test.high, '+')}], p {short_p(p)}",
        )
        for (one, other, metric), test, p in zip(asked, found, holm([t.p for t in found]), strict=True)
    ]


def short_p(p: float) -> str:
    """.012, or <.001."""
    return "<.001" if p < 0.001 else short(p)
