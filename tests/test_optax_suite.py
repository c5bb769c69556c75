"""optax's tests of its optimizers, written anew for ours.

They have the targets, rates, dtypes and tolerances of the tests of optax 0.2.8. Under each file of
optax's tests: the tests in it, and after the arrow our tests.

_src/alias_test
  test_optimization: parabola and Rosenbrock, float32 and complex64, 10,000 steps
    -> test_reaches_the_optimum. Here adamw gets optax's default weight decay, 1e-4. Our default
    is Keras' 0.004, which would move the optimum of the complex Rosenbrock function by 0.11 (in
    optax's adamw, by 0.10).
  test_optimizers_accept_extra_args -> test_extra_arguments
  test_optimizers_can_be_wrapped_in_inject_hyperparams -> test_injected_hyperparameters
  test_explicit_dtype -> test_explicit_dtype. With two differences: without `m_dtype` a bfloat16
    parameter's moments are float32; and a complex `m_dtype` is refused, as m is complex if and
    only if the parameter is.
  test_preserve_dtype -> test_updates_have_the_dtype_of_the_gradients
  test_state_shape_dtype_shard_stability -> test_state_is_stable_under_cond
  test_gradient_accumulation -> test_multi_steps
_src/transform_test
  test_scalers -> test_rules_are_finite; test_scale -> test_scale;
  test_rms_match_adam -> test_adam_without_momentum_is_rms
_src/float64_test -> test_dtypes_under_x64
_src/sharding_test
  test_init_with_abstract_input -> test_abstract_parameters, by jax.eval_shape, and
    test_shapes_as_parameters, where `init` itself takes shapes. The sharding of states is in
    test_integration.py, which has several devices.
_src/update_test, but for incremental_update and periodic_update, which take no transform
  -> test_apply_updates_is_that_of_optax
_src/base_test
  ExtraArgsTest -> test_extra_arguments*. Ours are no named tuples, so they are no instances of
  GradientTransformation.
schedules/_inject_test, with scale, scale_by_adam and clip_by_global_norm
  -> test_injected_schedules, test_injected_hyperparameters_can_be_set,
  test_injected_static_arguments, test_injected_dtypes
transforms/_combining_test
  test_chain -> test_chain; test_extra_args* -> test_extra_arguments*; PartitionTest
  -> test_multi_transform, test_empty_trees; NamedChainTest -> test_named_chain
transforms/_masking_test
  test_masked, test_prefix_mask, test_update_requires_params, test_mask_fn, test_nested_mask,
  test_masked_state_structure, test_mask_compatible_callable_pytree -> test_masks*;
  test_empty -> test_empty_trees; test_tree_map_params -> test_map_params_of_masked
transforms/_accumulation_test
  all of MultiSteps, with our transforms inside -> test_multi_steps*. Not ema, trace and the
  functions that decide which steps are skipped: these are optax's own
transforms/_conditionality_test -> test_apply_if_finite, test_conditionally
transforms/_clipping_test: clip_by_global_norm, and clip_by_norm in place of clip_by_block_rms, have
  stricter tests in test_clip.py
transforms/_freezing_test -> test_freeze
tree_utils/_state_utils_test -> test_map_params, test_get_and_set
contrib/_common_test
  the wrappers mechanize, schedule_free and reduce_on_plateau around our optimizers
  -> test_mechanize, test_schedule_free, test_reduce_on_plateau. Not contrib's own optimizers
contrib/_complex_valued_test -> test_split_real_and_imaginary
_src/lookahead_test, contrib/_sam_test -> test_lookahead, test_sam

The other tests are about other things: losses, projections, assignment, linear algebra, line
searches, perturbations, microbatching, privacy, and optimizers that have no counterpart here.
"""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, assert_same, avals, enable_x64, jit_and_traces

import adamjax

contrib = pytest.importorskip("optax.contrib")
tree_utils = optax.tree_utils

# By name, an optimizer with the learning rate that optax's tests use for its counterpart.
OPTIMIZERS = {
    "adam": functools.partial(adamjax.adam, 0.1),
    "amsgrad": functools.partial(adamjax.amsgrad, 0.1),
    "adamw": functools.partial(adamjax.adamw, 0.1, weight_decay=1e-4),
    "adamax": functools.partial(adamjax.adamax, 0.1),
    "nadam": functools.partial(adamjax.nadam, 0.01),
}
RULES = {
    "adam": adamjax.scale_by_adam,
    "amsgrad": adamjax.scale_by_amsgrad,
    "adamax": adamjax.scale_by_adamax,
    "nadam": functools.partial(adamjax.scale_by_adam, nesterov=True),
}
PARAMS = (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
GRADS = (jnp.array([500.0, 5.0]), jnp.array([300.0, 3.0]))
# optax corrects biases by 1 - b**t in float32, which is off by 1e-5 at small t.
ROUNDING = 2e-5
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def squared(x):
    return jnp.real(x * jnp.conj(x))


# Targets: each function returns a start, the optimum and the objective.


def parabola(dtype):
    goal = jnp.array([1.0, -1.0, 1.0], dtype)
    goal = goal * (1 + 1j) if jnp.iscomplexobj(goal) else goal
    return jnp.array([-1.0, 10.0, 1.0], dtype), goal, lambda p: jnp.sum(squared(p - goal))


def rosenbrock(dtype):
    a = 1 + 1j if jnp.issubdtype(dtype, jnp.complexfloating) else 1.0
    goal = jnp.array([a, a**2], dtype)
    return (
        jnp.zeros(2, dtype),
        goal,
        lambda p: squared(a - p[0]) + 100 * squared(p[1] - p[0] ** 2),
    )


def mixed(dtype):
    goal = (jnp.array([1.0, -1.0, 2.0], dtype), jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype))

    def objective(p):
        return sum(jnp.sum(squared(x - y)) for x, y in zip(p, goal, strict=True))

    return jax.tree.map(jnp.zeros_like, goal), goal, objective


def minimized(tx, p, objective, steps, state=None, with_value=False):
    """The parameters and the state after a scan over steps of `tx`."""

    def step(carry, _):
        p, state = carry
        value, g = jax.value_and_grad(objective)(p)
        g = jax.tree.map(jnp.conj, g)  # for steepest ascent in the complex plane
        extra = {"value": value} if with_value else {}
        updates, state = tx.update(g, state, p, **extra)
        return (optax.apply_updates(p, updates), state), None

    def run(carry):
        return jax.lax.scan(step, carry, length=steps)[0]

    return jax.jit(run)((p, tx.init(p) if state is None else state))


def assert_near(p, goal):
    """With the tolerance of optax's tests: 0.03 plus 0.03 times the goal."""
    for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(goal), strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-2, atol=3e-2)


# --- the optimizers -------------------------------------------------------------------------------


def joined(*targets):
    """Several targets as one. The optimizers work element by element, so each moves as alone."""
    starts, goals, objectives = zip(*targets, strict=True)

    def objective(p):
        return sum(f(x) for f, x in zip(objectives, p, strict=True))

    return starts, goals, objective


@each_optimizer
def test_reaches_the_optimum(name):
    targets = [t(d) for t in (parabola, rosenbrock) for d in (jnp.float32, jnp.complex64)]
    p, goal, objective = joined(*targets)
    tx = OPTIMIZERS[name]()
    state = tree_utils.tree_map_params(tx, lambda x: x, tx.init(p))
    assert_same(state, tx.init(p))
    p, state = minimized(tx, p, objective, 10_000, state)
    assert_near(p, goal)
    assert adamjax.step_count(state) == 10_000


@each_optimizer
def test_compiles_once(name):
    p, _, objective = rosenbrock(jnp.float32)
    tx = OPTIMIZERS[name]()

    def step(p, state):
        updates, state = tx.update(jax.grad(objective)(p), state, p)
        return optax.apply_updates(p, updates), state

    step, traces = jit_and_traces(step)
    state = tx.init(p)
    for _ in range(3):
        p, state = step(p, state)
    assert len(traces) == 1


@each_optimizer
def test_extra_arguments(name):
    """Unknown arguments have no effect."""
    tx = OPTIMIZERS[name]()
    state, extra = tx.init(PARAMS), {"unexpected": 1, "value": jnp.array(2.0)}
    expected = jax.jit(tx.update)(GRADS, state, PARAMS)
    assert_same(jax.jit(tx.update)(GRADS, state, PARAMS, **extra), expected)
    wrapped = optax.with_extra_args_support(tx)
    assert isinstance(wrapped, optax.GradientTransformationExtraArgs)
    assert_same(jax.jit(wrapped.update)(GRADS, state, PARAMS, **extra), expected)


def test_extra_arguments_reach_the_transforms_that_accept_them():
    def update(updates, state, params=None, *, loss, **extra):
        return jax.tree.map(lambda u: u * loss, updates), state

    def update_without(updates, state, params=None):
        assert params is not None
        return updates, state

    by_loss = optax.GradientTransformationExtraArgs(lambda params: (), update)
    no_extra = optax.GradientTransformation(lambda params: (), update_without)
    expected = adamjax.scale(-2.0).update(GRADS, ())[0]
    ours = adamjax.chain(adamjax.scale(-1.0), by_loss)
    for tx in (
        optax.chain(adamjax.scale(-1.0), by_loss, no_extra),
        adamjax.chain(adamjax.scale(-1.0), by_loss, no_extra),
        optax.chain(no_extra, optax.GradientTransformationExtraArgs(*ours)),
        adamjax.skip_not_finite(adamjax.chain(ours, no_extra)),
        adamjax.partition([("0", ours)], default=adamjax.chain(ours, no_extra)),
    ):
        state = tx.init(PARAMS)
        updates, _ = tx.update(GRADS, state, PARAMS, loss=2.0, ignored="x")
        assert_close(updates, expected)
        with pytest.raises(TypeError, match="loss"):
            tx.update(GRADS, state, PARAMS)
    # optax passes them only to a `GradientTransformationExtraArgs`, which `ours` is not.
    tx = optax.chain(no_extra, ours)
    with pytest.raises(TypeError, match="loss"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, loss=2.0)


@each_optimizer
def test_updates_have_the_dtype_of_the_gradients(name):
    tx, p = OPTIMIZERS[name](), [jnp.array([1.0, 2.0], d) for d in (jnp.bfloat16, jnp.float32)]
    updates, _ = jax.jit(tx.update)(p, jax.jit(tx.init)(p), p)
    assert avals(updates) == avals(p)


@pytest.mark.parametrize("make", [adamjax.adam, adamjax.amsgrad, adamjax.adamw, adamjax.adamax])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64, None])
@pytest.mark.parametrize("m_dtype", ["bfloat16", "float32", jnp.float32, None])
def test_explicit_dtype(make, dtype, m_dtype):
    p = jnp.zeros(2, dtype)
    m = tree_utils.tree_get(make(0.1, m_dtype=m_dtype).init(p), "m")
    expected = jnp.complex64 if jnp.iscomplexobj(p) else jnp.dtype(m_dtype or jnp.float32)
    assert m.dtype == expected


def test_a_complex_dtype_of_moments_is_refused():
    with pytest.raises(TypeError, match="m_dtype must be a real floating dtype"):
        adamjax.adam(0.1, m_dtype=jnp.complex64)


@each_optimizer
@pytest.mark.parametrize("x64", [False, True])
def test_state_is_stable_under_cond(name, x64):
    """Updates and the new state have the shapes and dtypes that `lax.cond` requires."""
    narrow = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64)
    with enable_x64(x64):
        dtypes = (jnp.float64, jnp.complex128) if x64 else narrow
        p, _, objective = joined(*(parabola(dtype) for dtype in dtypes))
        tx = OPTIMIZERS[name]()

        @jax.jit
        def step(is_taken, p, state):
            g = jax.tree.map(jnp.conj, jax.grad(objective)(p))
            zeros = jax.tree.map(jnp.zeros_like, p)
            updates, state = jax.lax.cond(
                is_taken, lambda: tx.update(g, state, p), lambda: (zeros, state)
            )
            return optax.apply_updates(p, updates), state

        state = tx.init(p)
        assert_same(step(False, p, state), (p, state))
        moved = step(True, p, state)
        assert avals(moved) == avals((p, state))
        assert all(after[0] != before[0] for after, before in zip(moved[0], p, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_rules_are_finite(name):
    tx = RULES[name]()
    state, update = jax.jit(tx.init)(PARAMS), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(GRADS, state, PARAMS)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((updates, state)))
        assert avals(updates) == avals(PARAMS)


def test_scale():
    for i in range(1, 31):  # smaller products are below the smallest normal float32
        factor = 0.1**i
        scaled, state = adamjax.scale(factor).update(GRADS, ())
        assert state == ()
        assert_close(scaled, jax.tree.map(lambda x, f=factor: x * f, GRADS), 1e-7)


def test_adam_without_momentum_is_rms():
    rms = optax.scale_by_rms(decay=0.999, eps_in_sqrt=False, bias_correction=True)

    def objective(p):
        return sum(jnp.sum(x**2) for x in p)

    ours, _ = minimized(adamjax.scale_by_adam(b1=0.0, eps=1e-8), PARAMS, objective, 5)
    theirs, _ = minimized(rms, PARAMS, objective, 5)
    assert_close(ours, theirs, 1e-5)


@each_optimizer
def test_dtypes_under_x64(name):
    """Leaves of float32 and of float64 in one tree keep their dtypes."""
    with enable_x64(True):
        p = (jnp.array([1.0, 2.0], jnp.float32), jnp.array([3.0, 4.0], jnp.float64))
        g = (jnp.array([10.0, 21.0], jnp.float32), jnp.array([33.0, 42.0], jnp.float64))
        tx = OPTIMIZERS[name]()
        state = jax.jit(tx.init)(p)
        updates, new_state = jax.jit(tx.update)(g, state, params=p)
        assert avals(new_state) == avals(state)
        assert avals(optax.apply_updates(p, updates)) == avals(p)
        assert avals(adamjax.apply_updates(p, updates)) == avals(p)


def test_apply_updates_is_that_of_optax():
    params = ({"a": jnp.ones((3, 2))}, jnp.ones(1))
    updates = jax.tree.map(lambda p: 2 * p, params)
    assert_same(
        jax.jit(adamjax.apply_updates)(params, updates), optax.apply_updates(params, updates)
    )
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    moved = jax.jit(adamjax.apply_updates)(narrow, updates)
    assert_same(moved, optax.apply_updates(narrow, updates))
    assert adamjax.apply_updates(None, None) is None


def test_shapes_as_parameters():
    """`init` makes zeros from shapes alone, as that of optax does."""
    shape = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
    tx = adamjax.adam(0.1)
    assert_same(tx.init({"w": shape}), tx.init({"w": jnp.zeros(shape.shape)}))


@each_optimizer
def test_abstract_parameters(name):
    tx, shape = OPTIMIZERS[name](), jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
    abstract = jax.eval_shape(tx.init, {"w": shape})
    assert avals(abstract) == avals(tx.init({"w": jnp.zeros(shape.shape)}))


# --- injected hyperparameters ---------------------------------------------------------------------


@each_optimizer
def test_injected_hyperparameters(name):
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]
    make, keywords = OPTIMIZERS[name].func, OPTIMIZERS[name].keywords
    rate = OPTIMIZERS[name].args[0]
    plain, injected = make(rate, **keywords), optax.inject_hyperparams(make)(rate, **keywords)
    updates, state = jax.jit(plain.update)(grads, jax.jit(plain.init)(params), params)
    injected_state = jax.jit(injected.init)(params)
    # optax injects the arguments that are numbers. The default of eps is None in the others.
    eps = {"eps"} if name in ("adamax", "nadam") else set()
    assert set(injected_state.hyperparams) == {"learning_rate", "b1", "b2", *keywords} | eps
    injected_updates, injected_state = jax.jit(injected.update)(grads, injected_state, params)
    # An injected b2 is the float32 0.999, so that 1 - b2, and with it v, is off by 1.3e-5.
    assert_close(injected_updates, updates, 1e-5)
    assert_close(injected_state.inner_state, state, 2e-5)


def test_injected_schedules():
    rate = optax.piecewise_constant_schedule(3.0, {1: 5, 7: 2, 12: 1.5})
    tx = optax.inject_hyperparams(adamjax.scale)(factor=rate)
    params = [jnp.zeros([])]
    state = jax.jit(tx.init)(params)
    state = tree_utils.tree_map_params(tx, lambda x: x, state)
    update = jax.jit(tx.update)
    for expected in [3.0] + [15.0] * 6 + [30.0] * 5 + [45.0] * 3:
        updates, state = update([jnp.ones([])], state, params)
        np.testing.assert_allclose(updates[0], expected, rtol=1e-6)
    # The first update has count 0.
    tx = optax.inject_hyperparams(adamjax.scale)(lambda count: count)
    updates, _ = jax.jit(tx.update)(jnp.ones(3), tx.init(jnp.zeros(3)), jnp.zeros(3))
    assert_same(updates, jnp.zeros(3))


def test_injected_schedules_of_ours():
    """optax calls our schedules, and a step uses the rate that optax injects."""
    rate = adamjax.cosine_decay(0.1, 8)
    p, _, objective = mixed(jnp.float32)
    injected = optax.inject_hyperparams(adamjax.amsgrad)(rate, b1=0.8)
    q, state = minimized(injected, p, objective, 6)
    expected, _ = minimized(adamjax.amsgrad(rate, b1=0.8), p, objective, 6)
    assert_close(q, expected, 1e-5)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], rate(5), rtol=1e-6)


def test_injected_hyperparameters_can_be_set():
    tx = optax.inject_hyperparams(adamjax.clip_by_global_norm)(0.1)
    grads = jnp.ones((3, 5, 7))
    state, (update, traces) = jax.jit(tx.init)(grads), jit_and_traces(tx.update)
    for i in range(5):
        state.hyperparams["max_norm"] = jnp.array(i, jnp.float32)
        updates, state = update(grads, state, grads)
        np.testing.assert_allclose(jnp.linalg.norm(updates.ravel()), i, rtol=1e-6)
    assert len(traces) == 1


def test_the_step_after_tree_set_has_the_new_rate():
    tx = optax.inject_hyperparams(adamjax.adam)(0.1)
    state, (update, traces) = tx.init(PARAMS), jit_and_traces(tx.update)
    first, _ = update(GRADS, state, PARAMS)
    state = tree_utils.tree_set(state, learning_rate=jnp.float32(0.025))
    assert tree_utils.tree_get(state, "learning_rate") == jnp.float32(0.025)
    quarter, _ = update(GRADS, state, PARAMS)
    assert_close(quarter, jax.tree.map(lambda u: u / 4, first), 1e-6)
    assert len(traces) == 1


def test_injected_static_arguments():
    tx = optax.inject_hyperparams(adamjax.scale_by_adam, static_args=("b1",))(b1=0.8, b2=0.9)
    state = jax.jit(tx.init)(PARAMS)
    assert set(state.hyperparams) == {"b2"}
    updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    expected = adamjax.scale_by_adam(b1=0.8, b2=0.9).update(
        GRADS, adamjax.scale_by_adam().init(PARAMS)
    )
    assert_close((updates, state.inner_state), expected, 1e-6)
    with pytest.raises(ValueError, match="static_args"):
        optax.inject_hyperparams(adamjax.scale, static_args="rate")

    def on_matrices(learning_rate, mask):
        return adamjax.masked(adamjax.scale(-learning_rate), mask)

    def matrices(tree):
        return jax.tree.map(lambda x: x.ndim > 1, tree)

    tx = optax.inject_hyperparams(on_matrices, static_args="mask")(0.1, matrices)
    grads = [jnp.ones((1, 2)), jnp.ones(2)]
    updates, state = tx.update(grads, tx.init(grads), grads)
    assert set(state.hyperparams) == {"learning_rate"}
    assert_close(updates, [-0.1 * grads[0], grads[1]], 1e-6)


@pytest.mark.parametrize("hyperparam_dtype", [jnp.bfloat16, jnp.float32, None])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_injected_dtypes(hyperparam_dtype, dtype):
    """Hyperparameters have `hyperparam_dtype` or the parameters' dtype, and keep it in steps."""
    p = [jnp.ones((1, 2), dtype), jnp.ones(2, dtype)]
    make = optax.inject_hyperparams(adamjax.scale_by_adam, hyperparam_dtype=hyperparam_dtype)
    tx = make(b1=0.9, b2=0.95)
    state = jax.jit(tx.init)(p)
    update = jax.jit(tx.update)
    for _ in range(2):
        expected = hyperparam_dtype or dtype
        assert state.hyperparams["b1"].dtype == state.hyperparams["b2"].dtype == expected
        updates, new_state = update(p, state, p)
        assert avals(new_state) == avals(state)
        assert avals(updates) == avals(p)
        state = new_state


def test_an_injected_beta_that_the_dtype_rounds_to_one_is_refused():
    """optax casts hyperparameters to the parameters' dtype, and 0.999 in bfloat16 is 1."""
    p = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match="b2 must be in"):
        optax.inject_hyperparams(adamjax.adam)(0.1).init(p)
    tx = optax.inject_hyperparams(adamjax.adam, hyperparam_dtype=jnp.float32)(0.125)
    updates, _ = jax.jit(tx.update)(p, tx.init(p), p)
    assert_same(updates, jnp.full(2, -0.125, jnp.bfloat16))


# --- compositions ---------------------------------------------------------------------------------


def test_chain():
    """optax's chain and ours, with parts of both libraries, equal the parts one after another."""
    parts = [adamjax.scale_by_adam(), optax.trace(0.5), adamjax.scale(-0.01)]
    moved = []
    for chain in (optax.chain, adamjax.chain):
        p, tx = PARAMS, chain(*parts)
        state = tx.init(p)
        assert isinstance(state, tuple)
        update = jax.jit(tx.update)
        for _ in range(20):
            updates, state = update(GRADS, state)
            p = optax.apply_updates(p, updates)
        moved.append(p)
    p, states = PARAMS, [tx.init(PARAMS) for tx in parts]
    for _ in range(20):
        updates = GRADS
        for i, tx in enumerate(parts):
            updates, states[i] = tx.update(updates, states[i])
        p = optax.apply_updates(p, updates)
    assert_close(moved[0], p, 1e-6)
    assert_close(moved[1], p, 1e-6)


def test_named_chain():
    tx = optax.named_chain(("rule", adamjax.scale_by_adam()), ("rate", adamjax.scale(-0.1)))
    state = tx.init(PARAMS)
    assert set(state) == {"rule", "rate"}
    plain = adamjax.chain(adamjax.scale_by_adam(), adamjax.scale(-0.1))
    expected = plain.update(GRADS, plain.init(PARAMS), PARAMS)[0]
    updates, state = tx.update(GRADS, state, PARAMS)
    assert_close(updates, expected, 1e-6)
    assert adamjax.step_count(state) == 1


MODEL = {"a": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, "z": [jnp.full(2, 2.0)]}
GOAL = jax.tree.map(lambda x: x * 0.3 - 1.0, MODEL)


def distance_to_goal(p):
    """The squared distance of a model from the goal."""
    pairs = zip(jax.tree.leaves(p), jax.tree.leaves(GOAL), strict=True)
    return sum(jnp.sum((x - y) ** 2) for x, y in pairs)


def test_multi_transform():
    parts = {"fast": adamjax.adam(0.1), "slow": adamjax.adamax(0.01), "still": adamjax.scale(0.0)}
    labels = {"a": {"w": "fast", "b": "slow"}, "z": "still"}
    p, state = minimized(optax.multi_transform(parts, labels), MODEL, distance_to_goal, 5)
    tx = adamjax.partition([("/w", parts["fast"]), ("/b", parts["slow"])], default=parts["still"])
    expected, _ = minimized(tx, MODEL, distance_to_goal, 5)
    assert_close(p, expected, 1e-6)
    assert_same(p["z"], MODEL["z"])
    assert jax.tree.leaves(adamjax.get_slot(state, "v"))[0].shape == (2, 3)
    # Labels by a function, and a label without a transform.
    p, _ = minimized(optax.multi_transform(parts, lambda _: labels), MODEL, distance_to_goal, 5)
    assert_close(p, expected, 1e-6)
    with pytest.raises(ValueError, match="other"):
        optax.multi_transform(parts, {**labels, "z": "other"}).init(MODEL)


@pytest.mark.parametrize("container", [list, tuple, dict])
def test_empty_trees(container):
    empty = container()
    for tx in (
        optax.multi_transform({0: adamjax.adam(0.1)}, lambda _: 0),
        optax.masked(adamjax.adam(0.1), container()),
        adamjax.partition([("x", optax.adam(0.1))]),
        adamjax.masked(optax.adam(0.1), "x"),
        adamjax.adam(0.1),
    ):
        updates, _ = tx.update(empty, tx.init(empty), empty)
        assert updates == empty


MASKS = {
    "leaf by leaf": {"a": {"w": True, "b": False}, "z": [True]},
    "a prefix": {"a": False, "z": True},
    "a function": lambda tree: jax.tree.map(lambda x: np.ndim(x) > 1, tree),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_masks(mask, decay):
    """optax's masks around ours: leaves that are not selected pass unchanged, without slots."""
    tx = optax.chain(
        optax.masked(adamjax.scale_by_adam(eps=1e-8), mask),
        optax.masked(adamjax.add_decayed_weights(decay), mask),
        adamjax.scale_by_learning_rate(0.1),
    )
    theirs = optax.chain(
        optax.masked(optax.scale_by_adam(), mask),
        optax.masked(optax.add_decayed_weights(decay), mask),
        optax.scale_by_learning_rate(0.1),
    )
    p, state = minimized(tx, MODEL, distance_to_goal, 5)
    expected, expected_state = minimized(theirs, MODEL, distance_to_goal, 5)
    assert_close(p, expected, ROUNDING)
    m, mu = state[0].inner_state.m, expected_state[0].inner_state.mu
    assert_close(m, mu, ROUNDING)


def test_masks_as_functions_in_ours():
    """Our `masked` accepts mask functions, around our transforms and around optax's."""
    mask = MASKS["a function"]
    for inner, theirs in (
        (adamjax.add_decayed_weights(0.1), optax.add_decayed_weights(0.1)),
        (optax.adam(0.1), optax.adam(0.1)),
    ):
        p, _ = minimized(
            adamjax.chain(adamjax.masked(inner, mask), optax.scale(-0.1)),
            MODEL,
            distance_to_goal,
            3,
        )
        expected, _ = minimized(
            optax.chain(optax.masked(theirs, mask), optax.scale(-0.1)), MODEL, distance_to_goal, 3
        )
        assert_close(p, expected, 1e-6)


def test_masks_within_masks():
    inner = optax.masked(adamjax.scale(-1.0), {"a": True, "z": False})
    for tx in (
        optax.masked(inner, MASKS["a function"]),
        adamjax.masked(inner, "w"),
        optax.masked(adamjax.masked(adamjax.scale(-1.0), "^a"), MASKS["a function"]),
    ):
        updates, _ = jax.jit(tx.update)(MODEL, jax.jit(tx.init)(MODEL), MODEL)
        expected = {**MODEL, "a": {"w": -MODEL["a"]["w"], "b": MODEL["a"]["b"]}}
        assert_same(updates, expected)


@pytest.mark.parametrize("name", ["adamw", "amsgrad", "nadam"])
def test_multi_steps(name):
    """Updates are 0 until the fourth micro-batch, which takes the step of the mean gradient."""
    tx = OPTIMIZERS[name]()
    p, _, objective = parabola(jnp.float32)
    accumulated = optax.MultiSteps(tx, every_k_schedule=4)
    state, update = jax.jit(accumulated.init)(p), jax.jit(accumulated.update)
    grads = [jax.grad(objective)(p) * k for k in (1.0, 2.0, 3.0, 6.0)]
    for g in grads[:-1]:
        updates, state = update(g, state, p)
        assert jnp.all(updates == 0)
        assert not accumulated.has_updated(state)
    updates, state = update(grads[-1], state, p)
    expected, _ = tx.update(3.0 * jax.grad(objective)(p), tx.init(p), p)
    assert accumulated.has_updated(state)
    assert_close(updates, expected, 1e-6)
    assert adamjax.step_count(state) == 1


def test_multi_steps_whose_number_is_a_schedule():
    tx = optax.MultiSteps(adamjax.adam(0.1), lambda step: jnp.where(step < 2, 1, 3))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    has_updated = []
    for _ in range(8):
        _, state = update(GRADS, state, PARAMS)
        has_updated.append(bool(tx.has_updated(state)))
    assert has_updated == [True, True, False, False, True, False, False, True]


def test_multi_steps_skip_gradients_that_are_not_finite():
    tx = optax.MultiSteps(adamjax.scale(-1.0), 2, should_skip_update_fn=optax.skip_not_finite)
    p, update = jnp.zeros([]), jax.jit(tx.update)
    state, seen = tx.init(p), []
    for g in (1.0, 3.0, jnp.inf, jnp.nan, 1.0, 1.0):
        updates, state = update(jnp.array(g), state, p)
        p = optax.apply_updates(p, updates)
        seen.append(float(p))
    assert seen == [0.0, -2.0, -2.0, -2.0, -2.0, -3.0]


@pytest.mark.skipif(
    "accumulator_dtype" not in inspect.signature(optax.MultiSteps.__init__).parameters,
    reason="an older optax, whose MultiSteps refuses mixed dtypes around its own optimizers too",
)
def test_multi_steps_in_mixed_precision():
    """Updates have the dtype that they have without MultiSteps, and parameters keep theirs."""
    pairs = list(itertools.product((jnp.float32, jnp.float16, jnp.bfloat16), repeat=2))
    p = [jnp.ones(3, p_dtype) for p_dtype, _ in pairs]
    g = [jnp.full(3, 0.5, g_dtype) for _, g_dtype in pairs]
    tx = adamjax.adam(0.1, m_dtype="float32")
    accumulated = optax.MultiSteps(tx, 2)
    state, accumulated_state = tx.init(p), accumulated.init(p)
    plain, accumulate = jax.jit(tx.update), jax.jit(accumulated.update)
    for _ in range(3):
        updates, state = plain(g, state, p)
        others, accumulated_state = accumulate(g, accumulated_state, p)
        assert avals(others) == avals(updates)
        moved = optax.apply_updates(p, others)
        assert avals(moved) == avals(p)
        p = moved


def test_multi_steps_in_a_scan():
    tx = optax.MultiSteps(adamjax.adam(0.1), 2)
    p = {"w": jnp.ones(3, jnp.bfloat16)}

    def step(state, _):
        updates, state = tx.update(p, state, p)
        return state, updates

    final, updates = jax.lax.scan(step, tx.init(p), None, length=4)
    assert adamjax.step_count(final) == 2
    assert_close(updates["w"][1::2], jnp.full((2, 3), -0.1, jnp.bfloat16), 1e-2)


def test_apply_if_finite():
    """optax's guard around ours rejects at most two gradients in a row."""
    tx = optax.apply_if_finite(adamjax.scale_by_learning_rate(1.0), 2)
    p, update = jnp.array(0.0), jax.jit(tx.update)
    state, seen = tx.init(p), []
    for g in (1.0, jnp.nan, jnp.nan, 1.0, jnp.nan, jnp.inf):
        updates, state = update(jnp.array(g), state, p)
        p = optax.apply_updates(p, updates)
        seen.append(float(p))
    assert seen == [-1.0, -1.0, -1.0, -2.0, -2.0, -2.0]
    assert state.total_notfinite == 4
    updates, state = update(jnp.array(jnp.nan), state, p)
    assert jnp.isnan(updates)


@pytest.mark.parametrize("name", ["adamw", "nadam"])
def test_apply_if_finite_around_optimizers(name):
    tx = OPTIMIZERS[name]()
    p, _, objective = mixed(jnp.float32)
    guarded, state = minimized(optax.apply_if_finite(tx, 3), p, objective, 4)
    expected, expected_state = minimized(tx, p, objective, 4)
    assert_close((guarded, state.inner_state), (expected, expected_state), 1e-6)
    spoilt = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), p)
    updates, after = jax.jit(optax.apply_if_finite(tx, 3).update)(spoilt, state, guarded)
    assert_same((updates, after.inner_state), (jax.tree.map(jnp.zeros_like, p), state.inner_state))


def test_conditionally():
    def early(step):
        return step < 2

    transform = optax.conditionally_transform(adamjax.scale(2.0), early)
    mask = optax.conditionally_mask(adamjax.scale(2.0), early)
    for tx, after in ((transform, 1.0), (mask, 0.0)):
        state, update, seen = tx.init(jnp.zeros([])), jax.jit(tx.update), []
        for _ in range(4):
            updates, state = update(jnp.ones([]), state)
            seen.append(float(updates))
        assert seen == [2.0, 2.0, after, after]

    def has_large_loss(step, loss, **extra):
        return loss > 0.1

    tx = optax.conditionally_mask(adamjax.adam(0.1), has_large_loss, forward_extra_args=True)
    state = tx.init(PARAMS)
    moved, state = tx.update(GRADS, state, PARAMS, loss=0.2)
    assert_close(moved, jax.tree.map(lambda x: jnp.full_like(x, -0.1), PARAMS), 1e-5)
    rested, after = tx.update(GRADS, state, PARAMS, loss=0.0)
    assert_same(rested, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_same(after.inner_state, state.inner_state)


@pytest.mark.skipif(not hasattr(optax.transforms, "freeze"), reason="an older optax")
def test_freeze():
    frozen = {"a": True, "z": False}
    tx = optax.chain(adamjax.adam(0.1), optax.transforms.freeze(frozen))
    p, _ = minimized(tx, MODEL, distance_to_goal, 3)
    free, _ = minimized(adamjax.adam(0.1), MODEL, distance_to_goal, 3)
    assert_same(p["a"], MODEL["a"])
    assert_close(p["z"], free["z"], 1e-6)
    tx = optax.transforms.selective_transform(adamjax.adam(0.1), freeze_mask=frozen)
    assert_close(minimized(tx, MODEL, distance_to_goal, 3)[0], p, 1e-6)


# --- states ---------------------------------------------------------------------------------------

# By name, a transform, and slots of its state.
WITH_SLOTS = {
    "adam": (adamjax.adam, ("m", "v")),
    "adamw": (adamjax.adamw, ("m", "v")),
    "amsgrad": (adamjax.amsgrad, ("m", "v", "v_max")),
    "adamax": (adamjax.adamax, ("m", "u")),
    "nadam": (adamjax.nadam, ("m", "v")),
    "average": (lambda: adamjax.chain(adamjax.adam(), adamjax.weight_ema()), ("m", "v", "average")),
    "accumulated": (lambda: adamjax.accumulate_gradients(adamjax.adam(), 2), ("m", "v", "total")),
    "guarded": (lambda: adamjax.skip_not_finite(adamjax.adam()), ("m", "v")),
    "optax": (lambda: optax.chain(adamjax.clip_by_norm(1.0), adamjax.amsgrad()), ("m", "v_max")),
}


@pytest.mark.parametrize("name", WITH_SLOTS)
def test_map_params(name):
    """optax's `tree_map_params` maps the slots, for example to specs, and no other leaves."""
    make, slots = WITH_SLOTS[name]
    tx = make()
    state = tx.init(MODEL)
    specs = jax.tree.map(lambda p: f"spec of {p.shape}", MODEL)
    state_specs = tree_utils.tree_map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: "everywhere"
    )
    for slot in slots:
        assert tree_utils.tree_get(state_specs, slot) == specs
    others = [x for x in jax.tree.leaves(state_specs) if not x.startswith("spec")]
    assert set(others) == {"everywhere"}
    emptied = tree_utils.tree_map_params(tx, lambda x: None, state)
    assert tree_utils.tree_get(emptied, "m") == jax.tree.map(lambda _: None, MODEL)


def test_map_params_of_masked():
    """Our states have `None` where optax has `MaskedNode`, so `is_leaf` must select `None`."""
    for tx in (
        adamjax.masked(adamjax.adam(0.1), "w"),
        adamjax.partition([("w", adamjax.adam(0.1))], default=adamjax.scale(0.0)),
    ):
        state = tx.init(MODEL)
        mapped = tree_utils.tree_map_params(tx, lambda x: x + 1, state)
        assert_same(tree_utils.tree_get(mapped, "m")["a"]["w"], jnp.ones((2, 3)))
        specs = jax.tree.map(lambda p: p.ndim, MODEL)
        state_specs = tree_utils.tree_map_params(
            tx,
            lambda x, spec: None if x is None else spec,
            state,
            specs,
            is_leaf=lambda x: x is None,
        )
        assert tree_utils.tree_get(state_specs, "m") == {"a": {"w": 2, "b": None}, "z": [None]}


def test_get_and_set():
    tx = adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam(0.1))
    _, state = minimized(tx, MODEL, distance_to_goal, 3)
    assert_same(tree_utils.tree_get(state, "v"), adamjax.get_slot(state, "v"))
    assert tree_utils.tree_get(state, "ScaleByAdamState").count == 3
    assert tree_utils.tree_get(state, "mu", default="none") == "none"
    # The rate has a count too. optax refuses to choose; `step_count` returns the rule's.
    with pytest.raises(KeyError, match="multiple values"):
        tree_utils.tree_get(state, "count")
    assert adamjax.step_count(state) == 3

    def of_rule(path, _):
        return getattr(path[-1], "tuple_name", None) == "ScaleByAdamState"

    assert tree_utils.tree_get(state, "count", filtering=of_rule) == 3
    counts = tree_utils.tree_get_all_with_path(state, "count")
    assert [path[-1].tuple_name for path, _ in counts] == ["ScaleByAdamState", "ScheduleState"]

    # The next step starts from the counts that were set.
    @jax.jit
    def with_count(state, count):
        return tree_utils.tree_set(state, count=count)

    changed = with_count(state, jnp.array(7, jnp.int32))
    assert avals(changed) == avals(state)
    assert adamjax.step_count(changed) == 7
    _, after = tx.update(MODEL, changed, MODEL)
    assert adamjax.step_count(after) == 8
    with pytest.raises(KeyError):
        tree_utils.tree_set(state, momentum=1.0)


# --- contrib --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target"),
    [("adam", parabola), ("adam", mixed), *((name, rosenbrock) for name in OPTIMIZERS)],
)
def test_mechanize(name, target):
    """contrib's wrapper scales the updates of rate 1, and the optimizer reaches the optimum."""
    p, goal, objective = target(jnp.float32)
    tx = contrib.mechanize(OPTIMIZERS[name].func(1.0), weight_decay=0.0)
    state = tree_utils.tree_map_params(tx, lambda x: x, tx.init(p))
    assert_near(minimized(tx, p, objective, 30_000, state)[0], goal)


@each_optimizer
def test_schedule_free(name):
    p, goal, objective = joined(*(t(jnp.float32) for t in (parabola, rosenbrock, mixed)))
    tx = contrib.schedule_free(OPTIMIZERS[name].func(0.01, b1=0.0), learning_rate=0.01)
    p, state = minimized(tx, p, objective, 30_000)
    assert_near(contrib.schedule_free_eval_params(state, p), goal)


def test_reduce_on_plateau():
    """The loss reaches it as an extra argument, in optax's chain and in ours."""
    p, _, objective = rosenbrock(jnp.float32)

    def plateau():
        return contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=0.5, cooldown=1)

    theirs = optax.chain(optax.adam(0.1), plateau())
    expected, expected_state = minimized(theirs, p, objective, 40, with_value=True)
    assert expected_state[-1].scale < 0.1
    for chain in (optax.chain, adamjax.chain):
        tx = chain(adamjax.adam(0.1, eps=1e-8), plateau())
        q, state = minimized(tx, p, objective, 40, with_value=True)
        assert_close(q, expected, 1e-4)
        assert state[-1].scale == expected_state[-1].scale


def test_split_real_and_imaginary():
    """Complex weights move like pairs of real weights."""
    x = jnp.array([[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]])
    y = jnp.array([[0.5, -0.5, 0.0], [0.1, 0.3, -0.2]])
    for tx in (adamjax.adam(0.1), adamjax.adamax(0.1)):
        split = contrib.split_real_and_imaginary(tx)
        (a, b), _ = minimized(tx, (x, y), lambda p: jnp.sum(p[0] ** 2 + p[1] ** 2), 3)
        z, _ = minimized(split, x + 1j * y, lambda z: jnp.sum(squared(z)), 3)
        assert_close(z, a + 1j * b, 1e-6)


def test_lookahead():
    start, _, objective = mixed(jnp.float32)
    p = optax.LookaheadParams.init_synced(start)

    def after_seven_steps(tx):
        tx = optax.lookahead(tx, sync_period=3, slow_step_size=0.5)
        q, state, update = p, tx.init(p), jax.jit(tx.update)
        for _ in range(7):
            updates, state = update(jax.grad(objective)(q.fast), state, q)
            q = optax.apply_updates(q, updates)
        return q

    ours = after_seven_steps(adamjax.adam(0.1, eps=1e-8))
    assert_close(ours, after_seven_steps(optax.adam(0.1)), 1e-5)


def test_sam():
    p, _, objective = parabola(jnp.float32)

    def after_twenty_steps(tx, ascent):
        tx = contrib.sam(tx, optax.chain(contrib.normalize(), ascent), sync_period=2)
        return minimized(tx, p, objective, 20)[0]

    ours = after_twenty_steps(adamjax.adam(0.1, eps=1e-8), adamjax.scale(-0.05))
    assert_close(ours, after_twenty_steps(optax.adam(0.1), optax.sgd(0.05)), 1e-5)
