"""Compares the hyperparameters of torch's or Keras' optimizer with those of a transform."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from adamjax.average import weight_ema
from adamjax.clip import clip_by_global_norm, clip_by_norm, clip_by_value
from adamjax.convert.adamjax_state import AdamjaxState, is_of_adamjax
from adamjax.convert.rates import RateCheck
from adamjax.convert.routes import Routes, factor_of, rate_of, step_rate
from adamjax.convert.schedules import follows_count
from adamjax.convert.source import Hyperparams, LeafMoments
from adamjax.convert.systems import System, kind_of
from adamjax.convert.values import leaves_by_path, same_decay, same_value
from adamjax.exact import exact_rows
from adamjax.guard import AccumulateGradientsState, accumulate_gradients
from adamjax.scaling import add_decayed_weights, scale, scale_by_learning_rate, set_to_zero
from adamjax.structure import Part, states_of_class
from adamjax.transform import Rule, foreign

__all__ = ["expect_same_hyperparameters"]

_FREEZE = "freeze it with partition and set_to_zero, around everything that moves it"
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
        self.routes = Routes(adamjax_state)
        self.rate_check = RateCheck(self.routes, system)
        accumulations = states_of_class(AccumulateGradientsState, adamjax_state.state)
        self.is_amid_accumulation = any(int(x.micro_count) for x in accumulations)

    def check(self, moments: Mapping[str, list[LeafMoments]]) -> None:
        """Compares the hyperparameters of each leaf; the first that differs is an error."""
        # For each leaf with a stated rate, whether anything in tx scales its updates.
        has_rate: dict[str, bool] = {}
        trained = {path for path, x in moments.items() if not x[-1].hyperparams.get("is_frozen")}
        # The number of calls in a step, with the first leaf that has it.
        calls: dict[int, str] = {}
        for path, leaf_moments in moments.items():
            route = self.routes.of_leaf(path)
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
                self.rate_check.check_rate(path, route[last:], hyperparams)
                if "learning_rate" in hyperparams or hyperparams.get("unknown_schedule"):
                    has_foreign = any(part.tx.has_foreign for part in route[last:])
                    has_rate[path] = has_foreign or step_rate(path, route[last:]) is not None
                self.rate_check.check_schedule(path, route[last:], hyperparams)
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
        for part, paths in self.routes.parts_and_paths:
            if path not in paths or not isinstance(part.tx, accumulate_gradients):
                continue
            if id(part) not in around and int(part.tx.steps) > 1:
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
        for path in (path for path in self.routes.position_of_leaf if path not in moments):
            route = self.routes.of_leaf(path)
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
            part.tx
            for part in route[zeros[-1] if zeros else 0 :]
            if self.routes.decay_at(path, part)
        ]
        if not zeros:
            moving += [p.tx for p in route if isinstance(p.tx, scale | scale_by_learning_rate)]
        if moving:
            self._refuse(path, stated, f"{moving[0]!r}, which moves it", fix)
        is_known = all(is_of_adamjax(part.tx) and not part.tx.has_foreign for part in route)
        has_rule = any(isinstance(part.tx, Rule) for part in route)
        if not zeros and is_known and not has_rule and path in self.routes.floating_leaves:
            self._refuse(path, stated, "no rule for it, so its update is its gradient", fix)

    def _expect_clips_first(self, path: str, before: Sequence[Part], after: Sequence[Part]) -> None:
        """Refuses a clip after the rule, or after a weight decay that is before the rule."""
        clips = [part.tx for part in after if isinstance(part.tx, _CLIPS)]
        if clips:
            fix = "clip gradients only, before the rule"
            self._refuse(path, "no clip of updates", f"{clips[0]!r} after the rule", fix)
        decays = False
        for part in before:
            decays = decays or bool(self.routes.decay_at(path, part))
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
            rate = rate_of(path, part)
            if self.routes.decay_at(path, part):
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
        position = next(i for i, part in enumerate(self.routes.parts) if part is rule)
        around = {id(part) for part in self.ours.around(rule)}
        incomparable = [
            part.tx
            for i, (part, paths) in enumerate(self.routes.parts_and_paths)
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
        self.system.refuse(self.owner, path, stated, in_tx, fix, note)

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
        exact = any(isinstance(part.tx, exact_rows) for part in self.routes.parts)
        if hyperparams.get("lazy") and (rule.rows != "lazy" or exact):
            rows = "exact_rows" if exact else f"rows={rule.rows!r}"
            stated = "rows that stand still without a gradient"
            fix = f"build the rule of tx with rows='lazy'{', without exact_rows' if exact else ''}"
            self._refuse(path, stated, rows, fix)

    def _check_direction(self, path: str, before: Sequence[Part], hyperparams: Hyperparams) -> None:
        """Compares the sign of gradients before the rule (`maximize`); refuses a factor of 0."""
        if "maximize" not in hyperparams:
            return
        if factor_of(path, before) == 0:
            zero = next(part.tx for part in before if factor_of(path, [part]) == 0)
            fix = "leave it out, or freeze the leaf with partition and set_to_zero"
            self._refuse(path, "gradients as they are", f"{zero!r} before the rule", fix)
        negating = [i for i, part in enumerate(before) if factor_of(path, [part]) < 0]
        last = before[negating[-1]].tx if negating else None
        maximize, is_negated = bool(hyperparams["maximize"]), len(negating) % 2 == 1
        decays_first = bool(negating) and bool(
            self.routes.decay_before_scaling(path, before[: negating[-1]])
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
            if self.ours.num_accumulations(part) and factor_of(path, [part]) != 1
        ]
        if inside_accumulation and self.is_amid_accumulation:
            self._refuse(
                path,
                f"the sum of micro-batches that were multiplied by {stated:g}",
                f"{inside_accumulation[0]!r} inside of accumulate_gradients",
                "put it outside of accumulate_gradients, or convert after a step",
            )
        before_clips, after_clip = factor_of(path, first), factor_of(path, rest)
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

    # --- the weight decay -------------------------------------------------------------------------

    def _check_decay(
        self, path: str, before: Sequence[Part], after: Sequence[Part], hyperparams: Hyperparams
    ) -> None:
        """Compares the weight decay, before the last rule of a leaf and after it."""
        if hyperparams.get("has_decay") and not any(
            isinstance(part.tx, add_decayed_weights) or part.tx.has_foreign
            for part in self.routes.parts
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
            decay = self.routes.decay_at(path, part)
            is_before = i < len(before)
            parts_between = before[i:] if is_before else after[: i - len(before)]
            rates = [rate_of(path, p) for p in parts_between] if decay else []
            if any(map(follows_count, (decay, *rates))):
                where = ", with a schedule of the rate between it and the rule"
                where = "" if follows_count(decay) else where
                belongs_before = is_before if decoupled is None else not decoupled
                side = "before" if belongs_before else "after"
                fix = f"put add_decayed_weights({stated:g}) directly {side} the rule"
                stated_decay = f"the same weight decay in each step, {stated:g}"
                self._refuse(path, stated_decay, f"{part.tx!r}{where}", fix)
        before_rule = self.routes.decay_into_rule(path, before)
        after_rule = self.routes.decay_before_scaling(path, after)
        # Pairs of the decay before the rule and the decay after it.
        allowed = {
            None: [(0.0, stated), (stated, 0.0)],
            True: [(0.0, stated)],
            False: [(stated, 0.0)],
        }[decoupled]
        masks = hyperparams.get("masks_decay", "none")
        if masks != "none":
            # It is not stated which leaves decay, so this leaf need not, if another one does.
            decays = [
                part for part in self.routes.parts if isinstance(part.tx, add_decayed_weights)
            ]
            does_decay = [
                same_value(self.routes.decay_before_scaling(p, decays), stated)
                for p in self.routes.position_of_leaf
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
            elif not before_rule and not after_rule and self.routes.has_masked_decay():
                fix += f", with a mask= that this leaf matches{self.system.lost_mask}"
            self._refuse(
                path,
                f"a weight decay of {stated:g}",
                f"{before_rule:g} before its rule and {after_rule:g} after it",
                fix,
            )


def _is_same_clip(clip: Any, stated: Any) -> bool:
    """Whether two transforms that clip are of one class and have the same limit."""
    name = "limit" if isinstance(stated, clip_by_value) else "max_norm"
    is_same_class = type(clip) is type(stated)
    return is_same_class and same_value(getattr(stated, name), getattr(clip, name))
