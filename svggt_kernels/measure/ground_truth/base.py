"""What a format of ground truth states, and checks that all formats share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...rigid_motions import motion, rotation_of
from ...sources.poses import HOMOGENEOUS_TOLERANCE, ROTATION_TOLERANCE

LARGEST_EXCESS = 0.01  # of a quaternion's length; files round to four digits

DepthReader = Callable[[], Tensor]
"""Reads a depth map `[h, w]`, float32 in the unit of the poses, 0 where depth is not known."""


@dataclass(frozen=True, eq=False)
class KnownPhoto:
    """A photo whose camera is known.

    Attributes:
        name: What the truth calls it: a path, or the end of one, with or without suffix.
        pose: Camera to world `[4, 4]`, float64, axes as in OpenCV.
        depth: Reads its depth map, if there is one.
    """

    name: str
    pose: Tensor
    depth: DepthReader | None = None


class Reading(NamedTuple):
    """What was read.

    Attributes:
        label: What it was read from and how photos are told, in words.
        photos: Every photo that the truth knows.
    """

    label: str
    photos: list[KnownPhoto]


@dataclass(frozen=True)
class Format:
    """One kind of ground truth.

    Attributes:
        label: What to call it, and what it looks like.
        recognises: Whether a path is such a truth, by its name and what lies in it.
        read: Reads it, for these photos; raises ValueError where it is not as it must be.
        beside: Where a data set of this layout keeps it, from the folder of the photos; None if that is not fixed.
    """

    label: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, Sequence[Path]], Reading]
    beside: Callable[[Path], Path] | None = None


def rigid(where: str, rows: object) -> Tensor:
    """Return a pose that a file gives as rows of numbers, `[3, 4]` or `[4, 4]`, as `[4, 4]` float64.

    Args:
        where: What messages call it.
        rows: The numbers.

    Raises:
        ValueError: If it is no rigid motion.
    """
    try:
        pose = torch.as_tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} must be a matrix [4, 4] or [3, 4] of numbers ({error})") from error
    if pose.shape not in ((4, 4), (3, 4)):
        raise ValueError(f"{where} must be a matrix [4, 4] or [3, 4], got {list(pose.shape)}")
    rotation, bottom = pose[:3, :3], pose[3:]
    skewed = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().amax() > ROTATION_TOLERANCE
    changed = ((bottom - bottom.new_tensor([0, 0, 0, 1])).abs() > HOMOGENEOUS_TOLERANCE).any()
    if not pose.isfinite().all() or skewed or changed or torch.linalg.det(rotation) < 0:
        raise ValueError(
            f"{where} must be a rigid motion, finite and without scale or mirror, got {pose.tolist()}; correct it or "
            "take it out"
        )
    return motion(rotation, pose[:3, 3])


def rigid_of_quaternion(where: str, quaternion: Sequence[float], translation: Sequence[float]) -> Tensor:
    """Return the motion `[4, 4]` float64 that a file gives as a quaternion (x, y, z, w) and a translation.

    Args:
        where: What messages call it.
        quaternion: Of about the length 1.
        translation: Of the motion.

    Raises:
        ValueError: If the quaternion has another length, or a number is not finite.
    """
    turn, shift = (torch.tensor(numbers, dtype=torch.float64) for numbers in (quaternion, translation))
    length = float(turn.norm())
    if not abs(length - 1) < LARGEST_EXCESS or not shift.isfinite().all():
        raise ValueError(
            f"{where} must have a quaternion of length 1 and a finite translation, got {list(quaternion)} of length "
            f"{length:.3g} and {list(translation)}; correct it or take it out"
        )
    return motion(rotation_of(turn), shift)
