"""What a compiled program is made of, read from its text (HLO)."""

import math
import re
from collections import Counter
from collections.abc import Iterator

# `name = type opcode(operands), attributes`
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(\S+) = (.*?) ([\w-]+)\((.*)")
# dtype[dimensions]{minor to major:T(tile)...S(memory)}
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")
# They do nothing when a program runs.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


# --- parts of a program ---------------------------------------------------------------------------


def instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, opcode and the rest of each instruction."""
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            yield match.groups()


def entry(text: str) -> str:
    """The instructions of a program's entry."""
    start = text.index("\nENTRY")
    return text[start : text.index("\n}", start)]


def computations(text: str) -> dict[str, str]:
    """The instructions of each of a program's computations, by its name."""
    return {
        head[1]: body
        for body in text.split("\n}")
        if (head := re.search(r"^(?:ENTRY )?%?(\S+) \(.*\{$", body, re.MULTILINE))
    }


def _attribute(rest: str, name: str) -> str | None:
    match = re.search(rf"\b(?:{name})=%?([\w.-]+)", rest)
    return match[1] if match else None


# --- kernels --------------------------------------------------------------------------------------


def launches(text: str) -> tuple[int, int]:
    """The kernels that a program launches on a GPU, and how often it waits for the host.

    The kernels of a loop count as often as it goes round, where the compiler knows how often. Of
    branches and other loops the host has to see a number first; what is in them is not counted.
    """
    bodies = computations(text)

    def count(body: str) -> tuple[int, int]:
        kernels = waits = 0
        for _, _, opcode, rest in instructions(body):
            if opcode in _FREE or opcode.endswith("-done"):
                continue
            rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            called = _attribute(rest, "body|to_apply")
            if called and (opcode == "call" or (opcode == "while" and rounds)):
                times = int(rounds[1]) if rounds else 1
                inner = count(bodies[called])
                kernels, waits = kernels + times * inner[0], waits + times * inner[1]
            elif opcode in ("while", "conditional"):
                waits += 1
            else:
                kernels += 1
        return kernels, waits

    return count(entry(text))


# --- bytes ----------------------------------------------------------------------------------------


def padded_arrays(kind: str) -> list[tuple[int, int]]:
    """The bytes of the arrays in an HLO type, padded to their tiles, and the memory of each.

    Memory 0 is the large one; 1 is the fast one on the chip, others are for scalars.
    """
    arrays = []
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
        arrays.append((width * math.prod(minor_first), int(memory[1]) if memory else 0))
    return arrays


def traffic(text: str, turns: int = 0, large: float = math.inf) -> int:
    """The bytes that a program's entry reads from the large memory and writes to it.

    An instruction reads and writes the whole of its arrays. One that reads or writes rows of an
    array, the largest it has, moves as much of it as all its others are. Loops and branches are
    searches among indices and not counted, but for loops over blocks of rows.

    Args:
      text: the program.
      turns: how often a loop over blocks goes round, from turn to turn of which a large array goes.
      large: the bytes of such an array.
    """
    bodies = computations(text)
    calls = {name: set(re.findall(r"calls=%?([\w.-]+)", body)) for name, body in bodies.items()}
    # The computations that read or write rows of an array, at any depth.
    by_rows = {n for n, body in bodies.items() if re.search(r" (gather|scatter)\(", body)}
    while more := {name for name, called in calls.items() if called & by_rows} - by_rows:
        by_rows |= more

    def moved(body: str, turns: int) -> int:
        arrays: dict[str, list[tuple[int, int]]] = {}
        total = 0
        for name, kind, opcode, rest in instructions(body):
            arrays[name] = results = padded_arrays(kind)
            operands = re.findall(r"%([\w.-]+)", rest.partition("), ")[0])
            if opcode == "get-tuple-element":
                arrays[name] = [arrays[operands[0]][int(_attribute(rest, "index") or 0)]]
            if opcode == "while" and turns and max((n for n, _ in results), default=0) >= large:
                total += turns * moved(bodies[_attribute(rest, "body") or ""], 0)
            if opcode in _FREE or opcode in ("while", "conditional"):
                continue
            if opcode.endswith("-done") or "ConcatBitcast" in rest:
                continue
            if opcode in ("copy-start", "slice-start"):
                # (to, from, context) and ((from), to, context); a slice reads what it takes.
                to, source = results[:2] if opcode == "copy-start" else results[1::-1]
                total += to[0] * ((to[1] == 0) + (source[1] == 0))
                continue
            used = [x for operand in operands for x in arrays.get(operand, [])] + results
            if opcode in ("gather", "scatter") or _attribute(rest, "calls") in by_rows:
                most = max(n for n, _ in used)
                rows = max((n for n, _ in used if n < most), default=0)
                used = [(min(n, rows), memory) for n, memory in used]
            total += sum(n for n, memory in used if memory == 0)
        return total

    return moved(entry(text), turns)


def large_results(text: str, least: int) -> dict[str, int]:
    """How many instructions of each kind have a result of so many elements, in a whole program."""
    counts: Counter[str] = Counter()
    for _, kind, opcode, rest in instructions(text):
        elements = [
            math.prod(map(int, dimensions.split(",")))
            for dimensions in re.findall(r"\w\[([\d,]+)\]", kind)
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
