"""The figures of a report, by matplotlib, as SVG whose colours follow the reader's theme."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report_rows import ENCODER, HEADLINE, STAGED
from experiments.workdir import read_rows

if TYPE_CHECKING:
    from experiments.report_rows import Results
    from experiments.report_tables import Side, Step

# name -> (light, dark). Figures are drawn in the light colours; a page makes them CSS variables.
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
    """The colour of method i; kin are the model's other stages and queries."""
    if r.reference[i]:
        return "muted"
    if r.methods[i] == r.ours:
        return "ours"
    return "kin" if "DiT" in r.methods[i] and "MSE" not in r.methods[i] else "rival"


def frontier(r: Results) -> Figure:
    """Attribute@K against Purity@K, one panel per split, numbered as in the table."""
    fig = Figure(figsize=(11, 5.2), layout="constrained")
    widths = [1] * len(r.splits) + [0.9]  # the last one holds the legend
    axes = fig.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    points = np.stack([r.cells(m).mean(axis=2) for m in ("purity", "attribute")], axis=2)
    # A method that gives the pattern up would squeeze the others together: it goes to the edge.
    on = points[..., 0] > 0.5 * np.median(points[..., 0])
    low, high = points[on].min(axis=0), points[on].max(axis=0)
    pad = 0.06 * np.maximum(high - low, 1e-3)
    points = np.clip(points, low - 0.6 * pad, high + 0.6 * pad)
    for s, (ax, split) in enumerate(zip(axes, r.splits, strict=False)):
        ax.set(title=split.replace("_", " "), xlabel=f"Purity@{r.k}")
        ax.set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]))
        ax.tick_params(labelleft=s == 0)
        for i, at in enumerate(points[:, s]):
            _point(ax, r, i, *at, beyond=not on[i, s])
    axes[0].set_ylabel(f"Attribute@{r.k}")
    legend = axes[-1]
    legend.set_axis_off()
    last = max(24, len(r.methods))
    legend.set(xlim=(0, 1), ylim=(last + 0.5, -1))
    if not on.all():
        legend.plot(0.13, last, "<", ms=6, color=LIGHT["muted"], mec=LIGHT["paper"])
        legend.text(0.19, last, "beyond the left edge", va="center", fontsize=7.5)
    for i, method in enumerate(r.methods):
        _point(legend, r, i, 0.13, i)
        bold = "bold" if method == r.ours else "normal"
        legend.text(0.07, i, i + 1, ha="right", va="center", fontsize=7, color=LIGHT["muted"])
        name = method.replace("reference: ", "ref: ")
        legend.text(0.19, i, name, va="center", fontsize=7.5, weight=bold)
    fig.draw_without_rendering()  # labels are placed in pixels, once the layout has settled
    fig.set_layout_engine("none")
    for s, ax in enumerate(axes[:-1]):
        _number(ax, points[:, s], fig.dpi / 72)
    return fig


def _point(ax: Axes, r: Results, i: int, x: float, y: float, beyond: bool = False) -> None:
    colour, hollow, ours = LIGHT[kind(r, i)], r.reference[i], r.methods[i] == r.ours
    ax.plot(
        x, y, "<" if beyond else "*" if ours else "o", ms=13 if ours else 6,
        mfc=LIGHT["paper"] if hollow else colour, mec=colour if hollow else LIGHT["paper"],
        mew=1.3 if hollow else 0.7, zorder=4 if ours else 3,
    )  # fmt: skip


def _number(ax: Axes, points: np.ndarray, scale: float) -> None:
    """Number each point beside it, or at the end of a hairline where it is crowded.

    Greedy: of the places round a point, from near to far, the first with the least overlap wins.
    """
    at = ax.transData.transform(points)
    half = np.array([6.5, 4.5]) * scale  # of a label of two digits, pixels
    low, high = (np.array(p) for p in ax.get_window_extent().get_points())
    radius = np.repeat([9, 13, 18, 24, 31, 39, 48], 16)
    turn = np.tile(np.arange(0.5, 16.5), 7) * (2 * np.pi / 16)
    offsets = (radius * np.stack([np.cos(turn), np.sin(turn)])).T * scale
    crowd = (np.linalg.norm(at[:, None] - at, axis=2) < 30 * scale).sum(1)
    taken = np.empty((0, 2))
    for i in np.argsort(-crowd, kind="stable"):  # the crowded ones have the fewest free places
        places = at[i] + offsets
        labels = (np.abs(places[:, None] - taken) < 2 * half).all(2).sum(1)
        dots = (np.abs(places[:, None] - at) < half + 3.5 * scale).all(2).sum(1)
        out = ((places < low + half) | (places > high - half)).any(1)
        best = np.argmin(4 * labels + 3 * dots + 9 * out + 0.01 * np.arange(len(places)))
        taken = np.append(taken, places[best][None], axis=0)
        x, y = ax.transData.inverted().transform(places[best])
        if radius[best] > 13:
            ax.plot([points[i, 0], x], [points[i, 1], y], lw=0.5, color=LIGHT["muted"], zorder=1)
        ax.text(x, y, i + 1, ha="center", va="center", fontsize=7, zorder=5)


# What the plot of cells shows: method, marker, size, colour, and its lane within a row.
SHOWN = (
    ("seed mean", "o", 7, "muted", 0.0),
    ("plain pretrained DiT", "o", 7, "kin", -0.25),
    ("linear-probe steering", "o", 7, "rival", -0.25),
    (f"{ENCODER}, labels", "D", 5.5, "rival3", 0.18),
    (f"{ENCODER}, pseudo-labels", "D", 5.5, "rival2", 0.34),
    (STAGED, "*", 13, "ours", 0.0),
    (HEADLINE, "*", 13, "ours", 0.0),
)


def cells(r: Results, baselines: list[str]) -> Figure:
    """Joint per cell: our method, its main rivals, the best of `baselines` there, and the references."""
    joint, y = r.cells("joint"), np.arange(len(r.domains))
    shown = [(r.methods.index(m), *look) for m, *look in SHOWN if m in r.methods]
    if r.ours == HEADLINE:  # stages 1-3 stand a little above it, in the paler colour
        shown = [(i, mark, 9, "kin", -0.12) if r.methods[i] == STAGED else (i, mark, *look)
                 for i, mark, *look in shown]  # fmt: skip
    drawn = [i for i, *_ in shown] + list(np.flatnonzero(r.reference))
    fig = Figure(figsize=(11, 1.4 + 0.6 * len(y)), layout="constrained")
    axes = fig.subplots(1, len(r.splits), sharex=True, sharey=True, squeeze=False)[0]
    for s, (ax, split) in enumerate(zip(axes, r.splits, strict=True)):
        ax.set(title=split.replace("_", " "), xlabel=f"Joint@{r.k}", ylim=(len(y) - 0.45, -0.55))
        ax.set_yticks(y, r.domains)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        least, most = joint[drawn, s].min(axis=0), joint[drawn, s].max(axis=0)
        ax.hlines(y, least, most, color=LIGHT["line"], lw=2, zorder=1)
        if baselines:
            best = joint[[r.methods.index(m) for m in baselines], s].max(axis=0)
            ax.plot(best, y, "|", ms=24, mew=1.5, color=LIGHT["ink"])
            ax.plot([], "|", ms=9, mew=1.5, color=LIGHT["ink"], label="best single-probe baseline")
        for i, mark, size, colour, lane in shown:
            ax.plot(
                joint[i, s], y + lane, mark, ms=size, mfc=LIGHT[colour], mec=LIGHT["paper"],
                mew=0.7, label=r.methods[i], zorder=5 if mark == "*" else 4,
            )  # fmt: skip
        for n, i in enumerate(np.flatnonzero(r.reference)):
            ax.plot(
                joint[i, s], y, "o", ms=6, mfc=LIGHT["paper"], mec=LIGHT["muted"], mew=1.2,
                zorder=3, label=None if n else "references",
            )  # fmt: skip
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return fig


def calls(side: Side, splits: list[str], k: int) -> Figure:
    """Joint against denoiser calls, on a logarithmic axis, a line per split with its sd over seeds."""
    fig = Figure(figsize=(11, 3.4), layout="constrained")
    ax = fig.subplots()
    x = np.array([max(line.x, 1) for line in side.lines])
    for s, (split, mark) in enumerate(zip(splits, ("o-", "D--"), strict=False)):
        joint, sd = (np.array([getattr(line, n)[s] for line in side.lines]) for n in ("joint", "sd"))
        ax.errorbar(
            x, joint, np.nan_to_num(sd), fmt=mark, color=LIGHT["ours"], alpha=(1, 0.6)[s], ms=5, lw=1.4
        )
        ax.annotate(
            split.replace("_", " "), (x[-1], joint[-1]), (6, 0), textcoords="offset points", va="center"
        )
    ax.set(xscale="log", xlabel="denoiser calls per query", ylabel=f"Joint@{k}")
    ax.set_xticks(x, [f"{v:g}" for v in x])
    ax.minorticks_off()
    return fig


def frontiers(lines: list[Side], splits: list[str], k: int) -> Figure:
    """Attribute against Purity along each curve, one panel per split; points carry their x."""
    fig = Figure(figsize=(11, 4), layout="constrained")
    axes = fig.subplots(1, len(splits), sharex=True, sharey=True, squeeze=False)[0]
    for s, (ax, split) in enumerate(zip(axes, splits, strict=True)):
        ax.set(title=split.replace("_", " "), xlabel=f"Purity@{k}")
        for side in lines:
            at = np.array([(line.purity_of[s], line.attribute_of[s]) for line in side.lines])
            colour = LIGHT["rival" if side.name == "steering" else "ours"]
            ax.plot(*at.T, "o-", color=colour, ms=4.5, lw=1.4, label=f"{side.title} {side.x}".strip())
            for (x, y), line in zip(at, side.lines, strict=True):
                ax.annotate(
                    f"{line.x:g}", (x, y), (4, 4), textcoords="offset points", fontsize=7, color=colour
                )
    axes[0].set_ylabel(f"Attribute@{k}")
    axes[0].legend(fontsize=8)
    return fig


def checkpoints(found: list[Step], splits: list[str], k: int) -> Figure:
    """Validation Joint, Attribute and Purity against step, a line per stage (and split, for Joint)."""
    fig = Figure(figsize=(11, 3), layout="constrained")
    axes = fig.subplots(1, len(splits) + 2)
    folders = list(dict.fromkeys(step.folder for step in found))
    titles = [f"Joint@{k}, {s.replace('_', ' ')}" for s in splits] + [f"Attribute@{k}", f"Purity@{k}"]
    for i, folder in enumerate(folders):
        line = np.array([(f.step, *f.joint, f.attribute, f.purity) for f in found if f.folder == folder])
        colour = LIGHT[("ours", "rival", "rival2", "rival3", "kin")[i % 5]]
        for ax, y in zip(axes, line.T[1:], strict=True):
            ax.plot(line[:, 0], y, "o-", color=colour, ms=4, lw=1.4, label=folder)
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("step")
        ax.locator_params(nbins=4)
    axes[0].legend(fontsize=8)
    return fig


ORDER = ("predictor", "pretrain", "cpt", "sft", "hppo", "sft_mse")


def curves(workdir: Path) -> Figure | None:
    """Training loss against step, a panel per stage, a line per seed; None without logs."""
    logs: dict[str, list[np.ndarray]] = {}
    for path in sorted(workdir.glob("seed_*/*/metrics.jsonl")):
        rows = read_rows(path)
        if rows:
            line = np.array([(row["step"], row["loss"]) for row in rows])
            logs.setdefault(path.parent.name, []).append(line)
    if not logs:
        return None
    stages = sorted(logs, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), len(n), n))
    across = min(5, len(stages))
    down = -(-len(stages) // across)
    fig = Figure(figsize=(11, 1.8 * down + 0.2), layout="constrained")
    axes = fig.subplots(down, across, squeeze=False).ravel()
    for ax in axes[len(stages) :]:
        ax.set_axis_off()
    for ax, stage in zip(axes, stages, strict=False):
        colour = LIGHT["ours" if stage in ("pretrain", "cpt", "sft") or "hppo" in stage else "rival"]
        for line in logs[stage]:
            dot = "o" if len(line) < 12 else ""
            ax.plot(*line.T, color=colour, lw=1.3, alpha=0.85, marker=dot, ms=3)
        ax.set_title(stage.replace("_", " "), fontsize=9)
        ax.locator_params(nbins=3)
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
    tag, rest = re.search(r"<svg(.*?)>(.*)", out.getvalue(), flags=re.S).groups()
    box = re.search(r'viewBox="[^"]*"', tag)[0]
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.S)
    rest = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", rest)
    for variable, light in LIGHT.items():
        rest = rest.replace(light, f"var(--{variable})")
    return f'<svg role="img" aria-label="{escape(title)}" {box}>{rest}'
