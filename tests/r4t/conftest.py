"""Synthetic sets without a policy: what the set stages read, made by hand."""

import numpy as np
import pytest

from genret.r4t.synthesis import SyntheticSets


@pytest.fixture(scope="session")
def sets_of():
    """(targets f32[n, K, D], query i32[n], present, reward) -> SyntheticSets in two shards."""

    def make(targets, query, present=None, reward=None):
        n, rows, _ = targets.shape
        present = np.ones((n, rows), bool) if present is None else present
        reward = np.full(n, np.nan, np.float32) if reward is None else np.float32(reward)
        targets = np.float32(targets * present[..., None])
        parts = targets[: n // 2], targets[n // 2 :]
        return SyntheticSets(parts, present, np.int32(query), reward, np.full((n, rows), -1), {}, {})

    return make
