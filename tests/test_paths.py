"""Patterns and trees of bools: which are accepted, and how they are compared and stored."""

import copy
import enum
import json
import pickle
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamjax
from adamjax import (
    accumulate_gradients,
    adam,
    adamw,
    add_decayed_weights,
    by_path,
    chain,
    exact_rows,
    from_config,
    masked,
    optional,
    partition,
    scale,
    scale_by_learning_rate,
    to_config,
)
from adamjax.paths import BoolTree, checked_patterns, checked_rules, unique_paths

PARAMS = {
    "enc": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    "head": {"kernel": jnp.ones((3, 1)), "none": None},
    "steps": jnp.arange(2),
}

# Functions from a pattern to a transform, and the owner that an error about the pattern names.
TRANSFORMS = {
    "masked": (lambda p: masked(adam(), p), "masked"),
    "adamw": (lambda p: adamw(1e-3, mask=p), "add_decayed_weights"),
    "decay": (lambda p: add_decayed_weights(0.1, p), "add_decayed_weights"),
    "partition": (lambda p: partition([(p, scale(0.5))], default=adam()), "partition"),
    "no default": (lambda p: partition([(p, scale(0.5)), ("", adam())]), "partition"),
    "rate": (lambda p: adam(by_path([(p, 0.1)], default=0.2)), "scale_by_learning_rate: by_path"),
    "one of two": (
        lambda p: scale_by_learning_rate(by_path({"kernel": 0.1, p: 0.2}, default=0.3)),
        "scale_by_learning_rate: by_path",
    ),
    "decay by path": (
        lambda p: adamw(0.1, weight_decay=by_path({p: 0.1}, default=0.2)),
        "add_decayed_weights: by_path",
    ),
    "max_rows": (
        lambda p: accumulate_gradients(adam(), 2, max_rows=[(p, 2)]),
        "accumulate_gradients: max_rows",
    ),
    "deep": (
        lambda p: adamjax.skip_not_finite(
            adamjax.with_hyperparams(chain(masked(adamw(mask=p), "enc"), scale(1.0)), b1=0.5)
        ),
        "add_decayed_weights",
    ),
}


# --- patterns that match nothing -----------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_init_refuses_a_pattern_that_matches_no_leaf(name):
    """From arrays, from their shapes, and under a trace. The error lists the paths."""
    make, owner = TRANSFORMS[name]
    tx = make("kernal")
    wanted = (
        rf"^{owner}: the pattern 'kernal' matches no leaf; the paths are \['enc/bias', "
        r"'enc/kernel'(, 'head/kernel', 'steps')?\]. If it may match none, write "
        r"adamjax.optional\('kernal'\)"
    )
    shapes = jax.eval_shape(lambda: PARAMS)
    for init in (tx.init, lambda params: jax.eval_shape(tx.init, params)):
        for params in (PARAMS, shapes):
            with pytest.raises(ValueError, match=wanted):
                init(params)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_update_refuses_a_pattern_that_matches_no_leaf(name, jit):
    """A state from a checkpoint has not gone through `init` with these parameters."""
    make, owner = TRANSFORMS[name]
    state = make(optional("kernal")).init(PARAMS)
    wanted = rf"^{owner}: the pattern 'kernal' matches no leaf; the paths are .*adamjax.optional"
    update = make("kernal").update
    with pytest.raises(ValueError, match=wanted):
        (jax.jit(update) if jit else update)(PARAMS, state, PARAMS)
    make(optional("kernal")).update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_update_accepts_a_pattern_whose_leaf_has_no_gradient(name):
    make, _ = TRANSFORMS[name]
    tx = make("^enc/bias$")
    grads = {**PARAMS, "enc": {"bias": None, "kernel": PARAMS["enc"]["kernel"]}}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert updates["enc"]["bias"] is None
    for leafless in ({}, {"a": None}):
        tx.update(leafless, tx.init(leafless), leafless)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_init_accepts_matching_and_optional_patterns(name):
    make, _ = TRANSFORMS[name]
    for pattern in ("^enc/bias$", optional("kernal"), optional("enc")):
        assert jax.eval_shape(make(pattern).init, PARAMS)
    # A tree without leaves is not checked.
    for leafless in (None, {}, {"a": None}):
        make(optional("kernal")).init(leafless)
        make("enc").init(leafless)


def test_an_error_lists_at_most_20_paths():
    params = {f"layer{i:02}": jnp.ones(1) for i in range(25)}
    with pytest.raises(ValueError, match=r"'layer19'\] and 5 more\. If"):
        masked(adam(), "kernel").init(params)


def test_matching_only_integers_is_accepted_and_matching_only_none_is_refused():
    assert jax.eval_shape(masked(adam(), "steps").init, PARAMS)
    with pytest.raises(ValueError, match="masked: the pattern 'none' matches no leaf, only None"):
        masked(adam(), "none").init(PARAMS)


def test_a_pattern_must_match_a_leaf_of_its_own_part():
    """A part of `masked` or `partition` sees only its own leaves."""
    rates = by_path([("bias", 0.1)], default=0.2)
    wanted = r"by_path: the pattern 'bias' matches no leaf, only None \(a part sees None .*"
    for tx in (
        masked(adam(rates), "head"),
        partition([("head", adam(rates))], default=scale(0.0)),
        partition([("enc", scale(0.0))], default=adam(rates)),
    ):
        with pytest.raises(ValueError, match=wanted + r"\['head/kernel'"):
            tx.init(PARAMS)
    partition([("head", scale(0.0))], default=adam(rates)).init(PARAMS)


@pytest.mark.parametrize(
    "make",
    [
        lambda *patterns: adam(by_path([(p, 0.1) for p in patterns], default=0.2)),
        lambda *patterns: partition([(p, scale(0.1)) for p in patterns], default=adam()),
        lambda *patterns: accumulate_gradients(adam(), 2, max_rows=[(p, 1) for p in patterns]),
    ],
    ids=["by_path", "partition", "max_rows"],
)
def test_init_refuses_a_pattern_whose_leaves_all_match_earlier_ones(make):
    for patterns, matches in (
        (("enc", "enc/kernel"), r"\['enc/kernel'\]"),
        (("bias", "kernel", "^enc"), r"\['enc/bias', 'enc/kernel'\]"),
        (("kernel", "kernel"), r"\['enc/kernel', 'head/kernel'\]"),
        (("", ""), ".*"),
    ):
        has_no_effect = rf": the pattern '{re.escape(patterns[-1])}' has no effect: "
        wanted = rf"{has_no_effect}{matches} match an earlier pattern"
        with pytest.raises(ValueError, match=wanted):
            make(*patterns).init(PARAMS)
        make(*patterns[:-1], optional(patterns[-1])).init(PARAMS)
    make("enc/kernel", "enc").init(PARAMS)
    make("enc", "kernel").init(PARAMS)
    # A catch-all pattern at the end may have no leaf left.
    make("enc", "head", "steps", "").init(PARAMS)


TABLES = {"user": jnp.ones((5, 2)), "item": jnp.ones((4, 2)), "w": jnp.ones(2), "n": 3}


def read(params):
    return params["user"][jnp.array([1])].sum() + params["item"][jnp.array([2])].sum()


@pytest.mark.slow
def test_each_pattern_of_several_must_match_a_table():
    wanted = (
        r"value_and_grad: the pattern 'itme' matches no leaf.*\['item', 'user', 'w'\].*optional"
    )
    for tables in (["user", "itme"], ("itme", "user"), "itme"):
        with pytest.raises(ValueError, match=wanted):
            adamjax.value_and_grad(read, tables)(TABLES)
    with pytest.raises(ValueError, match="the pattern '\\^n' matches no leaf of real floats"):
        adamjax.value_and_grad(read, ["user", "^n"])(TABLES)
    for tables, rows in (
        (["user", optional("itme")], ["user"]),
        (optional("itme"), []),
        (["user", "item", "u"], ["item", "user"]),
    ):
        grads = adamjax.grad(read, tables)(TABLES)
        assert [k for k, g in grads.items() if isinstance(g, adamjax.RowGradient)] == rows
        assert float(jnp.sum(grads["item"].to_dense() if "item" in rows else grads["item"])) == 2


def test_a_pattern_of_tables_is_refused_if_there_are_no_leaves():
    with pytest.raises(ValueError, match=r"the pattern 'user' matches no leaf.*are \[\]"):
        adamjax.grad(read, "user")({})


# --- objects that are not patterns, lists of patterns or pairs with a pattern ---------------------


class Names(str, enum.Enum):  # noqa: UP042
    KERNEL = "kernel"


# `TRANSFORMS`, and other functions of a pattern, with the owner that an error names.
CALLS_WITH_A_PATTERN = TRANSFORMS | {
    "a list": (lambda p: checked_patterns("x", ["a", p]), "x"),
    "pairs": (lambda p: checked_rules("x", [("a", 1), (p, 2)]), "x"),
    "optional": (optional, "optional"),
    "exact_rows": (lambda p: exact_rows(adam(), ["a", p]), "exact_rows"),
    "value_and_grad": (lambda p: adamjax.value_and_grad(read, ["a", p]), "value_and_grad"),
}


@pytest.mark.parametrize("name", CALLS_WITH_A_PATTERN)
def test_an_object_that_is_not_a_pattern_is_refused(name):
    make, owner = CALLS_WITH_A_PATTERN[name]
    owner = owner.split(": ")[-1]  # a `by_path` is checked before it is in a transform
    must = f"{owner}: a path pattern must be a str, got"
    for wrong, error, message in (
        (b"bias", TypeError, rf"{must} b'bias': write 'bias'"),
        (
            re.compile("bias", re.IGNORECASE),
            TypeError,
            rf"{must} re.compile\('bias', re.I\w*\): write its text, 'bias'",
        ),
        (3, TypeError, rf"{must} 3"),
        ("(", ValueError, rf"{owner}: '\(' is not a regular expression"),
    ):
        with pytest.raises(error, match=message):
            make(wrong)


def test_patterns_are_plain_strings():
    """A subclass of str is stored as a str, so it is compared and written to configs as one."""
    for pattern in (np.str_("kernel"), Names.KERNEL):
        tx = masked(adam(), pattern)
        assert tx == masked(adam(), "kernel")
        assert type(tx.pattern) is str
        assert from_config(to_config(tx)) == tx
        assert by_path({pattern: 0.1}, default=0.2) == by_path({"kernel": 0.1}, default=0.2)


@pytest.mark.parametrize(
    "patterns", [3, None, {"a": 1}, object()], ids=["int", "None", "dict", "object"]
)
def test_an_object_that_is_not_a_list_of_patterns_is_refused(patterns):
    for make in (lambda p: adamjax.value_and_grad(read, p), lambda p: exact_rows(adam(), p)):
        with pytest.raises(TypeError, match=": expected a path pattern or a list of them, got"):
            make(patterns)


def test_an_empty_list_of_patterns_is_refused():
    for make in (lambda p: adamjax.value_and_grad(read, p), lambda p: exact_rows(adam(), p)):
        for empty in ([], (), set()):
            with pytest.raises(ValueError, match=r"expected a path pattern .* got an empty list"):
                make(empty)


@pytest.mark.parametrize(
    "make",
    [
        lambda rules: by_path(rules, default=0.5),
        lambda rules: partition(rules, default=adam()),
        lambda rules: checked_rules("x", rules),
    ],
)
def test_rules_that_are_neither_pairs_nor_a_dictionary_are_refused(make):
    wanted = r": expected pairs \(pattern, value\) or a dictionary \{pattern: value\}, got "
    for rules, got in (
        ("ab", "the string 'ab'$"),
        (b"ab", "the string b'ab'$"),
        (3, "3$"),
        (None, "None$"),
        # The first match decides, and a set has no order.
        ({("a", 0.1), ("b", 0.2)}, r"\{\('[ab]', 0.\d\), "),
    ):
        with pytest.raises(TypeError, match=wanted + got):
            make(rules)
    for rules, got in (
        (["ab"], "the string 'ab' in the place of a pair"),
        (("ab", 0.1), "the string 'ab' in the place of a pair"),
        ([("a", 0.1, 0.2)], r"\('a', 0.1, 0.2\) in the place"),
        ([("a",)], r"\('a',\) in the place"),
        ([0.1], "0.1 in the place"),
        ([{"a": 0.1, "b": 0.2}], "{'a': 0.1, 'b': 0.2} in the place"),
        ([{"a"}], "{'a'} in the place"),
    ):
        with pytest.raises(ValueError, match=wanted + got):
            make(rules)


def test_a_dictionary_means_its_pairs_in_order():
    pairs = [("ab", 1e-3), ("a", 2e-3), (optional("c"), 3e-3)]
    for rules in (
        dict(pairs),
        types.MappingProxyType(dict(pairs)),
        iter(pairs),
        dict(pairs).items(),
    ):
        assert by_path(rules, default=0.1) == by_path(pairs, default=0.1)
    rates = by_path({"ab": 1e-3}, default=0.1)
    assert (rates.at("cab"), rates.at("b")) == (1e-3, 0.1)
    assert by_path({"b": 1.0, "a": 2.0}, default=0.1).at("ab") == 1.0
    parts = {"kernel": scale(2.0), "bias": adam()}
    assert partition(parts, default=adam()) == partition(list(parts.items()), default=adam())
    tx = accumulate_gradients(adam(), 2, max_rows={"kernel": 2, "bias": 1})
    assert tx == accumulate_gradients(adam(), 2, max_rows=[("kernel", 2), ("bias", 1)])
    assert tx.init(PARAMS).total["enc"]["kernel"].indices.shape == (2,)


def test_two_leaves_with_the_same_path_are_refused():
    assert unique_paths("x", PARAMS)[0] == "enc/bias"
    with pytest.raises(ValueError, match="x: two leaves have the path 'a/b'"):
        unique_paths("x", {"a/b": 1, "a": {"b": 2}})


# Patterns that exclude misspelt names: "baus" for "bias", "dce" for "enc".
MISSPELT_EXCLUSIONS = [
    "^(?!.*baus)",
    r"/(?!(baus|bais)$)[^/]*$",
    "(?<!dce/)kernel",
    "(?!.*enc)(?!.*baus)",
]


@pytest.mark.parametrize("pattern", MISSPELT_EXCLUSIONS)
def test_an_exclusion_that_excludes_nothing_is_refused(pattern):
    """If the name to exclude is misspelt, the pattern would match every leaf."""
    params = {"enc": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "w": {"kernel": jnp.ones(2)}}
    rates = by_path([(pattern, 0.1)], default=1.0)
    for tx in (adamw(mask=pattern), adam(rates)):
        with pytest.raises(
            ValueError, match=r"in the pattern .* excludes no leaf.*enc/bias.*optional"
        ):
            tx.init(params)
    right = pattern.replace("baus", "bias").replace("dce", "enc")
    adamw(mask=right).init(params)
    adamw(mask=optional(pattern)).init(params)
    # The leaves of a list have no names.
    with pytest.raises(ValueError, match=r"excludes no leaf.*a list of bools|matches no leaf"):
        adamw(mask=right).init([jnp.ones(2), jnp.ones(2)])


def test_an_excluded_leaf_may_belong_to_another_part():
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"bias": jnp.ones(2)}}
    inner = adamw(mask="^(?!.*bias)")
    partition({"^a": inner}, default=adam()).init(params)


# --- optional -------------------------------------------------------------------------------------


def test_an_optional_pattern_is_a_string_that_differs_from_the_plain_one():
    pattern = optional("bias$")
    assert isinstance(pattern, str)
    assert (str(pattern), f"{pattern}", repr(pattern)) == ("bias$", "bias$", "optional('bias$')")
    assert pattern != "bias$"
    assert "bias$" != pattern  # noqa: SIM300
    assert not pattern == "bias$"  # noqa: SIM201
    assert {pattern: 1, "bias$": 2}[optional("bias$")] == 1
    for same in (optional(pattern), pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern)):
        assert type(same) is optional
        assert same == pattern
        assert hash(same) == hash(pattern)
    assert re.search(pattern, "x/bias")


@pytest.mark.parametrize(
    "make",
    [make for make, _ in TRANSFORMS.values()] + [lambda p: exact_rows(adam(), ["kernel", p])],
    ids=[*TRANSFORMS, "exact_rows"],
)
def test_copies_pickles_and_configs_preserve_optional(make):
    tx, plain = make(optional("bias$")), make("bias$")
    assert tx != plain
    assert jax.tree.structure(tx) != jax.tree.structure(plain)
    assert "optional('bias$')" in repr(tx)
    assert "optional" not in repr(plain)
    rebuilt = [
        pickle.loads(pickle.dumps(tx)),
        copy.deepcopy(tx),
        tx.replace(),
        jax.tree.map(lambda x: x, tx),
        from_config(json.loads(json.dumps(to_config(tx)))),
    ]
    for same in rebuilt:
        assert same == tx
        assert hash(same) == hash(tx)
        assert repr(same) == repr(tx)


def test_jit_distinguishes_optional_patterns_from_plain_ones():
    init = jax.jit(lambda tx, params: tx.init(params))
    init(adamw(mask=optional("kernal")), PARAMS)
    with pytest.raises(ValueError, match="'kernal' matches no leaf"):
        init(adamw(mask="kernal"), PARAMS)


def test_a_config_has_its_own_form_of_an_optional_pattern():
    config = to_config(masked(scale(0.5), optional("bias$")))
    assert config["pattern"] == {"optional": "bias$"}
    with pytest.raises(
        TypeError, match=r"from_config: the config.pattern: .* must be a str, got 3"
    ):
        from_config({**config, "pattern": {"optional": 3}})
    keras = {"name": "Adam", "pattern_lrs": [{"patterns": [optional("bert")], "lr": 1e-5}]}
    assert from_config(keras).transforms[1].learning_rate.patterns == (optional("bert"),)


# --- trees of bools -------------------------------------------------------------------------------


def test_a_tree_of_bools_hashes_and_compares():
    mask = BoolTree({"a": True, "b": [np.bool_(False), None]})
    same = BoolTree({"b": [False, None], "a": True})
    assert mask == same
    assert hash(mask) == hash(same)
    assert repr(mask) == "{'a': True, 'b': [False, None]}"
    for other in (True, {"a": True, "b": False}, {"a": True, "b": (False, None)}):
        assert mask != BoolTree(other)
    assert mask != {"a": True, "b": [False, None]}
    for copied in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert copied == mask


def test_a_bool_at_a_subtree_counts_for_all_its_leaves():
    mask = BoolTree({"a": True, "b": [np.bool_(False), None]})
    assert mask.flags_for("x", {"a": {"c": 1, "d": None}, "b": [2, None]}) == [
        True,
        True,
        False,
        False,
    ]
