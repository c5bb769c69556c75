"""Refuses states that do not fit the parameters or the transform. Costs nothing in a jitted step.

Everything is checked by structure, shape and dtype, and by the name of each ring, which says which
rule it was made for.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from adamjax.coasting import Coasting, Ring
from adamjax.data import Tree
from adamjax.exact.route import Station
from adamjax.exact.state import ExactRowsState
from adamjax.exact.tables import Family, Table
from adamjax.leaves import expect_array
from adamjax.paths import flatten, leaf_paths
from adamjax.structure import map_slots

__all__ = ["expect_fit", "expect_slots"]

_OTHER_TABLE = (
    "make a new state with init; or flush with the old sizes, resize the table in params "
    "and in state.inner, and go on with from_dense(state.inner, params)"
)
_OTHER_RULE = (
    "rows that lag behind must go on as they began. Build it as it was; or flush with the "
    "old one and start from its dense state: params, state = old.flush(params, state), "
    "then state = new.from_dense(state.inner, params)"
)


def expect_fit(families: Sequence[Family], state: ExactRowsState, params: Tree) -> None:
    """Refuses a state of other parameters, tables or sizes, or of another rule or history."""
    tables = [table for family in families for table in family.tables]
    slots: list[Tree] = []

    def collect(name: str, tree: Tree) -> Tree:
        slots.append(tree)
        return tree

    map_slots(collect, state.inner)
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
    for table in tables:
        rows, where = state.tables[table.path], f"exact_rows: tables[{table.path!r}]"
        expect_array(f"{where}.last", rows.last, table.shape[:1], _OTHER_TABLE, "int32")
        expect_array(f"{where}.cursor", rows.cursor, (), _OTHER_TABLE, "int32")
    _expect_rings(families, state.rings)


def expect_slots(table: Table, stations: Sequence[Station]) -> None:
    """Refuses states of a table's rule, and of what is behind it, that do not fit the table."""
    for _, tx, state, _ in stations:
        tx.check_state(state)
        for name in getattr(state, "slots", ()):
            slot = flatten(getattr(state, name))[0][table.leaf]
            expect_array(f"exact_rows: {name}[{table.path!r}]", slot, table.shape, _OTHER_TABLE)


def _expect_rings(families: Sequence[Family], rings: Any) -> None:
    names = [family.name for family in families]
    came = list(rings) if isinstance(rings, Mapping) else type(rings).__name__
    if not isinstance(rings, Mapping) or set(rings) != set(names):
        raise ValueError(
            f"exact_rows: the state is of another transform: {came}, expected {names}: "
            f"{_OTHER_RULE}"
        )
    for family in families:
        table = family.tables[0]
        expected = _ring_like(table.plan, family.history, table.real)
        for name, x, like in zip(Ring._fields, rings[family.name], expected, strict=True):
            if (x is None) != (like is None):
                has = "has no" if x is None else "has"
                raise ValueError(
                    f"exact_rows: the ring of {table.path!r} {has} {name}: {_OTHER_RULE}"
                )
            if like is not None:
                where = f"exact_rows: rings[{family.name!r}].{name}"
                expect_array(where, x, like.shape, _OTHER_RULE, like.dtype.name)


@functools.lru_cache
def _ring_like(plan: Coasting, history: int, real: Any) -> Ring:
    """Shapes and dtypes of a ring."""
    return jax.eval_shape(lambda: plan.init(history, real))
