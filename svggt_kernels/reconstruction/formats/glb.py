"""Points with colours and the cameras as small pyramids, as a GLB, which browsers and 3D programs open.

Its axes are those of glTF (x right, y up, z backward), so that the first camera looks ahead into the picture.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...packages import optional
from ..scene import Reconstruction
from .base import Files, Format, Material

DRAWING = "points.glb"
TO_GLTF = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
CAMERA_SIZE = 0.03
"""Depth of a drawn camera, as a share of the median depth."""

CAMERA_COLOUR = (230, 90, 20, 255)
SIDES = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 1], [1, 3, 2], [1, 4, 3]])
"""Faces of a pyramid whose first corner is its top."""

INSTALL = "'svggt-kernels[glb]'"


def _write(material: Material) -> Iterator[Files]:
    trimesh = optional("trimesh", "writing a GLB", "trimesh", INSTALL)
    cloud, drawing = material.cloud, trimesh.Scene()
    drawing.add_geometry(
        trimesh.PointCloud((cloud.points * TO_GLTF).numpy(), colors=cloud.colours.numpy()), geom_name="points"
    )
    corners = (_pyramids(material.scene) * TO_GLTF).numpy()
    faces = (5 * np.arange(len(corners))[:, None, None] + SIDES).reshape(-1, 3)
    cameras = trimesh.Trimesh(corners.reshape(-1, 3), faces, vertex_colors=CAMERA_COLOUR, process=False)
    drawing.add_geometry(cameras, geom_name="cameras")
    yield {DRAWING: drawing.export(file_type="glb")}


def _pyramids(scene: Reconstruction) -> Tensor:
    """Return the corners of a pyramid for each camera: its centre, then the corners of its photo, `[S, 5, 3]`."""
    reach = CAMERA_SIZE * scene.typical_depth
    pyramids = []
    for camera in scene.cameras:
        width, height = camera.size
        corners = torch.tensor([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], dtype=torch.float64)
        local = corners @ torch.linalg.inv(camera.intrinsics).mT * reach
        centre = camera.pose[:3, 3]
        pyramids.append(torch.cat([centre[None], local @ camera.pose[:3, :3].mT + centre]))
    return torch.stack(pyramids)


GLB = Format("glb", "points and cameras, GLB", DRAWING, _write, has_points=True, needs="trimesh", install=INSTALL)
