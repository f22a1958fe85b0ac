"""The result of one forward of all frames, put together from the results of its parts."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Place:
    """Where a tensor of frames stood in a result.

    Attributes:
        name: Its name; None for the images that the model was given.
        shape: Of what it holds for each frame.
        dtype: Its dtype.
    """

    name: str | None
    shape: torch.Size
    dtype: torch.dtype


class WholeResult:
    """Puts results together: tensors `[1, n, ...]`, one by one or in mappings, lists and tuples, inside one another.

    The images that a model returns are those that the caller gave. Numbers and words must be the same in all parts.

    Args:
        images: All frames, `[B, S, 3, H, W]`.
        model: What messages call the model.

    Attributes:
        leaves: The tensors of frames in the result that was read last, as they were there, by name.
    """

    def __init__(self, images: Tensor, model: str) -> None:
        self.images, self.model = images, model
        self._fed: Tensor | None = None
        self._form: Any = None
        self._tensors: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are there so far."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def feed(self, frames: Tensor) -> Tensor:
        """Return frames `[n, 3, H, W]` as a model takes them, `[1, n, 3, H, W]`."""
        self._fed = frames[None]
        return self._fed

    def read(self, result: Any, frames: int) -> dict[str, Tensor]:
        """Return the tensors of a result of so many frames by name, `[n, ...]`.

        Raises:
            ValueError: If it holds something else that belongs to no frame, or other things than before.
        """
        tensors: dict[str, Tensor] = {}
        self.leaves = {}

        def at(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                fed = self._fed
                if fed is not None and value.shape == fed.shape and value.data_ptr() == fed.data_ptr():
                    return Place(None, value.shape[2:], value.dtype)
                if value.shape[:2] == (1, frames):
                    self.leaves[name], tensors[name] = value, value[0]
                    return Place(name, value.shape[2:], value.dtype)
            elif isinstance(value, PLAIN):
                return value
            what = list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"in chunks every tensor that {self.model} returns must be of frames, [1, {frames}, ...], but its "
                f"{name} is {what}; leave chunk out, or use open_scene(read=...), which reads what is needed"
            )

        form = walk(result, "", at)
        if self._form is None:
            self._form = form
        elif form != self._form:
            raise ValueError(
                f"in chunks {self.model} must return for each of them what it returns for the core, but got {form} "
                f"beside {self._form}; leave chunk out"
            )
        return tensors

    def put(self, sample: int, places: Tensor, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors `[n, ...]` of some frames of a sample.

        Args:
            sample: The sample.
            places: The places of the frames, `[n]`.
            tensors: What `read` returned.
        """
        for name, tensor in tensors.items():
            if name not in self._tensors:
                self._tensors[name] = tensor.new_empty(*self.images.shape[:2], *tensor.shape[1:])
            self._tensors[name][sample].index_copy_(0, places.to(tensor.device), tensor)

    def of_sample(self, name: str, sample: int) -> Tensor:
        """Return what was put of a sample under a name, `[S, ...]`."""
        return self._tensors[name][sample]

    def whole(self) -> Any:
        """Return the result for all frames, in the form of the parts'."""

        def at(name: str, value: Any) -> Any:
            if not isinstance(value, Place):
                return value
            return self.images if value.name is None else self._tensors[value.name]

        return walk(self._form, "", at)


def walk(value: Any, name: str, at: Callable[[str, Any], Any]) -> Any:
    """Return a copy of mappings, lists and tuples inside one another, with what `at` returns in place of all else.

    Args:
        value: What is copied.
        name: What it is called; empty at first.
        at: Is given what is replaced and its name: keys of mappings and places in others, joined by dots.
    """

    def inner(key: object) -> str:
        return f"{name}.{key}" if name else str(key)

    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for key in value:
            copied[key] = walk(value[key], inner(key), at)
        return copied
    if isinstance(value, (list, tuple)):
        items = [walk(item, inner(index), at) for index, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return at(name or "output", value)
