"""From one forward of a patched model to its layouts: which frames there are, who sees whom, in which order."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..covisibility import CovisibilityGraph
from ..layout import BlockLayout
from ..models import ForwardInputs, ModelRecord
from .described import ImageGraphs
from .graphs import (
    MegaLocSimilarity,
    Similarity,
    TokenSimilarity,
    earlier_frames_only,
    frame_order,
    in_order,
    inverse,
)

__all__ = ["SEQUENTIAL_WINDOW", "Covisibility", "Forward", "Planner", "require_redundant"]

Graphs = CovisibilityGraph | Sequence[CovisibilityGraph]
Covisibility = Literal["megaloc", "tokens", "sequential", "all"] | Similarity | Graphs | Callable[[Any], Graphs]
Order = tuple[int, ...] | None

SEQUENTIAL_WINDOW = 10
# What the words mean that stand for a similarity.
SIMILARITIES: dict[str, Similarity] = {
    "megaloc": MegaLocSimilarity(),
    "tokens": TokenSimilarity(),
    "sequential": TokenSimilarity(neighbours=0, window=SEQUENTIAL_WINDOW, anchors=0, bridge=False),
}
# Layouts kept for graphs that come again.
LAYOUTS_KEPT = 16


@dataclass(eq=False)
class Forward:
    """One forward of a patched model.

    Attributes:
        inputs: What the record read from its arguments.
        recomputable: Whether gradients were on, so that checkpointing may run parts of it again.
        reorders: Whether the model reorders its frames inside.
        graphs: Who sees whom, frames in the order of the images; one per sample or one for all.
        layouts: The same over tokens, frames in the order of the model; empty until the first global attention.
        seconds: Time spent on each step towards both, on the host.
        answered: Calls answered, by module.
        kind: Device, dtype and head size of those calls.
        samples: Some values of the queries of each module.
        before: Some values of each frame's tokens before the model reordered its frames.
        after: The same values after.
    """

    inputs: ForwardInputs
    recomputable: bool = False
    reorders: bool = False
    graphs: tuple[CovisibilityGraph, ...] = ()
    layouts: tuple[BlockLayout, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    answered: Counter[str] = field(default_factory=Counter)
    kind: tuple[torch.device, torch.dtype, int] | None = None
    samples: dict[str, Tensor] = field(default_factory=dict)
    before: Tensor | None = None
    after: Tensor | None = None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time spent inside to that of a step."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Planner:
    """Finds the graphs and layouts of forward after forward; the same graph gives the same layout again.

    Args:
        record: What is known about the model.
        covisibility: As given to `patch`.
        dense_special: Whether special tokens see everything and are seen by everything.

    Raises:
        ValueError: If `covisibility` is an unknown word, or MegaLoc's weights are not what they must be.
        TypeError: If it is none of the types that it may be.
        FileNotFoundError: If MegaLoc's weights are asked for and cannot be had.
        ImportError: If a package is missing that fetches or reads them.
    """

    def __init__(self, record: ModelRecord, covisibility: Covisibility, dense_special: bool) -> None:
        self.record = record
        self.dense_special = dense_special
        self.source: Literal["all"] | Similarity | Callable[[Any], Graphs] | tuple[CovisibilityGraph, ...]
        if isinstance(covisibility, str):
            if covisibility != "all" and covisibility not in SIMILARITIES:
                raise ValueError(
                    'covisibility must be "megaloc", "tokens", "sequential", "all", a similarity, graphs or a '
                    f"function, got {covisibility!r}"
                )
            self.source = "all" if covisibility == "all" else SIMILARITIES[covisibility]
        elif isinstance(covisibility, Similarity) or callable(covisibility):
            self.source = covisibility
        else:
            self.source = _checked_graphs("covisibility", covisibility)
        self._of_images: ImageGraphs | None = None
        if isinstance(self.source, MegaLocSimilarity):
            self._of_images = ImageGraphs(self.source, normalised=record.images_are_normalised)
        self._everything: CovisibilityGraph | None = None
        self._layouts: OrderedDict[tuple[Any, ...], tuple[CovisibilityGraph, BlockLayout]] = OrderedDict()
        # CUDA graphs read the tables of these wherever they are replayed.
        self._captured: set[BlockLayout] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": OrderedDict(), "_captured": set()}

    @property
    def describes_tokens(self) -> bool:
        """Whether graphs are made of the tokens that enter the first global attention."""
        return isinstance(self.source, TokenSimilarity)

    def forget(self) -> None:
        """Drop what is kept, but for what CUDA graphs read."""
        self._layouts.clear()
        if self._of_images is not None:
            self._of_images.forget()

    def begin(self, forward: Forward) -> None:
        """Put in the graphs that are known before the forward runs: those given, and those that a function gives.

        Raises:
            ValueError: If MegaLoc is to describe the images, and there are none.
        """
        images = forward.inputs.images
        if isinstance(self.source, tuple):
            forward.graphs = self.source
        elif self._of_images is not None:
            if not isinstance(images, Tensor) or images.dim() != 5 or images.shape[2] != 3:
                given = list(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
                raise ValueError(
                    f"MegaLoc describes images [B, S, 3, H, W], but the forward of {self.record.name} that is patched "
                    f'is given {given}; use covisibility="tokens", or describe the images beforehand and give '
                    "CovisibilityGraph.from_descriptors(MegaLoc.from_pretrained().describe(images))"
                )
        elif callable(self.source):
            with forward.step("graph"):
                forward.graphs = _checked_graphs("what the covisibility function returns", self.source(images))

    def plan(self, forward: Forward, name: str, query: Tensor, module_inputs: Callable[[], tuple[Any, ...]]) -> None:
        """Find the graphs of a forward at its first global attention and lay them over its tokens.

        Args:
            forward: Where graphs and layouts are put.
            name: What messages call the attention module.
            query: Its queries, `[B, H, N, D]`.
            module_inputs: Returns its arguments, its tokens `[B, N, C]` among them.
        """
        inputs, batch, num_tokens = forward.inputs, query.shape[0], query.shape[2]
        frames = _num_frames(forward, name, num_tokens)
        per_frame = (num_tokens - inputs.trailing_tokens) // frames
        orders = self._orders(forward, frames, batch)
        if self._of_images is not None:
            forward.graphs = tuple(
                self._of_images.graph(images, self._reference_image(order), forward.step)
                for images, order in zip(inputs.images, orders, strict=True)
            )
        elif isinstance(self.source, TokenSimilarity):
            patches = _patch_tokens(name, module_inputs(), (batch, frames, per_frame), inputs)
            with forward.step("graph"):
                forward.graphs = tuple(
                    self.source.graph(
                        tokens if order is None else tokens[list(inverse(order))], self._reference_image(order)
                    )
                    for tokens, order in zip(patches, orders, strict=True)
                )
        elif self.source == "all":
            if self._everything is None or self._everything.num_frames != frames:
                self._everything = CovisibilityGraph.all_visible(frames)
            forward.graphs = (self._everything,)
        graphs = forward.graphs
        if len(graphs) not in (1, batch):
            raise ValueError(f"covisibility must give one graph, or one for each of {batch} samples, got {len(graphs)}")
        for graph in graphs:
            if graph.num_frames != frames or graph.num_key_frames != frames:
                raise ValueError(
                    f"the covisibility graph must be over the {frames} frames of this forward, got "
                    f"{graph.num_frames} x {graph.num_key_frames} frames"
                )
        with forward.step("layout"):
            layouts = tuple(
                self._layout(graph, order, per_frame, inputs, query.device)
                for graph, order in zip(graphs if len(graphs) == batch else graphs * batch, orders, strict=True)
            )
        forward.layouts = layouts[:1] if all(layout is layouts[0] for layout in layouts) else layouts
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured.update(layouts)

    def _reference_image(self, order: Order) -> int | None:
        """Return the image that is the model's reference frame."""
        frame = self.record.reference_frame
        return frame if frame is None or order is None else order[frame]

    def _orders(self, forward: Forward, frames: int, batch: int) -> list[Order]:
        """Return for each sample which image lies at each place inside the model; None if it kept their order."""
        if self.source == "all" or not forward.reorders:
            return [None] * batch
        if forward.before is None or forward.after is None:
            raise RuntimeError(
                f"{self.record.name} did not call the blocks between which it reorders its frames before its first "
                'global attention, so their order is unknown; use covisibility="all", or name the modules yourself'
            )
        return [
            frame_order(before, after)
            for before, after in zip(forward.before.split(frames), forward.after.split(frames), strict=True)
        ]

    def _layout(
        self, graph: CovisibilityGraph, order: Order, per_frame: int, inputs: ForwardInputs, device: torch.device
    ) -> BlockLayout:
        """Return the layout of a graph whose frames are in the order of the images."""
        key = (id(graph), order, per_frame, inputs.special_tokens, inputs.trailing_tokens, device)
        if key in self._layouts:
            self._layouts.move_to_end(key)
            return self._layouts[key][1]
        ordered = in_order(graph, order)
        if self.record.causal:
            ordered = earlier_frames_only(ordered)
        layout = BlockLayout.from_graph(
            ordered,
            per_frame,
            special_tokens=inputs.special_tokens,
            dense_special=self.dense_special,
            trailing_tokens=inputs.trailing_tokens,
        )
        if layout.device != device:
            layout = layout.to(device)
        if isinstance(self.source, TokenSimilarity):
            return layout  # its graphs are new in every forward
        # The graph is kept with its layout so that no other graph gets its id.
        self._layouts[key] = (graph, layout)
        if len(self._layouts) > LAYOUTS_KEPT:
            self._layouts.popitem(last=False)
        return layout


def require_redundant(name: str, attn_mask: Tensor, layouts: tuple[BlockLayout, ...]) -> None:
    """Raise unless an attention mask leaves alone every pair of tokens that the layouts show; waits for the device.

    Args:
        name: What the message calls the attention module.
        attn_mask: As `scaled_dot_product_attention` takes it, `[..., N, N]`, True or 0 where tokens may attend.
        layouts: One per sample, or one for all.

    Raises:
        ValueError: If the mask hides or weighs a visible pair.
    """
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
    allowed = allowed.reshape((1,) * (4 - allowed.dim()) + allowed.shape)
    for sample, layout in enumerate(layouts):
        of_sample = allowed if len(layouts) == 1 else allowed[sample if len(allowed) > 1 else 0]
        if bool((layout.to_dense() & ~of_sample).any()):
            raise ValueError(
                f"{name} is given an attn_mask that hides or weighs tokens which the covisibility graph shows. Leave "
                "the mask out, or give a graph that shows only what the mask does"
            )


def _checked_graphs(what: str, graphs: object) -> tuple[CovisibilityGraph, ...]:
    if isinstance(graphs, CovisibilityGraph):
        return (graphs,)
    if isinstance(graphs, Sequence) and graphs and all(isinstance(graph, CovisibilityGraph) for graph in graphs):
        return tuple(graphs)
    raise TypeError(
        f"{what} must be a CovisibilityGraph or a list of one per sample, got {type(graphs).__name__}; a boolean "
        "matrix becomes a graph with CovisibilityGraph.from_dense"
    )


def _num_frames(forward: Forward, name: str, num_tokens: int) -> int:
    inputs = forward.inputs
    in_frames = num_tokens - inputs.trailing_tokens
    if inputs.frames is not None:
        frames = inputs.frames
    elif inputs.tokens_per_frame is not None:
        frames = in_frames // inputs.tokens_per_frame
    elif forward.graphs:
        frames = forward.graphs[0].num_frames
    else:
        raise ValueError(
            f"{name} attends over {num_tokens} tokens, and nothing tells how many of them are a frame; give "
            "tokens_per_frame= to patch, or a graph as covisibility"
        )
    per_frame = inputs.tokens_per_frame or max(in_frames, 0) // max(frames, 1)
    if frames < 1 or per_frame < 1 or frames * per_frame != in_frames:
        raise ValueError(
            f"{name} attends over {num_tokens} tokens, which is not {frames} frames of {per_frame} tokens and "
            f"{inputs.trailing_tokens} trailing tokens; all frames must have the same number of tokens"
        )
    return frames


def _patch_tokens(
    name: str, module_inputs: tuple[Any, ...], sizes: tuple[int, int, int], inputs: ForwardInputs
) -> Tensor:
    """Return the patch tokens `[B, S, P', C]` that enter an attention module, special tokens left out."""
    batch, frames, per_frame = sizes
    num_tokens = frames * per_frame + inputs.trailing_tokens
    for tokens in module_inputs:
        if isinstance(tokens, Tensor) and tokens.is_floating_point() and tokens.shape[:-1] == (batch, num_tokens):
            break
    else:
        raise ValueError(
            f'covisibility="tokens" needs the tokens [B, N, C] = [{batch}, {num_tokens}, C] among the arguments of '
            f"{name}, and there are none; give a graph, or a function of the images, as covisibility"
        )
    special = inputs.special_tokens
    first, last = special if isinstance(special, tuple) else (special, 0)
    if first + last >= per_frame:
        raise ValueError(
            f'covisibility="tokens" needs patch tokens, but all {per_frame} tokens of a frame are special ones; '
            "give a graph as covisibility"
        )
    return tokens[:, : frames * per_frame].unflatten(1, (frames, per_frame))[:, :, first : per_frame - last]
