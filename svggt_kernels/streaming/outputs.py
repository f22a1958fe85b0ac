"""Outputs of a long run as files, a file for each chunk, which are not made again where they are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ..io.tensor_files import read_arrays, write_arrays
from .identity import as_tensor, as_text, of_frames

SCENE, FRAMES = "scene", "frames"
"""Names in a file beside those of outputs: what the scene was made with, and which frames these are."""


RANGE = re.compile(r"frames-(\d+)-(\d+)\.npz$")
"""How the name of a file ends: the first frame and the one behind the last."""


class OutputFolder:
    """A folder with a file for each chunk of frames, `frames-START-STOP.npz`, STOP left out.

    Args:
        folder: The folder; made if it is not there.
        scene: What tells the scene from others.
        chunk: Frames of a chunk.

    Raises:
        ValueError: If it holds files of another scene or another size of chunks.
    """

    def __init__(self, folder: Path, scene: str, chunk: int) -> None:
        self.folder, self.scene, self.chunk = folder, scene, chunk
        folder.mkdir(parents=True, exist_ok=True)
        self._found = sorted(folder.glob("frames-*.npz"))
        for path in self._found:
            if self._text(path, SCENE) != scene:
                raise ValueError(
                    f"{folder} holds outputs of another model, core, kind of outputs or size of chunks ({path.name}); "
                    "give another folder, or take these files out"
                )

    def require(self, count: int) -> None:
        """Raise unless the files that were there are those of chunks of so many frames.

        Raises:
            ValueError: If frames were added at the end since, or taken out.
        """
        for path in self._found:
            start, stop = frames_of(path)
            if start >= count or stop != min(start + self.chunk, count):
                self._refuse(path, f"of {count} frames")

    def written(self, frames: Tensor, start: int) -> Path | None:
        """Return the file of a chunk if it is there.

        Raises:
            ValueError: If it is there, but of other frames.
        """
        path = self._path(start, start + len(frames))
        for found in self._found:
            if found != path and frames_of(found)[0] == start:
                self._refuse(found, f"where frames {start} to {start + len(frames) - 1} are one")
        if not path.exists():
            return None
        if self._text(path, FRAMES) != of_frames(frames):
            raise ValueError(f"{path} holds outputs of other frames; give another folder, or take it out")
        return path

    def write(self, outputs: dict[str, Tensor], frames: str, start: int) -> Path:
        """Write the outputs of a chunk.

        Args:
            outputs: Named tensors `[n, ...]`.
            frames: What tells its frames from others.
            start: The place of its first one.
        """
        path = self._path(start, start + len(next(iter(outputs.values()))))
        write_arrays(path, {**outputs, SCENE: as_tensor(self.scene), FRAMES: as_tensor(frames)})
        return path

    def _refuse(self, path: Path, chunks: str) -> NoReturn:
        start, stop = frames_of(path)
        raise ValueError(
            f"{path} holds frames {start} to {stop - 1}, which are no chunk {chunks}: some were added or taken out "
            "since; take this file out, or give another folder"
        )

    def _path(self, start: int, stop: int) -> Path:
        return self.folder / f"frames-{start:07d}-{stop:07d}.npz"

    def _text(self, path: Path, name: str) -> str | None:
        content = read_arrays(path, [name])
        return as_text(content[name]) if name in content else None


def frames_of(path: Path) -> tuple[int, int]:
    """Return the first frame of a file and the one behind its last.

    Raises:
        ValueError: If its name does not say so.
    """
    found = RANGE.search(path.name)
    if found is None:
        raise ValueError(f"a file of outputs must be called frames-START-STOP.npz, got {path}; give what write() wrote")
    return int(found[1]), int(found[2])


def read_outputs(paths: str | Path | Sequence[str | Path]) -> dict[str, Tensor]:
    """Return the outputs in files that `OpenScene.write` wrote, in the order of the frames.

    Args:
        paths: The files, or the folder that holds them; of one scene, all of them or some that follow one another.

    Raises:
        ValueError: If there is no file, one is damaged or something else, or they are of several scenes or do not
            follow one another.
        FileNotFoundError: If there is no such file.
    """
    if isinstance(paths, str | Path):
        paths = list(Path(paths).glob("frames-*.npz")) if Path(paths).is_dir() else [paths]
    if not paths:
        raise ValueError("at least one file is needed, none was given")
    files = sorted(map(Path, paths), key=frames_of)
    for last, path in pairwise(files):
        (_, stop), (start, _) = frames_of(last), frames_of(path)
        if start != stop:
            raise ValueError(f"frame {stop} must follow {last}, but {path} begins with {start}; give each chunk once")
    parts = [read_arrays(path) for path in files]
    scenes = {path: as_text(part[SCENE]) if SCENE in part else None for path, part in zip(files, parts, strict=True)}
    for path, scene in scenes.items():
        if scene is None or scene != scenes[files[0]]:
            other = "is no file of outputs" if scene is None else f"is of another scene than {files[0]}"
            raise ValueError(f"{path} {other}; give the files of one call of write()")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name not in (SCENE, FRAMES)}
