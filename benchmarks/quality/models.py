"""The models, small and as their papers have them, each with its data, batches and metrics.

A model has `init(key)`, `loss(params, batch)`, `batches(seed)`, which are the same for every
contender, `tables`, the names of the parameters that are tables, and `scores(params, part)`, which
has a number for each example of the validation or the test split.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality import data

Params = dict[str, Any]
Batches = tuple[np.ndarray, ...]
PARTS = ("validation", "test")


@dataclass(frozen=True)
class Model:
    """What all models have.

    Attributes:
      epochs: how many there are; after each the model is evaluated.
      steps: of an epoch.
      batch: examples of a step.
      width: of the tables.
      drawn: wrong answers for each right one in training, where they are drawn.
    """

    epochs: int
    steps: int
    batch: int
    width: int = 16
    drawn: int = 4

    name = ""
    data = ""
    tables: ClassVar[tuple[str, ...]] = ()
    # The first one decides on the rate.
    metrics: ClassVar[tuple[str, ...]] = ("HR@10", "NDCG@10")

    @property
    def size(self) -> tuple[int, int, int]:
        """The shape of the batches: epochs, steps, examples."""
        return self.epochs, self.steps, self.batch

    def init(self, key: jax.Array) -> Params:
        raise NotImplementedError

    def loss(self, params: Params, batch: Any) -> jax.Array:
        raise NotImplementedError

    def batches(self, seed: int) -> Batches:
        """Arrays [epochs, steps, batch, ...]."""
        raise NotImplementedError

    def examples(self, part: str) -> tuple[np.ndarray, ...]:
        """The examples of a split, as `evaluate` takes them."""
        raise NotImplementedError

    def evaluate(self, params: Params, *examples: Any) -> dict[str, jax.Array]:
        """Each metric, for each example; may be traced."""
        raise NotImplementedError

    def reads(self, part: str) -> np.ndarray:
        """How often the row of each example is read by right answers in the training data."""
        raise NotImplementedError

    @functools.cached_property
    def start(self) -> Callable[[jax.Array], Params]:
        """`init`, compiled."""
        return jax.jit(self.init)

    @functools.cached_property
    def _evaluated(self) -> Callable[..., dict[str, jax.Array]]:
        return jax.jit(self.evaluate)

    @functools.cached_property
    def held_out(self) -> dict[str, tuple[np.ndarray, ...]]:
        """The examples of both splits."""
        return {part: self.examples(part) for part in PARTS}

    def scores(self, params: Params, part: str) -> dict[str, np.ndarray]:
        """Each metric, for each example of a split."""
        found = self._evaluated(params, *self.held_out[part])
        return {name: np.asarray(x) for name, x in found.items()}


# --- shared ---------------------------------------------------------------------------------------


def drawn_rows(rng: np.random.Generator, count: int, size: tuple[int, ...]) -> np.ndarray:
    """int32 numbers of examples, of the size: all in random order, again and again."""
    passes = -(-math.prod(size) // count)
    order = np.concatenate([rng.permutation(count) for _ in range(passes)])
    return order[: math.prod(size)].reshape(size).astype(np.int32)


def ranking(scores: jax.Array) -> dict[str, jax.Array]:
    """What the rank of the first score among all is worth; a tie counts as lost, and so does NaN.

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
    """The log loss of scores of which the first in each line belongs to the right answer."""
    right, wrong = scores[..., 0], scores[..., 1:]
    return jax.nn.softplus(-right).mean() + jax.nn.softplus(wrong).sum(-1).mean()


def choice_loss(scores: jax.Array) -> jax.Array:
    """The softmax loss of the same."""
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


# --- users and items ------------------------------------------------------------------------------


class Recommender(Model):
    """Ranks a user's next item among 99 that the user never rated."""

    data = "ratings"

    def batches(self, seed: int) -> Batches:
        """Users [...], and items [..., 1 + drawn], the right one first."""
        ratings, rng = data.ratings(), np.random.default_rng(seed)
        users, items = ratings.training[drawn_rows(rng, len(ratings.training), self.size)].T
        users, items = users.T, items.T
        others = ratings.unrated(rng, users, self.drawn)
        return users, np.concatenate([items[..., None], others], -1)

    def examples(self, part: str) -> tuple[np.ndarray, ...]:
        ratings = data.ratings()
        right = getattr(ratings, part)[:, 1:]
        users = np.arange(ratings.users, dtype=np.int32)
        return users, np.concatenate([right, ratings.negatives], 1)

    def reads(self, part: str) -> np.ndarray:
        ratings = data.ratings()
        return ratings.item_counts[getattr(ratings, part)[:, 1]]

    def score(self, params: Params, users: Any, items: Any) -> jax.Array:
        """[n, k] of users [n] and items [n, k]."""
        raise NotImplementedError

    def evaluate(self, params: Params, *examples: Any) -> dict[str, jax.Array]:
        found = ranking(self.score(params, *examples))
        return {name: found[name] for name in self.metrics}

    def loss(self, params: Params, batch: Any) -> jax.Array:
        return click_loss(self.score(params, *batch))


class MatrixFactorisation(Recommender):
    """The dot product of a user's row and an item's, with a bias for each item.

    Koren, Bell & Volinsky (2009), on clicks with drawn wrong answers.
    """

    name = "matrix factorisation"
    tables = ("user", "item")

    def init(self, key: jax.Array) -> Params:
        user, item = jax.random.split(key)
        ratings = data.ratings()
        return {
            "user": normal(user, 0.01, ratings.users, self.width),
            "item": normal(item, 0.01, ratings.items, self.width + 1),
        }

    def score(self, params: Params, users: Any, items: Any) -> jax.Array:
        rows = params["item"][items]
        return jnp.einsum("nd,nkd->nk", params["user"][users], rows[..., :-1]) + rows[..., -1]


class NeuMF(Recommender):
    """Neural matrix factorisation: a weighted product of rows beside a small network.

    He et al., arXiv:1708.05031.
    """

    name = "NeuMF"
    tables = ("product_user", "product_item", "deep_user", "deep_item")

    def init(self, key: jax.Array) -> Params:
        *keys, first, second, out = jax.random.split(key, 7)
        ratings, width = data.ratings(), self.width
        counts = [ratings.users, ratings.items] * 2
        rows = [normal(k, 0.01, n, width) for k, n in zip(keys, counts, strict=True)]
        return {
            **dict(zip(self.tables, rows, strict=True)),
            "layers": [layer(first, 2 * width, 2 * width), layer(second, 2 * width, width)],
            "out": layer(out, 2 * width, 1),
        }

    def score(self, params: Params, users: Any, items: Any) -> jax.Array:
        product = params["product_user"][users][:, None] * params["product_item"][items]
        item = params["deep_item"][items]
        user = jnp.broadcast_to(params["deep_user"][users][:, None], item.shape)
        x = jnp.concatenate([user, item], -1)
        for each in params["layers"]:
            x = jax.nn.relu(apply(each, x))
        return apply(params["out"], jnp.concatenate([product, x], -1))[..., 0]


class TwoTowers(Recommender):
    """A tower for the user, one for the item; the other items of a batch are the wrong answers.

    Yi et al. (2019): unit vectors, a temperature, and scores corrected by how often an item is in
    a batch.
    """

    name = "two towers"
    tables = ("user", "item")
    temperature = 0.1

    def init(self, key: jax.Array) -> Params:
        user, item, *keys = jax.random.split(key, 6)
        ratings = data.ratings()
        return {
            "user": normal(user, 0.1, ratings.users, self.width),
            "item": normal(item, 0.1, ratings.items, self.width),
            "user_tower": [layer(k, self.width, self.width) for k in keys[:2]],
            "item_tower": [layer(k, self.width, self.width) for k in keys[2:]],
        }

    def tower(self, params: Params, name: str, ids: Any) -> jax.Array:
        """Unit vectors of users or items."""
        first, second = params[f"{name}_tower"]
        x = apply(second, jax.nn.relu(apply(first, params[name][ids])))
        return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)

    def batches(self, seed: int) -> Batches:
        ratings, rng = data.ratings(), np.random.default_rng(seed)
        rows = drawn_rows(rng, len(ratings.training), self.size)
        return ratings.training[rows, 0], ratings.training[rows, 1]

    def loss(self, params: Params, batch: Any) -> jax.Array:
        users, items = batch
        x = self.tower(params, "user", users) @ self.tower(params, "item", items).T
        counts = data.ratings().item_counts.clip(1)
        x = x / self.temperature - jnp.asarray(np.log(counts), jnp.float32)[items]
        # The same item twice in a batch is no wrong answer.
        is_same = (items[:, None] == items) & ~np.eye(len(items), dtype=bool)
        x = jnp.where(is_same, -jnp.inf, x)
        return (jax.nn.logsumexp(x, axis=1) - jnp.diagonal(x)).mean()

    def score(self, params: Params, users: Any, items: Any) -> jax.Array:
        user, item = self.tower(params, "user", users), self.tower(params, "item", items)
        return jnp.einsum("nd,nkd->nk", user, item)


class Sequence(Recommender):
    """One block of attention over the last items of a user.

    After SASRec (Kang & McAuley, arXiv:1808.09781), with one head, and trained on the next item
    alone. What is read and what is ranked are rows of one table.
    """

    name = "sequence"
    tables = ("item",)
    window = 10

    def init(self, key: jax.Array) -> Params:
        item, place, *keys = jax.random.split(key, 7)
        names = ("query", "key", "value", "first", "second")
        layers = {k: layer(x, self.width, self.width) for k, x in zip(names, keys, strict=True)}
        return {
            # The last row stands for what is before a user's first item.
            "item": normal(item, 0.1, data.ratings().items + 1, self.width),
            "place": normal(place, 0.1, self.window, self.width),
            **layers,
        }

    @functools.cached_property
    def windows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return data.ratings().before(self.window)

    def batches(self, seed: int) -> Batches:
        ratings, rng = data.ratings(), np.random.default_rng(seed)
        rows = drawn_rows(rng, len(ratings.training), self.size)
        users, items = ratings.training[rows, 0], ratings.training[rows, 1]
        others = ratings.unrated(rng, users, self.drawn)
        return self.windows[0][rows], np.concatenate([items[..., None], others], -1)

    def examples(self, part: str) -> tuple[np.ndarray, ...]:
        _, items = super().examples(part)
        return self.windows[1 + PARTS.index(part)], items

    def score(self, params: Params, users: Any, items: Any) -> jax.Array:
        """Of the items before, int32[n, window], in place of users."""
        is_padding = users == data.ratings().items
        x = params["item"][users] + params["place"]
        x = jnp.where(is_padding[..., None], 0.0, x)
        query = apply(params["query"], x[:, -1])
        weights = jnp.einsum("nd,nwd->nw", query, apply(params["key"], x)) / self.width**0.5
        weights = jax.nn.softmax(jnp.where(is_padding, -1e9, weights))
        h = x[:, -1] + jnp.einsum("nw,nwd->nd", weights, apply(params["value"], x))
        h = h + apply(params["second"], jax.nn.relu(apply(params["first"], h)))
        return jnp.einsum("nd,nkd->nk", h, params["item"][items])


# --- a knowledge graph ----------------------------------------------------------------------------


class DistMult(Model):
    """The product of head, relation and tail, summed; the right tail or head among drawn ones.

    Yang et al., arXiv:1412.6575.
    """

    name = "DistMult"
    data = "knowledge graph"
    tables = ("entity",)
    metrics = ("MRR", "HR@10")

    def init(self, key: jax.Array) -> Params:
        entity, relation = jax.random.split(key)
        graph = data.graph()
        return {
            "entity": normal(entity, 0.3, graph.entities, self.width),
            "relation": normal(relation, 0.3, graph.relations, self.width),
        }

    def batches(self, seed: int) -> Batches:
        """Entities that are given, relations, and entities to choose from, the right one first."""
        graph, rng = data.graph(), np.random.default_rng(seed)
        facts = graph.training[drawn_rows(rng, len(graph.training), self.size)]
        is_tail = rng.random(self.size) < 0.5
        given, asked = (np.where(is_tail, facts[..., i], facts[..., 2 - i]) for i in (0, 2))
        others = rng.integers(graph.entities, size=(*self.size, self.drawn), dtype=np.int32)
        return given, facts[..., 1], np.concatenate([asked[..., None], others], -1)

    def examples(self, part: str) -> tuple[np.ndarray, ...]:
        graph = data.graph()
        facts = getattr(graph, part)
        known = np.flatnonzero(graph.entity_counts).astype(np.int32)
        rng = np.random.default_rng(PARTS.index(part))
        others = rng.choice(known, (len(facts), 99))
        # Another right answer is none of the wrong ones.
        every = np.concatenate([graph.training, graph.validation, graph.test]).astype(np.int64)
        shape = (graph.entities, graph.relations, graph.entities)
        right = np.ravel_multi_index(tuple(every.T), shape)

        def among_right() -> np.ndarray:
            asked = np.broadcast_arrays(facts[:, :1], facts[:, 1:2], others)
            return np.isin(np.ravel_multi_index(tuple(asked), shape), right)

        while (is_right := among_right()).any():
            others[is_right] = rng.choice(known, int(is_right.sum()))
        return facts[:, 0], facts[:, 1], np.concatenate([facts[:, 2:], others], 1)

    def reads(self, part: str) -> np.ndarray:
        graph = data.graph()
        return graph.entity_counts[getattr(graph, part)[:, [0, 2]]].min(1)

    def score(self, params: Params, given: Any, relations: Any, asked: Any) -> jax.Array:
        one = params["entity"][given] * params["relation"][relations]
        return jnp.einsum("nd,nkd->nk", one, params["entity"][asked])

    def loss(self, params: Params, batch: Any) -> jax.Array:
        return choice_loss(self.score(params, *batch))

    def evaluate(self, params: Params, *examples: Any) -> dict[str, jax.Array]:
        found = ranking(self.score(params, *examples))
        return {name: found[name] for name in self.metrics}


# --- words ----------------------------------------------------------------------------------------


@functools.cache
def word_counts() -> np.ndarray:
    """How often each word is in the training text."""
    text = data.text()
    return np.bincount(text.training.ravel(), minlength=len(text.words))


def drawn_words(rng: np.random.Generator, power: float, size: tuple[int, ...]) -> np.ndarray:
    """int32 words, as probable as a power of their counts."""
    total = np.cumsum(word_counts().astype(np.float64) ** power)
    return np.searchsorted(total, rng.random(size) * total[-1], side="right").astype(np.int32)


class SkipGram(Model):
    """Tells the words around a word from drawn ones.

    Mikolov et al., arXiv:1310.4546: frequent words are passed over at random, wrong answers are
    drawn by the counts to the power of 3/4. `neighbours` is the share of a word's ten nearest by
    the rows' cosine that are among its fifty nearest by counts (positive pointwise mutual
    information with the words around it), for some of the frequent words.
    """

    name = "skip-gram"
    data = "text"
    tables = ("word", "around")
    metrics = ("loss", "neighbours")
    window = 3
    passed_over = 1e-3
    pairs = 8192
    frequent, probed = 2000, 250

    def init(self, key: jax.Array) -> Params:
        words = len(data.text().words)
        first = jax.random.uniform(key, (words, self.width), minval=-0.5, maxval=0.5)
        return {"word": first / self.width, "around": jnp.zeros((words, self.width))}

    def drawn_pairs(
        self, rng: np.random.Generator, blocks: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Words and words near them, none of them unknown."""
        share = word_counts() / word_counts().sum()
        kept = np.sqrt(self.passed_over / share.clip(1e-12)).clip(0, 1)
        kept[0] = 0
        flat = blocks.ravel()
        words, around = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        while sum(map(len, words)) < count:
            at = np.flatnonzero(rng.random(len(flat)) < kept[flat])
            offset = rng.integers(1, self.window + 1, len(at)) * rng.choice([-1, 1], len(at))
            place = at % blocks.shape[1] + offset
            inside = (place >= 0) & (place < blocks.shape[1])
            at, near = at[inside], (at + offset)[inside]
            near_is_kept = rng.random(len(at)) < kept[flat[near]]
            order = rng.permutation(np.flatnonzero(near_is_kept))
            words.append(flat[at[order]])
            around.append(flat[near[order]])
        return np.concatenate(words)[:count], np.concatenate(around)[:count]

    def batches(self, seed: int) -> Batches:
        """Words, and words to choose from, that which was near first."""
        rng = np.random.default_rng(seed)
        pairs = self.drawn_pairs(rng, data.text().training, math.prod(self.size))
        words, around = (x.reshape(self.size) for x in pairs)
        others = drawn_words(rng, 0.75, (*self.size, self.drawn))
        return words, np.concatenate([around[..., None], others], -1)

    def examples(self, part: str) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(PARTS.index(part))
        words, around = self.drawn_pairs(rng, data.held_out()[PARTS.index(part)], self.pairs)
        others = drawn_words(rng, 0.75, (self.pairs, self.drawn))
        return words, np.concatenate([around[:, None], others], 1)

    def reads(self, part: str) -> np.ndarray:
        return word_counts()[self.held_out[part][0]]

    def score(self, params: Params, words: Any, around: Any) -> jax.Array:
        return jnp.einsum("nd,nkd->nk", params["word"][words], params["around"][around])

    def loss(self, params: Params, batch: Any) -> jax.Array:
        return click_loss(self.score(params, *batch))

    def evaluate(self, params: Params, *examples: Any) -> dict[str, jax.Array]:
        scores = self.score(params, *examples)
        right, wrong = jax.nn.softplus(-scores[:, 0]), jax.nn.softplus(scores[:, 1:])
        rows = params["word"][1 : self.frequent + 1]
        rows = rows / jnp.sqrt(jnp.sum(rows * rows, 1, keepdims=True) + 1e-30)
        probes, near = self.counted_neighbours
        cosines = (rows[probes] @ rows.T).at[jnp.arange(len(probes)), probes].set(-jnp.inf)
        _, nearest = jax.lax.top_k(cosines, 10)
        shares = jnp.take_along_axis(jnp.asarray(near), nearest, 1).mean(1)
        # Rows that are not finite have no neighbours.
        shares = jnp.where(jnp.isfinite(cosines.max(1)), shares, jnp.nan)
        return {"loss": right + wrong.sum(1), "neighbours": shares}

    @functools.cached_property
    def counted_neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """The probed words, and for each which frequent words are near; both without word 0."""
        words, counts = self.frequent, np.zeros((self.frequent + 1,) * 2)
        blocks = np.where(data.text().training <= words, data.text().training, 0)
        for offset in range(1, self.window + 1):
            pairs = blocks[:, :-offset].ravel().astype(np.int64) * (words + 1)
            pairs += blocks[:, offset:].ravel()
            counts += np.bincount(pairs, minlength=counts.size).reshape(counts.shape)
        counts = (counts + counts.T)[1:, 1:]
        total = counts.sum(1).clip(1)
        ratio = counts * counts.sum() / (total[:, None] * total)
        information = np.log(ratio.clip(1.0))
        unit = information / np.linalg.norm(information, axis=1, keepdims=True).clip(1e-12)
        probes = np.linspace(50, words - 1, min(self.probed, words - 50)).astype(np.int32)
        cosines = unit[probes] @ unit.T
        cosines[np.arange(len(probes)), probes] = -1
        near = np.zeros(cosines.shape, np.float32)
        fifty = np.argpartition(-cosines, 50, axis=1)[:, :50]
        np.put_along_axis(near, fifty, 1.0, axis=1)
        return probes, near


class NextWord(Model):
    """The next word from the four before it: one hidden layer, a softmax over all words.

    After Bengio et al. (2003). Training compares the right word with words that are drawn by their
    counts, the same for a whole batch; what is reported is the full softmax.
    """

    name = "next word"
    data = "text"
    tables = ("word", "output")
    metrics = ("loss",)
    window, hidden, windows = 4, 32, 1024

    def init(self, key: jax.Array) -> Params:
        word, first, second = jax.random.split(key, 3)
        counts = word_counts() + 0.5
        kernel = np.zeros((len(counts), self.width + 1), np.float32)
        kernel[:, -1] = np.log(counts / counts.sum())
        return {
            # The last row stands for what is before a block.
            "word": normal(word, 0.1, len(counts) + 1, self.width),
            "hidden": layer(first, self.window * self.width, self.hidden),
            "projection": layer(second, self.hidden, self.width),
            # The last column is the bias.
            "output": jnp.asarray(kernel),
        }

    def drawn_windows(
        self, rng: np.random.Generator, blocks: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        every = data.training.Windows(blocks, self.window, data.text().boundary)
        return every.at(every.starts[rng.permutation(len(every.starts))[:count]])

    def batches(self, seed: int) -> Batches:
        """The words before, the next one, and the drawn ones."""
        rng = np.random.default_rng(seed)
        before, word = self.drawn_windows(rng, data.text().training, math.prod(self.size))
        drawn = drawn_words(rng, 1.0, (self.epochs, self.steps, self.drawn))
        return before.reshape(*self.size, self.window), word.reshape(self.size), drawn

    def features(self, params: Params, before: Any) -> jax.Array:
        x = params["word"][before].reshape(len(before), -1)
        x = apply(params["projection"], jax.nn.gelu(apply(params["hidden"], x)))
        return jnp.concatenate([x, jnp.ones((len(x), 1))], 1)

    def loss(self, params: Params, batch: Any) -> jax.Array:
        before, word, drawn = batch
        x = self.features(params, before)
        counts = word_counts()
        expected = jnp.asarray(np.log(self.drawn * counts.clip(1) / counts.sum()), jnp.float32)
        right = jnp.sum(x * params["output"][word], 1) - expected[word]
        others = x @ params["output"][drawn].T - expected[drawn]
        others = jnp.where(drawn == word[:, None], -jnp.inf, others)
        scores = jnp.concatenate([right[:, None], others], 1)
        return choice_loss(scores)

    def examples(self, part: str) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(PARTS.index(part))
        return self.drawn_windows(rng, data.held_out()[PARTS.index(part)], self.windows)

    def reads(self, part: str) -> np.ndarray:
        return word_counts()[self.held_out[part][1]]

    def evaluate(self, params: Params, *examples: Any) -> dict[str, jax.Array]:
        before, word = examples
        logits = self.features(params, before) @ params["output"].T
        right = jnp.take_along_axis(logits, word[:, None], 1)[:, 0]
        return {"loss": jax.nn.logsumexp(logits, axis=1) - right}


MODELS = (
    MatrixFactorisation(epochs=6, steps=1500, batch=64),
    NeuMF(epochs=4, steps=1500, batch=64, width=8),
    TwoTowers(epochs=6, steps=766, batch=128),
    Sequence(epochs=4, steps=766, batch=128),
    DistMult(epochs=4, steps=500, batch=256),
    SkipGram(epochs=3, steps=1000, batch=256, drawn=5),
    NextWord(epochs=3, steps=1000, batch=256, drawn=256),
)
