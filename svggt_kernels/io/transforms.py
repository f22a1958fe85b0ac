"""nerfstudio's and instant-ngp's transforms.json, as JSON; what its numbers must be is for those who read them.

Camera axes there are those of OpenGL: x right, y up, z backward.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

TURNED_AXES = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
"""A pose camera to world times these has axes of OpenCV where it had those of OpenGL, and the other way round."""


def read_frames(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the whole content of a transforms.json, and its frames, each of which has a file_path.

    Raises:
        ValueError: If it is none.
    """
    try:
        content = json.loads(path.read_bytes())
        frames = content["frames"]
        sound = isinstance(frames, list) and all(isinstance(frame, dict) for frame in frames)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a transforms.json with frames ({type(error).__name__}: {error})") from error
    if not sound:
        raise ValueError(f"{path} must hold a list of frames")
    for i, frame in enumerate(frames):
        if not isinstance(frame.get("file_path"), str):
            raise ValueError(f"{path}, frame {i} must have a file_path, got {sorted(frame)}")
    return content, frames


def photo_name(path: Path, frame: dict[str, Any]) -> str:
    """Return what a frame of that transforms.json calls its photo; as a whole path where it leaves the folder."""
    file = frame["file_path"]
    return os.path.abspath(path.parent / file) if ".." in Path(file).parts else file
