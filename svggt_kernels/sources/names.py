"""Which image a name or a path means, among images that are known by name."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath, PurePosixPath

from ..user_warnings import warn

Parts = tuple[str, ...]
LISTED = 3  # names that a message gives as examples


class ImageNames:
    """The names of images; a name or path means the image that it fits best.

    From best to worst: the same string; the same folders and file name; the end of one image's path; a path that ends
    with an image's whole name, the longest such name first. Only whole folder and file names count, so a folder that
    differs is never passed over. Both kinds of slash separate folders, and the Unicode forms of a name are one name.

    Args:
        names: One per image.
        stems: Whether the end of an image's path may be given without the file's suffix, as the worst fit.
    """

    def __init__(self, names: Sequence[str | PurePath], *, stems: bool = False) -> None:
        self.names = [str(name) for name in names]
        self._images: defaultdict[tuple[str, str | Parts], list[int]] = defaultdict(list)
        for image, name in enumerate(self.names):
            parts = _parts(name)
            keys: list[tuple[str, str | Parts]] = [("name", name), ("whole", parts)]
            keys += [("end", end) for end in _ends(parts)]
            if stems:
                keys += [("stem", (*end[:-1], PurePosixPath(end[-1]).stem)) for end in _ends(parts)]
            for key in keys:
                self._images[key].append(image)

    def find(self, name: str | PurePath) -> int | None:
        """Return the image that a name or path means; None if it means none.

        Raises:
            ValueError: If several images fit equally well.
        """
        parts = _parts(str(name))
        contained = (("whole", end) for end in _ends(parts)[1:])
        keys: tuple[tuple[str, str | Parts], ...] = (
            ("name", str(name)),
            ("whole", parts),
            ("end", parts),
            *contained,
            ("stem", parts),
        )
        images: list[int] = next((self._images[key] for key in keys if key in self._images), [])
        if len(images) > 1:
            raise ValueError(
                f"{str(name)!r} must mean one image, but fits {_listed([self.names[image] for image in images])}; "
                "give more of its path"
            )
        return images[0] if images else None

    def frames_by_image(self, source: str, paths: Sequence[str | PurePath]) -> dict[int, list[int]]:
        """Return the frames of each image that some frame shows; warns of frames that show no known image.

        Several frames show one image only if they are one file. Else the frame with the image's own name shows it, and
        the rest are unknown.

        Args:
            source: What messages call the source that knows these images.
            paths: The file of each frame.

        Raises:
            ValueError: If no frame shows a known image, if a frame may show several, or if an image may be that of
                several files, none of which has its own name.
        """
        claims: defaultdict[int, list[int]] = defaultdict(list)
        for frame, path in enumerate(paths):
            image = self.find(path)
            if image is not None:
                claims[image].append(frame)
        frames_by_image = {image: self._of_one_file(image, frames, paths) for image, frames in claims.items()}
        known = {frame for frames in frames_by_image.values() for frame in frames}
        unknown = [str(path) for frame, path in enumerate(paths) if frame not in known]
        advice = "give the source of these images, or their names as it has them"
        if not known:
            raise ValueError(
                f"{source} knows none of the {len(paths)} images ({_listed(unknown)}): it is of {len(self.names)} "
                f"others ({_listed(self.names)}); {advice}"
            )
        if unknown:
            warn(
                f"{source} does not know {len(unknown)} of the {len(paths)} images ({_listed(unknown)}), so it says "
                f"nothing of whom they see; {advice}",
            )
        return frames_by_image

    def _of_one_file(self, image: int, frames: list[int], paths: Sequence[str | PurePath]) -> list[int]:
        """Return those of `frames`, all of which fit an image, that are the image's file."""
        name = self.names[image]

        def closeness(frame: int) -> tuple[bool, bool]:
            return str(paths[frame]) == name, _parts(str(paths[frame])) == _parts(name)

        closest = max(frames, key=closeness)
        same = [frame for frame in frames if _is_same_file(paths[frame], paths[closest])]
        if len(same) < len(frames) and not any(closeness(closest)):
            rest = next(frame for frame in frames if frame not in same)
            raise ValueError(
                f"{str(paths[closest])!r} and {str(paths[rest])!r} would both be the image {name!r}; give the images "
                "by the names that the source has"
            )
        return same


def _parts(name: str) -> Parts:
    return PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")).parts


def _ends(parts: Parts) -> list[Parts]:
    """Return the ends of a path, the longest first."""
    return [parts[start:] for start in range(len(parts))]


def _is_same_file(first: str | PurePath, second: str | PurePath) -> bool:
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):  # not there, or no path at all
        return _parts(str(first)) == _parts(str(second))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
