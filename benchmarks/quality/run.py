"""The runs: a cell is one model, trained by one contender at one rate from one seed."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.quality.contenders import MAKERS, Contender, Params
from benchmarks.quality.journal import Journal
from benchmarks.quality.model import Model
from benchmarks.quality.protocol import METRICS, RATE_OF, READS, group


class Program:
    """A contender's steps on a model, compiled once for all rates and seeds."""

    def __init__(self, model: Model, contender: str) -> None:
        self.model = model

        def make(rate: Any) -> Contender:
            return MAKERS[contender](model.loss, model.tables, rate)

        def epoch(carry: Any, batches: Any, rate: Any) -> Any:
            step = make(rate).step
            return jax.lax.scan(lambda carry, batch: (step(carry, batch), None), carry, batches)[0]

        self.make = make
        self.epoch = jax.jit(epoch, donate_argnums=0)
        self.read = jax.jit(lambda carry, rate: make(rate).read(carry))
        self.compiled: Callable[..., Any] | None = None

    def train(
        self, rate: float, start: Params, batches: Sequence[np.ndarray]
    ) -> Iterator[tuple[float, Params]]:
        """Trains; yields the seconds of each epoch's steps, and the parameters after it.

        The parameters are valid until the next epoch, which donates them.
        """
        carry = self.make(rate).init(start)
        for number in range(self.model.epochs):
            batch = jax.block_until_ready(tuple(jax.numpy.asarray(x[number]) for x in batches))
            if self.compiled is None:
                self.compiled = self.epoch.lower(carry, batch, rate).compile()
            begin = time.perf_counter()
            carry = jax.block_until_ready(self.compiled(carry, batch, rate))
            yield time.perf_counter() - begin, self.read(carry, rate)

    def run(self, rate: float, seed: int, batches: Sequence[np.ndarray]) -> dict[str, Any]:
        """Trains and evaluates.

        Returns:
          "seconds" of each epoch's steps, "test", the metrics after each epoch, and after the last
          epoch "validation" and "groups", the test's metrics by group of reads (`None` for a group
          without examples).
        """
        model = self.model
        seconds, curve = [], []
        start = model.jitted_init(jax.random.key(seed))
        for time_of_epoch, params in self.train(rate, start, batches):
            seconds.append(round(time_of_epoch, 4))
            values = model.metric_values(params, "test")
            curve.append(means(values))
        validation = means(model.metric_values(params, "validation"))
        groups = by_group(values, model.reads("test"))
        return {"seconds": seconds, "test": curve, "validation": validation, "groups": groups}


def means(values: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(x.mean(dtype=np.float64)) for name, x in values.items()}


def by_group(values: dict[str, np.ndarray], reads: np.ndarray) -> dict[str, list[float | None]]:
    """The mean of each metric in each group of `READS`, for metrics with a value per example."""
    groups = np.array([group(n) for n in reads])
    numbers = range(len(READS) + 1)
    return {
        name: [float(x[groups == i].mean()) if (groups == i).any() else None for i in numbers]
        for name, x in values.items()
        if len(x) == len(groups)
    }


def chosen_rate(validation: dict[float, list[float]], metric: str) -> float:
    """The rate with the best mean; values that are not finite are worse than all others.

    >>> chosen_rate({0.1: [1.0, 3.0], 0.2: [1.0, 2.0], 0.4: [float("nan"), 0.0]}, "loss")
    0.2
    """
    sign = 1 if METRICS[metric].higher_is_better else -1

    def quality(rate: float) -> float:
        mean = sign * statistics.fmean(validation[rate])
        return mean if np.isfinite(mean) else -np.inf

    return max(validation, key=quality)


@dataclass(frozen=True)
class Plan:
    """All cells of a run of the suite."""

    models: Sequence[Model]  # to train
    contenders: Mapping[str, Sequence[str]]  # by model name; always with `dense`
    rates: Sequence[float]  # these and the seeds are as in the protocol
    search_seeds: Sequence[int]
    seeds: Sequence[int]

    def searched(self, model: Model) -> list[str]:
        """The contenders whose rate is searched."""
        return [name for name in self.contenders[model.name] if name not in RATE_OF]

    @property
    def num_cells(self) -> int:
        search_cells = len(self.rates) * len(self.search_seeds)
        return sum(
            search_cells * len(self.searched(m)) + len(self.contenders[m.name]) * len(self.seeds)
            for m in self.models
        )

    def rate(self, journal: Journal, model: Model, contender: str) -> float:
        """The rate that the finished search chose for a contender."""
        name, metric = RATE_OF.get(contender, contender), model.metrics[0]
        validation = {
            rate: [
                journal.cells["search", model.name, name, rate, seed]["validation"][metric]
                for seed in self.search_seeds
            ]
            for rate in self.rates
        }
        return chosen_rate(validation, metric)

    def keys(self, journal: Journal, model: Model) -> Iterator[tuple[str, str, str, float, int]]:
        """The keys of a model's cells: the search, and after that is in the journal, the test."""
        names = self.searched(model)
        for seed, name, rate in itertools.product(self.search_seeds, names, self.rates):
            yield "search", model.name, name, rate, seed
        rates = {name: self.rate(journal, model, name) for name in self.contenders[model.name]}
        for seed, (name, rate) in itertools.product(self.seeds, rates.items()):
            yield "test", model.name, name, rate, seed

    def run(self, journal: Journal) -> Iterator[tuple[Model, str, bool]]:
        """Runs every cell that the journal does not have.

        Yields, after each cell, its model, its contender, and whether it was run now.
        """
        for model in self.models:
            programs = {name: Program(model, name) for name in self.contenders[model.name]}
            batches = functools.lru_cache(maxsize=1)(model.batches)
            for key in self.keys(journal, model):
                _, _, name, rate, seed = key
                if is_new := key not in journal.cells:
                    journal.add(key, programs[name].run(rate, seed, batches(seed)))
                yield model, name, is_new
