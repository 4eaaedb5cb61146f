"""Rows of R4T runs as the report reads them: a run's folder, or one packed file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fanouts import PARTS
from experiments.report_rows import portable
from experiments.workdir import check_rows, read_json, read_rows, write_text
from genret.types import InputError

PACKED = "fanouts"  # the kind in a packed file's header

# key -> head of its column
COLUMNS = {
    "composite": "comp", "relevant": "relev", "groundedness": "ground", "diversity": "divers",
    "alignment": "align", "recall": "recall", "hit": "hit", "precision": "prec", "soft_coverage": "soft",
    "duplicates": "dupl", "coherence": "coher", "vendi_runs": "V runs", "vendi_rows": "V rows",
    "valid": "valid",
}  # fmt: skip
# Metrics that a packed file keeps for each query: those with an interval.
KEPT = {"composite", "relevant", "groundedness", "diversity", "alignment", "recall", "hit"}

# What the report reads of a row, of a latency row and of an answer (`workdir.check_rows`).
ROW = {"method": "text", "data": "text", "calls": "text or count", "per_query": "dict", "shown": "list?"}
ROW |= dict.fromkeys(("seed", "queries", "k", "contents"), "count") | dict.fromkeys(COLUMNS, "number?")
ROW |= {"part": "text?", "reads": "text?", "runs": "count?", "repeated": "count?"}
LATENCY = {"method": "text", "device": "text", "calls": "text or count", "batch": "count", "skipped": "text?"}
TIMED = dict.fromkeys(("p50", "p95"), "number")
TIMED |= dict.fromkeys(("encode_p50", "search_p50"), "number?") | {"seconds": "list?", "alone": "list?"}
CHECKPOINT = {"folder": "text", "step": "count", "seed": "count", "queries": "count"}
CHECKPOINT |= dict.fromkeys(COLUMNS, "number?")
SHOWN = {"query": "text", "contents": "list", "sub_queries": "list?"}


@dataclass(frozen=True, eq=False)
class FanoutResults:
    """rows: of results.jsonl, one per (method, seed, part of the queries). latency: of latency.jsonl.
    command: of the run. checkpoints: of checkpoints.jsonl. What is computed here is of one part: take it with
    `of`."""

    rows: list[dict[str, Any]]
    latency: list[dict[str, Any]]
    command: str = ""
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        """The parts of the queries that there are rows of, test first."""
        return [part for part in PARTS if any(_part(row) == part for row in self.rows)]

    def of(self, part: str) -> FanoutResults:
        return dataclasses.replace(self, rows=[row for row in self.rows if _part(row) == part])

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row["method"] for row in self.rows))

    @property
    def main(self) -> str:
        """The metric that decides: recall against reference sets, else the composite."""
        return "recall" if "recall" in self.rows[0] else "composite"

    def of_method(self, method: str | None) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["method"] == method]

    def values(self, method: str, name: str) -> np.ndarray:
        """One number per seed, f64[seeds]."""
        return np.array([row[name] for row in self.of_method(method) if row.get(name) is not None])

    def each(self, method: str, name: str) -> np.ndarray:
        """The metric of each query in each seed: f64[seeds, Q]."""
        return np.array([row["per_query"][name] for row in self.of_method(method)])

    def per_query(self, method: str, name: str) -> np.ndarray:
        """The same, averaged over seeds: f64[Q]."""
        return self.each(method, name).mean(0)

    def has(self, method: str | None, name: str) -> bool:
        """Whether every row of a method, and there is one, has the metric of each query."""
        rows = self.of_method(method)
        return bool(rows) and all(name in row["per_query"] for row in rows)

    def oracle(self, method: str) -> bool:
        """Whether a method is told what it should find; rows of earlier runs do not say that of Best-of-N."""
        old = method.startswith("Best-of-") and self.main == "recall"
        return any(row.get("reads", "references" if old else "") for row in self.of_method(method))


def _part(row: dict[str, Any]) -> str:
    return row.get("part") or PARTS[0]  # rows of earlier runs are of test queries


def read_fanouts(workdir: Path) -> FanoutResults:
    """A run's folder, or a file that `save_fanouts` wrote. Raises InputError where nothing was evaluated."""
    rows = read_rows(workdir if workdir.is_file() else workdir / "results.jsonl")
    if not rows:
        raise InputError("--workdir", f"{workdir} holds no results", "evaluate the run first")
    if workdir.is_file():
        check_rows(workdir, rows[:1], {"command": "text", "latency": "list", "checkpoints": "list?"})
        head = [rows[0][name] for name in ("latency", "command")]
        return _checked(workdir, FanoutResults(rows[1:], *head, rows[0].get("checkpoints") or []))
    config = workdir / "config.json"
    about = read_json(config) if config.exists() else {}
    check_rows(config, [about], {"command": "text?"})
    latency, checkpoints = (read_rows(workdir / f"{name}.jsonl") for name in ("latency", "checkpoints"))
    return _checked(workdir, FanoutResults(rows, latency, about.get("command") or "", checkpoints))


def _checked(path: Path, r: FanoutResults) -> FanoutResults:
    """`r`, or an InputError for what the report cannot compute with."""
    if not r.rows:
        raise InputError(str(path), "holds no rows", "evaluate the run first")
    check_rows(path, r.rows, ROW)
    check_rows(path, r.latency, LATENCY)
    check_rows(path, r.checkpoints, CHECKPOINT)
    timed = [row for row in r.latency if not row.get("skipped")]
    check_rows(path, timed, TIMED)
    for row in timed:
        for name in ("seconds", "alone"):
            check_rows(path, [{name: value} for value in row.get(name) or []], {name: "number"})
    queries = {}
    for row in r.rows:
        if (part := _part(row)) not in PARTS:
            raise InputError(str(path), f"holds a row of {part!r}", f"use rows of {' or '.join(PARTS)}")
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
            if len(values) != (queries.setdefault(part, row["queries"]) or None):
                problem = f"{name} of {row['method']} has {len(values)} values for {queries[part]} queries"
                raise InputError(str(path), problem, "evaluate again in a new --workdir")
    return r


def save_fanouts(r: FanoutResults, path: Path) -> Path:
    """Everything the report reads in one small file that can be committed: a header, then the rows."""
    rows = [
        row | {"per_query": {name: values for name, values in row["per_query"].items() if name in KEPT}}
        for row in r.rows
    ]
    head = {"genret": PACKED, "command": portable(r.command), "latency": r.latency}
    head |= {"checkpoints": r.checkpoints} if r.checkpoints else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in [head, *rows]))
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
