"""Fashion facets: a small table worked out by hand, and the real one."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from genret.catalogue import kaggle
from genret.catalogue.facets import read
from genret.catalogue.fanout import embed
from genret.language.encoder import load_encoder
from genret.types import InputError

DATA = Path(__file__).parents[3] / "shared" / "data"

HEADER = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName\n"
# gender, usage, season, colour, name
PRODUCTS = [
    ("Men", "Casual", "Summer", "Black", "Linen Shirt"),
    ("Men", "Casual", "Summer", "Black", "Canvas Belt"),
    ("Men", "Casual", "Summer", "Blue", "linen  shirt"),
    ("Women", "Smart Casual", "Fall", "Multi", "Wool Scarf, long"),
    ("Women", "Smart Casual", "Fall", "Multi", "Felt Hat"),
    ("Unisex", "Sports", "Winter", "Navy Blue", "Ski Cap"),
    ("Unisex", "Sports", "Winter", "Navy Blue", "Canvas Belt"),
    ("Girls", "Party", "Spring", "NA", "Silk Bow"),
    ("Girls", "Party", "Spring", "", "Tulle Skirt"),
    ("Boys", "NA", "Spring", "Red", "Kite Shirt"),
    ("Boys", "NA", "Spring", "Red", "Kite Cap"),
    ("Men", "Formal", "Summer", "Black", "Tie"),
    ("Men", "Casual", "Summer", "Black", " "),
]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "styles.csv"
    rows = (f"{i},{g},A,B,C,{c},{s},2012,{u},{n}" for i, (g, u, s, c, n) in enumerate(PRODUCTS))
    path.write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_by_hand(table):
    texts = read(table, least=2, least_coloured=2)
    assert texts.contents == [
        "Linen Shirt", "Canvas Belt", "Wool Scarf, long", "Felt Hat", "Ski Cap",
        "Silk Bow", "Tulle Skirt", "Kite Shirt", "Kite Cap", "Tie",
    ]  # fmt: skip
    named = {
        query: [texts.contents[row] for row in rows]
        for query, rows in zip(texts.queries, texts.references, strict=True)
    }
    assert named == {
        "party spring fashion for girls": ["Silk Bow", "Tulle Skirt"],  # their colours are unknown
        "casual summer fashion for men": ["Linen Shirt", "Canvas Belt"],
        "unisex sports winter fashion": ["Canvas Belt", "Ski Cap"],
        "smart casual fall fashion for women": ["Wool Scarf, long", "Felt Hat"],
        "black casual summer fashion for men": ["Linen Shirt", "Canvas Belt"],
        "unisex navy blue sports winter fashion": ["Canvas Belt", "Ski Cap"],
        "multicoloured smart casual fall fashion for women": ["Wool Scarf, long", "Felt Hat"],
    }
    assert texts.max_tokens == 32 and texts.ready is None
    assert (
        texts.card["queries"].startswith("4 combinations") and "and 3 with a colour" in texts.card["queries"]
    )


def test_counts_are_of_products(table):
    """Three casual summer products for men, two of them of one name."""
    texts = read(table, least=2, least_coloured=3)
    assert len(texts.queries) == 4  # no colour has three
    with pytest.raises(InputError, match="1 combinations of facets have 3 products"):
        read(table, least=3)


def test_colours_stay_with_their_combination(table):
    for seed in range(8):
        texts = read(table, least=2, least_coloured=2, seed=seed)
        part = dict(zip(texts.queries, texts.split.tolist(), strict=True))
        assert part["casual summer fashion for men"] == part["black casual summer fashion for men"]
        assert part["unisex sports winter fashion"] == part["unisex navy blue sports winter fashion"]


def test_ready_embeddings_follow_the_rows(table):
    """Row i of the table's embeddings goes to the content first named by row i."""
    rows = np.arange(13, dtype=np.float16)[:, None] * np.ones(4, np.float16)
    texts = read(table, least=2, least_coloured=2, embeddings=rows)
    assert texts.ready[:, 0].tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 10, 11]
    with pytest.raises(InputError, match="12 rows for the 13 of styles.csv"):
        read(table, embeddings=rows[:-1])


@pytest.mark.parametrize(
    "old, new, match",
    [("usage", "use", "usage: no such column"), (",2012,Formal", ",Formal", "has 9 fields, not 10")],
)
def test_refused(table, old, new, match):
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=match):
        read(table)
    with pytest.raises(InputError, match="no such file"):
        read(table.parent / "none.csv")


def key(name):
    return " ".join(name.casefold().split())


@pytest.mark.shared
def test_real_table():
    """Counts taken with the csv module; the supplied embeddings agree with MiniLM run here."""
    given = np.load(DATA / "embeddings" / "fashion_minilm_f16.npy", mmap_mode="r")
    texts = read(DATA / "fashion" / "styles.csv", embeddings=given)
    assert len(texts.contents) == 30_901 and len(texts.queries) == 26 + 196
    assert np.bincount(texts.split)[1:].min() >= 22
    assert all(texts.max_tokens == 32 and len(rows) for rows in texts.references)
    parts = defaultdict(set)  # colour sets stay with the set they lie in
    for query, part in zip(texts.queries, texts.split, strict=True):
        if not query.startswith("unisex"):
            parts[" ".join(query.split()[-5:])].add(int(part))
    assert len(parts) == 22 and all(len(part) == 1 for part in parts.values())

    rows = kaggle.read_csv(DATA / "fashion" / "styles.csv", ["gender"], surplus_in_last=True)
    wanted = {"gender": "Men", "usage": "Casual", "season": "Summer", "baseColour": "Black"}
    expected = {key(row["productDisplayName"]) for row in rows if wanted.items() <= row.items()}
    found = texts.references[texts.queries.index("black casual summer fashion for men")]
    assert {key(texts.contents[row]) for row in found} == expected and len(found) == len(expected) > 500

    few = [i for i, query in enumerate(texts.queries) if len(query.split()) == 5][:20]
    encoder = load_encoder()
    data = embed(texts, encoder.encode)
    assert data.embeddings.shape == (30_901, 384) and data.embeddings.dtype == np.float32
    # A facet query finds its own set far above chance, which is the set's share of the pool.
    scores = data.query_embeddings[few] @ data.embeddings.T
    hits = [
        np.isin(np.argsort(-s)[:100], data.references[i]).mean() for i, s in zip(few, scores, strict=True)
    ]
    chance = [len(data.references[i]) / len(data.contents) for i in few]
    assert np.mean(hits) > 1.5 * np.mean(chance)
