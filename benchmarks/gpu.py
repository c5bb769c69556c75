"""What the GPU's compiler reports for steps, without a GPU: counts and bytes, never times.

We read five things from a compiled step:

- The kernels that it launches. Each costs microseconds, however little it does.
- The round trips, at which the GPU waits until the host has read a number.
- The bytes that move between the GPU and its memory.
- The temporaries.
- The instructions that copy an array of a table's size.

An instruction on rows of a table counts with the bytes of these rows. If it joins rows of several
tables, its bytes are not counted, because it does not show how many it moves from each.
"""

import functools

from jax.experimental import topologies

from benchmarks import compilers
from benchmarks.compilers import Compiler, Group
from benchmarks.dense import size, workloads
from benchmarks.programs import many_tables, table_cases

DEVICE = "NVIDIA H100 80GB HBM3"
# The properties of an H100 (SXM), in XLA's format.
H100 = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84929347584
}}
platform_name: "CUDA" runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{DEVICE}"
"""

# The chains for the workloads whose names begin with these words.
CHAINS = {
    "one leaf": ("adam", "clip + adam", "clip + adamw + average", "adam, bfloat16"),
    "transformer,": ("adam", "clip + adam", "clip + adamw + average"),
    "2,000": ("adam", "adam, grouped", "clip + adam, grouped"),
}
# Rows and columns of a table.
TABLES = ((1_000_000, 64), (10_000_000, 128))
QUICK_TABLES = ((20_000, 64),)
DENSE = ("kernels", "round_trips", "temporary_bytes", "bytes")


def groups(quick: bool) -> list[Group]:
    """Dense steps of both packages; steps on tables in every mode."""
    shapes_of = {name: shapes for name, (shapes, *_) in workloads(large=True).items()}
    if quick:
        shapes_of = {"one leaf, 65k": [(2**16,)]}
    all_groups: list[Group] = []
    for workload, shapes in shapes_of.items():
        chains = [x for start, x in CHAINS.items() if workload.startswith(start)]
        for chain in chains[0] if chains and "bfloat16" not in workload else ():
            # optax cannot join leaves.
            by_package = {"adamjax": chain, "optax": chain.removesuffix(", grouped")}
            steps = {name: ("dense", name, own, shapes) for name, own in by_package.items()}
            about = {"workload": workload, "chain": chain, "size": size(shapes)}
            all_groups.append(("dense", about, steps))
    for num_rows, width in QUICK_TABLES if quick else TABLES:
        cases = table_cases(num_rows, width, quick)
        cases.pop("exact_rows, packed", None)  # packing is for TPUs
        all_groups.append(("rows", {"rows": num_rows, "width": width}, cases))
    num_rows, width, cases = many_tables(quick)
    return [*all_groups, ("rows", {"rows": num_rows, "width": width}, cases)]


COMPILER = Compiler(
    suite="gpu",
    about=__doc__,
    module="jax_cuda13_plugin",
    packages=("adamjax", "jax", "jaxlib", "optax", "jax-cuda13-pjrt", "nvidia-cuda-nvcc"),
    topology=lambda chip: topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology="1x1x1"
    ),
    environment=lambda chip: {"CUDA_VISIBLE_DEVICES": "-1"},
    targets=("H100",),
    dense=DENSE,
    rows={x: x for x in (*DENSE, "makers", "table_bytes", "donated_bytes", "tables_bytes")},
    groups=groups,
    results={"kind": "what the compiler says, never times", "device": DEVICE},
)

Contender = functools.partial(compilers.Contender, COMPILER)


def main(argv: list[str]) -> int:
    return compilers.main(COMPILER, argv)
