"""What no run can do, said before anything is opened, built or trained; `r4t_checks.py` adds R4T's own."""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import ConfigDict

from genret.training.loop import FitOptions
from genret.types import InputError

# Leaves of an MO-DiT configuration that are counts, and the least of each.
LEAST = {
    "batch": 1, "length": 2, "latent.seeds": 1, "latent.smallest": 1, "latent.neighbours": 1,
    "latent.tail_least": 1, "hppo.steps": 1, "hppo.rounds": 1, "hppo.contexts": 1, "hppo.batch": 1,
    "hppo.preference.draws": 1, "retrieval.corpus": 1, "contrastive.batch": 1, "evaluation.k": 1,
    "evaluation.seeds": 1, "evaluation.least_seeds": 1, "evaluation.per_pattern": 1, "evaluation.samples": 1,
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


def check(config: ConfigDict) -> None:
    """Raises InputError for an MO-DiT configuration whose counts, durations or types cannot be."""
    at_least(config, LEAST)
    of_matmuls(config, "model.dtype")
    trainable(config, *(f"stages.{name}" for name in config.stages), "labels.predictor")
    trainable(config, "hppo.fit", "contrastive.fit", steps=1)  # theirs are told elsewhere


def at_least(config: ConfigDict, leaves: Mapping[str, int]) -> None:
    """Raises InputError for a leaf below the least of it."""
    for name, least in leaves.items():
        if (value := _leaf(config, name)) < least:
            raise InputError(name, f"{value} is too few", f"use {least} or more")


def of_matmuls(config: ConfigDict, name: str) -> None:
    """Raises InputError unless the leaf is a type that networks compute in."""
    if (dtype := _leaf(config, name)) not in DTYPES:
        raise InputError(name, f"{dtype!r} is no type of matmuls", f"use {' or '.join(DTYPES)}")


def trainable(config: ConfigDict, *sections: str, **told: int) -> None:
    """Raises InputError for a section of FitOptions that cannot be trained by."""
    for name in sections:
        try:
            FitOptions(**{**_leaf(config, name).to_dict(), **told})
        except InputError as error:
            raise InputError(f"{name}.{error.field}", error.problem, error.fix) from None


def _leaf(config: ConfigDict, name: str):
    for part in name.split("."):
        config = config[part]
    return config
