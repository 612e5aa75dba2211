"""Checks in fresh environments: ``pip install nox``, then ``nox`` for all or ``nox -s oldest`` for one."""

import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
PYPROJECT = tomllib.loads(Path("pyproject.toml").read_text())


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Run the default test suite with the latest versions of all dependencies."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """Run the library's tests with the lowest versions of its dependencies that ``pyproject.toml`` allows."""
    lowest = [requirement.replace(">=", "==") for requirement in PYPROJECT["project"]["dependencies"]]
    helpers = ("hypothesis", "pytest", "pytest-xdist", "matplotlib", "h5py")
    session.install("-e", ".", *lowest, *helpers)
    session.run("pytest", "tests/greedylr_jax", "greedylr_jax", *session.posargs)


@nox.session(python="3.11")
def clients(session: nox.Session) -> None:
    """Run the tests with libraries that have training loops of their own, such as Keras and tunix."""
    session.install("-e", ".[test,clients]")
    session.install("--no-deps", "brax>=0.14")  # of which one file is tested, without the physics engine
    session.run("pytest", "tests/clients", *session.posargs, env={"KERAS_BACKEND": "jax"})


@nox.session(python="3.11")
def accelerators(session: nox.Session) -> None:
    """Compile a train step with every rule for TPU and GPU, which needs neither (half an hour)."""
    session.install("-e", ".[test,tpu,cuda]")
    session.run("pytest", "-m", "accelerator", "tests/accelerators", *session.posargs)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Check lint, format and types."""
    session.install("-e", ".[lint,test]")  # pyright needs the optional dependencies
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright", "greedylr_jax")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """Build the documentation into ``build/site``; warnings and broken links are errors."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "docs", "build/site", *session.posargs)
    session.run("python", "-m", "tests.site_links", "build/site")


@nox.session(python="3.11")
def coverage(session: nox.Session) -> None:
    """Require that the default suite covers at least 98% of the library's branches."""
    session.install("-e", ".[test]", "pytest-cov>=5.0")
    session.run("pytest", "--cov=greedylr_jax", "--cov-branch", "--cov-fail-under=98", *session.posargs)


@nox.session(python="3.11")
def mutation(session: nox.Session) -> None:
    """Run mutation testing (about an hour), see ``tests/mutate.py``."""
    session.install("-e", ".[test]", "mutmut<3")
    for file in session.posargs or ("greedy", "ring", "rule"):
        session.run("python", "-m", "tests.mutate", file)
