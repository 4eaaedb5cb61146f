"""Evaluate a trained run: python -m experiments.evaluate --config=... --workdir=runs/x

Appends one row per (method, domain, split, seed) to workdir/results.jsonl and skips rows that are there,
so it can be killed and started again.
"""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from experiments.catalogues import open_catalogue
from experiments.command import launch
from experiments.modit import Run, open_run
from experiments.workdir import append_rows, read_rows, same_run, write_text
from genret.modit.protocol import evaluate
from genret.modit.validation import predictor_report
from genret.retrieval.index import build_index
from genret.training.log import Progress


def evaluate_run(run: Run, results: Path) -> None:
    """Every method of one seed that has no rows yet."""
    finished = run.folder / "evaluated.json"  # lets a finished seed be passed over unopened
    done = _methods(results, run.seed)
    if finished.exists() and json.loads(finished.read_text()) == done:
        return
    e, catalogue = run.config.evaluation, run.catalogue
    report = run.folder / "predictor_report.json"
    exact = build_index("exact", catalogue.embeddings, e.k + 1, run.mesh)
    if not report.exists():
        rows = predictor_report(catalogue, run.splits, run.fitted, exact, e.k)
        write_text(report, json.dumps(rows, indent=1))
    methods = [m for m in run.methods() if m.name not in done]
    validation, test = run.contexts("validation"), run.contexts("test")
    protocol = {
        "catalogue": catalogue.name, "seed": run.seed, "k": e.k, "n_items": catalogue.num_items,
    }  # fmt: skip
    lookups = run.fitted.labels.lookups
    progress = Progress(f"evaluate seed {run.seed}", len(methods))
    for i, method in enumerate(methods):
        append_rows(results, evaluate(method, run.searcher, exact, validation, test, protocol, lookups))
        progress(i + 1, method.name)
    write_text(finished, json.dumps(_methods(results, run.seed)))


def _methods(results: Path, seed: int) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in read_rows(results) if row["seed"] == seed))


def main(config: ConfigDict, workdir: Path) -> None:
    """Every seed of `config`."""
    catalogue = open_catalogue(config.catalogue)
    same_run(config, catalogue, workdir)
    for seed in config.seeds:
        evaluate_run(open_run(config, workdir, seed, catalogue), workdir / "results.jsonl")


if __name__ == "__main__":
    launch(main)
