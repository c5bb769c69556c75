"""Compares the errors of `exact_rows` with those of the dense optimizer.

A table is trained for 2,000 steps in three runs: in float32 by `exact_rows` and by the same chain
with dense gradients, and by the float64 reference. The error of a float32 run is the mean distance
of the table's elements to the reference. It is measured at the end, and after each step in the rows
that `lookup` reads. The error of `exact_rows` may be 1.2 times that of the dense chain, or 2 times
if rows catch up step by step. They do so if the first moment decays no faster than the divisor
(b1 >= sqrt(b2), or b1 >= b2 for Adamax; never for AMSGrad). The largest error of an element may
always be 2 times that of the dense chain.
"""

import copy
import dataclasses
import functools
import itertools
import math
import operator
import pickle
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import assert_close, assert_same, enable_x64

import adamjax
from adamjax import (
    accumulate_gradients,
    add_decayed_weights,
    apply_updates,
    averaged_weights,
    by_path,
    chain,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    cosine_decay,
    exact_rows,
    extend,
    row_gradient,
    scale_by_adam,
    scale_by_adamax,
    scale_by_amsgrad,
    scale_by_learning_rate,
    skip_not_finite,
    weight_ema,
)
from adamjax.exact import tables

STEPS = 2000
LEARNING_RATE = 0.01
DECAY = 0.1
MOMENTUM = 0.99

# --- chains, here and in the reference ----------------------------------------------------------

RULES = {
    "adam": (scale_by_adam, reference.adam),
    "amsgrad": (scale_by_amsgrad, reference.amsgrad),
    "adamax": (scale_by_adamax, reference.adamax),
    "nadam": (functools.partial(scale_by_adam, nesterov=True), reference.nadam),
}

CLIPS = {
    "unclipped": ((), lambda gs: gs),
    "by value": ((clip_by_value(0.5),), lambda gs: [reference.clip_by_value(g, 0.5) for g in gs]),
    "by norm": ((clip_by_norm(0.5),), lambda gs: [reference.clip_by_norm(g, 0.5) for g in gs]),
    "by global norm": (
        (clip_by_global_norm(1.0),),
        lambda gs: reference.clip_by_global_norm(gs, 1.0),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled: an optimizer, the shape of its tables, and how they are trained.

    Attributes:
      rule, clip: names of `RULES` and `CLIPS`.
      form: the name of the rule's epsilon, "eps_hat" or "eps".
      betas, eps: the rule's.
      rate: "constant", "cosine", or "by hand": an array that is set before each step.
      tail: the transforms after the rule: "decay", "average", both or neither.
      size: rows and columns of each table.
      history: "default" is 65,536; "least" is 256, or the rule's minimum if that is more.
      tables: the number of tables, 1 or 2. The second has half the learning rate.
      dense_every: one step in this many has a dense gradient; 0: no step has.
      ticket: whether `prepare` makes a ticket for each step.
    """

    rule: str = "adam"
    form: str = "eps_hat"
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-7
    rate: str = "constant"
    tail: str = ""
    clip: str = "unclipped"
    size: tuple = (60, 3)
    history: str = "default"
    tables: int = 1
    dense_every: int = 0
    ticket: bool = True

    @property
    def replays(self):
        """Whether rows catch up step by step: m decays no faster than the divisor."""
        b1, b2 = self.betas
        return b1 >= {"amsgrad": 1.0, "adamax": b2}.get(self.rule, math.sqrt(b2))

    @property
    def names(self):
        return ["table", "second table"][: self.tables]

    def chain(self, rate):
        """The chain; `rate` is the learning rate if it is set by hand."""
        scale_by, _ = RULES[self.rule]
        if self.rate == "cosine":
            rate = cosine_decay(LEARNING_RATE, STEPS)
        if self.rate == "constant":
            rate = LEARNING_RATE
        if self.tables == 2:
            rate = by_path([("second", halved(rate))], default=rate)
        return chain(
            *CLIPS[self.clip][0],
            scale_by(*self.betas, **{self.form: self.eps}),
            *[add_decayed_weights(DECAY)] * ("decay" in self.tail),
            scale_by_learning_rate(rate),
            *[weight_ema(MOMENTUM)] * ("average" in self.tail),
        )

    def exact(self, rate):
        """`exact_rows` of the chain."""
        history = 65536
        if self.history == "least":
            history = max(256, least_history(self.chain(LEARNING_RATE)))
        return exact_rows(self.chain(rate), "table", history=history)


def halved(rate):
    """Half a rate."""
    if isinstance(rate, cosine_decay):
        return cosine_decay(LEARNING_RATE / 2, STEPS)
    return rate / 2


def least_history(tx):
    """The minimal history of a chain, which the error for a shorter history names."""
    try:
        exact_rows(tx, "table", history=1)
    except ValueError as error:
        return int(re.search(r"at least (\d+)", str(error))[1])
    return 1


# --- data ---------------------------------------------------------------------------------------


@dataclasses.dataclass(repr=False)
class Data:
    """The data of a run, by the names of leaves; floats are float32. See `random_data`.

    Attributes:
      start: the parameters before the first step.
      indices: [STEPS, n] for each table, padded with the number of rows, which is out of bounds.
      values: [STEPS, n, columns] for each table, the gradient at each index; for the kernel,
        [STEPS, *shape].
      dense: [number of dense steps, rows, columns] for each table, the gradients in these steps.
      is_dense: [STEPS], which steps have dense gradients.
      rates: [STEPS], the learning rates, if they are set by hand.
    """

    start: dict
    indices: dict
    values: dict
    dense: dict
    is_dense: np.ndarray
    rates: np.ndarray

    def gradients(self):
        """The dense gradients of all leaves, each [steps, ...] in float64; the kernel is last."""
        grads = {}
        for name, ids in self.indices.items():
            rows, columns = self.start[name].shape
            sums = np.zeros((len(ids), rows + 1, columns))
            np.add.at(
                sums, (np.arange(len(ids))[:, None], np.minimum(ids, rows)), self.values[name]
            )
            sums = sums[:, :rows]
            sums[self.is_dense] = self.dense[name].astype(np.float64)
            grads[name] = sums
        return {**grads, "kernel": self.values["kernel"].astype(np.float64)}


def touch_counts(rng, rows, most):
    """[STEPS, rows], how often each step touches each row: how often the row is in its indices.

    The first five rows have special patterns. The others are touched at random, each with its own
    probability of at most `most`.
    """
    counts = rng.random((STEPS, rows)) < 10 ** rng.uniform(math.log10(3e-4), math.log10(most), rows)
    patterns = [
        np.ones(STEPS, bool),  # always
        np.zeros(STEPS, bool),  # never
        np.arange(STEPS) == rng.integers(0, 50),  # once
        np.isin(np.arange(STEPS), [3, 4, 5, STEPS - 80, STEPS - 1]),  # a long gap
        rng.random(STEPS) < 0.5,
    ]
    for row, pattern in enumerate(patterns[:rows]):
        counts[:, row] = pattern
    return counts * (1 + (rng.random(counts.shape) < 0.2))  # some of them twice


def indices_of(counts):
    """[STEPS, n] indices, each as often as it is touched, padded with the number of rows."""
    rows = counts.shape[1]
    # For small tables n has a fixed value, so other data need no compilation.
    width = 2 * rows if rows < 100 else int(counts.sum(1).max())
    indices = np.full((len(counts), width), rows, np.int32)
    for ids, row in zip(indices, counts, strict=True):
        ids[: row.sum()] = np.repeat(np.arange(len(row)), row)
    return indices


def random_data(config, seed):
    """Random data for a config: rows of every touch pattern, gradients of many sizes."""
    rng = np.random.default_rng(seed)
    rows, columns = config.size
    indices, values, start, dense = {}, {}, {}, {}
    is_dense = np.zeros(STEPS, bool)
    if config.dense_every:
        is_dense[config.dense_every - 1 :: config.dense_every] = True
    for name in config.names:
        ids = indices_of(touch_counts(rng, rows, 0.5 if rows < 100 else 0.02))
        sizes = 10 ** rng.uniform(-3, 1, rows + 1)
        indices[name] = rng.permuted(ids, axis=1)
        g = rng.normal(size=(*ids.shape, columns)) * sizes[indices[name]][..., None]
        values[name] = g.astype(np.float32)
        start[name] = (0.1 * rng.normal(size=config.size)).astype(np.float32)
        g = rng.normal(size=(is_dense.sum(), *config.size)) * sizes[:rows, None]
        dense[name] = g.astype(np.float32)
    start["kernel"] = rng.normal(size=3).astype(np.float32)
    values["kernel"] = (0.1 * rng.normal(size=(STEPS, 3))).astype(np.float32)
    rates = np.full(STEPS, LEARNING_RATE, np.float32)
    if config.rate == "by hand":
        rates[600:] /= 4
        rates[900:1000] = 0
        rates[1000:] = 2 * LEARNING_RATE
        rates[1500:] *= rng.random(STEPS - 1500) < 0.7
    return Data(start, indices, values, dense, is_dense, rates)


# --- the three runs -----------------------------------------------------------------------------

PROBES = 64  # rows that are read after each step


@functools.cache
def program(config, exact):
    """A jitted run: the leaves at the end, their averages, and the rows after each step."""
    make_tx = config.exact if exact else config.chain

    def gradients(x):
        grads = {
            name: row_gradient(x["indices"][name], x["values"][name], config.size[0])
            for name in config.names
        }
        if not exact:
            grads = {name: rows.to_dense() for name, rows in grads.items()}
        return {**grads, "kernel": x["values"]["kernel"]}

    def update(tx, grads, carry, ticket=None):
        params, state = carry
        extra = {} if ticket is None else {"ticket": ticket}
        updates, state = tx.update(grads, state, params, **extra)
        return apply_updates(params, updates), state

    def row_step(carry, x):
        tx, ticket = make_tx(x["rates"]), None
        if exact and config.ticket:
            _, ticket = tx.prepare(*carry, x["indices"])
        return update(tx, gradients(x), carry, ticket)

    def dense_step(carry, x, dense):
        kernel = {"kernel": x["values"]["kernel"]}
        return update(make_tx(x["rates"]), {**dense, **kernel}, carry)

    def read(carry, x):
        params, state = carry
        probes = jnp.arange(min(PROBES, config.size[0]))
        if not exact:
            return {name: params[name][probes] for name in config.names}
        tx = make_tx(x["rates"])
        return {name: tx.lookup(params, state, f"^{name}$", probes) for name in config.names}

    def run(start, x, dense):
        def step(carry, x):
            carry = row_step(carry, x)
            return carry, read(carry, x)

        def row_steps_and_dense_step(carry, data):
            """Steps with row gradients, and then one with dense gradients."""
            x, dense = data
            before, last = jax.tree.map(lambda a: a[:-1], x), jax.tree.map(lambda a: a[-1], x)
            carry, rows = jax.lax.scan(step, carry, before)
            carry = dense_step(carry, last, dense)
            final = read(carry, last)
            return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), rows, final)

        tx = make_tx(x["rates"][0])
        carry = start, tx.init(start)
        if config.dense_every:
            x = jax.tree.map(lambda a: a.reshape(-1, config.dense_every, *a.shape[1:]), x)
            carry, rows = jax.lax.scan(row_steps_and_dense_step, carry, (x, dense))
            rows = jax.tree.map(lambda a: a.reshape(STEPS, *a.shape[2:]), rows)
        else:
            carry, rows = jax.lax.scan(step, carry, x)
        params, state = tx.flush(*carry) if exact else carry
        averages = averaged_weights(state) if "average" in config.tail else None
        return params, averages, rows

    return jax.jit(run)


def trained(config, data, exact):
    x = {"indices": data.indices, "values": data.values, "rates": data.rates}
    return jax.tree.map(np.asarray, program(config, exact)(data.start, x, data.dense))


def reference_run(config, data):
    """The results of `program`, for the tables alone, by the float64 reference."""
    _, rule = RULES[config.rule]
    grads = data.gradients()
    clip = CLIPS[config.clip][1]
    for step in range(STEPS):
        for g, clipped in zip(grads.values(), clip([g[step] for g in grads.values()]), strict=True):
            g[step] = clipped
    ends, averages, rows = {}, {}, {}
    for name in config.names:
        factor = 0.5 if name == "second table" else 1.0
        rate = {
            "constant": lambda count: LEARNING_RATE,
            "cosine": lambda count: LEARNING_RATE * (1 + math.cos(math.pi * count / STEPS)) / 2,
            "by hand": lambda count: float(data.rates[count]),
        }[config.rate]
        blocks = []
        # Rows do not depend on each other, so they are computed in blocks. All steps of all rows
        # at once would fill the memory.
        for start in range(0, config.size[0], 256):
            block = slice(start, start + 256)
            weights, average = reference.descend(
                data.start[name][block],
                rule(list(grads[name][:, block]), *config.betas, **{config.form: config.eps}),
                lambda count, rate=rate, factor=factor: factor * rate(count),
                DECAY if "decay" in config.tail else 0.0,
                momentum=MOMENTUM,
            )
            blocks.append((weights[-1], average[-1]))
            if start == 0:
                rows[name] = np.stack(weights)[:, :PROBES]
        ends[name], averages[name] = map(np.concatenate, zip(*blocks, strict=True))
    return ends, averages if "average" in config.tail else None, rows


def errors(config, result, expected):
    """The errors of a run, by table and kind.

    The kinds `"end"`, `"average"` (of the weights) and `"steps"` (of the rows after each step) are
    mean errors. `"largest"` is the largest error of the rows after each step.
    """
    pairs = dict(zip(("end", "average", "steps"), zip(result, expected, strict=True), strict=True))
    found = {}
    for kind, (actual, reference_values) in pairs.items():
        if reference_values is None:
            assert actual is None
            continue
        for name in config.names:
            error = np.abs(actual[name].astype(np.float64) - reference_values[name])
            found[name, kind] = error.mean()
            if kind == "steps":
                found[name, "largest"] = error.max()
    return found


def mean_errors(config, seeds):
    """By the keys of `errors`: mean errors over seeds, of `exact_rows` and of the dense chain."""
    found = {}
    for seed in range(seeds):
        data = random_data(config, seed)
        expected = reference_run(config, data)
        exact = errors(config, trained(config, data, exact=True), expected)
        dense = errors(config, trained(config, data, exact=False), expected)
        for key in exact:
            found.setdefault(key, []).append((exact[key], dense[key]))
    return {key: np.mean(pair, axis=0) for key, pair in found.items()}


# --- every pair of settings ---------------------------------------------------------------------

FACTORS = {
    "rule": list(RULES),
    "form": ["eps_hat", "eps"],
    "betas": [
        (0.9, 0.999),
        (0.9, 0.95),
        (0.95, 0.98),
        (0.0, 0.99),
        (0.5, 0.5),
        (0.99, 0.9),
        (0.9, 0.99999),
    ],
    "eps": [1e-12, 1e-7, 1e-3, 1.0],
    "rate": ["constant", "cosine", "by hand"],
    "tail": ["", "decay", "average", "decay, average"],
    "clip": list(CLIPS),
    "size": [(5, 7), (23, 3), (60, 1), (2500, 1)],
    "history": ["default", "least"],
    "ticket": [True, False],
}


def is_sensible(settings):
    """Whether a config may have these settings, which may be only some of its settings."""
    if settings.get("rule") == "adamax" and settings.get("form") == "eps_hat":
        return False  # its epsilon has one form
    if settings.get("size", (0,))[0] < 100 or not {"rule", "betas"} <= set(settings):
        return True
    return not Config(rule=settings["rule"], betas=settings["betas"]).replays  # takes too long


def pairs(settings):
    """Every two settings of a config."""
    return set(itertools.combinations(sorted(settings.items(), key=lambda pair: pair[0]), 2))


def possible_pairs():
    """Every two settings of different factors that a config may have."""
    found = set()
    for (a, xs), (b, ys) in itertools.combinations(sorted(FACTORS.items()), 2):
        found |= {((a, x), (b, y)) for x in xs for y in ys if is_sensible({a: x, b: y})}
    return found


@functools.cache
def pairwise_configs():
    """Configs in which every possible pair of settings occurs, found by a greedy search.

    Dense gradients and a second table take long to compile, so only some configs have them.
    """
    rng = np.random.default_rng(125)  # of 150 seeds the one with the fewest configs
    missing, configs = possible_pairs(), []

    def gain(settings):
        return len(pairs(settings) & missing) if is_sensible(settings) else -1

    # Completes each of 20 missing pairs to a config, factor by factor, with the setting that adds
    # the most missing pairs. Of these configs, adds the one with the most missing pairs.
    while missing:
        best = {}
        for pair in sorted(missing, key=repr)[:20]:
            settings = dict(pair)
            for factor in rng.permutation([f for f in FACTORS if f not in settings]).tolist():
                options = [{**settings, factor: x} for x in FACTORS[factor]]
                gains = [gain(option) for option in options]
                best_ones = [i for i, g in enumerate(gains) if g == max(gains)]
                settings = options[rng.choice(best_ones)]
            if gain(settings) > (gain(best) if best else 0):
                best = settings
        missing -= pairs(best)
        i = len(configs)
        dense_every, num_tables = 100 if i % 6 == 1 else 0, 2 if i % 10 == 3 else 1
        configs.append(Config(**best, dense_every=dense_every, tables=num_tables))
    return configs


def config_id(config):
    """The id of a test with this config."""
    return "-".join(str(x).replace(" ", "") for x in vars(config).values() if x != "")


def test_every_pair_of_settings_occurs():
    found = set()
    for config in pairwise_configs():
        assert is_sensible(vars(config))
        found |= pairs({factor: getattr(config, factor) for factor in FACTORS})
    assert possible_pairs() <= found


@pytest.mark.parametrize("config", pairwise_configs(), ids=config_id)
@pytest.mark.slow
def test_errors_are_about_those_of_the_dense_chain(config):
    # The mean error of a small table varies between runs, so several runs are averaged.
    seeds = 1 + 100 // math.prod(config.size)
    found = mean_errors(config, seeds)
    for key, (exact, dense) in found.items():
        limit = 2.0 if config.replays or key[1] == "largest" else 1.2
        assert exact <= limit * dense, f"{key}: error {exact:.3g}, dense {dense:.3g}"


# --- drawn patterns -----------------------------------------------------------------------------

DRAWN_ROWS, DRAWN_COLUMNS = 12, 2

STEP = st.integers(0, STEPS - 1)
# A row is touched with a probability, at some steps, or in all steps outside of an interval.
PATTERN = st.one_of(
    st.just(("often", 1.0)),
    st.tuples(st.just("often"), st.floats(3e-4, 0.5)),
    st.tuples(st.just("at"), st.lists(STEP, max_size=3)),
    st.tuples(st.just("outside"), st.tuples(STEP, STEP)),
)

DRAWN_CONFIGS = {
    "adam, decay, average": Config(
        betas=(0.9, 0.95), rate="by hand", tail="decay, average", clip="by global norm"
    ),
    "adam-eps": Config(form="eps", rate="by hand", history="least", ticket=False),
    "amsgrad, decay": Config(rule="amsgrad", rate="by hand", tail="decay", clip="by value"),
    "adamax, average": Config(
        rule="adamax", form="eps", rate="by hand", tail="average", dense_every=100, history="least"
    ),
}


def touching_steps(pattern, rng):
    """[STEPS], which steps touch a row with this pattern."""
    kind, value = pattern
    t = np.arange(STEPS)
    if kind == "often":
        return rng.random(STEPS) < value
    return np.isin(t, value) if kind == "at" else (t < min(value)) | (t > max(value))


@st.composite
def any_data(draw, config):
    """Data for a config with any touch patterns, sizes of gradients, repetitions and rates."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    patterns = draw(st.lists(PATTERN, min_size=DRAWN_ROWS, max_size=DRAWN_ROWS))
    counts = np.stack([touching_steps(pattern, rng) for pattern in patterns], axis=1)
    counts = counts * (1 + (rng.random(counts.shape) < draw(st.sampled_from([0.0, 0.1, 1.0]))))
    exponents = draw(st.lists(st.floats(-6, 4), min_size=DRAWN_ROWS, max_size=DRAWN_ROWS))
    sizes = 10 ** np.array([*exponents, 0.0])
    ids = rng.permuted(indices_of(counts), axis=1)
    g = rng.normal(size=(*ids.shape, DRAWN_COLUMNS)) * sizes[ids][..., None]
    g *= rng.random(g.shape) < draw(st.sampled_from([0.5, 1.0]))
    is_dense = np.zeros(STEPS, bool)
    if config.dense_every:
        is_dense[config.dense_every - 1 :: config.dense_every] = True
    dense = rng.normal(size=(is_dense.sum(), DRAWN_ROWS, DRAWN_COLUMNS)) * sizes[:DRAWN_ROWS, None]
    rate = st.one_of(st.just(0.0), st.floats(1e-5, 0.03))
    rates = np.repeat(draw(st.lists(rate, min_size=5, max_size=5)), STEPS // 5)
    start = draw(st.sampled_from([0.0, 0.1, 10.0])) * rng.normal(size=(DRAWN_ROWS, DRAWN_COLUMNS))
    return Data(
        start={"table": start.astype(np.float32), "kernel": np.ones(3, np.float32)},
        indices={"table": ids},
        values={
            "table": g.astype(np.float32),
            "kernel": (0.1 * rng.normal(size=(STEPS, 3))).astype(np.float32),
        },
        dense={"table": dense.astype(np.float32)},
        is_dense=is_dense,
        rates=rates.astype(np.float32),
    )


@pytest.mark.parametrize("name", DRAWN_CONFIGS)
@pytest.mark.slow
def test_errors_are_about_those_of_the_dense_chain_for_any_reads(name):
    config = dataclasses.replace(DRAWN_CONFIGS[name], size=(DRAWN_ROWS, DRAWN_COLUMNS))

    # The drawn data are too large for hypothesis to shrink.
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(any_data(config))
    def check(data):
        expected = reference_run(config, data)
        exact = errors(config, trained(config, data, exact=True), expected)
        dense = errors(config, trained(config, data, exact=False), expected)
        # Over so few numbers the error of the dense run may be small by luck. So half an ulp, the
        # rounding of a weight, is added to the limit.
        ulp = np.spacing(np.float32(np.abs(expected[2]["table"]).max()))
        for key in exact:
            limit = 2.0 if key[1] == "largest" else 1.2
            assert exact[key] <= limit * dense[key] + ulp / 2, (
                f"{key}: error {exact[key]:.3g}, dense {dense[key]:.3g}, ulp {ulp:.3g}"
            )

    check()


# --- histories ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["", "decay, average"])
@pytest.mark.parametrize("betas", FACTORS["betas"], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_less_history_than_needed_is_refused_and_the_least_is_named(rule, betas, tail):
    tx = Config(rule=rule, form="eps", betas=betas, tail=tail).chain(0.1)
    least = least_history(tx)
    assert exact_rows(tx, "table", history=least).history == least
    if least > 2:
        with pytest.raises(
            ValueError, match=rf"history={least // 2} .* at least {least}\b.*scale_by"
        ):
            exact_rows(tx, "table", history=least // 2)
    # After that many steps, a gradient moves a row by a negligible part of its first movement.
    b1, b2 = betas
    divisor_decay = {"amsgrad": 1.0, "adamax": b2}.get(rule, math.sqrt(b2))
    if b1 < divisor_decay:
        assert (b1 / divisor_decay) ** least < 1e-7


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.5, 0.9)], ids=str)
@pytest.mark.slow
def test_the_least_history_is_enough(betas):
    """With these betas it is shorter than 256, and the ring wraps within the run."""
    config = Config(betas=betas, tail="decay, average", size=(40, 3))
    tx = config.chain(LEARNING_RATE)
    history = least_history(tx)
    assert history < 256
    step, check = short_run(config, exact_rows(tx, "table", history=history))
    for t in range(3 * history + 10):
        step(t)
        if t % 7 == 0 or t > 3 * history:
            check()


def test_history_is_rounded_up_to_a_power_of_two():
    assert exact_rows(adamjax.adam(), "table", history=1000).history == 1024
    assert exact_rows(adamjax.adam(), "table").history is None
    with pytest.raises(TypeError, match=r"history.*'long'"):
        exact_rows(adamjax.adam(), "table", history="long")


def batch_of_tables(*sizes, history=None):
    """A batch of abstract tables with these numbers of rows."""
    tx = exact_rows(adamjax.adam(), "table", history=history)
    params = {f"table {i}": jax.ShapeDtypeStruct((n, 1), jnp.float32) for i, n in enumerate(sizes)}
    bound = tx.bind(jax.eval_shape(tx.init, params), params)
    (family,) = bound.families
    return tables.Batch(family, family.tables)


def test_due_rows_of_the_largest_table_do_not_overflow_int32():
    num_rows = 2**31 - 2
    batch = batch_of_tables(num_rows, history=1024)
    each = tables.num_refreshed(batch.tables[0], batch.family.history)
    last_turn = (num_rows - 1) // each
    # The last positions of the last turn are after the last row, and exceed int32.
    assert (last_turn + 1) * each > 2**31
    # The step reads the first and the last row that are due. In `due`, num_rows replaces both.
    read = jnp.array([last_turn * each, num_rows - 1, num_rows, 7 * 2**27], jnp.int32)
    (due,) = tables.due_rows(batch, jnp.array(last_turn, jnp.int32), [read])
    assert due[:3].tolist() == [num_rows, last_turn * each + 1, last_turn * each + 2]
    assert int(due[num_rows - 2 - last_turn * each]) == num_rows - 2
    assert (due[num_rows - 1 - last_turn * each :] == num_rows).all()


def test_every_row_is_refreshed_once_in_all_turns():
    sizes = [0, 1, 2045, 2046, 2047, 100_000]
    batch = batch_of_tables(*sizes)
    turn, seen = jnp.array(0, jnp.int32), [[] for _ in sizes]
    nothing_read = [jnp.zeros(0, jnp.int32)] * len(sizes)
    due_rows = jax.jit(functools.partial(tables.due_rows, batch))
    for _ in range(batch.family.history - 2):
        for ids, due, num_rows in zip(seen, due_rows(turn, nothing_read), sizes, strict=True):
            ids += due[due < num_rows].tolist()
        turn = tables.next_turn(turn, batch.family.history)
    assert turn == 0
    assert seen == [list(range(num_rows)) for num_rows in sizes]


def test_a_table_of_too_many_rows_for_int32_is_refused():
    tx, num_rows = exact_rows(adamjax.adam(), "table"), 2**31 - 2
    with pytest.raises(ValueError, match="has 2147483647 rows, expected at most 2147483646"):
        jax.eval_shape(tx.init, {"table": jax.ShapeDtypeStruct((num_rows + 1, 1), jnp.float32)})


# --- single steps -------------------------------------------------------------------------------

NUM_ROWS = 40


def small_batch(t, rows=NUM_ROWS, columns=3):
    """Indices, some repeated and some outside of the table, and their gradients."""
    rng = np.random.default_rng(t)
    ids = rng.integers(0, rows + 2, 6)
    return jnp.asarray(ids, jnp.int32), jnp.asarray(rng.normal(size=(6, columns)), jnp.float32)


def small_params(rows=NUM_ROWS, columns=3):
    rng = np.random.default_rng(99)
    table = jnp.asarray(rng.normal(size=(rows, columns)), jnp.float32)
    return {"kernel": jnp.ones(2), "table": table}


def small_grads(t, rows=NUM_ROWS):
    ids, values = small_batch(t, rows)
    return {"kernel": jnp.full(2, 0.1), "table": row_gradient(ids, values, rows)}


def to_dense(grads):
    return {name: g.to_dense() if name == "table" else g for name, g in grads.items()}


class with_dense_gradients(adamjax.Transform):
    """Gives a transform dense gradients in place of row gradients."""

    tx: adamjax.Transform

    def init(self, params):
        return self.tx.init(params)

    def update(self, grads, state, params=None):
        return self.tx.update(to_dense(grads), state, params)


@functools.partial(jax.jit, static_argnames="ticketed")
def stepped(tx, params, state, grads, ids=None, ticketed=False):
    """One step of any transform, which is an argument of `jit`."""
    extra = {}
    if ticketed:
        extra["ticket"] = tx.prepare(params, state, {"table": ids})[1]
    updates, state = tx.update(grads, state, params, **extra)
    return apply_updates(params, updates), state


@jax.jit
def flushed(tx, params, state):
    return tx.flush(params, state)


@jax.jit
def lookup_all(tx, params, state):
    return tx.lookup(params, state, "table", jnp.arange(params["table"].shape[0]))


def short_run(config, tx):
    """`step(t)` takes a step by `tx` and by the dense chain; `check()` compares the two runs."""
    dense = config.chain(LEARNING_RATE)
    params = small_params()
    carries = {"exact": (params, tx.init(params)), "dense": (params, dense.init(params))}

    def step(t):
        grads = small_grads(t)
        carries["exact"] = stepped(tx, *carries["exact"], grads)
        carries["dense"] = stepped(dense, *carries["dense"], to_dense(grads))

    def check():
        params, state = carries["dense"]
        exact_params, exact_state = flushed(tx, *carries["exact"])
        assert_close(lookup_all(tx, *carries["exact"]), params["table"], rtol=5e-6)
        assert_close(exact_params, params, rtol=5e-6)
        assert_close(exact_state.inner, state, rtol=2e-5)

    return step, check


def pipeline():
    return chain(
        clip_by_global_norm(1.0),
        scale_by_adam(0.9, 0.95, eps=1e-3),
        add_decayed_weights(0.1),
        scale_by_learning_rate(cosine_decay(0.05, 300)),
        weight_ema(0.99),
    )


def trained_shortly(tx, steps=20, ticketed=False):
    params = small_params()
    state = tx.init(params)
    for t in range(steps):
        params, state = stepped(tx, params, state, small_grads(t), small_batch(t)[0], ticketed)
    return params, state


@pytest.mark.slow
def test_prepare_lookup_and_flush_return_the_same_rows():
    """For indices of any shape and dtype."""
    tx = exact_rows(pipeline(), "table")
    params, state = trained_shortly(tx)
    rows = np.asarray(lookup_all(tx, params, state))
    assert not np.allclose(rows, params["table"], atol=1e-4)  # rows of params lag behind
    assert_close(flushed(tx, params, state)[0]["table"], rows, rtol=1e-7)
    lookup = jax.jit(lambda ids: tx.lookup(params, state, "table", ids))
    prepare = jax.jit(lambda ids: tx.prepare(params, state, {"table": ids})[0])
    rows = np.concatenate([rows, np.zeros((1, 3), np.float32)])  # for indices outside
    for ids in (
        np.array([[3, 3, -1], [39, 0, 40]], np.int8),
        np.zeros((0, 2), np.int32),
        np.array(5, np.uint16),
    ):
        expected = rows[np.where((ids >= 0) & (ids < NUM_ROWS), ids, NUM_ROWS)]
        assert_close(lookup(ids), jnp.asarray(expected), rtol=1e-7)
        assert_close(prepare(ids), {"table": jnp.asarray(expected)}, rtol=1e-7)


def test_lookup_and_flush_do_not_change_later_steps():
    tx = exact_rows(pipeline(), "table")
    params, state = trained_shortly(tx)
    once = flushed(tx, params, state)
    assert_same(flushed(tx, *once), once)
    assert_same(lookup_all(tx, *once), once[0]["table"])
    assert_same(once[1].clock, state.clock)
    assert_same(once[1].last["table"], jnp.full(NUM_ROWS, 20, jnp.int32))
    # The next step is the same with and without a flush before it.
    step = functools.partial(stepped, tx, grads=small_grads(20))
    assert_close(lookup_all(tx, *step(*once)), lookup_all(tx, *step(params, state)), rtol=5e-7)


def test_rows_written_after_a_flush_go_on_as_under_the_dense_optimizer():
    """Without the flush, the movement that they have missed is added to the written values."""
    dense = pipeline()
    tx = exact_rows(dense, "table")
    ids, value = jnp.arange(NUM_ROWS // 2), 0.25

    def written(params):
        return {**params, "table": params["table"].at[ids].set(value)}

    def run(params, state):
        for t in range(20, 40):
            params, state = stepped(tx, params, state, small_grads(t))
        return lookup_all(tx, params, state)

    params, state = trained_shortly(tx)
    plain_params, plain_state = trained_shortly(with_dense_gradients(dense))
    plain = written(plain_params), plain_state
    for t in range(20, 40):
        plain = stepped(dense, *plain, to_dense(small_grads(t)))
    flushed_params, flushed_state = flushed(tx, params, state)
    assert_close(run(written(flushed_params), flushed_state), plain[0]["table"], rtol=2e-6)
    assert not np.allclose(run(written(params), state), plain[0]["table"], atol=1e-4)


def test_steps_with_and_without_tickets_are_the_same():
    tx = exact_rows(pipeline(), "table")
    without = trained_shortly(tx)
    assert_close(trained_shortly(tx, ticketed=True), without, rtol=1e-6)


@pytest.mark.slow
def test_a_ticket_for_other_rows_or_another_state_does_no_harm():
    tx = exact_rows(pipeline(), "table")
    prepare = jax.jit(lambda *args: tx.prepare(*args)[1])
    update = jax.jit(lambda grads, state, params, t: tx.update(grads, state, params, ticket=t))
    params, state = trained_shortly(tx)
    ids, grads = small_batch(20)[0], small_grads(20)
    expected = update(grads, state, params, None)
    for ticket in (
        prepare(params, state, {"table": (ids + 1) % NUM_ROWS}),
        prepare(*trained_shortly(tx, 19), {"table": ids}),
        prepare(params, state, {"table": ids[:2]}),
    ):
        assert_close(update(grads, state, params, ticket), expected, rtol=1e-6)


def half_stopped_loss(params, ids):
    """A loss that reads two sets of rows, of which only one has a gradient."""
    still = jax.lax.stop_gradient(params["table"])[ids + 1]
    return jnp.sum((params["table"][ids] - 0.5 * still - 1.0) ** 2)


@pytest.mark.slow
def test_a_train_step_finds_its_rows_once():
    """`update` reuses the search and the catch-up of `value_and_grad`, which the ticket has."""
    tx, params = exact_rows(adamjax.adam(0.1), "table"), {"table": jnp.ones((NUM_ROWS, 2))}

    def step(params, state, ids):
        (value, grads), ticket = tx.value_and_grad(half_stopped_loss)(params, state, ids)
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state, value

    state = tx.init(params)
    dense = adamjax.adam(0.1)
    plain, plain_state = params, dense.init(params)
    traced = str(jax.make_jaxpr(step)(params, state, jnp.arange(3)))
    assert traced.count("scatter-min") == 1  # a search for distinct indices has one
    assert "while" not in traced  # a catch-up in blocks has a loop
    for t in range(20):
        ids = jnp.array([t % 7, 3, 3])
        params, state, value = jax.jit(step)(params, state, ids)
        expected, grads = jax.value_and_grad(half_stopped_loss)(plain, ids)
        updates, plain_state = dense.update(grads, plain_state, plain)
        plain = adamjax.apply_updates(plain, updates)
        assert_close(value, expected, rtol=1e-5)
    assert_close(tx.flush(params, state)[0], plain, rtol=1e-5)


def test_jit_finds_the_static_arguments_of_a_loss():
    """The signature of `value_and_grad(loss)` is the loss's, with the state after `params`."""
    params = {"table": jnp.linspace(-1.0, 1.0, 20).reshape(10, 2)}
    tx = adamjax.exact_rows(adamjax.adam(0.1), "table")

    def loss(params, ids, power):
        assert isinstance(power, int)
        return jnp.sum(params["table"][ids] ** power)

    args = params, tx.init(params), jnp.array([1, 2])
    gradient = jax.jit(tx.value_and_grad(loss), static_argnames="power")
    (value, _), _ = gradient(*args, 3)
    assert_close(value, loss(params, jnp.array([1, 2]), 3))
    assert_close(gradient(*args, power=3)[0][0], value)


@pytest.mark.slow
def test_a_step_without_rows_moves_rows_as_zero_gradients_do():
    tx, dense = exact_rows(pipeline(), "table"), pipeline()
    params, state = trained_shortly(tx)
    plain = trained_shortly(with_dense_gradients(dense))
    empty = row_gradient(jnp.zeros(0, jnp.int32), jnp.zeros((0, 3)), NUM_ROWS)
    outside = row_gradient(jnp.array([-1, NUM_ROWS]), jnp.ones((2, 3)), NUM_ROWS)
    kernel = jnp.full(2, 0.1)
    for rows in (empty, outside):
        params, state = stepped(tx, params, state, {"kernel": kernel, "table": rows})
        grads = {"kernel": kernel, "table": jnp.zeros((NUM_ROWS, 3))}
        plain = stepped(dense, *plain, grads)
    assert_close(lookup_all(tx, params, state), plain[0]["table"], rtol=2e-6)
    assert int(adamjax.step_count(state)) == 22


# --- states -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_from_the_dense_optimizer_and_back():
    dense = pipeline()
    tx = exact_rows(dense, "table", history=256)
    params, state = trained_shortly(with_dense_gradients(dense))
    plain = params, state
    state = tx.from_dense(state, params)
    assert_same(state.last["table"], jnp.full(NUM_ROWS, 20, jnp.int32))
    assert_same(lookup_all(tx, params, state), params["table"])
    for t in range(20, 320):
        params, state = stepped(tx, params, state, small_grads(t))
        plain = stepped(dense, *plain, to_dense(small_grads(t)))
    params, state = flushed(tx, params, state)
    assert jax.tree.structure(state.inner) == jax.tree.structure(plain[1])
    assert_close((params, state.inner), plain, rtol=2e-6)
    params, state = stepped(dense, params, state.inner, to_dense(small_grads(320)))
    plain = stepped(dense, *plain, to_dense(small_grads(320)))
    assert_close((params, state), plain, rtol=2e-6)


@pytest.mark.parametrize("name", ["adam", "nadam"])
@pytest.mark.slow
def test_the_count_does_not_wrap_near_the_end_of_int32(name):
    """The count stays at the largest int32; the clock wraps around."""
    config = Config(rule=name, form="eps", tail="decay, average")
    dense, max_count = config.chain(LEARNING_RATE), np.iinfo(np.int32).max
    params, state = trained_shortly(with_dense_gradients(dense), steps=5)

    def with_large_count(x):
        return jnp.int32(max_count - 20) if x.dtype == jnp.int32 and x.ndim == 0 else x

    state = jax.tree.map(with_large_count, state)
    with enable_x64():
        wide = as_float64((params, state))
    tx = exact_rows(dense, "table", history=256)
    exact, plain = (params, tx.from_dense(state, params)), (params, state)
    distances = []
    for t in range(400):
        grads = small_grads(t)
        exact = stepped(tx, *exact, grads)
        plain = stepped(dense, *plain, to_dense(grads))
        with enable_x64():
            wide = stepped(dense, *wide, as_float64(to_dense(grads)))
        expected = np.asarray(wide[0]["table"])
        tables = lookup_all(tx, *exact), plain[0]["table"]
        distances.append([np.abs(np.asarray(x, np.float64) - expected) for x in tables])
    assert int(adamjax.step_count(exact[1])) == max_count
    assert int(exact[1].clock) < 0
    distances = np.array(distances)  # [steps, exact or plain, rows, columns]
    of_all_steps, largest = distances.mean((0, 2, 3)), distances.max((0, 2, 3))
    for exact_error, plain_error in (of_all_steps, distances[-1].mean((1, 2)), largest):
        assert exact_error <= 1.2 * plain_error
    state = flushed(tx, *exact)[1].inner
    assert_close(adamjax.get_slot(state, "m"), adamjax.get_slot(plain[1], "m"), rtol=2e-6)


def as_float64(tree):
    """A tree with float64 in place of float32. It needs x64."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64 if x.dtype == jnp.float32 else x.dtype), tree
    )


@pytest.mark.slow
def test_runs_with_three_rates_are_one_program_by_vmap_and_scan():
    """Each run is compared with the dense optimizer of its rate."""
    rates = jnp.array([0.01, 0.02, 0.05])
    steps = [small_grads(t) for t in range(30)]
    steps = jax.tree.map(lambda *xs: jnp.stack(xs), *steps)
    params = small_params()

    def run(rate):
        tx = exact_rows(adamjax.adamw(rate, 0.9, 0.95, weight_decay=0.1), "table", history=256)

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, (params, tx.init(params)), steps)
        return tx.flush(*carry)[0]

    together = jax.jit(jax.vmap(run))(rates)
    for i, rate in enumerate(rates):
        dense = adamjax.adamw(float(rate), 0.9, 0.95, weight_decay=0.1)
        expected, _ = trained_shortly(with_dense_gradients(dense), steps=30)
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), expected, rtol=2e-6)


def test_a_step_compiles_once_for_all_rates_if_the_transform_is_an_argument():
    traced = []

    @jax.jit
    def step(tx, params, state, grads):
        traced.append(1)
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    params = small_params()
    for rate in (0.1, 0.2, 0.3):
        tx = exact_rows(adamjax.adam(rate), "table")
        assert hash(tx) == hash(exact_rows(adamjax.adam(rate), "table"))
        assert tx == exact_rows(adamjax.adam(rate), "table")
        carry = params, tx.init(params)
        for t in range(3):
            carry = step(tx, *carry, small_grads(t))
        expected, _ = trained_shortly(tx, 3)
        assert_close(carry[0], expected, rtol=1e-6)
    assert len(traced) == 1


def test_donated_tables_are_updated_in_place():
    tx = exact_rows(pipeline(), "table")
    step = jax.jit(lambda *args: stepped(tx, *args), donate_argnums=(0, 1))
    params = small_params()
    state = jax.tree.map(jnp.copy, tx.init(params))
    for t in range(3):
        before = params["table"], adamjax.get_slot(state.inner, "m")["table"]
        pointers = [x.unsafe_buffer_pointer() for x in before]
        params, state = step(params, state, small_grads(t))
        assert all(x.is_deleted() for x in before)
        after = params["table"], adamjax.get_slot(state.inner, "m")["table"]
        assert [x.unsafe_buffer_pointer() for x in after] == pointers
    assert_close(lookup_all(tx, params, state), lookup_all(tx, *trained_shortly(tx, 3)), rtol=1e-6)


# --- what is refused ----------------------------------------------------------------------------


class to_the_sign(adamjax.Transform):
    """A transform that is not affine."""

    def init(self, params):
        return ()

    def update(self, grads, state, params=None):
        return jax.tree.map(jnp.sign, grads), state


REFUSED = {
    "a clip after the rule": (
        chain(scale_by_adam(), clip_by_value(1.0), scale_by_learning_rate(0.1)),
        r"clip_by_value\(limit=1.0\).*not affine",
    ),
    "a norm after the rule": (
        chain(scale_by_adam(), clip_by_global_norm(1.0), scale_by_learning_rate(0.1)),
        r"clip_by_global_norm\(max_norm=1.0\).*not affine",
    ),
    "an unknown transform after the rule": (
        chain(scale_by_adam(), to_the_sign()),
        r"to_the_sign\(\).*not affine",
    ),
    "an unknown transform before the rule": (
        chain(to_the_sign(), scale_by_adam()),
        r"to_the_sign\(\).*zero gradients of rows nonzero",
    ),
    "decay before the rule": (
        chain(add_decayed_weights(0.1), scale_by_adam()),
        r"add_decayed_weights\(weight_decay=0.1\).*zero gradients of rows nonzero",
    ),
    "a sum over replicas": (
        chain(adamjax.sum_over("x"), adamjax.adamw()),
        r"sum_over\(axis_name='x'\).*before exact_rows: chain\(sum_over",
    ),
    "two rules": (
        chain(scale_by_adam(), scale_by_adamax()),
        r"scale_by_adamax\(.*second rule",
    ),
    "no rule": (chain(scale_by_learning_rate(0.1)), r"expected one rule"),
    "an average that overwrites the weights": (
        chain(adamjax.adam(), weight_ema(0.9, 10)),
        r"weight_ema\(momentum=0.9, overwrite_frequency=10\).*flush",
    ),
    "micro-batches inside": (
        chain(accumulate_gradients(adamjax.adam(), 2)),
        r"accumulate_gradients\(exact_rows\(",
    ),
    "skipped steps inside": (
        skip_not_finite(adamjax.adam()),
        r"skip_not_finite\(exact_rows\(",
    ),
    "hyperparameters set inside": (
        adamjax.with_hyperparams(adamjax.adam(), learning_rate=0.1),
        r"put it around exact_rows: with_hyperparams\(exact_rows\(",
    ),
    "an array for a beta": (adamjax.adam(b1=jnp.array(0.9)), r"scale_by_adam.*b1 must be a Python"),
    "an array for eps": (adamjax.adam(eps=jnp.array(1e-8)), r"scale_by_adam.*eps must be a Python"),
    "an array for the momentum": (
        chain(adamjax.adam(), weight_ema(jnp.array(0.9))),
        r"weight_ema.*momentum must be a Python",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_transform_that_cannot_be_exact_is_refused_by_name(case):
    tx, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        exact_rows(tx, "table")


def test_a_rate_times_decay_of_1_or_more_is_refused():
    for rate, decay in (
        (0.5, 2.0),
        (adamjax.constant(4.0), by_path([("table", 0.5)], default=0.0)),
    ):
        tx = exact_rows(adamjax.adamw(rate, weight_decay=decay), "table")
        with pytest.raises(ValueError, match=r"'table' by -?[01];.*learning_rate \* weight_decay"):
            tx.init(small_params())
    exact_rows(adamjax.adamw(0.5, weight_decay=2.0, mask="kernel"), "table").init(small_params())


@pytest.mark.slow
def test_a_gradient_of_none_is_refused():
    tx = exact_rows(adamjax.adam(), "table")
    params = small_params()
    with pytest.raises(ValueError, match=r"grads\['table'\] is None.*row_gradient"):
        tx.update({"kernel": jnp.ones(2), "table": None}, tx.init(params), params)
    # The gradient of any other leaf may be None.
    grads = {"kernel": None, "table": small_grads(0)["table"]}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["kernel"] is None


def test_init_needs_a_table_and_lookup_needs_exactly_one():
    tx = exact_rows(adamjax.adam(), "embedding")
    with pytest.raises(ValueError, match=r"\['embedding'\].*'kernel', 'table'"):
        tx.init(small_params())
    params = small_params()
    tx = exact_rows(adamjax.adam(), ["table", "kernel"])
    with pytest.raises(ValueError, match=r"'other' names 0 tables.*'kernel', 'table'"):
        tx.lookup(params, tx.init(params), "other", jnp.arange(2))
    with pytest.raises(ValueError, match=r"names 2 tables"):
        tx.lookup(params, tx.init(params), "e", jnp.arange(2))


def test_an_average_or_slot_of_rows_that_lag_behind_is_refused():
    """Inside `jit` the clocks have no values, so nothing is refused."""
    tx = exact_rows(pipeline(), "table")
    params, state = trained_shortly(tx, steps=2)
    with pytest.raises(
        ValueError, match=r"^averaged_weights: rows of the table 'table' lag behind"
    ):
        adamjax.averaged_weights(state)
    with pytest.raises(ValueError, match=r"lag behind.*flush"):
        adamjax.averaged_weights({"optimizer": state}, params)
    with pytest.raises(ValueError, match=r"^get_slot: rows of the table 'table' lag behind"):
        adamjax.get_slot(state, "m")
    adamjax.get_slot(state.inner, "m")
    jax.jit(adamjax.averaged_weights)(state)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match="lag behind"):
        adamjax.averaged_weights(stacked)
    for up_to_date in (tx.flush(params, state)[1], tx.init(params)):
        adamjax.averaged_weights(up_to_date)
        adamjax.averaged_weights(jax.tree.map(lambda x: jnp.stack([x, x]), up_to_date))


@pytest.mark.slow
def test_lookup_reads_up_to_date_slots_and_averages():
    """Compares them with the slots after a `flush`. An index outside the table reads zeros."""
    tx = exact_rows(pipeline(), "table")
    params, state = trained_shortly(tx)
    _, flushed_state = tx.flush(params, state)
    ids = jnp.array([[3, NUM_ROWS], [0, 3]])
    slots = {
        "average": adamjax.averaged_weights(flushed_state),
        "m": adamjax.get_slot(flushed_state, "m"),
    }
    for slot, whole in slots.items():
        rows = tx.lookup(params, state, "table", ids, slot=slot)
        expected = whole["table"].at[ids].get(mode="fill", fill_value=0)
        assert_close(rows, expected, rtol=1e-6)
    with pytest.raises(KeyError, match=r"no slot 'u'; it has \['average', 'm', 'v'\]"):
        tx.lookup(params, state, "table", ids, slot="u")


@pytest.mark.slow
def test_calls_outside_of_jit_compile_nothing_anew():
    """From the third step on, whatever the values are."""
    tx, compiled = exact_rows(pipeline(), "table"), []

    def step(params, state, t):
        ids, _ = small_batch(t)
        rows, ticket = tx.prepare(params, state, {"table": ids})
        grads = {"kernel": jnp.ones(2), "table": ticket.row_gradient("table", rows["table"])}
        updates, state = tx.update(grads, state, params, ticket=ticket)
        params = apply_updates(params, updates)
        tx.lookup(params, state, "table", ids)
        return tx.flush(params, state)

    params = small_params()
    state = tx.init(params)
    params, state = step(*step(params, state, 0), 1)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    step(params, state, 2)
    assert not compiled
    # The listener does notice a compilation.
    jax.jit(lambda x: x + len(compiled))(1.0)
    assert compiled


def test_stale_tables_cannot_be_read_by_accident():
    tx = exact_rows(adamjax.adam(), "table")
    params = tx.without_tables(small_params())
    assert_same(params["kernel"], jnp.ones(2))
    # An older JAX raises its own error.
    with pytest.raises(TypeError, match=r"'table'"):
        jnp.sum(params["table"])
    jax.jit(lambda params: params["kernel"])(params)


READS = (
    *(operator.neg, operator.pos, operator.invert, abs, round, len, list, bool, float, int),
    *(lambda x: x[0], lambda x: x + 1, lambda x: 1 - x, lambda x: x**2, lambda x: 2 / x),
    *(lambda x: x @ x, lambda x: x % 2, lambda x: x == 0, lambda x: x != x, lambda x: x <= 1),
    *(lambda x: x.shape, lambda x: x.dtype, lambda x: x.at[0], lambda x: x.astype(int)),
    *(lambda x: x.T, lambda x: x.sum(), lambda x: 1 in x, lambda x: np.ones(3) * x),
    *(np.asarray, np.shape, np.sum, lambda x: np.concatenate([x, x]), lambda x: np.add(x, 1)),
    *(jnp.asarray, lambda x: jnp.ones(3) + x, lambda x: hasattr(x, "shape")),
)


@pytest.mark.parametrize("read", READS)
def test_any_use_of_a_stale_table_raises_an_error_that_says_how_to_read_it(read):
    table = exact_rows(adamjax.adam(), "table").without_tables(small_params())["table"]
    with pytest.raises(TypeError, match=r"'table' may lag behind.*prepare.*lookup.*flush"):
        read(table)


def test_stale_tables_survive_copies_pickles_and_tree_maps():
    params = exact_rows(adamjax.adam(), "table").without_tables(small_params())
    copies = copy.copy(params["table"]), copy.deepcopy(params)["table"]
    pickled = pickle.loads(pickle.dumps(params))
    for table in (*copies, pickled["table"]):
        assert repr(table) == f"{table}" == "StaleTable('table')"
        assert isinstance(table, adamjax.states.StaleTable)
        assert {table: 1}[table] == 1
    doubled = jax.tree.map(lambda x: 2 * x, pickled)
    assert jax.tree.structure(doubled) == jax.tree.structure(params)
    assert_same(jax.tree.leaves(doubled), [2 * jnp.ones(2)])


EDITED = {
    "b1": 0.8,
    "b2": np.float32(0.99),
    "eps_hat": jnp.array(1e-6),
    "eps": 1e-8,
    "momentum": jnp.full(2, 0.9),
}


@pytest.mark.parametrize("name", EDITED)
def test_numbers_that_are_edited_in_the_pytree_are_refused(name):
    """Steps would compute with the numbers that `exact_rows` was made with."""
    params = {"table": jnp.ones((4, 1))}
    tx = exact_rows(chain(scale_by_adam(), scale_by_learning_rate(0.1), weight_ema(0.9)), "table")
    state = tx.init(params)
    rule, rate, average = tx.tx.transforms
    edited = copy.copy(average if name == "momentum" else rule)
    edited.set_fields(**{name: EDITED[name]})
    parts = (rule, rate, edited) if name == "momentum" else (edited, rate, average)
    tx = tx.with_parts([tx.tx.with_parts(parts)])
    message = rf"{type(edited).__name__} has {name}=.*, expected .*Make a new exact_rows"
    for use in (
        lambda: tx.init(params),
        lambda: tx.from_dense(state.inner, params),
        lambda: tx.bind(state, params),
        lambda: tx.without_tables(params),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_numbers_that_are_cast_to_float32_or_traced_do_not_count_as_edited():
    """`device_put` makes float32 arrays of them. Steps still use the Python floats."""
    params = {"table": jnp.ones((4, 1))}
    tx = exact_rows(adamjax.adam(0.1), "table")
    cast = [jax.device_put(tx), jax.tree.map(np.asarray, tx)]
    for made in cast:
        assert_same(made.init(params), tx.init(params))
    # In bfloat16 they are other numbers.
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tx)
    with pytest.raises(ValueError, match=r"has b1=.*expected 0\.9"):
        narrow.init(params)
    stacked = jax.tree.map(lambda x: jnp.array([x, x]), tx)
    assert jax.vmap(lambda tx: tx.init(params).clock)(stacked).shape == (2,)


@pytest.mark.parametrize("is_dense", [False, True], ids=["rows", "dense"])
def test_traced_numbers_that_are_edited_make_nan(is_dense):
    """If `exact_rows` is an argument of `jit`, only the compiled step can compare its numbers."""
    params = {"table": jnp.ones((4, 1))}
    tx = exact_rows(adamjax.adam(0.1), "table")

    @jax.jit
    def step(tx, params, state, row):
        rows = row_gradient(row, jnp.ones((1, 1)), 4)
        grads = {"table": rows.to_dense() if is_dense else rows}
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    params, state = step(tx, params, tx.init(params), jnp.array([2]))
    static_step = jax.jit(functools.partial(step, tx))
    assert_same(step(tx, params, state, jnp.array([0])), static_step(params, state, jnp.array([0])))
    narrow = jnp.bfloat16(0.9)
    for number, other in ((0.9, 0.8), (0.9, narrow), (0.999, 0.99), (1e-7, 1e-8)):
        edited = jax.tree.map(lambda x, n=number, o=other: o if x == n else x, tx)
        after, later_state = step(edited, params, state, jnp.array([0]))
        assert np.isnan(after["table"][0]).all()
        # Row 2 moves in every step, and lags behind if it has no gradient.
        assert np.isnan(tx.flush(after, later_state)[0]["table"][2]).all()


# --- states, tickets and parameters that do not fit -----------------------------------------------

# By the difference: a transform that refuses the state of exact_rows(adam(0.1), "table"), and the
# error. For "less history", exact_rows(adam(0.1), "table") refuses the transform's state.
OTHER_TRANSFORMS = {
    "less history": (lambda: exact_rows(adamjax.adam(0.1), "table", history=512), "history=512"),
    "b1": (lambda: exact_rows(adamjax.adam(0.1, 0.8), "table"), r"b1=0.9,.*expected .*b1=0.8,"),
    "b2": (lambda: exact_rows(adamjax.adam(0.1, b2=0.99), "table"), "shrink=0.9949"),
    "epsilon": (lambda: exact_rows(adamjax.adam(0.1, eps_hat=1e-3), "table"), "eps=0.001"),
    "form of epsilon": (lambda: exact_rows(adamjax.adam(0.1, eps=1e-7), "table"), "b2=0.999"),
    "decay": (lambda: exact_rows(adamjax.adamw(0.1), "table"), r"3 parts|has no|decay"),
    "rule": (lambda: exact_rows(adamjax.amsgrad(0.1), "table"), "shrink=1.0"),
}


METHODS = {
    "update": lambda tx, params, state: tx.update(small_grads(0), state, params),
    "flush": lambda tx, params, state: tx.flush(params, state),
    "lookup": lambda tx, params, state: tx.lookup(params, state, "table", jnp.arange(2)),
    "prepare": lambda tx, params, state: tx.prepare(params, state, {"table": jnp.arange(2)}),
    "value_and_grad": lambda tx, params, state: tx.value_and_grad(half_stopped_loss)(
        params, state, jnp.arange(2)
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("difference", OTHER_TRANSFORMS)
def test_a_state_of_another_transform_is_refused(difference, method):
    """Rows that lag behind would catch up wrongly. The error says how to change the transform."""
    make, message = OTHER_TRANSFORMS[difference]
    tx, params = exact_rows(adamjax.adam(0.1), "table"), small_params()
    state, other = tx.init(params), make()
    if difference == "less history":
        tx, other = other, tx
        state = tx.init(params)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        METHODS[method](other, params, state)
    assert "from_dense(state.inner, params)" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_whose_average_is_under_another_mask_is_refused(method):
    """Also if the rings fit, and only the state inside is of the other transform."""
    with_average, without = (
        exact_rows(chain(adamjax.adam(0.1), adamjax.masked(weight_ema(0.9), pattern)), "table")
        for pattern in ("table", "kernel")
    )
    params = small_params()
    averaged, plain = with_average.init(params), without.init(params)
    for tx, state, message in (
        (without, averaged, r"momentum=0.9.*from_dense"),
        (without, plain._replace(inner=averaged.inner), r"the slots \['m', 'v', 'average'\]"),
        (with_average, plain, r"expected .*momentum=0.9.*from_dense"),
        (with_average, averaged._replace(inner=plain.inner), r"average\['table'\] is None"),
    ):
        with pytest.raises(ValueError, match=f"exact_rows: .*{message}"):
            METHODS[method](tx, params, state)


CLASSLESS = {
    "clocks in a list": lambda s: s._replace(last=list(s.last.values())),
    "turns in a list": lambda s: s._replace(turns=list(s.turns.values())),
    "a ring as a dictionary": lambda s: s._replace(
        rings={name: ring._asdict() for name, ring in s.rings.items()}
    ),
    "a ring as a tuple": lambda s: s._replace(
        rings={name: tuple(ring) for name, ring in s.rings.items()}
    ),
}


@pytest.mark.parametrize("method", ["update", "flush"])
@pytest.mark.parametrize("change", CLASSLESS)
def test_a_state_that_lost_some_of_its_classes_is_refused(change, method):
    tx, params = exact_rows(adamjax.adam(0.1), "table"), small_params()
    state = CLASSLESS[change](tx.init(params))
    with pytest.raises(
        TypeError, match=r"exact_rows: .* expected a .*restored without its classes"
    ):
        METHODS[method](tx, params, state)


@pytest.mark.parametrize("history", [0, -1, 2**31, 2**40])
def test_a_history_below_1_or_above_the_limit_is_refused(history):
    with pytest.raises(ValueError, match=rf"history must be at least 1 and .* got {history}$"):
        exact_rows(adamjax.adam(0.1), "table", history=history)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_a_state_that_is_refused_without_x64_is_accepted_with_it():
    tx = exact_rows(adamjax.adam(0.1), "table")
    with enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), small_params())
        state = tx.init(params)
    with pytest.raises(ValueError, match="exact_rows: "):
        tx.update(params, state, params)
    with enable_x64(True):
        updates, _ = tx.update(params, state, params)
        assert updates["table"].dtype == jnp.float64


def test_a_state_for_tables_of_another_dtype_is_refused():
    tx, params = exact_rows(adamjax.adam(0.1), "table"), small_params()
    state = tx.init(params)
    with enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        with pytest.raises(ValueError, match="for tables in float32, now they are in float64"):
            tx.flush(wide, state)


def test_another_b2_of_amsgrad_is_refused():
    """Weights of AMSGrad catch up without b2, but v decays by b2 while rows lag behind."""
    tx, other = (exact_rows(adamjax.amsgrad(0.1, b2=b2), "table") for b2 in (0.5, 0.999))
    params = small_params()
    with pytest.raises(ValueError, match=r"v=0.5,.*expected .*v=0.999,.*from_dense"):
        other.flush(params, tx.init(params))


# By a part of the error: a change of the rule's state.
CASTS = {
    "m": lambda adam: adam._replace(m=narrowed(adam.m)),
    "v": lambda adam: adam._replace(v=narrowed(adam.v)),
    "int16": lambda adam: adam._replace(count=adam.count.astype(jnp.int16)),
    "int8": lambda adam: adam._replace(count=adam.count.astype(jnp.int8)),
    "0 of type int": lambda adam: adam._replace(count=0),
}


def narrowed(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cast", CASTS)
def test_a_state_that_was_cast_is_refused_by_every_method(cast, method):
    tx, params = exact_rows(adamjax.adam(0.1), "table"), small_params()
    state = tx.init(params)
    adam, *rest = state.inner
    state = state._replace(inner=(CASTS[cast](adam), *rest))
    with pytest.raises(ValueError, match=rf"scale_by_adam: the state.*{cast}.*expected .*32"):
        METHODS[method](tx, params, state)


def test_an_average_counts_and_a_clock_that_were_cast_are_refused():
    tx, params = exact_rows(chain(adamjax.adam(0.1), weight_ema(0.9)), "table"), small_params()
    state = tx.init(params)
    adam, rate, ema = state.inner
    for inner, clock, message in (
        ((adam, rate, ema._replace(average=narrowed(ema.average))), 0, "keeps average in bfloat16"),
        ((adam, rate._replace(count=jnp.int8(0)), ema), 0, r"scale_by_learning_rate.*int8\[\]"),
        ((adam, rate, ema._replace(count=jnp.int8(0))), 0, r"weight_ema.*count is int8\[\]"),
        (state.inner, jnp.int16(0), r"clock is int16\[\], expected int32\[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.flush(params, state._replace(inner=inner, clock=jnp.asarray(clock)))


def test_moments_may_have_the_narrow_dtype_of_their_rule():
    params = small_params()
    tx = exact_rows(adamjax.adam(0.1, m_dtype="bfloat16"), "table")
    assert_same(tx.lookup(params, tx.init(params), "table", jnp.arange(3)), params["table"][:3])


@pytest.mark.parametrize("ticket", [{}, {"table": jnp.arange(2)}, (1,), 3, "table"])
def test_a_ticket_of_another_type_is_refused(ticket):
    tx, params = exact_rows(adamjax.adam(0.1), "table"), small_params()
    with pytest.raises(TypeError, match=r"ticket is .*expected a Ticket, which prepare"):
        tx.update(small_grads(0), tx.init(params), params, ticket=ticket)


def test_a_state_for_another_momentum_of_the_average_is_refused():
    made = [exact_rows(chain(adamjax.adam(0.1), weight_ema(b)), "table") for b in (0.9, 0.99)]
    params = small_params()
    with pytest.raises(ValueError, match=r"momentum=0.9,.*expected .*momentum=0.99,"):
        made[1].flush(params, made[0].init(params))


@pytest.mark.slow
def test_betas_can_change_after_a_flush():
    """The dense optimizer takes the same steps, with the old betas and then with the new ones."""
    old, new = adamjax.adam(0.05, 0.9, 0.95), adamjax.adam(0.05, 0.8, 0.99)
    exact = [exact_rows(tx, "table", history=512) for tx in (old, new)]
    params, state = trained_shortly(exact[0], 10)
    plain, plain_state = trained_shortly(with_dense_gradients(old), 10)
    params, state = exact[0].flush(params, state)
    state = exact[1].from_dense(state.inner, params)
    for t in range(10, 20):
        params, state = stepped(exact[1], params, state, small_grads(t))
        plain, plain_state = stepped(with_dense_gradients(new), plain, plain_state, small_grads(t))
    assert_close(lookup_all(exact[1], params, state), plain["table"], rtol=2e-6)


def test_a_table_of_another_size_is_refused():
    tx = exact_rows(adamjax.adam(0.1), "table")
    state = tx.init(small_params())
    for rows in (NUM_ROWS + 2, NUM_ROWS - 1):
        params = small_params(rows)
        with pytest.raises(ValueError, match=rf"last\['table'\] is int32\[40\].*int32\[{rows}\]"):
            tx.update(small_grads(0, rows), state, params)
    with pytest.raises(ValueError, match=r"m\['table'\] is float32\[40, 3\].*\[40, 2\]"):
        tx.lookup(small_params(columns=2), state, "table", jnp.arange(2))


def test_from_dense_refuses_states_of_other_transforms_and_tables():
    tx, params = exact_rows(adamjax.adam(0.1), "table"), small_params()
    for state, message in (
        (adamjax.nadam(0.1).init(params), r"momentum_product'\] is float32\[\], expected None"),
        (adamjax.amsgrad(0.1).init(params), "has no '0/momentum_product'"),
        (adamjax.adam(0.1).init(small_params(5)), r"m/table'\] is float32\[5, 3\]"),
        (tx.init(params), "has no '0/count'"),
    ):
        with pytest.raises(ValueError, match=rf"exact_rows.from_dense: inner.*{message}"):
            tx.from_dense(state, params)


def read_and_step(tx, params, state, change):
    """The updates of a step whose state and params change between the read and `update`.

    Args:
      change: `(state, params) -> (state, params)`.

    Returns:
      The updates with the ticket of the read, and those without a ticket.
    """
    ids = jnp.array([3, 5, 5])
    (_, grads), ticket = tx.value_and_grad(half_stopped_loss)(params, state, ids)
    grads["kernel"] = jnp.zeros(2)
    updates, _ = tx.update(grads, *change(state, params), ticket=ticket)
    expected, _ = tx.update(grads, *change(state, params))
    return updates, expected


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.slow
def test_a_ticket_of_other_arrays_is_ignored(jit):
    """After a flush, with perturbed parameters (as in SAM), and with another state."""
    tx = exact_rows(pipeline(), "table")
    params, state = trained_shortly(tx)

    def flush(state, params):
        return tx.flush(params, state)[::-1]

    def perturbed(state, params):
        return state, jax.tree.map(lambda p: p + 0.1, params)

    def other(state, params):
        inner = jax.tree.map(lambda x: 0.5 * x if x.ndim == 2 else x, state.inner)
        return state._replace(inner=inner), params

    for change in (flush, perturbed, other):
        run = functools.partial(read_and_step, change=change)
        run = jax.jit(run) if jit else run
        assert_same(*run(tx, params, state))


def test_a_ticket_of_the_same_arrays_is_used():
    tx = exact_rows(pipeline(), "table")
    params, state = trained_shortly(tx)
    ids = jnp.array([3, 5, 5])
    (_, grads), ticket = tx.value_and_grad(half_stopped_loss)(params, state, ids)
    grads["kernel"] = jnp.zeros(2)
    ready = ticket.rows["table"]
    # Its rows have moved on by 10, which the updates show.
    forged = ticket.replace(rows={"table": ready._replace(moved=ready.moved + 10)})
    step = functools.partial(tx.update, grads, state, params)
    assert_same(step(ticket=ticket), step())
    assert np.all(np.asarray(step(ticket=forged)[0]["table"].parts[0].values) > 5)


@pytest.mark.slow
def test_tables_of_a_state_may_be_in_another_order():
    """JAX sorts the paths of tables in a state that went through `jit`: '10' before '2'."""
    params = [jnp.ones((9, 2)) for _ in range(11)]
    tx = exact_rows(adamjax.adam(0.1), "")
    step = adamjax.train_step(lambda p, ids: sum(t[ids].sum() for t in p), tx)
    state = tx.init(params)
    for _ in range(2):
        params, state, _ = step(params, state, jnp.array([1]))
    assert int(adamjax.step_count(state)) == 2


@pytest.mark.slow
def test_numpy_arrays_give_the_same_results_as_jax_arrays():
    """Parameters, state and gradients may be NumPy arrays, as from a checkpoint."""
    tx = exact_rows(pipeline(), "table")
    params, state = trained_shortly(tx)
    ids, grads = jnp.array([3, 5, 5]), small_grads(20)

    def results(params, state, grads, ids):
        return (
            tx.lookup(params, state, "table", ids),
            tx.prepare(params, state, {"table": ids})[0],
            tx.flush(params, state),
            tx.value_and_grad(half_stopped_loss)(params, state, ids)[0],
            tx.update(grads, state, params),
            tx.from_dense(state.inner, params),
        )

    args = params, state, grads, ids
    assert_same(results(*jax.device_get(args)), results(*args))


def test_two_leaves_with_one_path_are_refused():
    params = {"a/b": jnp.ones((3, 2)), "a": {"b": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match=r"exact_rows: two leaves have the path 'a/b'.*rename"):
        exact_rows(adamjax.adam(), "a").init(params)


def test_every_pattern_that_is_not_optional_must_match():
    params = small_params()
    with pytest.raises(ValueError, match=r"'tabel' matches no leaf.*'kernel', 'table'.*optional"):
        exact_rows(adamjax.adam(), ["table", "tabel"]).init(params)
    tx = exact_rows(adamjax.adam(), ["table", adamjax.optional("tabel")])
    assert list(tx.init(params).last) == ["table"]
    tx = exact_rows(adamjax.adam(0.1), adamjax.optional("tabel"))
    state = tx.init(params)
    grads = to_dense(small_grads(0))
    expected, _ = adamjax.adam(0.1).update(grads, state.inner, params)
    assert_same(tx.update(grads, state, params)[0], expected)


# --- tables of which nothing is read --------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 2), (5, 0), (0, 3), (0, 0), (4,)], ids=str)
@pytest.mark.parametrize("batch", [3, 0])
@pytest.mark.slow
def test_a_table_that_is_not_read_moves_as_under_the_dense_optimizer(shape, batch):
    """It gets an empty row gradient, in place of a dense gradient of zero."""
    tx = exact_rows(adamjax.adamw(0.1), ["here", "there"])
    params = {"here": jnp.ones((6, 2)), "there": jnp.ones(shape)}
    step = adamjax.train_step(lambda p, ids: jnp.sum(p["here"][ids] ** 2), tx, donate_argnums=())
    state, plain = tx.init(params), params
    dense = tx.tx.init(params)
    for t in range(3):
        ids = (jnp.arange(batch) + t) % 6
        grads = jax.grad(lambda p, ids=ids: jnp.sum(p["here"][ids] ** 2))(plain)
        params, state, _ = step(params, state, ids)
        updates, dense = tx.tx.update(grads, dense, plain)
        plain = apply_updates(plain, updates)
    assert_close(tx.flush(params, state)[0], plain, rtol=1e-6)
    for ids in (jnp.array([0, -1, 7]), jnp.zeros((2, 0), jnp.int32)):
        rows = tx.lookup(params, state, "there", ids)
        assert rows.shape == (*ids.shape, *shape[1:])
        assert_same(tx.prepare(params, state, {"there": ids})[0]["there"], rows)


# --- reads with an index out of bounds ------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"mode": "clip"}, {"mode": "fill", "fill_value": 0.5}], ids=str
)
@pytest.mark.parametrize("trailing", [(), (1,), (1, 2)], ids=str)
@pytest.mark.slow
def test_reads_out_of_bounds_train_the_rows_that_jax_trains(options, trailing):
    """By default, JAX moves a read into the table, but drops its gradient.

    It does so if any component of an index vector is out of bounds.
    """
    ids, columns = jnp.array([1, 0, 7, -9, 3, 4]), jnp.array([0, 1, 0, 0, 0, -2])

    def loss(p, ids):
        t = p["table"]
        rows = t.at[ids].get(**options) if t.ndim == 1 else t.at[ids, columns].get(**options)
        return jnp.sum((rows - 0.25) ** 2)

    tx = exact_rows(adamjax.adamw(0.1), "table")
    plain = params = {"table": jnp.ones((6, *trailing))}
    state, dense = tx.init(params), tx.tx.init(params)
    step = adamjax.train_step(loss, tx, donate_argnums=())
    for t in range(3):
        value, grads = jax.value_and_grad(loss)(plain, ids - t)
        params, state, actual = step(params, state, ids - t)
        assert_close(actual, value, rtol=1e-6)
        updates, dense = tx.tx.update(grads, dense, plain)
        plain = apply_updates(plain, updates)
    assert_close(tx.flush(params, state)[0], plain, rtol=1e-6)


# --- norms that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("clip", [clip_by_global_norm(1.0), adamjax.clip_by_norm(1.0)], ids=repr)
@pytest.mark.slow
def test_a_norm_that_is_not_finite_spoils_the_rows_of_the_gradient_alone(clip):
    """The rows that the step refreshes stay finite; with a short history there are many."""
    tx = exact_rows(chain(clip, adamjax.adam(0.05, 0.5, 0.9)), "table", history=64)
    rows = 500
    for steps in (1, 2, 5):
        params = small_params(rows)
        state, plain = tx.init(params), params
        plain_state = tx.tx.init(params)
        for t in range(steps):
            grads = small_grads(t, rows)
            params, state = stepped(tx, params, state, grads)
            plain, plain_state = stepped(tx.tx, plain, plain_state, to_dense(grads))
        bad = row_gradient(jnp.array([3, 400]), jnp.full((2, 3), jnp.nan), rows)
        bad = {"kernel": jnp.zeros(2), "table": bad}
        params, state = stepped(tx, params, state, bad)
        zero = {"kernel": jnp.zeros(2), "table": jnp.zeros((rows, 3))}
        plain, _ = stepped(tx.tx, plain, plain_state, zero)
        for read in (lookup_all(tx, params, state), tx.flush(params, state)[0]["table"]):
            spoilt = np.isnan(read).any(axis=1)
            assert list(np.flatnonzero(spoilt)) == [3, 400]
            assert_close(read[~spoilt], plain["table"][~spoilt], rtol=2e-6)


def of_many_rows(tree):
    """A mask function that depends on the shape of each leaf."""
    return jax.tree.map(lambda x: x.shape[0] > 10, tree)


@pytest.mark.parametrize(
    "make",
    [
        lambda: adamjax.adamw(0.1, weight_decay=0.5, mask=of_many_rows),
        lambda: adamjax.partition(
            [("table", adamjax.adamw(0.1, weight_decay=0.5, mask=of_many_rows))],
            default=adamjax.adam(0.1),
        ),
        lambda: chain(
            adamjax.masked(clip_by_value(1e-3), of_many_rows), adamjax.adam(0.1, eps=1.0)
        ),
    ],
    ids=["decay", "in a partition", "masked"],
)
def test_masks_that_are_functions_see_the_whole_table(make):
    """The inner chain sees only the 7 rows of a step; for these the mask would be false."""
    dense = make()
    params, state = trained_shortly(exact_rows(dense, "table"), 6)
    expected, _ = trained_shortly(with_dense_gradients(dense), 6)
    assert_close(
        lookup_all(exact_rows(dense, "table"), params, state), expected["table"], rtol=2e-6
    )


# --- with other transforms ----------------------------------------------------------------------


def test_a_table_with_an_optimizer_of_its_own_follows_the_dense_optimizer():
    """In a partition, the table has Adamax and the kernel has Adam."""
    dense = adamjax.partition(
        [("table", adamjax.adamax(0.02, rows="dense"))], default=adamjax.adam(0.02)
    )
    tx = exact_rows(dense, "table")
    params, state = trained_shortly(tx)
    expected, _ = trained_shortly(with_dense_gradients(dense))
    assert_close(flushed(tx, params, state)[0], expected, rtol=2e-6)


@pytest.mark.slow
def test_a_skipped_step_changes_neither_weights_nor_state():
    tx = skip_not_finite(exact_rows(pipeline(), "table"))
    inner = tx.tx
    params, state = trained_shortly(tx, 5)
    grads = small_grads(5)
    bad = {**grads, "kernel": jnp.array([jnp.nan, 1.0])}
    still = stepped(tx, params, state, bad)
    assert_same(still[0], params)
    assert_same(still[1].inner, state.inner)
    expected = stepped(inner, params, state.inner, grads)
    assert_close(stepped(tx, params, state, grads)[0], expected[0], rtol=1e-6)


@pytest.mark.slow
def test_accumulated_gradients_give_the_dense_result():
    tx = accumulate_gradients(exact_rows(adamjax.adam(0.02), "table"), 2)
    dense = accumulate_gradients(adamjax.adam(0.02), 2)
    params, state = trained_shortly(tx, 21)
    expected, _ = trained_shortly(with_dense_gradients(dense), 21)
    inner = tx.tx
    assert_close(flushed(inner, params, state.inner)[0], expected, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_tables_are_nearer_to_float32_than_under_the_dense_optimizer(dtype):
    """A row is rounded only when it is written, so less often than by the dense optimizer."""
    dense = adamjax.adam(1e-3)
    tx = exact_rows(dense, "table")
    wide = {"table": small_params()["table"]}
    narrow = {"table": wide["table"].astype(dtype)}
    wide = {"table": narrow["table"].astype(jnp.float32)}
    runs = {"exact": (tx, narrow), "dense": (dense, narrow), "wide": (dense, wide)}
    carries = {name: (params, opt.init(params)) for name, (opt, params) in runs.items()}
    for t in range(100):
        rows = small_grads(t)["table"]
        full = rows.to_dense()
        for name, g in (("exact", rows), ("dense", full), ("wide", full)):
            opt = runs[name][0]
            g = g.astype(carries[name][0]["table"].dtype)
            carries[name] = stepped(opt, *carries[name], {"table": g})
    read = lookup_all(tx, *carries["exact"])
    assert read.dtype == dtype

    def error(x):
        return np.abs(np.asarray(x, np.float32) - np.asarray(carries["wide"][0]["table"])).mean()

    assert error(read) < error(carries["dense"][0]["table"])


@pytest.mark.slow
def test_float64_tables_follow_the_dense_optimizer():
    with enable_x64():
        params = as_float64(small_params())
        dense = pipeline()
        with pytest.raises(ValueError, match=r"at least 512: .* in float64"):
            exact_rows(dense, "table", history=256).init(params)
        tx = exact_rows(dense, "table", history=512)
        exact, plain = (params, tx.init(params)), (params, dense.init(params))
        for t in range(300):
            grads = as_float64(small_grads(t))
            exact = stepped(tx, *exact, grads)
            plain = stepped(dense, *plain, to_dense(grads))
        assert lookup_all(tx, *exact).dtype == jnp.float64
        assert_close(lookup_all(tx, *exact), plain[0]["table"], rtol=1e-13)


@extend.transform_state("top", rule=False)
class RunningMaxState(NamedTuple):
    top: Any


class running_max(adamjax.Transform):
    """A transform with `keeps_zero` and a slot. Its `update` is never called."""

    keeps_zero = True

    def init(self, params):
        return RunningMaxState(extend.new_slots(params, jnp.zeros_like))

    def update(self, updates, state, params=None, **extra_args):
        return updates, state


def test_a_slot_before_the_rule_is_refused():
    tx = chain(running_max(), adamjax.adam(0.1))
    params = {"table": jnp.ones((9, 2)), "w": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"before the rule of 'table' has the slots \['top'\]"):
        exact_rows(tx, "table").init(params)
    # Masked from the table, it is accepted.
    masked = chain(adamjax.masked(running_max(), "w"), adamjax.adam(0.1))
    exact_rows(masked, "table").init(params)


def test_an_error_says_how_to_go_on_with_the_state_of_a_wrapper_or_of_the_inner_transform():
    adam = adamjax.adam(0.1)
    tx = adamjax.exact_rows(adam, "table")
    params = {"table": jnp.ones((4, 2))}
    wrapped = adamjax.skip_not_finite(tx)
    with pytest.raises(TypeError, match=r"SkipNotFiniteState.*continue with state\.inner"):
        tx.flush(params, wrapped.init(params))
    tx.flush(params, wrapped.init(params).inner)
    with pytest.raises(TypeError, match=r"inside, continue with from_dense\(state, params\)"):
        tx.update(params, adam.init(params), params)
    tx.update(params, tx.from_dense(adam.init(params), params), params)
    with pytest.raises(TypeError, match=r"inside, continue with tx\.init\(params\)\._replace"):
        wrapped.update(params, tx.init(params), params)
