"""Sources by the words and numbers that commands and agents say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base import Source
from .core import CORE_SIZE, SIMILARITIES, Core
from .megaloc import MegaLoc, MegaLocSimilarity
from .registry import SOURCES
from .similarity import Similarity
from .tokens import PatchSimilarity


def named_source(
    word: str,
    *,
    core: int | None = None,
    neighbours: int | None = None,
    window: int | None = None,
    megaloc: Callable[[], MegaLoc],
) -> Source:
    """Return the source that a word of `SOURCES` stands for.

    Args:
        word: What frames are compared by; "core" is a core by MegaLoc.
        core: Frames of a closed core in place of neighbours; None for the usual number with the word "core".
        neighbours: Most similar frames that each frame sees; None for the usual number.
        window: Frames before and after that each frame sees; None for the usual number.
        megaloc: Returns MegaLoc with its weights; called if they are needed.

    Raises:
        ValueError: If both a core and neighbours are asked for.
        TypeError: If the source has no such setting.
    """
    options = {name: value for name, value in (("neighbours", neighbours), ("window", window)) if value is not None}
    if core is not None and options:
        raise ValueError(f"core and {next(iter(options))} say both what each frame sees; give one of them")
    if word in ("core", "patches") or core is not None:
        by = None if word == "sequential" else named_similarity(word, megaloc=megaloc, **options)
        return Core(CORE_SIZE if core is None else core, by=by)
    if word in ("sequential", "all"):
        return SOURCES[word](**options)  # type: ignore[index]
    similarity = named_similarity(word, megaloc=megaloc, **options)
    assert isinstance(similarity, Similarity)  # "patches" is a core
    return similarity


def named_similarity(word: str, *, megaloc: Callable[[], MegaLoc], **options: Any) -> Similarity | PatchSimilarity:
    """Return the similarity by which a word of `SOURCES` compares frames, with these options."""
    if word in ("core", "megaloc"):
        return MegaLocSimilarity(weights=megaloc(), **options)
    return SIMILARITIES[word](**options)  # type: ignore[index]
