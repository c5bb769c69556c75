"""Arrays that are split over a mesh of devices, while a function on all of them is traced.

On a mesh with explicit axes the type of a value says how it is split, and reads and writes of
rows must say how their results are to be. On one with automatic axes the compiler decides, and a
constraint may tell it what is better.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from adamjax._compat import (
    axis_kinds,
    current_mesh,
    in_memory_of,
    per_device,
    type_sharding,
)

__all__ = [
    "at_each",
    "everywhere",
    "explicit",
    "on_devices",
    "over_rows",
    "put",
    "rows_alike",
    "split_alike",
    "taken",
]


def explicit(x: Any) -> NamedSharding | None:
    """How a value is split, where its type says so."""
    if not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return None
    sharding = type_sharding(x)
    return sharding if sharding is not None and "Explicit" in axis_kinds(sharding.mesh) else None


def everywhere(x: chex.Array) -> chex.Array:
    """A value that is traced, in full on every device of the mesh that it or the context names."""
    typed = explicit(x)
    if typed is not None:
        split = any(axes is not None for axes in typed.spec)
        whole = NamedSharding(typed.mesh, PartitionSpec())
        return jax.sharding.reshard(x, whole) if split else x
    if not isinstance(x, jax.core.Tracer):
        return x
    try:
        return jax.lax.with_sharding_constraint(x, PartitionSpec())
    except RuntimeError:  # there is no mesh
        return x


def on_devices(x: Any, sharding: NamedSharding) -> Any:
    """An array split in this way, in this kind of memory; traced or not."""
    if sharding.memory_kind is not None:
        return jax.device_put(x, sharding)
    if explicit(x) is not None or "Explicit" in axis_kinds(sharding.mesh):
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def rows_split(x: Any) -> NamedSharding | None:
    """How the rows of an array are split, those of one dimension; `None` if that is not known."""
    sharding = explicit(x)
    if sharding is None and not isinstance(x, jax.core.Tracer):
        sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))


def taken(table: chex.Array, indices: chex.Array, **how: Any) -> chex.Array:
    """Rows `table.at[indices].get(**how)`, on all devices that hold a part of the table.

    No index is below 0.
    """
    if table.shape[0] == 0:
        # JAX refuses to gather from nothing.
        table = jnp.zeros((1, *table.shape[1:]), table.dtype)
        indices = jnp.ones_like(indices)
    typed = explicit(table)
    if typed is not None:
        how["out_sharding"] = NamedSharding(typed.mesh, PartitionSpec(None, *typed.spec[1:]))
    return table.at[_unsigned(indices)].get(**how)


def _unsigned(indices: chex.Array) -> chex.Array:
    """Indices of a dtype of which JAX does not ask whether they count from the end."""
    return indices.astype(np.uint32)


def at_each(entries: chex.Array, indices: chex.Array) -> chex.Array:
    """Entries of a short array, whole on every device, at indices in it, split as those are."""
    typed, how = explicit(indices), {}
    if typed is not None:
        spec = (*typed.spec, *[None] * (entries.ndim - 1))
        how["out_sharding"] = NamedSharding(typed.mesh, PartitionSpec(*spec))
    return entries.at[_unsigned(indices)].get(mode="promise_in_bounds", **how)


def put(table: chex.Array, indices: chex.Array, rows: chex.Array, add: bool = False) -> chex.Array:
    """The table with rows set at distinct indices, or added there, split as before.

    An index beyond the table has no effect, and none is below 0.
    """
    typed = explicit(table)
    how = {} if typed is None else {"out_sharding": typed}
    at = table.at[_unsigned(indices)]
    return (at.add if add else at.set)(rows, mode="drop", unique_indices=True, **how)


def split_alike(arrays: Sequence[Any], likes: Sequence[Any]) -> list[Any]:
    """New arrays that the compiler splits as others of their shapes, where these are traced.

    Compilers split what a select chooses from alike. These selects never choose a like, but that
    must not be seen before arrays are split: the constraint on their condition is gone after that,
    the selects become the new arrays, and nothing reads the likes. Where the type of a like names
    no mesh, a barrier takes the constraint's place, and stays.

    Args:
      arrays: the new arrays; `None` stays so.
      likes: one for each, of its shape and any dtype. Only those that are traced count.
    """
    conditions: dict[Any, chex.Array] = {}

    def never(mesh: Any) -> chex.Array:
        if mesh is None:
            return jax.lax.optimization_barrier(np.False_)
        return jax.lax.with_sharding_constraint(np.False_, NamedSharding(mesh, PartitionSpec()))

    def alike(x: Any, like: Any) -> Any:
        if x is None or not isinstance(like, jax.core.Tracer):
            return x
        sharding = type_sharding(like)
        mesh = None if sharding is None else sharding.mesh
        kinds = set() if mesh is None else axis_kinds(mesh)
        # Explicit axes are in the type of x as well; with manual ones alone x is one device's.
        if "Explicit" in kinds or kinds == {"Manual"}:
            return x
        mesh = mesh if kinds == {"Auto"} else None
        if mesh not in conditions:
            conditions[mesh] = never(mesh)
        if like.dtype != x.dtype:
            like = like if jnp.iscomplexobj(x) else like.real
            like = like.astype(x.dtype)
        return jax.lax.select(conditions[mesh], in_memory_of(like, x), x)

    return list(map(alike, arrays, likes))


def rows_alike(x: chex.Array, table: Any) -> chex.Array:
    """A new array with a number for each row of a table, split as its rows are."""
    split = rows_split(table)
    if split is not None:
        typed = explicit(table) is not None
        return jax.sharding.reshard(x, split) if typed else jax.device_put(x, split)
    if not isinstance(table, jax.core.Tracer) or table.size == 0:
        return x
    return split_alike([x], [table.reshape(len(x), -1)[:, 0]])[0]


def over_rows(
    owner: str, function: Callable[[Any, Any, Any], Any], table: Any, axis: Any
) -> Callable[[Any, Any], Any]:
    """A function of arrays as long as a table, and of short ones, for each device's own rows.

    Args:
      function: `(long, short, first) -> long`, that works row by row; `first` is the position in
        the whole table of the first row that it gets.
      axis: the mesh axes that split the table, where its sharding does not say.
    """
    split = rows_split(table)
    if split is None and axis is None:
        return lambda long, short: function(long, short, 0)
    axes = axis if split is None else split.spec[0]
    mesh = _mesh(owner, axes) if split is None else split.mesh
    names = {axes} if isinstance(axes, str) else set(axes)
    count = math.prod(mesh.shape[name] for name in names)
    if len(table) % count:
        raise ValueError(
            f"{owner}: a table of {len(table)} rows is not split evenly over the {count} devices "
            f"of axis {axes!r}; leave axis out, or fill the table up"
        )
    specs = (PartitionSpec(axes), PartitionSpec()), PartitionSpec(axes)

    def own_rows(long: Any, short: Any) -> Any:
        first = jax.lax.axis_index(axes) * (len(table) // count)
        return function(long, short, first)

    return jax.jit(per_device(own_rows, mesh, names, *specs))


def _mesh(owner: str, axes: Any) -> Any:
    """The mesh that is set."""
    found = current_mesh()
    if found is None:
        raise ValueError(
            f"{owner}: axis={axes!r} names an axis of the mesh, but no mesh is set: call it under "
            "jax.set_mesh(mesh)"
        )
    return found
