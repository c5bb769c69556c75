"""Ten steps through the public API against what other systems computed, and the references.

The systems' trajectories, and their known roundings and faults, are described in data/README.md.
"""

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from support import enable_x64

import adamjax

PRECISIONS = ("float64", "float32")


def run(tx, start, grads, precision, *, jit=False):
    """Weights, averages (None without any) and the last state of ten steps; NumPy in and out.

    `start` is a tree of arrays, `grads` the same tree with a leading axis of steps; so are the
    weights and averages.
    """
    with enable_x64(precision == "float64"):
        start, grads = jax.tree.map(lambda x: np.asarray(x, precision), (start, grads))

        def step(params, state, g):
            updates, state = tx.update(g, state, params)
            params = adamjax.apply_updates(params, updates)
            return params, state, _average(state)

        if jit:
            step = jax.jit(step)
        params = jax.tree.map(jnp.asarray, start)
        state, history = tx.init(params), []
        for t in range(10):
            params, state, average = step(params, state, jax.tree.map(itemgetter(t), grads))
            history.append((params, average))
        weights, averages = jax.tree.map(lambda *steps: np.stack(steps), *history)
        return weights, averages, jax.tree.map(np.asarray, state)


def _average(state):
    try:
        return adamjax.averaged_weights(state)
    except ValueError:  # no weight_ema in this chain
        return None


def assert_follows(actual, expected, start, *, precision, tolerance=2e-6):
    """One leaf's values stay within the tolerance of the displacement from `start`.

    The scale at a step is the largest displacement of any element so far. In float32 the
    tolerance is 2e-5, and a step may add one float32 ulp of each parameter.
    """
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == precision
    axes = tuple(range(1, expected.ndim))
    displacement = np.maximum.accumulate(np.abs(expected - start).max(axes, keepdims=True))
    if precision == "float32":
        ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
        bound = 2e-5 * displacement + np.cumsum(ulp, axis=0)
    else:
        bound = tolerance * displacement
    error = np.abs(actual.astype(np.float64) - expected)
    worst = np.unravel_index(np.argmax(np.nan_to_num(error - bound, nan=np.inf)), error.shape)
    assert (error <= bound).all(), (
        f"step {worst[0] + 1}, element {tuple(map(int, worst[1:]))}: "
        f"error {error[worst]:.3g}, bound {bound[worst]:.3g}, "
        f"displacement {float(displacement[worst[0]].squeeze()):.3g}"
    )


# The systems


@dataclass(frozen=True)
class Variant:
    """How a case departs from the defaults; the names are adamjax's."""

    learning_rate: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-7
    decay: float = 0.0
    schedule: bool = False
    clips: tuple = ()
    weight_decay: float | None = None
    momentum: float | None = None
    overwrite_frequency: int | None = None
    accumulate: int = 1


BY_VALUE = adamjax.clip_by_value(0.3)
BY_NORM = adamjax.clip_by_norm(0.5)

VARIANTS = {
    "default": Variant(learning_rate=0.001),
    "hyper": Variant(b1=0.8, b2=0.95, eps=1e-3),
    "decay": Variant(decay=0.25),
    "sched": Variant(schedule=True),
    "clipvalue": Variant(learning_rate=0.01, clips=(BY_VALUE,)),
    "clipnorm": Variant(learning_rate=0.01, clips=(BY_NORM,)),
    "valnorm": Variant(learning_rate=0.01, clips=(BY_VALUE, BY_NORM)),
    "global": Variant(learning_rate=0.01, clips=(adamjax.clip_by_global_norm(0.7),)),
    "wd": Variant(weight_decay=0.1),
    "ema": Variant(momentum=0.9),
    "emafreq": Variant(momentum=0.9, overwrite_frequency=3),
    "accum": Variant(accumulate=2),
}

NOT_APPLICABLE = {
    ("k3jax", "emafreq"): (
        "Keras 3 starts its average from the weights after step 1, not from the initial ones, "
        "and writes it into the weights at step 3"
    )
}

EPSILON = {"adamax": "eps", "nadam": "eps"}  # the others' is epsilon hat


class Oracle:
    """The committed trajectories, by the name of the case."""

    def __init__(self):
        with np.load(Path(__file__).parent / "data" / "keras_f64.npz") as file:
            data = dict(file)
        self.start = self.tree(data["A0"], data["B0"])
        self.grads = self.tree(data["gA"], data["gB"])
        names = [name.decode() for name in data["cases"]]
        self.weights = dict(zip(names, map(self.tree, data["A"], data["B"]), strict=True))
        names = [name.decode() for name in data["ema_cases"]]
        self.averages = dict(zip(names, data["ema"], strict=True))

    @staticmethod
    def tree(a, b):
        """The two leaves, under the names that AdamMultilr's pattern tells apart."""
        return {"bert": {"emb": a}, "head": {"kernel": b}}


ORACLE = Oracle()


def rounded(x):
    """What is left of a hyperparameter that a system holds in float32."""
    return float(np.float32(x))


def learning_rate(system, variant):
    """The variant's rate, with the roundings of the system."""
    rate = rounded(variant.learning_rate)
    if system == "multilr":
        decayed = adamjax.inverse_time_decay(rounded(0.02), 1, variant.decay)
        return adamjax.by_path(
            [("^bert", decayed)], default=adamjax.inverse_time_decay(rate, 1, variant.decay)
        )
    if variant.schedule:
        initial = variant.learning_rate if system == "k3jax" else rate
        return adamjax.inverse_time_decay(initial, 2, 0.5)
    return adamjax.inverse_time_decay(rate, 1, variant.decay) if variant.decay else rate


def optimizer(system, name, variant):
    """A system's optimizer, written as a chain of ours."""
    beta = rounded if system in ("legacy", "multilr") else float
    rate, b1, b2 = learning_rate(system, variant), beta(variant.b1), beta(variant.b2)
    epsilon = {EPSILON.get(name, "eps_hat"): variant.eps}
    if name == "adamw":
        decay = {} if variant.weight_decay is None else {"weight_decay": variant.weight_decay}
        rule = (adamjax.adamw(rate, b1, b2, **epsilon, **decay),)
    elif variant.weight_decay is None:
        rule = (getattr(adamjax, name)(rate, b1, b2, **epsilon),)
    else:
        rule = (
            scale_by(name, b1, b2, **epsilon),
            adamjax.add_decayed_weights(variant.weight_decay),
            adamjax.scale_by_learning_rate(rate),
        )
    average = ()
    if variant.momentum is not None:
        average = (adamjax.weight_ema(variant.momentum, variant.overwrite_frequency),)
    tx = adamjax.chain(*variant.clips, *rule, *average)
    return tx if variant.accumulate == 1 else adamjax.accumulate_gradients(tx, variant.accumulate)


def scale_by(name, b1, b2, **epsilon):
    """The named rule without a learning rate."""
    if name == "nadam":
        return adamjax.scale_by_adam(b1, b2, nesterov=True, **epsilon)
    return getattr(adamjax, f"scale_by_{name}")(b1, b2, **epsilon)


def cases():
    """Every case of the file; one that is not applicable says why."""
    for case in ORACLE.weights:
        system, _, variant = case.split("|")
        reason = NOT_APPLICABLE.get((system, variant))
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        yield pytest.param(case, marks=marks, id=case.replace("|", "-"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", list(cases()))
def test_system(case, precision):
    system, name, variant = case.split("|")
    tolerance = 2e-5 if system == "new" else 2e-6
    tx = optimizer(system, name, VARIANTS[variant])
    # Uncompiled, the many cases share their operations and run fast; but a `cond` is not shared.
    jit = VARIANTS[variant].accumulate > 1
    weights, averages, _ = run(tx, ORACLE.start, ORACLE.grads, precision, jit=jit)
    jax.tree.map(
        lambda *leaves: assert_follows(*leaves, precision=precision, tolerance=tolerance),
        weights,
        ORACLE.weights[case],
        ORACLE.start,
    )
    assert (averages is not None) == (case in ORACLE.averages)
    if averages is not None:
        start = ORACLE.start["bert"]["emb"]
        expected = ORACLE.averages[case]
        if system == "k3jax":
            expected = expected + _start_of_average(case, VARIANTS[variant].momentum)
        assert_follows(
            averages["bert"]["emb"], expected, start, precision=precision, tolerance=tolerance
        )


def _start_of_average(case, momentum):
    """What starting from p_0 rather than from p_1 adds to an average: momentum^t (p_0 - p_1)."""
    t = np.arange(1, 11).reshape(-1, 1, 1)
    return momentum**t * (ORACLE.start["bert"]["emb"] - ORACLE.weights[case]["bert"]["emb"][0])


def test_file_is_whole():
    systems = [case.split("|")[0] for case in ORACLE.weights]
    counts = {system: systems.count(system) for system in systems}
    assert counts == {"legacy": 24, "new": 45, "k3jax": 50, "multilr": 2}
    assert {case.split("|")[2] for case in ORACLE.weights} == set(VARIANTS)
    averaged = {case for case in ORACLE.weights if "|ema" in case}
    assert set(ORACLE.averages) == averaged
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ORACLE.weights))


def test_reason_for_what_is_not_applicable():
    # Keras 3: the average after step 1 is the weights themselves. tf_keras averages from p_0.
    for case, average in ORACLE.averages.items():
        first = ORACLE.weights[case]["bert"]["emb"][0]
        start = ORACLE.start["bert"]["emb"]
        expected = first if case.startswith("k3jax") else 0.9 * start + 0.1 * first
        np.testing.assert_allclose(average[0], expected, rtol=1e-7)


# The references

# Name: the optimizer's, which is the reference's too, and its options.
RULES = {
    "adam-eps_hat": ("adam", {"eps_hat": 1e-7}),
    "adam-eps": ("adam", {"eps": 1e-8}),
    "amsgrad-eps_hat": ("amsgrad", {"eps_hat": 1e-7}),
    "amsgrad-eps": ("amsgrad", {"eps": 1e-8}),
    "adamax": ("adamax", {"eps": 1e-7}),
    "nadam": ("nadam", {"eps": 1e-7}),
}

# Neither side rounds anything to float32 here, so float64 means float64.
EXACT = 1e-11

SCALES = {"1e-9": 1e-9, "1e-4": 1e-4, "1": 1.0, "1e4": 1e4}


def wide_range(seed=0):
    """Start values and gradients of leaves that each test another range, a third of them zeros.

    A leaf of small gradients is judged by its own small displacement. Most leaves start at zero,
    where the ulps of the parameters hide nothing.
    """
    rng = np.random.default_rng(seed)
    shape = (10, 4, 8)

    def leaf(exponents):
        g = 10.0**exponents * rng.choice([-1, 1], shape) * (rng.random(shape) > 1 / 3)
        return g.astype(np.float32).astype(np.float64)  # the same numbers in either precision

    grads = {
        name: leaf(np.log10(scale) + rng.uniform(-0.3, 0.3, shape))
        for name, scale in SCALES.items()
    }
    grads["mixed"] = leaf(rng.uniform(-9, 4, shape))
    grads["mixed from one"] = leaf(rng.uniform(-9, 4, shape))
    grads["zeros"] = np.zeros(shape)
    start = {name: np.zeros(shape[1:]) for name in grads}
    start["mixed from one"] += 1
    return start, grads


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", RULES)
def test_wide_range(rule, precision):
    name, options = RULES[rule]
    start, grads = wide_range()
    tx = getattr(adamjax, name)(0.01, **options)
    weights, _, _ = run(tx, start, grads, precision, jit=True)
    for leaf in grads:
        updates = getattr(reference, name)(grads[leaf], **options)
        expected, _ = reference.descend(start[leaf], updates, 0.01)
        assert_follows(weights[leaf], expected, start[leaf], precision=precision, tolerance=EXACT)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", RULES)
def test_slots(rule, precision):
    name, options = RULES[rule]
    b1, b2 = 0.8, 0.95
    start, grads = wide_range(seed=1)
    _, _, state = run(scale_by(name, b1, b2, **options), start, grads, precision, jit=True)
    slots = {
        "m": lambda g: reference.first_moments(g, b1),
        "v": lambda g: reference.second_moments(g, b2),
    }
    if name == "amsgrad":
        slots["v_max"] = lambda g: reference.maxima(slots["v"](g))
    if name == "adamax":
        slots = {"m": slots["m"], "u": lambda g: reference.infinity_norms(g, b2)}
    assert set(adamjax.slot_names(state)) == set(slots)
    for slot, history in slots.items():
        for leaf, g in grads.items():
            actual = adamjax.get_slot(state, slot)[leaf]
            expected = history(g)[-1]
            error = np.abs(actual - expected).max()
            bound = (2e-6 if precision == "float32" else EXACT) * np.abs(expected).max()
            assert error <= bound, f"{slot} of {leaf}: error {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", RULES)
def test_whole_chain(rule, precision):
    # Everything at once, in an order that matters: means, both clips, the rule, decoupled decay,
    # the decayed rate, the average and its overwriting, which moves at real steps only.
    name, options = RULES[rule]
    start, grads = wide_range(seed=2)
    start = {leaf: x + 0.1 for leaf, x in start.items()}
    tx = adamjax.accumulate_gradients(
        adamjax.chain(
            adamjax.clip_by_value(2e3),
            adamjax.clip_by_global_norm(3e3),
            scale_by(name, 0.9, 0.999, **options),
            adamjax.add_decayed_weights(0.1),
            adamjax.scale_by_learning_rate(adamjax.inverse_time_decay(0.05, 1, 0.25)),
            adamjax.weight_ema(0.9, 2),
        ),
        2,
    )
    weights, averages, _ = run(tx, start, grads, precision, jit=True)

    means = zip(*(reference.accumulate(grads[leaf], 2) for leaf in grads), strict=True)
    by_value = ([reference.clip_by_value(g, 2e3) for g in step] for step in means)
    clipped = [reference.clip_by_global_norm(step, 3e3) for step in by_value]
    for leaf, g in zip(grads, zip(*clipped, strict=True), strict=True):
        history = reference.descend(
            start[leaf],
            getattr(reference, name)(g, **options),
            reference.inverse_time_decay(0.05, 1, 0.25),
            0.1,
            momentum=0.9,
            overwrite_frequency=2,
        )
        for actual, steps in zip((weights, averages), history, strict=True):
            expected = reference.held(start[leaf], steps, 2, 10)
            assert_follows(
                actual[leaf], expected, start[leaf], precision=precision, tolerance=EXACT
            )
