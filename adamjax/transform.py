"""Base classes of transforms, checks of states, and a wrapper of other libraries' transforms."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.coasting import Coast
from adamjax.data import Data, Tree, static
from adamjax.leaves import (
    LeafFactors,
    described,
    expect_one_for_each_leaf,
    expect_stored,
    lift,
    match_leaves,
)
from adamjax.moments import widen
from adamjax.numpy_arrays import fault_of_array
from adamjax.paths import flatten, leaf_paths
from adamjax.rows import RowGradient, RowMoves
from adamjax.structure import Part, states_of_class

__all__ = [
    "COUNTS",
    "RESTORED_WITHOUT_CLASSES",
    "Rule",
    "Scaling",
    "Stateless",
    "Step",
    "Transform",
    "as_transform",
    "expect_empty",
    "expect_number",
    "expect_state",
    "rates_of_all",
    "states_of_parts",
    "times",
]


# The result of `update`: the updates and the next state.
Step = tuple[Any, Any]


if TYPE_CHECKING:
    # optax and Flax annotate arguments with this class. At run time they accept any pair.
    from optax import GradientTransformationExtraArgs as _Pair
else:
    _Pair = object


def rates_of_all(params: Tree, num: int | None) -> list[int | None]:
    """The result of `Transform.num_rates` if it is the same for all leaves; 0 for `None`."""
    return [0 if leaf is None else num for leaf in flatten(params)[0]]


class Transform(Data, _Pair):
    """A gradient transform: two pure functions, `init` and `update`, and their hyperparameters.

    A subclass is a frozen dataclass and a pytree whose leaves are its hyperparameters. It unpacks
    as the pair `init, update = tx` and works wherever optax's transforms work. `chain` takes
    adamjax's transforms and optax's.

    adamjax's own transforms leave alone every leaf whose gradient is `None` or has an integer,
    boolean or float0 dtype: the leaf's state does not change, and `apply_updates` does not move its
    parameter.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> class sign(adamjax.Transform):
    ...     size: float
    ...
    ...     def init(self, params):
    ...         return ()
    ...
    ...     def update(self, updates, state, params=None, **extra_args):
    ...         return jax.tree.map(lambda g: self.size * jnp.sign(g), updates), state
    >>> tx = adamjax.chain(sign(0.1), adamjax.scale(-1.0))
    >>> tx, tx.update(jnp.array(7.0), tx.init(None))[0]
    (chain(sign(size=0.1), scale(factor=-1.0)), Array(-0.1, dtype=float32))
    """

    def init(self, params: Tree) -> Any:
        """The state before the first step, for parameters of these shapes and dtypes."""
        raise NotImplementedError(f"{type(self).__name__} has no init")

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        """The updates, in the gradients' structure, shapes and dtypes, and the next state.

        The arguments are named as in optax: `updates` are the gradients. Accept `**extra_args` even
        if you use none: a chain passes all extra arguments to each of its parts.
        """
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def check_state(self, state: Any) -> None:
        """Raises a TypeError or ValueError if this transform cannot continue from the state.

        Call it in `update`; `exact_rows` calls it too. Begin the message with the transform's name.
        A wrapper need not check the states of its parts: each part checks its own state.
        """

    #: Whether the update of an element with a gradient of zero is always zero, whatever its earlier
    #: gradients were. `exact_rows` accepts only such transforms before a table's rule.
    keeps_zero: ClassVar[bool] = False

    @property
    def groupable(self) -> bool:
        """Whether several leaves may be stored end to end in one array, as `grouped` does.

        They may if an element's update does not depend on the path, the shape or the other elements
        of its leaf. It may depend on sums over all leaves.
        """
        return bool(self.parts) and all(part.groupable for part in self.parts)

    def affine(self, state: Any, params: Tree, leaf: int, real: Any) -> tuple[Any, Any] | None:
        """Scalars (s, w): this transform turns a leaf's update u into `s * u + w * p`.

        `exact_rows` first calls this with `state=None`, to ask whether there are such scalars and
        whether w is always 0. Then `params` and `real` are `None` too.

        Args:
          state: the state before the step, or `None`.
          params: the parameters.
          leaf: the leaf's index in `params`; p is its parameter.
          real: the dtype of the scalars.

        Returns:
          The pair (s, w), or `None` if there are no such scalars. If w is always 0, return the
          Python number 0 for w. If `state` is `None`, s may be any number, and if w is not always
          0, w may be any number but 0.
        """
        return None

    def kinds(self, params: Tree) -> list[Any]:
        """A hashable key for each leaf. Leaves with equal keys have the same rate, decay and mask.

        By these keys, `exact_rows` puts tables into families.
        """
        count = len(flatten(params)[0])
        return [None] * count if self.groupable else list(range(count))

    def resolve_masks(self, params: Tree) -> Self:
        """This transform with bools in place of its mask functions, at any depth.

        `exact_rows` passes rows in place of a table. A mask function that looks at shapes could
        decide differently for the rows than for the table. So mask functions are called once, with
        the whole parameters.
        """
        parts = self.parts
        new = [x.resolve_masks(seen) for x, _, seen in self.children(None, params)]
        same = all(a is b for a, b in zip(parts, new, strict=True))
        return self if same else self.with_parts(new)

    @property
    def python_numbers(self) -> frozenset[str]:
        """Names of hyperparameters that must be Python floats, its own or those of its parts.

        `exact_rows` names the numbers that it computes with in advance.
        """
        return frozenset()

    # Whether it only passes each leaf's gradient through its parts, as a chain does.
    only_routes: ClassVar[bool] = False
    # Whether a table's gradient must not go through it inside `exact_rows`, only around it.
    goes_around_exact_rows: ClassVar[bool] = False

    @property
    def parts(self) -> tuple["Transform", ...]:
        """The transforms in the fields of this one, in the order of the fields."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        tuples = (value if isinstance(value, tuple) else (value,) for value in values)
        return tuple(x for values in tuples for x in values if isinstance(x, Transform))

    def with_parts(self, parts: Sequence["Transform"]) -> Self:
        """This transform with other parts. The new transform is not checked."""
        new_parts = iter(parts)

        def replaced(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(replaced, value))
            return next(new_parts) if isinstance(value, Transform) else value

        new = copy.copy(self)
        new.set_fields(
            **{f.name: replaced(getattr(self, f.name)) for f in dataclasses.fields(self)}
        )
        return new

    def part_states(self, state: Any) -> tuple[Any, ...]:
        """The states of the parts, in order. Raises an error if the state is another transform's.

        By default, the state is itself the state of the only part.
        """
        return (state,) * len(self.parts)

    def part_params(self, params: Tree) -> tuple[Tree, ...]:
        """The parameters that each part sees: `None` in place of a leaf that it does not see."""
        return (params,) * len(self.parts)

    def children(self, state: Any, params: Tree) -> tuple[Part, ...]:
        """The parts, each with its state and the parameters that it sees.

        Args:
          state: the state of this transform. With `None`, the result has `None` for the state of
            each part.
          params: the parameters that this transform sees. With `None`, the result has `None` for
            the parameters of each part.
        """
        parts = self.parts
        unknown = (None,) * len(parts)
        states = unknown if state is None else self.part_states(state)
        params_seen = unknown if params is None else self.part_params(params)
        return tuple(map(Part, parts, states, params_seen))

    def lazy_leaves(self, params: Tree) -> list[bool]:
        """For each leaf, whether a rule updates only the rows that a row gradient has.

        A rule does so if its field `rows` is "lazy".
        """
        leaves = flatten(params)[0]
        rows = getattr(self, "rows", None)
        own = isinstance(rows, str) and rows == "lazy"
        is_lazy = [own and leaf is not None for leaf in leaves]
        for tx, _, seen in self.children(None, params):
            is_lazy = [a or b for a, b in zip(is_lazy, tx.lazy_leaves(seen), strict=True)]
        return is_lazy

    def num_rates(self, params: Tree) -> list[int | None]:
        """For each leaf, by how many learning rates its updates are multiplied.

        `None` if that is unknown, or if something else may set the sign of its updates: a factor
        below 0, a transform that freezes, or a transform that is not adamjax's.
        """
        is_ours = type(self).__module__.partition(".")[0] == __name__.partition(".")[0]
        nums = rates_of_all(params, 0 if is_ours else None)
        for tx, _, seen in self.children(None, params) if is_ours else ():
            pairs = zip(nums, tx.num_rates(seen), strict=True)
            nums = [None if a is None or b is None else a + b for a, b in pairs]
        return nums

    @property
    def descends(self) -> bool:
        """Whether it multiplies by minus a learning rate."""
        return any(part.descends for part in self.parts)

    @property
    def adds_weights(self) -> bool:
        """Whether it only adds a non-negative multiple of the weights to the updates."""
        return bool(self.parts) and all(part.adds_weights for part in self.parts)

    @property
    def gates_steps(self) -> bool:
        """Whether it returns zeros in some calls, in which it takes no step."""
        return False

    @property
    def has_rule(self) -> bool:
        """Whether it has a rule of adamjax, or made with `extend`, at any depth."""
        return any(part.has_rule for part in self.parts)

    @property
    def must_be_last(self) -> bool:
        """Whether it must be the last transform of a chain."""
        return any(part.must_be_last for part in self.parts)

    @property
    def has_wide_updates(self) -> bool:
        """Whether updates may have a wider dtype than gradients. Then they must not be rounded."""
        return any(part.has_wide_updates for part in self.parts)

    @property
    def has_foreign(self) -> bool:
        """Whether it has a part, at any depth, that is another library's transform.

        The state of such a part may take on the dtype of the updates that the part gets. So these
        updates must have the gradients' dtypes.
        """
        return any(part.has_foreign for part in self.parts)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.update))


class Stateless(Transform):
    """Base class of transforms whose state is empty."""

    def init(self, params: Tree) -> tuple[()]:
        return ()


class foreign(Transform):
    """Another library's pair of functions as a transform, such as one of optax."""

    init_fn: Callable[..., Any] = static()
    update_fn: Callable[..., Any] = static()

    @property
    def has_foreign(self) -> bool:
        return True

    def num_rates(self, params: Tree) -> list[int | None]:
        return rates_of_all(params, None)

    def init(self, params: Tree) -> Any:
        return self.init_fn(params)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        parameters = inspect.signature(self.update_fn).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            extra_args = {name: arg for name, arg in extra_args.items() if name in parameters}
        before = flatten(updates)[0]
        rows = [i for i, g in enumerate(before) if isinstance(g, RowGradient | RowMoves)]
        if not rows:
            return self.update_fn(updates, state, params, **extra_args)
        path = leaf_paths(updates)[rows[0]]
        try:
            updates, state = self.update_fn(updates, state, params, **extra_args)
            after = flatten(updates)[0]
            unchanged = len(after) == len(before) and all(after[i] is before[i] for i in rows)
        except Exception as error:
            raise self._cannot_take(path) from error
        if not unchanged:
            raise self._cannot_take(path)
        return updates, state

    def _cannot_take(self, path: str) -> TypeError:
        return TypeError(
            f"{self!r} cannot take row gradients, and grads[{path!r}] is one: another library's "
            "transform would change its row indices too. Use adamjax's own transform, exclude "
            "this leaf with optax.masked, or pass the leaf's dense gradient (to_dense)"
        )

    def __repr__(self) -> str:
        return f"foreign({getattr(self.update_fn, '__qualname__', self.update_fn)})"


def expect_state(owner: Transform, state: Any, cls: type) -> None:
    """Raises an error if a state is not of the class `cls`, or a count is not an integer scalar.

    Args:
      owner: the transform whose state it should be.
    """
    if not isinstance(state, cls):
        restored = isinstance(state, dict | list)
        raise TypeError(
            f"{type(owner).__name__}: the state is {described(state)}, expected the "
            f"{cls.__name__} that its init or its last update returned"
            + f". {RESTORED_WITHOUT_CLASSES}" * restored
            + _how_to_continue(owner, state, cls) * (not restored)
        )
    for name in COUNTS.intersection(getattr(state, "_fields", ())):
        expect_number(owner, name, getattr(state, name), jnp.integer)


def _how_to_continue(owner: Transform, state: Any, cls: type) -> str:
    """Advice if a state is that of a wrapper around `owner`, or of the transform inside it."""
    if states_of_class(cls, state):
        return _UNWRAP
    if hasattr(owner, "from_dense") and isinstance(state, tuple):
        return (
            ". If it is the state of the transform inside, continue with from_dense(state, params)"
        )
    if not hasattr(state, "inner"):
        return ""
    return _WRAP if hasattr(cls, "inner") else _UNWRAP


def expect_number(owner: Transform, name: str, x: Any, kind: Any) -> None:
    """Refuses a number of a state unless it is a scalar array of the right dtype.

    Args:
      kind: `jnp.integer`, for int32 or int64; or `jnp.floating`, for any float dtype.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        expect_stored(f"{type(owner).__name__}: the state's {name}", x)
    fits = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, kind) and np.shape(x) == ()
    if not fits or (kind is jnp.integer and x.dtype not in (np.int32, np.int64)):
        expected = "int32" if kind is jnp.integer else "float32"
        actual = described(x) if hasattr(x, "dtype") else f"{x!r} of type {type(x).__name__}"
        advice = fault_of_array(x) or (
            f"only moments may be cast. Make it jnp.asarray({name}, jnp.{expected}). If the state "
            "has a leading axis, use jax.vmap"
        )
        raise ValueError(
            f"{type(owner).__name__}: the state's {name} is {actual}, expected {expected}[]: "
            f"{advice}"
        )


def expect_empty(owner: Transform, state: Any) -> None:
    """Refuses any state but `()` and `None`."""
    if not isinstance(state, tuple | None) or state:
        raise TypeError(
            f"{type(owner).__name__}: the state is a {type(state).__name__}, expected (): it has "
            "no state, so this is the state of another transform"
        )


def states_of_parts(owner: Transform, state: Any) -> tuple[Any, ...]:
    """The state of a chain or a partition: a tuple with the state of each part.

    Raises:
      TypeError, ValueError: it is not such a tuple.
    """
    expect_state(owner, state, tuple)
    if hasattr(state, "_fields"):
        raise TypeError(
            f"{type(owner).__name__}: the state is {described(state)}, expected a tuple of the "
            f"states of its {len(owner.parts)} transforms" + _UNWRAP * hasattr(state, "inner")
        )
    if len(state) != len(owner.parts):
        states = ", ".join(
            "()" if isinstance(x, tuple) and not x else type(x).__name__ for x in state
        )
        transforms = ", ".join(type(tx).__name__ for tx in owner.parts)
        raise ValueError(
            f"{type(owner).__name__}: the state has {len(state)} states for {len(owner.parts)} "
            f"transforms: {states} for {transforms}: build the transform as it was, or make a new "
            "state with init"
        )
    return tuple(state)


def short_repr(tx: Any) -> str:
    """The repr of a transform for errors, of at most 200 characters and an ellipsis."""
    text = repr(tx)
    return text if len(text) <= 200 else f"{text[:200]}..."


# For errors about a state of a wrapper that the transform lacks, or the other way round.
_UNWRAP = (
    ". If you removed that wrapper, continue with state.inner (if it was exact_rows, flush first)"
)
_WRAP = (
    ". If this is the state of the transform inside, continue with "
    "tx.init(params)._replace(inner=state)"
)
# For errors about states that may have been read from a checkpoint.
RESTORED_WITHOUT_CLASSES = (
    "A checkpoint that was restored without its classes has dictionaries and lists: restore it "
    "into tx.init(params) of the transform that made it, as the target of your library, or from "
    "its leaves in their order, jax.tree.structure(tx.init(params)).unflatten(leaves)"
)
# The fields of states that count something.
COUNTS = {"count", "micro_count", "skipped", "clock"}


def as_transform(tx: Any) -> Transform:
    """An adamjax transform as it is; any other `(init, update)` pair wrapped as one.

    A pair may also be an object with these methods, such as `optax.MultiSteps`.
    """
    if isinstance(tx, Transform):
        return tx
    try:
        init, update = tx
    except (TypeError, ValueError):
        init = update = None
        if not isinstance(tx, type):
            init, update = getattr(tx, "init", None), getattr(tx, "update", None)
    if not (callable(init) and callable(update)):
        raise TypeError(
            "expected a transform: an adamjax transform or a pair (init, update) of functions "
            f"such as an optax transform; got {tx!r}"
        )
    return foreign(init, update)


# --- base classes whose arithmetic a chain may merge ----------------------------------------------


def _update_uses(method: str, cls: type, base: type) -> bool:
    """Whether the `update` of `cls` uses a method, as the `update` of `base` does.

    It does if the most derived class that defines either of them is not `base` and defines the
    method. A class that overrides only `update` need not use the method.
    """
    most_derived = next(x for x in cls.__mro__ if {method, "update"} & set(vars(x)))
    return most_derived is not base and method in vars(most_derived)


def _scale_array(factor: Any, g: chex.Array) -> tuple[chex.Array]:
    """`factor * g`, in the form of a function for `lift`."""
    return ((factor * widen(g, factor.dtype)).astype(g.dtype),)


class Scaling(Transform):
    """Base class of transforms that multiply each leaf by a scalar.

    A subclass has `init` and `factors`. If `factors` looks at the values of its tree, as a clip
    does, the subclass must also have a property `reads_updates` that is true. Without it, a chain
    may multiply the factors into the rule that comes before this transform, and then `factors`
    does not see the rule's updates.
    """

    keeps_zero = True

    @property
    def has_factors(self) -> bool:
        """Whether `update` multiplies by `factors`; not if a subclass overrides `update`."""
        return _update_uses("factors", type(self), Scaling)

    @property
    def reads_updates(self) -> bool:
        """Whether the factors depend on the updates that they multiply."""
        return False

    def factors(self, tree: Tree, state: Any) -> tuple[Any, Any]:
        """The factors of the leaves, and the next state.

        The factors are one function of a dtype, `lambda real: extend.scalar(2.0, real)`, or a list
        with such a function for each leaf: what `lift` takes as `scalars`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no factors")

    def affine(self, state: Any, params: Tree, leaf: int, real: Any) -> tuple[Any, Any] | None:
        if self.reads_updates or not self.has_factors:
            return None
        if state is None:
            return 1, 0
        factors, _ = self.factors(params, state)
        if not isinstance(factors, list):
            return factors(real), 0
        expect_one_for_each_leaf(type(self).__name__, factors, flatten(params)[0], "params")
        return factors[leaf](real), 0

    def scaled(self, factors: Any, updates: Tree, params: Tree) -> Tree:
        """The updates times their factors."""
        return lift(type(self).__name__, _scale_array, factors, updates, like=params)[0]

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        try:
            factors, state = self.factors(updates, state)
        except ValueError:
            # If the updates have another structure than the parameters, say that instead.
            if params is not None:
                match_leaves(type(self).__name__, "grads", updates, params, "params")
            raise
        return self.scaled(factors, updates, params), state


class Rule(Transform):
    """Base class of rules, which turn gradients into a direction, uphill, element by element.

    A subclass has `init`, and either `update` or `step`. With `step`, a chain multiplies the
    factors of a `Scaling` that follows into the rule's scalars. This saves a multiplication and a
    rounding for each element, and compiles faster.
    """

    groupable = True

    @property
    def has_rule(self) -> bool:
        return True

    @property
    def has_step(self) -> bool:
        """Whether `update` calls `step`, which can take the factors of a scaling that follows."""
        return _update_uses("step", type(self), Rule)

    def step(self, grads: Tree, state: Any, factors: Any) -> Step:
        """The updates multiplied by the factors of a `Scaling`, and the next state.

        Args:
          grads, state: as for `update`.
          factors: what `Scaling.factors` returned; `None` stands for 1. Pass
            `times(scalars, factors)` to `lift` in place of the scalars.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither update nor step")

    def check_rows(self) -> None:
        """Raises an error unless `rows` is "dense" or "lazy". Call this in `__post_init__`."""
        rows: Any = getattr(self, "rows")  # noqa: B009
        if rows not in ("dense", "lazy"):
            raise ValueError(
                f"{type(self).__name__}: rows must be 'dense' or 'lazy', got {rows!r}; for "
                "rows='exact' wrap the whole chain: exact_rows(tx, tables)"
            )

    def coast(self) -> Coast | None:
        """How this rule moves an element without a gradient, as a `Coast`.

        `None`, the default, if the movement does not follow the formula of `Coast`; then
        `exact_rows` refuses the rule. A rule with a `coast` must have a `momentum_coefficient` too.
        """
        return None

    def with_wide_slots(self) -> "Rule":
        """This rule with float32 slots in place of narrower ones.

        `exact_rows` brings slots up to date in float32, takes the step, and then rounds them once.
        """
        return self

    def momentum_coefficient(self, state: Any, real: Any) -> Any:
        """The factor of `m / (x + eps)` in the next step from this state; see `Coast`.

        It is part of the rule's own update, which goes uphill and has no learning rate.

        Args:
          state: the state of the rule before the step.
          real: the dtype of the factor.
        """
        raise NotImplementedError(f"{type(self).__name__} has no momentum_coefficient")

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        return self.step(updates, state, None)


def times(scalars: Callable[[Any], Any], factors: Any) -> Any:
    """A rule's scalars, multiplied by the factors of a `Scaling`; for `Rule.step`.

    What `scalars(real)` returns must have a method `times(factor)`, which returns new scalars. With
    the new scalars, the rule computes the same slots, and its update multiplied by the factor.
    """
    if factors is None:
        return scalars

    def product(factor: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda real: scalars(real).times(factor(real))

    if not isinstance(factors, list):
        return product(factors)
    # Leaves with the same factor must get the same function, because `lift` groups them by it.
    by_id = {id(factor): product(factor) for factor in factors}
    return LeafFactors(by_id[id(factor)] for factor in factors)
