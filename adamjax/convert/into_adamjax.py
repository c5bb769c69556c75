"""Fills a state of adamjax from the common form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.average import WeightEmaState
from adamjax.convert.adamjax_state import AdamjaxState, may_contain_states
from adamjax.convert.differences import Translation, expect_product, nadam_product
from adamjax.convert.filling import ACCUMULATED, AVERAGE
from adamjax.convert.optax_state import role_of
from adamjax.convert.source import Slots, Source
from adamjax.convert.systems import System, kind_of
from adamjax.convert.values import (
    class_name,
    counts_a_schedule,
    field_names,
    is_container,
    leaves_by_path,
    map_items,
)
from adamjax.data import Tree
from adamjax.exact import ExactRowsState, exact_rows
from adamjax.guard import AccumulateGradientsState, SkipNotFiniteState
from adamjax.rows import RowGradient
from adamjax.scaling import ScheduleState
from adamjax.structure import rule_slots

__all__ = ["into_adamjax"]

_IN_FOREIGN_TRANSFORM = (
    "inside a transform of another library cannot be filled: use adamjax.chain, masked or "
    "partition instead of that transform"
)


def into_adamjax(
    source: Source,
    system: System,
    ours: AdamjaxState,
    average: Tree,
    check: bool,
    rtol: float,
) -> Any:
    """The state of `ours`, filled from a source.

    Args:
      system: the system that the source was read from.
      average: the average of the weights that the user gives; `None` for that of the source.
      check, rtol: as for `from_optax`.
    """
    source.doubts += ours.doubts + ours.doubts_of_average(source.average)
    source.refuse_doubts(check)
    if average is not None:
        source.average = leaves_by_path(ours.owner, average)
    _expect_place_for_micro_batches(source, ours, check)
    filled = _AdamjaxFiller(source, ours, system, check, rtol).filled_state()
    return _placed_like(ours.params, filled)


def _placed_like(params: Tree, state: Any) -> Any:
    """The state on the device that the parameters are committed to, if that is one device.

    Without this, the second step would be compiled again: the first step would take counts that are
    not committed to a device, and return counts that are.
    """
    leaves = jax.tree.leaves(params)
    if not all(isinstance(p, jax.Array) and p.committed for p in leaves):
        return state
    devices = {device for p in leaves for device in p.devices()}
    if len(devices) != 1:
        return state
    (device,) = devices

    def place(x: Any) -> Any:
        is_uncommitted = isinstance(x, jax.Array) and not x.committed
        return jax.device_put(x, device) if is_uncommitted else x

    return jax.tree.map(place, state)


def _expect_place_for_micro_batches(source: Source, ours: AdamjaxState, check: bool) -> None:
    """Refuses micro-batches since the last step that `tx` cannot go on with.

    `tx` must accumulate the gradients of the same leaves, only once, and over more micro-batches.
    """
    accumulated_paths = [path for _, leaves in ours.accumulations for path in leaves]
    nested = sorted(p for p in set(accumulated_paths) if accumulated_paths.count(p) > 1)
    if nested and any(accumulated.micro for accumulated in source.accumulated):
        raise ValueError(
            f"{source.owner}: the source has micro-batches since its last step, and in tx the leaf "
            f"{nested[0]!r} is in two accumulate_gradients, one inside the other: use one "
            "accumulate_gradients, or convert after a step"
        )
    steps_of = {path: steps for steps, leaves in ours.accumulations for path in leaves}
    for accumulated in source.accumulated:
        if not accumulated.micro:
            continue
        for path in accumulated.totals:
            problem = (
                f"{source.owner}: the source has accumulated {accumulated.micro} micro-batches of "
                f"{path!r} since its last step"
            )
            if path not in steps_of:
                raise ValueError(
                    f"{problem}: wrap tx in accumulate_gradients, or convert after a step"
                )
            if check and accumulated.micro >= steps_of[path]:
                raise ValueError(
                    f"{problem}, but a step of tx takes {steps_of[path]}: wrap tx in "
                    "accumulate_gradients of as many steps as the source, or pass check=False"
                )


class _AdamjaxFiller(Translation):
    """Fills a state of adamjax, and the states inside it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # The paths of the leaves that weight_ema averages.
        self.averaged: set[str] = set()

    def filled_state(self) -> Any:
        state = self.fill(self.ours.state)
        self.finish()
        lost = sorted(set(self.source.average or ()) - self.averaged)
        if lost and self.check:
            raise ValueError(
                f"{self.owner}: the source has an average of {lost[0]!r}, but tx has no weight_ema "
                "for it: put weight_ema at the end of tx, or pass check=False to drop the average"
            )
        return state

    def fill(self, x: Any) -> Any:
        """A node of the state, filled from the source."""
        if rule_slots(x):
            return self._fill_rule(x)
        if isinstance(x, ScheduleState) or counts_a_schedule(x):
            return x._replace(count=self.schedule_count(self.ours.leaves(x), x.count))
        if isinstance(x, WeightEmaState):
            if self.source.average is None:
                raise ValueError(
                    f"{self.owner}: tx averages the weights (weight_ema), but the source has no "
                    "average: pass average=, a tree like params (params itself to start from them)"
                )
            self.averaged |= set(leaves_by_path(self.owner, x.average))
            average = self.tree(AVERAGE, self.source.average, x.average)
            return WeightEmaState(self.schedule_count(self.ours.leaves(x), x.count), average)
        if isinstance(x, AccumulateGradientsState):
            return self._fill_accumulated(x)
        if isinstance(x, SkipNotFiniteState):
            skipped = jnp.asarray(self.source.skipped_of(self.ours.leaves(x)), x.skipped.dtype)
            return SkipNotFiniteState(skipped, self.fill(x.inner))
        if isinstance(x, ExactRowsState):
            part = self.ours.part(x)
            if part is None or not isinstance(part.tx, exact_rows):
                raise ValueError(f"{self.owner}: exact_rows {_IN_FOREIGN_TRANSFORM}")
            return part.tx.from_dense(self.fill(x.inner), part.params)
        if may_contain_states(x):
            return map_items(self._fill_item, x)
        if {"mu", "nu"} & set(field_names(x) or ()) and not self.other_states_like(x):
            raise ValueError(
                f"{self.owner}: tx has a rule of another library, with a {class_name(x)}, and the "
                "source has no such state. Conversions fill the rules of adamjax only: use a rule "
                "of adamjax in its place, or convert a tx without it and add its state by hand"
            )
        if role_of(x) in ("inner", "parts"):  # a mask of optax, for instance
            return map_items(self.fill, x)
        return self.other_state(x) if jax.tree.leaves(x) else x

    def _fill_item(self, x: Any) -> Any:
        is_state = is_container(x) or self.ours.is_state_of_other_library(x)
        return self.fill(x) if is_state else x

    def _fill_rule(self, x: Any) -> Any:
        owner, part = self.owner, self.ours.part(x)
        rule: Any = None if part is None else part.tx
        kind, names = kind_of(owner, x, rule), rule_slots(x)
        initial = {name: leaves_by_path(owner, getattr(x, name)) for name in names}
        moments_of = {path: self.take_moments(path) for path in initial[names[0]]}
        count = self.common_count(moments_of)
        if rule is None and kind != "adam":
            raise ValueError(f"{owner}: {kind} {_IN_FOREIGN_TRANSFORM}")
        values: dict[str, dict[str, Any]] = {name: {} for name in names}
        for path, moments in moments_of.items():
            slots = self.to_adamjax(rule, kind, path, moments)
            if self.check and not moments.count:
                self._expect_wide_enough({name: initial[name][path] for name in names}, path, slots)
            for name in names:
                values[name][path] = initial[name][path] if slots is None else slots[name]
        trees = {name: self.tree(name, values[name], getattr(x, name)) for name in names}
        filled = x._replace(count=jnp.asarray(count, x.count.dtype), **trees)
        if kind == "nadam":
            # All leaves of a rule have taken the same number of steps, so they share one product.
            products = [m.product for m in moments_of.values() if m.product is not None]
            if self.check:
                for product in {(float(x), np.asarray(x).dtype): x for x in products}.values():
                    expect_product(owner, product, rule.b1, count)
            product = products[0] if products else nadam_product(rule.b1, count)
            # Keras and torch change their product in place, so it is copied.
            product = jnp.array(np.asarray(product), x.momentum_product.dtype, copy=True)
            filled = filled._replace(momentum_product=product)
        return filled

    def _expect_wide_enough(self, initial: Slots, path: str, slots: Slots | None) -> None:
        """Before the first step, refuses slots narrower than float32 and than the source's slots.

        Any dtype holds the moments of 0. But after a step, the same conversion would be refused,
        because it would round the moments. A source in float64 may be converted to float32, because
        NumPy makes zeros in float64 by default. torch has no slots before its first step; they will
        have the dtype of the parameter.

        Args:
          initial: the slots of adamjax, from `init`.
          slots: the slots of the source; `None` if it has none yet.
        """
        params = leaves_by_path(self.owner, self.ours.params)
        for name, x in initial.items():
            source_array = params[path] if slots is None else slots[name]
            old, new = np.dtype(source_array.dtype), np.dtype(x.dtype)
            bits = jnp.finfo(old).nmant if jnp.issubdtype(old, jnp.inexact) else 0
            if jnp.finfo(new).nmant < min(bits, jnp.finfo(np.float32).nmant):
                self.refuse_rounding(path, name, old, new)

    def _fill_accumulated(self, x: AccumulateGradientsState) -> AccumulateGradientsState:
        total: Any = x.total
        leaves = leaves_by_path(self.owner, total)
        micro, totals = self.source.accumulated_of(frozenset(leaves)) or (0, {})
        if micro:
            rows = [path for path, t in leaves.items() if isinstance(t, RowGradient)]
            if rows:
                raise ValueError(
                    f"{self.owner}: the source has accumulated {micro} micro-batches of dense "
                    f"gradients, but tx accumulates only rows of the table {rows[0]!r} (max_rows): "
                    "convert after a step"
                )
            total = self.tree(ACCUMULATED, totals, total)
        outer, self.in_accumulating = self.in_accumulating, True
        inner = self.fill(x.inner)
        self.in_accumulating = outer
        return AccumulateGradientsState(jnp.asarray(micro, x.micro_count.dtype), total, inner)
