"""Ten steps with row gradients, compared with those of other systems; see data/README.md.

The table `bert/emb` has 7 rows, of which row 6 never gets a row gradient. In mode `uniq` a step's
indices are distinct. In `dup` some are repeated. In `mix` the first, third, ... step has a dense
gradient, and the others have the row gradients of `dup`.
"""

import dataclasses

import jax
import jax.numpy as jnp
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
    averages,
    in_precision,
    optimizer,
    rounded,
    run,
)
from support import enable_x64

import adamjax

ORACLE = Oracle("keras_rows_f64.npz")
ROWS = Oracle.load("keras_rows_f64.npz")
NUM_ROWS = 7

# Our names of the lazy system's optimizers.
LAZY = {"lazyadam": "adam", "lazyamsgrad": "amsgrad"}

NO_V_MAX = "with a row gradient, LazyAdam of TensorFlow Addons divides by sqrt(v), not sqrt(v_max)"

CLIPS = ("clipvalue", "clipnorm", "valnorm", "global")


# The functions below that take (system, name, variant, mode) get the four parts of a case's name.


def reason_to_skip(system, name, variant, mode):
    """Why a case cannot agree, or None."""
    if (system, variant) == ("k3jax", "emafreq"):
        return WHY_NOT_K3JAX_EMAFREQ
    return NO_V_MAX if name == "lazyamsgrad" else None


def clips_first(system, name, variant, mode):
    """Whether the case's system clips row gradients before it sums the rows of a repeated index.

    adamjax sums first, so it clips the dense gradient. In such a case our optimizer has no clip,
    and gets gradients that are already clipped.
    """
    return system in ("legacy", "new") and variant in CLIPS and mode != "uniq"


def is_lazy(system, name):
    """Whether the system leaves rows without a gradient as they are."""
    return system == "lazy" or (system, name) == ("legacy", "adamax")


def cases(selects=lambda system, name, variant, mode: True):
    """The cases of the file that `selects` accepts. Those that cannot agree are skipped."""
    for case in ORACLE.weights:
        if not selects(*case.split("|")):
            continue
        reason = reason_to_skip(*case.split("|"))
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        yield pytest.param(case, marks=marks, id=case.replace("|", "-"))


def table_gradient(mode, t):
    """Indices (None if it is dense) and values of the table's gradient; the first step has t=0."""
    if mode == "mix" and t % 2 == 0:
        return None, ORACLE.grads["bert"]["emb"][t]
    kind = "dup" if mode == "mix" else mode
    return ROWS[f"idx_{kind}"][t], ROWS[f"val_{kind}"][t]


def dense_gradient(mode, t):
    """The table's dense gradient in NumPy: the rows of a repeated index are summed."""
    indices, values = table_gradient(mode, t)
    if indices is None:
        return values
    g = np.zeros_like(ORACLE.start["bert"]["emb"])
    np.add.at(g, indices, values)
    return g


def clipped(variant, *grads):
    """The arrays after the clips of a variant, in NumPy."""
    if variant in ("clipvalue", "valnorm"):
        grads = [reference.clip_by_value(g, 0.3) for g in grads]
    if variant in ("clipnorm", "valnorm"):
        grads = [reference.clip_by_norm(g, 0.5) for g in grads]
    return reference.clip_by_global_norm(grads, 0.7) if variant == "global" else grads


def gradients(mode, clip_variant=None):
    """A function from a step's index to its gradients, clipped as in `clip_variant`."""

    def at(t):
        indices, values = table_gradient(mode, t)
        values, b = clipped(clip_variant, values, ORACLE.grads["head"]["kernel"][t])
        if indices is not None:
            values = adamjax.row_gradient(jnp.asarray(indices), jnp.asarray(values), NUM_ROWS)
        return ORACLE.tree(values, b)

    return at


def optimizer_and_gradients(case):
    """The optimizer of a case, and the function from a step's index to its gradients."""
    system, name, variant, mode = case.split("|")
    clip_first = clips_first(*case.split("|"))
    options = {"rows": "lazy" if is_lazy(system, name) else "dense"}
    settings = VARIANTS[variant]
    if clip_first:
        settings = dataclasses.replace(settings, clips=())
    tx = optimizer(system, LAZY.get(name, name), settings, **options)
    return tx, gradients(mode, variant if clip_first else None)


def is_mixed(system, name, variant, mode):
    """Whether a case has steps of both kinds: with repeated indices and with dense gradients."""
    return mode == "mix"


# In float32 only the mode `mix` is tested, which has repeated indices and dense gradients.
@pytest.mark.parametrize(
    ("case", "precision"),
    [
        pytest.param(*case.values, precision, marks=case.marks, id=f"{case.id}-{precision}")
        for precision in PRECISIONS
        for case in (cases() if precision == "float64" else cases(is_mixed))
    ],
)
@pytest.mark.slow
def test_ten_steps_follow_those_of_other_systems(case, precision):
    tx, grads = optimizer_and_gradients(case)
    weights, averaged, _ = run(tx, ORACLE.start, grads, precision)
    ORACLE.assert_case(case, weights, averaged, precision)


# --- exact rows -----------------------------------------------------------------------------------


def exact_rows_applies(system, name, variant, mode):
    """Whether rows move as with dense gradients, and no average overwrites the weights."""
    return not is_lazy(system, name) and variant != "emafreq"


# A clip acts before the rule and alike for all rules, so each clip is tested with one rule only.
RULE_OF_CLIP = {"clipvalue": "adam", "clipnorm": "amsgrad", "global": "adamax"}


def differs_under_exact_rows(system, name, variant, mode):
    """Whether a case tests something in `exact_rows` that the other cases do not test.

    The legacy system is left out: it only rounds the betas to float32, its `decay` is the schedule
    of `sched`, and its `valnorm` is two of the clips in turn. AdamW differs from Adam only by its
    decay. Distinct and repeated indices make no difference. In the mode `mix`, every other step
    reads all rows; it is tested with the variant in which such a step has a dense gradient (see
    `has_dense_gradient`).
    """
    if not exact_rows_applies(system, name, variant, mode) or system == "legacy":
        return False
    if variant in CLIPS:
        return system == "new" and mode == "uniq" and RULE_OF_CLIP.get(variant) == name
    if name == "adamw" and variant in ("hyper", "sched"):
        return False
    return mode == "dup" or (mode == "mix" and variant == "default")


@jax.jit
def exact_step(tx, params, state, grads):
    """The results of a step, then the weights and averages after `flush`, and all rows by `lookup`.

    The optimizer is an argument, so optimizers that differ only in their rates share one program.
    """
    updates, state = tx.update(grads, state, params)
    params = adamjax.apply_updates(params, updates)
    rows = tx.lookup(params, state, "emb", jnp.arange(NUM_ROWS))
    flushed, settled = tx.flush(params, state)
    return params, state, (flushed, averages(settled), rows)


def is_row_gradient(x):
    return isinstance(x, adamjax.RowGradient)


def has_dense_gradient(variant, g):
    """Whether the step gets a dense gradient: in one variant only, as it needs another program."""
    return variant == "default" and not is_row_gradient(g)


def padded(g):
    """The gradient as a row gradient with `NUM_ROWS` indices, so that all cases share one shape."""
    if not is_row_gradient(g):
        return adamjax.row_gradient(jnp.arange(NUM_ROWS), g, NUM_ROWS)
    empty = NUM_ROWS - g.indices.size
    return g.replace(
        indices=np.pad(g.indices, (0, empty), constant_values=NUM_ROWS),
        values=np.pad(g.values, ((0, empty), (0, 0))),
    )


@pytest.mark.parametrize("case", list(cases(differs_under_exact_rows)))
@pytest.mark.slow
def test_exact_rows_follows_other_systems(case):
    precision = "float64"
    tx, grads = optimizer_and_gradients(case)
    tx = adamjax.exact_rows(tx, "emb", history=512)
    with enable_x64():
        params = in_precision(ORACLE.start, precision)
        state, history = tx.init(params), []
        for t in range(STEPS):
            g = in_precision(grads(t), precision)
            if not has_dense_gradient(case.split("|")[2], g["bert"]["emb"]):
                g["bert"]["emb"] = padded(g["bert"]["emb"])
            params, state, seen = exact_step(tx, params, state, g)
            history.append(seen)
        weights, averaged, rows = jax.tree.map(lambda *steps: np.stack(steps), *history)
    ORACLE.assert_case(case, weights, averaged, precision)
    ORACLE.assert_case(case, {**weights, "bert": {"emb": rows}}, averaged, precision)


# --- the file -------------------------------------------------------------------------------------


def test_the_file_has_all_cases():
    cases = [case.split("|") for case in ORACLE.weights]
    counts = {}
    for system, _, _, mode in cases:
        counts.setdefault(system, {}).setdefault(mode, 0)
        counts[system][mode] += 1
    each = {"legacy": 24, "new": 45, "k3jax": 30, "lazy": 4}
    assert counts == {s: dict.fromkeys(("uniq", "dup", "mix"), n) for s, n in each.items()}
    assert {variant for _, _, variant, _ in cases} == set(VARIANTS) - {"accum"}
    assert set(ORACLE.averages) == {case for case in ORACLE.weights if "|ema" in case}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ORACLE.weights))
    distinct = {kind: [len(set(ids)) for ids in ROWS[f"idx_{kind}"]] for kind in ("uniq", "dup")}
    assert set(distinct["uniq"]) == {3}
    assert max(distinct["dup"]) < 5
    assert max(ROWS["idx_uniq"].max(), ROWS["idx_dup"].max()) < NUM_ROWS - 1


@pytest.mark.parametrize("variant", CLIPS)
def test_a_clip_before_rows_are_summed_differs_from_one_after_it(variant):
    """So `test_ten_steps_follow_those_of_other_systems` shows that the systems clip first."""

    def summed(values, t):
        return np.asarray(adamjax.row_gradient(ROWS["idx_dup"][t], values, NUM_ROWS).to_dense())

    differences = []
    for t in range(STEPS):
        values, b = ROWS["val_dup"][t], ORACLE.grads["head"]["kernel"][t]
        clipped_first = summed(clipped(variant, values, b)[0], t)
        summed_first = clipped(variant, summed(values, t), b)[0]
        differences.append(np.abs(clipped_first - summed_first).max())
    assert max(differences) > 0.01


def lazy_amsgrad(mode, variant, with_max):
    """The weights of the table after each step of a lazy AMSGrad, in NumPy.

    Without `with_max`, steps with a row gradient neither use nor update v_max.
    """
    settings = VARIANTS[variant]
    rate, b1, b2 = map(rounded, (settings.learning_rate, settings.b1, settings.b2))
    p = ORACLE.start["bert"]["emb"].copy()
    m, v, v_max, weights = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), []
    for t in range(STEPS):
        indices, g = table_gradient(mode, t)[0], dense_gradient(mode, t)
        rows = np.arange(NUM_ROWS) if indices is None else np.unique(indices)
        m[rows] = b1 * m[rows] + (1 - b1) * g[rows]
        v[rows] = b2 * v[rows] + (1 - b2) * g[rows] ** 2
        v_in_divisor = v
        if with_max or indices is None:
            v_max[rows] = np.maximum(v_max[rows], v[rows])
            v_in_divisor = v_max
        step = rate * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        p[rows] -= step * m[rows] / (np.sqrt(v_in_divisor[rows]) + settings.eps)
        weights.append(p.copy())
    return np.stack(weights)


@pytest.mark.parametrize("mode", ["uniq", "dup", "mix"])
@pytest.mark.parametrize("variant", ["default", "hyper"])
def test_lazy_amsgrad_of_tensorflow_addons_does_not_use_v_max_in_rows(variant, mode):
    """`lazy_amsgrad` matches the system without v_max in these steps, and adamjax with it."""
    case = f"lazy|lazyamsgrad|{variant}|{mode}"
    start, theirs = ORACLE.start["bert"]["emb"], ORACLE.weights[case]["bert"]["emb"]
    without_v_max = lazy_amsgrad(mode, variant, with_max=False)
    assert_follows(without_v_max, theirs, start, precision="float64", tolerance=1e-12)
    tx, grads = optimizer_and_gradients(case)
    ours, _, _ = run(tx, ORACLE.start, grads, "float64")
    with_v_max = lazy_amsgrad(mode, variant, with_max=True)
    assert_follows(ours["bert"]["emb"], with_v_max, start, precision="float64", tolerance=1e-12)
    assert np.abs(with_v_max - theirs).max() > 1e-5 * np.abs(theirs - start).max()


@pytest.mark.parametrize("mode", ["uniq", "dup", "mix"])
def test_keras_3_overwrites_weights_with_an_average_that_starts_after_step_1(mode):
    """Steps 3, 6, ... overwrite the weights."""
    start = ORACLE.start["bert"]["emb"]
    p, average, weights = start, None, []
    grads = [dense_gradient(mode, t) for t in range(STEPS)]
    for t, update in enumerate(reference.adam(grads)):
        p = p - rounded(0.05) * update
        average = p if t == 0 else 0.9 * average + 0.1 * p
        p = average if t % 3 == 2 else p
        weights.append(p)
    theirs = ORACLE.weights[f"k3jax|adam|emafreq|{mode}"]["bert"]["emb"]
    assert_follows(np.stack(weights), theirs, start, precision="float64", tolerance=1e-12)
