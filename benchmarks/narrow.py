"""Moments and weights in few bits: do they stay right, and does training end where float32 does?

Moments: steps with gradients of several kinds and magnitudes are compared with the recurrence in
float64. At every tenth step, the mean error of m and v over all elements is compared with its
standard error, and the mean absolute error of the updates is measured.

Training: two models, that of `benchmarks.train` and the transformer of the suite `models`, are
trained in each format from the same seeds. The criterion was fixed before the runs: a format
is as good as float32 if the mean difference of the held-out loss, paired by seed, is at most
`MARGIN` of what float32 learns, or at most the spread of float32's own seeds if that is larger. The
control, optax's Adam on bfloat16 weights, rounds weights and moments to the nearest. All matrix
products are in float32, so only the optimizer differs.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from benchmarks import moments
from benchmarks.moments import B1, B2
from benchmarks.networks import Transformer
from benchmarks.suite import Suite, progress
from benchmarks.train import data, job, model
from benchmarks.train.options import Config

MARGIN = 0.01
CONTROL = "bfloat16 weights, to the nearest"


@dataclass(frozen=True)
class Format:
    """How weights and moments are stored."""

    weights: str = "float32"  # the parameters' dtype
    moments: str | None = None  # their format, a rule's `m_dtype` and `v_dtype`
    master: bool = False  # whether the state has the weights in float32
    rounding: Any = "nearest"  # of the weights, an argument of `train_step`


FORMATS = {
    "float32": Format(),
    "bfloat16 moments": Format(moments="bfloat16"),
    "8-bit moments": Format(moments="scaled8"),
    "bfloat16 weights, master": Format("bfloat16", master=True),
    "bfloat16 weights, stochastic": Format("bfloat16", rounding="stochastic"),
}


@dataclass(frozen=True)
class Task:
    init: Callable[[int], Any]  # the parameters of a seed
    loss: Callable[[Any, Any], jax.Array]  # of parameters and a batch
    batch: Callable[[int, int], Any]  # of a seed and a step
    held_out_loss: Callable[[Any], float]  # of parameters
    rate: float  # the largest learning rate, after a tenth of the steps
    decay: float  # of the weights


def next_words(quick: bool) -> Task:
    """The model of `benchmarks.train` on its own text.

    Every fourth held-out word (every 64th in a quick run) is evaluated.
    """
    config = Config(batch=64, dim=8, hidden=16, vocab=4_000) if quick else Config()
    text = data.read([], config.vocab)
    held_out = data.Windows(text.held_out, config.context, text.boundary)
    held_out.starts = held_out.starts[:: 64 if quick else 4]

    @functools.cache
    def batches(seed: int) -> Callable[[int], model.Batch]:
        return job.all_batches(dataclasses.replace(config, seed=seed), text)

    def held_out_loss(params: Any) -> float:
        loss = model.held_out_loss(params, held_out, is_given_up=lambda: False)
        return float(loss or 0)  # never `None`, as the evaluation is not given up

    return Task(
        lambda seed: job.initial(dataclasses.replace(config, seed=seed), text),
        model.loss,
        lambda seed, step: batches(seed)(step),
        held_out_loss,
        config.learning_rate,
        config.weight_decay,
    )


def transformer(quick: bool) -> Task:
    """The transformer of the suite `models`, on its own data."""
    network = Transformer(1000, width=16, length=16, examples=4) if quick else Transformer()
    jitted_loss = jax.jit(network.loss)
    # Seeds train on batches 0 to 99,999, 100,000 to 199,999 and so on: none has these numbers.
    held_out = [network.batch(10_000_000 + i) for i in range(2 if quick else 64)]
    return Task(
        lambda seed: jax.jit(network.init)(jax.random.key(seed, impl="rbg")),
        network.loss,
        lambda seed, step: network.batch(100_000 * seed + step),
        lambda params: statistics.fmean(float(jitted_loss(params, x)) for x in held_out),
        rate=3e-3,
        decay=1e-2,
    )


TASKS = {"training job": next_words, "transformer": transformer}


def trainer(task: Task, name: str, steps: int) -> Callable[[int], float]:
    """A function of a seed that trains in a format and returns the held-out loss."""
    warm = max(1, steps // 10)
    rate = adamjax.warmup(adamjax.cosine_decay(task.rate, decay_steps=steps - warm), warm)

    def as_float32(params: Any) -> Any:  # models compute in float32
        return jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def loss(params: Any, batch: Any) -> jax.Array:
        return task.loss(as_float32(params), batch)

    form = Format("bfloat16") if name == CONTROL else FORMATS[name]
    if name == CONTROL:
        import optax

        rule = optax.adamw(rate, B1, B2, weight_decay=task.decay)
        tx: Any = optax.chain(optax.clip_by_global_norm(1.0), rule)
    else:
        formats = {"m_dtype": form.moments, "v_dtype": form.moments}
        own = adamjax.adamw(rate, B1, B2, weight_decay=task.decay, **formats)
        tx = adamjax.chain(adamjax.clip_by_global_norm(1.0), own)
        tx = adamjax.master_weights(tx) if form.master else tx
    step = adamjax.train_step(loss, tx, rounding=form.rounding)

    def train(seed: int) -> float:
        params = jax.tree.map(lambda x: x.astype(form.weights), task.init(seed))
        state = tx.init(params)
        for number in range(steps):
            params, state, _ = step(params, state, task.batch(seed, number))
        return task.held_out_loss(as_float32(params))

    return train


def compared(losses: dict[str, list[float]], before: float) -> dict[str, Any]:
    """Each format's held-out losses, and whether they are the same as float32's on average.

    "learned" is how much float32 reduces the loss "before" training, and "spread" the standard
    deviation over its seeds.
    """
    full = losses["float32"]
    learned, spread = before - statistics.fmean(full), statistics.stdev(full)
    table: dict[str, Any] = {}
    for name, own in losses.items():
        difference = statistics.fmean(x - y for x, y in zip(own, full, strict=True))
        table[name] = {"losses": own, "difference": difference}
        if name != "float32":
            table[name]["same"] = bool(abs(difference) <= max(MARGIN * learned, spread))
    return {"before": before, "learned": learned, "spread": spread, "formats": table}


def moment_errors(kind: str, scale: float, steps: int, elements: int) -> list[dict[str, Any]]:
    """The errors of the moments in each format, for gradients of one kind and magnitude."""
    g = moments.gradients(kind, steps, elements) * np.float32(scale)
    expected = moments.reference(g)
    return [
        {"kind": kind, "scale": scale, "format": form}
        | moments.errors(moments.trajectory(form)(g), expected)
        for form in ("bfloat16", "scaled8")
    ]


def main(argv: list[str]) -> int:
    packages = ("adamjax", "jax", "jaxlib", "optax")
    suite = Suite("narrow", __doc__, packages, only_chooses=f"parts (moments, {', '.join(TASKS)})")
    args = suite.parse(argv)
    steps, elements = (200, 256) if args.quick else (20_000, 2048)
    training_steps, seeds = (10, 2) if args.quick else (300, 5)
    cases = [(kind, scale) for kind in moments.KINDS for scale in moments.SCALES]
    names = [*FORMATS, CONTROL]
    if args.quick:
        cases, names = cases[::5], [*names[:2], CONTROL]
    suite.results |= {"steps": steps, "elements": elements}
    suite.results |= {"trained": training_steps, "seeds": seeds, "margin": MARGIN}
    suite.results |= {"moments": [], "tasks": {}}
    parts = suite.chosen(["moments", *TASKS])
    for case in progress(cases if "moments" in parts else [], "case"):
        suite.results["moments"] += moment_errors(*case, steps, elements)
    for task_name in [part for part in parts if part != "moments"]:
        task = TASKS[task_name](args.quick)
        losses: dict[str, list[float]] = {}
        for name in names:
            train = trainer(task, name, training_steps)
            losses[name] = [train(seed) for seed in progress(range(seeds), "run")]
            print(f"{task_name}: {name} {statistics.fmean(losses[name]):.4f}", flush=True)
        before = task.held_out_loss(task.init(0))
        suite.results["tasks"][task_name] = compared(losses, before)
    return suite.finish()
