"""A closed core as a source of graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from svggt_kernels.graph import CoarseGraph, CovisibilityGraph
from svggt_kernels.graph.core import choose_core
from svggt_kernels.graph.pair_scores import ScoreMatrix
from svggt_kernels.sources import Core, PatchSimilarity, Scene, ThumbnailSimilarity, TokenSimilarity, as_source
from svggt_kernels.sources.thumbnails import thumbnails
from svggt_kernels.sources.tokens import MOST_PATCHES


def scene(frames: int, **options: object) -> Scene:
    generator = torch.Generator().manual_seed(frames)
    return Scene(
        frames,
        images=torch.rand(frames, 3, 28, 42, generator=generator),
        tokens=torch.randn(frames, 6, 8, generator=generator),
        **options,
    )


def test_descriptors_choose_the_core_and_the_reference_frame_is_first():
    shown = scene(9, reference_frame=5)
    graph = as_source(Core(3, by=ThumbnailSimilarity())).graph(shown)
    expected = choose_core(thumbnails(shown.rgb), 3, first=5)
    assert torch.equal(graph.core_frames, expected) and expected[0] == 5
    assert torch.equal(graph.to_dense(), CovisibilityGraph.core(9, expected).to_dense())


@pytest.mark.parametrize("choice", ["covering", "farthest"])
def test_tokens_choose_too(choice):
    shown, by = scene(9), TokenSimilarity()
    graph = as_source(Core(4, by=by, choice=choice)).graph(shown)
    assert torch.equal(graph.core_frames, choose_core(by.descriptors(shown), 4, choice=choice))


def test_patches_choose_by_the_patch_of_the_other_frame_that_each_finds():
    shown = scene(9, reference_frame=2)
    patches = shown.tokens - shown.tokens.mean((0, 1))
    patches = (patches / patches.norm(dim=-1, keepdim=True)).double()
    expected = torch.eye(9, dtype=torch.float64)
    for i, j in itertools.permutations(range(9), 2):
        cosines = patches[i] @ patches[j].T
        expected[i, j] = (cosines.amax(1).mean() + cosines.amax(0).mean()) / 2
    scores = PatchSimilarity().compared(shown).scores
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6)
    graph = as_source("patches").graph(shown)
    assert graph.to_dense().all()  # few frames
    graph = as_source(Core(4, by="patches")).graph(shown)
    assert torch.equal(graph.core_frames, choose_core(ScoreMatrix(scores), 4, first=2))


def test_few_of_many_patches_ask_and_tell_which_frames_share_a_view():
    """Frames are windows onto a wall without structure: the score is about the share that two have in common."""
    wall = torch.randn(28, 150, 64, generator=torch.Generator().manual_seed(0))
    starts = [0, 1, 5, 20, 60]
    tokens = torch.stack([wall[:, start : start + 37].flatten(0, 1) for start in starts])
    scores = PatchSimilarity().compared(Scene(5, tokens=tokens)).scores
    assert len(tokens[0]) > 4 * MOST_PATCHES
    shared = torch.tensor([max(0, 37 - start) / 37 for start in starts])
    unrelated = scores[0, 4]
    assert unrelated < 0.5
    torch.testing.assert_close(scores[0], shared + (1 - shared) * unrelated, rtol=0, atol=0.08)


@pytest.mark.parametrize("by", [PatchSimilarity(), TokenSimilarity()])
def test_tokens_that_are_not_finite_are_refused(by):
    tokens = torch.randn(5, 6, 8)
    tokens[3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"frames \[3\] hold NaN or infinity"):
        by.compared(Scene(5, tokens=tokens))


def test_without_descriptors_the_core_lies_evenly_and_holds_the_reference_frame():
    source = as_source(Core(4, by=None))
    assert source.needs == "nothing"
    assert source.graph(scene(10)).core_frames.tolist() == [0, 3, 6, 9]
    assert source.graph(scene(10, reference_frame=7)).core_frames.tolist() == [0, 3, 7, 9]
    assert source.graph(scene(10)) is source.graph(scene(10))


def test_images_are_described_once():
    source, shown = as_source(Core(3, by=ThumbnailSimilarity())), scene(6)
    assert source.graph(shown) is source.graph(shown)
    assert source.graph(scene(7)).num_frames == 7


def test_cores_of_one_similarity_do_not_share_their_graphs():
    by, shown = ThumbnailSimilarity(), scene(12, reference_frame=0)
    sizes = [len(Core(size, by=by).graph(shown).core_frames) for size in (4, 8)]
    assert sizes == [4, 8] and by.graph(shown).core_frames is None


def test_the_same_images_seen_otherwise_are_other_images():
    source = as_source(Core(3, by=ThumbnailSimilarity()))
    plain, other, normalised = (
        source.graph(scene(9, **options)).core_frames
        for options in ({"reference_frame": 0}, {"reference_frame": 4}, {"images_are_normalised": True})
    )
    assert plain[0] == 0 and other[0] == 4
    assert torch.equal(normalised, choose_core(thumbnails(scene(9, images_are_normalised=True).rgb), 3))


def test_few_frames_see_all():
    assert as_source(Core(by=TokenSimilarity())).graph(scene(20)).to_dense().all()


class Blind(ThumbnailSimilarity):
    """Fails where it is asked to look."""

    def descriptors(self, scene: Scene) -> Tensor:
        raise AssertionError("few frames need no descriptors")


class BlindPatches(PatchSimilarity):
    """Likewise."""

    def compared(self, scene: Scene) -> ScoreMatrix:
        raise AssertionError("few frames need no tokens")


@pytest.mark.parametrize("by", [Blind(), BlindPatches(), None], ids=["images", "tokens", "evenly"])
@pytest.mark.parametrize("options", [{}, {"coarse": 3}, {"nearest": 2}], ids=str)
def test_few_frames_are_not_looked_at(by, options):
    if by is None and "nearest" in options:
        options = {}
    source = as_source(Core(6, by=by, **options))
    graph = source.graph(Scene(6, reference_frame=2))
    assert graph.to_dense().all() and graph.core_frames.tolist() == [2, 0, 1, 3, 4, 5]
    assert source.graph(Scene(6, reference_frame=2)) is graph
    assert source.graph(Scene(6)).core_frames.tolist() == [0, 1, 2, 3, 4, 5]
    if by is not None:
        with pytest.raises(AssertionError, match="few frames need no"):
            source.graph(scene(7))


def test_nearest_frames_are_added():
    shown = scene(12)
    plain, more = (Core(3, by=TokenSimilarity(), nearest=nearest).graph(shown) for nearest in (0, 2))
    added = more.to_dense().int() - plain.to_dense().int()
    assert torch.equal(plain.core_frames, more.core_frames)
    assert (added[plain.core_frames] == 0).all() and (added >= 0).all() and added.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"by": None, "nearest": 2}, "nearest=2 frames need descriptors"),
        ({"by": TokenSimilarity(window=3)}, "a core has no window and no pairs that are known"),
        ({"by": "colour"}, "by must be .*, got 'colour'"),
        ({"choice": "best"}, "choice must be one of covering, farthest, got 'best'"),
    ],
)
def test_settings_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Core(**options)


def test_labels_say_how_the_core_is_chosen():
    assert Core(8, by=TokenSimilarity()).label == "a core of 8 frames that resemble most others by tokens of the model"
    assert Core(8, by="tokens").label == Core(8, by=TokenSimilarity()).label
    assert Core().label == "a core of 52 frames that resemble most others by MegaLoc"
    assert (
        Core(8, by="patches", choice="farthest").label == "a core of 8 frames that differ most by patches of the model"
    )
    assert Core(8, by=None).label == "a core of 8 frames at equal distances"


def test_frames_that_are_seen_coarsely_are_chosen_after_the_core():
    shown = scene(12, reference_frame=5)
    graph = as_source(Core(3, by=ThumbnailSimilarity(), coarse=4, stride=2)).graph(shown)
    chosen = choose_core(thumbnails(shown.rgb), 7, first=5)
    assert isinstance(graph, CoarseGraph) and graph.stride == 2
    assert torch.equal(graph.full.to_dense(), CovisibilityGraph.core(12, chosen[:3]).to_dense())
    assert torch.equal(graph.frames, chosen[3:].sort().values)


def test_without_descriptors_they_lie_evenly_among_the_others():
    graph = as_source(Core(2, by=None, coarse=3)).graph(scene(9, reference_frame=0))
    assert graph.full.core_frames.tolist() == [0, 8] and graph.frames.tolist() == [2, 4, 6] and graph.stride == 3
    moved = as_source(Core(2, by=None, coarse=3)).graph(scene(9, reference_frame=5))
    assert moved.full.core_frames.tolist() == [0, 5] and moved.frames.tolist() == [2, 6, 8]
    everything = as_source(Core(2, by=None, coarse="all")).graph(scene(9))
    assert everything.frames.tolist() == list(range(1, 8)) and everything.num_edges == 81


@pytest.mark.parametrize("coarse", [5, "all"])
@pytest.mark.parametrize("by", [None, ThumbnailSimilarity()], ids=["evenly", "thumbnails"])
def test_a_core_of_all_frames_leaves_none_to_be_seen_coarsely(by, coarse):
    graph = as_source(Core(6, by=by, coarse=coarse)).graph(scene(5))
    assert isinstance(graph, CovisibilityGraph) and graph.density == 1


def test_labels_say_what_is_seen_coarsely():
    assert Core(2, by=None, coarse=3).label == "a core of 2 frames at equal distances, and 3 more at stride 3"
    assert Core(2, by=None, coarse="all", stride=2).label.endswith(", and all others at stride 2")
    for options, message in (
        ({"coarse": -1}, "coarse must be at least 0"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"stride": 2}, 'coarse must be their number or "all", got stride=2 and coarse=0; give coarse, or leave'),
    ):
        with pytest.raises(ValueError, match=message):
            Core(2, by=None, **options)
    with pytest.raises(TypeError, match="coarse must be an integer"):
        Core(2, by=None, coarse="rest")
