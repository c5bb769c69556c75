"""A row gradient behaves as the dense array that it represents, alone and in transforms."""

import contextlib
import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from support import assert_close, enable_x64

import adamjax
from adamjax import row_gradient
from adamjax.rows import SEAL, checked_ids, distinct

V, D = 23, 3


def dense(indices, values, num_rows):
    """The dense gradient, in float64 NumPy."""
    indices, values = np.asarray(indices), np.asarray(values, np.float64)
    out = np.zeros((num_rows, *values.shape[indices.ndim :]))
    for i, v in zip(indices.reshape(-1), values.reshape(-1, *out.shape[1:]), strict=True):
        if 0 <= i < num_rows:
            out[i] += v
    return out


def draw(shape=(4, 10), trailing=(D,), seed=0, low=-3, high=V + 3, dtype=np.int32):
    """Indices, by default some of them outside the table, and a gradient for each."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(*shape, *trailing)).astype(np.float32)
    return rng.integers(low, high, shape).astype(dtype), values


def check_rows(rows, indices, values, num_rows=V):
    """Compares a row gradient with `dense`: each row once, and zeros in unused places."""
    expected = dense(indices, values, num_rows)
    found = np.asarray(rows.indices)
    used = found[found < num_rows]
    assert len(set(used)) == len(used)
    assert (found >= 0).all()
    assert not np.any(np.asarray(rows.values)[found == num_rows])
    inside = np.asarray(indices)[(np.asarray(indices) >= 0) & (np.asarray(indices) < num_rows)]
    assert set(used) == set(inside.reshape(-1).tolist())
    assert rows.shape == expected.shape
    np.testing.assert_allclose(np.asarray(rows.to_dense()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(40,), (4, 10), (), (2, 0), (0,)])
@pytest.mark.parametrize("trailing", [(), (D,), (2, 3)])
@pytest.mark.parametrize("jit", [False, True])
def test_equal_indices_are_summed(shape, trailing, jit):
    indices, values = draw(shape, trailing)
    make = lambda i, g: row_gradient(i, g, V)  # noqa: E731
    rows = (jax.jit(make) if jit else make)(indices, values)
    assert rows.indices.dtype == jnp.int32
    assert rows.indices.shape == (np.size(indices),)
    check_rows(rows, indices, values)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"])
def test_any_integer_dtype(dtype):
    low = 0 if dtype.startswith("u") else -3
    with enable_x64(True):
        for num_rows in (V, 1000):
            indices, values = draw(low=low, dtype=dtype)
            check_rows(row_gradient(indices, values, num_rows), indices, values, num_rows)


# By name, indices, and the int32 that they become: V if they are outside the table.
INDICES = {
    "int64": (np.array([2**32 + 5, 5, -1]), [V, 5, V]),
    "uint64": (np.array([2**63 + 5, 5, 2**32], np.uint64), [V, 5, V]),
    "uint32": (np.array([2**32 - 1, 5], np.uint32), [V, 5]),
    "beyond 64 bits": ([2**70, 5, -1, -(2**70)], [V, 5, V, V]),
    "wide and negative": ([2**63, -1, 5], [V, V, 5]),
    "nested lists": ([[2**32 + 5, 5], [0, -(2**32)]], [[V, 5], [0, V]]),
    "lists of arrays": ([np.array([2**32 + 5, 5]), np.uint64([1, 2])], [[V, 5], [1, 2]]),
    "lists of JAX' arrays": ([jnp.int32(3), 2**32 + 3, jnp.uint32(5)], [3, V, 5]),
    "large ones of JAX": ([jnp.uint32(2**32 - 1), jnp.int32(1)], [V, 1]),
    "NumPy's numbers": ([np.int8(-1), np.uint64(2**64 - 1), np.int64(5)], [V, V, 5]),
    "one int": (5, 5),
    "one wide int": (2**32 + 5, V),
    "a range": (range(3), [0, 1, 2]),
    "an empty list": ([], np.zeros(0)),
    "empty lists": ([[], []], np.zeros((2, 0))),
}


@pytest.mark.parametrize(("indices", "expected"), INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("x64", [False, True])
def test_wide_indices_do_not_wrap_around_into_the_table(indices, expected, x64):
    expected = np.asarray(expected)
    with enable_x64(x64):
        ids = checked_ids("me", indices, V)
        assert ids.dtype == jnp.int32
        np.testing.assert_array_equal(ids, expected)
        values = np.ones((*expected.shape, D), np.float32)
        for make in (
            lambda g: row_gradient(indices, g, V),
            jax.jit(lambda g: row_gradient(indices, g, V)),
        ):
            check_rows(make(values), expected, values)


@pytest.mark.parametrize(
    ("indices", "kind"),
    [
        (np.array([1.0]), "float64"),
        (jnp.array([1.0]), "float32"),
        (np.array([]), "float64"),
        ([1, 2.0], "float"),
        (1.5, "float64"),
        (np.array([True]), "bool"),
        (jnp.array([True]), "bool"),
        ([True, 2], "bool"),
        (True, "bool"),
        ([1, None], "NoneType"),
        (None, "NoneType"),
        ("1", "str"),
        (1j, "complex128"),
        (np.zeros((), jax.dtypes.float0), "void"),
    ],
)
def test_indices_that_are_no_integers_are_refused(indices, kind):
    for call in (
        lambda: checked_ids("me", indices, V),
        lambda: jax.jit(lambda: checked_ids("me", indices, V))(),
    ):
        with pytest.raises(TypeError, match=rf"me: indices must be integers, got {kind}.*cast"):
            call()
    with pytest.raises(TypeError, match="row_gradient: indices must be integers"):
        row_gradient(indices, jnp.ones((1, D)), V)


@pytest.mark.parametrize("num_rows", [7, 23, 100_000])
def test_both_ways_to_find_distinct_indices(num_rows):
    """By a scratch array of the table's length and, where that would be long, by sorting."""
    ids = np.random.default_rng(0).integers(0, num_rows + 1, 40).astype(np.int32)
    found, positions = map(np.asarray, distinct(jnp.asarray(ids), num_rows))
    inside = ids < num_rows
    assert (found[positions[inside]] == ids[inside]).all()
    assert (positions[~inside] == ids.size).all()
    count = len(set(ids[inside]))
    assert set(found[:count]) == set(ids[inside])
    assert (found[count:] == num_rows).all()


def test_an_index_outside_is_reported_by_checkify():
    def make(indices):
        return row_gradient(indices, jnp.ones((3, D)), V, check=True)

    checked = jax.jit(checkify.checkify(make))
    error, _ = checked(jnp.array([0, 3, V - 1]))
    assert error.get() is None
    for bad in (-1, V):
        error, rows = checked(jnp.array([0, bad, 3]))
        assert f"index {bad} is outside [0, {V})" in error.get()
        check_rows(rows, [0, bad, 3], np.ones((3, D)))
    error, rows = checkify.checkify(lambda: make(np.array([0, 2**32 + 5, 3])))()
    assert f"index {2**32 + 5} is outside [0, {V})" in error.get()
    check_rows(rows, [0, V, 3], np.ones((3, D)))


def test_masked_arrays_are_refused():
    """JAX would read the elements that the mask hides."""
    ids, values = np.ma.array([1, 2], mask=[True, False]), np.ma.ones((2, D))
    params = {"w": jnp.ones((V, D))}
    exact = adamjax.exact_rows(adamjax.adam(0.1), "w")
    state = exact.init(params)
    for call in (
        lambda: row_gradient(ids, jnp.ones((2, D)), V),
        lambda: row_gradient([ids, jnp.arange(2)], jnp.ones((2, 2, D)), V),
        lambda: row_gradient([1, 2], values, V),
        lambda: row_gradient([1, 2], list(values), V),
        lambda: row_gradient([1, 2], jnp.ones((2, D)), 2) + values,
        lambda: exact.lookup(params, state, "w", ids),
        lambda: exact.prepare(params, state, {"w": ids}),
        lambda: exact.init({"w": np.ma.ones((V, D))}),
        lambda: exact.update({"w": np.ma.ones((V, D))}, state, params),
    ):
        with pytest.raises((TypeError, ValueError), match=r"is masked .*x\.filled\(value\)"):
            call()
    check_rows(row_gradient(ids.filled(-1), np.ones((2, D)), V), [-1, 2], np.ones((2, D)))


def test_arrays_of_another_byte_order_are_converted():
    ids, values = draw()
    rows = row_gradient(ids.astype(">i4"), values.astype(">f4"), V)
    check_rows(rows, ids, values)
    total = np.ones((V, D), ">f4") + rows
    np.testing.assert_array_equal(total, jnp.ones((V, D)) + rows)


@pytest.mark.parametrize(
    ("indices", "values", "num_rows", "error", "text"),
    [
        ([0.0], np.ones((1, D)), V, TypeError, "indices must be integers, got float"),
        ([0], np.ones((1, D), np.int32), V, TypeError, "values must be floats, got int32"),
        ([0, 1], np.ones((3, D)), V, ValueError, r"\(2,\) \+ \(\.\.\.\), got \(3, 3\)"),
        ([0], None, V, TypeError, "values must be floats, got None"),
        (np.array([1], "m8[s]"), np.ones((1, D)), V, TypeError, r"be integers, got timedelta64\[s"),
        ([np.timedelta64(1, "s")], np.ones((1, D)), V, TypeError, "be integers, got timedelta64"),
        ([0], np.ones((1, D)), -1, ValueError, "num_rows must be a Python int of.*got -1"),
        ([0], np.ones((1, D)), 2**31, ValueError, "num_rows must be.*got 2147483648"),
        ([0], np.ones((1, D)), True, ValueError, "num_rows must be.*got True"),
        ([0], np.ones((1, D)), np.True_, ValueError, "num_rows must be.*got np.True_"),
        ([0], np.ones((1, D)), 4.0, ValueError, "num_rows must be.*got 4.0"),
    ],
)
def test_row_gradient_refuses_arguments_that_do_not_fit(indices, values, num_rows, error, text):
    for ids in (indices, np.array(indices)):
        with pytest.raises(error, match=text):
            row_gradient(ids, values, num_rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_narrow_values_are_summed_in_float32(dtype):
    """In bfloat16 a sum of a thousand numbers near 1 stops growing at 256."""
    values = jnp.full((1000, 1), 1.00390625, dtype)
    rows = row_gradient(jnp.zeros(1000, int), values, 2)
    assert rows.dtype == dtype
    assert rows.to_dense()[0, 0] == jnp.sum(values.astype(jnp.float32)).astype(dtype)


@pytest.mark.parametrize(
    "ids", [[0, -1], pytest.param([], marks=pytest.mark.slow)], ids=["outside", "nothing"]
)
def test_a_table_of_no_rows(ids):
    """Every index is outside, and the other leaves move."""
    params = {"t": jnp.zeros((0, D)), "b": jnp.ones(2)}
    rows = row_gradient(np.array(ids, int), jnp.ones((len(ids), D)), 0)
    assert rows.to_dense().shape == (rows + rows).shape == (0, D)
    grads = {"t": rows, "b": jnp.ones(2)}
    dense_rule = adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adamw(0.1))
    lazy = adamjax.adamw(0.1, rows="lazy")
    for tx in (
        dense_rule,
        adamjax.chain(lazy, adamjax.weight_ema()),
        adamjax.exact_rows(dense_rule, "t"),
        adamjax.accumulate_gradients(lazy, 1, {"t": 4}),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        after = adamjax.apply_updates(params, updates)
        assert after["t"].shape == (0, D)
        assert_close(after["b"], jnp.full(2, 0.8996), rtol=1e-5)


# --- arithmetic ---------------------------------------------------------------------------------


@pytest.fixture
def rows():
    return row_gradient(*draw(seed=2), V)


@pytest.mark.slow
def test_arithmetic_is_that_of_the_dense_array(rows):
    array = rows.to_dense()
    for two in (2, 2.0, np.float32(2), jnp.float32(2), jnp.array(2)):
        assert_close((rows * two).to_dense(), array * 2)
        assert_close((two * rows).to_dense(), array * 2)
        assert_close((rows / two).to_dense(), array / 2)
    assert_close((-rows).to_dense(), -array)
    assert rows.astype(jnp.bfloat16).to_dense().dtype == jnp.bfloat16
    assert_close((rows + rows).to_dense(), 2 * array)
    table = jnp.asarray(np.random.default_rng(3).normal(size=(V, D)), jnp.float32)
    for moved in (
        table + rows,
        rows + table,
        np.asarray(table) + rows,
        jax.jit(lambda array, rows: array + rows)(table, rows),
    ):
        assert isinstance(moved, jax.Array)
        assert_close(moved, table + array)
    assert_close(adamjax.global_norm({"t": rows}), adamjax.global_norm({"t": array}))
    assert (rows.ndim, rows.size, rows.dtype) == (2, V * D, jnp.float32)


def test_arrays_of_another_shape_are_refused_in_arithmetic(rows):
    for other in (jnp.ones((V, D + 1)), jnp.ones(D), 1.0):
        with pytest.raises(TypeError):
            other + rows
    with pytest.raises(TypeError):
        rows * jnp.ones(D)
    with pytest.raises(ValueError, match="cannot be added"):
        rows + row_gradient(jnp.array([0]), jnp.ones((1, D)), V + 1)


def test_an_array_that_cannot_hold_the_sum_is_refused(rows):
    """The sum would lose imaginary parts or fractions."""
    for array, wrong in (
        (jnp.ones((V, D)), 1j * rows),
        (jnp.ones((V, D), int), rows),
        (jnp.ones((V, D), bool), rows),
        (np.ones((V, D), np.int8), rows),
    ):
        for add in (lambda a, b: a + b, lambda a, b: b + a):
            with pytest.raises(
                TypeError, match=r"row gradients of .*cannot be added to an array of"
            ):
                add(array, wrong)
    table = jnp.ones((V, D), jnp.complex64)
    assert_close(table + 1j * rows, table + 1j * rows.to_dense())
    assert_close(table + rows, table + rows.to_dense())


def test_a_factor_of_any_kind_gives_the_dtype_of_the_dense_product(rows):
    narrow = rows.astype(jnp.bfloat16)
    for r in (rows, narrow):
        for factor in (True, np.True_, jnp.array(False), 2j, jnp.float32(2), jnp.array([2.0])[0]):
            assert_close((r * factor).to_dense(), r.to_dense() * factor)


@pytest.mark.slow
def test_a_sum_of_row_gradients_is_lazy_if_both_are():
    a, b = (
        row_gradient(*draw((4,), seed=seed, low=0, high=V), V).replace(lazy=lazy)
        for seed, lazy in ((0, True), (1, False))
    )
    assert (a + a).lazy
    assert not any(rows.lazy for rows in (a + b, b + a, b + b))
    params = jnp.ones((V, D))
    tx = adamjax.chain(adamjax.scale_by_adam(), adamjax.add_decayed_weights(0.5))
    both = a + b.replace(lazy=True)
    moved = tx.update(both, tx.init(params), params)[0].to_dense()
    touched = np.zeros(V, bool)
    ids = np.asarray(both.indices)
    touched[ids[ids < V]] = True
    assert not np.any(np.asarray(moved)[~touched])


def test_dtypes_without_zero_or_negative_numbers_are_refused():
    x = jnp.ones((1, D), jnp.float8_e8m0fnu)
    with pytest.raises(TypeError, match="zero and negative, got float8_e8m0fnu"):
        row_gradient([0], x, V)
    with pytest.raises(TypeError, match=r"params\[''\] is float8_e8m0fnu.*zero and negative"):
        adamjax.adam(0.1).init(x)
    with pytest.raises(ValueError, match=r"is float8_e8m0fnu.*zero and negative"):
        adamjax.scale(0.5).update(x, ())
    assert row_gradient([0], x.astype(jnp.float8_e4m3fn), V).dtype == jnp.float8_e4m3fn


def test_a_narrow_table_is_rounded_once(rows):
    table = jnp.asarray(np.random.default_rng(3).normal(size=(V, D)), jnp.bfloat16)
    moved = table + 1e-3 * rows
    exact = (table.astype(jnp.float32) + 1e-3 * rows.to_dense()).astype(jnp.bfloat16)
    assert moved.dtype == jnp.bfloat16
    assert (moved == exact).all()


def test_is_a_pytree_that_compares_and_pickles(rows):
    leaves, treedef = jax.tree.flatten(rows)
    assert treedef.unflatten(leaves) == rows
    assert pickle.loads(pickle.dumps(rows)) == rows == copy.deepcopy(rows)
    assert rows != -rows


def test_under_vmap():
    indices, values = draw((4, 10))
    tables = jax.vmap(lambda i, g: row_gradient(i, g, V).to_dense())(indices, values)
    assert_close(tables.sum(0), row_gradient(indices, values, V).to_dense(), 1e-5)


# --- arithmetic on leaves -----------------------------------------------------------------------


# Mistakes: computations on all leaves of row gradients, and so on the indices too.
MISTAKEN = {
    "added by jnp": lambda a, b: jax.tree.map(jnp.add, a, b),
    "added": lambda a, b: jax.tree.map(lambda x, y: x + y, a, b),
    "doubled": lambda a, b: jax.tree.map(lambda x: 2 * x, a),
    "negative": lambda a, b: jax.tree.map(jnp.negative, a),
    "subtracted": lambda a, b: jax.tree.map(jnp.subtract, a, b),
    "zeros": lambda a, b: jax.tree.map(jnp.zeros_like, a),
    "ones": lambda a, b: jax.tree.map(jnp.ones_like, a),
    "integer mean": lambda a, b: jax.tree.map(lambda x, y: (x + y) // 2, a, b),
    "sum of 64": lambda a, b: jax.tree.map(lambda *x: sum(x), *[a] * 64),
    "absolute value": lambda a, b: jax.tree.map(jnp.abs, a),
    "clipped": lambda a, b: jax.tree.map(lambda x: jnp.clip(x, -1, 1), a),
    "squared": lambda a, b: jax.tree.map(jnp.square, a),
    "micro-batches": lambda a, b: jax.tree.map(
        lambda s, x: s + x, jax.tree.map(lambda s, x: s + x, jax.tree.map(jnp.zeros_like, a), a), b
    ),
}
# Uses of a row gradient, with tables of zeros.
USES = {
    "to_dense": lambda rows: rows.to_dense(),
    "table + rows": lambda rows: jnp.zeros(rows.shape) + rows,
    "rows + rows": lambda rows: (rows + rows.emptied()).to_dense(),
    "others + rows": lambda rows: (row_gradient([], jnp.zeros((0, D)), V) + rows).to_dense(),
    "2 * rows": lambda rows: (2 * rows).to_dense(),
    "astype": lambda rows: rows.astype(jnp.bfloat16).to_dense(),
    "global_norm": lambda rows: adamjax.global_norm([rows]) * jnp.ones(1),
    "apply_updates": lambda rows: adamjax.apply_updates(jnp.zeros(rows.shape), rows),
    "optax": lambda rows: optax.apply_updates(jnp.zeros(rows.shape), rows),
    "lazy": lambda rows: updated(adamjax.adam(0.1, rows="lazy"), rows),
    "dense": lambda rows: updated(adamjax.adamw(0.1), rows),
    "clipped": lambda rows: updated(adamjax.clip_by_norm(1.0), rows),
    "exact": lambda rows: updated(adamjax.exact_rows(adamjax.adam(0.1), ""), rows),
    "scaled": lambda rows: updated(adamjax.scale(2.0), rows),
    "accumulated": lambda rows: updated(
        adamjax.accumulate_gradients(adamjax.scale(2.0), 1, max_rows=20), rows
    ),
}


def updated(tx, rows):
    params = jnp.zeros(rows.shape)
    return adamjax.apply_updates(params, tx.update(rows, tx.init(params), params)[0])


def two_gradients():
    return [row_gradient(*draw((6,), seed=seed, low=0, high=V), V) for seed in range(2)]


@pytest.mark.parametrize("name", MISTAKEN)
def test_arithmetic_on_leaves_is_refused_where_it_is_used(name):
    wrong = MISTAKEN[name](*two_gradients())
    for use in USES.values():
        with pytest.raises(ValueError, match=r"computed with the leaves.*a \+ b.*sum_over"):
            use(wrong)


@pytest.mark.slow
def test_arithmetic_on_leaves_of_another_program_makes_nan():
    """If the arithmetic was done outside the step's `jit`, only the compiled step can notice it.

    Then the result has NaN, at least in the first row.
    """
    for use in USES.values():
        step = jax.jit(use)
        right = step(two_gradients()[0])
        assert np.isfinite(right.astype(np.float32)).all()
        for make in MISTAKEN.values():
            assert np.isnan(step(make(*two_gradients())).astype(np.float32)).reshape(-1)[0]


def test_arithmetic_on_leaves_within_a_program_is_refused_or_makes_nan():
    for make in MISTAKEN.values():
        table = jnp.nan
        with contextlib.suppress(ValueError):  # if it is refused while tracing
            table = jax.jit(lambda make=make: (jnp.zeros((V, D)) + make(*two_gradients()))[:6])()
        assert np.isnan(table).all()


def test_means_of_leaves_are_refused():
    halved = jax.tree.map(lambda x: x / 2, two_gradients()[0])
    with pytest.raises(TypeError, match="indices of a row gradient are float32"):
        halved.to_dense()


@pytest.mark.slow
def test_sums_over_replicas_by_leaves_are_refused_or_make_nan():
    indices, values = draw((4, 6), low=0, high=V)

    def summed(add):
        def f(i, g):
            return jnp.zeros((V, D)) + add(row_gradient(i, g, V))

        return jax.jit(jax.vmap(f, axis_name="d"))(indices, values)

    right = summed(lambda rows: adamjax.sum_over("d").update(rows, ())[0])
    assert_close(right[0], row_gradient(indices, values, V).to_dense(), 1e-5)
    for wrong in (jax.lax.psum, jax.lax.pmean):
        # A newer JAX computes `psum` of a constant at once, so this may be refused while tracing.
        table = jnp.nan
        with contextlib.suppress(ValueError, TypeError):
            table = summed(lambda rows, wrong=wrong: wrong(rows, "d"))[:, :6]
        assert np.isnan(table).all()


stacked_gradients = jax.vmap(lambda i, g: row_gradient(i, g, V))
# Functions that move or copy the first of two row gradients, and return it unchanged.
UNCHANGED = {
    "chosen": lambda a, b: jax.tree.map(lambda x, y: jnp.where(jnp.bool_(True), x, y), a, b),
    "copied": lambda a, b: jax.tree.map(jnp.copy, a),
    "to NumPy": lambda a, b: jax.device_get(a),
    "to a device": lambda a, b: jax.device_put(a, jax.devices()[0]),
    "pickled": lambda a, b: pickle.loads(pickle.dumps(a)),
    "jitted": lambda a, b: jax.jit(lambda x: x)(a),
    "conditional": lambda a, b: jax.lax.cond(True, lambda: a, lambda: b),
    "carried": lambda a, b: jax.lax.fori_loop(0, 2, lambda _, x: x, a),
    "unstacked": lambda a, b: jax.tree.map(
        lambda x: x[0], jax.tree.map(lambda *x: jnp.stack(x), a, b)
    ),
    "mapped": lambda a, b: jax.tree.map(
        lambda x: x[0], stacked_gradients(a.indices[None], a.values[None])
    ),
    "negated twice": lambda a, b: -1 * (-a),
    "by hand": lambda a, b: adamjax.RowGradient(a.indices, a.values, num_rows=V),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_moving_or_copying_row_gradients_keeps_them(name):
    right = two_gradients()[0].to_dense()
    moved = UNCHANGED[name](*two_gradients())
    for made in (moved.to_dense(), jax.jit(lambda x: x.to_dense())(moved)):
        assert_close(made, right)
    assert "seal" not in repr(moved)


def test_stacked_row_gradients_are_refused():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *two_gradients())
    with pytest.raises(ValueError, match=r"indices of shape \(2, 6\).*make one: row_gradient"):
        stacked.to_dense()
    one = row_gradient(stacked.indices, stacked.values, V)
    a, b = two_gradients()
    assert_close(one.to_dense(), (a + b).to_dense())


def pipeline(rows):
    rule = adamjax.adamw(0.1, rows=rows)
    return adamjax.chain(adamjax.clip_by_global_norm(1.0), rule, adamjax.weight_ema(0.99))


# Without adam, whose step is a part of that of adamw.
TABLE_OPTIMIZERS = {
    "lazy adamw": adamjax.adamw(0.1, rows="lazy"),
    "lazy amsgrad": adamjax.amsgrad(0.1, rows="lazy"),
    "lazy pipeline": pipeline("lazy"),
    "dense adamw": adamjax.adamw(0.1),
    "exact adamw": adamjax.exact_rows(adamjax.adamw(0.1), "t"),
    "exact amsgrad": adamjax.exact_rows(adamjax.amsgrad(0.1), "t"),
    "exact pipeline": adamjax.exact_rows(pipeline("dense"), "t"),
}


@pytest.mark.parametrize("name", ["lazy adamw", "dense adamw", "exact pipeline"])
def test_a_program_that_makes_its_row_gradients_has_no_seal(name):
    """Not even in the branches of `skip_not_finite` and `accumulate_gradients`."""
    for around in (
        lambda tx: tx,
        adamjax.skip_not_finite,
        lambda tx: adamjax.accumulate_gradients(tx, 2, max_rows=20),
    ):
        tx, params = around(TABLE_OPTIMIZERS[name]), {"t": jnp.zeros((V, D))}

        def step(params, state, indices, values, tx=tx):
            updates, state = tx.update({"t": row_gradient(indices, values, V)}, state, params)
            return adamjax.apply_updates(params, updates), state

        text = jax.jit(step).lower(params, tx.init(params), *draw((6,))).as_text()
        assert str(int(SEAL)) not in text


# --- through transforms -------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": lambda rows: adamjax.adam(0.1, rows=rows),
    "amsgrad, eps": lambda rows: adamjax.amsgrad(0.1, eps=1e-8, rows=rows),
    "adamax": lambda rows: adamjax.adamax(0.1, rows=rows),
    "nadam": lambda rows: adamjax.nadam(0.1, rows=rows),
    "pipeline": lambda rows: adamjax.chain(
        adamjax.clip_by_value(0.9),
        adamjax.clip_by_norm(2.0),
        adamjax.clip_by_global_norm(1.5),
        adamjax.adamw(adamjax.cosine_decay(0.1, 9), weight_decay=0.1, rows=rows),
        adamjax.weight_ema(0.9),
    ),
    "by_path": lambda rows: adamjax.adam(adamjax.by_path([("t", 0.1)], default=0.2), rows=rows),
    "skip_not_finite": lambda rows: adamjax.skip_not_finite(adamjax.adam(0.1, rows=rows)),
    "decay before": lambda rows: adamjax.chain(
        adamjax.add_decayed_weights(0.1), adamjax.adam(0.1, rows=rows)
    ),
    "no rule": lambda rows: adamjax.chain(
        adamjax.add_decayed_weights(0.1), adamjax.scale(-0.1), adamjax.weight_ema(0.5, 2)
    ),
}


def run(tx, steps, *, as_rows):
    """Parameters and state after steps with row gradients or with the dense ones."""
    params = {
        "b": jnp.ones(4),
        "t": jnp.asarray(np.random.default_rng(5).normal(size=(V, D)), jnp.float32),
    }
    state = tx.init(params)

    @jax.jit
    def step(params, state, indices, values):
        g = row_gradient(indices, values, V)
        grads = {"b": params["b"], "t": g if as_rows else g.to_dense()}
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    for t in range(steps):
        params, state = step(params, state, *draw((12,), seed=t, high=V - 3))
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_dense_rows_a_row_gradient_equals_the_dense_gradient(name):
    tx = OPTIMIZERS[name]("dense")
    rows = run(tx, 8, as_rows=True)
    assert_close(rows, run(tx, 8, as_rows=False), 2e-6)


# Without the two whose weight decay is not lazy, so that it moves every row.
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ("decay before", "no rule")])
def test_with_lazy_rows_those_without_a_gradient_stand_still(name):
    """So do their moments and averages. The other rows move as with the dense gradient."""
    tx = OPTIMIZERS[name]("lazy")
    params = {"b": jnp.ones(4), "t": jnp.asarray(np.random.default_rng(5).normal(size=(V, D)))}
    state = tx.init(params)
    indices, values = draw((12,), seed=1)
    for _ in range(2):
        g = row_gradient(indices, values, V)
        updates, after = tx.update({"b": params["b"], "t": g}, state, params)
        moved = adamjax.apply_updates(params, updates)
        has_gradient = np.isin(np.arange(V), indices)
        for new, old in zip(
            jax.tree.leaves((moved, after)), jax.tree.leaves((params, state)), strict=True
        ):
            if np.shape(old) == (V, D):
                assert (np.asarray(new)[~has_gradient] == np.asarray(old)[~has_gradient]).all()
        assert (np.asarray(moved["t"])[has_gradient] != np.asarray(params["t"])[has_gradient]).all()
        dense_grads = {"b": params["b"], "t": g.to_dense()}
        updates, _ = tx.update(dense_grads, state, params)
        full = adamjax.apply_updates(params, updates)
        assert_close(moved["t"][has_gradient], full["t"][has_gradient], 1e-6)
        params, state = moved, after


def test_a_row_gradient_without_rows_is_a_gradient_of_zero():
    tx, params = adamjax.adamw(0.1, weight_decay=0.1), {"t": jnp.ones((V, D))}
    empty = row_gradient(jnp.zeros(0, int), jnp.zeros((0, D)), V)
    zeros = {"t": jnp.zeros((V, D))}
    updates, _ = tx.update({"t": empty}, tx.init(params), params)
    expected, _ = tx.update(zeros, tx.init(params), params)
    assert_close(adamjax.apply_updates(params, updates), adamjax.apply_updates(params, expected))


def test_rows_must_be_dense_or_lazy():
    with pytest.raises(
        ValueError, match=r"rows must be 'dense' or 'lazy', got 'exact'.*exact_rows"
    ):
        adamjax.adam(rows="exact")


# --- with other packages ------------------------------------------------------------------------


def lazy_step():
    """A lazy optimizer, parameters, row gradients, and the parameters after a step."""
    params, (indices, values) = {"t": jnp.ones((V, D))}, draw(high=V, low=0)
    grads = {"t": row_gradient(indices, values, V)}
    tx = adamjax.adam(0.1, rows="lazy")
    updates, _ = tx.update(grads, tx.init(params), params)
    return tx, params, grads, adamjax.apply_updates(params, updates)


def test_optax_applies_rows():
    tx, params, grads, expected = lazy_step()
    tx = optax.chain(tx)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_close(jax.jit(optax.apply_updates)(params, updates), expected)


def test_flax_applies_rows():
    pytest.importorskip("flax")
    from flax import nnx
    from flax.training.train_state import TrainState

    tx, params, grads, expected = lazy_step()
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    assert_close(state.apply_gradients(grads=grads).params, expected)

    class Model(nnx.Module):
        def __init__(self):
            self.t = nnx.Param(params["t"])

    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(lambda _: grads["t"], nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    assert_close(model.t[...], expected["t"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.scale(2.0),
        lambda: optax.clip(1.0),
        lambda: optax.clip_by_global_norm(1.0),
        lambda: optax.scale_by_adam(),
        lambda: optax.add_decayed_weights(0.1),
        lambda: optax.scale_by_schedule(lambda count: 1.0),
    ],
)
def test_an_error_names_the_transform_that_cannot_take_row_gradients(make):
    params, grads = {"t": jnp.ones((V, D))}, {"t": row_gradient(*draw(), V)}
    foreign = make()
    name = foreign.update.__qualname__.split(".")[0]
    for tx in (
        adamjax.chain(foreign, adamjax.adam()),
        adamjax.chain(adamjax.adam(rows="lazy"), foreign),
    ):
        with pytest.raises(TypeError, match=rf"foreign\({name}\b.*cannot take row.*'t'"):
            tx.update(grads, tx.init(params), params)


def test_a_foreign_transform_that_leaves_rows_alone_is_accepted():
    params, grads = {"t": jnp.ones((V, D))}, {"t": row_gradient(*draw(), V)}
    tx = adamjax.chain(optax.masked(optax.scale(2.0), {"t": False}), adamjax.adam())
    alone = adamjax.adam()
    assert_close(
        tx.update(grads, tx.init(params), params)[0]["t"].to_dense(),
        alone.update(grads, alone.init(params), params)[0]["t"].to_dense(),
    )


def test_indices_that_optax_has_scaled_are_refused():
    tx, params, grads, _ = lazy_step()
    around = optax.chain(optax.scale(2.0), tx)
    with pytest.raises(
        TypeError, match=r"scale_by_adam: the indices .* are float32, expected int32"
    ):
        around.update(grads, around.init(params), params)
    around = optax.chain(tx, optax.scale(2.0))
    updates, _ = around.update(grads, around.init(params), params)
    with pytest.raises(TypeError, match=r"the indices .* are float32"):
        optax.apply_updates(params, updates)


# --- memory -------------------------------------------------------------------------------------


# 10,000 rows are worked on in blocks.
@pytest.mark.parametrize(("n", "fraction"), [(512, 1 / 8), (10_000, 1 / 2)])
@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="an older XLA copies more")
def test_tables_are_updated_in_place(name, n, fraction):
    """A donated step has no temporaries of a table's size: no copy and no dense gradient."""
    tx, num_rows, width = TABLE_OPTIMIZERS[name], 2**17, 32

    def step(params, state, indices, values):
        grads = {"t": row_gradient(indices, values, num_rows)}
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    params = {"t": jax.ShapeDtypeStruct((num_rows, width), jnp.float32)}
    batch = jax.ShapeDtypeStruct((n,), jnp.int32), jax.ShapeDtypeStruct((n, width), jnp.float32)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, *batch).compile()
    memory = compiled.memory_analysis()
    state_bytes = sum(4 * x.size for x in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < num_rows * width * 4 * fraction
    assert memory.alias_size_in_bytes == num_rows * width * 4 + state_bytes
