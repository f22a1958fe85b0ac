"""From one forward of a patched model to its layouts: which frames there are, who sees whom, in which order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..graph import CovisibilityGraph
from ..layout import BlockLayout
from ..models import ForwardInputs, ModelRecord
from ..sources import SOURCES, Covisibility, GivenGraphs, Scene, Source, as_source
from ..sources.cache import LRUCache
from ..sources.fingerprint import word_sums
from ..streams import is_capturing
from .forwards import Forward
from .order import Order, as_images_lie, earlier_frames_only, frame_order, in_order

# Layouts kept for graphs that come again.
LAYOUTS_KEPT = 16


class Planner:
    """Finds the graphs and layouts of forward after forward; the same graph gives the same layout again.

    Args:
        record: What is known about the model.
        covisibility: As given to `patch`.
        dense_special: Whether special tokens see everything and are seen by everything; None: where there is no core.

    Raises:
        ValueError: If `covisibility` is an unknown word, or MegaLoc's weights are not what they must be.
        TypeError: If it is none of the types that it may be.
        FileNotFoundError: If MegaLoc's weights are asked for and cannot be had.
        ImportError: If a package is missing that fetches or reads them.
    """

    def __init__(self, record: ModelRecord, covisibility: Covisibility, dense_special: bool | None) -> None:
        self.record = record
        self.dense_special = dense_special
        self._function: Callable[[Any], Any] | None = None
        self._source: Source = GivenGraphs(())
        if callable(covisibility) and not isinstance(covisibility, Source):
            self._function = covisibility
        else:
            self._source = as_source(covisibility)
        self._layouts: LRUCache[tuple[CovisibilityGraph, BlockLayout]] = LRUCache(LAYOUTS_KEPT)
        # CUDA graphs read the tables of these wherever they are replayed.
        self._captured: set[BlockLayout] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": set()}

    @property
    def describes_tokens(self) -> bool:
        """Whether graphs are made of the tokens that enter the first global attention."""
        return self._source.needs == "tokens"

    def forget(self) -> None:
        """Drop what is kept, the source among it, but for what CUDA graphs read; nothing can be planned after that."""
        self._layouts.clear()
        self._source = GivenGraphs(())

    def begin(self, forward: Forward) -> None:
        """Ask a covisibility function for its graphs, and see that there are images if the source needs them.

        Raises:
            ValueError: If there are none.
        """
        images = forward.inputs.images
        if self._function is not None:
            with forward.step("graph"):
                self._source = GivenGraphs.of("what the covisibility function returns", self._function(images))
        elif self._source.needs == "images" and _images(forward.inputs) is None:
            given = list(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise ValueError(
                f"covisibility by images ({self._source.label}) needs images [B, S, 3, H, W], but the forward of "
                f'{self.record.name} that is patched is given {given}; use Core(by="tokens"), or describe the '
                "images beforehand and give CovisibilityGraph.from_descriptors(MegaLoc.from_pretrained().describe("
                "images))"
            )
        elif getattr(self._source, "reads_fingerprints", False):
            # Begun before the model runs, it is there when the first global attention asks for it.
            with forward.step("look-up"):
                forward.word_sums = [word_sums(sample) for sample in images]

    def plan(self, forward: Forward, name: str, query: Tensor, module_inputs: Callable[[], tuple[Any, ...]]) -> None:
        """Find the graphs of a forward at its first global attention and lay them over its tokens.

        Args:
            forward: Where graphs and layouts are put.
            name: What messages call the attention module.
            query: Its queries, `[B, H, N, D]`.
            module_inputs: Returns its arguments, its tokens `[B, N, C]` among them.
        """
        inputs, batch, num_tokens = forward.inputs, query.shape[0], query.shape[2]
        frames = _num_frames(inputs, getattr(self._source, "num_frames", None), name, num_tokens)
        per_frame = (num_tokens - inputs.trailing_tokens) // frames
        forward.num_images, forward.tokens_per_frame = batch * frames, per_frame
        # The device is waited for only by sources that look at what is read from it.
        orders = cache(partial(self._orders, forward, frames, batch))
        tokens = cache(partial(_patch_tokens, name, module_inputs, (batch, frames, per_frame), inputs))
        images = _images(inputs)

        def scene(sample: int) -> Scene:
            return Scene(
                frames,
                images=None if images is None else images[sample],
                images_are_normalised=self.record.images_are_normalised,
                tokens=lambda: as_images_lie(tokens()[sample], orders()[sample]),
                reference_frame=lambda: self._reference_image(orders()[sample]),
                word_sums=forward.word_sums[sample] if forward.word_sums else None,
                sample=(sample, batch),
                step=forward.step,
            )

        graphs = _one_if_same([self._source.graph(scene(sample)) for sample in range(batch)])
        for graph in graphs:
            self._check(graph, frames)
        is_full = all(graph.num_edges == frames * frames for graph in graphs)  # and so the same in every order
        of_samples = zip(
            graphs if len(graphs) == batch else graphs * batch,
            [None] * batch if is_full else orders(),
            strict=True,
        )
        with forward.step("layout"):
            planned = [self._layout(graph, order, per_frame, inputs, query.device) for graph, order in of_samples]
        forward.graphs = tuple(graph for graph, _ in planned[: len(graphs)])
        forward.layouts = _one_if_same([layout for _, layout in planned])
        if is_capturing(query.device):
            self._captured.update(forward.layouts)

    def _check(self, graph: object, frames: int) -> None:
        if not isinstance(graph, CovisibilityGraph):
            raise TypeError(
                f"a source must give a CovisibilityGraph, but {self._source.label} gave a {type(graph).__name__}"
            )
        if graph.num_frames != frames or graph.num_key_frames != frames:
            raise ValueError(
                f"the covisibility graph must be over the {frames} frames of this forward, got "
                f"{graph.num_frames} x {graph.num_key_frames} frames"
            )

    def _reference_image(self, order: Order) -> int | None:
        """Return the image that is the model's reference frame."""
        frame = self.record.reference_frame
        return frame if frame is None or order is None else order[frame]

    def _orders(self, forward: Forward, frames: int, batch: int) -> list[Order]:
        """Return for each sample which image lies at each place inside the model; None if it kept their order."""
        if not forward.reorders:
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
    ) -> tuple[CovisibilityGraph, BlockLayout]:
        """Return the part of a graph that the model can use, frames in the order of the images, and its layout."""

        def new_layout() -> tuple[CovisibilityGraph, BlockLayout]:
            usable = earlier_frames_only(graph) if self.record.causal else graph
            if not isinstance(self._source, tuple(SOURCES.values())):  # those do what their settings say
                self._warn(usable, self._reference_image(order))
            layout = BlockLayout.from_graph(
                in_order(usable, order),
                per_frame,
                special_tokens=inputs.special_tokens,
                dense_special=self.dense_special,
                trailing_tokens=inputs.trailing_tokens,
            )
            return usable, layout if layout.device == device else layout.to(device)

        if self.describes_tokens:  # its graphs are new in every forward
            return new_layout()
        key = (graph, order, per_frame, inputs.special_tokens, inputs.trailing_tokens, device)
        return self._layouts.get(key, new_layout)

    def special_tokens(self, layouts: Sequence[BlockLayout]) -> str:
        """Say how special tokens attend in the layouts of a forward, or of forwards to come where there are none."""
        dense: set[bool | None] = {layout.queries.dense_special for layout in layouts}
        words = {True: "dense", False: "masked", None: "masked where there is a core, else dense"}
        return ", ".join(words[each] for each in sorted(dense or {self.dense_special}, key=str))

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
                "them, or let all see a core (Core, CovisibilityGraph.core)",
                UserWarning,
                stacklevel=2,
            )


def _one_if_same(items: list[Any]) -> tuple[Any, ...]:
    return tuple(items[:1] if all(item is items[0] for item in items) else items)


def _images(inputs: ForwardInputs) -> Tensor | None:
    """Return the images `[B, S, 3, H, W]` of a forward, if it is given such."""
    images = inputs.images
    return images if isinstance(images, Tensor) and images.dim() == 5 and images.shape[2] == 3 else None


def _num_frames(inputs: ForwardInputs, of_graphs: int | None, name: str, num_tokens: int) -> int:
    in_frames = num_tokens - inputs.trailing_tokens
    if inputs.frames is not None:
        frames = inputs.frames
    elif inputs.tokens_per_frame is not None:
        frames = in_frames // inputs.tokens_per_frame
    elif of_graphs is not None:
        frames = of_graphs
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
    name: str, module_inputs: Callable[[], tuple[Any, ...]], sizes: tuple[int, int, int], inputs: ForwardInputs
) -> Tensor:
    """Return the patch tokens `[B, S, P', C]` that enter an attention module, special tokens left out."""
    batch, frames, per_frame = sizes
    num_tokens = frames * per_frame + inputs.trailing_tokens
    for tokens in module_inputs():
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
