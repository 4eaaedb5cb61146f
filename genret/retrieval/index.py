"""Top-k inner-product search over a fixed corpus: exact on a mesh, or ScaNN on one machine."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genret.types import Array, InputError

# Items per chunk of the two-stage selection: the fastest of 16 to 256 for k = 28 and 100 of 40k and
# 200k items on CPU, up to 1.45 times the queries per second of lax.top_k over the whole row.
CHUNK = 64
# Corpus blocks are multiples of ALIGN and query blocks no smaller than MIN_QUERIES: matmul kernels
# then round alike for every block size (measured on CPU): ids depend on neither mesh nor batch.
ALIGN = 128
MIN_QUERIES = 32
# Queries that go through the corpus together: with their scores of half a million items at a time a CPU is
# fastest, be the corpus of 10k or 400k, since every selection is of the whole row.
QUERIES = 128
TREE = 100_000  # items from which ScaNN has a tree
# Of a tree's leaves, and candidates rescored per neighbour, where items look for items.
OWN_LEAVES, OWN_RESCORED = 0.04, 8


class Index(Protocol):
    """A searchable corpus of `num_items` embeddings; `name` is what a results row calls it."""

    name: str
    num_items: int

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """queries f32[Q, D] -> ids i32[Q, k], scores f32[Q, k]: inner products, descending."""


class ExactIndex:
    """Exhaustive f32 search: a blocked matmul, two-stage top-k, and one merge over the mesh.

    embeddings: float[N, D], any finite values; the rows of the devices that are here are read and checked.
    mesh: all its devices share the corpus, whatever the axes are called, and the ids are the same
        for every mesh; None: the first device of this process.
    query_block: most queries that are sent to the devices at a time. corpus_block: most items whose scores
        with 128 of them a device holds, in 512 * corpus_block bytes, however many of either there are.

    Raises InputError if the embeddings are not a finite float matrix.
    """

    name = "exact"

    def __init__(
        self,
        embeddings: np.ndarray,
        *,
        mesh: Mesh | None = None,
        query_block: int = 1024,
        corpus_block: int = 524_288,
    ):
        embeddings = _checked_matrix(embeddings)
        self.num_items, self.width = embeddings.shape
        self.mesh = Mesh(np.array(jax.local_devices()[:1]), ("corpus",)) if mesh is None else mesh
        self.query_block = max(query_block, MIN_QUERIES)
        share = math.ceil(self.num_items / self.mesh.size)
        blocks = math.ceil(share / corpus_block)  # on each device, equal: little padding is scored
        self.block = ALIGN * math.ceil(share / blocks / ALIGN)
        padded = self.mesh.size * blocks * self.block

        def place(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(padded)
            rows = np.zeros((stop - start, self.width), np.float32)
            real = embeddings[start:stop]
            rows[: len(real)] = real
            _check_finite(rows, start)
            return rows

        sharding = NamedSharding(self.mesh, P(self.mesh.axis_names))
        self.rows = jax.make_array_from_callback((padded, self.width), sharding, place)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """queries f32[Q, D] -> ids i32[Q, k], scores f32[Q, k] descending, ties by the lower id.

        Raises InputError unless 1 <= k <= N and the queries are finite and D wide.
        """
        queries = _checked_queries(queries, self.width, k, self.num_items)
        ids = np.empty((len(queries), k), np.int32)
        scores = np.empty((len(queries), k), np.float32)
        for start in range(0, len(queries), self.query_block):
            block = queries[start : start + self.query_block]
            # Powers of two, so that only a handful of shapes ever compile.
            size = min(self.query_block, max(MIN_QUERIES, 1 << (len(block) - 1).bit_length()))
            padded = np.pad(block, ((0, size - len(block)), (0, 0)))
            best = search_rows(
                padded, self.rows, k=k, num_items=self.num_items, block=self.block, mesh=self.mesh
            )
            # Fetched before the next dispatch: collectives in flight together deadlock on CPU.
            here = slice(start, start + len(block))
            ids[here], scores[here] = (np.asarray(x)[: len(block)] for x in best)
        return ids, scores


@partial(jax.jit, static_argnames=("k", "num_items", "block", "mesh"))
def search_rows(
    queries: Array, rows: Array, *, k: int, num_items: int, block: int, mesh: Mesh
) -> tuple[Array, Array]:
    """queries f32[q, D], rows f32[devices * n, D] sharded -> ids i32[q, k], scores f32[q, k]."""
    axes, (count, width) = mesh.axis_names, queries.shape
    some = min(count, QUERIES)
    queries = jnp.pad(queries, ((0, -count % some), (0, 0))).reshape(-1, some, width)

    def on_each_device(queries: Array, rows: Array) -> tuple[Array, Array]:
        first = jax.lax.axis_index(axes) * len(rows)
        blocks = rows.reshape(-1, block, width)

        def search(queries: Array) -> tuple[Array, Array]:
            def merge(best: tuple[Array, Array], numbered: tuple[Array, Array]):
                number, rows = numbered
                start = first + number * block
                scores = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
                scores, offsets = top_k(scores, min(k, block), num_items - start)
                # The running best first: its ids are lower, and of equals top_k takes the earlier.
                scores = jnp.concatenate([best[0], scores], axis=1)
                ids = jnp.concatenate([best[1], start + offsets], axis=1)
                return _best(scores, ids, k), None

            none = jnp.full((some, k), -jnp.inf), jnp.full((some, k), num_items, jnp.int32)
            best, _ = jax.lax.scan(merge, none, (jnp.arange(len(blocks)), blocks))
            return best

        best = jax.tree.map(lambda x: x.reshape(-1, k), jax.lax.map(search, queries))
        scores, ids = jax.lax.all_gather(best, axes, axis=1, tiled=True)  # [q, devices * k]
        scores, ids = _best(scores, ids, k)
        return ids[:count], scores[:count]

    # The gathered candidates are the same on every device, which the checker cannot see.
    search = jax.shard_map(on_each_device, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P(), check_vma=False)
    return search(queries, rows)


def _best(scores: Array, ids: Array, k: int) -> tuple[Array, Array]:
    scores, at = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(ids, at, axis=1)


def top_k(scores: Array, k: int, real: Array | int | None = None) -> tuple[Array, Array]:
    """`jax.lax.top_k` of scores f32[q, n], the same values, indices and ties, for long rows.

    real: only so many columns, the first, count; of others the values are -inf.

    Chunk maxima are one vectorised pass; then only the chunks with the largest maxima compete. It is exact:
    order items by (score descending, index ascending) and chunks by their best item, which is (maximum
    descending, chunk ascending) because chunks are contiguous. If an item of the top k lay in a chunk not
    chosen, the best items of the k chosen chunks would all precede it. One more is chosen, in place of the
    one chunk whose maximum may be of a column that does not count.
    """
    q, n = scores.shape
    real = n if real is None else real
    if n % CHUNK or (k + 1) * CHUNK >= n:  # every chunk would be chosen
        return jax.lax.top_k(jnp.where(jnp.arange(n) < real, scores, -jnp.inf), k)
    chunks = scores.reshape(q, n // CHUNK, CHUNK)
    maxima = jnp.where(jnp.arange(0, n, CHUNK) < real, chunks.max(axis=2), -jnp.inf)
    _, chosen = jax.lax.top_k(maxima, k + 1)
    chosen = jnp.sort(chosen, axis=1)  # candidates in index order, so that ties stay right
    candidates = jnp.take_along_axis(chunks, chosen[:, :, None], axis=1).reshape(q, (k + 1) * CHUNK)
    at = (chosen[:, :, None] * CHUNK + jnp.arange(CHUNK)).reshape(candidates.shape)
    return _best(jnp.where(at < real, candidates, -jnp.inf), at, k)


@dataclass(frozen=True)
class ScannIndex:
    """Approximate search by ScaNN (Guo et al. 2020) on this machine's CPUs; see `scann_index`."""

    searcher: Any
    num_items: int
    width: int
    k: int  # the depth it is tuned for, with this many leaves searched and candidates rescored
    leaves: int
    reorder: int
    name: str = "scann"

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `ExactIndex.search`, save that items may be missed; the scores are exact.

        A k beyond the one the index was tuned for widens the search.
        """
        queries = _checked_queries(queries, self.width, k, self.num_items)
        ids, scores = self._search(queries, k, self.leaves * math.ceil(k / self.k))
        short = np.isnan(scores).any(axis=1)  # the leaves searched held fewer than k items
        if short.any():
            ids[short], scores[short] = self._search(queries[short], k, self.num_items)
        return ids, scores

    def _search(self, queries: np.ndarray, k: int, leaves: int) -> tuple[np.ndarray, np.ndarray]:
        if not len(queries):
            return np.empty((0, k), np.int32), np.empty((0, k), np.float32)
        threads = os.cpu_count() or 1
        reorder = max(k, self.reorder * math.ceil(k / self.k))
        ids, scores = self.searcher.search_batched_parallel(
            queries,
            final_num_neighbors=k,
            pre_reorder_num_neighbors=min(self.num_items, reorder),
            leaves_to_search=leaves,
            batch_size=min(256, math.ceil(len(queries) / threads)),  # a share for every thread
        )
        return ids.astype(np.int32), np.array(scores)


def scann_index(
    embeddings: np.ndarray,
    *,
    k: int,
    num_leaves: int | None = None,
    leaves_to_search: int | None = None,
    reorder: int | None = None,
    soar: bool = False,
) -> ScannIndex:
    """Build ScaNN over embeddings float[N, D], tuned for searches of depth k.

    ScaNN scores every item below 100k items, and has a tree of sqrt(N) leaves, asymmetric hashing and
    rescoring from there. Its own guide (google-research, scann/docs/algorithms.md) hashes from 20k; at
    the recall wanted here so many are rescored that scoring all is faster. The widths are ours, for
    recall@k >= .999 even of queries that are no items (means of unrelated items need half of the leaves):

    num_leaves: 0 for no tree. leaves_to_search: half of them.
    reorder: candidates rescored exactly, of a tree max(4000, 150 k); 0 scores every item searched exactly.
    soar: each item lies in a second leaf as well (Sun et al. 2023): at the same recall fewer leaves are
        searched, of an index that takes longer to build and more memory.

    Raises InputError where ScaNN is not installed, or if the embeddings are not a finite matrix.
    """
    try:
        import scann
    except ImportError as error:
        problem = "ScaNN cannot be imported (it has wheels for Linux, none for macOS or Windows)"
        fix = "Use the exact index, or on Linux: pip install 'scann>=1.4.2'"
        raise InputError("index", problem, fix) from error
    embeddings = np.ascontiguousarray(_checked_matrix(embeddings), np.float32)
    _check_finite(embeddings)
    n, threads = len(embeddings), os.cpu_count() or 1
    _check_k(k, n)
    if num_leaves is None:
        num_leaves = round(math.sqrt(n)) if n >= TREE else 0
    leaves = math.ceil(num_leaves / 2) if leaves_to_search is None else leaves_to_search
    if reorder is None:
        reorder = max(4000, 150 * k) if num_leaves else 0
    builder = scann.scann_ops_pybind.builder(embeddings, k, "dot_product")
    if num_leaves:
        spilled = {"soar_lambda": 1.5, "overretrieve_factor": 2.0} if soar else {}
        builder.tree(num_leaves, leaves, training_sample_size=min(n, 250_000), **spilled)
    if reorder:
        # Two dimensions a block is its guide's advice, threshold .2 that of its examples.
        builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(min(reorder, n))
    else:
        builder.score_brute_force()
    searcher = builder.set_n_training_threads(threads).build()
    searcher.set_num_threads(threads)
    return ScannIndex(searcher, *embeddings.shape, k, leaves, reorder)


def build_index(
    kind: str, embeddings: np.ndarray, k: int, mesh: Mesh | None = None, *, of_items: bool = False
) -> Index:
    """'exact', 'scann' (tuned for depth k), or 'auto': ScaNN where it is installed, else exact.

    of_items: the queries are the items themselves, which lie near what they look for: ScaNN with a tree then
    searches `OWN_LEAVES` of it alone. Raises InputError for an unknown kind.
    """
    if kind == "auto":
        kind = "scann" if importlib.util.find_spec("scann") else "exact"
    if kind == "exact":
        return ExactIndex(embeddings, mesh=mesh)
    if kind == "scann":
        leaves = round(math.sqrt(len(embeddings)))
        narrow = dict(leaves_to_search=math.ceil(OWN_LEAVES * leaves), reorder=OWN_RESCORED * k)
        return scann_index(embeddings, k=k, **narrow if of_items and len(embeddings) >= TREE else {})
    raise InputError("index", f"no index is called {kind!r}", "Choose exact, scann or auto.")


def recall(ids: np.ndarray, exact_ids: np.ndarray) -> float:
    """Mean overlap@k of ids i32[Q, k] with exact_ids i32[Q, k] (each row distinct)."""
    both = np.sort(np.concatenate([ids, exact_ids], axis=1), axis=1)
    return float((both[:, 1:] == both[:, :-1]).sum() / exact_ids.size)


def recall_by_score(scores: np.ndarray, exact_scores: np.ndarray, tolerance: float = 1e-6) -> float:
    """Recall@k that forgives ties, the one to report: the share of scores f32[Q, k], of unit
    vectors, that reach the k-th exact one. Which of two duplicates is returned does not matter."""
    return float((scores >= exact_scores[:, -1:] - tolerance).mean())


def _checked_matrix(embeddings: np.ndarray) -> np.ndarray:
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or 0 in embeddings.shape or embeddings.dtype.kind != "f":
        problem = f"{embeddings.dtype}{list(embeddings.shape)} is not float[N, D]"
        raise InputError("embeddings", problem, "Pass one row per item.")
    return embeddings


def _check_finite(rows: np.ndarray, first: int = 0) -> None:
    for start in range(0, len(rows), 65_536):  # the mask of all rows would be as long as they are
        bad = ~np.isfinite(rows[start : start + 65_536]).all(axis=1)
        if bad.any():
            row = first + start + int(bad.argmax())
            raise InputError("embeddings", f"row {row} is not finite", "Drop or repair that item.")


def _checked_queries(queries: np.ndarray, width: int, k: int, num_items: int) -> np.ndarray:
    _check_k(k, num_items)
    queries = np.asarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != width:
        problem = f"{list(queries.shape)} is not [Q, {width}]"
        raise InputError("queries", problem, "Match the width of the corpus.")
    bad = ~np.isfinite(queries).all(axis=1)
    if bad.any():
        problem = f"row {int(bad.argmax())} is not finite"
        raise InputError("queries", problem, "Look for the step that diverged.")
    return queries


def _check_k(k: int, num_items: int) -> None:
    if not 1 <= k <= num_items:
        raise InputError("k", f"{k} items of {num_items} asked for", f"Use 1 to {num_items}.")
