"""Reading slots, counts, averages and rates from states, inside wrappers of ours and of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, assert_same

import adamjax
from adamjax import (
    accumulate_gradients,
    adam,
    adamax,
    adamw,
    amsgrad,
    apply_updates,
    averaged_weights,
    by_path,
    chain,
    clip_by_global_norm,
    cosine_decay,
    get_slot,
    learning_rate,
    masked,
    nadam,
    optional,
    partition,
    scale,
    scale_by_adam,
    scale_by_learning_rate,
    skip_not_finite,
    skipped_steps,
    slot_names,
    step_count,
    weight_ema,
)

PARAMS = {
    "enc": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])},
    "head": jnp.array([3.0]),
}
GRADS = jax.tree.map(lambda p: 2 * p, PARAMS)


def run(tx, steps=1):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = apply_updates(params, updates)
    return params, state


def adam_with_average():
    return chain(adam(0.1), weight_ema(0.5))


ONE_LABEL = {"enc": {"kernel": "a", "bias": "a"}, "head": "a"}
# Wrappers in which `adam_with_average` takes the same steps as alone.
WRAPPERS = {
    "chain": chain,
    "skip": skip_not_finite,
    "accumulate": lambda tx: accumulate_gradients(tx, 1),
    "masked": lambda tx: masked(tx, ""),
    "partition": lambda tx: partition([("", tx)]),
    "default": lambda tx: partition([(optional("nothing"), scale(0.0))], default=tx),
    "deep": lambda tx: skip_not_finite(accumulate_gradients(masked(partition([("", tx)]), ""), 1)),
    "optax.chain": optax.chain,
    "optax.MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "optax.multi_transform": lambda tx: optax.multi_transform({"a": tx}, ONE_LABEL),
    "optax.masked": lambda tx: optax.masked(tx, jax.tree.map(lambda _: True, ONE_LABEL)),
    "optax.apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "optax in ours": lambda tx: skip_not_finite(chain(optax.chain(tx))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_state_is_read_through_any_wrapper(wrap):
    _, state = run(wrap(adam_with_average()), 2)
    _, expected = run(adam_with_average(), 2)
    assert slot_names(state) == ("m", "v")
    assert_close(get_slot(state, "m"), expected[0].m)
    assert_close(get_slot(state, "v"), expected[0].v)
    assert_same(step_count(state), jnp.array(2, jnp.int32))
    assert_close(averaged_weights(state), expected[2].average)
    assert_close(averaged_weights(state, PARAMS), expected[2].average)


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "optax" not in name])
def test_the_learning_rate_is_read_through_our_wrappers(name):
    tx = WRAPPERS[name](chain(adam(cosine_decay(0.1, 4)), weight_ema(0.5)))
    state = tx.init(PARAMS)
    for t in range(3):
        rate = learning_rate(tx, state)
        assert float(rate) == pytest.approx(float(cosine_decay(0.1, 4)(t)))
        _, state = tx.update(GRADS, state, PARAMS)


@pytest.mark.slow
def test_slot_names_of_every_rule():
    for tx, names in (
        (adam(), ("m", "v")),
        (adamw(), ("m", "v")),
        (nadam(), ("m", "v")),
        (amsgrad(), ("m", "v", "v_max")),
        (adamax(), ("m", "u")),
        (scale(1.0), ()),
    ):
        _, state = run(tx)
        assert slot_names(state) == names
        for name in names:
            slot = get_slot(state, name)
            assert jax.tree.structure(slot) == jax.tree.structure(PARAMS)
            assert any(np.any(x) for x in jax.tree.leaves(slot))


def test_slots_of_a_partition_are_joined():
    """A part may have all leaves of a subtree, some, or none."""
    tx = partition(
        [
            ("head", chain(adamax(0.1), weight_ema(0.5))),
            ("kernel", chain(amsgrad(0.1), weight_ema(0.9))),
            ("bias", chain(adam(0.1), weight_ema(0.9))),
        ]
    )
    _, state = run(tx)
    assert slot_names(state) == ("m", "u", "v", "v_max")
    m = get_slot(state, "m")
    assert_close(m, jax.tree.map(lambda g: 0.1 * g, GRADS))
    assert get_slot(state, "u") == {"enc": {"kernel": None, "bias": None}, "head": GRADS["head"]}
    v_max = get_slot(state, "v_max")
    assert v_max["enc"]["bias"] is None
    assert v_max["head"] is None
    v = get_slot(state, "v")
    assert v["head"] is None
    assert v["enc"]["bias"].shape == (1,)
    assert jax.tree.structure(averaged_weights(state)) == jax.tree.structure(PARAMS)
    # m does not depend on which part has which leaf.
    permuted = tx.replace(patterns=("kernel", "bias", "head"))
    assert_close(get_slot(run(permuted)[1], "m"), m)


def test_slots_of_optax_multi_transform_are_joined():
    labels = {"enc": {"kernel": "a", "bias": "b"}, "head": "c"}
    parts = {"a": adam(0.1), "b": amsgrad(0.1), "c": adamax(0.1)}
    _, state = run(optax.multi_transform(parts, labels))
    assert_close(get_slot(state, "m"), jax.tree.map(lambda g: 0.1 * g, GRADS))
    assert jax.tree.leaves(get_slot(state, "v_max"))[0].shape == (1,)
    _, state = run(optax.multi_transform(parts, {"enc": "a", "head": "c"}))
    assert_close(get_slot(state, "m"), jax.tree.map(lambda g: 0.1 * g, GRADS))


def test_a_slot_that_a_state_has_twice_is_refused():
    _, state = run(chain(scale_by_adam(), scale_by_adam(0.5)))
    with pytest.raises(ValueError, match="the state has slot 'm' more than once for the same leaf"):
        get_slot(state, "m")
    assert_close(get_slot(state[1], "m"), state[1].m)
    state = run(chain(masked(scale_by_adam(), "enc"), masked(scale_by_adam(), "kernel")))[1]
    with pytest.raises(ValueError, match="more than once"):
        get_slot(state, "v")


def test_the_error_of_a_missing_slot_lists_the_existing_ones():
    with pytest.raises(KeyError, match=r"no slot 'v_max'; it has \['m', 'v'\]"):
        get_slot(adam().init(PARAMS), "v_max")
    with pytest.raises(KeyError, match=r"no slot 'm'; it has \[\]"):
        get_slot(optax.adam(0.1).init(PARAMS), "m")


def test_slots_of_integers_none_empty_trees_and_single_arrays():
    params = {"w": jnp.ones(2), "n": jnp.arange(2), "none": None}
    m = get_slot(adam().init(params), "m")
    assert m["n"] is None
    assert m["none"] is None
    assert jax.tree.leaves(get_slot(adam().init({}), "m")) == []
    one = get_slot(adam().init(jnp.ones(2)), "m")
    assert_same(one, jnp.zeros(2))


@pytest.mark.slow
def test_step_count_does_not_count_calls_that_take_no_step():
    assert int(step_count(run(scale_by_learning_rate(0.1), 3)[1])) == 3
    assert int(step_count(run(weight_ema(), 3)[1])) == 3
    assert int(step_count(run(accumulate_gradients(adam(), 2), 3)[1])) == 1
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    tx = skip_not_finite(adam())
    _, state = tx.update(bad, tx.init(PARAMS))
    assert int(step_count(state)) == 0
    with pytest.raises(ValueError, match="counts steps"):
        step_count(scale(1.0).init(PARAMS))


def test_skipped_steps_of_several_are_added():
    tx = partition(
        [("enc", skip_not_finite(adam())), ("head", masked(skip_not_finite(adam()), "head"))]
    )
    state = tx.init(PARAMS)
    bad = {"enc": GRADS["enc"], "head": jnp.array([jnp.inf])}
    _, state = tx.update(bad, state, PARAMS)
    assert int(skipped_steps(state)) == 1
    _, state = tx.update(jax.tree.map(lambda g: g * jnp.nan, GRADS), state, PARAMS)
    assert int(skipped_steps(state)) == 3
    nested = skip_not_finite(optax.chain(skip_not_finite(adam())))
    assert int(skipped_steps(nested.init(PARAMS))) == 0
    with pytest.raises(ValueError, match="no skip_not_finite"):
        skipped_steps(adam().init(PARAMS))


def test_averaged_weights_without_an_average_are_refused():
    with pytest.raises(ValueError, match="no weight_ema"):
        averaged_weights(adam().init(PARAMS))


def test_an_average_of_other_weights_is_refused():
    _, state = run(chain(adam(0.1), weight_ema(0.9)))
    other = {**PARAMS, "head": jnp.ones(7)}
    with pytest.raises(ValueError, match=r"averaged_weights: the average of 'head' is .*\[7\]"):
        averaged_weights(state, other)


def test_a_subtree_without_an_average_comes_from_params():
    tx = partition({"head": weight_ema(0.5)}, default=scale(1.0))
    found = averaged_weights(tx.init(PARAMS), {**PARAMS, "head": jnp.zeros(1)})
    assert_same(found, PARAMS)


@pytest.mark.parametrize(
    ("params", "shown"),
    [
        ({"enc": PARAMS["enc"], "tail": PARAMS["head"]}, "PyTreeDef"),
        ({"enc": list(PARAMS["enc"].values()), "head": PARAMS["head"]}, "PyTreeDef"),
        ({"enc": PARAMS["enc"], "head": {"w": PARAMS["head"]}}, "PyTreeDef"),
        ({"enc": PARAMS["enc"]["bias"], "head": PARAMS["head"]}, "PyTreeDef"),
        ({**PARAMS, "extra": jnp.ones(2)}, "'extra'"),
    ],
    ids=["name", "list", "deeper", "leaf", "more"],
)
def test_an_average_of_another_tree_is_refused(params, shown):
    message = f"averaged_weights: params has the leaves .*{shown}"
    with pytest.raises(ValueError, match=message):
        averaged_weights(weight_ema(0.5).init(PARAMS), params)


def test_averaged_weights_are_a_copy_that_can_be_donated_with_the_state():
    """A step may donate both the weights and the state."""
    tx = chain(adam(0.1), weight_ema(0.9))
    params = {"w": jnp.ones(3)}
    step = adamjax.train_step(lambda p: jnp.sum(p["w"] ** 2), tx)
    params, state, _ = step(params, tx.init(params))
    step(averaged_weights(state, params), state)


def test_the_learning_rate_from_the_state_of_another_transform_is_refused():
    state = adam(0.1).init(PARAMS)
    with pytest.raises(ValueError, match="the state has 2 states for 3 transforms"):
        learning_rate(adamjax.adamw(0.1), state)
    with pytest.raises(TypeError, match="expected the ScheduleState"):
        learning_rate(chain(scale_by_learning_rate(0.1), adam().transforms[0]), state)


def test_the_learning_rate_is_that_of_the_next_step():
    state = adam(0.25).init(PARAMS)
    assert learning_rate(adam(0.25), state) == 0.25
    assert_same(learning_rate(adam(jnp.float32(0.5)), state), jnp.float32(0.5))
    tx = adam(by_path([("enc", cosine_decay(0.5, 4))], default=0.125))
    _, state = run(tx, 2)
    rates = learning_rate(tx, state)
    assert float(rates.at("enc/kernel")) == pytest.approx(0.25)
    assert rates.at("head") == 0.125
    # It is the rate that the next step uses.
    updates, _ = tx.update(GRADS, state, PARAMS)
    direction, _ = scale_by_adam().update(GRADS, state[0], PARAMS)
    assert_close(updates["enc"], jax.tree.map(lambda u: -0.25 * u, direction["enc"]))


def test_a_transform_with_no_or_several_learning_rates_is_refused():
    two = partition([("enc", adam(0.1))], default=adam(0.2))
    with pytest.raises(ValueError, match="expected one scale_by_learning_rate, there are 2"):
        learning_rate(two, two.init(PARAMS))
    assert learning_rate(two.transforms[0], two.init(PARAMS)[0]) == 0.1
    with pytest.raises(ValueError, match="expected one scale_by_learning_rate, there are 0"):
        learning_rate(scale_by_adam(), scale_by_adam().init(PARAMS))
    with pytest.raises(ValueError, match="there are 0"):
        learning_rate(optax.chain(adam()), optax.chain(adam()).init(PARAMS))
    with pytest.raises(TypeError, match="expected a transform"):
        learning_rate(3, ())


def test_states_are_read_inside_of_jit_too():
    tx = skip_not_finite(chain(clip_by_global_norm(1.0), adam(cosine_decay(0.1, 4)), weight_ema()))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(GRADS, state, params)
        metrics = {
            "rate": learning_rate(tx, state),
            "step": step_count(state),
            "skipped": skipped_steps(state),
            "m": adamjax.global_norm(get_slot(state, "m")),
            "average": averaged_weights(state, params),
        }
        return apply_updates(params, updates), state, metrics

    params, _, metrics = step(PARAMS, tx.init(PARAMS))
    assert (int(metrics["step"]), int(metrics["skipped"])) == (1, 0)
    assert float(metrics["m"]) == pytest.approx(0.1)
    assert float(metrics["rate"]) == pytest.approx(float(cosine_decay(0.1, 4)(1)))
    expected = jax.tree.map(lambda p, new: 0.99 * p + 0.01 * new, PARAMS, params)
    assert_close(metrics["average"], expected)
