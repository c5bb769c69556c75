"""Compares `adamjax.value_and_grad` with `jax.value_and_grad`, and checks its row gradients.

Each loss in `CASES` is compared with JAX. Further tests cover the arguments of `value_and_grad`,
models of other packages, and `value_and_grad` within JAX's transformations.

Tables and weights are small multiples of 1/2. The arithmetic of most losses does not round these,
so every sum is exact in any order, and values and gradients must be equal. A loss that rounds has
`exact=False`. Its values and gradients may differ by 1e-6 of the largest element, about eight
times the epsilon of float32, because XLA may fuse the two programs differently.
"""

import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from support import enable_x64, is_none, run_on_devices

import adamjax
from adamjax import RowGradient
from adamjax._compat import as_varying
from adamjax.paths import leaf_paths

V, D = 11, 3  # the rows and columns of most tables


# --- cases, and how results are compared ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
    """Expects a row gradient for a table of which the loss only reads rows.

    Attributes:
      ids: the indices that the loss reads. Those outside of `[-num_rows, num_rows)` read no row. Or
        a function that reads an array as the loss reads the table: from `arange(num_rows)` it
        returns these indices.
      max_indices: how many indices the row gradient may have. With branches, these are the indices
        of all branches together. `None`: as many as `ids`, which is then an array.
    """

    ids: Any
    max_indices: int | None = None

    def __post_init__(self):
        if self.max_indices is None:
            object.__setattr__(self, "max_indices", np.size(self.ids))

    def resolve(self, table):
        """The same with an array as `ids`, if `ids` is a function."""
        if not callable(self.ids):
            return self
        return dataclasses.replace(self, ids=self.ids(jnp.arange(float(len(table)))))

    def valid_ids(self, num_rows):
        """The set of the rows that are read, as numbers from 0 to num_rows - 1."""
        ids = np.asarray(self.ids, np.float64).reshape(-1)
        # For an index out of bounds, a function reads the fill value: 0.5, -0.5 or NaN.
        ids = ids[ids == np.round(ids)]
        ids = np.where(ids < 0, ids + num_rows, ids)
        return set(ids[(ids >= 0) & (ids < num_rows)].tolist())


jax.tree_util.register_dataclass(Rows, data_fields=["ids"], meta_fields=["max_indices"])


@dataclasses.dataclass(frozen=True)
class Dense:
    """Expects a dense gradient for a table, because an operation uses the whole table."""

    operation: str  # the name of its primitive


# A table that may get a row gradient or a dense one.
ANY = object()


@dataclasses.dataclass(frozen=True)
class Case:
    loss: Callable[..., Any]
    args: tuple[Any, ...]
    tables: dict[str, Any]  # `Rows`, `Dense` or `ANY`, by the table's path in the first argument
    exact: bool = True  # whether values and gradients must be equal to JAX's


CASES: dict[str, Case] = {}


def case(*args, exact=True, **tables):
    """Returns a decorator that adds a loss to `CASES`. `__` in a table's name means a slash."""

    def add(loss):
        name = loss.__name__.rstrip("_")
        assert name not in CASES
        tables_by_path = {key.replace("__", "/"): table for key, table in tables.items()}
        CASES[name] = Case(loss, args, tables_by_path, exact)
        return loss

    return add


def halves(*shape, dtype=np.float32, seed=0):
    """Multiples of 1/2 from -2 to 2, without 0."""
    numbers = np.random.default_rng(seed).choice([-4, -3, -2, -1, 1, 2, 3, 4], shape)
    return (numbers / 2).astype(dtype)


def params(dtype=np.float32, trailing=(D,), num_rows=V, **more):
    table = halves(num_rows, *trailing, dtype=dtype)
    return {"table": table, "w": np.float32(0.5), **more}


TWO_TABLES = params(other=halves(V, D, seed=1))


def quad(p, rows):
    """float32[], a quadratic function of rows.

    Neighbouring elements have different factors, so a gradient at the wrong place is noticed.
    """
    factors = np.resize(np.float32([1, 2, 3, -1, -2, -3, 2]), np.shape(rows))
    return jnp.sum(factors * rows * (rows + p["w"]), dtype=jnp.float32)


VALID = np.array([3, 0, 10, 3, 7, 0, 1], np.int32)  # rows 3 and 0 are read twice
MANY = np.array([[3, 0, 10, 3], [7, 0, 1, 5], [3, 3, 9, 8]], np.int32)
OUTSIDE = np.array([3, -1, 3, 10, 11, 25, -11, -12, -40, 8, 2**31 - 1, -(2**31)], np.int32)


def is_array(x):
    return isinstance(x, np.ndarray | np.generic | jax.Array)


def is_float(x):
    return isinstance(x, float) or (is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact))


def is_rows_or_none(x):
    return x is None or isinstance(x, RowGradient)


def split(tree, wanted):
    """The leaves for which `wanted` is true, and a function that replaces them in the tree."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_none)

    def merge(new):
        new = iter(new)
        return treedef.unflatten([next(new) if wanted(x) else x for x in leaves])

    return [x for x in leaves if wanted(x)], merge


def jax_value_and_grad(loss, args):
    """JAX's value and gradients of the first argument's floats; `None` for its other leaves."""
    floats, merge = split(args[0], is_float)
    value, grads = jax.value_and_grad(lambda x: loss(merge(x), *args[1:]))(floats)
    _, fill = split(jax.tree.map(lambda x: x if is_float(x) else None, args[0]), is_float)
    return value, fill(grads)


def dense(grads):
    return jax.tree.map(
        lambda g: g.to_dense() if isinstance(g, RowGradient) else g, grads, is_leaf=is_rows_or_none
    )


def assert_equal(actual, expected, exact=True):
    """Expects the same structure, dtypes and shapes, and equal numbers.

    Without `exact`, numbers of an array may differ by 1e-6 of its largest magnitude.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b))
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        atol = 0.0 if exact else 1e-6 * np.max(np.abs(b), initial=0.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def check_rows(rows, table, expected):
    """Expects a well-formed row gradient: only rows that were read, at most `max_indices` indices.

    A row that was read may be missing, if its gradient is zero.
    """
    assert isinstance(rows, RowGradient), type(rows)
    assert (rows.shape, rows.dtype) == (jnp.shape(table), jnp.result_type(table))
    assert rows.indices.dtype == jnp.int32
    assert rows.rest is None
    assert not rows.lazy
    indices, values = np.asarray(rows.indices), np.asarray(rows.values)
    assert indices.ndim == 1
    assert len(values) == len(indices)
    used = indices[indices < rows.num_rows]
    assert (indices >= 0).all()
    assert (indices <= rows.num_rows).all()
    assert len(set(used.tolist())) == len(used)
    assert not np.any(values[indices == rows.num_rows])
    if expected is not ANY:
        assert set(used.tolist()) <= expected.valid_ids(rows.num_rows)
        assert len(indices) <= expected.max_indices


def leaves_by_path(tree):
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree, is_leaf=is_rows_or_none), strict=True))


def dense_by_numpy(g):
    """The dense gradient, in NumPy. `to_dense` would be compiled for each shape."""
    if not isinstance(g, RowGradient):
        return g
    used = np.asarray(g.indices) < g.num_rows
    table = np.zeros(g.shape, g.dtype)
    table[np.asarray(g.indices)[used]] = np.asarray(g.values)[used]
    return table


def check(case, actual, expected, tables=None):
    """Compares value and gradients with JAX's, and expects row gradients for the case's `Rows`.

    Args:
      actual: value and gradients of adamjax.
      expected: value and gradients of JAX.
      tables: replaces `case.tables`.
    """
    value, grads = actual
    assert_equal(value, expected[0], case.exact)
    assert jax.tree.structure(grads, is_leaf=is_rows_or_none) == jax.tree.structure(
        expected[1], is_leaf=is_rows_or_none
    )
    assert_equal(
        jax.tree.map(dense_by_numpy, grads, is_leaf=is_rows_or_none), expected[1], case.exact
    )
    leaves = leaves_by_path(case.args[0])
    for path, g in leaves_by_path(grads).items():
        table = (tables or case.tables).get(path)
        if isinstance(table, Rows) or (table is ANY and isinstance(g, RowGradient)):
            check_rows(g, leaves[path], table)
        else:
            assert g is None or isinstance(g, jax.Array)


def case_value_and_grad(case, **options):
    """`adamjax.value_and_grad` of the loss and the tables of a case."""
    tables = [f"^{re.escape(path)}$" for path in case.tables]
    return adamjax.value_and_grad(case.loss, tables, **options)


# --- reads of whole rows, by every function and in every mode -------------------------------------


def read_case(name, reader, ids, exact=True, **table):
    """Adds a case whose loss reads rows of the table by `reader(table, ids)`.

    `Rows` applies the reader to the vector of row numbers. So the reader must also read a vector.
    """

    def loss(p, ids):
        rows = reader(p["table"], ids)
        # An index out of bounds may read NaN.
        return quad(p, jnp.where(jnp.isnan(rows), 1.5, rows))

    rows = Rows(lambda numbers: reader(numbers, ids), np.size(ids))
    assert name not in CASES
    CASES[name] = Case(loss, (params(**table), ids), {"table": rows}, exact)


def at_get(**options):
    return lambda t, ids: t.at[ids].get(**options)


def taken(**options):
    return lambda t, ids: jnp.take(t, ids, axis=0, **options)


def indexed(t, ids):
    return t[ids]


for name, ids in {
    "scalar": np.int32(4),
    "negative_scalar": np.int32(-4),
    "1d": VALID,
    "2d": MANY,
    "3d": -MANY.reshape(2, 3, 2),
    "empty": np.zeros(0, np.int32),
    "empty_2d": np.zeros((2, 0), np.int32),
    "empty_2d_first": np.zeros((0, 2), np.int32),
    "outside": OUTSIDE,
    "one_row_often": np.full(50, 6, np.int32),
    "all_rows_twice": np.arange(-V, V, dtype=np.int32),
    "uint8": VALID.astype(np.uint8),
    "int8": -VALID.astype(np.int8),
    "uint32": VALID.astype(np.uint32),
    "int64": -VALID.astype(np.int64),
}.items():
    read_case(f"index_{name}", indexed, ids)

for name, reader in {
    "take": taken(),
    "take_fill": taken(mode="fill"),
    "take_fill_value": taken(mode="fill", fill_value=0.5),
    "take_clip": taken(mode="clip"),
    "take_wrap": taken(mode="wrap"),
    "at_get": at_get(),
    "at_fill": at_get(mode="fill"),
    "at_fill_value": at_get(mode="fill", fill_value=0.5),
    "at_drop": at_get(mode="drop"),
    "at_drop_value": at_get(mode="drop", fill_value=-0.5),
    "at_clip": at_get(mode="clip"),
}.items():
    read_case(f"{name}_outside", reader, OUTSIDE.reshape(2, 6))

read_case("take_scalar_outside", taken(), np.int32(V))
read_case("clip_scalar_outside", at_get(mode="clip"), np.int32(V))
read_case("take_empty", taken(), np.zeros(0, np.int32))

# More rows than the dtype of the indices can count.
uint8_ids = np.array([0, 1, 127, 127, 128, 255, 100], np.uint8)
read_case("index_300_rows", indexed, uint8_ids, num_rows=300)
read_case("clip_300_rows", at_get(mode="clip"), uint8_ids, num_rows=300)
if jax.__version_info__ >= (0, 10):  # an older JAX loses these gradients
    read_case("take_300_rows_uint8", taken(), uint8_ids, num_rows=300)
    read_case("take_300_rows_int8", taken(), uint8_ids.astype(np.int8), num_rows=300)

read_case("at_promised", at_get(mode="promise_in_bounds"), VALID)
read_case("at_promised_sorted", at_get(indices_are_sorted=True), np.sort(VALID))
read_case("at_promised_unique", at_get(unique_indices=True), np.unique(VALID))
read_case("at_unwrapped", at_get(mode="fill", wrap_negative_indices=False), OUTSIDE)
read_case("take_flat", lambda t, ids: jnp.take(t, ids, 0).reshape(-1), MANY)
read_case("index_ellipsis", lambda t, ids: t[ids, ...], MANY)
read_case("index_colon", lambda t, ids: t[ids, :] if t.ndim > 1 else t[ids], MANY)
read_case("index_of_index", lambda t, ids: t[ids[ids[0, 0] % 3]], MANY)
read_case("rows_reshaped", lambda t, ids: t[ids].reshape(ids.size, -1).T, MANY)
read_case("rows_cast_down_and_up", lambda t, ids: t[ids].astype("bfloat16").astype("float32"), MANY)

for name, trailing in {"bias": (), "3d": (2, 3), "4d": (2, 1, 2), "narrow": (1,)}.items():
    read_case(f"table_{name}", indexed, MANY, trailing=trailing)
    read_case(f"table_{name}_outside", taken(), OUTSIDE, trailing=trailing)

for dtype in (jnp.bfloat16, jnp.float16):
    for name, reader, ids in (
        ("index", indexed, VALID),
        ("take", taken(), OUTSIDE),
        ("clip", at_get(mode="clip"), OUTSIDE),
        ("cast_up", lambda t, ids: t.astype(jnp.float32)[ids], MANY),
    ):
        read_case(f"{jnp.dtype(dtype).name}_{name}", reader, ids, dtype=dtype)

for name, reader in {
    "bfloat16": lambda t, ids: t.astype(jnp.bfloat16)[ids],
    "float16": lambda t, ids: jnp.take(t.astype(jnp.float16), ids, axis=0),
    "bfloat16_and_back": lambda t, ids: t.astype(jnp.bfloat16).astype(jnp.float32)[ids],
    "bfloat16_twice": lambda t, ids: t.astype(jnp.bfloat16).astype(jnp.float16)[ids],
    "bfloat16_filled": lambda t, ids: jnp.take(t.astype(jnp.bfloat16), ids, 0, fill_value=0.5),
    "under_jit": lambda t, ids: jax.jit(lambda t: t.astype(jnp.bfloat16))(t)[ids],
}.items():
    read_case(f"table_cast_{name}", reader, OUTSIDE)

# Reshapes of the table that keep its rows whole.
read_case("table_expanded", lambda t, ids: t[..., None][ids], MANY)
read_case("table_flattened", lambda t, ids: t.reshape(V, -1)[ids], MANY, trailing=(2, 3))
read_case("table_folded", lambda t, ids: t.reshape(V, 2, -1)[ids] if t.ndim > 1 else t[ids], MANY,
          trailing=(4,))  # fmt: skip
read_case("table_squeezed", lambda t, ids: t.reshape(V, -1).squeeze()[ids], MANY, trailing=(1,))
read_case("table_cast_expanded", lambda t, ids: t.astype("bfloat16")[..., None][ids], MANY)

# Reads of whole rows that also index an axis of size 1. An index outside of this axis drops the
# gradient, as an index outside the table does.
OUTSIDE_COLUMNS = np.array([0, 0, 1, 0, 0, 0, -2, 0, 0, -1, 0, 0], np.int32)


def column(t, ids, **options):
    """`t[ids, OUTSIDE_COLUMNS]`, for a `t` that may be the vector of row numbers."""
    t = t if t.ndim > 1 else t[:, None]
    return t.at[ids, OUTSIDE_COLUMNS].get(**options)


for name, options in {
    "index": {},
    "fill": {"mode": "fill", "fill_value": 0.5},
    "clip": {"mode": "clip"},
    "promised": {"mode": "promise_in_bounds"},
}.items():
    reader = functools.partial(column, **options)
    read_case(f"column_{name}", reader, OUTSIDE, trailing=(1,))
    read_case(f"column_of_matrix_{name}", reader, OUTSIDE, trailing=(1, 3))
read_case("column_first", lambda t, ids: t[ids, 0] if t.ndim > 1 else t[ids], OUTSIDE,
          trailing=(1,))  # fmt: skip
read_case("column_outside", lambda t, ids: t[ids, 1] if t.ndim > 1 else t[ids], OUTSIDE,
          trailing=(1,))  # fmt: skip
read_case("table_expanded_column", lambda t, ids: t[:, None][ids, OUTSIDE_COLUMNS], OUTSIDE)

# Indices that are known when the loss is traced.
read_case("python_int", lambda t, _: t[3], np.int32(0))
read_case("negative_python_int", lambda t, _: t[-3], np.int32(0))
read_case("python_list", lambda t, _: t[jnp.array([1, -1, 1])], np.zeros(3, np.int32))
read_case("numpy_mask", lambda t, _: t[np.arange(V) % 4 == 0], np.zeros(3, np.int32))
read_case("first_rows", lambda t, _: t[:4], np.zeros(4, np.int32))
read_case("last_rows", lambda t, _: t[-4:], np.zeros(4, np.int32))
read_case("every_third_row", lambda t, _: t[1::3], np.zeros(4, np.int32))
read_case("dynamic_slice", lambda t, i: lax.dynamic_slice_in_dim(t, i[0], 3), np.int32([2, 0, 0]))
read_case("dynamic_slice_outside", lambda t, i: lax.dynamic_slice_in_dim(t, i[0], 3),
          np.int32([V - 1, 0, 0]))  # fmt: skip
read_case("dynamic_index", lambda t, i: lax.dynamic_index_in_dim(t, i[0], keepdims=False),
          np.int32([-2]))  # fmt: skip
read_case("slice_in_dim", lambda t, _: lax.slice_in_dim(t, 2, 5), np.zeros(3, np.int32))

# Reads under vmap, which makes one gather of the reads of all examples.
read_case("vmap", lambda t, ids: jax.vmap(lambda i: t[i])(ids), MANY)
read_case("vmap_of_table", lambda t, ids: jax.vmap(indexed, (None, 0))(t, ids), MANY)
read_case("vmap_columns", lambda t, ids: jax.vmap(lambda i: t[i], 1)(ids), MANY)
read_case("vmap_out_axis", lambda t, ids: jax.vmap(lambda i: t[i], out_axes=1)(ids), MANY)
read_case("vmap_twice", lambda t, ids: jax.vmap(jax.vmap(lambda i: t[i]))(ids), MANY)
read_case("vmap_take", lambda t, ids: jax.vmap(lambda i: jnp.take(t, i, 0))(ids), OUTSIDE)
read_case("vmap_dynamic_index", lambda t, ids: jax.vmap(
    lambda i: lax.dynamic_index_in_dim(t, i, keepdims=False))(ids), VALID)  # fmt: skip
read_case("vmap_empty", lambda t, ids: jax.vmap(lambda i: t[i])(ids), np.zeros((3, 0), np.int32))


# --- models ---------------------------------------------------------------------------------------


@case(params(), MANY, table=Rows(MANY))
def bag_sum(p, ids):
    return quad(p, p["table"][ids].sum(1))


@case(params(), MANY, table=Rows(MANY))
def bag_mean(p, ids):
    return quad(p, p["table"][ids].mean(1))


@case(params(), MANY, MANY % 2 == 0, table=Rows(MANY))
def bag_with_mask(p, ids, mask):
    rows = jnp.take(p["table"], ids, axis=0)
    return quad(p, jnp.sum(rows, 1, where=mask[..., None]))


@case(params(), MANY, np.float32(MANY % 3), table=Rows(MANY))
def bag_with_weights(p, ids, weights):
    return quad(p, jnp.einsum("bl,bld->bd", weights, p["table"][ids]))


@case(params(), VALID, np.int32([0, 0, 1, 1, 1, 3, 3]), table=Rows(VALID))
def bag_by_segments(p, ids, segments):
    return quad(p, jax.ops.segment_sum(p["table"][ids], segments, 4))


@case(
    params(),
    OUTSIDE,
    np.int32([0, 0, 1, 2, 2, 2, 2, 3, 0, 1, 1, 0]),
    table=Rows(OUTSIDE),
    exact=False,
)
def bag_padded(p, ids, segments):
    rows = jnp.take(p["table"], ids, axis=0, mode="fill", fill_value=0)
    return quad(p, jax.ops.segment_max(rows, segments, 4))


@case(params(), MANY, table=Rows(MANY), exact=False)
def softmax_of_rows(p, ids):
    rows = jax.nn.gelu(p["table"][ids] * p["w"])
    return -jnp.mean(jax.nn.log_softmax(rows.sum(1))[:, 0])


@case(
    params(context=halves(7, 2, seed=1)), MANY, MANY % 7, table=Rows(MANY), context=Rows(MANY % 7)
)
def two_tables(p, ids, others):
    mixed = p["table"][ids].sum((1, 2)) * p["context"][others].sum((1, 2))
    return quad(p, mixed)


@case(TWO_TABLES, MANY, VALID, table=Rows(MANY), other=Rows(VALID))
def one_lookup_for_two_tables(p, ids, others):
    lookup = jax.jit(lambda table, ids: table[ids])
    return quad(p, lookup(p["table"], ids)) + quad(p, lookup(p["other"], others))


@case({"layers": [halves(V, D, seed=i) for i in range(3)], "w": np.float32(0.5)}, MANY,
      layers__0=Rows(MANY), layers__1=Rows(MANY), layers__2=Rows(MANY))  # fmt: skip
def a_list_of_tables(p, ids):
    return sum(quad(p, jnp.take(table, ids, axis=0)) for table in p["layers"])


@case(params(), MANY, VALID, table=Rows(np.append(MANY, VALID)))
def read_twice(p, ids, others):
    return quad(p, p["table"][ids]) - 2 * quad(p, p["table"][others])


@case(params(), OUTSIDE, table=Rows(OUTSIDE, 4 * OUTSIDE.size))
def read_four_times(p, ids):
    t = p["table"]
    clipped = jnp.take(t, jnp.clip(ids, -V, V - 1), axis=0)
    cast = t.astype(jnp.bfloat16).at[ids].get(mode="drop", fill_value=0)
    under = jax.vmap(lambda i: t.at[i].get(mode="fill", fill_value=1))(ids)
    return quad(p, clipped) + quad(p, cast) + quad(p, under) + quad(p, t[ids[:0]])


@case({"table": halves(V, D), "same": halves(V, D), "w": np.float32(0.5)}, MANY,
      table=Rows(MANY), same=Rows(MANY % 5))  # fmt: skip
def an_array_that_is_closed_over(p, ids):
    """A constant is not a table, even if it has a table's values."""
    return quad(p, p["table"][ids] * jnp.asarray(halves(V, D))[ids] + p["same"][ids % 5])


@case(params(), MANY, table=Rows(MANY))
def gradient_of_rows_in_the_loss(p, ids):
    slope = jax.grad(lambda rows: jnp.sum(rows * rows * rows))(p["table"][ids])
    return quad(p, slope)


@case(params(), MANY, table=ANY)
def gradient_of_the_table_in_the_loss(p, ids):
    slope = jax.grad(lambda t: jnp.sum(t[ids] * t[ids]))(p["table"])
    return quad(p, slope)


@case(params(), MANY, table=Rows(MANY))
def tangent_in_the_loss(p, ids):
    read = lambda scale: scale * scale * p["table"][ids]  # noqa: E731
    return quad(p, jax.jvp(read, (p["w"],), (jnp.float32(1),))[1])


@case(params(), MANY, table=Rows(MANY))
def named_axis(p, ids):
    def loss_of_example(ids):
        rows = p["table"][ids]
        return quad(p, rows - lax.psum(rows, "batch"))

    return jnp.sum(jax.vmap(loss_of_example, axis_name="batch")(ids))


@case(params(), MANY, table=Rows(MANY), exact=False)
def spectrum_of_rows(p, ids):
    return quad(p, jnp.abs(jnp.fft.rfft(p["table"][ids] + 5.0)))


@case(params(), MANY, table=Rows(MANY))
def half_precision_loss(p, ids):
    return quad(p, p["table"][ids]).astype(jnp.bfloat16)


@case(params(trailing=(0,)), MANY, table=Rows(MANY))
def rows_of_no_columns(p, ids):
    return quad(p, p["table"][ids]) + p["w"]


@case(params(), MANY, table=Rows([], 0))
def constant(p, ids):
    return 2.0


@case(params(), MANY, table=Rows([], 0))
def unused(p, ids):
    return quad(p, jnp.float32(ids))


@case(params(), table=Rows([], 0))
def no_other_argument(p):
    return p["w"] * 2


# --- uses that no gradient goes through -----------------------------------------------------------


@case(params(), MANY, table=Rows(MANY))
def stopped_table(p, ids):
    return quad(p, lax.stop_gradient(p["table"])[ids])


@case(params(), MANY, table=Rows(MANY))
def stopped_rows(p, ids):
    return quad(p, lax.stop_gradient(p["table"][ids]))


@case(params(), MANY, VALID, table=Rows(np.append(MANY, VALID)))
def stopped_here_read_there(p, ids, others):
    return quad(p, p["table"][ids] * lax.stop_gradient(p["table"])[others[:4]][:, None][:3])


@case(params(), MANY, table=ANY)
def stopped_norm(p, ids):
    scale = jnp.sum(lax.stop_gradient(p["table"]) ** 2)
    return scale * quad(p, p["table"][ids])


@case(params(), np.float32([1, -2, 0.5]), table=Rows(np.arange(V), 1))
def nearest_row(p, x):
    """All rows are compared, without a gradient. Only the nearest row gets a gradient."""
    nearest = jnp.argmin(jnp.sum((p["table"] - x) ** 2, axis=-1))
    return quad(p, p["table"][nearest])


@case(params(), MANY, table=Rows(MANY))
def compared_table(p, ids):
    return jnp.where(jnp.any(p["table"] > 1.5), 2.0, 1.0) * quad(p, p["table"][ids])


@case(params(), MANY, table=ANY)
def table_of_integers(p, ids):
    """No gradient goes through a cast to integers, so the loss may cast the whole table."""
    integers = p["table"].astype(jnp.int32)[ids] * 2 + p["table"].astype(bool)[ids]
    return quad(p, integers + p["table"][ids])


@case(params(), MANY, table=Rows(np.append(MANY, VALID[:4])))
def gated_by_its_rows(p, ids):
    gate = p["table"][VALID[:4]][:, 0] > 0
    return quad(p, jnp.where(gate[:, None], p["table"][ids], 0))


@case(params(), MANY, table=Rows(MANY))
def searched_table(p, ids):
    """A while loop has no reverse-mode derivative, but here nothing in it needs one."""
    frozen = lax.stop_gradient(p["table"])
    found = lax.while_loop(lambda i: frozen[i, 0] < 0, lambda i: i + 1, jnp.int32(0))
    return quad(p, p["table"][ids] + found)


@case(params(), MANY, table=Rows(MANY))
def shape_of_the_table(p, ids):
    return quad(p, p["table"][ids % p["table"].shape[0]] + jnp.zeros_like(p["table"])[:1])


# --- under other transformations ------------------------------------------------------------------


@case(params(), MANY, table=Rows(MANY))
def jit_once(p, ids):
    return jax.jit(quad)(p, jax.jit(lambda ids: p["table"][ids])(ids))


@case(params(), MANY, table=Rows(MANY))
def jit_twice(p, ids):
    @jax.jit
    def inner(table, ids):
        return jnp.take(table, ids, axis=0)

    @jax.jit
    def outer(p, ids):
        return quad(p, inner(p["table"], ids)), p["table"]

    return outer(p, ids)[0]


@case(params(), MANY, VALID, table=Rows(np.append(MANY, VALID)))
def jit_passes_the_table_on(p, ids, others):
    read = jax.jit(lambda table, ids: (table[ids], table))
    rows, table = read(p["table"], ids)
    return quad(p, rows) + quad(p, table[others])


@case(params(), MANY, VALID, table=Rows(np.append(MANY, VALID)))
def jit_with_two_reads(p, ids, others):
    @jax.jit
    def read(a, b):
        return quad(p, a[ids]) + quad(p, b[others])

    return read(p["table"], p["table"])


def layer(p, ids):
    return quad(p, jnp.sin(p["table"][ids]))


@case(params(), MANY, table=Rows(MANY), exact=False)
def remat(p, ids):
    return jax.checkpoint(layer)(p, ids)


@case(params(), MANY, table=Rows(MANY), exact=False)
def remat_closed_over(p, ids):
    return jax.checkpoint(lambda ids: layer(p, ids))(ids)


@case(params(), MANY, table=Rows(MANY), exact=False)
def remat_saves_nothing(p, ids):
    policy = jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)(p, ids)


@case(params(), MANY, table=Rows(MANY), exact=False)
def remat_saves_dots(p, ids):
    def loss(p, ids):
        rows = jnp.sin(p["table"][ids])
        return quad(p, jnp.einsum("ijk,ilk->ijl", rows, rows))

    return jax.checkpoint(loss, policy=jax.checkpoint_policies.dots_saveable)(p, ids)


@case(params(), MANY, table=Rows(MANY), exact=False)
def remat_saves_names(p, ids):
    from jax.ad_checkpoint import checkpoint_name

    def loss(p, ids):
        return quad(p, jnp.sin(checkpoint_name(p["table"][ids], "rows")))

    policy = jax.checkpoint_policies.save_only_these_names("rows")
    return jax.checkpoint(loss, policy=policy)(p, ids)


@case(params(), MANY, table=Rows(MANY), exact=False)
def remat_in_jit_in_remat(p, ids):
    return jax.checkpoint(jax.jit(jax.checkpoint(layer)))(p, ids)


@case(params(), MANY, table=Rows(MANY))
def scan(p, batches):
    def step(total, ids):
        return total + quad(p, p["table"][ids]), None

    return lax.scan(step, jnp.float32(0), batches)[0]


@case(params(), MANY, table=Rows(MANY))
def scan_stacks_rows(p, batches):
    _, rows = lax.scan(lambda _, ids: (None, jnp.take(p["table"], ids, axis=0)), None, batches)
    return quad(p, rows)


@case(params(), MANY, table=Rows(MANY))
def scan_backwards_unrolled(p, batches):
    def step(total, ids):
        return total / 2 + quad(p, p["table"][ids]), total

    total, totals = lax.scan(step, jnp.float32(0), batches, reverse=True, unroll=2)
    return total + totals[0]


@case(params(), MANY, table=Rows(MANY))
def scan_carries_the_table(p, batches):
    def step(carry, ids):
        table, total = carry
        return (table, total + quad(p, table[ids])), None

    return lax.scan(step, (p["table"], jnp.float32(0)), batches)[0][1]


@case(params(), MANY, VALID, table=Rows(np.append(MANY, VALID)))
def scan_passes_the_table_on(p, batches, others):
    def step(carry, ids):
        table, total = carry
        return (table, total + quad(p, table[ids])), None

    table, total = lax.scan(step, (p["table"], jnp.float32(0)), batches)[0]
    return total + quad(p, table[others])


@case(params(), MANY, table=Rows(MANY))
def scan_casts_the_table(p, batches):
    def step(total, ids):
        return total + quad(p, p["table"].astype(jnp.bfloat16)[ids]), None

    return lax.scan(step, jnp.float32(0), batches)[0]


@case(params(), MANY, table=Rows(MANY))
def scan_after_the_cast(p, batches):
    cast = p["table"].astype(jnp.bfloat16)
    return jnp.sum(lax.scan(lambda c, ids: (c, quad(p, cast[ids])), 0, batches)[1])


@case(params(), MANY, table=Rows(MANY), exact=False)
def scan_with_remat(p, batches):
    def step(total, ids):
        return total + layer(p, ids), None

    return lax.scan(jax.checkpoint(step), jnp.float32(0), batches)[0]


@case(params(), VALID, table=Rows(np.arange(V), 3 * VALID.size), exact=False)
def scan_computes_indices_from_the_previous_rows(p, ids):
    """The indices of a step are computed from the rows of the step before."""

    def step(ids, _):
        rows = p["table"][ids]
        return jnp.argsort(rows[:, 0]).astype(jnp.int32), jnp.sum(jnp.tanh(rows * p["w"]))

    return jnp.sum(lax.scan(step, ids, length=3)[1])


@case(params(), MANY, table=Rows(MANY))
def scan_in_scan(p, batches):
    def outer(total, ids):
        def inner(total, i):
            return total + quad(p, p["table"][i]), None

        return lax.scan(inner, total, ids)[0], None

    return lax.scan(outer, jnp.float32(0), batches)[0]


@case(params(), MANY, table=Rows(MANY))
def scan_uses_rows_of_the_previous_step(p, batches):
    """A step carries its rows to the next one. The rows of the last step are not used."""

    def step(carry, ids):
        previous_rows, total = carry
        return (p["table"][ids], total + quad(p, previous_rows)), None

    return lax.scan(step, (jnp.zeros((4, D)), jnp.float32(0)), batches)[0][1]


@case(params(), np.zeros((0, 4), np.int32), table=Rows([], 0))
def scan_of_nothing(p, batches):
    def step(total, ids):
        return total + quad(p, p["table"][ids]), None

    return lax.scan(step, p["w"], batches)[0]


@case(params(), MANY, table=Rows(MANY, 3 * MANY.size))
def scan_reads_the_same_each_time(p, ids):
    def step(total, factor):
        return total + factor * quad(p, p["table"][ids]), None

    return lax.scan(step, jnp.float32(0), np.float32([1, 2, -1]))[0]


@case(params(), MANY, table=Rows([0, 1, 2, 3], 4))
def scan_counts_rows(p, ids):
    def step(i, _):
        return i + 1, p["table"][i]

    return quad(p, lax.scan(step, 0, length=4)[1])


@case(params(), MANY, VALID, table=Rows(np.append(MANY, np.tile(VALID, 3)), 33))
def scan_closes_over_the_table_and_carries_it(p, batches, others):
    def step(carry, ids):
        table, total = carry
        return (table, total + quad(p, table[ids]) - quad(p, p["table"][others])), None

    return lax.scan(step, (p["table"], jnp.float32(0)), batches)[0][1]


@case(TWO_TABLES, MANY, table=Rows(MANY), other=Rows(MANY))
def scan_of_two_tables(p, batches):
    def step(total, ids):
        return total + quad(p, p["table"][ids] * jnp.take(p["other"], ids, axis=0)), None

    return lax.scan(step, jnp.float32(0), batches)[0]


@case(params(), MANY, table=Rows(MANY))
def map_(p, batches):
    return jnp.sum(lax.map(lambda ids: quad(p, p["table"][ids]), batches))


@case(params(), MANY, table=Rows(MANY))
def map_in_batches(p, batches):
    return quad(p, lax.map(lambda i: p["table"][i], batches.reshape(-1), batch_size=5))


@case(params(), MANY, table=Rows(MANY))
def vmap_of_scan(p, batches):
    def sum_of_rows(ids):
        return lax.scan(lambda c, i: (c + p["table"][i], None), jnp.zeros(D), ids)[0]

    return quad(p, jax.vmap(sum_of_rows)(batches))


@case(params(), MANY, table=Rows(MANY))
def vmap_of_loss(p, batches):
    return jnp.sum(
        jax.vmap(quad, (None, 0))(p, jax.vmap(jax.jit(lambda i: p["table"][i]))(batches))
    )


@case(params(), MANY, table=Rows(MANY))
def fori(p, batches):
    batches = jnp.asarray(batches)

    def body(i, total):
        return total + quad(p, p["table"][batches[i]])

    return lax.fori_loop(0, 3, body, jnp.float32(0))


@case(params(), MANY, table=Rows(MANY))
def fori_carries_the_table(p, batches):
    batches = jnp.asarray(batches)

    def body(i, carry):
        table, total = carry
        return table, total + quad(p, table[batches[i]])

    return lax.fori_loop(0, 3, body, (p["table"], jnp.float32(0)))[1]


def branch_cases():
    """Adds cases for each branch of conditionals. Only the branch taken has gradients."""

    def two_reads(p, pred, ids, others):
        return lax.cond(
            pred, lambda: quad(p, p["table"][ids]), lambda: -quad(p, p["table"][others])
        )

    def table_as_operand(p, pred, ids, others):
        def yes(table, ids):
            return quad(p, jnp.take(table, ids, axis=0))

        def no(table, ids):
            return quad(p, table[ids[0, 0]])

        return lax.cond(pred, yes, no, p["table"], ids)

    def one_read(p, pred, ids, others):
        return lax.cond(pred, lambda: quad(p, p["table"][ids]), lambda: p["w"] * 2)

    def in_scan(p, pred, ids, others):
        def step(total, x):
            row, flag = x
            read = lax.cond(flag == pred, lambda: quad(p, p["table"][row]), lambda: jnp.float32(0))
            return total + read, None

        return lax.scan(step, jnp.float32(0), (ids, np.array([True, False, True])))[0]

    def nested(p, pred, ids, others):
        def inner():
            return lax.cond(
                ids[0, 0] > 3, lambda: jnp.float32(1), lambda: quad(p, p["table"][others])
            )

        return lax.cond(pred, inner, lambda: quad(p, p["table"][ids]))

    def rows_out(p, pred, ids, others):
        rows = lax.cond(pred, lambda t: t[ids], lambda t: jnp.zeros((*ids.shape, D)), p["table"])
        return quad(p, rows)

    def selected_by_vmap(p, pred, ids, others):
        """Under vmap a conditional becomes a select, for which JAX broadcasts the table."""

        def read(flag, i):
            return lax.cond(flag == pred, lambda: p["table"][i], lambda: p["table"][0])

        return quad(p, jax.vmap(read)(others % 2 == 0, others))

    def table_out(p, pred, ids, others):
        """The conditional returns the table that is read."""
        table = lax.cond(pred, lambda t: t, lambda t: 2 * t, p["table"])
        return quad(p, table[ids])

    size = MANY.size + VALID.size
    no_rows = Rows([], MANY.size)
    for loss, rows_if_true, rows_if_false in (
        (two_reads, Rows(MANY, size), Rows(VALID, size)),
        (table_as_operand, Rows(MANY, MANY.size + 1), Rows([3], MANY.size + 1)),
        (one_read, Rows(MANY), no_rows),
        (in_scan, Rows(MANY[::2], MANY.size), Rows(MANY[1], MANY.size)),
        (nested, Rows(VALID, size), Rows(MANY, size)),
        (rows_out, Rows(MANY), no_rows),
        (selected_by_vmap, ANY, ANY),
        (table_out, ANY, ANY),
    ):
        for pred, rows in ((True, rows_if_true), (False, rows_if_false)):
            name = f"cond_{loss.__name__}_{'yes' if pred else 'no'}"
            CASES[name] = Case(loss, (params(), np.bool_(pred), MANY, VALID), {"table": rows})

    def switch(p, index, ids, others):
        branches = [
            lambda table: quad(p, table[ids]),
            lambda table: quad(p, table[others]) + quad(p, table[ids[0]]),
            lambda table: p["w"],
        ]
        return lax.switch(index, branches, p["table"])

    max_indices = MANY.size + VALID.size + 4
    for index, ids in enumerate((MANY, np.append(VALID, MANY[0]), [], [])):
        args = params(), np.int32(index), MANY, VALID
        CASES[f"switch_{index}"] = Case(switch, args, {"table": Rows(ids, max_indices)})


branch_cases()


# --- custom derivatives ---------------------------------------------------------------------------


@jax.custom_jvp
def steep_square(x):
    """The square, with a custom derivative of three times the true one."""
    return x * x


steep_square.defjvp(
    lambda primals, tangents: (steep_square(*primals), 6 * primals[0] * tangents[0])
)


@jax.custom_vjp
def negated_gradient(x):
    """The identity, with a custom derivative of -1."""
    return x


negated_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@case(params(), MANY, table=Rows(MANY))
def custom_jvp_of_rows(p, ids):
    return quad(p, steep_square(p["table"][ids]))


@case(params(), MANY, table=Rows(MANY))
def custom_vjp_of_rows(p, ids):
    return quad(p, negated_gradient(p["table"][ids]))


@case(params(), MANY, table=Rows(MANY))
def custom_rules_in_scan_in_remat(p, batches):
    @jax.checkpoint
    def loss(p):
        def step(total, ids):
            return total + quad(p, negated_gradient(steep_square(p["table"][ids]))), None

        return lax.scan(step, jnp.float32(0), batches)[0]

    return loss(p)


@case(params(), MANY, table=Rows(MANY))
def relu_of_rows(p, ids):
    return quad(p, jax.nn.relu(p["table"][ids]))


@case(params(), MANY, table=ANY)
def custom_jvp_of_the_table(p, ids):
    @jax.custom_jvp
    def lookup(table, ids):
        return table[ids]

    @lookup.defjvp
    def _(primals, tangents):
        return lookup(*primals), 3 * tangents[0][primals[1]]

    return quad(p, lookup(p["table"], ids))


@case(params(), MANY, table=ANY)
def custom_vjp_of_the_table(p, ids):
    """The custom backward function gives every row of the table a gradient."""

    @jax.custom_vjp
    def lookup(table, ids):
        return table[ids]

    def forward(table, ids):
        return table[ids], ids

    def backward(ids, g):
        return jnp.ones((V, D)).at[ids].add(2 * g), None

    lookup.defvjp(forward, backward)
    return quad(p, lookup(p["table"], ids))


@case(params(), MANY, table=ANY)
def custom_vjp_of_the_table_in_scan(p, batches):
    lookup = jax.custom_vjp(lambda table, ids: table[ids])
    lookup.defvjp(
        lambda table, ids: (table[ids], ids),
        lambda ids, g: (jnp.zeros((V, D)).at[ids].add(-g), None),
    )

    def step(total, ids):
        return total + quad(p, lookup(p["table"], ids)), None

    return lax.scan(jax.checkpoint(step), jnp.float32(0), batches)[0]


@case(params(), MANY, table=ANY)
def custom_vjp_clips_the_tables_gradient(p, ids):
    """A custom derivative of the whole table, before its rows are read."""
    clip = jax.custom_vjp(lambda table: table)
    clip.defvjp(lambda table: (table, None), lambda _, g: (jnp.clip(g, -1, 1),))
    return quad(p, clip(p["table"])[ids])


@case(params(), MANY, table=ANY)
def custom_jvp_of_the_table_elementwise(p, ids):
    return quad(p, steep_square(p["table"])[ids])


# --- uses of the whole table ----------------------------------------------------------------------


@case(params(), MANY, table=Dense("dot_general"))
def tied(p, ids):
    hidden = p["table"][ids].sum(1)
    return quad(p, hidden @ p["table"].T)


@case(TWO_TABLES, MANY, table=Dense("dot_general"), other=Rows(MANY))
def tied_and_not(p, ids):
    hidden = p["table"][ids].sum(1) + p["other"][ids].sum(1)
    return quad(p, hidden @ p["table"].T)


@case(params(), MANY, table=Dense("dot_general"))
def tied_in_jit_in_remat(p, ids):
    logits = jax.checkpoint(jax.jit(lambda table, x: jnp.einsum("bd,vd->bv", x, table)))
    return quad(p, logits(p["table"], p["table"][ids].sum(1)))


@case(params(), MANY, table=Dense("dot_general"))
def tied_in_scan(p, batches):
    def step(total, ids):
        return total + quad(p, p["table"][ids].sum(0) @ p["table"].T), None

    return lax.scan(step, jnp.float32(0), batches)[0]


@case(params(), MANY, table=Dense("dot_general"))
def one_hot(p, ids):
    return quad(p, jax.nn.one_hot(ids, V) @ p["table"])


@case(params(), MANY, table=Dense("mul"))
def norm_of_all_rows(p, ids):
    return quad(p, p["table"][ids]) + jnp.sum(p["table"] * p["table"])


@case(params(), MANY, table=Dense("reduce_sum"))
def mean_of_all_rows(p, ids):
    return quad(p, p["table"][ids] - p["table"].sum(0))


@case(params(), MANY, table=Dense("mul"))
def norm_of_all_rows_in_a_branch(p, ids):
    """The gradient is dense although the branch is not taken."""

    def norm(table):
        return jnp.sum(table * table)

    return quad(p, p["table"][ids]) + lax.cond(p["w"] > 1, norm, lambda t: 0.0, p["table"])


@case(params(), MANY, table=Dense("scan"))
def scan_over_the_table(p, ids):
    def step(total, row):
        return total + quad(p, row), None

    return lax.scan(step, quad(p, p["table"][ids]), p["table"])[0]


@case(params(), MANY, table=ANY)
def scan_changes_the_table(p, batches):
    def step(table, ids):
        return table * 0.5, quad(p, table[ids])

    return jnp.sum(lax.scan(step, p["table"], batches)[1])


@case(TWO_TABLES, MANY, table=ANY, other=ANY)
def scan_swaps_two_tables(p, batches):
    """Each table is carried unchanged, but in the place of the other one."""

    def step(carry, ids):
        a, b = carry
        return (b, a), quad(p, a[ids]) * 2 + quad(p, b[ids % 3])

    return jnp.sum(lax.scan(step, (p["table"], p["other"]), batches)[1])


@case(TWO_TABLES, MANY, np.bool_(True), table=ANY, other=ANY)
def one_of_two_tables(p, ids, first):
    table = lax.cond(first, lambda a, b: a, lambda a, b: b, p["table"], p["other"])
    return quad(p, table[ids])


@case(TWO_TABLES, MANY, np.arange(V) % 2 == 0, table=ANY, other=ANY)
def rows_of_two_tables(p, ids, first):
    return quad(p, jnp.where(first[:, None], p["table"], p["other"])[ids])


@case(params(), MANY, table=ANY)
def scaled_table(p, ids):
    return quad(p, (2 * p["table"])[ids])


@case(params(), MANY, table=ANY)
def padding_row(p, ids):
    return quad(p, p["table"].at[0].set(0)[ids])


@case(params(), MANY, table=ANY)
def joined_tables(p, ids):
    return quad(p, jnp.concatenate([p["table"], jnp.ones((2, D))])[ids + 2])


@case(params(), MANY, table=ANY)
def columns(p, ids):
    return quad(p, p["table"][:, 1][ids]) + quad(p, p["table"][ids, 0])


@case(params(), MANY, table=ANY)
def transposed(p, ids):
    return quad(p, p["table"].T[:, ids])


@case(params(trailing=(V,)), MANY, table=ANY)
def transposed_by_a_reshape(p, ids):
    return quad(p, lax.reshape(p["table"], (V, V), (1, 0))[ids])


@case(params(trailing=(V,)), MANY, table=Rows(MANY))
def transposed_by_a_reshape_where_nothing_is_differentiated(p, ids):
    turned = lax.reshape(lax.stop_gradient(p["table"]), (V, V), (1, 0))
    return quad(p, p["table"][ids] * turned[ids])


@case(params(), MANY, table=ANY)
def copied(p, ids):
    return quad(p, jnp.array(p["table"], copy=True)[ids])


if jax.__version_info__ >= (0, 10):  # an older JAX has no derivative of an optimization barrier

    @case(params(), MANY, table=ANY)
    def after_an_optimization_barrier(p, ids):
        return quad(p, lax.optimization_barrier(p["table"])[ids])


@case(params(), MANY, table=ANY)
def rounded(p, ids):
    return quad(p, lax.reduce_precision(p["table"], 8, 7)[ids])


@case(params(), MANY, table=ANY)
def mapped_rows(p, ids):
    return quad(p, jax.vmap(lambda row: row * p["w"])(p["table"])[ids])


@case(params(), MANY, table=ANY)
def by_platform(p, ids):
    rows = lax.platform_dependent(
        p["table"], cpu=lambda t: t[ids], default=lambda t: jnp.take(t, ids, axis=0)
    )
    return quad(p, rows)


@case(params(), MANY, table=ANY)
def rule_for_batches(p, ids):
    @jax.custom_batching.custom_vmap
    def lookup(table, i):
        return table[i]

    @lookup.def_vmap
    def _(size, batched, table, ids):
        return jnp.take(table, ids, axis=0), True

    return quad(p, jax.vmap(lookup, (None, 0))(p["table"], ids))


@case(params(), VALID, table=ANY, exact=False)
def linear_solve(p, ids):
    """The solution of an equation whose matrix is computed from rows."""

    def matrix(x):
        rows = p["table"][ids]
        return 9 * x + rows.T @ (rows @ x)

    return jnp.sum(
        lax.custom_linear_solve(
            matrix,
            jnp.ones(D),
            lambda f, b: jnp.linalg.solve(jax.jacobian(f)(b), b),
            symmetric=True,
        )
    )


@case(params(), VALID, table=ANY)
def along_axis(p, ids):
    return quad(p, jnp.take_along_axis(p["table"], ids[:, None], axis=0))


@case(params(), VALID, table=ANY)
def pieces_of_rows(p, ids):
    pieces = jax.vmap(lambda i: lax.dynamic_slice(p["table"], (i, 1), (2, 2)))(ids)
    return quad(p, pieces)


@case(params(), VALID, table=ANY)
def pairs_of_rows(p, ids):
    """Slices of two rows. At the end of the table, JAX moves the start of a slice back."""
    return quad(p, jax.vmap(lambda i: lax.dynamic_slice_in_dim(p["table"], i, 2))(ids))


def gather_cases():
    """Adds cases with gathers that no indexing expression makes."""
    starts = np.array([[2, 0], [2, 1], [10, 0], [11, 0], [-1, 0], [0, 2], [9, -1]], np.int32)

    def add(name, indices, mode, slice_sizes, **dimensions):
        def loss(p, indices):
            numbers = lax.GatherDimensionNumbers(**dimensions)
            rows = lax.gather(p["table"], indices, numbers, slice_sizes, mode=mode, fill_value=1.5)
            return quad(p, rows)

        name = f"gather_{name}_{mode}"
        CASES[name] = Case(loss, (params(), indices), {"table": ANY})

    for mode in ("fill", "clip", "promise_in_bounds"):
        # An index has a row and a column, but a slice has all columns. If the column is not 0,
        # "clip" makes it 0, and "fill" treats the slice as out of bounds. "promise_in_bounds" makes
        # it 0 and drops the gradient.
        start = {"offset_dims": (1,), "collapsed_slice_dims": (0,), "start_index_map": (0, 1)}
        add("row_and_column", starts, mode, (1, D), **start)
        swapped = {**start, "start_index_map": (1, 0)}
        add("column_and_row", starts[:, ::-1].copy(), mode, (1, D), **swapped)
        window = {"offset_dims": (1, 2), "collapsed_slice_dims": (), "start_index_map": (0,)}
        add("windows", starts[:, :1], mode, (2, D), **window)
        add("windows_of_one", starts[:, :1], mode, (1, D), **window)
        turned = {"offset_dims": (0,), "collapsed_slice_dims": (0,), "start_index_map": (0,)}
        add("turned", starts[:, :1], mode, (1, D), **turned)
        add("parts", starts[:, :1], mode, (1, D - 1), **{**turned, "offset_dims": (1,)})
        of_columns = {"offset_dims": (0,), "collapsed_slice_dims": (1,), "start_index_map": (1,)}
        add("columns", starts[:, :1], mode, (V, 1), **of_columns)
        add("all_rows", starts[:, :1], mode, (V, D), **window)


gather_cases()


@case(params(trailing=(4,)), MANY, table=ANY)
def rows_cut_in_two(p, ids):
    return quad(p, p["table"].reshape(2 * V, 2)[ids])


@case(params(trailing=(2, 2)), MANY, table=ANY)
def rows_of_a_row(p, ids):
    return quad(p, p["table"].reshape(V * 2, 2)[ids])


@case(params(num_rows=12, trailing=(2,)), MANY % 6, table=ANY)
def two_rows_as_one(p, ids):
    return quad(p, p["table"].reshape(6, 4)[ids])


@case(params(trailing=(2, 3)), MANY % 2, table=ANY)
def second_axis(p, ids):
    return quad(p, jnp.take(p["table"], ids, axis=1))


@case(params(trailing=(1,)), MANY % 1, table=ANY)
def only_column(p, ids):
    return quad(p, p["table"][:, ids])


@case(params(num_rows=2, trailing=(V, D)), MANY, table=ANY)
def stacked_tables(p, ids):
    return quad(p, jax.vmap(lambda table: table[ids])(p["table"]))


@case(params(num_rows=3, trailing=(V, D)), MANY, table=ANY)
def stacked_tables_by_batch(p, ids):
    return quad(p, jax.vmap(indexed)(p["table"], ids))


@case(params(num_rows=3, trailing=(V, D)), MANY, table=ANY)
def scan_over_stacked_tables(p, batches):
    def step(total, x):
        table, ids = x
        return total + quad(p, table[ids]), None

    return lax.scan(step, jnp.float32(0), (p["table"], batches))[0]


@case(params(trailing=(V,)), VALID, table=ANY)
def both_axes(p, ids):
    return quad(p, p["table"][ids, ids]) + quad(p, p["table"][jnp.ix_(ids, ids)])


@case(params(num_rows=1), MANY % 1, table=Rows(MANY % 1))
def table_of_one_row(p, ids):
    return quad(p, p["table"][ids])


@case(params(), MANY, table=ANY)
def slice_of_the_whole_table(p, ids):
    return quad(p, p["table"][:V])


# --- comparison of the cases with JAX -------------------------------------------------------------


def run_unoptimized(function, *args, **options):
    """The result of the jitted function, compiled with few optimizations to save time."""
    options |= {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*args).compile(options)(*args)


def results_of_adamjax(names, args):
    """adamjax's value and gradients of each case.

    If all tables of a case must get row gradients, it is called with `strict`.
    """
    results = []
    for name, case_args in zip(names, args, strict=True):
        strict = all(isinstance(x, Rows) for x in CASES[name].tables.values())
        results.append(case_value_and_grad(CASES[name], strict=strict)(*case_args))
    return results


def results_of_jax(names, args):
    """For each case, JAX's value and gradients, and its `Rows` by path, with arrays as `ids`."""
    results = []
    for name, case_args in zip(names, args, strict=True):
        tables = leaves_by_path(case_args[0])
        reads = {
            path: rows.resolve(tables[path])
            for path, rows in CASES[name].tables.items()
            if isinstance(rows, Rows)
        }
        results.append((jax_value_and_grad(CASES[name].loss, case_args), reads))
    return results


def check_cases(names, run):
    args = [CASES[name].args for name in names]
    ours, theirs = (run(results, names, args) for results in (results_of_adamjax, results_of_jax))
    for name, actual, (expected, reads) in zip(names, ours, theirs, strict=True):
        check(CASES[name], actual, expected, CASES[name].tables | reads)


def under_jit(function, names, args):
    # `make test` selects XLA's older emitters. If a table has more rows than the dtype of the
    # indices can count, these emitters lose the gradients of the rows beyond that. Newer releases
    # of XLA have neither the option nor these emitters.
    emitters, options = "xla_cpu_use_fusion_emitters", {}
    if emitters in os.environ.get("XLA_FLAGS", "") and any("300_rows" in n for n in names):
        options[emitters] = True
    return run_unoptimized(lambda args: function(names, args), args, **options)


def op_by_op(function, names, args):
    return function(names, args)


# Twelve cases in one program take a third of the time of twelve programs.
GROUPS = [list(CASES)[i : i + 12] for i in range(0, len(CASES), 12)]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: f"{names[0]} to {names[-1]}")
@pytest.mark.slow
def test_values_and_gradients_are_those_of_jax(names):
    try:
        check_cases(names, under_jit)
    except Exception:
        # Run each case alone, to name those that fail.
        failed = {}
        for name in names:
            try:
                check_cases([name], under_jit)
            except Exception as error:
                failed[name] = error
        for name, error in failed.items():
            error.add_note(f"in the case {name}")
        if not failed:
            raise
        raise ExceptionGroup(", ".join(failed), list(failed.values())) from None


@pytest.mark.parametrize(
    "name",
    [
        "index_2d",
        "index_empty",
        "table_cast_bfloat16",
        "unused",
        "jit_twice",
        "remat",
        "scan_carries_the_table",
        "cond_two_reads_no",
        "custom_vjp_of_rows",
        "tied_and_not",
    ],
)
@pytest.mark.slow
def test_values_and_gradients_are_those_of_jax_without_jit(name):
    check_cases([name], op_by_op)


def first_and_last_line(function):
    """The numbers of the first and the last line of a function."""
    source, first = inspect.getsourcelines(function)
    return first, first + len(source) - 1


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if any(isinstance(x, Dense) for x in c.tables.values())]
)
def test_strict_names_the_table_the_operation_and_the_line(name):
    case = CASES[name]
    [(path, table)] = [(p, x) for p, x in case.tables.items() if isinstance(x, Dense)]
    with pytest.raises(ValueError, match=rf"\b{path}\b") as error:
        case_value_and_grad(case, strict=True)(*case.args)
    message = str(error.value)
    assert re.search(rf"\b{table.operation}\b", message), message
    line = re.search(r"test_autodiff\.py:(\d+)", message)
    assert line, message
    first, last = first_and_last_line(case.loss)
    assert first <= int(line[1]) <= last, (message, first, last)


def test_strict_names_the_exact_line():
    def loss(p, ids):
        hidden = p["table"][ids]
        return quad(p, hidden @ p["table"].T)

    vg = adamjax.value_and_grad(loss, "table", strict=True)
    line = first_and_last_line(loss)[0] + 2
    with pytest.raises(ValueError, match=rf"(?s)table.*dot_general.*test_autodiff\.py:{line}\b"):
        vg(params(), VALID)
    with pytest.raises(ValueError, match="dot_general"):
        jax.jit(vg)(params(), VALID)
    with pytest.raises(ValueError, match="dot_general"):
        adamjax.grad(loss, "table", strict=True)(params(), VALID)


READS = st.fixed_dictionaries(
    {
        "num_rows": st.integers(1, 9),
        "trailing": st.lists(st.integers(1, 3), max_size=2).map(tuple),
        "shape": st.lists(st.integers(0, 4), max_size=3).map(tuple),
        "dtype": st.sampled_from(["int8", "uint8", "int16", "int32", "uint32"]),
        "mode": st.sampled_from([None, "fill", "clip", "wrap", "drop"]),
        "cast": st.sampled_from([None, "bfloat16"]),
        "jit": st.booleans(),
        "vmap": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def any_read(num_rows, trailing, shape, dtype, mode, cast, jit, vmap, seed):
    """A case that reads rows as the arguments describe."""
    unsigned = np.dtype(dtype).kind == "u"
    rng = np.random.default_rng(seed)
    ids = rng.integers(0 if unsigned else -num_rows - 3, num_rows + 4, shape).astype(dtype)

    def read(table, ids):
        table = table if cast is None else table.astype(cast)
        if mode == "wrap":
            return jnp.take(table, ids, axis=0, mode="wrap")
        return table.at[ids].get(mode=mode, fill_value=None if mode in (None, "clip") else 0.5)

    if jit:
        read = jax.jit(read)
    if vmap and shape:
        read = jax.vmap(read, (None, 0))
    p = {"table": halves(num_rows, *trailing, seed=seed), "w": np.float32(0.5)}
    reads = Rows(lambda numbers: read(numbers, ids), np.size(ids))
    return Case(lambda p, ids: quad(p, read(p["table"], ids)), (p, ids), {"table": reads})


@settings(max_examples=6, deadline=None)
@given(st.lists(READS, min_size=2, max_size=5))
@pytest.mark.slow
def test_drawn_reads_have_the_values_and_gradients_of_jax(reads):
    cases = [any_read(**read) for read in reads]

    def run(args):
        results = []
        for case, case_args in zip(cases, args, strict=True):
            rows = case.tables["table"].resolve(case_args[0]["table"])
            expected = jax_value_and_grad(case.loss, case_args)
            results.append((case_value_and_grad(case)(*case_args), expected, rows))
        return results

    results = run_unoptimized(run, [case.args for case in cases])
    for case, (actual, expected, rows) in zip(cases, results, strict=True):
        check(case, actual, expected, {"table": rows})


# --- arguments of value_and_grad ------------------------------------------------------------------


def simple_loss(p, ids):
    return quad(p, p["table"][ids])


def by_rows(loss):
    return adamjax.value_and_grad(loss, "table")


def rows_and_dense(grads):
    """The paths of the row gradients, and those of the dense gradients."""
    found = leaves_by_path(grads)
    rows = {path for path, g in found.items() if isinstance(g, RowGradient)}
    return rows, set(found) - rows


def test_grad_returns_the_gradients_of_value_and_grad():
    value, grads = adamjax.value_and_grad(simple_loss, "table")(params(), MANY)
    same_grads = adamjax.grad(simple_loss, "table")(params(), MANY)
    assert isinstance(same_grads["table"], RowGradient)
    assert_equal(same_grads, grads)
    assert value.shape == ()


def with_aux(p, ids):
    rows = p["table"][ids]
    # No gradient goes through auxiliary outputs, so they may use the whole table.
    norms = {"norm": jnp.sqrt(jnp.sum(p["table"] ** 2)), "rows": rows, "w": p["w"] * 2}
    return quad(p, rows), {
        "arrays": norms,
        "name": "a batch",
        "n": 3,
        "nothing": None,
        "f": jnp.tanh,
    }


def test_auxiliary_outputs_are_those_of_jax():
    vg = adamjax.value_and_grad(with_aux, "table", has_aux=True)
    (value, aux), grads = vg(params(), MANY)
    by_jax = jax.value_and_grad(with_aux, has_aux=True)
    (expected, expected_aux), dense_grads = by_jax(params(), MANY)
    check_rows(grads["table"], params()["table"], Rows(MANY))
    assert_equal(dense(grads), dense_grads)
    assert_equal(value, expected)
    assert_equal(aux.pop("arrays"), expected_aux.pop("arrays"), exact=False)
    assert aux == expected_aux
    grads, aux = adamjax.grad(with_aux, "table", has_aux=True)(params(), MANY)
    assert_equal(dense(grads), dense_grads)
    assert aux["name"] == "a batch"


def test_auxiliary_outputs_are_right_under_jit():
    def loss(p, ids):
        value, aux = with_aux(p, ids)
        return value, aux["arrays"]

    vg = jax.jit(adamjax.value_and_grad(loss, "table", has_aux=True, strict=True))
    (_, aux), grads = vg(params(), MANY)
    check_rows(grads["table"], params()["table"], Rows(MANY))
    assert_equal(aux, with_aux(params(), MANY)[1]["arrays"], exact=False)


@pytest.mark.parametrize("output", ["table", "table itself", "table in a list"])
def test_a_table_that_is_an_auxiliary_output_gets_a_row_gradient(output):
    def loss(p, ids):
        aux = {"table": p["w"], "table itself": p["table"], "table in a list": [p["table"]] * 2}
        return simple_loss(p, ids), aux[output]

    (_, aux), grads = adamjax.value_and_grad(loss, "table", has_aux=True)(params(), MANY)
    check_rows(grads["table"], params()["table"], Rows(MANY))
    assert_equal(aux, jax.tree.map(jnp.asarray, loss(params(), MANY)[1]))


def test_with_has_aux_the_loss_must_return_a_pair():
    with pytest.raises(TypeError, match=r"with has_aux=True the loss function must return a pair"):
        adamjax.value_and_grad(simple_loss, "table", has_aux=True)(params(), MANY)


def two_arguments(a, ids, b):
    return quad(b, a["table"][ids]) + quad(a, b["embedding"][ids])


PARAMS = params()
OTHER = {"embedding": halves(V, 2, seed=3), "w": np.float32(1.5)}


@pytest.mark.parametrize(
    "argnums",
    [0, 2, -1, (0,), (0, 2), (2, 0), [0, 2]],
    ids=str,
)
def test_argnums_are_those_of_jax(argnums):
    tables = [adamjax.optional("table"), adamjax.optional("embedding")]
    vg = adamjax.value_and_grad(two_arguments, tables, argnums=argnums)
    value, grads = vg(PARAMS, MANY, OTHER)
    tuple_or_int = tuple(argnums) if isinstance(argnums, list) else argnums  # JAX takes no list
    expected = jax.value_and_grad(two_arguments, tuple_or_int)(PARAMS, MANY, OTHER)
    assert_equal((value, dense(grads)), expected)
    found = [
        g for g in jax.tree.leaves(grads, is_leaf=is_rows_or_none) if isinstance(g, RowGradient)
    ]
    assert len(found) == len(np.atleast_1d(argnums))


def gradients_of(argnums):
    tables = [adamjax.optional("table"), adamjax.optional("embedding")]
    return adamjax.grad(two_arguments, tables, argnums=argnums)(PARAMS, MANY, OTHER)


@pytest.mark.slow
def test_argnums_may_be_numpy_integers():
    assert_equal(dense(gradients_of(np.int64(2))), dense(gradients_of(2)))
    assert_equal(dense(gradients_of(np.array([0, 2]))), dense(gradients_of((0, 2))))


def test_wrong_argnums_are_refused():
    for bad in ((0, 0), (2, -1), [0, 2, -3]):
        with pytest.raises(ValueError, match=r"argnums=.* names an argument twice"):
            gradients_of(bad)
    for bad in ("0", True, 1.0, None, (0, True), (0, "2"), np.array([0.0])):
        with pytest.raises(TypeError, match="argnums must be an int or a tuple of ints, got"):
            gradients_of(bad)
    for bad in (3, (0, -4)):
        with pytest.raises(ValueError, match="needs more than the 3 positional arguments"):
            gradients_of(bad)


@pytest.mark.slow
def test_large_unsigned_indices_read_what_jax_reads():
    table, ids = jnp.arange(10.0).reshape(5, 2), jnp.array([1, 2**31 + 1, 2**32 - 1], jnp.uint32)
    for loss in (
        lambda table, ids: (table.at[ids].get(mode="fill", fill_value=0) ** 2).sum(),
        lambda table, ids: (table.at[ids].get(mode="clip") ** 2).sum(),
        lambda table, ids: (jax.lax.dynamic_index_in_dim(table, ids[1]) ** 2).sum(),
    ):
        rows = jax.jit(adamjax.grad(loss, "", strict=True))(table, ids)
        np.testing.assert_array_equal(rows.to_dense(), jax.grad(loss)(table, ids))


def test_an_argument_may_itself_be_a_table():
    """Then its path is empty."""
    vg = adamjax.value_and_grad(lambda ids, table: quad(PARAMS, table[ids]), "", argnums=1)
    _, rows = vg(MANY, PARAMS["table"])
    check_rows(rows, PARAMS["table"], Rows(MANY))
    assert_equal(rows.to_dense(), jax.grad(simple_loss)(PARAMS, MANY)["table"])


def test_keyword_arguments_are_passed_to_the_loss():
    def loss(p, *, ids, scale=2, others=None):
        assert others is None
        return scale * quad(p, p["table"][ids])

    vg = adamjax.value_and_grad(loss, "table")
    _, grads = vg(params(), ids=MANY, scale=3)
    check_rows(grads["table"], params()["table"], Rows(MANY))
    assert_equal(dense(grads), jax.grad(loss)(params(), ids=MANY, scale=3))
    assert_equal(dense(vg(params(), ids=MANY)[1]), jax.grad(loss)(params(), ids=MANY))


def test_patterns_select_the_tables():
    p = {"a": {"table": PARAMS["table"]}, "b": {"table": OTHER["embedding"]}, "w": PARAMS["w"]}

    def loss(p, ids):
        return quad(p, p["a"]["table"][ids]) + quad(p, p["b"]["table"][ids])

    for tables, rows in (
        ("table", {"a/table", "b/table"}),
        ("^a/", {"a/table"}),
        (["^a/", "^b/"], {"a/table", "b/table"}),
        (("b/table$",), {"b/table"}),
    ):
        grads = adamjax.grad(loss, tables)(p, MANY)
        assert rows_and_dense(grads) == (rows, {"a/table", "b/table", "w"} - rows)
        assert_equal(dense(grads), jax.grad(loss)(p, MANY))


def test_a_table_of_too_many_rows_for_int32_is_refused():
    def reads(num_rows):
        table = jax.ShapeDtypeStruct((num_rows, 2), jnp.float32)
        return jax.eval_shape(adamjax.grad(lambda t: jnp.sum(t[:3]), ""), table)

    assert reads(2**31 - 2).shape == (2**31 - 2, 2)
    with pytest.raises(ValueError, match="has 2147483647 rows, expected at most 2147483646"):
        reads(2**31 - 1)


@pytest.mark.slow
def test_leaves_that_are_no_floats_have_no_gradient():
    p = params(
        ids=jnp.asarray(MANY),
        count=3,
        flag=np.bool_(True),
        key=jax.random.key(0),
        old_key=jax.random.PRNGKey(1),
        function=jnp.square,
        name="model",
        none=None,
        scale=2.0,
    )

    def loss(p):
        keep = jax.random.bernoulli(jax.random.fold_in(p["key"], p["old_key"][0]), 0.5, MANY.shape)
        rows = jnp.where(keep[..., None], p["function"](p["table"][p["ids"]]), 0)
        assert p["name"] == "model"
        return jnp.where(p["flag"], p["scale"] * p["count"], 0.0) * quad(p, rows)

    value, grads = adamjax.value_and_grad(loss, "table")(p)
    expected = jax_value_and_grad(loss, (p,))
    assert_equal(value, expected[0])
    check_rows(grads["table"], p["table"], Rows(MANY))
    assert_equal(dense(grads), expected[1])
    assert {k for k, g in grads.items() if g is not None} == {"table", "w", "scale"}
    assert set(grads) == set(p)


@pytest.mark.slow
def test_other_arguments_are_passed_unchanged():
    def loss(p, ids, times, name, function, flags):
        assert isinstance(ids, np.ndarray)
        distinct = np.unique(ids)
        total = jnp.float32(0)
        for i in range(times):
            total += (i + 1) * quad(p, function(p["table"][distinct]))
        return total if name == "plus" and flags["twice"] is False else -total

    args = params(), MANY, 2, "plus", jnp.square, {"twice": False}
    value, grads = adamjax.value_and_grad(loss, "table")(*args)
    rows = Rows(np.unique(MANY), 2 * np.unique(MANY).size)
    check_rows(grads["table"], args[0]["table"], rows)
    assert_equal((value, dense(grads)), jax.value_and_grad(loss)(*args))


def test_a_loss_may_close_over_arrays():
    """Also over traced arrays of an outer function."""

    def outer(w, ids):
        vg = adamjax.value_and_grad(lambda p: quad({"w": w}, p["table"][ids]), "table")
        value, grads = vg({"table": PARAMS["table"]})
        return value, grads["table"].to_dense()

    expected = jax.value_and_grad(lambda t: quad(PARAMS, t[MANY]))(PARAMS["table"])
    assert_equal(outer(PARAMS["w"], MANY), expected)
    assert_equal(jax.jit(outer)(PARAMS["w"], MANY), expected)


def test_the_loss_is_called_once():
    calls = []

    def loss(p, ids):
        calls.append(p)
        return simple_loss(p, ids)

    def tied(p, ids):
        calls.append(p)
        return quad(p, p["table"][ids] @ p["table"].T)

    for function in (loss, tied):
        vg = adamjax.value_and_grad(function, "table")
        for n in range(1, 4):
            vg(params(), MANY)
            assert len(calls) == n
        compiled = jax.jit(vg)
        for _ in range(3):
            compiled(params(), MANY)
            assert len(calls) == 4
        calls.clear()


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, ids: p["table"][ids],
        lambda p, ids: p["table"][ids[:0, 0]].sum(1),
        lambda p, ids: ids.sum(),
        lambda p, ids: simple_loss(p, ids) * 1j,
        lambda p, ids: {"loss": simple_loss(p, ids)},
        lambda p, ids: None,
    ],
    ids=["rows", "empty", "integer", "complex", "dict", "nothing"],
)
def test_a_loss_that_is_not_a_real_scalar_is_refused(loss):
    for transformed in (jax.value_and_grad(loss), adamjax.value_and_grad(loss, "table")):
        with pytest.raises(TypeError, match=r"scalar|real|None"):
            transformed(params(), MANY)


def test_one_array_may_be_two_tables():
    table = jnp.asarray(halves(V, D))
    p = {"a": table, "b": table, "w": jnp.float32(0.5)}

    def loss(p, ids):
        return quad(p, p["a"][ids]) - 3 * quad(p, p["b"][ids % 3])

    grads = adamjax.grad(loss, ["a", "b"])(p, MANY)
    check_rows(grads["a"], table, Rows(MANY))
    check_rows(grads["b"], table, Rows(MANY % 3))
    assert_equal(dense(grads), jax.grad(loss)(p, MANY))


@pytest.mark.parametrize("mode", ["fill", "clip"])
@pytest.mark.slow
def test_an_index_beyond_32_bits_is_out_of_bounds(mode):
    """It does not read the row of its low 32 bits."""
    starts = np.array([3, 2**32 + 4, -1, 2**40, -(2**32) + 2, 5], np.int64)[:, None]
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))

    def loss(p, starts):
        return quad(p, lax.gather(p["table"], starts, numbers, (1, D), mode=mode, fill_value=1.5))

    with enable_x64(True):
        p = {"table": halves(V, D, dtype=np.float64), "w": np.float32(0.5)}
        value, grads = adamjax.value_and_grad(loss, "table")(p, starts)
        clipped_rows = [0, V - 1] if mode == "clip" else []
        check_rows(grads["table"], p["table"], Rows([3, 5, *clipped_rows], starts.size))
        expected = jax.value_and_grad(loss)(p, starts)
        assert_equal(grads["table"].to_dense(), expected[1]["table"])
        if mode == "clip":  # under "fill", JAX reads the row of the low 32 bits, without a gradient
            assert_equal((value, grads["w"]), (expected[0], expected[1]["w"]))


@pytest.mark.parametrize("jit", [False, True])
def test_effects_of_the_loss_happen_once(jit):
    seen = []

    def see(rows):
        jax.debug.callback(lambda x: seen.append(float(x)), rows.sum())

    def loss(p, ids):
        see(p["table"][ids])

        def step(total, row):
            see(p["table"][row])
            return total, None

        return lax.scan(step, quad(p, p["table"][ids]), ids)[0]

    def seen_by(value_and_grad):
        seen.clear()
        (jax.jit(value_and_grad) if jit else value_and_grad)(params(), MANY)
        jax.effects_barrier()
        return sorted(seen)

    table = params()["table"]
    theirs = seen_by(jax.value_and_grad(loss))
    assert theirs.count(table[MANY].sum()) == 1
    assert seen_by(adamjax.value_and_grad(loss, "table")) == theirs


def test_errors_of_the_loss_are_not_changed():
    def loss(p, ids):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        adamjax.value_and_grad(loss, "table")(params(), MANY)


def test_repeated_rows_are_summed_in_float32():
    """JAX sums the gradients of a bfloat16 cast in bfloat16, where a sum of ones stops at 256."""
    ids = np.zeros(1000, np.int32)

    def loss(p):
        return jnp.sum(p["table"].astype(jnp.bfloat16)[ids].astype(jnp.float32))

    g = run_unoptimized(adamjax.grad(loss, "table"), params())["table"]
    assert_equal(dense_by_numpy(g), np.float32([[1000] * D] + [[0] * D] * (V - 1)))


def test_a_cast_of_the_whole_table_is_never_stored():
    rows, width = 100_000, 16
    ids = np.random.default_rng(0).integers(0, rows, 256).astype(np.int32)

    def loss(p, ids):
        return quad(p, p["table"].astype(jnp.bfloat16)[ids])

    p = {"table": jax.ShapeDtypeStruct((rows, width), jnp.float32), "w": jnp.float32(0.5)}

    def arrays_of_the_tables_shape(function):
        text = jax.jit(function).lower(p, ids).compile().as_text()
        arrays = re.findall(rf"= (\w+)\[{rows},{width}\]\S* (\w[\w-]*)\(", text)
        return [found for found in arrays if found[1] != "parameter"], text

    def step(p, ids):
        value, grads = adamjax.value_and_grad(loss, "table")(p, ids)
        return value, adamjax.apply_updates(
            p, jax.tree.map(lambda g: -g, grads, is_leaf=is_rows_or_none)
        )

    arrays, text = arrays_of_the_tables_shape(adamjax.value_and_grad(loss, "table"))
    assert arrays == []
    assert f"bf16[{rows},{width}]" not in text
    # The step makes a new table, in float32.
    arrays, text = arrays_of_the_tables_shape(step)
    assert f"bf16[{rows},{width}]" not in text
    assert {dtype for dtype, _ in arrays} <= {"f32"}
    # The search does find such arrays in the program of JAX's gradient.
    assert arrays_of_the_tables_shape(jax.value_and_grad(loss))[0]


# --- models of other packages ---------------------------------------------------------------------


def check_package(loss, args, table, path, exact=True):
    """Compares a loss with JAX. `path` is its only table; `table` is a `Rows` or a `Dense`."""
    case = Case(loss, args, {path: table}, exact)
    leaves, merge = split(args[0], is_array)
    vg = case_value_and_grad(case, strict=isinstance(table, Rows))
    if isinstance(table, Dense):
        with pytest.raises(ValueError, match=table.operation):
            case_value_and_grad(case, strict=True)(*args)

    def both(leaves, *rest):
        args = (merge(leaves), *rest)
        return vg(*args), jax_value_and_grad(loss, args)

    check(case, *run_unoptimized(both, leaves, *args[1:]))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_embedding_of_flax_linen_gets_a_row_gradient_unless_it_is_tied(dtype):
    linen = pytest.importorskip("flax.linen")
    table = {"params": {"embedding": halves(V, D)}}
    embed = linen.Embed(V, D, dtype=None if dtype is None else jnp.bfloat16)

    def loss(variables, ids):
        return quad(PARAMS, embed.apply(variables, ids))

    check_package(loss, (table, MANY), Rows(MANY), "params/embedding")

    def tied(variables, ids):
        hidden = embed.apply(variables, ids)
        return quad(PARAMS, embed.apply(variables, hidden, method="attend"))

    check_package(tied, (table, MANY), Dense("dot_general"), "params/embedding")


@pytest.mark.slow
def test_two_embeddings_of_a_flax_linen_model_get_row_gradients():
    linen = pytest.importorskip("flax.linen")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, ids, others):
            x = linen.Embed(V, D, name="items")(ids).mean(1)
            y = linen.remat(linen.Embed)(V, D, dtype=jnp.bfloat16, name="users")(others)
            return linen.Dense(1)(linen.relu(linen.Dense(5)(jnp.concatenate([x, y], -1))))

    model = Model()
    others = VALID[: len(MANY)]
    variables = model.init(jax.random.key(0), MANY, others)

    def loss(variables, ids, others):
        return jnp.mean(model.apply(variables, ids, others) ** 2)

    case = Case(
        loss,
        (variables, MANY, others),
        {"params/items/embedding": Rows(MANY), "params/users/embedding": Rows(others)},
        exact=False,
    )
    vg = adamjax.value_and_grad(loss, "embedding", strict=True)
    check(
        case,
        *run_unoptimized(lambda *args: (vg(*args), jax_value_and_grad(loss, args)), *case.args),
    )


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_embedding_of_flax_nnx_gets_a_row_gradient_unless_it_is_tied(dtype):
    nnx = pytest.importorskip("flax.nnx")
    options = {} if dtype is None else {"dtype": jnp.bfloat16}
    embed = nnx.Embed(V, D, rngs=nnx.Rngs(0), **options)
    graph, state = nnx.split(embed)
    state = jax.tree.map(lambda x: jnp.asarray(halves(V, D)), state)
    [path] = leaves_by_path(state)
    assert "embedding" in path

    def loss(state, ids):
        return quad(PARAMS, nnx.merge(graph, state)(ids))

    check_package(loss, (state, MANY), Rows(MANY), path)

    def tied(state, ids):
        embed = nnx.merge(graph, state)
        return quad(PARAMS, embed.attend(embed(ids)))

    check_package(tied, (state, MANY), Dense("dot_general"), path)


def test_a_flax_nnx_module_may_itself_be_the_parameters():
    nnx = pytest.importorskip("flax.nnx")
    embed = nnx.Embed(V, D, rngs=nnx.Rngs(0))
    if jax.tree.leaves(embed)[0] is embed:
        pytest.skip("in this release of Flax, modules are not pytrees")
    embed = jax.tree.map(lambda x: jnp.asarray(halves(V, D)), embed)
    [path] = leaves_by_path(embed)

    def loss(model, ids):
        return quad(PARAMS, model(ids))

    check_package(loss, (embed, MANY), Rows(MANY), path)


@pytest.mark.parametrize("vmaps", [1, 2])
def test_an_embedding_of_equinox_gets_a_row_gradient_under_vmap(vmaps):
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        embedding: Any
        mlp: Any

    mlp = eqx.nn.MLP(D, "scalar", 4, 1, key=jax.random.key(0))
    model = Model(eqx.nn.Embedding(weight=jnp.asarray(halves(V, D))), mlp)
    ids = {1: VALID, 2: MANY}[vmaps]

    def loss(model, ids):
        def predict(i):
            return model.mlp(model.embedding(i))

        for _ in range(vmaps):
            predict = jax.vmap(predict)
        return jnp.mean(predict(ids) ** 2)

    # Activation functions are leaves of the module.
    assert any(callable(x) and not is_array(x) for x in jax.tree.leaves(model))
    check_package(loss, (model, ids), Rows(ids), "embedding/weight", exact=False)


# --- value_and_grad within JAX's transformations --------------------------------------------------


def descent_step(vg):
    """A step of gradient descent."""

    def step(p, ids):
        value, grads = vg(p, ids)
        return value, adamjax.apply_updates(
            p, jax.tree.map(lambda g: g * -0.5, grads, is_leaf=is_rows_or_none)
        )

    return step


def test_a_jitted_step_reuses_donated_parameters():
    """JAX warns if it cannot reuse a donated buffer, and a warning is an error in the tests."""
    step = jax.jit(descent_step(adamjax.value_and_grad(simple_loss, "table")), donate_argnums=0)
    p = jax.tree.map(jnp.array, params())
    donated = p["table"]
    value, p = step(p, MANY)
    assert donated.is_deleted()
    assert_equal((value, p), descent_step(jax.value_and_grad(simple_loss))(params(), MANY))


def test_vmap_returns_a_gradient_for_each_example():
    vg = adamjax.value_and_grad(simple_loss, "table")
    value, grads = jax.jit(jax.vmap(vg, in_axes=(None, 0)))(params(), MANY)
    expected = jax.vmap(jax.value_and_grad(simple_loss), in_axes=(None, 0))(params(), MANY)
    assert grads["table"].values.shape == (*MANY.shape, D)
    for i, ids in enumerate(MANY):
        check_rows(jax.tree.map(lambda x, i=i: x[i], grads["table"]), PARAMS["table"], Rows(ids))
    assert_equal((value, jax.vmap(dense)(grads)), expected)


def test_vmap_returns_a_gradient_for_each_model_of_an_ensemble():
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x), params(), {**params(), "table": halves(V, D, seed=9)}
    )
    ids = MANY[:2]
    both = [jax.vmap(f(simple_loss)) for f in (by_rows, jax.value_and_grad)]
    (value, grads), expected = run_unoptimized(lambda *args: [f(*args) for f in both], stacked, ids)
    assert grads["table"].values.shape == (2, 4, D)
    assert_equal((value, jax.vmap(dense)(grads)), expected)


def test_a_scan_over_training_steps_has_the_result_of_jax():
    def train(vg):
        step = descent_step(vg)
        return jax.jit(lambda p, batches: lax.scan(lambda p, b: step(p, b)[::-1], p, batches))

    batches = MANY[:2]
    actual = train(adamjax.value_and_grad(simple_loss, "table"))(params(), batches)
    assert_equal(actual, train(jax.value_and_grad(simple_loss))(params(), batches), exact=False)


def test_value_and_grad_runs_inside_remat_and_cond():
    vg = adamjax.value_and_grad(simple_loss, "table")
    expected = jax.value_and_grad(simple_loss)(params(), MANY)
    value, grads = jax.checkpoint(vg)(params(), MANY)
    assert_equal((value, dense(grads)), expected)
    value, grads = lax.cond(True, vg, vg, params(), MANY)
    assert_equal((value, dense(grads)), expected)


def cubic(p, ids):
    rows = p["table"][ids]
    return jnp.sum(rows * rows * (rows + p["w"]) * p["w"])


def test_second_derivatives_are_those_of_jax():
    """Forward and reverse mode, with respect to all parameters, the table among them."""
    tangent = {"table": halves(V, D, seed=7), "w": np.float32(1.5)}
    tangent_of_w = {"table": np.zeros((V, D), np.float32), "w": np.float32(1)}

    def derivatives(value_and_grad, p):
        def value_and_dense(p):
            value, grads = value_and_grad(cubic)(p, MANY)
            return value, dense(grads)

        def penalty(p):
            return sum(jnp.sum(g * g) for g in jax.tree.leaves(value_and_dense(p)[1]))

        return [jax.jvp(value_and_dense, (p,), (t,)) for t in (tangent, tangent_of_w)], jax.grad(
            penalty
        )(p)

    both = [functools.partial(derivatives, f) for f in (by_rows, jax.value_and_grad)]
    actual, expected = run_unoptimized(lambda p: [f(p) for f in both], params())
    assert_equal(actual, expected)


PROMISED = lax.GatherScatterMode.PROMISE_IN_BOUNDS


def promised_pairs(table, ids):
    numbers = lax.GatherDimensionNumbers((1, 2), (), (0,))
    return lax.gather(table, ids[:, None], numbers, (2, D), mode=PROMISED)


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda t, ids: t[ids], id="index"),
        pytest.param(lambda t, ids: jnp.take(t, ids, 0, mode="clip"), id="clip"),
        pytest.param(lambda t, ids: jnp.take(t, ids, 0, mode="fill", fill_value=0.5), id="fill"),
        pytest.param(jax.checkpoint(lambda t, ids: t[ids]), id="remat"),
        pytest.param(lambda t, ids: lax.map(lambda i: t[i[None]], ids), id="map"),
        pytest.param(promised_pairs, id="runs"),
        pytest.param(lambda t, ids: t[:, None][ids, jnp.array([0, 1, 0, 0])], id="columns"),
    ],
)
def test_second_derivatives_outside_the_table_are_those_of_jax(read):
    """In the default mode, JAX moves tangents into the table, and drops cotangents."""
    ids = jnp.array([-9 * V, 3, V - 1, 9 * V])
    tangent, weights = halves(V, D, seed=7), halves(V, D, seed=8)

    def loss(table):
        rows = read(table, ids).reshape(-1)
        return jnp.sum(rows * rows * jnp.roll(rows, D))

    def derivatives(value_and_grad, table):
        def gradient(table):
            return dense(value_and_grad(loss)(table)[1])

        return [
            jax.jvp(gradient, (table,), (tangent,)),
            jax.vjp(gradient, table)[1](weights),
            jax.value_and_grad(lambda table: value_and_grad(loss)(table)[0])(table),
            jax.jvp(lambda table: value_and_grad(loss)(table)[0], (table,), (tangent,)),
            jax.vmap(gradient)(table * jnp.ones((2, 1, 1))),
            jax.vmap(lambda v: jax.vjp(gradient, table)[1](v)[0])(jnp.stack([weights, tangent])),
        ]

    by_array = functools.partial(adamjax.value_and_grad, tables="")
    both = [functools.partial(derivatives, f) for f in (by_array, jax.value_and_grad)]
    actual, expected = run_unoptimized(lambda t: [f(t) for f in both], halves(V, D))
    assert_equal(actual, expected)


# --- several devices ------------------------------------------------------------------------------

DEVICES = 8
SHARDS = np.random.default_rng(5).integers(-2, V + 2, (DEVICES, 6)).astype(np.int32)


def loss_of_shards(p, ids):
    return quad(p, jnp.take(p["table"], ids, axis=0, mode="fill", fill_value=0.5))


def mapped(function, mesh, in_specs, out_specs):
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def compare_on_devices():
    """Compares with JAX in a process of its own, which has several devices."""
    assert jax.device_count() == DEVICES
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    batch, replicated = jax.sharding.PartitionSpec("batch"), jax.sharding.PartitionSpec()
    sharding = functools.partial(jax.sharding.NamedSharding, mesh)
    p = jax.device_put(params(), sharding(replicated))
    ids = jax.device_put(SHARDS, sharding(batch))

    # The batch is sharded, and the parameters are replicated.
    value, grads = jax.jit(adamjax.value_and_grad(loss_of_shards, "table"))(p, ids)
    expected = jax.value_and_grad(loss_of_shards)(params(), SHARDS)
    check_rows(grads["table"], PARAMS["table"], Rows(SHARDS))
    assert_equal((value, dense(grads)), expected)

    # The table is sharded too: by its rows, and then by its columns.
    for spec in (jax.sharding.PartitionSpec("batch"), jax.sharding.PartitionSpec(None, "batch")):
        wide = params(num_rows=16, trailing=(16,))
        sharded = {**wide, "table": jax.device_put(wide["table"], sharding(spec))}
        value, grads = jax.jit(adamjax.value_and_grad(loss_of_shards, "table"))(sharded, ids)
        check_rows(grads["table"], wide["table"], Rows(np.arange(16), SHARDS.size))
        assert_equal((value, dense(grads)), jax.value_and_grad(loss_of_shards)(wide, SHARDS))

    # The loss has a sharding constraint on the table.
    def constrained(p, ids):
        table = lax.with_sharding_constraint(p["table"], sharding(replicated))
        return loss_of_shards({**p, "table": table}, ids)

    value, grads = jax.jit(adamjax.value_and_grad(constrained, "table"))(p, ids)
    expected = jax.value_and_grad(loss_of_shards)(params(), SHARDS)
    assert_equal((value, dense(grads)), expected)

    # Inside of a shard_map, each device computes the gradient of its own examples. Parameters are
    # marked as varying over the devices. Otherwise JAX would sum their gradients over the devices.
    def vary(x):
        return as_varying(x, ("batch",))

    def grads_of_shard(p, ids):
        p = jax.tree.map(vary, p)
        value, grads = adamjax.value_and_grad(loss_of_shards, "table", strict=True)(p, ids[0])
        return jax.tree.map(lambda x: x[None], (value, grads))

    values, grads = jax.jit(mapped(grads_of_shard, mesh, (replicated, batch), batch))(p, ids)
    for i, shard in enumerate(SHARDS):
        one = jax.tree.map(lambda x, i=i: x[i], grads)
        check_rows(one["table"], PARAMS["table"], Rows(shard))
        expected = jax.value_and_grad(loss_of_shards)(params(), shard)
        assert_equal((values[i], dense(one)), expected)

    # `sum_over` sums these row gradients over the devices.
    def summed(p, ids):
        grads = adamjax.grad(loss_of_shards, "table")(jax.tree.map(vary, p), ids[0])
        grads = adamjax.sum_over("batch").update(grads, (), p)[0]
        return jax.tree.map(lambda x: x[None], dense(grads))

    total = jax.jit(mapped(summed, mesh, (replicated, batch), batch))(p, ids)
    of_shard = [jax.grad(loss_of_shards)(params(), shard) for shard in SHARDS]
    expected = jax.tree.map(lambda *grads: sum(grads), *of_shard)
    for i in range(DEVICES):
        assert_equal(jax.tree.map(lambda x, i=i: x[i], total), expected)

    # The loss has a shard_map.
    def mapped_loss(p, ids):
        def sum_of_losses(p, ids):
            return lax.psum(loss_of_shards(p, ids[0]), "batch")

        return mapped(sum_of_losses, mesh, (replicated, batch), replicated)(p, ids)

    expected = jax.jit(jax.value_and_grad(mapped_loss))(p, ids)
    value, grads = jax.jit(adamjax.value_and_grad(mapped_loss, "table"))(p, ids)
    assert_equal((value, dense(grads)), expected)


@pytest.mark.slow
def test_gradients_on_several_devices_are_those_of_jax():
    run_on_devices(DEVICES, "import test_autodiff; test_autodiff.compare_on_devices()")
