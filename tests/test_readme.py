"""The README is short, its set-up commands are those that ``.ci/run`` reads, and its links lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_has_two_set_up_commands():
    commands = re.findall(r"^pip install .*$", README, flags=re.MULTILINE)
    assert commands == [
        'pip install -e ".[experiments]" && python -m experiments compare',
        'pip install -e ".[test]" && pytest',
    ]


def test_the_readme_has_at_most_120_lines():
    assert len(README.splitlines()) <= 120


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", README)
    assert len(links) > 20
    for path, section in links:
        assert (ROOT / path).is_file(), path
        if section:
            titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title).replace(" ", "-").lower() for title in titles]
            assert section in anchors
