"""What one CUDA stream has made and an object keeps, for kernels on any stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


def is_capturing(device: torch.device) -> bool:
    """Whether a device is a CUDA device and a CUDA graph captures what the current stream does."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class StreamOrder:
    """Lets any CUDA stream read tensors that an object makes when they are first needed, and keeps.

    Streams know nothing of one another. A kernel on another stream than the one that makes a tensor may read before its
    values are there; and once the object is gone, the allocator may give the memory away while that kernel still reads.
    The host never waits. Elsewhere than on CUDA nothing happens.

    Attributes:
        lock: To be held while more is made and put where it is kept.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._last: _Making | None = None

    def before_use(self, device: torch.device, kept: Callable[[], Iterable[Tensor]]) -> None:
        """Make the current stream of `device` wait until all is made, and the allocator until that stream has read it.

        What a CUDA graph captures cannot wait for what lies outside of it, so while one is captured nothing happens.

        Args:
            device: Where the tensors lie.
            kept: Returns all tensors that are kept so far; asked once for each stream.
        """
        last = self._last
        if device.type != "cuda" or last is None:
            return
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream == last.stream or is_capturing(device):
            return
        stream.wait_event(last.done)
        if stream.cuda_stream not in last.readers:
            for tensor in kept():
                if tensor.is_cuda:
                    tensor.record_stream(stream)
            last.readers.add(stream.cuda_stream)

    def after_making(self, device: torch.device) -> None:
        """Note that the current stream of `device` has made something, after it called `before_use`."""
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            self._last = _Making(stream.cuda_stream, stream.record_event(), set())


class _Making(NamedTuple):
    """When the last of what is kept was made; as its stream waited for all before, `done` stands for them too."""

    stream: int
    done: torch.cuda.Event
    readers: set[int]  # the streams that the allocator knows of
