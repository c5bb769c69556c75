"""Transforms for a part of the leaves: masked and partition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, assert_same, float0

from adamjax import (
    adam,
    adamw,
    add_decayed_weights,
    apply_updates,
    chain,
    clip_by_global_norm,
    masked,
    partition,
    scale,
    scale_by_adam,
)

PARAMS = {
    "enc": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])},
    "head": {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.array([-0.5])},
}
GRADS = jax.tree.map(lambda p: 2 * p, PARAMS)


def matrices(tree):
    return jax.tree.map(lambda x: jnp.ndim(x) == 2, tree)


def only(tree, name):
    """The leaves of this name; None for the others."""
    return {top: {k: v if k == name else None for k, v in sub.items()} for top, sub in tree.items()}


# --- masked -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        "kernel",
        "kernel$",
        r"/k\w+l$",
        "^(enc|head)/kernel$",
        matrices,
        lambda tree: only_flags(tree, "kernel"),
    ],
)
def test_masked_applies_to_the_selected_leaves_and_passes_the_others(mask):
    tx = masked(chain(clip_by_global_norm(1.0), scale_by_adam()), mask)
    state = tx.init(PARAMS)
    updates, next_state = tx.update(GRADS, state, PARAMS)
    inner = chain(clip_by_global_norm(1.0), scale_by_adam())
    kernels = only(GRADS, "kernel")
    expected, expected_state = inner.update(kernels, inner.init(only(PARAMS, "kernel")))
    assert_same(only(updates, "kernel"), expected)
    assert_same(only(updates, "bias"), only(GRADS, "bias"))
    assert_same(next_state, expected_state)
    assert next_state[1].m["enc"]["bias"] is None


def only_flags(tree, name):
    return {top: {k: k == name for k in sub} for top, sub in tree.items()}


def test_a_mask_may_stop_above_the_leaves():
    for mask in (lambda tree: {"enc": False, "head": True}, "^head"):
        updates, _ = masked(scale(0.0), mask).update(GRADS, (), PARAMS)
        assert_same(updates["enc"], GRADS["enc"])
        assert not np.any(updates["head"]["kernel"])
    updates, _ = masked(scale(0.0), lambda tree: True).update(GRADS, ())
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


def test_a_mask_sees_the_parameters_where_there_are_some():
    """Its answer can not depend on a gradient that is None or wrong."""
    tx = masked(scale_by_adam(), matrices)
    state = tx.init(PARAMS)
    some = {"enc": {"kernel": None, "bias": GRADS["enc"]["bias"]}, "head": GRADS["head"]}
    for params in (PARAMS, None):
        updates, _ = tx.update(some, state, params)
        assert updates["enc"]["kernel"] is None
        assert_same(updates["enc"]["bias"], GRADS["enc"]["bias"])
    wrong = {"enc": {**GRADS["enc"], "kernel": jnp.float32(1)}, "head": GRADS["head"]}
    with pytest.raises(ValueError, match=r"masked: grads\['enc/kernel'\].*params.*\(1, 2\)"):
        tx.update(wrong, state, PARAMS)


def test_masks_in_masks():
    """What is None to the inner is not offered to its mask, be it a pattern or a function."""
    for inner in ("bias", lambda tree: jax.tree.map(lambda x: jnp.ndim(x) == 1, tree)):
        tx = masked(masked(scale(0.0), inner), "^head")
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        assert not np.any(updates["head"]["bias"])
        assert_same(updates["enc"], GRADS["enc"])
        assert_same(updates["head"]["kernel"], GRADS["head"]["kernel"])
        decay = masked(add_decayed_weights(1.0, inner), "^head")
        updates, _ = decay.update(GRADS, decay.init(PARAMS), PARAMS)
        assert_close(updates["head"]["bias"], GRADS["head"]["bias"] + PARAMS["head"]["bias"])
        assert_same(updates["enc"], GRADS["enc"])


def test_masked_leaves_integers_and_float0_alone():
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}
    for pattern in ("w", "n", ""):
        tx = masked(adam(), pattern)
        updates, _ = tx.update({"w": jnp.ones(2), "n": float0((2,))}, tx.init(params), params)
        assert_same(apply_updates(params, updates)["n"], params["n"])


def test_masked_optax():
    tx = chain(masked(optax.adam(0.1), "kernel"), scale(2.0))
    ours = chain(masked(adam(0.1, eps=1e-8), "kernel"), scale(2.0))
    state, our_state = tx.init(PARAMS), ours.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(GRADS, state, PARAMS)
        expected, our_state = ours.update(GRADS, our_state, PARAMS)
        assert_close(updates, expected, rtol=1e-5)


def test_masked_refuses():
    with pytest.raises(TypeError, match="masked: a path pattern must be a str, got 3"):
        masked(scale(1.0), 3)
    with pytest.raises(ValueError, match="masked: '\\[' is not a regular expression"):
        masked(scale(1.0), "[")


# --- partition ----------------------------------------------------------------------------------


def test_partition_gives_every_leaf_to_the_first_match_else_the_default():
    tx = partition([("^enc", scale(2.0)), ("bias", scale(3.0))], default=scale(5.0))
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    factors = {"enc": {"kernel": 2, "bias": 2}, "head": {"kernel": 5, "bias": 3}}
    assert_same(updates, jax.tree.map(lambda f, g: f * g, factors, GRADS))
    assert state == ((), (), ())


def test_every_part_sees_its_own_leaves_only():
    """Norms, states and parameters."""
    tx = partition(
        [("kernel", chain(clip_by_global_norm(1.0), scale(-1.0)))],
        default=adamw(0.1, weight_decay=0.5),
    )
    state = tx.init(PARAMS)
    updates, state = tx.update(GRADS, state, PARAMS)
    joint = np.sqrt(sum(np.sum(np.square(GRADS[top]["kernel"])) for top in GRADS))
    np.testing.assert_allclose(updates["enc"]["kernel"], -GRADS["enc"]["kernel"] / joint, rtol=1e-6)
    alone = adamw(0.1, weight_decay=0.5)
    biases = only(PARAMS, "bias")
    expected, _ = alone.update(only(GRADS, "bias"), alone.init(biases), biases)
    assert_same(only(updates, "bias"), expected)
    assert state[1][0].m["head"]["kernel"] is None


def test_partition_without_a_default():
    with pytest.raises(ValueError, match=r"partition: no pattern of \['enc'\].*'head/bias'"):
        partition([("enc", scale(1.0))]).init(PARAMS)
    both = partition([("enc", scale(1.0)), ("head", scale(2.0))])
    both.update(GRADS, both.init(PARAMS), PARAMS)
    # A leaf that is not here needs no transform.
    tx = masked(partition([("enc", scale(0.0))]), "enc")
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_same(updates["head"], GRADS["head"])
    some = {"enc": GRADS["enc"], "head": {"kernel": None, "bias": None}}
    partition([("enc", scale(0.0))]).update(some, ((),))


def test_partitions_in_partitions():
    inner = partition([("bias", scale(2.0))], default=scale(3.0))
    tx = partition([("head", inner), ("enc", masked(inner, "bias"))])
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    factors = {"enc": {"kernel": 1, "bias": 2}, "head": {"kernel": 3, "bias": 2}}
    assert_same(updates, jax.tree.map(lambda f, g: f * g, factors, GRADS))


def test_partition_is_optax_multi_transform():
    tx = partition([("kernel", optax.adam(0.1))], default=adam(0.2, eps=1e-8))
    labels = {top: {"kernel": "k", "bias": "b"} for top in PARAMS}
    theirs = optax.multi_transform({"k": optax.adam(0.1), "b": optax.adam(0.2)}, labels)
    state, their_state = tx.init(PARAMS), theirs.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(GRADS, state, PARAMS)
        expected, their_state = theirs.update(GRADS, their_state, PARAMS)
        assert_close(updates, expected, rtol=1e-5)


def test_partition_refuses():
    with pytest.raises(ValueError, match="partition: '\\*' is not a regular expression"):
        partition([("*", scale(1.0))])
    with pytest.raises(TypeError, match="partition: a path pattern must be a str"):
        partition([(matrices, scale(1.0))])
    with pytest.raises(ValueError, match="pairs"):
        partition([("a", scale(1.0), scale(2.0))])
    tx = partition([("kernel", scale_by_adam())], default=scale(1.0))
    wrong = {"enc": {**GRADS["enc"], "kernel": jnp.ones(3)}, "head": GRADS["head"]}
    with pytest.raises(ValueError, match=r"scale_by_adam: grads\['enc/kernel'\].*\(1, 2\)"):
        tx.update(wrong, tx.init(PARAMS), PARAMS)
