"""Photos from a folder to one tensor.

Every photo becomes upright RGB and is brought to one common size, because multi-view models take one tensor for all
frames.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..packages import optional
from ..user_warnings import warn

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff"})
# Pillow reads these in some installations only, by a plugin or a newer release.
PLUGIN_SUFFIXES = frozenset({".heic", ".heif", ".hif", ".avif", ".jxl"})
RAW_SUFFIXES = frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"})
EXIF_ORIENTATION = 0x0112
UPRIGHT = 1
TURNED = range(2, 9)
ON_ITS_SIDE = range(5, 9)
CROP_WORTH_A_WARNING = 0.15  # of a photo's area
FEW_THREADS = 4
NAMED = 5  # of the things that a message could list


def find_photos(folder: str | Path) -> list[Path]:
    """List the photos that lie directly in a folder, ordered by name, numbers by value (`2.jpg` before `10.jpg`).

    Files are told by their suffix (jpg, jpeg, jpe, jfif, mpo, png, webp, bmp, tif, tiff, in any case; heic, heif, hif,
    avif and jxl where Pillow has a reader for them, such as pillow-heif's). Hidden files and subfolders are left out.
    One warning counts the photos of kinds that cannot be read (heic without a reader, a camera's raw files).

    Args:
        folder: The folder to look into.

    Returns:
        The paths, never an empty list.

    Raises:
        FileNotFoundError: The folder does not exist, or holds no photo.
        NotADirectoryError: The path is a file.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"a folder of photos is needed, but {folder} does not exist")
    if not folder.is_dir():
        advice = (
            "give the folder it lies in"
            if is_photo(folder)
            else "load_video, `layout`, `reconstruct`, `compare` and `sweep` read videos"
        )
        raise NotADirectoryError(f"a folder of photos is needed, but {folder} is a file: {advice}")
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    files = [path for path in entries if path.is_file()]
    photos = [path for path in files if is_photo(path)]
    if not photos:
        subfolders = sorted(path.name for path in entries if path.is_dir())
        kinds = ", ".join(sorted(suffix.lstrip(".") for suffix in PHOTO_SUFFIXES))
        raise FileNotFoundError(f"{folder} holds no photo ({kinds}): it holds {_contents(files, subfolders)}")
    unread = [path for path in files if path.suffix.lower() in PLUGIN_SUFFIXES | RAW_SUFFIXES and not is_photo(path)]
    if unread:
        warn(
            f"{folder}: photos taken: {len(photos)}, left out because Pillow cannot read them here: {len(unread)} "
            f"({_counts(unread)}); convert these to jpg or png if they are wanted",
        )
    return sorted(photos, key=_natural)


def is_photo(path: Path) -> bool:
    """Tell by the suffix whether `load_photos` can read a file."""
    suffix = path.suffix.lower()
    return suffix in PHOTO_SUFFIXES or (suffix in PLUGIN_SUFFIXES and suffix in _pillow().registered_extensions())


def load_photos(
    paths: Sequence[str | Path],
    *,
    long_side: int = 518,
    patch_size: int = 14,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Read photos into one tensor of frames of one common size.

    Each photo is turned upright (EXIF orientation; where EXIF cannot be read, the photo is taken as it is stored) and
    converted to 8-bit RGB: grey is repeated, a palette is looked up, 16-bit grey is scaled, transparency is laid on
    white; of an animation or a multi-page file the first image counts.

    The common size has the aspect ratio of the median photo; its long side is `long_side`, and both sides are rounded
    to the nearest multiple of `patch_size` (at least one patch). Each photo is scaled to cover that size (bicubic,
    antialiased) and what sticks out is cut off equally on both sides: `crop_of` says what is left. Where all photos
    have the same shape, at most about one patch is cut. One warning names the photos that lose more than 15 % of their
    area to the median's shape. Threads read several photos at a time.

    Args:
        paths: The photos; the order is kept.
        long_side: Pixels of the longer side, before rounding.
        patch_size: Pixels of the model's patch.
        size: Width and height of the frames, for a model that takes one size alone; the rest then plays no role.

    Returns:
        Frames `[S, 3, H, W]`, float32 in [0, 1], on the CPU.

    Raises:
        ValueError: No path, a size below one patch, or a file that cannot be read as a photo (it is named).
        ImportError: Pillow is not installed.
    """
    files = [Path(path) for path in paths]
    why = "" if size is None else f"the model has learned frames of {size[0]} x {size[1]} px alone"
    return next(read_photos(files, common_size(files, long_side, patch_size, size, why), len(files)))


def common_size(
    files: Sequence[Path], long_side: int, patch_size: int, size: tuple[int, int] | None = None, why: str = ""
) -> tuple[int, int]:
    """Return the width and height to which `load_photos` brings photos; warn of those that lose much of their area.

    Args:
        files: The photos.
        long_side: As in `load_photos`.
        patch_size: Likewise.
        size: Likewise.
        why: With `size`, why it is that.

    Raises:
        ValueError: No photo, a size below one patch, or a file that cannot be read as a photo.
        ImportError: Pillow is not installed.
    """
    if not files:
        raise ValueError("at least one photo is needed, none was given")
    with ThreadPoolExecutor() as workers:
        sizes = list(workers.map(photo_size, files))
    if size is not None:
        _warn_of_crops(files, sizes, size[0] / size[1], why)
        return size
    width, height = sorted(sizes, key=lambda size: size[0] / size[1])[len(sizes) // 2]
    common = frame_size(width, height, long_side, patch_size)
    _warn_of_crops(files, sizes, width / height, "all frames take the shape of the median photo")
    return common


def read_photos(files: Sequence[Path], size: tuple[int, int], count: int) -> Iterator[Tensor]:
    """Yield photos as frames of a width and height, `count` at a time, `[n, 3, H, W]` as `load_photos` returns them.

    Threads read those of the next part while one is in use: few at first, and twice as many each time that a part was
    waited for. More than are needed take the interpreter from a thread that launches kernels meanwhile.

    Raises:
        ValueError: A file cannot be read as a photo.
    """
    most = max(FEW_THREADS, os.cpu_count() or 1)
    threads = FEW_THREADS if len(files) > count else most
    reading = deque[tuple[Tensor, list[Future[None]]]]()
    with ExitStack() as pools:
        workers = _threads(threads, pools)
        for start in range(0, len(files), count):
            some = files[start : start + count]
            frames = torch.empty(len(some), 3, size[1], size[0], dtype=torch.float32, device="cpu")
            reading.append((frames, [workers.submit(_fill, *each) for each in zip(frames, some, strict=True)]))
            if len(reading) > 1:  # no thread waits for the last photo of a part
                frames, photos = reading.popleft()
                was_waited_for = start > count and not all(photo.done() for photo in photos)
                if was_waited_for and threads < most:
                    threads = min(2 * threads, most)
                    workers = _threads(threads, pools)
                yield _filled(frames, photos)
        while reading:
            yield _filled(*reading.popleft())


def _threads(count: int, pools: ExitStack) -> ThreadPoolExecutor:
    """Return so many threads, which end with a stack of pools and leave what they have not begun by then."""
    workers = ThreadPoolExecutor(count)
    pools.callback(workers.shutdown, cancel_futures=True)
    return workers


def _filled(frames: Tensor, photos: list[Future[None]]) -> Tensor:
    for photo in photos:
        photo.result()
    return frames


def _fill(frame: Tensor, file: Path) -> None:
    """Write a photo to a frame `[3, H, W]`."""
    photo, (height, width) = _read(file), frame.shape[1:]
    shown = crop_of(photo.size, (width, height)).box(photo.size, (width, height))
    scaled = photo.resize((width, height), _pillow().Resampling.BICUBIC, box=shown)
    pixels = np.array(scaled, dtype=np.uint8)  # [H, W, 3]
    # Not by PyTorch, which would start a team of threads for each of these threads.
    np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=frame.numpy())


def frame_size(width: float, height: float, long_side: int, patch_size: int) -> tuple[int, int]:
    """Return the width and height of a frame that a model takes, in the aspect ratio nearest to that of a picture.

    Args:
        width: Of the picture, in any unit.
        height: Of the picture, in the same unit.
        long_side: Pixels of the frame's longer side, before rounding.
        patch_size: Both sides are rounded to the nearest multiple of it, and are at least one patch.

    Raises:
        ValueError: The patch is below 1 pixel, or the longer side below one patch.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1 pixel, got {patch_size}")
    if long_side < patch_size:
        raise ValueError(f"long_side must be at least one patch of {patch_size} pixels, got {long_side}")
    scale = long_side / max(width, height)
    return (
        max(1, round(width * scale / patch_size)) * patch_size,
        max(1, round(height * scale / patch_size)) * patch_size,
    )


class Crop(NamedTuple):
    """Which part of an upright photo its frame shows: the largest of the frame's shape, in the middle of the photo.

    A point (x, y) of the frame, in pixels from the frame's top left corner, is (left + scale x, top + scale y) in
    pixels from the photo's.

    Attributes:
        left: Pixels of the photo that are cut off on the left, and as many on the right.
        top: Pixels that are cut off at the top, and as many at the bottom.
        scale: Pixels of the photo for each pixel of the frame.
    """

    left: float
    top: float
    scale: float

    def box(self, photo: tuple[int, int], frame: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom of that part in pixels of the photo; rounding leaves none outside it."""
        right, bottom = self.left + self.scale * frame[0], self.top + self.scale * frame[1]
        return max(0.0, self.left), max(0.0, self.top), min(right, photo[0]), min(bottom, photo[1])

    def lost(self, photo: tuple[int, int]) -> float:
        """Return the share of the photo's area that is cut off."""
        return 1 - (1 - 2 * self.left / photo[0]) * (1 - 2 * self.top / photo[1])


def crop_of(photo: tuple[int, int], frame: tuple[int, int]) -> Crop:
    """Return the part of a photo that a frame shows.

    Args:
        photo: Width and height of the upright photo, in pixels.
        frame: Width and height of the frame, in pixels.
    """
    scale = min(photo[0] / frame[0], photo[1] / frame[1])
    return Crop((photo[0] - scale * frame[0]) / 2, (photo[1] - scale * frame[1]) / 2, scale)


def read_levels(path: Path) -> np.ndarray:
    """Return the numbers of a grey picture as they are stored, upright or not, `[H, W]`; three dimensions if coloured.

    Raises:
        ValueError: The file cannot be read as a picture.
    """
    with _opened(path) as image:
        return np.array(image)


def _natural(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort digits by value and before letters; the plain name settles what is left (`1.jpg`, `01.jpg`)."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name.lower())
    return [(False, int(part), "") if part[0] in "0123456789" else (True, 0, part) for part in parts], path.name


def _counts(files: Sequence[Path]) -> str:
    counts = Counter(path.suffix.lower() or "no suffix" for path in files)
    return ", ".join(f"{count} x {suffix}" for suffix, count in counts.most_common(NAMED))


def _first(texts: Sequence[str]) -> str:
    return ", ".join(texts[:NAMED]) + (f" and {len(texts) - NAMED} more" if len(texts) > NAMED else "")


def _contents(files: Sequence[Path], subfolders: Sequence[str]) -> str:
    if subfolders:
        beside = f"{_counts(files)} and " if files else ""
        return f"only {beside}subfolders, which are not looked into ({_first(subfolders)}): give one of them"
    return f"only {_counts(files)}" if files else "no file at all"


def _warn_of_crops(files: Sequence[Path], sizes: Sequence[tuple[int, int]], ratio: float, why: str) -> None:
    """Name the photos that lose much of their area to a frame of that ratio of width to height."""
    lost = [1 - min(w / h, ratio) / max(w / h, ratio) for w, h in sizes]
    cropped = [
        f"{file} loses {share:.0%}" for file, share in zip(files, lost, strict=True) if share > CROP_WORTH_A_WARNING
    ]
    if cropped:
        warn(
            f"photos cropped by more than {CROP_WORTH_A_WARNING:.0%} of their area: {len(cropped)} of {len(files)}, "
            f"because {why}: {_first(cropped)}; take photos of one shape if what is cut off matters",
        )


def _pillow(module: str = "PIL.Image") -> Any:
    """Return a module of Pillow."""
    return optional(module, "reading photos", "Pillow", "'svggt-kernels[viz]'")


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """Open a photo; whatever Pillow raises until it is closed names the file and says what to do."""
    pillow = _pillow()
    advice = "replace it or take it out"
    try:
        with pillow.open(path) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise whatever their parsing ran into
        if isinstance(error, (pillow.DecompressionBombError, pillow.DecompressionBombWarning)):
            advice = "raise PIL.Image.MAX_IMAGE_PIXELS (None: no limit) if the file is trusted, or scale it down"
        raise ValueError(f"{path} cannot be read as a photo ({type(error).__name__}: {error}): {advice}") from error


def _orientation(image: Image) -> int:
    """Return how a photo is stored, as EXIF numbers it: 2 to 8, or 1 (upright) where EXIF says none of these."""
    try:
        number = image.getexif().get(EXIF_ORIENTATION, UPRIGHT)
    except Exception:  # as Pillow's parser raises it; EXIF is no part of the picture
        return UPRIGHT
    return int(number) if number in TURNED else UPRIGHT


def orientation(path: Path) -> int:
    """Return the EXIF orientation by which `load_photos` turns or mirrors a photo, 2 to 8; 1 if it is shown as stored.

    Raises:
        ValueError: The file cannot be read as a photo.
    """
    with _opened(path) as image:
        return _orientation(image)


def photo_size(path: Path) -> tuple[int, int]:
    """Return width and height as the photo is meant to be seen, from the header alone if that tells.

    Raises:
        ValueError: The file cannot be read as a photo.
    """
    with _opened(path) as image:
        if image.format == "TIFF" and _orientation(image) in ON_ITS_SIDE:
            image.load()  # turns by the tag and drops it; the header's size is turned in some releases of Pillow only
        width, height = image.size
        return (height, width) if _orientation(image) in ON_ITS_SIDE else (width, height)


def stored_size(path: Path) -> tuple[int, int]:
    """Return width and height of the pixels of a photo as they are stored, upright or not.

    Raises:
        ValueError: The file cannot be read as a photo.
    """
    width, height = photo_size(path)
    return (height, width) if orientation(path) in ON_ITS_SIDE else (width, height)


def _read(path: Path) -> Image:
    with _opened(path) as image:
        image.load()  # first, because a TIFF is turned by it
        return _upright(_to_rgb(image), _orientation(image))


def _upright(image: Image, orientation: int) -> Image:
    """Turn by the tag alone: `ImageOps.exif_transpose` writes EXIF again, which fails where a field is out of range."""
    turn = _pillow().Transpose
    method = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image) -> Image:
    pillow = _pillow()
    if image.mode.startswith(("I", "F")):  # I, F, I;16 and its orders of bytes
        levels = np.asarray(image, dtype=np.float64)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} have no known white level")
        image = pillow.fromarray((levels / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    # `convert` copies an image that is RGB, and holds the interpreter meanwhile.
    return image if image.mode == "RGB" else image.convert("RGB")
