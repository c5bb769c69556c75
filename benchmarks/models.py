"""Four whole models that read tables: what a train step costs with row gradients and without.

A click model with eight tables, a retrieval model with two towers, a small language model and a
click model with 26 tables of one size, as they are written by people who know nothing of row
gradients. Each contender takes whole train
steps, jitted and donated, in a process of its own, in turn with the others: the dense gradients
that JAX gives, with adamjax and with optax; row gradients of the same loss, lazy and exact; and a
step with the tables frozen, which is what the rest of the model costs. A sample is the mean of a
few steps after one that is not timed; a ratio is taken within a round. Where only one process at a
time can use the device, as a TPU, all contenders share one. Besides, how long it takes to trace the
row gradients by what `jax.value_and_grad` takes; and how long a step of 26 tables is as a program,
and how long it takes to make, beside one of a single table. The device's bandwidth is measured
before and after; what a whole model's step must move at least is not known.
"""

import argparse
import functools
import gc
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from adamjax.paths import leaf_paths
from benchmarks.measure import (
    RESULTS,
    Device,
    bound,
    device,
    environment,
    installed,
    progress,
    rounded,
    save,
    say,
    tell_bounds,
    timed,
)
from benchmarks.workers import SHARED, Team, serve, shared

__all__ = [
    "CONTENDERS",
    "DLRM",
    "MODELS",
    "QUICK",
    "Clicks",
    "Transformer",
    "TwoTower",
    "bounds",
    "main",
    "trainer",
]

Batch = dict[str, np.ndarray]
Params = dict[str, Any]

# Of p(k) ~ k^-s.
EXPONENT = 1.1


# --- data: ids by Zipf's law, and labels that a hidden truth about them decides -------------------


@functools.cache
def _cumulated(num_ids: int) -> np.ndarray:
    return np.cumsum(np.arange(1, num_ids + 1) ** -EXPONENT)


def _zipf(rng: np.random.Generator, num_ids: int, shape: tuple[int, ...]) -> np.ndarray:
    """int32 ids in `[0, num_ids)`, a few of them frequent, and these not neighbours."""
    total = _cumulated(num_ids)
    ranks = np.searchsorted(total, rng.random(shape) * total[-1])
    # A prime, so this is a permutation.
    return (ranks * 7_368_787 % num_ids).astype(np.int32)


def _hidden(ids: np.ndarray, salt: int) -> np.ndarray:
    """uint32, the hidden truth about each id; the bits look random."""
    x = (ids.astype(np.uint64) * 0x9E3779B1 + salt * 0x85EBCA77) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return ((x ^ (x >> 12)) * 0x297A2D39 & 0xFFFFFFFF).astype(np.uint32)


def _effect(ids: np.ndarray, salt: int) -> np.ndarray:
    """What an id adds to the truth: uniform in [-1, 1)."""
    return _hidden(ids, salt) / 2.0**31 - 1


# --- the models -----------------------------------------------------------------------------------


def _dense(key: jax.Array, fan_in: int, fan_out: int) -> Params:
    kernel = jax.random.normal(key, (fan_in, fan_out)) / math.sqrt(fan_in)
    return {"kernel": kernel, "bias": jnp.zeros(fan_out)}


def _mlp(key: jax.Array, *widths: int) -> list[Params]:
    keys = jax.random.split(key, len(widths) - 1)
    return [_dense(k, *pair) for k, pair in zip(keys, itertools.pairwise(widths), strict=True)]


def _through(layers: list[Params], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        # Smooth: at a kink, two runs that differ by rounding would part.
        x = jax.nn.silu(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


@dataclass(frozen=True)
class DLRM:
    """Clicks, after Naumov et al., arXiv:1906.00091: one table a feature, dots of all pairs.

    The first table holds what the user has seen, the second the words of the query: bags, summed
    and averaged. Of the other features a user has one value each.
    """

    rows: tuple[int, ...]
    width: int = 32
    examples: int = 1024
    bag: int = 8
    numbers: int = 13

    tables = "tables"

    def init(self, key: jax.Array) -> Params:
        key, bottom, top = jax.random.split(key, 3)
        keys = jax.random.split(key, len(self.rows))
        pairs = math.comb(len(self.rows) + 1, 2)
        return {
            "tables": [
                jax.random.uniform(k, (n, self.width), minval=-0.05, maxval=0.05)
                for k, n in zip(keys, self.rows, strict=True)
            ],
            "bottom": _mlp(bottom, self.numbers, 64, self.width),
            "top": _mlp(top, pairs + self.width, 128, 64, 1),
        }

    def loss(self, params: Params, batch: Any) -> jax.Array:
        seen, query, *others = params["tables"]
        # A short bag is filled up with an id that is no row.
        bags = [jnp.take(seen, batch["seen"], axis=0, mode="fill", fill_value=0).sum(1)]
        there = batch["there"][..., None]
        bags.append((query[batch["query"]] * there).sum(1) / there.sum(1))
        single = [table[ids] for table, ids in zip(others, batch["ids"].T, strict=True)]
        bottom = jax.nn.silu(_through(params["bottom"], batch["numbers"]))
        features = jnp.stack([bottom, *bags, *single], axis=1)
        dots = jnp.einsum("bid,bjd->bij", features, features)
        pairs = dots[:, *np.tril_indices(features.shape[1], -1)]
        logits = _through(params["top"], jnp.concatenate([bottom, pairs], axis=1))[:, 0]
        return (jax.nn.softplus(logits) - batch["clicked"] * logits).mean()

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((1, step))
        seen, query, *others = self.rows
        many = (self.examples, self.bag)
        lengths = rng.integers(1, self.bag + 1, (2, self.examples, 1))
        there = np.arange(self.bag) < lengths
        found = {
            "seen": np.where(there[0], _zipf(rng, seen, many), seen).astype(np.int32),
            "query": np.where(there[1], _zipf(rng, query, many), 0).astype(np.int32),
            "there": there[1].astype(np.float32),
            "ids": np.stack([_zipf(rng, n, (self.examples,)) for n in others], axis=1),
            "numbers": rng.standard_normal((self.examples, self.numbers), np.float32),
        }
        truth = found["numbers"][:, 0] - found["numbers"][:, 1]
        truth += (_effect(found["seen"], 0) * there[0]).sum(1)
        truth += 2 * (_effect(found["query"], 1) * there[1]).mean(1)
        truth += sum(2 * _effect(ids, i + 2) for i, ids in enumerate(found["ids"].T))
        found["clicked"] = (rng.random(self.examples) < 1 / (1 + np.exp(-truth))).astype(np.float32)
        return found


@dataclass(frozen=True)
class TwoTower:
    """Retrieval, after Yi et al., RecSys 2019: a tower each for users and items.

    The other items of the batch are what an item is told from. The table of items is read twice:
    for the item itself and for the user's history.
    """

    users: int
    items: int
    width: int = 64
    examples: int = 1024
    history: int = 8

    tables = "^(users|items)$"

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
        user = _through(params["user_tower"], user)
        item = _through(params["item_tower"], params["items"][batch["item"]])
        user, item = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (user, item))
        # Frequent items are among the others too often.
        logits = 10 * user @ item.T - batch["log_frequency"]
        return (jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)).mean()

    def batch(self, step: int) -> Batch:
        """A user likes one of 16 kinds of items."""
        rng = np.random.default_rng((2, step))
        user = _zipf(rng, self.users, (self.examples,))
        likes = (_hidden(user, 0) % 16)[:, None, None]
        offered = _zipf(rng, self.items, (self.examples, self.history + 1, 48))
        taken = (_hidden(offered, 1) % 16 == likes).argmax(-1)[..., None]
        items = np.take_along_axis(offered, taken, -1)[..., 0]
        item = items[:, 0]
        _, place, count = np.unique(item, return_inverse=True, return_counts=True)
        frequency = np.log(count[place]).astype(np.float32)
        return {"user": user, "item": item, "history": items[:, 1:], "log_frequency": frequency}


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

    tables = "embedding"

    def init(self, key: jax.Array) -> Params:
        embedding, positions, output, *keys = jax.random.split(key, 3 + 4 * self.layers)
        d = self.width

        def layer(keys: Sequence[jax.Array]) -> Params:
            # Queries and keys without a bias: a softmax does not see the keys', so its gradient is
            # rounding alone, which Adam scales up.
            mixed = jax.random.normal(keys[0], (d, 3 * d)) / math.sqrt(d)
            hidden, out = _dense(keys[2], d, 4 * d), _dense(keys[3], 4 * d, d)
            return {
                "attention": {"norm": jnp.ones(d), "in": mixed, "out": _dense(keys[1], d, d)},
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

        def dense(p: Params, x: jax.Array) -> jax.Array:
            return x @ p["kernel"] + p["bias"]

        def attention(p: Params, x: jax.Array) -> jax.Array:
            b, t, _ = x.shape
            q, k, v = jnp.split((x @ p["in"]).reshape(b, t, self.heads, -1), 3, axis=-1)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
            scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
            mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
            return dense(p["out"], mixed.reshape(b, t, -1))

        read, wanted = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        x = params["embedding"][read] + params["positions"]
        for layer in params["layers"]:
            x += attention(layer["attention"], norm(x, layer["attention"]["norm"]))
            hidden = dense(layer["mlp"]["in"], norm(x, layer["mlp"]["norm"]))
            x += dense(layer["mlp"]["out"], jax.nn.gelu(hidden))
        logits = norm(x, params["norm"]) @ params["output"]
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()

    def batch(self, step: int) -> Batch:
        """Three times in four a token is the one that its predecessor prefers."""
        rng, shape = np.random.default_rng((3, step)), (self.length + 1, self.examples)
        drawn, follows = _zipf(rng, self.tokens, shape), rng.random(shape) < 0.75
        prefers = _preferred(self.tokens)
        for t in range(1, len(drawn)):
            drawn[t] = np.where(follows[t], prefers[drawn[t - 1]], drawn[t])
        return {"tokens": drawn.T}


@functools.cache
def _preferred(tokens: int) -> np.ndarray:
    """For each token the one that follows: frequent ones follow often."""
    return _zipf(np.random.default_rng(0), tokens, (tokens,))


@dataclass(frozen=True)
class Clicks:
    """Clicks, from tables of one size: one value each of many features, and a dense layer."""

    count: int = 26
    rows: int = 100_000
    width: int = 16
    examples: int = 1024

    tables = "tables"

    def init(self, key: jax.Array) -> Params:
        keys = jax.random.split(key, self.count + 1)
        return {
            "tables": [
                jax.random.uniform(k, (self.rows, self.width), minval=-0.05, maxval=0.05)
                for k in keys[1:]
            ],
            "top": _mlp(keys[0], self.count * self.width, 32, 1),
        }

    def loss(self, params: Params, batch: Any) -> jax.Array:
        read = [table[ids] for table, ids in zip(params["tables"], batch["ids"].T, strict=True)]
        logits = _through(params["top"], jnp.concatenate(read, axis=1))[:, 0]
        return (jax.nn.softplus(logits) - batch["clicked"] * logits).mean()

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((4, step))
        ids = np.stack([_zipf(rng, self.rows, (self.examples,)) for _ in range(self.count)], axis=1)
        truth = sum(2 * _effect(column, i) for i, column in enumerate(ids.T))
        clicked = rng.random(self.examples) < 1 / (1 + np.exp(-truth))
        return {"ids": ids, "clicked": clicked.astype(np.float32)}


# What is called so has the same tables as the last of the models, but one alone.
MANY, ONE = "click, 26 tables", "click, one table"
MODELS: dict[str, Any] = {
    "DLRM": DLRM((1_000_000, 250_000, 100_000, 100_000, 50_000, 50_000, 50_000, 50_000)),
    "two towers": TwoTower(500_000, 300_000),
    "transformer": Transformer(),
    MANY: Clicks(),
}
QUICK: dict[str, Any] = {
    "DLRM": DLRM((3000, 2000, 1000, 1000, 500, 500, 500, 500), width=8, examples=64),
    "two towers": TwoTower(3000, 2000, width=16, examples=64),
    "transformer": Transformer(1000, width=16, length=16, examples=4),
    MANY: Clicks(3, rows=500, width=4, examples=64),
}


# --- contenders: a state to start with, and a train step `(params, state, batch)` -----------------

# name: what its optimizer step works on
CONTENDERS = {
    "optax": "optax.adamw, dense gradients",
    "dense": "adamw, dense gradients",
    "lazy": 'adamw(rows="lazy"), row gradients',
    "exact": "exact_rows(adamw), row gradients",
    "frozen": "adamw, the tables left as they are",
}
RATE, DECAY = 1e-3, 1e-4

# Steps before any is timed: rows then lag behind by various numbers of steps.
WARM = 24
# Batches in rotation; the seconds that a timed sample should last, and the most steps in it.
BATCHES, SAMPLE, MOST = 32, 0.5, 50


def optimizer(name: str, model: Any) -> Any:
    """The optimizer of a contender."""
    if name == "optax":
        import optax

        return optax.adamw(RATE, weight_decay=DECAY)
    tx = adamjax.adamw(RATE, weight_decay=DECAY, rows="lazy" if name == "lazy" else "dense")
    return adamjax.exact_rows(tx, model.tables) if name == "exact" else tx


def trainer(name: str, model: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init(params)` and `step(params, state, batch) -> (params, state, loss)` of a contender."""
    tx = optimizer(name, model)
    if name == "exact":
        return _exact(model, tx)
    if name == "frozen":
        return _frozen(model, tx)
    gradient = jax.value_and_grad(model.loss)
    if name == "lazy":
        gradient = adamjax.value_and_grad(model.loss, model.tables)

    def step(params: Params, state: Any, batch: Batch) -> Any:
        value, grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state, value

    return tx.init, step


def _exact(model: Any, tx: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    gradient = tx.value_and_grad(model.loss)

    def step(params: Params, state: Any, batch: Batch) -> Any:
        (value, grads), ticket = gradient(params, state, batch)
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state, value

    return tx.init, step


def _frozen(model: Any, tx: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    names = {TwoTower: ("users", "items"), Transformer: ("embedding",)}
    tables = names.get(type(model), ("tables",))

    def rest(params: Params) -> Params:
        return {name: x for name, x in params.items() if name not in tables}

    def step(params: Params, state: Any, batch: Batch) -> Any:
        held, trained = {name: params[name] for name in tables}, rest(params)
        value, grads = jax.value_and_grad(lambda x: model.loss(held | x, batch))(trained)
        updates, state = tx.update(grads, state, trained)
        return held | adamjax.apply_updates(trained, updates), state, value

    return lambda params: tx.init(rest(params)), step


def _row_major(params: Params, tables: str) -> Params:
    """With tables as the README has them for TPUs; elsewhere this changes nothing."""
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaf_paths(params), leaves, strict=True)
    return treedef.unflatten(
        [adamjax.layout.row_major(x) if re.search(tables, path) else x for path, x in pairs]
    )


class Serving:
    """Answers questions in a contender's process: takes up a model, takes samples."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.held: Any = None

    def __call__(self, question: list[Any]) -> Any:
        kind, *about = question
        if kind == "program":
            return self.program(*about)
        return self.take_up(*about) if kind == "model" else self.sample()

    def program(self, label: str, quick: bool) -> dict[str, Any]:
        """A step as a program: its lines, and how long it takes to make, with nothing in a cache.

        Tables lie as the compiler has them.
        """
        model = (QUICK if quick else MODELS)[MANY if label == ONE else label]
        model = replace(model, count=1) if label == ONE else model
        init, step = trainer(self.name, model)
        params = jax.eval_shape(model.init, jax.random.key(0))
        given = params, jax.eval_shape(init, params), model.batch(0)
        jax.clear_caches()
        gc.collect()
        made: list[Any] = []
        jitted = jax.jit(step, donate_argnums=(0, 1))
        lower = timed(lambda: made.append(jitted.lower(*given)))
        return {
            "trace and lower": lower,
            "compile": timed(lambda: made[0].compile()),
            "lines": len(made[0].as_text().splitlines()),
        }

    def take_up(self, label: str, quick: bool) -> dict[str, float]:
        """Compiles, warms up; answers with the step's temporaries and the loss then."""
        self.held = None
        gc.collect()
        model = (QUICK if quick else MODELS)[label]
        init, step = trainer(self.name, model)
        # The other generator takes long to compile.
        params = jax.jit(model.init)(jax.random.key(0, impl="rbg"))
        lies: Any = None
        if self.name in ("lazy", "exact"):
            params = _row_major(params, model.tables)
            lies = (*adamjax.layout.formats(optimizer(self.name, model), params), None)
        self.held = [params, init(params)]
        self.batches = [jax.device_put(model.batch(i)) for i in range(BATCHES)]
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=lies)
        self.step = jitted.lower(*self.held, self.batches[0]).compile()
        self.taken = 0
        self.run(WARM)
        bytes_held = self.step.memory_analysis().temp_size_in_bytes
        return {
            "temporary_bytes": bytes_held,
            "loss": float(self.value),
            "parameters": sum(x.size for x in jax.tree.leaves(self.held[0])),
        }

    def run(self, steps: int) -> None:
        """Takes steps and waits for them."""
        for _ in range(steps):
            batch = self.batches[self.taken % BATCHES]
            *self.held, self.value = self.step(*self.held, batch)
            self.taken += 1
        jax.block_until_ready((self.held, self.value))

    def sample(self) -> float:
        """Seconds a step."""
        once = timed(lambda: self.run(1))
        steps = max(1, min(MOST, round(SAMPLE / once)))
        return timed(lambda: self.run(steps)) / steps


# --- measuring ------------------------------------------------------------------------------------


def run_steps(
    models: dict[str, Any],
    names: Sequence[str],
    args: argparse.Namespace,
    device: Device,
    bar: Any,
) -> list[dict[str, Any]]:
    """The time of whole steps, of all contenders in turn."""
    table = []
    for label in models:
        about: dict[str, Any] = {}
        failed: dict[str, str] = {}
        rounds: list[dict[str, float]] = []
        for _ in range(args.sittings):
            with Team("models", names, device, bar) as team:
                for name in names:  # one by one: their temporaries are as large as the tables
                    about |= team.ask([name], ["model", label, args.quick])
                rounds += [team.in_turn(names, number) for number in range(args.rounds)]
                failed |= team.failed
        kept = [n for n in names if n in about and all(n in t for t in rounds)]
        row = {
            "model": label,
            # Of the workers': to ask JAX here would take the device from them.
            "parameters": max((x["parameters"] for x in about.values()), default=0),
            "ms": {n: rounded([1e3 * t[n] for t in rounds]) for n in kept},
            "ratio": {
                n: rounded([t[n] / t["exact"] for t in rounds]) for n in kept if "exact" in kept
            },
            # What the tables add to a step.
            "tables_ms": {
                n: rounded([1e3 * (t[n] - t["frozen"]) for t in rounds])
                for n in kept
                if n != "frozen" and "frozen" in kept
            },
            "temporary_bytes": {n: about[n]["temporary_bytes"] for n in kept},
            "loss": {n: about[n]["loss"] for n in kept},
            "failed": failed,
        }
        table.append(row)
        times = ", ".join(f"{n} {x['median']:.1f}" for n, x in row["ms"].items())
        say(f"{label:12} ms: {times}")
        for name, why in failed.items():
            say(f"{'':12} {name}: {why}")
    return table


# How often a program is made in a sitting.
MADE = 2


def run_programs(
    names: Sequence[str], args: argparse.Namespace, device: Device
) -> list[dict[str, Any]]:
    """How long the steps of many tables and of one are as programs, and how long they take to make.

    One contender after another: to compile takes all cores.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(args.sittings):
        with Team("models", names, device) as team:
            for _, label, name in itertools.product(range(MADE), (MANY, ONE), names):
                answers = team.ask([name], ["program", label, args.quick])
                found.setdefault((label, name), []).extend(answers.values())
    rounds = MADE * args.sittings
    return [
        {
            **{"model": label, "contender": name, "rounds": rounds, "lines": made[0]["lines"]},
            "s": {
                what: rounded([x[what] for x in made]) for what in ("trace and lower", "compile")
            },
        }
        for (label, name), made in found.items()
        if len(made) == rounds
    ]


def bounds(programs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a step of many tables is asked to keep, and what was measured."""
    found = {row["model"]: row for row in programs if row["contender"] == "exact"}
    lines = times = None
    if {MANY, ONE} <= found.keys():
        lines = found[MANY]["lines"] / found[ONE]["lines"]
        times = found[MANY]["s"]["compile"]["median"] / found[ONE]["s"]["compile"]["median"]
    return [
        bound("exact's lines with 26 tables by those with one", "at most", 4, lines),
        bound("exact's time to compile with 26 tables by that with one", "at most", 3, times),
    ]


def traced(model: Any, name: str, cold: bool = False) -> float:
    """Seconds to trace value and gradient of a model's loss, with nothing of it in a cache.

    Args:
      name: whose gradients: "jax" or, for row gradients, "rows".
      cold: whether JAX's own functions must be traced anew as well, as in a new process.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.batch(0))

    def loss(params: Params, batch: Any) -> jax.Array:  # another function each time
        return model.loss(params, batch)

    if name == "jax":
        gradient = jax.value_and_grad(loss)
    else:
        gradient = adamjax.value_and_grad(loss, model.tables)
    if cold:
        jax.clear_caches()
    jitted = jax.jit(lambda params, batch: gradient(params, batch))
    gc.collect()
    return timed(lambda: jitted.trace(params, batch))


def run_traces(models: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """The time to trace gradients, by that of `jax.value_and_grad`."""
    table = []
    for (label, model), cold in itertools.product(models.items(), (False, True)):
        taken = [
            {name: traced(model, name, cold) for name in order}
            for order in (("jax", "rows"), ("rows", "jax")) * -(-(rounds + 2) // 2)
        ][2:]
        table.append(
            {
                "model": label,
                "caches": "empty" if cold else "warm",
                "rounds": len(taken),
                "ms": {n: rounded([1e3 * t[n] for t in taken]) for n in taken[0]},
                "ratio": rounded([t["rows"] / t["jax"] for t in taken]),
            }
        )
    return table


# --- the suite ------------------------------------------------------------------------------------


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))])  # noqa: B905
        for row in rows
    )
    return "\n".join(lines)


def told(results: dict[str, Any]) -> str:
    """The results as text."""

    def ranged(x: dict[str, float], digits: int = 1) -> str:
        low, middle, high = (f"{x[k]:.{digits}f}" for k in ("q25", "median", "q75"))
        return f"{middle} ({low} to {high})"

    head = ["a step, ms", "by exact's", "of it tables, ms", "temporaries, MB", "loss"]
    parts = []
    for row in results["steps"]:
        table = [[f"{row['model']}, {row['parameters'] / 1e6:.1f}M parameters", *head]]
        for name, ms in row["ms"].items():
            tables = row["tables_ms"].get(name)
            cells = [
                CONTENDERS[name],
                ranged(ms),
                f"{row['ratio'][name]['median']:.2f}" if row["ratio"] else "",
                ranged(tables) if tables else "",
                f"{row['temporary_bytes'][name] / 1e6:.1f}",
                f"{row['loss'][name]:.6f}",
            ]
            table.append(cells)
        parts.append(_aligned(table))
    table = [["tracing value_and_grad", "caches", "JAX, ms", "adamjax, ms", "ratio"]]
    table += [
        [
            row["model"],
            row["caches"],
            ranged(row["ms"]["jax"]),
            ranged(row["ms"]["rows"]),
            ranged(row["ratio"], 2),
        ]
        for row in results["traces"]
    ]
    parts.append(_aligned(table))
    if results["programs"]:
        head = ["trace and lower, s", "compile, s", "lines of StableHLO"]
        table = [["a step as a program", "contender", *head]]
        table += [
            [
                row["model"],
                CONTENDERS[row["contender"]],
                *(ranged(x, 2) for x in row["s"].values()),
                f"{row['lines']:,}",
            ]
            for row in results["programs"]
        ]
        parts.append(_aligned(table))
    return "\n\n".join(parts)


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks models", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="samples a sitting (default 8)")
    parser.add_argument("--sittings", type=int, default=3, help="starts of processes (default 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--only", default="", help="models whose name holds this text")
    parser.add_argument("--contenders", help=f"some of: {'; '.join(CONTENDERS)}; split by ;")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--worker", choices=(*CONTENDERS, SHARED), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        serve(shared(Serving) if args.worker == SHARED else Serving(args.worker))
        return 0
    if args.rounds < 2 or args.sittings < 1:
        parser.error("--rounds must be at least 2, --sittings at least 1")
    models = QUICK if args.quick else MODELS
    models = {name: model for name, model in models.items() if args.only in name}
    if not models:
        parser.error(f"no model's name holds {args.only!r}; there are {list(MODELS)}")
    chosen = args.contenders.split(";") if args.contenders else list(CONTENDERS)
    if unknown := [name for name in chosen if name not in CONTENDERS]:
        parser.error(f"no contenders {unknown}; there are {list(CONTENDERS)}")
    names = [n for n in chosen if n != "optax" or installed("optax")]

    here = device(args.quick)
    results: dict[str, Any] = {"suite": "models", "quick": args.quick}
    results |= {"sittings": args.sittings, "rounds": args.rounds}
    with progress(len(models) * args.sittings * args.rounds * len(names)) as bar:
        results["steps"] = run_steps(models, names, args, here, bar)
    results["programs"] = run_programs(names, args, here) if MANY in models else []
    here.add_bandwidth(results, args.quick)
    results["traces"] = run_traces(models, 2 if args.quick else max(7, args.rounds))
    packages = ("adamjax", "jax", "jaxlib", "optax")
    results["environment"] = environment(*installed(*packages))
    print(f"\n{told(results)}")
    results["bounds"] = []
    if results["programs"] and not args.quick:
        results["bounds"] = bounds(results["programs"])
        tell_bounds(results["bounds"])
    out = args.out or RESULTS / results["environment"]["platform"] / "models.json"
    if args.out or not (args.quick or args.only or args.contenders):
        save(results, out)
        print(f"written to {out}")
    return 0
