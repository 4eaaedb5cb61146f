"""The word pool: its rule on small lists, its reader on files of our own, and wordfreq's real list."""

from __future__ import annotations

import gzip
import importlib.metadata

import msgpack
import numpy as np
import pytest

from genret.catalogue import words
from genret.catalogue.fanout import embed
from genret.catalogue.words import content_words, read_bands, read_words, read_zipf, themed
from genret.language.encoder import load_encoder
from genret.types import InputError


def family(english):
    """Gives every word another form, too rare to be in the pool itself."""
    return english | {f"{word}ness": 1.7 for word in english}


@pytest.mark.parametrize(
    "english, kept",
    [
        # letters and length
        ({"lamp": 4.0, "café": 4.0, "b2b2": 4.0, "it's": 4.0, "ox": 5.0, "extraordinarily": 4.0}, "lamp"),
        ({"sea": 5.06, "ice": 4.2, "fog": 4.19}, "sea ice"),
        # frequency
        ({"lamp": 5.51, "vase": 5.5, "fern": 2.5, "moss": 2.49}, "vase fern"),
        # grammar and crudeness
        ({"because": 5.4, "fucking": 5.0, "shitty": 4.0, "shade": 4.0}, "shade"),
        # inflections of a word at least as common
        ({"tree": 4.0, "trees": 4.1, "lamp": 4.0, "lamps": 4.0}, "tree trees lamp"),
        ({"box": 4.5, "city": 4.2, "cities": 4.1, "boxes": 4.0}, "box city"),
        ({"glas": 4.0, "glass": 4.0}, "glas glass"),
        ({"stop": 4.2, "stopped": 4.1, "carry": 4.0, "carried": 3.9}, "stop carry"),
        ({"bake": 3.5, "baked": 3.4, "baking": 3.4, "king": 4.9, "seed": 4.3}, "bake king seed"),
        ({"slow": 4.4, "slower": 3.8, "slowest": 3.0}, "slow"),
        ({"happy": 4.5, "happier": 3.5, "happiest": 3.4}, "happy"),
        ({"bake": 3.5, "baker": 3.4, "bakest": 1.9, "lone": 4.0, "loner": 3.0}, "bake baker lone loner"),
        ({"meet": 4.9, "meeting": 4.8, "new": 5.3, "news": 5.2}, "meet meeting new news"),
        # adverbs
        ({"slight": 3.0, "slightly": 4.3, "basic": 4.0, "basically": 4.2}, "slight basic"),
        ({"possible": 4.9, "possibly": 4.8, "happy": 4.5, "happily": 4.6}, "possible happy"),
        ({"bad": 4.9, "badly": 4.4, "bel": 3.2, "belly": 4.1}, "bad belly"),
        ({"friend": 5.3, "friendly": 4.4}, "friend friendly"),
    ],
)  # fmt: skip
def test_rule(english, kept):
    assert set(content_words(family(english), [{}])) - set(family({})) == set(kept.split())


def test_names_and_foreign_words_are_as_common_elsewhere():
    english = family({"kevin": 4.6, "casa": 3.5, "hotel": 4.95, "garden": 4.8, "raincoat": 2.7})
    others = [
        {"kevin": 4.4, "casa": 3.5, "hotel": 4.9, "garden": 3.6},
        {"kevin": 4.3, "casa": 5.8, "hotel": 3.9, "garden": 3.5},
        {"kevin": 4.2, "casa": 5.9, "hotel": 4.8},
    ]
    # The median of three: 1.3 below garden, 1.7 below raincoat (a word a language lacks counts 1).
    assert content_words(english, others) == ["garden", "raincoat"]
    assert content_words({"lamp": 4.0, "lamps": 3.0}, [{"lamp": 3.2}]) == ["lamp"]  # exactly ENGLISH
    assert content_words({"lamp": 4.0, "lamps": 3.0}, [{"lamp": 3.21}]) == []


@pytest.mark.parametrize(
    "word, relative, kept",
    [
        ("lamp", "lamps", True),
        ("lamp", "lampo", False),
        ("stormy", "storm", True),
        ("foggy", "fog", True),
        ("bake", "baking", True),
        ("stop", "stopping", True),
        ("knife", "knives", False),
        ("shelf", "shelves", True),
        ("story", "stories", True),
        ("scissors", "scissor", True),
        ("tenderness", "x", True),  # by its suffix
        ("usmc", "x", False),
    ],
)
def test_family(word, relative, kept):
    assert content_words({word: 3.5, relative: 1.6}, [{}]) == [word] * kept
    if relative != "x":
        assert content_words({word: 3.5, relative: 1.59}, [{}]) == []


def test_compounds_need_no_other_form():
    english = {"night": 4.9, "life": 5.6, "nightlife": 3.5, "lynch": 3.7, "burg": 3.4, "lynchburg": 3.0}
    assert content_words(english, [{}]) == ["nightlife"]
    assert content_words(english | {"life": 4.19}, [{}]) == []


def write_bands(path, bands, header=None, compress=True):
    content = msgpack.packb([header or {"format": "cB", "version": 1}, *bands])
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


def test_bands(tmp_path):
    """Band i holds the words of -i centibels: 10^(-i/100) of all words, 10^9 of which are Zipf 9."""
    path = write_bands(tmp_path / "x.msgpack.gz", [[], ["the"], [], ["lamp", "fern"]])
    assert read_bands(path) == {"the": 8.99, "lamp": 8.97, "fern": 8.97}
    assert list(read_bands(path)) == ["the", "lamp", "fern"]


def test_damaged_list(tmp_path):
    path = write_bands(tmp_path / "x.msgpack.gz", [[f"word{i}" for i in range(999)]])
    content = path.read_bytes()
    damaged = [content[:-9], content[:100], content[:3], b"", b"plain text"]
    damaged.append(content[:200] + bytes(20) + content[220:])
    for damage in damaged:
        path.write_bytes(damage)
        with pytest.raises(InputError, match="not readable as a word list"):
            read_bands(path)
    for options in ({"header": {"format": "cB", "version": 2}}, {"header": [1]}, {"compress": False}):
        write_bands(path, [["a"]], **options)
        with pytest.raises(InputError, match="not readable as a word list"):
            read_bands(path)
    path.write_bytes(gzip.compress(msgpack.packb(7)))
    with pytest.raises(InputError, match="not readable as a word list"):
        read_bands(path)
    with pytest.raises(
        InputError, match="not readable as a word list.*\n?.*pip install --no-deps wordfreq==3.1.1"
    ):
        read_bands(tmp_path / "none")


def test_missing_package_and_language(monkeypatch):
    with pytest.raises(InputError, match="large_xx"):
        read_zipf("xx")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(InputError, match="wordfreq is not installed. pip install --no-deps wordfreq==3.1.1"):
        read_words(10)


# ---- the real list


@pytest.fixture(scope="module")
def pool():
    return read_words()


def test_zipf_of_the_real_list():
    """Against what `zipf_frequency` of the package itself gives: 7.73 for "the", 3.89 for "umbrella"."""
    zipf = read_zipf("en")
    assert len(zipf) == 321_180 and zipf["the"] == 7.73 and zipf["umbrella"] == 3.89
    assert list(zipf.values()) == sorted(zipf.values(), reverse=True)


def test_real_pool(pool):
    assert len(set(pool)) == len(pool) == 16_000
    expected = """
        library umbrella lantern candle raincoat storm stormy sunlight nightlife tenderness butterfly evening
        wedding harbour lighthouse melancholy kitchen garden bread ocean moon winter snow rain cosy cottage
        guitar painting sea ice hat wild
    """.split()
    assert not set(expected) - set(pool)
    unwanted = """
        the because really john smith kevin paris google facebook nba que para casa walking walked
        walks slightly basically fuck happier tallest john's usmc
    """.split()
    assert not set(unwanted) & set(pool)
    zipf = read_zipf("en")
    assert all(zipf[a] >= zipf[b] for a, b in zip(pool, pool[1:], strict=False))
    assert pool[:5] == read_words(5)


def test_few_names_in_the_real_pool(pool):
    """The commonest first names and US states that wordfreq lists, all capitals in print."""
    names = """
        james robert michael william david richard joseph thomas charles mary patricia jennifer linda
        elizabeth barbara susan jessica sarah karen daniel matthew anthony steven andrew joshua kenneth
        brian george edward nancy lisa betty margaret sandra ashley kimberly emily donna michelle carol
        amanda melissa deborah alabama alaska arizona arkansas california colorado florida hawaii idaho
        illinois indiana iowa kansas kentucky louisiana maine maryland michigan minnesota montana
        nebraska nevada ohio oklahoma oregon texas tennessee utah vermont virginia wisconsin wyoming
    """.split()
    left = set(names) & set(pool)
    assert len(left) < 0.1 * len(names), left


def test_sizes(pool):
    with pytest.raises(InputError, match="1000000 of 17433 words. Pass at most 17433"):
        read_words(1_000_000)
    with pytest.raises(InputError, match="0 words"):
        read_words(0)


def test_a_foreign_version_is_said(monkeypatch):
    monkeypatch.setattr(words, "WORDS", 5)
    with pytest.raises(InputError, match="321180 English words, not 5"):
        read_words(5)


def test_themed_is_embedded(pool):
    """150 themes over 60 words by MiniLM: what a theme names is among its three nearest words."""
    texts = themed(size=60, count=150, seed=3)
    assert texts.contents == pool[:60] and len(texts.queries) == 150 and texts.references is None
    assert np.bincount(texts.split)[1:].min() >= 15
    assert "60 commonest" in texts.card["contents"] and "seed 3" in texts.card["queries"]
    data = embed(texts, load_encoder().encode)
    assert data.embeddings.shape == (60, 384) and data.query_embeddings.shape == (150, 384)
    nearest = np.argsort(-data.query_embeddings @ data.embeddings.T)[:, :3]
    found = []
    for query, rows in zip(data.queries, nearest, strict=True):
        named = set(query.split()) & set(data.contents)
        found += [bool(named & {data.contents[i] for i in rows})] if named else []
    assert len(found) >= 10 and all(found)
