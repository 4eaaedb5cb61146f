"""The functions that an export holds: queries and sets of a trained model, of flat parameters.

Parameters are one dict[str, array] whose names are paths, so that an .npz file holds them and the program
none; everything that differs between models of one shape is among them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from genret.diffusion.edm import Space, unit
from genret.diffusion.retriever import Method, Retriever
from genret.modit.density import DensityMLP
from genret.r4t import stages
from genret.r4t.fanout import kept
from genret.types import Array, Condition, InputError, PyTree

PLATFORMS = ("cpu", "cuda", "tpu")
Program = Callable[..., Array]


def flat(**trees: PyTree) -> dict[str, np.ndarray]:
    """The leaves of nested dicts by their path, on the host: {"network/block_0/...": f32[...]}."""
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(trees, sep="/").items()}


def space_arrays(space: Space) -> dict[str, Array]:
    """The arrays of a space; that it is centred belongs to the program."""
    arrays = {"scale": space.scale, "directions": space.directions}
    return arrays if space.basis is None else arrays | {"basis": space.basis}


def query_program(retriever: Retriever, predictor: DensityMLP, *, centred: bool, guided: bool) -> Program:
    """(parameters, seeds f32[B, S, D], mask bool[B, S], domain i32[B]) -> unit-norm queries f32[B, D].

    The one-call query with guidance and reach per domain, and the seeds read in ascending predicted density
    as `MoDiT.queries` reads them: they may come in any order. Parameters: network, predictor, space, and
    guidance, reach: f32[M]. guided: whether any domain has guidance, which costs a second network call.
    """

    def query(parameters: dict[str, Array], seeds: Array, mask: Array, domain: Array) -> Array:
        p = traverse_util.unflatten_dict(parameters, sep="/")
        logits = predictor.apply({"params": p["predictor"]}, seeds)  # [B, S, M]
        asked = jnp.take_along_axis(logits, domain[:, None, None], axis=2)[..., 0]
        density = jnp.where(mask, 1 / (1 + jnp.exp(-asked)), jnp.inf)  # saturated ones tie, as in training
        order = jnp.argsort(density, axis=1, stable=True)
        seeds = jnp.where(mask[..., None], seeds, 0.0)  # padding rows are zero
        context = jnp.take_along_axis(seeds, order[..., None], axis=1)
        given = Condition(context, jnp.take_along_axis(mask, order, axis=1), domain)
        w = p["guidance"][domain] if guided else None
        made = retriever.generate(p["network"], Space(**p["space"], centred=centred), given, None, w)
        mean = unit(seeds.sum(1))
        return unit(mean + p["reach"][domain][:, None] * (made[:, 0] - mean))

    return query


def set_program(
    retriever: Retriever, *, centred: bool, rows: int, k: int, method: Method, steps: int,
    levels: tuple[float, float],
) -> Program:  # fmt: skip
    """(parameters, query f32[B, D], seed u32[]) -> unit-norm sets f32[B, k, D], as `SetRetriever.sets` draws
    them by `method` in `steps` between `levels`. Parameters: network, space. rows: L, drawn jointly."""

    def sets(parameters: dict[str, Array], query: Array, seed: Array) -> Array:
        p = traverse_util.unflatten_dict(parameters, sep="/")
        keys = jax.random.split(jax.random.key(seed), query.shape[0])
        made = retriever.generate(
            p["network"], Space(**p["space"], centred=centred), stages.condition(query), keys,
            method=method, steps=steps, rows=rows, levels=levels,
        )  # fmt: skip
        return kept(query, made, k)

    return sets


def lowered(program: Program, parameters: dict[str, np.ndarray], *inputs: tuple[tuple, str]) -> bytes:
    """StableHLO of a program for every platform, serialised by `jax.export`; what is float32 is multiplied in
    float32 on accelerators too.

    inputs: (shape, dtype) of each argument after the parameters; "batch" in a shape is any size.
    Raises InputError where flatbuffers, which `jax.export` writes with, is missing.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise InputError("flatbuffers", "is not installed", "pip install 'genret[export]'")
    (batch,) = export.symbolic_shape("batch")
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in parameters.items()}
    given = [
        jax.ShapeDtypeStruct(tuple(batch if n == "batch" else n for n in shape), dtype)
        for shape, dtype in inputs
    ]
    frames = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)  # no path of this machine in the program
    try:
        with jax.default_matmul_precision("highest"):
            return bytes(export.export(jax.jit(program), platforms=PLATFORMS)(like, *given).serialize())
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)
