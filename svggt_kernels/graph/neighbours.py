"""Which frames look alike: neighbours, bridges and anchors from one descriptor per frame.

Every comparison here is exact. Descriptors are rounded once to fixed point (26 fractional bits), so that each sum of
products is an integer below 2^53 and comes out of a float64 matrix product the same whatever the order of summation.
Scores are then symmetric, equal for equal frames, and independent of tile sizes, of threads and of reduced-precision
settings; what is left of ties goes to the smaller frame index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import first_true
from .connectivity import connected_components
from .pair_scores import COVER_BITS, PairScores

FRACTION_BITS = 26  # a product of two unit vectors is at most 2^52, which float64 holds exactly
ROUNDING_ROWS = 1024


@dataclass(frozen=True, eq=False)
class FrameSimilarity(PairScores):
    """Cosine similarity of frames, computed in tiles; a score is the cosine times 2^52.

    Args:
        fixed_point: Unit descriptors times 2^26, `[S, C]` int32.
        chunk: Frames on each side of a tile. It bounds memory and never changes a result.
    """

    fixed_point: Tensor  # [S, C] int32
    chunk: int

    @classmethod
    def from_descriptors(cls, descriptors: Tensor, chunk: int) -> FrameSimilarity:
        """Normalise descriptors `[S, C]` and rounds them to fixed point.

        Raises:
            ValueError: If a descriptor holds NaN or infinity, or is zero and so has no direction.
        """
        if descriptors.device.type == "mps":  # no float64 there
            descriptors = descriptors.cpu()
        fixed_point = torch.empty(descriptors.shape, dtype=torch.int32, device=descriptors.device)
        for start in range(0, len(descriptors), ROUNDING_ROWS):
            part = descriptors[start : start + ROUNDING_ROWS].detach()
            part = part.to(torch.float64, memory_format=torch.contiguous_format, copy=True)  # changed in place below
            peak = part.abs().amax(dim=1)
            if (row := first_true(~peak.isfinite())) is not None:
                raise ValueError(f"descriptors must be finite, but that of frame {start + row} holds NaN or infinity")
            if (row := first_true(peak == 0)) is not None:
                raise ValueError(
                    f"the descriptor of frame {start + row} is zero and has no direction; describe the frame or leave "
                    "it out"
                )
            part /= peak[:, None]
            # The last bit of a norm depends on how many rows are reduced together; float32 hides it.
            part /= torch.linalg.vector_norm(part, dim=1, keepdim=True).to(torch.float32)
            fixed_point[start : start + ROUNDING_ROWS] = part.mul_(2**FRACTION_BITS).round_().to(torch.int32)
        return cls(fixed_point, chunk)

    @property
    def num_frames(self) -> int:
        """Frames S."""
        return len(self.fixed_point)

    @property
    def device(self) -> torch.device:
        """Where the scores are computed."""
        return self.fixed_point.device

    def nearest(self, count: int) -> Tensor:
        """Return the `count` frames most similar to each frame, itself excluded, as `[S, count]` int64.

        The most similar comes first, of equally similar ones the smaller index. Every tile serves its rows and, turned
        round, its columns, so half of the matrix is computed.
        """
        scores = self.fixed_point.new_full((self.num_frames, count), -torch.inf, dtype=torch.float64)
        frames = self.fixed_point.new_zeros((self.num_frames, count), dtype=torch.int64)
        if count == 0:
            return frames
        starts = range(0, self.num_frames, self.chunk)
        for row_start in starts:
            rows = slice(row_start, row_start + self.chunk)
            points = self.fixed_point[rows].to(torch.float64)
            for column_start in starts[row_start // self.chunk :]:
                columns = slice(column_start, column_start + self.chunk)
                if rows == columns:
                    tile = (points @ points.T).fill_diagonal_(-torch.inf)
                else:
                    tile = points @ self.fixed_point[columns].to(torch.float64).T
                    _keep_largest(scores[columns], frames[columns], tile.T.contiguous(), row_start)
                _keep_largest(scores[rows], frames[rows], tile, column_start)
        return frames

    def row(self, frame: int) -> Tensor:
        """See `PairScores`."""
        point = self.fixed_point[frame].to(torch.float64)
        return torch.cat([part.to(torch.float64) @ point for part in self.fixed_point.split(ROUNDING_ROWS)])

    def rounded(self) -> Tensor:
        """See `PairScores`."""
        points = self.fixed_point.to(torch.float64) * 2.0 ** (COVER_BITS / 2 - FRACTION_BITS)
        return torch.cat([(part @ points.T).round_().float() for part in points.split(ROUNDING_ROWS)])

    def bridges(self, labels: Tensor) -> Tensor:
        """Return the maximum spanning tree over components, `[components - 1, 2]` int64.

        Boruvka's rounds: every component but the largest takes its most similar pair (frame inside, frame outside),
        over all frames and not only over known neighbours, until one component is left. Equal scores go to the
        smaller pair (smaller index first), a total order, so no round closes a cycle. A frame's best partner stays
        its best while it stays outside, so later rounds search only for frames whose partner has joined them.

        Args:
            labels: Component of each frame, `[S]` int64, as `connected_components` gives them.
        """
        frames = torch.arange(self.num_frames, device=labels.device)
        partners = frames.clone()
        scores = torch.full(labels.shape, -torch.inf, dtype=torch.float64, device=labels.device)
        found = [frames.new_empty((0, 2))]
        while True:
            sizes = labels.bincount()
            largest = sizes.argmax()
            if int(sizes[largest]) == self.num_frames:
                return torch.cat(found)
            small = labels != largest
            searching = frames[small & (labels[partners] == labels)]
            scores[searching], partners[searching] = self._best_outside(searching, labels)
            highest = torch.full_like(scores, -torch.inf).scatter_reduce(0, labels, scores, "amax")
            best = small & (scores == highest[labels])
            codes = torch.minimum(frames, partners) * self.num_frames + torch.maximum(frames, partners)
            smallest = torch.full_like(codes, self.num_frames**2).scatter_reduce(0, labels[best], codes[best], "amin")
            chosen = smallest[labels[best]].unique()
            joined = torch.stack([chosen // self.num_frames, chosen % self.num_frames], dim=1)
            found.append(joined)
            labels = connected_components(
                torch.cat([frames, joined[:, 0]]), torch.cat([labels, joined[:, 1]]), self.num_frames
            )

    def _best_outside(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best score and frame outside its component for each of `rows`; of equal ones the smaller frame."""
        scores = torch.full(rows.shape, -torch.inf, dtype=torch.float64, device=self.device)
        partners = rows.clone()
        frames = torch.arange(self.num_frames, device=self.device)
        for at in torch.arange(len(rows), device=self.device).split(self.chunk):
            points = self.fixed_point[rows[at]].to(torch.float64)
            for columns in frames.split(self.chunk):
                tile = points @ self.fixed_point[columns].to(torch.float64).T
                score, best = tile.masked_fill_(labels[rows[at], None] == labels[columns], -torch.inf).max(dim=1)
                better = score > scores[at]
                scores[at] = torch.where(better, score, scores[at])
                partners[at] = torch.where(better, columns[best], partners[at])
        return scores, partners


def _keep_largest(scores: Tensor, frames: Tensor, tile: Tensor, first_frame: int) -> None:
    """Merge a tile `[n, m]`, whose columns begin at `first_frame`, into the best `[n, count]` of earlier columns."""
    count = scores.shape[1]
    at = _largest(tile, count)
    candidates = torch.cat([frames, first_frame + at], dim=1)
    merged, order = torch.cat([scores, tile.gather(1, at)], dim=1).sort(dim=1, descending=True, stable=True)
    scores.copy_(merged[:, :count])
    frames.copy_(candidates.gather(1, order[:, :count]))


def _largest(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest scores of each row, of equal ones the first; `[n, count]` int64, rising.

    `topk` alone may return any of several equal scores. Only a tie across the edge of the selection matters, and the
    next largest score shows it.
    """
    if count >= scores.shape[1]:
        return torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    values, selected = scores.topk(count + 1, dim=1)
    tied = (values[:, count - 1] == values[:, count]).nonzero()[:, 0]
    selected = selected[:, :count]
    selected[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :count]
    return selected.sort(dim=1).values
