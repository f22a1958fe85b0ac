"""The photos to reconstruct: those of a folder, or frames of a video, which are written as photos first."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.photos import find_photos, is_photo, orientation, photo_size
from ..io.video import kept_pictures
from ..io.writing import write_all
from ..measure.cost import Tell
from ..measure.wording import count
from ..packages import optional
from .cameras import mirrored

IMAGES = "images"
"""Below an output folder: the frames of a video, as photos."""

RECORD = "video.json"
"""Of the folder of a video's frames: what they were made of. Written last, so it is there when all frames are."""

QUALITY = 95


@dataclass(frozen=True)
class Photos:
    """Photos whose pixels can be told from those of others.

    Attributes:
        files: The photos, in order.
        sizes: Width and height of each, upright.
        orientations: EXIF orientation of each.
        times: Seconds of each in its video; None for photos.
        request: What they are, in a form that JSON has: equal where the photos are equal.
    """

    files: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    orientations: tuple[int, ...]
    times: tuple[float, ...] | None
    request: dict[str, Any]


def is_video(source: Path) -> bool:
    """Whether a path is given to FFmpeg: a file that is no photo, whatever its name."""
    return source.is_file() and not is_photo(source)


def photos_of(source: str | Path | Sequence[str | Path], most: int | None = None) -> Photos:
    """Return the photos of a folder in the order of their names, or the photos of a list in its order.

    Args:
        source: The folder, or the files.
        most: Use the first so many only.

    Raises:
        FileNotFoundError: There is no such folder or file, or no photo in it.
        NotADirectoryError: The folder is a file.
        ValueError: A photo cannot be read, or is mirrored by its EXIF orientation.
    """
    files = find_photos(source) if isinstance(source, (str, os.PathLike)) else [Path(file) for file in source]
    return _known(files[:most], None, {})


def request_of_video(video: Path, frames_per_second: float, most: int | None) -> dict[str, Any]:
    """Return what is asked for of a video, in a form that JSON has.

    Raises:
        FileNotFoundError: There is no such video.
    """
    return {"video": stamp(video), "frames_per_second": frames_per_second, "most": most}


def photos_of_video(video: Path, request: dict[str, Any], folder: Path, tell: Tell = lambda progress: None) -> Photos:
    """Write frames of a video as photos into a folder, unless they are there already.

    Args:
        video: The file.
        request: What `request_of_video` returned of it.
        folder: Where the frames go: frame_000001.jpg and so on. Made as needed.
        tell: Is told how many frames there are so far.

    Raises:
        FileExistsError: The folder holds photos of something else.
        ValueError: The video cannot be read.
        OSError: A frame cannot be written.
    """
    held = _record(folder / RECORD)
    if held.get("request") != request:
        if held.get("video") != request["video"] and folder.exists() and any(map(is_photo, folder.iterdir())):
            raise FileExistsError(
                f"{folder} holds photos that are not frames of {video}; move them away, or name another output folder"
            )
        times = _write_frames(video, folder, request, tell)
        for file in set(folder.glob("frame_*.jpg")) - {folder / _name(place) for place in range(len(times))}:
            file.unlink()
        held = {"video": request["video"], "request": request, "times": times}
        write_all(folder, {RECORD: json.dumps(held).encode()})
    files = [folder / _name(place) for place in range(len(held["times"]))]
    return _known(files, tuple(held["times"]), request)


def stamp(file: Path) -> dict[str, Any]:
    """Return what tells the contents of a file from those of others, without reading it: name, bytes, and time.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"a file is needed, but {file} is none")
    state = file.stat()
    return {"name": file.name, "bytes": state.st_size, "changed": state.st_mtime_ns}


def _known(files: Sequence[Path], times: tuple[float, ...] | None, request: dict[str, Any]) -> Photos:
    sizes, orientations = tuple(map(photo_size, files)), tuple(map(orientation, files))
    if turned := mirrored(orientations):
        raise ValueError(
            f"photos must not be mirror images by their EXIF orientation, as no camera takes such; {len(turned)} of "
            f"{len(files)} are (first {files[turned[0]]}: EXIF orientation {orientations[turned[0]]}); write them "
            "upright, or take them out"
        )
    return Photos(tuple(files), sizes, orientations, times, request or {"photos": [stamp(file) for file in files]})


def _record(file: Path) -> Mapping[str, Any]:
    try:
        held = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _name(place: int) -> str:
    return f"frame_{place + 1:06d}.jpg"


def _write_frames(video: Path, folder: Path, request: Mapping[str, Any], tell: Tell) -> list[float]:
    pillow = optional("PIL.Image", "writing frames of a video", "Pillow", "'svggt-kernels[viz]'")
    # Until the last frame is written, the folder says whose frames it holds and not that it holds them all.
    write_all(folder, {RECORD: json.dumps({"video": request["video"]}).encode()})
    times: list[float] = []
    pictures = kept_pictures(video, frames_per_second=request["frames_per_second"], max_frames=request["most"])
    for time, picture in pictures:
        pixels = (255 * picture).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        pillow.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling=0)
        write_all(folder, {_name(len(times)): file.getvalue()})
        times.append(time)
        tell(count(len(times), "frame"))
    return times
