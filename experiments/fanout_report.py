"""The report on an R4T run: one table of all methods, what it proves, latencies, and answers side by side."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.fanout_rows import COLUMNS, FanoutResults
from experiments.fanout_verdicts import speed_up, timed, verdicts
from experiments.fanouts import DIFFUSION, FOLM
from experiments.report_plots import LIGHT
from genret.retrieval.significance import paired_test


def text_report(r: FanoutResults) -> str:
    """Everything, for a terminal: the queries of each part by themselves."""
    parts = [section for part in r.parts for section in _sections(r.of(part), part)]
    parts += [_timings(r), _steps(r)]
    parts += [_side_by_side(r.of(part)) for part in r.parts]
    if r.command:
        parts.append(f"  $ {r.command}\n  $ {r.command.replace('experiments.run', 'experiments.evaluate')}")
    return "\n\n".join(part for part in parts if part)


def _sections(r: FanoutResults, part: str) -> list[str]:
    first, seeds = r.rows[0], sorted({row["seed"] for row in r.rows})
    head = f"{first['data']}: {first['contents']:,} contents, {first['queries']} {part} queries, "
    head += f"k = {first['k']}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return [head, _table(r), verdicts(r)]


def _table(r: FanoutResults) -> str:
    names = [name for name in COLUMNS if any(name in row for row in r.rows)]
    # What is decided by few sets is printed with its interval.
    wide = {name: 21 if r.main == "recall" and name in ("recall", "hit") else 8 for name in names}
    left = max(map(len, r.methods)) + 2
    lines = [" " * (left + 2) + "".join(f"{COLUMNS[n]:>{wide[n]}}" for n in names) + "   calls"]
    for method in r.methods:
        mark = ">" if method in (FOLM, DIFFUSION) else "*" if r.oracle(method) else " "
        cells = "".join(f"{_cell(r, method, name, wide[name] > 8):>{wide[name]}}" for name in names)
        lines.append(f"{mark} {method:<{left}}{cells}   {r.of_method(method)[0]['calls']}")
    if any(map(r.oracle, r.methods)):
        lines.append(
            "  * an oracle: chooses among its samples by the references of these queries; no fair rival"
        )
    drawn = {(row.get("runs") or 0, row.get("repeated") or 0) for row in r.rows}
    for runs, queries in sorted(own for own in drawn if own[0] > 1):
        lines.append(
            f"  V: Vendi over {runs} draws for each of {queries} queries, a share of the most it can be: "
            f"of their mean rows (one set again and again: {1 / runs:.3f}), and of all their rows"
        )
    if len({row["seed"] for row in r.rows}) > 1:
        spread = {m: r.values(m, r.main) for m in r.methods}
        said = ", ".join(f"{m} {v.std(ddof=1):.3f}" for m, v in spread.items() if len(v) > 1 and v.std() > 0)
        lines.append(f"  standard deviation of {COLUMNS[r.main]} over seeds: {said}")
    return "\n".join(lines)


def _cell(r: FanoutResults, method: str, name: str, interval: bool) -> str:
    found = r.values(method, name)
    if not len(found):
        return "-"
    said = f"{found.mean():.3f}"
    if interval and r.has(method, name):
        values = r.per_query(method, name)
        gap = paired_test(values, np.arange(len(values)), resamples=2_000)
        said += f" [{gap.low:.3f}, {gap.high:.3f}]"
    return said


def _timings(r: FanoutResults) -> str:
    """Seconds of a batch, split; how much faster each sampler is than the language model."""
    if not r.latency:
        return ""
    wide = max(len(row["method"]) for row in r.latency) + 2
    lines = [
        f"seconds per batch on {r.latency[0]['device']}, from the queries' text to contents: p50 (p95),",
        f"of it their encoding and the search; times as fast as {FOLM}, and the fan-out alone, not encoded",
        f"  {'batch':<{wide + 5}}{'whole':>20}{'encode':>10}{'search':>10}{'times':>22}{'alone':>22}   calls",
    ]
    for batch in sorted({row["batch"] for row in r.latency}):
        for method in dict.fromkeys(row["method"] for row in r.latency if row["batch"] == batch):
            calls = next(row["calls"] for row in r.latency if row["method"] == method)
            lines.append(f"  {batch:<5}{method:<{wide}}{_times(r, method, batch)}   {calls}")
    if any("encode_p50" not in row for row in r.latency if not row.get("skipped")):
        lines.append("  encode -: rows of an earlier run, whose whole is without it")
    return "\n".join(lines)


def _times(r: FanoutResults, method: str, batch: int) -> str:
    rows = timed(r, method, batch)
    if not rows:
        why = next(row["skipped"] for row in r.latency if (row["method"], row["batch"]) == (method, batch))
        return f"{f'skipped, {why}':>20}" + 2 * f"{'-':>10}" + 2 * f"{'-':>22}"

    def mean(name: str) -> float | None:
        found = [row[name] for row in rows if row.get(name) is not None]
        return float(np.mean(found)) if found else None

    cells = f"{mean('p50'):.3f} ({mean('p95'):.3f})".rjust(20)
    for name in ("encode_p50", "search_p50"):
        cells += f"{'-' if mean(name) is None else format(mean(name), '.4f'):>10}"
    for alone in (False, True):
        found = None if method == FOLM else speed_up(r, method, batch, alone)
        cells += f"{found.times if found else '-':>22}"
    return cells


def _checkpoints(r: FanoutResults) -> dict[str, dict[int, list[dict]]]:
    """Rows of each folder, in the order they came, by step; a row for every seed."""
    found: dict[str, dict[int, list[dict]]] = {row["folder"]: {} for row in r.checkpoints}
    for row in sorted(r.checkpoints, key=lambda row: row["step"]):
        found[row["folder"]].setdefault(row["step"], []).append(row)
    return found


def _steps(r: FanoutResults) -> str:
    """Checkpoints on validation queries, means over seeds."""
    if not r.checkpoints:
        return ""
    names = [name for name in COLUMNS if any(name in row for row in r.checkpoints)]
    lines = [f"checkpoints, {r.checkpoints[0]['queries']} validation queries:"]
    lines += [f"  {'':<14}{'step':>8} seeds" + "".join(f"{COLUMNS[n]:>8}" for n in names)]
    for folder, steps in _checkpoints(r).items():
        for step, rows in steps.items():
            means = "".join(f"{np.mean([row.get(n, np.nan) for row in rows]):>8.3f}" for n in names)
            lines.append(f"  {folder:<14}{step:>8} {len(rows):>5}{means}")
    return "\n".join(lines)


def _side_by_side(r: FanoutResults) -> str:
    """The answers of each method to the same unseen queries."""
    lines = []
    shown = {row["method"]: row["shown"] for row in reversed(r.rows) if row.get("shown")}
    for q in range(max(map(len, shown.values()), default=0)):
        lines.append(f'"{next(each[q] for each in shown.values() if q < len(each))["query"]}"')
        for method in (m for m in r.methods if q < len(shown.get(m, []))):
            answer = shown[method][q]
            said = answer.get("sub_queries") or answer["contents"]
            lines.append(f"  {method:<30} {', '.join(said) or '(malformed)'}"[:160])
    return "\n".join(lines)


def plot(r: FanoutResults) -> Figure:
    """Quality of every method, latency against batch size on logarithmic axes (R4T's figure 5), and the
    quality of checkpoints where there are any."""
    panels = 2 + bool(r.checkpoints)
    fig = Figure(figsize=(6.5 * panels, 4.6), layout="constrained")
    left, right, *more = fig.subplots(1, panels)
    part = r.parts[0]
    own = r.of(part)
    order = sorted(own.methods, key=lambda m: own.values(m, own.main).mean())
    means = [own.values(m, own.main).mean() for m in order]
    left.barh(order, means, color=[_colour(m) for m in order])
    for i, value in enumerate(means):
        left.text(value, i, f" {value:.3f}", va="center", fontsize=8)
    left.margins(x=0.12)
    left.set(title=f"{own.main}, {own.rows[0]['queries']} {part} queries")
    batches = sorted({row["batch"] for row in r.latency})
    timed_methods = dict.fromkeys(row["method"] for row in r.latency)
    for method, marker in zip(timed_methods, itertools.cycle("osDv^P")):
        taken = [(b, np.mean([row["p50"] for row in rows])) for b in batches if (rows := timed(r, method, b))]
        style = {"color": _colour(method), "ls": "--" if "," in method else "-"}
        if taken:
            right.loglog(*zip(*taken, strict=True), marker=marker, label=method, **style)
    if right.lines:
        right.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        right.set_xticks(batches, labels=map(str, batches), minor=False)
        right.minorticks_off()
    right.set(title=f"latency, k = {own.rows[0]['k']}", xlabel="queries at once", ylabel="seconds per batch")
    for ax in more:
        for folder, steps in _checkpoints(r).items():
            line = [(step, np.mean([row[own.main] for row in rows])) for step, rows in steps.items()]
            ax.semilogx(*zip(*line, strict=True), marker="o", label=folder)
        ax.set(title=f"{own.main} of checkpoints, validation", xlabel="step")
        ax.legend(frameon=False)
    return fig


def _colour(method: str) -> str:
    return LIGHT["ours" if method.startswith(DIFFUSION) else "kin" if method.startswith(FOLM) else "rival"]


def write(workdir: Path, r: FanoutResults) -> Path:
    """The figure beside the rows; the folder is made where there is none."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "fanout.png"
    plot(r).savefig(path, dpi=130)
    return path
