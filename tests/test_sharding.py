"""States and tables on a mesh: what eight devices do is what one does, and what it costs them."""

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
# Devices add in another order, and a step magnifies the rounding errors of its gradient.
CLOSE = 1e-5

RULES = {
    "adam": functools.partial(adamjax.adam, 1e-2),
    "amsgrad": functools.partial(adamjax.amsgrad, 1e-2),
    "adamw": functools.partial(adamjax.adamw, 1e-2, weight_decay=0.1),
    "adamax": functools.partial(adamjax.adamax, 1e-2),
    "nadam": functools.partial(adamjax.nadam, 1e-2),
}
# Each kind of state once. A step with a whole state does not depend on the mesh, so one rule is
# enough for it.
REPLICAS = ["whole adam", *(f"split {name}" for name in RULES if name != "adamw")]
# The mode of the rows and the rule. Exact rows have a computation for each rule. The other modes
# apply any rule to the rows of its slots, so each of them gets rules that differ: one decays
# weights, one has a third slot, one has no `v` and one a scalar more.
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
PINNED = jax.__version_info__ >= (0, 10) and "pinned_host" in [
    memory.kind for memory in jax.devices()[0].addressable_memories()
]


@pytest.fixture(scope="module")
def found():
    """The results of each case, from a process of its own with several devices."""
    output = run_on_devices(DEVICES, "import test_sharding; test_sharding.main()")
    return json.loads(output.splitlines()[-1])


# --- what is asserted -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", REPLICAS)
def test_replicas_do_what_one_device_does(found, case):
    assert found[case]["distance"] < CLOSE


@pytest.mark.parametrize("case", [case for case in REPLICAS if case.startswith("split")])
def test_a_device_holds_its_share_of_a_split_state(found, case):
    """Each device has all scalars, and all leaves that do not divide."""
    whole = found[case]["bytes of one"]
    assert found[case]["bytes"] - found[case]["odd"] == (whole - found[case]["odd"]) / DEVICES


def test_gradients_are_reduce_scattered_and_updates_gathered(found):
    program = found["reduced"]["program"]
    sizes = {kind: [x for k, x in program if k == kind] for kind in dict(program)}
    assert found["reduced"]["distance"] < CLOSE
    # The parts of two parameters; their updates.
    assert sizes["reduce-scatter"] == [3, 48]
    assert sizes["all-gather"] == [24, 384]
    # The loss, the norm, and what does not divide.
    assert max(sizes["all-reduce"]) <= 5


@pytest.mark.parametrize("case", TABLES)
def test_row_sharded_tables_move_as_on_one_device(found, case):
    assert found[case]["distance"] < CLOSE
    assert found[case]["bytes"] * DEVICES == found[case]["bytes of one"]


@pytest.mark.parametrize("case", TABLES)
def test_devices_exchange_rows_and_never_tables(found, case):
    """At most the rows that are touched, of weights and slots, in one piece."""
    assert found[case]["program"]
    assert max(size for _, size in found[case]["program"]) <= 2 * BATCH * D
    assert not found[case]["holds a table"]


def test_an_array_of_a_table_would_be_seen(found):
    assert found["exact adamw"]["one holds a table"]


def test_evaluation_exchanges_rows_and_never_tables(found):
    assert found["evaluation"]["distance"] < 1e-6
    assert found["evaluation"]["lags behind"] > 1e-3
    assert found["evaluation"]["program"]
    assert max(size for _, size in found["evaluation"]["program"]) <= 2 * BATCH * D
    assert not found["evaluation"]["holds a table"]


def test_devices_flush_their_own_rows(found):
    assert found["flush"]["program"] == []
    assert found["flush"]["distance"] < 1e-6


@pytest.mark.parametrize("case", ["explicit exact", "explicit lazy"])
def test_meshes_with_explicit_axes(found, case):
    assert found[case]["distance"] < CLOSE
    assert found[case]["specs"] == 3 * [["data"]]


@pytest.mark.parametrize("loss", ["whole", "split", "all rows"])
def test_any_loss_on_a_mesh_with_explicit_axes(found, loss):
    """The table's gradient is an array there: all rows are brought up to date."""
    assert found[f"explicit, {loss}"]["distance"] < CLOSE


@pytest.mark.parametrize("case", ["init", "explicit init", "explicit init without set_mesh"])
def test_init_follows_the_parameters(found, case):
    assert all(found[case].values()), found[case]


@pytest.mark.parametrize("case", ["plain", "exact rows", "of what jit makes", "host"])
def test_a_jitted_init_reads_no_parameter(found, case):
    """Slots are split like their parameters, but not computed from them: these are NaN or inf."""
    if case == "host" and not PINNED:
        pytest.skip("this platform has no pinned_host memory")
    assert all(found["unread"][case].values()), found["unread"][case]


@pytest.mark.parametrize(
    ("case", "m", "v"), [(case, m, v) for case, dtypes in NARROW.items() for m, v in dtypes]
)
def test_narrow_moments_are_the_same_bits_on_a_mesh(found, case, m, v):
    """As their random bits are a hash of the step, the leaf and the element."""
    assert all(found["narrow"][f"{case}, {m}, {v}"].values()), found["narrow"]


@pytest.mark.skipif(not PINNED, reason="this platform has no pinned_host memory")
def test_a_state_in_the_hosts_memory(found):
    assert found["pinned"]["kinds"] == ["pinned_host"]
    assert found["pinned"]["distance"] == 0


# --- in one process, without several devices ------------------------------------------------------


def mesh_of(axes=("data",), **kinds):
    shape = (jax.device_count(), *(1 for _ in axes[1:]))
    return Mesh(np.array(jax.devices()).reshape(shape), axes, **kinds)


def explicit_mesh():
    return mesh_of(axis_types=(jax.sharding.AxisType.Explicit,))


def test_shardings_have_the_states_structure():
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
    # Without `None` at the end, as `jit` returns arrays.
    assert slots == {"none": None, "table": NamedSharding(mesh, P("data")), "w": columns}
    assert found[0].last["table"].spec == P("data")
    assert found[0].clock.spec == P()


def test_a_wrong_axis_is_refused():
    with pytest.raises(ValueError, match=r"the mesh has no axis 'model', it has \['data'\]"):
        adamjax.shard_state(adamjax.adam(0.1), mesh_of(), "model")


def aux_loss(params, x):
    """A mean of the batch with what one may want besides."""
    y = x @ params["w"] + params["n"]
    return jnp.mean(y**2), {
        "mean": jnp.mean(y),
        "columns": jnp.mean(x, axis=0),
        "examples": y,
        "right": (y > 0, jnp.outer(y, jnp.arange(3)).reshape(-1).astype(int)),
        "none": None,
    }


def aux_case():
    params = {"w": jnp.arange(8.0), "n": jnp.array(3), "none": None}
    return params, rng().normal(size=(2 * 8, 8)).astype("f")


def test_aux_is_that_of_the_whole_batch(found):
    """Means are averaged over the devices; values of each example are joined, also integers."""
    assert found["aux"]["distance"] < CLOSE
    assert found["aux"]["same"]
    # With 8 examples a device, and a dimension of size 8 that is not that of the batch.
    assert found["aux"]["8 examples a device"]


@pytest.mark.parametrize(
    ("aux", "what"),
    [
        (lambda x: {"n": jnp.sum(x > 0)}, r"aux\['n'\] is int32\[\].*expected a float"),
        (lambda x: {"n": 3}, r"aux\['n'\] is int.*\[\].*expected a float"),
        (lambda x: jnp.any(x > 0), "is bool"),
        (lambda x: "a word", "is a str"),
        (lambda x: [x[:, :2].T], r"aux\['0'\].*\[2, 16\] with twice the batch"),
        (lambda x: x.reshape(8, 8), "the loss is traced with twice the batch, which failed"),
    ],
)
def test_aux_that_is_of_each_device_is_refused(aux, what):
    """Also where there is one device, so that it does not depend on their number."""
    tx = adamjax.shard_state(adamjax.adam(0.1), mesh_of(), "data")
    gradient = tx.value_and_grad(lambda w, x: (jnp.mean(w * x), aux(x)), has_aux=True)
    with pytest.raises(ValueError, match=what):
        gradient(jnp.ones(8), jnp.ones((8 * jax.device_count(), 8)))


def test_leaves_that_are_no_floats_have_no_gradient():
    tx = adamjax.shard_state(adamjax.adam(0.1), mesh_of(), "data")
    params, x = aux_case()
    (value, aux), grads = tx.value_and_grad(aux_loss, has_aux=True)(params, x)
    (expected, more), of_w = jax.value_and_grad(
        lambda w: aux_loss({**params, "w": w}, x), has_aux=True
    )(params["w"])
    assert [grads["n"], grads["none"]] == [None, None]
    assert distance((value, grads["w"], aux), (expected, of_w, more)) < CLOSE
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


# --- in the process with several devices ----------------------------------------------------------


def rng():
    return np.random.default_rng(0)


def distance(a, b):
    """The largest difference, divided by the largest number of its leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    wide = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in wide)


def bytes_held(tree, device=0):
    """Bytes of all arrays that a device holds."""
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == jax.devices()[device])


def exchanged(text):
    """Each collective of a program, and the elements of each of its results."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = []
    for results, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        found += [[kind, elements(x)] for x in re.findall(r"\w\[([\d,]*)\]", results)]
    return sorted(found)


def elements(dimensions):
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


def replicas(tx, placed=None, batch_sharding=None, gradient=None):
    """Parameters and state after all steps, and the program of one."""
    gradient = gradient or jax.value_and_grad(replica_loss)

    def step(params, state, x, y):
        _, grads = gradient(params, x, y)
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    params, shardings = jax.device_put(replica_params(), placed), None
    if placed is not None:
        state_shardings = adamjax.state_shardings(tx, params, placed.mesh)
        shardings = jax.tree.map(lambda _: placed, params), state_shardings
    return trained(step, tx, params, shardings, batch_sharding, replica_batches())


def trained(step, tx, params, shardings, batch_sharding, batches):
    """Parameters and state after all steps, and the program of one."""
    state = jax.jit(tx.init, out_shardings=shardings and shardings[1])(params)
    step, batches = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings), list(batches)
    step = step.lower(params, state, *jax.device_put(batches[0], batch_sharding)).compile()
    for batch in batches:
        # One at a time: devices that are threads wait for each other, and there are only so many.
        batch = jax.device_put(batch, batch_sharding)
        params, state = jax.block_until_ready(step(params, state, *batch))
    return params, state, step.as_text()


def chained(tx):
    return adamjax.chain(adamjax.clip_by_global_norm(0.5), tx, adamjax.weight_ema(0.9))


def all_replicas(mesh):
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    for name, make in RULES.items():
        if f"split {name}" not in REPLICAS:
            continue
        tx = chained(make())
        one_params, one_state, _ = replicas(tx)
        expected = one_params, adamjax.averaged_weights(one_state)
        if f"whole {name}" in REPLICAS:
            params, state, _ = replicas(tx, everywhere, split)
            whole = (params, adamjax.averaged_weights(state))
            yield f"whole {name}", {"distance": distance(whole, expected)}
        tx = adamjax.shard_state(tx, mesh, "data")
        params, state, _ = replicas(tx, everywhere, split)
        yield (
            f"split {name}",
            {
                "distance": distance((params, adamjax.averaged_weights(state)), expected),
                "bytes": bytes_held(state),
                "bytes of one": bytes_held(one_state),
                "odd": sum(bytes_held(x) for x in jax.tree.leaves(state) if x.shape in ((), (5,))),
            },
        )
        if name == "adam":
            reduced = replicas(tx, everywhere, split, tx.value_and_grad(replica_loss))
            yield (
                "reduced",
                {"distance": distance(reduced[0], one_params), "program": exchanged(reduced[2])},
            )
            if not PINNED:
                continue
            pinned = tx.replace(memory_kind="pinned_host")
            params_, state_, _ = replicas(pinned, everywhere, split)
            kinds = {x.sharding.memory_kind for x in jax.tree.leaves(adamjax.get_slot(state_, "m"))}
            yield "pinned", {"distance": distance(params_, params), "kinds": sorted(kinds)}


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
        "same": all(map(np.array_equal, found[1]["right"], expected[1]["right"])),
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
        # Frequent rows, and some that are read once in a while.
        yield (V * r.random(BATCH) ** 8).astype("i"), r.normal(size=BATCH).astype("f")


def table_loss(params, ids, y, **how):
    rows = params["table"].at[ids].get(**how) if how else params["table"][ids]
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
    """By rows that are read by hand, as reads of a split table must say how they are split."""

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


def tables(step, tx, mesh=None):
    """Parameters and state after all steps, the program of one, and how they are split."""
    params, shardings, batch_sharding = table_params(), None, None
    if mesh is not None:
        split = batch_sharding = NamedSharding(mesh, P("data"))
        param_shardings = {"table": split, "w": NamedSharding(mesh, P())}
        params = jax.device_put(params, param_shardings)
        shardings = param_shardings, adamjax.state_shardings(tx, params, mesh)
    return *trained(step, tx, params, shardings, batch_sharding, table_batches()), shardings


@functools.cache
def on_one_device(mode, name):
    """What `tables` gives, and all rows as they are after the last step."""
    tx = optimizer(mode, name)
    params, state, text, _ = tables(table_step(mode, tx), tx)
    return params, state, text, up_to_date(tx, mode, params, state)


def up_to_date(tx, mode, params, state):
    return jax.jit(tx.flush)(params, state)[0] if mode == "exact" else params


def table_leaves(tree):
    """The leaves that are tables, or have an entry for each row of one."""
    return [x for x in jax.tree.leaves(tree) if x.shape[:1] == (V,)]


def tables_have(state, sharding):
    """Whether the state's leaves of `table_leaves` have a sharding."""
    return all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in table_leaves(state))


def all_tables(mesh):
    for case in TABLES:
        mode, name = case.split()
        tx = optimizer(mode, name)
        step = table_step(mode, tx)
        one_params, one_state, one_text, expected = on_one_device(mode, name)
        with jax.set_mesh(mesh):
            params, state, text, shardings = tables(step, tx, mesh)
        latest = up_to_date(tx, mode, params, state)
        yield (
            case,
            {
                "distance": distance(latest, expected),
                "program": exchanged(text),
                "holds a table": f"[{V},{D}]" in text,
                "one holds a table": f"[{V},{D}]" in one_text,
                "bytes": bytes_held(table_leaves((params, state))),
                "bytes of one": bytes_held(table_leaves((one_params, one_state))),
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
                "program": exchanged(flush.as_text()),
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
                "program": exchanged(text),
                "holds a table": f"[{V},{D}]" in text,
            },
        )


def explicit_cases():
    mesh = explicit_mesh()
    for case in ("explicit exact", "explicit lazy"):
        mode = case.split()[1]
        tx = optimizer(mode, "adamw")
        *_, expected = on_one_device(mode, "adamw")
        with jax.set_mesh(mesh):
            params, state, *_ = tables(explicit_step(mode, tx), tx, mesh)
            # As their rows are known to be split, each device flushes its own.
            params_, state = tx.flush(params, state) if mode == "exact" else (params, state)
        slots = [adamjax.get_slot(state, name) for name in ("m", "v")]
        yield (
            case,
            {
                "distance": distance(params_, expected),
                "specs": [list(tree["table"].sharding.spec)[:1] for tree in (params_, *slots)],
            },
        )


def split_losses():
    """A loss by name, with indices and values split over the mesh or not."""

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


def explicit_losses():
    """`train_step` on a mesh with explicit axes, where the table's gradient is an array."""
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
    """Whether each kind of `init` gives every slot the sharding of its parameter."""
    split = NamedSharding(mesh, P("data"))
    params = jax.device_put(table_params(), {"table": split, "w": NamedSharding(mesh, P())})
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    tx = chained(adamjax.amsgrad(0.1))
    exact = adamjax.exact_rows(adamjax.chain(adamjax.adam(0.1)), "table")
    rows = adamjax.accumulate_gradients(tx, 2)
    made = {
        "as it is": tx.init(params),
        "jitted": jax.jit(tx.init)(params),
        "exact rows": exact.init(params),
        "exact rows, jitted": jax.jit(exact.init)(params),
        "accumulating, jitted": jax.jit(rows.init)(params),
        "by shardings": jax.jit(tx.init, out_shardings=adamjax.state_shardings(tx, params, mesh))(
            params
        ),
    }
    made["of shapes"] = exact.init(shapes)
    return {name: tables_have(state, split) for name, state in made.items()}


def init_results_without_set_mesh(mesh):
    """Whether `init` does so on a mesh with explicit axes if `jax.set_mesh` is not called."""
    split = NamedSharding(mesh, P("data"))
    params = {"table": jax.device_put(table_params()["table"], split)}
    adam = adamjax.adam(0.1)
    exact = adamjax.exact_rows(adam, "table")
    made = {
        "as it is": adam.init(params),
        "exact rows": exact.init(params),
        "from dense": exact.from_dense(adam.init(params), params),
        "8 bits": adamjax.adam(0.1, m_dtype="scaled8", v_dtype="scaled8").init(params),
    }
    return {name: tables_have(state, split) for name, state in made.items()}


def unread_results(mesh):
    """What jitted `init`s make of parameters that are not finite, and whether they read them."""
    split = NamedSharding(mesh, P("data"))
    odd = [(jnp.nan, jnp.float32), (jnp.inf, jnp.bfloat16), (jnp.nan, jnp.complex64)]
    params = [jax.device_put(jnp.full((V, D), x, dtype), split) for x, dtype in odd]
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

    def made(key):
        table = jax.random.normal(key, (V, D))
        return table, adam.init(table)

    found = {
        "plain": case(adam.init, params),
        "exact rows": case(exact.init, {"t": params[0]}),
        "of what jit makes": zero_and_split(
            jax.jit(made, out_shardings=(split, None))(jax.random.key(0))[1]
        ),
    }
    if PINNED:
        host = split.with_memory_kind("pinned_host")
        found["host"] = case(adam.init, jax.device_put(params, host))
    return found


# Narrow moments.


def narrow_steps(tx, params, put=lambda x: x, shardings=None):
    """Parameters and state after some steps with the same gradients on any devices.

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
    # The transform on one device, that on the mesh, the parameters and their sharding on the mesh.
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
    spread = [x for x in jax.tree.leaves(many_state) if x.size >= DEVICES and x.ndim]
    held = [len({str(s.index) for s in x.addressable_shards}) for x in spread]
    return {
        "state": same_bits(many_state, one_state),
        "params": same_bits(many_params, one_params),
        "split": max(held) == DEVICES,
    }


def narrow_results(mesh):
    found, explicit = {}, explicit_mesh()
    for case, dtypes in NARROW.items():
        for m, v in dtypes:
            if case.startswith("explicit"):
                with jax.set_mesh(explicit):
                    one = narrow_case(explicit, case.removeprefix("explicit "), m, v)
            else:
                one = narrow_case(mesh, case, m, v)
            found[f"{case}, {m}, {v}"] = one
    return found


def main():
    mesh = mesh_of()
    cases = dict(all_replicas(mesh)) | dict(all_tables(mesh)) | {"init": init_results(mesh)}
    cases["aux"] = aux_results(mesh)
    cases["unread"] = unread_results(mesh)
    cases["narrow"] = narrow_results(mesh)
    explicit = explicit_mesh()
    cases |= dict(explicit_cases()) | dict(explicit_losses())
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
    """JAX 0.10 crashes there."""
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
        of_each = [shapes(params, state)]
        for _ in range(2):
            params, state, _ = step(params, state, jnp.ones((32, 512)))
            of_each.append(shapes(params, state))
        assert of_each == [[(512, 64), *[(64, 64)] * 3]] * 3, (tx, init, of_each)
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
        raise AssertionError("another rate was taken")
"""


def test_states_on_a_mesh_are_converted():
    run_on_devices(DEVICES, CONVERTED)


def test_the_step_of_a_state_from_jit_compiles_once():
    run_on_devices(DEVICES, ONE_PROGRAM)


GUARDED = """
import jax, jax.numpy as jnp, numpy as np, adamjax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

start = {"table": jnp.ones((8, 2)), "w": jnp.ones((4, 2))}
lazy = adamjax.accumulate_gradients(adamjax.adamw(0.1, rows="lazy"), 2, {"table": 8})
tx = adamjax.skip_not_finite(lazy)

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
def test_guards_on_meshes_take_rows_and_dense_gradients():
    """Also where the axes are explicit: then a call without a step must return the same types."""
    run_on_devices(2, GUARDED)
