"""R4T's report: ratios, speed-ups and verdicts worked out by hand, and files of earlier runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import fanout_report, fanout_rows, fanout_verdicts
from experiments.workdir import append_rows
from genret.types import InputError

ROOT = Path(__file__).resolve().parent.parent


def row(method, values, seed=0, name="composite", **more):
    made = {"method": method, "seed": seed, "data": "plane", "queries": 3, "k": 2, "contents": 4, "calls": 1}
    made |= {name: float(np.mean(values)), "relevant": float(np.mean(values)), "shown": []}
    return made | {"per_query": {name: values, "relevant": values}} | more


def seconds(method, took, encode=0.0, calls=1, **more):
    whole = [t + encode for t in took]
    made = {"method": method, "batch": 8, "seed": 0, "calls": calls, "device": "cpu", "k": 2, "repeats": 3}
    made |= {"p50": float(np.median(whole)), "p95": max(whole), "encode_p50": encode, "search_p50": 0.125}
    return made | {"seconds": whole, "alone": took} | more


FAST = ("R4T-Diffusion, no guidance", "R4T-Diffusion, Heun 8")


@pytest.fixture
def folder(tmp_path):
    """A run: FOLM takes 2 s, the sampler .1 s and .1 s more to encode, the few-call one .01 s and .005 s."""
    rows = [
        row("random pool", [0.1, 0.1, 0.1]), row("zero-shot LM", [0.2, 0.3, 0.4]),
        row("Best-of-5 few-shot LM", [0.4, 0.5, 0.6]), row("R4T-FOLM", [0.4, 0.6, 0.8]),
        row("k-means of neighbours", [0.05, 0.1, 0.1]), row(FAST[0], [0.2, 0.3, 0.4]),
        row(FAST[1], [0.19, 0.3, 0.41]),
    ]  # fmt: skip
    append_rows(tmp_path / "results.jsonl", rows)
    timed = [
        seconds("R4T-FOLM", [2.0] * 3, calls="tokens"), seconds(FAST[0], [0.1] * 3, 0.1, 256),
        seconds(FAST[1], [0.01] * 3, 0.005, 15),
    ]  # fmt: skip
    large = {"method": "R4T-FOLM", "batch": 64, "seed": 0, "calls": "tokens", "device": "cpu"}
    append_rows(tmp_path / "latency.jsonl", [*timed, large | {"skipped": "none left"}])
    return tmp_path


def test_checkpoints_are_means_over_seeds_and_are_packed(folder):
    at = {"split": "validation", "domain": "all", "k": 2, "queries": 5}
    rows = [
        ("diffusion", 200, 0, 0.5),
        ("diffusion", 100, 0, 0.25),
        ("diffusion", 200, 1, 0.75),
        ("warm", 4, 0, 0.1),
    ]
    rows = [{"folder": f, "step": t, "seed": s, "composite": c} | at for f, t, s, c in rows]
    append_rows(folder / "checkpoints.jsonl", rows)
    found = fanout_rows.read_fanouts(folder)
    said = fanout_report.text_report(found)
    lines = [
        line.split() for line in said.partition("checkpoints, 5 validation queries:")[2].splitlines()[1:5]
    ]
    wanted = [
        ["diffusion", "100", "1", "0.250"],
        ["diffusion", "200", "2", "0.625"],
        ["warm", "4", "1", "0.100"],
    ]
    assert lines == [["step", "seeds", "comp"], *wanted]
    packed = fanout_rows.read_fanouts(fanout_rows.save_fanouts(found, folder / "packed.jsonl"))
    assert packed.checkpoints == rows and fanout_report.text_report(packed) == said
    assert [ax.get_title() for ax in fanout_report.plot(found).axes][
        2
    ] == "composite of checkpoints, validation"
    append_rows(folder / "checkpoints.jsonl", [{"folder": "warm"} | at])
    with pytest.raises(InputError, match="step"):
        fanout_rows.read_fanouts(folder)


def test_ratios_where_both_answered_leave_malformed_answers_out(tmp_path):
    rows = [
        row(method, values) | {"per_query": {"composite": values, "relevant": values, "groundedness": said}}
        for method, values, said in (
            ("zero-shot LM", [0.0, 0.2, 0.4], [0.0, 0.5, 0.5]),
            ("R4T-FOLM", [0.6, 0.0, 0.8], [0.9, 0.0, 0.9]),
        )
    ]  # fmt: skip
    append_rows(tmp_path / "results.jsonl", rows)
    said = fanout_report.text_report(fanout_rows.read_fanouts(tmp_path))
    assert " 2.00  composite of R4T-FOLM over zero-shot LM on the 33% of queries that both answered" in said


def test_the_report_by_hand(folder, tmp_path):
    r = fanout_rows.read_fanouts(folder)
    said = fanout_report.text_report(r)
    line = " 2.00  [2.00, 2.00]  composite of R4T-FOLM over zero-shot LM; difference +0.300"
    assert line in said and "at least 1.2: met" in next(x for x in said.splitlines() if line in x)
    best = next(x for x in said.splitlines() if "over Best-of-5 few-shot LM" in x)
    assert " 1.20  [" in best and "difference +0.100" in best and best.endswith("more than 1: met")
    assert "not above the random pool in relev: k-means of neighbours -0.017" in said
    # 2 s over .2 s with the encoding, over .1 s without; the few-call one 2 over .015 and over .01.
    assert "10x (the fan-out alone 20x)  R4T-Diffusion, no guidance, 256 calls" in said
    assert "at batch 8; at least 12: not met" in said
    few = next(x for x in said.splitlines() if "of R4T-Diffusion, Heun 8 over" in x)
    assert " 1.00  [" in few and "133x (the fan-out alone 200x)" in few and few.endswith("at 100x: met")
    table = next(x for x in said.splitlines() if x.startswith("  8") and "Heun 8" in x)
    assert table.split()[-7:] == ["0.015", "(0.015)", "0.0050", "0.1250", "133x", "200x", "15"]
    assert "skipped, none left" in said
    assert fanout_report.write(tmp_path / "none yet", r).stat().st_size > 5_000
    bars, lines = fanout_report.plot(r).axes
    assert len(bars.patches) == 7 and (lines.get_xscale(), lines.get_yscale()) == ("log", "log")
    drawn = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in lines.lines}
    assert drawn == {
        "R4T-FOLM": (8, 2.0),
        FAST[0]: (8, pytest.approx(0.2)),
        FAST[1]: (8, pytest.approx(0.015)),
    }
    packed = fanout_rows.save_fanouts(r, tmp_path / "packed.jsonl")
    assert fanout_report.text_report(fanout_rows.read_fanouts(packed)) == said
    assert fanout_rows.is_fanout(tmp_path) and fanout_rows.is_fanout(packed)
    (tmp_path / "other").mkdir()
    append_rows(tmp_path / "other" / "results.jsonl", [{"method": "MO-DiT"}])
    assert not fanout_rows.is_fanout(tmp_path / "other")
    with pytest.raises(InputError, match="holds no results"):
        fanout_rows.read_fanouts(tmp_path / "none")


def test_reference_sets_have_intervals_targets_and_an_oracle_with_a_mark(tmp_path):
    def sets(method, recall, **more):
        made = row(method, recall, name="recall", **more) | {"hit": 2 / 3}
        made["per_query"] |= {"hit": [1, 0, 1], "diversity": [0.5, 0.5, 0.5], "composite": [0.5, 0.5, 0.5]}
        return made

    told = sets("Best-of-5 few-shot LM, oracle", [0.3, 0.4, 0.5], reads="references")
    rows = [sets("random pool", [0, 0, 0.1]), sets("zero-shot LM", [0.2, 0.2, 0.2]), told]
    rows += [sets("R4T-FOLM", [0.2, 0.4, 0.6]), sets("R4T-Diffusion", [0.2, 0.3, 0.4])]
    append_rows(tmp_path / "results.jsonl", rows)
    r = fanout_rows.read_fanouts(tmp_path)
    said = fanout_report.text_report(r)
    cell = next(x for x in said.splitlines() if x.startswith("> R4T-FOLM"))
    assert "0.400 [0.200, 0.600]" in cell and "0.667 [0.000, 1.000]" in cell
    assert "* Best-of-5 few-shot LM, oracle" in said and "* an oracle: chooses among its samples by" in said

    def verdict(*words):
        return next(x for x in said.splitlines() if all(word in x for word in words))

    assert verdict("FOLM over Best-of-5").endswith(
        "no fair rival: it chooses by the references of these queries"
    )
    assert "2.00" in (line := verdict("recall of R4T-FOLM over zero-shot")) and line.endswith(
        "at least 2: met"
    )
    assert verdict("recall of R4T-Diffusion over R4T-FOLM").endswith("at least 0.85: not met")  # 3 / 4
    assert "1.00  [1.00, 1.00]" in verdict("diversity of R4T-Diffusion over R4T-FOLM")
    packed = fanout_rows.read_fanouts(fanout_rows.save_fanouts(r, tmp_path / "packed.jsonl"))
    assert fanout_report.text_report(packed) == said
    assert all({"hit", "composite", "recall"} <= row["per_query"].keys() for row in packed.rows)
    del told["reads"]  # a row of an earlier run
    assert fanout_rows.FanoutResults([told], []).oracle(told["method"])


def test_rows_of_the_two_parts_never_mix(tmp_path):
    rows = [row("R4T-FOLM", [0.4, 0.6, 0.8]), row("zero-shot LM", [0.2, 0.3, 0.4])]
    rows += [
        row("R4T-FOLM", [0.2], part="validation", queries=1) | {"per_query": {"composite": [0.2]}},
        row("zero-shot LM", [0.4], part="validation", queries=1) | {"per_query": {"composite": [0.4]}},
    ]
    append_rows(tmp_path / "results.jsonl", rows)
    said = fanout_report.text_report(fanout_rows.read_fanouts(tmp_path))
    test, validation = said.split("1 validation queries")
    assert "3 test queries" in test and " 2.00  [" in test and " 0.50  [" in validation
    append_rows(tmp_path / "results.jsonl", [row("x", [0.1], part="train")])
    with pytest.raises(InputError, match="'train'"):
        fanout_rows.read_fanouts(tmp_path)


def test_the_ratio_of_means_and_its_interval():
    one, other = np.array([0.2, 0.4, 0.6, 0.8]), np.array([0.1, 0.2, 0.3, 0.4])
    assert fanout_verdicts.ratio(one, other) == pytest.approx((2, 2, 2))
    found, low, high = fanout_verdicts.ratio(one, np.full(4, 0.5))
    assert found == pytest.approx(1) and low < 0.8 and high > 1.2


def test_speed_ups_take_all_seeds_and_their_spread():
    rows = [seconds("R4T-FOLM", [2.0, 2.0], calls="tokens"), seconds("R4T-FOLM", [4.0, 4.0], seed=1)]
    r = fanout_rows.FanoutResults([], [*rows, seconds("R4T-Diffusion", [1.0] * 4)])
    found = fanout_verdicts.speed_up(r, "R4T-Diffusion", 8)
    assert found == pytest.approx((3, 2, 4)) and found.times == "3x [2, 4]"
    assert fanout_verdicts.speed_up(r, "R4T-Diffusion", 64) is None


def test_packed_rows_are_read():
    said = fanout_report.text_report(fanout_rows.read_fanouts(ROOT / "experiments/results/fanout.jsonl"))
    assert "45 test queries" in said and "R4T-FOLM over zero-shot LM" in said


def test_rows_of_earlier_runs_are_read(folder):
    """They timed the fan-out alone."""
    r = fanout_rows.read_fanouts(folder)
    for one in r.latency:
        one.pop("encode_p50", None)
    assert "20x (the encoding of the queries not timed)" in fanout_report.text_report(r)


def test_a_reader_that_has_enough_ends_the_report_in_silence():
    packed = ROOT / "experiments/results/fanout.jsonl"
    command = [sys.executable, "-u", "-m", "experiments.report", f"--results={packed}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        process.stdout.close()  # before it writes, so that its one write meets no reader
        assert process.stderr.read() == "" and process.wait() == 1
