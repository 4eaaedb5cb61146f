"""Fan-out queries over Kaggle's "Fashion Product Images" table: gender x usage x season, and with colour.

A query such as "black casual summer fashion for women" is answered by every product with these four
values: a large weak reference set (WSCR) in which many kinds of product have a place.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from genret.catalogue import kaggle
from genret.catalogue.fanout import FanoutTexts, draw_split
from genret.catalogue.texts import deduplicated
from genret.types import InputError

COLUMNS = ("gender", "usage", "season", "baseColour", "productDisplayName")
LEAST = 100  # products of a gender, usage and season
LEAST_COLOURED = 40  # and of one colour of these


def read(
    csv_path: str | Path,
    *,
    embeddings: np.ndarray | None = None,
    least: int = LEAST,
    least_coloured: int = LEAST_COLOURED,
    seed: int = 0,
) -> FanoutTexts:
    """Queries by facets over the names of the table's products.

    csv_path: styles.csv. embeddings: of every row's name, float[rows, E], where they exist already.
    contents: product names; those that differ in case or spacing alone are one, blank ones none.
    queries: combinations of a known gender, usage and season that have `least` products, and of these
        with a known colour that have `least_coloured`. references: the names with a product so marked.
    split: 8:1:1, drawn by `seed`; the colours of a combination stay with it, for their sets lie in its set.
    Raises InputError for a missing file, column or field, embeddings of another length, and a table too
    small for three combinations.
    """
    rows = kaggle.read_csv(Path(csv_path), COLUMNS, surplus_in_last=True)
    if embeddings is not None and len(embeddings) != len(rows):
        problem = f"{len(embeddings)} rows for the {len(rows)} of {Path(csv_path).name}"
        raise InputError("embeddings", problem, "Pass one row per row of the table.")
    named = [i for i, row in enumerate(rows) if row["productDisplayName"].strip()]
    names = [rows[i]["productDisplayName"] for i in named]
    firsts, content_of = deduplicated(names)

    products: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, content in zip(named, content_of.tolist(), strict=True):
        facets = tuple(rows[i][column] for column in COLUMNS[:4])
        for key in (facets[:3], facets):
            if kaggle.MISSING.isdisjoint(key):
                products[key].append(content)
    wide = sorted(key for key, found in products.items() if len(key) == 3 and len(found) >= least)
    narrow = sorted(
        key
        for key, found in products.items()
        if len(key) == 4 and key[:3] in wide and len(found) >= least_coloured
    )
    if len(wide) < 3:
        problem = f"{len(wide)} combinations of facets have {least} products"
        raise InputError(str(csv_path), problem, "Use a larger table, or lower the counts.")
    queries = wide + narrow
    return FanoutTexts(
        name="fashion",
        contents=[names[i] for i in firsts],
        queries=[_text(*key) for key in queries],
        split=draw_split([key[:3] for key in queries], seed=seed),
        references=[np.unique(products[key]) for key in queries],
        max_tokens=kaggle.FASHION_TOKENS,
        card={
            "contents": f"{len(firsts)} distinct names of {len(rows)} products",
            "queries": f"{len(wide)} combinations of gender, usage and season with {least} products or more, "
            f"and {len(narrow)} with a colour and {least_coloured} or more",
            "split": f"8:1:1 by gender, usage and season, seed {seed}",
        },
        ready=None if embeddings is None else embeddings[np.array(named)[firsts]],
    )


def _text(gender: str, usage: str, season: str, colour: str = "") -> str:
    colour = "multicoloured" if colour == "Multi" else colour
    words = f"{colour} {usage} {season} fashion".lower().split()
    return " ".join(["unisex", *words] if gender == "Unisex" else [*words, "for", gender.lower()])
