"""Shardings of an optimizer's state on a mesh: like its parameters, or split over an axis."""

import copy
import dataclasses
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
from adamjax.encoding import Scaled8, exponents_spec
from adamjax.exact import ExactRowsState
from adamjax.leaves import (
    described,
    dtype_of,
    expect_arrays,
    is_arraylike,
    is_left_alone,
    match_leaves,
)
from adamjax.mesh import explicit_sharding, place
from adamjax.paths import flatten, leaf_paths
from adamjax.rows import RowGradient, RowMoves
from adamjax.structure import find, map_like_params
from adamjax.transform import Step, Transform, as_transform, expect_state

__all__ = ["ShardedState", "shard_state", "state_shardings"]


@transform_state()
class ShardedState(NamedTuple):
    """State of `shard_state`.

    Attributes:
      inner: the state of the inner transform, with its slots split over the axis.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> mesh = jax.sharding.Mesh(jax.devices(), "data")
    >>> state = adamjax.shard_state(adamjax.adam(0.1), mesh, "data").init(jnp.ones(8))
    >>> adamjax.get_slot(state, "m").sharding.spec == jax.sharding.PartitionSpec("data")
    True
    """

    inner: Any


# For each dimension of an array the mesh axes that split it, or `None` if none does or the split is
# unknown.
Spec = tuple[Any, ...]


def _spec(x: Any) -> Spec:
    """The split of an array; for a tracer it is known only on a mesh with explicit axes."""
    sharding = explicit_sharding(x)
    if sharding is None and not isinstance(x, jax.core.Tracer):
        sharding = getattr(x, "sharding", None)
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    return (*spec, *[None] * (np.ndim(x) - len(spec)))


def _named(mesh: Any, spec: Spec, memory_kind: str | None = None) -> NamedSharding:
    """The sharding of an array with this split, as `jit` returns it: without a `None` at the end.

    With a `None` at the end, the second step would be compiled again.
    """
    last = max((i for i, axes in enumerate(spec) if axes is not None), default=-1)
    return NamedSharding(mesh, PartitionSpec(*spec[: last + 1]), memory_kind=memory_kind)


def state_shardings(tx: Any, params: Tree, mesh: Any, *, memory_kind: str | None = None) -> Any:
    """The shardings of an optimizer's state on a mesh: each slot is split like its parameter.

    Use them in `jax.jit(tx.init, out_shardings=...)`, in the `out_shardings` of a step, and to
    restore a checkpoint. Scalars are on all devices. The clock that `exact_rows` stores for each
    row is split like the rows of the table. Under `shard_state`, slots are split over its axis too.

    Args:
      tx: an optimizer; states of other libraries' transforms, such as optax's, are split too.
      params: the parameters; arrays, or `jax.ShapeDtypeStruct`. A parameter without a
        `NamedSharding` is on all devices.
      mesh: a `jax.sharding.Mesh`.
      memory_kind: the memory for slots, like `"pinned_host"`; `None`: the devices' own memory. If
        slots are in another memory, your step has to fetch them from there; `shard_state` does that
        for you.

    Returns:
      A tree like `tx.init(params)` with a `NamedSharding` for each array.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.sharding.Mesh(jax.devices(), "data")
    >>> table = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> shardings = adamjax.state_shardings(tx, {"table": table}, mesh)
    >>> shardings.last["table"].spec == P("data"), shardings.clock.spec == P()
    (True, True)
    """
    tx, (leaves, treedef) = as_transform(tx), flatten(params)
    shapes = [p if p is None else jax.ShapeDtypeStruct(np.shape(p), dtype_of(p)) for p in leaves]
    state = jax.eval_shape(tx.init, treedef.unflatten(shapes))
    return _shardings_of(tx, params, state, [_spec(p) for p in leaves], mesh, memory_kind)


def _shardings_of(
    tx: Transform,
    params: Tree,
    state: Any,
    specs: Sequence[Spec],
    mesh: Any,
    memory_kind: str | None,
) -> Any:
    """The shardings of a state, given the split of the slots of each parameter."""
    leaves, treedef = flatten(params)
    paths = leaf_paths(params)
    # In the order in which `map_like_params` visits their states.
    shard_transforms = [part.tx for part in find(shard_state, tx)]

    def split(spec: Spec) -> NamedSharding:
        return _named(mesh, spec, memory_kind)

    def replicated(x: Any) -> Any:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), x)

    def slot_shardings(tree: Tree) -> Tree:
        def slot_sharding(x: Any, p: Any, spec: Spec) -> Any:
            if isinstance(x, Scaled8):
                return Scaled8(split(spec), split(exponents_spec(spec, x.ndim)))
            if isinstance(x, RowGradient) and len(x.indices) == x.num_rows:
                # The total of `accumulate_gradients` with a place for each row of a table.
                return x.replace(indices=split(spec[:1]), values=split(spec))
            is_dense = x is not None and not isinstance(x, RowGradient)
            return split(spec) if is_dense and x.shape == np.shape(p) else replicated(x)

        return treedef.unflatten(map(slot_sharding, flatten(tree)[0], leaves, specs))

    def other_shardings(x: Any) -> Any:
        if isinstance(x, ShardedState):
            return ShardedState(shard_transforms.pop(0).shardings(x.inner, params, memory_kind))
        if isinstance(x, ExactRowsState):
            # `last` has an entry for each row, so it is split like the table's first dimension.
            last = {path: split(specs[paths.index(path)][:1]) for path in x.last}
            inner = map_like_params(params, slot_shardings, other_shardings, x.inner)
            return replicated(x)._replace(inner=inner, last=last)
        return replicated(x)

    return map_like_params(
        params,
        slot_shardings,
        other_shardings,
        state,
        lambda x: isinstance(x, ShardedState | ExactRowsState),
    )


class shard_state(Transform):
    """Splits an optimizer's state over replicas that each have all parameters (ZeRO-1).

    Every moment and average is split along one dimension: the longest of those whose size is a
    multiple of the number of devices on the axis. Slots that cannot be split evenly stay whole on
    all devices. Gradients are split like the state, each device updates its share, and the updates
    are gathered. A norm is computed over all gradients. The result is that of the inner transform
    up to the order of sums, and a device holds 1/N of the state.

    Put it around all other wrappers, such as `accumulate_gradients`, whose sums it splits too. Use
    it on arrays of the whole mesh, in `jit`, not within `shard_map`. If the gradients are sums over
    a batch that is split over the axis, the TPU's compiler turns the sum and the split into one
    reduce-scatter; the method `tx.value_and_grad` requests one on every platform. Row gradients are
    not split. (S. Rajbhandari and others, ZeRO, arXiv:1910.02054, section 5.1: P_os.)

    Args:
      tx: the optimizer.
      mesh: a `jax.sharding.Mesh` with the axis.
      axis: its name, or a tuple of several.
      memory_kind: the memory for the state between steps. `"pinned_host"` keeps it in the host's
        memory, and each step fetches it from there. `None`: the devices' own memory.

    The state is a `ShardedState`. `jax.jit(tx.init)(params)` creates each array already split. On a
    mesh with explicit axes, a parameter that is split over other axes stays split; on a mesh with
    automatic axes every parameter counts as whole on all devices.

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
    goes_around_exact_rows = True

    def __post_init__(self) -> None:
        self.set_fields(tx=as_transform(self.tx))
        if not isinstance(self.axis, str):
            self.set_fields(axis=tuple(self.axis))
        if missing := [name for name in self._axes if name not in self.mesh.axis_names]:
            raise ValueError(
                f"shard_state: the mesh has no axis {missing[0]!r}, it has "
                f"{list(self.mesh.axis_names)}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "shard_state":
        # The copy shares the mesh: it is made of devices, which JAX 0.7 cannot copy.
        return dataclasses.replace(self, tx=copy.deepcopy(self.tx, memo))

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, ShardedState)
        return (state.inner,)

    @property
    def _axes(self) -> tuple[str, ...]:
        return (self.axis,) if isinstance(self.axis, str) else self.axis

    @property
    def _num_devices(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self._axes)

    def _parameter_spec(self, x: Any) -> Spec:
        """The split of a parameter: by its type on a mesh with explicit axes, or else none."""
        return (None,) * np.ndim(x) if explicit_sharding(x) is None else _spec(x)

    def _slot_spec(self, x: Any) -> Spec:
        """The split of a slot: its parameter's, and its longest free dimension over the axis."""
        spec, shape = self._parameter_spec(x), np.shape(x)
        # An axis can split only one dimension, and it may split the parameter already.
        if set(self._axes) & {name for axes in spec for name in _names(axes)}:
            return spec
        free = [
            i for i, n in enumerate(shape) if spec[i] is None and n and n % self._num_devices == 0
        ]
        if not free:
            return spec
        longest = max(free, key=lambda i: shape[i])
        return (*spec[:longest], self.axis, *spec[longest + 1 :])

    def _split_like(self, tree: Tree, like: Tree, spec_of: Callable[[Any], Spec]) -> Tree:
        """The tree with each dense leaf split by `spec_of(p)`, where p is that leaf of `like`."""

        def split(x: Any, p: Any) -> Any:
            if p is None or is_left_alone(x) or isinstance(x, RowGradient | RowMoves):
                return x
            return place(x, _named(self.mesh, spec_of(p)))

        leaves, treedef = flatten(tree)
        pairs = zip(leaves, flatten(like)[0], strict=True)
        return treedef.unflatten(split(x, p) for x, p in pairs)

    def shardings(self, inner: Any, params: Tree, memory: str | None = None) -> Any:
        """The shardings of the inner transform's state.

        Args:
          memory: the kind of memory to use in place of `memory_kind`.
        """
        specs = [self._slot_spec(p) for p in flatten(params)[0]]
        memory_kind = memory or self.memory_kind
        return _shardings_of(self.tx, params, inner, specs, self.mesh, memory_kind)

    # --- init and update

    def init(self, params: Tree) -> ShardedState:
        def make(params: Tree) -> ShardedState:
            inner = self.tx.init(params)
            return ShardedState(jax.tree.map(place, inner, self.shardings(inner, params)))

        without_values = jax.core.Tracer | jax.ShapeDtypeStruct | None
        if all(isinstance(p, without_values) for p in flatten(params)[0]):
            return make(params)
        # Under `jit` no slot is ever whole on a device.
        return jax.jit(make, out_shardings=state_shardings(self, params, self.mesh))(params)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_state(self, state, ShardedState)
        inner = state.inner
        like = updates if params is None else params
        if self.memory_kind is not None:
            own_memory = self.mesh.devices.flat[0].default_memory().kind
            inner = jax.tree.map(place, inner, self.shardings(inner, like, own_memory))
        leaves = match_leaves("shard_state", "grads", updates, like, "params")
        updates = self._split_like(flatten(like)[1].unflatten(leaves), like, self._slot_spec)
        if params is not None:
            params = self._split_like(params, like, self._slot_spec)
        updates, inner = self.tx.update(updates, inner, params, **extra_args)
        inner = jax.tree.map(place, inner, self.shardings(inner, like))
        return self._split_like(updates, like, self._parameter_spec), ShardedState(inner)

    def value_and_grad(
        self, loss_fn: Callable[..., Any], *, has_aux: bool = False
    ) -> Callable[..., Any]:
        """`jax.value_and_grad` with the batch split over the axis and gradients split like slots.

        Each device differentiates the loss of its share of the batch. A reduce-scatter averages the
        gradients, so no device ever holds their whole sum.

        Args:
          loss_fn: `loss_fn(params, *args)`: a mean over the batch. The batch is the first dimension
            of every array in args, and the number of devices divides it.
          has_aux: whether it returns `(loss, aux)`. Floats of aux are averaged over the devices,
            like the loss. An array whose first dimension grows with the batch has an entry for each
            example: it is returned for the whole batch, in any dtype.

        Returns:
          A function `(params, *args) -> (value, grads)`; value is `(loss, aux)` with `has_aux`.
          The gradient of a leaf that is not a float is `None`.

        Raises:
          ValueError: when the function is called: the batch does not divide over the devices, or a
            leaf of aux is neither a float nor an array with an entry for each example. (An
            integer, such as how many predictions were right, is neither: it differs from device to
            device.)
          TypeError: a leaf of params is not an array.
        """

        @functools.wraps(loss_fn)
        def function(params: Tree, *args: Any) -> Any:
            expect_arrays("shard_state", params)
            for x in jax.tree.leaves(args):
                if np.ndim(x) == 0 or np.shape(x)[0] % self._num_devices:
                    raise ValueError(
                        f"shard_state: an argument of the loss has the shape {np.shape(x)}; "
                        f"expected a batch that divides over the {self._num_devices} devices of "
                        f"axis {self.axis!r}; let the loss close over all other arrays"
                    )
            leaves, treedef = flatten(params)
            specs = [self._slot_spec(p) for p in leaves]
            # Tracing `on_each_device` stores here the structure of aux, and which of its leaves
            # have an entry for each example.
            traced_aux: list[Any] = []

            def reduce_gradient(g: Any, spec: Spec) -> Any:
                if g is None:
                    return None
                if self.axis not in spec:
                    return jax.lax.pmean(g, self.axis)
                g = jax.lax.psum_scatter(
                    g, self.axis, scatter_dimension=spec.index(self.axis), tiled=True
                )
                return g / self._num_devices

            def mean(x: Any) -> Any:
                return jax.lax.pmean(x, self.axis)

            def on_each_device(params: Tree, *args: Any) -> Any:
                call = Call("shard_state", loss_fn, (params, *args), {}, 0, has_aux)
                value, grads = call.value_and_grad()
                loss, aux = value if has_aux else (value, ())
                are_per_example = _are_per_example(call, aux)
                aux_leaves, structure = jax.tree.flatten(aux)
                traced_aux[:] = structure, are_per_example
                pairs = list(zip(aux_leaves, are_per_example, strict=True))
                examples = [x for x, per_example in pairs if per_example]
                means = [mean(x) for x, per_example in pairs if not per_example]
                grads = treedef.unflatten(map(reduce_gradient, flatten(grads)[0], specs))
                return mean(loss), examples, means, grads

            def over_axis(spec: Spec) -> PartitionSpec:
                """The split over the axis alone. The compiler handles the other axes."""
                return PartitionSpec(*(self.axis if a == self.axis else None for a in spec))

            whole, by_example = PartitionSpec(), PartitionSpec(self.axis)
            out_specs = whole, by_example, whole, treedef.unflatten(map(over_axis, specs))
            in_specs = whole, *[by_example] * len(args)
            mapped = per_device(on_each_device, self.mesh, set(self._axes), in_specs, out_specs)
            loss, examples, means, grads = mapped(params, *args)
            structure, are_per_example = traced_aux
            leaves_of_kind = {True: iter(examples), False: iter(means)}
            aux = structure.unflatten([next(leaves_of_kind[kind]) for kind in are_per_example])
            return (loss, aux) if has_aux else loss, grads

        return function


def _are_per_example(call: Call, aux: Tree) -> list[bool]:
    """Whether each leaf of a loss' aux has an entry for each example; others must be floats.

    The shapes of such leaves grow with the batch. So if aux has arrays that are not scalars, the
    loss is traced once more with twice the batch.
    """
    pairs = jax.tree_util.tree_flatten_with_path(aux)[0]
    shapes = [_shape(x) for _, x in pairs]
    doubled = _shapes_with_twice_the_batch(call) if any(shapes) else shapes
    flags = []
    for (path, x), shape, twice in zip(pairs, shapes, doubled, strict=True):
        name = f"aux[{jax.tree_util.keystr(path, simple=True, separator='/')!r}]"
        if shape != twice and twice != tuple(2 * n if i == 0 else n for i, n in enumerate(shape)):
            raise ValueError(
                f"shard_state: {name} is {described(x)}, and of shape {list(twice)} with twice the "
                "batch: expected an entry for each example in its first dimension"
            )
        if shape == twice and (not is_arraylike(x) or is_left_alone(x)):
            raise ValueError(
                f"shard_state: {name} is {described(x)}, which differs from device to device: "
                "expected a float, which is averaged over the devices, or an array with an entry "
                "for each example in its first dimension. Instead of a count return a mean of "
                "floats, as in jnp.mean(right.astype(float))"
            )
        flags.append(shape != twice)
    return flags


def _shapes_with_twice_the_batch(call: Call) -> list[tuple[int, ...]]:
    """The shapes of the leaves of a loss' aux with twice the batch."""

    def twice(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2 * np.shape(x)[0], *np.shape(x)[1:]), dtype_of(x))

    params, *args = call.args
    try:
        _, aux = jax.eval_shape(call.loss_fn, params, *jax.tree.map(twice, args))
    except Exception as error:
        raise ValueError(
            "shard_state: aux has arrays, and to see which of them have an entry for each example "
            "the loss is traced with twice the batch, which failed: let it take batches of any "
            "size, or return scalars in aux"
        ) from error
    return list(map(_shape, jax.tree.leaves(aux)))


def _shape(x: Any) -> tuple[int, ...]:
    return np.shape(x) if is_arraylike(x) else ()


def _names(axes: Any) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
