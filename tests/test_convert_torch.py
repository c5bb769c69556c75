"""Conversions from torch and to it: state dicts, groups, names and layouts of parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conversions import (
    PARAMS,
    PATHS,
    RATE,
    STEPS_BEFORE,
    TWO_LEAVES,
    adam_like_optax,
    fresh_torch,
    gradient,
    new_noises,
    new_params,
    numbered_torch,
    plain_torch_dict,
    rows_of_step,
    run_adamjax,
    run_dense,
    run_exact_rows,
    torch_after_a_step,
    torch_state_dict,
    torch_with_moments,
    zero_other_rows,
)
from support import assert_close, assert_same

import adamjax
from adamjax import convert

# --- runs that change their optimizer -------------------------------------------------------------


# Options of to_torch for a target before its first step, which shows no order and no transposition.
FRESH_OPTIONS = {"order": PATHS, "adapt": lambda path, x: x}


def negated(*transforms):
    return adamjax.chain(adamjax.scale(-1.0), *transforms)


# For each case, functions that make an optimizer of torch and the transform of adamjax.
TORCH_AND_ADAMJAX = {
    "adam": (lambda o, ps: o.Adam(ps, RATE), lambda: adamjax.adam(RATE, eps=1e-8)),
    "adam, decay in the gradient": (
        lambda o, ps: o.Adam(ps, RATE, eps=1e-2, weight_decay=0.1),
        lambda: adamjax.chain(adamjax.add_decayed_weights(0.1), adamjax.adam(RATE, eps=1e-2)),
    ),
    "amsgrad": (
        lambda o, ps: o.Adam(ps, RATE, amsgrad=True),
        lambda: adamjax.amsgrad(RATE, eps=1e-8),
    ),
    "adamw": (
        lambda o, ps: o.AdamW(ps, RATE, (0.8, 0.95), weight_decay=0.1),
        lambda: adamjax.adamw(RATE, 0.8, 0.95, eps=1e-8, weight_decay=0.1),
    ),
    "adamw, amsgrad, maximize": (
        lambda o, ps: o.AdamW(ps, RATE, weight_decay=0.1, amsgrad=True, maximize=True),
        lambda: negated(
            adamjax.scale_by_amsgrad(eps=1e-8),
            adamjax.add_decayed_weights(0.1),
            adamjax.scale_by_learning_rate(RATE),
        ),
    ),
    "adamax": (
        lambda o, ps: o.Adamax(ps, RATE, eps=1e-30),
        lambda: adamjax.adamax(RATE, eps=1e-30),
    ),
    "nadam": (
        lambda o, ps: o.NAdam(ps, RATE, momentum_decay=1.0),
        lambda: adamjax.nadam(RATE, eps=1e-8),
    ),
}


class TorchRun:
    """An optimizer of torch and its parameters, in the order of these paths."""

    def __init__(self, torch, make, params, order=PATHS):
        self.torch, self.treedef = torch, jax.tree.structure(params)
        leaves = dict(zip(PATHS, jax.tree.leaves(params), strict=True))
        self.parameters = {
            path: torch.nn.Parameter(torch.from_numpy(np.array(leaves[path]))) for path in order
        }
        self.optimizer = make(torch.optim, list(self.parameters.values()))

    @property
    def params(self):
        return self.treedef.unflatten([self.parameters[p].detach().numpy().copy() for p in PATHS])

    def run(self, noises, after_each=lambda: None, sparse=False):
        trajectory = []
        for step, n in enumerate(noises):
            for path, x in zip(PATHS, jax.tree.leaves(n), strict=True):
                p = self.parameters[path]
                p.grad = gradient(p.detach(), self.torch.from_numpy(np.array(x)))
                if sparse:
                    p.grad = self._sparse(p.grad, rows_of_step(step) % len(p))
            self.optimizer.step()
            after_each()
            trajectory.append(jax.tree.map(jnp.asarray, self.params))
        return trajectory

    def _sparse(self, g, rows):
        rows = self.torch.from_numpy(np.unique(rows))
        return self.torch.sparse_coo_tensor(rows[None], g[rows], g.shape, check_invariants=True)

    def load(self, state_dict):
        def tensors(x):
            return self.torch.from_numpy(x) if isinstance(x, np.ndarray) else x

        self.optimizer.load_state_dict(jax.tree.map(tensors, state_dict))


# torch keeps the product of momenta in float32.
TORCH_RTOL = {"nadam": 1e-10}


@pytest.mark.parametrize("name", TORCH_AND_ADAMJAX)
@pytest.mark.slow
def test_a_run_continues_from_torch(name, torch, x64):
    make, make_ours = TORCH_AND_ADAMJAX[name]
    ours, noises = make_ours(), new_noises()
    theirs = TorchRun(torch, make, new_params())
    theirs.run(noises[:STEPS_BEFORE])
    middle = jax.tree.map(jnp.asarray, theirs.params)
    state = convert.from_torch(theirs.optimizer.state_dict(), ours, middle)
    expected = theirs.run(noises[STEPS_BEFORE:])
    actual, _ = run_adamjax(ours, middle, state, noises[STEPS_BEFORE:])
    assert_close(actual, expected, rtol=TORCH_RTOL.get(name, 1e-12))


@pytest.mark.parametrize("name", TORCH_AND_ADAMJAX)
def test_a_run_continues_in_torch(name, torch, x64):
    make, make_ours = TORCH_AND_ADAMJAX[name]
    ours, noises, params = make_ours(), new_noises(), new_params()
    (*_, middle), state = run_adamjax(ours, params, ours.init(params), noises[:STEPS_BEFORE])
    expected, _ = run_adamjax(ours, middle, state, noises[STEPS_BEFORE:])
    theirs = TorchRun(torch, make, middle)
    target = theirs.optimizer.state_dict()
    theirs.load(convert.to_torch(state, ours, middle, target, **FRESH_OPTIONS))
    assert_close(theirs.run(noises[STEPS_BEFORE:]), expected, rtol=TORCH_RTOL.get(name, 1e-12))


# The parameters of two groups, which are not in the order of the leaves.
GROUPED_PATHS = ["head/kernel", "embed/table", "head/bias"]


def adamw_with_groups(o, ps):
    groups = [
        {"params": [ps[0]], "weight_decay": 0.1},
        {"params": ps[1:], "lr": 0.03, "weight_decay": 0.0},
    ]
    return o.AdamW(groups, RATE)


def adamw_like_groups(rate):
    return adamjax.adamw(rate, eps=1e-8, weight_decay=0.1, mask="kernel$")


def test_a_run_with_groups_and_a_scheduler_continues(torch, x64):
    noises = new_noises()
    theirs = TorchRun(torch, adamw_with_groups, new_params(), GROUPED_PATHS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs.optimizer, lambda t: 1 / (1 + 0.1 * t))
    theirs.run(noises[:STEPS_BEFORE], scheduler.step)
    middle = jax.tree.map(jnp.asarray, theirs.params)
    rates = [adamjax.inverse_time_decay(lr, 1, 0.1) for lr in (RATE, 0.03)]
    ours = adamw_like_groups(adamjax.by_path([("kernel$", rates[0])], default=rates[1]))
    old = theirs.optimizer.state_dict()
    state = convert.from_torch(old, ours, middle, order=GROUPED_PATHS)
    expected = theirs.run(noises[STEPS_BEFORE:], scheduler.step)
    actual, after = run_adamjax(ours, middle, state, noises[STEPS_BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    back = convert.to_torch(
        after, ours, actual[-1], theirs.optimizer.state_dict(), order=GROUPED_PATHS
    )
    for key, leaf_state in theirs.optimizer.state_dict()["state"].items():
        for name, x in leaf_state.items():
            assert_close(back["state"][key][name], x.numpy(), rtol=1e-12)
    for order, problem in [
        (PATHS, r"m of 'embed/table' has shape \[3, 4\], expected \[6, 3\]"),
        (GROUPED_PATHS[:2], r"3 parameters, but order has 2"),
        (
            [*GROUPED_PATHS[:2], "head/gain"],
            r"the leaf 'head/gain', but params has no float leaf there",
        ),
    ]:
        with pytest.raises(ValueError, match=problem):
            convert.from_torch(old, ours, middle, order=order)
    with pytest.raises(
        ValueError, match=r"'head/kernel': torch has a learning rate of 0.03125, tx"
    ):
        convert.from_torch(old, adamw_like_groups(0.01), middle, order=GROUPED_PATHS)


def test_a_run_with_a_transposed_kernel_continues(torch, x64):
    noises, ours = new_noises(), adamjax.adam(RATE, eps=1e-8)

    def transpose(path, x):
        return x.T if path == "head/kernel" else x

    def with_transposed_kernel(tree):
        return {**tree, "head": {**tree["head"], "kernel": tree["head"]["kernel"].T}}

    theirs = TorchRun(torch, TORCH_AND_ADAMJAX["adam"][0], with_transposed_kernel(new_params()))
    theirs.run([with_transposed_kernel(n) for n in noises[:STEPS_BEFORE]])
    middle = jax.tree.map(jnp.asarray, with_transposed_kernel(theirs.params))
    old = theirs.optimizer.state_dict()
    state = convert.from_torch(old, ours, middle, adapt=transpose)
    expected = [
        with_transposed_kernel(p)
        for p in theirs.run([with_transposed_kernel(n) for n in noises[STEPS_BEFORE:]])
    ]
    actual, after = run_adamjax(ours, middle, state, noises[STEPS_BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    back = convert.to_torch(after, ours, middle, theirs.optimizer.state_dict(), adapt=transpose)
    kernel = theirs.optimizer.state_dict()["state"][2]["exp_avg"].numpy()
    assert_close(back["state"][2]["exp_avg"], kernel, rtol=1e-12)
    with pytest.raises(ValueError, match=r"m of 'head/kernel' has shape \[4, 3\]"):
        convert.from_torch(old, ours, middle)


def run_lazy(tx, params, state, noises):
    trajectory = []
    for step, n in enumerate(noises):
        grads = jax.tree.map(gradient, params, n)
        grads = jax.tree.map(
            lambda g, s=step: adamjax.row_gradient(
                jnp.asarray(np.unique(rows_of_step(s) % len(g))),
                g[np.unique(rows_of_step(s) % len(g))],
                len(g),
            ),
            grads,
        )
        updates, state = tx.update(grads, state, params)
        params = adamjax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


@pytest.mark.slow
def test_a_run_of_sparse_adam_continues_with_lazy_rows(torch, x64):
    noises = new_noises()
    theirs = TorchRun(torch, lambda o, ps: o.SparseAdam(ps, RATE), new_params())
    ours = adamjax.adam(RATE, eps_hat=1e-8, rows="lazy")
    theirs.run(noises[:STEPS_BEFORE], sparse=True)
    middle = jax.tree.map(jnp.asarray, theirs.params)
    old = theirs.optimizer.state_dict()
    state = convert.from_torch(old, ours, middle)
    new = TorchRun(torch, lambda o, ps: o.SparseAdam(ps, RATE), middle)
    new.load(convert.to_torch(state, ours, middle, new.optimizer.state_dict(), **FRESH_OPTIONS))
    expected = theirs.run(noises[STEPS_BEFORE:], sparse=True)
    actual, _ = run_lazy(ours, middle, state, noises[STEPS_BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    assert_close(new.run(noises[STEPS_BEFORE:], sparse=True), expected, rtol=1e-15)
    with pytest.raises(ValueError, match=r"added to the uncorrected root \(eps_hat=1e-08\)"):
        convert.from_torch(old, adamjax.adam(RATE, eps=1e-8, rows="lazy"), middle)
    # From here on, rows without a gradient move, in exact_rows as under the dense rule.
    dense = adamjax.adam(RATE, eps_hat=1e-8)
    exact = adamjax.exact_rows(dense, "^embed", history=2048)
    with pytest.raises(ValueError, match=r"stand still without a gradient, tx has exact_rows"):
        convert.from_torch(old, exact, middle)
    state = convert.from_torch(old, exact, middle, check=False)
    actual, _ = run_exact_rows(exact, middle, state, noises[STEPS_BEFORE:])
    state = convert.from_torch(old, dense, middle, check=False)
    expected, _ = run_dense(dense, middle, state, noises[STEPS_BEFORE:])
    assert_close(actual, expected, rtol=1e-8)


@pytest.mark.slow
def test_a_run_of_torch_continues_in_exact_rows(torch, x64):
    noises = new_noises()
    theirs = TorchRun(
        torch, lambda o, ps: o.AdamW(ps, RATE, weight_decay=0.1, amsgrad=True), new_params()
    )
    rule = adamjax.scale_by_amsgrad(eps=1e-8)
    tail = (adamjax.add_decayed_weights(0.1), adamjax.scale_by_learning_rate(RATE))
    ours = adamjax.exact_rows(adamjax.chain(rule, *tail), "^embed", history=2048)
    theirs.run(noises[:STEPS_BEFORE])
    middle = jax.tree.map(jnp.asarray, theirs.params)
    state = convert.from_torch(theirs.optimizer.state_dict(), ours, middle)
    for step, n in enumerate(noises[STEPS_BEFORE:]):
        grads = zero_other_rows(jax.tree.map(gradient, theirs.params, n), step)
        for path, g in zip(PATHS, jax.tree.leaves(grads), strict=True):
            theirs.parameters[path].grad = torch.from_numpy(np.array(g))
        theirs.optimizer.step()
    actual, after = run_exact_rows(ours, middle, state, noises[STEPS_BEFORE:])
    assert_close(actual, jax.tree.map(jnp.asarray, theirs.params), rtol=1e-8)
    back = convert.to_torch(after, ours, actual, theirs.optimizer.state_dict())
    for key, leaf_state in theirs.optimizer.state_dict()["state"].items():
        for name, x in leaf_state.items():
            assert_close(back["state"][key][name], x.numpy(), rtol=1e-8)


def test_float32_and_bfloat16_tensors_are_converted(torch):
    """float32 runs differ by rounding only. torch cannot make NumPy arrays of bfloat16 tensors."""
    noises = new_noises(dtype=np.float32)
    theirs = TorchRun(torch, TORCH_AND_ADAMJAX["adam"][0], new_params(np.float32))
    ours = adamjax.adam(RATE, eps=1e-8)
    theirs.run(noises[:STEPS_BEFORE])
    middle = jax.tree.map(jnp.asarray, theirs.params)
    state = convert.from_torch(theirs.optimizer.state_dict(), ours, middle)
    actual, _ = run_adamjax(ours, middle, state, noises[STEPS_BEFORE:])
    # torch computes its scalars in float64, so the rounding errors of twenty steps remain.
    assert_close(actual, theirs.run(noises[STEPS_BEFORE:]), rtol=2e-6)
    for p in theirs.parameters.values():
        p.data, p.grad = p.data.bfloat16(), p.data.bfloat16()
    theirs.optimizer = torch.optim.Adam(theirs.parameters.values(), RATE)
    theirs.optimizer.step()
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), middle)
    state = convert.from_torch(theirs.optimizer.state_dict(), ours, low)
    m = theirs.optimizer.state_dict()["state"][1]["exp_avg"]
    assert_same(adamjax.get_slot(state, "m")["head"]["bias"], jnp.asarray(m.float().numpy()))
    back = convert.to_torch(state, ours, low, theirs.optimizer.state_dict())
    theirs.load(back)
    assert theirs.optimizer.state_dict()["state"][1]["exp_avg"].dtype is torch.bfloat16
    assert torch.equal(theirs.optimizer.state_dict()["state"][1]["exp_avg"], m)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fused_steps_of_torch_continue_from_converted_moments(layout, torch):
    """torch's fused step is wrong if moments have another layout in memory than the parameter."""
    memory_format = {
        "contiguous": torch.contiguous_format,
        "channels_last": torch.channels_last,
    }[layout]
    grads = np.random.default_rng(0).normal(size=(9, 2, 3, 2, 2)).astype(np.float32)

    def of_torch(kernel):
        return np.transpose(kernel, (3, 2, 0, 1))

    def of_jax(weight):
        return np.transpose(weight, (2, 3, 1, 0))

    def new():
        p = torch.nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=memory_format))
        return p, torch.optim.Adam([p], lr=0.1, fused=True)

    def train(p, optimizer, grads):
        for g in grads:
            p.grad = torch.tensor(g).to(memory_format=memory_format)
            optimizer.step()

    p, optimizer = new()
    train(p, optimizer, grads[:3])
    tx, params = adamjax.adam(0.1, eps=1e-8), {"kernel": jnp.array(of_jax(p.detach().numpy()))}
    state = convert.from_torch(
        optimizer.state_dict(), tx, params, adapt=lambda path, x: np.transpose(x, (2, 3, 1, 0))
    )
    other, other_optimizer = new()
    train(other, other_optimizer, grads[:1])  # so that the target shows the layout of moments
    new_state = convert.to_torch(
        state, tx, params, other_optimizer.state_dict(), adapt=lambda path, x: of_torch(x)
    )
    other_optimizer.load_state_dict(
        jax.tree.map(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, new_state)
    )
    with torch.no_grad():
        other.copy_(torch.from_numpy(of_torch(np.array(params["kernel"])).copy()))
    for one in ((p, optimizer), (other, other_optimizer)):
        train(*one, grads[3:])
    assert_close(other.detach().numpy(), p.detach().numpy(), rtol=1e-6)


# --- which optimizers are converted ---------------------------------------------------------------


def torch_after_two_steps(name, named=False, **options):
    """A state dict of torch after two steps."""
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = getattr(torch.optim, name)([("w", w)] if named else [w], lr=0.1, **options)
    for scale in (1.0, -0.5):
        w.grad = scale * torch.arange(6.0).reshape(3, 2)
        if name == "SparseAdam":
            w.grad = w.grad.to_sparse(1)
        optimizer.step(*([lambda: w.sum()] if name == "LBFGS" else []))
    return optimizer.state_dict()


ADAMS_OF_TORCH = {
    "Adam": lambda: adamjax.adam(0.1, eps=1e-8),
    "AdamW": lambda: adamjax.adamw(0.1, eps=1e-8, weight_decay=0.01),
    "Adamax": lambda: adamjax.adamax(0.1, eps=1e-8),
    "SparseAdam": lambda: adamjax.adam(0.1, eps_hat=1e-8, rows="lazy"),
}


@pytest.mark.parametrize("gradients", ["none", "zeros"])
def test_adamax_of_torch_without_a_gradient_so_far(gradients, torch):
    """For gradients of 0.01, an epsilon of 1e-8 makes a difference of 1e-6."""
    params = {"w": jnp.ones(3)}
    for eps in (1e-8, 1e-3):
        w = torch.nn.Parameter(torch.ones(3))
        optimizer, tx = torch.optim.Adamax([w], 0.1, eps=eps), adamjax.adamax(0.1, eps=eps)
        if gradients == "zeros":
            w.grad = torch.zeros(3)
            optimizer.step()
        old = optimizer.state_dict()
        if eps == 1e-8:
            convert.from_torch(old, tx, params, order=["w"])
            continue
        with pytest.raises(ValueError, match=r"for gradients of 0.01.*may differ by 10% between"):
            convert.from_torch(old, tx, params, order=["w"])
        with pytest.raises(ValueError, match=r"for gradients of 0.01.*may differ by 10% between"):
            convert.to_torch(tx.init(params), tx, params, old, order=["w"])


def test_adamax_of_torch_with_elements_without_a_gradient_so_far(torch):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adamax([w], 0.1, eps=1e-4)
    w.grad = torch.tensor([100.0, 100.0, 0.0])
    optimizer.step()
    tx, params = adamjax.adamax(0.1, eps=1e-4), {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"or a part of it, has had none.*by 1% between"):
        convert.from_torch(optimizer.state_dict(), tx, params, order=["w"], rtol=1e-5)
    w.grad = torch.tensor([100.0, 100.0, 100.0])
    optimizer.step()
    convert.from_torch(optimizer.state_dict(), tx, params, order=["w"], rtol=1e-5)


OTHER_TORCH = [
    *("SGD", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD", "RAdam", "Adafactor", "LBFGS"),
    *("NAdam", "Muon"),
]


@pytest.mark.parametrize("name", [*ADAMS_OF_TORCH, *OTHER_TORCH])
def test_only_adams_of_torch_are_converted(name, torch):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    params = {"w": jnp.ones((3, 2))}
    state_dict = torch_after_two_steps(name, **({"momentum": 0.9} if name == "SGD" else {}))
    if name in ADAMS_OF_TORCH:
        state = convert.from_torch(state_dict, ADAMS_OF_TORCH[name](), params, rtol=1e-4)
        assert int(adamjax.step_count(state)) == 2
    else:
        # By default, NAdam's momentum has another decay.
        message = "from_torch: (a group of torch has the options|torch's NAdam)"
        with pytest.raises(ValueError, match=message):
            convert.from_torch(state_dict, adamjax.adam(0.1, eps=1e-8), params)


def test_all_optimizers_of_torch_except_adams_are_refused(torch):
    """Also those of future releases, because they have keys of their own."""
    accepted, params = set(), [jnp.ones((3, 2))]
    txs = {
        "adam": adamjax.adam(0.1, eps=1e-8),
        "amsgrad": adamjax.amsgrad(0.1, eps=1e-8),
        "adamax": adamjax.adamax(0.1, eps=1e-8),
        "nadam": adamjax.nadam(0.1, eps=1e-8),
        "lazy": adamjax.adam(0.1, eps_hat=1e-8, rows="lazy"),
    }
    for name, kind in vars(torch.optim).items():
        if not isinstance(kind, type) or kind is torch.optim.Optimizer:
            continue
        options = {"weight_decay": 0.0} if name in ("AdamW", "Muon") else {}
        options |= {"momentum_decay": 1.0} if name == "NAdam" else {}
        old = kind([torch.nn.Parameter(torch.ones(3, 2))], lr=0.1, **options).state_dict()
        for key, tx in txs.items():
            try:
                state = convert.from_torch(old, tx, params)
            except ValueError as error:
                assert "from_torch: " in str(error)  # noqa: PT017
                with pytest.raises(ValueError, match="to_torch: "):
                    convert.to_torch(tx.init(params), tx, params, old, adapt=lambda path, x: x)
            else:
                accepted.add((name, key))
                convert.to_torch(state, tx, params, old, adapt=lambda path, x: x)
    adams = {("Adam", "adam"), ("AdamW", "adam"), ("Adamax", "adamax"), ("NAdam", "nadam")}
    assert accepted == {*adams, ("SparseAdam", "lazy")}


# --- state dicts ----------------------------------------------------------------------------------


def test_a_step_of_torch_may_be_an_array_of_one_element():
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    old = torch_state_dict()
    for leaf_state in old["state"].values():
        leaf_state["step"] = np.array([5.0], np.float32)
    state = convert.from_torch(old, tx, params)
    assert int(adamjax.step_count(state)) == 5
    assert convert.to_torch(state, tx, params, old)["state"][0]["step"] == 5
    old["state"][0]["step"] = np.array([5.0, 5.0], np.float32)
    with pytest.raises(ValueError, match="states of several runs one by one"):
        convert.from_torch(old, tx, params)


@pytest.mark.parametrize(("dtype", "end"), [("float16", 2048), ("bfloat16", 256)])
def test_a_step_in_16_bits_that_may_stand_for_more_steps_is_refused(dtype, end, torch):
    """In bfloat16, 256 + 1 is 256."""
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    old = torch_state_dict()
    for make in (lambda n: torch.tensor(n, dtype=getattr(torch, dtype)), jnp.dtype(dtype).type):
        for leaf_state in old["state"].values():
            leaf_state["step"] = make(end - 1)
        assert int(adamjax.step_count(convert.from_torch(old, tx, params))) == end - 1
        old["state"][0]["step"] = make(end)
        with pytest.raises(ValueError, match=rf"of 'a' is {end} in {dtype}, .* more steps: pass"):
            convert.from_torch(old, tx, params)


def test_moments_of_torch_are_not_rounded_to_a_narrower_dtype():
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8, m_dtype="bfloat16")
    trained, fresh = (
        torch_state_dict(exp_avg=PARAMS["a"] * 0.3),
        {**torch_state_dict(), "state": {}},
    )
    for old in (trained, fresh):
        with pytest.raises(ValueError, match=r"m of 'a' is .* and would be rounded to bfloat16"):
            convert.from_torch(old, tx, params)
        convert.from_torch(old, tx, params, check=False)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    convert.from_torch(fresh, tx, narrow)


def test_the_product_of_nadam_is_copied_from_torch():
    tx, n = adamjax.nadam(0.1, eps=1e-8), 40
    for _ in range(n):  # Whether JAX would share memory depends on the address.
        product = np.array(0.9 * (1 - 0.5 * 0.96), np.float32)
        slots = {"exp_avg": np.full(2, 0.1, np.float32), "exp_avg_sq": np.ones(2, np.float32)}
        group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
        old = {
            "state": {0: {"step": 1, "mu_product": product, **slots}},
            "param_groups": [{**group, "momentum_decay": 1.0}],
        }
        state = convert.from_torch(old, tx, jnp.ones(2))
        product[...] = 0
        assert float(state[0].momentum_product) > 0.4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("b1", [0.5, 0.9, 0.99])
def test_the_product_of_nadam_may_be_rounded_in_each_step(b1, dtype, torch):
    """`load_state_dict` of torch gives the product the dtype of the parameter."""
    tx, product = adamjax.nadam(0.1, b1, eps=1e-8), torch.tensor(1.0, dtype=getattr(torch, dtype))
    group = {"params": [0, 1], "lr": 0.1, "betas": (b1, 0.999), "eps": 1e-8, "weight_decay": 0}
    slots = {"exp_avg": np.full(2, 0.1, np.float32), "exp_avg_sq": np.ones(2, np.float32)}

    def old_with(step, *products):
        states = {i: {"step": step, "mu_product": x, **slots} for i, x in enumerate(products)}
        return {"state": states, "param_groups": [{**group, "momentum_decay": 1.0}]}

    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for step in range(1, 301):
        product *= b1 * (1 - 0.5 * 0.96**step)
        if step in (1, 2, 10, 30, 100, 300):
            convert.from_torch(old_with(step, product, product), tx, params, order=["a", "b"])
            for wrong in (1.0, np.nan, -1.0):
                # The product of every leaf is compared.
                old = old_with(step, product, torch.tensor(wrong, dtype=product.dtype))
                with pytest.raises(ValueError, match=rf"product of momenta is .* after {step} st"):
                    convert.from_torch(old, tx, params, order=["a", "b"])


STRANGE = {
    "a key of another optimizer": (
        lambda s: s["param_groups"][0].update(bias_correction=True),
        r"has the options \[.*'bias_correction'.*Remove keys of your own from the groups",
    ),
    "a scheduler that moves betas": (
        lambda s: s["param_groups"][0].update(max_momentum=0.95, base_momentum=0.85),
        r"changes betas in each step",
    ),
    "a moment of another optimizer": (
        lambda s: s["state"][0].update(exp_avg_var=np.ones(2)),
        r"state of 'a' has \['exp_avg', 'exp_avg_sq', 'exp_avg_var', 'step'\], expected 'step'",
    ),
    "no step": (lambda s: s["state"][0].pop("step"), r"state of 'a' has .*, expected 'step'"),
    "half a step": (lambda s: s["state"][0].update(step=1.5), r"count of 'a' is 1.5, expected"),
    "a moment of NaN": (
        lambda s: s["state"][0].update(exp_avg=np.array([np.nan, 0.0])),
        r"of 'a', exp_avg has values that are not finite",
    ),
    "integers": (
        lambda s: s["state"][0].update(exp_avg=np.ones(2, int)),
        r"exp_avg of 'a' is int64, expected floats",
    ),
    "integers as squares": (
        lambda s: s["state"][0].update(exp_avg_sq=np.ones(2, int)),
        r"exp_avg_sq of 'a' is int64, expected floats",
    ),
    "a masked array": (
        lambda s: s["state"][0].update(exp_avg=np.ma.array([0.1, 9.9], mask=[0, 1])),
        r"exp_avg of 'a' is masked float64\[2\], expected no mask: .*fill them, x\.filled",
    ),
    "numbers that JSON turned into strings": (
        lambda s: s.update(state={str(k): x for k, x in s["state"].items()}),
        r"state has the keys \['0', '1'\], but its groups",
    ),
    "fewer names than parameters": (
        lambda s: s["param_groups"][0].update(param_names=["a"]),
        r"param_names \['a'\], expected a list of strings for its 2 params",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_states_of_torch_are_refused(name):
    change, message = STRANGE[name]
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    old = torch_state_dict()
    convert.from_torch(old, tx, params)
    change(old)
    with pytest.raises((TypeError, ValueError), match=f"from_torch: .*{message}"):
        convert.from_torch(old, tx, params)


def changed_group(**changes):
    def change(state_dict):
        return {**state_dict, "param_groups": [{**state_dict["param_groups"][0], **changes}]}

    return change


def changed_state_of_0(change):
    return lambda state_dict: {
        **state_dict,
        "state": {**state_dict["state"], 0: change(state_dict["state"][0])},
    }


MALFORMED = {
    "a state": (lambda state_dict: {**state_dict, "state": [1]}, r"'state' is \[1\] of type list"),
    "groups": (lambda state_dict: {**state_dict, "param_groups": None}, "'param_groups' is None"),
    "a group": (
        lambda state_dict: {**state_dict, "param_groups": [3]},
        "a group of 'param_groups' is 3",
    ),
    "no params": (changed_group(params=None), "'params' of a group is None"),
    "a number for params": (changed_group(params=3), "'params' of a group is 3 of type int"),
    "lists in params": (changed_group(params=[0, [1]]), r"'params' of a group is \[1\]"),
    "twice": (changed_group(params=[0, 0]), "is 0 of type int, expected each parameter once"),
    "too few": (changed_group(params=[0]), "groups have 1 parameters"),
    "a list": (
        changed_state_of_0(list),
        r"the state of parameter 0 is \['step', .*expected a dictionary",
    ),
    "no moment": (changed_state_of_0(lambda x: {**x, "exp_avg": None}), "exp_avg of 'w' is None"),
    "text": (
        changed_state_of_0(lambda x: {**x, "exp_avg_sq": ["1", "2"]}),
        "expected a number or an array",
    ),
    "no step": (changed_state_of_0(lambda x: {**x, "step": None}), "the count of 'w' is None"),
    "a step of text": (changed_state_of_0(lambda x: {**x, "step": "7"}), "the count of 'w' is '7'"),
    "no rate": (changed_group(lr=None), "lr of a group of torch is None"),
    "a rate of text": (changed_group(lr="0.1"), "lr of a group of torch is '0.1' of type str"),
    "an epsilon of text": (changed_group(eps="1e-8"), "eps of a group of torch is '1e-8'"),
    "one beta": (changed_group(betas=[0.9]), r"betas of a group of torch are \[0.9\]"),
    "no beta": (changed_group(betas=(0.9, None)), "a beta of a group of torch is None"),
    "a flag of text": (changed_group(amsgrad="false"), "amsgrad .* is 'false', expected True or"),
    "names": (changed_group(param_names="wz"), "has the param_names 'wz', expected a list of"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_state_dicts_are_refused(what):
    change, message = MALFORMED[what]
    tx, params = adamjax.adam(0.1, eps=1e-8), {"w": jnp.zeros(2), "z": jnp.zeros(2)}
    order = ["w", "z"]
    state = convert.from_torch(plain_torch_dict(), tx, params, order=order)
    with pytest.raises(ValueError, match=f"from_torch: .*{message}"):
        convert.from_torch(change(plain_torch_dict()), tx, params, order=order)
    with pytest.raises(ValueError, match=f"to_torch: .*{message}"):
        convert.to_torch(state, tx, params, change(plain_torch_dict()), order=order)


def test_an_error_names_what_is_passed_in_place_of_a_state_dict():
    flat = {"state.w.exp_avg": np.ones(2), "param_groups.w.lr": 0.1}
    for old, message in (
        (flat, r"got the flattened form .* 'state.w.exp_avg': make it without flatten_optimizer"),
        ({"model": {}, "optimizer": {}}, r"got dict with \['model', 'optimizer'\]"),
        ([], "got list"),
    ):
        with pytest.raises(TypeError, match=f"from_torch: expected .*{message}"):
            convert.from_torch(old, adamjax.adam(0.1, eps=1e-8), {"w": jnp.ones(2)})


def test_tensors_that_are_not_plain_are_refused():
    class DTensor:
        def detach(self):
            raise AssertionError("this must not be called")

    old = torch_state_dict(exp_avg=DTensor())
    with pytest.raises(ValueError, match=r"exp_avg of 'a' is a .*DTensor, expected a plain tensor"):
        convert.from_torch(old, adamjax.adam(RATE, eps=1e-8), jax.tree.map(jnp.asarray, PARAMS))


def test_tensors_that_are_no_arrays_of_numpy_are_converted_or_refused(torch):
    tx, params = adamjax.adam(RATE, eps=1e-8), jax.tree.map(jnp.asarray, PARAMS)
    # The imaginary part of a conjugate is a view whose signs are changed when it is read.
    view = torch.complex(torch.zeros(2), torch.tensor([0.1, -0.2])).conj().imag
    assert view.is_neg()
    state = convert.from_torch(torch_state_dict(exp_avg=view), tx, params)
    assert_same(adamjax.get_slot(state, "m")["a"], jnp.asarray([-0.1, 0.2]))
    for tensor, message in (
        (torch.zeros(2, device="meta"), r"'meta', which has no values: .*map_location='cpu'"),
        (torch.zeros(2).to_sparse(), "expected a number or an array of numbers"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)exp_avg of 'a' is .*{message}"):
            convert.from_torch(torch_state_dict(exp_avg=tensor), tx, params)


@pytest.mark.parametrize("kind", ["list", "array", "tensor", "tuple of tensors"])
def test_betas_of_torch_may_be_any_pair_of_numbers(kind, torch):
    betas = {
        "list": [0.9, 0.999],
        "array": np.array([0.9, 0.999]),
        "tensor": torch.tensor([0.9, 0.999]),
        "tuple of tensors": (torch.tensor(0.9), torch.tensor(0.999)),
    }[kind]
    params, old = jax.tree.map(jnp.asarray, PARAMS), torch_state_dict()
    old["param_groups"][0]["betas"] = betas
    convert.from_torch(old, adamjax.adam(RATE, eps=1e-8), params)
    with pytest.raises(ValueError, match=r"b1"):
        convert.from_torch(old, adamjax.adam(RATE, 0.8, eps=1e-8), params)


@pytest.mark.parametrize("check", [True, False])
def test_complex_leaves_go_neither_to_torch_nor_from_it(check):
    """Also if all imaginary parts are 0, or if no step was taken."""
    tx, params = adamjax.adam(0.1, eps=1e-8), [jnp.ones(2, jnp.complex64), jnp.ones(2)]
    for old in (fresh_torch(), torch_after_a_step((2,), (2,))):
        for leaf_state in list(old["state"].values())[:1]:
            for name in ("exp_avg", "exp_avg_sq"):
                leaf_state[name] = leaf_state[name].astype(np.complex64)
        for leaves in (params, [jnp.ones(2), params[0]]):
            message = r"_torch: the leaf '[01]' is complex, and torch's v of complex parameters"
            with pytest.raises(ValueError, match=f"from{message}"):
                convert.from_torch(old, tx, leaves, check=check)
            with pytest.raises(ValueError, match=f"to{message}"):
                convert.to_torch(tx.init(leaves), tx, leaves, old, check=check)


# --- names and order of parameters ----------------------------------------------------------------


def test_an_order_may_map_names_of_torch_to_paths():
    tx, params = adamjax.adam(RATE, eps=1e-7), {"x": jnp.ones(2), "y": jnp.ones(2)}
    old = numbered_torch([(2,), (2,), (2,)])
    old["param_groups"][0]["param_names"] = ["b", "a", "c"]
    order = {"a": "x", "b": "y", "c": None}
    m = adamjax.get_slot(convert.from_torch(old, tx, params, order=order), "m")
    assert_same(m, {"x": jnp.full(2, 2.0), "y": jnp.full(2, 1.0)})
    with pytest.raises(ValueError, match=r"order has the names \['a', 'b'\], which do not corr"):
        convert.from_torch(old, tx, params, order={"a": "x", "b": "y"})


def test_parameters_of_torch_are_matched_by_their_names(torch):
    """Matched by their order, these leaves of one shape would get each other's moments."""
    leaves = {name: torch.nn.Parameter(torch.ones(2)) for name in ("b", "a")}
    optimizer = torch.optim.Adam(list(leaves.items()), lr=0.1)
    for i, p in enumerate(leaves.values()):
        p.grad = torch.full((2,), i + 1.0)
    optimizer.step()
    tx, params = adamjax.adam(0.1, eps=1e-8), {"a": jnp.ones(2), "b": jnp.ones(2)}
    m = adamjax.get_slot(convert.from_torch(optimizer.state_dict(), tx, params), "m")
    assert_close(m, {"a": jnp.full(2, 0.2), "b": jnp.full(2, 0.1)}, rtol=1e-6)
    with pytest.raises(ValueError, match=r"order has 'a' in the place of torch's 'b'"):
        convert.from_torch(optimizer.state_dict(), tx, params, order=["a", "b"])
    other = {"x": jnp.ones(2), "y": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"names its parameters \['b', 'a'\].*give order="):
        convert.from_torch(optimizer.state_dict(), tx, other)
    m = adamjax.get_slot(
        convert.from_torch(optimizer.state_dict(), tx, other, order=["y", "x"]), "m"
    )
    assert_close(m, {"x": jnp.full(2, 0.2), "y": jnp.full(2, 0.1)}, rtol=1e-6)


def test_names_of_torch_modules_match_those_of_flax(torch):
    """`weight` matches `kernel`. A prefix of all names, as from a wrapper, is ignored."""
    layers = [torch.nn.Linear(2, 2, bias=False) for _ in range(12)]
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
    optimizer = torch.optim.Adam(model.named_parameters(prefix="module"), lr=0.1)
    for i, layer in enumerate(layers):
        layer.weight.grad = (i + 1.0) * torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    optimizer.step()
    old = optimizer.state_dict()
    params = {"layers": {str(i): {"kernel": jnp.zeros((2, 2))} for i in range(12)}}
    tx, sizes = adamjax.adam(0.1, eps=1e-8), jnp.array([[1.0, 3.0], [2.0, 4.0]])
    expected = {str(i): {"kernel": 0.1 * (i + 1) * sizes} for i in range(12)}

    def convert_from(old):
        return convert.from_torch(old, tx, params, adapt=lambda path, x: x.T)

    m = adamjax.get_slot(convert_from(old), "m")
    assert_close(m, {"layers": expected}, rtol=1e-6)
    # Keys that are names, as torch.distributed.checkpoint writes them.
    (group,) = old["param_groups"]
    names = group["param_names"]
    group = {key: x for key, x in group.items() if key != "param_names"}
    by_name = {
        "state": {names[i]: x for i, x in old["state"].items()},
        "param_groups": [{**group, "params": names}],
    }
    state = convert_from(by_name)
    assert_close(adamjax.get_slot(state, "m"), {"layers": expected}, rtol=1e-6)
    back = convert.to_torch(state, tx, params, old, adapt=lambda path, x: x.T)["state"]
    for i, x in old["state"].items():
        assert_same(back[i]["exp_avg"], x["exp_avg"].numpy())
    # No shape shows that square kernels are transposed.
    for refused in (
        lambda: convert.from_torch(old, tx, params),
        lambda: convert.to_torch(state, tx, params, old),
    ):
        with pytest.raises(ValueError, match=r"weights are the transposes of kernels.*adapt="):
            refused()


def test_a_torch_optimizer_without_arrays_shows_no_order():
    tx, params = adamjax.adam(0.1, eps=1e-8), {"weight": jnp.ones((4, 3)), "bias": jnp.ones(4)}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"no arrays before its first step.*give order="):
        convert.to_torch(state, tx, params, fresh_torch())
    new = convert.to_torch(state, tx, params, fresh_torch(), order=["weight", "bias"])
    assert new["state"][0]["exp_avg"].shape == (4, 3)
    with pytest.raises(ValueError, match=r"names its parameters .*give order="):
        convert.to_torch(state, tx, params, fresh_torch(["x", "y"]))


def test_shapes_of_a_torch_optimizer_show_a_wrong_order():
    tx, params = adamjax.adam(0.1, eps=1e-8), {"weight": jnp.ones((4, 3)), "bias": jnp.ones(4)}
    args = tx.init(params), tx, params, torch_after_a_step((4, 3), (4,))
    for wrong in ({}, {"order": ["bias", "weight"]}, {"adapt": lambda path, x: x.T}):
        with pytest.raises(
            ValueError, match=r"exp_avg of '\w+' has shape .*, that of torch's: are"
        ):
            convert.to_torch(*args, **wrong)
    new = convert.to_torch(*args, order=["weight", "bias"])
    assert new["state"][0]["exp_avg"].shape == (4, 3)


def test_an_adapt_that_reshapes_hides_the_order():
    params = {"query": jnp.zeros((2, 2)), "scale": jnp.zeros(4)}
    old, tx = torch_with_moments([np.ones(4, "f"), np.full(4, 2.0, "f")]), adam_like_optax()

    def adapt(path, x):
        return x.reshape(params[path].shape)

    with pytest.raises(ValueError, match=r"\['query', 'scale'\] have one size.*give order="):
        convert.from_torch(old, tx, params, adapt=adapt)
    state = convert.from_torch(old, tx, params, order=["query", "scale"], adapt=adapt)
    assert adamjax.get_slot(state, "m")["query"].shape == (2, 2)
    with pytest.raises(ValueError, match=r"adapt raises an error for exp_avg of 'query', .*order"):
        convert.from_torch(
            torch_with_moments([np.ones(3, "f"), np.ones(4, "f")]),
            tx,
            params,
            order=list(params),
            adapt=adapt,
        )


# --- transposed kernels ---------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ["0.weight", "1.weight"]], ids=["no names", "names"])
@pytest.mark.parametrize("leaf", ["kernel", "kernel_0", "w", "Wq", "weights", "weight", "table"])
def test_square_kernels_that_torch_may_transpose_need_an_adapt(leaf, names):
    """Leaves that have torch's name `weight`, and tables, are not transposed."""
    square, slots = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), ("exp_avg", "exp_avg_sq")
    group = {"params": [0, 1], "lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    group |= {"amsgrad": False} | ({} if names is None else {"param_names": names})
    old = {
        "state": {i: {"step": 3, **dict.fromkeys(slots, square)} for i in range(2)},
        "param_groups": [group],
    }
    tx, params = adamjax.adam(RATE, eps=1e-8), [{leaf: jnp.zeros((2, 2))} for _ in range(2)]
    order = [f"{i}/{leaf}" for i in range(2)]
    if leaf in ("weight", "table"):
        convert.from_torch(old, tx, params, order=order)
    else:
        wanted = rf"torch's weights are the transposes of kernels.*endswith\('{leaf}'\)"
        with pytest.raises(ValueError, match=wanted):
            convert.from_torch(old, tx, params, order=order)
    state = convert.from_torch(old, tx, params, order=order, adapt=lambda path, x: x.T)
    assert_same(adamjax.get_slot(state, "m")[0][leaf], square.T)


def test_a_kernel_with_a_clear_shape_does_not_show_the_layout_of_others():
    slots, shapes = ("exp_avg", "exp_avg_sq"), {"w0": (2, 3), "w1": (2, 2), "gate": (2, 2)}
    group = {"params": [0, 1], "lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    group["amsgrad"] = False
    tx = adamjax.adam(RATE, eps=1e-8)

    def converted(*leaves, torch_names=None):
        arrays = [np.ones(shapes[leaf], np.float32) for leaf in leaves]
        own = {"param_names": torch_names} if torch_names else {}
        old = {
            "state": {i: {"step": 3, **dict.fromkeys(slots, x)} for i, x in enumerate(arrays)},
            "param_groups": [{**group, **own}],
        }
        params = dict(zip(leaves, arrays, strict=True))
        return convert.from_torch(old, tx, params, order=list(leaves))

    with pytest.raises(ValueError, match=r"such as 'w1'.*endswith\('w1'\)"):
        converted("w0", "w1")
    with pytest.raises(ValueError, match=r"such as 'gate'.*endswith\('gate'\)"):
        converted("w0", "gate")
    # The names of weight_norm and spectral_norm.
    names = ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]
    with pytest.raises(ValueError, match=r"such as 'gate'"):
        converted("w0", "gate", torch_names=names)


@pytest.mark.parametrize("named", [True, False], ids=["names", "no names"])
@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ((3, 8, 3), r"x\.T if"),  # torch's Conv1d(8, 3, kernel_size=3)
        ((3, 3, 3, 3), r"x\.transpose\("),
        ((5, 3, 5, 3, 5), r"x\.transpose\("),
        ((3, 8, 4), None),
        ((3, 8, 8, 3), None),
        ((3, 3), r"x\.T if"),
        ((3, 4), None),
        ((1, 1), None),
        ((1, 1, 1), None),
        ((1, 8, 1), None),
        ((3, 1, 3), r"x\.T if"),
        ((1, 3, 1, 3, 1), r"x\.transpose\("),
    ],
)
def test_kernels_whose_shape_does_not_show_the_order_of_dimensions_need_an_adapt(shape, fix, named):
    """torch has (out, in, *kernel_size), and kernels have (*kernel_size, in, out)."""
    old = numbered_torch([shape])
    if named:
        old["param_groups"][0]["param_names"] = ["0.weight"]
    tx, params = adamjax.adam(RATE, eps=1e-7), {"0": {"kernel": jnp.zeros(shape)}}
    x = old["state"][0]["exp_avg"] = np.linspace(0, 1, np.prod(shape), dtype=np.float32).reshape(
        shape
    )

    def kernel_of(x):
        return x.transpose(*range(2, x.ndim), 1, 0)

    if fix is None:
        convert.from_torch(old, tx, params)
        return
    for flat in (params, {"0_kernel": jnp.zeros(shape)}):
        with pytest.raises(ValueError, match=f"its shape .* does not show it: .*{fix}"):
            convert.from_torch(old, tx, flat)
    state = convert.from_torch(old, tx, params, adapt=lambda path, x: kernel_of(x))
    assert_same(adamjax.get_slot(state, "m")["0"]["kernel"], kernel_of(x))


def test_names_of_torch_other_than_weight_do_not_show_a_transposition():
    old, params = (
        torch_with_moments([np.eye(2, dtype="f")], ["lin.W"]),
        {"lin": {"kernel": jnp.eye(2)}},
    )
    with pytest.raises(ValueError, match=r"transposes of kernels.*adapt="):
        convert.from_torch(old, adam_like_optax(), params, order=["lin/kernel"])


def test_a_torch_optimizer_without_arrays_shows_no_transposition():
    tx, params = adamjax.adam(0.1, eps=1e-8), {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    target = fresh_torch(["weight", "bias"])
    with pytest.raises(ValueError, match=r"transposes of kernels, such as 'kernel'"):
        convert.to_torch(tx.init(params), tx, params, target)

    params = {"kernel": jnp.ones((1, 4)), "bias": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"transposes of kernels, such as 'kernel'"):
        convert.to_torch(tx.init(params), tx, params, target)
    one = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
    convert.to_torch(tx.init(one), tx, one, target)
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}

    def transposed(path, x):
        return x.T if path == "kernel" else x

    new = convert.to_torch(tx.init(params), tx, params, target, adapt=transposed)
    assert new["state"][0]["exp_avg"].shape == (4, 3)


@pytest.mark.parametrize(
    ("adapt", "error", "message"),
    [
        (lambda path, x: None, ValueError, "what adapt returns for exp_avg of 'w' is None"),
        (lambda path, x: "x", ValueError, "what adapt returns for exp_avg of 'w' is 'x'"),
        (lambda path, x: x[:1], ValueError, r"m of 'w' has shape \[1\], expected \[2\]"),
        ("T", TypeError, "adapt is 'T' of type str, expected a function of the path"),
        (lambda x: x, TypeError, "adapt does not take two arguments, expected a function of"),
        (lambda path, x, axes: x, TypeError, "adapt does not take two arguments"),
    ],
)
def test_an_invalid_adapt_is_refused(adapt, error, message):
    tx, params = adamjax.adam(0.1, eps=1e-8), [jnp.zeros(2), jnp.zeros(2)]
    message = message.replace("'w'", "'0'")
    with pytest.raises(error, match=f"from_torch: {message}"):
        convert.from_torch(plain_torch_dict(), tx, params, adapt=adapt)
    if "shape" not in message:
        state = convert.from_torch(plain_torch_dict(), tx, params)
        with pytest.raises(error, match=f"to_torch: {message}"):
            convert.to_torch(state, tx, params, plain_torch_dict(), adapt=adapt)
    state = convert.from_torch(plain_torch_dict(), tx, params)
    for valid in (lambda path, x: jnp.asarray(x), lambda *both: both[1].tolist()):
        assert_same(convert.from_torch(plain_torch_dict(), tx, params, adapt=valid), state)


# --- hyperparameters and rates --------------------------------------------------------------------


DIFFERENT_OPTIONS = {
    "epsilon": (
        {"eps": 1e-6},
        r"'a': torch has eps=1e-06, tx has eps=1e-08: build tx with eps=1e-06",
    ),
    "betas": ({"betas": (0.9, 0.99)}, r"b2=0.99, tx has b2=0.999"),
    "betas close to 1": ({"betas": (0.9, 0.9990009)}, r"b2=0.9990009, tx has b2=0.999"),
    "rate": ({"lr": 0.5}, r"a learning rate of 0.5, tx has 0.0625 for the next step"),
    "decay": (
        {"weight_decay": 0.5},
        r"a weight decay of 0.5, tx has 0 before its rule and 0 after it: put "
        r"add_decayed_weights\(0.5\) before the rule",
    ),
    "decoupled decay": (
        {"weight_decay": 0.5, "decoupled_weight_decay": True},
        r"put add_decayed_weights\(0.5\) after the rule",
    ),
    "amsgrad": ({"amsgrad": True}, r"those of amsgrad; for adam, expected"),
    "momentum_decay": ({"momentum_decay": 0.004}, r"NAdam has momentum_decay=0.004"),
}


@pytest.mark.parametrize("name", DIFFERENT_OPTIONS)
def test_options_of_torch_are_compared_with_tx(name):
    group, message = DIFFERENT_OPTIONS[name]
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    convert.from_torch(torch_state_dict(), tx, params)
    with pytest.raises(ValueError, match=message):
        convert.from_torch(torch_state_dict(group), tx, params)
    convert.from_torch(torch_state_dict({"betas": (0.9, float(np.float32(0.999)))}), tx, params)
    state = tx.init(params)
    convert.to_torch(state, tx, params, {**torch_state_dict(), "state": {}}, order=["a", "b"])
    # The error of to_torch begins like that of from_torch, and also says how to change the target.
    start = re.split("those of amsgrad|(?<=[a-z0-9]): (?:build|put|begin)", message)[0]
    with pytest.raises(ValueError, match=f"to_torch: .*{start}"):
        convert.to_torch(
            state, tx, params, {**torch_state_dict(group), "state": {}}, order=["a", "b"]
        )


def test_an_error_says_how_a_target_gets_the_rate_of_tx(torch):
    params = [jnp.ones(3)]
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    tx = adamjax.adam(0.05, eps=1e-8)
    message = (
        r"take state_dict\(\) after the scheduler is at this step, or after lr .*what torch has"
    )
    with pytest.raises(ValueError, match=message):
        convert.to_torch(tx.init(params), tx, params, optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = float(adamjax.learning_rate(tx, tx.init(params)))
    convert.to_torch(tx.init(params), tx, params, optimizer.state_dict())


@pytest.mark.parametrize(
    ("rate", "schedule"),
    [
        (lambda t: 0.05 * (1 + np.cos(np.pi * t / 1000)), adamjax.cosine_decay(0.1, 1000)),
        (lambda t: 0.1 * 0.999**t, adamjax.exponential_decay(0.1, 1, 0.999)),
        (
            lambda t: 0.05 * (1 + np.cos(np.pi * t / 1000)),
            optax.cosine_decay_schedule(0.1, 1000),
        ),
    ],
    ids=["cosine", "powers", "a callable"],
)
def test_a_float32_schedule_matches_the_float64_rates_of_torch(rate, schedule):
    """torch computes rates in float64. Near the end of a cosine, float32 gives other rates."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    for count in (10, 900, 990, 998):
        old = torch_state_dict({"lr": rate(count)})
        for leaf_state in old["state"].values():
            leaf_state["step"] = count
        convert.from_torch(old, adamjax.adam(schedule, eps=1e-8), params)
        old["param_groups"][0]["lr"] = 1.001 * rate(count)
        with pytest.raises(ValueError, match="a learning rate of"):
            convert.from_torch(old, adamjax.adam(schedule, eps=1e-8), params)


@pytest.mark.parametrize("name", ["powers", "products of counts"])
def test_a_rate_is_compared_as_a_step_computes_it(name):
    """In float32 and int32, these schedules have other values than in float64."""
    count, schedule, right, rate = {
        "powers": (
            200_000,
            lambda n: 0.1 * 0.99999**n,
            adamjax.exponential_decay(0.1, 1, 0.99999),
            0.1 * 0.99999**200_000,
        ),
        "products of counts": (
            60_000,
            lambda n: 0.1 / (1 + n * n / 1e10),
            lambda n: 0.1 / (1 + (n / 1e5) ** 2),
            0.1 / 1.36,
        ),
    }[name]
    params, old = jax.tree.map(jnp.asarray, PARAMS), torch_state_dict({"lr": rate})
    for leaf_state in old["state"].values():
        leaf_state["step"] = count
    convert.from_torch(old, adamjax.adam(right, eps=1e-8), params)
    message = r"a learning rate of .*Note: in float64 the schedule of tx has that rate, but steps"
    with pytest.raises(ValueError, match=message):
        convert.from_torch(old, adamjax.adam(schedule, eps=1e-8), params)


def test_a_rate_that_is_scaled_is_another_rate():
    params, adam = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    with pytest.raises(ValueError, match=r"rate of 0.0625, tx has 0.03125 for the next step"):
        convert.from_torch(torch_state_dict(), adamjax.chain(adam, adamjax.scale(0.5)), params)
    parts = adamjax.scale_by_adam(eps=1e-8), adamjax.scale(-RATE)
    convert.from_torch(torch_state_dict(), adamjax.chain(*parts), params)


def test_options_that_schedulers_of_torch_add_to_groups_are_read(torch):
    params, tx = {"w": jnp.ones(2)}, adamjax.adam(adamjax.constant(0.1), eps=1e-8)
    for cycle in (False, True):
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        options = {"max_lr": 0.1, "total_steps": 10, "div_factor": 1.0, "cycle_momentum": cycle}
        torch.optim.lr_scheduler.OneCycleLR(optimizer, **options)
        if cycle:
            with pytest.raises(ValueError, match=r"OneCycleLR, CyclicLR\) changes betas"):
                convert.from_torch(optimizer.state_dict(), tx, params)
        else:
            convert.from_torch(optimizer.state_dict(), tx, params)
            with pytest.raises(ValueError, match=r"a schedule \(a scheduler has set initial_lr\)"):
                convert.from_torch(optimizer.state_dict(), adamjax.adam(0.1, eps=1e-8), params)


def test_a_rate_of_0_in_the_next_step_does_not_hide_a_frozen_leaf():
    """A scheduler of torch that warms up from 0 sets `lr` to 0 before the first step."""
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    old = torch_with_moments([np.ones(3, "f")] * 2, lr=0.0, initial_lr=0.1)
    warm = adamjax.adam(adamjax.warmup(0.1, 5, 0.0), eps=1e-8)
    fresh = {**old, "state": {}}
    convert.from_torch(fresh, warm, params, order=["a", "b"])
    tx = adamjax.chain(warm, adamjax.masked(adamjax.set_to_zero(), "b"))
    with pytest.raises(ValueError, match=r"'b': torch has a learning rate that follows a schedule"):
        convert.from_torch(fresh, tx, params, order=["a", "b"])


def test_maximize_is_a_negation():
    state_dict = torch_after_two_steps("Adam", maximize=True)
    params, plain = {"w": jnp.ones((3, 2))}, adamjax.adam(0.1, eps=1e-8)
    negated = adamjax.chain(adamjax.scale(-1.0), plain)
    convert.from_torch(state_dict, negated, params)
    with pytest.raises(ValueError, match=r"maximize=True.*begin tx with scale\(-1.0\)"):
        convert.from_torch(state_dict, plain, params)
    with pytest.raises(ValueError, match=r"gradients as they are, tx has scale.*leave it out"):
        convert.from_torch(torch_after_two_steps("Adam"), negated, params)


# --- weight decays, clips and averages ------------------------------------------------------------


DECAYED = {
    "after the rule": (True, lambda rule, decay: [rule, decay], None),
    "after the rule and before a scale": (
        True,
        lambda rule, decay: [rule, decay, adamjax.scale(1.0)],
        None,
    ),
    "after the rate": (
        True,
        lambda rule, decay: [rule, adamjax.scale_by_learning_rate(1.0), decay, adamjax.scale(-1.0)],
        "0 before its rule and -0.5 after it",
    ),
    "after a scale": (
        True,
        lambda rule, decay: [rule, adamjax.scale(2.0), decay, adamjax.scale(0.5)],
        "0 before its rule and 0.25 after it",
    ),
    "before the rule": (False, lambda rule, decay: [decay, rule], None),
    "after a scale before the rule": (
        False,
        lambda rule, decay: [adamjax.scale(2.0), decay, rule],
        None,
    ),
    "before a scale": (
        False,
        lambda rule, decay: [decay, adamjax.scale(2.0), rule],
        "1 before its rule and 0 after it",
    ),
}


@pytest.mark.parametrize("name", DECAYED)
def test_a_decay_is_compared_as_the_step_scales_it(name):
    decoupled, parts, problem = DECAYED[name]
    old = torch_state_dict({"weight_decay": 0.5, "decoupled_weight_decay": decoupled})
    params = jax.tree.map(jnp.asarray, PARAMS)
    made = parts(adamjax.scale_by_adam(eps=1e-8), adamjax.add_decayed_weights(0.5))
    tx = adamjax.chain(*made, adamjax.scale_by_learning_rate(RATE))
    if problem is None:
        convert.from_torch(old, tx, params)
    else:
        with pytest.raises(ValueError, match=f"a weight decay of 0.5, tx has {problem}"):
            convert.from_torch(old, tx, params)


def test_maximize_negates_before_the_weight_decay():
    params = jax.tree.map(jnp.asarray, PARAMS)
    old = torch_state_dict({"maximize": True, "weight_decay": 0.5})
    parts = adamjax.scale(-1.0), adamjax.add_decayed_weights(0.5)
    adam = adamjax.adam(RATE, eps=1e-8)
    convert.from_torch(old, adamjax.chain(*parts, adam), params)
    with pytest.raises(ValueError, match=r"negates after their weight decay: move it before"):
        convert.from_torch(old, adamjax.chain(*parts[::-1], adam), params)


def test_sparse_adam_of_torch_has_no_decay():
    leaf_state = {"step": 3, "exp_avg": np.ones((3, 2), "f"), "exp_avg_sq": np.ones((3, 2), "f")}
    group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "maximize": False}
    old, params = {"state": {0: leaf_state}, "param_groups": [group]}, jnp.zeros((3, 2))
    convert.from_torch(old, adamjax.adam(0.1, eps_hat=1e-8, rows="lazy"), params)
    with pytest.raises(ValueError, match=r"a weight decay of 0, tx has .*0.004 after it"):
        convert.from_torch(old, adamjax.adamw(0.1, eps_hat=1e-8, rows="lazy"), params)


def test_torch_clips_before_its_weight_decay():
    decay, clip = adamjax.add_decayed_weights(0.3), adamjax.clip_by_global_norm(0.5)
    old = torch_with_moments([np.ones(3, "f")], weight_decay=0.3)
    convert.from_torch(old, adamjax.chain(clip, decay, adam_like_optax()), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"after its weight decay: put the clip before"):
        convert.from_torch(old, adamjax.chain(decay, clip, adam_like_optax()), jnp.zeros(3))


def test_a_clip_of_updates_is_refused_because_torch_has_none():
    group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    old = {
        "state": {},
        "param_groups": [{**group, "weight_decay": 0, "amsgrad": False}],
    }
    rule, rate = adamjax.scale_by_adam(eps=1e-8), adamjax.scale_by_learning_rate(0.1)
    clip = adamjax.clip_by_global_norm(0.1)
    convert.from_torch(old, adamjax.chain(clip, rule, rate), TWO_LEAVES["a"])
    with pytest.raises(ValueError, match=r"no clip of updates, tx has clip_by_global_norm"):
        convert.from_torch(old, adamjax.chain(rule, clip, rate), TWO_LEAVES["a"])


def test_an_accumulation_beside_the_rule_is_refused_by_torch():
    rule, rate = adamjax.scale_by_adam(eps=1e-8), adamjax.scale_by_learning_rate(0.1)
    params, old = jnp.zeros(3), torch_with_moments([np.ones(3, "f")])
    for tx in (
        adamjax.chain(rule, adamjax.accumulate_gradients(rate, 2)),
        adamjax.chain(adamjax.accumulate_gradients(rule, 2), adamjax.accumulate_gradients(rate, 2)),
    ):
        for call in (
            lambda tx=tx: convert.from_torch(old, tx, params),
            lambda tx=tx: convert.to_torch(tx.init(params), tx, params, old),
        ):
            with pytest.raises(ValueError, match=r"torch has its rule inside any accumulation"):
                call()
    # An accumulation over one call changes nothing.
    beside = adamjax.chain(rule, adamjax.accumulate_gradients(rate, 1))
    state = convert.from_torch(old, beside, params)
    assert_same(state[0], convert.from_torch(old, adam_like_optax(), params)[0])


def test_leaves_of_torch_whose_steps_take_different_numbers_of_calls_are_refused():
    params, old = {"a": jnp.zeros(3), "b": jnp.zeros(3)}, torch_with_moments([np.ones(3, "f")] * 2)
    two = adamjax.accumulate_gradients(adam_like_optax(), 2)
    for default in (adam_like_optax(), adamjax.accumulate_gradients(adam_like_optax(), 4)):
        tx = adamjax.partition([("a", two)], default=default)
        with pytest.raises(ValueError, match=r"steps of . calls for this leaf, and of 2 for 'a'"):
            convert.from_torch(old, tx, params, order=["a", "b"])


@pytest.mark.parametrize("what", ["decay", "schedule"])
def test_a_decay_and_a_schedule_outside_of_the_accumulation_are_refused(what):
    """A loop in torch takes one step for several micro-batches, and decays once in it."""
    rule, params = adamjax.scale_by_adam(eps=1e-8), jnp.zeros(3)
    one, rest, options, message = {
        "decay": (
            adamjax.add_decayed_weights(0.3),
            [adamjax.scale_by_learning_rate(adamjax.constant(0.1))],
            {"weight_decay": 0.3, "decoupled_weight_decay": True},
            r"a weight decay in its steps, tx has one in each call.*put it inside accumulate_grad",
        ),
        "schedule": (
            adamjax.scale_by_learning_rate(adamjax.piecewise_constant([90], [0.1, 0.05])),
            [],
            {"initial_lr": 0.1},
            r"changes with its steps, tx has one that counts calls.*put it inside accumulate_grad",
        ),
    }[what]
    inside = adamjax.accumulate_gradients(adamjax.chain(rule, one), 4)
    outside = adamjax.chain(adamjax.accumulate_gradients(rule, 4), one)
    between = adamjax.accumulate_gradients(outside, 2)
    old = torch_with_moments([np.ones(3, "f")], **options)
    convert.from_torch(old, adamjax.chain(inside, *rest), params)
    for tx in (adamjax.chain(outside, *rest), adamjax.chain(between, *rest)):
        for call in (
            lambda tx=tx: convert.from_torch(old, tx, params),
            lambda tx=tx: convert.to_torch(tx.init(params), tx, params, old),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    # An accumulation over one call has no outside.
    convert.from_torch(
        old, adamjax.chain(adamjax.accumulate_gradients(rule, 1), one, *rest), params
    )
    # Of two parts that share a transform, one may have it inside of its accumulation.
    params, old = {"a": params, "b": params}, torch_with_moments([np.ones(3, "f")] * 2, **options)
    tx = adamjax.chain(adamjax.partition([("a", inside)], default=outside), *rest)
    with pytest.raises(ValueError, match=f"'b': .*{message}"):
        convert.from_torch(old, tx, params, order=["a", "b"])


def test_an_average_that_overwrites_weights_cannot_be_passed_to_a_conversion():
    tx = adamjax.chain(adam_like_optax(), adamjax.weight_ema(0.5, overwrite_frequency=2))
    with pytest.raises(ValueError, match="sets the weights to their average"):
        convert.from_torch(
            torch_with_moments([np.ones(3, "f")]), tx, jnp.zeros(3), average=jnp.zeros(3)
        )


# --- parameters that torch does not train ---------------------------------------------------------


def test_a_parameter_that_torch_never_trained_needs_a_part_of_its_own():
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    old = torch_state_dict()
    del old["state"][1]
    message = (
        r"'a' has taken 1 steps and 'b' 0.*None in order=.*set_to_zero.*no gradient.*partition; "
        r"each part calls its schedule .* lambda count: schedule\(count \+ 1\)"
    )
    with pytest.raises(ValueError, match=message):
        convert.from_torch(old, tx, params)
    apart = adamjax.partition([("a", tx)], default=tx)
    state = convert.from_torch(old, apart, params)
    assert [int(s[0].count) for s in state] == [1, 0]
    # torch does not decay a parameter without a gradient.
    decay = {"weight_decay": 0.1, "decoupled_weight_decay": True}
    decays = {**torch_state_dict(decay), "state": old["state"]}
    adamw = adamjax.adamw(RATE, eps=1e-8, weight_decay=0.1)
    apart = adamjax.partition([("a", adamw)], default=adamw)
    with pytest.raises(ValueError, match=r"none of 'b', .*None in order=.*set_to_zero.*check=F"):
        convert.from_torch(decays, apart, params)
    convert.from_torch(decays, apart, params, check=False)
    frozen = adamjax.partition([("b", adamjax.set_to_zero())], default=adamw)
    convert.from_torch(decays, frozen, params, order=["a", None])
    convert.from_torch({**decays, "state": {}}, adamw, params)
    only = adamjax.partition([("b", adamjax.set_to_zero())], default=tx)
    state = convert.from_torch(old, only, params, order=["a", None])
    assert int(adamjax.step_count(state)) == 1
    with pytest.raises(TypeError, match=r"expected optimizer.state_dict\(\) of torch"):
        convert.from_torch({"state": {}}, tx, params)
