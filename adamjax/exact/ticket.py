"""The ticket that `exact_rows.prepare` hands to the `update` of the same step."""

import json
import operator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from adamjax.data import Data, static
from adamjax.exact.state import Ready, named
from adamjax.rows import RowGradient, summed

__all__ = ["Ticket"]


class Ticket(Data):
    """What `prepare` found out, for the `update` of the same step.

    It counts for the very arrays of params, state and indices that it was made of: where one of
    them is another by now (after a `flush`, at a perturbed point, for other rows), and where it
    went through a function that is jitted by itself, `update` brings the rows up to date itself.
    So a ticket spares work in one jitted step, and does no harm anywhere.

    Attributes:
      rows: by path, what each table's rows are, up to date; of tables whose rows are worked on
        together, by that of the first. Where there are so many rows that blocks of them take
        turns, `update` brings each block up to date by itself.
      places: by path, which of the rows that were read are distinct.
      num_rows: for each path the table's number of rows and the shape of its indices, static.

    >>> import adamjax, jax.numpy as jnp
    >>> params = {"table": jnp.zeros((9, 1))}
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> rows, ticket = tx.prepare(params, tx.init(params), {"table": jnp.array([4, 4])})
    >>> list(ticket.rows)
    ['table']
    """

    rows: dict[str, Any]
    places: dict[str, Any]
    num_rows: Any = static(default=())

    def row_gradient(self, table: str, values: chex.Array) -> RowGradient:
        """The gradient of the rows that `prepare` read: `adamjax.row_gradient` for less.

        Equal indices need not be looked for again.

        Args:
          table: the table, by its path or a pattern that finds it alone.
          values: floats, the gradients of the rows, of the shape in which `prepare` gave them.

        Returns:
          A `RowGradient` with room for as many rows as indices, of the dtype of the values.

        Raises:
          ValueError: no table or several have this name; the shape is not that of the rows.

        >>> import adamjax, jax.numpy as jnp
        >>> params = {"table": jnp.zeros((9, 1))}
        >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
        >>> rows, ticket = tx.prepare(params, tx.init(params), {"table": jnp.array([4, 4])})
        >>> ticket.row_gradient("table", jnp.ones((2, 1))).values
        Array([[2.],
               [0.]], dtype=float32)
        """
        path = named(table, list(self.places))
        (found, position), (num_rows, shape) = self.places[path], dict(self.num_rows)[path]
        if np.shape(values)[: len(shape)] != tuple(shape):
            raise ValueError(
                f"ticket.row_gradient: the gradients of {path!r} have the shape "
                f"{np.shape(values)}, expected that of the rows, {(*shape, '...')}"
            )
        values = jnp.asarray(values).reshape(position.size, *np.shape(values)[len(shape) :])
        return summed(found, position, values, num_rows)

    def with_rows_of(self, other: "Ticket") -> "Ticket":
        """A ticket for what both are for."""
        ticket = Ticket(
            {**self.rows, **other.rows},
            {**self.places, **other.places},
            (*self.num_rows, *other.num_rows),
        )
        ticket.set_fields(
            _origins={**vars(self).get("_origins", {}), **vars(other).get("_origins", {})}
        )
        return ticket

    def made_of(self, origins: dict[str, Any]) -> "Ticket":
        """The ticket, which then knows the arrays it was made of: no part of the pytree."""
        self.set_fields(_origins=origins)
        return self

    def rows_of(self, path: str, origin: Any) -> Ready | None:
        """The rows of tables, if the ticket was made of these arrays."""
        made_of = jax.tree.leaves(vars(self).get("_origins", {}).get(path))
        now = jax.tree.leaves(origin)
        same = len(made_of) == len(now) and all(map(operator.is_, made_of, now))
        return self.rows.get(path) if same else None


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


# As an argument or a result of what `jax.export` writes.
export.register_pytree_node_serialization(
    Ticket,
    serialized_name="adamjax.states.Ticket",
    serialize_auxdata=lambda statics: json.dumps(statics).encode(),
    deserialize_auxdata=lambda written: tuple(_tuples(json.loads(written))),
)
