"""Editorial playlists: a weak reference set of tracks for each list's name and description (WSCR).

Read from a folder with `playlists.jsonl`, one {"name", "description", "track_ids"} a line, and
`tracks.csv` with the columns id, title and artists.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from genret.catalogue.fanout import FanoutTexts, draw_split
from genret.catalogue.texts import deduplicated, folded, json_lines, plain
from genret.types import InputError

# Charts follow no theme: "Top 50 - Iceland". Personal lists are made for or by one listener.
CHART = re.compile(r"Top \d+ - ")
PERSONAL = re.compile(r"Discover Weekly\b|.* Radio$|.*\bRecent Favorites$")
FIX = "Pass the folder of playlists.jsonl and tracks.csv."
FORM = 'Write {"name": ..., "description": ..., "track_ids": [...]}.'


def read(folder: str | Path, *, seed: int = 0) -> FanoutTexts:
    """The playlists in `folder` that are neither charts nor personal, over all tracks.

    contents: "title - artists", all of tracks.csv, those of left-out lists too; texts that differ in case
        or spacing alone are one. queries: "name. description", without markup; the name alone where
        there is no description. references: the tracks of the list. split: 8:1:1 by list, drawn by `seed`.
    Raises InputError for a missing file, column or key, malformed JSON, an unknown track, an empty list,
    and two lists of one text.
    """
    folder = Path(folder)
    ids, titles = _read_tracks(folder / "tracks.csv")
    firsts, row_of = deduplicated(titles)
    row = dict(zip(ids, row_of.tolist(), strict=True))
    lists = _read_lists(folder / "playlists.jsonl", row)
    kept = [each for each in lists if not (CHART.match(each["name"]) or PERSONAL.match(each["name"]))]
    if not kept:
        raise InputError(str(folder), "holds no list but charts and personal ones", "Add some lists.")
    queries = [". ".join(filter(None, (plain(each["name"]), plain(each["description"])))) for each in kept]
    return FanoutTexts(
        name="playlists",
        contents=[titles[i] for i in firsts],
        queries=queries,
        split=draw_split([folded(query) for query in queries], seed=seed),
        references=[np.unique([row[track] for track in each["track_ids"]]) for each in kept],
        card={
            "contents": f"{len(firsts)} texts of {len(titles)} tracks",
            "queries": f"{len(kept)} of {len(lists)} lists; charts (Top <n> - <place>) and personal lists "
            "(Discover Weekly, <artist> Radio, <owner> Recent Favorites) are left out",
            "split": f"8:1:1 by list, seed {seed}",
        },
    )


def _read_tracks(path: Path) -> tuple[list[str], list[str]]:
    """(ids, "title - artists") of every track."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except FileNotFoundError as error:
        raise InputError(str(path), "no such file", FIX) from error
    except (ValueError, csv.Error) as error:
        raise InputError(str(path), f"not a UTF-8 CSV table ({error})", "Fetch it again.") from error
    if not rows:
        raise InputError(str(path), "holds no tracks", "Fetch it again.")
    for number, row in enumerate(rows, start=1):
        for column in ("id", "title", "artists"):
            if not row.get(column):  # absent as a column, cut off or empty
                raise InputError(column, f"data row {number} of {path.name} has none", "Fetch it again.")
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        raise InputError("id", f"not unique in {path.name}", "Give every track its own id.")
    return ids, [f"{row['title']} - {row['artists']}" for row in rows]


def _read_lists(path: Path, tracks: dict[str, int]) -> list[dict]:
    lists = []
    for where, found in json_lines(path, "a playlist", FORM, FIX):
        try:
            each = {"name": found["name"], "description": found["description"] or ""}
            each["track_ids"] = list(found["track_ids"])
            if not all(isinstance(part, str) for part in (*list(each.values())[:2], *each["track_ids"])):
                raise TypeError("a text that is no string")
        except (KeyError, TypeError) as error:
            raise InputError(where, f"not a playlist ({error!r})", FORM) from error
        if not each["name"].strip() or not each["track_ids"]:
            raise InputError(where, "a playlist without a name or without tracks", "Drop it.")
        unknown = [track for track in each["track_ids"] if track not in tracks]
        if unknown:
            raise InputError(where, f"track {unknown[0]!r} is not in tracks.csv", "Add it, or drop it.")
        lists.append(each)
    return lists
