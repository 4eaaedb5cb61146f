"""Ask an exported set retriever: python serve.py EMBEDDINGS.npy QUERIES.npy [SEED]

Prints the contents that each query's set lands on, rows of EMBEDDINGS.npy, one set a line.
EMBEDDINGS.npy: f32[N, D], the contents; QUERIES.npy: f32[B, D], queries of the same encoder. Needs jax, numpy
and flatbuffers.
"""

import json
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
        self._settings = json.loads((Path(folder) / "card.json").read_text())["settings"]

    def sets(self, queries, seed=0):
        """queries f32[B, D] of unit length -> sets f32[B, L, D] of unit length, drawn anew by each seed."""
        return np.asarray(self._program(self._parameters, queries, np.uint32(seed)))

    def contents(self, query, rows, embeddings):
        """Rows f32[L, D] of one set -> the contents that it answers with, rows of `embeddings` f32[N, D]."""
        cosine = embeddings @ rows.T
        landed, near, weight = cosine.argmax(0), cosine.max(0), self._settings["grounded"]
        if weight is None:  # the program has left out what it does not keep
            return landed
        found = embeddings[landed]
        relevance = score = found @ query + weight * near
        nearest, picks = np.full(len(rows), -1.0), []
        for _ in range(self._settings["kept"]):  # maximal marginal relevance
            picks.append(int(score.argmax()))
            nearest = np.maximum(nearest, found @ found[picks[-1]])
            score = (relevance - nearest) / 2
            score[picks] = -np.inf
        return landed[picks]


def unit(path):
    rows = np.load(path).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    contents, queries = map(unit, sys.argv[1:3])
    retriever = Retriever(Path(__file__).parent)
    drawn = retriever.sets(queries, *map(int, sys.argv[3:]))
    for query, rows in zip(queries, drawn, strict=True):
        print(*retriever.contents(query, rows, contents), sep="\t")
