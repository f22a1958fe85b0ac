"""Frame-block-sparse attention for multi-view transformers.

Frames that cannot see each other do not attend to each other: time and memory follow the edges of the covisibility
graph. `patch(model)` puts it into a model of the VGGT family; `block_sparse_attention` is the operator by itself.

The public names are imported, and torch with them, when the first of them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import block_sparse_attention, prepare
    from .covisibility import CovisibilityGraph, MegaLoc
    from .layout import BlockLayout
    from .patching import MegaLocSimilarity, Patch, PatchReport, TokenSimilarity, patch

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "CovisibilityGraph",
    "MegaLoc",
    "MegaLocSimilarity",
    "Patch",
    "PatchReport",
    "TokenSimilarity",
    "block_sparse_attention",
    "patch",
    "prepare",
]

_HOMES = ("attention", "covisibility", "layout", "patching")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f".{home}", __name__)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
