"""Reads of tables: where a traced loss reads rows of its tables, and those reads done otherwise.

A jaxpr becomes a `Plan`, and nothing is computed: each table is followed through casts, reshapes,
`jit`, `remat`, loops and branches to the places where rows of it are read. Between these steps
lie pieces that have nothing to do with a table, which JAX evaluates as they are. A plan is then
run with rows from anywhere; or asked for the indices of the rows alone, before any is read.
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
from adamjax.rows import in_table

__all__ = ["Place", "Plan", "Planner", "Slots", "Source", "View"]


class View(NamedTuple):
    """A table, or what a loss made of it: the same rows, each cast and reshaped."""

    table: int
    shape: tuple[int, ...]
    casts: tuple[tuple[Callable[..., chex.Array], tuple[Any, ...]], ...] = ()
    # Whether anything is differentiated by it.
    live: bool = True
    # Axes of `shard_map` over which its gradient is a sum.
    axes: tuple[str, ...] = ()

    def cast(self, x: chex.Array) -> chex.Array:
        """What became of rows, or of all of them."""
        return functools.reduce(lambda x, cast: cast[0](x, *cast[1]), self.casts, x)


class Place(NamedTuple):
    """Where rows are read.

    Attributes:
      view: what is read.
      shape: of the indices.
      trailing: the shape of a row as it is read.
      live: whether the loss is differentiated by what is read.
      free: whether the indices depend on nothing that the loss is differentiated by.
      varying: axes of `shard_map` over which what is read differs.
    """

    view: View
    shape: tuple[int, ...]
    trailing: tuple[int, ...]
    live: bool
    free: bool
    varying: tuple[str, ...]


# For each place, in order, an array or None.
Slots = list[Any]
_Get = Callable[[Any], Any]


class Source(NamedTuple):
    """Where rows come from.

    Attributes:
      held: a pytree of arrays, that which the functions look into.
      look: `(held, table, int32[...]) -> rows`.
      whole: `(held, table) -> array`, for uses that are not differentiated.
      given: the tables whose rows are given as what the loss is differentiated by.
    """

    held: Any
    look: Callable[[Any, int, chex.Array], chex.Array]
    whole: Callable[[Any, int], chex.Array]
    given: frozenset[int]

    def rows(self, place: Place, ids: chex.Array, x: Any) -> chex.Array:
        """The rows of a place, in the table's dtype; anything where an index is no row's."""
        if place.view.table in self.given:
            return x
        rows = self.look(self.held, place.view.table, ids)
        rows = rows.reshape(*place.shape, *place.trailing)
        return rows if x is None else _perturbed(rows, x)

    def all(self, view: View) -> chex.Array:
        return view.cast(self.whole(self.held, view.table).reshape(view.shape))


@jax.custom_jvp
def _perturbed(rows: chex.Array, x: chex.Array) -> chex.Array:
    """`rows + x` for its derivative; but x is zero, and the rows keep their bits."""
    return rows


@_perturbed.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[0] + tangents[1]


# --- plans ----------------------------------------------------------------------------------------


def _variables(atoms: Iterable[Any]) -> Iterator[Var]:
    return (x for x in atoms if isinstance(x, Var))


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


# JAX keeps the derivative of a jitted function, as most of jax.numpy's are. In a jaxpr these are
# bare primitives, each of which it would derive anew: twice the time to trace a model.
@functools.lru_cache(maxsize=4096)
def _jitted(primitive: Any, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
        return primitive.bind(*args, **dict(params))

    function.__name__ = primitive.name
    return jax.jit(function, inline=True)


def _evaluate(jaxpr: Jaxpr, eqn: JaxprEqn, env: dict[Var, Any]) -> None:
    """Sets the variables that one of a jaxpr's equations sets."""
    primitive, params = eqn.primitive, tuple(eqn.params.items())
    # What has code of its own keeps that from being forgotten; and JAX keeps its derivative.
    bare = not eqn.effects and not any(_has_code(x) for x in eqn.params.values())
    if bare and _is_hashable(params):
        args = (x.val if isinstance(x, Literal) else env[x] for x in eqn.invars)
        with at(eqn), eqn.ctx.manager:
            found = _jitted(primitive, params)(*args)
        found = found if primitive.multiple_results else [found]
    else:
        ins = list(dict.fromkeys(_variables(eqn.invars)))
        about = jaxpr.debug_info._replace(
            arg_names=("",) * len(ins), result_paths=("",) * len(eqn.outvars)
        )
        body = ClosedJaxpr(Jaxpr([], ins, eqn.outvars, [eqn], jaxpr.effects, about), ())
        found = jaxpr_as_fun(body)(*(env[v] for v in ins))
    env.update(zip(eqn.outvars, found, strict=True))


def _has_code(x: Any) -> bool:
    """Whether a parameter is a jaxpr or a function, or has some."""
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
    """An equation that has to do with a table.

    Attributes:
      ins, outs: the atoms that it reads and the variables that it sets, views not among them.
    """

    def __init__(self, eqn: JaxprEqn, ins: Sequence[Any], outs: Sequence[Var]) -> None:
        self.eqn, self.ins, self.outs = eqn, ins, outs
        self.places: Sequence[Place] = ()

    def run(self, source: Source, get: _Get, xs: Slots) -> tuple[list[Any], Slots]:
        """The values of `outs`, and the indices of each place."""
        raise NotImplementedError

    def needs(self) -> list[Any]:
        """The atoms that `indices` reads."""
        raise NotImplementedError

    def indices(self, get: _Get) -> Slots:
        """The indices of each place that is free."""
        raise NotImplementedError


class Plan:
    """A jaxpr whose tables are known.

    Attributes:
      ins: the variables that it takes; no table is among them.
      items: in order, equations that have nothing to do with a table, and steps.
      outs: the atoms that it returns, and views.
      places: where rows are read, in order.
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
        self.places = [place for step in self.steps for place in step.places]

    def _env(self, known: Mapping[Var, Any]) -> tuple[dict[Var, Any], _Get]:
        consts = zip(self.closed.jaxpr.constvars, self.closed.consts, strict=True)
        env = {**dict(consts), **known}
        return env, lambda x: x.val if isinstance(x, Literal) else env[x]

    def run(self, source: Source, args: Sequence[Any], xs: Slots) -> tuple[list[Any], Slots]:
        """The values of those `outs` that are no views, and the indices of each place.

        Args:
          args: the values of `ins`.
          xs: for each place what to differentiate by.
        """
        env, get = self._env(dict(zip(self.ins, args, strict=True)))
        indices: Slots = []
        for item in self.items:
            if not isinstance(item, _Step):
                _evaluate(self.closed.jaxpr, item, env)
                continue
            mine = xs[len(indices) : len(indices) + len(item.places)]
            with at(item.eqn):
                outs, found = item.run(source, get, mine)
            env.update(zip(item.outs, outs, strict=True))
            indices += found
        return [get(x) for x in self.outs if not isinstance(x, View)], indices

    def _needed(self, outs: Iterable[Any]) -> tuple[set[Var], list[JaxprEqn]]:
        """For the free indices and some atoms: what must be known, and what must be computed."""
        needed = {v for step in self.steps for v in _variables(step.needs())}
        needed.update(_variables(outs))
        eqns = []
        for item in reversed(self.items):
            if not isinstance(item, _Step) and not needed.isdisjoint(item.outvars):
                needed.update(_variables(item.invars))
                eqns.append(item)
        return needed, eqns[::-1]

    def needs(self, outs: Sequence[Any] = ()) -> list[int]:
        """Which of `ins` must be known for `indices`."""
        needed, _ = self._needed(outs)
        return [i for i, v in enumerate(self.ins) if v in needed]

    def indices(self, args: Mapping[int, Any], outs: Sequence[Any] = ()) -> tuple[list[Any], Slots]:
        """The values of some atoms, and the indices of each place that is free.

        Args:
          args: the values of those of `ins` that `needs` says.
        """
        env, get = self._env({self.ins[i]: x for i, x in args.items()})
        for eqn in self._needed(outs)[1]:
            _evaluate(self.closed.jaxpr, eqn, env)
        found = [ids for step in self.steps for ids in step.indices(get)]
        return [get(x) for x in outs], found


# --- steps: reads ---------------------------------------------------------------------------------


class _Window(NamedTuple):
    """How an equation reads whole rows: where runs of rows start, and how they come to lie.

    Attributes:
      starts: an atom or array of integers; `column` of its last axis, where that is not `None`.
      run: how many rows a run has; `None` for one without an axis.
      stride: the rows' distance in a run.
      dropped: axes of a row (of size 1) that are left out.
      offsets: where the axes of a run come to lie in the result; `None` for last.
      fill: what stands for a run that is not in the table; else it is moved into the table.
      moved: whether the loss is differentiated by runs that were moved.
    """

    starts: Any
    column: int | None = None
    run: int | None = None
    stride: int = 1
    dropped: tuple[int, ...] = ()
    offsets: tuple[int, ...] | None = None
    fill: Any = None
    moved: bool = True


# The largest part of a table's rows that a slice may have to count as a read.
_SLICED = 0.5


def _window(eqn: JaxprEqn, view: View) -> _Window | None:
    """How an equation reads whole rows of its first operand, if that is what it does."""
    params, (num_rows, *trailing) = eqn.params, view.shape
    kind = eqn.primitive.name
    if kind == "gather":
        numbers, (run, *sizes) = params["dimension_numbers"], params["slice_sizes"]
        mode, starts = params["mode"], numbers.start_index_map
        modes = jax.lax.GatherScatterMode
        fills = mode == modes.FILL_OR_DROP
        if (
            0 not in starts
            or mode not in (modes.CLIP, modes.FILL_OR_DROP, modes.PROMISE_IN_BOUNDS)
            or sizes != trailing
            or numbers.operand_batching_dims
            or (fills and len(starts) > 1)
        ):
            return None
        collapsed = numbers.collapsed_slice_dims
        fill = None
        if fills:
            fill = np.nan if params["fill_value"] is None else params["fill_value"]
        return _Window(
            eqn.invars[1],
            column=starts.index(0),
            run=None if 0 in collapsed else run,
            dropped=tuple(d for d in collapsed if d > 0),
            offsets=numbers.offset_dims,
            fill=fill,
            # JAX promises nothing there; this is what it does.
            moved=mode != modes.PROMISE_IN_BOUNDS,
        )
    if kind == "dynamic_slice":
        run, *sizes = params["slice_sizes"]
        whole = sizes == trailing and run <= max(1, _SLICED * num_rows)
        return _Window(eqn.invars[1], run=run) if whole else None
    if kind == "slice":
        start, *others = params["start_indices"]
        stop, *ends = params["limit_indices"]
        stride, *steps = params["strides"] or [1] * len(view.shape)
        run = -(-(stop - start) // stride)
        whole = not any(others) and ends == trailing and set(steps) <= {1}
        if whole and run <= max(1, _SLICED * num_rows):
            return _Window(np.int32(start), run=run, stride=stride)
    return None


class _Read(_Step):
    """Rows are read."""

    def __init__(self, eqn: JaxprEqn, view: View, window: _Window, live: bool, free: bool) -> None:
        super().__init__(eqn, [window.starts], eqn.outvars)
        self.view, self.window = view, window
        starts = window.starts
        shape = starts.shape if isinstance(starts, np.generic) else starts.aval.shape
        shape = shape if window.column is None else shape[:-1]
        if window.run is not None:
            shape = (*shape, window.run)
        trailing = tuple(n for d, n in enumerate(view.shape) if d > 0 and d not in window.dropped)
        varying = varying_axes(eqn.outvars[0].aval)
        self.places = [Place(view, shape, trailing, live and view.live, free, varying)]

    def _ids(self, get: _Get) -> tuple[chex.Array, chex.Array]:
        """The rows' indices, the number of rows for none; and whether runs are in the table."""
        window, num_rows = self.window, self.view.shape[0]
        starts = window.starts
        starts = jnp.asarray(starts if isinstance(starts, np.generic) else get(starts))
        if window.column is not None:
            starts = starts[..., window.column]
        length = 1 if window.run is None else (window.run - 1) * window.stride + 1
        last = num_rows - length
        first = in_table(starts, last + 1)
        inside = first <= last
        outside = num_rows if window.fill is not None else jnp.where(starts < 0, 0, last)
        first = jnp.where(inside, first, outside)
        if window.run is None:
            return first, inside
        run = window.stride * jnp.arange(window.run, dtype=jnp.int32)
        return jnp.minimum(first[..., None] + run, num_rows), inside

    def run(self, source: Source, get: _Get, xs: Slots) -> tuple[list[Any], Slots]:
        window, place = self.window, self.places[0]
        ids, inside = self._ids(get)
        rows = self.view.cast(source.rows(place, ids, xs[0]))
        inside = inside.reshape(inside.shape + (1,) * (rows.ndim - inside.ndim))
        if window.fill is not None:
            rows = jnp.where(inside, rows, jnp.asarray(window.fill, rows.dtype))
        elif not window.moved:
            rows = jnp.where(inside, rows, jax.lax.stop_gradient(rows))
        if window.offsets is not None:
            last = range(rows.ndim - len(window.offsets), rows.ndim)
            rows = jnp.moveaxis(rows, last, window.offsets)
        return [rows], [ids]

    def needs(self) -> list[Any]:
        return list(self.ins) if self.places[0].free else []

    def indices(self, get: _Get) -> Slots:
        return [self._ids(get)[0] if self.places[0].free else None]


# --- steps: what has a jaxpr of its own -----------------------------------------------------------


class _Inlined(_Step):
    """A call whose equations are taken for the caller's own, as of `jit`."""

    def __init__(self, eqn: JaxprEqn, plan: Plan, ins: Sequence[Any], outs: Sequence[Var]) -> None:
        super().__init__(eqn, ins, outs)
        self.plan, self.places = plan, plan.places

    def run(self, source: Source, get: _Get, xs: Slots) -> tuple[list[Any], Slots]:
        values = [self._laid("in_shardings", self.eqn.invars, x, get(x)) for x in self.ins]
        outs, ids = self.plan.run(source, values, xs)
        pairs = zip(self.outs, outs, strict=True)
        return [self._laid("out_shardings", self.eqn.outvars, v, x) for v, x in pairs], ids

    def _laid(self, name: str, variables: Sequence[Any], variable: Any, value: Any) -> Any:
        """A value with the sharding that the call asks for."""
        asked = self.eqn.params.get(name)
        sharding = asked[list(variables).index(variable)] if asked else None
        if not isinstance(sharding, jax.sharding.Sharding):
            return value
        return jax.lax.with_sharding_constraint(value, sharding)

    def needs(self) -> list[Any]:
        return [self.ins[i] for i in self.plan.needs()]

    def indices(self, get: _Get) -> Slots:
        return self.plan.indices({i: get(self.ins[i]) for i in self.plan.needs()})[1]


class _Remat(_Inlined):
    """`jax.checkpoint`."""

    def run(self, source: Source, get: _Get, xs: Slots) -> tuple[list[Any], Slots]:
        params = self.eqn.params
        run = functools.partial(self.plan.run, source)
        body = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
        return body([get(x) for x in self.ins], xs)


class _Scan(_Step):
    """`lax.scan`, and loops that are made of it: reads of all rounds are one place."""

    def __init__(
        self,
        eqn: JaxprEqn,
        plan: Plan,
        ins: Sequence[Any],
        outs: Sequence[Var],
        consts: int,
        carried: int,
    ) -> None:
        """Consts, carried: how many of `ins` are consts and carry."""
        super().__init__(eqn, ins, outs)
        self.plan, self.consts, self.carried = plan, consts, carried
        length = eqn.params["length"]
        self.places = [p._replace(shape=(length, *p.shape)) for p in plan.places]

    def _loop(self, body: Any, init: Any, xs: Any) -> Any:
        params = self.eqn.params
        kinds = {k: params[k] for k in ("length", "reverse", "unroll")}
        return jax.lax.scan(body, init, xs, **kinds)

    def run(self, source: Source, get: _Get, xs: Slots) -> tuple[list[Any], Slots]:
        values = [get(x) for x in self.ins]
        consts, init = values[: self.consts], values[self.consts :][: self.carried]

        def body(carry: Any, each: Any) -> Any:
            outs, ids = self.plan.run(source, [*consts, *carry, *each[0]], each[1])
            return outs[: self.carried], (outs[self.carried :], ids)

        each = values[self.consts + self.carried :]
        carry, (ys, ids) = self._loop(body, init, (each, xs))
        return [*carry, *ys], ids

    def _needs(self) -> tuple[list[int], list[int]]:
        """Which of the plan's `ins` must be known for `indices`, and which of the carry."""
        carried: list[int] = []
        while True:
            needed = self.plan.needs([self.plan.outs[i] for i in carried])
            end = self.consts + self.carried
            new = [i - self.consts for i in needed if self.consts <= i < end]
            if set(new) <= set(carried):
                return needed, carried
            carried = sorted({*new, *carried})

    def needs(self) -> list[Any]:
        return [self.ins[i] for i in self._needs()[0]]

    def indices(self, get: _Get) -> Slots:
        needed, carried = self._needs()
        known = {i: get(self.ins[i]) for i in needed}
        first = self.consts + self.carried
        consts = {i: x for i, x in known.items() if i < self.consts}
        each = {i: x for i, x in known.items() if i >= first}
        keys = [self.consts + i for i in carried]

        def body(carry: Any, each: Any) -> Any:
            now = {**consts, **dict(zip(keys, carry, strict=True)), **each}
            return self.plan.indices(now, [self.plan.outs[i] for i in carried])

        return self._loop(body, [known[i] for i in keys], each)[1]


class _Cond(_Step):
    """`lax.cond` and `lax.switch`: reads of one kind in several branches share a place."""

    def __init__(
        self,
        eqn: JaxprEqn,
        plans: Sequence[Plan],
        ins: Sequence[Any],
        outs: Sequence[Var],
        free: bool,
    ) -> None:
        """Free: whether the branch that is taken depends on nothing that is differentiated."""
        super().__init__(eqn, ins, outs)
        self.plans = plans
        self.places, self.shared = [], []
        for plan in plans:
            unused, mine = list(enumerate(self.places)), []
            for place in plan.places:
                place = place._replace(free=place.free and free)
                found = next((i for i, (_, p) in enumerate(unused) if p == place), None)
                mine.append(len(self.places) if found is None else unused.pop(found)[0])
                if found is None:
                    self.places.append(place)
            self.shared.append(mine)

    def _indices(self, plan: int, found: Slots) -> Slots:
        """What a branch read, with no row at the places of others."""
        ids: Slots = [
            jnp.full(place.shape, place.view.shape[0], jnp.int32) for place in self.places
        ]
        for i, x in zip(self.shared[plan], found, strict=True):
            ids[i] = ids[i] if x is None else x
        return ids

    def run(self, source: Source, get: _Get, xs: Slots) -> tuple[list[Any], Slots]:
        def branch(number: int, values: list[Any], xs: Slots) -> Any:
            mine = [xs[i] for i in self.shared[number]]
            outs, found = self.plans[number].run(source, values, mine)
            return outs, self._indices(number, found)

        which, *values = (get(x) for x in self.ins)
        branches = [functools.partial(branch, i) for i in range(len(self.plans))]
        return jax.lax.switch(which, branches, values, xs)

    def needs(self) -> list[Any]:
        if not any(place.free for place in self.places):
            return []
        needed = sorted({i for plan in self.plans for i in plan.needs()})
        return [self.ins[0], *(self.ins[i + 1] for i in needed)]

    def indices(self, get: _Get) -> Slots:
        if not any(place.free for place in self.places):
            return [None] * len(self.places)

        def branch(number: int, known: dict[int, Any]) -> Any:
            plan = self.plans[number]
            return self._indices(number, plan.indices({i: known[i] for i in plan.needs()})[1])

        known = {i: get(self.ins[i + 1]) for plan in self.plans for i in plan.needs()}
        branches = [functools.partial(branch, i) for i in range(len(self.plans))]
        found = jax.lax.switch(get(self.ins[0]), branches, known)
        pairs = zip(self.places, found, strict=True)
        return [ids if place.free else None for place, ids in pairs]


class _ShardMap(_Step):
    """`jax.shard_map`: what its devices read are rows of one place."""

    def __init__(
        self, eqn: JaxprEqn, plan: Plan, held: Sequence[View | None], outs: Sequence[Var]
    ) -> None:
        pairs = [*zip(eqn.invars, eqn.params["in_specs"], held, strict=True)]
        super().__init__(eqn, [x for x, _, view in pairs if view is None], outs)
        self.plan, self.specs = plan, [spec for _, spec, view in pairs if view is None]
        self.mesh, manual = eqn.params["mesh"], eqn.params["newly_manual_axes"]
        self.manual = tuple(axis for axis in self.mesh.axis_names if axis in manual)
        axes = [self._axes(place) for place in plan.places]
        self.places = [self._place(*pair) for pair in zip(plan.places, axes, strict=True)]
        self.rows = [jax.sharding.PartitionSpec(some) for some in axes]

    def _axes(self, place: Place) -> tuple[str, ...]:
        """Over which axes the devices read rows of their own, as far as can be told."""
        told = self.eqn.params["check_vma"]
        return tuple(x for x in self.manual if not told or x in place.varying)

    def _place(self, place: Place, axes: tuple[str, ...]) -> Place:
        devices = math.prod(self.mesh.shape[axis] for axis in axes)
        view = place.view._replace(axes=tuple(x for x in place.view.axes if x not in axes))
        varying = tuple(x for x in place.varying if x not in self.manual)
        return place._replace(view=view, shape=(devices, *place.shape), varying=varying)

    def _mapped(self, body: Any, args: Any, in_specs: Any, out_specs: Any) -> Any:
        options = {"axis_names": set(self.manual), "check_vma": self.eqn.params["check_vma"]}
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(body, mesh=self.mesh, **specs, **options)(*args)

    def run(self, source: Source, get: _Get, xs: Slots) -> tuple[list[Any], Slots]:
        def body(held: Any, values: list[Any], xs: Slots) -> Any:
            mine = [None if x is None else x[0] for x in xs]
            outs, ids = self.plan.run(source._replace(held=held), values, mine)
            return outs, [x[None] for x in ids]

        of_xs = [None if x is None else spec for x, spec in zip(xs, self.rows, strict=True)]
        out_specs = list(self.eqn.params["out_specs"]), self.rows
        args = source.held, [get(x) for x in self.ins], xs
        everywhere = jax.sharding.PartitionSpec()
        return self._mapped(body, args, (everywhere, self.specs, of_xs), out_specs)

    def needs(self) -> list[Any]:
        return [self.ins[i] for i in self.plan.needs()]

    def indices(self, get: _Get) -> Slots:
        needed = self.plan.needs()
        free = [i for i, place in enumerate(self.places) if place.free]

        def body(known: list[Any]) -> Slots:
            found = self.plan.indices(dict(zip(needed, known, strict=True)))[1]
            return [found[i][None] for i in free]

        args, specs = [get(self.ins[i]) for i in needed], [self.specs[i] for i in needed]
        found = self._mapped(body, (args,), (specs,), [self.rows[i] for i in free])
        ids: Slots = [None] * len(self.places)
        for i, x in zip(free, found, strict=True):
            ids[i] = x
        return ids


class _Whole(_Step):
    """A table is used in any other way, but nothing is differentiated there."""

    def __init__(self, eqn: JaxprEqn, jaxpr: Jaxpr, held: Sequence[View | None]) -> None:
        ins = [x for x, view in zip(eqn.invars, held, strict=True) if view is None]
        super().__init__(eqn, ins, eqn.outvars)
        self.jaxpr, self.held = jaxpr, held

    def run(self, source: Source, get: _Get, xs: Slots) -> tuple[list[Any], Slots]:
        env = {
            x: get(x) if view is None else source.all(view)
            for x, view in zip(self.eqn.invars, self.held, strict=True)
            if isinstance(x, Var)
        }
        _evaluate(self.jaxpr, self.eqn, env)
        return [env[v] for v in self.outs], []

    def needs(self) -> list[Any]:
        return []

    def indices(self, get: _Get) -> Slots:
        return []


# --- from a jaxpr to its plan ---------------------------------------------------------------------


def _live(jaxpr: Jaxpr, outs: Sequence[bool]) -> set[Any]:
    """The variables through which some results are differentiated."""
    pairs = zip(jaxpr.outvars, outs, strict=True)
    live = {v for v, is_live in pairs if is_live and isinstance(v, Var)}
    for eqn in reversed(jaxpr.eqns):
        name = eqn.primitive.name
        # What has an effect other than to be shown may come back in another way.
        seen = not live.isdisjoint(eqn.outvars) or (eqn.effects and not name.startswith("debug"))
        if seen and name != "stop_gradient":
            live.update(v for v in _variables(eqn.invars) if _is_float(v))
    return live


def _scan_sizes(eqn: JaxprEqn) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried.

    JAX's releases write these numbers in different ways, but the types tell them: an array that is
    stacked has one dimension more than its part in a round.
    """
    body = eqn.params["jaxpr"]

    def stacked(variables: Sequence[Any], rounds: Sequence[Any]) -> int:
        pairs = zip(variables, rounds, strict=True)
        return sum(np.ndim(v.aval) > np.ndim(each) for v, each in pairs)

    carried = len(eqn.outvars) - stacked(eqn.outvars, body.out_avals)
    return len(eqn.invars) - stacked(eqn.invars, body.in_avals) - carried, carried


def _is_float(v: Any) -> bool:
    return jnp.issubdtype(getattr(v.aval, "dtype", jax.dtypes.float0), jnp.inexact)


def _tainted(jaxpr: Jaxpr, ins: Sequence[bool]) -> set[Any]:
    """The variables that depend on some of those that come in, or on the world outside."""
    tainted = {v for v, is_tainted in zip(jaxpr.invars, ins, strict=True) if is_tainted}
    for eqn in jaxpr.eqns:
        if eqn.effects or not tainted.isdisjoint(_variables(eqn.invars)):
            tainted.update(eqn.outvars)
    return tainted


class Planner:
    """Makes plans, and notes the tables that cannot be followed.

    Attributes:
      exact: whether nothing may read a table as it is, differentiated or not.
      refused: by table, the equation that uses it in another way, `None` for the return.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.refused: dict[int, JaxprEqn | None] = {}

    def refuse(
        self, views: Iterable[Any], eqn: JaxprEqn | None, jaxpr: Jaxpr | None = None
    ) -> None:
        if eqn is not None and jaxpr is not None and eqn.primitive.name == "transpose":
            # What it is transposed for says more.
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
        jaxpr = closed.jaxpr
        known = {v: view for v, view in zip(jaxpr.invars, views, strict=True) if view is not None}
        live, tainted = _live(jaxpr, live_outs), _tainted(jaxpr, tainted_ins)
        items: list[Any] = []
        for eqn in jaxpr.eqns:
            held = [known.get(x) if isinstance(x, Var) else None for x in eqn.invars]
            if not any(view is not None for view in held):
                items.append(eqn)
                continue
            view = self._followed(eqn, held)
            if view is not None:
                known[eqn.outvars[0]] = view
                continue
            step, new = self._step(jaxpr, eqn, held, tainted, live)
            known.update(new)
            items.append(step)
        outs = [known.get(x, x) if isinstance(x, Var) else x for x in jaxpr.outvars]
        return Plan(closed, [v for v in jaxpr.invars if v not in known], items, outs)

    def _followed(self, eqn: JaxprEqn, held: Sequence[View | None]) -> View | None:
        """What an equation makes of a table, if it has the same rows."""
        view, kind, params = held[0], eqn.primitive.name, eqn.params
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
            same = shape[:1] == view.shape[:1] and math.prod(shape) == math.prod(view.shape)
            return view._replace(shape=shape) if same else None
        return None

    def _step(
        self,
        jaxpr: Jaxpr,
        eqn: JaxprEqn,
        held: Sequence[View | None],
        tainted: set[Any],
        live: set[Any],
    ) -> tuple[Any, dict[Var, View]]:
        """The step of an equation that has to do with tables, and views among its results."""
        kind, params = eqn.primitive.name, eqn.params
        is_tainted = [isinstance(x, Var) and x in tainted for x in eqn.invars]
        is_live = [v in live for v in eqn.outvars]
        ins = [x for x, view in zip(eqn.invars, held, strict=True) if view is None]
        if held[0] is not None and not any(held[1:]):
            window = _window(eqn, held[0])
            if window is not None:
                return _Read(eqn, held[0], window, any(is_live), not any(is_tainted[1:])), {}
        if kind in ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"):
            closed = _closed(params["jaxpr" if "jaxpr" in params else "call_jaxpr"])
            plan = self.plan(closed, held, is_tainted, is_live)
            outs, new = _split(eqn.outvars, plan.outs)
            make = _Remat if kind in ("remat2", "checkpoint") else _Inlined
            return make(eqn, plan, ins, outs), new
        # Older shard_maps write specs in another way; a table that is split has rows elsewhere.
        if kind == "shard_map" and "newly_manual_axes" in params:
            split = zip(held, params["in_specs"], strict=True)
            if not any(view is not None and any(spec) for view, spec in split):
                plan = self.plan(_closed(params["jaxpr"]), held, is_tainted, is_live)
                self.refuse((x for x in plan.outs if isinstance(x, View)), eqn)
                return _ShardMap(eqn, plan, held, eqn.outvars), {}
        if kind == "scan":
            return self._scan(eqn, held, is_tainted, is_live)
        if kind == "cond" and held[0] is None:
            plans = [
                self.plan(_closed(branch), held[1:], is_tainted[1:], is_live)
                for branch in params["branches"]
            ]
            # A table that only some branches return is none that can be followed.
            for results in zip(*(plan.outs for plan in plans), strict=True):
                found = [x for x in results if isinstance(x, View)]
                if found and results != (found[0],) * len(plans):
                    self.refuse(found, eqn)
            outs, new = _split(eqn.outvars, plans[0].outs)
            return _Cond(eqn, plans, ins, outs, not is_tainted[0]), new
        has_effect = bool(eqn.effects) and not kind.startswith("debug")
        if self.exact or has_effect or any(is_live):
            used = (view for view in held if view is not None and (self.exact or view.live))
            self.refuse(used, eqn, jaxpr)
        return _Whole(eqn, jaxpr, held), {}

    def _scan(
        self,
        eqn: JaxprEqn,
        held: Sequence[View | None],
        is_tainted: list[bool],
        is_live: list[bool],
    ) -> tuple[Any, dict[Var, View]]:
        closed, (consts, carry) = eqn.params["jaxpr"], _scan_sizes(eqn)
        self.refuse(held[consts + carry :], eqn)
        is_live[:carry] = [any(is_live)] * carry
        while True:
            tainted = _tainted(closed.jaxpr, is_tainted)
            after = [
                old or (isinstance(new, Var) and new in tainted)
                for old, new in zip(
                    is_tainted[consts : consts + carry], closed.jaxpr.outvars[:carry], strict=True
                )
            ]
            if after == is_tainted[consts : consts + carry]:
                break
            is_tainted[consts : consts + carry] = after
        plan = self.plan(closed, held, is_tainted, is_live)
        # What is carried must stay the same table; what is stacked cannot be one.
        for before, x in itertools.zip_longest(held[consts : consts + carry], plan.outs):
            if (before is not None or isinstance(x, View)) and before != x:
                self.refuse([before, x if isinstance(x, View) else None], eqn)
        outs, new = _split(eqn.outvars, plan.outs)
        ins = [x for x, view in zip(eqn.invars, held, strict=True) if view is None]
        free = [view is None for view in held]
        return _Scan(eqn, plan, ins, outs, sum(free[:consts]), sum(free[consts:][:carry])), new


def _split(variables: Sequence[Var], values: Sequence[Any]) -> tuple[list[Var], dict[Var, View]]:
    """Variables that take the values of atoms, and those that take views."""
    views = {v: x for v, x in zip(variables, values, strict=True) if isinstance(x, View)}
    return [v for v in variables if v not in views], views
