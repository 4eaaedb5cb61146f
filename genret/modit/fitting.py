"""Everything fitted before the first stage: labels, predictor, density, latent cells, tails, probes.

All of it sees training items only; process 0 writes it once per run, to `labels/` and `fitted/`, and all
processes map it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from genret.catalogue.format import Catalogue
from genret.catalogue.splits import Splits
from genret.modit import density as dn
from genret.modit import trajectories as tr
from genret.modit.stages import TrainingSet
from genret.training import processes
from genret.training.loop import FitOptions
from genret.types import reading


@dataclass(frozen=True)
class Fitted:
    """data: what stages draw from. labels: the budget. predicted: ρ̂ f32[M, N] for every item, by embedding
    alone. normals: f32[M, D], intercepts: f32[M], the linear probes. gradient: (queries f32[Q, D],
    domain i32[Q]) -> unit gradient of the predicted log-odds."""

    data: TrainingSet
    labels: dn.Labels
    predicted: np.ndarray
    normals: np.ndarray
    intercepts: np.ndarray
    gradient: Callable[[np.ndarray, np.ndarray], np.ndarray]


def prepare(
    catalogue: Catalogue,
    splits: Splits,
    workdir: Path,
    *,
    budget: float,
    k: int,
    predictor: FitOptions,
    cells: dict[str, Any],
    neighbours: int,
    tail_share: float,
    tail_least: int,
    seed: int,
    index: str = "auto",
    mesh: Mesh | None = None,
    say: Callable[[str], None] = print,
) -> Fitted:
    """Fit, or read back what an earlier call with the same options wrote to `workdir`."""
    options = dict(budget=budget, k=k, cells=cells, neighbours=neighbours, tail_share=tail_share)
    options |= dict(
        tail_least=tail_least, seed=seed, items=catalogue.num_items, train=int(splits.train.sum())
    )

    def bought() -> dict[str, np.ndarray]:
        return vars(dn.buy_labels(catalogue, splits.train, budget=budget, k=k, seed=seed))

    labels = dn.Labels(**_made_once(workdir / "labels", options, bought))
    fitted = dn.fit_predictor(catalogue, labels, workdir / "predictor", predictor, mesh=mesh)

    def fit() -> dict[str, np.ndarray]:
        say("fitting linear probes, latent cells and the neighbour table")
        return _fit(catalogue, splits, labels, fitted, cells, neighbours, seed, index)

    arrays = _made_once(workdir / "fitted", options, fit)
    found = tr.Cells(arrays["members"], arrays["membership"], arrays["run"])
    # Labelled density where an item was probed, predicted density elsewhere.
    known = arrays["predicted"].copy()
    known[:, labels.probes] = np.where(
        labels.trials > 0, labels.positives / np.maximum(labels.trials, 1), known[:, labels.probes]
    )
    say(
        f"labels: {len(labels.probes)} probes, {labels.lookups} distinct attribute look-ups "
        f"({labels.lookups / catalogue.labels.size:.1%} of all); latent cells: {len(found.members)}"
    )
    data = TrainingSet(
        catalogue.embeddings, np.flatnonzero(splits.train), known, labels.seen == 1, found,
        arrays["neighbours"],
        tr.fit_tails(found, known, labels.seen, share=tail_share, least=tail_least),
    )  # fmt: skip
    return Fitted(data, labels, arrays["predicted"], arrays["normals"], arrays["intercepts"], fitted.gradient)


def _fit(catalogue, splits, labels, predictor, cells, neighbours, seed, index) -> dict:
    normals, intercepts = dn.linear_probes(catalogue, labels)
    found = tr.fit_cells(catalogue.embeddings, splits.train, seed=seed, **cells)
    return {
        "predicted": predictor.density(catalogue.embeddings), "normals": normals, "intercepts": intercepts,
        "members": found.members, "membership": found.membership, "run": found.run,
        "neighbours": tr.neighbour_table(
            catalogue.embeddings, splits.train, k=neighbours, index=index
        ),
    }  # fmt: skip


def _made_once(folder: Path, options: dict, make: Callable[[], dict]) -> dict[str, np.ndarray]:
    """The arrays of `folder`, made by process 0 where there are none of these options."""

    def found() -> dict[str, np.ndarray]:
        if (arrays := _read(folder, options)) is None:
            _write(folder, make(), options)
            arrays = _read(folder, options)
        return arrays

    return processes.first(folder.name, found)


def _read(folder: Path, options: dict) -> dict[str, np.ndarray] | None:
    card = folder / "card.json"
    with reading(folder):
        if not card.exists() or json.loads(card.read_text()) != json.loads(json.dumps(options)):
            return None
        return {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in folder.glob("*.npy")}


def _write(folder: Path, arrays: dict[str, np.ndarray], options: dict) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, value in arrays.items():
        np.save(temporary / f"{name}.npy", value, allow_pickle=False)
    (temporary / "card.json").write_text(json.dumps(options))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
