"""Frame-block-sparse attention for multi-view transformers.

Which frame attends to which is a graph: time and memory follow its edges. `patch(model)` puts it into a model of the
VGGT family; `block_sparse_attention` is the operator by itself.

The public names are imported, and torch with them, when the first of them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import block_sparse_attention, prepare
    from .coarse import CoarseLayout
    from .graph import CoarseGraph, CovisibilityGraph
    from .layout import BlockLayout
    from .measure.dense import compare_dense
    from .merging import merge
    from .patching import Patch, PatchReport, patch
    from .reconstruction import Reconstruction, reconstruct
    from .sources import Core, MegaLoc, MegaLocSimilarity, PatchSimilarity, PerLayer, TokenSimilarity
    from .streaming import OpenScene, open_saved_scene, open_scene, read_outputs

__version__ = "0.1.0"

_HOMES = {
    "BlockLayout": "layout",
    "CoarseGraph": "graph",
    "CoarseLayout": "coarse",
    "Core": "sources",
    "CovisibilityGraph": "graph",
    "MegaLoc": "sources",
    "MegaLocSimilarity": "sources",
    "OpenScene": "streaming",
    "Patch": "patching",
    "PatchReport": "patching",
    "PatchSimilarity": "sources",
    "PerLayer": "sources",
    "Reconstruction": "reconstruction",
    "TokenSimilarity": "sources",
    "block_sparse_attention": "attention",
    "compare_dense": "measure.dense",
    "merge": "merging",
    "open_saved_scene": "streaming",
    "open_scene": "streaming",
    "patch": "patching",
    "prepare": "attention",
    "read_outputs": "streaming",
    "reconstruct": "reconstruction",
}

__all__ = [
    "BlockLayout",
    "CoarseGraph",
    "CoarseLayout",
    "Core",
    "CovisibilityGraph",
    "MegaLoc",
    "MegaLocSimilarity",
    "OpenScene",
    "Patch",
    "PatchReport",
    "PatchSimilarity",
    "PerLayer",
    "Reconstruction",
    "TokenSimilarity",
    "block_sparse_attention",
    "compare_dense",
    "merge",
    "open_saved_scene",
    "open_scene",
    "patch",
    "prepare",
    "read_outputs",
    "reconstruct",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
