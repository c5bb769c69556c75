"""What the TPU's compiler reports for steps, without a TPU: estimates, never times.

We read four things from a compiled step:

- The bytes that are read from and written to the chip's main memory (HBM), where arrays are padded.
- The bytes of temporaries in HBM and in the chip's fast memory (VMEM).
- For each opcode, the number of instructions with a result of at least an eighth of a table (of at
  least half a table, if a step has several).
- The cycles that the compiler estimates, which count only arithmetic and copies.

An instruction on rows of a table counts with the bytes of these rows. A step on several tables has
no figure for bytes, because an instruction that joins rows of several tables does not show how many
bytes it moves from each. XLA's own "bytes accessed" are in the results of dense steps as well: it
counts an array twice if the array is moved to VMEM first.
"""

import functools

from jax.experimental import topologies

from benchmarks import compilers
from benchmarks.compilers import Compiler, Group
from benchmarks.dense import transformer
from benchmarks.programs import many_tables, table_cases

# chip: its topology, as libtpu calls it, and the type of a machine that has it
TOPOLOGIES = {
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v5p": ("v5p:2x2x1", "v5p-8"),
    "v6e": ("v6e:2x2", "v6e-4"),
}
NUM_ROWS = 1_000_000
CHAINS = (
    *("adam", "clip + adam", "adamw", "clip + adamw", "clip + adamw + average"),
    *("amsgrad", "adamax", "adam, bfloat16"),
)


def groups(quick: bool) -> list[Group]:
    """Dense steps of both packages; steps on tables in every mode."""
    # The leaf of a full run does not fit in VMEM.
    workloads = {"one leaf, 67.1M": [(2**16 if quick else 2**26,)]}
    if not quick:
        workloads["transformer, 150 leaves, 13.8M"] = transformer()
    dense: list[Group] = [
        (
            "dense",
            {"workload": workload, "chain": chain},
            {name: ("dense", name, chain, shapes) for name in ("adamjax", "optax")},
        )
        for workload, shapes in workloads.items()
        for chain in CHAINS
    ]
    num_rows = 20_000 if quick else NUM_ROWS
    rows: list[Group] = [
        ("rows", {"width": width}, table_cases(num_rows, width, quick))
        for width in ((64,) if quick else (64, 128))
    ]
    _, width, cases = many_tables(quick)
    return [*dense, *rows, ("rows", {"width": width}, cases)]


COMPILER = Compiler(
    suite="tpu",
    about=__doc__,
    module="libtpu",
    packages=("adamjax", "jax", "jaxlib", "optax", "libtpu"),
    topology=lambda chip: topologies.get_topology_desc(TOPOLOGIES[chip][0], platform="tpu"),
    environment=lambda chip: {
        "LIBTPU_INIT_ARGS": "",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": TOPOLOGIES[chip][1],
        "TPU_WORKER_HOSTNAMES": "localhost",
        # libtpu lets one process at a time use a TPU. Compilers use none, so several may run.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    targets=tuple(TOPOLOGIES),
    dense=("bytes", "bytes_accessed", "temporary_bytes", "cycles"),
    rows={
        **{name: name for name in ("makers", "cycles", "bytes")},
        "temporary": "temporary_bytes",
        "arguments": "argument_bytes",
        "donated": "donated_bytes",
        "unpadded": "unpadded_bytes",
        "tables": "tables_bytes",
        "table": "table_bytes",
    },
    groups=groups,
    results={"kind": "the compiler's estimates, never times"},
)

Contender = functools.partial(compilers.Contender, COMPILER)


def main(argv: list[str]) -> int:
    return compilers.main(COMPILER, argv)
