"""Frames of a video file to one tensor, without the many that show the same as the one before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..packages import optional
from ..user_warnings import warn
from .photos import frame_size

THUMBNAIL_SIDE = 16
CLOCK_RESTART = 1.0  # seconds; times that go back by less are those of frames stored in another order (avi)


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

    Frames are turned and mirrored as the file's display matrix says, and pixels that are not square are made so. The
    content alone tells the format, whatever the name is. Of several video streams the one that FFmpeg finds best
    counts; cover pictures do not. What is damaged is left out, and one warning counts it.

    Args:
        path: The file; anything that FFmpeg decodes.
        frames_per_second: How many frames a second of video to look at, as near to evenly as its frames allow.
        min_change: Least mean difference of thumbnails of 16 x 16 pixels from the last kept frame, in [0, 1]; 0 keeps
            all.
        max_frames: Stop after so many.
        long_side: Pixels of the longer side, before rounding.
        patch_size: Both sides are rounded to multiples of it.

    Returns:
        Frames `[S, 3, H, W]`, float32 in [0, 1], on the CPU, and their times in seconds since the first frame of the
        video. Times rise: where the file has none they follow from its frame rate, and where its clock is set back
        (clips joined to one file) they go on.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no video that can be read, or an argument is out of range.
        ImportError: If PyAV is not installed.
    """
    frame_size(1, 1, long_side, patch_size)
    kept: list[Tensor] = []
    times: list[float] = []
    for time, picture in kept_pictures(path, frames_per_second, min_change, max_frames):
        width, height = frame_size(picture.shape[-1], picture.shape[-2], long_side, patch_size)
        resized = F.interpolate(picture[None], size=(height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
        if kept and resized.shape != kept[0].shape:
            raise ValueError(f"all frames of {path} must be of one size, but it changes at {time:.2f} s; cut it there")
        kept.append(resized)
        times.append(time)
    return torch.stack(kept), times


def kept_pictures(
    path: str | Path, frames_per_second: float = 2.0, min_change: float = 0.02, max_frames: int | None = None
) -> Iterator[tuple[float, Tensor]]:
    """Yield the time and the picture `[3, H, W]` in [0, 1] of each frame that `load_video` keeps, in its own size.

    The arguments, and what is raised and warned of, are those of `load_video`; at least one frame is yielded.
    """
    if not frames_per_second > 0 or not 0 <= min_change <= 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(
            "frames_per_second must be above 0, min_change in [0, 1] and max_frames at least 1, got "
            f"{frames_per_second}, {min_change} and {max_frames}"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"a video file is needed, but {path} is none")
    damage: list[str] = []
    shown: Tensor | None = None
    kept = 0
    for time, picture in _sampled(Path(path), frames_per_second, damage):
        thumbnail = F.adaptive_avg_pool2d(picture, THUMBNAIL_SIDE)
        if shown is not None and float((thumbnail - shown).abs().mean()) < min_change:
            continue
        shown = thumbnail
        kept += 1
        yield time, picture
        if kept == max_frames:
            break
    if not kept:
        why = f": {len(damage)} packets are damaged ({damage[0]})" if damage else ""
        raise ValueError(f"{path} must hold a video, but no frame could be read from it{why}")
    if damage:
        warn(f"damaged packets or frames of {path} that were left out: {len(damage)} ({damage[0]})")


def _sampled(path: Path, frames_per_second: float, damage: list[str]) -> Iterator[tuple[float, Tensor]]:
    """Yield time and picture `[3, H, W]` in [0, 1] of one frame per interval; note in `damage` what is left out."""
    av = optional("av", "reading videos", "PyAV", "'svggt-kernels[video]'")
    try:
        with path.open("rb") as file:
            # FFmpeg gets no name: it reads some names as protocols (`12:30.mp4`) or patterns (`walk%d.gif`).
            nameless = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
            with av.open(nameless) as container:
                stream = _video_stream(container, path)
                rate = stream.guessed_rate or stream.average_rate
                duration = 1 / float(rate) if rate else 0.0
                due = 0
                for time, frame in _timed(_decoded(container, stream, damage), duration, path):
                    interval = math.floor((time + duration / 2) * frames_per_second)
                    if interval >= due:
                        due = interval + 1
                        yield time, _picture(frame, stream.sample_aspect_ratio or 1)
    except av.FFmpegError as error:
        raise ValueError(
            f"{path} cannot be read as a video (FFmpeg: {error.strerror}): give a file that a video player shows"
        ) from error


def _video_stream(container: Any, path: Path) -> Any:
    """Return the stream to read: FFmpeg's best one, or else the first, of the moving pictures that can be decoded."""
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
    moving = [stream for stream in container.streams.video if not stream.disposition & still]
    if not moving:
        content = "only still pictures, such as a cover" if container.streams.video else "no video stream"
        raise ValueError(f"{path} must hold a video, but has {content}")
    decodable = [stream for stream in moving if stream.codec_context is not None]
    if not decodable:
        raise ValueError(f"{path} must hold a video that FFmpeg decodes, but its codec is unknown: convert it to H.264")
    best = container.streams.best("video")
    return best if best in decodable else decodable[0]


def _decoded(container: Any, stream: Any, damage: list[str]) -> Iterator[Any]:
    """Yield the frames that can be decoded in full, in the order in which they are shown."""
    av = optional("av", "reading videos", "PyAV", "'svggt-kernels[video]'")
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                damage.append(error.strerror)
                continue
            for frame in frames:
                if frame.is_corrupt:
                    damage.append("decoded in part")
                else:
                    yield frame
    except av.InvalidDataError as error:  # of the container: nothing can be read after it
        damage.append(error.strerror)


def _timed(frames: Iterable[Any], duration: float, path: Path) -> Iterator[tuple[float, Any]]:
    """Yield frames with seconds since the first one, which rise.

    Args:
        frames: In the order in which they are shown.
        duration: Of a frame, in seconds; 0 if the file does not say.
        path: For the error.
    """
    now, shift = -duration, None  # shift: from the file's clock to seconds since the first frame
    for frame in frames:
        if frame.time is None and not duration:
            raise ValueError(
                f"{path} holds neither times nor a frame rate: convert it to mp4 with the rate that it has"
            )
        following = now + duration
        clock = following
        if frame.time is not None:
            if shift is None or frame.time + shift < now - CLOCK_RESTART:
                shift = following - frame.time
            clock = frame.time + shift
        now = clock if clock > now else following
        yield now, frame


def _picture(frame: Any, pixel_aspect: float) -> Tensor:
    """Return a frame as it is meant to be seen, `[3, H, W]` in [0, 1], with square pixels."""
    width = max(1, round(frame.width * pixel_aspect))
    pixels = frame.reformat(width=width, format="rgb24").to_ndarray()  # [H, W, 3]
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        # Stored x, y are shown at x' = a x + c y, y' = b x + d y.
        a, b, _, c, d, *_ = np.frombuffer(matrix, dtype=np.int32).tolist()
        if abs(b) > abs(a):
            pixels = pixels.transpose(1, 0, 2)
            a, d = c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
