"""The base classes of the suite's models, and functions that several models use."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]
Batches = tuple[np.ndarray, ...]
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Model:
    """A model and its data: parameters, loss, batches, and metrics on held-out examples."""

    epochs: int  # after each, the model is evaluated
    steps: int  # of an epoch
    batch: int  # examples of a step
    width: int = 16  # of the tables
    # The wrong answers that are drawn for each right one (for each batch in `NextWord`).
    num_negatives: int = 4

    name = ""
    data = ""  # the name of the data set
    tables: ClassVar[tuple[str, ...]] = ()  # names of parameters
    # The learning rate is the one with the best value of the first metric.
    metrics: ClassVar[tuple[str, ...]] = ("HR@10", "NDCG@10")

    @property
    def batches_shape(self) -> tuple[int, int, int]:
        """The first dimensions of the arrays of `batches`: epochs, steps, examples."""
        return self.epochs, self.steps, self.batch

    def init(self, key: jax.Array) -> Params:
        raise NotImplementedError

    def loss(self, params: Params, batch: Any) -> jax.Array:
        raise NotImplementedError

    def batches(self, seed: int) -> Batches:
        """The batches of a run: arrays [epochs, steps, batch, ...], the same for all contenders."""
        raise NotImplementedError

    def examples(self, split: str) -> tuple[np.ndarray, ...]:
        """The arguments of `evaluate` for a split: all its examples."""
        raise NotImplementedError

    def evaluate(self, params: Params, *examples: Any) -> dict[str, jax.Array]:
        """Each metric, for each example; this is jitted."""
        raise NotImplementedError

    def reads(self, split: str) -> np.ndarray:
        """For each example of a split, how often its item, word or rarer entity is trained on."""
        raise NotImplementedError

    @functools.cached_property
    def jitted_init(self) -> Callable[[jax.Array], Params]:
        return jax.jit(self.init)

    @functools.cached_property
    def _jitted_evaluate(self) -> Callable[..., dict[str, jax.Array]]:
        return jax.jit(self.evaluate)

    @functools.cached_property
    def held_out(self) -> dict[str, tuple[np.ndarray, ...]]:
        """The examples of both splits."""
        return {split: self.examples(split) for split in SPLITS}

    def metric_values(self, params: Params, split: str) -> dict[str, np.ndarray]:
        """Each metric, for each example of a split."""
        values = self._jitted_evaluate(params, *self.held_out[split])
        return {name: np.asarray(x) for name, x in values.items()}


class Ranker(Model):
    """A model that ranks candidates, of which the first is the right one."""

    def score(self, params: Params, *examples: Any) -> jax.Array:
        """[n, k], a score for each candidate of each example."""
        raise NotImplementedError

    def evaluate(self, params: Params, *examples: Any) -> dict[str, jax.Array]:
        every_metric = ranking(self.score(params, *examples))
        return {name: every_metric[name] for name in self.metrics}


# --- what several models use ----------------------------------------------------------------------


def shuffled_indices(rng: np.random.Generator, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """int32[*shape], indices of `count` examples: all of them in random order, again and again."""
    passes = -(-math.prod(shape) // count)
    order = np.concatenate([rng.permutation(count) for _ in range(passes)])
    return order[: math.prod(shape)].reshape(shape).astype(np.int32)


def ranking(scores: jax.Array) -> dict[str, jax.Array]:
    """The metrics of the first score's rank among all scores. A tie counts as lost, as does NaN.

    >>> {name: float(x[0]) for name, x in ranking(jnp.array([[2.0, 3.0, 1.0, 0.0]])).items()}
    {'HR@10': 1.0, 'NDCG@10': 0.6309297680854797, 'MRR': 0.5}
    """
    rank = jnp.sum(~(scores[:, 1:] < scores[:, :1]), axis=1)
    is_hit = rank < 10
    return {
        "HR@10": is_hit.astype(jnp.float32),
        "NDCG@10": jnp.where(is_hit, 1 / jnp.log2(rank + 2.0), 0.0),
        "MRR": 1 / (rank + 1.0),
    }


def click_loss(scores: jax.Array) -> jax.Array:
    """The logistic loss of scores [..., 1 + negatives]; the first one is the right answer's."""
    right, wrong = scores[..., 0], scores[..., 1:]
    return jax.nn.softplus(-right).mean() + jax.nn.softplus(wrong).sum(-1).mean()


def choice_loss(scores: jax.Array) -> jax.Array:
    """The softmax loss of scores [..., candidates]; the first one is the right answer's."""
    return (jax.nn.logsumexp(scores, axis=-1) - scores[..., 0]).mean()


def normal(key: jax.Array, scale: float, *shape: int) -> jax.Array:
    return scale * jax.random.normal(key, shape)


def layer(key: jax.Array, inputs: int, outputs: int) -> Params:
    return {
        "kernel": normal(key, math.sqrt(2 / (inputs + outputs)), inputs, outputs),
        "bias": jnp.zeros(outputs),
    }


def apply(layer: Params, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]
