"""Rules written with public names only: Lion, Adan, and RMSprop and ADOPT for `exact_rows`."""

import doctest
import math
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, assert_same

import adamjax
from adamjax import extend, testing

PARAMS = {"table": jnp.linspace(-1, 1, 24).reshape(8, 3), "gain": jnp.ones(2)}


def row_grads(t):
    rng, ids = np.random.default_rng(t), jnp.array([[t % 8, 5], [t % 8, (3 * t) % 8]])
    values = jnp.asarray(rng.normal(size=(2, 2, 3)), jnp.float32)
    gain = jnp.asarray(rng.normal(size=2), jnp.float32)
    return {"table": adamjax.row_gradient(ids, values, 8), "gain": gain}


def zeros(params):
    """New slots in the dtypes of the parameters, in float32 at least."""

    def make(p):
        return extend.widen(jnp.zeros_like(p), extend.compute_dtype(p.dtype))

    return extend.new_slots(params, make)


def real_zeros(params):
    """New slots for the sizes of gradients, which are real."""
    return extend.new_slots(params, lambda p: jnp.zeros_like(p, extend.compute_dtype(p.dtype)))


def new_count():
    return jnp.zeros((), jnp.int32)


# --- Lion, arXiv:2302.06675 -----------------------------------------------------------------------


@extend.transform_state("m")
class LionState(NamedTuple):
    count: Any
    m: Any


def lion_rule(c, g, m):
    """Not a Recurrence, because the update is computed from the old slot."""
    average_for_update, average_for_slot = c
    real = extend.compute_dtype(g.dtype, m.dtype)
    m, wide = extend.widen(m, real), extend.widen(g, real)
    return jnp.sign(average_for_update(m, wide)).astype(g.dtype), average_for_slot(m, wide)


class lion(extend.Rule):
    b1: extend.Number = 0.9
    b2: extend.Number = 0.99
    rows: extend.Rows = extend.static(default="dense", kw_only=True)

    def __post_init__(self):
        self.check_range("b1", extend.BETA)
        self.check_range("b2", extend.BETA)

    def init(self, params):
        return LionState(new_count(), zeros(params))

    def check_state(self, state):
        extend.expect_state(self, state, LionState)
        extend.expect_wide("lion", "m", state.m)

    def update(self, updates, state, params=None, **extra_args):
        self.check_state(state)

        def scalars(real):
            return extend.averaging(self.b1, real), extend.averaging(self.b2, real)

        u, m = extend.lift("lion", lion_rule, scalars, updates, (state.m,), rows=self.rows)
        return u, LionState(extend.next_count(state.count), m)


def lion_reference(g, m, step, b1=0.9, b2=0.99):
    return np.sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g


# --- Adan, arXiv:2208.06677, algorithm 1, with the bias corrections of the authors' code ----------


@extend.transform_state("m", "v", "n", "last")
class AdanState(NamedTuple):
    count: Any
    m: Any  # averages of gradients
    v: Any  # averages of their changes
    n: Any  # averages of (gradient + b2 * its change)**2
    last: Any  # the gradients of the previous step


class AdanScalars(NamedTuple):
    first: Any
    second: Any
    third: Any
    b2: Any
    has_last: Any
    c_m: Any
    c_v: Any
    c_n: Any
    eps: Any

    def times(self, factor):
        return self._replace(c_m=factor * self.c_m, c_v=factor * self.c_v)


def adan_moments(c, g, m, v, n, last):
    change = c.has_last * (g - last)
    return (
        c.first(m, g),
        c.second(v, change),
        c.third(n, extend.square(g + c.b2 * change)),
        g,
    )


def adan_direction(c, g, m, v, n, last):
    return (c.c_m * m + c.c_v * v) / (extend.root(c.c_n * n) + c.eps)


adan_rule = extend.Recurrence(adan_moments, adan_direction)


class adan(extend.Rule):
    """Has `step` instead of `update`, so a chain multiplies its scalars by the learning rate."""

    b1: extend.Number = 0.98
    b2: extend.Number = 0.92
    b3: extend.Number = 0.99
    eps: extend.Number = 1e-8
    rows: extend.Rows = extend.static(default="dense", kw_only=True)

    def __post_init__(self):
        for name in ("b1", "b2", "b3"):
            self.check_range(name, extend.BETA)
        self.check_range("eps", extend.POSITIVE)

    def init(self, params):
        return AdanState(
            new_count(), zeros(params), zeros(params), real_zeros(params), zeros(params)
        )

    def check_state(self, state):
        extend.expect_state(self, state, AdanState)
        for name in ("m", "v", "n", "last"):
            extend.expect_wide("adan", name, getattr(state, name))

    def step(self, grads, state, factors):
        self.check_state(state)

        def scalars(real):
            t = extend.step_number(state.count, real)
            return AdanScalars(
                first=extend.averaging(self.b1, real),
                second=extend.averaging(self.b2, real),
                third=extend.averaging(self.b3, real),
                b2=extend.scalar(self.b2, real),
                has_last=(t > 1).astype(real),
                c_m=1 / extend.correction(self.b1, t),
                c_v=extend.scalar(self.b2, real) / extend.correction(self.b2, t),
                c_n=1 / extend.correction(self.b3, t),
                eps=extend.positive_epsilon(self.eps, real),
            )

        slots = (state.m, state.v, state.n, state.last)
        u, *slots = extend.lift(
            "adan", adan_rule, extend.times(scalars, factors), grads, slots, rows=self.rows
        )
        return u, AdanState(extend.next_count(state.count), *slots)


def adan_reference(g, m, v, n, last, step, b1=0.98, b2=0.92, b3=0.99, eps=1e-8):
    change = g - last if step > 1 else np.zeros_like(g)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * change
    n = b3 * n + (1 - b3) * (g + b2 * change) ** 2
    numerator = m / (1 - b1**step) + b2 * v / (1 - b2**step)
    return numerator / (np.sqrt(n / (1 - b3**step)) + eps), m, v, n, g


# --- RMSprop with momentum, without bias corrections: a rule that exact_rows accepts --------------


@extend.transform_state("mean", "energy")
class RmsState(NamedTuple):
    count: Any
    mean: Any
    energy: Any


class RmsScalars(NamedTuple):
    first: Any
    second: Any
    c_m: Any
    eps: Any

    def times(self, factor):
        return self._replace(c_m=factor * self.c_m)


def rms_moments(c, g, mean, energy):
    return c.first(mean, g), c.second(energy, extend.square(g))


def rms_direction(c, g, mean, energy):
    return c.c_m * mean / (extend.root(energy) + c.eps)


rms_rule = extend.Recurrence(rms_moments, rms_direction)


class rms(extend.Rule):
    b1: extend.Number = 0.8
    b2: extend.Number = 0.99
    eps: extend.Number = 1e-4
    rows: extend.Rows = extend.static(default="dense", kw_only=True)

    def __post_init__(self):
        self.check_range("b1", extend.BETA)
        self.check_range("b2", extend.BETA)
        self.check_range("eps", extend.POSITIVE)

    def init(self, params):
        return RmsState(new_count(), zeros(params), real_zeros(params))

    def check_state(self, state):
        extend.expect_state(self, state, RmsState)
        extend.expect_wide("rms", "mean", state.mean)
        extend.expect_wide("rms", "energy", state.energy)

    def step(self, grads, state, factors):
        self.check_state(state)

        def scalars(real):
            return RmsScalars(
                first=extend.averaging(self.b1, real),
                second=extend.averaging(self.b2, real),
                c_m=self.momentum_coefficient(state, real),
                eps=extend.positive_epsilon(self.eps, real),
            )

        slots = (state.mean, state.energy)
        u, *slots = extend.lift(
            "rms", rms_rule, extend.times(scalars, factors), grads, slots, rows=self.rows
        )
        return u, RmsState(extend.next_count(state.count), *slots)

    def coast(self):
        return extend.Coast(
            b1=self.b1,
            shrink=math.sqrt(self.b2),
            eps=self.eps,
            momentum="mean",
            size="energy",
            decays=(("mean", self.b1), ("energy", self.b2)),
        )

    def momentum_coefficient(self, state, real):
        return extend.scalar(1.0, real)


def rms_reference(g, mean, energy, step, b1=0.8, b2=0.99, eps=1e-4):
    mean = b1 * mean + (1 - b1) * g
    energy = b2 * energy + (1 - b2) * g**2
    return mean / (np.sqrt(energy) + eps), mean, energy


# --- ADOPT, arXiv:2411.02853: it divides the gradient, so a row coasts without a divisor ----------


@extend.transform_state("m", "v")
class AdoptState(NamedTuple):
    count: Any
    m: Any
    v: Any


class AdoptScalars(NamedTuple):
    first: Any
    second: Any
    eps: Any


def adopt_moments(c, g, m, v):
    """The first nonzero gradient of an element only sets v, in whatever step it comes."""
    is_first = v == 0
    divisor = jnp.where(is_first, 1, jnp.maximum(extend.root(v), c.eps))
    new_m = jnp.where(is_first, m, c.first(m, g / divisor))
    return new_m, jnp.where(is_first, extend.square(g), c.second(v, extend.square(g)))


def adopt_direction(c, g, m, v):
    return m


adopt_rule = extend.Recurrence(adopt_moments, adopt_direction)


class adopt(extend.Rule):
    b1: extend.Number = 0.9
    b2: extend.Number = 0.99
    eps: extend.Number = 1e-6
    rows: extend.Rows = extend.static(default="dense", kw_only=True)

    def init(self, params):
        return AdoptState(new_count(), zeros(params), real_zeros(params))

    def check_state(self, state):
        extend.expect_state(self, state, AdoptState)
        extend.expect_wide("adopt", "m", state.m)
        extend.expect_wide("adopt", "v", state.v)

    def update(self, updates, state, params=None, **extra_args):
        self.check_state(state)

        def scalars(real):
            averages = extend.averaging(self.b1, real), extend.averaging(self.b2, real)
            return AdoptScalars(*averages, extend.positive_epsilon(self.eps, real))

        slots = (state.m, state.v)
        u, *slots = extend.lift("adopt", adopt_rule, scalars, updates, slots, rows=self.rows)
        return u, AdoptState(extend.next_count(state.count), *slots)

    def coast(self):
        return extend.Coast(self.b1, size=None, decays=(("m", self.b1), ("v", self.b2)))

    def momentum_coefficient(self, state, real):
        return extend.scalar(1.0, real)


# --- gradient centralization, arXiv:2004.01461, which is not elementwise --------------------------


def centered(_, g):
    if isinstance(g, adamjax.RowGradient):
        raise TypeError("centralize: the mean of a row gradient is not the table's; use masked")
    return (g - g.mean(axis=tuple(range(g.ndim - 1)), keepdims=True) if g.ndim > 1 else g,)


class centralize(extend.Stateless):
    def update(self, updates, state, params=None, **extra_args):
        return extend.lift(
            "centralize", centered, extend.no_scalars, updates, like=params, rows="whole"
        )[0], state


# --- the laws -------------------------------------------------------------------------------------

TRIALS = {
    "lion": testing.Trial(lion(), reference=lion_reference),
    "lion, lazy": testing.Trial(lion(0.8, rows="lazy")),
    "adan": testing.Trial(adan(), reference=adan_reference),
    "adan, lazy": testing.Trial(adan(rows="lazy")),
    "rms": testing.Trial(rms(), reference=rms_reference),
    "adopt": testing.Trial(adopt()),
}


@pytest.mark.parametrize("law", testing.LAWS)
@pytest.mark.parametrize("name", TRIALS)
def test_the_rules_keep_the_laws(name, law):
    testing.try_law(law, TRIALS[name])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(lion(), optax.scale_by_lion()), (adan(b2=0.5), optax.scale_by_adan(b2=0.5))],
    ids=["lion", "adan"],
)
def test_updates_equal_those_of_optax(ours, theirs):
    """Adan only at b2 = 0.5: the paper multiplies a gradient's change by b2, optax by 1 - b2."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(3)}
    state, their_state = ours.init(params), theirs.init(params)
    for _ in range(20):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        updates, state = ours.update(grads, state)
        expected, their_state = theirs.update(grads, their_state)
        assert_close(updates, expected, rtol=1e-5)


# --- in a chain, and functions that read states ---------------------------------------------------


@pytest.mark.parametrize("rule", [lion(), adan(), rms()], ids=["lion", "adan", "rms"])
def test_a_chain_does_what_its_parts_do_one_after_another(rule):
    """Whether the chain multiplies the scalars of the rule by the rate, or its updates."""
    grads = {"table": PARAMS["table"] ** 2, "gain": jnp.array([0.5, -2.0])}
    rate = adamjax.scale_by_learning_rate(adamjax.by_path([("gain", 0.5)], default=0.1))
    tx = adamjax.chain(rule, rate)
    state, states = tx.init(PARAMS), [rule.init(PARAMS), rate.init(PARAMS)]
    for _ in range(3):
        updates, state = tx.update(grads, state, PARAMS)
        direction, states[0] = rule.update(grads, states[0], PARAMS)
        expected, states[1] = rate.update(direction, states[1], PARAMS)
        assert_close(updates, expected)
        assert_close(state, tuple(states))


def test_the_first_read_of_a_lazy_row_may_be_late():
    """ADOPT skips a row's first gradient. `late_state` begins with three steps on other rows."""
    tx = adopt(rows="lazy")
    state, late_state = tx.init(PARAMS["table"]), tx.init(PARAMS["table"])
    g = jnp.arange(1.0, 7.0).reshape(2, 3)
    other_rows = adamjax.row_gradient(jnp.array([0, 1]), g, 8)
    for _ in range(3):
        _, late_state = tx.update(other_rows, late_state)
    rows = adamjax.row_gradient(jnp.array([2, 5]), g, 8)
    for _ in range(3):
        updates, state = tx.update(rows, state)
        late_updates, late_state = tx.update(rows, late_state)
        assert_same(late_updates.to_dense(), updates.to_dense())
    assert np.any(updates.to_dense() != 0)


def test_slots_are_read_by_name():
    for rule, names in ((lion(), ("m",)), (adan(), ("m", "v", "n", "last"))):
        tx = adamjax.skip_not_finite(
            adamjax.chain(adamjax.clip_by_norm(1.0), rule, adamjax.scale(-0.1))
        )
        state = tx.init(PARAMS)
        assert adamjax.slot_names(state) == names
        for _ in range(2):
            _, state = tx.update(PARAMS, state, PARAMS)
        assert adamjax.step_count(state) == 2
        for name in names:
            slot = adamjax.get_slot(state, name)
            assert jax.tree.structure(slot) == jax.tree.structure(PARAMS)
            assert np.all(slot["gain"] != 0) or name == "v"  # the gradients do not change
    bucketed = adamjax.grouped(lion()).init(PARAMS)
    assert_same(adamjax.get_slot(bucketed, "m"), jax.tree.map(jnp.zeros_like, PARAMS))


# --- subclasses that override update, and a rule without it ---------------------------------------


class doubled_adam(adamjax.scale_by_adam):
    """Overrides `update`; the `step` that it inherits does not double."""

    def update(self, updates, state, params=None, **extra_args):
        updates, state = super().update(updates, state, params)
        return jax.tree.map(lambda u: 2 * u, updates), state


class clamped(adamjax.scale):
    """A scaling that overrides `update`."""

    def update(self, updates, state, params=None, **extra_args):
        updates, state = super().update(updates, state, params)
        return jax.tree.map(lambda u: jnp.clip(u, -1, 1), updates), state


def test_a_chain_calls_the_update_that_a_subclass_overrides():
    grads = jnp.array([4.0, -0.5])
    for tx, expected in (
        (adamjax.chain(doubled_adam(eps=1e-9), adamjax.scale(-1.0)), [-2.0, 2.0]),
        (adamjax.chain(clamped(3.0), adamjax.scale(-1.0)), [-1.0, 1.0]),
        (adamjax.chain(adamjax.scale_by_adam(eps=1e-9), clamped(0.5)), [0.5, -0.5]),
        (adamjax.chain(adamjax.scale_by_adam(eps=1e-9), clamped(3.0)), [1.0, -1.0]),
    ):
        np.testing.assert_allclose(tx.update(grads, tx.init(grads), grads)[0], expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"exact_rows: clamped.*not affine"):
        adamjax.exact_rows(adamjax.chain(adamjax.scale_by_adam(), clamped(3.0)), "w")


def test_a_rule_without_update_or_step_is_refused():
    class nothing(extend.Rule):
        def init(self, params):
            return ()

    with pytest.raises(NotImplementedError, match="nothing has neither update nor step"):
        nothing().update(jnp.ones(2), ())
    tx = adamjax.chain(nothing(), adamjax.scale(1.0))
    with pytest.raises(NotImplementedError, match="nothing has neither update nor step"):
        tx.update(jnp.ones(2), tx.init(None))


# --- exact_rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [lion(), adan()], ids=["lion", "adan"])
def test_exact_rows_refuses_a_rule_without_coast(rule):
    text = rf"exact_rows: {type(rule).__name__}\(.*\) cannot be .*: it has no Coast "
    with pytest.raises(ValueError, match=text):
        adamjax.exact_rows(adamjax.chain(rule, adamjax.scale(-0.1)), "table")


def test_a_coast_with_a_divisor_needs_shrink_and_eps():
    class adopt_without_shrink(adopt):
        def coast(self):
            return extend.Coast(self.b1, decays=(("m", self.b1), ("v", self.b2)))

    with pytest.raises(TypeError, match=r"divides by its slot 'v'.*shrink and eps.*size=None"):
        adamjax.exact_rows(adopt_without_shrink(), "table")


def run_both(exact, dense, steps):
    """Parameters and states after steps of `exact_rows` and of the dense optimizer inside it."""
    params = expected = PARAMS
    state, expected_state = exact.init(PARAMS), dense.init(PARAMS)
    exact_step, dense_step = (jax.jit(testing.Trial(tx).step) for tx in (exact, dense))
    for t in range(steps):
        grads = row_grads(t)
        params, state, _ = exact_step(params, state, grads)
        grads["table"] = grads["table"].to_dense()
        expected, expected_state, _ = dense_step(expected, expected_state, grads)
    return params, state, expected, expected_state


@pytest.mark.parametrize(
    ("rule", "history"),
    [(rms(), None), (rms(), 128), (adopt(), 256)],
    ids=["rms", "rms, 128", "adopt"],
)
def test_exact_rows_equals_dense_for_a_rule_with_coast(rule, history):
    """With weight decay, a schedule and an average."""
    dense = adamjax.chain(
        adamjax.clip_by_global_norm(5.0),
        rule,
        adamjax.add_decayed_weights(0.1),
        adamjax.scale_by_learning_rate(adamjax.exponential_decay(0.1, 10, 0.5)),
        adamjax.weight_ema(0.9),
    )
    exact = adamjax.exact_rows(dense, "table", history=history)
    params, state, expected, expected_state = run_both(exact, dense, 60)
    rows = exact.lookup(params, state, "table", jnp.arange(8))
    assert_close(rows, expected["table"], rtol=1e-5)
    assert np.any(params["table"] != rows)  # some rows lag behind
    params, state = exact.flush(params, state)
    assert_close((params, state.inner), (expected, expected_state), rtol=1e-5)
    assert adamjax.slot_names(state) == adamjax.slot_names(rule.init(PARAMS))


def test_exact_rows_accepts_any_transform_that_does_not_see_the_table():
    params = {"table": PARAMS["table"], "kernel": jnp.ones((3, 2))}
    of_kernel = adamjax.masked(centralize(), "kernel")
    inside = adamjax.exact_rows(adamjax.chain(of_kernel, adamjax.adam(0.1)), "table")
    around = adamjax.chain(of_kernel, adamjax.exact_rows(adamjax.adam(0.1), "table"))
    grads = {"table": row_grads(0)["table"], "kernel": jnp.arange(6.0).reshape(3, 2)}
    updates, _ = inside.update(grads, inside.init(params), params)
    expected, _ = around.update(grads, around.init(params), params)
    assert_same(adamjax.apply_updates(params, updates), adamjax.apply_updates(params, expected))
    assert abs(float(jnp.sum(updates["kernel"]))) < 1e-6

    # The error proposes a mask first, and then the flag.
    text = r"exact_rows: centralize\(\) cannot .*masked\(.*Only if it leaves .*keeps_zero = True"
    for tx in (centralize(), adamjax.masked(centralize(), "table")):
        with pytest.raises(ValueError, match=text):
            adamjax.exact_rows(adamjax.chain(tx, adamjax.adam(0.1)), "table").init(params)


@extend.transform_state("average", "energy")
class AverageState(NamedTuple):
    count: Any
    average: Any
    energy: Any


class average_rms(rms):
    """`rms` with a slot called `average`, like the slot of `weight_ema`."""

    def init(self, params):
        return AverageState(*super().init(params))

    def step(self, grads, state, factors):
        updates, state = super().step(grads, RmsState(*state), factors)
        return updates, AverageState(*state)

    def coast(self):
        decays = (("average", self.b1), ("energy", self.b2))
        return super().coast()._replace(momentum="average", decays=decays)

    def check_state(self, state):
        # The `step` of `rms` calls this with an RmsState.
        extend.expect_state(self, state, AverageState | RmsState)


def test_a_rule_may_have_a_slot_called_average_but_not_in_a_chain_with_weight_ema():
    dense = adamjax.chain(average_rms(), adamjax.scale(-0.1))
    exact = adamjax.exact_rows(dense, "table")
    params, state, expected, expected_state = run_both(exact, dense, 6)
    params, state = exact.flush(params, state)
    assert_close((params, state.inner), (expected, expected_state), rtol=1e-5)

    both = adamjax.exact_rows(adamjax.chain(dense, adamjax.weight_ema(0.9)), "table")
    with pytest.raises(ValueError, match=r"exact_rows: .*'table'.*several have the name 'average'"):
        both.init(PARAMS)


class rms_with_missing_slot(rms):
    def coast(self):
        return super().coast()._replace(momentum="m")


class rms_without_declared_slots(rms):
    """Its state is a dictionary, and so has no `transform_state`."""

    def init(self, params):
        return super().init(params)._asdict()


def test_exact_rows_refuses_a_coast_of_slots_that_the_state_lacks():
    for rule, text in (
        (
            rms_with_missing_slot(),
            r"coasts by the slots \['energy', 'm', 'mean'\].*has.*'energy', 'mean'",
        ),
        (
            rms_without_declared_slots(),
            r"rms_without_declared_slots.*has the slots \[\].*transform_state",
        ),
    ):
        exact = adamjax.exact_rows(adamjax.chain(rule, adamjax.scale(-0.1)), "table")
        with pytest.raises(ValueError, match=f"exact_rows: .*{text}"):
            exact.init(PARAMS)


# --- the module -----------------------------------------------------------------------------------


def test_the_example_in_the_docstring_keeps_all_laws(monkeypatch):
    example = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", example)  # where pickle looks for its classes
    for block in doctest.DocTestParser().get_examples(extend.__doc__):
        exec(block.source, example.__dict__)
    testing.check(example.momentum(0.5))
    with pytest.raises(ValueError, match="momentum: rows must be 'dense' or 'lazy', got 'lasy'"):
        example.momentum(0.5, rows="lasy")
    example.momentum.__post_init__ = lambda self: None
    tx = example.momentum(0.5, rows="lasy")
    with pytest.raises(ValueError, match="momentum: rows is 'lasy', expected 'dense' or 'lazy'"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


def test_the_docstring_describes_every_public_name():
    for name in extend.__all__:
        assert f"`{name}`" in extend.__doc__, name


def test_lift_refuses_scalars_that_are_not_a_function():
    def twice(c, g):
        return (c * g,)

    for scalars in (2.0, [jnp.float32(2.0)]):
        with pytest.raises(TypeError, match=r"^mine: scalars has .*expected a function of a dtype"):
            extend.lift("mine", twice, scalars, {"w": jnp.ones(2)})


class four_factors(extend.Scaling):
    def init(self, params):
        return ()

    def factors(self, tree, state):
        return [lambda real: extend.scalar(2.0, real)] * 4, state


@pytest.mark.parametrize("num_leaves", [3, 5])
def test_a_list_of_scalars_has_one_for_each_leaf(num_leaves):
    params = {str(i): jnp.ones((2, 2)) for i in range(num_leaves)}
    chained = adamjax.chain(adamjax.scale_by_adam(), four_factors())
    exact = adamjax.exact_rows(chained, "0")
    for tx in (four_factors(), chained, exact):
        with pytest.raises(ValueError, match=rf"is a list of 4 .* each of the {num_leaves} leaves"):
            tx.update(params, tx.init(params), params)
    right = {**params, "4": None, "3": jnp.arange(2)} if num_leaves == 3 else dict(params)
    del right["4"]
    assert_same(four_factors().update(right, (), right)[0]["0"], jnp.full((2, 2), 2.0))


@extend.transform_state("m")
class OneMomentState(NamedTuple):
    count: Any
    m: Any


class by_name(extend.Rule):
    """A momentum in which the leaf called "user" has another weight than the others."""

    b: extend.Number = 0.5
    rows: extend.Rows = extend.static(default="dense", kw_only=True)

    def init(self, params):
        slots = extend.new_slots(params, jnp.zeros_like)
        return OneMomentState(jnp.zeros((), jnp.int32), slots)

    def coast(self):
        return extend.Coast(self.b, size=None, decays=(("m", self.b),))

    def momentum_coefficient(self, state, real):
        return extend.scalar(1.0, real)

    def update(self, updates, state, params=None, **extra_args):
        def scalars(weight):
            return lambda real: (extend.averaging(self.b, real), extend.scalar(weight, real))

        heavy, light = scalars(3.0), scalars(1.0)
        each = [heavy if "user" in path else light for path in extend.leaf_paths(updates)]
        rule = extend.Recurrence(lambda c, g, m: (c[0](m, c[1] * g),), lambda c, g, m: m)
        u, m = extend.lift("by_name", rule, each, updates, (state.m,), rows=self.rows)
        return u, OneMomentState(extend.next_count(state.count), m)


class by_name_alone(by_name):
    groupable = False


@pytest.mark.parametrize("joined", ["grouped", "exact_rows"])
def test_scalars_by_path_are_refused_for_joined_leaves(joined):
    params = {"item": jnp.ones((9, 2)), "user": jnp.ones((9, 2))}
    rows = adamjax.row_gradient(jnp.array([1, 3]), jnp.ones((2, 2)), 9)
    grads = {"item": rows, "user": rows} if joined == "exact_rows" else params

    def wrapped(rule):
        tx = adamjax.chain(rule, adamjax.scale_by_learning_rate(0.5))
        return adamjax.grouped(tx) if joined == "grouped" else adamjax.exact_rows(tx, ".*")

    tx = wrapped(by_name(0.5))
    with pytest.raises(ValueError, match=r"^by_name: scalars is a list .*groupable = False"):
        tx.update(grads, tx.init(params), params)
    if joined == "grouped":
        with pytest.raises(ValueError, match="cannot take leaves in buckets"):
            wrapped(by_name_alone(0.5))
        return
    tx = wrapped(by_name_alone(0.5))
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = adamjax.apply_updates(params, updates)
    assert [float(moved[name][1, 0]) for name in ("item", "user")] == [0.75, 0.25]


# --- arithmetic -----------------------------------------------------------------------------------

WRONG_DTYPES = {
    "an integer step": (
        lambda: extend.correction(0.9, jnp.int32(3)),
        r"t is an array of int32, .*",
    ),
    "a step of Python": (
        lambda: extend.correction(0.9, 3),
        r"t is 3, expected an array of float32",
    ),
    "an integer step of an array": (
        lambda: extend.correction(jnp.float32(0.9), extend.next_count(jnp.int32(2))),
        r"step_number\(count, real\) makes it",
    ),
    "a narrow step": (lambda: extend.correction(0.9, jnp.bfloat16(3)), "t is an array of bfloat16"),
    "an integer dtype": (lambda: extend.scalar(0.9, jnp.int32), "scalar: the dtype is int32"),
    "a narrow epsilon": (
        lambda: extend.positive_epsilon(1e-8, jnp.float16),
        "the dtype is float16, expected float32 or float64",
    ),
    "a narrow average": (
        lambda: extend.averaging(0.999, jnp.bfloat16),
        "averaging: the dtype is bfloat16",
    ),
    "a number of an integer dtype": (
        lambda: extend.step_number(jnp.int32(3), jnp.int32),
        "step_number: the dtype is int32",
    ),
    "a count of Python": (
        lambda: extend.step_number(3, jnp.float32),
        "the count is 3, expected an",
    ),
    "a count that is no integer": (
        lambda: extend.next_count(jnp.float32(3)),
        "next_count: the count is an array of float32, expected an array of integers",
    ),
}


@pytest.mark.parametrize("wide", [0, 1])
def test_a_recurrence_computes_in_the_widest_dtype_of_its_slots(wide, x64):
    """In float32, 1e8 + 1 is 1e8."""
    slots = [np.full(1, 1e8, "float64" if i == wide else "float32") for i in range(2)]
    rule = extend.Recurrence(lambda c, g, *old: tuple(x + g for x in old), lambda c, g, *new: g)
    g = [jnp.ones(1, "float32")]
    _, *new = extend.lift("sums", rule, extend.no_scalars, g, [[jnp.asarray(x)] for x in slots])
    assert float(new[wide][0][0]) == 1e8 + 1


@pytest.mark.parametrize("name", WRONG_DTYPES)
def test_arithmetic_refuses_dtypes_in_which_it_would_be_wrong(name):
    call, message = WRONG_DTYPES[name]
    for function in (call, jax.jit(call)):
        with pytest.raises(TypeError, match=message):
            function()


# --- results of the function for lift -------------------------------------------------------------

WRONG_RESULTS = {
    "not a tuple": (lambda c, g, m: g, r"returned an array of shape \[2, 3\], expected a tuple"),
    "no slot": (lambda c, g, m: (g,), r"returned 1 results, expected 2: the update and the new"),
    "too many": (lambda c, g, m: (g, m, m), r"returned 3 results, expected 2"),
    "a sum": (
        lambda c, g, m: (g.sum(), m),
        r"result 0 of .* is the shape \[\], expected .*\[2, 3\]",
    ),
    "a sum in a slot": (lambda c, g, m: (g, m.sum()), r"result 1 of .* is the shape \[\]"),
    "None": (lambda c, g, m: (g, None), r"result 1 of .* is None, expected the shape \[2, 3\]"),
    "moments": (
        extend.Recurrence(lambda c, g, m: m + g, lambda c, g, m: m),
        r"returned an array of shape \[2, 3\], expected a tuple: the new slots",
    ),
    "a direction in a tuple": (
        extend.Recurrence(lambda c, g, m: (m + g,), lambda c, g, m: (m,)),
        "returned a tuple, expected the update",
    ),
    "direction": (
        extend.Recurrence(lambda c, g, m: (m + g,), lambda c, g, m: m[0]),
        r"result 0 of .* is the shape \[3\], expected .*\[2, 3\]; the results are the update",
    ),
}


@pytest.mark.parametrize("rows", ["dense", "lazy"])
@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_lift_refuses_a_function_with_wrong_results(name, rows):
    rule, message = WRONG_RESULTS[name]
    g = {"a": jnp.ones((2, 3))}
    with pytest.raises(TypeError, match=rf"^mine: .*{message}.*; in grads\['a'\]$"):
        extend.lift("mine", rule, lambda real: None, g, (g,), rows=rows)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 3)])
def test_lift_refuses_an_array_as_the_result_of_a_function_without_slots(shape):
    for g in (jnp.ones(shape), adamjax.row_gradient(jnp.array([0]), jnp.ones((1, *shape)), 9)):
        for rows in ("dense", "whole"):
            with pytest.raises(TypeError, match=r"mine: .* returned .*, expected a tuple"):
                extend.lift("mine", lambda c, g: g, lambda real: None, g, rows=rows)
