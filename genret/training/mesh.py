"""The device mesh, and ordered rules from parameter paths to shardings."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genret.training.rows import ByRow, read_all
from genret.types import Array, InputError, PyTree

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; one axis may be -1 and takes what is left.

    Axes are Auto: the default since jax 0.10 is Explicit, under which ordinary sharded code fails.
    """
    shape, count = [data, fsdp, tensor], len(devices) if devices else jax.device_count()
    if shape.count(-1) == 1 and 0 not in shape:
        shape[shape.index(-1)] = count // -int(np.prod(shape))
    if int(np.prod(shape)) != count or min(shape) < 1:
        raise InputError(
            "mesh", f"data {data} x fsdp {fsdp} x tensor {tensor} does not cover {count} devices",
            "make the product equal the device count, or leave one axis at -1",
        )  # fmt: skip
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def path_name(path: tuple) -> str:
    """'block_0/qkv/kernel' for a pytree path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shardings(tree: PyTree, mesh: Mesh, rules: Sequence[tuple[str, P]], *, strict: bool = True) -> PyTree:
    """NamedShardings for a pytree of arrays or ShapeDtypeStructs: the first matching rule decides.

    Scalars are replicated; an axis that does not divide its dimension is dropped from the spec. A leaf
    that no rule matches raises InputError, or is replicated when `strict` is False (frozen inputs).
    """

    def one(path, leaf):
        name = path_name(path)
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))
        if strict:
            raise InputError("rules", f"no sharding rule matches {name}", "add one beside the model")
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(one, tree)


def _fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    axes = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape, strict=False)]
    return P(*axes)


def gathered(tree: PyTree) -> PyTree:
    """NamedShardings with the fsdp axis taken out: whole along it, as a forward pass needs them."""

    def one(s: NamedSharding) -> NamedSharding:
        return NamedSharding(s.mesh, P(*(None if a == "fsdp" else a for a in s.spec)))

    return jax.tree.map(one, tree)


def place(tree: PyTree, target: PyTree) -> PyTree:
    """Arrays onto the mesh; every process passes the same global ones and copies its own rows, which of a
    `ByRow` are all that it reads."""

    def one(x, s):
        # From this process to several, `device_put` would first compare all of it between them.
        if isinstance(x, jax.Array) and (s.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, s)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x), s))
        if not isinstance(x, ByRow):
            x = np.asarray(x)
        read = functools.lru_cache(None)(lambda at: x[tuple(slice(*part) for part in at)])
        # Devices along the tensor axis ask for the same rows. (Slices cannot be hashed before Python 3.12.)
        return jax.make_array_from_callback(
            x.shape, s, lambda at: read(tuple((part.start, part.stop) for part in at))
        )

    return jax.tree.map(one, tree, target)


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh that holds the arrays of a tree, if they are on one."""
    return getattr(getattr(jax.tree.leaves(tree)[0], "sharding", None), "mesh", None)


def parts_beside(params: PyTree) -> int:
    """Into how many parts the devices that hold `params` split a batch: 1 where they are on no mesh."""
    mesh = mesh_of(params)
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def place_beside(params: PyTree, rows: PyTree) -> PyTree:
    """Rows [B, ...] for a program that reads `params`, over the devices of their mesh; B must divide by
    `parts_beside`. Where there is but one device, the rows are read, and the program takes them to it."""
    mesh = mesh_of(params)
    return read_all(rows) if mesh is None or mesh.size == 1 else place(rows, batch_shardings(rows, mesh))


def whole(tree: PyTree, mesh: Mesh) -> PyTree:
    """All of `tree` on every device of the mesh, as generation reads its weights."""
    return place(tree, jax.tree.map(lambda _: NamedSharding(mesh, P()), tree))


def local(tree: PyTree) -> PyTree:
    """The whole of every array on this process's first device, for work that each process does by itself.

    A collective of all processes for arrays that are spread over them; the others are returned as they are.
    """
    leaves, structure = jax.tree.flatten(tree)
    spread = [i for i, x in enumerate(leaves) if not getattr(x, "is_fully_addressable", True)]
    if spread:
        found = [leaves[i] for i in spread]
        whole = [NamedSharding(x.sharding.mesh, P()) for x in found]
        for i, x in zip(spread, jax.jit(lambda t: t, out_shardings=whole)(found), strict=True):
            leaves[i] = x.addressable_data(0)
    return jax.tree.unflatten(structure, leaves)


def with_rows(mesh: Mesh, axis: int = 1) -> Callable[[Array], Array]:
    """x -> x on the devices of the batch's rows, its axis `axis`; as it is where they do not divide."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    target = NamedSharding(mesh, P(*[None] * axis, *BATCH))
    return lambda x: x if x.shape[axis] % parts else jax.lax.with_sharding_constraint(x, target)


def batch_shardings(batch: PyTree, mesh: Mesh) -> PyTree:
    """The leading axis of every leaf over (data, fsdp); raises InputError if it does not divide."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.shape[0] % parts:
            raise InputError(
                "batch_size", f"{path_name(path)} has {leaf.shape[0]} rows for {parts} batch shards",
                f"use a multiple of {parts}",
            )  # fmt: skip
    return jax.tree.map(lambda _: NamedSharding(mesh, BATCH), batch)
