"""Catalogues from two Kaggle tables: fashion products and the titles of streaming services.

Both embed a text with the encoder that the caller passes
(`genret.language.encoder.TextEncoder.encode` fits) and leave `pattern` out: reading the file then
fits k-means cells (400 suit fashion, 300 streaming). A label is 1, 0 or -1 where the table does not
say: a missing value is unknown, never negative.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from genret.catalogue import format
from genret.types import InputError

# Called as encode(texts, max_tokens=n) -> f32[len(texts), E].
Encode = Callable[..., np.ndarray]

FASHION_TOKENS, STREAMING_TOKENS = 32, 64
FASHION_COLUMNS = "id baseColour season year usage productDisplayName".split()
STREAMING_COLUMNS = "show_id type title country release_year rating description".split()
SERVICES = ("netflix", "amazon_prime", "hulu", "disney_plus")  # the first to list a title keeps it

FAMILY_SAFE = frozenset("G PG TV-Y TV-Y7 TV-Y7-FV TV-G TV-PG ALL 7+".split())
UNRATED = frozenset("NR TV-NR UR UNRATED NOT_RATE".split())  # rated by nobody: unknown
MISSING = frozenset(("", "NA", "N/A", "nan"))  # how the tables write "unknown"

_MIN_COSINE, _CHECKED_ROWS = 0.999, 8


def fashion(
    csv_path: str | Path,
    path: str | Path,
    *,
    encode: Encode,
    embeddings: np.ndarray | None = None,
) -> Path:
    """Writes the catalogue of Kaggle's "Fashion Product Images" to `path`.

    csv_path: its table, styles.csv; every row becomes an item.
    text: productDisplayName, cut to 32 tokens. group: the name without case and spacing, for many
    products share a name and with it an embedding. Attributes: season_cold (Fall or Winter),
    usage_special (not Casual), colour_black, year_2013 (2013 or later).
    embeddings: optional [N, E] already computed, rows as in the file; `encode` then only checks a
    few of them.
    Raises InputError for a missing file, column or field, and for embeddings that disagree with
    `encode`.
    """
    # The table does not quote its last column, the name: commas inside it make surplus fields,
    # which belong to it.
    rows = read_csv(Path(csv_path), FASHION_COLUMNS, surplus_in_last=True)
    texts = [row["productDisplayName"] for row in rows]
    season, usage, colour = ([row[c] for row in rows] for c in ("season", "usage", "baseColour"))
    format.write(
        path,
        ids=[row["id"] for row in rows],
        embeddings=_embed(texts, FASHION_TOKENS, encode, embeddings),
        attributes={
            "season_cold": _label(season, lambda value: value in ("Fall", "Winter")),
            "usage_special": _label(usage, lambda value: value != "Casual"),
            "colour_black": _label(colour, lambda value: value == "Black"),
            "year_2013": _label(_years(rows, "year", csv_path), lambda year: int(year) >= 2013),
        },
        texts=texts,
        groups=[_normalised(text) for text in texts],
    )
    return Path(path)


def streaming(
    source: str | Path | Sequence[str | Path],
    path: str | Path,
    *,
    encode: Encode,
    embeddings: np.ndarray | None = None,
) -> Path:
    """Writes the catalogue of Netflix, Prime Video, Hulu and Disney+ titles to `path`.

    source: a folder with {netflix,amazon_prime,hulu,disney_plus}_titles.csv, read in this order, or
    the files in the order wanted. Of rows that share title and release_year the first is kept. id:
    "<service>/<show_id>".
    text: "title. description", cut to 64 tokens. group: the text without case and spacing.
    Attributes: family_safe (by rating), series, released_2018 (2018 or later), us_produced (the
    United States among its countries).
    embeddings: optional [N, E] already computed, rows in the de-duplicated order; `encode` then
    only checks a few.
    Raises InputError for a missing file, column or field, and for embeddings that disagree with
    `encode`.
    """
    if isinstance(source, (str, Path)):
        source = [Path(source) / f"{service}_titles.csv" for service in SERVICES]
    kept: dict[tuple[str, str], dict[str, str]] = {}
    for file in map(Path, source):
        rows = read_csv(file, STREAMING_COLUMNS)
        for row, year in zip(rows, _years(rows, "release_year", file), strict=True):
            row["id"] = f"{file.stem.removesuffix('_titles')}/{row['show_id']}"
            kept.setdefault((row["title"], year), row)
    rows = list(kept.values())
    texts = [f"{row['title']}. {row['description']}" for row in rows]
    # Some rows hold their running time ("74 min", "1 Season") in the place of the rating.
    no_rating = (" min", " Season", " Seasons")
    ratings = [row["rating"] for row in rows]
    ratings = ["" if r in UNRATED or r.endswith(no_rating) else r for r in ratings]
    format.write(
        path,
        ids=[row["id"] for row in rows],
        embeddings=_embed(texts, STREAMING_TOKENS, encode, embeddings),
        attributes={
            "family_safe": _label(ratings, FAMILY_SAFE.__contains__),
            "series": _label([row["type"] for row in rows], lambda value: value == "TV Show"),
            "released_2018": _label([year for _, year in kept], lambda year: int(year) >= 2018),
            "us_produced": _label(
                [row["country"] for row in rows],
                lambda value: "United States" in (country.strip() for country in value.split(",")),
            ),
        },
        texts=texts,
        groups=[_normalised(text) for text in texts],
    )
    return Path(path)


def read_csv(path: Path, columns: Sequence[str], surplus_in_last: bool = False) -> list[dict[str, str]]:
    """Rows of a CSV file by column name; every named column must be there, others may be."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *lines = csv.reader(file, strict=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(str(path), "no such file", "Pass the table as Kaggle ships it.") from error
    except (ValueError, csv.Error) as error:  # ValueError: an empty file, or not UTF-8
        problem = f"not a UTF-8 CSV table ({error})"
        raise InputError(str(path), problem, "Fetch it again.") from error
    for column in columns:
        if column not in header:
            problem = f"no such column in {path.name} (it has: {', '.join(header)})"
            raise InputError(column, problem, "Pass the table as Kaggle ships it.")
    rows, width = [], len(header)
    for number, line in enumerate(lines, start=1):
        if len(line) > width and surplus_in_last and header[-1] == columns[-1]:
            line[width - 1 :] = [",".join(line[width - 1 :])]
        if len(line) != width:
            problem = f"data row {number} has {len(line)} fields, not {width}"
            raise InputError(str(path), problem, "Mend the row, or fetch the table again.")
        rows.append(dict(zip(header, line, strict=True)))
    if not rows:
        raise InputError(str(path), "holds no rows", "Fetch the table again.")
    return rows


def _label(values: Sequence[str], positive: Callable[[str], bool]) -> np.ndarray:
    """i8[N]: 1 or 0 where the value is known, else -1."""
    return np.array([-1 if value in MISSING else positive(value) for value in values], np.int8)


def _years(rows: Sequence[dict[str, str]], column: str, path: str | Path) -> list[str]:
    """The years as digits; a table that went through pandas with a year missing has "2012.0"."""
    years = [row[column].removesuffix(".0") for row in rows]
    for number, year in enumerate(years, start=1):
        if year not in MISSING and not year.isdecimal():
            problem = f"{year!r} in data row {number} of {Path(path).name} is not a year"
            raise InputError(column, problem, "Write the year as digits, or leave it empty.")
    return years


def _normalised(text: str) -> str:
    """Texts equal under this share an embedding: the encoder is uncased, splits on white space."""
    return " ".join(text.casefold().split())


def _embed(
    texts: Sequence[str], max_tokens: int, encode: Encode, embeddings: np.ndarray | None
) -> np.ndarray:
    """f32[N, E]: each distinct text encoded once, or `embeddings` with a few rows checked."""
    if embeddings is None:
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        return encode(list(distinct), max_tokens=max_tokens)[[distinct[text] for text in texts]]
    if embeddings.ndim != 2 or len(embeddings) != len(texts):
        problem = f"shape {embeddings.shape} does not fit {len(texts)} items"
        raise InputError("embeddings", problem, "Pass one row per item, in the documented order.")
    size = min(_CHECKED_ROWS, len(texts))
    some = np.random.default_rng(0).choice(len(texts), size, replace=False)
    own = encode([texts[i] for i in some], max_tokens=max_tokens)
    given = np.asarray(embeddings[some], np.float32)
    if given.shape != own.shape:
        problem = f"{given.shape[1]} wide, the encoder gives {own.shape[1]}"
        raise InputError("embeddings", problem, "Pass embeddings of the same encoder.")
    norms = np.linalg.norm(given, axis=1) * np.linalg.norm(own, axis=1)
    cosine = np.einsum("ne,ne->n", given, own) / np.maximum(norms, 1e-12)
    if not cosine.min() > _MIN_COSINE:  # also catches NaN
        worst = int(some[cosine.argmin()])
        problem = f"row {worst} has cosine {cosine.min():.4f} to the encoding of {texts[worst]!r}"
        raise InputError("embeddings", problem, "Pass rows in the documented order, same encoder.")
    return np.asarray(embeddings, np.float32)
