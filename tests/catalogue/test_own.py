"""A folder of one's own: a small one worked out by hand, and what is refused."""

import json

import numpy as np
import pytest

from genret.catalogue.own import read
from genret.types import InputError

CONTENTS = "umbrella\n\n  Red Boots \nred  boots\ntea\n"
QUERIES = [
    {"query": " rainy day", "references": ["umbrella", "Red Boots", "red  boots"], "split": "train"},
    {"query": "warm drinks", "references": ["tea "], "split": "validation"},
    {"query": "a walk", "references": ["red  boots"], "split": "test"},
]


def write(folder, contents=CONTENTS, queries=QUERIES):
    (folder / "contents.txt").write_text(contents, encoding="utf-8")
    lines = [each if isinstance(each, str) else json.dumps(each) for each in queries]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_by_hand(tmp_path):
    (folder := tmp_path / "wardrobe").mkdir()
    texts = read(write(folder))
    assert texts.name == "wardrobe"
    assert texts.contents == ["umbrella", "Red Boots", "tea"]  # two lines that differ in spacing are one
    assert texts.queries == ["rainy day", "warm drinks", "a walk"]
    assert [rows.tolist() for rows in texts.references] == [[0, 1], [2], [1]]
    assert texts.split.tolist() == [0, 1, 2]
    assert texts.card == {"contents": "3 texts of 4 lines", "split": "as given"}


def test_without_references_it_is_open_ended_and_without_a_split_one_is_drawn(tmp_path):
    queries = [{"query": f"query {i}"} for i in range(40)]
    texts = read(write(tmp_path, queries=queries), seed=3)
    assert texts.references is None
    assert np.bincount(texts.split).tolist() == [32, 4, 4]
    assert (texts.split == read(tmp_path, seed=3).split).all()
    assert (texts.split != read(tmp_path, seed=4).split).any()


def test_what_an_editor_leaves_is_no_text(tmp_path):
    """A byte order mark before the first line, and empty lines after the last."""
    plain = read(write(tmp_path))
    for name in ("contents.txt", "queries.jsonl"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text + "\n\n", encoding="utf-8-sig")
    marked = read(tmp_path)
    assert (marked.contents, marked.queries) == (plain.contents, plain.queries)


def test_queries_that_the_encoder_reads_alike_stay_in_one_part(tmp_path):
    queries = [{"query": q} for i in range(40) for q in (f"Red dress {i}", f"red  dress {i}")]
    for seed in range(4):
        split = read(write(tmp_path, queries=queries), seed=seed).split.reshape(40, 2)
        assert (split[:, 0] == split[:, 1]).all()


@pytest.mark.parametrize(
    "change, match",
    [
        (
            {"queries": [*QUERIES, QUERIES[0] | {"query": "Rainy Day", "split": "test"}]},
            "split: 'Rainy Day' is in two parts, in other case or spacing",
        ),
        ({"contents": "\n \n"}, "contents.txt: holds no content"),
        ({"queries": []}, "queries.jsonl: holds no query"),
        ({"queries": ['{"query": "a"']}, "line 1 of queries.jsonl: not a query"),
        ({"queries": [*QUERIES, "[1]"]}, "line 4 of queries.jsonl: has no text under"),
        ({"queries": [{"query": 3}]}, "line 1 of queries.jsonl: has no text under"),
        ({"queries": [{"query": "a", "reference": []}]}, "line 1 of queries.jsonl: unknown key 'reference'"),
        ({"queries": [{"query": "a", "split": "dev"}]}, "line 1 of queries.jsonl: split 'dev'. Use one of"),
        ({"queries": [{"query": "a", "split": 0}]}, "line 1 of queries.jsonl: split 0"),
        ({"queries": [{"query": "a", "references": "tea"}]}, 'line 1 of queries.jsonl: "references" is no'),
        ({"queries": [{"query": "a", "references": []}]}, 'line 1 of queries.jsonl: "references" is no'),
        ({"queries": [{"query": "a", "references": ["gin"]}]}, "references: 'gin', of 'a', is not in"),
        ({"queries": [*QUERIES, {"query": "b"}]}, "references: 3 of 4 queries have it. Give it to all"),
        ({"queries": [{"query": "a"}, {"query": "b", "split": "test"}]}, "split: 1 of 2 queries have it"),
        ({"queries": [{"query": "a"}]}, "queries: 1 queries in 1 groups do not fill"),
        ({"queries": [*QUERIES, QUERIES[0]]}, "queries: 'rainy day' is there twice"),
        ({"queries": [{"query": " "}] * 40}, "queries"),
        ({"queries": QUERIES[:2]}, "split: no query is in test"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, match):
    with pytest.raises(InputError, match=match):
        read(write(tmp_path, **change))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="contents.txt: no such file. Pass the folder"):
        read(tmp_path)
    write(tmp_path)
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(InputError, match="queries.jsonl: no such file"):
        read(tmp_path)
    for name in ("contents.txt", "queries.jsonl"):
        (write(tmp_path) / name).write_bytes(b"\xff\xfe")
        with pytest.raises(InputError, match=f"{name}: not UTF-8"):
            read(tmp_path)
