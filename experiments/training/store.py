"""Finished runs on disk, so that an interrupted study can be resumed.

A folder holds ``settings.json``; during a study one Parquet file for each finished group of runs in
``parts/``; and at the end all runs in ``runs.parquet``. Every file is written by an atomic rename.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from experiments.errors import UsageError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary path in the same folder, then renames that file to ``path``.

    Raises:
      UsageError: if the file cannot be written; then ``path`` is unchanged.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def other_settings(folder: Path, what: str) -> UsageError:
    """The error for a folder with unfinished work that has other settings."""
    return UsageError(
        f"{folder} holds an unfinished {what} with other settings; run it with the same settings to resume, "
        "or pass --fresh to discard it, or another --out"
    )


def damaged(path: Path, error: Exception) -> UsageError:
    """The error for a file of unfinished work that cannot be read."""
    reason = str(error).partition("\n")[0]
    return UsageError(f"cannot resume from {path}: {reason}; pass --fresh to discard the unfinished work")


class RunStore:
    """The runs of one study in one folder."""

    def __init__(self, folder: Path, settings: dict[str, Any], *, fresh: bool = False):
        """Opens the folder and resumes an unfinished study with the same settings.

        Args:
          folder: created if it does not exist.
          settings: everything that the results depend on, as JSON values.
          fresh: discard an unfinished study.

        Raises:
          UsageError: if the folder cannot be written, or holds an unfinished study with other settings.
        """
        self.folder = folder
        self._parts = folder / "parts"
        described = json.dumps(settings, indent=2, sort_keys=True)
        path = folder / "settings.json"
        if self._parts.exists():
            unfinished = path.read_text(errors="replace") if path.exists() else None
            if fresh:
                shutil.rmtree(self._parts)
            elif unfinished != described:
                raise other_settings(folder, "study")
        write_atomically(path, lambda temporary: temporary.write_text(described))

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Stores a group of finished runs."""
        part = self._parts / f"{len(self._finished_parts()):06d}.parquet"
        write_atomically(part, pl.DataFrame(rows).write_parquet)

    def rows(self) -> pl.DataFrame | None:
        """The runs stored so far; None if there are none."""
        frames = []
        for part in self._finished_parts():
            try:
                frames.append(pl.read_parquet(part))
            except (OSError, pl.exceptions.PolarsError) as error:
                raise damaged(part, error) from error
        return pl.concat(frames) if frames else None

    def _finished_parts(self) -> list[Path]:
        """The complete files; the name of a file that was being written at a kill starts with a dot."""
        return sorted(part for part in self._parts.glob("*.parquet") if not part.name.startswith("."))

    def finish(self, *, extensible: bool = False) -> pl.DataFrame:
        """Writes all runs to ``runs.parquet`` and returns them.

        Args:
          extensible: whether a later call with the same settings may add runs to these.
        """
        runs = self.rows()
        write_atomically(self.folder / "runs.parquet", runs.write_parquet)
        if not extensible:
            shutil.rmtree(self._parts)
        return runs
