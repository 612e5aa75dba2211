"""The Python code of the README and of the documentation's pages runs, and prints what the pages say.

The blocks of a page run in order and share their names, as a reader would run them. A ``text`` block that
follows a ``python`` block is its output, in which ``...`` stands for anything.
"""

import contextlib
import doctest
import functools
import io
import re
import warnings
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
OPTIONAL = ("equinox", "haiku", "tensorboardX")  # of the `test` extra; without them their pages are skipped


def blocks(page):
    """Pairs of code and expected output, None if the page does not show it."""
    found = BLOCK.findall(page.read_text())
    pairs = []
    for index, (kind, text) in enumerate(found):
        if kind == "python":
            follows = found[index + 1] if index + 1 < len(found) else ("", "")
            pairs.append((text, follows[1] if follows[0] == "text" else None))
    return pairs


@functools.cache  # two tests run the README
def run(page):
    """Runs the code of a page with warnings as errors; returns everything that it prints."""
    names, printed = {"__name__": "__main__"}, []
    for number, (code, expected) in enumerate(blocks(page)):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), warnings.catch_warnings(action="error"):
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)
        printed.append(output.getvalue())
        if expected is not None:
            matches = doctest.OutputChecker().check_output(
                expected, printed[-1], doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            assert matches, f"block {number} printed\n{printed[-1]}instead of\n{expected}"
    return "".join(printed)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page)],
)
def test_the_code_of_a_page_runs_as_printed(page, tmp_path, monkeypatch):
    for package in OPTIONAL:
        if re.search(rf"^(?:import|from) {package}\b", page.read_text(), flags=re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with jax.default_matmul_precision("float32"):
        run(page)


def test_a_wrong_output_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match=r"block 1 printed\n *2"):
        run(page)
    other = tmp_path / "other.md"
    other.write_text(page.read_text().replace("3", "..."))
    assert run(other) == "2\n"


def test_the_first_example_raises_the_rate_and_lowers_the_loss():
    loss, rate = map(float, re.match(r"loss (\S+), learning rate (\S+)\n", run(ROOT / "README.md")).groups())
    assert loss < 0.3
    assert rate > 1e-2


def test_every_page_of_the_documentation_with_code_is_tested():
    pages = [path for path in PAGES if "```python" in path.read_text()]
    assert all(blocks(path) for path in pages)
    assert {path.parent.name for path in pages} >= {"how_to", "coming_from", "docs"}
