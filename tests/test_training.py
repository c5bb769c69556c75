"""`train_step` equals steps by hand; `forward` and `eval_step` read up-to-date rows."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamjax

NUM_ROWS = 20


def params():
    return {
        "table": jnp.linspace(-1, 1, 2 * NUM_ROWS).reshape(NUM_ROWS, 2),
        "w": jnp.array([0.5, -1.0]),
    }


def loss_fn(params, ids, y=0.5):
    return jnp.mean((params["table"][ids] @ params["w"] - y) ** 2)


def with_aux(params, ids, y=0.5):
    return loss_fn(params, ids, y), {"ids": ids, "largest": jnp.max(params["w"])}


IDS = [jnp.array(x) for x in ([1, 2, 2], [3, 1, 0], [9, 9, 19], [1, 1, 1])]


def trained_by_hand(tx):
    """The parameters and losses of dense steps without `train_step`."""
    p, losses = params(), []
    state = tx.init(p)
    for ids in IDS:
        loss, grads = jax.value_and_grad(loss_fn)(p, ids)
        updates, state = tx.update(grads, state, p)
        p = adamjax.apply_updates(p, updates)
        losses.append(loss)
    return p, losses


def trained(tx, **options):
    """The parameters, losses and state of steps of `train_step`."""
    p, losses = params(), []
    state, step = tx.init(p), adamjax.train_step(loss_fn, tx, **options)
    for ids in IDS:
        p, state, loss = step(p, state, ids)
        losses.append(loss)
    return p, losses, state


def assert_near(actual, expected):
    """Weights and losses, up to rounding."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("tx", "tables"),
    [(adamjax.adamw(0.1), None), (adamjax.adamw(0.1), "table"), (optax.adam(0.1), None)],
    ids=["ours", "ours with row gradients", "optax's"],
)
@pytest.mark.slow
def test_train_step_equals_steps_by_hand(tx, tables):
    p, losses, _ = trained(tx, tables=tables)
    assert_near((p, losses), trained_by_hand(tx))


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: tx,
        lambda tx: adamjax.skip_not_finite(tx),
        lambda tx: adamjax.chain(adamjax.clip_by_value(0.5), tx),
        lambda tx: adamjax.with_hyperparams(tx, learning_rate=0.1),
        lambda tx: adamjax.shard_state(tx, jax.sharding.Mesh(jax.devices()[:1], "x"), "x"),
    ],
    ids=["alone", "skip_not_finite", "chain", "with_hyperparams", "shard_state"],
)
@pytest.mark.slow
def test_the_loss_reads_up_to_date_rows_wherever_exact_rows_is(around):
    dense = adamjax.adamw(0.1)
    tx = around(adamjax.exact_rows(dense, "table"))
    p, losses, _ = trained(tx)
    expected, expected_losses = trained_by_hand(around(dense))
    assert_near(losses, expected_losses)
    # The table lags behind, so without catching up the losses would differ.
    assert not np.allclose(p["table"], expected["table"], rtol=1e-3)


def parts(dense):
    """A partition with a part for each of two tables."""
    return adamjax.partition(
        [("table", adamjax.exact_rows(dense, "table")), ("other", adamjax.exact_rows(dense, ""))],
        default=dense,
    )


@pytest.mark.parametrize(
    "around",
    [
        parts,
        lambda dense: adamjax.chain(
            adamjax.masked(dense, "w"),
            adamjax.masked(adamjax.exact_rows(dense, "table"), "table|other"),
        ),
        lambda dense: adamjax.skip_not_finite(parts(dense)),
        lambda dense: adamjax.with_hyperparams(parts(dense)),
    ],
    ids=["partition", "masked", "skip_not_finite", "with_hyperparams"],
)
@pytest.mark.slow
def test_the_loss_reads_up_to_date_rows_of_exact_rows_in_parts(around):
    """Each `exact_rows` is in a part that sees only its own leaves."""

    def loss(params, ids):
        return loss_fn(params, ids) + jnp.mean(params["other"][ids + 1] ** 2)

    dense = adamjax.adamw(0.1)
    tx = around(dense)
    start = {**params(), "other": jnp.linspace(-1, 1, NUM_ROWS)[:, None]}
    p, expected = jax.tree.map(jnp.copy, start), start
    state, dense_state = tx.init(p), dense.init(start)
    step = adamjax.train_step(loss, tx)
    for ids in IDS * 3:
        p, state, value = step(p, state, ids)
        expected_value, grads = jax.value_and_grad(loss)(expected, ids)
        updates, dense_state = dense.update(grads, dense_state, expected)
        expected = adamjax.apply_updates(expected, updates)
        assert_near(value, expected_value)
    assert not np.allclose(p["table"], expected["table"], rtol=1e-3)  # rows do lag behind
    assert_near(p["w"], expected["w"])


def test_exact_rows_inside_optax_is_refused():
    """`train_step` cannot find it there, so the loss would read rows that lag behind."""
    exact = adamjax.exact_rows(adamjax.adam(0.1), "table")
    tx = optax.chain(optax.clip(1.0), optax.GradientTransformationExtraArgs(*exact))
    with pytest.raises(ValueError, match="If exact_rows is inside another library"):
        adamjax.train_step(loss_fn, tx)(params(), tx.init(params()), IDS[0])


def test_the_state_of_another_transform_is_refused():
    tx = adamjax.skip_not_finite(adamjax.exact_rows(adamjax.adam(0.1), "table"))
    other = adamjax.exact_rows(adamjax.adam(0.1), "table")
    with pytest.raises(TypeError, match="state is an ExactRowsState, expected the SkipNotFinite"):
        adamjax.train_step(loss_fn, tx)(params(), other.init(params()), IDS[0])


@pytest.mark.parametrize("tables", [None, "table"])
def test_leaves_that_are_not_floats_stay_as_they_are(tables):
    tx = adamjax.adamw(0.1)
    not_floats = {
        "n": jnp.array(3),
        "key": jax.random.key(0),
        "flags": jnp.array([True]),
        "gone": None,
    }

    def loss(params, ids):
        return loss_fn(params, ids) * params["n"], jax.random.key_data(params["key"])

    def copied():
        return jax.tree.map(jnp.copy, not_floats | params())

    step = adamjax.train_step(loss, tx, has_aux=True, tables=tables)
    p, _, (value, _) = step(copied(), tx.init(copied()), IDS[0])
    grads = jax.grad(lambda p: 3 * loss_fn(p, IDS[0]))(params())
    updates, _ = tx.update(grads, tx.init(params()), params())
    assert_near({k: p[k] for k in params()}, adamjax.apply_updates(params(), updates))
    assert_near(value, 3 * loss_fn(params(), IDS[0]))
    for name in ("n", "flags"):
        np.testing.assert_array_equal(p[name], not_floats[name])
    assert p["key"] == not_floats["key"]


def test_the_step_returns_aux_and_accepts_arguments_of_the_loss():
    tx = adamjax.adam(0.1)
    step = adamjax.train_step(with_aux, tx, has_aux=True)
    _, _, (loss, aux) = step(params(), tx.init(params()), IDS[0], y=1.0)
    assert_near(loss, loss_fn(params(), IDS[0], 1.0))
    assert aux["largest"] == 0.5
    np.testing.assert_array_equal(aux["ids"], IDS[0])


def test_params_and_state_are_donated_unless_donate_argnums_is_empty():
    tx = adamjax.adam(0.1)
    for options, deleted in ({}, True), ({"donate_argnums": ()}, False):
        p = params()
        state = tx.init(p)
        adamjax.train_step(loss_fn, tx, **options)(p, state, IDS[0])
        assert p["table"].is_deleted() == deleted
        assert state[0].m["table"].is_deleted() == deleted


@pytest.mark.parametrize("tables", [None, "table"])
def test_a_loss_that_is_not_one_real_float_is_refused(tables):
    tx = adamjax.adam(0.1)
    for has_aux, returned, message in (
        (False, lambda loss: (loss, 1), r"the loss must be one real float, got \(.*pass has_aux=T"),
        (False, lambda loss: loss[None], r"one real float, got float32\[1\]; if it returns aux"),
        (False, lambda loss: loss > 0, r"one real float, got bool\[\]"),
        (True, lambda loss: loss, r"with has_aux=True the loss function must return a pair"),
        (True, lambda loss: (loss[None], 1), r"one real float, got float32\[1\](?!;)"),
    ):
        step = adamjax.train_step(
            lambda p, ids, returned=returned: returned(loss_fn(p, ids)),
            tx,
            has_aux=has_aux,
            tables=tables,
        )
        with pytest.raises(TypeError, match=message):
            step(params(), tx.init(params()), IDS[0])


def test_stochastic_rounding_needs_a_count():
    for tx in (optax.sgd(0.1), adamjax.scale(-0.1)):
        step = adamjax.train_step(loss_fn, tx, rounding="stochastic")
        with pytest.raises(ValueError, match=r"rounding='stochastic' needs a count .* step=\.\.\."):
            step(params(), tx.init(params()), IDS[0])


@pytest.mark.parametrize(
    "first",
    [
        adamjax.accumulate_gradients(adamjax.adam(0.1), 64),
        adamjax.skip_not_finite(adamjax.adam(0.1)),
    ],
    ids=["accumulates", "skips"],
)
def test_stochastic_rounding_draws_new_bits_while_a_counter_stands_still(first):
    """Weights move by a twentieth of their spacing. With the same bits in each step, one weight in
    twenty would be rounded up every time, and the others never."""
    tx = adamjax.partition([("still", first)], default=adamjax.scale_by_learning_rate(1.0))
    p = {"still": jnp.ones(2), "w": jnp.ones(1000, jnp.bfloat16)}

    def loss(p, x):
        return jnp.sum(p["still"]) * x - 2.0**-7 / 20 * jnp.sum(p["w"].astype(jnp.float32))

    step, state = adamjax.train_step(loss, tx, rounding="stochastic"), tx.init(p)
    for _ in range(20):
        p, state, _ = step(p, state, jnp.nan)
    steps_up = (np.asarray(p["w"], np.float64) - 1) * 2**7
    # Binomial: a mean of 1 with a standard error of 0.03, a variance of 0.95.
    assert abs(steps_up.mean() - 1) < 0.15
    assert 0.6 < steps_up.var() < 1.4


def test_an_array_that_was_donated_is_named():
    tx = adamjax.adam(0.1)
    step, p = adamjax.train_step(loss_fn, tx), params()
    state = tx.init(p)
    new, new_state, _ = step(p, state, IDS[0])
    for args, name in (
        ((p, new_state), "params"),
        ((new, state), "the state"),
    ):
        with pytest.raises(ValueError, match=rf"train_step: {name}\[.* is deleted, .* go on with"):
            step(*args, IDS[0])


def test_one_array_in_two_places_is_named():
    """The step would donate it twice, or donate it and read it."""
    tx, one = adamjax.adam(0.1), jnp.ones(3)
    twice = {"a": one, "b": one}
    step = adamjax.train_step(lambda p, x=0: jnp.sum(p["a"] * p["b"]) + jnp.sum(x), tx)
    message = r"train_step: params\['b'\] is the same array as params\['a'\], .*jnp.copy"
    with pytest.raises(ValueError, match=message):
        step(twice, tx.init(twice))
    apart = {"a": one, "b": jnp.ones(3)}
    message = (
        r"train_step: the arguments\['(0/)?x'\] is the same array as params\['a'\], .*jnp.copy"
    )
    with pytest.raises(ValueError, match=message):
        step(apart, tx.init(apart), x=one)


def test_a_leaf_that_would_move_uphill_is_refused():
    """In optax, a leaf that a mask leaves out moves by its raw gradient."""
    adam, rule = adamjax.adam(0.1), adamjax.scale_by_adam()
    clip = adamjax.clip_by_global_norm(1.0)
    for tx in (
        adamjax.masked(adam, "^w"),
        adamjax.chain(clip, adamjax.masked(adam, {"w": True, "table": False})),
        adamjax.skip_not_finite(adamjax.masked(adam, "^w")),
        adamjax.partition([("table", rule)], default=adam),
        adamjax.chain(clip, adamjax.exact_rows(rule, "table")),
        adamjax.grouped(adamjax.chain(clip, rule)),
        adamjax.chain(rule, adamjax.scale(0.1)),
    ):
        with pytest.raises(ValueError, match=r"train_step: 'table' would move uphill.*default="):
            adamjax.train_step(loss_fn, tx)(params(), tx.init(params()), IDS[0])


def test_a_leaf_that_stands_still_is_accepted():
    adam, still = adamjax.adam(0.1), adamjax.scale(0.0)
    for tx in (
        adamjax.partition([("^w", adam)], default=adamjax.set_to_zero()),
        adamjax.chain(adamjax.masked(adam, "^w"), adamjax.masked(still, "table")),
        adamjax.chain(adamjax.masked(adam, "^w"), optax.masked(still, {"w": False, "table": True})),
        adamjax.partition([("^w", adam)], default=still),
    ):
        p, _, _ = adamjax.train_step(loss_fn, tx)(params(), tx.init(params()), IDS[0])
        np.testing.assert_array_equal(p["table"], params()["table"])


def test_leaves_that_all_move_downhill_are_accepted():
    adam = adamjax.adam(0.1)
    decayed = adamjax.chain(
        adamjax.scale_by_adam(),
        adamjax.masked(adamjax.add_decayed_weights(0.1), "^w"),
        adamjax.scale_by_learning_rate(0.1),
    )
    for tx in (decayed, adamjax.masked(adam, "w|table"), adamjax.grouped(adam)):
        adamjax.train_step(loss_fn, tx)(params(), tx.init(params()), IDS[0])


def test_the_argument_tables_is_refused_with_exact_rows():
    tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    with pytest.raises(ValueError, match=r"exact_rows has its own tables, \['table'\]"):
        adamjax.train_step(loss_fn, tx, tables="table")(params(), tx.init(params()), IDS[0])


def test_strict_refuses_a_table_that_is_used_as_a_whole():
    def loss(params, ids):
        return jnp.sum(tied(params, ids))

    for tx, tables in (
        (adamjax.exact_rows(adamjax.adam(0.1), "table"), None),
        (adamjax.adam(0.1), "table"),
    ):
        step = adamjax.train_step(loss, tx, tables=tables, strict=True)
        with pytest.raises(ValueError, match="dot_general"):
            step(params(), tx.init(params()), IDS[0])


@pytest.mark.parametrize("how", ["called", "keyword", "lowered", "traced", "shapes"])
@pytest.mark.parametrize("odd", [jnp.tanh, "gelu", object()])
def test_a_model_with_leaves_that_are_not_arrays_is_refused(how, odd):
    """JAX refuses it before it traces the step; our error adds the leaf and what to do."""
    tx, ids = adamjax.adam(0.1), IDS[0]
    step, state = adamjax.train_step(loss_fn, tx), tx.init(params())
    model = {**params(), "act": odd}
    calls = {
        "called": lambda: step(model, state, ids),
        "keyword": lambda: step(model, state, ids=ids),
        "lowered": lambda: step.lower(model, state, ids),
        "traced": lambda: step.trace(model, state, ids),
        "shapes": lambda: step.eval_shape(model, state, ids),
    }
    with pytest.raises(TypeError, match=r"train_step: params\['act'\] is an? .*eqx.filter\(model"):
        calls[how]()


def test_other_type_errors_of_jax_are_raised_unchanged():
    tx = adamjax.adam(0.1)
    step, state = adamjax.train_step(loss_fn, tx), tx.init(params())
    with pytest.raises(TypeError, match=r"not a valid JAX|abstract array"):
        step(params(), state, "ids")
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: .state."):
        step(params())


def test_a_train_step_has_the_attributes_of_a_jitted_function():
    tx = adamjax.adam(0.1)
    step, p = adamjax.train_step(loss_fn, tx), params()
    assert isinstance(step, jax.stages.Wrapped)
    assert isinstance(copy.copy(step), jax.stages.Wrapped)
    assert step.__name__ == "step"
    assert "stablehlo" in step.lower(p, tx.init(p), IDS[0]).as_text()
    step(p, tx.init(p), IDS[0])


# --- forward and eval_step ------------------------------------------------------------------------

MANY_ROWS = 300  # the steps below read few of them


def two_tables(dtype=jnp.float32):
    return {
        "table": jnp.linspace(-1, 1, 2 * MANY_ROWS).reshape(MANY_ROWS, 2).astype(dtype),
        "other": jnp.linspace(2, -1, 3 * MANY_ROWS).reshape(MANY_ROWS, 3).astype(dtype),
        "w": jnp.array([0.5, -1.0], dtype),
    }


def dot_products(params, ids):
    return params["table"][ids] @ params["w"]


def bags(params, ids):
    """Sums of two rows each. An index outside the table gives a row of zeros."""
    rows = jnp.take(params["table"], ids, axis=0, mode="fill", fill_value=0)
    return jax.ops.segment_sum(rows, jnp.arange(len(ids)) // 2, num_segments=3)


def reads_both(params, ids):
    return params["table"][ids].sum(axis=1) + params["other"][ids + 1][:, 1]


def reads_in_loop(params, ids):
    """Reads rows in a loop; the index into the second table depends on a row of the first."""

    def body(total, i):
        row = params["table"][i]
        following = jnp.clip((row[0] * 10).astype(jnp.int32) + 20, 0, MANY_ROWS - 1)
        return total + row.sum() + params["other"][following].sum(), row

    return jax.lax.scan(body, jnp.zeros((), params["w"].dtype), ids)


def returns_tree(params, ids):
    rows = jax.vmap(lambda i: params["table"][i])(ids)
    return {"rows": rows, "ids": ids, "none": None, "name": "text", "half": 0.5}


def tied(params, ids):
    """Uses the table as a whole, as output weights."""
    return params["table"][ids] @ params["table"].T


FUNCTIONS = (dot_products, bags, reads_both, reads_in_loop, returns_tree, tied)
READ_IDS = jnp.array([1, 2, 250, 2, 299, MANY_ROWS])  # the last index is outside the table


def loss_on_both(params, ids):
    return jnp.mean(reads_both(params, ids) ** 2) + jnp.sum(params["w"] ** 2)


def six_steps(tx, params, loss=loss_on_both):
    """The parameters and the state after six steps; then most rows lag behind."""
    state, step = tx.init(params), adamjax.train_step(loss, tx)
    for ids in ([1, 2, 2], [3, 250, 0], [9, 9, 298], [7, 1, 7], [7, 8, 7], [4, 5, 6]):
        params, state, _ = step(params, state, jnp.array(ids))
    return params, state


def assert_outputs_near(actual, expected, dtype=jnp.float32):
    """Equal up to rounding; strings in the trees must be equal."""
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype == jnp.float32 else {"rtol": 0.01}
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if isinstance(b, str):
            assert a == b
            continue
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), **tolerance)


@functools.cache
def after_training(make, dtype=jnp.float32):
    """The transform that `make` makes; the parameters and the state after `six_steps`."""
    tx = make()
    return tx, *six_steps(tx, two_tables(dtype))


def both_exact():
    return adamjax.exact_rows(adamjax.adamw(0.1), ["table", "other"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.slow
def test_forward_equals_a_call_after_flush(fn, dtype):
    tx, p, state = after_training(both_exact, dtype)
    before = jax.tree.map(np.asarray, (p, state))
    up_to_date = tx.flush(p, state)[0]
    assert_outputs_near(
        adamjax.forward(fn, tx)(p, state, READ_IDS), fn(up_to_date, READ_IDS), dtype
    )
    for a, b in zip(jax.tree.leaves((p, state)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    # The stored rows do lag behind.
    stored, now = (np.asarray(x["table"].astype(jnp.float32)) for x in (p, up_to_date))
    assert np.abs(stored - now)[READ_IDS[:-1]].max() > 0.05


@pytest.mark.slow
def test_forward_reads_more_rows_than_fit_in_a_block():
    tx = adamjax.exact_rows(adamjax.chain(adamjax.adamw(0.1), adamjax.weight_ema(0.9)), "table")
    params = {"table": jnp.linspace(-1, 1, 60_000).reshape(20_000, 3)}
    p, state = six_steps(tx, params, lambda p, ids: jnp.mean(p["table"][ids] ** 2))
    ids = jax.random.randint(jax.random.key(0), (9000,), 0, 20_000)
    ids = ids.at[:4].set(jnp.array([1, 7, 298, 20_000]))

    def fn(params, ids):
        return params["table"].at[ids].get(mode="fill", fill_value=0)

    now, flushed = tx.flush(p, state)
    assert_outputs_near(adamjax.eval_step(fn, tx)(p, state, ids), fn(now, ids))
    of_average = adamjax.eval_step(fn, tx, averaged=True)(p, state, ids)
    assert_outputs_near(of_average, fn(adamjax.averaged_weights(flushed, now), ids))


def exact_tables(dense):
    return adamjax.exact_rows(dense, ["table", "other"])


# `exact_rows` around a dense optimizer, alone or within other transforms.
WITH_EXACT = {
    "alone": exact_tables,
    "partition": parts,
    "masked": lambda dense: adamjax.chain(
        adamjax.masked(adamjax.adam(0.1), "^w$"), adamjax.masked(exact_tables(dense), "table|other")
    ),
    "with_hyperparams": lambda dense: adamjax.with_hyperparams(exact_tables(dense)),
    "skip_not_finite": lambda dense: adamjax.skip_not_finite(parts(dense)),
    "master_weights": lambda dense: adamjax.master_weights(exact_tables(dense)),
    "accumulate_gradients": lambda dense: adamjax.accumulate_gradients(
        exact_tables(dense), 2, max_rows={"table": 12, "other": 12}
    ),
    "chain": lambda dense: adamjax.chain(adamjax.clip_by_value(9.0), exact_tables(dense)),
}


def adamw_with_average():
    return adamjax.chain(adamjax.adamw(0.1), adamjax.weight_ema(0.8))


# The dense counterpart of an entry of WITH_EXACT, unless it is `adamw_with_average`.
DENSE = {
    "master_weights": lambda: adamjax.master_weights(adamw_with_average()),
    "accumulate_gradients": lambda: adamjax.accumulate_gradients(adamw_with_average(), 2),
}


@pytest.mark.parametrize("name", WITH_EXACT)
@pytest.mark.slow
def test_forward_finds_exact_rows_wherever_it_is(name):
    dtype = jnp.bfloat16 if name == "master_weights" else jnp.float32
    tx, p, state = after_training(lambda: WITH_EXACT[name](adamw_with_average()), dtype)
    _, weights, dense_state = after_training(DENSE.get(name, adamw_with_average), dtype)
    for averaged in (False, True):
        expected = adamjax.averaged_weights(dense_state, weights) if averaged else weights
        fn = adamjax.eval_step(reads_both, tx, averaged=averaged, strict=True)
        assert_outputs_near(fn(p, state, READ_IDS), reads_both(expected, READ_IDS), dtype)
        assert not np.allclose(reads_both(p, READ_IDS), reads_both(expected, READ_IDS), atol=0.02)


@pytest.mark.parametrize("fn", [dot_products, bags, tied, reads_in_loop])
@pytest.mark.slow
def test_forward_brings_the_average_up_to_date(fn):
    tx = exact_tables(adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.8)))
    p, state = six_steps(tx, two_tables())
    now, flushed = tx.flush(p, state)
    average = adamjax.averaged_weights(flushed, now)
    assert_outputs_near(
        adamjax.forward(fn, tx, averaged=True)(p, state, READ_IDS), fn(average, READ_IDS)
    )


@pytest.mark.slow
def test_forward_reads_the_weights_of_leaves_without_an_average():
    averages = adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.8))
    tx = adamjax.partition(
        [
            ("table", adamjax.exact_rows(adamjax.adam(0.1), "")),
            ("other", adamjax.exact_rows(averages, "")),
        ],
        default=adamjax.adam(0.1),
    )
    p, state = six_steps(tx, two_tables())
    dense = adamjax.partition([("other", averages)], default=adamjax.adam(0.1))
    expected, dense_state = six_steps(dense, two_tables())
    expected = adamjax.averaged_weights(dense_state, expected)
    assert_outputs_near(
        adamjax.forward(reads_both, tx, averaged=True)(p, state, READ_IDS),
        reads_both(expected, READ_IDS),
    )


@pytest.mark.parametrize(
    "tx",
    [adamjax.adamw(0.1), adamjax.adam(0.1, rows="lazy"), optax.adam(0.1)],
    ids=["dense", "lazy", "optax's"],
)
def test_forward_is_a_plain_call_for_other_optimizers(tx):
    p, state = six_steps(tx, two_tables())
    calls = []

    def fn(params, ids, *, scale=1.0):
        calls.append(params)
        return dot_products(params, ids) * scale

    expected = fn(p, READ_IDS, scale=2.0)
    assert_outputs_near(adamjax.forward(fn, tx)(p, state, READ_IDS, scale=2.0), expected)
    assert calls[-1] is p
    assert_outputs_near(adamjax.eval_step(fn, tx)(p, state, READ_IDS, scale=2.0), expected)
    with pytest.raises(ValueError, match=r"no weight_ema: put one last in the chain"):
        adamjax.eval_step(fn, tx, averaged=True)(p, state, READ_IDS)
    if isinstance(tx, adamjax.Transform):
        averaging = adamjax.chain(tx, adamjax.weight_ema(0.5))
        p, state = six_steps(averaging, two_tables())
        expected = dot_products(adamjax.averaged_weights(state, p), READ_IDS)
        assert_outputs_near(
            adamjax.eval_step(dot_products, averaging, averaged=True)(p, state, READ_IDS), expected
        )


@pytest.mark.slow
def test_eval_step_is_jitted_and_donates_nothing():
    traces = []

    def with_static_times(params, ids, times):
        assert isinstance(times, int)
        traces.append(times)
        return dot_products(params, ids) * times

    tx = exact_tables(adamjax.adam(0.1))
    p, state = six_steps(tx, two_tables())
    evaluate = adamjax.eval_step(with_static_times, tx, static_argnames="times")
    first = evaluate(p, state, READ_IDS, times=2)
    assert_outputs_near(evaluate(p, state, ids=READ_IDS, times=2), first)
    assert_outputs_near(first, 2 * dot_products(tx.flush(p, state)[0], READ_IDS))
    # By position too, which is one higher than in the function itself.
    assert_outputs_near(evaluate(p, state, READ_IDS, 2), first)
    by_number = adamjax.eval_step(with_static_times, tx, static_argnums=3)
    assert_outputs_near(by_number(p, state, READ_IDS, 2), first)
    before = len(traces)
    evaluate(p, state, READ_IDS, times=2)
    assert len(traces) == before
    assert evaluate.__name__ == "with_static_times"
    assert isinstance(evaluate, jax.stages.Wrapped)
    assert "stablehlo" in evaluate.lower(p, state, READ_IDS, times=3).as_text()


CLASHING = {"params": 1.0, "state": 2.0, "self": 3.0, "method": 4.0}


def with_clashing_keywords(weights, ids, *, params, state, self, method):
    return dot_products(weights, ids).sum() * (params + 10 * state + 100 * self + 1000 * method)


def test_keywords_of_a_function_may_be_named_like_our_arguments():
    tx, p = adamjax.exact_rows(adamjax.adam(0.1), "table"), params()
    state = tx.init(p)
    expected = dot_products(p, READ_IDS).sum() * 4321
    step = adamjax.train_step(with_clashing_keywords, tx, donate_argnums=())
    assert step(p, state, READ_IDS, **CLASHING)[2] == expected
    assert step.eval_shape(p, state, READ_IDS, **CLASHING)[2].shape == ()
    evaluate = adamjax.eval_step(with_clashing_keywords, tx)
    assert evaluate(p, state, READ_IDS, **CLASHING) == expected
    assert adamjax.forward(with_clashing_keywords, tx)(p, state, READ_IDS, **CLASHING) == expected
    (value, _), _ = tx.value_and_grad(with_clashing_keywords)(p, state, READ_IDS, **CLASHING)
    assert value == expected


def test_static_arguments_may_be_named_like_our_arguments():
    def with_our_names(weights, state, params):
        assert isinstance(params, int)  # not an array
        return dot_products(weights, state) * params

    tx, p = adamjax.adam(0.1), params()
    evaluate = adamjax.eval_step(with_our_names, tx, static_argnames="params")
    assert_outputs_near(evaluate(p, tx.init(p), READ_IDS, 2), 2 * dot_products(p, READ_IDS))


@pytest.mark.parametrize("options", [{"static_argnames": "times"}, {"static_argnums": 3}])
def test_static_arguments_of_a_train_step(options):
    """By name, and by position, which is one higher than in the loss."""

    def loss(params, ids, times=1):
        assert isinstance(times, int)
        return loss_fn(params, ids) * times

    tx, p = adamjax.adam(0.1), params()
    step = adamjax.train_step(loss, tx, donate_argnums=(), **options)
    for value in (step(p, tx.init(p), IDS[0], 2)[2], step(p, tx.init(p), ids=IDS[0], times=2)[2]):
        assert_near(value, 2 * loss_fn(p, IDS[0]))
    with pytest.raises(ValueError, match="tims"):
        adamjax.train_step(loss, tx, static_argnames="tims")


def test_forward_refuses_tables_that_are_used_as_a_whole_and_a_missing_average():
    tx = exact_tables(adamjax.adam(0.1))
    p, state = six_steps(tx, two_tables())
    with pytest.raises(ValueError, match=r"forward: the table 'table' is used by dot_general.*dat"):
        adamjax.forward(tied, tx, strict=True)(p, state, READ_IDS)
    with pytest.raises(ValueError, match=r"eval_step: the table 'other' is returned by the func"):
        adamjax.eval_step(lambda p: p["other"], tx, strict=True)(p, state)
    with pytest.raises(ValueError, match=r"no weight_ema"):
        adamjax.forward(dot_products, tx, averaged=True)(p, state, READ_IDS)


def test_forward_refuses_another_optimizer_than_that_of_the_state():
    """`forward` would not bring rows up to date."""
    tx = exact_tables(adamjax.adam(0.1))
    p, state = six_steps(tx, two_tables())
    for other in (optax.sgd(0.1), adamjax.identity()):
        with pytest.raises(ValueError, match=r"forward: the state has an exact_rows that is not i"):
            adamjax.forward(dot_products, other)(p, state, READ_IDS)
    with pytest.raises(TypeError, match=r"expected the ExactRowsState"):
        adamjax.forward(dot_products, tx)(p, adamjax.adam(0.1).init(p), READ_IDS)
    inside = optax.chain(optax.clip(1.0), optax.GradientTransformationExtraArgs(*tx))
    with pytest.raises(ValueError, match=r"eval_step: .* If exact_rows is inside another library"):
        adamjax.eval_step(dot_products, inside)(p, inside.init(p), READ_IDS)


def test_forward_refuses_parameters_that_do_not_fit():
    tx = exact_tables(adamjax.adam(0.1))
    p, state = six_steps(tx, two_tables())
    with pytest.raises(TypeError, match=r"eval_step: params\['act'\] is an? .*eqx.filter\(model"):
        adamjax.eval_step(dot_products, tx)({**p, "act": jnp.tanh}, state, READ_IDS)
    with pytest.raises(ValueError, match=r"last\['table'\] is int32\[300\], expected int32\[9\]"):
        adamjax.forward(dot_products, tx)({**p, "table": p["table"][:9]}, state, READ_IDS)
