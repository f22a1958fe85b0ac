"""Graphs of frames that are seen in full and of frames that are seen coarsely."""

from __future__ import annotations

import pytest
import torch

from svggt_kernels import CoarseGraph, CovisibilityGraph


def coarsely(graph: CoarseGraph) -> torch.Tensor:
    """Who sees whom coarsely, bool `[S, S]`."""
    seen = torch.zeros(graph.num_frames, graph.num_frames, dtype=torch.bool)
    seen[:, graph.frames] = graph.coarse.to_dense()
    return seen


@pytest.mark.parametrize("seed", range(10))
def test_what_is_seen_in_both_graphs_is_seen_in_full(seed: int):
    generator = torch.Generator().manual_seed(seed)
    some, others = (torch.rand(7, 7, generator=generator) < 0.4 for _ in range(2))
    full, coarse = (CovisibilityGraph.from_dense(visible, square=True) for visible in (some, others))
    graph = CoarseGraph.from_graphs(full, coarse, stride=3)
    assert graph.full is full
    assert torch.equal(coarsely(graph), coarse.to_dense() & ~full.to_dense())
    assert bool(coarsely(graph).any(0)[graph.frames].all())  # nobody's keys are packed in vain


def test_a_core_and_frames_that_are_seen_coarsely_are_closed():
    graph = CoarseGraph.core(8, [5, 0], [1, 7, 5], stride=2)
    assert torch.equal(graph.full.to_dense(), CovisibilityGraph.core(8, [5, 0]).to_dense())
    assert graph.frames.tolist() == [1, 7]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:, [1, 7]] = True
    assert torch.equal(coarsely(graph), expected.fill_diagonal_(False))


def test_all_other_frames_are_seen_coarsely():
    graph = CoarseGraph.core(5, [2], "all", stride=2)
    assert torch.equal(coarsely(graph), ~graph.full.to_dense())
    assert graph.num_edges == 25


def test_summary_joins_frames_by_both_graphs():
    alone = CovisibilityGraph.sequential(6, 0)
    graph = CoarseGraph.from_graphs(alone, CovisibilityGraph.all_visible(6), stride=3)
    summary = graph.summary()
    assert (summary.edges, summary.coarse_frames, summary.coarse_edges, summary.stride) == (6, 6, 30, 3)
    assert summary.components == 1 and summary.warnings == ()
    assert "coarsely: 6 frames at stride 3, 30 edges besides" in str(summary)
    assert "see one another alone" not in str(CoarseGraph.core(6, [0], [1], stride=2).summary())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"full": torch.ones(4, 4)}, TypeError, "full must be a CovisibilityGraph, got Tensor"),
        ({"coarse": CovisibilityGraph.sequential(5, 1)}, ValueError, "over the same frames, got 4 x 4 and 5 x 5"),
        ({"full": CovisibilityGraph.from_pairs(4, [], num_key_frames=4)}, ValueError, "but 4 of 4 do not"),
        ({"coarse": CovisibilityGraph.sequential(4, 0)}, ValueError, "no frame is left that is seen coarsely"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], message: str):
    usual = {"full": CovisibilityGraph.sequential(4, 0), "coarse": CovisibilityGraph.sequential(4, 1), "stride": 2}
    with pytest.raises(error, match=message):
        CoarseGraph.from_graphs(**usual | change)


def test_a_word_other_than_all_is_refused():
    with pytest.raises(ValueError, match='coarse must be frames or "all"'):
        CoarseGraph.core(4, [0], "rest", stride=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("coarse", [[6, 1, 0], "all"])
@pytest.mark.parametrize("nearest", [None, [[1, 3]] * 7])
def test_a_core_is_what_its_two_graphs_are(coarse, nearest):
    graph = CoarseGraph.core(7, [4, 0], coarse, stride=2, nearest=nearest)
    full = CovisibilityGraph.core(7, [4, 0], nearest=nearest)
    visible = torch.zeros(7, 7, dtype=torch.bool)
    visible[:, range(7) if coarse == "all" else coarse] = True
    visible[:, [4, 0]] = False
    same = CoarseGraph.from_graphs(full, CovisibilityGraph.from_dense(visible, square=True), stride=2)
    assert torch.equal(coarsely(graph), coarsely(same)) and torch.equal(graph.frames, same.frames)
    assert torch.equal(graph.full.to_dense(), full.to_dense()) and graph.full.core_frames.tolist() == [4, 0]


def test_a_core_of_all_that_are_seen_leaves_none():
    with pytest.raises(ValueError, match="no frame is left that is seen coarsely"):
        CoarseGraph.core(3, [0, 1], [1, 0], stride=2)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        CoarseGraph.core(3, [0], "all", stride=0)


@pytest.mark.parametrize(
    ("coarse", "message"),
    [([1, 1], "differ, but 1 is given twice"), ([], "1 dimensions, none of them 0"), ([12], r"\[0, 10\), got 12")],
)
def test_what_is_wrong_with_the_frames_seen_coarsely_is_said_of_them(coarse, message):
    with pytest.raises(ValueError, match=f"^the frames that are seen coarsely must .*{message}"):
        CoarseGraph.core(10, [0], coarse, stride=2)


def test_too_many_edges_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match="holds at most"):
        CoarseGraph.core(50_000, [0], "all", stride=2)
