"""What `exact_rows` keeps and hands out: states, tickets, and what stands in a table's place."""

import json
import operator
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from adamjax.coasting import Ring
from adamjax.data import Data, exportable, static
from adamjax.rows import RowGradient, summed

__all__ = [
    "Columns",
    "ExactRowsState",
    "Past",
    "Ready",
    "StaleTable",
    "TableState",
    "Ticket",
    "named",
]


@exportable
class TableState(NamedTuple):
    """What is known of a table's rows.

    Attributes:
      last: int32[num_rows], the clock at which each row stands as it is in `params`.
      cursor: int32, the row that is refreshed next.
    """

    last: chex.Array
    cursor: chex.Array


@exportable
class ExactRowsState(NamedTuple):
    """State of `exact_rows`.

    Attributes:
      inner: the state of the inner transform; the slots of a table lag behind as its rows do.
      clock: int32, the steps taken; unlike a count it wraps around.
      tables: by path, each table's `TableState`.
      rings: what the last steps have done to a row that stands at each of them: a `Ring` for all
        tables that go the same way. Its name says whose it is (of several tables the first, how
        many more, and a checksum of their paths) and of which rule, as in
        `"table: b1=0.9,shrink=0.9995,eps=1e-07,history=256"`: with another rule the rows that lag
        behind would move otherwise, and a checkpoint has no other place for it.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> tx.init({"table": jnp.zeros((3, 1))}).last
    {'table': Array([0, 0, 0], dtype=int32)}
    """

    inner: Any
    clock: chex.Array
    tables: dict[str, TableState]
    rings: dict[str, Ring]

    @property
    def last(self) -> dict[str, chex.Array]:
        """By path, the clock at which each row of a table stands: int32[num_rows]."""
        return {path: table.last for path, table in self.tables.items()}


class Columns(NamedTuple):
    """The arrays that are as long as a table."""

    weights: chex.Array
    slots: dict[str, chex.Array]
    last: chex.Array


class Past(NamedTuple):
    """What brings rows up to date: the ring after the last step, and that step's number."""

    ring: Ring
    clock: chex.Array
    count: chex.Array


@exportable
class Ready(NamedTuple):
    """Rows of tables, those of one after those of another, up to date.

    Where there is no row, they are what happens to be read.
    """

    now: chex.Array
    moved: chex.Array  # by how much they lag behind in `params`, widened
    slots: dict[str, chex.Array]
    last: chex.Array
    seen: chex.Array  # bool scalar, False unless what was read of the ring has NaN


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
        ticket._set(_origins={**vars(self).get("_origins", {}), **vars(other).get("_origins", {})})
        return ticket

    def made_of(self, origins: dict[str, Any]) -> "Ticket":
        """The ticket, which then knows the arrays it was made of: no part of the pytree."""
        self._set(_origins=origins)
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
    serialized_name="adamjax.Ticket",
    serialize_auxdata=lambda statics: json.dumps(statics).encode(),
    deserialize_auxdata=lambda written: tuple(_tuples(json.loads(written))),
)


def named(name: str, paths: list[str]) -> str:
    """The path of the table that a name means."""
    found = [p for p in paths if p == name] or [p for p in paths if re.search(name, p)]
    if len(found) != 1:
        raise ValueError(f"exact_rows: {name!r} names {len(found)} tables, expected one of {paths}")
    return found[0]


@jax.tree_util.register_pytree_node_class
class StaleTable:
    """Stands where a table was: reading it raises, as its rows may lag behind.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> tx.without_tables({"table": jnp.zeros((9, 1)), "bias": jnp.zeros(1)})
    {'bias': Array([0.], dtype=float32), 'table': StaleTable('table')}
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def tree_flatten(self) -> tuple[tuple[()], str]:
        return (), self.path

    @classmethod
    def tree_unflatten(cls, path: str, leaves: Any) -> "StaleTable":
        return cls(path)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"rows of the table {self.path!r} may lag behind, so it cannot be read as it is: read "
            "rows with prepare (in a train step) or lookup, or bring all up to date with flush"
        )

    def __getattr__(self, name: str) -> Any:
        # Names of protocols, which copies, pickles and notebooks ask for, are not there.
        if name.startswith("_") or name == "path":
            raise AttributeError(f"StaleTable has no {name!r}")
        return self._refuse()

    def __repr__(self) -> str:
        return f"StaleTable({self.path!r})"


# Python looks for these on the class.
_BINARY = ["add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow"]
_BINARY += ["lshift", "rshift", "and", "xor", "or"]
_REFUSED = [*_BINARY, *(f"r{name}" for name in _BINARY), "neg", "pos", "abs", "invert"]
_REFUSED += ["lt", "le", "gt", "ge", "eq", "ne", "bool", "int", "float", "complex", "index"]
_REFUSED += ["round", "trunc", "floor", "ceil", "getitem", "setitem", "delitem", "contains"]
_REFUSED += ["len", "iter", "reversed", "jax_array", "array", "array_ufunc", "array_function"]
_REFUSED += ["dlpack"]
for _name in _REFUSED:
    setattr(StaleTable, f"__{_name}__", StaleTable._refuse)
