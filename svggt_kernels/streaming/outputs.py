"""Outputs of a long run as files, a file for each chunk, which are not made again where they are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..io.tensor_files import read_arrays, write_arrays
from .identity import as_tensor, as_text, of_frames

SCENE, FRAMES = "scene", "frames"
"""Names in a file beside those of outputs: what the scene was made with, and which frames these are."""


class OutputFolder:
    """A folder with a file for each chunk of frames, `frames-START-STOP.npz`, STOP left out.

    Args:
        folder: The folder; made if it is not there.
        scene: What tells the scene from others.

    Raises:
        ValueError: If it holds files of another scene or another size of chunks.
    """

    def __init__(self, folder: Path, scene: str) -> None:
        self.folder, self.scene = folder, scene
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("frames-*.npz")):
            if self._text(path, SCENE) != scene:
                raise ValueError(
                    f"{folder} holds outputs of another model, core, kind of outputs or size of chunks ({path.name}); "
                    "give another folder, or take these files out"
                )

    def written(self, frames: Tensor, start: int) -> Path | None:
        """Return the file of a chunk if it is there.

        Raises:
            ValueError: If it is there, but of other frames.
        """
        path = self._path(start, start + len(frames))
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

    def _path(self, start: int, stop: int) -> Path:
        return self.folder / f"frames-{start:07d}-{stop:07d}.npz"

    def _text(self, path: Path, name: str) -> str | None:
        content = read_arrays(path, [name])
        return as_text(content[name]) if name in content else None


def read_outputs(paths: str | Path | Sequence[str | Path]) -> dict[str, Tensor]:
    """Return the outputs in files that `OpenScene.write` wrote, frames in the order of the files.

    Args:
        paths: The files, or the folder that holds them.

    Raises:
        ValueError: If there is no file, or one is damaged or something else.
        FileNotFoundError: If there is no such file.
    """
    if isinstance(paths, str | Path):
        paths = sorted(Path(paths).glob("frames-*.npz")) if Path(paths).is_dir() else [paths]
    if not paths:
        raise ValueError("at least one file is needed, none was given")
    parts = [read_arrays(Path(path)) for path in paths]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name not in (SCENE, FRAMES)}
