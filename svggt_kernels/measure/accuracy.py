"""How far predicted cameras, depth and points are from the truth, by the definitions of the field.

Poses are camera to world, `[S, 4, 4]`: rotation and centre of each camera. Everything is computed in float64.

| metric | definition | source |
|---|---|---|
| pose AUC@k | all pairs of frames; the larger angle of relative rotation and translation | VGGT's evaluation on CO3D |
| ATE | camera centres after the best similarity (`align`), root mean square, metres | Umeyama 1991; Sturm et al. 2012 |
| RPE | motion from each frame to the next, after that scale, root mean square | Sturm et al. 2012 |
| AbsRel, delta | depth after one scale a scene | Eigen et al. 2014 |
| accuracy, completeness | distance to the nearest point of the other set | Aanaes et al. 2016 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "DepthErrors",
    "Interval",
    "PairErrors",
    "PointErrors",
    "Similarity",
    "align",
    "depth_errors",
    "mean_interval",
    "pair_errors",
    "point_errors",
    "pose_auc",
    "ratio_interval",
    "relative_pose_errors",
    "rotation_angle",
    "trajectory_error",
]

DISTANCES_AT_ONCE = {"cpu": 2**20, "cuda": 2**27}
"""So that a CPU's cache holds them, and a GPU is busy; what is not named is as a CPU."""


class PairErrors(NamedTuple):
    """Errors of all pairs of frames i < j, in degrees, `[S (S - 1) / 2]` each.

    Attributes:
        rotation: Angle between the predicted and the true relative rotation.
        translation: Angle between the predicted and the true direction from one camera to the other.
    """

    rotation: Tensor
    translation: Tensor

    @property
    def pose(self) -> Tensor:
        """The larger of the two."""
        return torch.maximum(self.rotation, self.translation)


def pair_errors(predicted: Tensor, true: Tensor, *, signed: bool = False) -> PairErrors:
    """Compare the relative poses of all pairs of frames; scale and coordinate system play no role.

    As in VGGT's evaluation the direction of a translation is compared without its sign, so its error is at most 90
    degrees: arccos |cos|. A translation of length 0 has no direction; its cosine counts as 0, that is 90 degrees.

    Args:
        predicted: Poses `[S, 4, 4]`, camera to world.
        true: Likewise.
        signed: Compare directions with their sign instead; errors are then at most 180 degrees.

    Raises:
        ValueError: If the shapes differ, or there are fewer than two frames.
    """
    predicted, true = _poses("predicted", predicted), _poses("true", true)
    if predicted.shape != true.shape or len(predicted) < 2:
        raise ValueError(
            "predicted and true poses must be of the same frames, two or more, "
            f"got {list(predicted.shape)} and {list(true.shape)}"
        )
    i, j = torch.triu_indices(len(true), len(true), 1, device=true.device)
    rotation, translation = _relative(predicted, i, j)
    true_rotation, true_translation = _relative(true, i, j)
    difference = rotation.mT @ true_rotation
    cosine = (translation * true_translation).sum(-1)
    lengths = translation.norm(dim=-1) * true_translation.norm(dim=-1)
    cosine = torch.where(lengths > 0, cosine / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 0.0)
    if not signed:
        cosine = cosine.abs()
    return PairErrors(rotation_angle(difference), torch.rad2deg(cosine.clamp(-1, 1).acos()))


def pose_auc(errors: Tensor, threshold: int) -> float:
    """Return the area under the accuracy curve of errors in degrees, up to a threshold, between 0 and 1.

    It is the mean over k = 1 .. threshold of the share of errors below k degrees: VGGT's histogram with bins of one
    degree, whose cumulative sums are averaged.

    Args:
        errors: Errors in degrees, any shape; not a number counts as infinite.
        threshold: In degrees, 1 or more.

    Raises:
        ValueError: If there are no errors or the threshold is not positive.
    """
    if errors.numel() == 0 or threshold < 1:
        raise ValueError(f"an AUC needs errors and a threshold of 1 or more, got {errors.numel()} and {threshold}")
    steps = torch.arange(1, threshold + 1, device=errors.device)
    return float((errors.flatten()[:, None] < steps).double().mean())


@dataclass(frozen=True)
class Similarity:
    """A similarity of space: x becomes `scale * rotation @ x + translation`.

    Attributes:
        scale: Positive factor.
        rotation: `[3, 3]`.
        translation: `[3]`.
    """

    scale: float
    rotation: Tensor
    translation: Tensor

    def points(self, points: Tensor) -> Tensor:
        """Return points `[..., 3]` moved."""
        return self.scale * points.to(self.rotation) @ self.rotation.mT + self.translation

    def poses(self, poses: Tensor) -> Tensor:
        """Return poses `[..., 4, 4]`, camera to world, of cameras in the moved world."""
        moved = poses.to(self.rotation).clone()
        moved[..., :3, :3] = self.rotation @ moved[..., :3, :3]
        moved[..., :3, 3] = self.points(moved[..., :3, 3])
        return moved


def align(source: Tensor, target: Tensor) -> Similarity:
    """Return the similarity that moves points onto others with the least squared error.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns" (PAMI 1991), equations
    34 to 43. Points that are all alike get the scale 1.

    Args:
        source: `[N, 3]`.
        target: The points onto which they shall move, `[N, 3]`.

    Raises:
        ValueError: If the shapes differ, or there are no points.
    """
    if source.shape != target.shape or source.dim() != 2 or source.shape[1] != 3 or len(source) == 0:
        raise ValueError(f"points must be [N, 3] and as many, got {list(source.shape)} and {list(target.shape)}")
    x, y = source.double(), target.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    # What is left are a few numbers, which a CPU decomposes sooner than a GPU begins.
    covariance = ((y - mean_y).mT @ (x - mean_x) / len(x)).cpu()
    left, singular, right = torch.linalg.svd(covariance)
    sign = torch.ones_like(singular)
    sign[2] = torch.linalg.det(left).sign() * torch.linalg.det(right).sign()
    rotation = (left @ torch.diag(sign) @ right).to(x.device)
    variance = float((x - mean_x).square().sum(1).mean())
    scale = float((singular * sign).sum()) / variance if variance > 0 else 1.0
    return Similarity(scale, rotation, mean_y - scale * rotation @ mean_x)


def trajectory_error(predicted: Tensor, true: Tensor) -> float:
    """Return the absolute trajectory error: the root mean square distance of camera centres after `align`, in metres.

    Args:
        predicted: Poses `[S, 4, 4]`, camera to world.
        true: Likewise, in metres.

    Raises:
        ValueError: If the shapes differ.
    """
    predicted, true = _poses("predicted", predicted), _poses("true", true)
    moved = align(predicted[:, :3, 3], true[:, :3, 3]).points(predicted[:, :3, 3])
    return float((moved - true[:, :3, 3]).square().sum(-1).mean().sqrt())


def relative_pose_errors(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """Return the relative pose error of consecutive frames: of the translation in metres, of the rotation in degrees.

    Root mean squares over all frames but the last, after the similarity that aligns the camera centres.

    Args:
        predicted: Poses `[S, 4, 4]`, camera to world, S of 2 or more.
        true: Likewise, in metres.

    Raises:
        ValueError: If the shapes differ, or there are fewer than two frames.
    """
    predicted, true = _poses("predicted", predicted), _poses("true", true)
    if len(true) < 2:
        raise ValueError(f"a relative pose error needs two frames or more, got {len(true)}")
    predicted = align(predicted[:, :3, 3], true[:, :3, 3]).poses(predicted)
    i = torch.arange(len(true) - 1, device=true.device)
    rotation, translation = _relative(predicted, i, i + 1)
    true_rotation, true_translation = _relative(true, i, i + 1)
    # The motion that is left when the true one is undone.
    distance = (translation - true_translation).norm(dim=-1)
    angle = rotation_angle(true_rotation.mT @ rotation)
    return float(distance.square().mean().sqrt()), float(angle.square().mean().sqrt())


class DepthErrors(NamedTuple):
    """Errors of depth after alignment.

    Attributes:
        absrel: Mean of |predicted - true| / true.
        delta: Share of pixels with max(predicted / true, true / predicted) < 1.25.
        scale: By what the prediction was multiplied.
    """

    absrel: float
    delta: float
    scale: float


def depth_errors(predicted: Tensor, true: Tensor, *, alignment: Literal["median", "none"] = "median") -> DepthErrors:
    """Compare depth maps of one scene; pixels without true depth (0, infinite or not a number) do not count.

    Args:
        predicted: `[S, H, W]`, positive. What is not finite or not positive has an infinite error.
        true: `[S, H, W]`, metres.
        alignment: "median": one scale for the scene, the median of true / predicted; "none": as it is.

    Raises:
        ValueError: If the shapes differ, no pixel has a true depth, or the alignment is another word.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"depth maps must be of one shape, got {list(predicted.shape)} and {list(true.shape)}")
    if alignment not in ("median", "none"):
        raise ValueError(f'alignment must be "median" or "none", got {alignment!r}')
    known = (true > 0) & true.isfinite()
    if not known.any():
        raise ValueError("no pixel has a true depth above 0")
    truth, guess = true[known].double(), predicted[known].double()
    sound = (guess > 0) & guess.isfinite()
    ratio = truth[sound] / guess[sound]
    scale = float(_median(ratio)) if alignment == "median" and len(ratio) else 1.0
    relative = torch.where(sound, scale * guess / truth, torch.inf)
    return DepthErrors(
        absrel=float((relative - 1).abs().mean()),
        delta=float((torch.maximum(relative, 1 / relative) < 1.25).double().mean()),
        scale=scale,
    )


class PointErrors(NamedTuple):
    """Distances between two sets of points, in the unit of the points.

    Attributes:
        accuracy: From each predicted point to the nearest true one, mean.
        completeness: From each true point to the nearest predicted one, mean.
        accuracy_median: The median of the same distances, which a few points far off do not move.
        completeness_median: Likewise.
    """

    accuracy: float
    completeness: float
    accuracy_median: float
    completeness_median: float


def point_errors(predicted: Tensor, true: Tensor) -> PointErrors:
    """Compare two sets of points that are in one coordinate system.

    Args:
        predicted: `[N, 3]`.
        true: `[M, 3]`.

    Raises:
        ValueError: If either is empty or of another shape.
    """
    for name, points in (("predicted", predicted), ("true", true)):
        if points.dim() != 2 or points.shape[1] != 3 or len(points) == 0:
            raise ValueError(f"{name} points must be [N, 3], N of 1 or more, got {list(points.shape)}")
    predicted, true = predicted.double(), true.double()
    accuracy, completeness = _nearest(predicted, true), _nearest(true, predicted)
    return PointErrors(
        *(float(statistic(x)) for statistic in (torch.mean, torch.median) for x in (accuracy, completeness))
    )


class Interval(NamedTuple):
    """A mean over scenes and its 95 % confidence interval.

    Attributes:
        mean: Over the scenes.
        low: Lower end.
        high: Upper end.
        scenes: How many.
    """

    mean: float
    low: float
    high: float
    scenes: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(
    values: Sequence[float], *, resamples: int = 10_000, statistic: Callable[..., np.ndarray] = np.mean
) -> Interval:
    """Return a mean over scenes with its 95 % confidence interval, by the bootstrap over scenes.

    Efron, "Bootstrap methods: another look at the jackknife" (1979), percentile interval, from a fixed seed. To compare
    two layouts give the differences scene by scene: intervals of paired differences are far narrower.

    Args:
        values: One of each scene.
        resamples: Samples that are drawn.
        statistic: The mean, or another statistic that takes `axis`.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    sample = _sample(values)
    drawn = _resampled(len(sample), resamples)
    low, high = np.quantile(statistic(sample[drawn], axis=1), (0.025, 0.975))
    return Interval(float(statistic(sample, axis=0)), float(low), float(high), len(sample))


def ratio_interval(values: Sequence[float], others: Sequence[float], *, resamples: int = 10_000) -> Interval:
    """Return the ratio of two means over the same scenes with its 95 % confidence interval, by the same bootstrap.

    Both means are of the same resampled scenes, so that what makes a scene hard cancels.

    Args:
        values: One of each scene.
        others: Of the same scenes, in the same order.
        resamples: Samples that are drawn.

    Raises:
        ValueError: If there is no value or one is not finite, there are not as many of both, or a mean of the others is
            not positive.
    """
    sample, base = _sample(values), _sample(others)
    if len(sample) != len(base) or base.mean() <= 0:
        raise ValueError(
            f"a ratio needs two values of each scene, the mean of the second positive, got {len(sample)} and "
            f"{len(base)} values and the mean {base.mean():g}"
        )
    drawn = _resampled(len(sample), resamples)
    means, bases = sample[drawn].mean(axis=1), base[drawn].mean(axis=1)
    low, high = np.quantile(means[bases > 0] / bases[bases > 0], (0.025, 0.975))
    return Interval(float(sample.mean() / base.mean()), float(low), float(high), len(sample))


def _sample(values: Sequence[float]) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) == 0 or not np.isfinite(sample).all():
        raise ValueError(f"an interval needs finite values, one a scene, got {list(values)[:8]}")
    return sample


def _resampled(scenes: int, resamples: int) -> np.ndarray:
    """Return which scenes each sample of the bootstrap holds, `[resamples, scenes]`."""
    return np.random.default_rng(0).integers(0, scenes, (resamples, scenes))


def _poses(name: str, poses: Tensor) -> Tensor:
    if poses.dim() != 3 or poses.shape[1:] != (4, 4):
        raise ValueError(f"{name} poses must be [S, 4, 4], camera to world, got {list(poses.shape)}")
    return poses.double()


def _relative(poses: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotation and translation of camera j in the axes of camera i."""
    rotation, centre = poses[:, :3, :3], poses[:, :3, 3]
    inverse = rotation[i].mT
    return inverse @ rotation[j], (inverse @ (centre[j] - centre[i])[..., None])[..., 0]


def rotation_angle(rotation: Tensor) -> Tensor:
    """Return the angles of rotations `[..., 3, 3]` in degrees; by the arc tangent, exact near 0 and 180."""
    skew = rotation - rotation.mT
    sine = torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1).norm(dim=-1)
    cosine = rotation.diagonal(dim1=-2, dim2=-1).sum(-1) - 1
    return torch.rad2deg(torch.atan2(sine, cosine))


def _median(values: Tensor) -> Tensor:
    """Return the lower median of `[N]` finite values; on CUDA, where one multiprocessor searches it, by sorting."""
    return values.sort().values[(len(values) - 1) // 2] if values.is_cuda else values.median()


def _nearest(points: Tensor, others: Tensor) -> Tensor:
    """Return the distance from each point to the nearest of the others, `[N]` float64.

    |x - y|^2 = |x|^2 - 2 x y + |y|^2 as one product, some rows at a time.
    """
    middle = others.mean(0)
    points, others = points - middle, others - middle
    rows = torch.cat([points.square().sum(1, keepdim=True), -2 * points, torch.ones_like(points[:, :1])], 1)
    columns = torch.cat([torch.ones_like(others[:, :1]), others, others.square().sum(1, keepdim=True)], 1).mT
    at_once = DISTANCES_AT_ONCE.get(points.device.type, DISTANCES_AT_ONCE["cpu"])
    block = max(64, at_once // len(others))
    return torch.cat([(part @ columns).amin(1) for part in rows.split(block)]).clamp(min=0).sqrt()
