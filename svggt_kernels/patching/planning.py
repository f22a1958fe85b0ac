"""From one forward of a patched model to its layouts: which frames there are, who sees whom, in which order."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..graph import CovisibilityGraph
from ..layout import BlockLayout
from ..models import ForwardInputs, ModelRecord
from ..sources.megaloc.images import ImageGraphs
from ..sources.similarity import (
    MegaLocSimilarity,
    Similarity,
    TokenSimilarity,
    earlier_frames_only,
    frame_order,
    in_order,
    inverse,
)
from .forwards import Forward

__all__ = ["SEQUENTIAL_WINDOW", "Covisibility", "Planner"]

Graphs = CovisibilityGraph | Sequence[CovisibilityGraph]
Covisibility = Literal["megaloc", "tokens", "sequential", "all"] | Similarity | Graphs | Callable[[Any], Graphs]
Order = tuple[int, ...] | None
Laid = tuple[CovisibilityGraph, BlockLayout]

SEQUENTIAL_WINDOW = 10
# What the words mean.
SOURCES: dict[str, Similarity | Literal["sequential", "all"]] = {
    "megaloc": MegaLocSimilarity(),
    "tokens": TokenSimilarity(),
    "sequential": "sequential",
    "all": "all",
}
# Layouts kept for graphs that come again, and graphs that follow from the number of frames.
LAYOUTS_KEPT = 16


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
        self.source: Literal["sequential", "all"] | Similarity | Callable[[Any], Graphs] | tuple[CovisibilityGraph, ...]
        if isinstance(covisibility, str):
            if covisibility not in SOURCES:
                raise ValueError(
                    'covisibility must be "megaloc", "tokens", "sequential", "all", a similarity, graphs or a '
                    f"function, got {covisibility!r}"
                )
            self.source = SOURCES[covisibility]
        elif isinstance(covisibility, Similarity) or callable(covisibility):
            self.source = covisibility
        else:
            self.source = _checked_graphs("covisibility", covisibility)
        self._of_images: ImageGraphs | None = None
        if isinstance(self.source, MegaLocSimilarity):
            self._of_images = ImageGraphs(self.source, normalised=record.images_are_normalised)
        self._of_numbers: OrderedDict[tuple[int, int | None], CovisibilityGraph] = OrderedDict()
        self._layouts: OrderedDict[tuple[Any, ...], tuple[CovisibilityGraph, Laid]] = OrderedDict()
        # CUDA graphs read the tables of these wherever they are replayed.
        self._captured: set[BlockLayout] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": OrderedDict(), "_of_numbers": OrderedDict(), "_captured": set()}

    @property
    def describes_tokens(self) -> bool:
        """Whether graphs are made of the tokens that enter the first global attention."""
        return isinstance(self.source, TokenSimilarity)

    def forget(self) -> None:
        """Drop what is kept, MegaLoc among it, but for what CUDA graphs read; nothing can be planned after that."""
        self._layouts.clear()
        self._of_numbers.clear()
        self._of_images = None

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
        forward.num_images, forward.tokens_per_frame = batch * frames, per_frame
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
        elif isinstance(self.source, str):
            forward.graphs = _one_if_same([self._of_number(frames, self._reference_image(order)) for order in orders])
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
            laid = [
                self._layout(graph, order, per_frame, inputs, query.device)
                for graph, order in zip(graphs if len(graphs) == batch else graphs * batch, orders, strict=True)
            ]
        forward.graphs = tuple(graph for graph, _ in laid[: len(graphs)])
        forward.layouts = _one_if_same([layout for _, layout in laid])
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured.update(forward.layouts)

    def _of_number(self, frames: int, reference: int | None) -> CovisibilityGraph:
        """Return the graph that follows from the number of frames and the reference frame; the same one again."""
        key = (frames, reference)
        if key not in self._of_numbers:
            if self.source == "all":
                graph = CovisibilityGraph.all_visible(frames)
            else:
                graph = CovisibilityGraph.sequential(frames, window=SEQUENTIAL_WINDOW)
                if reference is not None:
                    to_reference = [(frame, reference) for frame in range(frames) if frame != reference]
                    star = CovisibilityGraph.from_pairs(frames, to_reference)
                    graph = graph | star | star.transposed()
            self._of_numbers[key] = graph
            if len(self._of_numbers) > LAYOUTS_KEPT:
                self._of_numbers.popitem(last=False)
        self._of_numbers.move_to_end(key)
        return self._of_numbers[key]

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
    ) -> Laid:
        """Return the part of a graph that the model can use, frames in the order of the images, and its layout."""
        key = (id(graph), order, per_frame, inputs.special_tokens, inputs.trailing_tokens, device)
        if key in self._layouts:
            self._layouts.move_to_end(key)
            return self._layouts[key][1]
        usable = earlier_frames_only(graph) if self.record.causal else graph
        if not isinstance(self.source, (str, Similarity)):
            self._warn(usable, self._reference_image(order))
        layout = BlockLayout.from_graph(
            in_order(usable, order),
            per_frame,
            special_tokens=inputs.special_tokens,
            dense_special=self.dense_special,
            trailing_tokens=inputs.trailing_tokens,
        )
        if layout.device != device:
            layout = layout.to(device)
        if isinstance(self.source, TokenSimilarity):
            return usable, layout  # its graphs are new in every forward
        # The graph is kept with its layout so that no other graph gets its id.
        self._layouts[key] = (graph, (usable, layout))
        if len(self._layouts) > LAYOUTS_KEPT:
            self._layouts.popitem(last=False)
        return usable, layout

    def _warn(self, graph: CovisibilityGraph, reference: int | None) -> None:
        """Say what is probably no intention of whoever made a graph by hand; reads it from its device."""
        facts, frames = [], graph.num_frames
        if reference is not None:
            seeing = graph.rows[graph.indices == reference].tolist()
            blind = sorted(set(range(frames)) - set(seeing))
            if blind:
                listed = ", ".join(map(str, blind[:8])) + (", ..." if len(blind) > 8 else "")
                facts.append(
                    f"hides frame {reference}, the reference frame of {self.record.name}, from {len(blind)} of "
                    f"{frames} frames ({listed})"
                )
        if (parts := graph.num_components) > 1:
            facts.append(f"is in {parts} parts that cannot see one another")
        if facts:
            warnings.warn(
                f"the covisibility graph {' and '.join(facts)}; if all frames show one scene, add the pairs that join "
                'them: covisibility="sequential" and the similarities do',
                UserWarning,
                stacklevel=2,
            )


def _one_if_same(items: list[Any]) -> tuple[Any, ...]:
    return tuple(items[:1] if all(item is items[0] for item in items) else items)


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
            f"{inputs.trailing_tokens} trailing tokens; all frames must have the same number of tokens. A model that "
            "merges tokens (FastVGGT, ToMe) must have that turned off while it is patched"
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
