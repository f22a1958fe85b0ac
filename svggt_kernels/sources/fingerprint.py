"""Which images were seen before: 128 bits that tell their content."""

from __future__ import annotations

import weakref
from functools import lru_cache

import torch
from torch import Tensor

from .cache import LRUCache

# Sizes of images, by device, whose factors are kept.
FACTORS_KEPT = 4
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Integers of at most 32 bits that an element is read as, by the bytes of the element."""


def known_fingerprint(
    images: Tensor,  # [S, 3, H, W]
    known: LRUCache[bytes],
) -> bytes:
    """Return the fingerprint of images; on an accelerator that of an unchanged tensor is computed once.

    The host waits for it there. Unchanged is the tensor object that was given before, if PyTorch has counted no write
    to it since. Writes that PyTorch does not count (through `.data`, or by another library) are not seen. On the CPU,
    where nothing is waited for and arrays of NumPy share memory, the content is read each time, and so it is for
    tensors made in inference mode, whose writes nobody counts.

    Args:
        images: The images.
        known: Fingerprints of earlier calls.
    """
    if not is_waited_for(images.device) or images.is_inference():
        return fingerprint(images)
    # Each forward looks at a tensor through new views. Writes to any of them count for all.
    tensor = images._base if images._is_view() else images
    assert tensor is not None
    # A tensor has one weak reference without a callback, which equals no other once the tensor is gone.
    key = (weakref.ref(tensor), images._version, images.data_ptr(), images.shape, images.stride(), images.dtype)
    return known.get(key, lambda: fingerprint(images))


def is_waited_for(device: torch.device) -> bool:
    """Whether the host waits for a device when it reads what was computed there."""
    return device.type != "cpu"


def fingerprint(
    images: Tensor,  # [S, 3, H, W]
) -> bytes:
    """Return 128 bits per image, computed where the images are, and their dtype and shape.

    Images that differ in one bit differ in it. Each half is the sum of the image's words times fixed random 64-bit
    numbers, modulo 2^64: two different images agree in both with a probability of at most 2^-64 (the words are at most
    32 bits wide; multilinear hashing, Dietzfelbinger et al. 1997). That is no protection against someone who makes
    images agree on purpose.
    """
    if images.device.type == "mps":  # its 64-bit integers have gaps
        images = images.cpu()
    words = images.detach().contiguous().flatten(1).view(WORDS[images.element_size()])
    factors = _factors(words.shape[1], images.device)
    sums = [torch.stack([(word * factor).sum() for factor in factors]) for word in words]
    return torch.stack(sums).cpu().numpy().tobytes() + repr((images.dtype, tuple(images.shape))).encode()


@lru_cache(maxsize=FACTORS_KEPT)
def _factors(words: int, device: torch.device) -> Tensor:
    """Return the same random numbers in every process, `[2, words]` int64."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (2, words), generator=generator, device="cpu").to(device)
