"""A table of every transform, and the laws that must hold for each of them.

The table is `CASES`. A law is a test of every case. The laws of `adamjax.testing`, which users try
on their own transforms, are among them. The other laws are in this file: they need attributes of a
`Case`. If a law does not hold for a case, `exempt` has the reason. Then the test must fail (it is a
strict xfail), so that no exemption outlives its reason.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, assert_same, avals, enable_x64, leaves, ulp

import adamjax
from adamjax import (
    RowGradient,
    accumulate_gradients,
    adam,
    adamax,
    adamw,
    add_decayed_weights,
    amsgrad,
    by_path,
    chain,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    cosine_decay,
    exact_rows,
    exponential_decay,
    grouped,
    identity,
    masked,
    nadam,
    partition,
    scale,
    scale_by_adam,
    scale_by_adamax,
    scale_by_amsgrad,
    scale_by_learning_rate,
    set_to_zero,
    shard_state,
    skip_not_finite,
    testing,
    warmup,
    weight_ema,
    with_hyperparams,
)
from adamjax.structure import walk
from adamjax.transform import as_transform
from adamjax.trial import cast


@dataclass(frozen=True)
class Case:
    """A transform of the table.

    Attributes:
      name: its name in errors and, with a hyphen for ", ", in the ids of tests.
      make: makes the transform; it is called twice where two equal ones are needed.
      decays: whether weights decay towards zero, also at zero gradients.
      exempt: the reason for each law that does not hold.
      make_dense: makes the same transform for dense gradients of tables, if that of `make` takes
        row gradients only.
    """

    name: str
    make: Callable[[], Any]
    decays: bool = False
    exempt: dict[str, str] = field(default_factory=dict)
    make_dense: Callable[[], Any] | None = None

    @functools.cached_property
    def tx(self) -> Any:
        return self.make()

    @functools.cached_property
    def dense(self) -> Any:
        return self.make_dense() if self.make_dense else self.tx

    @property
    def id(self) -> str:
        return self.name.replace(", ", "-")

    @property
    def is_lazy(self) -> bool:
        return LAZY.items() <= self.exempt.items()


def matrices(tree):
    """A mask function, which selects the leaves with two axes."""
    return jax.tree.map(lambda x: jnp.ndim(x) == 2, tree)


def pipeline():
    return chain(
        clip_by_global_norm(0.5),
        scale_by_adam(),
        add_decayed_weights(by_path([("bias", 0.0)], default=0.1)),
        scale_by_learning_rate(warmup(cosine_decay(0.1, 10), 2, start=0.02)),
        weight_ema(0.9),
    )


def groupable_pipeline():
    return chain(clip_by_global_norm(0.5), adamw(0.1, weight_decay=0.1), weight_ema(0.9))


def lazy_pipeline():
    return chain(clip_by_global_norm(0.5), amsgrad(0.1, rows="lazy"), scale(0.5), weight_ema(0.9))


# Reasons that several exemptions share.
NEEDS_A_GRADIENT = "a table without a gradient is refused"
STANDS_STILL = "rows without a gradient stand still, as documented"
SHARES_EXPONENTS = "the table is a vector, whose rows share exponents"
NOT_ROWS_TO_OPTAX = "to optax, row indices are gradients like all others"

# The exemptions of `exact_rows`.
EXACT_ROWS = {
    "updates_have_the_gradients_dtype": "an update is at least as wide as its table",
    "complex_weights": "tables are real",
    "empty_trees": "the tree has no table",
    "row_gradients_mean_their_rows": "rows without a gradient lag behind, as documented",
    "a_none_gradient_skips_its_leaf": NEEDS_A_GRADIENT,
}
# The exemptions of transforms with lazy rows.
LAZY = {
    "row_gradients_equal_dense_ones": STANDS_STILL,
    "a_row_gradient_without_rows_equals_zeros": STANDS_STILL,
}
# The exemptions of transforms that overwrite weights by their average.
OVERWRITING = {
    "low_precision_updates_are_the_float32_twins_rounded_once": (
        "a difference of weights is rounded: test_low_precision_updates_that_overwrite_weights"
    )
}
# The exemptions of transforms that move nothing.
FROZEN = {
    "low_precision_weights_move_as_their_float32_twins": "weights stay as they are",
    "complex_weights": "weights stay as they are",
}
# The exemptions of moments in 8 bits.
EIGHT_BITS = {
    "derivatives_are_finite_at_zero_gradients": "derivatives are refused",
    "derivatives_equal_finite_differences": "derivatives are refused",
    "row_gradients_equal_dense_ones": SHARES_EXPONENTS,
    "a_row_gradient_without_rows_equals_zeros": SHARES_EXPONENTS,
}
# The exemptions of transforms with a function, such as a mask function.
WITH_FUNCTION = {"prints": "the repr of a function is not Python code"}
# The exemptions of our chains with a transform of optax, and of chains of optax.
WITH_OPTAX = {
    "pickles": "optax's closures do not pickle",
    "a_transform_made_twice_is_equal": "optax makes new closures for every transform",
    **WITH_FUNCTION,
    "row_gradients_equal_dense_ones": NOT_ROWS_TO_OPTAX,
    "a_row_gradient_without_rows_equals_zeros": NOT_ROWS_TO_OPTAX,
    "low_precision_updates_are_the_float32_twins_rounded_once": "optax rounds between transforms",
}
# The exemptions of chains of optax.
OPTAX_CHAIN = {
    **WITH_OPTAX,
    "row_gradients_mean_their_rows": NOT_ROWS_TO_OPTAX,
    "is_data": "optax's chain is a pair of functions",
    "equals": "optax's chain is a pair of functions",
    "jit_argument": "optax's chain is a pair of functions",
    "vmap_hyperparameters": "optax's chain is a pair of functions",
}

ONE_DEVICE = jax.sharding.Mesh(jax.devices(), "data")
CASES = [
    # transforms
    Case("identity", lambda: identity(), exempt={"refuses_wrong_gradients": "accepts anything"}),
    Case("scale", lambda: scale(-0.3)),
    Case("set_to_zero", lambda: set_to_zero(), exempt=FROZEN),
    Case("clip_by_value", lambda: clip_by_value(0.3)),
    Case("clip_by_norm", lambda: clip_by_norm(0.3)),
    Case("clip_by_global_norm", lambda: clip_by_global_norm(0.3)),
    Case("scale_by_adam", lambda: scale_by_adam(eps_hat=1e-6)),
    Case("scale_by_adam, eps", lambda: scale_by_adam(0.8, 0.99, eps=1e-8)),
    Case("scale_by_adam, nesterov", lambda: scale_by_adam(nesterov=True)),
    Case("scale_by_adam, low b", lambda: scale_by_adam(0.0, 0.5, eps=1e-8)),
    Case(
        "scale_by_adam, m_dtype",
        lambda: scale_by_adam(m_dtype=jnp.bfloat16),
        exempt={
            "derivatives_equal_finite_differences": "rounded moments change in jumps",
            "grouped_is_the_same_where_it_says_so": "in a bucket, elements have other random bits",
            "exact_rows_is_dense_or_refuses": "moments are rounded at other steps",
        },
    ),
    Case(
        "scale_by_adam, 8 bits",
        lambda: scale_by_adam(m_dtype="scaled8", v_dtype="scaled8"),
        exempt=EIGHT_BITS,
    ),
    Case(
        "adamax, 8 bits",
        lambda: adamax(0.1, m_dtype="scaled8", u_dtype="scaled8", rows="dense"),
        exempt=EIGHT_BITS,
    ),
    Case("scale_by_amsgrad", lambda: scale_by_amsgrad()),
    Case("scale_by_amsgrad, eps", lambda: scale_by_amsgrad(0.8, 0.99, eps=1e-8)),
    Case("scale_by_adamax", lambda: scale_by_adamax(), exempt=LAZY),
    Case("scale_by_adamax, dense", lambda: scale_by_adamax(rows="dense")),
    Case("add_decayed_weights", lambda: add_decayed_weights(0.1), decays=True),
    Case(
        "add_decayed_weights, mask",
        lambda: add_decayed_weights(exponential_decay(0.1, 2, 0.5), "kernel"),
        decays=True,
    ),
    Case("scale_by_learning_rate", lambda: scale_by_learning_rate(0.1)),
    Case(
        "scale_by_learning_rate, schedule",
        lambda: scale_by_learning_rate(warmup(exponential_decay(0.1, 2, 0.5), 2, start=0.05)),
    ),
    Case(
        "scale_by_learning_rate, by_path",
        lambda: scale_by_learning_rate(by_path([("bias", cosine_decay(0.1, 9))], default=0.2)),
    ),
    Case("weight_ema", lambda: weight_ema(0.9)),
    Case("weight_ema, overwriting", lambda: weight_ema(0.9, 2), exempt=OVERWRITING),
    # complete optimizers
    Case("adam", lambda: adam(0.1)),
    Case("adam, eps", lambda: adam(cosine_decay(0.1, 10), 0.8, 0.99, eps=1e-8)),
    Case("amsgrad", lambda: amsgrad(0.1)),
    Case("adamw", lambda: adamw(0.1, weight_decay=0.1), decays=True),
    Case("adamax", lambda: adamax(0.1), exempt=LAZY),
    Case("nadam", lambda: nadam(0.1)),
    # chains and wrappers
    Case("pipeline", pipeline, decays=True),
    Case(
        "chain, overwriting",
        lambda: chain(chain(clip_by_norm(0.5), adam(0.1)), weight_ema(0.5, 3)),
        exempt=OVERWRITING,
    ),
    Case("masked", lambda: masked(scale_by_adam(), "kernel")),
    Case(
        "masked by a function",
        lambda: masked(adamw(0.1, weight_decay=0.1, mask=matrices), matrices),
        decays=True,
        exempt=WITH_FUNCTION,
    ),
    Case(
        "partition",
        lambda: partition(
            [("bias", chain(amsgrad(0.1), weight_ema(0.9))), ("kernel", adamax(0.1))],
            default=nadam(0.1),
        ),
        exempt=LAZY,
    ),
    Case("accumulate_gradients", lambda: accumulate_gradients(scale_by_adam(), 2)),
    Case(
        "accumulate_gradients, pipeline",
        lambda: accumulate_gradients(pipeline(), 2),
        decays=True,
    ),
    Case("skip_not_finite", lambda: skip_not_finite(scale_by_amsgrad())),
    Case("skip_not_finite, pipeline", lambda: skip_not_finite(pipeline()), decays=True),
    Case(
        "wrappers in wrappers",
        lambda: skip_not_finite(accumulate_gradients(masked(pipeline(), "kernel|bias"), 2)),
        decays=True,
    ),
    Case(
        "with_hyperparams",
        lambda: with_hyperparams(
            chain(adamw(0.2, weight_decay=0.3), weight_ema(0.9)),
            learning_rate=0.1,
            weight_decay=0.1,
            b1=0.8,
        ),
        decays=True,
    ),
    Case("grouped", lambda: grouped(groupable_pipeline()), decays=True),
    # rows
    Case("lazy pipeline", lazy_pipeline, exempt=LAZY),
    Case(
        "accumulate_gradients, rows",
        lambda: accumulate_gradients(pipeline(), 2, max_rows=4),
        decays=True,
        exempt={"row_gradients_mean_their_rows": "refuses dense gradients of these tables"},
        make_dense=lambda: accumulate_gradients(pipeline(), 2),
    ),
    Case(
        "exact_rows",
        lambda: exact_rows(
            chain(clip_by_global_norm(0.5), adamw(0.1, weight_decay=0.1), weight_ema(0.9)), "kernel"
        ),
        decays=True,
        exempt={
            "integers_and_bools_are_left_alone": NEEDS_A_GRADIENT,
            "mixed_trees_keep_shapes_and_dtypes": NEEDS_A_GRADIENT,
            **EXACT_ROWS,
        },
    ),
    Case(
        "exact_rows, adam",
        lambda: exact_rows(adam(0.1), "bias", history=1024),
        exempt=EXACT_ROWS,
    ),
    Case(
        "shard_state",
        lambda: shard_state(pipeline(), ONE_DEVICE, "data"),
        decays=True,
        exempt={
            "one_trace_and_donation": "the first step puts the parameters onto the mesh",
            "jit_argument": "the first step puts the parameters onto the mesh",
            "pickles": "the devices of a mesh do not pickle",
            "prints": "the repr of a mesh is not Python code",
        },
    ),
    # with optax
    Case(
        "optax in our chain",
        lambda: chain(scale_by_adam(), optax.trace(0.5), optax.scale(-0.1), weight_ema(0.9)),
        exempt={
            **WITH_OPTAX,
            "a_none_gradient_skips_its_leaf": "optax.trace drops the leaf from its state",
            "refuses_a_state_that_does_not_fit": "optax.trace accepts any state",
            "mixed_trees_keep_shapes_and_dtypes": "optax.trace drops the leaf from its state",
        },
    ),
    Case(
        "ours in optax.chain",
        lambda: optax.chain(
            clip_by_global_norm(0.5), scale_by_adam(), optax.scale(-0.1), weight_ema(0.9)
        ),
        exempt=OPTAX_CHAIN,
    ),
]
# The transforms that an error may name, for a case whose repr does not show its parts.
NOT_PRINTED = {"ours in optax.chain": "clip_by_global_norm, scale_by_adam"}
BY_NAME = {case.name: case for case in CASES}
LAWS = set()


def marks(case, name):
    """The marks of a law's test on a case: if the case is exempt, the test must fail."""
    LAWS.add(name)
    reason = case.exempt.get(name)
    return [pytest.mark.xfail(strict=True, reason=reason)] if reason else []


def law(test):
    """A decorator that makes a test a law."""
    name = test.__name__.removeprefix("test_")
    params = [pytest.param(case, id=case.id, marks=marks(case, name)) for case in CASES]
    return pytest.mark.parametrize("case", params)(test)


# --- the laws of adamjax.testing ----------------------------------------------------------------


@functools.cache
def trial(name):
    """The `Trial` of a case. All laws share it, so that its step is compiled only once."""
    return testing.Trial(BY_NAME[name].tx)


# `test_refuses_wrong_gradients`, below, is stricter than the law that is left out.
PUBLIC_LAWS = [name for name in testing.LAWS if name != "refuses_gradients_that_do_not_fit"]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{name}-{case.id}", marks=marks(case, name))
        for case in CASES
        for name in PUBLIC_LAWS
    ],
)
def test_law(case, name):
    testing.try_law(name, trial(case.name))


def make_params(dtype=jnp.float32):
    return trial("identity").params_in(dtype)


def make_grads(t, dtype=jnp.float32):
    return trial("identity").grads(t, dtype)


def compiled_step(name):
    return trial(name).compiled


def trajectory(name, dtype):
    return trial(name).trajectory(dtype)


def step_of(tx):
    return testing.Trial(tx).step


# --- values -------------------------------------------------------------------------------------


@law
@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64], ids=lambda d: d.__name__
)
@pytest.mark.slow
def test_zero_gradients_move_nothing(case, dtype):
    """From a new state only decay moves weights, towards zero. Averages of weights stay finite."""
    is_float64 = dtype == jnp.float64
    with enable_x64(is_float64), jax.disable_jit(is_float64):
        params = make_params(dtype)
        zeros = jax.tree.map(jnp.zeros_like, params)
        state = case.tx.init(params)
        for _ in range(2 if is_float64 else 3):
            moved, state, updates = compiled_step(case.name)(params, state, zeros)
            for u, p, p1 in zip(*map(leaves, (updates, params, moved)), strict=True):
                if case.decays:
                    assert np.all(np.isfinite(u))
                    uphill = case.name.startswith("add_decayed_weights")
                    assert np.all((u * p >= 0) if uphill else (u * p <= 0))
                else:
                    assert np.all(u == 0)
                    np.testing.assert_array_equal(p1, p)
            if not case.decays:
                averages = [x for x in jax.tree.leaves(state) if x.dtype == dtype and x.size]
                assert all(np.all(np.isfinite(x)) for x in averages)
            params = moved


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["weight_ema, overwriting", "chain, overwriting"])
def test_low_precision_updates_that_overwrite_weights(name, dtype):
    """Such an update is a difference of rounded weights, so it may be off by their ulp."""
    twin_state = BY_NAME[name].tx.init(cast(make_params(dtype), jnp.float32))
    for params, _, grads, updates in trajectory(name, dtype)[:-1]:
        twin = compiled_step(name)(cast(params, jnp.float32), twin_state, cast(grads, jnp.float32))
        _, twin_state, twin_updates = twin
        for u, exact, p in zip(*map(leaves, (updates, twin_updates, params)), strict=True):
            u, exact = u.astype(np.float64), exact.astype(np.float64)
            bound = 0.505 * ulp(exact, dtype) + ulp(np.abs(p.astype(np.float64)) + 0.5, dtype)
            assert np.all(np.abs(u - exact) <= bound), (u, exact)


@law
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.slow
def test_low_precision_weights_move_as_their_float32_twins(case, dtype):
    """A float32 run differs by no more than the roundings of weights and updates so far."""
    params = cast(make_params(dtype), jnp.float32)
    start, state = params, case.tx.init(params)
    bounds = [0.0] * len(leaves(params))
    for t, (low, _, grads, updates) in enumerate(trajectory(case.name, dtype)):
        for p, p32, bound in zip(leaves(low), leaves(params), bounds, strict=True):
            # Decay and averages add to a difference of weights: 1.5 covers that.
            assert np.all(np.abs(p.astype(np.float64) - p32) <= 1.5 * bound), t
        if grads is None:
            break
        params, state, _ = compiled_step(case.name)(params, state, cast(grads, jnp.float32))
        rounded = zip(bounds, leaves(updates), leaves(params), strict=True)
        bounds = [b + 0.5 * ulp(p, dtype) + 0.5 * ulp(u, dtype) for b, u, p in rounded]
    moves = zip(*map(leaves, (start, params)), bounds, strict=True)
    assert any(np.any(np.abs(p - p0) > 10 * bound) for p0, p, bound in moves)


@law
def test_complex_weights(case):
    """Complex parameters stay complex and finite, and their imaginary parts have updates."""
    params = {"layer": {"kernel": jnp.array([[1 + 2j, 0.5 - 1j]]), "bias": jnp.array([-1j])}}
    state = case.tx.init(params)
    for t in range(2):
        grads = jax.tree.map(lambda p, t=t: (1 + t - 2j) * jnp.ones_like(p), params)
        before = params
        updates, state = case.tx.update(grads, state, params)
        assert avals(updates) == avals(grads)
        params = adamjax.apply_updates(params, updates)
        assert avals(params) == avals(before)
        assert all(np.all(np.isfinite(x)) for x in leaves(params))
    if case.name != "masked":
        assert all(np.any(np.abs(x.imag) > 0) for x in leaves(updates))


@law
def test_counts_stay_at_the_largest_int32(case):
    """At the largest int32 counts stop, and steps go on."""
    largest = jnp.array(jnp.iinfo(jnp.int32).max, jnp.int32)

    def late(path, x):
        return largest if jax.tree_util.keystr(path).endswith(".count") else x

    params = make_params()
    state = jax.tree_util.tree_map_with_path(late, case.tx.init(params))
    for t in range(2):
        params, state, _ = compiled_step(case.name)(params, state, make_grads(t))
    assert all(np.all(np.isfinite(p)) for p in leaves(params))
    assert_same(jax.tree_util.tree_map_with_path(late, state), state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["adam, eps", "amsgrad", "adamax", "nadam", "pipeline"])
@pytest.mark.slow
def test_low_precision_twins_over_hundreds_of_steps(name, dtype):
    """Updates differ from those of a float32 twin by one rounding at most, and the weights move.

    Both states are float32, so no roundings add up in them. (A scalar may return to its start, as
    bfloat16 has few digits.)
    """
    tx = BY_NAME[name].tx

    def body(carry, key):
        params, state, twin_state = carry
        grads = cast(jax.tree.map(lambda p: jax.random.normal(key, p.shape) + 0.1, params), dtype)
        updates, state = tx.update(grads, state, params)
        wide_params, wide_grads = cast(params, jnp.float32), cast(grads, jnp.float32)
        twin_updates, twin_state = tx.update(wide_grads, twin_state, wide_params)
        params = adamjax.apply_updates(params, updates)
        return (params, state, twin_state), (updates, twin_updates)

    start = make_params(dtype)
    keys = jax.random.split(jax.random.key(0), 300)
    carry = start, tx.init(start), tx.init(cast(start, jnp.float32))
    (end, _, _), updates = jax.jit(lambda c: jax.lax.scan(body, c, keys))(carry)
    for before, after, u, twin in zip(*map(leaves, (start, end, *updates)), strict=True):
        u, twin = u.astype(np.float64), twin.astype(np.float64)
        assert np.all(np.abs(u - twin) <= 0.505 * ulp(twin, dtype))
        assert np.any(before != after) or before.shape == ()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (adam(0.1, eps=1e-8), optax.adam(0.1)),
        (adamw(0.1, eps=1e-8, weight_decay=0.1), optax.adamw(0.1, weight_decay=0.1)),
        (
            chain(clip_by_global_norm(0.5), adam(0.1, eps=1e-8)),
            optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
        ),
    ],
    ids=["adam", "adamw", "clip"],
)
def test_complex_weights_move_as_with_optax(ours, theirs):
    rng = np.random.default_rng(0)

    def draw():
        return jnp.asarray(rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3)), jnp.complex64)

    p = q = {"wave": draw(), "real": draw().real}
    s, r = ours.init(p), theirs.init(q)
    for _ in range(4):
        grads = {"wave": draw(), "real": draw().real}
        u, s = ours.update(grads, s, p)
        v, r = theirs.update(grads, r, q)
        p, q = adamjax.apply_updates(p, u), optax.apply_updates(q, v)
        assert_close(p, q, rtol=1e-5)


# --- rows ---------------------------------------------------------------------------------------

# The indices of each step's row gradients: some rows twice, rows 4 and 6 never, and some indices
# outside of the table. One case accumulates the gradients of two steps, with `max_rows=4`: so steps
# 0 and 1 together touch at most four rows, and so do steps 2 and 3, and steps 4 and 5.
ROWS = 7
TOUCHED = ([0, 3, 0, 5], [3, 0, 3, 5], [2, 2, 5, -1], [5, 7, 1, 2], [0, 3, 1, 0], [1, 3, 1, 1])


def table_params():
    """`make_params` with two tables in place of its kernel and bias; the bias' rows are scalars."""
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(ROWS, 3)), rng.normal(size=ROWS)
    return replaced(
        make_params(),
        kernel=jnp.asarray(kernel, jnp.float32),
        bias=jnp.asarray(bias, jnp.float32),
    )


def row_grads(t, touched=TOUCHED):
    rng, ids = np.random.default_rng(200 + t), jnp.asarray(touched[t], jnp.int32)

    def rows(*trailing):
        values = jnp.asarray(rng.normal(size=(ids.size, *trailing)), jnp.float32)
        return adamjax.row_gradient(ids, values, ROWS)

    gain = jnp.asarray(rng.normal(), jnp.float32)
    return {"gain": gain, "layer": {"kernel": rows(3), "bias": rows()}}


def of_kernel(tree):
    """The leaves that belong to the kernel: the weights, their slots, their average."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [x for path, x in found if "kernel" in jax.tree_util.keystr(path)]


def is_row_gradient(x):
    return isinstance(x, RowGradient)


def to_dense(tree):
    def dense(x):
        return x.to_dense() if is_row_gradient(x) else x

    return jax.tree.map(dense, tree, is_leaf=is_row_gradient)


def run_all_steps(tx, grads):
    """Weights and state after a step with each of the gradients; all rows are up to date.

    Without jit: each operation is compiled once for all cases.
    """
    with jax.disable_jit():
        params = table_params()
        state = tx.init(params)
        for g in grads:
            params, state, _ = step_of(tx)(params, state, g)
        if isinstance(tx, exact_rows):
            params, state = tx.flush(params, state)
            state = state.inner  # without the clock, the ring and so on
        return params, to_dense(state)


@functools.cache
def run_with_dense_gradients(name, steps_with_rows, steps):
    """`run_all_steps` with dense gradients, those of tables being 0 from `steps_with_rows` on."""
    grads = [to_dense(row_grads(t)) for t in range(steps)]
    for g in grads[steps_with_rows:]:
        g["layer"] = jax.tree.map(jnp.zeros_like, g["layer"])
    return run_all_steps(BY_NAME[name].dense, grads)


@law
@pytest.mark.slow
def test_row_gradients_equal_dense_ones(case):
    """Row gradients lead to the weights and the state of their dense gradients."""
    steps = len(TOUCHED)
    found = run_all_steps(case.tx, [row_grads(t) for t in range(steps)])
    assert_close(found, run_with_dense_gradients(case.name, steps, steps))


@law
@pytest.mark.slow
def test_a_row_gradient_without_rows_equals_zeros(case):
    """Without an index in the table, all rows decay and move on by momentum."""
    touched = [*TOUCHED[:2], [], [-1, ROWS, -ROWS, 99]]
    grads = [row_grads(t, touched=touched) for t in range(len(touched))]
    for t, g in enumerate(grads):
        g["gain"] = row_grads(t)["gain"]
    found = run_all_steps(case.tx, grads)
    assert_close(found, run_with_dense_gradients(case.name, 2, len(touched)))


@pytest.mark.parametrize("case", [case for case in CASES if case.is_lazy], ids=lambda c: c.id)
def test_lazy_rows_stand_still(case):
    """A row without a gradient keeps its weights, slots and average, bit for bit."""
    with jax.disable_jit():
        params = table_params()
        state = case.tx.init(params)
        for t, ids in enumerate(TOUCHED):
            before, start = of_kernel((params, state)), params
            params, state, _ = step_of(case.tx)(params, state, row_grads(t))
            still = np.setdiff1d(np.arange(ROWS), ids)
            for x, y in zip(before, of_kernel((params, state)), strict=True):
                assert_same(y[still], x[still])
            if not case.name.startswith("scale_by"):
                moved = np.intersect1d(np.arange(ROWS), ids)
                kernels = (p["layer"]["kernel"][moved] for p in (start, params))
                assert np.all(np.not_equal(*kernels))


# --- hyperparameters ----------------------------------------------------------------------------


def hyperparameters(tx):
    """The float hyperparameters, and a function that makes the transform with other values."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tx)
    found = [x for _, x in with_paths]
    # `exact_rows` computes with some numbers in advance, so these must stay as they are.
    fixed = {name for part in walk(as_transform(tx)) for name in part.tx.python_numbers}
    where = [
        i
        for i, (path, x) in enumerate(with_paths)
        if isinstance(x, float) and getattr(path[-1], "name", None) not in fixed
    ]

    def make(values):
        changed = dict(zip(where, values, strict=True))
        return treedef.unflatten([changed.get(i, x) for i, x in enumerate(found)])

    return [found[i] for i in where], make


def outcome(tx, grads, steps=3):
    """A weighted sum of the updates of some steps; every second step has half the gradients.

    Call it without jit: then each operation is compiled once for all cases.
    """
    params = cast(make_params(), grads["gain"].dtype)
    state, total = tx.init(params), 0.0
    for t in range(steps):
        used = jax.tree.map(lambda g, t=t: g / (1 + t % 2), grads)
        updates, state = tx.update(used, state, params)
        for i, u in enumerate(jax.tree.leaves(updates)):
            total += jnp.sum(np.cos(t + i + np.arange(u.size)) * u.ravel())
        params = adamjax.apply_updates(params, updates)
    return total


def slopes(case, grads, steps=3):
    """The derivatives of `outcome` with respect to the hyperparameters and to the gradients."""
    values, make = hyperparameters(case.tx)
    return jax.grad(lambda v, g: outcome(make(v), g, steps), argnums=(0, 1))(values, grads)


@law
@pytest.mark.slow
def test_derivatives_are_finite_at_zero_gradients(case):
    # Two steps: where gradients are accumulated, the first one moves no weights.
    with jax.disable_jit():
        found = slopes(case, jax.tree.map(jnp.zeros_like, make_params()), steps=2)
    assert all(np.all(np.isfinite(x)) for x in leaves(found))


@law
@pytest.mark.slow
def test_derivatives_equal_finite_differences(case):
    """With respect to every hyperparameter, and along one direction of the gradients."""
    with enable_x64(True), jax.disable_jit():
        values, make = hyperparameters(case.tx)
        grads, direction = make_grads(0, jnp.float64), make_grads(9, jnp.float64)
        by_values, by_grads = slopes(case, grads)

        for i, x in enumerate(values):
            # A beta of 0 is at the edge of its range, so the difference is one-sided.
            h = max(1e-6 * x, 1e-9)
            low = values if x == 0.0 else [*values[:i], x - h, *values[i + 1 :]]
            high = [*values[:i], x + h, *values[i + 1 :]]
            rise = outcome(make(high), grads) - outcome(make(low), grads)
            np.testing.assert_allclose(
                by_values[i], rise / (high[i] - low[i]), rtol=1e-5, atol=1e-6
            )

        h = 1e-6
        low = jax.tree.map(lambda g, d: g - h * d, grads, direction)
        high = jax.tree.map(lambda g, d: g + h * d, grads, direction)
        rise = outcome(case.tx, high) - outcome(case.tx, low)
        along = sum(map(np.vdot, leaves(by_grads), leaves(direction)))
        np.testing.assert_allclose(along, rise / (2 * h), rtol=1e-5, atol=1e-6)


# --- trees --------------------------------------------------------------------------------------


def replaced(tree, **entries):
    return {**tree, "layer": {**tree["layer"], **entries}}


def without(tree, name):
    return {**tree, "layer": {k: v for k, v in tree["layer"].items() if k != name}}


# By name, a function that makes correct gradients wrong, and words of the error.
WRONG = {
    "scalar for an array": (
        lambda g: replaced(g, kernel=jnp.float32(1)),
        ("layer/kernel", "(2, 3)", "()"),
    ),
    "Python number for an array": (lambda g: replaced(g, kernel=1.0), ("layer/kernel", "(2, 3)")),
    "shape that broadcasts": (
        lambda g: replaced(g, kernel=jnp.ones((1, 3))),
        ("layer/kernel", "(2, 3)", "(1, 3)"),
    ),
    "transposed": (
        lambda g: replaced(g, kernel=jnp.ones((3, 2))),
        ("layer/kernel", "(2, 3)", "(3, 2)"),
    ),
    "complex for real": (
        lambda g: replaced(g, kernel=jnp.ones((2, 3), jnp.complex64)),
        ("layer/kernel", "real", "complex64"),
    ),
    "integer for float": (
        lambda g: replaced(g, kernel=jnp.ones((2, 3), jnp.int32)),
        ("layer/kernel", "floating", "int32"),
    ),
    "missing leaf": (lambda g: without(g, "kernel"), ("no leaf 'layer/kernel'",)),
    "surplus leaf": (lambda g: replaced(g, extra=jnp.ones(3)), ("has a leaf 'layer/extra'",)),
    "list for dict": (
        lambda g: {**g, "layer": list(g["layer"].values())},
        ("'layer/", "expected the structure of"),
    ),
    "leaf for dict": (lambda g: {**g, "layer": g["gain"]}, ("'layer",)),
    "dict for leaf": (lambda g: {**g, "gain": {"x": g["gain"]}}, ("'gain",)),
    "string for an array": (
        lambda g: replaced(g, kernel="gradient"),
        ("layer/kernel", "expected an array", "str"),
    ),
}


@law
def test_refuses_wrong_gradients(case):
    """A wrong tree of gradients is refused, and the error names the transform and the leaf."""
    params, grads = make_params(), make_grads(0)
    state = case.tx.init(params)
    printed = NOT_PRINTED.get(case.name, repr(case.tx))
    for name, (make_wrong, words) in WRONG.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            case.tx.update(make_wrong(grads), state, params)
        message = str(caught.value)
        owner, _, rest = message.partition(": ")
        assert owner in printed, f"{name}: {message}"
        for word in words:
            assert word in rest, f"{name}: {message}"


# --- data ---------------------------------------------------------------------------------------


@law
def test_a_transform_made_twice_is_equal(case):
    assert case.tx is not case.make()
    assert case.tx == case.make()
    assert hash(case.tx) == hash(case.make())


# Public transforms that cannot be in `CASES`, and why.
NOT_IN_CASES = {
    "Transform": "the base class",
    "sum_over": "needs a mapped axis: tests/test_replicas.py",
    "master_weights": "updates of narrow parameters are float32: tests/test_master.py",
}


def test_the_table_is_complete():
    """`CASES` has every public transform and optimizer, and `exempt` names only laws."""
    text = " ".join(repr(case.tx) for case in CASES)
    for name in adamjax.__all__:
        made = getattr(adamjax, name)
        if isinstance(made, type) and issubclass(made, adamjax.Transform):
            assert (f"{name}(" in text) != (name in NOT_IN_CASES), name
    assert {"adam", "amsgrad", "adamw", "adamax", "nadam"} <= set(BY_NAME)
    assert {law for case in CASES for law in case.exempt} <= LAWS
