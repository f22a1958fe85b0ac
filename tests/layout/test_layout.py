from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from layouts import random_layout

from svggt_kernels import BlockLayout, CovisibilityGraph
from svggt_kernels.backends.triton.tiles import make_tiles


def definition(layout: BlockLayout) -> torch.Tensor:
    """The semantics, token by token: ordinary tokens follow the graph, dense tokens see and are seen by everything."""

    def frames(side) -> list[int | None]:
        owners: list[int | None] = []
        for frame, length in enumerate(side.lengths):
            for place in range(length):
                special = place < side.leading or place >= length - side.closing
                owners.append(None if special and side.dense_special else frame)
        return owners + [None] * side.trailing

    visible = layout.graph.to_dense()
    rows, columns = frames(layout.queries), frames(layout.keys)
    return torch.tensor([[i is None or j is None or bool(visible[i, j]) for j in columns] for i in rows])


def covered(
    layout: BlockLayout, row_block: int, column_block: int, tail_block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often the tiles visit each (query, key) pair and each query."""
    tiles = make_tiles(layout, row_block, column_block, tail_block)
    dense_group = layout.graph.num_frames
    pairs = torch.zeros(layout.num_tokens, layout.num_key_tokens, dtype=torch.int32)
    rows_seen = torch.zeros(layout.num_tokens, dtype=torch.int32)
    for group, start, length in tiles.rows.tolist():
        assert 0 < length <= row_block
        place = torch.arange(start, start + length)
        rows = tiles.dense_rows[place].long() if group == dense_group else place
        rows_seen[rows] += 1
        for i in range(tiles.full_offsets[group], tiles.full_offsets[group + 1]):
            pairs[rows, tiles.full_start[i] : tiles.full_start[i] + column_block] += 1
        for i in range(tiles.tail_offsets[group], tiles.tail_offsets[group + 1]):
            assert 0 < tiles.tail_length[i] <= tail_block
            pairs[rows, tiles.tail_start[i] : tiles.tail_start[i] + tiles.tail_length[i]] += 1
        if group != dense_group:
            pairs[rows[:, None], tiles.dense_columns.long()] += 1
    return pairs, rows_seen


@pytest.mark.parametrize("seed", range(40))
def test_mask_follows_the_definition(seed: int):
    layout = random_layout(seed, max_tokens=20)
    mask = layout.to_dense()
    assert torch.equal(mask, definition(layout))
    assert layout.visible_pairs == int(mask.sum())
    assert layout.density == pytest.approx(float(mask.double().mean()))
    assert torch.equal(layout.transposed().to_dense(), mask.mT)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("blocks", [(8, 4, 4), (16, 32, 8), (8, 8, 3)], ids=str)
def test_tiles_visit_every_visible_pair_once_and_nothing_else(seed: int, blocks: tuple[int, int, int]):
    layout = random_layout(seed, max_tokens=50)
    for side in (layout, layout.transposed()):
        pairs, rows = covered(side, *blocks)
        assert torch.equal(pairs, side.to_dense().int())
        assert bool((rows == 1).all())


@pytest.mark.parametrize("seed", range(20))
def test_row_tiles_hold_every_row_once(seed: int):
    layout = random_layout(seed, max_tokens=700)
    runs = layout.runs
    rows = []
    for group, start, length in layout.row_tiles(192).tolist():
        assert 1 <= length <= 192
        is_dense = group == len(runs.columns) - 1
        rows += runs.dense_rows[start : start + length].tolist() if is_dense else range(start, start + length)
    assert sorted(rows) == list(range(layout.num_tokens))


def launched(graph: CovisibilityGraph) -> list[int]:
    """Return the frames in launch order, but for the sixteenth that sees most."""
    frames = BlockLayout.from_graph(graph, 4).row_tiles(4)[:, 0].tolist()
    return frames[-(-graph.num_frames // 16) :]


def test_frames_that_see_much_in_common_are_launched_together():
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    band = (shuffled[:, None] - shuffled).abs() <= 5
    # A frame that all see, and that sees all, says nothing; 23 would lead all, as it is the first in the drawn order.
    band[23] = band[:, 23] = True
    order = launched(CovisibilityGraph.from_dense(band))
    far = [abs(int(shuffled[a] - shuffled[b])) for a, b in itertools.pairwise(order)]
    # Frames with a common leader are within 10 of each other, and each leads about 6.
    assert sum(n <= 10 for n in far) > 0.7 * len(far)


def test_frames_of_a_video_are_launched_in_order():
    order = launched(CovisibilityGraph.sequential(100, 3))
    assert order == sorted(order)


def test_adjacent_frames_merge_into_one_run():
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(10, 2), 7)
    runs = layout.runs
    assert runs.offsets.diff()[:-1].tolist() == [1] * 10
    assert runs.start[:10].tolist() == [7 * max(0, i - 2) for i in range(10)]
    assert runs.length[:10].tolist() == [7 * n for n in (3, 4, 5, 5, 5, 5, 5, 5, 4, 3)]


@pytest.mark.parametrize("special", [1, (0, 2)])
def test_dense_special_tokens_of_a_causal_graph_are_refused(special):
    """They would show frame 0 what the last frame holds."""
    causal = CovisibilityGraph.from_pairs(4, [(1, 0), (2, 1), (3, 0)])
    with pytest.raises(ValueError, match="use dense_special=False"):
        BlockLayout.from_graph(causal, 5, special_tokens=special)
    hidden = BlockLayout.from_graph(causal, 5, special_tokens=special, dense_special=False).to_dense()
    assert torch.equal(hidden, causal.to_dense().repeat_interleave(5, 0).repeat_interleave(5, 1))
    BlockLayout.from_graph(causal, 5)  # no special tokens
    BlockLayout.from_graph(causal, 5, special_tokens=special, key_tokens_per_frame=5)  # other frames
    for pairs in ([], [(0, j) for j in range(1, 4)], [(1, 0), (2, 0), (0, 2)]):
        BlockLayout.from_graph(CovisibilityGraph.from_pairs(4, pairs), 5, special_tokens=special)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_lengths_of_any_sequence(kind):
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), kind([4, 5, 6]), special_tokens=[1, 1])
    assert layout.queries.lengths == layout.keys.lengths == (4, 5, 6)
    assert (layout.queries.leading, layout.queries.closing) == (1, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_is_refused_in_words():
    graph = CovisibilityGraph.sequential(3, 1)
    with pytest.raises(RuntimeError, match="has no trace"):
        torch.jit.trace(lambda x: x * len(BlockLayout.from_graph(graph, x.shape[0] // 3).graph.rows), torch.ones(12))


def test_deterministic_algorithms_build_the_same_layouts():
    """They refuse what has no fixed order, and fill new memory."""

    def tables(layout: BlockLayout) -> list[torch.Tensor]:
        return [*layout.runs, *make_tiles(layout, 16, 8, 8), *make_tiles(layout.transposed(), 16, 8, 8)]

    def layout() -> BlockLayout:
        graph = CovisibilityGraph.from_pairs(6, [(0, 3), (3, 0), (5, 1), (2, 4)])
        return BlockLayout.from_graph(graph, [30, 20, 7, 9, 50, 1], trailing_tokens=2)

    expected = tables(layout())
    torch.use_deterministic_algorithms(True)
    try:
        found = tables(layout())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dense_special_tokens_are_one_group_not_a_tile_per_frame():
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(20, 1), 50, special_tokens=5, trailing_tokens=1)
    tiles = make_tiles(layout, 64, 64, 64)
    dense_tiles = tiles.rows[tiles.rows[:, 0] == 20]
    assert dense_tiles[:, 2].tolist() == [64, 37]
    assert len(tiles.rows) == 20 + 2


def test_long_rows_are_launched_first():
    star = CovisibilityGraph.from_pairs(32, [(7, j) for j in range(32)] + [(j, 7) for j in range(32) if j != 7])
    assert make_tiles(BlockLayout.from_graph(star, 64), 64, 64, 64).rows[0].tolist() == [7, 7 * 64, 64]


def test_transposing_twice_gives_the_same_object():
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), 4)
    assert layout.transposed().transposed() is layout
    assert layout.to("cpu") is layout


def test_ten_thousand_frames_take_less_than_a_second():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack(
        [torch.arange(10_000).repeat_interleave(32), torch.randint(10_000, (320_000,), generator=generator)], 1
    )
    graph = CovisibilityGraph.from_pairs(10_000, pairs.unique(dim=0))
    seconds = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(3):
        start = time.thread_time()
        layout = BlockLayout.from_graph(graph, 1374, special_tokens=5)
        tiles = [*make_tiles(layout, 128, 64, 64), *make_tiles(layout.transposed(), 128, 64, 64)]
        seconds.append(time.thread_time() - start)
    torch.set_num_threads(threads)
    assert min(seconds) < 1
    # 22 tiles of 64 keys an edge, 4 bytes each, both ways, and what does not grow with edges.
    assert sum(t.numel() for t in tiles) < 2 * (24 * graph.num_edges + 10_000 * 60)


def test_one_long_frame_does_not_make_every_edge_long():
    lengths = [100] * 200
    lengths[50] = 10_000
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(200, 2), lengths)
    used = int(make_tiles(layout, 64, 64, 64).full_offsets[-1])
    assert len(make_tiles(layout, 64, 64, 64).full_start) < 40 * used


def test_tables_need_no_value_from_the_device():
    """Shapes must not depend on device values: building on the meta device has no values to read."""
    graph = CovisibilityGraph.sequential(5, 1).to("meta")
    layout = BlockLayout.from_graph(graph, 50, special_tokens=3, trailing_tokens=1)
    on_cpu = BlockLayout.from_graph(CovisibilityGraph.sequential(5, 1), 50, special_tokens=3, trailing_tokens=1)
    for ours, theirs in zip(make_tiles(layout, 16, 8, 8), make_tiles(on_cpu, 16, 8, 8), strict=True):
        assert ours.shape == theirs.shape
    assert make_tiles(layout.transposed(), 16, 8, 8).rows.shape == make_tiles(on_cpu.transposed(), 16, 8, 8).rows.shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens_per_frame": 0}, ValueError, "tokens_per_frame must be 1 or more, got 0 for frame 0"),
        ({"tokens_per_frame": [4, 4]}, ValueError, "got 2 for 3 frames"),
        ({"tokens_per_frame": [4, 0, 4]}, ValueError, "got 0 for frame 1"),
        ({"tokens_per_frame": 4.0}, TypeError, "tokens_per_frame"),
        ({"tokens_per_frame": True}, TypeError, "must be an int, got True"),
        ({"tokens_per_frame": np.array([4.0, 4.0, 4.0])}, TypeError, r"tokens_per_frame\[0\] must be an int, got 4.0"),
        ({"tokens_per_frame": 4, "trailing_tokens": "a"}, TypeError, "trailing_tokens must be an int, got 'a'"),
        ({"tokens_per_frame": 4, "special_tokens": "ab"}, TypeError, "special_tokens must be an int, got 'a'"),
        ({"tokens_per_frame": 4, "dense_special": "masked"}, TypeError, "dense_special must be a bool, got 'masked'"),
        ({"tokens_per_frame": 4, "special_tokens": 5}, ValueError, "frame 0 has 4 tokens but 5 special ones"),
        ({"tokens_per_frame": 4, "special_tokens": (3, 2)}, ValueError, "4 tokens but 5 special"),
        ({"tokens_per_frame": 4, "special_tokens": -1}, ValueError, "special_tokens must be 0 or more, got -1"),
        ({"tokens_per_frame": 4, "special_tokens": (1, 2, 3)}, ValueError, "special_tokens must be"),
        ({"tokens_per_frame": 4, "trailing_tokens": -2}, ValueError, "trailing_tokens must be 0 or more, got -2"),
        ({"tokens_per_frame": 4, "key_tokens_per_frame": [1]}, ValueError, "key_tokens_per_frame"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), **arguments)


def test_a_graph_is_needed():
    with pytest.raises(TypeError, match="graph must be a CovisibilityGraph, got Tensor"):
        BlockLayout.from_graph(torch.ones(3, 3), 4)  # type: ignore[arg-type]


def test_trailing_tokens_belong_to_a_core():
    """They see the core and themselves and are seen by all, so that the cost stays linear."""
    graph = CovisibilityGraph.core(4, [2, 0])
    layout = BlockLayout.from_graph(graph, 3, special_tokens=1, trailing_tokens=2, dense_special=False)
    expected = torch.zeros(14, 14, dtype=torch.bool)
    expected[:12, :12] = graph.to_dense().repeat_interleave(3, 0).repeat_interleave(3, 1)
    expected[:, 12:] = True
    expected[12:, :3] = expected[12:, 6:9] = True
    assert torch.equal(layout.to_dense(), expected)
    assert layout.visible_pairs == expected.sum()
