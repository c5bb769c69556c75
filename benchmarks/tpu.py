"""What the TPU's compiler says of steps, without a TPU: its estimates, never times.

libtpu compiles for a TPU that is not there; `jax.experimental.topologies` describes one to it. A
case is a jitted, donated step. Of the program that comes out we read

- the bytes that go between the chip and its large memory (HBM): for every instruction of the
  program's entry the arrays in HBM that it reads and writes, padded as they are there. XLA's own
  "bytes accessed" is kept beside it. The two agree where arrays are larger than the fast memory
  on the chip; smaller ones are moved there first and read there once more, which XLA counts
  again, up to twice over. What reads or writes rows of a table counts with these rows alone;
- the bytes of temporaries, in either memory, and the instructions that copy an array of a table's
  size;
- the cycles that the compiler reckons with, where it says so: for arithmetic and copies, not for
  reading and writing rows, sorts and loops. They compare programs for one chip.

The compiler may end the process that it is in, so it gets one for each topology. Where there is a
TPU, the same steps are also timed, which is another table.
"""

import argparse
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.dense import transformer
from benchmarks.measure import RESULTS, environment, save, spread, timed
from benchmarks.workers import Ended, Worker, serve

__all__ = ["Case", "asked", "main"]

# chip: its topology, as libtpu calls it, and the type of a machine that has it
TOPOLOGIES = {
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v5p": ("v5p:2x2x1", "v5p-8"),
    "v6e": ("v6e:2x2", "v6e-4"),
}
RATE, MAX_NORM, MOMENTUM = 1e-3, 1.0, 0.99
NUM_ROWS, NUM_IDS = 1_000_000, 8192

WORKLOADS = {
    # Larger than the fast memory on a chip.
    "one leaf, 67.1M": [(2**26,)],
    "transformer, 150 leaves, 13.8M": transformer(),
}
QUICK = {"one leaf, 67.1M": [(2**16,)]}
CHAINS = (
    *("adam", "clip + adam", "adamw", "clip + adamw", "clip + adamw + average"),
    *("amsgrad", "adamax", "adam, bfloat16"),
)
# A train step on a table that a loss reads rows of.
ROWS = (
    *("dense gradient, optax", "dense gradient", "rows=dense", "rows=lazy"),
    *("exact_rows", "exact_rows, packed"),
)
WIDTHS = (64, 128)


# What a worker is asked; see `program`.
Case = Sequence[Any]
# What some cases are called that belong together, and each of them by its own name.
Group = tuple[dict[str, Any], dict[str, Case]]


# --- dense steps ----------------------------------------------------------------------------------


def _by_adamjax(chain: str) -> Any:
    import adamjax

    first, rule, last = _parts(chain)
    make = getattr(adamjax, rule)
    clip = [adamjax.clip_by_global_norm(MAX_NORM)] if first else []
    return adamjax.chain(*clip, make(RATE), *([adamjax.weight_ema(MOMENTUM)] if last else []))


def _parts(chain: str) -> tuple[bool, str, bool]:
    """Whether it clips, its optimizer, whether it averages."""
    rule = chain.removeprefix("clip + ").removesuffix(", bfloat16").removesuffix(" + average")
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
    package: str, chain: str, shapes: Sequence[tuple[int, ...]], device: Any
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


def exact(num_rows: int, packing: Any = None, decayed: bool = False) -> Made:
    """A step with everything in it: prepare, a gradient that depends on the rows, update."""
    import jax
    import jax.numpy as jnp

    import adamjax

    rate = adamjax.cosine_decay(1e-3, 1000)
    adam = adamjax.adamw(rate, weight_decay=0.01) if decayed else adamjax.adam(rate)
    tx = adamjax.exact_rows(adam, "table")

    def step(params: Any, state: Any, ids: Any, values: Any) -> Any:
        lines = ids if packing is None else packing.line(ids)
        read, ticket = tx.prepare(params, state, {"table": lines})

        def loss(read: Any) -> Any:
            rows = read if packing is None else packing.rows(read, ids)
            return jnp.sum(jnp.square(rows - values))

        grads = jax.grad(loss)(read["table"])
        grads = {"table": adamjax.row_gradient(lines, grads, num_rows)}
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


def _rows_program(kind: str, width: int, num_rows: int, device: Any) -> tuple[Any, tuple[Any, ...]]:
    """The function of a case, jitted, and what to compile it for."""
    import jax
    import jax.numpy as jnp

    import adamjax

    def lies(shape: Any, dtype: Any, how: Any = None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=how or device)

    shape, packing = (num_rows, width), None
    if "packed" in kind:
        packing = adamjax.packing(width)
        shape = (-(-num_rows // packing.per_line), packing.per_line * width)
    if kind in ROWS:
        tx, step = whole_step(kind, packing)
    elif kind in ("lazy", "not row-major"):
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


# --- what the compiler says -----------------------------------------------------------------------


def program(case: Case, device: Any) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function of a case and what to call it with, as shapes on a device.

    A case is `("dense", package, chain, shapes)` or `("rows", kind, width, num_rows)`.
    """
    return {"dense": _dense_program, "rows": _rows_program}[case[0]](*case[1:], device)


def size(x: Any) -> int:
    """Bytes of an array, without padding."""
    return x.size * x.dtype.itemsize


# `name = type opcode(operands), attributes`
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(\S+) = (.*?) ([\w-]+)\((.*)")
# dtype[dimensions]{minor to major:T(tile)...S(memory)}
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")


def _instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            name, kind, opcode, rest = match.groups()
            yield name, kind, opcode, rest


def entry(text: str) -> str:
    """The instructions of a program's entry, from its text."""
    start = text.index("\nENTRY")
    return text[start : text.index("\n}", start)]


def padded(kind: str) -> list[tuple[int, int]]:
    """The bytes of the arrays in an HLO type, padded to their tiles, and the memory of each.

    Memory 0 is the large one; 1 is the fast one on the chip, others are for scalars.
    """
    found = []
    for letters, bits, dimensions, layout in _ARRAY.findall(kind):
        order, _, how = layout.partition(":")
        lengths = [int(n) for n in dimensions.split(",") if n]
        minor_first = [lengths[int(i)] for i in order.split(",") if i]
        tile = re.match(r"T\(([\d,]+)\)", how)
        tiles = [int(n) for n in tile[1].split(",")][::-1] if tile else []
        minor_first += [1] * (len(tiles) - len(minor_first))
        for i, n in enumerate(tiles):
            minor_first[i] = -(-minor_first[i] // n) * n
        memory = re.search(r"S\((\d+)\)", how)
        width = 1 if letters == "pred" else int(bits or 0) // 8
        found.append((width * math.prod(minor_first), int(memory[1]) if memory else 0))
    return found


# They move nothing; or what they move is that of other instructions, which are not counted: what
# is in loops and branches here are searches among indices.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}


def _by_rows(text: str) -> set[str]:
    """The computations of a program that read or write rows of an array, at any depth."""
    calls, found = {}, set()
    for computation in text.split("\n}"):
        if head := re.search(r"^%?(\S+) \(.*\{$", computation, re.MULTILINE):
            calls[head[1]] = set(re.findall(r"calls=%?([\w.-]+)", computation))
            if re.search(r" (gather|scatter)\(", computation):
                found.add(head[1])
    while more := {name for name, called in calls.items() if called & found} - found:
        found |= more
    return found


def traffic(text: str) -> int:
    """The bytes that a program's entry reads from the large memory and writes to it.

    An instruction reads and writes the whole of its arrays. One that reads or writes rows of an
    array, the largest it has, moves as much of it as all its others are.
    """
    known: dict[str, list[tuple[int, int]]] = {}
    total, by_rows = 0, _by_rows(text)
    for name, kind, opcode, rest in _instructions(entry(text)):
        known[name] = results = padded(kind)
        operands = re.findall(r"%([\w.-]+)", rest.partition("), ")[0])
        if opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", rest)
            assert index is not None
            known[name] = [known[operands[0]][int(index[1])]]
        if opcode in _FREE or opcode.endswith("-done") or "ConcatBitcast" in rest:
            continue
        if opcode in ("copy-start", "slice-start"):
            # (to, from, context) and ((from), to, context); a slice reads no more than it takes.
            to, held = results[:2] if opcode == "copy-start" else results[1::-1]
            total += to[0] * ((to[1] == 0) + (held[1] == 0))
            continue
        moved = [x for operand in operands for x in known.get(operand, [])] + results
        called = re.search(r"calls=%?([\w.-]+)", rest)
        if opcode in ("gather", "scatter") or (called and called[1] in by_rows):
            most = max(n for n, _ in moved)
            rows = max((n for n, _ in moved if n < most), default=0)
            moved = [(min(n, rows), memory) for n, memory in moved]
        total += sum(n for n, memory in moved if memory == 0)
    return total


def makers(text: str, least: int) -> dict[str, int]:
    """How many instructions of each kind have a result of so many elements, in a whole program."""
    found: dict[str, int] = {}
    for _, kind, opcode, rest in _instructions(text):
        elements = [
            math.prod(map(int, dimensions.split(",")))
            for dimensions in re.findall(r"\w\[([\d,]+)\]", kind)
        ]
        if max(elements, default=1) < least:
            continue
        if opcode == "fusion" and '"aliasing_operands":{"lists":[{' in rest:
            opcode = "fusion in place"
        found[opcode] = found.get(opcode, 0) + 1
    return found


def cycles(text: str) -> int:
    """The cycles that the compiler estimates for the instructions of a program's entry."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry(text))))


def said(case: Case, device: Any) -> dict[str, Any]:
    """What the compiler says about a case."""
    import jax

    function, arguments = program(case, device)
    compiled = function.lower(*arguments).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if case[0] == "dense":  # all by the parameter, but the cycles
        parameters = sum(x.size for x in arguments[0])
        return {
            "bytes": traffic(text) / parameters,
            "bytes_accessed": compiled.cost_analysis()["bytes accessed"] / parameters,
            "temporary_bytes": memory.temp_size_in_bytes / parameters,
            "cycles": cycles(text),
        }
    _, kind, width, num_rows = case
    elements = num_rows * width
    found = {
        "bytes": traffic(text),
        # A table that is moved in pieces is moved as well.
        "makers": makers(text, elements // 8),
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "unpadded": sum(map(size, jax.tree.leaves(arguments))),
        "tables": sum(size(x) for x in jax.tree.leaves(arguments) if x.size >= elements),
        "table": 4 * elements,
        "cycles": cycles(text),
    }
    if kind == "init":
        rule = compiled.output_formats.inner[0]
        orders = [slot["table"].layout.major_to_minor for slot in (rule.m, rule.v)]
        found["orders"] = list(map(list, orders))
    return found


def work(chip: str) -> None:
    """Answers what the compiler for a chip says about cases."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(TOPOLOGIES[chip][0], platform="tpu")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    serve(lambda case: said(case, device))


def compiler(chip: str) -> Worker:
    """A process with the compiler for a chip, in which there is no TPU."""
    return Worker(
        *("tpu", "--worker", chip),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="",
        LIBTPU_INIT_ARGS="",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=TOPOLOGIES[chip][1],
        TPU_WORKER_HOSTNAMES="localhost",
        # Compilers do not get into each other's way as users of a TPU do.
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def asked(chip: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What the compiler for a chip says about cases; `{"failed": why}` where it ended."""
    worker, found = compiler(chip), []
    for case in cases:
        try:
            found.append(worker.ask(case))
        except Ended as error:
            found.append({"failed": str(error)})
            worker.close()
            worker = compiler(chip)
        print(f"{chip}: {case[1]}, {case[2]}: {found[-1]}", flush=True)
    worker.close()
    return found


# --- cases ----------------------------------------------------------------------------------------


def dense_cases(workloads: dict[str, Any]) -> Iterator[Group]:
    """What each dense case is called, and the case of each package."""
    for workload, shapes in workloads.items():
        for chain in CHAINS:
            cases = {name: ("dense", name, chain, shapes) for name in ("adamjax", "optax")}
            yield {"workload": workload, "chain": chain}, cases


def rows_cases(num_rows: int, widths: Sequence[int]) -> Iterator[Group]:
    """What each table is called, and the case of each mode."""
    for width in widths:
        # Rows of 128 columns are a line as they are.
        kinds = [kind for kind in ROWS if "packed" not in kind or width % 128]
        yield {"width": width}, {kind: ("rows", kind, width, num_rows) for kind in kinds}


def estimated(chip: str, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What the compiler for a chip says of each case."""
    cases = [case for _, cases in groups for case in cases.values()]
    answers = iter(asked(chip, cases))
    return [
        {"chip": chip, **what, "said": {name: next(answers) for name in cases}}
        for what, cases in groups
    ]


# --- times, where there is a TPU ------------------------------------------------------------------


class Runner:
    """A step of a case that is taken in place, on a device that is there."""

    def __init__(self, case: Case) -> None:
        import jax

        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        function, (params, state, *given) = program(case, here)
        self.step = function.lower(params, state, *given).compile()
        num_rows = case[3] if case[0] == "rows" else 1
        # The states of these optimizers are zeros at first.
        zeros = jax.tree.map(functools.partial(_made, most=0), state)
        params, self.given = jax.tree.map(functools.partial(_made, most=num_rows), (params, given))
        self.held = params, zeros

    def run(self, steps: int) -> None:
        """Takes some steps and waits for them."""
        import jax

        for _ in range(steps):
            self.held = self.step(*self.held, *self.given)
        jax.block_until_ready(self.held)


def _made(x: Any, most: int) -> Any:
    """Zeros; or small floats, and integers below `most`."""
    import jax
    import jax.numpy as jnp

    def make() -> Any:
        if most == 0:
            return jnp.zeros(x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return 0.01 * jax.random.normal(jax.random.key(0), x.shape, x.dtype)
        return jax.random.randint(jax.random.key(0), x.shape, 0, most, x.dtype)

    return jax.jit(make, out_shardings=x.sharding)()


def run_times(groups: Sequence[Group], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Milliseconds a step of the cases of each group, in turn, on the device that is there."""
    table = []
    for what, cases in groups:
        runners = {name: Runner(case) for name, case in cases.items()}
        taken: dict[str, list[float]] = {name: [] for name in cases}
        order = list(cases)
        for _ in range(rounds):
            for name in order:
                runners[name].run(1)
                taken[name].append(1e3 * timed(functools.partial(runners[name].run, steps)) / steps)
            order.append(order.pop(0))
        table.append({**what, "ms": {name: spread(ms) for name, ms in taken.items()}})
        print(
            f"{what}: " + ", ".join(f"{k} {v['median']:.3f} ms" for k, v in table[-1]["ms"].items())
        )
    return table


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--rounds", type=int, default=20, help="samples, where there is a TPU")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    # Take times on whatever device there is, and nothing else.
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=TOPOLOGIES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    if importlib.util.find_spec("libtpu") is None and not args.time:
        parser.error("libtpu, which has the TPU's compiler, is not installed: make bench-tpu")

    import jax

    dense = list(dense_cases(QUICK if args.quick else WORKLOADS))
    rows = list(rows_cases(20_000 if args.quick else NUM_ROWS, WIDTHS[: 1 if args.quick else None]))
    packages = ["adamjax", "jax", "jaxlib", "optax", *([] if args.time else ["libtpu"])]
    env = environment(*packages)
    results: dict[str, Any] = {
        "suite": "tpu",
        "kind": "the compiler's estimates, never times: all but `times`",
        "environment": {key: env[key] for key in ("versions", "date")},
        "dense": [],
        "rows": [],
        "times": {},
    }
    if not args.time:
        for name, groups in (("dense", dense), ("rows", rows)):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = pool.map(functools.partial(estimated, groups=groups), args.chips)
                results[name] = [row for chip in found for row in chip]
    if args.time or jax.default_backend() == "tpu":
        results["times"] = {
            "device": env["device"],
            "rounds": args.rounds,
            "dense": run_times(dense, args.rounds, 2 if args.quick else 10),
            "rows": run_times(rows, args.rounds, 2 if args.quick else 10),
        }
    out = args.out or RESULTS / "tpu-compiler" / "tpu.json"
    if args.out or not (args.quick or args.time or args.chips != list(TOPOLOGIES)):
        save(results, out)
        print(f"written to {out}")
    return 0
