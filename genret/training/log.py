"""What a run says: one line per log step for people, JSON lines and TensorBoard for machines."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from genret.training import processes
from genret.types import reading

# Dense bf16 peak, FLOP/s per chip, from the vendors' data sheets; MFU is printed where the chip is known.
PEAK_FLOPS = {
    "NVIDIA A100": 3.12e14,
    "NVIDIA H100": 9.89e14,
    "NVIDIA H200": 9.89e14,
    "TPU v4": 2.75e14,
    "TPU v5 lite": 1.97e14,
    "TPU v5e": 1.97e14,
    "TPU v5": 4.59e14,
    "TPU v6 lite": 9.18e14,
}


def peak_flops() -> float | None:
    """Peak of all devices together, or None for a device that is not in the table (a CPU)."""
    kind = jax.devices()[0].device_kind
    match = [v for k, v in PEAK_FLOPS.items() if kind.startswith(k)]
    return match[0] * jax.device_count() if match else None


def counted_flops(traced: jax.stages.Traced) -> float:
    """FLOPs of the matrix products of a traced function, over all devices; nothing is compiled or run.

    2 · rows · columns · inner of each, as often as the loops around it turn. Of several branches the dearest
    counts; of a `while` loop, whose turns nobody knows, one. Element-wise work counts nothing, nor do kernels
    that bring their own products (cuDNN's attention).
    """
    return _products(traced.jaxpr)


def _products(program: Any) -> float:
    total = 0.0
    for equation in program.eqns:
        name, given = equation.primitive.name, equation.params
        if name == "dot_general":
            (inner, _), _ = given["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in inner)
            continue
        inside = [_products(part) for part in jax.tree.leaves(given) if hasattr(part, "eqns")]
        if name == "cond":
            total += max(inside)
        else:  # a program of `shard_map` is one device's
            times = {"scan": given.get("length"), "shard_map": getattr(given.get("mesh"), "size", 1)}
            total += times.get(name, 1) * sum(inside)
    return total


@functools.cache
def matmul_flops(size: int = 2048) -> float:
    """FLOP/s of a plain f32 [size, size] matmul on the default device, the best of three: what a fraction
    is taken of where the data sheet gives no peak (a CPU), or none for f32."""
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    return 2 * size**3 / _best_seconds(multiply, jnp.ones((size, size), jnp.float32))


@functools.cache
def memory_bandwidth(size: int = 1 << 26) -> float:
    """Bytes/s of the default device, the best of three: of doubling f32[size], read and written, or of adding
    it up, read alone, whichever is more (a CPU waits for the pages of what is new)."""
    ones = jnp.ones(size, jnp.float32)
    doubled, added = (_best_seconds(jax.jit(run), ones) for run in (lambda a: a * 2, jnp.sum))
    return 4 * size * max(2 / doubled, 1 / added)


def _best_seconds(run: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Of three calls, after one that compiles."""
    run(x).block_until_ready()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def duration(seconds: float) -> str:
    """'1:02:03' or '2:03'."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Progress:
    """A bar on a terminal, plain lines otherwise: one in `apart` seconds at most, and the last."""

    def __init__(self, name: str, total: int, start: int = 0, *, apart: float = 0.0):
        self.name, self.total, self.start, self.apart = name, total, start, apart
        self.began, self.bar = time.monotonic(), sys.stderr.isatty() and processes.is_writer()
        self.said = -apart

    def __call__(self, done: int, text: str = "") -> None:
        """Say that `done` of `total` are finished."""
        spent = time.monotonic() - self.began
        eta = spent / max(done - self.start, 1) * (self.total - done)
        line = f"{self.name} {done}/{self.total} {text} eta {duration(eta)}"
        if not self.bar:
            if spent - self.said >= self.apart or done >= self.total:
                self.said = spent
                print(line, flush=True)
            return
        filled = round(24 * done / max(self.total, 1))
        end = "\n" if done >= self.total else ""
        print(f"\r\x1b[K[{'#' * filled:<24}] {line}", end=end, file=sys.stderr, flush=True)


class MetricLog:
    """Appends rows to `folder`/metrics.jsonl and TensorBoard. Only process 0 writes.

    Rows at or after `start` are dropped first: a killed run repeats the steps since its checkpoint.
    """

    def __init__(self, folder: Path, start: int):
        self.writer = None
        if jax.process_index():
            return
        # Imported late: it is slow and evaluation has no use for it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            rows = self.path.read_text().splitlines(keepends=True)
            with reading(self.path, "delete its last lines"):
                kept = [r for r in rows if r.endswith("\n") and json.loads(r)["step"] <= start]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, self.path)
        (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        # Written at once: the thread of a SummaryWriter ends where the clock jumps back by weeks, and then
        # rows wait for it for ever.
        self.writer = EventsWriter(str(folder / "tensorboard" / "events"))
        begun = SessionLog(status=SessionLog.START)  # later steps of an earlier run are not shown
        self.writer.write_event(Event(wall_time=time.time(), step=start + 1, session_log=begun))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row; values are plain floats."""
        if self.writer is None:
            return
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **metrics}) + "\n")
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
