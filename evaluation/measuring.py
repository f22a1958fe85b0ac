"""What a model makes of rendered scenes, and how far that is from the truth.

Training and the curve measure by this: `SceneSet.draw` -> `predict` -> `metrics_of`. The metrics are those of
`svggt_kernels.measure.accuracy`; docs/accuracy.md defines them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svggt_kernels.demo.model.poses import decode_poses
from svggt_kernels.demo.scenes import HELD_OUT, Draws, Scenes, make_scenes
from svggt_kernels.measure.accuracy import align, point_errors
from svggt_kernels.measure.scores import scene_scores

DIFFICULTY = 0.7
ROOMS = {"walk": 8, "room": 1, "photos": 4, "revisit": 8, "forward": 8, "rotation": 2, HELD_OUT: 7}
"""Rooms of a flat where none are named."""

POINTS = 10_000
"""About how many points of a scene are compared."""


@dataclass(frozen=True)
class SceneSet:
    """Scenes of one kind.

    Attributes:
        family: Their camera paths.
        rooms: Rooms of their flats.
        frames: Frames of each.
    """

    family: str
    rooms: int
    frames: int

    @property
    def name(self) -> str:
        """What results call it."""
        return f"{self.family}-{self.rooms}r-{self.frames}f"

    def draw(self, scenes: int, draws: Draws, size: tuple[int, int]) -> Scenes:
        """Draw and render scenes of this set, images of `size` pixels (height, width)."""
        return make_scenes(
            scenes,
            self.frames,
            draws,
            families=self.family,
            rooms=self.rooms,
            difficulty=DIFFICULTY,
            size=size,
        )


@dataclass(frozen=True)
class Views:
    """Cameras and depth of the frames of scenes, true or predicted; a prediction is in a unit of its own.

    Attributes:
        poses: Camera to world, `[..., S, 4, 4]`.
        intrinsics: fx, fy, cx, cy in pixels, `[..., S, 4]`.
        depth: Along the optical axis, 0 where it is not known, `[..., S, H, W]`.
    """

    poses: Tensor
    intrinsics: Tensor
    depth: Tensor

    @classmethod
    def true(cls, scenes: Scenes) -> Views:
        """Return the truth of rendered scenes."""
        frames = scenes.poses.shape[1]
        return cls(scenes.poses, scenes.intrinsics[:, None].expand(-1, frames, -1), scenes.depth)

    @property
    def is_finite(self) -> bool:
        """Whether no number is infinite or NaN."""
        parts = (self.poses, self.intrinsics, self.depth)
        return bool(torch.stack([part.isfinite().all() for part in parts]).all())

    def __getitem__(self, scene: int) -> Views:
        return Views(self.poses[scene], self.intrinsics[scene], self.depth[scene])

    def points(self, step: int) -> Tensor:
        """Return where in the world every `step`-th pixel of every frame of one scene lies, `[S, h, w, 3]` float64."""
        depth = self.depth[:, step // 2 :: step, step // 2 :: step].double()
        poses, (fx, fy, cx, cy) = self.poses.double(), self.intrinsics.double().T[:, :, None, None]
        rows, columns = (
            torch.arange(step // 2, side, step, device=depth.device, dtype=depth.dtype) for side in self.depth.shape[1:]
        )
        x, y = (columns - cx) / fx * depth, (rows[:, None] - cy) / fy * depth
        local = torch.stack([x, y, depth], -1)
        return torch.einsum("sij,shwj->shwi", poses[:, :3, :3], local) + poses[:, None, None, :3, 3]


def precision_on(device: torch.device) -> str:
    """Return in which precision `predict` runs a model: on CUDA under autocast, as such models are used."""
    return "bfloat16 autocast" if device.type == "cuda" else "float32"


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Views:
    """Return what a model with VGGT's outputs, in eval mode, makes of images `[B, S, 3, H, W]`."""
    device = images.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        out = model(images)
    poses, intrinsics = decode_poses(out["pose_enc"], *images.shape[-2:])
    return Views(poses, intrinsics, out["depth"][..., 0])


def metrics_of(predicted: Views, scenes: Scenes) -> list[dict[str, float]]:
    """Return the metrics of each scene, see `scene_metrics`."""
    true = Views.true(scenes)
    return [scene_metrics(predicted[scene], true[scene]) for scene in range(len(scenes.poses))]


def scene_metrics(predicted: Views, true: Views) -> dict[str, float]:
    """Return the metrics of one scene by name; where no camera moves, those that need a motion are left out.

    Args:
        predicted: In any coordinate system and unit.
        true: Of the same frames, in metres.
    """
    return scene_scores(predicted.poses, true.poses, predicted.depth, true.depth) | _cloud_metrics(predicted, true)


def _cloud_metrics(predicted: Views, true: Views) -> dict[str, float]:
    """Compare the points of about `POINTS` pixels, after the similarity that best moves each onto that of its pixel."""
    step = max(1, math.ceil(math.sqrt(true.depth.numel() / POINTS)))
    known = true.depth[:, step // 2 :: step, step // 2 :: step] > 0
    points, truth = (views.points(step)[known] for views in (predicted, true))
    errors = point_errors(align(points, truth).points(points), truth)
    return {
        "accuracy": errors.accuracy,
        "accuracy_median": errors.accuracy_median,
        "completeness": errors.completeness,
        "completeness_median": errors.completeness_median,
    }
