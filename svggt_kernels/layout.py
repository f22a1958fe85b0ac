"""BlockLayout: which key tokens each query token sees, digested once per image set and walked by every backend."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .graph.graph import CovisibilityGraph
from .streams import StreamOrder


@dataclass(frozen=True)
class FrameTokens:
    """How the tokens of one side (queries or keys) lie: frame after frame, then the trailing tokens.

    Attributes:
        lengths: Tokens of each frame, special ones included.
        leading: Special tokens at the start of each frame.
        closing: Special tokens at the end of each frame.
        trailing: Tokens after the last frame that belong to no frame.
        dense_special: True if special tokens see and are seen by everything; trailing tokens always do.
        num_tokens: Tokens of all frames and the trailing ones.
    """

    lengths: tuple[int, ...]
    leading: int = 0
    closing: int = 0
    trailing: int = 0
    dense_special: bool = True
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tokens", sum(self.lengths) + self.trailing)

    @cached_property
    def ordinary(self) -> tuple[np.ndarray, np.ndarray]:
        """Start and length of the tokens of each frame that follow the graph, two int64 arrays `[S]`."""
        lengths = np.asarray(self.lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        if not self.dense_special:
            return starts, lengths
        return starts + self.leading, lengths - self.leading - self.closing

    @cached_property
    def dense(self) -> np.ndarray:
        """Tokens that see and are seen by everything, ascending int64 `[M]`."""
        trailing = np.arange(self.num_tokens - self.trailing, self.num_tokens)
        if not self.dense_special:
            return trailing
        lengths = np.asarray(self.lengths, dtype=np.int64)
        ends = np.cumsum(lengths)[:, None]
        leading = ends - lengths[:, None] + np.arange(self.leading)
        closing = ends + np.arange(-self.closing, 0)
        return np.concatenate([np.concatenate([leading, closing], axis=1).ravel(), trailing])


class Runs(NamedTuple):
    """Runs of visible tokens, one group of rows per frame and a last group for the dense rows; int32 tensors.

    Rows of group `g < S` are the ordinary tokens `row_start[g] : row_start[g] + row_length[g]`. They see the columns
    `start[r] : start[r] + length[r]` for `r` in `offsets[g] : offsets[g + 1]`, and `dense_columns`.
    Rows of group `S` are `dense_rows`; their one run is all columns. Entries of `start` and `length` behind the last
    offset mean nothing: their number is an upper bound that needs no value from the device.
    """

    row_start: Tensor  # [S + 1]
    row_length: Tensor  # [S + 1]
    offsets: Tensor  # [S + 2]
    start: Tensor  # [<= E + 1]
    length: Tensor  # [<= E + 1]
    columns: Tensor  # [S + 1], how many columns a group sees, dense ones included
    dense_rows: Tensor  # [M]
    dense_columns: Tensor  # [M']


class Tiles(NamedTuple):
    """The runs cut into tiles, in the order in which kernels should launch them; int32 tensors.

    `rows[t]` is (group, start, length) of row tile `t`; start counts tokens, or entries of `dense_rows` for the dense
    group. A group sees its full tiles (`full_start`, each of the column block), its tails (`tail_start` and
    `tail_length`, the rest of each run in pieces of at most the tail block), and, unless it is the dense group,
    `dense_columns`.
    """

    rows: Tensor  # [T, 3]
    full_offsets: Tensor  # [S + 2]
    full_start: Tensor
    tail_offsets: Tensor  # [S + 2]
    tail_start: Tensor
    tail_length: Tensor
    dense_rows: Tensor  # [M]
    dense_columns: Tensor  # [M']


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The covisibility graph applied to tokens.

    Ordinary tokens of frame i see the ordinary tokens of every frame j with an edge (i, j); dense tokens (special
    tokens with `dense_special`, trailing tokens always) see everything and are seen by everything. Build it with
    `from_graph`. The runs and tiles that kernels walk are made on the graph's device, without a host sync, when first
    used, and kept; their size follows the number of edges.

    Attributes:
        graph: Who sees whom, query frames x key frames.
        queries: How the query tokens lie.
        keys: How the key tokens lie.
        tables: What backends made of the layout, by backend and kind; kept here so that it is made once.
        order: Lets any CUDA stream use what is kept; shared with the layout that has queries and keys exchanged.
    """

    graph: CovisibilityGraph
    queries: FrameTokens
    keys: FrameTokens
    tables: dict[tuple[Hashable, ...], list[Tensor]] = field(init=False, default_factory=dict, repr=False)
    order: StreamOrder = field(init=False, default_factory=StreamOrder, repr=False)

    @classmethod
    def from_graph(
        cls,
        graph: CovisibilityGraph,
        tokens_per_frame: int | Sequence[int] | np.ndarray | Tensor,
        *,
        special_tokens: int | Sequence[int] = 0,
        dense_special: bool = True,
        trailing_tokens: int = 0,
        key_tokens_per_frame: int | Sequence[int] | np.ndarray | Tensor | None = None,
    ) -> BlockLayout:
        """Lay a covisibility graph over tokens.

        Args:
            graph: Edge (i, j) lets queries of frame i see keys of frame j.
            tokens_per_frame: Tokens of a query frame, special ones included; one int, or one int per frame as a
                sequence, array or tensor.
            special_tokens: The first R tokens of each frame; `(a, b)` for the first a and the last b.
            dense_special: If True special tokens see everything and are seen by everything; if False they are
                ordinary tokens of their frame.
            trailing_tokens: Tokens after the last frame that belong to no frame; they are always dense, so from one
                layer to the next they carry what any frame holds to every other, also where the graph is causal.
            key_tokens_per_frame: The same as `tokens_per_frame` for the key frames where they are other frames than
                the query frames. By default one int of `tokens_per_frame` serves both sides.

        Raises:
            ValueError: If a frame has no token, fewer tokens than special ones, or the number of lengths is not the
                number of frames; or if dense special tokens would show later frames to the frames of a causal graph,
                which is looked at where the graph is on the CPU.
            TypeError: If `graph` is no CovisibilityGraph, a count is no int or `dense_special` no bool.
            RuntimeError: If torch.jit.trace made a tensor of a count.
        """
        if not isinstance(graph, CovisibilityGraph):
            raise TypeError(f"graph must be a CovisibilityGraph, got {type(graph).__name__}")
        if not isinstance(dense_special, bool | np.bool_):
            raise TypeError(f"dense_special must be a bool, got {dense_special!r} ({type(dense_special).__name__})")
        both_ends = special_tokens if isinstance(special_tokens, Sequence) else (special_tokens, 0)
        if len(both_ends) != 2:
            raise ValueError(f"special_tokens must be an int or (leading, closing), got {special_tokens}")
        leading, closing = both_ends
        for name, count in (
            ("special_tokens", leading),
            ("special_tokens", closing),
            ("trailing_tokens", trailing_tokens),
        ):
            if _as_int(name, count) < 0:
                raise ValueError(f"{name} must be 0 or more, got {count}")
        if key_tokens_per_frame is None:
            key_tokens_per_frame = tokens_per_frame
            if dense_special and leading + closing > 0 and graph.device.type == "cpu" and graph.is_causal():
                raise ValueError(
                    "special tokens must not be dense where the graph is causal, as they would show every frame the "
                    'frames after it; use dense_special=False (special_tokens="masked" in patch), or give '
                    "key_tokens_per_frame if the key frames are other frames than the query frames"
                )
        lengths = _frame_lengths("tokens_per_frame", tokens_per_frame, graph.num_frames, leading + closing)
        key_lengths = _frame_lengths(
            "key_tokens_per_frame", key_tokens_per_frame, graph.num_key_frames, leading + closing
        )
        special = (int(leading), int(closing), int(trailing_tokens), bool(dense_special))
        queries, keys = FrameTokens(lengths, *special), FrameTokens(key_lengths, *special)
        if max(queries.num_tokens, keys.num_tokens) >= 2**31:
            raise ValueError(
                f"a layout may have fewer than 2^31 tokens, got {queries.num_tokens} query and {keys.num_tokens} key "
                "tokens; split the frames over several layouts"
            )
        return cls(graph, queries, keys)

    def __getstate__(self) -> dict[str, object]:
        # Runs, tables and the transposed layout are made again where the layout is loaded: tables depend on the device.
        return {"graph": self.graph, "queries": self.queries, "keys": self.keys}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, tables={}, order=StreamOrder())

    @property
    def device(self) -> torch.device:
        """Device of the graph and of every table."""
        return self.graph.device

    @property
    def num_tokens(self) -> int:
        """Number of query tokens, N."""
        return self.queries.num_tokens

    @property
    def num_key_tokens(self) -> int:
        """Number of key tokens."""
        return self.keys.num_tokens

    @cached_property
    def visible_pairs(self) -> int:
        """Number of (query token, key token) pairs that attend; reads the graph from its device."""
        rows, columns = self.queries.ordinary[1], self.keys.ordinary[1]
        degree = np.diff(self.graph.indptr.cpu().numpy())
        indices = self.graph.indices.cpu().numpy()
        edges = int((np.repeat(rows, degree) * columns[indices]).sum())
        dense_rows, dense_columns = len(self.queries.dense), len(self.keys.dense)
        return edges + dense_rows * self.num_key_tokens + (self.num_tokens - dense_rows) * dense_columns

    @property
    def density(self) -> float:
        """Visible token pairs / all token pairs."""
        return self.visible_pairs / (self.num_tokens * self.num_key_tokens)

    def to(self, device: torch.device | str) -> BlockLayout:
        """Return the layout on `device` (itself if it is there)."""
        graph = self.graph.to(device)
        return self if graph.indices is self.graph.indices else BlockLayout(graph, self.queries, self.keys)

    def transposed(self) -> BlockLayout:
        """Return the layout with queries and keys exchanged, as the backward pass walks it; made once and kept."""
        return self._transposed

    @cached_property
    def _transposed(self) -> BlockLayout:
        other = BlockLayout(self.graph.transposed(), self.keys, self.queries)
        other.__dict__.update(_transposed=self, order=self.order)
        return other

    def kept(self) -> list[Tensor]:
        """Return every tensor made so far of this layout and of the one with queries and keys exchanged."""
        both = {self, self.__dict__.get("_transposed", self)}
        of_backends = [tensor for layout in both for tables in layout.tables.values() for tensor in tables]
        return of_backends + [tensor for layout in both for tensor in layout.__dict__.get("runs", ())]

    def to_dense(self, rows: slice = slice(None)) -> Tensor:
        """Return some rows of the mask, bool `[N, N_keys]`, True where a query sees a key; for small layouts all."""
        row_frame, column_frame = self._frame_of_token(self.queries), self._frame_of_token(self.keys)
        # Dense tokens carry frame index S, whose row and column of the padded graph are all True.
        visible = torch.nn.functional.pad(self.graph.to_dense(), (0, 1, 0, 1), value=True)
        return visible[row_frame[rows]][:, column_frame]

    def _frame_of_token(self, side: FrameTokens) -> Tensor:
        frames = np.full(side.num_tokens, len(side.lengths), dtype=np.int64)
        ordinary = np.ones(side.num_tokens, dtype=bool)
        ordinary[side.dense] = False
        frames[ordinary] = np.repeat(np.arange(len(side.lengths)), side.ordinary[1])
        return on_device(frames, self.device)

    @cached_property
    def runs(self) -> Runs:
        """The runs of every frame: adjacent visible frames whose tokens touch merge into one."""
        if self.device.type == "mps":  # its integer operations have gaps
            return Runs(*(table.to(self.device) for table in self.to("cpu").runs))
        # Tables made under inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            return self._find_runs()

    def _find_runs(self) -> Runs:
        device, graph = self.device, self.graph
        row_start, row_length = (on_device(a, device) for a in self.queries.ordinary)
        frame_start, frame_length = (on_device(a, device) for a in self.keys.ordinary)
        num_dense = len(self.queries.dense)

        start, length = frame_start[graph.indices], frame_length[graph.indices]
        begins = torch.ones_like(start, dtype=torch.bool)
        begins[1:] = start[1:] != start[:-1] + length[:-1]
        begins = _first_of_row(graph.indptr, begins)
        run_start = _compact(begins, start)
        run_length = torch.zeros_like(run_start).scatter_add_(0, begins.cumsum(0) - 1, length)
        runs_before = torch.nn.functional.pad(begins.cumsum(0), (1, 0))
        offsets = runs_before[graph.indptr]
        # The dense group's run takes the next place; there is one, as _compact leaves one more than edges.
        run_start.scatter_(0, offsets[-1:], 0)
        run_length.scatter_(0, offsets[-1:], self.num_key_tokens if num_dense else 0)

        length_before = torch.nn.functional.pad(run_length.cumsum(0), (1, 0))
        group_offsets = torch.cat([offsets, offsets[-1:] + 1])
        columns = length_before[group_offsets].diff()
        columns[:-1] += len(self.keys.dense)

        return Runs(
            row_start=torch.nn.functional.pad(row_start, (0, 1)).int(),
            row_length=torch.nn.functional.pad(row_length, (0, 1), value=num_dense).int(),
            offsets=group_offsets.int(),
            start=run_start.int(),
            length=run_length.int(),
            columns=columns.int(),
            dense_rows=on_device(self.queries.dense, device).int(),
            dense_columns=on_device(self.keys.dense, device).int(),
        )

    def row_tiles(self, row_block: int) -> Tensor:
        """Return the rows cut into tiles of at most `row_block` tokens, int32 `[T, 3]`: group, start, length.

        Tiles of the dense group and of the sixteenth of the frames that see most come first, so that a launch in order
        does not end on one long row; of the others those of frames that see much in common come one after the other,
        so that keys and values are still in cache. start counts tokens, or entries of `dense_rows` for the dense
        group.

        Args:
            row_block: The most tokens of a tile; every tile of a group is full but the last.
        """
        runs, num_frames = self.runs, self.graph.num_frames
        by_columns = runs.columns[:-1].argsort(descending=True, stable=True)
        num_first = -(-num_frames // 16)
        others = by_columns[num_first:].sort().values
        others = others[self._leaders()[others].argsort(stable=True)]
        # Both on the host, where the number of tiles must be known, and on the device.
        lengths = np.append(self.queries.ordinary[1], len(self.queries.dense))
        counts = -(-lengths // row_block)
        row_length, row_tiles = (on_device(x, self.device) for x in (lengths, counts))
        group_order = torch.nn.functional.pad(torch.cat([by_columns[:num_first], others]), (1, 0), value=num_frames)
        total = int(counts.sum())
        owner, first = _owners(row_tiles[group_order], total)
        group = group_order[owner]
        begin = (torch.arange(total, device=self.device) - first[owner]) * row_block
        length = (row_length[group] - begin).clamp(max=row_block)
        return torch.stack([group, runs.row_start[group] + begin, length], dim=1).int()

    def _leaders(self) -> Tensor:
        """Return for each frame one that it sees, `[S]`; frames that see much in common often have the same.

        It is the first in a random order (min-hashing, Broder 1997). Frames that are seen more than four times as
        often as the average, as a reference frame is, come last in that order: they would lead all.
        """
        graph, device = self.graph, self.device
        drawn = np.random.default_rng(0).permutation(graph.num_key_frames)
        place, frame = on_device(drawn, device), on_device(np.argsort(drawn), device)
        indices = graph.indices.long()
        seen = torch.zeros_like(place).scatter_add_(0, indices, torch.ones_like(indices))
        place = place + (seen * graph.num_key_frames > 4 * len(indices)) * graph.num_key_frames
        none = torch.zeros(graph.num_frames, dtype=torch.int64, device=device)
        first = none.scatter_reduce(0, graph.rows.long(), place[indices], "amin", include_self=False)
        return frame[first % graph.num_key_frames]

    def tiles(self, row_block: int, column_block: int, tail_block: int) -> Tiles:
        """Return the runs cut into tiles of `row_block` x `column_block` tokens, and their rests into tails.

        Raises:
            ValueError: If there could be 2^31 tiles or more.
        """
        runs, num_frames = self.runs, self.graph.num_frames
        num_full, rest = runs.length // column_block, runs.length % column_block
        # Runs behind the last offset have length 0, so they add nothing.
        num_tails = (rest + tail_block - 1) // tail_block
        full_before, tail_before = (torch.nn.functional.pad(count.cumsum(0), (1, 0)) for count in (num_full, num_tails))
        full_offsets, tail_offsets = full_before[runs.offsets], tail_before[runs.offsets]

        num_edges, num_runs = len(self.graph.indices), len(runs.start)
        # At most this many tokens at the ends of the edges: each key frame, the longest first, seen by all it can be.
        longest_first = np.sort(self.keys.ordinary[1])[::-1]
        seen_by = np.clip(num_edges - num_frames * np.arange(len(longest_first)), 0, num_frames)
        most_full = (int((longest_first * seen_by).sum()) + self.num_key_tokens) // column_block
        if most_full >= 2**31:
            raise ValueError(
                f"a layout may have fewer than 2^31 tiles of {column_block} tokens, this one needs up to {most_full}; "
                "split the query frames over several layouts"
            )
        # Of the long tables every pass counts: place i of a run starts at start + (i - first) * block.
        run, first = _owners(num_full, most_full)
        full_start = (runs.start - first * column_block)[run]
        full_start += torch.arange(0, most_full * column_block, column_block, device=self.device)
        most_tails = num_runs * (-(-(column_block - 1) // tail_block))
        run, first = _owners(num_tails, most_tails)
        before = (torch.arange(most_tails, device=self.device) - first[run]) * tail_block
        tail_start = (runs.start + num_full * column_block)[run] + before
        tail_length = (rest[run] - before).clamp(max=tail_block)

        return Tiles(
            rows=self.row_tiles(row_block),
            full_offsets=full_offsets.int(),
            full_start=full_start.int(),
            tail_offsets=tail_offsets.int(),
            tail_start=tail_start.int(),
            tail_length=tail_length.int(),
            dense_rows=runs.dense_rows,
            dense_columns=runs.dense_columns,
        )

    def __repr__(self) -> str:
        return (
            f"BlockLayout(frames={self.graph.num_frames}, tokens={self.num_tokens}, key_tokens={self.num_key_tokens}, "
            f"edges={self.graph.num_edges}, dense_tokens={len(self.queries.dense)})"
        )


def _owners(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the owner of each place, `[total]`, and the first place of each owner, if owner i has `counts[i]` places.

    `total` may exceed the sum of the counts; what is said of the places beyond means nothing. No host sync.
    """
    first = counts.cumsum(0) - counts
    marks = torch.zeros(total + 1, dtype=torch.int32, device=counts.device)
    marks.scatter_add_(0, first, torch.ones_like(first, dtype=torch.int32))
    marks[0] -= 1
    return marks[:total].cumsum(0), first


def _compact(keep: Tensor, values: Tensor) -> Tensor:
    """Return the kept values in order at the front of `[n + 1]` places; what is behind means nothing. No host sync."""
    place = torch.where(keep, keep.cumsum(0) - 1, len(keep))
    return torch.zeros(len(keep) + 1, dtype=values.dtype, device=values.device).scatter_(0, place, values)


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Return host values on the device, on a CPU the same memory. A GPU is not waited for: it reads pinned memory."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _first_of_row(indptr: Tensor, begins: Tensor) -> Tensor:
    """Mark the first edge of every row in `begins`, bool `[E]`; empty rows mark nothing."""
    marks = torch.nn.functional.pad(begins, (0, 1))
    return marks.index_fill_(0, indptr[:-1].long(), True)[:-1]


def _as_int(name: str, value: object) -> int:
    if isinstance(value, Tensor) and torch.jit.is_tracing():
        raise RuntimeError(
            f"{name} must be an int, but torch.jit.trace made a tensor of it: attention over a layout, as in a patched "
            "model, has no trace; call the model itself, or torch.compile it"
        )
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    return int(value)


def _frame_lengths(
    name: str, tokens: int | Sequence[int] | np.ndarray | Tensor, num_frames: int, special: int
) -> tuple[int, ...]:
    if isinstance(tokens, np.ndarray | Tensor) and tokens.ndim > 0:
        tokens = tokens.tolist()
    if not isinstance(tokens, Sequence):
        lengths = (_as_int(name, tokens),) * num_frames
    else:
        lengths = tuple(_as_int(f"{name}[{i}]", n) for i, n in enumerate(tokens))
        if len(lengths) != num_frames:
            raise ValueError(f"{name} must have one length per frame, got {len(lengths)} for {num_frames} frames")
    for frame, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"{name} must be 1 or more, got {length} for frame {frame}")
        if length < special:
            raise ValueError(
                f"{name} counts special tokens too: frame {frame} has {length} tokens but {special} special ones"
            )
    return lengths
