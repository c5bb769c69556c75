"""What a step needs besides parameters and gradients: the state's bytes, and temporaries.

As the compiler reports them for a donated step; nothing is allocated and nothing runs. The dense
chains on the dense suite's workloads, and whole train steps on a table in every mode: a loss reads
some rows, is differentiated, and the optimizer takes its step.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.dense import QUICK, chains, transform, workloads
from benchmarks.measure import RESULTS, environment, installed, save, say

__all__ = ["MODES", "main"]

# What adamjax does with a table's rows, as the README calls it.
MODES = ("dense gradient", 'rows="dense"', 'rows="lazy"', "exact_rows")
RATE = 1e-3

# Rows, columns, indices of a step.
TABLE = (1_000_000, 64, 8192)
QUICK_TABLE = (4000, 8, 64)


def _bytes(tree: Any) -> int:
    import jax

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _row(params: Any, state: Any, compiled: Any) -> dict[str, int]:
    import jax

    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "parameter_bytes": _bytes(params),
        "state_bytes": _bytes(state),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def dense(workloads: dict[str, Any]) -> list[dict[str, Any]]:
    """The bytes of the dense chains."""
    import jax

    table = []
    for workload, (shapes, dtype, _) in workloads.items():
        for chain in chains(workload):
            params = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
            tx, apply = transform("adamjax", chain)

            def step(params: Any, state: Any, grads: Any, tx: Any = tx, apply: Any = apply) -> Any:
                updates, state = tx.update(grads, state, params)
                return apply(params, updates), state

            state = jax.eval_shape(tx.init, params)
            compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
            table.append({"workload": workload, "chain": chain, **_row(params, state, compiled)})
            _tell(f"{workload:32} {chain:12}", table[-1])
    return table


def table_step(mode: str) -> tuple[Any, Callable[..., Any]]:
    """The optimizer of a mode, and a train step `(params, state, ids, y)` on a table."""
    import jax
    import jax.numpy as jnp

    import adamjax

    def loss(params: Any, ids: Any, y: Any) -> Any:
        return jnp.mean((params["table"][ids] @ params["head"] - y) ** 2)

    tx: Any = adamjax.adam(RATE, rows="lazy" if mode == 'rows="lazy"' else "dense")
    if mode == "exact_rows":
        tx = adamjax.exact_rows(tx, "table")
        by_rows = tx.value_and_grad(loss, strict=True)

        def step(params: Any, state: Any, ids: Any, y: Any) -> Any:
            (value, grads), ticket = by_rows(params, state, ids, y)
            updates, state = tx.update(grads, state, params, ticket=ticket)
            return adamjax.apply_updates(params, updates), state, value
    else:
        gradient: Any = jax.value_and_grad(loss)
        if mode != "dense gradient":
            gradient = adamjax.value_and_grad(loss, "table", strict=True)

        def step(params: Any, state: Any, ids: Any, y: Any) -> Any:
            value, grads = gradient(params, ids, y)
            updates, state = tx.update(grads, state, params)
            return adamjax.apply_updates(params, updates), state, value

    return tx, step


def tables(rows: int, width: int, reads: int) -> list[dict[str, Any]]:
    """The bytes of a table's modes."""
    import jax
    import jax.numpy as jnp

    import adamjax

    found = []
    for mode in MODES:
        tx, step = table_step(mode)
        shape = jax.ShapeDtypeStruct
        params = {"table": shape((rows, width), jnp.float32), "head": shape((width,), jnp.float32)}
        state = jax.eval_shape(tx.init, params)
        lies: dict[str, Any] = {}
        if jax.default_backend() == "tpu" and mode != "dense gradient":
            # As the README has it for TPUs.
            params["table"] = adamjax.layout.row_major(params["table"])
            lies["out_shardings"] = (*adamjax.layout.formats(tx, params), None)
            slots, treedef = jax.tree.flatten(state)
            places = treedef.flatten_up_to(lies["out_shardings"][1])
            beside = zip(slots, places, strict=True)
            state = treedef.unflatten([shape(x.shape, x.dtype, sharding=f) for x, f in beside])
        batch = (shape((reads,), jnp.int32), shape((reads,), jnp.float32))
        compiled = jax.jit(step, donate_argnums=(0, 1), **lies).lower(params, state, *batch)
        about = {"mode": mode, "rows": rows, "width": width, "reads": reads}
        found.append({**about, **_row(params, state, compiled.compile())})
        _tell(f"{mode:32} {'adam':12}", found[-1])
    return found


def _tell(name: str, row: dict[str, Any]) -> None:
    state = row["state_bytes"] / row["parameters"]
    held = row["temporary_bytes"] / 1e6
    say(f"{name} state {state:8.4f} bytes a parameter, temporaries {held:10,.3f} MB")


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args(argv)

    import jax

    results: dict[str, Any] = {"suite": "memory", "quick": args.quick}
    on_cpu = jax.default_backend() == "cpu"
    results["dense"] = dense(QUICK if args.quick else workloads(large=not on_cpu))
    results["tables"] = tables(*(QUICK_TABLE if args.quick else TABLE))
    results["environment"] = environment(*installed("adamjax", "jax", "jaxlib"))
    out = args.out or RESULTS / results["environment"]["platform"] / "memory.json"
    if args.out or not args.quick:
        save(results, out)
        print(f"written to {out}")
    return 0
