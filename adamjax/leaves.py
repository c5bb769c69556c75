"""Matches and checks the leaves of trees, and applies a rule on arrays to each leaf."""

import contextlib
import contextvars
import functools
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import Tree
from adamjax.encoding import SCALED8, Scaled8, expect_encoded, references_for_slot
from adamjax.layout import laid_out_like
from adamjax.mesh import split_alike
from adamjax.moments import (
    WrongResultError,
    add_update,
    checked_results,
    compute_dtype,
    expect_scalar,
    is_signed,
)
from adamjax.numpy_arrays import NUMPY_TYPES, expect_jax_array, fault_of_array, native, numpy_form
from adamjax.paths import flatten, leaf_paths
from adamjax.rounding import is_narrow, rounding_keys
from adamjax.rows import (
    RowGradient,
    RowMoves,
    apply_rule_to_rows,
    check_sound,
    run_rule,
    with_seal,
    without_seal,
)

__all__ = [
    "LeafFactors",
    "Rows",
    "apply_updates",
    "as_arrays",
    "described",
    "dtype_of",
    "expect_array",
    "expect_arrays",
    "expect_dtypes",
    "expect_like",
    "expect_no_shapes",
    "expect_one_for_each_leaf",
    "expect_stored",
    "expect_wide",
    "is_arraylike",
    "is_left_alone",
    "joined_leaves",
    "lift",
    "match_leaves",
    "needed",
    "new_slots",
    "no_scalars",
    "reduce_leaves",
    "rounds_stochastically",
    "zero_update",
]


T = TypeVar("T")

# `jnp.issubdtype` with a cache: a step checks many leaves, which have few dtypes.
_is_kind = functools.cache(jnp.issubdtype)

# What a rule does to the rows of a table that are not in its row gradient; see `lift`.
Rows = Literal["dense", "lazy", "whole"]


def is_left_alone(leaf: Any) -> bool:
    """Whether no transform touches this leaf: `None`, or neither a real nor a complex float."""
    return leaf is None or not _is_kind(dtype_of(leaf), jnp.inexact)


def expect_dtypes(owner: str, name: str, tree: Tree) -> None:
    """Refuses a tree with a NumPy array that JAX cannot take, by its dtype or its mask."""
    for i, x in enumerate(flatten(tree)[0]):
        if fault_of_array(x):
            expect_jax_array(f"{owner}: {name}[{leaf_paths(tree)[i]!r}]", x)


def dtype_of(leaf: Any) -> Any:
    """The dtype that a leaf has in JAX; raises if JAX cannot take it."""
    # JAX arrays come first, because a step asks for the dtypes of thousands of them.
    if not isinstance(leaf, NUMPY_TYPES):
        return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    expect_jax_array("an array", leaf)
    if leaf.dtype == jax.dtypes.float0:
        return leaf.dtype
    return jnp.result_type(leaf)  # float64 only under x64


def zero_update(leaf: Any) -> Any:
    """The update of a leaf that is left alone: zeros, or the leaf if it is `None` or of float0."""
    if leaf is None or dtype_of(leaf) == jax.dtypes.float0:
        return leaf
    is_rows = isinstance(leaf, RowGradient | RowMoves)
    return leaf.emptied() if is_rows else jnp.zeros_like(leaf)


def is_arraylike(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)


def described(leaf: Any) -> str:
    """A short description of a leaf for errors: `float32[3, 2]`."""
    if leaf is None:
        return "None"
    if not is_arraylike(leaf):
        name = type(leaf).__name__
        return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
    if fault_of_array(leaf):
        return numpy_form(leaf)
    if isinstance(leaf, Scaled8):
        return f"{SCALED8}{list(leaf.shape)}"
    rows = "rows of " if isinstance(leaf, RowGradient | RowMoves) else ""
    return f"{rows}{dtype_of(leaf).name}{list(np.shape(leaf))}"


def as_arrays(tree: Tree) -> Any:
    """The tree with JAX arrays in place of NumPy's."""

    def as_array(x: Any) -> Any:
        if isinstance(x, RowGradient):
            # The seal stays a NumPy array, so its value is known while tracing.
            return jax.tree.map(as_array, x.replace(seal=None)).replace(seal=x.seal)
        if not isinstance(x, NUMPY_TYPES):
            return x
        expect_jax_array("an array", x)
        return jnp.asarray(x)

    return jax.tree.map(as_array, tree, is_leaf=lambda x: isinstance(x, RowGradient))


def _is_number_or_shape(x: Any) -> bool:
    """Whether a leaf only looks like an array: a Python number or a `ShapeDtypeStruct`."""
    is_number = isinstance(x, numbers.Number) and not hasattr(x, "dtype")
    return is_number or isinstance(x, jax.ShapeDtypeStruct)


def expect_stored(what: str, x: Any, expected: str = "an array") -> None:
    """Refuses a leaf of a state that is not an array, such as a Python number or a shape."""
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{what} is the shape {described(x)}, expected {expected}: this state has shapes in "
            "place of arrays, as jax.eval_shape(tx.init, params) returns it for a restore: pass "
            "the restored state"
        )
    if not hasattr(x, "dtype"):
        found = f"a Python {type(x).__name__}" if _is_number_or_shape(x) else described(x)
        raise TypeError(
            f"{what} is {found}, expected {expected}: restore it from the checkpoint (make arrays "
            "of the numbers and lists of a JSON file), or make a new state with init"
        )


def expect_no_shapes(owner: str, name: str, tree: Tree) -> None:
    """Refuses a state with shapes in place of arrays."""
    for i, x in enumerate(flatten(tree)[0]):
        if isinstance(x, jax.ShapeDtypeStruct):
            expect_stored(f"{owner}: {name}[{leaf_paths(tree)[i]!r}]", x)


def expect_array(
    what: str, x: Any, shape: tuple[int, ...], advice: str, dtype: str | None = None
) -> None:
    """Refuses anything but an array of this shape, and of this dtype if one is given."""
    if _is_number_or_shape(x) and not isinstance(x, jax.ShapeDtypeStruct):
        expect_stored(what, x, f"{dtype or 'an array of shape '}{list(shape)}")
    is_array = is_arraylike(x) and fault_of_array(x) is None
    if is_array and np.shape(x) == shape and dtype in (None, dtype_of(x).name):
        return
    expected = f"{dtype or 'shape '}{list(shape)}"
    raise ValueError(f"{what} is {described(x)}, expected {expected}: {advice}")


def _missing_and_surplus(paths: list[str], expected: list[str]) -> tuple[list[str], list[str]]:
    """The expected paths that `paths` lacks, and the paths that are not expected."""
    missing = [path for path in expected if path not in set(paths)]
    surplus = [path for path in paths if path not in set(expected)]
    return missing, surplus


def expect_like(owner: str, name: str, tree: Tree, like: Tree, advice: str) -> None:
    """Refuses a tree whose leaves, shapes or dtypes differ from those of `like`."""
    paths, expected = leaf_paths(tree), leaf_paths(like)
    if paths != expected:
        missing, surplus = _missing_and_surplus(paths, expected)
        # If no path is missing or surplus, the paths are in another order.
        what = f"has no {missing[0]!r}" if missing else f"has {surplus or paths}, not expected"
        raise ValueError(f"{owner}: {name} {what}: {advice}")
    for path, x, y in zip(paths, flatten(tree)[0], flatten(like)[0], strict=True):
        if _is_number_or_shape(x):
            expect_stored(f"{owner}: {name}[{path!r}]", x, described(y))
        if x is None or y is None or not is_arraylike(x):
            same = x is y  # both None, or the same object
        else:
            same = (np.shape(x), dtype_of(x)) == (np.shape(y), dtype_of(y))
        if not same:
            raise ValueError(
                f"{owner}: {name}[{path!r}] is {described(x)}, expected {described(y)}: {advice}"
            )


def expect_wide(owner: str, name: str, tree: Tree, dtype: str | None = None) -> None:
    """Raises an error if slots were cast to fewer bits.

    An average of small changes stands still if each step rounds it to a narrow dtype.

    Args:
      owner: the transform's name, for errors.
      name: the slot's name in the state.
      tree: the slot.
      dtype: the name of its dtype; `None` for float32 or wider.
    """
    expect_dtypes(owner, f"the state's {name}", tree)
    expected = dtype if dtype in (None, SCALED8) else jax.dtypes.canonicalize_dtype(dtype)
    for i, x in enumerate(flatten(tree)[0]):
        if x is None:
            continue
        if _is_number_or_shape(x) or not is_arraylike(x):
            expect_stored(f"{owner}: the state's {name}[{leaf_paths(tree)[i]!r}]", x)
        if isinstance(x, Scaled8):
            expect_encoded(f"{owner}: the state's {name}", x)
        # For a complex parameter a slot may be complex, whatever dtype the rule was given.
        is_free = dtype is not None and _is_kind(dtype_of(x), jnp.complexfloating)
        if not is_free and not is_left_alone(x):
            _expect_slot_dtype(owner, name, x, expected)


def _expect_slot_dtype(owner: str, name: str, slot: Any, expected: Any) -> None:
    """Refuses a slot of another dtype than `expected`; `None` means float32 or wider."""
    is_encoded = isinstance(slot, Scaled8)
    expects_encoded = isinstance(expected, str)
    if is_encoded != expects_encoded:
        actual, wanted = (SCALED8, "floats") if is_encoded else ("floats", SCALED8)
        raise ValueError(
            f"{owner}: the state keeps {name} in {actual}, expected {wanted}: build the "
            f"transform as it was ({name}_dtype), or start from init"
        )
    if is_encoded:
        return
    if expected is None:
        fits, wanted = jnp.finfo(slot.dtype).bits >= 32, "float32 or wider"
    else:
        fits, wanted = slot.dtype == expected, expected.name
    if not fits:
        raise ValueError(
            f"{owner}: the state keeps {name} in {slot.dtype.name}, expected {wanted}: cast it to "
            f"that, or, to go on in {slot.dtype.name}, build the transform for it ({name}_dtype)"
        )


def _kind(leaf: Any) -> str:
    return "complex" if _is_kind(dtype_of(leaf), jnp.complexfloating) else "real"


def match_leaves(
    owner: str,
    name: str,
    tree: Any,
    like: Any,
    like_name: str,
    *,
    kinds: bool = True,
    grads: list[Any] | None = None,
) -> list[Any]:
    """The leaves of `tree` in the order of `like`; an error names the first that does not match.

    A leaf that is left alone matches any other that is left alone. With `kinds`, a real leaf does
    not match a complex one. A leaf whose gradient in `grads` is `None` is not checked.
    """
    expected, treedef = flatten(like)
    try:
        leaves = treedef.flatten_up_to(tree)
    except ValueError:
        missing, surplus = _missing_and_surplus(leaf_paths(tree), leaf_paths(like))
        advice = "(None stands for a leaf that is not to be updated)"
        if missing:
            what = f"{name} has no leaf {missing[0]!r}"
        elif surplus:
            what = f"{name} has a leaf {surplus[0]!r} that {like_name} does not have"
            if like_name == "the state":
                advice = "(if the parameters have a new leaf, init makes a state with it)"
        else:
            what = f"{name} is {jax.tree.structure(tree)}, {like_name} {treedef}"
        raise ValueError(
            f"{owner}: {what}: expected the structure of {like_name} {advice}"
        ) from None
    for i, (leaf, expected_leaf) in enumerate(zip(leaves, expected, strict=True)):
        if grads is not None and grads[i] is None:
            continue
        reason = _mismatch(leaf, expected_leaf, kinds)
        if reason:
            path, wanted = leaf_paths(like)[i], described(expected_leaf)
            other = "" if like is tree else f", but {like_name}[{path!r}] is {wanted}"
            raise ValueError(f"{owner}: {name}[{path!r}] is {described(leaf)}{other}: {reason}")
    return leaves


def _mismatch(leaf: Any, expected: Any, kinds: bool) -> str | None:
    """Why a leaf does not match the expected one; `None` if it does."""
    if leaf is None:
        return None
    # The most frequent case comes first, because a step checks thousands of leaves.
    if isinstance(leaf, jax.Array) and isinstance(expected, jax.Array):
        dtype = leaf.dtype
        if dtype == expected.dtype and leaf.shape == expected.shape and is_signed(dtype):
            return None
    if not is_arraylike(leaf):
        return "expected an array"
    fault = fault_of_array(leaf) or fault_of_array(expected)
    if fault:
        return fault
    if expected is not None and not is_arraylike(expected):
        return "expected arrays in both trees"
    if is_left_alone(leaf):
        ignored = expected is None or is_left_alone(expected) or dtype_of(leaf) == jax.dtypes.float0
        return None if ignored else "expected a floating dtype, or None to leave it alone"
    if expected is None or is_left_alone(expected):
        return "expected None, as there is no floating array to update"
    if not is_signed(dtype_of(leaf)):
        return "expected a dtype that has zero and negative numbers"
    if np.shape(leaf) != np.shape(expected):
        return f"expected shape {np.shape(expected)}, got {np.shape(leaf)}"
    if kinds and _kind(leaf) != _kind(expected):
        return f"expected a {_kind(expected)} dtype, got a {_kind(leaf)} one"
    return None


def expect_arrays(owner: str, params: Tree) -> None:
    """Refuses parameters with a leaf that is not an array, such as a whole model with functions."""
    expect_dtypes(owner, "params", params)
    for i, p in enumerate(flatten(params)[0]):
        if p is not None and not is_arraylike(p):
            name = f" ({p.__name__})" if hasattr(p, "__name__") else ""
            raise TypeError(
                f"{owner}: params[{leaf_paths(params)[i]!r}] is {described(p)}{name}: expected an "
                "array, or None. Give only the arrays of a model: for Equinox "
                "eqx.filter(model, eqx.is_inexact_array), for Flax NNX "
                "nnx.state(model, nnx.Param)"
            )
        if not is_left_alone(p) and not is_signed(dtype_of(p)):
            raise TypeError(
                f"{owner}: params[{leaf_paths(params)[i]!r}] is {described(p)}: expected a dtype "
                "that has zero and negative numbers"
            )


def new_slots(params: Tree, make: Callable[[chex.Array], chex.Array]) -> Any:
    """A tree with a new array for each floating leaf, and `None` for the other leaves.

    `make(p)` returns the new array for a parameter p. The array then gets the memory layout and the
    sharding of p.
    """
    expect_arrays("init", params)
    leaves, treedef = flatten(params)

    def new_slot(p: Any) -> Any:
        if is_left_alone(p):
            return None
        if isinstance(p, jax.ShapeDtypeStruct):
            return make(p)
        p = jnp.asarray(p)
        slot = make(p)
        if isinstance(slot, Scaled8):
            # The exponents have another shape than the parameter.
            return slot._replace(codes=laid_out_like(slot.codes, p))
        return laid_out_like(slot, p)

    slots = list(map(new_slot, leaves))

    def reference_of(slot: Any, p: Any) -> Any:
        if slot is None:
            return None
        return references_for_slot(p) if isinstance(slot, Scaled8) else p

    # An encoded slot is two arrays, so flatten the slots to their arrays.
    structure: Any = jax.tree.structure(slots)
    arrays = jax.tree.leaves(slots)
    references = structure.flatten_up_to(list(map(reference_of, slots, leaves)))
    return treedef.unflatten(structure.unflatten(split_alike(arrays, references)))


class _Leaf(NamedTuple):
    """A leaf that a rule is applied to: its position in the tree, and its g, *slots, [p]."""

    position: int
    inputs: list[Any]


# A model has many leaves of few shapes. Tracing and lowering a call costs about as much as ten
# operations inside it. So a call applies a rule to several leaves of one shape, and is traced and
# lowered once for each number of leaves. XLA inlines the calls.
_LEAVES_PER_CALL = 8


def lift(
    owner: str,
    rule: Callable[..., Any],
    scalars: Callable[[Any], Any] | list[Callable[[Any], Any] | None],
    grads: Tree,
    slots: Sequence[Tree] = (),
    params: Tree = None,
    like: Tree = None,
    names: tuple[str, str] = ("grads", "the state"),
    rows: Rows = "dense",
    count: chex.Array | None = None,
) -> tuple[Any, ...]:
    """Applies a function of arrays to every leaf of trees, after it has checked all leaves.

    The function must be elementwise, because it is applied to the rows of a `RowGradient`. If it is
    not, pass `rows="whole"`.

    Args:
      owner: the transform's name, for errors.
      rule: the function, `(c, g, *slots, [p]) -> (u, *slots)`. Define it at the top of a module:
        if each step made a new function, `jit` would compile again in each step.
      scalars: a function of a compute dtype that returns `c`, the step's scalars. Or a list
        with one such function for each leaf: the same object for leaves that are treated alike,
        None for a leaf that passes unchanged.
      grads: the tree of gradients.
      slots: state trees with the parameters' structure. For a complex leaf, the first slot is
        complex; others may be real.
      params: the parameters, if the function reads them.
      like: the parameters, used only to refuse gradients of another structure or of other shapes.
        Pass it if the function has no slots and does not read the parameters.
      names: the names of `grads` and `slots` in errors.
      rows: "dense": the rows that are not in a `RowGradient` have a gradient of zero; "lazy": they
        are left alone; "whole": the function is not elementwise and takes a `RowGradient` as it is.
      count: int32, the number of steps taken before. It seeds the stochastic rounding of slots in
        bfloat16. Without it they are rounded to the nearest.

    Returns:
      The tree of updates, then the new slot trees.

    Raises:
      TypeError: `scalars` is no function, or the function returned something else than arrays of
        the expected shapes.
      ValueError: trees do not fit each other, a list of scalars has another length than the leaves,
        or it is given for a rule whose leaves `grouped` or `exact_rows` has joined.
    """
    _expect_options(owner, scalars, rows)
    name, slot_name = names
    if slots:
        like, like_name = slots[0], slot_name
    elif params is not None or like is not None:
        like, like_name = like if params is None else params, "params"
    else:
        like, like_name = grads, name
    treedef = flatten(like)[1]
    leaves = match_leaves(owner, name, grads, like, like_name)
    if isinstance(scalars, list):
        expect_one_for_each_leaf(owner, scalars, leaves, like_name)
        if slots and _leaves_are_joined.get() and not isinstance(scalars, LeafFactors):
            raise ValueError(
                f"{owner}: scalars is a list with a function for each leaf, but grouped or "
                "exact_rows has joined leaves, which no longer have their own paths: set "
                "groupable = False in the transform"
            )
    # Kinds may differ: a rule stores the size of a complex gradient in a real slot.
    columns = [
        match_leaves(owner, slot_name, slot, like, like_name, kinds=False, grads=leaves)
        for slot in slots
    ]
    slots_of_leaves = [[column[i] for column in columns] for i in range(len(leaves))]
    for i, (g, own) in enumerate(zip(leaves, slots_of_leaves, strict=True)):
        if g is not None and any(x is None for x in own) and any(x is not None for x in own):
            raise ValueError(
                f"{owner}: {slot_name} has only some of the slots of "
                f"{leaf_paths(like)[i]!r}: expected an array in each of its trees"
            )
    param_columns = (
        []
        if params is None
        else [match_leaves(owner, "params", params, like, like_name, grads=leaves)]
    )

    outputs: list[tuple[Any, ...]] = [()] * len(leaves)
    # The leaves that the rule is applied to, grouped by their scalars, shapes and dtypes.
    alike: dict[Any, list[_Leaf]] = {}
    for i, (g, own) in enumerate(zip(leaves, slots_of_leaves, strict=True)):
        own_scalars = scalars[i] if isinstance(scalars, list) else scalars
        if is_left_alone(g) or (own and is_left_alone(own[0])):
            outputs[i] = (zero_update(g), *own)
        elif own_scalars is None:
            outputs[i] = (g, *own)
        else:
            inputs = [
                _input_without_seal(owner, x)
                for x in (g, *own, *(column[i] for column in param_columns))
            ]
            arrays, structure = jax.tree.flatten(inputs)
            key = (own_scalars, structure, *((x.shape, x.dtype) for x in arrays))
            alike.setdefault(key, []).append(_Leaf(i, inputs))

    scalars_of_dtype: dict[Any, Any] = {}
    for (own_scalars, *_), group in alike.items():
        g, *group_slots = group[0].inputs[: 1 + len(slots)]
        real = compute_dtype(g.dtype, *(x.dtype for x in group_slots))
        if (own_scalars, real) not in scalars_of_dtype:
            scalars_of_dtype[own_scalars, real] = _checked_scalars(owner, own_scalars(real))
        c = scalars_of_dtype[own_scalars, real]
        has_narrow_slots = any(map(is_narrow, group_slots))
        for start in range(0, len(group), _LEAVES_PER_CALL):
            call = group[start : start + _LEAVES_PER_CALL]
            keys = None
            if has_narrow_slots and count is not None:
                keys = rounding_keys(count, [leaf.position for leaf in call])
            inputs_of_call = [leaf.inputs for leaf in call]
            try:
                results = _apply_each(rule, rows, len(slots), c, keys, inputs_of_call)
            except WrongResultError as error:
                path = leaf_paths(like)[call[0].position]
                raise TypeError(f"{owner}: {error}; in {name}[{path!r}]") from None
            for leaf, (u, *new_slots_of_leaf) in zip(call, results, strict=True):
                outputs[leaf.position] = (with_seal(u), *new_slots_of_leaf)
    return tuple(treedef.unflatten([out[j] for out in outputs]) for j in range(1 + len(slots)))


def _expect_options(owner: str, scalars: Any, rows: Any) -> None:
    """Refuses wrong values of the arguments `scalars` and `rows` of `lift`."""
    if rows not in get_args(Rows):
        raise ValueError(f"{owner}: rows is {rows!r}, expected 'dense' or 'lazy'")
    for function in scalars if isinstance(scalars, list) else [scalars]:
        if function is not None and not callable(function):
            raise TypeError(
                f"{owner}: scalars has {function!r:.100}, expected a function of a dtype that "
                "returns the scalars, or a list with such a function for each leaf"
            )


class LeafFactors(list[Any]):
    """A list of scalars, one for each leaf, that is right for joined leaves too.

    It is made of the factors of transforms that treat the joined leaves alike.
    """


_leaves_are_joined = contextvars.ContextVar("leaves_are_joined", default=False)


@contextlib.contextmanager
def joined_leaves(are_joined: bool) -> Iterator[None]:
    """In this context, `lift` gets several leaves joined in one array, if `are_joined`."""
    token = _leaves_are_joined.set(are_joined)
    try:
        yield
    finally:
        _leaves_are_joined.reset(token)


def expect_one_for_each_leaf(
    owner: str, scalars: Sequence[Any], leaves: Sequence[Any], name: str
) -> None:
    """Refuses a list of functions for scalars that has another length than the leaves of a tree."""
    if len(scalars) != len(leaves):
        raise ValueError(
            f"{owner}: scalars is a list of {len(scalars)} functions, expected one for each of the "
            f"{len(leaves)} leaves of {name} (None and integer leaves count as well)"
        )


def _checked_scalars(owner: str, c: Any) -> Any:
    for x in jax.tree.leaves(c):
        expect_scalar(f"{owner}: a hyperparameter", x)
    return c


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _apply_each(
    rule: Callable[..., Any],
    rows: Rows,
    num_slots: int,
    c: Any,
    keys: Any,
    inputs_of_leaves: list[list[Any]],
) -> list[Any]:
    """The results of a rule for some leaves of one shape."""

    def result(key: Any, g: Any, *arrays: chex.Array) -> tuple[Any, ...]:
        if rows == "whole":
            keyed = {} if key is None else {"key": key}
            results = rule(c, g, *arrays, **keyed)
            # The update may be a scalar for the whole leaf, or a row gradient.
            shapes = [None] * (1 + num_slots)
            what = "the update and the new slots"
            return tuple(map(without_seal, checked_results(rule, results, shapes, what)))
        if isinstance(g, RowGradient):
            return apply_rule_to_rows(
                rule, c, rows == "lazy", g, arrays[:num_slots], arrays[num_slots:], key
            )
        return run_rule(rule, c, g, arrays[:num_slots], arrays[num_slots:], key)

    return [
        result(None if keys is None else keys[i], *inputs)
        for i, inputs in enumerate(inputs_of_leaves)
    ]


def _input_without_seal(owner: str, leaf: Any) -> Any:
    """An input of a rule as arrays. Row gradients are checked, and lose their seal."""
    if isinstance(leaf, RowMoves):
        # Only `apply_updates` accepts `RowMoves`.
        if owner == "apply_updates":
            return without_seal(leaf.checked(owner))
        raise TypeError(
            f"{owner}: apply the updates of exact_rows as they are, because they also bring rows "
            "up to date: put exact_rows last, around every transform that changes updates"
        )
    if isinstance(leaf, Scaled8):
        return leaf
    if not isinstance(leaf, RowGradient):
        return jnp.asarray(leaf)
    return without_seal(check_sound(owner, leaf))


def needed(owner: str, params: Tree) -> Tree:
    """The parameters, or an error that names the transform `owner` if they are `None`."""
    if params is None:
        raise ValueError(f"{owner} reads the parameters: call update(grads, state, params)")
    return params


def reduce_leaves(
    owner: str,
    rule: Callable[..., Any],
    join: Callable[[Any, Any], Any],
    tree: Tree,
    empty: chex.Array,
) -> chex.Array:
    """Applies a rule `(None, g) -> (scalar,)` to the leaves of a tree, and joins the scalars.

    The rule takes a `RowGradient` as it is. `join` takes two scalars. `empty` is the result for a
    tree without leaves.
    """
    (results,) = lift(owner, rule, no_scalars, tree, names=("the tree", ""), rows="whole")
    pairs = zip(flatten(tree)[0], flatten(results)[0], strict=True)
    scalars = [x for leaf, x in pairs if not is_left_alone(leaf)]
    while len(scalars) > 1:
        starts = range(0, len(scalars), _LEAVES_PER_CALL)
        scalars = [_joined(join, scalars[i : i + _LEAVES_PER_CALL]) for i in starts]
    return scalars[0] if scalars else empty


@functools.partial(jax.jit, static_argnums=0)
def _joined(join: Callable[[Any, Any], Any], scalars: list[chex.Array]) -> chex.Array:
    return functools.reduce(join, scalars)


def _apply_update(c: None, u: Any, p: chex.Array, key: Any = None) -> tuple[Any, chex.Array]:
    """A rule whose slot is the parameter: the update as it is, and the parameter moved by it."""
    if not isinstance(u, RowGradient | RowMoves):
        return u, add_update(p, u, key)
    return u, p + u if key is None else u.added_to(p, key)


def no_scalars(real: Any) -> None:
    """The scalars of a rule that has none."""
    return None


def apply_updates(
    params: T,
    updates: Tree,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    step: Any = None,
) -> T:
    """The parameters moved by their updates: `p + u`, in the dtypes of the parameters.

    The neighbours of a bfloat16 weight of 1 are 0.996 and 1.008. So an update of 0.001 has no
    effect on it if the sum is rounded to the nearest. With `rounding="stochastic"` bfloat16 weights
    are rounded up or down at random so that the expected value is right; float32 weights are not
    affected.

    Args:
      params: tree of arrays; integer and boolean leaves and `None` are returned as they are.
      updates: tree of the same structure and shapes; `None` for a parameter that stays.
      rounding: "nearest" or "stochastic".
      step: for stochastic rounding an integer scalar that differs from step to step, such as
        `adamjax.step_count(state)`. The random bits are derived from it, modulo 2**32. `step_count`
        reads the count of the first rule. If `skip_not_finite` or `accumulate_gradients` is around
        that rule but not around all parts, other parts move weights while this count stands still.
        Then count the steps yourself. (`train_step` derives the bits from all counts in the state.)

    Returns:
      The new parameters. Each sum is computed in float32 or wider and rounded once.

    Raises:
      ValueError: the structure or a shape differs; the error names the leaf. `step` is missing for
        stochastic rounding, or given for rounding to the nearest. A float16 or float8 weight is to
        be rounded stochastically.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.apply_updates({"n": 3, "w": jnp.ones(2)}, {"n": None, "w": jnp.ones(2)})
    {'n': 3, 'w': Array([2., 2.], dtype=float32)}
    """
    return lift(
        "apply_updates",
        _apply_update,
        no_scalars,
        updates,
        slots=(params,),
        names=("updates", "params"),
        rows="whole",
        count=_rounding_step(params, rounding, step),
    )[1]


def rounds_stochastically(owner: str, rounding: str, params: Tree) -> bool:
    """Whether weights are rounded stochastically, by the checked option `rounding`.

    Refuses stochastic rounding of narrow weights that are not bfloat16: those would be rounded to
    the nearest.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{owner}: rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    if rounding == "nearest":
        return False
    for path, p in zip(leaf_paths(params), flatten(params)[0], strict=True):
        dtype = None if is_left_alone(p) else np.dtype(dtype_of(p))
        if dtype is not None and dtype.itemsize <= 2 and dtype != jnp.bfloat16:
            raise ValueError(
                f"{owner}: params[{path!r}] is {dtype.name}, expected bfloat16 or wider for "
                "stochastic rounding: cast it, or use rounding='nearest'"
            )
    return True


def _rounding_step(params: Tree, rounding: str, step: Any) -> chex.Array | None:
    """The checked `step` of `apply_updates`; `None` rounds to the nearest."""
    stochastic = rounds_stochastically("apply_updates", rounding, params)
    if (step is not None) != stochastic:
        actual = "no step" if step is None else "a step, which has no effect with it"
        raise ValueError(
            f"apply_updates: rounding={rounding!r} with {actual}: give both rounding='stochastic' "
            "and step=adamjax.step_count(state), or neither"
        )
    if step is None:
        return None
    step = native("apply_updates: step", step)
    if np.shape(step) != () or not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise ValueError(
            f"apply_updates: step is {described(step)}, expected an integer scalar, such as "
            "adamjax.step_count(state)"
        )
    if isinstance(step, int):
        step = np.uint32(step % 2**32)
    # Moments are rounded in the same step, so this seed must differ from theirs.
    return jnp.asarray(step).astype(jnp.int32) ^ np.int32(0x5BD1E995)
