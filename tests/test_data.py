"""Transforms and schedules as data: checks of hyperparameters, equality, hashes, pickles."""

import copy
import fractions
import functools
import inspect
import math
import pickle
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT, enable_x64

import adamjax
from adamjax import by_path, piecewise_constant, scale, weight_ema
from adamjax.data import Data, transform_state

# The kinds of hyperparameters; RANGES has the range of each.
BETA, UNIT, RATE, EPSILON, LIMIT, ANY, COUNT = range(7)
HYPERPARAMETERS_OF_RULES = {
    "scale_by_adam": ("b1", "b2", "eps_hat", "eps"),
    "scale_by_amsgrad": ("b1", "b2", "eps_hat", "eps"),
    "scale_by_adamax": ("b1", "b2", "eps"),
}
RULE_OF_OPTIMIZER = {
    "adam": "scale_by_adam",
    "amsgrad": "scale_by_amsgrad",
    "adamw": "scale_by_adam",
    "adamax": "scale_by_adamax",
    "nadam": "scale_by_adam",
}
# For each: a function from its value to its owner, the owner's name, its own name, and its kind.
HYPERPARAMETERS = []


def hyperparameter(maker, owner, name, kind, **others):
    def make(value):
        return getattr(adamjax, maker)(**{name: value}, **others)

    HYPERPARAMETERS.append(pytest.param(make, owner, name, kind, id=f"{maker}-{name}"))


for rule, names in HYPERPARAMETERS_OF_RULES.items():
    for name in names:
        hyperparameter(rule, rule, name, BETA if name.startswith("b") else EPSILON)
for optimizer, rule in RULE_OF_OPTIMIZER.items():
    accepted = inspect.signature(getattr(adamjax, optimizer)).parameters
    for name in HYPERPARAMETERS_OF_RULES[rule]:
        if name in accepted:
            hyperparameter(optimizer, rule, name, BETA if name.startswith("b") else EPSILON)
    hyperparameter(optimizer, "scale_by_learning_rate", "learning_rate", RATE)
hyperparameter("adamw", "add_decayed_weights", "weight_decay", RATE)
hyperparameter("scale_by_learning_rate", "scale_by_learning_rate", "learning_rate", RATE)
hyperparameter("add_decayed_weights", "add_decayed_weights", "weight_decay", RATE)
hyperparameter("scale", "scale", "factor", ANY)
hyperparameter("clip_by_value", "clip_by_value", "limit", LIMIT)
hyperparameter("clip_by_norm", "clip_by_norm", "max_norm", LIMIT)
hyperparameter("clip_by_global_norm", "clip_by_global_norm", "max_norm", LIMIT)
hyperparameter("weight_ema", "weight_ema", "momentum", UNIT)
hyperparameter("weight_ema", "weight_ema", "overwrite_frequency", COUNT)
hyperparameter("accumulate_gradients", "accumulate_gradients", "steps", COUNT, tx=scale(1.0))
hyperparameter("constant", "constant", "value", RATE)
for schedule, others in {
    "inverse_time_decay": {"decay_rate": 0.5},
    "exponential_decay": {"decay_rate": 0.5},
    "polynomial_decay": {"end_learning_rate": 0.1, "power": 1.0},
    "cosine_decay": {"alpha": 0.1},
}.items():
    given = {"initial_learning_rate": 0.1, "decay_steps": 10, **others}
    kinds = {"decay_steps": LIMIT, "power": LIMIT}
    if schedule == "exponential_decay":
        kinds["decay_rate"] = LIMIT
    for name in given:
        rest = {k: v for k, v in given.items() if k != name}
        hyperparameter(schedule, schedule, name, kinds.get(name, RATE), **rest)
hyperparameter("warmup", "warmup", "schedule", RATE, steps=3)
hyperparameter("warmup", "warmup", "steps", COUNT, schedule=0.1)
hyperparameter("warmup", "warmup", "start", RATE, schedule=0.1, steps=3)

INF, NAN = math.inf, math.nan
# Values in the range of a kind, values outside it, and a pattern of the range in the error.
RANGES = {
    BETA: ([0, 0.5, 0.999999], [-1e-9, -1, 1.0, 1, 2.0, INF, NAN], r"in \[0, 1\)"),
    UNIT: ([0, 0.5, 1.0], [-1e-9, 1.000001, 2, INF, NAN], r"in \[0, 1\]"),
    # Finite means finite in float32.
    RATE: ([0, 1e-9, 3, 1e6], [-1e-9, -1, 1e39, INF, -INF, NAN], "finite and at least 0"),
    EPSILON: ([1.2e-38, 1e-8, 1], [0, 0.0, 1e-39, -1e-8, INF, NAN], "finite and at least 1.2e-38"),
    LIMIT: ([1e-9, 1, 3e38], [0, -1, -1e-9, 1e300, INF, NAN], "finite and at least 1.2e-38"),
    ANY: ([-1.0, 0, 3.0], [1e39, -1e39, INF, -INF, NAN], "finite"),
    COUNT: (
        [1, 7, 2.0],
        [0, -1, 1.5, INF, NAN, 2**31, 2**32 + 1, 10**400],
        "a whole number of at least 1 and at most 2147483647",
    ),
}


@pytest.mark.parametrize(("make", "owner", "name", "kind"), HYPERPARAMETERS)
def test_a_hyperparameter_in_its_range_is_accepted(make, owner, name, kind):
    for value in RANGES[kind][0]:
        for form in (value, np.float64(value), jnp.float32(value), np.array(value, np.float32)):
            assert make(form) == make(form)
        hash(make(value))
        with pytest.raises(TypeError, match="no hash"):
            hash(make(jnp.float32(value)))


@pytest.mark.parametrize(("make", "owner", "name", "kind"), HYPERPARAMETERS)
def test_a_hyperparameter_outside_its_range_is_refused(make, owner, name, kind):
    """At construction. The error names the owner, the hyperparameter, its range and the value."""
    _, bad, text = RANGES[kind]
    for value in bad:
        forms = [value] if value == 10**400 else [value, np.float64(value), np.array(value)]
        if value == 10**400:
            pass
        elif not abs(value) < math.inf or abs(value) <= 3e38:
            forms += [jnp.float32(value), jnp.array([1.0, value])]
        for form in forms:
            with pytest.raises(ValueError, match=rf"{owner}: {name} must be .*{text}.*got"):
                make(form)


@pytest.mark.parametrize(("make", "owner", "name", "kind"), HYPERPARAMETERS)
def test_a_hyperparameter_that_is_not_a_number_is_refused(make, owner, name, kind):
    bad = [True, False, "0.1", 1j, [0.1], {"a": 0.1}, jnp.array(True), jnp.array(0.1 + 1j)]
    optional = name in ("eps", "eps_hat", "overwrite_frequency")
    for value in bad if optional else [*bad, None]:
        with pytest.raises(TypeError, match=rf"{owner}: {name} must be a number .*got"):
            make(value)


@pytest.mark.parametrize("make", [adamjax.adam, adamjax.amsgrad, adamjax.adamw])
def test_at_most_one_epsilon_may_be_given(make):
    with pytest.raises(ValueError, match=r"eps_hat.*or eps.*not both; got eps_hat=1e-07 and eps=1"):
        make(eps_hat=1e-7, eps=1e-8)
    assert "eps_hat=1e-07" in repr(make())
    assert "eps_hat" not in repr(make(eps=1e-8))
    with pytest.raises(ValueError, match="not both"):
        adamjax.scale_by_adam(nesterov=True, eps_hat=1e-7, eps=1e-7)
    assert "eps=1e-07" in repr(adamjax.nadam())


def test_hyperparameters_of_all_public_transforms_and_schedules_are_listed_above():
    """Except transforms, patterns and others that are tested elsewhere."""
    listed = {p.id for p in HYPERPARAMETERS}
    elsewhere = {"tx", "transforms", "rules", "pattern", "patterns"}
    elsewhere |= {"values", "boundaries", "default", "mask", "hyperparams"}
    static = {"nesterov", "m_dtype", "v_dtype", "u_dtype", "staircase", "cycle"}
    static |= {"rows", "max_rows", "max_size", "tables", "history", "fixed", "axis_name"}
    static |= {"mesh", "axis", "memory_kind"}
    for public in adamjax.__all__:
        value = getattr(adamjax, public)
        is_data = (
            isinstance(value, type)
            and issubclass(value, Data)
            and public not in ("RowGradient", "Ticket")
        )
        if public in RULE_OF_OPTIMIZER or is_data:
            names = (
                set(inspect.signature(value).parameters) - elsewhere - static - {"args", "kwargs"}
            )
            assert {f"{public}-{name}" for name in names} <= listed, public


def test_errors_of_piecewise_constant_name_the_item():
    make = piecewise_constant
    with pytest.raises(ValueError, match=r"piecewise_constant: values\[1\] must be.*got -1"):
        make([1], [1.0, -1])
    with pytest.raises(TypeError, match=r"piecewise_constant: values\[0\] must be a number"):
        make([1], ["a", 1])
    with pytest.raises(TypeError, match=r"piecewise_constant: boundaries\[1\] must be a number"):
        make([1, None], [1, 1, 1])
    with pytest.raises(ValueError, match=r"one more value than boundaries, got 2 values for 2"):
        make([1, 2], [1, 1])
    for boundaries in ([2, 1], [1, 1]):
        with pytest.raises(ValueError, match="boundaries must increase"):
            make(boundaries, [1, 1, 1])
    assert make(np.array([1, 2]), np.array([1.0, 0.5, 0.25])) == make([1, 2], [1.0, 0.5, 0.25])


@pytest.mark.parametrize("bad", ["float33", int, "int32", jnp.complex64, 3, object()])
def test_a_moment_dtype_must_be_a_real_float(bad):
    for make, names in (
        (adamjax.scale_by_adam, ("m_dtype", "v_dtype")),
        (adamjax.amsgrad, ("m_dtype", "v_dtype")),
        (adamjax.adamax, ("m_dtype", "u_dtype")),
    ):
        for name in names:
            with pytest.raises(TypeError, match=f"{name} must be a real floating dtype"):
                make(**{name: bad})


def test_moments_have_the_dtypes_that_were_given():
    tx = adamjax.scale_by_amsgrad(m_dtype=np.float32, v_dtype="bfloat16")
    assert repr(tx).endswith("m_dtype='float32', v_dtype='bfloat16')")
    state = tx.init({"w": jnp.ones(2), "z": jnp.ones(2, jnp.complex64)})
    assert [x.dtype.name for x in (state.m["w"], state.v["w"], state.v_max["w"])] == [
        "float32",
        "bfloat16",
        "bfloat16",
    ]
    assert [x.dtype.name for x in (state.m["z"], state.v["z"])] == ["complex64", "bfloat16"]
    wide = adamjax.scale_by_adam().init({"w": jnp.ones(2, jnp.bfloat16)})
    assert wide.m["w"].dtype == wide.v["w"].dtype == jnp.float32


# --- values -------------------------------------------------------------------------------------


def test_equality_is_by_class_and_values():
    assert scale(0.5) == scale(0.5) != scale(0.25)
    assert adamjax.clip_by_norm(1.0) != adamjax.clip_by_global_norm(1.0)
    assert adamjax.scale_by_adam() == adamjax.scale_by_adam(eps_hat=1e-7)
    assert adamjax.scale_by_adam(eps=1e-7) != adamjax.scale_by_adam(eps_hat=1e-7)
    assert adamjax.scale_by_adam(m_dtype=jnp.bfloat16) == adamjax.scale_by_adam(m_dtype="bfloat16")
    assert adamjax.scale_by_adam(m_dtype=jnp.bfloat16) != adamjax.scale_by_adam()
    assert by_path([("a", 0.1)], default=0.2) != by_path([("b", 0.1)], default=0.2)
    assert weight_ema(0.9) != weight_ema(0.9, 1)
    assert scale(0.5) != 0.5
    assert scale(0.5) is not None


def test_arrays_compare_by_value_and_dtype():
    half = scale(jnp.float32(0.5))
    assert half == scale(np.float32(0.5) * jnp.ones(()))
    assert half == scale(np.array(0.5, np.float32))
    assert half != scale(0.5)
    assert half != scale(jnp.float16(0.5))
    assert half != scale(jnp.array([0.5, 0.5]))
    assert scale(jnp.array([0.5, 0.25])) == scale(jnp.array([0.5, 0.25]))
    with pytest.raises(TypeError, match=r"scale holds an array .* no hash.*argument"):
        hash(half)
    with pytest.raises(TypeError, match="chain holds an array"):
        hash(adamjax.adam(jnp.float32(0.1)))
    assert {scale(0.5): "half"}[scale(0.5)] == "half"


def test_numpy_numbers_become_python_numbers():
    """So transforms that are equal also print alike."""
    assert scale(np.float64(0.5)) == scale(0.5)
    assert repr(scale(np.float32(0.5))) == "scale(factor=0.5)"
    assert repr(weight_ema(0.5, np.int64(3))) == "weight_ema(momentum=0.5, overwrite_frequency=3)"


def test_transforms_are_frozen():
    tx = adamjax.adam()
    for name in ("transforms", "other"):
        with pytest.raises(AttributeError):
            setattr(tx, name, ())
    with pytest.raises(AttributeError):
        del tx.transforms


def test_schedules_are_data_too():
    rate = adamjax.warmup(adamjax.cosine_decay(0.1, 10), 3)
    rates = by_path([("a", rate), ("b", 0.5)], default=piecewise_constant([1], [0.5, 0.25]))
    for made in (rate, rates):
        assert eval(repr(made), dict(vars(adamjax))) == made
        assert pickle.loads(pickle.dumps(made)) == made == copy.deepcopy(made) == copy.copy(made)
        assert hash(copy.deepcopy(made)) == hash(made)
    arrays = jax.tree.map(jnp.asarray, rates)
    assert arrays == jax.tree.map(jnp.asarray, copy.deepcopy(rates)) != rates
    assert rate.replace(steps=4) == adamjax.warmup(adamjax.cosine_decay(0.1, 10), 4)


def test_the_leaves_are_the_hyperparameters_and_their_paths_the_names():
    tx = adamjax.chain(adamjax.clip_by_norm(1.0), adamjax.adam(adamjax.cosine_decay(0.1, 10)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tx)
    assert {jax.tree_util.keystr(path): value for path, value in leaves} == {
        ".transforms[0].max_norm": 1.0,
        ".transforms[1].b1": 0.9,
        ".transforms[1].b2": 0.999,
        ".transforms[1].eps_hat": 1e-7,
        ".transforms[2].learning_rate.initial_learning_rate": 0.1,
        ".transforms[2].learning_rate.decay_steps": 10,
        ".transforms[2].learning_rate.alpha": 0.0,
    }


def test_only_counts_and_times_stay_integers():
    """Other integers become floats, because an integer array cannot be set to a fraction."""
    for made in (
        scale(1),
        adamjax.scale_by_adam(b1=0, b2=0, eps=1),
        adamjax.clip_by_norm(1),
        adamjax.clip_by_global_norm(np.int64(1)),
        adamjax.clip_by_value(np.array(1)),
        adamjax.add_decayed_weights(0),
        adamjax.scale_by_learning_rate(jnp.array(1)),
        adamjax.constant(1),
        by_path([("a", 1)], default=0),
        weight_ema(1),
    ):
        assert all(jnp.result_type(x) == jnp.float32 for x in jax.tree.leaves(made)), made
    frequency = weight_ema(0.5, np.array(2.0)).overwrite_frequency
    assert (frequency.dtype, weight_ema(0.5, 2.0).overwrite_frequency) == (jnp.int32, 2)
    assert isinstance(weight_ema(0.5, 2.0).overwrite_frequency, int)
    decay = adamjax.cosine_decay(1, decay_steps=10)
    assert repr(decay) == "cosine_decay(initial_learning_rate=1.0, decay_steps=10, alpha=0.0)"
    assert repr(piecewise_constant([1, 2.5], [1, 0.5, 0])) == (
        "piecewise_constant(boundaries=(1, 2.5), values=(1.0, 0.5, 0.0))"
    )


def test_a_traced_hyperparameter_is_checked_by_its_dtype():
    for bad in (True, 1j):
        with pytest.raises(TypeError, match=r"scale: factor must be a number.*being traced"):
            jax.jit(scale)(bad)
    with pytest.raises(TypeError, match=r"overwrite_frequency.*dtype float32.*being traced"):
        jax.jit(lambda n: weight_ema(0.5, n))(2.5)
    assert jax.jit(scale)(2).factor.dtype == jnp.float32
    assert jax.jit(lambda n: weight_ema(0.5, n))(2).overwrite_frequency.dtype == jnp.int32
    tx = jax.tree.map(jnp.float32, weight_ema(0.5, 2))
    with pytest.raises(TypeError, match="overwrite_frequency must be a whole number of steps, got"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))


def test_wide_integers_are_not_cut_to_32_bits():
    for value in (2**40, np.int64(2**40), np.array(2**40), np.array([2**40]), np.uint64(2**40)):
        assert float(np.asarray(scale(value).factor).reshape(())) == 2.0**40
    assert scale(2**70).factor == 2.0**70
    assert float(scale(np.array(2**63 + 2**40, np.uint64)).factor) == 2.0**63 + 2.0**40
    for value in (2**130, 10**400, -(10**400)):
        with pytest.raises(ValueError, match="scale: factor must be finite, got"):
            scale(value)
    for value in (2**31, 2**32 + 1, np.int64(2**32 + 1), np.array(2**32 + 1), 2.0**31):
        with pytest.raises(ValueError, match=r"steps must be a whole number .* at most 2147483647"):
            adamjax.accumulate_gradients(scale(1.0), value)


def test_a_traced_epsilon_of_0_acts_like_a_tiny_one():
    """A zero gradient has a zero update. A negative, infinite or NaN epsilon makes NaN."""
    g = jnp.array([0.0, 2.0])
    for make in (
        lambda eps: adamjax.scale_by_adam(eps_hat=eps),
        lambda eps: adamjax.scale_by_adam(eps=eps),
        lambda eps: adamjax.scale_by_amsgrad(eps_hat=eps),
        lambda eps: adamjax.scale_by_adamax(eps=eps),
        lambda eps: adamjax.scale_by_adam(eps=eps, nesterov=True),
    ):
        step = jax.jit(lambda eps, make=make: make(eps).update(g, make(eps).init(g))[0])
        np.testing.assert_allclose(step(0.0), step(1e-30), rtol=1e-6)
        assert step(0.0)[0] == 0
        for bad in (-1.0, jnp.nan, jnp.inf):
            assert np.isnan(step(bad)).all()


def test_numbers_of_every_type_are_accepted():
    g = jnp.ones(2)
    for value in (1, fractions.Fraction(1, 2), jnp.bfloat16(0.5), np.float16(0.5), 2**40):
        updates, _ = scale(value).update(g, ())
        np.testing.assert_allclose(updates, float(value))


RULE_MAKERS = {
    "adam": adamjax.scale_by_adam,
    "eps": functools.partial(adamjax.scale_by_adam, eps=1e-8),
    "nadam": functools.partial(adamjax.scale_by_adam, nesterov=True),
    "amsgrad": adamjax.scale_by_amsgrad,
    "adamax": adamjax.scale_by_adamax,
}


@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize("rule", RULE_MAKERS)
def test_traced_betas_make_nan_outside_of_their_range(rule, name):
    """In the second step, and also a beta that is 1 in float32."""
    g = jnp.array([0.5, 2.0])

    def second_updates(tx):
        _, state = tx.update(g, tx.init(g))
        return tx.update(g, state)[0]

    call = jax.jit(lambda b: second_updates(RULE_MAKERS[rule](**{name: b})))
    for bad in (-0.5, 1.0, 1.5, 0.99999999, -jnp.inf, jnp.inf, jnp.nan):
        assert np.isnan(call(bad)).all(), bad
    for b in (0.0, 0.25, 0.5, 0.75):
        np.testing.assert_allclose(
            call(b), second_updates(RULE_MAKERS[rule](**{name: b})), rtol=1e-6
        )
    assert np.isnan(jax.jit(second_updates)(RULE_MAKERS[rule](**{name: 0.99999999}))).all()


@pytest.mark.parametrize("rule", RULE_MAKERS)
@pytest.mark.slow
def test_float64_betas_are_not_rounded_to_float32(rule):
    """Not even for float32 gradients: 1 - 1e-9 would be 1."""
    rng = np.random.default_rng(0)
    for b1, b2 in ((0.9, 0.999), (0.9, 1 - 1e-9), (1 - 1e-9, 0.999)):
        with enable_x64(True):
            grads = [jnp.asarray(rng.normal(size=8), jnp.float32) for _ in range(3)]
            tx = RULE_MAKERS[rule](b1=jnp.float64(b1), b2=jnp.float64(b2))
            wide_tx = RULE_MAKERS[rule](b1=b1, b2=b2)
            state = tx.init(grads[0])
            wide_state = wide_tx.init(grads[0].astype(jnp.float64))
            for g in grads:
                updates, state = jax.jit(tx.update)(g, state)
                expected, wide_state = wide_tx.update(g.astype(jnp.float64), wide_state)
                assert updates.dtype == jnp.float32
                np.testing.assert_allclose(updates, expected, rtol=3e-6, atol=1e-7)


def test_nadam_does_not_compute_1_minus_b1_from_a_rounded_b1():
    """If b1 is near 1, rounding it to float32 changes 1 - b1 a lot."""
    g, count = jnp.array([2.0]), 3000
    for b1 in (0.9999, 1 - 1e-7):
        tx = adamjax.scale_by_adam(b1=b1, nesterov=True)
        state = tx.init(g)._replace(count=jnp.array(count, jnp.int32), v=jnp.array([4.0]))
        state = state._replace(momentum_product=jnp.array(0.0, jnp.float32))
        update = float(tx.update(g, state)[0][0])
        m = (1 - b1) * 2
        expected = (b1 * m + (1 - b1) * 2) * np.sqrt(1 - 0.999 ** (count + 1)) / 2
        np.testing.assert_allclose(update, expected, rtol=2e-6)


def test_update_refuses_hyperparameters_that_tree_map_put_out_of_range():
    """`jax.tree.map` over a transform checks nothing."""
    g = jnp.ones(2)
    for tx, text in (
        (adamjax.scale_by_adam(), r"in \[0, 1\), got 1.998"),
        (adamjax.scale_by_learning_rate(0.5), "at least 0, got -1.0"),
    ):
        factor = -2 if "rate" in repr(tx) else 2
        wrong = jax.tree.map(lambda x, factor=factor: factor * x, tx)
        with pytest.raises(ValueError, match=f"a hyperparameter must be {text}"):
            wrong.update(g, tx.init(g))


# --- in another process ---------------------------------------------------------------------------

SENDER = """
import sys
from typing import Any, NamedTuple

import cloudpickle, jax, jax.numpy as jnp

import adamjax
from adamjax.data import static, transform_state

@transform_state("m")
class State(NamedTuple):
    count: Any
    m: Any

class momentum(adamjax.Transform):
    b: float
    size: float = 1.0
    rows: str = static(default="dense")

    def __post_init__(self):
        self.check_range("b", adamjax.data.BETA)

    def init(self, params):
        return State(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(self, updates, state, params=None, **extra_args):
        m = jax.tree.map(lambda m, g: self.b * m + self.size * g, state.m, updates)
        return m, State(state.count + 1, m)

class slower(momentum):
    slowness: float = 2.0

class lower_adam(adamjax.scale_by_adam):
    least: float = 0.5

class halved(adamjax.Schedule):
    initial: float

    def __call__(self, count):
        return self.initial * 0.5**count

tx = adamjax.chain(momentum(0.5, rows="lazy"), adamjax.scale_by_learning_rate(halved(0.1)))
state = tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))[1]
sent = momentum, slower, lower_adam, halved, State, tx, state
for times in range(2):
    with open(sys.argv[1] + str(times), "wb") as file:
        cloudpickle.dump(sent, file)
"""

READER = """
import pickle, sys

momentum, slower, lower_adam, halved, State, tx, state = pickle.load(open(sys.argv[1] + "0", "rb"))
assert pickle.load(open(sys.argv[1] + "1", "rb"))[0] is momentum

import jax, jax.numpy as jnp
import adamjax

assert jax.tree.leaves(tx) == [0.5, 1.0, 0.1]
assert repr(tx) == (
    "chain(momentum(b=0.5, size=1.0, rows='lazy'), "
    "scale_by_learning_rate(learning_rate=halved(initial=0.1)))"
)
again = adamjax.chain(momentum(0.5, rows="lazy"), adamjax.scale_by_learning_rate(halved(0.1)))
assert tx == again and hash(tx) == hash(again)
assert jax.tree.map(lambda x: x, tx) == tx
assert momentum(0.5) != momentum(0.25) and momentum(0.5, rows="lazy") != momentum(0.5)
assert jax.tree.leaves(slower(0.5)) == [0.5, 1.0, 2.0]
assert jax.tree.leaves(lower_adam()) == [0.9, 0.999, 1e-7, 0.5]
try:
    momentum(2.0)
    raise AssertionError("the range was not checked")
except ValueError as error:
    assert "b must be in [0, 1), got 2.0" in str(error)
assert adamjax.slot_names(state) == ("m",) and adamjax.step_count(state) == 1
step = jax.jit(lambda tx, state: tx.update({"w": jnp.ones(2)}, state))
updates, state = step(tx, state)
assert adamjax.get_slot(state, "m")["w"].tolist() == [1.5, 1.5]
assert updates["w"].tolist() == (-0.05 * jnp.full(2, 1.5)).tolist()
print("all equal")
"""


@pytest.mark.slow
def test_classes_of_a_script_are_the_same_in_another_process(tmp_path):
    """cloudpickle sends them by value."""
    pytest.importorskip("cloudpickle")
    for program in (SENDER, READER):
        command = [sys.executable, "-c", program, str(tmp_path / "sent")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "all equal\n"


def test_two_state_classes_may_have_the_same_name():
    """In two modules, or in a cell of a notebook that is run again."""

    def make():
        @transform_state("m")
        class State(NamedTuple):
            m: Any

        return State

    for state_class in (make(), make()):
        assert adamjax.slot_names(state_class({"w": 1.0})) == ("m",)
