"""The outputs of an aggregator's layers that heads read, kept as two halves, on the device or in host memory."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any

import torch
from torch import Tensor


class LayerOutputs(Sequence[Tensor]):
    """Tokens after the frame block and after the global block of each layer that is read, side by side over C.

    It takes the place of the list of tensors `[B, S, P, 2 C]` that VGGT's aggregator returns. A layer becomes one
    tensor when it is read, and stays the same tensor, so that who changes it in place changes what heads read;
    `special_tokens` and `frames` read parts, which are copies. Layers in host memory are copied there on a
    stream of their own: while the copy runs the next block does too, and then the computation waits for it (`settle`),
    so that copying holds no memory that would not be held without it.

    Args:
        depth: Number of layers.
        layers: The layers that are kept; None for all.
        dtype: Dtype of what is read; None for that of the tokens.
        offloaded: Layers that wait in host memory where the device is CUDA.
    """

    def __init__(
        self,
        depth: int,
        layers: Collection[int] | None = None,
        dtype: torch.dtype | None = None,
        offloaded: Collection[int] = (),
    ) -> None:
        self.depth = depth
        self.layers = frozenset(range(depth) if layers is None else layers)
        self.dtype = dtype
        self.offloaded = frozenset(offloaded)
        self._halves: dict[int, list[Tensor | _HostCopy]] = {layer: [] for layer in self.layers}
        self._stream: torch.cuda.Stream | None = None
        self._copying: list[Tensor] = []

    def keep(self, layer: int, tokens: Tensor) -> None:
        """Keep half an output, tokens `[B, S, P, C]` that nobody writes to, if the layer is one that is read."""
        self.settle()
        if layer not in self.layers:
            return
        half: Tensor | _HostCopy = tokens
        if layer in self.offloaded and tokens.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(tokens.device)
            half = _HostCopy(tokens, self._stream)
            self._copying.append(tokens)
        self._halves[layer].append(half)

    def settle(self) -> None:
        """Make the current stream wait for the copies under way, and release the tokens that were copied."""
        if self._copying:
            self._wait()
            self._copying.clear()

    def _wait(self) -> None:
        """Make the current stream wait for all that was begun on the stream of copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def __len__(self) -> int:
        return self.depth

    def shape(self, layer: int) -> torch.Size:
        """Return the shape of a layer's output."""
        shapes = [half.shape for half in self._of(layer)]
        return torch.Size([*shapes[0][:3], sum(shape[3] for shape in shapes)])

    @property
    def read_dtype(self) -> torch.dtype:
        """Dtype of what is read."""
        return self.dtype or next(half.dtype for halves in self._halves.values() for half in halves)

    def __setitem__(self, layer: int, output: Tensor) -> None:
        """Put another output in the place of a layer's."""
        self._of(layer)[:] = [output]

    def __getitem__(self, layer: Any) -> Any:
        """Return the output of a layer, `[B, S, P, 2 C]`, or of several in a list.

        Raises:
            RuntimeError: If it was not kept.
            IndexError: If there is no such layer.
        """
        if isinstance(layer, slice):
            return [self[each] for each in range(self.depth)[layer]]
        halves = self._of(layer)
        if len(halves) > 1:
            halves[:] = [self._joined(halves, slice(None), slice(None))]
        (whole,) = halves
        assert isinstance(whole, Tensor)
        return whole

    def special_tokens(self, layer: int, count: int) -> Tensor:
        """Return the first `count` tokens of each frame of a layer's output, `[B, S, count, 2 C]`."""
        return self._joined(self._of(layer), slice(None), slice(count))

    def frames(self, layers: Sequence[int], parts: Sequence[slice]) -> Generator[dict[int, Tensor]]:
        """Yield the outputs of some layers, by layer, for one part of the frames after the other.

        While a part is in use the next one is copied from the host.
        """
        halves = {layer: self._of(layer) for layer in layers}
        try:
            coming = _begin(halves, parts[0])
            for following in [*parts[1:], None]:
                self._wait()
                arrived = {layer: self._side_by_side(each) for layer, each in coming.items()}
                coming = {} if following is None else _begin(halves, following)
                yield arrived
                del arrived
        finally:
            # What was being copied may be freed now, also where a head raised.
            self._wait()

    def _of(self, layer: int) -> list[Tensor | _HostCopy]:
        if not -self.depth <= layer < self.depth:
            raise IndexError(f"layer must be one of {self.depth}, got {layer}")
        layer %= self.depth
        if layer not in self.layers:
            raise RuntimeError(
                f"the output of layer {layer} was not kept, as no head of the patched model reads it; "
                'patch(model, outputs="all") keeps every layer'
            )
        return self._halves[layer]

    def _joined(self, halves: list[Tensor | _HostCopy], frames: slice, tokens: slice) -> Tensor:
        there = [half[:, frames, tokens] if isinstance(half, Tensor) else half.read(frames, tokens) for half in halves]
        return self._side_by_side(there)

    def _side_by_side(self, halves: list[Tensor]) -> Tensor:
        return torch.cat(halves, -1).to(self.dtype or halves[0].dtype)


def _begin(halves: dict[int, list[Tensor | _HostCopy]], frames: slice) -> dict[int, list[Tensor]]:
    """Begin to bring some frames of halves to the device."""
    return {
        layer: [half[:, frames] if isinstance(half, Tensor) else half.load(frames) for half in each]
        for layer, each in halves.items()
    }


class _HostCopy:
    """Tokens `[B, S, P, C]` copied to pinned host memory, on a stream beside the computation.

    They must not be freed before the copy is done: `LayerOutputs.settle` sees to that.

    Args:
        tokens: On a CUDA device.
        stream: Another than the current one.
    """

    def __init__(self, tokens: Tensor, stream: torch.cuda.Stream) -> None:
        self.device, self.dtype, self.shape = tokens.device, tokens.dtype, tokens.shape
        self.stream = stream
        self.pinned = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.pinned.copy_(tokens, non_blocking=True)

    def load(self, frames: slice) -> Tensor:
        """Begin to copy some frames to the device, on the stream of copies."""
        source = self.pinned[:, frames]
        # Allocated where it will be used, so the copy waits for who used this memory before.
        target = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for sample_target, sample in zip(target, source, strict=True):  # frames of one sample are contiguous
                sample_target.copy_(sample, non_blocking=True)
        return target

    def read(self, frames: slice, tokens: slice) -> Tensor:
        """Return some tokens of some frames on the device; the host waits for the copy."""
        self.stream.synchronize()
        return self.pinned[:, frames, tokens].to(self.device)
