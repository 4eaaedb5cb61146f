"""Open the catalogue a config names, building it on first use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from genret.catalogue import kaggle, moses
from genret.catalogue.format import Catalogue, load
from genret.training.log import Progress
from genret.types import InputError


def open_catalogue(config: ConfigDict) -> Catalogue:
    """`config.data` is moses, fashion, streaming or a path to a catalogue in genret's format.

    Built catalogues are kept in `config.folder` under a name that says what is in them.
    Raises InputError for a path that does not exist or a missing `raw`.
    """
    data, folder = config.data, Path(config.folder)
    if data not in ("moses", "fashion", "streaming"):
        path = Path(data)
        if not path.exists():
            raise InputError(
                "data", f"{data} does not exist", "use moses, fashion, streaming or a path"
            )
        return load(path, cells=config.cells or None, seed=config.seed)
    if data == "moses":
        size = config.num_items or "all"
        path = folder / f"moses_{size}_{config.pattern}_{config.seed}.parquet"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            progress = None

            def report(done: int, total: int) -> None:
                nonlocal progress
                progress = progress or Progress("moses", total)
                progress(done, "molecules")

            moses.build(
                path, items=size, pattern=config.pattern, seed=config.seed, progress=report,
                cells=config.cells or None,
            )  # fmt: skip
        return load(path)
    path = folder / f"{data}.parquet"
    if not path.exists():
        if not config.raw:
            raise InputError("raw", f"missing for {data}", "pass raw=PATH of the Kaggle CSVs")
        from genret.language.encoder import load_encoder

        folder.mkdir(parents=True, exist_ok=True)
        ready = np.load(config.embeddings, allow_pickle=False) if config.embeddings else None
        build = {"fashion": kaggle.fashion, "streaming": kaggle.streaming}[data]
        build(config.raw, path, encode=load_encoder().encode, embeddings=ready)
    return load(path, cells=config.cells or None, seed=config.seed)
