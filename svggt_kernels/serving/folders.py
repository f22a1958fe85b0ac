"""Which files a server may read and write: those below the folders that it was started with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..io.photos import find_photos


class Folders:
    """Folders that may be read and written; whatever lies elsewhere is refused.

    Symbolic links and `..` are resolved first, so neither leads out.

    Args:
        allowed: The folders; they must exist.

    Raises:
        ValueError: There is none.
        NotADirectoryError: One is no folder.
    """

    def __init__(self, allowed: Sequence[Path]) -> None:
        if not allowed:
            raise ValueError("a server must be given at least one folder that it may read and write")
        for folder in allowed:
            if not folder.is_dir():
                raise NotADirectoryError(f"a server must be given folders that exist, but {folder} is none")
        self.allowed = tuple(folder.resolve() for folder in allowed)

    def inside(self, path: str) -> Path:
        """Return where a path leads; one that is relative begins at the first folder.

        Raises:
            ValueError: It leads outside of all folders, or is no path.
        """
        try:
            whole = (self.allowed[0] / path).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path!r} must be a path, and cannot be followed ({error})") from error
        if not any(whole.is_relative_to(folder) for folder in self.allowed):
            raise ValueError(
                f"{path} must lie in one of the folders that this server was started with "
                f"({', '.join(map(str, self.allowed))}), and leads elsewhere"
            )
        return whole

    def pictures(self, path: str) -> Path:
        """Return a folder of photos, all of which lie inside, or a video.

        Raises:
            ValueError: It leads outside, or a photo in it does.
            FileNotFoundError: There is none.
        """
        whole = self.inside(path)
        if not whole.is_file():
            for photo in find_photos(whole):
                self.inside(str(photo))
        return whole

    def whole(self, path: str) -> Path:
        """Return a file, or a folder all of whose files lie inside.

        Raises:
            ValueError: It leads outside, or a file in it does.
        """
        whole = self.inside(path)
        for file in whole.iterdir() if whole.is_dir() else ():
            self.inside(str(file))
        return whole

    def output(self, path: str, names: Sequence[str] = ()) -> Path:
        """Return a folder to write to, in which no file or folder of these names leads outside.

        Raises:
            ValueError: One does, or the folder.
        """
        whole = self.inside(path)
        for name in names:
            self.inside(str(whole / name))
        return whole
