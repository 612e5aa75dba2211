"""The progress bar."""

import subprocess
import sys

PROGRAM = """
import contextlib, io
from etils import epy
from rich.console import Console

lazy_imports = epy.lazy_imports

@contextlib.contextmanager
def draw_meanwhile(*args, **kwargs):
    with lazy_imports(*args, **kwargs):
        if progress is not None:
            progress.refresh()
        yield

epy.lazy_imports, progress = draw_meanwhile, None
from experiments.progress import make_progress

with make_progress(Console(file=io.StringIO(), force_terminal=True), "runs") as progress:
    progress.add_task("digits", total=2)
    import experiments.data.digits
"""


def test_a_bar_is_drawn_while_another_thread_imports():
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
