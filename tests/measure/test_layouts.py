"""Layouts side by side: a closed core is closed, a right answer in any coordinate system and unit has no error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from svggt_kernels import Patch, TokenSimilarity
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.poses import encode_poses
from svggt_kernels.demo.scenes import Draws, Scenes, make_scenes
from svggt_kernels.measure import layouts
from svggt_kernels.measure.layouts import DENSE, Reference, layouts_named, run_layouts
from svggt_kernels.models import RUNNABLE
from svggt_kernels.models.loading import LoadedModel
from svggt_kernels.sources import Core

SIZE = (28, 42)
FRAMES = 7


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return make_scenes(1, FRAMES, Draws(0), rooms=2, size=SIZE)


def loaded(module: nn.Module) -> LoadedModel:
    return LoadedModel(RUNNABLE["toy"], module.eval(), weights="", warning=None, autocast=None)


def truth_of(scenes: Scenes) -> Reference:
    return Reference(scenes.poses[0], scenes.depth[0])


class Oracle(nn.Module):
    """Knows the cameras and the depth, in other axes and another unit."""

    def __init__(self, scenes: Scenes, unit: float, spoil: Callable[[Tensor], Tensor] = lambda poses: poses):
        super().__init__()
        self.scenes, self.unit, self.spoil = scenes, unit, spoil

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        frames = images.shape[1]
        poses = self.spoil((torch.linalg.inv(self.scenes.poses[:, 2:3]) @ self.scenes.poses)[:, :frames].double())
        encoding = encode_poses(poses[..., :3, :3], poses[..., :3, 3] * self.unit, torch.ones(1, frames, 2))
        return {"pose_enc": encoding, "depth": self.unit * self.scenes.depth[:, :frames, ..., None]}


def test_the_right_answer_has_no_error_and_comes_back_in_metres(scenes: Scenes):
    (outcome,) = run_layouts(loaded(Oracle(scenes, 0.3)), scenes.images[0], [DENSE], truth_of(scenes), rounds=1)
    assert (outcome.scores["auc5"], outcome.auc30) == (1, 1)
    assert outcome.scores["ate"] < 1e-5 and outcome.scores["absrel"] < 1e-6
    torch.testing.assert_close(outcome.poses, scenes.poses[0].double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(outcome.depth, scenes.depth[0], atol=1e-4, rtol=1e-4)
    assert (outcome.pairs, outcome.graph, outcome.backend, outcome.core) == (1, None, None, [])


def test_a_camera_in_the_wrong_place_is_off_by_that_much(scenes: Scenes):
    def moved(poses: Tensor) -> Tensor:
        poses = poses.clone()
        poses[:, -1, :3, 3] += torch.tensor([0.0, -2.0, 0.0])
        return poses

    (outcome,) = run_layouts(loaded(Oracle(scenes, 1.0, moved)), scenes.images[0], [DENSE], truth_of(scenes), rounds=1)
    assert 0.2 < outcome.scores["ate"] < 2 / FRAMES**0.5
    assert outcome.auc30 < 1 and outcome.scores["absrel"] < 1e-6


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(RoomsModel.create(0, dim=16, depth=2, num_heads=2))


def test_a_core_is_closed_and_special_tokens_belong_to_their_frames(scenes: Scenes, model: LoadedModel):
    layouts = layouts_named(["dense", "core-3", "nearest-10"], TokenSimilarity)
    _, core, neighbours = run_layouts(model, scenes.images[0], layouts, truth_of(scenes), rounds=2)
    assert len(core.core) == 3 and core.core[0] == 0
    in_core = torch.zeros(FRAMES, dtype=torch.bool)
    in_core[core.core] = True
    assert core.graph is not None
    assert torch.equal(core.graph.to_dense(), in_core.expand(FRAMES, -1) | torch.eye(FRAMES, dtype=torch.bool))
    assert core.pairs == pytest.approx((3 * 3 + 4 * 4) / FRAMES**2)
    assert neighbours.pairs == 1  # 10 neighbours among 7 frames
    assert core.cost.runs == neighbours.cost.runs == 2
    assert core.layout.name == "core-3"
    with pytest.raises(ValueError, match="is not patched"):
        Patch.of(model.module)


def test_what_takes_long_runs_once(scenes: Scenes, model: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    inputs = (model, scenes.images[0], [DENSE])
    assert [outcome.cost.runs for outcome in run_layouts(*inputs)] == [3]
    monkeypatch.setattr(layouts, "ENOUGH_SECONDS", 0)
    assert [outcome.cost.runs for outcome in run_layouts(*inputs)] == [1]


def test_facts_are_plain(scenes: Scenes, model: LoadedModel):
    layouts = layouts_named([f"core-{FRAMES}"], TokenSimilarity)
    (outcome,) = run_layouts(model, scenes.images[0], layouts, truth_of(scenes), rounds=1)
    facts = outcome.facts()
    assert facts["pairs"] == 1 and facts["runs"] == 1 and facts["ate"] == outcome.scores["ate"]
    assert all(isinstance(value, (str, int, float, type(None))) for value in facts.values())


def test_one_frame_has_no_pairs(scenes: Scenes, model: LoadedModel):
    with pytest.raises(ValueError, match="two frames or more are needed, got 1"):
        run_layouts(model, scenes.images[0, :1], [DENSE])


def test_without_truth_the_first_run_is_what_others_are_compared_with(scenes: Scenes, model: LoadedModel):
    layouts = layouts_named(["dense", "core-2-evenly", f"core-{FRAMES}-evenly"], TokenSimilarity)
    dense, sparse, full = run_layouts(model, scenes.images[0], layouts, rounds=1)
    for same in (dense, full):
        assert same.auc30 == 1 and same.scores["ate"] < 1e-3 and same.scores["absrel"] < 1e-4
    assert sparse.scores["absrel"] > 10 * full.scores["absrel"] and 1e-3 < sparse.scores["ate"] <= 1
    assert dense.scores["scale_ratio"] == pytest.approx(1)


def test_the_unit_of_a_run_is_the_extent_of_its_cameras(scenes: Scenes):
    poses, depth = scenes.poses[0].double(), scenes.depth[0]
    reference = Reference.of_run(poses, depth)
    moved = poses.clone()
    moved[:, :3, 3] = poses[:, :3, 3].mean(0)  # no cameras: off by the whole extent
    assert reference.scores(moved, depth)["ate"] == pytest.approx(1)
    assert Reference.of_run(100 * poses, depth).poses[:, :3, 3] == pytest.approx(reference.poses[:, :3, 3])
    with pytest.raises(ValueError, match="must be finite"):
        Reference.of_run(poses / 0, depth)


def test_only_known_frames_are_scored_and_all_are_moved(scenes: Scenes):
    poses, depth = scenes.poses[0].double(), scenes.depth[0]
    known = [1, 2, 5, 6]
    truth = Reference(poses[known], depth[known], known)
    spoiled = poses.clone()
    spoiled[3] = 1e3
    scores = truth.scores(spoiled, depth)
    assert scores["auc30"] == 1 and scores["absrel"] == 0
    torch.testing.assert_close(truth.aligned(spoiled)[known], poses[known])
    first = truth.first(3)
    assert first.frames == [1, 2] and len(first.poses) == len(first.depth) == 2
    assert truth.aligned(poses / 0).isnan().any()


def test_names_are_read_before_anything_is_loaded():
    def load() -> TokenSimilarity:
        raise AssertionError("nothing was to be loaded")

    with pytest.raises(ValueError, match=r"must be called dense, .* got 'core-0'"):
        layouts_named(["core-3", "core-0"], load)
    evenly, dense = layouts_named(["core-3-evenly", "dense"], load)
    assert evenly.covisibility == Core(3, by=None) and dense == DENSE
    covering, nearest = layouts_named(["core-3-covering", "nearest-4"], TokenSimilarity)
    assert covering.covisibility == Core(3, by=TokenSimilarity(), choice="covering")
    assert nearest.covisibility == TokenSimilarity(neighbours=4)
