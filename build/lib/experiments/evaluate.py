"""Evaluate a trained run: python -m experiments.evaluate --config=... --workdir=runs/x

Appends one row per (method, domain, split, seed) to workdir/results.jsonl and skips rows that are there,
so it can be killed and started again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.catalogues import open_catalogue
from experiments.command import launch
from experiments.modit import Run, open_run, same_config
from genret.modit.protocol import evaluate
from genret.modit.validation import predictor_report
from genret.retrieval.index import build_index
from genret.training.log import Progress

KEY = ("method", "seed")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows or none: the file is rewritten beside itself and moved into place."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) + rows))


def write_text(path: Path, text: str) -> None:
    """The whole text or the old file: written beside `path` and moved into place."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def evaluate_run(run: Run, results: Path) -> None:
    """Every method of one seed that has no rows yet."""
    done = {tuple(row[k] for k in KEY) for row in read_rows(results)}
    e, catalogue = run.config.evaluation, run.catalogue
    report = run.folder / "predictor_report.json"
    exact = build_index("exact", catalogue.embeddings, e.k + 1, run.mesh)
    if not report.exists():
        rows = predictor_report(catalogue, run.splits, run.fitted, exact, e.k)
        write_text(report, json.dumps(rows, indent=1))
    methods = [m for m in run.methods() if (m.name, run.seed) not in done]
    if not methods:
        return
    validation, test = run.contexts("validation"), run.contexts("test")
    protocol = {
        "catalogue": catalogue.name, "seed": run.seed, "k": e.k, "n_items": catalogue.num_items,
        "lookups": run.fitted.labels.lookups,
    }  # fmt: skip
    progress = Progress(f"evaluate seed {run.seed}", len(methods))
    for i, method in enumerate(methods):
        append_rows(results, evaluate(method, run.searcher, exact, validation, test, protocol))
        progress(i + 1, method.name)


def main(config: ConfigDict, workdir: Path) -> None:
    """Every seed of `config`."""
    same_config(config, workdir)
    catalogue = open_catalogue(config.catalogue)
    for seed in config.seeds:
        evaluate_run(open_run(config, workdir, seed, catalogue), workdir / "results.jsonl")


if __name__ == "__main__":
    launch(main)
