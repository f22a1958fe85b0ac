"""Which images were seen before: 128 bits that tell their content."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Sizes of images, by device, whose factors are kept.
FACTORS_KEPT = 4
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Integers of at most 32 bits that an element is read as, by the bytes of the element."""


def fingerprint(
    images: Tensor,  # [S, 3, H, W]
    sums: Tensor | None = None,  # [S, 2]
) -> bytes:
    """Return 128 bits per image, and the dtype and shape of the images; waits for their device.

    Images that differ in one bit differ in it. Each half is the sum of the image's words times fixed random 64-bit
    numbers, modulo 2^64: two different images agree in both with a probability of at most 2^-64 (the words are at most
    32 bits wide; multilinear hashing, Dietzfelbinger et al. 1997). That is no protection against someone who makes
    images agree on purpose.

    Args:
        images: The images.
        sums: What `word_sums` returned of them, if it was called before.
    """
    sums = word_sums(images) if sums is None else sums
    return sums.cpu().numpy().tobytes() + repr((images.dtype, tuple(images.shape))).encode()


def word_sums(
    images: Tensor,  # [S, 3, H, W]
) -> Tensor:
    """Return two sums of each image's words times random numbers, int64 `[S, 2]`; on CUDA nothing is waited for."""
    if images.device.type == "mps":  # its 64-bit integers have gaps
        images = images.cpu()
    words = images.detach().contiguous().flatten(1).view(WORDS[images.element_size()])
    factors = _factors(words.shape[1], images.device)
    return torch.stack([torch.stack([(word * factor).sum() for factor in factors]) for word in words])


@lru_cache(maxsize=FACTORS_KEPT)
def _factors(words: int, device: torch.device) -> Tensor:
    """Return the same random numbers in every process, `[2, words]` int64."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (2, words), generator=generator, device="cpu").to(device)
