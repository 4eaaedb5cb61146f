"""FAISS and hnswlib beside our indices, on the same vectors, queries and threads.

Graph and tree searches are compared at equal measured recall@K against exact search: each walks its own
ladder of settings, from the cheapest up, and is timed at the first that reaches the target.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from experiments.benchmark.lines import exact_scores
from experiments.benchmark.measure import Work, threads
from experiments.benchmark.world import World
from genret.retrieval.index import ScannIndex, recall_by_score, scann_index

TARGETS = (0.9, 0.99)
LINKS, BUILD = 32, 200  # of both HNSW graphs: M and efConstruction
EF = (1, 1.5, 2, 3, 5, 8, 12, 20, 40, 80)  # ef of a search, in K
# ScaNN's ladder: share of the leaves searched (where there is a tree), candidates rescored in K.
LEAVES = (
    (0.003, 1), (0.003, 1.5), (0.006, 1.5), (0.01, 2), (0.01, 3), (0.02, 5), (0.03, 5), (0.05, 5), (0.08, 5),
    (0.12, 5), (0.2, 5), (0.3, 5), (0.5, 10), (0.5, 80), (1.0, 150),
)  # fmt: skip

Search = Callable[[np.ndarray, int], np.ndarray]
"""(queries f32[Q, D], k) -> scores f32[Q, k], inner products, descending."""


@dataclasses.dataclass(frozen=True)
class Built:
    """at: setting -> the search at it. settings: from the cheapest up. seconds: of the build."""

    about: str
    settings: tuple[Any, ...]
    at: Callable[[Any], Search]
    seconds: float


def built(made: Callable[[World], tuple[str, Iterable[Any], Callable[[Any], Search]]]):
    """The maker of an index, timed and called once for all targets."""

    @functools.cache
    def once(world: World) -> Built:
        began = time.perf_counter()
        about, settings, at = made(world)
        return Built(about, tuple(settings), at, time.perf_counter() - began)

    return once


@built
def faiss_hnsw(world: World):
    """FAISS's HNSW graph over full vectors."""
    import faiss

    faiss.omp_set_num_threads(threads())
    index = faiss.IndexHNSWFlat(world.width, LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD
    index.add(world.vectors)

    def at(ef: int) -> Search:
        def search(q: np.ndarray, k: int) -> np.ndarray:
            index.hnsw.efSearch = ef
            return index.search(q, k)[0]

        return search

    return f"HNSW, M {LINKS}, efConstruction {BUILD}", _efs(world), at


@built
def hnswlib_graph(world: World):
    """hnswlib's graph of the same M and efConstruction."""
    import hnswlib

    index = hnswlib.Index(space="ip", dim=world.width)
    index.init_index(max_elements=len(world.vectors), M=LINKS, ef_construction=BUILD, random_seed=0)
    index.set_num_threads(threads())
    index.add_items(world.vectors)

    def at(ef: int) -> Search:
        def search(q: np.ndarray, k: int) -> np.ndarray:
            index.set_ef(ef)
            return 1 - index.knn_query(q, k=k)[1]

        return search

    return f"HNSW, M {LINKS}, ef_construction {BUILD}", _efs(world), at


@built
def scann(world: World):
    """ScaNN as `scann_index` builds it, with leaves and rescoring chosen at search time."""
    return _scann(world, scann_index(world.vectors, k=world.scale.depth))


@built
def scann_soar(world: World):
    """The same with three times the leaves, and every item in two."""
    leaves = 3 * round(len(world.vectors) ** 0.5)
    return _scann(world, scann_index(world.vectors, k=world.scale.depth, num_leaves=leaves, soar=True))


def _scann(world: World, index: ScannIndex) -> tuple[str, list[tuple[int, int]], Callable]:
    leaves, items, k = 2 * index.leaves, len(world.vectors), world.scale.depth
    settings = []
    for share, rescored in LEAVES:
        setting = max(1, round(share * leaves)) if leaves else 0, min(items, round(rescored * k))
        if setting not in settings:
            settings.append(setting)

    def at(setting: tuple[int, int]) -> Search:
        chosen = dataclasses.replace(index, leaves=setting[0], reorder=setting[1])
        return lambda q, k: chosen.search(q, k)[1]

    if not index.reorder:  # too few items for anything but brute force
        settings = [(0, 0)]
    return f"{leaves} leaves, (leaves searched, rescored)", settings, at


def _efs(world: World) -> list[int]:
    k = world.scale.depth
    return [min(round(f * k), len(world.vectors)) for f in EF]


def at_recall(world: World, make: Callable[[World], Built], target: float, peer_of: str = "") -> Work:
    """The search at its first setting of a measured recall@K of `target`; the last where none reaches it."""
    index, q, k = make(world), world.queries, world.scale.depth
    ladder = []
    for setting in index.settings:
        search = index.at(setting)
        recall = recall_by_score(search(q, k), exact_scores(world))
        ladder.append({"setting": setting, "recall": recall})
        if recall >= target:
            break
    more = {"recall": recall, "target": target, "ladder": ladder, "build_s": index.seconds}
    more |= {"threads": threads()} | ({"peer_of": peer_of} if peer_of else {})
    more |= {} if recall >= target else {"note": f"no setting reaches {target}"}
    n, d = world.vectors.shape
    about = f"{len(q)} queries, K {k}, {n} x {d} {world.source}; {index.about}, at {setting}"
    return Work(lambda: search(q, k), about, len(q), "queries", more=more)


def faiss_flat(world: World) -> Work:
    """FAISS's exhaustive search."""
    import faiss

    faiss.omp_set_num_threads(threads())
    began = time.perf_counter()
    index = faiss.IndexFlatIP(world.width)
    index.add(world.vectors)
    seconds, q, k = time.perf_counter() - began, world.queries, world.scale.depth
    recall = recall_by_score(index.search(q, k)[0], exact_scores(world))
    n, d = world.vectors.shape
    more = {"peer_of": "search exact", "build_s": seconds, "threads": threads(), "recall": recall}
    return Work(
        lambda: index.search(q, k), f"{len(q)} queries, K {k}, {n} x {d} {world.source}", len(q), "queries",
        2.0 * q.shape[0] * world.vectors.size, "2 n D per query", more=more,
    )  # fmt: skip


LINES: dict[str, Callable[[World], Work]] = {"faiss flat": faiss_flat}
for _target in TARGETS:
    _ours = f"scann at recall {_target}"
    LINES[_ours] = functools.partial(at_recall, make=scann, target=_target)
    LINES[f"scann soar at recall {_target}"] = functools.partial(at_recall, make=scann_soar, target=_target)
    for _name, _make in (("faiss hnsw", faiss_hnsw), ("hnswlib", hnswlib_graph)):
        LINES[f"{_name} at recall {_target}"] = functools.partial(
            at_recall, make=_make, target=_target, peer_of=_ours
        )
