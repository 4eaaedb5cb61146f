"""The grammar of themes: what it writes, and what its split keeps from training."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.catalogue import themes
from genret.catalogue.themes import FACETS, TEMPLATES, write
from genret.types import InputError


@pytest.fixture(scope="module")
def default():
    return write()


def test_grammar():
    values = [value for facet in FACETS.values() for value in facet]
    assert len(set(values)) == len(values) == 232  # a value belongs to one facet
    for facet, its in FACETS.items():
        bare = [value.split(" ", 2)[2] if facet == "setting" else value for value in its]
        assert all(1 <= len(value.split()) <= 2 and value == value.strip().lower() for value in bare)
        if facet == "setting":
            assert {tuple(value.split()[:2]) for value in its} <= {
                (p, a) for p in ("in", "on") for a in ("a", "an")
            }
    assert {facet for first, second, _ in TEMPLATES for facet in (first, second)} == set(FACETS)
    pairs = [frozenset(template[:2]) for template in TEMPLATES]
    assert len(set(pairs)) == len(pairs)  # so a pair of values has one template


def test_every_theme_by_hand():
    """One of each template, written out by hand."""
    written = {t.text for template in TEMPLATES for t in themes._pairs(*template)}
    assert len(written) == sum(len(FACETS[a]) * len(FACETS[b]) for a, b, _ in TEMPLATES) == 13_368
    assert written >= {
        "rainy day in an old library",
        "keeping warm on a night train",
        "harvest festival in a desert camp",
        "cosy mountain cabin",
        "art deco concert hall",
        "nordic fishing village",
        "nostalgic bird watching",
        "lonely rainy day",
        "gothic summer night",
        "film noir wedding",
        "japanese harvest festival",
        "cyberpunk meets moroccan",
        "stargazing on an autumn evening",
        "baking bread for a birthday party",
        "staying focused while knitting",
    }


def test_articles():
    words = [t.text.split() for template in TEMPLATES for t in themes._pairs(*template)]
    follows = {(a, b) for text in words for a, b in zip(text, text[1:], strict=False) if a in ("a", "an")}
    assert len(follows) > 60
    assert all((article == "an") == (word[0] in "aeiou") for article, word in follows)


def test_default(default):
    texts = [theme.text for theme in default.themes]
    assert len(set(texts)) == len(texts) == 3_000
    assert {len(text.split()) for text in texts} == {2, 3, 4, 5, 6}
    assert np.bincount(default.split).tolist() == [2_400, 300, 300]
    used = Counter(theme.facets for theme in default.themes)
    assert used == {(first, second): 200 for first, second, _ in TEMPLATES}
    assert texts[:3] == ["triumphant painting", "cleaning up in a car workshop", "growing food while skiing"]
    unseen = default.unseen()
    test = [theme for theme, part in zip(default.themes, default.split, strict=True) if part == 2]
    touched = sum(not unseen.isdisjoint(theme.values) for theme in test)
    assert len(unseen) == 12 and touched == 191  # the figures of the data's card


@settings(max_examples=15, deadline=None)
@given(st.integers(150, 2_000), st.integers(0, 10_000))
def test_no_test_theme_is_like_one_of_training(count, seed):
    """Read back from the texts alone: no pair of values of validation or test occurs in training."""
    written = write(count, seed=seed)
    assert len(written.themes) == len(written.split) == count
    pairs = []
    for theme in written.themes:
        for facet, value in zip(theme.facets, theme.values, strict=True):
            noun = value.split(" ", 2)[2] if facet == "setting" else value
            assert value in FACETS[facet] and f" {noun} " in f" {theme.text} "
        pairs.append(frozenset(theme.values))
    assert len(set(pairs)) == len(pairs) == len({theme.text for theme in written.themes})
    sizes = np.bincount(written.split, minlength=3)
    assert (sizes[1:] >= round(count / 10)).all() and sizes[0] >= 0.6 * count
    for part in (1, 2):
        seen = {v for t, s in zip(written.themes, written.split, strict=True) if s == 0 for v in t.values}
        its = {v for t, s in zip(written.themes, written.split, strict=True) if s == part for v in t.values}
        assert written.unseen(part) == its - seen


def test_each_facet_keeps_a_value_for_test(default):
    """At least one value of every facet is in no training theme; where drawn at all, it is in test."""
    for facet, values in FACETS.items():
        training = {v for t, s in zip(default.themes, default.split, strict=True) if s == 0 for v in t.values}
        assert len(set(values) - training) == 2, facet  # one for test, one for validation
    assert default.unseen(2) | default.unseen(1) == {v for f in FACETS.values() for v in f} - training


def test_seeds():
    a, b = write(300, seed=5), write(300, seed=5)
    assert a.themes == b.themes and (a.split == b.split).all()
    assert a.themes != write(300, seed=6).themes


@pytest.mark.parametrize("count", [0, 149, 8_641])
def test_count_out_of_range(count):
    with pytest.raises(InputError, match=f"{count} themes of 15 templates. Pass 150 to 8640"):
        write(count)
