"""Two results of one suite: what changed, and whether by more than the noise.

A figure that was measured in rounds has a median and quartiles. Where the quartile ranges of two
results overlap, the difference is within the noise. Where they do not, and each has five rounds or
more, it is a change. A figure without a spread (bytes, bounds) has changed if its values differ.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import Results, machine, origin
from benchmarks.train.options import UserError

# The quartiles of fewer rounds hardly predict the next round.
ENOUGH = 5
TOO_FEW = "beyond the noise, but of too few rounds"

# If one of these is in a figure's name, a larger value is slower, or faster.
SLOWER = {"ms", "s", "ratio", "ratio_to_none", "tables_ms"}
FASTER = {"fraction", "bandwidth"}
# Keys that say how a suite was measured, and so are not compared.
ABOUT = {"suite", "quick", "environment", "rounds", "sittings", "grid_rounds"}


@dataclass(frozen=True)
class Figure:
    """A value in a suite's results."""

    name: tuple[str, ...]  # its keys in the results, outermost first
    value: Any  # the median if it has a spread, else a number, True, False or a text
    quartiles: tuple[float, float] | None = None
    rounds: int = 0  # how often it was measured; 0 if that is not known

    def __str__(self) -> str:
        if isinstance(self.value, bool | str):
            return str(self.value)
        text = f"{self.value:.4g}" if isinstance(self.value, float) else f"{self.value:,}"
        return text + (" ({:.4g} to {:.4g})".format(*self.quartiles) if self.quartiles else "")


def loaded(path: Path) -> Results:
    """A suite's results; raises a `UserError` if the file has none."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a suite's results: {error}") from None
    if not isinstance(results, dict) or "suite" not in results:
        raise UserError(f"{path}: not a suite's results: it does not say of which suite")
    return results


def _identity(row: dict[str, Any]) -> str:
    """The name of a row in a list: its texts, each only once."""
    texts: list[str] = []
    for x in row.values():
        if isinstance(x, str) and not any(x in y for y in texts):
            texts.append(x)
    return ", ".join(texts)


def _walk(node: Any, name: tuple[str, ...], rounds: int) -> Iterator[Figure]:
    if isinstance(node, dict):
        if {"median", "q25", "q75"} <= node.keys():
            yield Figure(name, node["median"], (node["q25"], node["q75"]), rounds)
            return
        # The argument `rounds` includes all sittings; the key `rounds` at the top does not.
        rounds = node.get("rounds", rounds) if name else rounds
        # A text at the top is a figure; a text of a row is in the row's name (`_identity`).
        for key, x in node.items():
            if key not in ABOUT and not (isinstance(x, str) and name):
                yield from _walk(x, (*name, key), rounds)
    elif isinstance(node, list):
        if node and all(isinstance(x, dict) for x in node):
            for row in node:
                yield from _walk(row, (*name, _identity(row)), rounds)
        elif node and all(isinstance(x, int | float) for x in node):
            yield Figure((*name, "the last"), node[-1], None, rounds)
    elif isinstance(node, str | int | float):
        yield Figure(name, node, None, rounds)


def figures(results: Results) -> dict[tuple[str, ...], Figure]:
    """The figures of results, by name; of a list of numbers, only the last."""
    rounds = results.get("rounds", 0) * results.get("sittings", 1)
    return {figure.name: figure for figure in _walk(results, (), rounds)}


def verdict(a: Figure, b: Figure) -> str:
    if a.quartiles is None or b.quartiles is None:
        return "same" if a.value == b.value else "changed"
    if max(a.quartiles[0], b.quartiles[0]) <= min(a.quartiles[1], b.quartiles[1]):
        return "within the noise"
    if min(a.rounds, b.rounds) < ENOUGH:
        return TOO_FEW
    more = b.value > a.value
    if SLOWER & set(a.name):
        return "slower" if more else "faster"
    if FASTER & set(a.name):
        return "faster" if more else "slower"
    return "more" if more else "less"


def compared(old: Results, new: Results, everything: bool = False) -> str:
    """What changed from old results of a suite to new ones, as text; on request, all figures.

    Raises:
      UserError: they are of different suites, or one is of a quick run and the other is not.
    """
    if old["suite"] != new["suite"]:
        raise UserError(
            f"these are results of different suites, {old['suite']!r} and {new['suite']!r}: "
            "compare two of one suite"
        )
    if old.get("quick", False) != new.get("quick", False):
        raise UserError(
            "one of these is a quick run, which works on tiny sizes: its times cannot be compared "
            "with the other's"
        )
    lines = [f"{old['suite']}, from A to B", f"A: {origin(old)}", f"B: {origin(new)}"]
    if machine(old) != machine(new):
        lines.append("THE DEVICES DIFFER: what follows is about the machines as much as the code.")
    if old.get("quick"):
        lines.append("Quick runs: tiny sizes, whose times mean little.")
    before, after = figures(old), figures(new)
    verdicts, factors = {}, {}
    for name in [name for name in before if name in after]:
        verdicts[name] = verdict(before[name], after[name])
        a, b = before[name].value, after[name].value
        is_number = not (isinstance(a, bool | str) or isinstance(b, bool | str))
        # A text, a 0 and a change of sign have no factor.
        factors[name] = b / a if is_number and a and b / a > 0 else 1.0
    unchanged = () if everything else ("same", "within the noise")
    changed = [name for name, outcome in verdicts.items() if outcome not in unchanged]
    # Figures of enough rounds come first, and among them the largest changes.
    changed.sort(key=lambda name: (verdicts[name] == TOO_FEW, -abs(math.log(factors[name]))))
    for name in changed:
        times = "" if factors[name] == 1 else f", {factors[name]:.3g} times"
        values = f"{before[name]} -> {after[name]}{times}"
        lines.append(f"  {verdicts[name]:10} {' / '.join(name)}: {values}")
    for label, own, others in (("A", before, after), ("B", after, before)):
        if unmatched := [name for name in own if name not in others]:
            first = "; ".join(" / ".join(name) for name in unmatched[:3])
            more = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
            lines.append(f"  only in {label}: {first}{more}")
    counts = ", ".join(f"{n} {outcome}" for outcome, n in Counter(verdicts.values()).most_common())
    lines.append(f"{len(verdicts)} figures: {counts or 'none in common'}.")
    if any(SLOWER & set(name) for name in changed):
        lines.append(
            "A ratio is taken within a round, so it is right even if the machine as a whole was "
            "faster or slower."
        )
    return "\n".join(lines)
