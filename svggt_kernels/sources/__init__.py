"""Where covisibility graphs come from: similar images or tokens, order, COLMAP, poses."""

from .colmap import from_colmap
from .megaloc import MegaLoc, MegaLocConfig
from .poses import from_poses
from .similarity import MegaLocSimilarity, Similarity, TokenSimilarity

__all__ = [
    "MegaLoc",
    "MegaLocConfig",
    "MegaLocSimilarity",
    "Similarity",
    "TokenSimilarity",
    "from_colmap",
    "from_poses",
]
