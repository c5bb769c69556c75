"""`exact_rows` bound to parameters and a state: every step and every read starts here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import jax.numpy as jnp

from adamjax.average import weight_ema
from adamjax.chain import chain
from adamjax.coasting import Ring
from adamjax.data import Tree
from adamjax.exact.route import RoutePart
from adamjax.exact.state import ExactRowsState, Past, TableArrays, path_of_table
from adamjax.exact.tables import Batch, Family, Table
from adamjax.moments import next_count
from adamjax.paths import flatten
from adamjax.structure import map_slots, named_slots
from adamjax.transform import Rule, Transform

__all__ = ["Bound"]


@dataclass(frozen=True)
class Bound:
    """An inner transform, the tables among its parameters, and a state of `exact_rows`.

    Attributes:
      tx: the inner transform, its mask functions resolved for these parameters.
      families: the tables by family.
      parts: for each table, by its leaf index: its rule and the transforms after it, with their
        states.
      params: the parameters.
      inner_state: the state of the inner transform.
      state: the state of `exact_rows`; `None` while it is being made.
      has_edited_numbers: a bool scalar, whether a traced number of tx was edited after
        `exact_rows` was made; `None` if no number is traced.
    """

    tx: Transform
    families: list[Family]
    parts: dict[int, list[RoutePart]]
    params: Tree
    inner_state: Any
    state: ExactRowsState | None = None
    has_edited_numbers: chex.Array | None = None

    @property
    def tables(self) -> list[Table]:
        """All tables, in the order of the leaves."""
        return sorted((t for f in self.families for t in f.tables), key=lambda t: t.leaf_index)

    def table(self, name: str) -> Table:
        """The table that a path or pattern names."""
        path = path_of_table(name, [t.path for t in self.tables])
        return next(t for t in self.tables if t.path == path)

    def batch_of(self, table: Table) -> Batch:
        """A batch of one table."""
        return Batch(next(f for f in self.families if table in f.tables), (table,))

    def count(self, table: Table) -> chex.Array:
        """The number of steps that the table's rule has taken."""
        return self.parts[table.leaf_index][0].state.count

    def step_coefficients(self, table: Table) -> tuple[Any, Any]:
        """The coefficients a and b of the next step, `p += a * m / (x + e) + b * p`.

        Here x measures the gradients' size, such as sqrt(v), and e is epsilon: see `coasting.py`.
        """
        rule, *later = self.parts[table.leaf_index]
        assert isinstance(rule.tx, Rule)
        a, b = rule.tx.momentum_coefficient(rule.state, table.real_dtype), 0.0
        for _, tx, state, params in later:
            if not isinstance(tx, weight_ema):
                # `tx` turns the update u = a * m / (x + e) + b * p into factor * u + decay * p.
                factor, decay = tx.affine(state, params, table.leaf_index, table.real_dtype) or (
                    1,
                    0,
                )
                a, b = factor * a, factor * b + decay
        return a, b

    def arrays(self, table: Table) -> TableArrays:
        """The table's weights, its slots, and the `last` of each row."""
        assert self.state is not None
        weights = flatten(self.params)[0][table.leaf_index]
        slots = _slots_of_leaf(self.inner_state, table.leaf_index)
        return TableArrays(weights, slots, self.state.last[table.path])

    def past(self, family: Family) -> Past:
        """The ring, clock and count by which the rows of a family catch up."""
        assert self.state is not None
        count = self.count(family.tables[0])
        return Past(self.state.rings[family.name], self.state.clock, count)

    def next_ring(self, family: Family, has_nan: chex.Array) -> Ring:
        """A family's ring after the next step.

        Args:
          has_nan: bool scalar, whether the entries of the ring that the step read have a NaN.
        """
        assert self.state is not None
        table = family.tables[0]
        a, b = self.step_coefficients(table)
        # This does not change the result: a NaN stays in the ring in any case. But it makes the
        # write of the ring depend on the reads. So XLA need not copy the ring.
        a = jnp.where(has_nan, jnp.nan, a)
        count = next_count(self.count(table))
        return table.coasting.advance(
            self.state.rings[family.name], self.state.clock + 1, count, a, b
        )

    def row_step(
        self, table: Table, extra_args: dict[str, Any]
    ) -> Callable[..., tuple[chex.Array, dict[str, chex.Array]]]:
        """The function `(g, slots, weights) -> (u, slots)` that takes a step of rows of a table.

        It applies the rule and all later transforms.
        """
        parts = self.parts[table.leaf_index]
        leaves, treedef = flatten(self.params)

        def tree_of_this_leaf(x: Any) -> Tree:
            return treedef.unflatten(
                [x if i == table.leaf_index else None for i in range(len(leaves))]
            )

        def with_slots(state: Any, slots: dict[str, chex.Array]) -> Any:
            return map_slots(lambda name, _: tree_of_this_leaf(slots.get(name)), state)

        def step(
            g: chex.Array, slots: dict[str, chex.Array], weights: chex.Array
        ) -> tuple[chex.Array, dict[str, chex.Array]]:
            states = tuple(with_slots(part.state, slots) for part in parts)
            rule, *later = (part.tx for part in parts)
            assert isinstance(rule, Rule)
            # Slots stay wide in the step, and are rounded once after it.
            tx = chain(rule.with_wide_slots(), *later)
            grads, params = tree_of_this_leaf(g), tree_of_this_leaf(weights)
            u, next_states = tx.update(grads, states, params, **extra_args)
            return flatten(u)[0][table.leaf_index], _slots_of_leaf(next_states, table.leaf_index)

        return step


def _slots_of_leaf(state: Any, leaf: int) -> dict[str, Any]:
    """The slots of one leaf by their names, from all states inside a state."""
    slots = [(name, flatten(tree)[0][leaf]) for name, tree in named_slots(state)]
    return {name: slot for name, slot in slots if slot is not None}
