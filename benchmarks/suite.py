"""The command of a suite: its options, its progress and the file of its results."""

import argparse
import importlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import measure
from benchmarks.train.options import number

Item = TypeVar("Item")

# The smallest counts that are allowed, which a quick run uses. A sitting starts all processes anew
# and has its own rounds.
LEAST = {"rounds": 2, "grid_rounds": 2, "sittings": 1}


@dataclass
class Suite:
    """A run of a suite: its options and its results.

    After `parse`, `args` has the options, and `results` is the content of the JSON file. `partial`
    is whether the run is quick or leaves out some cases: such results are written only with
    `--out`.
    """

    name: str  # of the suite and of its JSON file
    about: str | None  # shown by `--help`
    packages: Sequence[str]  # whose versions the results name
    # Defaults of the options `--rounds`, `--sittings` and the like.
    counts: Mapping[str, int] = field(default_factory=dict)
    # The choices of `--contenders`, and the module that each needs.
    contenders: Mapping[str, str] = field(default_factory=dict)
    only_chooses: str | None = None  # what `--only` selects from, in a few words
    folder: str | None = None  # under benchmarks/results; by default the platform's
    written: Path | None = None  # after `finish`: the file of the results, if it wrote one

    def __post_init__(self) -> None:
        self.parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks {self.name}",
            description=self.about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add = self.parser.add_argument
        add("--quick", action="store_true", help="tiny sizes, to see whether all runs")
        add("--out", type=Path, help="where to write the JSON")
        for count, default in self.counts.items():
            option = f"--{count.replace('_', '-')}"
            add(option, type=number(int, LEAST[count]), help=f"default {default}")
        if self.only_chooses:
            add("--only", default="", help=f"{self.only_chooses} whose name contains this text")
        if self.contenders:
            add("--contenders", help=f"some of: {'; '.join(self.contenders)}; split by ;")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        self.args = args = self.parser.parse_args(argv)
        # Not in `finish`: somebody may commit during the run.
        self.commit = measure.commit()
        self.partial = any(getattr(args, x, None) for x in ("quick", "only", "contenders"))
        self.results: dict[str, Any] = {"suite": self.name, "quick": args.quick}
        for name, default in self.counts.items():
            if getattr(args, name) is None:
                setattr(args, name, LEAST[name] if args.quick else default)
            self.results[name] = getattr(args, name)
        return args

    def chosen(self, names: Collection[str]) -> list[str]:
        """The cases whose name contains the text of `--only`. If none does, the process ends."""
        matching = [name for name in names if self.args.only in name]
        if not matching:
            self.parser.error(f"no name contains {self.args.only!r}; the names are {list(names)}")
        return matching

    def chosen_contenders(self) -> list[str]:
        """The contenders of `--contenders`, or all, without those that are not installed."""
        named = self.args.contenders.split(";") if self.args.contenders else list(self.contenders)
        if unknown := [name for name in named if name not in self.contenders]:
            self.parser.error(f"unknown contenders {unknown}; known: {list(self.contenders)}")
        available = [name for name in named if measure.installed(self.contenders[name])]
        for name in set(named) - set(available):
            say(f"{name}: left out, {self.contenders[name]} is not installed")
        return available

    def finish(self) -> int:
        """Prints the tables of the results, writes the JSON and returns the exit code."""
        environment = measure.environment(*self.packages) | {"commit": self.commit}
        names = ("versions", "date") if self.folder else environment
        self.results["environment"] = {name: environment[name] for name in names}
        # Not at the top: it imports the suites, and they import this file.
        tables = importlib.import_module("benchmarks.tables")
        if render := tables.SUITES.get(self.name):
            print(f"\n{render(self.results)}\n")
        if self.args.out or not self.partial:
            folder = measure.RESULTS / (self.folder or environment["platform"])
            self.written = self.args.out or folder / f"{self.name}.json"
            measure.save(self.results, self.written)
            print(f"written to {self.written}")
        return 0


def progress(items: Iterable[Item], unit: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a progress bar on stderr if that is a terminal.

    `total` is their number, if they have no length.
    """
    from tqdm import tqdm

    return tqdm(items, unit=unit, total=total, disable=None, leave=False)


def say(text: str) -> None:
    """Prints a line at once, above a progress bar if there is one."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        print(text, flush=True)


def say_times(case: str, ms: Mapping[str, dict[str, float]]) -> None:
    times = ", ".join(f"{name} {x['median']:.1f}" for name, x in ms.items())
    say(f"{case:40} ms: {times}")
