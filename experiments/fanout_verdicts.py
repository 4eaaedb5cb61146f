"""What the rows of an R4T run prove: each figure with its interval, beside what is asked of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.fanout_rows import COLUMNS, FanoutResults
from experiments.fanouts import AS_DRAWN, DIFFUSION, FOLM, OF_TWO, RANDOM, UNGUIDED
from genret.retrieval.significance import paired_test

BATCH = 8  # queries at once where speeds are compared
FASTER, QUALITY, AT = 12, 0.99, 100  # the full sampler's speed-up; a few-call one's quality and speed-up

# Open-ended rows beside chance: the composite pays .6 for being in the pool, alignment x Vendi nothing.
CHANCE = ("composite", "relevant")


class Ratio(NamedTuple):
    """A ratio and its 95 % percentile interval; low is high where there is nothing to draw again."""

    value: float
    low: float
    high: float

    @property
    def times(self) -> str:
        return f"{self.value:.3g}x" + (f" [{self.low:.3g}, {self.high:.3g}]" if self.low < self.high else "")


def ratio(one: np.ndarray, other: np.ndarray, seed: int = 0) -> Ratio:
    """mean(one) / mean(other), queries drawn again in pairs."""
    at = np.random.default_rng(seed).integers(len(one), size=(2_000, len(one)))
    drawn = one[at].mean(1) / np.maximum(other[at].mean(1), 1e-9)
    return Ratio(float(one.mean() / max(other.mean(), 1e-9)), *map(float, np.quantile(drawn, (0.025, 0.975))))


def speed_up(r: FanoutResults, method: str, batch: int, alone: bool = False) -> Ratio | None:
    """How many times as fast as FOLM: its median over the method's, the repeats of all seeds drawn again by
    themselves. alone: without the encoding of the queries. None where either was not timed."""
    rng, medians = np.random.default_rng(0), []
    for name in (FOLM, method):
        rows = timed(r, name, batch)
        if not rows or not (alone or name == FOLM or all("encode_p50" in row for row in rows)):
            return None
        key = "alone" if alone else "seconds"
        took = np.concatenate([row.get(key) or [row["p50"]] for row in rows])
        medians.append(np.append(np.median(rng.choice(took, (2_000, len(took))), axis=1), np.median(took)))
    found = medians[0] / np.maximum(medians[1], 1e-9)
    return Ratio(float(found[-1]), *map(float, np.quantile(found[:-1], (0.025, 0.975))))


def timed(r: FanoutResults, method: str, batch: int) -> list[dict]:
    """The latency rows of a method at one batch size, one per seed; those that did not fit are left out."""
    return [
        row for row in r.latency
        if (row["method"], row["batch"]) == (method, batch) and not row.get("skipped")
    ]  # fmt: skip


def verdicts(r: FanoutResults) -> str:
    """Ratios and differences that the paper reports, of those methods that were evaluated."""
    above = [line for name in (("recall",) if r.main == "recall" else CHANCE) for line in _chance(r, name)]
    found = [*_language(r), *_diffusion(r), *_where_answered(r), *_speeds(r), *above]
    head = (
        "ratios over queries, seeds averaged, with 95 % intervals; what is asked for, and whether it is met"
    )
    return "\n".join([head, *found]) if found else ""


def _language(r: FanoutResults) -> list[str]:
    best = next((m for m in r.methods if m.startswith("Best-of-")), None)
    lines = [_compared(r, FOLM, "zero-shot LM", r.main, 2.0 if r.main == "recall" else 1.2)]
    lines.append(_compared(r, FOLM, "few-shot LM", r.main))
    if best and r.oracle(best):
        said = _compared(r, FOLM, best, r.main)
        lines.append(said and f"{said}; no fair rival: it chooses by the references of these queries")
    else:
        lines.append(_compared(r, FOLM, best, r.main, 1.0))
    return list(filter(None, [*lines, _compared(r, FOLM, "warm-started LM", r.main)]))


def _diffusion(r: FanoutResults) -> list[str]:
    """What the samplers keep of the tuned model."""
    asked = {"groundedness": 0.95, "diversity": 0.97, "alignment": 0.95}
    if r.main == "recall":
        asked = {"recall": 0.85} | dict.fromkeys(asked)
    samplers = [DIFFUSION, *(m for m in r.methods if m.startswith(f"{DIFFUSION}, "))]
    lines = [
        _compared(r, method, FOLM, name, least if method == DIFFUSION else None)
        for method in samplers
        for name, least in asked.items()
    ]
    lines += [_compared(r, DIFFUSION, OF_TWO, name) for name in asked]  # both with a choice
    return list(filter(None, lines))


def _where_answered(r: FanoutResults) -> list[str]:
    """The same where both have an answer: a malformed one counts as zero, and no diffusion has any."""
    pairs, lines = [(FOLM, "zero-shot LM", r.main)], []
    pairs += [(DIFFUSION, FOLM, name) for name in ("groundedness", "diversity", "alignment")]
    for one, other, name in pairs:
        if not all(r.has(m, n) for m in (one, other) for n in (name, "groundedness")):
            continue
        both = np.all([r.each(m, "groundedness") > 0 for m in (one, other)], axis=0)
        if both.any() and not both.all():
            kept = r.each(one, name)[both].mean() / max(r.each(other, name)[both].mean(), 1e-9)
            where = f"on the {both.mean():.0%} of queries that both answered"
            lines.append(f"  {kept:5.2f}  {name} of {one} over {other} {where}")
    return lines


def _speeds(r: FanoutResults) -> list[str]:
    """The full sampler against FOLM, then the few-call ones: what they keep of it, and how fast."""
    lines, where = [], f"{FOLM} at batch {BATCH}"
    for method in (DIFFUSION, UNGUIDED, AS_DRAWN):
        if fast := _faster(r, method):
            calls = timed(r, method, BATCH)[0]["calls"]
            target = _target(fast[0].value, FASTER) if method == UNGUIDED else ""
            lines.append(f"  {fast[1]}  {method}, {calls} calls, as fast as {where}{target}")
    few = (m for m in r.methods if m.startswith(f"{DIFFUSION}, ") and m not in (UNGUIDED, AS_DRAWN))
    for method in few:
        said, fast = _compared(r, method, UNGUIDED, r.main), _faster(r, method)
        if said and fast:
            kept = ratio(r.per_query(method, r.main), r.per_query(UNGUIDED, r.main)).value
            met = "met" if kept >= QUALITY and fast[0].value >= AT else "not met"
            said += f"; {fast[1]} as fast as {where}; at least {QUALITY} at {AT}x: {met}"
        lines.append(said)
    return list(filter(None, lines))


def _faster(r: FanoutResults, method: str) -> tuple[Ratio, str] | None:
    """The speed-up that counts, and both in words."""
    whole, alone = (speed_up(r, method, BATCH, alone) for alone in (False, True))
    if alone is None:
        return None
    if whole is None:  # of an earlier run
        return alone, f"{alone.times} (the encoding of the queries not timed)"
    return whole, f"{whole.times} (the fan-out alone {alone.times})"


def _chance(r: FanoutResults, name: str) -> list[str]:
    if RANDOM not in r.methods:
        return []
    chance, lower, close = r.values(RANDOM, name).mean(), [], []
    for method in (m for m in r.methods if m != RANDOM):
        said, gap = method, None
        if r.has(method, name) and r.has(RANDOM, name):
            difference = r.per_query(method, name) - r.per_query(RANDOM, name)
            gap = paired_test(difference, np.arange(len(difference)), resamples=2_000)
            said += f" {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        if r.values(method, name).mean() <= chance:
            lower.append(said)
        elif gap is not None and gap.low <= 0:
            close.append(said)
    met = "not met" if lower else "met"
    line = (
        f"  not above the random pool in {COLUMNS[name]}: {', '.join(lower) or 'none'}; none asked for: {met}"
    )
    return [line + (f"; above by less than its interval: {', '.join(close)}" if close else "")]


def _compared(
    r: FanoutResults, one: str, other: str | None, name: str, least: float | None = None
) -> str | None:
    """One line; None where a method or its metric is missing."""
    if not (r.has(one, name) and r.has(other, name)):
        return None
    a, b = r.per_query(one, name), r.per_query(other, name)
    found, gap = ratio(a, b), paired_test(a - b, np.arange(len(a)))
    times = f"{found.value:5.2f}  [{found.low:.2f}, {found.high:.2f}]" if b.mean() > 0 else "over nothing:"
    said = f"  {times}  {name} of {one} over {other}; "
    said += f"difference {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], p {gap.p:.3f}"
    return said if least is None or b.mean() <= 0 else said + _target(found.value, least)


def _target(value: float, least: float) -> str:
    asked = f"more than {least:g}" if least == 1 else f"at least {least:g}"
    return f"; {asked}: {'met' if value > least or (value == least != 1) else 'not met'}"
