"""What the tests of conversions share: runs that change their optimizer in the middle, and states.

One package takes ten steps, its state is converted, and both packages take twenty more. Both do the
same arithmetic in another order, so the weights after each step are compared in float64, to 1e-12
of the largest weight. A misplaced slot, a count that is off by one or the other form of epsilon
changes the weights by 1e-8 to 1e-3. The packages compute bias corrections differently, so the few
runs in float32 are compared to its rounding errors.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamjax
from adamjax import convert

# --- runs that change their optimizer -------------------------------------------------------------


STEPS_BEFORE, STEPS_AFTER = 10, 20  # before and after the conversion
RATE = 0.0625  # exact in float32, in which Keras stores it
SHAPES = {"embed": {"table": (6, 3)}, "head": {"bias": (4,), "kernel": (3, 4)}}
PATHS = ["embed/table", "head/bias", "head/kernel"]


def is_shape(x):
    return isinstance(x, tuple)


def new_params(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), dtype), SHAPES, is_leaf=is_shape)


def new_noises(steps=STEPS_BEFORE + STEPS_AFTER, dtype=np.float64, seed=1):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda s: np.asarray(rng.normal(size=s), dtype), SHAPES, is_leaf=is_shape)
        for _ in range(steps)
    ]


def gradient(p, noise):
    """The gradient of a quadratic loss, plus noise. It depends on all earlier steps through `p`."""
    return 0.5 * p + noise


@functools.cache
def jitted_step(tx, apply):
    @jax.jit
    def step(params, state, n):
        updates, state = tx.update(jax.tree.map(gradient, params, n), state, params)
        return apply(params, updates), state

    return step


def run_optax(tx, params, state, noises, apply=optax.apply_updates):
    """The parameters after each step, and the state after the last."""
    trajectory = []
    for n in noises:
        params, state = jitted_step(tx, apply)(params, state, n)
        trajectory.append(params)
    return trajectory, state


def run_adamjax(tx, params, state, noises):
    return run_optax(tx, params, state, noises, adamjax.apply_updates)


def rows_of_step(step):
    """The two rows of the table that a step reads. No step reads the last two of the six rows."""
    return np.array([step % 3, 3])


def row_mask(step):
    mask = np.zeros((6, 1))
    mask[rows_of_step(step)] = 1
    return mask


def zero_other_rows(grads, step):
    return {**grads, "embed": {"table": grads["embed"]["table"] * row_mask(step)}}


def run_exact_rows(tx, params, state, noises):
    """The parameters and the state after steps with row gradients, up to date."""

    @jax.jit
    def step(params, state, ids, n):
        rows, ticket = tx.prepare(params, state, {"embed": ids})
        table = gradient(rows["embed"], n["embed"]["table"][ids])
        grads = {
            "embed": {"table": adamjax.row_gradient(ids, table, 6)},
            "head": jax.tree.map(gradient, params["head"], n["head"]),
        }
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state

    for i, n in enumerate(noises):
        params, state = step(params, state, jnp.asarray(rows_of_step(i)), n)
    return jax.jit(tx.flush)(params, state)


def run_dense(tx, params, state, noises):
    """The same steps with dense gradients."""

    @jax.jit
    def step(params, state, mask, n):
        grads = jax.tree.map(gradient, params, n)
        grads = {**grads, "embed": {"table": grads["embed"]["table"] * mask}}
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    for i, n in enumerate(noises):
        params, state = step(params, state, row_mask(i), n)
    return params, state


# --- transforms of optax and of adamjax with the same steps ---------------------------------------


def falling_rate(count):
    return RATE / (1 + 0.1 * count)


def head_mask(tree):
    return {"embed": {"table": False}, "head": {"bias": True, "kernel": True}}


def embed_mask(tree):
    return jax.tree.map(lambda flag: not flag, head_mask(tree))


def part_labels(tree):
    return {"embed": {"table": "rows"}, "head": {"bias": "rest", "kernel": "rest"}}


def multi_steps(tx, steps=4):
    # By default newer versions accumulate in float32, older ones in the dtype of the parameters.
    has_option = "accumulator_dtype" in inspect.signature(optax.MultiSteps.__init__).parameters
    options = {"accumulator_dtype": np.float64} if has_option else {}
    return optax.MultiSteps(tx, steps, **options).gradient_transformation()


# For each case, functions that make a transform of optax and that of adamjax.
OPTAX_AND_ADAMJAX = {
    "adam": (lambda: optax.adam(RATE), lambda: adamjax.adam(RATE, eps=1e-8)),
    "adam, an epsilon that matters": (
        lambda: optax.adam(RATE, b1=0.8, b2=0.95, eps=1e-2),
        lambda: adamjax.adam(RATE, 0.8, 0.95, eps=1e-2),
    ),
    "clip, adamw, schedule": (
        lambda: optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(falling_rate, weight_decay=0.1)
        ),
        lambda: adamjax.chain(
            adamjax.clip_by_global_norm(1.0),
            adamjax.adamw(falling_rate, eps=1e-8, weight_decay=0.1),
        ),
    ),
    "a decay with a mask": (
        lambda: optax.adamw(RATE, weight_decay=0.1, mask=head_mask),
        lambda: adamjax.adamw(RATE, eps=1e-8, weight_decay=0.1, mask="^head"),
    ),
    "masked": (
        lambda: optax.chain(
            optax.masked(optax.adam(falling_rate), head_mask),
            optax.masked(optax.scale(-0.1), embed_mask),
        ),
        lambda: adamjax.chain(
            adamjax.masked(adamjax.adam(falling_rate, eps=1e-8), "^head"),
            adamjax.masked(adamjax.scale(-0.1), "^embed"),
        ),
    ),
    "multi_transform": (
        lambda: optax.multi_transform(
            {"rows": optax.adam(falling_rate), "rest": optax.adamw(RATE, weight_decay=0.1)},
            part_labels,
        ),
        lambda: adamjax.partition(
            [("^embed", adamjax.adam(falling_rate, eps=1e-8))],
            default=adamjax.adamw(RATE, eps=1e-8, weight_decay=0.1),
        ),
    ),
    "multi_transform into one chain": (
        lambda: optax.multi_transform(
            {"rows": optax.adam(RATE), "rest": optax.adam(0.03)}, part_labels
        ),
        lambda: adamjax.adam(adamjax.by_path([("^embed", RATE)], default=0.03), eps=1e-8),
    ),
    "inject_hyperparams": (
        lambda: optax.inject_hyperparams(optax.adamw)(falling_rate, b1=0.8, weight_decay=0.1),
        lambda: adamjax.adamw(falling_rate, 0.8, eps=1e-8, weight_decay=0.1),
    ),
    "inject_hyperparams into with_hyperparams": (
        lambda: optax.inject_hyperparams(optax.adam)(RATE, b1=0.75),
        lambda: adamjax.with_hyperparams(adamjax.adam(0.5, eps=1e-8), learning_rate=RATE, b1=0.75),
    ),
    "MultiSteps": (
        lambda: multi_steps(optax.adam(falling_rate)),
        lambda: adamjax.accumulate_gradients(adamjax.adam(falling_rate, eps=1e-8), 4),
    ),
    "a schedule of calls after MultiSteps": (
        lambda: optax.chain(
            multi_steps(optax.scale_by_adam()), optax.scale_by_learning_rate(falling_rate)
        ),
        lambda: adamjax.chain(
            adamjax.accumulate_gradients(adamjax.scale_by_adam(eps=1e-8), 4),
            adamjax.scale_by_learning_rate(falling_rate),
        ),
    ),
    "MultiSteps of one part": (
        lambda: optax.multi_transform(
            {"rows": multi_steps(optax.adam(falling_rate)), "rest": optax.adam(falling_rate)},
            part_labels,
        ),
        lambda: adamjax.partition(
            {"^embed": adamjax.accumulate_gradients(adamjax.adam(falling_rate, eps=1e-8), 4)},
            default=adamjax.adam(falling_rate, eps=1e-8),
        ),
    ),
    "MultiSteps of several parts": (  # at the conversion one of them has just taken a step
        lambda: optax.multi_transform(
            {
                "rows": multi_steps(optax.adam(falling_rate), 5),
                "rest": multi_steps(optax.adam(falling_rate)),
            },
            part_labels,
        ),
        lambda: adamjax.partition(
            {"^embed": adamjax.accumulate_gradients(adamjax.adam(falling_rate, eps=1e-8), 5)},
            default=adamjax.accumulate_gradients(adamjax.adam(falling_rate, eps=1e-8), 4),
        ),
    ),
    "apply_if_finite": (
        lambda: optax.apply_if_finite(optax.adam(RATE), 5),
        lambda: adamjax.skip_not_finite(adamjax.adam(RATE, eps=1e-8)),
    ),
    "adamax": (
        lambda: optax.adamax(RATE, eps=1e-30),
        lambda: adamjax.adamax(RATE, eps=1e-30),
    ),
    "optax within ours": (
        lambda: optax.chain(optax.trace(0.5), optax.adam(RATE)),
        lambda: adamjax.chain(optax.trace(0.5), adamjax.adam(RATE, eps=1e-8)),
    ),
    "ours within optax": (
        lambda: optax.chain(optax.clip(1.0), optax.masked(optax.adam(RATE), head_mask)),
        lambda: optax.chain(optax.clip(1.0), optax.masked(adamjax.adam(RATE, eps=1e-8), head_mask)),
    ),
}


@functools.cache
def optax_and_adamjax(name):
    """The transforms of a case, cached, so that `jitted_step` compiles each once."""
    return tuple(make() for make in OPTAX_AND_ADAMJAX[name])


# --- transforms and states of optax ---------------------------------------------------------------


OPTAX_ADAM = optax.adam(RATE)
ADAM = adamjax.adam(RATE, eps=1e-8)


def adam_like_optax(rate=0.1):
    return adamjax.adam(rate, eps=1e-8)


HALVING = adamjax.exponential_decay(0.1, 3, 0.5)


def reduce_on_plateau(factor):
    return optax.contrib.reduce_on_plateau(
        factor=factor, patience=0, cooldown=0, accumulation_size=1
    )


PARAMS = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}


def optax_state(params=None, tx=OPTAX_ADAM, count=1):
    """A fresh state of optax, but with this count."""
    state = tx.init(jax.tree.map(jnp.asarray, PARAMS if params is None else params))
    return jax.tree.map(lambda x: x + count if x.dtype == jnp.int32 else x, state)


# The parameters of most tests that compare steps, and labels of their leaves for multi_transform.
TWO_LEAVES = {"a": jnp.ones(3), "b": jnp.ones((2, 3))}
LABELS = {"a": "x", "b": "y"}


def state_after(tx, n, params=None, **extra_args):
    """The state after n steps whose gradients are the parameters."""
    params = TWO_LEAVES if params is None else params
    state = tx.init(params)
    for _ in range(n):
        _, state = tx.update(params, state, params, **extra_args)
    return state


# In the error for two optimizers whose steps differ.
STEPS_DIFFER = "tx moves an element|becomes different"


# --- variables of Keras ---------------------------------------------------------------------------


def keras_variables(extra=()):
    """The variables of a Keras Adam of `PARAMS`, and `extra` ones, as pairs (name, array)."""
    pairs = [("adam/iteration", np.array(1)), ("adam/learning_rate", np.float32(RATE))]
    for path, x in PARAMS.items():
        pairs += [(f"adam/{path}_momentum", x), (f"adam/{path}_velocity", x)]
    return [*pairs, *extra]


def numbered_keras(shapes):
    """The variables of a Keras Adam by their numbers; m and v of parameter i are i + 1."""
    slots = [np.full(shape, i + 1.0) for i, shape in enumerate(shapes) for _ in "mv"]
    return {str(i): x for i, x in enumerate([np.array(1), np.float32(RATE), *slots])}


def keras_variables_named(names, prefix="adam"):
    """Variables of a Keras Adam as pairs (name, array); m and v of leaf i are i + 1."""
    pairs = [(f"{prefix}/iteration", np.array(1)), (f"{prefix}/learning_rate", np.float32(RATE))]
    for i, name in enumerate(names):
        x = np.full(2, i + 1, np.float32)
        pairs += [(f"{prefix}/{name}_momentum", x), (f"{prefix}/{name}_velocity", x)]
    return pairs


# The variables of a Keras Adam of {"w": jnp.zeros(2)}.
NAMED_VARIABLES = [
    ("adam/iteration", np.array(7)),
    ("adam/learning_rate", np.array(0.1)),
    ("adam/w_momentum", np.full(2, 0.5)),
    ("adam/w_velocity", np.ones(2)),
]


# The parameters and the rule of `keras_optimizer`.
KERAS_PARAMS = {"v0": jnp.ones(3), "v1": jnp.ones(3)}
KERAS_RULE = adamjax.scale_by_adam(eps_hat=1e-7)


def keras_optimizer(keras, count=0, cls="Adam", variables=None, **options):
    """A new Keras optimizer whose iteration is `count`."""
    optimizer = getattr(keras.optimizers, cls)(0.1, **options)
    optimizer.build(variables or [keras.Variable(np.ones(3), name=name) for name in ("v0", "v1")])
    optimizer._iterations.assign(count)
    return optimizer


# --- state dicts of torch -------------------------------------------------------------------------


def torch_state_dict(options=(), **changes_of_a):
    """The state dict of a torch Adam of `PARAMS`, with other options or another state of `a`."""
    a = {"step": 1.0, "exp_avg": PARAMS["a"], "exp_avg_sq": PARAMS["a"], **changes_of_a}
    b = {"step": 1.0, "exp_avg": PARAMS["b"], "exp_avg_sq": PARAMS["b"]}
    group = {"params": [0, 1], "lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8}
    group |= {"weight_decay": 0, "amsgrad": False, "decoupled_weight_decay": False, **dict(options)}
    return {"state": {0: a, 1: b}, "param_groups": [group]}


def numbered_torch(shapes):
    """The same as a state dict of torch."""
    state = {
        i: {"step": 1, "exp_avg": np.full(shape, i + 1.0), "exp_avg_sq": np.full(shape, i + 1.0)}
        for i, shape in enumerate(shapes)
    }
    group = {"lr": RATE, "betas": (0.9, 0.999), "eps": 1e-7, "weight_decay": 0, "amsgrad": False}
    return {"state": state, "param_groups": [{**group, "params": list(state)}]}


def plain_torch_dict():
    """The state dict of a torch Adam of two parameters with equal states."""
    leaf_state = {"step": 7, "exp_avg": np.full(2, 0.5, "f"), "exp_avg_sq": np.ones(2, "f")}
    group = {"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    group |= {"weight_decay": 0, "amsgrad": False}
    return {"state": {0: leaf_state, 1: dict(leaf_state)}, "param_groups": [group]}


def fresh_torch(names=None):
    """The state dict of a torch Adam of two parameters before its first step."""
    group = {"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    group |= {"weight_decay": 0, "amsgrad": False}
    return {
        "state": {},
        "param_groups": [group if names is None else {**group, "param_names": names}],
    }


def torch_after_a_step(*shapes):
    """The state dict of a torch Adam of parameters with these shapes, after a step."""
    target = fresh_torch()
    target["param_groups"][0]["params"] = list(range(len(shapes)))
    for key, shape in enumerate(shapes):
        x = np.zeros(shape, np.float32)
        target["state"][key] = {"step": np.float32(1), "exp_avg": x, "exp_avg_sq": x}
    return target


def torch_with_moments(arrays, names=None, **options):
    """The state dict of a torch Adam; array i is m and also v of parameter i."""
    group = {"params": list(range(len(arrays))), "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    group |= {"weight_decay": 0, "amsgrad": False, **options}
    slots = ("exp_avg", "exp_avg_sq")
    return {
        "state": {i: {"step": 3, **dict.fromkeys(slots, x)} for i, x in enumerate(arrays)},
        "param_groups": [group if names is None else {**group, "param_names": names}],
    }


# --- all systems ----------------------------------------------------------------------------------


def conversion_calls(tx, params, passed_params=None):
    """Calls of all conversions, with states of `params`; `passed_params` may be others."""
    state, old = tx.init(params), OPTAX_ADAM.init(params)
    params = params if passed_params is None else passed_params
    keras = [(name, np.zeros_like(x)) for name, x in keras_variables()]
    torch = {**torch_state_dict(), "state": {}}
    return {
        "from_optax": lambda: convert.from_optax(old, tx, params, OPTAX_ADAM),
        "from_keras": lambda: convert.from_keras(keras, tx, params),
        "from_torch": lambda: convert.from_torch(torch, tx, params),
        "to_optax": lambda: convert.to_optax(state, tx, params, OPTAX_ADAM),
        "to_keras": lambda: convert.to_keras(state, tx, params, keras),
        "to_torch": lambda: convert.to_torch(state, tx, params, torch, order=sorted(params)),
    }
