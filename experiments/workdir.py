"""What is in a run's folder, and how it is written: whole or not at all, and by process 0 alone.

Every process calls what writes here, and finds it written when the call returns.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from genret.training import processes
from genret.types import InputError


def write_text(path: Path, text: str) -> None:
    """The whole text or the old file: written beside `path`, by process 0, and moved into place."""

    def write() -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, path)

    processes.once(f"{path.parent.name}/{path.name}", write)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """All of `rows` or none."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) + rows))


def same_run(config: ConfigDict, arrays: Sequence[np.ndarray], workdir: Path) -> None:
    """Note config and data in `workdir`, or raise InputError if it holds a run of others.

    Seeds and ablations may join a run, and where it runs (mesh, folder of the data) may change. Beside the
    config stand `command`, with all of them, and `environment`, that of the last command that ran.
    """
    new = json.loads(config.to_json_best_effort())
    new["environment"] = {name: version(name) for name in ("jax", "flax")}
    new["environment"] |= {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    new["catalogue_digest"] = _digest(arrays)
    path = workdir / "config.json"
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError:
            raise InputError("--workdir", f"{path} is not JSON", "choose another --workdir") from None
        for name in sorted(old.keys() | new.keys()):
            if _what(old, name) != _what(new, name):
                problem = f"{workdir} holds a run with another {name.replace('_', ' ')}"
                raise InputError("--workdir", problem, "choose another --workdir")
        for name in ("seeds", "ablations"):  # these may join
            new[name] = sorted({*old.get(name, ()), *new.get(name, ())})
    if "command" in new:
        joined = {"seeds": map(str, new["seeds"]), "ablations": new.get("ablations", ())}
        said = (f",{name}={'+'.join(values)}" for name, values in joined.items())
        new["command"] += "".join(part for part in said if not part.endswith("="))
        new["command"] += f" --workdir=runs/{workdir.resolve().name}"
    write_text(path, json.dumps(new, indent=1, sort_keys=True))


def _what(config: dict[str, Any], name: str) -> Any:
    if name in ("seeds", "mesh", "command", "environment", "ablations"):
        return None
    value = config.get(name)
    return {k: v for k, v in value.items() if k != "folder"} if name == "catalogue" else value


def _digest(arrays: Sequence[np.ndarray]) -> int:
    """CRC of everything that training or evaluation reads, in blocks of rows."""
    code = 0
    for array in arrays:
        for start in range(0, len(array), 65536):
            code = zlib.crc32(np.ascontiguousarray(array[start : start + 65536]), code)
    return code
