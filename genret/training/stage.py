"""A stage: where its batches come from, and its loss. Everything else about training exists once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import PartitionSpec

from genret.types import Array, Draw, PyTree, Terms


@dataclass(frozen=True)
class Stage:
    """One training stage.

    init: key -> parameters.
    loss: (params, frozen, batch, draw) -> Terms, per example.
    batch: (step, params) -> pytree of numpy arrays, or `ByRow`, with leading axis B. A pure function of its
        arguments, so there is no iterator state to save and resuming is `range(state.step, steps)`;
        on-policy stages read `params`, offline ones ignore them.
    frozen: arrays the loss reads and nothing updates: normaliser, reference model.
    rules: ordered (regex, PartitionSpec) over parameter paths.
    card: JSON-able description of the model, stored with every checkpoint and compared at restore.
    """

    name: str
    init: Callable[[Array], PyTree]
    loss: Callable[[PyTree, PyTree, PyTree, Draw], Terms]
    batch: Callable[[int, PyTree], PyTree]
    rules: Sequence[tuple[str, PartitionSpec]]
    frozen: PyTree = None
    card: dict[str, Any] = field(default_factory=dict)
