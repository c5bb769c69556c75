"""The parts of a transform that a leaf's gradient goes through, and what they do to the leaf."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.convert.values import leaves_by_path
from adamjax.hyperparams import with_hyperparams
from adamjax.paths import leaf_paths
from adamjax.scaling import add_decayed_weights, scale, scale_by_learning_rate, set_to_zero
from adamjax.schedule import by_path, rate_at
from adamjax.structure import Part

__all__ = ["SCALINGS", "Routes", "factor_of", "rate_of", "step_rate"]

# The transforms that multiply an update by a number.
SCALINGS = scale | scale_by_learning_rate | set_to_zero


def rate_of(path: str, part: Part) -> Any:
    """The learning rate of a part for a leaf, a number or a schedule; `None` if it has none."""
    rate = getattr(part.tx, "learning_rate", None)
    return rate.at(path) if isinstance(rate, by_path) else rate


def step_rate(path: str, after: Sequence[Part], steps_later: int = 0, dtype: Any = None) -> Any:
    """The rate of the next step or a later one, with all factors; `None` if no part scales."""
    scales = any(isinstance(part.tx, SCALINGS) for part in after)
    # Errors would write -0.0 as "-0".
    return 0.0 - factor_of(path, after, steps_later, dtype) if scales else None


def factor_of(path: str, route: Sequence[Part], steps_later: int = 0, dtype: Any = None) -> float:
    """The factor by which these parts multiply the next step, or a later one.

    Args:
      dtype: the dtype of counts, by default that of the state. With x64, quotients of counts
        are float64 only if counts are int64.
    """
    factor = 1.0
    for part in route:
        if isinstance(part.tx, scale_by_learning_rate):
            count = jnp.asarray(part.state.count, dtype)
            rate = rate_at(part.tx.learning_rate, count + jnp.asarray(steps_later, count.dtype))
            factor *= -float(rate.at(path) if isinstance(rate, by_path) else rate)
        elif isinstance(part.tx, scale):
            factor *= float(part.tx.factor)
        elif isinstance(part.tx, set_to_zero):
            factor = 0.0
    return factor


class Routes:
    """The routes of all leaves through a transform.

    A route is a list of parts without parts of their own, in the order of their updates.

    Attributes:
      parts: all parts of the transform, with those that have parts of their own.
      parts_and_paths: each of them with the paths of the leaves that it sees.
      position_of_leaf: for each path, the position of the leaf in the tree.
      floating_leaves: the paths of the leaves that are trained.
    """

    def __init__(self, adamjax_state: AdamjaxState) -> None:
        self.owner, self.parts = adamjax_state.owner, adamjax_state.parts
        self.parts_and_paths = [
            (part, frozenset(leaves_by_path(self.owner, part.params))) for part in self.parts
        ]
        self._innermost = [
            (part, paths) for part, paths in self.parts_and_paths if not part.tx.parts
        ]
        self.position_of_leaf = {path: i for i, path in enumerate(leaf_paths(adamjax_state.params))}
        self.floating_leaves = leaves_by_path(self.owner, adamjax_state.params).keys()

    def of_leaf(self, path: str) -> list[Part]:
        """The route of a leaf."""
        return [part for part, paths in self._innermost if path in paths]

    def is_set(self, name: str, path: str) -> bool:
        """Whether `with_hyperparams` sets this hyperparameter of a leaf between steps."""
        return any(
            isinstance(part.tx, with_hyperparams)
            and name in part.tx.hyperparams
            and path in leaves_by_path(self.owner, part.params)
            for part in self.parts
        )

    def decay_at(self, path: str, part: Part) -> Any:
        """The weight decay of a part for a leaf: a number or a schedule; 0 if there is none."""
        tx = part.tx
        if not isinstance(tx, add_decayed_weights):
            return 0.0
        # With a decay of 1, only the mask decides whether the leaf decays.
        unit_decay = tx.replace(weight_decay=1.0)
        pair = unit_decay.affine(part.state, part.params, self.position_of_leaf[path], np.float32)
        if pair is None or not float(pair[1]):
            return 0.0
        decay = tx.weight_decay
        decay = decay.at(path) if isinstance(decay, by_path) else decay
        return decay if callable(decay) else float(decay)

    def has_masked_decay(self) -> bool:
        """Whether some weight decay of the transform has a mask."""
        decays = [part.tx for part in self.parts if isinstance(part.tx, add_decayed_weights)]
        return any(tx.mask is not None for tx in decays)

    def decay_before_scaling(self, path: str, route: Sequence[Part]) -> float:
        """The weight decay that would have the same effect if it came before all scalings."""
        return sum(
            decay / (factor_of(path, route[:i]) or math.nan)
            for i, decay in self._decays(path, route)
        )

    def decay_into_rule(self, path: str, before: Sequence[Part]) -> float:
        """The weight decay before the rule, times the factors between it and the rule."""
        return sum(decay * factor_of(path, before[i:]) for i, decay in self._decays(path, before))

    def _decays(self, path: str, route: Sequence[Part]) -> list[tuple[int, float]]:
        """The weight decays of a leaf that are not 0, with their positions on its route."""
        decays = []
        for i, part in enumerate(route):
            if isinstance(part.tx, add_decayed_weights):
                pair = part.tx.affine(
                    part.state, part.params, self.position_of_leaf[path], np.float32
                )
                if pair is not None and float(pair[1]):
                    decays.append((i, float(pair[1])))
        return decays
