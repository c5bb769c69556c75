"""Trains with each choice of `--rows`, in turns of a few steps, and compares losses and times."""

import argparse
import dataclasses
import math
import statistics
import time
from typing import Any

import jax
import numpy as np

import adamjax
from benchmarks.measure import RESULTS, environment, save, spread
from benchmarks.tables import markdown, ranged
from benchmarks.train import data, job, model
from benchmarks.train.options import COMPARED_STEPS, ROWS, Config, UserError
from benchmarks.train.processes import ALONE

_STEPS_A_TURN = 10


class _Contender:
    """A training with one choice of `--rows`."""

    def __init__(self, config: Config, text: data.Text):
        vocabulary = len(text.words)
        self.tx, self.batch = job.optimizer(config, vocabulary), job.all_batches(config, text)
        self.params = job.initial(config, text)
        self.state = self.tx.init(self.params)
        began = time.perf_counter()
        step = job.train_step(config, self.tx, vocabulary, ALONE.mesh())
        self.step = step.lower(self.params, self.state, self.batch(0)).compile()
        self.compile_seconds = time.perf_counter() - began
        self.losses: list[float] = []

    def run_steps(self, steps: int) -> float:
        """Takes steps; returns the median of their seconds.

        The first step is left out, as the caches still have the previous contender's arrays.
        """
        seconds = []
        for _ in range(steps):
            batch = self.batch(len(self.losses))
            began = time.perf_counter()
            self.params, self.state, loss = self.step(self.params, self.state, batch)
            self.losses.append(float(loss))
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])

    def held_out_loss(self, windows: data.Windows) -> float | None:
        """The loss with the averaged weights."""
        self.params, self.state = job.up_to_date(self.tx, self.params, self.state)
        weights = adamjax.averaged_weights(self.state)
        return model.held_out_loss(weights, windows, is_given_up=lambda: False)


def _results(config: Config, text: data.Text) -> dict[str, Any]:
    """Trains all contenders, and compares them.

    In a round, each contender takes a few steps; the order rotates from round to round. A ratio is
    of two times of the same round.
    """
    contenders = {rows: _Contender(dataclasses.replace(config, rows=rows), text) for rows in ROWS}
    seconds: list[dict[str, float]] = []
    steps_a_turn = min(_STEPS_A_TURN, config.steps // 4)
    for number in range(config.steps // steps_a_turn):
        first = number % len(ROWS)
        order = [*list(ROWS)[first:], *list(ROWS)[:first]]
        seconds.append({name: contenders[name].run_steps(steps_a_turn) for name in order})
        latest = {name: contender.losses[-1] for name, contender in contenders.items()}
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in latest.items())
        print(f"step {(number + 1) * steps_a_turn:,}: {losses}", flush=True)
        if not all(map(math.isfinite, latest.values())):
            raise UserError("the loss is not finite: lower --learning-rate")
    del seconds[0]  # the first round also fills caches

    held_out = data.Windows(text.held_out, config.context, text.boundary)
    none_losses = np.array(contenders["none"].losses)
    table = {}
    for name, contender in contenders.items():
        losses = np.array(contender.losses)
        table[name] = {
            "ms": spread([1e3 * s[name] for s in seconds]),
            "ratio_to_none": spread([s[name] / s["none"] for s in seconds]),
            "compile_seconds": contender.compile_seconds,
            "held_out_loss": contender.held_out_loss(held_out),
            "training_loss": losses[steps_a_turn - 1 :: steps_a_turn].tolist(),
            "largest_difference_to_none": float(np.abs(losses - none_losses).max()),
        }
    params = contenders["none"].params
    return {
        "suite": "train",
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "rows"},
        "text": text.description,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "rounds": len(seconds),
        "steps_in_a_row": steps_a_turn,
        "rows": table,
        "environment": environment("adamjax", "jax", "jaxlib", "numpy"),
    }


def _show(results: dict[str, Any]) -> None:
    head = ["rows", "step, ms (quartiles)", "of none's time", "compile, s"]
    head += ["training", "held-out", "largest difference"]
    table = []
    for name, row in results["rows"].items():
        times = ranged(row["ms"], 1), ranged(row["ratio_to_none"], 2)
        losses = (f"{x:.4f}" for x in (row["training_loss"][-1], row["held_out_loss"]))
        difference = f"{row['largest_difference_to_none']:.1e}"
        table.append([name, *times, f"{row['compile_seconds']:.1f}", *losses, difference])
    print(f"\n{markdown(head, table)}\n")
    print("Losses are in nats. Largest difference: that of a step's training loss from none's.")


def run(options: argparse.Namespace) -> int:
    """Runs the comparison; returns the exit status."""
    text = data.read(options.text or [], options.config.vocab)
    print(text, flush=True)
    results = _results(options.config, text)
    _show(results)
    out = options.out
    if not out and not options.text and options.config == Config(steps=COMPARED_STEPS):
        out = RESULTS / results["environment"]["platform"] / "train.json"
    if out:
        save(results, out)
        print(f"written to {out}")
    return 0
