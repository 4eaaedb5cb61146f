"""The format on disk: what is read back, what is refused and how, and the cache beside it."""

from __future__ import annotations

import ast
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genret.catalogue import format
from genret.catalogue.format import load, write
from genret.types import InputError

N, D = 120, 6


def test_what_is_written_is_read(path, columns, save):
    data = columns()
    data["pattern"][7] = None
    data["text"] = [None if i == 3 else f"Größe {i}" for i in range(N)]
    data["group"] = [None if i < 100 else "same" for i in range(N)]
    data["split"] = [None, "train", "item_holdout"] * (N // 3)
    catalogue = load(save(path, data))
    assert (catalogue.num_items, catalogue.width) == (N, D)
    assert (catalogue.num_patterns, catalogue.num_domains) == (6, 2)
    assert catalogue.name == "mine" and catalogue.path == path
    assert catalogue.ids.to_pylist() == data["id"]
    assert catalogue.texts.to_pylist() == data["text"]
    vectors = np.array(data["embedding"])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(catalogue.embeddings, unit, atol=1e-7)
    assert isinstance(catalogue.embeddings, np.memmap) and catalogue.embeddings.dtype == np.float32
    assert catalogue.pattern_names == tuple(f"p{i}" for i in range(6))
    np.testing.assert_array_equal(
        catalogue.patterns, [-1 if i == 7 else i % 6 for i in range(N)], strict=False
    )
    assert catalogue.attribute_names == ("black", "new")
    black = [-1 if i % 5 == 0 else int(i % 2 == 0) for i in range(N)]
    np.testing.assert_array_equal(catalogue.labels, [black, [int(i % 3 == 0) for i in range(N)]])
    assert len(set(catalogue.groups[:100])) == 100 and len(set(catalogue.groups[100:])) == 1
    assert not set(catalogue.groups[:100]) & set(catalogue.groups[100:])
    np.testing.assert_array_equal(catalogue.assigned, [-1, 0, 1] * (N // 3))
    assert (catalogue.pattern_source, catalogue.small_patterns) == ("column", 0)
    for array in (catalogue.embeddings, catalogue.labels, catalogue.patterns, catalogue.groups):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    kinds = (catalogue.patterns, catalogue.groups, catalogue.labels, catalogue.assigned)
    assert [array.dtype for array in kinds] == [np.int32, np.int32, np.int8, np.int8]


def test_example_in_the_docstring_runs(tmp_path, monkeypatch, columns):
    block = format.__doc__.split("Written with pyarrow")[1].split("\n\n")[1]
    code = textwrap.dedent(block)
    assert len(code.splitlines()) == 5 and ast.parse(code)
    monkeypatch.chdir(tmp_path)
    data = columns()
    names = {"ids": data["id"], "is_black": data["attribute/black"], "kinds": data["pattern"]}
    exec(code, names | {"vectors": np.array(data["embedding"], np.float32)})
    catalogue = load("mine.parquet")
    assert catalogue.num_items == N and catalogue.attribute_names == ("black",)
    assert (tmp_path / "mine.parquet.cache").is_dir()


@pytest.mark.parametrize(
    "vector",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.list_(pa.float16(), D),
        pa.large_list(pa.float32()),
    ],
    ids=str,
)
def test_other_list_types(path, vector, columns, save):
    data = columns()
    half = pa.types.is_float16(vector.value_type)
    if half:
        data["embedding"] = [list(np.float16(row)) for row in data["embedding"]]
    other = load(save(path, data, vector))
    rows = np.array(data["embedding"], np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(other.embeddings, unit, atol=1e-6)


def test_extreme_scales_keep_their_direction(path, columns, save):
    data = columns()
    scale = [10.0 ** (i % 76 - 38) for i in range(N)]  # float32 squares over- and underflow
    vectors = np.array(data["embedding"], np.float64)
    data["embedding"] = (vectors * np.array(scale)[:, None]).tolist()
    catalogue = load(save(path, data, pa.list_(pa.float64())))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(catalogue.embeddings, unit, atol=1e-6)


def test_int_and_categorical_columns(path, columns, save):
    data = columns() | {"pattern": [i % 6 for i in range(N)], "group": list(range(N // 2)) * 2}
    data["group"][0] = None
    catalogue = load(save(path, data))
    np.testing.assert_array_equal(catalogue.patterns, np.arange(N) % 6)
    assert catalogue.groups[1] == catalogue.groups[61] and catalogue.groups[0] != catalogue.groups[60]
    table = pa.table({name: pa.array(column) for name, column in columns().items()})
    coded = table.column("pattern").dictionary_encode()
    pq.write_table(table.set_column(2, "pattern", coded), path)
    assert load(path).pattern_names == tuple(f"p{i}" for i in range(6))


def test_shards_are_one_catalogue(tmp_path, path, columns, save):
    data = columns()
    whole = load(save(path, data))
    bounds = [0, 50, 50, N]  # the second shard is empty
    for name, start, stop in zip("abc", bounds, bounds[1:], strict=False):
        part = {column: values[start:stop] for column, values in data.items()}
        if name == "c":  # order of columns is free
            part = dict(reversed(part.items()))
        save(tmp_path / "shards" / f"{name}.parquet", part, id=pa.string(), pattern=pa.string())
    parts = load(tmp_path / "shards")
    np.testing.assert_array_equal(parts.embeddings, whole.embeddings)
    np.testing.assert_array_equal(parts.labels, whole.labels)
    np.testing.assert_array_equal(parts.patterns, whole.patterns)
    assert parts.ids.equals(whole.ids)
    assert (tmp_path / "shards.cache").is_dir()


def test_write_then_load(path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((N, D)).astype(np.float32)
    patterns = (np.arange(N) % 7 - 1).astype(np.int32)
    labels = rng.integers(-1, 2, N).astype(np.int8)
    write(
        path,
        ids=np.array([f"i{i}" for i in range(N)]),
        embeddings=vectors,
        patterns=patterns,
        attributes={"a": labels, "b": [None, True, False] * (N // 3), "c": labels == 1},
        texts=pa.array(["x", None] * (N // 2)),
        groups=np.where(np.arange(N) < 4, 0, -1),
        splits=np.array(["train", None] * (N // 2), object),
        shard_rows=32,
    )
    assert pq.ParquetFile(path).num_row_groups == 4
    assert pq.read_schema(path).field("embedding").type == pa.list_(pa.float32(), D)
    catalogue = load(path)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(catalogue.embeddings, unit, atol=1e-7)
    np.testing.assert_array_equal(catalogue.patterns, patterns)
    np.testing.assert_array_equal(catalogue.labels[0], labels)
    np.testing.assert_array_equal(catalogue.labels[1], [-1, 1, 0] * (N // 3))
    np.testing.assert_array_equal(catalogue.labels[2], labels == 1)
    assert len(set(catalogue.groups.tolist())) == N - 3 and len(set(catalogue.groups[:4])) == 1
    np.testing.assert_array_equal(catalogue.assigned, [0, -1] * (N // 2))
    assert catalogue.texts.to_pylist() == ["x", None] * (N // 2)


@pytest.mark.parametrize(
    "field, change",
    [
        ("id", {"ids": ["a"]}),
        ("attribute/a", {"attributes": {"a": [True]}}),
        ("attribute/a", {"attributes": {"a": ["yes"] * N}}),
        ("embeddings", {"embeddings": np.zeros(N, np.float32)}),
        ("embeddings", {"embeddings": np.zeros((N, D), int)}),
        ("split", {"splits": [["train"]] * N}),
    ],
)
def test_write_refuses_and_leaves_nothing(path, field, change, columns):
    sound = {"ids": columns()["id"], "embeddings": np.ones((N, D), np.float32)}
    sound["attributes"] = {"a": [True, None] * (N // 2)}
    with pytest.raises(InputError) as error:
        write(path, **(sound | change))
    assert error.value.field == field
    assert not list(path.parent.iterdir())


def test_killed_write_keeps_the_old_file(path, monkeypatch, columns):
    good = {"ids": columns()["id"], "attributes": {"a": [True, False] * (N // 2)}}
    write(path, embeddings=np.ones((N, D), np.float32), **good)
    before = path.read_bytes()

    class Dying(np.ndarray):
        def __getitem__(self, rows):
            if rows.start:
                raise KeyboardInterrupt
            return super().__getitem__(rows)

    with pytest.raises(KeyboardInterrupt):
        write(path, embeddings=np.zeros((N, D), np.float32).view(Dying), shard_rows=50, **good)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


# ---------------------------------------------------------------- what is refused


def set_at(column, row, value):
    def change(data):
        data[column][row] = value

    return change


def drop(column):
    return lambda data: data.pop(column)


def replace(column, values):
    return lambda data: data.update({column: values})


def mixed(data):
    data["split"] = ["pattern_holdout" if i % 6 == 1 else None for i in range(N)]
    data["split"][13] = "train"


BAD = {
    "nan": (
        "embedding",
        set_at("embedding", 70, [1.0, float("nan")] + [0.0] * 4),
        "row 70 .*item-70",
    ),
    "inf": ("embedding", set_at("embedding", 70, [float("inf")] + [0.0] * 5), "infinite.*item-70"),
    "null in vector": ("embedding", set_at("embedding", 9, [None] + [1.0] * 5), "row 9 .*item-9"),
    "zero": ("embedding", set_at("embedding", 3, [0.0] * D), "zero vector in row 3 .*item-3"),
    "null vector": ("embedding", set_at("embedding", 3, None), "null in row 3 .*item-3"),
    "ragged": (
        "embedding",
        set_at("embedding", 99, [1.0] * 5),
        "5 numbers, not 6.*row 99 .*item-99",
    ),
    "no embedding": ("embedding", drop("embedding"), "no such column"),
    "strings": ("embedding", replace("embedding", ["1,2"] * N), "is string"),
    "ints": ("embedding", replace("embedding", [[1, 2]] * N), "is list<.*int64>"),
    "empty lists": ("embedding", replace("embedding", [[]] * N), "empty list in row 0"),
    "no id": ("id", drop("id"), "no such column"),
    "null id": ("id", set_at("id", 66, None), "null in row 66"),
    "int id": ("id", replace("id", list(range(N))), "is int64.*not string"),
    "duplicate id": ("id", set_at("id", 111, "item-4"), "row 111 .*'item-4'.* repeats row 4"),
    "int attribute": (
        "attribute/new",
        replace("attribute/new", [0, 1] * 60),
        "not a nullable bool",
    ),
    "all true": ("attribute/new", replace("attribute/new", [True, None] * 60), "is True wherever"),
    "all false": ("attribute/new", replace("attribute/new", [False] * N), "is False wherever"),
    "all unknown": ("attribute/new", replace("attribute/new", [None] * N), "no known value"),
    "nameless": ("attribute/", replace("attribute/", [True, False] * 60), "name"),
    "unknown split": ("split", replace("split", [None] * 80 + ["test"] * 40), "'test' in row 80"),
    "int split": ("split", replace("split", [1] * N), "is int64"),
    "mixed pattern": ("split", mixed, "'p1' has 19 of 20 rows.*row 13 .*item-13"),
    "float pattern": ("pattern", replace("pattern", [1.0] * N), "is double"),
    "few patterns": ("pattern", replace("pattern", ["a", "b", "c", "d"] * 30), "only 4 of 4"),
    "small patterns": ("pattern", replace("pattern", list(range(60)) * 2), "only 0 of 60"),
    "no pattern": ("pattern", replace("pattern", [None] * N), "only 0 of 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(path, case, columns, save):
    field, change, message = BAD[case]
    data = columns()
    change(data)
    vector = None
    if "embedding" in data and field == "embedding":
        vector = pa.array(data["embedding"]).type
        if pa.types.is_list(vector) and pa.types.is_floating(vector.value_type):
            vector = pa.list_(pa.float32())
        elif case == "empty lists":
            vector = pa.list_(pa.float32())
    with pytest.raises(InputError, match=message) as error:
        load(save(path, data, vector))
    assert error.value.field == field
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert not [file for file in path.parent.rglob("*") if file.is_file() and file != path]


def test_no_attribute_column(path, columns, save):
    data = {name: values for name, values in columns().items() if "/" not in name}
    with pytest.raises(InputError, match=r"attribute/\*: mine.parquet has no attribute column"):
        load(save(path, data))


def test_row_is_named_within_its_shard(tmp_path, columns, save):
    for name, seed in (("a", 0), ("b", 1)):
        data = columns(seed=seed) | {"id": [f"{name}{i}" for i in range(N)]}
        if name == "b":
            data["embedding"][60] = [0.0] * D
        save(tmp_path / "shards" / f"{name}.parquet", data)
    with pytest.raises(InputError, match=r"row 60 of b.parquet \(id 'b60'\)"):
        load(tmp_path / "shards")


def test_shards_with_different_columns(tmp_path, columns, save):
    save(tmp_path / "shards" / "a.parquet", columns() | {"text": ["x"] * N})
    save(tmp_path / "shards" / "b.parquet", columns())
    with pytest.raises(InputError, match="text: is in a.parquet but not in b.parquet"):
        load(tmp_path / "shards")


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda good: b"", "is empty"),
        (lambda good: b"id,embedding\n1,2\n" * 9, "is not a Parquet file"),
        (lambda good: b"PAR1", "truncated"),
        (lambda good: good[:-1], "truncated"),
        (lambda good: good[: len(good) // 2], "truncated"),
        (lambda good: good[:-8] + b"\xff\xff\xff\x7fPAR1", "truncated or corrupt"),
        (lambda good: good[:40] + bytes(2000) + good[2040:], "corrupt"),
    ],
    ids=["empty", "csv", "magic", "a byte short", "half", "footer", "pages"],
)
def test_foreign_and_broken_files(path, content, message, columns, save):
    good = save(path, columns()).read_bytes()
    path.write_bytes(content(good))
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert error.value.field == "path" and path.name in str(error.value)


def test_paths(tmp_path, columns, save):
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "none.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "readme.txt").write_text("x")
    with pytest.raises(InputError, match=r"no \*.parquet"):
        load(tmp_path / "folder")
    with pytest.raises(InputError, match="no rows"):
        kinds = {name: pa.bool_() for name in ("attribute/black", "attribute/new")}
        load(save(tmp_path / "e.parquet", columns(0), id=pa.string(), **kinds))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cache: .*Pass cache="):
        load(save(tmp_path / "c.parquet", columns()), cache=tmp_path / "file")


# ---------------------------------------------------------------- patterns


def test_small_patterns_are_counted_and_taken_out(path, columns, save):
    data = columns()
    data["pattern"][:10] = ["tiny"] * 5 + ["wee"] * 5
    catalogue = load(save(path, data))
    assert catalogue.small_patterns == 2 and catalogue.num_patterns == 6
    assert (catalogue.patterns[:10] == -1).all() and (catalogue.patterns[10:] >= 0).all()
    assert load(path, min_pattern=5).num_patterns == 8


def test_cells_where_there_is_no_pattern_column(path, columns, save):
    data = columns(640)
    data.pop("pattern")
    catalogue = load(save(path, data), min_pattern=1)
    assert catalogue.pattern_source == "cells" and catalogue.num_patterns == 10  # 640 // 64
    near = np.einsum("nd,md->nm", catalogue.embeddings, catalogue.embeddings)
    same = catalogue.patterns[:, None] == catalogue.patterns
    assert near[same].mean() > near[~same].mean() + 0.3
    again = load(path, min_pattern=1)
    np.testing.assert_array_equal(again.patterns, catalogue.patterns)
    other = load(path, cells=20, min_pattern=1)
    assert other.num_patterns == 20
    seeded = load(path, seed=1, min_pattern=1)
    assert not np.array_equal(seeded.patterns, catalogue.patterns)
    with pytest.raises(InputError, match="cells: 641 cells asked of 640 items"):
        load(path, cells=641)
    with pytest.raises(InputError, match="cells: the catalogue has a pattern column"):
        load(save(path, columns()), cells=10)


def test_no_cell_straddles_a_marked_pattern_holdout(path, columns, save):
    data = columns(600)
    data.pop("pattern")
    data["split"] = ["pattern_holdout" if i % 4 == 0 else None for i in range(600)]
    catalogue = load(save(path, data), cells=20, min_pattern=1)
    held = catalogue.assigned == 2
    inside, outside = (set(catalogue.patterns[rows].tolist()) for rows in (held, ~held))
    assert not inside & outside and (len(inside), len(outside)) == (5, 15)
