"""The page of a report: one HTML file, style and figures inside, for light and dark screens."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.report_plots import STYLE, THEME, cells, curves, frontier, svg

if TYPE_CHECKING:
    from experiments.report import Interval, Results, Table, Verdict

AGREEMENT = ("spearman", "kendall", "ndcg", "calibration")  # columns of predictor_report.json
CSS = """
*{box-sizing:border-box}
html{color-scheme:light dark}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
 "Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1340px;margin:0 auto;padding:3rem 1.5rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.02em}
h2{font-size:1.15rem;margin:3rem 0 .3rem;letter-spacing:-.01em}
p{margin:.3rem 0 1rem;color:var(--muted);max-width:92ch}
.verdicts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));
 gap:0 2rem;margin:1.6rem 0 0}
.verdicts div{border-top:1px solid var(--line);padding:.8rem 0 1rem}
.verdicts b{display:block;font-size:1.45rem;line-height:1.25;font-variant-numeric:tabular-nums}
.verdicts span{display:block;font-size:.86rem;line-height:1.4;color:var(--muted)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.79rem;white-space:nowrap;
 font-variant-numeric:tabular-nums}
.wide{width:100%}
th,td{padding:.27rem .45rem;text-align:right;border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--muted);vertical-align:bottom;white-space:normal;line-height:1.25}
.wide thead tr:first-child th{border-bottom:0}
th.l,td.l{text-align:left}
td.n{color:var(--muted);padding-left:0}
tr{--tint:var(--rival)}
tr.ours{--tint:var(--ours)}
td.bar{min-width:6.2em;background:linear-gradient(90deg,
 color-mix(in srgb,var(--tint) 27%,transparent) var(--v),transparent 0)}
td.heat{background:color-mix(in srgb,var(--tint) var(--v),transparent)}
td.first{border-left:6px solid var(--paper)}
tr.ours td{font-weight:650}
tr.ours td.l{color:var(--ours)}
tr.rule td{border-top:2px solid var(--muted)}
tr.ref td{color:var(--muted)}
u{font-weight:700;text-underline-offset:.2em}
small{color:var(--muted);font-weight:400;font-size:.92em}
svg{width:100%;height:auto;min-width:680px;display:block}
svg text{font-family:inherit!important}
details{margin:.8rem 0}
summary{cursor:pointer;color:var(--muted)}
pre{font:.78rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap}
@media print{main{max-width:none;padding:0}}
"""


def _variables() -> str:
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in THEME.items()) for i in range(2))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def short(x: float, sign: str = "") -> str:
    """Three decimals without the leading zero: .286, +.052, 1.00."""
    return f"{x:{sign}.3f}".replace("0.", ".", 1)[: 5 if sign else 4]


def main_table(r: Results, t: Table) -> str:
    """Bars from zero for mean Joint; cells are shaded by what they gain over the seed mean."""
    splits, domains = len(r.splits), len(r.domains)
    look = np.array(["bar"] * splits + ["heat"] * splits * domains + [""] * 3)
    edge = np.where((np.arange(len(look)) - splits) % domains == 0, " first", "")
    edge[:splits] = ""
    zero = np.zeros(len(look))
    start = t.numbers[r.methods.index("seed mean")] if "seed mean" in r.methods else zero
    low = np.where(look == "heat", start, 0)
    high = np.where(look == "heat", t.numbers[~r.reference].max(axis=0), t.numbers.max(axis=0))
    part = np.clip((t.numbers - low) / np.where(high > low, high - low, np.inf), 0, 1)
    fill = np.where(look == "heat", 38, 100) * part  # of the tint, or of the width
    fill[r.reference] *= look != "heat"

    titles = [s.replace("_", " ") for s in r.splits]
    names = [*titles, *r.domains * splits, "Attribute", "Purity", "norm. Joint", "probes", "calls"]
    broken = "".join(f"<th>{escape(n).replace('_', '_<wbr>')}</th>" for n in names)
    groups = "".join(f'<th colspan="{domains}">Joint@{r.k}, {escape(s)}</th>' for s in titles)
    head = (
        f'<tr><th></th><th></th><th colspan="{splits}">mean Joint@{r.k}</th>{groups}'
        f'<th colspan="6"></th></tr>'
        f'<tr><th></th><th class="l">method</th>{broken}<th class="l">reads</th></tr>'
    )
    body = []
    for i, method in enumerate(r.methods):
        row = "ours" if method == "MO-DiT" else "ref" if r.reference[i] else ""
        row += " rule" if r.reference[i] and not r.reference[i - 1] else ""
        line = f'<td class="n">{i + 1}</td>{_left(method)}'
        for c, x in enumerate(t.numbers[i]):
            said = f"<u>{short(x)}</u>" if t.best[i, c] else short(x)
            said += f" <small>±{short(t.sd[i, c])}</small>" if np.isfinite(t.sd[i, c]) else ""
            line += f'<td class="{look[c]}{edge[c]}" style="--v:{fill[i, c]:.0f}%">{said}</td>'
        for key in ("probes", "calls"):
            line += f"<td>{'–'.join(str(v) for v in dict.fromkeys(r.spread(method, key)))}</td>"
        body.append(f'<tr class="{row}">{line}{_left(r.spread(method, "uses")[0])}</tr>')
    return _table(head, body, "wide")


def interval_table(found: Sequence[Interval]) -> str:
    """One row per cell, one column per rival; an interval that leaves out zero is bold."""
    rivals = dict.fromkeys(f"against {i.rival}" for i in found)
    rows: dict[tuple[str, str], str] = {}
    for i in found:
        mean, interval = str(i).split(" ", 1)
        mean = f"<b>{mean}</b>" if i.low > 0 or i.high < 0 else mean
        cell = i.split.replace("_", " "), i.domain
        rows[cell] = rows.get(cell, "") + f"<td>{mean} <small>{interval}</small></td>"
    body = [f"<tr>{''.join(map(_left, cell))}{said}</tr>" for cell, said in rows.items()]
    return _table(_head(["split", "domain"], rivals), body)


def _left(text: str) -> str:
    return f'<td class="l">{escape(text)}</td>'


def _head(left: Iterable[str], right: Iterable[str]) -> str:
    head = "".join(f'<th class="l">{escape(n)}</th>' for n in left)
    return f"<tr>{head}{''.join(f'<th>{escape(n)}</th>' for n in right)}</tr>"


def _table(head: str, rows: Iterable[str], look: str = "") -> str:
    return (
        f'<div class="scroll"><table class="{look}"><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def predictor_rows(workdir: Path) -> list[tuple[str, ...]]:
    """(predictor, split, domain, *AGREEMENT) as text, mean over seeds; "-" where a predictor has none."""
    groups: dict[tuple[str, str, str], list[list[float]]] = {}
    for path in sorted(workdir.glob("seed_*/predictor_report.json")):
        for row in json.loads(path.read_text()):
            key = row["predictor"], row["split"].replace("_", " "), row["domain"]
            groups.setdefault(key, []).append([np.nan if row[m] is None else row[m] for m in AGREEMENT])
    return [
        (*key, *("-" if np.isnan(x) else short(x) for x in np.mean(values, axis=0)))
        for key, values in sorted(groups.items(), key=lambda item: item[0][1:])
    ]


def predictor_table(workdir: Path) -> str:
    """The same as a table; '' where there is none."""
    rows = [
        f"<tr>{''.join(map(_left, row[:3]))}{''.join(f'<td>{x}</td>' for x in row[3:])}</tr>"
        for row in predictor_rows(workdir)
    ]
    return _table(_head(["predictor", "split", "attribute"], AGREEMENT), rows) if rows else ""


def render(
    workdir: Path, r: Results, table: Table, protocol: str, verdicts: Sequence[Verdict],
    intervals: Sequence[Interval], chart: Figure,
) -> str:  # fmt: skip
    """The whole page; chart is the frontier, the other figures are drawn here."""
    cards = "".join(f"<div><b>{escape(v.figure)}</b><span>{escape(v.text)}</span></div>" for v in verdicts)
    parts = ["<h1>MO-DiT and its rivals</h1>", f"<p>{escape(protocol)}</p>"]
    parts += [f"<p>Unfinished: {escape(sentence)}.</p>" for sentence in r.unfinished()]
    parts += [f'<div class="verdicts">{cards}</div>']

    def section(title: str, text: str, content: str) -> None:
        if content:
            parts.append(f"<section><h2>{title}</h2><p>{text}</p>{content}</section>")

    def figure(fig: Figure | None, name: str, title: str) -> str:
        return f'<div class="scroll">{svg(fig, name, title)}</div>' if fig else ""

    spread = "; ± is the standard deviation over seeds" if np.isfinite(table.sd).any() else ""
    section(
        "All methods",
        f"Joint@{r.k}: share of the {r.k} returned items that keep the pattern of the seeds and "
        f"carry the attribute{spread}. Underlined: best of a column. Shaded: what a cell gains "
        "over the seed mean. Probes are index searches, calls network evaluations per context. "
        "References, below the rule, read what the question hides.",
        main_table(r, table),
    )
    section(
        "The frontier",
        "Keeping the pattern against gaining the attribute; up and to the right is better. Numbers "
        "are those of the table, hollow points are references, triangles at the left edge lie "
        "beyond it.",
        figure(chart, "frontier", "Attribute against Purity of every method"),
    )
    section(
        "Cell by cell",
        "The tick is the best single-probe baseline of that very cell, picked on test.",
        figure(cells(r), "cells", "Joint of the main methods in every cell"),
    )
    section(
        "Paired differences",
        f"MO-DiT minus a rival in Joint@{r.k}, with 95 % bootstrap intervals: hits are averaged "
        "over seeds, and whole patterns are drawn again. Bold where zero lies outside.",
        interval_table(intervals) if intervals else "",
    )
    section(
        "Training",
        "Loss per stage, one line per seed; orange is MO-DiT.",
        figure(curves(workdir), "curves", "Training loss of every stage"),
    )
    section(
        "Density predictors",
        "Agreement with the true densities within patterns, on test items whose labels nothing was "
        "fitted on; mean over seeds.",
        predictor_table(workdir),
    )
    config = workdir / "config.json"
    if config.exists():
        leaves = _leaves(json.loads(config.read_text()))
        text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in leaves)
        section(
            "Reproduce",
            "experiments.run and then experiments.evaluate, given these values, make it again.",
            f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>",
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>MO-DiT on {escape(r.rows[0]['catalogue'])}</title>"
        f"<style>{_variables()}{CSS}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _leaves(tree: dict, path: str = "") -> list[tuple[str, object]]:
    return [
        leaf for k, v in tree.items()
        for leaf in (_leaves(v, f"{path}{k}.") if isinstance(v, dict) else [(path + k, v)])
    ]  # fmt: skip


def write(
    workdir: Path, r: Results, table: Table, protocol: str, verdicts: Sequence[Verdict],
    intervals: Sequence[Interval],
) -> Path:  # fmt: skip
    """Write report.html and frontier.png, each moved into place whole; returns the page's path."""
    image = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        chart = frontier(r)
        chart.savefig(image, format="png", dpi=150)
        page = render(workdir, r, table, protocol, verdicts, intervals, chart).encode()
    for name, content in (("frontier.png", image.getvalue()), ("report.html", page)):
        temporary = workdir / f"{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, workdir / name)
    return workdir / "report.html"
