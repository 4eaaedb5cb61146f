"""Timing of one line of the benchmark, and what fraction of the machine it comes to.

A time is that of a call whose result has been waited for. The first call, which compiles, is reported apart,
and those that warm up are left out: one, or four of a train step. Of the repeats the median and the quartiles
are kept, not the best.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genret.training.log import counted_flops, memory_bandwidth, peak_flops

PACKAGES = ("genret", "jax", "jaxlib", "flax", "optax", "numpy", "scann")
PEER_PACKAGES = ("torch", "faiss-cpu", "hnswlib", "transformers")


@dataclass(frozen=True)
class Work:
    """One thing to time.

    call: () -> arrays, waited for. about: what runs, with its sizes. items: of a call, in `unit`s.
    flops: of a call by `formula`, None where none fits (a graph search); counted: of the products in its
        traced program.
    bytes: read by a call where memory is the bound, as `traffic` says. after: () -> more fields of the row.
    warm: calls after the first that are not timed.
    """

    call: Callable[[], Any]
    about: str
    items: int
    unit: str
    flops: float | None = None
    formula: str = ""
    counted: float | None = None
    bytes: float | None = None
    traffic: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    after: Callable[[], dict[str, Any]] | None = None
    warm: int = 1


@dataclass(frozen=True)
class Machine:
    """peak: FLOP/s that MFU divides by, from `source`. bandwidth: bytes/s."""

    peak: float
    source: str
    bandwidth: float


def threads() -> int:
    """CPU threads this process may use; both sides of a comparison get as many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def traced_flops(function: Callable, *args: Any, **kwargs: Any) -> float:
    """FLOPs of the matrix products of a jitted or plain function; nothing is compiled or run."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return counted_flops(jitted.trace(*args, **kwargs))


def sampled(call: Callable[[], Any], repeats: int, warm: int = 1) -> tuple[float, list[float]]:
    """Seconds of the first call, and of each of `repeats` calls after `warm` more."""

    def once() -> float:
        began = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - began

    first, *seconds = [once() for _ in range(1 + warm + repeats)]
    return first, seconds[warm:]


def measure(name: str, work: Work, machine: Machine | None, repeats: int) -> dict[str, Any]:
    """The row of one line; machine: None gives no fractions."""
    first, seconds = sampled(work.call, repeats, work.warm)
    low, median, high = (float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75))
    row: dict[str, Any] = {"line": name, "about": work.about, "items": work.items, "unit": work.unit}
    row |= {"median_s": median, "quartiles_s": [low, high], "repeats": repeats, "seconds": seconds}
    row |= {"first_call_s": first, "compile_s": max(first - median, 0.0), "items_per_s": work.items / median}
    row |= {"flops_formula": work.flops, "formula": work.formula, "flops_counted": work.counted}
    if work.flops:
        row["flop_per_s"] = work.flops / median
    if machine and work.flops:
        row["mfu"] = work.flops / median / machine.peak
    if work.bytes:
        row |= {"bytes": work.bytes, "traffic": work.traffic, "bytes_per_s": work.bytes / median}
    if machine and work.bytes:
        row["bandwidth_fraction"] = work.bytes / median / machine.bandwidth
    return row | work.more | (work.after() if work.after else {})


def matmul_work(size: int, dtype: str) -> Work:
    """The yardstick: a plain [size, size] product, of full precision in float32."""
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    a = jnp.ones((size, size), dtype)
    return Work(
        lambda: multiply(a), f"{dtype}[{size}, {size}] squared", 1, "products", 2.0 * size**3, "2 n^3",
        traced_flops(multiply, a),
    )  # fmt: skip


def machine_of(matmul: dict[str, Any], stream: int) -> Machine:
    """Peak of one chip from the data sheet, or, where it is not known (a CPU), the measured `matmul` row's.

    stream: floats of the array that the bandwidth is measured on.
    """
    peak = peak_flops()
    known = peak is not None
    return Machine(
        peak / jax.device_count() if known else matmul["flop_per_s"],
        "bf16 peak of the data sheet, one chip" if known else "the matmul line of this run",
        memory_bandwidth(stream),
    )


def environment(peers: bool) -> dict[str, Any]:
    """Device, versions and threads, for the head of the file."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES + PEER_PACKAGES * peers:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "devices_used": 1,
        "cpu": _cpu(), "threads": threads(), "versions": found,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [s for s in info.read_text().splitlines() if s.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def table(rows: list[dict[str, Any]]) -> str:
    """What people read: one line a row, aligned."""
    head = "line items median quartiles items/s formula counted FLOP/s MFU memory compile".split() + [""]
    body = [head] + [_cells(row) for row in rows]
    widths = [max(len(line[i]) for line in body) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in (0, 11) else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in body
    )


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["quartiles_s"]
    notes = [f"recall {row['recall']:.4f}" if "recall" in row else "", row.get("note", "")]
    if "ours_over_peer" in row:
        notes.append(f"ours {row['ours_over_peer']:.2f} x")
    return [
        row["line"], f"{row['items']} {row['unit']}", _seconds(row["median_s"]),
        f"{_seconds(low)}-{_seconds(high)}", _si(row["items_per_s"]), _si(row["flops_formula"]),
        _si(row["flops_counted"]), _si(row.get("flop_per_s")), _share(row.get("mfu")),
        _share(row.get("bandwidth_fraction")), _seconds(row["compile_s"]), "; ".join(filter(None, notes)),
    ]  # fmt: skip


def _seconds(s: float) -> str:
    return f"{s:.2f} s" if s >= 1 else f"{1e3 * s:.1f} ms" if s >= 1e-3 else f"{1e6 * s:.0f} us"


def _si(value: float | None) -> str:
    if value is None:
        return "-"
    for scale, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
