"""Runs a traced loss with rows that are passed to it in place of its tables.

A `Plan` is a jaxpr in which a `TableEquation` replaces each equation that takes a table. JAX
evaluates all other equations unchanged. A plan can be run with rows from any source, or asked for
the row indices alone, before any row is read. `reads.Planner` makes plans.
"""

import functools
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
    jaxpr_as_fun,
    source_of,
    varying_axes,
)
from adamjax.rows import as_row_ids

__all__ = [
    "Cond",
    "Inlined",
    "PerSite",
    "Plan",
    "Read",
    "ReadSite",
    "Remat",
    "Scan",
    "ShardMap",
    "Source",
    "TableEquation",
    "View",
    "WholeTable",
    "Window",
    "not_tables",
    "variables_of",
]


class View(NamedTuple):
    """A table after casts and reshapes that keep its rows, if there are any.

    Attributes:
      table: the table's position among the leaves.
      shape: the shape after the reshapes.
      casts: each cast in order, as a function and its arguments after the array.
      live: whether the loss is differentiated through it.
      axes: axes of `shard_map` over which its gradient must be summed.
    """

    table: int
    shape: tuple[int, ...]
    casts: tuple[tuple[Callable[..., chex.Array], tuple[Any, ...]], ...] = ()
    live: bool = True
    axes: tuple[str, ...] = ()

    def cast(self, x: chex.Array) -> chex.Array:
        """Applies the casts to some rows, or to the whole table."""
        return functools.reduce(lambda x, cast: cast[0](x, *cast[1]), self.casts, x)


class ReadSite(NamedTuple):
    """A site in a loss where rows of a table are read.

    Attributes:
      view: the table's view.
      shape: the shape of the indices.
      trailing: the shape of a row in the result.
      live: whether the loss is differentiated with respect to these rows.
      independent: whether the indices depend on no differentiated input and no effect.
      varying: axes of `shard_map` over which the rows may differ.
    """

    view: View
    shape: tuple[int, ...]
    trailing: tuple[int, ...]
    live: bool
    independent: bool
    varying: tuple[str, ...]


# An array or None for each site, in order.
PerSite = list[Any]
# A function that returns the value of an atom. (In JAX, an atom is an input of an equation: a
# variable or a literal.)
_Get = Callable[[Any], Any]


class Source(NamedTuple):
    """The source of a plan's rows and tables.

    Attributes:
      data: a pytree of arrays, passed to both functions.
      read_rows: `(data, table, int32[...]) -> rows`.
      read_table: `(data, table) -> array`, for uses that are not differentiated.
      input_tables: the tables whose rows are in the `row_inputs` of `Plan.run`.
      promised: whether `read_rows` is a gather of JAX with PROMISE_IN_BOUNDS, so that it also has
        JAX's derivatives for indices outside the table.
    """

    data: Any
    read_rows: Callable[[Any, int, chex.Array], chex.Array]
    read_table: Callable[[Any, int], chex.Array]
    input_tables: frozenset[int]
    promised: bool = False

    def rows(self, site: ReadSite, ids: chex.Array, row_input: Any) -> chex.Array:
        """The rows at a site, in the table's dtype; arbitrary for indices outside the table.

        Args:
          row_input: the site's entry of `row_inputs`, as for `Plan.run`.
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
    """`rows + zeros`, differentiable in both; the rows keep their bits, even `-0.0`."""
    return rows


@_perturbed.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[0] + tangents[1]


# --- derivatives of rows outside the table --------------------------------------------------------


@jax.custom_vjp
def _with_dropped_cotangents(rows: chex.Array, inside: chex.Array) -> chex.Array:
    """The rows; in the gradient of the loss, cotangents of runs outside the table are dropped."""
    return rows


def _with_dropped_fwd(rows: chex.Array, inside: chex.Array) -> Any:
    return rows, inside


def _with_dropped_bwd(inside: chex.Array, cotangents: chex.Array) -> Any:
    return _dropped(cotangents, inside), None


_with_dropped_cotangents.defvjp(_with_dropped_fwd, _with_dropped_bwd)


@jax.custom_jvp
def _dropped(x: chex.Array, inside: chex.Array) -> chex.Array:
    """Zeros for a run outside the table.

    JAX drops the cotangent of a gather by a scatter, but the transpose of this scatter is a gather
    that moves the run. A select is its own transpose. So only the first gradient, which must be
    fast, is a select, and its derivatives go through a scatter of JAX.
    """
    inside = inside.reshape(inside.shape + (1,) * (x.ndim - inside.ndim))
    return jnp.where(inside, x, jnp.zeros((), x.dtype))


@_dropped.defjvp
def _dropped_jvp(primals: Any, tangents: Any) -> Any:
    x, inside = primals
    return _dropped(x, inside), _at_each_run(_scattered, tangents[0], inside)


def _at_each_run(
    function: Callable[[Any, Any], Any], x: chex.Array, inside: chex.Array
) -> chex.Array:
    """Applies `function(run[1, ...], index[1])`; the index of a run outside the table is 1."""
    # A scalar index would not do: JAX reads it by a slice, whose cotangents are not dropped.
    index = jnp.where(inside, np.uint32(0), np.uint32(1))[..., None]
    for _ in range(inside.ndim):
        function = jax.vmap(function)
    return jnp.squeeze(function(jnp.expand_dims(x, inside.ndim), index), inside.ndim)


def _gathered(run: chex.Array, index: chex.Array) -> chex.Array:
    return run.at[index].get(mode="promise_in_bounds")


def _scattered(run: chex.Array, index: chex.Array) -> chex.Array:
    return jnp.zeros_like(run).at[index].add(run, mode="promise_in_bounds")


# --- plans ----------------------------------------------------------------------------------------


def variables_of(atoms: Iterable[Any]) -> Iterator[Var]:
    return (x for x in atoms if isinstance(x, Var))


def not_tables(eqn: JaxprEqn, views: Sequence[View | None]) -> list[Any]:
    """The inputs of an equation that are not tables."""
    return [x for x, view in zip(eqn.invars, views, strict=True) if view is None]


# JAX caches the derivatives of jitted functions, such as the functions of jax.numpy. A jaxpr has
# bare primitives in their place, and JAX would differentiate each of them anew: tracing a model
# would take twice as long. So each primitive is jitted here, once for equal parameters.
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
    # keep the function alive, and JAX caches its derivatives anyway.
    can_cache = not eqn.effects and not any(_has_code(x) for x in eqn.params.values())
    if can_cache and _is_hashable(params):
        args = (x.val if isinstance(x, Literal) else env[x] for x in eqn.invars)
        with source_of(eqn), eqn.ctx.manager:
            results = _jitted(primitive, params)(*args)
        results = results if primitive.multiple_results else [results]
    else:
        # Let JAX run a jaxpr that has only this equation.
        ins = list(dict.fromkeys(variables_of(eqn.invars)))
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


class TableEquation:
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
      equations: in order, with a `TableEquation` for each that takes a table. Equations that only
        make a view of a table are left out.
      table_equations: the equations that take a table.
      outs: the atoms and views that it returns.
      sites: where it reads rows, in order.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        ins: Sequence[Var],
        equations: Sequence[JaxprEqn | TableEquation],
        outs: Sequence[Any],
    ) -> None:
        self.closed, self.ins, self.equations, self.outs = closed, ins, equations, outs
        self.table_equations = [eqn for eqn in equations if isinstance(eqn, TableEquation)]
        self.sites = [site for eqn in self.table_equations for site in eqn.sites]

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
          row_inputs: for each site, its rows if the table is one of `source.input_tables`. Else
            zeros, which are in effect added to the rows, so that the loss can be differentiated
            with respect to them; or `None` if it is not.
        """
        env, get = self._env(dict(zip(self.ins, args, strict=True)))
        indices: PerSite = []
        for eqn in self.equations:
            if not isinstance(eqn, TableEquation):
                _evaluate(self.closed.jaxpr, eqn, env)
                continue
            first_site = len(indices)
            site_inputs = row_inputs[first_site : first_site + len(eqn.sites)]
            with source_of(eqn.eqn):
                outs, site_indices = eqn.run(source, get, site_inputs)
            env.update(zip(eqn.outs, outs, strict=True))
            indices += site_indices
        return [get(x) for x in self.outs if not isinstance(x, View)], indices

    def _needed(self, atoms: Iterable[Any]) -> tuple[set[Var], list[JaxprEqn]]:
        """The variables and equations that the independent indices and these atoms depend on."""
        needed = {v for eqn in self.table_equations for v in variables_of(eqn.needed_atoms())}
        needed.update(variables_of(atoms))
        eqns = []
        for eqn in reversed(self.equations):
            if not isinstance(eqn, TableEquation) and not needed.isdisjoint(eqn.outvars):
                needed.update(variables_of(eqn.invars))
                eqns.append(eqn)
        return needed, eqns[::-1]

    def needed_ins(self, atoms: Sequence[Any] = ()) -> list[int]:
        """The positions of the `ins` that `values_and_indices` needs for these atoms."""
        needed, _ = self._needed(atoms)
        return [i for i, v in enumerate(self.ins) if v in needed]

    def indices(self, args: Mapping[int, Any]) -> PerSite:
        """The indices at each independent site; `None` at the others.

        Args:
          args: the values of the `ins` in `needed_ins()`, by position.
        """
        return self.values_and_indices(args, ())[1]

    def values_and_indices(
        self, args: Mapping[int, Any], atoms: Sequence[Any]
    ) -> tuple[list[Any], PerSite]:
        """Returns the values of some atoms, and `indices`.

        Args:
          args: the values of the `ins` in `needed_ins(atoms)`, by position.
          atoms: the atoms, such as those that a loop carries to its next iteration.
        """
        env, get = self._env({self.ins[i]: x for i, x in args.items()})
        for eqn in self._needed(atoms)[1]:
            _evaluate(self.closed.jaxpr, eqn, env)
        indices = [ids for eqn in self.table_equations for ids in eqn.indices(get)]
        return [get(x) for x in atoms], indices


# --- table equations: reads -----------------------------------------------------------------------


class Window(NamedTuple):
    """How an equation reads whole rows: in runs of rows at equal distances.

    Attributes:
      starts: the first row of each run: an atom of integers, or a NumPy integer.
      row_component: `None` if `starts` has one integer for each run. If it has an index vector for
        each run, along its last axis, this is the position of the row's index in the vector. The
        other components index axes of a row that are read whole, so each is 0 or out of bounds.
      run_length: the number of rows in a run; `None` if it is one row, for which the result has no
        axis.
      stride: the distance between the rows of a run.
      dropped: axes of a row, of size 1, that the result does not have.
      offset_axes: the axes of the result that have the rows of a run and their elements; `None` if
        they are the last ones.
      fill: the value of a run outside the table; `None` if such a run is moved into the table. A
        run is outside if any component of its index vector is out of bounds.
      moved_are_live: whether the loss is differentiated with respect to runs that were moved.
    """

    starts: Any
    row_component: int | None = None
    run_length: int | None = None
    stride: int = 1
    dropped: tuple[int, ...] = ()
    offset_axes: tuple[int, ...] | None = None
    fill: Any = None
    moved_are_live: bool = True


class Read(TableEquation):
    """An equation that reads rows."""

    def __init__(
        self, eqn: JaxprEqn, view: View, window: Window, live: bool, independent: bool
    ) -> None:
        self.has_constant_start = isinstance(window.starts, np.generic)
        super().__init__(eqn, [] if self.has_constant_start else [window.starts], eqn.outvars)
        self.view, self.window = view, window
        shape: tuple[int, ...] = () if self.has_constant_start else window.starts.aval.shape
        self.num_components = 1
        if window.row_component is not None:
            shape, self.num_components = shape[:-1], shape[-1]
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
        starts = jnp.asarray(window.starts if self.has_constant_start else get(window.starts))
        others_inside: Any = True
        if window.row_component is not None:
            others = [i for i in range(self.num_components) if i != window.row_component]
            if others:
                others_inside = (starts[..., np.array(others)] == 0).all(-1)
            starts = starts[..., window.row_component]
        span = 1 if window.run_length is None else (window.run_length - 1) * window.stride + 1
        # From a start below 0 or above `last`, a run would leave the table. `as_row_ids` makes such
        # a start `last + 1`.
        last = num_rows - span
        first = as_row_ids(starts, last + 1)
        row_inside = first <= last
        inside = row_inside & others_inside
        if window.fill is not None:
            first = jnp.where(inside, first, num_rows)
        else:
            first = jnp.where(row_inside, first, jnp.where(starts < 0, 0, last))
        if window.run_length is None:
            return first, inside
        run = window.stride * jnp.arange(window.run_length, dtype=jnp.int32)
        return jnp.minimum(first[..., None] + run, num_rows), inside

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        window, site = self.window, self.sites[0]
        ids, inside = self._ids(get)
        drops = window.fill is None and not window.moved_are_live
        # No index outside the table reads the same row as an index vector whose row is inside.
        is_one_index = window.run_length is None and self.num_components == 1
        ids_to_read = ids
        if drops and source.promised and is_one_index:
            # For these indices, the gather has JAX's derivatives with respect to the table.
            outside = jnp.where(ids == 0, -1, self.view.shape[0])
            ids_to_read = jnp.where(inside, ids, outside)
        rows = self.view.cast(source.rows(site, ids_to_read, row_inputs[0]))
        is_inside = inside.reshape(inside.shape + (1,) * (rows.ndim - inside.ndim))
        if window.fill is not None:
            rows = jnp.where(is_inside, rows, jnp.asarray(window.fill, rows.dtype))
        elif drops and not source.promised:
            rows = jnp.where(is_inside, rows, jax.lax.stop_gradient(rows))
        elif drops:
            if not is_one_index:
                rows = _at_each_run(_gathered, rows, inside)
            elif site.live:
                rows = _with_dropped_cotangents(rows, inside)
        if window.offset_axes is not None:
            last = range(rows.ndim - len(window.offset_axes), rows.ndim)
            rows = jnp.moveaxis(rows, last, window.offset_axes)
        return [rows], [ids]

    def needed_atoms(self) -> list[Any]:
        return list(self.ins) if self.sites[0].independent else []

    def indices(self, get: _Get) -> PerSite:
        return [self._ids(get)[0] if self.sites[0].independent else None]


# --- table equations: those with a jaxpr of their own ---------------------------------------------


class Inlined(TableEquation):
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


class Remat(Inlined):
    """`jax.checkpoint`."""

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        params = self.eqn.params
        run = functools.partial(self.plan.run, source)
        body = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
        return body([get(x) for x in self.ins], row_inputs)


class Scan(TableEquation):
    """`lax.scan`, and loops that use it (`lax.map`). A site has the reads of all iterations."""

    def __init__(
        self,
        eqn: JaxprEqn,
        plan: Plan,
        ins: Sequence[Any],
        outs: Sequence[Var],
        num_consts: int,
        num_carried: int,
    ) -> None:
        """The `ins` are constants, carried values, and arrays that are sliced by iteration.

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

    def _needed_positions(self) -> tuple[list[int], list[int]]:
        """The positions of the plan's `ins`, and of the carried values, that `indices` needs."""
        carried: list[int] = []
        while True:
            # The next iteration's value of a carried variable may be computed from more inputs.
            needed = self.plan.needed_ins([self.plan.outs[i] for i in carried])
            new = [i - self.num_consts for i in needed if self.num_consts <= i < self.first_sliced]
            if set(new) <= set(carried):
                return needed, carried
            carried = sorted({*new, *carried})

    def needed_atoms(self) -> list[Any]:
        return [self.ins[i] for i in self._needed_positions()[0]]

    def indices(self, get: _Get) -> PerSite:
        needed, carried = self._needed_positions()
        values = {i: get(self.ins[i]) for i in needed}
        consts = {i: x for i, x in values.items() if i < self.num_consts}
        sliced = {i: x for i, x in values.items() if i >= self.first_sliced}
        carried_ins = [self.num_consts + i for i in carried]

        def body(carry: Any, slices: Any) -> Any:
            args = {**consts, **dict(zip(carried_ins, carry, strict=True)), **slices}
            return self.plan.values_and_indices(args, [self.plan.outs[i] for i in carried])

        return self._loop(body, [values[i] for i in carried_ins], sliced)[1]


class Cond(TableEquation):
    """`lax.cond` and `lax.switch`: equal reads in several branches share a site."""

    def __init__(
        self,
        eqn: JaxprEqn,
        plans: Sequence[Plan],
        ins: Sequence[Any],
        outs: Sequence[Var],
        independent: bool,
    ) -> None:
        """The first of `ins` is the index of the branch to run; the others are its inputs.

        Args:
          independent: whether that index depends on no differentiated input and no effect.
        """
        super().__init__(eqn, ins, outs)
        self.plans = plans
        self.sites = []
        # For each branch, the positions of its sites in `self.sites`.
        self.site_positions = []
        for plan in plans:
            # A read shares the site of an equal read in an earlier branch. Two reads of one branch
            # do not share a site.
            unshared, positions = list(range(len(self.sites))), []
            for site in plan.sites:
                site = site._replace(independent=site.independent and independent)
                position = next((i for i in unshared if self.sites[i] == site), None)
                if position is None:
                    position = len(self.sites)
                    self.sites.append(site)
                else:
                    unshared.remove(position)
                positions.append(position)
            self.site_positions.append(positions)

    def _at_all_sites(self, branch: int, branch_indices: PerSite) -> PerSite:
        """The indices of a branch's reads; at other branches' sites, indices that mean no row."""
        ids: PerSite = [jnp.full(site.shape, site.view.shape[0], jnp.int32) for site in self.sites]
        for i, x in zip(self.site_positions[branch], branch_indices, strict=True):
            ids[i] = ids[i] if x is None else x
        return ids

    def run(self, source: Source, get: _Get, row_inputs: PerSite) -> tuple[list[Any], PerSite]:
        def run_branch(branch: int, values: list[Any], row_inputs: PerSite) -> Any:
            branch_inputs = [row_inputs[i] for i in self.site_positions[branch]]
            outs, indices = self.plans[branch].run(source, values, branch_inputs)
            return outs, self._at_all_sites(branch, indices)

        index, *values = (get(x) for x in self.ins)
        branches = [functools.partial(run_branch, i) for i in range(len(self.plans))]
        return jax.lax.switch(index, branches, values, row_inputs)

    @property
    def _has_independent_sites(self) -> bool:
        return any(site.independent for site in self.sites)

    def needed_atoms(self) -> list[Any]:
        if not self._has_independent_sites:
            return []
        needed = sorted({i for plan in self.plans for i in plan.needed_ins()})
        index, *branch_ins = self.ins
        return [index, *(branch_ins[i] for i in needed)]

    def indices(self, get: _Get) -> PerSite:
        if not self._has_independent_sites:
            return [None] * len(self.sites)

        def branch_indices(branch: int, values: dict[int, Any]) -> Any:
            plan = self.plans[branch]
            indices = plan.indices({i: values[i] for i in plan.needed_ins()})
            return self._at_all_sites(branch, indices)

        index, *branch_ins = self.ins
        values = {i: get(branch_ins[i]) for plan in self.plans for i in plan.needed_ins()}
        branches = [functools.partial(branch_indices, i) for i in range(len(self.plans))]
        indices = jax.lax.switch(get(index), branches, values)
        pairs = zip(self.sites, indices, strict=True)
        return [ids if site.independent else None for site, ids in pairs]


class ShardMap(TableEquation):
    """`jax.shard_map`. A site has the reads of all devices.

    Attributes:
      manual_axes: the axes of the mesh that it maps over.
      in_specs: the partition specs of the `ins`.
      site_specs: the partition specs of the indices and rows at each site. The first axis of these
        arrays has an entry for each device.
    """

    def __init__(
        self, eqn: JaxprEqn, plan: Plan, views: Sequence[View | None], outs: Sequence[Var]
    ) -> None:
        super().__init__(eqn, not_tables(eqn, views), outs)
        self.plan = plan
        specs = zip(eqn.params["in_specs"], views, strict=True)
        self.in_specs = [spec for spec, view in specs if view is None]
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
        # The site has the rows of all devices along these axes, so nothing is left to sum there.
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


class WholeTable(TableEquation):
    """Any other use of a table, through which the loss is not differentiated.

    (A planner also makes one for a use that it refuses. Such a plan is never run.)
    """

    def __init__(self, eqn: JaxprEqn, jaxpr: Jaxpr, views: Sequence[View | None]) -> None:
        super().__init__(eqn, not_tables(eqn, views), eqn.outvars)
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
