"""States and tables on eight devices, compared with one device; and what the devices exchange."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support import run_on_devices

import adamjax

pytestmark = pytest.mark.slow

DEVICES, STEPS, BATCH = 8, 60, 32
V, D = 4096, 8
# Eight devices add in another order than one, and a step magnifies rounding errors of gradients.
CLOSE = 1e-5

RULES = {
    "adam": functools.partial(adamjax.adam, 1e-2),
    "amsgrad": functools.partial(adamjax.amsgrad, 1e-2),
    "adamw": functools.partial(adamjax.adamw, 1e-2, weight_decay=0.1),
    "adamax": functools.partial(adamjax.adamax, 1e-2),
    "nadam": functools.partial(adamjax.nadam, 1e-2),
}
# Whether the state is whole on each device or split, and the rule. A step with a whole state does
# not depend on the mesh, so one rule is enough. adamw has the state of adam.
REPLICAS = ["whole adam", *(f"split {name}" for name in RULES if name != "adamw")]
# The mode of the rows ("array": dense gradients) and the rule. `exact_rows` has a computation for
# each rule. The other modes apply any rule to the rows of its slots, so rules that differ are
# enough: adamw decays weights, amsgrad has a third slot, adamax no `v`, nadam one scalar more.
TABLES = [
    *(f"exact {name}" for name in RULES if name != "adam"),
    *("lazy adamw", "lazy amsgrad", "dense adamax", "dense nadam"),
    "array adam",
]
# The dtypes of m and v, by how the leaves are split.
NARROW = {
    "split": [("bfloat16", "bfloat16"), ("scaled8", "scaled8")],
    "columns": [("bfloat16", "scaled8")],
    "shard_state": [("scaled8", "bfloat16")],
    "shard_state of master_weights": [("bfloat16", "scaled8")],
    "lazy": [("scaled8", "bfloat16")],
    "exact": [("bfloat16", "scaled8")],
    "explicit split": [("scaled8", "bfloat16")],
    "explicit columns": [("bfloat16", "scaled8")],
}

# An older XLA fails to compile steps that move a state between memories on a mesh of CPUs.
HAS_PINNED_HOST = jax.__version_info__ >= (0, 10) and "pinned_host" in [
    memory.kind for memory in jax.devices()[0].addressable_memories()
]


@pytest.fixture(scope="module")
def results():
    """The results of all cases, from one process with several devices."""
    output = run_on_devices(DEVICES, "import test_sharding; test_sharding.main()")
    return json.loads(output.splitlines()[-1])


# --- tests of the results -------------------------------------------------------------------------


@pytest.mark.parametrize("case", REPLICAS)
def test_replicas_do_what_one_device_does(results, case):
    assert results[case]["distance"] < CLOSE


@pytest.mark.parametrize("case", [case for case in REPLICAS if case.startswith("split")])
def test_a_device_holds_its_share_of_a_split_state(results, case):
    """But each device has all scalars, and all leaves without a dimension that can be split."""
    total, whole = results[case]["bytes on one device"], results[case]["bytes of whole leaves"]
    assert results[case]["bytes"] - whole == (total - whole) / DEVICES


def test_gradients_are_reduce_scattered_and_updates_gathered(results):
    found = results["reduced"]["collectives"]
    sizes = {kind: [x for k, x in found if k == kind] for kind in dict(found)}
    assert results["reduced"]["distance"] < CLOSE
    # One device's parts of the gradients of `b` and `w`, and the whole updates of these.
    assert sizes["reduce-scatter"] == [3, 48]
    assert sizes["all-gather"] == [24, 384]
    # The loss, the norm, and the gradient of `odd`, which cannot be split.
    assert max(sizes["all-reduce"]) <= 5


@pytest.mark.parametrize("case", TABLES)
def test_row_sharded_tables_move_as_on_one_device(results, case):
    assert results[case]["distance"] < CLOSE
    assert results[case]["bytes"] * DEVICES == results[case]["bytes on one device"]


@pytest.mark.parametrize("case", TABLES)
def test_devices_exchange_rows_and_never_tables(results, case):
    """The result of a collective is at most twice the size of a batch's rows."""
    assert results[case]["collectives"]
    assert max(size for _, size in results[case]["collectives"]) <= 2 * BATCH * D
    assert not results[case]["holds a table"]


def test_the_program_of_one_device_holds_a_table(results):
    """So the test above would find a table in the program of several devices."""
    assert results["exact adamw"]["one device holds a table"]


def test_evaluation_exchanges_rows_and_never_tables(results):
    assert results["evaluation"]["distance"] < 1e-6
    assert results["evaluation"]["lags behind"] > 1e-3
    assert results["evaluation"]["collectives"]
    assert max(size for _, size in results["evaluation"]["collectives"]) <= 2 * BATCH * D
    assert not results["evaluation"]["holds a table"]


def test_devices_flush_their_own_rows(results):
    assert results["flush"]["collectives"] == []
    assert results["flush"]["distance"] < 1e-6


@pytest.mark.parametrize("case", ["explicit exact", "explicit lazy"])
def test_tables_on_a_mesh_with_explicit_axes_move_as_on_one_device(results, case):
    assert results[case]["distance"] < CLOSE
    assert results[case]["specs"] == 3 * [["data"]]


@pytest.mark.parametrize("loss", ["whole", "split", "all rows"])
def test_any_loss_on_a_mesh_with_explicit_axes(results, loss):
    """There the table's gradient is a dense array, so all rows catch up in each step."""
    assert results[f"explicit, {loss}"]["distance"] < CLOSE


@pytest.mark.parametrize("case", ["init", "explicit init", "explicit init without set_mesh"])
def test_init_splits_slots_like_their_parameters(results, case):
    assert all(results[case].values()), results[case]


@pytest.mark.parametrize("case", ["plain", "exact rows", "parameters made in jit", "host"])
def test_a_jitted_init_reads_no_parameter(results, case):
    """Slots are split like their parameters, but are zeros even if these are NaN or infinite."""
    if case == "host" and not HAS_PINNED_HOST:
        pytest.skip("no pinned_host memory, or an older XLA")
    assert all(results["unread"][case].values()), results["unread"][case]


@pytest.mark.parametrize(
    ("case", "m", "v"), [(case, m, v) for case, dtypes in NARROW.items() for m, v in dtypes]
)
def test_narrow_moments_are_the_same_bits_on_a_mesh(results, case, m, v):
    """Their random bits are a hash of the step, the leaf and the element."""
    assert all(results["narrow"][f"{case}, {m}, {v}"].values()), results["narrow"]


@pytest.mark.skipif(not HAS_PINNED_HOST, reason="no pinned_host memory, or an older XLA")
def test_a_state_in_the_memory_of_the_host_gives_the_same_parameters(results):
    assert results["pinned"]["kinds"] == ["pinned_host"]
    assert results["pinned"]["distance"] == 0


# --- tests in this process ------------------------------------------------------------------------


def mesh_of(axes=("data",), **kinds):
    shape = (jax.device_count(), *(1 for _ in axes[1:]))
    return Mesh(np.array(jax.devices()).reshape(shape), axes, **kinds)


def explicit_mesh():
    return mesh_of(axis_types=(jax.sharding.AxisType.Explicit,))


def test_state_shardings_have_the_structure_of_the_state():
    mesh = mesh_of()
    split, columns = NamedSharding(mesh, P("data", None)), NamedSharding(mesh, P(None, "data"))
    params = {
        "none": None,
        "table": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split),
        "w": jax.ShapeDtypeStruct((2, 8), jnp.float32, sharding=columns),
    }
    inner = adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam(0.1))
    tx = adamjax.chain(adamjax.exact_rows(inner, "table"))
    kind = jax.devices()[0].default_memory().kind
    found = adamjax.state_shardings(tx, params, mesh, memory_kind=kind)
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    slots = adamjax.get_slot(found, "m")
    # A spec has no `None` at the end, like those of the arrays that `jit` returns.
    assert slots == {"none": None, "table": NamedSharding(mesh, P("data")), "w": columns}
    assert found[0].last["table"].spec == P("data")
    assert found[0].clock.spec == P()


def test_a_wrong_axis_is_refused():
    with pytest.raises(ValueError, match=r"the mesh has no axis 'model', it has \['data'\]"):
        adamjax.shard_state(adamjax.adam(0.1), mesh_of(), "model")


def aux_loss(params, x):
    """A loss that is a mean over the batch, with means and values of each example as `aux`."""
    y = x @ params["w"] + params["n"]
    return jnp.mean(y**2), {
        "mean": jnp.mean(y),
        "columns": jnp.mean(x, axis=0),
        "examples": y,
        "of each example": (y > 0, jnp.outer(y, jnp.arange(3)).reshape(-1).astype(int)),
        "none": None,
    }


def aux_case():
    params = {"w": jnp.arange(8.0), "n": jnp.array(3), "none": None}
    return params, rng().normal(size=(2 * 8, 8)).astype("f")


def test_aux_is_that_of_the_whole_batch(results):
    """Means are averaged over the devices. Values of each example are concatenated."""
    assert results["aux"]["distance"] < CLOSE
    assert results["aux"]["same"]
    # An array of size 8 is a mean, though each device has 8 examples.
    assert results["aux"]["8 examples a device"]


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        (lambda x: {"n": jnp.sum(x > 0)}, r"aux\['n'\] is int32\[\].*expected a float"),
        (lambda x: {"n": 3}, r"aux\['n'\] is int.*\[\].*expected a float"),
        (lambda x: jnp.any(x > 0), "is bool"),
        (lambda x: "a word", "is a str"),
        (lambda x: [x[:, :2].T], r"aux\['0'\].*\[2, 16\] with twice the batch"),
        (lambda x: x.reshape(8, 8), "the loss is traced with twice the batch, which failed"),
    ],
)
def test_aux_that_devices_cannot_join_is_refused(aux, message):
    """Also on one device, so that the number of devices makes no difference."""
    tx = adamjax.shard_state(adamjax.adam(0.1), mesh_of(), "data")
    gradient = tx.value_and_grad(lambda w, x: (jnp.mean(w * x), aux(x)), has_aux=True)
    with pytest.raises(ValueError, match=message):
        gradient(jnp.ones(8), jnp.ones((8 * jax.device_count(), 8)))


def test_leaves_that_are_no_floats_have_no_gradient():
    tx = adamjax.shard_state(adamjax.adam(0.1), mesh_of(), "data")
    params, x = aux_case()
    (value, aux), grads = tx.value_and_grad(aux_loss, has_aux=True)(params, x)
    (expected, expected_aux), of_w = jax.value_and_grad(
        lambda w: aux_loss({**params, "w": w}, x), has_aux=True
    )(params["w"])
    assert [grads["n"], grads["none"]] == [None, None]
    assert distance((value, grads["w"], aux), (expected, of_w, expected_aux)) < CLOSE
    updates, _ = tx.update(grads, tx.init(params), params)
    assert adamjax.apply_updates(params, updates)["n"] == 3


def test_a_model_with_functions_is_refused():
    tx = adamjax.shard_state(adamjax.adam(0.1), mesh_of(), "data")
    with pytest.raises(TypeError, match=r"shard_state: params\['act'\] is .*eqx.filter"):
        tx.value_and_grad(aux_loss, has_aux=True)({"act": jnp.tanh}, jnp.ones((8, 8)))


def test_flush_without_a_mesh_is_refused():
    tx = adamjax.exact_rows(adamjax.adam(0.1), "")
    state = tx.init(jnp.ones((8, 2)))
    flush = jax.jit(functools.partial(tx.flush, axis="data"))
    with pytest.raises(ValueError, match=r"no mesh is set: call it under jax.set_mesh"):
        flush(jnp.ones((8, 2)), state)


# --- the results, from the process with several devices -------------------------------------------


def rng():
    return np.random.default_rng(0)


def distance(a, b):
    """The largest difference, relative to the largest number in the leaf of `b`."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def bytes_held(tree, device=0):
    """The bytes of a tree's arrays that a device holds."""
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == jax.devices()[device])


def collectives(text):
    """The kind of each collective of a program, and the number of elements of each result."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = []
    for results, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        found += [[kind, num_elements(x)] for x in re.findall(r"\w\[([\d,]*)\]", results)]
    return sorted(found)


def num_elements(dimensions):
    return int(np.prod([int(n) for n in dimensions.split(",") if n]))


# Replicas.


def replica_params():
    r = rng()
    sizes = {"w": (16, 24), "b": (24,), "odd": (5,)}
    return {n: jnp.asarray(r.normal(size=s), jnp.float32) for n, s in sizes.items()}


def replica_loss(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((hidden[:, :5] @ params["odd"] + hidden.sum(1) - y) ** 2)


def replica_batches():
    r = rng()
    for _ in range(STEPS):
        yield r.normal(size=(BATCH, 16)).astype("f"), r.normal(size=BATCH).astype("f")


def trained_replicas(tx, param_sharding=None, batch_sharding=None, gradient=None):
    """`trained`, with the parameters and the batches of replicas."""
    gradient = gradient or jax.value_and_grad(replica_loss)

    def step(params, state, x, y):
        _, grads = gradient(params, x, y)
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    params, shardings = jax.device_put(replica_params(), param_sharding), None
    if param_sharding is not None:
        state_shardings = adamjax.state_shardings(tx, params, param_sharding.mesh)
        shardings = jax.tree.map(lambda _: param_sharding, params), state_shardings
    return trained(step, tx, params, shardings, batch_sharding, replica_batches())


def trained(step, tx, params, shardings, batch_sharding, batches):
    """Parameters and state after all steps, and the text of the compiled step."""
    state = jax.jit(tx.init, out_shardings=shardings and shardings[1])(params)
    step, batches = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings), list(batches)
    step = step.lower(params, state, *jax.device_put(batches[0], batch_sharding)).compile()
    for batch in batches:
        # One step at a time: the devices are threads of a small pool, and wait for each other.
        batch = jax.device_put(batch, batch_sharding)
        params, state = jax.block_until_ready(step(params, state, *batch))
    return params, state, step.as_text()


def chained(tx):
    return adamjax.chain(adamjax.clip_by_global_norm(0.5), tx, adamjax.weight_ema(0.9))


def replica_results(mesh):
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    for name, make in RULES.items():
        if f"split {name}" not in REPLICAS:
            continue
        tx = chained(make())
        one_params, one_state, _ = trained_replicas(tx)
        expected = one_params, adamjax.averaged_weights(one_state)
        if f"whole {name}" in REPLICAS:
            params, state, _ = trained_replicas(tx, replicated, split)
            whole = (params, adamjax.averaged_weights(state))
            yield f"whole {name}", {"distance": distance(whole, expected)}
        tx = adamjax.shard_state(tx, mesh, "data")
        params, state, _ = trained_replicas(tx, replicated, split)
        yield (
            f"split {name}",
            {
                "distance": distance((params, adamjax.averaged_weights(state)), expected),
                "bytes": bytes_held(state),
                "bytes on one device": bytes_held(one_state),
                "bytes of whole leaves": sum(
                    bytes_held(x) for x in jax.tree.leaves(state) if x.shape in ((), (5,))
                ),
            },
        )
        if name == "adam":
            reduced = trained_replicas(tx, replicated, split, tx.value_and_grad(replica_loss))
            yield (
                "reduced",
                {
                    "distance": distance(reduced[0], one_params),
                    "collectives": collectives(reduced[2]),
                },
            )
            if not HAS_PINNED_HOST:
                continue
            pinned = tx.replace(memory_kind="pinned_host")
            pinned_params, pinned_state, _ = trained_replicas(pinned, replicated, split)
            m = jax.tree.leaves(adamjax.get_slot(pinned_state, "m"))
            kinds = {x.sharding.memory_kind for x in m}
            yield "pinned", {"distance": distance(pinned_params, params), "kinds": sorted(kinds)}


def aux_results(mesh):
    tx = adamjax.shard_state(adamjax.adam(0.1), mesh, "data")
    params, x = aux_case()
    gradient = tx.value_and_grad(aux_loss, has_aux=True)
    found, expected = jax.jit(gradient)(params, x)[0], aux_loss(params, x)
    _, eight = tx.value_and_grad(
        lambda params, x: (aux_loss(params, x)[0], (x[:, 0], jnp.mean(x, 0))), has_aux=True
    )(params, np.concatenate([x] * 4))[0]
    return {
        "distance": distance(found, expected),
        "same": all(map(np.array_equal, *(x[1]["of each example"] for x in (found, expected)))),
        "8 examples a device": [a.shape for a in eight] == [(64,), (8,)],
    }


# Tables.


def table_params():
    r = rng()
    return {
        "table": jnp.asarray(r.normal(size=(V, D)), jnp.float32),
        "w": jnp.asarray(r.normal(size=D), jnp.float32),
    }


def table_batches():
    r = rng()
    for _ in range(STEPS):
        # Some rows are read often, others rarely.
        yield (V * r.random(BATCH) ** 8).astype("i"), r.normal(size=BATCH).astype("f")


def table_loss(params, ids, y, **options):
    rows = params["table"].at[ids].get(**options) if options else params["table"][ids]
    return jnp.mean((rows @ params["w"] - y) ** 2)


def optimizer(mode, name):
    rows = {"rows": mode} if mode in ("dense", "lazy") else {}
    tx = adamjax.chain(adamjax.clip_by_global_norm(0.5), RULES[name](**rows))
    return adamjax.exact_rows(tx, "table") if mode == "exact" else tx


def table_step(mode, tx):
    def step(params, state, ids, y):
        extra = {}
        if mode == "exact":
            (_, grads), extra["ticket"] = tx.value_and_grad(table_loss)(params, state, ids, y)
        elif mode == "array":
            grads = jax.grad(table_loss)(params, ids, y)
        else:
            grads = adamjax.grad(table_loss, "table")(params, ids, y)
        updates, state = tx.update(grads, state, params, **extra)
        return adamjax.apply_updates(params, updates), state

    return step


def explicit_step(mode, tx):
    """With explicit reads: a read of a split table must set the sharding of its result."""

    def step(params, state, ids, y):
        extra = {}
        if mode == "exact":
            read, extra["ticket"] = tx.prepare(params, state, {"table": ids})
            rows = read["table"]
        else:
            rows = params["table"].at[ids].get(out_sharding=P())
        y = jax.sharding.reshard(y, P())

        def loss(rows, w):
            return jnp.mean((rows @ w - y) ** 2)

        of_rows, of_w = jax.grad(loss, argnums=(0, 1))(rows, params["w"])
        grads = {"table": adamjax.row_gradient(ids, of_rows, V), "w": of_w}
        updates, state = tx.update(grads, state, params, **extra)
        return adamjax.apply_updates(params, updates), state

    return step


def trained_tables(step, tx, mesh=None):
    """`trained`, with the parameters and batches of tables; and the shardings."""
    params, shardings, batch_sharding = table_params(), None, None
    if mesh is not None:
        split = batch_sharding = NamedSharding(mesh, P("data"))
        param_shardings = {"table": split, "w": NamedSharding(mesh, P())}
        params = jax.device_put(params, param_shardings)
        shardings = param_shardings, adamjax.state_shardings(tx, params, mesh)
    return *trained(step, tx, params, shardings, batch_sharding, table_batches()), shardings


@functools.cache
def on_one_device(mode, name):
    """Parameters, state, the text of the step, and the parameters with up-to-date rows."""
    tx = optimizer(mode, name)
    params, state, text, _ = trained_tables(table_step(mode, tx), tx)
    return params, state, text, up_to_date(tx, mode, params, state)


def up_to_date(tx, mode, params, state):
    return jax.jit(tx.flush)(params, state)[0] if mode == "exact" else params


def table_leaves(tree):
    """The leaves that are tables, or have an entry for each row of one."""
    return [x for x in jax.tree.leaves(tree) if x.shape[:1] == (V,)]


def tables_have(state, sharding):
    """Whether all `table_leaves` of the state have this sharding."""
    return all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in table_leaves(state))


def table_results(mesh):
    for case in TABLES:
        mode, name = case.split()
        tx = optimizer(mode, name)
        step = table_step(mode, tx)
        one_params, one_state, one_text, expected = on_one_device(mode, name)
        with jax.set_mesh(mesh):
            params, state, text, shardings = trained_tables(step, tx, mesh)
        latest = up_to_date(tx, mode, params, state)
        yield (
            case,
            {
                "distance": distance(latest, expected),
                "collectives": collectives(text),
                "holds a table": f"[{V},{D}]" in text,
                "one device holds a table": f"[{V},{D}]" in one_text,
                "bytes": bytes_held(table_leaves((params, state))),
                "bytes on one device": bytes_held(table_leaves((one_params, one_state))),
            },
        )
        if case != "exact adamw":
            continue
        with jax.set_mesh(mesh):
            flush = functools.partial(tx.flush, axis="data")
            flush = jax.jit(flush, out_shardings=shardings).lower(params, state).compile()
            flushed, _ = flush(params, state)
        yield (
            "flush",
            {
                "distance": distance(flushed, latest),
                "collectives": collectives(flush.as_text()),
            },
        )
        ids = jax.device_put(next(table_batches())[0], NamedSharding(mesh, P("data")))
        with jax.set_mesh(mesh):
            evaluate = adamjax.eval_step(lambda params, ids: params["table"][ids], tx, strict=True)
            evaluate = evaluate.lower(params, state, ids).compile()
            rows, text = evaluate(params, state, ids), evaluate.as_text()
        wanted = np.asarray(latest["table"])[np.asarray(ids)]
        yield (
            "evaluation",
            {
                "distance": distance(rows, wanted),
                "lags behind": distance(np.asarray(params["table"])[np.asarray(ids)], wanted),
                "collectives": collectives(text),
                "holds a table": f"[{V},{D}]" in text,
            },
        )


def explicit_results():
    mesh = explicit_mesh()
    for case in ("explicit exact", "explicit lazy"):
        mode = case.split()[1]
        tx = optimizer(mode, "adamw")
        *_, expected = on_one_device(mode, "adamw")
        with jax.set_mesh(mesh):
            params, state, *_ = trained_tables(explicit_step(mode, tx), tx, mesh)
            # With explicit axes, `flush` knows how rows are split without an argument `axis`.
            flushed, state = tx.flush(params, state) if mode == "exact" else (params, state)
        slots = [adamjax.get_slot(state, name) for name in ("m", "v")]
        yield (
            case,
            {
                "distance": distance(flushed, expected),
                "specs": [list(tree["table"].sharding.spec)[:1] for tree in (flushed, *slots)],
            },
        )


def split_losses():
    """By name, a loss, and the spec of its indices and targets."""

    def rows(spec):
        return functools.partial(table_loss, out_sharding=spec)

    return {
        "whole": (rows(P()), P()),
        "split": (rows(P("data")), P("data")),
        "all rows": (
            lambda params, ids, y: jnp.mean(params["table"] ** 2) + params["w"].sum(),
            P(),
        ),
    }


def explicit_loss_results():
    """`train_step` on a mesh with explicit axes and on one device."""
    mesh = explicit_mesh()
    table = NamedSharding(mesh, P("data"))
    tx = adamjax.exact_rows(adamjax.chain(adamjax.adamw(0.1), adamjax.weight_ema(0.9)), "table")
    ids, y = np.arange(16) % 5, np.ones(16, np.float32)

    def trained(loss, *batch):
        params = table_params()
        if batch:
            params = jax.device_put(params, {"table": table, "w": NamedSharding(mesh, P())})
        batch = batch or (jnp.asarray(ids), jnp.asarray(y))
        state, step = tx.init(params), adamjax.train_step(loss, tx)
        for _ in range(4):
            params, state, _ = step(params, state, *batch)
        return tx.flush(params, state)[0]

    of_rows = trained(table_loss)
    for name, (loss, spec) in split_losses().items():
        one = trained(loss) if name == "all rows" else of_rows
        with jax.set_mesh(mesh):
            many = trained(loss, *jax.device_put((ids, y), NamedSharding(mesh, spec)))
        yield f"explicit, {name}", {"distance": distance(many, one)}


def init_results(mesh):
    """Whether each kind of `init` makes slots with the shardings of their parameters."""
    split = NamedSharding(mesh, P("data"))
    params = jax.device_put(table_params(), {"table": split, "w": NamedSharding(mesh, P())})
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    tx = chained(adamjax.amsgrad(0.1))
    exact = adamjax.exact_rows(adamjax.chain(adamjax.adam(0.1)), "table")
    accumulating = adamjax.accumulate_gradients(tx, 2)
    made = {
        "not jitted": tx.init(params),
        "jitted": jax.jit(tx.init)(params),
        "exact rows": exact.init(params),
        "exact rows, jitted": jax.jit(exact.init)(params),
        "accumulating, jitted": jax.jit(accumulating.init)(params),
        "out_shardings": jax.jit(tx.init, out_shardings=adamjax.state_shardings(tx, params, mesh))(
            params
        ),
        "shapes": exact.init(shapes),
    }
    return {name: tables_have(state, split) for name, state in made.items()}


def init_results_without_set_mesh(mesh):
    """The same on a mesh with explicit axes, without `jax.set_mesh`."""
    split = NamedSharding(mesh, P("data"))
    params = {"table": jax.device_put(table_params()["table"], split)}
    adam = adamjax.adam(0.1)
    exact = adamjax.exact_rows(adam, "table")
    made = {
        "not jitted": adam.init(params),
        "exact rows": exact.init(params),
        "from dense": exact.from_dense(adam.init(params), params),
        "8 bits": adamjax.adam(0.1, m_dtype="scaled8", v_dtype="scaled8").init(params),
    }
    return {name: tables_have(state, split) for name, state in made.items()}


def unread_results(mesh):
    """Whether jitted `init`s make zeros, split like parameters, and read no parameter.

    The parameters are not finite.
    """
    split = NamedSharding(mesh, P("data"))
    kinds = [(jnp.nan, jnp.float32), (jnp.inf, jnp.bfloat16), (jnp.nan, jnp.complex64)]
    params = [jax.device_put(jnp.full((V, D), x, dtype), split) for x, dtype in kinds]
    adam = adamjax.adam(0.1)
    exact = adamjax.exact_rows(adam, "t")

    def zero_and_split(state):
        return {
            "zero": not any(np.any(x) for x in table_leaves(state) if x.ndim > 1),
            "split": tables_have(state, split),
        }

    def case(init, params):
        compiled = jax.jit(init).lower(params).compile()
        entry = compiled.as_text().partition("\nENTRY ")[2]
        names = re.findall(r"(\S+) = \S+ parameter\(", entry)
        read = [x for x in names if re.search(rf"[(, ]{re.escape(x)}[,)]", entry)]
        return {**zero_and_split(compiled(params)), "unread": bool(names) and not read}

    def table_and_state(key):
        table = jax.random.normal(key, (V, D))
        return table, adam.init(table)

    found = {
        "plain": case(adam.init, params),
        "exact rows": case(exact.init, {"t": params[0]}),
        "parameters made in jit": zero_and_split(
            jax.jit(table_and_state, out_shardings=(split, None))(jax.random.key(0))[1]
        ),
    }
    if HAS_PINNED_HOST:
        host = split.with_memory_kind("pinned_host")
        found["host"] = case(adam.init, jax.device_put(params, host))
    return found


# Narrow moments.


def narrow_steps(tx, params, put=lambda x: x, shardings=None):
    """Parameters and state after five steps, whose gradients do not depend on the devices.

    Args:
      put: puts a gradient onto the devices.
      shardings: those of the parameters and of the state.
    """

    def step(g, state, params):
        updates, state = tx.update(g, state, params)
        return adamjax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=shardings)
    state = jax.jit(tx.init, out_shardings=shardings and shardings[1])(params)
    for t in range(5):
        grads = {
            k: put(np.sin(t + 3.0 * np.arange(p.size)).reshape(p.shape).astype(p.dtype))
            for k, p in params.items()
        }
        if "t" in grads:
            ids = jnp.asarray((7 * t + 11 * np.arange(32)) % V)
            values = jnp.asarray(np.cos(np.arange(32.0 * D)).reshape(32, D), jnp.float32)
            grads = {"t": adamjax.row_gradient(ids, values, V)}
        params, state = step(grads, state, params)
    return params, state


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def narrow_case(mesh, name, m, v):
    tx = adamjax.adam(1e-2, m_dtype=m, v_dtype=v, rows="lazy")
    rows, columns = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "data"))
    whole = NamedSharding(mesh, P())
    params = {"w": jnp.ones((24, 16)), "b": jnp.ones(8 * 2048), "odd": jnp.ones(16)}
    narrow = {k: p.astype(jnp.bfloat16) for k, p in params.items()}
    table = {"t": jnp.ones((V, D))}

    matrices = {k: jnp.ones((24, 16)) for k in "uw"}
    sharded = adamjax.shard_state(tx, mesh, "data")
    master = adamjax.master_weights(tx)
    sharded_master = adamjax.shard_state(master, mesh, "data")
    exact = adamjax.exact_rows(tx, "t")
    # The transforms on one device and on the mesh; the parameters and their sharding on the mesh.
    one_tx, many_tx, params, split = {
        "split": (tx, tx, params, rows),
        "columns": (tx, tx, matrices, columns),
        "shard_state": (tx, sharded, params, whole),
        "shard_state of master_weights": (master, sharded_master, narrow, whole),
        "lazy": (tx, tx, table, rows),
        "exact": (exact, exact, table, rows),
    }[name]

    one_params, one_state = narrow_steps(one_tx, params)
    placed = jax.tree.map(lambda p: jax.device_put(p, split), params)
    shardings = None
    if "t" not in params:
        param_shardings = jax.tree.map(lambda _: split, params)
        shardings = param_shardings, adamjax.state_shardings(many_tx, placed, mesh)
    many_params, many_state = narrow_steps(
        many_tx, placed, lambda x: jax.device_put(x, split), shardings
    )
    large = [x for x in jax.tree.leaves(many_state) if x.size >= DEVICES and x.ndim]
    num_parts = [len({str(s.index) for s in x.addressable_shards}) for x in large]
    return {
        "state": same_bits(many_state, one_state),
        "params": same_bits(many_params, one_params),
        "split": max(num_parts) == DEVICES,
    }


def narrow_results(mesh):
    found, explicit = {}, explicit_mesh()
    for case, dtypes in NARROW.items():
        for m, v in dtypes:
            if case.startswith("explicit"):
                with jax.set_mesh(explicit):
                    result = narrow_case(explicit, case.removeprefix("explicit "), m, v)
            else:
                result = narrow_case(mesh, case, m, v)
            found[f"{case}, {m}, {v}"] = result
    return found


def main():
    mesh = mesh_of()
    cases = dict(replica_results(mesh)) | dict(table_results(mesh)) | {"init": init_results(mesh)}
    cases["aux"] = aux_results(mesh)
    cases["unread"] = unread_results(mesh)
    cases["narrow"] = narrow_results(mesh)
    explicit = explicit_mesh()
    cases |= dict(explicit_results()) | dict(explicit_loss_results())
    with jax.set_mesh(explicit):
        cases["explicit init"] = init_results(explicit)
    cases["explicit init without set_mesh"] = init_results_without_set_mesh(explicit)
    print(json.dumps(cases))


if __name__ == "__main__":
    main()


DONATED_TWICE = """
import jax, jax.numpy as jnp, adamjax
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.sharding.Mesh(jax.devices(), "data")
step = adamjax.train_step(lambda p: jnp.sum(p["w"] ** 2), adamjax.adam(0.1))
with jax.set_mesh(mesh):
    params = {"w": jax.device_put(jnp.ones(16), NamedSharding(mesh, P("data")))}
    state = adamjax.adam(0.1).init(params)
    step(params, state)
    try:
        step(params, state)
    except ValueError as error:
        print(error)
    one = jax.device_put(jnp.ones(16), NamedSharding(mesh, P("data")))
    twice = {"w": one, "z": one}
    try:
        step(twice, adamjax.adam(0.1).init(twice))
    except ValueError as error:
        print(error)
    keeping = adamjax.train_step(lambda p: jnp.sum(p["w"]), adamjax.adam(0.1), donate_argnums=())
    keeping(twice, adamjax.adam(0.1).init(twice))
"""


def test_an_array_that_was_donated_under_a_mesh_is_an_error():
    """Without this error, JAX 0.10 crashes."""
    printed = run_on_devices(DEVICES, DONATED_TWICE)
    assert "train_step: params['w'] is deleted, as a step that donates" in printed
    assert "train_step: params['z'] is the same array as params['w']" in printed


SPLIT_UNDER_JIT = """
import jax, jax.numpy as jnp, adamjax
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.sharding.Mesh(jax.devices(), "data")
start = {"w": jax.device_put(jnp.ones((512, 64)), NamedSharding(mesh, P()))}
adamw = adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adamw(0.1), adamjax.weight_ema(0.9))

def loss_fn(params, x):
    return jnp.mean((x @ params["w"]) ** 2)

def shapes(params, state):
    slots = [adamjax.get_slot(state, name)["w"] for name in ("m", "v")]
    slots.append(adamjax.averaged_weights(state)["w"])
    return [x.addressable_shards[0].data.shape for x in (params["w"], *slots)]

for tx in (adamw, adamjax.skip_not_finite(adamw), adamjax.accumulate_gradients(adamw, 2)):
    tx = adamjax.shard_state(tx, mesh, "data")
    for init in (tx.init, jax.jit(tx.init)):
        params, state = jax.tree.map(jnp.copy, start), init(start)
        step = adamjax.train_step(loss_fn, tx)
        found = [shapes(params, state)]
        for _ in range(2):
            params, state, _ = step(params, state, jnp.ones((32, 512)))
            found.append(shapes(params, state))
        assert found == [[(512, 64), *[(64, 64)] * 3]] * 3, (tx, init, found)
"""


def test_a_state_is_split_under_jit():
    """In `jit`, `jax.device_put` does not split an array over automatic axes."""
    run_on_devices(DEVICES, SPLIT_UNDER_JIT)


ONE_PROGRAM = """
import jax, jax.numpy as jnp, adamjax
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.sharding.Mesh(jax.devices(), "data")
whole, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
start = {"table": jnp.ones((64, 8)), "w": jnp.ones((16, 8))}

def loss_fn(params, ids):
    return jnp.mean((params["table"][ids] @ params["w"].T) ** 2)

adamw = adamjax.adamw(0.1)
for tx, table in (
    (adamw, by_rows),
    (adamjax.exact_rows(adamw, "table"), by_rows),
    (adamjax.shard_state(adamw, mesh, "data"), whole),
):
    params = jax.device_put(start, {"table": table, "w": whole})
    shardings = adamjax.state_shardings(tx, params, mesh)
    for init in (jax.jit(tx.init), jax.jit(tx.init, out_shardings=shardings)):
        params = jax.device_put(start, {"table": table, "w": whole})
        step, state = adamjax.train_step(loss_fn, tx, donate_argnums=()), init(params)
        for _ in range(3):
            params, state, _ = step(params, state, jnp.arange(8))
        assert step._cache_size() == 1, (tx, step._cache_size())
"""


CONVERTED = """
import jax, jax.numpy as jnp, optax, adamjax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    shardings = {"a": NamedSharding(mesh, P("data")), "b": NamedSharding(mesh, P())}
    params = jax.device_put({"a": jnp.ones((16, 4)), "b": jnp.ones(3)}, shardings)
    theirs, ours = optax.adam(0.1), adamjax.adam(0.1, eps=1e-8)
    _, old = theirs.update(params, theirs.init(params), params)
    state = adamjax.convert.from_optax(old, ours, params, theirs)
    assert state[0].m["a"].sharding == params["a"].sharding
    try:
        adamjax.convert.from_optax(old, adamjax.adam(0.2, eps=1e-8), params, theirs)
    except ValueError as error:
        assert "tx moves an element of 'a'" in str(error)
    else:
        raise AssertionError("a tx with another rate was accepted")
"""


def test_states_on_a_mesh_are_converted():
    run_on_devices(DEVICES, CONVERTED)


def test_the_step_of_a_state_from_jit_compiles_once():
    run_on_devices(DEVICES, ONE_PROGRAM)


GUARDS_ON_MESHES = """
import jax, jax.numpy as jnp, numpy as np, adamjax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

start = {"table": jnp.ones((8, 2)), "w": jnp.ones((4, 2))}
accumulating = adamjax.accumulate_gradients(adamjax.adamw(0.1, rows="lazy"), 2, {"table": 8})
tx = adamjax.skip_not_finite(accumulating)

def after_four_calls(params, dense):
    state, update = tx.init(params), jax.jit(tx.update)
    for ids in ([0, 5], [5, 9], [6, 6], [0, 6]):
        rows = adamjax.row_gradient(jnp.array(ids), jnp.ones((2, 2)), 8)
        table = params["table"] * len(ids) if dense else rows
        updates, state = update({"table": table, "w": params["w"]}, state, params)
        params = adamjax.apply_updates(params, updates)
    return params, state.inner.total["table"]

for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    for spec in (P("data"), P(None, "data")):
        with jax.set_mesh(mesh):
            params = jax.device_put(start, NamedSharding(mesh, spec))
            shardings = adamjax.state_shardings(tx, params, mesh).inner.total["table"]
            assert shardings.values.is_equivalent_to(NamedSharding(mesh, spec), 2)
            assert shardings.indices.is_equivalent_to(NamedSharding(mesh, P(spec[0])), 1)
            found = {dense: after_four_calls(params, dense) for dense in (False, True)}
        for dense, (params, total) in found.items():
            assert total.values.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
            expected, _ = after_four_calls(start, dense)
            for name, x in expected.items():
                np.testing.assert_allclose(np.asarray(params[name]), x, rtol=1e-6)
"""


@pytest.mark.slow
def test_guards_on_meshes_accept_row_gradients_and_dense_ones():
    """Explicit axes are part of types, and a call without a step must return the same types."""
    run_on_devices(2, GUARDS_ON_MESHES)
