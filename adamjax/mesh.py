"""Reads, writes and shardings of arrays that are split over a mesh of devices.

On a mesh with explicit axes, the type of a value includes its sharding, and a gather or scatter of
rows must name the sharding of its result. On a mesh with automatic axes, the compiler chooses
shardings, unless a constraint sets them.
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
    "explicit_sharding",
    "gather_entries",
    "gather_rows",
    "place",
    "replicate",
    "reshard",
    "run_on_own_rows",
    "scatter_rows",
    "split_alike",
    "split_like_rows",
]


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding in a value's type; `None` unless its mesh has explicit axes."""
    if not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return None
    sharding = type_sharding(x)
    return sharding if sharding is not None and "Explicit" in axis_kinds(sharding.mesh) else None


def reshard(x: chex.Array, sharding: NamedSharding, like: chex.Array) -> chex.Array:
    """Moves an array to a sharding over explicit axes, on the mesh of `like`."""
    # Outside `jit`, JAX's `reshard` needs `jax.set_mesh`, and `device_put` does not.
    if isinstance(x, jax.core.Tracer) or isinstance(like, jax.core.Tracer):
        return jax.sharding.reshard(x, sharding)
    # `sharding` may come from a type, whose mesh has no devices. The mesh of `like` has devices.
    return jax.device_put(x, NamedSharding(like.sharding.mesh, sharding.spec))


def replicate(x: chex.Array) -> chex.Array:
    """Replicates a value over the devices of its mesh, or else of the current mesh.

    Without explicit axes, a value that is not traced is returned as it is.
    """
    sharding = explicit_sharding(x)
    if sharding is not None:
        is_split = any(axes is not None for axes in sharding.spec)
        return reshard(x, NamedSharding(sharding.mesh, PartitionSpec()), x) if is_split else x
    if not isinstance(x, jax.core.Tracer):
        return x
    try:
        return jax.lax.with_sharding_constraint(x, PartitionSpec())
    except RuntimeError:  # there is no mesh
        return x


def place(x: Any, sharding: NamedSharding) -> Any:
    """Moves an array, traced or not, to a sharding and to the memory that the sharding names."""
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    # In `jit`, `device_put` moves an array to another memory, but does not split it. `reshard` and
    # sharding constraints split it. A constraint does so only in the devices' own memory. So an
    # array is moved there before it is split, and to another memory afterwards.
    own_memory = sharding.mesh.devices.flat[0].default_memory().kind
    in_own_memory = sharding.memory_kind in (None, own_memory)
    if in_own_memory:
        x = jax.device_put(x, sharding)
    if explicit_sharding(x) is not None or "Explicit" in axis_kinds(sharding.mesh):
        x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, sharding.spec))
    else:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, sharding.spec))
    return x if in_own_memory else jax.device_put(x, sharding)


def _rows_sharding(x: Any) -> NamedSharding | None:
    """The sharding of an array's first dimension; `None` if it is not split or not known."""
    sharding = explicit_sharding(x)
    if sharding is None and not isinstance(x, jax.core.Tracer):
        sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))


def gather_rows(table: chex.Array, indices: chex.Array, **options: Any) -> chex.Array:
    """`table.at[indices].get(**options)`: every device gets all of these rows.

    Their columns stay split like the table's columns. Indices must not be negative.
    """
    if table.shape[0] == 0:
        # JAX refuses to gather from an empty array. So gather from one row of zeros, at an index
        # that is out of bounds too.
        table = jnp.zeros((1, *table.shape[1:]), table.dtype)
        indices = jnp.ones_like(indices)
    sharding = explicit_sharding(table)
    if sharding is not None:
        spec = PartitionSpec(None, *sharding.spec[1:])
        options["out_sharding"] = NamedSharding(sharding.mesh, spec)
    return table.at[_unsigned(indices)].get(**options)


def _unsigned(indices: chex.Array) -> chex.Array:
    """The indices as unsigned integers, so that JAX does not check for negative ones."""
    return indices.astype(np.uint32)


def gather_entries(entries: chex.Array, indices: chex.Array) -> chex.Array:
    """Gathers entries of a short array that is replicated over all devices.

    The result is split over devices like the indices.
    """
    sharding, options = explicit_sharding(indices), {}
    if sharding is not None:
        spec = PartitionSpec(*sharding.spec, *[None] * (entries.ndim - 1))
        options["out_sharding"] = NamedSharding(sharding.mesh, spec)
    return entries.at[_unsigned(indices)].get(mode="promise_in_bounds", **options)


def scatter_rows(
    table: chex.Array, indices: chex.Array, rows: chex.Array, add: bool = False
) -> chex.Array:
    """The table with `rows` written to it, or with `add` added to it, at distinct indices.

    The sharding stays. An index beyond the table has no effect. Indices must not be negative.
    """
    sharding = explicit_sharding(table)
    options = {} if sharding is None else {"out_sharding": sharding}
    at = table.at[_unsigned(indices)]
    return (at.add if add else at.set)(rows, mode="drop", unique_indices=True, **options)


def split_alike(arrays: Sequence[Any], references: Sequence[Any]) -> list[Any]:
    """Makes the compiler split new arrays over devices like traced references of the same shapes.

    The compiler gives both operands of a select the same sharding. So each new array becomes a
    select between its reference and itself, with a condition that is always False. While the
    compiler chooses shardings, it must not see that the condition is False, so the condition has a
    sharding constraint. Later the compiler removes the constraint, then the select, and nothing
    reads the reference. If the type of a reference has no mesh, the condition has an optimization
    barrier in place of the constraint. A barrier is not removed, and neither is the select.

    Args:
      arrays: the new arrays; `None` stays `None`.
      references: an array for each new array, of the same shape and any dtype. One that is not
        traced is ignored.
    """
    conditions: dict[Any, chex.Array] = {}

    def hidden_false(mesh: Any) -> chex.Array:
        if mesh is None:
            return jax.lax.optimization_barrier(np.False_)
        return jax.lax.with_sharding_constraint(np.False_, NamedSharding(mesh, PartitionSpec()))

    def alike(x: Any, reference: Any) -> Any:
        if x is None or not isinstance(reference, jax.core.Tracer):
            return x
        sharding = type_sharding(reference)
        mesh = None if sharding is None else sharding.mesh
        kinds = set() if mesh is None else axis_kinds(mesh)
        # With explicit axes the type of x has a sharding; with only manual ones x is on one device.
        if "Explicit" in kinds or kinds == {"Manual"}:
            return x
        # On a mesh with manual axes too, a barrier takes the place of the constraint.
        mesh = mesh if kinds == {"Auto"} else None
        if mesh not in conditions:
            conditions[mesh] = hidden_false(mesh)
        if reference.dtype != x.dtype:
            reference = reference if jnp.iscomplexobj(x) else reference.real
            reference = reference.astype(x.dtype)
        return jax.lax.select(conditions[mesh], in_memory_of(reference, x), x)

    return list(map(alike, arrays, references))


def split_like_rows(x: chex.Array, table: Any) -> chex.Array:
    """Gives `x`, a new array with a number for each row of a table, the sharding of the rows."""
    is_explicit = explicit_sharding(table) is not None
    sharding = _rows_sharding(table)
    if sharding is not None:
        return reshard(x, sharding, table) if is_explicit else jax.device_put(x, sharding)
    # With explicit axes, the type of the table shows that its rows are not split.
    if is_explicit or not isinstance(table, jax.core.Tracer) or table.size == 0:
        return x
    return split_alike([x], [table.reshape(len(x), -1)[:, 0]])[0]


def run_on_own_rows(
    owner: str, function: Callable[[Any, Any, Any], Any], table: Any, axis: Any
) -> Callable[[Any, Any], Any]:
    """Makes each device run a function on its own rows of a table.

    Args:
      owner: the name that errors begin with.
      function: `(arrays, others, first_row) -> arrays`, which works row by row. `arrays` is a tree
        of arrays with an entry for each row of the table, `others` is a tree of other arrays, and
        `first_row` is the index of the device's first row.
      table: the table. Its sharding determines which rows a device has.
      axis: the mesh axes that split the table, if its sharding is not known.

    Returns:
      The function `(arrays, others) -> arrays` for the whole table.
    """
    sharding = _rows_sharding(table)
    if sharding is not None:
        axes, mesh = sharding.spec[0], sharding.mesh
    elif axis is not None:
        axes, mesh = axis, _required_mesh(owner, axis)
    else:
        return lambda arrays, others: function(arrays, others, 0)
    names = {axes} if isinstance(axes, str) else set(axes)
    num_devices = math.prod(mesh.shape[name] for name in names)
    if len(table) % num_devices:
        raise ValueError(
            f"{owner}: a table of {len(table)} rows is not split evenly over the {num_devices} "
            f"devices of axis {axes!r}; leave axis out, or pad the table"
        )
    in_specs, out_specs = (PartitionSpec(axes), PartitionSpec()), PartitionSpec(axes)

    def on_own_rows(arrays: Any, others: Any) -> Any:
        first_row = jax.lax.axis_index(axes) * (len(table) // num_devices)
        return function(arrays, others, first_row)

    return jax.jit(per_device(on_own_rows, mesh, names, in_specs, out_specs))


def _required_mesh(owner: str, axes: Any) -> Any:
    """The current mesh, or an error that names the axes if there is none."""
    mesh = current_mesh()
    if mesh is None:
        raise ValueError(
            f"{owner}: axis={axes!r} names an axis of the mesh, but no mesh is set: call it under "
            "jax.set_mesh(mesh)"
        )
    return mesh
