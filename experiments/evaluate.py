"""Evaluate a trained run: python -m experiments.evaluate --config=... --workdir=runs/x

Appends one row per (method, domain, split, seed) to workdir/results.jsonl and skips rows that are there,
so it can be killed and started again; SIGTERM ends it with status 0.

    --methods=REGEX         only methods with a match in "table: name": '^main: ', '^order: ', HPPO
    --checkpoints=sft,hppo  instead, every checkpoint kept in these stages' folders on validation: the
                            one-call query of MO-DiT, sets of R4T; one row per (folder, step, split, domain,
                            seed) of workdir/checkpoints.jsonl, skipped where it is there
    --follow                with it, look again every --follow_seconds until every seed is trained
"""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from experiments import fanouts, r4t
from experiments.catalogues import open_catalogue
from experiments.checkpoints import sweep
from experiments.checks import check
from experiments.command import launch, matching, regex
from experiments.modit import Run, open_run
from experiments.workdir import alone, append_rows, read_json, read_rows, same_run, write_text
from genret.modit.protocol import evaluate
from genret.modit.validation import predictor_report
from genret.retrieval.index import build_index
from genret.training import preemption, processes
from genret.training.log import Progress
from genret.training.memory import peak
from genret.types import InputError


def evaluate_run(run: Run, results: Path, methods: str = "") -> None:
    """Every method of one seed that has no rows yet; methods: only those with a match of this regular
    expression in "table: name". Raises InputError for one that is none, or matches nothing."""
    finished = run.folder / "evaluated.json"  # lets a finished seed be passed over unopened
    done, tables = _methods(results, run.seed), sorted(run.config.ablations)
    if not methods and finished.exists() and read_json(finished) == [tables, done]:
        return
    named = {f"{m.table}: {m.name}": m for m in run.methods()}
    wanted = [named[name] for name in matching("--methods", methods, named, "method")]
    asked = [m for m in wanted if m.name not in done]
    e, catalogue = run.config.evaluation, run.catalogue
    report = run.folder / "predictor_report.json"
    if asked or not report.exists():
        exact = build_index("exact", catalogue.embeddings, e.k + 1, run.mesh)
    if not report.exists():
        rows = predictor_report(catalogue, run.splits, run.spreads(), exact, e.k)
        write_text(report, json.dumps(rows, indent=1))
    if asked:
        validation, test = run.contexts("validation"), run.contexts("test")
        protocol = {
            "catalogue": catalogue.name, "seed": run.seed, "k": e.k, "n_items": catalogue.num_items,
        }  # fmt: skip
        lookups = run.fitted.labels.lookups
        progress = Progress(f"evaluate seed {run.seed}", len(asked))
        for i, method in enumerate(asked):
            append_rows(results, evaluate(method, run.searcher, exact, validation, test, protocol, lookups))
            progress(i + 1, method.name)
            preemption.leave_if_due()
    if not methods:
        write_text(finished, json.dumps([tables, _methods(results, run.seed)]))


def _methods(results: Path, seed: int) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in read_rows(results) if row["seed"] == seed))


def main(
    config: ConfigDict, workdir: Path, methods: str, checkpoints: str, follow: bool, follow_seconds: float
) -> None:
    """Every seed of `config`."""
    folders = [name for name in checkpoints.split(",") if name]
    if checkpoints and not folders:
        raise InputError("--checkpoints", f"{checkpoints!r} names no folder", "give --checkpoints=sft,hppo")
    if follow and not folders:
        raise InputError("--follow", "follows the checkpoints of stages", "give --checkpoints=sft")
    if follow and not follow_seconds > 0:
        raise InputError("--follow_seconds", f"{follow_seconds} is no time", "give some seconds")
    if follow and processes.several():  # each would see a checkpoint at another moment
        raise InputError("--follow", "watches with one process", "leave out --multihost")
    regex("--methods", methods)  # said before anything is opened
    with alone(workdir, "evaluate"):
        _evaluate(config, workdir, methods, folders, follow_seconds if follow else None)
    print(peak(), flush=True)


def _evaluate(
    config: ConfigDict, workdir: Path, methods: str, folders: list[str], follow: float | None
) -> None:
    if "fanout" in config:
        runs = r4t.open_runs(config, workdir)
        if folders:
            return sweep(list(runs), folders, workdir / "checkpoints.jsonl", follow)
        for run in runs:
            _is_trained(run)
            fanouts.evaluate_run(run, workdir / "results.jsonl", methods)
            fanouts.time_run(run, workdir / "latency.jsonl")
        return
    check(config)
    catalogue = open_catalogue(config.catalogue)
    same_run(config, catalogue.arrays, workdir)
    runs = (open_run(config, workdir, seed, catalogue) for seed in config.seeds)
    if folders:
        return sweep(list(runs), folders, workdir / "checkpoints.jsonl", follow)
    for run in runs:
        _is_trained(run)
        evaluate_run(run, workdir / "results.jsonl", methods)


def _is_trained(run: Run | r4t.FanoutRun) -> None:
    """What is not would be fitted here, beside the run that is at it."""
    if not (run.folder / "trained").exists():
        problem = f"seed {run.seed} of {run.folder.parent} is not trained to its end"
        raise InputError("--workdir", problem, "start experiments.run with the same flags first")


if __name__ == "__main__":
    launch(
        main,
        methods=("", 'Evaluate only methods with a match in "table: name".'),
        checkpoints=("", "Stage folders whose checkpoints to evaluate on validation, with commas between."),
        follow=(False, "Look for new checkpoints until the run is trained."),
        follow_seconds=(5.0, "Seconds between two looks."),
    )
