"""A next-word model: it reads the preceding words, and has a hidden layer and a softmax.

Training computes the softmax's sum exactly over the most frequent words, and estimates the rest
from a few drawn at random. The losses of held-out text are those of the full softmax.

So a training step reads rows of two tables, the embedding and the output's kernel, whose paths
`tables` has. Nothing else in the model depends on the form of their gradients.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.train.data import Windows
from benchmarks.train.processes import ALONE, Processes

# The number of words that are in every training sum, and of those drawn from the others.
FREQUENT = 2048
DRAWN = 1024

# The windows that one call evaluates, and how many at a time, so that logits stay in the cache.
_PER_CALL = 2048
_AT_A_TIME = 128


def init(seed: int, frequencies: np.ndarray, width: int, dim: int, hidden: int) -> dict[str, Any]:
    """The parameters of a model that predicts these frequencies in every context."""
    rng = np.random.default_rng(seed)

    def normal(scale: float, *shape: int) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape, np.float32))

    words, inputs = len(frequencies), width * dim
    return {
        "embedding": normal(0.1, words + 1, dim),  # the last row is the boundary's
        "hidden": {"kernel": normal(inputs**-0.5, inputs, hidden), "bias": jnp.zeros(hidden)},
        "projection": {"kernel": normal(hidden**-0.5, hidden, dim)},
        "output": {
            "kernel": jnp.zeros((words, dim)),
            "bias": jnp.asarray(np.log(frequencies), jnp.float32),
        },
    }


def _is_small(vocabulary: int) -> bool:
    """Whether training computes the full softmax, because drawing words would save nothing."""
    return vocabulary <= FREQUENT + DRAWN


def tables(vocabulary: int) -> list[str]:
    """Patterns of the tables' paths: leaves of which a step reads only some rows.

    A full softmax reads the whole kernel of the output, which is then no table.
    """
    return ["^embedding$"] if _is_small(vocabulary) else ["^embedding$", "^output/kernel$"]


# --- training -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A step's batch."""

    contexts: Any  # int32[batch, width], the words before: rows of the embedding
    words: Any  # int32[batch], those to predict: rows of the output
    drawn: Any  # int32[DRAWN], a sample of the rare words; `None` if the softmax is full


def draw(vocabulary: int, seed: int, step: int) -> np.ndarray | None:
    """The rare words of a step's batch."""
    if _is_small(vocabulary):
        return None
    rng = np.random.default_rng((seed, step, 1))  # not the stream of the epochs' order
    return rng.integers(FREQUENT, vocabulary, DRAWN, dtype=np.int32)


def loss(params: Any, batch: Batch) -> jax.Array:
    """The training loss of a batch: the mean of -log probability, in nats a token."""
    features = _features(params, batch.contexts)
    if batch.drawn is None:
        return _full(params, features, batch.words).mean()
    return _estimated(params, features, batch.words, batch.drawn).mean()


def _features(params: Any, contexts: jax.Array) -> jax.Array:
    inputs = params["embedding"][contexts].reshape(len(contexts), -1)
    hidden = jax.nn.gelu(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["projection"]["kernel"]


def _full(params: Any, features: jax.Array, words: jax.Array) -> jax.Array:
    logits = features @ params["output"]["kernel"].T + params["output"]["bias"]
    chosen = jnp.take_along_axis(logits, words[:, None], 1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen


def _estimated(params: Any, features: jax.Array, words: jax.Array, drawn: jax.Array) -> jax.Array:
    kernel, bias = params["output"]["kernel"], params["output"]["bias"]

    chosen = jnp.sum(features * kernel[words], axis=1) + bias[words]
    frequent = features @ kernel[:FREQUENT].T + bias[:FREQUENT]
    # A drawn word represents many. The word to predict, if rare, is counted once, as itself.
    others = features @ kernel[drawn].T + bias[drawn] + np.log((len(bias) - FREQUENT) / DRAWN)
    others = jnp.where(drawn == words[:, None], -jnp.inf, others)
    own = jnp.where(words >= FREQUENT, chosen, -jnp.inf)
    logits = jnp.concatenate([frequent, others, own[:, None]], axis=1)
    return jax.nn.logsumexp(logits, axis=1) - chosen


# --- the loss of held-out text --------------------------------------------------------------------


@jax.jit
def _summed(params: Any, contexts: jax.Array, words: jax.Array, counts: jax.Array) -> jax.Array:
    def losses(windows: tuple[jax.Array, jax.Array]) -> jax.Array:
        contexts, words = windows
        return _full(params, _features(params, contexts), words)

    parts = contexts.reshape(-1, _AT_A_TIME, contexts.shape[1]), words.reshape(-1, _AT_A_TIME)
    return jnp.sum(counts * jax.lax.map(losses, parts).ravel())


def held_out_loss(
    params: Any,
    held_out: Windows,
    is_given_up: Callable[[], bool],
    processes: Processes = ALONE,
) -> float | None:
    """The mean of -log probability in nats a token, by the full softmax; `None` if given up.

    Each process evaluates every n-th part, and all return the same result.
    """
    starts = held_out.starts
    sums, gave_up = np.zeros(-(-len(starts) // _PER_CALL)), False
    for i in range(processes.number, len(sums), processes.count):
        if gave_up := is_given_up():
            break
        # All parts have one size: the last is padded with windows that do not count.
        part = starts[i * _PER_CALL :][:_PER_CALL]
        fill = (0, _PER_CALL - len(part))
        counts = np.pad(np.ones(len(part), np.float32), fill)
        sums[i] = float(_summed(params, *held_out.at(np.pad(part, fill)), counts))
    if processes.any(gave_up):
        return None
    # Each sum is from one process, and `fsum` is exact: the result is the same for any count.
    return math.fsum(processes.gathered(sums).ravel()) / len(starts)


# --- what it learned ------------------------------------------------------------------------------

_SHOWN = ("read", "True", "three", "is", "int", "width", "path", "first")
_CANDIDATES = 3000  # neighbours are among so many most frequent words


def neighbours(params: Any, words: Sequence[str], most: int = 5) -> dict[str, list[str]]:
    """For a few words, the words whose embeddings have the largest cosine with theirs."""
    names = words[:_CANDIDATES]
    table = np.asarray(params["embedding"], np.float32)[: len(names)]
    unit = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-12)
    is_word = np.array([name.isalpha() and len(name) > 1 for name in names])

    chosen = [word for word in _SHOWN if word in names]
    frequent = [word for word in names[20:] if word.isalpha() and len(word) > 3]
    chosen += [word for word in frequent if word not in chosen][: len(_SHOWN) - len(chosen)]

    near = {}
    for word in chosen:
        at = names.index(word)
        cosine = np.where(is_word, unit @ unit[at], -np.inf)
        cosine[at] = -np.inf
        order = np.argsort(-cosine, kind="stable")[:most]
        near[word] = [names[i] for i in order if np.isfinite(cosine[i])]
    return near
