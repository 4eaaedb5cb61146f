"""What tests of the format and of its cache share: a small sound catalogue, and a way to disk."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

N, D = 120, 6


def make_columns(n=N, seed=0):
    """A small sound catalogue as a dict of python columns: 6 patterns of 20, two attributes."""
    rng = np.random.default_rng(seed)
    return {
        "id": [f"item-{i}" for i in range(n)],
        "embedding": [row.tolist() for row in rng.standard_normal((n, D)).astype(np.float32)],
        "pattern": [f"p{i % 6}" for i in range(n)],
        "attribute/black": [None if i % 5 == 0 else i % 2 == 0 for i in range(n)],
        "attribute/new": [i % 3 == 0 for i in range(n)],
    }


def save_table(path, data, vector=None, **types):
    vector = pa.list_(pa.float32(), D) if vector is None else vector
    types = {"embedding": vector} | types
    arrays = {name: pa.array(values, types.get(name)) for name, values in data.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), path, row_group_size=50)
    return path


@pytest.fixture
def columns():
    return make_columns


@pytest.fixture
def save():
    return save_table


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.parquet"
