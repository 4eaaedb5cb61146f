"""kill -9 at random moments of the whole pipeline: nothing is lost, doubled or changed."""

import collections
import random
import subprocess
import time

import pytest

KILLS, SEED = 50, 0


@pytest.mark.faults
def test_fifty_kills_change_nothing(pipeline, undisturbed):
    """Lives are uniform up to .5 of a pipeline, so that kills fall everywhere in it; one that gets through
    begins anew in another folder until all kills are spent."""
    wanted, seconds = undisturbed
    rng, kills, runs, starts = random.Random(SEED), [], 0, collections.Counter()
    began = time.monotonic()
    while len(kills) < KILLS:
        one = pipeline(f"killed_{runs}")
        end = time.monotonic() + rng.uniform(0, 0.5 * seconds)
        for name in one.COMMANDS:
            while True:
                process = one.start(name)
                starts[name] += 1
                try:
                    left = end - time.monotonic() if len(kills) < KILLS else None
                    assert process.wait(left) == 0, one.said(name)[-3000:]
                    break
                except subprocess.TimeoutExpired:
                    one.kill(process)
                    kills.append(name)
                    said = (one.said(name).splitlines() or ["nothing yet"])[-1][:90]
                    print(f"kill {len(kills)}, {time.monotonic() - began:.0f} s, {name}: {said}", flush=True)
                    end = time.monotonic() + rng.uniform(0, 0.5 * seconds)
        one.equals(wanted)
        assert "Traceback" not in "".join(map(one.said, one.COMMANDS))
        runs += 1
        print(f"pipeline {runs} is whole and equal to the bit", flush=True)
    print(
        f"{len(kills)} kills: {dict(collections.Counter(kills))}; starts {dict(starts)}; {runs} pipelines of "
        f"{seconds:.0f} s undisturbed; {time.monotonic() - began:.0f} s"
    )
