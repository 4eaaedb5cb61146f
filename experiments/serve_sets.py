"""Ask an exported set retriever: python serve.py EMBEDDINGS.npy QUERIES.npy [SEED]

Prints the contents nearest to the K rows kept of each query's draw, rows of EMBEDDINGS.npy, one set a line.
EMBEDDINGS.npy: f32[N, D], the contents; QUERIES.npy: f32[B, D], queries of the same encoder. Needs jax, numpy
and flatbuffers.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax import export


class Retriever:
    """The artifact in `folder`."""

    def __init__(self, folder):
        self._program = jax.jit(export.deserialize((Path(folder) / "sets.bin").read_bytes()).call)
        self._parameters = jax.device_put(dict(np.load(Path(folder) / "parameters.npz")))

    def sets(self, queries, seed=0):
        """queries f32[B, D] of unit length -> sets f32[B, K, D] of unit length, drawn anew by each seed."""
        return np.asarray(self._program(self._parameters, queries, np.uint32(seed)))


def unit(path):
    rows = np.load(path).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    contents, queries = map(unit, sys.argv[1:3])
    drawn = Retriever(Path(__file__).parent).sets(queries, *map(int, sys.argv[3:]))
    for rows in drawn:
        print(*(contents @ rows.T).argmax(0), sep="\t")
