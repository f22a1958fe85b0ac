"""A rendered walk as a reconstruction whose cameras and depth are exact, and photos that are larger than its frames."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svggt_kernels import CovisibilityGraph
from svggt_kernels.demo.scenes import Draws, make_scenes
from svggt_kernels.demo.scenes.renderer import nearest_hit, render
from svggt_kernels.reconstruction import Reconstruction
from svggt_kernels.reconstruction.scene import relative_names

FRAMES = 6
PHOTO, FRAME = (200, 126), (84, 70)  # of other shapes: the photo loses a quarter of its width
SCALE, LEFT, TOP = 126 / 70, (200 - 84 * 126 / 70) / 2, 0.0


class Exact(NamedTuple):
    """A walk.

    Attributes:
        scene: With exact cameras and depth.
        boxes: What was rendered.
        camera: fx, fy, cx, cy of the photos; pixel centres are at integers, as the renderer has it.
    """

    scene: Reconstruction
    boxes: Tensor
    camera: Tensor

    def hit(self, photo: int, pixels: Tensor) -> Tensor:
        """Where in the world the rays through pixels `[N, 2]` of a photo end; centres of pixels are at + 0.5."""
        x, y = ((pixels.float() - 0.5 - self.camera[2:]) / self.camera[:2]).unbind(1)
        pose = self.scene.poses[photo].float()
        rays = torch.stack([x, y, torch.ones_like(x)], 1) @ pose[:3, :3].mT
        depth, _ = nearest_hit(self.boxes, pose[:3, 3], rays)
        return (pose[:3, 3] + depth[:, None] * rays).double()

    def pixels(self, photo: int, points: Tensor) -> Tensor:
        """Where a photo sees points `[N, 3]`; centres of pixels are at + 0.5."""
        pose = self.scene.poses[photo]
        seen = (points - pose[:3, 3]) @ pose[:3, :3]
        return self.camera[:2].double() * seen[:, :2] / seen[:, 2:] + self.camera[2:].double() + 0.5


def exact_walk(folder: Path, orientations: tuple[int, ...] = (1,) * FRAMES) -> Exact:
    """Render photos into a folder, as their EXIF orientation stores them, and their frames' exact depth."""
    drawn = make_scenes(1, FRAMES, Draws(2), families="revisit", rooms=2, difficulty=0.2, size=(PHOTO[1], PHOTO[0]))
    poses = drawn.poses[0].double()
    left, _, right = torch.linalg.svd(poses[:, :3, :3])
    poses[:, :3, :3] = left @ right
    focal = 0.7 * PHOTO[0]
    camera = torch.tensor([focal, focal, (PHOTO[0] - 1) / 2, (PHOTO[1] - 1) / 2])
    photos, _ = render(drawn.boxes, poses[None].float(), camera[None], (PHOTO[1], PHOTO[0]))
    # The frame's camera, in the convention of the renderer.
    frame_camera = torch.cat([camera[:2] / SCALE, (camera[2:] + 0.5 - torch.tensor([LEFT, TOP])) / SCALE - 0.5])
    images, depth = render(drawn.boxes, poses[None].float(), frame_camera[None], (FRAME[1], FRAME[0]))
    folder.mkdir(parents=True)
    files = [folder / f"{i:02d}.png" for i in range(FRAMES)]
    stored = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for file, photo, orientation in zip(files, photos[0], orientations, strict=True):
        image = Image.fromarray((255 * photo).round().byte().permute(1, 2, 0).numpy())
        turn = stored[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        (image if turn is None else image.transpose(turn)).save(file, exif=exif)
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(FRAMES, 1, 1)
    intrinsics[:, [0, 1], [0, 1]] = frame_camera[:2].double()
    intrinsics[:, :2, 2] = frame_camera[2:].double() + 0.5
    parent, names = relative_names(files)
    scene = Reconstruction(
        folder=parent,
        names=names,
        sizes=(PHOTO,) * FRAMES,
        orientations=orientations,
        times=None,
        poses=poses,
        intrinsics=intrinsics,
        depth=depth[0],
        confidence=torch.ones_like(depth[0]),
        colours=(255 * images[0]).round().byte().permute(0, 2, 3, 1).contiguous(),
        graph=CovisibilityGraph.all_visible(FRAMES),
        facts={},
        request={},
    )
    return Exact(scene, drawn.boxes[0], camera)


def ply_vertices(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Points `[N, 3]` and colours `[N, 3]` of a binary PLY, by its header."""
    header, _, body = content.partition(b"end_header\n")
    lines = [line.split() for line in header.decode().splitlines()]
    types = {"float": "<f4", "uchar": "u1"}
    vertex = np.dtype([(line[2], types[line[1]]) for line in lines if line[0] == "property"])
    [count] = [int(line[2]) for line in lines if line[:2] == ["element", "vertex"]]
    held = np.frombuffer(body, vertex)
    assert len(held) == count
    return np.stack([held[axis] for axis in "xyz"], 1), np.stack([held[c] for c in ("red", "green", "blue")], 1)
