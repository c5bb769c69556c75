"""What all conversions share: one form, read from a state and filled into another."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.adam import ScaleByAdamaxState, ScaleByAdamState, ScaleByAmsgradState
from adamjax.average import WeightEmaState
from adamjax.data import Tree
from adamjax.exact import ExactRowsState, exact_rows
from adamjax.grouping import grouped
from adamjax.guard import AccumulateGradientsState, SkipNotFiniteState, accumulate_gradients
from adamjax.layout import laid_out_like
from adamjax.leaves import is_left_alone
from adamjax.parts import Part, walk
from adamjax.paths import flatten, leaf_paths, unique_paths
from adamjax.rows import RowGradient
from adamjax.scaling import ScheduleState, add_decayed_weights, scale, scale_by_learning_rate
from adamjax.schedule import by_path, rate_at
from adamjax.transform import Rule, as_transform

__all__ = [
    "KERAS",
    "OPTAX",
    "RTOL",
    "RULES",
    "TORCH",
    "Count",
    "Filling",
    "Kept",
    "Ours",
    "Said",
    "Source",
    "Translation",
    "as_expected",
    "field_names",
    "into_ours",
    "is_container",
    "kind_of",
    "leaf_order",
    "leaves_by_path",
    "mapped",
    "new_ours",
    "no_place_to_gather",
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
    """

    name: str
    names: dict[str, dict[str, str]]
    forms: dict[str, str]
    eps_inside: bool = False
    corrected_maximum: bool = False
    plain_nadam: bool = False


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
OPTAX = _System("optax", _named("mu", "nu", "nu_max", "nu"), _INSIDE, True, True, True)
TORCH = _System(
    "torch", _named("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"), _INSIDE, True
)
KERAS = _System(
    "Keras",
    _named("momentum", "velocity", "velocity_hat", "norm"),
    {**_INSIDE, "adam": "eps_hat", "amsgrad": "eps_hat"},
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
    """

    count: int
    slots: dict[str, Any] | None
    kinds: tuple[str, ...] = _KINDS
    product: Any = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    rule: Any = None


def steps_taken(owner: str, what: str, x: Any) -> int:
    """A count of steps, or an error where it is none."""
    value = np.asarray(numpy_array(x), np.float64)
    if value.shape != () or not np.isfinite(value) or value < 0 or value != np.floor(value):
        raise ValueError(
            f"{owner}: the count of {what} is {x!r}, expected a whole number of steps of at least 0"
        )
    if value > np.iinfo(np.int32).max:
        raise ValueError(f"{owner}: the count of {what} is {x!r}, expected at most 2**31 - 1")
    return int(value)


class Count(NamedTuple):
    """A number of steps counted outside of a rule, and the leaves it is of; `None`: all."""

    steps: int
    leaves: frozenset[str] | None


@dataclasses.dataclass
class Source:
    """A state in the one form.

    Attributes:
      kept: by path, what each rule that the leaf goes through keeps of it, in their order.
      counts: of schedules.
      average: by path, the average of the weights.
      gathered: micro-batches since the last step, and the sums of their gradients by path.
      skipped: steps that were not taken.
      others: states of transforms that are neither ours nor known.
    """

    owner: str
    kept: dict[str, list[Kept]] = dataclasses.field(default_factory=dict)
    counts: list[Count] = dataclasses.field(default_factory=list)
    average: dict[str, Any] | None = None
    gathered: tuple[int, dict[str, Any]] | None = None
    skipped: int | None = None
    others: list[Any] = dataclasses.field(default_factory=list)

    def add(self, path: str, kept: Kept) -> None:
        self.kept.setdefault(path, []).append(kept)

    def count_of(self, leaves: frozenset[str] | None) -> int:
        """The steps that a schedule for these leaves has seen."""
        found = {c.steps for c in self.counts if _meet(c.leaves, leaves)}
        if not found:
            found = {k.count for p, ks in self.kept.items() if _meet({p}, leaves) for k in ks}
        if len(found) > 1:
            some = f" of {sorted(leaves)[:3]}" if leaves else ""
            raise ValueError(
                f"{self.owner}: the leaves{some} have taken different numbers of steps, "
                f"{sorted(found)}, which one count cannot say: give those that go together a "
                "chain of their own with partition"
            )
        return found.pop() if found else 0


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


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """The leaves that are there and are floats, by path, which no two may share."""
    pairs = zip(unique_paths("convert", tree), flatten(tree)[0], strict=True)
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
        self.tx = as_transform(tx)
        self.parts = list(walk(self.tx, state, params))
        for part in self.parts:
            if isinstance(part.tx, grouped):
                raise ValueError(
                    f"{owner}: {part.tx!r} keeps leaves joined. Convert the state of the transform "
                    "without grouped; grouped.join and grouped.split take such a state in and out"
                )
        # The innermost of those that share a state, as `masked` does with its transform.
        self.known = {id(part.state): part for part in self.parts}

    def part(self, state: Any) -> Part | None:
        found = self.known.get(id(state))
        return found if found is not None and found.state is state else None

    def leaves(self, state: Any) -> frozenset[str] | None:
        """The paths that the transform of this state sees."""
        part = self.part(state)
        return None if part is None else frozenset(leaves_by_path(part.params))

    def read(self) -> Source:
        """The state in the one form, with our names of slots."""
        source = Source(self.owner)
        self._read(self.state, source)
        return source

    def _read(self, x: Any, source: Source) -> None:
        if isinstance(x, RULES):
            trees = {name: leaves_by_path(getattr(x, name)) for name in x.slots}
            product, part = getattr(x, "momentum_product", None), self.part(x)
            rule = None if part is None else part.tx
            for path in trees["m"]:
                slots = {name: tree[path] for name, tree in trees.items()}
                source.add(path, Kept(int(x.count), slots, (kind_of(x),), product, rule=rule))
        elif isinstance(x, ScheduleState):
            source.counts.append(Count(int(x.count), self.leaves(x)))
        elif isinstance(x, WeightEmaState):
            source.average = {**(source.average or {}), **leaves_by_path(x.average)}
        elif isinstance(x, AccumulateGradientsState):
            source.gathered = int(x.micro_count), leaves_by_path(x.total)
            self._read(x.inner, source)
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
            raise ValueError(
                f"{self.owner}: the source has {has} of the leaf {path!r} (it has some of "
                f"{known[:5]}{' and others' if len(known) > 5 else ''}): keep the rule from this "
                "leaf with masked or partition, or name leaves alike"
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
                    raise ValueError(f"{self.owner}: the source has no {name} of {path!r}")
                leaves[i] = self.array(path, name, values[path], leaves[i])
        return treedef.unflatten(leaves)

    def other(self, like: Any) -> Any:
        """The source's state of a transform that is neither ours nor known."""
        for i, x in enumerate(self.others):
            if type(x) is type(like) and (jax.tree.structure(x),) == (jax.tree.structure(like),):
                del self.others[i]
                return jax.tree.map(lambda y: jnp.array(y, copy=True), x)
        raise ValueError(
            f"{self.owner}: the source has no {type(like).__name__}, which is to be filled; "
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
                "source: convert chains of the same transforms"
            )


# --- where rules differ ---------------------------------------------------------------------------


def as_expected(owner: str, system: _System, kind: str, path: str, kept: Kept) -> None:
    """Refuses what another rule has kept."""
    wanted = set(system.names[kind].values())
    if kept.slots is not None and (set(kept.slots) != wanted or kind not in kept.kinds):
        of = "" if len(kept.kinds) == len(_KINDS) else f", those of {' or '.join(kept.kinds)}"
        raise ValueError(
            f"{owner}: {system.name} keeps {sorted(kept.slots)} of {path!r}{of}, but for {kind} "
            f"expected {sorted(wanted)}: build both with the same rule"
        )


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

    The gradients' sizes bound their average: by Cauchy and Schwarz m**2 <= c * v, with c the sum
    over k of `(1 - b1)**2 * b1**(2 * k) / ((1 - b2) * b2**k)`, and for Adamax m <= c * u.
    """

    def refuse(what: str) -> None:
        raise ValueError(
            f"{owner}: {what} of {path!r}, which {kind} cannot have: is this the state of another "
            f"optimizer of {system.name}, or are the leaves in another order? check=False takes it"
        )

    wide = {
        name: np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
        for name, x in slots.items()
    }
    for name, x in wide.items():
        theirs = system.names[kind][name]
        if name != "m" and np.any(np.real(x) < 0):
            refuse(f"{theirs} has values below 0")
        if count == 0 and np.any(x != 0):
            refuse(f"{theirs} is not 0 after 0 steps")
    m, size = np.abs(wide["m"]), wide["u"] if kind == "adamax" else wide["v"]
    size, b1, b2 = np.real(size), float(rule.b1), float(rule.b2)
    if kind == "amsgrad" and np.any(wide["v_max"] < 0.99 * size) and not system.corrected_maximum:
        refuse(f"{system.names[kind]['v_max']} is below {system.names[kind]['v']}")
    if kind == "adamax":
        ratio, bound = b1 / b2 if b2 else math.inf, 1 - b1
    else:
        ratio = b1**2 / b2 if b2 else math.inf
        bound = (1 - b1) ** 2 / (1 - b2)
        # Squares below the smallest float are not there any more.
        size = np.sqrt(size + 1e-36)
    if ratio < 1:
        most = bound / (1 - ratio)
        most = most if kind == "adamax" else math.sqrt(most)
        # Twice, as moments may be rounded to few bits.
        if np.any(m > 2 * most * size + 1e-18):
            names = [system.names[kind][name] for name in ("m", "u" if kind == "adamax" else "v")]
            refuse(f"{names[0]} is larger than {names[1]} allows")


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


class Translation:
    """Another system's slots from ours and back."""

    def __init__(self, filling: Filling, system: _System, rtol: float) -> None:
        self.filling, self.system = filling, system
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
        if self.filling.check and rule is not None:
            ours = {name: kept.slots[theirs] for name, theirs in self.system.names[kind].items()}
            _expect_moments(self.filling.owner, self.system, rule, kind, path, kept.count, ours)
        slots = {name: kept.slots[theirs] for name, theirs in self.system.names[kind].items()}
        self._refuse(rule, kind, path, kept.count, slots["m"], slots.get("u"))
        if kind == "adamax" and self.system.eps_inside:
            u = np.asarray(slots["u"], np.float64) - float(rule.eps)
            slots["u"] = np.maximum(u, 0).astype(np.float32 if _narrow(slots["u"]) else np.float64)
        return slots

    def to_theirs(self, path: str) -> tuple[str, Kept, dict[str, Any]]:
        """The kind of rule, what it keeps of a leaf, and that by their names."""
        kept = self.filling.take(path)
        (kind,) = kept.kinds
        slots = dict(kept.slots or {})
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


def same_value(a: Any, b: Any) -> bool:
    """Whether two numbers are the same, one of them perhaps in float32."""
    return math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=1e-30)


class Said:
    """Compares what a system says of its hyperparameters with a transform's."""

    def __init__(self, ours: Ours, system: _System) -> None:
        self.ours, self.system = ours, system
        parts = [part for part in ours.parts if not part.tx.parts]
        self.parts = [(part, frozenset(leaves_by_path(part.params))) for part in parts]
        self.places = {path: i for i, path in enumerate(leaf_paths(ours.params))}

    def check(self, kept: dict[str, list[Kept]]) -> None:
        for path, several in kept.items():
            route = [part for part, leaves in self.parts if path in leaves]
            rules = [i for i, part in enumerate(route) if isinstance(part.tx, Rule)]
            # Rules inside of a transform from elsewhere are not seen.
            if len(rules) == len(several):
                for i, one in zip(rules, several, strict=True):
                    self._check_rule(path, route[i], one.facts)
                    self._check_sign(path, route[:i], one.facts)
                self._check_rates(path, route, rules[-1], several[-1].facts)

    def _refuse(self, path: str, theirs: str, ours: str, mend: str) -> None:
        raise ValueError(
            f"{self.ours.owner}: {path!r}: {self.system.name} has {theirs}, tx has {ours}: {mend}, "
            "or pass check=False to go on otherwise from here"
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
            if self.system is OPTAX:
                mend += (
                    ", and with the rest that an optax state does not say either: b1, b2, the rate "
                    "and the weight decay (optax.adamw's is 1e-4 by default, adamjax.adamw's 0.004)"
                )
            self._refuse(path, f"epsilon {where} ({theirs})", ours, mend)
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

    def _check_sign(self, path: str, front: Sequence[Part], facts: dict[str, Any]) -> None:
        """Compares whose gradients are negated in front of the rule, as torch does to maximize."""
        if "maximize" not in facts:
            return
        signs = [p.tx.factor < 0 for p in front if isinstance(p.tx, scale)]
        if bool(facts["maximize"]) != (sum(map(bool, signs)) % 2 == 1):
            here = "gradients that are negated in front of the rule" if any(signs) else "none"
            mend = "begin tx with scale(-1.0)" if facts["maximize"] else "leave out that scale"
            self._refuse(path, f"maximize={bool(facts['maximize'])}", here, mend)

    def _check_rates(self, path: str, route: list[Part], rule: int, facts: dict[str, Any]) -> None:
        rates = [p for p in route if isinstance(p.tx, scale_by_learning_rate)]
        if len(rates) == 1 and facts.get("learning_rate") is not None:
            now = rate_at(rates[0].tx.learning_rate, rates[0].state.count)  # type: ignore[attr-defined]
            now = now.at(path) if isinstance(now, by_path) else now
            if not same_value(facts["learning_rate"], now):
                theirs = f"a learning rate of {float(facts['learning_rate']):g}"
                mend = "build tx with that rate (by_path, for one a leaf)"
                self._refuse(path, theirs, f"{float(now):g} for the next step", mend)
        if "weight_decay" in facts:
            front = self._decay(path, route[:rule])
            behind = self._decay(path, route[rule:])
            wd, decoupled = float(facts["weight_decay"]), facts.get("decoupled")
            fits = (
                [(0.0, wd), (wd, 0.0)]
                if decoupled is None
                else [(0.0, wd) if decoupled else (wd, 0.0)]
            )
            if not any(same_value(front, a) and same_value(behind, b) for a, b in fits):
                where = (
                    "in front of the rule (in its moments)"
                    if decoupled is False
                    else "behind the rule"
                )
                theirs = f"a weight decay of {wd:g}"
                ours = f"{front:g} in front of its rule and {behind:g} behind it"
                self._refuse(path, theirs, ours, f"put add_decayed_weights({wd:g}) {where}")

    def _decay(self, path: str, route: Sequence[Part]) -> float:
        found = [p for p in route if isinstance(p.tx, add_decayed_weights)]
        pairs = [p.tx.affine(p.state, p.params, self.places[path], np.float32) for p in found]
        return sum(float(pair[1]) for pair in pairs if pair is not None)


# --- into a state of ours -------------------------------------------------------------------------


class _IntoOurs:
    """Fills a state of ours."""

    def __init__(self, source: Source, system: _System, ours: Ours, check: bool, rtol: float):
        self.source, self.ours, self.owner = source, ours, source.owner
        self.filling = Filling(source, check)
        self.translation = Translation(self.filling, system, rtol)
        # How many calls a step takes, and how many came since the last: for what counts calls.
        self.calls = (1, 0)
        steps = [p.tx.steps for p in ours.parts if isinstance(p.tx, accumulate_gradients)]
        if source.gathered is not None:
            if not steps and source.gathered[0]:
                raise ValueError(
                    f"{self.owner}: the source has gathered {source.gathered[0]} micro-batches "
                    "since its last step: wrap tx in accumulate_gradients, or convert after a step"
                )
            self.calls = (int(steps[0]), source.gathered[0]) if steps else self.calls

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
        steps, beyond = self.calls
        return jnp.asarray(self.source.count_of(leaves) * steps + beyond, like.dtype)

    def _rule(self, x: Any) -> Any:
        kind, part = kind_of(x), self.ours.part(x)
        paths = list(leaves_by_path(x.m))
        kept = {path: self.filling.take(path) for path in paths}
        count = self.filling.counted(kept)
        rule = None if part is None else part.tx
        if rule is None and kind != "adam":
            raise ValueError(
                f"{self.owner}: {kind} inside of a transform from elsewhere cannot be filled: use "
                "adamjax.chain, masked or partition in its place"
            )
        slots: dict[str, dict[str, Any]] = {name: {} for name in x.slots}
        for path in paths:
            found = self.translation.to_ours(rule, kind, path, kept[path])
            for name, values in slots.items():
                values[path] = (
                    leaves_by_path(getattr(x, name))[path] if found is None else found[name]
                )
        trees = {
            name: self.filling.tree(name, values, getattr(x, name))
            for name, values in slots.items()
        }
        made = x._replace(count=jnp.asarray(count, x.count.dtype), **trees)
        if kind == "nadam":
            products = [k.product for k in kept.values() if k.product is not None]
            product = products[0] if products else _product(rule.b1, count)  # type: ignore[union-attr]
            like = x.momentum_product
            made = made._replace(momentum_product=jnp.asarray(np.asarray(product), like.dtype))
        return made

    def _gathering(self, x: AccumulateGradientsState) -> AccumulateGradientsState:
        calls, self.calls = self.calls, (1, 0)
        micro, totals = self.source.gathered or (0, {})
        total: Any = x.total
        if micro:
            rows = [p for p, t in leaves_by_path(total).items() if isinstance(t, RowGradient)]
            if rows:
                raise ValueError(
                    f"{self.owner}: {micro} micro-batches were gathered, densely, but the table "
                    f"{rows[0]!r} gathers rows here (max_rows): convert after a whole step"
                )
            total = self.filling.tree("the gathered gradient", totals, total)
        inner = self.fill(x.inner)
        self.calls = calls
        return AccumulateGradientsState(jnp.asarray(micro, x.micro_count.dtype), total, inner)


def new_ours(owner: str, tx: Any, params: Tree) -> Ours:
    tx = as_transform(tx)
    return Ours(owner, tx, tx.init(params), params)


def into_ours(
    source: Source, system: _System, new: Ours, average: Tree, check: bool, rtol: float
) -> Any:
    if average is not None:
        source.average = leaves_by_path(average)
    state = _IntoOurs(source, system, new, check, rtol).state()
    if check:
        Said(Ours(new.owner, new.tx, state, new.params), system).check(source.kept)
    return state


def numpy_array(x: Any) -> np.ndarray:
    """A tensor of torch, or an array, in NumPy."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if "bfloat16" in str(x.dtype) else x).numpy()
    return np.asarray(x)


def leaf_order(owner: str, order: Sequence[str | None] | None, params: Tree) -> list[str | None]:
    """The paths of the leaves in the order of another system, checked."""
    known = list(leaves_by_path(params))
    if order is None:
        return list(known)
    for path in order:
        if path is not None and path not in known:
            raise ValueError(
                f"{owner}: order names the leaf {path!r}, which params does not have (as floats): "
                f"expected paths of {known}, or None for one that is not to be converted"
            )
    return list(order)


def no_place_to_gather(owner: str, source: Source) -> None:
    if source.gathered is not None and source.gathered[0]:
        raise ValueError(
            f"{owner}: {source.gathered[0]} micro-batches were gathered since the last step, for "
            "which the target has no place: convert after a step, or wrap it likewise"
        )
