"""A next-word model: the words before in order, one hidden layer, a softmax over all words.

Training takes the softmax's sum exactly over the most frequent words and estimates the rest from
a few drawn at random; whatever is reported of held-out text is the full softmax.

So a training step reads rows of two tables, the embedding and the output's kernel. The loss works
on the tables, or on the rows that a batch reads in their place: how rows are read, and what
becomes of their gradients, is up to whoever trains.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.processes import ALONE, Processes

__all__ = [
    "Batch",
    "Rows",
    "Shuffled",
    "Windows",
    "batch",
    "by_rows",
    "held_out_loss",
    "init",
    "leaf",
    "loss",
    "neighbours",
    "reads",
    "replaced",
    "room",
    "tables",
    "windows",
]

EMBEDDING, KERNEL, BIAS = "embedding", "output/kernel", "output/bias"

# The words in every training sum, and how many are drawn from the others.
FREQUENT = 2048
DRAWN = 1024

# Windows that are evaluated in one call, and at a time within it: their logits stay in the cache.
_EVALUATED = 2048
_TOGETHER = 128


# --- windows --------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """Blocks in a row, each behind `width` boundary numbers, and where their windows start.

    A window is `width` numbers and the one to predict; none reaches into another block.
    """

    tokens: jax.Array
    starts: np.ndarray
    width: int


def windows(blocks: np.ndarray, width: int, boundary: int) -> Windows:
    """The windows of blocks, one for each token."""
    padded = np.pad(blocks, ((0, 0), (width, 0)), constant_values=boundary)
    first = np.arange(len(blocks), dtype=np.int32) * padded.shape[1]
    starts = first[:, None] + np.arange(blocks.shape[1], dtype=np.int32)
    return Windows(jnp.asarray(padded.ravel()), starts.ravel(), width)


def _read(tokens: jax.Array, starts: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    read = tokens[starts[:, None] + jnp.arange(width + 1)]
    return read[:, :-1], read[:, -1]


class Shuffled:
    """Batches of windows in an order that depends on nothing but the seed and the step.

    Every window comes once an epoch; a batch may lie across two.
    """

    def __init__(self, starts: np.ndarray, batch: int, seed: int):
        self.starts, self.batch = starts, batch

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(starts)

        self.order = order

    def at(self, step: int) -> np.ndarray:
        """Where the windows of a step's batch start."""
        epoch, place = np.divmod(np.arange(self.batch) + step * self.batch, len(self.starts))
        batch = np.empty(self.batch, np.int32)
        for e in np.unique(epoch).tolist():
            batch[epoch == e] = self.order(e)[place[epoch == e]]
        return batch


# --- the model ------------------------------------------------------------------------------------


def init(seed: int, frequencies: np.ndarray, width: int, dim: int, hidden: int) -> dict[str, Any]:
    """The parameters of a model that predicts just these frequencies, whatever came before."""
    rng = np.random.default_rng(seed)

    def normal(scale: float, *shape: int) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape, np.float32))

    words = len(frequencies)
    inputs = width * dim
    return {
        "embedding": normal(0.1, words + 1, dim),  # the last row is the boundary's
        "hidden": {"kernel": normal(inputs**-0.5, inputs, hidden), "bias": jnp.zeros(hidden)},
        "projection": {"kernel": normal(hidden**-0.5, hidden, dim)},
        "output": {
            "kernel": jnp.zeros((words, dim)),
            "bias": jnp.asarray(np.log(frequencies), jnp.float32),
        },
    }


def _features(params: Any, contexts: jax.Array) -> jax.Array:
    inputs = params["embedding"][contexts].reshape(len(contexts), -1)
    hidden = jax.nn.gelu(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["projection"]["kernel"]


def _full(params: Any, features: jax.Array, words: jax.Array) -> jax.Array:
    logits = features @ params["output"]["kernel"].T + params["output"]["bias"]
    chosen = jnp.take_along_axis(logits, words[:, None], 1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen


def _estimated(
    params: Any, features: jax.Array, words: jax.Array, drawn: jax.Array, rare: int
) -> jax.Array:
    kernel, bias = params["output"]["kernel"], params["output"]["bias"]

    chosen = jnp.sum(features * kernel[words], axis=1) + bias[words]
    frequent = features @ kernel[:FREQUENT].T + bias[:FREQUENT]
    # Each drawn word stands for many; the word to predict, when rare, stands for itself alone.
    others = features @ kernel[drawn].T + bias[drawn] + np.log(rare / DRAWN)
    others = jnp.where(drawn == words[:, None], -jnp.inf, others)
    itself = jnp.where(words >= FREQUENT, chosen, -jnp.inf)
    logits = jnp.concatenate([frequent, others, itself[:, None]], axis=1)
    return jax.nn.logsumexp(logits, axis=1) - chosen


# --- training: the whole tables, or the rows that a batch reads -----------------------------------


class Batch(NamedTuple):
    """What a step trains on.

    Attributes:
      contexts: int32[batch, width], the words before: rows of the embedding.
      words: int32[batch], those to predict: rows of the output.
      drawn: int32[DRAWN], rare words, which stand for all; `None` where the softmax is full.
    """

    contexts: jax.Array
    words: jax.Array
    drawn: jax.Array | None


def _is_small(vocabulary: int) -> bool:
    """Whether training takes the full softmax: there is nothing to gain from drawing words."""
    return vocabulary <= FREQUENT + DRAWN


def batch(
    tokens: jax.Array, starts: jax.Array, width: int, vocabulary: int, key: jax.Array
) -> Batch:
    """The windows that start there, and the words that a key draws."""
    contexts, words = _read(tokens, starts, width)
    if _is_small(vocabulary):
        return Batch(contexts, words, None)
    return Batch(contexts, words, jax.random.randint(key, (DRAWN,), FREQUENT, vocabulary))


def loss(params: Any, given: Batch, vocabulary: int) -> jax.Array:
    """The training loss of a batch: mean of -log probability, in nats a token."""
    features = _features(params, given.contexts)
    if given.drawn is None:
        return _full(params, features, given.words).mean()
    rare = vocabulary - FREQUENT
    return _estimated(params, features, given.words, given.drawn, rare).mean()


def tables(vocabulary: int) -> tuple[str, ...]:
    """The paths of the tables, of which a step reads some rows only.

    The kernel's frequent words are read in every step. They are rows among the others none the
    less: so that the kernel is read in one way, and as they are less than a tenth of it. A full
    softmax reads all of the kernel, so there it is none. Biases are never: a row that is one
    number costs more to find than to update.
    """
    return (EMBEDDING,) if _is_small(vocabulary) else (EMBEDDING, KERNEL)


class Rows(NamedTuple):
    """The rows that a batch reads.

    Attributes:
      indices: by the table's path, int32[room]: each row once, ascending, filled up with the
        table's number of rows.
      batch: the batch with the places of rows among these instead of the rows themselves.
    """

    indices: dict[str, jax.Array]
    batch: Batch


def _numbered(ids: jax.Array, num_rows: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The distinct ids, and at each id its place among them."""
    there = jnp.zeros(num_rows, jnp.int32).at[ids.ravel()].set(1)
    found = jnp.nonzero(there, size=size, fill_value=num_rows)[0]
    return found.astype(jnp.int32), jnp.cumsum(there) - 1


def reads(given: Batch, vocabulary: int, size: Mapping[str, int]) -> Rows:
    """The rows that the loss of a batch needs.

    A batch names most of its rows many times over: each is read and updated once.

    Args:
      size: of `room`, or larger.
    """
    found, place = _numbered(given.contexts, vocabulary + 1, size[EMBEDDING])
    indices, contexts = {EMBEDDING: found}, place[given.contexts]
    if given.drawn is None:
        return Rows(indices, given._replace(contexts=contexts))
    # The frequent words' rows come first, in order, as in the whole kernel.
    frequent = jnp.arange(FREQUENT, dtype=jnp.int32)
    every = jnp.concatenate([frequent, given.drawn, given.words])
    indices[KERNEL], place = _numbered(every, vocabulary, size[KERNEL])
    return Rows(indices, Batch(contexts, place[given.words], place[given.drawn]))


def room(given: Windows, vocabulary: int, batches: "Shuffled", steps: int) -> dict[str, int]:
    """The most rows of each table that any of the first batches may read."""
    tokens, width = np.asarray(given.tokens), given.width
    contexts = rare = 0
    for step in range(steps):
        read = tokens[batches.at(step)[:, None] + np.arange(width + 1)]
        words = read[:, -1]
        contexts = max(contexts, _distinct(read[:, :-1].ravel()))
        rare = max(rare, _distinct(words[words >= FREQUENT]))
    sizes = {EMBEDDING: contexts, KERNEL: min(vocabulary, FREQUENT + DRAWN + rare)}
    return {path: sizes[path] for path in tables(vocabulary)}


def _distinct(ids: np.ndarray) -> int:
    return int(np.count_nonzero(np.bincount(ids)))


def leaf(params: Any, path: str) -> Any:
    """The leaf at a path such as `output/kernel`."""
    return functools.reduce(operator.getitem, path.split("/"), params)


def replaced(params: Any, leaves: Mapping[str, Any]) -> Any:
    """The parameters with other leaves at some paths."""
    new = dict(params)
    for path, x in leaves.items():
        first, _, rest = path.partition("/")
        new[first] = replaced(new[first], {rest: x}) if rest else x
    return new


def by_rows(params: Any, rows: Mapping[str, jax.Array], indices: Mapping[str, jax.Array]) -> Any:
    """The parameters with rows in the place of their tables, and the biases that go with them."""
    here = dict(rows)
    if KERNEL in rows:
        at = leaf(params, BIAS).at[indices[KERNEL]]
        here[BIAS] = at.get(mode="fill", fill_value=0)
    return replaced(params, here)


# --- the loss of held-out text --------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="width")
def _summed(
    params: Any, tokens: jax.Array, starts: jax.Array, counts: jax.Array, width: int
) -> jax.Array:
    def some(starts: jax.Array) -> jax.Array:
        contexts, words = _read(tokens, starts, width)
        return _full(params, _features(params, contexts), words)

    losses = jax.lax.map(some, starts.reshape(-1, _TOGETHER))
    return jnp.sum(counts * losses.ravel())


def _parts(starts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Starts in parts of one size, with 1 for each, and 0 for what fills up the last."""
    for i in range(0, len(starts), _EVALUATED):
        part = starts[i : i + _EVALUATED]
        fill = (0, _EVALUATED - len(part))
        yield np.pad(part, fill), np.pad(np.ones(len(part), np.float32), fill)


def held_out_loss(
    params: Any,
    held_out: Windows,
    given_up: Callable[[], bool],
    processes: Processes = ALONE,
) -> float | None:
    """Mean of -log probability in nats a token, by the full softmax; None when given up.

    Processes take parts in turn; what they find, and whether one gave up, is known to all.
    """
    parts = list(_parts(held_out.starts))
    sums, left = np.zeros(len(parts)), False
    for i in range(processes.index, len(parts), processes.count):
        left = given_up()
        if left:
            break
        sums[i] = float(_summed(params, held_out.tokens, *parts[i], held_out.width))
    if processes.any(left):
        return None
    # Each sum is of one process, and the total is exact: the same for any count.
    return math.fsum(processes.gathered(sums).ravel()) / len(held_out.starts)


# --- what it learned ------------------------------------------------------------------------------

_TELLING = ("read", "True", "three", "is", "int", "width", "path", "first")
_FAMILIAR = 3000  # neighbours are among the most frequent words


def neighbours(params: Any, words: Sequence[str], most: int = 5) -> dict[str, list[str]]:
    """For a few words, those whose embeddings lie in the most similar direction."""
    names = words[:_FAMILIAR]
    table = np.asarray(params["embedding"], np.float32)[: len(names)]
    unit = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-12)
    is_word = np.array([name.isalpha() and len(name) > 1 for name in names])

    chosen = [word for word in _TELLING if word in names]
    frequent = [word for word in names[20:] if word.isalpha() and len(word) > 3]
    chosen += [word for word in frequent if word not in chosen][: len(_TELLING) - len(chosen)]

    near = {}
    for word in chosen:
        at = names.index(word)
        cosine = np.where(is_word, unit @ unit[at], -np.inf)
        cosine[at] = -np.inf
        order = np.argsort(-cosine, kind="stable")[:most]
        near[word] = [names[i] for i in order if np.isfinite(cosine[i])]
    return near
