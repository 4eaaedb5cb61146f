"""The fashion and streaming builders: small tables in Kaggle's formats, and the real ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from genret.catalogue import format
from genret.catalogue.kaggle import fashion, streaming
from genret.types import InputError

DATA = Path(__file__).parents[3] / "shared" / "data"

STYLES = """\
id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName
1,Men,Apparel,Topwear,Shirts,Black,Fall,2011,Casual,Turtle Check  Men Shirt
2,Men,Apparel,Topwear,Shirts,Navy Blue,Winter,2013,Formal,"Nike Women's 3.5"" Pink, Short"
3,Women,Apparel,Topwear,Tops,NA,Summer,,NA,turtle check men shirt
4,Women,Apparel,Topwear,Tops,,,2016.0,Smart Casual,Wrangler Skirt, blue, size 8
5,Women,Accessories,Bags,Clutches,Black,Spring,2012.0,Casual,
"""

HEADER = "show_id,type,title,director,cast,country,date_added,release_year,rating,duration"
HEADER += ",listed_in,description\n"
TITLES = {
    "netflix": 's1,Movie,"Up, Down",,,"France, United States",,2018,PG,90 min,Drama,"A ""lift""."\n'
    "s2,TV Show,Blood & Water,,,,,2017,TV-MA,2 Seasons,Drama,Two sisters.\n",
    "amazon_prime": 's1,Movie,"Up, Down",,,,,2018,R,90 min,Drama,Another text.\n'
    's2,Movie,"Up, Down",,,United States Minor Islands,,2019,,90 min,Drama,A remake.\n',
    "hulu": "s1,Movie,Short,,,United States,,2021,74 min,,Comedy,A clip.\n"
    "s2,TV Show,BLOOD & WATER,,,South Africa,,2017,NR,,Drama,Two  sisters.\n",
    "disney_plus": "s1,Movie,Duck,,,,,1988,TV-Y7-FV,91 min,Comedy,\n",
}


def encode(texts: list[str], max_tokens: int) -> np.ndarray:
    """A stand-in encoder: a random unit vector that depends on the text and the length."""
    seeds = (hashlib.sha256(f"{max_tokens} {text}".encode()).digest() for text in texts)
    rows = [np.random.default_rng(list(seed)).normal(size=6) for seed in seeds]
    rows = np.array(rows, np.float32).reshape(-1, 6)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def styles(tmp_path):
    path = tmp_path / "styles.csv"
    path.write_text(STYLES, encoding="utf-8")
    return path


@pytest.fixture
def titles(tmp_path):
    for service, rows in TITLES.items():
        (tmp_path / f"{service}_titles.csv").write_text(HEADER + rows, encoding="utf-8")
    return tmp_path


def columns(path: Path) -> dict[str, list]:
    return pq.read_table(path).to_pydict()


def test_fashion_columns(styles, tmp_path):
    """Worked out by hand from the five rows above."""
    got = columns(fashion(styles, tmp_path / "out.parquet", encode=encode))
    assert got["id"] == ["1", "2", "3", "4", "5"]
    assert got["text"] == [
        "Turtle Check  Men Shirt",
        "Nike Women's 3.5\" Pink, Short",
        "turtle check men shirt",
        "Wrangler Skirt, blue, size 8",  # its commas are not quoted, and it is kept
        "",
    ]
    assert got["group"][0] == got["group"][2] and len(set(got["group"])) == 4
    assert got["attribute/season_cold"] == [True, True, False, None, False]
    assert got["attribute/usage_special"] == [False, True, None, True, False]
    assert got["attribute/colour_black"] == [True, False, None, None, True]
    assert got["attribute/year_2013"] == [False, True, None, True, False]
    assert not {"pattern", "split"} & set(got)
    np.testing.assert_array_equal(np.array(got["embedding"], np.float32), encode(got["text"], 32))


def test_streaming_columns(titles, tmp_path):
    """Worked out by hand; of title and year, Prime's first row repeats both, its second one."""
    got = columns(streaming(titles, tmp_path / "out.parquet", encode=encode))
    assert got["id"] == [
        "netflix/s1",
        "netflix/s2",
        "amazon_prime/s2",
        "hulu/s1",
        "hulu/s2",
        "disney_plus/s1",
    ]
    assert got["text"][0] == 'Up, Down. A "lift".' and got["text"][-1] == "Duck. "
    assert got["group"][1] == got["group"][4] and len(set(got["group"])) == 5
    # "74 min" stands in the rating's place, and NR means not rated: unknown, both.
    assert got["attribute/family_safe"] == [True, False, None, None, None, True]
    assert got["attribute/series"] == [False, True, False, False, True, False]
    assert got["attribute/released_2018"] == [True, False, True, True, False, False]
    assert got["attribute/us_produced"] == [True, None, False, True, False, None]
    np.testing.assert_array_equal(np.array(got["embedding"], np.float32), encode(got["text"], 64))


def test_files_in_the_order_given(titles, tmp_path):
    paths = [titles / f"{service}_titles.csv" for service in ("amazon_prime", "netflix")]
    got = columns(streaming(paths, tmp_path / "out.parquet", encode=encode))
    assert got["id"] == ["amazon_prime/s1", "amazon_prime/s2", "netflix/s2"]


def test_each_distinct_text_is_encoded_once(styles, tmp_path):
    styles.write_text(STYLES + STYLES.splitlines()[1].replace("1,", "6,", 1) + "\n")
    seen = []

    def spy(texts, max_tokens):
        seen.extend(texts)
        return encode(texts, max_tokens)

    got = columns(fashion(styles, tmp_path / "out.parquet", encode=spy))
    assert len(seen) == len(set(seen)) == 5
    assert got["embedding"][0] == got["embedding"][5]


def test_given_embeddings(styles, tmp_path):
    """Half precision and another scale are taken; another row order, width or length is not."""
    texts = columns(fashion(styles, tmp_path / "a.parquet", encode=encode))["text"]
    given = (3 * encode(texts, 32)).astype(np.float16)
    got = columns(fashion(styles, tmp_path / "b.parquet", encode=encode, embeddings=given))
    np.testing.assert_array_equal(np.array(got["embedding"], np.float16), given)
    for bad, match in (
        (given[::-1], "cosine"),
        (given * np.nan, "cosine"),
        (given[:, :3], "3 wide, the encoder gives 6"),
        (given[:-1], "does not fit 5 items"),
    ):
        with pytest.raises(InputError, match=match):
            fashion(styles, tmp_path / "c.parquet", encode=encode, embeddings=bad)
    assert not (tmp_path / "c.parquet").exists()


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("baseColour", "color", "baseColour: no such column in styles.csv"),
        ("2011", "MMXI", "'MMXI' in data row 1 of styles.csv is not a year"),
        ("1,Men,Apparel,Topwear,", "1,Men,Apparel,", "data row 1 has 9 fields, not 10"),
        ('"Nike', '"Ni"ke', "not a UTF-8 CSV table"),
        (STYLES, "", "not a UTF-8 CSV table"),
        (STYLES, STYLES.splitlines()[0], "holds no rows"),
    ],
)
def test_bad_table(styles, tmp_path, old, new, match):
    styles.write_text(STYLES.replace(old, new, 1))
    with pytest.raises(InputError, match=match):
        fashion(styles, tmp_path / "out.parquet", encode=encode)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="netflix_titles.csv: no such file"):
        streaming(tmp_path, tmp_path / "out.parquet", encode=encode)
    with pytest.raises(InputError, match="styles.csv: no such file"):
        fashion(tmp_path / "styles.csv", tmp_path / "out.parquet", encode=encode)


# ---- the real tables, with counts and shares taken from them by hand with the csv module


def stand_in(given: np.ndarray):
    """Plays the encoder by giving back the supplied rows: only the tables are under test here."""
    size = min(8, len(given))
    rows = np.random.default_rng(0).choice(len(given), size, replace=False)
    return lambda texts, max_tokens: np.asarray(given[rows], np.float32)


def shares(catalogue) -> dict[str, float]:
    """Positives among all items, the unknown included."""
    pairs = zip(catalogue.attribute_names, catalogue.labels, strict=True)
    return {name: round(float((label == 1).mean()), 2) for name, label in pairs}


@pytest.mark.shared
def test_real_fashion(tmp_path):
    given = np.load(DATA / "embeddings" / "fashion_minilm_f16.npy", mmap_mode="r")
    path = tmp_path / "fashion.parquet"
    fashion(DATA / "fashion" / "styles.csv", path, encode=stand_in(given), embeddings=given)
    catalogue = format.load(path, cells=40)
    texts = catalogue.texts.to_pylist()
    assert catalogue.num_items == 44_446 and len(set(texts)) == 31_136
    expected = {"season_cold": 0.45, "usage_special": 0.22, "colour_black": 0.22, "year_2013": 0.31}
    assert shares(catalogue) == expected
    # 21 seasons, 317 usages, 15 colours and one year are empty in the table
    assert (catalogue.labels == -1).sum(axis=1).tolist() == [21, 317, 15, 1]
    first = {}  # one group, one embedding: names that differ in case or spacing only
    for row in range(0, 44_446, 7):
        seen = first.setdefault(catalogue.groups[row], row)
        assert catalogue.embeddings[row] @ catalogue.embeddings[seen] > 0.999


@pytest.mark.shared
def test_real_streaming(tmp_path):
    given = np.load(DATA / "embeddings" / "streaming_minilm_f16.npy", mmap_mode="r")
    path = tmp_path / "streaming.parquet"
    streaming(DATA / "streaming", path, encode=stand_in(given), embeddings=given)
    catalogue = format.load(path, cells=40)
    assert catalogue.num_items == 22_597
    assert shares(catalogue) == {
        "family_safe": 0.28,
        "series": 0.28,
        "released_2018": 0.41,
        "us_produced": 0.27,
    }
    unknown = (catalogue.labels == -1).sum(axis=1)
    assert unknown[3] == 11_253 and unknown[1] == unknown[2] == 0  # half of the countries are empty


@pytest.mark.shared
def test_real_order_agrees_with_the_encoder(tmp_path):
    from genret.language.encoder import load_encoder

    given = np.load(DATA / "embeddings" / "streaming_minilm_f16.npy", mmap_mode="r")
    path, encoder = tmp_path / "streaming.parquet", load_encoder()
    streaming(DATA / "streaming", path, encode=encoder.encode, embeddings=given)
    with pytest.raises(InputError, match="cosine"):
        streaming(DATA / "streaming", path, encode=encoder.encode, embeddings=given[::-1])
