"""How fast it is, and what fraction of the machine that comes to: python -m experiments.benchmark

    --output=bench.json     every repeat, versions, device and command line; rewritten after each line
    --only=REGEX            lines whose name it is found in: "train", "search|score"
    --size=demo             test (seconds), demo (2 CPU cores), B (one accelerator)
    --vectors=FILE          search and train on these: a .npy matrix, or a catalogue (.parquet or folder)
    --peers                 PyTorch, FAISS, hnswlib and transformers on the same shapes, weights and threads
    --repeats=10            of each line, after compiling and one to warm up

Every line runs the library's own function on one device, on synthetic data of the sizes it states. MFU is the
formula's FLOP/s over the chip's peak; on a CPU, over those of a plain matmul in the same run.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.benchmark import language
from experiments.benchmark import lines as core
from experiments.benchmark.measure import Work, environment, machine_of, matmul_work, measure, table
from experiments.benchmark.world import SCALES, World
from experiments.command import launch, matching
from experiments.workdir import write_text
from genret.types import InputError

LINES: dict[str, Callable[[World], Work]] = core.LINES | language.LINES


def chosen(only: str, peers: bool) -> dict[str, Callable[[World], Work]]:
    """Name -> maker of the lines that `only` is found in. Peers' go first: under ours `training.memory` ends
    the C library's own adaptation, for good.

    Raises InputError for a pattern that is none or finds nothing, and for peers that are not installed.
    """
    lines = dict(LINES)
    if peers:
        from experiments.benchmark import peers as rivals

        rivals.require()
        lines = rivals.LINES | lines
    more = "" if peers else "; more with --peers"
    return {name: lines[name] for name in matching("--only", only, lines, "line", more)}


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds `ours_over_peer`, items per second of ours over theirs, to rows that name the line they rival."""
    ours = {row["line"]: row for row in rows}
    for row in rows:
        if row.get("peer_of") in ours:
            row["ours_over_peer"] = ours[row["peer_of"]]["items_per_s"] / row["items_per_s"]


def main(output: str, only: str, size: str, vectors: str, peers: bool, repeats: int) -> None:
    """Measure, print and write."""
    if size not in SCALES:
        raise InputError("--size", f"no size is called {size!r}", f"use one of {', '.join(SCALES)}")
    if repeats < 3:
        raise InputError("--repeats", f"{repeats} give no quartiles", "use 3 or more")
    lines, world = chosen(only, peers), World(SCALES[size], vectors)
    if vectors:
        world.vectors  # noqa: B018 - refused before anything is timed
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are reported
    try:
        _run(lines, world, Path(output) if output else None, size, peers, repeats)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def _run(lines: dict, world: World, output: Path | None, size: str, peers: bool, repeats: int) -> None:
    head = environment(peers) | {"command": _command(), "size": size, "vectors": world.source}
    print(f"{head['device']} ({head['cpu']}), {head['threads']} threads, {head['date']}", flush=True)
    matmul = measure("matmul", matmul_work(world.scale.matmul, world.scale.dtype), None, max(repeats, 10))
    machine = machine_of(matmul, world.scale.stream)
    matmul["mfu"] = matmul["flop_per_s"] / machine.peak
    head |= {"peak_flop_per_s": machine.peak, "peak": machine.source}
    head["memory_bytes_per_s"] = machine.bandwidth
    rows = [matmul]
    for name, make in lines.items():
        print(f"{name} ...", flush=True)
        rows.append(measure(name, make(world), machine, repeats))
        compare(rows)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_text(output, json.dumps(head | {"rows": rows}, indent=1))
    print(f"\n{table(rows)}\n")
    for row in rows:
        print(f"{row['line']}: {row['about']}" + (f"; FLOPs: {row['formula']}" if row["formula"] else ""))
    print(f"\nMFU is of {machine.peak / 1e9:.1f} GFLOP/s, {machine.source}; ", end="")
    print(f"memory of {machine.bandwidth / 1e9:.1f} GB/s, read and written")


def _command() -> str:
    """As it was typed, without the folders of files."""
    parts = [re.sub(r"(--(?:output|vectors)[= ])?(?:[^= ]*/)", r"\1", part) for part in sys.argv[1:]]
    return shlex.join(["python", "-m", "experiments.benchmark", *parts])


if __name__ == "__main__":
    launch(
        main,
        config=False,
        workdir=None,
        alone=True,
        output=("", "Write the rows into this JSON file."),
        only=("", "Lines whose name holds this pattern."),
        size=("demo", "test, demo or B."),
        vectors=("", "A .npy matrix or a catalogue, instead of synthetic vectors."),
        peers=(False, "Compare with PyTorch, FAISS, hnswlib and transformers."),
        repeats=(10, "Timed calls of each line."),
    )
