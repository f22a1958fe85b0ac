"""The words for sources, and what `covisibility` stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from ..graph import AnyGraph
from .base import Source, alike
from .core import Core
from .given import GivenGraphs
from .megaloc import MegaLocSimilarity
from .sequence import AllFrames, Sequential
from .similarity import Similarity
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
WORDS = ", ".join(f'"{word}"' for word in SOURCES)


def named(word: str) -> Source:
    """Return the source that a word stands for, with its usual settings.

    Raises:
        ValueError: If the word is unknown.
    """
    if word not in SOURCES:
        raise ValueError(f"covisibility must be {WORDS}, a source, graphs or a function, got {word!r}")
    return Core(by="patches") if word == "patches" else SOURCES[word]()


def as_source(covisibility: Word | Source | Graphs, beside: Iterable[Source] = ()) -> Source:
    """Return the source that a word, a source or graphs stand for, ready to be used by one patch.

    Args:
        covisibility: The word, source or graphs.
        beside: Sources of the same patch, which are ready: an equal similarity of theirs is used and not opened again.

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
        others = f", or a word ({WORDS}), a source such as Core(8) or a function"
        covisibility = GivenGraphs.of("covisibility", covisibility, others)
    wanted = _similarity_of(covisibility)
    ready = next((one for one in map(_similarity_of, beside) if one is not None and alike(one, wanted)), None)
    if ready is not None:
        return replace(covisibility, by=ready) if isinstance(covisibility, Core) else ready
    opened = getattr(covisibility, "opened", None)
    return covisibility if opened is None else opened()


def _similarity_of(source: Source) -> Any:
    """Return what a source compares frames by, or None."""
    if isinstance(source, Core):
        return source.similarity
    return source if isinstance(source, Similarity) else None
