"""The public surface: its names, its documentation, and what importing and installing it brings along."""

import inspect
import shutil
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import greedylr_jax

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "greedylr_jax"
MODULES = sorted(name for name in greedylr_jax.__all__ if inspect.ismodule(getattr(greedylr_jax, name)))


def public_names(module) -> list[str]:
    """The names in ``__all__``; without it, those without an underscore that the module itself defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def public_objects() -> list:
    """Every public function and class of the package and of its public modules, by name."""
    table = {}
    for module in (greedylr_jax, *(getattr(greedylr_jax, name) for name in MODULES)):
        for name in public_names(module):
            value = getattr(module, name)
            if isinstance(value, (type, types.FunctionType)):
                table.setdefault(f"{module.__name__}.{name}", value)
    return [pytest.param(value, id=name) for name, value in table.items()]


def test_all_is_the_public_surface():
    assert greedylr_jax.__all__ == sorted(set(greedylr_jax.__all__))
    public = {name for name in vars(greedylr_jax) if not name.startswith("_")}
    imported_for_the_module_itself = {"importlib", "ModuleType", "TYPE_CHECKING"}
    assert public - imported_for_the_module_itself == set(greedylr_jax.__all__)
    assert set(greedylr_jax.__all__) <= set(dir(greedylr_jax))


def test_every_public_module_is_in_all():
    files = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert {name for name in files if not name.startswith("_")} == set(MODULES)


@pytest.mark.parametrize("value", public_objects())
def test_every_public_object_has_a_docstring_with_an_example(value):
    documented = inspect.getdoc(value) or ""
    assert documented
    is_result = hasattr(value, "_fields") and value is not greedylr_jax.Rule
    assert is_result or "Examples:" in documented  # a state or result: the function that returns it has one


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


def test_optional_parts_are_imported_at_their_first_use():
    code = """
import sys
import greedylr_jax as g
print(sorted({"flax", "matplotlib", "safetensors", "chex"} & sys.modules.keys()))
print(g.arc.arc.__name__, g.flax.value_fn.__name__, g.range_test.range_test.__name__, g.theory.__name__)
from greedylr_jax import *
print(schedules.knee_schedule.__name__)
"""
    assert run_python(code).splitlines() == [
        "[]",
        "arc value_fn range_test greedylr_jax.theory",
        "knee_schedule",
    ]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'greedylr_jax' has no attribute 'greedy'"):
        greedylr_jax.greedy  # noqa: B018


def test_the_library_does_not_import_packages_of_the_tests():
    """chex, hypothesis and pytest are dependencies of the tests only."""
    sources = [path.read_text() for path in PACKAGE.rglob("*.py")]
    for package in ("chex", "hypothesis", "pytest"):
        assert not any(f"import {package}" in source or f"from {package}" in source for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {dependency.split(">")[0] for dependency in project["dependencies"]}
    assert named == {"flax", "jax", "optax", "safetensors"}
    assert any(each.startswith("chex") for each in project["optional-dependencies"]["test"])


def test_the_listed_packages_are_those_of_the_library():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("__init__.py")}
    assert {name.replace(".", "/") for name in listed} == folders


@pytest.mark.slow
def test_the_wheel_holds_one_top_level_package(tmp_path):
    source = tmp_path / "source"  # a copy: files of a build would be part of the next one
    for folder in ("greedylr_jax", "experiments"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "-q", "-w", str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path)  # pip fetches setuptools
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"greedylr_jax"}
    assert {"greedylr_jax/py.typed", "greedylr_jax/arc/arc.safetensors", "greedylr_jax/arc/arc.md"} <= set(
        names
    )
