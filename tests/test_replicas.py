"""Sums of gradients over replicas. The sum of row gradients is a row gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, run_on_devices

import adamjax

REPLICAS, NUM_ROWS, WIDTH = 4, 11, 2


def replica_data():
    """The indices and values of each replica's row gradient, and its `w_grad`. Axis 0: replicas."""
    rng = np.random.default_rng(0)
    # -1 and NUM_ROWS stand for no row.
    ids = jnp.asarray(rng.integers(-1, NUM_ROWS + 1, (REPLICAS, 5)))
    values = jnp.asarray(rng.normal(size=(REPLICAS, 5, WIDTH)), jnp.float32)
    return ids, values, jnp.asarray(rng.normal(size=(REPLICAS, 3)), jnp.float32)


def gradients(ids, values, w_grad):
    rows = adamjax.row_gradient(ids, values, NUM_ROWS)
    return {"none": None, "table": rows, "w": w_grad}


def optimizer(*first):
    return adamjax.chain(*first, adamjax.clip_by_global_norm(0.5), adamjax.adamw(0.1))


PARAMS = {"none": None, "table": jnp.ones((NUM_ROWS, WIDTH)), "w": jnp.ones(3)}


def one_step(tx, grads):
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    return adamjax.apply_updates(PARAMS, updates)


def step_of_a_replica(ids, values, w_grad):
    return one_step(optimizer(adamjax.sum_over("batch")), gradients(ids, values, w_grad))


def params_of_one_device():
    """The parameters after a step of one device with all row gradients and the sum of `w_grad`."""
    ids, values, w_grad = replica_data()
    return one_step(optimizer(), gradients(ids, values, w_grad.sum(0)))


def assert_params_of_one_device(params_of_replicas):
    """Asserts that every replica has the parameters of one device."""
    wanted = params_of_one_device()
    for i in range(REPLICAS):
        params = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), params_of_replicas)
        assert_close(params, wanted, 1e-6)


@pytest.mark.slow
def test_replicas_under_vmap_take_the_step_of_one_device():
    assert_params_of_one_device(jax.vmap(step_of_a_replica, axis_name="batch")(*replica_data()))


@pytest.mark.slow
def test_dense_updates_of_a_table_are_summed_as_well():
    """Adam's updates have all rows, including those that a replica did not read."""

    def step(ids, values, w_grad):
        tx = adamjax.chain(adamjax.adam(0.1), adamjax.sum_over("batch"))
        return one_step(tx, gradients(ids, values, w_grad))["table"]

    def update_of_one_replica(ids, values, w_grad):
        moved = one_step(adamjax.adam(0.1), gradients(ids, values, w_grad))
        return moved["table"] - PARAMS["table"]

    mapped = jax.vmap(step, axis_name="batch")(*replica_data())
    total = jax.vmap(update_of_one_replica)(*replica_data()).sum(0)
    assert_close(mapped[0], PARAMS["table"] + total, 1e-6)


def check_over_devices():
    """Under `pmap` and `shard_map`. Needs several devices, so it runs in its own process."""
    assert jax.device_count() == REPLICAS
    assert_params_of_one_device(jax.pmap(step_of_a_replica, axis_name="batch")(*replica_data()))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    spec = jax.sharding.PartitionSpec("batch")

    def step_on_one_device(*shards):
        params = step_of_a_replica(*(x[0] for x in shards))
        return jax.tree.map(lambda x: x[None], params)

    mapped = jax.shard_map(step_on_one_device, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    assert_params_of_one_device(jax.jit(mapped)(*replica_data()))


def check_replicated_parameters_need_check_vma_false():
    """By default `shard_map` sums their gradients itself, so `sum_over` refuses to do it again."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    replicated, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("batch")

    def loss(params, x):
        return jnp.sum(params["w"] * x.mean(0)) / REPLICAS + jnp.sum(params["table"][1])

    row_gradients = adamjax.value_and_grad(loss, "table")

    def summed(grad, **options):
        def on_each(params, x):
            grads = adamjax.sum_over("batch").update(grad(params, x), (), params)[0]
            if isinstance(grads["table"], adamjax.RowGradient):
                grads["table"] = grads["table"].to_dense()
            return grads

        mapped = jax.shard_map(
            on_each, mesh=mesh, in_specs=(replicated, split), out_specs=replicated, **options
        )
        return jax.jit(mapped)

    x = jnp.arange(24.0).reshape(8, 3)
    for grad in (jax.grad(loss), lambda *args: row_gradients(*args)[1]):
        with pytest.raises(
            ValueError, match=r"gradient of '(w|table)' is the same.*'batch'.*check_vma=False"
        ):
            summed(grad)(PARAMS, x)
        found = summed(grad, check_vma=False)(PARAMS, x)
        assert_close(found["w"], x.mean(0), 1e-6)
        assert_close(found["table"], jnp.zeros((NUM_ROWS, WIDTH)).at[1].set(float(REPLICAS)), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", [check_over_devices, check_replicated_parameters_need_check_vma_false]
)
def test_replicas_on_several_devices(check):
    run_on_devices(REPLICAS, f"import test_replicas; test_replicas.{check.__name__}()")


def test_a_name_that_is_no_mapped_axis_is_refused():
    for bad in (0, 1.0, None, True, ("batch", 0), (("batch",),)):
        with pytest.raises(TypeError, match="axis_name must be the name of a mapped axis"):
            adamjax.sum_over(bad)
    for bad in ((), [], ("batch", "batch")):
        with pytest.raises(ValueError, match="one name or several different ones; got"):
            adamjax.sum_over(bad)
    g = jnp.ones((2, 3))
    for axis in ("batch", ("rows", "batch")):
        tx = adamjax.sum_over(axis)
        for step in (tx.update, jax.vmap(tx.update, (0, None), axis_name="rows")):
            with pytest.raises(
                NameError, match=r"sum_over: no axis .*batch.* is mapped here.*vmap"
            ):
                step(g, ())


def test_sums_over_two_axes():
    summed = adamjax.sum_over(["rows", "batch"]).update
    inner = jax.vmap(summed, (0, None), axis_name="batch")
    mapped = jax.vmap(inner, (0, None), axis_name="rows")
    assert_close(mapped(jnp.ones((2, 3, 1)), ())[0], 6 * jnp.ones((2, 3, 1)))


def test_a_sum_inside_of_skip_not_finite_is_refused():
    """A device whose gradients are not finite would skip the step, and the others would wait."""
    summed = adamjax.chain(adamjax.sum_over("batch"), adamjax.adam(0.1))
    for tx in (summed, adamjax.masked(summed, "w"), adamjax.with_hyperparams(summed, b1=0.5)):
        with pytest.raises(ValueError, match=r"skip_not_finite: sum_over is inside.*write chain"):
            adamjax.skip_not_finite(tx)

    tx = adamjax.chain(adamjax.sum_over("batch"), adamjax.skip_not_finite(adamjax.adam(0.1)))
    state = tx.init(jnp.ones(2))
    step = jax.vmap(tx.update, (0, None), axis_name="batch")
    updates, state = step(jnp.array([[jnp.nan, 1.0], [2.0, 3.0]]), state)
    np.testing.assert_array_equal(updates, np.zeros((2, 2)))
    np.testing.assert_array_equal(adamjax.skipped_steps(state), [1, 1])
