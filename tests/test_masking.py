"""`masked`, `partition`, and the masks that select leaves."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, assert_same, enable_x64, float0, is_none

import adamjax
from adamjax import (
    RowGradient,
    accumulate_gradients,
    adam,
    adamw,
    add_decayed_weights,
    apply_updates,
    chain,
    clip_by_global_norm,
    exact_rows,
    from_config,
    masked,
    partition,
    row_gradient,
    scale,
    scale_by_adam,
    set_to_zero,
    skip_not_finite,
    skipped_steps,
    to_config,
    with_hyperparams,
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


def is_named(tree, name):
    """A bool for each leaf: whether it has this name."""
    return {top: {k: k == name for k in sub} for top, sub in tree.items()}


def zeroed(tree):
    return jax.tree.map(lambda x: 0 * x, tree)


# --- masked -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        "kernel",
        "kernel$",
        r"/k\w+l$",
        "^(enc|head)/kernel$",
        ["^enc/kernel", "^head/kernel"],
        matrices,
        lambda tree: is_named(tree, "kernel"),
    ],
)
def test_masked_transforms_the_selected_leaves_and_passes_the_others(mask):
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


def test_each_of_several_patterns_must_match():
    for make in (lambda mask: masked(scale(0.0), mask), lambda mask: adamw(0.1, mask=mask)):
        tx = make(["kernel", "baiss"])
        with pytest.raises(ValueError, match=r"the pattern 'baiss' matches no leaf"):
            tx.init(PARAMS)
        assert make(["kernel", adamjax.optional("baiss")]).init(PARAMS) is not None
        assert from_config(to_config(tx)) == tx
        # A list with a bool in it is a tree of bools.
        with pytest.raises(TypeError, match=r"at '1' the mask has 'kernel' .*give a list"):
            make([True, "kernel"])


def test_a_bool_of_a_mask_may_stand_for_a_subtree():
    for mask in (lambda tree: {"enc": False, "head": True}, "^head"):
        updates, _ = masked(scale(0.0), mask).update(GRADS, (), PARAMS)
        assert_same(updates["enc"], GRADS["enc"])
        assert not np.any(updates["head"]["kernel"])
    updates, _ = masked(scale(0.0), lambda tree: True).update(jnp.ones(3), ())
    assert not np.any(updates)


def test_a_mask_function_of_a_path_is_refused():
    """It would be called with the whole tree, not with paths."""
    for make in (adamw, lambda rate, mask: masked(adam(rate), mask)):
        for mask in (lambda path: "bias" not in path, lambda path: np.bool_(False)):
            with pytest.raises(TypeError, match="with the tree, not with the path of each leaf"):
                make(0.1, mask=mask).init(PARAMS)


def test_a_mask_function_gets_the_parameters_if_they_are_given():
    """So the selection does not depend on a gradient that is None or has a wrong shape."""
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


def test_an_inner_mask_sees_only_the_leaves_that_the_outer_mask_selects():
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


def assert_same_steps(ours, theirs):
    """Two steps in float64, because optax's bias corrections are off by up to 3e-5 in float32."""
    with enable_x64(True):
        params, grads = (
            jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)
            for tree in (PARAMS, GRADS)
        )
        state, their_state = ours.init(params), theirs.init(params)
        for _ in range(2):
            updates, state = ours.update(grads, state, params)
            expected, their_state = theirs.update(grads, their_state, params)
            assert_close(updates, expected, rtol=1e-12)


def test_masked_accepts_a_transform_of_optax():
    with_ours = chain(masked(adam(0.1, eps=1e-8), "kernel"), scale(2.0))
    with_theirs = chain(masked(optax.adam(0.1), "kernel"), scale(2.0))
    assert_same_steps(with_ours, with_theirs)


# --- trees of bools -----------------------------------------------------------------------------


def id_of(x):
    """A test's id without memory addresses: pytest-xdist needs the same ids in all processes."""
    return type(x).__name__ if " at 0x" in str(x) else str(x)


@jax.tree_util.register_pytree_node_class
class Model:
    """A model like those of Equinox: a tree that can be called."""

    def __init__(self, enc, head):
        self.enc, self.head = enc, head

    def tree_flatten(self):
        return (self.enc, self.head), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)

    def __call__(self, tree):
        return True


MODEL, MODEL_GRADS = Model(PARAMS["enc"], PARAMS["head"]), Model(GRADS["enc"], GRADS["head"])
FLAGS = {"enc": {"kernel": True, "bias": False}, "head": {"kernel": False, "bias": True}}
# Masks, and for each leaf of PARAMS whether the mask selects it.
TREES = {
    "a bool for each leaf": (FLAGS, FLAGS),
    "a NumPy bool for each leaf": (jax.tree.map(np.bool_, FLAGS), FLAGS),
    "a prefix": (
        {"enc": True, "head": {"kernel": False, "bias": True}},
        {**FLAGS, "enc": {"kernel": True, "bias": True}},
    ),
    "True": (True, jax.tree.map(lambda _: True, FLAGS)),
    "False": (False, jax.tree.map(lambda _: False, FLAGS)),
    "NumPy's True": (np.bool_(True), jax.tree.map(lambda _: True, FLAGS)),
    "by the shapes": (matrices(PARAMS), matrices(PARAMS)),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_of_bools_is_a_mask(name):
    """It selects the same leaves as in optax, and so does a function that returns it."""
    mask, wanted = TREES[name]
    theirs = optax.masked(optax.scale(0.0), jax.tree.map(bool, mask))
    expected, _ = theirs.update(GRADS, theirs.init(PARAMS))
    assert_same(expected, jax.tree.map(lambda flag, g: 0 * g if flag else g, wanted, GRADS))
    decayed = jax.tree.map(lambda flag, g, p: g + 0.5 * p if flag else g, wanted, GRADS, PARAMS)
    # A function that returns one bool for several leaves is refused.
    is_one_bool = isinstance(mask, bool | np.bool_)
    for given in (mask,) if is_one_bool else (mask, lambda tree: mask):
        tx = masked(scale(0.0), given)
        updates, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
        assert_same(updates, expected)
        assert_same(tx.update(GRADS, ())[0], expected)
        slot = masked(scale_by_adam(), given).init(PARAMS).m
        assert jax.tree.map(lambda m: m is not None, slot, is_leaf=is_none) == wanted
        for tx in (add_decayed_weights(0.5, given), masked(add_decayed_weights(0.5), given)):
            assert_same(tx.update(GRADS, tx.init(PARAMS), PARAMS)[0], decayed)
        tx = adamw(0.1, weight_decay=0.5, mask=given)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, GRADS), tx.init(PARAMS), PARAMS)
        assert [bool(jnp.any(u)) for u in jax.tree.leaves(updates)] == jax.tree.leaves(wanted)


@pytest.mark.parametrize("name", TREES)
def test_a_transform_with_a_tree_of_bools_is_data(name):
    """It hashes, compares, prints, pickles, goes through `jit` and into a config and back."""
    mask, _ = TREES[name]
    for make in (lambda m: masked(adam(), m), lambda m: adamw(mask=m)):
        tx = make(mask)
        rebuilt = [
            make(jax.tree.map(bool, mask)),
            pickle.loads(pickle.dumps(tx)),
            tx.replace(),
            jax.tree.map(lambda x: x, tx),
            from_config(json.loads(json.dumps(to_config(tx)))),
        ]
        for same in rebuilt:
            assert same == tx
            assert hash(same) == hash(tx)
        assert repr(jax.tree.map(bool, mask)) in repr(tx)
        other = make(jax.tree.map(lambda flag: not flag, mask))
        assert other != tx
        init = jax.jit(lambda tx, params: tx.init(params))
        assert_same(init(other, PARAMS), other.init(PARAMS))
        assert_same(init(tx, PARAMS), tx.init(PARAMS))


def test_a_callable_model_of_bools_is_a_tree_of_bools():
    mask = jax.tree.map(lambda x: jnp.ndim(x) == 2, MODEL)
    for tx in (masked(scale(0.0), mask), masked(scale(0.0), lambda tree: mask)):
        updates, _ = tx.update(MODEL_GRADS, tx.init(MODEL), MODEL)
        for part, grads in ((updates.enc, GRADS["enc"]), (updates.head, GRADS["head"])):
            assert not np.any(part["kernel"])
            assert_same(part["bias"], grads["bias"])
    decay = adamw(0.1, weight_decay=0.5, mask=mask)
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, MODEL), decay.init(MODEL), MODEL)
    assert np.all(np.asarray(updates.enc["kernel"]) != 0)
    assert not np.any(updates.enc["bias"])
    # A bool may stand for a subtree, and None may stand where there is no leaf.
    masked(scale(0.0), Model(True, None)).init(Model(PARAMS["enc"], None))
    # A model without a bool is called as a mask function.
    kernel = GRADS["enc"]["kernel"]
    assert_same(masked(scale(0.0), Model(None, None)).update(kernel, ())[0], zeroed(kernel))


def test_a_callable_model_of_bools_and_other_leaves_is_refused():
    for mask in (Model(True, 1.0), Model({"a": True}, "enc")):
        with pytest.raises(TypeError, match="masked: the mask is a Model that can be called, and"):
            masked(scale(0.0), mask)
    with pytest.raises(ValueError, match=r"no bool for the leaf 'enc/bias'.*lambda tree: mask"):
        masked(scale(0.0), Model(True, True)).init(PARAMS)


def test_masks_of_leaves_that_are_none():
    """For a leaf that is None a mask may have a bool or None; for any other it must have a bool."""
    some = {"enc": {"kernel": PARAMS["enc"]["kernel"], "bias": None}, "head": None}
    for mask in (
        {"enc": {"kernel": True, "bias": True}, "head": True},
        {"enc": {"kernel": True, "bias": None}, "head": None},
        matrices(some),
    ):
        tx = masked(scale(0.0), mask)
        updates, _ = tx.update(some, tx.init(some), some)
        assert updates["enc"]["bias"] is None
        assert updates["head"] is None
        assert not np.any(updates["enc"]["kernel"])
    with pytest.raises(ValueError, match="it is None at 'enc/bias', where there is a leaf"):
        masked(scale(0.0), matrices(some)).init(PARAMS)


@pytest.mark.parametrize(
    ("mask", "misfit"),
    [
        ({"enc": {"kernel": True}, "head": True}, "it has no bool for the leaf 'enc/bias'"),
        ({"enc": True}, "it has no bool for the leaf 'head/bias'"),
        ({}, "it has no bool for the leaf 'enc/bias'"),
        ([True, False], "it has no bool for the leaf 'enc/bias'"),
        ({"enc": True, "head": True, "new": {"w": True}}, "it has a bool at 'new/w', where"),
        ({"enc": {"kernel": {"a": True}, "bias": True}, "head": True}, "for the leaf 'enc/kernel'"),
        ({"enc": None, "head": True}, "it is None at 'enc', where there is a leaf"),
        (Model(True, False), "it has no bool for the leaf 'enc/bias'"),
    ],
    ids=id_of,
)
def test_a_tree_that_does_not_fit_is_refused(mask, misfit):
    """`init` and `update` refuse it, also if a mask function returns it."""
    owners = {
        "masked": lambda m: masked(scale(0.0), m),
        "add_decayed_weights": lambda m: adamw(mask=m).transforms[1],
    }
    for owner, make in owners.items():
        state = make(True).init(PARAMS)
        for given in (mask, lambda tree: mask):
            for call in (
                lambda tx: tx.init(PARAMS),
                lambda tx: jax.eval_shape(tx.init, PARAMS),
                lambda tx, state=state: tx.update(GRADS, state, PARAMS),
            ):
                with pytest.raises(
                    ValueError, match=f"^{owner}: the mask does not fit: .*{misfit}"
                ):
                    call(make(given))


def test_a_mask_with_other_containers_is_refused():
    tx = masked(scale(0.0), [True, False])
    with pytest.raises(
        ValueError, match=r"its structure is .*\[\*, \*\].*the leaves' structure is .*\(\*"
    ):
        tx.init((jnp.ones(1), jnp.ones(2)))


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        ("yes", "'yes' of type str"),
        (1, "1 of type int"),
        (0.0, "0.0 of type float"),
        (np.array(True), "of type ndarray"),
        (np.ones(2, bool), "of type ndarray"),
        (jnp.array(True), "of type ArrayImpl"),
        (len, "of type builtin_function_or_method"),
    ],
    ids=id_of,
)
def test_a_leaf_of_a_mask_that_is_not_a_bool_is_refused(leaf, text):
    mask = {"enc": {"kernel": True, "bias": leaf}, "head": False}
    for make, owner in (
        (lambda m: masked(scale(0.0), m), "masked"),
        (lambda m: adamw(mask=m), "add_decayed_weights"),
    ):
        with pytest.raises(TypeError, match=f"^{owner}: at 'enc/bias' the mask has .*{text}"):
            make(mask)
        returned = f"^{owner}: the result of the mask function: at 'enc/bias' the mask has .*{text}"
        with pytest.raises(TypeError, match=returned):
            make(lambda tree: mask).init(PARAMS)
    with pytest.raises(TypeError, match="a path pattern must be a str, got None"):
        masked(scale(0.0), None)
    for returned in ("kernel", 1):
        with pytest.raises(TypeError, match="masked: the result of the mask function: the mask"):
            masked(scale(0.0), lambda tree, x=returned: x).init(PARAMS)


def test_masks_of_row_gradients():
    """A mask function gets the parameters, or without these the row gradients."""
    params = {"table": jnp.ones((9, 2)), "w": jnp.ones(2)}
    grads = {"table": row_gradient(jnp.array([3, 3]), jnp.ones((2, 2)), 9), "w": jnp.ones(2)}
    for mask in ({"table": True, "w": False}, matrices):
        updates, _ = masked(scale(0.5), mask).update(grads, (), params)
        assert isinstance(updates["table"], RowGradient)
        assert_same(updates["table"].to_dense()[3], jnp.ones(2))
        assert_same(updates["w"], grads["w"])
    updates, _ = masked(scale(0.5), {"table": True, "w": False}).update(grads, ())
    assert_same(updates["table"].to_dense()[3], jnp.ones(2))
    with pytest.raises(
        TypeError, match=r"at 'table' the mask has RowGradient.*pass params to update"
    ):
        masked(scale(0.5), matrices).update(grads, ())


def test_a_tree_of_bools_is_encoded_in_a_config():
    config = to_config(masked(scale(0.5), {"a": True, "b": [False, (True, None)]}))
    encoded = {"dict": {"a": True, "b": {"list": [False, [True, None]]}}}
    assert config["pattern"] == {"bools": encoded}
    with pytest.raises(
        TypeError, match=r"masked.pattern is a tree of bools with nodes other than diction"
    ):
        to_config(masked(scale(0.5), Model(True, False)))
    with pytest.raises(TypeError, match=r"config.pattern: bools: at 'a' the mask has 1"):
        from_config({**config, "pattern": {"bools": {"dict": {"a": 1}}}})


# --- resolve_masks -------------------------------------------------------------------------------

BIG = {"table": jnp.ones((20, 2)), "w": jnp.ones((3, 2)), "none": None}


def many_rows(tree):
    return jax.tree.map(lambda x: x.shape[0] > 10, tree)


# The results of `many_rows` for all leaves, for the table alone and for `w` alone.
OF_ALL = {"none": None, "table": True, "w": False}
OF_TABLE = {"none": None, "table": True, "w": None}
OF_W = {"none": None, "table": None, "w": False}
# Functions from a mask of all leaves, one of the table alone and one of `w` alone to a transform.
MASK_USERS = {
    "decay": lambda of_all, of_table, of_w: adamw(0.1, mask=of_all),
    "masked": lambda of_all, of_table, of_w: masked(adam(), of_all),
    "in masked": lambda of_all, of_table, of_w: masked(adamw(mask=of_table), of_all),
    "in a pattern": lambda of_all, of_table, of_w: masked(masked(adam(), of_w), "^w"),
    "in partition": lambda of_all, of_table, of_w: partition(
        [("^t", adamw(mask=of_table))], default=masked(adam(), of_w)
    ),
    "guards": lambda of_all, of_table, of_w: skip_not_finite(
        accumulate_gradients(adamw(mask=of_all), 2)
    ),
    "hyperparams": lambda of_all, of_table, of_w: with_hyperparams(adamw(mask=of_all), b1=0.5),
    "exact": lambda of_all, of_table, of_w: exact_rows(adamw(0.1, mask=of_all), "table"),
    "chain": lambda of_all, of_table, of_w: chain(
        scale(1.0), chain(masked(scale(1.0), "w"), masked(adam(), of_all))
    ),
}


@pytest.mark.parametrize("name", MASK_USERS)
def test_resolve_masks_replaces_mask_functions_by_the_bools_they_return(name):
    """At any depth, each with the bools of the leaves that it sees."""
    tx = MASK_USERS[name](many_rows, many_rows, many_rows)
    expected = MASK_USERS[name](OF_ALL, OF_TABLE, OF_W)
    resolved = tx.resolve_masks(BIG)
    assert resolved == expected
    assert hash(resolved) == hash(expected)
    assert resolved.resolve_masks(BIG) is resolved
    assert_same(resolved.init(BIG), tx.init(BIG))
    assert jax.eval_shape(lambda params: tx.resolve_masks(params).init(params), BIG)


def test_resolve_masks_returns_transforms_without_mask_functions_themselves():
    for tx in (
        adam(jnp.array(0.1)),
        adamw(mask="w"),
        chain(masked(adam(), "w"), masked(scale(1.0), {"table": True, "w": False, "none": None})),
        partition([("w", optax.adam(0.1))], default=optax.masked(optax.scale(1.0), many_rows)),
    ):
        assert tx.resolve_masks(BIG) is tx
    parts = chain(adam(jnp.array(0.1)), masked(scale(1.0), many_rows))
    resolved = parts.resolve_masks(BIG)
    assert resolved.transforms[0] is parts.transforms[0]


def test_a_resolved_mask_does_not_depend_on_the_number_of_rows():
    tx = add_decayed_weights(0.5, many_rows).resolve_masks(BIG)
    rows = {**BIG, "table": BIG["table"][:3]}
    updates, _ = tx.update(zeroed(rows), tx.init(BIG), rows)
    assert_same(updates["table"], 0.5 * rows["table"])
    assert not np.any(updates["w"])


# --- partition ----------------------------------------------------------------------------------


def test_partition_applies_the_first_match_or_the_default_to_each_leaf():
    tx = partition([("^enc", scale(2.0)), ("bias", scale(3.0))], default=scale(5.0))
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    factors = {"enc": {"kernel": 2, "bias": 2}, "head": {"kernel": 5, "bias": 3}}
    assert_same(updates, jax.tree.map(lambda f, g: f * g, factors, GRADS))
    assert state == ((), (), ())


def test_norms_states_and_parameters_of_a_part_have_only_its_leaves():
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


def test_without_a_default_each_leaf_must_match_a_pattern():
    with pytest.raises(ValueError, match=r"partition: no pattern of \['enc'\].*'head/bias'"):
        partition([("enc", scale(1.0))]).init(PARAMS)
    both = partition([("enc", scale(1.0)), ("head", scale(2.0))])
    both.update(GRADS, both.init(PARAMS), PARAMS)
    # A leaf that an outer mask hides, or that is `None`, need not match.
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


def test_partition_equals_optax_multi_transform():
    tx = partition([("kernel", optax.adam(0.1))], default=adam(0.2, eps=1e-8))
    labels = {top: {"kernel": "k", "bias": "b"} for top in PARAMS}
    theirs = optax.multi_transform({"k": optax.adam(0.1), "b": optax.adam(0.2)}, labels)
    assert_same_steps(tx, theirs)


def test_an_error_in_a_part_of_partition_has_the_whole_path():
    tx = partition([("kernel", scale_by_adam())], default=scale(1.0))
    wrong = {"enc": {**GRADS["enc"], "kernel": jnp.ones(3)}, "head": GRADS["head"]}
    with pytest.raises(ValueError, match=r"scale_by_adam: grads\['enc/kernel'\].*\(1, 2\)"):
        tx.update(wrong, tx.init(PARAMS), PARAMS)


def test_frozen_leaves_stay_as_they_are_whatever_their_gradients_are():
    """`scale(0.0)` would make frozen weights NaN, because 0 times NaN is NaN."""
    params = {"base": {"table": jnp.ones((4, 2)), "w": jnp.ones(3)}, "head": jnp.ones(3)}
    bad = {"base": {"table": jnp.full((4, 2), jnp.nan), "w": jnp.array([jnp.inf, 1.0, -2.0])}}
    rows = row_gradient(jnp.array([1]), jnp.full((1, 2), jnp.nan), num_rows=4)
    trained = skip_not_finite(adam(0.1))
    tx = partition([("^base/", set_to_zero())], default=trained)
    for table in (bad["base"]["table"], rows):
        grads = {"base": bad["base"] | {"table": table}, "head": jnp.full(3, jnp.nan)}
        for update in (tx.update, jax.jit(tx.update)):
            updates, state = update(grads, tx.init(params), params)
            assert_same(apply_updates(params, updates), params)
            assert skipped_steps(state) == 1
