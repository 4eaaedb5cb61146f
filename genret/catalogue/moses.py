"""The MOSES catalogue: drug-like molecules, from the pip package `molsets`.

Data: Polykovskiy et al. 2020, arXiv:1811.12823. Embedding: Morgan fingerprint (Rogers and Hahn
2010) -> SVD -> unit norm, the SVD fitted on training items. The published splits are respected:
`test` is never trained on, `test_scaffolds` neither, and shares no Murcko scaffold with the others.
All 1,936,962 SMILES are distinct, without stereochemistry and (370,000 tried) distinct molecules:
so there are no groups.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from genret.catalogue import format
from genret.catalogue.clusters import spherical_kmeans
from genret.catalogue.molecules import (
    Progress,
    describe_all,
    fit_projection,
    map_chunks,
    project,
    require_rdkit,
    scaffolds,
)
from genret.types import InputError

PACKAGE, PACKAGE_VERSION = "molsets", "0.3.1"
INSTALL = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
ROWS = {"train": 1_584_663, "test": 176_074, "test_scaffolds": 176_225}
SHARES = {"test": 0.1, "test_scaffolds": 0.1}  # of a sample; train is the rest
HOLDOUT_SHARE = 0.2  # of the patterns

WIDTH = 128
MIN_ITEMS = 1000  # fewer have too few patterns to split, and too few rows to fit the SVD
CELL_ITEMS = 64  # of a cell, on average
KMEANS_ITERATIONS = 20

# Tails of the properties, each a design goal: soluble, polar, rich in sp3 carbon, drug-like.
LOGP_LOW = 1.9  # at most: 25 % of the molecules
TPSA_HIGH = 77.0  # at least: 25 %
FSP3_HIGH = 0.46  # at least: 29 %
QED_HIGH = 0.87  # at least: 28 %; QED is crowded near its top

# Patterns of pattern="scaffold".
SCAFFOLD_ITEMS = 20, 200  # least and most molecules of one scaffold
POOL = 8  # molecules looked at per molecule wanted: enough scaffolds recur


def build(
    path: str | Path,
    *,
    items: int | Literal["all"] = 40_000,
    pattern: Literal["cells", "scaffold"] = "cells",
    seed: int = 0,
    cells: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Samples molecules, computes labels, embeddings and splits, and writes them to `path`.

    items: how many, drawn by `seed`; "all", or a number past the 1,936,962 there are, takes every
        one (pattern="cells"). pattern="scaffold" takes at most this many.
    pattern: "cells" are k-means cells (`cells` of them, items / 64 by default); a fifth of them,
        drawn by `seed`, is held out as a whole, and of the others the published test and
        test_scaffolds molecules, by item. "scaffold" are Murcko scaffolds of 20 to 200 sampled
        molecules; published test_scaffolds are held out as patterns, published test by item.
    workers: processes, default one per core; a script that builds with more than one needs the
        usual `if __name__ == "__main__":`.
    progress: called as progress(done, total) with molecules described, and before that, for
        pattern="scaffold", with molecules searched for scaffolds.

    A build that was killed goes on from what it had described, kept in `path`.described until it is done.

    id: "<published split>/<row>"; text: SMILES; attributes: logp_low, tpsa_high, fsp3_high,
    qed_high. The `split` column gives the role of every row, so `make_splits` draws none, and the
    SVD has seen training rows only.
    Raises InputError where `molsets` or rdkit is missing, its files are not those published, or a
    size is too small.
    """
    if pattern not in ("cells", "scaffold"):
        raise InputError("pattern", f"{pattern!r}", "Use 'cells' or 'scaffold'.")
    if cells is not None and pattern != "cells":
        raise InputError("cells", "given with pattern='scaffold'", "Leave it out.")
    if items != "all" and (not isinstance(items, int) or items < MIN_ITEMS):
        raise InputError("items", f"{items!r}", f"Pass 'all' or an integer from {MIN_ITEMS}.")
    total = sum(ROWS.values())
    items = total if items == "all" else min(items, total)
    if cells is not None and not 10 <= cells <= items // 10:
        problem = f"{cells} cells of {items} molecules"
        raise InputError("cells", problem, f"Pass 10 to {items // 10}, or leave it out.")
    require_rdkit()
    published = read_smiles()
    rng = np.random.default_rng(seed)
    if pattern == "cells":
        ids, smiles = _sample(published, items, rng)
    else:
        ids, smiles, patterns = _sample_scaffolds(published, items, rng, workers, progress)
    path = Path(path)
    described = path.with_name(path.name + ".described")
    fingerprints, properties = _describe(smiles, described, workers, progress)
    if pattern == "cells":
        cells = cells or items // CELL_ITEMS
        patterns = _cells(fingerprints, cells, seed)
        held = (rng.permutation(cells) < round(HOLDOUT_SHARE * cells))[patterns]
    else:
        held = np.array([i.startswith("test_scaffolds/") for i in ids])
    in_train = [i.startswith("train/") for i in ids]
    splits = np.where(held, "pattern_holdout", np.where(in_train, "train", "item_holdout"))
    format.write(
        path,
        ids=ids,
        embeddings=embed(fingerprints, splits == "train"),
        attributes=_labels(properties),
        patterns=patterns,
        texts=smiles,
        splits=splits.tolist(),
    )
    shutil.rmtree(described, ignore_errors=True)
    return path


def read_smiles() -> dict[str, list[str]]:
    """The published SMILES of "train", "test" and "test_scaffolds".

    `moses`, the module of the package, is not imported, for it needs torch.
    Raises InputError where the package is missing or a file is not the published one.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("moses", f"{PACKAGE} is not installed", INSTALL) from error
    out = {}
    for split, count in ROWS.items():
        path = Path(distribution.locate_file(f"moses/dataset/data/{split}.csv.gz"))
        try:
            with gzip.open(path, "rt", encoding="ascii") as file:
                header, *rows = file.read().splitlines()
        except (OSError, EOFError, ValueError) as error:
            raise InputError(str(path), f"not readable ({error})", INSTALL) from error
        if header != "SMILES" or len(rows) != count:
            problem = f"{len(rows)} rows under {header!r}, not {count} under 'SMILES'"
            raise InputError(str(path), problem, INSTALL)
        out[split] = rows
    return out


def embed(fingerprints: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Unit-norm f32[N, 128] of packed fingerprints u8[N, 256], by the SVD of `train` bool[N]."""
    return project(fingerprints, fit_projection(fingerprints[train], WIDTH))


def _sample(
    published: dict[str, list[str]], items: int, rng: np.random.Generator
) -> tuple[list[str], list[str]]:
    """ids and SMILES of `items` molecules, of each published split its share as far as it goes."""
    take = {s: min(round(items * share), len(published[s])) for s, share in SHARES.items()}
    take["train"] = items - sum(take.values())
    return _draw(published, take, rng)


def _draw(
    published: dict[str, list[str]], take: dict[str, int], rng: np.random.Generator
) -> tuple[list[str], list[str]]:
    """ids and SMILES of `take[split]` random molecules of each split, in published order."""
    ids, smiles = [], []
    for split, rows in published.items():
        for row in np.sort(rng.permutation(len(rows))[: take[split]]):
            ids.append(f"{split}/{row}")
            smiles.append(rows[row])
    return ids, smiles


def _sample_scaffolds(
    published: dict[str, list[str]],
    items: int,
    rng: np.random.Generator,
    workers: int | None,
    progress: Progress | None,
) -> tuple[list[str], list[str], list[str]]:
    """ids, SMILES and scaffolds of at most `items` molecules, drawn a whole scaffold at a time.

    A random sample has next to no scaffold with 20 molecules, a pool several times as large does.
    In the pool a fifth of the molecules outside test_scaffolds are from test: the item holdout.
    """
    shares = {"train": 1 - HOLDOUT_SHARE, "test": HOLDOUT_SHARE, "test_scaffolds": HOLDOUT_SHARE}
    take = {s: min(round(POOL * items * share), ROWS[s]) for s, share in shares.items()}
    ids, smiles = _draw(published, take, rng)
    names = sum(map_chunks(scaffolds, smiles, workers=workers, progress=progress), [])
    rows_of: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for row in rng.permutation(len(names)):
        if names[row]:  # an acyclic molecule has no scaffold
            unseen = ids[row].startswith("test_scaffolds/")
            rows_of[unseen].setdefault(names[row], []).append(row)
    least, most = SCAFFOLD_ITEMS
    seen, unseen = (
        [rows[:most] for _, rows in sorted(sets.items()) if len(rows) >= least] for sets in rows_of
    )
    rng.shuffle(seen)
    rng.shuffle(unseen)
    period = round(1 / HOLDOUT_SHARE)  # every fifth scaffold is an unseen one
    count = min(period * len(unseen), len(seen) * period // (period - 1))
    sets = [unseen[i // period] if (i + 1) % period == 0 else seen[i - i // period] for i in range(count)]
    fitting = np.searchsorted(np.cumsum([len(rows) for rows in sets]), items, side="right")
    if not fitting:
        problem = f"{items} molecules have no scaffold {least} times"
        raise InputError("items", problem, "Ask for more.")
    rows = np.sort(np.concatenate(sets[:fitting]))
    return [ids[row] for row in rows], [smiles[row] for row in rows], [names[row] for row in rows]


def _describe(
    smiles: Sequence[str], folder: Path, workers: int | None, progress: Progress | None
) -> tuple[np.ndarray, np.ndarray]:
    """`describe_all`; raises InputError for a string that is no molecule."""
    fingerprints, properties = describe_all(smiles, folder, workers=workers, progress=progress)
    bad = np.isnan(properties).any(axis=1)
    if bad.any():
        raise InputError("SMILES", f"{smiles[bad.argmax()]!r} is no molecule", INSTALL)
    return fingerprints, properties


def _cells(fingerprints: np.ndarray, cells: int, seed: int) -> np.ndarray:
    """Evaluation patterns i32[N]: k-means cells of every molecule.

    The cells are the ground truth that a model is judged by, so they may see held-out molecules;
    training fits its own latent patterns, on training items only.
    """
    rows = embed(fingerprints, np.ones(len(fingerprints), bool))
    return spherical_kmeans(rows, cells, seed=seed, iterations=KMEANS_ITERATIONS)[1]


def _labels(properties: np.ndarray) -> dict[str, np.ndarray]:
    """Attribute name -> bool[N]."""
    logp, tpsa, fsp3, qed = properties.T
    return {
        "logp_low": logp <= LOGP_LOW,
        "tpsa_high": tpsa >= TPSA_HIGH,
        "fsp3_high": fsp3 >= FSP3_HIGH,
        "qed_high": qed >= QED_HIGH,
    }
