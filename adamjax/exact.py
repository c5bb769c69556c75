"""Tables kept exact at the cost of the rows that are touched: the others catch up when read.

A row without a gradient moves on by its momentum, and by how much is known (`coasting`). So a
step leaves it where it stands and notes, once for all rows, what the step would have done to
it; the row is brought up to date when somebody reads it, and then takes its step with all that
is in the chain, as the dense row would. Nothing in a chain knows of this: it is given the rows
that are touched as if they were the whole table.
"""

import functools
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from adamjax.autodiff import Call, Reads
from adamjax.average import weight_ema
from adamjax.blocks import in_blocks, is_one_block, rows_of_each, together
from adamjax.coasting import Coasting, Ring, coasting, decayed
from adamjax.data import Data, Tree, exportable, is_array, static
from adamjax.grouping import grouped
from adamjax.guard import accumulate_gradients, skip_not_finite
from adamjax.leaves import (
    as_arrays,
    described,
    dtype_of,
    expect_array,
    expect_like,
    is_left_alone,
    matched,
    needed,
)
from adamjax.masking import masked, partition, settled
from adamjax.mesh import at_each, explicit, over_rows, put, rows_alike, taken
from adamjax.moments import accumulator, apart, next_count, root
from adamjax.paths import (
    checked_patterns,
    expect_matches,
    first_match,
    flatten,
    leaf_paths,
    optional,
    selected,
    unique_paths,
)
from adamjax.replicas import sum_over
from adamjax.rows import RowGradient, RowMoves, check_sound, checked_ids, summed
from adamjax.search import distinct_of_each
from adamjax.transform import (
    Rule,
    Step,
    Transform,
    all_parts,
    as_transform,
    chain,
    expect_state,
    over_slots,
)

__all__ = ["ExactRowsState", "StaleTable", "TableState", "Ticket", "exact_rows"]


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
        tables that go the same way. Its name says whose it is and of which rule, as in
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


class _Columns(NamedTuple):
    """The arrays that are as long as a table."""

    weights: chex.Array
    slots: dict[str, chex.Array]
    last: chex.Array


class _Past(NamedTuple):
    """What brings rows up to date: the ring after the last step, and that step's number."""

    ring: Ring
    clock: chex.Array
    count: chex.Array


@exportable
class _Ready(NamedTuple):
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
          values: the gradients of the rows, of the shape in which `prepare` gave them.

        >>> import adamjax, jax.numpy as jnp
        >>> params = {"table": jnp.zeros((9, 1))}
        >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
        >>> rows, ticket = tx.prepare(params, tx.init(params), {"table": jnp.array([4, 4])})
        >>> ticket.row_gradient("table", jnp.ones((2, 1))).values
        Array([[2.],
               [0.]], dtype=float32)
        """
        path = _named(table, list(self.places))
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

    def rows_of(self, path: str, origin: Any) -> _Ready | None:
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


class _Table(NamedTuple):
    """A table: where it is, and what happens to its rows."""

    leaf: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    rule: Rule
    plan: Coasting
    kind: Any  # equal for tables that every step treats alike

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def real(self) -> Any:
        return accumulator(self.dtype)


class _Family(NamedTuple):
    """Tables that go the same way, so that one ring says what becomes of their rows."""

    name: str
    history: int
    tables: list[_Table]


class _Batch(NamedTuple):
    """Tables of a family whose rows are worked on together: of one width and dtype."""

    family: _Family
    tables: list[_Table]

    @property
    def path(self) -> str:
        return self.tables[0].path


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


# --- what a table goes through --------------------------------------------------------------------


class _Station(NamedTuple):
    """An elementary transform on the way of a leaf's gradient."""

    place: tuple[int, ...]  # the numbers of the parts that lead to it
    tx: Transform
    state: Any


def _route(
    tx: Transform, state: Any, leaf: int, params: Tree, place: tuple[int, ...] = ()
) -> Iterator[_Station]:
    """The elementary transforms that a leaf's gradient goes through, with their states.

    Without parameters, at construction, those that every leaf may go through.
    """
    parts: Sequence[int]
    if isinstance(tx, partition):
        found = None if params is None else first_match(tx.patterns, leaf_paths(params)[leaf])
        parts = () if params is None else (len(tx.transforms) if found is None else found,)
    elif isinstance(tx, masked):
        parts = (0,) if params is None or selected(tx.pattern, params)[leaf] else ()
    elif isinstance(tx, chain):
        parts = range(len(tx.parts))
    else:
        yield _Station(place, tx, state)
        return
    for i in parts:
        part_state = None if state is None else tx.part_states(state)[i]
        yield from _route(tx.parts[i], part_state, leaf, params, (*place, i))


def _refused(tx: Transform, why: str) -> ValueError:
    return ValueError(f"exact_rows: {tx!r} cannot be in the chain of a table: {why}")


def _checked(route: list[Transform]) -> None:
    """Refuses what rows cannot be kept exact through."""
    rule: Transform | None = None
    average: Transform | None = None
    for tx in route:
        if isinstance(tx, skip_not_finite | accumulate_gradients | exact_rows):
            name = type(tx).__name__
            raise _refused(tx, f"put it around the whole: {name}(exact_rows(...))")
        if isinstance(tx, sum_over):
            raise _refused(
                tx,
                "each replica would add it to rows of its own; put it in front of the whole: "
                f"chain({tx!r}, exact_rows(...))",
            )
        if isinstance(tx, grouped):
            raise _refused(tx, "keep tables apart from the leaves that are joined, by partition")
        if average is not None:
            raise _refused(average, "it must be last")
        if isinstance(tx, weight_ema):
            average = tx
            if tx.overwrite_frequency is not None:
                raise _refused(tx, "overwriting would move every row; call flush and set them")
        elif isinstance(tx, Rule):
            if rule is not None:
                raise _refused(tx, f"it is a second rule, behind {rule!r}")
            rule = tx
        elif rule is None and not tx.keeps_zero and any(isinstance(x, Rule) for x in route):
            raise _refused(tx, "in front of the rule, it may give a gradient to rows without one")
        elif rule is not None and tx.affine(None, None, 0, None) is None:
            raise _refused(tx, "behind the rule, its result is not affine in update and weights")
    if rule is None or (average is not None and route[-1] is not average):
        raise ValueError(
            f"exact_rows: expected one rule such as scale_by_adam in a table's chain, got {route!r}"
        )


@functools.lru_cache
def _ring_like(plan: Coasting, history: int, real: Any) -> Ring:
    """Shapes and dtypes of a ring."""
    return jax.eval_shape(lambda: plan.init(history, real))


def _is_fixed(x: Any) -> bool:
    return isinstance(x, Rule | weight_ema)


class _Waiting:
    """A table's gradient in front of its rule: to everything behind, a leaf to be left alone."""

    dtype = jax.dtypes.float0

    def __init__(self, gradient: Any) -> None:
        self.gradient, self.shape = gradient, gradient.shape


class _stopping(Rule):
    """A rule before which the gradients of some leaves wait."""

    tx: Rule
    leaves: Any = static()

    def step(self, grads: Tree, state: Any, factors: Any) -> Step:
        found, treedef = flatten(grads)
        for leaf in self.leaves:
            if found[leaf] is not None:
                found[leaf] = _Waiting(found[leaf])
        return self.tx.step(treedef.unflatten(found), state, factors)


def _with_stops(tx: Transform, leaves: tuple[int, ...]) -> Transform:
    """The transform without what its rules and all behind them do to some leaves."""

    def is_rule(x: Any) -> bool:
        return isinstance(x, Rule)

    return jax.tree.map(lambda x: _stopping(x, leaves) if is_rule(x) else x, tx, is_leaf=is_rule)


class exact_rows(Transform):
    """Any optimizer, with tables whose steps cost what their touched rows cost, and are exact.

    A table's `RowGradient` has the effect of the dense gradient: rows without one decay and move
    on by their momentum as well. But they do so late, when they are read: **between steps rows of
    `params` may lag behind.** In a train step read them with `prepare`, elsewhere with `lookup`;
    `flush` brings all up to date, before a checkpoint is handed on or the weights are read by
    something else. `without_tables(params)` is `params` with placeholders that refuse to be read.

    Tables may get dense gradients in some steps; such a step costs as much as a dense one. A
    gradient of `None` is refused for a table: pass a row gradient without rows. A norm that is not
    finite in front of the rule makes NaN of the rows that the gradient has, and of no others.

    A state goes on only with the tables, the history and the rule that it is of: with other betas,
    epsilons or momenta the rows that lag behind would move otherwise, so that is refused. To change
    them, `flush` with the old transform and begin with `from_dense` of the new one.

    Args:
      tx: an optimizer or chain: transforms that keep zero gradients zero, a rule (`rows=` has no
        effect on it here), scalings and decoupled weight decay, a `weight_ema` last. Betas,
        epsilons and the average's momentum must be Python floats; rates and decays may be arrays
        and change from step to step, as long as `learning_rate * weight_decay < 1`: at a step
        where it is not, the rows become NaN. They do so too at a step whose rate is NaN or
        infinite, but rows that are not read for long after it may stay finite.
      tables: which leaves are tables: a pattern for `re.search` in the path, or a list of them;
        each must match a leaf, unless it is `optional`.
      history: how many steps a row may lag behind, rounded up to a power of two. The least
        depends on the betas. Each step refreshes `num_rows / history` rows of each table, and the
        state has an entry for each step of it. `None`: 1/64 of the largest table's rows, as far as
        that lies between the least and 65,536.

    The state is an `ExactRowsState`.

    Raises:
      ValueError: something in the chain cannot be kept exact (the message names it), or
        `history` is too small; by `init`, if `learning_rate * weight_decay` is not below 1.

    >>> import adamjax, jax.numpy as jnp
    >>> params = {"table": jnp.ones((1000, 2))}
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> state = tx.init(params)
    >>> for ids in ([3], [5], [5]):
    ...     rows, ticket = tx.prepare(params, state, {"table": jnp.array(ids)})
    ...     grads = {"table": ticket.row_gradient("table", rows["table"])}
    ...     updates, state = tx.update(grads, state, params, ticket=ticket)
    ...     params = adamjax.apply_updates(params, updates)
    >>> params["table"][3], tx.lookup(params, state, "table", 3)
    (Array([0.9, 0.9], dtype=float32), Array([0.781, 0.781], dtype=float32))
    """

    tx: Transform
    tables: Any = static()
    history: int | None = static(default=None, kw_only=True)
    fixed: Any = static(default=(), kw_only=True)

    def __post_init__(self) -> None:
        tables = checked_patterns("exact_rows", self.tables)
        tx, history = as_transform(self.tx), self.history
        if history is not None:
            try:
                history = 1 << max(operator.index(history) - 1, 0).bit_length()
            except TypeError:
                raise TypeError(f"exact_rows: history must be an int, got {history!r}") from None
        kept = []
        for part in filter(_is_fixed, jax.tree.leaves(tx, is_leaf=_is_fixed)):
            numbers = {k: v for k, v in vars(part).items() if v is not None}
            for name, value in numbers.items():
                if is_array(value):
                    raise _refused(part, f"{name} must be a Python float here, got {value!r}")
            kept.append(tuple(numbers.items()))
        self._set(tx=tx, tables=tables, history=history, fixed=tuple(kept))
        if not any(isinstance(part, partition) for part in all_parts(tx)):
            route = [station.tx for station in _route(tx, None, 0, None)]
            _checked(route)
            self._plan(route)

    joinable = False

    @property
    def parts(self) -> tuple[Transform, ...]:
        return (self.tx,)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, ExactRowsState)
        return (state.inner,)

    @property
    def must_be_last(self) -> bool:
        return True

    def __repr__(self) -> str:
        tables = self.tables[0] if len(self.tables) == 1 else list(self.tables)
        history = "" if self.history is None else f", history={self.history}"
        return f"exact_rows({self.tx!r}, {tables!r}{history})"

    # --- statics

    @property
    def _inner(self) -> Transform:
        """The inner transform, with the numbers that must be static as they were given."""
        kept = iter(self.fixed)
        return jax.tree.map(
            lambda x: x.replace(**dict(next(kept))) if _is_fixed(x) else x,
            self.tx,
            is_leaf=_is_fixed,
        )

    def _plan(self, route: list[Transform], real: Any = np.float32) -> tuple[Rule, Coasting]:
        rule = next(tx for tx in route if isinstance(tx, Rule))
        momenta = [tx.momentum for tx in route if isinstance(tx, weight_ema)]
        behind = route[route.index(rule) + 1 :]
        decays = any((tx.affine(None, None, 0, None) or (1, 0))[1] != 0 for tx in behind)
        plan = coasting(rule.coast(), float(momenta[0]) if momenta else None, decays, real)
        if self.history is not None and self.history < plan.least_history:
            raise ValueError(
                f"exact_rows: history={self.history} is too small, expected at least "
                f"{plan.least_history}: so many steps long a gradient is felt with {rule!r} in "
                f"{np.dtype(real).name}"
                + (f" and an average of momentum {momenta[0]}" if momenta else "")
            )
        return rule, plan

    def _tables(self, params: Tree) -> list[_Table]:
        """The tables among the parameters."""
        tx, leaves, found = self._inner, flatten(params)[0], []
        for leaf, path in enumerate(unique_paths("exact_rows", params)):
            p = leaves[leaf]
            if p is None or first_match(self.tables, path) is None:
                continue
            dtype, shape = dtype_of(p), np.shape(p)
            if len(shape) < 1 or not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    f"exact_rows: params[{path!r}] is {dtype.name}{list(shape)}, expected a table "
                    "of real floats with rows; the pattern is too wide"
                )
            stations = list(_route(tx, None, leaf, params))
            route = [station.tx for station in stations]
            _checked(route)
            rule, plan = self._plan(route, accumulator(dtype))
            behind = stations[route.index(rule) :]
            kind = tuple((place, part.kinds(params)[leaf]) for place, part, _ in behind)
            found.append(_Table(leaf, path, shape, dtype, rule, plan, (kind, accumulator(dtype))))
        if not found and not all(isinstance(pattern, optional) for pattern in self.tables):
            raise ValueError(
                f"exact_rows: no leaf's path matches any of {list(self.tables)}; the paths are "
                f"{leaf_paths(params)}"
            )
        expect_matches("exact_rows", self.tables, params)
        return found

    def _families(self, tables: list[_Table]) -> list[_Family]:
        """The tables by what becomes of their rows, each family with its history."""
        found: dict[Any, list[_Table]] = {}
        for table in tables:
            found.setdefault((table.kind, table.plan), []).append(table)
        families = []
        for alike in found.values():
            plan, history = alike[0].plan, self.history
            if history is None and plan.replays:
                history = _REPLAYED
            elif history is None:
                wanted = max(t.num_rows for t in alike) // _REFRESHED
                history = 1 << max(min(wanted, _LONGEST) - 1, 0).bit_length()
                history = max(history, plan.least_history)
            name = f"{alike[0].path}: {plan.name},history={history}"
            families.append(_Family(name, history, alike))
        return families

    def _expected(self, state: Any, params: Tree) -> tuple[list[_Table], ExactRowsState, Tree]:
        """The tables; state and params as arrays of JAX, if they fit each other and this transform.

        All is checked by structures, shapes and dtypes, so a step takes no time for it.
        """
        expect_state(self, state, ExactRowsState)
        tables = self._tables(params)
        slots: dict[str, Tree] = {}

        def see(name: str, tree: Tree) -> Tree:
            slots.setdefault(name, tree)
            return tree

        over_slots(see, state.inner)
        came = leaf_paths(params)
        wanted = leaf_paths(next(iter(slots.values()))) if slots else came
        # JAX sorts the keys of a dictionary that goes through jit.
        if came != wanted or {t.path for t in tables} != set(state.tables):
            others = [path for path in came if path not in set(wanted)]
            others += [path for path in wanted if path not in set(came)]
            raise ValueError(
                f"exact_rows: the state is of other parameters, with the tables "
                f"{list(state.tables)}, expected {[t.path for t in tables]}; leaves that only one "
                f"of both has: {others}. Rows are found by the leaf's place, so params must have "
                "the structure that init was given"
            )
        expect_array("exact_rows: the clock", state.clock, (), "it is to wrap around", "int32")
        for table in tables:
            self._expect_table(table, state.tables[table.path], slots, params)
        self._expect_rings(self._families(tables), state.rings)
        for table in tables:
            for _, tx, own in _route(self._inner, state.inner, table.leaf, params):
                tx.check_state(own)
        return tables, as_arrays(state), as_arrays(params)

    def _expect_table(
        self, table: _Table, known: TableState, slots: dict[str, Tree], params: Tree
    ) -> None:
        """Refuses what is known of another table, or of a table under another transform."""
        other = (
            "make a new state with init; or flush with the old sizes, resize the table in params "
            "and in state.inner, and go on with from_dense(state.inner, params)"
        )
        shape = np.shape(flatten(params)[0][table.leaf])
        expect_array(
            f"exact_rows: tables[{table.path!r}].last", known.last, shape[:1], other, "int32"
        )
        expect_array(f"exact_rows: tables[{table.path!r}].cursor", known.cursor, (), other, "int32")
        for name, tree in slots.items():
            slot = flatten(tree)[0][table.leaf]
            if slot is not None or name in table.rule.decays:
                expect_array(f"exact_rows: {name}[{table.path!r}]", slot, shape, other)

    def _expect_rings(self, families: list[_Family], rings: Any) -> None:
        """Refuses what the last steps of another transform did."""
        mend = (
            "rows that lag behind must go on as they began. Build it as it was; or flush with the "
            "old one and start from its dense state: params, state = old.flush(params, state), "
            "then state = new.from_dense(state.inner, params)"
        )
        names = [family.name for family in families]
        came = list(rings) if isinstance(rings, Mapping) else type(rings).__name__
        if not isinstance(rings, Mapping) or set(rings) != set(names):
            raise ValueError(
                f"exact_rows: the state is of another transform: {came}, expected {names}: {mend}"
            )
        for family in families:
            table = family.tables[0]
            expected = _ring_like(table.plan, family.history, table.real)
            for name, x, like in zip(Ring._fields, rings[family.name], expected, strict=True):
                if (x is None) != (like is None):
                    has = "has no" if x is None else "has"
                    raise ValueError(f"exact_rows: the ring of {table.path!r} {has} {name}: {mend}")
                if like is not None:
                    where = f"exact_rows: rings[{family.name!r}].{name}"
                    expect_array(where, x, like.shape, mend, like.dtype.name)

    def _named(self, tables: list[_Table], name: str) -> _Table:
        path = _named(name, [t.path for t in tables])
        return next(t for t in tables if t.path == path)

    # --- the state

    def init(self, params: Tree) -> ExactRowsState:
        return self._from_dense(self.tx.init(params), params)

    def from_dense(self, inner: Any, params: Tree) -> ExactRowsState:
        """The state that goes on from a state of the inner transform, all rows up to date.

        The way back is `params, state = tx.flush(params, state)`, then `state.inner`.

        Args:
          inner: a state like that of `tx.init(params)`, tx the inner transform.
          params: the parameters at that step.

        Raises:
          ValueError: the state is not like that, or `learning_rate * weight_decay` is not below 1.

        >>> import adamjax, jax.numpy as jnp
        >>> params, dense = {"table": jnp.zeros((9, 1))}, adamjax.adam(0.1)
        >>> state = adamjax.exact_rows(dense, "table").from_dense(dense.init(params), params)
        """
        expected = jax.eval_shape(self.tx.init, params)
        mend = "pass a state of the inner transform for these parameters"
        expect_like("exact_rows.from_dense", "inner", inner, expected, mend)
        return self._from_dense(as_arrays(inner), params)

    def _from_dense(self, inner: Any, params: Tree) -> ExactRowsState:
        tables, clock, states = self._tables(params), None, {}
        for t in tables:
            _, count = self._found(t, inner, params)
            clock = count if clock is None else clock
            _, b = self._scalars(t, inner, params)
            if not isinstance(b, jax.core.Tracer) and b <= -1:
                raise ValueError(
                    f"exact_rows: a step multiplies the weights of {t.path!r} by {1 + b:.3g}; "
                    "expected a factor above 0: learning_rate * weight_decay must be below 1"
                )
            states[t.path] = TableState(
                last=rows_alike(jnp.full(t.num_rows, clock, jnp.int32), flatten(params)[0][t.leaf]),
                cursor=jnp.zeros((), jnp.int32),
            )
        clock = jnp.array(0 if clock is None else clock, jnp.int32, copy=True)
        rings = {
            family.name: family.tables[0].plan.init(family.history, family.tables[0].real)
            for family in self._families(tables)
        }
        return ExactRowsState(inner, clock, states, rings)

    def _found(
        self, table: _Table, inner: Any, params: Tree, tx: Transform | None = None
    ) -> tuple[list[_Station], chex.Array]:
        """A table's rule and what is behind it, and the rule's count of steps."""
        route = list(_route(self._inner if tx is None else tx, inner, table.leaf, params))
        start = next(i for i, station in enumerate(route) if isinstance(station.tx, Rule))
        return route[start:], route[start].state.count

    def _scalars(self, table: _Table, inner: Any, params: Tree) -> tuple[Any, Any]:
        """The step from a state, p += a * m / (x + e) + b * p: its scalars a and b."""
        (rule, *behind), _ = self._found(table, inner, params)
        a, b = rule.tx.pace(rule.state, table.real), 0.0  # type: ignore[attr-defined]
        for _, tx, state in behind:
            if not isinstance(tx, weight_ema):
                s, w = tx.affine(state, params, table.leaf, table.real) or (1, 0)
                a, b = s * a, s * b + w
        return a, b

    def _advanced(
        self, family: _Family, state: ExactRowsState, params: Tree, seen: chex.Array
    ) -> Ring:
        """A family's ring after the step that is taken from a state."""
        table = family.tables[0]
        a, b = self._scalars(table, state.inner, params)
        _, count = self._found(table, state.inner, params)
        # NaN stays, but it is written here so that what is read of the ring is needed before the
        # ring is written: XLA, which would not know which comes first, would copy it.
        a = jnp.where(seen, jnp.nan, a)
        ring = state.rings[family.name]
        return table.plan.advance(ring, state.clock + 1, next_count(count), a, b)

    # --- rows

    def _columns(self, table: _Table, state: ExactRowsState, params: Tree) -> _Columns:
        slots: dict[str, chex.Array] = {}

        def collect(name: str, tree: Tree) -> Tree:
            leaf = flatten(tree)[0][table.leaf]
            if leaf is not None:
                slots[name] = leaf
            return tree

        over_slots(collect, state.inner)
        return _Columns(flatten(params)[0][table.leaf], slots, state.tables[table.path].last)

    def _past(self, family: _Family, state: ExactRowsState, params: Tree) -> _Past:
        _, count = self._found(family.tables[0], state.inner, params)
        return _Past(state.rings[family.name], state.clock, count)

    def _batches(self, tables: list[_Table], params: Tree, sizes: dict[int, int]) -> list[_Batch]:
        """Tables, of which so many rows are worked on, by what can be worked on together."""
        batches, leaves = [], flatten(params)[0]
        for family in self._families(tables):
            alike: dict[Any, list[_Table]] = {}
            for table in family.tables:
                if table.leaf in sizes:
                    # Rows of tables that are split in different ways are of different types.
                    split = explicit(leaves[table.leaf])
                    spec = None if split is None else (split.mesh, split.spec[1:])
                    alike.setdefault((table.dtype, table.shape[1:], spec), []).append(table)
            for same in alike.values():
                own = [jax.ShapeDtypeStruct((sizes[t.leaf], *t.shape[1:]), t.dtype) for t in same]
                groups = together(range(len(same)), own)
                batches += [_Batch(family, [same[i] for i in several]) for several in groups]
        return batches

    def _parts(
        self, batch: _Batch, state: ExactRowsState, found: list[chex.Array]
    ) -> list[list[chex.Array]]:
        """The rows that a step works on, of each table of a batch: those found, and those due.

        In one part; where there are so many that blocks of them take turns, in two: so their
        gradients need not be copied to make room.
        """
        due = self._due(batch, state, found)
        if is_one_block(found[0].size):
            return [[jnp.concatenate(both) for both in zip(found, due, strict=True)]]
        return [found, due]

    def _due(
        self, batch: _Batch, state: ExactRowsState, found: list[chex.Array]
    ) -> list[chex.Array]:
        """The rows of each table whose turn it is to be refreshed, as far as they were not found.

        Computed for all tables of a batch in one go.
        """
        num_rows = [t.num_rows for t in batch.tables]
        sizes = [_refreshed(t, batch.family.history) for t in batch.tables]
        if not sum(sizes):
            return [x[:0] for x in found]
        cursors = [state.tables[t.path].cursor for t in batch.tables]

        places, starts = [x.size for x in found], np.cumsum([0, *sizes[:-1]])
        rows = np.array(num_rows, np.int32)
        behind = jnp.concatenate(found) - _beside(cursors, places)
        behind = jnp.where(behind < 0, behind + _beside(rows, places), behind)
        is_due = (jnp.concatenate(found) < _beside(rows, places)) & (
            behind < _beside(np.array(sizes, np.int32), places)
        )
        place = jnp.where(is_due, behind + _beside(starts.astype(np.int32), places), sum(sizes))
        there = jnp.zeros(sum(sizes), bool).at[place.astype(np.uint32)].set(True, mode="drop")
        due = _beside(cursors, sizes) + np.concatenate(
            [np.arange(n, dtype=np.int32) for n in sizes]
        )
        due = due - jnp.where(due < _beside(rows, sizes), 0, _beside(rows, sizes))
        return rows_of_each(jnp.where(there, _beside(rows, sizes), due), sizes)

    def _ready(
        self, batch: _Batch, past: _Past, columns: list[_Columns], indices: list[Any]
    ) -> _Ready:
        """Rows up to date.

        Args:
          columns: of each table.
          indices: of each table, int32[n], with `num_rows` where there is none; `None` for all.
        """
        first = batch.tables[0]
        safe, is_row = indices, None
        if indices[0] is not None:
            sizes = [x.size for x in indices]
            num_rows = _beside(np.array([t.num_rows for t in batch.tables], np.int32), sizes)
            everyone = jnp.concatenate(indices)
            is_row = everyone < num_rows
            safe = rows_of_each(jnp.minimum(everyone, num_rows - 1).astype(np.uint32), sizes)

        def gathered(arrays: Any) -> chex.Array:
            pairs = zip(arrays, safe, strict=True)
            rows = [x if i is None else taken(x, i, mode="promise_in_bounds") for x, i in pairs]
            return rows[0] if len(rows) == 1 else jnp.concatenate(rows)

        last = gathered(c.last for c in columns)
        last = last if is_row is None else jnp.where(is_row, last, past.clock)
        here = {name: gathered(c.slots[name] for c in columns) for name in columns[0].slots}
        slots = {name: x.astype(first.real) for name, x in here.items()}
        # A gather that is fused into the arithmetic keeps it from being vectorised.
        before = apart(gathered(c.weights for c in columns)).astype(first.real)
        measure = slots["u"] if "u" in slots else root(slots.get("v_max", slots.get("v")))
        moved, average = first.plan.catch_up(
            *past, last, before, slots["m"], measure, slots.get("average")
        )
        gap = past.clock - last
        for name, b in first.rule.decays.items():
            slots[name] = decayed(slots[name], b, gap, batch.family.history)
        if average is not None:
            slots["average"] = average
        read = [at_each(x, last & (len(x) - 1)) for x in past.ring if x is not None]
        found = [jnp.any(jnp.isnan(x)) for x in read]
        return _Ready(
            now=(before + moved).astype(first.dtype),
            moved=moved,
            slots={name: x.astype(here[name].dtype) for name, x in slots.items()},
            last=last,
            seen=functools.reduce(operator.or_, found, jnp.array(False)),
        )

    def _prepared(
        self,
        state: ExactRowsState,
        params: Tree,
        tables: list[_Table],
        ids: list[chex.Array],
    ) -> tuple[list[chex.Array], list[tuple[chex.Array, chex.Array]], Ticket]:
        """Rows of tables at indices, up to date; which of them are distinct; and a ticket."""
        searched = distinct_of_each([x.reshape(-1) for x in ids], [t.num_rows for t in tables])
        places = {t.leaf: i for i, t in enumerate(tables)}
        sizes = {t.leaf: found.size for t, (found, _) in zip(tables, searched, strict=True)}
        read: list[Any] = [None] * len(tables)
        rows: dict[str, Any] = {}
        origins: dict[str, Any] = {}
        for batch in self._batches(self._tables(params), params, sizes):
            own = [places[t.leaf] for t in batch.tables]
            found = [searched[i][0] for i in own]
            columns = [self._columns(t, state, params) for t in batch.tables]
            past = self._past(batch.family, state, params)
            indices = self._parts(batch, state, found)[0]
            if is_one_block(found[0].size):
                ready = self._ready(batch, past, columns, indices)
                now, rows[batch.path] = ready.now, ready
                origins[batch.path] = past, columns, found
            else:
                now = self._read(batch, past, columns[0], indices[0])
            starts = np.cumsum([0, *(x.size for x in indices[:-1])])
            # An index outside the table has the place of no row.
            place = jnp.concatenate(
                [
                    jnp.where(searched[i][1] < x.size, searched[i][1] + start, len(now))
                    for i, x, start in zip(own, found, starts, strict=True)
                ]
            )
            now = taken(now, place, mode="fill", fill_value=0)
            for i, x in zip(own, rows_of_each(now, [x.size for x in found]), strict=True):
                read[i] = x.reshape(*ids[i].shape, *x.shape[1:])
        by_path = {t.path: pair for t, pair in zip(tables, searched, strict=True)}
        shapes = {t.path: (t.num_rows, x.shape) for t, x in zip(tables, ids, strict=True)}
        ticket = Ticket(rows, by_path, tuple(shapes.items()))
        return read, searched, ticket.made_of(origins)

    def _read(
        self, batch: _Batch, past: _Past, columns: _Columns, indices: chex.Array
    ) -> chex.Array:
        """Rows of a table up to date, block by block."""
        table = batch.tables[0]

        def step(_: Any, indices: chex.Array, rows: Any, reads: Any) -> Any:
            return (), self._ready(batch, past, [columns], [indices]).now

        empty = jnp.zeros((indices.size, *table.shape[1:]), table.dtype)
        return in_blocks(step, (), indices, table.num_rows, empty)[1]

    def prepare(
        self, params: Tree, state: ExactRowsState, indices: Mapping[str, chex.Array]
    ) -> tuple[dict[str, chex.Array], Ticket]:
        """Reads rows for a train step.

        Args:
          params, state: as for `update`.
          indices: for each table that the step reads, by its path or a pattern that finds it
            alone, the rows: integers of any dtype and shape. One outside the table reads zeros.

        Returns:
          By the same names, the rows, of shape `indices.shape + trailing` and the table's dtype;
          and a ticket which spares `update` doing the same again, for the gradient that its
          `row_gradient` makes; for others the ticket is of no use, but does no harm.
        """
        tables, state, params = self._expected(state, params)
        named = [self._named(tables, name) for name in indices]
        ids = [
            checked_ids("exact_rows.prepare", x, table.num_rows)
            for x, table in zip(indices.values(), named, strict=True)
        ]
        if len({table.leaf for table in named}) < len(named):
            raise ValueError(
                f"exact_rows.prepare: two names of {list(indices)} mean the same table: give all "
                "of its indices at once"
            )
        read, _, ticket = self._prepared(state, params, named, ids)
        return dict(zip(indices, read, strict=True)), ticket

    def value_and_grad(
        self,
        loss_fn: Callable[..., Any],
        *,
        has_aux: bool = False,
        strict: bool = False,
    ) -> Callable[..., Any]:
        """`adamjax.value_and_grad` by the parameters, of a loss that reads rows up to date.

        The loss is written as for dense gradients. Rows of tables are brought up to date before
        it reads them, once, where their indices can be told from the arguments alone; else where
        it reads them, and once more in `update`. A table that is used in another way, even if
        nothing is differentiated there, is brought up to date as a whole, and its gradient is
        dense: right, but no cheaper than a dense step.

        Args:
          loss_fn: `loss_fn(params, *args, **kwargs)`, as for `adamjax.value_and_grad`.
          has_aux, strict: as there.

        Returns:
          A function `(params, state, *args, **kwargs) -> ((value, grads), ticket)`, where value
          is `(loss, aux)` with `has_aux`. The ticket is for the `update` of the same step.

        >>> import adamjax, jax, jax.numpy as jnp
        >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
        >>> def loss(params, ids):
        ...     return jnp.sum(params["table"][ids] ** 2)
        >>> @jax.jit
        ... def step(params, state, ids):
        ...     (value, grads), ticket = tx.value_and_grad(loss)(params, state, ids)
        ...     updates, state = tx.update(grads, state, params, ticket=ticket)
        ...     return adamjax.apply_updates(params, updates), state, value
        >>> params = {"table": jnp.ones((1000, 2))}
        >>> state = tx.init(params)
        >>> for ids in ([3], [5], [3]):
        ...     params, state, value = step(params, state, jnp.array(ids))
        >>> print(f"{value:.3f}")  # of row 3, which moved twice
        1.388
        """

        @functools.wraps(loss_fn)
        def function(params: Tree, state: Any, *args: Any, **kwargs: Any) -> Any:
            gradient = gradient_of(loss_fn, [(self, state, params)], has_aux=has_aux, strict=strict)
            return gradient(params, *args, **kwargs)

        return function

    def lookup(
        self, params: Tree, state: ExactRowsState, table: str, indices: chex.Array
    ) -> chex.Array:
        """Rows of a table, up to date, and nothing else: for evaluation.

        Args:
          table: the table's path, or a pattern that finds it alone.
          indices: integers of any dtype and shape. One outside the table reads zeros.

        Returns:
          The rows, of shape `indices.shape + trailing` and the table's dtype.
        """
        tables, state, params = self._expected(state, params)
        found = self._named(tables, table)
        ids = checked_ids("exact_rows.lookup", indices, found.num_rows)
        rows = self._looked_up(tables, state, params, found, ids.reshape(-1))
        return rows.reshape(*ids.shape, *rows.shape[1:])

    def _looked_up(
        self,
        tables: list[_Table],
        state: ExactRowsState,
        params: Tree,
        table: _Table,
        indices: chex.Array | None,
    ) -> chex.Array:
        """Rows of a table, up to date; `None` for all."""
        batch = self._alone(tables, table)
        columns = self._columns(table, state, params)
        past = self._past(batch.family, state, params)
        rows = self._ready(batch, past, [columns], [indices]).now
        return rows if indices is None else _or_zeros(rows, indices, table)

    def _alone(self, tables: list[_Table], table: _Table) -> _Batch:
        family = next(f for f in self._families(tables) if table in f.tables)
        return _Batch(family, [table])

    def without_tables(self, params: Tree) -> Tree:
        """The parameters with each table replaced by a `StaleTable`, which refuses to be read.

        A placeholder holds no array: gradients by such a tree have placeholders as well.
        """
        leaves, treedef = flatten(params)
        for t in self._tables(params):
            leaves[t.leaf] = StaleTable(t.path)
        return treedef.unflatten(leaves)

    # --- a step

    def update(
        self,
        updates: Tree,
        state: Any,
        params: Tree = None,
        *,
        ticket: Ticket | None = None,
        **extra_args: Any,
    ) -> Step:
        params = needed("exact_rows", params)
        if ticket is not None and not isinstance(ticket, Ticket):
            raise TypeError(
                f"exact_rows: ticket is {described(ticket)}, expected a Ticket, which prepare "
                "returns beside the rows and value_and_grad beside the gradients of the same step, "
                "or None"
            )
        tables, state, params = self._expected(state, params)
        leaves = [
            check_sound("exact_rows", g) if isinstance(g, RowGradient) else g
            for g in matched("exact_rows", "grads", as_arrays(updates), params, "params")
        ]
        for t in tables:
            self._expect_gradient(t, leaves[t.leaf])
        treedef = flatten(params)[1]
        tx = settled(self._inner, params)
        # What is in front of the rules, and all other leaves.
        moves, inner = _with_stops(tx, tuple(t.leaf for t in tables)).update(
            treedef.unflatten(leaves), state.inner, params, **extra_args
        )
        moved = flatten(moves)[0]
        grads = {t.leaf: moved[t.leaf].gradient for t in tables}
        for leaf, g in grads.items():
            if isinstance(g, RowGradient):
                # The very indices that came, by which a ticket is known.
                grads[leaf] = g.replace(indices=leaves[leaf].indices)

        clock, rings = state.clock + 1, dict(state.rings)
        seen = dict.fromkeys(rings, jnp.array(False))
        new: dict[int, _Columns] = {}
        sizes = {leaf: g.indices.size for leaf, g in grads.items() if isinstance(g, RowGradient)}
        batches = self._batches(tables, params, sizes)
        batches += [self._alone(tables, t) for t in tables if t.leaf not in sizes]
        for batch in batches:
            stepped = self._stepped(batch, tx, grads, state, params, ticket, extra_args)
            for t, columns in zip(batch.tables, stepped.columns, strict=True):
                new[t.leaf], moved[t.leaf] = columns, columns.weights
            seen[batch.family.name] |= stepped.seen
        for family in self._families(tables):
            rings[family.name] = self._advanced(family, state, params, seen[family.name])
        history = {t.leaf: f.history for f in self._families(tables) for t in f.tables}
        known = {
            t.path: TableState(
                last=new[t.leaf].last,
                cursor=_next_cursor(t, state.tables[t.path].cursor, history[t.leaf]),
            )
            for t in tables
        }

        def put_back(name: str, tree: Tree) -> Tree:
            found, treedef = flatten(tree)
            for leaf, columns in new.items():
                if found[leaf] is not None:
                    found[leaf] = columns.slots[name]
            return treedef.unflatten(found)

        inner = over_slots(put_back, inner)
        return treedef.unflatten(moved), ExactRowsState(inner, clock, known, rings)

    def _expect_gradient(self, table: _Table, g: Any) -> None:
        if is_left_alone(g):
            raise ValueError(
                f"exact_rows: grads[{table.path!r}] is {described(g)}, but a table moves in every "
                "step: pass row_gradient with no indices"
            )
        if isinstance(g, RowGradient) and g.rest is not None:
            raise ValueError(
                f"exact_rows: grads[{table.path!r}] has gradients for all rows (`rest`): something "
                "in front touches rows without a gradient; put it into the chain or leave it out"
            )

    def _stepped(
        self,
        batch: _Batch,
        tx: Transform,
        grads: dict[int, Any],
        state: ExactRowsState,
        params: Tree,
        ticket: Ticket | None,
        extra_args: dict[str, Any],
    ) -> "_Stepped":
        """The tables of a batch after a step; as their weights, what these move by."""
        first, tables = batch.tables[0], batch.tables
        columns = [self._columns(t, state, params) for t in tables]
        past = self._past(batch.family, state, params)
        tail = self._tail(first, tx, state.inner, params, extra_args)
        clock = state.clock + 1

        def step(carry: Any, indices: list[Any], g: chex.Array, ready: Any = None) -> Any:
            """On some rows; a carry of the slots and `last` of each table, and what was seen."""
            held, seen = carry
            held = [_Columns(c.weights, *x) for c, x in zip(columns, held, strict=True)]
            if ready is None:
                ready = self._ready(batch, past, held, indices)
            u, slots = tail(g, ready.slots, ready.now)
            # What they lag behind and the step in one go: so the table is rounded once.
            way = (ready.moved + u.astype(first.real)).astype(g.dtype)
            # Never back; needed so that it is read before it is written, as with the ring.
            last = jnp.where(clock - ready.last > 0, clock, ready.last)
            held = _put(held, indices, slots, last)
            return ([(c.slots, c.last) for c in held], seen | ready.seen), way

        carry = [(c.slots, c.last) for c in columns], jnp.array(False)
        values = [grads[t.leaf] for t in tables]
        dtype = jnp.promote_types(jnp.result_type(*(g.dtype for g in values)), first.dtype)
        if not isinstance(values[0], RowGradient):
            (held, seen), way = step(carry, [None], values[0].astype(dtype))
            ways: list[Any] = [way]
        else:
            found = [g.indices for g in values]
            ready = None if ticket is None else ticket.rows_of(batch.path, (past, columns, found))
            parts: list[list[RowGradient]] = [[] for _ in tables]
            for number, indices in enumerate(self._parts(batch, state, found)):
                given = [g.values if number == 0 else g.values[:0] for g in values]
                sizes = [x.size for x in indices]
                g = _padded(given, sizes, dtype)
                if is_one_block(found[0].size):
                    carry, way = step(carry, indices, g, ready)
                else:
                    carry, way = in_blocks(
                        lambda carry, ids, g, _: step(carry, [ids], g),
                        carry,
                        indices[0],
                        first.num_rows,
                        g,
                    )
                moves = zip(tables, parts, indices, rows_of_each(way, sizes), strict=True)
                for t, own, ids, piece in moves:
                    own.append(RowGradient(ids, piece, num_rows=t.num_rows))
            (held, seen), ways = carry, [RowMoves(tuple(own)) for own in parts]
        after = [_Columns(way, *x) for way, x in zip(ways, held, strict=True)]
        return _Stepped(after, seen)

    def _tail(
        self, table: _Table, tx: Transform, inner: Any, params: Tree, extra_args: dict[str, Any]
    ) -> Callable[..., tuple[chex.Array, dict[str, chex.Array]]]:
        """A table's rule and all behind it: `(g, slots, weights) -> (u, slots)` of some rows."""
        behind, _ = self._found(table, inner, params, tx)
        leaves, treedef = flatten(params)

        def alone(x: Any) -> Tree:
            return treedef.unflatten([x if i == table.leaf else None for i in range(len(leaves))])

        def function(
            g: chex.Array, slots: dict[str, chex.Array], weights: chex.Array
        ) -> tuple[chex.Array, dict[str, chex.Array]]:
            new: dict[str, chex.Array] = {}

            def collect(name: str, tree: Tree) -> Tree:
                x = flatten(tree)[0][table.leaf]
                new.update({} if x is None else {name: x})
                return tree

            states = [over_slots(lambda name, _: alone(slots.get(name)), s.state) for s in behind]
            several = chain(*(station.tx for station in behind))
            u, after = several.update(alone(g), tuple(states), alone(weights), **extra_args)
            over_slots(collect, after)
            return flatten(u)[0][table.leaf], new

        return function

    def flush(
        self, params: Tree, state: ExactRowsState, *, axis: Any = None
    ) -> tuple[Any, ExactRowsState]:
        """Brings all rows up to date, block by block in place; nothing else changes.

        Args:
          params, state: as for `update`.
          axis: the mesh axis, or a tuple of axes, over which all tables are split by rows: each
            device then works on its own rows. Needed only inside `jit` on a mesh with automatic
            axes, which must be set (`jax.set_mesh`); else it is known. Without it the result is
            the same, but every device works on all rows, which the others send.

        Returns:
          `params` and the state. Go on with both, and with none that came: the state that is
          returned says that all rows are up to date, which they are in these params alone. Jit it,
          and donate both, to spare copies of the tables.
        """
        tables, state, params = self._expected(state, params)
        for t in tables:
            if t.num_rows == 0:
                continue
            batch = self._alone(tables, t)
            columns, past = self._columns(t, state, params), self._past(batch.family, state, params)
            done = over_rows("exact_rows.flush", self._flushed(batch), columns.weights, axis)
            weights, slots, last = done(columns, past)

            def put_back(name: str, tree: Tree, leaf: int = t.leaf, slots: Any = slots) -> Tree:
                return _replaced(tree, leaf, slots.get(name))

            params = _replaced(params, t.leaf, weights)
            known = {**state.tables, t.path: state.tables[t.path]._replace(last=last)}
            state = state._replace(inner=over_slots(put_back, state.inner), tables=known)
        return params, state

    def _flushed(self, batch: _Batch) -> Callable[[Any, Any], Any]:
        """A function that flushes what is as long as a table, or a part of it."""

        def function(columns: _Columns, past: _Past) -> _Columns:
            num_rows = columns.weights.shape[0]
            size = min(_BLOCK, num_rows)

            def block(i: chex.Array, columns: _Columns) -> _Columns:
                ids = jnp.minimum(i * size + jnp.arange(size, dtype=jnp.int32), num_rows)
                ready = self._ready(batch, past, [columns], [ids])
                clock = jnp.broadcast_to(past.clock, ids.shape)
                (moved,) = _put([columns], [ids], ready.slots, clock)
                return moved._replace(weights=put(columns.weights, ids, ready.now))

            return jax.lax.fori_loop(0, -(-num_rows // size), block, columns)

        return function


def gradient_of(
    loss_fn: Callable[..., Any],
    parts: Sequence[tuple[exact_rows, Any, Tree]],
    *,
    has_aux: bool = False,
    strict: bool = False,
) -> Callable[..., Any]:
    """`exact_rows.value_and_grad` where several of them, each with its own tables, are at work.

    Args:
      parts: each with its state, and the parameters it sees: like those of the loss, `None` for
        leaves that are not its own.

    Returns:
      A function `(params, *args, **kwargs) -> ((value, grads), ticket)`; the ticket is for all.
    """

    @functools.wraps(loss_fn)
    def function(params: Tree, *args: Any, **kwargs: Any) -> Any:
        owners: dict[int, tuple[exact_rows, _Table]] = {}
        states, seen = {}, {}
        for tx, state, own in parts:
            tables, state, own = tx._expected(state, own)
            for table in tables:
                owners[table.leaf] = tx, table
                states[table.leaf], seen[table.leaf] = state, own
        call = Call("exact_rows", loss_fn, (params, *args), kwargs, 0, has_aux)
        reads = Reads(call, sorted(owners), exact=True, strict=strict)
        given: dict[int, Any] = {}
        known: dict[int, Any] = {}
        ticket = Ticket({}, {})
        indices = reads.indices()
        for tx, state, own in parts:
            tables = [t for t in tx._tables(own) if t.leaf in indices]
            if tables:
                ids = [indices[t.leaf] for t in tables]
                state, own = states[tables[0].leaf], seen[tables[0].leaf]
                read, searched, one = tx._prepared(state, own, tables, ids)
                leaves = [t.leaf for t in tables]
                given |= dict(zip(leaves, read, strict=True))
                known |= dict(zip(leaves, searched, strict=True))
                ticket = ticket.with_rows_of(one)

        def look(held: Any, leaf: int, ids: Any) -> chex.Array:
            tx, table = owners[leaf]
            batch = tx._alone(tx._tables(seen[leaf]), table)
            columns, past = held[leaf]
            ids = None if ids is None else ids.reshape(-1)
            rows = tx._ready(batch, past, [columns], [ids]).now
            return rows if ids is None else _or_zeros(rows, ids, table)

        held = {}
        for leaf, (tx, table) in owners.items():
            family = tx._alone(tx._tables(seen[leaf]), table).family
            past = tx._past(family, states[leaf], seen[leaf])
            held[leaf] = tx._columns(table, states[leaf], seen[leaf]), past
        dense = {leaf: look(held, leaf, None) for leaf in reads.dense}
        return reads.value_and_grad(held, look, given, dense, known), ticket

    return function


# Rows that are flushed at a time.
_BLOCK = 8192
# The part of a table that each step refreshes, and the longest history, where none is given.
_REFRESHED = 64
_LONGEST = 65536
# The history where rows are brought up to date step by step. Then a step costs about as many row
# steps as the table has rows, however long the history, and those of the rows that are read.
_REPLAYED = 64


def _named(name: str, paths: list[str]) -> str:
    """The path of the table that a name means."""
    found = [p for p in paths if p == name] or [p for p in paths if re.search(name, p)]
    if len(found) != 1:
        raise ValueError(f"exact_rows: {name!r} names {len(found)} tables, expected one of {paths}")
    return found[0]


class _Stepped(NamedTuple):
    """Tables after a step, with what they move by as their weights; and what was seen."""

    columns: list[_Columns]
    seen: chex.Array


def _or_zeros(rows: chex.Array, indices: chex.Array, table: _Table) -> chex.Array:
    """Rows, and zeros where there is none."""
    is_row = indices < table.num_rows
    return jnp.where(is_row.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)


def _refreshed(table: _Table, history: int) -> int:
    """How many rows each step refreshes, so that none is older than the ring."""
    return -(-table.num_rows // max(history - 2, 1))


def _next_cursor(table: _Table, cursor: chex.Array, history: int) -> chex.Array:
    after = cursor + _refreshed(table, history)
    return jnp.where(after < table.num_rows, after, after - table.num_rows)


def _replaced(tree: Tree, leaf: int, x: Any) -> Tree:
    """The tree with another array in the place of a leaf, if that is there."""
    leaves, treedef = flatten(tree)
    leaves[leaf] = None if leaves[leaf] is None else x
    return treedef.unflatten(leaves)


def _beside(values: Any, counts: Sequence[int]) -> Any:
    """For each of several rows of each table what belongs to the table."""
    if len(counts) == 1:
        return values[0]
    values = values if isinstance(values, np.ndarray) else jnp.stack(values)
    return values[np.repeat(np.arange(len(counts)), counts)]


def _padded(values: Sequence[chex.Array], sizes: Sequence[int], dtype: Any) -> chex.Array:
    """The rows of several tables, filled up with zeros to these sizes."""
    pieces = []
    for x, size in zip(values, sizes, strict=True):
        pieces.append(x.astype(dtype))
        if size > len(x):
            pieces.append(jnp.zeros((size - len(x), *x.shape[1:]), dtype))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def _put(
    columns: list[_Columns], indices: list[Any], slots: dict[str, chex.Array], last: chex.Array
) -> list[_Columns]:
    """Tables with other slots and another `last` at some rows; `None` for all rows."""
    if indices[0] is None:
        (old,) = columns
        slots = {name: slots[name].astype(x.dtype) for name, x in old.slots.items()}
        return [old._replace(slots=slots, last=last)]
    sizes = [i.size for i in indices]
    pieces = {name: rows_of_each(x, sizes) for name, x in slots.items()}
    lasts = rows_of_each(last, sizes)

    def one(old: _Columns, i: chex.Array, n: int) -> _Columns:
        new = {name: put(x, i, pieces[name][n].astype(x.dtype)) for name, x in old.slots.items()}
        return old._replace(slots=new, last=put(old.last, i, lasts[n]))

    return [one(old, i, n) for n, (old, i) in enumerate(zip(columns, indices, strict=True))]
