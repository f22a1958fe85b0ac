"""The shader csrc/metal: compiled by torch for one dtype, head size and direction, and launched in pieces.

It walks tiles of rows, and the runs of columns that each sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...layout import DENSE, BlockLayout
from ..contract import SOURCES

SOURCE = SOURCES / "metal" / "block_sparse_attention.metal"

ELEMENTS = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "float"}
HEAD_SIZES = (64, 128)
THREADS = 128
ROWS = 32

# macOS ends a command buffer that holds the GPU for seconds. One launch is about a tenth of a second of an M1, and what
# was launched is waited for about once a second.
MOST_FLOPS = 2**37
MOST_WAITING_FLOPS = 2**40

_lock = Lock()
_libraries: dict[tuple[torch.dtype, int, bool], Any] = {}
_waiting_flops = 0


class Work(NamedTuple):
    """What the shader's head describes; int32 tensors on the device, but for `columns`."""

    tiles: Tensor  # [T, 4] start, count, first run, end of runs
    runs: Tensor  # [>= 1, 2] start, count
    row_tokens: Tensor  # [>= 1], what a start below 0 names among the rows
    column_tokens: Tensor  # [>= 1], likewise among the columns
    columns: Tensor  # [T] on the CPU: how many columns a tile's rows see


def make_work(layout: BlockLayout, device: torch.device) -> Work:
    """Return the work of a layout, which is on the CPU, on a device."""
    runs, num_frames = layout.runs, layout.graph.num_frames
    group, start, count = layout.row_tiles(ROWS).numpy().T
    offsets, first = runs.offsets.numpy(), runs.start.numpy().astype(np.int64)
    spans = np.stack([np.where(first < 0, ~(first - DENSE), first), runs.length.numpy()], axis=1)[: offsets[-1]]
    tiles = np.stack([np.where(group == num_frames, ~start, start), count, offsets[group], offsets[group + 1]], axis=1)
    tables = (tiles, spans, runs.dense_rows.numpy(), runs.dense_columns.numpy())
    columns = runs.columns[torch.from_numpy(group).long()]
    return Work._make([*(_bindable(table).to(device) for table in tables), columns])


def _bindable(table: np.ndarray) -> Tensor:
    """Return the table as int32, with a row of zeros if it has none: an empty buffer cannot be bound."""
    return torch.from_numpy(np.array(table if len(table) else np.zeros((1, *table.shape[1:])), dtype=np.int32))


def source(dtype: torch.dtype, head_size: int, backward: bool) -> str:
    """Return the text that is compiled."""
    macros = {"ELEMENT": ELEMENTS[dtype], "HEAD_SIZE": head_size, "BACKWARD": int(backward)}
    return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + SOURCE.read_text("ascii")


def kernel(name: str, dtype: torch.dtype, head_size: int) -> Any:
    """Return a kernel of the shader, compiled at the first call only.

    Raises:
        RuntimeError: If this GPU cannot run it.
        SyntaxError: If Apple's compiler does not take it.
    """
    key = (dtype, head_size, name != "attention_forward")
    # torch compiles at every call, and its caches are not made for threads.
    with _lock:
        if key not in _libraries:
            _libraries[key] = torch.mps.compile_shader(source(*key))
        found = getattr(_libraries[key], name)
        if found.max_threads_per_threadgroup < THREADS or found.thread_execution_width != 32:
            raise RuntimeError(
                f"{name} needs threadgroups of {THREADS} threads and simdgroups of 32, this GPU gives it "
                f"{found.max_threads_per_threadgroup} and {found.thread_execution_width}"
            )
    return found


def launch(
    name: str,
    buffers: Sequence[Tensor],
    work: Work,
    strided: Sequence[Tensor],  # each [B, H, N, D]
    num_queries: int,
    scale: float,
    products: int,
) -> None:
    """Launch a kernel over all tiles of the work and all heads, in pieces of at most about `MOST_FLOPS`.

    Args:
        name: The kernel.
        buffers: Its first arguments; the first is q, k or v.
        work: The tables that it walks.
        strided: The tensors whose strides it takes, in the order of its struct.
        num_queries: N.
        scale: Factor on the scores.
        products: How many products of matrices it forms per pair of tiles.
    """
    global _waiting_flops
    B, H, _, D = buffers[0].shape
    run = kernel(name, buffers[0].dtype, D)
    strides = [stride for x in strided for stride in x.stride()[:3]]
    flops_of_a_column = 2 * products * ROWS * D * B * H
    columns = work.columns.tolist()
    for begin, end in pieces(columns, MOST_FLOPS // flops_of_a_column):
        run(
            *buffers, work.tiles[begin:end], work.runs, work.row_tokens, work.column_tokens,
            strides, num_queries, scale,
            threads=[(end - begin) * THREADS, H, B], group_size=[THREADS, 1, 1],
        )  # fmt: skip
        with _lock:
            _waiting_flops += sum(columns[begin:end]) * flops_of_a_column
            is_long = _waiting_flops > MOST_WAITING_FLOPS
            if is_long:
                _waiting_flops = 0
        if is_long:
            torch.mps.synchronize()


def pieces(columns: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Cut tiles, each with its number of columns, into pieces that see at most `most` columns or are one tile."""
    begin = seen = 0
    for tile, count in enumerate(columns):
        if tile > begin and seen + count > most:
            yield begin, tile
            begin, seen = tile, 0
        seen += count
    if columns:
        yield begin, len(columns)
