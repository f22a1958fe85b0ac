"""Layouts that answer the attention of each global layer themselves: layers may differ, and keys need not be frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svggt_kernels.patching.interception import Answering, StandIn
from svggt_kernels.sources.base import Scene

from .base import Attended, Attention, Counted, Known, LayerLayout, TokenGrid

Attentions = Callable[[Scene, Known, TokenGrid], Sequence[Attention]]


@dataclass(frozen=True)
class Answered:
    """A layout that is the same in all global layers.

    Attributes:
        name: What result lines call it.
        make: Returns the attention of a layer, see `LayerLayout`.
    """

    name: str
    make: Callable[[Scene, Known, TokenGrid], Attention]

    def attention(self, scene: Scene, known: Known, grid: TokenGrid) -> Attention:
        """See `LayerLayout`."""
        return self.make(scene, known, grid)

    @contextmanager
    def put_into(self, model: Any, known: Known) -> Iterator[Callable[[], Counted]]:
        """See `Layout`."""
        layers = len(model.aggregator.global_blocks)
        with answered(model, known, lambda *of_scene: [self.attention(*of_scene)] * layers) as counted:
            yield counted


@dataclass(frozen=True)
class Layers:
    """A layout for each global layer.

    Attributes:
        parts: The layers, the first is 0, and their layout.
    """

    parts: tuple[tuple[range, LayerLayout], ...]

    def __post_init__(self) -> None:
        named = sorted(layer for layers, _ in self.parts for layer in layers)
        if named != list(range(len(named))) or not named:
            raise ValueError(f"each layer from 0 on must have one layout, and not {self.name}")

    @property
    def name(self) -> str:
        """What result lines call it."""
        return f"layers({','.join(f'{_words(layers)}:{layout.name}' for layers, layout in self.parts)})"

    def attentions(self, scene: Scene, known: Known, grid: TokenGrid) -> list[Attention]:
        """Return the attention of each layer."""
        of_layer: dict[int, Attention] = {}
        for layers, layout in self.parts:
            of_layer |= dict.fromkeys(layers, layout.attention(scene, known, grid))
        return [of_layer[layer] for layer in sorted(of_layer)]

    @contextmanager
    def put_into(self, model: Any, known: Known) -> Iterator[Callable[[], Counted]]:
        """See `Layout`.

        Raises:
            ValueError: If the model has another number of global layers.
        """
        layers, named = len(model.aggregator.global_blocks), sum(len(layers) for layers, _ in self.parts)
        if layers != named:
            raise ValueError(f"{self.name} must have a layout for each of the model's {layers} global layers")
        with answered(model, known, self.attentions) as counted:
            yield counted


def _words(layers: range) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


@contextmanager
def answered(model: Any, known: Known, attentions: Attentions) -> Iterator[Callable[[], Counted]]:
    """Answer the attention of a model's global layers in this context; its value tells of the last forward.

    Args:
        model: A `RoomsModel`.
        known: The one scene that the model will be given.
        attentions: Returns the attention of each layer; called at the first global layer of each forward.
    """
    forward = _Forward(model, known, attentions)
    blocks = model.aggregator.global_blocks
    stand_ins = [
        StandIn(block.attn, f"global_blocks.{layer}.attn", partial(forward.around, layer))
        for layer, block in enumerate(blocks)
    ]
    for stand_in in stand_ins:
        stand_in.install()
    try:
        yield forward.counted
    finally:
        for stand_in in reversed(stand_ins):
            stand_in.remove()


class _Forward:
    """One forward after another; keeps what the last one attended."""

    def __init__(self, model: Any, known: Known, attentions: Attentions) -> None:
        height, width = known.scenes.images.shape[-2:]
        aggregator = model.aggregator
        rows, columns = height // aggregator.patch_size, width // aggregator.patch_size
        self.grid = TokenGrid(known.scenes.images.shape[1], aggregator.patch_start_idx, rows, columns)
        self.known, self.make = known, attentions
        self.attentions: Sequence[Attention] = ()
        self.attended: list[Attended] = []
        self.planning_seconds = 0.0

    def around(self, layer: int, stand_in: StandIn, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run an attention module on tokens `[1, N, C]` and answer the one attention call in it."""
        if tokens.shape[:2] != (1, self.grid.tokens):
            raise ValueError(
                f"a layout is of one scene of {self.grid.tokens} tokens, got {list(tokens.shape[:2])}; give the model "
                "the images of the scene that it was put in for"
            )
        if layer == 0:
            started = time.perf_counter()
            patches = tokens[0].unflatten(0, (self.grid.frames, -1))[:, self.grid.special :]
            scene = Scene(self.grid.frames, images=self.known.scenes.images[0], tokens=patches, reference_frame=0)
            self.attentions, self.attended = self.make(scene, self.known, self.grid), []
            self.planning_seconds = time.perf_counter() - started

        def answer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if torch.is_autocast_enabled(q.device.type):  # as PyTorch's own attention does
                q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
            attended = self.attentions[layer](q, k, v, q.shape[-1] ** -0.5, tokens)
            self.attended.append(attended._replace(out=attended.out[:0]))
            return attended.out

        with Answering(stand_in.name, answer) as answering:
            output = stand_in.original(tokens, *args, **kwargs)
        answering.check()
        return output

    def counted(self) -> Counted:
        """Return what the last forward attended."""
        pairs = sum(float(attended.pairs) for attended in self.attended) / max(1, len(self.attended))
        backends = dict.fromkeys(attended.backend for attended in self.attended if attended.backend is not None)
        return Counted(round(pairs), self.grid.tokens**2, ", ".join(backends) or None, self.planning_seconds)
