"""The folder that results go to: looked at before any work is done, written when all of it is done."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..io.writing import write_all
from .errors import CommandError


def require_folder(folder: Path, files: Sequence[str] = ()) -> None:
    """Refuse before any work is done if `--output` can be no folder with files in it; creates nothing.

    Args:
        folder: The folder.
        files: Names of files that will be written there and must not be there yet.
    """
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise CommandError(
            f"--output {folder} holds {', '.join(there)} already; give --force to replace what an earlier run wrote, "
            "or name another folder"
        )
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise CommandError(f"--output must be a folder, but {nearest} is a file; name another one")
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise CommandError(
            f"--output must be a folder that can be written to, but {nearest} cannot ({error.strerror}); name another "
            "one"
        ) from error


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of these names, all of them or none: each becomes visible once all are on the disk.

    Raises:
        CommandError: The folder cannot be made or a file cannot be written, for example on a full disk. Files that
            were there before are as they were.
    """
    try:
        write_all(folder, contents)
    except OSError as error:
        raise CommandError(
            f"{', '.join(contents)} must be written to --output {folder}, and cannot be ({error.strerror}); free some "
            "space or name another folder"
        ) from error
