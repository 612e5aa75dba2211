"""The README's examples run as printed, and its set-up commands are the two that it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs_as_printed(example, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example)
    subprocess.run([sys.executable, "-W", "error", str(script)], check=True, cwd=ROOT, timeout=120)


def test_the_first_example_raises_the_rate_and_lowers_the_loss(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[0])
    printed = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True).stdout
    loss, rate = map(float, re.fullmatch(r"loss (\S+), learning rate (\S+)\n", printed).groups())
    assert loss < 0.3
    assert rate > 1e-2


def test_there_are_two_set_up_commands():
    commands = re.findall(r"^pip install .*$", README, flags=re.MULTILINE)
    assert commands == [
        'pip install -e ".[experiments]" && python -m experiments compare',
        'pip install -e ".[test]" && pytest',
    ]
