"""What a scene and its files were made with, as words that can be compared."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

WORDS_AT_ONCE = 2**22

PIXELS = 16
"""Rows and columns, about, of which pixels are compared first."""


def of_model(model: nn.Module) -> str:
    """Return what tells a model's class, weights and buffers from others, whatever device they are on.

    Of each tensor two sums of its 32-bit words count, one weighted by their places: exact, and no protection against
    someone who makes weights agree on purpose.
    """
    digest = blake2b(type(model).__qualname__.encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape), *_sums(tensor))).encode())
    return digest.hexdigest()


def of_frames(frames: Tensor) -> str:
    """Return what tells frames from others."""
    return blake2b(repr((frames.dtype, tuple(frames.shape), *_sums(frames))).encode(), digest_size=16).hexdigest()


def as_tensor(text: str) -> Tensor:
    """Return text as the bytes of a tensor, as files of tensors hold it."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def as_text(content: Tensor) -> str:
    """Return the text that `as_tensor` made a tensor of."""
    return bytes(content.tolist()).decode()


def _sums(tensor: Tensor) -> tuple[int, int]:
    """Return two sums of a tensor's words modulo 2^64."""
    if tensor.device.type == "mps":  # its 64-bit integers have gaps
        tensor = tensor.cpu()
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)  # which wrap at 2^64
    size = 4 * WORDS_AT_ONCE
    for start in range(0, len(content), size):
        part = content[start : start + size]
        words = torch.nn.functional.pad(part, (0, -len(part) % 4)).view(torch.int32).long()
        places = torch.arange(start + 1, start + 1 + len(words), device=words.device)
        sums += torch.stack([words.sum(), (words * places).sum()])
    first, second = _read(sums)
    return first % 2**64, second % 2**64


def same_frames(
    frames: Tensor,  # [n, 3, H, W]
    known: Tensor,  # [K, 3, H, W]
) -> dict[int, int]:
    """Return which frames are equal to known ones: the place of the known one by that of the frame.

    Some pixels of all pairs are compared, and all pixels of pairs that agree in these.
    """
    some = (
        ...,
        slice(None, None, max(1, frames.shape[2] // PIXELS)),
        slice(None, None, max(1, frames.shape[3] // PIXELS)),
    )
    pixels, known_pixels = (each[some].flatten(1) for each in (frames, known))
    alike = (pixels[:, None] == known_pixels.to(pixels)).all(-1)  # [n, K]
    pairs = [(n, k) for n, row in enumerate(_read(alike)) for k, is_alike in enumerate(row) if is_alike]
    return {n: k for n, k in reversed(pairs) if torch.equal(frames[n].to(known), known[k])}


def _read(tensor: Tensor) -> list[Any]:
    """Return the numbers of a tensor; a copy that waits keeps other threads from launching kernels, so wait before."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    content: list[Any] = tensor.tolist()
    return content
