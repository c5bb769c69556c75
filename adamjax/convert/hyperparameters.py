"""Compares the hyperparameters of torch's or Keras' optimizer with those of a transform."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import x64
from adamjax.average import weight_ema
from adamjax.clip import clip_by_global_norm, clip_by_norm, clip_by_value
from adamjax.convert.adamjax_state import AdamjaxState, is_of_adamjax
from adamjax.convert.schedules import ForeignSchedule, follows_count, later_counts
from adamjax.convert.source import Hyperparams, LeafMoments
from adamjax.convert.systems import System, kind_of
from adamjax.convert.values import leaves_by_path, same_decay, same_value
from adamjax.exact import exact_rows
from adamjax.guard import AccumulateGradientsState, accumulate_gradients
from adamjax.hyperparams import with_hyperparams
from adamjax.paths import leaf_paths
from adamjax.scaling import add_decayed_weights, scale, scale_by_learning_rate, set_to_zero
from adamjax.schedule import by_path, rate_at
from adamjax.structure import Part, states_of_class
from adamjax.transform import Rule, foreign

__all__ = ["expect_same_hyperparameters"]

_FREEZE = "freeze it with partition and set_to_zero, around everything that moves it"
# The number of intervals between earlier counts at which rates are computed.
_EARLIER = 16
_CLIPS = (clip_by_value, clip_by_norm, clip_by_global_norm)
# The names of keys in errors, if not the keys themselves. Keys with an empty string are not listed,
# because on their own they state no hyperparameter.
_NAMES_IN_ERRORS = {
    **dict.fromkeys(("masks_decay", "decoupled", "form", "others"), ""),
    **dict.fromkeys(("clips_updates", "in_steps"), ""),
    **dict.fromkeys(("unknown_schedule", "incomparable_rate"), "a schedule of the rate"),
    "has_decay": "a weight decay",
    "is_frozen": "trainable=False",
    "gradient_factor": "a factor of gradients",
}


def expect_same_hyperparameters(
    ours: AdamjaxState, system: System, moments: Mapping[str, list[LeafMoments]]
) -> None:
    """Refuses a transform whose hyperparameters are not those that torch or Keras states.

    The hyperparameters of a leaf and a rule are a dictionary. A missing key is not compared. The
    keys:

    - `b1`, `b2`, `eps`: numbers. `form`: `"eps"` or `"eps_hat"`, if it is not the system's usual
      form.
    - `learning_rate`: the rate of the next step, or a schedule. `unknown_schedule`: if
      there is a schedule, but its values are unknown: two strings, the evidence for it and a note.
      `incomparable_rate`: for a rate that cannot even be read, a string with the reason.
    - `weight_decay`: a number. `decoupled`: whether it is after the rule, `None` if that is not
      stated. `masks_decay`: which leaves it excludes: "none", "some", or "unknown". `has_decay`:
      whether some leaf decays, by any amount.
    - `in_steps`: whether a weight decay after the rule applies once per step of the rule, and a
      schedule of the rate counts these steps, rather than calls of `update`.
    - `maximize`: whether gradients are negated before the rule. With this key, a factor of 0 before
      the rule is refused too.
    - `lazy`: whether rows without a gradient stand still.
    - `clips`: all transforms that clip, in order; all are before the rule.
    - `clips_updates`: false if the system clips neither after the rule nor after a weight decay
      that is before the rule; for a system that does not state `clips`.
    - `others`: where `tx` may have transforms that cannot be compared, those of other libraries and
      the user's own: "before" the rule, or "none" for nowhere. Without this key, anywhere.
    - `gradient_factor`: the factor by which gradients are multiplied before they are clipped.
    - `is_frozen`: whether the leaf is not trained. Then nothing else is compared.
    - `average`: the momentum and the overwrite_frequency of the average of the weights.
    """
    _Check(ours, system).check(moments)


class _Check:
    """One comparison of hyperparameters."""

    def __init__(self, adamjax_state: AdamjaxState, system: System) -> None:
        self.owner, self.ours, self.system = adamjax_state.owner, adamjax_state, system
        self.all_parts = adamjax_state.parts
        # Each part with the paths of the leaves that it sees.
        self.parts_and_paths = [
            (part, frozenset(leaves_by_path(self.owner, part.params))) for part in self.all_parts
        ]
        self.innermost_parts_and_paths = [
            (part, paths) for part, paths in self.parts_and_paths if not part.tx.parts
        ]
        self.position_of_leaf = {path: i for i, path in enumerate(leaf_paths(adamjax_state.params))}
        self.floating_leaves = leaves_by_path(self.owner, adamjax_state.params).keys()
        accumulations = states_of_class(AccumulateGradientsState, adamjax_state.state)
        self.is_amid_accumulation = any(int(x.micro_count) for x in accumulations)
        # Schedules of the system, each with rates and scalings of tx that agree with it at all
        # compared counts.
        self.agreeing: list[tuple[Any, Any]] = []

    def check(self, moments: Mapping[str, list[LeafMoments]]) -> None:
        """Compares the hyperparameters of each leaf; the first that differs is an error."""
        # For each leaf with a stated rate, whether anything in tx scales its updates.
        has_rate: dict[str, bool] = {}
        trained = {path for path, x in moments.items() if not x[-1].hyperparams.get("is_frozen")}
        # The number of calls in a step, with the first leaf that has it.
        calls: dict[int, str] = {}
        for path, leaf_moments in moments.items():
            route = [part for part, paths in self.innermost_parts_and_paths if path in paths]
            rules = [i for i, part in enumerate(route) if isinstance(part.tx, Rule)]
            if len(rules) != len(leaf_moments):
                self._expect_nothing_stated(path, leaf_moments)
            elif path not in trained:
                self._expect_frozen(path, route[rules[-1] :])
            else:
                calls.setdefault(self._calls_of_a_step(path, [route[i] for i in rules]), path)
                for i, of_rule in zip(rules, leaf_moments, strict=True):
                    self._check_rule(path, route[i], of_rule.hyperparams)
                    self._check_direction(path, route[:i], of_rule.hyperparams)
                hyperparams, last = leaf_moments[-1].hyperparams, rules[-1]
                self._expect_comparable(path, route[last], hyperparams.get("others"))
                if not hyperparams.get("clips_updates", True):
                    self._expect_clips_first(path, route[:last], route[last:])
                if "clips" in hyperparams:
                    self._check_clips(path, route, rules[0], hyperparams["clips"], trained)
                if "gradient_factor" in hyperparams:
                    self._check_factor(path, route[: rules[0]], hyperparams["gradient_factor"])
                if "average" in hyperparams:
                    self._check_average(path, route, *hyperparams["average"])
                if hyperparams.get("in_steps"):
                    self._expect_in_steps(path, route[last:])
                self._check_rate(path, route[last:], hyperparams)
                if "learning_rate" in hyperparams or hyperparams.get("unknown_schedule"):
                    has_foreign = any(part.tx.has_foreign for part in route[last:])
                    has_rate[path] = has_foreign or self._rate(path, route[last:]) is not None
                self._check_schedule(path, route[last:], hyperparams)
                self._check_decay(path, route[:last], route[last:], hyperparams)

        if len(calls) > 1:
            (one, first), (other, second), *_ = calls.items()
            self._refuse(
                second,
                "steps of all leaves at the same calls",
                f"steps of {other} calls for this leaf, and of {one} for {first!r}",
                "accumulate the gradients of all leaves over the same number of calls",
            )
        self._expect_leaves_without_moments_frozen(moments)
        without_rate = [path for path, has in has_rate.items() if not has]
        if without_rate:
            self._refuse(
                without_rate[0],
                "a learning rate for all leaves",
                f"none for {'this leaf, and one for others' if any(has_rate.values()) else 'any'}",
                "put scale_by_learning_rate after its rule",
            )

    def _calls_of_a_step(self, path: str, rules: Sequence[Part]) -> int:
        """How many calls of `update` make a step of a leaf.

        Refuses an accumulate_gradients on the leaf's route that is not around its rules. Around a
        clip or a rate alone, it gives the rule a gradient of 0 in most of its steps, or drops them.
        """
        around = {id(part) for rule in rules for part in self.ours.around(rule)}
        calls = 1
        for part, paths in self.parts_and_paths:
            if path not in paths or not isinstance(part.tx, accumulate_gradients):
                continue
            if id(part) not in around:
                self._refuse(
                    path,
                    "its rule inside any accumulation of gradients",
                    f"{part.tx!r} beside the rule {rules[-1].tx!r}",
                    "put the rule inside: accumulate_gradients(chain(..., rule, ...), steps)",
                )
            calls *= int(part.tx.steps)
        return calls

    def _expect_leaves_without_moments_frozen(
        self, moments: Mapping[str, list[LeafMoments]]
    ) -> None:
        """Refuses a transform that moves leaves which the system's optimizer does not have.

        A leaf with a rule but no scaling is not refused here, because it may never get a gradient.
        If it gets one, `train_step` refuses the transform: its updates go uphill.
        """
        for path in (path for path in self.position_of_leaf if path not in moments):
            route = [part for part, paths in self.innermost_parts_and_paths if path in paths]
            self._expect_still(path, route, "an optimizer without this leaf")

    def _expect_frozen(self, path: str, after: Sequence[Part]) -> None:
        """Refuses a transform that moves a leaf which the system's optimizer does not train.

        `after` has the parts from the last rule on.
        """
        stated = "a variable with trainable=False"
        fix = f"{_FREEZE}, and give None for it in order="
        self._expect_still(path, after, stated, fix)
        if not any(isinstance(part.tx, set_to_zero) for part in after):
            self._refuse(path, stated, f"{after[0].tx!r}, which moves it", fix)

    def _expect_still(
        self, path: str, route: Sequence[Part], stated: str, fix: str = _FREEZE
    ) -> None:
        """Refuses a route on which something moves a leaf without gradients."""
        zeros = [i for i, part in enumerate(route) if isinstance(part.tx, set_to_zero)]
        moving = [
            part.tx for part in route[zeros[-1] if zeros else 0 :] if self._decay_at(path, part)
        ]
        if not zeros:
            moving += [p.tx for p in route if isinstance(p.tx, scale | scale_by_learning_rate)]
        if moving:
            self._refuse(path, stated, f"{moving[0]!r}, which moves it", fix)
        is_known = all(is_of_adamjax(part.tx) and not part.tx.has_foreign for part in route)
        has_rule = any(isinstance(part.tx, Rule) for part in route)
        if not zeros and is_known and not has_rule and path in self.floating_leaves:
            self._refuse(path, stated, "no rule for it, so its update is its gradient", fix)

    def _expect_clips_first(self, path: str, before: Sequence[Part], after: Sequence[Part]) -> None:
        """Refuses a clip after the rule, or after a weight decay that is before the rule."""
        clips = [part.tx for part in after if isinstance(part.tx, _CLIPS)]
        if clips:
            fix = "clip gradients only, before the rule"
            self._refuse(path, "no clip of updates", f"{clips[0]!r} after the rule", fix)
        decays = False
        for part in before:
            decays = decays or bool(self._decay_at(path, part))
            if decays and isinstance(part.tx, _CLIPS):
                fix = "put the clip before the weight decay"
                in_tx = f"{part.tx!r} after its weight decay"
                self._refuse(path, "clips before its weight decay only", in_tx, fix)

    def _expect_in_steps(self, path: str, after: Sequence[Part]) -> None:
        """Refuses a weight decay or a schedule outside of the rule's `accumulate_gradients`.

        Outside, the decay would apply in each call, and the schedule would count calls, rather than
        steps.
        """
        num = self.ours.num_accumulations(after[0])
        for part in (part for part in after if self.ours.num_accumulations(part) < num):
            rate = self._rate_of_leaf(path, part)
            if self._decay_at(path, part):
                stated, in_tx = "a weight decay in its steps", "one in each call"
            elif follows_count(rate):
                stated, in_tx = "a rate that changes with its steps", "one that counts calls"
            else:
                continue
            fix = f"put it inside accumulate_gradients ({type(part.tx).__name__} after the rule)"
            self._refuse(path, stated, f"{in_tx}, {part.tx!r}", fix)

    def _expect_comparable(self, path: str, rule: Part, allowed: str | None) -> None:
        """Refuses transforms of other libraries and the user's own, which cannot be compared.

        `allowed` is the value of the key `others`. A transform around the rule counts as before and
        after it.
        """
        if allowed is None:
            return
        position = next(i for i, part in enumerate(self.all_parts) if part is rule)
        around = {id(part) for part in self.ours.around(rule)}
        incomparable = [
            part.tx
            for i, (part, paths) in enumerate(self.parts_and_paths)
            if path in paths
            and (isinstance(part.tx, foreign) or not is_of_adamjax(part.tx))
            and (allowed == "none" or i >= position or id(part) in around)
        ]
        if incomparable:
            whose = "another library" if incomparable[0].has_foreign else "your own"
            self._refuse(
                path,
                "only what adamjax has transforms for",
                f"{incomparable[0]!r} of {whose}, which nothing can compare",
                "use adamjax's own (clips, scale, add_decayed_weights, scale_by_learning_rate)",
            )

    def _expect_nothing_stated(self, path: str, leaf_moments: Sequence[LeafMoments]) -> None:
        """Refuses hyperparameters for rules that a transform of another library hides."""
        names = [
            _NAMES_IN_ERRORS.get(name, name)
            for of_rule in leaf_moments
            for name, x in of_rule.hyperparams.items()
            if x is not False
        ]
        stated = [name for name in names if name]
        if stated:
            self._refuse(
                path,
                f"hyperparameters, {', '.join(stated)}",
                "its rule inside a transform of another library, where nothing can compare them",
                "use adamjax.chain, masked or partition in place of that transform (they take "
                "other libraries' transforms too)",
            )

    def _refuse(self, path: str, stated: str, in_tx: str, fix: str, note: str = "") -> None:
        """Raises an error: the system has `stated`, and `tx` has `in_tx`.

        `fix` says how to change `tx`, or, if it is `system.set_rate`, the system's optimizer.
        """
        goes_on_with = "what tx has"
        if self.owner.startswith("to_"):
            if fix != self.system.set_rate:
                fix = f"give the target the same, or {fix}"
            goes_on_with = f"what {self.system.name} has"
        note = f". Note: {note}" if note else ""
        raise ValueError(
            f"{self.owner}: {path!r}: {self.system.name} has {stated}, tx has {in_tx}: {fix}, "
            f"or pass check=False to go on with {goes_on_with}{note}"
        )

    # --- the rule ---------------------------------------------------------------------------------

    def _check_rule(self, path: str, part: Part, hyperparams: Hyperparams) -> None:
        rule: Any = part.tx
        form = hyperparams.get("form", self.system.epsilon[kind_of(self.owner, part.state)])
        eps = hyperparams.get("eps")
        stated = form if eps is None else f"{form}={float(eps):g}"
        if getattr(rule, form) is None:
            root = "uncorrected root" if form == "eps_hat" else "bias-corrected root"
            other = "eps" if form == "eps_hat" else "eps_hat"
            self._refuse(
                path,
                f"epsilon added to the {root} ({stated})",
                f"{other}={getattr(rule, other)}",
                f"build tx with {f'{form}=..., the same value' if eps is None else stated}",
                self.system.not_stated if eps is None else "",
            )
        for name, in_tx in (("b1", rule.b1), ("b2", rule.b2), ("eps", getattr(rule, form))):
            same = same_value if name == "eps" else same_decay
            if name in hyperparams and not same(hyperparams[name], in_tx):
                name_in_tx = form if name == "eps" else name
                stated = f"{name_in_tx}={float(hyperparams[name]):.9g}"
                self._refuse(path, stated, f"{name_in_tx}={in_tx}", f"build tx with {stated}")
        exact = any(isinstance(part.tx, exact_rows) for part in self.all_parts)
        if hyperparams.get("lazy") and (rule.rows != "lazy" or exact):
            rows = "exact_rows" if exact else f"rows={rule.rows!r}"
            stated = "rows that stand still without a gradient"
            fix = f"build the rule of tx with rows='lazy'{', without exact_rows' if exact else ''}"
            self._refuse(path, stated, rows, fix)

    def _check_direction(self, path: str, before: Sequence[Part], hyperparams: Hyperparams) -> None:
        """Compares the sign of gradients before the rule (`maximize`); refuses a factor of 0."""
        if "maximize" not in hyperparams:
            return
        if self._factor(path, before) == 0:
            zero = next(part.tx for part in before if self._factor(path, [part]) == 0)
            fix = "leave it out, or freeze the leaf with partition and set_to_zero"
            self._refuse(path, "gradients as they are", f"{zero!r} before the rule", fix)
        negating = [i for i, part in enumerate(before) if self._factor(path, [part]) < 0]
        last = before[negating[-1]].tx if negating else None
        maximize, is_negated = bool(hyperparams["maximize"]), len(negating) % 2 == 1
        decays_first = bool(negating) and bool(
            self._decay_before_scaling(path, before[: negating[-1]])
        )
        if is_negated == maximize and not decays_first:
            return
        if is_negated == maximize:
            in_tx = f"gradients that {last!r} negates after their weight decay"
            fix = "move it before the weight decay"
        elif last is None:
            in_tx, fix = "none", "begin tx with scale(-1.0)"
        elif maximize:
            in_tx, fix = f"gradients that {last!r} negates again", "leave it out"
        else:
            in_tx, fix = f"{last!r} before the rule", "leave it out, or put it after the rule"
        stated = "negated gradients (maximize=True)" if maximize else "gradients as they are"
        self._refuse(path, stated, in_tx, fix)

    def _check_clips(
        self,
        path: str,
        route: Sequence[Part],
        rule_position: int,
        stated: Sequence[Any],
        trained: Set[str],
    ) -> None:
        """Compares the clips of a leaf, and their positions.

        Args:
          trained: the paths of all leaves that the system's optimizer trains.
        """
        before = [part for part in route[:rule_position] if isinstance(part.tx, _CLIPS)]
        after = [part.tx for part in route[rule_position:] if isinstance(part.tx, _CLIPS)]
        if not stated and any(part.tx.has_foreign for part in route[:rule_position]):
            return  # A transform of another library may clip or not.
        clips = [part.tx for part in before]
        in_tx = ", ".join(map(repr, clips)) or "no clip before the rule"
        fix = f"put {', '.join(map(repr, stated))} before the rule" if stated else "leave clips out"
        if after:
            in_tx, fix = f"{after[0]!r} after the rule", f"{fix}, and none after it"
        elif len(clips) == len(stated) and all(map(_is_same_clip, clips, stated)):
            of_other_leaves = [
                part.tx
                for part in before
                if isinstance(part.tx, clip_by_global_norm)
                and trained != leaves_by_path(self.owner, part.params).keys()
            ]
            outside = [part.tx for part in before if not self.ours.num_accumulations(part)]
            if of_other_leaves:
                in_tx = f"{of_other_leaves[0]!r} of other leaves"
                fix = "clip the leaves that its optimizer has by one norm, and no others (masked)"
            elif self.ours.accumulates and outside:
                in_tx = f"{outside[0]!r} outside of accumulate_gradients"
                fix = "put it inside, before the rule"
            else:
                return
        self._refuse(path, ", ".join(map(repr, stated)) or "no clip", in_tx, fix)

    def _check_factor(self, path: str, before: Sequence[Part], stated: float) -> None:
        """Compares the factor of gradients before they are clipped."""
        clips = [i for i, part in enumerate(before) if isinstance(part.tx, _CLIPS)]
        first, rest = (before[: clips[0]], before[clips[0] :]) if clips else (before, ())
        inside_accumulation = [
            part.tx
            for part in before
            if self.ours.num_accumulations(part) and self._factor(path, [part]) != 1
        ]
        if inside_accumulation and self.is_amid_accumulation:
            self._refuse(
                path,
                f"the sum of micro-batches that were multiplied by {stated:g}",
                f"{inside_accumulation[0]!r} inside of accumulate_gradients",
                "put it outside of accumulate_gradients, or convert after a step",
            )
        before_clips, after_clip = self._factor(path, first), self._factor(path, rest)
        if not same_value(stated, before_clips) or after_clip != 1:
            in_tx = f"gradients multiplied by {before_clips:g} before the rule"
            fix = f"begin tx with scale({stated:g})" if stated != 1 else "leave that scale out"
            if after_clip != 1:
                in_tx = (
                    f"gradients multiplied by {before_clips:g} before a clip, and by "
                    f"{after_clip:g} after it"
                )
                fix += ", and put none between a clip and the rule"
            factor = (
                f"gradients multiplied by {stated:g}" if stated != 1 else "no loss_scale_factor"
            )
            self._refuse(path, factor, in_tx, fix)

    def _check_average(
        self, path: str, route: Sequence[Part], momentum: float, frequency: int | None
    ) -> None:
        """Compares the average of the weights, if `tx` has one."""
        stated = f"momentum={momentum:.9g}, overwrite_frequency={frequency}"
        for tx in (part.tx for part in route if isinstance(part.tx, weight_ema)):
            if not same_decay(momentum, tx.momentum) or frequency != tx.overwrite_frequency:
                in_tx = f"momentum={tx.momentum}, overwrite_frequency={tx.overwrite_frequency}"
                fix = f"build tx with weight_ema({momentum:.9g}, {frequency})"
                self._refuse(path, f"an average with {stated}", in_tx, fix)

    # --- the rate ---------------------------------------------------------------------------------

    def _check_rate(self, path: str, after: Sequence[Part], hyperparams: Hyperparams) -> None:
        """Compares the rate of the next step; `after` has the parts from the last rule on."""
        if hyperparams.get("incomparable_rate"):
            self._refuse_incomparable(path, after, hyperparams["incomparable_rate"])
        stated = hyperparams.get("learning_rate")
        if stated is None:
            return
        schedule, count = None, 0
        if callable(stated) or isinstance(stated, ForeignSchedule):
            # The system's schedule is called with the count of tx.
            rates = [part for part in after if isinstance(part.tx, scale_by_learning_rate)]
            schedule, count = stated, int((*rates, after[0])[0].state.count)
            try:
                stated = self._stated_rate(schedule, count)
            except ValueError as error:
                self._refuse_incomparable(path, after, str(error))
        in_tx = self._rate(path, after)
        fix = "build tx with that rate (by_path, if leaves have rates of their own)"
        if self.owner.startswith("to_"):
            fix = self.system.set_rate
        if in_tx is not None and not self._has_stated_rate(path, after, stated, schedule, count):
            self._refuse(
                path,
                f"a learning rate of {float(stated):g}",
                f"{float(in_tx):g} for the next step",
                fix,
                self._note_on_rate(path, after, stated, schedule),
            )
        is_set = self._is_set("learning_rate", path)
        if in_tx is not None and schedule is not None and not is_set:
            self._check_later_rates(path, after, schedule, count)

    def _refuse_incomparable(self, path: str, after: Sequence[Part], why: str) -> None:
        rates = [x for x in (self._rate_of_leaf(path, part) for part in after) if x is not None]
        self._refuse(
            path,
            f"a learning rate that cannot be compared: {why}",
            f"the rate {rates[0]!r}" if rates else "none",
            "fix that function, or compare the two rates yourself",
        )

    @staticmethod
    def _stated_rate(schedule: Any, count: int) -> float:
        """The rate of a schedule, in float64 if possible; see `ForeignSchedule.stated`."""
        if isinstance(schedule, ForeignSchedule):
            return schedule.stated(count)
        with x64(True):
            return float(rate_at(schedule, jnp.asarray(count, int)))

    def _check_later_rates(
        self, path: str, after: Sequence[Part], schedule: Any, count: int
    ) -> None:
        """Compares a schedule with that of a leaf in later steps.

        The steps are those near each count where a part of a schedule may end, and some others far
        apart.
        """
        rates = [self._rate_of_leaf(path, part) for part in after]
        in_tx = rates, self._scalings(path, after)
        if any(schedule is agreed and in_tx == same for agreed, same in self.agreeing):
            return
        for later in later_counts(count, schedule, rates):
            try:
                stated = self._stated_rate(schedule, later)
            except ValueError:
                continue  # The other library could not take that step.
            steps_later = later - count
            if not self._has_stated_rate(path, after, stated, schedule, later, steps_later):
                self._refuse(
                    path,
                    f"a learning rate of {stated:g} after {later} steps",
                    f"{float(self._rate(path, after, steps_later)):g}",
                    "build tx with the same schedule",
                    self._note_on_rate(path, after, stated, schedule, steps_later),
                )
        self.agreeing.append((schedule, in_tx))

    def _scalings(self, path: str, after: Sequence[Part]) -> list[tuple[type, Any]]:
        """What the parts multiply a step by: factors, and the counts of rates."""
        scalings: list[tuple[type, Any]] = []
        for part in after:
            if isinstance(part.tx, scale_by_learning_rate):
                scalings.append((type(part.tx), int(part.state.count)))
            elif isinstance(part.tx, scale | set_to_zero):
                scalings.append((type(part.tx), self._factor(path, [part])))
        return scalings

    def _check_schedule(self, path: str, after: Sequence[Part], hyperparams: Hyperparams) -> None:
        """Refuses a constant rate for an unknown schedule, unless the user sets the rate."""
        if not hyperparams.get("unknown_schedule") or self._is_set("learning_rate", path):
            return
        classes = scale | scale_by_learning_rate | set_to_zero
        scales = any(isinstance(part.tx, classes) or part.tx.has_foreign for part in after)
        is_frozen = any(isinstance(part.tx, set_to_zero) for part in after)
        may_follow = any(self._may_follow_schedule(path, part) for part in after)
        if scales and (is_frozen or not may_follow):
            evidence, note = hyperparams["unknown_schedule"]
            self._refuse(
                path,
                f"a learning rate that follows a schedule ({evidence})",
                "a constant one",
                "build tx with the schedule, or adamjax.constant(rate) for one that has ended",
                note,
            )

    def _may_follow_schedule(self, path: str, part: Part) -> bool:
        if part.tx.has_foreign:  # A transform without a state cannot count steps.
            return bool(jax.tree.leaves(part.state))
        return callable(self._rate_of_leaf(path, part))

    @staticmethod
    def _rate_of_leaf(path: str, part: Part) -> Any:
        """The learning rate of a part for a leaf, a number or a schedule; `None` if it has none."""
        rate = getattr(part.tx, "learning_rate", None)
        return rate.at(path) if isinstance(rate, by_path) else rate

    def _is_set(self, name: str, path: str) -> bool:
        """Whether `with_hyperparams` sets this hyperparameter of a leaf between steps."""
        return any(
            isinstance(part.tx, with_hyperparams)
            and name in part.tx.hyperparams
            and path in leaves_by_path(self.owner, part.params)
            for part in self.all_parts
        )

    def _has_stated_rate(
        self,
        path: str,
        after: Sequence[Part],
        stated: Any,
        schedule: Any = None,
        count: int = 0,
        steps_later: int = 0,
    ) -> bool:
        """Whether the next step, or a later one, has the stated rate, as `tx` computes it.

        Args:
          stated: the rate, in float64 if possible.
          schedule, count: the schedule that states the rate, if any, and its count.
        """
        in_step = float(self._rate(path, after, steps_later))
        is_foreign = isinstance(schedule, ForeignSchedule)
        if is_foreign and schedule.known is None:
            return schedule.is_near(count, in_step)
        if same_value(stated, in_step) or (is_foreign and schedule.is_near(count, in_step)):
            return True
        if not self._has_stated_rate_in_float64(path, after, stated, steps_later):
            return False
        # In float32 some schedules are inaccurate, as a cosine near its end. An error that is small
        # compared with earlier rates is allowed.
        rates = [part for part in after if isinstance(part.tx, scale_by_learning_rate)]
        last = min((int(part.state.count) for part in rates), default=0) + steps_later
        earlier_rates = [
            float(self._rate(path, after, steps_later - last * i // _EARLIER))
            for i in range(_EARLIER + 1)
        ]
        largest = max((abs(x) for x in earlier_rates if math.isfinite(x)), default=0.0)
        return math.isclose(in_step, stated, rel_tol=1e-4, abs_tol=1e-6 * largest)

    def _has_stated_rate_in_float64(
        self, path: str, after: Sequence[Part], stated: Any, steps_later: int = 0
    ) -> bool:
        """Whether a step would have the stated rate in float64 and with counts in int64."""
        try:
            with x64(True):
                return same_value(stated, self._rate(path, after, steps_later, jnp.int64))
        except TypeError:  # A function of another library may work in float32 only.
            return False

    def _note_on_rate(
        self,
        path: str,
        after: Sequence[Part],
        stated: Any,
        schedule: Any = None,
        steps_later: int = 0,
    ) -> str:
        """A note for an error about a rate: why the two rates differ, if that is known."""
        if isinstance(schedule, ForeignSchedule) and schedule.note:
            return schedule.note
        if self._has_stated_rate_in_float64(path, after, stated, steps_later):
            return (
                "in float64 the schedule of tx has that rate, but steps compute it in float32, and "
                "products of counts in int32; adamjax's own schedules are accurate so"
            )
        return ""

    def _rate(
        self, path: str, after: Sequence[Part], steps_later: int = 0, dtype: Any = None
    ) -> Any:
        """The rate of the next step or a later one, with all factors; `None` if no part scales."""
        scaling_classes = scale | scale_by_learning_rate | set_to_zero
        scales = any(isinstance(part.tx, scaling_classes) for part in after)
        # Errors would write -0.0 as "-0".
        return 0.0 - self._factor(path, after, steps_later, dtype) if scales else None

    def _factor(
        self, path: str, route: Sequence[Part], steps_later: int = 0, dtype: Any = None
    ) -> float:
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

    # --- the weight decay -------------------------------------------------------------------------

    def _check_decay(
        self, path: str, before: Sequence[Part], after: Sequence[Part], hyperparams: Hyperparams
    ) -> None:
        """Compares the weight decay, before the last rule of a leaf and after it."""
        if hyperparams.get("has_decay") and not any(
            isinstance(part.tx, add_decayed_weights) or part.tx.has_foreign
            for part in self.all_parts
        ):
            self._refuse(
                path,
                "AdamW's weight decay",
                "none",
                "build tx with adamw(..., weight_decay=...), 0.004 by default in Keras",
                "the variables do not contain it; pass the optimizer itself to compare it",
            )
        if "weight_decay" not in hyperparams:
            return
        stated, decoupled = float(hyperparams["weight_decay"]), hyperparams.get("decoupled")
        for i, part in enumerate((*before, *after)):
            decay = self._decay_at(path, part)
            is_before = i < len(before)
            parts_between = before[i:] if is_before else after[: i - len(before)]
            rates = [self._rate_of_leaf(path, p) for p in parts_between] if decay else []
            if any(map(follows_count, (decay, *rates))):
                where = ", with a schedule of the rate between it and the rule"
                where = "" if follows_count(decay) else where
                belongs_before = is_before if decoupled is None else not decoupled
                side = "before" if belongs_before else "after"
                fix = f"put add_decayed_weights({stated:g}) directly {side} the rule"
                stated_decay = f"the same weight decay in each step, {stated:g}"
                self._refuse(path, stated_decay, f"{part.tx!r}{where}", fix)
        before_rule = self._decay_into_rule(path, before)
        after_rule = self._decay_before_scaling(path, after)
        # Pairs of the decay before the rule and the decay after it.
        allowed = {
            None: [(0.0, stated), (stated, 0.0)],
            True: [(0.0, stated)],
            False: [(stated, 0.0)],
        }[decoupled]
        masks = hyperparams.get("masks_decay", "none")
        if masks != "none":
            # It is not stated which leaves decay, so this leaf need not, if another one does.
            decays = [part for part in self.all_parts if isinstance(part.tx, add_decayed_weights)]
            does_decay = [
                same_value(self._decay_before_scaling(p, decays), stated)
                for p in self.position_of_leaf
            ]
            if any(does_decay):
                allowed.append((0.0, 0.0))
            if masks == "some" and stated and all(does_decay):
                self._refuse(
                    path,
                    "variables that its weight decay excludes",
                    "a weight decay of all leaves",
                    "pass a mask= of the leaves that decay",
                )
        if not any(same_value(before_rule, a) and same_value(after_rule, b) for a, b in allowed):
            where = (
                "before the rule (in its moments)"
                if decoupled is False
                else "after the rule, before scale_by_learning_rate and every other scaling"
            )
            fix = f"put add_decayed_weights({stated:g}) {where}"
            if not stated:
                fix = "pass a mask= of the leaves that decay; if none does, leave the decay out"
            elif not before_rule and not after_rule and self._is_masked():
                fix += f", with a mask= that this leaf matches{self.system.lost_mask}"
            self._refuse(
                path,
                f"a weight decay of {stated:g}",
                f"{before_rule:g} before its rule and {after_rule:g} after it",
                fix,
            )

    def _decay_at(self, path: str, part: Part) -> Any:
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

    def _is_masked(self) -> bool:
        """Whether some weight decay of the transform has a mask."""
        decays = [part.tx for part in self.all_parts if isinstance(part.tx, add_decayed_weights)]
        return any(tx.mask is not None for tx in decays)

    def _decay_before_scaling(self, path: str, route: Sequence[Part]) -> float:
        """The weight decay that would have the same effect if it came before all scalings."""
        return sum(
            decay / (self._factor(path, route[:i]) or math.nan)
            for i, decay in self._decays(path, route)
        )

    def _decay_into_rule(self, path: str, before: Sequence[Part]) -> float:
        """The weight decay before the rule, times the factors between it and the rule."""
        return sum(
            decay * self._factor(path, before[i:]) for i, decay in self._decays(path, before)
        )

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


def _is_same_clip(clip: Any, stated: Any) -> bool:
    """Whether two transforms that clip are of one class and have the same limit."""
    name = "limit" if isinstance(stated, clip_by_value) else "max_norm"
    is_same_class = type(clip) is type(stated)
    return is_same_class and same_value(getattr(stated, name), getattr(clip, name))
