"""Molecules to numbers: properties, Morgan fingerprints, Murcko scaffolds and an SVD embedding.

What worker processes run is rdkit and numpy: no device is touched there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import multiprocessing
import os
import threading
import zipfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits

from genret.types import InputError

BITS, RADIUS = 2048, 2
CHUNK = 500  # molecules sent to a process at a time
PART = 100 * CHUNK  # molecules to a file of a description: some minutes of a core
Progress = Callable[[int, int], None]


def describe(smiles: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """SMILES -> packed Morgan fingerprints u8[n, 256] and properties f64[n, 4].

    Fingerprints have radius 2 and 2048 bits, bit i in byte i // 8, lowest bit first. The properties
    are Crippen's logP (Wildman and Crippen 1999), the topological polar surface area in square
    angstrom (Ertl et al. 2000), the share of carbons that are sp3, and QED (Bickerton et al. 2012).
    A string that is no molecule gives a row of NaN.
    """
    from rdkit import Chem, DataStructs, rdBase
    from rdkit.Chem import QED, rdFingerprintGenerator, rdMolDescriptors

    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    fingerprints = np.zeros((len(smiles), BITS // 8), np.uint8)
    properties = np.full((len(smiles), 4), np.nan)
    with rdBase.BlockLogs():
        for i, text in enumerate(smiles):
            molecule = Chem.MolFromSmiles(text)
            if molecule is None or not molecule.GetNumAtoms():
                continue
            raw = DataStructs.BitVectToBinaryText(morgan.GetFingerprint(molecule))
            fingerprints[i] = np.frombuffer(raw, np.uint8)
            parts = QED.properties(molecule)  # logP and surface area are among them: computed once
            sp3 = rdMolDescriptors.CalcFractionCSP3(molecule)
            properties[i] = parts.ALOGP, parts.PSA, sp3, QED.qed(molecule, qedProperties=parts)
    return fingerprints, properties


def describe_all(
    smiles: Sequence[str], folder: Path, *, workers: int | None = None, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`describe` over processes, for hours if need be: u8[n, 256] and f64[n, 4].

    folder: where each whole part of PART molecules is kept, so that a build that was killed goes on; the
    caller removes it when it has no more need of it. A part that cannot be read is described again.
    progress: of the molecules that were not kept.
    """
    parts = [smiles[start : start + PART] for start in range(0, len(smiles), PART)]
    files = [folder / _name(part) for part in parts]
    found = [_read_part(file, len(part)) for file, part in zip(files, parts, strict=True)]
    absent = [i for i, part in enumerate(found) if part is None]
    todo = [text for i in absent for text in parts[i]]
    # Parts but the last are whole chunks, so that one pool of processes serves all of them.
    results = map_chunks(describe, todo, workers=workers, progress=progress, chunk=CHUNK)
    for i in absent:
        chunks = itertools.islice(results, -(-len(parts[i]) // CHUNK))
        found[i] = tuple(map(np.concatenate, zip(*chunks, strict=True)))
        if len(parts[i]) == PART:
            _keep_part(files[i], *found[i])
    results.close()
    fingerprints, properties = map(np.concatenate, zip(*found, strict=True))
    return fingerprints, properties


def _name(part: Sequence[str]) -> str:
    """Of the file of a part: by its molecules and what describes them."""
    import rdkit

    content = "\n".join([rdkit.__version__, *part])
    return f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npz"


def _read_part(file: Path, rows: int) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with np.load(file, allow_pickle=False) as found:
            fingerprints, properties = found["fingerprints"], found["properties"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return (fingerprints, properties) if len(fingerprints) == len(properties) == rows else None


def _keep_part(file: Path, fingerprints: np.ndarray, properties: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as out:
        np.savez(out, fingerprints=fingerprints, properties=properties)
    os.replace(temporary, file)


def scaffolds(smiles: Sequence[str]) -> list[str]:
    """Canonical SMILES of each Murcko scaffold (Bemis and Murcko 1996): rings and what links them.

    Empty for an acyclic molecule and for a string that is no molecule.
    """
    from rdkit import Chem, rdBase
    from rdkit.Chem.Scaffolds import MurckoScaffold

    def scaffold(text: str) -> str:
        molecule = Chem.MolFromSmiles(text)
        return Chem.MolToSmiles(MurckoScaffold.GetScaffoldForMol(molecule)) if molecule else ""

    with rdBase.BlockLogs():
        return [scaffold(text) for text in smiles]


def map_chunks(
    function: Callable[[Sequence[str]], Any],
    items: Sequence[str],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    chunk: int = CHUNK,
) -> Generator[Any, None, None]:
    """Yields function(items[:chunk]), function(items[chunk:2 chunk]), ... in order, over processes.

    workers: None takes every core that this process may use, 1 stays in it. Processes are spawned, not
    forked: JAX is multithreaded, and a fork of it may hang. `progress(done, total)` counts items.
    """
    parts = [items[i : i + chunk] for i in range(0, len(items), chunk)]
    workers = min(workers or _cores(), len(parts))
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        if workers > 1:
            pool = concurrent.futures.ProcessPoolExecutor(workers, context, _end_with_parent)
            stack.callback(pool.shutdown, cancel_futures=True)
        done = 0
        for part, result in zip(parts, (pool.map if workers > 1 else map)(function, parts), strict=True):
            done += len(part)
            if progress:
                progress(done, len(items))
            yield result


def _end_with_parent() -> None:
    """In a worker: one whose parent was killed waits for work for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _cores() -> int:
    """Those a scheduler grants, where the system tells them from those of the machine."""
    granted = getattr(os, "sched_getaffinity", None)
    return len(granted(0)) if granted else os.cpu_count() or 1


def require_rdkit() -> None:
    """Raises InputError where rdkit is not installed: here, and not once per worker."""
    try:
        import rdkit  # noqa: F401
    except ImportError as error:
        problem = "rdkit is not installed"
        raise InputError("moses", problem, "pip install 'genret[moses]'") from error


def fit_projection(fingerprints: np.ndarray, width: int, block: int = 8192) -> np.ndarray:
    """Top right singular vectors f32[2048, width] of the bits packed in `fingerprints` u8[n, 256].

    They are the leading eigenvectors of the uncentred second moment X'X. Its entries count
    molecules, so float32 holds them exactly up to 2^24: neither the block nor the order of the rows
    changes a bit. Only X'X and one block are in memory. Each vector's entry of largest magnitude is
    positive, which fixes the sign.
    Raises InputError where there are fewer molecules than `width`.
    """
    if len(fingerprints) < width:
        problem = f"{len(fingerprints)} molecules cannot span {width} dimensions"
        raise InputError("items", problem, "Take more molecules.")
    moment = np.zeros((BITS, BITS), np.float32)
    for start in range(0, len(fingerprints), block):
        bits = _unpack(fingerprints[start : start + block])
        moment += bits.T @ bits
    # One thread: the same bits on any number of cores, and no threads that spin on busy ones.
    with threadpool_limits(1):
        _, vectors = eigh(moment.astype(np.float64), subset_by_index=[BITS - width, BITS - 1])
    vectors = vectors[:, ::-1]  # eigenvalues ascend
    peak = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0)
    return (vectors * np.sign(peak)).astype(np.float32)


def project(fingerprints: np.ndarray, projection: np.ndarray, block: int = 8192) -> np.ndarray:
    """Unit-norm rows f32[n, width] of the fingerprints u8[n, 256] times `projection`."""
    out = np.empty((len(fingerprints), projection.shape[1]), np.float32)
    for start in range(0, len(out), block):
        rows = _unpack(fingerprints[start : start + block]) @ projection
        out[start : start + block] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return out


def _unpack(fingerprints: np.ndarray) -> np.ndarray:
    return np.unpackbits(fingerprints, axis=1, bitorder="little").astype(np.float32)
