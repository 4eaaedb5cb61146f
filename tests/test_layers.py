"""The floors of the house, and an import that touches nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"types"},
    {"attention"},
    {"diffusion", "language"},
    {"retrieval", "catalogue"},
    {"training"},
    {"modit", "r4t"},
]


def floor_of(room):
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "genret").rglob("*.py")), ids=lambda p: p.name)
def test_a_room_imports_lower_floors_only(path):
    parts = path.relative_to(ROOT / "genret").with_suffix("").parts
    if parts == ("__init__",):
        return
    room = parts[0]
    for name in imports(path):
        assert not name.startswith("experiments"), f"{path.name} imports {name}"
        if name.startswith("genret."):
            other = name.split(".")[1]
            assert other == room or floor_of(other) < floor_of(room), f"{path.name} imports {name}"


def test_every_room_has_a_floor_and_no_file_is_a_drawer():
    rooms = {p.stem for p in (ROOT / "genret").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms <= set().union(*FLOORS)
    files = [p for folder in ("genret", "experiments") for p in (ROOT / folder).rglob("*.py")]
    assert not [p for p in files if p.stem in ("utils", "helpers", "common", "misc")]
    assert not [(p.name, n) for p in files if (n := len(p.read_text().splitlines())) > 420]


def test_importing_every_module_touches_no_device_and_no_optional_package():
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in (ROOT / "genret").rglob("*.py")
        if p.name != "__init__.py"
    ]
    code = f"""
import sys
for name in ("rdkit", "scann", "tokenizers", "safetensors", "moses", "gguf", "wordfreq", "jinja2"):
    sys.modules[name] = None  # an import of it fails
import importlib
for name in {modules!r}:
    importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was touched"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_scann_that_cannot_be_imported_is_said_and_exact_search_stands():
    code = """
import sys
sys.modules["scann"] = None
import numpy as np
from genret.retrieval.index import build_index
x = np.eye(8, dtype=np.float32)
assert build_index("auto", x, 3).search(x, 3)[0][:, 0].tolist() == list(range(8))
try:
    build_index("scann", x, 3)
except Exception as error:
    assert "exact" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
