"""A small pipeline of either paper as users start it, in processes of its own, to be hurt from outside."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tests.commands import ENVIRONMENT, ROOT, states, tiny_r4t, write_catalogue, write_warm_pairs

# A cache of its own, that keeps the shortest compilation too: kills shall fall into the work itself.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax_faults"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "OMP_NUM_THREADS": "1",
}


class Pipeline:
    """run, evaluate and report in `folder`/run, of one paper's configuration; more: overrides."""

    COMMANDS = ("run", "evaluate", "report")

    def __init__(self, folder, *more, paper="modit", devices=1):
        self.folder, self.workdir = folder, folder / "run"
        self.environment = os.environ | ENVIRONMENT | CACHE
        several = f"--xla_force_host_platform_device_count={devices}"
        self.environment["XLA_FLAGS"] = several if devices > 1 else ""
        folder.mkdir()
        self.heading, config = {"modit": modit, "r4t": r4t}[paper](folder, self.workdir)
        self.config = [*config, *more]

    def start(self, name, *flags):
        """The command, begun in a process group of its own; what it says goes to `folder`/NAME.log."""
        given = [] if name == "report" else self.config
        with open(self.folder / f"{name}.log", "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"experiments.{name}", *given, f"--workdir={self.workdir}", *flags],
                cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def said(self, name):
        return (self.folder / f"{name}.log").read_text()

    def do(self, name, *flags):
        """The command, to its end; it must end well."""
        assert self.start(name, *flags).wait() == 0, self.said(name)[-3000:]

    def all(self):
        for name in self.COMMANDS:
            self.do(name)

    def until(self, name, text, *flags, patience=300.0):
        """The command, begun, once it has said `text`."""
        process, end = self.start(name, *flags), time.monotonic() + patience
        while text not in self.said(name):
            assert process.poll() is None and time.monotonic() < end, self.said(name)[-3000:]
            time.sleep(0.01)
        return process

    @staticmethod
    def live(process, seconds, end=signal.SIGKILL):
        """The CPU seconds that it took: to its own end, or to `end`, sent to its whole group when they are
        used up. CPU seconds, as on a busy machine those of the clock would all fall into the start."""
        used, at = 0.0, Path(f"/proc/{process.pid}/stat")
        while process.poll() is None:
            times = at.read_text().rpartition(")")[2].split()[11:13]
            used = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
            if used >= seconds:
                os.killpg(process.pid, end)
                process.wait(120)
                return seconds
            time.sleep(0.005)
        return min(used, 0.99 * seconds)

    def equals(self, wanted):
        """The outcome is `wanted`, arrays to the bit."""
        found = self.outcome()
        for part in wanted.keys() - {"parameters"}:
            assert found[part] == wanted[part], part
        one, two = found["parameters"], wanted["parameters"]
        assert {k: list(v) for k, v in one.items()} == {k: list(v) for k, v in two.items()}
        for folder, steps in one.items():
            for step, leaves in steps.items():
                for a, b in zip(leaves, two[folder][step], strict=True):
                    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), (folder, step)

    def outcome(self):
        """All that must not depend on what happened meanwhile: parameters, rows, steps, files, tables."""
        return {
            "parameters": {
                str(path.parent.relative_to(self.workdir)): {
                    step: jax.tree.leaves(state) for step, state in states(path.parent).items()
                }
                for path in sorted(self.workdir.rglob("checkpoints"))
            },
            "rows": (self.workdir / "results.jsonl").read_text().splitlines(),
            "files": {
                path.name: path.read_text()
                for path in (self.workdir / "seed_0").iterdir()
                if path.name in ("trained", "predictor_report.json", "warm_pairs.json")
            },
            "sets": {
                str(path.relative_to(self.workdir)): path.read_bytes()
                for path in sorted(self.workdir.glob("seed_0/synthesis/*/*.npy"))
            },
            "steps": logged(self.workdir),
            "tables": self.table().splitlines()[:-1],
        }

    def table(self):
        """The last report, without the folder that its command names."""
        return self.said("report").rpartition(self.heading)[2].replace(str(self.folder), "")


def modit(folder, _):
    """What its report begins with, and the flags of run and evaluate."""
    write_catalogue(folder / "small.parquet")
    return "small: 1,200", [
        f"--config=experiments/configs/modit.py:size=test,data={folder / 'small.parquet'}",
        "--config.evaluation.index=exact", "--config.labels.predictor.steps=10",
        *(f"--config.stages.{stage}.save_every=2" for stage in ("pretrain", "cpt", "sft")),
        "--config.retrieval.weight=0.0", "--config.hppo.contexts=48",
        "--config.evaluation.reaches=(1.0,)", "--config.evaluation.guidance=(1.0,)",
        "--config.evaluation.memory=((.1,.5),)",
    ]  # fmt: skip


def r4t(folder, workdir):
    """The same, of the other paper."""
    write_warm_pairs(workdir)
    return "words: 300", [
        *tiny_r4t(folder), "--config.warm.fit.save_every=20", "--config.rl.fit.steps=4",
        "--config.rl.fit.save_every=1", "--config.diffusion.fit.save_every=2", "--config.synthesis.shard=2",
        "--config.regressor.save_every=1", "--config.evaluation.latency=()",
    ]  # fmt: skip


def logged(workdir):
    """(step, loss) of every row of every training log."""
    rows = {}
    for path in sorted(workdir.rglob("metrics.jsonl")):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        rows[str(path.parent.relative_to(workdir))] = [(row["step"], row["loss"]) for row in found]
    return rows


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """name, *overrides, paper, devices -> a Pipeline in a folder of its own."""
    return lambda name, *more, **kw: Pipeline(tmp_path_factory.mktemp("faults") / name, *more, **kw)


@pytest.fixture(scope="session")
def measured(pipeline):
    """paper -> the outcome of its pipeline that nothing happened to, and its CPU seconds once compiled."""

    @functools.cache
    def found(paper):
        for name in ("first", "second"):
            whole, began = pipeline(f"{paper}_{name}", paper=paper), os.times()
            whole.all()
        used = [time - before for time, before in zip(os.times(), began, strict=True)]
        return whole.outcome(), used[2] + used[3]

    return found


@pytest.fixture(scope="session")
def undisturbed(measured):
    return measured("modit")
