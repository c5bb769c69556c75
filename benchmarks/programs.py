"""Steps as programs to compile, also for a device that the machine lacks.

A case describes a step:
- `("dense", package, chain, shapes)`: see `steps.chain_step`; ", bfloat16" sets the dtype;
- `("rows", kind, width, num_rows, num_ids=8192)`: a step on a table;
- `("tables", kind, width, num_rows, num_ids, count)`: a train step on several of one size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import adamjax
from adamjax import blocks
from benchmarks import steps

Case = Sequence[Any]
# The jitted function of a case, and its arguments.
Program = tuple[Any, tuple[Any, ...]]

# Indices of a step.
NUM_IDS = 8192
# Train steps on a table of which a loss reads rows: their modes in `steps.table_mode`.
ROWS = {
    "dense gradient, optax": "optax",
    "dense gradient": "dense gradient",
    "rows=dense": "dense",
    "rows=lazy": "lazy",
    "exact_rows": "exact",
    "exact_rows, packed": "exact",
}


def table_cases(num_rows: int, width: int, quick: bool = False) -> dict[str, Case]:
    """A step in every mode; if rows have 64 columns, also the cases of large batches."""
    # A row of 128 columns already fills a line.
    kinds = [kind for kind in ROWS if "packed" not in kind or width % 128]
    cases: dict[str, Case] = {kind: ("rows", kind, width, num_rows) for kind in kinds}
    return cases | (large_cases(num_rows, width, quick) if width == 64 else {})


def large_cases(num_rows: int, width: int, quick: bool = False) -> dict[str, Case]:
    """Steps that read so many rows of a table that they work through blocks of rows."""
    ids, kinds = 16_384 if quick else 65_536, ("rows=lazy", "exact_rows")
    return {f"{kind}, {ids:,} indices": ("rows", kind, width, num_rows, ids) for kind in kinds}


def many_tables(quick: bool = False) -> tuple[int, int, dict[str, Case]]:
    """The rows and columns of each of many tables, and the case of a step on all of them."""
    count, num_rows, width, ids = (3, 1000, 16, 64) if quick else (26, 100_000, 16, 1024)
    name = f"exact_rows, {count} tables of {num_rows:,}, {ids:,} indices each"
    return num_rows, width, {name: ("tables", "exact_rows", width, num_rows, ids, count)}


def block_iterations(case: Case) -> int:
    """The iterations of a case's loop over blocks, if all indices differ; 0 without a loop."""
    num_ids = case[4] if case[0] == "rows" and len(case) > 4 else 0
    return 0 if blocks.needs_no_loop(num_ids) else -(-num_ids // blocks._BLOCK_ROWS)


def program(case: Case, device: Any) -> Program:
    """The jitted function of a case, and its arguments as shapes on a device."""
    kinds = {"dense": _dense_program, "rows": _rows_program, "tables": _tables_program}
    return kinds[case[0]](device, *case[1:])


def _dense_program(device: Any, package: str, chain: str, shapes: Any) -> Program:
    dtype = "bfloat16" if chain.endswith(", bfloat16") else "float32"
    params = [jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=device) for shape in shapes]
    init, step = steps.chain_step(package, chain)
    # From bfloat16 parameters optax makes bfloat16 moments, and a step would change their dtype.
    wide = [jax.ShapeDtypeStruct(p.shape, "float32") for p in params]
    state = jax.eval_shape(init, wide if package == "optax" else params)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
    return jax.jit(step, donate_argnums=(0, 1)), (params, state, params)


def _squares(rows: Any, values: Any) -> Any:
    return jnp.sum(jnp.square(rows - values))


def _rows_step(kind: str, packing: Any) -> tuple[Any, Callable[..., Any]]:
    """The optimizer and the step of a kind."""

    def loss(params: Any, ids: Any, values: Any) -> Any:
        if packing is None:
            return _squares(params["table"][ids], values)
        return _squares(packing.rows(params["table"][packing.line(ids)], ids), values)

    def narrow_loss(params: Any, ids: Any, values: Any) -> Any:
        rows = params["table"].astype(jnp.bfloat16)[ids]
        return _squares(rows.astype(jnp.float32), values)

    if kind == "dense gradient, optax":
        import optax

        adam = optax.adam(steps.RATE)
        return adam, steps.optax_train_step(loss, adam)
    if kind in ROWS:
        tx, tables = steps.table_mode(ROWS[kind])
        return tx, adamjax.train_step(loss, tx, tables=tables)
    rate = adamjax.cosine_decay(1e-3, 1000)
    if kind in ("lazy", "not row-major", "exact, given rows"):
        tx, _ = steps.table_mode("exact" if "exact" in kind else "lazy", learning_rate=rate)
        return tx, steps.given_rows_step(steps.update_step(tx)).step
    if kind.startswith("followed"):  # a loss that casts the table before it reads rows
        tx, tables = steps.table_mode(kind.removeprefix("followed "), learning_rate=rate)
        return tx, adamjax.train_step(narrow_loss, tx, tables=tables)
    options: dict[str, Any] = {"learning_rate": rate}
    if kind == "decayed":
        options |= {"rule": adamjax.adamw, "weight_decay": 0.01}
    if kind == "replayed":
        options |= {"b2": 0.5}
    tx, _ = steps.table_mode("exact", **options)
    return tx, steps.hand_written_step(tx, _squares, packing).step


def _rows_program(
    device: Any, kind: str, width: int, num_rows: int, num_ids: int = NUM_IDS
) -> Program:
    shape, packing = (num_rows, width), None
    if "packed" in kind:
        packing = adamjax.layout.packing(width)
        shape = (-(-num_rows // packing.per_line), packing.per_line * width)
    tx, step = _rows_step(kind, packing)
    table = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=device)
    params = {"table": table if kind == "not row-major" else adamjax.layout.row_major(table)}
    if kind == "init":
        return jax.jit(tx.init, out_shardings=adamjax.layout.formats(tx, params)[1]), (params,)
    state = steps.abstract_state(tx, params, device)
    if kind == "flush":
        return steps.jitted(tx.flush, tx, params), (params, state)
    ids = jax.ShapeDtypeStruct((num_ids,), jnp.int32, sharding=device)
    if kind == "lookup":
        return jax.jit(lambda p, s, i: tx.lookup(p, s, "table", i)), (params, state, ids)
    values = jax.ShapeDtypeStruct((num_ids, width), jnp.float32, sharding=device)
    return steps.jitted(lambda *x: step(*x)[:2], tx, params), (params, state, ids, values)


def _tables_program(
    device: Any, kind: str, width: int, num_rows: int, num_ids: int, count: int
) -> Program:
    def loss(params: Any, ids: Any, values: Any) -> Any:
        read = [table[i] for table, i in zip(params["tables"], ids, strict=True)]
        return _squares(jnp.stack(read), values)

    tx, tables = steps.table_mode(ROWS[kind], tables="tables")
    step = adamjax.train_step(loss, tx, tables=tables)
    table = jax.ShapeDtypeStruct((num_rows, width), jnp.float32, sharding=device)
    params = {"tables": [adamjax.layout.row_major(table)] * count}
    ids = jax.ShapeDtypeStruct((count, num_ids), jnp.int32, sharding=device)
    values = jax.ShapeDtypeStruct((count, num_ids, width), jnp.float32, sharding=device)
    state = steps.abstract_state(tx, params, device)
    return steps.jitted(lambda *x: step(*x)[:2], tx, params), (params, state, ids, values)
