"""How accurate one run of a model on one scene is: the metrics of `accuracy`, by name."""

from __future__ import annotations

import math

from torch import Tensor

from .accuracy import align, depth_errors, pair_errors, pose_auc, relative_pose_errors, trajectory_error

AUC_THRESHOLDS = (3, 5, 15, 30)


def scene_scores(
    poses: Tensor, true_poses: Tensor, depth: Tensor | None = None, true_depth: Tensor | None = None
) -> dict[str, float]:
    """Return `pose_scores`, with true depth also `depth_scores`, and scale_ratio, depth_scale / camera_scale.

    The ratio is 1 where depth and cameras are in one unit.

    Args:
        poses: Camera to world, `[S, 4, 4]`.
        true_poses: Likewise.
        depth: `[S, H, W]`.
        true_depth: Likewise, 0 where it is not known.
    """
    scores = pose_scores(poses, true_poses)
    if depth is not None and true_depth is not None:
        scores |= depth_scores(depth, true_depth)
    if "depth_scale" in scores and scores.get("camera_scale"):
        scores["scale_ratio"] = scores["depth_scale"] / scores["camera_scale"]
    return scores


def pose_scores(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Return the metrics of poses; where no camera moves, those of rotation only.

    ATE and RPE are in the unit of the true poses, and not a number where a predicted pose is not finite. Such a pose
    counts as an infinite error in every AUC.

    Args:
        predicted: Camera to world, `[S, 4, 4]`, S of 2 or more; in the order in which RPE is meant.
        true: Likewise.

    Returns:
        rotation_auc30, rotation_median and rpe_rotation (degrees); where cameras move auc3, auc5, auc15, auc30,
        translation_median (degrees), ate, rpe_translation, and camera_scale, by what `align` multiplies the prediction.
    """
    errors, centres = pair_errors(predicted, true), true[:, :3, 3]
    ate = rpe_translation = rpe_rotation = camera_scale = math.nan
    if predicted.isfinite().all():
        ate = trajectory_error(predicted, true)
        rpe_translation, rpe_rotation = relative_pose_errors(predicted, true)
        camera_scale = align(predicted[:, :3, 3], centres).scale
    scores = {
        "rotation_auc30": pose_auc(errors.rotation, 30),
        "rotation_median": float(errors.rotation.median()),
        "rpe_rotation": rpe_rotation,
    }
    if (centres == centres[0]).all():
        return scores
    auc = {f"auc{threshold}": pose_auc(errors.pose, threshold) for threshold in AUC_THRESHOLDS}
    return (
        auc
        | scores
        | {
            "translation_median": float(errors.translation.median()),
            "ate": ate,
            "rpe_translation": rpe_translation,
            "camera_scale": camera_scale,
        }
    )


def depth_scores(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Return absrel, delta125 and depth_scale after one scale a scene (the median ratio); nothing without true depth.

    Args:
        predicted: `[S, H, W]`.
        true: Likewise, 0 where it is not known.
    """
    if not (true > 0).any():
        return {}
    errors = depth_errors(predicted, true)
    return {"absrel": errors.absrel, "delta125": errors.delta, "depth_scale": errors.scale}
