"""Launch scripts print what they would run, and a sweep prints its grid."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments.configs import modit, sweep
from experiments.sweep import commands
from genret.training import processes
from genret.types import InputError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "experiments/configs/modit.py:size=demo,seeds=0+1"
OVERRIDE = "--config.hppo.pairs.filter=(a, $HOME 'b')"
ASKED = [f"--config={CONFIG}", "--workdir=/shared/runs/x"]
STEPS = [
    ["python", "-m", "experiments.run", "--multihost", *ASKED, OVERRIDE],
    ["python", "-m", "experiments.evaluate", "--multihost", *ASKED, OVERRIDE],
    ["python", "-m", "experiments.report", "--workdir=/shared/runs/x"],
]


def dry(script, *arguments, **variables):
    """Lines that a script prints under DRY_RUN=1, with no command of a cluster on its path."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "DRY_RUN": "1"} | variables
    done = subprocess.run(
        [ROOT / "launch" / script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("script, prefix", [("local.sh", []), ("slurm.sh", ["srun", "--kill-on-bad-exit=1"])])
def test_local_and_slurm_run_the_three_commands(script, prefix):
    found = [shlex.split(line) for line in dry(script, CONFIG, "/shared/runs/x", OVERRIDE)]
    together = bool(prefix)
    wanted = [[w for w in step if together or w != "--multihost"] for step in STEPS]
    assert found == [prefix + wanted[0], prefix + wanted[1], wanted[2]]


def test_a_tpu_pod_runs_the_same_on_all_workers_and_reports_on_one():
    place = dict(TPU="pod", ZONE="zone-b", CHECKOUT="/mnt/a b")
    lines = [shlex.split(x) for x in dry("tpu_pod.sh", CONFIG, "/shared/runs/x", OVERRIDE, **place)]
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone-b"]
    assert [line[:7] for line in lines] == [ssh] * 4
    assert [line[7] for line in lines] == [f"--worker={w}" for w in ("0", "all", "all", "0")]
    said = [shlex.split(line[8].removeprefix("--command=")) for line in lines]
    where = ["cd", "/mnt/a b", "&&", "GENRET_PREEMPTED=75", "PATH=$PWD/.venv/bin:$PATH"]
    assert [s[:5] for s in said] == [where] * 4 and [s[5:] for s in said[1:]] == STEPS
    install = '. launch/environment.sh "$@"'
    assert said[0][5:] == ["bash", "-euc", install, "install", CONFIG, "tpu"]


def test_kubernetes_gets_an_indexed_job_of_the_same_command():
    yaml = pytest.importorskip("yaml")
    place = dict(NAME="three", PODS="4", IMAGE="registry/genret:1", CLAIM="disk")
    more = dict(RESOURCE="google.com/tpu=4", SELECTOR="cloud.google.com/gke-tpu-topology=2x4,pool=a")
    lines = dry("gke.sh", CONFIG, "/shared/runs/x", OVERRIDE, **place, **more)
    remove = "kubectl delete job three --ignore-not-found"  # or `apply` would leave a finished one as it is
    assert lines[:2] == [remove, "kubectl apply -f - << 'EOF'"] and lines[-1] == "EOF"
    service, job = yaml.safe_load_all("\n".join(lines[2:-1]))
    assert service["kind"] == "Service" and service["spec"]["selector"] == {"job-name": "three"}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"] == "three"
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-topology": "2x4", "pool": "a"}
    box = pod["containers"][0]
    assert box["image"] == "registry/genret:1" and box["resources"]["limits"] == {"google.com/tpu": "4"}
    found = [shlex.split(line, comments=True) for line in box["args"][0].splitlines()[5:]]
    me = ["--coordinator=three-0.three:8476", "--num_processes=4", "--process_id=$JOB_COMPLETION_INDEX"]
    for line, step in zip(found[:2], STEPS, strict=False):
        assert line == ["on", *step[:4], *me, *step[4:]]
    assert found[2] == ["[", "$JOB_COMPLETION_INDEX", "!=", "0", "]", "||", "on", *STEPS[2]]
    rules = spec["podFailurePolicy"]["rules"]
    assert rules[1] == {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [processes.AGAIN]}}


@pytest.mark.parametrize("ends", ["in time", "by SIGTERM", "in an error"])
def test_in_a_pod_sigterm_reaches_the_command_and_nothing_comes_after(tmp_path, ends):
    (python := tmp_path / "python").write_text(
        """#!/usr/bin/env bash
        trap 'sleep .3; echo saved; exit 0' TERM
        echo "$2 begins"
        [ "$ENDS" != "in an error" ] || exit 3
        [ "$ENDS" != "by SIGTERM" ] || while :; do sleep .05; done
        """
    )
    python.chmod(0o755)
    yaml = pytest.importorskip("yaml")
    place = dict(NAME="three", PODS="4", IMAGE="x", CLAIM="disk")
    lines = dry("gke.sh", CONFIG, "/shared/runs/x", **place)
    _, job = yaml.safe_load_all("\n".join(lines[2:-1]))
    box = job["spec"]["template"]["spec"]["containers"][0]
    there = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "0", "ENDS": ends}
    with subprocess.Popen(
        [*box["command"], *box["args"]], env=os.environ | there, stdout=subprocess.PIPE, text=True
    ) as process:
        said = [process.stdout.readline()]
        if ends == "by SIGTERM":
            process.terminate()
        said = "".join(said) + process.stdout.read()
    begins = [f"experiments.{name} begins\n" for name in ("run", "evaluate", "report")]
    wanted = {"in time": "".join(begins), "by SIGTERM": f"{begins[0]}saved\n", "in an error": begins[0]}
    assert (said, process.returncode) == (
        wanted[ends],
        {"in time": 0, "by SIGTERM": 1, "in an error": 3}[ends],
    )


def test_what_a_script_misses_is_said():
    for script, said in (("local.sh", "launch/local.sh"), ("tpu_pod.sh", "TPU=NAME"), ("gke.sh", "PODS=4")):
        done = subprocess.run([ROOT / "launch" / script], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr


def test_shellcheck_has_nothing_to_say():
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    done = subprocess.run([program, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout


def test_a_sweep_is_one_line_a_point_and_every_line_is_a_configuration():
    config = sweep.get_config()
    lines = [shlex.split(line) for line in commands(config, Path("runs"))]
    assert len(lines) == 2 * 3 * 2 == len({line[2] for line in lines})
    assert lines[1] == [
        "launch/local.sh", "experiments/configs/modit.py:size=demo,seeds=0",
        "runs/modit_seeds=0_margin=1_contexts=1024",
        "--config.hppo.pairs.margin=1", "--config.hppo.contexts=1024",
    ]  # fmt: skip
    for line in lines:
        one = modit.get_config(line[1].partition(":")[2])
        for override in line[3:]:
            leaf, _, value = override.removeprefix("--config.").partition("=")
            one.update_from_flattened_dict({leaf: json.loads(value)})
    for grid, problem in (
        ((("seeds", ()),), "^grid: seeds has no values"),
        ((("seeds", (1,)), ("seeds", (2,))), "^grid: seeds is an axis twice"),
        ((("data", ("a/b", "a b")),), "^grid: two points are called modit_data=a-b"),
    ):
        with pytest.raises(InputError, match=problem):
            commands(ConfigDict(config.to_dict() | {"grid": grid}), Path("runs"))
    with pytest.raises(InputError, match="^launcher: .*No closing quotation"):
        commands(ConfigDict(config.to_dict() | {"launcher": "it's"}), Path("runs"))
    found = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", "--config=experiments/configs/sweep.py", "--workdir=/a"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.splitlines() == commands(config, Path("/a")), found.stderr
