"""The transform that applies several transforms one after another."""

from typing import Any, TypeGuard

import jax.numpy as jnp

from adamjax.data import Tree
from adamjax.leaves import dtype_of, is_arraylike, is_left_alone
from adamjax.moments import compute_dtype, widened_dtype
from adamjax.paths import flatten, leaf_paths
from adamjax.rows import RowGradient, RowMoves
from adamjax.structure import walk
from adamjax.transform import (
    Rule,
    Scaling,
    Stateless,
    Step,
    Transform,
    as_transform,
    expect_empty,
    short_repr,
    states_of_parts,
)

__all__ = ["chain", "identity"]


class identity(Stateless):
    """Passes updates through unchanged; its state is empty.

    >>> import adamjax
    >>> adamjax.identity().update({"w": 1.0}, ())
    ({'w': 1.0}, ())
    """

    keeps_zero = True
    groupable = True

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_empty(self, state)
        return updates, state

    def affine(self, state: Any, params: Tree, leaf: int, real: Any) -> tuple[Any, Any] | None:
        return 1, 0


def _in_dtype(leaf: Any, dtype: Any) -> Any:
    if dtype is None or is_left_alone(leaf):
        return leaf
    is_rows = isinstance(leaf, RowGradient | RowMoves)
    return leaf.astype(dtype) if is_rows else jnp.asarray(leaf, dtype)


def _has_factors(tx: Any) -> TypeGuard[Scaling]:
    return isinstance(tx, Scaling) and tx.has_factors


def _applies_factors(tx: Any) -> TypeGuard[Rule]:
    return isinstance(tx, Rule) and tx.has_step


class chain(Transform):
    """Applies transforms in turn, each to the updates of the one before.

    Between adamjax's transforms, updates are in float32 or wider. They are rounded to the
    gradients' dtype once, at the end, unless the last part is `master_weights`, whose updates stay
    float32. Other libraries' transforms, `weight_ema`, `exact_rows` and `master_weights` get
    updates in the gradients' dtype. A chain within a chain is replaced by its parts. The state is
    the tuple of the parts' states. Extra arguments of `update` go to every part; other libraries'
    functions get only those that they accept.

    Args:
      *transforms: adamjax transforms, or `(init, update)` pairs such as optax's transforms.

    Raises:
      ValueError: `weight_ema`, `exact_rows` or `master_weights` is not last (the weights must move
        by exactly the updates that it returns); `add_decayed_weights` is after the learning rate
        (weights would grow); or a rule is after an `accumulate_gradients` or a `skip_not_finite`
        without a rule (it would step with zeros in place of the gradients). By `init`: a leaf gets
        two learning rates (each changes the sign, so the leaf would move uphill).

    >>> import adamjax
    >>> adamjax.chain(adamjax.clip_by_value(1.0), adamjax.scale(-0.1))
    chain(clip_by_value(limit=1.0), scale(factor=-0.1))
    """

    transforms: tuple[Transform, ...]

    only_routes = True

    def __init__(self, *transforms: Any) -> None:
        self.set_fields(transforms=transforms)
        self.__post_init__()

    def __post_init__(self) -> None:
        parts: list[Transform] = []
        for tx in map(as_transform, self.transforms):
            parts.extend(tx.transforms if isinstance(tx, chain) else (tx,))
        for tx in parts[:-1]:
            if tx.must_be_last:
                raise ValueError(
                    f"chain: {tx!r} must be last, because the weights must move by the updates "
                    f"that it returns; move it after {parts[-1]!r}"
                )
        self._expect_decay_to_shrink(parts)
        self._expect_rules_inside_gates(parts)
        self.set_fields(transforms=tuple(parts))

    def _expect_rules_inside_gates(self, parts: list[Transform]) -> None:
        """Refuses a rule after a part that gives it zeros in some calls."""
        for i, tx in enumerate(parts):
            rules = [part for part in parts[i + 1 :] if part.has_rule]
            if tx.gates_steps and not tx.has_rule and rules:
                raise ValueError(
                    f"chain: {rules[0]!r} is after {tx!r}, which returns zeros in place of the "
                    "gradients in some calls, and the rule would take a step with them: put the "
                    f"rule inside, {type(tx).__name__}(chain(...))"
                )

    def _expect_one_rate(self, params: Tree) -> None:
        """Refuses two learning rates of a leaf, unless something else may set its sign."""
        for path, num in zip(leaf_paths(params), self.num_rates(params), strict=True):
            if num is not None and num > 1:
                rates = [part.tx for part in walk(self) if part.tx.descends and not part.tx.parts]
                raise ValueError(
                    f"chain: {path!r} gets {num} learning rates, and each changes the sign of its "
                    f"updates: give it one, such as adam(schedule), and multiply by other numbers "
                    f"with scale. The rates are {', '.join(map(short_repr, rates))}"
                )

    def _expect_decay_to_shrink(self, parts: list[Transform]) -> None:
        """Refuses weight decay after the learning rate, unless a later part may change its sign."""
        for i, tx in enumerate(parts):
            descending = [part for j, part in enumerate(parts[:i]) if self._descends(parts, j)]
            # Only the parts that must be last are known to keep the sign of the updates.
            keeps_sign = all(part.must_be_last for part in parts[i + 1 :])
            if tx.adds_weights and descending and keeps_sign:
                raise ValueError(
                    f"chain: {tx!r} is after {descending[-1]!r}, so weights would grow in each "
                    "step, whatever the rate: put the weight decay between the rule and the "
                    "learning rate, as in adamw"
                )

    def _descends(self, parts: list[Transform], i: int) -> bool:
        """Whether a part turns updates downhill: by a rate, or by a factor after a rule."""
        factor = getattr(parts[i], "factor", None)
        is_negative = isinstance(factor, int | float) and factor < 0
        return parts[i].descends or (is_negative and any(part.has_rule for part in parts[:i]))

    def init(self, params: Tree) -> tuple[Any, ...]:
        self._expect_one_rate(params)
        return tuple(tx.init(params) for tx in self.transforms)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        states = self.part_states(state)
        leaves = flatten(updates)[0]
        given_dtypes = [
            dtype_of(g) if is_arraylike(g) and not is_left_alone(g) else None for g in leaves
        ]
        wide_dtypes = [
            None if d is None else widened_dtype(d, compute_dtype(d)) for d in given_dtypes
        ]

        def cast(updates: Any, dtypes: list[Any]) -> Any:
            if given_dtypes == wide_dtypes:  # the gradients' dtypes are wide already
                return updates
            leaves, treedef = flatten(updates)
            return treedef.unflatten([_in_dtype(x, d) for x, d in zip(leaves, dtypes, strict=True)])

        new_states = list(states)
        is_done = False  # whether the rule before this part has already applied the part's factors
        for i, tx in enumerate(self.transforms):
            next_tx = self.transforms[i + 1] if i + 1 < len(states) else None
            if is_done:
                is_done = False
            elif tx.has_foreign or tx.must_be_last:
                # The weights must move by exactly the updates that the last part returns, so these
                # are rounded before it, not after. And the state of another library's transform may
                # get the dtype of its updates.
                updates = cast(updates, given_dtypes)
                updates, new_states[i] = tx.update(updates, states[i], params, **extra_args)
            elif _has_factors(tx):
                # Compute the factors from the updates before these are widened. Otherwise XLA would
                # keep wide copies of narrow gradients from the norm to the product.
                factors, new_states[i] = tx.factors(updates, states[i])
                updates = tx.scaled(factors, cast(updates, wide_dtypes), params)
            elif _applies_factors(tx) and _has_factors(next_tx) and not next_tx.reads_updates:
                factors, new_states[i + 1] = next_tx.factors(updates, states[i + 1])
                updates, new_states[i] = tx.step(cast(updates, wide_dtypes), states[i], factors)
                is_done = True
            else:
                updates = cast(updates, wide_dtypes)
                updates, new_states[i] = tx.update(updates, states[i], params, **extra_args)
        if not self.has_wide_updates:
            updates = cast(updates, given_dtypes)
        return updates, tuple(new_states)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        return states_of_parts(self, state)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.transforms))})"
