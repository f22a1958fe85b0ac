"""Graphs of a closed core, and how its frames are chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svggt_kernels.graph import CovisibilityGraph
from svggt_kernels.graph.core import choose_core, nearest_frames, spread_evenly
from svggt_kernels.graph.neighbours import FrameSimilarity
from svggt_kernels.graph.pair_scores import BOUNDS_AT_ONCE, ScoreMatrix
from svggt_kernels.patching.order import in_order


@pytest.mark.parametrize("frames", [[2, 0], torch.tensor([2, 0]), np.array([2, 0])], ids=["list", "tensor", "array"])
def test_all_see_the_core_and_themselves_and_the_core_sees_itself(frames):
    graph = CovisibilityGraph.core(5, frames)
    seen = [row.nonzero().flatten().tolist() for row in graph.to_dense()]
    assert seen == [[0, 2], [0, 1, 2], [0, 2], [0, 2, 3], [0, 2, 4]]
    assert graph.core_frames.tolist() == [2, 0]
    assert graph.to("cpu").core_frames.tolist() == [2, 0]


def test_nearest_frames_are_seen_from_outside_the_core_alone():
    nearest = torch.tensor([[1, 3], [0, 3], [3, 1], [2, 1]])
    graph = CovisibilityGraph.core(4, [0, 2], nearest=nearest)
    seen = [row.nonzero().flatten().tolist() for row in graph.to_dense()]
    assert seen == [[0, 2], [0, 1, 2, 3], [0, 2], [0, 1, 2, 3]]


def test_a_core_is_a_copy_and_belongs_to_its_graph_alone():
    frames = torch.tensor([0, 3])
    graph = CovisibilityGraph.core(6, frames)
    frames[1] = 5
    assert graph.core_frames.tolist() == [0, 3]
    assert (graph | CovisibilityGraph.sequential(6, 1)).core_frames is None
    assert graph.transposed().core_frames is None
    with pytest.raises(TypeError, match="core_frames"):
        CovisibilityGraph(graph.indptr, graph.indices, 6, core_frames=frames)


def test_frames_in_another_order_keep_their_core():
    graph = CovisibilityGraph.core(4, [3, 1], nearest=[[2], [0], [0], [0]])
    moved = in_order(graph, (2, 3, 0, 1))
    assert moved.core_frames.tolist() == [1, 3]
    assert torch.equal(moved.to_dense(), graph.to_dense()[[2, 3, 0, 1]][:, [2, 3, 0, 1]])


def test_few_frames_see_all():
    graph = CovisibilityGraph.core(3, [1, 0, 2])
    assert graph.to_dense().all() and graph.num_edges == 9


@pytest.mark.parametrize(
    ("frames", "options", "error", "message"),
    [
        ([], {}, ValueError, r"1 dimensions, none of them 0, got shape \(0,\)"),
        ([0, 5], {}, ValueError, r"in \[0, 5\), got 5"),
        ([1, 3, 1], {}, ValueError, "must differ, but 1 is given twice"),
        ([0.5], {}, TypeError, "must be integers, got torch.float64"),
        ([True], {}, TypeError, "must be integers, got torch.bool"),
        (
            [0],
            {"nearest": torch.zeros(4, 1, dtype=torch.int64)},
            ValueError,
            r"\[S, m\], S = 5, got shape \(4, 1\)",
        ),
        ([0], {"nearest": torch.full((5, 1), 5)}, ValueError, r"nearest must be in \[0, 5\), got 5"),
        ([0], {"nearest": torch.ones(5, 5, dtype=torch.bool)}, TypeError, "nearest must be integers, got torch.bool"),
        ([0], {"nearest": torch.full((5, 1), 2.9)}, TypeError, "nearest must be integers, got torch.float32"),
        (3, {}, ValueError, r"1 dimensions, none of them 0, got shape \(\)"),
    ],
)
def test_core_refuses(frames, options, error, message):
    with pytest.raises(error, match=message):
        CovisibilityGraph.core(5, frames, **options)


def farthest(similarity: np.ndarray, first: int, size: int) -> list[int]:
    chosen = [first]
    while len(chosen) < size:
        left = [frame for frame in range(len(similarity)) if frame not in chosen]
        chosen.append(min(left, key=lambda frame: similarity[frame, chosen].max()))
    return chosen


def covering(similarity: np.ndarray, first: int, size: int) -> list[int]:
    chosen = [first]
    while len(chosen) < size:
        left = [frame for frame in range(len(similarity)) if frame not in chosen]
        chosen.append(max(left, key=lambda frame: similarity[:, [*chosen, frame]].max(axis=1).sum()))
    return chosen


@pytest.mark.parametrize(("choice", "slow"), [("farthest", farthest), ("covering", covering)])
def test_choice_equals_brute_force(choice, slow):
    descriptors = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(descriptors.double(), dim=1).numpy()
    similarity = unit @ unit.T
    for first, size in ((0, 1), (7, 12), (3, 40)):
        expected = slow(similarity, first, size)
        assert choose_core(descriptors, size, choice=choice, first=first).tolist() == expected
        matrix = ScoreMatrix(torch.from_numpy(np.minimum(similarity, similarity.T).clip(-1, 1)))
        assert choose_core(matrix, size, choice=choice, first=first).tolist() == expected
    assert sorted(choose_core(descriptors, 99, choice=choice).tolist()) == list(range(40))


def test_a_cover_of_many_frames_equals_brute_force():
    """More frames than bounds are renewed at once, so that most frames are judged by what they added before."""
    frames, size = 300, 40
    generator = torch.Generator().manual_seed(0)
    descriptors = torch.randn(frames, 6, generator=generator)
    descriptors[200:] = descriptors[torch.randint(200, (100,), generator=generator)]
    matrix = torch.randint(-4, 5, (frames, frames), generator=generator).double() / 4  # many frames add the same
    matrix = torch.maximum(matrix, matrix.T).fill_diagonal_(1)
    for scores in (FrameSimilarity.from_descriptors(descriptors, 64), ScoreMatrix(matrix)):
        rounded = scores.rounded().double()
        expected = [5]
        while len(expected) < size:
            covered = rounded[expected].amax(0)
            added = (rounded - covered).clamp(min=0).sum(1)
            added[expected] = -1
            expected.append(int(added.argmax()))
        assert frames > BOUNDS_AT_ONCE
        assert choose_core(scores, size, first=5).tolist() == expected


def test_a_frame_that_nobody_resembles_is_taken_as_farthest_but_covers_little():
    angles = torch.tensor([0.0, 0.1, 0.2, 1.4, 1.5, 1.6, 3.1])
    descriptors = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert choose_core(descriptors, 2, choice="farthest").tolist() == [0, 6]
    assert choose_core(descriptors, 2)[1] in (3, 4, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"first": 3}, r"first must be in \[0, 2\]"),
        ({"choice": "x"}, "choice"),
    ],
)
def test_choose_core_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        choose_core(torch.eye(3), **{"size": 2, **options})


def test_nearest_frames_by_a_matrix_are_those_by_descriptors():
    unit = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    scores = (unit @ unit.T).clamp(-1, 1)
    scores = torch.minimum(scores, scores.T)
    assert torch.equal(nearest_frames(ScoreMatrix(scores), 3), nearest_frames(unit, 3))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.eye(3)[:2], r"\[S, S\]"),
        (torch.eye(3) * 2, "from -1 to 1"),
        (torch.eye(3) * torch.nan, "from -1 to 1"),
        (torch.eye(3) + torch.eye(3).roll(1, 0) / 2, "the same both ways"),
    ],
)
def test_a_matrix_that_compares_nothing_is_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        ScoreMatrix(scores)


def test_even_frames_hold_both_ends():
    assert spread_evenly(10, 4).tolist() == [0, 3, 6, 9]
    assert spread_evenly(3, 8).tolist() == [0, 1, 2]
    assert spread_evenly(5, 1).tolist() == [0]
