"""What a scene and its files were made with, as words that can be compared."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor, nn

WORDS_AT_ONCE = 2**22


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
    if sums.is_cuda:  # a copy to pageable memory that has to wait keeps other threads from launching kernels meanwhile
        torch.cuda.current_stream(sums.device).synchronize()
    first, second = sums.tolist()
    return first % 2**64, second % 2**64
