"""Where the recorded reference runs are.

Small ones are kept in ``tests/fixtures``. The full sets are read from the folder that the environment
variable GREEDYLR_REFERENCE_DATA names, or from ``../shared/data``, where they exist.
"""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_FULL = Path(os.environ.get("GREEDYLR_REFERENCE_DATA", ROOT.parent / "shared" / "data"))


def read_fixtures(name):
    """The records of one file of fixtures."""
    return json.loads((ROOT / "tests" / "fixtures" / name).read_text())


def read_full(name):
    """The records of one file of the full set, without its header; none where the set is missing."""
    path = _FULL / name
    if not path.exists():
        return []
    return [record for record in map(json.loads, path.read_text().splitlines()) if "header" not in record]


def reference_file(name):
    """The path of one file of the full set; skips the test where the set is missing."""
    path = _FULL / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path
