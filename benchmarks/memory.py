"""The memory of a step besides parameters and gradients: the state's bytes, and temporaries.

The compiler reports them for a donated step; nothing is allocated and nothing runs. The steps are
the dense chains on the dense suite's workloads, and train steps on a table in every mode. A
train step reads some rows, differentiates a loss and applies the optimizer.
"""

from typing import Any

import jax
import jax.numpy as jnp

import adamjax
from benchmarks.dense import QUICK, chains, workloads
from benchmarks.programs import program
from benchmarks.steps import abstract_state, count_bytes, table_mode
from benchmarks.suite import Suite

# The modes of a table, as docs/tables.md names them: their names in `table_mode`.
MODES = {
    "dense gradient": "dense gradient",
    'rows="dense"': "dense",
    'rows="lazy"': "lazy",
    "exact_rows": "exact",
}

# The rows and columns of the table, and the indices that a step reads.
TABLE = (1_000_000, 64, 8192)
QUICK_TABLE = (4000, 8, 64)


def compiled_bytes(step: Any, params: Any, state: Any, *arguments: Any) -> dict[str, int]:
    memory = step.lower(params, state, *arguments).compile().memory_analysis()
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "parameter_bytes": count_bytes(params),
        "state_bytes": count_bytes(state),
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def dense_bytes(workload: str, chain: str, shapes: Any, dtype: str) -> dict[str, Any]:
    option = ", bfloat16" if dtype == "bfloat16" else ""
    step, arguments = program(("dense", "adamjax", chain + option, shapes), device=None)
    return {"workload": workload, "chain": chain, **compiled_bytes(step, *arguments)}


def table_bytes(mode: str, rows: int, width: int, reads: int) -> dict[str, Any]:
    def loss(params: Any, ids: Any, y: Any) -> Any:
        return jnp.mean((params["table"][ids] @ params["head"] - y) ** 2)

    tx, tables = table_mode(MODES[mode])
    shape = jax.ShapeDtypeStruct
    params = {"table": shape((rows, width), jnp.float32), "head": shape((width,), jnp.float32)}
    if mode != "dense gradient":
        params["table"] = adamjax.layout.row_major(params["table"])
    formats = (*adamjax.layout.formats(tx, params), None)  # None: the loss may have any layout
    step = adamjax.train_step(loss, tx, tables=tables, strict=True, out_shardings=formats)
    batch = (shape((reads,), jnp.int32), shape((reads,), jnp.float32))
    labels = {"mode": mode, "rows": rows, "width": width, "reads": reads}
    return labels | compiled_bytes(step, params, abstract_state(tx, params), *batch)


def main(argv: list[str]) -> int:
    suite = Suite("memory", __doc__, ("adamjax", "jax", "jaxlib"))
    args = suite.parse(argv)
    cases = QUICK if args.quick else workloads(large=jax.default_backend() != "cpu")
    suite.results["dense"] = [
        dense_bytes(workload, chain, shapes, dtype)
        for workload, (shapes, dtype, _) in cases.items()
        for chain in chains(workload)
    ]
    table = QUICK_TABLE if args.quick else TABLE
    suite.results["tables"] = [table_bytes(mode, *table) for mode in MODES]
    return suite.finish()
