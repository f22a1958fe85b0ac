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


DENSE = -(2**31)
"""The highest bit of an int32: a run with it starts at a place among the dense columns, not at a token."""


class Runs(NamedTuple):
    """Runs of visible columns, one group of rows per frame and a last group for the dense rows; int32 tensors.

    Rows of group `g < S` are the ordinary tokens `row_start[g] : row_start[g] + row_length[g]`. They see the runs `r`
    of `offsets[g] : offsets[g + 1]`: first, ascending, those of tokens, `start[r] : start[r] + length[r]`, then, with
    `start[r]` below 0, those of the dense columns `dense_columns[start[r] - DENSE :][: length[r]]`.
    Rows of group `S` are `dense_rows`; their one run is all tokens. Behind the last offset `length` is 0: there are as
    many places as could be needed, so that no value is read from the device.
    """

    row_start: Tensor  # [S + 1]
    row_length: Tensor  # [S + 1]
    offsets: Tensor  # [S + 2]
    start: Tensor
    length: Tensor
    columns: Tensor  # [S + 1], how many columns a group sees, dense ones included
    dense_rows: Tensor  # [M]
    dense_columns: Tensor  # [M']


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The covisibility graph applied to tokens.

    Ordinary tokens of frame i see the ordinary tokens of every frame j with an edge (i, j); dense tokens (special
    tokens with `dense_special`, trailing tokens always) see everything and are seen by everything. Build it with
    `from_graph`. The runs that backends cut into tiles are made on the graph's device, without a host sync, when first
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
        dense_special: bool | None = None,
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
                ordinary tokens of their frame. None: ordinary where the graph has a core, as they would make its
                cost quadratic again, else dense.
            trailing_tokens: Tokens after the last frame that belong to no frame. Where the graph has a core and special
                tokens are not dense they belong to the core. Else they are dense, so from one layer to the next they
                carry what any frame holds to every other, also where the graph is causal.
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
        if dense_special is None:
            dense_special = graph.core_frames is None
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
            if graph.core_frames is not None and trailing_tokens and not dense_special:
                # The trailing tokens are one frame more of the core: they see it, and all see them.
                whole = _frame_lengths("tokens_per_frame", tokens_per_frame, graph.num_frames, leading + closing)
                return cls.from_graph(_with_core_frame(graph), (*whole, trailing_tokens), dense_special=False)
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
        """The runs of every group; adjacent visible frames whose ordinary tokens touch merge into one."""
        return self.find_runs(through_dense=False)

    def find_runs(self, *, through_dense: bool) -> Runs:
        """Return the runs of every group on the graph's device, without a host sync.

        Args:
            through_dense: If True a run goes on through the dense tokens between two adjacent frames that are both
                seen, and the runs of dense columns leave those out. If False it ends at them.
        """
        if self.device.type == "mps":  # its integer operations have gaps
            host = self.to("cpu").find_runs(through_dense=through_dense)
            return Runs(*(table.to(self.device) for table in host))
        # Tables made under inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            return self._find_runs(through_dense)

    def _find_runs(self, through_dense: bool) -> Runs:
        device, graph, keys = self.device, self.graph, self.keys
        num_edges, num_dense, num_dense_rows = len(graph.indices), len(keys.dense), len(self.queries.dense)
        starts, lengths = keys.ordinary
        # Of the key frame of each edge: its ordinary tokens, and how many dense columns come before them.
        first, stop, before = (
            on_device(x, device)[graph.indices] for x in (starts, starts + lengths, starts - lengths.cumsum() + lengths)
        )
        row, edge = graph.rows.long(), torch.arange(num_edges, device=device)
        begins = torch.ones(num_edges + 1, dtype=torch.bool, device=device)
        begins[1:-1] = (row[1:] != row[:-1]) | (graph.indices[1:] != graph.indices[:-1] + 1)
        if not through_dense:
            begins[1:-1] |= before[1:] != before[:-1]
        begins, ends = begins[:-1], begins[1:]
        left_out = before[torch.where(begins, edge, 0).cummax(0).values]  # the first that an edge's run goes through
        goes_through = ends & (before > left_out)

        # A group has its runs of tokens, then, as each of them that goes through dense columns parts these, one run of
        # dense columns more than there are such.
        runs, parting = begins.cumsum(0), goes_through.cumsum(0)
        runs_before, parting_before = (torch.nn.functional.pad(x, (1, 0))[graph.indptr] for x in (runs, parting))
        own_dense = min(num_dense, 1)
        dense_before = torch.arange(graph.num_frames + 1, device=device) * own_dense
        offsets = torch.nn.functional.pad(runs_before + parting_before + dense_before, (0, 1))
        offsets[-1] = offsets[-2] + 1  # the dense group's one run
        unused = (1 + through_dense) * num_edges + graph.num_frames * own_dense + 1
        start, end = torch.zeros(2, unused + 1, dtype=torch.int64, device=device)

        def put(table: Tensor, values: Tensor, at: Tensor, where: Tensor) -> None:
            table.scatter_(0, torch.where(where, at, unused), values)

        at = runs - 1 + (parting_before + dense_before)[row]
        put(start, first, at, begins)
        put(end, stop, at, ends)
        if num_dense:
            at = runs_before[row + 1] + dense_before[row] + parting
            put(start, DENSE + before, at, goes_through)
            put(end, DENSE + left_out, at - 1, goes_through)
            start.scatter_(0, runs_before[1:] + parting_before[:-1] + dense_before[:-1], DENSE)
            end.scatter_(0, offsets[1:-1] - 1, DENSE + num_dense)
        start.scatter_(0, offsets[-2:-1], 0)
        end.scatter_(0, offsets[-2:-1], self.num_key_tokens if num_dense_rows else 0)

        length = (end - start)[:unused]
        row_start, row_length = (on_device(x, device) for x in self.queries.ordinary)
        return Runs(
            row_start=torch.nn.functional.pad(row_start, (0, 1)).int(),
            row_length=torch.nn.functional.pad(row_length, (0, 1), value=num_dense_rows).int(),
            offsets=offsets.int(),
            start=start[:unused].int(),
            length=length.int(),
            columns=torch.nn.functional.pad(length.cumsum(0), (1, 0))[offsets].diff().int(),
            dense_rows=on_device(self.queries.dense, device).int(),
            dense_columns=on_device(keys.dense, device).int(),
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
        owner, first = owners(row_tiles[group_order], total)
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

    def __repr__(self) -> str:
        return (
            f"BlockLayout(frames={self.graph.num_frames}, tokens={self.num_tokens}, key_tokens={self.num_key_tokens}, "
            f"edges={self.graph.num_edges}, dense_tokens={len(self.queries.dense)})"
        )


def _with_core_frame(graph: CovisibilityGraph) -> CovisibilityGraph:
    """Return a graph that has a core with one frame more, the last, which belongs to it; no host sync."""
    last, core, device = graph.num_frames, graph.core_frames, graph.device
    assert core is not None
    every_row = torch.arange(last + 1, device=device, dtype=torch.int32)
    # Each row gets the last frame as its last entry; the last row is the core, rising, and itself.
    edges = len(graph.indices)
    indices = torch.full((edges + last + len(core) + 1,), last, dtype=torch.int32, device=device)
    indices[torch.arange(edges, device=device) + graph.rows] = graph.indices
    indices[edges + last : -1] = core.sort().values
    indptr = torch.cat([graph.indptr + every_row, every_row[-1:] + edges + len(core) + 1])
    return CovisibilityGraph(indptr, indices, last + 1).with_core(torch.cat([core, core.new_full((1,), last)]))


def owners(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the owner of each place, `[total]`, and the first place of each owner, if owner i has `counts[i]` places.

    `total` may exceed the sum of the counts; what is said of the places beyond means nothing. No host sync.
    """
    first = counts.cumsum(0) - counts
    marks = torch.zeros(total + 1, dtype=torch.int32, device=counts.device)
    marks.scatter_add_(0, first, torch.ones_like(first, dtype=torch.int32))
    marks[0] -= 1
    return marks[:total].cumsum(0), first


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Return host values on the device, on a CPU the same memory. A GPU is not waited for: it reads pinned memory."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
