"""What is in a run's folder, and how it is written: whole or not at all, and by process 0 alone.

Every process calls what writes here, and finds it written when the call returns.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from genret.training import processes
from genret.types import InputError

REWRITE = "evaluate again in a new --workdir"
MEETING = ", with processes that meet at "
NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)

# Leaves of a config's sections that a later command of the same run may give otherwise.
FREE = {"catalogue": ("folder",), "fanout": ("folder",)}
FREE |= {"evaluation": ("part", "runs", "repeated", "latency", "repeats", "few")}
JOIN = ("seeds", "ablations", "mesh", "command", "environment")  # whole sections, likewise


@contextlib.contextmanager
def alone(workdir: Path, command: str) -> Iterator[None]:
    """Holds `workdir` for one `command` (run, evaluate) at a time; the kernel lets go, however it ends.

    Raises InputError while another is at it. A file system without locks lets everybody in.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / f".{command}.lock", "a+") as file:
        other = None
        if processes.is_writer():
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # perhaps one that only looks, in `apart`
                    time.sleep(0.1)
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                where = f"{MEETING}{processes.meeting_place()}" if processes.several() else ""
                print(f"process {os.getpid()} on {socket.gethostname()}{where}", file=file, flush=True)
            except BlockingIOError:
                file.seek(0)
                other = file.read().strip() or "one that has just begun"
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
        if other := processes.agreed(f"{command} lock", other):
            raise _in_hands(workdir, command, other)
        yield


def apart(workdir: Path, command: str, coordinator: str | None) -> None:
    """For each of several processes, before they join: raises InputError while another `command` is at work
    in `workdir`, or any whose processes meet at `coordinator`. To join would end that one."""
    end = time.monotonic() + processes.ENDING
    while found := _beside(workdir, command, coordinator):
        if time.monotonic() > end:
            if found[0] == command:
                raise _in_hands(workdir, *found)
            problem = f"{coordinator} is where the {found[0]} at work in {workdir} meets"
            raise InputError("--coordinator", problem, "give this command a port of its own")
        time.sleep(0.2)


def _beside(workdir: Path, command: str, coordinator: str | None) -> tuple[str, str] | None:
    """(command, who) of one that holds `workdir` and leaves no room for this one."""
    for path in sorted(workdir.glob(".*.lock")):
        name, who = path.name[1:].removesuffix(".lock"), None
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                who = file.read().strip() or "one that has just begun"
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
        if who and (name == command or (coordinator and who.endswith(f"{MEETING}{coordinator}"))):
            return name, who
    return None


def _in_hands(workdir: Path, command: str, who: str) -> InputError:
    problem = f"{workdir} is in the hands of another {command}, {who}"
    return InputError("--workdir", problem, "wait for its end, or choose another --workdir")


@contextlib.contextmanager
def building(path: Path) -> Iterator[None]:
    """Holds the making of `path`, which runs of a sweep share: the others wait, and find it made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.name}: another command is making it, and this one waits", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def write_text(path: Path, text: str) -> None:
    """The whole text or the old file: written beside `path`, by process 0, and moved into place."""

    def write() -> None:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # run and evaluate may write at once
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    processes.once(f"{path.parent.name}/{path.name}", write)


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises InputError for a file that is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            str(path), f"is not JSON ({error})", "restore it, or run into a new --workdir"
        ) from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file; a last line cut short by a kill is left out. Raises InputError for a line
    that holds no row."""
    if not path.exists():
        return []
    try:
        lines = path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(path), f"holds a line that is not JSON ({error})", REWRITE) from None
    check_rows(path, rows, {})
    return rows


def check_rows(path: Path, rows: Any, fields: dict[str, str]) -> None:
    """Raises InputError unless `rows` is a list of dicts whose fields are what a report computes with.

    fields: name -> text, count (an integer from 0), number (finite), text or count, list, dict; with a "?"
    after it where the field may be null or absent.
    """
    if not isinstance(rows, list):
        raise InputError(str(path), "is not a list", REWRITE)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(str(path), f"row {number} is not an object", REWRITE)
        for name, kind in fields.items():
            value = row.get(name)
            if not (value is None and kind.endswith("?")) and not _is(kind.removesuffix("?"), value):
                said = f"is {str(value)[:40]!r}" if name in row else "is absent"
                raise InputError(str(path), f"{name} of row {number} {said}, not a {kind}", REWRITE)


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return {
        "text": isinstance(value, str),
        "count": (count := isinstance(value, int) and 0 <= value < 2**53),
        "number": isinstance(value, (int, float)) and abs(value) < 1e15,  # nor NaN
        "list": isinstance(value, list),
        "dict": isinstance(value, dict),
        "text or count": count or isinstance(value, str),
    }[kind]


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """All of `rows` or none."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) + rows))


def same_run(config: ConfigDict, arrays: Sequence[np.ndarray], workdir: Path) -> None:
    """Note config and data in `workdir`, or raise InputError if it holds a run of others.

    Seeds and ablations may join a run; where it runs (mesh, folder of the data) and what each row tells by
    itself (FREE) may change. Beside the config stand `command`, with all of them, and `environment`, that of
    the last command that ran.
    """
    new = json.loads(config.to_json_best_effort())
    new["environment"] = {name: version(name) for name in ("jax", "flax")}
    new["environment"] |= {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    # Process 0 reads them all, so that the others need not.
    new["catalogue_digest"] = processes.agreed("digest", _digest(arrays) if processes.is_writer() else None)
    path = workdir / "config.json"
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists():
        check_rows(path, [old := read_json(path)], {"seeds": "list?", "ablations": "list?"})
        for name in sorted(old.keys() | new.keys()):
            if _what(old, name) != _what(new, name):
                problem = f"{workdir} holds a run with another {name.replace('_', ' ')}"
                raise InputError("--workdir", problem, "choose another --workdir")
        for name in ("seeds", "ablations"):  # these may join
            new[name] = sorted({*old.get(name, ()), *new.get(name, ())})
    if "command" in new:
        joined = {"seeds": map(str, new["seeds"]), "ablations": new.get("ablations", ())}
        said = (f",{name}={'+'.join(values)}" for name, values in joined.items())
        file, *overrides = re.split(r"(?= '?--config\.)", new["command"])
        file += "".join(part for part in said if not part.endswith("="))
        new["command"] = "".join([file, *overrides, f" --workdir=runs/{workdir.resolve().name}"])
    write_text(path, json.dumps(new, indent=1, sort_keys=True))


def tells(leaf: str) -> bool:
    """Whether a leaf, "section.name", is part of what makes a run this run."""
    section, _, name = leaf.partition(".")
    return section not in JOIN and name not in FREE.get(section, ())


def _what(config: dict[str, Any], name: str) -> Any:
    if name in JOIN:
        return None
    value, free = config.get(name), FREE.get(name, ())
    return {k: v for k, v in value.items() if k not in free} if isinstance(value, dict) else value


def _digest(arrays: Sequence[np.ndarray]) -> int:
    """CRC of everything that training or evaluation reads, in blocks of rows."""
    code = 0
    for array in arrays:
        for start in range(0, len(array), 65536):
            code = zlib.crc32(np.ascontiguousarray(array[start : start + 65536]), code)
    return code
