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
from adamjax.exact.state import Ready, path_of_table
from adamjax.rows import RowGradient, sum_rows

__all__ = ["Ticket"]


class Ticket(Data):
    """The rows that `prepare` brought up to date, for the `update` of the same step.

    It is valid only for the array objects of params, state and indices that it was made from. If
    one of them is another object (after a `flush`, with perturbed parameters, for other rows), or
    if the ticket went through a function with a jit of its own, `update` brings the rows up to date
    itself. So a ticket saves work within one jitted step, and is harmless anywhere else.

    Attributes:
      rows: by path, the up-to-date rows of each table. Tables that are computed together have one
        entry, under the path of the first. If there are so many rows that they are processed in
        blocks, the ticket has none, and `update` brings each block up to date.
      places: by path, the distinct indices, and the position of each index among them.
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
        """The gradient of the rows that `prepare` read: a cheaper `adamjax.row_gradient`.

        `prepare` has already searched for equal indices.

        Args:
          table: the table's path, or a pattern that matches only this table.
          values: floats, the gradients of the rows, in the shape that `prepare` returned.

        Returns:
          A `RowGradient` with room for as many rows as indices, in the dtype of the values.

        Raises:
          ValueError: the name matches no table or several; the shape differs from the rows' shape.

        >>> import adamjax, jax.numpy as jnp
        >>> params = {"table": jnp.zeros((9, 1))}
        >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
        >>> rows, ticket = tx.prepare(params, tx.init(params), {"table": jnp.array([4, 4])})
        >>> ticket.row_gradient("table", jnp.ones((2, 1))).values
        Array([[2.],
               [0.]], dtype=float32)
        """
        path = path_of_table(table, list(self.places))
        distinct, position = self.places[path]
        num_rows, shape = dict(self.num_rows)[path]
        if np.shape(values)[: len(shape)] != tuple(shape):
            raise ValueError(
                f"ticket.row_gradient: the gradients of {path!r} have the shape "
                f"{np.shape(values)}, expected the shape of the rows, {(*shape, '...')}"
            )
        values = jnp.asarray(values).reshape(position.size, *np.shape(values)[len(shape) :])
        return sum_rows(distinct, position, values, num_rows)

    def with_rows_of(self, other: "Ticket") -> "Ticket":
        """A ticket with the rows of both."""
        ticket = Ticket(
            {**self.rows, **other.rows},
            {**self.places, **other.places},
            (*self.num_rows, *other.num_rows),
        )
        return ticket.with_origins({**self._noted_origins, **other._noted_origins})

    def with_origins(self, origins: dict[str, Any]) -> "Ticket":
        """Stores, by path, the arrays that the ticket was made from; they are not in the pytree."""
        self.set_fields(_origins=origins)
        return self

    @property
    def _noted_origins(self) -> dict[str, Any]:
        """By path, the arrays that the ticket was made from; none if it went through `jit`."""
        return vars(self).get("_origins", {})

    def rows_of(self, path: str, origin: Any) -> Ready | None:
        """The rows of a batch; `None` if the ticket was not made from exactly these array objects.

        Args:
          path: the path of the batch's first table.
          origin: the arrays that the rows depend on, compared by identity.
        """
        expected = jax.tree.leaves(self._noted_origins.get(path))
        arrays = jax.tree.leaves(origin)
        same = len(expected) == len(arrays) and all(map(operator.is_, expected, arrays))
        return self.rows.get(path) if same else None


def _tuples(x: Any) -> Any:
    """A value read from JSON, with tuples for lists, because static fields must be hashable."""
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


# For tickets that are an argument or a result of an exported function.
export.register_pytree_node_serialization(
    Ticket,
    serialized_name="adamjax.states.Ticket",
    serialize_auxdata=lambda statics: json.dumps(statics).encode(),
    deserialize_auxdata=lambda written: tuple(_tuples(json.loads(written))),
)
