"""Finished runs on disk, so that an interrupted comparison goes on where it stopped.

A folder holds ``settings.json``, while a comparison runs one Parquet file for each finished group of runs
under ``parts/``, and at the end all of them in ``runs.parquet``. Every file appears by an atomic rename.
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
    """Calls ``write`` with a temporary path beside ``path``, then renames it: all or nothing."""
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
    """The error of a folder with unfinished work that was begun with other settings."""
    return UsageError(
        f"{folder} holds an unfinished {what} with other settings: give those again to finish it, or --fresh "
        "to drop it, or another --out"
    )


def damaged(path: Path, error: Exception) -> UsageError:
    """The error of a file of unfinished work that something else than this program has cut or changed."""
    reason = str(error).partition("\n")[0]
    return UsageError(f"cannot go on from {path}: {reason}; give --fresh to drop the unfinished work")


class RunStore:
    """The runs of one comparison under one folder."""

    def __init__(self, folder: Path, settings: dict[str, Any], *, fresh: bool = False):
        """Opens the folder; goes on with an unfinished comparison of the same settings.

        Args:
          folder: where everything lies; made if it is not there.
          settings: what the results depend on, JSON values only.
          fresh: throw an unfinished comparison away.

        Raises:
          UsageError: if the folder cannot be written, or holds an unfinished comparison with other
            settings.
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
                raise other_settings(folder, "comparison")
        write_atomically(path, lambda temporary: temporary.write_text(described))

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Keeps a group of finished runs."""
        part = self._parts / f"{len(self._finished_parts()):06d}.parquet"
        write_atomically(part, pl.DataFrame(rows).write_parquet)

    def rows(self) -> pl.DataFrame | None:
        """The runs kept so far; None if there are none."""
        frames = []
        for part in self._finished_parts():
            try:
                frames.append(pl.read_parquet(part))
            except (OSError, pl.exceptions.PolarsError) as error:
                raise damaged(part, error) from error
        return pl.concat(frames) if frames else None

    def _finished_parts(self) -> list[Path]:
        """The files that were written to the end; what a kill left half-written begins with a dot."""
        return sorted(part for part in self._parts.glob("*.parquet") if not part.name.startswith("."))

    def finish(self) -> pl.DataFrame:
        """Puts all runs into ``runs.parquet`` and returns them."""
        runs = self.rows()
        write_atomically(self.folder / "runs.parquet", runs.write_parquet)
        shutil.rmtree(self._parts)
        return runs
