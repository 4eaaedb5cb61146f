"""Open the catalogue a config names, building it on first use."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from experiments.workdir import building
from genret.catalogue import kaggle, moses
from genret.catalogue.format import Catalogue, load
from genret.training import processes
from genret.training.log import Progress
from genret.types import InputError, reading

BUILT = ("moses", "fashion", "streaming")


def open_catalogue(config: ConfigDict) -> Catalogue:
    """`config.data` is moses, fashion, streaming or a path to a catalogue in genret's format.

    Built catalogues are kept in `config.folder` under a name that says what is in them.
    Raises InputError for a path that does not exist or a missing `raw`.
    """
    return processes.first("catalogue", functools.partial(_open, config))


def catalogue_path(config: ConfigDict) -> Path:
    """Where the catalogue lies, or will once built. Raises InputError for a path that does not exist."""
    data = config.data
    if data not in BUILT:
        if not os.path.exists(data):
            raise InputError("data", f"{data} does not exist", "use moses, fashion, streaming or a path")
        return Path(data)
    name = data
    if data == "moses":
        size = config.num_items or "all"
        name = f"moses_{size}_{config.pattern}{config.cells or ''}_{config.seed}"
    return Path(config.folder) / f"{name}.parquet"


def _open(config: ConfigDict) -> Catalogue:
    data, path = config.data, catalogue_path(config)
    if data not in BUILT:
        return load(path, cells=config.cells or None, seed=config.seed)
    if not path.exists():
        with building(path):
            if not path.exists():
                _build(config, path)
    # Molecules bring their patterns; the Kaggle tables get cells here.
    cells = None if data == "moses" else config.cells or None
    return load(path, cells=cells, seed=config.seed)


def _build(config: ConfigDict, path: Path) -> None:
    if config.data != "moses":
        return _build_kaggle(config, path)
    moses.build(
        path, items=config.num_items or "all", pattern=config.pattern, seed=config.seed,
        cells=config.cells or None, progress=_reporter("molecules"),
    )  # fmt: skip


def _build_kaggle(config: ConfigDict, path: Path) -> None:
    if not config.raw or not os.path.exists(config.raw):
        raise InputError(
            "raw", f"{config.raw or 'nothing'} given for {config.data}", "pass raw=PATH of the Kaggle CSVs"
        )
    from genret.language.encoder import load_encoder

    with reading(config.embeddings, "give a whole .npy matrix"):
        ready = np.load(config.embeddings, allow_pickle=False) if config.embeddings else None
    encode = functools.partial(load_encoder().encode, progress=_reporter("texts encoded"))
    build = {"fashion": kaggle.fashion, "streaming": kaggle.streaming}[config.data]
    build(config.raw, path, encode=encode, embeddings=ready)


def _reporter(what: str) -> Callable[[int, int], None]:
    """progress(done, total), its clock started by the first call."""
    started: list[Progress] = []

    def report(done: int, total: int) -> None:
        if not started:
            started.append(Progress(what, total, apart=5.0))
        started[0](done)

    return report
