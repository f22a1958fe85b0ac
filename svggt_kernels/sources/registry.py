"""The words for sources, and what `covisibility` stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..graph import AnyGraph
from .base import Source
from .core import Core
from .given import GivenGraphs
from .megaloc import MegaLocSimilarity
from .sequence import AllFrames, Sequential
from .thumbnails import ThumbnailSimilarity
from .tokens import PatchSimilarity, TokenSimilarity

Word = Literal["core", "patches", "megaloc", "tokens", "thumbnails", "sequential", "all"]
Graphs = AnyGraph | Sequence[AnyGraph]
Covisibility = Word | Source | Graphs | Callable[[Any], Graphs]

SOURCES: dict[Word, type[Source]] = {
    "core": Core,
    "patches": Core,
    "megaloc": MegaLocSimilarity,
    "tokens": TokenSimilarity,
    "thumbnails": ThumbnailSimilarity,
    "sequential": Sequential,
    "all": AllFrames,
}


def named(word: str) -> Source:
    """Return the source that a word stands for, with its usual settings.

    Raises:
        ValueError: If the word is unknown.
    """
    if word not in SOURCES:
        words = ", ".join(f'"{known}"' for known in SOURCES)
        raise ValueError(f"covisibility must be {words}, a source, graphs or a function, got {word!r}")
    return Core(by="patches") if word == "patches" else SOURCES[word]()


def as_source(covisibility: Word | Source | Graphs) -> Source:
    """Return the source that a word, a source or graphs stand for, ready to be used by one patch.

    Raises:
        ValueError: If it is an unknown word, or MegaLoc's weights are not what they must be.
        TypeError: If it is of another type.
        FileNotFoundError: If MegaLoc's weights are asked for and cannot be had.
        ImportError: If a package is missing that fetches or reads them.
    """
    if isinstance(covisibility, str):
        covisibility = named(covisibility)
    if isinstance(covisibility, PatchSimilarity):
        raise TypeError(
            "covisibility must be a source, and PatchSimilarity gives no graph, it only compares frames; write "
            "Core(by=PatchSimilarity())"
        )
    if isinstance(covisibility, type) or not isinstance(covisibility, Source):
        covisibility = GivenGraphs.of("covisibility", covisibility)
    opened = getattr(covisibility, "opened", None)
    return covisibility if opened is None else opened()
