"""Tables kept exact at the cost of the rows that are touched: the others catch up when read.

A row without a gradient moves on by its momentum, and by how much is known (`coasting`). So a
step leaves it where it stands and notes, once for all rows, what the step would have done to
it; the row is brought up to date when somebody reads it, and then takes its step with all that
is in the chain, as the dense row would. Nothing in a chain knows of this: it is given the rows
that are touched as if they were the whole table.
"""

import functools
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
from adamjax.mesh import at_each, over_rows, put, rows_alike, taken
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
from adamjax.rows import RowGradient, check_sound, checked_ids, distinct
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
      ring: what the last steps have done to a row that stands at each of them, under a name that
        says of which rule: `{"b1=0.9,shrink=0.9995,eps=1e-07": Ring(...)}`. With another rule the
        rows that lag behind would move otherwise, and a checkpoint has no other place for it.
    """

    last: chex.Array
    cursor: chex.Array
    ring: dict[str, Ring]


@exportable
class ExactRowsState(NamedTuple):
    """State of `exact_rows`.

    Attributes:
      inner: the state of the inner transform; the slots of a table lag behind as its rows do.
      clock: int32, the steps taken; unlike a count it wraps around.
      tables: by path, each table's `TableState`.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> tx.init({"table": jnp.zeros((3, 1))}).last
    {'table': Array([0, 0, 0], dtype=int32)}
    """

    inner: Any
    clock: chex.Array
    tables: dict[str, TableState]

    @property
    def last(self) -> dict[str, chex.Array]:
        """By path, the clock at which each row of a table stands: int32[num_rows]."""
        return {path: table.last for path, table in self.tables.items()}


class _Held(NamedTuple):
    """All that is known of a table; the first three are as long as it."""

    weights: chex.Array
    slots: dict[str, chex.Array]
    last: chex.Array
    ring: Ring
    clock: chex.Array
    count: chex.Array


@exportable
class _Rows(NamedTuple):
    """Rows of a table that have caught up."""

    indices: Any  # int32[n] with `num_rows` where there is none; None: all rows
    last: chex.Array
    moved: chex.Array  # by how much they lag behind in `params`, widened
    now: chex.Array
    slots: dict[str, chex.Array]
    spoilt: chex.Array  # bool scalar, whether there is NaN in what was read of the ring
    found: Any = None  # int32[k], in a ticket: the rows that were asked for, first among `indices`


class Ticket(Data):
    """What `prepare` found out, for the `update` of the same step.

    It counts for the very arrays of params and state that it was made of: `update` ignores it
    where one of them is another by now (after a `flush`, at a perturbed point), and where it went
    through a function that is jitted by itself. So it spares work in one jitted step, and does no
    harm anywhere.

    Attributes:
      rows: by path, what each table's rows are, up to date.

    >>> import adamjax, jax.numpy as jnp
    >>> params = {"table": jnp.zeros((9, 1))}
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> rows, ticket = tx.prepare(params, tx.init(params), {"table": jnp.array([4, 4])})
    >>> list(ticket.rows)
    ['table']
    """

    rows: dict[str, _Rows]

    @classmethod
    def of(cls, rows: dict[str, _Rows], origin: dict[str, "_Held"]) -> "Ticket":
        """A ticket that knows the arrays it was made of, which are no part of the pytree."""
        ticket = cls(rows)
        ticket._set(_origin=origin)
        return ticket

    def rows_of(self, path: str, held: "_Held") -> _Rows | None:
        """The rows of a table, if the ticket was made of these arrays."""
        origin = vars(self).get("_origin", {}).get(path)
        if origin is None or path not in self.rows:
            return None
        made_of, now = jax.tree.leaves(origin), jax.tree.leaves(held)
        same = len(made_of) == len(now) and all(map(operator.is_, made_of, now))
        return self.rows[path] if same else None


# As an argument or a result of what `jax.export` writes.
export.register_pytree_node_serialization(
    Ticket,
    serialized_name="adamjax.Ticket",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)


class _Table(NamedTuple):
    """A table: where it is, and what happens to its rows."""

    leaf: int
    path: str
    num_rows: int
    dtype: Any
    rule: Rule
    plan: Coasting
    has_front: bool  # whether anything is in front of the rule

    @property
    def real(self) -> Any:
        return accumulator(self.dtype)


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


def _route(tx: Transform, state: Any, leaf: int, params: Tree) -> Iterator[tuple[Transform, Any]]:
    """The elementary transforms that a leaf's gradient goes through, with their states.

    Without parameters, at construction, those that every leaf may go through.
    """
    if isinstance(tx, partition):
        if params is not None:
            found = first_match(tx.patterns, leaf_paths(params)[leaf])
            owner = len(tx.transforms) if found is None else found
            yield from _route(tx.parts[owner], _part_state(tx, state, owner), leaf, params)
    elif isinstance(tx, masked):
        if params is None or selected(tx.pattern, params)[leaf]:
            yield from _route(tx.tx, state, leaf, params)
    elif isinstance(tx, chain):
        for i, part in enumerate(tx.parts):
            yield from _route(part, _part_state(tx, state, i), leaf, params)
    else:
        yield tx, state


def _part_state(tx: Transform, state: Any, part: int) -> Any:
    return None if state is None else tx.part_states(state)[part]


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


class _zeroing(Rule):
    """A rule to which the rows behind the first few of some leaves have a gradient of zero.

    Rows that are refreshed have none. What is in front of the rule may have multiplied that by a
    factor that is not finite, as a clip does where the norm is not.
    """

    tx: Rule
    first: Any = static()  # pairs (leaf, number of rows whose gradients count)

    def step(self, grads: Tree, state: Any, factors: Any) -> Step:
        leaves, treedef = flatten(grads)
        for leaf, count in self.first:
            g = leaves[leaf]
            if g is not None:
                counts = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0) < count
                leaves[leaf] = jnp.where(counts, g, 0)
        return self.tx.step(treedef.unflatten(leaves), state, factors)


def _with_zeros(tx: Transform, tables: list[_Table], leaves: list[Any]) -> Transform:
    """The transform for the rows of a step, its rules `_zeroing` where something is in front."""
    first = tuple(
        (t.leaf, leaves[t.leaf].joined().indices.size)
        for t in tables
        if t.has_front and isinstance(leaves[t.leaf], RowGradient)
    )
    if not first:
        return tx

    def is_rule(x: Any) -> bool:
        return isinstance(x, Rule)

    return jax.tree.map(lambda x: _zeroing(x, first) if is_rule(x) else x, tx, is_leaf=is_rule)


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
        depends on the betas. Each step refreshes `num_rows / history` rows of each table.

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
    ...     grads = {"table": adamjax.row_gradient(jnp.array(ids), rows["table"], 1000)}
    ...     updates, state = tx.update(grads, state, params, ticket=ticket)
    ...     params = adamjax.apply_updates(params, updates)
    >>> params["table"][3], tx.lookup(params, state, "table", 3)
    (Array([0.9, 0.9], dtype=float32), Array([0.781, 0.781], dtype=float32))
    """

    tx: Transform
    tables: Any = static()
    history: int = static(default=65536, kw_only=True)
    fixed: Any = static(default=(), kw_only=True)

    def __post_init__(self) -> None:
        tables = checked_patterns("exact_rows", self.tables)
        try:
            history = operator.index(self.history)
        except TypeError:
            raise TypeError(f"exact_rows: history must be an int, got {self.history!r}") from None
        tx = as_transform(self.tx)
        kept = []
        for part in filter(_is_fixed, jax.tree.leaves(tx, is_leaf=_is_fixed)):
            numbers = {k: v for k, v in vars(part).items() if v is not None}
            for name, value in numbers.items():
                if is_array(value):
                    raise _refused(part, f"{name} must be a Python float here, got {value!r}")
            kept.append(tuple(numbers.items()))
        history = 1 << max(history - 1, 0).bit_length()
        self._set(tx=tx, tables=tables, history=history, fixed=tuple(kept))
        if not any(isinstance(part, partition) for part in all_parts(tx)):
            route = [part for part, _ in _route(tx, None, 0, None)]
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
        return f"exact_rows({self.tx!r}, {tables!r}, history={self.history})"

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
        if self.history < plan.least_history:
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
            route = [part for part, _ in _route(tx, None, leaf, params)]
            _checked(route)
            rule, plan = self._plan(route, accumulator(dtype))
            found.append(_Table(leaf, path, shape[0], dtype, rule, plan, route[0] is not rule))
        if not found and not all(isinstance(pattern, optional) for pattern in self.tables):
            raise ValueError(
                f"exact_rows: no leaf's path matches any of {list(self.tables)}; the paths are "
                f"{leaf_paths(params)}"
            )
        expect_matches("exact_rows", self.tables, params)
        return found

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
            for tx, own in _route(self._inner, state.inner, table.leaf, params):
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
        mend = (
            "rows that lag behind must go on as they began. Build it as it was; or flush with the "
            "old one and start from its dense state: params, state = old.flush(params, state), "
            "then state = new.from_dense(state.inner, params)"
        )
        if not isinstance(known.ring, Mapping) or list(known.ring) != [table.plan.name]:
            came = (
                list(known.ring) if isinstance(known.ring, Mapping) else type(known.ring).__name__
            )
            raise ValueError(
                f"exact_rows: the state of {table.path!r} is of another transform: {came}, "
                f"expected {[table.plan.name]}: {mend}"
            )
        ring = known.ring[table.plan.name]
        expected = _ring_like(table.plan, self.history, table.real)
        for name, x, like in zip(Ring._fields, ring, expected, strict=True):
            if (x is None) != (like is None):
                has = "has no" if x is None else "has"
                raise ValueError(f"exact_rows: the ring of {table.path!r} {has} {name}: {mend}")
            if like is not None:
                where = f"exact_rows: tables[{table.path!r}].ring.{name} (history={self.history})"
                expect_array(where, x, like.shape, mend, like.dtype.name)

    def _named(self, tables: list[_Table], name: str) -> _Table:
        exact = [t for t in tables if t.path == name]
        found = exact or [t for t in tables if re.search(name, t.path)]
        if len(found) != 1:
            raise ValueError(
                f"exact_rows: {name!r} names {len(found)} tables, expected one of "
                f"{[t.path for t in tables]}"
            )
        return found[0]

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
                ring={t.plan.name: t.plan.init(self.history, t.real)},
            )
        clock = 0 if clock is None else clock
        return ExactRowsState(inner, jnp.array(clock, jnp.int32, copy=True), states)

    def _found(self, table: _Table, inner: Any, params: Tree) -> tuple[list[Any], chex.Array]:
        """The transforms and states behind a table's rule, with it, and its count of steps."""
        route = list(_route(self._inner, inner, table.leaf, params))
        start = next(i for i, (tx, _) in enumerate(route) if isinstance(tx, Rule))
        return route[start:], route[start][1].count

    def _scalars(self, table: _Table, inner: Any, params: Tree) -> tuple[Any, Any]:
        """The step from a state, p += a * m / (x + e) + b * p: its scalars a and b."""
        (rule, *behind), _ = self._found(table, inner, params)
        a, b = rule[0].pace(rule[1], table.real), 0.0
        for tx, state in behind:
            if not isinstance(tx, weight_ema):
                s, w = tx.affine(state, params, table.leaf, table.real)
                a, b = s * a, s * b + w
        return a, b

    def _advanced(
        self, table: _Table, state: ExactRowsState, params: Tree, spoilt: chex.Array
    ) -> dict[str, Ring]:
        """A table's ring after the step that is taken from a state."""
        a, b = self._scalars(table, state.inner, params)
        _, count = self._found(table, state.inner, params)
        # NaN stays, but it is written here so that what is read of the ring is needed before the
        # ring is written: XLA, which would not know which comes first, would copy it.
        a = jnp.where(spoilt, jnp.nan, a)
        name = table.plan.name
        ring = state.tables[table.path].ring[name]
        return {name: table.plan.advance(ring, state.clock + 1, next_count(count), a, b)}

    # --- rows

    def _held(self, table: _Table, state: ExactRowsState, params: Tree) -> _Held:
        """All that is known of a table."""
        slots: dict[str, chex.Array] = {}

        def collect(name: str, tree: Tree) -> Tree:
            leaf = flatten(tree)[0][table.leaf]
            if leaf is not None:
                slots[name] = leaf
            return tree

        over_slots(collect, state.inner)
        known, weights = state.tables[table.path], flatten(params)[0][table.leaf]
        _, count = self._found(table, state.inner, params)
        ring = known.ring[table.plan.name]
        return _Held(weights, slots, known.last, ring, state.clock, count)

    def _caught_up(
        self, table: _Table, state: ExactRowsState, params: Tree, indices: chex.Array | None
    ) -> _Rows:
        """Rows of a table brought up to date, zeros where an index is `num_rows`."""
        return self._rows(table, self._held(table, state, params), indices)

    def _rows(self, table: _Table, held: _Held, indices: chex.Array | None) -> _Rows:
        def rows(x: chex.Array) -> chex.Array:
            return x if indices is None else taken(x, indices, mode="fill", fill_value=0)

        here, real = {name: rows(x) for name, x in held.slots.items()}, table.real
        last = rows(held.last)
        if indices is not None:
            last = jnp.where(indices < len(held.last), last, held.clock)
        wide = {name: x.astype(real) for name, x in here.items()}
        measure = wide["u"] if "u" in wide else root(wide.get("v_max", wide.get("v")))
        # A gather that is fused into the arithmetic keeps it from being vectorised.
        before = apart(rows(held.weights)).astype(real)
        moved, average = table.plan.catch_up(
            held.ring, held.clock, held.count, last, before, wide["m"], measure, wide.get("average")
        )
        for name, b in table.rule.decays.items():
            wide[name] = decayed(wide[name], b, held.clock - last, self.history)
        if average is not None:
            wide["average"] = average
        now = (before + moved).astype(table.dtype)
        slots = {name: x.astype(here[name].dtype) for name, x in wide.items()}
        ring = [at_each(x, last & (len(x) - 1)) for x in held.ring if x is not None]
        spoilt = functools.reduce(
            operator.or_, (jnp.any(jnp.isnan(x)) for x in ring), jnp.array(False)
        )
        return _Rows(indices, last, moved, now, slots, spoilt)

    def _with_refreshed(
        self, table: _Table, state: ExactRowsState, indices: chex.Array
    ) -> chex.Array:
        """Distinct indices and those of the rows whose turn it is, as far as they are others."""
        size, cursor = self._refreshed(table), state.tables[table.path].cursor
        if size == 0:
            return indices
        behind = (indices - cursor) % table.num_rows
        is_row = (indices < table.num_rows) & (behind < size)
        there = jnp.zeros(size, bool).at[jnp.where(is_row, behind, size)].set(True, mode="drop")
        due = (cursor + jnp.arange(size, dtype=jnp.int32)) % table.num_rows
        return jnp.concatenate([indices, jnp.where(there, table.num_rows, due)])

    def _refreshed(self, table: _Table) -> int:
        """How many rows each step refreshes, so that none is older than the ring."""
        return -(-table.num_rows // max(self.history - 2, 1))

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
          and a ticket which spares `update` doing the same again. The gradient must then be
          `row_gradient` of these indices; for others the ticket is of no use, but does no harm.
        """
        (tables, state, params), read = self._expected(state, params), {}
        rows, origin = {}, {}
        for name, ids in indices.items():
            table = self._named(tables, name)
            ids = checked_ids("exact_rows.prepare", ids, table.num_rows)
            origin[table.path] = held = self._held(table, state, params)
            read[name], rows[table.path], _ = self._prepared(table, state, held, ids)
        return read, Ticket.of(rows, origin)

    def _prepared(
        self, table: _Table, state: ExactRowsState, held: _Held, ids: chex.Array
    ) -> tuple[chex.Array, _Rows, tuple[chex.Array, chex.Array]]:
        """The rows at indices, up to date; what a ticket says of them; which are distinct."""
        found, position = distinct(ids.reshape(-1), table.num_rows)
        ready = self._rows(table, held, self._with_refreshed(table, state, found))
        # An index outside the table has the place of no row.
        place = jnp.where(position < found.size, position, ready.now.shape[0])
        read = taken(ready.now, place, mode="fill", fill_value=0)
        read = read.reshape(*ids.shape, *read.shape[1:])
        return read, ready._replace(found=found), (found, position)

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
        rows = self._caught_up(found, state, params, ids.reshape(-1)).now
        return rows.reshape(*ids.shape, *rows.shape[1:])

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
        ready = {t.leaf: self._ready(t, state, params, leaves[t.leaf], ticket) for t in tables}

        def small(values: dict[int, Any], tree: Tree) -> Tree:
            """The tree with the tables' leaves replaced by those of their rows."""
            found, treedef = flatten(tree)
            return treedef.unflatten(
                [values.get(i, x) if x is not None else None for i, x in enumerate(found)]
            )

        def slots_of(name: str, tree: Tree) -> Tree:
            return small({i: r.slots.get(name) for i, r in ready.items()}, tree)

        treedef = flatten(params)[1]
        seen = treedef.unflatten(leaves)
        gradients = {i: _padded(leaves[i], rows) for i, rows in ready.items()}
        moves, inner = _with_zeros(settled(self._inner, params), tables, leaves).update(
            small(gradients, seen),
            over_slots(slots_of, state.inner),
            small({i: rows.now for i, rows in ready.items()}, params),
            **extra_args,
        )

        def put_back(name: str, new: Tree, old: Tree) -> Tree:
            found, tree = flatten(new)
            pairs = zip(found, flatten(old)[0], strict=True)
            return tree.unflatten(
                [
                    x if y is None or i not in ready else _put(y, ready[i].indices, x)
                    for i, (x, y) in enumerate(pairs)
                ]
            )

        clock, moved, states = state.clock + 1, flatten(moves)[0], {}
        for t in tables:
            rows, known = ready[t.leaf], state.tables[t.path]
            # What they lag behind and the step in one go: so the table is rounded once, and where
            # nothing in the chain reads the weights they need not be gathered.
            way = rows.moved + moved[t.leaf].astype(t.real)
            way = way.astype(jnp.promote_types(dtype_of(leaves[t.leaf]), t.dtype))
            if rows.indices is not None:
                way = RowGradient(rows.indices, way, num_rows=t.num_rows, lazy=True)
            moved[t.leaf] = way
            # Never back; needed so that it is read before it is written, as with the ring.
            last = jnp.where(clock - rows.last > 0, clock, rows.last)
            states[t.path] = TableState(
                last=_put(known.last, rows.indices, last),
                cursor=(known.cursor + self._refreshed(t)) % max(t.num_rows, 1),
                ring=self._advanced(t, state, params, rows.spoilt),
            )
        inner = over_slots(put_back, inner, state.inner)
        return treedef.unflatten(moved), ExactRowsState(inner, clock, states)

    def _ready(
        self, table: _Table, state: ExactRowsState, params: Tree, g: Any, ticket: Ticket | None
    ) -> _Rows:
        """The rows that a gradient touches and those to be refreshed, brought up to date."""
        if is_left_alone(g):
            raise ValueError(
                f"exact_rows: grads[{table.path!r}] is {described(g)}, but a table moves in every "
                "step: pass row_gradient with no indices"
            )
        if not isinstance(g, RowGradient):
            return self._caught_up(table, state, params, None)
        if g.rest is not None:
            raise ValueError(
                f"exact_rows: grads[{table.path!r}] has gradients for all rows (`rest`): something "
                "in front touches rows without a gradient; put it into the chain or leave it out"
            )
        found, held = g.joined().indices, self._held(table, state, params)
        known = None if ticket is None else ticket.rows_of(table.path, held)
        if known is not None and known.found is found:
            return known

        def afresh() -> _Rows:
            return self._rows(table, held, self._with_refreshed(table, state, found))

        if known is None or known.found.shape != found.shape:
            return afresh()
        fits = jnp.all(known.found == found)
        known = known._replace(found=None)

        def looped(fits: chex.Array, known: _Rows) -> Any:
            start = (~fits, known)
            return jax.lax.while_loop(_wanted, lambda _: (jnp.zeros((), bool), afresh()), start)[1]

        def chosen(fits: chex.Array, known: _Rows) -> Any:
            return jax.lax.cond(fits, lambda: known, afresh)

        # What a `cond` passes on is kept twice, so this is a loop of no rounds or one; but a
        # TPU's compiler keeps what goes through a loop in the slow memory.
        return jax.lax.platform_dependent(fits, known, tpu=chosen, default=looped)

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
            held = self._held(t, state, params)
            done = over_rows("exact_rows.flush", self._flushed(t), held.weights, axis)
            long, short = (held.weights, held.slots, held.last), (held.ring, held.clock, held.count)
            weights, slots, last = done(long, short)

            def put_back(name: str, tree: Tree, leaf: int = t.leaf, slots: Any = slots) -> Tree:
                return _replaced(tree, leaf, slots.get(name))

            params = _replaced(params, t.leaf, weights)
            known = {**state.tables, t.path: state.tables[t.path]._replace(last=last)}
            state = state._replace(inner=over_slots(put_back, state.inner), tables=known)
        return params, state

    def _flushed(self, table: _Table) -> Callable[[Any, Any], Any]:
        """A function that flushes what is as long as a table, or a part of it."""

        def function(long: Any, short: Any) -> Any:
            num_rows = long[0].shape[0]
            size = min(_BLOCK, num_rows)

            def block(i: chex.Array, carry: Any) -> Any:
                weights, slots, last = carry
                ids = jnp.minimum(i * size + jnp.arange(size, dtype=jnp.int32), num_rows)
                held = _Held(weights, slots, last, *short)
                rows = self._rows(table, held, ids)
                return (
                    _put(weights, ids, rows.now),
                    {name: _put(x, ids, rows.slots[name]) for name, x in slots.items()},
                    _put(last, ids, jnp.broadcast_to(held.clock, ids.shape)),
                )

            return jax.lax.fori_loop(0, -(-num_rows // size), block, long)

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
        states, held = {}, {}
        for tx, state, seen in parts:
            tables, state, seen = tx._expected(state, seen)
            for table in tables:
                owners[table.leaf] = tx, table
                states[table.leaf], held[table.leaf] = state, tx._held(table, state, seen)
        call = Call("exact_rows", loss_fn, (params, *args), kwargs, 0, has_aux)
        reads = Reads(call, sorted(owners), exact=True, strict=strict)
        given, known, ready, origin = {}, {}, {}, {}
        for leaf, ids in reads.indices().items():
            tx, table = owners[leaf]
            given[leaf], ready[table.path], known[leaf] = tx._prepared(
                table, states[leaf], held[leaf], ids
            )
            origin[table.path] = held[leaf]

        def look(held: Any, leaf: int, ids: chex.Array) -> chex.Array:
            tx, table = owners[leaf]
            return tx._rows(table, held[leaf], ids.reshape(-1)).now

        dense = {
            leaf: owners[leaf][0]._rows(owners[leaf][1], held[leaf], None).now
            for leaf in reads.dense
        }
        found = reads.value_and_grad(held, look, given, dense, known)
        return found, Ticket.of(ready, origin)

    return function


def _wanted(carry: tuple[chex.Array, _Rows]) -> chex.Array:
    return carry[0]


# Rows that are flushed at a time.
_BLOCK = 8192


def _replaced(tree: Tree, leaf: int, x: Any) -> Tree:
    """The tree with another array in the place of a leaf, if that is there."""
    leaves, treedef = flatten(tree)
    leaves[leaf] = None if leaves[leaf] is None else x
    return treedef.unflatten(leaves)


def _put(x: chex.Array, indices: chex.Array | None, rows: chex.Array) -> chex.Array:
    if indices is None:
        return rows.astype(x.dtype)
    return put(x, indices, rows.astype(x.dtype))


def _padded(g: Any, rows: _Rows) -> Any:
    """A table's gradient as an array of the rows that are ready: zeros for those refreshed."""
    if rows.indices is None:
        return g
    values = g.joined().values
    empty = jnp.zeros((rows.indices.size - values.shape[0], *values.shape[1:]), values.dtype)
    return jnp.concatenate([values, empty])
