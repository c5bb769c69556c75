"""adamjax with other libraries: optax, Flax, Equinox, Orbax, and with JAX' transformations.

Most tests take a few steps and compare the result with that of a plain loop, within rounding.
"""

import copy
import functools
import importlib
import operator
import pickle
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.experimental import checkify
from support import assert_close, assert_same, jit_and_traces, run_on_devices

import adamjax

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=16), jnp.float32)
PARAMS = {
    "hidden": {"bias": jnp.zeros(3), "kernel": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)},
    "out": {"kernel": jnp.asarray(RNG.normal(size=3), jnp.float32)},
}
V = 12  # rows of the tables
IDS = jnp.array([[1, 4, 4, 7], [2, 2, 9, 0], [11, 3, 3, 3]])  # rows 5, 6, 8 and 10 are never read
ALL_IDS = jnp.arange(V)
TABLES = {"table": jnp.asarray(RNG.normal(size=(V, 2)), jnp.float32), "w": jnp.ones(2)}
# The tolerance between programs with the same arithmetic: XLA may fuse, and so round, differently.
ROUNDING = 2e-6
# optax corrects biases by 1 - b**t in float32, which is off by 1e-5 at small t. A beta that goes
# into `jit` as an argument is a float32, and 1 - b2 is off by 1e-5 as well.
LOOSER = 2e-5


def loss_fn(params, x=X, y=Y):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((hidden @ params["out"]["kernel"] - y) ** 2)


def lookup_loss(params, ids):
    return jnp.mean((params["table"][ids] @ params["w"] - 1.0) ** 2)


def one_step(tx, params, state, *args, loss=loss_fn):
    updates, state = tx.update(jax.grad(loss)(params, *args), state, params)
    return adamjax.apply_updates(params, updates), state


@functools.cache
def trained(tx, steps=5, apply=adamjax.apply_updates):
    """The parameters and the state after a plain loop of jitted steps."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return apply(params, updates), state

    carry = (PARAMS, tx.init(PARAMS))
    for _ in range(steps):
        carry = step(*carry)
    return carry


def optimizer():
    """An optimizer with a clip, a schedule, weight decay by a pattern, and an average."""
    return adamjax.chain(
        adamjax.clip_by_global_norm(0.5),
        adamjax.adamw(
            adamjax.cosine_decay(0.1, 20), weight_decay=0.1, mask=adamjax.optional("kernel")
        ),
        adamjax.weight_ema(0.9),
    )


def expected():
    """The parameters and the state of `optimizer` after the plain loop."""
    return trained(optimizer())


# --- optax ----------------------------------------------------------------------------------------

MASK = {"hidden": {"bias": False, "kernel": True}, "out": {"kernel": True}}
LABELS = {"hidden": {"bias": "bias", "kernel": "kernel"}, "out": {"kernel": "kernel"}}


# By name: an optimizer of our and optax' transforms, and the same optimizer of ours alone.
MIXED = {
    "optax.chain": (
        lambda: optax.chain(
            optax.clip_by_global_norm(0.5),
            adamjax.scale_by_amsgrad(),
            optax.add_decayed_weights(0.1),
            adamjax.scale_by_learning_rate(0.1),
            adamjax.weight_ema(0.9),
        ),
        lambda: adamjax.chain(
            adamjax.clip_by_global_norm(0.5),
            adamjax.scale_by_amsgrad(),
            adamjax.add_decayed_weights(0.1),
            adamjax.scale_by_learning_rate(0.1),
            adamjax.weight_ema(0.9),
        ),
    ),
    "chain": (
        lambda: adamjax.chain(
            optax.clip_by_global_norm(0.5),
            adamjax.scale_by_adamax(),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(optax.linear_schedule(0.1, 0.05, 4)),
            adamjax.weight_ema(0.9),
        ),
        lambda: adamjax.chain(
            adamjax.clip_by_global_norm(0.5),
            adamjax.scale_by_adamax(),
            adamjax.add_decayed_weights(0.1),
            adamjax.scale_by_learning_rate(adamjax.polynomial_decay(0.1, 4, 0.05)),
            adamjax.weight_ema(0.9),
        ),
    ),
    "optax.multi_transform": (
        lambda: optax.multi_transform(
            {"bias": adamjax.adamax(0.2), "kernel": adamjax.adamw(0.1)}, LABELS
        ),
        lambda: adamjax.partition([("bias", adamjax.adamax(0.2))], default=adamjax.adamw(0.1)),
    ),
    "partition": (
        lambda: adamjax.partition([("bias", optax.sgd(0.2))], default=adamjax.adamw(0.1)),
        lambda: adamjax.partition([("bias", adamjax.scale(-0.2))], default=adamjax.adamw(0.1)),
    ),
    "optax.masked": (
        lambda: optax.chain(adamjax.adam(0.1), optax.masked(adamjax.scale(0.5), MASK)),
        lambda: adamjax.chain(adamjax.adam(0.1), adamjax.masked(adamjax.scale(0.5), "kernel")),
    ),
    "masked": (
        lambda: adamjax.chain(adamjax.adam(0.1), adamjax.masked(optax.scale(0.5), "kernel")),
        lambda: adamjax.chain(adamjax.adam(0.1), adamjax.masked(adamjax.scale(0.5), "kernel")),
    ),
    "optax.MultiSteps": (
        lambda: optax.MultiSteps(adamjax.nadam(0.1), 2),
        lambda: adamjax.accumulate_gradients(adamjax.nadam(0.1), 2),
    ),
    "accumulate_gradients": (
        lambda: adamjax.accumulate_gradients(
            optax.chain(adamjax.scale_by_adam(), optax.scale(-0.1)), 2
        ),
        lambda: adamjax.accumulate_gradients(adamjax.adam(0.1), 2),
    ),
    "optax.apply_if_finite": (
        lambda: optax.apply_if_finite(adamjax.amsgrad(0.1), 3),
        lambda: adamjax.skip_not_finite(adamjax.amsgrad(0.1)),
    ),
    "skip_not_finite": (
        lambda: adamjax.skip_not_finite(optax.chain(adamjax.scale_by_adam(), optax.scale(-0.1))),
        lambda: adamjax.adam(0.1),
    ),
    "optax.inject_hyperparams": (
        lambda: optax.inject_hyperparams(adamjax.adam)(adamjax.cosine_decay(0.1, 20)),
        lambda: adamjax.adam(adamjax.cosine_decay(0.1, 20)),
    ),
    "optax.with_extra_args_support": (
        lambda: optax.with_extra_args_support(adamjax.adam(0.1)),
        lambda: adamjax.adam(0.1),
    ),
    "everything": (
        lambda: optax.apply_if_finite(
            optax.MultiSteps(
                adamjax.skip_not_finite(optax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.9))), 2
            ),
            3,
        ),
        lambda: adamjax.accumulate_gradients(
            adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.9)), 2
        ),
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_transforms_of_both_libraries_together(name):
    mixed, plain = (make() for make in MIXED[name])
    moved, state = trained(mixed, apply=optax.apply_updates)
    wanted, wanted_state = trained(plain)
    tolerance = LOOSER if "inject" in name else ROUNDING
    assert_close(moved, wanted, tolerance)
    assert adamjax.step_count(state) == adamjax.step_count(wanted_state)
    for slot in adamjax.slot_names(wanted_state):
        leaves = jax.tree.leaves(adamjax.get_slot(state, slot))
        wanted_leaves = jax.tree.leaves(adamjax.get_slot(wanted_state, slot))
        assert_close(leaves, wanted_leaves, tolerance)
    if "weight_ema" in repr(plain):
        averages = map(adamjax.averaged_weights, (state, wanted_state))
        assert_close(*averages, tolerance)


@functools.cache
def plain_tables(tx):
    """`TABLES` after a plain loop with dense gradients."""
    step = jax.jit(functools.partial(one_step, tx, loss=lookup_loss))
    carry = (TABLES, tx.init(TABLES))
    for ids in IDS:
        carry = step(*carry, ids)
    return carry[0]


# By name: a wrapper that `exact_rows` is inside of.
AROUND_EXACT_ROWS = {
    "optax.chain": lambda tx: optax.chain(optax.identity(), tx),
    "optax.apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "optax.MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "optax.multi_transform": lambda tx: optax.multi_transform(
        {"t": tx, "w": adamjax.adam(0.1)}, {"table": "t", "w": "w"}
    ),
    "optax.masked": lambda tx: optax.chain(
        optax.masked(tx, {"table": True, "w": False}),
        optax.masked(adamjax.adam(0.1), {"table": False, "w": True}),
    ),
    "skip_not_finite": lambda tx: adamjax.skip_not_finite(optax.chain(tx)),
}


@pytest.mark.parametrize("name", AROUND_EXACT_ROWS)
def test_exact_rows_inside_of_optax_with_dense_gradients(name):
    """The tables move as with `adam`."""
    tx = AROUND_EXACT_ROWS[name](adamjax.exact_rows(adamjax.adam(0.1), "table", history=1024))

    @jax.jit
    def step(params, state, ids):
        # A dense gradient brings all rows up to date.
        updates, state = tx.update(jax.grad(lookup_loss)(params, ids), state, params)
        return optax.apply_updates(params, updates), state

    carry = (TABLES, tx.init(TABLES))
    for ids in IDS:
        carry = step(*carry, ids)
    assert_close(carry[0], plain_tables(adamjax.adam(0.1)), ROUNDING)


def test_row_gradients_and_tickets_go_through_optax_chain():
    """It passes a ticket only to a `GradientTransformationExtraArgs`."""
    plain = adamjax.adamw(0.1, weight_decay=0.1)
    exact = adamjax.exact_rows(plain, "table", history=1024)
    tx = optax.chain(optax.GradientTransformationExtraArgs(*exact))

    @jax.jit
    def step(params, state, ids):
        (_, grads), ticket = exact.value_and_grad(lookup_loss)(params, state[0], ids)
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return optax.apply_updates(params, updates), state

    params, state = TABLES, tx.init(TABLES)
    for ids in IDS:
        params, state = step(params, state, ids)
    params, _ = exact.flush(params, state[0])
    assert_close(params, plain_tables(plain), LOOSER)


def test_exact_rows_refuse_transforms_of_optax():
    with pytest.raises(ValueError, match="cannot be in the chain of a table"):
        adamjax.exact_rows(adamjax.chain(optax.clip(1.0), adamjax.adam()), "table")


# --- flax.nnx -------------------------------------------------------------------------------------


@functools.cache
def nnx_model():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(V, 4, rngs=rngs)
            self.hidden = nnx.Linear(4, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.0, rngs=rngs)
            self.out = nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, ids):
            return self.out(jnp.tanh(self.hidden(self.dropout(self.embed(ids)))))

    return Model


def nnx_loss(model, ids):
    return jnp.mean((model(ids) - 1.0) ** 2)


@functools.cache
def nnx_plain(tx):
    """The model's parameters, as a dict of arrays, and the state after a plain loop."""
    nnx = pytest.importorskip("flax.nnx")
    graph, params, rest = nnx.split(nnx_model()(nnx.Rngs(0)), nnx.Param, ...)

    def loss(arrays, ids):
        return nnx_loss(nnx.merge(graph, nnx.State(arrays), rest), ids)

    step = jax.jit(functools.partial(one_step, tx, loss=loss))
    carry = (nnx.to_pure_dict(params), tx.init(nnx.to_pure_dict(params)))
    for ids in IDS:
        carry = step(*carry, ids)
    return carry


def nnx_trained(tx, gradient=None):
    """The parameters, as a dict of arrays, the `nnx.Optimizer` and the model after its steps."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx_model()(nnx.Rngs(0))
    nnx_optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradient = nnx.grad(nnx_loss) if gradient is None else gradient

    @nnx.jit
    def step(model, nnx_optimizer, ids):
        nnx_optimizer.update(model, gradient(model, ids))

    for ids in IDS:
        step(model, nnx_optimizer, ids)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx_optimizer, model


NNX_OPTIMIZERS = {
    "everything": optimizer,
    "amsgrad in optax.chain": lambda: optax.chain(optax.clip(1.0), adamjax.amsgrad(0.1)),
    "masked": lambda: adamjax.chain(
        adamjax.masked(adamjax.adam(0.1), "kernel"), adamjax.masked(adamjax.scale(0.0), "bias|emb")
    ),
    "partition": lambda: adamjax.partition([("embed/", adamjax.scale(0.0))], default=optimizer()),
    "by_path": lambda: adamjax.adam(adamjax.by_path([("kernel$", 0.1)], default=0.01)),
    "accumulated": lambda: adamjax.accumulate_gradients(adamjax.nadam(0.1), 2),
}


@pytest.mark.parametrize("name", NNX_OPTIMIZERS)
def test_nnx_optimizer(name):
    params, nnx_optimizer, _ = nnx_trained(NNX_OPTIMIZERS[name]())
    wanted, state = nnx_plain(NNX_OPTIMIZERS[name]())
    assert_close(params, wanted, ROUNDING)
    assert nnx_optimizer.step[...] == len(IDS)
    nnx = pytest.importorskip("flax.nnx")
    nnx_state = nnx.as_pure(nnx_optimizer.opt_state)
    assert adamjax.step_count(nnx_state) == adamjax.step_count(state)
    assert adamjax.slot_names(nnx_state) == adamjax.slot_names(state)


NNX_ANCHORED = {
    "masked": lambda: adamjax.chain(
        adamjax.masked(adamjax.adam(0.1), "kernel$"),
        adamjax.masked(adamjax.scale(0.0), "bias|embed"),
    ),
    "partition": lambda: adamjax.partition(
        [("embedding$", adamjax.adamax(0.1))], default=adamjax.adam(0.1)
    ),
}


@pytest.mark.parametrize("name", NNX_ANCHORED)
def test_nnx_optimizer_with_patterns_anchored_at_the_end(name):
    params, _, _ = nnx_trained(NNX_ANCHORED[name]())
    wanted, _ = nnx_plain(NNX_ANCHORED[name]())
    assert_close(params, wanted, ROUNDING)


def test_the_average_of_an_nnx_model_is_put_into_the_model():
    nnx = pytest.importorskip("flax.nnx")
    _, nnx_optimizer, model = nnx_trained(optimizer())
    wanted, state = nnx_plain(optimizer())
    params = nnx.state(model, nnx.Param)
    average = adamjax.averaged_weights(nnx.as_pure(nnx_optimizer.opt_state), nnx.as_pure(params))
    nnx.update(model, average)
    wanted = adamjax.averaged_weights(state)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), wanted, ROUNDING)


@pytest.mark.parametrize("rows", ["dense", "lazy"])
def test_nnx_row_gradients(rows):
    """`adamjax.value_and_grad` of an unchanged model, and Flax' own optimizer."""

    def gradient(model, ids):
        return adamjax.value_and_grad(nnx_loss, "embed")(model, ids)[1]

    tx = adamjax.adam(0.1, rows=rows)
    params, _, _ = nnx_trained(tx, gradient)
    wanted, _ = nnx_plain(tx)
    if rows == "lazy":
        nnx = pytest.importorskip("flax.nnx")
        start = nnx.to_pure_dict(nnx.state(nnx_model()(nnx.Rngs(0)), nnx.Param))
        unread = jnp.array([5, 6, 8, 10])
        assert_same(params["embed"]["embedding"][unread], start["embed"]["embedding"][unread])
        assert not np.array_equal(params["embed"]["embedding"], wanted["embed"]["embedding"])
    else:
        assert_close(params, wanted, ROUNDING)


def test_nnx_exact_rows():
    """A table under exact rows in Flax' own optimizer, with the ticket as an extra argument."""
    nnx = pytest.importorskip("flax.nnx")
    tx = adamjax.exact_rows(adamjax.adam(0.1), "embedding$", history=1024)
    model = nnx_model()(nnx.Rngs(0))
    nnx_optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, nnx_optimizer, ids):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, ids):
            return nnx_loss(nnx.merge(graph, params, rest), ids)

        state = nnx.as_pure(nnx_optimizer.opt_state)
        (_, grads), ticket = tx.value_and_grad(loss)(params, state, ids)
        nnx_optimizer.update(model, grads, ticket=ticket)

    for ids in IDS:
        step(model, nnx_optimizer, ids)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params, state = nnx.as_pure(params), nnx.as_pure(nnx_optimizer.opt_state)

    def predict(params, ids):
        return nnx.merge(graph, params, rest)(ids)

    predicted = adamjax.eval_step(predict, tx)(params, state, ALL_IDS)
    params, _ = tx.flush(params, state)
    assert_close(predicted, predict(params, ALL_IDS), ROUNDING)
    assert_close(nnx.to_pure_dict(params), nnx_plain(adamjax.adam(0.1))[0], LOOSER)


def test_nnx_extra_arguments():
    """`nnx.Optimizer.update` passes them on to the transforms that accept them."""
    contrib = pytest.importorskip("optax.contrib")
    nnx = pytest.importorskip("flax.nnx")
    tx = adamjax.chain(adamjax.adam(0.1), contrib.reduce_on_plateau(factor=0.5, patience=2))
    model = nnx_model()(nnx.Rngs(0))
    nnx_optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, nnx_optimizer, ids):
        nnx_optimizer.update(model, nnx.grad(nnx_loss)(model, ids), value=jnp.array(1.0))

    for ids in IDS:
        step(model, nnx_optimizer, ids)
    assert nnx.as_pure(nnx_optimizer.opt_state)[-1].scale == 0.5


# --- flax.linen -----------------------------------------------------------------------------------


def linen_train_state(tx):
    linen = pytest.importorskip("flax.linen")
    from flax.training.train_state import TrainState

    class Model(linen.Module):
        @linen.compact
        def __call__(self, ids):
            x = linen.Embed(V, 4, name="embed")(ids)
            return linen.Dense(1, name="out")(jnp.tanh(linen.Dense(3, name="hidden")(x)))

    model = Model()
    params = model.init(jax.random.key(0), IDS[0])["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def linen_loss(train_state, params, ids):
    return jnp.mean((train_state.apply_fn({"params": params}, ids) - 1.0) ** 2)


@functools.partial(jax.jit, donate_argnums=0)
def linen_step(train_state, ids):
    return train_state.apply_gradients(
        grads=jax.grad(functools.partial(linen_loss, train_state))(train_state.params, ids)
    )


LINEN_OPTIMIZERS = {
    "everything": optimizer,
    "anchored": lambda: adamjax.partition(
        [("embedding$", adamjax.scale(0.0))], default=optimizer()
    ),
    "optax.MultiSteps": lambda: optax.MultiSteps(optimizer(), 2).gradient_transformation(),
    "rate as an array": lambda: adamjax.adam(jnp.float32(0.1)),
}


@pytest.mark.parametrize("name", LINEN_OPTIMIZERS)
def test_linen_train_state(name):
    tx = LINEN_OPTIMIZERS[name]()
    train_state = linen_train_state(tx)
    params, state = train_state.params, tx.init(train_state.params)
    params = jax.tree.map(jnp.copy, params)
    plain = jax.jit(
        functools.partial(one_step, tx, loss=functools.partial(linen_loss, train_state))
    )
    for ids in IDS:
        params, state = plain(params, state, ids)
    for ids in IDS:
        train_state = linen_step(train_state, ids)
    assert_close((train_state.params, train_state.opt_state), (params, state), ROUNDING)
    assert train_state.step == len(IDS)


@pytest.mark.parametrize("rows", ["dense", "exact"])
def test_linen_train_state_with_row_gradients(rows):
    """It ends with the parameters that dense gradients lead to."""
    inner = adamjax.adamw(0.1, weight_decay=0.1)
    tx = adamjax.exact_rows(inner, "embedding$") if rows == "exact" else inner
    train_state, plain = linen_train_state(tx), linen_train_state(inner)

    @jax.jit
    def step(train_state, ids):
        loss = functools.partial(linen_loss, train_state)
        if rows == "exact":
            (_, grads), ticket = tx.value_and_grad(loss)(
                train_state.params, train_state.opt_state, ids
            )
            updates, opt_state = tx.update(
                grads, train_state.opt_state, train_state.params, ticket=ticket
            )
            params = optax.apply_updates(train_state.params, updates)
            return train_state.replace(
                step=train_state.step + 1, params=params, opt_state=opt_state
            )
        return train_state.apply_gradients(
            grads=adamjax.grad(loss, "embedding$")(train_state.params, ids)
        )

    for ids in IDS:
        train_state, plain = step(train_state, ids), linen_step(plain, ids)

    def predict(params, ids):
        return train_state.apply_fn({"params": params}, ids)

    predicted = adamjax.eval_step(predict, tx)(train_state.params, train_state.opt_state, ALL_IDS)
    params = (
        tx.flush(train_state.params, train_state.opt_state)[0]
        if rows == "exact"
        else train_state.params
    )
    assert_close(predicted, predict(params, ALL_IDS), ROUNDING)
    assert_close(params, plain.params, LOOSER)


def test_frozen_dicts():
    core = pytest.importorskip("flax.core")
    frozen = core.freeze(PARAMS)
    state, step = optimizer().init(frozen), jax.jit(functools.partial(one_step, optimizer()))
    for _ in range(5):
        frozen, state = step(frozen, state)
    assert isinstance(frozen, core.FrozenDict)
    assert_close(core.unfreeze(frozen), expected()[0], ROUNDING)
    assert isinstance(adamjax.get_slot(state, "m"), core.FrozenDict)


# --- equinox --------------------------------------------------------------------------------------


@functools.cache
def eqx_class():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear
        # Leaves that are no arrays.
        activation: Any
        name: str
        steps: int
        # Not a leaf.
        width: int = eqx.field(static=True)

        def __call__(self, index):
            return self.out(self.activation(self.hidden(self.embed(index))))

    return Model


def eqx_model():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    return eqx_class()(
        embed=eqx.nn.Embedding(V, 4, key=keys[0]),
        hidden=eqx.nn.Linear(4, 3, key=keys[1]),
        out=eqx.nn.Linear(3, 1, key=keys[2]),
        activation=jax.nn.tanh,
        name="model",
        steps=7,
        width=4,
    )


def eqx_loss(model, ids):
    return jnp.mean((jax.vmap(model)(ids) - 1.0) ** 2)


@functools.cache
def eqx_plain(tx):
    """The model's arrays after a plain loop."""
    eqx = pytest.importorskip("equinox")
    arrays, rest = eqx.partition(eqx_model(), eqx.is_inexact_array)

    def loss(arrays, ids):
        return eqx_loss(eqx.combine(arrays, rest), ids)

    step, carry = jax.jit(functools.partial(one_step, tx, loss=loss)), (arrays, tx.init(arrays))
    for ids in IDS:
        carry = step(*carry, ids)
    return carry[0]


def test_equinox_with_filtered_arrays():
    eqx = pytest.importorskip("equinox")
    tx = optax.chain(adamjax.clip_by_global_norm(0.5), adamjax.adamw(0.1, mask="weight$"))
    model = eqx_model()
    state = tx.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state, ids):
        _, grads = eqx.filter_value_and_grad(eqx_loss)(model, ids)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    for ids in IDS:
        model, state = step(model, state, ids)
    assert_close(eqx.filter(model, eqx.is_inexact_array), eqx_plain(tx), ROUNDING)
    assert (model.activation, model.name, model.steps) == (jax.nn.tanh, "model", 7)


def test_an_unpickled_equinox_state_in_buckets_does_not_retrace_the_step():
    """The static values of an Equinox module are new objects after unpickling."""
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    arrays, tx = eqx.filter(layer, eqx.is_inexact_array), adamjax.grouped(adamjax.adam(0.1))
    state = tx.init(arrays)
    step, traces = jit_and_traces(tx.update)
    restored = pickle.loads(pickle.dumps(state))
    assert_same(step(arrays, restored, arrays), step(arrays, state, arrays))
    assert len(traces) == 1


def test_init_refuses_a_whole_equinox_model_if_it_needs_slots_for_all_leaves():
    eqx = pytest.importorskip("equinox")
    model = eqx_model()
    for tx in (
        adamjax.adam(0.1),
        adamjax.weight_ema(0.9),
        adamjax.accumulate_gradients(adamjax.scale(-0.1), 2),
        adamjax.grouped(adamjax.adam(0.1)),
        adamjax.exact_rows(adamjax.adam(0.1), "embed/weight$"),
        adamjax.masked(adamjax.adam(0.1), ""),
    ):
        wanted = r"params\['activation'\] is a .*: expected an array.*eqx.filter\(model, eqx.is_ine"
        with pytest.raises(TypeError, match=wanted):
            tx.init(model)
        tx.init(eqx.filter(model, eqx.is_inexact_array))
    # Without slots, or with slots only of arrays.
    _, grads = eqx.filter_value_and_grad(eqx_loss)(model, IDS[0])
    for tx in (
        adamjax.chain(adamjax.clip_by_global_norm(0.5), adamjax.scale(-0.1)),
        adamjax.chain(adamjax.add_decayed_weights(0.1, "weight$"), adamjax.scale(-0.1)),
        adamjax.masked(adamjax.adam(0.1), "weight$|bias$"),
    ):
        updates, _ = tx.update(grads, tx.init(model), model)
        arrays = eqx.filter(model, eqx.is_inexact_array)
        expected, _ = tx.update(grads, tx.init(arrays), arrays)
        assert_same(updates, expected)
        moved = adamjax.apply_updates(model, updates)
        assert_same(eqx.filter(moved, eqx.is_array), eqx.apply_updates(arrays, expected))
        assert moved.activation is model.activation


def test_a_mask_that_is_an_equinox_model():
    """Such a mask is callable, but it is used as a tree."""
    eqx = pytest.importorskip("equinox")
    arrays = eqx.filter(eqx_model(), eqx.is_inexact_array)

    def matrices(tree):
        return jax.tree.map(lambda x: jnp.ndim(x) == 2, tree)

    zeros = jax.tree.map(jnp.zeros_like, arrays)
    expected = adamjax.adamw(0.1, weight_decay=0.5, mask=matrices)
    expected, _ = expected.update(zeros, expected.init(arrays), arrays)
    of_all_leaves = jax.tree.map(lambda x: eqx.is_array(x) and x.ndim == 2, eqx_model())
    for mask in (matrices(arrays), of_all_leaves):
        tx = adamjax.adamw(0.1, weight_decay=0.5, mask=mask)
        assert hash(tx) == hash(copy.deepcopy(tx))
        updates, _ = jax.jit(tx.update)(zeros, tx.init(arrays), arrays)
        assert_close(updates, expected, ROUNDING)


def test_a_mask_that_is_an_nnx_state():
    """`nnx.Optimizer` passes variables to `init` and arrays to `update`: the mask fits both."""
    nnx = pytest.importorskip("flax.nnx")
    state = nnx.state(nnx_model()(nnx.Rngs(0)), nnx.Param)
    matrices = jax.tree.map(lambda x: jnp.ndim(x) == 2, state)
    moved = []
    for mask in (matrices, "kernel$|embedding$"):
        tx = adamjax.adamw(0.1, weight_decay=0.5, mask=mask)
        assert pickle.loads(pickle.dumps(tx)) == tx
        moved.append(nnx_trained(tx)[0])
    assert_same(*moved)


def test_equinox_with_a_transform_as_argument():
    """`filter_jit` traces only arrays, so a rate that is an array can change without a retrace."""
    eqx = pytest.importorskip("equinox")
    traces = []

    @eqx.filter_jit
    def step(tx, model, state, ids):
        traces.append(1)
        grads = eqx.filter_grad(eqx_loss)(model, ids)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    for rate in (0.1, 0.2):
        tx = adamjax.adam(jnp.float32(rate))
        model = eqx_model()
        state = tx.init(eqx.filter(model, eqx.is_array))
        for ids in IDS:
            model, state = step(tx, model, state, ids)
        wanted = eqx_plain(adamjax.adam(rate))
        assert_close(eqx.filter(model, eqx.is_inexact_array), wanted, ROUNDING)
    assert len(traces) == 1


def test_equinox_row_gradients():
    """Those of a loss that combines the parameters with the rest of the model."""
    eqx = pytest.importorskip("equinox")
    tx = adamjax.exact_rows(adamjax.adam(0.1), "embed/weight$")
    params, rest = eqx.partition(eqx_model(), eqx.is_inexact_array)
    state = tx.init(params)

    @eqx.filter_jit
    def step(params, state, ids):
        def loss(params, ids):
            return eqx_loss(eqx.combine(params, rest), ids)

        (_, grads), ticket = tx.value_and_grad(loss)(params, state, ids)
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state

    for ids in IDS:
        params, state = step(params, state, ids)

    def predict(params, ids):
        return jax.vmap(eqx.combine(params, rest))(ids)

    predicted = adamjax.eval_step(predict, tx)(params, state, ALL_IDS)
    params, _ = tx.flush(params, state)
    assert_close(predicted, predict(params, ALL_IDS), ROUNDING)
    assert_close(params, eqx_plain(adamjax.adam(0.1)), LOOSER)


WITHOUT_FILTER = {
    "adam": lambda: adamjax.adam(0.1),
    "adamw": lambda: adamjax.chain(adamjax.clip_by_norm(1.0), adamjax.adamw(0.1)),
    "masked": lambda: adamjax.masked(adamjax.adam(0.1), "."),
}


@pytest.mark.parametrize("name", WITHOUT_FILTER)
def test_equinox_with_the_model_as_parameters(name):
    """`update` accepts a whole model: leaves that are no arrays have no gradient."""
    eqx = pytest.importorskip("equinox")
    tx, model = WITHOUT_FILTER[name](), eqx_model()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, ids):
        updates, state = tx.update(eqx.filter_grad(eqx_loss)(model, ids), state, model)
        return adamjax.apply_updates(model, updates), state

    for ids in IDS:
        model, state = step(model, state, ids)
    assert_close(eqx.filter(model, eqx.is_inexact_array), eqx_plain(tx), ROUNDING)
    assert model.activation is jax.nn.tanh


# --- states in files ------------------------------------------------------------------------------


STATES = {
    "everything": optimizer,
    "nadam": lambda: adamjax.nadam(0.1),
    "adamax, a rate per leaf": lambda: adamjax.adamax(
        adamjax.by_path([("bias", 0.2)], default=0.1)
    ),
    "partition": lambda: adamjax.partition(
        [("kernel", adamjax.amsgrad(0.1))], default=adamjax.skip_not_finite(adamjax.adam(0.1))
    ),
    "accumulated": lambda: adamjax.accumulate_gradients(adamjax.adamw(0.1), 2),
    "optax": lambda: optax.chain(optax.clip(1.0), optax.MultiSteps(adamjax.adam(0.1), 2)),
    "narrow": lambda: adamjax.adam(0.1, m_dtype="bfloat16"),
}


# Functions that save a state in a folder, or in memory, and restore it into a state `like` it.


def pickled(state, like, folder):
    return pickle.loads(pickle.dumps(state))


def flax_bytes(state, like, folder):
    serialization = pytest.importorskip("flax.serialization")
    return serialization.from_bytes(like, serialization.to_bytes(state))


def flax_state_dict(state, like, folder):
    serialization = pytest.importorskip("flax.serialization")
    return serialization.from_state_dict(like, serialization.to_state_dict(state))


def equinox_leaves(state, like, folder):
    eqx = pytest.importorskip("equinox")
    eqx.tree_serialise_leaves(folder / "state.eqx", state)
    return eqx.tree_deserialise_leaves(folder / "state.eqx", like)


def numpy_leaves(state, like, folder):
    leaves, treedef = jax.tree.flatten(jax.device_get(state))
    return jax.tree.unflatten(treedef, leaves)


def orbax_standard(state, like, folder):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "standard", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return checkpointer.restore(folder / "standard", abstract)


def orbax_manager(state, like, folder):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.CheckpointManager(folder / "manager") as manager:
        manager.save(5, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))


ROUND_TRIPS = [
    pickled,
    flax_bytes,
    flax_state_dict,
    equinox_leaves,
    numpy_leaves,
    orbax_standard,
    orbax_manager,
]


@functools.cache
def after_three_steps(name):
    """A transform, its jitted step, and the parameters and the state after three steps."""
    tx = STATES[name]()
    step, carry = jax.jit(functools.partial(one_step, tx)), (PARAMS, tx.init(PARAMS))
    for _ in range(3):
        carry = step(*carry)
    return tx, step, *carry


@pytest.mark.parametrize("round_trip", ROUND_TRIPS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", STATES)
def test_a_restored_state_and_its_next_step_have_the_same_bits(name, round_trip, tmp_path):
    if round_trip is orbax_manager and name != "everything":
        pytest.skip("the manager saves as StandardCheckpointer does")
    if round_trip is equinox_leaves and name == "narrow":
        pytest.skip("Equinox writes files of NumPy, which have no bfloat16")
    tx, step, params, state = after_three_steps(name)
    restored = round_trip(state, tx.init(PARAMS), tmp_path)
    assert_same(restored, state)
    assert_same(step(params, restored), step(params, state))


@functools.cache
def exact_state():
    """`exact_rows`, its step, and parameters and a state in which some rows lag behind."""
    tx = adamjax.exact_rows(adamjax.adamw(0.1, weight_decay=0.1), "table", history=1024)

    @jax.jit
    def step(params, state, ids):
        (_, grads), ticket = tx.value_and_grad(lookup_loss)(params, state, ids)
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state

    params, state = TABLES, tx.init(TABLES)
    for ids in IDS:
        params, state = step(params, state, ids)
    return tx, step, params, state


@pytest.mark.parametrize("round_trip", ROUND_TRIPS, ids=lambda function: function.__name__)
def test_a_restored_state_of_exact_rows_has_the_same_bits(round_trip, tmp_path):
    tx, step, params, state = exact_state()
    restored = round_trip(state, tx.init(TABLES), tmp_path)
    assert_same(restored, state)
    assert_same(step(params, restored, IDS[1]), step(params, state, IDS[1]))


@functools.cache
def accumulated_state():
    """`accumulate_gradients`, its step, and a state that has accumulated row gradients."""
    tx = adamjax.accumulate_gradients(adamjax.adam(0.1), 3, max_rows=[("table", 8)])

    @jax.jit
    def step(state, ids):
        return tx.update(adamjax.grad(lookup_loss, "table")(TABLES, ids), state, TABLES)

    state = tx.init(TABLES)
    for ids in IDS[:2]:
        _, state = step(state, ids)
    return tx, step, state


FLAX_FAILS = pytest.mark.xfail(strict=True, reason="Flax does not know RowGradient")


@pytest.mark.parametrize(
    "round_trip",
    [pytest.param(f, marks=FLAX_FAILS) if f is flax_bytes else f for f in ROUND_TRIPS],
    ids=lambda function: function.__name__,
)
def test_a_restored_state_of_accumulated_rows_has_the_same_bits(round_trip, tmp_path):
    tx, step, state = accumulated_state()
    restored = round_trip(state, tx.init(TABLES), tmp_path)
    assert_same(restored, state)
    assert_same(step(restored, IDS[2]), step(state, IDS[2]))


def test_flax_refuses_a_state_with_another_leaf_or_of_another_optimizer():
    serialization = pytest.importorskip("flax.serialization")
    saved = serialization.to_state_dict(adamjax.adam(0.1).init({"w": jnp.ones(2)}))
    grown = adamjax.adam(0.1).init({"w": jnp.ones(2), "new": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"'new'.*not present in state dict at path ./0/m"):
        serialization.from_state_dict(grown, saved)
    with pytest.raises(ValueError, match=r"field names.*do not match"):
        serialization.from_state_dict(adamjax.adamax(0.1).init({"w": jnp.ones(2)}), saved)


@pytest.mark.parametrize("rate", [0.1, adamjax.by_path({"items": 0.1, "brands": 0.2}, default=0.3)])
def test_flax_refuses_a_state_of_exact_rows_for_other_tables(rate):
    """Also if it is for more tables: Flax drops keys that the target lacks."""
    serialization = pytest.importorskip("flax.serialization")
    params = {name: jnp.ones((9, 2)) for name in ("users", "items", "brands")}
    names = [["users"], ["items"], ["users", "items"], ["users", "items", "brands"]]
    states = [adamjax.exact_rows(adamjax.adam(rate), x).init(params) for x in names]
    saved = [serialization.to_bytes(state) for state in states]
    for i, target in enumerate(states):
        for j, data in enumerate(saved):
            if i == j:
                assert_same(serialization.from_bytes(target, data), target)
            else:
                with pytest.raises(ValueError, match="target dict keys and state dict keys"):
                    serialization.from_bytes(target, data)


def test_orbax_refuses_a_state_with_another_leaf_or_of_another_optimizer(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    small, grown = {"w": jnp.ones(2)}, {"w": jnp.ones(2), "new": jnp.ones(3)}
    tx = optimizer()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", tx.init(small))
        checkpointer.wait_until_finished()
        for target, message in (
            (jax.eval_shape(tx.init, grown), r"'m', 'new'.*not found"),
            (jax.eval_shape(adamjax.amsgrad(0.1).init, small), "not found"),
        ):
            with pytest.raises(ValueError, match=message):
                checkpointer.restore(tmp_path / "state", target)


@pytest.mark.parametrize(
    "other_shapes", [{"b": (4,), "c": (4,)}, {"a": (5,), "b": (3,)}, {"a": (2, 2), "b": (4,)}]
)
def test_orbax_refuses_buckets_of_other_leaves(other_shapes, tmp_path):
    """The bucket has the same size, but leaves have other names or shapes or swapped sizes."""
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = adamjax.grouped(adamjax.adam(0.1))
    has_swapped = other_shapes == {"a": (5,), "b": (3,)}
    shapes = {"a": (3,), "b": (5,)} if has_swapped else {"a": (4,), "b": (4,)}
    params, other = ({k: jnp.ones(v) for k, v in x.items()} for x in (shapes, other_shapes))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", tx.init(params))
        checkpointer.wait_until_finished()
        checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
        with pytest.raises(ValueError, match=r"bucket 0 of 2 leaves.*not found"):
            checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, other))


def test_a_step_refuses_a_state_that_does_not_fit():
    """For example from a checkpoint that was restored without comparing shapes."""
    tx = adamjax.adam(0.1)
    state = tx.init(PARAMS)
    grown = {**PARAMS, "new": jnp.ones(3)}
    message = r"has a leaf 'new' that the state does not have.*init makes a state with it"
    with pytest.raises(ValueError, match=message):
        tx.update(grown, state, grown)
    wider = {**PARAMS, "out": {"kernel": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"'out/kernel'.*expected shape"):
        tx.update(wider, state, wider)
    # Without a target, Orbax restores lists and dicts.
    plain = [{"count": state[0].count, "m": state[0].m, "v": state[0].v}, {"count": 0}]
    with pytest.raises(TypeError, match="the state is a list, expected"):
        tx.update(PARAMS, plain, PARAMS)


# --- JAX' transformations -------------------------------------------------------------------------


def test_steps_in_a_scan():
    tx = optimizer()

    def body(carry, _):
        return one_step(tx, *carry), None

    carry, _ = jax.jit(lambda c: jax.lax.scan(body, c, length=5))((PARAMS, tx.init(PARAMS)))
    assert_close(carry, expected(), ROUNDING)


def test_fori_and_while_loops():
    """A solver with the methods of jaxopt's, which loops until the gradient is small."""

    class OptStep(NamedTuple):
        params: Any
        state: Any

    class SolverState(NamedTuple):
        iter_num: Any
        error: Any
        inner: Any

    class Solver:
        def __init__(self, tx, tol):
            self.tx, self.tol = tx, tol

        def init_state(self, params):
            return SolverState(jnp.array(0), jnp.array(jnp.inf), self.tx.init(params))

        def update(self, params, state):
            grads = jax.grad(loss_fn)(params)
            updates, inner = self.tx.update(grads, state.inner, params)
            error = adamjax.global_norm(grads)
            params = adamjax.apply_updates(params, updates)
            return OptStep(params, SolverState(state.iter_num + 1, error, inner))

        def run(self, params):
            def unfinished(step):
                return (step.state.error > self.tol) & (step.state.iter_num < 500)

            start = OptStep(params, self.init_state(params))
            return jax.lax.while_loop(unfinished, lambda step: self.update(*step), start)

    solver = Solver(adamjax.adam(0.05), 0.02)
    end = jax.jit(solver.run)(PARAMS)
    steps = int(end.state.iter_num)
    assert 20 < steps < 500
    assert end.state.error <= 0.02
    assert adamjax.step_count(end.state) == steps
    assert_close(end.params, trained(adamjax.adam(0.05), steps=steps)[0], 1e-4)

    tx = optimizer()
    looped = jax.jit(lambda c: jax.lax.fori_loop(0, 5, lambda _, c: one_step(tx, *c), c))
    assert_close(looped((PARAMS, tx.init(PARAMS))), expected(), ROUNDING)


def test_rematerialization():
    """`jax.checkpoint` of a loss within a step, and of steps that are differentiated."""
    tx = optimizer()
    remat = functools.partial(one_step, tx, loss=jax.checkpoint(loss_fn))
    carry = (PARAMS, tx.init(PARAMS))
    for _ in range(5):
        carry = jax.jit(remat)(*carry)
    assert_close(carry, expected(), ROUNDING)

    def loss_after_steps(rate, wrap):
        tx = adamjax.adamw(rate)

        def body(carry, _):
            return one_step(tx, *carry), None

        (params, _), _ = jax.lax.scan(wrap(body), (PARAMS, tx.init(PARAMS)), length=4)
        return loss_fn(params)

    rate = jnp.array(0.05)
    plain, rematerialized = (
        jax.jit(jax.value_and_grad(functools.partial(loss_after_steps, wrap=wrap)))
        for wrap in (lambda f: f, jax.checkpoint)
    )
    assert_close(rematerialized(rate), plain(rate), 1e-5)
    h = 1e-3
    slope = (plain(rate + h)[0] - plain(rate - h)[0]) / (2 * h)
    np.testing.assert_allclose(plain(rate)[1], slope, rtol=2e-2)


CHECKED = {
    "everything": optimizer,
    "adamax": lambda: adamjax.adamax(0.1),
    "accumulated": lambda: adamjax.accumulate_gradients(adamjax.nadam(0.1), 2),
}


@pytest.mark.parametrize("name", CHECKED)
def test_checkify(name):
    """A step passes all of JAX' checks, also with gradients of zero. A NaN is reported."""
    tx = CHECKED[name]()

    def step(params, state, scale):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        checkify.check(jnp.isfinite(loss), "the loss is {loss}", loss=loss)
        grads = jax.tree.map(lambda g: scale * g, grads)
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    checked = jax.jit(checkify.checkify(step, errors=checkify.all_checks))
    carry = (PARAMS, tx.init(PARAMS))
    for _ in range(5):
        error, carry = checked(*carry, 1.0)
        error.throw()
    assert_close(carry, trained(tx), ROUNDING)
    error, _ = checked(PARAMS, tx.init(PARAMS), 0.0)
    error.throw()
    error, _ = checked(PARAMS, tx.init(PARAMS), jnp.nan)
    assert "nan" in error.get()


def test_checkify_with_rows():
    """Without index checks.

    They would report the unused places of a row gradient, whose index is beyond the table's end.
    """
    tx = adamjax.adam(0.1)

    def step(params, state, ids):
        grads = adamjax.grad(lookup_loss, "table", strict=True)(params, ids)
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    checked = jax.jit(checkify.checkify(step, errors=checkify.float_checks))
    carry = (TABLES, tx.init(TABLES))
    for ids in IDS:
        error, carry = checked(*carry, ids)
        error.throw()
    assert_close(carry[0], plain_tables(tx), ROUNDING)


def test_many_optimizers_at_once():
    """`vmap` over rates and decays: each pair has its own scan and its own state."""
    rates, decays = jnp.array([0.01, 0.1, 0.3]), jnp.array([0.0, 0.1, 0.01])

    def run(tx):
        def body(carry, _):
            return one_step(tx, *carry), None

        return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), length=5)[0][0]

    def make(rate, decay):
        return adamjax.adamw(rate, weight_decay=decay)

    many = jax.jit(jax.vmap(run))(jax.vmap(make)(rates, decays))
    for i in (0, 2):
        alone, _ = trained(make(float(rates[i]), float(decays[i])))
        assert_close(jax.tree.map(operator.itemgetter(i), many), alone, LOOSER)


def test_donated_parameters_and_state_are_freed():
    tx = optax.chain(optax.clip_by_global_norm(0.5), optimizer())
    step = jax.jit(functools.partial(one_step, tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for _ in range(5):
        before = params, state
        params, state = step(params, state)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert_close(params, trained(tx)[0], ROUNDING)


def test_a_transform_is_a_static_or_a_traced_argument_of_jit():
    tx = optimizer()
    for static, tolerance in (((0,), ROUNDING), ((), LOOSER)):
        traces = []

        def counted(tx, params, state, traces=traces):
            traces.append(1)
            return one_step(tx, params, state)

        step, carry = jax.jit(counted, static_argnums=static), (PARAMS, tx.init(PARAMS))
        for _ in range(5):
            carry = step(optimizer(), *carry)  # equal to `tx`, but a new object
        assert len(traces) == 1
        assert_close(carry, expected(), tolerance)


def test_a_step_is_compiled_ahead_of_time():
    tx = optimizer()
    shapes = jax.eval_shape(lambda p: (p, tx.init(p)), PARAMS)
    compiled = jax.jit(functools.partial(one_step, tx)).lower(*shapes).compile()
    carry = (PARAMS, tx.init(PARAMS))
    for _ in range(5):
        carry = compiled(*carry)
    assert_close(carry, expected(), ROUNDING)


@pytest.mark.parametrize("rows", [False, True])
def test_a_step_is_exported_for_three_platforms_and_called_on_this_one(rows):
    if rows:
        tx, step, params, state = exact_state()
        args = (IDS[0],)
    else:
        tx, args = optimizer(), ()
        step, params, state = (
            jax.jit(functools.partial(one_step, tx)),
            PARAMS,
            tx.init(PARAMS),
        )
    exported = export.export(step, platforms=("cpu", "cuda", "tpu"))(params, state, *args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert_close(exported.call(params, state, *args), step(params, state, *args), ROUNDING)


# --- several devices ------------------------------------------------------------------------------

DEVICES = 8
OPTIMIZERS = {
    "amsgrad": lambda: adamjax.amsgrad(0.1),
    "averaged": lambda: adamjax.chain(
        adamjax.scale_by_adam(nesterov=True),
        adamjax.add_decayed_weights(0.1),
        adamjax.scale_by_learning_rate(0.1),
        adamjax.weight_ema(0.9),
    ),
}


def run_with_devices(*functions):
    """Runs functions of this module in a new process that has several devices."""
    calls = "; ".join(f"test_integration.{function.__name__}()" for function in functions)
    run_on_devices(DEVICES, f"import test_integration; {calls}")


def replicas():
    """Replicas with a share of the batch each take the steps of one device with the whole batch."""
    assert jax.device_count() == DEVICES
    share = 1 / DEVICES
    ours = adamjax.chain(adamjax.sum_over("batch"), adamjax.scale(share), optimizer())
    theirs = optax.chain(adamjax.sum_over("batch"), optax.scale(share), optimizer())

    x, y = X.reshape(DEVICES, 2, 4), Y.reshape(DEVICES, 2)
    copies = jax.tree.map(lambda a: jnp.broadcast_to(a, (DEVICES, *a.shape)), PARAMS)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("batch")
    params, state = copies, jax.pmap(ours.init)(copies)
    pmapped = jax.pmap(functools.partial(one_step, ours), axis_name="batch")
    for _ in range(5):
        params, state = pmapped(params, state, x, y)
    for i in range(DEVICES):
        assert_close(jax.tree.map(operator.itemgetter(i), params), expected()[0], ROUNDING)

    specs = {"in_specs": (whole, whole, split, split), "out_specs": (whole, whole)}
    step = functools.partial(one_step, theirs)
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))
    params, state = PARAMS, theirs.init(PARAMS)
    for _ in range(5):
        params, state = sharded(params, state, X, Y)
    assert_close(params, expected()[0], ROUNDING)
    assert adamjax.step_count(state) == 5


def shardings():
    """States get the shardings of their parameters.

    On a mesh with automatic axes by optax' `tree_map_params`, with explicit axes by themselves.
    """
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((DEVICES,), ("x",))
    specs = {"w": P(None, "x"), "b": P("x")}
    param_shardings = {name: jax.sharding.NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put({"w": jnp.ones((2, 8)), "b": jnp.ones(8)}, param_shardings)
    replicated = jax.sharding.NamedSharding(mesh, P())
    for make in OPTIMIZERS.values():
        tx = make()
        state = tx.init(jax.device_get(params))
        state_shardings = optax.tree_utils.tree_map_params(
            tx,
            lambda _, sharding: sharding,
            state,
            param_shardings,
            transform_non_params=lambda _: replicated,
        )
        state = jax.device_put(state, state_shardings)
        step = jax.jit(tx.update)
        updates, after = step(params, state, params)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
        whole = jax.device_get(params)
        alone = jax.jit(tx.update)(whole, tx.init(whole), whole)
        assert_close(jax.device_get((updates, after)), jax.device_get(alone), ROUNDING)

    explicit = jax.make_mesh((DEVICES,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        p = jnp.zeros((2, 8, 4), jnp.float16, out_sharding=P(None, "x"))
        for make in OPTIMIZERS.values():
            tx = make()
            types = [
                jax.tree.map(jax.typeof, state)
                for state in (
                    tx.init(p),
                    jax.jit(tx.init)(p),
                    tx.update(p, tx.init(p), p)[1],
                    jax.jit(tx.update)(p, tx.init(p), p)[1],
                )
            ]
            assert all(x == types[0] for x in types), types


def test_replicas_and_shardings():
    run_with_devices(replicas, shardings)


def continue_on_other_devices():
    """A run on one device continues on eight and then on two, each time from a checkpoint.

    It is compared with a run on one device. With `exact_rows`, it ends on eight devices.
    """
    import orbax.checkpoint as ocp

    P = jax.sharding.PartitionSpec
    params = {"table": jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32), "w": jnp.ones(4)}
    exact = adamjax.exact_rows(adamjax.adam(0.1), "table", history=1024)
    for tx in (optimizer(), exact):

        def fresh(params, tx=tx):
            return params, tx.init(params)

        def step(params, state, ids, tx=tx):
            grads = adamjax.grad(lookup_loss, "table")(params, ids)
            updates, state = tx.update(grads, state, params)
            return adamjax.apply_updates(params, updates), state

        step = jax.jit(step)
        device_counts = (1, DEVICES) if tx is exact else (1, DEVICES, 2)
        plain = (params, tx.init(params))
        for ids in [*IDS] * len(device_counts):
            plain = step(*plain, ids)

        run = (params, tx.init(params))
        with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
            for number, count in enumerate(device_counts):
                mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("rows",))

                def sharded_shape(x, mesh=mesh):
                    has_rows = x.ndim == 2 or x.shape == (16,)
                    spec = P("rows") if has_rows else P()
                    sharding = jax.sharding.NamedSharding(mesh, spec)
                    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

                if number:
                    target = jax.tree.map(sharded_shape, jax.eval_shape(fresh, params))
                    run = checkpointer.restore(f"{folder}/{number - 1}", target)
                    tables = [x for x in jax.tree.leaves(run) if x.shape == (16, 4)]
                    assert len(tables) >= 3
                    assert all(len(x.sharding.device_set) == count for x in tables)
                    run = jax.device_put(run, jax.tree.map(lambda x: x.sharding, target))
                for ids in IDS:
                    run = step(*run, ids)
                checkpointer.save(f"{folder}/{number}", run)
                checkpointer.wait_until_finished()

            assert_close(jax.device_get(run), jax.device_get(plain), LOOSER)
            # The target has more rows than the checkpoint.
            grown = {**params, "table": jnp.ones((20, 4))}
            target = jax.eval_shape(fresh, grown)
            # Orbax names the first array that does not fit: the table, or an array of its state.
            with pytest.raises(ValueError, match=r"\(20,.*\) is not compatible.*\(16,.*\)"):
                checkpointer.restore(f"{folder}/0", target)


def test_a_run_continues_on_other_devices():
    pytest.importorskip("orbax.checkpoint")
    run_with_devices(continue_on_other_devices)


def test_all_packages_are_installed():
    """So that no test above is skipped unnoticed."""
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 9):
        pytest.skip("with an older JAX, tests run without them")
    for name in ("flax", "equinox", "orbax.checkpoint", "optax.contrib"):
        importlib.import_module(name)


def test_a_state_is_moved_to_another_format_as_in_the_docs():
    """See docs/checkpoints.md."""
    params = {"w": jnp.ones((4, 2), jnp.bfloat16)}
    adam = adamjax.adam(1e-3)
    _, state = adam.update(params, adam.init(params), params)

    narrow = adamjax.adam(1e-3, m_dtype="bfloat16", v_dtype="bfloat16")
    shapes = jax.eval_shape(narrow.init, params)
    new = jax.tree.map(lambda x, new: x.astype(new.dtype), state, shapes)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(lambda x: x.dtype, shapes)
    _, new = narrow.update(params, new, params)
    assert adamjax.step_count(new) == 2

    masters = adamjax.master_weights(adam)
    with pytest.raises(TypeError, match="expected the MasterWeightsState"):
        adamjax.train_step(lambda p: jnp.sum(p["w"]), masters)(params, state)
    new = masters.init(params)._replace(inner=state)
    _, new = masters.update(params, new, params)
    assert_close(adamjax.float32_weights(new, params), {"w": jnp.full((4, 2), 0.999)}, 1e-6)

    mesh = jax.sharding.Mesh(jax.devices(), "data")
    split = adamjax.shard_state(adam, mesh, "data")
    shardings = adamjax.state_shardings(split, params, mesh)
    new = jax.device_put(adamjax.states.ShardedState(state), shardings)
    _, new = jax.jit(split.update)(params, new, params)
    assert adamjax.step_count(new) == 2
    with pytest.raises(TypeError, match=r"ShardedState, expected.*continue with state\.inner"):
        adam.update(params, new, params)
