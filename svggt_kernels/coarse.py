"""CoarseLayout: attention over the keys of some frames in full and of others at a stride of their patch grid.

A query sees the keys of a frame in full, or its special tokens and one patch in s x s. A patch that is seen so stands
for n of its frame, n = patches / patches seen, and has log n added to its score; special tokens stand for themselves.
The softmax runs over all that is seen:

    out = sum_j w_j exp(score_j) v_j / sum_j w_j exp(score_j)        LSE = log sum_j w_j exp(score_j)

with w_j = n for a patch that is seen coarsely, else 1. `CoarseLayout.to_weights` is this definition as a matrix.

Keys of one weight are one part: a `BlockLayout` from all queries to keys that lie packed, so that frames which are seen
coarsely touch. Attention over the whole is that over each part, log w added to its LSE, and the parts merged; or, where
no gradient is needed and the backend can (`Traits.coarse_tables`), one pass over the keys of all parts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .graph import CovisibilityGraph
from .graph.arguments import integer
from .graph.coarse import CoarseGraph
from .layout import BlockLayout, FrameTokens, on_device
from .streams import StreamOrder

MOST_PARTS = 3
"""Parts of keys: in full, special tokens and patches of frames that are seen coarsely."""


@dataclass(frozen=True, eq=False)
class KeyPart:
    """Some of the keys, all of one weight, and which query sees which of them.

    Attributes:
        layout: From all query tokens to these keys.
        tokens: The key tokens in the order in which they lie packed, int64 `[n]`; None for all tokens as they lie.
        weight: How many keys each of them stands for.
    """

    layout: BlockLayout
    tokens: Tensor | None = None
    weight: float = 1.0

    @property
    def added_score(self) -> float:
        """What is added to their scores, log weight in nats."""
        return math.log(self.weight)

    def packed(self, x: Tensor) -> Tensor:
        """Return the keys or values `[B, H, n, D]` of this part, of all `[B, H, N, D]`."""
        return x if self.tokens is None else x.index_select(2, self.tokens)

    def to(self, device: torch.device | str) -> KeyPart:
        """Return the part on another device."""
        with torch.inference_mode(False):
            tokens = None if self.tokens is None else self.tokens.to(device)
        return KeyPart(self.layout.to(device), tokens, self.weight)


@dataclass(frozen=True, eq=False, repr=False)
class CoarseLayout:
    """A `CoarseGraph` applied to tokens; `block_sparse_attention` and `prepare` take it as they take a `BlockLayout`.

    All frames have one patch grid. Special tokens are ordinary tokens of their frame. Of a patch grid with a stride s,
    the rows s // 2, s // 2 + s, ... are seen, and the columns likewise: of each s x s the patch in its centre. Of
    a side that ends before s // 2 the middle is seen. Build it with `from_graph`.

    Attributes:
        graph: Which frames see which in full, and which coarsely.
        patch_grid: Rows and columns of patches of a frame.
        parts: Keys in full, special tokens of frames that are seen coarsely, if any, and their patches.
        tables: What backends that take all parts in one pass made of the layout, as in `BlockLayout`.
        order: Lets any CUDA stream use what is kept.
    """

    graph: CoarseGraph
    patch_grid: tuple[int, int]
    parts: tuple[KeyPart, ...]
    tables: dict[tuple[Hashable, ...], list[Tensor]] = field(init=False, default_factory=dict)
    order: StreamOrder = field(init=False, default_factory=StreamOrder)

    def __post_init__(self) -> None:
        self.order.after_making(self.device)

    @classmethod
    def from_graph(
        cls,
        graph: CoarseGraph,
        patch_grid: Sequence[int],
        *,
        special_tokens: int | Sequence[int] = 0,
        trailing_tokens: int = 0,
    ) -> CoarseLayout:
        """Lay a graph over tokens; on a GPU the host does not wait.

        Args:
            graph: Which frames see which in full, and which coarsely.
            patch_grid: Rows and columns of patches of every frame, which lie row after row.
            special_tokens: The first R tokens of each frame, before its patches; `(a, b)` for a tokens before and b
                after them.
            trailing_tokens: Tokens after the last frame that belong to no frame. With a core they are one frame more of
                it, and see too what is seen coarsely; without one they see and are seen by everything, in full.

        Raises:
            TypeError: If `graph` is no CoarseGraph, or a count no integer.
            ValueError: If a count is out of range, or there are 2^31 tokens or more.
        """
        if not isinstance(graph, CoarseGraph):
            raise TypeError(
                f"graph must be a CoarseGraph, got {type(graph).__name__}; a CovisibilityGraph becomes a "
                "BlockLayout with BlockLayout.from_graph"
            )
        if not isinstance(patch_grid, Sequence) or len(patch_grid) != 2:
            raise ValueError(f"patch_grid must be the rows and columns of patches of a frame, got {patch_grid!r}")
        rows, columns = (integer("a side of patch_grid", side, 1) for side in patch_grid)
        both_ends = special_tokens if isinstance(special_tokens, Sequence) else (special_tokens, 0)
        if len(both_ends) != 2:
            raise ValueError(f"special_tokens must be an int or (leading, closing), got {special_tokens}")
        leading, closing = (integer("special_tokens", count, 0) for count in both_ends)
        patches, per_frame = rows * columns, leading + rows * columns + closing

        full = BlockLayout.from_graph(
            graph.full,
            per_frame,
            special_tokens=(leading, closing),
            dense_special=False,
            trailing_tokens=trailing_tokens,
        )
        lengths = (per_frame,) * graph.num_frames
        coarse = graph.coarse
        if trailing_tokens:
            lengths += (trailing_tokens,)
            coarse = _with_trailing_row(coarse, sees_all=graph.full.core_frames is not None)

        def part(places: np.ndarray, weight: float) -> KeyPart:
            layout = BlockLayout.from_graph(coarse, lengths, dense_special=False, key_tokens_per_frame=len(places))
            # What was made under inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                tokens = (graph.frames[:, None] * per_frame + on_device(places, graph.device)).flatten()
            return KeyPart(layout, tokens, weight)

        special = np.r_[0:leading, leading + patches : per_frame]
        seen = leading + patches_seen((rows, columns), graph.stride)
        parts = [KeyPart(full), part(seen, patches / len(seen))]
        if len(special):
            parts.insert(1, part(special, 1.0))
        return cls(graph, (rows, columns), tuple(parts))

    def __getstate__(self) -> dict[str, object]:
        return {"graph": self.graph, "patch_grid": self.patch_grid, "parts": self.parts}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, tables={}, order=StreamOrder())

    @property
    def device(self) -> torch.device:
        """Device of the graph and of every table."""
        return self.graph.device

    @property
    def queries(self) -> FrameTokens:
        """How the query tokens lie; key tokens lie the same, before they are packed."""
        return self.parts[0].layout.queries

    @property
    def num_tokens(self) -> int:
        """Number of query tokens, N."""
        return self.parts[0].layout.num_tokens

    @property
    def num_key_tokens(self) -> int:
        """Number of key tokens, N, before they are packed."""
        return self.parts[0].layout.num_key_tokens

    @property
    def visible_pairs(self) -> int:
        """Number of (query token, key token) pairs that attend; reads the graph from its device."""
        return sum(part.layout.visible_pairs for part in self.parts)

    @property
    def coarse_pairs(self) -> int:
        """How many of them are with keys of frames that are seen coarsely."""
        return self.visible_pairs - self.parts[0].layout.visible_pairs

    @property
    def density(self) -> float:
        """Visible token pairs / all token pairs."""
        return self.visible_pairs / (self.num_tokens * self.num_key_tokens)

    def to(self, device: torch.device | str) -> CoarseLayout:
        """Return the layout on `device` (itself if it is there)."""
        graph = self.graph.to(device)
        if graph is self.graph:
            return self
        return CoarseLayout(graph, self.patch_grid, tuple(part.to(device) for part in self.parts))

    def kept(self) -> list[Tensor]:
        """Return every tensor of this object that kernels read, but for those of the layouts of its parts."""
        of_parts = [part.tokens for part in self.parts if part.tokens is not None]
        return of_parts + [tensor for tables in self.tables.values() for tensor in tables]

    def to_dense(self, rows: slice = slice(None)) -> Tensor:
        """Return some rows of the mask, bool `[N, N]`, True where a query sees a key; for small layouts all."""
        return self.to_weights(rows, torch.float32) > 0

    def to_weights(self, rows: slice = slice(None), dtype: torch.dtype = torch.float64) -> Tensor:
        """Return for some rows how many keys each key stands for, `[N, N]`; 0 where a query does not see it."""
        whole, *parts = self.parts
        weights = whole.layout.to_dense(rows).to(dtype)
        for part in parts:
            weights[:, part.tokens] += part.layout.to_dense(rows).to(dtype) * part.weight
        return weights

    def __repr__(self) -> str:
        grid = "x".join(map(str, self.patch_grid))
        return f"CoarseLayout({self.graph!r}, tokens={self.num_tokens}, patch_grid={grid})"


def patches_seen(patch_grid: tuple[int, int], stride: int) -> np.ndarray:
    """Return the patches of a grid that are seen at a stride, int64, row after row; see `CoarseLayout`."""
    rows, columns = (
        np.arange(stride // 2 if stride // 2 < side else side // 2, side, stride, dtype=np.int64) for side in patch_grid
    )
    return np.add.outer(rows * patch_grid[1], columns).ravel()


def _with_trailing_row(graph: CovisibilityGraph, sees_all: bool) -> CovisibilityGraph:
    """Return a rectangular graph with a row more, for trailing tokens: one that sees all columns, or none; no sync."""
    seen = torch.arange(graph.num_key_frames if sees_all else 0, dtype=torch.int32, device=graph.device)
    indptr = torch.cat([graph.indptr, graph.indptr[-1:] + len(seen)])
    return CovisibilityGraph(indptr, torch.cat([graph.indices, seen]), graph.num_frames + 1, graph.num_key_frames)
