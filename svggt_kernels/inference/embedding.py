"""The patch embedding, DINOv2 in VGGT, some frames at a time, and its tokens let go once they are joined with others.

VGGT's aggregator holds the patch tokens to its end, though it reads them once: when it puts the special tokens before
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PATCH_TOKENS = "x_norm_patchtokens"
"""What the aggregator takes of all that DINOv2 returns."""


class JoinedOnce:
    """Stands for a tensor, and lets it go when it was an argument of torch.cat.

    Args:
        tensor: Patch tokens `[B S, P, C]`.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self._tensor: Tensor | None = tensor

    @property
    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: If it was let go.
        """
        if self._tensor is None:
            raise RuntimeError(
                "the patch tokens were let go once they were joined with the special tokens, as VGGT reads them no "
                "more; this model does: patch(model, memory_budget=None) keeps them"
            )
        return self._tensor

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tensor."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor, name)

    def __getitem__(self, index: Any) -> Tensor:
        """Return what an index selects."""
        return self.tensor[index]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of the tensor."""
        given: list[JoinedOnce] = []

        def read(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [read(each) for each in value]
            if not isinstance(value, cls):
                return value
            given.append(value)
            return value.tensor

        result = func(*map(read, args), **{name: read(value) for name, value in (kwargs or {}).items()})
        if func is torch.cat:
            for each in given:
                each._tensor = None
        return result


def embed(original: Callable[[Tensor], Any], images: Tensor, frames_at_once: int) -> Any:
    """Return the patch tokens of images, `[B S, P, C]`, as `JoinedOnce`; what is no such tokens as it is.

    Args:
        original: The patch embedding, of images to tokens, or to a dict that has them as `PATCH_TOKENS`.
        images: `[B S, 3, H, W]`.
        frames_at_once: Frames that it runs at once.
    """
    whole: Tensor | None = None
    for start in range(0, len(images), frames_at_once):
        embedded = original(images[start : start + frames_at_once])
        tokens = embedded.get(PATCH_TOKENS) if isinstance(embedded, dict) else embedded
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            return embedded if len(images) <= frames_at_once else original(images)
        if whole is None:
            whole = tokens.new_empty(len(images), *tokens.shape[1:])
        whole[start : start + frames_at_once] = tokens
        del embedded, tokens
    assert whole is not None
    return JoinedOnce(whole)
