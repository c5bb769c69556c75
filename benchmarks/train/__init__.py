"""The training job: a next-word model on real text, with a whole chain of transforms.

Read `job` first: it has the optimizer, the step and the loop. `model` has the parameters and the
loss, `data` makes batches from a text, `checkpoints` saves and restores a run, `report` writes its
results, and `compare` trains with each choice of `--rows`. `options` has the command line.
`launcher` and `processes` run one job in several processes.
"""

import argparse
import contextlib
import itertools
import os
import sys
import traceback
from collections.abc import Iterator

from benchmarks.train.interruption import Interruption
from benchmarks.train.launcher import LOST, Lost, end_with_launcher, launch
from benchmarks.train.options import RUNS, UserError, parse


def main(argv: list[str]) -> int:
    """Runs the job; returns the exit status.

    It is 0; 2 if the user must change something; `LOST` if another process cannot be reached; or
    128 + signal.
    """
    is_member = "--meet" in argv  # one of the processes that a launcher started
    with Interruption() as interruption:
        try:
            if is_member:
                end_with_launcher()
            status = _run(parse(argv), argv, interruption)
        except (UserError, Lost) as error:
            print(f"train: {error}", file=sys.stderr)
            status = LOST if isinstance(error, Lost) else 2
        except OSError as error:
            what = error.filename or "output"
            print(f"train: {what}: {error.strerror or error}", file=sys.stderr)
            status = 2
        except Exception:
            if not is_member:
                raise
            traceback.print_exc()
            status = 1
    if is_member:
        # A normal exit of the interpreter would wait for the other processes.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)
    return status


def _run(options: argparse.Namespace, argv: list[str], interruption: Interruption) -> int:
    # JAX takes seconds to import, so what needs it is imported after the options are read.
    if options.compare:
        from benchmarks.train import compare

        return compare.run(options)
    with _folder(options, interruption):
        if options.processes > 1 and options.meet is None:
            return launch(options, argv, interruption)
        from benchmarks.train import job

        return job.run(options, interruption)


@contextlib.contextmanager
def _folder(options: argparse.Namespace, interruption: Interruption) -> Iterator[None]:
    """Makes the folder of a new run, and removes it in the end if it is empty."""
    if options.resume or options.folder or options.process:
        yield
        return
    names = [options.name] if options.name else (f"train-{n}" for n in itertools.count(1))
    for folder in map(RUNS.joinpath, names):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    else:
        raise UserError(f"{folder} is there already")

    def remove() -> None:
        with contextlib.suppress(OSError):
            (folder / "checkpoint.npz.part").unlink(missing_ok=True)
            folder.rmdir()
            RUNS.rmdir()

    options.folder, interruption.at_exit = folder, remove
    try:
        yield
    finally:
        remove()
