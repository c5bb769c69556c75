"""Reports a run: on the terminal, in a file of numbers and in a plot."""

import dataclasses
import json

import jax
import numpy as np

from benchmarks.measure import environment
from benchmarks.train import checkpoints
from benchmarks.train.checkpoints import Run
from benchmarks.train.data import Text


def report(
    run: Run,
    text: Text,
    near: dict[str, list[str]],
    tokens: int,
    seconds: dict[str, float],
    processes: int,
) -> None:
    """Writes `metrics.json` and `loss.png`, and prints a summary.

    `near` has neighbours of some words. `tokens` is the number of words predicted.
    """
    speed = round(tokens / seconds["train"]) if tokens else 0
    metrics = {
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
        "finished": run.is_finished and run.held_out["last"] is not None,
        "held_out_loss": run.held_out,
        "neighbours": near,
        "processes": processes,
        "devices": jax.device_count(),
        **{f"{what}_seconds": round(x, 2) for what, x in seconds.items()},
        "tokens_per_second": speed,
        **environment("adamjax", "jax", "jaxlib", "numpy"),
        "training_loss": run.losses,
    }
    content = json.dumps(metrics, indent=1).encode()
    checkpoints.write(run.folder / "metrics.json", lambda file: file.write(content + b"\n"))
    _plot(run)

    print(f"\nheld-out loss over {text.held_out.size:,} tokens, nats per token, and perplexity")
    rows = {
        "unigram": "unigram",
        "bigram": "bigram",
        "before": "the model before training",
        "after": f"the model after {len(run.losses)} steps",
        "last": "the same, weights not averaged",
    }
    for name, label in rows.items():
        loss = run.held_out[name]
        print(
            f"  {label:30}", "not evaluated" if loss is None else f"{loss:6.3f} {np.exp(loss):8.1f}"
        )
    print("\nnearest embeddings")
    for word, others in near.items():
        print(f"  {word:12} {' '.join(others)}")
    size = (run.folder / "checkpoint.npz").stat().st_size
    print(
        f"\n{speed:,} tokens/s, {seconds['all']:.0f} s in all; metrics.json, loss.png and "
        f"checkpoint.npz ({size / 1e6:,.1f} MB) are in {run.folder}",
        flush=True,
    )


def _plot(run: Run) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(run.losses) + 1)
    width = max(1, min(25, len(steps) // 4))
    smooth = np.convolve(run.losses, np.ones(width) / width, "valid")
    middle = steps[: len(smooth)] + (width - 1) / 2
    axes.plot(steps, run.losses, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(middle, smooth, color="C0", label="training batches")
    for name, colour in (("unigram", "C7"), ("bigram", "C3")):
        axes.axhline(
            run.held_out[name], color=colour, linestyle="--", label=f"{name}, held-out text"
        )
    marks = {0: run.held_out["before"], len(steps): run.held_out["after"]}
    marks = {step: loss for step, loss in marks.items() if loss is not None}
    axes.plot(list(marks), list(marks.values()), "o", color="C2", label="model, held-out text")
    axes.set(xlabel="step", ylabel="loss, nats per token", xlim=(-0.02 * run.config.steps, None))
    axes.set_title(f"Predicting the next word: Adam with a weight average, rows: {run.config.rows}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run.folder / "loss.png", dpi=120)
