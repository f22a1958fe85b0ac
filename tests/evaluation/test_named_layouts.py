"""Layouts by name are the graphs that they promise, and are put into a model by `patch`."""

from __future__ import annotations

import pytest
import torch

from evaluation.layouts import Known, named
from evaluation.measuring import SceneSet, predict
from svggt_kernels import Core, TokenSimilarity
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.scenes import Draws
from svggt_kernels.graph.core import choose_core
from svggt_kernels.sources.base import Scene

FRAMES = 6
NAMES = (
    *("dense", "own", "own-dense", "core-3", "core-3-thumbnails", "core-3-overlap", "core-3-evenly", "core-3-random"),
    *("core-2-dense", "core-2-near1", "core-2-overlap-near1-open", "core-2-evenly-near1-dense", "random-2"),
    *("core-3-covering", "core-3-overlap-covering-near1-open-dense"),
    *("nearest-2", "nearest-2-thumbnails", "nearest-2-overlap", "nearest-2-ordinary", "random-2-ordinary"),
)


@pytest.fixture(scope="module")
def known() -> Known:
    return Known(SceneSet("walk", 4, FRAMES).draw(1, Draws(0), (28, 42)), seed=3)


@pytest.fixture(scope="module")
def scene(known: Known) -> Scene:
    tokens = torch.randn(FRAMES, 6, 32, generator=torch.Generator().manual_seed(0))
    return Scene(FRAMES, images=known.scenes.images[0], tokens=tokens, reference_frame=0)


@pytest.fixture(scope="module")
def model() -> RoomsModel:
    return RoomsModel.create(dim=32, depth=1, num_heads=2)


def sees(name: str, scene: Scene, known: Known) -> list[list[int]]:
    """The frames that each frame sees."""
    dense = named(name).graph(scene, known).to_dense()
    return [row.nonzero()[:, 0].tolist() for row in dense]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_that_of_its_layout(name: str):
    assert named(name).name == name


def test_what_is_usual_is_left_out_of_a_name():
    names = {"core-3-tokens-ordinary": "core-3", "nearest-4-tokens-dense": "nearest-4", "own-ordinary": "own"}
    assert {name: named(name).name for name in names} == names


@pytest.mark.parametrize(
    "name", ["", "core", "core-x", "core-3-open", "core-2-covering-overlap", "nearest-3-evenly", "dense-own", "Core-3"]
)
def test_other_names_are_refused(name: str):
    with pytest.raises(ValueError, match="is no layout; names are dense, own, core-K"):
        named(name)
    with pytest.raises(ValueError, match="at least one frame"):
        named("core-0")
    with pytest.raises(ValueError, match="by similarity can be covering"):
        named("core-3-evenly-covering")


def core(name: str, scene: Scene, known: Known) -> list[int]:
    """The frames of the core of a layout, in the order of choice."""
    return named(name).graph(scene, known).core_frames.tolist()


def test_cores(scene: Scene, known: Known):
    assert core("core-3-evenly", scene, known) == [0, 2, 5]
    drawn = core("core-3-random", scene, known)
    assert drawn == core("core-3-random", scene, known) and drawn[0] == 0 and len(set(drawn)) == 3
    overlap = known.overlap
    assert overlap[0, core("core-2-overlap", scene, known)[1]] < overlap[0].min() + 0.05
    assert torch.equal(overlap, overlap.T) and (overlap.diagonal() > 0.99).all()
    for choice in ("tokens", "patches", "thumbnails", "overlap", "evenly", "random"):
        assert sorted(core(f"core-9-{choice}", scene, known)) == list(range(FRAMES))
    descriptors = TokenSimilarity().descriptors(scene)
    for word, choice in (("", "farthest"), ("-covering", "covering")):
        assert core(f"core-3{word}", scene, known) == choose_core(descriptors, 3, choice=choice).tolist()
        by_patches = Core(3, by="patches", choice=choice).graph(scene).core_frames.tolist()
        assert core(f"core-3-patches{word}", scene, known) == by_patches


def test_all_see_a_closed_core_and_themselves(scene: Scene, known: Known):
    chosen = [0, 2, 5]
    assert sees("core-3-evenly", scene, known) == [sorted({*chosen, frame}) for frame in range(FRAMES)]
    assert sees("core-6", scene, known) == [list(range(FRAMES))] * FRAMES
    assert sees("own", scene, known) == [[frame] for frame in range(FRAMES)]


def test_the_packages_anchors_are_the_same_core(scene: Scene, known: Known):
    """Anchors without neighbours: how a user builds a closed core from descriptors."""
    recipe = TokenSimilarity(neighbours=0, anchors=3, bridge=False, reference_frame=None)
    assert torch.equal(recipe.graph(scene).to_dense(), named("core-3").graph(scene, known).to_dense())


def test_near_frames_are_seen_from_outside_the_core_alone(scene: Scene, known: Known):
    overlap = known.overlap.clone().fill_diagonal_(-1)
    chosen = core("core-2-overlap", scene, known)
    closed, opened = (sees(f"core-2-overlap-near1{word}", scene, known) for word in ("", "-open"))
    for frame in range(FRAMES):
        assert set(chosen) <= set(opened[frame]) and len(opened[frame]) <= 4
        assert closed[frame] == (sorted(chosen) if frame in chosen else opened[frame])
        (near,) = set(opened[frame]) - {*chosen, frame} or {int(overlap[frame].argmax())}
        assert overlap[frame, near] > overlap[frame].max() - 0.1


def test_neighbours_are_those_of_the_packages_recipe(scene: Scene, known: Known):
    graph = named("nearest-2-overlap").graph(scene, known)
    assert graph.origin is not None and graph.is_connected()
    overlap = known.overlap.clone().fill_diagonal_(-1)
    certain = [frame for frame in range(FRAMES) if overlap[frame].topk(2).values[1] > 0.1]
    assert certain
    for frame in certain:
        assert set(overlap[frame].topk(1).indices.tolist()) <= set(graph.to_dense()[frame].nonzero()[:, 0].tolist())
    assert graph.to_dense()[0].all() and graph.to_dense()[:, 0].all()
    drawn = named("random-2").graph(scene, known)
    assert torch.equal(drawn.to_dense(), named("random-2").graph(scene, known).to_dense())
    assert not torch.equal(drawn.to_dense(), graph.to_dense())


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_layout_acts_in_a_model_and_is_counted(name: str, model: RoomsModel, known: Known, scene: Scene):
    images, layout = known.scenes.images, named(name)
    before = predict(model, images)
    with layout.put_into(model, known) as counted:
        prediction = predict(model, images)
        what = counted()
    per_frame = model.tokens_per_frame(28, 42)
    assert what.dense_pairs == (FRAMES * per_frame) ** 2
    assert torch.equal(predict(model, images).depth, before.depth)
    if name == "dense":
        assert what.pairs == what.dense_pairs and torch.equal(prediction.depth, before.depth)
        return
    assert (prediction.depth - before.depth).abs().max() > 1e-6 and what.pairs < what.dense_pairs
    if name.startswith("core-3") and "near" not in name:
        assert what.pairs == per_frame**2 * (3 * 3 + 3 * 4)
    if name == "own":
        assert what.pairs == FRAMES * per_frame**2


@torch.no_grad()
def test_a_core_of_all_frames_is_dense(model: RoomsModel, known: Known):
    expected = predict(model, known.scenes.images)
    with named("core-6").put_into(model, known) as counted:
        found = predict(model, known.scenes.images)
        assert counted().pairs == counted().dense_pairs
    torch.testing.assert_close(found.depth, expected.depth, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.poses, expected.poses, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_core_is_chosen_by_the_tokens_that_the_model_sees(model: RoomsModel, known: Known):
    """The tokens that enter the first global block, pooled by hand."""
    entered = []
    hook = model.aggregator.global_blocks[0].attn.register_forward_pre_hook(
        lambda module, args: entered.append(args[0])
    )
    model(known.scenes.images)
    hook.remove()
    pooled = entered[0].view(FRAMES, -1, 32)[:, 5:].mean(1)
    unit = torch.nn.functional.normalize(pooled - pooled.mean(0), dim=1)
    chosen = sorted(choose_core(unit, 3).tolist())
    seen = []
    layout = named("core-3")
    recorded = type(layout)(
        layout.name, lambda scene, known: seen.append(layout.graph(scene, known)) or seen[0], "ordinary"
    )
    with recorded.put_into(model, Known(known.scenes, seed=3)):
        model(known.scenes.images)
    assert seen[0].to_dense().all(0).nonzero()[:, 0].tolist() == chosen
