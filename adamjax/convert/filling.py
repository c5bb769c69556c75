"""Fills a state from the common form: every value is checked, and each must be used."""

from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.convert.source import LeafMoments, Source, shifted_schedule
from adamjax.convert.values import class_name, leaves_by_path
from adamjax.data import Tree, is_array
from adamjax.layout import laid_out_like
from adamjax.leaves import described, is_left_alone
from adamjax.paths import flatten, leaf_paths
from adamjax.transform import RESTORED_WITHOUT_CLASSES

__all__ = ["ACCUMULATED", "AVERAGE", "StateFiller"]

# Errors name slots; for an accumulated gradient and for an average they use these instead.
ACCUMULATED, AVERAGE = "the accumulated gradient", "the average"


class StateFiller:
    """Takes moments, counts and other states out of a source, and checks that nothing is left.

    Attributes:
      source: the source.
      ours: the state of adamjax that the source is read from, or that is filled.
      check: as for `from_optax`.
      num_taken: by path, for how many rules the moments were taken.
      other_states: the states of other transforms that were not taken yet.
      in_accumulating: whether the part of the state that is being filled is inside a transform that
        accumulates gradients.
    """

    def __init__(self, source: Source, ours: AdamjaxState, check: bool) -> None:
        self.source, self.ours, self.check, self.owner = source, ours, check, source.owner
        self.num_taken: dict[str, int] = {}
        self.other_states = list(source.other_states)
        self.in_accumulating = False

    def take_moments(self, path: str) -> LeafMoments:
        """Takes the moments of a leaf's next rule; a leaf may go through several rules."""
        of_rules, i = self.source.moments.get(path, []), self.num_taken.get(path, 0)
        if i >= len(of_rules):
            has = "no moments" if not of_rules else f"the moments of {len(of_rules)} rule(s) only"
            known = sorted(self.source.moments)
            fix = "keep the rule from this leaf with masked or partition, or name leaves alike"
            if self.other_states and hasattr(self.other_states[0], "opt_state"):
                fix = f"pass the opt_state of the {class_name(self.other_states[0])}"
            elif any(class_name(x).startswith("flax.nnx.") for x in self.other_states):
                fix = "of flax.nnx, pass nnx.as_pure(optimizer.opt_state)"
            elif self.other_states:
                fix = (
                    f"conversions do not know its {class_name(self.other_states[0])}: convert a "
                    "state of Adam, AMSGrad, Nadam or Adamax"
                )
            flat_size = self._flat_size(path)
            if flat_size is not None:
                raise ValueError(
                    f"{self.owner}: the source has the moments of all leaves in one vector of "
                    f"{flat_size}, as in optax.flatten, and no moments of the leaf {path!r}: "
                    "split it, unravel = jax.flatten_util.ravel_pytree(params)[1] and "
                    "jax.tree.map(lambda x: unravel(x) if x.ndim else x, state), and pass the "
                    "optimizer without flatten"
                )
            if path == "" and known:
                fix = (
                    "the target has one vector for all leaves, as optax.flatten has: leave flatten "
                    "out"
                )
            if not known and all(map(is_array, self.other_states)):
                raise ValueError(
                    f"{self.owner}: the source has the moments of no leaf, expected the state of "
                    f"Adam, AMSGrad, Nadam or Adamax. {RESTORED_WITHOUT_CLASSES}"
                )
            raise ValueError(
                f"{self.owner}: the source has {has} of the leaf {path!r} (it has moments of "
                f"{known[:5]}{' and others' if len(known) > 5 else ''}): {fix}"
            )
        self.num_taken[path] = i + 1
        return of_rules[i]

    def _flat_size(self, path: str) -> int | None:
        """The size of a vector with the moments of all leaves; `None` if the source has none."""
        if path == "" or list(self.source.moments) != [""]:
            return None
        slots = self.source.moments[""][0].slots or {}
        size = sum(np.size(x) for x in leaves_by_path(self.owner, self.ours.params).values())
        return size if any(np.shape(x) == (size,) for x in slots.values()) else None

    def common_count(self, moments: Mapping[str, LeafMoments]) -> int:
        """The number of steps that the leaves of one rule have taken; it must be the same."""
        path_of_count: dict[int, str] = {}
        for path, leaf_moments in moments.items():
            path_of_count.setdefault(leaf_moments.count, path)
        if len(path_of_count) > 1:
            (a, first), (b, second) = list(path_of_count.items())[:2]
            left_out = " (None in order=)" if self.owner == "from_torch" else ""
            raise ValueError(
                f"{self.owner}: {first!r} has taken {a} steps and {second!r} {b}, but one rule "
                f"counts the steps of all its leaves: leave out{left_out} and freeze (partition, "
                "set_to_zero) a leaf that has no gradient, and give the others rules of their own "
                f"with partition; {shifted_schedule(a, b)}"
            )
        return next(iter(path_of_count), 0)

    def schedule_count(self, leaves: frozenset[str] | None, like: Any) -> Any:
        """The count of a schedule of these leaves, in the dtype of another count."""
        calls = None if self.in_accumulating else self.ours.calls_of(self.source, leaves)
        return jnp.asarray(self.source.count_of(leaves, calls), like.dtype)

    def array(self, path: str, name: str, x: Any, like: Any) -> Any:
        """A copy of an array with the dtype, the sharding and the memory layout of `like`."""
        what = f"{self.owner}: {name} of {path!r}"
        if np.shape(x) != np.shape(like):
            question = (
                "are the leaves in the right order (order=), or is one of the two transposed "
                "(adapt=)?"
            )
            if self.owner.endswith("optax"):
                question = "are params those that the state belongs to, or transposed?"
            raise ValueError(
                f"{what} has shape {list(np.shape(x))}, expected {list(np.shape(like))}, that of "
                f"the leaf: {question}"
            )
        old, new = np.dtype(x.dtype), np.dtype(like.dtype)
        if not jnp.issubdtype(new, jnp.inexact):
            raise ValueError(
                f"{what} is {new.name} in the target, expected floats like {old.name}: is it this "
                "optimizer's array?"
            )
        if not jnp.issubdtype(old, jnp.inexact):
            raise ValueError(
                f"{what} is {old.name}, expected floats like {new.name}: is it this optimizer's "
                "array?"
            )
        is_complex = jnp.issubdtype(old, jnp.complexfloating)
        if is_complex and not jnp.issubdtype(new, jnp.complexfloating) and not np.any(np.imag(x)):
            x, old = x.real, np.dtype(x.real.dtype)  # optax' v of a complex leaf
        elif not is_complex and jnp.issubdtype(new, jnp.complexfloating) and name == "nu":
            old = np.dtype(jnp.promote_types(old, jnp.complex64))
        if jnp.issubdtype(old, jnp.complexfloating) != jnp.issubdtype(new, jnp.complexfloating):
            raise ValueError(
                f"{what} is {old.name}, expected {new.name}: here m of a complex leaf is complex "
                "and v is real, the average of abs(g)**2"
            )
        if self.check and jnp.finfo(old).nmant > jnp.finfo(new).nmant:
            wide = np.asarray(x)
            if np.any(wide.astype(new).astype(old) != wide):
                self.refuse_rounding(path, name, old, new)
        if not isinstance(like, jax.Array):
            return np.array(x, new)
        array = jnp.array(x, new, copy=True)
        if array.sharding != like.sharding:
            array = jax.device_put(array, like.sharding)
        return laid_out_like(array, like)

    def refuse_rounding(self, path: str, name: str, old: np.dtype, new: np.dtype) -> NoReturn:
        """Raises the error about values that the target's dtype cannot represent."""
        fix = "keep it wider (m_dtype, v_dtype, or optax' mu_dtype)"
        if name == ACCUMULATED:
            fix = f"convert after a step, or give the target an array of {old.name}"
        raise ValueError(
            f"{self.owner}: {name} of {path!r} is {old.name} and would be rounded to {new.name}: "
            f"{fix}, or round it to {new.name} in the source first (check=False rounds it, but "
            "then checks nothing)"
        )

    def tree(self, name: str, values: Mapping[str, Any], like: Tree) -> Any:
        """A tree like `like`, with the value of each leaf by its path."""
        leaves, treedef = flatten(like)
        for i, path in enumerate(leaf_paths(like)):
            if leaves[i] is not None and not is_left_alone(leaves[i]):
                if path not in values:
                    fix = ""
                    if name == ACCUMULATED:
                        fix = (
                            ": convert after a step (or, for a frozen leaf, put "
                            "accumulate_gradients inside partition)"
                        )
                    if name == AVERAGE:
                        fix = ": put weight_ema inside partition, with the leaves that it averages"
                    raise ValueError(f"{self.owner}: the source lacks {name} of {path!r}{fix}")
                leaves[i] = self.array(path, name, values[path], leaves[i])
        return treedef.unflatten(leaves)

    def other_states_like(self, like: Any) -> list[int]:
        """The positions in `other_states` of those with the class, shapes and dtypes of `like`."""
        return [
            i
            for i, x in enumerate(self.other_states)
            if type(x) is type(like) and _described_leaves(x) == _described_leaves(like)
        ]

    def other_state(self, like: Any) -> Any:
        """A copy of the source's state of a transform that conversions do not know."""
        alike = self.other_states_like(like)
        if self.check and self.source.other_states_lost_order:
            first, *others = [jax.tree.leaves(self.other_states[i]) for i in alike] or [[]]
            if any(not np.array_equal(a, b) for x in others for a, b in zip(first, x, strict=True)):
                raise ValueError(
                    f"{self.owner}: there are several states of {class_name(like)} in a "
                    "dictionary, whose order JAX loses, so nothing shows which is which: set them "
                    "by hand, or pass check=False to use the order of the sorted keys"
                )
        if alike:
            # For leaves that a mask hides, optax and adamjax have different nodes.
            leaves = [
                jnp.array(x, copy=True) for x in jax.tree.leaves(self.other_states.pop(alike[0]))
            ]
            return jax.tree.unflatten(jax.tree.structure(like), leaves)
        raise ValueError(
            f"{self.owner}: the source has no {_name_of_state(like)} of these shapes and dtypes "
            f"that is not yet in use, and tx or the target has one ({class_name(like)}): use "
            "adamjax's own transform in its place, leave it out, or start it anew and set its "
            "state by hand"
        )

    def finish(self) -> None:
        """Refuses moments and states of the source that were not taken."""
        for path, of_rules in self.source.moments.items():
            if self.num_taken.get(path, 0) < len(of_rules):
                raise ValueError(
                    f"{self.owner}: the moments of the leaf {path!r} have no place: no rule of the "
                    "state to be filled sees this leaf. Change the patterns of masked and "
                    "partition, or drop the moments from the source"
                )
        if self.other_states:
            other, place = self.other_states[0], "tx"
            if self.owner.startswith("to_"):
                place = "the target"
            raise ValueError(
                f"{self.owner}: {place} has no place for {described(other)} of the source "
                f"({class_name(other)}): put the transform that made it into {place} too "
                "(adamjax.chain takes optax's transforms)"
            )


def _name_of_state(x: Any) -> str:
    """The name of the class of a transform's state, for errors."""
    return "array" if is_array(x) else type(x).__name__


def _described_leaves(tree: Any) -> list[tuple[Any, ...]]:
    """The paths, shapes and dtypes of the leaves of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(k), np.shape(x), jnp.result_type(x)) for k, x in leaves]
