"""What a compiled program is made of, read from its text (HLO)."""

import math
import re
from collections.abc import Iterator

__all__ = ["computations", "cycles", "entry", "instructions", "makers", "padded", "traffic"]

# `name = type opcode(operands), attributes`
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(\S+) = (.*?) ([\w-]+)\((.*)")
# dtype[dimensions]{minor to major:T(tile)...S(memory)}
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")


def instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
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


# They move nothing; or what they move is that of other instructions. Of these only loops over
# blocks of rows are counted: what is in other loops and branches here are searches among indices.
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


def computations(text: str) -> dict[str, str]:
    """The instructions of each of a program's computations, by its name."""
    return {
        found[1]: body
        for body in text.split("\n}")
        if (found := re.search(r"^(?:ENTRY )?%?(\S+) \(.*\{$", body, re.MULTILINE))
    }


def traffic(text: str, turns: int = 0, large: float = math.inf) -> int:
    """The bytes that a program's entry reads from the large memory and writes to it.

    An instruction reads and writes the whole of its arrays. One that reads or writes rows of an
    array, the largest it has, moves as much of it as all its others are.

    Args:
      text: the program.
      turns: how often a loop goes round, from turn to turn of which a large array goes.
      large: the bytes of such an array.
    """
    return _traffic(text, entry(text), turns, large)


def _traffic(text: str, body: str, turns: int, large: float) -> int:
    known: dict[str, list[tuple[int, int]]] = {}
    total, by_rows = 0, _by_rows(text)
    for name, kind, opcode, rest in instructions(body):
        known[name] = results = padded(kind)
        operands = re.findall(r"%([\w.-]+)", rest.partition("), ")[0])
        if opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", rest)
            assert index is not None
            known[name] = [known[operands[0]][int(index[1])]]
        if opcode == "while" and turns and max((n for n, _ in results), default=0) >= large:
            loop = re.search(r"body=%?([\w.-]+)", rest)
            assert loop is not None
            total += turns * _traffic(text, computations(text)[loop[1]], 0, large)
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
    for _, kind, opcode, rest in instructions(text):
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
