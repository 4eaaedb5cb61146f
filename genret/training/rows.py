"""Leaves of a batch that are read a few rows at a time, so that each process reads its own rows alone.

A stage draws row numbers for the whole batch, which costs little and is alike in all processes; what is
looked up by them, embeddings of a memory-mapped catalogue, is read where `mesh.place` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from genret.types import PyTree


class ByRow:
    """An array f32[B, ...] none of whose rows has been read.

    shape: of the whole. read: i64[n] of its rows -> [n, ...], a pure function. Slicing the leading
    axis reads those rows, `np.asarray` all of them.
    """

    def __init__(self, shape: tuple[int, ...], read: Callable[[np.ndarray], np.ndarray]):
        self.shape, self.dtype, self.read = tuple(shape), np.dtype(np.float32), read

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        rows = self.read(np.arange(len(self))[first])
        return np.asarray(rows, self.dtype)[(slice(None), *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def read_all(tree: PyTree) -> PyTree:
    """The tree with every `ByRow` read whole."""
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, ByRow) else x, tree)
