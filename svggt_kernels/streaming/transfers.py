"""What goes to a device and comes back from it while it computes something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def read_ahead(parts: Iterator[Tensor], device: torch.device | None) -> Iterator[Tensor]:
    """Yield tensors on a device, of which the next one is read and copied by a thread while the last is in use.

    Args:
        parts: The tensors, read as they are asked for.
        device: Where they go; None leaves them where they are.
    """
    stream = _stream_beside(device)

    def following() -> Tensor | None:
        part = next(parts, None)
        if part is None or device is None:
            return part
        with _on(stream):
            if stream is None:  # elsewhere than on CUDA a copy that nobody waits for may read memory that is freed
                part = part.to(device)
            else:
                part = (part if part.is_cuda else part.pin_memory()).to(device, non_blocking=True)
        if stream is not None:
            stream.synchronize()
        return part

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(following)
        while (part := coming.result()) is not None:
            coming = thread.submit(following)
            if stream is not None:
                part.record_stream(torch.cuda.current_stream(device))
            yield part


class Downloads(Generic[Item]):
    """Copies named tensors to host memory by a thread, on a stream of its own, while the device goes on.

    Args:
        device: Where the tensors are.
        then: Called by the thread with what was copied, the frames that it is of, and the place of the first; returns
            what the future gives.
    """

    def __init__(self, device: torch.device, then: Callable[[dict[str, Tensor], Tensor, int], Item]) -> None:
        self.device, self.then = device, then
        self._stream = _stream_beside(device)
        self._thread = ThreadPoolExecutor(1)

    def begin(self, tensors: dict[str, Tensor], frames: Tensor, start: int) -> Future[Item]:
        """Begin to copy what the current stream has made or will have made by now."""
        ready = None if self._stream is None else torch.cuda.current_stream(self.device).record_event()
        return self._thread.submit(self._copy, tensors, frames, start, ready)

    def _copy(self, tensors: dict[str, Tensor], frames: Tensor, start: int, ready: torch.cuda.Event | None) -> Item:
        with _on(self._stream):
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            host = self._in_host_memory(tensors)
            return self.then(host, frames, start)

    def _in_host_memory(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._stream is None:
            return {name: tensor.to("cpu") for name, tensor in tensors.items()}
        # A copy to pageable memory would keep other threads from launching kernels meanwhile.
        pinned = {name: torch.empty_like(tensor, device="cpu", pin_memory=True) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            pinned[name].copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return {name: tensor.clone() for name, tensor in pinned.items()}

    def __enter__(self) -> Downloads[Item]:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()


def finished(item: Item) -> Future[Item]:
    """Return a future that gives an item at once."""
    future: Future[Item] = Future()
    future.set_result(item)
    return future


def _stream_beside(device: torch.device | None) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
