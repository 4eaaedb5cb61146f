"""Reads the columns of a catalogue into arrays, or says which column and row is wrong, and the fix.

Every check works on whole arrow columns; a row is looked up only to be named in an error.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genret.types import InputError

ATTRIBUTE = "attribute/"
OPTIONAL = ("pattern", "group", "split", "text")
SPLIT_NAMES = ("train", "item_holdout", "pattern_holdout")
MIN_PATTERNS = 5


class Rows:
    """Names a global row the way its owner finds it: row in its shard, shard, id."""

    def __init__(self, shards: list[Path], counts: list[int]):
        self._shards = [path.name for path in shards]
        self._starts = np.cumsum([0, *counts])

    def name(self, row: int, item: str | None = None) -> str:
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        where = f" of {self._shards[shard]}" if len(self._shards) > 1 else ""
        named = f" (id {item!r})" if item is not None else ""
        return f"row {row - self._starts[shard]}{where}{named}"


def _is_string(kind: pa.DataType) -> bool:
    return any(is_(kind) for is_ in (pa.types.is_string, pa.types.is_large_string))


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _has_type(column: str, kind: pa.DataType) -> bool:
    kind = _decoded(kind)
    if column == "embedding":
        lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
        return any(is_(kind) for is_ in lists) and pa.types.is_floating(kind.value_type)
    if column == "id":
        return _is_string(kind)
    if pa.types.is_null(kind):  # a shard in which every value is missing has no type of its own
        return True
    if column.startswith(ATTRIBUTE):
        return pa.types.is_boolean(kind)
    return _is_string(kind) or (column in ("pattern", "group") and pa.types.is_integer(kind))


_WANTED = {
    "id": ("string", 'Cast it, as in df["id"] = df["id"].astype(str)'),
    "embedding": ("a list of float32", "Write one list of floats per row, of equal length"),
    "pattern": ("string or int", "Cast it to string, or to a nullable int where some are missing"),
    "group": ("string or int", "Cast it to string, or to a nullable int where some are missing"),
    "split": ("string", f"Use null, {', '.join(SPLIT_NAMES)}"),
    "text": ("string", "Cast it to string"),
    ATTRIBUTE: ("a nullable boolean", 'Cast it, as in df[name] = df[name].astype("boolean")'),
}


def catalogue_columns(schema: pa.Schema, shard: Path) -> list[str]:
    """The catalogue's columns in `schema`, types checked; columns of other names are not read."""
    for column in ("id", "embedding"):
        if column not in schema.names:
            raise InputError(
                column,
                f"no such column in {shard.name} (it has: {', '.join(schema.names) or 'none'})",
                f'Add a column "{column}": {_WANTED[column][0]}.',
            )
    attributes = [name for name in schema.names if name.startswith(ATTRIBUTE)]
    if not attributes:
        raise InputError(
            ATTRIBUTE + "*",
            f"{shard.name} has no attribute column",
            f'Add a nullable boolean column named "{ATTRIBUTE}<name>" per attribute.',
        )
    columns = ["id", "embedding", *(name for name in OPTIONAL if name in schema.names), *attributes]
    for column in columns:
        if schema.names.count(column) > 1 or column == ATTRIBUTE:
            raise InputError(column, f"not a unique, non-empty name in {shard.name}", "Rename it.")
        kind = schema.field(column).type
        if not _has_type(column, kind):
            wanted, fix = _WANTED[ATTRIBUTE if column.startswith(ATTRIBUTE) else column]
            raise InputError(column, f"is {kind} in {shard.name}, not {wanted}", f"{fix}.")
    return columns


def same_columns(first: Path, columns: list[str], shard: Path, others: list[str]) -> None:
    """Raises unless two shards hold the same catalogue columns (in any order)."""
    odd = sorted(set(columns) ^ set(others))
    if odd:
        missing, holder = (shard, first) if odd[0] in columns else (first, shard)
        raise InputError(
            odd[0],
            f"is in {holder.name} but not in {missing.name}",
            "Give every shard the same columns (null where a value is unknown).",
        )


def read_ids(column: pa.Array, first: int, rows: Rows) -> pa.Array:
    if column.null_count:
        row = first + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise InputError("id", f"is null in {rows.name(row)}", "Give every row its own id.")
    return column.cast(pa.large_string())


def read_vectors(column: pa.Array, ids: pa.Array, width: int | None, first: int, rows: Rows) -> np.ndarray:
    """Unit-norm rows f32[n, D] of a list column; `width` is D where earlier rows have set it."""

    def fail(bad: np.ndarray, problem: str, fix: str):
        row = int(np.argmax(bad))
        where = rows.name(first + row, ids[row].as_py())
        raise InputError("embedding", problem.format(row=row) + f" in {where}", fix)

    if column.null_count:
        missing = column.is_null().to_numpy(zero_copy_only=False)
        fail(missing, "is null", "Drop the row or embed the item.")
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    width = int(lengths[0]) if width is None else width
    if (lengths != width).any():
        other = lengths[np.argmax(lengths != width)]
        fail(lengths != width, f"has {other} numbers, not {width} as before,", "Use one encoder.")
    if width == 0:
        fail(lengths == 0, "is an empty list", "Embed the item.")
    flat = column.flatten()
    # A null inside a vector becomes NaN here, and is reported as one.
    values = np.asarray(flat.to_numpy(zero_copy_only=False), np.float64).reshape(-1, width)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        fail(~finite, "holds a NaN, null or infinite number", "Drop the row or embed it again.")
    scale = np.abs(values).max(axis=1, keepdims=True)
    if not scale.all():
        fail(scale[:, 0] == 0, "is the zero vector", "Drop the row or embed it again.")
    values = values / scale  # first to the unit cube: squaring neither overflows nor underflows
    return (values / np.sqrt(np.einsum("nd,nd->n", values, values))[:, None]).astype(np.float32)


def unique_ids(ids: pa.Array, rows: Rows) -> None:
    codes = ids.dictionary_encode()
    if len(codes.dictionary) == len(ids):
        return
    codes = codes.indices.to_numpy()
    firsts = np.unique(codes, return_index=True)[1]
    again = np.ones(len(ids), bool)
    again[firsts] = False
    row = int(np.argmax(again))
    raise InputError(
        "id",
        f"{rows.name(row, ids[row].as_py())} repeats {rows.name(firsts[codes[row]])}",
        'Give every row its own id; mark duplicates of one item by a shared "group" instead.',
    )


def read_labels(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """i8[N]: 1 true, 0 false, -1 unknown."""
    label = column.cast(pa.int8()).fill_null(-1).to_numpy().astype(np.int8, copy=False)
    known = np.unique(label[label >= 0])
    if len(known) < 2:
        state = f"is {bool(known[0])} wherever it is known" if len(known) else "has no known value"
        raise InputError(name, state, "An attribute needs true and false rows: fix or drop it.")
    return label


def read_splits(column: pa.ChunkedArray, ids: pa.Array, rows: Rows) -> np.ndarray:
    """i8[N]: index in SPLIT_NAMES, -1 where null."""
    strings = column.cast(pa.large_string())
    found = pc.index_in(strings, pa.array(SPLIT_NAMES, pa.large_string()))
    unknown = pc.and_(pc.is_valid(strings), pc.is_null(found)).to_numpy()
    if unknown.any():
        row = int(np.argmax(unknown))
        raise InputError(
            "split",
            f"{strings[row].as_py()!r} in {rows.name(row, ids[row].as_py())} is not a split",
            f"Use null or one of {', '.join(SPLIT_NAMES)}.",
        )
    return found.fill_null(-1).to_numpy().astype(np.int8)


def encode(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Codes i32[N] of a string or int column in the order of its sorted names; -1 where null."""
    coded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
    names = coded.dictionary.to_numpy(zero_copy_only=False)
    order = np.argsort(names)
    rank = np.empty(len(names) + 1, np.int32)
    rank[order], rank[-1] = np.arange(len(names)), -1
    return rank[coded.indices.fill_null(-1).to_numpy()], [str(name) for name in names[order]]


def read_groups(column: pa.ChunkedArray) -> np.ndarray:
    """i32[N]: rows which must not be split apart share a number; a null row is its own group."""
    groups, names = encode(column)
    alone = groups < 0
    groups[alone] = len(names) + np.arange(alone.sum())
    return groups


def unmixed(patterns: np.ndarray, names: list[str], assigned: np.ndarray, ids: pa.Array, rows: Rows) -> None:
    """Raises where a pattern is held out in part: its other rows would leak it into training."""
    held = assigned == SPLIT_NAMES.index("pattern_holdout")
    inside = patterns >= 0
    size = np.bincount(patterns[inside], minlength=len(names))
    marked = np.bincount(patterns[inside & held], minlength=len(names))
    mixed = (marked > 0) & (marked < size)
    if mixed.any():
        bad = int(np.argmax(mixed))
        row = int(np.argmax((patterns == bad) & ~held))
        raise InputError(
            "split",
            f"pattern {names[bad]!r} has {marked[bad]} of {size[bad]} rows in pattern_holdout, "
            f"but not {rows.name(row, ids[row].as_py())}",
            "Mark all rows of a pattern as pattern_holdout, or none.",
        )


def drop_small(patterns: np.ndarray, names: list[str], least: int) -> tuple[np.ndarray, list[str], int]:
    """Takes patterns below `least` items out (-1), renumbers the others, counts those taken out."""
    size = np.bincount(patterns[patterns >= 0], minlength=len(names))
    keep = size >= least
    if keep.sum() < MIN_PATTERNS:
        raise InputError(
            "pattern",
            f"only {keep.sum()} of {len(names)} patterns have {least} items or more, "
            f"and {MIN_PATTERNS} are needed",
            "Use coarser patterns or more items, or drop the column to have cells fitted.",
        )
    number = np.append(np.where(keep, np.cumsum(keep) - 1, -1), -1).astype(np.int32)
    return number[patterns], [names[p] for p in np.flatnonzero(keep)], int((~keep).sum())


def open_parquet(path: Path) -> tuple[pq.ParquetFile, bytes]:
    """The open file and its footer bytes; raises one InputError for a foreign or truncated file."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        head = file.read(4)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        if head != b"PAR1":
            problem = f"{path.name} is empty" if not size else f"{path.name} is not a Parquet file"
            raise InputError("path", problem, "Write it as genret.catalogue.format shows.")
        length = int.from_bytes(tail[:4], "little") + 8
        file.seek(max(0, size - length))
        footer = file.read()
    try:
        if tail[4:] != b"PAR1":
            raise pa.ArrowInvalid("its footer is missing")
        # A buffered stream: otherwise a row group, often the whole file, is fetched at once.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False), footer
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        problem = f"{path.name} is truncated or corrupt ({reason})"
        raise InputError("path", problem, "Write it again.") from error
