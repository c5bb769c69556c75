"""Small leaves in buckets: the same steps, whatever the leaves and their gradients."""

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
from support import assert_close, assert_same, avals, float0, run_on_devices

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
    """Three of one shape, a scalar, nothing, a table, one too large, other dtypes, an integer."""
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


def stepping(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state, updates

    return step


def assert_alike(tx, gradients, assert_equal=assert_same):
    """Weights, updates and state of a run are those of the transform that is not grouped."""
    grouped_tx, params, other = grouped(tx, max_size=16), PARAMS, PARAMS
    state, alone = grouped_tx.init(params), tx.init(other)
    step, alone_step = stepping(grouped_tx), stepping(tx)
    form = avals(state)
    for grads in gradients:
        params, state, updates = step(params, state, grads)
        other, alone, expected = alone_step(other, alone, grads)
        assert avals(state) == form
        assert_equal(updates, expected)
        assert_equal(params, other)
        assert_equal(grouped_tx.split(state), alone)
    return grouped_tx, params, state, alone


ELEMENTWISE = {
    "adam": adam(0.1),
    "adam, eps": adam(cosine_decay(0.1, 10), 0.8, 0.99, eps=1e-8),
    "nadam": nadam(0.1),
    "amsgrad": amsgrad(0.1),
    "adamax": adamax(0.1),
    "adamw": chain(clip_by_value(0.5), adamw(0.1, weight_decay=0.1), weight_ema(0.9, 2)),
    "no rule": chain(scale(0.5), add_decayed_weights(0.1), scale_by_learning_rate(0.1)),
    "no state": clip_by_value(0.5),
    "guarded": skip_not_finite(accumulate_gradients(amsgrad(0.1), 2)),
    "hyperparameters": with_hyperparams(adam(0.1), learning_rate=0.2),
}


@pytest.mark.parametrize("tx", ELEMENTWISE.values(), ids=ELEMENTWISE)
@pytest.mark.slow
def test_elementwise_steps_are_the_same_bit_for_bit(tx):
    """Operation by operation; what a compiler fuses it may round otherwise."""
    with jax.disable_jit():
        assert_alike(tx, [make_grads(t) for t in range(3)])


def test_compiled_steps_are_the_same_up_to_rounding():
    """With a norm of all leaves, which buckets sum in another order."""
    tx = chain(clip_by_global_norm(0.5), adamw(0.1, weight_decay=0.1), weight_ema(0.9))
    params = {name: PARAMS[name] for name in ("block", "gain", "large", "table")}
    grouped_tx, other = grouped(tx, max_size=16), params
    state, alone = grouped_tx.init(params), tx.init(params)
    step, alone_step = jax.jit(stepping(grouped_tx)), jax.jit(stepping(tx))
    for t in range(3):
        grads = {name: make_grads(t)[name] for name in params}
        params, state, updates = step(params, state, grads)
        other, alone, expected = alone_step(other, alone, grads)
        assert_close((params, updates, grouped_tx.split(state)), (other, expected, alone))


@pytest.mark.slow
def test_leaves_without_a_gradient_stand_still_whichever_they_are():
    """Their weights and state too, in a bucket whose other leaves move."""

    def without(t, *absent):
        def kept(path, g):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return None if any(a in name for a in absent) else g

        return jax.tree_util.tree_map_with_path(kept, make_grads(t))

    absent = [("1/bias",), (), ("0/bias", "gain", "half/0"), ("bias", "kernel", "wave"), ("e",), ()]
    gradients = [without(t, *names) for t, names in enumerate(absent)]
    with jax.disable_jit():
        for tx in (ELEMENTWISE["adamw"], amsgrad(0.1)):
            grouped_tx, params, state, _ = assert_alike(tx, gradients)
        _, after, moved = stepping(grouped_tx)(params, state, without(7, "2/kernel"))[::-1]
    assert_same(moved["block"][2]["kernel"], params["block"][2]["kernel"])
    for slot in ("m", "v"):
        before, now = (get_slot(s, slot)["block"][2] for s in (state, after))
        assert_same(now["kernel"], before["kernel"])
        assert np.all(now["bias"] != before["bias"])


@pytest.mark.parametrize("rows", ["dense", "lazy"])
@pytest.mark.slow
def test_row_gradients_of_small_tables(rows):
    values = jnp.ones((2, 2))
    gradients = [make_grads(t) for t in range(3)]
    gradients[1]["table"] = row_gradient(jnp.array([1, 4]), values, 6)

    def equal(actual, expected):
        dense = [
            jax.tree.map(
                lambda x: x.to_dense() if isinstance(x, adamjax.RowGradient) else x,
                tree,
                is_leaf=lambda x: isinstance(x, adamjax.RowGradient),
            )
            for tree in (actual, expected)
        ]
        assert_same(*dense)

    with jax.disable_jit():
        assert_alike(adam(0.1, rows=rows), gradients, equal)


def test_gradients_of_other_dtypes_than_their_neighbours():
    gradients = [make_grads(t) for t in range(2)]
    gradients[1]["gain"] = gradients[1]["gain"].astype(jnp.bfloat16)
    gradients[1]["half"] = [g.astype(jnp.float32) for g in gradients[1]["half"]]
    gradients[1]["block"][0]["bias"] = gradients[1]["block"][0]["bias"].astype(jnp.float16)
    with jax.disable_jit():
        assert_alike(adamw(0.1), gradients)


def test_the_state_is_few_arrays():
    """Of many leaves; a leaf that is larger than max_size, or alone of its dtype, is by itself."""
    params = {f"layer {i}": {"bias": jnp.ones(3 + i % 2), "gain": jnp.ones(())} for i in range(40)}
    params |= {"large": jnp.ones(17), "half": jnp.ones(2, jnp.float16)}
    state = grouped(scale_by_adam(), max_size=16).init(params)
    assert len(jax.tree.leaves(state)) == 1 + 2 * (3 + 2)
    assert sum(x.size for x in jax.tree.leaves(state.m)) == 20 * 3 + 20 * 4 + 40 + 17 + 2
    names = {jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_flatten_with_path(state.m)[0]}
    assert {"['large']", "['half']"} <= names


def test_a_donated_step_is_traced_once():
    traces = []

    def step(params, state, grads):
        traces.append(1)
        return stepping(tx)(params, state, grads)[:2]

    tx = grouped(chain(adam(0.1), weight_ema(0.9)))
    donated = jax.jit(step, donate_argnums=(0, 1))
    floats = {"block": PARAMS["block"], "large": PARAMS["large"]}
    for init in (tx.init, jax.jit(tx.init)):
        params = jax.tree.map(jnp.copy, floats)
        state = init(params)
        state = pickle.loads(pickle.dumps(state))  # as from a checkpoint
        for _ in range(2):
            held = jax.tree.leaves((params, state))
            params, state = donated(params, state, floats)
            assert all(x.is_deleted() for x in held)
    assert len(traces) == 1


def test_shapes_are_enough():
    tx = grouped(adam(0.1))
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    expected = avals(tx.init(PARAMS))
    assert avals(tx.init(shapes)) == expected
    assert avals(jax.eval_shape(tx.init, shapes)) == expected


def test_what_is_read_of_a_state_is_as_without_buckets():
    tx = chain(adam(cosine_decay(0.1, 10)), weight_ema(0.9))
    with jax.disable_jit():
        grouped_tx, params, state, alone = assert_alike(tx, [make_grads(t) for t in range(2)])
    assert slot_names(state) == slot_names(alone) == ("m", "v")
    for name in ("m", "v"):
        assert_same(get_slot(state, name), get_slot(alone, name))
    assert_same(averaged_weights(state), averaged_weights(alone))
    assert_same(averaged_weights(state, params), averaged_weights(alone, params))
    assert step_count(state) == 2
    assert learning_rate(grouped_tx, state) == learning_rate(tx, alone)
    parts = partition([("block", grouped_tx)], default=adam(0.1))
    whole = parts.init(PARAMS)
    assert_same(get_slot(whole, "m"), get_slot(adam(0.1).init(PARAMS), "m"))


def test_a_run_goes_on_from_a_state_without_buckets():
    tx, grads = skip_not_finite(chain(adamw(0.1), weight_ema(0.9))), make_grads(0)
    grouped_tx = grouped(tx, max_size=16)
    with jax.disable_jit():
        params, alone, _ = stepping(tx)(PARAMS, tx.init(PARAMS), grads)
        state = grouped_tx.join(alone, params)
        assert avals(state) == avals(grouped_tx.init(PARAMS))
        assert_same(grouped_tx.split(state), alone)
        assert_same(
            *(stepping(t)(params, s, grads)[0] for t, s in ((tx, alone), (grouped_tx, state)))
        )
        # The state says how it is grouped, whatever the largest size now is.
        other = grouped(tx, max_size=4).update(grads, state, params)
        assert_same(other[0], tx.update(grads, alone, params)[0])


@pytest.mark.slow
def test_around_and_within_other_transforms():
    """In front of what sees each leaf; as a part; beside a table whose rows are kept exact."""
    outer = chain(
        clip_by_norm(1.0),
        grouped(scale_by_adam()),
        add_decayed_weights(0.1, "kernel"),
        scale_by_learning_rate(by_path([("bias", 0.0)], default=0.1)),
    )
    plain = chain(*outer.transforms[:1], scale_by_adam(), *outer.transforms[2:])
    inner = masked(grouped(adam(0.1)), "kernel")
    foreign = optax.chain(optax.clip(0.5), optax.GradientTransformationExtraArgs(*grouped(adam())))
    pairs = [(outer, plain), (inner, masked(adam(0.1), "kernel"))]
    pairs += [(foreign, chain(clip_by_value(0.5), adam()))]
    params = {"block": PARAMS["block"], "table": PARAMS["table"]}
    with jax.disable_jit():
        for tx, expected in pairs:
            (p, s), (q, r) = (params, tx.init(params)), (params, expected.init(params))
            for _ in range(2):
                p, s, _ = stepping(tx)(p, s, params)
                q, r, _ = stepping(expected)(q, r, params)
            assert_same(p, q)


@pytest.mark.slow
def test_beside_exact_rows():
    params = {"block": PARAMS["block"], "table": jnp.ones((50, 2))}
    tables = [("table", adam(0.1))]
    grouped_tx = exact_rows(partition(tables, default=grouped(adam(0.1))), "table")
    plain = exact_rows(partition(tables, default=adam(0.1)), "table")
    grads = {**params, "table": row_gradient(jnp.array([3, 7]), jnp.ones((2, 2)), 50)}
    ends = []
    for tx in (grouped_tx, plain):
        p, s = params, tx.init(params)
        for _ in range(2):
            p, s, _ = stepping(tx)(p, s, grads)
        ends.append(tx.flush(p, s)[0])
    assert_close(*ends)
    with pytest.raises(ValueError, match=r"exact_rows: grouped\(.*by partition"):
        exact_rows(grouped(adam(0.1)), "table")


class doubled(adamjax.Transform):
    """A user's, which treats all elements alike, and says so."""

    groupable = True

    def init(self, params):
        return ()

    def update(self, grads, state, params=None, **extra_args):
        return jax.tree.map(lambda g: 2 * g, grads), state


ODD = {
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


@pytest.mark.parametrize("tx", ODD.values(), ids=ODD)
def test_refuses_what_does_not_treat_all_elements_alike(tx):
    with pytest.raises(ValueError, match=r"grouped: .* cannot take leaves in buckets"):
        grouped(tx)


def test_names_the_part_that_it_refuses():
    with pytest.raises(ValueError, match=r"^grouped: clip_by_norm\(max_norm=0.5\) cannot"):
        grouped(skip_not_finite(chain(adam(0.1), clip_by_norm(0.5))))


def test_refuses_wrong_trees_and_sizes():
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


def test_is_told_in_a_config():
    tx = grouped(chain(adamw(0.1), weight_ema(0.9)), max_size=64)
    assert adamjax.from_config(json.loads(json.dumps(adamjax.to_config(tx)))) == tx
    updates, _ = grouped(doubled()).update([jnp.ones(2), jnp.ones(())], ())
    assert_same(updates, [jnp.full(2, 2.0), jnp.full((), 2.0)])


def test_formats_of_the_leaves_outside_of_buckets():
    device = jax.devices()[0]
    params = jax.device_put({"a": jnp.ones(2), "b": jnp.ones(3), "large": jnp.ones((9, 9))}, device)
    tx = grouped(scale_by_adam(), max_size=16)
    lie, state_lies = adamjax.layout.formats(tx, params)
    assert state_lies.m.alone == (lie["large"],)
    assert lie["large"] is not None
    state = jax.jit(tx.init, out_shardings=state_lies)(params)
    assert avals(state) == avals(tx.init(params))


@pytest.mark.slow
def test_leaves_in_pieces_are_left_alone():
    """Of three leaves on two devices, one has half of its elements on each."""
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        import adamjax
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
        whole, pieces = (NamedSharding(mesh, spec) for spec in (P(), P("x")))
        params = {"a": jnp.ones(4), "b": jnp.ones(2), "c": jnp.ones(6)}
        lies = {"a": whole, "b": whole, "c": pieces}
        params = jax.device_put(params, lies)
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
    """As those of flax.nnx, whose Optimizer shows `init` variables and `update` their values."""

    value: Any

    def get_metadata(self):
        return {}

    def get_value(self):
        return self.value


def test_variables_may_be_unwrapped_after_init():
    values = {"a": jnp.ones(2), "b": jnp.ones(())}
    tx = grouped(adam(0.1))
    state = tx.init({name: Variable(x) for name, x in values.items()})
    updates, next_state = tx.update(values, state, values)
    assert_same(updates, tx.update(values, tx.init(values), values)[0])
    assert avals(next_state) == avals(state)


def test_a_state_of_other_leaves_is_not_put_into_buckets():
    """Leaves of the same total as well, whose moments would be dealt out otherwise."""
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


CUT = {
    "fewer buckets": (lambda m: m[:-3], r"has \d buckets and \d other arrays, expected"),
    "no arrays": (lambda m: [], r"has 0 buckets and 0 other arrays, expected \d and \d"),
    "one too many": (lambda m: [*m, jnp.ones(2)], "other arrays, expected"),
    "shorter": (lambda m: [m[0][:-1], *m[1:]], r"bucket 0 of .* is of shape \[\d+\], expected"),
    "two dimensions": (
        lambda m: [m[0][None], *m[1:]],
        r"bucket 0 of .* shape \[1, \d+\], expected",
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("what", CUT)
def test_a_state_that_is_not_whole_is_refused(what, jit):
    tx, params = grouped(adam(), max_size=8), make_params()
    state = tx.init(params)
    whole, (cut, message) = state[0].m, CUT[what]
    m = type(whole).tree_unflatten(whole.plan, cut([*whole.buckets, *whole.alone]))
    broken = (state[0]._replace(m=m), *state[1:])
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError, match=message) as caught:
        update(make_grads(0), broken, params)
    assert "state's m" in str(caught.value)
    for read in (tx.split, lambda state: get_slot(state, "m")):
        with pytest.raises(ValueError, match=message):
            read(broken)
