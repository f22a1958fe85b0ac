"""Layer outputs: those that no head reads are never made, and the others may lie elsewhere until one does.

VGGT's aggregator keeps the tokens of all its layers, those after the frame block and those after the global block side
by side, and its heads read four. Here the others become holes in the list, so that the heads' indices still hold. What
is kept may be an `Output`: the two halves as they are, in bfloat16 or in host memory, which become one tensor of
upstream's dtype only for those who read, some frames at a time for DPT heads.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

STAGES = ("_process_frame_attention", "_process_global_attention")
"""Methods of an aggregator that each return tokens, the index of the next block, and the outputs to keep."""

DPT_ARGUMENTS = ("self", "aggregated_tokens_list", "images", "patch_start_idx", "frames_chunk_size")
"""What the forwards of VGGT's DPT heads take."""

STAGE_ARGUMENTS = ("self", "tokens", "B", "S", "P", "C")
"""What both take first; then comes the index of the block, then positions."""


def are_upstreams(aggregator: type) -> bool:
    """Whether a class runs its blocks by upstream's two stages, so that what they return can be changed."""
    arguments = [
        tuple(inspect.signature(stage).parameters) if callable(stage := getattr(aggregator, name, None)) else ()
        for name in STAGES
    ]
    return all(len(names) == 8 and names[:6] == STAGE_ARGUMENTS and names[7] == "pos" for names in arguments)


class Hole:
    """Stands in a list of layer outputs where one was not kept; whoever reads it is told so."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Hole:
        """Joined with another hole it stays one: what the aggregator does to make a layer's output."""
        given = [part for each in (*args, *(kwargs or {}).values()) for part in _flat(each)]
        hole = next(part for part in given if isinstance(part, cls))
        if func is not torch.cat or any(isinstance(part, (Tensor, Output)) for part in given):
            hole._refuse()
        return hole

    def __getitem__(self, index: object) -> Any:
        """Refuse."""
        self._refuse()

    def __getattr__(self, name: str) -> Any:
        """Refuse."""
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            f"the output of layer {self.layer} was not kept, as no head of the patched model reads it; "
            'patch(model, outputs="all") keeps every layer'
        )


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _flat(value: Any) -> Sequence[Any]:
    return value if _is_list(value) else [value]


def layers_read(model: nn.Module, depth: int) -> frozenset[int] | None:
    """Return which of `depth` layers the heads of a model read; None if it has no head that says so.

    Heads say so by `intermediate_layer_idx`, as DPT heads do; camera heads read the last.
    """
    stated = [indices for module in model.modules() if (indices := getattr(module, "intermediate_layer_idx", None))]
    if not stated:
        return None
    return frozenset(index % depth for indices in stated for index in indices) | {depth - 1}


def reads_some_frames(head: nn.Module) -> bool:
    """Whether a head reads layer outputs as VGGT's DPT heads do, each frame by itself."""
    is_dpt = tuple(inspect.signature(type(head).forward).parameters) == DPT_ARGUMENTS
    return is_dpt and hasattr(head, "intermediate_layer_idx")


class OnHost:
    """Tokens `[B, S, P, C]` copied to pinned host memory, on a stream beside the computation.

    They must not be freed before the copy is done: `Keeper` sees to that. The memory is PyTorch's, which gives it to
    nobody else while copies from or to it are under way.

    Args:
        tokens: On a CUDA device.
        stream: Another than the current one.
    """

    def __init__(self, tokens: Tensor, stream: torch.cuda.Stream) -> None:
        self.device = tokens.device
        self.stream = stream
        self.tensor = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.tensor.copy_(tokens, non_blocking=True)
            self.copied = stream.record_event()

    def load(self, frames: slice) -> Callable[[], Tensor]:
        """Begin to copy some frames to the device; the function returned makes the current stream wait for them."""
        source = self.tensor[:, frames]
        # Allocated where it will be used, so the copy waits for who used this memory before.
        out = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for to, sample in zip(out, source, strict=True):  # frames of one sample are contiguous
                to.copy_(sample, non_blocking=True)
            arrived = self.stream.record_event()

        def wait() -> Tensor:
            torch.cuda.current_stream(self.device).wait_event(arrived)
            return out

        return wait

    def __getitem__(self, index: object) -> Tensor:
        """Return what an index selects, on the device; the host waits for it."""
        self.copied.synchronize()
        return self.tensor[index].to(self.device)  # type: ignore[index]


class Output:
    """The output of a layer, `[B, S, P, C]`, in parts over C that lie side by side only where it is read.

    It may stand where a tensor is expected: indices, torch's functions and methods, and NumPy see the tensor, made anew
    each time, Python's operators do not; an index into frames and tokens makes only those. It cannot be changed: what
    works in place is refused.

    Args:
        parts: Tokens `[B, S, P, C']`, on the device or the host.
        dtype: Dtype of what is read.
        frames_at_once: Frames that heads may run at once; None if they decide.
    """

    def __init__(self, parts: Sequence[Tensor | OnHost], dtype: torch.dtype, frames_at_once: int | None) -> None:
        self.parts = tuple(parts)
        self.dtype = dtype
        self.frames_at_once = frames_at_once

    @property
    def shape(self) -> torch.Size:
        """The shape of what is read."""
        shapes = [part.shape if isinstance(part, Tensor) else part.tensor.shape for part in self.parts]
        return torch.Size([*shapes[0][:3], sum(shape[3] for shape in shapes)])

    @property
    def device(self) -> torch.device:
        """The device of what is read."""
        return self.parts[0].device

    def load(self, frames: slice) -> Callable[[], Tensor]:
        """Begin to bring some frames to the device; the function returned gives them, `[B, S', P, C]`."""
        return partial(
            self._joined, [part[:, frames] if isinstance(part, Tensor) else part.load(frames) for part in self.parts]
        )

    def _joined(self, parts: list[Tensor | Callable[[], Tensor]]) -> Tensor:
        there = [part if isinstance(part, Tensor) else part() for part in parts]
        parts.clear()
        return torch.cat(there, -1).to(self.dtype)

    def __getitem__(self, index: object) -> Tensor:
        """Return what an index selects, as of a tensor."""
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) <= 3 and all(isinstance(i, (int, slice)) for i in indices):
            return self._joined([part[indices] for part in self.parts])
        return self._joined([part[:] for part in self.parts])[index]  # type: ignore[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensor as an array."""
        return self[:].numpy(force=True).__array__(*args, **kwargs)

    def __setitem__(self, index: object, value: object) -> NoReturn:
        """Refuse."""
        self._refuse_to_change("item assignment")

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            self._refuse_to_change(name)
        return getattr(self[:], name)

    @staticmethod
    def _refuse_to_change(name: str) -> NoReturn:
        raise RuntimeError(
            f"{name} works in place, and a layer output kept in bfloat16 or in host memory cannot be changed; "
            "change a tensor made of it, output[:]"
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Join outputs over C without touching them, as the aggregator does; for all else make them tensors."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace"):
            cls._refuse_to_change(name)
        if any(isinstance(each, cls) for each in _flat(kwargs.get("out"))):
            cls._refuse_to_change(f"{name}(out=...)")
        if func is torch.cat and _is_list(args[0]) and all(isinstance(each, cls) for each in args[0]):
            first = args[0][0]
            if (args[1] if len(args) > 1 else kwargs.get("dim", 0)) in (-1, 3):
                return cls([part for each in args[0] for part in each.parts], first.dtype, first.frames_at_once)

        def read(value: Any) -> Any:
            if _is_list(value):
                return [read(each) for each in value]
            return value[:] if isinstance(value, cls) else value

        return func(*map(read, args), **{name: read(value) for name, value in kwargs.items()})


class Keeper:
    """Keeps the layer outputs of one forward.

    While a half is copied to the host, the next block runs, whose input it is; when that is done, the computation waits
    for the copy, and the half is let go. So copying holds no memory that would not be held.

    Args:
        dtype: Dtype of what is read; None for that of the tokens.
        offloaded: Layers whose outputs are copied to the host, where the device is CUDA; elsewhere they stay.
        frames_at_once: Frames that heads may run at once; None if they decide.
    """

    def __init__(self, dtype: torch.dtype | None, offloaded: Sequence[int], frames_at_once: int | None) -> None:
        self.dtype = dtype
        self.offloaded = frozenset(offloaded)
        self.frames_at_once = frames_at_once
        self._stream: torch.cuda.Stream | None = None
        self._copying: list[tuple[OnHost, Tensor]] = []

    def keep(self, layer: int, tokens: Tensor) -> Output:
        """Return the output that holds the tokens of a layer, which nobody changes."""
        part = self._to_host(tokens) if layer in self.offloaded else tokens
        return Output([part], self.dtype or tokens.dtype, self.frames_at_once)

    def settle(self) -> None:
        """Make the current stream wait for all copies, and let go what was copied."""
        for copy, tokens in self._copying:
            torch.cuda.current_stream(tokens.device).wait_event(copy.copied)
        self._copying.clear()

    def _to_host(self, tokens: Tensor) -> Tensor | OnHost:
        if tokens.device.type != "cuda":
            return tokens
        if self._stream is None:
            self._stream = torch.cuda.Stream(tokens.device)
        copy = OnHost(tokens, self._stream)
        self._copying.append((copy, tokens))
        return copy


def run_head(original: Callable[..., Any], head: Any, layers: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a head on layer outputs, some frames at a time where they are not tensors.

    Args:
        original: The head's forward.
        head: A head for which `reads_some_frames` is true.
        layers: Outputs `[B, S, P, C]` of the layers, or holes, by their index: a list, or a dict as VGGT-X has it.
        args: Images `[B, S, 3, H, W]`, first patch token and frames at a time, as the head takes them.
        kwargs: The same by name.
    """
    if not isinstance(layers, (list, tuple, dict)):
        return original(layers, *args, **kwargs)
    read: set[int] = set(head.intermediate_layer_idx)
    if not isinstance(layers, dict):
        read = {index % len(layers) for index in read}
    stored = {index: layers[index] for index in sorted(read) if isinstance(layers[index], Output)}
    if not stored:
        return original(layers, *args, **kwargs)
    bound = inspect.signature(type(head).forward).bind(head, layers, *args, **kwargs)
    bound.apply_defaults()
    _, _, images, first_patch, asked = bound.arguments.values()
    count = images.shape[1]
    at_once = min(count if limit is None else limit for limit in (asked, *(o.frames_at_once for o in stored.values())))
    slices = [slice(start, start + at_once) for start in range(0, count, at_once)]
    results: tuple[Tensor, ...] = ()
    with contextlib.closing(_in_turn(list(stored.values()), slices)) as turns:
        for frames in slices:
            some: Any = dict(layers) if isinstance(layers, dict) else list(layers)
            for index, tokens in zip(stored, next(turns), strict=True):
                some[index] = tokens
            result = original(some, images[:, frames].contiguous(), first_patch, None)
            del some, tokens
            parts = (result,) if isinstance(result, Tensor) else result
            if not results:
                results = tuple(part.new_empty(part.shape[0], count, *part.shape[2:]) for part in parts)
            for whole, part in zip(results, parts, strict=True):
                whole[:, frames] = part
    return results[0] if isinstance(result, Tensor) else results


def _in_turn(outputs: Sequence[Output], slices: Sequence[slice]) -> Generator[list[Tensor]]:
    """Yield frames of outputs, slice after slice; while one is in use the next comes from the host."""
    hosts = [part for output in outputs for part in output.parts if isinstance(part, OnHost)]
    try:
        coming = [output.load(slices[0]) for output in outputs]
        for following in [*slices[1:], None]:
            here = coming
            coming = [] if following is None else [output.load(following) for output in outputs]
            yield [here.pop(0)() for _ in outputs]
    finally:
        # What was loaded may be freed now, also where a head raised.
        for host in hosts:
            torch.cuda.current_stream(host.device).wait_stream(host.stream)


def kept(
    outputs: list[Tensor], after: int, layers: frozenset[int] | None, keeper: Keeper | None
) -> list[Tensor | Output | Hole]:
    """Return a stage's outputs as they are kept.

    Args:
        outputs: Tokens `[B, S, P, C]` of its layers.
        after: Index of the next block.
        layers: Layers that are kept, the others become holes; None for all.
        keeper: Who keeps them; None if they stay tensors.
    """
    result: list[Tensor | Output | Hole] = []
    for layer, output in enumerate(outputs, after - len(outputs)):
        if layers is not None and layer not in layers:
            result.append(Hole(layer))
        else:
            result.append(output if keeper is None else keeper.keep(layer, output))
    return result
