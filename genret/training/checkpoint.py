"""Checkpoints: asynchronous, atomic, restored onto any mesh, and refused by another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from genret.types import InputError, PyTree


class Checkpoints:
    """The checkpoints of one run, in `folder`.

    card: JSON-able description of the model; restoring a checkpoint with another card raises InputError.
    """

    def __init__(self, folder: Path | str, *, card: dict[str, Any], keep: int = 3):
        self.folder, self.card = Path(folder).resolve(), card
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True
            ),
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Start writing; a kill at any moment leaves the earlier checkpoints whole."""
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), card=ocp.args.JsonSave(self.card)),
        )

    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """The state at `step`, placed as the shardings of `abstract` say, whatever mesh wrote it.

        Raises InputError when the checkpoint is of another model.
        """
        card = self._manager.restore(step, args=ocp.args.Composite(card=ocp.args.JsonRestore()))["card"]
        _same_card(card, self.card, self.folder / str(step))
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))[
            "state"
        ]

    def close(self) -> None:
        """Wait for the writer."""
        self._manager.wait_until_finished()
        self._manager.close()


def restore_params(folder: Path | str, abstract: PyTree, *, card: dict, step: int | None = None) -> PyTree:
    """The EMA parameters of a run, for evaluation or as the start of the next stage.

    abstract: ShapeDtypeStructs of the parameters, with shardings where a mesh is wanted; without, they come
    as NumPy arrays, whatever devices of whatever processes wrote them. Raises InputError when `folder` holds
    no checkpoint, or one of another model.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise InputError("checkpoint", f"{folder} does not exist", "train the stage before it first")
    manager = ocp.CheckpointManager(folder)
    try:
        step = manager.latest_step() if step is None else step
        if step is None or step not in manager.all_steps():
            raise InputError("checkpoint", f"no step {step} in {folder}", "train the stage before it first")
        found = manager.restore(step, args=ocp.args.Composite(card=ocp.args.JsonRestore()))["card"]
        _same_card(found, card, folder / str(step))
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    {"ema": abstract},
                    restore_args=jax.tree.map(_restored, {"ema": abstract}),
                    partial_restore=True,
                )
            ),
        )
    finally:
        manager.close()
    return restored["state"]["ema"]


def _restored(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _same_card(found: dict, wanted: dict, where: Path) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                "checkpoint", f"{where} has {name}={found.get(name)}, this run has {name}={wanted.get(name)}",
                "use the configuration of that run or another workdir",
            )  # fmt: skip


def abstract_like(tree: PyTree, shardings: PyTree) -> PyTree:
    """ShapeDtypeStructs of `tree` that carry `shardings`."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
