"""Layouts in which frames are seen at a stride, against their definition token by token."""

from __future__ import annotations

import pickle

import pytest
import torch
from layouts import random_coarse_layout

from svggt_kernels import BlockLayout, CoarseGraph, CoarseLayout, CovisibilityGraph


def places_seen(side: int, stride: int) -> list[int]:
    """By the words of the definition: s // 2, s // 2 + s, ..., or the middle where the side ends before."""
    return [place for place in range(side) if place % stride == stride // 2] or [side // 2]


def definition(layout: CoarseLayout, leading: int, closing: int, trailing: int) -> torch.Tensor:
    """How many keys each key stands for, token by token."""
    graph, (rows, columns) = layout.graph, layout.patch_grid
    S, per_frame = graph.num_frames, leading + rows * columns + closing
    full, coarse = graph.full.to_dense(), torch.zeros(S, S, dtype=torch.bool)
    coarse[:, graph.frames] = graph.coarse.to_dense()
    seen_rows, seen_columns = places_seen(rows, graph.stride), places_seen(columns, graph.stride)
    stands_for = rows * columns / (len(seen_rows) * len(seen_columns))

    def of_token(place: int) -> float:
        patch = place - leading
        if not 0 <= patch < rows * columns:
            return 1.0
        return stands_for * (patch // columns in seen_rows and patch % columns in seen_columns)

    of_frame = torch.tensor([of_token(place) for place in range(per_frame)], dtype=torch.float64)
    weights = full.double()[:, :, None] + coarse.double()[:, :, None] * of_frame
    weights = weights.flatten(1).repeat_interleave(per_frame, 0)
    core = graph.full.core_frames
    if core is None:
        row = torch.ones(S * per_frame, dtype=torch.float64)
    else:  # the trailing tokens are a frame of the core, and see what is seen coarsely
        row = torch.zeros(S, per_frame, dtype=torch.float64)
        row[graph.frames] = of_frame
        row[core] = 1
        row = row.flatten()
    weights = torch.cat([weights, row.expand(trailing, -1)])
    return torch.cat([weights, torch.ones(len(weights), trailing, dtype=torch.float64)], 1)


@pytest.mark.parametrize("seed", range(60))
def test_weights_follow_the_definition(seed: int):
    layout = random_coarse_layout(seed)
    whole = layout.parts[0].layout
    core_holds_trailing = (
        layout.graph.full.core_frames is not None and len(whole.queries.lengths) > layout.graph.num_frames
    )
    trailing = whole.queries.lengths[-1] if core_holds_trailing else whole.queries.trailing
    per_frame, patches = whole.queries.lengths[0], layout.patch_grid[0] * layout.patch_grid[1]
    weights = layout.to_weights()
    # How many special tokens lie before the patches is not kept; only one way can fit.
    specials = per_frame - patches
    fits = [torch.allclose(weights, definition(layout, n, specials - n, trailing)) for n in range(specials + 1)]
    assert any(fits)
    assert torch.equal(layout.to_dense(), weights > 0)
    assert layout.visible_pairs == int(layout.to_dense().sum())
    assert layout.density == pytest.approx(float(layout.to_dense().double().mean()))
    assert torch.equal(layout.to_weights(slice(2, 9)), weights[2:9])


def test_of_each_square_the_patch_in_its_centre_is_seen():
    graph = CoarseGraph.core(2, [0], [1], stride=3)
    layout = CoarseLayout.from_graph(graph, (7, 5), special_tokens=(2, 1))
    patches = layout.to_weights()[0, 38:].clone()
    assert patches[:2].tolist() == [1, 1] and patches[-1] == 1
    grid = patches[2:-1].view(7, 5)
    expected = torch.zeros(7, 5, dtype=torch.float64)
    expected[1::3, 1::3] = 35 / 4
    assert torch.equal(grid, expected)


@pytest.mark.parametrize(("side", "stride"), [(1, 5), (2, 5), (2, 4), (3, 7)])
def test_a_grid_smaller_than_the_stride_keeps_a_patch(side: int, stride: int):
    layout = CoarseLayout.from_graph(CoarseGraph.core(2, [0], [1], stride=stride), (side, side))
    patches = layout.to_weights()[0, side * side :]
    assert patches.nonzero().tolist() == [[side // 2 * (side + 1)]]
    assert float(patches.sum()) == side * side


def test_keys_of_frames_seen_coarsely_touch():
    """Frames far apart are one run, so that kernels pay for one seam, not for one a frame."""
    layout = CoarseLayout.from_graph(CoarseGraph.core(20, [0], [3, 9, 16], stride=2), (8, 8), special_tokens=5)
    _, special, patches = layout.parts
    for part, length in ((special, 15), (patches, 48)):
        runs = part.layout.runs
        assert runs.length[: runs.offsets[1]].tolist() == [length]
        assert part.weight == (1.0 if part is special else 4.0)


def test_layouts_are_made_without_a_value_from_the_device():
    graph = CoarseGraph.core(9, [0, 4], [2, 6], stride=2)
    layout = CoarseLayout.from_graph(graph, (4, 6), special_tokens=1, trailing_tokens=2)
    elsewhere = CoarseLayout.from_graph(graph.to("meta"), (4, 6), special_tokens=1, trailing_tokens=2)
    for ours, theirs in zip(elsewhere.parts, layout.parts, strict=True):
        assert ours.layout.num_key_tokens == theirs.layout.num_key_tokens
        assert [table.shape for table in ours.layout.runs] == [table.shape for table in theirs.layout.runs]


def test_copies():
    layout = random_coarse_layout(3)
    assert layout.to("cpu") is layout
    loaded = pickle.loads(pickle.dumps(layout))
    assert torch.equal(loaded.to_weights(), layout.to_weights())
    assert repr(loaded) == repr(layout) and "stride=" in repr(layout)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"graph": CovisibilityGraph.sequential(3, 1)}, TypeError, "becomes a BlockLayout with BlockLayout.from_graph"),
        ({"patch_grid": (3,)}, ValueError, "patch_grid must be the rows and columns"),
        ({"patch_grid": 9}, ValueError, "patch_grid must be the rows and columns"),
        ({"patch_grid": (0, 4)}, ValueError, "a side of patch_grid must be at least 1, got 0"),
        ({"special_tokens": (1, 2, 3)}, ValueError, "special_tokens must be an int or"),
        ({"special_tokens": -1}, ValueError, "special_tokens must be at least 0"),
        ({"trailing_tokens": -1}, ValueError, "trailing_tokens must be 0 or more"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str):
    usual = {"graph": CoarseGraph.core(3, [0], [1], stride=2), "patch_grid": (4, 4)}
    with pytest.raises(error, match=message):
        CoarseLayout.from_graph(**usual | arguments)


def test_a_block_layout_takes_no_coarse_graph():
    with pytest.raises(TypeError, match="graph must be a CovisibilityGraph, got CoarseGraph"):
        BlockLayout.from_graph(CoarseGraph.core(3, [0], [1], stride=2), 4)  # type: ignore[arg-type]
