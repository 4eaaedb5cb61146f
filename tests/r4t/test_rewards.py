"""Rewards by hand on a world of three axes, their two normalisations, and what may go wrong with them."""

import types

import numpy as np
import pytest

from genret.r4t.rewards import OAR, WSCR, CachedEncoder, Rewards, Scores
from genret.retrieval.index import ExactIndex
from genret.types import InputError

S = np.sqrt(0.5)
# Contents: x, y, z, and the middle of x and y. Queries: x, and y.
CONTENTS = np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1], [S, S, 0]])
QUERIES = np.float32([[1, 0, 0], [0, 1, 0]])
WORDS = {
    "x": [1, 0, 0], "y": [0, 1, 0], "z": [0, 0, 1], "near x": [0.96, 0, 0.28], "not x": [-1, 0, 0],
    "middle": [S, S, 0],
}  # fmt: skip


def encode(texts):
    return np.float32([WORDS[text] for text in texts])


def world(references=None, **changes):
    data = types.SimpleNamespace(embeddings=CONTENTS, query_embeddings=QUERIES, references=references)
    return Rewards(data, ExactIndex(CONTENTS), encode, **{"k": 2} | changes)


# Worked out on paper. The content nearest to a word is the word, of "near x" it is x at cosine .96, that is
# at a distance of √(2 - 1.92) = √.08 = .2828427; "not x" is as far from y as from z, √2, and x is 2 away.


def test_open_ended_reward_by_hand():
    answers = [["x", "y"], ["near x", "x"], ["x"], None]
    found = world()(np.array([0]), [answers])
    ground = [1, (2 - 0.2828427 / 2) / 2, 1 / 2, 0]  # one of two asked for is half; a malformed one has none
    diversity = [1, 0, 0, 0]  # orthogonal representatives; the same one twice; one alone
    align = [1 / 2, (0.96 + 1) / 2, 1 / 2, 0]
    np.testing.assert_allclose(found.components["groundedness"][0], ground, atol=1e-6)
    np.testing.assert_allclose(found.components["diversity"][0], diversity, atol=1e-5)
    np.testing.assert_allclose(found.components["alignment"][0], align, atol=1e-6)
    expected = 0.6 * np.array(ground) + 0.2 * np.array(diversity) + 0.2 * np.array(align)
    np.testing.assert_allclose(found.reward[0], expected, atol=1e-5)
    assert found.valid.tolist() == [[True, True, True, False]]
    assert found.reward[0, 3] == 0


def test_diversity_is_of_what_retrieval_returns_and_not_of_the_words():
    # Two different words, one content; then x and the middle of x and y: cosine S, eigenvalues (1 ± S) / 2.
    found = world()(np.array([0, 0]), [[["near x", "x"]], [["x", "middle"]]])
    vendi = np.exp(-sum(p * np.log(p) for p in ((1 + S) / 2, (1 - S) / 2)))
    np.testing.assert_allclose(found.components["diversity"][:, 0], [0, vendi - 1], atol=1e-5)
    # Three asked for, two given: (VS - 1) / (3 - 1).
    found = world(k=3)(np.array([0]), [[["x", "y"]]])
    assert found.components["diversity"][0, 0] == pytest.approx(1 / 2, abs=1e-5)


def test_alignment_and_distance_at_their_extremes():
    found = world(weights={"groundedness": 1.0, "alignment": 1.0})(np.array([0]), [[["not x", "not x"]]])
    assert found.components["alignment"][0, 0] == pytest.approx(-1)
    assert found.components["groundedness"][0, 0] == pytest.approx(1 - np.sqrt(2) / 2)
    assert sorted(found.components) == ["alignment", "groundedness"]


def test_weakly_supervised_reward_by_hand():
    # To depth 2, x finds x and the middle, y finds y and the middle, z finds z and, of three ties, x.
    rewards = world(references=[np.array([0, 3, 2]), np.array([1])], weights=WSCR, depth=2)
    answers = [[["x", "x"], ["x", "z"]], [["x", "z"], ["y", "x"]]]
    found = rewards(np.array([0, 1]), answers)
    np.testing.assert_allclose(found.reward, [[2 / 3, 1], [0, 1]], atol=1e-6)
    assert found.valid.all()
    found = rewards(np.array([1]), [[None, ["y"]]])
    np.testing.assert_allclose(found.reward, [[0, 1]])


def test_group_normalisation_by_hand():
    # Component values 1, .5, 0 of mean .5 and std .5 (2 in it): z-scores 1, 0, -1. One value for all: 0.
    rewards = world(normalise="group")
    components = {
        "groundedness": np.float32([[1, 0.5, 0]]),
        "diversity": np.float32([[0, 0.5, 1]]),
        "alignment": np.float32([[0.3, 0.3, 0.3]]),
    }
    np.testing.assert_allclose(rewards.combine(components, "group"), [[0.4, 0, -0.4]], atol=1e-4)
    plain = rewards.combine(components, "scale")
    np.testing.assert_allclose(plain, [[0.66, 0.46, 0.26]], atol=1e-6)
    # Scales do not matter under 'group', and a group of one is all mean.
    components["diversity"] *= 1000
    np.testing.assert_allclose(rewards.combine(components, "group"), [[0.4, 0, -0.4]], atol=1e-4)
    assert rewards.combine({n: v[:, :1] for n, v in components.items()}, "group") == pytest.approx(0)


def test_a_weight_of_zero_is_logged_and_not_rewarded():
    only = world(weights={"groundedness": 1.0, "diversity": 0.0, "alignment": 0.0})
    answers = [[["x", "y"], ["x", "x"], ["near x", "y"]]]
    found = only(np.array([0]), answers)
    np.testing.assert_array_equal(found.reward, found.components["groundedness"])
    full = world()(np.array([0]), answers)
    for name in OAR:
        np.testing.assert_array_equal(found.components[name], full.components[name])


def test_order_within_an_answer_and_within_a_group_does_not_matter():
    answers = [["x", "middle"], ["near x", "z"], None, ["y"]]
    found = world()(np.array([1]), [answers])
    turned = world()(np.array([1]), [[a and a[::-1] for a in answers[::-1]]])
    np.testing.assert_allclose(found.reward, turned.reward[:, ::-1], atol=1e-6)


def test_vectors_are_scored_as_the_words_they_came_from():
    rewards = world()
    answers = [["x", "middle"], ["near x"], None]
    vectors = rewards.embed(np.zeros(3, int), answers)
    assert vectors.shape == (3, 2, 3) and not vectors[1, 1].any() and not vectors[2].any()
    assert rewards.representatives(vectors).tolist() == [[0, 3], [0, -1], [-1, -1]]
    found = rewards.components(np.zeros(3, int), vectors)
    for name, values in rewards(np.array([0]), [answers]).components.items():
        np.testing.assert_array_equal(found[name], values[0])
    # More than asked for: the first k.
    assert rewards.embed(np.array([0]), [["x", "y", "z"]]).shape == (1, 2, 3)


def test_a_sub_query_in_the_context_of_its_query_by_hand():
    # In the context of x at weight 1, y is (x + y) / √2, the middle, which the pool holds; in that of y at
    # weight 3/4, x is (4, 3, 0) / 5. What is missing stays missing.
    found = world(context=1.0)(np.array([0]), [[["y", "x"], None]])
    assert found.components["groundedness"][0].tolist() == pytest.approx([1, 0])
    np.testing.assert_allclose(found.components["alignment"][0], [(S + 1) / 2, 0], atol=1e-6)
    rewards = world(context=0.75)
    vectors = rewards.embed(np.array([1, 0]), [["x"], ["not x", "z"]])
    expected = [[[0.8, 0.6, 0], [0, 0, 0]], [[-1, 0, 0], [0.6, 0, 0.8]]]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    # Opposite to its query, weight 1: no direction is left, and nothing is divided by nothing.
    assert not world(context=1.0).embed(np.array([0]), [["not x"]]).any()


def test_the_composite_is_on_the_fixed_scale_whatever_is_trained_on():
    answers = [[["x", "y"], ["x", "x"], None]]
    group, scale = (world(normalise=n)(np.array([0]), answers) for n in ("group", "scale"))
    np.testing.assert_array_equal(group.composite, scale.composite)
    np.testing.assert_array_equal(scale.reward, scale.composite)
    np.testing.assert_array_equal(group.reward, world().combine(scale.components, "group"))
    assert group.reward.mean() == pytest.approx(0, abs=1e-6) and scale.reward[0, 2] == 0 > group.reward[0, 2]


def test_summary_has_means_and_within_group_spread():
    values = np.float32([[1, 0], [1, 1]])
    scores = Scores(values - 5, np.array([[1, 0], [1, 1]], bool), values, {"recall": values})
    expected = dict(reward=0.75, valid=0.75, recall=0.75, recall_std=np.sqrt(0.5) / 2)
    assert scores.summary() == pytest.approx(expected)


def test_strings_are_encoded_once():
    calls = []

    def counting(texts):
        calls.append(list(texts))
        return encode(texts)

    cached = CachedEncoder(counting, size=3)
    np.testing.assert_array_equal(cached(["x", "y", "x"]), encode(["x", "y", "x"]))
    np.testing.assert_array_equal(cached(["y", "z"]), encode(["y", "z"]))
    assert calls == [["x", "y"], ["z"]]
    cached(["middle"])  # a fourth: the oldest leaves
    cached(["y"])
    np.testing.assert_array_equal(cached(["x"]), encode(["x"]))
    assert calls[2:] == [["middle"], ["x"]]


def test_bad_input_is_refused():
    good = dict(embeddings=CONTENTS, query_embeddings=QUERIES, references=None)
    index = ExactIndex(CONTENTS)
    for field, data, options in (
        ("embeddings", good | {"embeddings": 2 * CONTENTS}, {}),
        ("query_embeddings", good | {"query_embeddings": np.float32([[np.nan, 0, 0]])}, {}),
        ("weights", good, {"weights": {"novelty": 1.0}}),
        ("weights", good, {"weights": WSCR}),
        ("references", good | {"references": [np.array([1]), np.array([])]}, {"weights": WSCR}),
        ("normalise", good, {"normalise": "batch"}),
        ("k", good, {"k": 1}),
        ("depth", good | {"references": [np.array([1])]}, {"weights": WSCR, "depth": 5}),
        ("context", good, {"context": -0.5}),
        ("context", good, {"context": np.nan}),
        ("index", good | {"embeddings": CONTENTS[:3]}, {}),
    ):
        with pytest.raises(InputError, match=f"^{field}"):
            Rewards(types.SimpleNamespace(**data), index, encode, **{"k": 2} | options)
