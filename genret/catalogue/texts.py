"""Texts as people write them and as the encoder reads them: neither case nor markup counts; JSON by lines."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genret.types import InputError

_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def folded(text: str) -> str:
    """`text` as the encoder reads it, which knows neither case nor spacing."""
    return " ".join(text.casefold().split())


def deduplicated(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(i32[d] row where each distinct text appears first, i32[n] number of each text among the distinct).

    Texts that differ in case or white space alone are one: the encoder reads them alike.
    """
    keys = [folded(text) for text in texts]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    numbers = np.array([number[key] for key in keys], np.int32)
    return np.unique(numbers, return_index=True)[1].astype(np.int32), numbers


def json_lines(path: Path, what: str, form: str, fix: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, the value) of each line of a JSONL file. Raises InputError for a missing file, what
    is not UTF-8, and a line that is no JSON; empty ones are passed over. what: a line is, in words; form: how
    to write one; fix: of the file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise InputError(str(path), "no such file", fix) from error
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"not UTF-8 ({error})", fix) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(where, f"not {what} ({error!r})", form) from error


def plain(text: str) -> str:
    """`text` without HTML tags and entities, white space single."""
    return " ".join(_TAG.sub("", html.unescape(text)).split())
