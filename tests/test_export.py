"""Whole train steps are exported with `jax.export`, for every platform at once, and imported.

A step is exported once for TPUs, both kinds of GPU and CPUs, so it is lowered for each of them. It
is written as bytes and read again, if flatbuffers is installed. Then it is called on this machine,
where its results must be those of the jitted step.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from support import assert_close, avals
from test_laws import CASES, make_grads, make_params

import adamjax
from adamjax import (
    accumulate_gradients,
    adam,
    adamax,
    adamw,
    amsgrad,
    chain,
    clip_by_global_norm,
    cosine_decay,
    exact_rows,
    grouped,
    nadam,
    skip_not_finite,
    sum_over,
    weight_ema,
)

pytestmark = pytest.mark.slow

PLATFORMS = ("tpu", "cuda", "rocm", "cpu")


def exported_and_imported(step, *arguments):
    """A function that calls a jitted step after its export and import."""
    artifact = export.export(step, platforms=PLATFORMS)(*arguments)
    assert artifact.platforms == PLATFORMS
    if importlib.util.find_spec("flatbuffers") is not None:
        artifact = export.deserialize(artifact.serialize())
    found = jax.tree.unflatten(artifact.out_tree, artifact.out_avals)
    assert avals(found) == avals(jax.eval_shape(step, *arguments))
    return artifact.call


def compiled(step, *arguments):
    """The step compiled without optimization, because XLA takes most of the time of these tests."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(step).lower(*arguments).compile(compiler_options=options)


def consecutive_results(step, params, state, batches):
    """The results of steps on the batches, each from the parameters and state of the one before."""
    step, found = compiled(step, params, state, *batches[0]), []
    for batch in batches:
        params, state, *rest = step(params, state, *batch)
        found.append((params, state, *rest))
    return found


@pytest.fixture(scope="module", autouse=True)
def _optax_states():
    """Registers states of optax for serialization, because optax does not."""
    for state in (optax.EmptyState, optax.TraceState):
        export.register_namedtuple_serialization(state, serialized_name=f"optax.{state.__name__}")


def step_of(tx):
    """A step whose arguments and results have no buckets, because JAX cannot serialize them."""

    def step(params, state, grads):
        if isinstance(tx, grouped):
            state = tx.join(state, params)
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), without_buckets(tx, state)

    return step


def without_buckets(tx, state):
    return tx.split(state) if isinstance(tx, grouped) else state


def initial_state(case, params):
    return without_buckets(case.tx, case.tx.init(params))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_transform_is_exported(case):
    params = jax.eval_shape(make_params)
    state = jax.eval_shape(functools.partial(initial_state, case), params)
    exported_and_imported(jax.jit(step_of(case.tx)), params, state, params)


def test_every_transform_steps_as_before_the_export():
    """One step does all of them, because compiling them one by one takes ten times as long."""

    def step(params, state, grads):
        new_params, new_state = {}, {}
        for case in CASES:
            one_step = step_of(case.tx)
            new_params[case.name], new_state[case.name] = one_step(
                params[case.name], state[case.name], grads
            )
        return new_params, new_state

    params = {case.name: make_params() for case in CASES}
    state = {case.name: initial_state(case, make_params()) for case in CASES}
    grads = [(make_grads(t),) for t in range(3)]
    imported = exported_and_imported(jax.jit(step), params, state, *grads[0])
    found = consecutive_results(imported, params, state, grads)
    expected = consecutive_results(step, params, state, grads)
    for found_trees, expected_trees in zip(found, expected, strict=True):
        for a, b in zip(found_trees, expected_trees, strict=True):
            for case in CASES:
                assert_close(a[case.name], b[case.name])


# --- rows -----------------------------------------------------------------------------------------

# The functions `with_...` return a transform and a train step with it.

ROWS, WIDTH = 100, 3


def loss(params, ids, y):
    return jnp.mean((params["table"][ids] @ params["out"] - y) ** 2)


def pipeline(rule=adamw):
    return chain(clip_by_global_norm(0.5), rule(cosine_decay(0.1, 10)), weight_ema(0.9))


def with_dense_gradients(tx):
    def step(params, state, ids, y):
        value, grads = jax.value_and_grad(loss)(params, ids, y)
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state, value

    return tx, step


def with_train_step(tx):
    """The step is a `train_step`, which finds the rows that the loss reads."""
    # `exact_rows`, which names its tables itself, may be inside of another transform.
    return tx, adamjax.train_step(loss, tx, tables=None if "exact_rows" in repr(tx) else "table")


def with_gathered_rows(tx, ticket=True):
    """The step gathers the rows and makes the row gradient itself."""

    def step(params, state, ids, y):
        rows, extra = params["table"][ids], {}
        if isinstance(tx, exact_rows):
            read, new_ticket = tx.prepare(params, state, {"table": ids})
            rows = read["table"]
            if ticket:
                extra = {"ticket": new_ticket}

        def loss_of_rows(rows, out):
            return jnp.mean((rows @ out - y) ** 2)

        value, grads = jax.value_and_grad(loss_of_rows, (0, 1))(rows, params["out"])
        table = adamjax.row_gradient(ids, grads[0], ROWS)
        updates, state = tx.update({"table": table, "out": grads[1]}, state, params, **extra)
        return adamjax.apply_updates(params, updates), state, value

    return tx, step


def with_replicas(tx):
    """Replicas of a mesh take the step and sum their gradients; that of the table has only rows."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    spec = jax.sharding.PartitionSpec("batch")
    tx = chain(sum_over("batch"), tx)
    step = with_train_step(tx)[1]

    def shard(params, state, ids, y):
        found = step(*jax.tree.map(lambda x: x[0], (params, state)), ids, y)
        return jax.tree.map(lambda x: x[None], found)

    def mapped(params, state, ids, y):
        stacked = jax.tree.map(lambda x: x[None], (params, state))
        found = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)(*stacked, ids, y)
        return jax.tree.map(lambda x: x[0], found)

    return tx, mapped


def with_evaluation(tx):
    """The step also returns up-to-date rows and slots, averages and scalars, as for evaluation."""
    _, train_step = with_gathered_rows(tx)

    def step(params, state, ids, y):
        params, state, value = train_step(params, state, ids, y)
        rows = tx.lookup(params, state, "table", ids[::2])
        flushed = tx.flush(params, state)
        found = (adamjax.get_slot(flushed[1], "v"), adamjax.averaged_weights(flushed[1]))
        scalars = (adamjax.step_count(state), adamjax.learning_rate(tx, state))
        return params, state, value, rows, flushed, found, scalars, adamjax.global_norm(params)

    return tx, step


ROW_MODES = {
    "dense gradient": lambda: with_dense_gradients(pipeline()),
    "dense gradient, exact_rows": lambda: with_dense_gradients(exact_rows(pipeline(), "table")),
    "rows=dense": lambda: with_train_step(pipeline()),
    "rows=dense, amsgrad": lambda: with_gathered_rows(pipeline(amsgrad)),
    "rows=dense, gathered rows": lambda: with_gathered_rows(pipeline()),
    "rows=lazy": lambda: with_train_step(adam(0.1, rows="lazy")),
    "rows=lazy, adamax": lambda: with_gathered_rows(pipeline(adamax)),
    "exact_rows": lambda: with_evaluation(exact_rows(pipeline(), "table")),
    "exact_rows, no ticket": lambda: with_gathered_rows(
        exact_rows(adam(0.1), "table"), ticket=False
    ),
    "exact_rows, nadam": lambda: with_gathered_rows(exact_rows(nadam(0.1), "table")),
    "exact_rows, train step": lambda: with_train_step(exact_rows(adam(0.1), "table")),
    "skip_not_finite": lambda: with_train_step(skip_not_finite(exact_rows(adam(0.1), "table"))),
    "accumulate_gradients": lambda: with_gathered_rows(
        accumulate_gradients(pipeline(), 2, max_rows=8)
    ),
    "sum_over": lambda: with_replicas(pipeline()),
}
# The modes that are called after the import. Together they have all operations that depend on the
# platform, and all loops and branches.
CALLED_MODES = (
    "rows=dense, gathered rows",
    "rows=lazy, adamax",
    "exact_rows",
    "exact_rows, train step",
)


def table_params():
    rng = np.random.default_rng(0)
    shapes = {"table": (ROWS, WIDTH), "out": (WIDTH,)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def batches():
    """Some indices are equal, and some rows are read again after a step that does not read them."""
    ids = ([7, 0, 7, ROWS - 1], [5, 5, 5, 2], [0, 7, 2, 9])
    return [(jnp.array(x), jnp.arange(4.0) + t) for t, x in enumerate(ids)]


@pytest.mark.parametrize("mode", ROW_MODES)
def test_every_row_mode_is_exported(mode):
    tx, step = ROW_MODES[mode]()
    params = table_params()
    exported_and_imported(jax.jit(step), params, jax.eval_shape(tx.init, params), *batches()[0])


@pytest.mark.parametrize("mode", CALLED_MODES)
def test_row_modes_step_as_before_the_export(mode):
    tx, step = ROW_MODES[mode]()
    params = table_params()
    state = tx.init(params)
    imported = exported_and_imported(jax.jit(step), params, state, *batches()[0])
    found = consecutive_results(imported, params, state, batches())
    assert_close(found, consecutive_results(step, params, state, batches()))


def test_an_imported_step_copies_no_table():
    """Its parameters and state are donated, like those of the jitted step."""
    rows, width = 100_000, 64
    tx = exact_rows(adam(0.1), "table")
    params = {"table": jax.ShapeDtypeStruct((rows, width), jnp.float32)}
    params["out"] = jax.ShapeDtypeStruct((width,), jnp.float32)
    arguments = (params, jax.eval_shape(tx.init, params), *batches()[0])
    imported = exported_and_imported(adamjax.train_step(loss, tx), *arguments)
    donated = jax.jit(imported, donate_argnums=(0, 1)).lower(*arguments).compile()
    memory, table = donated.memory_analysis(), 4 * rows * width
    assert memory.temp_size_in_bytes < table / 10
    assert memory.alias_size_in_bytes > 3 * table  # the table and its two moments
