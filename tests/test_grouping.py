"""`grouped` takes the steps of the transform inside it, whatever the leaves and gradients."""

import json
import pickle
import textwrap
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, assert_same, avals, float0, jit_and_traces, run_on_devices

import adamjax
from adamjax import (
    accumulate_gradients,
    adam,
    adamax,
    adamw,
    add_decayed_weights,
    amsgrad,
    apply_updates,
    averaged_weights,
    by_path,
    chain,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    cosine_decay,
    exact_rows,
    get_slot,
    grouped,
    learning_rate,
    masked,
    nadam,
    partition,
    row_gradient,
    scale,
    scale_by_adam,
    scale_by_learning_rate,
    skip_not_finite,
    slot_names,
    step_count,
    weight_ema,
    with_hyperparams,
)


def make_params():
    """Three equal layers, a scalar, an empty leaf, a large one, `None`, a table, other dtypes."""
    rng = np.random.default_rng(0)

    def draw(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "block": [{"bias": draw(4), "kernel": draw(2, 3)} for _ in range(3)],
        "empty": jnp.zeros((0, 2)),
        "gain": draw(),
        "half": [draw(3, dtype=jnp.bfloat16), draw(2, 2, dtype=jnp.bfloat16)],
        "large": draw(5, 7),
        "none": None,
        "steps": jnp.array([3, 4]),
        "table": draw(6, 2),
        "wave": [draw(3) + 1j * draw(3), draw() - 1j],
    }


PARAMS = make_params()


def make_grads(t):
    rng = np.random.default_rng(10 + t)

    def draw(p):
        if not jnp.issubdtype(p.dtype, jnp.inexact):
            return float0(p.shape)
        g = jnp.asarray(rng.normal(size=p.shape), p.dtype)
        return (1 + 1j) * g if jnp.iscomplexobj(p) else g

    return jax.tree.map(draw, PARAMS)


def step_of(tx):
    """The function that takes a step of a transform."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state, updates

    return step


def assert_same_if_grouped(tx, gradients, assert_equal=assert_same, params=PARAMS, jit=lambda f: f):
    """Weights, updates and states in steps of `grouped(tx)` equal those of `tx`.

    Returns the grouped transform, the last parameters, its last state and that of `tx`.
    """
    grouped_tx, plain_params = grouped(tx, max_size=16), params
    state, plain_state = grouped_tx.init(params), tx.init(params)
    step, plain_step = jit(step_of(grouped_tx)), jit(step_of(tx))
    form = avals(state)
    for grads in gradients:
        params, state, updates = step(params, state, grads)
        plain_params, plain_state, expected = plain_step(plain_params, plain_state, grads)
        assert avals(state) == form
        assert_equal(updates, expected)
        assert_equal(params, plain_params)
        assert_equal(grouped_tx.split(state), plain_state)
    return grouped_tx, params, state, plain_state


ELEMENTWISE = {
    "adam": adam(0.1),
    "adam, eps": adam(cosine_decay(0.1, 10), 0.8, 0.99, eps=1e-8),
    "nadam": nadam(0.1),
    "amsgrad": amsgrad(0.1),
    "adamax": adamax(0.1),
    "adamw": chain(clip_by_value(0.5), adamw(0.1, weight_decay=0.1), weight_ema(0.9, 2)),
    "no rule": chain(scale(0.5), add_decayed_weights(0.1), scale_by_learning_rate(0.1)),
    "no state": clip_by_value(0.5),
    "skip_not_finite": skip_not_finite(accumulate_gradients(amsgrad(0.1), 2)),
    "hyperparameters": with_hyperparams(adam(0.1), learning_rate=0.2),
}


@pytest.mark.parametrize("tx", ELEMENTWISE.values(), ids=ELEMENTWISE)
@pytest.mark.slow
def test_elementwise_steps_are_the_same_bit_for_bit(tx):
    """Without `jit`, because the compiler may fuse, and so round, the two programs differently."""
    with jax.disable_jit():
        assert_same_if_grouped(tx, [make_grads(t) for t in range(3)])


def test_compiled_steps_are_the_same_up_to_rounding():
    """With a global norm, whose sum is in another order in buckets."""
    tx = chain(clip_by_global_norm(0.5), adamw(0.1, weight_decay=0.1), weight_ema(0.9))
    names = ("block", "gain", "large", "table")
    params, *gradients = (
        {name: tree[name] for name in names} for tree in (PARAMS, *map(make_grads, range(3)))
    )
    assert_same_if_grouped(tx, gradients, assert_close, params, jax.jit)


@pytest.mark.slow
def test_leaves_without_a_gradient_stand_still_whichever_they_are():
    """Neither their weights nor their slots change, though other leaves of the bucket move."""

    def without(t, *absent):
        def without_absent(path, g):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return None if any(a in name for a in absent) else g

        return jax.tree_util.tree_map_with_path(without_absent, make_grads(t))

    # "e" is in the paths of all kernels and of most other leaves.
    absent = [("1/bias",), (), ("0/bias", "gain", "half/0"), ("bias", "kernel", "wave"), ("e",), ()]
    gradients = [without(t, *names) for t, names in enumerate(absent)]
    with jax.disable_jit():
        assert_same_if_grouped(ELEMENTWISE["adamw"], gradients)
        grouped_tx, params, state, _ = assert_same_if_grouped(amsgrad(0.1), gradients)
        moved, after, _ = step_of(grouped_tx)(params, state, without(7, "2/kernel"))
    assert_same(moved["block"][2]["kernel"], params["block"][2]["kernel"])
    for slot in ("m", "v"):
        before, now = (get_slot(s, slot)["block"][2] for s in (state, after))
        assert_same(now["kernel"], before["kernel"])
        assert np.all(now["bias"] != before["bias"])


def dense(tree):
    """The tree with dense arrays in place of row gradients."""

    def is_rows(x):
        return isinstance(x, adamjax.RowGradient)

    return jax.tree.map(lambda x: x.to_dense() if is_rows(x) else x, tree, is_leaf=is_rows)


@pytest.mark.parametrize("rows", ["dense", "lazy"])
@pytest.mark.slow
def test_row_gradients_of_small_tables(rows):
    values = jnp.ones((2, 2))
    gradients = [make_grads(t) for t in range(3)]
    gradients[1]["table"] = row_gradient(jnp.array([1, 4]), values, 6)

    def assert_same_dense(actual, expected):
        assert_same(dense(actual), dense(expected))

    with jax.disable_jit():
        assert_same_if_grouped(adam(0.1, rows=rows), gradients, assert_same_dense)


def test_gradients_of_different_dtypes_in_a_bucket():
    gradients = [make_grads(t) for t in range(2)]
    gradients[1]["gain"] = gradients[1]["gain"].astype(jnp.bfloat16)
    gradients[1]["half"] = [g.astype(jnp.float32) for g in gradients[1]["half"]]
    gradients[1]["block"][0]["bias"] = gradients[1]["block"][0]["bias"].astype(jnp.float16)
    with jax.disable_jit():
        assert_same_if_grouped(adamw(0.1), gradients)


def test_the_state_has_few_arrays():
    """A leaf that is larger than max_size, or the only one of its dtype, is in no bucket."""
    params = {f"layer {i}": {"bias": jnp.ones(3 + i % 2), "gain": jnp.ones(())} for i in range(40)}
    params |= {"large": jnp.ones(17), "half": jnp.ones(2, jnp.float16)}
    state = grouped(scale_by_adam(), max_size=16).init(params)
    # The count, and for each of m and v three buckets and two leaves outside of them.
    assert len(jax.tree.leaves(state)) == 1 + 2 * (3 + 2)
    # The biases of 3 and of 4 elements, the gains, and the two leaves outside of buckets.
    assert sum(x.size for x in jax.tree.leaves(state.m)) == 20 * 3 + 20 * 4 + 40 + 17 + 2
    names = {jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_flatten_with_path(state.m)[0]}
    assert {"['large']", "['half']"} <= names


def test_a_donated_step_is_traced_once():
    tx = grouped(chain(adam(0.1), weight_ema(0.9)))
    step, traces = jit_and_traces(step_of(tx), donate_argnums=(0, 1))
    floats = {"block": PARAMS["block"], "large": PARAMS["large"]}
    for init in (tx.init, jax.jit(tx.init)):
        params = jax.tree.map(jnp.copy, floats)
        state = init(params)
        state = pickle.loads(pickle.dumps(state))  # as if restored from a checkpoint
        for _ in range(2):
            donated = jax.tree.leaves((params, state))
            params, state, _ = step(params, state, floats)
            assert all(x.is_deleted() for x in donated)
    assert len(traces) == 1


def test_init_needs_only_shapes():
    tx = grouped(adam(0.1))
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    expected = avals(tx.init(PARAMS))
    assert avals(tx.init(shapes)) == expected
    assert avals(jax.eval_shape(tx.init, shapes)) == expected


def test_functions_that_read_a_state_return_the_same_as_without_buckets():
    tx = chain(adam(cosine_decay(0.1, 10)), weight_ema(0.9))
    with jax.disable_jit():
        grouped_tx, params, state, plain_state = assert_same_if_grouped(
            tx, [make_grads(t) for t in range(2)]
        )
    assert slot_names(state) == slot_names(plain_state) == ("m", "v")
    for name in ("m", "v"):
        assert_same(get_slot(state, name), get_slot(plain_state, name))
    assert_same(averaged_weights(state), averaged_weights(plain_state))
    assert_same(averaged_weights(state, params), averaged_weights(plain_state, params))
    assert step_count(state) == 2
    assert learning_rate(grouped_tx, state) == learning_rate(tx, plain_state)
    state = partition([("block", grouped_tx)], default=adam(0.1)).init(PARAMS)
    assert_same(get_slot(state, "m"), get_slot(adam(0.1).init(PARAMS), "m"))


def test_join_converts_a_state_without_buckets():
    tx, grads = skip_not_finite(chain(adamw(0.1), weight_ema(0.9))), make_grads(0)
    grouped_tx = grouped(tx, max_size=16)
    with jax.disable_jit():
        params, plain_state, _ = step_of(tx)(PARAMS, tx.init(PARAMS), grads)
        state = grouped_tx.join(plain_state, params)
        assert avals(state) == avals(grouped_tx.init(PARAMS))
        assert_same(grouped_tx.split(state), plain_state)
        expected, _ = tx.update(grads, plain_state, params)
        assert_same(grouped_tx.update(grads, state, params)[0], expected)
        # The state has the plan of its buckets, so another max_size has no effect.
        assert_same(grouped(tx, max_size=4).update(grads, state, params)[0], expected)


def after_two_steps(tx, params, grads):
    state = tx.init(params)
    for _ in range(2):
        params, state, _ = step_of(tx)(params, state, grads)
    return params, state


def between_transforms_of_single_leaves(rule):
    return chain(
        clip_by_norm(1.0),
        rule,
        add_decayed_weights(0.1, "kernel"),
        scale_by_learning_rate(by_path([("bias", 0.0)], default=0.1)),
    )


# Transforms with `grouped` inside, and the same ones without it.
GROUPED_INSIDE = {
    "chain": (
        between_transforms_of_single_leaves(grouped(scale_by_adam())),
        between_transforms_of_single_leaves(scale_by_adam()),
    ),
    "masked": (masked(grouped(adam(0.1)), "kernel"), masked(adam(0.1), "kernel")),
    "optax": (
        optax.chain(optax.clip(0.5), optax.GradientTransformationExtraArgs(*grouped(adam()))),
        chain(clip_by_value(0.5), adam()),
    ),
}


@pytest.mark.parametrize("name", GROUPED_INSIDE)
@pytest.mark.slow
def test_grouped_inside_other_transforms(name):
    with_groups, without_groups = GROUPED_INSIDE[name]
    params = {"block": PARAMS["block"], "table": PARAMS["table"]}
    with jax.disable_jit():
        moved, _ = after_two_steps(with_groups, params, params)
        expected, _ = after_two_steps(without_groups, params, params)
    assert_same(moved, expected)


@pytest.mark.slow
def test_grouped_beside_the_tables_of_exact_rows():
    params = {"block": PARAMS["block"], "table": jnp.ones((50, 2))}
    tables = [("table", adam(0.1))]
    grouped_tx = exact_rows(partition(tables, default=grouped(adam(0.1))), "table")
    plain = exact_rows(partition(tables, default=adam(0.1)), "table")
    grads = {**params, "table": row_gradient(jnp.array([3, 7]), jnp.ones((2, 2)), 50)}
    moved, _ = grouped_tx.flush(*after_two_steps(grouped_tx, params, grads))
    expected, _ = plain.flush(*after_two_steps(plain, params, grads))
    assert_close(moved, expected)
    with pytest.raises(ValueError, match=r"exact_rows: grouped\(.*by partition"):
        exact_rows(grouped(adam(0.1)), "table")


class doubled(adamjax.Transform):
    """A user's transform that sets `groupable`."""

    groupable = True

    def init(self, params):
        return ()

    def update(self, grads, state, params=None, **extra_args):
        return jax.tree.map(lambda g: 2 * g, grads), state


def test_grouped_accepts_a_users_transform_that_is_groupable():
    updates, _ = grouped(doubled()).update([jnp.ones(2), jnp.ones(())], ())
    assert_same(updates, [jnp.full(2, 2.0), jnp.full((), 2.0)])


NOT_ELEMENTWISE = {
    "clip_by_norm": clip_by_norm(0.5),
    "by_path": adam(by_path([("bias", 0.0)], default=0.1)),
    "mask": adamw(0.1, mask="kernel"),
    "decay by path": add_decayed_weights(by_path([("bias", 0.0)], default=0.1)),
    "masked": masked(scale(0.5), "kernel"),
    "partition": partition([("bias", scale(0.5))], default=scale(0.1)),
    "rows by path": accumulate_gradients(adam(0.1), 2, max_rows=[("table", 3)]),
    "rows of some shapes": accumulate_gradients(adam(0.1), 2, max_rows=3),
    "exact_rows": exact_rows(adam(0.1), "table"),
    "grouped": grouped(adam(0.1)),
    "optax": optax.trace(0.5),
}


@pytest.mark.parametrize("tx", NOT_ELEMENTWISE.values(), ids=NOT_ELEMENTWISE)
def test_grouped_refuses_transforms_that_do_not_treat_all_elements_alike(tx):
    with pytest.raises(ValueError, match=r"grouped: .* cannot take leaves in buckets"):
        grouped(tx)


def test_the_error_names_the_part_that_cannot_be_grouped():
    with pytest.raises(ValueError, match=r"^grouped: clip_by_norm\(max_norm=0.5\) cannot"):
        grouped(skip_not_finite(chain(adam(0.1), clip_by_norm(0.5))))


def test_grouped_refuses_wrong_trees_states_and_sizes():
    tx, grads = grouped(adam(0.1)), make_grads(0)
    state = tx.init(PARAMS)
    grads["block"][1]["bias"] = jnp.ones(3)
    with pytest.raises(ValueError, match=r"grouped: grads\['block/1/bias'\] is float32\[3\]"):
        tx.update(grads, state, PARAMS)
    with pytest.raises(ValueError, match=r"grouped: params\['block/1/bias'\]"):
        tx.update(make_grads(0), state, grads)
    with pytest.raises(TypeError, match="scale_by_learning_rate: the state is"):
        tx.update(make_grads(0), (1, 2), PARAMS)
    with pytest.raises(ValueError, match=r"to_optax: grouped\(.*grouped.split"):
        adamjax.convert.to_optax(state, tx, PARAMS, optax.adam(0.1))
    for wrong in (0, 1.5, True, "small", None, jnp.array(4)):
        with pytest.raises(ValueError, match="grouped: max_size must be a whole number"):
            grouped(adam(), max_size=wrong)


def test_grouped_goes_into_a_config_and_back():
    tx = grouped(chain(adamw(0.1), weight_ema(0.9)), max_size=64)
    assert adamjax.from_config(json.loads(json.dumps(adamjax.to_config(tx)))) == tx


def test_formats_of_the_leaves_outside_of_buckets():
    device = jax.devices()[0]
    params = jax.device_put({"a": jnp.ones(2), "b": jnp.ones(3), "large": jnp.ones((9, 9))}, device)
    tx = grouped(scale_by_adam(), max_size=16)
    formats, state_formats = adamjax.layout.formats(tx, params)
    assert state_formats.m.alone == (formats["large"],)
    assert formats["large"] is not None
    state = jax.jit(tx.init, out_shardings=state_formats)(params)
    assert avals(state) == avals(tx.init(params))


@pytest.mark.slow
def test_leaves_that_are_split_over_devices_are_in_no_bucket():
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        import adamjax
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
        replicated, split = (NamedSharding(mesh, spec) for spec in (P(), P("x")))
        params = {"a": jnp.ones(4), "b": jnp.ones(2), "c": jnp.ones(6)}
        params = jax.device_put(params, {"a": replicated, "b": replicated, "c": split})
        tx = adamjax.grouped(adamjax.adam(0.1))
        state = tx.init(params)
        assert [x.shape for x in jax.tree.leaves(state[0].m)] == [(6,), (6,)]
        step = jax.jit(lambda p, s: tx.update(p, s, p))
        updates, state = step(params, state)
        assert {k: u.sharding.is_fully_replicated for k, u in updates.items()} == {
            "a": True, "b": True, "c": False}
        compiled = step.lower(params, state).compile().as_text()
        assert "all-gather" not in compiled and "all-reduce" not in compiled
    """
    run_on_devices(2, textwrap.dedent(script))


@jax.tree_util.register_dataclass
@dataclass
class Variable:
    """Like flax.nnx's, whose Optimizer passes Variables to `init` and arrays to `update`."""

    value: Any

    def get_metadata(self):
        return {}

    def get_value(self):
        return self.value


def test_update_accepts_the_values_of_the_variables_that_init_saw():
    values = {"a": jnp.ones(2), "b": jnp.ones(())}
    tx = grouped(adam(0.1))
    state = tx.init({name: Variable(x) for name, x in values.items()})
    updates, next_state = tx.update(values, state, values)
    assert_same(updates, tx.update(values, tx.init(values), values)[0])
    assert avals(next_state) == avals(state)


def test_join_refuses_a_state_of_other_leaves():
    """Even if both have the same number of elements, because leaves would get others' moments."""
    tx, params = grouped(adam()), [jnp.ones(2), jnp.ones(3)]
    for state, message in (
        (adam().init(params[::-1]), r"state\['0/m/0'\] is float32\[3\], expected float32\[2\]"),
        (adam().init(params[:1]), "has no '0/m/1'"),
        (nadam().init(params), r"momentum_product'\] is float32\[\], expected None"),
        (tx.init(params), "0/m"),
    ):
        with pytest.raises(ValueError, match=f"grouped.join: .*{message}"):
            tx.join(state, params)


def test_a_state_without_buckets_is_refused():
    tx, params = grouped(adam()), [jnp.ones(2), jnp.ones(3)]
    with pytest.raises(
        ValueError, match=r"the state's m is not in buckets.*tx.join\(state, params\)"
    ):
        tx.update(params, adam().init(params), params)


# Functions that break the arrays of a slot, and the errors.
BROKEN_ARRAYS = {
    "fewer buckets": (lambda m: m[:-3], r"has \d buckets and \d other arrays, expected"),
    "no arrays": (lambda m: [], r"has 0 buckets and 0 other arrays, expected \d and \d"),
    "one array too many": (lambda m: [*m, jnp.ones(2)], "other arrays, expected"),
    "shorter bucket": (
        lambda m: [m[0][:-1], *m[1:]],
        r"bucket 0 of .* is of shape \[\d+\], expected",
    ),
    "two dimensions": (
        lambda m: [m[0][None], *m[1:]],
        r"bucket 0 of .* shape \[1, \d+\], expected",
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", BROKEN_ARRAYS)
def test_a_state_with_missing_or_wrong_buckets_is_refused(name, jit):
    tx = grouped(adam(), max_size=8)
    state = tx.init(PARAMS)
    m, (break_arrays, message) = state[0].m, BROKEN_ARRAYS[name]
    m = type(m).tree_unflatten(m.plan, break_arrays([*m.buckets, *m.alone]))
    broken = (state[0]._replace(m=m), *state[1:])
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError, match=message) as caught:
        update(make_grads(0), broken, PARAMS)
    assert "state's m" in str(caught.value)
    for read in (tx.split, lambda state: get_slot(state, "m")):
        with pytest.raises(ValueError, match=message):
            read(broken)
