"""Which frames see which: a directed graph over frames in compressed sparse rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .arguments import check_edge_count, descriptors_tensor, first_true, frames_tensor, integer, moved, pairs_tensor
from .connectivity import connected_components
from .core import checked_core, core_edges
from .descriptors import GraphOrigin, edges_from_descriptors
from .summary import GraphSummary


@dataclass(frozen=True, eq=False, repr=False)
class CovisibilityGraph:
    """A directed graph over frames: edge (i, j) means that queries of frame i see keys of frame j.

    Row i of the compressed rows is `indices[indptr[i] : indptr[i + 1]]`, the key frames that frame i sees. A graph
    is square, with one set of frames on both sides, or rectangular, with `num_frames` query frames and another
    number of key frames (a KV cache, frames sharded over devices). The builders put every frame of a square graph
    in its own row; the constructor takes the arrays as they are and keeps them, so they must not change afterwards.

    Shapes, dtypes and devices are checked always. The contents are checked when the arrays are on the CPU; on an
    accelerator that would wait for the device, so call `validate` there when the arrays come from outside.

    Args:
        indptr: Row offsets, `[S + 1]` int32, from 0 to E and never falling.
        indices: Key frames, `[E]` int32, rising within a row, in `[0, num_key_frames)`.
        num_frames: Query frames S, at least 1.
        num_key_frames: Key frames, at least 1. None means `num_frames`.
        origin: How its edges were found, if it comes from descriptors.

    Attributes:
        core_frames: The frames that every frame sees and that see one another only, in the order in which they were
            chosen, `[K]` int64; None for graphs that `core` did not make, unions among them.

    Raises:
        TypeError: If an array is not an int32 tensor or a count is not an integer.
        ValueError: If the arrays do not describe such a graph.
    """

    indptr: Tensor  # [S + 1] int32
    indices: Tensor  # [E] int32
    num_frames: int
    num_key_frames: int = None  # type: ignore[assignment]  # an int once constructed
    origin: GraphOrigin | None = None
    core_frames: Tensor | None = field(default=None, init=False)  # [K] int64

    def __post_init__(self) -> None:
        frames, key_frames = _frame_counts(self.num_frames, self.num_key_frames)
        for name, array in (("indptr", self.indptr), ("indices", self.indices)):
            if not isinstance(array, Tensor):
                raise TypeError(f"{name} must be an int32 tensor, got {type(array).__name__}; use torch.as_tensor")
            if array.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {array.dtype}; use {name}.to(torch.int32)")
            if array.ndim != 1:
                raise ValueError(f"{name} must have one dimension, got shape {tuple(array.shape)}")
        if self.indptr.numel() != frames + 1:
            raise ValueError(
                f"indptr must have num_frames + 1 = {frames + 1} entries, got {self.indptr.numel()}; "
                "the last one is the number of edges"
            )
        if self.indptr.device != self.indices.device:
            raise ValueError(
                f"indptr and indices must be on one device, got {self.indptr.device} and {self.indices.device}"
            )
        check_edge_count(self.indices.numel())
        arrays = {"indptr": self.indptr.contiguous(), "indices": self.indices.contiguous()}
        self.__dict__.update(arrays, num_frames=frames, num_key_frames=key_frames)
        if self.device.type == "cpu":
            self.validate()

    @classmethod
    def from_pairs(
        cls,
        num_frames: int,
        pairs: Iterable[Sequence[int]] | Tensor | np.ndarray,  # [E, 2]
        *,
        num_key_frames: int | None = None,
    ) -> CovisibilityGraph:
        """Build the graph with exactly the given pairs, plus the diagonal when it is square.

        Pairs are directed and are not mirrored: (i, j) lets frame i see frame j and says nothing about frame j.
        Add `.symmetrized()` for the other direction.

        Args:
            num_frames: Query frames S.
            pairs: Pairs (i, j), or an integer array `[E, 2]`; a tensor's graph stays on the tensor's device.
            num_key_frames: Key frames. Giving it makes the graph rectangular: no diagonal is added.

        Raises:
            TypeError: If a pair does not hold integers.
            ValueError: If a pair is out of range, is given twice or is not a pair.
        """
        num_frames, key_frames = _frame_counts(num_frames, num_key_frames)
        edges = pairs_tensor(pairs)
        outside = (edges < 0) | (edges >= torch.tensor([num_frames, key_frames], device=edges.device))
        if (at := first_true(outside.any(dim=1))) is not None:
            raise ValueError(
                f"pair {at}, {tuple(edges[at].tolist())}, is out of range: the first index must be in "
                f"[0, {num_frames}) and the second in [0, {key_frames}); frames are counted from 0"
            )
        codes, order = (edges[:, 0] * key_frames + edges[:, 1]).sort(stable=True)
        again = codes[1:] == codes[:-1]
        if bool(again.any()):
            at = int(order[1:][again].min())
            raise ValueError(f"pair {at}, {tuple(edges[at].tolist())}, is given twice; give each pair once")
        if num_key_frames is None:
            codes = torch.cat([codes, torch.arange(num_frames, device=edges.device) * (num_frames + 1)])
        return cls._from_codes(codes, num_frames, key_frames)

    @classmethod
    def from_dense(
        cls,
        visible: Tensor | np.ndarray,  # [S, Sk] bool
        *,
        square: bool | None = None,
    ) -> CovisibilityGraph:
        """Build the graph of a boolean matrix, plus the diagonal when rows and columns are the same frames.

        Args:
            visible: `[S, Sk]` bool, True where queries of the row's frame see keys of the column's frame. A
                tensor's graph stays on the tensor's device.
            square: True if columns are the same frames as rows, so that each frame sees itself; False if they are
                different ones, as in a part of a larger matrix, so that no edge is added. By default a matrix with as
                many rows as columns is taken for square; if it is not symmetric and some diagonal entry is False, it
                may as well be such a part, and `square` must be given.

        Raises:
            TypeError: If `visible` is not a boolean tensor or array, or `square` is missing where it must be given.
            ValueError: If it is not a matrix, has no frame, or is not as square as `square` says.
        """
        if isinstance(visible, np.ndarray):
            visible = torch.as_tensor(np.ascontiguousarray(visible))
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            given = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
            raise TypeError(f"visible must be a bool tensor or array, got {given}; compare scores to a threshold first")
        if visible.ndim != 2 or 0 in visible.shape:
            raise ValueError(f"visible must be [S, Sk] with at least one frame, got shape {tuple(visible.shape)}")
        num_frames, key_frames = visible.shape
        if square and num_frames != key_frames:
            raise ValueError(f"a square graph must have as many rows as columns, got shape {tuple(visible.shape)}")
        if square is None:
            square = num_frames == key_frames
            if square and not bool(visible.diagonal().all()) and not torch.equal(visible, visible.T):
                raise TypeError(
                    f"square must be given for this {num_frames} x {num_frames} matrix, neither symmetric nor of whole "
                    "diagonal: True if columns are the same frames as rows, False if they are others"
                )
        if square:
            visible = visible.clone().fill_diagonal_(True)
        return cls._from_codes(visible.flatten().nonzero()[:, 0], num_frames, key_frames)

    @classmethod
    def all_visible(cls, num_frames: int, num_key_frames: int | None = None) -> CovisibilityGraph:
        """Build the full graph, in which attention over the graph is dense attention."""
        num_frames, key_frames = _frame_counts(num_frames, num_key_frames)
        check_edge_count(num_frames * key_frames)
        indptr = torch.arange(num_frames + 1, dtype=torch.int32, device="cpu") * key_frames
        row = torch.arange(key_frames, dtype=torch.int32, device="cpu")
        return cls(indptr, row.repeat(num_frames), num_frames, key_frames)

    @classmethod
    def sequential(cls, num_frames: int, window: int, *, loop: bool = False) -> CovisibilityGraph:
        """Build the graph of a video: frames i and j see each other when |i - j| <= `window`.

        Args:
            num_frames: Frames S, in the order of capture.
            window: Frames seen before and after; 0 leaves each frame alone.
            loop: Whether the last frame is next to the first one.
        """
        num_frames = integer("num_frames", num_frames, 1)
        window = min(integer("window", window, 0), num_frames // 2 if loop else num_frames - 1)
        rows = torch.arange(num_frames, device="cpu")[:, None]
        columns = rows + torch.arange(-window, window + 1, device="cpu")
        codes = rows * num_frames + columns % num_frames
        kept = torch.full_like(codes, loop, dtype=torch.bool) | (columns >= 0) & (columns < num_frames)
        return cls._from_codes(codes[kept], num_frames, num_frames)

    @classmethod
    def core(
        cls,
        num_frames: int,
        frames: Sequence[int] | Tensor | np.ndarray,  # [K]
        *,
        nearest: Sequence[Sequence[int]] | Tensor | np.ndarray | None = None,  # [S, m]
    ) -> CovisibilityGraph:
        """Build the graph of a closed core: every frame sees the core and itself, frames of the core the core only.

        All frames answer to the same few, as in a dense forward of the core alone, and the cost is linear in the
        number of frames. Frames outside the core do not see one another, so what is computed for one does not depend
        on which others there are. With a core of all frames the graph is full.

        Args:
            num_frames: Frames S.
            frames: The core, different frames; a tensor's graph stays on the tensor's device.
            nearest: Further frames that each frame sees, `[S, m]` integers; rows of the core stay closed.

        Raises:
            TypeError: If frames are not integers.
            ValueError: If there is none, one is out of range or given twice, or `nearest` is of another shape.
        """
        num_frames = integer("num_frames", num_frames, 1)
        core = checked_core(num_frames, frames)
        if nearest is not None:
            nearest = frames_tensor("nearest", nearest, 2, num_frames)
            if len(nearest) != num_frames:
                raise ValueError(f"nearest must be [S, m], S = {num_frames}, got shape {tuple(nearest.shape)}")
        edges = core_edges(num_frames, core, nearest)
        graph = cls._from_codes(edges[:, 0] * num_frames + edges[:, 1], num_frames, num_frames)
        return graph.with_core(core)

    @classmethod
    def from_descriptors(
        cls,
        descriptors: Tensor | np.ndarray,  # [S, C] floating point
        *,
        neighbours: int = 10,
        window: int = 0,
        reference_frame: int | None = 0,
        anchors: int | None = None,
        bridge: bool = True,
        chunk: int = 2048,
        also: CovisibilityGraph | None = None,
    ) -> CovisibilityGraph:
        """Build the graph from one global descriptor per frame (place recognition, pooled tokens).

        Scores (cosine) only rank frames; there is no threshold, because none carries over from one scene to another.
        A false edge costs time and a missed one costs accuracy, so each step only adds edges:

        1. Each frame sees its `neighbours` most similar frames, and they see it.
        2. Frames at most `window` apart see each other (ordered input), and the edges of `also` are added.
        3. With `bridge`, the components of the graph so far are joined by the maximum spanning tree over components,
           which takes the most similar pair between them. This comes before step 4 on purpose: a star through the
           reference frame connects any graph, but everything then passes through one frame.
        4. The reference frame sees all frames and is seen by all; all frames see the anchors, picked one after
           another as the frame least similar to the reference frame and to the anchors before it.

        Equal scores go to the smaller index, so the graph depends on the descriptors alone. The cost is S^2 * C
        multiplications; memory is that of the descriptors, a few tiles of `chunk` x `chunk` scores, and the edges.

        Args:
            descriptors: `[S, C]` floating point, of any length but zero. The graph is on their device.
            neighbours: Most similar frames that each frame sees at least; S - 1 and more give the full graph.
            window: Frames before and after that each frame sees, in the order given.
            reference_frame: A frame dense both ways (VGGT's frame 0), or None.
            anchors: Frames that every frame sees, beside the reference frame. Without a reference frame the first
                anchor is frame 0. None means min(8, S // 16).
            bridge: Whether to join the components.
            chunk: Frames on each side of a tile of scores. It bounds memory and never changes the result.
            also: Edges that are known, as a graph over the same frames; what they join needs no bridge.

        Raises:
            TypeError: If the descriptors are not floating point, or a count is not an integer.
            ValueError: If they are not `[S, C]`, hold NaN, infinity or a zero row, or an argument is out of range; if
                `also` is over other frames.
        """
        descriptors = descriptors_tensor(descriptors)
        frames = len(descriptors)
        known = cls.sequential(frames, window)
        if also is not None:
            known = known.to(also.device) | also
        if reference_frame is not None:
            reference_frame = integer("reference_frame", reference_frame, 0, frames - 1)
        edges, origin = edges_from_descriptors(
            descriptors,
            torch.stack([known.rows, known.indices], dim=1),
            neighbours=min(integer("neighbours", neighbours, 0), frames - 1),
            reference_frame=reference_frame,
            anchors=min(8, frames // 16) if anchors is None else integer("anchors", anchors, 0, frames),
            bridge=bridge,
            chunk=integer("chunk", chunk, 1),
        )
        graph = cls._from_codes(edges[:, 0] * frames + edges[:, 1], frames, frames)
        return replace(graph, origin=origin).to(descriptors.device)

    @classmethod
    def _from_codes(cls, codes: Tensor, num_frames: int, num_key_frames: int) -> CovisibilityGraph:
        """Build the graph from edge codes i * num_key_frames + j (`[n]` int64) in any order, repeats allowed."""
        codes = torch.unique(codes)
        check_edge_count(codes.numel())
        row_starts = torch.arange(num_frames + 1, device=codes.device) * num_key_frames
        indptr = torch.searchsorted(codes, row_starts, out_int32=True)
        return cls(indptr, (codes % num_key_frames).to(torch.int32), num_frames, num_key_frames)

    @property
    def num_edges(self) -> int:
        """Visible (query frame, key frame) pairs, the diagonal among them."""
        return self.indices.numel()

    @property
    def density(self) -> float:
        """Edges over all pairs of a query frame and a key frame."""
        return self.num_edges / (self.num_frames * self.num_key_frames)

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self.indices.device

    @property
    def is_square(self) -> bool:
        """Whether there are as many key frames as query frames."""
        return self.num_frames == self.num_key_frames

    def is_causal(self) -> bool:
        """Return whether every frame sees itself, some see earlier ones and none a later one; waits for the device."""
        steps = self.rows - self.indices
        in_order = self.is_square and bool((steps >= 0).all() & (steps > 0).any())
        return in_order and int((steps == 0).sum()) == self.num_frames

    @property
    def rows(self) -> Tensor:
        """The query frame of each edge, `[E]` int32; computed on the graph's device without a host sync."""
        edges = torch.arange(self.num_edges, dtype=torch.int32, device=self.device)
        return torch.searchsorted(self.indptr, edges, right=True, out_int32=True) - 1

    @property
    def num_components(self) -> int:
        """Connected components, edges taken both ways; takes O(E) work on the CPU.

        Raises:
            ValueError: If the graph is rectangular.
        """
        self._require_square("num_components")
        rows, indices = self.rows.cpu(), self.indices.cpu()
        return len(connected_components(rows, indices, self.num_frames).unique())

    def is_connected(self) -> bool:
        """Whether every frame reaches every other over edges taken both ways.

        Raises:
            ValueError: If the graph is rectangular.
        """
        self._require_square("is_connected()")
        return self.num_components == 1

    def summary(self) -> GraphSummary:
        """Measure the graph: degrees, components, diameter, and warnings; works on the CPU.

        The diameter is exact up to 2000 frames. Above, it is a lower bound from two sweeps: from 64 frames spread
        over the graph to the frames reached last, and from those as far as it goes.
        """
        return GraphSummary.of(self)

    def validate(self) -> None:
        """Check the contents of the arrays; waits for the device where they are on one.

        Raises:
            ValueError: If `indptr` does not rise from 0 to E, or `indices` are out of range, unsorted or repeated.
        """
        first, last = int(self.indptr[0]), int(self.indptr[-1])
        if first != 0 or last != self.num_edges:
            raise ValueError(f"indptr must go from 0 to E = {self.num_edges}, got {first} to {last}")
        if (row := first_true(self.indptr[1:] < self.indptr[:-1])) is not None:
            raise ValueError(f"indptr must not fall, but it does after row {row}")
        if (at := first_true((self.indices < 0) | (self.indices >= self.num_key_frames))) is not None:
            raise ValueError(
                f"indices must be in [0, {self.num_key_frames}), got {int(self.indices[at])} in row "
                f"{int(self.rows[at])}"
            )
        rows = self.rows
        unsorted = (self.indices[1:] <= self.indices[:-1]) & (rows[1:] == rows[:-1])
        if (at := first_true(unsorted)) is not None:
            raise ValueError(
                f"indices must rise within a row, got {int(self.indices[at])} before {int(self.indices[at + 1])} "
                f"in row {int(rows[at])}; sort each row and drop what repeats"
            )

    def to(self, device: torch.device | str) -> CovisibilityGraph:
        """Return the graph on another device."""
        graph = CovisibilityGraph(
            moved(self.indptr, device),
            moved(self.indices, device),
            self.num_frames,
            self.num_key_frames,
            None if self.origin is None else self.origin.to(device),
        )
        return graph.with_core(None if self.core_frames is None else moved(self.core_frames, device))

    def with_core(self, core: Tensor | None) -> CovisibilityGraph:
        """Return the graph with the frames `[K]` int64 noted as its core, for a graph whose edges are those of one."""
        graph = replace(self)
        object.__setattr__(graph, "core_frames", core)
        return graph

    def to_dense(self) -> Tensor:
        """Return the boolean matrix `[S, Sk]`; its memory grows with S * Sk."""
        dense = torch.zeros(self.num_frames, self.num_key_frames, dtype=torch.bool, device=self.device)
        dense[self.rows.long(), self.indices.long()] = True
        return dense

    def transposed(self) -> CovisibilityGraph:
        """Return the graph with every edge turned round, computed on the graph's device without a host sync."""
        indices, order = torch.sort(self.indices, stable=True)
        row_numbers = torch.arange(self.num_key_frames + 1, dtype=torch.int32, device=self.device)
        indptr = torch.searchsorted(indices, row_numbers, out_int32=True)
        return CovisibilityGraph(indptr, self.rows[order], self.num_key_frames, self.num_frames)

    def symmetrized(self) -> CovisibilityGraph:
        """Return the graph in which j sees i wherever i sees j; it keeps its origin.

        Raises:
            ValueError: If the graph is rectangular.
        """
        self._require_square("symmetrized()")
        return self | self.transposed()

    def __or__(self, other: CovisibilityGraph) -> CovisibilityGraph:
        if not isinstance(other, CovisibilityGraph):
            return NotImplemented
        shapes = [(graph.num_frames, graph.num_key_frames) for graph in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"only graphs over the same frames can be united, got {shapes[0]} and {shapes[1]} frames")
        if self.device != other.device:
            raise ValueError(f"both graphs must be on one device, got {self.device} and {other.device}; use to(device)")
        united = self._from_codes(torch.cat([self._codes(), other._codes()]), *shapes[0])
        return replace(united, origin=self.origin or other.origin)

    def __repr__(self) -> str:
        keys = "" if self.is_square else f", key_frames={self.num_key_frames}"
        return f"CovisibilityGraph(frames={self.num_frames}{keys}, edges={self.num_edges}, density={self.density:.3g})"

    def _codes(self) -> Tensor:
        return self.rows.long() * self.num_key_frames + self.indices

    def _require_square(self, what: str) -> None:
        if not self.is_square:
            raise ValueError(
                f"{what} needs the same frames as queries and keys, got {self.num_frames} query frames and "
                f"{self.num_key_frames} key frames"
            )


def _frame_counts(num_frames: int, num_key_frames: int | None) -> tuple[int, int]:
    frames = integer("num_frames", num_frames, 1)
    return frames, frames if num_key_frames is None else integer("num_key_frames", num_key_frames, 1)
