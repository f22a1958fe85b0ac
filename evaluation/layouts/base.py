"""What a layout is to the curve and the study, what it may know of a scene, and the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from svggt_kernels import PatchSimilarity, TokenSimilarity
from svggt_kernels.demo.scenes import Scenes
from svggt_kernels.sources import Similarity
from svggt_kernels.sources.base import Scene
from svggt_kernels.sources.thumbnails import thumbnails

By = Literal["tokens", "patches", "thumbnails", "overlap", "random"]
"""What frames are compared by; "random": by nothing."""

RANDOM_CHANNELS = 256
SCENES_OF_A_SEED = 2**16


class Known:
    """What a layout may know of a scene beyond what the model is given; descriptors are computed once a scene.

    Attributes:
        orders: Frames in the order in which cores take them, as far as any layout asked, by what they are compared by
            and whether they shall cover the others.

    Args:
        scenes: The scenes that the model is given, mostly one.
        seed: Of the layouts' own random numbers; all layouts of a scene draw the same.
    """

    def __init__(self, scenes: Scenes, seed: int) -> None:
        self.scenes, self.seed = scenes, seed
        self.orders: dict[tuple[By, bool], Tensor] = {}
        self._descriptors: dict[By, Tensor] = {}

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

    def descriptors(self, by: By, scene: Scene) -> Tensor:
        """Return a descriptor of each frame, `[S, C]` on the CPU.

        Args:
            by: What they are made of. Tokens are those that enter the first global layer, which no layout changes.
            scene: The same scene as the model sees it.
        """
        if by not in self._descriptors:
            self._descriptors[by] = self._described(by, scene)
        return self._descriptors[by]

    def _described(self, by: By, scene: Scene) -> Tensor:
        if by == "tokens":
            return TokenSimilarity().descriptors(scene).cpu()
        if by == "thumbnails":
            return thumbnails(scene.rgb).cpu()
        if by == "random":
            return torch.from_numpy(self.numbers().standard_normal((scene.num_frames, RANDOM_CHANNELS)))
        if by == "patches":
            return _with_products(PatchSimilarity().compared(scene).scores.double().cpu())
        return _with_products(self.overlap.clone().fill_diagonal_(1))

    def similarity(self, by: By) -> Similarity:
        """Return what the package's recipes take, with these descriptors."""
        return _KnownSimilarity(known=self, word=by)


def _with_products(matrix: Tensor) -> Tensor:
    """Return rows `[S, S]` whose products are a symmetric matrix, as nearly as products can be."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()


@dataclass(frozen=True, kw_only=True)
class _KnownSimilarity(Similarity):
    """Compares frames by the descriptors that are known of their scene."""

    known: Known = field(repr=False, compare=False)
    word: By

    by: ClassVar[str] = "descriptors of the study"
    needs: ClassVar[Literal["tokens"]] = "tokens"

    def descriptors(self, scene: Scene) -> Tensor:
        """Return a descriptor of each frame, `[S, C]`."""
        return self.known.descriptors(self.word, scene)


class Counted(NamedTuple):
    """What a forward computed in one global layer, a mean over such layers if they differ.

    Attributes:
        pairs: (query token, key token) pairs that attend, a mean over heads if they differ.
        dense_pairs: The same in the model as it is.
        backend: What ran them; None for PyTorch's attention.
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


class TokenGrid(NamedTuple):
    """How the tokens of a scene lie: frame after frame, in each its special tokens and then its patches, row by row.

    Attributes:
        frames: S.
        special: Special tokens of a frame.
        rows: Rows of patches.
        columns: Columns of patches.
    """

    frames: int
    special: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.rows * self.columns

    @property
    def per_frame(self) -> int:
        """Tokens of a frame, P."""
        return self.special + self.patches

    @property
    def tokens(self) -> int:
        """Tokens of all frames, N."""
        return self.frames * self.per_frame


class Attended(NamedTuple):
    """What the attention of one layer came to.

    Attributes:
        out: `[1, H, N, D]`.
        pairs: (query token, key token) pairs of one head, a mean over heads; a tensor where it is known on the device.
        backend: What of the package ran them; None for PyTorch's attention.
    """

    out: Tensor
    pairs: int | Tensor
    backend: str | None = None


class Attention(Protocol):
    """The attention of one global layer."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: Tensor) -> Attended:
        """Attend.

        Args:
            q: Queries `[1, H, N, D]`, as those that follow in the dtype in which attention runs.
            k: Keys.
            v: Values.
            scale: Factor on the scores.
            tokens: What enters the layer, normalised, `[1, N, C]`.
        """


class LayerLayout(Protocol):
    """A layout that can be that of some layers alone."""

    @property
    def name(self) -> str:
        """What result lines call it."""

    def attention(self, scene: Scene, known: Known, grid: TokenGrid) -> Attention:
        """Return the attention of a layer of one scene, as the model sees it at its first global layer."""


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

    def attention(self, scene: Scene, known: Known, grid: TokenGrid) -> Attention:
        """See `LayerLayout`."""
        return _attend_densely


def _attend_densely(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: Tensor) -> Attended:
    return Attended(F.scaled_dot_product_attention(q, k, v, scale=scale), q.shape[2] * k.shape[2])
