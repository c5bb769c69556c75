"""The wheel, with only the packages that it requires, and the sdist.

Also compares the versions, extras and CI jobs in several files of the repository.
"""

import datetime
import os
import re
import subprocess
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from support import ROOT

import adamjax

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Runs in an environment with the wheel. It imports every module, to find one that needs a package
# that the wheel does not require, and takes a training step.
PROGRAM = r"""
import importlib, importlib.util, pathlib, pkgutil, re, sys
from importlib import metadata
import adamjax, jax, jax.numpy as jnp

location = pathlib.Path(adamjax.__file__)
assert location.is_relative_to(sys.prefix), location
assert location.with_name("py.typed").exists()
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
requirements = [x for x in metadata.requires("adamjax") if "extra ==" not in x]
print(jax.__version__)
print(metadata.version("adamjax"))
print(*sorted(re.match(r"\w+", x)[0] for x in requirements))
print(float(loss))
print(params["table"][:, 0].round(4).tolist())
print(round(float(params["b"]), 4))
"""


def run(*command, **options):
    env = {k: x for k, x in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def new_environment(folder):
    """The path of the Python of a new virtual environment, and the command that runs its pip."""
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    return python, [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist. The wheel is built from the sdist, as by `python -m build`."""
    folder = tmp_path_factory.mktemp("built")
    python, pip = new_environment(folder / "venv")
    run(*pip, "install", *PROJECT["build-system"]["requires"])
    run(python, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder), cwd=ROOT)
    (sdist,) = folder.glob("adamjax-*.tar.gz")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(sdist))
    (wheel,) = folder.glob("adamjax-*.whl")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of a new environment that has only the wheel and the packages that it requires.

    These packages have the same versions as in the environment of the tests.
    """
    folder = tmp_path_factory.mktemp("bare")
    versions = folder / "versions.txt"
    installed_versions = {x.metadata["Name"]: x.version for x in metadata.distributions()}
    installed_versions.pop("adamjax", None)
    versions.write_text(
        "".join(f"{name}=={version}\n" for name, version in installed_versions.items())
    )
    python, pip = new_environment(folder / "venv")
    run(*pip, "install", "--no-compile", "-c", str(versions), str(built[0]))
    return python


def test_the_wheel_needs_only_the_packages_that_it_requires(installed, tmp_path):
    version, ours, *found = run(installed, "-W", "error", "-c", PROGRAM, cwd=tmp_path).splitlines()
    assert version == metadata.version("jax")
    assert ours == metadata.version("adamjax")
    # The loss is 2 * 1**2 + 1**2. Adam's first step moves the row that was read, and b, by the
    # learning rate, 0.25.
    assert found == ["chex jax jaxlib", "3.0", "[1.0, 1.0, 0.75, 1.0]", "0.75"]


def test_the_wheel_has_only_the_package(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    modules = {x.relative_to(ROOT).as_posix() for x in (ROOT / "adamjax").rglob("*.py")}
    others = {name for name in names - modules if ".dist-info/" not in name}
    assert modules <= names
    assert others == {"adamjax/py.typed"}


def test_the_sdist_has_the_tests_and_no_results(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    wanted = {"tests/test_packaging.py", "docs/recipes/flax_nnx.py", "notebooks/quickstart.ipynb"}
    wanted |= {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "Makefile",
    }
    assert wanted <= names
    assert not [x for x in names if x.startswith((".ci", ".git/", "runs/", "benchmarks/results"))]
    assert built[1].stat().st_size < 2e6


def test_metadata_is_valid_and_its_links_point_to_files_of_the_repository(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (x for x in wheel.namelist() if x.endswith(".dist-info/METADATA"))
        found = Metadata.from_email(wheel.read(name), validate=True)
    assert found.author == "The adamjax authors"
    assert found.license_expression == "Apache-2.0"
    assert found.description_content_type == "text/markdown"
    assert found.description.startswith("# adamjax")
    assert set(found.project_urls) == {"Homepage", "Documentation", "Changelog", "Issues"}
    for url in found.project_urls.values():
        assert url.startswith("https://github.com/adamjax/adamjax")
        _, _, path = url.partition("/main/")
        assert not path or (ROOT / path).exists()


def test_extras_are_named_for_work_on_the_repository_and_used_by_the_makefile():
    """A user could mistake an extra `gpu` for JAX's, so the one with a compiler is `test-gpu`."""
    extras = PROJECT["project"]["optional-dependencies"]
    for name, requirements in extras.items():
        assert name.split("-")[0] in ("test", "bench", "docs", "notebooks"), name
        assert all(map(Requirement, requirements))
    used = re.findall(r"-e '\.\[(.*?)\]'", (ROOT / "Makefile").read_text())
    assert {name for names in used for name in names.split(",")} == set(extras)


def test_the_version_is_the_same_in_the_package_the_citation_and_the_changelog():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == adamjax.__version__
    version, release_date = re.search(
        r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    ).groups()
    assert version == adamjax.__version__
    assert release_date == "unreleased" or datetime.date.fromisoformat(release_date)


def test_ruff_has_the_same_version_in_constraints_and_pre_commit():
    ruff = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"rev: v{ruff} " in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_workflow_runs_every_make_target_of_ci_run():
    targets = re.findall(r"^make (\S+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    jobs = re.findall(r"\{target: (.*), python: \"(.*)\"\}", workflow)
    assert {x for target, _ in jobs for x in target.split()} == set(targets)
    classifiers = PROJECT["project"]["classifiers"]
    supported = {x.split()[-1] for x in classifiers if re.search(r"Python :: 3\.\d+$", x)}
    assert {python for target, python in jobs if target == "test"} == supported
    assert dict(jobs)["test-newest"] == max(supported)
    assert dict(jobs)["test-oldest"] == min(supported)
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
