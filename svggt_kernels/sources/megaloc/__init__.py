"""MegaLoc (arXiv 2502.17237): one descriptor per image for place recognition, and graphs made of such descriptors."""

from .network import MegaLoc, MegaLocConfig
from .similarity import MegaLocSimilarity

__all__ = ["MegaLoc", "MegaLocConfig", "MegaLocSimilarity"]
