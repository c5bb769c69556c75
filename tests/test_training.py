"""A train step in one line is the step that one would write."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamjax

V = 20


def params():
    return {"table": jnp.linspace(-1, 1, 2 * V).reshape(V, 2), "w": jnp.array([0.5, -1.0])}


def loss_fn(params, ids, y=0.5):
    return jnp.mean((params["table"][ids] @ params["w"] - y) ** 2)


def with_aux(params, ids, y=0.5):
    return loss_fn(params, ids, y), {"ids": ids, "kind": jnp.max(params["w"])}


IDS = [jnp.array(x) for x in ([1, 2, 2], [3, 1, 0], [9, 9, 19], [1, 1, 1])]


def by_hand(tx):
    """The parameters and losses of dense steps."""
    p, losses = params(), []
    state = tx.init(p)
    for ids in IDS:
        loss, grads = jax.value_and_grad(loss_fn)(p, ids)
        updates, state = tx.update(grads, state, p)
        p = adamjax.apply_updates(p, updates)
        losses.append(loss)
    return p, losses


def trained(tx, **options):
    p, losses = params(), []
    state, step = tx.init(p), adamjax.train_step(loss_fn, tx, **options)
    for ids in IDS:
        p, state, loss = step(p, state, ids)
        losses.append(loss)
    return p, losses, state


def assert_near(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tables", [None, "table"])
@pytest.mark.parametrize("tx", [adamjax.adamw(0.1), optax.adam(0.1)], ids=["ours", "optax's"])
def test_is_the_step_by_hand(tx, tables):
    if tables and not isinstance(tx, adamjax.Transform):
        pytest.skip("optax takes no row gradients")
    p, losses, _ = trained(tx, tables=tables)
    assert_near((p, losses), by_hand(tx))


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
def test_exact_rows_are_found_wherever_they_are(around):
    dense = adamjax.adamw(0.1)
    tx = around(adamjax.exact_rows(dense, "table"))
    p, losses, _ = trained(tx)
    # Rows that were not read lag behind: so they were read up to date, by rows.
    assert not np.allclose(p["table"], by_hand(around(dense))[0]["table"], rtol=1e-3)
    assert_near(losses, by_hand(around(dense))[1])


def half(dense):
    """The tables of a click model, each in a part of its own."""
    return adamjax.partition(
        [("table", adamjax.exact_rows(dense, "table")), ("other", adamjax.exact_rows(dense, ""))],
        default=dense,
    )


@pytest.mark.parametrize(
    "around",
    [
        half,
        lambda dense: adamjax.chain(
            adamjax.masked(dense, "w"),
            adamjax.masked(adamjax.exact_rows(dense, "table"), "table|other"),
        ),
        lambda dense: adamjax.skip_not_finite(half(dense)),
        lambda dense: adamjax.with_hyperparams(half(dense)),
    ],
    ids=["partition", "masked", "skip_not_finite", "with_hyperparams"],
)
def test_exact_rows_of_some_leaves_read_rows_up_to_date(around):
    """In a part that sees its own leaves alone, several of them too, at the cost of the rows."""

    def loss(params, ids):
        return loss_fn(params, ids) + jnp.mean(params["other"][ids + 1] ** 2)

    dense = adamjax.adamw(0.1)
    tx = around(dense)
    start = {**params(), "other": jnp.linspace(-1, 1, V)[:, None]}
    p, plain = jax.tree.map(jnp.copy, start), start
    state, other = tx.init(p), dense.init(plain)
    step = adamjax.train_step(loss, tx)
    for ids in IDS * 3:
        p, state, value = step(p, state, ids)
        expected, grads = jax.value_and_grad(loss)(plain, ids)
        updates, other = dense.update(grads, other, plain)
        plain = adamjax.apply_updates(plain, updates)
        assert_near(value, expected)
    assert not np.allclose(p["table"], plain["table"], rtol=1e-3)  # rows do lag behind
    assert_near(p["w"], plain["w"])


def test_exact_rows_that_cannot_be_followed_are_refused():
    """Inside of optax's wrappers the loss would read rows that lag behind."""
    exact = adamjax.exact_rows(adamjax.adam(0.1), "table")
    tx = optax.chain(optax.clip(1.0), optax.GradientTransformationExtraArgs(*exact))
    with pytest.raises(ValueError, match="exact_rows is inside another library"):
        adamjax.train_step(loss_fn, tx)(params(), tx.init(params()), IDS[0])


def test_a_state_of_another_transform_is_refused():
    tx = adamjax.skip_not_finite(adamjax.exact_rows(adamjax.adam(0.1), "table"))
    other = adamjax.exact_rows(adamjax.adam(0.1), "table")
    with pytest.raises(TypeError, match="state is a ExactRowsState, expected the SkipNotFinite"):
        adamjax.train_step(loss_fn, tx)(params(), other.init(params()), IDS[0])


@pytest.mark.parametrize("tables", [None, "table"])
def test_leaves_that_are_no_floats_stay_as_they_are(tables):
    tx = adamjax.adamw(0.1)
    beside = {"n": jnp.array(3), "key": jax.random.key(0), "flags": jnp.array([True]), "gone": None}

    def loss(params, ids):
        return loss_fn(params, ids) * params["n"], jax.random.key_data(params["key"])

    def copied():
        return jax.tree.map(jnp.copy, beside | params())

    step = adamjax.train_step(loss, tx, has_aux=True, tables=tables)
    p, _, (value, _) = step(copied(), tx.init(copied()), IDS[0])
    grads = jax.grad(lambda p: 3 * loss_fn(p, IDS[0]))(params())
    updates, _ = tx.update(grads, tx.init(params()), params())
    assert_near({k: p[k] for k in params()}, adamjax.apply_updates(params(), updates))
    assert_near(value, 3 * loss_fn(params(), IDS[0]))
    for name in ("n", "flags"):
        np.testing.assert_array_equal(p[name], beside[name])
    assert jax.random.key_data(p["key"]).tolist() == [0, 0]


def test_aux_and_arguments():
    tx = adamjax.adam(0.1)
    step = adamjax.train_step(with_aux, tx, has_aux=True)
    _, _, (loss, aux) = step(params(), tx.init(params()), IDS[0], y=1.0)
    assert_near(loss, loss_fn(params(), IDS[0], 1.0))
    assert aux["kind"] == 0.5
    np.testing.assert_array_equal(aux["ids"], IDS[0])


def test_donates_unless_told_otherwise():
    tx = adamjax.adam(0.1)
    for options, deleted in ({}, True), ({"donate_argnums": ()}, False):
        p = params()
        state = tx.init(p)
        adamjax.train_step(loss_fn, tx, **options)(p, state, IDS[0])
        assert p["table"].is_deleted() == deleted
        assert state[0].m["table"].is_deleted() == deleted


def test_refuses():
    tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    with pytest.raises(ValueError, match=r"exact_rows has its own tables, \['table'\]"):
        adamjax.train_step(loss_fn, tx, tables="table")(params(), tx.init(params()), IDS[0])

    def tied(params, ids):
        return jnp.sum(params["table"][ids] @ params["table"].T)

    with pytest.raises(ValueError, match="dot_general"):
        adamjax.train_step(tied, tx, strict=True)(params(), tx.init(params()), IDS[0])
    tx = adamjax.adam(0.1)
    step = adamjax.train_step(tied, tx, tables="table", strict=True)
    with pytest.raises(ValueError, match="dot_general"):
        step(params(), tx.init(params()), IDS[0])


@pytest.mark.parametrize("how", ["called", "by name", "lowered", "traced", "shapes"])
@pytest.mark.parametrize("odd", [jnp.tanh, "gelu", object()])
def test_a_model_with_leaves_that_are_no_arrays_is_refused(how, odd):
    """JAX refuses it before the step is traced, and does not say what to do."""
    tx, ids = adamjax.adam(0.1), IDS[0]
    step, state = adamjax.train_step(loss_fn, tx), tx.init(params())
    model = {**params(), "act": odd}
    calls = {
        "called": lambda: step(model, state, ids),
        "by name": lambda: step(params=model, state=state, ids=ids),
        "lowered": lambda: step.lower(model, state, ids),
        "traced": lambda: step.trace(model, state, ids),
        "shapes": lambda: step.eval_shape(model, state, ids),
    }
    with pytest.raises(TypeError, match=r"train_step: params\['act'\] is a .*eqx.filter\(model"):
        calls[how]()


def test_other_type_errors_are_left_as_they_are():
    tx = adamjax.adam(0.1)
    step, state = adamjax.train_step(loss_fn, tx), tx.init(params())
    with pytest.raises(TypeError, match=r"not a valid JAX|abstract array"):
        step(params(), state, "ids")
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: .state."):
        step(params())


def test_it_is_a_function_of_jit():
    tx = adamjax.adam(0.1)
    step, p = adamjax.train_step(loss_fn, tx), params()
    assert isinstance(step, jax.stages.Wrapped)
    assert isinstance(copy.copy(step), jax.stages.Wrapped)
    assert step.__name__ == "step"
    assert "stablehlo" in step.lower(p, tx.init(p), IDS[0]).as_text()
    step(p, tx.init(p), IDS[0])
    assert step._cache_size() == 1
