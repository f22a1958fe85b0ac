"""What a command looks at: photos of a folder, or frames of a video."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..io.photos import find_photos, is_photo, load_photos
from ..io.video import load_video
from ..measure.wording import count
from .arguments import FPS
from .errors import CommandError, refusals
from .text import stage


@dataclass(frozen=True)
class Footage:
    """Photos, or a video whose frames are read by `frames`.

    Attributes:
        path: The folder or the video.
        files: The photos, in order; None for a video.
        most: Frames of a video at most.
        frames_per_second: Of a video.
    """

    path: Path
    files: tuple[Path, ...] | None
    most: int | None
    frames_per_second: float

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Footage:
        """Return what `DIR`, `--max-frames` and `--fps` name; no picture is read.

        Raises:
            CommandError: There are no photos, or `--fps` has no video.
        """
        path: Path = arguments.folder
        # Whatever its name, a file that is no photo is given to FFmpeg.
        if path.is_file() and not is_photo(path):
            return cls(path, None, arguments.max_frames, arguments.fps or FPS)
        with refusals():
            files = find_photos(path)[: arguments.max_frames]
        if arguments.fps is not None:
            raise CommandError(f"--fps is for videos, and {path} is a folder of photos; leave it out")
        return cls.of_photos(path, files)

    @classmethod
    def of_photos(cls, path: Path, files: Sequence[Path]) -> Footage:
        """Return photos of a folder."""
        return cls(path, tuple(files), None, FPS)

    @property
    def noun(self) -> str:
        """What to call one of them."""
        return "frame" if self.files is None else "photo"

    def frames(self, long_side: int, patch_size: int) -> tuple[Tensor, list[str]]:
        """Read all, and return frames `[S, 3, H, W]` on the CPU and what to call each.

        Raises:
            CommandError: One cannot be read.
        """
        if self.files is None:
            with refusals(), stage(f"reading {self.path}"):
                frames, seconds = load_video(
                    self.path,
                    frames_per_second=self.frames_per_second,
                    max_frames=self.most,
                    long_side=long_side,
                    patch_size=patch_size,
                )
            return frames, [f"{second:.2f} s" for second in seconds]
        with refusals(), stage(f"reading {count(len(self.files), 'photo')}"):
            frames = load_photos(self.files, long_side=long_side, patch_size=patch_size)
        return frames, [file.name for file in self.files]
