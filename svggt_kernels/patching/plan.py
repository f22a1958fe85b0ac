"""From one forward of a patched model to its layouts: which frames there are, who sees whom, in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..coarse import MOST_PARTS, CoarseLayout, patches_seen
from ..graph import AnyGraph, CoarseGraph, CovisibilityGraph
from ..io.pixels import require_unit_range
from ..layout import BlockLayout
from ..models import ForwardInputs, ModelRecord
from ..sources import SOURCES, Covisibility, GivenGraphs, PerLayer, Scene, Source, as_source
from ..sources.cache import LRUCache
from ..sources.fingerprint import word_sums
from ..streams import is_capturing
from ..user_warnings import warn
from .forwards import Forward, PlannedLayers
from .order import Order, as_images_lie, earlier_frames_only, frame_order, in_order

# Layouts kept for graphs that come again.
LAYOUTS_KEPT = 16

AnyLayout = BlockLayout | CoarseLayout


@dataclass
class _Origin:
    """Where the graphs of some global layers come from.

    Attributes:
        layers: The layers.
        source: The source; of a function, the graphs of the last forward that it was asked for.
        function: A function of the images that returns graphs, or None.
    """

    layers: tuple[int, ...]
    source: Source
    function: Callable[[Any], Any] | None = None

    @classmethod
    def of(cls, covisibility: Covisibility, layers: tuple[int, ...], beside: Sequence[_Origin]) -> _Origin:
        if callable(covisibility) and not isinstance(covisibility, Source):
            return cls(layers, GivenGraphs(()), covisibility)
        return cls(layers, as_source(covisibility, [origin.source for origin in beside]))


class Planner:
    """Finds the graphs and layouts of forward after forward; the same graph gives the same layout again.

    Args:
        record: What is known about the model.
        covisibility: As given to `patch`.
        dense_special: Whether special tokens see everything and are seen by everything; None: where there is no core.
        num_layers: Global layers of the model.
        counted: Whether the memory of a forward is counted before it, and of what its layers see at a stride too.

    Raises:
        ValueError: If `covisibility` is an unknown word or not one for each layer, or MegaLoc's weights are not what
            they must be.
        TypeError: If it is none of the types that it may be.
        FileNotFoundError: If MegaLoc's weights are asked for and cannot be had.
        ImportError: If a package is missing that fetches or reads them.
    """

    def __init__(
        self,
        record: ModelRecord,
        covisibility: Covisibility | PerLayer,
        dense_special: bool | None,
        num_layers: int = 1,
        counted: bool = False,
    ) -> None:
        self.record = record
        self.dense_special = dense_special
        self.counted = counted
        of_layers: Sequence[tuple[Covisibility, tuple[int, ...]]]
        if isinstance(covisibility, PerLayer):
            of_layers = covisibility.by_layers(num_layers)
        else:
            of_layers = [(covisibility, tuple(range(num_layers)))]
        self._origins: list[_Origin] = []
        for one, layers in of_layers:
            self._origins.append(_Origin.of(one, layers, self._origins))
        self._layouts: LRUCache[tuple[AnyGraph, AnyLayout]] = LRUCache(max(LAYOUTS_KEPT, 2 * len(self._origins)))
        self._has_seen_images = False
        # CUDA graphs read the tables of these wherever they are replayed.
        self._captured: set[AnyLayout] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": set()}

    @property
    def describes_tokens(self) -> bool:
        """Whether graphs are made of the tokens that enter the first global attention."""
        return any(origin.source.needs == "tokens" for origin in self._origins)

    @property
    def source(self) -> Source | None:
        """Where the graphs of all layers come from; None if layers differ. Of a function, those of the last forward."""
        return self._origins[0].source if len(self._origins) == 1 else None

    def forget(self) -> None:
        """Drop what is kept, the source among it, but for what CUDA graphs read; nothing can be planned after that."""
        self._layouts.clear()
        for origin in self._origins:
            origin.source = GivenGraphs(())

    def begin(self, forward: Forward) -> None:
        """Ask covisibility functions for their graphs, and see that there are images if a source needs them.

        Raises:
            ValueError: If there are none, or they are outside the range that the model takes.
        """
        images = forward.inputs.images
        self._check_range(_images(forward.inputs))
        for origin in self._origins:
            if origin.function is not None:
                with forward.step("graph"):
                    given = origin.function(images)
                    origin.source = GivenGraphs.of("what the covisibility function returns", given)
            elif origin.source.needs == "images" and _images(forward.inputs) is None:
                given = list(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
                raise ValueError(
                    f"covisibility by images ({origin.source.label}) needs images [B, S, 3, H, W], but the forward of "
                    f'{self.record.name} that is patched is given {given}; use covisibility="patches", or describe the '
                    "images beforehand and give CovisibilityGraph.from_descriptors(MegaLoc.from_pretrained().describe("
                    "images))"
                )
        if any(getattr(origin.source, "reads_fingerprints", False) for origin in self._origins):
            # Begun before the model runs, it is there when the first global attention asks for it.
            with forward.step("look-up"):
                forward.word_sums = [word_sums(sample) for sample in images]

    def _check_range(self, images: Tensor | None) -> None:
        """Raise unless images are in [0, 1], where the record knows that its model takes such; on a device only once.

        There the host has to wait for it, which a CUDA graph that captures cannot.
        """
        takes_others = self.record.known is None or self.record.images_are_normalised
        if images is None or takes_others or is_capturing(images.device):
            return
        if images.device.type == "cpu" or not self._has_seen_images:
            for sample in images:  # not all together, which would copy them where they do not lie so
                require_unit_range(sample, nan=True)  # of which the model itself makes NaN
            self._has_seen_images = True

    def key_parts(self, inputs: ForwardInputs) -> tuple[int, int]:
        """Return of how many parts the keys of a layer may be, and how many of all samples are packed for one of them.

        Args:
            inputs: What the record read of a forward that begins.
        """
        if inputs.frames is None or inputs.tokens_per_frame is None or inputs.patch_grid is None:
            return 1, 0
        packed = [0]
        special = inputs.tokens_per_frame - inputs.patch_grid[0] * inputs.patch_grid[1]
        for origin in self._origins:
            if hasattr(origin.source, "coarse_frames"):
                frames, stride = origin.source.coarse_frames(inputs.frames)
                packed.append(frames * max(special, len(patches_seen(inputs.patch_grid, stride))))
        samples = len(inputs.images) if isinstance(inputs.images, Tensor) else 1
        return (MOST_PARTS, samples * max(packed)) if max(packed) else (1, 0)

    def plan(self, forward: Forward, name: str, query: Tensor, module_inputs: Callable[[], tuple[Any, ...]]) -> None:
        """Find the graphs of a forward at its first global attention and lay them over its tokens.

        Args:
            forward: Where graphs and layouts are put.
            name: What messages call the attention module.
            query: Its queries, `[B, H, N, D]`.
            module_inputs: Returns its arguments, its tokens `[B, N, C]` among them.
        """
        inputs, batch, num_tokens = forward.inputs, query.shape[0], query.shape[2]
        of_graphs = (getattr(origin.source, "num_frames", None) for origin in self._origins)
        frames = _num_frames(inputs, next(filter(None, of_graphs), None), name, num_tokens)
        per_frame = (num_tokens - inputs.trailing_tokens) // frames
        forward.num_images, forward.tokens_per_frame = batch * frames, per_frame
        # The device is waited for only by sources that look at what is read from it.
        orders = cache(partial(self._orders, forward, frames, batch))
        tokens = cache(partial(_patch_tokens, name, module_inputs, (batch, frames, per_frame), inputs))
        images = _images(inputs)

        def scene_of(sample: int) -> Scene:
            return Scene(
                frames,
                images=None if images is None else images[sample],
                images_are_normalised=self.record.images_are_normalised,
                tokens=lambda: as_images_lie(tokens()[sample], orders()[sample]),
                reference_frame=lambda: self._reference_image(orders()[sample]),
                word_sums=forward.word_sums[sample] if forward.word_sums else None,
                sample=(sample, batch),
                step=forward.step,
                compare_once=len(self._origins) > 1,
            )

        planned, scenes = [], [scene_of(sample) for sample in range(batch)]
        for origin in self._origins:
            graphs = _one_if_same([graph_of(origin.source, scene) for scene in scenes])
            if any(isinstance(graph, CoarseGraph) for graph in graphs):
                self._check_coarse(per_frame, origin.source, inputs)
            # Full graphs are the same in every order.
            is_full = all(isinstance(graph, CovisibilityGraph) and graph.num_edges == frames**2 for graph in graphs)
            of_samples = [None] * batch if is_full else orders()
            with forward.step("layout"):
                planned.append(self._over(origin, graphs, of_samples, per_frame, inputs, query.device))
        forward.planned = tuple(planned)
        if is_capturing(query.device):
            self._captured.update(forward.layouts)

    def plan_graphs(
        self, forward: Forward, graphs: Sequence[AnyGraph], per_frame: int, inputs: ForwardInputs, device: torch.device
    ) -> None:
        """Lay graphs that are known over the tokens of a forward that kept the order of its images.

        Args:
            forward: Where graphs and layouts are put.
            graphs: One for each sample, of the one source.
            per_frame: Tokens of a frame.
            inputs: What the record read.
            device: Where attention runs.
        """
        (origin,) = self._origins
        planned = self._over(origin, _one_if_same(list(graphs)), [None] * len(graphs), per_frame, inputs, device)
        forward.planned = (planned,)

    def _over(
        self,
        origin: _Origin,
        graphs: tuple[AnyGraph, ...],
        orders: Sequence[Order],
        per_frame: int,
        inputs: ForwardInputs,
        device: torch.device,
    ) -> PlannedLayers:
        """Lay the graphs of some layers over tokens; one for each sample, which has an order, or one for all."""
        of_samples = zip(graphs if len(graphs) == len(orders) else graphs * len(orders), orders, strict=True)
        pairs = [self._layout(graph, order, per_frame, inputs, device, origin.source) for graph, order in of_samples]
        used = tuple(graph for graph, _ in pairs[: len(graphs)])
        return PlannedLayers(origin.layers, origin.source.label, used, _one_if_same([layout for _, layout in pairs]))

    def _check_coarse(self, per_frame: int, source: Source, inputs: ForwardInputs) -> None:
        """Raise unless frames can be seen at a stride of their patch grid."""
        label = source.label
        if self.counted and not hasattr(source, "coarse_frames"):
            raise ValueError(
                f"{label} shows frames coarsely, and memory_budget cannot count what that needs, as a source must say "
                "before the forward how many; give a Core or a CoarseGraph, or leave memory_budget out"
            )
        if self.dense_special:
            raise ValueError(
                f"{label} shows frames coarsely, and special tokens are then ordinary tokens of their frames; leave "
                'special_tokens="dense" out'
            )
        patch_grid_of(inputs, per_frame, label, self.record.name)

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
        self,
        graph: AnyGraph,
        order: Order,
        per_frame: int,
        inputs: ForwardInputs,
        device: torch.device,
        source: Source,
    ) -> tuple[AnyGraph, AnyLayout]:
        """Return the part of a graph that the model can use, frames in the order of the images, and its layout."""

        def new_layout() -> tuple[AnyGraph, AnyLayout]:
            usable = earlier_frames_only(graph) if self.record.causal else graph
            if not isinstance(source, tuple(SOURCES.values())):  # those do what their settings say
                self._warn(usable, self._reference_image(order))
            layout = self._over_tokens(in_order(usable, order), per_frame, inputs)
            return usable, layout if layout.device == device else layout.to(device)

        if source.needs == "tokens":  # its graphs are new in every forward
            return new_layout()
        key = (graph, order, per_frame, inputs.special_tokens, inputs.trailing_tokens, device)
        return self._layouts.get(key, new_layout)

    def _over_tokens(self, graph: AnyGraph, per_frame: int, inputs: ForwardInputs) -> AnyLayout:
        special, trailing = inputs.special_tokens, inputs.trailing_tokens
        if isinstance(graph, CoarseGraph):
            assert inputs.patch_grid is not None
            return CoarseLayout.from_graph(graph, inputs.patch_grid, special_tokens=special, trailing_tokens=trailing)
        return BlockLayout.from_graph(
            graph,
            per_frame,
            special_tokens=special,
            dense_special=self.dense_special,
            trailing_tokens=trailing,
        )

    def special_tokens(self, layouts: Sequence[AnyLayout]) -> str:
        """Say how special tokens attend in the layouts of a forward, or of forwards to come where there are none."""
        dense: set[bool | None] = {layout.queries.dense_special for layout in layouts}
        words = {True: "dense", False: "masked", None: "masked where there is a core, else dense"}
        return ", ".join(words[each] for each in sorted(dense or {self.dense_special}, key=str))

    def _warn(self, graph: AnyGraph, reference: int | None) -> None:
        """Say what is probably no intention of whoever made a graph by hand; reads it from its device."""
        facts, frames = [], graph.num_frames
        full, any_way = (graph.full, graph.united()) if isinstance(graph, CoarseGraph) else (graph, graph)
        if reference is not None:
            seeing = full.rows[full.indices == reference].tolist()
            blind = sorted(set(range(frames)) - set(seeing))
            if blind:
                listed = ", ".join(map(str, blind[:8])) + (", ..." if len(blind) > 8 else "")
                facts.append(
                    f"hides frame {reference}, the reference frame of {self.record.name}, from {len(blind)} of "
                    f"{frames} frames ({listed})"
                )
        if (parts := any_way.num_components) > 1:
            facts.append(f"is in {parts} parts that cannot see one another")
        if facts:
            warn(
                f"the covisibility graph {' and '.join(facts)}; if all frames show one scene, add the pairs that join "
                "them, or let all see a core (Core, CovisibilityGraph.core)",
            )


def graph_of(source: Source, scene: Scene) -> AnyGraph:
    """Return the graph that a source gives of a scene.

    Raises:
        TypeError: If it is no graph.
        ValueError: If it is not over the frames of the scene.
    """
    graph, frames = source.graph(scene), scene.num_frames
    if not isinstance(graph, CovisibilityGraph | CoarseGraph):
        raise TypeError(
            f"a source must give a CovisibilityGraph or a CoarseGraph, but {source.label} gave a {type(graph).__name__}"
        )
    if graph.num_frames != frames or graph.num_key_frames != frames:
        raise ValueError(
            f"the covisibility graph must be over the {frames} frames of this forward, got "
            f"{graph.num_frames} x {graph.num_key_frames} frames"
        )
    return graph


def patch_grid_of(inputs: ForwardInputs, per_frame: int, label: str, model: str) -> tuple[int, int]:
    """Return the patch grid of frames that are seen at a stride of it.

    Args:
        inputs: What the record reads of a forward.
        per_frame: Tokens of a frame in it.
        label: What messages call who sees frames so.
        model: What they call the model.

    Raises:
        ValueError: If it is not known, or a frame has other tokens than patches and special ones.
    """
    grid, special = inputs.patch_grid, inputs.special_tokens
    if grid is None:
        raise ValueError(
            f"{label} shows frames at a stride of their patch grid, which is not known of {model}; give a "
            "CovisibilityGraph, or a Core without `coarse`"
        )
    expected = grid[0] * grid[1] + (sum(special) if isinstance(special, tuple) else special)
    if per_frame != expected:
        raise ValueError(
            f"{label} shows frames at a stride of their patch grid, so a frame must have {grid[0]} x {grid[1]} "
            f"patches and its special tokens, {expected} tokens, got {per_frame}"
        )
    return grid


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
            f"covisibility by tokens needs the tokens [B, N, C] = [{batch}, {num_tokens}, C] among the arguments of "
            f"{name}, and there are none; give a graph, or a function of the images, as covisibility"
        )
    special = inputs.special_tokens
    first, last = special if isinstance(special, tuple) else (special, 0)
    if first + last >= per_frame:
        raise ValueError(
            f"covisibility by tokens needs patch tokens, but all {per_frame} tokens of a frame are special ones; "
            "give a graph as covisibility"
        )
    return tokens[:, : frames * per_frame].unflatten(1, (frames, per_frame))[:, :, first : per_frame - last]
