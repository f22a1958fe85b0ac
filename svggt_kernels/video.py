"""Frames of a video file to one tensor, without the many that show the same as the one before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"})
THUMBNAIL_SIDE = 16


def load_video(
    path: str | Path,
    *,
    frames_per_second: float = 2.0,
    min_change: float = 0.02,
    max_frames: int | None = None,
    long_side: int = 518,
    patch_size: int = 14,
) -> tuple[Tensor, list[float]]:
    """Read frames of a video, evenly in time, and leave out those that hardly differ from the last one kept.

    Near-duplicates (a camera that stands still) would be each other's nearest neighbours and leave no room for others.

    Args:
        path: The file; anything that FFmpeg decodes.
        frames_per_second: How many frames a second of video to look at.
        min_change: Least mean difference of thumbnails of 16 x 16 pixels from the last kept frame, in [0, 1]; 0 keeps
            all.
        max_frames: Stop after so many.
        long_side: Pixels of the longer side, before rounding.
        patch_size: Both sides are rounded to multiples of it.

    Returns:
        Frames `[S, 3, H, W]`, float32 in [0, 1], and their times in seconds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no video that can be read, or an argument is out of range.
        ImportError: If PyAV is not installed.
    """
    if not frames_per_second > 0 or not 0 <= min_change <= 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(
            "frames_per_second must be above 0, min_change in [0, 1] and max_frames at least 1, got "
            f"{frames_per_second}, {min_change} and {max_frames}"
        )
    if patch_size < 1 or long_side < patch_size:
        raise ValueError(f"long_side must be at least one patch of {patch_size} >= 1 pixels, got {long_side}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"a video file is needed, but {path} is none")
    kept: list[Tensor] = []
    times: list[float] = []
    shown: Tensor | None = None
    for time, picture in _sampled(Path(path), frames_per_second):
        thumbnail = F.adaptive_avg_pool2d(picture, THUMBNAIL_SIDE)
        if shown is not None and float((thumbnail - shown).abs().mean()) < min_change:
            continue
        shown = thumbnail
        height, width = picture.shape[-2:]
        scale = long_side / max(height, width)
        size = [max(1, round(side * scale / patch_size)) * patch_size for side in (height, width)]
        resized = F.interpolate(picture[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        if kept and resized.shape != kept[0].shape:
            raise ValueError(f"all frames of {path} must be of one size, but it changes at {time:.2f} s; cut it there")
        kept.append(resized)
        times.append(time)
        if len(kept) == max_frames:
            break
    if not kept:
        raise ValueError(f"{path} must hold a video, but no frame could be read from it")
    return torch.stack(kept), times


def _sampled(path: Path, frames_per_second: float) -> Iterator[tuple[float, Tensor]]:
    """Yield time and picture `[3, H, W]` in [0, 1] of one frame per interval."""
    av = _pyav()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} must hold a video, but has no video stream")
            due = 0.0
            for frame in container.decode(video=0):
                time = float(frame.time or 0.0)
                if time < due - 1e-6:
                    continue
                due = max(due, time) + 1 / frames_per_second
                yield time, torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float() / 255
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video ({error}): replace it") from error


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "reading videos needs PyAV, which is not installed: pip install 'svggt-kernels[video]'"
        ) from error
    return av
