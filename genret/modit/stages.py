"""MO-DiT's stages: raw-sequence pretraining, metric-ordered CPT and tail-centroid SFT.

All three are the same denoising loss on the same model; they differ in where a batch comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from flax import struct

from genret.diffusion.dit import SHARDING_RULES
from genret.diffusion.edm import Space
from genret.diffusion.retriever import Retriever
from genret.modit import trajectories as tr
from genret.modit.softmax import Candidates, Corpus, make_corpus, multi_positive_softmax
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


def condition(embeddings: np.ndarray, items: np.ndarray, domain: np.ndarray) -> Condition:
    """Context of catalogue rows i32[B, S] (-1 is padding) in the order given."""
    mask = items >= 0
    context = np.asarray(embeddings[np.maximum(items, 0)]) * mask[..., None].astype(np.float32)
    return Condition(context, mask, domain.astype(np.int32))


def next_item(data: TrainingSet, walks: np.ndarray, cut: np.ndarray, domain: np.ndarray) -> Batch:
    """Denoise item `cut` of each walk i32[B, T] given the items before it."""
    prefix = np.where(np.arange(walks.shape[1] - 1) < cut[:, None], walks[:, :-1], -1)
    target = np.take_along_axis(walks, cut[:, None], 1)
    return Batch(
        condition(data.embeddings, prefix, domain),
        np.asarray(data.embeddings[target]),
        np.ones(len(walks), np.float32),
    )


def raw_batch(rng: np.random.Generator, data: TrainingSet, size: int, length: int) -> Batch:
    """Stage 1: the next item of a raw sequence, under the null domain."""
    walks = tr.raw_sequences(rng, data.cells, data.neighbours, rng.choice(data.train, size), length)
    null = np.full(size, len(data.density))
    return next_item(data, walks, rng.integers(1, length, size), null)


ORDERS = ("ascending", "shuffled", "descending", "true", "noise")


def ordered_batch(
    rng: np.random.Generator, data: TrainingSet, size: int, length: int, order: str = "ascending"
) -> Batch:
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
    return next_item(data, walks, at, domain)


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
    return _tail_examples(rng, data, *_cells_and_domains(rng, data, size), seeds)[0]


def _tail_examples(rng, data: TrainingSet, cell, domain, seeds: int) -> tuple[Batch, np.ndarray]:
    items, half = tr.seeds_and_tail(rng, data.tails, cell, domain, seeds)
    keep = np.arange(seeds) < rng.integers(min(4, seeds), seeds + 1, len(cell))[:, None]
    items = tr.sort_by_density(np.where(keep, items, -1), data.density, domain)
    tail = data.embeddings[np.maximum(data.tails.tail[domain, cell], 0)]  # [B, T, D]
    centroid = np.sum(tail * half[..., None], axis=1)
    centroid /= np.maximum(np.linalg.norm(centroid, axis=-1, keepdims=True), 1e-12)
    batch = Batch(
        condition(data.embeddings, items, domain),
        centroid[:, None].astype(np.float32),
        (items >= 0).any(1).astype(np.float32),
    )
    return batch, items


def retrieval_batch(rng, data: TrainingSet, size: int, seeds: int, corpus: Corpus) -> TailBatch:
    """`tail_batch` with its softmax: the known positives of each cell against the corpus."""
    cell, domain = _cells_and_domains(rng, data, size)
    examples, items = _tail_examples(rng, data, cell, domain, seeds)
    members = data.cells.members[cell]
    hits = np.where((members >= 0) & data.has[domain[:, None], members], members, -1)
    return TailBatch(examples, corpus.candidates(hits, items))


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

    def __call__(self, retriever: Retriever, params, frozen, condition: Condition, candidates) -> Terms:
        """The weighted term per example; frozen holds `space`, `table` f32[N, D] and `corpus` i32[n]."""
        query = retriever.query(params, frozen["space"], condition)[:, 0]
        softmax, found = multi_positive_softmax(
            query, frozen["table"], frozen["corpus"], candidates, self.temperature
        )
        aux = {"softmax": softmax * found, "with_positives": found}
        return Terms(self.weight * softmax * found, found, aux)


DRAWS: dict[str, Callable] = {"pretrain": raw_batch, "cpt": ordered_batch, "sft": tail_batch}


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
    if name not in DRAWS:
        raise InputError("stage", f"unknown stage {name!r}", f"use one of {', '.join(DRAWS)}")
    if retrieval and name != "sft":
        raise InputError("retrieval", f"{name} has no retrieval-aware term", "use it with sft")
    walk = name != "sft"  # its last item is the target
    if not 1 + walk <= length <= retriever.model.max_context + walk:
        problem = f"{length} is not in {1 + walk}..{retriever.model.max_context + walk}"
        raise InputError("length", problem, "change it, or raise model.max_context")
    stream = list(DRAWS).index(name)
    replayed = round(replay * batch)
    corpus = make_corpus(data.train, len(data.embeddings), retrieval.corpus, seed) if retrieval else None

    def draw(step: int, _: PyTree) -> Batch | TailBatch:
        rng = np.random.default_rng([seed, stream, step])
        if retrieval:
            return retrieval_batch(rng, data, batch, length, corpus)
        more = {"order": order} if name == "cpt" else {}
        fresh = DRAWS[name](rng, data, batch - replayed, length, **more)
        return stack(fresh, raw_batch(rng, data, replayed, length)) if replayed else fresh

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


def stack(*batches: Batch) -> Batch:
    """Batches of equal shapes, one after the other."""
    parts = [(b.condition.context, b.condition.mask, b.condition.domain, b.target, b.weight) for b in batches]
    context, mask, domain, target, weight = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Batch(Condition(context, mask, domain), target, weight)


def model_card(model, space: Space) -> dict:
    """What must agree between a checkpoint and the code that reads it."""
    names = ("width", "depth", "heads", "embedding", "domains", "max_context", "cross")
    return {n: getattr(model, n) for n in names} | {"centred": space.centred}
