"""Layouts of tables and states. Column-major arrays stand for any layout but a CPU's default."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import layout as layouts
from support import assert_same, jit_and_traces

import adamjax

NUM_ROWS, WIDTH = 96, 10
COLUMN_MAJOR, ROW_MAJOR = (1, 0), (0, 1)
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def order(x):
    """The order of an array's dimensions in memory."""
    return x.format.layout.major_to_minor


def column_major(x):
    return jax.device_put(x, layouts.Format(layouts.Layout(COLUMN_MAJOR), DEVICE))


def table(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(NUM_ROWS, WIDTH)), jnp.float32)


def test_a_row_major_table_is_returned_as_it_is():
    x = table()
    assert adamjax.layout.row_major(x) is x
    assert order(adamjax.layout.row_major(np.asarray(x))) == ROW_MAJOR


def test_a_table_is_made_row_major():
    x = column_major(table())
    assert order(x) == COLUMN_MAJOR
    assert order(adamjax.layout.row_major(x)) == ROW_MAJOR
    assert_same(adamjax.layout.row_major(x), table())


def test_row_major_inside_of_jit_changes_no_value():
    assert_same(jax.jit(adamjax.layout.row_major)(table()), table())


def test_a_shape_gets_a_row_major_format():
    x = adamjax.layout.row_major(jax.ShapeDtypeStruct((NUM_ROWS, WIDTH), jnp.float32))
    assert (x.shape, x.dtype) == ((NUM_ROWS, WIDTH), jnp.float32)
    assert order(x) == ROW_MAJOR


OPTIMIZERS = {
    "adam": adamjax.adam(0.1, rows="lazy"),
    "amsgrad": adamjax.amsgrad(0.1),
    "adamax": adamjax.adamax(0.1),
    "average": adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.9)),
    "accumulated": adamjax.accumulate_gradients(adamjax.adam(0.1), 2),
    "masked": adamjax.masked(adamjax.adam(0.1), "table"),
    "exact": adamjax.exact_rows(adamjax.adamw(0.1, weight_decay=0.1), "table"),
    "foreign": adamjax.chain(optax.trace(0.9), adamjax.scale(-0.1)),
}


def trees():
    """Parameters in the default layout, and the same on a device with a column-major table."""
    dense = {"table": table(), "bias": jnp.ones(3), "none": None, "kernel": table(1)}
    return dense, {**jax.device_put(dense, DEVICE), "table": column_major(dense["table"])}


def orders(state):
    """The orders of the arrays with the table's shape."""
    return [order(x) for x in jax.tree.leaves(state) if x.shape == (NUM_ROWS, WIDTH)]


@pytest.mark.parametrize(
    ("name", "jit"),
    [
        *((name, False) for name in OPTIMIZERS if name != "foreign"),
        *((name, True) for name in OPTIMIZERS),
    ],
)
def test_init_makes_slots_with_the_layouts_of_their_parameters(name, jit):
    """A jitted `init` gets the formats of `formats`. Transforms of other libraries need these."""
    tx, (dense, params) = OPTIMIZERS[name], trees()
    init = tx.init
    if jit:
        init = jax.jit(tx.init, out_shardings=adamjax.layout.formats(tx, params)[1])
    state = init(params)
    slot_orders = orders(state)
    num_column_major = slot_orders.count(COLUMN_MAJOR)
    assert num_column_major > 0
    # The kernel has as many slots as the table, but none if it is masked.
    assert slot_orders.count(ROW_MAJOR) == (0 if name == "masked" else num_column_major)
    assert_same(state, tx.init(dense))


def step_of(name):
    tx = OPTIMIZERS[name]

    def step(params, state, ids, values):
        rows = adamjax.row_gradient(ids, values, NUM_ROWS)
        if name == "foreign":
            rows = rows.to_dense()
        grads = {**jax.tree.map(jnp.ones_like, params), "table": rows}
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_preserves_layouts_and_updates_in_place(name):
    tx, (dense, params) = OPTIMIZERS[name], trees()
    formats = adamjax.layout.formats(tx, params)
    state = jax.jit(tx.init, out_shardings=formats[1])(params)
    step, traces = jit_and_traces(step_of(name), donate_argnums=(0, 1), out_shardings=formats)
    plain_step, dense_state = jax.jit(step_of(name)), tx.init(dense)
    dense = jax.tree.map(jnp.copy, dense)  # `params` shares arrays with it, and is donated
    address = params["table"].unsafe_buffer_pointer()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        ids = jnp.asarray(rng.integers(0, NUM_ROWS, 7))
        values = jnp.asarray(rng.normal(size=(7, WIDTH)), jnp.float32)
        orders_before = orders((params, state))
        params, state = step(params, state, ids, values)
        assert orders((params, state)) == orders_before
        dense, dense_state = plain_step(dense, dense_state, ids, values)
    assert params["table"].unsafe_buffer_pointer() == address
    assert len(traces) == 1
    pairs = zip(*map(jax.tree.leaves, ((params, state), (dense, dense_state))), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_arrays_that_are_not_committed_to_a_device_get_no_format():
    tx, params = adamjax.adam(0.1), {"w": jnp.ones((3, 2)), "n": 3}
    for tree in adamjax.layout.formats(tx, params):
        assert jax.tree.leaves(tree) == []


def test_formats_of_an_accumulator_with_max_rows():
    tx = adamjax.accumulate_gradients(adamjax.adam(0.1), 2, max_rows=8)
    _, params = trees()
    state = jax.jit(tx.init, out_shardings=adamjax.layout.formats(tx, params)[1])(params)
    assert orders(state.inner).count(COLUMN_MAJOR) == 2  # m and v
    assert_same(state, tx.init(params))


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 16, 32, 60, 64, 100, 117, 128, 129, 200, 256, 300, 1000])
def test_the_padding_of_a_line_is_at_most_a_tenth(width):
    packing = adamjax.layout.packing(width)

    def padded(per_line):
        return -(-per_line * width // 128) * 128

    assert padded(packing.per_line) <= 1.1 * packing.per_line * width
    assert all(padded(n) > 1.1 * n * width for n in range(1, packing.per_line))


@pytest.mark.parametrize("width", [16, 64, 100, 128])
def test_packed_tables_and_their_rows_are_unpacked_exactly(width):
    packing, rng = adamjax.layout.packing(width), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(101, width)), jnp.float32)
    lines = packing.pack(x)
    assert lines.shape == (-(-101 // packing.per_line), packing.per_line * width)
    assert_same(packing.unpack(lines, 101), x)
    ids = jnp.asarray(rng.integers(0, 101, (3, 5)), jnp.int8)
    assert_same(packing.rows(lines[packing.line(ids)], ids), x[ids])
    assert packing.line(jnp.array([-1])) < 0


def test_lines_of_integers_of_any_dtype():
    packing, x = adamjax.layout.packing(64), jnp.arange(10.0).repeat(64).reshape(10, 64)
    lines = packing.pack(x)
    ids = np.array([2**32 + 5, 5, 2**63 + 5], np.uint64)
    for indices in (ids, ids.tolist(), ids.astype(np.int64)[:2]):
        line = packing.line(indices)
        assert line.dtype == jnp.int32
        assert (line[1], packing.rows(lines[line], indices)[1, 0]) == (2, 5.0)
        outside = np.delete(np.asarray(line), 1)
        assert np.all((outside < 0) | (outside >= len(lines)))
        rows = adamjax.row_gradient(line, jnp.ones((len(line), 128)), len(lines))
        assert float(rows.to_dense().sum()) == 128
    assert np.all(packing.line([-1, -(2**40)]) < 0)
    for bad in ([1.0], np.array([True]), None):
        for call in (packing.line, lambda ids: packing.rows(lines, ids)):
            with pytest.raises(TypeError, match="packing: indices must be integers"):
                call(bad)


def test_large_unsigned_indices_have_lines_outside_of_the_table():
    packing, ids = adamjax.layout.packing(64), jnp.array([5, 2**31, 2**32 - 1], jnp.uint32)
    for line in (packing.line(ids), jax.jit(packing.line)(ids)):
        np.testing.assert_array_equal(line, [2, 2**30, 2**31 - 1])


def test_packing_refuses_widths_lines_and_tables_of_a_wrong_type_or_shape():
    for bad in (0, 64.0, True, "64", None):
        with pytest.raises(
            ValueError, match=f"width must be a Python int of at least 1, got {bad!r}"
        ):
            adamjax.layout.packing(bad)
    packing = adamjax.layout.packing(np.int64(64))
    assert packing == (64, 2)
    ids, lines = jnp.arange(3), jnp.ones((3, 128))
    for rows, bad in ((3, lines), (7, lines), (5, lines[:, :64]), (5, lines[None]), (1, lines[0])):
        with pytest.raises(ValueError, match=rf"lines of shape \[{-(-rows // 2)}, 128\], got"):
            packing.unpack(bad, rows)
    for bad in (lines[:2], lines[:, :64], lines[None], lines[0]):
        with pytest.raises(ValueError, match=r"lines of shape \[3, 128\], got"):
            packing.rows(bad, ids)
    with pytest.raises(ValueError, match=r"num_rows must be a Python int of at least 1, got 5.0"):
        packing.unpack(lines, 5.0)
    with pytest.raises(ValueError, match=r"shape \[rows, 64\], got \[3, 5\]"):
        adamjax.layout.packing(64).pack(jnp.ones((3, 5)))


@pytest.mark.parametrize("exact", [True, False])
def test_a_packed_table_is_trained_like_the_table(exact):
    width, num_rows, rng = 60, 51, np.random.default_rng(0)
    packing = adamjax.layout.packing(width)
    assert packing.per_line == 2
    x = jnp.asarray(rng.normal(size=(num_rows, width)), jnp.float32)
    tx = adamjax.adamw(0.1, weight_decay=0.1)
    tx = adamjax.exact_rows(tx, "table", history=1024) if exact else tx

    @jax.jit
    def step(params, state, ids, values):
        grads = adamjax.row_gradient(ids, values, params["table"].shape[0])
        updates, state = tx.update({"table": grads}, state, params)
        return adamjax.apply_updates(params, updates), state

    rows, lines = {"table": x}, {"table": packing.pack(x)}
    row_state, line_state = tx.init(rows), tx.init(lines)
    for _ in range(20):
        ids = jnp.asarray(rng.integers(0, num_rows, 7))
        values = jnp.asarray(rng.normal(size=(7, width)), jnp.float32)
        to_lines = jax.linear_transpose(
            lambda read, ids=ids: packing.rows(read, ids), jnp.zeros((7, 2 * width))
        )
        rows, row_state = step(rows, row_state, ids, values)
        lines, line_state = step(lines, line_state, packing.line(ids), to_lines(values)[0])
    if exact:
        rows, _ = tx.flush(rows, row_state)
        lines, _ = tx.flush(lines, line_state)
    unpacked = packing.unpack(lines["table"], num_rows)
    np.testing.assert_allclose(unpacked, rows["table"], rtol=2e-6, atol=2e-6)
