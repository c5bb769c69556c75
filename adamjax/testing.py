"""Laws that every transform must keep, and `check`, which tries them on one of your own.

A law is a function of a `Trial`, which is a transform and the trees that it is tried on. It returns
`None` if the law holds or does not apply to the transform; else it raises an AssertionError that
names the law, the leaf and the numbers. `LAWS` maps the name of each law to a sentence that states
it.

>>> import adamjax
>>> adamjax.testing.check(adamjax.scale(-0.5), laws=["is_pure", "pickles", "prints"])
>>> adamjax.testing.LAWS["is_pure"]
'The same arguments give the same results, and are not changed.'
"""

import copy
import functools
import inspect
import itertools
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from adamjax._compat import x64
from adamjax.adam import scale_by_adam
from adamjax.chain import chain
from adamjax.data import Data, Tree
from adamjax.encoding import SCALED8
from adamjax.exact import exact_rows
from adamjax.expectations import (
    LOOSE_RTOL,
    expect_close,
    expect_same_bits,
    expect_same_form,
    expect_within,
    first_difference,
    in_float64,
    is_none,
    largest_magnitude,
    leaves_with_names,
    paired_leaves,
    shown,
)
from adamjax.grouping import grouped
from adamjax.leaves import apply_updates, dtype_of, is_left_alone
from adamjax.paths import flatten, leaf_paths
from adamjax.rows import RowGradient, SpoiltRows
from adamjax.scaling import scale
from adamjax.structure import find, rule_slots, slot_states, walk
from adamjax.transform import Rule, Transform
from adamjax.trial import Trial, cast, take_step, take_three_steps

__all__ = ["LAWS", "Trial", "check", "try_law"]


# --- the laws -------------------------------------------------------------------------------------

_LAWS: dict[str, Callable[[Trial], None]] = {}


def _law(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
    _LAWS[function.__name__] = function
    return function


@_law
def is_pure(trial: Trial) -> None:
    """The same arguments give the same results, and are not changed."""
    tx, params = trial.tx, trial.params
    states = [tx.init(params), tx.init(params)]
    expect_same_bits("init(params)", states[1], states[0])
    calls, results = [], []
    for t in range(2):
        calls.append((trial.grads(t), states[-1], params))
        results.append(_update_without_changes(tx, calls[-1]))
        states.append(results[-1][1])
    # Repeated after other calls, in case one of them left something in the transform.
    for call, (updates, state) in zip(calls, results, strict=True):
        again, next_state = tx.update(*call)
        expect_same_bits("updates of the same arguments", again, updates)
        expect_same_bits("the next state of the same arguments", next_state, state)


def _update_without_changes(tx: Any, args: tuple[Any, ...]) -> Any:
    """The result of `update`, which must not change its arguments."""
    before: list[Any] = [jax.tree.flatten(arg, is_leaf=is_none) for arg in args]
    values = [[None if x is None else np.array(x) for x in leaves] for leaves, _ in before]
    result = tx.update(*args)
    names = ("grads", "state", "params")
    for name, arg, (leaves, treedef), old in zip(names, args, before, values, strict=True):
        now, now_treedef = jax.tree.flatten(arg, is_leaf=is_none)
        if treedef != now_treedef or any(x is not y for x, y in zip(now, leaves, strict=True)):
            raise AssertionError(f"update has changed the {name} that it was given")
        expect_same_bits(f"{name} that was given", now, old)
    return result


@_law
def state_keeps_its_form(trial: Trial) -> None:
    """In `lax.scan` and `lax.cond`, a step keeps the structure, shapes and dtypes."""
    params, grads = trial.mixed_params, trial.mixed_grads()
    _expect_form_is_kept(trial, _only_floats(params, params), _only_floats(params, grads))


def _only_floats(params: Tree, tree: Tree) -> Tree:
    """A tree with `None` in place of each leaf whose parameter is not a float."""
    leaves, treedef = flatten(tree)
    pairs = zip(flatten(params)[0], leaves, strict=True)
    return treedef.unflatten([None if is_left_alone(p) else x for p, x in pairs])


def _expect_form_is_kept(trial: Trial, params: Any, grads: Tree) -> None:
    state = trial.tx.init(params)
    moved, next_state, _ = jax.eval_shape(lambda p, s: trial.step(p, s, grads), params, state)
    expect_same_form("state", next_state, state)
    expect_same_form("params", moved, params)

    def body(carry: Any, t: Any) -> Any:
        def rest() -> Any:
            return carry

        def move() -> Any:
            params, state = carry
            return trial.step(params, state, grads)[:2]

        return jax.lax.cond(t == 1, rest, move), None

    start = params, state
    end, _ = jax.jit(lambda start: jax.lax.scan(body, start, jnp.arange(3)))(start)
    expect_same_form("(params, state)", end, start)


@_law
def counts_its_steps(trial: Trial) -> None:
    """A count beside a rule's slots rises by one in each step that the rule takes."""
    states = [state for _, state, *_ in trial.trajectory()]
    counts = [
        [int(x.count) for x in slot_states(state) if rule_slots(x) and hasattr(x, "count")]
        for state in states
    ]
    for counts_of_rule in zip(*counts, strict=True):
        rises = [b - a for a, b in itertools.pairwise(counts_of_rule)]
        if counts_of_rule[-1] == 0 or not {0, 1}.issuperset(rises):
            raise AssertionError(
                f"the state's count is {list(counts_of_rule)}, expected one more in each step that "
                "the rule takes"
            )


_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@_law
def updates_have_the_gradients_dtype(trial: Trial) -> None:
    """Updates have the gradients' dtypes and states keep theirs, whatever the parameters' dtype."""
    for wide, p_dtype, g_dtype in itertools.product((False, True), _DTYPES, _DTYPES):
        with x64(wide):
            params, grads = (_cast_all_but_the_first(trial.params, d) for d in (p_dtype, g_dtype))
            state = jax.eval_shape(trial.tx.init, params)
            updates, next_state = jax.eval_shape(trial.tx.update, grads, state, params)
            expect_same_form("updates", updates, grads)
            if not trial.has_foreign:  # optax.trace takes on the gradients' dtype
                expect_same_form("state", next_state, state)


def _cast_all_but_the_first(tree: Tree, dtype: Any) -> Tree:
    """The tree with all leaves but the first cast to a dtype."""
    leaves, treedef = flatten(tree)
    return treedef.unflatten(leaves[:1] + [x.astype(dtype) for x in leaves[1:]])


@_law
def strict_promotion(trial: Trial) -> None:
    """A step runs where JAX refuses implicit promotions of dtypes and ranks."""
    params = trial.params_in(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(trial.tx.init, params)
        jax.eval_shape(trial.step, params, state, params)


@_law
def jit_changes_nothing(trial: Trial) -> None:
    """A step under `jit` has the same results as outside, where it runs operation by operation."""
    for params, state, grads, updates in trial.trajectory()[:2]:
        moved, next_state, eager = trial.step(params, state, grads)
        compiled = trial.compiled(params, state, grads)
        expect_close("updates under jit", updates, eager, LOOSE_RTOL)
        expect_close("params under jit", compiled[0], moved, LOOSE_RTOL)
        expect_close("state under jit", compiled[1], next_state, LOOSE_RTOL)


@_law
def one_trace_and_donation(trial: Trial) -> None:
    """A step that donates params and state is traced once, and frees all of their arrays."""
    traces = []

    def step(params: Tree, state: Any, grads: Tree) -> Any:
        traces.append(1)
        return trial.step(params, state, grads)[:2]

    donating_step = jax.jit(step, donate_argnums=(0, 1))
    for init in (trial.tx.init, jax.jit(trial.tx.init)):
        params = jax.tree.map(jnp.array, trial.params)
        state = init(params)
        for t in range(2):
            donated_leaves = leaves_with_names("(params, state)", (params, state))[0]
            params, state = donating_step(params, state, trial.grads(t))
            for path, x in donated_leaves:
                if x is not None and not x.is_deleted():
                    raise AssertionError(
                        f"{path} was donated, and is still there: does the step leave it unread?"
                    )
        expected, expected_state, *_ = trial.trajectory()[2]
        expect_close("(params, state)", (params, state), (expected, expected_state))
    if len(traces) != 1:
        raise AssertionError(f"the step was traced {len(traces)} times, expected once")


@_law
def float64_is_kept(trial: Trial) -> None:
    """Gradients of float64 parameters give float64 updates, near to those of float32."""
    expected = trial.trajectory()[:3]
    with x64(True):
        params = trial.params_in(jnp.float64)
        state = trial.tx.init(params)
        for t, (*_, updates) in enumerate(expected):
            # The same numbers, so that only the computation differs.
            grads = cast(trial.grads(t), jnp.float64)
            before = params, state
            params, state, wide = trial.compiled(params, state, grads)
            expect_same_form("updates", wide, grads)
            expect_same_form("(params, state)", (params, state), before)
            expect_close("updates in float64", cast(wide, jnp.float32), updates, 1e-4)


@_law
def low_precision_updates_are_the_float32_twins_rounded_once(trial: Trial) -> None:
    """In bfloat16 and float16, updates are those of float32, rounded once.

    Each step starts from the same weights. The tolerance is half an ulp, and 1% of that for the
    rounding of float32.
    """
    for dtype in (jnp.bfloat16, jnp.float16):
        twin_state = trial.tx.init(cast(trial.params_in(dtype), jnp.float32))
        for params, _, grads, updates in trial.trajectory(dtype)[:-1]:
            _, twin_state, twin = trial.compiled(
                cast(params, jnp.float32), twin_state, cast(grads, jnp.float32)
            )
            expect_same_form("updates", updates, grads)
            for path, u, unrounded in paired_leaves("updates", updates, twin):
                u, unrounded = in_float64(u), in_float64(unrounded)
                if np.any(np.isnan(unrounded)):
                    raise AssertionError(f"{path} is NaN in float32, from finite gradients")
                far = ~(np.abs(u - unrounded) <= 0.505 * _ulp(unrounded, dtype))
                if np.any(far):
                    where = f"in {jnp.dtype(dtype).name}, {path}"
                    raise AssertionError(first_difference(where, u, unrounded, far))


def _ulp(x: Any, dtype: Any) -> Any:
    """The distance of neighbouring floats of the dtype at |x|."""
    info = jnp.finfo(dtype)
    exponent = np.frexp(np.abs(x))[1] - 1
    return 2.0 ** (np.maximum(exponent, int(info.minexp)) - int(info.nmant))


@_law
def vmap_over_weights_is_a_loop(trial: Trial) -> None:
    """Under `jax.vmap` over parameters, gradients and state, each member moves as if alone."""

    def stacked(*trees: Tree) -> Tree:
        return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)

    # The first member has the weights and gradients of the trial, the second has others.
    history = trial.trajectory()
    params2 = jax.tree.map(lambda p: p + 1, trial.params)
    state2 = trial.tx.init(params2)
    params = stacked(trial.params, params2)
    state = jax.vmap(trial.tx.init)(params)
    step = jax.jit(jax.vmap(trial.step))
    for t in range(2):
        grads2 = jax.tree.map(lambda g: 3 * g, trial.grads(t))
        params, state, updates = step(params, state, stacked(trial.grads(t), grads2))
        params2, state2, updates2 = trial.compiled(params2, state2, grads2)
        (params1, state1, *_), (*_, updates1) = history[t + 1], history[t]
        expected = (params1, state1, updates1), (params2, state2, updates2)
        for i, alone in enumerate(expected):
            mapped = jax.tree.map(lambda x, i=i: x[i], (params, state, updates))
            expect_close("(params, state, updates) under vmap", mapped, alone)


# --- hyperparameters ------------------------------------------------------------------------------


def _varied(tx: Any, factor: float) -> Any:
    """The transform with arrays as hyperparameters, and each float among them multiplied."""

    def varied(x: Any) -> Any:
        return jnp.asarray(factor * x) if isinstance(x, float) else jnp.asarray(x)

    return jax.tree.map(varied, tx)


def _varied_for_steps(tx: Any, factor: float) -> Any:
    """Like `_varied`, but the numbers that `exact_rows` computes with in advance do not change."""
    fixed = {name for part in walk(tx) for name in part.tx.python_numbers}

    def unless_fixed(path: Any, x: Any, varied: Any) -> Any:
        return x if getattr(path[-1], "name", None) in fixed else varied

    return jax.tree_util.tree_map_with_path(unless_fixed, tx, _varied(tx, factor))


@_law
def jit_argument(trial: Trial) -> None:
    """As an argument of `jit`, a transform is traced once, whatever its hyperparameters' values."""
    for tx in (trial.tx, _varied_for_steps(trial.tx, 0.9)):
        actual = trial.take_three_steps_with(tx)
        closed_over = jax.tree.map(lambda x: x.item() if isinstance(x, jax.Array) else x, tx)
        with jax.disable_jit():
            expected = take_three_steps(
                functools.partial(take_step, closed_over), closed_over, trial
            )
        # If b1 or b2 is traced, 1 - b is computed in float32: for 0.999 that is off by 1e-5.
        expect_close("(params, updates) of an argument of jit", actual, expected, 1e-4)
    if trial.num_traces != 1:
        raise AssertionError(f"the step was traced {trial.num_traces} times, expected once")


@_law
def vmap_hyperparameters(trial: Trial) -> None:
    """If `jax.vmap` maps over hyperparameters, each member moves as its transform does alone."""
    alone = [_varied_for_steps(trial.tx, factor) for factor in (1.0, 0.9)]
    many = jax.tree.map(lambda *xs: jnp.stack(xs), *alone)
    if not jax.tree.leaves(many):
        return
    step = jax.jit(jax.vmap(take_step, in_axes=(0, 0, 0, None)))
    params = jax.tree.map(lambda p: jnp.stack([p, p]), trial.params)
    state, history = jax.vmap(lambda tx, p: tx.init(p))(many, params), []
    for t in range(3):
        params, state, updates = step(many, params, state, trial.grads(t))
        history.append(updates)
    for i, tx in enumerate(alone):
        member = jax.tree.map(lambda x, i=i: x[i], (params, history))
        expected = trial.take_three_steps_with(tx)
        expect_close("(params, updates) under vmap of the transform", member, expected)


@_law
def a_later_scaling_scales_its_updates(trial: Trial) -> None:
    """In a chain with `scale(0.5)` after it, a rule's updates are half as large.

    In such a chain, `Rule.step` gets the factor of `scale`.
    """
    if not isinstance(trial.tx, Rule) or not trial.tx.has_step:
        return
    tx = chain(trial.tx, scale(0.5))
    state, update = tx.init(trial.params), jax.jit(tx.update)
    for params, _, grads, updates in trial.trajectory()[:2]:
        halves, state = update(grads, state, params)
        expected = jax.tree.map(lambda u: u / 2, updates)
        expect_close("updates with scale(0.5) after it", halves, expected, LOOSE_RTOL)


# --- trees ----------------------------------------------------------------------------------------


@_law
def a_none_gradient_skips_its_leaf(trial: Trial) -> None:
    """A leaf whose gradient is None has the update None, and its weight and state stay the same."""
    params, state, grads, _ = trial.trajectory()[1]
    leaves, treedef = flatten(grads)
    for i, path in enumerate(leaf_paths(params)[:3]):
        without_one = treedef.unflatten([None if j == i else g for j, g in enumerate(leaves)])
        updates, next_state = trial.tx.update(without_one, state, params)
        update, before, after = (
            flatten(tree)[0][i] for tree in (updates, params, apply_updates(params, updates))
        )
        if update is not None:
            raise AssertionError(f"updates[{path!r}] is {shown(update)}, expected None")
        expect_same_bits(f"params[{path!r}]", after, before)
        expect_same_form("state", next_state, state)
        for name, x, y in paired_leaves("state", next_state, state):
            if _belongs(name, path):
                expect_same_bits(name, x, y)


def _belongs(name: str, path: str) -> bool:
    """Whether a leaf of a state belongs to a parameter: its name ends in the parameter's path."""
    keys, end = re.findall(r"\w+", name), re.findall(r"\w+", path)
    return keys[-len(end) :] == end


@_law
def integers_and_bools_are_left_alone(trial: Trial) -> None:
    """Integer and boolean leaves, and those with a float0 gradient, get zeros and do not move."""
    for params, _, grads, updates, moved, _ in trial.mixed_run:
        leaves = zip(*(flatten(tree)[0] for tree in (params, grads, updates, moved)), strict=True)
        for path, (p, g, u, new_p) in zip(leaf_paths(params), leaves, strict=True):
            if not is_left_alone(p):
                continue
            expect_same_bits(f"params[{path!r}]", new_p, p)
            if (u is None) != (g is None) or (u is not None and dtype_of(u) != dtype_of(g)):
                raise AssertionError(
                    f"updates[{path!r}] is {shown(u)}, expected {shown(g)}, like the gradient"
                )
            if u is not None and np.any(np.asarray(u, bool)):
                raise AssertionError(f"updates[{path!r}] is {np.asarray(u)}, expected zeros")


@_law
def mixed_trees_keep_shapes_and_dtypes(trial: Trial) -> None:
    """Scalars, empty arrays and leaves of every dtype in one tree keep their shapes and dtypes."""
    for params, state, grads, updates, moved, next_state in trial.mixed_run:
        expect_same_form("updates", updates, grads)
        expect_same_form("params", moved, params)
        expect_same_form("state", next_state, state)
    _expect_form_is_kept(trial, trial.mixed_params, trial.mixed_grads())


@_law
def empty_trees(trial: Trial) -> None:
    """Trees without leaves, and trees with an array of size 0, are parameters too."""
    if not trial.is_default:
        return  # the transform may need paths that these trees do not have
    empties: tuple[Any, ...] = ({}, (), {"a": {}, "b": None}, {"a": jnp.zeros((0,))})
    for empty in empties:
        state = trial.tx.init(empty)
        updates, next_state = trial.tx.update(empty, state, empty)
        expect_same_bits(f"updates for {empty}", updates, empty)
        expect_same_form(f"state for {empty}", next_state, state)
        expect_same_bits("params", apply_updates(empty, updates), empty)


def _wrong_gradients(leaf: Any) -> dict[str, Any]:
    """Values, by their descriptions, that are no gradients of a leaf with axes."""
    ones = jnp.ones(leaf.shape, jnp.float32)
    wrong = {
        "a scalar": jnp.float32(1),
        "a Python number": 1.0,
        "another shape that broadcasts": jnp.ones((1, *leaf.shape[1:])),
        "complex numbers": ones.astype(jnp.complex64),
        "integers": ones.astype(jnp.int32),
        "a dictionary": {"x": ones},
        "a string": "gradient",
    }
    if leaf.shape[0] == 1:
        del wrong["another shape that broadcasts"]
    if leaf.ndim > 1 and leaf.shape != leaf.T.shape:
        wrong["its transpose"] = ones.T
    return wrong


@_law
def refuses_gradients_that_do_not_fit(trial: Trial) -> None:
    """Gradients of another shape, kind of dtype or structure raise an error that names the leaf."""
    state, grads = trial.tx.init(trial.params), trial.grads(0)
    leaves, treedef = flatten(grads)
    for i, (path, g) in enumerate(zip(leaf_paths(grads), leaves, strict=True)):
        if g.ndim == 0 or g.size == 0:
            continue
        for fault, wrong in _wrong_gradients(g).items():
            wrong_grads = treedef.unflatten([*leaves[:i], wrong, *leaves[i + 1 :]])
            _expect_refusal(
                f"grads[{path!r}] that is {fault}",
                path,
                trial.tx.update,
                wrong_grads,
                state,
                trial.params,
            )


def _expect_refusal(what: str, words: str, function: Callable[..., Any], *args: Any) -> None:
    """Expects an error whose text contains `words`."""
    try:
        function(*args)
    except (TypeError, ValueError) as error:
        if words not in str(error):
            raise AssertionError(
                f"{what} is refused without saying {words!r}: {type(error).__name__}: {error}"
            ) from error
        return
    raise AssertionError(f"{what} is not refused")


# How an array of a state may change on its way through a checkpoint.
_DAMAGES: Mapping[str, Callable[[Any], Any]] = {
    "replicated": lambda x: jnp.stack([x, x]),
    "of a larger leaf": lambda x: jnp.concatenate([x, x]) if x.ndim else jnp.ones((1, 1)),
    "cast to float16": lambda x: x.astype(jnp.float16),
    "cast between float and int": lambda x: x.astype(
        jnp.int32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    ),
    "missing": lambda x: None,
}


@_law
def refuses_a_state_that_does_not_fit(trial: Trial) -> None:
    """A state with a wrong array or of another transform raises an error that names a transform."""
    named_leaves, treedef = leaves_with_names("state", trial.tx.init(trial.params))
    for i, (path, x) in enumerate(named_leaves):
        if x is None:
            continue
        for damage, damaged in _DAMAGES.items():
            leaves = [x for _, x in named_leaves]
            leaves[i] = damaged(x)
            _expect_state_refused(trial, f"{path} that is {damage}", treedef.unflatten(leaves))
    if isinstance(trial.tx, Transform) and any(x is not None for _, x in named_leaves):
        another = jnp.zeros(()), trial.params, trial.params
        _expect_state_refused(trial, "the state () of another transform", ())
        _expect_state_refused(trial, "the state (number, tree, tree) of another transform", another)


def _expect_state_refused(trial: Trial, what: str, state: Any) -> None:
    try:
        trial.tx.update(trial.grads(0), state, trial.params)
    except (TypeError, ValueError) as error:
        if not re.match(r"\w+(\.\w+)?: ", str(error)):
            raise AssertionError(
                f"{what} is refused, but not in the name of a transform: {error}"
            ) from error
    except Exception as error:
        raise AssertionError(
            f"{what} is refused by a {type(error).__name__}, expected a TypeError or ValueError"
        ) from error
    else:
        raise AssertionError(f"{what} is not refused")


# --- properties that a transform declares ---------------------------------------------------------


@_law
def zeros_are_kept_where_it_says_so(trial: Trial) -> None:
    """With `keeps_zero`, the update of an element with a gradient of zero is always zero."""
    if not getattr(trial.tx, "keeps_zero", False):
        return
    params = trial.params
    state = trial.tx.init(params)
    # Elements of the row and of the column have nonzero gradients in the earlier steps.
    for t, without in enumerate((_without_element, _without_row, _without_column)):
        grads = jax.tree.map(without, trial.grads(t))
        params, state, updates = trial.compiled(params, state, grads)
        for path, u, g in paired_leaves("updates", updates, grads):
            moved = np.asarray((g == 0) & (u != 0))
            if np.any(moved):
                raise AssertionError(first_difference(path, np.asarray(u), np.asarray(g), moved))


def _without_element(g: chex.Array) -> chex.Array:
    return g.at[(slice(1),) * g.ndim].set(0)


def _without_row(g: chex.Array) -> chex.Array:
    return g.at[:1].set(0) if g.ndim else g


def _without_column(g: chex.Array) -> chex.Array:
    return g.at[..., :1].set(0) if g.ndim else g


@_law
def grouped_is_the_same_where_it_says_so(trial: Trial) -> None:
    """With `groupable`, leaves that are joined end to end get the updates that each gets alone."""
    if not getattr(trial.tx, "groupable", False):
        return
    tx = grouped(trial.tx)
    state = tx.init(trial.params)
    for params, _, grads, updates in trial.trajectory()[:3]:
        grouped_updates, state = tx.update(grads, state, params)
        expect_close("updates of grouped", grouped_updates, updates, LOOSE_RTOL)


# --- row gradients --------------------------------------------------------------------------------


@_law
def row_gradients_mean_their_rows(trial: Trial) -> None:
    """A row gradient has its dense array's effect, or leaves other rows alone, or is refused.

    A refusal is a TypeError, ValueError or NotImplementedError that says "row gradient", or
    "RowGradient" and the name of the transform.
    """
    with jax.disable_jit():
        _try_rows(trial)


def _try_rows(trial: Trial) -> None:
    params = trial.table_params
    state = trial.tx.init(params)
    for t in range(4):
        rows = trial.row_grads(t)
        if t == 3:
            rows = _with_rest(rows)
        dense = _to_dense(rows)
        try:
            actual, actual_state = trial.tx.update(rows, state, params)
        except (TypeError, ValueError, NotImplementedError) as error:
            if _refuses_rows(trial.tx, error):
                return
            raise
        expected, expected_state = trial.tx.update(dense, state, params)
        _expect_results_of_rows(rows, state, actual, actual_state, expected, expected_state)
        params, state = apply_updates(params, expected), expected_state


def _with_rest(tree: Tree) -> Tree:
    """The tree with a `rest` in its row gradients: values of the rows outside of `indices`."""

    def with_rest(x: Any) -> Any:
        if not _is_row_gradient(x):
            return x
        rest = np.random.default_rng(300).normal(size=x.shape)
        rest[np.asarray(x.indices)[np.asarray(x.indices) < x.num_rows]] = 0
        return x.replace(rest=jnp.asarray(rest, x.dtype))

    return jax.tree.map(with_rest, tree, is_leaf=_is_row_gradient)


def _refuses_rows(tx: Any, error: Exception) -> bool:
    """Whether an error says that row gradients are refused.

    An error of Python itself may name RowGradient too, so the transform must be named as well. An
    error about spoilt indices is no refusal: a compiled step would go on with them.
    """
    if isinstance(error, SpoiltRows):
        return False
    text = str(error)
    names = {type(x).__name__ for x in (tx, *_objects(tx))}
    named = any(re.search(rf"\b{re.escape(name)}\b", text) for name in names)
    return "row gradient" in text.lower() or (named and "RowGradient" in text)


def _is_row_gradient(x: Any) -> bool:
    return isinstance(x, RowGradient)


def _to_dense(tree: Tree) -> Tree:
    return jax.tree.map(
        lambda x: x.to_dense() if _is_row_gradient(x) else x, tree, is_leaf=_is_row_gradient
    )


def _expect_results_of_rows(
    rows: Tree, state: Any, actual: Tree, actual_state: Any, expected: Tree, expected_state: Any
) -> None:
    """Expects that row gradients gave the right updates and next state.

    Args:
      expected, expected_state: the updates and the next state for the dense arrays.
    """
    # For each table a flag for each row that was read, if its update is lazy; else `None`.
    is_read_of: dict[str, Any] = {}
    leaves = zip(*(flatten(tree)[0] for tree in (rows, actual, expected)), strict=True)
    for path, (g, u, expected_u) in zip(leaf_paths(rows), leaves, strict=True):
        name = f"updates[{path!r}]"
        if not _is_row_gradient(g):
            expect_close(name, u, expected_u)
            continue
        is_read = np.zeros(g.num_rows + 1, bool)
        is_read[np.asarray(g.indices)] = True
        is_read_of[path] = is_read[:-1] if _is_row_gradient(u) and u.lazy else None
        zeros = jnp.zeros_like(expected_u)
        _expect_close_rows(name, _to_dense(u), expected_u, zeros, is_read_of[path])
    before = dict(leaves_with_names("", _to_dense(state))[0])
    for name, x, y in paired_leaves("", _to_dense(actual_state), _to_dense(expected_state)):
        flags = next((is_read_of[path] for path in is_read_of if _belongs(name, path)), None)
        _expect_close_rows(f"state{name}", x, y, before[name], flags)


def _expect_close_rows(name: str, actual: Any, expected: Any, before: Any, is_read: Any) -> None:
    """Expects rows that were read to be near to `expected`, and the others to equal `before`.

    If `is_read` is `None` or is not about rows of this array, all must be near to `expected`.
    """
    if is_read is None or np.shape(actual)[:1] != is_read.shape:
        expect_close(name, actual, expected)
        return
    expect_close(f"{name}, in rows that have a gradient, ", actual[is_read], expected[is_read])
    expect_same_bits(f"{name}, in rows that have none,", actual[~is_read], before[~is_read])


@_law
def exact_rows_is_dense_or_refuses(trial: Trial) -> None:
    """In `exact_rows`, tables move as with dense gradients, or the transform is refused.

    A rule that has a `coast` must not be refused.
    """
    tx = trial.tx
    if not isinstance(tx, Transform):
        return
    # `exact_rows` needs a rule: a transform that has none is tried before Adam and after it.
    if tx.must_be_last or tx.has_foreign:
        chains = [tx]
    elif find(Rule, tx):
        chains = [chain(tx, scale(-0.1))]
    elif tx.gates_steps:  # A chain refuses a rule after it.
        chains = [chain(scale_by_adam(), tx, scale(-0.1))]
    else:
        chains = [chain(tx, scale_by_adam(), scale(-0.1)), chain(scale_by_adam(), tx, scale(-0.1))]
    for dense in chains:
        try:
            exact = exact_rows(dense, _patterns(trial.row_grads(0)))
            params = trial.table_params
            state = exact.init(params)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("exact_rows: "):
                raise
            # With moments in 8 bits, a table of one dimension is refused.
            if isinstance(tx, Rule) and tx.coast() and SCALED8 not in vars(tx).values():
                raise AssertionError(f"it has a coast, but is refused: {error}") from error
            continue
        _expect_exact(trial, exact, dense, params, state)


def _patterns(rows: Tree) -> list[str]:
    """A pattern for each leaf that is a row gradient."""
    pairs = zip(leaf_paths(rows), flatten(rows)[0], strict=True)
    return [f"^{re.escape(path)}$" for path, g in pairs if _is_row_gradient(g)]


def _expect_exact(
    trial: Trial, exact: exact_rows, dense: Transform, params: Tree, state: Any
) -> None:
    steps = [jax.jit(functools.partial(take_step, tx)) for tx in (exact, dense)]
    expected, expected_state = params, dense.init(params)
    for t in range(6):
        rows = trial.row_grads(t)
        params, state, _ = steps[0](params, state, rows)
        expected, expected_state, _ = steps[1](expected, expected_state, _to_dense(rows))
    params, state = jax.jit(exact.flush)(params, state)
    name = f"of exact_rows({dense!r}), after 6 steps"
    expect_close(f"params {name}, ", params, expected, LOOSE_RTOL)
    expect_close(f"state {name}, ", state.inner, expected_state, LOOSE_RTOL)


# --- data -----------------------------------------------------------------------------------------


@_law
def is_data(trial: Trial) -> None:
    """A frozen `adamjax.Transform` that is a pytree and unpacks as a pair `init, update`."""
    tx = trial.tx
    if not isinstance(tx, Transform):
        raise AssertionError(f"it is a {type(tx).__name__}, expected an adamjax.Transform")
    leaves, treedef = jax.tree.flatten(tx)
    if jax.tree.unflatten(treedef, leaves) != tx:
        raise AssertionError("rebuilt from its leaves, it does not equal the original")
    for name in ("new_attribute", *vars(tx)):
        try:
            setattr(tx, name, 0.5)
        except AttributeError:
            continue
        raise AssertionError(f"its attribute {name} can be set: it is not frozen")
    init, update = tx
    updates, _ = update(trial.grads(0), init(trial.params), trial.params)
    expect_close("updates of the pair", updates, trial.trajectory()[0][3])


@_law
def pickles(trial: Trial) -> None:
    """A pickled copy and a deep copy are equal, and print and hash alike."""
    tx = trial.tx
    for other in (pickle.loads(pickle.dumps(tx)), copy.deepcopy(tx)):
        if other != tx or hash(other) != hash(tx) or repr(other) != repr(tx):
            raise AssertionError(f"the copy is {other!r}, expected {tx!r}")
    arrays = _varied(tx, 0.9)
    if pickle.loads(pickle.dumps(arrays)) != arrays:
        raise AssertionError("with arrays as hyperparameters, the copy is not equal")


@_law
def equals(trial: Trial) -> None:
    """Transforms compare by value. One with arrays in it does too, but cannot be hashed."""
    tx = trial.tx
    again = copy.deepcopy(tx)
    if tx is again or tx != again or hash(tx) != hash(again) or copy.copy(tx) != tx:
        raise AssertionError("it does not equal its copy")
    if tx == "a transform":
        raise AssertionError("it equals a string")
    arrays = _varied(tx, 0.9)
    if arrays != _varied(again, 0.9):
        raise AssertionError("with arrays as hyperparameters, it does not equal its copy")
    if not jax.tree.leaves(tx):
        return
    if arrays == tx:
        raise AssertionError("with arrays as hyperparameters, it equals one with other numbers")
    floats = [x for x in jax.tree.leaves(tx) if isinstance(x, float) and x != 0]
    if floats and arrays == _varied(tx, 0.8):
        raise AssertionError("it equals one with other arrays as hyperparameters")
    try:
        hash(arrays)
    except TypeError as error:
        if "array" in str(error) and "no hash" in str(error):
            return
        raise
    raise AssertionError("with arrays as hyperparameters, it has a hash")


@_law
def prints(trial: Trial) -> None:
    """The repr, evaluated as Python, makes an equal transform."""
    tx = trial.tx
    names = {type(x).__name__: type(x) for x in _objects(tx)}
    evaluated = eval(repr(tx), {**vars(adamjax), **names})
    if evaluated != tx:
        raise AssertionError(f"its repr makes {evaluated!r}, expected {tx!r}")


def _objects(x: Any) -> Iterator[Any]:
    """A transform or schedule, and those in it at any depth."""
    if isinstance(x, Data):
        yield x
        for value in vars(x).values():
            yield from _objects(value)
    elif isinstance(x, tuple | list):
        for value in x:
            yield from _objects(value)


# --- the reference --------------------------------------------------------------------------------

_REFERENCE_STEPS = 100
# In this many steps at the start, one element of each leaf has a gradient of zero. A rule may treat
# the first step of the run differently, or the first nonzero gradient of an element. These steps
# tell the two apart.
_STEPS_WITHOUT_GRADIENT = 2


@_law
def follows_the_reference(trial: Trial) -> None:
    """Updates and slots are those of the reference over 100 steps, in float32 and in float64."""
    if trial.reference is None:
        return
    _follow(trial, jnp.float32, 1e-5)
    with x64(True):
        _follow(trial, jnp.float64, 1e-10)


def _follow(trial: Trial, dtype: Any, rtol: float) -> None:
    reference = trial.reference
    assert reference is not None
    takes_params = "p" in inspect.signature(reference).parameters
    params = trial.params_in(dtype)
    state = trial.tx.init(params)
    names, slots = _slots(state)
    # By slot and leaf.
    expected_slots = [[np.asarray(x, np.float64) for x in flatten(slot)[0]] for slot in slots]
    # By name and leaf, the largest magnitude so far. A sum that comes near zero has the rounding
    # errors of its larger terms, so errors are compared with this magnitude.
    largest: dict[tuple[str, str], float] = {}
    for t in range(_REFERENCE_STEPS):
        before = flatten(params)[0]
        grads = trial.grads(t, dtype)
        if t < _STEPS_WITHOUT_GRADIENT:
            grads = jax.tree.map(_without_first_element, grads)
        params, state, updates = trial.compiled(params, state, grads)
        actual = [*zip(*(flatten(tree)[0] for tree in (updates, *_slots(state)[1])), strict=True)]
        for i, (path, g) in enumerate(zip(leaf_paths(params), flatten(grads)[0], strict=True)):
            extra = {"p": np.asarray(before[i], np.float64)} if takes_params else {}
            old_slots = (slot[i] for slot in expected_slots)
            expected = reference(np.asarray(g, np.float64), *old_slots, step=t + 1, **extra)
            _expect_results(names, expected)
            for slot, x in zip(expected_slots, expected[1:], strict=True):
                slot[i] = x
            for name, x, y in zip(("updates", *names), actual[i], expected, strict=True):
                where = f"in {jnp.dtype(dtype).name}, at step {t + 1}, {name}[{path!r}]"
                largest[name, path] = max(largest.get((name, path), 0.0), largest_magnitude(y))
                expect_within(where, x, y, rtol * largest[name, path])


def _without_first_element(g: chex.Array) -> chex.Array:
    """The gradient with a first element of zero, if there are others."""
    return g.reshape(-1).at[0].set(0).reshape(g.shape) if g.size > 1 else g


def _expect_results(slot_names: Sequence[str], results: Any) -> None:
    """Expects that a reference returned the update and the new slots."""
    is_tuple = isinstance(results, tuple)
    if not is_tuple or len(results) != 1 + len(slot_names):
        found = f"{len(results)} arrays" if is_tuple else f"a {type(results).__name__}"
        raise AssertionError(
            f"the reference returned {found}, expected a tuple of the update"
            + "".join(f" and {name}" for name in slot_names)
        )


def _slots(state: Any) -> tuple[list[str], list[Tree]]:
    """The slots of a state, in its order, with their names."""
    pairs = [(name, getattr(x, name)) for x in slot_states(state) for name in x.slots]
    return [name for name, _ in pairs], [slot for _, slot in pairs]


# --- all of them ----------------------------------------------------------------------------------


def _sentence(law: Callable[[Trial], None]) -> str:
    return (law.__doc__ or "").split("\n")[0]


#: The name of each law, and a sentence that states it.
LAWS: Mapping[str, str] = MappingProxyType({name: _sentence(law) for name, law in _LAWS.items()})


def try_law(name: str, trial: Trial) -> None:
    """Tries one law; see `check`, which tries all.

    Raises:
      AssertionError: the law is broken, or trying it raised another error.
      ValueError: there is no such law.
    """
    if name not in _LAWS:
        raise ValueError(f"there is no law {name!r}; the laws are {list(LAWS)}")
    try:
        _LAWS[name](trial)
    except Exception as error:
        text = str(error)
        if type(error) is not AssertionError:
            # The first line; the whole error is the cause of the one that is raised.
            text = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
        raise AssertionError(
            f"{trial.tx!r} breaks the law {name} ({LAWS[name]}): {text}"
        ) from error


def check(
    tx: Any,
    reference: Callable[..., Any] | None = None,
    laws: Iterable[str] | None = None,
    *,
    params: Tree = None,
) -> None:
    """Tries the laws on a transform, and raises an error if it breaks one.

    Together the laws take ten seconds to a minute, and several minutes on a slow machine, because
    they compile many programs. To try only a few, name them in `laws`.

    Args:
      tx: a transform, or any pair `(init, update)`. Its hyperparameters are Python numbers.
      reference: the transform in float64 NumPy, on one array: `(g, *slots, step) -> (update,
        *slots)`, where `step` is 1 for the first and slots are those that the state names by
        `transform_state`, in their order. If it has an argument `p`, that is the parameter.
      laws: names of `LAWS`; by default all of them. `set(LAWS) - {"prints"}` is all but one.
      params: a tree of float32 arrays to try it on. Give one if the transform is made for certain
        paths or shapes.

    Raises:
      AssertionError: a law is broken. The message names each broken law, the leaf and the numbers.
      ValueError: there is no law of a given name, or the only law that is named needs a reference.

    A rule whose slots are rounded stochastically breaks two laws by design, because the random bits
    depend on the leaf: `grouped_is_the_same_where_it_says_so` and
    `exact_rows_is_dense_or_refuses`.

    >>> import adamjax, numpy as np
    >>> def reference(g, step):
    ...     return (np.clip(g, -0.5, 0.5),)
    >>> tx = adamjax.clip_by_value(0.5)
    >>> adamjax.testing.check(tx, reference, ["follows_the_reference"])
    >>> try:
    ...     adamjax.testing.check(adamjax.scale(0.5), reference, ["follows_the_reference"])
    ... except AssertionError as error:
    ...     print(str(error)[:59])
    scale(factor=0.5) breaks the law follows_the_reference (Upd
    """
    names = list(LAWS if laws is None else laws)
    if reference is None and names == ["follows_the_reference"]:
        raise ValueError("the law 'follows_the_reference' needs a reference: check(tx, reference)")
    trial, broken, faults = Trial(tx, params, reference), [], set[str]()
    for name in names:
        try:
            try_law(name, trial)
        except AssertionError as error:
            start, end, fault = str(error).partition(f"({LAWS[name]}): ")
            if fault in faults:
                error = AssertionError(f"{start}{end}the same")
            faults.add(fault)
            broken.append(error)
    if len(broken) == 1:
        raise broken[0]
    if broken:
        # Python shows the traceback of only one cause. It is the first broken law.
        raise AssertionError("\n\n".join(map(str, broken))) from broken[0]
