"""The memory of Adam: its state, and the temporaries of a donated step."""

import jax
import jax.numpy as jnp
import pytest

import adamjax

CHAINS = {
    "adam": adamjax.adam(),
    "clip + adam": adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam()),
    "pipeline": adamjax.chain(
        adamjax.clip_by_global_norm(1.0), adamjax.adamw(), adamjax.weight_ema()
    ),
}


def compiled_step(tx, params):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="an older XLA keeps the clipped gradients in memory"
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("chain", CHAINS)
def test_temporaries_are_under_a_hundredth_of_the_parameters(chain, dtype):
    params = [jax.ShapeDtypeStruct((1024, 1024), dtype)] * 3
    memory = compiled_step(CHAINS[chain], params).memory_analysis()
    parameter_bytes = sum(p.size * p.dtype.itemsize for p in params)
    assert memory.temp_size_in_bytes < parameter_bytes / 100


def test_the_state_of_adam_is_eight_bytes_a_parameter():
    params = jax.ShapeDtypeStruct((1000,), jnp.float32)
    leaves = jax.tree.leaves(jax.eval_shape(adamjax.adam().init, params))
    moments = [leaf for leaf in leaves if leaf.ndim]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in moments) == 8 * 1000
    # The only other leaves are two step counts: the rule's and the learning rate's.
    scalars = [leaf for leaf in leaves if leaf.ndim == 0]
    assert sum(leaf.dtype.itemsize for leaf in scalars) == 2 * 4
