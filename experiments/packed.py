"""Everything a report reads in one small file that can be committed: JSON Lines, of six kinds in this order.

{"genret": "results", ...}     config, command, environment, predictors, and what all rows share
{"contexts": ...}              once per cell: the pattern of each context
{"checkpoints": ...}           once per folder: [step, split, domain, seed, joint, attribute, purity]
{"method": ...}                what all rows of a method share
[method, split, domain, ...]   one row, as the header's "columns" name it
{"hits": ...}                  once per (method, cell) that a comparison reads: per context, the hits
                               among K summed over seeds, in base 36 at 1 or 2 digits each, or a list
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.evidence import compared
from experiments.report_rows import CHECKPOINT, COUNTED, PREDICTOR, About, Results, counts, gather
from experiments.workdir import check_rows, write_text
from genret.types import InputError

KEYS = ("method", "split", "domain", "seed")
COUNTS = ("contexts", "patterns")  # of a cell; its list of patterns tells them
STEP = ("step", "split", "domain", "seed", "joint", "attribute", "purity")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def encode(counts: np.ndarray) -> str | list[int]:
    """Counts i64[Q] as a base-36 string of 1 or 2 digits each (its length tells which), or a list."""
    most = int(counts.max(initial=0))
    if most >= 36**2:
        return counts.tolist()
    return "".join((DIGITS[n // 36] if most >= 36 else "") + DIGITS[n % 36] for n in counts.tolist())


def decode(said: str | list[int], contexts: int) -> np.ndarray:
    """The counts again, i64[Q]; raises InputError where they are not one for each of `contexts`."""
    if isinstance(said, str):
        digits = max(1, len(said) // max(contexts, 1))
        said = [int(said[i : i + digits], 36) for i in range(0, len(said), digits)]
    if len(said) != contexts:
        raise InputError("hits", f"hold {len(said)} counts for {contexts} contexts", "pack the run again")
    return np.array(said, int)


def save_packed(r: Results, path: Path) -> Path:
    """Pack everything that the report of `r` reads into `path`, and return it."""
    rows = [{key: value for key, value in row.items() if key not in COUNTS} for row in r.rows]
    names = list(dict.fromkeys(key for row in rows for key in row))
    of: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault(row["method"], []).append(row)

    def same(name: str, group: list[dict[str, Any]]) -> bool:
        return all(name in row and row[name] == group[0].get(name) for row in group)

    shared = {name: rows[0][name] for name in names if name not in KEYS and same(name, rows)}
    rest = [name for name in names if name not in KEYS and name not in shared]
    # A field that an older row lacks stays with the methods that have it.
    own = [n for n in rest if all(same(n, g) or not any(n in row for row in g) for g in of.values())]
    columns = [*KEYS, *(name for name in rest if name not in own)]
    for row in rows:
        for name in columns:
            if name not in row:
                problem = f"has rows with and without {name!r} ({row['method']})"
                raise InputError("--save", problem, "evaluate again in a new --workdir")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    header = {
        "genret": "results", "version": 1, "command": r.about.command,
        "environment": {"packed with": versions, **r.about.environment},
        "columns": columns, "rows": shared, "config": r.about.config, "predictors": r.about.predictors,
    }  # fmt: skip
    lines: list[Any] = [header]
    for (split, domain), pattern in r.pattern.items():
        lines.append({"contexts": [split, domain], "pattern": pattern.tolist()})
    for folder in dict.fromkeys(row["folder"] for row in r.about.checkpoints):
        found = [row for row in r.about.checkpoints if row["folder"] == folder]
        lines.append({"checkpoints": folder, "rows": [[row[name] for name in STEP] for row in found]})
    keep = compared(r)
    for method, group in of.items():
        lines.append({"method": method, **{n: group[0][n] for n in own if n in group[0]}})
        lines += [[row[name] for name in columns] for row in group]
        for split, domain in r.pattern if method in keep else ():
            seeds = sum((row["split"], row["domain"]) == (split, domain) for row in group)
            sums = {m: np.rint(r.hits[m, method, split, domain] * r.k * seeds).astype(int) for m in COUNTED}
            lines.append({"hits": [method, split, domain], **{m: encode(n) for m, n in sums.items()}})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return path


def read_packed(path: Path) -> Results:
    """The Results that were packed; the hits are those that a comparison reads.

    Raises InputError for a file that is missing, cut short, or of another kind.
    """
    try:
        header, *lines = (json.loads(line) for line in path.read_text().splitlines())
        if header["genret"] != "results" or header["version"] != 1:
            raise ValueError("of another kind")
        rows, own, hits, pattern, checkpoints = [], {}, {}, {}, []
        for line in lines:
            if isinstance(line, list):
                row = dict(zip(header["columns"], line, strict=True))
                rows.append({**row, **header["rows"], **own[row["method"]]})
            elif "contexts" in line:
                pattern[tuple(line["contexts"])] = counts(line["pattern"])
            elif "checkpoints" in line:
                folder = {"folder": line["checkpoints"]}
                checkpoints += [folder | dict(zip(STEP, row, strict=True)) for row in line["rows"]]
            elif "method" in line:
                own[line["method"]] = line
            else:
                for metric in COUNTED:
                    count = len(pattern[tuple(line["hits"][1:])])
                    hits[(metric, *line["hits"])] = counts(decode(line[metric], count).tolist(), count)
        beside = (header[name] for name in ("config", "command", "environment", "predictors"))
        about = About(*beside, checkpoints)
        check_rows(path, [header], {"config": "dict", "command": "text", "environment": "dict"})
        check_rows(path, about.predictors, PREDICTOR)
        check_rows(path, checkpoints, CHECKPOINT)
        r = gather(path, rows, hits, pattern, about=about)
        for method, metric, (split, domain) in itertools.product(compared(r), COUNTED, r.cell_names):
            if (metric, method, split, domain) not in hits:
                raise ValueError(f"no hits of {method} on {split}/{domain}")
        return r
    except FileNotFoundError:
        raise InputError("--results", f"{path} does not exist", "make it with --save") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        problem = f"{path} is not a packed run ({error!r})"
        raise InputError("--results", problem, "make it with --save") from None
