"""Frames of a scene, read as they go: from tensors, photos, folders, videos and iterators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.photos import common_size, find_photos, frame_size, read_photos
from ..io.pixels import require_unit_range
from ..io.video import kept_pictures
from .transfers import read_ahead

Item = TypeVar("Item")

Images = Tensor | str | Path | Sequence[str | Path] | Iterable[Tensor]
"""Frames `[S, 3, H, W]`; photos, or the folder of them; a video; an iterable of `[3, H, W]` or `[n, 3, H, W]`."""

BUFFERED = 256
"""Frames of an iterator among which the core is chosen, as it cannot be read twice."""


@dataclass(frozen=True)
class Frames:
    """Frames that are read some at a time.

    Attributes:
        parts: Begins to read and yields frames, some at a time, `[n, 3, H, W]` in [0, 1].
        count: How many there are, if that is known before they are read.
        again: Whether they can be read more than once.
        some: Reads the frames of some indices alone, where that is quicker than to read all.
    """

    parts: Callable[[int], Iterator[Tensor]]
    count: int | None
    again: bool = True
    some: Callable[[Sequence[int]], Tensor] | None = None

    def chunks(self, size: int, device: torch.device | None = None) -> Iterator[Tensor]:
        """Yield all frames in their order, `size` at a time, on a device; the next are read meanwhile."""
        return read_ahead(self.parts(size), device)

    def pick(self, indices: Sequence[int]) -> Tensor:
        """Return the frames of some indices, in their order.

        Raises:
            ValueError: If there are no such frames.
        """
        if self.count is not None and not all(0 <= index < self.count for index in indices):
            raise ValueError(f"the core must be among {self.count} frames, got {list(indices)}")
        if self.some is not None:
            return self.some(indices)
        wanted, found, start = set(indices), dict[int, Tensor](), 0
        for part in self.parts(BUFFERED):
            for index in range(start, start + len(part)):
                if index in wanted:
                    found[index] = part[index - start].clone()
            start += len(part)
            if len(found) == len(wanted):
                return torch.stack([found[index] for index in indices])
        raise ValueError(f"the core must be among {start} frames, got {list(indices)}")


def open_frames(images: Images, shape: tuple[int, int], *, size: tuple[int, int] | None = None) -> Frames:
    """Return frames that are read as they go.

    Args:
        images: The frames.
        shape: Pixels of the longer side of photos and videos, and of a patch of the model.
        size: Width and height to which photos are brought; None for the size that suits these.

    Raises:
        TypeError: If it is something else.
        ValueError: If there is no frame, or they are of another size or range; of an iterable as it is read.
        FileNotFoundError: If there is no such file or folder.
    """
    if isinstance(images, Tensor):
        return _of_tensor(images[0] if images.dim() == 5 and len(images) == 1 else images)
    if isinstance(images, (str, Path)):
        path = Path(images)
        if path.is_dir():
            return _of_photos(find_photos(path), size, shape)
        if not path.is_file():
            raise FileNotFoundError(f"images must be a folder of photos or a video, but {path} does not exist")

        def of_video(count: int) -> Iterator[Tensor]:
            return map(torch.stack, _batched(_of_video(path, shape), count))

        return Frames(of_video, None)
    if isinstance(images, Sequence) and images and all(isinstance(each, (str, Path)) for each in images):
        return _of_photos([Path(each) for each in images if isinstance(each, (str, Path))], size, shape)
    if isinstance(images, Sequence) and not images:
        raise ValueError("at least one image is needed, none was given")
    if not isinstance(images, Iterable):
        raise TypeError(
            "images must be a tensor [S, 3, H, W], photos, a folder, a video, or an iterable of frames, got "
            f"{type(images).__name__}"
        )
    source: Iterable[object] = images

    def of_iterable(count: int) -> Iterator[Tensor]:
        return map(_in_range, map(torch.stack, _batched(_singles(source), count)))

    return Frames(of_iterable, None, again=not isinstance(images, Iterator))


def buffered(frames: Frames, count: int) -> tuple[Frames, Frames]:
    """Read the first frames of what cannot be read twice; return these, and all with these in front.

    Args:
        frames: Not `again`.
        count: How many are held in memory.
    """
    reading = frames.parts(1)
    held = list(islice(reading, count))
    if not held:
        raise ValueError("at least one image is needed, none was given")
    first = torch.cat(held)

    def parts(size: int) -> Iterator[Tensor]:
        return map(torch.stack, _batched(chain(first, (part[0] for part in reading)), size))

    return _of_tensor(first), Frames(parts, None, again=False)


def _of_tensor(images: Tensor) -> Frames:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point() or not len(images):
        raise ValueError(
            f"images must be [S, 3, H, W] floating point in [0, 1] and not empty, got {images.dtype} "
            f"{list(images.shape)}"
        )
    if images.device.type != "cpu":  # as they are read it would wait for what the device computes
        _in_range(images)

    def parts(count: int) -> Iterator[Tensor]:
        some = images.split(count)
        return map(_in_range, some) if images.device.type == "cpu" else iter(some)

    return Frames(parts, len(images), some=lambda indices: images[list(indices)])


def _in_range(images: Tensor) -> Tensor:
    """Return images; raise if they are outside [0, 1]. A frame with NaN is given NaN, and the others are right."""
    require_unit_range(images, "frames", nan=True)
    return images


def _of_video(path: Path, shape: tuple[int, int]) -> Iterator[Tensor]:
    """Yield the frames of a video as `load_video` brings them to their size."""
    first: tuple[int, int] | None = None
    for time, picture in kept_pictures(path):
        width, height = frame_size(picture.shape[-1], picture.shape[-2], *shape)
        if first not in (None, (width, height)):
            raise ValueError(f"all frames of {path} must be of one size, but it changes at {time:.2f} s; cut it there")
        first = width, height
        yield F.interpolate(picture[None], size=(height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)


def _of_photos(paths: Sequence[Path], size: tuple[int, int] | None, shape: tuple[int, int]) -> Frames:
    """Return photos, brought to a width and height, or to those of the median photo for a longer side and a patch."""
    common = common_size(paths, *shape, size, "further frames take the shape of the core's")

    def some(indices: Sequence[int]) -> Tensor:
        return next(read_photos([paths[index] for index in indices], common, len(indices)))

    return Frames(lambda count: read_photos(paths, common, count), len(paths), some=some)


def _singles(images: Iterable[object]) -> Iterator[Tensor]:
    """Yield frames `[3, H, W]` of an iterable that gives one or several at a time."""
    for each in images:
        if not isinstance(each, Tensor) or each.dim() not in (3, 4) or each.shape[-3] != 3:
            given = list(each.shape) if isinstance(each, Tensor) else f"a {type(each).__name__}"
            raise TypeError(f"an iterable of images must give tensors [3, H, W] or [n, 3, H, W], got {given}")
        yield from each.reshape(-1, *each.shape[-3:])


def _batched(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    reading = iter(items)
    while some := list(islice(reading, count)):
        yield some
