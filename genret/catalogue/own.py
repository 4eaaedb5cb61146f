"""Your own contents and queries, for fan-out: a folder of two files.

contents.txt     one content a line, a title, a caption or a document's first words
queries.jsonl    one query a line: {"query": "a rainy sunday"}, and, in all lines or in none,
                 "references": [contents that answer it, as they stand in contents.txt]   (WSCR; else OAR)
                 "split": "train", "validation" or "test"                                  (else 8:1:1)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from genret.catalogue.fanout import SPLITS, FanoutTexts, draw_split
from genret.catalogue.texts import deduplicated, folded, json_lines
from genret.types import InputError

FIX = "Pass the folder of contents.txt and queries.jsonl."
FORM = 'Write {"query": ..., "references": [...], "split": ...}, the last two if you like.'
KEYS = {"query", "references", "split"}


def read(folder: str | Path, *, seed: int = 0) -> FanoutTexts:
    """The data set in `folder`, which gives it its name.

    contents: the lines with a word in them; those that differ in case or spacing alone are one. A split that
    is not given is drawn by `seed`.
    Raises InputError for a missing file, what is not UTF-8 or not JSON, an unknown or missing key, a content
    that is not in contents.txt, and whatever `FanoutTexts` refuses.
    """
    folder = Path(folder)
    lines = _read_contents(folder / "contents.txt")
    firsts, row_of = deduplicated(lines)
    row = dict(zip(lines, row_of.tolist(), strict=True))
    path = folder / "queries.jsonl"
    rows = [_checked(where, found) for where, found in json_lines(path, "a query", FORM, FIX)]
    if not rows:
        raise InputError(str(path), "holds no query", FORM)
    given = {key: sum(key in found for found in rows) for key in ("references", "split")}
    for key, count in given.items():
        if count not in (0, len(rows)):
            problem = f"{count} of {len(rows)} queries have it"
            raise InputError(key, problem, "Give it to all of them, or to none.")
    queries = [found["query"] for found in rows]
    references = None
    if given["references"]:
        for found in rows:
            for text in found["references"]:
                if text not in row:
                    problem = f"{text!r}, of {found['query']!r}, is not in contents.txt"
                    raise InputError("references", problem, "Add it, or drop it.")
        references = [np.unique([row[text] for text in found["references"]]) for found in rows]
    if given["split"]:
        split = np.array([SPLITS.index(found["split"]) for found in rows], np.int8)
    else:
        split = draw_split([folded(query) for query in queries], seed=seed)
    return FanoutTexts(
        name=folder.resolve().name,
        contents=[lines[i] for i in firsts],
        queries=queries,
        split=split,
        references=references,
        card={
            "contents": f"{len(firsts)} texts of {len(lines)} lines",
            "split": "as given" if given["split"] else f"8:1:1 by query, seed {seed}",
        },
    )


def _read_contents(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputError(str(path), "no such file", FIX) from error
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"not UTF-8 ({error})", FIX) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError(str(path), "holds no content", "Write one a line.")
    return found


def _checked(where: str, found: Any) -> dict[str, Any]:
    """A line of queries.jsonl, texts stripped as those of contents.txt are."""
    if not isinstance(found, dict) or not isinstance(found.get("query"), str):
        raise InputError(where, 'has no text under "query"', FORM)
    if unknown := sorted(found.keys() - KEYS):
        raise InputError(where, f"unknown key {unknown[0]!r}", FORM)
    if "split" in found and found["split"] not in SPLITS:
        raise InputError(where, f"split {found['split']!r}", f"Use one of {', '.join(SPLITS)}.")
    if "references" in found:
        texts = found["references"]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise InputError(where, '"references" is no list of texts', FORM)
        found = found | {"references": [text.strip() for text in texts]}
    return found | {"query": found["query"].strip()}
