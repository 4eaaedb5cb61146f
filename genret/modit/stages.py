"""MO-DiT's stages: raw-sequence pretraining, metric-ordered CPT and tail-centroid SFT.

All three are the same denoising loss on the same model; they differ in where a batch comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np
from flax import struct

from genret.diffusion.dit import SHARDING_RULES
from genret.diffusion.edm import Space
from genret.diffusion.retriever import Retriever
from genret.modit import trajectories as tr
from genret.modit.softmax import Candidates, Corpus, make_corpus, most_positives, multi_positive_softmax
from genret.training.rows import ByRow
from genret.training.stage import Stage
from genret.types import Batch, Condition, InputError, PyTree, Terms


@dataclass(frozen=True)
class TrainingSet:
    """Everything a stage draws from; all of it fitted on training items.

    embeddings: f32[N, D]. train: i32[n] training rows. density: f32[M, N], labelled where probed and
    predicted elsewhere. has: bool[M, N], items whose label was looked up and is true.
    """

    embeddings: np.ndarray
    train: np.ndarray
    density: np.ndarray
    has: np.ndarray
    cells: tr.Cells
    neighbours: np.ndarray
    tails: tr.Tails


def embedded(embeddings: np.ndarray, items: np.ndarray) -> ByRow:
    """f32[..., D] of catalogue rows i32[...]; zeros for -1, which is padding."""

    def read(rows: np.ndarray) -> np.ndarray:
        found = items[rows]
        return np.asarray(embeddings[np.maximum(found, 0)]) * (found >= 0)[..., None].astype(np.float32)

    return ByRow((*items.shape, embeddings.shape[1]), read)


def condition(embeddings: np.ndarray, items: np.ndarray, domain: np.ndarray) -> Condition:
    """Context of catalogue rows i32[B, S] (-1 is padding) in the order given."""
    return Condition(embedded(embeddings, items), items >= 0, domain.astype(np.int32))


class Walks(NamedTuple):
    """What a batch of walks denoises: item `cut` i64[B] of each of `items` i32[B, T] given those before it,
    under `domain` i64[B]."""

    items: np.ndarray
    cut: np.ndarray
    domain: np.ndarray


def next_item(data: TrainingSet, walks: Walks) -> Batch:
    """Denoise the item at the cut given the items before it."""
    prefix = np.where(np.arange(walks.items.shape[1] - 1) < walks.cut[:, None], walks.items[:, :-1], -1)
    target = np.take_along_axis(walks.items, walks.cut[:, None], 1)
    return Batch(
        condition(data.embeddings, prefix, walks.domain),
        embedded(data.embeddings, target),
        np.ones(len(target), np.float32),
    )


def raw_walks(rng: np.random.Generator, data: TrainingSet, size: int, length: int) -> Walks:
    """Stage 1: the next item of a raw sequence, under the null domain."""
    walks = tr.raw_sequences(rng, data.cells, data.neighbours, rng.choice(data.train, size), length)
    return Walks(walks, rng.integers(1, length, size), np.full(size, len(data.density)))


ORDERS = ("ascending", "shuffled", "descending", "true", "noise")


def ordered_walks(
    rng: np.random.Generator, data: TrainingSet, size: int, length: int, order: str = "ascending"
) -> Walks:
    """Stage 2: the next item in metric order; 70 % locality walks, 30 % sorted bins, and the target in
    the last half of the walk, where the density is.

    order: shuffled and descending walk over the very same items (the ablation of A.6).
    """
    cell, domain = _cells_and_domains(rng, data, size)
    cut = round(0.7 * size)
    args = (rng, data.cells, data.neighbours, data.density, cell[:cut], domain[:cut], length)
    walks = np.concatenate(
        [
            tr.locality_walk(*args),
            tr.sorted_bins(rng, data.cells, data.density, cell[cut:], domain[cut:], length),
        ]
    )
    items = (walks >= 0).sum(1)  # a small cell's walk is shorter than `length`
    if order in ("shuffled", "descending"):
        place = np.arange(walks.shape[1])
        key = rng.random(walks.shape) if order == "shuffled" else -np.broadcast_to(place, walks.shape)
        key = np.where(walks >= 0, key, np.inf)  # padding stays at the end
        walks = np.take_along_axis(walks, np.argsort(key, axis=1, kind="stable"), 1)
    at = np.maximum(rng.integers(length // 2, length, size) * items // length, 1)
    return Walks(walks, at, domain)


@struct.dataclass
class TailBatch:
    """An SFT batch: denoising examples, and the softmax of the retrieval-aware term."""

    examples: Batch
    candidates: Candidates


def tail_batch(rng: np.random.Generator, data: TrainingSet, size: int, seeds: int) -> Batch:
    """Stage 3: low items of a cell -> normalised centroid of a random half of its tail.

    The number of seeds varies from 4 (or fewer) to `seeds`, for robustness to seed-set size. A cell
    without an item to draw gets weight 0.
    """
    return _tail_examples(rng, data, *_cells_and_domains(rng, data, size), seeds, (size,))[0]


def _tail_examples(
    rng, data: TrainingSet, cell, domain, seeds: int, shape: tuple[int, ...]
) -> tuple[Batch, np.ndarray]:
    items, half = tr.seeds_and_tail(rng, data.tails, cell, domain, seeds)
    keep = np.arange(seeds) < rng.integers(min(4, seeds), seeds + 1, len(cell))[:, None]
    items = tr.sort_by_density(np.where(keep, items, -1), data.density, domain)
    items, domain = items.reshape(*shape, -1), domain.reshape(shape)
    tail = np.where(half, data.tails.tail[domain.ravel(), cell], -1).reshape(*shape, -1)
    batch = Batch(
        condition(data.embeddings, items, domain),
        centroids(data.embeddings, tail),
        (items >= 0).any(-1).astype(np.float32),
    )
    return batch, items


def centroids(embeddings: np.ndarray, items: np.ndarray) -> ByRow:
    """Unit-norm f32[..., 1, D]: mean of catalogue rows i32[..., T], of which -1 counts for nothing."""
    rows = embedded(embeddings, items)

    def read(at: np.ndarray) -> np.ndarray:
        total = rows.read(at).sum(-2, keepdims=True)
        return total / np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), 1e-12)

    return ByRow((*items.shape[:-1], 1, embeddings.shape[1]), read)


def retrieval_batch(
    rng, data: TrainingSet, size: int, seeds: int, corpus: Corpus, beside: int | None = None
) -> TailBatch:
    """`tail_batch` with its softmax: the known positives of each cell against the corpus.

    beside: as many in each of `size` rows, leaves [size, beside, ...].
    """
    shape = (size,) if beside is None else (size, beside)
    cell, domain = _cells_and_domains(rng, data, math.prod(shape))
    examples, items = _tail_examples(rng, data, cell, domain, seeds, shape)
    members = data.cells.members[cell]
    hits = np.where((members >= 0) & data.has[domain[:, None], members], members, -1)
    found = corpus.candidates(hits, items.reshape(len(cell), -1))
    return TailBatch(examples, jax.tree.map(lambda x: x.reshape(*shape, -1), found))


def with_order(data: TrainingSet, order: str, seen: np.ndarray, seed: int) -> TrainingSet:
    """The training set whose density orders CPT's walks: as fitted, the true one, or noise.

    true: share of positives among the training neighbours of every item, which reads `seen` i8[M, N], all
    training labels. Raises InputError for an unknown order.
    """
    if order not in ORDERS:
        raise InputError("order", f"unknown order {order!r}", f"use one of {', '.join(ORDERS)}")
    density = data.density
    if order == "noise":
        density = np.random.default_rng([seed, 71]).random(density.shape, np.float32)
    elif order == "true":
        found = seen[:, data.neighbours[data.train]]  # [M, n, k]
        known = np.maximum((found >= 0).sum(-1), 1)
        density = density.copy()
        density[:, data.train] = (found == 1).sum(-1) / known
    return replace(data, density=density)


def _cells_and_domains(rng, data: TrainingSet, size: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, len(data.cells.members), size), rng.integers(0, len(data.density), size)


@dataclass(frozen=True)
class RetrievalTerm:
    """Weight and temperature of `multi_positive_softmax` on the one-call query, and the size of its corpus.

    Not in the papers: squared error to a centroid pulls queries towards the mean of the training
    patterns and loses Purity; this term trains the one-call query on the ranking itself.
    """

    weight: float
    temperature: float
    corpus: int

    def over(self, data: TrainingSet, seed: int) -> Corpus:
        """Its corpus of training rows."""
        most = most_positives(data.cells.members, data.has)
        return make_corpus(data.train, len(data.embeddings), self.corpus, seed, most)

    def __call__(self, retriever: Retriever, params, frozen, condition: Condition, candidates) -> Terms:
        """The weighted term per example; frozen holds `space`, `table` f32[N, D] and `corpus` i32[n]."""
        query = retriever.query(params, frozen["space"], condition)[:, 0]
        softmax, found = multi_positive_softmax(
            query, frozen["table"], frozen["corpus"], candidates, self.temperature
        )
        aux = {"softmax": softmax * found, "with_positives": found}
        return Terms(self.weight * softmax * found, found, aux)


WALKS: dict[str, Callable] = {"pretrain": raw_walks, "cpt": ordered_walks}
STAGES = (*WALKS, "sft")


def draw_batch(
    name: str, rng: np.random.Generator, data: TrainingSet, size: int, length: int, *,
    order: str = "ascending", replayed: int = 0,
) -> Batch:  # fmt: skip
    """A batch of stage `name`, one of STAGES. length: items per walk, or seeds per context in sft. order: of
    the walks of cpt. replayed: how many of them are pretraining's."""
    if name not in WALKS:
        return tail_batch(rng, data, size, length)
    more = {"order": order} if name == "cpt" else {}
    walks = WALKS[name](rng, data, size - replayed, length, **more)
    if replayed:
        again = raw_walks(rng, data, replayed, length)
        walks = Walks(*(np.concatenate(parts) for parts in zip(walks, again, strict=True)))
    return next_item(data, walks)


def make_stage(
    folder: str,
    retriever: Retriever,
    space: Space,
    data: TrainingSet,
    *,
    batch: int,
    length: int,
    replay: float = 0.0,
    seed: int = 0,
    retrieval: RetrievalTerm | None = None,
    regression: bool = False,
    order: str = "ascending",
) -> Stage:
    """The stage that trains in `folder`: pretrain, cpt or sft, or a variant such as sft_plain.

    length: items per walk, or seeds per context in sft. replay: share of each batch drawn from
    pretraining, so that CPT does not forget. retrieval: the retrieval-aware term, for sft (HPPO has its own).
    regression: the same batches under a squared error without diffusion, which is the MSE baseline.
    order: of the walks of cpt.
    """
    name = folder.partition("_")[0]
    if name not in STAGES:
        raise InputError("stage", f"unknown stage {name!r}", f"use one of {', '.join(STAGES)}")
    if retrieval and name != "sft":
        raise InputError("retrieval", f"{name} has no retrieval-aware term", "use it with sft")
    walk = name != "sft"  # its last item is the target
    if not 1 + walk <= length <= retriever.model.max_context + walk:
        problem = f"{length} is not in {1 + walk}..{retriever.model.max_context + walk}"
        raise InputError("length", problem, "change it, or raise model.max_context")
    stream = STAGES.index(name)
    replayed = round(replay * batch)
    corpus = retrieval.over(data, seed) if retrieval else None

    def draw(step: int, _: PyTree) -> Batch | TailBatch:
        rng = np.random.default_rng([seed, stream, step])
        if retrieval:
            return retrieval_batch(rng, data, batch, length, corpus)
        return draw_batch(name, rng, data, batch, length, order=order, replayed=replayed)

    def with_retrieval(params, frozen, batch, draw) -> Terms:
        terms = retriever.loss(params, frozen["space"], batch.examples, draw)
        found = retrieval(retriever, params, frozen, batch.examples.condition, batch.candidates)
        return Terms(terms.loss + found.loss, terms.weight, {"denoising": terms.loss} | found.aux)

    loss = retriever.regression_loss if regression else retriever.loss
    return Stage(
        name=folder,
        init=retriever.init,
        loss=with_retrieval if retrieval else loss,
        batch=draw,
        rules=SHARDING_RULES,
        frozen=(
            {"space": space, "table": np.asarray(data.embeddings), "corpus": corpus.rows}
            if retrieval
            else space
        ),
        card=model_card(retriever.model, space),
    )


def model_card(model, space: Space) -> dict:
    """What must agree between a checkpoint and the code that reads it."""
    names = ("width", "depth", "heads", "embedding", "domains", "max_context", "cross")
    return {n: getattr(model, n) for n in names} | {"centred": space.centred}
