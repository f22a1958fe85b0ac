"""nerfstudio's transforms.json: a pinhole camera for each photo, camera axes of OpenGL (x right, y up, z backward)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ...io.transforms import TURNED_AXES
from .base import Files, Format, Material
from .depth import LEVELS_FOLDER, depth_names
from .ply import POINTS

TRANSFORMS = "transforms.json"


def _write(material: Material) -> Iterator[Files]:
    scene, has_depth = material.scene, "depth" in material.formats
    frames = []
    for photo, name, camera in zip(scene.photos, depth_names(scene.names), scene.cameras, strict=True):
        width, height = camera.size
        frame = {
            "file_path": Path(os.path.relpath(photo, material.folder)).as_posix(),
            "fl_x": float(camera.intrinsics[0, 0]),
            "fl_y": float(camera.intrinsics[1, 1]),
            "cx": float(camera.intrinsics[0, 2]),
            "cy": float(camera.intrinsics[1, 2]),
            "w": width,
            "h": height,
            "transform_matrix": (camera.pose * TURNED_AXES).tolist(),
        }
        frames.append(frame | ({"depth_file_path": f"{LEVELS_FOLDER}/{name}.png"} if has_depth else {}))
    content = {
        "camera_model": "PINHOLE",
        **({"depth_unit_scale_factor": material.depth_step} if has_depth else {}),
        **({"ply_file_path": POINTS} if "ply" in material.formats else {}),
        "frames": frames,
    }
    yield {TRANSFORMS: (json.dumps(content, indent=1) + "\n").encode()}


NERFSTUDIO = Format("nerfstudio", "nerfstudio's transforms.json", TRANSFORMS, _write)
