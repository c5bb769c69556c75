"""Where an optimizer's state lies on a mesh of devices: as its parameters do, or split besides."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from adamjax._compat import per_device
from adamjax.autodiff import Call
from adamjax.data import Tree, static, transform_state
from adamjax.exact import ExactRowsState
from adamjax.leaves import described, dtype_of, expect_arrays, is_arraylike, is_left_alone, matched
from adamjax.mesh import explicit, on_devices
from adamjax.paths import flatten, leaf_paths
from adamjax.rows import RowGradient, RowMoves
from adamjax.structure import find, map_like_params
from adamjax.transform import Step, Transform, as_transform, expect_state

__all__ = ["ShardedState", "shard_state", "state_shardings"]


@transform_state()
class ShardedState(NamedTuple):
    """State of `shard_state`.

    Attributes:
      inner: the state of the inner transform, its slots split over the axis.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> mesh = jax.sharding.Mesh(jax.devices(), "data")
    >>> state = adamjax.shard_state(adamjax.adam(0.1), mesh, "data").init(jnp.ones(8))
    >>> adamjax.get_slot(state, "m").sharding.spec == jax.sharding.PartitionSpec("data")
    True
    """

    inner: Any


# The axes that split each dimension of an array, as far as that is known.
Spec = tuple[Any, ...]


def _spec(x: Any) -> Spec:
    sharding = explicit(x)
    if sharding is None and not isinstance(x, jax.core.Tracer):
        sharding = getattr(x, "sharding", None)
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    return (*spec, *[None] * (np.ndim(x) - len(spec)))


def state_shardings(tx: Any, params: Tree, mesh: Any, *, memory_kind: str | None = None) -> Any:
    """How an optimizer's state is to be split on a mesh: each slot as its parameter.

    For `jax.jit(tx.init, out_shardings=...)`, for the `out_shardings` of a step, and to restore a
    checkpoint onto. Numbers are on all devices. What `exact_rows` knows of each row is split as
    the rows of its table; under `shard_state`, slots are split over its axis besides.

    Args:
      tx: an optimizer; parts from elsewhere, such as optax's, are followed too.
      params: the parameters; arrays, or `jax.ShapeDtypeStruct`, whose `NamedSharding` counts.
        One without is on all devices.
      mesh: a `jax.sharding.Mesh`.
      memory_kind: the memory for slots, like `"pinned_host"`; `None`: the devices' own. A step
        has to fetch them from there, as `shard_state` does.

    Returns:
      A tree like `tx.init(params)` with a `NamedSharding` for each array.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.sharding.Mesh(jax.devices(), "data")
    >>> table = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> shardings = adamjax.state_shardings(tx, {"table": table}, mesh)
    >>> shardings.tables["table"].last.spec == P("data"), shardings.clock.spec == P()
    (True, True)
    """
    tx, (leaves, treedef) = as_transform(tx), flatten(params)
    shapes = [p if p is None else jax.ShapeDtypeStruct(np.shape(p), dtype_of(p)) for p in leaves]
    state = jax.eval_shape(tx.init, treedef.unflatten(shapes))
    return _placed(tx, params, state, [_spec(p) for p in leaves], mesh, memory_kind)


def _placed(
    tx: Transform, params: Tree, state: Any, specs: Sequence[Spec], mesh: Any, kind: str | None
) -> Any:
    """How the arrays of a state are to be split, by how those of its parameters' slots are."""
    leaves, treedef = flatten(params)
    paths = leaf_paths(params)
    sharded = [part.tx for part in find(shard_state, tx)]

    def along(spec: Spec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)

    def everywhere(x: Any) -> Any:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), x)

    def slots(tree: Tree) -> Tree:
        def slot(x: Any, p: Any, spec: Spec) -> Any:
            alike = x is not None and not isinstance(x, RowGradient) and x.shape == np.shape(p)
            return along(spec) if alike else everywhere(x)

        return treedef.unflatten(map(slot, flatten(tree)[0], leaves, specs))

    def other(x: Any) -> Any:
        if isinstance(x, ShardedState):
            return ShardedState(sharded.pop(0).placed(x.inner, params, kind))
        if isinstance(x, ExactRowsState):
            tables = {
                path: everywhere(known)._replace(last=along(specs[paths.index(path)][:1]))
                for path, known in x.tables.items()
            }
            inner = map_like_params(params, slots, other, x.inner)
            return ExactRowsState(inner, everywhere(x.clock), tables, everywhere(x.rings))
        return everywhere(x)

    return map_like_params(
        params, slots, other, state, lambda x: isinstance(x, ShardedState | ExactRowsState)
    )


class shard_state(Transform):
    """Splits an optimizer's state over replicas, which hold the parameters in full (ZeRO-1).

    Every moment and average is split along its longest dimension that the number of devices on
    the axis divides; one without such a dimension stays whole on all devices. Gradients are
    split as the state is, each device moves its part, and the updates are gathered; whatever is
    computed of all gradients, such as a norm, is that of all. The result is that of the inner
    transform up to the order of sums, and a device holds 1/N of the state.

    For arrays of the whole mesh, in `jit`; not within `shard_map`. Where the gradients are sums
    over a batch that is split over the axis, a compiler may make one reduce-scatter of the sum and
    the split, as that for TPUs does; `value_and_grad` asks for it on every platform. Rows of tables
    pass as they are.
    (S. Rajbhandari and others, ZeRO, arXiv:1910.02054, section 5.1: P_os.)

    Args:
      tx: the optimizer.
      mesh: a `jax.sharding.Mesh` with the axis.
      axis: its name, or a tuple of several.
      memory_kind: where the state lies between steps: `"pinned_host"` keeps it in the host's
        memory, from where each step fetches it. `None`: in the devices' own.

    The state is a `ShardedState`. `jax.jit(tx.init)(params)` makes no array that is not split. A
    parameter that is itself split over other axes stays so on a mesh with explicit axes; with
    automatic axes it is taken to be whole on all devices.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> mesh = jax.sharding.Mesh(jax.devices(), "data")
    >>> tx = adamjax.shard_state(adamjax.adamw(0.1), mesh, "data")
    >>> params = {"w": jnp.ones(8)}
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state, batch):
    ...     loss = lambda params, batch: jnp.mean((batch @ params["w"]) ** 2)
    ...     value, grads = tx.value_and_grad(loss)(params, batch)
    ...     updates, state = tx.update(grads, state, params)
    ...     return adamjax.apply_updates(params, updates), state, value
    >>> params, state, value = step(params, state, jnp.ones((16, 8)))
    >>> print(value)
    64.0
    """

    tx: Transform
    mesh: Any = static()
    axis: Any = static()
    memory_kind: str | None = static(default=None, kw_only=True)

    groupable = False

    def __post_init__(self) -> None:
        self.set_fields(tx=as_transform(self.tx))
        if not isinstance(self.axis, str):
            self.set_fields(axis=tuple(self.axis))
        if missing := [name for name in self._axes if name not in self.mesh.axis_names]:
            raise ValueError(
                f"shard_state: axis {missing[0]!r} is none of the mesh, which has "
                f"{list(self.mesh.axis_names)}"
            )

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, ShardedState)
        return (state.inner,)

    @property
    def _axes(self) -> tuple[str, ...]:
        return (self.axis,) if isinstance(self.axis, str) else self.axis

    @property
    def _count(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self._axes)

    def _whole(self, x: Any) -> Spec:
        """How a parameter is split by itself: by the type of its value, or else not at all."""
        return (None,) * np.ndim(x) if explicit(x) is None else _spec(x)

    def split(self, x: Any) -> Spec:
        """How a slot is split: as its parameter, and its longest dimension over the axis."""
        spec, shape = self._whole(x), np.shape(x)
        if set(self._axes) & {name for axes in spec for name in _names(axes)}:
            return spec
        free = [i for i, n in enumerate(shape) if spec[i] is None and n and n % self._count == 0]
        if not free:
            return spec
        longest = max(free, key=lambda i: shape[i])
        return (*spec[:longest], self.axis, *spec[longest + 1 :])

    def _laid(self, tree: Tree, like: Tree, spec_of: Callable[[Any], Spec]) -> Tree:
        """A tree with its dense leaves split by what `spec_of` says of the leaves of another."""

        def laid(x: Any, p: Any) -> Any:
            if p is None or is_left_alone(x) or isinstance(x, RowGradient | RowMoves):
                return x
            return on_devices(x, NamedSharding(self.mesh, PartitionSpec(*spec_of(p))))

        leaves, treedef = flatten(tree)
        return treedef.unflatten(laid(x, p) for x, p in zip(leaves, flatten(like)[0], strict=True))

    def placed(self, inner: Any, params: Tree, kind: str | None = None) -> Any:
        """How the arrays of the inner transform's state are to be split."""
        splits = [self.split(p) for p in flatten(params)[0]]
        return _placed(self.tx, params, inner, splits, self.mesh, kind or self.memory_kind)

    # --- the pair

    def init(self, params: Tree) -> ShardedState:
        def make(params: Tree) -> ShardedState:
            inner = self.tx.init(params)
            return ShardedState(jax.tree.map(on_devices, inner, self.placed(inner, params)))

        absent = jax.core.Tracer | jax.ShapeDtypeStruct | None
        if all(isinstance(p, absent) for p in flatten(params)[0]):
            return make(params)
        # Jitted, so that no slot is ever whole on a device.
        return jax.jit(make, out_shardings=state_shardings(self, params, self.mesh))(params)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_state(self, state, ShardedState)
        whole, inner = updates if params is None else params, state.inner
        if self.memory_kind is not None:
            kind = self.mesh.devices.flat[0].default_memory().kind
            inner = jax.tree.map(on_devices, inner, self.placed(inner, whole, kind))
        leaves = matched("shard_state", "grads", updates, whole, "params")
        updates = self._laid(flatten(whole)[1].unflatten(leaves), whole, self.split)
        if params is not None:
            params = self._laid(params, whole, self.split)
        updates, inner = self.tx.update(updates, inner, params, **extra_args)
        inner = jax.tree.map(on_devices, inner, self.placed(inner, whole))
        return self._laid(updates, whole, self._whole), ShardedState(inner)

    def value_and_grad(
        self, loss_fn: Callable[..., Any], *, has_aux: bool = False
    ) -> Callable[..., Any]:
        """`jax.value_and_grad` with the batch over the axis and gradients split as the state is.

        Each device differentiates the loss of its part of the batch; the gradients are averaged
        by a reduce-scatter, so that no device ever holds their sum.

        Args:
          loss_fn: `loss_fn(params, *args)`: a mean over the batch, which is the first dimension
            of every array in args, divided by the number of devices.
          has_aux: whether it returns `(loss, aux)`. Floats of aux are averaged over the devices, as
            the loss is. An array that is longer for a larger batch, in its first dimension, has
            something of each example: it comes back for the whole batch, in any dtype.

        Returns:
          A function `(params, *args) -> (value, grads)`; value is `(loss, aux)` with `has_aux`.
          The gradient of a leaf that is no float is `None`.

        Raises:
          ValueError: by the call: a batch does not divide over the devices; something in aux is
            neither of an example nor a float, such as a count, of which each device has another.
          TypeError: a leaf of params is no array.
        """

        @functools.wraps(loss_fn)
        def function(params: Tree, *args: Any) -> Any:
            expect_arrays("shard_state", params)
            for x in jax.tree.leaves(args):
                if np.ndim(x) == 0 or np.shape(x)[0] % self._count:
                    raise ValueError(
                        f"shard_state: an argument of the loss has the shape {np.shape(x)}; "
                        f"expected a batch that divides over the {self._count} devices of axis "
                        f"{self.axis!r}; close over what is no batch"
                    )
            leaves, treedef = flatten(params)
            splits = [self.split(p) for p in leaves]
            aux: list[Any] = []

            def reduced(g: Any, split: Spec) -> Any:
                if g is None:
                    return None
                if self.axis not in split:
                    return jax.lax.pmean(g, self.axis)
                g = jax.lax.psum_scatter(
                    g, self.axis, scatter_dimension=split.index(self.axis), tiled=True
                )
                return g / self._count

            def mean(x: Any) -> Any:
                return jax.lax.pmean(x, self.axis)

            def own(params: Tree, *args: Any) -> Any:
                call = Call("shard_state", loss_fn, (params, *args), {}, 0, has_aux)
                value, grads = call.value_and_grad()
                loss, extra = value if has_aux else (value, ())
                flags = _of_examples(call, extra)
                found, structure = jax.tree.flatten(extra)
                aux[:] = structure, flags
                examples = [x for x, flag in zip(found, flags, strict=True) if flag]
                means = [mean(x) for x, flag in zip(found, flags, strict=True) if not flag]
                grads = treedef.unflatten(map(reduced, flatten(grads)[0], splits))
                return mean(loss), examples, means, grads

            def over_axis(split: Spec) -> PartitionSpec:
                return PartitionSpec(*(self.axis if a == self.axis else None for a in split))

            whole, batch = PartitionSpec(), PartitionSpec(self.axis)
            out = whole, batch, whole, treedef.unflatten(map(over_axis, splits))
            into = whole, *[batch] * len(args)
            mapped = per_device(own, self.mesh, set(self._axes), into, out)
            loss, examples, means, grads = mapped(params, *args)
            structure, flags = aux
            rest = {True: iter(examples), False: iter(means)}
            extra = structure.unflatten([next(rest[flag]) for flag in flags])
            return (loss, extra) if has_aux else loss, grads

        return function


def _of_examples(call: Call, aux: Tree) -> list[bool]:
    """Which leaves of a loss' aux hold something of each example; of the others, floats alone.

    Shapes tell: those of examples grow with the batch. So where there are others than scalars,
    the loss is traced once more, with twice the batch.
    """
    pairs = jax.tree_util.tree_flatten_with_path(aux)[0]
    shapes = [_shape(x) for _, x in pairs]
    longer = _shapes_of_twice(call) if any(shapes) else shapes
    found = []
    for (path, x), one, two in zip(pairs, shapes, longer, strict=True):
        name = f"aux[{jax.tree_util.keystr(path, simple=True, separator='/')!r}]"
        if one != two and two != tuple(2 * n if i == 0 else n for i, n in enumerate(one)):
            raise ValueError(
                f"shard_state: {name} is {described(x)}, and of shape {list(two)} with twice the "
                "batch: expected what it has of each example in its first dimension"
            )
        if one == two and (not is_arraylike(x) or is_left_alone(x)):
            raise ValueError(
                f"shard_state: {name} is {described(x)}, of which each device has its own: "
                "expected a float, of which the mean over devices is taken, or an array that has "
                "something of each example in its first dimension. For a count give the mean of "
                "floats, as in jnp.mean(right.astype(float))"
            )
        found.append(one != two)
    return found


def _shapes_of_twice(call: Call) -> list[tuple[int, ...]]:
    """The shapes in a loss' aux with twice the batch."""

    def twice(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2 * np.shape(x)[0], *np.shape(x)[1:]), dtype_of(x))

    params, *args = call.args
    try:
        _, aux = jax.eval_shape(call.loss_fn, params, *jax.tree.map(twice, args))
    except Exception as error:
        raise ValueError(
            "shard_state: aux has arrays, and which of them have something of each example shows "
            "with twice the batch, which the loss does not take: let it take batches of any size, "
            "or give scalars"
        ) from error
    return list(map(_shape, jax.tree.leaves(aux)))


def _shape(x: Any) -> tuple[int, ...]:
    return np.shape(x) if is_arraylike(x) else ()


def _names(axes: Any) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
