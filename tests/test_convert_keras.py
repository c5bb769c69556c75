"""Conversions from Keras and to it: optimizers, variables, schedules."""

import functools
import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conversions import (
    HALVING,
    KERAS_PARAMS,
    KERAS_RULE,
    NAMED_VARIABLES,
    PARAMS,
    PATHS,
    RATE,
    STEPS_BEFORE,
    gradient,
    keras_optimizer,
    keras_variables,
    keras_variables_named,
    new_noises,
    new_params,
    numbered_keras,
    run_adamjax,
    run_exact_rows,
    zero_other_rows,
)
from support import assert_close, assert_same

import adamjax
from adamjax import convert

# --- runs that change their optimizer -------------------------------------------------------------


# For each case, functions that make an optimizer of Keras and the transform of adamjax.
KERAS_AND_ADAMJAX = {
    "adam": (lambda k: k.Adam(RATE), lambda: adamjax.adam(RATE)),
    "adam, an epsilon that matters": (
        lambda k: k.Adam(RATE, beta_1=0.8, epsilon=1e-2),
        lambda: adamjax.adam(RATE, 0.8, eps_hat=1e-2),
    ),
    "amsgrad": (lambda k: k.Adam(RATE, amsgrad=True), lambda: adamjax.amsgrad(RATE)),
    "adamw": (
        lambda k: k.AdamW(RATE, weight_decay=0.125),
        lambda: adamjax.adamw(RATE, weight_decay=0.125),
    ),
    "adamax": (lambda k: k.Adamax(RATE), lambda: adamjax.adamax(RATE)),
    "nadam": (lambda k: k.Nadam(RATE), lambda: adamjax.nadam(RATE)),
    "schedule, clip": (
        lambda k: k.Adam(k.schedules.InverseTimeDecay(RATE, 1, 0.125), global_clipnorm=1.0),
        lambda: adamjax.chain(
            adamjax.clip_by_global_norm(1.0),
            adamjax.adam(adamjax.inverse_time_decay(RATE, 1, 0.125)),
        ),
    ),
    "amsgrad, average": (
        lambda k: k.Adam(RATE, amsgrad=True, use_ema=True, ema_momentum=0.75),
        lambda: adamjax.chain(adamjax.amsgrad(RATE), adamjax.weight_ema(0.75)),
    ),
    "average that overwrites": (
        lambda k: k.Adam(RATE, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=7),
        lambda: adamjax.chain(adamjax.adam(RATE), adamjax.weight_ema(0.75, 7)),
    ),
    "accumulation": (
        lambda k: k.Adam(RATE, gradient_accumulation_steps=4),
        lambda: adamjax.accumulate_gradients(adamjax.adam(RATE), 4),
    ),
    "accumulation, average": (
        lambda k: k.Adam(RATE, gradient_accumulation_steps=4, use_ema=True, ema_momentum=0.75),
        lambda: adamjax.chain(
            adamjax.accumulate_gradients(adamjax.adam(RATE), 4), adamjax.weight_ema(0.75)
        ),
    ),
    "accumulation, average that overwrites": (
        lambda k: k.Adam(
            RATE,
            gradient_accumulation_steps=4,
            use_ema=True,
            ema_momentum=0.75,
            ema_overwrite_frequency=1,
        ),
        lambda: adamjax.chain(
            adamjax.accumulate_gradients(adamjax.adam(RATE), 4), adamjax.weight_ema(0.75, 1)
        ),
    ),
    "accumulation, a schedule of calls": (
        lambda k: k.Adam(
            k.schedules.InverseTimeDecay(RATE, 1, 0.125), gradient_accumulation_steps=4
        ),
        lambda: adamjax.chain(
            adamjax.accumulate_gradients(adamjax.scale_by_adam(), 4),
            adamjax.scale_by_learning_rate(adamjax.inverse_time_decay(RATE, 1, 0.125)),
        ),
    ),
}


class KerasRun:
    """A Keras optimizer and the model variables that it trains."""

    def __init__(self, keras, make, params):
        self.optimizer = make(keras.optimizers)
        self.treedef = jax.tree.structure(params)
        self.variables = [
            keras.Variable(np.asarray(p), dtype=p.dtype.name, name=path.replace("/", "_"))
            for p, path in zip(jax.tree.leaves(params), PATHS, strict=True)
        ]
        self.optimizer.build(self.variables)
        self.step = jax.jit(self._step)

    def _step(self, values, params, noise):
        grads = jax.tree.map(gradient, self.treedef.unflatten(params), noise)
        return self.optimizer.stateless_apply(values, jax.tree.leaves(grads), params)

    @property
    def params(self):
        return self.treedef.unflatten([jnp.asarray(v.value) for v in self.variables])

    def run(self, noises):
        values = [v.value for v in self.optimizer.variables]
        params, trajectory = [v.value for v in self.variables], []
        for n in noises:
            params, values = self.step(values, params, n)
            trajectory.append(self.treedef.unflatten(params))
        self.load(self.treedef.unflatten(params), values)
        return trajectory

    def load(self, params, values):
        variables = [*self.variables, *self.optimizer.variables]
        for variable, value in zip(variables, [*jax.tree.leaves(params), *values], strict=True):
            variable.assign(value)

    @property
    def average(self):
        averages = [v.value for v in self.optimizer.variables if v.path.endswith("_average")]
        return self.treedef.unflatten(averages) if averages else None


@pytest.mark.parametrize("name", KERAS_AND_ADAMJAX)
def test_runs_continue_from_keras_and_in_keras(name, keras, x64):
    make, make_ours = KERAS_AND_ADAMJAX[name]
    ours, noises, params = make_ours(), new_noises(), new_params()
    theirs = KerasRun(keras, make, params)
    theirs.run(noises[:STEPS_BEFORE])
    middle = theirs.params
    state = convert.from_keras(theirs.optimizer.variables, ours, middle)
    expected = theirs.run(noises[STEPS_BEFORE:])
    actual, state = run_adamjax(ours, middle, state, noises[STEPS_BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    if theirs.average is not None:
        assert_close(adamjax.averaged_weights(state), theirs.average, rtol=1e-12)

    (*_, middle), state = run_adamjax(ours, params, ours.init(params), noises[:STEPS_BEFORE])
    expected, after = run_adamjax(ours, middle, state, noises[STEPS_BEFORE:])
    # `load` replaces all that the run above has left in the optimizer.
    theirs.load(middle, convert.to_keras(state, ours, middle, theirs.optimizer.variables))
    actual = theirs.run(noises[STEPS_BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    if theirs.average is not None:
        assert_close(theirs.average, adamjax.averaged_weights(after), rtol=1e-12)


@pytest.mark.slow
def test_a_run_of_keras_continues_in_exact_rows(keras, x64):
    noises = new_noises()
    ours = adamjax.exact_rows(
        adamjax.chain(adamjax.adam(RATE), adamjax.weight_ema(0.75)), "^embed", history=2048
    )
    theirs = KerasRun(keras, lambda k: k.Adam(RATE, use_ema=True, ema_momentum=0.75), new_params())
    theirs.run(noises[:STEPS_BEFORE])
    middle = theirs.params
    state = convert.from_keras(theirs.optimizer.variables, ours, middle)
    for step, n in enumerate(noises[STEPS_BEFORE:]):
        grads = zero_other_rows(jax.tree.map(gradient, theirs.params, n), step)
        theirs.optimizer.apply(jax.tree.leaves(grads))
    actual, state = run_exact_rows(ours, middle, state, noises[STEPS_BEFORE:])
    assert_close(actual, theirs.params, rtol=1e-8)
    assert_close(adamjax.averaged_weights(state), theirs.average, rtol=1e-8)
    values = convert.to_keras(state, ours, actual, theirs.optimizer.variables)
    for variable, value in zip(theirs.optimizer.variables, values, strict=True):
        assert_close(value, np.asarray(variable.value), rtol=1e-8)


# --- forms of variables ---------------------------------------------------------------------------


# Roles of variables in Keras 3 and in tf_keras.
TF_KERAS_SLOTS = {
    "momentum": "m",
    "velocity": "v",
    "velocity_hat": "vhat",
    "norm": "u",
    "average": "average",
}


def tf_keras_name(path):
    """tf_keras' name of the variable that has this path in Keras 3."""
    for role, tf_role in TF_KERAS_SLOTS.items():
        if path.endswith(f"_{role}"):
            optimizer, leaf = path.removesuffix(f"_{role}").split("/")
            return f"{optimizer}/{tf_role}/{leaf}/kernel:0"
    return path.split("/")[-1] + ":0"


def legacy_name(path):
    """Its name before TensorFlow 2.11."""
    name = tf_keras_name(path)
    optimizer, *rest = name.removesuffix(":0").split("/")
    if not rest:
        return f"Adam/{'iter' if optimizer == 'iteration' else optimizer}:0"
    slot, *leaf = rest
    prefix = "Adamax" if optimizer.startswith("adamax") else "Adam"
    return "/".join([prefix, *leaf, "v" if slot == "u" else slot]) + ":0"


# The __array__ of Keras' variables has no argument `copy`, which newer releases of NumPy pass.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamax", "amsgrad, average"])
def test_every_form_of_keras_variables_gives_the_same_state(name, keras, x64):
    make, make_ours = KERAS_AND_ADAMJAX[name]
    ours = make_ours()
    theirs = KerasRun(keras, make, new_params())
    theirs.run(new_noises()[:2])
    variables, params = theirs.optimizer.variables, theirs.params
    expected = convert.from_keras(variables, ours, params)
    assert int(adamjax.step_count(expected)) == 2
    stored: dict[str, np.ndarray] = {}
    theirs.optimizer.save_own_variables(stored)
    pairs = [(v.path, np.asarray(v.value)) for v in variables]
    forms = {
        "pairs": pairs,
        "names": dict(pairs),
        "save_own_variables": stored,
        "arrays": [np.asarray(v.value) for v in variables],
        "tf_keras": [(tf_keras_name(path), x) for path, x in pairs],
    }
    if "average" not in name:
        roles = ("iteration", "momentum", "velocity", "norm", "velocity_hat")
        legacy = [(legacy_name(p), x) for r in roles for p, x in pairs if p.endswith(r)]
        forms |= {"legacy": legacy, "get_weights": [x for _, x in legacy]}
    for form, old in forms.items():
        print(form)
        assert_same(convert.from_keras(old, ours, params), expected)
    values = convert.to_keras(expected, ours, params, stored)
    assert list(values) == list(stored)
    assert_same(list(values.values()), list(stored.values()))


def test_arrays_are_ordered_by_the_numbers_of_savez():
    numbered = {f"arr_{i}": x for i, x in enumerate(VARIABLES.values())}
    params, tx = {"w": jnp.zeros(2)}, adamjax.adam(0.1)
    backwards = dict(reversed(numbered.items()))
    for variables in (numbered, backwards):
        state = convert.from_keras(variables, tx, params)
        assert_same(state, convert.from_keras(list(VARIABLES.values()), tx, params))


def test_names_of_keras_may_be_bytes():
    """h5py reads the names in a `.h5` file as bytes."""
    tx, params = adamjax.adam(0.1), {"w": jnp.zeros(2)}
    expected = convert.from_keras(NAMED_VARIABLES, tx, params)
    for variables in (
        [(name.encode(), x) for name, x in NAMED_VARIABLES],
        [[name, x] for name, x in NAMED_VARIABLES],
        {name.encode(): x for name, x in NAMED_VARIABLES},
    ):
        assert_same(convert.from_keras(variables, tx, params), expected)


def test_an_average_of_a_single_array_is_converted():
    tx, params = adamjax.chain(adamjax.adam(RATE), adamjax.weight_ema(0.9)), jnp.ones(2)
    names = ("w_momentum", "w_velocity", "w_average")
    variables = [("adam/iteration", np.array(7)), ("adam/learning_rate", np.float32(RATE))]
    variables += [(f"adam/{name}", np.full(2, 0.5, np.float32)) for name in names]
    state = convert.from_keras(variables, tx, params)
    assert_same(adamjax.averaged_weights(state), jnp.full(2, 0.5))
    for made, (name, x) in zip(
        convert.to_keras(state, tx, params, variables), variables, strict=True
    ):
        np.testing.assert_array_equal(made, x, name)


VARIABLES = {
    "adam/iteration": 7,
    "adam/learning_rate": np.float32(0.1),
    "adam/w_momentum": np.full(2, 0.5, "f"),
    "adam/w_velocity": np.ones(2, "f"),
}


@pytest.mark.parametrize("form", ["pairs", "mapping", "numbers", "list"])
@pytest.mark.parametrize("value", [None, "0.1", [[1], 2], {"a": 1}])
@pytest.mark.parametrize("name", VARIABLES)
def test_malformed_variables_are_refused(name, value, form):
    changed = {**VARIABLES, name: value}
    variables = {
        "pairs": list(changed.items()),
        "mapping": changed,
        "numbers": {str(i): x for i, x in enumerate(changed.values())},
        "list": list(changed.values()),
    }[form]
    tx, params = adamjax.adam(0.1), {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"from_keras: variable .* is .*expected a number or an a"):
        convert.from_keras(variables, tx, params)
    with pytest.raises(ValueError, match=r"to_keras: variable .* is .*expected a number or an a"):
        convert.to_keras(tx.init(params), tx, params, variables)


def test_a_complex_rate_is_refused():
    variables = {**VARIABLES, "adam/learning_rate": np.complex64(0.1)}
    with pytest.raises(ValueError, match=r"the learning rate is .*expected one real number"):
        convert.from_keras(variables, adamjax.adam(0.1), {"w": jnp.zeros(2)})


def test_a_target_of_integers_is_refused():
    tx, params = adamjax.adam(0.1), {"w": jnp.zeros(2)}
    target = {**VARIABLES, "adam/w_momentum": np.zeros(2, int)}
    with pytest.raises(ValueError, match="momentum of 'w' is int64 in the target, expected floats"):
        convert.to_keras(tx.init(params), tx, params, target)


def test_arrays_with_hidden_or_without_values_are_refused():
    torch, params = pytest.importorskip("torch"), {"w": jnp.zeros(2)}
    masked = np.ma.array([0.1, 9.9], mask=[0, 1])
    for x, message in (
        (masked, "masked float64"),
        (torch.zeros(2, device="meta"), "a tensor.*meta"),
    ):
        variables = {**VARIABLES, "adam/w_momentum": x}
        with pytest.raises((TypeError, ValueError), match=f"'adam/w_momentum' is {message}"):
            convert.from_keras(variables, adamjax.adam(0.1), params)
    tx = adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.9))
    with pytest.raises(TypeError, match=r"the leaf 'w': an array is masked float64"):
        convert.from_keras(VARIABLES, tx, params, average={"w": masked})


def test_an_error_says_how_to_read_bfloat16_that_numpy_loaded():
    moments = np.asarray(jnp.ones(2, jnp.bfloat16)).view("V2")
    variables = {name: moments if np.ndim(x) else x for name, x in VARIABLES.items()}
    with pytest.raises(ValueError, match=r"expected a number .*view\(ml_dtypes.bfloat16\)"):
        convert.from_keras(variables, adamjax.adam(0.1), {"w": jnp.zeros(2)})


# --- which variable belongs to which leaf ---------------------------------------------------------


LAYERS = ["dense", *(f"dense_{i}" for i in range(1, 12))]


def layer_params(names):
    return {name: {"kernel": jnp.zeros(2)} for name in names}


def test_variables_of_keras_are_matched_by_their_names():
    """JAX sorts the keys of a dictionary: dense_10 comes before dense_2."""
    params, tx = layer_params(LAYERS), adamjax.adam(RATE)
    pairs = keras_variables_named([f"sequential_{name}_kernel" for name in LAYERS])
    expected = {n: {"kernel": jnp.full(2, i + 1.0)} for i, n in enumerate(LAYERS)}
    # Names decide, also if the variables come slot by slot or are sorted by name.
    by_slot = sorted(pairs, key=lambda pair: pair[0].rsplit("_", 1)[-1])
    for old in (pairs, by_slot, sorted(pairs), dict(pairs)):
        state = convert.from_keras(old, tx, params)
        assert_same(adamjax.get_slot(state, "m"), expected)
        assert_same(adamjax.get_slot(state, "v"), expected)
    values = convert.to_keras(state, tx, params, pairs)
    assert_same(values[2:], [x for _, x in pairs[2:]])
    # The leaves of a list have no names: they are matched in order.
    state = convert.from_keras(pairs, tx, [jnp.zeros(2)] * len(LAYERS))
    assert_same(adamjax.get_slot(state, "m"), [x["kernel"] for x in expected.values()])
    order = [f"{name}/kernel" for name in LAYERS]
    assert_same(adamjax.get_slot(convert.from_keras(pairs, tx, params, order=order), "m"), expected)
    with pytest.raises(ValueError, match=r"order has 'dense_1/kernel' in the place of Keras's 's"):
        convert.from_keras(pairs, tx, params, order=[*order[1::-1], *order[2:]])
    other = keras_variables_named([f"conv_{i}" for i in range(12)])
    with pytest.raises(ValueError, match=r"Keras names its parameters \['conv_0'.*give order="):
        convert.from_keras(other, tx, params)
    mixed = [*pairs[:-1], ("adam/sequential_dense_1_kernel_velocity", pairs[-1][1])]
    with pytest.raises(ValueError, match=r"leaves of velocity are others than those of momentum"):
        convert.from_keras(mixed, tx, params)
    both = [*pairs[:-1], ("nadam/sequential_dense_11_kernel_velocity", pairs[-1][1])]
    with pytest.raises(ValueError, match=r"of several optimizers, \['adam', 'nadam'\]"):
        convert.from_keras(both, tx, params)


def sorted_pairs(names):
    return dict(sorted(keras_variables_named(names)))


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        (sorted_pairs(["zeta", "beta", "mid"]), "not in Keras' order, in which the iteration"),
        (sorted_pairs(["zeta", "nu", "xi"]), "the names are sorted, so their order need not be"),
        (
            list(sorted_pairs(["zeta", "nu", "xi"]).items()),
            "the names are sorted, so their order need not be",
        ),
        (  # safetensors sorts by dtype and then by name
            dict(
                sorted(
                    keras_variables_named(["zeta", "beta", "mid"]), key=lambda p: p[1].dtype.kind
                )
            ),
            "not in Keras' order",
        ),
    ],
)
def test_names_of_keras_that_were_sorted_give_no_order(variables, fault):
    """`jax.device_get` and h5py sort a dictionary by its keys."""
    tx = adamjax.adam(RATE)
    value_of = dict(variables)
    names = [key[5:].removesuffix("_momentum") for key in value_of if "momentum" in key]
    moment_of = {name: float(value_of[f"adam/{name}_momentum"][0]) for name in names}
    params = {f"l{i}": jnp.zeros(2) for i in range(3)}
    paths = ["l0", "l1", "l2"]
    for tree, order in ((params, paths), (list(params.values()), None)):
        state = convert.from_keras(
            keras_variables_named(moment_of), tx, tree, order=order, check=False
        )
        for call in (
            lambda tree=tree, order=order: convert.from_keras(variables, tx, tree, order=order),
            lambda state=state, tree=tree, order=order: convert.to_keras(
                state, tx, tree, variables, order=order
            ),
        ):
            with pytest.raises(ValueError, match=rf"{fault}.*give order=.name: path."):
                call()
        convert.from_keras(variables, tx, tree, order=order, check=False)
    with pytest.raises(ValueError, match="give order="):
        convert.from_keras(variables, adamjax.masked(tx, "l1"), params, order=[None, "l1", None])
    # Names in order=, or the names of the leaves, decide.
    order = dict(zip(names, paths, strict=True))
    for option in (order, dict(reversed(order.items()))):
        m = adamjax.get_slot(convert.from_keras(variables, tx, params, order=option), "m")
        assert {path: float(x[0]) for path, x in m.items()} == {
            path: moment_of[name] for name, path in order.items()
        }
    named = {name: jnp.zeros(2) for name in names}
    for option in (None, names, {f"model/{name}": name for name in names}):
        m = adamjax.get_slot(convert.from_keras(variables, tx, named, order=option), "m")
        assert {name: float(x[0]) for name, x in m.items()} == moment_of
    for option, message in [
        ({"other": "l0", "zeta": "l1", "mid": "l2"}, "order has the names .*do not correspond to"),
        (dict.fromkeys(names, "l0"), "order names the leaf 'l0' more than once"),
        (dict.fromkeys(names, "w"), "order names the leaf 'w', but params has no float leaf"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert.from_keras(variables, tx, params, order=option)
    with pytest.raises(TypeError, match="a list of paths, or a dictionary from names to paths"):
        convert.from_keras(variables, tx, params, order={0: "l0", 1: "l1", 2: "l2"})


def test_the_shapes_show_the_order_where_the_names_do_not(keras, x64):
    """Keras gives the layers of a second model in one process other numbers."""
    params = {"first/kernel": jnp.ones((2, 3)), "first/bias": jnp.ones(3), "a/kernel": jnp.ones(5)}
    order = ["first/kernel", "first/bias", "a/kernel"]
    variables = [
        keras.Variable(np.ones(params[path].shape), name=f"other_{i}")
        for i, path in enumerate(order)
    ]
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(variables)
    optimizer.apply([keras.ops.full(v.shape, 1.0 + i) for i, v in enumerate(variables)])
    tx = adamjax.adam(0.1)
    state = convert.from_keras(optimizer.variables, tx, params)
    m = adamjax.get_slot(state, "m")
    assert_close([float(m[path].max()) for path in order], [0.1, 0.2, 0.3], rtol=1e-6)
    values = convert.to_keras(state, tx, params, optimizer.variables)
    for variable, value in zip(optimizer.variables, values, strict=True):
        assert_close(value, np.asarray(variable.value), rtol=1e-12)
    # Two leaves of one shape: only order= can tell them apart.
    alike = {**params, "a/kernel": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"other_0.*do not correspond to the leaves.*give order="):
        convert.from_keras(optimizer.variables, tx, alike)


def test_arrays_that_may_be_ordered_in_several_ways_are_refused():
    params = [jnp.ones(2), jnp.ones(2)]
    arrays = [np.array(1), *[np.ones(2)] * 4]
    with pytest.raises(ValueError, match=r"may be ordered in several ways"):
        convert.from_keras(arrays, adamjax.adam(RATE), params)
    convert.from_keras({str(i): x for i, x in enumerate(arrays)}, adamjax.adam(RATE), params)


def test_none_in_an_order_skips_arrays_without_names():
    """No leaf shows the shape of a skipped parameter, but its arrays all have the same shape."""
    shapes = [(3, 2), (4,), (), (2, 5)]
    params = {"a": jnp.ones(shapes[0]), "c": jnp.ones(shapes[3])}
    numbered, tx = numbered_keras(shapes), adamjax.adam(RATE)
    for old in (numbered, list(numbered.values())):
        for order in (["a", None, None, "c"], ["a", None, None, None], [None, None, None, "c"]):
            some = {path: params[path] for path in order if path}
            state = convert.from_keras(old, tx, some, order=order)
            for path in some:
                place = order.index(path)
                slot = adamjax.get_slot(state, "v")[path]
                assert_same(slot, jnp.full(shapes[place], place + 1.0))
            back = convert.to_keras(state, tx, some, old, order=order)
            assert_same(back, old)
    del numbered["9"]
    with pytest.raises(ValueError, match="9 arrays without names fit nothing"):
        convert.from_keras(numbered, tx, params, order=["a", None, None, "c"])


def test_weights_that_are_the_transposes_of_keras_kernels(keras, x64):
    """As in Equinox. The encoder's kernel has the shape of the decoder's weight."""
    names = ["encoder", "middle", "decoder"]
    shapes = dict(zip(names, [(5, 2), (2, 2), (2, 5)], strict=True))
    params = {name: {"weight": jnp.ones(shape[::-1])} for name, shape in shapes.items()}
    order, tx = [f"{name}/weight" for name in names], adamjax.adam(0.1)

    def transpose(path, x):
        return x.T

    variables = [keras.Variable(np.ones(shape), name="kernel") for shape in shapes.values()]
    for variable, name in zip(variables, names, strict=True):
        variable._path = f"other/{name}_of_keras"
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(variables)
    noises = [np.random.default_rng(i).normal(size=v.shape) for i, v in enumerate(variables)]
    optimizer.apply([keras.ops.convert_to_tensor(x) for x in noises])
    numbered = {str(i): np.asarray(v.value) for i, v in enumerate(optimizer.variables)}
    for old in (optimizer, numbered):
        for options in ({}, {"adapt": transpose}):
            with pytest.raises(ValueError, match="give order="):
                convert.from_keras(old, tx, params, **options)
        state = convert.from_keras(old, tx, params, order=order, adapt=transpose)
        for name, x in zip(names, noises, strict=True):
            assert_close(adamjax.get_slot(state, "m")[name]["weight"], 0.1 * x.T, rtol=1e-6)
        back = convert.to_keras(state, tx, params, old, order=order, adapt=transpose)
        assert_same(list(back.values() if old is numbered else back), list(numbered.values()))


@pytest.mark.parametrize(
    ("leaf", "name"),
    [("weight", "kernel"), ("kernel", "kernel"), ("weight", "embeddings"), ("weight", "")],
)
def test_square_weights_that_may_be_transposes_of_keras_kernels_need_an_adapt(leaf, name):
    params, tx = {"fc": {leaf: jnp.eye(2)}}, adamjax.adam(0.1)
    square = np.tri(2, dtype=np.float32)
    arrays = {"iteration": np.array(7), "learning_rate": np.array(0.1)}
    arrays |= {f"fc_{name}_momentum": square, f"fc_{name}_velocity": np.ones((2, 2))}
    old = [(f"adam/{key}", x) for key, x in arrays.items()] if name else list(arrays.values())
    message = r"Keras' kernels are the transposes of weights .*'fc/weight'.*adapt=lambda path, x: "
    for call in (
        lambda **options: convert.from_keras(old, tx, params, **options),
        lambda **options: convert.to_keras(tx.init(params), tx, params, old, **options),
    ):
        if leaf == "weight" and name != "embeddings":
            with pytest.raises(ValueError, match=message):
                call()
        else:
            call()
        call(adapt=lambda path, x: x)
    state = convert.from_keras(old, tx, params, adapt=lambda path, x: x.T)
    assert_close(adamjax.get_slot(state, "m")["fc"][leaf], square.T, rtol=0)


# --- which optimizers are converted ---------------------------------------------------------------


def keras_after_two_steps(keras, kind, **options):
    """A Keras optimizer after two steps."""
    optimizer = getattr(keras.optimizers, kind)(0.1, **options)
    w = keras.Variable(np.ones(3, np.float32), name="w")
    optimizer.build([w])
    for g in ([1.0, -2.0, 0.5], [0.5, 1.0, -3.0]):
        optimizer.apply([keras.ops.convert_to_tensor(np.asarray(g, np.float32))], [w])
    return optimizer


KERAS_OPTIMIZERS = {
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "Nadam": {},
    "RMSprop": {"momentum": 0.9},
    "SGD": {"momentum": 0.9},
    "Lamb": {},
    "Muon": {},
    "Ftrl": {},
    "Lion": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adafactor": {},
    "ScheduleFreeAdamW": {},
}


@pytest.mark.parametrize("named", [True, False], ids=["names", "no names"])
@pytest.mark.parametrize("name", KERAS_OPTIMIZERS)
def test_only_adams_of_keras_are_converted(name, named, keras):
    if not hasattr(keras.optimizers, name):
        pytest.skip(f"this Keras has no {name}")
    optimizer = keras_after_two_steps(keras, name, **KERAS_OPTIMIZERS[name])
    variables = [(v.path, np.asarray(v)) for v in optimizer.variables]
    variables = variables if named else [x for _, x in variables]
    makes = {"Adamax": adamjax.adamax, "AdamW": adamjax.adamw, "Nadam": adamjax.nadam}
    tx, params = makes.get(name, adamjax.adam)(0.1), {"w": jnp.ones(3)}
    if name in ("Adam", "AdamW", "Adamax", "Nadam"):
        assert int(adamjax.step_count(convert.from_keras(variables, tx, params))) == 2
    elif name in ("Lamb", "Muon") and not named:
        # Without names, their moments of a vector look like Adam's.
        convert.from_keras(variables, tx, params)
    else:
        with pytest.raises(ValueError, match="from_keras: "):
            convert.from_keras(variables, tx, params)


def test_all_optimizers_of_keras_except_adams_are_refused(keras):
    """Also those of future releases."""
    accepted, params = set(), {"w": jnp.ones(3)}
    for name, kind in vars(keras.optimizers).items():
        if not isinstance(kind, type) or name in ("Optimizer", "OptimizerMap", "MultiOptimizer"):
            continue
        optimizer = kind(keras.optimizers.Adam() if name == "LossScaleOptimizer" else 0.1)
        optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
        txs = (adamjax.adam, adamjax.adamw, adamjax.amsgrad, adamjax.adamax, adamjax.nadam)
        for old in (optimizer, optimizer.variables):
            for tx in txs:
                try:
                    convert.from_keras(old, tx(0.1), params)
                except ValueError as error:
                    assert "from_keras: " in str(error)  # noqa: PT017
                else:
                    accepted.add((name, tx.__name__))
    # The variables of Keras' Adam do not show whether it has a weight decay.
    expected = {("Adam", "adam"), ("Adam", "adamw"), ("AdamW", "adamw")}
    expected |= {("Adamax", "adamax"), ("Nadam", "nadam")}
    assert accepted == expected


def test_the_class_of_a_renamed_keras_optimizer_decides(keras):
    """Variables whose names contain a custom name are refused, but the optimizer is accepted."""
    params, tx = {"w": jnp.ones(3)}, adamjax.adam(0.1)
    for kind, options in [("Adam", {}), ("Lamb", {}), ("ScheduleFreeAdamW", {})]:
        optimizer = keras_after_two_steps(keras, kind, name="mine", **options)
        bare = [(v.name, np.asarray(v)) for v in optimizer.variables]
        for variables, problem in [
            (optimizer.variables, "an optimizer that is named 'mine'"),
            (bare, "names of the variables do not contain that of their optimizer"),
        ]:
            with pytest.raises(ValueError, match=problem):
                convert.from_keras(variables, tx, params)
        if kind == "Adam":
            assert int(adamjax.step_count(convert.from_keras(optimizer, tx, params))) == 2
        else:
            with pytest.raises(ValueError, match=rf"the optimizer is a keras.*{kind}: expected"):
                convert.from_keras(optimizer, tx, params)
    called_adam = keras_after_two_steps(keras, "RMSprop", name="adam", momentum=0.9)
    with pytest.raises(ValueError, match="velocities come before momenta"):
        convert.from_keras(called_adam.variables, tx, params)


@pytest.mark.parametrize("prefix", ["lamb", "my_own", "lazy_adam", "rectified_adam", "adam_mini"])
def test_names_of_other_optimizers_are_refused(prefix):
    pairs, params = keras_variables_named(["a"], prefix), {"a": jnp.zeros(2)}
    with pytest.raises(ValueError, match=rf"an optimizer that is named '{prefix}'"):
        convert.from_keras(pairs, adamjax.adam(RATE), params)
    state = adamjax.adam(RATE).init(params)
    with pytest.raises(ValueError, match=rf"an optimizer that is named '{prefix}'"):
        convert.to_keras(state, adamjax.adam(RATE), params, pairs)
    convert.from_keras(pairs, adamjax.adam(RATE), params, check=False)


def test_numbered_names_of_keras_optimizers_are_recognized():
    for prefix, tx in [("adam_1", adamjax.adam), ("adam_w_12", adamjax.adamw)]:
        convert.from_keras(keras_variables_named(["a"], prefix), tx(RATE), jnp.zeros(2))
    for prefix in ("adam_w_12", "AdamW"):
        with pytest.raises(ValueError, match=r"Keras has AdamW's weight decay, tx has none: build"):
            convert.from_keras(
                keras_variables_named(["a"], prefix), adamjax.adam(RATE), jnp.zeros(2)
            )
    with pytest.raises(ValueError, match=r"those of nadam; for adam, expected"):
        convert.from_keras(keras_variables_named(["a"], "nadam"), adamjax.adam(RATE), jnp.zeros(2))


def test_names_of_rmsprop_of_tf_keras_are_not_those_of_adam():
    names = ["m", "v"], ["momentum", "velocity"]
    for is_adam, (m, v) in zip((True, False), names, strict=True):
        pairs = [("iteration:0", np.array(1))]
        pairs += [(f"{role}/dense/kernel:0", np.ones(2, np.float32)) for role in (m, v)]
        if is_adam:
            convert.from_keras(pairs, adamjax.adam(RATE), jnp.zeros(2))
        else:
            with pytest.raises(ValueError, match="cannot tell what 'momentum/dense/kernel:0' is"):
                convert.from_keras(pairs, adamjax.adam(RATE), jnp.zeros(2))


def test_an_error_names_what_is_passed_in_place_of_a_keras_optimizer(keras):
    params, tx = {"w": jnp.ones(3)}, adamjax.adam(0.1)
    adam = keras_after_two_steps(keras, "Adam")
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    several = keras_after_two_steps(keras, "Adam")
    several.__class__ = type("MultiOptimizer", (type(several),), {"optimizers": [adam]})
    for old, message in [
        (
            keras_after_two_steps(keras, "SGD", momentum=0.9),
            r"is a keras.*SGD: expected Keras' Adam",
        ),
        (scaled, r"LossScaleOptimizer: expected .* Convert its inner_optimizer"),
        (several, r"MultiOptimizer: expected .* Convert each of its optimizers by itself"),
        (model, r"is a keras.*Sequential: expected .* Pass its optimizer"),
        ({"name": "adam", "beta_1": 0.9}, r"a config, which has no variables"),
        ("model.weights.h5", r"got the path 'model.weights.h5', expected optimizer.variables"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            convert.from_keras(old, tx, params)


def test_a_keras_optimizer_that_is_not_built_is_refused(keras):
    params, tx = {"w": jnp.ones(3)}, adamjax.adam(0.1)
    optimizer = keras.optimizers.Adam(0.1)
    stored = {str(i): np.asarray(v.value) for i, v in enumerate(optimizer.variables)}
    for variables in (optimizer, optimizer.variables, stored):
        with pytest.raises(ValueError, match=r"no moments, so it is not built yet: .*build\("):
            convert.from_keras(variables, tx, params)
    with pytest.raises(TypeError, match=r"a config, which has no variables: .*from_config"):
        convert.from_keras({"class_name": "Adam", "config": {}}, tx, params)


# --- hyperparameters ------------------------------------------------------------------------------


def test_variables_of_keras_are_compared_with_tx():
    params, adam = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE)
    convert.from_keras(keras_variables(), adam, params)
    for pairs, tx, message in [
        (
            keras_variables(),
            adamjax.adam(0.5),
            r"'a': Keras has a learning rate of 0.0625, tx has 0.5",
        ),
        (
            keras_variables(),
            adamjax.adam(RATE, eps=1e-7),
            r"'a': Keras has epsilon added to the uncorrected",
        ),
        (keras_variables(), adamjax.amsgrad(RATE), r"for amsgrad, expected .*'velocity_hat'"),
        (keras_variables()[:-1], adam, r"there are 1 of velocity"),
        (
            keras_variables([("adam/step_counter", np.ones(2))]),
            adam,
            r"cannot tell what 'adam/step_c",
        ),
        ([x for _, x in keras_variables()][:-1], adam, r"arrays without names fit nothing"),
        (
            keras_variables([(f"adam/{p}_average", x) for p, x in PARAMS.items()]),
            adam,
            r"has an average of 'a', but tx has no weight_ema",
        ),
        (
            keras_variables([(f"adam/{p}_gradient_accumulator", x) for p, x in PARAMS.items()]),
            adam,
            r"wrap tx in accumulate_gradients",
        ),
        (
            keras_variables(),
            adamjax.accumulate_gradients(adamjax.adam(adamjax.exponential_decay(RATE, 9, 0.5)), 2),
            r"Keras calls a schedule with the number of micro-batches",
        ),
        (
            keras_variables(),
            adamjax.accumulate_gradients(adamjax.chain(adam, adamjax.weight_ema(0.9)), 2),
            r"put weight_ema after accumulate_gradients",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            convert.from_keras(pairs, tx, params)
    with pytest.raises(TypeError, match=r"expected optimizer.variables"):
        convert.from_keras(3, adam, params)


def clipped_by(*transforms):
    return adamjax.chain(*transforms, adamjax.adam(0.1))


def test_hyperparameters_of_a_keras_optimizer_are_compared_with_tx(keras):
    params = {"w": jnp.ones(3)}
    for options, tx, problem in [
        ({"beta_1": 0.8}, adamjax.adam(0.1), r"b1=0.8, tx has b1=0.9"),
        ({"epsilon": 1e-5}, adamjax.adam(0.1), r"eps_hat=1e-05, tx has eps_hat=1e-07"),
        ({"weight_decay": 0.01}, adamjax.adam(0.1), r"a weight decay of 0.01, tx has 0 before"),
        (
            {"gradient_accumulation_steps": 4},
            adamjax.accumulate_gradients(adamjax.adam(0.1), 2),
            r"has gradient_accumulation_steps=4, and tx accumulates over 2",
        ),
        ({"clipnorm": 0.5}, adamjax.adam(0.1), r"clip_by_norm\(max_norm=0.5\), tx has no clip"),
        ({"clipvalue": 0.5}, adamjax.adam(0.1), r"clip_by_value\(limit=0.5\), tx has no clip"),
        (
            {"clipnorm": 0.5},
            clipped_by(adamjax.clip_by_global_norm(0.5)),
            r"tx has clip_by_global_",
        ),
        ({"global_clipnorm": 0.5}, clipped_by(adamjax.clip_by_norm(0.5)), r"tx has clip_by_norm"),
        ({"clipnorm": 0.5}, clipped_by(adamjax.clip_by_norm(0.25)), r"tx has clip_by_norm\(max_n"),
        (
            {"clipnorm": 0.5},
            adamjax.chain(adamjax.adam(0.1), adamjax.clip_by_norm(0.5)),
            r"clip_by_norm\(max_norm=0.5\) after the rule",
        ),
        (
            {"clipnorm": 0.5},
            clipped_by(adamjax.clip_by_value(0.1), adamjax.clip_by_norm(0.5)),
            r"tx has clip_by_value\(limit=0.1\), clip_by_norm",
        ),
        (
            {},
            clipped_by(adamjax.clip_by_value(0.1)),
            r"no clip, tx has clip_by_value.*leave clips out",
        ),
        (
            {"gradient_accumulation_steps": 2, "clipnorm": 0.5},
            adamjax.chain(
                adamjax.clip_by_norm(0.5), adamjax.accumulate_gradients(adamjax.adam(0.1), 2)
            ),
            r"clip_by_norm\(max_norm=0.5\) outside of accumulate_gradients",
        ),
        (
            {"loss_scale_factor": 8.0},
            adamjax.adam(0.1),
            r"by 0.125, tx has gradients multiplied by 1 ",
        ),
        (
            {"loss_scale_factor": 8.0, "clipnorm": 0.5},
            clipped_by(adamjax.clip_by_norm(0.5), adamjax.scale(0.125)),
            r"multiplied by 0.125, tx has .* by 1 before a clip, and by 0.125 after it: .*begin tx",
        ),
        (
            {"loss_scale_factor": 2.0},
            adamjax.chain(adamjax.adam(0.2), adamjax.scale(0.5)),
            r"gradients multiplied by 0.5, tx",
        ),
        ({}, clipped_by(adamjax.scale(-1.0)), r"no loss_scale_factor, tx .* multiplied by -1"),
        (
            {"use_ema": True, "ema_momentum": 0.5},
            adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.75)),
            r"an average with momentum=0.5, overwrite_frequency=None, tx has momentum=0.75",
        ),
        (
            {"use_ema": True, "ema_momentum": 0.0},
            adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.75)),
            r"momentum=0, overwrite_frequency=None, tx has momentum=0.75",
        ),
        (
            {"use_ema": True, "ema_momentum": 0.5},
            adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.5, 3)),
            r"overwrite_frequency=None, tx has momentum=0.5, overwrite_frequency=3",
        ),
        (
            {},
            adamjax.accumulate_gradients(adamjax.adam(0.1), 2),
            r"but tx has accumulate_gradients",
        ),
    ]:
        optimizer = keras_after_two_steps(keras, "Adam", **options)
        with pytest.raises(ValueError, match=problem):
            convert.from_keras(optimizer, tx, params)
        convert.from_keras(optimizer, tx, params, check=False)
        with pytest.raises(ValueError, match=problem):
            convert.to_keras(tx.init(params), tx, params, optimizer)


def test_constraints_and_options_that_were_switched_off_are_refused(keras):
    tx = adamjax.adam(0.1)

    def expect_refusal(optimizer, message):
        for call in (
            lambda: convert.from_keras(optimizer, tx, KERAS_PARAMS),
            lambda: convert.to_keras(tx.init(KERAS_PARAMS), tx, KERAS_PARAMS, optimizer),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    variables = [keras.Variable(np.ones(3), name=name) for name in KERAS_PARAMS]
    variables[1].constraint = keras.constraints.NonNeg()
    optimizer = keras_optimizer(keras, variables=variables)
    expect_refusal(optimizer, r"the variable of 'v1' has constraint=.*NonNeg")
    only = adamjax.partition([("v1", adamjax.set_to_zero())], default=tx)
    convert.from_keras(optimizer, only, KERAS_PARAMS, order=["v0", None])
    optimizer = keras_optimizer(keras, use_ema=True)
    optimizer.use_ema = False
    expect_refusal(optimizer, "use_ema of the optimizer is False, but it has the variables")
    optimizer = keras_optimizer(keras, amsgrad=True)
    optimizer.amsgrad = False
    expect_refusal(optimizer, "amsgrad of the optimizer is False, but it has the variables")


# --- clips and factors ----------------------------------------------------------------------------


def test_clips_and_scales_like_those_of_keras_are_accepted(keras):
    params = {"w": jnp.ones(3)}
    for options, tx in [
        ({"clipnorm": 0.5}, clipped_by(adamjax.clip_by_norm(0.5))),
        ({"clipnorm": -1.0}, adamjax.adam(0.1)),  # without effect in Keras
        (
            {"loss_scale_factor": 8.0, "global_clipnorm": 0.5},
            clipped_by(adamjax.scale(0.125), adamjax.clip_by_global_norm(0.5)),
        ),
        (
            {"gradient_accumulation_steps": 2, "clipvalue": 0.5},
            adamjax.accumulate_gradients(clipped_by(adamjax.clip_by_value(0.5)), 2),
        ),
    ]:
        convert.from_keras(keras_after_two_steps(keras, "Adam", **options), tx, params)


def test_a_global_norm_of_keras_is_that_of_all_leaves(keras):
    optimizer = keras.optimizers.Adam(0.1, global_clipnorm=0.5)
    variables = [
        keras.Variable(np.ones(n, np.float32), name=name) for n, name in ((3, "a"), (2, "b"))
    ]
    optimizer.build(variables)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    clipped = clipped_by(adamjax.clip_by_global_norm(0.5))
    convert.from_keras(optimizer, clipped, params)
    with pytest.raises(ValueError, match=r"clip_by_global_norm\(max_norm=0.5\) of other leaves"):
        convert.from_keras(optimizer, adamjax.partition([("a", clipped)], default=clipped), params)


def test_a_norm_of_keras_is_that_of_the_leaves_that_its_optimizer_has(keras):
    variables = [keras.Variable(np.ones(3, np.float32), name="v1")]
    optimizer = keras.optimizers.Adam(0.1, global_clipnorm=0.5)
    optimizer.build(variables)
    clip, adam = adamjax.clip_by_global_norm(0.5), adamjax.adam(0.1, eps_hat=1e-7)
    rest = adamjax.partition([("v0", adamjax.set_to_zero())], default=adam)
    right = adamjax.chain(adamjax.masked(clip, "v1"), rest)
    convert.from_keras(optimizer, right, KERAS_PARAMS, order=["v1"])
    with pytest.raises(ValueError, match=r"of other leaves: clip the leaves that its optimizer"):
        convert.from_keras(optimizer, adamjax.chain(clip, rest), KERAS_PARAMS, order=["v1"])


def built_on_two(keras, rate=0.1, **options):
    """A Keras Adam with variables `v0` and `v1`, and these variables."""
    variables = [keras.Variable(np.ones(3, np.float32), name=name) for name in ("v0", "v1")]
    optimizer = keras.optimizers.Adam(rate, **options)
    optimizer.build(variables)
    return optimizer, variables


def test_a_variable_in_a_norm_of_keras_is_not_left_out(keras):
    optimizer, variables = built_on_two(keras, global_clipnorm=0.5)
    params, tx = {"v0": jnp.ones(3)}, clipped_by(adamjax.clip_by_global_norm(0.5))
    with pytest.raises(ValueError, match=r"\(global_clipnorm\), but order= leaves out 'v1'"):
        convert.from_keras(optimizer, tx, params, order=["v0", None])
    with pytest.raises(ValueError, match=r"\(global_clipnorm\), but order= leaves out 'v1'"):
        convert.to_keras(tx.init(params), tx, params, optimizer, order=["v0", None])
    variables[1].trainable = False  # Keras computes no gradient of it.
    convert.from_keras(optimizer, tx, params, order=["v0", None])


# --- accumulation ---------------------------------------------------------------------------------


def test_leaves_that_do_not_accumulate_as_in_keras_are_refused(keras):
    optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=2)
    variables = [
        keras.Variable(np.ones(n, np.float32), name=name) for n, name in ((3, "a"), (2, "b"))
    ]
    optimizer.build(variables)
    params, rule = {"a": jnp.ones(3), "b": jnp.ones(2)}, adamjax.adam(0.1)
    two = adamjax.accumulate_gradients(rule, 2)
    convert.from_keras(optimizer, adamjax.partition([("a", two)], default=two), params)
    for other in (rule, adamjax.accumulate_gradients(rule, 4)):
        tx = adamjax.partition([("a", two)], default=other)
        with pytest.raises(ValueError, match=r"does not accumulate 'b' over 2 as it does others"):
            convert.from_keras(optimizer, tx, params)
        with pytest.raises(ValueError, match=r"does not accumulate 'b' over 2 as it does others"):
            convert.to_keras(tx.init(params), tx, params, optimizer)


def test_an_accumulation_beside_the_rule_is_refused_by_keras(keras):
    params, clip = {"w": jnp.ones(3)}, adamjax.clip_by_value(1.0)
    optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=2, clipvalue=1.0)
    optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
    tx = adamjax.chain(
        clip, KERAS_RULE, adamjax.accumulate_gradients(adamjax.scale_by_learning_rate(0.1), 2)
    )
    with pytest.raises(ValueError, match=r"Keras has its rule inside any accumulation"):
        convert.from_keras(optimizer, tx, params)
    with pytest.raises(ValueError, match=r"Keras has its rule inside any accumulation"):
        convert.to_keras(tx.init(params), tx, params, optimizer)


def test_a_leaf_that_keras_does_not_have_need_not_accumulate(keras):
    optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=2)
    optimizer.build([keras.Variable(np.ones(3, np.float32), name="v1")])
    inside = adamjax.chain(
        adamjax.accumulate_gradients(KERAS_RULE, 2), adamjax.scale_by_learning_rate(0.1)
    )
    tx = adamjax.partition([("v0", adamjax.set_to_zero())], default=inside)
    convert.from_keras(optimizer, tx, KERAS_PARAMS, order=["v1"])


def test_another_number_of_micro_batches_than_in_keras_is_refused(keras):
    params = {"w": jnp.ones(3)}
    tx = adamjax.accumulate_gradients(adamjax.adam(0.1), 4)
    message = (
        "has gradient_accumulation_steps=2, and tx accumulates over 4: build tx with "
        "accumulate_gradients of 2 steps"
    )
    for calls in (0, 4):
        optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=2)
        optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
        optimizer._iterations.assign(calls)
        with pytest.raises(ValueError, match=message):
            convert.from_keras(optimizer, tx, params)
        with pytest.raises(ValueError, match=message):
            convert.to_keras(tx.init(params), tx, params, optimizer)


def test_variables_of_another_number_of_micro_batches_are_refused():
    """The iteration counts micro-batches. Only accumulated gradients show how many make a step."""
    params, tx = {"a": jnp.zeros(2)}, adamjax.accumulate_gradients(adamjax.adam(RATE), 4)

    def pairs(iteration, total):
        others = [("adam/iteration", np.array(iteration)), *keras_variables_named(["a"])[1:]]
        return [*others, ("adam/a_gradient_accumulator", np.full(2, total, np.float32))]

    assert int(convert.from_keras(pairs(8, 0), tx, params).inner[0].count) == 2
    convert.from_keras(pairs(9, 0.5), tx, params)
    for iteration, total in [(8, 0.5), (6, 0.0)]:
        with pytest.raises(ValueError, match=r"does not fit accumulate_gradients of 4 steps"):
            convert.from_keras(pairs(iteration, total), tx, params)


def test_a_loss_scale_factor_must_be_outside_of_the_accumulation_amid_a_step(keras):
    """Keras multiplies the gradients of micro-batches by the factor before it adds them up."""
    options = {"loss_scale_factor": 4.0, "gradient_accumulation_steps": 3}
    factor, rate = adamjax.scale(0.25), adamjax.scale_by_learning_rate(0.1)
    inside = adamjax.chain(adamjax.accumulate_gradients(adamjax.chain(factor, KERAS_RULE), 3), rate)
    outside = adamjax.chain(factor, adamjax.accumulate_gradients(KERAS_RULE, 3), rate)
    for calls in (3, 4):
        optimizer = keras_optimizer(keras, calls, **options)
        for total in optimizer._accumulated_gradients:
            total.assign(np.full(3, calls - 3.0))
        convert.from_keras(optimizer, outside, KERAS_PARAMS)
        if calls == 3:
            convert.from_keras(optimizer, inside, KERAS_PARAMS)
        else:
            with pytest.raises(ValueError, match=r"inside of accumulate_gradients: put it outside"):
                convert.from_keras(optimizer, inside, KERAS_PARAMS)


def test_a_decay_outside_of_the_accumulation_of_keras_is_refused(keras):
    optimizer = keras_optimizer(keras, 4, "AdamW", weight_decay=0.1, gradient_accumulation_steps=2)
    decay, rate = adamjax.add_decayed_weights(0.1), adamjax.scale_by_learning_rate(0.1)
    inside = adamjax.accumulate_gradients(adamjax.chain(KERAS_RULE, decay), 2)
    inside = adamjax.chain(inside, rate)
    outside = adamjax.chain(adamjax.accumulate_gradients(KERAS_RULE, 2), decay, rate)
    pairs = [(v.path, np.asarray(v)) for v in optimizer.variables]
    for variables in (optimizer, pairs):
        state = convert.from_keras(variables, inside, KERAS_PARAMS)
        convert.to_keras(state, inside, KERAS_PARAMS, variables)
        for call in (
            lambda v=variables: convert.from_keras(v, outside, KERAS_PARAMS),
            lambda v=variables: convert.to_keras(
                outside.init(KERAS_PARAMS), outside, KERAS_PARAMS, v
            ),
        ):
            with pytest.raises(ValueError, match="adds the weight decay once in each step"):
                call()


def test_a_schedule_by_path_within_the_accumulation_of_keras_is_refused(keras):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    optimizer = keras_optimizer(keras, gradient_accumulation_steps=2)
    optimizer._learning_rate = schedule
    rates = adamjax.by_path([("v0", HALVING)], default=HALVING)
    tx = adamjax.accumulate_gradients(adamjax.adam(rates), 2)
    with pytest.raises(ValueError, match="calls a schedule with the number of micro-batches"):
        convert.from_keras(optimizer, tx, KERAS_PARAMS)


def test_a_constant_rate_is_no_schedule_inside_an_accumulation(keras):
    optimizer, _ = built_on_two(keras, gradient_accumulation_steps=2)
    tx = adamjax.accumulate_gradients(adamjax.adam(adamjax.constant(0.1)), 2)
    convert.from_keras(optimizer, tx, KERAS_PARAMS)


# --- schedules ------------------------------------------------------------------------------------


def test_a_rate_of_0_in_the_next_step_does_not_hide_a_factor_of_one_leaf(keras):
    warmup = keras.optimizers.schedules.CosineDecay(0.0, 20, warmup_target=0.1, warmup_steps=5)
    optimizer, _ = built_on_two(keras, warmup)
    adam = adamjax.adam(adamjax.warmup(adamjax.cosine_decay(0.1, 20), 5, 0.0))
    convert.from_keras(optimizer, adam, KERAS_PARAMS)
    for factor in (adamjax.scale(0.1), adamjax.set_to_zero()):
        tx = adamjax.chain(adam, adamjax.masked(factor, "v1"))
        with pytest.raises(ValueError, match=r"'v1': Keras has a learning rate of 0.02 after 1"):
            convert.from_keras(optimizer, tx, KERAS_PARAMS)
        with pytest.raises(ValueError, match=r"'v1': Keras has a learning rate of 0.02 after 1"):
            convert.to_keras(tx.init(KERAS_PARAMS), tx, KERAS_PARAMS, optimizer)


def keras_adam_with_rate(keras, rate, count=0):
    """A Keras Adam with this rate after `count` steps."""
    optimizer = keras.optimizers.Adam(rate)
    optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
    optimizer.iterations.assign(count)
    return optimizer


def test_a_rate_function_without_arguments_is_compared_at_the_current_step_only(keras):
    """Keras calls it without a step, so later rates are unknown, but they may change."""
    params = {"w": jnp.ones(3)}

    def rate(step=0):
        return 0.1 * 0.5**step

    for function in (lambda: 0.1, rate):
        optimizer = keras_adam_with_rate(keras, function, 5)
        with pytest.raises(ValueError, match=r"a learning rate that follows a schedule \(a "):
            convert.from_keras(optimizer, adamjax.adam(0.1), params)
        with pytest.raises(ValueError, match=r"a learning rate of 0\.1, tx has 0\.003125"):
            convert.from_keras(optimizer, adamjax.adam(lambda count: 0.1 * 0.5**count), params)
        convert.from_keras(optimizer, adamjax.adam(adamjax.constant(0.1)), params)
    optimizer = keras_adam_with_rate(keras, lambda count: 0.1)
    with pytest.raises(ValueError, match=r"cannot be called without arguments, as Keras calls it"):
        convert.from_keras(optimizer, adamjax.adam(adamjax.cosine_decay(0.1, 100)), params)


@pytest.mark.parametrize("leaf", ["v0", "v1"])
def test_a_rate_that_grows_is_compared_closely_for_every_leaf(keras, leaf):
    """Values at later counts, which another leaf was compared at, are far larger."""

    class Ramp(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 1e-4 * (keras.ops.cast(step, "float32") + 1)

    def ramp(ahead):
        return adamjax.adam(lambda count: 1e-4 * (count + 1.0 + ahead))

    optimizer, _ = built_on_two(keras, Ramp())
    params = {"v0": jnp.ones(3), "v1": jnp.ones(3)}
    convert.from_keras(optimizer, ramp(0), params)
    with pytest.raises(ValueError, match=rf"'{leaf}': Keras has a learning rate of 0.0001, tx has"):
        convert.from_keras(optimizer, adamjax.partition([(leaf, ramp(1))], default=ramp(0)), params)


def test_an_accumulation_over_one_call_is_none(keras):
    optimizer, _ = built_on_two(keras, clipnorm=1.0)
    params = {"v0": jnp.ones(3), "v1": jnp.ones(3)}
    for _ in range(3):
        optimizer.apply([keras.ops.ones(3)] * 2)
    clip, rule = adamjax.clip_by_norm(1.0), adamjax.adam(0.1)
    for tx in (
        adamjax.accumulate_gradients(adamjax.chain(clip, rule), 1),
        adamjax.chain(clip, adamjax.accumulate_gradients(rule, 1)),
    ):
        state = convert.from_keras(optimizer, tx, params)
        assert adamjax.step_count(state) == 3
        assert convert.to_keras(state, tx, params, optimizer)[0] == 3


def test_a_schedule_of_keras_is_called_with_what_keras_passes(keras):
    """Keras passes an integer variable. With the Python int 0, both schedules would fail."""
    params, schedules = {"w": jnp.ones(3)}, keras.optimizers.schedules

    class Noam(schedules.LearningRateSchedule):  # no get_config: only a saved model needs it
        def __call__(self, step):
            return 0.1 * keras.ops.minimum(step**-0.5, step * 40**-1.5)

    class OfValue(schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1 * 0.5 ** (keras.ops.cast(step.value, "float32") / 50)

    def warm(steps):
        return lambda n: 0.1 * jnp.minimum(jnp.maximum(n, 1) ** -0.5, n * steps**-1.5)

    halving = adamjax.exponential_decay(0.1, 50, 0.5)
    for schedule, right, others in (
        (Noam(), warm(40), (warm(400), adamjax.constant(0.1))),
        (OfValue(), halving, (adamjax.exponential_decay(1.0, 50, 0.5), warm(40))),
    ):
        optimizer = keras_adam_with_rate(keras, schedule, 5)
        convert.from_keras(optimizer, adamjax.adam(right), params)
        assert int(optimizer.iterations) == 5
        for tx in map(adamjax.adam, others):
            for call in (
                lambda o=optimizer, tx=tx: convert.from_keras(o, tx, params),
                lambda o=optimizer, tx=tx: convert.to_keras(tx.init(params), tx, params, o),
            ):
                with pytest.raises(ValueError, match="'w': Keras has a learning rate of"):
                    call()


def test_a_schedule_of_keras_is_compared_as_far_as_it_can_be_called(keras):
    """A schedule that reads a table is compared up to the end of the table."""
    params, schedules = {"w": jnp.ones(3)}, keras.optimizers.schedules

    class Table(schedules.LearningRateSchedule):
        rates = np.linspace(0.1, 0.01, 100)

        def __call__(self, step):
            return self.rates[int(step)]

    class Broken(schedules.LearningRateSchedule):
        def __call__(self, step):
            return self.rates[step]

    class NaNAtFirst(schedules.LearningRateSchedule):
        def __call__(self, step):
            step = keras.ops.cast(step, "float32")
            return 0.1 * step / step

    def table(end):
        return lambda n: jnp.linspace(0.1, end, 100)[jnp.minimum(n, 99)]

    optimizer = keras_adam_with_rate(keras, Table(), 5)
    convert.from_keras(optimizer, adamjax.adam(table(0.01)), params)
    with pytest.raises(ValueError, match="Keras has a learning rate of"):
        convert.from_keras(optimizer, adamjax.adam(table(0.02)), params)
    for late in (keras_adam_with_rate(keras, Table(), 100), keras_adam_with_rate(keras, Broken())):
        message = r"that cannot be compared: a .* cannot be called at count .*Error: .*check=False"
        with pytest.raises(ValueError, match=message):
            convert.from_keras(late, adamjax.adam(table(0.01)), params)
        convert.from_keras(late, adamjax.adam(table(0.01)), params, check=False)
    optimizer = keras_adam_with_rate(keras, NaNAtFirst())
    convert.from_keras(optimizer, adamjax.adam(lambda n: 0.1 * n / n), params)
    with pytest.raises(ValueError, match="a learning rate of nan"):
        convert.from_keras(optimizer, adamjax.adam(0.1), params)


def test_a_schedule_that_keras_computes_in_integers_is_refused(keras):
    params, schedules = {"w": jnp.ones(3)}, keras.optimizers.schedules
    config = keras.optimizers.serialize
    for make in (
        lambda one: schedules.CosineDecay(0 * one, 1000, warmup_target=0.1, warmup_steps=100),
        lambda one: schedules.ExponentialDecay(one, 100, 0.96),
        lambda one: schedules.InverseTimeDecay(one, 100, 0.5),
        lambda one: schedules.PolynomialDecay(one, 100, 0.1),
    ):
        tx = adamjax.from_config(config(keras.optimizers.Adam(make(1.0))))
        convert.from_keras(keras_adam_with_rate(keras, make(1.0), 50), tx, params)
        for one in (1, np.int64(1), np.array(1), jnp.array(1)):
            optimizer = keras_adam_with_rate(keras, make(one), 50)
            with pytest.raises(ValueError, match=r"in integers.* a float, such as 0.0 or 1.0"):
                convert.from_keras(optimizer, tx, params)
            with pytest.raises(ValueError, match=r"initial_learning_rate: .* in integers"):
                adamjax.from_config(config(keras.optimizers.Adam(make(one))))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_schedule_that_keras_computes_in_16_bits_is_refused(keras, dtype):
    """Beyond 2048 steps float16 has no odd counts, and bfloat16 beyond 256."""
    params, schedules = {"w": jnp.ones(3)}, keras.optimizers.schedules
    tx = adamjax.adam(adamjax.exponential_decay(0.5, 1000, 0.9))
    rate = jnp.asarray(0.5, dtype)
    for one in (rate, np.asarray(rate), np.asarray(rate)[()]):
        optimizer = keras_adam_with_rate(keras, schedules.ExponentialDecay(one, 1000, 0.9), 50)
        with pytest.raises(ValueError, match=r"float of 16 bits or less, .* a Python float"):
            convert.from_keras(optimizer, tx, params)
    # Keras' configs contain the dtypes of tensors, but not of NumPy's numbers.
    config = keras.optimizers.serialize(
        keras.optimizers.Adam(schedules.ExponentialDecay(rate, 1000, 0.9))
    )
    with pytest.raises(ValueError, match=r"initial_learning_rate: .* of 16 bits or less"):
        adamjax.from_config(config)


def test_a_schedule_of_keras_is_compared_closely_with_a_function(keras):
    """They differ only at counts 300 to 499: there is no power of two, and no end of a part."""
    params, schedules = {"w": jnp.ones(3)}, keras.optimizers.schedules
    optimizer = keras_adam_with_rate(keras, schedules.ExponentialDecay(0.1, 1000, 0.5), 3)
    for factor in (1.0, 0.1):
        tx = adamjax.adam(
            lambda n, x=factor: 0.1 * 0.5 ** (n / 1000) * jnp.where((n >= 300) & (n < 500), x, 1.0)
        )
        problem = factor != 1 and pytest.raises(ValueError, match=r"after [34]\d\d steps, tx has")
        with problem or nullcontext():
            convert.from_keras(optimizer, tx, params)


def test_a_schedule_of_a_keras_optimizer_is_compared(keras):
    params = {"w": jnp.ones(3)}
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 1000))
    optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
    for count in (0, 500, 998):
        optimizer._iterations.assign(count)
        tx = adamjax.adam(adamjax.cosine_decay(0.1, 1000))
        state = convert.from_keras(optimizer, tx, params)
        assert int(adamjax.step_count(state)) == count
        convert.to_keras(state, tx, params, optimizer)
        for other in (
            adamjax.cosine_decay(0.2, 1000),
            adamjax.cosine_decay(0.1, 990) if count else 0.2,
        ):
            with pytest.raises(ValueError, match="from_keras: 'w': Keras has a learning rate of"):
                convert.from_keras(optimizer, adamjax.adam(other), params)


def test_a_schedule_of_a_keras_optimizer_is_compared_in_later_steps(keras):
    """At the current count all of these rates are the same."""
    params, k = {"w": jnp.ones(3), "b": jnp.ones(2)}, keras.optimizers
    cosine = k.schedules.CosineDecay(0.0, 60, 0.1, warmup_target=0.1, warmup_steps=12)
    pieces = k.schedules.PiecewiseConstantDecay([1000, 3001], [0.1, 0.2, 0.3])
    for schedule, right, others in (
        (
            cosine,
            adamjax.warmup(adamjax.cosine_decay(0.1, 60, 0.1), 12),
            [
                adamjax.warmup(adamjax.cosine_decay(0.1, 61, 0.1), 12),
                adamjax.warmup(adamjax.cosine_decay(0.1, 60, 0.2), 12),
                adamjax.warmup(adamjax.constant(0.1), 12),
            ],
        ),
        (
            pieces,
            adamjax.piecewise_constant([1000, 3001], [0.1, 0.2, 0.3]),
            [
                adamjax.piecewise_constant([1000, 3002], [0.1, 0.2, 0.3]),
                adamjax.piecewise_constant([1000], [0.1, 0.2]),
                0.1,
            ],
        ),
    ):
        optimizer = k.Adam(schedule)
        variables = [(np.ones(2), "b"), (np.ones(3), "w")]
        optimizer.build([keras.Variable(x.astype(np.float32), name=n) for x, n in variables])
        optimizer.iterations.assign(5)
        convert.from_keras(optimizer, adamjax.adam(right), params)
        rates = adamjax.by_path({"w": right}, default=right)
        convert.from_keras(optimizer, adamjax.adam(rates), params)
        for other in others:
            with pytest.raises(ValueError, match=r"'[bw]': Keras has a learning rate"):
                convert.from_keras(optimizer, adamjax.adam(other), params)
        rates = adamjax.by_path({"w": others[0]}, default=right)
        with pytest.raises(
            ValueError, match=r"'w': Keras has a learning rate of .* after \d+ steps"
        ):
            convert.from_keras(optimizer, adamjax.adam(rates), params)


def test_schedules_with_quotients_of_counts_match_those_of_keras(keras):
    """Quotients of int32 counts are float32, also with x64."""
    params, k = {"w": jnp.ones(3)}, keras.optimizers
    rates = k.schedules
    for schedule, right in (
        (rates.ExponentialDecay(1e-2, 10_000, 0.9), lambda count: 1e-2 * 0.9 ** (count / 10_000)),
        (rates.ExponentialDecay(0.1, 1000, 0.96), optax.exponential_decay(0.1, 1000, 0.96)),
        (rates.PolynomialDecay(1e-3, 10_000, 0.0), optax.linear_schedule(1e-3, 0.0, 10_000)),
        (
            rates.CosineDecay(0.0, 9000, warmup_target=1e-3, warmup_steps=1000),
            optax.warmup_cosine_decay_schedule(0.0, 1e-3, 1000, 10_000),
        ),
    ):
        optimizer = k.Adam(schedule)
        optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
        convert.from_keras(optimizer, adamjax.adam(right), params)
        with pytest.raises(ValueError, match="Keras has a learning rate of"):
            convert.from_keras(
                optimizer, adamjax.adam(lambda count, r=right: 1.01 * r(count)), params
            )


def restarts(first, rate=0.01):
    """Keras' CosineDecayRestarts, whose periods double."""

    def at(count):
        i = jnp.floor(jnp.log2(count / first + 1))
        start = first * (2.0**i - 1)
        return rate * 0.5 * (1 + jnp.cos(jnp.pi * (count - start) / (first * 2.0**i)))

    return at


def cosines(period, rate=0.01):
    """The same with equal periods. After many periods, Keras' float32 quotients are coarse."""
    return lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * ((count % period) / period)))


def noam(warm, rate=0.1):
    return lambda count: rate * jnp.minimum((count + 1.0) ** -0.5, (count + 1.0) * warm**-1.5)


@pytest.mark.slow
def test_schedules_of_keras_that_adamjax_does_not_have_are_called(keras):
    schedules = keras.optimizers.schedules

    class Noam(schedules.LearningRateSchedule):
        def __call__(self, step):
            step = keras.ops.cast(step, "float32") + 1
            return 0.1 * keras.ops.minimum(step**-0.5, step * 100**-1.5)

        def get_config(self):
            return {}

    params = {"w": jnp.ones(3)}
    cosine = adamjax.cosine_decay(0.01, 900)
    for schedule, right, others in (
        (schedules.CosineDecayRestarts(0.01, 200), restarts(200), (restarts(201), cosine)),
        (
            schedules.CosineDecayRestarts(0.01, 1000, t_mul=1.0),
            cosines(1000),
            (cosines(1000, 0.0101), cosines(1001), restarts(1000)),
        ),
        (Noam(), noam(100), (noam(101), noam(100, 0.2), 0.1)),
        (
            schedules.CosineDecay(0.0, 900, warmup_target=0.01, warmup_steps=12.5),
            lambda count: jnp.where(count < 12.5, 0.01 * count / 12.5, cosine(count - 12.5)),
            (adamjax.warmup(cosine, steps=50), adamjax.warmup(cosine, steps=12)),
        ),
    ):
        optimizer = keras.optimizers.Adam(schedule)
        optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
        for count in (60, 0):
            optimizer.iterations.assign(count)
            convert.from_keras(optimizer, adamjax.adam(right), params)
        for other in others:
            with pytest.raises(ValueError, match=r"Keras has a learning rate of"):
                convert.from_keras(optimizer, adamjax.adam(other), params)


def test_variables_of_keras_without_a_rate_show_a_schedule(keras):
    """A constant rate has a variable, `adam/learning_rate`; a schedule has none."""
    params, cosine = {"w": jnp.ones(3)}, adamjax.cosine_decay(0.1, 1000)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 1000))
    optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
    current = [(v.path, np.asarray(v)) for v in optimizer.variables]
    of_tf_keras = [("iteration:0", np.array(0)), ("current_learning_rate:0", np.float32(0.1))]
    of_tf_keras += [(f"Adam/{slot}/w:0", np.zeros(3)) for slot in "mv"]
    constant, arrays = adamjax.adam(0.1), [x for _, x in current]
    numbered = {str(i): x for i, x in enumerate(arrays)}
    for variables in (optimizer.variables, dict(current), numbered, arrays, of_tf_keras):
        for tx in (constant, adamjax.chain(adamjax.scale_by_adam(), adamjax.scale(-0.1))):
            with pytest.raises(
                ValueError, match=r"follows a schedule .* tx has a constant one: bu"
            ):
                convert.from_keras(variables, tx, params)
        for tx in (
            adamjax.adam(cosine),
            adamjax.adam(adamjax.constant(0.1)),
            adamjax.adam(adamjax.by_path([("w", cosine)], default=0.1)),
            adamjax.with_hyperparams(constant, learning_rate=0.1),
        ):
            convert.from_keras(variables, tx, params)
        with pytest.raises(ValueError, match=r"a learning rate for all leaves, tx has none for a"):
            convert.from_keras(variables, adamjax.scale_by_adam(), params)
        convert.from_keras(variables, constant, params, check=False)
        with pytest.raises(ValueError, match=r"to_keras: .*follows a schedule"):
            convert.to_keras(constant.init(params), constant, params, variables)
    # The arrays of tf_keras and older releases never contain a rate. tf_keras has int64 iterations,
    # and releases before TensorFlow 2.11 have all momenta before all velocities.
    convert.from_keras([np.array(0, np.int64), *arrays[1:]], constant, params)
    two = [np.array(0, np.int32), *[np.zeros(n) for n in (2, 3, 2, 3)]]
    convert.from_keras(two, constant, {"a": jnp.ones(2), "b": jnp.ones(3)})


def test_counts_that_differ_do_not_go_to_keras(keras):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    optimizer = keras.optimizers.Adam(schedule)
    optimizer.build([keras.Variable(np.ones(3), name=name) for name in KERAS_PARAMS])
    tx = adamjax.chain(adamjax.skip_not_finite(KERAS_RULE), adamjax.scale_by_learning_rate(HALVING))
    state = tx.init(KERAS_PARAMS)
    _, state = tx.update(KERAS_PARAMS, state, KERAS_PARAMS)
    convert.to_keras(state, tx, KERAS_PARAMS, optimizer)
    nan = jax.tree.map(lambda x: x * jnp.nan, KERAS_PARAMS)
    _, state = tx.update(nan, state, KERAS_PARAMS)
    with pytest.raises(ValueError, match="has counted 2 steps and the rule 1, but Keras has one"):
        convert.to_keras(state, tx, KERAS_PARAMS, optimizer)
    convert.to_keras(state, tx, KERAS_PARAMS, optimizer, check=False)


# --- weight decay and frozen variables ------------------------------------------------------------


def test_variables_that_keras_excludes_from_decay_must_be_masked(keras, x64):
    """The exclusions are compared with the mask of tx, if the optimizer itself is passed."""

    def make(k):
        optimizer = k.AdamW(RATE, weight_decay=0.125)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    masked = adamjax.adamw(RATE, weight_decay=0.125, mask="^(?!.*bias)")
    of_all = adamjax.adamw(RATE, weight_decay=0.125)
    noises, theirs = new_noises(), KerasRun(keras, make, new_params())
    theirs.run(noises[:STEPS_BEFORE])
    middle = theirs.params
    with pytest.raises(ValueError, match=r"'head/bias'.* decay of 0, .*mask= of the leaves"):
        convert.from_keras(theirs.optimizer, of_all, middle)
    # `load_model` loses the exclusions, because no config contains them.
    reloaded = KerasRun(keras, lambda k: k.AdamW(RATE, weight_decay=0.125), new_params())
    with pytest.raises(ValueError, match=r"'head/bias'.*load_model.*exclude_from_weight_decay"):
        convert.from_keras(reloaded.optimizer, masked, middle)
    state = convert.from_keras(theirs.optimizer, masked, middle)
    actual, state = run_adamjax(masked, middle, state, noises[STEPS_BEFORE:])
    assert_close(actual, theirs.run(noises[STEPS_BEFORE:]), rtol=1e-12)
    decays_all = KerasRun(keras, lambda k: k.AdamW(RATE, weight_decay=0.125), new_params())
    with pytest.raises(ValueError, match=r"a weight decay of 0\.125.*with a mask= that this leaf"):
        convert.from_keras(decays_all.optimizer, masked, middle)
    # Keras names what is excluded, and adamjax what decays. Masks of other leaves are refused.
    for mask in ("bias", "embed", "^(?!.*embed)"):
        wrong = adamjax.adamw(RATE, weight_decay=0.125, mask=mask)
        with pytest.raises(ValueError, match=r"weight decay of 0\.125, tx has 0 before .* mask="):
            convert.from_keras(theirs.optimizer, wrong, middle)
    # An optimizer without a weight decay.
    plain = KerasRun(keras, lambda k: k.Adam(RATE), new_params())
    with pytest.raises(ValueError, match=r"has a weight decay of 0, .*leave the decay out"):
        convert.from_keras(plain.optimizer, of_all, middle)


def test_a_decay_of_keras_follows_the_schedule_of_the_rate(keras):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([8], [0.1, 0.02])
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.3)
    optimizer.build([keras.Variable(np.ones(3, np.float32), name=name) for name in KERAS_PARAMS])
    decay, rate = adamjax.add_decayed_weights(0.3), adamjax.scale_by_learning_rate
    steps = adamjax.piecewise_constant([8], [0.1, 0.02])
    convert.from_keras(optimizer, adamjax.chain(KERAS_RULE, decay, rate(steps)), KERAS_PARAMS)
    factors = adamjax.piecewise_constant([8], [1.0, 0.2])
    tx = adamjax.chain(KERAS_RULE, adamjax.scale(-1.0), rate(factors), decay, rate(0.1))
    with pytest.raises(
        ValueError, match=r"in each step, 0.3, tx has .*with a schedule of the rate between"
    ):
        convert.from_keras(optimizer, tx, KERAS_PARAMS)


def test_a_frozen_variable_of_keras_must_not_move(keras):
    zero, params = adamjax.set_to_zero(), KERAS_PARAMS
    variables = [keras.Variable(np.ones(3, np.float32), name=name) for name in params]
    optimizer = keras_optimizer(keras, 3, "AdamW", variables, weight_decay=0.3)
    adamw = adamjax.adamw(0.1, weight_decay=0.3)
    convert.from_keras(optimizer, adamw, params)
    variables[1].trainable = False
    for tx in (
        adamw,
        KERAS_RULE,
        adamjax.chain(
            KERAS_RULE,
            adamjax.masked(zero, "v1"),
            adamjax.add_decayed_weights(0.3),
            adamjax.scale_by_learning_rate(0.1),
        ),
    ):
        tx = tx if tx is adamw else adamjax.partition([("v1", tx)], default=adamw)
        for call in (
            lambda tx=tx: convert.from_keras(optimizer, tx, params),
            lambda tx=tx: convert.to_keras(tx.init(params), tx, params, optimizer),
        ):
            message = r"'v1': Keras has a variable with trainable=False, tx has .*give None for it"
            with pytest.raises(ValueError, match=message):
                call()
    frozen_by_tx = adamjax.chain(adamw, adamjax.masked(zero, "v1"))
    state = convert.from_keras(optimizer, frozen_by_tx, params)
    convert.to_keras(state, frozen_by_tx, params, optimizer)
    without_v1 = adamjax.partition([("v1", zero)], default=adamw)
    state = convert.from_keras(optimizer, without_v1, params, order=["v0", None])
    convert.to_keras(state, without_v1, params, optimizer, order=["v0", None])


# --- averages -------------------------------------------------------------------------------------


def test_a_keras_average_before_the_first_step_is_refused(keras, x64):
    make, make_ours = KERAS_AND_ADAMJAX["amsgrad, average"]
    theirs = KerasRun(keras, make, new_params())
    args = theirs.optimizer.variables, make_ours(), theirs.params
    with pytest.raises(ValueError, match="in its first step Keras 3 sets its average"):
        convert.from_keras(*args)
    state = convert.from_keras(*args, check=False)
    assert_same(adamjax.averaged_weights(state), theirs.params)
    # to_keras refuses a state that has taken no step for the same reason.
    with pytest.raises(ValueError, match="in its first step Keras 3 sets its average"):
        convert.to_keras(state, args[1], theirs.params, theirs.optimizer)
    theirs.run(new_noises()[:1])
    state = convert.from_keras(theirs.optimizer.variables, make_ours(), theirs.params)
    assert_close(adamjax.averaged_weights(state), theirs.params, rtol=1e-15)


def test_a_keras_average_amid_the_first_step_is_refused(keras):
    """Keras counts steps, so each micro-batch of the first step copies the weights."""
    options = {"use_ema": True, "ema_momentum": 0.5, "gradient_accumulation_steps": 3}
    optimizer = keras.optimizers.Adam(0.1, **options)
    w = keras.Variable(np.ones(3, np.float32), name="w")
    optimizer.build([w])
    config = {"learning_rate": 0.1, "loss_scale_factor": None, **options}
    tx = adamjax.from_config({"class_name": "Adam", "config": config})
    for micro in range(1, 4):
        optimizer.apply([keras.ops.convert_to_tensor(np.full(3, micro, np.float32))], [w])
        params = {"w": jnp.asarray(w.value)}
        if micro < 3:
            with pytest.raises(ValueError, match="in its first step Keras 3 sets its average"):
                convert.from_keras(optimizer, tx, params)
    assert_same(adamjax.averaged_weights(convert.from_keras(optimizer, tx, params)), params)


def test_a_keras_average_is_not_dropped(keras):
    optimizer = keras_optimizer(keras, 2, use_ema=True, ema_momentum=0.5)
    average = adamjax.weight_ema(0.5)
    some = adamjax.chain(adamjax.adam(0.1), adamjax.masked(average, "v0"))
    with pytest.raises(ValueError, match=r"an average of 'v1', but tx has no weight_ema"):
        convert.from_keras(optimizer, some, KERAS_PARAMS)
    tx = adamjax.chain(adamjax.adam(0.1), average)
    state = convert.from_keras(optimizer, tx, KERAS_PARAMS)
    with pytest.raises(ValueError, match=r"has an average of the weights, but the optimizer has n"):
        convert.to_keras(state, tx, KERAS_PARAMS, keras_optimizer(keras))
    convert.to_keras(state, tx, KERAS_PARAMS, keras_optimizer(keras), check=False)


def test_an_average_of_a_leaf_that_keras_does_not_have_is_refused(keras):
    optimizer = keras_optimizer(keras, 2, use_ema=True, ema_momentum=0.5)
    order = ["v0", "v1"]
    params = {**KERAS_PARAMS, "extra": jnp.ones(2)}
    adam, average, zero = adamjax.adam(0.1), adamjax.weight_ema(0.5), adamjax.set_to_zero()
    outside = adamjax.chain(adamjax.partition([("extra", zero)], default=adam), average)
    with pytest.raises(ValueError, match=r"lacks the average of 'extra': put weight_ema inside "):
        convert.from_keras(optimizer, outside, params, order=order)
    inside = adamjax.partition([("extra", zero)], default=adamjax.chain(adam, average))
    convert.from_keras(optimizer, inside, params, order=order)


def test_a_frozen_variable_that_keras_averages_is_not_left_out(keras):
    optimizer, variables = built_on_two(keras, use_ema=True, ema_momentum=0.9)
    optimizer.apply([keras.ops.ones(3)] * 2)
    optimizer.apply([keras.ops.ones(3)] * 2)
    variables[1].trainable = False
    adam, zero, ema = adamjax.adam(0.1), adamjax.set_to_zero(), adamjax.weight_ema(0.9)
    left_out = adamjax.partition([("v1", zero)], default=adamjax.chain(adam, ema))
    with pytest.raises(ValueError, match=r"averages 'v1' \(use_ema\) although"):
        convert.from_keras(optimizer, left_out, KERAS_PARAMS, order=["v0", None])
    right = adamjax.chain(adam, adamjax.masked(zero, "v1"), ema)
    convert.from_keras(optimizer, right, KERAS_PARAMS)


# --- the product of Nadam -------------------------------------------------------------------------


def test_the_product_of_nadam_is_computed_if_it_is_no_variable(keras, x64):
    """The variables of tf_keras do not contain the product of momenta."""
    make, make_ours = KERAS_AND_ADAMJAX["nadam"]
    theirs = KerasRun(keras, make, new_params())
    theirs.run(new_noises()[:STEPS_BEFORE])
    *variables, product = theirs.optimizer.variables
    name_of_tf = functools.partial(re.sub, r"nadam\w*/(.*)_(m|v)[a-z]+$", r"Nadam/\2/\1")
    pairs = [(name_of_tf(v.path), np.asarray(v.value)) for v in variables]
    assert sum(name.startswith("Nadam/m/") for name, _ in pairs) == 3
    state = convert.from_keras(pairs, make_ours(), theirs.params)
    assert_close(state[0].momentum_product, jnp.asarray(product.value), rtol=1e-6)
    with pytest.raises(ValueError, match=r"outside of its variables: pass check=False, and set"):
        convert.to_keras(state, make_ours(), theirs.params, pairs)
    convert.to_keras(make_ours().init(theirs.params), make_ours(), theirs.params, pairs)


def test_variables_of_keras_without_the_product_of_nadam_are_refused(keras, x64):
    """Those of the inner optimizer of a LossScaleOptimizer. They do not show if it is lost."""
    ours, params, inner = adamjax.nadam(RATE), new_params(), keras.optimizers.Nadam(RATE)
    theirs = KerasRun(keras, lambda k: k.LossScaleOptimizer(inner), params)
    convert.from_keras(inner.variables, ours, params)
    theirs.run(new_noises()[:STEPS_BEFORE])
    for variables in (inner.variables, {v.path: np.asarray(v.value) for v in inner.variables}):
        with pytest.raises(ValueError, match=r"lack the product .* pass the optimizer itself"):
            convert.from_keras(variables, ours, params)
        convert.from_keras(variables, ours, params, check=False)


def test_a_product_that_keras_has_lost_is_refused(keras, x64):
    """In LossScaleOptimizer, Keras forgets the product between the steps of fit under JAX."""
    ours, params, noises = adamjax.nadam(RATE), new_params(), new_noises()
    inner = keras.optimizers.Nadam(RATE)
    theirs = KerasRun(keras, lambda k: k.LossScaleOptimizer(inner), params)
    convert.from_keras(inner, ours, params)
    theirs.run(noises[:STEPS_BEFORE])
    with pytest.raises(ValueError, match=r"has lost it: it is 1 after .*LossScaleOptimizer, fit"):
        convert.from_keras(inner, ours, params)
    right = convert.from_keras(inner, ours, params, check=False)[0].momentum_product
    inner._u_product.assign(right)
    assert_same(convert.from_keras(inner, ours, params)[0].momentum_product, right)


def product_of_momenta(decay, b1=0.9):
    """The product after 7 steps; `adamjax.nadam` has a decay of 1."""
    return np.prod([b1 * (1 - 0.5 * 0.96 ** (decay * t)) for t in range(1, 8)])


@pytest.mark.parametrize(
    "product",
    [product_of_momenta(0.004), product_of_momenta(1, 0.8), np.nan],
    ids=["legacy", "b1", "nan"],
)
def test_a_product_of_other_momenta_is_refused(product):
    """Only the product shows that Keras' legacy Nadam has another schedule of its momentum."""
    tx, params = adamjax.nadam(RATE), {"w": jnp.ones(2)}
    names = ("iter", "momentum_cache", "w/m", "w/v")

    def variables_with(product):
        values = (np.array(7), np.float32(product), np.full(2, 0.5, "f"), np.ones(2, "f"))
        return [(f"Nadam/{name}:0", x) for name, x in zip(names, values, strict=True)]

    state = convert.from_keras(variables_with(product_of_momenta(1)), tx, params)
    assert_same(state[0].momentum_product, jnp.float32(product_of_momenta(1)))
    with pytest.raises(ValueError, match=r"from_keras: the product of momenta is .* after 7 steps"):
        convert.from_keras(variables_with(product), tx, params)
    convert.from_keras(variables_with(product), tx, params, check=False)


# --- optimizers before TensorFlow 2.11, and tf_keras ----------------------------------------------


class OldAdam:
    """An Adam of Keras before 2.11, with the attributes that conversions read."""

    __module__ = "keras.optimizers.legacy.adam"
    clipnorm = clipvalue = global_clipnorm = None
    beta_1, beta_2, epsilon, amsgrad = 0.9, 0.999, 1e-7, False

    def __init__(self, rate, decay=0.0, prefix="Adam/"):
        self._hyper = {"learning_rate": rate, "decay": decay}
        names = [f"{prefix}{leaf}/{slot}:0" for slot in "mv" for leaf in ("a/kernel", "b/kernel")]
        self.saved = [("iter:0", np.array(3)), *((name, np.zeros(2)) for name in names)]

    def get_config(self):
        return {}

    def variables(self):
        return self.saved


OldAdam.__name__ = "Adam"


@pytest.mark.parametrize("prefix", ["Adam/", ""], ids=["new", "after load_model"])
def test_rates_and_names_of_old_keras_optimizers_are_read(prefix):
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    decayed = adamjax.inverse_time_decay(0.1, 1, 0.5)
    schedule_class = type("LearningRateSchedule", (), {"__call__": lambda self, n: 0.1 / (n + 1)})
    for old, right, other in (
        (OldAdam(0.1, prefix=prefix), 0.1, 0.2),
        (OldAdam(np.float32(0.1), 0.5, prefix=prefix), decayed, 0.1),
        (OldAdam(schedule_class(), prefix=prefix), lambda n: 0.1 / (n + 1), 0.1),
        (
            OldAdam(schedule_class(), 0.5, prefix=prefix),
            lambda n: 0.1 / (n + 1) / (1 + 0.5 * n),
            lambda n: 0.1 / (n + 1),
        ),
        (OldAdam(lambda: 0.1, prefix=prefix), adamjax.constant(0.1), 0.2),
    ):
        state = convert.from_keras(old, adamjax.adam(right), params)
        assert adamjax.step_count(state) == 3
        with pytest.raises(ValueError, match=r"Keras has a learning rate of"):
            convert.from_keras(old, adamjax.adam(other), params)


@pytest.mark.parametrize("name", ["_exclude_from_weight_decay", "_exclude_from_weight_decay_names"])
def test_variables_that_tf_keras_excludes_from_decay_must_be_masked(name):
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    old = OldAdam(0.1)
    old.weight_decay, old._use_weight_decay = 0.01, lambda variable: True
    setattr(old, name, ["b"])
    convert.from_keras(old, adamjax.adamw(0.1, weight_decay=0.01, mask="^a"), params)
    with pytest.raises(ValueError, match="variables that its weight decay excludes"):
        convert.from_keras(old, adamjax.adamw(0.1, weight_decay=0.01), params)


def test_a_product_that_is_no_variable_of_tf_keras_is_not_lost():
    params, tx = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}, adamjax.nadam(0.1)
    target = type("Nadam", (OldAdam,), {"__module__": OldAdam.__module__})(0.1)
    target._u_product = 1.0
    with pytest.raises(ValueError, match=r"check=False, .*_u_product\.assign\(1\).*forgets"):
        convert.to_keras(tx.init(params), tx, params, target)
    convert.to_keras(tx.init(params), tx, params, target, check=False)
