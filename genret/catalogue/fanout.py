"""Fan-out data: a fixed pool of contents, broad queries over it and, where there are any, reference sets.

The two tasks of R4T (arXiv:2603.06397, problem setup): open-ended abstract retrieval (OAR), where many
answers are right and none is given, and weakly supervised compositional retrieval (WSCR), with one
weak reference set per query. A dataset's module reads or writes texts; `embed` turns them into
`FanoutData`, once: the embeddings are kept by the content of the texts.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tokenize
import uuid
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genret.catalogue.texts import folded
from genret.types import InputError

# Called as encode(texts, max_tokens=n) -> f32[len(texts), E], as TextEncoder.encode.
Encode = Callable[..., np.ndarray]

SPLITS = ("train", "validation", "test")

_FORMAT = 1  # of the file
_HEADER = 1 << 14  # bytes; that of an array is shorter
_MIN_COSINE, _CHECKED_ROWS = 0.999, 8


@dataclass(frozen=True, eq=False)
class FanoutTexts:
    """A fan-out dataset before it is embedded.

    contents: N distinct texts. queries: Q distinct texts. split: i8[Q], index in SPLITS.
    references: per query the rows i32[n >= 1] of `contents` that answer it (WSCR), or None (OAR).
    max_tokens: texts are cut to this many. card: what a reader should know (source, licence, rules).
    ready: embeddings float[N, E] of the contents where they exist already; `embed` checks a few.

    Raises InputError for an empty, repeated or blank text, and for a split or references that do not
    fit the queries; every part of SPLITS must have a query.
    """

    name: str
    contents: Sequence[str]
    queries: Sequence[str]
    split: np.ndarray
    references: Sequence[np.ndarray] | None = None
    max_tokens: int = 64
    card: dict[str, str] = field(default_factory=dict)
    ready: np.ndarray | None = None

    def __post_init__(self):
        _check_texts(self)


@dataclass(frozen=True, eq=False)
class FanoutData:
    """A fan-out dataset. Arrays are read-only; fields and errors as in `FanoutTexts`, and

    embeddings: f32[N, E] of the contents, query_embeddings: f32[Q, E]: unit norm, one encoder's.
    """

    name: str
    contents: Sequence[str]
    embeddings: np.ndarray
    queries: Sequence[str]
    query_embeddings: np.ndarray
    split: np.ndarray
    references: Sequence[np.ndarray] | None = None
    card: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        _check_texts(self)
        for name, texts in (("embeddings", self.contents), ("query_embeddings", self.queries)):
            object.__setattr__(self, name, _checked_embeddings(name, getattr(self, name), len(texts)))
        if self.embeddings.shape[1] != self.query_embeddings.shape[1]:
            widths = f"{self.embeddings.shape[1]} and {self.query_embeddings.shape[1]} wide"
            raise InputError("query_embeddings", f"contents and queries are {widths}", "Use one encoder.")

    @property
    def width(self) -> int:
        return self.embeddings.shape[1]

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Everything that training or evaluation reads, texts aside."""
        return self.embeddings, self.query_embeddings, self.split, *(self.references or ())

    def rows(self, part: str) -> np.ndarray:
        """The queries i32[n] of "train", "validation" or "test"."""
        if part not in SPLITS:
            raise InputError("part", f"{part!r}", f"Use one of {', '.join(SPLITS)}.")
        return np.flatnonzero(self.split == SPLITS.index(part)).astype(np.int32)

    def save(self, path: str | Path) -> Path:
        """Writes one .npz file, whole or not at all; equal data give equal bytes.

        Beside the arrays it holds `card.json` to be read by people (unzip -p FILE card.json), and
        `contents.json` and `queries.json`.
        Raises InputError where `path` cannot be written.
        """
        arrays = {
            "embeddings": self.embeddings,
            "query_embeddings": self.query_embeddings,
            "split": self.split,
        }
        if self.references is not None:
            arrays["references"] = np.concatenate(self.references)
            arrays["reference_counts"] = np.array([len(rows) for rows in self.references], np.int32)
        counts = {part: int((self.split == i).sum()) for i, part in enumerate(SPLITS)}
        about = {
            "format": _FORMAT,
            "name": self.name,
            "task": "OAR" if self.references is None else "WSCR",
            "contents": len(self.contents),
            "queries": len(self.queries),
            "width": self.width,
            **counts,
            "card": self.card,
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._write(temporary, about, arrays)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise InputError(str(path), problem, "Free some space, or save elsewhere.") from error
        return path

    def _write(self, path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        texts = {"card": about, "contents": list(self.contents), "queries": list(self.queries)}
        with zipfile.ZipFile(path, "w") as file:
            # A ZipInfo of its own has a fixed date.
            for name, value in texts.items():
                written = json.dumps(value, ensure_ascii=False, indent=1)
                file.writestr(zipfile.ZipInfo(f"{name}.json"), written)
            for name, array in arrays.items():
                with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)


def load(path: str | Path) -> FanoutData:
    """Reads what `FanoutData.save` wrote.

    Raises InputError for a missing, truncated or foreign file, and for data that are not valid.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as file:  # every member is read to its end, so its CRC is checked
            if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
                raise ValueError("a compressed archive")

            def array(name: str) -> np.ndarray:
                return _array(name, file.read(f"{name}.npy"))

            about, contents, queries = (
                json.loads(file.read(f"{name}.json")) for name in ("card", "contents", "queries")
            )
            if about["format"] != _FORMAT:
                raise ValueError(f"format {about['format']}, not {_FORMAT}")
            references = None
            if about["task"] == "WSCR":
                ends = np.cumsum(array("reference_counts"))
                references = np.split(array("references"), ends[:-1])
            return FanoutData(
                name=about["name"],
                contents=contents,
                embeddings=array("embeddings"),
                queries=queries,
                query_embeddings=array("query_embeddings"),
                split=array("split"),
                references=references,
                card=about["card"],
            )
    except FileNotFoundError as error:
        raise InputError(str(path), "no such file", "Save the data first, or mend the path.") from error
    except InputError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
        problem = f"truncated or not fan-out data ({error})"
        raise InputError(str(path), problem, "Write it again with FanoutData.save.") from error


def _array(name: str, content: bytes) -> np.ndarray:
    """The array in the bytes of a .npy file; ValueError where its header asks for other than they hold."""
    header = io.BytesIO(content[:_HEADER])
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError(f"{name}.npy is of another version")
    try:
        shape, by_column, kind = np.lib.format.read_array_header_1_0(header)
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{name}.npy has no header") from error
    if math.prod(shape) * kind.itemsize != len(content) - header.tell():
        raise ValueError(f"{name}.npy is not the size of {kind}{list(shape)}")
    values = np.frombuffer(content, kind, offset=header.tell())
    return values.reshape(shape[::-1]).T if by_column else values.reshape(shape)


def embed(texts: FanoutTexts, encode: Encode, *, cache: str | Path | None = None) -> FanoutData:
    """Embeds contents and queries by `encode` (`functools.partial(encoder.encode, batch_size=128)` suits).

    cache: folder that keeps the result as `<name>-<digest of the texts>.npz`. A file is used again if
        it is intact and a few of its rows agree with `encode`; otherwise it is written anew.
    Raises InputError where `texts.ready` disagrees with `encode`, or the cache cannot be written.
    """
    path = None
    if cache is not None:
        path = Path(cache) / f"{texts.name}-{_digest(texts)}.npz"
        kept = _kept(path, texts, encode)
        if kept is not None:
            return kept
    if texts.ready is None:
        embeddings = encode(list(texts.contents), max_tokens=texts.max_tokens)
    else:
        embeddings = agreeing(texts.ready, texts.contents, encode, max_tokens=texts.max_tokens)
    data = _with_embeddings(texts, embeddings, encode(list(texts.queries), max_tokens=texts.max_tokens))
    if path is not None:
        data.save(path)
    return data


def agreeing(embeddings: np.ndarray, texts: Sequence[str], encode: Encode, *, max_tokens: int) -> np.ndarray:
    """`embeddings` float[n, E] as unit-norm f32, once a few rows agree with `encode` (cosine > .999).

    Raises InputError where shape or rows do not fit `texts`.
    """
    if embeddings.ndim != 2 or len(embeddings) != len(texts):
        problem = f"shape {embeddings.shape} does not fit {len(texts)} texts"
        raise InputError("embeddings", problem, "Pass one row per text, in the documented order.")
    size = min(_CHECKED_ROWS, len(texts))
    some = np.sort(np.random.default_rng(0).choice(len(texts), size, replace=False))
    own = encode([texts[i] for i in some], max_tokens=max_tokens)
    rows = np.asarray(embeddings, np.float32)
    if rows.shape[1] != own.shape[1]:
        problem = f"{rows.shape[1]} wide, the encoder gives {own.shape[1]}"
        raise InputError("embeddings", problem, "Pass embeddings of the same encoder.")
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosine = np.einsum("ne,ne->n", rows[some], own)
    if not cosine.min() > _MIN_COSINE:  # also catches NaN
        worst = int(some[cosine.argmin()])
        problem = f"row {worst} has cosine {cosine.min():.4f} to the encoding of {texts[worst]!r}"
        raise InputError("embeddings", problem, "Pass rows in the documented order, same encoder.")
    return rows


def draw_split(groups: Sequence[Any], *, seed: int) -> np.ndarray:
    """i8[Q]: 8:1:1 over queries, drawn by `seed`; queries of one group stay together.

    groups: Q hashable labels (all different where nothing ties queries). Whole groups go to test until
        it has a tenth of the queries, then to validation until it has; the rest train, and so do groups
        above the median that hold more than a twentieth, lest one of them be all that is tested.
    Raises InputError where the groups are too few or too large to give each part some.
    """
    distinct = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    number = np.array([distinct[group] for group in groups], np.int64)
    size = np.bincount(number, minlength=len(distinct))
    part = np.zeros(len(distinct), np.int8)
    filled, most = {2: 0, 1: 0}, max(np.median(size), len(groups) / 20) if len(size) else 0
    for group in np.random.default_rng(seed).permutation(len(distinct)):
        open_ = [p for p, queries in filled.items() if queries < len(groups) / 10]
        if open_ and size[group] <= most:
            part[group] = open_[0]
            filled[open_[0]] += size[group]
    if set(part.tolist()) != {0, 1, 2}:
        problem = f"{len(groups)} queries in {len(distinct)} groups do not fill {', '.join(SPLITS)}"
        raise InputError("queries", problem, "Use more groups, or smaller ones.")
    return part[number]


def _check_texts(data: FanoutTexts | FanoutData) -> None:
    """Raises unless texts, split and references fit each other; makes the arrays read-only."""
    for name in ("contents", "queries"):
        texts = getattr(data, name)
        if isinstance(texts, str) or not len(texts):
            raise InputError(name, "not a non-empty list of strings", "Pass a list of str.")
        blank = next((i for i, t in enumerate(texts) if not isinstance(t, str) or not t.strip()), None)
        if blank is not None:
            raise InputError(name, f"row {blank} is {texts[blank]!r}", "Pass a text with a word in it.")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:  # JSON may spell half a character
            problem = f"holds {error.object[error.start]!r}, no character"
            raise InputError(name, problem, "Mend the text.") from error
        if len(set(texts)) < len(texts):
            seen: set[str] = set()
            again = next(text for text in texts if text in seen or seen.add(text))
            raise InputError(name, f"{again!r} is there twice", "Pass each text once.")
    split = np.asarray(data.split)
    if split.shape != (len(data.queries),) or not np.isin(split, range(len(SPLITS))).all():
        problem = f"{split.dtype}{list(split.shape)} is not one of 0, 1, 2 for {len(data.queries)} queries"
        raise InputError("split", problem, f"0 is {SPLITS[0]}, 1 {SPLITS[1]}, 2 {SPLITS[2]}.")
    for i, part in enumerate(SPLITS):
        if not (split == i).any():
            raise InputError("split", f"no query is in {part}", "Give each part some: see draw_split.")
    part_of: dict[str, int] = {}
    for query, part in zip(data.queries, split.tolist(), strict=True):
        if part_of.setdefault(folded(query), part) != part:
            problem = f"{query!r} is in two parts, in other case or spacing"
            raise InputError("split", problem, "Keep what the encoder reads alike in one part.")
    object.__setattr__(data, "split", _read_only(split.astype(np.int8)))
    if data.references is not None:
        object.__setattr__(data, "references", _checked_references(data))


def _checked_references(data: FanoutTexts | FanoutData) -> list[np.ndarray]:
    if len(data.references) != len(data.queries):
        problem = f"{len(data.references)} sets for {len(data.queries)} queries"
        raise InputError("references", problem, "Pass one set per query, or None.")
    checked = []
    for query, rows in zip(data.queries, map(np.asarray, data.references), strict=True):
        sound = rows.ndim == 1 and len(rows) and np.issubdtype(rows.dtype, np.integer)
        if not (sound and rows.min() >= 0 and rows.max() < len(data.contents)):
            problem = f"the set of {query!r} is not rows of the {len(data.contents)} contents"
            raise InputError("references", problem, "Pass one or more rows per query.")
        if len(np.unique(rows)) < len(rows):
            raise InputError("references", f"the set of {query!r} repeats a row", "Pass each row once.")
        checked.append(_read_only(rows.astype(np.int32)))
    return checked


def _checked_embeddings(name: str, rows: np.ndarray, count: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.dtype != np.float32 or rows.ndim != 2 or len(rows) != count:
        problem = f"{rows.dtype}{list(rows.shape)} is not float32[{count}, E]"
        raise InputError(name, problem, "Pass one float32 row per text.")
    off = np.abs(np.linalg.norm(rows, axis=1) - 1)
    if not off.max() < 1e-3:  # also catches NaN
        worst = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
        raise InputError(name, f"row {worst} is not of unit norm", "Divide each row by its norm.")
    return _read_only(rows)


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _digest(texts: FanoutTexts) -> str:
    """Of what the embeddings depend on; the encoder is checked by its rows instead."""
    parts = json.dumps([_FORMAT, texts.max_tokens, list(texts.contents), list(texts.queries)])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _kept(path: Path, texts: FanoutTexts, encode: Encode) -> FanoutData | None:
    """`texts` with the embeddings of an earlier run, or None where there are none that `encode` gives."""
    if not path.is_file():
        return None
    try:
        kept = load(path)
        for rows, of in ((kept.embeddings, texts.contents), (kept.query_embeddings, texts.queries)):
            agreeing(rows, of, encode, max_tokens=texts.max_tokens)
    except InputError:  # corrupt, or another encoder's
        return None
    return _with_embeddings(texts, kept.embeddings, kept.query_embeddings)


def _with_embeddings(texts: FanoutTexts, embeddings: np.ndarray, queries: np.ndarray) -> FanoutData:
    return FanoutData(
        name=texts.name,
        contents=texts.contents,
        embeddings=embeddings,
        queries=texts.queries,
        query_embeddings=queries,
        split=texts.split,
        references=texts.references,
        card=texts.card,
    )
