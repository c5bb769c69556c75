"""Only `_compat.py` uses the parts of JAX that a release may change.

If a module of JAX is missing, only the features that need it fail.
"""

import ast
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import adamjax
from adamjax import _compat

PACKAGE = Path(adamjax.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# Modules that any release of JAX may change or remove.
UNSTABLE = ("jax.experimental", "jax.extend", "jax.interpreters", "jax._src", "jaxlib")


def run(program):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )


def names_used(tree):
    """The dotted names in a module: those that it imports, and attributes such as `jax.jit`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_module_uses_unstable_names_of_jax(path):
    if path.name == "_compat.py":
        pytest.skip("this is the module")
    names = list(names_used(ast.parse(path.read_text())))
    assert not [x for x in names if f"{x}.".startswith(tuple(f"{name}." for name in UNSTABLE))]
    assert not [x for x in names if x.startswith("jax.") and "._" in x]


def test_names_used_finds_all_kinds_of_names():
    program = "import jax.experimental.layout\nfrom jax.extend import core\njax._src.core"
    assert {"jax.experimental.layout", "jax.extend.core", "jax._src.core"} <= set(
        names_used(ast.parse(program))
    )


@pytest.mark.slow
def test_importing_adamjax_warns_of_nothing():
    """Deprecation warnings are errors here, so that a name is replaced before JAX removes it."""
    done = run("import adamjax")
    assert done.returncode == 0, done.stderr[-4000:]


# Uses adamjax without some modules of JAX. Prints a table after a step, and the errors of features.
PROGRAM_WITHOUT_MODULES = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("jax.experimental.") and name.split(".")[2] in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

GONE = ("checkify", "layout")
import chex, jax, jax.extend, jax.numpy as jnp  # these import some of the modules themselves
for name in [name for name in sys.modules if name.startswith("jax.experimental.")]:
    if name.split(".")[2] in GONE:
        del sys.modules[name]
        delattr(jax.experimental, name.split(".")[2])
sys.meta_path.insert(0, Missing())
sys.modules["jax.extend.source_info_util"] = None
del jax.extend.source_info_util

import adamjax

tx = adamjax.exact_rows(adamjax.adam(0.5), "t")
params = {"t": adamjax.layout.row_major(jnp.ones((4, 2)))}
loss_fn = lambda params, ids: params["t"][ids].sum()
step = adamjax.train_step(loss_fn, tx)
params, state, loss = step(params, jax.jit(tx.init)(params), jnp.array([2]))
print(tx.flush(params, state)[0]["t"][:, 0].round(3).tolist())

def print_error(function, *args, **options):
    try:
        function(*args, **options)
    except Exception as error:
        print(type(error).__name__, error)

print_error(adamjax.row_gradient, jnp.array([1]), jnp.ones((1, 2)), 4, check=True)
print_error(adamjax.layout.row_major, jax.ShapeDtypeStruct((4, 2), jnp.float32))
print_error(adamjax.value_and_grad(lambda t: jnp.tanh(t).sum(), "", strict=True), params["t"])
"""


@pytest.mark.slow
def test_a_missing_module_of_jax_breaks_only_the_features_that_need_it():
    done = run(PROGRAM_WITHOUT_MODULES)
    assert done.returncode == 0, done.stderr[-4000:]
    rows, check_error, row_major_error, strict_error = done.stdout.splitlines()
    assert rows == "[1.0, 1.0, 0.5, 1.0]"
    tail = f"which JAX {jax.__version__} does not have; install a newer adamjax, or an older JAX"
    assert check_error == (
        "NotImplementedError row_gradient: check=True needs jax.experimental.checkify, " + tail
    )
    assert row_major_error == (
        "NotImplementedError an order of dimensions in memory (row_major, formats) needs "
        "jax.experimental.layout, " + tail
    )
    assert strict_error.startswith(
        "ValueError value_and_grad: the table '' is used by tanh at a line"
    )


def test_the_type_of_an_array_has_its_mesh_with_the_kinds_of_axes():
    assert _compat.type_sharding(jnp.ones(3)) is None
    assert _compat.axis_kinds(jax.sharding.Mesh(jax.devices(), "x")) <= {"Auto", "Explicit"}
    seen = []

    @jax.jit
    def function(x):
        sharding = _compat.type_sharding(x)
        seen.append(sharding and _compat.axis_kinds(sharding.mesh))
        return x

    mesh = jax.sharding.Mesh(jax.devices(), "x", axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    function(jax.device_put(jnp.ones(8), split))
    function(jnp.ones(9))
    assert seen == [{"Auto"}, None]
