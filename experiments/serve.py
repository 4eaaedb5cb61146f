"""Ask an exported retriever: python serve.py EMBEDDINGS.npy ATTRIBUTE ROW [ROW ...]

Prints the 20 items nearest to the generated query, each as its row of EMBEDDINGS.npy and its cosine; the
seeds, which are the ROWs given, are left out. EMBEDDINGS.npy: f32[N, D], the catalogue's items. Needs jax,
numpy and flatbuffers.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export


class Retriever:
    """The artifact in `folder`. card: what card.json says."""

    def __init__(self, folder):
        self.card = json.loads((Path(folder) / "card.json").read_text())
        self._program = jax.jit(export.deserialize((Path(folder) / "query.bin").read_bytes()).call)
        self._file = [self.card["parameters"][name] for name in self.card["attributes"]]
        self._sets = {file: jax.device_put(dict(np.load(Path(folder) / file))) for file in set(self._file)}

    def queries(self, seeds, mask, domain):
        """seeds f32[B, S, D] of unit length, mask bool[B, S], domain i32[B], numbers of attributes ->
        queries f32[B, D] of unit length. Each set of parameters answers the domains that are its own."""
        out = np.empty((len(seeds), seeds.shape[2]), np.float32)
        for file, parameters in self._sets.items():
            own = [b for b, m in enumerate(domain) if self._file[m] == file]
            if own:
                out[own] = self._program(parameters, seeds[own], mask[own], domain[own])
        return out

    def search(self, embeddings, rows, attribute, k=20):
        """The k items nearest to the query of seed `rows` and an attribute's name: (rows i64[k], cosines)."""
        domain = np.array([self.card["attributes"].index(attribute)], np.int32)
        seeds = np.zeros((1, *self.card["inputs"]["seeds"]["shape"][1:]), np.float32)
        if not 0 < len(rows) <= seeds.shape[1]:
            raise ValueError(f"{len(rows)} seeds, the model reads 1 to {seeds.shape[1]}")
        seeds[0, : len(rows)] = embeddings[rows]
        query = self.queries(seeds, np.arange(seeds.shape[1])[None] < len(rows), domain)[0]
        score = embeddings @ query
        score[rows] = -np.inf
        best = np.argsort(-score, kind="stable")[: min(k, len(score) - len(set(rows)))]
        return best, score[best]


if __name__ == "__main__":
    embeddings = np.load(sys.argv[1]).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = Retriever(Path(__file__).parent).search(embeddings, list(map(int, sys.argv[3:])), sys.argv[2])
    print("\n".join(f"{row}\t{cosine:.6f}" for row, cosine in zip(*found, strict=True)))
