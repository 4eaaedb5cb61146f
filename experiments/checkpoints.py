"""Every checkpoint of a run scored on validation, while it trains or after: rows of checkpoints.jsonl.

Of MO-DiT the one-call query, a row per (split, domain); of R4T a set for each query, a row of means.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import fanouts
from experiments.methods import as_trained
from experiments.modit import Run
from experiments.r4t import FanoutRun
from experiments.workdir import append_rows, read_rows
from genret.modit.protocol import SPLITS
from genret.retrieval.metrics import macro
from genret.training import preemption, processes
from genret.types import InputError

FANOUT_CELL = ("validation", "all")  # R4T's queries have neither splits of items nor domains


def kept_steps(run: Run | FanoutRun, folder: str) -> list[int]:
    """The steps of the checkpoints that stand in a stage's folder, whole, in order."""
    found = (run.folder / folder / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def evaluate_checkpoints(run: Run | FanoutRun, folders: Sequence[str], results: Path) -> None:
    """Every checkpoint in `folders` of one seed that lacks rows, on validation.

    A checkpoint that training deletes before it is read is passed over, and a line says so; of several
    processes, whose reading it would part, it is an error.
    """
    have = {_key(row) for row in read_rows(results)}
    cells = [FANOUT_CELL]
    if isinstance(run, Run):
        cells = [(split, domain) for split in SPLITS for domain in run.catalogue.attribute_names]
    todo = [
        (folder, step) for folder in folders for step in kept_steps(run, folder)
        if any((folder, step, *cell, run.seed) not in have for cell in cells)
    ]  # fmt: skip
    todo = processes.agreed("checkpoints", todo)  # training may go on, and delete some
    if not todo:  # nothing is opened, let alone fitted, before a stage has begun
        return
    rows_of = _query_rows if isinstance(run, Run) else _set_rows
    for folder, step in todo:
        where = f"seed {run.seed}, {folder} at step {step}"
        try:
            rows = rows_of(run, folder, step)
        except Exception:  # whatever a reader meets whose files go away under it
            if processes.several() or (run.folder / folder / "checkpoints" / str(step)).is_dir():
                raise
            print(f"{where}: passed over, training has deleted it", flush=True)
            continue
        append_rows(results, [row for row in rows if _key(row) not in have])
        main = next(name for name in ("joint", "recall", "composite") if name in rows[0])
        mean = sum(row[main] for row in rows) / len(rows)
        said = f"Joint@{rows[0]['k']}" if main == "joint" else main
        print(f"{where}: validation {said} {mean:.3f}", flush=True)
        preemption.leave_if_due()


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("folder", "step", "split", "domain", "seed"))


def _query_rows(run: Run, folder: str, step: int) -> list[dict[str, Any]]:
    """One per (split, domain), of the query that the folder was trained for."""
    contexts = run.contexts("validation")
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


def _set_rows(run: FanoutRun, folder: str, step: int) -> list[dict[str, Any]]:
    """One, of the means over all validation queries that a table would ask."""
    rows = fanouts.asked_rows(run, "validation")
    made = fanouts.of_checkpoint(run, folder, step)(rows, 10_000 * run.seed)
    split, domain = FANOUT_CELL
    row = {"folder": folder, "step": step, "split": split, "domain": domain, "seed": run.seed}
    row |= {"k": run.config.k, "queries": len(rows)}
    found = fanouts.score(run, rows, made)
    return [row | {name: round(float(values.mean()), 6) for name, values in found.items()}]


def sweep(
    runs: Sequence[Run] | Sequence[FanoutRun], folders: Sequence[str], results: Path,
    follow: float | None = None,
) -> None:  # fmt: skip
    """`evaluate_checkpoints` of every seed; with `follow`, again and again, so many seconds apart, until
    every seed is trained. Raises InputError for a folder of no stage, or that a run at rest does not have."""
    for run in runs:
        stages = [name for name in run.recipes if follow is not None or kept_steps(run, name)]
        for folder in folders:
            if folder not in stages:
                fix = f"use some of {', '.join(stages)}" if stages else "train the run first"
                raise InputError("--checkpoints", f"seed {run.seed} has no folder {folder!r}", fix)
    while True:
        over = all((run.folder / "trained").exists() for run in runs)  # asked first: the last are seen
        for run in runs:
            evaluate_checkpoints(run, folders, results)
        if over or follow is None:
            return
        time.sleep(follow)
