"""The documentation site: each public name is on a page of the reference, and each link leads somewhere."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import greedylr_jax
from tests.greedylr_jax.test_surface import MODULES, public_names
from tests.site_links import problems

ROOT = Path(__file__).parents[1]
REFERENCE = [path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")]
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|exception|data|module):: (\S+)$", flags=re.MULTILINE)
DOCUMENTED = {name for text in REFERENCE for name in DIRECTIVE.findall(text)}


def public_paths():
    """The public names and modules, as ``greedylr_jax.greedy_lr`` or ``greedylr_jax.arc.arc``."""
    names = {f"greedylr_jax.{name}" for name in greedylr_jax.__all__}
    for module in MODULES:
        for name in public_names(getattr(greedylr_jax, module)):
            is_shared = name in greedylr_jax.__all__ and module == "probing"  # documented once
            names.add(f"greedylr_jax.{name}" if is_shared else f"greedylr_jax.{module}.{name}")
    return names


def test_every_public_name_is_in_the_reference_and_no_other():
    private = {name for name in DOCUMENTED if "._" in name}  # docstrings of the rules' own modules
    assert DOCUMENTED - private == public_paths()


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ('<a href="#x">', ["a.html links to #x, which has no such section"]),
        ('<a href="#x"><p id="x">', []),
        ('<a href="b.html">', ["a.html links to b.html, which does not exist"]),
        ('<img src="b.png">', ["a.html links to b.png, which does not exist"]),
        ('<script src="https://host/x.js">', ["a.html loads https://host/x.js"]),
        ('<link rel="stylesheet" href="//host/x.css">', ["a.html loads //host/x.css"]),
        ('<a href="https://host/page">', []),
    ],
)
def test_a_broken_link_is_found(tmp_path, page, found):
    (tmp_path / "a.html").write_text(page)
    assert problems(tmp_path) == found


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sphinx_book_theme") is None, reason='needs pip install -e ".[docs]"')
def test_the_site_builds_without_warnings_and_all_its_links_lead_somewhere(tmp_path):
    """Without executing the notebooks; ``nox -s docs`` and ``.ci/run`` execute them."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-D", "nb_execution_mode=off"]
    subprocess.run(
        [*command, "docs", str(tmp_path)], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert problems(tmp_path) == []
    assert "<math" in (tmp_path / "design.html").read_text()  # a browser draws it without a script
