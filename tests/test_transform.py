"""`chain`, extra arguments, optax inside and around, `apply_updates`, and refused states."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from support import assert_close, assert_same, avals, float0

import adamjax
from adamjax import (
    Transform,
    accumulate_gradients,
    adam,
    apply_updates,
    chain,
    clip_by_global_norm,
    identity,
    masked,
    partition,
    scale,
    scale_by_adam,
    scale_by_learning_rate,
    skip_not_finite,
    weight_ema,
)

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
GRADS = {"w": jnp.array([0.1, 0.2]), "b": jnp.array(-0.3)}


def run(tx, steps=3, params=PARAMS, grads=GRADS, **extra_args):
    """The parameters and the state after some steps with growing gradients."""

    @jax.jit
    def step(t, params, state):
        scaled = jax.tree.map(lambda g: g * (1 + t), grads)
        updates, state = tx.update(scaled, state, params, **extra_args)
        return apply_updates(params, updates), state

    state = tx.init(params)
    for t in range(steps):
        params, state = step(t, params, state)
    return params, state


# --- chain --------------------------------------------------------------------------------------


def test_chains_in_chains_are_joined():
    inner = chain(chain(scale(2.0)), chain(), scale(3.0))
    tx = chain(inner, chain(scale(5.0)))
    assert tx == chain(scale(2.0), scale(3.0), scale(5.0))
    assert tx.transforms == (scale(2.0), scale(3.0), scale(5.0))
    assert len(tx.init(PARAMS)) == 3
    assert_close(tx.update(GRADS, tx.init(PARAMS))[0], jax.tree.map(lambda g: 30 * g, GRADS))


def test_an_empty_chain_and_identity_change_nothing():
    for tx in (chain(), identity(), chain(identity(), chain())):
        updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        assert_same(updates, GRADS)
        assert not jax.tree.leaves(state)
    assert identity().init(PARAMS) == ()


def test_the_state_is_the_tuple_of_the_parts_states():
    tx = chain(clip_by_global_norm(1.0), adam(0.1))
    empty, rule, rate = tx.init(PARAMS)
    assert empty == ()
    assert isinstance(rule, adamjax.states.ScaleByAdamState)
    assert isinstance(rate, adamjax.states.ScheduleState)


def test_a_chain_applies_its_parts_in_order():
    """The rule itself applies the factor of the scaling right after it."""
    parts = [scale(0.5), scale_by_adam(), scale_by_learning_rate(0.1), scale(2.0), scale(0.5)]
    tx = chain(*parts)
    state, states = tx.init(PARAMS), [part.init(PARAMS) for part in parts]
    for _ in range(3):
        updates, state = tx.update(GRADS, state, PARAMS)
        expected = GRADS
        for i, part in enumerate(parts):
            expected, states[i] = part.update(expected, states[i], PARAMS)
        assert_close(updates, expected)
        assert_close(state, tuple(states))


@pytest.mark.parametrize(
    "bad", [None, 3, scale, adam, [scale(1.0), scale(2.0)], (1, 2), "ab", adamjax.constant(0.1)]
)
def test_a_part_that_is_not_a_transform_is_refused(bad):
    makers = (
        lambda: chain(scale(1.0), bad),
        lambda: skip_not_finite(bad),
        lambda: accumulate_gradients(bad, 2),
        lambda: masked(bad, "w"),
        lambda: partition([("w", bad)], default=scale(1.0)),
    )
    for make in makers:
        with pytest.raises(TypeError, match="expected a transform"):
            make()


def test_an_object_with_init_and_update_is_a_transform():
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, 3.0])}
    accumulation = optax.MultiSteps(optax.sgd(0.5), 2)
    tx = chain(scale(2.0), accumulation)
    state = tx.init(params)
    for expected in ([0.0, 0.0], [-1.0, -3.0]):
        updates, state = tx.update(grads, state, params)
        assert_close(updates, {"w": jnp.array(expected)})


WRAPPERS = {
    "plain": lambda tx: tx,
    "chain": chain,
    "skip": skip_not_finite,
    "accumulate": lambda tx: accumulate_gradients(tx, 2),
    "masked": lambda tx: masked(tx, "w"),
    "partition": lambda tx: partition([("w", tx)], default=scale(0.0)),
    "default": lambda tx: partition([("b", scale(0.0))], default=tx),
    "deep": lambda tx: skip_not_finite(chain(scale(1.0), masked(chain(scale(1.0), tx), "w"))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_weight_ema_must_be_last_inside_wrappers_too(wrap):
    for after in (scale(1.0), identity(), optax.identity()):
        with pytest.raises(ValueError, match=r"chain: .*must be last"):
            chain(adam(), wrap(weight_ema()), after)
        with pytest.raises(ValueError, match=r"chain: .*must be last"):
            chain(wrap(chain(adam(), weight_ema())), chain(after))
    with pytest.raises(ValueError, match=r"chain: .*must be last"):
        chain(weight_ema(), wrap(weight_ema()))
    chain(adam(), wrap(weight_ema()))


def test_a_chain_rounds_nothing_between_our_transforms():
    """Rounded to bfloat16 after each part, the product of 1.65 would differ from it."""
    grads = jnp.array([1.0, 3.0, 1e-3, 1.65], jnp.bfloat16)
    tx = chain(scale(1 / 3), scale(1.001), scale(3.0), scale(1 / 1.001))
    assert_same(tx.update(grads, tx.init(grads))[0], grads)
    # Nor does float16 overflow between the parts.
    grads = jnp.array([6e4], jnp.float16)
    assert_same(chain(scale(100.0), scale(0.01)).update(grads, ((), ()))[0], grads)


def test_weight_decay_after_the_rate_is_refused():
    """Weights would grow: `p + (-rate * u + decay * p)`."""
    decay, average = adamjax.add_decayed_weights(0.1), weight_ema(0.9)
    bias_free = adamjax.add_decayed_weights(0.1, mask="w")
    for parts in (
        [adam(0.1), decay],
        [scale_by_adam(), scale_by_learning_rate(0.1), bias_free],
        [adam(0.1), masked(decay, "w")],
        [masked(adam(0.1), "w"), decay],
        [adam(0.1), decay, average],
    ):
        with pytest.raises(ValueError, match=r"chain: .*add_decayed_weights.* is after .* grow"):
            chain(*parts)
    # A later part, here or in another library's chain, may turn it downhill.
    chain(scale_by_adam(), decay)
    chain(decay, adam(0.1), average)
    tx = chain(scale_by_adam(), scale_by_learning_rate(0.5), scale(-1.0), decay, scale(-0.5))
    updates, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1))
    assert_close(updates, jnp.array([-0.05]))


def test_weight_decay_after_a_factor_below_0_is_refused_if_a_rule_is_before_it():
    decay = adamjax.add_decayed_weights(0.1)
    with pytest.raises(ValueError, match=r"chain: .*add_decayed_weights.* is after scale.* grow"):
        chain(scale_by_adam(), scale(-0.1), decay)
    # Negated gradients with weight decay, for a rule that maximizes.
    chain(chain(scale(-1.0), decay), adam(0.1))


def test_two_learning_rates_of_a_leaf_are_refused():
    """Each changes the sign: with two, the leaf moves uphill."""
    rate, params = scale_by_learning_rate(0.1), {"a": jnp.ones(2), "b": jnp.ones(2)}
    for tx in (
        chain(adam(0.1), rate),
        chain(adam(0.1), adamjax.adamw(0.1)),
        chain(masked(adam(0.1), "a"), rate),
        chain(adamjax.partition([("a", adam(0.1))], default=adamjax.set_to_zero()), rate),
        chain(adamjax.grouped(adam(0.1)), rate),
        chain(adamjax.with_hyperparams(adam(0.1), learning_rate=0.1), rate),
        adamjax.accumulate_gradients(chain(adam(0.1), rate), 2),
        adamjax.exact_rows(chain(adam(0.1), rate), "a"),
    ):
        with pytest.raises(ValueError, match=r"chain: 'a' gets 2 learning rates.* give it one"):
            tx.init(params)
    # The rates of different leaves, a factor, a sign that is set on purpose, and other libraries.
    factor = adamjax.with_hyperparams(scale(0.5), factor=0.5)
    for tx in (
        chain(masked(adam(0.1), "a"), masked(adam(0.1), "b")),
        chain(adam(0.1), scale(0.5)),
        chain(adam(0.1), rate, scale(-1.0)),
        chain(adam(0.1), rate, factor),
        chain(optax.adam(0.1), rate),
    ):
        tx.init(params)


@pytest.mark.parametrize(
    "gate", [lambda tx: adamjax.accumulate_gradients(tx, 2), adamjax.skip_not_finite]
)
def test_a_rule_after_a_part_that_skips_calls_is_refused(gate):
    """It would step with zeros in these calls."""
    clip = adamjax.clip_by_value(1.0)
    for parts in ([gate(clip), adam(0.1)], [gate(identity()), clip, masked(adam(0.1), "a")]):
        with pytest.raises(ValueError, match=r"would take a step with them: put the rule inside"):
            chain(*parts)
    chain(gate(chain(clip, scale_by_adam())), scale_by_learning_rate(0.1))
    chain(gate(adam(0.1)), weight_ema(0.9))
    chain(gate(clip), scale(-0.1))
    chain(adamjax.accumulate_gradients(clip, 1), adam(0.1))


# --- extra arguments ----------------------------------------------------------------------------


class scale_by_loss(Transform):
    """Multiplies by an extra argument, `loss`."""

    def init(self, params):
        return ()

    def update(self, grads, state, params=None, *, loss, **extra_args):
        return jax.tree.map(lambda g: loss * g, grads), state


@pytest.mark.slow
def test_extra_arguments_reach_the_parts_that_accept_them():
    parts = (clip_by_global_norm(10.0), scale_by_loss(), optax.scale(1.0), weight_ema(0.5))
    for wrap in WRAPPERS.values():
        tx = wrap(chain(*parts))
        state = tx.init(PARAMS)
        for _ in range(2):
            updates, state = tx.update(GRADS, state, PARAMS, loss=3.0, other="unused")
        np.testing.assert_allclose(updates["w"], 3.0 * GRADS["w"], rtol=1e-6)


def test_extra_arguments_reach_functions_of_optax():
    """Functions that accept any extra argument, one by its name, or none."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = skip_not_finite(chain(scale(-0.1), plateau, optax.scale(1.0)))
    state = tx.init(PARAMS)
    for _ in range(4):
        updates, state = tx.update(GRADS, state, PARAMS, value=1.0, unknown=2.0)
    assert float(state.inner[1].scale) < 1.0
    np.testing.assert_allclose(updates["w"], -0.1 * state.inner[1].scale * GRADS["w"], rtol=1e-6)

    def named(grads, state, params=None, *, value):
        return jax.tree.map(lambda g: value * g, grads), state

    tx = chain((lambda params: (), named), (lambda params: (), lambda g, s, p: (g, s)))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=2.0, unknown=2.0)
    assert_close(updates, jax.tree.map(lambda g: 2 * g, GRADS))


# --- optax --------------------------------------------------------------------------------------

OURS = adam(0.1, eps=1e-8)


@pytest.mark.parametrize(
    "mixed",
    [
        chain(optax.clip_by_global_norm(0.2), OURS),
        chain(clip_by_global_norm(0.2), optax.adam(0.1)),
        optax.chain(optax.clip_by_global_norm(0.2), OURS),
        optax.chain(clip_by_global_norm(0.2), optax.adam(0.1)),
    ],
    ids=["our chain, our rule", "our chain, our clip", "optax, our rule", "optax, our clip"],
)
@pytest.mark.slow
def test_optax_and_ours_mix_both_ways(mixed):
    expected = optax.chain(optax.clip_by_global_norm(0.2), optax.adam(0.1))
    assert_close(run(mixed, 4)[0], run(expected, 4)[0], rtol=1e-5)


@pytest.mark.slow
def test_the_optimizer_of_flax_accepts_our_chain():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    optimizer = nnx.Optimizer(model, chain(OURS, weight_ema(0.5)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, nnx.state(model))
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_state_of_optax_keeps_its_dtype_in_our_wrappers(wrap, dtype):
    """`optax.trace` adopts the dtype of its gradients, so wrappers must not widen these."""
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    tx = chain(scale(1.0), wrap(chain(optax.trace(0.9), scale_by_adam())))
    state = tx.init(params)
    for _ in range(2):
        updates, next_state = tx.update(params, state, params)
        assert avals(next_state) == avals(state)
        assert avals(updates) == avals(params)
        state = next_state


def test_a_pair_of_partial_functions_or_methods_is_a_transform():
    """Partial functions have no name."""
    theirs = optax.scale(2.0)
    of_partials = functools.partial(theirs.init), functools.partial(theirs.update)
    tx = chain(of_partials, OURS)
    assert "partial" in repr(tx)
    assert tx == chain(of_partials, OURS)
    assert hash(tx) == hash(chain(of_partials, OURS))
    tx = chain(of_partials)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_close(updates, jax.tree.map(lambda g: 2 * g, GRADS))
    of_methods = tuple(OURS)
    updates, _ = chain(of_methods).update(GRADS, (OURS.init(PARAMS),))
    assert_same(updates, OURS.update(GRADS, OURS.init(PARAMS))[0])


# --- apply_updates ------------------------------------------------------------------------------


def test_apply_updates_keeps_the_parameters_dtype():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        for u_dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            moved = apply_updates(jnp.ones(2, dtype), jnp.ones(2, u_dtype))
            assert_same(moved, jnp.full(2, 2.0, dtype))
    assert_same(apply_updates(jnp.array([1j]), jnp.array([1 + 0j])), jnp.array([1 + 1j]))


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("u_dtype", [None, np.float32])
def test_apply_updates_rounds_once(jit, dtype, u_dtype):
    """Also where the update is wider than the parameter."""
    rng = np.random.default_rng(0)
    p = rng.normal(size=1000).astype(dtype)
    u = (0.01 * rng.normal(size=1000)).astype(u_dtype or dtype)
    expected = (p.astype(np.float32) + u.astype(np.float32)).astype(dtype)
    assert_same(jit(apply_updates)(jnp.asarray(p), jnp.asarray(u)), jnp.asarray(expected))


def test_apply_updates_leaves_alone_leaves_without_an_update():
    key = jax.random.key(0)
    params = {"w": jnp.ones(2), "n": jnp.arange(2), "flag": True, "none": None, "key": key}
    updates = {"w": None, "n": float0((2,)), "flag": None, "none": None, "key": None}
    moved = apply_updates(params, updates)
    assert {name: moved[name] is params[name] for name in params} == dict.fromkeys(params, True)
    zeros = {**updates, "n": jnp.zeros(2, jnp.int32), "flag": jnp.array(False)}
    assert apply_updates(params, zeros)["n"] is params["n"]


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"w": jnp.ones(()), "b": 1.0}, r"updates\['w'\] is float32\[\].*expected shape \(2,\)"),
        ({"w": jnp.ones((2, 1)), "b": 1.0}, r"updates\['w'\].*got \(2, 1\)"),
        ({"w": jnp.ones(2, complex), "b": 1.0}, r"updates\['w'\].*real dtype, got a complex"),
        ({"w": jnp.ones(2, int), "b": 1.0}, r"updates\['w'\].*floating"),
        ({"w": jnp.ones(2)}, "updates has no leaf 'b'"),
        ({"w": jnp.ones(2), "b": 1.0, "c": 1.0}, "updates has a leaf 'c'"),
        ([jnp.ones(2), jnp.ones(())], "updates has no leaf 'b'"),
    ],
)
def test_apply_updates_refuses_another_tree(updates, message):
    with pytest.raises(ValueError, match="apply_updates: " + message):
        apply_updates(PARAMS, updates)


# --- arguments ----------------------------------------------------------------------------------


def test_python_scalars_and_numpy_arrays_are_accepted_as_leaves():
    """JAX converts Python floats and float64 arrays to float32."""
    params = {"w": np.ones(2), "b": 1.0, "h": np.ones(2, ml_dtypes.bfloat16)}
    tx = chain(clip_by_global_norm(1.0), adam(0.1), weight_ema(0.5))
    state = tx.init(params)
    updates, next_state = tx.update(params, state, params)
    assert [u.dtype for u in jax.tree.leaves(updates)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    assert avals(next_state) == avals(state)
    assert avals(apply_updates(params, updates)) == avals(params)


def test_an_array_of_several_values_as_a_hyperparameter_is_refused():
    """Broadcasting it would change the shapes of parameters. `vmap` applies several values."""
    values = jnp.array([0.1, 0.2])
    for tx in (
        scale(values),
        scale_by_adam(b1=values),
        scale_by_adam(eps=values),
        adamjax.clip_by_value(values),
        adamjax.clip_by_norm(values),
        adamjax.scale_by_adamax(eps=values),
        weight_ema(values),
        adamjax.add_decayed_weights(values),
    ):
        with pytest.raises(ValueError, match="scalar"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_params_of_another_tree_are_refused():
    for tx in (weight_ema(), adamjax.add_decayed_weights(0.1), masked(scale(1.0), "w")):
        state = tx.init(PARAMS)
        owner = type(tx).__name__
        for wrong, words in (
            ({**PARAMS, "w": jnp.ones(3)}, r"\['w'\].*\(3,\)"),
            ({**PARAMS, "w": jnp.ones(2, complex)}, r"\['w'\].*(complex|real)"),
            ({"w": PARAMS["w"]}, "leaf 'b'"),
        ):
            with pytest.raises(ValueError, match=rf"{owner}: .*{words}"):
                tx.update(GRADS, state, wrong)


def test_parameters_that_are_not_arrays_are_refused():
    for bad in ("name", object(), len):
        with pytest.raises(
            TypeError, match=r"params\['layer/kind'\] is .*expected an array, or None"
        ):
            adam().init({"layer": {"kind": bad, "w": jnp.ones(2)}})


def test_a_transform_that_reads_params_refuses_an_update_without_them():
    for tx, name in (
        (adamjax.adamw(), "add_decayed_weights"),
        (chain(adam(), weight_ema()), "weight_ema"),
        (skip_not_finite(masked(weight_ema(), "w")), "weight_ema"),
    ):
        with pytest.raises(ValueError, match=f"{name} reads the parameters"):
            tx.update(GRADS, tx.init(PARAMS))


def test_a_users_transform_prints_pickles_compares_and_is_a_pytree():
    tx = chain(scale_by_loss(), adam(0.1))
    assert repr(tx).startswith("chain(scale_by_loss(), scale_by_adam(")
    assert pickle.loads(pickle.dumps(tx)) == copy.deepcopy(tx) == tx
    assert jax.tree.structure(tx) == jax.tree.structure(chain(scale_by_loss(), adam(0.2)))
    with pytest.raises(NotImplementedError, match="Transform has no init"):
        Transform().init(PARAMS)
    with pytest.raises(NotImplementedError, match="Transform has no update"):
        Transform().update(GRADS, ())


def test_replace_makes_a_checked_copy():
    assert scale_by_adam().replace(b1=0.5) == scale_by_adam(b1=0.5)
    with pytest.raises(ValueError, match="b1 must be in"):
        scale_by_adam().replace(b1=1.5)
    assert chain(scale(1.0)).replace(transforms=(scale(2.0),)) == chain(scale(2.0))
    with pytest.raises(ValueError, match="must be last"):
        chain(scale(1.0)).replace(transforms=(weight_ema(), scale(2.0)))
    parts = partition([("w", scale(1.0))], default=scale(2.0))
    assert parts.replace(default=None) == partition([("w", scale(1.0))])
    rates = adamjax.by_path([("w", 0.1)], default=0.2)
    assert rates.replace(default=0.3) == adamjax.by_path([("w", 0.1)], default=0.3)


# --- states -------------------------------------------------------------------------------------

STATEFUL = {
    "scale_by_adam": adamjax.scale_by_adam(),
    "scale_by_amsgrad": adamjax.scale_by_amsgrad(),
    "scale_by_adamax": adamjax.scale_by_adamax(),
    "scale_by_learning_rate": adamjax.scale_by_learning_rate(0.1),
    "add_decayed_weights": adamjax.add_decayed_weights(0.1),
    "weight_ema": adamjax.weight_ema(),
    "accumulate_gradients": adamjax.accumulate_gradients(adamjax.adam(), 2),
    "skip_not_finite": adamjax.skip_not_finite(adamjax.adam()),
    "chain": adamjax.adam(),
    "partition": adamjax.partition([], default=adamjax.adam()),
}


@pytest.mark.parametrize(
    "tx",
    [
        adamjax.scale(0.1),
        adamjax.clip_by_value(1.0),
        adamjax.clip_by_norm(1.0),
        adamjax.clip_by_global_norm(1.0),
        adamjax.identity(),
    ],
    ids=lambda tx: type(tx).__name__,
)
def test_a_transform_without_state_refuses_the_state_of_another(tx):
    params = {"w": jnp.ones(3)}
    state = adamjax.scale_by_adam().init(params)
    message = rf"{type(tx).__name__}: the state is a ScaleByAdamState, expected \(\)"
    for transform, its_state in ((tx, state), (adamjax.chain(tx), (state,))):
        with pytest.raises(TypeError, match=message):
            transform.update(params, its_state, params)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("state", [None, {"count": 0}], ids=["None", "dict"])
def test_a_state_of_another_kind_is_refused(name, state):
    with pytest.raises(TypeError, match=rf"{name}: the state is (None|a dict), expected the"):
        STATEFUL[name].update(jnp.ones(2), state, jnp.ones(2))


def test_an_array_in_the_place_of_a_state_is_refused():
    """As if a call of a jitted step left out the state, so that the batch is in its place."""
    with pytest.raises(TypeError, match=r"chain: the state is float32\[2, 3\], expected the tuple"):
        jax.jit(adamjax.adam().update)(jnp.ones(2), jnp.ones((2, 3)))


def test_a_state_of_exact_rows_is_refused_by_the_optimizer_inside_it():
    params = {"t": jnp.ones((70, 1))}
    state = adamjax.exact_rows(adamjax.adam(0.1), "t").init(params)
    for tx in (adamjax.adam(0.1), adamjax.scale_by_adam()):
        with pytest.raises(TypeError, match=r"is an ExactRowsState, expected .*state.inner.*flush"):
            tx.update(params, state, params)


def test_a_state_of_another_chain_is_refused():
    with pytest.raises(
        ValueError, match=r"chain: the state has 2 states for 1 transforms: \(\), \(\) for scale"
    ):
        chain(scale(1.0)).update(GRADS, chain(scale(1.0), scale(1.0)).init(PARAMS))


# Transforms, and a key in the paths of the arrays of their states that the test replaces.
KEYS_OF_ARRAYS = {
    "amsgrad": (adamjax.amsgrad(0.1), "w"),
    "average": (adamjax.weight_ema(0.9), "w"),
    "accumulated": (adamjax.accumulate_gradients(adamjax.scale(-0.1), 2), "w"),
    "exact_rows": (adamjax.exact_rows(adamjax.adam(0.1), "w"), "w"),
    "hyperparameter": (
        adamjax.with_hyperparams(adamjax.scale(0.1), factor=0.1),
        "factor",
    ),
}


@pytest.mark.parametrize("name", KEYS_OF_ARRAYS)
@pytest.mark.parametrize(
    "value",
    [..., np.array(None), np.array("a"), np.ones((8, 2), ">f4"), np.zeros((8, 2), "m8[s]")],
    ids=["ellipsis", "objects", "text", "swapped", "times"],
)
def test_a_leaf_of_a_state_that_jax_cannot_use_is_named(name, value):
    """Partial checkpoints contain `...`, and NumPy saves `None` as an array of objects."""
    tx, key = KEYS_OF_ARRAYS[name]
    params = {"w": jnp.ones((8, 2))}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tx.init(params))
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    replaced = [i for i, name in enumerate(names) if f"[{key!r}]" in name]
    assert replaced
    for i in replaced:
        arrays = [value if j == i else x for j, (_, x) in enumerate(leaves)]
        with pytest.raises(
            (TypeError, ValueError), match=rf"{pattern_of_parts(tx)}: .*{key}.* expected"
        ):
            tx.update(params, treedef.unflatten(arrays), params)


def pattern_of_parts(tx):
    """A pattern that matches the names of the transform and its parts."""
    names = {type(part.tx).__name__ for part in adamjax.structure.walk(tx)}
    return f"({'|'.join(sorted(names))})"


@pytest.mark.parametrize("name", [*STATEFUL, "exact_rows", "with_hyperparams", "master_weights"])
def test_a_state_of_shapes_is_refused(name):
    """As if the target of a restore was passed instead of the restored state."""
    others = {
        "exact_rows": adamjax.exact_rows(adam(0.1), "w"),
        "with_hyperparams": adamjax.with_hyperparams(scale(0.1), factor=0.1),
        "master_weights": adamjax.master_weights(scale(0.1)),
    }
    tx, params = others.get(name) or STATEFUL[name], {"w": jnp.ones((8, 2), jnp.bfloat16)}
    shapes = jax.eval_shape(tx.init, params)
    with pytest.raises(
        TypeError, match=rf"{pattern_of_parts(tx)}: .* is the shape .*pass the restored state"
    ):
        tx.update(params, shapes, params)
    updates, after = jax.eval_shape(tx.update, params, shapes, params)
    assert avals(after) == avals(shapes)
    assert updates["w"].shape == (8, 2)


def test_shapes_in_place_of_a_state_are_refused_wherever_a_state_is_read():
    params = {"w": jnp.ones((8, 2))}
    tx = adamjax.exact_rows(adam(0.1), "w")
    shapes = jax.eval_shape(tx.init, params)
    step = adamjax.train_step(lambda params: jnp.sum(params["w"]), adam(0.1), donate_argnums=())
    for call in (
        lambda: tx.flush(params, shapes),
        lambda: tx.lookup(params, shapes, "w", 0),
        lambda: tx.from_dense(shapes.inner, params),
        lambda: adamjax.grouped(adam(0.1)).join(shapes.inner, params),
        lambda: step(params, shapes.inner),
    ):
        with pytest.raises(TypeError, match=r"is the shape int32\[\], .*pass the restored state"):
            call()
    assert avals(jax.eval_shape(tx.from_dense, shapes.inner, params)) == avals(shapes)
    assert len(tx.bind(shapes, jax.eval_shape(lambda: params)).tables) == 1


def test_python_numbers_in_place_of_arrays_are_refused():
    """A state that went through JSON has only these and lists."""
    params = {"w": jnp.ones(3), "b": jnp.ones((), jnp.bfloat16)}
    in_place_of_b = {
        "m": adamjax.scale_by_adam(),
        "average": weight_ema(),
        "total": accumulate_gradients(scale(1.0), 2),
        "weights": adamjax.master_weights(scale(1.0)),
    }
    for name, tx in in_place_of_b.items():
        state = tx.init(params)
        state = state._replace(**{name: {**getattr(state, name), "b": 1.0}})
        with pytest.raises(
            TypeError, match=rf"the state's {name}\['b'\] is a Python float, expected"
        ):
            tx.update(params, state, params)
    tx = adamjax.scale_by_adam()
    state = tx.init(params)._replace(v={"w": [0.0, 0.0, 0.0], "b": jnp.zeros(())})
    with pytest.raises(TypeError, match=r"the state's v\['w/0'\] is a Python float, .*JSON"):
        tx.update(params, state, params)
    exact = adamjax.exact_rows(adam(0.1), "w")
    inner = exact.init(params).inner
    with pytest.raises(TypeError, match=r"inner\['0/count'\] is a Python int, expected int32\[\]"):
        exact.from_dense((inner[0]._replace(count=0), *inner[1:]), params)
    state = exact.init(params)
    state = state._replace(turns=dict.fromkeys(state.turns, 0))
    with pytest.raises(TypeError, match=r"turns\[.* is a Python int, expected int32\[\]"):
        exact.lookup(params, state, "w", 0)


def test_the_error_for_another_byte_order_says_how_to_convert_the_array():
    params = {"w": jnp.ones(3)}
    swapped, tx = {"w": np.ones(3, ">f4")}, adam(0.1)
    state = tx.init(params)
    for call in (
        lambda: tx.init(swapped),
        lambda: tx.update(swapped, state, params),
        lambda: tx.update(params, (state[0]._replace(m=swapped), *state[1:]), params),
        lambda: apply_updates(params, swapped),
        lambda: tx.update(params, (state[0]._replace(count=np.array(0, ">i4")), *state[1:])),
    ):
        with pytest.raises((TypeError, ValueError), match=r">[fi]4\[3?\].*newbyteorder"):
            call()
    converted = swapped["w"].astype(swapped["w"].dtype.newbyteorder("="))
    assert_same(tx.update({"w": converted}, state)[0], tx.update(params, state)[0])


@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamax", "nadam"])
def test_a_negative_count_makes_nan(name):
    """Bias corrections such as 1 - b1**t would be negative or zero."""
    tx, params = getattr(adamjax, name)(0.1), jnp.ones(2)
    state = tx.init(params)
    for count, is_nan in ((-5, True), (-1, True), (0, False), (2**31 - 1, False)):
        counted = (state[0]._replace(count=jnp.array(count, jnp.int32)), *state[1:])
        assert np.isnan(tx.update(params, counted, params)[0]).all() == is_nan


def read_from_npz(tree, path):
    """The tree after NumPy has written and read it. NumPy has no bfloat16."""
    leaves, treedef = jax.tree.flatten(tree)
    np.savez(path, *map(np.asarray, leaves))
    with np.load(path) as file:
        return treedef.unflatten([file[name] for name in file.files])


def test_bfloat16_that_lost_its_dtype_in_a_file_is_refused(tmp_path):
    p, path = {"w": jnp.ones(3)}, tmp_path / "state.npz"
    tx = adam(0.1, m_dtype="bfloat16")
    _, state = tx.update(p, tx.init(p), p)
    restored = read_from_npz(state, path)
    narrow = read_from_npz({"w": jnp.ones(3, jnp.bfloat16)}, path)
    step = adamjax.train_step(lambda params: jnp.sum(params["w"]), tx)
    theirs = optax.adam(0.1).init(p)[0]._replace(mu=narrow)
    for call, message in [
        (lambda: tx.update(p, restored, p), r"scale_by_adam: the state's m\['w'\]"),
        (lambda: step(p, restored), r"train_step: the state\['0/.*m/w'\]"),
        (lambda: step(narrow, state), r"train_step: params\['w'\]"),
        (lambda: tx.init(narrow), r"init: params\['w'\]"),
        (lambda: apply_updates(narrow, p), r"apply_updates: .*params\['w'\]"),
        (lambda: tx.update(narrow, state, p), r"an array"),
        (lambda: adamjax.master_weights(tx).init(narrow), r"an array"),
        (lambda: adamjax.convert.from_optax(theirs, tx, p, check=False), r"an array"),
    ]:
        with pytest.raises(
            (TypeError, ValueError), match=rf"{message}.* \|V2\[3\].*ml_dtypes.bfloat16"
        ):
            call()
    viewed = jax.tree.map(lambda x: x.view(ml_dtypes.bfloat16) if x.dtype == "V2" else x, restored)
    assert_same(tx.update(p, viewed, p), tx.update(p, state, p))
