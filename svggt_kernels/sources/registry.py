"""The words for sources, and what `covisibility` stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..graph import AnyGraph
from .base import Source
from .core import Core, PatchCore
from .given import GivenGraphs
from .megaloc import MegaLocSimilarity
from .sequence import AllFrames, Sequential
from .thumbnails import ThumbnailSimilarity
from .tokens import TokenSimilarity

Word = Literal["core", "patches", "megaloc", "tokens", "thumbnails", "sequential", "all"]
Graphs = AnyGraph | Sequence[AnyGraph]
Covisibility = Word | Source | Graphs | Callable[[Any], Graphs]

SOURCES: dict[Word, type[Source]] = {
    "core": Core,
    "patches": PatchCore,
    "megaloc": MegaLocSimilarity,
    "tokens": TokenSimilarity,
    "thumbnails": ThumbnailSimilarity,
    "sequential": Sequential,
    "all": AllFrames,
}


def as_source(covisibility: Word | Source | Graphs) -> Source:
    """Return the source that a word, a source or graphs stand for, ready to be used by one patch.

    Raises:
        ValueError: If it is an unknown word, or MegaLoc's weights are not what they must be.
        TypeError: If it is of another type.
        FileNotFoundError: If MegaLoc's weights are asked for and cannot be had.
        ImportError: If a package is missing that fetches or reads them.
    """
    if isinstance(covisibility, str):
        if covisibility not in SOURCES:
            words = ", ".join(f'"{word}"' for word in SOURCES)
            raise ValueError(f"covisibility must be {words}, a source, graphs or a function, got {covisibility!r}")
        covisibility = SOURCES[covisibility]()
    if isinstance(covisibility, type) or not isinstance(covisibility, Source):
        covisibility = GivenGraphs.of("covisibility", covisibility)
    opened = getattr(covisibility, "opened", None)
    return covisibility if opened is None else opened()
