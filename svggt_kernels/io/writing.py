"""Files that are whole or not there: each is written beside its place and put there once it is on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield a path beside each of these to write to; all are put in place once the block has ended without an error.

    Folders are made as needed. Whatever ends the block otherwise, a full disk or an interrupt, leaves files that were
    there before as they were.

    Raises:
        OSError: A folder cannot be made, or a file cannot be put in place.
    """
    parts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield parts
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink()


def write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of these names below a folder, all of them or none.

    Raises:
        OSError: The folder cannot be made or a file cannot be written, for example on a full disk.
    """
    with replacing([folder / name for name in contents]) as parts:
        for part, content in zip(parts, contents.values(), strict=True):
            part.write_bytes(content)
