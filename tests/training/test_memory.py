"""That memory which a step frees stays for the next one: of small steps, until training ends."""

import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest

from genret.training import memory

CODE = """
import resource, time
from genret.training import memory
assert memory.one_heap()
import jax, jax.numpy as jnp
memory.MOST = {most}
step = jax.jit(lambda x: jnp.sin(jnp.outer(x, x)) @ x)  # a temporary of 100 MB
x = jnp.arange(5_000.0)
def resident():
    return int(open("/proc/self/statm").read().split()[1])
def count(calls, look=lambda out: None):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        out = step(x)
        out.block_until_ready()
        look(out)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // calls
with memory.kept() as look:
    count(20, look)  # a heap may take some steps until it has holes enough
    inside = count(8)
    time.sleep(0.5)  # a step's memory is freed a moment after its result is there
    held = resident()
print(inside, held - resident())
"""


def pages(most):
    """Faults of a step while memory is kept, and pages that go back to the system at its end."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "MALLOC_"))}
    code = [sys.executable, "-c", CODE.format(most=most)]
    done = subprocess.run(code, env=env, capture_output=True, text=True, check=True)
    return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_step_does_not_fault_its_temporaries_in_again():
    inside, given = pages(most=200 << 20)
    assert inside < 2_000 and given > 20_000  # of 24,414
    inside, _ = pages(most=50 << 20)  # more than may be kept
    assert inside > 24_000


def test_who_says_how_to_allocate_is_not_overruled(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.setenv(name, "")
        assert not memory.one_heap()
        monkeypatch.delenv(name)


def test_the_most_memory_held_is_said():
    """One GiB, and freed again; and of this process, not of the larger one that starts it."""
    code = """
from genret.training import memory
print(memory.peak())
held = bytearray(1 << 30)
del held
print(memory.peak())
"""
    larger = np.ones(3 << 26)  # 1.5 GiB
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del larger
    before, after = (float(x) for x in re.findall(r"peak host memory ([0-9.]+) GiB", done.stdout))
    assert 0 < before < 1 < after <= 1 + before
