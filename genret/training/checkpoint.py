"""Checkpoints: asynchronous, atomic, restored onto any mesh, and refused by another model."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from genret.training import processes
from genret.types import InputError, PyTree


class Checkpoints:
    """The checkpoints of one run, in `folder`.

    card: JSON-able description of the model; restoring a checkpoint with another card raises InputError.
    keep: the newest so many remain. every: steps of the schedule; a checkpoint off it, saved at a SIGTERM,
    goes when the next is written.
    """

    def __init__(self, folder: Path | str, *, card: dict[str, Any], keep: int = 3, every: int = 1):
        self.folder, self.card = Path(folder).resolve(), card
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Scheduled(keep, every), create=True, enable_async_checkpointing=True
            ),
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Start writing; a kill at any moment leaves the earlier checkpoints whole. Raises OSError where the
        disk is full, for this checkpoint or the one before."""
        if step == self._manager.latest_step():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), card=ocp.args.JsonSave(self.card))
        with _disk(self.folder):
            self._manager.save(step, args=args)

    def newest(self, abstract: PyTree) -> PyTree | None:
        """The newest state that can be read, placed as the shardings of `abstract` say, whatever mesh wrote
        it; None where nothing is saved. What is newer and damaged is moved out of `folder`, beside it.

        Raises InputError when the checkpoint is of another model, or none can be read; also where several
        processes meet damage, or the machine is at fault and not the file: then nothing is moved.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._restore(step, abstract)
            except InputError:
                raise
            except Exception as error:  # whatever a reader meets in a file cut short
                _only_damage(error, self.folder / str(step))
                damaged[step] = _line(error)
            else:
                break
        else:
            if damaged:
                step, problem = max(damaged.items())
                raise InputError(
                    "checkpoint", f"none in {self.folder} can be read (step {step}: {problem})",
                    "move the folder away to train anew",
                )  # fmt: skip
            return None
        for other, problem in damaged.items():
            print(f"{self.folder / str(other)} cannot be read, back to step {step} ({problem})", flush=True)
            processes.once("damaged checkpoint", functools.partial(self._move_away, other))
        self._manager.reload()
        return state

    def _restore(self, step: int, abstract: PyTree) -> PyTree:
        card = self._manager.restore(step, args=ocp.args.Composite(card=ocp.args.JsonRestore()))["card"]
        _same_card(card, self.card, self.folder / str(step))
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))[
            "state"
        ]

    def _move_away(self, step: int) -> None:
        empty = tempfile.mkdtemp(prefix=f"damaged_{step}_", dir=self.folder.parent)
        os.replace(self.folder / str(step), empty)

    def close(self) -> None:
        """Wait for the writer; raises OSError as `save` does."""
        with _disk(self.folder):
            self._manager.wait_until_finished()
            self._manager.close()


# What a machine says that cannot read just now; a file cut short says something else.
_PASSING = (
    errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EIO, errno.ENOMEM, errno.EACCES, errno.ETIMEDOUT,
)  # fmt: skip


def _not_now(error: Exception, path: Path) -> None:
    """Raises InputError for what is the machine's and not the file's."""
    said = (*map(os.strerror, _PASSING), "RESOURCE_EXHAUSTED", "unable to allocate")
    if isinstance(error, MemoryError) or any(each.lower() in str(error).lower() for each in said):
        fix = "nothing is moved: start again when the machine can"
        raise InputError("checkpoint", f"{path} could not be read now ({_line(error)})", fix) from error


def _only_damage(error: Exception, path: Path) -> None:
    """Raises InputError unless one process has met a damaged file, from which it can go back by itself."""
    _not_now(error, path)
    if processes.several():  # another may have read it, and waits for this one there
        fix = "start one process alone, which goes back to the step before, or move the folder away"
        raise InputError("checkpoint", f"{path} cannot be read ({_line(error)})", fix) from error


@dataclasses.dataclass(frozen=True)
class _Scheduled:
    """Orbax's question which checkpoints to keep."""

    keep: int
    every: int

    def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
        steps = [c.step for c in checkpoints]
        kept = [s for s in steps if s % self.every == 0 or s == steps[-1]][-self.keep :]
        return [s in kept for s in steps]


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A full disk under Orbax, which has many names for it, as the OSError that it is. Orbax waits by the
    wall clock, so one that jumps ahead ends its wait."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TimeoutError):
            said = "the writer of checkpoints was given up: a disk that hangs, or a clock that jumped"
            raise OSError(errno.ETIMEDOUT, said, str(folder)) from error
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            if os.strerror(code).lower() in str(error).lower():
                raise OSError(code, os.strerror(code), str(folder)) from error
        raise


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def restore_params(folder: Path | str, abstract: PyTree, *, card: dict, step: int | None = None) -> PyTree:
    """The EMA parameters of a run, for evaluation or as the start of the next stage.

    abstract: ShapeDtypeStructs of the parameters, with shardings where a mesh is wanted; without, they come
    as NumPy arrays, whatever devices of whatever processes wrote them. Raises InputError when `folder` holds
    no checkpoint, one of another model, or one that cannot be read.
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
    except InputError:
        raise
    except Exception as error:  # whatever a reader meets in a file cut short
        _not_now(error, folder / str(step))
        raise InputError(
            "checkpoint", f"{folder / str(step)} cannot be read ({_line(error)})",
            "move it away, and the file `trained` of its seed, and train again: from the step before it",
        ) from error  # fmt: skip
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
