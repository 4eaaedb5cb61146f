"""The Maryland Polyvore outfits: a weak reference set of items for each outfit's text (WSCR).

Layout as published with Han et al. 2017 (arXiv:1707.05691): a folder with `train_no_dup.json`,
`valid_no_dup.json` and `test_no_dup.json`, each a list of outfits {"set_id", "name", "desc", "items", ...}
with items {"index", "name", "categoryid", ...}, and `category_id.txt` with lines "<id> <name>".
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from genret.catalogue.fanout import FanoutTexts
from genret.catalogue.texts import deduplicated, plain
from genret.types import InputError

FILES = ("train_no_dup.json", "valid_no_dup.json", "test_no_dup.json")  # in the order of SPLITS
CATEGORIES = "category_id.txt"
FIX = f"Pass the unpacked folder of {', '.join(FILES)} and {CATEGORIES}."


def read(folder: str | Path) -> FanoutTexts:
    """The outfits in `folder`, in the published split, over all items.

    contents: item names, without markup; an item without one goes by its category's name, and one with
        neither is passed over. Names that differ in case or spacing alone are one.
    queries: "name. desc" of an outfit, whichever there are. A text shared by several outfits names none
        of them: these give no query, nor does an outfit without text or without items; the card counts them.
    references: the items of the outfit.
    Raises InputError for a missing file, malformed JSON, an outfit or item that is not one (file and
    number are named), and a split left without a query.
    """
    folder = Path(folder)
    categories = _read_categories(folder / CATEGORIES)
    texts: list[str] = []
    items: list[list[str]] = []
    parts: list[int] = []
    for part, name in enumerate(FILES):
        for number, outfit in enumerate(_read_json(folder / name), start=1):
            text, found = _outfit(outfit, categories, f"outfit {number} of {name}")
            texts.append(text)
            items.append(found)
            parts.append(part)

    flat = [item for found in items for item in found]
    firsts, content_of = deduplicated(flat)
    sets = np.split(content_of, np.cumsum([len(found) for found in items])[:-1])
    keys = [" ".join(text.casefold().split()) for text in texts]
    times = Counter(keys)
    kept = [i for i, key in enumerate(keys) if key and times[key] == 1 and len(sets[i])]
    split = np.array(parts, np.int8)[kept]
    for part, name in enumerate(FILES):
        if not (split == part).any():
            raise InputError(name, "has no outfit with items and a text of its own", FIX)
    shared = sum(count for key, count in times.items() if key and count > 1)
    return FanoutTexts(
        name="polyvore",
        contents=[flat[i] for i in firsts],
        queries=[texts[i] for i in kept],
        split=split,
        references=[np.unique(sets[i]) for i in kept],
        card={
            "source": "Han et al. 2017, arXiv:1707.05691",
            "contents": f"{len(firsts)} distinct names of {len(flat)} items in {len(texts)} outfits",
            "queries": f"{len(kept)} outfits; {shared} share their text with another, "
            f"{len(texts) - len(kept) - shared} lack text or items",
            "split": "as published",
        },
    )


def _outfit(outfit: Any, categories: dict[int, str], where: str) -> tuple[str, list[str]]:
    """(text, item names) of one entry of a file."""
    try:
        text = ". ".join(filter(None, (_text(outfit[key]) for key in ("name", "desc"))))
        items = [(_text(item["name"]), int(item["categoryid"])) for item in outfit["items"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(where, f"not an outfit ({error!r})", "Fetch the file again.") from error
    names = (name or categories.get(category, "") for name, category in items)
    return text, [name for name in names if name]


def _text(value: Any) -> str:
    """A name or description as plain text; null is none."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return plain(value or "")


def _read_json(path: Path) -> list[Any]:
    try:
        outfits = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(str(path), "no such file", FIX) from error
    except (ValueError, RecursionError) as error:  # malformed, cut off, or not UTF-8
        raise InputError(str(path), f"not readable as JSON ({error})", "Fetch it again.") from error
    if not isinstance(outfits, list) or not outfits:
        raise InputError(str(path), "not a list of outfits", "Fetch it again.")
    return outfits


def _read_categories(path: Path) -> dict[int, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
        return {int(number): name.strip() for number, name in pairs}
    except FileNotFoundError as error:
        raise InputError(str(path), "no such file", FIX) from error
    except ValueError as error:
        raise InputError(str(path), f"not lines of an id and a name ({error})", "Fetch it again.") from error
