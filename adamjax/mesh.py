"""Arrays that are split over a mesh of devices, while a function on all of them is traced.

On a mesh with explicit axes the type of a value says how it is split, and reads and writes of
rows must say how their results are to be. On one with automatic axes the compiler decides, and a
constraint may tell it what is better.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental.shard_alike import shard_alike
from jax.sharding import NamedSharding, PartitionSpec

__all__ = [
    "at_each",
    "everywhere",
    "explicit",
    "on_devices",
    "over_rows",
    "per_device",
    "put",
    "rows_alike",
    "split_alike",
    "taken",
]


def explicit(x: Any) -> NamedSharding | None:
    """How a value is split, where its type says so."""
    if not hasattr(jax, "typeof") or not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return None
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return None
    kinds = getattr(sharding.mesh, "axis_types", ())
    return sharding if jax.sharding.AxisType.Explicit in kinds else None


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
    kinds = getattr(sharding.mesh, "axis_types", None) or ()
    if explicit(x) is not None or (kinds and jax.sharding.AxisType.Explicit in kinds):
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
    """Rows `table.at[indices].get(**how)`, on all devices that hold a part of the table."""
    if table.shape[0] == 0:
        # JAX refuses to gather from nothing.
        table = jnp.zeros((1, *table.shape[1:]), table.dtype)
        indices = jnp.ones_like(indices)
    typed = explicit(table)
    if typed is not None:
        how["out_sharding"] = NamedSharding(typed.mesh, PartitionSpec(None, *typed.spec[1:]))
    return table.at[indices].get(**how)


def at_each(entries: chex.Array, indices: chex.Array) -> chex.Array:
    """Entries of a short array, whole on every device, at indices in it, split as those are."""
    typed, how = explicit(indices), {}
    if typed is not None:
        spec = (*typed.spec, *[None] * (entries.ndim - 1))
        how["out_sharding"] = NamedSharding(typed.mesh, PartitionSpec(*spec))
    return entries.at[indices].get(mode="promise_in_bounds", **how)


def put(table: chex.Array, indices: chex.Array, rows: chex.Array, add: bool = False) -> chex.Array:
    """The table with rows set at distinct indices, or added there, split as before."""
    typed = explicit(table)
    how = {} if typed is None else {"out_sharding": typed}
    at = table.at[indices]
    return (at.add if add else at.set)(rows, mode="drop", unique_indices=True, **how)


def split_alike(x: chex.Array, like: chex.Array) -> chex.Array:
    """A new array that the compiler splits as another one of its shape, where both are traced."""
    if not isinstance(like, jax.core.Tracer) or explicit(like) is not None:
        return x
    return shard_alike(like, x)[1]


def rows_alike(x: chex.Array, table: Any) -> chex.Array:
    """A new array with a number for each row of a table, split as its rows are."""
    split = rows_split(table)
    if split is not None:
        typed = explicit(table) is not None
        return jax.sharding.reshard(x, split) if typed else jax.device_put(x, split)
    if not isinstance(table, jax.core.Tracer) or table.size == 0:
        return x
    return split_alike(x, table.reshape(len(x), -1)[:, 0].astype(x.dtype))


def over_rows(
    owner: str, function: Callable[[Any, Any], Any], table: Any, axis: Any
) -> Callable[[Any, Any], Any]:
    """A function of arrays as long as a table, and of short ones, for each device's own rows.

    Args:
      function: `(long, short) -> long`, that works row by row.
      axis: the mesh axes that split the table, where its sharding does not say.
    """
    split = rows_split(table)
    if split is None and axis is None:
        return function
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
    return jax.jit(per_device(function, mesh, names, *specs))


def per_device(
    function: Callable[..., Any], mesh: Any, names: set[str], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`shard_map` over some axes of a mesh, without a check of what differs between devices."""
    specs = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs}
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, axis_names=names, check_vma=False, **specs)
    from jax.experimental import shard_map as older

    shard_map: Any = older.shard_map
    others = frozenset(mesh.axis_names) - names
    return shard_map(function, auto=others, check_rep=False, **specs)


def _mesh(owner: str, axes: Any) -> Any:
    """The mesh that is set."""
    found = getattr(jax.sharding, "get_abstract_mesh", lambda: None)()
    if found is None or found.empty:
        raise ValueError(
            f"{owner}: axis={axes!r} names an axis of the mesh, but no mesh is set: call it under "
            "jax.set_mesh(mesh)"
        )
    return found
