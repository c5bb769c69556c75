"""Refuses states that do not fit the parameters or the transform.

It reads structures, shapes, dtypes and the names of rings (which contain the rule that a ring was
made for), but never the values of arrays in a state. So it runs while a step is traced, and costs
nothing in the compiled step.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.coasting import Coasting, Ring
from adamjax.data import Tree, is_array
from adamjax.encoding import expect_exponents_by_row
from adamjax.exact.route import RoutePart
from adamjax.exact.state import ExactRowsState
from adamjax.exact.tables import Family, Table
from adamjax.leaves import described, expect_array
from adamjax.paths import flatten, leaf_paths
from adamjax.rows import is_known
from adamjax.structure import named_slots
from adamjax.transform import RESTORED_WITHOUT_CLASSES, Transform

__all__ = [
    "edited_numbers",
    "expect_fit",
    "expect_no_other_slots",
    "expect_slot_names",
    "expect_slots",
]

# The advice of errors: if a table has another size than in the state, and if the rule has changed.
_OTHER_TABLE = (
    "make a new state with init; or flush with the old sizes, resize the table in params "
    "and in state.inner, and continue with from_dense(state.inner, params)"
)
_OTHER_RULE = (
    "rows that lag behind must catch up by the old rule. Build the transform as it was; or flush "
    "with the old one and start the new one from its dense state: "
    "params, state = old.flush(params, state), then state = new.from_dense(state.inner, params)"
)


def expect_fit(families: Sequence[Family], state: ExactRowsState, params: Tree) -> None:
    """Refuses a state for other parameters, tables or sizes, or for another rule or history."""
    tables = [table for family in families for table in family.tables]
    for name in ("last", "turns"):
        if not isinstance(getattr(state, name), Mapping):
            raise TypeError(
                f"exact_rows: the state's {name} is {described(getattr(state, name))}, expected a "
                f"dictionary. {RESTORED_WITHOUT_CLASSES}"
            )
    slots = named_slots(state.inner)
    paths = leaf_paths(params)
    state_paths = leaf_paths(slots[0][1]) if slots else paths
    # Sets, because JAX sorts the keys of a dictionary that goes through jit.
    if paths != state_paths or {t.path for t in tables} != set(state.last):
        unmatched = [path for path in paths if path not in set(state_paths)]
        unmatched += [path for path in state_paths if path not in set(paths)]
        raise ValueError(
            f"exact_rows: the state is for other parameters, with the tables "
            f"{list(state.last)}, expected {[t.path for t in tables]}; leaves that are only in "
            f"params or only in the state: {unmatched}. The state refers to leaves by position, so "
            "params must have the structure that init was given"
        )
    advice = "keep it int32, because it is meant to wrap around at the largest int32"
    expect_array("exact_rows: the clock", state.clock, (), advice, "int32")
    for table in tables:
        where = f"exact_rows: last[{table.path!r}]"
        expect_array(where, state.last[table.path], table.shape[:1], _OTHER_TABLE, "int32")
    _expect_rings(families, state)


def edited_numbers(part: Transform, fields: Mapping[str, Any]) -> list[chex.Array]:
    """Refuses numbers of a part that were edited in the pytree after `exact_rows` was made.

    Args:
      part: a part whose numbers `exact_rows` uses as Python floats.
      fields: its fields when `exact_rows` was made, without the fields that were `None`.

    Returns:
      For each number whose value is traced: a bool scalar, whether it was edited.
    """
    edited = []
    for field in dataclasses.fields(part):
        value, original = getattr(part, field.name), fields.get(field.name)
        structure: Any = jax.tree.structure(value)
        is_alike = structure == jax.tree.structure(original)
        # `None` may stand for a number, as it does in a filtered tree.
        same = original is not None
        if is_alike:
            same = all(map(_may_equal, jax.tree.leaves(value), jax.tree.leaves(original)))
        if not same:
            raise ValueError(
                f"exact_rows: {type(part).__name__} has {field.name}={value!r}, expected "
                f"{original!r}, with which this exact_rows was made: it computes with that number "
                "in advance, and rows that lag behind catch up by it. Make a new exact_rows with "
                "the new number; if there is a state, flush with the old one first, and go on from "
                "from_dense of the new one"
            )
        for x, number in zip(*map(jax.tree.leaves, (value, original)), strict=True):
            if is_array(x) and not is_known(x):
                dtype = _dtype_to_compare(x.dtype)
                edited.append(jnp.any(x.astype(dtype) != jnp.asarray(number, dtype)))
    return edited


def _may_equal(value: Any, number: Any) -> bool:
    """Whether a leaf may equal this number; a tracer or a placeholder (`object()`) always may.

    For an array, the number is first rounded to the array's dtype, or to float32 if that is wider,
    since JAX makes float32 arrays of Python floats.
    """
    has_value = isinstance(value, int | float | np.generic | np.ndarray | jax.Array)
    if not has_value or not is_known(value):
        return True
    found = np.asarray(value)
    if jnp.issubdtype(found.dtype, jnp.floating):
        number = np.asarray(number, _dtype_to_compare(found.dtype))
    return found.shape == () and bool(found == number)


def _dtype_to_compare(dtype: Any) -> Any:
    """The dtype in which a number of this dtype is compared. In bfloat16, 0.999 would be 1."""
    is_wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32
    return dtype if is_wide else np.dtype(np.float32)


def expect_slots(table: Table, parts: Sequence[RoutePart]) -> None:
    """Refuses states of a table's rule and later transforms that do not fit the table."""
    for _, tx, state, _ in parts:
        tx.check_state(state)
        for name in getattr(state, "slots", ()):
            slot = flatten(getattr(state, name))[0][table.leaf_index]
            expect_array(f"exact_rows: {name}[{table.path!r}]", slot, table.shape, _OTHER_TABLE)


def expect_no_other_slots(
    tables: Sequence[Table], parts: Mapping[int, Sequence[RoutePart]], inner: Any
) -> None:
    """Refuses slots of a table that belong to no transform of its chain.

    A mask may hide a table from a transform that has slots, such as a `weight_ema`. If the state
    was made without that mask, it has a slot of the table that nothing would bring up to date.

    Args:
      parts: for each table, by its leaf index: its rule and the later transforms.
      inner: the state of the inner transform.
    """
    slots = [(name, flatten(tree)[0]) for name, tree in named_slots(inner)]
    for table in tables:
        found = [name for name, leaves in slots if leaves[table.leaf_index] is not None]
        states = [part.state for part in parts[table.leaf_index]]
        expected = [name for state in states for name in getattr(state, "slots", ())]
        if sorted(found) != sorted(expected):
            raise ValueError(
                f"exact_rows: the state is for another transform: it has the slots {found} of "
                f"{table.path!r}, expected {expected}: a mask that hides this table must be the "
                "same as in the transform that made the state. Build the transform as it was, or "
                "make a new state with init"
            )


def expect_slot_names(table: Table, parts: Sequence[RoutePart], inner: Any) -> None:
    """Refuses slots of a table that `exact_rows` could not bring up to date.

    The rule's state must have a count and the slots that its `coast` names. No transform before
    the rule may have a slot, and no two slots may have the same name.

    Args:
      parts: the table's rule and later transforms.
      inner: the state of the whole inner transform.
    """
    rule = parts[0]
    names: list[str] = []
    for name, tree in named_slots(inner):
        slot = flatten(tree)[0][table.leaf_index]
        if slot is not None:
            expect_exponents_by_row(slot, f"exact_rows: the table {table.path!r} needs rows")
            names.append(name)
    coast = table.coast
    needed_slots = {coast.momentum, *(name for name, _ in coast.decays)}
    if coast.size is not None:
        needed_slots.add(coast.size)
    if needed_slots - set(names) or not hasattr(rule.state, "count"):
        raise ValueError(
            f"exact_rows: {rule.tx!r} coasts by the slots {sorted(needed_slots)} and a count of "
            f"steps, but its state has the slots {sorted(names)} and the fields "
            f"{list(getattr(rule.state, '_fields', ()))}: name them in Coast as in the state, and "
            "declare the state with transform_state"
        )
    caught_up = {name for part in parts for name in getattr(part.state, "slots", ())}
    others = sorted(set(names) - caught_up)
    if others:
        raise ValueError(
            f"exact_rows: a transform before the rule of {table.path!r} has the slots {others}, "
            "and exact_rows brings only slots of the rule and of weight_ema up to date: mask that "
            "transform from the table, or use row gradients without exact_rows"
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"exact_rows: the state has {len(names)} slots of {table.path!r}, and several have the "
            f"name {repeated[0]!r}: rename one, since rows are brought up to date by these names"
        )


def _note_on_dtypes(families: Sequence[Family], rings: Mapping[str, Any]) -> str:
    """A part of an error: the rings are for tables of another dtype. Empty if they are not."""
    # A ring's coefficients have the dtype in which the steps of its tables are computed.
    series: list[Any] = [getattr(ring, "series", None) for ring in rings.values()]
    dtypes = {x.dtype for x in series if hasattr(x, "dtype")}
    real_dtype = np.dtype(families[0].tables[0].real_dtype)
    if not dtypes or dtypes == {real_dtype}:
        return ""
    widths = " and ".join(sorted(x.name for x in dtypes))
    return f"the state is for tables in {widths}, now they are in {real_dtype.name}; "


def _expect_rings(families: Sequence[Family], state: ExactRowsState) -> None:
    names = [family.name for family in families]
    rings: Any = state.rings
    if not isinstance(rings, Mapping) or set(rings) != set(names):
        is_mapping = isinstance(rings, Mapping)
        found = list(rings) if is_mapping else type(rings).__name__
        note = _note_on_dtypes(families, rings) if is_mapping else ""
        raise ValueError(
            f"exact_rows: the state is for another transform: it has the rings {found}, "
            f"expected {names} (tables with one rule, one rate and the same masks share a ring): "
            f"{note}{_OTHER_RULE}"
        )
    for family in families:
        table = family.tables[0]
        expected = _ring_like(table.coasting, family.history, table.real_dtype, _is_x64())
        ring = rings[family.name]
        if not isinstance(ring, Ring):
            raise TypeError(
                f"exact_rows: rings[{family.name!r}] is a {type(ring).__name__}, expected a Ring. "
                f"{RESTORED_WITHOUT_CLASSES}"
            )
        for name, x, like in zip(Ring._fields, ring, expected, strict=True):
            if (x is None) != (like is None):
                has = "has no" if x is None else "has"
                raise ValueError(
                    f"exact_rows: the ring of {table.path!r} {has} {name}: {_OTHER_RULE}"
                )
            if like is not None:
                where = f"exact_rows: rings[{family.name!r}].{name}"
                expect_array(where, x, like.shape, _OTHER_RULE, like.dtype.name)
        if family.name not in state.turns:
            raise ValueError(
                f"exact_rows: the state has the turns {list(state.turns)}, expected {names}: "
                "restore the whole state, or start from init"
            )
        where = f"exact_rows: turns[{family.name!r}]"
        expect_array(where, state.turns[family.name], (), _OTHER_RULE, "int32")


def _is_x64() -> bool:
    return bool(jax.dtypes.canonicalize_dtype("float64") == "float64")


@functools.lru_cache
def _ring_like(coasting: Coasting, history: int, real_dtype: Any, is_x64: bool) -> Ring:
    """The shapes and dtypes of a ring.

    They depend on whether JAX is in x64 mode: `is_x64` is an argument for the sake of the cache.
    """
    return jax.eval_shape(lambda: coasting.init(history, real_dtype))
