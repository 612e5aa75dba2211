"""Checks in fresh environments: ``pip install nox``, then ``nox`` for all, ``nox -s oldest`` for one.

``oldest`` installs the lowest versions that ``pyproject.toml`` allows of what the library itself needs, and
runs the library's tests, so that the bounds are known to hold.
"""

import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
PYPROJECT = tomllib.loads(Path("pyproject.toml").read_text())


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The default suite, with the newest versions."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The tests of the library with the oldest versions of its dependencies."""
    lowest = [requirement.replace(">=", "==") for requirement in PYPROJECT["project"]["dependencies"]]
    helpers = ("hypothesis", "pytest", "pytest-xdist", "matplotlib", "h5py")
    session.install("-e", ".", *lowest, *helpers)
    session.run("pytest", "tests/greedylr_jax", "greedylr_jax", *session.posargs)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Format and lint."""
    session.install("ruff>=0.9")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python="3.11")
def coverage(session: nox.Session) -> None:
    """Branch coverage of the library by the default suite: at least 98%."""
    session.install("-e", ".[test]", "pytest-cov>=5.0")
    session.run("pytest", "--cov=greedylr_jax", "--cov-branch", "--cov-fail-under=98", *session.posargs)


@nox.session(python="3.11")
def mutation(session: nox.Session) -> None:
    """Mutation testing of ``_greedy.py`` and ``_rule.py``, see ``tests/mutate.py``; about an hour."""
    session.install("-e", ".[test]", "mutmut<3")
    for file in session.posargs or ("greedy", "base"):
        session.run("python", "-m", "tests.mutate", file)
