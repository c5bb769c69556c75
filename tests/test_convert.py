"""Conversions from and to every other library: what all convert, and what all refuse."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conversions import (
    ADAM,
    KERAS_PARAMS,
    KERAS_RULE,
    NAMED_VARIABLES,
    OPTAX_ADAM,
    PARAMS,
    RATE,
    TWO_LEAVES,
    adam_like_optax,
    conversion_calls,
    keras_optimizer,
    keras_variables,
    keras_variables_named,
    new_params,
    numbered_keras,
    numbered_torch,
    optax_state,
    plain_torch_dict,
    torch_after_a_step,
    torch_state_dict,
    torch_with_moments,
)
from support import assert_same

import adamjax
from adamjax import convert
from adamjax.data import transform_state
from adamjax.transform import Rule, Transform

# --- what is converted ----------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_convert_imports_no_other_library():
    import subprocess
    import sys

    code = (
        "import sys, adamjax, adamjax.convert;"
        "print([m for m in ('optax', 'keras', 'torch', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_converted_arrays_are_copies():
    theirs, ours = optax.adam(RATE), adamjax.adam(RATE, eps=1e-8)
    params = new_params(np.float32)
    state = theirs.init(params)
    converted = convert.from_optax(state, ours, params, theirs)
    jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0)(converted)
    assert float(jnp.sum(state[0].mu["embed"]["table"])) == 0


def test_integer_leaves_and_none_are_left_alone(x64):
    params = {"n": jnp.array(3), "none": None, "w": jnp.ones(2)}
    theirs, ours = optax.adam(RATE), adamjax.adam(RATE, eps=1e-8)
    state = (theirs.init(params)[0]._replace(count=jnp.array(4)), optax.EmptyState())
    converted = convert.from_optax(state, ours, params, theirs)
    assert adamjax.get_slot(converted, "m")["n"] is None
    back = convert.to_optax(converted, ours, params, theirs)
    assert int(back[0].count) == 4


def test_check_false_converts_what_is_otherwise_refused():
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = convert.from_optax(optax_state(), adamjax.adam(RATE), params, check=False)
    assert int(adamjax.step_count(state)) == 1
    state = convert.from_optax(
        optax_state(tx=optax.amsgrad(RATE)), adamjax.amsgrad(RATE), params, check=False
    )
    assert adamjax.slot_names(state) == ("m", "v", "v_max")


def test_the_inner_state_of_master_weights_is_converted_with_the_float32_weights():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    tx, new = adamjax.master_weights(ADAM), OPTAX_ADAM.init(jax.tree.map(jnp.asarray, PARAMS))
    state = tx.init(params)
    for call in (
        lambda: convert.from_optax(new, tx, params, OPTAX_ADAM),
        lambda: convert.to_optax(state, tx, params, OPTAX_ADAM),
    ):
        with pytest.raises(ValueError, match="Convert the inner state with the float32 weights"):
            call()
    assert_same(convert.to_optax(state.inner, tx.tx, state.weights, OPTAX_ADAM), new)
    assert_same(convert.from_optax(new, tx.tx, state.weights, OPTAX_ADAM), state.inner)


def test_an_average_is_not_dropped():
    tx = adamjax.chain(adam_like_optax(), adamjax.weight_ema(0.5, overwrite_frequency=3))
    state = tx.init(TWO_LEAVES)
    message = r"sets the weights to their average, and the other system has no average"
    with pytest.raises(ValueError, match=f"to_optax: .*{message}"):
        convert.to_optax(state, tx, TWO_LEAVES, optax.adam(0.1))
    group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    group |= {"weight_decay": 0, "amsgrad": False}
    kept = {"state": {}, "param_groups": [group]}
    with pytest.raises(ValueError, match=f"to_torch: .*{message}"):
        convert.to_torch(tx.init(TWO_LEAVES["a"]), tx, TWO_LEAVES["a"], kept)
    tx = adamjax.chain(adam_like_optax(), adamjax.weight_ema(0.5))
    with pytest.raises(ValueError, match=r"to_torch: the state has an average of the weights"):
        convert.to_torch(tx.init(TWO_LEAVES["a"]), tx, TWO_LEAVES["a"], kept)
    convert.to_torch(tx.init(TWO_LEAVES["a"]), tx, TWO_LEAVES["a"], kept, check=False)


# --- arguments ------------------------------------------------------------------------------------


class TensorOfTensorflow:
    dtype, shape = "tf.float32", (2,)

    def numpy(self):
        raise AssertionError("this must not be called")


@pytest.mark.parametrize("kind", ["torch", "tensorflow", "text"])
def test_parameters_that_are_no_arrays_are_refused(kind):
    params = jax.tree.map(jnp.asarray, PARAMS)
    leaf, fix = {
        "torch": (lambda: pytest.importorskip("torch").ones(2), r"asarray\(x.detach"),
        "tensorflow": (TensorOfTensorflow, r"asarray\(x.numpy"),
        "text": (lambda: "text", "give only the arrays of a model"),
    }[kind]
    passed_params = {**params, "a": leaf()}
    for conversion, call in conversion_calls(ADAM, params, passed_params).items():
        message = f"{conversion}: the leaf 'a' is a .*, expected an array of JAX or NumPy: .*{fix}"
        with pytest.raises(TypeError, match=message):
            call()


def test_two_leaves_with_one_path_are_refused():
    params = {"a/b": jnp.ones(2), "a": {"b": 2 * jnp.ones(2)}}
    old = optax.adam(0.1)
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        convert.from_optax(old.init(params), adamjax.adam(0.1, eps=1e-8), params, old)


@pytest.mark.parametrize("rtol", [-1.0, float("nan"), "1"])
def test_an_invalid_rtol_is_refused(rtol):
    params = jax.tree.map(jnp.asarray, PARAMS)
    theirs = optax.amsgrad(RATE)
    state = optax_state(tx=theirs)
    with pytest.raises(ValueError, match=f"rtol is {rtol!r}"):
        convert.from_optax(state, adamjax.amsgrad(RATE, eps=1e-8), params, theirs, rtol=rtol)


INVALID_ORDERS = [
    *(3, "w", b"w", {"w": 0}, object(), {"w", "z"}, frozenset("wz"), iter("wz")),
    (jnp.zeros(2), jnp.zeros(2)),
]


@pytest.mark.parametrize("order", INVALID_ORDERS, ids=lambda order: type(order).__name__)
def test_an_invalid_order_is_refused(order):
    tx, params = adamjax.adam(0.1, eps=1e-8), {"w": jnp.zeros(2), "z": jnp.zeros(2)}
    with pytest.raises(
        TypeError, match=r"from_torch: order (is|has) .*expected (a list of )?paths"
    ):
        convert.from_torch(plain_torch_dict(), tx, params, order=order)
    with pytest.raises(
        TypeError, match=r"from_keras: order (is|has) .*expected (a list of )?paths"
    ):
        convert.from_keras([np.array(1)], adamjax.adam(0.1), params, order=order)


def test_any_ordered_collection_of_paths_is_an_order():
    tx, params = adamjax.adam(0.1, eps=1e-8), {"w": jnp.zeros(2), "z": jnp.zeros(2)}
    order = ["w", "z"]
    expected = convert.from_torch(plain_torch_dict(), tx, params, order=order)
    for given in (tuple(order), np.array(order), params.keys(), {0: "w", 1: "z"}.values()):
        assert_same(convert.from_torch(plain_torch_dict(), tx, params, order=given), expected)


def test_from_keras_refuses_a_state_dict_of_torch():
    state_dict = {"state": {}, "param_groups": []}
    with pytest.raises(TypeError, match=r"got a state dict of torch.*from_torch converts it"):
        convert.from_keras(state_dict, adamjax.adam(0.1), {"w": jnp.zeros(2)})


@pytest.mark.parametrize("shape", [(2, 5), (3, 2, 5), (3, 4, 2, 5), (3, 4, 6, 2, 5)], ids=str)
def test_the_adapts_that_errors_recommend_are_inverses(shape):
    """Those of to_torch and from_torch, and of from_keras and to_keras, for kernels of any rank."""
    tx, (*window, n_in, n_out) = adamjax.adam(0.1, eps=1e-8), shape
    params = {"kernel": jnp.ones(shape)}
    target = torch_after_a_step((n_out, n_in, *window))
    weights, adam = {"weight": jnp.ones((n_out, n_in, *window))}, adamjax.adam(RATE)
    variables, recommended = numbered_keras([shape]), {}
    for name, call in {
        "from_torch": lambda adapt: convert.from_torch(target, tx, params, adapt=adapt),
        "to_torch": lambda adapt: convert.to_torch(
            tx.init(params), tx, params, target, adapt=adapt
        ),
        "from_keras": lambda adapt: convert.from_keras(variables, adam, weights, adapt=adapt),
        "to_keras": lambda adapt: convert.to_keras(
            adam.init(weights), adam, weights, variables, adapt=adapt
        ),
    }.items():
        with pytest.raises(TypeError, match=f"{name}: adapt is 3 ") as caught:
            call(3)
        text = str(caught.value)
        recommended[name] = eval(text[text.index("lambda") :])  # the code in adamjax' own error
        call(recommended[name])
    x = np.arange(np.prod(shape)).reshape(shape)
    for transpose, inverse, leaf in (
        ("to_torch", "from_torch", "kernel"),
        ("from_keras", "to_keras", "weight"),
    ):
        again = recommended[inverse](leaf, recommended[transpose](leaf, x))
        np.testing.assert_array_equal(again, x)


# --- the order of parameters without names --------------------------------------------------------


@pytest.mark.parametrize("system", ["keras", "torch"])
def test_parameters_without_names_need_an_order_if_leaves_have_one_shape(system):
    """A Keras or torch layer has gamma before beta, but JAX sorts the keys of a dictionary."""
    read, numbered, tx = {
        "keras": (convert.from_keras, numbered_keras, adamjax.adam(RATE, eps_hat=1e-7)),
        "torch": (convert.from_torch, numbered_torch, adamjax.adam(RATE, eps=1e-7)),
    }[system]
    params = {"norm": {"gamma": jnp.ones(2), "beta": jnp.ones(2)}}
    variables = numbered([(2,), (2,)])
    with pytest.raises(
        ValueError, match=r"'norm/beta', 'norm/gamma'\] have one shape.*give order="
    ):
        read(variables, tx, params)
    state = read(variables, tx, params, order=["norm/gamma", "norm/beta"])
    assert adamjax.get_slot(state, "m")["norm"]["gamma"][0] == 1
    # Leaves of a list are matched in their order, and with check=False those of any tree.
    state = read(variables, tx, [jnp.ones(2), jnp.ones(2)])
    assert adamjax.get_slot(state, "m")[1][0] == 2
    state = read(variables, tx, params, check=False)
    assert adamjax.get_slot(state, "m")["norm"]["beta"][0] == 1
    # Leaves of different shapes need no order=, because the shapes refuse a wrong order.
    different = {"beta": jnp.ones(2), "gamma": jnp.ones(3)}
    assert adamjax.get_slot(read(numbered([(2,), (3,)]), tx, different), "m")["gamma"][0] == 2
    with pytest.raises(ValueError, match="order"):
        read(numbered([(3,), (2,)]), tx, different)


def test_leaves_that_are_transposes_of_each_other_need_an_order():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    shapes = [x.shape for x in params.values()]
    for read, old, tx in (
        (convert.from_keras, numbered_keras(shapes), adamjax.adam(RATE, eps_hat=1e-7)),
        (convert.from_torch, numbered_torch(shapes), adamjax.adam(RATE, eps=1e-7)),
    ):
        with pytest.raises(ValueError, match=r"one shape, but for the order of dim.*give order="):
            read(old, tx, params)
        read(old, tx, params, order=["a", "b"])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("form", ["keras", "keras, arrays", "torch"])
def test_keys_that_are_numbers_are_ordered_as_numbers(form, check):
    """save_own_variables writes such keys. Sorted as text, "10" would come before "2"."""
    shapes = [(2,)] * 12
    if form == "torch":
        read, write, tx = convert.from_torch, convert.to_torch, adamjax.adam(RATE, eps=1e-7)
        variables: Any = numbered_torch(shapes)
    else:
        read, write, tx = convert.from_keras, convert.to_keras, adamjax.adam(RATE, eps_hat=1e-7)
        variables = numbered_keras(shapes)
        variables = list(variables.values()) if "arrays" in form else variables
    params = {str(i): jnp.ones(2) for i in range(12)}
    nested = [{"1": jnp.ones(2)}, {str(i): jnp.ones(2) for i in range(11)}]
    for tree in (params, nested):
        state = read(variables, tx, tree, check=check)
        m = jax.tree.map(lambda x: float(x[0]), adamjax.get_slot(state, "m"))
        if tree is nested:
            assert m == [{"1": 1.0}, {str(i): i + 2.0 for i in range(11)}]
        else:
            assert m == {str(i): i + 1.0 for i in range(12)}
        written = write(state, tx, tree, variables, check=check)
        if form == "torch":
            written = {i: own["exp_avg"][0] for i, own in written["state"].items()}
            assert written == {i: i + 1.0 for i in range(12)}
        else:
            assert_same(written, variables)


# --- rules and transforms that conversions do not know --------------------------------------------


class HeavyBallState(NamedTuple):
    m: Any


class HeavyBallWithAdamState(NamedTuple):
    m: Any
    inner: Any


transform_state("m")(HeavyBallState)
transform_state("m")(HeavyBallWithAdamState)


class heavy_ball(Rule):
    """A user-defined rule."""

    def init(self, params):
        return HeavyBallState(jax.tree.map(jnp.zeros_like, params))

    def step(self, grads, state, factors):
        return grads, state


class heavy_ball_with_adam(heavy_ball):
    """A user-defined rule whose state contains a state of Adam."""

    def init(self, params):
        return HeavyBallWithAdamState(super().init(params).m, adamjax.scale_by_adam().init(params))


class other_use_of_adam_state(heavy_ball):
    """A user-defined rule with the class of Adam's state."""

    def init(self, params):
        return adamjax.scale_by_adam().init(params)


class sign(heavy_ball):
    """A user-defined rule without slots."""

    def init(self, params):
        return ()


@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (adamjax.chain(heavy_ball(), adamjax.scale_by_learning_rate(RATE)), "heavy_ball"),
        *(
            (adamjax.chain(rule(), ADAM), rule.__name__)
            for rule in (heavy_ball_with_adam, other_use_of_adam_state, sign)
        ),
        (optax.chain(ADAM, heavy_ball()), "the rule of a HeavyBallState"),
        (optax.chain(ADAM, heavy_ball_with_adam()), "the rule of a HeavyBallWithAdamState"),
    ],
)
def test_a_user_defined_rule_is_refused(tx, name):
    params = jax.tree.map(jnp.asarray, PARAMS)
    for conversion, call in conversion_calls(tx, params).items():
        expected = f"{conversion}: tx contains {name}, and conversions know the rules scale_by_adam"
        with pytest.raises(ValueError, match=expected):
            call()


OPTIMIZERS = {
    "amsgrad": adamjax.amsgrad,
    "adamax": adamjax.adamax,
    "nadam": adamjax.nadam,
    "adam": adamjax.adam,
    "optax": optax.adam,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_another_rule_than_that_of_tx_is_refused(name):
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = adamjax.nadam(RATE) if name == "adam" else ADAM
    state = OPTIMIZERS[name](RATE).init(params)
    theirs = r"optax.*ScaleByAdamState" if name == "optax" else rf"ScaleBy\w+ of {name}"
    ours = "nadam" if name == "adam" else "adam"
    wanted = rf"the state has a {theirs} where tx has scale_by_adam.*expected a \w+ of {ours}: pass"
    keras, torch = keras_variables(), {**torch_state_dict(), "state": {}}
    for call in (
        lambda: convert.to_optax(state, tx, params, OPTAX_ADAM),
        lambda: convert.to_keras(state, tx, params, keras),
        lambda: convert.to_torch(state, tx, params, torch, order=sorted(params)),
    ):
        with pytest.raises(ValueError, match=wanted):
            call()


def test_options_and_names_also_show_the_rule_of_a_state():
    """torch's option amsgrad without max_exp_avg_sq, and Keras' name nadam with slots of adam."""
    params, old = jax.tree.map(jnp.asarray, PARAMS), torch_state_dict({"amsgrad": True})
    for tx, message in [
        (ADAM, "and says that they are those of amsgrad; for adam, expected a state that says"),
        (
            adamjax.amsgrad(RATE, eps=1e-8),
            r"of 'a', .*; for amsgrad, expected .*'max_exp_avg_sq'\]: was amsgrad switched on",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            convert.from_torch(old, tx, params)
    with pytest.raises(ValueError, match="says that they are those of nadam; for adam, expec"):
        convert.from_keras(keras_variables_named(["a"], "nadam"), adamjax.adam(RATE), jnp.zeros(2))


class LookAheadState(NamedTuple):
    slow: Any
    inner: Any


transform_state("slow", rule=False)(LookAheadState)


class look_ahead(Transform):
    """A user-defined wrapper with a slot."""

    tx: Transform

    def init(self, params):
        return LookAheadState(params, self.tx.init(params))

    def part_states(self, state):
        return (state.inner,)


def test_the_slots_of_a_user_defined_wrapper_are_not_dropped():
    params, tx = jax.tree.map(jnp.asarray, PARAMS), look_ahead(ADAM)
    state, new = tx.init(params), OPTAX_ADAM.init(params)
    with pytest.raises(ValueError, match="to_optax: the state keeps slow in a LookAheadState, and"):
        convert.to_optax(state, tx, params, OPTAX_ADAM)
    assert_same(convert.to_optax(state, tx, params, OPTAX_ADAM, check=False), new)
    assert_same(convert.to_optax(state.inner, tx.tx, params, OPTAX_ADAM), new)
    assert_same(convert.from_optax(new, tx, params, check=False), state)


@pytest.mark.parametrize("system", ["torch", "keras"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_transforms_of_other_libraries_beside_the_rule_are_refused(system, place, keras):
    rule = adamjax.scale_by_adam(eps=1e-8) if system == "torch" else KERAS_RULE
    decay, rate = optax.add_decayed_weights(0.5), adamjax.scale_by_learning_rate(0.1)
    parts = (decay, rule, rate) if place == "before" else (rule, decay, rate)
    tx = adamjax.chain(*parts)
    calls = {
        "torch": lambda: convert.from_torch(
            torch_with_moments([np.ones(3, "f")]), tx, jnp.zeros(3)
        ),
        "keras": lambda: convert.from_keras(keras_optimizer(keras), tx, KERAS_PARAMS),
    }
    with pytest.raises(ValueError, match=r"of another library, which nothing can compare"):
        calls[system]()


class Halves(Transform):
    """A user-defined transform."""

    def init(self, params):
        return ()

    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda u: 0.5 * u, updates), state


class HalvesOf(Transform):
    """A user-defined wrapper."""

    tx: Any

    def init(self, params):
        return self.tx.init(params)

    def update(self, updates, state, params=None, **extra_args):
        updates, state = self.tx.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda u: 0.5 * u, updates), state


FOR_NO_LEAF = adamjax.masked(adamjax.scale(1.0), adamjax.optional("^z"))


def test_user_defined_transforms_beside_a_rule_are_refused():
    message = r"Halves.* of your own, which nothing can compare"
    for make in (
        lambda adam: adamjax.chain(adam, Halves()),
        HalvesOf,
        lambda adam: adamjax.chain(adam, HalvesOf(adamjax.scale(1.0))),
        lambda adam: adamjax.chain(adam, HalvesOf(FOR_NO_LEAF)),
    ):
        with pytest.raises(ValueError, match=message):
            convert.from_torch(
                torch_with_moments([np.ones(3, "f")]), make(adam_like_optax()), jnp.zeros(3)
            )
        with pytest.raises(ValueError, match=message):
            convert.from_keras(NAMED_VARIABLES, make(adamjax.adam(0.1)), {"w": jnp.zeros(2)})
    # Variables of Keras do not show what the optimizer does to gradients before its rule.
    tx = adamjax.chain(HalvesOf(adamjax.scale(1.0)), adamjax.adam(0.1))
    convert.from_keras(NAMED_VARIABLES, tx, {"w": jnp.zeros(2)})


# --- rates, decays and frozen leaves --------------------------------------------------------------


@pytest.mark.parametrize("system", ["torch", "keras"])
def test_gradients_negated_or_zeroed_before_the_rule_are_refused(system):
    adam = adam_like_optax() if system == "torch" else adamjax.adam(0.1)
    before = adamjax.chain(adamjax.scale(-1.0), adam)
    convert_to = {
        "torch": lambda tx: convert.from_torch(
            torch_with_moments([np.ones(3, "f")]), tx, jnp.zeros(3)
        ),
        "keras": lambda tx: convert.from_keras(NAMED_VARIABLES, tx, {"w": jnp.zeros(2)}),
    }[system]
    with pytest.raises(ValueError, match=r"has gradients as they are, tx has .*before the rule"):
        convert_to(before)
    for zero in (adamjax.set_to_zero(), adamjax.scale(0.0)):
        with pytest.raises(ValueError, match=r"as they are, tx has s.* before the rule: leave it"):
            convert_to(adamjax.chain(zero, adam))
    if system == "torch":  # only maximize=True negates the gradients
        old = torch_with_moments([np.ones(3, "f")], maximize=True)
        convert.from_torch(old, before, jnp.zeros(3))


@pytest.mark.parametrize("system", ["torch", "keras"])
def test_a_tx_without_a_rate_for_every_leaf_is_refused(system):
    params = {"w": jnp.zeros(2), "z": jnp.zeros(3)}
    arrays = [np.ones(2, "f"), np.ones(3, "f")]
    rule = adamjax.scale_by_adam(eps=1e-8) if system == "torch" else adamjax.scale_by_adam()
    rate = adamjax.scale_by_learning_rate(0.1)
    variables = [
        *NAMED_VARIABLES,
        ("adam/z_momentum", np.full(3, 0.5)),
        ("adam/z_velocity", np.ones(3)),
    ]
    call = {
        "torch": lambda tx: convert.from_torch(torch_with_moments(arrays), tx, params),
        "keras": lambda tx: convert.from_keras(variables, tx, params),
    }[system]
    call(adamjax.chain(rule, rate))
    with pytest.raises(
        ValueError, match=r"'w': .*, tx has none for any: put scale_by_learning_rat"
    ):
        call(rule)
    for tx in (
        adamjax.partition([("w", adamjax.chain(rule, rate))], default=rule),
        adamjax.chain(rule, adamjax.masked(rate, "w")),
    ):
        with pytest.raises(
            ValueError, match=r"'z': .* a learning rate for all leaves, tx has none"
        ):
            call(tx)


@pytest.mark.parametrize("system", ["optax", "torch"])
def test_hyperparameters_of_several_runs_are_refused(system):
    two = jnp.array([0.1, 0.2])
    params = jnp.zeros(3)
    if system == "torch":
        convert_to = functools.partial(convert.from_torch, torch_with_moments([np.ones(3, "f")]))
    else:
        adam = optax.adam(0.1)
        convert_to = functools.partial(convert.from_optax, adam.init(params), optimizer=adam)
    for tx, name in (
        (adamjax.adamw(0.1, eps=1e-8, weight_decay=two), "weight_decay"),
        (adamjax.adam(two, eps=1e-8), "learning_rate"),
        (adamjax.chain(adamjax.clip_by_norm(two), adam_like_optax()), "max_norm"),
    ):
        message = rf"{name} of tx is an array of shape \(2,\), expected a scalar"
        with pytest.raises(ValueError, match=message):
            convert_to(tx=tx, params=params)


def test_a_decay_of_tx_that_follows_a_schedule_is_refused(keras):
    ends, rate = adamjax.piecewise_constant([20], [0.3, 0.0]), adamjax.scale_by_learning_rate(0.1)
    message = r"the same weight decay in each step, 0.3, tx has .*put add_decayed_weights\(0.3\)"

    def chain(rule, decay):
        return adamjax.chain(rule, adamjax.add_decayed_weights(decay), rate)

    optimizer = keras_optimizer(keras, cls="AdamW", weight_decay=0.3)
    options = {"weight_decay": 0.3, "decoupled_weight_decay": True}
    for read, old, rule, params in (
        (convert.from_keras, optimizer, KERAS_RULE, KERAS_PARAMS),
        (
            convert.from_torch,
            torch_with_moments([np.ones(3, "f")], **options),
            adamjax.scale_by_adam(eps=1e-8),
            jnp.zeros(3),
        ),
    ):
        read(old, chain(rule, adamjax.constant(0.3)), params)
        with pytest.raises(ValueError, match=message):
            read(old, chain(rule, ends), params)
    old = torch_with_moments([np.ones(3, "f")], weight_decay=0.3)
    tx = adamjax.chain(adamjax.add_decayed_weights(ends), adam_like_optax())
    with pytest.raises(ValueError, match=message):
        convert.from_torch(old, tx, jnp.zeros(3))


@pytest.mark.parametrize("system", ["torch", "keras"])
def test_leaves_that_the_other_optimizer_does_not_have_must_not_move(system):
    params = {"base": jnp.ones(2), "w": jnp.zeros(2)}
    rule = adamjax.scale_by_adam(**({"eps": 1e-8} if system == "torch" else {"eps_hat": 1e-7}))
    rate, zero = adamjax.scale_by_learning_rate(0.1), adamjax.set_to_zero()
    frozen = adamjax.partition([("base", zero)], default=rule)
    state_dict = torch_with_moments(
        [np.ones(2, "f")], weight_decay=0.3, decoupled_weight_decay=True
    )
    variables = [("adamw" + name[4:], x) for name, x in NAMED_VARIABLES]

    def convert_to(tx):
        if system == "torch":
            return convert.from_torch(state_dict, tx, params, order=["w"])
        return convert.from_keras(variables, tx, params, order=["w"])

    decay = adamjax.add_decayed_weights(0.3)
    whole = adamjax.chain(rule, decay, rate)
    convert_to(adamjax.partition([("base", zero)], default=whole))
    convert_to(adamjax.chain(frozen, adamjax.add_decayed_weights(0.3, "w"), rate))
    masked = adamjax.masked(whole, "w")
    for tx, message in (
        (adamjax.chain(frozen, decay, rate), "which moves it"),
        (
            adamjax.chain(adamjax.masked(rule, "w"), adamjax.add_decayed_weights(0.3, "w"), rate),
            "which moves it",
        ),
        (masked, "no rule for it, so its update is its gradient"),
        (adamjax.chain(adamjax.clip_by_norm(1.0), masked), "so its update is its gradient"),
    ):
        with pytest.raises(
            ValueError, match=f"'base': .* an optimizer without this leaf, tx has .*{message}"
        ):
            convert_to(tx)
