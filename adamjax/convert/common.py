"""What all conversions share: one form, read from a state and filled into another."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import in_float64
from adamjax.adam import ScaleByAdamaxState, ScaleByAdamState, ScaleByAmsgradState
from adamjax.average import WeightEmaState
from adamjax.data import Tree
from adamjax.exact import ExactRowsState, exact_rows
from adamjax.grouping import grouped
from adamjax.guard import AccumulateGradientsState, SkipNotFiniteState, accumulate_gradients
from adamjax.layout import laid_out_like
from adamjax.leaves import is_left_alone
from adamjax.paths import flatten, leaf_paths, unique_paths
from adamjax.reading import slot_names
from adamjax.rows import RowGradient
from adamjax.scaling import ScheduleState, add_decayed_weights, scale, scale_by_learning_rate
from adamjax.schedule import by_path, rate_at
from adamjax.structure import Part, walk
from adamjax.transform import Rule, as_transform

__all__ = [
    "KERAS",
    "OPTAX",
    "RTOL",
    "RULES",
    "TORCH",
    "Count",
    "Filling",
    "Gathered",
    "Kept",
    "Ours",
    "Said",
    "Source",
    "Translation",
    "as_expected",
    "expect_place_to_gather",
    "field_names",
    "into_ours",
    "is_container",
    "kind_of",
    "leaf_order",
    "leaves_by_path",
    "mapped",
    "new_ours",
    "number_of",
    "numbers_of",
    "numpy_array",
    "same_value",
    "steps_taken",
]

# How much of a step a conversion may change where the systems' rules differ: what the arithmetic
# of a step in float32 rounds off.
RTOL = 1e-6

# --- what the systems keep ------------------------------------------------------------------------


class _System(NamedTuple):
    """How another system names and defines what a rule keeps.

    Attributes:
      name: for errors.
      names: for each kind of rule, its name of each of our slots.
      forms: for each kind of rule, our name of its epsilon.
      eps_inside: whether Adamax' epsilon is inside the maximum.
      corrected_maximum: whether AMSGrad's maximum is over corrected moments.
      plain_nadam: whether Nadam's momentum is the same in each step.
      unsaid: which hyperparameters a state may not say, and what they are by default.
    """

    name: str
    names: dict[str, dict[str, str]]
    forms: dict[str, str]
    eps_inside: bool = False
    corrected_maximum: bool = False
    plain_nadam: bool = False
    unsaid: str = ""


def _named(m: str, v: str, v_max: str, u: str) -> dict[str, dict[str, str]]:
    adam = {"m": m, "v": v}
    return {
        "adam": adam,
        "nadam": adam,
        "amsgrad": {**adam, "v_max": v_max},
        "adamax": {"m": m, "u": u},
    }


_KINDS = ("adam", "amsgrad", "nadam", "adamax")
_INSIDE = dict.fromkeys(_KINDS, "eps")
OPTAX = _System(
    "optax",
    _named("mu", "nu", "nu_max", "nu"),
    _INSIDE,
    eps_inside=True,
    corrected_maximum=True,
    plain_nadam=True,
    unsaid=(
        "an optax state, outside of inject_hyperparams, does not say eps, eps_root, b1, b2, the "
        "rate and the weight decay (or its mask), so they are not compared: by default eps=1e-8, "
        "eps_root=0, b1=0.9, b2=0.999, and weight_decay=1e-4 in optax.adamw, 0.004 in "
        "adamjax.adamw"
    ),
)
TORCH = _System(
    "torch",
    _named("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),
    _INSIDE,
    eps_inside=True,
)
KERAS = _System(
    "Keras",
    _named("momentum", "velocity", "velocity_hat", "norm"),
    {**_INSIDE, "adam": "eps_hat", "amsgrad": "eps_hat"},
    unsaid=(
        "Keras' variables do not say beta_1, beta_2, epsilon, the weight decay or clips, so none "
        "of them is compared: Keras' defaults are beta_1=0.9, beta_2=0.999, epsilon=1e-7, and "
        "weight_decay=0.004 in AdamW; the optimizer itself in their place says them all"
    ),
)


@dataclasses.dataclass
class Kept:
    """What is kept of a leaf by one rule.

    Attributes:
      count: the steps taken.
      slots: arrays by the system's name; `None`: nothing was kept so far.
      kinds: what the rule may be.
      product: Nadam's product of momenta, where it is kept.
      facts: what the system says of hyperparameters.
      rule: where it is ours, the rule.
      gathers: whether micro-batches are gathered for its steps.
    """

    count: int
    slots: dict[str, Any] | None
    kinds: tuple[str, ...] = _KINDS
    product: Any = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    rule: Any = None
    gathers: bool = False


class Count(NamedTuple):
    """What is counted outside of a rule.

    Attributes:
      steps: the count: of steps where `gathers`, else of calls.
      leaves: the leaves it is of; `None`: all.
      gathers: whether micro-batches are gathered for these steps.
    """

    steps: int
    leaves: frozenset[str] | None
    gathers: bool = False


class Gathered(NamedTuple):
    """The micro-batches since the last step, and by path the sums of their gradients."""

    micro: int
    totals: dict[str, Any]


@dataclasses.dataclass
class Source:
    """A state in the one form.

    Attributes:
      kept: by path, what each rule that the leaf goes through keeps of it, in their order.
      counts: of schedules.
      average: by path, the average of the weights.
      gathered: what each gathering of micro-batches holds.
      skipped: steps that were not taken.
      others: states of transforms that are neither ours nor known.
      doubts: why the run may not go on as before, each with its mend: refused where a check is
        wanted.
      loose: what the system says of hyperparameters outside of any rule.
      gathers: whether micro-batches are gathered for the steps of what is being read.
    """

    owner: str
    kept: dict[str, list[Kept]] = dataclasses.field(default_factory=dict)
    counts: list[Count] = dataclasses.field(default_factory=list)
    average: dict[str, Any] | None = None
    gathered: list[Gathered] = dataclasses.field(default_factory=list)
    skipped: int | None = None
    others: list[Any] = dataclasses.field(default_factory=list)
    doubts: list[str] = dataclasses.field(default_factory=list)
    loose: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    gathers: bool = False

    def add(self, path: str, kept: Kept) -> None:
        self.kept.setdefault(path, []).append(dataclasses.replace(kept, gathers=self.gathers))

    def add_count(self, steps: int, leaves: frozenset[str] | None) -> None:
        self.counts.append(Count(steps, leaves, self.gathers))

    def gathered_of(self, leaves: frozenset[str] | None) -> Gathered | None:
        """What is gathered of these leaves; `None` where they take a step in each call."""
        found = [g for g in self.gathered if _meet(g.totals, leaves)]
        micros = {g.micro for g in found}
        if len(micros) > 1:
            raise ValueError(
                f"{self.owner}: parts have gathered different numbers of micro-batches, "
                f"{sorted(micros)}, which one count cannot say: give them accumulate_gradients "
                "of their own, or convert after a step of all"
            )
        totals = {path: total for g in found for path, total in g.totals.items()}
        return Gathered(micros.pop(), totals) if found else None

    def count_of(self, leaves: frozenset[str] | None, calls: tuple[int, int] | None = None) -> int:
        """What a schedule for these leaves has counted: steps, or calls.

        Args:
          calls: for calls, how many a step takes, and how many came since the last; `None`: steps.
        """
        counts = [(c.gathers, c.steps) for c in self.counts if _meet(c.leaves, leaves)]
        rules = [
            (k.gathers, k.count) for p, ks in self.kept.items() if _meet({p}, leaves) for k in ks
        ]
        if any(gathers for gathers, _ in (*counts, *rules)):
            # Steps and calls are two things there: of its own kind, if there is one.
            for several in (counts, rules):
                found = {n for gathers, n in several if gathers == (calls is None)}
                if found:
                    return self._only(found, leaves)
        steps = self._only({n for _, n in counts or rules}, leaves)
        return steps if calls is None else steps * calls[0] + calls[1]

    def _only(self, found: set[int], leaves: frozenset[str] | None) -> int:
        if len(found) > 1:
            some = f" of {sorted(leaves)[:3]}" if leaves else ""
            raise ValueError(
                f"{self.owner}: the leaves{some} have taken different numbers of steps, "
                f"{sorted(found)}, which one count cannot say: give those that go together a "
                "chain of their own with partition"
            )
        return found.pop() if found else 0

    def refuse_doubts(self, check: bool) -> None:
        if check and self.doubts:
            raise ValueError(
                f"{self.owner}: {self.doubts[0]}, or pass check=False to take the arrays all the "
                "same"
            )


def _meet(a: Iterable[str] | None, b: Iterable[str] | None) -> bool:
    return a is None or b is None or not frozenset(a).isdisjoint(b)


# --- our transforms and states --------------------------------------------------------------------

RULES = (ScaleByAdamState, ScaleByAmsgradState, ScaleByAdamaxState)


def kind_of(state: Any) -> str:
    if isinstance(state, ScaleByAmsgradState):
        return "amsgrad"
    if isinstance(state, ScaleByAdamaxState):
        return "adamax"
    return "adam" if state.momentum_product is None else "nadam"


def leaves_by_path(owner: str, tree: Tree) -> dict[str, Any]:
    """The leaves that are there and are floats, by path; two leaves of one path are refused."""
    pairs = zip(unique_paths(owner, tree), flatten(tree)[0], strict=True)
    return {path: x for path, x in pairs if x is not None and not is_left_alone(x)}


def field_names(x: Any) -> tuple[str, ...] | None:
    """The names of a named tuple's fields; `None` for anything else."""
    return getattr(type(x), "_fields", None) if isinstance(x, tuple) else None


def _is_ours(x: Any) -> bool:
    return type(x).__module__.split(".")[0] == "adamjax"


def _holds_ours(x: Any) -> bool:
    return any(map(_is_ours, jax.tree.leaves(x, is_leaf=_is_ours)))


def mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """A container with a function of each of its items."""
    if field_names(x) is not None:
        return type(x)(*map(function, x))
    if isinstance(x, Mapping):
        # The order of JAX, whatever the order in which entries were made.
        made = {key: function(x[key]) for key in sorted(x, key=str)}
        return type(x)({key: made[key] for key in x})  # type: ignore[call-arg]
    return type(x)(map(function, x))


def is_container(x: Any) -> bool:
    return isinstance(x, tuple | list | Mapping)


class Ours:
    """A transform of ours with a state of it."""

    def __init__(self, owner: str, tx: Any, state: Any, params: Tree) -> None:
        self.owner, self.state, self.params = owner, state, params
        unique_paths(owner, params)
        self.tx = as_transform(tx)
        self.parts = list(walk(self.tx, state, params))
        for part in self.parts:
            if isinstance(part.tx, grouped):
                raise ValueError(
                    f"{owner}: {part.tx!r} keeps leaves joined. Convert the state of the transform "
                    "without grouped; grouped.join and grouped.split take such a state in and out"
                )
        # Where micro-batches are gathered: the calls that a step takes, and the leaves.
        self.gathering = [
            (int(part.tx.steps), frozenset(leaves_by_path(owner, part.params)))
            for part in self.parts
            if isinstance(part.tx, accumulate_gradients)
        ]
        # The innermost of those that share a state, as `masked` does with its transform.
        self.known = {id(part.state): part for part in self.parts}

    def part(self, state: Any) -> Part | None:
        found = self.known.get(id(state))
        return found if found is not None and found.state is state else None

    def leaves(self, state: Any) -> frozenset[str] | None:
        """The paths that the transform of this state sees."""
        part = self.part(state)
        return None if part is None else frozenset(leaves_by_path(self.owner, part.params))

    def calls(self, source: Source, leaves: frozenset[str] | None) -> tuple[int, int]:
        """How many calls a step of these leaves takes, and how many came since the last."""
        for steps, own in self.gathering:
            if _meet(own, leaves):
                held = source.gathered_of(leaves)
                return steps, held.micro if held else 0
        return 1, 0

    def read(self) -> Source:
        """The state in the one form, with our names of slots."""
        source = Source(self.owner)
        self._read(self.state, source)
        return source

    def _read(self, x: Any, source: Source) -> None:
        if isinstance(x, RULES):
            trees = {name: leaves_by_path(self.owner, getattr(x, name)) for name in slot_names(x)}
            product, part = getattr(x, "momentum_product", None), self.part(x)
            self._expect_leaves(x.m, part)
            rule = None if part is None else part.tx
            count = steps_taken(self.owner, "a rule", x.count)
            for path in trees["m"]:
                slots = {name: tree[path] for name, tree in trees.items()}
                source.add(path, Kept(count, slots, (kind_of(x),), product, rule=rule))
        elif isinstance(x, ScheduleState):
            steps = steps_taken(self.owner, "a schedule", x.count)
            source.add_count(steps, self.leaves(x))
        elif isinstance(x, WeightEmaState):
            average = leaves_by_path(self.owner, x.average)
            source.average = {**(source.average or {}), **average}
        elif isinstance(x, AccumulateGradientsState):
            micro = steps_taken(self.owner, "micro-batches", x.micro_count)
            source.gathered.append(Gathered(micro, leaves_by_path(self.owner, x.total)))
            outside, source.gathers = source.gathers, True
            self._read(x.inner, source)
            source.gathers = outside
        elif isinstance(x, SkipNotFiniteState):
            source.skipped = (source.skipped or 0) + int(x.skipped)
            self._read(x.inner, source)
        elif isinstance(x, ExactRowsState):
            for path, table in x.tables.items():
                if not bool(jnp.all(table.last == x.clock)):
                    raise ValueError(
                        f"{self.owner}: rows of the table {path!r} lag behind: first bring all up "
                        "to date, params, state = tx.flush(params, state)"
                    )
            self._read(x.inner, source)
        elif is_container(x) and (_is_ours(x) or _holds_ours(x) or field_names(x) is None):
            for item in x.values() if isinstance(x, Mapping) else x:
                if is_container(item):
                    self._read(item, source)
        elif jax.tree.leaves(x):
            source.others.append(x)

    def _expect_leaves(self, m: Tree, part: Part | None) -> None:
        """Refuses parameters that a state is not of: what is compared is compared by path."""
        if part is None:
            return
        kept, own = (leaves_by_path(self.owner, tree) for tree in (m, part.params))
        for path in (*kept, *own):
            came, wanted = (
                f"of shape {list(np.shape(tree[path]))}" if path in tree else "not there"
                for tree in (own, kept)
            )
            if came != wanted:
                raise ValueError(
                    f"{self.owner}: the leaf {path!r} is {came} in params and {wanted} in what the "
                    "state keeps: pass the parameters that the state is of"
                )


def _class(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


def _alike(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure, shapes and dtypes."""

    def avals(tree: Any) -> list[Any]:
        return [(np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]

    return (jax.tree.structure(a), avals(a)) == (jax.tree.structure(b), avals(b))


# --- filling --------------------------------------------------------------------------------------


class Filling:
    """Takes what a source keeps, piece by piece, and knows what is left in the end."""

    def __init__(self, source: Source, check: bool) -> None:
        self.source, self.check, self.owner = source, check, source.owner
        self.taken: dict[str, int] = {}
        self.others = list(source.others)

    def take(self, path: str) -> Kept:
        """What the next rule keeps of a leaf."""
        found, i = self.source.kept.get(path, []), self.taken.get(path, 0)
        if i >= len(found):
            has = "no moments" if not found else f"the moments of {len(found)} rule(s) only"
            known = sorted(self.source.kept)
            mend = "keep the rule from this leaf with masked or partition, or name leaves alike"
            if self.others:
                mend = (
                    f"its {_class(self.others[0])} is no state that is known here: convert one "
                    "of Adam, AMSGrad, Nadam or Adamax"
                )
            raise ValueError(
                f"{self.owner}: the source has {has} of the leaf {path!r} (it has some of "
                f"{known[:5]}{' and others' if len(known) > 5 else ''}): {mend}"
            )
        self.taken[path] = i + 1
        return found[i]

    def counted(self, found: dict[str, Kept]) -> int:
        """The steps taken by leaves that are counted together."""
        counts: dict[int, str] = {}
        for path, kept in found.items():
            counts.setdefault(kept.count, path)
        if len(counts) > 1:
            (a, first), (b, second) = list(counts.items())[:2]
            raise ValueError(
                f"{self.owner}: {first!r} has taken {a} steps and {second!r} {b}, but one rule "
                "counts the steps of all its leaves: give them rules of their own with partition, "
                "or leave out one that is not trained with masked"
            )
        return next(iter(counts), 0)

    def array(self, path: str, name: str, x: Any, like: Any) -> Any:
        """A new array of the dtype and place of another, with these values."""
        if np.shape(x) != np.shape(like):
            raise ValueError(
                f"{self.owner}: {name} of {path!r} has shape {list(np.shape(x))}, expected "
                f"{list(np.shape(like))}, that of the leaf: are the leaves in the right order, "
                "or is one of the two transposed?"
            )
        old, new = np.dtype(x.dtype), np.dtype(like.dtype)
        if not jnp.issubdtype(new, jnp.inexact):
            raise ValueError(
                f"{self.owner}: {name} of {path!r} is {new.name} in the target, expected floats "
                f"like {old.name}: is it this optimizer's array?"
            )
        if not jnp.issubdtype(old, jnp.inexact):
            raise ValueError(
                f"{self.owner}: {name} of {path!r} is {old.name}, expected floats like "
                f"{new.name}: is it this optimizer's array?"
            )
        if jnp.issubdtype(old, jnp.complexfloating) != jnp.issubdtype(new, jnp.complexfloating):
            raise ValueError(
                f"{self.owner}: {name} of {path!r} is {old.name}, expected {new.name}: of a "
                "complex leaf m is complex and v real here, the average of abs(g)**2"
            )
        if self.check and jnp.finfo(old).nmant > jnp.finfo(new).nmant:
            wide = np.asarray(x)
            if np.any(wide.astype(new).astype(old) != wide):
                raise ValueError(
                    f"{self.owner}: {name} of {path!r} is {old.name} and would be rounded to "
                    f"{new.name}: keep it wider (m_dtype, v_dtype, or optax' mu_dtype), or pass "
                    "check=False to have it rounded"
                )
        if not isinstance(like, jax.Array):
            return np.array(x, new)
        made = jnp.array(x, new, copy=True)
        if made.sharding != like.sharding:
            made = jax.device_put(made, like.sharding)
        return laid_out_like(made, like)

    def tree(self, name: str, values: Mapping[str, Any], like: Tree) -> Any:
        """A tree like another with the values of these paths, which must be there."""
        leaves, treedef = flatten(like)
        for i, path in enumerate(leaf_paths(like)):
            if leaves[i] is not None and not is_left_alone(leaves[i]):
                if path not in values:
                    raise ValueError(f"{self.owner}: the source lacks {name} of {path!r}")
                leaves[i] = self.array(path, name, values[path], leaves[i])
        return treedef.unflatten(leaves)

    def other(self, like: Any) -> Any:
        """The source's state of a transform that is neither ours nor known."""
        for i, x in enumerate(self.others):
            if type(x) is type(like) and _alike(x, like):
                del self.others[i]
                return jax.tree.map(lambda y: jnp.array(y, copy=True), x)
        raise ValueError(
            f"{self.owner}: the source has no {type(like).__name__} of these shapes and dtypes, "
            f"which is to be filled, a {_class(like)}; "
            "leave that transform out, or start it anew and set its state by hand"
        )

    def finish(self) -> None:
        """Refuses to lose anything."""
        for path, found in self.source.kept.items():
            if self.taken.get(path, 0) < len(found):
                raise ValueError(
                    f"{self.owner}: the moments of the leaf {path!r} have no place: no rule "
                    "that is to be filled is for it. Let one be (patterns of masked and "
                    "partition), or drop them from the source"
                )
        if self.others:
            raise ValueError(
                f"{self.owner}: there is no place for a {type(self.others[0]).__name__} of the "
                f"source (a {_class(self.others[0])}): convert chains of the same transforms"
            )


# --- where rules differ ---------------------------------------------------------------------------


def as_expected(owner: str, system: _System, kind: str, path: str, kept: Kept) -> None:
    """Refuses what another rule has kept."""
    wanted = set(system.names[kind].values())
    keeps = "nothing so far" if kept.slots is None else sorted(kept.slots)
    if kind not in kept.kinds or (kept.slots is not None and set(kept.slots) != wanted):
        of = "" if len(kept.kinds) == len(_KINDS) else f", those of {' or '.join(kept.kinds)}"
        raise ValueError(
            f"{owner}: {system.name} keeps {keeps} of {path!r}{of}, but for {kind} "
            f"expected {sorted(wanted)}: build both with the same rule"
        )


def _close(
    owner: str, system: _System, rule: Any, kind: str, path: str, count: int, m: Any, u: Any
) -> tuple[float, str]:
    """By how much of itself a step may differ where a rule has another form, and why.

    Args:
      m, u: of Adamax, the moment, and the maximum with epsilon inside.
    """
    if kind == "amsgrad" and system.corrected_maximum:
        return 0.5 * float(rule.b2) ** count, (
            "it keeps the maximum of bias-corrected moments, from which that of the raw ones "
            "cannot be told; the more steps were taken, the less it matters"
        )
    if kind == "nadam" and system.plain_nadam:
        return float(rule.b1) ** count + 0.5 * 0.96 ** (count + 1), (
            "its momentum has no schedule; the more steps were taken, the less it matters"
        )
    if kind == "adamax" and system.eps_inside:
        moving = np.asarray(m) != 0
        least = float(np.min(np.asarray(u, np.float64), where=moving, initial=np.inf))
        return (math.inf if least == 0 else float(rule.eps) / least), (
            f"it has epsilon inside the maximum, where it decays; the maximum is {least:.1g} at "
            "least, and the larger, the less it matters"
        )
    return 0.0, ""


def _bound(kind: str, rule: Any) -> float:
    """The largest m / sqrt(v), or m / u of Adamax, that any gradients can leave.

    By Cauchy and Schwarz, m**2 <= c * v with c the sum over k of
    `(1 - b1)**2 * b1**(2 * k) / ((1 - b2) * b2**k)`; and m <= c * u with c that of
    `(1 - b1) * b1**k / b2**k`.
    """
    b1, b2 = float(rule.b1), float(rule.b2)
    falls = math.inf if b2 == 0 else b1 / b2 if kind == "adamax" else b1 * b1 / b2
    if falls >= 1 or b2 >= 1:
        return math.inf
    if kind == "adamax":
        return (1 - b1) / (1 - falls)
    return (1 - b1) / math.sqrt((1 - b2) * (1 - falls))


def _expect_moments(
    owner: str,
    system: _System,
    rule: Any,
    kind: str,
    path: str,
    count: int,
    slots: Mapping[str, Any],
) -> None:
    """Refuses what no sequence of gradients can have left in the slots of a rule.

    Args:
      rule: the rule, with whose betas the moments must agree; `None`: of any betas.
      slots: by our names.
    """
    names = system.names[kind]

    def refuse(what: str) -> None:
        raise ValueError(
            f"{owner}: {what} of {path!r}, which {kind} cannot have: is this the state of another "
            f"optimizer of {system.name} or of other betas, or are the leaves in another order? "
            "check=False takes it"
        )

    # Where they are: NumPy's in NumPy, and those of JAX perhaps on the devices of other processes.
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
        return  # refused where it is filled in

    def wide(x: Any) -> Any:
        return xp.abs(x).astype(np.float32 if _narrow(xp.real(x)) else np.float64)

    m, size = wide(slots["m"]), wide(slots["u" if kind == "adamax" else "v"])
    largest = kind == "amsgrad" and not system.corrected_maximum
    if largest and bool(xp.any(wide(slots["v_max"]) < 0.99 * size)):
        refuse(f"{names['v_max']} is below {names['v']}")
    if rule is None:
        return
    most = _bound(kind, rule)
    # Squares below the smallest float are not there any more.
    lost = _lost(slots["u" if kind == "adamax" else "v"], float(rule.b2))
    size = size + float(rule.eps or 0) if kind == "adamax" else xp.sqrt(size + lost)
    # Twice, as moments may be rounded to few bits.
    if math.isfinite(most) and bool(xp.any(m > 2 * most * size + 1e-18)):
        refuse(f"{names['m']} is larger than {names['u' if kind == 'adamax' else 'v']} allows")


def _lost(v: Any, b2: float) -> float:
    """What a second moment may have lost of squares too small for its dtype."""
    least = float(jnp.finfo(v.dtype).smallest_subnormal)
    return max(1e-34, least / (1 - b2))


class Translation:
    """Another system's slots from ours and back."""

    def __init__(self, filling: Filling, system: _System, rtol: float) -> None:
        self.filling, self.system = filling, system
        if not number_of(filling.owner, "rtol", rtol) >= 0:
            raise ValueError(f"{filling.owner}: rtol is {rtol!r}, expected a number of at least 0")
        self.rtol = rtol if filling.check else math.inf

    def _refuse(self, rule: Any, kind: str, path: str, count: int, m: Any, u: Any) -> None:
        args = (self.filling.owner, self.system, rule, kind, path, count, m, u)
        apart, why = _close(*args)
        if apart > self.rtol:
            raise ValueError(
                f"{self.filling.owner}: {self.system.name}'s {kind} is not the one here: {why}. "
                f"Of the leaf {path!r}, after {count} steps, a step may differ by {apart:.1g} of "
                f"itself. To go on all the same pass rtol={1.05 * apart:.1e}"
            )

    def to_ours(self, rule: Any, kind: str, path: str, kept: Kept) -> dict[str, Any] | None:
        """Our slots of a leaf, by our names."""
        as_expected(self.filling.owner, self.system, kind, path, kept)
        if kept.slots is None:
            return None
        slots = {name: kept.slots[theirs] for name, theirs in self.system.names[kind].items()}
        self._refuse(rule, kind, path, kept.count, slots["m"], slots.get("u"))
        if self.filling.check:
            owner, count = self.filling.owner, kept.count
            _expect_moments(owner, self.system, rule, kind, path, count, slots)
        if kind == "adamax" and self.system.eps_inside:
            u = np.asarray(slots["u"], np.float64) - float(rule.eps)
            slots["u"] = np.maximum(u, 0).astype(np.float32 if _narrow(slots["u"]) else np.float64)
        return slots

    def to_theirs(self, path: str) -> tuple[str, Kept, dict[str, Any]]:
        """The kind of rule, what it keeps of a leaf, and that by their names."""
        kept = self.filling.take(path)
        (kind,) = kept.kinds
        slots = dict(kept.slots or {})
        if self.filling.check:
            owner, count = self.filling.owner, kept.count
            _expect_moments(owner, self.system, None, kind, path, count, slots)
        if kind == "adamax" and self.system.eps_inside:
            u = np.asarray(slots["u"], np.float64) + float(kept.rule.eps)
            # Before the first step there is no maximum.
            u = u if kept.count else np.zeros_like(u)
            slots["u"] = u.astype(np.float32 if _narrow(slots["u"]) else np.float64)
        self._refuse(kept.rule, kind, path, kept.count, slots["m"], slots.get("u"))
        theirs = self.system.names[kind]
        return kind, kept, {theirs[name]: x for name, x in slots.items()}


def _narrow(x: Any) -> bool:
    return np.dtype(x.dtype).itemsize <= 4


def _product(b1: Any, count: int) -> float:
    """The product of Nadam's momenta after so many steps."""
    steps = np.arange(1, count + 1, dtype=np.float64)
    return float(np.prod(float(b1) * (1 - 0.5 * 0.96**steps)))


def _is_product(x: Any, expected: float, count: int) -> bool:
    """Whether a product of so many factors, each perhaps rounded, is the expected one."""
    rounded = count * float(jnp.finfo(np.asarray(x).dtype).eps)
    return math.isclose(float(x), expected, rel_tol=max(1e-3, rounded), abs_tol=1e-30)


def same_value(a: Any, b: Any) -> bool:
    """Whether two numbers are the same, one of them perhaps in float32."""
    return math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=1e-30)


_SCALINGS = (scale, scale_by_learning_rate)


class Said:
    """Compares what a system says of its hyperparameters with a transform's."""

    def __init__(self, ours: Ours, system: _System) -> None:
        self.ours, self.system = ours, system
        parts = [part for part in ours.parts if not part.tx.parts]
        self.parts = [(part, frozenset(leaves_by_path(ours.owner, part.params))) for part in parts]
        self.places = {path: i for i, path in enumerate(leaf_paths(ours.params))}

    def check(self, kept: dict[str, list[Kept]]) -> None:
        for path, several in kept.items():
            route = [part for part, leaves in self.parts if path in leaves]
            rules = [i for i, part in enumerate(route) if isinstance(part.tx, Rule)]
            # Rules inside of a transform from elsewhere are not seen.
            if len(rules) == len(several):
                for i, one in zip(rules, several, strict=True):
                    self._check_rule(path, route[i], one.facts)
                    self._check_direction(path, route[:i], one.facts)
                    self._check_more(path, route, one.facts)
                self._check_rates(path, route, rules[-1], several[-1].facts)

    def _refuse(self, path: str, theirs: str, ours: str, mend: str, unsaid: bool = False) -> None:
        more = f". Note: {self.system.unsaid}" if unsaid and self.system.unsaid else ""
        raise ValueError(
            f"{self.ours.owner}: {path!r}: {self.system.name} has {theirs}, tx has {ours}: {mend}, "
            f"or pass check=False to go on otherwise from here{more}"
        )

    def _check_rule(self, path: str, part: Part, facts: dict[str, Any]) -> None:
        rule: Any = part.tx
        form = facts.get("form", self.system.forms[kind_of(part.state)])
        eps = facts.get("eps")
        theirs = form if eps is None else f"{form}={float(eps):g}"
        if getattr(rule, form) is None:
            where = "outside the bias correction" if form == "eps_hat" else "on the corrected root"
            value = theirs if eps is not None else f"{form}=..., with their value"
            other = "eps" if form == "eps_hat" else "eps_hat"
            ours = f"{other}={getattr(rule, other)}"
            mend = f"build tx with {value}"
            self._refuse(path, f"epsilon {where} ({theirs})", ours, mend, unsaid=eps is None)
        numbers = {"b1": rule.b1, "b2": rule.b2, "eps": getattr(rule, form)}
        for name, value in numbers.items():
            if name in facts and not same_value(facts[name], value):
                named = form if name == "eps" else name
                theirs = f"{named}={float(facts[name]):g}"
                self._refuse(path, theirs, f"{named}={value}", f"build tx with {theirs}")
        if facts.get("eps_root"):
            self._refuse(
                path, f"eps_root={float(facts['eps_root']):g}", "none", "there is none here"
            )
        exact = any(isinstance(p.tx, exact_rows) for p in self.ours.parts)
        if facts.get("lazy") and (rule.rows != "lazy" or exact):
            rows = "exact_rows" if exact else f"rows={rule.rows!r}"
            self._refuse(
                path, "rows that stand still without a gradient", rows, "build it with rows='lazy'"
            )

    def _check_direction(self, path: str, front: list[Part], facts: dict[str, Any]) -> None:
        """Compares whose gradients are negated in front of the rule, as torch does to maximize."""
        if "maximize" not in facts:
            return
        signs = [i for i, p in enumerate(front) if isinstance(p.tx, scale) and p.tx.factor < 0]
        maximize = bool(facts["maximize"])
        late = bool(signs) and bool(self._decay(path, front[: signs[-1]]))
        if maximize != (len(signs) % 2 == 1) or late:
            here = "gradients that are negated in front of the rule" if signs else "none"
            here = "gradients that are negated behind their weight decay" if late else here
            mend = "begin tx with scale(-1.0)" if maximize else "leave out that scale"
            self._refuse(path, f"maximize={maximize}", here, mend)

    def _check_more(self, path: str, route: list[Part], facts: dict[str, Any]) -> None:
        """Hyperparameters that are no rule's: some part of tx must have one of that name."""
        for name, value in facts.get("more", {}).items():
            ours = [getattr(part.tx, name, None) for part in route]
            numbers = [x for x in ours if x is not None and not callable(x) and np.ndim(x) == 0]
            if np.ndim(value) or not any(same_value(value, x) for x in numbers):
                theirs = f"{name}={np.asarray(value)}"
                mend = f"build tx with a transform that has {theirs}"
                self._refuse(path, theirs, f"no such {name}", mend)

    def _check_rates(self, path: str, route: list[Part], rule: int, facts: dict[str, Any]) -> None:
        if facts.get("learning_rate") is not None:
            now, rate = self._rate(path, route[rule:]), facts["learning_rate"]
            if callable(rate):  # a schedule, with the count of ours
                found = [p for p in route[rule:] if isinstance(p.tx, scale_by_learning_rate)]
                with in_float64():
                    rate = rate_at(rate, (*found, route[rule])[0].state.count)
            if now is not None and not self._is_rate(path, route[rule:], rate):
                theirs = f"a learning rate of {float(rate):g}"
                mend = "build tx with that rate (by_path, for one a leaf)"
                self._refuse(path, theirs, f"{float(now):g} for the next step", mend)
        if "weight_decay" in facts and not self._decays(path, route, rule, facts):
            wd = float(facts["weight_decay"])
            where = (
                "in front of the rule (in its moments)"
                if facts.get("decoupled") is False
                else "behind the rule (and in front of all that scales: the rate)"
            )
            front, behind = self._decay_before(path, route[:rule]), self._decay(path, route[rule:])
            ours = f"{front:g} in front of its rule and {behind:g} behind it"
            mend = f"put add_decayed_weights({wd:g}) {where}"
            self._refuse(path, f"a weight decay of {wd:g}", ours, mend)

    def _decays(self, path: str, route: list[Part], rule: int, facts: dict[str, Any]) -> bool:
        """Whether a leaf decays as there."""
        front, behind = self._decay_before(path, route[:rule]), self._decay(path, route[rule:])
        wd, decoupled = float(facts["weight_decay"]), facts.get("decoupled")
        fits = {None: [(0.0, wd), (wd, 0.0)], True: [(0.0, wd)], False: [(wd, 0.0)]}[decoupled]
        if facts.get("masks_decay"):
            # Which leaves decay is not said: at least one does.
            parts = [p for p in self.ours.parts if isinstance(p.tx, add_decayed_weights)]
            if any(same_value(self._decay(other, parts), wd) for other in self.places):
                fits.append((0.0, 0.0))
        return any(same_value(front, a) and same_value(behind, b) for a, b in fits)

    def _is_rate(self, path: str, route: Sequence[Part], theirs: Any) -> bool:
        """Whether the next step has their rate; in float64, which what theirs is made of may be.

        In float32 a schedule may be off: what 1 + cos leaves near its end, or many powers.
        """
        if same_value(theirs, self._rate(path, route)):
            return True
        try:
            with in_float64():
                return same_value(theirs, self._rate(path, route))
        except TypeError:  # a callable of someone else's, whose branches are of float32 alone
            return False

    def _rate(self, path: str, route: Sequence[Part]) -> Any:
        """What the next step is multiplied by, downhill; `None` where nothing says."""
        scalings = [part for part in route if isinstance(part.tx, _SCALINGS)]
        return -self._factor(path, scalings) if scalings else None

    def _factor(self, path: str, route: Sequence[Part]) -> float:
        """What the next step is multiplied by on a route."""
        made = 1.0
        for part in route:
            if isinstance(part.tx, scale_by_learning_rate):
                rate = rate_at(part.tx.learning_rate, part.state.count)
                made *= -float(rate.at(path) if isinstance(rate, by_path) else rate)
            elif isinstance(part.tx, scale):
                made *= float(part.tx.factor)
        return made

    def _decay(self, path: str, route: Sequence[Part]) -> float:
        """The weight decay behind a rule, as much as it was if nothing scaled in front of it."""
        return sum(
            decay / (self._factor(path, route[:i]) or math.nan)
            for i, decay in self._decays_of(path, route)
        )

    def _decay_before(self, path: str, route: Sequence[Part]) -> float:
        """The weight decay in front of a rule, as it comes to the rule."""
        return sum(
            decay * self._factor(path, route[i:]) for i, decay in self._decays_of(path, route)
        )

    def _decays_of(self, path: str, route: Sequence[Part]) -> list[tuple[int, float]]:
        """Each weight decay of a leaf that is not 0, with its place on the route."""
        found = []
        for i, part in enumerate(route):
            if isinstance(part.tx, add_decayed_weights):
                pair = part.tx.affine(part.state, part.params, self.places[path], np.float32)
                if pair is not None and float(pair[1]):
                    found.append((i, float(pair[1])))
        return found


# --- into a state of ours -------------------------------------------------------------------------


class _IntoOurs:
    """Fills a state of ours."""

    def __init__(self, source: Source, system: _System, ours: Ours, check: bool, rtol: float):
        self.source, self.ours, self.owner = source, ours, source.owner
        self.filling = Filling(source, check)
        self.translation = Translation(self.filling, system, rtol)
        # Whether what is being filled counts steps, and not calls.
        self.gathers = False
        for held in source.gathered:
            taking = {p: steps for steps, own in ours.gathering for p in own}
            for path in held.totals if held.micro else ():
                if path not in taking:
                    raise ValueError(
                        f"{self.owner}: the source has gathered {held.micro} micro-batches of "
                        f"{path!r} since its last step: wrap tx in accumulate_gradients, or "
                        "convert after a step"
                    )
                if check and held.micro >= taking[path]:
                    raise ValueError(
                        f"{self.owner}: the source has gathered {held.micro} micro-batches of "
                        f"{path!r} since its last step, but tx takes one of every "
                        f"{taking[path]}: wrap it in accumulate_gradients of as many steps, "
                        "or pass check=False"
                    )

    def state(self) -> Any:
        made = self.fill(self.ours.state)
        self.filling.finish()
        if self.source.average is not None and self.filling.check and not self.averages:
            raise ValueError(
                f"{self.owner}: the source keeps an average of the weights, which has no place in "
                "tx: end it in weight_ema, or pass check=False to drop it"
            )
        return made

    averages = 0

    def fill(self, x: Any) -> Any:
        if isinstance(x, RULES):
            return self._rule(x)
        if isinstance(x, ScheduleState):
            return ScheduleState(self._count(self.ours.leaves(x), x.count))
        if isinstance(x, WeightEmaState):
            if self.source.average is None:
                raise ValueError(
                    f"{self.owner}: tx averages the weights (weight_ema), but the source has no "
                    "average: pass average=, a tree like params (params itself to start from them)"
                )
            self.averages += 1
            average = self.filling.tree("the average", self.source.average, x.average)
            return WeightEmaState(self._count(self.ours.leaves(x), x.count), average)
        if isinstance(x, AccumulateGradientsState):
            return self._gathering(x)
        if isinstance(x, SkipNotFiniteState):
            skipped = jnp.asarray(self.source.skipped or 0, x.skipped.dtype)
            return SkipNotFiniteState(skipped, self.fill(x.inner))
        if isinstance(x, ExactRowsState):
            part = self.ours.part(x)
            if part is None or not isinstance(part.tx, exact_rows):
                raise ValueError(
                    f"{self.owner}: exact_rows inside of a transform from elsewhere cannot be "
                    "filled: use adamjax.chain, masked or partition in its place"
                )
            return part.tx.from_dense(self.fill(x.inner), part.params)
        if is_container(x) and (_is_ours(x) or _holds_ours(x) or field_names(x) is None):
            return mapped(lambda item: self.fill(item) if is_container(item) else item, x)
        return self.filling.other(x) if jax.tree.leaves(x) else x

    def _count(self, leaves: frozenset[str] | None, like: Any) -> Any:
        calls = None if self.gathers else self.ours.calls(self.source, leaves)
        return jnp.asarray(self.source.count_of(leaves, calls), like.dtype)

    def _rule(self, x: Any) -> Any:
        kind, part = kind_of(x), self.ours.part(x)
        paths = list(leaves_by_path(self.owner, x.m))
        kept = {path: self.filling.take(path) for path in paths}
        count = self.filling.counted(kept)
        rule = None if part is None else part.tx
        if rule is None and kind != "adam":
            raise ValueError(
                f"{self.owner}: {kind} inside of a transform from elsewhere cannot be filled: use "
                "adamjax.chain, masked or partition in its place"
            )
        fresh = {name: leaves_by_path(self.owner, getattr(x, name)) for name in slot_names(x)}
        slots: dict[str, dict[str, Any]] = {name: {} for name in slot_names(x)}
        for path in paths:
            found = self.translation.to_ours(rule, kind, path, kept[path])
            for name, values in slots.items():
                values[path] = fresh[name][path] if found is None else found[name]
        trees = {
            name: self.filling.tree(name, values, getattr(x, name))
            for name, values in slots.items()
        }
        made = x._replace(count=jnp.asarray(count, x.count.dtype), **trees)
        if kind == "nadam":
            products = [k.product for k in kept.values() if k.product is not None]
            expected = _product(rule.b1, count)  # type: ignore[union-attr]
            product = products[0] if products else expected
            if self.filling.check and not _is_product(product, expected, count):
                raise ValueError(
                    f"{self.owner}: the product of momenta is {float(product):g} after {count} "
                    f"steps, with b1 and b1 * (1 - 0.5 * 0.96**t) of tx it is {expected:g}: build "
                    "tx with their b1; another schedule of the momentum (schedule_decay of legacy "
                    "Keras) is another optimizer, so start anew, tx.init(params), or pass "
                    "check=False"
                )
            like = x.momentum_product
            made = made._replace(momentum_product=jnp.asarray(np.asarray(product), like.dtype))
        return made

    def _gathering(self, x: AccumulateGradientsState) -> AccumulateGradientsState:
        total: Any = x.total
        kept = leaves_by_path(self.owner, total)
        micro, totals = self.source.gathered_of(frozenset(kept)) or (0, {})
        if micro:
            rows = [p for p, t in kept.items() if isinstance(t, RowGradient)]
            if rows:
                raise ValueError(
                    f"{self.owner}: {micro} micro-batches were gathered, densely, but the table "
                    f"{rows[0]!r} gathers rows here (max_rows): convert after a whole step"
                )
            total = self.filling.tree("the gathered gradient", totals, total)
        outside, self.gathers = self.gathers, True
        inner = self.fill(x.inner)
        self.gathers = outside
        return AccumulateGradientsState(jnp.asarray(micro, x.micro_count.dtype), total, inner)


def new_ours(owner: str, tx: Any, params: Tree) -> Ours:
    tx = as_transform(tx)
    return Ours(owner, tx, tx.init(params), params)


def into_ours(
    source: Source, system: _System, new: Ours, average: Tree, check: bool, rtol: float
) -> Any:
    source.refuse_doubts(check)
    if average is not None:
        source.average = leaves_by_path(new.owner, average)
    state = _IntoOurs(source, system, new, check, rtol).state()
    if check:
        Said(Ours(new.owner, new.tx, state, new.params), system).check(source.kept)
    return state


def numbers_of(owner: str, what: str, x: Any) -> np.ndarray:
    """A number, an array or a tensor of torch in NumPy, or an error where it is none."""
    if isinstance(x, jax.core.Tracer):
        raise ValueError(
            f"{owner}: {what} is being traced, so it has no value yet; convert outside of jit, "
            "vmap and grad"
        )
    try:
        found = numpy_array(x)
    except (TypeError, ValueError):
        found = np.asarray(None)
    if not jnp.issubdtype(found.dtype, np.number):
        raise ValueError(
            f"{owner}: {what} is {x!r:.100} of type {type(x).__name__}, expected a number or an "
            "array of numbers"
        )
    return found


def number_of(owner: str, what: str, x: Any) -> float:
    """A real number, or an error where it is none."""
    found = numbers_of(owner, what, x)
    if found.size != 1 or jnp.issubdtype(found.dtype, np.complexfloating):
        raise ValueError(f"{owner}: {what} is {x!r:.100}, expected one real number")
    return float(found.reshape(()))


def steps_taken(owner: str, what: str, x: Any) -> int:
    """A count of steps, or an error where it is none."""
    value = numbers_of(owner, f"the count of {what}", x)
    number = value.dtype.kind in "iuf" and value.shape == ()
    if not (number and np.isfinite(value) and value >= 0 and value == np.floor(value)):
        mend = "" if value.shape == () else ": convert the states of several runs one by one"
        raise ValueError(
            f"{owner}: the count of {what} is {x!r}, expected a whole number of steps of at least "
            f"0{mend}"
        )
    if value > np.iinfo(np.int32).max:
        raise ValueError(f"{owner}: the count of {what} is {x!r}, expected at most 2**31 - 1")
    return int(value)


def numpy_array(x: Any) -> np.ndarray:
    """A tensor of torch, or an array, in NumPy."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if re.search("bfloat16|float8", str(x.dtype)) else x).numpy()
    return np.asarray(x)


def _words(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", name.lower()))


# What the last word of a name may be in the one system, and in the other.
_SYNONYMS = {
    **dict.fromkeys(("kernel", "embedding", "embeddings", "scale", "gamma"), "weight"),
    "beta": "bias",
}


def _paired(names: Sequence[str], paths: Sequence[str]) -> list[str] | None:
    """The path that each name corresponds to; `None` if not all do, one to one.

    A name is a path's if their words are the same, `layers.0.weight` and `layers/0/kernel`, but
    for words in front of one of the two, as `model`.
    """

    def exact(words: tuple[str, ...]) -> tuple[str, ...]:
        return words

    def plain(words: tuple[str, ...]) -> tuple[str, ...]:
        return (*words[:-1], _SYNONYMS.get(words[-1], words[-1])) if words else words

    def fits(a: tuple[str, ...], b: tuple[str, ...], whole_name: bool) -> bool:
        n = min(len(a), len(b))
        named = any(not word.isdigit() for word in a[len(a) - n :])
        return a == b or (not whole_name and named and a[len(a) - n :] == b[len(b) - n :])

    for form in (exact, plain):
        ours: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for path in paths:
            words = form(_words(path))
            ours.setdefault(words[-1] if words else "", []).append((words, path))
        theirs = [form(_words(name)) for name in names]
        for whole_name in (True, False):
            chosen = []
            for words in theirs:
                near = ours.get(words[-1] if words else "", [])
                found = [path for own, path in near if fits(words, own, whole_name)]
                chosen += found[:1] if len(found) == 1 else []
            if len(chosen) == len(names) == len(set(chosen)):
                return chosen
    return None


def leaf_order(
    owner: str,
    order: Sequence[str | None] | None,
    params: Tree,
    system: str = "",
    names: Sequence[str] | None = None,
    check: bool = True,
) -> list[str | None]:
    """The paths of the leaves in the order of another system, checked.

    Args:
      order: what the user says.
      system: the other system's name, for errors.
      names: what it calls its parameters, in its order, where it says.
    """
    leaves = leaves_by_path(owner, params)
    known = list(leaves)
    if order is not None and (
        not isinstance(order, Collection) or isinstance(order, str | bytes | Mapping)
    ):
        raise TypeError(
            f"{owner}: order is {order!r:.100} of type {type(order).__name__}, expected a list of "
            "paths"
        )
    if order is None:
        if names is None or len(names) != len(known):
            return list(known)
        return list(_order_of_names(owner, system, names, leaves, check))
    for path in order:
        if path is not None and path not in known:
            raise ValueError(
                f"{owner}: order names the leaf {path!r}, which params does not have (as floats): "
                f"expected paths of {known}, or None for one that is not to be converted"
            )
    given = [path for path in order if path is not None]
    if len(set(given)) != len(given):
        twice = next(path for path in given if given.count(path) > 1)
        raise ValueError(f"{owner}: order names the leaf {twice!r} more than once")
    if check and names is not None and len(names) == len(order):
        wanted = [name for name, path in zip(names, order, strict=True) if path is not None]
        for name, path, meant in zip(wanted, given, _paired(wanted, given) or given, strict=True):
            if path != meant:
                raise ValueError(
                    f"{owner}: order has {path!r} in the place of {system}'s {name!r}, which is "
                    f"the name of another leaf, {meant!r}: put order in the order of "
                    f"{list(names[:8])}, or pass check=False to go by it"
                )
    return list(order)


def _order_of_names(
    owner: str, system: str, names: Sequence[str], leaves: Mapping[str, Any], check: bool
) -> list[str]:
    known = list(leaves)
    paired = _paired(names, known)
    if paired is not None:
        return paired
    # By place, where leaves have no names of their own, or where a wrong place would be seen.
    nameless = all(word.isdigit() for path in known for word in path.split("/"))
    sizes = [tuple(sorted(np.shape(x))) for x in leaves.values()]
    if nameless or len(set(sizes)) == len(sizes) or not check:
        return known
    raise ValueError(
        f"{owner}: {system} names its parameters {list(names[:8])}"
        f"{'...' if len(names) > 8 else ''}, which are not the leaves {known[:8]}"
        f"{'...' if len(known) > 8 else ''} one to one, and some leaves have the same shape: "
        "give order=, the path of the leaf for each of these names, in their order"
    )


def expect_place_to_gather(owner: str, source: Source, wanted: Source) -> None:
    """Refuses to lose what was gathered of a leaf."""
    room = {path for held in wanted.gathered for path in held.totals}
    for held in source.gathered:
        lost = [path for path in held.totals if path not in room]
        if held.micro and lost:
            raise ValueError(
                f"{owner}: {held.micro} micro-batches of {lost[0]!r} were gathered since the last "
                "step, for which the target has no place: convert after a step, or wrap it likewise"
            )
