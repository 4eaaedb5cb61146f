"""Fan-out data: what is refused, the file, the cache of embeddings, and the split."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.catalogue import fanout
from genret.catalogue.fanout import FanoutData, FanoutTexts, agreeing, draw_split, embed, load
from genret.catalogue.texts import deduplicated, plain
from genret.types import InputError


def encode(texts, max_tokens, salt=""):
    """A stand-in encoder: a random unit vector that depends on the text, the length and the salt."""
    seeds = (hashlib.sha256(f"{salt} {max_tokens} {text}".encode()).digest() for text in texts)
    rows = [np.random.default_rng(list(seed)).normal(size=6) for seed in seeds]
    rows = np.array(rows, np.float32).reshape(-1, 6)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make(wscr=True, **changed):
    fields = {
        "name": "small",
        "contents": ["umbrella", "shelf, of books", "café", "カフェ"],
        "queries": ["rainy day", "old library", "first date"],
        "split": np.array([0, 1, 2]),
        "references": [np.array([0]), np.array([1, 3]), np.array([3, 2, 0])] if wscr else None,
        "card": {"licence": "ours"},
    }
    return FanoutTexts(**fields | changed)


def whole(wscr=True, **changed):
    texts = make(wscr)
    fields = {
        f.name: getattr(texts, f.name) for f in dataclasses.fields(FanoutData) if hasattr(texts, f.name)
    }
    fields["embeddings"] = encode(texts.contents, 8)
    fields["query_embeddings"] = encode(texts.queries, 8)
    return FanoutData(**fields | changed)


def same(a, b):
    assert (a.name, list(a.contents), list(a.queries), a.card) == (
        b.name,
        list(b.contents),
        list(b.queries),
        b.card,
    )
    for name in ("embeddings", "query_embeddings", "split"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype
    assert (a.references is None) == (b.references is None)
    for left, right in zip(a.references or (), b.references or (), strict=True):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype == np.int32


# ---- what is refused


@pytest.mark.parametrize(
    "field, value, problem",
    [
        ("contents", [], "not a non-empty list"),
        ("contents", "umbrella", "not a non-empty list"),
        ("contents", ["a", "b", " ", "c"], "row 2 is ' '"),
        ("contents", ["a", "b", None, "c"], "row 2 is None"),
        ("queries", ["x", "y", "x"], "'x' is there twice"),
        ("split", [0, 1], r"int64\[2\] is not one of 0, 1, 2 for 3 queries"),
        ("split", [0, 1, 3], "is not one of 0, 1, 2"),
        ("split", [0, 0, 2], "no query is in validation"),
        ("references", [[0], [1]], "2 sets for 3 queries"),
        ("references", [[0], [], [1]], "the set of 'old library' is not rows of the 4 contents"),
        ("references", [[0], [1], [4]], "the set of 'first date' is not rows"),
        ("references", [[0], [-1], [1]], "is not rows"),
        ("references", [[0], [0.5], [1]], "is not rows"),
        ("references", [[0], [1, 1], [2]], "'old library' repeats a row"),
    ],
)
def test_refused_texts(field, value, problem):
    with pytest.raises(InputError, match=problem) as error:
        make(**{field: value})
    assert error.value.field == field
    with pytest.raises(InputError, match=problem):
        whole(**{field: value})


@pytest.mark.parametrize(
    "field, change, problem",
    [
        ("embeddings", lambda x: x.astype(np.float64), r"float64\[4, 6\] is not float32\[4, E\]"),
        ("embeddings", lambda x: x[:3], r"float32\[3, 6\] is not float32\[4, E\]"),
        ("embeddings", lambda x: x[0], r"float32\[6\] is not"),
        (
            "embeddings",
            lambda x: x * np.array([[1], [1.01], [1], [1]], np.float32),
            "row 1 is not of unit norm",
        ),
        ("query_embeddings", lambda x: x * np.float32(np.nan), "row 0 is not of unit norm"),
        (
            "query_embeddings",
            lambda x: x[:, :5] / np.linalg.norm(x[:, :5], axis=1, keepdims=True),
            "6 and 5 wide",
        ),
    ],
)
def test_refused_embeddings(field, change, problem):
    with pytest.raises(InputError, match=problem) as error:
        whole(**{field: change(getattr(whole(), field))})
    assert error.value.field == field


def test_what_is_accepted_is_kept_and_read_only():
    data = whole(split=[2, 0, 1], references=[[3, 1], [0], [2]])
    assert data.width == 6 and data.split.dtype == np.int8
    assert [data.rows(part).tolist() for part in fanout.SPLITS] == [[1], [2], [0]]
    assert data.references[0].tolist() == [3, 1] and data.references[0].dtype == np.int32
    for array in (data.embeddings, data.query_embeddings, data.split, data.references[0]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(InputError, match="'dev'"):
        data.rows("dev")


# ---- the file


@pytest.mark.parametrize("wscr", [True, False])
def test_file_holds_all_of_it(tmp_path, wscr):
    data = whole(wscr)
    path = data.save(tmp_path / "new" / "data.npz")
    same(load(path), data)
    assert os.listdir(path.parent) == ["data.npz"]
    first = path.read_bytes()
    whole(wscr).save(path)
    assert path.read_bytes() == first  # no date in it
    with zipfile.ZipFile(path) as file:
        card = json.loads(file.read("card.json"))
    expected = {"task": "WSCR" if wscr else "OAR", "contents": 4, "queries": 3, "width": 6, "test": 1}
    assert expected.items() <= card.items() and card["card"] == {"licence": "ours"}
    arrays = np.load(path)  # numpy reads it too
    np.testing.assert_array_equal(arrays["embeddings"], data.embeddings)


def test_truncated_at_any_place(tmp_path):
    path = whole().save(tmp_path / "data.npz")
    content = path.read_bytes()
    for size in (0, 1, 30, len(content) // 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match="truncated or not fan-out data"):
            load(path)


def test_damage_is_seen_in_every_member(tmp_path):
    path = whole().save(tmp_path / "data.npz")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        members = [(info.filename, info.header_offset, info.file_size) for info in file.infolist()]
    assert len(members) == 8
    for name, offset, size in members:
        spot = offset + 30 + len(name) + size // 2 + (20 if name.endswith(".npy") else 0)
        path.write_bytes(content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :])
        with pytest.raises(InputError, match="truncated or not fan-out data"):
            load(path)


def rewritten(path, change):
    """The file with some members changed: change(name, bytes) -> bytes, or None to leave one out."""
    with zipfile.ZipFile(path) as file:
        members = {name: change(name, file.read(name)) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            if content is not None:
                file.writestr(name, content)


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "member, content, problem",
    [
        ("card.json", b"{}", "truncated or not"),
        ("card.json", b"[1]", "truncated or not"),
        ("queries.json", b'["x", ', "truncated or not"),
        ("split.npy", None, "truncated or not"),
        ("split.npy", npy(np.array([0, 1, {}], object), allow_pickle=True), "truncated or not"),
        ("embeddings.npy", npy(np.ones((4, 6), np.float32)), "row 0 is not of unit norm"),
        ("queries.json", b'["x", "y"]', "for 2 queries"),
    ],
)
def test_foreign_members(tmp_path, member, content, problem):
    path = whole().save(tmp_path / "data.npz")
    rewritten(path, lambda name, old: content if name == member else old)
    with pytest.raises(InputError, match=problem):
        load(path)


def test_other_formats_and_no_file(tmp_path):
    path = whole().save(tmp_path / "data.npz")
    rewritten(
        path, lambda name, old: old.replace(b'"format": 1', b'"format": 7') if name == "card.json" else old
    )
    with pytest.raises(InputError, match="format 7, not 1"):
        load(path)
    np.savez(path, embeddings=np.eye(3))
    with pytest.raises(InputError, match="card.json"):
        load(path)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.npz")


def test_a_killed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = whole().save(tmp_path / "data.npz")
    before = path.read_bytes()

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np.lib.format, "write_array", die)
    with pytest.raises(KeyboardInterrupt):
        whole(False).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["data.npz"]
    monkeypatch.undo()
    with pytest.raises(InputError, match="cannot be written"):
        whole().save(path / "below_a_file.npz")


# ---- embeddings, and their cache


class Spy:
    def __init__(self, salt=""):
        self.salt, self.texts = salt, []

    def __call__(self, texts, max_tokens):
        self.texts += texts
        return encode(texts, max_tokens, self.salt)


def test_embed(tmp_path):
    spy = Spy()
    data = embed(make(max_tokens=9), spy)
    np.testing.assert_array_equal(data.embeddings, encode(make().contents, 9))
    np.testing.assert_array_equal(data.query_embeddings, encode(make().queries, 9))
    assert spy.texts == [*make().contents, *make().queries]
    assert data.references[2].tolist() == [3, 2, 0] and data.card == {"licence": "ours"}


def many(**changed):
    contents = [f"word {i}" for i in range(200)]
    return make(contents=contents, **changed)


def test_cache_spares_the_encoder(tmp_path):
    spy = Spy()
    first = embed(many(), spy, cache=tmp_path)
    assert len(spy.texts) == 203
    same(embed(many(), spy, cache=tmp_path), first)
    assert len(spy.texts) == 203 + 8 + 3  # a few rows of each are checked
    # Split, references and card are the caller's, not the file's.
    again = embed(many(split=[2, 1, 0], references=None, card={}), spy, cache=tmp_path)
    assert again.split.tolist() == [2, 1, 0] and again.references is None and again.card == {}
    assert len(spy.texts) == 203 + 22 and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("changed", [{"queries": ["a", "b", "c"]}, {"max_tokens": 8}, {"name": "other"}])
def test_other_texts_have_another_file(tmp_path, changed):
    embed(many(), encode, cache=tmp_path)
    spy = Spy()
    embed(many(**changed), spy, cache=tmp_path)
    assert len(spy.texts) == 203 and len(os.listdir(tmp_path)) == 2


def test_damaged_or_foreign_cache_is_written_anew(tmp_path):
    first = embed(many(), encode, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    same(embed(many(), encode, cache=tmp_path), first)
    assert file.read_bytes() == content
    other = embed(many(), Spy("another encoder"), cache=tmp_path)
    np.testing.assert_array_equal(other.embeddings, encode(many().contents, 64, "another encoder"))
    assert os.listdir(tmp_path) == [file.name] and file.read_bytes() != content


def test_ready_embeddings(tmp_path):
    """Half precision and another scale are taken, as unit rows; another order, width or count is not."""
    texts = many()
    ready = (3 * encode(texts.contents, 64)).astype(np.float16)
    spy = Spy()
    data = embed(many(ready=ready), spy, cache=tmp_path)
    assert len(spy.texts) == 8 + 3
    np.testing.assert_allclose(np.linalg.norm(data.embeddings, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(data.embeddings, encode(texts.contents, 64), atol=1e-3)
    for bad, problem in (
        (ready[::-1], "cosine"),
        (ready * np.nan, "cosine"),
        (ready[:, :4], "4 wide, the encoder gives 6"),
        (ready[1:], "does not fit 200 texts"),
    ):
        with pytest.raises(InputError, match=problem):
            agreeing(bad, texts.contents, encode, max_tokens=64)


# ---- split and texts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=200), st.integers(0, 99))
def test_split_keeps_groups_and_shares(groups, seed):
    try:
        split = draw_split(groups, seed=seed)
    except InputError:
        sizes = np.unique(groups, return_counts=True)[1]
        # Each of two parts takes less than a tenth and one group more than that: the rest would train.
        small = sizes[sizes <= max(np.median(sizes), len(groups) / 20)]
        assert len(sizes) < 3 or small.sum() <= len(groups) / 5 + 2 * small.max()
        return
    np.testing.assert_array_equal(split, draw_split(groups, seed=seed))
    for group in set(groups):
        assert len({int(p) for p, g in zip(split, groups, strict=True) if g == group}) == 1
    size = max(np.median([groups.count(g) for g in set(groups)]), len(groups) / 20)
    test, validation = (split == 2).sum(), (split == 1).sum()
    assert len(groups) / 10 <= test < len(groups) / 10 + size
    assert 0 < validation < len(groups) / 10 + size and (split == 0).any()


def test_split_by_hand():
    assert np.bincount(draw_split(range(173), seed=0)).tolist() == [137, 18, 18]
    assert sorted(draw_split("abc", seed=4)) == [0, 1, 2]
    assert (draw_split(range(50), seed=0) != draw_split(range(50), seed=1)).any()
    # A group larger than most, and than a twentieth, trains whatever the seed: "x" is 60 of 100.
    groups = ["x"] * 60 + list(range(40))
    assert all((draw_split(groups, seed=seed)[:60] == 0).all() for seed in range(20))
    for few in ([], ["a"], ["a", "b"], ["a", "a", "b", "b"]):
        with pytest.raises(InputError, match="do not fill"):
            draw_split(few, seed=0)


def test_deduplicated():
    firsts, number = deduplicated(["Red  Shoe", "hat", "red shoe", "HAT ", "red-shoe"])
    assert firsts.tolist() == [0, 1, 4] and number.tolist() == [0, 1, 0, 1, 2]
    assert firsts.dtype == number.dtype == np.int32


def test_plain():
    assert plain(' <a href="x:y">Dance</a>\n music <3 &amp; R&#x2F;B ') == "Dance music <3 & R/B"
    assert plain("a < b > c") == "a < b > c"
