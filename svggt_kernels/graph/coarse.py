"""Which frames see which in full, and which further frames they see coarsely: at a stride of their patch grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .arguments import check_edge_count, integer, moved
from .core import checked_core
from .graph import CovisibilityGraph
from .summary import GraphSummary


@dataclass(frozen=True, eq=False, repr=False)
class CoarseGraph:
    """Two directed graphs over the same frames: who sees whom in full, and who sees whom coarsely.

    Of a frame that is seen coarsely all special tokens are seen, and one patch in `stride` x `stride`, which stands for
    those around it (`CoarseLayout` says how). Build it with `core` or `from_graphs`; the constructor takes its
    arguments as they are.

    Args:
        full: Who sees whom in full, every frame itself among them.
        coarse: Who sees whom coarsely, query frames x `frames`; no pair of it is one of `full`.
        frames: The frames that are the columns of `coarse`, different, `[n]` int64; they lie packed as listed.
        stride: Rows, and columns, of the patch grid from one patch that is seen to the next.
    """

    full: CovisibilityGraph
    coarse: CovisibilityGraph
    frames: Tensor  # [n] int64
    stride: int

    @classmethod
    def from_graphs(cls, full: CovisibilityGraph, coarse: CovisibilityGraph, *, stride: int) -> CoarseGraph:
        """Let frames see in full what they see in one graph, and coarsely what they see in another alone.

        What a frame sees in both graphs, itself above all, it sees in full.

        Args:
            full: Who sees whom in full; square, and every frame sees itself, as builders of square graphs see to.
            coarse: Who sees whom coarsely, over the same frames.
            stride: As in the class, at least 1. With 1 all patches are seen.

        Raises:
            TypeError: If an argument is of another type.
            ValueError: If the graphs are not square over the same frames on one device, a frame does not see itself in
                full, or nothing is left that is seen coarsely.
        """
        for name, graph in (("full", full), ("coarse", coarse)):
            if not isinstance(graph, CovisibilityGraph):
                raise TypeError(f"{name} must be a CovisibilityGraph, got {type(graph).__name__}")
        stride = integer("stride", stride, 1)
        frames = full.num_frames
        if not full.is_square or (coarse.num_frames, coarse.num_key_frames) != (frames, frames):
            raise ValueError(
                f"full and coarse must be square graphs over the same frames, got {frames} x {full.num_key_frames} and "
                f"{coarse.num_frames} x {coarse.num_key_frames} frames"
            )
        if full.device != coarse.device:
            raise ValueError(f"both graphs must be on one device, got {full.device} and {coarse.device}")
        if (blind := frames - int((full.rows == full.indices).sum())) > 0:
            raise ValueError(f"every frame must see itself in full, but {blind} of {frames} do not")
        in_full, codes = (graph.rows.long() * frames + graph.indices for graph in (full, coarse))
        codes = codes[~torch.isin(codes, in_full, assume_unique=True)]
        seen, column = (codes % frames).unique(return_inverse=True)
        _require_frames(seen)
        pairs = torch.stack([codes // frames, column], dim=1)
        return cls(full, CovisibilityGraph.from_pairs(frames, pairs, num_key_frames=len(seen)), seen, stride)

    @classmethod
    def core(
        cls,
        num_frames: int,
        frames: Sequence[int] | Tensor | np.ndarray,  # [K]
        coarse: Sequence[int] | Tensor | np.ndarray | Literal["all"],  # [K']
        *,
        stride: int,
        nearest: Sequence[Sequence[int]] | Tensor | np.ndarray | None = None,  # [S, m]
    ) -> CoarseGraph:
        """Let every frame see itself and a core in full, and further frames coarsely.

        Frames of the core, and those that are seen coarsely, see nothing else either: together they are closed, and
        frames outside do not depend on one another. With "all" every frame is seen, and so nothing is closed.

        Args:
            num_frames: Frames S.
            frames: The core, different frames; a tensor's graph stays on the tensor's device.
            coarse: The frames that are seen coarsely, those of the core left out; "all" for all others.
            stride: As in the class.
            nearest: Further frames that each frame sees in full, as in `CovisibilityGraph.core`; frames that are seen
                coarsely then see those too.

        Raises:
            TypeError: If frames are not integers.
            ValueError: If one is out of range or given twice, or no frame is left that is seen coarsely.
        """
        full = CovisibilityGraph.core(num_frames, frames, nearest=nearest)
        if isinstance(coarse, str) and coarse != "all":
            raise ValueError(f'coarse must be frames or "all", got {coarse!r}')
        is_seen = torch.ones(full.num_frames, dtype=torch.bool, device=full.device)
        if not isinstance(coarse, str):
            is_seen[:] = False
            seen_coarsely = checked_core(full.num_frames, coarse, "the frames that are seen coarsely")
            is_seen[seen_coarsely.to(full.device)] = True
        is_seen[full.core_frames] = False
        seen = is_seen.nonzero()[:, 0]
        _require_frames(seen)
        check_edge_count(full.num_frames * len(seen))
        # Everyone sees them but where it sees them in full; as large as the edges, nearly all of which there are.
        visible = torch.ones(full.num_frames, len(seen), dtype=torch.bool, device=full.device)
        in_full = is_seen[full.indices.long()]
        column = is_seen.cumsum(0)[full.indices.long()] - 1
        visible[full.rows[in_full].long(), column[in_full]] = False
        indptr = torch.nn.functional.pad(visible.sum(1).cumsum(0), (1, 0)).int()
        graph = CovisibilityGraph(indptr, visible.nonzero()[:, 1].int(), full.num_frames, len(seen))
        return cls(full, graph, seen, integer("stride", stride, 1))

    @property
    def num_frames(self) -> int:
        """Frames S."""
        return self.full.num_frames

    @property
    def num_key_frames(self) -> int:
        """Frames S, as there is one set of frames."""
        return self.full.num_key_frames

    @property
    def num_edges(self) -> int:
        """Pairs of frames that see each other, in full or coarsely."""
        return self.full.num_edges + self.coarse.num_edges

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self.full.device

    def to(self, device: torch.device | str) -> CoarseGraph:
        """Return the graph on another device, itself if it is there."""
        full = self.full.to(device)
        if full.indices is self.full.indices:
            return self
        return CoarseGraph(full, self.coarse.to(device), moved(self.frames, device), self.stride)

    def united(self) -> CovisibilityGraph:
        """Return who sees whom at all, in full or coarsely."""
        pairs = torch.stack([self.coarse.rows, self.frames[self.coarse.indices.long()]], dim=1)
        return self.full | CovisibilityGraph.from_pairs(self.num_frames, pairs, num_key_frames=self.num_frames)

    def summary(self) -> GraphSummary:
        """Measure the graph of what is seen in full, and count what is seen coarsely; works on the CPU."""
        return replace(
            GraphSummary.of(self.full, self.united()),
            coarse_frames=len(self.frames),
            coarse_edges=self.coarse.num_edges,
            stride=self.stride,
        )

    def __repr__(self) -> str:
        return (
            f"CoarseGraph(frames={self.num_frames}, edges={self.full.num_edges}, "
            f"coarse_edges={self.coarse.num_edges}, stride={self.stride})"
        )


def united(graph: AnyGraph) -> CovisibilityGraph:
    """Return who sees whom at all: of frames that are seen coarsely too."""
    return graph.united() if isinstance(graph, CoarseGraph) else graph


def _require_frames(seen: Tensor) -> None:
    if len(seen) == 0:
        raise ValueError("no frame is left that is seen coarsely and not in full; use the graph `full` alone")


AnyGraph = CovisibilityGraph | CoarseGraph
"""Who sees whom: in full alone, or coarsely too."""
