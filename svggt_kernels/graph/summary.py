"""What a graph looks like at a glance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .connectivity import EXACT_DIAMETER_FRAMES, hop_diameter
from .descriptors import REAL_NEIGHBOURS

if TYPE_CHECKING:
    from .graph import CovisibilityGraph

USELESS_DENSITY = 0.6
NEIGHBOURS = (
    "on graphs of the frames most alike a model trained with dense attention was measured to keep a fifth to a half of "
    "its AUC@30, where a core kept it (docs/accuracy.md): use Core, on the command line --core"
)


@dataclass(frozen=True)
class GraphSummary:
    """What a graph looks like at a glance; `str` gives it in a few lines.

    Attributes:
        frames: Query frames.
        key_frames: Key frames.
        edges: Visible (query frame, key frame) pairs.
        density: Edges over all such pairs.
        core: Frames of the core that all see; None if the graph has none.
        components: Connected components, edges taken both ways, coarse ones too; None for a rectangular graph.
        hop_diameter: Hops between the two frames farthest apart in one component, edges taken both ways; None for a
            rectangular graph.
        hop_diameter_is_exact: False where `hop_diameter` is a lower bound (above 2000 frames).
        degree_min: Fewest frames that a frame sees, itself not counted in a square graph.
        degree_median: Median of the same.
        degree_max: Most of the same.
        bridges: Pairs that join parts which neighbours and known pairs leave; None if the graph does not come from
            descriptors.
        lonely: Frames with fewer than 2 real neighbours: frames of which each is among the most similar of the other.
            None if the graph does not come from descriptors.
        warnings: What will cost time or accuracy, one sentence each.
        coarse_frames: Frames that are seen coarsely too; None, as the next two, if there are no such.
        coarse_edges: (query frame, key frame) pairs that are seen coarsely.
        stride: The stride at which they are seen.
    """

    frames: int
    key_frames: int
    edges: int
    density: float
    core: int | None
    components: int | None
    hop_diameter: int | None
    hop_diameter_is_exact: bool
    degree_min: int
    degree_median: float
    degree_max: int
    bridges: int | None
    lonely: tuple[int, ...] | None
    warnings: tuple[str, ...]
    coarse_frames: int | None = None
    coarse_edges: int | None = None
    stride: int | None = None

    @classmethod
    def of(cls, graph: CovisibilityGraph, also: CovisibilityGraph | None = None) -> GraphSummary:
        """Measure a graph, on the CPU; see `CovisibilityGraph.summary`.

        Args:
            graph: The graph.
            also: A graph over the same frames that holds it, whose other edges join frames too but are not counted.
        """
        graph = graph.to("cpu")
        joined = graph if also is None else also.to("cpu")
        frames, square, origin = graph.num_frames, graph.is_square, graph.origin
        degrees = _others_seen(graph)
        components = diameter = None
        core = None if graph.core_frames is None else len(graph.core_frames)
        if square:
            both_ways = joined.symmetrized()
            components, diameter = joined.num_components, hop_diameter(both_ways.indptr, both_ways.indices)
        blind = int((_others_seen(joined) == 0).sum())
        bridges = None if origin is None else len(origin.bridges)
        lonely = () if origin is None else origin.lonely()
        useless = graph.density > USELESS_DENSITY and core != frames
        warnings = {
            f"density {graph.density:.2f} is above {USELESS_DENSITY}: sparse attention saves little here; use a "
            "sparser graph (fewer neighbours, a smaller window), or dense attention": useless,
            f"the core holds all {frames} frames, so that attention is dense; give a smaller one": core == frames > 1,
            NEIGHBOURS: origin is not None and graph.density < 1,
            f"the graph has {components} components that cannot see one another; add pairs, or build it from "
            "descriptors with bridge=True": (components or 1) > 1,
            f"frames that see no other frame: {blind}": blind and square and frames > 1,
            f"the pairs that are known or similar leave {(bridges or 0) + 1} parts, which {bridges} added pairs join; "
            "if they do not show one scene, run them apart, else give pairs that you know": bridges,
            f"frames with fewer than {REAL_NEIGHBOURS} real neighbours (each among the most similar of the other): "
            f"{len(lonely)} ({', '.join(map(str, lonely[:8]))}{', ...' if len(lonely) > 8 else ''}); they may show "
            "something else, or share little with the rest": lonely,
            f"query frames that see no key frame, so that their attention gives zero: {blind}": blind and not square,
        }
        return cls(
            frames=frames,
            key_frames=graph.num_key_frames,
            edges=graph.num_edges,
            density=graph.density,
            core=core,
            components=components,
            hop_diameter=diameter,
            hop_diameter_is_exact=square and frames <= EXACT_DIAMETER_FRAMES,
            degree_min=int(degrees.min()),
            degree_median=float(np.median(degrees.numpy())),
            degree_max=int(degrees.max()),
            bridges=bridges,
            lonely=None if origin is None else lonely,
            warnings=tuple(warning for warning, applies in warnings.items() if applies),
        )

    def __str__(self) -> str:
        frames = f"{self.frames} frames"
        if self.components is None:
            frames = f"{self.frames} query frames, {self.key_frames} key frames"
        lines = [
            f"{frames}, {self.edges} edges, density {self.density:.3g}",
            f"other frames seen by a frame: {self.degree_min} to {self.degree_max}, median {self.degree_median:g}",
        ]
        if self.core is not None:
            alone = "" if self.coarse_frames else " and which see one another alone"
            lines.append(f"a core of {self.core} frames, which all see{alone}")
        if self.coarse_frames:
            lines.append(
                f"coarsely: {self.coarse_frames} frames at stride {self.stride}, {self.coarse_edges} edges besides"
            )
        if self.components is not None:
            bound = "" if self.hop_diameter_is_exact else "at least "
            lines.append(f"components: {self.components}, hop diameter: {bound}{self.hop_diameter}")
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def _others_seen(graph: CovisibilityGraph) -> Tensor:
    """Return how many frames each frame sees, itself not counted in a square graph, `[S]` int64."""
    degrees = graph.indptr.diff().to(torch.int64)
    if graph.is_square:
        degrees -= torch.bincount(graph.indices[graph.rows == graph.indices], minlength=graph.num_frames)
    return degrees
