"""Whole models with large tables: row gradients train them as dense ones do, and at what cost."""

import functools
import gc
import json
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import benchmarks as run_benchmarks

import adamjax
from adamjax.paths import leaf_paths
from benchmarks import models, networks, tables

STEPS = 50

RATE = 0.01
MODELS = {
    "DLRM": networks.DLRM((3000, 2000, 1000, 1000, 500, 500, 500, 500), width=16, examples=128),
    "two towers": networks.TwoTower(3000, 2000, width=32, examples=128),
    "transformer": networks.Transformer(tokens=50_000, length=32, examples=2),
    "clicks": networks.Clicks(6, rows=200, examples=256),
}
# The norms of the two towers' gradients are 0.8 and more.
CLIPPED = adamjax.chain(adamjax.clip_by_global_norm(0.1), adamjax.adamw(RATE))
OPTIMIZERS = {
    "DLRM": adamjax.adamw(RATE),
    "two towers": CLIPPED,
    "transformer": adamjax.adamw(RATE),
    "clicks": adamjax.adamw(RATE),
}

# How far rounding alone takes a dense run in 50 steps. Against the same run in float64 the losses
# are off by 2e-7 to 6e-7 of their values, and the root mean square over a leaf's elements is 4e-6
# at most; with the examples of each batch in another order it is 1e-7 to 6e-7, and 2e-6. An element
# alone can be off by a tenth of a step (1e-3), where its gradient is hardly more than rounding,
# which Adam scales up. The losses of rows="lazy" are off by 9e-3 and more, its parameters by 9e-3.
LOSS, ROOT_MEAN_SQUARE, ELEMENT = 2e-6, 2e-5, 5e-3

QUICKLY = {"xla_backend_optimization_level": 0}


def dense(model, tx):
    gradient = jax.value_and_grad(model.loss)

    def step(params, state, batch):
        value, grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state, value

    return tx.init, step, lambda params, state: params


def by_rows(model, tx):
    """The step of any transform that takes row gradients, all tables' being such."""
    gradient = adamjax.value_and_grad(model.loss, model.tables, strict=True)

    def step(params, state, batch):
        value, grads = gradient(params, batch)
        for path, g in zip(leaf_paths(grads), adamjax.paths.flatten(grads)[0], strict=True):
            assert isinstance(g, adamjax.RowGradient) == bool(
                re.search("|".join(model.tables), path)
            ), path
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state, value

    return tx.init, step, lambda params, state: params


def exact(model, tx):
    tx = adamjax.exact_rows(tx, model.tables)
    gradient = tx.value_and_grad(model.loss, strict=True)

    def step(params, state, batch):
        (value, grads), ticket = gradient(params, state, batch)
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state, value

    return tx.init, step, lambda params, state: jax.jit(tx.flush)(params, state)[0]


@functools.cache
def start(name):
    """The parameters of a model, as NumPy arrays. (The other generator takes long to compile.)"""
    params = jax.jit(MODELS[name].init)(jax.random.key(0, impl="rbg"))
    return jax.tree.map(np.asarray, params)


def trained(name, run, tx):
    """The losses of all steps, and the parameters behind them."""
    model = MODELS[name]
    init, step, done = run(model, tx)
    params = jax.tree.map(jnp.array, start(name))
    state, losses = init(params), []
    # The small models are compiled fast, the large one to run fast.
    quickly = None if name == "transformer" else QUICKLY
    step = jax.jit(step, donate_argnums=(0, 1), compiler_options=quickly)
    for i in range(STEPS):
        params, state, value = step(params, state, model.batch(i))
        losses.append(value)
    return np.array(losses, np.float64), jax.tree.map(np.asarray, done(params, state))


@functools.cache
def expected(name):
    return trained(name, dense, OPTIMIZERS[name])


@pytest.mark.parametrize("run", [exact, by_rows], ids=["exact", "dense rows"])
@pytest.mark.parametrize("name", MODELS)
def test_row_gradients_train_as_dense_ones_do(name, run):
    losses, params = trained(name, run, OPTIMIZERS[name])
    curve, dense_params = expected(name)
    assert curve[-5:].mean() < 0.8 * curve[:5].mean()
    np.testing.assert_allclose(losses, curve, rtol=LOSS)
    ends = zip(leaf_paths(params), *map(jax.tree.leaves, (params, dense_params)), strict=True)
    for path, x, y in ends:
        off = x.astype(np.float64) - y
        assert math.sqrt(np.mean(off**2)) < ROOT_MEAN_SQUARE, path
        assert np.abs(off).max() < ELEMENT, path


def test_lazy_rows_are_another_optimizer():
    """What the bounds on the losses above tell apart."""
    curve, _ = expected("two towers")
    clip, *_ = CLIPPED.parts
    lazy = adamjax.chain(clip, adamjax.adamw(RATE, rows="lazy"))
    losses, _ = trained("two towers", by_rows, lazy)
    assert np.abs(losses / curve - 1).max() > 100 * LOSS


# --- in place -------------------------------------------------------------------------------------

NUM_ROWS, WIDTH, READS = 1_000_000, 64, 8192
TABLE = NUM_ROWS * WIDTH

# What an array of the table's size may be: one that comes in, or goes on to where it is written.
IN_PLACE = {
    "bitcast",
    "call",
    "conditional",
    "dynamic-update-slice",
    "fusion",
    "get-tuple-element",
    "parameter",
    "scatter",
    "while",
}
WRITES = {"scatter", "dynamic-update-slice"}


def head(params, batch):
    rows = params["embedding"][batch["ids"]]
    return jnp.mean((rows @ params["head"] - batch["y"]) ** 2)


def narrow_head(params, batch):
    """In bfloat16, the table cast as a whole."""
    rows = params["embedding"].astype(jnp.bfloat16)[batch["ids"]]
    y = rows @ params["head"].astype(jnp.bfloat16)
    return jnp.mean((y.astype(jnp.float32) - batch["y"]) ** 2)


LOSSES = {"float32": head, "bfloat16": narrow_head}


# Bytes of temporaries. 8,192 rows are 2 MB; with decay the rows' own values are among them. Where
# reads and gradients are written by hand, with `prepare`, the exact steps need 1.3 MB less of the
# first and 0.03 MB less of the second.
RULES = {"adam": (adamjax.adam, 20e6), "adamw": (adamjax.adamw, 24e6)}


def compiled_step(mode, loss, rule):
    """The whole donated train step, and the bytes of parameters and state; nothing is allocated."""
    tx = rule(1e-3, rows="lazy" if mode == "lazy" else "dense")

    if mode == "exact":
        tx = adamjax.exact_rows(tx, "embedding")
        gradient = tx.value_and_grad(loss)
    elif mode == "lazy":
        by_rows = adamjax.value_and_grad(loss, "embedding")
    else:
        by_rows = jax.value_and_grad(loss)

    def step(params, state, batch):
        if mode == "exact":
            (value, grads), ticket = gradient(params, state, batch)
            updates, state = tx.update(grads, state, params, ticket=ticket)
        else:
            value, grads = by_rows(params, batch)
            updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state, value

    shape = jax.ShapeDtypeStruct
    params = {
        "embedding": shape((NUM_ROWS, WIDTH), jnp.float32),
        "head": shape((WIDTH,), jnp.float32),
    }
    state = jax.eval_shape(tx.init, params)
    batch = {"ids": shape((READS,), jnp.int32), "y": shape((READS,), jnp.float32)}
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    return compiled, held


def large(text):
    """The operations of an optimized HLO, in all its computations, whose result is large.

    Large is an eighth of the table, in any shape and dtype: a row's int32 is a 64th.
    """
    found = re.findall(r"^\s+(?:ROOT )?%?\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", text, re.MULTILINE)
    assert found
    return [op for shape, op in found if math.prod(map(int, shape.split(","))) >= TABLE / 8]


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="an older XLA copies more")
@pytest.mark.parametrize("mode", ["exact", "lazy"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rule", RULES)
def test_a_whole_step_holds_nothing_as_large_as_the_table(rule, loss, mode):
    """But the table and its two moments, each written once, in place."""
    function, most = RULES[rule]
    compiled, held = compiled_step(mode, LOSSES[loss], function)
    memory, operations = compiled.memory_analysis(), large(compiled.as_text())
    assert set(operations) <= IN_PLACE
    assert sum(op in WRITES for op in operations) == 3
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < most


def test_a_dense_step_holds_more():
    """What the test above tells apart."""
    compiled, _ = compiled_step("dense", head, adamjax.adam)
    assert set(large(compiled.as_text())) - IN_PLACE
    assert compiled.memory_analysis().temp_size_in_bytes > 4 * TABLE


EVALUATED = {
    "float32": lambda p, ids: p["embedding"][ids] @ p["head"],
    "bfloat16": lambda p, ids: (
        p["embedding"].astype(jnp.bfloat16)[ids] @ p["head"].astype(jnp.bfloat16)
    ),
}


def compiled_evaluation(fn, **options):
    """An evaluation step of 8,192 indices; nothing is allocated."""
    inner = adamjax.chain(adamjax.adamw(1e-3), adamjax.weight_ema(0.99))
    tx, shape = adamjax.exact_rows(inner, "embedding"), jax.ShapeDtypeStruct
    params = {
        "embedding": shape((NUM_ROWS, WIDTH), jnp.float32),
        "head": shape((WIDTH,), jnp.float32),
    }
    evaluate = adamjax.eval_step(fn, tx, **options)
    state = jax.eval_shape(tx.init, params)
    return evaluate.lower(params, state, shape((READS,), jnp.int32)).compile()


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="an older XLA copies more")
@pytest.mark.parametrize("averaged", [False, True], ids=["weights", "average"])
@pytest.mark.parametrize("fn", EVALUATED)
def test_evaluation_holds_nothing_as_large_as_the_table(fn, averaged):
    compiled = compiled_evaluation(EVALUATED[fn], averaged=averaged, strict=True)
    assert set(large(compiled.as_text())) <= {"bitcast", "get-tuple-element", "parameter"}
    assert compiled.memory_analysis().temp_size_in_bytes < 20e6


def test_evaluation_of_the_whole_table_holds_more():
    """What the test above tells apart."""
    compiled = compiled_evaluation(lambda p, ids: p["embedding"].sum() + p["embedding"][ids].sum())
    assert "fusion" in large(compiled.as_text())


# --- tracing --------------------------------------------------------------------------------------


def at_depth(depth, function, *args):
    """A call from under as many others."""
    return at_depth(depth - 1, function, *args) if depth else function(*args)


def test_tracing_takes_at_most_twice_as_long(monkeypatch):
    """The least of several in turn, in seconds of the processor, which may have other work.

    CPython maps the stack of its frames in pieces of 16 KB, anew whenever a call crosses the end
    of one. Where calls in a loop do, which depends on how deep a test runs, tracing takes twice
    the time. So each of the several starts at another depth, over more than a piece in all.
    """

    def taken_by(function):
        start = time.process_time()
        function()
        return time.process_time() - start

    monkeypatch.setattr(models.measure, "timed", taken_by)
    model = MODELS["transformer"]
    taken = {name: [] for name in ("jax", "rows")}
    gc.freeze()  # What other tests left need not be looked at before each.
    try:
        for depth in range(0, 160, 5):
            for name, times in taken.items():
                times.append(at_depth(depth, models.tracing_seconds, model, name))
    finally:
        gc.unfreeze()
    assert min(taken["rows"][1:]) < 2 * min(taken["jax"][1:]), taken


# --- the suite ------------------------------------------------------------------------------------


def test_contenders_do_the_same():
    """As far as they should: a few steps of the suite's, each of which reads all rows."""
    pytest.importorskip("optax")
    model = networks.TwoTower(8, 8, width=8, examples=64)
    start, ends = jax.jit(model.init)(jax.random.key(0, impl="rbg")), {}
    for name in models.CONTENDERS:
        init, step = models.trainer(name, model)
        params, state, step = start, init(start), jax.jit(step, compiler_options=QUICKLY)
        for i in range(3):
            params, state, _ = step(params, state, model.batch(i))
        ends[name] = params
    frozen, dense = ends.pop("frozen"), ends.pop("dense")
    for path in ("users", "items"):
        np.testing.assert_array_equal(frozen[path], start[path])
    for name, params in ends.items():
        for x, y in zip(*map(jax.tree.leaves, (params, dense)), strict=True):
            # Of steps of 1e-3; optax has its epsilon at another place, which few elements notice.
            off = np.abs(np.asarray(x - y, np.float64))
            assert off.mean() < 1e-6 if name == "optax" else off.max() < 1e-6, name


def test_quick_run(tmp_path):
    asked = "--quick --sittings 1 --rounds 2 --contenders exact;frozen --out models.json --only"
    printed = run_benchmarks("models", *asked.split(), "two towers", cwd=tmp_path).stdout
    assert "exact_rows(adamw), row gradients" in printed
    results = json.loads((tmp_path / "models.json").read_text())
    (row,) = results["steps"]
    assert row["ms"].keys() == {"exact", "frozen"}
    assert row["tables_ms"].keys() == {"exact"}
    assert {row["caches"] for row in results["traces"]} == {"warm", "empty"}


def test_a_step_of_many_tables_is_shown_as_a_program(tmp_path):
    """The lines and times of each contender, beside those of one table."""
    asked = "--quick --sittings 1 --rounds 2 --contenders exact;lazy --out models.json --only"
    printed = run_benchmarks("models", *asked.split(), "click", cwd=tmp_path).stdout
    assert "A step as a program" in printed
    results = json.loads((tmp_path / "models.json").read_text())
    lines = {(row["model"], row["contender"]): row["lines"] for row in results["programs"]}
    assert lines.keys() == {(m, c) for m in (models.MANY, models.ONE) for c in ("exact", "lazy")}
    for name in ("exact", "lazy"):
        assert lines[models.ONE, name] < lines[models.MANY, name] < 3 * lines[models.ONE, name]
    for row in results["programs"]:
        assert row["rounds"] == 2
        assert min(x["median"] for x in row["s"].values()) > 0
    text = tables.models(results)
    assert f"| {models.ONE} | {models.CONTENDERS['exact']} |" in text
    (steps,) = results["steps"]
    assert steps["parameters"] == 3 * 500 * 4 + 3 * 4 * 32 + 32 + 32 + 1


def test_bounds_of_many_tables_are_what_they_are():
    def made(model, lines, seconds):
        s = {"compile": {"median": seconds, "q25": seconds, "q75": seconds}}
        return {"model": model, "contender": "exact", "lines": lines, "s": s}

    one = made(models.ONE, 1000, 1.0)
    found = models.bounds([made(models.MANY, 3900, 3.1), one])
    assert [(x["measured"], x["holds"]) for x in found] == [(3.9, True), (3.1, False)]
    assert [x["holds"] for x in models.bounds([one])] == [None, None]
