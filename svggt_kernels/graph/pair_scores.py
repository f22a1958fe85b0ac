"""How alike any two frames are, and the frames that represent all by it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

COVER_BITS = 20
ROWS_AT_ONCE = 1024
BOUNDS_AT_ONCE = 64


class PairScores(ABC):
    """A score of each pair of frames, the same both ways, higher where they are more alike."""

    @property
    @abstractmethod
    def num_frames(self) -> int:
        """Frames S."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the scores are computed."""

    @abstractmethod
    def row(self, frame: int) -> Tensor:
        """Return the scores of one frame and all, `[S]` float64."""

    @abstractmethod
    def rounded(self) -> Tensor:
        """Return all scores as integers of up to `COVER_BITS` bits, `[S, S]` float32, so that each sum is exact."""

    @abstractmethod
    def nearest(self, count: int) -> Tensor:
        """Return the `count` frames most similar to each frame, itself excluded, `[S, count]` int64.

        The most similar comes first, of equally similar ones the smaller index.
        """

    def farthest_points(self, start: int, count: int) -> Tensor:
        """Return `start` and then, `count - 1` times, the frame least similar to all before it, `[count]` int64."""
        points = [start]
        nearest = torch.full((self.num_frames,), -torch.inf, dtype=torch.float64, device=self.device)
        while len(points) < count:
            nearest = torch.maximum(nearest, self.row(points[-1]))
            nearest[points[-1]] = torch.inf
            points.append(int(nearest.argmin()))
        return torch.tensor(points[:count], dtype=torch.int64, device=self.device)

    def covering_points(self, start: int, count: int) -> Tensor:
        """Return `start` and then, `count - 1` times, the frame that adds most to the cover, `[count]` int64.

        The cover is the sum over all frames of the score of the most similar point; of frames that add the same the
        first is taken. Memory is that of all S x S scores in float32.
        """
        scores = self.rounded()
        chosen, covered = [start], scores[:, start].clone()
        # What a frame adds only falls as points are chosen, so that what it added before is a bound (Minoux 1978). The
        # largest bounds are renewed together, until the largest of all is a renewed one.
        parts = zip(scores.split(ROWS_AT_ONCE), covered.split(ROWS_AT_ONCE), strict=True)
        bounds = sum((part - known[:, None]).clamp_(min=0).sum(dim=0, dtype=torch.float64) for part, known in parts)
        while len(chosen) < count:
            bounds[chosen] = -1
            likely = bounds.topk(min(BOUNDS_AT_ONCE, self.num_frames)).indices
            likely[-1] = bounds.argmax()  # the first of equal ones, which topk may leave out
            bounds[likely] = (scores[likely] - covered).clamp_(min=0).sum(dim=1, dtype=torch.float64)
            bounds[chosen] = -1
            best = bounds.argmax()
            if (likely == best).any():
                chosen.append(int(best))
                covered = torch.maximum(covered, scores[:, chosen[-1]])
        return torch.tensor(chosen[:count], dtype=torch.int64, device=self.device)


@dataclass(frozen=True, eq=False)
class ScoreMatrix(PairScores):
    """Scores that are there as a matrix.

    Args:
        scores: Symmetric `[S, S]` floating point, at least -1 and at most 1.

    Raises:
        ValueError: If they are not.
    """

    scores: Tensor

    def __post_init__(self) -> None:
        if self.scores.dim() != 2 or len(self.scores) != self.scores.shape[1]:
            raise ValueError(f"scores of pairs of frames must be [S, S], got {list(self.scores.shape)}")
        if not bool((self.scores.abs() <= 1).all()):
            raise ValueError("scores of pairs of frames must lie from -1 to 1, and some do not or are NaN")
        if not torch.equal(self.scores, self.scores.T):
            raise ValueError("scores of pairs of frames must be the same both ways, and are not")

    @property
    def num_frames(self) -> int:
        """Frames S."""
        return len(self.scores)

    @property
    def device(self) -> torch.device:
        """Where the scores are."""
        return self.scores.device

    def row(self, frame: int) -> Tensor:
        """See `PairScores`."""
        return self.scores[frame].to(torch.float64)

    def rounded(self) -> Tensor:
        """See `PairScores`."""
        return (self.scores.float() * 2**COVER_BITS).round_()

    def nearest(self, count: int) -> Tensor:
        """See `PairScores`."""
        others = self.scores.clone().fill_diagonal_(-torch.inf)
        return others.argsort(dim=1, descending=True, stable=True)[:, :count]
