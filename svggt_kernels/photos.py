"""Photos from a folder to one tensor.

Every photo becomes upright RGB and is brought to one common size, because multi-view models take one tensor for all
frames.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
EXIF_ORIENTATION = 0x0112


def find_photos(folder: str | Path) -> list[Path]:
    """List the photos that lie directly in a folder, ordered by name, numbers by value (`2.jpg` before `10.jpg`).

    Files are told by their suffix (jpg, jpeg, png, webp, bmp, tif, tiff, in any case). Hidden files and subfolders are
    left out.

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
        raise NotADirectoryError(f"a folder of photos is needed, but {folder} is a file: give the folder it lies in")
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    photos = [path for path in files if path.suffix.lower() in PHOTO_SUFFIXES]
    if not photos:
        raise FileNotFoundError(f"{folder} holds no photo ({_names(PHOTO_SUFFIXES)}): it holds {_contents(files)}")
    return sorted(photos, key=_natural)


def load_photos(paths: Sequence[str | Path], *, long_side: int = 518, patch_size: int = 14) -> Tensor:
    """Read photos into one tensor of frames of one common size.

    Each photo is turned upright (EXIF orientation) and converted to 8-bit RGB: grey is repeated, a palette is looked
    up, 16-bit grey is scaled, transparency is laid on white; of an animation or a multi-page file the first image
    counts.

    The common size has the aspect ratio of the median photo; its long side is `long_side`, and both sides are rounded
    to the nearest multiple of `patch_size` (at least one patch). Each photo is scaled to cover that size (bicubic,
    antialiased) and what sticks out is cut off equally on both sides. Where all photos have the same shape, at most
    about one patch is cut. Threads read several photos at a time.

    Args:
        paths: The photos; the order is kept.
        long_side: Pixels of the longer side, before rounding.
        patch_size: Pixels of the model's patch.

    Returns:
        Frames `[S, 3, H, W]`, float32 in [0, 1], on the CPU.

    Raises:
        ValueError: No path, a size below one patch, or a file that cannot be read as a photo (it is named).
        ImportError: Pillow is not installed.
    """
    if not paths:
        raise ValueError("at least one photo is needed, none was given")
    if patch_size < 1 or long_side < patch_size:
        raise ValueError(f"long_side must be at least one patch of {patch_size} >= 1 pixels, got {long_side}")
    files = [Path(path) for path in paths]
    # Pillow releases the interpreter while it decodes and resizes.
    with ThreadPoolExecutor() as workers:
        width, height = _common_size(list(workers.map(_upright_size, files)), long_side, patch_size)
        frames = torch.empty(len(files), 3, height, width)

        def fill(frame: Tensor, file: Path) -> None:
            pixels = np.array(_cover(_read(file), width, height), dtype=np.uint8)  # [H, W, 3]
            frame.copy_(torch.from_numpy(pixels).permute(2, 0, 1)).div_(255)

        list(workers.map(fill, frames, files))
    return frames


def _natural(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort digits by value and before letters; the plain name settles what is left (`1.jpg`, `01.jpg`)."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name.lower())
    return [(False, int(part), "") if part[0] in "0123456789" else (True, 0, part) for part in parts], path.name


def _names(suffixes: Iterable[str]) -> str:
    return ", ".join(sorted(suffix.lstrip(".") for suffix in suffixes))


def _contents(files: Sequence[Path]) -> str:
    if not files:
        return "no file at all"
    counts = Counter(path.suffix.lower() or "no suffix" for path in files)
    return "only " + ", ".join(f"{count} x {suffix}" for suffix, count in counts.most_common(4))


def _open(path: Path) -> Image:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading photos needs Pillow, which is not installed: pip install 'svggt-kernels[viz]'"
        ) from error
    return Image.open(path)


def _broken(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as a photo ({type(error).__name__}: {error}): replace it or take it out")


def _upright_size(path: Path) -> tuple[int, int]:
    """Return width and height as the photo is meant to be seen, from the header alone."""
    try:
        with _open(path) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except ImportError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their parsing ran into
        raise _broken(path, error) from error
    return (height, width) if turned else (width, height)


def _common_size(sizes: Sequence[tuple[int, int]], long_side: int, patch_size: int) -> tuple[int, int]:
    width, height = sorted(sizes, key=lambda size: size[0] / size[1])[len(sizes) // 2]
    scale = long_side / max(width, height)
    return (
        max(1, round(width * scale / patch_size)) * patch_size,
        max(1, round(height * scale / patch_size)) * patch_size,
    )


def _read(path: Path) -> Image:
    from PIL import ImageOps

    try:
        with _open(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # as above
        raise _broken(path, error) from error


def _to_rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode in ("I", "F"):
        levels = np.asarray(image, dtype=np.float64)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} have no known white level")
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    elif image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _cover(image: Image, width: int, height: int) -> Image:
    """Scale to cover `width` x `height` and cut off equally on both sides."""
    from PIL import Image

    scale = max(width / image.width, height / image.height)
    half_width, half_height = width / scale / 2, height / scale / 2
    box = (
        max(0.0, image.width / 2 - half_width),
        max(0.0, image.height / 2 - half_height),
        min(float(image.width), image.width / 2 + half_width),
        min(float(image.height), image.height / 2 + half_height),
    )
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)
