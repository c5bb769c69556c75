"""Four models that read tables and were not written for row gradients.

Each has `init(key)`, `loss(params, batch)`, `batch(step)`, which makes the same data in every run,
and `tables`, the names of the parameters that are tables. Ids follow Zipf's law, and a hidden
property of each decides the labels, so that there is something to learn.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, np.ndarray]
Params = dict[str, Any]

EXPONENT = 1.1  # s of Zipf's law, p(k) ~ k^-s


# --- data -----------------------------------------------------------------------------------------


def zipf_sums(num_ids: int, exponent: float) -> np.ndarray:
    return np.cumsum(np.arange(1, num_ids + 1) ** -exponent)


def draw_ids(rng: np.random.Generator, sums: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """int32 ids in `[0, len(sums))`; `sums` are cumulative weights. Frequent ids are spread out."""
    ranks = np.searchsorted(sums, rng.random(shape) * sums[-1])
    # A prime, so this is a permutation.
    return (ranks * 7_368_787 % len(sums)).astype(np.int32)


_zipf_sums = functools.cache(zipf_sums)


def _zipf(rng: np.random.Generator, num_ids: int, shape: tuple[int, ...]) -> np.ndarray:
    return draw_ids(rng, _zipf_sums(num_ids, EXPONENT), shape)


def _hash(ids: np.ndarray, salt: int) -> np.ndarray:
    """uint32 whose bits look random: the hidden properties of each id."""
    x = (ids.astype(np.uint64) * 0x9E3779B1 + salt * 0x85EBCA77) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return ((x ^ (x >> 12)) * 0x297A2D39 & 0xFFFFFFFF).astype(np.uint32)


def _effect(ids: np.ndarray, salt: int) -> np.ndarray:
    """What an id adds to the logit of the label: uniform in [-1, 1)."""
    return _hash(ids, salt) / 2.0**31 - 1


def _clicked(rng: np.random.Generator, logits: np.ndarray) -> np.ndarray:
    return (rng.random(len(logits)) < 1 / (1 + np.exp(-logits))).astype(np.float32)


# --- layers ---------------------------------------------------------------------------------------


def _dense(key: jax.Array, fan_in: int, fan_out: int) -> Params:
    kernel = jax.random.normal(key, (fan_in, fan_out)) / math.sqrt(fan_in)
    return {"kernel": kernel, "bias": jnp.zeros(fan_out)}


def _apply(layer: Params, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _mlp(key: jax.Array, *widths: int) -> list[Params]:
    keys = jax.random.split(key, len(widths) - 1)
    return [_dense(k, *pair) for k, pair in zip(keys, itertools.pairwise(widths), strict=True)]


def _apply_mlp(layers: list[Params], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        # Smooth: at a kink, two runs that differ by rounding would part.
        x = jax.nn.silu(_apply(layer, x))
    return _apply(layers[-1], x)


def _init_tables(keys: Sequence[jax.Array], rows: Sequence[int], width: int) -> list[jax.Array]:
    return [
        jax.random.uniform(key, (n, width), minval=-0.05, maxval=0.05)
        for key, n in zip(keys, rows, strict=True)
    ]


def _click_loss(logits: jax.Array, clicked: jax.Array) -> jax.Array:
    return (jax.nn.softplus(logits) - clicked * logits).mean()


# --- the models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DLRM:
    """Clicks, after Naumov et al., arXiv:1906.00091: one table a feature, dots of all pairs.

    The first table is of what the user has seen, the second of the query's words. Both are read by
    bags of ids; the rows of a bag are summed in the first, and averaged in the second. Each other
    feature is one id.
    """

    rows: tuple[int, ...]
    width: int = 32
    examples: int = 1024
    bag: int = 8
    numbers: int = 13

    tables = ("tables",)

    def init(self, key: jax.Array) -> Params:
        key, bottom, top = jax.random.split(key, 3)
        pairs = math.comb(len(self.rows) + 1, 2)
        return {
            "tables": _init_tables(jax.random.split(key, len(self.rows)), self.rows, self.width),
            "bottom": _mlp(bottom, self.numbers, 64, self.width),
            "top": _mlp(top, pairs + self.width, 128, 64, 1),
        }

    def loss(self, params: Params, batch: Any) -> jax.Array:
        seen, query, *others = params["tables"]
        # A short bag is padded with an id beyond the last row.
        bags = [jnp.take(seen, batch["seen"], axis=0, mode="fill", fill_value=0).sum(1)]
        present = batch["present"][..., None]
        bags.append((query[batch["query"]] * present).sum(1) / present.sum(1))
        single = [table[ids] for table, ids in zip(others, batch["ids"].T, strict=True)]
        bottom = jax.nn.silu(_apply_mlp(params["bottom"], batch["numbers"]))
        features = jnp.stack([bottom, *bags, *single], axis=1)
        dots = jnp.einsum("bid,bjd->bij", features, features)
        pairs = dots[:, *np.tril_indices(features.shape[1], -1)]
        logits = _apply_mlp(params["top"], jnp.concatenate([bottom, pairs], axis=1))[:, 0]
        return _click_loss(logits, batch["clicked"])

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((1, step))
        seen, query, *others = self.rows
        bags = (self.examples, self.bag)
        lengths = rng.integers(1, self.bag + 1, (2, self.examples, 1))
        present = np.arange(self.bag) < lengths
        batch = {
            "seen": np.where(present[0], _zipf(rng, seen, bags), seen).astype(np.int32),
            "query": np.where(present[1], _zipf(rng, query, bags), 0).astype(np.int32),
            "present": present[1].astype(np.float32),
            "ids": np.stack([_zipf(rng, n, (self.examples,)) for n in others], axis=1),
            "numbers": rng.standard_normal((self.examples, self.numbers), np.float32),
        }
        logits = batch["numbers"][:, 0] - batch["numbers"][:, 1]
        logits += (_effect(batch["seen"], 0) * present[0]).sum(1)
        logits += 2 * (_effect(batch["query"], 1) * present[1]).mean(1)
        logits += sum(2 * _effect(ids, i + 2) for i, ids in enumerate(batch["ids"].T))
        return batch | {"clicked": _clicked(rng, logits)}


@dataclass(frozen=True)
class TwoTower:
    """Retrieval, after Yi et al., RecSys 2019: a tower each for users and items.

    A user's item competes with the other items of the batch. The table of items is read twice: for
    the item itself and for the user's history.
    """

    users: int
    items: int
    width: int = 64
    examples: int = 1024
    history: int = 8

    tables = ("users", "items")

    def init(self, key: jax.Array) -> Params:
        users, items, user_tower, item_tower = jax.random.split(key, 4)
        return {
            "users": 0.05 * jax.random.normal(users, (self.users, self.width)),
            "items": 0.05 * jax.random.normal(items, (self.items, self.width)),
            "user_tower": _mlp(user_tower, 2 * self.width, 128, self.width),
            "item_tower": _mlp(item_tower, self.width, 128, self.width),
        }

    def loss(self, params: Params, batch: Any) -> jax.Array:
        history = jnp.take(params["items"], batch["history"], axis=0).mean(1)
        user = jnp.concatenate([params["users"][batch["user"]], history], axis=1)
        user = _apply_mlp(params["user_tower"], user)
        item = _apply_mlp(params["item_tower"], params["items"][batch["item"]])
        user, item = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (user, item))
        # Frequent items are wrong answers more often than others, which this corrects.
        logits = 10 * user @ item.T - batch["log_frequency"]
        return (jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)).mean()

    def batch(self, step: int) -> Batch:
        """A user likes one of 16 kinds of items.

        For each item of a user, 48 are drawn. It is the first that the user likes, if there is one,
        else the first.
        """
        rng = np.random.default_rng((2, step))
        user = _zipf(rng, self.users, (self.examples,))
        likes = (_hash(user, 0) % 16)[:, None, None]
        offered = _zipf(rng, self.items, (self.examples, self.history + 1, 48))
        liked = (_hash(offered, 1) % 16 == likes).argmax(-1)[..., None]
        items = np.take_along_axis(offered, liked, -1)[..., 0]
        item = items[:, 0]
        _, position, count = np.unique(item, return_inverse=True, return_counts=True)
        log_frequency = np.log(count[position]).astype(np.float32)
        batch = {"user": user, "item": item, "history": items[:, 1:]}
        return batch | {"log_frequency": log_frequency}


@dataclass(frozen=True)
class Transformer:
    """A causal language model whose output kernel is not the embedding's table.

    The softmax is over all tokens, so the kernel's gradient is dense; the embedding's is not.
    """

    tokens: int = 50_000
    width: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 64
    examples: int = 8

    tables = ("embedding",)

    def init(self, key: jax.Array) -> Params:
        embedding, positions, output, *keys = jax.random.split(key, 3 + 4 * self.layers)
        d = self.width

        def layer(keys: Sequence[jax.Array]) -> Params:
            # No bias here: that of the keys would not change the softmax, so its gradient would be
            # only rounding errors, which Adam scales up.
            qkv_kernel = jax.random.normal(keys[0], (d, 3 * d)) / math.sqrt(d)
            hidden, out = _dense(keys[2], d, 4 * d), _dense(keys[3], 4 * d, d)
            return {
                "attention": {"norm": jnp.ones(d), "in": qkv_kernel, "out": _dense(keys[1], d, d)},
                "mlp": {"norm": jnp.ones(d), "in": hidden, "out": out},
            }

        return {
            "embedding": jax.random.normal(embedding, (self.tokens, d)),
            "positions": 0.02 * jax.random.normal(positions, (self.length, d)),
            "layers": [layer(keys[4 * i : 4 * i + 4]) for i in range(self.layers)],
            "norm": jnp.ones(d),
            "output": 0.02 * jax.random.normal(output, (d, self.tokens)),
        }

    def loss(self, params: Params, batch: Any) -> jax.Array:
        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

        def attention(p: Params, x: jax.Array) -> jax.Array:
            b, t, _ = x.shape
            q, k, v = jnp.split((x @ p["in"]).reshape(b, t, self.heads, -1), 3, axis=-1)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
            scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
            mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
            return _apply(p["out"], mixed.reshape(b, t, -1))

        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        x = params["embedding"][inputs] + params["positions"]
        for layer in params["layers"]:
            x += attention(layer["attention"], norm(x, layer["attention"]["norm"]))
            hidden = _apply(layer["mlp"]["in"], norm(x, layer["mlp"]["norm"]))
            x += _apply(layer["mlp"]["out"], jax.nn.gelu(hidden))
        logits = norm(x, params["norm"]) @ params["output"]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()

    def batch(self, step: int) -> Batch:
        """With probability 3/4 a token is the preferred successor of the token before it."""
        rng, shape = np.random.default_rng((3, step)), (self.length + 1, self.examples)
        drawn, follows = _zipf(rng, self.tokens, shape), rng.random(shape) < 0.75
        prefers = _preferred(self.tokens)
        for t in range(1, len(drawn)):
            drawn[t] = np.where(follows[t], prefers[drawn[t - 1]], drawn[t])
        return {"tokens": drawn.T}


@functools.cache
def _preferred(tokens: int) -> np.ndarray:
    """The preferred successor of each token; frequent tokens are preferred often."""
    return _zipf(np.random.default_rng(0), tokens, (tokens,))


@dataclass(frozen=True)
class Clicks:
    """Clicks, from `count` features: each is one id, and has a table. All tables have one size."""

    count: int = 26
    rows: int = 100_000
    width: int = 16
    examples: int = 1024

    tables = ("tables",)

    def init(self, key: jax.Array) -> Params:
        top, *keys = jax.random.split(key, self.count + 1)
        return {
            "tables": _init_tables(keys, [self.rows] * self.count, self.width),
            "top": _mlp(top, self.count * self.width, 32, 1),
        }

    def loss(self, params: Params, batch: Any) -> jax.Array:
        read = [table[ids] for table, ids in zip(params["tables"], batch["ids"].T, strict=True)]
        logits = _apply_mlp(params["top"], jnp.concatenate(read, axis=1))[:, 0]
        return _click_loss(logits, batch["clicked"])

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((4, step))
        ids = np.stack([_zipf(rng, self.rows, (self.examples,)) for _ in range(self.count)], axis=1)
        logits = sum(2 * _effect(column, i) for i, column in enumerate(ids.T))
        return {"ids": ids, "clicked": _clicked(rng, np.asarray(logits))}
