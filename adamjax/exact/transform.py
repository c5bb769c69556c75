"""The transform `exact_rows`: its state, its steps, and its reads of up-to-date rows.

A row without a gradient moves on by its momentum, by an amount that `coasting` can compute later.
So a step leaves such rows as they are, and records once what it would have done to all of them. A
row catches up when it is read or refreshed. If it has a gradient, it then takes its step through
the whole chain, as in a dense step.
The transforms in the chain see the rows that were read as if these were the whole table.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.autodiff import Args, P, Value, takes_state
from adamjax.average import weight_ema
from adamjax.blocks import needs_no_loop
from adamjax.coasting import Coast, Coasting, coasting_plan
from adamjax.data import Tree, is_array, static
from adamjax.exact.bound import Bound
from adamjax.exact.catch_up import catch_up_rows, flush_rows, zeros_outside_table
from adamjax.exact.fit import (
    edited_numbers,
    expect_fit,
    expect_no_other_slots,
    expect_slot_names,
    expect_slots,
)
from adamjax.exact.gradient import gradient_of
from adamjax.exact.route import RoutePart, check_route, refusal, routes
from adamjax.exact.stale import StaleTable
from adamjax.exact.state import ExactRowsState
from adamjax.exact.step import read_rows, take_step
from adamjax.exact.tables import Table, families_of
from adamjax.exact.ticket import Ticket
from adamjax.leaves import (
    as_arrays,
    described,
    dtype_of,
    expect_dtypes,
    expect_like,
    is_left_alone,
    match_leaves,
    needed,
    rounds_stochastically,
)
from adamjax.masking import masked, partition
from adamjax.mesh import run_on_own_rows, split_like_rows
from adamjax.moments import compute_dtype
from adamjax.paths import (
    checked_patterns,
    expect_matches,
    first_match,
    flatten,
    leaf_paths,
    optional,
    unique_paths,
)
from adamjax.rows import (
    RowGradient,
    check_sound,
    checked_ids,
    expect_row_count,
    with_seal,
)
from adamjax.structure import find, map_slots, replace_parts
from adamjax.transform import Rule, Step, Transform, as_transform, expect_state

__all__ = ["exact_rows"]


# A `Coasting` is made from the numbers of these transforms, so they must be Python floats.
_WITH_PYTHON_FLOATS = (Rule, weight_ema)


# The clock is an int32 that wraps around, and rows lag behind by fewer steps than this.
_LONGEST_RING = 2**30


class exact_rows(Transform):
    """Gives tables the result of the dense optimizer, at the cost of the rows that a step reads.

    A table's `RowGradient` has the effect of the dense gradient: rows without a gradient decay and
    move on by their momentum too. But they do so late, when they are read: between steps rows of
    `params` **may lag behind.** `train_step` and `eval_step` bring the rows that they read up to
    date. In a step of your own, the method `tx.value_and_grad` or `tx.prepare` does so, and in an
    evaluation `forward` or `tx.lookup`. `without_tables(params)` has placeholders that refuse to be
    read.

    `flush` brings all rows up to date. Call it before something else reads the weights: an export,
    another library, a program without the state. Do not call it for a checkpoint to resume
    from: save `params` and the state as they are.

    **Also call `flush` before you write rows of a table yourself**, as in
    `params["table"].at[i].set(x)`, or change the table in any other way than by an update. The
    movement that a row has missed depends only on the state. It would be added to the value that
    you wrote.

    A table may have a dense gradient; the step then costs as much as a dense step. A gradient of
    `None` is refused for a table: pass a row gradient without rows. If a clip before
    the rule computes a norm that is not finite, the rows in the gradient become NaN, and no others.

    Apply the updates of a table unchanged, with `apply_updates` or `+`. These updates also bring
    rows up to date, so other transforms refuse them: in a chain, `exact_rows` must be last.

    A state fits only the tables, the history and the rule that it was made for. With other betas,
    epsilons or momenta the rows that lag behind would catch up wrongly, so that is refused. To
    change them, `flush` with the old transform and start with `from_dense` of the new one.

    Args:
      tx: an optimizer or chain: transforms that keep zero gradients zero, a rule (`rows=` has no
        effect on it here), scalings and decoupled weight decay, and last a `weight_ema`. If a mask
        hides the tables from a transform, that transform may be anything. Betas, epsilons and the
        average's momentum must be Python floats. Rates and decays may be arrays and change from
        step to step, as long as `learning_rate * weight_decay < 1`: after a step for which that is
        false, the rows become NaN. They also become NaN after a step whose rate is NaN or infinite,
        but without weight decay a row that was last up to date long before may stay finite. If an
        element of v overflows, the dense optimizer makes its weight NaN in the next step; here the
        weight may stay finite until its row has a gradient again.
      tables: which leaves are tables: a pattern for `re.search` in the path, or a list of them.
        Each must match a leaf, unless it is `optional`.
      history: how many steps a row may lag behind, rounded up to a power of two. The minimum
        depends on the betas. Each step refreshes `num_rows / history` rows of each table, and the
        state has `history` entries. `None`: 1/64 of the rows of a family's largest table, but at
        least that minimum and at most 65,536. (A family is the tables with the same rule, rates and
        masks.) If b1 is not well below the decay of the divisor, which is sqrt(b2) for Adam
        and b2 for Adamax, no closed form gives the movement of a row: it catches up step by step.
        (Examples: Adam with b1=0.95, b2=0.9; Adam with `eps=` and b1=b2=0.99; Adamax with b1=b2.)
        Then `None` means 64, and a step costs about as much as a dense one.

    The state is an `ExactRowsState`.

    Raises:
      ValueError: a transform in the chain does not allow exact rows (the message names it), or
        `history` is too small. If the chain has `masked` or `partition`, only `init` finds these
        faults. `init` also raises this error if `learning_rate * weight_decay` of the first step is
        not below 1. (In later steps that makes the rows NaN.)

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
    # The fields of the rules and averages in `tx`. If this `exact_rows` is an argument of `jit`,
    # `tx` has tracers in their place. Here they are still Python floats.
    static_numbers: Any = static(default=(), init=False)

    def __post_init__(self) -> None:
        tables = checked_patterns("exact_rows", self.tables)
        tx, history = as_transform(self.tx), self.history
        if history is not None:
            try:
                entries = operator.index(history)
            except TypeError:
                raise TypeError(f"exact_rows: history must be an int, got {history!r}") from None
            if not 1 <= entries <= _LONGEST_RING:
                raise ValueError(
                    f"exact_rows: history must be at least 1 and at most {_LONGEST_RING}, got "
                    f"{entries}"
                )
            history = 1 << (entries - 1).bit_length()
        numbers = []
        for part, *_ in find(_WITH_PYTHON_FLOATS, tx):
            fields = {name: value for name, value in vars(part).items() if value is not None}
            for name, value in fields.items():
                if is_array(value):
                    raise refusal(part, f"{name} must be a Python float here, got {value!r}")
            numbers.append(tuple(fields.items()))
        self.set_fields(tx=tx, tables=tables, history=history, static_numbers=tuple(numbers))
        # With `masked` or `partition`, the parts that a table goes through depend on its path, so
        # `init` makes this check.
        if not find((masked, partition), tx):
            (route,) = routes(tx, None, None)
            self._coast_and_plan([part.tx for part in route])

    groupable = False
    goes_around_exact_rows = True

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, ExactRowsState)
        return (state.inner,)

    @property
    def must_be_last(self) -> bool:
        return True

    @property
    def python_numbers(self) -> frozenset[str]:
        return frozenset(name for fields in self.static_numbers for name, _ in fields)

    def lazy_leaves(self, params: Tree) -> list[bool]:
        # Whatever `rows=` a rule has, the rows of tables move.
        return [
            is_lazy and first_match(self.tables, path) is None
            for is_lazy, path in zip(super().lazy_leaves(params), leaf_paths(params), strict=True)
        ]

    def __repr__(self) -> str:
        tables = self.tables[0] if len(self.tables) == 1 else list(self.tables)
        history = "" if self.history is None else f", history={self.history}"
        return f"exact_rows({self.tx!r}, {tables!r}{history})"

    # --- the transform with parameters and a state

    def _static_tx(self, params: Tree) -> tuple[Transform, chex.Array | None]:
        """The inner transform with its numbers as Python floats, and mask functions resolved.

        Refuses numbers that were edited in the pytree after this `exact_rows` was made.

        Returns:
          The transform; and `Bound.has_edited_numbers`. (Numbers are traced if this `exact_rows`
          is an argument of `jit`.)
        """
        numbers = iter(self.static_numbers)
        edited: list[chex.Array] = []

        def with_numbers(part: Transform) -> Transform:
            if not isinstance(part, _WITH_PYTHON_FLOATS):
                return part
            fields = dict(next(numbers))
            edited.extend(edited_numbers(part, fields))
            return part.replace(**fields)

        tx = replace_parts(self.tx, with_numbers).resolve_masks(params)
        return tx, functools.reduce(jnp.logical_or, edited) if edited else None

    def _coast_and_plan(
        self, route: list[Transform], real_dtype: Any = np.float32
    ) -> tuple[Coast, Coasting]:
        """The `Coast` of the rule on a table's route, and the plan by which rows catch up.

        Refuses a route that does not allow exact rows, and a history that is too short for it.
        """
        check_route(route)
        rule = next(tx for tx in route if isinstance(tx, Rule))
        momenta = [tx.momentum for tx in route if isinstance(tx, weight_ema)]
        later = route[route.index(rule) + 1 :]
        coast = rule.coast()
        assert coast is not None
        momentum = float(momenta[0]) if momenta else None
        plan = coasting_plan(coast, momentum, any(map(_may_decay, later)), real_dtype)
        if self.history is not None and self.history < plan.least_history:
            raise ValueError(
                f"exact_rows: history={self.history} (rounded up to a power of two) is too small, "
                f"expected at least {plan.least_history}: a gradient has an effect for that many "
                f"steps with {rule!r} in {np.dtype(real_dtype).name}"
                + (f" and an average of momentum {momenta[0]}" if momenta else "")
            )
        return coast, plan

    def _tables(self, tx: Transform, params: Tree) -> list[Table]:
        """The tables among the parameters."""
        leaves, leaf_routes = flatten(params)[0], routes(tx, None, params)
        tables: list[Table] = []
        # The results of `Transform.kinds` by the part's position: it is called once for each part.
        kinds_at: dict[Any, list[Any]] = {}
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
            expect_row_count(f"exact_rows: params[{path!r}]", shape[0])
            route, real_dtype = leaf_routes[leaf], compute_dtype(dtype)
            coast, plan = self._coast_and_plan([part.tx for part in route], real_dtype)
            parts = _from_rule(route)
            for position, part, _, part_params in parts:
                if position not in kinds_at:
                    kinds_at[position] = part.kinds(part_params)
            kind = tuple((position, kinds_at[position][leaf]) for position, *_ in parts), real_dtype
            tables.append(Table(leaf, path, shape, dtype, coast, plan, kind))
        if not tables and not all(isinstance(pattern, optional) for pattern in self.tables):
            raise ValueError(
                f"exact_rows: no leaf's path matches any of {list(self.tables)}; the paths are "
                f"{leaf_paths(params)}"
            )
        expect_matches("exact_rows", self.tables, params)
        return tables

    def _bound(
        self, params: Tree, *, inner: Any = None, state: ExactRowsState | None = None
    ) -> Bound:
        """Binds this transform to parameters and a state, which must fit.

        Args:
          inner: the inner transform's state, if there is no `state` yet.
        """
        tx, has_edited_numbers = self._static_tx(params)
        families = families_of(self._tables(tx, params), self.history)
        if state is not None:
            expect_dtypes("exact_rows", "state", state)
            expect_fit(families, state, params)
            state, params = as_arrays(state), as_arrays(params)
            inner = state.inner
        leaf_routes = routes(tx, inner, params)
        tables = [table for family in families for table in family.tables]
        parts = {table.leaf_index: _from_rule(leaf_routes[table.leaf_index]) for table in tables}
        if state is not None and not _is_abstract(params):
            for table in tables:
                expect_slots(table, parts[table.leaf_index])
            expect_no_other_slots(tables, parts, inner)
        return Bound(tx, families, parts, params, inner, state, has_edited_numbers)

    def bind(self, state: Any, params: Tree) -> Bound:
        """Binds this transform to a state and parameters; refuses those that do not fit.

        If the parameters are shapes (`jax.ShapeDtypeStruct`), the state may have shapes too.
        """
        if not _is_abstract(params):
            expect_state(self, state, ExactRowsState)
        return self._bound(params, state=state)

    # --- the state

    def init(self, params: Tree) -> ExactRowsState:
        return self._from_dense(self.tx.init(params), params)

    def from_dense(self, inner: Any, params: Tree) -> ExactRowsState:
        """The state that continues from a state of the inner transform, with all rows up to date.

        For the reverse, call `params, state = tx.flush(params, state)` and take `state.inner`.

        Args:
          inner: a state like `tx.init(params)`, where tx is the inner transform.
          params: the parameters that belong to this state.

        Raises:
          ValueError: `inner` is unlike that state, or `learning_rate * weight_decay` is not below
            1.

        >>> import adamjax, jax.numpy as jnp
        >>> params, dense = {"table": jnp.zeros((9, 1))}, adamjax.adam(0.1)
        >>> state = adamjax.exact_rows(dense, "table").from_dense(dense.init(params), params)
        """
        expected = jax.eval_shape(self.tx.init, params)
        advice = "pass a state of the inner transform for these parameters"
        expect_like("exact_rows.from_dense", "inner", inner, expected, advice)
        return self._from_dense(as_arrays(inner), params)

    def _from_dense(self, inner: Any, params: Tree) -> ExactRowsState:
        bound = self._bound(params, inner=inner)
        tables = bound.tables
        for table in tables:
            expect_slot_names(table, bound.parts[table.leaf_index], inner)
        # Only `clock - last` matters, so the clock may start anywhere. It starts at the count of
        # the first table's rule.
        clock = bound.count(tables[0]) if tables else 0
        leaves, last = flatten(params)[0], {}
        for table in tables:
            _, b = bound.step_coefficients(table)
            if not isinstance(b, jax.core.Tracer) and b <= -1:
                raise ValueError(
                    f"exact_rows: a step multiplies the weights of {table.path!r} by {1 + b:.3g}; "
                    "expected a factor above 0: learning_rate * weight_decay must be below 1"
                )
            up_to_date = jnp.full(table.num_rows, clock, jnp.int32)
            last[table.path] = split_like_rows(up_to_date, leaves[table.leaf_index])
        rings = {
            family.name: family.tables[0].coasting.init(family.history, family.tables[0].real_dtype)
            for family in bound.families
        }
        turns = {family.name: jnp.zeros((), jnp.int32) for family in bound.families}
        return ExactRowsState(inner, jnp.array(clock, jnp.int32, copy=True), last, turns, rings)

    # --- reading rows

    def prepare(
        self, params: Tree, state: ExactRowsState, indices: Mapping[str, chex.Array]
    ) -> tuple[dict[str, chex.Array], Ticket]:
        """Reads rows for a train step.

        Args:
          params, state: as for `update`.
          indices: the indices that the step reads of each table: integers of any dtype and shape.
            The key is the table's path, or a pattern that matches only this table. An index
            outside the table reads zeros.

        Returns:
          The rows by the same keys, of shape `indices.shape + trailing` and the table's dtype; and
          a ticket. With it, `update` need not bring the rows up to date again, if the gradient is
          from the ticket's `row_gradient`. For other gradients it has no effect.
        """
        bound = self.bind(state, params)
        tables = [bound.table(name) for name in indices]
        ids = [
            checked_ids("exact_rows.prepare", x, table.num_rows)
            for x, table in zip(indices.values(), tables, strict=True)
        ]
        if len({table.leaf_index for table in tables}) < len(tables):
            raise ValueError(
                f"exact_rows.prepare: two names of {list(indices)} match the same table: pass all "
                "of its indices at once"
            )
        read, _, ticket = read_rows(bound, tables, ids)
        return dict(zip(indices, read, strict=True)), ticket

    def value_and_grad(
        self,
        loss_fn: Callable[Concatenate[P, Args], Value],
        *,
        has_aux: bool = False,
        strict: bool = False,
    ) -> Callable[Concatenate[P, Any, Args], tuple[tuple[Value, P], Ticket]]:
        """Like `adamjax.value_and_grad` with respect to `params`; the loss reads up-to-date rows.

        Write the loss as for dense gradients. If the indices of a table do not depend on `params`,
        its rows are brought up to date once, before the loss reads them. Otherwise they are brought
        up to date where the loss reads them, and again in `update`. If the loss uses a table in
        another way, even only under `stop_gradient`, the whole table is brought up to date, and its
        gradient is dense. The result is right, but costs as much as a dense step.

        Args:
          loss_fn: `loss_fn(params, *args, **kwargs)`, as for `adamjax.value_and_grad`.
          has_aux, strict: as for `adamjax.value_and_grad`.

        Returns:
          A function `(params, state, /, *args, **kwargs) -> ((value, grads), ticket)`. With
          `has_aux`, value is `(loss, aux)`. The ticket is for the `update` of the same step.

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

        @takes_state(loss_fn)
        def function(params: P, state: Any, /, *args: Args.args, **kwargs: Args.kwargs) -> Any:
            gradient = gradient_of(
                loss_fn, lambda: [self.bind(state, params)], has_aux=has_aux, strict=strict
            )
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
        """Up-to-date rows of a table; `forward` calls a whole model with such rows.

        Args:
          table: the table's path, or a pattern that matches only this table.
          indices: integers of any dtype and shape. An index outside the table reads zeros.
          slot: a slot to read in place of the weights: `"average"` of `weight_ema`, or one of the
            rule, such as `"m"`.

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
        bound = self.bind(state, params)
        read_table = bound.table(table)
        ids = checked_ids("exact_rows.lookup", indices, read_table.num_rows)
        table_arrays = bound.arrays(read_table)
        if slot is not None and slot not in table_arrays.slots:
            raise KeyError(
                f"exact_rows.lookup: {read_table.path!r} has no slot {slot!r}; it has "
                f"{sorted(table_arrays.slots)}"
            )
        batch, flat_ids = bound.batch_of(read_table), ids.reshape(-1)
        ready = catch_up_rows(batch, bound.past(batch.family), [table_arrays], [flat_ids])
        rows = ready.weights
        if slot is not None:
            rows = ready.slots[slot].astype(table_arrays.slots[slot].dtype)
        rows = zeros_outside_table(rows, flat_ids, read_table)
        return rows.reshape(*ids.shape, *rows.shape[1:])

    def without_tables(self, params: Tree) -> Tree:
        """The parameters with each table replaced by a `StaleTable`, which refuses to be read.

        A placeholder has no array. A gradient with respect to such a tree has placeholders in the
        same places.
        """
        leaves, treedef = flatten(params)
        for table in self._tables(self._static_tx(params)[0], params):
            leaves[table.leaf_index] = StaleTable(table.path)
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
        bound = self.bind(state, params)
        expect_dtypes("exact_rows", "grads", updates)
        leaves = [
            check_sound("exact_rows", g) if isinstance(g, RowGradient) else g
            for g in match_leaves("exact_rows", "grads", as_arrays(updates), bound.params, "params")
        ]
        for table in bound.tables:
            _expect_gradient(table, leaves[table.leaf_index])
        # Outside of `jit`, JAX would compile the loop over blocks again in each call. The ticket is
        # not passed: it is valid only for the arrays that it was made from, and `_jitted_update`
        # would see tracers in their place.
        if _would_loop(leaves) and not _is_traced((leaves, bound.state, bound.params, extra_args)):
            treedef = flatten(params)[1]
            grads = treedef.unflatten(leaves)
            updates, state = _jitted_update(self, grads, bound.state, bound.params, extra_args)
            # A row gradient has a constant that shows tampering (`rows.SEAL`). A jitted function
            # returns it as an array, whose value every later step would have to check. So put the
            # constant back.
            return treedef.unflatten(map(with_seal, flatten(updates)[0])), state
        return take_step(bound, leaves, ticket, extra_args)

    def flush(
        self,
        params: Tree,
        state: ExactRowsState,
        *,
        axis: Any = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> tuple[Any, ExactRowsState]:
        """Brings all rows up to date, block by block; nothing else changes.

        Call it before an export or another library reads the weights, and before you write rows of
        a table yourself: a row that lags behind would add the movement that it has missed to the
        value that you wrote. Neither `eval_step` nor a checkpoint to resume from needs it.

        Args:
          params, state: as for `update`.
          axis: the mesh axis, or a tuple of axes, over which the rows of all tables are split. Then
            each device works on its own rows. Pass it only inside `jit` on a mesh with automatic
            axes; that mesh must be the current one (`jax.set_mesh`). If you leave `axis` out there,
            the result is the same, but every device gets all rows and works on all of them.
            Everywhere else `flush` finds the axis itself.
          rounding: how bfloat16 weights are rounded, as in `apply_updates`; pass what you pass for
            the steps. If you often flush and round to the nearest, weights lose every movement that
            is below their resolution.

        Returns:
          `params` and the state. Continue with both of them: the new state says that all rows are
          up to date, which is true only of the new params. To avoid copies of the tables, call it
          under `jit` and donate both.

        Raises:
          ValueError: `rounding` is neither "nearest" nor "stochastic", or a float16 table is to be
            rounded stochastically.
        """
        bound = self.bind(state, params)
        assert bound.state is not None
        state, params = bound.state, bound.params
        owner = "exact_rows.flush"
        stochastic = rounds_stochastically(owner, rounding, bound.params)
        for table in bound.tables:
            if table.num_rows == 0:
                continue
            batch, table_arrays = bound.batch_of(table), bound.arrays(table)
            flush_own_rows = run_on_own_rows(
                owner, functools.partial(flush_rows, batch, stochastic), table_arrays.weights, axis
            )
            weights, slots, last = flush_own_rows(table_arrays, bound.past(batch.family))
            params = _replaced(params, table.leaf_index, weights)
            inner = _with_slots(state.inner, table.leaf_index, slots)
            state = state._replace(inner=inner, last={**state.last, table.path: last})
        return params, state


def _may_decay(tx: Transform) -> bool:
    """Whether a transform after the rule may add a multiple of the weights to the update."""
    scalars = tx.affine(None, None, 0, None)
    return scalars is not None and scalars[1] != 0


def _from_rule(route: list[RoutePart]) -> list[RoutePart]:
    """The parts from the rule on."""
    return route[next(i for i, part in enumerate(route) if isinstance(part.tx, Rule)) :]


def _expect_gradient(table: Table, g: Any) -> None:
    if is_left_alone(g):
        raise ValueError(
            f"exact_rows: grads[{table.path!r}] is {described(g)}, but a table moves in every "
            "step: pass row_gradient with no indices"
        )
    if isinstance(g, RowGradient) and g.rest is not None:
        raise ValueError(
            f"exact_rows: grads[{table.path!r}] has gradients for all rows (`rest`): a transform "
            "before exact_rows gives gradients to rows that have none. Mask that transform from "
            "the table, or use row gradients without exact_rows"
        )


def _would_loop(leaves: Sequence[Any]) -> bool:
    """Whether a gradient has so many rows that a step processes them in blocks."""
    return any(isinstance(g, RowGradient) and not needs_no_loop(g.indices.size) for g in leaves)


def _is_abstract(params: Tree) -> bool:
    """Whether parameters are shapes in place of arrays."""
    return any(isinstance(p, jax.ShapeDtypeStruct) for p in flatten(params)[0])


def _is_traced(tree: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


@jax.jit
def _jitted_update(
    tx: exact_rows, updates: Tree, state: Any, params: Tree, extra_args: dict[str, Any]
) -> Step:
    return tx.update(updates, state, params, **extra_args)


def _with_slots(inner: Any, leaf: int, slots: Mapping[str, Any]) -> Any:
    """The inner transform's state with a leaf's arrays replaced in every slot."""

    def put(name: str, tree: Tree) -> Tree:
        return _replaced(tree, leaf, slots.get(name))

    return map_slots(put, inner)


def _replaced(tree: Tree, leaf: int, x: Any) -> Tree:
    """The tree with a leaf replaced by another array, unless the leaf is `None`."""
    leaves, treedef = flatten(tree)
    leaves[leaf] = None if leaves[leaf] is None else x
    return treedef.unflatten(leaves)
