"""The results of all cells in numbers: comparisons, times, curves, scores by frequency of reads."""

import statistics
from typing import Any

import numpy as np

from benchmarks.quality.journal import Journal
from benchmarks.quality.model import Model
from benchmarks.quality.protocol import FEWEST, METRICS, READS, group, references
from benchmarks.quality.run import Plan
from benchmarks.quality.statistics import holm, outcome, paired


def rounded(number: float | None, digits: int = 6) -> float | None:
    """A number with this many significant digits. NaN becomes `None`, as JSON has no NaN."""
    return None if number is None or not np.isfinite(number) else float(f"{number:.{digits}g}")


class Cells:
    """The finished test cells of a model by contender, in the order of the seeds."""

    def __init__(self, plan: Plan, journal: Journal, model: Model) -> None:
        names = plan.contenders[model.name]
        self.rates = {name: plan.rate(journal, model, name) for name in names}
        self.by_name = {
            name: [journal.cells["test", model.name, name, rate, seed] for seed in plan.seeds]
            for name, rate in self.rates.items()
        }

    def final(self, name: str, metric: str) -> list[float]:
        """A metric of the test after the last epoch, by seed."""
        return [cell["test"][-1][metric] for cell in self.by_name[name]]


def summarised(plan: Plan, journal: Journal) -> list[dict[str, Any]]:
    """A row for each model; the p-values of all comparisons are corrected together."""
    cells = {model.name: Cells(plan, journal, model) for model in plan.models}
    p_values = {
        f"{model.name}/{metric}/{name}": paired(
            cells[model.name].final(name, metric), cells[model.name].final(reference, metric)
        ).p
        for model in plan.models
        for metric in model.metrics
        for name, reference in references(plan.contenders[model.name]).items()
    }
    corrected = holm(p_values)
    return [model_row(plan, model, cells[model.name], corrected) for model in plan.models]


def model_row(
    plan: Plan, model: Model, cells: Cells, corrected: dict[str, float]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": model.name,
        "data": model.data,
        "tables": list(model.tables),
        "steps": model.epochs * model.steps,
        "batch": model.batch,
        "metrics": list(model.metrics),
        "examples": np.bincount(
            [group(n) for n in model.reads("test")], minlength=len(READS) + 1
        ).tolist(),
        "contenders": {},
    }
    reference = references(plan.contenders[model.name])
    for name in plan.contenders[model.name]:
        entry = row["contenders"][name] = {
            "rate": cells.rates[name],
            "seconds": rounded(
                statistics.median(sum(cell["seconds"]) for cell in cells.by_name[name]), 3
            ),
            "test": {},
            "curve": {},
            "groups": {},
        }
        for metric in model.metrics:
            own, dense = cells.final(name, metric), cells.final("dense", metric)
            differences = np.subtract(own, dense)
            entry["test"][metric] = {
                "mean": rounded(float(np.mean(own))),
                "sd": rounded(float(np.std(own, ddof=1)), 3),
                "mean |difference|": rounded(float(np.abs(differences).mean()), 3),
                "largest |difference|": rounded(float(np.abs(differences).max()), 3),
            }
            seed_cells = cells.by_name[name]
            entry["curve"][metric] = [
                rounded(statistics.fmean(cell["test"][i][metric] for cell in seed_cells), 5)
                for i in range(model.epochs)
            ]
            if metric in seed_cells[0]["groups"]:
                by_seed = np.array([cell["groups"][metric] for cell in seed_cells], np.float64)
                entry["groups"][metric] = [
                    rounded(x, 5) if n >= FEWEST else None
                    for x, n in zip(by_seed.mean(0).tolist(), row["examples"], strict=True)
                ]
            key = f"{model.name}/{metric}/{name}"
            if key in corrected:
                other = cells.final(reference[name], metric)
                compared = comparison(own, other, metric, corrected[key])
                entry["test"][metric] |= {"reference": reference[name], **compared}
    return row


def comparison(
    own: list[float], other: list[float], metric: str, corrected_p: float
) -> dict[str, Any]:
    """The test of a contender against its reference."""
    result, definition = paired(own, other), METRICS[metric]
    margin = definition.absolute_margin(float(np.mean(other)))
    differences = np.subtract(own, other).tolist()
    return {
        "difference": rounded(result.mean, 4),
        "interval": [rounded(result.low, 4), rounded(result.high, 4)],
        "effect": rounded(result.effect, 3),
        "p": rounded(result.p, 3),
        "corrected p": rounded(corrected_p, 3),
        "margin": rounded(margin, 3),
        "outcome": outcome(differences, corrected_p, margin, definition.higher_is_better),
    }
