"""Layouts that are a graph of frames: `svggt_kernels.patch` puts them in, or the operator answers some layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from svggt_kernels import BlockLayout, CovisibilityGraph, block_sparse_attention, patch
from svggt_kernels.attention import choose_backend
from svggt_kernels.graph.core import choose_core, nearest_frames, spread_evenly
from svggt_kernels.measure.layouts import layouts_named
from svggt_kernels.sources.base import Scene

from .base import Attended, Attention, By, Counted, Known, TokenGrid

Choice = Literal["tokens", "patches", "thumbnails", "overlap", "evenly", "random"]
"""How a core is chosen."""

Special = Literal["ordinary", "dense"]

CHOSEN_AT_ONCE = 128
"""Frames of a scene that are chosen by similarity, for all its layouts that want fewer."""


@dataclass(frozen=True)
class GraphLayout:
    """A graph of frames.

    Attributes:
        name: What result lines call it.
        graph: Returns the graph of a scene as the model sees it.
        special: What special tokens see.
        by_overlap: Whether the graph needs the true overlap. It is made beforehand, so its time does not count.
    """

    name: str
    graph: Callable[[Scene, Known], CovisibilityGraph]
    special: Special
    by_overlap: bool = False

    @contextmanager
    def put_into(self, model: Any, known: Known) -> Iterator[Callable[[], Counted]]:
        """See `Layout`. The model's own forward runs, with other attention."""
        if self.by_overlap:
            _ = [scene.overlap for scene in known.each]
        source = _Chosen(self.name, lambda scene: self.graph(scene, known.each[scene.sample[0]]))
        special: Literal["dense", "masked"] = "dense" if self.special == "dense" else "masked"
        patched = patch(model, covisibility=source, special_tokens=special, fused=False)
        with warnings.catch_warnings(), patched as handle:
            warnings.filterwarnings("ignore", "the covisibility graph", UserWarning)  # such graphs are the point here

            def counted() -> Counted:
                report = handle.report()
                return Counted(report.visible_pairs, report.dense_pairs, report.backend, report.planning_seconds)

            yield counted

    def attention(self, scene: Scene, known: Known, grid: TokenGrid) -> Attention:
        """See `LayerLayout`."""
        graph = self.graph(scene, known).to(scene.tokens.device)
        return OverLayout(
            BlockLayout.from_graph(
                graph, grid.per_frame, special_tokens=grid.special, dense_special=self.special == "dense"
            )
        )


@dataclass(frozen=True)
class OverLayout:
    """Attention over the keys that a layout shows.

    Attributes:
        layout: Over the tokens of a scene.
    """

    layout: BlockLayout

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: Tensor) -> Attended:
        """See `Attention`."""
        out = block_sparse_attention(q, k, v, self.layout, scale=scale)
        assert isinstance(out, Tensor)
        return Attended(out, self.layout.visible_pairs, choose_backend(q.device, q.dtype, q.shape[-1]))


@dataclass(frozen=True)
class _Chosen:
    """A source of graphs for `patch`; it asks for tokens, which every scene in a model has."""

    label: str
    choose: Callable[[Scene], CovisibilityGraph]
    needs: Literal["tokens"] = "tokens"

    def graph(self, scene: Scene) -> CovisibilityGraph:
        with scene.step("graph"):
            return self.choose(scene)


def own(special: Special = "ordinary") -> GraphLayout:
    """Return the layout in which each frame sees itself only."""

    def graph(scene: Scene, known: Known) -> CovisibilityGraph:
        return CovisibilityGraph.sequential(scene.num_frames, 0)

    return GraphLayout(named_special("own", special, "ordinary"), graph, special)


def core(
    frames: int,
    choice: Choice = "tokens",
    *,
    covering: bool = False,
    near: int = 0,
    closed: bool = True,
    special: Special = "ordinary",
) -> GraphLayout:
    """Return the layout of a core that all frames see.

    Args:
        frames: Frames of the core, frame 0 among them; as many as there are, or more, give the full graph.
        choice: How they are chosen.
        covering: Whether frames chosen by similarity shall cover the others; else they lie far apart.
        near: How many of its nearest frames a frame outside the core sees too, by the same similarity (by tokens, if
            the choice is by none).
        closed: Whether frames of the core see the core only.
        special: What special tokens see.

    Raises:
        ValueError: If the core would be empty, is open without near frames, or shall cover without similarity.
    """
    if frames < 1 or (near == 0 and not closed):
        raise ValueError("a core has at least one frame, and one with near frames can be open")

    def graph(scene: Scene, known: Known) -> CovisibilityGraph:
        chosen = core_frames(frames, choice, covering, scene, known)
        further = nearest_frames(known.descriptors(compared_by(choice), scene), near) if near else None
        graph = CovisibilityGraph.core(scene.num_frames, chosen, nearest=further)
        if closed or further is None:
            return graph
        pairs = torch.stack([torch.arange(scene.num_frames).repeat_interleave(near), further.flatten()], dim=1)
        return graph | CovisibilityGraph.from_pairs(scene.num_frames, pairs)

    words = f"core-{frames}{choice_words(choice, covering)}"
    words += f"-near{near}" * (near > 0) + "-open" * (not closed)
    return GraphLayout(named_special(words, special, "ordinary"), graph, special, choice == "overlap")


def nearest(neighbours: int, by: By = "tokens", special: Special = "dense") -> GraphLayout:
    """Return the layout of the package's recipe for neighbours, `CovisibilityGraph.from_descriptors`.

    Args:
        neighbours: Most similar frames that each frame sees at least.
        by: What the descriptors are made of.
        special: What special tokens see.
    """

    def graph(scene: Scene, known: Known) -> CovisibilityGraph:
        return _by_the_package(f"nearest-{neighbours}", by, scene, known)

    words = f"random-{neighbours}" if by == "random" else f"nearest-{neighbours}" + f"-{by}" * (by != "tokens")
    return GraphLayout(named_special(words, special, "dense"), graph, special, by == "overlap")


def two_level(
    frames: int,
    regions: int,
    regional: int,
    choice: Choice = "tokens",
    *,
    covering: bool = False,
    ordered: bool = False,
) -> GraphLayout:
    """Return the layout of a core that all frames see and of a further core for each region of the scene.

    A frame sees the global core, the core of its region, and itself; frames of a region's core see the global core and
    their region's; frames of the global core see it alone. So each level is closed over the one above.

    Args:
        frames: Frames of the global core.
        regions: Parts of the scene: each frame belongs to the one of so many frames, chosen to cover all, that it
            resembles most by the descriptors of `choice`.
        regional: Frames of the core of each region.
        choice: How frames of all cores are chosen.
        covering: As for `core`.
        ordered: Parts are frames that follow one another, as many in each.

    Raises:
        ValueError: If a core is empty, or there are fewer than two regions.
    """
    if min(frames, regional) < 1 or regions < 2:
        raise ValueError("a core has at least one frame, and two levels have at least two regions")

    def graph(scene: Scene, known: Known) -> CovisibilityGraph:
        number = scene.num_frames
        region = _regions(regions, compared_by(choice), ordered, scene, known)
        top = torch.zeros(number, dtype=torch.bool)
        top[core_frames(frames, choice, covering, scene, known)] = True
        middle = torch.zeros_like(top)
        for place in region.unique():
            inside = ((region == place) & ~top).nonzero()[:, 0]
            middle[_core_within(inside, regional, choice, covering, scene, known)] = True
        sees = top | (middle & (region[:, None] == region) & ~top[:, None])
        return CovisibilityGraph.from_dense(sees | torch.eye(number, dtype=torch.bool), square=True)

    words = f"twolevel-{frames}-{regions}x{regional}{choice_words(choice, covering)}" + "-ordered" * ordered
    return GraphLayout(words, graph, "ordinary", choice == "overlap")


def _regions(regions: int, by: By, ordered: bool, scene: Scene, known: Known) -> Tensor:
    """Return the region of each frame, `[S]` int64."""
    number = scene.num_frames
    if ordered:
        return torch.arange(number) * regions // number
    descriptors = known.descriptors(by, scene).double()
    middles = core_frames(regions, by, True, scene, known)
    unit = torch.nn.functional.normalize(descriptors, dim=1)
    return (unit @ unit[middles].T).argmax(1)


def _core_within(inside: Tensor, frames: int, choice: Choice, covering: bool, scene: Scene, known: Known) -> Tensor:
    """Return frames chosen among some, `[n]`."""
    if len(inside) <= frames:
        return inside
    if choice == "evenly":
        return inside[spread_evenly(len(inside), frames)]
    if choice == "random":
        return inside[torch.from_numpy(known.numbers().permutation(len(inside))[:frames])]
    descriptors = known.descriptors(compared_by(choice), scene)[inside]
    return inside[choose_core(descriptors, frames, choice="covering" if covering else "farthest")]


def core_frames(frames: int, choice: Choice, covering: bool, scene: Scene, known: Known) -> Tensor:
    """Return the frames of a core, frame 0 among them, `[min(frames, S)]` int64 in the order of choice; see `core`."""
    if choice == "random":
        drawn = 1 + known.numbers().permutation(scene.num_frames - 1)[: frames - 1]
        return torch.tensor([0, *drawn.tolist()])
    by = compared_by(choice)
    if choice == "evenly":
        return _core_by_the_package(f"core-{frames}-evenly", by, scene, known)
    # Frames are chosen one after another, so a smaller core is the beginning of a larger one.
    order = known.orders.get((by, covering))
    if order is None or len(order) < min(frames, scene.num_frames):
        # Of a core of all frames the package compares none: the last one is what is left.
        wanted, compared = max(frames, CHOSEN_AT_ONCE), max(scene.num_frames - 1, 1)
        name = f"core-{min(wanted, compared)}" + "-covering" * covering
        order = _core_by_the_package(name, by, scene, known)
        if wanted > compared:
            everything = torch.arange(scene.num_frames)
            order = torch.cat([order, everything[~torch.isin(everything, order)]])
        known.orders[by, covering] = order
    return order[:frames]


def _core_by_the_package(name: str, by: By, scene: Scene, known: Known) -> Tensor:
    core = _by_the_package(name, by, scene, known).core_frames
    assert core is not None
    return core


def _by_the_package(name: str, by: By, scene: Scene, known: Known) -> CovisibilityGraph:
    """Return the graph of a layout that `svggt-kernels sweep` knows by the same name, frames compared by `by`."""
    (layout,) = layouts_named([name], lambda: known.similarity(by))
    assert layout.covisibility is not None
    graph = layout.covisibility.graph(scene)
    assert isinstance(graph, CovisibilityGraph)  # none of these names lets frames be seen at a stride
    return graph


def choice_words(choice: Choice, covering: bool) -> str:
    """Return what a name says of how frames are chosen.

    Raises:
        ValueError: If frames shall cover others without being compared.
    """
    if covering and choice in ("evenly", "random"):
        raise ValueError(f"a core by similarity can be covering, and not one chosen {choice}")
    return f"-{choice}" * (choice != "tokens") + "-covering" * covering


def compared_by(choice: Choice) -> By:
    """Return what frames are compared by where a core is chosen like this: by tokens if it is by nothing."""
    return "tokens" if choice in ("evenly", "random") else choice  # type: ignore[return-value]


def named_special(words: str, special: Special, usual: Special) -> str:
    """Return a name with what it says of special tokens, if they are not as usual."""
    return words if special == usual else f"{words}-{special}"
