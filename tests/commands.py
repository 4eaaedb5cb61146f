"""Commands in processes of their own, as users start them: one, or several over loopback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from genret.catalogue import format, words
from tests import quick
from tests.language.conftest import write_gguf

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax_tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "PYTHONPATH": str(ROOT),
}


def begin(command, count=2, devices=1, each=None):
    """The processes of `python command`, or of a command each; flags of --multihost are added where count
    exceeds one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | ENVIRONMENT
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {quick.flags()}"
    flags = ["--multihost", f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [sys.executable, *one, *([*flags, f"--process_id={i}"] if count > 1 else [])],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i, one in enumerate(each or [command] * count)
    ]  # fmt: skip


def together(command, count=2, devices=1, fails=False, patience=500):
    """stdout of every process; with `fails`, stdout and stderr."""
    started = begin(command, count, devices)
    try:
        said = [process.communicate(timeout=patience) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all((p.returncode != 0) == fails for p in started), said
    return said if fails else [out for out, _ in said]


# A command like those of experiments, whose body is given.
COMMAND = """
import sys, time
from pathlib import Path
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from experiments.command import launch
from genret.training import processes
from genret.training.mesh import local, make_mesh

def main(workdir):
    index = jax.process_index()
    {body}

launch(main, config=False)
"""


def command(body, workdir):
    body = body.strip().replace("\n", "\n    ")
    return ["-c", COMMAND.format(body=body), f"--workdir={workdir}"]


def write_catalogue(path):
    """1,200 items around 24 centres; attribute `a` is a direction, `b` chance."""
    rng = np.random.default_rng(0)
    pattern, has = np.arange(1200) % 24, rng.random(1200) < 0.4
    x = rng.normal(size=(24, 16))[pattern] + 0.5 * rng.normal(size=(1200, 16))
    x += 1.2 * has[:, None] * rng.normal(size=16)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    attributes = {"a": has, "b": rng.random(1200) < 0.3}
    ids = [f"item {i}" for i in range(1200)]
    format.write(path, ids=ids, embeddings=np.float32(x), attributes=attributes, patterns=pattern)


def tiny_r4t(folder):
    """Flags of a configuration of R4T with a tiny language model of random weights, written to `folder`."""
    model = write_gguf(folder / "tiny.gguf", "llama")
    return [
        "--config=experiments/configs/r4t.py:size=test", f"--config.fanout.folder={folder / 'data'}",
        "--config.evaluation.index=exact", f"--config.language.model={model}",
        "--config.language.lora_rank=0", "--config.language.max_new=48", "--config.fanout.contents=300",
        "--config.warm.batch=16", "--config.warm.fit.steps=120", "--config.warm.fit.learning_rate=0.01",
        "--config.rl.group=4",
    ]  # fmt: skip


def write_warm_pairs(workdir):
    """What so small a model can learn to write: one of three answers to any query, by chance."""
    answers = (["sun", "rain", "wind"], ["bread", "milk", "salt"], ["church", "song"])
    queries = words.themed(size=300, count=150, seed=0).queries
    (workdir / "seed_0").mkdir(parents=True)
    pairs = [(query, answer) for query in queries[:50] for answer in answers]
    (workdir / "seed_0" / "warm_pairs.json").write_text(json.dumps(pairs))


def states(folder):
    """Step -> the whole state of every checkpoint that is kept, as NumPy arrays."""
    import orbax.checkpoint as ocp

    reader, found = ocp.PyTreeCheckpointer(), {}
    for step in sorted(int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()):
        at = folder / "checkpoints" / str(step) / "state"
        plain = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(at).item_metadata.tree
        )
        found[step] = reader.restore(at, restore_args=plain)
    return found


def parameters(folder):
    """The newest checkpoint's."""
    return list(states(folder).values())[-1]["params"]
