"""kill -9 at random moments of the whole pipeline: nothing is lost, doubled or changed."""

import collections
import random
import time

import pytest

SEED = 0


@pytest.mark.faults
@pytest.mark.parametrize("paper, most", [("modit", 50), ("r4t", 20)])
def test_kills_change_nothing(pipeline, measured, paper, most):
    """Lives are uniform up to .35 of a pipeline's CPU seconds, so that kills fall everywhere in it; one that
    gets through begins anew in another folder until all kills are spent."""
    wanted, seconds = measured(paper)
    assert bool(wanted["sets"]) == (paper == "r4t")
    rng, kills, runs, starts = random.Random(SEED), [], 0, collections.Counter()
    began, life = time.monotonic(), rng.uniform(0, 0.35 * seconds)
    while len(kills) < most:
        one = pipeline(f"{paper}_killed_{runs}", paper=paper)
        for name in one.COMMANDS:
            while True:
                starts[name] += 1
                process = one.start(name)
                life -= one.live(process, life if len(kills) < most else float("inf"))
                if life > 0 or len(kills) == most:
                    assert process.returncode == 0, one.said(name)[-3000:]
                    break
                kills.append(name)
                said = (one.said(name).splitlines() or ["nothing yet"])[-1][:90]
                print(f"kill {len(kills)}, {time.monotonic() - began:.0f} s, {name}: {said}", flush=True)
                life = rng.uniform(0, 0.35 * seconds)
        one.equals(wanted)
        assert "Traceback" not in "".join(map(one.said, one.COMMANDS))
        runs += 1
        print(f"pipeline {runs} is whole and equal to the bit", flush=True)
    print(
        f"{len(kills)} kills: {dict(collections.Counter(kills))}; starts {dict(starts)}; {runs} pipelines of "
        f"{seconds:.0f} CPU seconds undisturbed; {time.monotonic() - began:.0f} s"
    )
