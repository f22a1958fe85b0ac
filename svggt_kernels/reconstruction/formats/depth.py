"""Depth maps of the photos: grey PNG of 16 bits, or arrays of NumPy. A map shows all that its photo shows, as stored.

A PNG holds whole multiples of one step for all photos, which transforms.json and reconstruction.json state. Where
nothing is known, outside of what the model saw, a map is 0.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np

from ...packages import optional
from .base import LEVELS, Files, Format, Material

LEVELS_FOLDER, ARRAYS_FOLDER = "depth", "depth-npy"


def depth_names(photos: Sequence[str]) -> list[str]:
    """Return the names of depth maps without suffix: those of the photos, with suffix where two would be alike."""
    stems = [str(PurePosixPath(name).with_suffix("")) for name in photos]
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else name for stem, name in zip(stems, photos, strict=True)]


def _write_levels(material: Material) -> Iterator[Files]:
    pillow = optional("PIL.Image", "writing depth maps as PNG", "Pillow", "'svggt-kernels[viz]'")
    for name, depth in zip(depth_names(material.scene.names), material.scene.depth_maps(), strict=True):
        levels = (depth.double() / material.depth_step).round()
        # What is nearer than half a step is still known.
        known = levels.clamp(min=1).where((depth > 0) & (levels <= LEVELS), 0)
        file = io.BytesIO()
        pillow.fromarray(known.numpy().astype(np.uint16)).save(file, "PNG")
        yield {f"{LEVELS_FOLDER}/{name}.png": file.getvalue()}


def _write_arrays(material: Material) -> Iterator[Files]:
    for name, depth in zip(depth_names(material.scene.names), material.scene.depth_maps(), strict=True):
        file = io.BytesIO()
        np.save(file, depth.numpy())
        yield {f"{ARRAYS_FOLDER}/{name}.npy": file.getvalue()}


LEVELS_MAPS = Format("depth", "depth maps, PNG of 16 bits", LEVELS_FOLDER, _write_levels)
ARRAY_MAPS = Format("depth-npy", "depth maps, arrays of NumPy", ARRAYS_FOLDER, _write_arrays)
