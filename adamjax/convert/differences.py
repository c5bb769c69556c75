"""How the rules of two systems differ, by how much, and which values of moments are impossible."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.convert.filling import StateFiller
from adamjax.convert.source import LeafMoments, Slots, Source
from adamjax.convert.systems import KINDS, System
from adamjax.convert.values import number_of

__all__ = ["Translation", "expect_product", "expect_slots", "is_product", "nadam_product"]

# The size of gradients for which Adamax is compared where a leaf has had none.
_FIRST_GRADIENT = 0.01


def expect_slots(owner: str, system: System, kind: str, path: str, moments: LeafMoments) -> None:
    """Refuses a leaf's slots if they are not those of this kind of rule."""
    expected = set(system.slot_names[kind].values())
    slots, possible_kinds = moments.slots, moments.possible_kinds
    if kind in possible_kinds and (slots is None or set(slots) == expected):
        return
    stored = "nothing so far" if slots is None else sorted(slots)
    stated = "" if len(possible_kinds) == len(KINDS) else " or ".join(possible_kinds)
    rules = f", those of {stated}" if stated else ""
    wanted = str(sorted(expected))
    fix = f"build the optimizer of {system.name} and that of adamjax with the same rule"
    if kind not in possible_kinds and slots is not None and set(slots) == expected:
        # Several kinds have these slots, and the system states another kind than this one.
        rules, wanted = f", and says that they are those of {stated}", f"a state that says {kind}"
    elif possible_kinds == (kind,):
        # The system states this kind, but the slots are those of another one.
        rules, fix = "", "is this the state of another optimizer?"
        if set(slots or ()) ^ expected == {system.slot_names["amsgrad"]["v_max"]}:
            fix = "was amsgrad switched on or off in the middle of the run?"
    raise ValueError(
        f"{owner}: of {path!r}, {system.name} has {stored}{rules}; for {kind}, expected {wanted}: "
        f"{fix}"
    )


def _largest_ratio(kind: str, rule: Any) -> float:
    """The largest m / sqrt(v), or for Adamax m / u, that any gradients can lead to.

    By the Cauchy-Schwarz inequality, m**2 <= c * v, where c is the sum over k of
    `(1 - b1)**2 * b1**(2 * k) / ((1 - b2) * b2**k)`. And m <= c * u, where c is the sum of
    `(1 - b1) * b1**k / b2**k`. Both are geometric series.
    """
    b1, b2 = float(rule.b1), float(rule.b2)
    if b2 == 0 or b2 >= 1:
        return math.inf
    term_ratio = (b1 if kind == "adamax" else b1 * b1) / b2
    if term_ratio >= 1:
        return math.inf
    if kind == "adamax":
        return (1 - b1) / (1 - term_ratio)
    return (1 - b1) / math.sqrt((1 - b2) * (1 - term_ratio))


def _wide_dtype(x: Any) -> Any:
    """float32 for an array of at most 32 bits, else float64."""
    return np.float32 if np.dtype(x.dtype).itemsize <= 4 else np.float64


class Translation(StateFiller):
    """Takes moments out of a source, and translates their slots to adamjax or from it.

    Attributes:
      system: the other system.
      rtol: how much a step of adamjax may differ from that of the other system, relatively.
    """

    def __init__(
        self, source: Source, ours: AdamjaxState, system: System, check: bool, rtol: float
    ) -> None:
        super().__init__(source, ours, check)
        if not number_of(self.owner, "rtol", rtol) >= 0:
            raise ValueError(f"{self.owner}: rtol is {rtol!r}, expected a number of at least 0")
        self.system, self.rtol = system, rtol if check else math.inf

    def to_adamjax(self, rule: Any, kind: str, path: str, moments: LeafMoments) -> Slots | None:
        """The slots of a leaf by adamjax's names; `None` if it has taken no step yet."""
        expect_slots(self.owner, self.system, kind, path, moments)
        names, count = self.system.slot_names[kind], moments.count
        if moments.slots is None:
            self._expect_close(rule, kind, path, count, {})
            return None
        slots = {name: moments.slots[their_name] for name, their_name in names.items()}
        for name, x in slots.items():
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                raise ValueError(
                    f"{self.owner}: {names[name]} of {path!r} is {x.dtype.name}, expected floats: "
                    "is it this optimizer's array?"
                )
        self._expect_close(rule, kind, path, count, slots)
        self._expect_possible(rule, kind, path, count, slots)
        if kind == "adamax" and self.system.eps_inside_maximum:
            # optax' u of a complex leaf is complex.
            u = np.real(np.asarray(slots["u"]))
            shifted = np.maximum(u.astype(np.float64) - float(rule.eps), 0)
            slots["u"] = shifted.astype(_wide_dtype(u))
        return slots

    def from_adamjax(self, path: str) -> tuple[str, LeafMoments, Slots]:
        """Takes the moments of a leaf's next rule; see `take_moments`.

        Returns:
          The rule's kind, the moments, and the slots by the system's names.
        """
        moments = self.take_moments(path)
        (kind,), rule, count = moments.possible_kinds, moments.rule, moments.count
        slots = dict(moments.slots or {})
        self._expect_possible(None, kind, path, count, slots)
        if kind == "adamax" and self.system.eps_inside_maximum:
            u = np.asarray(slots["u"], np.float64) + float(rule.eps)
            # Before the first step there is no maximum.
            u = u if count else np.zeros_like(u)
            slots["u"] = u.astype(_wide_dtype(slots["u"]))
        self._expect_close(rule, kind, path, count, slots)
        names = self.system.slot_names[kind]
        return kind, moments, {names[name]: x for name, x in slots.items()}

    def _expect_close(self, rule: Any, kind: str, path: str, count: int, slots: Slots) -> None:
        difference, why = self._difference(rule, kind, count, slots)
        if difference > self.rtol * (1 + 1e-9):
            percent = f"{100 * float(f'{difference:.1g}'):g}%"
            raise ValueError(
                f"{self.owner}: {self.system.name}'s {kind} is not that of adamjax: {why}. "
                f"For the leaf {path!r}, after {count} steps, the next step may "
                f"differ by {percent} between the two. To convert it all the same pass "
                f"rtol={1.05 * difference:.1e}"
            )

    def _difference(self, rule: Any, kind: str, count: int, slots: Slots) -> tuple[float, str]:
        """The largest relative difference between the steps of the two rules, and its reason.

        The pair is (0, "") if the rules have the same form.

        Args:
          slots: by adamjax's names; Adamax' `u` with epsilon inside. Empty before the first step.
        """
        if kind == "amsgrad" and self.system.corrected_maximum:
            # In the next step, one of the two maxima is bias-corrected and the other is not.
            return 1 - math.sqrt(1 - float(rule.b2) ** (count + 1)), (
                "it keeps the maximum of bias-corrected moments, and that of the moments "
                "themselves cannot be computed from it; the more steps were taken, the smaller "
                "the difference"
            )
        if kind == "nadam" and self.system.plain_nadam:
            # The schedule changes the factor of the gradient, 1 - b1, more than anything else.
            from_schedule = 0.5 * float(rule.b1) / (1 - float(rule.b1)) * 0.96 ** (count + 1)
            return float(rule.b1) ** count + from_schedule, (
                "its momentum has no schedule; the more steps were taken, the smaller the "
                "difference"
            )
        if kind == "adamax" and self.system.eps_inside_maximum:
            why = "it adds epsilon inside the maximum, so epsilon decays with it; "
            is_moving = np.asarray(slots["m"]) != 0 if slots else np.zeros(1, bool)
            u = np.real(np.asarray(slots["u"])).astype(np.float64) if slots else np.zeros(1)
            smallest = float(np.min(u, where=is_moving, initial=np.inf))
            if smallest > _FIRST_GRADIENT and not np.all(is_moving):
                return float(rule.eps) / _FIRST_GRADIENT, (
                    f"{why}the difference is that for gradients of {_FIRST_GRADIENT}, because this "
                    "leaf, or a part of it, has had none"
                )
            return (math.inf if smallest == 0 else float(rule.eps) / smallest), (
                f"{why}the smallest maximum here is {smallest:.1g}, and the larger the maximum, "
                "the smaller the difference"
            )
        return 0.0, ""

    def _expect_possible(self, rule: Any, kind: str, path: str, count: int, slots: Slots) -> None:
        """Refuses slots that no sequence of gradients can lead to.

        Args:
          rule: the rule, whose betas bound the moments; `None` for no such bound.
          slots: by adamjax's names.
        """
        if not self.check:
            return
        names = self.system.slot_names[kind]

        def refuse(fault: str) -> None:
            raise ValueError(
                f"{self.owner}: of {path!r}, {fault}, which {kind} cannot have: is this the state "
                f"of another optimizer of {self.system.name} or of other betas, or are the leaves "
                "in another order? check=False accepts it"
            )

        # Arrays of JAX stay on their devices, because some devices may be those of other processes.
        on_device = all(isinstance(x, jax.Array) for x in slots.values())
        xp: Any = jnp if on_device else np
        for name, x in slots.items():
            if not bool(xp.all(xp.isfinite(x))):
                refuse(f"{names[name]} has values that are not finite")
            if name != "m" and bool(xp.any(xp.real(x) < 0)):
                refuse(f"{names[name]} has values below 0")
            if count == 0 and bool(xp.any(x != 0)):
                refuse(f"{names[name]} is not 0 after 0 steps")
        if len({np.shape(x) for x in slots.values()}) > 1:
            return  # `StateFiller.array` refuses slots of different shapes.
        wide = {name: xp.abs(x).astype(_wide_dtype(xp.real(x))) for name, x in slots.items()}
        is_uncorrected = kind == "amsgrad" and not self.system.corrected_maximum
        if is_uncorrected and bool(xp.any(wide["v_max"] < 0.99 * wide["v"])):
            refuse(f"{names['v_max']} is below {names['v']}")
        if rule is None:
            return
        largest_ratio = _largest_ratio(kind, rule)
        divisor_name = "u" if kind == "adamax" else "v"
        if kind == "adamax":
            divisor = wide["u"] + float(rule.eps or 0)
        else:
            # Squares below the dtype's smallest number become 0.
            smallest = float(jnp.finfo(slots["v"].dtype).smallest_subnormal)
            divisor = xp.sqrt(wide["v"] + max(1e-34, smallest / (1 - float(rule.b2))))
        # Twice the bound, as moments may be rounded to few bits.
        if math.isfinite(largest_ratio) and bool(
            xp.any(wide["m"] > 2 * largest_ratio * divisor + 1e-18)
        ):
            refuse(f"{names['m']} is larger than {names[divisor_name]} allows")


def nadam_product(b1: Any, count: int) -> float:
    """The product of Nadam's momenta up to this number of steps."""
    steps = np.arange(1, count + 1, dtype=np.float64)
    return float(np.prod(float(b1) * (1 - 0.5 * 0.96**steps)))


def is_product(product: Any, b1: Any, count: int) -> bool:
    """Whether a product differs from `nadam_product` only by rounding to its dtype in each step."""
    right, x = nadam_product(b1, count), np.asarray(product)
    dtype = jnp.finfo(x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else np.float64)
    # Each step may change the logarithm by eps / 2. At most, e**700 is a float64.
    factor = math.exp(min(max(1e-3, count * float(dtype.eps)), 700.0))
    # Below the normal numbers of the dtype, rounding stops the decay at a few of the smallest.
    least = max(1e-30, float(dtype.smallest_subnormal) / max(1 - float(b1), 1e-6))
    return right / factor - least <= float(product) <= right * factor + least


def expect_product(owner: str, product: Any, b1: Any, count: int) -> None:
    """Refuses a product that differs from `nadam_product` by more than rounding in each step."""
    if not is_product(product, b1, count):
        raise ValueError(
            f"{owner}: the product of momenta is {float(product):g} after {count} steps, but with "
            f"the b1 of tx and the momentum b1 * (1 - 0.5 * 0.96**t) it is "
            f"{nadam_product(b1, count):g}: build tx "
            "with the b1 of the source. A Nadam with another schedule of the momentum "
            "(schedule_decay of legacy Keras) is another optimizer: start anew, tx.init(params), "
            "or pass check=False"
        )
