"""Trajectories of ten steps: those of a transform, and those of other systems, stored in `data`.

data/README.md describes the stored trajectories, and the known roundings and faults of the systems.
"""

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from support import enable_x64

import adamjax

PRECISIONS = ("float64", "float32")
STEPS = 10


def run(tx, start, grads, precision, *, jit=False):
    """Takes ten steps; returns the weights after each, the averages after each, and the last state.

    Args:
      start: the initial weights, a tree of NumPy arrays.
      grads: the same tree with a leading axis of steps, or a function from a step's index to its
        gradients.

    The results are NumPy arrays. Weights and averages are trees like `start`, with a leading axis
    of steps. The averages are None if the state has none.
    """
    with enable_x64(precision == "float64"):

        def step(params, state, g):
            updates, state = tx.update(g, state, params)
            params = adamjax.apply_updates(params, updates)
            return params, state, averages(state)

        if jit:
            step = jax.jit(step)
        params = in_precision(start, precision)
        state, history = tx.init(params), []
        for t in range(STEPS):
            g = grads(t) if callable(grads) else jax.tree.map(itemgetter(t), grads)
            params, state, average = step(params, state, in_precision(g, precision))
            history.append((params, average))
        weights, averaged = jax.tree.map(lambda *steps: np.stack(steps), *history)
        return weights, averaged, jax.tree.map(np.asarray, state)


def in_precision(tree, precision):
    """The tree as arrays of JAX; its floats are cast to the precision."""

    def cast(x):
        return jnp.asarray(x, precision if np.issubdtype(x.dtype, np.floating) else None)

    return jax.tree.map(cast, tree)


def averages(state):
    """The averages of the weights, or None if the state has none."""
    try:
        return adamjax.averaged_weights(state)
    except ValueError:  # no weight_ema in this chain
        return None


def assert_follows(actual, expected, start, *, precision, tolerance=2e-6):
    """Compares two trajectories of one leaf, arrays with a leading axis of steps.

    The error may be `tolerance` times the largest distance of any element from `start` so far. In
    float32 it may be 2e-5 times this distance, whatever `tolerance` is, plus one float32 ulp of the
    element for each step so far.
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
    bound = np.broadcast_to(bound, error.shape)
    worst = np.unravel_index(np.argmax(np.nan_to_num(error - bound, nan=np.inf)), error.shape)
    assert (error <= bound).all(), (
        f"step {worst[0] + 1}, element {tuple(map(int, worst[1:]))}: "
        f"error {error[worst]:.3g}, bound {bound[worst]:.3g}, "
        f"displacement {float(displacement[worst[0]].squeeze()):.3g}"
    )


# The systems


@dataclass(frozen=True)
class Variant:
    """The hyperparameters of a case, with the defaults of data/README.md.

    Attributes that do not have the names of adamjax's parameters:
      rate_decay: the option `decay` of legacy optimizers, which makes the rate fall.
      schedule: whether the rate is Keras' `InverseTimeDecay`.
      clips: our transforms before the rule, in order.
      accumulate: the number of micro-batches in a step.
    """

    learning_rate: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-7
    rate_decay: float = 0.0
    schedule: bool = False
    clips: tuple = ()
    weight_decay: float | None = None
    momentum: float | None = None
    overwrite_frequency: int | None = None
    accumulate: int = 1


BY_VALUE = adamjax.clip_by_value(0.3)
BY_NORM = adamjax.clip_by_norm(0.5)

# `default` has the default rate of Keras, 0.001.
VARIANTS = {
    "default": Variant(learning_rate=0.001),
    "hyper": Variant(b1=0.8, b2=0.95, eps=1e-3),
    "decay": Variant(rate_decay=0.25),
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

# Why the cases of the system k3jax with the variant emafreq are skipped.
WHY_NOT_K3JAX_EMAFREQ = (
    "Keras 3 starts its average from the weights after step 1, not from the initial ones, "
    "and writes it into the weights at step 3"
)

# The parameter of our optimizer that corresponds to Keras' epsilon, if it is not `eps_hat`.
EPSILON_NAMES = {"adamax": "eps", "nadam": "eps"}


class Oracle:
    """The stored trajectories of a file in `data`, by the name of the case."""

    def __init__(self, name):
        data = self.load(name)
        inputs = self.load("keras_f64.npz")
        self.start = self.tree(inputs["A0"], inputs["B0"])
        self.grads = self.tree(inputs["gA"], inputs["gB"])
        names = [case.decode() for case in data["cases"]]
        self.weights = dict(zip(names, map(self.tree, data["A"], data["B"]), strict=True))
        # Only averages of the leaf `bert/emb` are stored.
        names = [case.decode() for case in data["ema_cases"]]
        self.averages = dict(zip(names, data["ema"], strict=True))

    @staticmethod
    def load(name):
        with np.load(Path(__file__).parent / "data" / name) as file:
            return dict(file)

    @staticmethod
    def tree(a, b):
        """The two leaves as a tree. The pattern of AdamMultilr, `^bert`, matches only the first."""
        return {"bert": {"emb": a}, "head": {"kernel": b}}

    def assert_case(self, case, weights, averaged, precision):
        """Compares weights, and averages if there are any, with those of the case."""
        system, _, variant, *_ = case.split("|")
        # `new` rounds beta to float32 in powers, so it is accurate to 1e-5 at best.
        tolerance = 2e-5 if system == "new" else 2e-6
        jax.tree.map(
            lambda *leaves: assert_follows(*leaves, precision=precision, tolerance=tolerance),
            weights,
            self.weights[case],
            self.start,
        )
        assert (averaged is not None) == (case in self.averages)
        if averaged is not None:
            start, expected = self.start["bert"]["emb"], self.averages[case]
            if system == "k3jax":
                first = self.weights[case]["bert"]["emb"][0]
                expected = expected + effect_of_start(start, first, VARIANTS[variant].momentum)
            assert_follows(
                averaged["bert"]["emb"], expected, start, precision=precision, tolerance=tolerance
            )


def rounded(x):
    """The value that a hyperparameter has in a system that keeps it in float32."""
    return float(np.float32(x))


def learning_rate(system, variant):
    """The variant's rate, with the roundings of the system."""
    rate = rounded(variant.learning_rate)
    if system == "multilr":
        decayed = adamjax.inverse_time_decay(rounded(0.02), 1, variant.rate_decay)
        return adamjax.by_path(
            [("^bert", decayed)], default=adamjax.inverse_time_decay(rate, 1, variant.rate_decay)
        )
    if variant.schedule:
        initial = variant.learning_rate if system == "k3jax" else rate
        return adamjax.inverse_time_decay(initial, 2, 0.5)
    return adamjax.inverse_time_decay(rate, 1, variant.rate_decay) if variant.rate_decay else rate


def optimizer(system, name, variant, **options):
    """The chain of our transforms that equals a system's optimizer.

    `options` are further arguments of our rule.
    """
    rate, b1, b2 = learning_rate(system, variant), variant.b1, variant.b2
    if system in ("legacy", "multilr", "lazy"):
        b1, b2 = rounded(b1), rounded(b2)
    options = {EPSILON_NAMES.get(name, "eps_hat"): variant.eps, **options}
    if name == "adamw":
        decay = {} if variant.weight_decay is None else {"weight_decay": variant.weight_decay}
        parts = [adamjax.adamw(rate, b1, b2, **options, **decay)]
    elif variant.weight_decay is None:
        parts = [getattr(adamjax, name)(rate, b1, b2, **options)]
    else:
        parts = [
            scale_by(name, b1, b2, **options),
            adamjax.add_decayed_weights(variant.weight_decay),
            adamjax.scale_by_learning_rate(rate),
        ]
    if variant.momentum is not None:
        parts.append(adamjax.weight_ema(variant.momentum, variant.overwrite_frequency))
    tx = adamjax.chain(*variant.clips, *parts)
    return tx if variant.accumulate == 1 else adamjax.accumulate_gradients(tx, variant.accumulate)


def scale_by(name, b1, b2, **options):
    """The named rule without a learning rate."""
    if name == "nadam":
        return adamjax.scale_by_adam(b1, b2, nesterov=True, **options)
    return getattr(adamjax, f"scale_by_{name}")(b1, b2, **options)


def effect_of_start(start, first, momentum):
    """An average that starts from p_0, minus one that starts from p_1: momentum^t (p_0 - p_1).

    `start` is p_0, the initial weights; `first` is p_1, the weights after the first step.
    """
    t = np.arange(1, STEPS + 1).reshape(-1, 1, 1)
    return momentum**t * (start - first)
