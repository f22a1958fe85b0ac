"""Layouts by name: what `svggt_kernels.patch` is given, so that a model attends over a graph of frames.

| name | each frame sees | special tokens |
|---|---|---|
| `dense` | every frame: the model as it is, not patched | |
| `own` | itself only | ordinary |
| `core-K` | itself and K frames that all see, the core; frames of the core see the core only | ordinary |
| `nearest-K` | by `CovisibilityGraph.from_descriptors`: K nearest, frame 0, anchors, bridges | dense |
| `random-K` | by the same recipe with random descriptors | dense |

Words may follow, in this order:

| word | of | meaning |
|---|---|---|
| `-tokens`, `-thumbnails`, `-overlap` | core, nearest | by what frames are similar; tokens if nothing is said |
| `-evenly`, `-random` | core | the core is spread over the order of the frames, or drawn |
| `-covering` | core by similarity | frames are chosen to cover all others, not to lie far apart |
| `-nearM` | core | frames outside the core see their M nearest frames too |
| `-open` | core, after `-nearM` | so do frames of the core, which is then not closed |
| `-ordinary`, `-dense` | all but `dense` | special tokens follow the graph, or see and are seen by everything |

Frame 0, in whose axes such models answer, is in every core. By similarity each next frame of a core is the one least
similar to those before it, or with `-covering` the one that raises most what all frames find similar in the core. True
overlap is what no user has: a bound on what a choice by descriptors can give.

What is not a graph (keys at a stride, merged tokens) is a class of its own with a `name` and `put_into`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from svggt_kernels import CovisibilityGraph, TokenSimilarity, patch
from svggt_kernels.demo.scenes import Scenes
from svggt_kernels.graph.core import choose_core, nearest_frames, spread_evenly
from svggt_kernels.sources.base import Scene
from svggt_kernels.sources.thumbnails import thumbnails

By = Literal["tokens", "thumbnails", "overlap", "random"]
"""What frames are compared by; "random": by nothing."""

Choice = Literal["tokens", "thumbnails", "overlap", "evenly", "random"]
"""How a core is chosen."""

Special = Literal["ordinary", "dense"]

RANDOM_CHANNELS = 256
SCENES_OF_A_SEED = 2**16


class Known:
    """What a layout may know of a scene beyond what the model is given.

    Args:
        scenes: The scenes that the model is given, mostly one.
        seed: Of the layouts' own random numbers; all layouts of a scene draw the same.
    """

    def __init__(self, scenes: Scenes, seed: int) -> None:
        self.scenes, self.seed = scenes, seed

    @cached_property
    def each(self) -> list[Known]:
        """What is known of each scene."""
        parts = zip(*(getattr(self.scenes, part.name).split(1) for part in fields(Scenes)), strict=True)
        known = [Known(Scenes(*of_scene), self.seed * SCENES_OF_A_SEED + scene) for scene, of_scene in enumerate(parts)]
        return known if len(known) > 1 else [self]

    @cached_property
    def overlap(self) -> Tensor:
        """The share of pixels that two frames have in common, the larger of both ways, `[S, S]` float64 on the CPU.

        Raises:
            ValueError: If there are several scenes.
        """
        (overlap,) = self.scenes.overlap().double().cpu()
        return torch.maximum(overlap, overlap.T)

    def numbers(self) -> np.random.Generator:
        """Return random numbers, the same each time."""
        return np.random.default_rng(self.seed)


class Counted(NamedTuple):
    """What a forward computed in one global layer, a mean over such layers if they differ.

    Attributes:
        pairs: (query token, key token) pairs that attend.
        dense_pairs: The same in the model as it is.
        backend: What ran them; None for the model's own attention.
        planning_seconds: Time on the host from the images to the tables of the layout, part of the forward.
    """

    pairs: int
    dense_pairs: int
    backend: str | None = None
    planning_seconds: float = 0.0


class Layout(Protocol):
    """What the curve measures."""

    @property
    def name(self) -> str:
        """What result lines call it."""

    def put_into(self, model: Any, known: Known) -> AbstractContextManager[Callable[[], Counted]]:
        """Return a context in which the model attends by this layout; within it, a function tells of its last forward.

        Args:
            model: A `RoomsModel`.
            known: The scenes that the model will be given.
        """


@dataclass(frozen=True)
class Dense:
    """The model as it is."""

    name: str = "dense"

    @contextmanager
    def put_into(self, model: Any, known: Known) -> Iterator[Callable[[], Counted]]:
        """See `Layout`."""
        _, frames, _, height, width = known.scenes.images.shape
        pairs = (frames * model.tokens_per_frame(height, width)) ** 2
        yield lambda: Counted(pairs, pairs)


@dataclass(frozen=True)
class GraphLayout:
    """A graph of frames, put in by `patch`.

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

    return GraphLayout(_name("own", special, "ordinary"), graph, special)


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
    if frames < 1 or (near == 0 and not closed) or (covering and choice in ("evenly", "random")):
        raise ValueError(
            "a core has at least one frame, one with near frames can be open, and one by similarity can be covering"
        )

    def graph(scene: Scene, known: Known) -> CovisibilityGraph:
        chosen = _core_frames(frames, choice, covering, scene, known)
        further = nearest_frames(_descriptors(_by(choice), scene, known), near) if near else None
        graph = CovisibilityGraph.core(scene.num_frames, chosen, nearest=further)
        if closed or further is None:
            return graph
        pairs = torch.stack([torch.arange(scene.num_frames).repeat_interleave(near), further.flatten()], dim=1)
        return graph | CovisibilityGraph.from_pairs(scene.num_frames, pairs)

    words = f"core-{frames}" + f"-{choice}" * (choice != "tokens") + "-covering" * covering
    words += f"-near{near}" * (near > 0) + "-open" * (not closed)
    return GraphLayout(_name(words, special, "ordinary"), graph, special, choice == "overlap")


def nearest(neighbours: int, by: By = "tokens", special: Special = "dense") -> GraphLayout:
    """Return the layout of the package's recipe for neighbours, `CovisibilityGraph.from_descriptors`.

    Args:
        neighbours: Most similar frames that each frame sees at least.
        by: What the descriptors are made of.
        special: What special tokens see.
    """

    def graph(scene: Scene, known: Known) -> CovisibilityGraph:
        recipe = TokenSimilarity(neighbours=neighbours)
        return recipe.from_descriptors(_descriptors(by, scene, known), scene.reference_frame)

    words = f"random-{neighbours}" if by == "random" else f"nearest-{neighbours}" + f"-{by}" * (by != "tokens")
    return GraphLayout(_name(words, special, "dense"), graph, special, by == "overlap")


def _core_frames(frames: int, choice: Choice, covering: bool, scene: Scene, known: Known) -> Tensor | list[int]:
    """Return the frames of a core, frame 0 among them; see `core`."""
    if choice == "evenly":
        return spread_evenly(scene.num_frames, frames)
    if choice == "random":
        return [0, *(1 + known.numbers().permutation(scene.num_frames - 1)[: frames - 1]).tolist()]
    return choose_core(_descriptors(choice, scene, known), frames, choice="covering" if covering else "farthest")


def named(text: str) -> Layout:
    """Return the layout of a name.

    Raises:
        ValueError: If no form of name fits.
    """
    if text == "dense":
        return Dense()
    for form, function in _FORMS.items():
        if match := re.fullmatch(form, text):
            words = {word: value for word, value in match.groupdict().items() if value is not None}
            return function(**{word: int(value) if value.isdigit() else value for word, value in words.items()})
    raise ValueError(
        f"{text!r} is no layout; names are dense, own, core-K, nearest-K and random-K, and the words that may follow "
        "are in evaluation/layouts.py"
    )


def _core(open: str | None = None, covering: str | None = None, **words: Any) -> Layout:
    return core(closed=open is None, covering=covering is not None, **words)


def _random(neighbours: int, special: Special = "dense") -> Layout:
    return nearest(neighbours, "random", special)


_CHOICE = rf"(-(?P<choice>{'|'.join(get_args(Choice))}))?(-(?P<covering>covering))?"
_NEAR = r"(-near(?P<near>\d+)(-(?P<open>open))?)?"
_SPECIAL = rf"(-(?P<special>{'|'.join(get_args(Special))}))?"
_FORMS: dict[str, Callable[..., Layout]] = {
    rf"own{_SPECIAL}": own,
    rf"core-(?P<frames>\d+){_CHOICE}{_NEAR}{_SPECIAL}": _core,
    rf"nearest-(?P<neighbours>\d+)(-(?P<by>tokens|thumbnails|overlap))?{_SPECIAL}": nearest,
    rf"random-(?P<neighbours>\d+){_SPECIAL}": _random,
}


def _name(words: str, special: Special, usual: Special) -> str:
    return words if special == usual else f"{words}-{special}"


def _by(choice: Choice) -> By:
    return "tokens" if choice in ("evenly", "random") else choice  # type: ignore[return-value]


def _descriptors(by: By, scene: Scene, known: Known) -> Tensor:
    """Return a descriptor of each frame, `[S, C]` on the CPU."""
    if by == "tokens":
        return TokenSimilarity().descriptors(scene).cpu()
    if by == "thumbnails":
        return thumbnails(scene.rgb).cpu()
    if by == "random":
        return torch.from_numpy(known.numbers().standard_normal((scene.num_frames, RANDOM_CHANNELS)))
    # Rows whose products are the overlap, as nearly as products can be.
    values, vectors = torch.linalg.eigh(known.overlap.clone().fill_diagonal_(1))
    return vectors * values.clamp(min=0).sqrt()
