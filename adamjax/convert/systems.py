"""The rules that conversions know, and how optax, torch and Keras name and define their slots."""

from typing import Any, NamedTuple

from adamjax.adam import (
    ScaleByAdamaxState,
    ScaleByAdamState,
    ScaleByAmsgradState,
    scale_by_adam,
    scale_by_adamax,
    scale_by_amsgrad,
)
from adamjax.convert.values import class_name

__all__ = ["KERAS", "KINDS", "OPTAX", "RTOL", "TORCH", "System", "kind_of"]

# By default, the largest relative difference of a step where a rule differs between the systems:
# about the rounding error of a float32 step.
RTOL = 1e-6

# The kinds of rules.
KINDS = ("adam", "amsgrad", "nadam", "adamax")
_RULES = {
    ScaleByAdamState: ("adam", scale_by_adam),
    ScaleByAmsgradState: ("amsgrad", scale_by_amsgrad),
    ScaleByAdamaxState: ("adamax", scale_by_adamax),
}


def kind_of(owner: str, state: Any, tx: Any = None) -> str:
    """The kind of the rule that made a state.

    Args:
      owner: the name of the conversion, for errors.
      state: the state of a rule.
      tx: the rule, if it is known.

    Raises:
      ValueError: `tx` has not made the state, or conversions do not know the rule.
    """
    expected = next((cls for cls, (_, rule) in _RULES.items() if type(tx) is rule), None)
    if expected is not None:
        has_product = getattr(state, "momentum_product", None) is not None
        is_nadam = getattr(tx, "nesterov", False)
        if type(state) is not expected or has_product != is_nadam:
            ours = "nadam" if is_nadam else _RULES[expected][0]
            raise ValueError(
                f"{owner}: the state has {_described_state(state)} where tx has "
                f"{type(tx).__name__}{'(nesterov=True)' * is_nadam}, expected a "
                f"{expected.__name__} of {ours}: pass the tx that made the state, or a state of "
                "this tx. (States of optax, Keras or torch become states of tx with from_optax, "
                "from_keras or from_torch)"
            )
    kind, rule = _RULES.get(type(state), ("", object))
    if not kind or not isinstance(tx, rule | None):
        name = f"the rule of a {type(state).__name__}" if tx is None else type(tx).__name__
        raise ValueError(
            f"{owner}: tx contains {name}, and conversions know the rules scale_by_adam, "
            "scale_by_amsgrad and scale_by_adamax only: convert a tx without it, and start it "
            "anew, with its init(params)"
        )
    return "nadam" if getattr(state, "momentum_product", None) is not None else kind


def _described_state(state: Any) -> str:
    """A short description of a rule's state, with the kind of the rule if it is known."""
    kind, _ = _RULES.get(type(state), ("", None))
    if not kind:
        return "None" if state is None else f"a {class_name(state)}"
    is_nadam = getattr(state, "momentum_product", None) is not None
    return f"a {type(state).__name__} of {'nadam' if is_nadam else kind}"


class System(NamedTuple):
    """How another system names and defines the slots of its rules.

    Attributes:
      name: the system's name, for errors.
      slot_names: for each kind of rule, the system's name of each of adamjax's slots.
      epsilon: for each kind of rule, adamjax's name of the system's epsilon, `eps` or `eps_hat`.
      eps_inside_maximum: whether Adamax adds epsilon inside the maximum.
      corrected_maximum: whether AMSGrad's maximum is that of bias-corrected moments.
      plain_nadam: whether Nadam's momentum is the same in each step.
      not_stated: for errors, the hyperparameters that a state does not contain, and their defaults.
      set_rate: for errors, how to set the rate of the system's optimizer.
      lost_mask: for errors, why the system may have lost which leaves its weight decay excludes.
    """

    name: str
    slot_names: dict[str, dict[str, str]]
    epsilon: dict[str, str]
    eps_inside_maximum: bool = False
    corrected_maximum: bool = False
    plain_nadam: bool = False
    not_stated: str = ""
    set_rate: str = ""
    lost_mask: str = ""

    def refuse(
        self, owner: str, path: str, stated: str, in_tx: str, fix: str, note: str = ""
    ) -> None:
        """Raises an error about a leaf: the system has `stated`, and `tx` has `in_tx`.

        `fix` says how to change `tx`, or, if it is `set_rate`, the system's optimizer.
        """
        goes_on_with = "what tx has"
        if owner.startswith("to_"):
            if fix != self.set_rate:
                fix = f"give the target the same, or {fix}"
            goes_on_with = f"what {self.name} has"
        note = f". Note: {note}" if note else ""
        raise ValueError(
            f"{owner}: {path!r}: {self.name} has {stated}, tx has {in_tx}: {fix}, "
            f"or pass check=False to go on with {goes_on_with}{note}"
        )


def _slot_names(m: str, v: str, v_max: str, u: str) -> dict[str, dict[str, str]]:
    adam = {"m": m, "v": v}
    return {
        "adam": adam,
        "nadam": adam,
        "amsgrad": {**adam, "v_max": v_max},
        "adamax": {"m": m, "u": u},
    }


_EPS = dict.fromkeys(KINDS, "eps")
OPTAX = System(
    "optax",
    _slot_names("mu", "nu", "nu_max", "nu"),
    _EPS,
    eps_inside_maximum=True,
    corrected_maximum=True,
    plain_nadam=True,
    not_stated=(
        "optax' defaults are eps=1e-8, eps_root=0, b1=0.9, b2=0.999, and weight_decay=1e-4 in "
        "optax.adamw (0.004 in adamjax.adamw)"
    ),
)
TORCH = System(
    "torch",
    _slot_names("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),
    _EPS,
    eps_inside_maximum=True,
    set_rate=(
        "take state_dict() after the scheduler is at this step, or after lr of the groups is "
        "float(adamjax.learning_rate(tx, state))"
    ),
)
KERAS = System(
    "Keras",
    _slot_names("momentum", "velocity", "velocity_hat", "norm"),
    {**_EPS, "adam": "eps_hat", "amsgrad": "eps_hat"},
    not_stated=(
        "Keras' variables do not contain beta_1, beta_2, epsilon, the weight decay or clips, so "
        "they are not compared. Keras' defaults are beta_1=0.9, beta_2=0.999, epsilon=1e-7, and "
        "weight_decay=0.004 in AdamW. Pass the optimizer itself to compare them"
    ),
    set_rate="assign the rate of tx to learning_rate of the target",
    lost_mask=(
        "; or, if keras.models.load_model made the optimizer, which forgets what is excluded, call "
        "its exclude_from_weight_decay again"
    ),
)
