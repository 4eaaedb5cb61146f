"""What MO-DiT's tests share: small catalogues written by hand, and one fit on real molecules."""

import numpy as np
import pytest

from genret.catalogue import format
from genret.catalogue.splits import make_splits
from genret.modit import fitting, protocol
from genret.retrieval.index import ExactIndex
from genret.training.loop import FitOptions


@pytest.fixture(scope="session")
def catalogue_of(tmp_path_factory):
    """(embeddings, attributes, patterns) -> a catalogue that went through the disk."""

    def make(embeddings, attributes, patterns=None):
        n = len(embeddings)
        path = tmp_path_factory.mktemp("small") / "small.parquet"
        format.write(
            path, ids=[f"item {i}" for i in range(n)], embeddings=np.asarray(embeddings, np.float32),
            attributes=attributes, patterns=np.arange(n) % 5 if patterns is None else patterns,
        )  # fmt: skip
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
