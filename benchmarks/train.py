"""The main job: a next-word model trained on real text with the whole chain, one step at a time.

The gradients are clipped by their global norm, scaled by Adam, decayed weights are added, the
rate warms up and follows a cosine, and an average of the weights is kept: one jitted step, with
parameters and optimizer state donated. Everything that a step does depends on the options and on
its number alone, so a run that was interrupted and resumed ends with the same bits.

A step reads some rows of two tables, and `--rows` says what it does for the others: `exact` has
the effect of dense gradients at the cost of the rows that are read, and is the default. Between
steps the other rows lag behind, so before anything else reads the weights all are brought up to
date: at the end, or for the evaluation of an interrupted run, whose checkpoint is left as it was.
`--compare` trains with each in turn and shows what that costs, and what becomes of the losses.

A batch is split over all devices there are, of this process or of several (`--processes`): all
hold the same parameters and state, and a step is one program over all of them. Only process 0
reports and writes.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

try:
    from jax import shard_map

    # Checked, it adds up the gradients of each use of a parameter by itself.
    _UNCHECKED = {"check_vma": False}
except ImportError:  # an older JAX
    from jax.experimental.shard_map import shard_map

    _UNCHECKED = {"check_rep": False}

import adamjax
from benchmarks import model
from benchmarks.measure import RESULTS, environment, save, spread
from benchmarks.processes import (
    ALONE,
    LOST,
    Interruption,
    Lost,
    Processes,
    end,
    end_with_launcher,
    free_port,
    join,
    launch,
)
from benchmarks.text import (
    Complaint,
    Text,
    installation,
    make_text,
    read_files,
    tuned_bigram,
    unigram,
)

__all__ = ["main"]

RUNS = Path("runs")


# --- options --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All that a run's result depends on, besides the text itself."""

    steps: int = 500
    batch: int = 2048
    context: int = 8
    dim: int = 128
    hidden: int = 256
    vocab: int = 24_000
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    seed: int = 0
    rows: str = "exact"


# name: what a step does for the rows that it reads, and for the others
ROWS: dict[str, str] = {
    "exact": "what dense gradients would do, at the cost of the rows read",
    "lazy": "the rows read move, all others stand still",
    "dense": "what dense gradients would do, without making them",
    "none": "dense gradients",
}

# name: the least value, the help text
_OPTIONS: dict[str, tuple[float, str]] = {
    "steps": (1, "optimizer steps"),
    "batch": (1, "words to predict in a step"),
    "context": (1, "words that a prediction sees"),
    "dim": (1, "numbers in a word's embedding"),
    "hidden": (1, "units of the hidden layer"),
    "vocab": (2, "most words in the vocabulary; they occur at least twice"),
    "learning_rate": (0, "largest learning rate, after a tenth of the steps"),
    "weight_decay": (0, "share of the weights taken off a step, times the learning rate"),
    "seed": (0, "of the initial weights and the order of the batches"),
}

# A comparison's steps with each of `ROWS`, how many are taken in a row, and the fewest: in four
# rounds, of which the first is not timed.
_COMPARED, _IN_A_ROW, _FEWEST = 200, 10, 12


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Complaint(f"{message}; --help lists the options")


def _number(least: float, kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value >= least and math.isfinite(value)):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} of at least {least}, got {text!r}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks train",
        description="Trains word embeddings and a next-word model on real text.",
        epilog="Ctrl-C keeps what was learned so far, to be continued with --resume; on a CPU the "
        "weights then end bit for bit as without the break. --rows: "
        + "; ".join(f"{name}: {what}" for name, what in ROWS.items())
        + ".",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="UTF-8 files to train on (default: the documentation and library sources of this "
        "Python)",
    )
    parser.add_argument("--name", help="results go to runs/NAME (default: train-1, train-2, ...)")
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="continue the run in DIR, with its options"
    )
    parser.add_argument(
        "--rows",
        choices=ROWS,
        default=argparse.SUPPRESS,
        help=f"how the tables' rows are read and updated, see below (default: {Config.rows})",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train with each of --rows in turn instead, and show losses and step times side by "
        f"side ({_COMPARED} steps unless --steps says otherwise)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the JSON of --compare (default: benchmarks/results/PLATFORM/train.json, where only "
        "the default options' results go)",
    )
    parser.add_argument(
        "--save-every",
        type=_number(0, float),
        default=60.0,
        metavar="SECONDS",
        help="between checkpoints while it trains (default: 60)",
    )
    parser.add_argument(
        "--processes",
        type=_number(1, int),
        default=1,
        metavar="N",
        help="train in N processes, on this machine unless --coordinator is given (default: 1)",
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="a port of process 0's machine: for processes on several machines, on each of which "
        "the same is started, but for --process",
    )
    parser.add_argument(
        "--process",
        type=_number(0, int),
        metavar="I",
        help="with --coordinator: which of the N processes this machine's is, from 0",
    )
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    for option in dataclasses.fields(Config):
        if option.name not in _OPTIONS:
            continue
        least, what = _OPTIONS[option.name]
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=_number(least, type(option.default)),
            default=argparse.SUPPRESS,
            metavar="X" if isinstance(option.default, float) else "N",
            help=f"{what} (default: {option.default})",
        )
    return parser


# --- what a run keeps -----------------------------------------------------------------------------


@dataclass
class Run:
    """A run's place and progress; parameters and state are what the next step starts from."""

    folder: Path
    config: Config
    files: list[str]
    digest: str
    params: Any
    state: Any
    losses: list[float] = field(default_factory=list)
    held_out: dict[str, Any] = field(default_factory=dict)

    @property
    def trees(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"params": self.params, "state": self.state}


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """A file that is there whole or not at all, whatever happens meanwhile."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _save(run: Run) -> None:
    """Writes all that the run goes on from; with `exact`, rows of it may lag behind until the end.

    What a finished run leaves is up to date: `params` and `average` are the weights.
    """
    about = {
        "config": dataclasses.asdict(run.config),
        "files": run.files,
        "digest": run.digest,
        "losses": run.losses,
        "held_out": run.held_out,
    }
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in _named_leaves(run.trees).items()}
    arrays["about"] = np.array(json.dumps(about))
    _write(run.folder / "checkpoint.npz", lambda file: np.savez(file, **arrays))


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was read."""

    folder: Path
    config: Config
    about: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def finished(self) -> bool:
        """Whether the last steps are taken, and what came of them was written down."""
        try:
            return json.loads((self.folder / "metrics.json").read_bytes())["finished"]
        except (OSError, ValueError, KeyError):
            return False

    def restore(self, run: Run) -> None:
        """Puts a run where this one stood."""
        if self.about["digest"] != run.digest:
            raise Complaint(
                f"{self.folder}: this run was trained on another text (or another Python's "
                "sources); start a new one"
            )

        def kinds(arrays: dict[str, Any]) -> dict[str, Any]:
            return {name: (x.shape, x.dtype) for name, x in arrays.items()}

        here = _named_leaves(run.trees)
        if kinds(here) != kinds(self.arrays):
            raise Complaint(f"{self.folder}: the checkpoint is another version's; start a new run")
        # Copies: what NumPy owns cannot be donated.
        leaves = [jnp.array(self.arrays[name], copy=True) for name in here]
        trees = jax.tree.unflatten(jax.tree.structure(run.trees), leaves)
        run.params, run.state = trees["params"], trees["state"]
        run.losses, run.held_out = self.about["losses"], self.about["held_out"]


def _load(folder: Path) -> Saved:
    path = folder / "checkpoint.npz"
    try:
        with np.load(path) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        return Saved(folder, Config(**about.pop("config")), about, arrays)
    except FileNotFoundError:
        raise Complaint(f"{folder}: no checkpoint.npz to resume from") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise Complaint(f"{path}: not a checkpoint of this job ({error})") from None


def _taken(folder: Path) -> Complaint:
    return Complaint(f"{folder} is there already: choose another --name, or --resume {folder}")


def _new_folder(name: str | None) -> Path:
    RUNS.mkdir(exist_ok=True)
    while True:
        folder = RUNS / (name or _free_name())
        try:
            folder.mkdir()
        except FileExistsError:
            if name:
                raise _taken(folder) from None
        else:
            return folder


def _free_name() -> str:
    names = (f"train-{number}" for number in itertools.count(1))
    return next(name for name in names if not (RUNS / name).exists())


# --- training -------------------------------------------------------------------------------------


def optimizer(config: Config, vocabulary: int) -> adamjax.Transform:
    """The whole chain."""
    warm = config.steps // 10
    rate = adamjax.cosine_decay(config.learning_rate, decay_steps=config.steps - warm)
    lazy = config.rows == "lazy"
    chain = adamjax.chain(
        adamjax.clip_by_global_norm(1.0),
        adamjax.scale_by_adam(b1=0.9, b2=0.999, eps_hat=1e-7, rows="lazy" if lazy else "dense"),
        adamjax.add_decayed_weights(config.weight_decay, mask="embedding|kernel"),
        adamjax.scale_by_learning_rate(adamjax.warmup(rate, warm) if warm else rate),
        adamjax.weight_ema(momentum=0.99),
    )
    if config.rows != "exact":
        return chain
    return adamjax.exact_rows(chain, [f"^{path}$" for path in model.tables(vocabulary)])


def _initial(config: Config, text: Text) -> dict[str, Any]:
    """The parameters that a run starts with."""
    frequencies = unigram(text)
    return model.init(config.seed, frequencies, config.context, config.dim, config.hidden)


Gradients = tuple[jax.Array, Any, dict[str, Any]]


def gradients(
    tx: adamjax.Transform,
    params: Any,
    state: Any,
    batch: model.Batch,
    vocabulary: int,
    size: Mapping[str, int] | None,
    loss: Callable[[Any, model.Batch, int], jax.Array] = model.loss,
) -> Gradients:
    """The loss, its gradients, and what else `tx.update` is given.

    Args:
      size: how many rows to make room for, by table; `None` for dense gradients.
      loss: `model.loss`, or the same over several devices.
    """
    if size is None:
        return *jax.value_and_grad(loss)(params, batch, vocabulary), {}
    ticket = None
    indices, batch = model.reads(batch, vocabulary, size)
    if isinstance(tx, adamjax.exact_rows):
        rows, ticket = tx.prepare(params, state, indices)
        others = tx.without_tables(params)
    else:
        rows = {
            path: model.leaf(params, path).at[ids].get(mode="fill", fill_value=0)
            for path, ids in indices.items()
        }
        others = model.replaced(params, dict.fromkeys(indices))

    def of_rows(others: Any, rows: Any) -> jax.Array:
        return loss(model.by_rows(others, rows, indices), batch, vocabulary)

    value, (grads, found) = jax.value_and_grad(of_rows, argnums=(0, 1))(others, rows)
    if ticket is not None:
        of_tables = {path: ticket.row_gradient(path, g) for path, g in found.items()}
        return value, model.replaced(grads, of_tables), {"ticket": ticket}
    of_tables = {
        path: adamjax.row_gradient(indices[path], g, len(model.leaf(params, path)))
        for path, g in found.items()
    }
    return value, model.replaced(grads, of_tables), {}


@dataclass(frozen=True)
class Course:
    """What is trained on, and in which order; `size` is how many rows a batch reads at most."""

    tokens: jax.Array
    batches: model.Shuffled
    vocabulary: int
    size: dict[str, int]


def make_course(config: Config, text: Text) -> Course:
    """All steps' batches."""
    training = model.windows(text.training, config.context, text.boundary)
    batches = model.Shuffled(training.starts, config.batch, config.seed)
    vocabulary = len(text.words)
    size = model.room(training, vocabulary, batches, config.steps)
    return Course(training.tokens, batches, vocabulary, size)


def mean_over(mesh: Mesh) -> Callable[[Any, model.Batch, int], jax.Array]:
    """`model.loss` of a batch of which each device of a mesh takes its share.

    Which rows a batch reads is found out before, and every device has them all: so what devices
    add up are gradients of the rows of a step, once, and of no table unless they are dense.
    """
    if mesh.size == 1:
        return model.loss
    everywhere, axis = NamedSharding(mesh, P()), mesh.axis_names

    def loss(params: Any, batch: model.Batch, vocabulary: int) -> jax.Array:
        def of_share(params: Any, share: model.Batch) -> jax.Array:
            return jax.lax.pmean(model.loss(params, share, vocabulary), axis)

        # Not to be split earlier: numbers of rows cost less to find than to exchange.
        batch = jax.lax.with_sharding_constraint(batch, everywhere)
        split = model.Batch(P(axis), P(axis), P())
        return shard_map(of_share, mesh=mesh, in_specs=(P(), split), out_specs=P(), **_UNCHECKED)(
            params, batch
        )

    return loss


class Step:
    """One jitted step over the devices of a mesh, compiled.

    Args:
      trees: parameters and state such as it is called with.
    """

    def __init__(
        self, tx: adamjax.Transform, config: Config, course: Course, mesh: Mesh, *trees: Any
    ):
        key = jax.random.key(config.seed)
        vocabulary = course.vocabulary
        size = None if config.rows == "none" else course.size
        if config.batch % mesh.size:
            raise Complaint(
                f"--batch {config.batch} cannot be split evenly over {mesh.size} devices"
            )

        everywhere, loss_over = NamedSharding(mesh, P()), mean_over(mesh)

        @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=everywhere)
        def step(
            params: Any, state: Any, tokens: jax.Array, starts: jax.Array, stop: jax.Array
        ) -> Any:
            draw = jax.random.fold_in(key, adamjax.step_count(state))
            batch = model.batch(tokens, starts, config.context, vocabulary, draw)
            loss, grads, extra = gradients(tx, params, state, batch, vocabulary, size, loss_over)
            updates, state = tx.update(grads, state, params, **extra)
            return adamjax.apply_updates(params, updates), state, loss, jnp.any(stop)

        split, here = (
            NamedSharding(mesh, P(mesh.axis_names)),
            np.ones(len(mesh.local_devices), bool),
        )
        self.stop = [jax.make_array_from_process_local_data(split, here & x) for x in (False, True)]
        self.tokens = on_all(mesh, course.tokens)
        self.compiled = step.lower(
            *trees, self.tokens, course.batches.at(0), self.stop[False]
        ).compile()

    def __call__(self, params: Any, state: Any, starts: np.ndarray, stop: bool = False) -> Any:
        """Takes parameters and state, which it donates, and a batch.

        Returns:
          The new ones, the loss, and whether any process said stop: all see it at one step.
        """
        return self.compiled(params, state, self.tokens, starts, self.stop[stop])


def on_all(mesh: Mesh, tree: Any) -> Any:
    """Arrays of this process as arrays of a mesh, whole on each of its devices."""
    everywhere = NamedSharding(mesh, P())

    def copied(x: Any) -> jax.Array:
        copies = [jax.device_put(x, device) for device in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(np.shape(x), everywhere, copies)

    return jax.tree.map(copied, tree)


def here(tree: Any) -> Any:
    """Arrays that are whole on each device, as arrays of one of this process' devices."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def up_to_date(tx: adamjax.Transform, params: Any, state: Any) -> tuple[Any, Any]:
    """Parameters and state, which are donated, with no row lagging behind."""
    if not isinstance(tx, adamjax.exact_rows):
        return params, state
    return jax.jit(tx.flush, donate_argnums=(0, 1))(params, state)


def train(
    run: Run,
    tx: adamjax.Transform,
    text: Text,
    stop: Interruption,
    processes: Processes,
    save_every: float,
) -> dict[str, float]:
    """Takes the steps that are left, or fewer when stopped; returns how long they took.

    Only here do parameters and state lie on all devices, and do steps need all processes.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    config = run.config
    first = len(run.losses)
    if first == config.steps:
        return {"compile_seconds": 0.0, "train_seconds": 0.0, "tokens_per_second": 0}
    course = make_course(config, text)
    mesh = processes.mesh()
    began = time.perf_counter()
    run.params, run.state = on_all(mesh, (run.params, run.state))
    step = Step(tx, config, course, mesh, run.params, run.state)
    saved = compiled = time.perf_counter()

    with (
        processes.together(),
        tqdm(
            total=config.steps * config.batch,
            initial=first * config.batch,
            unit=" tokens",
            unit_scale=True,
            ncols=shutil.get_terminal_size().columns,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            disable=not processes.first,
        ) as bar,
    ):
        for number in range(first, config.steps):
            batch = course.batches.at(number)
            run.params, run.state, loss, stopped = step(
                run.params, run.state, batch, stop.times > 0
            )
            run.losses.append(round(float(loss), 6))
            if not math.isfinite(run.losses[-1]):
                break
            bar.set_postfix(loss=f"{run.losses[-1]:.2f}", step=number + 1, refresh=False)
            bar.update(config.batch)
            if stopped:
                break
            if processes.first and time.perf_counter() - saved >= save_every:
                _save(run)
                saved = time.perf_counter()
    run.params, run.state = here((run.params, run.state))
    seconds = time.perf_counter() - compiled
    taken = (len(run.losses) - first) * config.batch
    return {
        "compile_seconds": round(compiled - began, 2),
        "train_seconds": round(seconds, 2),
        "tokens_per_second": round(taken / seconds),
    }


# --- telling --------------------------------------------------------------------------------------


def _plot(run: Run, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(run.losses) + 1)
    width = max(1, min(25, len(steps) // 4))
    smooth = np.convolve(run.losses, np.ones(width) / width, "valid")
    middle = steps[: len(smooth)] + (width - 1) / 2
    axes.plot(steps, run.losses, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(middle, smooth, color="C0", label="training batches")

    held_out = run.held_out
    for name, colour in (("unigram", "C7"), ("bigram", "C3")):
        value = held_out[name]
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{name}, held-out: {value:.2f}",
            (0.99, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    marks = [(0, held_out["before"]), (len(run.losses), held_out["after"])]
    marks = [(step, value) for step, value in marks if value is not None]
    axes.plot(*zip(*marks, strict=True), "o", color="C2", label="held-out, averaged weights")
    for step, value in marks[1:]:
        axes.annotate(
            f"{value:.2f}", (step, value), xytext=(0, -14), textcoords="offset points", ha="center"
        )
    axes.set_xlim(-0.02 * run.config.steps, 1.04 * run.config.steps)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.set_title(f"Predicting the next word: Adam with a weight average, rows: {run.config.rows}")
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)


def _report(run: Run, text: Text, near: dict[str, list[str]]) -> None:
    rows = [
        ("unigram", run.held_out["unigram"]),
        ("bigram", run.held_out["bigram"]),
        ("the model before training", run.held_out["before"]),
        (f"the model after {len(run.losses)} steps", run.held_out["after"]),
    ]
    print(f"\nheld-out loss over {text.held_out.size:,} tokens, nats per token, and perplexity")
    for what, value in rows:
        numbers = "not evaluated" if value is None else f"{value:6.3f} {np.exp(value):8.1f}"
        print(f"  {what:28} {numbers}")
    print("\nnearest embeddings")
    for word, others in near.items():
        print(f"  {word:12} {' '.join(others)}")
    print()


def _metrics(run: Run, text: Text, near: dict[str, list[str]], **more: Any) -> Any:
    return {
        "config": dataclasses.asdict(run.config),
        "text": {
            "description": text.description,
            "sha256": run.digest,
            "vocabulary": len(text.words),
            "training_tokens": text.training.size,
            "held_out_tokens": text.held_out.size,
            "held_out_unknown": round(float((text.held_out == 0).mean()), 6),
        },
        "steps_taken": len(run.losses),
        "finished": len(run.losses) == run.config.steps and run.held_out["after"] is not None,
        "held_out_loss": run.held_out,
        "neighbours": near,
        **more,
        **environment("adamjax", "jax", "jaxlib", "numpy"),
        "training_loss": run.losses,
    }


# --- each way of treating rows, side by side ------------------------------------------------------


class _Contender:
    """One way of treating rows, and how far it has come."""

    def __init__(self, config: Config, text: Text, course: Course):
        self.tx = optimizer(config, course.vocabulary)
        self.course = course
        self.params = _initial(config, text)
        self.state = self.tx.init(self.params)
        mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
        self.params, self.state = on_all(mesh, (self.params, self.state))
        began = time.perf_counter()
        self.step = Step(self.tx, config, course, mesh, self.params, self.state)
        self.compile_seconds = time.perf_counter() - began
        self.losses: list[float] = []

    def take(self, steps: int) -> float:
        """Takes steps; returns the median of their seconds, less the first's, whose caches hold
        another's arrays."""
        seconds = []
        for _ in range(steps):
            starts = self.course.batches.at(len(self.losses))
            began = time.perf_counter()
            self.params, self.state, loss, _ = self.step(self.params, self.state, starts)
            self.losses.append(float(loss))
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])

    def held_out(self, windows: model.Windows, given_up: Callable[[], bool]) -> float | None:
        """The loss with the averaged weights."""
        self.params, self.state = up_to_date(self.tx, self.params, self.state)
        return model.held_out_loss(adamjax.averaged_weights(self.state), windows, given_up)


def compare(config: Config, text: Text, stop: Interruption) -> dict[str, Any] | None:
    """Trains with each of `ROWS`, a few steps at a time in turn; `None` when interrupted.

    Who goes first changes from round to round, and a ratio is taken within a round.
    """
    course = make_course(config, text)
    all_in_turn = {}
    for rows in ROWS:
        all_in_turn[rows] = _Contender(dataclasses.replace(config, rows=rows), text, course)
        if stop.times:
            return None
    seconds: list[dict[str, float]] = []
    in_a_row = min(_IN_A_ROW, config.steps // 4)
    for round_ in range(config.steps // in_a_row):
        first = round_ % len(ROWS)
        names = [*list(ROWS)[first:], *list(ROWS)[:first]]
        seconds.append({name: all_in_turn[name].take(in_a_row) for name in names})
        latest = {name: x.losses[-1] for name, x in all_in_turn.items()}
        print(f"step {(round_ + 1) * in_a_row:,}: {_listed(latest, '.4f')}", flush=True)
        if not all(map(math.isfinite, latest.values())):
            raise Complaint("the loss is not finite: lower --learning-rate")
        if stop.times:
            return None
    del seconds[0]

    held_out = model.windows(text.held_out, config.context, text.boundary)
    plain = np.array(all_in_turn["none"].losses)
    table = {}
    for name, contender in all_in_turn.items():
        losses = np.array(contender.losses)
        table[name] = {
            "ms": spread([1e3 * s[name] for s in seconds]),
            "ratio_to_none": spread([s[name] / s["none"] for s in seconds]),
            "compile_seconds": contender.compile_seconds,
            "held_out_loss": contender.held_out(held_out, lambda: stop.times > 0),
            "training_loss": losses[in_a_row - 1 :: in_a_row].tolist(),
            "largest_difference_to_none": float(np.abs(losses - plain).max()),
        }
        if stop.times:
            return None
    params = all_in_turn["none"].params
    reads = {model.EMBEDDING: config.batch * config.context}
    reads[model.KERNEL] = config.batch + model.FREQUENT + model.DRAWN
    return {
        "suite": "train",
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "rows"},
        "text": text.description,
        "tables": {
            path: {
                "shape": list(model.leaf(params, path).shape),
                "reads": reads[path],
                "distinct_at_most": size,
            }
            for path, size in course.size.items()
        },
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "rounds": len(seconds),
        "steps_in_a_row": in_a_row,
        "rows": table,
        "environment": environment("adamjax", "jax", "jaxlib", "numpy"),
    }


def _listed(numbers: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in numbers.items())


def _verdict(name: str, ratio: dict[str, float]) -> str:
    if ratio["q25"] > 1:
        return f"{name} loses to none here: a step takes {ratio['median']:.2f} of its time"
    if ratio["q75"] < 1:
        return f"{name} is faster than none: a step takes {ratio['median']:.2f} of its time"
    return f"{name} is about as fast as none: {ratio['median']:.2f} of its time"


def _compared(results: dict[str, Any]) -> str:
    """What a comparison found, in a table and in words."""

    def range_(spread: dict[str, float], digits: int) -> str:
        low, middle, high = (f"{spread[k]:.{digits}f}" for k in ("q25", "median", "q75"))
        return f"{middle} ({low} to {high})"

    rows = results["rows"]
    share = "of none's time"
    lines = [
        f"\n{'rows':6} {'step, ms (quartiles)':>24} {share:>21} {'compile, s':>10}"
        f" {'training':>9} {'held-out':>9} {'largest difference':>19}"
    ]
    for name, row in rows.items():
        lines.append(
            f"{name:6} {range_(row['ms'], 1):>24} {range_(row['ratio_to_none'], 2):>21}"
            f" {row['compile_seconds']:10.1f} {row['training_loss'][-1]:9.4f}"
            f" {row['held_out_loss']:9.4f} {row['largest_difference_to_none']:19.1e}"
        )
    lines.append("The last is of any step's training loss to that of none; losses are in nats.\n")
    for path, table in results["tables"].items():
        num_rows, width = table["shape"]
        lines.append(
            f"{path}: {num_rows:,} rows of {width}; a step reads {table['reads']:,}, of which at "
            f"most {table['distinct_at_most']:,} are distinct"
        )
    lines += [_verdict(name, rows[name]["ratio_to_none"]) for name in rows if name != "none"]
    return "\n".join(lines)


def _comparison(given: argparse.Namespace, config: Config, text: Text, stop: Interruption) -> int:
    results = compare(config, text, stop)
    if results is None:
        print("train: interrupted, nothing was written", file=sys.stderr)
        return stop.status
    print(_compared(results))
    default = not given.text and config == Config(steps=_COMPARED)
    out = RESULTS / results["environment"]["platform"] / "train.json" if default else None
    if out := given.out or out:
        save(results, out)
        print(f"written to {out}")
    return 0


# --- the job --------------------------------------------------------------------------------------


def _checked(config: Config) -> Config:
    share = config.learning_rate * config.weight_decay
    if config.rows == "exact" and share >= 1:
        raise Complaint(
            "--rows exact: --learning-rate times --weight-decay must be below 1, got "
            f"{share:g}; choose others, or another of --rows"
        )
    return config


def _options(argv: list[str]) -> tuple[argparse.Namespace, Config, Saved | None]:
    given = _parser().parse_args(argv)
    known = {option.name for option in dataclasses.fields(Config)}
    chosen = {name: value for name, value in vars(given).items() if name in known}
    _check_processes(given)
    if given.compare:
        if given.name or given.resume or "rows" in chosen:
            raise Complaint("--compare keeps no run and takes all of --rows: leave the others out")
        config = Config(**{"steps": _COMPARED, **chosen})
        if config.steps < _FEWEST:
            raise Complaint(f"--compare: expected --steps of at least {_FEWEST}")
        return given, _checked(config), None
    if given.out is not None:
        raise Complaint("--out is of --compare alone; a run writes to runs/NAME")
    if given.resume is None:
        if given.name is not None:
            if not re.fullmatch(r"\w[\w.-]*", given.name):
                raise Complaint(f"--name: expected letters, digits, - and ., got {given.name!r}")
            if not given.process and (RUNS / given.name).exists():
                raise _taken(RUNS / given.name)
        return given, _checked(Config(**chosen)), None
    if given.name is not None:
        raise Complaint("--name and --resume exclude each other: a resumed run keeps its name")
    saved = _load(given.resume)
    for name, value in chosen.items():
        kept = getattr(saved.config, name)
        if kept != value:
            raise Complaint(
                f"{given.resume}: this run has {name.replace('_', ' ')} {kept}, not {value}; "
                "leave the option out, or start a new run"
            )
    return given, saved.config, saved


def _check_processes(given: argparse.Namespace) -> None:
    if given.compare and given.processes > 1:
        raise Complaint("--compare runs in one process: leave --processes out")
    if (given.coordinator is None) != (given.process is None):
        raise Complaint("--coordinator and --process go together, with --processes")
    if given.process is None:
        return
    if not given.process < given.processes:
        raise Complaint(
            f"--process: expected a number below --processes {given.processes}, got {given.process}"
        )
    host, _, port = given.coordinator.rpartition(":")
    if not (host and port.isdecimal()):
        raise Complaint(f"--coordinator: expected HOST:PORT, got {given.coordinator!r}")


def _launched(argv: list[str], given: argparse.Namespace, stop: Interruption) -> int:
    """Runs this machine's processes."""
    remote = given.coordinator is not None
    more = []
    folder = given.resume
    if folder is None and not given.process:
        # So that the launcher knows it as well.
        folder = RUNS / (given.name or _free_name())
        more = [] if given.name else ["--name", folder.name]

    def advice() -> str:
        if folder is None:
            return "to go on from the last checkpoint, start all again with --resume runs/NAME"
        if not (folder / "checkpoint.npz").exists():
            (folder / "checkpoint.npz.part").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # unless there is something in it
            return "there is no checkpoint to go on from yet: start again"
        again = f"python -m benchmarks train --resume {folder} --processes {given.processes}"
        everywhere = " with --coordinator and --process, on all machines" if remote else ""
        return f"to go on from the last checkpoint: {again}{everywhere}"

    return launch(
        [sys.executable, "-m", "benchmarks", "train", *argv, *more],
        given.processes,
        [given.process] if remote else range(given.processes),
        given.coordinator if remote else f"127.0.0.1:{free_port()}",
        stop,
        advice,
    )


def _job(argv: list[str], stop: Interruption) -> int:
    began = time.perf_counter()
    given, config, saved = _options(argv)
    if saved is not None and saved.finished:
        print(f"{saved.folder}: all {config.steps} steps are taken, nothing is left to resume")
        return 0
    for package in ("matplotlib", "tqdm"):
        if importlib.util.find_spec(package) is None:
            raise Complaint(f"{package} is missing: pip install 'adamjax[bench]'")
    processes = ALONE
    if given.processes > 1:
        if not given.member:
            return _launched(argv, given, stop)
        end_with_launcher()
        processes = join(given.coordinator, given.processes, given.process)
        if not processes.first:
            print(f"process {processes.index} of {processes.count}: process 0 reports", flush=True)
            sys.stdout = None

    kept = saved.about["files"] if saved else []
    files = [str(Path(path).resolve()) for path in given.text] if given.text else kept
    text = make_text(*(read_files(files) if files else installation()), config.vocab)
    print(f"text: {text.description}")
    print(
        f"      {text.training.size:,} tokens to train on, {text.held_out.size:,} held out, "
        f"{len(text.words):,} words",
        flush=True,
    )
    if given.compare:
        return _comparison(given, config, text, stop)
    frequencies = unigram(text)
    params = _initial(config, text)
    tx = optimizer(config, len(text.words))
    run = Run(Path(), config, files, text.digest(), params, tx.init(params))
    processes.agree("options", config)
    processes.agree("a text", run.digest)
    processes.agree("a checkpoint", saved and saved.about["losses"])
    held_out = model.windows(text.held_out, config.context, text.boundary)

    def evaluate(given_up: Callable[[], bool]) -> float | None:
        weights = adamjax.averaged_weights(run.state)
        return model.held_out_loss(weights, held_out, given_up, processes)

    if saved is not None:
        saved.restore(run)
    else:
        run.held_out = {
            "unigram": float(-np.log(frequencies[text.held_out]).mean()),
            "bigram": tuned_bigram(text).loss(text.held_out),
            "before": evaluate(lambda: stop.times > 0),
        }
    if processes.any(stop.times > 0):
        if processes.first:
            print("train: interrupted before a step was taken", file=sys.stderr)
        processes.leave()
        return stop.status
    if saved is not None:
        run.folder = saved.folder
    elif processes.first:
        run.folder = _new_folder(given.name)
    print("held-out: " + ", ".join(f"{k} {v:.3f}" for k, v in run.held_out.items() if v))
    left = config.steps - len(run.losses)
    print(
        f"run:  {run.folder}, {left:,} of {config.steps:,} steps to take, rows: {config.rows} "
        f"({ROWS[config.rows]}){_devices(processes)}",
        flush=True,
    )

    run.held_out["after"] = None
    speed = train(run, tx, text, stop, processes, given.save_every)
    if not math.isfinite(run.losses[-1]):
        if processes.first and not any(run.folder.iterdir()):
            run.folder.rmdir()
        raise Complaint(
            f"the loss is {run.losses[-1]} at step {len(run.losses)}: lower --learning-rate"
        )
    finished = len(run.losses) == config.steps
    if not finished and processes.first:
        # Rows that lag behind stay so: caught up now they would be rounded twice, and the run
        # would not go on with the bits of one that was not interrupted.
        _save(run)
    if left:
        run.params, run.state = up_to_date(tx, run.params, run.state)
    if finished and processes.first:
        _save(run)
    run.held_out["after"] = evaluate(lambda: stop.times > 1)
    processes.leave()
    status = 0 if finished else stop.status
    if not processes.first:
        return status
    near = model.neighbours(adamjax.averaged_weights(run.state), text.words)
    _plot(run, run.folder / "loss.png")
    speed["wall_seconds"] = round(time.perf_counter() - began, 2)
    metrics = json.dumps(
        _metrics(run, text, near, processes=processes.count, devices=jax.device_count(), **speed),
        indent=1,
    ).encode()
    _write(run.folder / "metrics.json", lambda file: file.write(metrics + b"\n"))

    _report(run, text, near)
    print(
        f"{speed['tokens_per_second']:,} tokens/s, {speed['wall_seconds']:.0f} s in all; "
        f"metrics.json, loss.png and checkpoint.npz are in {run.folder}"
    )
    if not finished:
        print(
            f"interrupted after step {len(run.losses):,} of {config.steps:,}; to go on: "
            f"python -m benchmarks train --resume {run.folder}"
        )
    return status


def _devices(processes: Processes) -> str:
    devices = jax.device_count()
    return "" if devices == 1 else f", on {devices} devices of {processes.count} processes"


def main(argv: list[str]) -> int:
    """Runs the job; returns the exit code.

    It is 0, 2 for what the user must mend, `LOST` when another process is gone, 128 + signal.
    """
    try:
        with Interruption() as stop:
            return end(_job(argv, stop))
    except Complaint as complaint:
        print(f"train: {complaint}", file=sys.stderr)
    except OSError as error:
        print(f"train: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
    except Lost as lost:
        print(f"train: another process is gone: {lost}", file=sys.stderr)
        return end(LOST)
    except BaseException:
        if jax.distributed.is_initialized():
            traceback.print_exc()
        end(1)
        raise
    return end(2)
