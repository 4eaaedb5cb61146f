"""A memory of the training cells: what leads their centres to their tails leads a new seed set on as well.

Not in the papers. It needs no training and shifts the query of any model, so ours and the strongest rival
both have a line with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genret.modit.stages import TrainingSet


@dataclass(frozen=True)
class Memory:
    """centres: unit-norm f32[C, D] of the latent cells. tails: unit-norm f32[M, C, D], the centroids of their
    predicted tails."""

    centres: np.ndarray
    tails: np.ndarray

    def nearest(self, starts: np.ndarray, domain: np.ndarray) -> np.ndarray:
        """Tail centroid f32[Q, D] of the cell nearest to starts f32[Q, D]; domain: i32[Q]."""
        return self.tails[domain, (starts @ self.centres.T).argmax(1)]

    def lift(self, starts: np.ndarray, domain: np.ndarray, temperature: float) -> np.ndarray:
        """Σ_c a_c (tail_c - centre_c / 2) with a = softmax(starts · centres / temperature), f32[Q, D].

        Half the centre stays: the whole tail pulls towards seen patterns, the bare difference out of any.
        """
        logits = starts @ self.centres.T / temperature
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        out = -share @ self.centres / 2
        for m in np.unique(domain):
            here = domain == m
            out[here] += share[here] @ self.tails[m]
        return out


def make_memory(data: TrainingSet) -> Memory:
    """The cells and predicted tails that the stages train on."""
    tails = np.stack([_centroids(data.embeddings, tail) for tail in data.tails.tail])
    return Memory(_centroids(data.embeddings, data.cells.members), tails)


def _centroids(embeddings: np.ndarray, items: np.ndarray, block: int = 512) -> np.ndarray:
    """Unit-norm mean embedding of rows of items i32[R, L] (-1 is padding), in blocks of rows."""
    out = np.empty((len(items), embeddings.shape[1]), np.float32)
    for start in range(0, len(items), block):
        part = items[start : start + block]
        out[start : start + block] = (embeddings[np.maximum(part, 0)] * (part >= 0)[..., None]).sum(1)
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
