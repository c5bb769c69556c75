"""`accumulate_gradients` and `skip_not_finite`, alone and nested."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, assert_same, float0

from adamjax import (
    accumulate_gradients,
    adam,
    adamax,
    adamw,
    add_decayed_weights,
    apply_updates,
    averaged_weights,
    chain,
    clip_by_global_norm,
    clip_by_value,
    cosine_decay,
    exact_rows,
    identity,
    masked,
    partition,
    row_gradient,
    scale,
    scale_by_adam,
    scale_by_adamax,
    scale_by_learning_rate,
    skip_not_finite,
    skipped_steps,
    step_count,
    weight_ema,
    with_hyperparams,
)
from adamjax.states import AccumulateGradientsState, SkipNotFiniteState

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def draw(t, dtype=jnp.float32):
    rng = np.random.default_rng(t)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), PARAMS)


def updates_of(tx, gradients):
    """The updates of a scalar, and the state at the end."""
    state, all_updates = tx.init(jnp.array(0.0)), []
    for g in gradients:
        updates, state = tx.update(jnp.array(g), state)
        all_updates.append(float(updates))
    return all_updates, state


def pipeline():
    return chain(
        clip_by_global_norm(0.5),
        scale_by_adam(),
        add_decayed_weights(0.1),
        scale_by_learning_rate(cosine_decay(0.1, 10)),
        weight_ema(0.9),
    )


# --- accumulate_gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, jnp.array(3), 3.0])
@pytest.mark.slow
def test_a_step_is_the_inner_step_with_the_mean(steps):
    """Clip, decay, average and count act only on the real step, on the mean over the calls."""
    tx, inner, n = accumulate_gradients(pipeline(), steps), pipeline(), int(steps)
    params = expected = PARAMS
    state, inner_state = tx.init(params), inner.init(params)
    update, inner_update = jax.jit(tx.update), jax.jit(inner.update)
    for t in range(3 * n):
        before = state
        updates, state = update(draw(t), state, params)
        params = apply_updates(params, updates)
        if (t + 1) % n:
            assert_same(updates, ZEROS)
            assert_same(state.inner, before.inner)
            assert int(state.micro_count) == (t + 1) % n
        else:
            micro = [draw(t - i) for i in range(n)]
            mean = jax.tree.map(lambda *gs: sum(gs) / n, *micro)
            inner_updates, inner_state = inner_update(mean, inner_state, expected)
            expected = apply_updates(expected, inner_updates)
            assert_close(updates, inner_updates, rtol=2e-5)
            assert_close(state.inner, inner_state, rtol=2e-5)
            assert_same(state.total, ZEROS)
            assert int(state.micro_count) == 0
        assert int(step_count(state)) == (t + 1) // n
    assert_close(averaged_weights(state), averaged_weights(inner_state), rtol=2e-5)


def test_the_mean_is_clipped():
    """The mean of the clipped gradients would be 0."""
    updates, _ = updates_of(accumulate_gradients(clip_by_value(1.0), 2), (10.0, -9.5))
    assert updates == [0.0, 0.25]


def test_low_precision_gradients_are_summed_in_float32():
    """256 + 1 is 256 in bfloat16, and 60000 + 60000 is infinite in float16."""
    tx = accumulate_gradients(scale(1.0), 300)
    grads = jnp.array([1.0, 2.0**-9], jnp.bfloat16)
    state = tx.init(grads)
    assert state.total.dtype == jnp.float32
    update = jax.jit(tx.update)
    for _ in range(300):
        updates, state = update(grads, state)
    assert_same(updates, grads)

    large = jnp.array([6e4], jnp.float16)
    tx = accumulate_gradients(identity(), 2)
    _, state = tx.update(large, tx.init(large))
    assert_same(tx.update(large, state)[0], large)


def test_the_sum_of_a_leaf_is_kept_if_the_call_that_takes_the_step_has_no_gradient():
    tx = accumulate_gradients(scale(1.0), 2)
    state = tx.init(PARAMS)
    _, state = tx.update({"w": jnp.array([2.0, 4.0]), "b": jnp.array(6.0)}, state)
    updates, state = tx.update({"w": jnp.array([4.0, 6.0]), "b": None}, state)
    assert updates["b"] is None
    assert_same(updates["w"], jnp.array([3.0, 5.0]))
    assert_same(state.total, {"w": jnp.zeros(2), "b": jnp.array(6.0)})
    _, state = tx.update({"w": jnp.array([2.0, 4.0]), "b": None}, state)
    updates, state = tx.update({"w": jnp.array([2.0, 4.0]), "b": jnp.array(2.0)}, state)
    assert float(updates["b"]) == 4.0


def test_a_gradient_whose_step_is_late_counts_as_much_as_any_other():
    """A leaf has a gradient in seven of ten calls. Its updates add up to half of their sum."""
    tx = accumulate_gradients(scale(1.0), 2)
    state, moved = tx.init(PARAMS), 0.0
    for t in range(10):
        b = None if t in (1, 4, 5) else jnp.array(2.0**t)
        updates, state = tx.update({"w": jnp.ones(2), "b": b}, state)
        moved += 0.0 if b is None else float(updates["b"])
    assert moved == sum(2.0**t for t in range(10) if t not in (1, 4, 5)) / 2


def test_the_sum_is_divided_by_the_number_of_calls_even_if_steps_changes():
    many, few = (accumulate_gradients(scale(1.0), steps) for steps in (4, 2))
    _, state = updates_of(many, (1.0, 2.0, 3.0))
    assert float(few.update(jnp.array(6.0), state)[0]) == 3.0


@pytest.mark.slow
def test_a_traced_number_of_steps_below_1_makes_nan():
    g = jnp.ones(2)

    def first(steps):
        tx = accumulate_gradients(scale(2.0), steps)
        return tx.update(g, tx.init(g))[0]

    for steps, expected in ((1, 2.0), (2, 0.0), (jnp.uint32(3_000_000_000), 0.0)):
        np.testing.assert_array_equal(jax.jit(first)(steps), jnp.full(2, expected))
    for bad in (0, -1):
        assert np.isnan(jax.jit(first)(bad)).all()
    with pytest.raises(ValueError, match=r"steps is an array of shape \(2,\).*vmap"):
        first(jnp.array([1, 2]))
    np.testing.assert_array_equal(jax.vmap(first)(jnp.array([1, 2]))[:, 0], [2.0, 0.0])


# --- skip_not_finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counter(dtype):
    params = {**PARAMS, "w": PARAMS["w"].astype(dtype)}
    tx = skip_not_finite(pipeline())
    update = jax.jit(tx.update)
    good = {"w": jnp.ones(2, dtype), "b": jnp.array(1.0)}
    _, state = update(good, tx.init(params), params)
    for count, bad in enumerate((jnp.nan, jnp.inf, -jnp.inf), start=1):
        for grads in (
            {**good, "w": good["w"].at[1].set(bad)},
            {**good, "b": jnp.array(bad)},
        ):
            updates, after = update(grads, state, params)
            assert_same(updates, jax.tree.map(jnp.zeros_like, good))
            assert_same(after.inner, state.inner)
            assert int(skipped_steps(after)) == count
        state = after
    updates, after = update(good, state, params)
    assert int(skipped_steps(after)) == 3
    assert int(step_count(after)) == 2
    assert np.all(np.asarray(updates["w"]) != 0)


@pytest.mark.slow
def test_finite_steps_are_the_inner_steps():
    """The trajectory is that of the finite gradients alone."""
    tx, inner = skip_not_finite(pipeline()), pipeline()
    params = expected = PARAMS
    state, inner_state = tx.init(params), inner.init(params)
    update, inner_update = jax.jit(tx.update), jax.jit(inner.update)
    for t in range(6):
        grads = draw(t)
        if t in (1, 2, 4):
            grads = {**grads, "b": jnp.array(jnp.nan)}
        else:
            inner_updates, inner_state = inner_update(grads, inner_state, expected)
            expected = apply_updates(expected, inner_updates)
        updates, state = update(grads, state, params)
        params = apply_updates(params, updates)
    assert_close(params, expected, rtol=1e-6)
    assert_close(state.inner, inner_state, rtol=1e-6)
    assert int(skipped_steps(state)) == 3


def test_a_step_with_finite_gradients_of_an_infinite_norm_is_not_skipped():
    tx = skip_not_finite(scale(-1.0))
    updates, state = tx.update(jnp.array([1e30, 3e38]), tx.init(jnp.zeros(2)))
    assert int(skipped_steps(state)) == 0
    assert_same(updates, jnp.array([-1e30, -3e38]))


def test_the_counter_stays_at_the_largest_int32():
    largest = jnp.array(jnp.iinfo(jnp.int32).max, jnp.int32)
    tx = skip_not_finite(identity())
    state = SkipNotFiniteState(largest, tx.init(PARAMS).inner)
    _, state = tx.update({**PARAMS, "b": jnp.array(jnp.nan)}, state)
    assert_same(state.skipped, largest)


def test_leaves_that_are_left_alone_never_skip_a_step():
    """`None`, integers and float0 stay as they are."""
    params = {"w": jnp.ones(2), "n": jnp.arange(2), "m": jnp.arange(2), "none": jnp.ones(1)}
    tx = skip_not_finite(accumulate_gradients(adam(), 1))
    grads = {"w": jnp.ones(2), "n": float0((2,)), "m": jnp.zeros(2, jnp.int32), "none": None}
    for good in (1.0, jnp.nan):
        updates, state = tx.update({**grads, "w": good * grads["w"]}, tx.init(params), params)
        assert updates["none"] is None
        assert updates["n"] is grads["n"]
        assert_same(updates["m"], grads["m"])
        assert int(skipped_steps(state)) == int(good != 1.0)


def test_an_integer_gradient_of_a_float_is_refused():
    params = {"w": jnp.ones(2)}
    for tx in (skip_not_finite(adam()), accumulate_gradients(adam(), 2)):
        with pytest.raises(ValueError, match=r"grads\['w'\] is int32\[2\].*floating"):
            tx.update({"w": jnp.ones(2, jnp.int32)}, tx.init(params), params)


# --- rows ---------------------------------------------------------------------------------------

ROWS = 9
TABLE = {"b": jnp.array([1.0, -1.0]), "t": jnp.arange(2.0 * ROWS).reshape(ROWS, 2) / ROWS}


def draw_rows(t):
    """Gradients of at most three rows: row 3 is read twice, row 8 never; an index is outside."""
    rng = np.random.default_rng(t)
    ids = jnp.asarray([*rng.integers(0, 8, 2), 3, 3, -1])
    values = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
    rows = row_gradient(ids, values, ROWS)
    return {"b": jnp.asarray(rng.normal(size=2), jnp.float32), "t": rows}


def dense(grads):
    return {**grads, "t": grads["t"].to_dense()}


@pytest.mark.parametrize("max_rows", [None, 6, [("b|t", 6)]], ids=str)
def test_the_inner_step_gets_the_mean_of_row_gradients(max_rows):
    """The inner step equals one with the mean of dense gradients. After it, the sum is empty."""
    tx, inner = accumulate_gradients(pipeline(), 2, max_rows), pipeline()
    params = expected = TABLE
    state, inner_state = tx.init(params), inner.init(params)
    assert hasattr(state.total["t"], "indices") == (max_rows is not None)
    assert not hasattr(state.total["b"], "indices")
    update, inner_update = jax.jit(tx.update), jax.jit(inner.update)
    for t in range(6):
        before = params, state.inner
        updates, state = update(draw_rows(t), state, params)
        params = apply_updates(params, updates)
        if t % 2 == 0:
            assert_same((params, state.inner), before)
            assert int(state.micro_count) == 1
            continue
        micro = [dense(draw_rows(t - i)) for i in range(2)]
        mean = jax.tree.map(lambda *gs: sum(gs) / 2, *micro)
        inner_updates, inner_state = inner_update(mean, inner_state, expected)
        expected = apply_updates(expected, inner_updates)
        assert_close((params, state.inner), (expected, inner_state))
        assert_same(jax.tree.leaves(state.total), jax.tree.leaves(tx.init(TABLE).total))


def test_accumulated_rows_are_summed_in_float32():
    """In bfloat16, 1 + 2**-9 would be 1."""
    tx, table = accumulate_gradients(scale(1.0), 257, max_rows=1), jnp.zeros((3, 1), jnp.bfloat16)
    state = tx.init(table)
    assert state.total.dtype == jnp.float32
    update = jax.jit(tx.update)
    for value in [1.0] + [2.0**-9] * 256:
        rows = row_gradient(jnp.array([1]), jnp.full((1, 1), value, jnp.bfloat16), 3)
        updates, state = update(rows, state)
    assert updates.dtype == jnp.bfloat16
    assert_same(updates.to_dense()[1, 0], jnp.bfloat16(1.5 / 257))


def after_too_many_rows(inner):
    """The table's updates in a step with three rows but room for two, and in the next; the state.

    In the next step, the gradients of row 4 add up to 3, and that of row 5 is 1.
    """
    tx = accumulate_gradients(inner, 2, max_rows=2)
    state, update = tx.init(TABLE), jax.jit(tx.update)

    def rows(*ids):
        values = jnp.ones((len(ids), 2))
        return {"b": jnp.ones(2), "t": row_gradient(jnp.array(ids), values, ROWS)}

    table_updates = []
    for first, second in ((rows(1, 2), rows(2, 4)), (rows(4, 4), rows(5, 4))):
        _, state = update(first, state)
        updates, state = update(second, state)
        table_updates.append(np.asarray(updates["t"].to_dense()))
    return *table_updates, state


# The means of the gradients of that next step.
NEXT_UPDATES = np.zeros((ROWS, 2))
NEXT_UPDATES[4], NEXT_UPDATES[5] = 1.5, 0.5


@pytest.mark.slow
def test_if_more_rows_are_read_than_max_rows_all_summed_rows_become_nan():
    """The next step is right again."""
    updates, next_updates, _ = after_too_many_rows(identity())
    assert np.all(np.isnan(updates[[1, 2]]))
    assert not np.any(updates[[0, 3, 5, 6, 7, 8]])
    np.testing.assert_array_equal(next_updates, NEXT_UPDATES)


@pytest.mark.slow
def test_skip_not_finite_skips_a_step_with_more_rows_than_max_rows():
    updates, next_updates, state = after_too_many_rows(skip_not_finite(identity()))
    assert int(skipped_steps(state)) == 1
    assert not np.any(updates)
    np.testing.assert_array_equal(next_updates, NEXT_UPDATES)


def test_the_sum_of_a_table_is_kept_if_the_call_that_takes_the_step_has_no_gradient():
    tx = accumulate_gradients(scale(1.0), 2, max_rows=4)
    _, state = tx.update(draw_rows(0), tx.init(TABLE))
    updates, after = tx.update({**draw_rows(1), "t": None}, state)
    assert updates["t"] is None
    assert_same(jax.tree.leaves(after.total["t"]), jax.tree.leaves(state.total["t"]))


def test_a_dense_gradient_of_a_table_with_max_rows_is_refused():
    tx = accumulate_gradients(scale(1.0), 2, max_rows=4)
    with pytest.raises(ValueError, match=r"max_rows makes room.*\(9, 2\), but got a dense one"):
        tx.update(dense(draw_rows(0)), tx.init(TABLE))


def test_max_rows_must_be_a_whole_number_or_whole_numbers_for_patterns():
    for bad in (0, -1, 1.5, "t", [("t", 0)], [("t", 1.5)], True, {}, []):
        with pytest.raises(ValueError, match=r"accumulate_gradients: max_rows must be a whole"):
            accumulate_gradients(scale(1.0), 2, max_rows=bad)
    for of_numpy, plain in ((np.int64(4), 4), ({"t": np.int32(4)}, [("t", 4)])):
        tx = accumulate_gradients(scale(1.0), 2, max_rows=of_numpy)
        same = accumulate_gradients(scale(1.0), 2, max_rows=plain)
        assert tx == same
        assert hash(tx) == hash(same)


def test_a_table_with_no_more_rows_than_max_rows_is_accumulated_densely():
    state = accumulate_gradients(scale(1.0), 2, max_rows=ROWS).init(TABLE)
    assert not hasattr(state.total["t"], "indices")


def lazy_adam(rows="lazy"):
    return chain(scale_by_adam(b1=0.5, b2=0.0, eps_hat=1.0, rows=rows), scale(-1.0))


LAZY = {
    "plain": lazy_adam,
    "adamax": lambda: chain(scale_by_adamax(b1=0.5, b2=0.0, eps=1.0), scale(-1.0)),
    "masked": lambda: masked(lazy_adam(), "t|b"),
    "partition": lambda: partition([("t", lazy_adam())], default=lazy_adam("dense")),
    "with_hyperparams": lambda: with_hyperparams(lazy_adam(), factor=-1.0),
    "skip_not_finite": lambda: skip_not_finite(chain(clip_by_value(9.0), lazy_adam())),
}


def after_two_steps(inner, max_rows, as_gradient=lambda rows: rows):
    """The parameters after a step on rows 1 and 2 of a table, and one on row 2."""
    tx = accumulate_gradients(inner, 2, max_rows)
    params = {"b": jnp.zeros(2), "t": jnp.zeros((4, 1))}
    state, update = tx.init(params), jax.jit(tx.update)
    for ids in ((1, 2), (2, 2), (2, 4), (2, -1)):
        rows = row_gradient(jnp.array(ids), jnp.ones((2, 1)), 4)
        updates, state = update({"b": jnp.ones(2), "t": as_gradient(rows)}, state, params)
        params = apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(x, marks=pytest.mark.slow) for x in LAZY if x != "plain")]
)
def test_a_lazy_rule_stays_lazy_whatever_max_rows_is(name):
    """Row 1 has a mean of 0.5 in the first step only. Row 2 has means of 1.5 and 1."""
    results = [after_two_steps(LAZY[name](), rows) for rows in ({"t": 3}, {"t": 4}, {"t": 99}, 99)]
    m_of_row_2 = (0.25 * 1.5 + 0.5 * 1.0) / (1 - 0.5**2)  # after both steps
    expected = [0, -0.5 / 1.5, -1.5 / 2.5 - m_of_row_2 / 2.0, 0]
    np.testing.assert_allclose(results[0]["t"][:, 0], expected, rtol=1e-6)
    for result in results[1:]:
        assert_same(result, results[0])


def test_with_room_for_all_rows_a_lazy_rule_accepts_dense_gradients():
    """Such as those of a small kernel. The steps are those without `max_rows`, bit by bit."""
    params = after_two_steps(lazy_adam(), 4, lambda rows: rows.to_dense())
    assert_same(params, after_two_steps(lazy_adam(), None, lambda rows: rows.to_dense()))
    assert float(params["t"][1, 0]) < -0.5 / 1.5  # its momentum moves it in the second step


def test_a_dense_sum_that_would_move_every_row_is_refused():
    """The rules of other leaves do not matter, nor those of tables of `exact_rows`."""
    message = r"grads\['t'\] is a row gradient.*would move every row.*{'t': rows}.*rows=\"dense\""
    for inner in (*(make() for make in LAZY.values()), accumulate_gradients(lazy_adam(), 1, 4)):
        tx = accumulate_gradients(inner, 2)
        with pytest.raises(ValueError, match=message):
            tx.update(draw_rows(0), tx.init(TABLE), TABLE)
    for inner in (
        partition([("t", lazy_adam("dense"))], default=lazy_adam()),
        exact_rows(adamax(0.1), "t"),
        scale(-1.0),
    ):
        tx = accumulate_gradients(inner, 2)
        tx.update(draw_rows(0), tx.init(TABLE), TABLE)


def test_updates_of_a_lazy_rule_before_accumulate_gradients_need_max_rows():
    """With `max_rows`, weight decay moves only the rows that were read."""
    for max_rows in (None, {"t": 6}):
        inside = accumulate_gradients(add_decayed_weights(1.0), 1, max_rows)
        tx = chain(scale_by_adam(rows="lazy"), inside)
        state = tx.init(TABLE)
        if max_rows is None:
            with pytest.raises(
                ValueError, match=r"grads\['t'\].*before this.*put that rule inside"
            ):
                tx.update(draw_rows(0), state, TABLE)
        else:
            updates, _ = tx.update(draw_rows(0), state, TABLE)
            assert not np.any(updates["t"].to_dense()[8])


def test_a_lazy_rule_with_the_state_of_a_dense_rule_refuses_row_gradients():
    """The sum in that state is a dense array, so dense gradients are accepted."""
    tx, dense_tx = (accumulate_gradients(lazy_adam(rows), 2, 64) for rows in ("lazy", "dense"))
    state = dense_tx.init(TABLE)
    tx.update(dense(draw_rows(0)), state, TABLE)
    with pytest.raises(ValueError, match=r"grads\['t'\].*put the state's inner into a new state"):
        tx.update(draw_rows(0), state, TABLE)


@pytest.mark.parametrize("rows", ["dense", "lazy"])
@pytest.mark.slow
def test_a_row_gradient_that_is_not_finite_is_skipped(rows):
    """Whichever row is not finite. The next good gradients act as if the bad ones had not come."""
    inner = chain(adamw(0.1, rows=rows), weight_ema(0.9))
    tx, params, expected = skip_not_finite(inner), TABLE, TABLE
    state, inner_state = tx.init(params), inner.init(params)
    update, inner_update = jax.jit(tx.update), jax.jit(inner.update)
    for t in range(4):
        good = draw_rows(t)
        for bad in (jnp.nan, jnp.inf):
            first = good["t"].replace(values=good["t"].values.at[0, 1].set(bad))
            second = good["t"].replace(values=good["t"].values.at[1, 0].set(bad))
            for faulty in (first, second):
                updates, after = update({**good, "t": faulty}, state, params)
                assert_same(apply_updates(params, updates), params)
                assert_same(after.inner, state.inner)
                assert int(skipped_steps(after)) == int(skipped_steps(state)) + 1
                state = after
        updates, state = update(good, state, params)
        params = apply_updates(params, updates)
        inner_updates, inner_state = inner_update(good, inner_state, expected)
        expected = apply_updates(expected, inner_updates)
    assert_close((params, state.inner), (expected, inner_state))
    assert int(skipped_steps(state)) == 16


def test_nan_at_an_index_outside_the_table_skips_no_step():
    tx = skip_not_finite(scale(-1.0))
    rows = row_gradient(jnp.array([-1, 2]), jnp.array([[jnp.nan] * 2, [1.0] * 2]), ROWS)
    updates, state = tx.update(rows, tx.init(TABLE["t"]))
    assert int(skipped_steps(state)) == 0
    assert_same(updates.to_dense(), jnp.zeros((ROWS, 2)).at[2].set(-1))


WRAPPERS = {
    "skip": lambda tx, **options: skip_not_finite(tx),
    "accumulate": lambda tx, **options: accumulate_gradients(tx, 2, **options),
    "both": lambda tx, **options: skip_not_finite(accumulate_gradients(tx, 2, **options)),
}


@pytest.mark.parametrize("has_ticket", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.slow
def test_around_exact_rows(wrapper, has_ticket):
    """The steps are those of the wrapper around the dense optimizer.

    If `has_ticket`, each step has a ticket from the `exact_rows` inside.
    """
    wrap, dense_inner = WRAPPERS[wrapper], adamw(0.1, weight_decay=0.1)
    bad_steps = () if wrapper == "accumulate" else (3, 4)
    exact = exact_rows(dense_inner, "t", history=256)
    tx, dense_tx = wrap(exact, max_rows=6), wrap(dense_inner)
    params = expected = TABLE
    state, dense_state = tx.init(params), dense_tx.init(params)

    def state_of_exact(state):
        return state if hasattr(state, "rings") else state_of_exact(state.inner)

    @jax.jit
    def step(params, state, grads):
        extra_args = {}
        if has_ticket:
            indices = {"t": grads["t"].indices}
            _, extra_args["ticket"] = exact.prepare(params, state_of_exact(state), indices)
        updates, state = tx.update(grads, state, params, **extra_args)
        return apply_updates(params, updates), state

    dense_update = jax.jit(dense_tx.update)
    for t in range(12):
        grads = draw_rows(t)
        if t in bad_steps:
            grads = {**grads, "b": grads["b"].at[0].set(jnp.nan)}
        before = params
        params, state = step(params, state, grads)
        updates, dense_state = dense_update(dense(grads), dense_state, expected)
        expected = apply_updates(expected, updates)
        if t in bad_steps:
            assert_same(params, before)
        rows = exact.lookup(params, state_of_exact(state), "t", jnp.arange(ROWS))
        assert_close({**params, "t": rows}, expected, rtol=1e-6)
    assert int(step_count(state)) == int(step_count(dense_state)) > 4
    flushed, _ = exact.flush(params, state_of_exact(state))
    assert_close(flushed, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("before", "after"), [(None, 3), (3, None), (3, 4)], ids=lambda rows: f"max_rows={rows}"
)
def test_a_state_that_was_made_with_another_max_rows_is_refused(before, after):
    old, new = (accumulate_gradients(adam(), 2, max_rows=rows) for rows in (before, after))
    with pytest.raises(ValueError, match=r"the state accumulates 't' in .*, expected .*max_rows="):
        new.update(draw_rows(0), old.init(TABLE), TABLE)


@pytest.mark.slow
def test_a_ticket_reaches_exact_rows_inside_skip_not_finite():
    """A changed ticket changes the updates, so the ticket is used."""
    exact, grads = exact_rows(adam(0.1), "t", history=256), draw_rows(0)
    tx = skip_not_finite(exact)
    state = tx.init(TABLE)
    _, ticket = exact.prepare(TABLE, state.inner, {"t": grads["t"].indices})
    grads = {**grads, "t": ticket.row_gradient("t", grads["t"].values)}
    rows = ticket.rows["t"]
    forged = ticket.replace(rows={"t": rows._replace(moved=rows.moved + 10)})
    without, right, wrong = (
        tx.update(grads, state, TABLE, ticket=x)[0]["t"] for x in (None, ticket, forged)
    )
    assert_same(right, without)
    (wrong,), (right,) = wrong.parts, right.parts
    in_table = np.asarray(right.indices < ROWS)
    np.testing.assert_allclose((wrong.values - right.values)[in_table], 10.0, rtol=1e-6)


# --- nested -------------------------------------------------------------------------------------


def test_skip_outside_drops_the_micro_batch():
    tx = skip_not_finite(accumulate_gradients(scale(1.0), 2))
    updates, state = updates_of(tx, (1.0, np.nan, 3.0, np.inf, 5.0, 7.0))
    assert updates == [0.0, 0.0, 2.0, 0.0, 0.0, 6.0]
    assert int(skipped_steps(state)) == 2


def test_skip_inside_drops_the_whole_step_and_clears_the_sum():
    tx = accumulate_gradients(skip_not_finite(scale(1.0)), 2)
    updates, state = updates_of(tx, (1.0, np.nan, 3.0, 5.0))
    assert updates == [0.0, 0.0, 0.0, 4.0]
    assert int(skipped_steps(state)) == 1


def test_accumulate_gradients_inside_accumulate_gradients():
    tx = accumulate_gradients(accumulate_gradients(scale(1.0), 2), 2)
    updates, state = updates_of(tx, (1.0, 3.0, 5.0, 7.0))
    assert isinstance(state.inner, AccumulateGradientsState)
    assert updates == [0.0, 0.0, 0.0, 4.0]


@pytest.mark.slow
def test_optax_inside_ours_moves_as_inside_the_wrappers_of_optax():
    for ours, theirs in (
        (accumulate_gradients(optax.adamw(0.1), 2), optax.MultiSteps(optax.adamw(0.1), 2)),
        (skip_not_finite(optax.adamw(0.1)), optax.apply_if_finite(optax.adamw(0.1), 9)),
    ):
        params = expected = PARAMS
        state, their_state = ours.init(params), theirs.init(params)
        update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
        for t in range(4):
            grads = draw(t)
            updates, state = update(grads, state, params)
            params = apply_updates(params, updates)
            updates, their_state = their_update(grads, their_state, expected)
            expected = apply_updates(expected, updates)
        assert_close(params, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_wrapped_chains_round_once(dtype):
    """The steps are computed in float32, from the mean of the micro-batches to the update."""
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    tx = accumulate_gradients(skip_not_finite(adamw(0.1)), 3)
    state, wide_state = tx.init(params), tx.init(wide)
    update = jax.jit(tx.update)
    for t in range(6):
        grads = draw(t, dtype)
        updates, state = update(grads, state, params)
        widened = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        wide_updates, wide_state = update(widened, wide_state, wide)
        assert_same(updates, jax.tree.map(lambda u: u.astype(dtype), wide_updates))
    assert_same(state, wide_state)


@pytest.mark.parametrize("wrapper", [skip_not_finite, lambda tx: accumulate_gradients(tx, 2)])
def test_calls_outside_of_jit_compile_nothing_anew(wrapper):
    tx, compiled = wrapper(adamw(0.1)), []
    state = tx.init(PARAMS)

    def four_steps(state):
        for t in range(4):
            updates, state = tx.update(draw(t), state, PARAMS)
        return updates, state

    _, state = four_steps(state)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    updates, next_state = four_steps(state)
    assert not compiled
    expected, expected_state = jax.jit(four_steps)(state)
    assert compiled
    assert_close(updates, expected)
    assert_close(next_state, expected_state)


@pytest.mark.parametrize("steps", [2.4, 0, -1])
def test_a_wrong_number_of_steps_set_by_tree_map_is_refused(steps):
    tx = accumulate_gradients(adamw(0.1), 3)
    edited = jax.tree.map(lambda x: steps if x == 3 else x, tx)
    with pytest.raises(ValueError, match=rf"must be a whole number of at least 1 .*got {steps}"):
        edited.update(draw(0), tx.init(PARAMS), PARAMS)
