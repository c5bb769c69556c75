"""Models that rank items for a user (four models), or the entities of a knowledge graph."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality import data
from benchmarks.quality.model import (
    SPLITS,
    Batches,
    Params,
    Ranker,
    apply,
    choice_loss,
    click_loss,
    layer,
    normal,
    shuffled_indices,
)


class Recommender(Ranker):
    """Ranks a user's next item among 99 that the user never rated.

    `score` has as arguments users [n], or their items before, and items [n, k].
    """

    data = "ratings"

    def batches(self, seed: int) -> Batches:
        """Users [...], and items [..., 1 + drawn], the right one first."""
        ratings, rng = data.ratings(), np.random.default_rng(seed)
        rows = shuffled_indices(rng, len(ratings.training), self.batches_shape)
        users, items = ratings.training[rows, 0], ratings.training[rows, 1]
        others = ratings.unrated(rng, users, self.num_negatives)
        return users, np.concatenate([items[..., None], others], -1)

    def examples(self, split: str) -> tuple[np.ndarray, ...]:
        ratings = data.ratings()
        right = getattr(ratings, split)[:, 1:]
        users = np.arange(ratings.users, dtype=np.int32)
        return users, np.concatenate([right, ratings.negatives], 1)

    def reads(self, split: str) -> np.ndarray:
        ratings = data.ratings()
        return ratings.item_counts[getattr(ratings, split)[:, 1]]

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
        users, items = super().batches(seed)
        return users, items[..., 0]

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
    """One block of attention over the last items that a user rated.

    After SASRec (Kang & McAuley, arXiv:1808.09781), with one head, and trained only
    on the next item. The items of the window and those to rank have their rows in one table.
    """

    name = "sequence"
    tables = ("item",)
    window = 10

    def init(self, key: jax.Array) -> Params:
        item, place, *keys = jax.random.split(key, 7)
        names = ("query", "key", "value", "first", "second")
        layers = {k: layer(x, self.width, self.width) for k, x in zip(names, keys, strict=True)}
        return {
            # The last row is that of the padding before a user's first item.
            "item": normal(item, 0.1, data.ratings().items + 1, self.width),
            "place": normal(place, 0.1, self.window, self.width),
            **layers,
        }

    @functools.cached_property
    def windows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return data.ratings().before(self.window)

    def batches(self, seed: int) -> Batches:
        windows = self.windows[0]
        # The same seed as for the items gives the same rows.
        rng = np.random.default_rng(seed)
        rows = shuffled_indices(rng, len(windows), self.batches_shape)
        return windows[rows], super().batches(seed)[1]

    def examples(self, split: str) -> tuple[np.ndarray, ...]:
        _, items = super().examples(split)
        return self.windows[1 + SPLITS.index(split)], items

    def score(self, params: Params, before: Any, items: Any) -> jax.Array:
        """A user is the items before, int32[n, window]."""
        is_padding = before == data.ratings().items
        x = params["item"][before] + params["place"]
        x = jnp.where(is_padding[..., None], 0.0, x)
        query = apply(params["query"], x[:, -1])
        weights = jnp.einsum("nd,nwd->nw", query, apply(params["key"], x)) / self.width**0.5
        weights = jax.nn.softmax(jnp.where(is_padding, -1e9, weights))
        h = x[:, -1] + jnp.einsum("nw,nwd->nd", weights, apply(params["value"], x))
        h = h + apply(params["second"], jax.nn.relu(apply(params["first"], h)))
        return jnp.einsum("nd,nkd->nk", h, params["item"][items])


class DistMult(Ranker):
    """The summed product of head, relation and tail; ranks the right tail or head among others.

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
        """Given entities, relations, and candidates for the other entity, the right one first."""
        graph, rng = data.graph(), np.random.default_rng(seed)
        facts = graph.training[shuffled_indices(rng, len(graph.training), self.batches_shape)]
        is_tail = rng.random(self.batches_shape) < 0.5
        given, right = (np.where(is_tail, facts[..., i], facts[..., 2 - i]) for i in (0, 2))
        others_shape = (*self.batches_shape, self.num_negatives)
        others = rng.integers(graph.entities, size=others_shape, dtype=np.int32)
        return given, facts[..., 1], np.concatenate([right[..., None], others], -1)

    def examples(self, split: str) -> tuple[np.ndarray, ...]:
        graph = data.graph()
        facts = getattr(graph, split)
        known = np.flatnonzero(graph.entity_counts).astype(np.int32)
        rng = np.random.default_rng(SPLITS.index(split))
        others = rng.choice(known, (len(facts), 99))
        # A fact with a drawn entity may be true; such an entity is drawn again.
        facts_of_all = np.concatenate([graph.training, graph.validation, graph.test]).astype(
            np.int64
        )
        shape = (graph.entities, graph.relations, graph.entities)
        true_facts = np.ravel_multi_index(tuple(facts_of_all.T), shape)

        def is_true() -> np.ndarray:
            drawn = np.broadcast_arrays(facts[:, :1], facts[:, 1:2], others)
            return np.isin(np.ravel_multi_index(tuple(drawn), shape), true_facts)

        while (wrong := is_true()).any():
            others[wrong] = rng.choice(known, int(wrong.sum()))
        return facts[:, 0], facts[:, 1], np.concatenate([facts[:, 2:], others], 1)

    def reads(self, split: str) -> np.ndarray:
        graph = data.graph()
        return graph.entity_counts[getattr(graph, split)[:, [0, 2]]].min(1)

    def score(self, params: Params, given: Any, relations: Any, candidates: Any) -> jax.Array:
        product = params["entity"][given] * params["relation"][relations]
        return jnp.einsum("nd,nkd->nk", product, params["entity"][candidates])

    def loss(self, params: Params, batch: Any) -> jax.Array:
        return choice_loss(self.score(params, *batch))
