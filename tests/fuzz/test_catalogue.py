"""Damaged catalogues and data sets: Parquet, CSV, JSON, JSON Lines, .npz."""

import contextlib
import io
import json
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from genret.catalogue import facets, fanout, format, kaggle, own, playlists, polyvore
from genret.types import InputError

TEXTS = "rain snow café カフェ umbrella tea hat".split() + ["old library", "first date", "shelf, of books"]


def written(tree) -> bytes:
    return json.dumps(tree).encode()


def units(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def encode(texts, max_tokens=0):
    """Reads texts as an encoder does: those that are no Unicode break it."""
    return units(len("".join(texts).encode()), len(texts), 6)


def embedded(texts):
    with tempfile.TemporaryDirectory() as folder:
        return fanout.embed(texts, encode, cache=folder)


COLUMNS = {
    "id": [f"item {i}" for i in range(60)],
    "embedding": [row.tolist() for row in units(0, 60, 4)],
    "attribute/a": [i % 2 == 0 for i in range(60)],
    "attribute/b": [None if i % 5 == 0 else i % 3 == 0 for i in range(60)],
    "pattern": [f"p{i % 6}" for i in range(60)],
    "group": [i // 2 for i in range(60)],
    "split": [(None, "train", "item_holdout")[i % 3] for i in range(60)],
    "text": TEXTS * 6,
}


def parquet(columns, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=25, **options)
    return file.getvalue()


def other_columns(draw, _):
    """A whole Parquet file of a catalogue with one column gone, renamed, of another type, or odd."""
    columns = {name: pa.array(values) for name, values in COLUMNS.items()}
    name, rows = draw(st.sampled_from(sorted(columns))), len(TEXTS) * 6
    odd = [
        None, "", "x", b"\xff\xfe", -1, 2**62, 0.5, float("nan"), float("inf"), True, [], [0.0] * 4, [1.0],
        [None] * 4, [1e308, 1e-308, 0.0, 1.0], [[1.0]], {"a": 1}, ["x"], np.float16(1), "train",
        "pattern_holdout",
    ]  # fmt: skip
    value, kind = draw(st.sampled_from(odd)), draw(st.sampled_from(("all", "some", "drop", "name", "type")))
    if kind == "all":
        columns[name] = pa.array([value] * rows)
    elif kind == "some":
        at = set(draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
        with contextlib.suppress(pa.ArrowException, TypeError, OverflowError):
            columns[name] = pa.array([value if i in at else v for i, v in enumerate(COLUMNS[name])])
    elif kind == "drop":
        del columns[name]
    elif kind == "name":
        new = draw(st.sampled_from(("attribute/", "id", "attribute/c", "Embedding", "pattern", "")))
        columns = {new if n == name else n: values for n, values in columns.items()}
    else:
        types = [pa.string(), pa.binary(), pa.float16(), pa.int8(), pa.null(), pa.list_(pa.float64(), 4)]
        types += [
            pa.dictionary(pa.int8(), pa.string()),
            pa.large_string(),
            pa.decimal128(5),
            pa.timestamp("s"),
        ]
        with contextlib.suppress(pa.ArrowException):
            columns[name] = columns[name].cast(draw(st.sampled_from(types)))
    return {"catalogue.parquet": parquet(columns)}


def catalogue_files():
    plain = parquet(COLUMNS, compression="none", use_dictionary=False)
    less = {name: values for name, values in COLUMNS.items() if name not in ("pattern", "group")}
    return [
        {"catalogue.parquet": plain},
        {"catalogue.parquet": parquet(COLUMNS)},
        {"catalogue.parquet": parquet(less)},
    ]


def fanout_files():
    texts = fanout.FanoutTexts(
        "small", TEXTS, TEXTS[:4], np.int8([0, 0, 1, 2]), [np.array([i]) for i in range(4)]
    )
    with tempfile.TemporaryDirectory() as folder:
        return [{"data.npz": fanout.embed(texts, encode).save(Path(folder) / "data.npz").read_bytes()}]


def other_members(any_damage, draw, files):
    """An archive whose checksums are right, with one member damaged."""
    with zipfile.ZipFile(io.BytesIO(files["data.npz"])) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members = any_damage(draw, members)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    return {"data.npz": file.getvalue()}


def csv_files():
    header = (
        "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
    )
    usages, seasons = ("Casual", "Sports", "Formal"), ("Fall", "Summer")
    rows = [
        f"{i},{'Women'[2 * (i % 2) :]},A,B,C,Black,{seasons[i % 2]},{2010 + i % 5},{usages[i % 3]},"
        f"{TEXTS[i % 9]} {i}"
        for i in range(24)
    ]
    return [{"styles.csv": "\n".join([header, *rows, ""]).encode()}]


def title_files():
    header = "show_id,type,title,country,release_year,rating,description"
    rows = [
        f's{i},{("Movie", "TV Show")[i % 2]},"NAME, {i}",United States,{2015 + i},PG,A text' for i in range(5)
    ]
    table = "\n".join([header, *rows, ""])
    return [{f"{name}_titles.csv": table.replace("NAME", name).encode() for name in kaggle.SERVICES}]


def fashion(folder):
    kaggle.fashion(folder / "styles.csv", folder / "out.parquet", encode=encode)


def playlist_files():
    tracks = "id,title,artists\n" + "".join(f'{i},"{text}",Ann\n' for i, text in enumerate(TEXTS))
    lists = [
        {"name": t, "description": f"<b>{t}</b> &amp;", "track_ids": [str(i)]} for i, t in enumerate(TEXTS)
    ]
    return [{"tracks.csv": tracks.encode(), "playlists.jsonl": b"\n".join(map(written, lists))}]


def own_files():
    lines = [
        {"query": f"query {t}", "references": [t], "split": fanout.SPLITS[i % 3]} for i, t in enumerate(TEXTS)
    ]
    return [{"contents.txt": "\n".join(TEXTS).encode(), "queries.jsonl": b"\n".join(map(written, lines))}]


def outfit_files():
    def outfit(i):
        items = [{"index": 1, "name": TEXTS[i], "categoryid": 3}, {"index": 2, "name": "", "categoryid": "4"}]
        return {"set_id": str(i), "name": TEXTS[i], "desc": None, "items": items}

    files = {name: written([outfit(3 * n), outfit(3 * n + 1)]) for n, name in enumerate(polyvore.FILES)}
    return [files | {polyvore.CATEGORIES: b"3 Dress\n4 Shoe\n"}]


def catalogue(folder):
    return format.load(folder / "catalogue.parquet", min_pattern=1)


def streaming(folder):
    return kaggle.streaming(folder, folder / "out.parquet", encode=encode)


def by_facets(folder):
    return embedded(facets.read(folder / "styles.csv", least=2, least_coloured=2))


def archive(folder):
    return fanout.load(folder / "data.npz")


# name -> loader, given what makes the damage
LOADERS = {
    "parquet": lambda damage: (catalogue_files, damage, catalogue),
    "columns": lambda _: (lambda: [{}], other_columns, catalogue),
    "fashion": lambda damage: (csv_files, damage, fashion),
    "streaming": lambda damage: (title_files, damage, streaming),
    "facets": lambda damage: (csv_files, damage, by_facets),
    "playlists": lambda damage: (playlist_files, damage, lambda f: embedded(playlists.read(f))),
    "own": lambda damage: (own_files, damage, lambda f: embedded(own.read(f))),
    "polyvore": lambda damage: (outfit_files, damage, lambda f: embedded(polyvore.read(f))),
    "fan-out": lambda damage: (fanout_files, damage, archive),
    "members": lambda damage: (fanout_files, partial(other_members, damage), archive),
}


def test_an_array_of_2_to_60_numbers_is_held_against_the_size_of_the_file(tmp_path):
    def claim(draw, members):
        return members | {"split.npy": members["split.npy"].replace(b"(4,)", b"(1152921504606846976,)")}

    (tmp_path / "data.npz").write_bytes(other_members(claim, None, fanout_files()[0])["data.npz"])
    with pytest.raises(InputError, match="split.npy is not the size of"):
        archive(tmp_path)


def test_half_a_character_is_refused_before_it_is_encoded(tmp_path):
    for name, content in playlist_files()[0].items():
        (tmp_path / name).write_bytes(content.replace(b'"rain"', b'"\\ud800"'))
    with pytest.raises(InputError, match="queries: holds .*ud800.*no character"):
        playlists.read(tmp_path)


def test_damage_is_said_in_one_error(survives):
    survives()
