"""Damaged files: how they are made, and what a loader may do with them.

It succeeds or raises an InputError, in bounded time and memory. A few hundred cases run with the suite, the
same ones each time; `pytest -m fuzz` draws thousands of new ones.
"""

import contextlib
import faulthandler
import json
import re
import resource
import signal
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genret.types import InputError

FEW, MANY = 24, 700  # cases of one loader
SECONDS, WAITING, BYTES = 20, 900, 3 << 30  # of one case: of CPU, of the clock, and of memory


class Hang(BaseException):
    """Not an Exception, so that no loader catches it."""


@contextlib.contextmanager
def bounded():
    """Raises Hang after SECONDS of computing, and lets an allocation past BYTES fail."""

    def late(*_):
        raise Hang(f"longer than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(WAITING, exit=True)  # where no Python code runs
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, limits)


WORDS = [
    b"", b"\0", b"\xff" * 8, b"\xff\xff\xff\x7f", struct.pack("<Q", 1 << 60), struct.pack("<I", 1 << 31),
    b"NaN", b"1e999", b"-1", b"9" * 5000, b"null", b"[]", b"{}", b'"', b",", b"\n", b"\r", b"[" * 99_999,
    b"\\ud800", "²".encode(), b"\xe9", b"\xef\xbb\xbf", b"True", b"0",
]  # fmt: skip
VALUES = [
    None, True, 0, -1, 0.5, 2**31, 2**64, 10**400, 1e308, float("nan"), float("inf"), "", " ", "x", "\ud800",
    "0", [], {}, [[]], [None], {"a": 1}, "x" * 2000, "DEEP",
]  # fmt: skip
DEEP = "[" * 99_999 + "]" * 99_999


def place(draw, size):
    """An offset, near either end more often than not: there headers and footers are."""
    end = draw(st.sampled_from(("start", "any", "end")))
    near = draw(st.integers(0, min(size, 400)))
    return {"start": near, "end": size - near, "any": draw(st.integers(0, size))}[end]


def damaged(draw, content: bytes) -> bytes:
    """`content` with one change."""
    at, size = place(draw, len(content)), draw(st.integers(1, 64))
    kind = draw(st.sampled_from("cut flip write insert delete copy swap token tokens encode empty".split()))
    word = draw(st.sampled_from(WORDS) | st.binary(max_size=12))
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        bits = draw(st.integers(1, 255))
        return content[:at] + bytes(b ^ bits for b in content[at : at + 1]) + content[at + 1 :]
    if kind == "write":
        return content[:at] + word + content[at + len(word) :]
    if kind == "insert":
        return content[:at] + word + content[at:]
    if kind == "delete":
        return content[:at] + content[at + size :]
    other = place(draw, len(content))
    if kind == "copy":
        return content[:at] + content[other : other + size] + content[at:]
    if kind == "swap":
        low, high = sorted((at, other))
        size = min(size, high - low)
        parts = (
            content[:low],
            content[high : high + size],
            content[low + size : high],
            content[low : low + size],
        )
        return b"".join(parts) + content[high + size :]
    if kind in ("token", "tokens"):
        found = [m.span() for m in re.finditer(rb"[\w.+-]+", content[:20_000])]
        if not found:
            return word
        low, high = draw(st.sampled_from(found))
        if kind == "tokens":  # of one place in another's
            a, b = draw(st.sampled_from(found))
            word = content[a:b]
        return content[:low] + word + content[high:]
    if kind == "encode":
        text = content.decode("utf-8", "replace")
        return text.encode(draw(st.sampled_from(("utf-16", "latin-1", "utf-8-sig"))), "replace")
    return b""


def altered(draw, tree):
    """A JSON tree with one node replaced, removed, or put in another's place."""
    places = []

    def walk(node):
        for key in (
            list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        ):
            places.append((node, key))
            walk(node[key])

    tree = json.loads(json.dumps(tree))
    walk(tree)
    value = draw(st.sampled_from(VALUES))
    if not places:
        return value
    node, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(("replace", "replace", "remove", "move")))
    if kind == "remove":
        del node[key]
    elif kind == "move":
        other, name = draw(st.sampled_from(places))
        node[key] = json.loads(json.dumps(other[name]))
    else:
        node[key] = value
    return tree


def written(tree) -> bytes:
    return json.dumps(tree).replace('"DEEP"', DEEP).encode()


def altered_text(draw, content: bytes) -> bytes:
    """JSON, or JSON Lines, with one value changed; anything else is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        if len(lines := content.splitlines()) > 1:
            trees = [json.loads(line) for line in lines]
            at = draw(st.integers(0, len(trees) - 1))
            trees[at] = altered(draw, trees[at])
            return b"\n".join(map(written, trees)) + b"\n"
        return written(altered(draw, json.loads(content)))
    return damaged(draw, content)


def altered_header(draw, content: bytes) -> bytes:
    """A safetensors file with one value of its header changed and its length mended."""
    length = int.from_bytes(content[:8], "little")
    header = altered_text(draw, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def any_damage(draw, files):
    """One to three changes in one file; in JSON, and the header of safetensors, of values too."""
    name = draw(st.sampled_from(sorted(files)))
    content = files[name]
    for _ in range(draw(st.integers(1, 3))):
        ways = [damaged]
        ways += [altered_text] * name.endswith(("json", "jsonl")) + [altered_header] * name.endswith(
            "safetensors"
        )
        with contextlib.suppress(ValueError, RecursionError):
            content = draw(st.sampled_from(ways))(draw, content)
    return files | {name: content}


@contextlib.contextmanager
def folder_of(files):
    """A folder that holds `files`, name -> bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def check(loader, cases, **options):
    """A loader is (samples() -> list of files, change(draw, files) -> files, read(folder))."""
    samples, change, read = loader
    sound = samples()

    @settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), **options
    )
    @given(st.data())
    def survives(data):
        files = change(data.draw, data.draw(st.sampled_from(sound)))
        with folder_of(files) as folder, bounded(), contextlib.suppress(InputError):
            read(folder)

    survives()


def sound(loader):
    """Undamaged samples are read."""
    samples, _, read = loader
    for files in filter(None, samples()):
        with folder_of(files) as folder:
            read(folder)


def few(loader):
    """The suite's cases."""
    check(loader, FEW, derandomize=True)


def many(loader):
    """New cases at every run."""
    check(loader, MANY)


def pytest_generate_tests(metafunc):
    """`survives` is every maker in the module's LOADERS, any_damage -> loader, in each of three ways."""
    if "survives" in metafunc.fixturenames:
        metafunc.parametrize("survives", [
            pytest.param(
                lambda way=way, make=make: way(make(any_damage)), id=f"{name}-{way.__name__}",
                marks=[pytest.mark.fuzz] * (way is many),
            )
            for name, make in metafunc.module.LOADERS.items() for way in (sound, few, many)
        ])  # fmt: skip
