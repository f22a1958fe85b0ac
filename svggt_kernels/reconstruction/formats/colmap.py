"""A sparse model of COLMAP: a pinhole camera, a pose and observations of points for each photo.

Pixels are those of the photo as it is stored, the centre of the first at (0.5, 0.5). The observations of a point are
where the photos see it whose own depth agrees: they follow from cameras and depth, no feature was matched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...packages import optional
from ...rigid_motions import inverse
from ..points import sightings
from .base import Files, Format, Material

MOST_POINTS = 50_000
INSTALL = "'svggt-kernels[colmap]'"


def _write(material: Material, *, folder: str, as_text: bool) -> Iterator[Files]:
    model = _model(material)
    with tempfile.TemporaryDirectory() as scratch:
        (model.write_text if as_text else model.write_binary)(scratch)
        yield {f"{folder}/{file.name}": file.read_bytes() for file in sorted(Path(scratch).iterdir())}


def _model(material: Material) -> Any:
    colmap = optional("pycolmap", "writing a COLMAP model", "pycolmap", INSTALL)
    scene = material.scene
    cloud = material.cloud.first_drawn(MOST_POINTS)
    points, photos, pixels = (part.numpy() for part in sightings(scene, cloud))
    starts = np.searchsorted(photos, np.arange(len(scene.names) + 1))
    model = colmap.Reconstruction()
    for place, (name, camera) in enumerate(zip(scene.names, scene.cameras, strict=True)):
        number, (width, height) = place + 1, camera.size
        focal, centre = camera.intrinsics.diagonal()[:2], camera.intrinsics[:2, 2]
        model.add_camera_with_trivial_rig(
            colmap.Camera(
                camera_id=number,
                model="PINHOLE",
                width=width,
                height=height,
                params=[*focal.tolist(), *centre.tolist()],
            )
        )
        image = colmap.Image(
            name=name,
            keypoints=np.ascontiguousarray(pixels[starts[place] : starts[place + 1]]),
            camera_id=number,
            image_id=number,
        )
        model.add_image_with_trivial_frame(image, colmap.Rigid3d(inverse(camera.pose)[:3].numpy()))
    order = np.argsort(points, kind="stable")
    ends = np.cumsum(np.bincount(points, minlength=len(cloud)))
    for point, seen in enumerate(np.split(order, ends[:-1])):
        track = colmap.Track()
        for sighting in seen:
            photo = int(photos[sighting])
            track.add_element(photo + 1, int(sighting - starts[photo]))
        model.add_point3D(cloud.points[point].numpy(), track, cloud.colours[point].numpy())
    model.update_point_3d_errors()
    return model


BINARY = Format(
    "colmap",
    "COLMAP model, binary",
    "sparse",
    partial(_write, folder="sparse/0", as_text=False),
    has_points=True,
    needs="pycolmap",
    install=INSTALL,
)
TEXT = Format(
    "colmap-text",
    "COLMAP model, text",
    "sparse-text",
    partial(_write, folder="sparse-text/0", as_text=True),
    has_points=True,
    needs="pycolmap",
    install=INSTALL,
)
