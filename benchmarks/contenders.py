"""The contenders of the rows suite: a table that takes Adam's steps on some of its rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "BY_ROWS",
    "CONTENDERS",
    "EVERYONE",
    "FEW",
    "INDICES",
    "OURS",
    "RATE",
    "VALUES",
    "WHOLE",
    "Case",
    "JaxTable",
    "TorchTable",
    "batch_bytes",
    "batches",
    "least_bytes",
    "optimizer",
    "short",
    "some_rows",
]

RATE = 1e-3
B1, B2, EPS = 0.9, 0.999, 1e-7  # of the TF form; the others have their own defaults

# Of p(k) ~ k^-s: 8,192 indices hold about 1,400 distinct ones of 1M, 1,024 about 290.
EXPONENT = 1.28

# Batches in rotation; the most bytes of their values, of which there are two at least.
INDICES, VALUES = 32, 8
MOST_BYTES = 2**28

# Steps before any is timed: for a dense step, so that its memory is there; for the others, so that
# rows lag behind.
FEW, MANY = 3, 24

# name: (the package it needs, steps before any is timed)
CONTENDERS: dict[str, tuple[str, int]] = {
    "exact": ("adamjax", MANY),
    "lazy": ("adamjax", MANY),
    "dense": ("adamjax", FEW),
    "optax": ("optax", FEW),
    "keras": ("keras", FEW),
    "tf form": ("jax", FEW),
    "torch sparse": ("torch", MANY),
    "torch dense": ("torch", FEW),
}
# With reading the rows, a loss and its gradient; in the main cases alone.
WHOLE = {"exact step": ("adamjax", MANY), "lazy step": ("adamjax", MANY)}
EVERYONE = {**CONTENDERS, **WHOLE}
OURS = tuple(name for name, (package, _) in EVERYONE.items() if package == "adamjax")
# Who works on the rows that were read; the others pass over the whole table.
BY_ROWS = (*(name for name in OURS if name != "dense"), "torch sparse")


# --- cases ----------------------------------------------------------------------------------------


def short(number: int) -> str:
    """As the cases are called: 4M, 100k; 64k for 65,536."""
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
    """Bytes that a contender's step must read and write, however it is written.

    Counted once each, in float32: parameter and both moments of a row are read and written, 24
    bytes an element, for the distinct rows of the batch, or for the whole table where the
    contender passes over all of it; the gradient's values and the int32 indices are read. Not
    counted: a dense gradient, which the result does not need; what `exact_rows` notes about each
    row, 8 bytes; what a TPU pads rows with.

    Args:
      name: the contender.
      case: the table and the batch.
      distinct: rows that a batch touches, on average.
    """
    touched = distinct if name in BY_ROWS else case.rows
    return 24 * touched * case.width + 4 * case.reads * (case.width + 1)


def num_values(case: Case) -> int:
    """How many values there are for the batches: 8, or fewer if they are large."""
    return min(VALUES, max(2, MOST_BYTES // (4 * case.reads * case.width)))


def batch_bytes(case: Case) -> int:
    """The bytes of the batches that a contender holds; torch's indices have 8 each."""
    return 4 * num_values(case) * case.reads * case.width + 8 * INDICES * case.reads


def batches(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Indices int32[32, reads] and values float32[n, reads, width], the same for everyone."""
    rng = np.random.default_rng(case.reads)
    if case.indices == "uniform":
        indices = rng.integers(case.rows, size=(INDICES, case.reads))
    else:
        weights = np.arange(1, case.rows + 1) ** -EXPONENT
        total = np.cumsum(weights)
        ranks = np.searchsorted(total, rng.random((INDICES, case.reads)) * total[-1])
        # Frequent rows are not neighbours; the prime makes this a permutation.
        indices = ranks * 7_368_787 % case.rows
    shape = (num_values(case), case.reads, case.width)
    values = 0.01 * rng.standard_normal(shape, np.float32)
    return indices.astype(np.int32), values


def some_rows(width: int) -> np.ndarray:
    return 0.01 * np.random.default_rng(0).standard_normal((1000, width), np.float32)


# --- contenders: a state to start with, and a step `(params, state, indices, values)` -------------

Made = tuple[Callable[[Any], Any], Callable[..., Any]]


def optimizer(name: str) -> Any:
    import adamjax

    if name.startswith("exact"):
        return adamjax.exact_rows(adamjax.adam(RATE), "table")
    return adamjax.adam(RATE, rows="dense" if name == "dense" else "lazy")


def adamjax_step(name: str, case: Case) -> Made:
    """An optimizer step of adamjax's, given the gradient of the rows that were read."""
    import adamjax

    tx = optimizer(name)

    def step(params: Any, state: Any, indices: Any, values: Any) -> Any:
        grads = {"table": adamjax.row_gradient(indices, values, case.rows)}
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    return tx.init, step


def adamjax_whole_step(name: str, case: Case) -> Made:
    """A train step: rows are read, a loss is differentiated, the optimizer takes its step.

    The loss is half the sum of the rows' squares, weighed by the values: its gradient depends on
    what was read, and costs next to nothing.
    """
    import jax

    import adamjax

    tx = optimizer(name)

    def loss(rows: Any, values: Any) -> Any:
        return (values * rows * rows).sum() / 2

    def exact(params: Any, state: Any, indices: Any, values: Any) -> Any:
        read, ticket = tx.prepare(params, state, {"table": indices})
        value, grad = jax.value_and_grad(loss)(read["table"], values)
        grads = {"table": ticket.row_gradient("table", grad)}
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state, value

    def lazy(params: Any, state: Any, indices: Any, values: Any) -> Any:
        value, grad = jax.value_and_grad(loss)(params["table"][indices], values)
        grads = {"table": adamjax.row_gradient(indices, grad, case.rows)}
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state, value

    return tx.init, exact if name == "exact step" else lazy


def _dense_gradient(table: Any, indices: Any, values: Any) -> Any:
    import jax.numpy as jnp

    return jnp.zeros_like(table).at[indices].add(values)


def optax_step() -> Made:
    """optax with a dense gradient."""
    import optax

    tx = optax.adam(RATE)

    def step(params: Any, state: Any, indices: Any, values: Any) -> Any:
        grads = {"table": _dense_gradient(params["table"], indices, values)}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def keras_step() -> Made:
    """Keras on JAX with a dense gradient."""
    import keras

    optimizer = keras.optimizers.Adam(RATE)

    def init(params: Any) -> Any:
        optimizer.build([keras.Variable(params["table"])])
        return [v.value for v in optimizer.variables]

    def step(params: Any, state: Any, indices: Any, values: Any) -> Any:
        grads = [_dense_gradient(params["table"], indices, values)]
        (table,), state = optimizer.stateless_apply(state, grads, [params["table"]])
        return {"table": table}, state

    return init, step


def tf_step() -> Made:
    """The sparse step of Keras 3 on TensorFlow: no dense gradient, all else over the whole table.

    As there, the square is of each gradient by itself where an index occurs twice.
    """
    import jax.numpy as jnp

    def init(params: Any) -> Any:
        table = params["table"]
        return jnp.zeros((), jnp.int32), jnp.zeros_like(table), jnp.zeros_like(table)

    def step(params: Any, state: Any, indices: Any, values: Any) -> Any:
        count, m, v = state
        count = count + 1
        t = count.astype(jnp.float32)
        rate = RATE * jnp.sqrt(1 - B2**t) / (1 - B1**t)
        m = (B1 * m).at[indices].add((1 - B1) * values)
        v = (B2 * v).at[indices].add((1 - B2) * values**2)
        return {"table": params["table"] - rate * m / (jnp.sqrt(v) + EPS)}, (count, m, v)

    return init, step


def jax_contender(name: str, case: Case) -> Made:
    """The contender of a name in a case."""
    if name in WHOLE:
        return adamjax_whole_step(name, case)
    if name in ("optax", "keras", "tf form"):
        return {"optax": optax_step, "keras": keras_step, "tf form": tf_step}[name]()
    return adamjax_step(name, case)


class JaxTable:
    """A table that takes steps in JAX: jitted functions with parameters and state donated."""

    def __init__(self, name: str, case: Case) -> None:
        import jax
        import jax.numpy as jnp

        import adamjax

        self.taken = 0
        self.on_cpu = jax.default_backend() == "cpu"
        some = some_rows(case.width)
        params = {"table": jnp.resize(jnp.asarray(some), (case.rows, case.width))}
        init, self.step = jax_contender(name, case)
        self.lies: Any = None
        if name in OURS:  # As the README has it for TPUs; elsewhere this changes nothing.
            params = jax.tree.map(adamjax.layout.row_major, params)
            self.lies = adamjax.layout.formats(optimizer(name), params)
            self.lies = (*self.lies, None) if name in WHOLE else self.lies
        self.held = [params, init(params)]
        self.compiled: dict[int, Any] = {}

    def load(self, case: Case, indices: np.ndarray, values: np.ndarray) -> int:
        """Takes the batches; returns the bytes of a step's temporaries."""
        import jax

        self.indices = [jax.numpy.asarray(x) for x in indices]
        self.values = [jax.numpy.asarray(x) for x in values]
        if case.reads not in self.compiled:
            jitted = jax.jit(self.step, donate_argnums=(0, 1), out_shardings=self.lies)
            lowered = jitted.lower(*self.held, self.indices[0], self.values[0])
            self.compiled[case.reads] = lowered.compile()
        self.current = self.compiled[case.reads]
        return self.current.memory_analysis().temp_size_in_bytes

    def run(self, steps: int) -> None:
        """Takes some steps in place, and waits for them."""
        import jax

        for _ in range(steps):
            indices = self.indices[self.taken % INDICES]
            values = self.values[self.taken % len(self.values)]
            self.held = list(self.current(*self.held, indices, values)[:2])
            self.taken += 1
        jax.block_until_ready(self.held)


class TorchTable:
    """A table that takes steps in torch, with a sparse or a dense gradient."""

    def __init__(self, name: str, case: Case) -> None:
        import torch

        self.sparse, self.taken = name == "torch sparse", 0
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.on_cpu = self.device == "cpu"
        some = torch.from_numpy(some_rows(case.width)).to(self.device)
        self.table = some.repeat(-(-case.rows // len(some)), 1)[: case.rows].clone()
        self.table.requires_grad_()
        if self.sparse:
            self.optimizer: Any = torch.optim.SparseAdam([self.table], RATE)
        else:
            self.optimizer = torch.optim.Adam([self.table], RATE, fused=True)

    def load(self, case: Case, indices: np.ndarray, values: np.ndarray) -> None:
        """Takes the batches."""
        import torch

        self.indices = [torch.from_numpy(x.astype(np.int64)).to(self.device) for x in indices]
        self.values = [torch.from_numpy(x).to(self.device) for x in values]

    def run(self, steps: int) -> None:
        """Takes some steps in place, and waits for them."""
        import torch

        for _ in range(steps):
            indices = self.indices[self.taken % INDICES]
            values = self.values[self.taken % len(self.values)]
            if self.sparse:
                grad = torch.sparse_coo_tensor(
                    indices[None], values, self.table.shape, check_invariants=False
                )
            else:
                grad = torch.zeros_like(self.table).index_add_(0, indices, values)
            self.table.grad = grad
            del grad
            self.optimizer.step()
            self.table.grad = None
            self.taken += 1
        if self.device == "cuda":
            torch.cuda.synchronize()
