"""Frame-block-sparse attention for multi-view transformers.

Frames that cannot see each other do not attend to each other: time and memory follow the edges of the covisibility
graph. `patch(model)` puts it into a model of the VGGT family; `block_sparse_attention` is the operator by itself.
"""

from __future__ import annotations

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
