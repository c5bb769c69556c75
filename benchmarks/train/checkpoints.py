"""Checkpoints of a run: each is written completely or not at all."""

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.train.options import Config, UserError


@dataclass
class Run:
    """A run: its configuration, files and progress."""

    config: Config
    files: list[str]  # of the text; empty for the text of this Python's installation
    folder: Path | None = None
    digest: str = ""  # of the text, as `data.Text.digest`
    losses: list[float] = field(default_factory=list)  # of the steps taken so far
    # The losses on held-out text by name; `None` if not evaluated.
    held_out: dict[str, float | None] = field(default_factory=dict)
    params: Any = None  # parameters and state before the next step
    state: Any = None

    @property
    def is_finished(self) -> bool:
        """Whether all steps are taken."""
        return len(self.losses) == self.config.steps

    @property
    def is_evaluated(self) -> bool:
        """Whether all steps are taken, and the results evaluated and written."""
        try:
            return json.loads((self.folder / "metrics.json").read_bytes())["finished"]
        except (OSError, ValueError, KeyError):
            return False


def write(path: Path, content: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file, which replaces the old one when it is complete."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        content(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


_ABOUT = ("files", "digest", "losses", "held_out")


def save(run: Run) -> None:
    """Writes a run as it is, so that it resumes with the same bits.

    Under `exact_rows` its rows may lag behind: to bring them up to date would round them once more.
    A finished run is brought up to date before it is saved.
    """
    about = {name: getattr(run, name) for name in _ABOUT}
    about["config"] = dataclasses.asdict(run.config)
    leaves = _named_leaves({"params": run.params, "state": run.state})
    arrays = {name: np.asarray(x) for name, x in leaves.items()}
    arrays["about"] = np.array(json.dumps(about))
    write(run.folder / "checkpoint.npz", lambda file: np.savez(file, **arrays))


def load(folder: Path, chosen: Mapping[str, Any]) -> tuple[Run, dict[str, np.ndarray]]:
    """Reads a run, and the arrays of its parameters and state by name.

    Raises:
      UserError: there is no checkpoint, or its options differ from the chosen ones.
    """
    path = folder / "checkpoint.npz"
    try:
        with np.load(path) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        run = Run(Config(**about["config"]), folder=folder, **{x: about[x] for x in _ABOUT})
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no checkpoint.npz to resume from") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a checkpoint of this job ({error})") from None
    for name, value in chosen.items():
        if (own := getattr(run.config, name)) != value:
            raise UserError(
                f"{folder}: this run has {name.replace('_', ' ')} {own}, not {value}; leave the "
                "option out, or start a new run"
            )
    return run, arrays


def restore(run: Run, arrays: Mapping[str, np.ndarray]) -> None:
    """Replaces a run's parameters and state by the arrays of a checkpoint."""
    trees = {"params": run.params, "state": run.state}
    leaves = _named_leaves(trees)
    expected, found = (
        {name: (x.shape, x.dtype) for name, x in named.items()} for named in (leaves, arrays)
    )
    if expected != found:
        raise UserError(f"{run.folder}: the checkpoint is of another version; start a new run")
    # NumPy's memory cannot be donated, so the arrays are copied.
    copies = [jnp.array(arrays[name], copy=True) for name in leaves]
    trees = jax.tree.unflatten(jax.tree.structure(trees), copies)
    run.params, run.state = trees["params"], trees["state"]
