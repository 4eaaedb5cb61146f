"""What the lines of the benchmark run on: sizes, vectors, and a training set fitted on them.

Synthetic vectors are clustered unit rows; labels, densities and probes are drawn, cells and neighbours are
fitted, and every stage is made by the function that a real run makes it with.
"""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from genret.catalogue.format import load
from genret.diffusion import edm
from genret.diffusion.dit import make_dit
from genret.diffusion.retriever import Retriever
from genret.modit import density as dn
from genret.modit import stages
from genret.modit import trajectories as tr
from genret.modit.fitting import Fitted
from genret.training.mesh import make_mesh
from genret.training.rows import read_all
from genret.types import Batch, Condition, InputError, PyTree

DOMAINS, SEEDS, WALK = 4, 8, 16  # as the demo has them


@dataclass(frozen=True)
class Scale:
    """dit: see diffusion/dit.py. dtype: of the matmuls. width: D of synthetic vectors. items: rows of the
    training set; corpus: of the softmax; database: rows searched. batch: examples per step; pairs, fresh: of
    HPPO; contexts: of its one round. queries, depth: of a search. candidates: scored at once. rows: of a set.
    lanes, prompt, new: rows, prompt tokens and new tokens of the language model; language: "tiny" or
    "smollm2". rollout: queries and answers of GRPO. matmul, stream: of the two yardsticks.
    """

    dit: str
    dtype: str
    width: int
    items: int
    corpus: int
    database: int
    batch: int
    pairs: int
    contexts: int
    queries: int
    depth: int
    candidates: int
    lanes: int
    prompt: int
    new: int
    language: str
    rollout: tuple[int, int]
    matmul: int
    stream: int
    rows: int = 10
    fresh: int = 4


SCALES = {
    "test": Scale(
        "test", "float32", 16, 400, 256, 600, 16, 8, 32, 64, 5, 64, 2, 8, 6, "tiny", (2, 2), 256, 1 << 16
    ),
    "demo": Scale(
        "demo", "float32", 128, 20_000, 16_384, 100_000, 256, 64, 128, 1000, 50, 2048, 8, 16, 64, "smollm2",
        (4, 8), 2048, 1 << 26,
    ),
    "B": Scale(
        "B", "bfloat16", 768, 50_000, 32_768, 1_000_000, 2048, 512, 256, 1000, 50, 8192, 64, 32, 128,
        "smollm2", (16, 8), 8192, 1 << 28,
    ),
}  # fmt: skip


def read_vectors(path: str) -> np.ndarray:
    """Unit rows f32[N, D] of a .npy matrix or a catalogue (a Parquet file or a folder of shards).

    Raises InputError for what cannot be read as either, or holds a row that has no direction.
    """
    if path.endswith(".npy"):
        try:
            x = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                "--vectors", f"{path} is not readable ({error})", "pass a .npy matrix"
            ) from error
    elif os.path.isdir(path) or path.endswith(".parquet"):
        x = load(path).embeddings
    else:
        raise InputError("--vectors", f"{path} is neither .npy nor .parquet", "pass one of them")
    if x.ndim != 2 or x.dtype.kind != "f" or min(x.shape) < 2:
        problem = f"{x.dtype}{list(x.shape)} is no matrix of floats"
        raise InputError("--vectors", problem, "pass float[N, D]")
    x = np.asarray(x, np.float32)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    bad = ~(np.isfinite(norm) & (norm > 0))[:, 0]
    if bad.any():
        raise InputError("--vectors", f"row {int(bad.argmax())} is zero or not finite", "drop it")
    return x / norm


def synthetic_vectors(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit rows f32[count, width] around count / 64 centres."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(2, count // 64), width), np.float32)
    x = centres[rng.integers(len(centres), size=count)]
    x += 0.5 * rng.standard_normal(x.shape, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class World:
    """scale: sizes. given: --vectors' path, or ''."""

    scale: Scale
    given: str = ""

    @functools.cached_property
    def mesh(self) -> Mesh:
        """One device: figures are per chip."""
        return make_mesh(devices=jax.devices()[:1])

    @functools.cached_property
    def folder(self) -> Path:
        """For what stages write (HPPO's pairs); gone with the process."""
        self.__dict__["_held"] = tempfile.TemporaryDirectory(prefix="benchmark_")
        return Path(self.__dict__["_held"].name)

    @functools.cached_property
    def vectors(self) -> np.ndarray:
        """What is searched, f32[N, D]."""
        s = self.scale
        return read_vectors(self.given) if self.given else synthetic_vectors(s.database, s.width)

    @property
    def source(self) -> str:
        return Path(self.given).name if self.given else "synthetic"

    @functools.cached_property
    def queries(self) -> np.ndarray:
        """f32[Q, D]: midway between an item and noise of its length."""
        rng, s = np.random.default_rng(1), self.scale
        near = self.vectors[rng.integers(len(self.vectors), size=s.queries)]
        noise = rng.standard_normal(near.shape, np.float32)
        x = near + 0.5 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    @functools.cached_property
    def fitted(self) -> Fitted:
        """A training set of at most `scale.items` vectors, with drawn labels of four attributes."""
        rng = np.random.default_rng(2)
        rows = rng.permutation(len(self.vectors))[: self.scale.items]
        x = np.ascontiguousarray(self.vectors[rows])
        count, width = x.shape
        every = np.ones(count, bool)
        normals = synthetic_vectors(DOMAINS, width, seed=3)
        score = normals @ x.T + 0.02 * rng.standard_normal((DOMAINS, count), np.float32)
        cut = np.quantile(score, 0.7, axis=1, keepdims=True)
        density = 1 / (1 + np.exp((cut - score) / score.std(1, keepdims=True)))
        density = density.astype(np.float32)
        seen = np.where(rng.random(score.shape) < 0.4, score > cut, -1).astype(np.int8)
        cells = tr.fit_cells(x, every, sizes=(48,), seeds=1, smallest=SEEDS, seed=0)
        data = stages.TrainingSet(
            x, np.arange(count), density, seen == 1, cells, tr.neighbour_table(x, every, k=20, index="exact"),
            tr.fit_tails(cells, density, seen),
        )  # fmt: skip
        probes = np.sort(rng.choice(count, max(8, count // 20), replace=False))
        trials = np.full((DOMAINS, len(probes)), 20)
        labels = dn.Labels(probes, rng.binomial(trials, density[:, probes]), trials, seen)
        model = dn.DensityMLP(DOMAINS)
        params = model.init(jax.random.key(0), jnp.zeros((1, width)))["params"]
        gradient = dn.Predictor(model, params).gradient
        return Fitted(data, labels, density, normals, cut[:, 0], gradient)

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    @functools.cached_property
    def retriever(self) -> Retriever:
        s = self.scale
        model = make_dit(
            s.dit, embedding=self.width, domains=DOMAINS, max_context=WALK - 1, dtype=jnp.dtype(s.dtype)
        )
        return Retriever(model)

    @functools.cached_property
    def params(self) -> PyTree:
        """Parameters off their start, where a zero-initialised network would compute nothing."""
        params = self.retriever.init(jax.random.key(0))
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [p + 0.02 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, moved)

    def examples(self, name: str, size: int) -> Batch:
        """A batch of the stage `name`, on the host."""
        length = SEEDS if name == "sft" else WALK
        rng = np.random.default_rng(4)
        return read_all(stages.draw_batch(name, rng, self.fitted.data, size, length))

    @functools.cached_property
    def space(self) -> edm.Space:
        """The centred coordinates, measured on SFT's targets as a run does."""
        batch = self.examples("sft", 256)
        rows = np.flatnonzero(batch.weight)
        null = np.zeros((1, self.width), np.float32)
        directions = np.concatenate([0.4 * self.fitted.normals, null])
        given = jax.tree.map(lambda x: x[rows], batch.condition)
        return edm.fit_space(given, batch.target[rows], directions)

    def contexts(self, size: int) -> Condition:
        """Seeds of `size` questions, on the device."""
        return jax.device_put(self.examples("sft", size).condition)
