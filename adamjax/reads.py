"""Finds where a traced loss reads rows of its tables.

A `Planner` turns a jaxpr into a `Plan` without computing anything. It follows each table through
casts, reshapes, `jit`, `remat`, `scan`, `cond` and `shard_map` to the sites where its rows are
read, and makes a `TableEquation` of each equation that takes a table.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from adamjax.plans import (
    Cond,
    Inlined,
    Plan,
    Read,
    Remat,
    Scan,
    ShardMap,
    View,
    WholeTable,
    Window,
    not_tables,
    variables_of,
)

__all__ = ["Planner"]


# --- equations that read rows ---------------------------------------------------------------------


# A slice is a read of rows if it has at most this fraction of the table's rows, or only one row.
_LARGEST_FRACTION = 0.5


def _is_small_slice(run_length: int, num_rows: int) -> bool:
    return run_length <= max(1, _LARGEST_FRACTION * num_rows)


def _window(eqn: JaxprEqn, view: View) -> Window | None:
    """How an equation reads whole rows of its first operand; `None` if it does not."""
    makers = {
        "gather": _gather_window,
        "dynamic_slice": _dynamic_slice_window,
        "slice": _slice_window,
    }
    make = makers.get(eqn.primitive.name)
    return None if make is None else make(eqn, view)


def _gather_window(eqn: JaxprEqn, view: View) -> Window | None:
    params, (_, *trailing) = eqn.params, view.shape
    numbers, (run_length, *sizes) = params["dimension_numbers"], params["slice_sizes"]
    mode, start_dims = params["mode"], numbers.start_index_map
    modes = jax.lax.GatherScatterMode
    if (
        0 not in start_dims
        or mode not in (modes.CLIP, modes.FILL_OR_DROP, modes.PROMISE_IN_BOUNDS)
        or sizes != trailing
        or numbers.operand_batching_dims
    ):
        return None
    collapsed = numbers.collapsed_slice_dims
    fill = None
    if mode == modes.FILL_OR_DROP:
        fill = np.nan if params["fill_value"] is None else params["fill_value"]
    return Window(
        eqn.invars[1],
        row_component=start_dims.index(0),
        run_length=None if 0 in collapsed else run_length,
        dropped=tuple(d for d in collapsed if d > 0),
        offset_axes=numbers.offset_dims,
        fill=fill,
        # With PROMISE_IN_BOUNDS, JAX moves a run outside the table into it, but drops the gradient
        # of this run (undocumented).
        moved_are_live=mode != modes.PROMISE_IN_BOUNDS,
    )


def _dynamic_slice_window(eqn: JaxprEqn, view: View) -> Window | None:
    num_rows, *trailing = view.shape
    run_length, *sizes = eqn.params["slice_sizes"]
    if sizes != trailing or not _is_small_slice(run_length, num_rows):
        return None
    return Window(eqn.invars[1], run_length=run_length)


def _slice_window(eqn: JaxprEqn, view: View) -> Window | None:
    params, (num_rows, *trailing) = eqn.params, view.shape
    start, *other_starts = params["start_indices"]
    stop, *other_stops = params["limit_indices"]
    stride, *other_strides = params["strides"] or [1] * len(view.shape)
    run_length = -(-(stop - start) // stride)
    is_whole = not any(other_starts) and other_stops == trailing and set(other_strides) <= {1}
    if not is_whole or not _is_small_slice(run_length, num_rows):
        return None
    return Window(np.int32(start), run_length=run_length, stride=stride)


# --- from a jaxpr to its plan ---------------------------------------------------------------------


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _has_effect(eqn: JaxprEqn) -> bool:
    """Whether an equation has an effect other than a debug print."""
    return bool(eqn.effects) and not eqn.primitive.name.startswith("debug")


def _is_float(v: Any) -> bool:
    return jnp.issubdtype(getattr(v.aval, "dtype", jax.dtypes.float0), jnp.inexact)


def _live_variables(jaxpr: Jaxpr, live_outs: Sequence[bool]) -> set[Any]:
    """The variables through which the loss is differentiated.

    Args:
      live_outs: whether the loss is differentiated through each result.
    """
    pairs = zip(jaxpr.outvars, live_outs, strict=True)
    live = {v for v, is_live in pairs if is_live and isinstance(v, Var)}
    for eqn in reversed(jaxpr.eqns):
        # An effect, such as a write to a mutable array, may carry its inputs to another equation.
        is_used = not live.isdisjoint(eqn.outvars) or _has_effect(eqn)
        if is_used and eqn.primitive.name != "stop_gradient":
            live.update(v for v in variables_of(eqn.invars) if _is_float(v))
    return live


def _dependent_variables(jaxpr: Jaxpr, dependent_ins: Sequence[bool]) -> set[Any]:
    """The variables that depend on some of the inputs, or on an effect.

    Args:
      dependent_ins: whether each input depends on the differentiated inputs of the loss.
    """
    pairs = zip(jaxpr.invars, dependent_ins, strict=True)
    dependent = {v for v, is_dependent in pairs if is_dependent}
    for eqn in jaxpr.eqns:
        if eqn.effects or not dependent.isdisjoint(variables_of(eqn.invars)):
            dependent.update(eqn.outvars)
    return dependent


def _scan_sizes(eqn: JaxprEqn) -> tuple[int, int]:
    """The number of a scan's constants, and the number of its carried values.

    Releases of JAX store these numbers in different ways, so they are derived from the types: a
    stacked array has one dimension more than its slice in an iteration.
    """
    body = eqn.params["jaxpr"]

    def count_stacked(variables: Sequence[Any], slices: Sequence[Any]) -> int:
        pairs = zip(variables, slices, strict=True)
        return sum(np.ndim(v.aval) > np.ndim(in_iteration) for v, in_iteration in pairs)

    carried = len(eqn.outvars) - count_stacked(eqn.outvars, body.out_avals)
    return len(eqn.invars) - count_stacked(eqn.invars, body.in_avals) - carried, carried


class Planner:
    """Makes plans, and records the tables that it cannot follow.

    Attributes:
      exact: whether to refuse every use of a table that is not a read of rows, even a use through
        which the loss is not differentiated.
      refused: by table, the first equation whose use of the table is refused; `None` if the loss
        returns the table.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.refused: dict[int, JaxprEqn | None] = {}

    def refuse(
        self, views: Iterable[Any], eqn: JaxprEqn | None, jaxpr: Jaxpr | None = None
    ) -> None:
        """Records that an equation uses the tables of these views in a way that is refused."""
        if eqn is not None and jaxpr is not None and eqn.primitive.name == "transpose":
            # The error should name what the transposed table is used for.
            users = (e for e in jaxpr.eqns if eqn.outvars[0] in variables_of(e.invars))
            eqn = next(users, eqn)
        for view in views:
            if view is not None:
                self.refused.setdefault(view.table, eqn)

    def plan(
        self,
        closed: ClosedJaxpr,
        views: Sequence[View | None],
        dependent_ins: Sequence[bool],
        live_outs: Sequence[bool],
    ) -> Plan:
        """The plan of a jaxpr.

        Args:
          views: for each input that is a table, its view; `None` for the others.
          dependent_ins: whether each input depends on the differentiated inputs of the loss.
          live_outs: whether the loss is differentiated through each result.
        """
        jaxpr = closed.jaxpr
        view_of = {v: view for v, view in zip(jaxpr.invars, views, strict=True) if view is not None}
        live = _live_variables(jaxpr, live_outs)
        dependent = _dependent_variables(jaxpr, dependent_ins)
        equations: list[Any] = []
        for eqn in jaxpr.eqns:
            in_views = [view_of.get(x) if isinstance(x, Var) else None for x in eqn.invars]
            if not any(view is not None for view in in_views):
                equations.append(eqn)
                continue
            out_view = self._result_view(eqn, in_views)
            if out_view is not None:
                view_of[eqn.outvars[0]] = out_view
                continue
            table_eqn, out_views = self._table_equation(jaxpr, eqn, in_views, dependent, live)
            view_of.update(out_views)
            equations.append(table_eqn)
        outs = [view_of.get(x, x) if isinstance(x, Var) else x for x in jaxpr.outvars]
        return Plan(closed, [v for v in jaxpr.invars if v not in view_of], equations, outs)

    def _result_view(self, eqn: JaxprEqn, views: Sequence[View | None]) -> View | None:
        """The view that an equation makes of a table; `None` if it does not keep the rows."""
        view, primitive, params = views[0], eqn.primitive.name, eqn.params
        if view is None or len(eqn.outvars) != 1:
            return None
        out: Any = eqn.outvars[0].aval
        shape, lax = out.shape, jax.lax

        def cast(function: Any, *args: Any) -> View:
            return view._replace(casts=(*view.casts, (function, args)))

        if primitive == "convert_element_type":
            if jnp.issubdtype(params["new_dtype"], jnp.floating):
                return cast(lax.convert_element_type, params["new_dtype"])
        elif primitive == "reduce_precision":
            return cast(lax.reduce_precision, params["exponent_bits"], params["mantissa_bits"])
        elif primitive == "stop_gradient":
            return cast(lax.stop_gradient)._replace(live=False)
        elif primitive in ("copy", "copy_p", "sharding_constraint", "optimization_barrier"):
            return view
        elif primitive in ("pvary", "pbroadcast"):
            return view._replace(axes=(*view.axes, *params["axes"]))
        elif primitive in ("reshape", "squeeze", "broadcast_in_dim", "expand_dims"):
            keeps_rows = shape[:1] == view.shape[:1] and math.prod(shape) == math.prod(view.shape)
            # `lax.reshape` with `dimensions` transposes first.
            keeps_rows = keeps_rows and (primitive != "reshape" or params["dimensions"] is None)
            return view._replace(shape=shape) if keeps_rows else None
        return None

    def _table_equation(
        self,
        jaxpr: Jaxpr,
        eqn: JaxprEqn,
        views: Sequence[View | None],
        dependent: set[Any],
        live: set[Any],
    ) -> tuple[Any, dict[Var, View]]:
        """The `TableEquation` of an equation that takes tables, and the views among its results."""
        primitive, params = eqn.primitive.name, eqn.params
        is_dependent = [isinstance(x, Var) and x in dependent for x in eqn.invars]
        is_live = [v in live for v in eqn.outvars]
        ins = not_tables(eqn, views)
        if views[0] is not None and not any(views[1:]):
            window = _window(eqn, views[0])
            if window is not None:
                return Read(eqn, views[0], window, any(is_live), not any(is_dependent[1:])), {}
        if primitive in ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"):
            closed = _closed(params["jaxpr" if "jaxpr" in params else "call_jaxpr"])
            plan = self.plan(closed, views, is_dependent, is_live)
            outs, out_views = _split(eqn.outvars, plan.outs)
            make = Remat if primitive in ("remat2", "checkpoint") else Inlined
            return make(eqn, plan, ins, outs), out_views
        # A table that is split over devices cannot be followed into `shard_map`. In older releases
        # of JAX, whose `shard_map` has other parameters, no table can.
        if primitive == "shard_map" and "newly_manual_axes" in params:
            pairs = zip(views, params["in_specs"], strict=True)
            if not any(view is not None and any(spec) for view, spec in pairs):
                plan = self.plan(_closed(params["jaxpr"]), views, is_dependent, is_live)
                self.refuse((x for x in plan.outs if isinstance(x, View)), eqn)
                return ShardMap(eqn, plan, views, eqn.outvars), {}
        if primitive == "scan":
            return self._scan(eqn, views, is_dependent, is_live)
        if primitive == "cond" and views[0] is None:
            plans = [
                self.plan(_closed(branch), views[1:], is_dependent[1:], is_live)
                for branch in params["branches"]
            ]
            # A table that only some branches return cannot be followed.
            for results in zip(*(plan.outs for plan in plans), strict=True):
                returned = [x for x in results if isinstance(x, View)]
                if returned and results != (returned[0],) * len(plans):
                    self.refuse(returned, eqn)
            outs, out_views = _split(eqn.outvars, plans[0].outs)
            return Cond(eqn, plans, ins, outs, not is_dependent[0]), out_views
        if self.exact or _has_effect(eqn) or any(is_live):
            used = (view for view in views if view is not None and (self.exact or view.live))
            self.refuse(used, eqn, jaxpr)
        return WholeTable(eqn, jaxpr, views), {}

    def _scan(
        self,
        eqn: JaxprEqn,
        views: Sequence[View | None],
        is_dependent: list[bool],
        is_live: list[bool],
    ) -> tuple[Any, dict[Var, View]]:
        """The `Scan` of an equation that takes tables, and the views among its results."""
        closed, (num_consts, num_carried) = eqn.params["jaxpr"], _scan_sizes(eqn)
        carried = slice(num_consts, num_consts + num_carried)
        # These inputs are sliced along their rows: each iteration would get one row of a table.
        self.refuse(views[carried.stop :], eqn)
        # A carried value may reach any result through a later iteration.
        is_live[:num_carried] = [any(is_live)] * num_carried
        # If a carried value is dependent after an iteration, it is dependent in the next one.
        carried_outs = closed.jaxpr.outvars[:num_carried]
        while True:
            dependent = _dependent_variables(closed.jaxpr, is_dependent)
            after = [
                old or (isinstance(new, Var) and new in dependent)
                for old, new in zip(is_dependent[carried], carried_outs, strict=True)
            ]
            if after == is_dependent[carried]:
                break
            is_dependent[carried] = after
        plan = self.plan(closed, views, is_dependent, is_live)
        # A carried table must stay the same in each iteration. A stacked result cannot be a table.
        for before, x in itertools.zip_longest(views[carried], plan.outs):
            if (before is not None or isinstance(x, View)) and before != x:
                self.refuse([before, x if isinstance(x, View) else None], eqn)
        outs, out_views = _split(eqn.outvars, plan.outs)
        # The `ins` of a `Scan` do not include tables, so these are not counted.
        num_consts_in, num_carried_in = views[:num_consts].count(None), views[carried].count(None)
        ins = not_tables(eqn, views)
        return Scan(eqn, plan, ins, outs, num_consts_in, num_carried_in), out_views


def _split(variables: Sequence[Var], values: Sequence[Any]) -> tuple[list[Var], dict[Var, View]]:
    """The variables whose values are atoms, and the views of the others."""
    views = {v: x for v, x in zip(variables, values, strict=True) if isinstance(x, View)}
    return [v for v in variables if v not in views], views
