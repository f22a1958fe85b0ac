"""The formats in which a reconstruction is written, one file each; one table of them.

| word | files | opened by |
|---|---|---|
| colmap | sparse/0/*.bin | COLMAP, gsplat, hloc |
| colmap-text | sparse-text/0/*.txt | the same |
| nerfstudio | transforms.json | nerfstudio, instant-ngp |
| ply | points.ply | MeshLab, CloudCompare, Blender |
| glb | points.glb | browsers, Blender |
| tum | trajectory.txt | evo |
| depth | depth/*.png | what reads depth maps of 16 bits |
| depth-npy | depth-npy/*.npy | NumPy |
"""

from __future__ import annotations

from .base import Files, Format, Material
from .colmap import BINARY, TEXT
from .depth import ARRAY_MAPS, LEVELS_MAPS
from .glb import GLB
from .nerfstudio import NERFSTUDIO
from .ply import PLY
from .trajectory import TUM

__all__ = ["DEFAULT", "FORMATS", "Files", "Format", "Material"]

FORMATS = {form.name: form for form in (BINARY, TEXT, NERFSTUDIO, PLY, GLB, TUM, LEVELS_MAPS, ARRAY_MAPS)}
DEFAULT = ("colmap", "nerfstudio", "ply", "glb", "tum", "depth")
"""What is written where nobody says; of these, what is installed."""
