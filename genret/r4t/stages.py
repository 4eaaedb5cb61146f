"""The set stage: R4T's eq. 9 (arXiv 2603.06397) on the one diffusion core, and the regressor beside it.

    L = E λ(σ) ‖D(Z + σ ε; σ, z_q) - Z‖²        Z: the K rows of a synthetic set, z_q: the query's embedding

The network reads z_q by cross-attention; classifier-free guidance drops it. Two blocks:

    adaln    rows without positions: equivariant to their order, so neither draws nor losses depend on it.
    paper    what the paper's parameter count points to (papers.md B.6): positions on the rows, the noise
             level added to every token, MLPs as wide as the model. Not equivariant: training permutes rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from genret.diffusion import dit, edm, sampler
from genret.diffusion.dit import DiT
from genret.diffusion.retriever import Retriever
from genret.r4t.prompts import K
from genret.r4t.synthesis import SyntheticSets
from genret.training.rows import ByRow
from genret.training.stage import Stage
from genret.types import Array, Batch, Condition, Draw, InputError, PyTree, Terms

# r4t: the paper's, 53 M parameters with its block.
SIZES = dit.SIZES | {"wide": (256, 3, 8), "r4t": (1024, 6, 16)}


def set_dit(
    size: str, *, embedding: int, rows: int = K, block: Literal["adaln", "paper"] = "adaln",
    positions: bool | None = None, dims: int = 0, **more: Any,
) -> DiT:  # fmt: skip
    """A DiT over rows alone that reads the query by cross-attention.

    size: of SIZES. embedding: D. rows: L, the most it will draw. positions: on the rows; None leaves it to
    the block, and the regressor needs them. dims: as given to `fit_space`.
    Raises InputError for an unknown size or block.
    """
    if size not in SIZES:
        raise InputError("size", f"unknown size {size!r}", f"use one of {', '.join(SIZES)}")
    if block not in ("adaln", "paper"):
        raise InputError("block", f"unknown block {block!r}", "use adaln or paper")
    positions = block == "paper" if positions is None else positions
    form = {"adaln": False, "mlp_ratio": 1} if block == "paper" else {}
    width, depth, heads = SIZES[size]
    return DiT(
        width, depth, heads, dims or embedding, domains=0, max_context=0, cross=True,
        row_positions=rows if positions else 0, memory_width=embedding if dims else None, **form, **more,
    )  # fmt: skip


def condition(queries: Array) -> Condition:
    """What a set model reads: no context, no domain, and the query f32[B, D] as the one row of memory."""
    memory = queries[:, None].astype(np.float32)
    # Cut from the queries: in numpy on the host, and of a batch size that an export leaves open.
    none = queries[:, :0]
    return Condition(memory[:, :0], none != 0, none.sum(1).astype(np.int32), memory)


def fit_space(
    sets: SyntheticSets, queries: np.ndarray, *, centred: bool = False, dims: int = 0, seed: int = 0,
    sample: int = 4096,
) -> edm.Space:  # fmt: skip
    """The paper's plain space, σ_data = 1/√D of a unit-norm row, or the one centred on the query.

    queries: f32[Q, D], all of the data set. dims: R, the principal directions of the rows that the diffusion
    runs in; 0 is all of D. What is measured is measured on `sample` sets.
    """
    if not (centred or dims):
        return edm.plain_space(sets.width, 0)
    at = np.random.default_rng(seed).choice(len(sets), min(sample, len(sets)), replace=False)
    present = sets.present[at]
    rows = sets.take(at)[present]  # [m, D]
    query = np.repeat(queries[sets.query[at]], present.sum(1), axis=0)
    return edm.fit_space(
        condition(query), rows[:, None], np.zeros((1, sets.width)), centred=centred, dims=dims
    )


@struct.dataclass
class SetBatch:
    """query: f32[B, D]. target: f32[B, K, D], sets. present: bool[B, K], False for padding rows."""

    query: Array
    target: Array
    present: Array

    @property
    def examples(self) -> Batch:
        return Batch(condition(self.query), self.target, jnp.ones(len(self.query)))


def make_stage(
    name: str, retriever: Retriever, space: edm.Space, sets: SyntheticSets, queries: np.ndarray, *,
    batch: int, rows: int | None = None, keep_top: float = 1.0, regression: bool = False, seed: int = 0,
) -> Stage:  # fmt: skip
    """The stage that trains on `sets`, drawn with replacement.

    queries: unit-norm f32[Q, D], all of the data set. rows: L; None is the K of the sets, a larger one adds
    padding rows, outside the attention and the loss. keep_top: see `SyntheticSets.best`. regression: the same
    network and batches under `matched_regression_loss`, the MSE baseline.

    Raises InputError for fewer rows than the sets have, or a regressor without row positions.
    """
    model, rows = retriever.model, sets.present.shape[1] if rows is None else rows
    more = rows - sets.present.shape[1]
    if more < 0:
        raise InputError("rows", f"{rows} for sets of {rows - more}", "synthesise sets of that length")
    if regression and model.row_positions < rows:
        problem = "rows without positions all get the same prediction"
        raise InputError("regression", problem, f"use a model of {rows} row positions")
    kept = sets.best(keep_top)
    # Decided once: attention without a mask is the faster.
    padded = bool(more) or not sets.present[kept].all()

    def draw(step: int, _: PyTree) -> SetBatch:
        rng = np.random.default_rng([seed, step])
        at = kept[rng.integers(len(kept), size=batch)]
        order = np.broadcast_to(np.arange(rows), (batch, rows))
        if model.row_positions:
            order = rng.permuted(order, axis=1)

        def target(of: np.ndarray) -> np.ndarray:
            found = np.pad(sets.take(at[of]), ((0, 0), (0, more), (0, 0)))
            return np.take_along_axis(found, order[of][..., None], 1)

        present = np.take_along_axis(np.pad(sets.present[at], ((0, 0), (0, more))), order, 1)
        query = ByRow((batch, queries.shape[1]), lambda of: queries[sets.query[at[of]]])
        return SetBatch(query, ByRow((batch, rows, sets.width), target), present)

    def loss(params: PyTree, frozen: edm.Space, batch: SetBatch, draw: Draw) -> Terms:
        present = batch.present if padded else None
        if regression:
            return matched_regression_loss(retriever, params, frozen, batch)
        return retriever.loss(params, frozen, batch.examples, draw, present)

    return Stage(
        name=name, init=retriever.init, loss=loss, batch=draw, rules=dit.SHARDING_RULES, frozen=space,
        card=model_card(model, space, rows),
    )  # fmt: skip


def matched_regression_loss(retriever: Retriever, params: PyTree, space: edm.Space, batch: SetBatch) -> Terms:
    """min_π 1/(K D) Σ_i ‖D(0; σ_max)_i - z_π(i)‖², π over assignments (Hungarian): f32[B].

    Sets have no order, so a loss at fixed places would teach every place the mean of all rows; the matching,
    with positions on the rows to break the tie, lets each place take a part. Where several sets answer one
    query a place still averages over them: that is what diffusion is for. Padding rows cost nothing.
    """
    examples = batch.examples
    anchor = space.anchor(examples.condition)
    clean = space.encode(examples.target, anchor)
    denoise = retriever.denoiser(params, examples.condition, anchor)
    made = sampler.posterior_mean(denoise, jnp.zeros_like(clean))
    square = jnp.sum((made[:, :, None] - clean[:, None]) ** 2, axis=3) * batch.present[:, None]  # [B, K, K]
    place, target = jax.vmap(optax.assignment.hungarian_algorithm)(jax.lax.stop_gradient(square))
    total = jax.vmap(lambda s, i, j: s[i, j].sum())(square, place, target)
    rows = jnp.maximum(batch.present.sum(1), 1)
    return Terms(total / (rows * clean.shape[2]), examples.weight)


def model_card(model: DiT, space: edm.Space, rows: int) -> dict[str, Any]:
    """What must agree between a checkpoint and the code that reads it."""
    given = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    for name in ("parent", "name", "dtype", "attention"):
        del given[name]
    return {n: v for n, v in given.items() if v is not None} | {"rows": rows, "centred": space.centred}
