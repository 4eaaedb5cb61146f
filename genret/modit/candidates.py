"""HPPO's hybrid candidate pool: queries built from the training cell, and the model's own (papers' A.8).

Whatever reads labels or the cell exists for training cells only; at test time only the model is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from genret.modit import trajectories as tr
from genret.modit.baselines import seed_mean, unit
from genret.modit.density import Labels
from genret.modit.protocol import Contexts
from genret.modit.queries import MoDiT
from genret.modit.stages import TrainingSet
from genret.types import InputError

POLICIES = ("hybrid", "deterministic", "on_policy")
TAIL_SHARES = (0.05, 0.10, 0.20)
SLERP = (0.25, 0.5, 0.75, 1.25)
STEPS = (0.2, 0.4, 0.8)  # of the linear probe and of the predictor's gradient
BEYOND = (0.4, 0.8)  # steering past the tail centroid
FEEDBACK = (0.1, 0.2, 0.4, -0.1, -0.2)  # of relevance feedback from the model's own query; < 0: the wrong way
FEEDBACK_NAME = "feedback"
TEMPER = 0.25  # how far a tempered sample lies from the one-call query towards the sample
GUIDANCE = (-0.5, 0.5, 1.0)  # of the one-call query


@dataclass(frozen=True)
class Pool:
    """Candidates of Q training contexts. queries: unit-norm f32[Q, C, D]; names: C constructions;
    on_policy: bool[C]. The last candidate is the model's one-call query, the reference of the filter."""

    queries: np.ndarray
    names: tuple[str, ...]
    on_policy: np.ndarray


def draw_contexts(
    rng: np.random.Generator, data: TrainingSet, count: int, seeds: int, least_positives: int = 3
) -> Contexts:
    """Training contexts as evaluation asks them: seeds i32[Q, S] that lack the attribute, of a latent cell
    (`pattern`) with at least `least_positives` known positives. `split` is 0 throughout.

    Raises InputError where no cell qualifies.
    """
    members = data.cells.members
    positives = np.stack([(has[members] & (members >= 0)).sum(1) for has in data.has])  # [M, C]
    lacking = (data.tails.low >= 0).sum(2)
    domain, cell = np.nonzero((positives >= least_positives) & (lacking >= min(4, seeds)))
    if not len(cell):
        raise InputError(
            "hppo", f"no latent cell has {least_positives} known positives", "raise the label budget"
        )
    at = rng.integers(0, len(cell), count)
    domain, cell = domain[at].astype(np.int32), cell[at].astype(np.int32)
    items, _ = tr.seeds_and_tail(rng, data.tails, cell, domain, seeds)
    keep = np.arange(seeds) < rng.integers(min(4, seeds), seeds + 1, count)[:, None]
    return Contexts(np.where(keep, items, -1).astype(np.int32), domain, cell, np.zeros(count, np.int32))


def slerp(u: np.ndarray, v: np.ndarray, t: float) -> np.ndarray:
    """The great circle from u to v (unit-norm f32[Q, D]) at t; t > 1 goes past v (Shoemake 1985)."""
    angle = np.arccos(np.clip((u * v).sum(-1, keepdims=True), -1, 1))
    # Where u and v all but agree the angle is lost to rounding, and the arc is the chord.
    chord, sine = angle < 1e-3, np.maximum(np.sin(angle), 1e-6)
    a = np.where(chord, 1 - t, np.sin((1 - t) * angle) / sine)
    b = np.where(chord, t, np.sin(t * angle) / sine)
    return unit(a * u + b * v)


def deterministic(
    data: TrainingSet, labels: Labels, normals: np.ndarray, gradient: Callable, contexts: Contexts
) -> tuple[np.ndarray, list[str]]:
    """(f32[Q, C, D], names): seed centroid and medoid, tail centroids, SLERPs, Rocchio, steering, predictor
    steps, the tail with steering, and the centroid of the known positives."""
    x, domain = data.embeddings, contexts.domain
    members = data.cells.members[contexts.pattern]
    free = (members >= 0) & ~(members[:, :, None] == contexts.seeds[:, None]).any(-1)
    ordered = tr.sort_by_density(np.where(free, members, -1), data.density, domain)
    rows = x[np.maximum(ordered, 0)]  # [Q, L, D], once for all centroids
    size = (ordered >= 0).sum(1, keepdims=True)
    place = np.arange(ordered.shape[1])

    def centroid(weight: np.ndarray) -> np.ndarray:
        return np.einsum("qld,ql->qd", rows, weight / np.maximum(weight.sum(1, keepdims=True), 1))

    def tail(share: float) -> np.ndarray:
        taken = np.minimum(np.maximum(np.ceil(share * size), 3), size)
        return unit(centroid(((place >= size - taken) & (place < size)).astype(np.float32)))

    start, normal = seed_mean(x, contexts), normals[domain]
    known = np.where(ordered >= 0, labels.seen[domain[:, None], ordered], -1)
    positive, negative = (centroid((known == v).astype(np.float32)) for v in (1, 0))
    tails = [tail(share) for share in TAIL_SHARES]
    fit = np.einsum("qsd,qd->qs", x[contexts.seeds], start)
    medoid = np.where(contexts.seeds >= 0, fit, -np.inf).argmax(1)[:, None]
    ascent = gradient(start, domain)
    made = {
        "seed centroid": start,
        "seed medoid": x[np.take_along_axis(contexts.seeds, medoid, 1)[:, 0]],
        **{f"tail centroid, {s:.0%}": t for s, t in zip(TAIL_SHARES, tails, strict=True)},
        **{f"slerp to the tail, {t}": slerp(start, tails[1], t) for t in SLERP},
        "Rocchio": unit(start + 0.75 * positive - 0.25 * negative),
        "known positives": unit(positive),
        **{f"steering, {s}": unit(start + s * normal) for s in STEPS},
        **{f"predictor step, {s}": unit(start + s * ascent) for s in STEPS},
        **{f"tail + steering, {s}": unit(tails[1] + s * normal) for s in BEYOND},
    }
    return np.stack(list(made.values()), 1).astype(np.float32), list(made)


def on_policy(
    model: MoDiT, contexts: Contexts, *, samples: int = 8, steps: int = 6, seed: int = 0
) -> tuple[np.ndarray, list[str]]:
    """(f32[Q, C, D], names) of the model: samples, half as many at guidance .5, half as many rolled out by
    two, the samples drawn in towards the one-call query, that query at three guidances, and last itself.

    steps: of the Heun sampler.
    """
    shared, half = dict(method="heun", steps=steps), max(1, samples // 2)
    query = model.queries(contexts)
    drawn = model.queries(contexts, samples=samples, seed=seed, **shared)
    made = [
        ("sample", drawn),
        ("sample, guidance .5", model.queries(contexts, 0.5, samples=half, seed=seed + 1, **shared)),
        ("sample, roll-out of 2", model.queries(contexts, samples=half, rollout=2, seed=seed + 2, **shared)),
        ("tempered sample", slerp(np.broadcast_to(query, drawn.shape), drawn, TEMPER)),
        *((f"one-call query, guidance {w}", model.queries(contexts, w)) for w in GUIDANCE),
        ("one-call query", query),
    ]
    names = [name for name, rows in made for _ in range(rows.shape[1])]
    return np.concatenate([rows for _, rows in made], 1), names


def feedback_steps(query: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(f32[Q, C, D], names): query f32[Q, D] + s × direction, Rocchio's formula applied to what the model's
    own query retrieves. These stay near the policy, so what they teach is within its reach."""
    steps = np.asarray(FEEDBACK, np.float32)[:, None]
    return unit(query[:, None] + steps * direction[:, None]), [f"{FEEDBACK_NAME}, {s}" for s in FEEDBACK]


def make_pool(
    policy: str, model: MoDiT, data: TrainingSet, labels: Labels, normals: np.ndarray, gradient: Callable,
    feedback: Callable[[np.ndarray, Contexts], np.ndarray] | None, contexts: Contexts, *, samples: int = 8,
    seed: int = 0,
) -> Pool:  # fmt: skip
    """The pool of `policy`: hybrid, deterministic (the one-call query aside) or on_policy, which is samples
    and the model's own query with relevance feedback.

    feedback: (queries f32[Q, D], contexts) -> unit direction f32[Q, D] from what they wrongly retrieve to
    the positives near them. None leaves these candidates, which are ours, out.
    """
    if policy not in POLICIES:
        raise InputError("policy", f"unknown pool {policy!r}", f"use one of {', '.join(POLICIES)}")
    query, parts = model.queries(contexts), []
    if policy != "on_policy":
        parts.append((*deterministic(data, labels, normals, gradient, contexts), False))
    if policy == "deterministic":
        parts.append((query, ["one-call query"], True))
    else:
        if feedback:
            parts.append((*feedback_steps(query[:, 0], feedback(query[:, 0], contexts)), True))
        parts.append((*on_policy(model, contexts, samples=samples, seed=seed), True))
    queries = np.concatenate([q for q, _, _ in parts], 1)
    names = tuple(n for _, ns, _ in parts for n in ns)
    return Pool(queries, names, np.concatenate([np.full(len(ns), own) for _, ns, own in parts]))
