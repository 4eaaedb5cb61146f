"""The page of a report: figures by matplotlib, inlined as SVG whose colours follow the reader's theme."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from experiments.report import Interval, Results, Table, Verdict

# name -> (light, dark). Figures are drawn in the light colours; in the page they become CSS variables.
THEME = {
    "paper": ("#fcfbf9", "#181716"),
    "ink": ("#21201e", "#eceae6"),
    "muted": ("#716d67", "#a19c94"),
    "line": ("#dfdbd4", "#3a3834"),
    "ours": ("#c4420f", "#ff8b52"),
    "kin": ("#e3a483", "#9c5b3b"),
    "rival": ("#3f6c8f", "#86b4d6"),
    "rival2": ("#3d8a78", "#7cc9b4"),
    "rival3": ("#8a6fb0", "#bba4dd"),
}
LIGHT = {name: pair[0] for name, pair in THEME.items()}
STYLE = {
    "figure.facecolor": LIGHT["paper"], "axes.facecolor": LIGHT["paper"],
    "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["muted"], "axes.edgecolor": LIGHT["line"],
    "xtick.color": LIGHT["line"], "ytick.color": LIGHT["line"], "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"], "grid.color": LIGHT["line"], "grid.linewidth": 0.6,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.frameon": False, "svg.fonttype": "none", "text.parse_math": False,
}  # fmt: skip


def kind(r: Results, i: int) -> str:
    """The colour of method i: ours, kin (its other queries and stages), rival, or muted (reference)."""
    if r.reference[i]:
        return "muted"
    if r.methods[i] == "MO-DiT":
        return "ours"
    return "kin" if "DiT" in r.methods[i] and "MSE" not in r.methods[i] else "rival"


def frontier(r: Results) -> Figure:
    """Attribute@K against Purity@K, one panel per split, numbered as in the table."""
    fig = Figure(figsize=(11, 4.9), layout="constrained")
    axes = fig.subplots(
        1, len(r.splits) + 1, width_ratios=[1] * len(r.splits) + [0.62], squeeze=False
    )[0]
    purity, attribute = (r.cells(m).mean(axis=2) for m in ("purity", "attribute"))
    for s, (ax, split) in enumerate(zip(axes, r.splits, strict=False)):
        ax.set(title=split.replace("_", " "), xlabel=f"Purity@{r.k}")
        ax.set(xlim=_limits(purity), ylim=_limits(attribute))
        for i in range(len(r.methods)):
            _point(ax, r, i, purity[i, s], attribute[i, s])
    axes[0].set_ylabel(f"Attribute@{r.k}")
    legend = axes[-1]
    legend.set_axis_off()
    legend.set(xlim=(0, 1), ylim=(max(24, len(r.methods)) - 0.5, -1))
    for i, method in enumerate(r.methods):
        _point(legend, r, i, 0.13, i)
        bold = "bold" if method == "MO-DiT" else "normal"
        legend.text(0.07, i, i + 1, ha="right", va="center", fontsize=7, color=LIGHT["muted"])
        name = method.replace("reference: ", "ref: ")
        legend.text(0.19, i, name, va="center", fontsize=7.5, weight=bold)
    fig.draw_without_rendering()  # labels are placed in pixels, once the layout has settled
    fig.set_layout_engine("none")
    for s, ax in enumerate(axes[:-1]):
        _number(ax, np.stack([purity[:, s], attribute[:, s]], axis=1), fig.dpi / 72)
    return fig


def _limits(x: np.ndarray) -> tuple[float, float]:
    pad = 0.07 * (np.ptp(x) or 1)
    return x.min() - pad, x.max() + pad


def _point(ax: Axes, r: Results, i: int, x: float, y: float) -> None:
    colour, hollow = LIGHT[kind(r, i)], r.reference[i]
    size, mark = (13, "*") if r.methods[i] == "MO-DiT" else (6, "o")
    ax.plot(
        x, y, mark, ms=size, mfc=LIGHT["paper"] if hollow else colour,
        mec=colour if hollow else LIGHT["paper"], mew=1.3 if hollow else 0.7, zorder=4 if mark == "*" else 3,
    )  # fmt: skip


def _number(ax: Axes, points: np.ndarray, scale: float) -> None:
    """Number each point beside it, or at the end of a hairline where it is crowded.

    Greedy: the places round a point are tried from near to far, and the first with the least overlap wins.
    """
    at = ax.transData.transform(points)
    half = np.array([6.5, 4.5]) * scale  # of a label of two digits, pixels
    low, high = (np.array(p) for p in ax.get_window_extent().get_points())
    ring = [(radius, turn) for radius in (9, 13, 18, 24, 31, 39, 48) for turn in np.arange(0.5, 16.5) / 16]
    offsets = np.array([[a * np.cos(2 * np.pi * t), a * np.sin(2 * np.pi * t)] for a, t in ring]) * scale
    taken = [at]
    # The crowded ones first: they have the fewest free places.
    crowd = (np.linalg.norm(at[:, None] - at[None], axis=2) < 30 * scale).sum(1)
    for i in np.argsort(-crowd, kind="stable"):
        places = at[i] + offsets
        gap = np.abs(places[:, None] - np.concatenate(taken[1:], axis=0)[None]) if taken[1:] else None
        onto = 0 if gap is None else (gap < 2 * half).all(2).sum(1)
        dots = (np.abs(places[:, None] - at[None]) < half + 3.5 * scale).all(2).sum(1)
        out = ((places < low + half) | (places > high - half)).any(1)
        best = np.argmin(onto * 4 + dots * 3 + out * 9 + 0.01 * np.arange(len(ring)))
        taken.append(places[best][None])
        place = ax.transData.inverted().transform(places[best])
        if ring[best][0] > 13:
            ax.plot(*zip(points[i], place, strict=True), lw=0.5, color=LIGHT["muted"], zorder=1)
        ax.text(
            *place, i + 1, ha="center", va="center", fontsize=7, color=LIGHT["ink"], zorder=5,
            bbox=dict(boxstyle="square,pad=0.05", fc=LIGHT["paper"], ec="none", alpha=0.8),
        )  # fmt: skip


def cells(r: Results) -> Figure:
    """Joint per cell: MO-DiT among its main rivals, with the span of the references behind."""
    joint, row = r.cells("joint"), {m: i for i, m in enumerate(r.methods)}
    fig = Figure(figsize=(11, 1.5 + 0.52 * len(r.domains)), layout="constrained")
    axes = fig.subplots(1, len(r.splits), sharex=True, sharey=True, squeeze=False)[0]
    marks = [
        ("seed mean", "o", "muted"), ("plain pretrained DiT", "o", "kin"),
        ("linear-probe steering", "o", "rival"), ("contrastive encoder, labels", "D", "rival3"),
        ("contrastive encoder, pseudo-labels", "D", "rival2"), ("MO-DiT", "*", "ours"),
    ]  # fmt: skip
    for s, (ax, split) in enumerate(zip(axes, r.splits, strict=True)):
        y = np.arange(len(r.domains))
        ax.set(title=split.replace("_", " "), xlabel=f"Joint@{r.k}", ylim=(len(y) - 0.5, -0.5))
        ax.set_yticks(y, r.domains)
        ax.grid(axis="y", visible=False)
        for i in np.flatnonzero(r.reference):
            ax.plot(joint[i, s], y, "o", ms=6, mfc=LIGHT["paper"], mec=LIGHT["muted"], mew=1.1, zorder=3,
                    label="references" if r.reference[:i].sum() == 0 else None)  # fmt: skip
        ax.hlines(y, joint[:, s].min(0), joint[:, s].max(0), color=LIGHT["line"], lw=3, zorder=1)
        if r.single_probe_baseline.any():
            best = joint[r.single_probe_baseline, s].max(axis=0)
            ax.plot(best, y, "|", ms=19, mew=1.6, color=LIGHT["ink"], label="best single-probe baseline")
        for name, mark, colour in marks:
            if name in row:
                ax.plot(
                    joint[row[name], s], y, mark, ms={"o": 7, "D": 5.5, "*": 14}[mark], mfc=LIGHT[colour],
                    mec=LIGHT["paper"], mew=0.7, label=name, zorder=5 if mark == "*" else 4,
                )  # fmt: skip
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return fig


ORDER = ("predictor", "pretrain", "cpt", "sft", "sft_mse")


def curves(workdir: Path) -> Figure | None:
    """Training loss against step, a panel per stage, a line per seed; None without logs."""
    logs: dict[str, list[tuple[str, np.ndarray]]] = {}
    for path in sorted(workdir.glob("seed_*/*/metrics.jsonl")):
        rows = [json.loads(x) for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]
        if rows:
            line = np.array([(r["step"], r["loss"]) for r in rows])
            logs.setdefault(path.parent.name, []).append((path.parent.parent.name, line))
    if not logs:
        return None
    stages = sorted(logs, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), len(n), n))
    across = min(4, len(stages))
    down = -(-len(stages) // across)
    fig = Figure(figsize=(11, 1.9 * down + 0.2), layout="constrained")
    axes = fig.subplots(down, across, squeeze=False).ravel()
    for ax in axes[len(stages) :]:
        ax.set_axis_off()
    for ax, stage in zip(axes, stages, strict=False):
        colour = LIGHT["ours" if stage in ("pretrain", "cpt", "sft") else "rival"]
        for _, line in logs[stage]:
            ax.plot(*line.T, color=colour, lw=1.3, alpha=0.85, marker="o" if len(line) < 12 else "", ms=3)
        ax.set_title(stage.replace("_", " "), fontsize=9)
        ax.locator_params(nbins=4)
        ax.tick_params(labelsize=7.5)
        ax.set_xlim(left=0)
    for ax in axes[len(stages) - across : len(stages)]:
        ax.set_xlabel("step")
    for ax in axes[::across]:
        ax.set_ylabel("loss")
    return fig


def svg(fig: Figure, name: str, title: str) -> str:
    """An <svg> that stands in a page: theme colours, ids of its own, no address of anything."""
    out = io.StringIO()
    fig.savefig(out, format="svg")
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    for variable, light in LIGHT.items():
        text = text.replace(light, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


CSS = """
*{box-sizing:border-box}
html{color-scheme:light dark}
body{margin:0;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:3rem 1.5rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.02em}
h2{font-size:1.15rem;margin:3rem 0 .3rem;letter-spacing:-.01em}
p{margin:.3rem 0 1rem;color:var(--muted);max-width:75ch}
.protocol{font-size:.95rem}
.verdicts{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:1px;padding:1px;
 margin:1.8rem 0 0;background:var(--line);border-radius:10px;overflow:hidden}
.verdicts div{background:var(--paper);padding:.9rem 1.1rem}
.verdicts b{display:block;font-size:1.45rem;line-height:1.25;color:var(--ours);
 font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.verdicts span{font-size:.86rem;line-height:1.4;color:var(--muted);display:block}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.81rem;font-variant-numeric:tabular-nums;white-space:nowrap}
.wide{width:100%}
th,td{padding:.27rem .5rem;text-align:right;border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--muted);vertical-align:bottom}
thead tr:first-child th{border-bottom:0}
th.l,td.l{text-align:left}
td.n{color:var(--muted);padding-left:0}
td.bar{background:linear-gradient(90deg,color-mix(in srgb,var(--rival) 26%,transparent) var(--v),transparent 0);
 min-width:6.2em}
td.heat{background:color-mix(in srgb,var(--rival) var(--v),transparent)}
td.first{border-left:6px solid var(--paper)}
tr.ours td{font-weight:650}
tr.ours td.l{color:var(--ours)}
tr.ours td.bar{background:linear-gradient(90deg,color-mix(in srgb,var(--ours) 34%,transparent) var(--v),transparent 0)}
tr.rule td{border-top:2px solid var(--muted)}
tr.ref td{color:var(--muted)}
.best{font-weight:700;text-decoration:underline;text-underline-offset:.2em}
small{color:var(--muted);font-weight:400}
.sure{font-weight:650}
svg{width:100%;height:auto;min-width:680px;display:block}
svg text{font-family:inherit!important}
details{margin:.8rem 0}
summary{cursor:pointer;color:var(--muted)}
pre{font:.78rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-x:auto;white-space:pre-wrap}
@media print{main{max-width:none;padding:0}}
"""


def _variables() -> str:
    light, dark = (
        "".join(f"--{name}:{pair[i]};" for name, pair in THEME.items()) for i in range(2)
    )
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _short(x: float, sign: str = "") -> str:
    return f"{x:{sign}.3f}".replace("0.", ".", 1)


def main_table(r: Results, t: Table) -> str:
    """Bars for mean Joint, shades for the cells (each from its column's least to its largest value)."""
    splits, domains = len(r.splits), len(r.domains)
    low, high = t.numbers.min(axis=0), t.numbers.max(axis=0)
    part = (t.numbers - low) / np.where(high > low, high - low, 1)
    titles = [s.replace("_", " ") for s in r.splits]
    head = f'<tr><th></th><th></th><th colspan="{splits}">Joint@{r.k}, mean of domains</th>'
    head += "".join(f'<th class="first" colspan="{domains}">Joint@{r.k}, {escape(s)}</th>' for s in titles)
    names = [*titles, *r.domains * splits, "Attribute", "Purity", "norm. Joint", "probes", "calls"]
    head += '<th colspan="6"></th></tr><tr><th></th><th class="l">method</th>'
    head += "".join(f"<th>{escape(n)}</th>" for n in names) + '<th class="l">reads</th></tr>'
    body = []
    for i, method in enumerate(r.methods):
        style = "ours" if method == "MO-DiT" else "ref" if r.reference[i] else ""
        style += " rule" if r.reference[i] and not r.reference[i - 1] else ""
        line = f'<td class="n">{i + 1}</td><td class="l">{escape(method)}</td>'
        for c, x in enumerate(t.numbers[i]):
            look, most = ("bar", 100) if c < splits else ("heat", 42)
            look = look if c < splits * (1 + domains) else ""
            edge = " first" if c >= splits and (c - splits) % domains == 0 else ""
            said = f'<span class="best">{_short(x)}</span>' if t.best[i, c] else _short(x)
            said += f" <small>±{_short(t.sd[i, c])}</small>" if np.isfinite(t.sd[i, c]) else ""
            line += f'<td class="{look}{edge}" style="--v:{most * part[i, c]:.0f}%">{said}</td>'
        for key in ("probes", "calls"):
            line += f"<td>{'–'.join(str(v) for v in dict.fromkeys(r.spread(method, key)))}</td>"
        line += f'<td class="l">{escape(r.spread(method, "uses")[1])}</td>'
        body.append(f'<tr class="{style}">{line}</tr>')
    return f'<div class="scroll"><table class="wide"><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def interval_table(found: Sequence[Interval]) -> str:
    """One row per cell, one column per rival; an interval that leaves out zero is bold."""
    rivals = list(dict.fromkeys(i.rival for i in found))
    rows = {}
    for i in found:
        sure = ' class="sure"' if i.low > 0 or i.high < 0 else ""
        said = f"<td{sure}>{_short(i.mean, '+')} <small>[{_short(i.low, '+')}, {_short(i.high, '+')}]</small></td>"
        rows.setdefault((i.split.replace("_", " "), i.domain), []).append(said)
    return _table(["split", "domain", *(f"against {n}" for n in rivals)], 2,
                  [[*(f'<td class="l">{escape(x)}</td>' for x in cell), *said] for cell, said in rows.items()])  # fmt: skip


def _table(names: Sequence[str], left: int, rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th{' class=l' if i < left else ''}>{escape(n)}</th>" for i, n in enumerate(names))
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def predictor_table(workdir: Path) -> str:
    """Validation of the density predictors, averaged over domains and seeds; '' where there is none."""
    rows = [r for p in sorted(workdir.glob("seed_*/predictor_report.json")) for r in json.loads(p.read_text())]
    metrics = [m for m in ("spearman", "kendall", "ndcg", "calibration") if rows and m in rows[0]]
    groups: dict[tuple[str, str], list] = {}
    for r in rows:
        groups.setdefault((r["predictor"], r["split"]), []).append([r[m] for m in metrics])
    return rows and _table(
        ["predictor", "split", *metrics], 2,
        [
            [*(f'<td class="l">{escape(x.replace("_", " "))}</td>' for x in key),
             *(f"<td>{_short(x)}</td>" for x in np.nanmean(np.array(values, float), axis=0))]
            for key, values in groups.items()
        ],
    ) or ""  # fmt: skip


def render(
    workdir: Path, r: Results, table: Table, protocol: str, verdicts: Sequence[Verdict],
    intervals: Sequence[Interval], map_: Figure,
) -> str:  # fmt: skip
    """The whole page."""
    parts = [f"<h1>Pattern-preserving attribute retrieval: {escape(r.rows[0]['catalogue'])}</h1>"]
    parts.append(f'<p class="protocol">{escape(protocol)}</p>')
    cards = "".join(f"<div><b>{escape(v.figure)}</b><span>{escape(v.text)}</span></div>" for v in verdicts)
    parts.append(f'<div class="verdicts">{cards}</div>' if cards else "")
    parts += [f"<p>Unfinished: {escape(m)} lacks seeds {', '.join(map(str, s))}.</p>"
              for m, s in r.unfinished().items()]  # fmt: skip

    def section(title: str, text: str, content: str) -> None:
        if content:
            parts.append(f"<section><h2>{title}</h2><p>{text}</p>{content}</section>")

    def figure(fig: Figure | None, name: str, title: str) -> str:
        return f'<div class="scroll">{svg(fig, name, title)}</div>' if fig else ""

    spread = "; ± is the standard deviation over seeds" if len(r.seeds) > 1 else ""
    section(
        "All methods",
        f"Joint@{r.k}: share of the {r.k} returned items that keep the pattern of the seeds and carry the attribute"
        f"{spread}. Underlined: best of a column. Probes are index searches, calls network evaluations per "
        "context. References, below the rule, read what the question hides.",
        main_table(r, table),
    )
    section(
        "The frontier", "Keeping the pattern against gaining the attribute; up and to the right is better. "
        "Numbers are those of the table; hollow points are references.",
        figure(map_, "frontier", "Attribute against Purity of every method"),
    )  # fmt: skip
    section(
        "Cell by cell", "The tick is the best single-probe baseline of that very cell, picked on test.",
        figure(cells(r), "cells", "Joint of the main methods in every cell"),
    )  # fmt: skip
    section(
        "Paired differences", f"MO-DiT minus a rival in Joint@{r.k} with 95 % bootstrap intervals: hits are averaged over "
        "seeds, whole patterns are drawn again. Bold where zero lies outside.",
        interval_table(intervals) if intervals else "",
    )  # fmt: skip
    section("Training", "Loss per stage, one line per seed; orange is MO-DiT.",
            figure(curves(workdir), "curves", "Training curves"))  # fmt: skip
    section("Density predictors", "Within-pattern agreement with the probed densities, mean over domains and seeds.",
            predictor_table(workdir))  # fmt: skip
    config = workdir / "config.json"
    if config.exists():
        text = "\n".join(f"config.{k} = {json.dumps(v)}" for k, v in _leaves(json.loads(config.read_text())))
        section("Reproduce", "These values, given to experiments.run and then experiments.evaluate, make this page again.",
                f"<details><summary>The whole configuration</summary><pre>{escape(text)}</pre></details>")  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(r.rows[0]['catalogue'])} · report</title><style>{_variables()}{CSS}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _leaves(tree: dict, path: str = "") -> list[tuple[str, object]]:
    return [
        leaf for k, v in tree.items()
        for leaf in (_leaves(v, f"{path}{k}.") if isinstance(v, dict) else [(path + k, v)])
    ]  # fmt: skip


def write(workdir: Path, r: Results, *sections) -> Path:
    """workdir/report.html and workdir/frontier.png, each moved into place whole; returns the page's path."""
    with matplotlib.rc_context(STYLE):
        map_, image = frontier(r), io.BytesIO()
        map_.savefig(image, format="png", dpi=150)
        page = render(workdir, r, *sections, map_).encode()
    for name, content in (("frontier.png", image.getvalue()), ("report.html", page)):
        temporary = workdir / f"{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, workdir / name)
    return workdir / "report.html"
