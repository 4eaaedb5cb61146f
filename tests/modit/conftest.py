"""What MO-DiT's tests share: small catalogues written by hand, and one fit on real molecules."""

import numpy as np
import pytest

from genret.catalogue import format
from genret.catalogue.splits import make_splits
from genret.modit import fitting, protocol
from genret.modit import trajectories as tr
from genret.modit.stages import TrainingSet
from genret.retrieval.index import ExactIndex
from genret.training.loop import FitOptions


@pytest.fixture(scope="session")
def catalogue_of(tmp_path_factory):
    """(embeddings, attributes) -> a catalogue that went through the disk."""

    def make(embeddings, attributes):
        n = len(embeddings)
        path = tmp_path_factory.mktemp("small") / "small.parquet"
        format.write(
            path,
            ids=[f"item {i}" for i in range(n)],
            embeddings=np.asarray(embeddings, np.float32),
            attributes=attributes,
            patterns=np.arange(n) % 5,
        )
        return format.load(path, min_pattern=1)

    return make


@pytest.fixture(scope="session")
def splits(molecules):
    return make_splits(molecules)


@pytest.fixture(scope="session")
def prepare():
    """fitting.prepare with options that suit 2,000 molecules and take seconds."""

    def call(catalogue, splits, workdir, **changes):
        options = dict(
            budget=0.2, k=20, predictor=FitOptions(
                60, learning_rate=3e-3, warmup=5, ema_decay=0.9, log_every=1
            ),
            cells=dict(sizes=(32, 48), seeds=1, smallest=16), neighbours=20, tail_share=0.1,
            tail_least=8, seed=0, index="exact", say=lambda text: None,
        )  # fmt: skip
        return fitting.prepare(catalogue, splits, workdir, **options | changes)

    return call


@pytest.fixture(scope="session")
def fitted(molecules, splits, prepare, tmp_path_factory):
    return prepare(molecules, splits, tmp_path_factory.mktemp("fitted"))


@pytest.fixture(scope="session")
def searcher(molecules):
    return protocol.Searcher(molecules, ExactIndex(molecules.embeddings), k=20)


@pytest.fixture(scope="session")
def validation(molecules, splits):
    return protocol.draw_contexts(molecules, splits, "validation")


@pytest.fixture(scope="session")
def test_contexts(molecules, splits):
    return protocol.draw_contexts(molecules, splits, "test")


@pytest.fixture(scope="session")
def world():
    """(cell sizes, seed) -> TrainingSet on random rows of a sphere: one clustering into cells of
    these sizes and one with all training items in a single cell; five rows are held out."""

    def make(sizes, seed=0, *, levels=None, share=0.1, least=2):
        rng = np.random.default_rng(seed)
        n = sum(sizes) + 5
        x = rng.normal(size=(n, 4))
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        rows = rng.permutation(n)[:-5].astype(np.int32)  # training rows, cell after cell
        parts = [*np.split(rows, np.cumsum(sizes)[:-1]), rows]
        members = np.full((len(parts), len(rows)), -1, np.int32)
        membership = np.full((2, n), -1, np.int32)
        for c, part in enumerate(parts):
            members[c, : len(part)] = part
            membership[int(c == len(sizes)), part] = c
        cells = tr.Cells(members, membership, np.array([0] * len(sizes) + [1]))
        cosine = x[rows] @ x[rows].T - 2 * np.eye(len(rows))
        neighbours = np.full((n, min(5, len(rows) - 1)), -1, np.int32)
        neighbours[rows] = rows[np.argsort(-cosine, axis=1)[:, : neighbours.shape[1]]]
        density = rng.random((2, n)).astype(np.float32)
        if levels:  # many ties
            density = np.floor(density * levels).astype(np.float32) / levels
        seen = rng.choice([-1, 0, 1], (2, n), p=[0.4, 0.4, 0.2]).astype(np.int8)
        tails = tr.fit_tails(cells, density, seen, share=share, least=least)
        return TrainingSet(x, np.sort(rows), density, seen == 1, cells, neighbours, tails)

    return make
