"""What users install: the wheel, with nothing beside it but what it says it needs."""

import os
import subprocess
import venv
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a user sees first; and every module, as one may import a package that only tests have.
PROGRAM = r"""
import importlib, importlib.util, pathlib, pkgutil, re, sys
from importlib import metadata
import adamjax, jax, jax.numpy as jnp

there = pathlib.Path(adamjax.__file__)
assert there.is_relative_to(sys.prefix), there
assert there.with_name("py.typed").exists()
for package in ("optax", "pytest", "flax", "keras", "torch", "flatbuffers"):
    assert importlib.util.find_spec(package) is None, package
for module in pkgutil.walk_packages(adamjax.__path__, "adamjax."):
    importlib.import_module(module.name)

loss_fn = lambda params, ids: jnp.sum(params["table"][ids] ** 2) + params["b"] ** 2
tx = adamjax.exact_rows(adamjax.adamw(0.25, weight_decay=0.0), "table")
params = {"table": jnp.ones((4, 2)), "b": jnp.ones(())}
step = adamjax.train_step(loss_fn, tx)
params, state, loss = step(params, tx.init(params), jnp.array([2]))
params = tx.flush(params, state)[0]
needs = [x for x in metadata.requires("adamjax") if "extra ==" not in x]
print(jax.__version__)
print(metadata.version("adamjax"))
print(*sorted(re.match(r"\w+", x)[0] for x in needs))
print(float(loss))
print(params["table"][:, 0].round(4).tolist())
print(round(float(params["b"]), 4))
"""


def run(*command, **options):
    env = {k: x for k, x in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of a new environment, with the wheel and what that needs alone.

    Those packages have the versions that they have here: the wheel is tried with this JAX.
    """
    place = tmp_path_factory.mktemp("bare")
    bare, versions = place / "venv", place / "versions.txt"
    here = {x.metadata["Name"]: x.version for x in metadata.distributions()}
    here.pop("adamjax", None)
    versions.write_text("".join(f"{name}=={version}\n" for name, version in here.items()))
    venv.create(bare, with_pip=True, symlinks=os.name != "nt")
    python = str(bare / ("Scripts" if os.name == "nt" else "bin") / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(place), str(ROOT))
    (wheel,) = place.glob("adamjax-*.whl")
    run(*pip, "install", "--quiet", "--no-compile", "-c", str(versions), str(wheel))
    return python


def test_the_wheel_works_where_there_is_nothing_else(installed, tmp_path):
    version, ours, *found = run(installed, "-W", "error", "-c", PROGRAM, cwd=tmp_path).splitlines()
    assert version == metadata.version("jax")
    assert ours == metadata.version("adamjax")
    assert found == ["chex jax jaxlib", "3.0", "[1.0, 1.0, 0.75, 1.0]", "0.75"]
