"""Finds where a traced loss reads rows of its tables, and runs it with rows from elsewhere.

A `Planner` turns a jaxpr into a `Plan` without computing anything. It follows each table through
casts, reshapes, `jit`, `remat`, loops and branches to the sites where its rows are read. JAX
evaluates all other equations unchanged. A plan can be run with rows from any source, or asked for
the row indices alone, before any row is read.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    at,
    jaxpr_as_fun,
    varying_axes,
)
from adamjax.rows import as_row_ids

__all__ = ["PerSite", "Plan", "Planner", "ReadSite", "Source", "View"]


class View(NamedTuple):
    """A table, or the same rows after the loss has cast or reshaped them."""

    table: int
    shape: tuple[int, ...]
    casts: tuple[tuple[Callable[..., chex.Array], tuple[Any, ...]], ...] = ()
    # Whether the loss is differentiated through it.
    live: bool = True
    # Axes of `shard_map` over which its gradient must be summed.
    axes: tuple[str, ...] = ()

    def cast(self, x: chex.Array) -> chex.Array:
        """Applies the casts to some rows, or to the whole table."""
        return functools.reduce(lambda x, cast: cast[0](x, *cast[1]), self.casts, x)


class ReadSite(NamedTuple):
    """A site in a loss where rows of a table are read.

    Attributes:
      view: the table.
      shape: the shape of the indices.
      trailing: the shape of a row in the result.
      live: whether the loss is differentiated by these rows.
      independent: whether the indices are independent of what the loss is differentiated by.
      varying: axes of `shard_map` over which the rows differ.
    """

    view: View
    shape: tuple[int, ...]
    trailing: tuple[int, ...]
    live: bool
    independent: bool
    varying: tuple[str, ...]


# An array or None for each site, in order.
PerSite = list[Any]
# The value of an atom, which is what JAX calls an input of an equation: a variable or a literal.
_Get = Callable[[Any], Any]


class Source(NamedTuple):
    """Where a plan takes rows and tables from.

    Attributes:
      data: a pytree of arrays, passed to both functions.
      read_rows: `(data, table, int32[...]) -> rows`.
      read_table: `(data, table) -> array`, for uses that are not differentiated.
      input_tables: the tables whose rows are passed in as inputs of the loss.
    """

    data: Any
    read_rows: Callable[[Any, int, chex.Array], chex.Array]
    read_table: Callable[[Any, int], chex.Array]
    input_tables: frozenset[int]

    def rows(self, site: ReadSite, ids: chex.Array, row_input: Any) -> chex.Array:
        """The rows at a site, in the table's dtype; arbitrary for indices outside the table.

        Args:
          row_input: that of the site, as for `Plan.run`.
        """
        if site.view.table in self.input_tables:
            return row_input
        rows = self.read_rows(self.data, site.view.table, ids)
        rows = rows.reshape(*site.shape, *site.trailing)
        return rows if row_input is None else _perturbed(rows, row_input)

    def whole(self, view: View) -> chex.Array:
        return view.cast(self.read_table(self.data, view.table).reshape(view.shape))


@jax.custom_jvp
def _perturbed(rows: chex.Array, zeros: chex.Array) -> chex.Array:
    """`rows + zeros`, differentiable by both; the rows keep their bits, `-0.0` too."""
    return rows


@_perturbed.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[0] + tangents[1]


# --- plans ----------------------------------------------------------------------------------------


def _variables(atoms: Iterable[Any]) -> Iterator[Var]:
    return (x for x in atoms if isinstance(x, Var))


def _not_tables(eqn: JaxprEqn, views: Sequence[View | None]) -> list[Any]:
    """The inputs of an equation that are no tables."""
    return [x for x, view in zip(eqn.invars, views, strict=True) if view is None]


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


# JAX caches the derivatives of jitted functions, such as those of jax.numpy. A jaxpr has bare
# primitives in their place. JAX would differentiate each of them anew, and tracing a model would
# take twice as long. So each primitive is jitted here, once for the same parameters.
@functools.lru_cache(maxsize=4096)
def _jitted(primitive: Any, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
        return primitive.bind(*args, **dict(params))

    function.__name__ = primitive.name
    return jax.jit(function, inline=True)


def _evaluate(jaxpr: Jaxpr, eqn: JaxprEqn, env: dict[Var, Any]) -> None:
    """Evaluates one equation of a jaxpr, and adds its results to `env`."""
    primitive, params = eqn.primitive, tuple(eqn.params.items())
    # An equation with a jaxpr or a function among its parameters is not cached: the cache would
    # keep that alive, and JAX caches its derivatives anyway.
    can_cache = not eqn.effects and not any(_has_code(x) for x in eqn.params.values())
    if can_cache and _is_hashable(params):
        args = (x.val if isinstance(x, Literal) else env[x] for x in eqn.invars)
        with at(eqn), eqn.ctx.manager:
            results = _jitted(primitive, params)(*args)
        results = results if primitive.multiple_results else [results]
    else:
        # A jaxpr of this equation alone: JAX knows how to run it.
        ins = list(dict.fromkeys(_variables(eqn.invars)))
        debug_info = jaxpr.debug_info._replace(
            arg_names=("",) * len(ins), result_paths=("",) * len(eqn.outvars)
        )
        body = ClosedJaxpr(Jaxpr([], ins, eqn.outvars, [eqn], jaxpr.effects, debug_info), ())
        results = jaxpr_as_fun(body)(*(env[v] for v in ins))
    env.update(zip(eqn.outvars, results, strict=True))


def _has_code(x: Any) -> bool:
    """Whether a parameter is or contains a jaxpr or a function."""
    if isinstance(x, tuple | list):
        return any(map(_has_code, x))
    return isinstance(x, Jaxpr | ClosedJaxpr) or (callable(x) and not isinstance(x, type))


def _is_hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


class _Step:
    """An equation that takes a table.

    Attributes:
      ins, outs: the atoms that it takes and the variables that it sets, without views.
      sites: where it reads rows, in order.
    """

    def __init__(self, eqn: JaxprEqn, ins: Sequence[Any], outs: Sequence[Var]) -> None:
        self.eqn, self.ins, self.outs = eqn, ins, outs
        self.sites: Sequence[ReadSite] = ()

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        """Returns the values of `outs`, and the indices at each site."""
        raise NotImplementedError

    def needed_atoms(self) -> list[Any]:
        """The atoms whose values `indices` needs."""
        raise NotImplementedError

    def indices(self, get: _Get) -> PerSite:
        """The indices at each independent site; `None` at the others."""
        raise NotImplementedError


class Plan:
    """A jaxpr with its reads of tables.

    Attributes:
      ins: the variables that it takes, without tables.
      items: in order, equations without a table, and steps.
      outs: the atoms and views that it returns.
      sites: where it reads rows, in order.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        ins: Sequence[Var],
        items: Sequence[JaxprEqn | _Step],
        outs: Sequence[Any],
    ) -> None:
        self.closed, self.ins, self.items, self.outs = closed, ins, items, outs
        self.steps = [item for item in items if isinstance(item, _Step)]
        self.sites = [site for step in self.steps for site in step.sites]

    def _env(self, values: Mapping[Var, Any]) -> tuple[dict[Var, Any], _Get]:
        consts = zip(self.closed.jaxpr.constvars, self.closed.consts, strict=True)
        env = {**dict(consts), **values}
        return env, lambda x: x.val if isinstance(x, Literal) else env[x]

    def run(
        self, source: Source, args: Sequence[Any], row_inputs: PerSite
    ) -> tuple[list[Any], PerSite]:
        """Returns the values of `outs` that are not views, and the indices at each site.

        Args:
          args: the values of `ins`.
          row_inputs: for each site the array to differentiate by, of the shape of its rows: the
            rows themselves if the table is one of `source.input_tables`, else zeros, as if they
            were added to the rows. `None` if the loss is not differentiated by the rows.
        """
        env, get = self._env(dict(zip(self.ins, args, strict=True)))
        indices: PerSite = []
        for item in self.items:
            if not isinstance(item, _Step):
                _evaluate(self.closed.jaxpr, item, env)
                continue
            step_inputs = row_inputs[len(indices) : len(indices) + len(item.sites)]
            with at(item.eqn):
                outs, step_indices = item.run(source, get, step_inputs)
            env.update(zip(item.outs, outs, strict=True))
            indices += step_indices
        return [get(x) for x in self.outs if not isinstance(x, View)], indices

    def _needed(self, atoms: Iterable[Any]) -> tuple[set[Var], list[JaxprEqn]]:
        """The variables and equations that the independent indices and some atoms depend on."""
        needed = {v for step in self.steps for v in _variables(step.needed_atoms())}
        needed.update(_variables(atoms))
        eqns = []
        for item in reversed(self.items):
            if not isinstance(item, _Step) and not needed.isdisjoint(item.outvars):
                needed.update(_variables(item.invars))
                eqns.append(item)
        return needed, eqns[::-1]

    def needed_ins(self, atoms: Sequence[Any] = ()) -> list[int]:
        """The numbers of the `ins` whose values `values_and_indices` of these atoms needs."""
        needed, _ = self._needed(atoms)
        return [i for i, v in enumerate(self.ins) if v in needed]

    def indices(self, args: Mapping[int, Any]) -> PerSite:
        """The indices at each independent site; `None` at the others.

        Args:
          args: the values of the `ins` in `needed_ins()`, by number.
        """
        return self.values_and_indices(args, ())[1]

    def values_and_indices(
        self, args: Mapping[int, Any], atoms: Sequence[Any]
    ) -> tuple[list[Any], PerSite]:
        """Returns the values of some atoms, and `indices`.

        Args:
          args: the values of the `ins` in `needed_ins(atoms)`, by number.
          atoms: the atoms, such as those that a loop carries to its next iteration.
        """
        env, get = self._env({self.ins[i]: x for i, x in args.items()})
        for eqn in self._needed(atoms)[1]:
            _evaluate(self.closed.jaxpr, eqn, env)
        indices = [ids for step in self.steps for ids in step.indices(get)]
        return [get(x) for x in atoms], indices


# --- steps: reads ---------------------------------------------------------------------------------


class _Window(NamedTuple):
    """How an equation reads whole rows: in runs of rows at equal distances.

    Attributes:
      starts: an atom or array of integers, which has the first row of each run.
      column: if the last axis of `starts` is a position in several dimensions, the index in it that
        is the row; else `None`.
      run_length: the number of rows in a run; `None` if it is one row, for which the result has no
        axis.
      stride: the distance between the rows of a run.
      dropped: the axes of a row, of size 1, that are left out.
      offsets: the axes of the result that have the rows of a run and their elements; `None` if they
        are the last ones.
      fill: the value of a run outside the table; `None` if such a run is moved into the table.
      moved_are_live: whether the loss is differentiated by runs that were moved.
    """

    starts: Any
    column: int | None = None
    run_length: int | None = None
    stride: int = 1
    dropped: tuple[int, ...] = ()
    offsets: tuple[int, ...] | None = None
    fill: Any = None
    moved_are_live: bool = True


# A slice of a larger part of a table does not count as a read of rows.
_LARGEST_SLICE = 0.5


def _is_small_slice(run_length: int, num_rows: int) -> bool:
    return run_length <= max(1, _LARGEST_SLICE * num_rows)


def _window(eqn: JaxprEqn, view: View) -> _Window | None:
    """How an equation reads whole rows of its first operand; `None` if it does not."""
    windows = {
        "gather": _gather_window,
        "dynamic_slice": _dynamic_slice_window,
        "slice": _slice_window,
    }
    window = windows.get(eqn.primitive.name)
    return None if window is None else window(eqn, view)


def _gather_window(eqn: JaxprEqn, view: View) -> _Window | None:
    params, (_, *trailing) = eqn.params, view.shape
    numbers, (run_length, *sizes) = params["dimension_numbers"], params["slice_sizes"]
    mode, start_dims = params["mode"], numbers.start_index_map
    modes = jax.lax.GatherScatterMode
    fills = mode == modes.FILL_OR_DROP
    if (
        0 not in start_dims
        or mode not in (modes.CLIP, modes.FILL_OR_DROP, modes.PROMISE_IN_BOUNDS)
        or sizes != trailing
        or numbers.operand_batching_dims
        or (fills and len(start_dims) > 1)
    ):
        return None
    collapsed = numbers.collapsed_slice_dims
    fill = None
    if fills:
        fill = np.nan if params["fill_value"] is None else params["fill_value"]
    return _Window(
        eqn.invars[1],
        column=start_dims.index(0),
        run_length=None if 0 in collapsed else run_length,
        dropped=tuple(d for d in collapsed if d > 0),
        offsets=numbers.offset_dims,
        fill=fill,
        # With this mode, JAX gives rows that it moved no gradient, though that is undocumented.
        moved_are_live=mode != modes.PROMISE_IN_BOUNDS,
    )


def _dynamic_slice_window(eqn: JaxprEqn, view: View) -> _Window | None:
    num_rows, *trailing = view.shape
    run_length, *sizes = eqn.params["slice_sizes"]
    if sizes != trailing or not _is_small_slice(run_length, num_rows):
        return None
    return _Window(eqn.invars[1], run_length=run_length)


def _slice_window(eqn: JaxprEqn, view: View) -> _Window | None:
    params, (num_rows, *trailing) = eqn.params, view.shape
    start, *others = params["start_indices"]
    stop, *ends = params["limit_indices"]
    stride, *steps = params["strides"] or [1] * len(view.shape)
    run_length = -(-(stop - start) // stride)
    has_whole_rows = not any(others) and ends == trailing and set(steps) <= {1}
    if not has_whole_rows or not _is_small_slice(run_length, num_rows):
        return None
    return _Window(np.int32(start), run_length=run_length, stride=stride)


class _Read(_Step):
    """An equation that reads rows."""

    def __init__(
        self, eqn: JaxprEqn, view: View, window: _Window, live: bool, independent: bool
    ) -> None:
        super().__init__(eqn, [window.starts], eqn.outvars)
        self.view, self.window = view, window
        starts = window.starts
        shape = starts.shape if isinstance(starts, np.generic) else starts.aval.shape
        shape = shape if window.column is None else shape[:-1]
        if window.run_length is not None:
            shape = (*shape, window.run_length)
        trailing = tuple(n for d, n in enumerate(view.shape) if d > 0 and d not in window.dropped)
        varying = varying_axes(eqn.outvars[0].aval)
        self.sites = [ReadSite(view, shape, trailing, live and view.live, independent, varying)]

    def _ids(self, get: _Get) -> tuple[chex.Array, chex.Array]:
        """The index of each row, and whether each run is in the table.

        A run outside the table is moved into it, or has indices `num_rows` if it is filled.
        """
        window, num_rows = self.window, self.view.shape[0]
        starts = window.starts
        starts = jnp.asarray(starts if isinstance(starts, np.generic) else get(starts))
        if window.column is not None:
            starts = starts[..., window.column]
        span = 1 if window.run_length is None else (window.run_length - 1) * window.stride + 1
        # From a later start than `last`, a run would leave the table.
        last = num_rows - span
        first = as_row_ids(starts, last + 1)
        inside = first <= last
        outside = num_rows if window.fill is not None else jnp.where(starts < 0, 0, last)
        first = jnp.where(inside, first, outside)
        if window.run_length is None:
            return first, inside
        run = window.stride * jnp.arange(window.run_length, dtype=jnp.int32)
        return jnp.minimum(first[..., None] + run, num_rows), inside

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        window, site = self.window, self.sites[0]
        ids, inside = self._ids(get)
        rows = self.view.cast(source.rows(site, ids, row_inputs[0]))
        inside = inside.reshape(inside.shape + (1,) * (rows.ndim - inside.ndim))
        if window.fill is not None:
            rows = jnp.where(inside, rows, jnp.asarray(window.fill, rows.dtype))
        elif not window.moved_are_live:
            rows = jnp.where(inside, rows, jax.lax.stop_gradient(rows))
        if window.offsets is not None:
            last = range(rows.ndim - len(window.offsets), rows.ndim)
            rows = jnp.moveaxis(rows, last, window.offsets)
        return [rows], [ids]

    def needed_atoms(self) -> list[Any]:
        return list(self.ins) if self.sites[0].independent else []

    def indices(self, get: _Get) -> PerSite:
        return [self._ids(get)[0] if self.sites[0].independent else None]


# --- steps: equations with a jaxpr of their own ---------------------------------------------------


class _Inlined(_Step):
    """A call such as `jit`, whose equations are run as part of the caller."""

    def __init__(self, eqn: JaxprEqn, plan: Plan, ins: Sequence[Any], outs: Sequence[Var]) -> None:
        super().__init__(eqn, ins, outs)
        self.plan, self.sites = plan, plan.sites

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        values = [self._with_sharding("in_shardings", self.eqn.invars, x, get(x)) for x in self.ins]
        outs, ids = self.plan.run(source, values, row_inputs)
        pairs = zip(self.outs, outs, strict=True)
        return [self._with_sharding("out_shardings", self.eqn.outvars, v, x) for v, x in pairs], ids

    def _with_sharding(self, name: str, variables: Sequence[Any], variable: Any, value: Any) -> Any:
        """The value with the sharding that the call asks for."""
        shardings = self.eqn.params.get(name)
        sharding = shardings[list(variables).index(variable)] if shardings else None
        if not isinstance(sharding, jax.sharding.Sharding):
            return value
        return jax.lax.with_sharding_constraint(value, sharding)

    def needed_atoms(self) -> list[Any]:
        return [self.ins[i] for i in self.plan.needed_ins()]

    def indices(self, get: _Get) -> PerSite:
        return self.plan.indices({i: get(self.ins[i]) for i in self.plan.needed_ins()})


class _Remat(_Inlined):
    """`jax.checkpoint`."""

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        params = self.eqn.params
        run = functools.partial(self.plan.run, source)
        body = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
        return body([get(x) for x in self.ins], row_inputs)


class _Scan(_Step):
    """`lax.scan`, and loops made of it. A site has the reads of all iterations."""

    def __init__(
        self,
        eqn: JaxprEqn,
        plan: Plan,
        ins: Sequence[Any],
        outs: Sequence[Var],
        num_consts: int,
        num_carried: int,
    ) -> None:
        """The `ins` are constants, carried values, and arrays of which each iteration has a slice.

        Args:
          num_consts: the number of constants.
          num_carried: the number of carried values.
        """
        super().__init__(eqn, ins, outs)
        self.plan, self.num_consts, self.num_carried = plan, num_consts, num_carried
        self.first_sliced = num_consts + num_carried
        length = eqn.params["length"]
        self.sites = [site._replace(shape=(length, *site.shape)) for site in plan.sites]

    def _loop(self, body: Any, init: Any, xs: Any) -> Any:
        params = self.eqn.params
        options = {k: params[k] for k in ("length", "reverse", "unroll")}
        return jax.lax.scan(body, init, xs, **options)

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        values = [get(x) for x in self.ins]
        consts, init = values[: self.num_consts], values[self.num_consts : self.first_sliced]

        def body(carry: Any, slices_and_inputs: Any) -> Any:
            slices, inputs = slices_and_inputs
            outs, ids = self.plan.run(source, [*consts, *carry, *slices], inputs)
            return outs[: self.num_carried], (outs[self.num_carried :], ids)

        carry, (stacked, ids) = self._loop(body, init, (values[self.first_sliced :], row_inputs))
        return [*carry, *stacked], ids

    def _needed_numbers(self) -> tuple[list[int], list[int]]:
        """The numbers of the plan's `ins`, and of the carried values, that `indices` needs."""
        carried: list[int] = []
        while True:
            # A carried value needs all that its value after an iteration is computed from.
            needed = self.plan.needed_ins([self.plan.outs[i] for i in carried])
            new = [i - self.num_consts for i in needed if self.num_consts <= i < self.first_sliced]
            if set(new) <= set(carried):
                return needed, carried
            carried = sorted({*new, *carried})

    def needed_atoms(self) -> list[Any]:
        return [self.ins[i] for i in self._needed_numbers()[0]]

    def indices(self, get: _Get) -> PerSite:
        needed, carried = self._needed_numbers()
        values = {i: get(self.ins[i]) for i in needed}
        consts = {i: x for i, x in values.items() if i < self.num_consts}
        sliced = {i: x for i, x in values.items() if i >= self.first_sliced}
        carried_ins = [self.num_consts + i for i in carried]

        def body(carry: Any, slices: Any) -> Any:
            args = {**consts, **dict(zip(carried_ins, carry, strict=True)), **slices}
            return self.plan.values_and_indices(args, [self.plan.outs[i] for i in carried])

        return self._loop(body, [values[i] for i in carried_ins], sliced)[1]


class _Cond(_Step):
    """`lax.cond` and `lax.switch`: equal reads in several branches share a site."""

    def __init__(
        self,
        eqn: JaxprEqn,
        plans: Sequence[Plan],
        ins: Sequence[Any],
        outs: Sequence[Var],
        independent: bool,
    ) -> None:
        """The first of `ins` is the number of the branch to take; the others are its inputs.

        Args:
          independent: whether that number is independent of what the loss is differentiated by.
        """
        super().__init__(eqn, ins, outs)
        self.plans = plans
        # For each branch, the numbers of its sites among all sites.
        self.sites, self.site_numbers = [], []
        for plan in plans:
            # Each site shares that of an equal read in another branch, if no other site of this
            # branch does.
            unshared, numbers = list(range(len(self.sites))), []
            for site in plan.sites:
                site = site._replace(independent=site.independent and independent)
                number = next((i for i in unshared if self.sites[i] == site), None)
                if number is None:
                    number = len(self.sites)
                    self.sites.append(site)
                else:
                    unshared.remove(number)
                numbers.append(number)
            self.site_numbers.append(numbers)

    def _at_all_sites(self, number: int, branch_indices: PerSite) -> PerSite:
        """The indices that a branch read, with no row at the sites of other branches."""
        ids: PerSite = [jnp.full(site.shape, site.view.shape[0], jnp.int32) for site in self.sites]
        for i, x in zip(self.site_numbers[number], branch_indices, strict=True):
            ids[i] = ids[i] if x is None else x
        return ids

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        def branch(number: int, values: list[Any], row_inputs: PerSite) -> Any:
            branch_inputs = [row_inputs[i] for i in self.site_numbers[number]]
            outs, indices = self.plans[number].run(source, values, branch_inputs)
            return outs, self._at_all_sites(number, indices)

        which, *values = (get(x) for x in self.ins)
        branches = [functools.partial(branch, i) for i in range(len(self.plans))]
        return jax.lax.switch(which, branches, values, row_inputs)

    def needed_atoms(self) -> list[Any]:
        if not any(site.independent for site in self.sites):
            return []
        needed = sorted({i for plan in self.plans for i in plan.needed_ins()})
        branch_ins = self.ins[1:]
        return [self.ins[0], *(branch_ins[i] for i in needed)]

    def indices(self, get: _Get) -> PerSite:
        if not any(site.independent for site in self.sites):
            return [None] * len(self.sites)

        def branch(number: int, values: dict[int, Any]) -> Any:
            plan = self.plans[number]
            indices = plan.indices({i: values[i] for i in plan.needed_ins()})
            return self._at_all_sites(number, indices)

        which, *branch_ins = self.ins
        values = {i: get(branch_ins[i]) for plan in self.plans for i in plan.needed_ins()}
        branches = [functools.partial(branch, i) for i in range(len(self.plans))]
        indices = jax.lax.switch(get(which), branches, values)
        pairs = zip(self.sites, indices, strict=True)
        return [ids if site.independent else None for site, ids in pairs]


class _ShardMap(_Step):
    """`jax.shard_map`. A site has the reads of all devices.

    Attributes:
      manual_axes: the axes of the mesh that it maps over.
      in_specs: the partition specs of the `ins`.
      site_specs: those of the indices and rows at each site, whose first axis is that of devices.
    """

    def __init__(
        self, eqn: JaxprEqn, plan: Plan, views: Sequence[View | None], outs: Sequence[Var]
    ) -> None:
        triples = [*zip(eqn.invars, eqn.params["in_specs"], views, strict=True)]
        super().__init__(eqn, [x for x, _, view in triples if view is None], outs)
        self.plan, self.in_specs = plan, [spec for _, spec, view in triples if view is None]
        self.mesh, manual = eqn.params["mesh"], eqn.params["newly_manual_axes"]
        self.manual_axes = tuple(axis for axis in self.mesh.axis_names if axis in manual)
        axes_of_sites = [self._axes(site) for site in plan.sites]
        pairs = zip(plan.sites, axes_of_sites, strict=True)
        self.sites = [self._outer_site(site, axes) for site, axes in pairs]
        self.site_specs = [jax.sharding.PartitionSpec(axes) for axes in axes_of_sites]

    def _axes(self, site: ReadSite) -> tuple[str, ...]:
        """The axes over which devices may read different rows."""
        is_checked = self.eqn.params["check_vma"]
        return tuple(axis for axis in self.manual_axes if not is_checked or axis in site.varying)

    def _outer_site(self, site: ReadSite, axes: tuple[str, ...]) -> ReadSite:
        """A site of one device as the site of all devices along these axes."""
        devices = math.prod(self.mesh.shape[axis] for axis in axes)
        view = site.view._replace(axes=tuple(a for a in site.view.axes if a not in axes))
        varying = tuple(axis for axis in site.varying if axis not in self.manual_axes)
        return site._replace(view=view, shape=(devices, *site.shape), varying=varying)

    def _mapped(self, body: Any, args: Any, in_specs: Any, out_specs: Any) -> Any:
        options = {"axis_names": set(self.manual_axes), "check_vma": self.eqn.params["check_vma"]}
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(body, mesh=self.mesh, **specs, **options)(*args)

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        def body(data: Any, values: list[Any], row_inputs: PerSite) -> Any:
            device_inputs = [None if x is None else x[0] for x in row_inputs]
            outs, ids = self.plan.run(source._replace(data=data), values, device_inputs)
            return outs, [x[None] for x in ids]

        pairs = zip(row_inputs, self.site_specs, strict=True)
        row_specs = [None if x is None else spec for x, spec in pairs]
        out_specs = list(self.eqn.params["out_specs"]), self.site_specs
        args = source.data, [get(x) for x in self.ins], row_inputs
        replicated = jax.sharding.PartitionSpec()
        return self._mapped(body, args, (replicated, self.in_specs, row_specs), out_specs)

    def needed_atoms(self) -> list[Any]:
        return [self.ins[i] for i in self.plan.needed_ins()]

    def indices(self, get: _Get) -> PerSite:
        needed = self.plan.needed_ins()
        independent = [i for i, site in enumerate(self.sites) if site.independent]

        def body(values: list[Any]) -> PerSite:
            indices = self.plan.indices(dict(zip(needed, values, strict=True)))
            return [indices[i][None] for i in independent]

        args, specs = [get(self.ins[i]) for i in needed], [self.in_specs[i] for i in needed]
        computed = self._mapped(body, (args,), (specs,), [self.site_specs[i] for i in independent])
        indices: PerSite = [None] * len(self.sites)
        for i, x in zip(independent, computed, strict=True):
            indices[i] = x
        return indices


class _WholeTable(_Step):
    """Any other use of a table, through which the loss is not differentiated.

    (The planner makes one for a use that it refuses too; such a plan is not run.)
    """

    def __init__(self, eqn: JaxprEqn, jaxpr: Jaxpr, views: Sequence[View | None]) -> None:
        super().__init__(eqn, _not_tables(eqn, views), eqn.outvars)
        self.jaxpr, self.views = jaxpr, views

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        env = {
            x: get(x) if view is None else source.whole(view)
            for x, view in zip(self.eqn.invars, self.views, strict=True)
            if isinstance(x, Var)
        }
        _evaluate(self.jaxpr, self.eqn, env)
        return [env[v] for v in self.outs], []

    def needed_atoms(self) -> list[Any]:
        return []

    def indices(self, get: _Get) -> PerSite:
        return []


# --- from a jaxpr to its plan ---------------------------------------------------------------------


def _has_effect(eqn: JaxprEqn) -> bool:
    """Whether an equation has an effect other than a debug print."""
    return bool(eqn.effects) and not eqn.primitive.name.startswith("debug")


def _is_float(v: Any) -> bool:
    return jnp.issubdtype(getattr(v.aval, "dtype", jax.dtypes.float0), jnp.inexact)


def _live(jaxpr: Jaxpr, live_outs: Sequence[bool]) -> set[Any]:
    """The variables through which the live results are differentiated."""
    pairs = zip(jaxpr.outvars, live_outs, strict=True)
    live = {v for v, is_live in pairs if is_live and isinstance(v, Var)}
    for eqn in reversed(jaxpr.eqns):
        # An effect may carry its inputs to a result by another way.
        is_used = not live.isdisjoint(eqn.outvars) or _has_effect(eqn)
        if is_used and eqn.primitive.name != "stop_gradient":
            live.update(v for v in _variables(eqn.invars) if _is_float(v))
    return live


def _tainted(jaxpr: Jaxpr, tainted_ins: Sequence[bool]) -> set[Any]:
    """The variables that depend on the tainted inputs, or on an effect.

    These can only be computed when the loss runs. All others are independent.
    """
    tainted = {v for v, is_tainted in zip(jaxpr.invars, tainted_ins, strict=True) if is_tainted}
    for eqn in jaxpr.eqns:
        if eqn.effects or not tainted.isdisjoint(_variables(eqn.invars)):
            tainted.update(eqn.outvars)
    return tainted


def _scan_sizes(eqn: JaxprEqn) -> tuple[int, int]:
    """The number of a scan's constants, and the number of its carried values.

    Releases of JAX store these numbers in different ways, so they are derived from the types: a
    stacked array has one dimension more than its slice in an iteration.
    """
    body = eqn.params["jaxpr"]

    def count_stacked(variables: Sequence[Any], slices: Sequence[Any]) -> int:
        pairs = zip(variables, slices, strict=True)
        return sum(np.ndim(v.aval) > np.ndim(one) for v, one in pairs)

    carried = len(eqn.outvars) - count_stacked(eqn.outvars, body.out_avals)
    return len(eqn.invars) - count_stacked(eqn.invars, body.in_avals) - carried, carried


class Planner:
    """Makes plans, and records the tables that it cannot follow.

    Attributes:
      exact: whether every use of a table but a read of rows is refused, even one through which the
        loss is not differentiated.
      refused: by table, the equation that uses it in another way; `None` if the loss returns it.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.refused: dict[int, JaxprEqn | None] = {}

    def refuse(
        self, views: Iterable[Any], eqn: JaxprEqn | None, jaxpr: Jaxpr | None = None
    ) -> None:
        if eqn is not None and jaxpr is not None and eqn.primitive.name == "transpose":
            # The error should name what the transposed table is used for.
            users = (e for e in jaxpr.eqns if eqn.outvars[0] in _variables(e.invars))
            eqn = next(users, eqn)
        for view in views:
            if view is not None:
                self.refused.setdefault(view.table, eqn)

    def plan(
        self,
        closed: ClosedJaxpr,
        views: Sequence[View | None],
        tainted_ins: Sequence[bool],
        live_outs: Sequence[bool],
    ) -> Plan:
        """The plan of a jaxpr.

        Args:
          views: for each input the table that it is; `None` for all others.
          tainted_ins: whether each input depends on what the loss is differentiated by.
          live_outs: whether the loss is differentiated through each result.
        """
        jaxpr = closed.jaxpr
        view_of = {v: view for v, view in zip(jaxpr.invars, views, strict=True) if view is not None}
        live, tainted = _live(jaxpr, live_outs), _tainted(jaxpr, tainted_ins)
        items: list[Any] = []
        for eqn in jaxpr.eqns:
            in_views = [view_of.get(x) if isinstance(x, Var) else None for x in eqn.invars]
            if not any(view is not None for view in in_views):
                items.append(eqn)
                continue
            out_view = self._followed(eqn, in_views)
            if out_view is not None:
                view_of[eqn.outvars[0]] = out_view
                continue
            step, out_views = self._step(jaxpr, eqn, in_views, tainted, live)
            view_of.update(out_views)
            items.append(step)
        outs = [view_of.get(x, x) if isinstance(x, Var) else x for x in jaxpr.outvars]
        return Plan(closed, [v for v in jaxpr.invars if v not in view_of], items, outs)

    def _followed(self, eqn: JaxprEqn, views: Sequence[View | None]) -> View | None:
        """The view that an equation makes of a table; `None` if it does not keep the rows."""
        view, kind, params = views[0], eqn.primitive.name, eqn.params
        if view is None or len(eqn.outvars) != 1:
            return None
        out: Any = eqn.outvars[0].aval
        shape, lax = out.shape, jax.lax

        def cast(function: Any, *args: Any) -> View:
            return view._replace(casts=(*view.casts, (function, args)))

        if kind == "convert_element_type":
            if jnp.issubdtype(params["new_dtype"], jnp.floating):
                return cast(lax.convert_element_type, params["new_dtype"])
        elif kind == "reduce_precision":
            return cast(lax.reduce_precision, params["exponent_bits"], params["mantissa_bits"])
        elif kind == "stop_gradient":
            return cast(lax.stop_gradient)._replace(live=False)
        elif kind in ("copy", "copy_p", "sharding_constraint", "optimization_barrier"):
            return view
        elif kind in ("pvary", "pbroadcast"):
            return view._replace(axes=(*view.axes, *params["axes"]))
        elif kind in ("reshape", "squeeze", "broadcast_in_dim", "expand_dims"):
            keeps_rows = shape[:1] == view.shape[:1] and math.prod(shape) == math.prod(view.shape)
            # `lax.reshape` with `dimensions` transposes first.
            keeps_rows = keeps_rows and (kind != "reshape" or params["dimensions"] is None)
            return view._replace(shape=shape) if keeps_rows else None
        return None

    def _step(
        self,
        jaxpr: Jaxpr,
        eqn: JaxprEqn,
        views: Sequence[View | None],
        tainted: set[Any],
        live: set[Any],
    ) -> tuple[Any, dict[Var, View]]:
        """The step for an equation that takes tables, and the views among its results."""
        kind, params = eqn.primitive.name, eqn.params
        is_tainted = [isinstance(x, Var) and x in tainted for x in eqn.invars]
        is_live = [v in live for v in eqn.outvars]
        ins = _not_tables(eqn, views)
        if views[0] is not None and not any(views[1:]):
            window = _window(eqn, views[0])
            if window is not None:
                return _Read(eqn, views[0], window, any(is_live), not any(is_tainted[1:])), {}
        if kind in ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"):
            closed = _closed(params["jaxpr" if "jaxpr" in params else "call_jaxpr"])
            plan = self.plan(closed, views, is_tainted, is_live)
            outs, new = _split(eqn.outvars, plan.outs)
            make = _Remat if kind in ("remat2", "checkpoint") else _Inlined
            return make(eqn, plan, ins, outs), new
        # A table that is split over devices cannot be followed. Nor can any table in older releases
        # of JAX, whose `shard_map` has other parameters.
        if kind == "shard_map" and "newly_manual_axes" in params:
            pairs = zip(views, params["in_specs"], strict=True)
            if not any(view is not None and any(spec) for view, spec in pairs):
                plan = self.plan(_closed(params["jaxpr"]), views, is_tainted, is_live)
                self.refuse((x for x in plan.outs if isinstance(x, View)), eqn)
                return _ShardMap(eqn, plan, views, eqn.outvars), {}
        if kind == "scan":
            return self._scan(eqn, views, is_tainted, is_live)
        if kind == "cond" and views[0] is None:
            plans = [
                self.plan(_closed(branch), views[1:], is_tainted[1:], is_live)
                for branch in params["branches"]
            ]
            # A table that only some branches return cannot be followed.
            for results in zip(*(plan.outs for plan in plans), strict=True):
                returned = [x for x in results if isinstance(x, View)]
                if returned and results != (returned[0],) * len(plans):
                    self.refuse(returned, eqn)
            outs, new = _split(eqn.outvars, plans[0].outs)
            return _Cond(eqn, plans, ins, outs, not is_tainted[0]), new
        if self.exact or _has_effect(eqn) or any(is_live):
            used = (view for view in views if view is not None and (self.exact or view.live))
            self.refuse(used, eqn, jaxpr)
        return _WholeTable(eqn, jaxpr, views), {}

    def _scan(
        self,
        eqn: JaxprEqn,
        views: Sequence[View | None],
        is_tainted: list[bool],
        is_live: list[bool],
    ) -> tuple[Any, dict[Var, View]]:
        """The step for a `scan` that takes tables, and the views among its results."""
        closed, (num_consts, num_carried) = eqn.params["jaxpr"], _scan_sizes(eqn)
        carried = slice(num_consts, num_consts + num_carried)
        # Each iteration would take its own slice of a table.
        self.refuse(views[carried.stop :], eqn)
        # A carried value may reach any result through a later iteration.
        is_live[:num_carried] = [any(is_live)] * num_carried
        # A carried value that is tainted after some iteration is tainted in the next one.
        carried_outs = closed.jaxpr.outvars[:num_carried]
        while True:
            tainted = _tainted(closed.jaxpr, is_tainted)
            after = [
                old or (isinstance(new, Var) and new in tainted)
                for old, new in zip(is_tainted[carried], carried_outs, strict=True)
            ]
            if after == is_tainted[carried]:
                break
            is_tainted[carried] = after
        plan = self.plan(closed, views, is_tainted, is_live)
        # A carried table must stay the same in each iteration. A stacked result cannot be a table.
        for before, x in itertools.zip_longest(views[carried], plan.outs):
            if (before is not None or isinstance(x, View)) and before != x:
                self.refuse([before, x if isinstance(x, View) else None], eqn)
        outs, new = _split(eqn.outvars, plan.outs)
        # The `ins` of the step are what is left of the scan's inputs without the tables.
        is_left = [view is None for view in views]
        left_consts, left_carried = sum(is_left[:num_consts]), sum(is_left[carried])
        return _Scan(eqn, plan, _not_tables(eqn, views), outs, left_consts, left_carried), new


def _split(variables: Sequence[Var], values: Sequence[Any]) -> tuple[list[Var], dict[Var, View]]:
    """The variables whose values are atoms, and the views of the others."""
    views = {v: x for v, x in zip(variables, values, strict=True) if isinstance(x, View)}
    return [v for v in variables if v not in views], views
