"""What a compiled program is made of, read from its text (HLO)."""

import math
import re
from collections import Counter
from collections.abc import Iterator

# `name = type opcode(operands), attributes`
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(\S+) = (.*?) ([\w-]+)\((.*)")
# dtype[dimensions]{minor to major:T(tile)...S(memory)}
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")
# Opcodes of instructions that do nothing when a program runs.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, opcode and the rest of each instruction."""
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            yield match.groups()


def entry(text: str) -> str:
    start = text.index("\nENTRY")
    return text[start : text.index("\n}", start)]


def computations(text: str) -> dict[str, str]:
    """The instructions of each of a program's computations, by its name."""
    return {
        head[1]: body
        for body in text.split("\n}")
        if (head := re.search(r"^(?:ENTRY )?%?(\S+) \(.*\{$", body, re.MULTILINE))
    }


def _attribute(rest: str, names: str) -> str | None:
    """The value of an instruction's attribute; `names` may be several, such as `body|to_apply`."""
    match = re.search(rf"\b(?:{names})=%?([\w.-]+)", rest)
    return match[1] if match else None


def launches(text: str) -> tuple[int, int]:
    """The kernels that a program launches on a GPU, and how often it waits for the host.

    If the compiler knows the number of a loop's iterations, its kernels count in each. Any other
    loop, and a branch, counts as one wait for the host; the kernels inside are not counted.
    """
    bodies = computations(text)

    def count(body: str) -> tuple[int, int]:
        kernels = waits = 0
        for _, _, opcode, rest in instructions(body):
            if opcode in _FREE or opcode.endswith("-done"):
                continue
            trip_count = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            called = _attribute(rest, "body|to_apply")
            if called and (opcode == "call" or (opcode == "while" and trip_count)):
                iterations = int(trip_count[1]) if trip_count else 1
                inner_kernels, inner_waits = count(bodies[called])
                kernels += iterations * inner_kernels
                waits += iterations * inner_waits
            elif opcode in ("while", "conditional"):
                waits += 1
            else:
                kernels += 1
        return kernels, waits

    return count(entry(text))


def padded_arrays(hlo_type: str) -> list[tuple[int, int]]:
    """The bytes of the arrays in an HLO type, padded to their tiles, and the memory of each.

    Memory 0 is the large one; 1 is the fast one on the chip, others are for scalars.
    """
    arrays = []
    for letters, bits, dimensions, layout in _ARRAY.findall(hlo_type):
        order, _, tiles_and_memory = layout.partition(":")
        lengths = [int(n) for n in dimensions.split(",") if n]
        minor_first = [lengths[int(i)] for i in order.split(",") if i]
        # Each of the minor dimensions is padded to a multiple of its tile's length.
        tile = re.match(r"T\(([\d,]+)\)", tiles_and_memory)
        tile_lengths = [int(n) for n in tile[1].split(",")][::-1] if tile else []
        minor_first += [1] * (len(tile_lengths) - len(minor_first))
        for i, n in enumerate(tile_lengths):
            minor_first[i] = -(-minor_first[i] // n) * n
        memory = re.search(r"S\((\d+)\)", tiles_and_memory)
        width = 1 if letters == "pred" else int(bits or 0) // 8
        arrays.append((width * math.prod(minor_first), int(memory[1]) if memory else 0))
    return arrays


def traffic(text: str, iterations: int = 0, large: float = math.inf) -> int:
    """The bytes that a program's entry reads from the large memory and writes to it.

    An instruction counts as reading and writing the whole of its arrays. But one that reads or
    writes rows touches only some rows of its largest array, so that array counts with the size of
    the second largest. A loop that carries an array of at least `large` bytes works on blocks of
    rows, and counts `iterations` times. Other loops and branches search among indices, and do not
    count.
    """
    bodies = computations(text)
    calls = {name: set(re.findall(r"calls=%?([\w.-]+)", body)) for name, body in bodies.items()}
    # The computations that read or write rows of an array, at any depth.
    by_rows = {name for name, body in bodies.items() if re.search(r" (gather|scatter)\(", body)}
    while more := {name for name, called in calls.items() if called & by_rows} - by_rows:
        by_rows |= more

    def moved(body: str, iterations: int) -> int:
        arrays: dict[str, list[tuple[int, int]]] = {}
        total = 0
        for name, hlo_type, opcode, rest in instructions(body):
            arrays[name] = results = padded_arrays(hlo_type)
            operands = re.findall(r"%([\w.-]+)", rest.partition("), ")[0])
            if opcode == "get-tuple-element":
                arrays[name] = [arrays[operands[0]][int(_attribute(rest, "index") or 0)]]
            largest_result = max((n for n, _ in results), default=0)
            if opcode == "while" and iterations and largest_result >= large:
                total += iterations * moved(bodies[_attribute(rest, "body") or ""], 0)
            if opcode in _FREE or opcode in ("while", "conditional"):
                continue
            # A copy counts where it starts, not where it ends; a bitcast moves nothing.
            if opcode.endswith("-done") or "ConcatBitcast" in rest:
                continue
            if opcode in ("copy-start", "slice-start"):
                # The results of a copy are (to, from, context), those of a slice
                # ((from), to, context). Both read as many bytes as they write.
                to, source = results[:2] if opcode == "copy-start" else results[1::-1]
                total += to[0] * ((to[1] == 0) + (source[1] == 0))
                continue
            used = [x for operand in operands for x in arrays.get(operand, [])] + results
            if opcode in ("gather", "scatter") or _attribute(rest, "calls") in by_rows:
                largest = max(n for n, _ in used)
                next_largest = max((n for n, _ in used if n < largest), default=0)
                used = [(min(n, next_largest), memory) for n, memory in used]
            total += sum(n for n, memory in used if memory == 0)
        return total

    return moved(entry(text), iterations)


def large_results(text: str, least: int) -> dict[str, int]:
    """How many instructions of each opcode have a result of `least` elements or more.

    Instructions of the whole program count, not only those of its entry. A fusion that writes
    into one of its operands is "fusion in place".
    """
    counts: Counter[str] = Counter()
    for _, hlo_type, opcode, rest in instructions(text):
        elements = [
            math.prod(map(int, dimensions.split(",")))
            for dimensions in re.findall(r"\w\[([\d,]+)\]", hlo_type)
        ]
        if max(elements, default=1) < least:
            continue
        if opcode == "fusion" and '"aliasing_operands":{"lists":[{' in rest:
            opcode = "fusion in place"
        counts[opcode] += 1
    return counts


def cycles(text: str) -> int:
    """The cycles that the compiler estimates for the instructions of a program's entry."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry(text))))
