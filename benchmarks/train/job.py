"""One run: the optimizer, the step, and the loop from the text to the report."""

import argparse
import functools
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import adamjax
from benchmarks.train import checkpoints, data, model, report
from benchmarks.train.checkpoints import Run
from benchmarks.train.interruption import Interruption
from benchmarks.train.options import ROWS, Config, UserError, resume_command
from benchmarks.train.processes import ALONE, AXIS, Processes, join, on_all_devices

say = functools.partial(print, flush=True)

# What the first Ctrl-C does while the job trains, and what the second does.
_ANSWERS = (
    "finishing this step, then evaluating; Ctrl-C again skips the evaluation",
    "skipping the evaluation",
)


# --- the optimizer and the step -------------------------------------------------------------------


def optimizer(config: Config, vocabulary: int, devices: int = 1) -> adamjax.Transform:
    """The whole chain: clip, Adam, weight decay, learning rate, and an average of the weights.

    The rate warms up and then follows a cosine. Gradients of several devices are summed first.
    """
    warm = config.steps // 10
    rate = adamjax.cosine_decay(config.learning_rate, decay_steps=config.steps - warm)
    chain = adamjax.chain(
        adamjax.clip_by_global_norm(1.0),
        adamjax.scale_by_adam(
            b1=0.9, b2=0.999, eps_hat=1e-7, rows="lazy" if config.rows == "lazy" else "dense"
        ),
        adamjax.add_decayed_weights(config.weight_decay, mask="embedding|kernel"),
        adamjax.scale_by_learning_rate(adamjax.warmup(rate, warm) if warm else rate),
        adamjax.weight_ema(config.momentum),
    )
    if config.rows == "exact":
        chain = adamjax.exact_rows(chain, model.tables(vocabulary))
    # Neither `sum_over` nor `identity` has a state, so a run may resume in any number of processes.
    return adamjax.chain(adamjax.sum_over(AXIS) if devices > 1 else adamjax.identity(), chain)


def train_step(
    config: Config, tx: adamjax.Transform, vocabulary: int, mesh: Mesh
) -> Callable[..., Any]:
    """A jitted step `(params, state, batch) -> (params, state, loss)` that donates the first two.

    With `--rows none` the gradients of the tables are dense. Otherwise they are row gradients.
    """
    # `exact_rows` knows its tables itself.
    tables = model.tables(vocabulary) if config.rows in ("lazy", "dense") else None
    if mesh.size == 1:
        return adamjax.train_step(model.loss, tx, tables=tables)

    def share_of_loss(params: Any, batch: model.Batch) -> jax.Array:
        return model.loss(params, batch) / mesh.size

    # Each device differentiates its share of the loss.
    step = adamjax.train_step(share_of_loss, tx, tables=tables)

    def on_each(params: Any, state: Any, batch: model.Batch) -> Any:
        params, state, loss = step(params, state, batch)
        return params, state, jax.lax.psum(loss, AXIS)

    specs = P(), P(), model.Batch(P(AXIS), P(AXIS), P())
    # With `check_vma`, shard_map would sum the gradients, but `sum_over` does that.
    whole = jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.jit(whole, donate_argnums=(0, 1))


def up_to_date(tx: adamjax.Transform, params: Any, state: Any) -> tuple[Any, Any]:
    """Parameters and state with all rows up to date; the arguments are donated."""
    exact = tx.transforms[-1]
    if not isinstance(exact, adamjax.exact_rows):
        return params, state
    params, last = jax.jit(exact.flush, donate_argnums=(0, 1))(params, state[-1])
    return params, (*state[:-1], last)


# --- the run --------------------------------------------------------------------------------------


def initial(config: Config, text: data.Text) -> dict[str, Any]:
    """The initial parameters of a run."""
    return model.init(config.seed, data.unigram(text), config.context, config.dim, config.hidden)


def all_batches(config: Config, text: data.Text) -> Callable[[int], model.Batch]:
    """A function from a step's number to its batch."""
    windows = data.Windows(text.training, config.context, text.boundary)
    batches = data.Batches(windows, config.batch, config.seed)

    def batch(step: int) -> model.Batch:
        return model.Batch(*batches.at(step), model.draw(len(text.words), config.seed, step))

    return batch


def run(options: argparse.Namespace, interruption: Interruption) -> int:
    """Starts or resumes a run; returns the exit status."""
    began = time.perf_counter()
    files = [str(Path(path).resolve()) for path in options.text or []]
    saved: dict[str, np.ndarray] = {}
    if options.resume:
        run, saved = checkpoints.load(options.resume, options.chosen)
        run.files = files or run.files
    else:
        run = Run(options.config, files, options.folder)
    if saved and run.is_evaluated:
        say(f"{run.folder}: all {len(run.losses)} steps are taken, nothing is left to resume")
        return 0
    processes = join(options.meet, options.processes, options.number) if options.meet else ALONE
    config, devices, taken = run.config, jax.device_count(), len(run.losses)
    if config.batch % devices:
        raise UserError(f"--batch {config.batch} is not a multiple of the {devices} devices")
    if not processes.is_first:
        say(f"process {processes.number} of {processes.count}: process 0 reports")
        sys.stdout = None

    text = data.read(run.files, config.vocab)
    say(text)
    if saved and run.digest != text.digest():
        raise UserError(f"{run.folder}: this run was trained on another text; start a new one")
    run.digest = text.digest()
    processes.agree("options, a text or a checkpoint", config, run.digest, run.losses)
    run.params, tx = initial(config, text), optimizer(config, len(text.words), devices)
    run.state = tx.init(run.params)
    held_out = data.Windows(text.held_out, config.context, text.boundary)

    def evaluate(weights: Any) -> float | None:
        def is_given_up() -> bool:
            # The last of the answers skips the evaluation.
            return 0 < interruption.times >= len(interruption.answers)

        return model.held_out_loss(weights, held_out, is_given_up, processes)

    if saved:
        checkpoints.restore(run, saved)
    else:
        say("counting words, compiling the evaluation, and evaluating the initial weights ...")
        run.held_out = {**data.counted_losses(text), "before": evaluate(run.params)}
    say("held-out: " + ", ".join(f"{name} {x:.3f}" for name, x in run.held_out.items() if x))

    seconds = {"compile": 0.0, "train": 0.0}
    if not run.is_finished:
        seconds = _train(run, tx, text, options, processes, interruption)
        # An interrupted run is saved as it is, a finished run up to date: see `save`.
        if processes.is_first and not run.is_finished:
            checkpoints.save(run)
        run.params, run.state = up_to_date(tx, run.params, run.state)
        if processes.is_first and run.is_finished:
            checkpoints.save(run)
    say("evaluating ...")
    average = adamjax.averaged_weights(run.state)
    run.held_out |= {"after": evaluate(average), "last": evaluate(run.params)}
    processes.leave()
    if processes.is_first:
        seconds["all"] = time.perf_counter() - began
        tokens = (len(run.losses) - taken) * config.batch
        neighbours = model.neighbours(average, text.words)
        report.report(run, text, neighbours, tokens, seconds, processes.count)
        if not run.is_evaluated:
            say(f"interrupted; to go on:\n  {resume_command(options)}")
    return 0 if run.is_finished else interruption.status


def _train(
    run: Run,
    tx: adamjax.Transform,
    text: data.Text,
    options: argparse.Namespace,
    processes: Processes,
    interruption: Interruption,
) -> dict[str, float]:
    """Compiles the step and takes the remaining steps, or fewer if interrupted.

    Returns the seconds of both.
    """
    config, mesh, batch = run.config, processes.mesh(), all_batches(run.config, text)
    taken = len(run.losses)
    say("compiling the step ...")
    began = time.perf_counter()
    run.params, run.state = on_all_devices(mesh, (run.params, run.state))
    step = train_step(config, tx, len(text.words), mesh)
    step = step.lower(run.params, run.state, batch(taken)).compile()
    compiled = time.perf_counter()

    # From here on work could be lost, so Ctrl-C ends the job only after the step.
    interruption.answers = _ANSWERS
    # Wait until all processes are here: a signal that ended one of them would end all.
    processes.any(False)
    devices = f", on {mesh.size} devices of {processes.count} processes" if mesh.size > 1 else ""
    say(
        f"run:  {run.folder}, {config.steps - taken:,} of {config.steps:,} steps to take, "
        f"rows: {config.rows} ({ROWS[config.rows]}){devices}"
    )
    last_saved = compiled
    bar = tqdm(
        total=config.steps * config.batch,
        initial=taken * config.batch,
        unit=" tokens",
        unit_scale=True,
        ncols=shutil.get_terminal_size().columns,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=not processes.is_first,
    )
    with processes.raising_lost(), bar:
        for number in range(taken, config.steps):
            run.params, run.state, loss = step(run.params, run.state, batch(number))
            run.losses.append(round(float(loss), 6))
            bar.set_postfix(loss=f"{run.losses[-1]:.2f}", step=number + 1, refresh=False)
            bar.update(config.batch)
            if not math.isfinite(run.losses[-1]) or processes.any(interruption.times > 0):
                break
            if processes.is_first and time.perf_counter() - last_saved >= options.save_every:
                checkpoints.save(run)
                last_saved = time.perf_counter()
    # The copies on this process' first device.
    run.params, run.state = jax.tree.map(lambda x: x.addressable_data(0), (run.params, run.state))
    if not math.isfinite(run.losses[-1]):
        raise UserError(
            f"the loss is {run.losses[-1]} at step {len(run.losses)}: lower --learning-rate"
        )
    if not interruption.times:
        interruption.answers = _ANSWERS[1:]  # the first Ctrl-C now skips the evaluation
    return {"compile": compiled - began, "train": time.perf_counter() - compiled}
