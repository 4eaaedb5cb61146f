"""The memory of training cells against hand-computed softmaxes and a second way of computing centroids."""

import numpy as np
import pytest

from genret.modit.baselines import seed_mean
from genret.modit.memory import Memory, make_memory

CENTRES = np.array([[1, 0], [0, 1]], np.float32)
TAILS = np.array([[[0.6, 0.8], [0, 1]], [[1, 0], [-1, 0]]], np.float32)  # [domain, cell, :]


def test_the_lift_by_hand():
    memory = Memory(CENTRES, TAILS)
    starts = np.array([[1, 0], [1, 0], [0.6, 0.8]], np.float32)
    found = memory.lift(starts, np.array([0, 1, 1]), 0.5)
    # Cosines 1 and 0 at temperature .5: shares e² / (e² + 1) and 1 / (e² + 1).
    a = np.exp(2) / (np.exp(2) + 1)
    expected = [
        a * np.array([0.6 - 0.5, 0.8]) + (1 - a) * np.array([0, 1 - 0.5]),
        a * np.array([1 - 0.5, 0]) + (1 - a) * np.array([-1, -0.5]),
    ]
    np.testing.assert_allclose(found[:2], expected, atol=1e-6)
    b = 1 / (1 + np.exp(0.4))  # cosines .6 and .8: a difference of .2 / .5
    np.testing.assert_allclose(found[2], b * np.array([0.5, 0]) + (1 - b) * np.array([-1, -0.5]), atol=1e-6)


def test_a_cold_memory_is_a_lookup_and_a_hot_one_the_mean():
    memory, domain = Memory(CENTRES, TAILS), np.array([0, 1])
    starts = np.array([[0.8, 0.6], [0.6, 0.8]], np.float32)
    nearest = memory.nearest(starts, domain)
    np.testing.assert_array_equal(nearest, [TAILS[0, 0], TAILS[1, 1]])
    cold = memory.lift(starts, domain, 1e-3)
    np.testing.assert_allclose(cold, nearest - CENTRES / 2, atol=1e-6)
    hot = memory.lift(starts, domain, 1e6)
    np.testing.assert_allclose(hot, TAILS.mean(1) - CENTRES.mean(0) / 2, atol=1e-5)


@pytest.mark.parametrize("domain", range(4))
def test_what_is_remembered(fitted, domain):
    data, memory = fitted.data, make_memory(fitted.data)
    x = np.asarray(data.embeddings, np.float64)
    for cell in (0, 3, len(data.cells.members) - 1):
        for found, rows in (
            (memory.centres[cell], data.cells.members[cell]),
            (memory.tails[domain, cell], data.tails.tail[domain, cell]),
        ):
            mean = x[rows[rows >= 0]].mean(0)
            np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


def test_training_cells_alone_are_remembered(fitted, test_contexts):
    # No context moves another's lift, and none of the questions' own rows is read.
    memory = make_memory(fitted.data)
    starts = seed_mean(fitted.data.embeddings, test_contexts)
    whole = memory.lift(starts, test_contexts.domain, 0.05)
    part = memory.lift(starts[5:9], test_contexts.domain[5:9], 0.05)
    np.testing.assert_allclose(whole[5:9], part, atol=1e-6)
    rows = fitted.data.cells.members
    assert not np.isin(test_contexts.seeds[test_contexts.seeds >= 0], rows).any()
