"""A core of frames that every frame sees: which frames, and the edges that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .arguments import descriptors_tensor, first_true, frames_tensor, integer
from .neighbours import FrameSimilarity
from .pair_scores import PairScores

CHUNK = 2048
Choice = Literal["covering", "farthest"]


def choose_core(
    compared: Tensor | np.ndarray | PairScores,  # [S, C] floating point
    size: int,
    *,
    choice: Choice = "covering",
    first: int = 0,
) -> Tensor:
    """Choose frames that represent all, one after another.

    Args:
        compared: A descriptor of each frame, `[S, C]` floating point, none of them zero; their similarity is the
            cosine. Or the similarity of each pair of frames.
        size: Frames to choose; S or more choose all.
        choice: "covering": the frame that most raises the sum over all frames of the similarity to the most similar
            chosen one (facility location, greedily: Nemhauser et al. 1978), which takes no frame that nobody resembles;
            "farthest": the frame least similar to all that are chosen (farthest-point sampling, Gonzalez 1985).
        first: The frame chosen first.

    Returns:
        `[min(size, S)]` int64 in the order of choice, on the device of what is compared.

    Raises:
        TypeError: If the descriptors are not floating point, or a count is not an integer.
        ValueError: If they are not `[S, C]`, hold NaN, infinity or a zero row, or an argument is out of range.
    """
    if choice not in get_args(Choice):
        raise ValueError(f'choice must be "covering" or "farthest", got {choice!r}')
    scores, device = _pair_scores(compared)
    frames = scores.num_frames
    size, first = min(integer("size", size, 1), frames), integer("first", first, 0, frames - 1)
    chosen = scores.farthest_points if choice == "farthest" else scores.covering_points
    return chosen(first, size).to(device)


def nearest_frames(
    compared: Tensor | np.ndarray | PairScores,  # [S, C] floating point
    count: int,
) -> Tensor:
    """Return the frames most similar to each frame, the most similar first, `[S, min(count, S - 1)]` int64.

    Raises:
        TypeError: If the descriptors are not floating point.
        ValueError: If they are not `[S, C]`, or hold NaN, infinity or a zero row.
    """
    scores, device = _pair_scores(compared)
    return scores.nearest(min(integer("count", count, 0), scores.num_frames - 1)).to(device)


def _pair_scores(compared: Tensor | np.ndarray | PairScores) -> tuple[PairScores, torch.device]:
    """Return how alike frames are, and the device of what is compared."""
    if isinstance(compared, PairScores):
        return compared, compared.device
    descriptors = descriptors_tensor(compared)
    return FrameSimilarity.from_descriptors(descriptors, CHUNK), descriptors.device


def spread_evenly(num_frames: int, size: int) -> Tensor:
    """Return `min(size, num_frames)` frames at equal distances, the first and the last among them, rising int64."""
    size = min(integer("size", size, 1), integer("num_frames", num_frames, 1))
    return torch.linspace(0, num_frames - 1, size, dtype=torch.float64, device="cpu").round().long()


def checked_core(
    num_frames: int,
    frames: Sequence[int] | Tensor | np.ndarray,  # [K]
    name: str = "the frames of a core",
) -> Tensor:
    """Return the frames of a core, or those that messages call `name`, as `[K]` int64, a copy.

    Raises:
        TypeError: If they are not integers.
        ValueError: If there is none, one is out of range, or one is given twice.
    """
    core = frames_tensor(name, frames, 1, num_frames)
    rising = core.sort().values
    if (at := first_true(rising[1:] == rising[:-1])) is not None:
        raise ValueError(f"{name} must differ, but {int(rising[at])} is given twice")
    return core


def core_edges(
    num_frames: int,
    core: Tensor,  # [K]
    nearest: Tensor | None,  # [S, m]
) -> Tensor:
    """Return the edges `[E, 2]` int64 of a closed core, repeats among them.

    Args:
        num_frames: Frames S.
        core: Its frames.
        nearest: Further frames that each frame outside the core sees.
    """
    everyone = torch.arange(num_frames, device=core.device)
    edges = [torch.cartesian_prod(everyone, core), torch.stack([everyone, everyone], dim=1)]
    if nearest is not None:
        outside = everyone[~torch.isin(everyone, core)]
        seen = nearest.to(core)[outside]
        edges.append(torch.stack([outside.repeat_interleave(seen.shape[1]), seen.flatten()], dim=1))
    return torch.cat(edges)
