"""Compile every train step for a machine that is not here: python -m experiments.compile --config=...

    --topology=v5e:16x16    a TPU slice (needs the package libtpu, no TPU)
    --topology=h100:32      NVIDIA H100s, 8 to a host (needs jax[cuda12], no GPU nor driver)
    --topology=cpu:8        simulated devices; their memory is an estimate
    --only=REGEX            stages whose name it is found in: "pretrain|hppo"
    --output=FILE           the table as JSON

Lowers and compiles what `fit` would run, the very step of `compiled_step` on the mesh of the config
(--config.mesh.fsdp=16), for each stage: a batch that does not divide, a sharding that does not fit or a step
that needs more memory than a device has shows here. Nothing is built, trained or downloaded; of what only a
fitted run knows, cells are as large as they were in others, prompts and answers as long as they may be.

Figures are per device: bytes of arguments (state, frozen arrays and batch), of temporaries and of outputs
that are no donated argument; FLOPs of one step as its compiler counts them (where it does not, those of the
forward and backward pass that `fit` logs, over the devices); and collectives in the program.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.abstract import abstract_fanout_run, abstract_run
from experiments.checks import check
from experiments.command import launch, matching
from experiments.r4t_checks import check as check_fanout
from experiments.workdir import write_text
from genret.training import mesh as meshes
from genret.training.log import counted_flops
from genret.training.loop import FitOptions, begin, compiled_step
from genret.training.stage import Stage
from genret.types import InputError, PyTree

HOST = 8  # GPUs of a host
# What XLA asks a driver for (openxla/xla, hlo-opt's GPU specs).
GPUS = {
    "h100": """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Devices to compile for and not to run on, but for cpu:N.

    Raises InputError for a topology that cannot be read, or whose compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    if not re.fullmatch(r"\w+:[1-9]\d{0,4}(x[1-9]\d{0,3}){0,2}", topology):
        raise InputError("--topology", f"cannot read {topology!r}", "write v5e:16x16, h100:32 or cpu:8")
    count = math.prod(map(int, shape.split("x")))
    if kind == "cpu":
        return _simulated(count)
    jax.config.update("jax_enable_compilation_cache", False)  # without the device it cannot be read back
    try:
        if kind not in GPUS:
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks the network who it is
            return topologies.get_topology_desc(topology, "tpu").devices
        # Both would try kernels on a GPU to choose among them.
        alone = " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + alone
        hosts = f"1x{count // HOST}x{HOST}" if count % HOST == 0 else f"1x1x{count}"
        return topologies.get_topology_desc("", "cuda", target_config=GPUS[kind], topology=hosts).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        package = "a jax[cuda12] of this jax" if kind in GPUS else "libtpu"
        problem = f"no compiler for {topology} ({str(error).splitlines()[0]})"
        raise InputError("--topology", problem, f"pip install {package}, or use cpu:{count}") from error


def _simulated(count: int) -> Sequence[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has begun already
        pass
    if len(found := jax.devices("cpu")) < count:
        raise InputError("--topology", f"cpu:{count} where {len(found)} run", f"use cpu:{len(found)}")
    return found[:count]


def compile_stage(stage: Stage, options: FitOptions, mesh: Mesh) -> dict[str, Any]:
    """One row of the table, see the module; raises what `fit` would."""
    state = jax.eval_shape(lambda: begin(options, stage.init(jax.random.key(0))))
    placed = meshes.shardings(state, mesh, stage.rules)
    batch = stage.batch(0, state.params)
    step, *_ = compiled_step(stage, options, mesh, placed, batch)
    traced = step.trace(state, *shapes_of((stage.frozen, batch)))
    row = {"stage": stage.name, "parameters": sum(x.size for x in jax.tree.leaves(state.params))}
    row |= {"batch": len(jax.tree.leaves(batch)[0])} | costs(traced.lower())
    if not row["flops"]:
        row["flops"] = counted_flops(traced) / mesh.size
    return row


def costs(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """Bytes, FLOPs (0 where the compiler counts none) and collectives per device of a program, compiled."""
    compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "flops": float(cost.get("flops", 0)),
        "collectives": len(COLLECTIVE.findall(compiled.as_text())),
    }


def shapes_of(tree: PyTree) -> PyTree:
    """ShapeDtypeStructs of a tree of arrays, NumPy's or shapes already."""
    return jax.eval_shape(lambda t: t, tree)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| stage | parameters | batch | arguments | temporaries | outputs | GFLOPs | collectives |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        sizes = " | ".join(
            f"{row[n + '_bytes'] / 2**20:.1f} MiB" for n in ("argument", "temporary", "output")
        )
        about = f"{row['stage']} | {row['parameters'] / 1e6:.2f} M | {row['batch']}"
        lines.append(f"| {about} | {sizes} | {row['flops'] / 1e9:.2f} | {row['collectives']} |")
    return "\n".join(lines)


def main(config: ConfigDict, topology: str, only: str, output: str) -> None:
    """Every stage of `config` whose name `only` is found in, one after the other."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs elsewhere
    mesh = meshes.make_mesh(**config.mesh, devices=devices_of(topology))
    (check_fanout if "fanout" in config else check)(config)
    run = abstract_fanout_run(config) if "fanout" in config else abstract_run(config, mesh=mesh)
    stages = {stage.name: stage for stage in run.stages()}
    found = [stages[name] for name in matching("--only", only, stages, "stage")]
    kind, shape = mesh.devices.flat[0].device_kind, dict(mesh.shape)
    print(f"{mesh.size} x {kind}, mesh {' x '.join(f'{n} {size}' for n, size in shape.items())}", flush=True)
    rows = []
    for stage in found:
        print(f"{stage.name} ...", flush=True)
        rows.append(compile_stage(stage, run.options(stage.name), mesh))
    print(f"\n{table(rows)}\n\nper device, {topology}")
    if output:
        about = {"topology": topology, "device": kind, "mesh": shape, "jax": version("jax")}
        about |= {"config": json.loads(config.to_json_best_effort()), "rows": rows}
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(output), json.dumps(about, indent=1))


if __name__ == "__main__":
    launch(
        main,
        workdir=None,
        alone=True,
        topology=("cpu:8", "v5e:16x16, h100:32 or cpu:8."),
        only=("", "Stages whose name holds this pattern."),
        output=("", "Write the table into this JSON file."),
    )
