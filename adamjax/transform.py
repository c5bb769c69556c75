"""The protocol of a transform, the chain, and the one lift of a rule on arrays to trees."""

import functools
import inspect
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import Data, Tree, static
from adamjax.moments import accumulator, widen, widened
from adamjax.paths import flatten, leaf_paths

__all__ = [
    "Rule",
    "Scaling",
    "Stateless",
    "Step",
    "Transform",
    "apply_updates",
    "as_transform",
    "at_rest",
    "chain",
    "identity",
    "is_left_alone",
    "lift",
    "matched",
    "needed",
    "new_slots",
    "nothing",
    "reduced",
    "scaled",
    "stepped",
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


# --- leaves -------------------------------------------------------------------------------------


def is_left_alone(leaf: Any) -> bool:
    """Whether no transform touches this leaf: `None`, or neither a real nor a complex float."""
    return leaf is None or not jnp.issubdtype(_dtype(leaf), jnp.inexact)


def _dtype(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype != jax.dtypes.float0:
        return jnp.result_type(leaf)  # float64 only under x64
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def at_rest(leaf: Any) -> Any:
    """The update of a leaf that is left alone: zeros where they can be added, else what came."""
    if leaf is None or _dtype(leaf) == jax.dtypes.float0:
        return leaf
    return jnp.zeros_like(leaf)


def _is_arraylike(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)


def _said(leaf: Any) -> str:
    if leaf is None:
        return "None"
    if not _is_arraylike(leaf):
        return f"a {type(leaf).__name__}"
    return f"{_dtype(leaf).name}{list(np.shape(leaf))}"


def _kind(leaf: Any) -> str:
    return "complex" if jnp.issubdtype(_dtype(leaf), jnp.complexfloating) else "real"


def matched(
    owner: str, name: str, tree: Any, like: Any, like_name: str, *, kinds: bool = True
) -> list[Any]:
    """The leaves of `tree` in the order of `like`, or an error that names the first that differs.

    A leaf that is left alone in either matches anything that is left alone. A real leaf does
    not match a complex one where `kinds` count.
    """
    expected, treedef = flatten(like)
    try:
        leaves = treedef.flatten_up_to(tree)
    except ValueError:
        came, wanted = leaf_paths(tree), leaf_paths(like)
        missing = [path for path in wanted if path not in set(came)]
        surplus = [path for path in came if path not in set(wanted)]
        what = (
            f"{name} has no leaf {missing[0]!r}"
            if missing
            else f"{name} has a leaf {surplus[0]!r} that {like_name} does not have"
            if surplus
            else f"{name} is {jax.tree.structure(tree)}, {like_name} {treedef}"
        )
        raise ValueError(
            f"{owner}: {what}: expected the structure of {like_name} "
            "(None stands for a leaf that is not to be updated)"
        ) from None
    for i, (leaf, want) in enumerate(zip(leaves, expected, strict=True)):
        reason = _mismatch(leaf, want, kinds)
        if reason:
            path = leaf_paths(like)[i]
            beside = "" if like is tree else f", but {like_name}[{path!r}] is {_said(want)}"
            raise ValueError(f"{owner}: {name}[{path!r}] is {_said(leaf)}{beside}: {reason}")
    return leaves


def _mismatch(leaf: Any, want: Any, kinds: bool) -> str | None:
    if leaf is None:
        return None
    if not _is_arraylike(leaf):
        return "expected an array"
    if is_left_alone(leaf):
        harmless = want is None or is_left_alone(want) or _dtype(leaf) == jax.dtypes.float0
        return None if harmless else "expected a floating dtype, or None to leave it alone"
    if want is None or is_left_alone(want):
        return "expected None, as there is no floating array to update"
    if np.shape(leaf) != np.shape(want):
        return f"expected shape {np.shape(want)}, got {np.shape(leaf)}"
    if kinds and _kind(leaf) != _kind(want):
        return f"expected a {_kind(want)} dtype, got a {_kind(leaf)} one"
    return None


def new_slots(params: Tree, make: Callable[[chex.Array], chex.Array]) -> Any:
    """A tree of one new array for each floating leaf, `None` for every other."""
    leaves, treedef = flatten(params)
    for i, p in enumerate(leaves):
        if p is not None and not _is_arraylike(p):
            raise TypeError(
                f"params[{leaf_paths(params)[i]!r}] is {_said(p)}: expected an array, or None"
            )
    return treedef.unflatten([None if is_left_alone(p) else make(jnp.asarray(p)) for p in leaves])


def lift(
    owner: str,
    rule: Callable[..., Any],
    scalars: Callable[[Any], Any] | list[Callable[[Any], Any] | None],
    grads: Tree,
    slots: Sequence[Tree] = (),
    params: Tree = None,
    names: tuple[str, str] = ("grads", "the state"),
) -> tuple[Any, ...]:
    """Applies a rule on arrays to every leaf of trees; checks all leaves before the first.

    Args:
      owner: the transform's name, for errors.
      rule: a function `(c, g, *slots, [p]) -> (u, *slots)` of arrays, at the top of a module.
      scalars: gives `c`, the step's scalars, for an accumulator dtype. A list has one a leaf,
        the same object where leaves are treated alike, and None for a leaf that is to pass.
      grads: the tree of gradients.
      slots: state trees with the parameters' structure.
      params: given where the rule reads the parameter.
      names: what errors call `grads` and `slots`.

    Returns:
      The tree of updates, then the new slot trees.
    """
    name, slot_name = names
    if slots:
        like, like_name = slots[0], slot_name
    elif params is not None:
        like, like_name = params, "params"
    else:
        like, like_name = grads, name
    treedef = flatten(like)[1]
    leaves = matched(owner, name, grads, like, like_name)
    # The size of a complex leaf is kept in a real slot.
    columns = [matched(owner, slot_name, slot, like, like_name, kinds=False) for slot in slots]
    reads = [] if params is None else [matched(owner, "params", params, like, like_name)]

    outputs: list[tuple[Any, ...]] = [()] * len(leaves)
    alike: dict[Any, list[tuple[int, list[Any]]]] = {}
    for i, g in enumerate(leaves):
        held = [column[i] for column in columns]
        given = scalars[i] if isinstance(scalars, list) else scalars
        if is_left_alone(g) or (held and is_left_alone(held[0])):
            outputs[i] = (at_rest(g), *held)
        elif given is None:
            outputs[i] = (g, *held)
        else:
            arrays = [jnp.asarray(x) for x in (g, *held, *(column[i] for column in reads))]
            key = (given, *((x.shape, x.dtype) for x in arrays))
            alike.setdefault(key, []).append((i, arrays))

    ready: dict[Any, Any] = {}
    for (given, *avals), group in alike.items():
        real = accumulator(*(dtype for _, dtype in avals[: 1 + len(slots)]))
        if (given, real) not in ready:
            ready[given, real] = c = given(real)
            if any(np.ndim(x) for x in jax.tree.leaves(c)):
                raise ValueError(
                    f"{owner}: a hyperparameter is an array of shape "
                    f"{next(np.shape(x) for x in jax.tree.leaves(c) if np.ndim(x))}, expected a "
                    "scalar; to use many values at once, map over the transform with jax.vmap"
                )
        for start in range(0, len(group), _BLOCK):
            block = group[start : start + _BLOCK]
            results = _each(rule, ready[given, real], [arrays for _, arrays in block])
            for (i, _), result in zip(block, results, strict=True):
                outputs[i] = result
    return tuple(treedef.unflatten([out[j] for out in outputs]) for j in range(1 + len(slots)))


# A call costs about as much to trace and lower as ten operations inside of it, and a model has
# many leaves of few shapes: so leaves of one shape go through a rule in blocks, and each size of
# block is traced and lowered once. XLA inlines the calls.
_BLOCK = 8


@functools.partial(jax.jit, static_argnums=0)
def _each(rule: Callable[..., Any], c: Any, block: list[list[chex.Array]]) -> list[Any]:
    return [tuple(rule(c, *arrays)) for arrays in block]


def needed(owner: str, params: Tree) -> Tree:
    """The parameters, or an error that says that this transform reads them."""
    if params is None:
        raise ValueError(f"{owner} reads the parameters: call update(grads, state, params)")
    return params


def reduced(
    owner: str,
    rule: Callable[..., Any],
    join: Callable[[Any, Any], Any],
    tree: Tree,
    empty: chex.Array,
) -> chex.Array:
    """What a rule `(None, g) -> (scalar,)` gives for the leaves of a tree, joined into one."""
    (scalars,) = lift(owner, rule, nothing, tree, names=("the tree", ""))
    pairs = zip(flatten(tree)[0], flatten(scalars)[0], strict=True)
    found = [x for leaf, x in pairs if not is_left_alone(leaf)]
    while len(found) > 1:
        found = [_joined(join, found[i : i + _BLOCK]) for i in range(0, len(found), _BLOCK)]
    return found[0] if found else empty


@functools.partial(jax.jit, static_argnums=0)
def _joined(join: Callable[[Any, Any], Any], block: list[chex.Array]) -> chex.Array:
    return functools.reduce(join, block)


def stepped(p: chex.Array, u: chex.Array) -> chex.Array:
    """The parameter after its update: added in float32 at least, rounded once to its own dtype."""
    real = accumulator(p.dtype, u.dtype)
    return (widen(p, real) + widen(u, real)).astype(p.dtype)


def _moved(c: None, u: chex.Array, p: chex.Array) -> tuple[chex.Array, chex.Array]:
    return u, stepped(p, u)


def nothing(real: Any) -> None:
    """The scalars of a rule that needs none."""
    return None


def apply_updates(params: Tree, updates: Tree) -> Any:
    """The parameters moved by their updates: `p + u`, in the dtypes of the parameters.

    Args:
      params: tree of arrays; integer and boolean leaves and `None` are returned as they are.
      updates: tree of the same structure and shapes; `None` where a parameter is to stay.

    Returns:
      The new parameters. Sums are taken in the wider dtype of the two and rounded once.

    Raises:
      ValueError: the structure or a shape differs; the message names the leaf.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.apply_updates({"n": 3, "w": jnp.ones(2)}, {"n": None, "w": jnp.ones(2)})
    {'n': 3, 'w': Array([2., 2.], dtype=float32)}
    """
    names = ("updates", "params")
    return lift("apply_updates", _moved, nothing, updates, slots=(params,), names=names)[1]


# --- what a chain may join ------------------------------------------------------------------------


def scaled(factor: Any, g: chex.Array) -> tuple[chex.Array]:
    """The rule `factor * g`."""
    return ((factor * widen(g, factor.dtype)).astype(g.dtype),)


class Scaling(Transform):
    """Base class of transforms that multiply each leaf by a scalar, whatever the updates are."""

    def factors(self, tree: Tree, state: Any) -> Step:
        """The factor of every leaf of the tree, as `lift` takes scalars, and the next state."""
        raise NotImplementedError(f"{type(self).__name__} has no factors")

    def update(self, grads: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        factors, state = self.factors(grads, state)
        (updates,) = lift(type(self).__name__, scaled, factors, grads)
        return updates, state


class Rule(Transform):
    """Base class of the rules, whose updates end in a factor.

    A chain puts the factors of a scaling that follows into the rule's own: one multiplication
    and one rounding less an element, and an eighth less to compile.
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
        if len(state) != len(self.transforms):
            raise ValueError(
                f"chain: the state has {len(state)} parts for {len(self.transforms)} "
                f"transforms; was it made by the init of {self!r}?"
            )
        leaves = flatten(grads)[0]
        dtypes = [_dtype(g) if _is_arraylike(g) and not is_left_alone(g) else None for g in leaves]
        wide = [None if d is None else widened(d, accumulator(d)) for d in dtypes]

        def cast(updates: Any, to: list[Any]) -> Any:
            if dtypes == wide:
                return updates
            leaves, treedef = flatten(updates)
            return treedef.unflatten([_cast(x, d) for x, d in zip(leaves, to, strict=True)])

        updates, states, joined = grads, list(state), False
        for i, tx in enumerate(self.transforms):
            if joined:
                joined = False
                continue
            # An average of weights is of those that the rounded updates will lead to.
            own = tx.has_foreign or tx.must_be_last
            updates = cast(updates, dtypes if own else wide)
            behind = self.transforms[i + 1] if i + 1 < len(states) else None
            if isinstance(tx, Rule) and isinstance(behind, Scaling):
                factors, states[i + 1] = behind.factors(updates, state[i + 1])
                updates, states[i] = tx.step(updates, state[i], factors)
                joined = True
            else:
                updates, states[i] = tx.update(updates, state[i], params, **extra_args)
        return cast(updates, dtypes), tuple(states)

    @property
    def parts(self) -> tuple[Transform, ...]:
        return self.transforms

    def part_states(self, state: Any) -> tuple[Any, ...]:
        return tuple(state)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.transforms))})"
