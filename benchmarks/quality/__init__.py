"""Compares the quality of models that exact, lazy and other forms of Adam train on real data.

Read `protocol` first. It has the question and the rules of the comparison, which were fixed before
the runs. `data` reads and splits the data. `models` has the models and their sizes; their classes
are in `rankers` and `words`, and the base class in `model`. `contenders` has the optimizers. `run`
trains every cell: a model with a contender, a rate and a seed. `journal` saves each finished cell,
so that the same command continues an interrupted run. `statistics` and `summary` compute the
results from the cells. `answer` words them, and `report` writes a page with plots.
`divergence` measures, without a model, how far single rows end from dense Adam.

The data are MovieLens-100k with its knowledge graph, from RecBole's wheel, and the text of
`benchmarks.train`. MovieLens needs: pip install --no-deps recbole==1.2.1
"""

import dataclasses
import hashlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, installed
from benchmarks.suite import Suite, progress, say
from benchmarks.train.options import UserError

__all__ = ["main"]

# The sizes of a quick run. A standard deviation needs at least two seeds.
QUICK_STEPS, QUICK_EPOCHS, QUICK_SEEDS, QUICK_RATES = 20, 2, 2, 2
QUICK_CONTENDERS = ("dense", "exact")
# The modules that do not affect a cell's result. (`__init__` chooses the settings, which are in the
# journal.)
NOT_IN_DIGEST = ("__init__", "answer", "journal", "report", "statistics", "summary")


def main(argv: list[str]) -> int:
    packages = ("adamjax", "jax", "jaxlib", "optax", "recbole")
    suite = Suite("quality", __doc__, packages, only_chooses="models")
    suite.parser.add_argument("--journal", type=Path, help="the file of finished cells")
    args = suite.parse(argv)
    expect_packages()
    # Importing JAX takes seconds, so it is imported after the options are checked.
    import jax

    from benchmarks.quality import data, divergence, protocol, summary
    from benchmarks.quality.journal import Journal
    from benchmarks.quality.models import MODELS
    from benchmarks.quality.run import Plan

    if jax.default_backend() != "cpu":
        say("note: the protocol's sizes are chosen for a CPU")
    models, seeds = {model.name: model for model in MODELS}, list(protocol.SEEDS)
    rates, search_seeds = list(protocol.RATES), list(protocol.SEARCH_SEEDS)
    b2s, steps = list(divergence.B2S), divergence.STEPS
    contenders = {name: list(protocol.CONTENDERS) for name in models}
    if args.quick:
        models = {name: smaller(model) for name, model in models.items()}
        seeds, search_seeds = seeds[:QUICK_SEEDS], search_seeds[:1]
        rates, b2s, steps = rates[1 : 1 + QUICK_RATES], b2s[2:3], 200
        # A quick run mostly compiles, so only the first model gets all contenders.
        contenders |= {name: list(QUICK_CONTENDERS) for name in list(models)[1:]}
    settings = {
        "data": data.about(),
        "rates": rates,
        "search seeds": search_seeds,
        "seeds": seeds,
        "betas": [protocol.B1, protocol.B2],
        "eps": protocol.EPS,
        "decay": protocol.DECAY,
        "models": {name: dataclasses.asdict(model) for name, model in models.items()},
        "divergence steps": steps,
    }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    software = {"code": code_digest(), "versions": versions}
    default = ROOT / "runs" / f"quality{'-quick' if args.quick else ''}.jsonl"
    journal = Journal(args.journal or default, settings | software)

    chosen = [models[name] for name in suite.chosen(models)]
    plan = Plan(chosen, contenders, rates, search_seeds, seeds)
    if journal.cells:
        say(f"{len(journal.cells):,} cells are done already, in {journal.path}")
    announced: set[str] = set()
    try:
        for model, _, is_new in progress(plan.run(journal), "cell", plan.num_cells):
            if is_new and model.name not in announced:
                announced.add(model.name)
                say(f"{model.name}: {model.epochs * model.steps:,} steps of {model.batch} examples")
        for b2 in b2s:
            if ("divergence", b2) not in journal.cells:
                journal.add(("divergence", b2), divergence.measured(b2, steps))
    except KeyboardInterrupt:
        print("quality: interrupted; the same command continues from here", file=sys.stderr)
        return 130
    suite.results |= settings
    suite.results["groups"] = protocol.group_names()
    suite.results["models"] = summary.summarised(plan, journal)
    suite.results["divergence"] = {
        "gaps": list(divergence.GAPS),
        "by b2": {str(b2): journal.cells["divergence", b2] for b2 in b2s},
    }
    suite.finish()
    if out := suite.written:
        from benchmarks.quality import report

        for path in report.write(suite.results, out.parent):
            print(f"written to {path}")
    return 0


def expect_packages() -> None:
    """Raises a `UserError` if packages are missing that the suite needs."""
    if missing := [name for name in ("optax", "scipy", "tqdm") if not installed(name)]:
        raise UserError(f"not installed: {', '.join(missing)}: pip install -e '.[bench-quality]'")


def smaller(model: Any) -> Any:
    """The model with the fewer epochs and steps of a quick run."""
    return dataclasses.replace(model, epochs=QUICK_EPOCHS, steps=QUICK_STEPS)


def code_digest() -> str:
    """A hash of the code that computes cells: adamjax, this suite, and `benchmarks/steps.py`.

    An interrupted run continues only with the same hash. (The text, which `benchmarks.train` reads,
    has a hash in the settings.)
    """
    own = [path for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_IN_DIGEST]
    steps = ROOT / "benchmarks" / "steps.py"
    digest = hashlib.sha256()
    for path in sorted([*own, steps, *(ROOT / "adamjax").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
