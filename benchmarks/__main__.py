"""`python -m benchmarks` lists the suites, `python -m benchmarks SUITE [options]` runs one."""

import importlib
import sys

from benchmarks.train.options import UserError

# Suite: its description. A suite is the function `main` of the module with its name.
SUITES = {
    "train": "train a next-word model on real text, with a whole chain of transforms",
    "all": "dense, rows, compile, memory and models, one after another, and the report",
    "dense": "dense steps against optax, Keras and torch",
    "rows": "the step of one table: exact, lazy and dense against optax, Keras, TF and torch",
    "models": "whole models with large tables: steps and tracing, row gradients against dense",
    "compile": "the time to trace and to compile a program of 500 leaves, against optax",
    "memory": "bytes of states and of temporaries: dense chains, and a table in every mode",
    "tpu": "what the TPU's compiler reports for steps, without a TPU",
    "gpu": "what the GPU's compiler reports for steps, without a GPU",
    "quality": "does exact matter? models on real data, trained exactly, lazily and in between",
    "float64": "the models of quality in float64: do exact and dense differ by rounding alone?",
    "narrow": "moments and weights in few bits: errors against float64, and the loss of training",
    "soak": "100,000 steps on a table, exact and dense, against float64: does anything drift?",
    "differences": "how the results of other packages differ, in numbers",
    "report": "results as a page to read, with plots; --compare A.json B.json: what changed?",
    "readme": "write measured tables and numbers into README.md and docs/",
}


def main(argv: list[str]) -> int:
    """Runs the suite that the first argument names; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, SUITES))
        print("usage: python -m benchmarks SUITE [options]; SUITE --help lists them\n")
        print("\n".join(f"  {name:{width}}  {description}" for name, description in SUITES.items()))
        return 0
    if argv[0] == "--compare":  # short for `report --compare`
        argv = ["report", *argv]
    name, *rest = argv
    if name not in SUITES:
        print(f"benchmarks: no suite {name!r}; the suites are {', '.join(SUITES)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"benchmarks.{name}").main(rest)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the suite runs, or is still being imported
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
