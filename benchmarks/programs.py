"""Steps as programs: dense ones, and those that read rows of a table in every mode.

A case is jitted and donated, and may be compiled for a device that is not there.
"""

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["ROWS", "Case", "dense_step", "large_cases", "many_tables", "program", "size", "turns"]

RATE, MAX_NORM, MOMENTUM = 1e-3, 1.0, 0.99
# Indices of a step.
NUM_IDS = 8192
# A train step on a table that a loss reads rows of.
ROWS = (
    *("dense gradient, optax", "dense gradient", "rows=dense", "rows=lazy"),
    *("exact_rows", "exact_rows, packed"),
)

# What a worker is asked; see `program`.
Case = Sequence[Any]


def program(case: Case, device: Any) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function of a case and what to call it with, as shapes on a device.

    A case is `("dense", package, chain, shapes)`, or `("rows", kind, width, num_rows, num_ids=)`,
    or `("tables", kind, width, num_rows, num_ids, count)` for several tables of one size.
    """
    made = {"dense": _dense_program, "rows": _rows_program, "tables": _tables_program}
    return made[case[0]](device, *case[1:])


def large_cases(num_rows: int, width: int, quick: bool = False) -> dict[str, Case]:
    """The cases of a table of which a step reads so many rows that blocks of them take turns."""
    ids = 16_384 if quick else 65_536
    return {
        f"{kind}, {ids:,} indices": ("rows", kind, width, num_rows, ids)
        for kind in ("rows=lazy", "exact_rows")
    }


def many_tables(quick: bool = False) -> tuple[int, int, dict[str, Case]]:
    """The rows and columns of each of many tables, and the case of a step on all of them."""
    count, num_rows, width, ids = (3, 1000, 16, 64) if quick else (26, 100_000, 16, 1024)
    name = f"exact_rows, {count} tables of {num_rows:,}, {ids:,} indices each"
    return num_rows, width, {name: ("tables", "exact_rows", width, num_rows, ids, count)}


def turns(case: Case) -> int:
    """The turns of a case's loop over blocks of rows, if no index is there twice; 0 without one."""
    from adamjax import blocks

    num_ids = case[4] if case[0] == "rows" and len(case) > 4 else 0
    return 0 if blocks.is_one_block(num_ids) else -(-num_ids // blocks._BLOCK)


def size(x: Any) -> int:
    """Bytes of an array, without padding."""
    return x.size * x.dtype.itemsize


# --- dense steps ----------------------------------------------------------------------------------


def _by_adamjax(chain: str) -> Any:
    import adamjax

    first, rule, last = _parts(chain)
    make = getattr(adamjax, rule)
    clip = [adamjax.clip_by_global_norm(MAX_NORM)] if first else []
    tx = adamjax.chain(*clip, make(RATE), *([adamjax.weight_ema(MOMENTUM)] if last else []))
    return adamjax.grouped(tx) if chain.endswith("grouped") else tx


def _parts(chain: str) -> tuple[bool, str, bool]:
    """Whether a chain clips, its optimizer, whether it averages."""
    chain = chain.removesuffix(", bfloat16").removesuffix(", grouped")
    rule = chain.removeprefix("clip + ").removesuffix(" + average")
    return chain.startswith("clip"), rule, chain.endswith("average")


def dense_step(package: str, chain: str, params: Any) -> tuple[Callable[..., Any], Any]:
    """A step `(params, state, grads) -> (params, state)` and the shapes of its state.

    optax has no average of the weights in a chain: it is taken behind `apply_updates`, as its
    documents do. Its state is made of float32 parameters, as it would otherwise be in bfloat16
    and change its dtype.
    """
    import jax

    if package == "adamjax":
        import adamjax

        tx = _by_adamjax(chain)

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return adamjax.apply_updates(params, updates), state

        return step, jax.eval_shape(tx.init, params)
    import optax

    clips, rule, averages = _parts(chain)
    clip = [optax.clip_by_global_norm(MAX_NORM)] if clips else []
    pair = optax.chain(*clip, getattr(optax, rule)(RATE))

    def optax_step(params: Any, held: Any, grads: Any) -> Any:
        state, average = held
        updates, state = pair.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if averages:
            average = optax.incremental_update(params, average, 1 - MOMENTUM)
        return params, (state, average)

    wide = [jax.ShapeDtypeStruct(p.shape, "float32") for p in params]
    return optax_step, (jax.eval_shape(pair.init, wide), wide if averages else None)


def _dense_program(
    device: Any, package: str, chain: str, shapes: Sequence[tuple[int, ...]]
) -> tuple[Any, tuple[Any, ...]]:
    import jax

    dtype = "bfloat16" if "bfloat16" in chain else "float32"
    params = [jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=device) for shape in shapes]
    step, state = dense_step(package, chain, params)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
    return jax.jit(step, donate_argnums=(0, 1)), (params, state, params)


# --- steps on a table -----------------------------------------------------------------------------

Made = tuple[Any, Callable[..., Any]]


def whole_step(kind: str, packing: Any = None) -> Made:
    """A train step of a mode, of a loss that reads rows of the table as anyone would write it."""
    import jax
    import jax.numpy as jnp

    import adamjax

    def loss(params: Any, ids: Any, values: Any) -> Any:
        if packing is None:
            rows = params["table"][ids]
        else:
            rows = packing.rows(params["table"][packing.line(ids)], ids)
        return jnp.sum(jnp.square(rows - values))

    if kind == "dense gradient, optax":
        import optax

        pair = optax.adam(RATE)

        def step(params: Any, state: Any, ids: Any, values: Any) -> Any:
            grads = jax.grad(loss)(params, ids, values)
            updates, state = pair.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return pair, step
    tx: Any = adamjax.adam(RATE, rows="lazy" if kind == "rows=lazy" else "dense")
    if kind.startswith("exact_rows"):
        tx = adamjax.exact_rows(tx, "table")
    tables = "table" if kind.startswith("rows=") else None
    taken = adamjax.train_step(loss, tx, tables=tables)
    return tx, lambda *arguments: taken(*arguments)[:2]


def lazy(num_rows: int) -> Made:
    """A lazy step that is given the gradient of some rows."""
    import adamjax

    tx = adamjax.adam(adamjax.cosine_decay(1e-3, 1000), rows="lazy")

    def step(params: Any, state: Any, ids: Any, values: Any) -> Any:
        grads = {"table": adamjax.row_gradient(ids, values, num_rows)}
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    return tx, step


def exact(packing: Any = None, kind: str = "exact_rows") -> Made:
    """A step with everything in it: prepare, a gradient that depends on the rows, update."""
    import jax
    import jax.numpy as jnp

    import adamjax

    rate = adamjax.cosine_decay(1e-3, 1000)
    adam = adamjax.adamw(rate, weight_decay=0.01) if kind == "decayed" else adamjax.adam(rate)
    if kind == "replayed":
        adam = adamjax.adam(rate, b2=0.5)
    tx = adamjax.exact_rows(adam, "table")

    def step(params: Any, state: Any, ids: Any, values: Any) -> Any:
        lines = ids if packing is None else packing.line(ids)
        read, ticket = tx.prepare(params, state, {"table": lines})

        def loss(read: Any) -> Any:
            rows = read if packing is None else packing.rows(read, ids)
            return jnp.sum(jnp.square(rows - values))

        grads = jax.grad(loss)(read["table"])
        grads = {"table": ticket.row_gradient("table", grads)}
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state

    return tx, step


def followed(is_exact: bool) -> Made:
    """A step that finds the reads of a loss, which casts the table before it reads rows."""
    import jax.numpy as jnp

    import adamjax

    rate = adamjax.cosine_decay(1e-3, 1000)
    tx: Any = adamjax.adam(rate, rows="lazy")
    if is_exact:
        tx = adamjax.exact_rows(adamjax.adam(rate), "table")

    def loss(params: Any, ids: Any, values: Any) -> Any:
        rows = params["table"].astype(jnp.bfloat16)[ids]
        return jnp.sum(jnp.square(rows.astype(jnp.float32) - values))

    def step(params: Any, state: Any, ids: Any, values: Any) -> Any:
        if is_exact:
            (_, grads), ticket = tx.value_and_grad(loss)(params, state, ids, values)
        else:
            _, grads = adamjax.value_and_grad(loss, "table")(params, ids, values)
            ticket = None
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state

    return tx, step


def _state_like(tx: Any, params: Any, device: Any) -> tuple[Any, Any]:
    """How params and state lie, and the shapes of the state that lies so."""
    import jax

    import adamjax

    formats = adamjax.layout.formats(tx, params)
    slots, treedef = jax.tree.flatten(jax.eval_shape(tx.init, params), is_leaf=lambda x: x is None)
    state = treedef.unflatten(
        None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how or device)
        for x, how in zip(slots, treedef.flatten_up_to(formats[1]), strict=True)
    )
    return formats, state


def _tables_program(
    device: Any, kind: str, width: int, num_rows: int, num_ids: int, count: int
) -> tuple[Any, tuple[Any, ...]]:
    """A train step on several tables, jitted, and what to compile it for."""
    import jax
    import jax.numpy as jnp

    import adamjax

    assert kind == "exact_rows"

    def loss(params: Any, ids: Any, values: Any) -> Any:
        read = jnp.stack([table[i] for table, i in zip(params["tables"], ids, strict=True)])
        return jnp.sum(jnp.square(read - values))

    tx = adamjax.exact_rows(adamjax.adam(RATE), "tables")
    taken = adamjax.train_step(loss, tx)
    shape = jax.ShapeDtypeStruct
    table = shape((num_rows, width), jnp.float32, sharding=device)
    params = {"tables": [adamjax.layout.row_major(table)] * count}
    formats, state = _state_like(tx, params, device)
    ids = shape((count, num_ids), jnp.int32, sharding=device)
    values = shape((count, num_ids, width), jnp.float32, sharding=device)
    step = jax.jit(
        lambda *arguments: taken(*arguments)[:2], donate_argnums=(0, 1), out_shardings=formats
    )
    return step, (params, state, ids, values)


def _rows_program(
    device: Any, kind: str, width: int, num_rows: int, num_ids: int = NUM_IDS
) -> tuple[Any, tuple[Any, ...]]:
    """The function of a case, jitted, and what to compile it for."""
    import jax
    import jax.numpy as jnp

    import adamjax

    def lies(shape: Any, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    shape, packing = (num_rows, width), None
    if "packed" in kind:
        packing = adamjax.layout.packing(width)
        shape = (-(-num_rows // packing.per_line), packing.per_line * width)
    if kind in ROWS:
        tx, step = whole_step(kind, packing)
    elif kind in ("lazy", "not row-major"):
        tx, step = lazy(num_rows)
    elif kind.startswith("followed"):
        tx, step = followed(kind == "followed exact")
    else:
        tx, step = exact(packing, kind)
    table = lies(shape, jnp.float32)
    params = {"table": table if kind == "not row-major" else adamjax.layout.row_major(table)}
    formats, state = _state_like(tx, params, device)
    ids = lies((num_ids,), jnp.int32)
    if kind == "init":
        return jax.jit(tx.init, out_shardings=formats[1]), (params,)
    if kind == "lookup":
        return jax.jit(lambda p, s, i: tx.lookup(p, s, "table", i)), (params, state, ids)
    donate = {"donate_argnums": (0, 1), "out_shardings": formats}
    if kind == "flush":
        return jax.jit(tx.flush, **donate), (params, state)
    return jax.jit(step, **donate), (params, state, ids, lies((num_ids, width), jnp.float32))
