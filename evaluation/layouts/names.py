"""The grammar of names; the package's docstring has its tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

from .answered import Layers
from .base import Dense, Layout
from .coarse import coarse
from .graphs import Choice, Special, core, nearest, own, two_level
from .peers import merged, pooled, shared, subsampled


def named(text: str) -> Layout:
    """Return the layout of a name.

    Raises:
        ValueError: If no form of name fits.
    """
    if text == "dense":
        return Dense()
    if match := re.fullmatch(r"layers\((.+)\)", text):
        return Layers(tuple(_part(part) for part in match[1].split(",")))
    for form, function in _FORMS.items():
        if match := re.fullmatch(form, text):
            words = {word: value for word, value in match.groupdict().items() if value is not None}
            return function(**{word: int(value) if value.isdigit() else value for word, value in words.items()})
    raise ValueError(
        f"{text!r} is no layout; names are dense, own, core-K, nearest-K, random-K, twolevel-K-RxM, shared-K, "
        "subsampled-S, pooled-P, merged-P and layers(...), and the words that may follow are in "
        "evaluation/layouts/__init__.py"
    )


def _part(text: str) -> tuple[range, Any]:
    """Return the layers and the layout of one part of `layers(...)`."""
    layers, _, name = text.partition(":")
    match = re.fullmatch(r"(?P<first>\d+)(-(?P<last>\d+))?", layers)
    if match is None or not name or name.startswith("layers"):
        raise ValueError(f"a part of layers(...) must be like 0-1:own or 2:core-48, got {text!r}")
    first = int(match["first"])
    return range(first, int(match["last"] or first) + 1), named(name)


def _core(
    open: str | None = None, covering: str | None = None, stride: int | None = None, of: int | None = None, **words: Any
) -> Layout:
    if stride is not None:
        return coarse(words.pop("frames"), stride, of, covering=covering is not None, **words)
    return core(closed=open is None, covering=covering is not None, **words)


def _two_level(covering: str | None = None, ordered: str | None = None, **words: Any) -> Layout:
    return two_level(covering=covering is not None, ordered=ordered is not None, **words)


def _shared(covering: str | None = None, **words: Any) -> Layout:
    return shared(covering=covering is not None, **words)


def _random(neighbours: int, special: Special = "dense") -> Layout:
    return nearest(neighbours, "random", special)


_CHOICE = rf"(-(?P<choice>{'|'.join(get_args(Choice))}))?(-(?P<covering>covering))?"
_NEAR = r"(-near(?P<near>\d+)(-(?P<open>open))?)?"
_SPECIAL = rf"(-(?P<special>{'|'.join(get_args(Special))}))?"
_FORMS: dict[str, Callable[..., Layout]] = {
    rf"own{_SPECIAL}": own,
    rf"core-(?P<frames>\d+){_CHOICE}{_NEAR}{_SPECIAL}": _core,
    rf"core-(?P<frames>\d+){_CHOICE}-stride(?P<stride>\d+)(of(?P<of>\d+))?": _core,
    rf"nearest-(?P<neighbours>\d+)(-(?P<by>tokens|patches|thumbnails|overlap))?{_SPECIAL}": nearest,
    rf"random-(?P<neighbours>\d+){_SPECIAL}": _random,
    rf"twolevel-(?P<frames>\d+)-(?P<regions>\d+)x(?P<regional>\d+){_CHOICE}(-(?P<ordered>ordered))?": _two_level,
    rf"shared-(?P<frames>\d+){_CHOICE}(-stride(?P<stride>\d+))?": _shared,
    r"subsampled-(?P<stride>\d+)": subsampled,
    r"pooled-(?P<percent>\d+)(-(?P<queries>\d+)x(?P<keys>\d+))?": pooled,
    r"merged-(?P<percent>\d+)(-region(?P<region>\d+))?": merged,
}
