"""That memory which a program frees stays, and who decides it."""

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource
from genret.training.memory import keep_freed_memory
kept = keep_freed_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=0)[::7].sum())  # a temporary of 64 MB
x = jnp.arange(4_000.0)
for _ in range(3):
    f(x).block_until_ready()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    f(x).block_until_ready()
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) // 4)
"""


def faults(**environment):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_program_does_not_fault_its_temporaries_in_again():
    kept, few = faults()
    told, many = faults(MALLOC_TRIM_THRESHOLD_="131072")  # who says how to allocate is not overruled
    assert (kept, told) == (True, False)
    assert few < 200 and many > 10_000  # pages of 4 KiB a call
