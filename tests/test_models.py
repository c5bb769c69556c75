"""Whole models: row gradients train them as dense ones do, with less memory and fast tracing."""

import functools
import gc
import json
import math
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import run_benchmarks

import adamjax
from adamjax.paths import leaf_paths
from benchmarks import models, networks, tables

pytestmark = pytest.mark.slow

STEPS = 50
RATE = 0.01
MODELS = {
    "DLRM": networks.DLRM((3000, 2000, 1000, 1000, 500, 500, 500, 500), width=16, examples=128),
    "two towers": networks.TwoTower(3000, 2000, width=32, examples=128),
    "transformer": networks.Transformer(tokens=50_000, length=32, examples=2),
    "clicks": networks.Clicks(6, rows=200, examples=256),
}
# The gradients of the two towers have norms of 0.8 and more, so each of them is clipped.
CLIPPED = adamjax.chain(adamjax.clip_by_global_norm(0.1), adamjax.adamw(RATE))
OPTIMIZERS = {
    "DLRM": adamjax.adamw(RATE),
    "two towers": CLIPPED,
    "transformer": adamjax.adamw(RATE),
    "clicks": adamjax.adamw(RATE),
}

# Tolerances: the relative error of a loss, the root mean square error of a leaf, and the error of
# an element. Rounding alone changes a dense run of 50 steps by less than the tolerances:
# - In float64, the losses of the same run differ by 2e-7 to 6e-7 of their values, and a leaf by a
#   root mean square of at most 4e-6.
# - With the examples of each batch in another order, the losses differ by 1e-7 to 6e-7, and a leaf
#   by at most 2e-6.
# - One element can differ by a tenth of a step (1e-3) if its gradient is hardly more than rounding,
#   because Adam scales it up.
# With rows="lazy", losses and parameters differ by 9e-3 and more.
LOSS_RTOL, LEAF_ATOL, ELEMENT_ATOL = 2e-6, 2e-5, 5e-3

# For programs that take longer to compile than to run.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


# Each trainer returns `init`, `step`, and a function from params and state after the last step to
# up-to-date params.


def dense(model, tx):
    gradient = jax.value_and_grad(model.loss)

    def step(params, state, batch):
        value, grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state, value

    return tx.init, step, lambda params, state: params


def by_rows(model, tx):
    """With row gradients for all tables, but without `exact_rows`."""
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
def initial_params(name):
    """The parameters of a model, as NumPy arrays."""
    # JAX's default generator takes long to compile.
    params = jax.jit(MODELS[name].init)(jax.random.key(0, impl="rbg"))
    return jax.tree.map(np.asarray, params)


def trained(name, trainer, tx):
    """The losses of all steps, and the parameters after the last one."""
    model = MODELS[name]
    init, step, final_params = trainer(model, tx)
    params = jax.tree.map(jnp.array, initial_params(name))
    state, losses = init(params), []
    # The steps of the large model take longer than their compilation.
    options = None if name == "transformer" else FAST_COMPILE
    step = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
    for i in range(STEPS):
        params, state, value = step(params, state, model.batch(i))
        losses.append(value)
    return np.array(losses, np.float64), jax.tree.map(np.asarray, final_params(params, state))


@functools.cache
def trained_dense(name):
    return trained(name, dense, OPTIMIZERS[name])


@pytest.mark.parametrize("trainer", [exact, by_rows], ids=["exact", "dense rows"])
@pytest.mark.parametrize("name", MODELS)
def test_row_gradients_train_as_dense_ones_do(name, trainer):
    losses, params = trained(name, trainer, OPTIMIZERS[name])
    dense_losses, dense_params = trained_dense(name)
    assert dense_losses[-5:].mean() < 0.8 * dense_losses[:5].mean()
    np.testing.assert_allclose(losses, dense_losses, rtol=LOSS_RTOL)
    leaves = zip(leaf_paths(params), *map(jax.tree.leaves, (params, dense_params)), strict=True)
    for path, x, y in leaves:
        error = x.astype(np.float64) - y
        assert math.sqrt(np.mean(error**2)) < LEAF_ATOL, path
        assert np.abs(error).max() < ELEMENT_ATOL, path


def test_losses_with_lazy_rows_differ_by_more_than_the_tolerance():
    """So the tolerance is tight enough."""
    dense_losses, _ = trained_dense("two towers")
    clip, *_ = CLIPPED.parts
    lazy = adamjax.chain(clip, adamjax.adamw(RATE, rows="lazy"))
    losses, _ = trained("two towers", by_rows, lazy)
    assert np.abs(losses / dense_losses - 1).max() > 100 * LOSS_RTOL


# --- in place -------------------------------------------------------------------------------------

NUM_ROWS, WIDTH, READS = 1_000_000, 64, 8192
TABLE = NUM_ROWS * WIDTH

# The operations whose results may be as large as the table. They are arguments of the program and
# of its computations, operations that pass a buffer on without a copy, and writes in place.
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


def wide_loss(params, batch):
    rows = params["embedding"][batch["ids"]]
    return jnp.mean((rows @ params["head"] - batch["y"]) ** 2)


def narrow_loss(params, batch):
    """The loss in bfloat16. It casts the whole table."""
    rows = params["embedding"].astype(jnp.bfloat16)[batch["ids"]]
    y = rows @ params["head"].astype(jnp.bfloat16)
    return jnp.mean((y.astype(jnp.float32) - batch["y"]) ** 2)


LOSSES = {"float32": wide_loss, "bfloat16": narrow_loss}


# Each rule, and the limit on the bytes of temporaries. 8,192 rows take 2 MB. With weight decay, the
# temporaries include the weights of the rows. Exact steps need less if reads and gradients are
# written by hand, with `prepare`: adam 1.3 MB less, adamw 0.03 MB less.
RULES = {"adam": (adamjax.adam, 20e6), "adamw": (adamjax.adamw, 24e6)}


def shapes_of_params():
    return {
        "embedding": jax.ShapeDtypeStruct((NUM_ROWS, WIDTH), jnp.float32),
        "head": jax.ShapeDtypeStruct((WIDTH,), jnp.float32),
    }


class Model(NamedTuple):
    """The attributes of a model that the trainers use."""

    loss: Callable
    tables: tuple = ("embedding",)


def compiled_step(trainer, loss, tx):
    """The donated train step, and the bytes of parameters and state; allocates no arrays."""
    init, step, _ = trainer(Model(loss), tx)
    params = shapes_of_params()
    state = jax.eval_shape(init, params)
    batch = {
        "ids": jax.ShapeDtypeStruct((READS,), jnp.int32),
        "y": jax.ShapeDtypeStruct((READS,), jnp.float32),
    }
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    return compiled, num_bytes


def large_operations(text):
    """The operations of an optimized HLO, in all its computations, whose result is large.

    A result is large if it has at least an eighth of the table's elements, in any shape and dtype.
    (An array with one element for each row has a 64th.)
    """
    pattern = r"^\s+(?:ROOT )?%?\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\("
    operations = re.findall(pattern, text, re.MULTILINE)
    assert operations
    return [op for shape, op in operations if math.prod(map(int, shape.split(","))) >= TABLE / 8]


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="an older XLA copies more")
@pytest.mark.parametrize("mode", ["exact", "lazy"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rule", RULES)
def test_a_whole_step_allocates_nothing_as_large_as_the_table(rule, loss, mode):
    """It writes the table and each of its two moments once, in place."""
    make, max_bytes = RULES[rule]
    trainer, tx = (exact, make(1e-3)) if mode == "exact" else (by_rows, make(1e-3, rows="lazy"))
    compiled, num_bytes = compiled_step(trainer, LOSSES[loss], tx)
    memory, operations = compiled.memory_analysis(), large_operations(compiled.as_text())
    assert set(operations) <= IN_PLACE
    assert sum(op in WRITES for op in operations) == 3  # the table and its two moments
    assert memory.alias_size_in_bytes == num_bytes
    assert memory.temp_size_in_bytes < max_bytes


def test_a_dense_step_allocates_arrays_as_large_as_the_table():
    """So the test above can fail."""
    compiled, _ = compiled_step(dense, wide_loss, adamjax.adam(1e-3))
    assert set(large_operations(compiled.as_text())) - IN_PLACE
    assert compiled.memory_analysis().temp_size_in_bytes > 4 * TABLE


EVALUATED = {
    "float32": lambda p, ids: p["embedding"][ids] @ p["head"],
    "bfloat16": lambda p, ids: (
        p["embedding"].astype(jnp.bfloat16)[ids] @ p["head"].astype(jnp.bfloat16)
    ),
}


def compiled_evaluation(fn, **options):
    """An evaluation step of 8,192 indices; allocates no arrays."""
    inner = adamjax.chain(adamjax.adamw(1e-3), adamjax.weight_ema(0.99))
    tx, params = adamjax.exact_rows(inner, "embedding"), shapes_of_params()
    evaluate = adamjax.eval_step(fn, tx, **options)
    state = jax.eval_shape(tx.init, params)
    ids = jax.ShapeDtypeStruct((READS,), jnp.int32)
    return evaluate.lower(params, state, ids).compile()


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="an older XLA copies more")
@pytest.mark.parametrize("averaged", [False, True], ids=["weights", "average"])
@pytest.mark.parametrize("fn", EVALUATED)
def test_evaluation_allocates_nothing_as_large_as_the_table(fn, averaged):
    compiled = compiled_evaluation(EVALUATED[fn], averaged=averaged, strict=True)
    assert set(large_operations(compiled.as_text())) <= {
        "bitcast",
        "get-tuple-element",
        "parameter",
    }
    assert compiled.memory_analysis().temp_size_in_bytes < 20e6


def test_evaluation_that_sums_the_whole_table_has_a_large_result():
    """So the test above can fail."""
    compiled = compiled_evaluation(lambda p, ids: p["embedding"].sum() + p["embedding"][ids].sum())
    assert "fusion" in large_operations(compiled.as_text())


# --- tracing --------------------------------------------------------------------------------------


def at_depth(depth, function, *args):
    """Calls a function with this many more frames on the stack."""
    return at_depth(depth - 1, function, *args) if depth else function(*args)


def test_tracing_takes_at_most_twice_as_long_as_in_jax(monkeypatch):
    """Compares the minimum of several CPU times, because the processor may have other work.

    CPython allocates the stack of its frames in chunks of 16 KB. If the calls of a loop cross the
    end of a chunk, each of them allocates a chunk, and tracing takes twice as long. Whether they
    do depends on the depth at which a test runs. So each measurement runs at another depth, and
    together the depths span more than one chunk.
    """

    def cpu_seconds(function):
        start = time.process_time()
        function()
        return time.process_time() - start

    monkeypatch.setattr(models.measure, "timed", cpu_seconds)
    model = MODELS["transformer"]
    seconds = {name: [] for name in ("jax", "rows")}
    gc.freeze()  # The collector need not scan what other tests left.
    try:
        for depth in range(0, 160, 5):
            for name, times in seconds.items():
                times.append(at_depth(depth, models.tracing_seconds, model, name))
    finally:
        gc.unfreeze()
    # The first time is longer, because JAX caches some of what it traces.
    assert min(seconds["rows"][1:]) < 2 * min(seconds["jax"][1:]), seconds


# --- the benchmark --------------------------------------------------------------------------------


def test_contenders_train_the_same_parameters():
    """In a few steps that read all rows. Only the frozen tables differ."""
    pytest.importorskip("optax")
    model = networks.TwoTower(8, 8, width=8, examples=64)
    start, params_of = jax.jit(model.init)(jax.random.key(0, impl="rbg")), {}
    for name in models.CONTENDERS:
        init, step = models.trainer(name, model)
        params, state, step = start, init(start), jax.jit(step, compiler_options=FAST_COMPILE)
        for i in range(3):
            params, state, _ = step(params, state, model.batch(i))
        params_of[name] = params
    frozen, dense = params_of.pop("frozen"), params_of.pop("dense")
    for path in ("users", "items"):
        np.testing.assert_array_equal(frozen[path], start[path])
    for name, params in params_of.items():
        for x, y in zip(*map(jax.tree.leaves, (params, dense)), strict=True):
            # A step is 1e-3. optax adds another epsilon, which matters for few elements.
            error = np.abs(np.asarray(x - y, np.float64))
            measured = error.mean() if name == "optax" else error.max()
            assert measured < 1e-6, name


@pytest.mark.tooling
def test_a_quick_run_writes_the_times_of_its_contenders(tmp_path):
    options = "--quick --sittings 1 --rounds 2 --contenders exact;frozen --out models.json --only"
    printed = run_benchmarks("models", *options.split(), "two towers", cwd=tmp_path).stdout
    assert "exact_rows(adamw), row gradients" in printed
    results = json.loads((tmp_path / "models.json").read_text())
    (row,) = results["steps"]
    assert row["ms"].keys() == {"exact", "frozen"}
    assert row["tables_ms"].keys() == {"exact"}
    assert {row["caches"] for row in results["traces"]} == {"warm", "empty"}


@pytest.mark.tooling
def test_the_program_of_many_tables_is_compared_with_that_of_one(tmp_path):
    """By its lines, and by the times to trace and to compile it, for each contender."""
    options = "--quick --sittings 1 --rounds 2 --contenders exact;lazy --out models.json --only"
    printed = run_benchmarks("models", *options.split(), "click", cwd=tmp_path).stdout
    assert "how long its program is" in printed
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
    # 3 tables of 500 rows of 4; a hidden layer of 32 on these rows, with its bias; one output.
    assert steps["parameters"] == 3 * 500 * 4 + 3 * 4 * 32 + 32 + 32 + 1


@pytest.mark.tooling
def test_bounds_on_many_tables_compare_them_with_one_table():
    def program(model, lines, seconds):
        s = {"compile": {"median": seconds, "q25": seconds, "q75": seconds}}
        return {"model": model, "contender": "exact", "lines": lines, "s": s}

    one = program(models.ONE, 1000, 1.0)
    bounds = models.bounds([program(models.MANY, 3900, 3.1), one])
    assert [(x["measured"], x["holds"]) for x in bounds] == [(3.9, True), (3.1, False)]
    assert [x["holds"] for x in models.bounds([one])] == [None, None]
