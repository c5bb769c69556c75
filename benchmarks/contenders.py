"""The contenders of the rows suite. Each takes Adam's steps on some rows of a table."""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from benchmarks import steps
from benchmarks.networks import draw_ids, zipf_sums
from benchmarks.steps import RATE, Runner, Step

# The exponent s of Zipf's law, p(k) ~ k^-s. In a table of 1M rows, 8,192 indices have about
# 1,400 distinct rows, and 1,024 indices about 290.
EXPONENT = 1.28

# The arrays of indices and of values that steps repeat. If the values would take more than
# `MOST_BYTES`, there are fewer arrays of them, but at least two.
INDEX_ARRAYS, VALUE_ARRAYS = 32, 8
MOST_BYTES = 2**28

# Steps before the timed ones: a few, to allocate the memory, or many, until rows lag behind.
FEW_STEPS, MANY_STEPS = 3, 24

# For each contender: the package that it needs, and the number of steps before the timed ones.
CONTENDERS: dict[str, tuple[str, int]] = {
    "exact": ("adamjax", MANY_STEPS),
    "lazy": ("adamjax", MANY_STEPS),
    "dense": ("adamjax", FEW_STEPS),
    "optax": ("optax", FEW_STEPS),
    "keras": ("keras", FEW_STEPS),
    "tf form": ("jax", FEW_STEPS),
    "torch sparse": ("torch", MANY_STEPS),
    "torch dense": ("torch", FEW_STEPS),
}
# Whole train steps, which also read the rows and differentiate a loss; only for the main cases.
WHOLE_STEPS = {"exact step": ("adamjax", MANY_STEPS), "lazy step": ("adamjax", MANY_STEPS)}
ALL_CONTENDERS = {**CONTENDERS, **WHOLE_STEPS}
OURS = tuple(name for name, (package, _) in ALL_CONTENDERS.items() if package == "adamjax")
# The contenders whose step works only on the rows read; the others' passes over the whole table.
BY_ROWS = (*(name for name in OURS if name != "dense"), "torch sparse")


def short(number: int) -> str:
    """A number as in the names of cases: 4M, 100k; 64k for 65,536."""
    if number % 1024 == 0:
        return f"{number // 1024}k"
    for unit, letter in ((10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number // unit}{letter}"
    return str(number)


@dataclass(frozen=True)
class Case:
    """A table of `rows` by `width`, of which a step reads `reads` rows."""

    rows: int
    width: int
    reads: int
    indices: str

    @property
    def name(self) -> str:
        return f"V={short(self.rows)} D={self.width} n={short(self.reads)} {self.indices}"


def least_bytes(name: str, case: Case, distinct: float) -> float:
    """The least bytes that a contender's step can read and write.

    The parameter and both moments are read and written: 24 bytes for each element of the batch's
    `distinct` rows (their mean number), or of the whole table if the contender passes over all of
    it. The gradient's values and the indices are read, 4 bytes each. Not counted are a dense
    gradient, which the result does not need; what `exact_rows` records for each row, 8 bytes; and
    the padding of rows on a TPU.
    """
    touched = distinct if name in BY_ROWS else case.rows
    return 24 * touched * case.width + 4 * case.reads * (case.width + 1)


def num_value_arrays(case: Case) -> int:
    return min(VALUE_ARRAYS, max(2, MOST_BYTES // (4 * case.reads * case.width)))


def batch_bytes(case: Case) -> int:
    """The bytes of the batches that a contender keeps; torch's indices have 8 each."""
    values = num_value_arrays(case) * case.reads * case.width
    return 4 * values + 8 * INDEX_ARRAYS * case.reads


def batches(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Indices int32[32, reads] and values float32[n, reads, width], the same for all contenders."""
    rng = np.random.default_rng(case.reads)
    indices_shape = (INDEX_ARRAYS, case.reads)
    if case.indices == "uniform":
        indices = rng.integers(case.rows, size=indices_shape)
    else:
        # The sums are not cached, as they would count as memory of the contender's step.
        indices = draw_ids(rng, zipf_sums(case.rows, EXPONENT), indices_shape)
    values_shape = (num_value_arrays(case), case.reads, case.width)
    values = 0.01 * rng.standard_normal(values_shape, np.float32)
    return indices.astype(np.int32), values


def start_rows(width: int) -> np.ndarray:
    """The 1,000 rows that are repeated to fill every table before the first step."""
    return 0.01 * np.random.default_rng(0).standard_normal((1000, width), np.float32)


def optimizer(name: str) -> Any:
    return steps.table_mode(name.removesuffix(" step"))[0]


def contender_step(name: str) -> Step:
    """The step `(params, state, indices, values)` of a contender in JAX."""
    if name in WHOLE_STEPS:
        # Half a weighted sum of squares: a cheap loss whose gradient depends on the rows.
        return steps.hand_written_step(
            optimizer(name), lambda rows, values: (values * rows * rows).sum() / 2
        )
    if name == "tf form":
        return steps.tf_step()
    if name in ("optax", "keras"):
        return steps.given_rows_step(steps.chain_step(name, "adam"), dense_gradient=True)
    return steps.given_rows_step(steps.update_step(optimizer(name)))


class JaxTable:
    """A table and its steps in JAX: jitted functions that donate parameters and state."""

    def __init__(self, name: str, case: Case) -> None:
        self.on_cpu = jax.default_backend() == "cpu"
        rows = jnp.asarray(start_rows(case.width))
        params, tx = {"table": jnp.resize(rows, (case.rows, case.width))}, None
        if name in OURS:
            params, tx = jax.tree.map(adamjax.layout.row_major, params), optimizer(name)
        self.run = Runner(contender_step(name), params, tx, more_results=name in WHOLE_STEPS)

    def load(self, indices: np.ndarray, values: np.ndarray) -> int:
        """Puts the batches on the device and compiles; returns the temporaries' bytes."""
        ids, rows = ([jnp.asarray(x) for x in arrays] for arrays in (indices, values))
        return self.run.load([(x, rows[i % len(rows)]) for i, x in enumerate(ids)])


class TorchTable:
    """A table and its steps in torch, with a sparse or a dense gradient."""

    def __init__(self, name: str, case: Case) -> None:
        import torch

        self.sparse = name == "torch sparse"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.on_cpu = self.device == "cpu"
        table = np.resize(start_rows(case.width), (case.rows, case.width))
        self.table = torch.from_numpy(table).to(self.device).requires_grad_()
        if self.sparse:
            self.optimizer: Any = torch.optim.SparseAdam([self.table], RATE)
        else:
            self.optimizer = torch.optim.Adam([self.table], RATE, fused=True)

    def load(self, indices: np.ndarray, values: np.ndarray) -> None:
        import torch

        ids = [torch.from_numpy(x.astype(np.int64)).to(self.device) for x in indices]
        rows = [torch.from_numpy(x).to(self.device) for x in values]
        self.batches = itertools.cycle([(x, rows[i % len(rows)]) for i, x in enumerate(ids)])

    def run(self, count: int) -> None:
        import torch

        shape = self.table.shape
        for indices, values in itertools.islice(self.batches, count):
            # Only `.grad` refers to the gradient: its memory is free before the next one is made.
            if self.sparse:
                self.table.grad = torch.sparse_coo_tensor(
                    indices[None], values, shape, check_invariants=False
                )
            else:
                self.table.grad = torch.zeros_like(self.table).index_add_(0, indices, values)
            self.optimizer.step()
            self.table.grad = None
        if self.device == "cuda":
            torch.cuda.synchronize()
