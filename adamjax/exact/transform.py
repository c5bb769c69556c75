"""Tables kept exact at the cost of the rows that are touched: the others catch up when read.

A row without a gradient moves on by its momentum, and by how much is known (`coasting`). So a
step leaves it where it stands and notes, once for all rows, what the step would have done to
it; the row is brought up to date when somebody reads it, and then takes its step with all that
is in the chain, as the dense row would. Nothing in a chain knows of this: it is given the rows
that are touched as if they were the whole table.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.autodiff import Call, Reads
from adamjax.average import weight_ema
from adamjax.blocks import in_blocks, is_one_block, rows_of_each
from adamjax.coasting import Coasting, Ring, coasting
from adamjax.data import Tree, is_array, static
from adamjax.exact.route import Station, checked, refused, stations, with_stops
from adamjax.exact.state import (
    Columns,
    ExactRowsState,
    Past,
    StaleTable,
    TableState,
    Ticket,
    named,
)
from adamjax.exact.tables import (
    Batch,
    Family,
    Table,
    batches_of,
    caught_up,
    due_rows,
    families_of,
    flushed,
    next_cursor,
    or_zeros,
    put_rows,
    read_in_blocks,
)
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
from adamjax.masking import partition, settled
from adamjax.mesh import over_rows, rows_alike, taken
from adamjax.moments import accumulator, next_count
from adamjax.paths import (
    checked_patterns,
    expect_matches,
    first_match,
    flatten,
    leaf_paths,
    optional,
    unique_paths,
)
from adamjax.rows import RowGradient, RowMoves, check_sound, checked_ids, sealed
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

__all__ = ["exact_rows", "gradient_of"]


@functools.lru_cache
def ring_like(plan: Coasting, history: int, real: Any) -> Ring:
    """Shapes and dtypes of a ring."""
    return jax.eval_shape(lambda: plan.init(history, real))


def _is_fixed(x: Any) -> bool:
    return isinstance(x, Rule | weight_ema)


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
        that lies between the least and 65,536. Where b1 is not well below the decay of the
        gradients' size (Adam at (0.95, 0.9), with `eps=` at (0.99, 0.99), Adamax with b1 = b2) no
        closed form holds what a row moves by: it takes one step for each that it was left alone
        for. `None` is 64 then, and a step costs about as much as a dense one.

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
                    raise refused(part, f"{name} must be a Python float here, got {value!r}")
            kept.append(tuple(numbers.items()))
        self._set(tx=tx, tables=tables, history=history, fixed=tuple(kept))
        if not any(isinstance(part, partition) for part in all_parts(tx)):
            route = [station.tx for station in stations(tx, None, 0, None)]
            checked(route, (exact_rows,))
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

    def _tables(self, params: Tree) -> list[Table]:
        """The tables among the parameters."""
        tx, leaves, found = self._inner, flatten(params)[0], []
        kinds: dict[Any, list[Any]] = {}
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
            through = list(stations(tx, None, leaf, params))
            route = [station.tx for station in through]
            checked(route, (exact_rows,))
            rule, plan = self._plan(route, accumulator(dtype))
            behind = through[route.index(rule) :]
            for place, part, _ in behind:
                if place not in kinds:
                    kinds[place] = part.kinds(params)
            kind = tuple((place, kinds[place][leaf]) for place, *_ in behind), accumulator(dtype)
            found.append(Table(leaf, path, shape, dtype, plan, tuple(rule.decays.items()), kind))
        if not found and not all(isinstance(pattern, optional) for pattern in self.tables):
            raise ValueError(
                f"exact_rows: no leaf's path matches any of {list(self.tables)}; the paths are "
                f"{leaf_paths(params)}"
            )
        expect_matches("exact_rows", self.tables, params)
        return found

    def _expected(self, state: Any, params: Tree) -> tuple[list[Table], ExactRowsState, Tree]:
        """The tables; state and params as arrays of JAX, if they fit each other and this transform.

        All is checked by structures, shapes and dtypes, so a step takes no time for it.
        """
        expect_state(self, state, ExactRowsState)
        tables = self._tables(params)
        slots: list[Tree] = []

        def see(name: str, tree: Tree) -> Tree:
            slots.append(tree)
            return tree

        over_slots(see, state.inner)
        came = leaf_paths(params)
        wanted = leaf_paths(slots[0]) if slots else came
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
        mend = (
            "make a new state with init; or flush with the old sizes, resize the table in params "
            "and in state.inner, and go on with from_dense(state.inner, params)"
        )
        for table in tables:
            known, name = state.tables[table.path], f"exact_rows: tables[{table.path!r}]"
            expect_array(f"{name}.last", known.last, table.shape[:1], mend, "int32")
            expect_array(f"{name}.cursor", known.cursor, (), mend, "int32")
        self._expect_rings(families_of(tables, self.history), state.rings)
        for table in tables:
            for _, tx, own in stations(self._inner, state.inner, table.leaf, params):
                tx.check_state(own)
                for slot in getattr(own, "slots", ()):
                    x = flatten(getattr(own, slot))[0][table.leaf]
                    expect_array(f"exact_rows: {slot}[{table.path!r}]", x, table.shape, mend)
        return tables, as_arrays(state), as_arrays(params)

    def _expect_rings(self, families: list[Family], rings: Any) -> None:
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
            expected = ring_like(table.plan, family.history, table.real)
            for name, x, like in zip(Ring._fields, rings[family.name], expected, strict=True):
                if (x is None) != (like is None):
                    has = "has no" if x is None else "has"
                    raise ValueError(f"exact_rows: the ring of {table.path!r} {has} {name}: {mend}")
                if like is not None:
                    where = f"exact_rows: rings[{family.name!r}].{name}"
                    expect_array(where, x, like.shape, mend, like.dtype.name)

    def _table_named(self, tables: list[Table], name: str) -> Table:
        path = named(name, [t.path for t in tables])
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
            for family in families_of(tables, self.history)
        }
        return ExactRowsState(inner, clock, states, rings)

    def _found(
        self, table: Table, inner: Any, params: Tree, tx: Transform | None = None
    ) -> tuple[list[Station], chex.Array]:
        """A table's rule and what is behind it, and the rule's count of steps."""
        route = list(stations(self._inner if tx is None else tx, inner, table.leaf, params))
        start = next(i for i, station in enumerate(route) if isinstance(station.tx, Rule))
        return route[start:], route[start].state.count

    def _scalars(self, table: Table, inner: Any, params: Tree) -> tuple[Any, Any]:
        """The step from a state, p += a * m / (x + e) + b * p: its scalars a and b."""
        (rule, *behind), _ = self._found(table, inner, params)
        a, b = rule.tx.pace(rule.state, table.real), 0.0  # type: ignore[attr-defined]
        for _, tx, state in behind:
            if not isinstance(tx, weight_ema):
                s, w = tx.affine(state, params, table.leaf, table.real) or (1, 0)
                a, b = s * a, s * b + w
        return a, b

    def _advanced(
        self, family: Family, state: ExactRowsState, params: Tree, seen: chex.Array
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

    def _columns(self, table: Table, state: ExactRowsState, params: Tree) -> Columns:
        slots: dict[str, chex.Array] = {}

        def collect(name: str, tree: Tree) -> Tree:
            leaf = flatten(tree)[0][table.leaf]
            if leaf is not None:
                slots[name] = leaf
            return tree

        over_slots(collect, state.inner)
        return Columns(flatten(params)[0][table.leaf], slots, state.tables[table.path].last)

    def _past(self, family: Family, state: ExactRowsState, params: Tree) -> Past:
        _, count = self._found(family.tables[0], state.inner, params)
        return Past(state.rings[family.name], state.clock, count)

    def _parts(
        self, batch: Batch, state: ExactRowsState, found: list[chex.Array]
    ) -> list[list[chex.Array]]:
        """The rows that a step works on, of each table of a batch: those found, and those due.

        In one part; where there are so many that blocks of them take turns, in two: so their
        gradients need not be copied to make room.
        """
        due = due_rows(batch, state, found)
        if is_one_block(found[0].size):
            return [[jnp.concatenate(both) for both in zip(found, due, strict=True)]]
        return [found, due]

    def _prepared(
        self,
        state: ExactRowsState,
        params: Tree,
        tables: list[Table],
        ids: list[chex.Array],
    ) -> tuple[list[chex.Array], list[tuple[chex.Array, chex.Array]], Ticket]:
        """Rows of tables at indices, up to date; which of them are distinct; and a ticket."""
        searched = distinct_of_each([x.reshape(-1) for x in ids], [t.num_rows for t in tables])
        places = {t.leaf: i for i, t in enumerate(tables)}
        sizes = {t.leaf: found.size for t, (found, _) in zip(tables, searched, strict=True)}
        read: list[Any] = [None] * len(tables)
        rows: dict[str, Any] = {}
        origins: dict[str, Any] = {}
        for batch in batches_of(families_of(self._tables(params), self.history), params, sizes):
            own = [places[t.leaf] for t in batch.tables]
            found = [searched[i][0] for i in own]
            columns = [self._columns(t, state, params) for t in batch.tables]
            past = self._past(batch.family, state, params)
            indices = self._parts(batch, state, found)[0]
            if is_one_block(found[0].size):
                ready = caught_up(batch, past, columns, indices)
                now, rows[batch.path] = ready.now, ready
                origins[batch.path] = past, columns, found
            else:
                now = read_in_blocks(batch, past, columns[0], indices[0])
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
        named = [self._table_named(tables, name) for name in indices]
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
        self,
        params: Tree,
        state: ExactRowsState,
        table: str,
        indices: chex.Array,
        *,
        slot: str | None = None,
    ) -> chex.Array:
        """Rows of a table, up to date, and nothing else: for evaluation.

        Args:
          table: the table's path, or a pattern that finds it alone.
          indices: integers of any dtype and shape. One outside the table reads zeros.
          slot: a slot to read in place of the weights: `"average"`, that of `weight_ema`, or one
            of the rule, such as `"m"`.

        Returns:
          The rows, of shape `indices.shape + trailing` and the table's or the slot's dtype.

        Raises:
          KeyError: there is no such slot.

        >>> import adamjax, jax.numpy as jnp
        >>> params = {"table": jnp.ones((9, 1))}
        >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
        >>> tx.lookup(params, tx.init(params), "table", jnp.array([4, 9]), slot="m")
        Array([[0.],
               [0.]], dtype=float32)
        """
        tables, state, params = self._expected(state, params)
        found = self._table_named(tables, table)
        ids = checked_ids("exact_rows.lookup", indices, found.num_rows)
        columns = self._columns(found, state, params)
        if slot is not None and slot not in columns.slots:
            raise KeyError(
                f"exact_rows.lookup: {found.path!r} has no slot {slot!r}; it has "
                f"{sorted(columns.slots)}"
            )
        batch, flat = self._alone(tables, found), ids.reshape(-1)
        ready = caught_up(batch, self._past(batch.family, state, params), [columns], [flat])
        rows = or_zeros(ready.now if slot is None else ready.slots[slot], flat, found)
        return rows.reshape(*ids.shape, *rows.shape[1:])

    def _alone(self, tables: list[Table], table: Table) -> Batch:
        family = next(f for f in families_of(tables, self.history) if table in f.tables)
        return Batch(family, (table,))

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
        if _would_loop(leaves) and not _is_traced((leaves, state, params, extra_args)):
            given = treedef.unflatten(leaves), state, params, extra_args
            updates, state = _compiled(self, *given)
            return treedef.unflatten(map(sealed, flatten(updates)[0])), state
        tx = settled(self._inner, params)
        # What is in front of the rules, and all other leaves.
        moves, inner = with_stops(tx, tuple(t.leaf for t in tables)).update(
            treedef.unflatten(leaves), state.inner, params, **extra_args
        )
        moved = flatten(moves)[0]
        grads = {t.leaf: moved[t.leaf].gradient for t in tables}
        # A chain widens narrow gradients; updates are as wide as what came, and as the table.
        dtypes = {t.leaf: jnp.promote_types(dtype_of(leaves[t.leaf]), t.dtype) for t in tables}
        for leaf, g in grads.items():
            if isinstance(g, RowGradient):
                # The very indices that came, by which a ticket is known.
                grads[leaf] = g.replace(indices=leaves[leaf].indices)

        clock, rings = state.clock + 1, dict(state.rings)
        seen = dict.fromkeys(rings, jnp.array(False))
        new: dict[int, Columns] = {}
        sizes = {leaf: g.indices.size for leaf, g in grads.items() if isinstance(g, RowGradient)}
        families = families_of(tables, self.history)
        batches = batches_of(families, params, sizes)
        batches += [self._alone(tables, t) for t in tables if t.leaf not in sizes]
        for batch in batches:
            stepped = self._stepped(batch, tx, grads, state, params, ticket, extra_args)
            for t, columns in zip(batch.tables, stepped.columns, strict=True):
                new[t.leaf], moved[t.leaf] = columns, columns.weights.astype(dtypes[t.leaf])
            seen[batch.family.name] |= stepped.seen
        known = {}
        for family in families:
            rings[family.name] = self._advanced(family, state, params, seen[family.name])
            for t in family.tables:
                cursor = next_cursor(t, state.tables[t.path].cursor, family.history)
                known[t.path] = TableState(new[t.leaf].last, cursor)

        def put_back(name: str, tree: Tree) -> Tree:
            found, treedef = flatten(tree)
            for leaf, columns in new.items():
                if found[leaf] is not None:
                    found[leaf] = columns.slots[name]
            return treedef.unflatten(found)

        inner = over_slots(put_back, inner)
        return treedef.unflatten(moved), ExactRowsState(inner, clock, known, rings)

    def _expect_gradient(self, table: Table, g: Any) -> None:
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
        batch: Batch,
        tx: Transform,
        grads: dict[int, Any],
        state: ExactRowsState,
        params: Tree,
        ticket: Ticket | None,
        extra_args: dict[str, Any],
    ) -> "Stepped":
        """The tables of a batch after a step; as their weights, what these move by."""
        first, tables = batch.tables[0], batch.tables
        columns = [self._columns(t, state, params) for t in tables]
        past = self._past(batch.family, state, params)
        tail = self._tail(first, tx, state.inner, params, extra_args)
        clock = state.clock + 1

        def step(carry: Any, indices: list[Any], g: chex.Array, ready: Any = None) -> Any:
            """On some rows; a carry of the slots and `last` of each table, and what was seen."""
            held, seen = carry
            held = [Columns(c.weights, *x) for c, x in zip(columns, held, strict=True)]
            if ready is None:
                ready = caught_up(batch, past, held, indices)
            u, slots = tail(g, ready.slots, ready.now)
            # What they lag behind and the step in one go: so the table is rounded once.
            way = (ready.moved + u.astype(first.real)).astype(g.dtype)
            # Never back; needed so that it is read before it is written, as with the ring.
            last = jnp.where(clock - ready.last > 0, clock, ready.last)
            held = put_rows(held, indices, slots, last)
            return ([(c.slots, c.last) for c in held], seen | ready.seen), way

        carry = [(c.slots, c.last) for c in columns], jnp.array(False)
        values = [grads[t.leaf] for t in tables]
        same = all(g.dtype == first.dtype for g in values)
        dtype = first.dtype if same else first.real
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
                g = padded(given, sizes, dtype)
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
        after = [Columns(way, *x) for way, x in zip(ways, held, strict=True)]
        return Stepped(after, seen)

    def _tail(
        self, table: Table, tx: Transform, inner: Any, params: Tree, extra_args: dict[str, Any]
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
            done = over_rows(
                "exact_rows.flush", functools.partial(flushed, batch), columns.weights, axis
            )
            weights, slots, last = done(columns, past)

            def put_back(name: str, tree: Tree, leaf: int = t.leaf, slots: Any = slots) -> Tree:
                return replaced(tree, leaf, slots.get(name))

            params = replaced(params, t.leaf, weights)
            known = {**state.tables, t.path: state.tables[t.path]._replace(last=last)}
            state = state._replace(inner=over_slots(put_back, state.inner), tables=known)
        return params, state


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
        batches: dict[int, Batch] = {}
        held: dict[int, tuple[Columns, Past]] = {}
        ours = []
        for tx, state, own in parts:
            tables, state, own = tx._expected(state, own)
            ours.append((tx, state, own, tables))
            for table in tables:
                batches[table.leaf] = batch = tx._alone(tables, table)
                past = tx._past(batch.family, state, own)
                held[table.leaf] = tx._columns(table, state, own), past
        call = Call("exact_rows", loss_fn, (params, *args), kwargs, 0, has_aux)
        reads = Reads(call, sorted(batches), exact=True, strict=strict)
        given: dict[int, Any] = {}
        known: dict[int, Any] = {}
        ticket = Ticket({}, {})
        indices = reads.indices()
        for tx, state, own, tables in ours:
            tables = [t for t in tables if t.leaf in indices]
            if tables:
                ids = [indices[t.leaf] for t in tables]
                read, searched, one = tx._prepared(state, own, tables, ids)
                leaves = [t.leaf for t in tables]
                given |= dict(zip(leaves, read, strict=True))
                known |= dict(zip(leaves, searched, strict=True))
                ticket = ticket.with_rows_of(one)

        def look(held: Any, leaf: int, ids: Any) -> chex.Array:
            batch, (columns, past) = batches[leaf], held[leaf]
            ids = None if ids is None else ids.reshape(-1)
            rows = caught_up(batch, past, [columns], [ids]).now
            return rows if ids is None else or_zeros(rows, ids, batch.tables[0])

        dense = {leaf: look(held, leaf, None) for leaf in reads.dense}
        return reads.value_and_grad(held, look, given, dense, known), ticket

    return function


def _would_loop(leaves: Sequence[Any]) -> bool:
    """Whether there are so many rows that blocks of them take turns."""
    return any(isinstance(g, RowGradient) and not is_one_block(g.indices.size) for g in leaves)


def _is_traced(tree: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


# For those who call outside of jit: a loop would be compiled anew at each call.
@jax.jit
def _compiled(
    tx: exact_rows, updates: Tree, state: Any, params: Tree, extra_args: dict[str, Any]
) -> Step:
    return tx.update(updates, state, params, **extra_args)


class Stepped(NamedTuple):
    """Tables after a step, with what they move by as their weights; and what was seen."""

    columns: list[Columns]
    seen: chex.Array


def replaced(tree: Tree, leaf: int, x: Any) -> Tree:
    """The tree with another array in the place of a leaf, if that is there."""
    leaves, treedef = flatten(tree)
    leaves[leaf] = None if leaves[leaf] is None else x
    return treedef.unflatten(leaves)


def padded(values: Sequence[chex.Array], sizes: Sequence[int], dtype: Any) -> chex.Array:
    """The rows of several tables, filled up with zeros to these sizes."""
    pieces = []
    for x, size in zip(values, sizes, strict=True):
        pieces.append(x.astype(dtype))
        if size > len(x):
            pieces.append(jnp.zeros((size - len(x), *x.shape[1:]), dtype))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
