"""The catalogue on disk: one Parquet file, or a folder of Parquet shards, read sorted by name.

    id                string                   unique name of the item
    embedding         list of float            its vector, of any scale; float32 fixed_size_list is
                                               best, 16 and 64 bits and variable lists are read too
    attribute/<name>  nullable boolean,        has the item it? null = unknown: not among that
                      one or more              attribute's labels, never counted as negative
    pattern           string or int, optional  evaluation pattern, null = in none; without this
                                               they are k-means cells of the whole catalogue
    group             string or int, optional  rows not to be split apart (duplicates); null = alone
    split             string, optional         train, item_holdout, pattern_holdout; null = drawn
    text              string, optional         what people and language models read

Other columns are not read. Written with pyarrow (in pandas a column of vectors is `list(vectors)`):

    import pyarrow as pa, pyarrow.parquet as pq
    table = {"id": ids, "attribute/black": is_black}  # is_black may hold None
    table["embedding"] = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
    table["pattern"] = kinds  # optional
    pq.write_table(pa.table(table), "mine.parquet")

`load` validates once and keeps a memory-mapped copy in `<path>.cache/`; delete that at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genret.catalogue import validate
from genret.catalogue.clusters import spherical_kmeans
from genret.catalogue.validate import ATTRIBUTE, SPLIT_NAMES
from genret.types import InputError

_FORMAT = 1  # of the cache; a change makes old caches stale
_ROWS = 16384  # rows decoded at once
_ARRAYS = ("patterns", "labels", "groups", "assigned")


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The fixed database of N items. All arrays are read-only.

    ids: large_string[N]. embeddings: memory-mapped f32[N, D], unit norm.
    patterns: i32[N] in 0..P-1, -1 in none; pattern_names: P names, sorted (cells: their numbers);
    pattern_source: "column" or "cells"; small_patterns: how many had too few items and are -1.
    attribute_names: M names; labels: i8[M, N], 1 true, 0 false, -1 unknown.
    groups: i32[N], equal for rows not to be split apart.
    assigned: i8[N], index in SPLIT_NAMES as the `split` column has it, -1 where null.
    texts: large_string[N], or None without the column.
    """

    name: str
    path: Path
    ids: pa.Array
    embeddings: np.ndarray
    patterns: np.ndarray
    pattern_names: tuple[str, ...]
    attribute_names: tuple[str, ...]
    labels: np.ndarray
    groups: np.ndarray
    assigned: np.ndarray
    texts: pa.Array | None
    pattern_source: str
    small_patterns: int

    @property
    def num_items(self) -> int:
        return self.embeddings.shape[0]

    @property
    def width(self) -> int:
        return self.embeddings.shape[1]

    @property
    def num_patterns(self) -> int:
        return len(self.pattern_names)

    @property
    def num_domains(self) -> int:
        return len(self.attribute_names)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Everything that training or evaluation reads."""
        return self.embeddings, self.labels, self.patterns, self.groups, self.assigned


def load(
    path: str | Path,
    *,
    cells: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    min_pattern: int = 8,
) -> Catalogue:
    """Reads and validates a catalogue; a second load of the same files only maps its cache.

    cells: number of k-means cells that serve as patterns where there is no pattern column, fitted
    by `seed` (default max(8, N // 64)). Where the split column marks rows as pattern_holdout, these
    and the others get cells of their own, in proportion, so that no cell straddles the split.
    cache: folder to keep the cache in instead of the one that holds `path`.
    min_pattern: patterns of fewer items become -1; they are counted in `small_patterns`.

    Raises InputError, keeping nothing, for a breach of the format: it names column, row and fix.
    """
    path = Path(path)
    shards = _shards(path)
    digest = hashlib.sha256()
    columns: list[str] = []
    counts = []
    for shard in shards:
        file, footer = validate.open_parquet(shard)
        with file:
            found = validate.catalogue_columns(file.schema_arrow, shard)
            counts.append(file.metadata.num_rows)
        columns = columns or found
        validate.same_columns(shards[0], columns, shard, found)
        stat = shard.stat()
        digest.update(f"{shard.name} {stat.st_size} {stat.st_mtime_ns} ".encode() + footer)
    if not sum(counts):
        raise InputError("path", f"{path.name} holds no rows", "Write some items into it.")
    if "pattern" in columns:
        if cells is not None:
            problem = "the catalogue has a pattern column of its own"
            raise InputError("cells", problem, "Leave out one of the two.")
        source = "column"
    else:
        cells = max(8, sum(counts) // 64) if cells is None else cells
        if not validate.MIN_PATTERNS <= cells <= sum(counts):
            problem = f"{cells} cells asked of {sum(counts)} items"
            fix = f"Ask for {validate.MIN_PATTERNS} up to one per item."
            raise InputError("cells", problem, fix)
        source = f"cells{cells}-seed{seed}"
    key = f"{digest.hexdigest()[:16]}-{source}-min{min_pattern}-v{_FORMAT}"
    root = path.absolute().parent if cache is None else Path(cache)
    entry = root / f"{path.name}.cache" / key
    for _ in range(3):  # again only if other processes keep replacing the entry
        catalogue = _open(path, entry)
        if catalogue is not None:
            return catalogue
        _build(path, entry, shards, counts, columns, cells, seed, min_pattern)
    raise InputError("cache", f"{entry} cannot be read back", "Check the disk, or pass another cache folder.")


def _shards(path: Path) -> list[Path]:
    if path.is_dir():
        shards = sorted(shard for shard in path.glob("*.parquet") if not shard.name.startswith("."))
        if not shards:
            raise InputError("path", f"no *.parquet in {path}", "Point at the folder of shards.")
        return shards
    if not path.exists():
        fix = "Point at a Parquet file or a folder of shards."
        raise InputError("path", f"{path} does not exist", fix)
    return [path]


def _batches(shards: list[Path], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for shard in shards:
        file, _ = validate.open_parquet(shard)
        try:
            with file:
                yield from file.iter_batches(_ROWS, columns=columns)
        except (pa.ArrowException, OSError) as error:
            problem = f"{shard.name} is corrupt ({str(error).splitlines()[0]})"
            raise InputError("path", problem, "Write it again.") from error


def _write_vectors(file, rows: np.ndarray, total: int) -> None:
    """Appends rows to a .npy file; unlike with a memory map, a full disk is then an error."""
    if not file.tell():
        header = {"descr": "<f4", "fortran_order": False, "shape": (total, rows.shape[1])}
        np.lib.format.write_array_header_1_0(file, header)
    file.write(np.ascontiguousarray(rows, "<f4").data)


def _build(path, entry: Path, shards, counts, columns, cells, seed, min_pattern) -> None:
    """Writes the entry in a folder of its own, then renames it: a killed build leaves no entry."""
    folder = entry.parent / f".build-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        problem = f"{entry.parent} cannot be written ({error.strerror})"
        raise InputError("cache", problem, "Pass cache=FOLDER, a folder that can.") from error
    try:
        _fill(folder, shards, counts, columns, cells, seed, min_pattern)
        _publish(folder, path, entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for old in entry.parent.glob(".build-*"):  # left by killed builds
            with contextlib.suppress(FileNotFoundError):  # another build's end
                if time.time() - old.stat().st_mtime > 86400:
                    shutil.rmtree(old, ignore_errors=True)


def _fill(folder: Path, shards, counts, columns, cells, seed, min_pattern) -> None:
    total, rows = sum(counts), validate.Rows(shards, counts)
    attributes = [name for name in columns if name.startswith(ATTRIBUTE)]
    parts: dict[str, list[pa.Array]] = {name: [] for name in columns if name != "embedding"}
    width, first = None, 0
    with open(folder / "embeddings.npy", "wb") as file:
        for batch in _batches(shards, columns):
            ids = validate.read_ids(batch.column("id"), first, rows)
            vectors = validate.read_vectors(batch.column("embedding"), ids, width, first, rows)
            _write_vectors(file, vectors, total)
            parts["id"].append(ids)
            for name in columns:
                if name not in ("id", "embedding"):
                    kind = pa.bool_() if name in attributes else pa.large_string()
                    parts[name].append(batch.column(name).cast(kind))
            width, first = vectors.shape[1], first + len(vectors)
    values = {name: pa.chunked_array(chunks) for name, chunks in parts.items()}
    ids = values["id"].combine_chunks()
    validate.unique_ids(ids, rows)

    def read(name, reader, missing):
        return reader(values[name]) if name in values else missing

    labels = np.stack([validate.read_labels(values[name], name) for name in attributes])
    groups = read("group", validate.read_groups, np.arange(total, dtype=np.int32))
    unassigned = np.full(total, -1, np.int8)
    assigned = read("split", lambda column: validate.read_splits(column, ids, rows), unassigned)
    if "pattern" in values:
        patterns, names = validate.encode(values["pattern"])
        validate.unmixed(patterns, names, assigned, ids, rows)
    else:
        embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
        held = assigned == SPLIT_NAMES.index("pattern_holdout")
        patterns = _fit_cells(embeddings, cells, seed, held)
        names = [str(cell) for cell in range(cells)]
    patterns, names, small = validate.drop_small(patterns, names, min_pattern)

    arrays = {"patterns": patterns, "labels": labels, "groups": groups, "assigned": assigned}
    for name in _ARRAYS:
        np.save(folder / f"{name}.npy", arrays[name])
    texts = read("text", lambda column: column.combine_chunks(), None)
    for name, strings in (("ids", ids), ("texts", texts)):
        if strings is not None:
            table = pa.table({name: strings})
            with pa.ipc.new_file(folder / f"{name}.arrow", table.schema) as writer:
                writer.write_table(table)
    about = {
        "pattern_names": names,
        "attribute_names": [name.removeprefix(ATTRIBUTE) for name in attributes],
        "pattern_source": "column" if "pattern" in values else "cells",
        "small_patterns": small,
        "files": {file.name: _checksum(file) for file in sorted(folder.iterdir())},
    }
    (folder / "catalogue.json").write_text(json.dumps(about))


def _fit_cells(embeddings: np.ndarray, cells: int, seed: int, held: np.ndarray) -> np.ndarray:
    """Cells i32[N]; rows under `held` bool[N] and the others get cells apart, in proportion."""
    if not held.any() or held.all():
        return spherical_kmeans(embeddings, cells, seed=seed)[1]
    share = int(np.clip(round(cells * held.mean()), 2, cells - 2))
    result = np.empty(len(embeddings), np.int32)
    for side, count, first in ((~held, cells - share, 0), (held, share, cells - share)):
        count = min(count, side.sum())
        result[side] = first + spherical_kmeans(embeddings[side], count, seed=seed)[1]
    return result


def _checksum(file: Path) -> list[int]:
    """Size and CRC-32; the embeddings, mapped and not read, by size alone."""
    return [
        file.stat().st_size,
        0 if file.name == "embeddings.npy" else zlib.crc32(file.read_bytes()),
    ]


def _publish(folder: Path, path: Path, entry: Path) -> None:
    try:
        os.replace(folder, entry)
    except OSError:  # a folder is renamed onto nothing but an empty one
        if _open(path, entry) is None:  # corrupt, so out of the way; else another process was first
            os.replace(entry, folder.with_name(folder.name + "-corrupt"))
            shutil.rmtree(folder.with_name(folder.name + "-corrupt"), ignore_errors=True)
            os.replace(folder, entry)


def _open(path: Path, entry: Path) -> Catalogue | None:
    """The cached catalogue, or None where there is none or it is not intact."""
    try:
        about = json.loads((entry / "catalogue.json").read_text())
        files = about.pop("files")
        if any(_checksum(entry / name) != list(sums) for name, sums in files.items()):
            return None
        embeddings = np.load(entry / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        arrays = {name: np.load(entry / f"{name}.npy", allow_pickle=False) for name in _ARRAYS}
        strings = {
            name: pa.ipc.open_file(pa.memory_map(str(entry / f"{name}.arrow"))).read_all()[name].chunk(0)
            for name in ("ids", "texts")
            if f"{name}.arrow" in files
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    for array in arrays.values():
        array.flags.writeable = False
    return Catalogue(
        name=path.stem,
        path=path,
        ids=strings["ids"],
        texts=strings.get("texts"),
        embeddings=embeddings,
        pattern_names=tuple(about["pattern_names"]),
        attribute_names=tuple(about["attribute_names"]),
        pattern_source=about["pattern_source"],
        small_patterns=about["small_patterns"],
        **arrays,
    )


def write(
    path: str | Path,
    *,
    ids: Sequence[str],
    embeddings: np.ndarray,
    attributes: Mapping[str, Any],
    patterns: Any = None,
    texts: Any = None,
    groups: Any = None,
    splits: Any = None,
    shard_rows: int = 65536,
) -> None:
    """Writes one Parquet file in the format, `shard_rows` rows to a row group, atomically.

    embeddings: float[N, D] (a `np.memmap` is read a row group at a time). The columns are
    sequences, numpy or arrow arrays of length N, null where None or NaN. attributes: name -> bool
    or None, or int of 1, 0, -1 (unknown). patterns, groups: str, or int with null where negative.
    splits: of SPLIT_NAMES or None.

    Raises InputError on unequal lengths or values that do not fit a column; `load` checks the rest.
    """
    path = Path(path)
    if np.ndim(embeddings) != 2 or not np.issubdtype(embeddings.dtype, np.floating):
        problem = f"{embeddings.dtype}{list(embeddings.shape)} is not float[N, D]"
        raise InputError("embeddings", problem, "Pass a float matrix.")
    total, width = embeddings.shape
    columns = {"id": _column("id", ids, total, pa.string())}
    for name, values in (("pattern", patterns), ("group", groups)):
        if values is not None:
            columns[name] = _column(name, values, total, None)
    for name, values in (("split", splits), ("text", texts)):
        if values is not None:
            columns[name] = _column(name, values, total, pa.string())
    for name, values in attributes.items():
        columns[ATTRIBUTE + name] = _column(ATTRIBUTE + name, values, total, pa.bool_())
    kinds = {"embedding": pa.list_(pa.float32(), width)}
    schema = pa.schema(kinds | {name: column.type for name, column in columns.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    repeated = [name for name in ("pattern", "group", "split") if name in columns]
    try:
        with pq.ParquetWriter(temporary, schema, use_dictionary=repeated) as writer:
            for start in range(0, total, shard_rows):
                rows = np.ascontiguousarray(embeddings[start : start + shard_rows], np.float32)
                flat = pa.FixedSizeListArray.from_arrays(rows.reshape(-1), width)
                parts = [column.slice(start, shard_rows) for column in columns.values()]
                writer.write_batch(pa.record_batch([flat, *parts], schema=schema))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _column(name: str, values: Any, total: int, kind: pa.DataType | None) -> pa.Array:
    try:
        is_arrow = isinstance(values, pa.Array | pa.ChunkedArray)
        column = values if is_arrow else pa.array(values, from_pandas=True)
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if pa.types.is_integer(column.type) and (kind is None or pa.types.is_boolean(kind)):
            column = pc.if_else(pc.less(column, 0), pa.scalar(None, column.type), column)
        column = column if kind is None else column.cast(kind)
    except (pa.ArrowException, TypeError) as error:
        raise InputError(name, f"cannot be written ({error})", "See genret.catalogue.format.") from error
    if len(column) != total:
        raise InputError(name, f"{len(column)} values for {total} embeddings", "Pass one value per row.")
    return column
