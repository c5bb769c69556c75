"""The options of the job, and their checks, which come before anything is read or compiled."""

import argparse
import dataclasses
import importlib.util
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

RUNS = Path("runs")

# With --compare: the default of --steps, and the smallest value.
COMPARED_STEPS, _FEWEST_COMPARED = 200, 12

# The choices of --rows: what a step does with the rows of tables.
ROWS = {
    "exact": "as with dense gradients, at the cost of the rows read",
    "lazy": "only the rows read move",
    "dense": "as with dense gradients, but without making them",
    "none": "dense gradients",
}


class UserError(Exception):
    """An error of the user. The message is one line."""


def _option(default: Any, help: str, least: float = 0, above: bool = False) -> Any:
    kind = type(default)
    metadata = {
        "type": number(kind, least, above),
        "metavar": "X" if kind is float else "N",
        "help": f"{help} (default: {default})",
    }
    return dataclasses.field(default=default, metadata=metadata)


def number(kind: type, least: float, above: bool = False) -> Callable[[str], Any]:
    """The type of an option, for argparse: a number of at least `least`, or above it."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            what = "a whole number" if kind is int else "a number"
            limit = f"above {least}" if above else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"expected {what} {limit}, got {text!r}")
        return value

    return parse


@dataclass(frozen=True)
class Config:
    """Everything that a run's result depends on, besides the text."""

    steps: int = _option(500, "optimizer steps", 1)
    batch: int = _option(2048, "words to predict in a step", 1)
    context: int = _option(8, "words before a prediction", 1)
    dim: int = _option(128, "numbers in a word's embedding", 1)
    hidden: int = _option(256, "units of the hidden layer", 1)
    vocab: int = _option(24_000, "most words in the vocabulary; they occur at least twice", 2)
    learning_rate: float = _option(1e-2, "largest rate, after a tenth of the steps", above=True)
    weight_decay: float = _option(1e-2, "share of the weights to subtract, times the rate")
    seed: int = _option(0, "of the initial weights and the order of the batches")
    rows: str = "exact"

    @property
    def momentum(self) -> float:
        """The momentum of the weights' average, which looks back over a fifth of the steps."""
        return max(0.0, 1 - 5 / self.steps)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks train",
        description="Trains word embeddings and a next-word model on real text.",
        epilog="Ctrl-C saves the run, and --resume continues it; on a CPU the weights then end bit "
        "for bit as without the break. --rows, what a step does with the rows of tables: "
        + "; ".join(f"{name}: {what}" for name, what in ROWS.items())
        + ".",
        allow_abbrev=False,
    )

    def add(name: str, help: str, **more: Any) -> None:
        parser.add_argument(f"--{name.replace('_', '-')}", help=help, **more)

    own = "the documentation and library sources of this Python"
    add("text", f"UTF-8 files to train on (default: {own})", nargs="+", metavar="FILE")
    add("name", "results go to runs/NAME (default: train-1, train-2, ...)")
    add("resume", "continue the run in DIR, with its options", type=Path, metavar="DIR")
    for field in dataclasses.fields(Config):
        if field.metadata:
            add(field.name, default=argparse.SUPPRESS, **field.metadata)
    how = "how rows of tables are read and updated, see below (default: exact)"
    add("rows", how, choices=ROWS, default=argparse.SUPPRESS)
    what = "train with each of --rows in turn instead, and show losses and step times side by side"
    add("compare", f"{what} (default of --steps: {COMPARED_STEPS})", action="store_true")
    where = "benchmarks/results/PLATFORM/train.json, only with the default options"
    add("out", f"the JSON of --compare (default: {where})", type=Path, metavar="FILE")
    seconds = {"type": number(float, 0), "default": 60.0, "metavar": "SECONDS"}
    add("save_every", "between checkpoints while it trains (default: 60)", **seconds)
    how = "train in N processes, on this machine unless --coordinator is given (default: 1)"
    add("processes", how, type=number(int, 1), default=1, metavar="N")
    how = "a port of process 0's machine; start the command on each machine, with its --process"
    add("coordinator", how, metavar="HOST:PORT")
    how = "with --coordinator: the number of this machine's process, from 0"
    add("process", how, type=number(int, 0), metavar="I")
    # Added by the launcher: HOST:PORT of process 0, the process' number, and the run's folder.
    add("meet", argparse.SUPPRESS)
    add("number", argparse.SUPPRESS, type=int)
    add("folder", argparse.SUPPRESS, type=Path)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; `chosen` has the options of `Config` on the command line, `config` has all.

    Raises:
      UserError: they do not fit together, or a file or folder that they name cannot be used.
    """
    options = _parser().parse_args(argv)
    names = [field.name for field in dataclasses.fields(Config)]
    options.chosen = {name: x for name, x in vars(options).items() if name in names}
    steps = {"steps": COMPARED_STEPS} if options.compare else {}
    options.config = Config(**{**steps, **options.chosen})
    for fault in _faults(options):  # the first one
        raise UserError(fault)
    return options


def _faults(options: argparse.Namespace) -> Iterator[str]:
    config, name, process = options.config, options.name, options.process
    decay_of_a_step = config.learning_rate * config.weight_decay
    if decay_of_a_step >= 1:
        yield f"--learning-rate times --weight-decay must be below 1, got {decay_of_a_step:g}"
    # The batch size of a resumed run is not known yet.
    if not options.resume and config.batch % options.processes:
        yield f"--batch {config.batch} is not a multiple of --processes {options.processes}"
    if (options.coordinator is None) != (process is None):
        yield "--coordinator and --process go together, with --processes"
    if process is not None and process >= options.processes:
        yield f"--process: expected a number below --processes {options.processes}, got {process}"
    if options.coordinator and not re.fullmatch(r".+:\d+", options.coordinator):
        yield f"--coordinator: expected HOST:PORT, got {options.coordinator!r}"
    if options.compare:
        if options.processes > 1:
            yield "--compare runs in one process: leave --processes out"
        if name or options.resume or "rows" in options.chosen:
            yield "--compare saves no run and trains with all of --rows: leave these options out"
        if config.steps < _FEWEST_COMPARED:
            yield f"--compare: expected --steps of at least {_FEWEST_COMPARED}"
        if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
            yield f"--out {options.out}: expected a file in a folder that exists"
    elif options.out:
        yield "--out is only for --compare; a run writes to runs/NAME"
    if name is not None and options.resume:
        yield "--name and --resume exclude each other: a resumed run keeps its name"
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        yield f"--name: expected letters, digits, - and ., got {name!r}"
    if not (options.compare or options.resume or options.folder or process):
        if RUNS.exists() and not RUNS.is_dir():
            yield f"{RUNS} is a file, but must be the folder of the runs: move it away"
        if name and (RUNS / name).exists():
            yield f"{RUNS / name} is there already: choose another --name, or --resume a run"
    for package in ("matplotlib", "tqdm"):
        if importlib.util.find_spec(package) is None:
            yield f"{package} is missing: pip install 'adamjax[bench]'"


def resume_command(options: argparse.Namespace) -> str:
    """The command that resumes the run, for the folder in which the job was started."""
    folder = str(options.resume or options.folder)
    command = [sys.executable, "-m", "benchmarks", "train", "--resume", folder]
    defaults = _parser().parse_args([])
    for name in ("save_every", "processes", "coordinator", "process"):
        if getattr(options, name) != getattr(defaults, name):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return shlex.join(command)
