"""Two hundred steps of every rule in float32, compared with the float64 references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import adamjax

STEPS = 200
SIZE = 64
SEEDS = range(3)
TOLERANCE = 2e-6  # of the leaf's largest update at the same step

# Name: the transform, its options, and the reference, which takes the same options.
RULES = {
    "adam-eps_hat": (adamjax.scale_by_adam, {"eps_hat": 1e-7}, reference.adam),
    "adam-eps": (adamjax.scale_by_adam, {"eps": 1e-8}, reference.adam),
    "amsgrad-eps_hat": (adamjax.scale_by_amsgrad, {"eps_hat": 1e-7}, reference.amsgrad),
    "amsgrad-eps": (adamjax.scale_by_amsgrad, {"eps": 1e-8}, reference.amsgrad),
    "adamax": (adamjax.scale_by_adamax, {"eps": 1e-7}, reference.adamax),
    "nadam": (
        functools.partial(adamjax.scale_by_adam, nesterov=True),
        {"eps": 1e-7},
        reference.nadam,
    ),
}

BETAS = {"0.9,0.999": (0.9, 0.999), "0.8,0.95": (0.8, 0.95), "0.95,0.9999": (0.95, 0.9999)}


def normal(rng):
    return rng.normal(size=(STEPS, SIZE))


def log_uniform(rng):
    """Magnitudes from 1e-9 to 1e4, any sign, three tenths zeros."""
    magnitude = 10 ** rng.uniform(-9, 4, (STEPS, SIZE))
    return magnitude * rng.choice([-1, 0, 1], (STEPS, SIZE), p=[0.35, 0.3, 0.35])


def tiny(rng):
    """About as small as the epsilons, so that these matter."""
    return rng.normal(size=(STEPS, SIZE)) * 10 ** rng.uniform(-9, -6, SIZE)


def constant(rng):
    """Errors of the decay add up step by step, because rounding errors do not average out."""
    return np.tile(rng.normal(size=SIZE), (STEPS, 1))


def sparse_in_time(rng):
    """The whole leaf has no gradient in most steps, like a row of an embedding."""
    has_gradient = rng.random((STEPS, 1)) < 0.05
    has_gradient[0] = True
    return rng.normal(size=(STEPS, SIZE)) * has_gradient


def first_step_only(rng):
    """After the first step, moments only decay, and the allowed error shrinks with the updates.

    This is the hardest kind: float32 moments alone cause an error of 1.6e-6.
    """
    return rng.normal(size=(STEPS, SIZE)) * (np.arange(STEPS) == 0)[:, None]


def late(rng):
    """Zeros for the first fifty steps, so that the state stays zero."""
    return rng.normal(size=(STEPS, SIZE)) * (np.arange(STEPS) >= 50)[:, None]


GRADIENTS = (normal, log_uniform, tiny, constant, sparse_in_time, first_step_only, late)


@functools.cache
def gradients():
    """A leaf for every kind and seed, all of them float32 numbers."""
    return {
        f"{kind.__name__}/{seed}": kind(np.random.default_rng(seed)).astype(np.float32)
        for kind in GRADIENTS
        for seed in SEEDS
    }


@functools.cache
def updates(rule, betas):
    """All updates of a rule, in one scan over every leaf."""
    make, options, _ = RULES[rule]
    tx = make(*BETAS[betas], **options)

    def step(state, g):
        u, state = tx.update(g, state)
        return state, u

    @jax.jit
    def train(grads):
        state = tx.init(jax.tree.map(lambda g: g[0], grads))
        return jax.lax.scan(step, state, grads)[1]

    return jax.tree.map(np.asarray, train(jax.tree.map(jnp.asarray, gradients())))


@pytest.mark.parametrize("kind", [kind.__name__ for kind in GRADIENTS])
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow
def test_updates_are_near_those_of_the_reference(rule, betas, kind):
    _, options, reference_updates = RULES[rule]
    for seed in SEEDS:
        leaf = f"{kind}/{seed}"
        actual = updates(rule, betas)[leaf]
        expected = np.stack(reference_updates(gradients()[leaf], *BETAS[betas], **options))
        assert actual.dtype == np.float32
        error = np.abs(actual - expected).max(axis=1)
        largest = np.abs(expected).max(axis=1)
        worst = int(np.argmax(error - TOLERANCE * largest))
        assert (error <= TOLERANCE * largest).all(), (
            f"{leaf}, step {worst + 1}: error {error[worst]:.3g}, "
            f"{error[worst] / largest[worst]:.3g} of the largest update"
        )
