"""The shape alphabet and the types that cross from one room to the next.

    B  batch            K  rows of a generated set, or the depth of a ranking
    S  context (seeds)  D  embedding width
    N  corpus items     M  attribute domains
    Q  queries          P  patterns

Embeddings are unit-norm float32 everywhere outside `genret.diffusion`.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import struct

Array = jax.Array
PyTree = Any


class InputError(ValueError):
    """A bad input, said once and before any compute: the field, what is wrong with it, and the fix."""

    def __init__(self, field: str, problem: str = "", fix: str = ""):
        super().__init__(field, problem, fix)  # all three, so that it survives a process pool
        self.field, self.problem, self.fix = field, problem, fix

    def __str__(self) -> str:
        # absl rebuilds an error of a config file from its message alone.
        return f"{self.field}: {self.problem}. {self.fix}" if self.problem else self.field


@contextlib.contextmanager
def reading(path: Path | str, fix: str = "delete it and start again: it is made anew") -> Iterator[None]:
    """What a reader says of a file that is cut short or damaged, as one InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(str(path), f"is cut short or damaged ({said})", fix) from error


@struct.dataclass
class Condition:
    """What a denoiser is conditioned on.

    context: f32[B, S, D] unit-norm rows in the order they are to be read (padding rows are zero).
    mask: bool[B, S], True where `context` holds an item.
    domain: i32[B] in 0..M, where M is the null domain (no attribute asked for).
    memory: optional f32[B, C, E] read by cross-attention (a text embedding, say).
    """

    context: Array
    mask: Array
    domain: Array
    memory: Array | None = None


@struct.dataclass
class Batch:
    """One training batch: denoise `target` f32[B, K, D] (unit-norm rows) given `condition`.

    weight: f32[B]; a row of weight 0 is padding and changes nothing.
    """

    condition: Condition
    target: Array
    weight: Array


@struct.dataclass
class Draw:
    """The randomness of one training step, one row per example, whatever the mesh or microbatch.

    key: key[B]. uniform: f32[B] in [0, 1), stratified over the batch (one shared offset on a regular
    grid), which cuts the variance of the noise-level average at no cost.
    """

    key: Array
    uniform: Array


@struct.dataclass
class Terms:
    """What a loss returns: per-example terms. The mean is taken in one place, the train step.

    loss, weight: f32[B]. aux: name -> f32[B], averaged with the same weight for the log.
    """

    loss: Array
    weight: Array
    aux: dict[str, Array] = struct.field(default_factory=dict)
