"""The README's examples run as printed, and its set-up commands are correct."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@functools.cache  # two tests use the first example
def output_of(index):
    """Runs an example, with warnings as errors, and returns its output."""
    command = [sys.executable, "-W", "error", "-c", EXAMPLES[index]]
    return subprocess.run(
        command, check=True, cwd=ROOT, timeout=120, text=True, stdout=subprocess.PIPE
    ).stdout


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example_runs_as_printed(index):
    output_of(index)


def test_the_first_example_raises_the_rate_and_lowers_the_loss():
    loss, rate = map(float, re.fullmatch(r"loss (\S+), learning rate (\S+)\n", output_of(0)).groups())
    assert loss < 0.3
    assert rate > 1e-2


def test_the_readme_has_two_set_up_commands():
    commands = re.findall(r"^pip install .*$", README, flags=re.MULTILINE)
    assert commands == [
        'pip install -e ".[experiments]" && python -m experiments compare',
        'pip install -e ".[test]" && pytest',
    ]
