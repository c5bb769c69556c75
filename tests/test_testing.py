"""Every law finds a transform that breaks it. The errors name the leaf and the numbers."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import is_none

import adamjax
from adamjax import extend, testing
from adamjax.expectations import expect_same_bits

pytestmark = pytest.mark.slow


class sound(extend.Stateless):
    """Doubles gradients. The broken transforms below are subclasses with one fault each."""

    factor: extend.Number = 2.0
    keeps_zero = True
    groupable = True

    def update(self, updates, state, params=None, **extra_args):
        extend.expect_empty(self, state)

        def scalars(real):
            return extend.scalar(self.factor, real)

        return extend.lift("sound", _doubled, scalars, updates, like=params)[0], state


def _doubled(factor, g):
    return ((factor * extend.widen(g, factor.dtype)).astype(g.dtype),)


def is_rows(x):
    return isinstance(x, adamjax.RowGradient)


class by_leaf(sound):
    """Applies `of_leaf` to each leaf; leaves `None` and row gradients as they are."""

    def update(self, updates, state, params=None, **extra_args):
        def mapped(g):
            return g if is_rows(g) or extend.is_left_alone(g) else self.of_leaf(g)

        return jax.tree.map(mapped, updates, is_leaf=is_rows), state

    def of_leaf(self, g):
        raise NotImplementedError


class with_state(sound):
    """Has the sum of the gradients in its state."""

    def init(self, params):
        return {"total": jax.tree.map(jnp.zeros_like, params)}

    def update(self, updates, state, params=None, **extra_args):
        return updates, {"total": jax.tree.map(jnp.add, state["total"], updates)}


# --- broken transforms ----------------------------------------------------------------------------


class mutating(with_state):
    def update(self, updates, state, params=None, **extra_args):
        state["total"] = jax.tree.map(jnp.add, state["total"], updates)
        return updates, state


class counting(sound):
    """Counts its calls in a class attribute, and divides by their number."""

    def update(self, updates, state, params=None, **extra_args):
        counting.calls = getattr(counting, "calls", 0) + 1
        return jax.tree.map(lambda g: g / counting.calls, updates), state


class drifting(with_state):
    """The first step widens totals of a narrow dtype to float32."""

    def update(self, updates, state, params=None, **extra_args):
        def total(m, g):
            return np.float32(0.9) * m + g

        return updates, {"total": jax.tree.map(total, state["total"], updates)}


@extend.transform_state("m")
class StandingState(NamedTuple):
    count: Any
    m: Any


class standing_count(sound):
    """Its count never increases."""

    def init(self, params):
        return StandingState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(self, updates, state, params=None, **extra_args):
        return updates, StandingState(state.count, jax.tree.map(jnp.add, state.m, updates))


class widening(by_leaf):
    def of_leaf(self, g):
        return g.astype(jnp.promote_types(g.dtype, jnp.float32))


class promoting(by_leaf):
    """Multiplies gradients of any dtype by a float32."""

    def of_leaf(self, g):
        return (g * np.float32(2.0)).astype(g.dtype)


class branching(by_leaf):
    """Branches on the value of an array."""

    def of_leaf(self, g):
        return g if g.size == 0 or jnp.all(jnp.isfinite(g)) else jnp.zeros_like(g)


class holding_params(sound):
    """Its state is the parameters' own arrays, which a step then donates twice."""

    def init(self, params):
        return params

    def update(self, updates, state, params=None, **extra_args):
        return updates, state


class in_float32(by_leaf):
    """Rounds float64 to float32."""

    def of_leaf(self, g):
        return (g.astype(jnp.float32) * 2 if g.dtype == jnp.float64 else g * 2).astype(jnp.float32)


class rounding_twice(by_leaf):
    """Rounds the quotient to the gradient's dtype, and then the product."""

    def of_leaf(self, g):
        return 3 * jax.lax.optimization_barrier(g / 3)


class calling_back(by_leaf):
    def of_leaf(self, g):
        return jax.pure_callback(
            lambda x: np.asarray(2 * x), jax.ShapeDtypeStruct(g.shape, g.dtype), g
        )


class branching_on_a_hyperparameter(by_leaf):
    def of_leaf(self, g):
        return g if self.factor > 1 else -g


class forgetting_none(with_state):
    """Replaces the total of a leaf without a gradient by `None`."""

    def update(self, updates, state, params=None, **extra_args):
        def total(g, m):
            return None if g is None else m + g

        return updates, {"total": jax.tree.map(total, updates, state["total"], is_leaf=is_none)}


class moving_integers(sound):
    def update(self, updates, state, params=None, **extra_args):
        def moved(g):
            return g + 1 if g.dtype == jnp.int32 else g

        return jax.tree.map(moved, updates), state


class dividing_by_the_largest(by_leaf):
    """Fails for an empty array, which has no largest element."""

    def of_leaf(self, g):
        return g / jnp.max(jnp.abs(g))


class dividing_by_the_first_leaf(sound):
    def update(self, updates, state, params=None, **extra_args):
        size = jnp.abs(jnp.ravel(jax.tree.leaves(updates)[0])[0])
        return jax.tree.map(lambda g: g / size, updates), state


class shape_blind(by_leaf):
    """Does not compare gradients with the parameters."""

    def of_leaf(self, g):
        return 2 * g


class adding(by_leaf):
    def of_leaf(self, g):
        return g + 1


class adding_to_rows(sound):
    """Adds 1 to elements without a gradient too; `lift` trusts that a function keeps zeros."""

    def update(self, updates, state, params=None, **extra_args):
        return extend.lift("adding_to_rows", _plus_1, extend.no_scalars, updates)[0], state


def _plus_1(_, g):
    return (g + 1,)


class by_norm(by_leaf):
    def of_leaf(self, g):
        return g / jnp.sqrt(jnp.sum(jnp.square(g)))


class rows_blind(sound):
    """Calls `jax.tree.map`, which also doubles the indices of row gradients."""

    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g: 2 * g, updates), state


class coasting_too_little(adamjax.scale_by_adam):
    def coast(self):
        return super().coast()._replace(b1=0.5)


class claiming_no_change(sound):
    """Doubles gradients, but its `affine` is that of `identity`."""

    def affine(self, state, params, leaf, real):
        return 1, 0


class holding_a_function(sound):
    function: Any = extend.static(default=None)


class unequal(sound):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class without_repr(sound):
    def __repr__(self):
        return "<a transform>"


class decaying(sound):
    """Adds decay with the wrong sign."""

    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g, p: g - 0.1 * p, updates, params), state


def decay_reference(g, p, step):
    return (g + 0.1 * p,)


def doubled_reference(g, step):
    return (2 * g,)


class Pair(NamedTuple):
    """A pair of functions like optax's, without the fields of the transform."""

    init: Any
    update: Any


class without_factors(adamjax.scale_by_adam):
    """Ignores the factors of a scaling after it."""

    def step(self, grads, state, factors):
        return super().step(grads, state, None)


# For each law a transform that breaks it, and a pattern of the error: the leaf and the numbers.
BROKEN = {
    "is_pure": (mutating(), r"update has changed the state that it was given"),
    "state_keeps_its_form": (
        drifting(),
        r"state\['total'\]\['half'\] is float32\[2\], expected float16\[2\]",
    ),
    "counts_its_steps": (
        standing_count(),
        r"the state's count is \[0, 0, 0, 0, 0, 0, 0\], expected one more in each step",
    ),
    "updates_have_the_gradients_dtype": (
        widening(),
        r"updates\['layer'\]\['bias'\] is float32\[3\], expected bfloat16\[3\]",
    ),
    "strict_promotion": (promoting(), r"TypePromotionError: .*bfloat16"),
    "jit_changes_nothing": (branching(), r"TracerBoolConversionError"),
    "one_trace_and_donation": (holding_params(), r"donate the same buffer twice"),
    "a_later_scaling_scales_its_updates": (
        without_factors(),
        r"updates with scale\(0.5\) after it\['gain'\] is .*, expected",
    ),
    "float64_is_kept": (
        in_float32(),
        r"updates\['gain'\] is float32\[\], expected float64\[\]",
    ),
    "low_precision_updates_are_the_float32_twins_rounded_once": (
        rounding_twice(),
        r"in bfloat16, updates\['.*'\]\[.*\] is -?0\.\d+, expected -?0\.\d+",
    ),
    "vmap_over_weights_is_a_loop": (calling_back(), r"NotImplementedError: .*vmap"),
    "jit_argument": (branching_on_a_hyperparameter(), r"TracerBoolConversionError"),
    "vmap_hyperparameters": (branching_on_a_hyperparameter(), r"TracerBoolConversionError"),
    "a_none_gradient_skips_its_leaf": (
        forgetting_none(),
        r"state\['total'\]\['gain'\] is None, expected float32\[\]",
    ),
    "integers_and_bools_are_left_alone": (
        moving_integers(),
        r"updates\['count'\] is \[1 1\], expected zeros",
    ),
    "mixed_trees_keep_shapes_and_dtypes": (dividing_by_the_largest(), r"ValueError: zero-size"),
    "empty_trees": (dividing_by_the_first_leaf(), r"IndexError"),
    "refuses_gradients_that_do_not_fit": (
        shape_blind(),
        r"grads\['layer/bias'\] that is a scalar is not refused",
    ),
    "refuses_a_state_that_does_not_fit": (
        with_state(),
        r"state\['total'\]\['gain'\] that is replicated is not refused",
    ),
    "zeros_are_kept_where_it_says_so": (
        adding(),
        r"updates\['gain'\] is 1\.0, expected 0\.0",
    ),
    "grouped_is_the_same_where_it_says_so": (
        by_norm(),
        r"updates of grouped\['gain'\] is -?0\.\d+, expected -?1\.0",
    ),
    "row_gradients_mean_their_rows": (rows_blind(), r"computed with the leaves of a row gradient"),
    "exact_rows_is_dense_or_refuses": (
        coasting_too_little(),
        r"params of exact_rows\(.*\), after 6 steps, .*\['layer'\]\['bias'\]\[\d\] is .*expected",
    ),
    "is_data": (Pair(*sound()), r"it is a Pair, expected an adamjax.Transform"),
    "pickles": (holding_a_function(function=lambda x: x), r"[Pp]ickl"),
    "equals": (unequal(), r"it does not equal its copy"),
    "prints": (without_repr(), r"SyntaxError"),
    "follows_the_reference": (
        decaying(),
        r"in float32, at step 1, updates\['gain'\] is -?\d\.\d+, expected -?\d\.\d+",
    ),
}


def broken_laws(tx, reference=None, laws=None):
    """The laws that `check` finds broken, with the message for each."""
    try:
        testing.check(tx, reference, laws)
    except AssertionError as error:
        pieces = re.split(r"(?:^|\n\n).*? breaks the law (\w+) \(", str(error))[1:]
        return dict(zip(pieces[::2], pieces[1::2], strict=True))
    return {}


def test_each_law_has_a_transform_that_breaks_it():
    assert set(BROKEN) == set(testing.LAWS)


def test_a_sound_transform_keeps_every_law():
    assert broken_laws(sound(), doubled_reference) == {}


@pytest.mark.parametrize("law", testing.LAWS)
def test_every_law_can_be_broken(law):
    tx, text = BROKEN[law]
    reference = decay_reference if law == "follows_the_reference" else None
    with pytest.raises(AssertionError) as caught:
        testing.check(tx, reference, [law])
    assert str(caught.value).startswith(f"{tx!r} breaks the law {law} ({testing.LAWS[law]}): ")
    assert re.search(text, str(caught.value)), str(caught.value)


def test_a_transform_that_counts_its_calls_is_not_pure():
    message = broken_laws(counting(), laws=["is_pure"])["is_pure"]
    assert re.search(r"updates of the same arguments\['gain'\] is .*, expected ", message)


def test_a_false_affine_and_a_false_keeps_zero_break_the_law_of_exact_rows():
    """`exact_rows` trusts `affine` after a rule, and `keeps_zero` before it."""
    law = "exact_rows_is_dense_or_refuses"
    for tx in (claiming_no_change(), adding_to_rows()):
        assert "after 6 steps" in broken_laws(tx, laws=[law])[law]


class centered(by_leaf):
    """Subtracts the mean of each column, which keeps zeros only in columns of zeros."""

    def of_leaf(self, g):
        return g - g.mean(axis=0, keepdims=True) if g.ndim > 1 else g


class remembering(with_state):
    """Its updates are the sums of the gradients so far."""

    def update(self, updates, state, params=None, **extra_args):
        _, state = super().update(updates, state)
        return state["total"], state


def test_the_law_of_zeros_tries_zero_elements_rows_and_columns():
    law = "zeros_are_kept_where_it_says_so"
    for tx, index in ((centered(), "[0, 0]"), (remembering(), "[0, 1]")):
        assert f"updates['layer']['kernel']{index} is" in broken_laws(tx, laws=[law])[law]


class refusing(sound):
    """Refuses row gradients with an error."""

    error: Any = extend.static(default=None)

    def update(self, updates, state, params=None, **extra_args):
        if any(is_rows(g) for g in extend.flatten(updates)[0]):
            raise self.error
        return updates, state


def test_only_an_error_about_row_gradients_counts_as_their_refusal():
    law = "row_gradients_mean_their_rows"
    for error in (
        TypeError("refusing: got a row gradient, whose mean is not the table's; use masked"),
        ValueError("row gradients are not supported"),
        NotImplementedError("Row gradients: no."),
        TypeError("refusing() takes no RowGradient"),
    ):
        tx = refusing(error=error)
        testing.check(tx, laws=[law])
        testing.check(adamjax.chain(tx, adamjax.scale(2.0)), laws=[law])
    for error in (
        ValueError("refusing: not supported"),
        TypeError("unsupported operand type(s) for +: 'RowGradient' and 'int'"),
        AttributeError("refusing: a row gradient has no mean"),
    ):
        assert type(error).__name__ in broken_laws(refusing(error=error), laws=[law])[law]
    # The next transform finds the spoilt row gradient; this is no refusal.
    spoilt = adamjax.chain(rows_blind(), adamjax.scale_by_adam())
    assert "has computed with the leaves" in broken_laws(spoilt, laws=[law])[law]


# Transforms, and all laws that each breaks.
FAULTS = {
    adding_to_rows: {
        "refuses_gradients_that_do_not_fit",
        "zeros_are_kept_where_it_says_so",
        "row_gradients_mean_their_rows",
        "exact_rows_is_dense_or_refuses",
    },
    rows_blind: {
        "row_gradients_mean_their_rows",
        "integers_and_bools_are_left_alone",
        "mixed_trees_keep_shapes_and_dtypes",
        "refuses_gradients_that_do_not_fit",
    },
}


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_all_broken_laws_are_named_and_no_others(kind):
    assert set(broken_laws(kind())) == FAULTS[kind]


def test_check_accepts_params_and_laws():
    """A transform with a mask needs parameters whose paths match."""
    tx = adamjax.masked(adamjax.clip_by_norm(0.5), "^encoder/.*kernel$")
    params = {"encoder": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}, "head": jnp.ones(3)}
    with pytest.raises(AssertionError, match=r"breaks the law is_pure .*matches no leaf"):
        testing.check(tx, laws=["is_pure"])
    laws = set(testing.LAWS) - {"exact_rows_is_dense_or_refuses"}
    testing.check(tx, laws=laws, params=params)


def test_check_accepts_a_transform_of_optax():
    testing.check(
        optax.clip(0.5), lambda g, step: (np.clip(g, -0.5, 0.5),), ["follows_the_reference"]
    )


@pytest.mark.parametrize("params", [None, {"a": jnp.ones(3), "b": jnp.ones((2, 2))}])
def test_another_librarys_transform_gets_no_integers(params):
    """It would compute with their gradients, whose dtype is float0."""
    laws = ["integers_and_bools_are_left_alone", "mixed_trees_keep_shapes_and_dtypes"]
    testing.check(optax.clip_by_global_norm(1.0), laws=laws, params=params)


def test_a_coast_that_exact_rows_refuses_breaks_the_law():
    class Mistyped(adamjax.scale_by_adam):
        def coast(self):
            return super().coast()._replace(size="s")

    with pytest.raises(AssertionError, match=r"it has a coast, but is refused: exact_rows: "):
        testing.check(Mistyped(), laws=["exact_rows_is_dense_or_refuses"])


def test_follows_the_reference_needs_a_reference():
    with pytest.raises(ValueError, match=r"needs a reference: check\(tx, reference\)"):
        testing.check(sound(), laws=["follows_the_reference"])


def test_an_error_that_several_laws_share_is_printed_once():
    tx = adamjax.masked(adamjax.clip_by_norm(0.5), "nothing")
    with pytest.raises(AssertionError) as caught:
        testing.check(tx, laws=["is_pure", "pickles", "updates_have_the_gradients_dtype"])
    text = str(caught.value)
    assert text.count("matches no leaf") == 1, text


def test_an_unknown_law_is_refused():
    with pytest.raises(ValueError, match="there is no law 'is_fast'; the laws are"):
        testing.check(sound(), laws=["is_fast"])


def test_a_reference_with_a_wrong_result_is_reported():
    for reference, text in (
        (lambda g, step: g, "the reference returned a ndarray, expected a tuple of the update"),
        (lambda g, step: (g, g), "returned 2 arrays, expected a tuple of the update"),
    ):
        messages = broken_laws(sound(), reference, ["follows_the_reference"])
        assert text in messages["follows_the_reference"]


def test_slots_are_compared_with_the_reference():
    def reference(g, m, v, step):
        return (g, 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2)

    messages = broken_laws(adamjax.scale_by_adam(b2=0.999), reference, ["follows_the_reference"])
    assert "in float32, at step 1, updates['gain']" in messages["follows_the_reference"]

    def wrong_slots(g, m, v, step):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        u = np.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m / (np.sqrt(v / 10) + 1e-7)
        return u, m, v

    messages = broken_laws(adamjax.scale_by_adam(), wrong_slots, ["follows_the_reference"])
    assert re.search(r"at step 1, v\['gain'\] is ", messages["follows_the_reference"])


class skips_first_gradient(sound):
    """Its update is zero for the first nonzero gradient of an element."""

    def init(self, params):
        return StandingState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(self, updates, state, params=None, **extra_args):
        u = jax.tree.map(lambda g, m: jnp.where(m == 0, 0, g), updates, state.m)
        m = jax.tree.map(lambda g, m: m + g * g, updates, state.m)
        return u, StandingState(state.count + 1, m)


def test_the_reference_gets_elements_whose_first_gradient_comes_after_step_1():
    def by_slot(g, m, step):
        return np.where(m == 0, 0, g), m + g * g

    def by_count(g, m, step):
        return np.where(step == 1, 0, g), m + g * g

    testing.check(skips_first_gradient(), by_slot, ["follows_the_reference"])
    messages = broken_laws(skips_first_gradient(), by_count, ["follows_the_reference"])
    assert "in float32, at step 3, updates[" in messages["follows_the_reference"]


def test_every_law_has_a_sentence():
    for name, sentence in testing.LAWS.items():
        assert re.fullmatch(r"[A-Z].*\.", sentence), name


class norm_of_rows(extend.Stateless):
    """Wrong if rows that were not read have updates too, as after a rule."""

    def update(self, updates, state, params=None, **extra_args):
        (u,) = extend.lift("norm_of_rows", to_norm_1, extend.no_scalars, updates, like=params)
        return u, state


def to_norm_1(_, g):
    wide = extend.widen(g, extend.compute_dtype(g.dtype))
    return ((wide / adamjax.global_norm(wide)).astype(g.dtype),)


def test_row_gradients_with_values_in_all_rows_are_tried():
    tx = norm_of_rows()
    with pytest.raises(AssertionError, match="row_gradients_mean_their_rows"):
        testing.check(tx, laws=["row_gradients_mean_their_rows"])


def test_expect_same_bits_tells_minus_0_from_0():
    expect_same_bits("u", {"w": np.array([0.0, np.nan])}, {"w": np.array([0.0, np.nan])})
    with pytest.raises(AssertionError, match=r"u\['w'\]\[1\] is -0.0, expected 0.0"):
        expect_same_bits("u", {"w": np.array([1.0, -0.0])}, {"w": np.array([1.0, 0.0])})
    with pytest.raises(AssertionError, match=r"u is -0.0, expected 0.0"):
        expect_same_bits("u", np.float32(-0.0), np.float32(0.0))
