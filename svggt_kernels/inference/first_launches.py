"""Compiles the kernels of a fused forward in threads, while a verification computes what needs none of them.

A kernel is compiled at its first launch, in 0.1 to 0.5 s. So each one is launched beforehand on few tokens; what it
computes is thrown away. A kernel that is not among them is compiled where it is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch
from torch import nn

from ..attention import prepare
from ..graph import CovisibilityGraph
from ..layout import BlockLayout
from . import aggregator as aggregators
from . import blocks, dpt, ops

__all__ = ["FirstLaunches", "start"]

TOKENS = 16


class FirstLaunches:
    """Makes calls in threads, those of one function one after another: Triton compiles no function twice at a time.

    A call that raises is no error here: what it should have compiled raises again where it is needed.

    Args:
        calls: What to call.
        stream: The stream on which they launch, that of whoever needs the kernels; None on the CPU.
        after: What must be done before.
    """

    def __init__(
        self, calls: Iterable[partial[Any]], stream: torch.cuda.Stream | None, after: FirstLaunches | None = None
    ) -> None:
        by_function: dict[Callable[..., Any], list[partial[Any]]] = {}
        for call in calls:
            by_function.setdefault(call.func, []).append(call)
        self._running: list[Future[None]] = []
        if by_function:
            threads = ThreadPoolExecutor(len(by_function), "svggt-kernels-compile")
            self._running = [threads.submit(_make, each, stream, after) for each in by_function.values()]
            threads.shutdown(wait=False)  # each thread ends with its calls

    def wait(self) -> None:
        """Wait until all calls are made."""
        wait(self._running)


def _make(calls: Sequence[partial[Any]], stream: torch.cuda.Stream | None, after: FirstLaunches | None) -> None:
    if after is not None:
        after.wait()
    with torch.no_grad(), torch.cuda.stream(stream):
        for call in calls:
            with contextlib.suppress(Exception):
                call()


def start(
    aggregator: Any, heads: Iterable[Any], device: torch.device, dtype: torch.dtype | None, backend: str | None
) -> dict[nn.Module, FirstLaunches]:
    """Start to compile what a fused forward launches under the autocast that is on; nothing on the CPU.

    Args:
        aggregator: An aggregator whose `obstacle` is None.
        heads: DPT heads.
        device: Where they are.
        dtype: Dtype of the residual stream, or None for the model's own.
        backend: The backend that the global attention names, or None.

    Returns:
        For each module what must be done before it runs fused; for the global blocks what need not, as their backend
        waits for itself.
    """
    if device.type != "cuda":
        return {}
    stream = torch.cuda.current_stream(device)
    of_attention = FirstLaunches([_attention(aggregator.global_blocks[0], device, backend)], stream)
    tokens = aggregator.camera_token.detach()
    x = tokens.new_zeros(1, TOKENS, tokens.shape[-1], dtype=torch.promote_types(tokens.dtype, torch.float32))
    is_set_up = FirstLaunches([partial(ops.set_up, device)], stream)
    dtypes = {None, dtype}  # a verification has the model's own
    calls = [call for each in dtypes for call in _until_one_raises(aggregators.launches(aggregator, x, each))]
    of_aggregator = FirstLaunches(calls, stream, is_set_up)
    known = [head for head in heads if dpt.obstacle(head) is None]
    calls = [call for head in known for call in _until_one_raises(dpt.launches(head))]
    of_heads = FirstLaunches(calls, stream, of_aggregator)
    return {aggregator.global_blocks: of_attention, aggregator: of_aggregator, **dict.fromkeys(heads, of_heads)}


def _attention(block: Any, device: torch.device, backend: str | None) -> partial[Any]:
    """Return a call that compiles the kernels of a backend whose tables need them."""
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(1).to(device), TOKENS)
    head_size = block.attn.qkv.in_features // block.attn.num_heads
    return partial(prepare, layout, blocks.compute_dtype(block.attn.qkv.weight), head_size, backend=backend)


def _until_one_raises(calls: Iterator[partial[Any]]) -> Iterator[partial[Any]]:
    """Yield calls as far as they can be made: what a module lacks its verification tells."""
    with contextlib.suppress(Exception):
        yield from calls
