"""Configs: transforms are written as JSON and read back, and Keras' dictionaries are read.

Transforms made from Keras' dictionaries are compared with Keras 3 itself, and with trajectories of
tf.keras' optimizers in data/keras_f64.npz. Each line of the table of Keras' names in
docs/coming-from.md has a test, `test_line_...`.
"""

import copy
import dataclasses
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import re
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from oracle import STEPS, VARIANTS, Oracle, assert_follows, rounded, run
from support import assert_close, assert_same, enable_x64, jit_and_traces
from test_laws import CASES

import adamjax
from adamjax import (
    Schedule,
    Transform,
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
    constant,
    cosine_decay,
    exact_rows,
    exponential_decay,
    get_slot,
    inverse_time_decay,
    learning_rate,
    masked,
    master_weights,
    nadam,
    partition,
    piecewise_constant,
    polynomial_decay,
    row_gradient,
    scale,
    scale_by_adam,
    scale_by_adamax,
    scale_by_amsgrad,
    scale_by_learning_rate,
    set_hyperparams,
    skip_not_finite,
    slot_names,
    step_count,
    sum_over,
    train_step,
    value_and_grad,
    warmup,
    weight_ema,
    with_hyperparams,
)
from adamjax.config import _own_classes, from_config, to_config

os.environ.setdefault("KERAS_BACKEND", "jax")


def needs_keras(test):
    missing = importlib.util.find_spec("keras") is None
    test = pytest.mark.skipif(missing, reason="Keras is not installed")(test)
    # Keras' variables do not have NumPy 2's __array__ yet.
    return pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")(test)


def through_json(config):
    """The config, written to JSON and read back."""
    return json.loads(json.dumps(config, allow_nan=False))


def assert_round_trip(tx, **options):
    config = to_config(tx)
    assert through_json(config) == config
    before = copy.deepcopy(config)
    made = from_config(through_json(config), **options)
    assert made == tx
    assert repr(made) == repr(tx)
    assert to_config(made) == config == before


# --- round trips ----------------------------------------------------------------------------------

# The cases of the laws that a config cannot describe, and the errors.
WITHOUT_CONFIG = {
    "masked by a function": "masked.tx.transforms[1].mask is the function matrices",
    "optax in our chain": "chain.transforms[1] is foreign(",
    "ours in optax.chain": "foreign is foreign(",
    "shard_state": "its mesh is made of this process' devices",
}
# Transforms and schedules that no case of the laws has.
NOT_IN_THE_LAWS = [
    constant(0.5),
    inverse_time_decay(cosine_decay(0.1, 10), 1, 0.25, staircase=True),
    exponential_decay(0.1, 10, 0.5),
    piecewise_constant([100, 200.5], [1.0, 0.5, 0.25]),
    polynomial_decay(0.1, 10, cycle=True),
    warmup(polynomial_decay(0.1, 10), 3),
    by_path([("^bert", 2e-5), ("bias$", warmup(constant(1.0), 3))], default=1e-3),
    sum_over("batch"),
    sum_over(("batch", "model")),
    partition([("bias", scale(0.0))]),
    accumulate_gradients(adam(), 2, max_rows=[("table", 8), ("^head", 4)]),
    exact_rows(adamax(0.1), ["table", "^words"], history=4096),
    adam(m_dtype=jnp.bfloat16, v_dtype="float32", rows="lazy"),
    master_weights(adam(0.1)),
]


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_every_case_of_the_laws_survives_a_round_trip_or_is_refused(case):
    if case.name not in WITHOUT_CONFIG:
        assert_round_trip(case.tx)
        assert from_config(to_config(case.tx)) == case.make()
        return
    with pytest.raises(TypeError, match=re.escape(WITHOUT_CONFIG[case.name])):
        to_config(case.tx)


@pytest.mark.parametrize(
    "tx",
    NOT_IN_THE_LAWS,
    ids=[f"{type(tx).__name__}-{i}" for i, tx in enumerate(NOT_IN_THE_LAWS)],
)
def test_transforms_that_are_not_in_the_laws_survive_a_round_trip(tx):
    assert_round_trip(tx)


def classes_in(config):
    if isinstance(config, dict):
        if "class" in config:
            yield config["class"]
        config = list(config.values())
    if isinstance(config, list):
        for item in config:
            yield from classes_in(item)


def test_every_class_has_a_config():
    txs = [case.tx for case in CASES if case.name not in WITHOUT_CONFIG] + NOT_IN_THE_LAWS
    seen = {name for tx in txs for name in classes_in(to_config(tx))}
    public = {
        name
        for name in adamjax.__all__
        if isinstance(getattr(adamjax, name), type)
        and issubclass(getattr(adamjax, name), adamjax.data.Data)
        and name[0].islower()  # transforms and schedules, not `RowGradient` and the base classes
    }
    assert seen == set(_own_classes()) == public - {"shard_state"}


def test_a_config_has_the_class_and_all_fields_of_each_part():
    tx = chain(clip_by_value(1), scale_by_learning_rate(by_path([("b$", 0.5)], default=1.0)))
    assert to_config(tx) == {
        "class": "chain",
        "transforms": [
            {"class": "clip_by_value", "limit": 1},
            {
                "class": "scale_by_learning_rate",
                "learning_rate": {
                    "class": "by_path",
                    "patterns": ["b$"],
                    "values": [0.5],
                    "default": 1.0,
                },
            },
        ],
    }


def test_fields_with_defaults_may_be_left_out():
    assert from_config({"class": "scale_by_adam", "nesterov": True}) == scale_by_adam(nesterov=True)
    config = {"class": "exact_rows", "tx": to_config(adam(0.1)), "tables": ["table"]}
    assert from_config(config) == exact_rows(adam(0.1), "table")


betas = st.floats(0, 1, exclude_max=True)
positives = st.floats(1e-30, 1e30)
patterns = st.text(st.sampled_from("abc/^$."), max_size=5)


def arrays(numbers):
    dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
    return st.builds(jnp.asarray, numbers, dtypes)


numbers = st.floats(0, 1e4) | st.integers(0, 1000) | arrays(st.floats(0, 1e4))
schedules = st.recursive(
    st.builds(constant, numbers) | st.builds(cosine_decay, numbers, positives),
    lambda inner: (
        st.builds(warmup, inner, st.integers(1, 10**6), numbers)
        | st.builds(inverse_time_decay, inner, positives, numbers, st.booleans())
    ),
    max_leaves=3,
)
rates = (
    numbers
    | schedules
    | st.builds(
        lambda rules, default: by_path(rules, default=default),
        st.lists(st.tuples(patterns, numbers | schedules), max_size=3),
        numbers,
    )
)


def in_order(parts):
    """A chain with its learning rates last, because a chain refuses weight decay after them."""
    return chain(*sorted(parts, key=lambda tx: tx.descends))


transforms = st.recursive(
    st.builds(scale_by_adam, betas, betas | arrays(st.floats(0, 0.75)), eps=positives)
    | st.builds(clip_by_norm, positives)
    | st.builds(add_decayed_weights, rates, st.none() | patterns)
    | st.builds(scale_by_learning_rate, rates),
    lambda inner: (
        st.lists(inner, max_size=3).map(in_order)
        | st.builds(masked, inner, patterns)
        | st.builds(accumulate_gradients, inner, st.integers(1, 100))
        | st.builds(partition, st.lists(st.tuples(patterns, inner), max_size=2), default=inner)
    ),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(transforms)
def test_drawn_transforms_survive_a_round_trip(tx):
    assert_round_trip(tx)


class odd(Transform):
    """A transform with fields of every type that a config can hold."""

    number: float
    items: list
    table: dict
    flag: bool = False
    text: str = "text"
    nothing: None = None
    transform: Transform = scale(0.5)
    fixed: tuple = ()

    def init(self, params):
        return ()


class harmonic(Schedule):
    first: float = 1.0
    values: tuple = dataclasses.field(default_factory=tuple)

    def __call__(self, count):
        return self.first / (1 + count)


CUSTOM = [
    odd(1.0, [], {}),
    odd(float("inf"), [1, [2.0]], {"a": (1, -float("inf")), "class": "b"}, True, "", fixed=(1,)),
    odd(-0.0, [scale(1.0)], {"x": {"array": 1}}, transform=chain(adam(harmonic(0.5)), scale(2.0))),
]


@pytest.mark.parametrize("tx", CUSTOM)
def test_custom_classes_survive_a_round_trip(tx):
    assert_round_trip(tx, custom=[odd, harmonic])
    assert_round_trip(masked(adam(harmonic()), "w"), custom=(harmonic,))


def test_negative_zero_and_large_integers_are_exact():
    made = from_config(through_json(to_config(odd(-0.0, [2**80], {}))), custom=[odd])
    assert np.signbit(made.number)
    assert made.items == [2**80]


def test_a_default_factory_makes_a_field_that_was_left_out():
    assert from_config({"class": "harmonic"}, custom=[harmonic]) == harmonic(1.0, ())


DTYPES = ["bfloat16", "float16", "float32", "int8", "int32", "uint32", "bool", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_keep_value_and_dtype(dtype):
    rng = np.random.default_rng(0)
    for shape in ((), (3,), (2, 1, 3)):
        values = rng.normal(size=shape) * 50
        x = jnp.asarray(values > 0 if dtype == "bool" else np.abs(values)).astype(dtype)
        tx = odd(x, [], {})
        assert_round_trip(tx, custom=[odd])
        assert_same(from_config(to_config(tx), custom=[odd]).number, x)


def test_extreme_floats_in_arrays_are_exact():
    info = jnp.finfo(jnp.float32)
    extremes = [np.inf, -np.inf, info.max, info.tiny, info.smallest_subnormal, 0.1, -0.0]
    x = jnp.asarray(np.array(extremes, np.float32))
    assert_same(from_config(through_json(to_config(odd(x, [], {}))), custom=[odd]).number, x)
    nan = from_config(through_json(to_config(odd(x * jnp.nan, [], {}))), custom=[odd])
    assert np.isnan(nan.number).all()


def test_float64_arrays_need_x64():
    with enable_x64():
        tx = adam(jnp.asarray(np.array(0.1)), b1=jnp.float32(0.9))
        config = to_config(tx)
        assert_round_trip(tx)
        assert from_config(through_json(config)).transforms[1].learning_rate.dtype == "float64"
    with pytest.raises(ValueError, match=r"learning_rate is an array of dtype float64.*x64"):
        from_config(config)


def test_weakly_typed_arrays_become_strongly_typed():
    made = from_config(to_config(adam(jnp.asarray(0.1))))
    assert made == adam(jnp.asarray(0.1))
    assert not made.transforms[1].learning_rate.weak_type


def test_an_array_of_a_hundred_rates_survives_a_round_trip():
    tx = adam(jnp.logspace(-4, 1, 100))
    assert_round_trip(tx)


# --- refused transforms and configs ---------------------------------------------------------------


def mask(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adamw(mask=mask), "chain.transforms[1].mask is the function mask"),
        (lambda: masked(adam(), mask), "masked.pattern is the function mask"),
        (lambda: adam(lambda count: 0.1), "chain.transforms[1].learning_rate is <function"),
        (
            lambda: adam(by_path([("b", optax.constant_schedule(1.0))], default=1.0)),
            "chain.transforms[1].learning_rate.values[0] is <function",
        ),
        (lambda: warmup(lambda count: 1.0, 3), "warmup.schedule is <function"),
        (lambda: optax.adam(0.1), "foreign is foreign("),
        (lambda: skip_not_finite(optax.sgd(0.1)), "skip_not_finite.tx is foreign("),
        (lambda: odd(np.float32(1), [], {}), "odd.number is"),
        (lambda: odd(1.0, [1j], {}), "odd.items[0] is 1j of type complex"),
        (lambda: odd(1.0, [], {1: 2}), "odd.table is {1: 2} of type dict"),
        (lambda: odd(1.0, [], {"f": mask}), "odd.table['f'] is the function mask"),
        (lambda: odd(jnp.array(1j), [], {}), "odd.number is an array of dtype complex64"),
        (lambda: odd(jax.random.key(0), [], {}), "odd.number is an array of dtype key"),
        (lambda: odd(jnp.zeros((0, 3)), [], {}), "odd.number is an empty array of shape (0, 3)"),
        (lambda: 3, "expected a transform"),
    ],
)
def test_values_that_a_config_cannot_hold_are_refused_with_their_place(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        to_config(make())


def test_traced_values_are_refused():
    def write_config(rate):
        to_config(adam(rate))
        return rate

    with pytest.raises(TypeError, match=r"transforms\[1\].learning_rate is being traced"):
        jax.jit(write_config)(0.1)


def test_two_classes_of_one_name_are_refused():
    mine = type("scale", (Transform,), {"__annotations__": {"x": float}})
    with pytest.raises(TypeError, match="scale is the name of one of adamjax's own"):
        to_config(mine(1.0))
    with pytest.raises(ValueError, match="scale is the name of one of adamjax's own"):
        from_config({"class": "identity"}, custom=[mine])
    other_odd = type("odd", (Transform,), {})
    with pytest.raises(ValueError, match="odd is the name of two classes"):
        from_config({"class": "identity"}, custom=[odd, other_odd])
    with pytest.raises(TypeError, match=r"subclasses of adamjax\.Transform"):
        from_config({"class": "identity"}, custom=[adam])


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            "{}",
            TypeError,
            "expected a dictionary, as to_config or Keras writes it, got '{}' of type str",
        ),
        ("{}", TypeError, "parse it by json.loads"),
        ({}, ValueError, "neither 'class' (adamjax's) nor 'class_name'"),
        (
            {"class_name": "Sequential", "config": {}, "compile_config": {"optimizer": {}}},
            ValueError,
            "of a model, as in config.json of a .keras file, expected that of an optimizer: pass "
            'config["compile_config"]["optimizer"]',
        ),
        ({"class": "scael", "factor": 1.0}, ValueError, "the config is of class 'scael'"),
        (
            {"class": "Transform"},
            ValueError,
            "class 'Transform', which adamjax does not have",
        ),
        (
            {"class": "function_schedule", "function": "f"},
            ValueError,
            "is of class 'function_schedule'",
        ),
        ({"class": "foreign"}, ValueError, "is of class 'foreign'"),
        ({"class": "odd"}, ValueError, "from_config(config, custom=[odd])"),
        ({"class": "scale"}, ValueError, "of class scale lacks 'factor'"),
        (
            {"class": "scale", "factor": 1.0, "facto": 2.0},
            ValueError,
            "of class scale has the unknown key 'facto'; expected ['factor']",
        ),
        (
            {"class": "exact_rows", "tx": to_config(adam()), "tables": ["t"], "fixed": []},
            ValueError,
            "unknown key 'fixed'",
        ),
        (
            {"class": "chain", "transforms": [{"class": "scale_by_adam", "b1": 2.0}]},
            ValueError,
            "the config.transforms[0]: scale_by_adam: b1 must be in [0, 1), got 2.0",
        ),
        (
            {"class": "scale", "factor": "1"},
            TypeError,
            "the config: scale: factor must be a number that is finite, got '1'",
        ),
        (
            {"class": "scale", "factor": {"x": 1}},
            ValueError,
            "factor is a dictionary with the keys",
        ),
        ({"class": ["scale"]}, ValueError, "the config is of class ['scale']"),
        (
            {"class": "scale", "factor": {"array": 1.0, "dtype": "float33"}},
            TypeError,
            "the config.factor: data type 'float33' not understood",
        ),
        (
            {"class": "scale", "factor": {"array": [[1.0], 2.0], "dtype": "float32"}},
            ValueError,
            "the config.factor: setting an array element",
        ),
        (
            {"class": "scale", "factor": {"float": "big"}},
            ValueError,
            "the config.factor: could not",
        ),
        ({"class": "scale", "factor": {1}}, TypeError, "factor is {1} of type set"),
        ({"class": "masked", "tx": 3, "pattern": "w"}, TypeError, "expected a transform"),
        (
            {"class": "by_path", "patterns": "ab", "values": [0.1, 0.2], "default": 0.3},
            TypeError,
            "by_path: expected lists of patterns and of their values, got 'ab'",
        ),
        (
            {"class": "by_path", "patterns": ["a", "b"], "values": [0.1], "default": 0.3},
            ValueError,
            "by_path: expected one value for each pattern, got 1 for ['a', 'b']",
        ),
        (
            {"class": "partition", "patterns": [], "transforms": [to_config(adam())]},
            ValueError,
            "lacks 'default'",
        ),
        (
            {"class": "partition", "patterns": [], "transforms": [1], "default": None},
            ValueError,
            "partition: expected one value for each pattern, got 1 for []",
        ),
    ],
)
def test_wrong_configs_are_refused(config, error, message):
    with pytest.raises(error, match=re.escape(message)):
        from_config(config)


# --- Keras 3 itself -------------------------------------------------------------------------------

ORACLE = Oracle("keras_f64.npz")
# In float64, Keras rounds the rate to float32, and so does the config, which is made from Keras'
# variable. Everything else is float64, except the cosine of a schedule, which Keras computes in
# float32.
EXACT_TOLERANCE, COSINE_TOLERANCE = 1e-12, 2e-7

ACCUMULATED = {"gradient_accumulation_steps": 2}
EVERYTHING = {"weight_decay": 0.1, "use_ema": True, "ema_momentum": 0.9}
# The arguments of `keras_optimizer`, by the name of the run.
RUNS = {
    "Adam": ("Adam", {}),
    "Adam, hyper": ("Adam", {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3}),
    "Adam, amsgrad": ("Adam", {"amsgrad": True, "beta_2": 0.9, "clipnorm": 0.5}),
    "Adam, decaying": ("Adam", {"weight_decay": 0.1, "global_clipnorm": 0.7}),
    "Adam, zero decay": ("Adam", {"weight_decay": 0.0, "clipvalue": 0.3}),
    "Adam, no clips": ("Adam", {"clipnorm": 0.0}),
    "Adam, exponential": ("Adam", {}, ("ExponentialDecay", 0.1, 3, 0.5)),
    "Adam, staircase": ("Adam", {}, ("ExponentialDecay", 0.1, 3, 0.5, True)),
    "Adam, inverse": ("Adam", {"weight_decay": 0.1}, ("InverseTimeDecay", 0.1, 2, 0.5)),
    "Adam, piecewise": ("Adam", {}, ("PiecewiseConstantDecay", [2, 5], [0.1, 0.05, 0.2])),
    "Adam, polynomial": ("Adam", {}, ("PolynomialDecay", 0.1, 6, 0.01, 2.0)),
    "Adam, cycling": ("Adam", {}, ("PolynomialDecay", 0.1, 4, 0.01, 0.5, True)),
    "Adam, cosine": ("Adam", {}, ("CosineDecay", 0.1, 6, 0.25)),
    "Adam, warm-up": ("Adam", {}, ("CosineDecay", 0.01, 5, 0.1, "CosineDecay", 0.1, 3)),
    "Adam, no warm-up": ("Adam", {}, ("CosineDecay", 0.01, 5, 0.1, "CosineDecay", 0.1, 0)),
    "AdamW": ("AdamW", {}),
    "AdamW, all": ("AdamW", {**EVERYTHING, "amsgrad": True, "clipvalue": 0.3}),
    "Adamax": ("Adamax", {}),
    "Adamax, all": ("Adamax", {**EVERYTHING, "epsilon": 1e-3, "global_clipnorm": 0.7}),
    "Nadam": ("Nadam", {}),
    "Nadam, all": ("Nadam", {**EVERYTHING, "beta_1": 0.8, "clipnorm": 0.5}),
    "Adam, accumulated": ("Adam", {**ACCUMULATED, "global_clipnorm": 0.7}),
    "AdamW, accumulated": (
        "AdamW",
        {**ACCUMULATED, **EVERYTHING, "gradient_accumulation_steps": 3},
        ("InverseTimeDecay", 0.1, 2, 0.5),
    ),
    "Nadam, accumulated": ("Nadam", {**ACCUMULATED, **EVERYTHING, "clipnorm": 0.5}),
}


def keras_optimizer(keras, name, options, schedule=None):
    """An optimizer of Keras.

    Args:
      name: its class.
      options: its arguments, except the learning rate.
      schedule: the class of a schedule and the schedule's arguments; without it the rate is 0.05.
    """
    rate = 0.05
    if schedule is not None:
        rate = getattr(keras.optimizers.schedules, schedule[0])(*schedule[1:])
    return getattr(keras.optimizers, name)(learning_rate=rate, **options)


def keras_run(keras, optimizer, precision):
    """The weights and averages in ten steps of a Keras optimizer, with a leading axis of steps."""
    leaves, treedef = jax.tree.flatten(ORACLE.start)
    weights = [keras.Variable(p, dtype=precision) for p in leaves]
    optimizer.build(weights)
    averages = optimizer._model_variables_moving_average if optimizer.use_ema else []
    history, apply = [], optimizer.apply
    if optimizer.gradient_accumulation_steps:
        # Outside of `jit`, JAX would compile its `cond` again in every step.
        stateless = jax.jit(optimizer.stateless_apply)

        def apply(grads):
            slots = optimizer.variables
            # The slots are the first argument, and the weights the first result.
            new_weights, new_slots = stateless(
                [v.value for v in slots], grads, [v.value for v in weights]
            )
            new_values = [*new_weights, *new_slots]
            for v, value in zip([*weights, *slots], new_values, strict=True):
                v.assign(value)

    for t in range(STEPS):
        apply([jnp.asarray(g[t], precision) for g in jax.tree.leaves(ORACLE.grads)])
        history.append([np.asarray(v.value) for v in [*weights, *averages]])
    steps = [np.stack(values) for values in zip(*history, strict=True)]
    n = len(leaves)
    return treedef.unflatten(steps[:n]), treedef.unflatten(steps[n:]) if averages else None


@needs_keras
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(
    "keras_arguments", RUNS.values(), ids=[name.replace(", ", "-") for name in RUNS]
)
@pytest.mark.slow
def test_a_transform_from_keras_3_has_its_trajectory(keras, keras_arguments, precision):
    with enable_x64(precision == "float64"):
        optimizer = keras_optimizer(keras, *keras_arguments)
        config = keras.optimizers.serialize(optimizer)
        expected, expected_averages = keras_run(keras, optimizer, precision)
    # `get_config` does not contain the class, but gives the same transform.
    tx = from_config(through_json(config))
    assert from_config(optimizer.get_config()) == tx
    micro_batches = optimizer.gradient_accumulation_steps or 1
    weights, averages, _ = run(tx, ORACLE.start, ORACLE.grads, precision, jit=micro_batches > 1)
    tolerance = COSINE_TOLERANCE if "CosineDecay" in keras_arguments[-1] else EXACT_TOLERANCE

    def follows(actual, expected, start):
        assert_follows(actual, expected, start, precision=precision, tolerance=tolerance)

    jax.tree.map(follows, weights, expected, ORACLE.start)
    assert (averages is not None) == optimizer.use_ema
    if averages is None:
        return

    def follows_from_the_start(actual, expected, weights, start):
        # Keras' average starts from the weights after the first step, ours from those before it.
        # This difference decays by the momentum. Until the first step Keras has no average.
        first = micro_batches - 1  # the call that takes the first step; earlier calls accumulate
        t = np.arange(STEPS).reshape(-1, *[1] * start.ndim) - first
        difference = optimizer.ema_momentum ** np.maximum(t + 1.0, 0) * (start - weights[first])
        expected = np.where(t < 0, start, expected.astype(np.float64) + difference)
        follows(actual, expected, start)

    jax.tree.map(follows_from_the_start, averages, expected_averages, expected, ORACLE.start)


@needs_keras
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "Nadam"])
def test_defaults_are_those_of_keras(keras, name):
    optimizer = getattr(keras.optimizers, name)(learning_rate=0.5)
    tx = from_config(optimizer.get_config())
    # A dictionary written by hand, without the options that have their default.
    assert from_config({"class_name": name, "config": {"learning_rate": 0.5}}) == tx
    assert from_config({"class_name": name.lower(), "config": {"learning_rate": 0.5}}) == tx
    ours = {"Adam": adam, "AdamW": adamw, "Nadam": nadam}
    if name in ours:
        assert tx == ours[name](0.5)
    assert from_config({"class_name": name}).transforms[-1].learning_rate == 1e-3


SCHEDULES = [arguments[2] for arguments in RUNS.values() if len(arguments) > 2]


@needs_keras
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule[0])
def test_a_schedule_from_keras_has_its_rates(keras, schedule):
    theirs = getattr(keras.optimizers.schedules, schedule[0])(*schedule[1:])
    config = keras.optimizers.schedules.serialize(theirs)
    ours = from_config(through_json(config))
    assert from_config(config) == ours
    assert from_config({"class_name": schedule[0], "config": theirs.get_config()}) == ours
    for count in range(12):
        np.testing.assert_allclose(ours(count), float(theirs(count)), rtol=5e-6, atol=1e-9)


@needs_keras
def test_names_that_keras_numbers_are_read(keras):
    for name in ("Adam", "AdamW", "Adamax", "Nadam"):
        optimizers = [getattr(keras.optimizers, name)() for _ in range(11)]
        configs = [optimizer.get_config() for optimizer in optimizers]
        assert len({config["name"] for config in configs}) == 11
        assert len({repr(from_config(config)) for config in configs}) == 1


@needs_keras
def test_averages_that_overwrite_differ_by_their_start(keras):
    # The difference that from_config documents: momentum^t (p_0 - p_1) at the overwriting step.
    optimizer = keras.optimizers.Adam(
        0.05, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3
    )
    tx = from_config(optimizer.get_config())
    assert tx.transforms[-1] == weight_ema(0.9, 3)
    with enable_x64():
        expected, _ = keras_run(keras, optimizer, "float64")
    weights, _, _ = run(tx, ORACLE.start, ORACLE.grads, "float64")

    def differs(actual, expected, start):
        assert_follows(
            actual[:2], expected[:2], start, precision="float64", tolerance=EXACT_TOLERANCE
        )
        difference = 0.9**3 * (start - expected[0])
        assert np.abs(difference).max() > 1e-2
        np.testing.assert_allclose(actual[2] - expected[2], difference, rtol=0, atol=1e-9)

    jax.tree.map(differs, weights, expected, ORACLE.start)


# --- dictionaries of tf.keras ---------------------------------------------------------------------

CLIP_ARGUMENTS = {
    "clipvalue": {"clipvalue": 0.3},
    "clipnorm": {"clipnorm": 0.5},
    "global": {"global_clipnorm": 0.7},
    "valnorm": {"clipvalue": 0.3, "clipnorm": 0.5},
}
KERAS_CLASS = {"adamw": "AdamW", "adamax": "Adamax", "nadam": "Nadam"}


def schedule_config(initial, module):
    """`InverseTimeDecay(initial, 2, 0.5)`, as `serialize` writes it with or without modules."""
    config = {
        "initial_learning_rate": initial,
        "decay_steps": 2,
        "decay_rate": 0.5,
        "staircase": False,
        "name": None,
    }
    plain = {"class_name": "InverseTimeDecay", "config": config}
    if not module:
        return plain
    return {"module": "keras.optimizers.schedules", **plain, "registered_name": None}


def written_by(system, optimizer, variant):
    """The dictionary that a system writes for a case.

    The systems are those of data/README.md: "legacy" and "new" are the two generations of tf_keras.
    A number that a system keeps in a variable is a NumPy float32 in the dictionary.
    """
    v = VARIANTS[variant]
    rate = np.float32(v.learning_rate)
    clips = CLIP_ARGUMENTS.get(variant, {})
    config = {"beta_1": v.b1, "beta_2": v.b2, "epsilon": v.eps}
    if optimizer not in ("adamax", "nadam"):
        config["amsgrad"] = optimizer == "amsgrad"
    if system == "new":
        config = {
            "name": KERAS_CLASS.get(optimizer, "Adam"),
            "weight_decay": v.weight_decay,
            **dict.fromkeys(("clipnorm", "global_clipnorm", "clipvalue")),
            **clips,
            "use_ema": v.momentum is not None,
            "ema_momentum": 0.99 if v.momentum is None else v.momentum,
            "ema_overwrite_frequency": v.overwrite_frequency,
            "jit_compile": False,
            "is_legacy_optimizer": False,
            "learning_rate": schedule_config(rounded(0.05), True) if v.schedule else rate,
            **config,
        }
        if optimizer == "adamw" and v.weight_decay is None:
            config["weight_decay"] = 0.004
        return {
            "module": "keras.optimizers",
            "class_name": KERAS_CLASS.get(optimizer, "Adam"),
            "config": config,
            "registered_name": None,
        }
    config = {
        "name": KERAS_CLASS.get(optimizer, "Adam"),
        **clips,
        "learning_rate": schedule_config(rounded(0.05), False) if v.schedule else rate,
        "decay": v.rate_decay,
        **config,
        "beta_1": np.float32(v.b1),
        "beta_2": np.float32(v.b2),
    }
    if system == "multilr":
        config["decay"] = np.float32(v.rate_decay)
        config["pattern_lrs"] = [{"patterns": ["^bert"], "lr": rounded(0.02)}]
        return {"class_name": "AdamMultilr", "config": config | {"name": "AdamMultilr"}}
    if system == "legacy":
        config["is_legacy_optimizer"] = True
    return {"class_name": KERAS_CLASS.get(optimizer, "Adam"), "config": config}


TF_KERAS_CASES = [case for case in ORACLE.weights if not case.startswith("k3jax")]


@pytest.mark.parametrize(
    "case", TF_KERAS_CASES, ids=[case.replace("|", "-") for case in TF_KERAS_CASES]
)
def test_a_transform_from_tf_keras_has_its_trajectory(case):
    system, optimizer, variant = case.split("|")
    config = written_by(system, optimizer, variant)
    tx = from_config(config)
    assert from_config(config["config"]) == tx
    # The system `new` rounds beta to float32 in its powers: data/README.md.
    tolerance = 2e-5 if system == "new" else 2e-6
    weights, averages, _ = run(tx, ORACLE.start, ORACLE.grads, "float64")
    jax.tree.map(
        lambda *leaves: assert_follows(*leaves, precision="float64", tolerance=tolerance),
        weights,
        ORACLE.weights[case],
        ORACLE.start,
    )
    assert (averages is not None) == (case in ORACLE.averages)
    if averages is not None:
        expected, start = ORACLE.averages[case], ORACLE.start["bert"]["emb"]
        assert_follows(
            averages["bert"]["emb"], expected, start, precision="float64", tolerance=tolerance
        )


def test_the_cases_of_tf_keras_are_of_three_systems():
    assert {case.split("|")[0] for case in TF_KERAS_CASES} == {"legacy", "new", "multilr"}
    assert len(TF_KERAS_CASES) == 71


# --- differences between the versions of Keras ----------------------------------------------------

# Options that show which version wrote a dictionary.
LEGACY = {"is_legacy_optimizer": True}
KERAS_2 = {"is_legacy_optimizer": False}
KERAS_3_0 = {"loss_scale_factor": None}
KERAS_3 = {"loss_scale_factor": None, "gradient_accumulation_steps": None}


def from_keras_adam(**config):
    """The transform from a dictionary of Keras' Adam with only these options."""
    return from_config({"class_name": "Adam", "config": config})


@pytest.mark.parametrize(
    ("version", "clips", "expected"),
    [
        (LEGACY, {"clipvalue": 0.5, "clipnorm": 1.0}, (clip_by_value(0.5), clip_by_norm(1.0))),
        (
            LEGACY,
            {"global_clipnorm": 1.0, "clipvalue": 0.5},
            (clip_by_value(0.5), clip_by_global_norm(1.0)),
        ),
        ({"decay": 0.0, "name": "Adam"}, {"clipnorm": 1.0}, (clip_by_norm(1.0),)),
        ({"decay": 0.0}, {"global_clipnorm": 1.0}, (clip_by_global_norm(1.0),)),
        (KERAS_2, {"clipvalue": 0.5, "clipnorm": 1.0}, (clip_by_norm(1.0),)),
        (KERAS_2, {"clipvalue": 0.5, "global_clipnorm": 1.0}, (clip_by_global_norm(1.0),)),
        (KERAS_2, {"clipvalue": 0.5, "clipnorm": 0.0}, (clip_by_value(0.5),)),
        ({"jit_compile": True}, {"clipvalue": 0.5, "clipnorm": 1.0}, (clip_by_norm(1.0),)),
        (KERAS_3_0, {"clipvalue": 0.5, "clipnorm": 1.0}, (clip_by_norm(1.0),)),
        (KERAS_3, {"clipvalue": -1.0}, ()),
        (KERAS_3, {"clipvalue": 0.5, "clipnorm": None}, (clip_by_value(0.5),)),
        ({}, {"clipnorm": 0.5}, (clip_by_norm(0.5),)),
    ],
)
def test_the_version_decides_which_clips_apply(version, clips, expected):
    assert from_keras_adam(**version, **clips).transforms[:-2] == expected


@pytest.mark.parametrize(
    ("version", "clips", "message"),
    [
        (LEGACY, {"clipnorm": 1.0, "global_clipnorm": 1.0}, "only one of clipnorm and global_clip"),
        (KERAS_2, {"clipnorm": 1.0, "global_clipnorm": 1.0}, "only one of clipnorm and global_cl"),
        (KERAS_3, {"clipnorm": 1.0, "global_clipnorm": 1.0}, "only one of clipnorm and global_cl"),
        (KERAS_3, {"clipnorm": 1.0, "clipvalue": 0.5}, "only one of clipnorm, clipvalue and glob"),
        (KERAS_3, {"clipnorm": 0.0, "clipvalue": 0.5}, "only one of clipnorm, clipvalue and glob"),
        ({}, {"clipnorm": 1.0, "clipvalue": 0.5}, "version decides which clip is used"),
        ({"decay": 0.0}, {"clipnorm": 1.0}, "clipnorm=1.0: Keras up to 2.3 clips all gradients by"),
        (
            {"decay": 0.0, "name": "A"},
            {"clipnorm": 1.0, "clipvalue": 0.5},
            "up to 2.3 clips by norm",
        ),
        (LEGACY, {"clipnorm": -1.0}, "clipnorm: clip_by_norm: max_norm must be finite"),
    ],
)
def test_clips_that_the_version_refuses_are_refused(version, clips, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_keras_adam(**version, **clips)


@needs_keras
def test_keras_3_refuses_two_clips_too(keras):
    with pytest.raises(ValueError, match="Only one of `clipnorm`, `clipvalue`"):
        keras.optimizers.Adam(clipnorm=1.0, clipvalue=0.5)


def test_the_version_decides_which_rows_adamax_moves():
    def adamax_of(**config):
        return from_config({"class_name": "Adamax", "config": config}).transforms[0]

    assert adamax_of(**LEGACY) == adamax_of(decay=0.0) == scale_by_adamax()
    assert adamax_of(**KERAS_2) == adamax_of(**KERAS_3) == scale_by_adamax(rows="dense")
    config = {"module": "keras.optimizers.legacy", "class_name": "Adamax", "config": {}}
    assert from_config(config).transforms[0] == scale_by_adamax()


KERAS_COSINE = {"initial_learning_rate": 0.1, "decay_steps": 10}


def test_the_option_decay_also_divides_a_schedule():
    schedule = {"class_name": "CosineDecay", "config": KERAS_COSINE}
    tx = from_keras_adam(learning_rate=schedule, decay=0.25)
    assert tx == adam(inverse_time_decay(cosine_decay(0.1, 10), 1, 0.25))


def test_pattern_lrs_become_rates_by_path():
    groups = [
        {"patterns": ["^bert", "^emb"], "lr": 0.02},
        {"patterns": ["bias$"], "lr": {"class_name": "CosineDecay", "config": KERAS_COSINE}},
    ]
    config = {"learning_rate": 0.05, "pattern_lrs": groups, "clipvalue": 0.5, "clipnorm": 1.0}
    tx = from_config({"class_name": "AdamMultilr", "config": config})
    rates = by_path(
        [("^bert", 0.02), ("^emb", 0.02), ("bias$", cosine_decay(0.1, 10))], default=0.05
    )
    assert tx == chain(clip_by_value(0.5), clip_by_norm(1.0), adam(rates))
    assert from_config(config) == tx

    def decayed(rate):
        return inverse_time_decay(rate, 1, 0.25)

    tx = from_config(config | {"decay": 0.25, "amsgrad": True})
    assert tx.transforms[-1].learning_rate.values == tuple(map(decayed, rates.values))
    assert tx.transforms[-1].learning_rate.default == decayed(0.05)
    assert tx.transforms[-2] == scale_by_amsgrad()
    assert from_config(config | {"pattern_lrs": None}) == chain(*tx.transforms[:2], adam(0.05))


def test_values_that_keras_wraps_are_read():
    rate = {
        "module": "keras.optimizers.schedules",
        "class_name": "PiecewiseConstantDecay",
        "config": {
            "boundaries": {"class_name": "__tuple__", "items": [1, 2]},
            "values": {
                "class_name": "__numpy__",
                "config": {"value": [0.5, 0.25, 0.125], "dtype": "float32"},
            },
            "name": "PiecewiseConstant",
        },
        "registered_name": None,
    }
    beta = {"class_name": "__tensor__", "config": {"value": 0.9, "dtype": "float32"}}
    expected = adam(piecewise_constant([1, 2], [0.5, 0.25, 0.125]), rounded(0.9))
    assert from_keras_adam(learning_rate=rate, beta_1=beta) == expected


def test_a_part_may_be_a_dictionary_of_keras():
    config = {"class": "exact_rows", "tx": {"class_name": "AdamW"}, "tables": "table"}
    assert from_config(config) == exact_rows(adamw(), "table")


def test_options_without_an_effect_are_ignored():
    ignored = {"jit_compile": True, "is_legacy_optimizer": False, "name": "mine", "mesh": None}
    ignored |= dict.fromkeys(("gradient_transformers", "gradient_aggregator", "ema_option"))
    assert from_keras_adam(**ignored, ema_momentum=7, ema_overwrite_frequency=-1) == adam()
    assert from_keras_adam(loss_scale_factor=1.0, gradient_accumulation_steps=0) == adam()
    assert from_keras_adam(epsilon=None, **LEGACY) == from_keras_adam(epsilon=0, **LEGACY) == adam()


FUNCTION = {"class_name": "function", "config": "rate", "registered_name": "function"}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        # options that are unknown or of another version
        ("Adam", {"learning_rte": 1}, "Adam of Keras 3 has no 'learning_rte'; expected ["),
        ("Adam", {"schedule_decay": 1.0}, "Adam of the legacy optimizers of tf.keras has no 'sch"),
        ("Adam", {"decay": 0.0, "use_ema": True}, "legacy optimizers of tf.keras has no 'use_ema'"),
        ("Adam", {"decay": 0.1, "weight_decay": 0.1}, "tf.keras has no 'weight_decay'"),
        ("Adam", {"jit_compile": True, "loss_scale_factor": None}, "has no 'loss_scale_factor'"),
        ("Adamax", {"amsgrad": False}, "Adamax of Keras 3 has no 'amsgrad'"),
        ("Nadam", {"pattern_lrs": []}, "has no 'pattern_lrs'"),
        ("Adam", {"decay": 0.1, "is_legacy_optimizer": False}, "Keras 2.9 to 2.15 has no 'decay'"),
        ("Adam", {"lr": 0.1, "is_legacy_optimizer": False}, "Keras 2.9 to 2.15 has no 'lr'"),
        ("Adam", {"decay": 0.1, "adaptive_epsilon": True}, "has no 'adaptive_epsilon'"),
        ("AdamW", {"decay": 0.0}, "legacy optimizers of tf.keras have no AdamW"),
        # other classes
        ("SGD", {}, "does not have Keras' 'SGD'; expected one of ['Adam', 'AdamW'"),
        (
            "LossScaleOptimizer",
            {"inner_optimizer": {}},
            "it scales the loss around another optimizer",
        ),
        ("CosineDecayRestarts", {}, "does not have Keras' 'CosineDecayRestarts'"),
        (
            "Adam",
            {"learning_rate": {"class_name": "LinearCosineDecay", "config": {}}},
            "config.learning_rate: adamjax does not have Keras' 'LinearCosineDecay'",
        ),
        # functions
        ("Adam", {"learning_rate": FUNCTION}, "config.learning_rate: it is a function"),
        ("Adam", {"beta_1": lambda: 0.9}, "config.beta_1: it is a function"),
        ("Adam", {"decay": 0.0, "gradient_transformers": [1]}, "gradient_transformers cannot be"),
        ("Adam", {"decay": 0.0, "gradient_aggregator": 1}, "adamjax.sum_over"),
        ("Adam", {"mesh": None, "gradients_clip_option": 1}, "DTensor Adam does not read it"),
        ("Adam", {"mesh": None, "ema_option": 1}, "DTensor Adam does not read it"),
        ("Adam", {"mesh": "mesh"}, "a mesh cannot be converted"),
        # options that adamjax cannot honour
        (
            "Adam",
            {"loss_scale_factor": 1024.0},
            "loss_scale_factor=1024.0: Keras multiplies",
        ),
        ("Adam", {"gradient_accumulation_steps": 1}, "must be an integer of at least 2, not 1"),
        (
            "Adam",
            {"gradient_accumulation_steps": 2, "use_ema": True, "ema_overwrite_frequency": 3},
            "ema_overwrite_frequency=3 together with gradient_accumulation_steps",
        ),
        ("AdamW", {"weight_decay": None}, "weight_decay must be a float for AdamW, got None"),
        (
            "AdamW",
            {"jit_compile": False, "weight_decay": 0.01},
            "weight_decay=0.01: this is an AdamW of Keras 2.9",
        ),
        ("Nadam", {"decay": 0.004}, "with d the option decay or schedule_decay, 0.004"),
        ("Nadam", {"schedule_decay": 0.1}, "with d the option decay or schedule_decay, 0.1"),
        ("Nadam", {"is_legacy_optimizer": True}, "decay or schedule_decay, 0.004"),
        # values
        ("Adam", {"learning_rate": -1.0}, "config.learning_rate: scale_by_learning_rate: learning"),
        ("Adam", {"beta_1": 1.0}, "the config: scale_by_adam: b1 must be in [0, 1), got 1.0"),
        ("Adam", {"epsilon": 0.0}, "eps_hat must be finite and at least"),
        ("Adam", {"weight_decay": -1.0}, "config.weight_decay: add_decayed_weights: weight_decay"),
        (
            "Adam",
            {"use_ema": True, "ema_momentum": 2.0},
            "config.ema_momentum: weight_ema: momentum",
        ),
        (
            "Adam",
            {"gradient_accumulation_steps": 2.5},
            "accumulate_gradients: steps must be a whole",
        ),
        ("Adam", {"decay": -0.1}, "config.decay: inverse_time_decay: decay_rate must be finite"),
        ("Adam", {"lr": 0.1, "learning_rate": 0.1}, "give lr or learning_rate"),
        ("AdamMultilr", {"pattern_lrs": [{"patterns": ["("], "lr": 1.0}]}, "not a regular expr"),
        ("AdamMultilr", {"pattern_lrs": [{"pattern": ["a"], "lr": 1.0}]}, "pattern_lrs[0]: expec"),
        (
            "AdamMultilr",
            {"pattern_lrs": [{"patterns": "a", "lr": 1.0}]},
            "a list of patterns, got",
        ),
        (
            "AdamMultilr",
            {"pattern_lrs": [{"patterns": ["a"], "lr": FUNCTION}]},
            "pattern_lrs[0].lr: it is a function",
        ),
        ("ExponentialDecay", {"rate": 1.0}, "Keras' ExponentialDecay has no 'rate'"),
        ("CosineDecay", {**KERAS_COSINE, "decay_steps": 0}, "cosine_decay: decay_steps must be"),
    ],
)
def test_options_of_keras_that_adamjax_cannot_honour_are_refused(name, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_config({"class_name": name, "config": config})


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            {"name": "mine", "learning_rate": 0.1},
            ValueError,
            "gives no optimizer the name 'mine'",
        ),
        (
            {"learning_rate": 0.1},
            ValueError,
            'class: {"class_name": "Adam", "config": config}',
        ),
        ({"class_name": "Adam", "confg": {}}, ValueError, "a dictionary of Keras has no 'confg'"),
        ({"class_name": "Adam", "config": [1]}, TypeError, "a dictionary as its config"),
        ({"class_name": 3, "config": {}}, TypeError, "expected a class_name"),
        (
            {"class_name": "Adam", "config": {}, "registered_name": "mine>Adam"},
            ValueError,
            "'mine>Adam' is a class of your own, not Keras'",
        ),
        (
            # Keras writes this for a subclass of its AdamW that is called AdamW too.
            {"module": None, "class_name": "AdamW", "config": {}, "registered_name": "AdamW"},
            ValueError,
            "'AdamW' is a class of your own, not Keras'",
        ),
        (
            {"module": "my.optimizers", "class_name": "Adam", "config": {}},
            ValueError,
            "'Adam' is a class of your own, not Keras'",
        ),
        (
            {
                "class_name": "Adam",
                "config": {
                    "learning_rate": {
                        "module": None,
                        "class_name": "CosineDecay",
                        "config": {"initial_learning_rate": 0.1, "decay_steps": 10},
                        "registered_name": "mine>CosineDecay",
                    }
                },
            },
            ValueError,
            "the config.learning_rate: 'mine>CosineDecay' is a class of your own, not Keras'",
        ),
        (
            {"class_name": "Adam", "config": {"learning_rate": "1e-3"}},
            TypeError,
            "learning_rate must be a number that is finite and at least 0, a callable of the count "
            "or by_path; got '1e-3'",
        ),
    ],
)
def test_wrong_dictionaries_of_keras_are_refused(config, error, message):
    with pytest.raises(error, match=re.escape(message)):
        from_config(config)


def test_a_legacy_nadam_with_the_momentum_schedule_of_later_versions_is_read():
    # Its option `decay` is not of the rate but of the momentum schedule: it is 1 in later versions.
    for key in ("decay", "schedule_decay"):
        assert from_config({"class_name": "Nadam", "config": {key: 1.0}}) == nadam()


def test_keras_dictionaries_are_not_changed():
    config = written_by("legacy", "adam", "sched")
    before = copy.deepcopy(config)
    from_config(config)
    assert config == before


def test_an_average_may_overwrite_the_weights_at_every_micro_batch():
    tx = from_keras_adam(
        use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=1, gradient_accumulation_steps=2
    )
    expected = chain(
        accumulate_gradients(chain(scale_by_adam()), 2),
        scale_by_learning_rate(1e-3),
        weight_ema(0.9, 1),
    )
    assert tx == expected


# --- the table of Keras' names: a test for every line ---------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "coming-from.md"
START, END = "<!-- keras -->", "<!-- end keras -->"


def table_lines():
    """The lines of the table, as pairs of Keras' names and their equivalent in adamjax."""
    table = PAGE.read_text().partition(START)[2].partition(END)[0]
    rows = [line.strip().strip("|").split(" | ") for line in table.splitlines() if "|" in line]
    return [(theirs.strip(), ours.strip()) for theirs, ours in rows[2:]]


def name_of_test(theirs):
    """The name of a line's test, without `test_line_`."""
    return re.sub(r"[\W_]+", "_", theirs.lower()).strip("_")


def snippets(text):
    """The code between backticks."""
    return re.findall(r"`([^`]+)`", text)


def squeezed(source):
    """Source without whitespace and trailing commas, which formatting changes."""
    return re.sub(r"\s", "", source).replace(",)", ")").replace(",]", "]")


def test_every_line_of_the_table_has_a_test_with_its_code():
    lines = table_lines()
    assert len(lines) > 40
    tests = {name.removeprefix("test_line_") for name in globals() if name.startswith("test_line_")}
    assert {name_of_test(theirs) for theirs, _ in lines} == tests
    assert len(lines) == len(tests)
    for theirs, ours in lines:
        source = squeezed(inspect.getsource(globals()["test_line_" + name_of_test(theirs)]))
        for snippet in snippets(ours):
            assert squeezed(snippet) in source, f"{theirs}: {snippet!r} is not in its test"


# The public members of `tf.keras.optimizers.Adam` and its keyword arguments, by version.
MEMBERS = {
    "2.6": """clipnorm clipvalue global_clipnorm iterations weights add_slot add_weight
        apply_gradients from_config get_config get_gradients get_slot get_slot_names get_updates
        get_weights minimize set_weights variables learning_rate beta_1 beta_2 epsilon amsgrad name
        lr decay gradient_aggregator gradient_transformers experimental_aggregate_gradients""",
    "2.15": """iterations learning_rate lr variables add_variable add_variable_from_reference
        aggregate_gradients apply_gradients build compute_gradients exclude_from_weight_decay
        finalize_variable_values from_config get_config load_own_variables minimize
        save_own_variables set_weights update_step learning_rate weight_decay beta_1 beta_2 epsilon
        amsgrad clipnorm clipvalue global_clipnorm use_ema ema_momentum ema_overwrite_frequency
        jit_compile name mesh skip_gradients_aggregation""",
    "DTensor": "gradients_clip_option ema_option mesh",
    "AdamMultilr": "pattern_lrs",
}


def names_in_the_table():
    return {name for theirs, _ in table_lines() for name in snippets(theirs)}


@pytest.mark.parametrize("version", MEMBERS)
def test_the_table_has_every_name_of_tf_keras(version):
    assert set(MEMBERS[version].split()) <= names_in_the_table()


@needs_keras
def test_the_table_has_every_name_of_keras_3(keras):
    classes = [getattr(keras.optimizers, name) for name in ("Adam", "AdamW", "Adamax", "Nadam")]
    members = {name for cls in classes for name in dir(cls) if not name.startswith("_")}
    arguments = {name for cls in classes for name in inspect.signature(cls).parameters}
    assert members | arguments - {"kwargs"} <= names_in_the_table()


PARAMS = {"w": jnp.array([0.5, -1.0]), "b": jnp.array([0.25])}
GRADS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
X = jnp.array([[1.0, 2.0], [0.5, -1.0]])


def loss_fn(params, x):
    return jnp.mean((x @ params["w"] + params["b"] - 1.0) ** 2)


def after_steps(tx, steps=3, params=PARAMS, jit=False):
    """The parameters and the state after some steps."""
    update, state = jax.jit(tx.update) if jit else tx.update, tx.init(params)
    for _ in range(steps):
        updates, state = update(GRADS, state, params)
        params = apply_updates(params, updates)
    return params, state


def from_keras(name, /, **config):
    """The transform from a dictionary of Keras with this class, the rate 0.1 and these options."""
    return from_config({"class_name": name, "config": {"learning_rate": 0.1, **config}})


# The tests above compare transforms with Keras; the tests below, with the code in the table.


def test_line_learning_rate():
    assert from_keras_adam(learning_rate=0.01) == adam(0.01)
    for rate in (
        jnp.array(0.01),
        cosine_decay(0.01, 10),
        lambda count: 0.01 / (1 + count),
        by_path([("b", 0.01)], default=0.02),
    ):
        tx = adam(rate)
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(updates["b"], [-0.01], rtol=1e-5)


def test_line_beta_1_beta_2():
    assert from_keras_adam(beta_1=0.8, beta_2=0.95) == adam(b1=0.8, b2=0.95)


def test_line_epsilon_of_adam_adamw_and_amsgrad():
    assert from_keras_adam(epsilon=1e-3) == adam(eps_hat=1e-3)
    assert from_keras_adam(epsilon=1e-3, amsgrad=True) == amsgrad(eps_hat=1e-3)
    assert from_keras("AdamW", epsilon=1e-3) == adamw(0.1, eps_hat=1e-3)


def test_line_epsilon_of_adamax_and_nadam():
    config = {"epsilon": 1e-3, "is_legacy_optimizer": True}
    assert from_config({"class_name": "Adamax", "config": config}) == adamax(eps=1e-3)
    assert from_config({"class_name": "Nadam", "config": {"epsilon": 1e-3}}) == nadam(eps=1e-3)


def test_line_adaptive_epsilon():
    assert from_keras_adam(epsilon=1e-3, adaptive_epsilon=True) == adam(eps=1e-3)
    assert from_keras_adam(epsilon=1e-3, adaptive_epsilon=False) == adam(eps_hat=1e-3)


def test_line_amsgrad():
    assert from_keras("Adam", amsgrad=True) == amsgrad(0.1)
    decaying = chain(scale_by_amsgrad(), add_decayed_weights(0.004), scale_by_learning_rate(0.1))
    assert from_keras("AdamW", amsgrad=True) == decaying


def test_line_weight_decay():
    assert from_keras("AdamW", weight_decay=0.01) == adamw(0.1, weight_decay=0.01)
    assert from_keras("Adam", weight_decay=0.01) == adamw(0.1, weight_decay=0.01)
    rule = scale_by_adam(eps=1e-7, nesterov=True)
    expected = chain(rule, add_decayed_weights(0.01), scale_by_learning_rate(0.1))
    assert from_keras("Nadam", weight_decay=0.01) == expected


def test_line_clipnorm():
    assert from_keras("Adam", clipnorm=0.5) == chain(clip_by_norm(0.5), adam(0.1))


def test_line_clipvalue():
    assert from_keras("Adam", clipvalue=0.5) == chain(clip_by_value(0.5), adam(0.1))


def test_line_global_clipnorm():
    assert from_keras("Adam", global_clipnorm=0.5) == chain(clip_by_global_norm(0.5), adam(0.1))


def test_line_use_ema_ema_momentum():
    assert from_keras("Adam", use_ema=True, ema_momentum=0.9) == chain(adam(0.1), weight_ema(0.9))
    assert from_keras("Adam", use_ema=True) == chain(adam(0.1), weight_ema())
    assert from_keras("Adam", use_ema=False, ema_momentum=0.9) == adam(0.1)


def test_line_ema_overwrite_frequency():
    options = {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3}
    expected = chain(adam(0.1), weight_ema(0.9, overwrite_frequency=3))
    assert from_keras("Adam", **options) == expected


def test_line_gradient_accumulation_steps():
    rate = inverse_time_decay(0.1, 1, 1.0)
    config = {"initial_learning_rate": 0.1, "decay_steps": 1, "decay_rate": 1.0}
    schedule = {"class_name": "InverseTimeDecay", "config": config}
    by_micro_batch = chain(
        accumulate_gradients(scale_by_adam(), steps=2), scale_by_learning_rate(rate)
    )
    tx = from_keras_adam(learning_rate=schedule, gradient_accumulation_steps=2)
    params, _ = after_steps(tx, 4, jit=True)
    assert_close(params, after_steps(by_micro_batch, 4, jit=True)[0])
    assert learning_rate(tx, tx.init(PARAMS)) == pytest.approx(0.1)
    # With a constant rate, the count of the rate has no effect.
    plain = accumulate_gradients(adam(0.1), steps=2)
    params, state = after_steps(plain, 4, jit=True)
    assert step_count(state) == 2
    tx = from_keras("Adam", gradient_accumulation_steps=2)
    assert_close(after_steps(tx, 4, jit=True)[0], params)


def test_line_loss_scale_factor_scale_loss():
    factor, params, x = 1024.0, PARAMS, X
    grads = jax.grad(lambda params: factor * loss_fn(params, x))(params)
    tx = chain(scale(1 / factor), adam(0.1))
    updates, _ = tx.update(grads, tx.init(params), params)
    unscaled = adam(0.1)
    expected, _ = unscaled.update(jax.grad(loss_fn)(params, x), unscaled.init(params), params)
    assert_same(updates, expected)


def test_line_jit_compile():
    assert (
        from_keras("Adam", jit_compile=True) == from_keras("Adam", jit_compile=False) == adam(0.1)
    )
    tx = adam(0.1)
    state = tx.init(PARAMS)
    step = jax.jit(tx.update)
    assert_close(step(GRADS, state), tx.update(GRADS, state))


def test_line_name():
    assert from_keras("Adam", name="mine") == adam(0.1)
    paths, _ = jax.tree_util.tree_flatten_with_path(adam(0.1).init(PARAMS))
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    assert names == [
        "[0].count",
        "[0].m['b']",
        "[0].m['w']",
        "[0].v['b']",
        "[0].v['w']",
        "[1].count",
    ]


def test_line_mesh():
    assert from_keras("Adam", mesh=None) == adam(0.1)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    params, tx = jax.device_put(PARAMS, sharding), adam(0.1)
    state = tx.init(params)
    shardings = adamjax.state_shardings(tx, params, mesh)
    for slot in ("m", "v"):
        assert all(x.sharding == sharding for x in jax.tree.leaves(get_slot(state, slot)))
        assert all(x == sharding for x in jax.tree.leaves(get_slot(shardings, slot)))


def test_line_decay():
    expected = adam(inverse_time_decay(0.1, decay_steps=1, decay_rate=0.25))
    assert from_keras("Adam", decay=0.25) == expected
    assert from_keras("Adam", decay=0.0) == adam(0.1)


def test_line_lr():
    assert from_keras_adam(lr=0.5) == from_keras_adam(learning_rate=0.5) == adam(0.5)
    schedule = {"class_name": "CosineDecay", "config": KERAS_COSINE}
    assert from_keras_adam(lr=schedule) == adam(cosine_decay(0.1, 10))


def test_line_schedule_decay_of_the_legacy_nadam():
    assert from_keras("Nadam", schedule_decay=1.0) == nadam(0.1)
    with pytest.raises(ValueError, match=r"schedule_decay, 0.004"):
        from_keras("Nadam", schedule_decay=0.004)


def test_line_gradient_transformers():
    class halve(Transform):
        def init(self, params):
            return ()

        def update(self, grads, state, params=None, **extra_args):
            return jax.tree.map(lambda g: g / 2, grads), state

    tx = chain(clip_by_value(1.0), halve(), adam(0.1))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(get_slot(state, "m")["w"], [0.05, -0.05], rtol=1e-6)
    with pytest.raises(ValueError, match="put transforms before the rule in a chain"):
        from_keras("Adam", decay=0.0, gradient_transformers=[lambda pairs: pairs])


def test_line_gradient_aggregator_aggregate_gradients():
    tx = chain(sum_over("batch"), adam(0.1))
    replicas = jax.tree.map(lambda g: jnp.stack([g, 3 * g]), GRADS)
    _, state = jax.vmap(lambda g: tx.update(g, tx.init(PARAMS)), axis_name="batch")(replicas)
    np.testing.assert_allclose(get_slot(state, "m")["w"], [[0.4, -0.8]] * 2, rtol=1e-6)


def test_line_skip_gradients_aggregation_experimental_aggregate_gradients():
    alone, summed = adam(0.1), chain(sum_over("batch"), adam(0.1))
    replicas = jax.tree.map(lambda g: jnp.stack([g, 3 * g]), GRADS)
    _, state = jax.vmap(lambda g: alone.update(g, alone.init(PARAMS)), axis_name="batch")(replicas)
    np.testing.assert_allclose(get_slot(state, "m")["w"], [[0.1, -0.2], [0.3, -0.6]], rtol=1e-6)
    assert summed.transforms[1:] == alone.transforms


def test_line_gradients_clip_option_ema_option_of_dtensor_s_adam():
    for option in ("gradients_clip_option", "ema_option"):
        assert from_keras("Adam", mesh=None, **{option: None}) == adam(0.1)
        with pytest.raises(ValueError, match=f"{option} cannot be converted: Keras' DTensor Adam"):
            from_keras("Adam", mesh=None, **{option: {"clipnorm": 1.0}})
    assert chain(clip_by_norm(1.0), adam(0.1), weight_ema(0.9)).must_be_last


def test_line_pattern_lrs_of_adammultilr():
    groups = [{"patterns": ["^bert"], "lr": 2e-5}, {"patterns": ["^head"], "lr": 1e-4}]
    config = {"learning_rate": 1e-3, "pattern_lrs": groups}
    expected = adam(by_path([("^bert", 2e-5), ("^head", 1e-4)], default=1e-3))
    assert from_config({"class_name": "AdamMultilr", "config": config}) == expected


def test_line_a_callable_without_arguments_as_a_hyperparameter():
    tx = with_hyperparams(adam(0.1), learning_rate=0.1)
    values = itertools.count(1)

    def f():
        return 0.5 * next(values)

    params, state = PARAMS, tx.init(PARAMS)
    step, traces = jit_and_traces(tx.update)
    for expected in (0.5, 1.0, 1.5):
        state = set_hyperparams(state, learning_rate=f())
        updates, state = step(GRADS, state, params)
        np.testing.assert_allclose(updates["b"], [-expected], rtol=1e-5)
    assert len(traces) == 1
    with pytest.raises(ValueError, match="it is a function, which Keras calls in every step"):
        from_keras_adam(learning_rate=f)


def test_a_config_that_keras_has_changed_is_read():
    """Keras' `from_config` puts a schedule object into the config that is its argument."""
    k = pytest.importorskip("keras").optimizers
    config = k.Adam(k.schedules.CosineDecay(0.1, 10)).get_config()
    expected = from_config(config)
    k.Adam.from_config(config)
    assert not isinstance(config["learning_rate"], dict)
    assert from_config(config) == expected


def test_line_exponentialdecay_inversetimedecay_piecewiseconstantdecay_polynomialdecay():
    made = {
        "ExponentialDecay": exponential_decay(0.1, 10, 0.5, staircase=True),
        "InverseTimeDecay": inverse_time_decay(0.1, 10, 0.5, staircase=True),
        "PiecewiseConstantDecay": piecewise_constant((1, 2), (0.1, 0.2, 0.3)),
        "PolynomialDecay": polynomial_decay(0.1, 10, 0.01, power=2.0, cycle=True),
    }
    for name, schedule in made.items():
        config = {f.name: getattr(schedule, f.name) for f in dataclasses.fields(schedule)}
        assert from_config({"class_name": name, "config": {**config, "name": name}}) == schedule


def test_line_cosinedecay_warmup_target_warmup_steps():
    config = {"initial_learning_rate": 0.1, "decay_steps": 10}
    expected = warmup(cosine_decay(0.5, decay_steps=10), steps=3, start=0.1)
    warm = {**config, "warmup_target": 0.5, "warmup_steps": 3}
    assert from_config({"class_name": "CosineDecay", "config": warm}) == expected
    assert from_config({"class_name": "CosineDecay", "config": config}) == cosine_decay(0.1, 10)


def test_line_build():
    params, tx = PARAMS, adam(0.1)
    state = tx.init(params)
    assert step_count(state) == 0
    assert_same(get_slot(state, "m"), jax.tree.map(jnp.zeros_like, params))


def test_line_minimize():
    params, x, tx = jax.tree.map(jnp.array, PARAMS), X, adam(0.1)
    state = tx.init(params)
    step = train_step(loss_fn, tx)
    losses = []
    for _ in range(3):
        params, state, loss = step(params, state, x)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(float(loss_fn(PARAMS, x)))
    assert step_count(state) == 3


def test_line_compute_gradients_get_gradients():
    params, x = PARAMS, X
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    residual = x @ params["w"] + params["b"] - 1.0
    assert loss == pytest.approx(float(jnp.mean(residual**2)))
    np.testing.assert_allclose(grads["w"], x.T @ residual, rtol=1e-6)


def test_line_apply_gradients_apply_stateless_apply():
    params, grads, tx = PARAMS, GRADS, adam(0.1)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    params = apply_updates(params, updates)
    # Except for epsilon, the first step of Adam moves each weight by the rate, against the sign of
    # the gradient.
    expected = jax.tree.map(
        lambda p, g: p - 0.1 * g / (jnp.abs(g) + 1e-7 / 0.001**0.5), PARAMS, GRADS
    )
    assert_close(params, expected)


def test_line_get_updates():
    params, grads, tx = PARAMS, GRADS, adam(0.1)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    assert_same(apply_updates(params, updates), jax.tree.map(jnp.add, params, updates))


def test_line_tf_indexedslices_as_a_gradient():
    ids, values, num_rows = jnp.array([2, 0, 2]), jnp.array([[1.0], [2.0], [3.0]]), 4
    grads = row_gradient(ids, values, num_rows)
    np.testing.assert_array_equal(grads.to_dense(), [[2.0], [0.0], [4.0], [0.0]])

    def loss_fn(params):
        return jnp.sum(params["table"][ids] * values)

    _, grads = value_and_grad(loss_fn, "table")({"table": jnp.ones((num_rows, 1))})
    np.testing.assert_array_equal(grads["table"].to_dense(), [[2.0], [0.0], [4.0], [0.0]])


class scale_by_momentum(Transform):
    """An optimizer that users of Keras would write as a class with `build` and `update_step`."""

    decay: float = 0.5

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, grads, state, params=None, **extra_args):
        state = jax.tree.map(lambda m, g: self.decay * m + g, state, grads)
        return state, state


def test_line_update_step():
    assert issubclass(scale_by_momentum, Transform)
    tx = chain(scale_by_momentum(), scale_by_learning_rate(1.0))
    updates, _ = tx.update(GRADS, after_steps(tx, 2)[1], PARAMS)
    np.testing.assert_allclose(updates["b"], [-0.5 * 1.75])


def test_line_add_slot_add_weight_add_variable():
    class counting(scale_by_momentum):
        def init(self, params):
            return {"momentum": super().init(params), "count": jnp.zeros((), jnp.int32)}

    tx = chain(counting(), scale(-1.0))
    assert_same(tx.init(PARAMS)[0]["momentum"], jax.tree.map(jnp.zeros_like, PARAMS))
    assert tx.init(PARAMS)[0]["count"] == 0


def test_line_add_variable_from_reference_add_optimizer_variables():
    params = PARAMS
    state = scale_by_momentum().init(params)
    assert_same(state, jax.tree.map(jnp.zeros_like, params))


def test_line_assign_assign_add_assign_sub():
    params, tx = PARAMS, scale_by_momentum()
    state = tx.init(params)
    updates, moved = tx.update(GRADS, state, params)
    assert_same(state, jax.tree.map(jnp.zeros_like, params))
    assert_same(moved, GRADS)
    assert apply_updates(params, updates)["b"] == PARAMS["b"] + 0.5


def test_line_iterations():
    state = adam(0.1).init(PARAMS)
    assert step_count(state) == 0
    _, state = after_steps(adam(0.1), 3)
    assert step_count(state) == 3


def test_line_iterations_set():
    def with_count_7(state):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.full_like(x, 7) if str(path[-1]) == ".count" else x, state
        )

    tx = adam(inverse_time_decay(0.1, 1, 1.0))
    state = tx.init(PARAMS)
    state = with_count_7(state)
    assert step_count(state) == 7
    assert learning_rate(tx, state) == pytest.approx(0.1 / 8)
    updates, state = tx.update(GRADS, state, PARAMS)
    corrected = 0.1 / (1 - 0.9**8) / np.sqrt(0.001 / (1 - 0.999**8))
    np.testing.assert_allclose(updates["b"], [-0.1 / 8 * corrected], rtol=1e-5)
    assert step_count(state) == 8
    # The rows are flushed first: those that lag behind would catch up by the new count.
    params, rows = {"t": jnp.ones((70, 1))}, row_gradient(jnp.array([3]), jnp.array([[0.01]]), 70)
    ends = []
    for tx in (adam(0.1, eps=1e-2), exact_rows(adam(0.1, eps=1e-2), "t")):
        p, state = params, tx.init(params)
        for g in (rows, row_gradient(jnp.array([5]), jnp.ones((1, 1)), 70)):
            updates, state = tx.update({"t": g}, state, p)
            p = apply_updates(p, updates)
        flush = getattr(tx, "flush", lambda params, state: (params, state))
        p, state = flush(p, state)
        state = with_count_7(state)
        updates, state = tx.update({"t": rows}, state, p)
        ends.append(flush(apply_updates(p, updates), state)[0]["t"])
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-6)


def test_line_learning_rate_lr_read_from_an_optimizer():
    tx = adam(inverse_time_decay(0.1, 1, 1.0))
    _, state = after_steps(tx, 3)
    assert learning_rate(tx, state) == pytest.approx(0.1 / 4)


def test_line_learning_rate_lr_set():
    tx = with_hyperparams(adam(0.1), learning_rate=0.1)
    state = tx.init(PARAMS)
    state = set_hyperparams(state, learning_rate=0.5)
    updates, _ = tx.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(updates["b"], [-0.5], rtol=1e-5)


def test_line_beta_1_clipnorm_and_the_like_read_from_an_optimizer():
    tx = adam(b1=0.8)
    assert tx.transforms[0].b1 == 0.8
    assert from_keras("Adam", clipnorm=0.5).transforms[0].max_norm == 0.5
    assert eval(repr(tx), vars(adamjax)) == tx


def test_line_get_slot():
    _, state = after_steps(adam(0.1), 1)
    np.testing.assert_allclose(get_slot(state, "m")["w"], 0.1 * GRADS["w"], rtol=1e-6)


def test_line_get_slot_names():
    state = amsgrad(0.1).init(PARAMS)
    assert slot_names(state) == ("m", "v", "v_max")


def test_line_get_weights_weights_variables():
    _, state = after_steps(adam(0.1), 1)
    leaves = jax.tree.leaves(state)
    assert [x.shape for x in leaves] == [(), (1,), (2,), (1,), (2,), ()]


def test_line_set_weights():
    tx = adam(0.1)
    _, trained = after_steps(tx, 3)
    weights = [np.asarray(x) for x in jax.tree.leaves(trained)]
    state = tx.init(PARAMS)
    state = jax.tree.unflatten(jax.tree.structure(state), weights)
    assert_same(tx.update(GRADS, state), tx.update(GRADS, trained))


def test_line_save_own_variables_load_own_variables():
    _, state = after_steps(chain(clip_by_norm(1.0), adamw(0.1), weight_ema(0.9)), 2)
    saved = pickle.dumps(jax.device_get(state))
    assert_same(pickle.loads(saved), state)


def test_line_finalize_variable_values_overwrite_model_variables_with_average_value():
    tx = chain(adam(0.1), weight_ema(0.75))
    params, state = after_steps(tx, 1)
    expected = jax.tree.map(lambda p, q: 0.75 * p + 0.25 * q, PARAMS, params)
    params = averaged_weights(state, params)
    assert_close(params, expected)


def test_line_exclude_from_weight_decay():
    tx = adamw(0.1, mask="^(?!.*bias[^/]*$)")
    # Keras searches in the name of the variable, without the name of the layer.
    params = {"debias": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["debias"]["kernel"], -0.1 * 0.004 * np.ones(2), rtol=1e-6)
    np.testing.assert_array_equal(updates["debias"]["bias"], [0.0])
    config = {"class_name": "AdamW", "config": {"learning_rate": 0.1}}
    assert from_config(config, mask="^(?!.*bias[^/]*$)") == tx


def test_a_mask_selects_the_leaves_that_a_dictionary_of_keras_decays():
    config = {"class_name": "AdamW", "config": {"learning_rate": 0.1, "weight_decay": 0.25}}
    expected = adamw(0.1, weight_decay=0.25, mask="^(?!.*bias)")
    assert from_config(config, mask="^(?!.*bias)") == expected
    accumulating = {**config["config"], "gradient_accumulation_steps": 2}
    tx = from_config({**config, "config": accumulating}, mask="^(?!.*bias)")
    assert tx.transforms[0].tx.transforms[-1] == expected.transforms[1]
    for wrong, problem in (
        ({"class_name": "Adam", "config": {}}, "Adam has no weight decay to mask"),
        ({"class_name": "CosineDecay", "config": {}}, "is a schedule, which has no weight decay"),
        (to_config(adamw(0.1)), "mask is for dictionaries of Keras"),
    ):
        with pytest.raises(ValueError, match=problem):
            from_config(wrong, mask="bias")


def test_line_get_config_keras_optimizers_serialize():
    tx = chain(clip_by_norm(1.0), adam(cosine_decay(0.1, 10)))
    assert json.loads(json.dumps(to_config(tx))) == to_config(tx)


def test_line_from_config_keras_optimizers_deserialize_keras_optimizers_get():
    tx = chain(clip_by_norm(1.0), adam(0.1))
    for config in (
        to_config(tx),
        {"class_name": "Adam", "config": {"learning_rate": 0.1, "clipnorm": 1.0}},
        {"name": "adam", "learning_rate": 0.1, "clipnorm": 1.0, "amsgrad": False},
    ):
        assert from_config(config) == tx


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "adam", "learning_rate": 0.1},
            "not the key 'amsgrad'",
        ),  # it may be a Lamb named adam
        ({"optimizer_config": {"class_name": "Adam"}}, r'pass config."optimizer_config".'),
    ],
)
def test_dictionaries_that_may_be_of_another_object_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        from_config(config)


# --- malformed dictionaries -----------------------------------------------------------------------

SCALE = {"class": "scale", "factor": 0.5}
MALFORMED = {
    "a list that is a number": ({"list": 3}, r"'list': 3, which is not a list"),
    "a dict that is a list": ({"dict": [1]}, r"'dict': \[1\], which is not a dict"),
    "keys of several types": ({None: 1, "a": 2}, r"the keys \['None', 'a'\]"),
    "text in an array": ({"array": ["a"], "dtype": "float32"}, r"\['a'\], expected numbers"),
    "a number as text": ({"array": "1", "dtype": "float32"}, r"array of '1', expected numbers"),
    "None in an array": ({"array": None, "dtype": "float32"}, r"array of None, expected"),
    "a fraction in integers": (
        {"array": [1.5], "dtype": "int32"},
        r"\[1.5\], which int32 cannot hold",
    ),
    "too large": ({"array": 300, "dtype": "int8"}, "300, which int8 cannot hold"),
    "infinite once rounded": ({"array": 1e300, "dtype": "float32"}, "which float32 cannot hold"),
    "an array of objects": ({"array": 1, "dtype": "object"}, "dtype object, expected real floats"),
    "a complex array": ({"array": 1, "dtype": "complex64"}, "dtype complex64, expected real"),
    "an unknown dtype": ({"array": 1, "dtype": "x"}, "'x'"),
    "ragged": ({"array": [1, [2]], "dtype": "float32"}, "the config.factor: "),
    "text": ("0.1", "must be a number that is finite, got '0.1'"),
    "not a number": (math.nan, "factor must be finite, got nan"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_values_are_refused_with_their_place(case):
    value, message = MALFORMED[case]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        from_config({**SCALE, "factor": value})
    assert re.match(r"from_config: the config(: scale: |\.)factor", str(caught.value))


def test_a_float_that_was_written_by_hand_may_be_rounded():
    found = from_config({**SCALE, "factor": {"array": 0.1, "dtype": "float32"}})
    assert found.factor == np.float32(0.1)
    infinite = {"array": [math.inf], "dtype": "float32"}
    with pytest.raises(ValueError, match="must be finite"):
        from_config({**SCALE, "factor": infinite})


def keras_3_adam_config(**options):
    """A dictionary that only Keras 3 writes, of its Adam."""
    config = {"name": "adam", "learning_rate": 0.1, "loss_scale_factor": None, **options}
    return {"class_name": "Adam", "config": config}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("use_ema", x) for x in ("false", 1, [True])),
        ("amsgrad", "no"),
        *(("clipnorm", x) for x in ("1.0", [1.0], {"a": 1}, math.nan, True)),
        ("clipvalue", b"1"),
        ("epsilon", "1e-7"),
        *(("weight_decay", x) for x in ("0.1", np.ones(2), math.nan)),
        ("beta_1", [0.9]),
        ("gradient_accumulation_steps", "2"),
        ("ema_overwrite_frequency", "3"),
        ("loss_scale_factor", "1"),
    ],
)
def test_options_of_keras_of_another_type_are_refused(option, value):
    with pytest.raises(
        ValueError, match=rf"the config.{option}: expected (a number|true or false)"
    ):
        from_config(keras_3_adam_config(**{option: value}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_name": "AdamMultilr", "config": {"pattern_lrs": 3}}, "expected a list of groups"),
        (
            {"class_name": "AdamMultilr", "config": {"pattern_lrs": [{"patterns": 3, "lr": 1}]}},
            "patterns must be a list",
        ),
        (keras_3_adam_config(learning_rate={"class_name": ["a"]}), r"does not have Keras' \['a'\]"),
        (keras_3_adam_config(learning_rate={"class_name": "__tuple__"}), "no __tuple__ of Keras"),
        (
            keras_3_adam_config(epsilon={"class_name": "__numpy__", "config": 3}),
            "no __numpy__ of Keras",
        ),
        ({**keras_3_adam_config(), "registered_name": [1]}, r"registered_name is \[1\], expected"),
    ],
)
def test_malformed_dictionaries_of_keras_are_refused(config, message):
    with pytest.raises(ValueError, match=f"from_config: the config.*{message}"):
        from_config(config)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("staircase", to_config(adamjax.exponential_decay(0.1, 10, 0.5))),
        ("staircase", to_config(adamjax.inverse_time_decay(0.1, 10, 0.5))),
        ("cycle", to_config(adamjax.polynomial_decay(0.1, 10))),
        ("nesterov", to_config(adamjax.scale_by_adam())),
    ],
)
def test_flags_are_true_or_false(name, config):
    """In a condition, the string "false" would be true."""
    for value in ("false", "", 1, None):
        with pytest.raises(TypeError, match=rf"{name} must be True or False, got {value!r}"):
            from_config({**config, name: value})


def test_hyperparams_that_are_not_a_dictionary_are_refused():
    config = to_config(adamjax.with_hyperparams(adamjax.adam(0.1), learning_rate=0.1))
    for value in (None, 3, [], "b1", SCALE):
        with pytest.raises(TypeError, match="hyperparams must be a dictionary by their names"):
            from_config({**config, "hyperparams": value})


def test_names_that_are_not_classes_are_explained():
    with pytest.raises(ValueError, match=r"'adamw', which is a function.*to_config\(adamjax.adamw"):
        from_config({"class": "adamw", "learning_rate": 0.1})
    with pytest.raises(ValueError, match=r"does not have \(did you mean 'scale_by_adam'\?\)"):
        from_config({"class": "scale_by_adm"})
