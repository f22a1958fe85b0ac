"""Losses of cameras, points, depth and matching.

Each camera is compared by itself and in pairs, as accuracy is measured in pairs. A translation of a pair counts the
less the longer it is, as its direction is what matters. Points and depth have a confidence: an error counts as much as
the model trusts itself, and trust is rewarded by its logarithm (Kendall and Gal, arXiv 1703.04977).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svggt_kernels.demo.model.heads import cameras
from svggt_kernels.demo.scenes import Draws
from svggt_kernels.demo.scenes.draws import constant

from .network import Matched, Prediction
from .truth import Truth

ITERATION_DECAY = 0.6
READINGS = (0.3, 0.2)
POINTS = (0.2, 0.5)
"""Weights of what is read from the middle and from the last layer."""

DEPTH = 0.3
QUERIES_PER_FRAME = 8


def total_loss(
    prediction: Prediction, truth: Truth, match_weight: float, draws: Draws
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and its parts by name for the log.

    Args:
        prediction: Of the network.
        truth: What it should be.
        match_weight: Weight of the matching loss; 0 leaves it out.
        draws: Random numbers, to draw the queries that are matched.
    """
    iterations = len(prediction.estimates)
    decay = constant(tuple(ITERATION_DECAY**k for k in reversed(range(iterations))), truth.centre.device)
    parts = {name: loss[-1] for name, loss in camera_losses(prediction.estimates, truth).items()}
    total = (_posed(prediction.estimates, truth) * decay).sum() / decay.sum()
    readings, points = _posed(prediction.readings, truth), point_losses(prediction, truth)
    parts["points"] = points[-1]
    for layer, (reading, point) in enumerate(zip(READINGS, POINTS, strict=True)):
        total = total + reading * readings[layer] + point * points[layer]
    depth, parts["depth_error"] = depth_loss(prediction.depth.log(), prediction.depth_confidence, truth.log_depth)
    parts["depth"] = depth
    total = total + DEPTH * depth
    if match_weight > 0:
        parts["match"], parts["match_hit"] = match_loss(prediction.matched, truth, draws)
        total = total + match_weight * parts["match"]
    return total, {name: part.detach() for name, part in parts.items()}


def _posed(estimates: Tensor, truth: Truth) -> Tensor:
    """Return one loss for each of several estimates of the cameras `[T, B, S, 11]`, `[T]`."""
    losses = camera_losses(estimates, truth)
    single = losses["rotation"] + losses["centre"] + 0.5 * losses["view"]
    return single + losses["pair_rotation"] + 0.5 * losses["pair_translation"]


def camera_losses(estimates: Tensor, truth: Truth) -> dict[str, Tensor]:
    """Return the losses of several estimates of the cameras `[T, B, S, 11]` by name, `[T]` each.

    Frames without connection to frame 0 do not count. Pairs that share no view count less than those that do.
    """
    rotation, centre, half_view = cameras(estimates)
    known = truth.connected / truth.connected.sum().clamp(min=1)
    pairs = truth.connected[:, :, None] * truth.connected[:, None] * (0.3 + 0.7 * truth.covisible)
    pairs = pairs * (1 - torch.eye(pairs.shape[1], device=pairs.device))
    pairs = pairs / pairs.sum().clamp(min=1)
    turn, way = _relative(rotation, centre)
    true_turn, true_way = _relative(truth.rotation, truth.centre)
    near = true_way.norm(dim=-1) + 0.1
    return {
        "rotation": (known * _length((rotation - truth.rotation).flatten(-2))).sum((-2, -1)),
        "centre": (known * _length(centre - truth.centre)).sum((-2, -1)),
        "view": (half_view / truth.half_view).log().abs().mean((-3, -2, -1)),
        "pair_rotation": (pairs * _length((turn - true_turn).flatten(-2))).sum((-3, -2, -1)),
        "pair_translation": (pairs * _length(way - true_way) / near).sum((-3, -2, -1)),
    }


def point_losses(prediction: Prediction, truth: Truth) -> Tensor:
    """Return the losses of the points read from each layer; the farther a point, the less its error counts."""
    error = _length(prediction.points - truth.points) / (1 + truth.points.norm(dim=-1))
    trust = prediction.point_confidence
    known = truth.connected[:, :, None].expand(error.shape[1:])
    loss = known * (trust.exp() * error - 0.3 * trust)
    return loss.sum((1, 2, 3)) / known.sum().clamp(min=1)


def depth_loss(log_depth: Tensor, confidence: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of depth and of its gradients, and the mean error of its logarithm; all `[B, S, H, W]`."""
    difference = log_depth - true
    error = difference.abs()
    across = confidence[..., 1:] * difference.diff(dim=-1).abs()
    down = confidence[..., 1:, :] * difference.diff(dim=-2).abs()
    loss = (confidence * error).mean() + 0.5 * (across.mean() + down.mean()) - 0.15 * confidence.log().mean()
    return loss, error.mean()


def match_loss(matched: Sequence[Matched], truth: Truth, draws: Draws) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of attention with where a patch's point truly lies, and how often the best is right.

    For a few patches of each frame, attention of one head over the patches of all other frames, against each patch
    that shows the same point.
    """
    batch, frames, patches, _ = truth.seen.shape
    device = truth.seen.device
    shape = (batch, QUERIES_PER_FRAME * frames)
    frame, patch = draws.integers(0, frames, *shape), draws.integers(0, patches, *shape)
    scene = torch.arange(batch, device=device)[:, None]
    seen = truth.seen[scene, frame, patch] & (torch.arange(frames, device=device) != frame[..., None])  # [B, Q, S]
    target = truth.patch[scene, frame, patch] + patches * torch.arange(frames, device=device)
    own = torch.arange(frames, device=device).repeat_interleave(patches) == frame[..., None]  # [B, Q, S N]
    found_in_any = seen.any(-1)
    loss = hits = torch.zeros((), device=device)
    for queries, keys in matched:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            scores = queries[scene, frame, patch] @ keys.flatten(1, 2).mT
        scores = (scores.float() * queries.shape[-1] ** -0.5).masked_fill(own, -1e4)
        likely = scores.log_softmax(-1).gather(-1, target)
        loss = loss - (likely * seen).sum() / seen.sum().clamp(min=1)
        right = ((scores.argmax(-1, keepdim=True) == target) & seen).any(-1) & found_in_any
        hits = hits + right.sum() / found_in_any.sum().clamp(min=1)
    return loss / len(matched), hits / len(matched)


def _relative(rotation: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotation `[..., S, S, 3, 3]` and centre `[..., S, S, 3]` of camera j in the axes of camera i."""
    inverse = rotation.mT[..., :, None, :, :]
    way = centre[..., None, :, :] - centre[..., :, None, :]
    return inverse @ rotation[..., None, :, :, :], (inverse @ way[..., None])[..., 0]


def _length(x: Tensor) -> Tensor:
    """Return the length along the last axis, smooth at 0."""
    return (x.square().sum(-1) + 1e-6).sqrt()
