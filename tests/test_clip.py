"""Clips by value, by the norm of a leaf and by the global norm; and the global norm itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_same, enable_x64

from adamjax import (
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    global_norm,
    row_gradient,
    set_hyperparams,
    with_hyperparams,
)

CLIPS = [clip_by_value, clip_by_norm, clip_by_global_norm]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def clip(tx, grads):
    return tx.update(grads, tx.init(grads))[0]


def tree(dtype=jnp.float32):
    """Gradients whose norms are 5 and 12, and 13 together."""
    return {"w": jnp.array([[3.0, -4.0]], dtype), "b": jnp.array([0.0, 12.0], dtype)}


def test_clips_of_values_of_leaf_norms_and_of_the_global_norm():
    def close(actual, w, b):
        np.testing.assert_allclose(actual["w"], w, rtol=1e-6)
        np.testing.assert_allclose(actual["b"], b, rtol=1e-6)

    close(clip(clip_by_value(3.5), tree()), [[3.0, -3.5]], [0.0, 3.5])
    close(clip(clip_by_norm(6.0), tree()), [[3.0, -4.0]], [0.0, 6.0])
    close(clip(clip_by_norm(1.0), tree()), [[0.6, -0.8]], [0.0, 1.0])
    close(clip(clip_by_global_norm(6.5), tree()), [[1.5, -2.0]], [0.0, 6.0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", CLIPS)
def test_gradients_within_the_limit_are_unchanged_bit_for_bit(make, dtype):
    rng = np.random.default_rng(0)
    grads = {str(i): jnp.asarray(rng.normal(size=7), dtype) for i in range(3)}
    assert_same(clip(make(100.0), grads), grads)
    assert_same(clip(make(13.0), tree(dtype)), tree(dtype))  # at the limit


@pytest.mark.parametrize("make", CLIPS)
def test_a_traced_limit_of_0_makes_zeros_and_a_bad_one_makes_nan(make):
    """`make` refuses a number below 0 or NaN, but it cannot see the value of a traced one."""
    clipped = jax.jit(lambda limit, grads: clip(make(limit), grads))
    zeros, tiny = jax.tree.map(jnp.zeros_like, tree()), jax.tree.map(lambda g: 1e-30 * g, tree())
    for limit in (0.0, 1e-45, 1e-39, 1e-30, 1.0):  # the second and third are subnormal
        assert_same(clipped(limit, zeros), zeros)
    for grads in (zeros, tiny, tree()):
        assert_same(jax.tree.map(jnp.abs, clipped(0.0, grads)), zeros)
    assert_same(clipped(100.0, tree()), tree())
    for limit in (-1.0, jnp.nan):
        for grads in (zeros, tree()):
            assert all(np.isnan(g).all() for g in jax.tree.leaves(clipped(limit, grads)))
    # The clipped element equals the limit.
    slope = jax.grad(lambda limit: clip(make(limit), jnp.array([2.0]))[0])(1.0)
    assert float(slope) == 1.0


@pytest.mark.parametrize("make", CLIPS)
def test_a_limit_that_is_set_to_0_leaves_zeros(make):
    name = "limit" if make is clip_by_value else "max_norm"
    tx = with_hyperparams(make(1.0), **{name: 1.0})
    zeros = jax.tree.map(jnp.zeros_like, tree())
    state = set_hyperparams(tx.init(zeros), **{name: 0})
    assert_same(tx.update(zeros, state)[0], zeros)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", CLIPS)
def test_zeros_stay_zero_even_under_a_tiny_limit(make, dtype):
    zeros = jax.tree.map(jnp.zeros_like, tree(dtype))
    for limit in (1.0, 1.2e-38, jnp.float32(1e-3)):
        assert_same(clip(make(limit), zeros), zeros)


def test_float16_squares_do_not_overflow():
    """300 squared is beyond float16's range, 65504."""
    grads = {"w": jnp.full(4, 300.0, jnp.float16), "b": jnp.full(4, 1.0, jnp.bfloat16)}
    assert float(global_norm(grads)) == pytest.approx(np.sqrt(4 * 300.0**2 + 4))
    assert global_norm(grads).dtype == jnp.float32
    for make in (clip_by_norm, clip_by_global_norm):
        clipped = clip(make(100.0), grads)
        np.testing.assert_allclose(clipped["w"].astype(float), 50.0, rtol=1e-3)
        assert (clipped["w"].dtype, clipped["b"].dtype) == (jnp.float16, jnp.bfloat16)
    # Nor do small squares vanish: 1e-5 squared is 0 in float16.
    tiny = jnp.full(10_000, 1e-5, jnp.float16)
    assert float(global_norm(tiny)) == pytest.approx(1e-3, rel=1e-2)


def test_the_norm_of_33_million_elements_is_exact():
    """A running sum of ones in float32 would stop at 2**24, which is 17 million."""
    n = 2**25 + 2**20
    ones = jnp.ones(n, jnp.float32)
    assert float(global_norm(ones)) == pytest.approx(np.sqrt(n), rel=1e-7)
    assert float(global_norm({"a": ones, "b": jnp.ones(1)})) == pytest.approx(np.sqrt(n), rel=1e-7)
    clipped = clip(clip_by_norm(1.0), ones)
    assert float(clipped[0]) == pytest.approx(1 / np.sqrt(n), rel=2e-7)
    del clipped
    values = np.random.default_rng(0).random(n, np.float32)
    norm = np.sqrt(np.sum(np.square(values, dtype=np.float64)))
    assert float(global_norm(jnp.asarray(values))) == pytest.approx(norm, rel=1e-6)


def test_the_norm_of_300_leaves():
    grads = {str(i): jnp.full((), 1.0 + i) for i in range(300)}
    assert float(global_norm(grads)) == pytest.approx(np.sqrt(np.sum(np.arange(1.0, 301) ** 2)))


def test_the_norm_of_trees_with_integers_none_complex_or_no_elements():
    mixed = {"n": jnp.arange(3), "none": None, "z": jnp.zeros((0, 2)), "x": 3.0, "c": 4j}
    assert float(global_norm(mixed)) == 5.0
    assert float(global_norm({})) == 0.0
    assert float(global_norm(None)) == 0.0
    assert float(global_norm(jnp.arange(3))) == 0.0
    with enable_x64(True):
        assert global_norm({"x": jnp.float64(1e200)}).dtype == jnp.float64
        assert float(global_norm({"x": jnp.float64(1e150), "y": jnp.float32(1)})) == 1e150


def test_the_norm_has_a_derivative_everywhere():
    zeros = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    assert_same(jax.grad(global_norm)(zeros), zeros)
    slope = jax.grad(global_norm)({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)})
    np.testing.assert_allclose(slope["w"], [0.6, 0.0], rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 1e20])
def test_a_norm_that_is_not_finite_makes_nan(bad):
    """By norm, the leaf or all leaves become NaN. By value, infinities are limited, NaN stays NaN.

    1e20 is finite, but its square overflows in float32.
    """
    grads = {"w": jnp.array([bad, 1.0]), "b": jnp.array([1.0, 2.0])}
    by_value = clip(clip_by_value(1.5), grads)
    expected = np.nan if np.isnan(bad) else np.sign(bad) * 1.5
    np.testing.assert_array_equal(by_value["w"], [expected, 1.0])
    np.testing.assert_array_equal(by_value["b"], [1.0, 1.5])

    by_norm = clip(clip_by_norm(100.0), grads)
    assert np.all(np.isnan(by_norm["w"]))
    np.testing.assert_array_equal(by_norm["b"], grads["b"])

    jointly = clip(clip_by_global_norm(100.0), grads)
    assert np.all(np.isnan(jointly["w"]))
    assert np.all(np.isnan(jointly["b"]))


def test_complex_elements_are_clipped():
    grads = jnp.array([3.0 + 4.0j, 0.1 - 5.0j])
    np.testing.assert_allclose(clip(clip_by_value(1.0), grads), [1.0 + 1.0j, 0.1 - 1.0j])
    assert float(global_norm(grads)) == pytest.approx(np.sqrt(50.01))
    for make in (clip_by_norm, clip_by_global_norm):
        clipped = clip(make(1.0), grads)
        np.testing.assert_allclose(clipped, grads / np.sqrt(50.01), rtol=1e-6)
        assert clipped.dtype == grads.dtype


def test_none_and_integers_do_not_count_in_the_norm():
    grads = {"w": jnp.array([3.0, 4.0]), "n": jnp.array([100]), "none": None}
    clipped = clip(clip_by_global_norm(1.0), grads)
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=1e-6)
    assert_same(clipped["n"], jnp.array([0]))
    assert clipped["none"] is None
    assert clip(clip_by_norm(1.0), grads)["none"] is None


def test_the_norm_of_leaves_of_several_dtypes_is_summed_in_the_widest():
    with enable_x64(True):
        rng = np.random.default_rng(0)
        tree = {
            "wide": jnp.asarray(rng.normal(size=100)),
            "narrow": jnp.asarray(rng.normal(size=(50, 20)), jnp.bfloat16),
            "rows": row_gradient(
                jnp.arange(9), jnp.asarray(rng.normal(size=(9, 3)), jnp.float32), num_rows=20
            ),
        }
        arrays = [np.asarray(x, np.float64) for x in (tree["wide"], tree["narrow"])]
        arrays.append(np.asarray(tree["rows"].values, np.float64))
        expected = np.sqrt(sum(np.sum(x**2) for x in arrays))
        norm = global_norm(tree)
        assert norm.dtype == jnp.float64
        np.testing.assert_allclose(norm, expected, rtol=1e-14)
        assert global_norm({"narrow": tree["narrow"]}).dtype == jnp.float32


@pytest.mark.parametrize("make", [clip_by_global_norm, clip_by_norm, clip_by_value])
def test_a_limit_that_was_edited_in_the_pytree_is_refused(make):
    for limit in (-1.0, 0.0, float("nan")):
        edited = jax.tree.map(lambda _, limit=limit: limit, make(1.0))
        with pytest.raises(ValueError, match=r"must be finite and at least .*, got"):
            edited.update({"w": jnp.ones(2)}, ())
