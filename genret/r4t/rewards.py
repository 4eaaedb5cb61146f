"""Set-level rewards of a fan-out, R4T's eqs. 1-5 (arXiv 2603.06397).

Q = {q_1 .. q_k} are the sub-queries of a query q, C(n) what retrieval returns for them to depth n:

    (3) groundedness = 1 - (1/k) Σ_i min_c ‖e(q_i) - e(c)‖ / 2      distance to the nearest content
    (2) diversity    = (Vendi({e(c_i*)}) - 1) / (k - 1)              c_i*: the content nearest to q_i
    (4) alignment    = (1/k) Σ_i cos(e(q_i), e(q))
    (5) recall       = |Y ∩ C(n)| / |Y|                              Y: the query's weak reference set
    (1) reward       = Σ_j w_j component_j

The paper leaves the scale of (2) and (3) open. Here k is the number of sub-queries asked for and all
embeddings are of unit norm, so that the 1/2 and the (k - 1), both ours, put every component in 0..1
(alignment in -1..1). A fan-out of fewer than k has nothing to add for those missing; a malformed one has
none at all and scores zero.

e(q_i) is the embedding of the sub-query, or, ours, of the sub-query in the context of q (`in_context`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

from genret.r4t.prompts import K
from genret.retrieval.index import Index
from genret.retrieval.sets import found, vendi_groups
from genret.types import InputError

# Open-ended retrieval's default, and weakly supervised retrieval's.
OAR: Mapping[str, float] = MappingProxyType({"groundedness": 0.6, "diversity": 0.2, "alignment": 0.2})
WSCR: Mapping[str, float] = MappingProxyType({"recall": 1.0})
COMPONENTS = (*OAR, *WSCR)

Encode = Callable[[list[str]], np.ndarray]
Answer = list[str] | None  # sub-queries, or None for a malformed answer


def in_context(vectors: np.ndarray, queries: np.ndarray, weight: float) -> np.ndarray:
    """Sub-queries f32[n, D] of the queries f32[n, D], both unit-norm -> (v + w q) / ‖v + w q‖, f32[n, D].

    A large language model writes sub-queries that make sense alone ("linen shirt for a beach wedding"), a
    small one parts of them ("linen shirt"): the query says what of. Ours; weight 0 is the paper's e(q_i).
    """
    if not weight:
        return vectors
    mixed = vectors + weight * queries
    return mixed / np.maximum(np.linalg.norm(mixed, axis=-1, keepdims=True), 1e-6)


class FanoutArrays(Protocol):
    """The arrays of a fan-out data set: contents f32[N, D] and queries f32[Q, D], unit-norm, and for each
    query the contents i32[|Y|] of its reference set (None for open-ended retrieval)."""

    embeddings: np.ndarray
    query_embeddings: np.ndarray
    references: Sequence[np.ndarray] | None


class Scores(NamedTuple):
    """All [Q, G]. reward: f32, what the policy is trained on. valid: bool, False for a malformed answer.
    composite: f32, eq. 1 on the fixed scale whatever the reward's normalisation: the figure to compare.
    components: f32 by name, before weights and normalisation."""

    reward: np.ndarray
    valid: np.ndarray
    composite: np.ndarray
    components: dict[str, np.ndarray]

    def summary(self) -> dict[str, float]:
        """For the log: mean composite, share of valid answers, each component's mean and within-group std."""
        row = {"reward": float(self.composite.mean()), "valid": float(self.valid.mean())}
        row |= {name: float(values.mean()) for name, values in self.components.items()}
        return row | {f"{name}_std": float(_std(v).mean()) for name, v in self.components.items()}


class CachedEncoder:
    """A text encoder that encodes a string once, as long as it is among the last `size` new ones.

    encode: list[str] -> f32[n, D]. A string's row must not depend on those that share its call, since a run
    that is continued holds fewer and encodes others together (`TextEncoder.encode`).
    """

    def __init__(self, encode: Encode, size: int = 200_000):
        self.encode, self.size = encode, size
        self._held: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """texts -> f32[n, D], n >= 1."""
        new = [text for text in dict.fromkeys(texts) if text not in self._held]
        if new:
            self._held |= zip(new, np.asarray(self.encode(new), np.float32), strict=True)
        rows = np.stack([self._held[text] for text in texts])
        for text in list(itertools.islice(self._held, max(0, len(self._held) - self.size))):
            del self._held[text]  # the oldest first
        return rows


class Rewards:
    """Scores fan-outs: (query rows, answers) -> Scores.

    data: the arrays of the data set. index: over its contents. encode: texts to unit-norm rows in the
    contents' space, cached (by a `CachedEncoder` given, or one made here). weights: component -> w_j; one of
    0 has the component logged and not rewarded. k: sub-queries asked for. depth: n of eq. 5, contents
    returned per sub-query. context: the query's weight in its sub-queries' embeddings (`in_context`).
    normalise: 'scale' weighs the components as above; 'group' first turns each into a z-score within the
    group, (x - mean) / (std + 1e-6) with G - 1 in the std and malformed answers in it at zero.

    Raises InputError for rows not of unit norm, an unknown component or normalisation, recall without
    reference sets, an empty one, an index of another size, or a k, depth or context out of range.
    """

    def __init__(
        self, data: FanoutArrays, index: Index, encode: Encode, *,
        weights: Mapping[str, float] = OAR, k: int = K, depth: int = 10, normalise: str = "scale",
        context: float = 0.0,
    ):  # fmt: skip
        for name in ("embeddings", "query_embeddings"):
            norms = np.linalg.norm(getattr(data, name), axis=1)
            if not (np.abs(norms - 1) < 1e-3).all():
                row = int(np.abs(norms - 1).argmax())
                raise InputError(name, f"row {row} has norm {norms[row]:.4g}", "Scale rows to unit norm.")
        if unknown := [name for name in weights if name not in COMPONENTS]:
            raise InputError("weights", f"unknown {unknown[0]!r}", f"use of {', '.join(COMPONENTS)}")
        if normalise not in ("scale", "group"):
            raise InputError("normalise", f"unknown {normalise!r}", "use scale or group")
        if not 0 <= context < np.inf:
            raise InputError("context", f"{context}", "use 0, or a weight above it")
        if k < 1 + ("diversity" in weights):
            raise InputError("k", f"{k} sub-queries", "ask for 2 or more")
        if index.num_items != len(data.embeddings):
            problem = f"holds {index.num_items} items of {len(data.embeddings)} contents"
            raise InputError("index", problem, "index the contents, all of them")
        if "recall" in weights:
            if data.references is None:
                raise InputError("weights", "recall asked for without reference sets", "use OAR's weights")
            if empty := [i for i, wanted in enumerate(data.references) if not len(wanted)]:
                raise InputError("references", f"set {empty[0]} is empty", "leave that query out")
            if not 1 <= depth <= index.num_items:
                raise InputError("depth", f"{depth} of {index.num_items} contents", "search no deeper")
        self.data, self.index = data, index
        self.encode = encode if isinstance(encode, CachedEncoder) else CachedEncoder(encode)
        self.weights, self.k, self.depth, self.normalise = dict(weights), k, depth, normalise
        self.context = context

    def __call__(self, rows: np.ndarray, answers: Sequence[Sequence[Answer]]) -> Scores:
        """rows i32[Q], answers [Q][G] -> Scores of shape [Q, G]."""
        flat = [answer for group in answers for answer in group]
        shape = len(answers), len(answers[0])
        repeated = np.repeat(rows, shape[1])
        components = self.components(repeated, self.embed(repeated, flat))
        components = {name: values.reshape(shape) for name, values in components.items()}
        valid = np.array([answer is not None for answer in flat]).reshape(shape)
        composite = self.combine(components, "scale")
        return Scores(self.combine(components, self.normalise), valid, composite, components)

    def embed(self, rows: np.ndarray, answers: Sequence[Answer]) -> np.ndarray:
        """n answers to the queries i32[n] -> f32[n, k, D]; a missing sub-query is a row of zeros."""
        vectors = np.zeros((len(answers), self.k, self.data.embeddings.shape[1]), np.float32)
        texts = [answer[: self.k] if answer else [] for answer in answers]
        if any(texts):
            real = np.arange(self.k) < np.array([len(row) for row in texts])[:, None]
            queries = self.data.query_embeddings[np.repeat(rows, real.sum(1))]
            found = self.encode([text for row in texts for text in row])
            vectors[real] = in_context(found, queries, self.context)
        return vectors

    def representatives(self, vectors: np.ndarray) -> np.ndarray:
        """The content nearest to each row of f32[n, k, D]: i32[n, k], -1 for a row of zeros."""
        return self._search(vectors, 1)[..., 0]

    def components(self, rows: np.ndarray, vectors: np.ndarray) -> dict[str, np.ndarray]:
        """The components that have a weight, f32[n] each, of sets f32[n, k, D] for query rows i32[n].

        The rows need not come from text: what a diffusion model draws is scored alike.
        """
        made: dict[str, np.ndarray] = {}
        if {"groundedness", "diversity"} & self.weights.keys():
            nearest = self.representatives(vectors)
            real = nearest >= 0
            contents = self.data.embeddings[np.maximum(nearest, 0)] * real[..., None]  # [n, k, D]
            distance = np.linalg.norm(vectors - contents, axis=-1)
            made["groundedness"] = ((1 - distance / 2) * real).sum(1) / self.k
            score = np.asarray(vendi_groups(contents.astype(np.float32)))
            made["diversity"] = np.maximum(score - 1, 0) / max(self.k - 1, 1)
        if "alignment" in self.weights:
            query = self.data.query_embeddings[rows]
            made["alignment"] = np.einsum("nkd,nd->n", vectors, query) / self.k
        if "recall" in self.weights:
            wanted = [self.data.references[row] for row in rows]
            made["recall"] = found(self._search(vectors, self.depth), wanted).recall
        return {name: np.float32(made[name]) for name in self.weights}

    def combine(self, components: Mapping[str, np.ndarray], normalise: str) -> np.ndarray:
        """Eq. 1: components f32[Q, G] by name -> f32[Q, G]; normalise: 'scale' or 'group'."""
        total = 0.0
        for name, weight in self.weights.items():
            values = components[name]
            if normalise == "group":
                values = (values - values.mean(1, keepdims=True)) / (_std(values)[:, None] + 1e-6)
            total = total + weight * values
        return np.float32(total)

    def _search(self, vectors: np.ndarray, depth: int) -> np.ndarray:
        """i32[n, k, depth]; a row of zeros finds nothing, -1."""
        real = (vectors != 0).any(-1)
        ids = np.full((*real.shape, depth), -1, np.int32)
        if real.any():
            ids[real] = self.index.search(vectors[real], depth)[0]
        return ids


def _std(values: np.ndarray) -> np.ndarray:
    """Within-group standard deviation f32[Q, G] -> f32[Q], G - 1 in it; 0 for groups of one."""
    return values.std(1, ddof=1) if values.shape[1] > 1 else np.zeros(len(values), np.float32)
