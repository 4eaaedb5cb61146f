"""Molecules to numbers: properties, Morgan fingerprints, Murcko scaffolds and an SVD embedding.

What worker processes run is rdkit and numpy: no device is touched there.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits

from genret.types import InputError

BITS, RADIUS = 2048, 2
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
    chunk: int = 500,
) -> list[Any]:
    """[function(items[:chunk]), function(items[chunk:2 chunk]), ...] in order, over processes.

    workers: None takes every core, 1 stays in this process. Processes are spawned, not forked: JAX
    is multithreaded, and a fork of it may hang. `progress(done, total)` counts items.
    """
    parts = [items[i : i + chunk] for i in range(0, len(items), chunk)]
    workers = min(workers or os.cpu_count() or 1, len(parts))
    done, out = 0, []

    def collect(results) -> list[Any]:
        nonlocal done
        for part, result in zip(parts, results, strict=True):
            out.append(result)
            done += len(part)
            if progress:
                progress(done, len(items))
        return out

    if workers <= 1:
        return collect(map(function, parts))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return collect(pool.map(function, parts))


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
