"""Ten steps through the public API, compared with other systems and with `reference.py`.

The systems' trajectories, and their known roundings and faults, are described in data/README.md.
"""

import jax
import numpy as np
import pytest
import reference
from oracle import (
    PRECISIONS,
    STEPS,
    VARIANTS,
    WHY_NOT_K3JAX_EMAFREQ,
    Oracle,
    assert_follows,
    optimizer,
    run,
    scale_by,
)

import adamjax

NOT_APPLICABLE = {("k3jax", "emafreq"): WHY_NOT_K3JAX_EMAFREQ}

ORACLE = Oracle("keras_f64.npz")


def cases():
    """Every case of the file. Those that cannot agree are skipped."""
    for case in ORACLE.weights:
        system, _, variant = case.split("|")
        reason = NOT_APPLICABLE.get((system, variant))
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        yield pytest.param(case, marks=marks, id=case.replace("|", "-"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", list(cases()))
def test_ten_steps_follow_those_of_other_systems(case, precision):
    system, name, variant = case.split("|")
    tx = optimizer(system, name, VARIANTS[variant])
    # Without jit, JAX compiles each operation once for all of the many cases. But a `cond`, which
    # accumulation has, would be compiled anew in each step.
    jit = VARIANTS[variant].accumulate > 1
    weights, averages, _ = run(tx, ORACLE.start, ORACLE.grads, precision, jit=jit)
    ORACLE.assert_case(case, weights, averages, precision)


def test_the_file_has_all_cases():
    systems = [case.split("|")[0] for case in ORACLE.weights]
    counts = {system: systems.count(system) for system in systems}
    assert counts == {"legacy": 24, "new": 45, "k3jax": 50, "multilr": 2}
    assert {case.split("|")[2] for case in ORACLE.weights} == set(VARIANTS)
    averaged = {case for case in ORACLE.weights if "|ema" in case}
    assert set(ORACLE.averages) == averaged
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ORACLE.weights))


def test_keras_3_starts_its_average_at_the_weights_after_step_1():
    # After step 1, Keras 3's average is the weights. tf_keras averages from the initial weights.
    for case, average in ORACLE.averages.items():
        first = ORACLE.weights[case]["bert"]["emb"][0]
        start = ORACLE.start["bert"]["emb"]
        expected = first if case.startswith("k3jax") else 0.9 * start + 0.1 * first
        np.testing.assert_allclose(average[0], expected, rtol=1e-7)


# --- reference.py ---------------------------------------------------------------------------------

# By test id: the name of both the optimizer and its function in reference.py, and the options of
# both.
RULES = {
    "adam-eps_hat": ("adam", {"eps_hat": 1e-7}),
    "adam-eps": ("adam", {"eps": 1e-8}),
    "amsgrad-eps_hat": ("amsgrad", {"eps_hat": 1e-7}),
    "amsgrad-eps": ("amsgrad", {"eps": 1e-8}),
    "adamax": ("adamax", {"eps": 1e-7}),
    "nadam": ("nadam", {"eps": 1e-7}),
}

# The tolerance in float64. Other systems round some numbers to float32; here neither side does.
FLOAT64_TOLERANCE = 1e-11

SCALES = {"1e-9": 1e-9, "1e-4": 1e-4, "1": 1.0, "1e4": 1e4}


def wide_range(seed=0):
    """Start values and gradients. Each leaf tests another range; a third of its gradients are 0.

    The error of each leaf is measured relative to that leaf's own displacement, also if that is
    tiny. Most leaves start at zero, so that parameters are rounded relative to their displacement.
    "mixed from one" starts at 1.
    """
    rng = np.random.default_rng(seed)
    shape = (STEPS, 4, 8)

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
def test_updates_from_gradients_of_a_wide_range_follow_the_references(rule, precision):
    name, options = RULES[rule]
    start, grads = wide_range()
    tx = getattr(adamjax, name)(0.01, **options)
    weights, _, _ = run(tx, start, grads, precision, jit=True)
    for leaf in grads:
        updates = getattr(reference, name)(grads[leaf], **options)
        expected, _ = reference.descend(start[leaf], updates, 0.01)
        assert_follows(
            weights[leaf], expected, start[leaf], precision=precision, tolerance=FLOAT64_TOLERANCE
        )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", RULES)
def test_slots_follow_the_references(rule, precision):
    name, options = RULES[rule]
    b1, b2 = 0.8, 0.95
    start, grads = wide_range(seed=1)
    _, _, state = run(scale_by(name, b1, b2, **options), start, grads, precision, jit=True)
    slots = {"m": lambda g: reference.first_moments(g, b1)}
    if name == "adamax":
        slots["u"] = lambda g: reference.infinity_norms(g, b2)
    else:
        slots["v"] = lambda g: reference.second_moments(g, b2)
    if name == "amsgrad":
        slots["v_max"] = lambda g: reference.maxima(slots["v"](g))
    assert set(adamjax.slot_names(state)) == set(slots)
    for slot, expected_slots in slots.items():
        for leaf, g in grads.items():
            actual = adamjax.get_slot(state, slot)[leaf]
            expected = expected_slots(g)[-1]
            error = np.abs(actual - expected).max()
            bound = (2e-6 if precision == "float32" else FLOAT64_TOLERANCE) * np.abs(expected).max()
            assert error <= bound, f"{slot} of {leaf}: error {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", RULES)
def test_a_whole_chain_follows_the_references(rule, precision):
    # The order matters: means, both clips, the rule, decoupled decay, the decayed rate, the average
    # and its overwriting. The average moves in each step, not in each micro-batch.
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
            expected = reference.after_each_micro_batch(start[leaf], steps, 2, STEPS)
            assert_follows(
                actual[leaf],
                expected,
                start[leaf],
                precision=precision,
                tolerance=FLOAT64_TOLERANCE,
            )
