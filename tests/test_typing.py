"""What a type checker reports about programs that use adamjax."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("basedpyright")

pytestmark = [pytest.mark.slow, pytest.mark.tooling]

PROGRAMS = {
    "parameters keep their type": """
import jax, jax.numpy as jnp
import adamjax
from typing import assert_type

Params = dict[str, jax.Array]
params: Params = {"w": jnp.ones(3)}
tx = adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam(1e-3))
state = tx.init(params)
updates, state = tx.update(params, state, params)
assert_type(adamjax.apply_updates(params, updates), Params)
assert_type(adamjax.averaged_weights(state, params), Params)

def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.sum(params["w"] * x)

step = adamjax.train_step(loss, tx)
params, state, value = step(params, state, jnp.ones(3))
assert_type(params, Params)
assert_type(value, jax.Array)
step.lower(params, state, jnp.ones(3))
value, grads = adamjax.value_and_grad(loss, "w")(params, jnp.ones(3))
assert_type(grads, Params)

exact = adamjax.exact_rows(tx, "w")
(value, grads), ticket = exact.value_and_grad(loss)(params, exact.init(params), jnp.ones(3))
assert_type(grads, Params)
assert_type(exact.replace(history=64), adamjax.exact_rows)
init, update = tx
""",
    "optax takes a transform": """
import adamjax, optax

optax.chain(adamjax.adam(1e-3))
optax.chain(optax.clip(1.0), adamjax.scale_by_adam(b1=0.8, nesterov=True), adamjax.scale(-0.1))
optax.MultiSteps(adamjax.adam(1e-3), 4)
optax.masked(adamjax.exact_rows(adamjax.adam(1e-3), "table"), True)
adamjax.chain(optax.clip(1.0), adamjax.adam(adamjax.cosine_decay(1e-3, decay_steps=10)))
""",
    "Flax takes a transform": """
from flax import nnx
import adamjax

model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
nnx.Optimizer(model, adamjax.adam(1e-3), wrt=nnx.Param)
""",
}
REQUIRED_PACKAGES = {"optax takes a transform": "optax", "Flax takes a transform": "flax"}


def errors(program, folder):
    """The lines of a program in which the type checker finds an error, each with its message."""
    (folder / "program.py").write_text(program)
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--project", str(folder)]
    command += ["--pythonpath", sys.executable]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    lines = program.splitlines()
    return [
        (lines[x["range"]["start"]["line"]], x["message"])
        for x in report["generalDiagnostics"]
        if x["severity"] == "error"
    ]


@pytest.mark.parametrize("name", PROGRAMS)
def test_correct_programs_pass_the_type_checker(name, tmp_path):
    if name in REQUIRED_PACKAGES:
        pytest.importorskip(REQUIRED_PACKAGES[name])
    assert errors(PROGRAMS[name], tmp_path) == []


def test_the_type_checker_finds_mistakes(tmp_path):
    """So the checker reads the program, and knows adamjax's parameters and result types."""
    mistakes = ["adamjax.scale_by_adam(b3=0.1)", 'adamjax.apply_updates({"w": 1.0}, {}).append(2)']
    lines = [line for line, _ in errors("\n".join(["import adamjax", *mistakes]), tmp_path)]
    assert lines == mistakes
