"""Under JAX's strict promotion of dtypes, results are the same as under the standard one."""

import jax
import jax.numpy as jnp
import pytest
from support import assert_same

import adamjax

PARAMS = jnp.array([1.0, -2.0, 3.0])
# Makers of transforms, each with an array as one hyperparameter. `array` makes it from a number.
HYPERPARAMETERS = {
    "rate": lambda array: adamjax.adam(array(0.1)),
    "b1": lambda array: adamjax.adam(b1=array(0.9)),
    "eps": lambda array: adamjax.adam(eps=array(0.1)),
    "decay": lambda array: adamjax.adamw(weight_decay=array(0.1)),
    "momentum": lambda array: adamjax.chain(adamjax.adam(), adamjax.weight_ema(array(0.9))),
    "initial rate": lambda array: adamjax.adam(adamjax.cosine_decay(array(0.1), 10)),
    "boundary": lambda array: adamjax.adam(adamjax.piecewise_constant([array(2.0)], [0.1, 0.2])),
    "norm": lambda array: adamjax.clip_by_global_norm(array(0.5)),
    "function": lambda array: adamjax.adam(lambda count: array(0.1)),
}
# Schedules over a number of steps.
SCHEDULES = {
    "inverse time": lambda n: adamjax.inverse_time_decay(0.1, n, 0.5),
    "staircase": lambda n: adamjax.exponential_decay(0.1, n, 0.5, staircase=True),
    "polynomial": lambda n: adamjax.polynomial_decay(0.1, n, 0.5),
    "cycle": lambda n: adamjax.polynomial_decay(0.1, n, 0.5, cycle=True),
    "cosine": lambda n: adamjax.cosine_decay(0.1, n),
}


def assert_strict_promotion_changes_nothing(function, *args):
    with jax.numpy_dtype_promotion("strict"):
        strict = function(*args)
    assert_same(strict, function(*args))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_hyperparameters_may_be_arrays_of_any_dtype(name, dtype):
    def update():
        tx = HYPERPARAMETERS[name](lambda value: jnp.array(value, dtype))
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)

    assert_strict_promotion_changes_nothing(update)


@pytest.mark.parametrize("steps", [3, jnp.uint8(3), jnp.uint32(3), jnp.int32(3)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_numbers_of_steps_may_be_integers_of_any_dtype(name, steps):
    assert_strict_promotion_changes_nothing(SCHEDULES[name](steps), jnp.int32(4))


@pytest.mark.parametrize("gradient", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("table", ["float32", "float16"])
def test_row_gradients_may_have_another_dtype_than_their_table(gradient, table):
    params = {"t": jnp.ones((4, 2), table)}
    grads = {"t": adamjax.row_gradient(jnp.array([1]), jnp.ones((1, 2), gradient), 4)}
    tx = adamjax.exact_rows(adamjax.adamw(0.1), "t")

    def moved():
        return adamjax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])

    assert_strict_promotion_changes_nothing(moved)
