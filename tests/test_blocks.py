"""Steps on rows in blocks: the same result, however the rows are cut into blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, assert_same

import adamjax
from adamjax import blocks

V, D = 60, 3

# The most rows that are processed without a loop, and the rows of a block.
SIZES = {"several blocks": (0, 7), "one row": (0, 1), "a block larger than the batch": (0, 64)}


@pytest.fixture
def set_block_sizes(monkeypatch):
    """A function that sets both sizes, and forgets what was traced for other sizes."""

    def set_sizes(most, size):
        monkeypatch.setattr(blocks, "_AT_ONCE", most)
        monkeypatch.setattr(blocks, "_BLOCK", size)
        jax.clear_caches()

    yield set_sizes
    monkeypatch.undo()
    jax.clear_caches()


# --- the loop by itself ---------------------------------------------------------------------------


def added(tables, indices, rows, reads):
    """Adds reads to rows, and the sum to the table's rows; counts the blocks."""
    table, count = tables
    rows = rows + reads
    return (table.at[indices].add(rows, mode="drop"), count + 1), rows


@pytest.mark.parametrize("n", [1, 7, 8, 20])
@pytest.mark.parametrize("num_inside", [0, 1, 7, 20])
@pytest.mark.slow
def test_blocks_do_what_one_does(set_block_sizes, n, num_inside):
    rng = np.random.default_rng(n)
    ids = np.full(n, V, np.int32)
    ids[:num_inside] = rng.permutation(V)[:n][:num_inside]
    rows, reads = (jnp.asarray(rng.normal(size=(n, D)), jnp.float32) for _ in range(2))
    (table, _), expected = added((jnp.ones((V, D)), 0), jnp.asarray(ids), rows, reads)
    set_block_sizes(0, 7)
    run = jax.jit(lambda *args: blocks.in_blocks(added, *args[:2], V, *args[2:]))
    given = (jnp.ones((V, D)), jnp.zeros((), jnp.int32)), jnp.asarray(ids), rows, reads
    (found, count), after = run(*given)
    assert_close(found, table)
    assert_close(after[:num_inside], expected[:num_inside])
    size = -(-n // -(-n // 7))
    assert int(count) == -(-min(num_inside, n) // size)


def test_rows_after_a_block_without_rows_are_processed_too(set_block_sizes):
    set_block_sizes(0, 4)
    ids = jnp.array([V, V, V, V, V, V, V, 3, V, V])
    args = (jnp.zeros((V, D)), jnp.zeros((), jnp.int32)), ids
    (table, count), _ = blocks.in_blocks(added, *args, V, jnp.ones((10, D)), jnp.ones((10, D)))
    assert_close(table[3], jnp.full(D, 2.0))
    assert int(count) == 2


# --- optimizers -----------------------------------------------------------------------------------


def chained(rule, rows):
    decay = adamjax.add_decayed_weights(0.01)
    rate = adamjax.scale_by_learning_rate(0.1)
    clip = adamjax.clip_by_global_norm(2.0)
    return adamjax.chain(clip, rule(rows=rows), decay, rate, adamjax.weight_ema(0.9))


MODES = {
    "lazy": lambda: adamjax.adam(0.1, rows="lazy"),
    "dense": lambda: chained(adamjax.scale_by_adam, "dense"),
    "exact": lambda: adamjax.exact_rows(adamjax.adam(0.1), "t"),
    "exact, all of it": lambda: adamjax.exact_rows(
        chained(adamjax.scale_by_amsgrad, "dense"), "t", history=512
    ),
    "exact, replay": lambda: adamjax.exact_rows(adamjax.adam(0.1, 0.9, 0.5), "t"),
}


def batch(t):
    """Indices, some of them outside the table; in one step none is inside."""
    rng = np.random.default_rng(t)
    ids = rng.integers(-3, V + 3, size=20)
    return np.full(20, V) if t == 2 else np.minimum(ids, ids[rng.integers(20, size=20)])


def trained(tx, dtype=jnp.float32, steps=6):
    """Weights after some steps, all rows up to date, and the state without what lags behind."""
    params = {"t": jnp.linspace(-1, 1, V * D, dtype=dtype).reshape(V, D), "w": jnp.ones(D)}
    state = tx.init(params)
    exact = isinstance(tx, adamjax.exact_rows)

    def loss(params, ids):
        return jnp.sum((params["t"].at[ids].get(mode="fill", fill_value=0) - params["w"]) ** 2)

    step = adamjax.train_step(loss, tx, tables=None if exact else "t")
    for t in range(steps):
        params, state, value = step(params, state, jnp.asarray(batch(t)))
    if exact:
        params, state = jax.jit(tx.flush)(params, state)
        state = state.inner
    return params, state, value


@pytest.mark.parametrize("name", MODES)
@pytest.mark.slow
def test_results_do_not_depend_on_the_blocks(set_block_sizes, name):
    expected = trained(MODES[name]())
    for most, size in SIZES.values():
        set_block_sizes(most, size)
        assert_close(trained(MODES[name]()), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["lazy", "exact"])
def test_results_of_narrow_tables_do_not_depend_on_the_blocks(set_block_sizes, name):
    expected = trained(MODES[name](), jnp.bfloat16)
    set_block_sizes(0, 7)
    params, *_ = trained(MODES[name](), jnp.bfloat16)
    assert params["t"].dtype == jnp.bfloat16
    assert_close(params, expected[0], rtol=2**-7)


DIFFERENTIATED = {
    "lazy": lambda x: adamjax.adam(0.1, x, rows="lazy"),
    "dense": lambda x: adamjax.adamw(0.1, x),
    "exact": lambda x: adamjax.exact_rows(adamjax.adamw(x, weight_decay=0.1), "t"),
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
@pytest.mark.slow
def test_derivatives_do_not_depend_on_the_blocks(set_block_sizes, name):
    """Derivatives by a hyperparameter, the table and its gradient: reverse and forward mode."""

    @jax.jit
    def outcome(hyperparameter, table, values):
        tx, params = DIFFERENTIATED[name](hyperparameter), {"t": table}
        state = tx.init(params)
        for t in range(2):
            grads = {"t": adamjax.row_gradient(jnp.asarray(batch(t)), values, V)}
            updates, state = tx.update(grads, state, params)
            params = adamjax.apply_updates(params, updates)
        if name == "exact":
            params, _ = tx.flush(params, state)
        return jnp.sum(params["t"] * jnp.cos(jnp.arange(V * D)).reshape(V, D))

    args = jnp.float32(0.3), jnp.linspace(-1, 1, V * D).reshape(V, D), jnp.ones((20, D)) / 4
    backwards = jax.grad(outcome, argnums=(0, 1, 2))
    expected = backwards(*args)
    set_block_sizes(0, 7)
    assert_close(backwards(*args), expected, rtol=1e-5)
    forwards = jax.jvp(outcome, args, jax.tree.map(jnp.ones_like, args))[1]
    total = sum(np.asarray(x, np.float64).sum() for x in expected)
    np.testing.assert_allclose(forwards, total, rtol=1e-4)


@pytest.mark.slow
def test_outside_of_jit_a_loop_is_compiled_once():
    n = blocks._AT_ONCE + 1
    tx, params = adamjax.exact_rows(adamjax.adam(0.1), "t"), {"t": jnp.ones((V, D))}
    grads = {"t": adamjax.row_gradient(jnp.arange(n), jnp.ones((n, D)), V)}
    compiled, expected = [], jax.jit(tx.update)(grads, tx.init(params), params)
    found = tx.update(grads, tx.init(params), params)
    assert_close(
        (found[0]["t"] + params["t"], found[1]), (expected[0]["t"] + params["t"], expected[1])
    )
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    tx.update(grads, found[1], params)
    assert not compiled
    narrow = jnp.ones((V, D), jnp.bfloat16)
    expected = narrow + grads["t"]
    compiled.clear()
    assert_same(narrow + grads["t"], expected)
    assert not compiled


def test_a_large_batch_is_a_loop_and_a_small_one_is_not():
    tx, params = adamjax.exact_rows(adamjax.adam(), "t"), {"t": jnp.zeros((V, D))}

    def lowered(n):
        def step(params, state, ids):
            grads = {"t": adamjax.row_gradient(ids, jnp.ones((n, D)), V)}
            return tx.update(grads, state, params)

        state = jax.eval_shape(tx.init, params)
        args = params, state, jax.ShapeDtypeStruct((n,), jnp.int32)
        return jax.jit(step).trace(*args).lower(lowering_platforms=("cpu",)).as_text()

    small, large = (lowered(n).count("stablehlo.while") for n in (100, blocks._AT_ONCE + 1))
    assert small < large


# --- several tables -------------------------------------------------------------------------------


def several(count, widths=(3,)):
    shapes = {f"t{i}": (V + 5 * i, widths[i % len(widths)]) for i in range(count)}
    return {name: jnp.linspace(-1, 1, v * d).reshape(v, d) for name, (v, d) in shapes.items()}


def of_several(params, ids):
    return sum(jnp.sum((x[ids % len(x)] - 1) ** 2) for x in params.values())


RATES = {
    "alike": 0.1,
    "two rates": adamjax.by_path([("t[12]", 0.1)], default=0.2),
}


def of_rates(name):
    """Tables of which only some decay, at one rate or at two."""
    return adamjax.chain(
        adamjax.clip_by_norm(1.0),
        adamjax.adamw(RATES[name], mask="t[013]"),
        adamjax.weight_ema(0.9),
    )


PARTS = {
    **{name: functools.partial(of_rates, name) for name in RATES},
    "parts": lambda: adamjax.partition(
        {"t1": adamjax.adamw(0.1), "t2": adamjax.amsgrad(0.2)}, default=adamjax.adamw(0.2)
    ),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("widths", [(3,), (3, 2)])
@pytest.mark.slow
def test_tables_updated_together_move_as_each_alone(name, widths):
    """Tables of one width or of two."""
    dense = PARTS[name]()
    tx, params = adamjax.exact_rows(dense, "t"), several(4, widths)
    step, plain_step = adamjax.train_step(of_several, tx), adamjax.train_step(of_several, dense)
    state, plain = tx.init(params), (jax.tree.map(jnp.copy, params), dense.init(params))
    for t in range(5):
        ids = jnp.asarray(np.random.default_rng(t).integers(V, size=8))
        params, state, _ = step(params, state, ids)
        *plain, _ = plain_step(*plain, ids)
    params, state = tx.flush(params, state)
    assert_close((params, state.inner), tuple(plain), rtol=1e-5, atol=1e-6)


def test_tables_that_are_alike_share_a_ring():
    params = several(4)
    tx = adamjax.exact_rows(adamjax.adam(0.1), "t")
    assert len(tx.init(params).rings) == 1
    tx = adamjax.exact_rows(adamjax.adam(RATES["two rates"]), "t")
    assert len(tx.init(params).rings) == 2
    partitioned = adamjax.partition({"t1": adamjax.adam(0.1)}, default=adamjax.adam(0.1))
    assert len(adamjax.exact_rows(partitioned, "t").init(params).rings) == 2


@pytest.mark.slow
def test_a_ring_is_not_read_by_other_tables():
    """Another rate moves t2 to the family of t1, while its rows lag behind in the ring of t0."""
    params, ids = several(3), jnp.arange(4)
    before, after = (
        adamjax.by_path([(name, 0.1 if name == "t0" else 0.2)], default=rest)
        for name, rest in (("t1", 0.1), ("t0", 0.2))
    )
    dense = [adamjax.adam(rates) for rates in (before, after)]
    old, new = (adamjax.exact_rows(tx, "t") for tx in dense)
    steps = [adamjax.train_step(of_several, tx, donate_argnums=()) for tx in (old, new, *dense)]
    state, plain = old.init(params), (params, dense[0].init(params))
    for step in range(5):
        params, state, _ = steps[0](params, state, ids + step)
        *plain, _ = steps[2](*plain, ids + step)
    with pytest.raises(ValueError, match=r"'t0 and 1 more .*expected .*'t1 and 1 more .*flush"):
        steps[1](params, state, ids)
    # The way out that the error names.
    params, state = old.flush(params, state)
    state = new.from_dense(state.inner, params)
    for step in range(5):
        params, state, _ = steps[1](params, state, ids + step)
        *plain, _ = steps[3](*plain, ids + step)
    assert_close(new.flush(params, state)[0], plain[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_step_of_many_tables_is_not_much_longer_than_of_one():
    def lines(count):
        tx, params = adamjax.exact_rows(adamjax.adam(0.1), "t"), several(count)
        step = adamjax.train_step(of_several, tx)
        lowered = step.lower(params, tx.init(params), jax.ShapeDtypeStruct((8,), jnp.int32))
        return lowered.as_text().count("\n")

    assert lines(8) < 3 * lines(1)


@pytest.mark.slow
def test_moves_are_applied_as_they_are():
    """They include the moves that rows have missed, so scaling or averaging them would be wrong."""
    tx, params = adamjax.exact_rows(adamjax.adam(0.1), "t"), several(1)
    grads = {"t0": adamjax.row_gradient(jnp.array([3]), jnp.ones((1, D)), V)}
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = adamjax.apply_updates(params, updates)
    assert_same(moved, {"t0": params["t0"] + updates["t0"]})
    for other in (adamjax.scale(0.5), adamjax.clip_by_value(1.0), adamjax.adam(0.1)):
        with pytest.raises(TypeError, match="apply the updates of exact_rows as they are"):
            other.update(updates, other.init(params), params)
    with pytest.raises(TypeError):
        0.5 * updates["t0"]
    halved = jax.tree.map(lambda x: x / 2, updates)
    with pytest.raises((TypeError, ValueError), match="row gradient"):
        adamjax.apply_updates(params, halved)


@pytest.mark.parametrize("name", ["lazy", "exact"])
@pytest.mark.slow
def test_blocks_within_shard_map(set_block_sizes, name):
    """The gradient varies over the mesh and the table does not: the result must vary."""
    tx, params = MODES[name](), {"t": jnp.ones((V, D))}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    state, ids = tx.init(params), jnp.asarray(batch(0))

    def moved(ids):
        grads = {"t": adamjax.row_gradient(ids, jnp.ones((20, D)), V)}
        updates, _ = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates)["t"]

    expected = moved(ids)
    set_block_sizes(0, 7)
    rows = jax.sharding.PartitionSpec("x")
    assert_close(
        jax.jit(jax.shard_map(moved, mesh=mesh, in_specs=rows, out_specs=rows))(ids), expected
    )
