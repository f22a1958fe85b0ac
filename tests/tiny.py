"""A MegaLoc small enough for a test, with random weights."""

from __future__ import annotations

from svggt_kernels.sources import MegaLoc, MegaLocConfig

CONFIG = MegaLocConfig(
    dim=16, depth=2, num_heads=2, grid=4, clusters=4, cluster_dim=8, token_dim=6, hidden=12, descriptor_dim=32
)
SIZE = 42


def megaloc(seed: int = 0) -> MegaLoc:
    return MegaLoc.random_init(CONFIG, seed=seed)
