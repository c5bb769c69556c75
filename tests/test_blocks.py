"""Steps on rows in blocks: the result does not depend on how the rows are split into blocks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, assert_same

import adamjax
from adamjax import blocks

# The rows of a table, and the length of a row.
V, D = 60, 3

# Values of `_MAX_UNLOOPED_ROWS` and `_BLOCK_ROWS`.
BLOCK_SIZES = {
    "several blocks": (0, 7),
    "one row": (0, 1),
    "a block larger than the batch": (0, 64),
}


@pytest.fixture
def set_block_sizes(monkeypatch):
    """A function that sets both sizes, and clears JAX's caches of programs with other sizes."""

    def set_sizes(max_unlooped, block_rows):
        monkeypatch.setattr(blocks, "_MAX_UNLOOPED_ROWS", max_unlooped)
        monkeypatch.setattr(blocks, "_BLOCK_ROWS", block_rows)
        jax.clear_caches()

    yield set_sizes
    monkeypatch.undo()
    jax.clear_caches()


# --- the loop by itself ---------------------------------------------------------------------------


def add_step(tables, indices, rows, reads):
    """Adds reads to rows, and the sum to the table's rows; counts the blocks."""
    table, count = tables
    rows = rows + reads
    return (table.at[indices].add(rows, mode="drop"), count + 1), rows


def run_in_blocks(table, indices, rows, reads):
    """The table, the number of blocks, and the rows after `add_step` in blocks."""
    tables = (table, jnp.zeros((), jnp.int32))
    (table, count), rows = blocks.run_in_blocks(add_step, tables, indices, V, rows, reads)
    return table, count, rows


@pytest.mark.parametrize("n", [1, 7, 8, 20])
@pytest.mark.slow
def test_several_blocks_compute_the_same_as_one_step(set_block_sizes, n):
    """Of n indices, at most `num_inside` are rows of the table; the others stand for no row."""
    set_block_sizes(0, 7)
    run = jax.jit(run_in_blocks)
    for num_inside in (0, 1, 7, 20):
        rng = np.random.default_rng(n)
        ids = np.full(n, V, np.int32)
        ids[:num_inside] = rng.permutation(V)[:n][:num_inside]
        rows, reads = (rng.normal(size=(n, D)).astype(np.float32) for _ in range(2))
        expected = np.ones((V, D), np.float32)
        inside = slice(min(num_inside, n))
        expected[ids[inside]] += (rows + reads)[inside]
        table, count, found = run(jnp.ones((V, D)), ids, rows, reads)
        assert_close(table, expected)
        assert_close(np.asarray(found)[inside], (rows + reads)[inside])
        # All blocks have the same size, at most 7 rows. Those after the last row are skipped.
        size = math.ceil(n / math.ceil(n / 7))
        assert int(count) == math.ceil(min(num_inside, n) / size)


def test_rows_after_a_block_without_rows_are_processed_too(set_block_sizes):
    set_block_sizes(0, 4)
    ids = jnp.array([V, V, V, V, V, V, V, 3, V, V])
    ones = jnp.ones((10, D))
    table, count, _ = run_in_blocks(jnp.zeros((V, D)), ids, ones, ones)
    assert_close(table[3], jnp.full(D, 2.0))
    assert int(count) == 2


# --- optimizers -----------------------------------------------------------------------------------


def whole_chain(rule, rows):
    decay = adamjax.add_decayed_weights(0.01)
    rate = adamjax.scale_by_learning_rate(0.1)
    clip = adamjax.clip_by_global_norm(2.0)
    return adamjax.chain(clip, rule(rows=rows), decay, rate, adamjax.weight_ema(0.9))


MODES = {
    "lazy": lambda: adamjax.adam(0.1, rows="lazy"),
    "dense": lambda: whole_chain(adamjax.scale_by_adam, "dense"),
    "exact": lambda: adamjax.exact_rows(adamjax.adam(0.1), "t"),
    "exact, whole chain": lambda: adamjax.exact_rows(
        whole_chain(adamjax.scale_by_amsgrad, "dense"), "t", history=512
    ),
    # With these b1 and b2, rows catch up by a replay of the steps that they missed.
    "exact, replay": lambda: adamjax.exact_rows(adamjax.adam(0.1, 0.9, 0.5), "t"),
}


def batch(t):
    """Indices, some equal and some outside the table; in one step all are outside."""
    if t == 2:
        return np.full(20, V)
    rng = np.random.default_rng(t)
    ids = rng.integers(-3, V + 3, size=20)
    # Each is the smaller of two of these indices, so some are equal.
    return np.minimum(ids, ids[rng.integers(20, size=20)])


def trained(tx, dtype=jnp.float32, steps=6):
    """The up-to-date parameters, the dense optimizer's state and the loss, after some steps."""
    params = {"t": jnp.linspace(-1, 1, V * D, dtype=dtype).reshape(V, D), "w": jnp.ones(D)}
    state = tx.init(params)
    exact = isinstance(tx, adamjax.exact_rows)

    def loss(params, ids):
        return jnp.sum((params["t"].at[ids].get(mode="fill", fill_value=0) - params["w"]) ** 2)

    step = adamjax.train_step(loss, tx, tables=None if exact else "t")
    for t in range(steps):
        params, state, last_loss = step(params, state, jnp.asarray(batch(t)))
    if exact:
        params, state = jax.jit(tx.flush)(params, state)
        state = state.inner
    return params, state, last_loss


# "exact, whole chain" includes all that "exact" tests. Blocks of one row and blocks larger than the
# batch are tested only with one lazy and one exact mode.
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("lazy", list(BLOCK_SIZES)),
        ("dense", ["several blocks"]),
        ("exact, whole chain", list(BLOCK_SIZES)),
        ("exact, replay", ["several blocks"]),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{len(x)} sizes",
)
@pytest.mark.slow
def test_results_do_not_depend_on_the_blocks(set_block_sizes, name, sizes):
    expected = trained(MODES[name]())
    for max_unlooped, block_rows in map(BLOCK_SIZES.get, sizes):
        set_block_sizes(max_unlooped, block_rows)
        assert_close(trained(MODES[name]()), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["lazy", "exact"])
def test_results_of_narrow_tables_do_not_depend_on_the_blocks(set_block_sizes, name):
    expected = trained(MODES[name](), jnp.bfloat16)
    set_block_sizes(0, 7)
    params, *_ = trained(MODES[name](), jnp.bfloat16)
    assert params["t"].dtype == jnp.bfloat16
    assert_close(params, expected[0], rtol=2**-7)


# Functions from a hyperparameter (b1 or the learning rate) to an optimizer. A loss is
# differentiated by this hyperparameter.
MAKERS_BY_HYPERPARAMETER = {
    "lazy": lambda b1: adamjax.adam(0.1, b1, rows="lazy"),
    "dense": lambda b1: adamjax.adamw(0.1, b1),
    "exact": lambda rate: adamjax.exact_rows(adamjax.adamw(rate, weight_decay=0.1), "t"),
}


@pytest.mark.parametrize("name", MAKERS_BY_HYPERPARAMETER)
@pytest.mark.slow
def test_derivatives_do_not_depend_on_the_blocks(set_block_sizes, name):
    """Derivatives by a hyperparameter, the table and its gradient: reverse and forward mode."""

    @jax.jit
    def outcome(hyperparameter, table, values):
        tx, params = MAKERS_BY_HYPERPARAMETER[name](hyperparameter), {"t": table}
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
    # Along a direction of ones, the derivative is the sum of all partial derivatives.
    forwards = jax.jvp(outcome, args, jax.tree.map(jnp.ones_like, args))[1]
    total = sum(np.asarray(x, np.float64).sum() for x in expected)
    np.testing.assert_allclose(forwards, total, rtol=1e-4)


@pytest.fixture
def compilations():
    """A list that gets an entry for each compilation."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: events.append(event) if "backend_compile" in event else None
    )
    return events


def large_row_gradient():
    """The gradient of so many rows that they are processed in a loop."""
    n = blocks._MAX_UNLOOPED_ROWS + 1
    return adamjax.row_gradient(jnp.arange(n), jnp.ones((n, D)), V)


@pytest.mark.slow
def test_outside_of_jit_the_loop_of_an_update_is_compiled_once(compilations):
    tx, params = adamjax.exact_rows(adamjax.adam(0.1), "t"), {"t": jnp.ones((V, D))}
    grads = {"t": large_row_gradient()}
    updates, state = tx.update(grads, tx.init(params), params)
    expected_updates, expected_state = jax.jit(tx.update)(grads, tx.init(params), params)
    # The updates of a table are not an array, so the updated tables are compared.
    assert_close(params["t"] + updates["t"], params["t"] + expected_updates["t"])
    assert_close(state, expected_state)
    compilations.clear()
    tx.update(grads, state, params)
    assert not compilations


@pytest.mark.slow
def test_outside_of_jit_the_loop_of_an_addition_is_compiled_once(compilations):
    narrow, gradient = jnp.ones((V, D), jnp.bfloat16), large_row_gradient()
    expected = narrow + gradient
    compilations.clear()
    assert_same(narrow + gradient, expected)
    assert not compilations


def test_a_large_batch_is_processed_in_a_loop_and_a_small_one_is_not():
    tx, params = adamjax.exact_rows(adamjax.adam(), "t"), {"t": jnp.zeros((V, D))}

    def lowered(n):
        def step(params, state, ids):
            grads = {"t": adamjax.row_gradient(ids, jnp.ones((n, D)), V)}
            return tx.update(grads, state, params)

        state = jax.eval_shape(tx.init, params)
        args = params, state, jax.ShapeDtypeStruct((n,), jnp.int32)
        return jax.jit(step).trace(*args).lower(lowering_platforms=("cpu",)).as_text()

    small, large = (
        lowered(n).count("stablehlo.while") for n in (100, blocks._MAX_UNLOOPED_ROWS + 1)
    )
    assert small < large


# --- several tables -------------------------------------------------------------------------------


def many_tables(count, widths=(3,)):
    """Tables t0, t1 and so on, with different numbers of rows. They have the widths in turn."""
    shapes = {f"t{i}": (V + 5 * i, widths[i % len(widths)]) for i in range(count)}
    return {name: jnp.linspace(-1, 1, v * d).reshape(v, d) for name, (v, d) in shapes.items()}


def loss_of_tables(params, ids):
    """A loss that reads rows of each table."""
    return sum(jnp.sum((x[ids % len(x)] - 1) ** 2) for x in params.values())


RATES = {
    "one rate": 0.1,
    "two rates": adamjax.by_path([("t[12]", 0.1)], default=0.2),
}


def partly_decayed(name):
    """An optimizer with one of `RATES`, which decays only some tables."""
    return adamjax.chain(
        adamjax.clip_by_norm(1.0),
        adamjax.adamw(RATES[name], mask="t[013]"),
        adamjax.weight_ema(0.9),
    )


OPTIMIZERS = {
    **{name: functools.partial(partly_decayed, name) for name in RATES},
    "partition": lambda: adamjax.partition(
        {"t1": adamjax.adamw(0.1), "t2": adamjax.amsgrad(0.2)}, default=adamjax.adamw(0.2)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.slow
def test_tables_updated_together_move_as_each_alone(name):
    """Four tables, three of one width. `exact_rows` is compared with the dense optimizer."""
    dense = OPTIMIZERS[name]()
    exact = adamjax.exact_rows(dense, "t")
    params = many_tables(4, widths=(3, 3, 2))
    state = exact.init(params)
    dense_params, dense_state = jax.tree.map(jnp.copy, params), dense.init(params)
    step = adamjax.train_step(loss_of_tables, exact)
    dense_step = adamjax.train_step(loss_of_tables, dense)
    for t in range(5):
        ids = jnp.asarray(np.random.default_rng(t).integers(V, size=8))
        params, state, _ = step(params, state, ids)
        dense_params, dense_state, _ = dense_step(dense_params, dense_state, ids)
    params, state = exact.flush(params, state)
    expected = dense_params, dense_state
    assert_close((params, state.inner), expected, rtol=1e-5, atol=1e-6)


def test_tables_that_are_alike_share_a_ring():
    params = many_tables(4)
    tx = adamjax.exact_rows(adamjax.adam(0.1), "t")
    assert len(tx.init(params).rings) == 1
    tx = adamjax.exact_rows(adamjax.adam(RATES["two rates"]), "t")
    assert len(tx.init(params).rings) == 2
    partitioned = adamjax.partition({"t1": adamjax.adam(0.1)}, default=adamjax.adam(0.1))
    assert len(adamjax.exact_rows(partitioned, "t").init(params).rings) == 2


@pytest.mark.slow
def test_a_ring_is_not_read_by_other_tables():
    """Another rate moves t2 to the family of t1, while its rows lag behind in the ring of t0."""
    params, ids = many_tables(3), jnp.arange(4)
    old_dense = adamjax.adam(adamjax.by_path([("t1", 0.2)], default=0.1))
    new_dense = adamjax.adam(adamjax.by_path([("t0", 0.1)], default=0.2))
    old, new = adamjax.exact_rows(old_dense, "t"), adamjax.exact_rows(new_dense, "t")

    def train_step(tx):
        return adamjax.train_step(loss_of_tables, tx, donate_argnums=())

    state = old.init(params)
    dense_params, dense_state = params, old_dense.init(params)
    step, dense_step = train_step(old), train_step(old_dense)
    for t in range(5):
        params, state, _ = step(params, state, ids + t)
        dense_params, dense_state, _ = dense_step(dense_params, dense_state, ids + t)
    step, dense_step = train_step(new), train_step(new_dense)
    with pytest.raises(ValueError, match=r"'t0 and 1 more .*expected .*'t1 and 1 more .*flush"):
        step(params, state, ids)
    # The error advises this.
    params, state = old.flush(params, state)
    state = new.from_dense(state.inner, params)
    for t in range(5):
        params, state, _ = step(params, state, ids + t)
        dense_params, dense_state, _ = dense_step(dense_params, dense_state, ids + t)
    assert_close(new.flush(params, state)[0], dense_params, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_program_of_many_tables_is_not_much_longer_than_that_of_one():
    def lines(count):
        tx, params = adamjax.exact_rows(adamjax.adam(0.1), "t"), many_tables(count)
        step = adamjax.train_step(loss_of_tables, tx)
        lowered = step.lower(params, tx.init(params), jax.ShapeDtypeStruct((8,), jnp.int32))
        return lowered.as_text().count("\n")

    assert lines(8) < 3 * lines(1)


@pytest.mark.slow
def test_moves_can_only_be_applied_unchanged():
    """Moves include those that rows have missed, so scaling or averaging them would be wrong."""
    tx, params = adamjax.exact_rows(adamjax.adam(0.1), "t"), many_tables(1)
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
def test_results_within_shard_map_do_not_depend_on_the_blocks(set_block_sizes, name):
    """The gradient varies over the mesh and the table does not, so the result must vary."""
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
