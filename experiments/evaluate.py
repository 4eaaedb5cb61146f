"""Evaluate a trained run: python -m experiments.evaluate --config=... --workdir=runs/x

Appends one row per (method, domain, split, seed) to workdir/results.jsonl and skips rows that are there,
so it can be killed and started again; SIGTERM ends it with status 0.

    --methods=REGEX         only methods with a match in "table: name": '^main: ', '^order: ', HPPO
    --checkpoints=sft,hppo  instead, the one-call query of every checkpoint kept in these stages' folders, on
                            the validation contexts: one row per (folder, step, split, domain, seed) of
                            workdir/checkpoints.jsonl, skipped where it is there
    --follow                with it, look again every --follow_seconds until every seed is trained
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import fanouts, r4t
from experiments.catalogues import open_catalogue
from experiments.command import launch
from experiments.methods import as_trained
from experiments.modit import Run, open_run
from experiments.workdir import alone, append_rows, read_json, read_rows, same_run, write_text
from genret.modit.protocol import SPLITS, Contexts, evaluate
from genret.modit.validation import predictor_report
from genret.retrieval.index import build_index
from genret.retrieval.metrics import macro
from genret.training import preemption, processes
from genret.training.log import Progress
from genret.training.memory import peak
from genret.types import InputError


def evaluate_run(run: Run, results: Path, methods: str = "") -> None:
    """Every method of one seed that has no rows yet; methods: only those with a match of this regular
    expression in "table: name". Raises InputError for one that cannot be read."""
    finished = run.folder / "evaluated.json"  # lets a finished seed be passed over unopened
    done, tables = _methods(results, run.seed), sorted(run.config.ablations)
    if not methods and finished.exists() and read_json(finished) == [tables, done]:
        return
    wanted = _pattern(methods)
    asked = [m for m in run.methods() if m.name not in done and wanted.search(f"{m.table}: {m.name}")]
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


def _pattern(methods: str) -> re.Pattern:
    try:
        return re.compile(methods)
    except re.error as error:
        raise InputError("--methods", f"is no regular expression ({error})", "see Python's re") from None


def kept_steps(run: Run, folder: str) -> list[int]:
    """The steps of the checkpoints that stand in a stage's folder, whole, in order."""
    found = (run.folder / folder / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def evaluate_checkpoints(run: Run, folders: Sequence[str], results: Path) -> None:
    """The one-call query of every checkpoint in `folders` of one seed that lacks rows, on validation.

    A checkpoint that training deletes before it is read is passed over, and a line says so; of several
    processes, whose reading it would part, it is an error.
    """
    have = {_key(row) for row in read_rows(results)}
    cells = [(split, domain) for split in SPLITS for domain in run.catalogue.attribute_names]
    todo = [
        (folder, step) for folder in folders for step in kept_steps(run, folder)
        if any((folder, step, *cell, run.seed) not in have for cell in cells)
    ]  # fmt: skip
    todo = processes.agreed("checkpoints", todo)  # training may go on, and delete some
    if not todo:  # nothing is opened, let alone fitted, before a stage has begun
        return
    validation = run.contexts("validation")
    for folder, step in todo:
        where = f"seed {run.seed}, {folder} at step {step}"
        try:
            rows = checkpoint_rows(run, folder, step, validation)
        except Exception:  # whatever a reader meets whose files go away under it
            if processes.several() or (run.folder / folder / "checkpoints" / str(step)).is_dir():
                raise
            print(f"{where}: passed over, training has deleted it", flush=True)
            continue
        append_rows(results, [row for row in rows if _key(row) not in have])
        joint = sum(row["joint"] for row in rows) / len(rows)
        print(f"{where}: validation Joint@{rows[0]['k']} {joint:.3f}", flush=True)
        preemption.leave_if_due()


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("folder", "step", "split", "domain", "seed"))


def checkpoint_rows(run: Run, folder: str, step: int, contexts: Contexts) -> list[dict[str, Any]]:
    """Rows of one checkpoint, one per (split, domain), of the query that its folder was trained for."""
    queries = as_trained(run, folder, step)(contexts, ())
    scores = run.searcher.judge(run.searcher.rank(queries, contexts), contexts)
    rows = []
    for s, split in enumerate(SPLITS):
        for m, domain in enumerate(run.catalogue.attribute_names):
            at = (contexts.split == s) & (contexts.domain == m)
            row = {"folder": folder, "step": step, "split": split, "domain": domain, "seed": run.seed}
            row |= {"k": run.searcher.k, "contexts": int(at.sum())}
            for name in ("joint", "attribute", "purity"):
                row[name] = round(macro(getattr(scores, name)[at], contexts.pattern[at]), 6)
            rows.append(row)
    return rows


def sweep(runs: Sequence[Run], folders: Sequence[str], results: Path, follow: float | None = None) -> None:
    """`evaluate_checkpoints` of every seed; with `follow`, again and again, so many seconds apart, until
    every seed is trained. Raises InputError for a folder that a run at rest does not have."""
    if follow is None:
        for run in runs:
            for folder in folders:
                if not (run.folder / folder / "checkpoints").is_dir():
                    stages = sorted(path.parent.name for path in run.folder.glob("*/checkpoints"))
                    fix = f"use some of {', '.join(stages)}" if stages else "train the run first"
                    raise InputError("--checkpoints", f"seed {run.seed} has no folder {folder!r}", fix)
    while True:
        over = all((run.folder / "trained").exists() for run in runs)  # asked first: the last are seen
        for run in runs:
            evaluate_checkpoints(run, folders, results)
        if over or follow is None:
            return
        time.sleep(follow)


def main(
    config: ConfigDict, workdir: Path, methods: str, checkpoints: str, follow: bool, follow_seconds: float
) -> None:
    """Every seed of `config`."""
    if follow and not checkpoints:
        raise InputError("--follow", "follows the checkpoints of stages", "give --checkpoints=sft")
    if checkpoints and "fanout" in config:
        raise InputError("--checkpoints", "are those of MO-DiT's stages", "leave it out for R4T")
    if follow and not follow_seconds > 0:
        raise InputError("--follow_seconds", f"{follow_seconds} is no time", "give some seconds")
    if follow and processes.several():  # each would see a checkpoint at another moment
        raise InputError("--follow", "watches with one process", "leave out --multihost")
    _pattern(methods)  # said before anything is opened
    with alone(workdir, "evaluate"):
        _evaluate(config, workdir, methods, checkpoints, follow_seconds if follow else None)
    print(peak(), flush=True)


def _evaluate(
    config: ConfigDict, workdir: Path, methods: str, checkpoints: str, follow: float | None
) -> None:
    if "fanout" in config:
        wanted = _pattern(methods)
        for run in r4t.open_runs(config, workdir):
            _is_trained(run)
            fanouts.evaluate_run(run, workdir / "results.jsonl", lambda name: bool(wanted.search(name)))
            fanouts.time_run(run, workdir / "latency.jsonl")
        return
    catalogue = open_catalogue(config.catalogue)
    same_run(config, catalogue.arrays, workdir)
    runs = (open_run(config, workdir, seed, catalogue) for seed in config.seeds)
    if checkpoints:
        folders = list(filter(None, checkpoints.split(",")))
        sweep(list(runs), folders, workdir / "checkpoints.jsonl", follow)
        return
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
