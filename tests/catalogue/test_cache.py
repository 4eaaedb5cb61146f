"""The cache of a catalogue: read back without decoding, rebuilt when anything is off, safe to share."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest

from genret.catalogue import format, validate
from genret.catalogue.format import load, write

N = 120


def entries(path):
    return sorted((path.parent / f"{path.name}.cache").iterdir())


def test_second_load_reads_no_rows(path, monkeypatch, columns, save):
    first = load(save(path, columns()))

    def fail(*_, **__):
        raise AssertionError("rows were read again")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    second = load(path)
    np.testing.assert_array_equal(first.embeddings, second.embeddings)
    assert len(entries(path)) == 1
    path.touch()
    with pytest.raises(AssertionError, match="read again"):
        load(path)
    assert len(entries(path)) == 1  # the failed build left nothing


def test_changed_data_is_read_again(path, columns, save):
    load(save(path, columns()))
    data = columns()
    data["attribute/new"][1] = True
    assert load(save(path, data)).labels[1, 1] == 1


def test_cache_elsewhere(tmp_path, path, columns, save):
    load(save(path, columns()), cache=tmp_path / "elsewhere")
    assert not (tmp_path / "mine.parquet.cache").exists()
    assert (tmp_path / "elsewhere" / "mine.parquet.cache").is_dir()


@pytest.mark.parametrize("name", ["embeddings.npy", "labels.npy", "ids.arrow", "catalogue.json"])
@pytest.mark.parametrize("harm", ["gone", "half", "noise", "empty"])
def test_corrupt_cache_is_rebuilt(path, name, harm, columns, save):
    first = load(save(path, columns()))
    ids, labels, rows = first.ids.to_pylist(), np.array(first.labels), np.array(first.embeddings)
    del first
    file = entries(path)[0] / name
    content = file.read_bytes()
    if harm == "gone":
        file.unlink()
    elif harm == "noise":
        file.write_bytes(bytes(60) + content[60:])
    else:
        file.write_bytes(content[: len(content) // 2] if harm == "half" else b"")
    again = load(path)
    assert again.ids.to_pylist() == ids
    np.testing.assert_array_equal(again.labels, labels)
    np.testing.assert_array_equal(again.embeddings, rows)
    assert len(entries(path)) == 1 and file.read_bytes() == content


def test_killed_build_leaves_no_entry(path, monkeypatch, columns, save):
    save(path, columns())
    write_vectors = format._write_vectors

    def die(file, rows, total):
        write_vectors(file, rows, total)
        raise KeyboardInterrupt

    monkeypatch.setattr(format, "_write_vectors", die)
    with pytest.raises(KeyboardInterrupt):
        load(path)
    assert not entries(path)
    monkeypatch.undo()
    (path.parent / "mine.parquet.cache" / ".build-dead").mkdir()  # as a SIGKILL would leave it
    assert load(path).num_items == N


def test_another_process_was_first(path, monkeypatch, columns, save):
    """Both build; the one that comes second keeps the first one's entry, which may be mapped."""
    save(path, columns())
    fill = format._fill

    def slow(folder, *args):
        monkeypatch.setattr(format, "_fill", fill)
        load(path)
        fill(folder, *args)

    monkeypatch.setattr(format, "_fill", slow)
    assert load(path).num_items == N
    assert len(entries(path)) == 1


def test_concurrent_loads(path, columns, save):
    save(path, columns(2000))
    with ThreadPoolExecutor(4) as pool:
        assert [each.num_items for each in pool.map(load, [path] * 8)] == [2000] * 8
    assert len(entries(path)) == 1


def test_nothing_is_pickled(path, columns, save):
    load(save(path, columns() | {"text": ["x"] * N}))
    folder = entries(path)[0]
    assert {file.suffix for file in folder.iterdir()} == {".npy", ".arrow", ".json"}
    for file in folder.glob("*.npy"):
        np.load(file, allow_pickle=False)
    assert json.loads((folder / "catalogue.json").read_text())["pattern_source"] == "column"


def test_cold_and_warm_load_are_fast(path):
    rng = np.random.default_rng(0)
    write(
        path,
        ids=[f"i{i}" for i in range(40_000)],
        embeddings=rng.standard_normal((40_000, 128)).astype(np.float32),
        patterns=np.arange(40_000) % 600,
        attributes={"a": rng.integers(-1, 2, 40_000).astype(np.int8)},
    )
    start = time.perf_counter()
    load(path)
    cold = time.perf_counter()
    load(path)
    assert cold - start < 3 and time.perf_counter() - cold < 0.3


def test_rows_are_decoded_in_batches(path, monkeypatch, columns, save):
    """Memory is bounded: at most `_ROWS` vectors are decoded at once, whatever the row groups."""
    seen = []
    read = validate.read_vectors
    monkeypatch.setattr(format, "_ROWS", 32)
    monkeypatch.setattr(validate, "read_vectors", lambda *a: seen.append(len(a[0])) or read(*a))
    pq.write_table(pq.read_table(save(path, columns())), path)
    assert load(path).num_items == N
    assert max(seen) <= 32 and sum(seen) == N
