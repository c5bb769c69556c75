"""Steps on tables, compiled for a TPU by its own compiler without there being one.

What is asserted is what the compiler says about its program: nothing in it makes an array of a
table's size but the scatters into the table that was donated, and the bytes it will take.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import adamjax

NUM_ROWS, NUM_IDS = 1_000_000, 8192
# What a TPU pads a row to 128 elements by.
PADDED = {16: 8, 32: 4, 64: 2, 100: 1.28, 128: 1, 256: 1, 300: 1.28}
# Rows of a packed table. One of 16 columns is longer, as one that fits in the TPU's fast memory is
# moved there as a whole.
PACKED = {16: 4_000_000, 32: NUM_ROWS, 64: NUM_ROWS, 100: NUM_ROWS, 300: NUM_ROWS}
CASES = [
    *((kind, width, NUM_ROWS) for kind in ("lazy", "exact") for width in PADDED),
    *(("packed", width, num_rows) for width, num_rows in PACKED.items()),
    *((kind, 64, NUM_ROWS) for kind in ("decayed", "init", "lookup", "flush", "not row-major")),
    *((kind, 64, NUM_ROWS) for kind in ("followed lazy", "followed exact")),
]


@pytest.fixture(scope="module")
def compiled():
    """What the compiler says about each case; it may end the process, so it gets one of its own."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which has the TPU's compiler, is not installed: make test-tpu")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "LIBTPU_"))}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Compilers do not get into each other's way as users of a TPU do.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__],
        env=env,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {tuple(case): found for case, found in json.loads(done.stdout.splitlines()[-1])}


IN_PLACE = {"parameter", "tuple", "get-tuple-element", "while", "scatter", "fusion in place"}


def assert_no_copy(found):
    assert set(found["makers"]) <= IN_PLACE, found["makers"]
    assert found["temporary"] <= 0.02 * found["table"], found


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        *((kind, width) for kind in ("lazy", "exact") for width in PADDED),
        ("decayed", 64),
        ("followed lazy", 64),
        ("followed exact", 64),
    ],
)
def test_a_step_on_a_row_major_table_copies_nothing(compiled, kind, width):
    found = compiled[kind, width, NUM_ROWS]
    assert_no_copy(found)
    assert found["makers"]["fusion in place"] == 3, found["makers"]
    assert found["donated"] > 0.99 * found["tables"] * PADDED[width], found
    assert found["arguments"] <= 1.01 * PADDED[width] * found["unpadded"], found


@pytest.mark.parametrize("width", PACKED)
def test_packed_rows_are_hardly_padded(compiled, width):
    found = compiled["packed", width, PACKED[width]]
    assert_no_copy(found)
    assert found["arguments"] <= 1.1 * found["unpadded"], found


@pytest.mark.parametrize("kind", ["lookup", "flush"])
def test_reading_rows_and_flushing_copy_nothing(compiled, kind):
    assert_no_copy(compiled[kind, 64, NUM_ROWS])


def test_a_jitted_init_makes_slots_that_lie_like_their_table(compiled):
    assert compiled["init", 64, NUM_ROWS]["orders"] == 2 * [[0, 1]]


def test_copies_would_be_seen(compiled):
    found = compiled["not row-major", 64, NUM_ROWS]
    assert found["makers"]["copy"] == 6
    assert found["temporary"] > found["table"]


# --- in the process that compiles -----------------------------------------------------------------


def lazy(num_rows):
    tx = adamjax.adam(adamjax.cosine_decay(1e-3, 1000), rows="lazy")

    def step(params, state, ids, values):
        grads = {"table": adamjax.row_gradient(ids, values, num_rows)}
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    return tx, step


def exact(num_rows, packing=None, decayed=False):
    """A step with everything in it: prepare, a gradient that depends on the rows, update."""
    rate = adamjax.cosine_decay(1e-3, 1000)
    adam = adamjax.adamw(rate, weight_decay=0.01) if decayed else adamjax.adam(rate)
    tx = adamjax.exact_rows(adam, "table")

    def step(params, state, ids, values):
        lines = ids if packing is None else packing.line(ids)
        read, ticket = tx.prepare(params, state, {"table": lines})

        def loss(read):
            rows = read if packing is None else packing.rows(read, ids)
            return jnp.sum(jnp.square(rows - values))

        grads = jax.grad(loss)(read["table"])
        grads = {"table": adamjax.row_gradient(lines, grads, num_rows)}
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state

    return tx, step


def followed(is_exact):
    """A step that finds the reads of a loss, which casts the table before it reads rows."""
    rate = adamjax.cosine_decay(1e-3, 1000)
    tx = adamjax.adam(rate, rows="lazy")
    if is_exact:
        tx = adamjax.exact_rows(adamjax.adam(rate), "table")

    def loss(params, ids, values):
        rows = params["table"].astype(jnp.bfloat16)[ids]
        return jnp.sum(jnp.square(rows.astype(jnp.float32) - values))

    def step(params, state, ids, values):
        if is_exact:
            (_, grads), ticket = tx.value_and_grad(loss)(params, state, ids, values)
        else:
            _, grads = adamjax.value_and_grad(loss, "table")(params, ids, values)
            ticket = None
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state

    return tx, step


def program(kind, width, num_rows, device):
    """The function of a case, jitted, and what to compile it for."""

    def lies(shape, dtype, how=None):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=how or device)

    shape, packing = (num_rows, width), None
    if kind == "packed":
        packing = adamjax.packing(width)
        shape = (-(-num_rows // packing.per_line), packing.per_line * width)
    if kind in ("lazy", "not row-major"):
        tx, step = lazy(num_rows)
    elif kind.startswith("followed"):
        tx, step = followed(kind == "followed exact")
    else:
        tx, step = exact(shape[0], packing, kind == "decayed")
    table = lies(shape, jnp.float32)
    params = {"table": table if kind == "not row-major" else adamjax.row_major(table)}
    formats = adamjax.formats(tx, params)
    state = jax.eval_shape(tx.init, params)
    slots, treedef = jax.tree.flatten(state, is_leaf=lambda x: x is None)
    state = treedef.unflatten(
        None if x is None else lies(x.shape, x.dtype, how)
        for x, how in zip(slots, treedef.flatten_up_to(formats[1]), strict=True)
    )
    ids = lies((NUM_IDS,), jnp.int32)
    if kind == "init":
        return jax.jit(tx.init, out_shardings=formats[1]), (params,)
    if kind == "lookup":
        return jax.jit(lambda p, s, i: tx.lookup(p, s, "table", i)), (params, state, ids)
    donate = {"donate_argnums": (0, 1), "out_shardings": formats}
    if kind == "flush":
        return jax.jit(tx.flush, **donate), (params, state)
    return jax.jit(step, **donate), (params, state, ids, lies((NUM_IDS, width), jnp.float32))


def size(x):
    return x.size * x.dtype.itemsize


def makers(text, least):
    """How many instructions of each kind have a result of so many elements, in a whole program."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?\S+ = (.*?) ([\w-]+)\(", line)
        if match is None:
            continue
        sizes = [1]
        for dimensions in re.findall(r"\w\[([\d,]+)\]", match[1]):
            sizes.append(1)
            for n in dimensions.split(","):
                sizes[-1] *= int(n)
        if max(sizes) < least:
            continue
        name = match[2]
        if name == "fusion" and '"aliasing_operands":{"lists":[{' in line:
            name = "fusion in place"
        found[name] = found.get(name, 0) + 1
    return found


def compile_for(device, kind, width, num_rows):
    """What the compiler says about a case."""
    function, arguments = program(kind, width, num_rows, device)
    done = function.lower(*arguments).compile()
    memory, elements = done.memory_analysis(), num_rows * width
    found = {
        # A table that is moved in pieces is moved as well.
        "makers": makers(done.as_text(), elements // 8),
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "unpadded": sum(map(size, jax.tree.leaves(arguments))),
        "tables": sum(size(x) for x in jax.tree.leaves(arguments) if x.size >= elements),
        "table": 4 * elements,
    }
    if kind == "init":
        rule = done.output_formats.inner[0]
        orders = [slot["table"].layout.major_to_minor for slot in (rule.m, rule.v)]
        found["orders"] = list(map(list, orders))
    return found


def main():
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda case: (case, compile_for(device, *case)), CASES)
        print(json.dumps(list(found)))


if __name__ == "__main__":
    main()
