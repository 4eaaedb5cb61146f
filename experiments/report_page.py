"""The page of a report: one HTML file, style and figures inside, for light and dark screens."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import report_plots as plots
from experiments.evidence import Comparison, baselines, short, short_p, table_verdicts, verdicts
from experiments.report_rows import AGREEMENT, COUNTED, Results
from experiments.report_tables import (
    PREDICTOR_HEAD,
    Side,
    Table,
    again,
    detailed,
    interval,
    make_table,
    predictor_rows,
    protocol_line,
    sides,
    steps,
    text_steps,
)

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
ul{margin:.6rem 0;padding-left:1.1rem;font-size:.86rem}
.again{color:var(--muted);margin:.5rem 0 0;padding:.4rem .7rem;border-left:2px solid var(--line)}
pre{font:.78rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap}
@media print{main{max-width:none;padding:0}}
"""


def _variables() -> str:
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in plots.THEME.items()) for i in range(2))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


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
        row = "ours" if method == r.ours else "ref" if r.reference[i] else ""
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


def comparison_table(found: Sequence[Comparison], metric: str) -> str:
    """One row per cell, one column per rival; what is significant is bold."""
    body = []
    for i, (split, domain, *_) in enumerate(found[0].cells[metric]):
        line = _left(split.replace("_", " ")) + _left(domain)
        for c in found:
            cell = c.cells[metric][i]
            mean, rest = str(cell).split(" ", 1)
            mean = mean if cell.verdict == "tie" else f"<b>{mean}</b>"
            under = f"p {short_p(cell.p)}" + (f", {cell.rival}" if c.picked else "")
            line += f"<td>{mean} <small>{rest}<br>{escape(under)}</small></td>"
        body.append(f"<tr>{line}</tr>")
    return _table(_head(["split", "domain"], [f"against {c.rival}" for c in found]), body)


def side_table(r: Results, side: Side) -> str:
    """A table beside the main one, what it shows, and the command that makes it again."""
    spread = [split.replace("_", " ") for split in r.splits]
    more = {"": ["calls", "difference in Joint"], "calls": []}.get(side.x, ["calls"])
    body = []
    for line in side.lines:
        said = _left(f"{line.x:g}" if side.x else line.method)
        for x, sd in zip(line.joint, line.sd, strict=True):
            said += f"<td>{short(x)}" + (f" <small>±{short(sd)}</small></td>" if np.isfinite(sd) else "</td>")
        said += f"<td>{short(line.attribute)}</td><td>{short(line.purity)}</td>"
        said += "" if side.x == "calls" else f"<td>{line.calls}</td>"
        if line.gain:
            mean, rest = interval(line.gain).split(" ", 1)
            mean = f"<b>{mean}</b>" if line.gain.low > 0 or line.gain.high < 0 else mean
            said += f"<td>{mean} <small>{rest} to {escape(line.rival)}</small></td>"
        elif not side.x:
            said += "<td></td>"
        body.append(f"<tr>{said}</tr>")
    shown = "".join(f"<li>{escape(v.figure)} {escape(v.text)}</li>" for v in table_verdicts(r, side.name))
    shown = f"<ul>{shown}</ul>" if shown else ""
    return (
        _table(_head([side.x or "row"], [*spread, "Attribute", "Purity", *more]), body)
        + shown
        + _again(r, side.name)
    )


def _again(r: Results, table: str) -> str:
    lines = "\n".join(line.strip() for line in again(r, table))
    return f'<pre class="again">{escape(lines)}</pre>' if lines else ""


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


def predictor_table(r: Results) -> str:
    """Agreement of the density predictors; '' where there is none."""
    names = len(PREDICTOR_HEAD) - len(AGREEMENT)
    rows = [
        f"<tr>{''.join(map(_left, row[:names]))}{''.join(f'<td>{x}</td>' for x in row[names:])}</tr>"
        for row in predictor_rows(r.about.predictors)
    ]
    return _table(_head(PREDICTOR_HEAD[:names], AGREEMENT), rows) + _again(r, "predictor") if rows else ""


def render(workdir: Path, r: Results, chart: Figure | None) -> str:
    """The whole page; chart is the frontier of the main table, the other figures are drawn here.

    workdir: where the training logs are, if anywhere.
    """
    said = [(escape(v.figure), escape(v.text)) for v in verdicts(r)]
    cards = "".join(f"<div><b>{figure}</b><span>{text}</span></div>" for figure, text in said)
    parts = [f"<h1>{escape(r.ours or 'Queries')} and its rivals</h1>", f"<p>{escape(protocol_line(r))}</p>"]
    parts += [f"<p>Unfinished: {escape(sentence)}.</p>" for sentence in r.unfinished()]
    parts += [f'<div class="verdicts">{cards}</div>']

    def section(title: str, text: str, content: str) -> None:
        if content:
            parts.append(f"<section><h2>{title}</h2><p>{text}</p>{content}</section>")

    def figure(fig: Figure | None, name: str, title: str) -> str:
        return f'<div class="scroll">{plots.svg(fig, name, title)}</div>' if fig else ""

    main = r.part(r.tables["main"])
    if main.methods:
        table = make_table(main)
        spread = "; ± is the standard deviation over seeds" if np.isfinite(table.sd).any() else ""
        section(
            "All methods",
            f"Joint@{r.k}: share of the {r.k} returned items that keep the pattern of the seeds and "
            f"carry the attribute{spread}. Underlined: best of a column. Shaded: what a cell gains "
            "over the seed mean. Probes are index searches, calls network evaluations per context. "
            "References, below the rule, read what the question hides.",
            main_table(main, table) + _again(r, "main"),
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
            figure(plots.cells(main, baselines(r)), "cells", "Joint of the main methods in every cell"),
        )
    found = detailed(r)
    if found:
        folded = "".join(
            f"<details><summary>The same in {metric.capitalize()}@{r.k}</summary>"
            f"{comparison_table(found, metric)}</details>"
            for metric in COUNTED[1:]
        )
        section(
            "Paired differences",
            f"{escape(r.ours)} minus a rival in Joint@{r.k}, with 95 % bootstrap intervals: hits are "
            "averaged over seeds, and whole patterns are drawn again. p is adjusted over the cells (Holm); "
            "bold below .05. Where a rival is picked per cell, it is named.",
            comparison_table(found, "joint") + folded + _again(r, "main"),
        )
    shown = {side.name: side for side in sides(r)}
    fronts = [shown[name] for name in ("guidance", "steering") if name in shown and shown[name].x]
    for name, side in shown.items():
        drawn, text = "", "Mean over the domains, ± over seeds; differences are pooled over all cells."
        if name == "calls" and side.x:
            text = "What more network evaluations per query buy."
            drawn = figure(plots.calls(side, r.splits, r.k), "calls", "Joint against denoiser calls")
        elif fronts and side is fronts[0]:
            text = "What each step of a dial gains in Attribute and gives up in Purity."
            drawn = figure(
                plots.frontiers(fronts, r.splits, r.k), "dials", "Frontiers of guidance and steering"
            )
        elif side.x:
            text = "Mean over the domains, ± over seeds."
        section(escape(side.title), text, drawn + side_table(r, side))
    if steps(r):
        drawn = figure(plots.checkpoints(steps(r), r.splits, r.k), "steps", "Validation scores against step")
        listed = f"<details><summary>As text</summary><pre>{escape(text_steps(r))}</pre></details>"
        section(
            "Checkpoints",
            "The one-call query of every checkpoint on the validation contexts, mean over seeds and domains.",
            drawn + listed,
        )
    section(
        "Training",
        "Loss per stage, one line per seed; orange is MO-DiT.",
        figure(plots.curves(workdir), "curves", "Training loss of every stage"),
    )
    section(
        "Density predictors",
        "Agreement with the true densities within patterns, on test items whose labels nothing was "
        "fitted on; mean over seeds.",
        predictor_table(r),
    )
    if r.about.config:
        leaves = _leaves(r.about.config)
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


def write(workdir: Path, r: Results) -> Path:
    """Write report.html and frontier.png, each moved into place whole; returns the page's path."""
    image, files = io.BytesIO(), {}
    with matplotlib.rc_context(plots.STYLE):
        chart = plots.frontier(r.part(r.tables["main"])) if r.tables["main"] else None
        files["report.html"] = render(workdir, r, chart).encode()
        if chart:
            chart.savefig(image, format="png", dpi=150)
            files["frontier.png"] = image.getvalue()
    workdir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = workdir / f"{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, workdir / name)
    return workdir / "report.html"
