"""The protocol of a transform, and the chain."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax.numpy as jnp

from adamjax.data import Data, Tree, static
from adamjax.leaves import dtype_of, is_arraylike, is_left_alone, lift
from adamjax.moments import accumulator, widen, widened
from adamjax.paths import flatten

__all__ = [
    "Rule",
    "Scaling",
    "Stateless",
    "Step",
    "Transform",
    "as_transform",
    "chain",
    "expect_state",
    "identity",
    "scaled",
    "times",
]


# What an update returns: the updates and the next state.
Step = tuple[Any, Any]


class Transform(Data):
    """A gradient transform: two pure functions, `init` and `update`, and their hyperparameters.

    A subclass is a frozen dataclass and a pytree whose leaves are its hyperparameters. It
    unpacks as the pair `init, update = tx`, works where optax's transforms work, and takes any
    of those in a `chain`.

    Everywhere, a leaf whose gradient is `None`, of dtype float0, integer or boolean is left
    alone: nothing of its state moves, and `apply_updates` does not move its parameter.
    """

    def init(self, params: Tree) -> Any:
        """The state before the first step, for parameters of these shapes and dtypes."""
        raise NotImplementedError(f"{type(self).__name__} has no init")

    def update(self, grads: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        """The updates, in the gradients' structure, shapes and dtypes, and the next state."""
        raise NotImplementedError(f"{type(self).__name__} has no update")

    @property
    def parts(self) -> tuple["Transform", ...]:
        """The transforms that this one is made of."""
        return ()

    def part_states(self, state: Any) -> tuple[Any, ...]:
        """The states of the parts, in their order."""
        return ()

    @property
    def must_be_last(self) -> bool:
        """Whether nothing may follow in a chain."""
        return any(part.must_be_last for part in self.parts)

    @property
    def has_foreign(self) -> bool:
        """Whether a transform from elsewhere is a part of this, at any depth.

        Its state may take on the dtype of what it is given, so that must not be widened.
        """
        return any(part.has_foreign for part in self.parts)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.update))


class Stateless(Transform):
    """Base class of transforms whose state is empty."""

    def init(self, params: Tree) -> tuple[()]:
        return ()


class identity(Stateless):
    """Passes updates through unchanged; its state is empty.

    >>> import adamjax
    >>> adamjax.identity().update({"w": 1.0}, ())
    ({'w': 1.0}, ())
    """

    def update(self, grads: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        return grads, state


class foreign(Transform):
    """A pair of functions from elsewhere, such as an optax transform, as a part of a chain."""

    init_fn: Callable[..., Any] = static()
    update_fn: Callable[..., Any] = static()

    @property
    def has_foreign(self) -> bool:
        return True

    def init(self, params: Tree) -> Any:
        return self.init_fn(params)

    def update(self, grads: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        taken = inspect.signature(self.update_fn).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            extra_args = {name: arg for name, arg in extra_args.items() if name in taken}
        return self.update_fn(grads, state, params, **extra_args)

    def __repr__(self) -> str:
        return f"foreign({getattr(self.update_fn, '__qualname__', self.update_fn)})"


def expect_state(owner: Transform, state: Any, kind: type) -> None:
    """Refuses a state that another transform made."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{type(owner).__name__}: the state is a {type(state).__name__}, expected the "
            f"{kind.__name__} that its init or its last update returned"
        )


def as_transform(tx: Any) -> Transform:
    """A transform of ours as it is; any other `(init, update)` pair wrapped as one."""
    if isinstance(tx, Transform):
        return tx
    try:
        init, update = tx
    except (TypeError, ValueError):
        init = update = None
    if not (callable(init) and callable(update)):
        raise TypeError(
            "expected a transform: an adamjax transform or a pair (init, update) of functions "
            f"such as an optax transform; got {tx!r}"
        )
    return foreign(init, update)


# --- what a chain may join ------------------------------------------------------------------------


def scaled(factor: Any, g: chex.Array) -> tuple[chex.Array]:
    """The rule `factor * g`."""
    return ((factor * widen(g, factor.dtype)).astype(g.dtype),)


class Scaling(Transform):
    """Base class of transforms that multiply each leaf by a scalar."""

    @property
    def reads_updates(self) -> bool:
        """Whether the scalars depend on what they multiply."""
        return False

    def factors(self, tree: Tree, state: Any) -> Step:
        """The factor of every leaf of the tree, as `lift` takes scalars, and the next state."""
        raise NotImplementedError(f"{type(self).__name__} has no factors")

    def scaled(self, factors: Any, updates: Tree, params: Tree) -> Tree:
        """The updates times their factors."""
        return lift(type(self).__name__, scaled, factors, updates, like=params)[0]

    def update(self, grads: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        factors, state = self.factors(grads, state)
        return self.scaled(factors, grads, params), state


class Rule(Transform):
    """Base class of the rules, whose updates end in a factor.

    A chain puts the factors of a scaling that follows into the rule's own: one multiplication
    and one rounding less an element, and less to compile.
    """

    def step(self, grads: Tree, state: Any, factors: Any) -> Step:
        """The update multiplied by the factors of a `Scaling`; `None` stands for 1."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def update(self, grads: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        return self.step(grads, state, None)


def times(scalars: Callable[[Any], Any], factors: Any) -> Any:
    """A rule's scalars, which have `times`, multiplied by the factors of a `Scaling`."""
    if factors is None:
        return scalars

    def product(factor: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda real: scalars(real).times(factor(real))

    if not isinstance(factors, list):
        return product(factors)
    made = {id(factor): product(factor) for factor in factors}
    return [made[id(factor)] for factor in factors]


# --- chain --------------------------------------------------------------------------------------


def _cast(leaf: Any, dtype: Any) -> Any:
    return leaf if dtype is None or is_left_alone(leaf) else jnp.asarray(leaf, dtype)


class chain(Transform):
    """Applies transforms in turn, each to the updates of the one before.

    Between our transforms updates travel in float32 at least, whatever the gradients' dtype,
    and are rounded to the gradients' dtype once, at the end; transforms from elsewhere, and
    `weight_ema`, are given the gradients' own dtype. Chains within a chain are joined to it.
    The state is the tuple of the parts' states. Extra arguments of `update` go to every part
    that takes them.

    Args:
      *transforms: adamjax transforms, or `(init, update)` pairs such as optax's transforms.

    Raises:
      ValueError: `weight_ema` stands anywhere but last, where the weights it would average are
        not those that the step leaves behind.

    >>> import adamjax
    >>> adamjax.chain(adamjax.clip_by_value(1.0), adamjax.scale(-0.1))
    chain(clip_by_value(limit=1.0), scale(factor=-0.1))
    """

    transforms: tuple[Transform, ...]

    def __init__(self, *transforms: Any) -> None:
        self._set(transforms=transforms)
        self.__post_init__()

    def __post_init__(self) -> None:
        parts: list[Transform] = []
        for tx in map(as_transform, self.transforms):
            parts.extend(tx.transforms if isinstance(tx, chain) else (tx,))
        for tx in parts[:-1]:
            if tx.must_be_last:
                raise ValueError(
                    f"chain: {tx!r} must be last, as it averages the weights that the whole "
                    f"step leaves behind; move it behind {parts[-1]!r}"
                )
        self._set(transforms=tuple(parts))

    def init(self, params: Tree) -> tuple[Any, ...]:
        return tuple(tx.init(params) for tx in self.transforms)

    def update(self, grads: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_state(self, state, tuple)
        if len(state) != len(self.transforms):
            raise ValueError(
                f"chain: the state has {len(state)} parts for {len(self.transforms)} "
                f"transforms; was it made by the init of {self!r}?"
            )
        leaves = flatten(grads)[0]
        dtypes = [dtype_of(g) if is_arraylike(g) and not is_left_alone(g) else None for g in leaves]
        wide = [None if d is None else widened(d, accumulator(d)) for d in dtypes]

        def cast(updates: Any, to: list[Any]) -> Any:
            if dtypes == wide:
                return updates
            leaves, treedef = flatten(updates)
            return treedef.unflatten([_cast(x, d) for x, d in zip(leaves, to, strict=True)])

        updates, states, joined = grads, list(state), False
        for i, tx in enumerate(self.transforms):
            behind = self.transforms[i + 1] if i + 1 < len(states) else None
            if joined:
                joined = False
            elif tx.has_foreign or tx.must_be_last:
                # An average of weights is of those that the rounded updates will lead to.
                updates = cast(updates, dtypes)
                updates, states[i] = tx.update(updates, state[i], params, **extra_args)
            elif isinstance(tx, Scaling):
                # Factors are taken from the updates as they are: widened for both, narrow
                # gradients would be kept in the wide dtype from the norm to the product.
                factors, states[i] = tx.factors(updates, state[i])
                updates = tx.scaled(factors, cast(updates, wide), params)
            elif isinstance(tx, Rule) and isinstance(behind, Scaling) and not behind.reads_updates:
                factors, states[i + 1] = behind.factors(updates, state[i + 1])
                updates, states[i] = tx.step(cast(updates, wide), state[i], factors)
                joined = True
            else:
                updates = cast(updates, wide)
                updates, states[i] = tx.update(updates, state[i], params, **extra_args)
        return cast(updates, dtypes), tuple(states)

    @property
    def parts(self) -> tuple[Transform, ...]:
        return self.transforms

    def part_states(self, state: Any) -> tuple[Any, ...]:
        return tuple(state)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.transforms))})"
