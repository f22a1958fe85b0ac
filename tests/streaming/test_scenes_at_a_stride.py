"""Scenes that keep, beside the core, frames at a stride: what one forward of all frames gives, however they come."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closed_core import joint
from doubles import FAMILY, HEIGHT, PATCH, WIDTH, StreamVGGT, images
from doubles import vggt as double_of_vggt
from tiers import every
from torch import Tensor, nn

from svggt_kernels import CoarseGraph, Core, OpenScene, open_saved_scene, open_scene, patch
from svggt_kernels.coarse import patches_seen
from svggt_kernels.demo.model import RoomsModel

pytestmark = pytest.mark.filterwarnings("ignore:.* may share nothing with the core:UserWarning")  # random weights

CORE = Core(3, by=None, coarse=2, stride=2)
IN_FULL, AT_A_STRIDE = (0, 4, 9), (2, 7)
FRAMES = torch.rand(10, 3, 42, 56, generator=torch.Generator().manual_seed(0)).double()


def toy() -> nn.Module:
    """Two gains, so that attention in its camera head matters."""
    model = RoomsModel.create(0, dim=64, depth=2, num_heads=1).double()
    with torch.no_grad():
        for block in model.camera_head.trunk:
            block.attn.q_norm.weight.fill_(3.0)
        model.camera_head.camera.weight.mul_(50)
    return model


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return double_of_vggt.VGGT().double().eval()


def weights(grid: tuple[int, int], first: int, last: int = 0) -> list[float]:
    """For how many tokens each token of a frame at stride 2 counts: of each 2 x 2 patches the last one."""
    rows, columns = grid
    seen = [(row % 2 == 1) and (column % 2 == 1) for row in range(rows) for column in range(columns)]
    return [1.0] * first + [len(seen) / sum(seen) if each else 0.0 for each in seen] + [1.0] * last


Case = tuple[Callable[[], nn.Module], Tensor, dict[str, object], dict[str, object]]
CASES: dict[str, Case] = {
    name: (
        double.create,
        images(10)[0],
        {"trailing": double.trailing, "weights": weights((HEIGHT // PATCH, WIDTH // PATCH), double.first, double.last)}
        | ({"ref_view_strategy": "first"} if name == "da3" else {}),
        {"feed": lambda frames: frames[None]},
    )
    for name, double in FAMILY.items()
    if double.record is not None
}
CASES["da3"][2]["weights"] = weights((HEIGHT // PATCH, WIDTH // PATCH), 1)
CASES["toy"] = (toy, FRAMES, {"weights": weights((3, 4), 5)}, {})
CASES["blocks-fused"] = (blocks, FRAMES, {"weights": weights((3, 4), 5)}, {"fused": True})


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) - {"apart"} == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-9)


def opened(
    name: str, core: Core | CoarseGraph = CORE, **options: object
) -> tuple[OpenScene, Tensor, dict[str, Tensor]]:
    """A scene, its frames, and what a joint forward gives them."""
    build, frames, of_joint, of_scene = CASES[name]
    expected = joint(build(), frames, IN_FULL, coarse=AT_A_STRIDE, **of_joint)
    return open_scene(build(), frames, core=core, **{**of_scene, **options}), frames, expected


@pytest.mark.parametrize("name", every(4, CASES))
def test_chunks_are_the_joint_forward_also_later_and_from_a_file(name: str, tmp_path: Path):
    scene, frames, expected = opened(name, chunk=3)
    assert (scene.core, scene.coarse) == (IN_FULL, AT_A_STRIDE)
    same(scene.predict(), expected)
    same(opened(name, chunk=10)[0].predict(), expected)
    closed = [*IN_FULL, *AT_A_STRIDE]
    same(scene.core_outputs, {name: tensor[closed] for name, tensor in expected.items()} | {})
    rest = [frame for frame in range(10) if frame not in closed]
    later = {name: tensor[rest] for name, tensor in expected.items()}
    same(scene.add(frames[rest]), later)
    for keys in (False, True):
        scene.save(tmp_path / "scene", keys=keys)
        again = open_saved_scene(copy.deepcopy(scene.session.model), tmp_path / "scene", **CASES[name][3])
        assert again.core_gib == scene.core_gib
        assert again.identity() == scene.identity()
        same(again.add(frames[rest]), later)


def test_of_frames_at_a_stride_what_is_seen_is_kept():
    scene, _, _ = opened("toy", chunk=2)
    depth, channels, iterations, trunk = 2, 64, 4, 2
    tokens = 3 * (5 + 3 * 4) + 2 * (5 + len(patches_seen((3, 4), 2)))
    assert scene.core_gib == 2 * 8 * channels * (depth * tokens + iterations * trunk * 5) / 2**30
    assert "core of 3 frames and 2 at stride 2" in repr(scene)


def test_a_graph_that_is_given():
    scene, _, expected = opened("toy", CoarseGraph.core(10, [9, 4, 0], AT_A_STRIDE, stride=2), chunk=3)
    assert (scene.core, scene.coarse, scene.closed.stride) == (IN_FULL, AT_A_STRIDE, 2)
    same(scene.predict(), expected)


def test_scenes_that_see_other_frames_at_a_stride_are_others():
    scenes = [opened("toy", core)[0] for core in (CORE, Core(3, by=None, coarse=2, stride=3), Core(5, by=None))]
    assert len({scene.identity() for scene in scenes}) == 3


def test_a_larger_core_is_behind_the_core_and_before_frames_at_a_stride():
    scene, frames, _ = opened("toy")
    larger = scene.extended(frames[[1]])
    assert (larger.closed.full, larger.closed.coarse) == (4, 2)
    expected = joint(toy(), frames, [*IN_FULL, 1], coarse=AT_A_STRIDE, **CASES["toy"][2])
    same(larger.add(frames[[3]]), {name: tensor[[3]] for name, tensor in expected.items()})


@pytest.mark.parametrize("by", every(2, ["tokens", "thumbnails", "patches"]))
def test_frames_are_chosen_as_a_patch_chooses_them(by: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("svggt_kernels.streaming.opening.CHUNK", 3)
    core, model = Core(3, by=by, coarse=2, stride=2), toy()
    scene = open_scene(model, FRAMES, core=core)
    with torch.no_grad(), patch(model, covisibility=core) as handle:
        model(FRAMES[None])
        graph = handle.graph
    assert isinstance(graph, CoarseGraph)
    assert (sorted(graph.full.core_frames.tolist()), graph.frames.tolist()) == (list(scene.core), list(scene.coarse))


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="whose `coarse` is a number"):
        open_scene(toy(), FRAMES, core=Core(3, by=None, coarse="all"))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"causal model .* must be seen in full"):
        open_scene(StreamVGGT().double().eval(), images(10)[0], core=CORE)
    with pytest.raises(ValueError, match="at least 2 frames in full, got 1"):
        open_scene(toy(), FRAMES, core=Core(1, by=None, coarse=3))
