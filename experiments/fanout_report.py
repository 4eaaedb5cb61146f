"""The report on an R4T run: one table of all methods, what it proves, latencies, and answers side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.fanouts import DIFFUSION, FOLM, RANDOM
from experiments.report_plots import LIGHT
from experiments.report_rows import portable
from experiments.workdir import check_rows, read_json, read_rows, write_text
from genret.retrieval.significance import paired_test
from genret.types import InputError

PACKED = "fanouts"  # the kind in a packed file's header

# key -> head of its column
COLUMNS = {
    "composite": "comp", "relevant": "relev", "groundedness": "ground", "diversity": "divers",
    "alignment": "align", "recall": "recall", "hit": "hit", "precision": "prec", "duplicates": "dupl",
    "coherence": "coher", "vendi_runs": "V runs", "vendi_rows": "V rows", "valid": "valid",
}  # fmt: skip


# What the report reads of a row, of a latency row and of an answer (`workdir.check_rows`).
ROW = {"method": "text", "data": "text", "calls": "text or count", "per_query": "dict", "shown": "list?"}
ROW |= dict.fromkeys(("seed", "queries", "k", "contents"), "count") | dict.fromkeys(COLUMNS, "number?")
LATENCY = {"method": "text", "device": "text", "calls": "text or count", "batch": "count"}
LATENCY |= dict.fromkeys(("p50", "p95"), "number")
SHOWN = {"query": "text", "contents": "list", "sub_queries": "list?"}


@dataclass(frozen=True, eq=False)
class FanoutResults:
    """rows: of results.jsonl, one per (method, seed). latency: of latency.jsonl. command: of the run."""

    rows: list[dict[str, Any]]
    latency: list[dict[str, Any]]
    command: str = ""

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row["method"] for row in self.rows))

    @property
    def main(self) -> str:
        """The metric that decides: recall against reference sets, else the composite."""
        return "recall" if "recall" in self.rows[0] else "composite"

    def values(self, method: str, name: str) -> np.ndarray:
        """One number per seed, f64[seeds]."""
        return np.array(
            [row[name] for row in self.rows if row["method"] == method and row.get(name) is not None]
        )

    def per_query(self, method: str, name: str) -> np.ndarray:
        """The metric of each query, averaged over seeds: f64[Q]."""
        return np.mean([row["per_query"][name] for row in self.rows if row["method"] == method], axis=0)

    def has(self, method: str | None, name: str) -> bool:
        """Whether every row of a method, and there is one, has the metric of each query."""
        rows = [row for row in self.rows if row["method"] == method]
        return bool(rows) and all(name in row["per_query"] for row in rows)


def read_fanouts(workdir: Path) -> FanoutResults:
    """A run's folder, or a file that `save_fanouts` wrote. Raises InputError where nothing was evaluated."""
    rows = read_rows(workdir if workdir.is_file() else workdir / "results.jsonl")
    if not rows:
        raise InputError("--workdir", f"{workdir} holds no results", "evaluate the run first")
    if workdir.is_file():
        check_rows(workdir, rows[:1], {"command": "text", "latency": "list"})
        return _checked(workdir, FanoutResults(rows[1:], rows[0]["latency"], rows[0]["command"]))
    config = workdir / "config.json"
    about = read_json(config) if config.exists() else {}
    check_rows(config, [about], {"command": "text?"})
    found = FanoutResults(rows, read_rows(workdir / "latency.jsonl"), about.get("command") or "")
    return _checked(workdir, found)


def _checked(path: Path, r: FanoutResults) -> FanoutResults:
    """`r`, or an InputError for what the report cannot compute with."""
    if not r.rows:
        raise InputError(str(path), "holds no rows", "evaluate the run first")
    check_rows(path, r.rows, ROW)
    check_rows(path, r.latency, LATENCY)
    for row in r.rows:
        check_rows(path, row.get("shown") or [], SHOWN)
        said = [
            text
            for each in row.get("shown") or []
            for text in each["contents"] + (each.get("sub_queries") or [])
        ]
        check_rows(path, [{"text": text} for text in said], {"text": "text"})
        for name, values in row["per_query"].items():
            check_rows(path, [row["per_query"]], {name: "list"})
            check_rows(path, [{name: value} for value in values], {name: "number"})
            if len(values) != (r.rows[0]["queries"] or None):
                queries = r.rows[0]["queries"]
                problem = f"{name} of {row['method']} has {len(values)} values for {queries} queries"
                raise InputError(str(path), problem, "evaluate again in a new --workdir")
    return r


def save_fanouts(r: FanoutResults, path: Path) -> Path:
    """Everything the report reads in one small file that can be committed: a header, then the rows."""
    kept = {r.main, "groundedness", "diversity", "alignment"}
    rows = [
        row | {"per_query": {name: values for name, values in row["per_query"].items() if name in kept}}
        for row in r.rows
    ]
    head = {
        "genret": PACKED,
        "command": portable(r.command),
        "latency": r.latency,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in [head, *rows]))
    return path


def text_report(r: FanoutResults) -> str:
    """Everything, for a terminal."""
    first, seeds = r.rows[0], sorted({row["seed"] for row in r.rows})
    head = (
        f"{first['data']}: {first['contents']:,} contents, {first['queries']} test queries, k = {first['k']}"
    )
    head += f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    parts = [head, _table(r), *_verdicts(r), _timings(r), _side_by_side(r)]
    if r.command:
        parts.append(f"  $ {r.command}\n  $ {r.command.replace('experiments.run', 'experiments.evaluate')}")
    return "\n\n".join(part for part in parts if part)


def _table(r: FanoutResults) -> str:
    names = [name for name in COLUMNS if any(name in row for row in r.rows)]
    wide = max(map(len, r.methods)) + 2
    lines = [" " * (wide + 2) + "".join(f"{COLUMNS[n]:>8}" for n in names) + "   calls"]
    for method in r.methods:
        mark = ">" if method in (FOLM, DIFFUSION) else " "
        cells = ""
        for name in names:
            found = r.values(method, name)
            cells += f"{found.mean():>8.3f}" if len(found) else f"{'-':>8}"
        calls = next(row["calls"] for row in r.rows if row["method"] == method)
        lines.append(f"{mark} {method:<{wide}}{cells}   {calls}")
    if len({row["seed"] for row in r.rows}) > 1:
        spread = {m: r.values(m, r.main) for m in r.methods}
        said = ", ".join(f"{m} {v.std(ddof=1):.3f}" for m, v in spread.items() if len(v) > 1 and v.std() > 0)
        lines.append(f"  standard deviation of {COLUMNS[r.main]} over seeds: {said}")
    return "\n".join(lines)


def ratio(one: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """mean(one) / mean(other) with its 95 % percentile interval, queries drawn again in pairs."""
    at = np.random.default_rng(seed).integers(len(one), size=(2_000, len(one)))
    drawn = one[at].mean(1) / np.maximum(other[at].mean(1), 1e-9)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(one.mean() / max(other.mean(), 1e-9)), float(low), float(high)


def _verdicts(r: FanoutResults) -> list[str]:
    """Ratios and differences that the paper reports, of those methods that were evaluated."""
    best = next((m for m in r.methods if m.startswith("Best-of-")), None)
    lines = []

    def said(one: str, other: str | None, name: str) -> None:
        if r.has(one, name) and r.has(other, name):
            a, b = r.per_query(one, name), r.per_query(other, name)
            found, low, high = ratio(a, b)
            gap = paired_test(a - b, np.arange(len(a)))
            times = f"{found:5.2f}  [{low:.2f}, {high:.2f}]" if b.mean() > 0 else "over nothing:"
            lines.append(
                f"  {times}  {name} of {one} over {other}; "
                f"difference {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], p {gap.p:.3f}"
            )

    for other in ("zero-shot LM", "few-shot LM", best, "warm-started LM"):
        said(FOLM, other, r.main)
    few = [m for m in r.methods if m.startswith(f"{DIFFUSION}, ")]
    for method in (DIFFUSION, *few):
        for name in ("recall",) if r.main == "recall" else ("groundedness", "diversity", "alignment"):
            said(method, FOLM, name)
    name = "recall" if r.main == "recall" else "relevant"
    if RANDOM in r.methods:
        chance = r.values(RANDOM, name).mean()
        lower = [m for m in r.methods if m != RANDOM and r.values(m, name).mean() <= chance]
        lines.append(f"  not above the random pool in {COLUMNS[name]}: {', '.join(lower) or 'none'}")
    return ["\n".join(lines)] if lines else []


def _timings(r: FanoutResults) -> str:
    """Seconds of a batch; how much faster each sampler is than the language model."""
    if not r.latency:
        return ""
    batches = sorted({row["batch"] for row in r.latency})
    at = {(row["method"], row["batch"]): row for row in r.latency}
    lines = [f"seconds per batch on {r.latency[0]['device']}, p50 (p95), search of the contents included"]
    for method in dict.fromkeys(row["method"] for row in r.latency):
        cells = ""
        for batch in batches:
            row, base = at.get((method, batch)), at.get((FOLM, batch))
            if row is None:
                cells += f"{'-':>28}"
                continue
            faster = f" {base['p50'] / max(row['p50'], 1e-9):.0f}x" if base and method != FOLM else ""
            said = f"{row['p50']:.3f} ({row['p95']:.3f}){faster}"
            cells += f"{said:>28}"
        calls = next(row["calls"] for row in r.latency if row["method"] == method)
        lines.append(f"  {method:<26}{cells}   {calls}")
    lines.insert(1, f"  {'batch':<26}" + "".join(f"{b:>28}" for b in batches) + "   calls")
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
    """Quality of every method, and latency against batch size on logarithmic axes (R4T's figure 5)."""
    fig = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    order = sorted(r.methods, key=lambda m: r.values(m, r.main).mean())
    means = [r.values(m, r.main).mean() for m in order]
    left.barh(order, means, color=[_colour(m) for m in order])
    for i, value in enumerate(means):
        left.text(value, i, f" {value:.3f}", va="center", fontsize=8)
    left.set(title=f"{r.main}, {r.rows[0]['queries']} unseen queries")
    for method in dict.fromkeys(row["method"] for row in r.latency):
        rows = sorted((w["batch"], w["p50"]) for w in r.latency if w["method"] == method)
        style = {"color": _colour(method), "ls": "--" if "," in method else "-"}
        right.loglog(*zip(*rows, strict=True), marker="o", label=method, **style)
    if r.latency:
        right.legend()
    right.set(title=f"latency, k = {r.rows[0]['k']}", xlabel="queries at once", ylabel="seconds per batch")
    return fig


def _colour(method: str) -> str:
    return LIGHT["ours" if method.startswith(DIFFUSION) else "kin" if method.startswith(FOLM) else "rival"]


def write(workdir: Path, r: FanoutResults) -> Path:
    """The figure beside the rows."""
    path = workdir / "fanout.png"
    plot(r).savefig(path, dpi=130)
    return path


def is_fanout(path: Path) -> bool:
    """Whether the rows of a run's folder, or of a packed file, are R4T's."""
    if path.is_file():
        try:
            with path.open() as file:
                return json.loads(file.readline())["genret"] == PACKED
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False  # whoever reads all of it says what is wrong
    rows = read_rows(path / "results.jsonl")
    return bool(rows) and {"data", "per_query"} <= rows[0].keys()
