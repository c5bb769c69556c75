"""Helpers of the tests: processes, comparisons of trees, and differences between JAX versions."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]

try:
    enable_x64 = jax.enable_x64
except AttributeError:  # before JAX 0.8
    from jax.experimental import enable_x64  # noqa: F401


def environment(**more):
    """Environment variables for a process on the CPU that imports adamjax and the tests."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **more}


def run_on_devices(num_devices, code):
    """Runs Python code in a new process that has several CPU devices; returns its output."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={num_devices}"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment(XLA_FLAGS=flags),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def imported_packages(code):
    """The top-level packages that Python code imports."""
    packages = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.partition(".")[0])
    return packages


def is_none(x):
    return x is None


def leaves(tree):
    """The leaves as NumPy arrays. A `None` is a leaf too, and stays `None`."""
    flat = jax.tree.leaves(tree, is_leaf=is_none)
    return [None if x is None else np.asarray(x) for x in flat]


def avals(tree):
    """Structure, shapes and dtypes of a tree."""
    flat, treedef = jax.tree.flatten(tree)
    return treedef, [(jnp.shape(x), jnp.result_type(x)) for x in flat]


def assert_same(actual, expected):
    """Asserts the same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), (a, b)


def assert_close(actual, expected, rtol=2e-6, atol=0.0):
    """Asserts the same structure and dtypes, and values within `rtol` of the largest of a leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        wide_dtype = np.complex128 if np.iscomplexobj(b) else np.float64
        a, b = a.astype(wide_dtype), b.astype(wide_dtype)
        scale = np.max(np.abs(b), initial=0.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale + atol)


def jit_and_traces(function, **options):
    """The function jitted, and a list that gets an entry each time it is traced."""
    traces = []

    def traced(*args):
        traces.append(None)
        return function(*args)

    return jax.jit(traced, **options), traces


def ulp(x, dtype):
    """The distance between neighbouring floats of the dtype at |x|."""
    info = jnp.finfo(dtype)
    exponent = np.frexp(np.abs(np.asarray(x, np.float64)))[1] - 1
    return 2.0 ** (np.maximum(exponent, int(info.minexp)) - int(info.nmant))


def float0(shape=()):
    """The gradient that JAX returns for an integer."""
    return np.zeros(shape, jax.dtypes.float0)


def run_benchmarks(*arguments, cwd):
    """Runs `python -m benchmarks` on the CPU in the folder `cwd`; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
    )


def read_checkpoint(run):
    """Reads `runs/RUN/checkpoint.npz`, which the training job wrote.

    Returns the dictionary that describes the run, and the dictionary of arrays.
    """
    with np.load(Path("runs", run, "checkpoint.npz")) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("about"))), arrays
