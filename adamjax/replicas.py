"""The transform that sums gradients over replicas."""

import numbers
from typing import Any

import jax

from adamjax._compat import varying_axes
from adamjax.data import Tree, static
from adamjax.leaves import is_left_alone, match_leaves
from adamjax.paths import flatten, leaf_paths
from adamjax.rows import RowGradient, check_sound, row_gradient
from adamjax.transform import Stateless, Step, expect_empty

__all__ = ["sum_over"]


class sum_over(Stateless):
    """Sums gradients over the replicas of a mapped axis.

    Put it first in a chain, so that norms are computed from the sums. Call `update` inside
    `shard_map`, `pmap` or `vmap`. A `RowGradient` stays one: the rows of all replicas are gathered,
    and rows with equal indices are summed, so the result has as many indices as all replicas
    together. (In Keras' documentation of Adamax, `get_replica_context().all_reduce("sum", grads)`
    does this.)

    In `shard_map`, pass `check_vma=False`. By default JAX itself sums the gradients of parameters
    that are the same on all devices, so `sum_over` refuses to sum them again. The loss of a device
    must be its share of the whole loss: divide a mean by the number of devices.

    Args:
      axis_name: the name of the mapped axis, or a tuple of names.

    Raises:
      TypeError, ValueError: `axis_name` is neither a name nor a tuple of names.
      NameError: by `update`: no axis of this name is mapped there.
      ValueError: by `update`: a gradient is the same on all devices of the axis.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> tx = adamjax.chain(adamjax.sum_over("batch"), adamjax.scale(-1.0))
    >>> def step(g):
    ...     return tx.update(g, tx.init(g))[0]
    >>> jax.vmap(step, axis_name="batch")(jnp.array([1.0, 2.0]))
    Array([-3., -3.], dtype=float32)
    """

    axis_name: Any = static()

    keeps_zero = True
    groupable = True

    def __post_init__(self) -> None:
        name = self.axis_name
        names = tuple(name) if isinstance(name, tuple | list) else (name,)
        for x in names:
            # To JAX, a number means a dimension of the array itself.
            if x is None or isinstance(x, numbers.Number | tuple | list):
                raise TypeError(
                    "sum_over: axis_name must be the name of a mapped axis, such as 'batch', or "
                    f"a tuple of names; got {name!r}"
                )
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"sum_over: axis_name must be one name or several different ones; got {name!r}"
            )
        if isinstance(name, list):
            self.set_fields(axis_name=names)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_empty(self, state)
        # Check the axis first, so that updates without a leaf to sum are refused too.
        try:
            jax.lax.psum(1, self.axis_name)
        except NameError:
            raise NameError(
                f"sum_over: no axis {self.axis_name!r} is mapped here: call update inside "
                "shard_map over a mesh that has it, or inside vmap or pmap with axis_name="
                f"{self.axis_name!r}; without replicas leave sum_over out"
            ) from None

        names = self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,)
        # In shard_map with check_vma=True, a type contains the axes over which its values vary. An
        # axis index varies over its axis, so its type shows whether types track this axis.
        tracked_axes = [x for x in names if x in varying_axes(jax.typeof(jax.lax.axis_index(x)))]

        def expect_varying(path: str, g: Any) -> None:
            varying = {axis for x in jax.tree.leaves(g) for axis in varying_axes(jax.typeof(x))}
            for axis in tracked_axes:
                if axis not in varying:
                    raise ValueError(
                        f"sum_over: the gradient of {path!r} is the same on all devices of axis "
                        f"{axis!r}: JAX has summed it already, as it does for parameters that do "
                        "not vary over the axis. Pass check_vma=False to shard_map, or leave "
                        "sum_over out"
                    )

        def gather(x: Any) -> Any:
            return jax.lax.all_gather(x, self.axis_name, axis=0, tiled=True)

        def sum_leaf(path: str, g: Any) -> Any:
            if is_left_alone(g):
                return g
            expect_varying(path, g)
            if not isinstance(g, RowGradient):
                return jax.lax.psum(g, self.axis_name)
            g = check_sound("sum_over", g)
            if g.rest is not None:
                # A row of this replica may be in the `rest` of another, which has the values of all
                # rows that are not among its indices.
                return jax.lax.psum(g.to_dense(), self.axis_name)
            rows = row_gradient(gather(g.indices), gather(g.values), g.num_rows)
            return rows.replace(lazy=g.lazy)

        like, like_name = (updates, "grads") if params is None else (params, "params")
        leaves = match_leaves("sum_over", "grads", updates, like, like_name)
        return flatten(like)[1].unflatten(map(sum_leaf, leaf_paths(like), leaves)), state
