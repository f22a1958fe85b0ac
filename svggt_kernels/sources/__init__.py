"""Where covisibility graphs come from: similar images or tokens, order, COLMAP, poses, or what the user gives."""

from .base import Scene, Source
from .colmap import from_colmap
from .core import Core
from .files import GraphFile, graph_bytes, hloc_pairs, read_graph
from .given import GivenGraphs
from .megaloc import MegaLoc, MegaLocConfig, MegaLocSimilarity
from .per_layer import PerLayer
from .poses import from_poses
from .registry import SOURCES, Covisibility, as_source
from .sequence import AllFrames, Sequential
from .similarity import Similarity
from .thumbnails import ThumbnailSimilarity
from .tokens import PatchSimilarity, TokenSimilarity

__all__ = [
    "SOURCES",
    "AllFrames",
    "Core",
    "Covisibility",
    "GivenGraphs",
    "GraphFile",
    "MegaLoc",
    "MegaLocConfig",
    "MegaLocSimilarity",
    "PatchSimilarity",
    "PerLayer",
    "Scene",
    "Sequential",
    "Similarity",
    "Source",
    "ThumbnailSimilarity",
    "TokenSimilarity",
    "as_source",
    "from_colmap",
    "from_poses",
    "graph_bytes",
    "hloc_pairs",
    "read_graph",
]
