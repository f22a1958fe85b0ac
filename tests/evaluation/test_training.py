"""Training of the small model: targets, losses, optimisers, a few steps, and sessions that continue exactly."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation import train
from evaluation.__main__ import main
from evaluation.measuring import SceneSet
from evaluation.training import curriculum
from evaluation.training.batches import Batches
from evaluation.training.losses import camera_losses, depth_loss, match_loss, total_loss
from evaluation.training.network import TrainingNetwork
from evaluation.training.optimisers import Optimiser, orthogonalised
from evaluation.training.schedule import Progress, match_factor, rate_factor
from evaluation.training.truth import Truth
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.scenes import Draws, Scenes, make_scenes

SIZE = (28, 42)
SIZES = {"dim": 32, "depth": 2, "num_heads": 2}
WORDS = "--frames 6 --dim 32 --depth 2 --heads 2 --height 28 --width 42 --scenes 1 --device cpu".split()


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Two scenes of three frames, all connected."""
    return make_scenes(2, 3, Draws(0), families="walk", rooms=1, difficulty=0.0, size=SIZE)


@pytest.fixture(scope="module")
def truth(scenes: Scenes) -> Truth:
    truth = Truth.of(scenes, 14)
    assert truth.connected.all()
    return truth


def estimates(truth: Truth) -> torch.Tensor:
    """The unconstrained numbers of the true cameras, `[1, B, S, 11]`."""
    axes = truth.rotation.mT[..., :2, :].flatten(-2)
    return torch.cat([truth.centre, axes, truth.half_view.log()], -1)[None]


def test_targets_are_in_the_axes_of_frame_0(truth: Truth):
    eye = torch.eye(3).expand(2, 3, 3)
    torch.testing.assert_close(truth.rotation[:, 0], eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(truth.centre[:, 0], torch.zeros(2, 3), atol=1e-5, rtol=0)
    assert truth.points.norm(dim=-1).mean().item() == pytest.approx(1, abs=0.02)
    # The middle pixel of each patch, lifted by depth and camera, is the point.
    depth = truth.log_depth.exp()[:, :, 7::14, 7::14].flatten(2)
    rows, columns = torch.meshgrid(torch.arange(7, 28, 14), torch.arange(7, 42, 14), indexing="ij")
    y = (rows.flatten() - 13.5) / 14 * truth.half_view[0, 0, 0]
    x = (columns.flatten() - 20.5) / 21 * truth.half_view[0, 0, 1]
    local = torch.stack([x, y, torch.ones(6)], -1) * depth[0, ..., None]
    world = local @ truth.rotation[0].mT + truth.centre[0, :, None]
    torch.testing.assert_close(world, truth.points[0], atol=1e-4, rtol=1e-4)


def test_true_cameras_have_no_loss_and_wrong_ones_have(truth: Truth):
    right = estimates(truth)
    for name, loss in camera_losses(right, truth).items():
        assert loss.item() < 0.01, name
    moved, turned, wide = right.clone(), right.clone(), right.clone()
    moved[..., 1, 0] += 0.3
    turned[..., 1, 3:6] += 0.3
    wide[..., 9] += 0.3
    both = camera_losses(torch.cat([right, moved]), truth)
    assert both["centre"][1] > both["centre"][0] + 0.05 and both["pair_translation"][1] > 0.05
    assert camera_losses(turned, truth)["rotation"] > 0.05 and camera_losses(turned, truth)["pair_rotation"] > 0.05
    assert camera_losses(wide, truth)["view"].item() == pytest.approx(0.15, abs=0.01)


def test_frames_that_nothing_connects_have_no_pose_loss(truth: Truth):
    connected = truth.connected.clone()
    connected[:, 2] = 0
    alone, wrong = replace(truth, connected=connected), estimates(truth)
    wrong[..., 2, :9] += 1
    for name in ("rotation", "centre", "pair_rotation", "pair_translation"):
        assert camera_losses(wrong, alone)[name] < 0.01 < camera_losses(wrong, truth)[name], name


def test_depth_is_trusted_where_it_is_right(truth: Truth):
    shape = truth.log_depth.shape
    little, much = torch.full(shape, 1.1), torch.full(shape, 4.0)
    exact, wrong = truth.log_depth, truth.log_depth + torch.rand(shape, generator=torch.Generator().manual_seed(0))
    assert depth_loss(exact, much, exact)[0] < depth_loss(exact, little, exact)[0] < 0
    assert depth_loss(wrong, much, exact)[0] > depth_loss(wrong, little, exact)[0] > 0.4
    assert depth_loss(wrong, much, exact)[1].item() == pytest.approx(0.5, abs=0.02)


def test_keys_that_name_their_point_match(truth: Truth):
    """Queries and keys that point to the patch that shows the point, against random ones."""
    generator = torch.Generator().manual_seed(0)
    batch, frames, patches, _ = truth.seen.shape
    keys = torch.randn(batch, frames, patches, 128, generator=generator)
    queries = torch.zeros_like(keys)
    for scene, frame, patch, other in truth.seen.nonzero().tolist():
        if frame != other:
            queries[scene, frame, patch] += 0.5 * keys[scene, other, truth.patch[scene, frame, patch, other]]
    loss, hits = match_loss([(queries, keys)], truth, Draws(0))
    random_loss, random_hits = match_loss([(torch.randn_like(keys), keys)], truth, Draws(0))
    assert hits > 0.95 > 0.4 > random_hits and loss < 1.5 < 2 < random_loss


def test_muon_makes_singular_values_alike():
    x = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 16)
    values = torch.linalg.svdvals(orthogonalised(x))
    assert values.max() < 1.3 and values.median() > 0.6


def test_matching_uses_the_attention_of_the_model(scenes: Scenes):
    """The queries and keys that are taught are those that head 0 of the global block attends with."""
    network = TrainingNetwork(RoomsModel.create(**SIZES))
    attn = network.model.aggregator.global_blocks[1].attn
    seen = []
    attn.rope.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        ((q, k),) = network(scenes.images, True).matched
    used_q, used_k = (x[:, 0].unflatten(1, (3, -1))[:, :, 5:] for x in seen[6:8])
    torch.testing.assert_close(q, used_q)
    torch.testing.assert_close(k, used_k)


def test_a_few_steps_lower_the_loss(scenes: Scenes, truth: Truth):
    network = TrainingNetwork(RoomsModel.create(**SIZES)).train()
    optimiser = Optimiser(network, matrix_rate=0.01, rate=1e-3)
    losses = []
    for _ in range(4):
        loss, _ = total_loss(network(scenes.images, True), truth, 0.25, Draws(0))
        losses.append(loss.item())
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimiser.step(1.0)
    assert losses[3] < losses[0] - 0.1, losses


def test_a_step_without_finite_gradients_changes_little():
    network = torch.nn.Linear(3, 2)
    optimiser = Optimiser(network, 0.01, 1e-3)
    before = network.weight.detach().clone()
    (network(torch.ones(1, 3)).sum() * float("inf")).backward()
    assert not optimiser.step(1.0).isfinite()
    torch.testing.assert_close(network.weight.detach(), before, atol=1e-4, rtol=1e-4)


def options(folder: Path, *words: str) -> object:
    import argparse

    parser = argparse.ArgumentParser()
    train.add_parser(parser.add_subparsers())
    return parser.parse_args(["train", "--run", str(folder), *WORDS, *words])


def test_a_session_continues_exactly(tmp_path: Path):
    whole = train.Training(options(tmp_path / "whole", "--steps", "4"))
    losses = [whole.step()["loss"] for _ in range(4)]
    first = train.Training(options(tmp_path / "parts", "--steps", "4"))
    parts = [first.step()["loss"] for _ in range(2)]
    first.save()
    second = train.Training(options(tmp_path / "parts", "--steps", "4"))
    second.load(tmp_path / "parts" / train.CHECKPOINT)
    parts += [second.step()["loss"] for _ in range(2)]
    assert torch.equal(torch.stack(parts), torch.stack(losses))
    assert (second.progress.step, second.progress.frames) == (4, 24)
    for mine, other in ((second.network, whole.network), (second.mean, whole.mean)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))


def test_the_command_writes_weights_and_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    sets = (SceneSet("room", 1, 3), SceneSet("rotation", 1, 3))
    monkeypatch.setattr(train, "AT_THE_END", sets)
    command = ["train", "--run", str(tmp_path / "run"), *WORDS, "--steps", "2"]
    assert main([*command, "--session", "0"]) == 0
    assert "continue with --resume" in capsys.readouterr().out
    assert main(command) == 2
    assert "say --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    facts = json.loads((tmp_path / "run" / train.PROVENANCE).read_text())
    assert facts["steps"] == 2 and facts["frames"] == 12 and facts["seed"] == 0 and "--resume" in facts["command"]
    metrics = facts["metrics"]["room-1r-3f"]
    assert {"auc3", "auc5", "auc15", "auc30", "absrel", "ate"} <= set(metrics)
    still = set(facts["metrics"]["rotation-1r-3f"])
    moving = {"auc3", "auc5", "auc15", "auc30", "ate", "rpe_translation", "translation_median"}
    assert set(metrics) - still == moving | {"camera_scale", "scale_ratio"}
    low, high = metrics["absrel"][1:]
    assert low <= metrics["absrel"][0] <= high
    model = RoomsModel.trained(tmp_path / "run" / train.WEIGHTS)
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 3
    assert main([*command, "--resume", "--dim", "16"]) == 2
    assert "of a training with other sizes" in capsys.readouterr().err


def test_a_batch_is_a_function_of_seed_and_step():
    def batch(step: int, seed: int = 0, ahead: bool = False) -> torch.Tensor:
        batches = Batches(seed, 6, (2, 8), SIZE, 14, torch.device("cpu"))
        if ahead:
            batches.draw_ahead(step, 0.5)
        drawn = batches.draw(step, 0.5)
        assert torch.equal(drawn.truth.log_depth.isfinite(), torch.ones_like(drawn.truth.log_depth).bool())
        return drawn.images.flatten()

    assert torch.equal(batch(3), batch(3)) and torch.equal(batch(3), batch(3, ahead=True))
    drawn = [batch(step, seed) for step, seed in ((3, 0), (4, 0), (3, 1))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_schedules():
    assert rate_factor(0.0, 0) < 0.01 and rate_factor(0.3, 1000) == 1
    assert rate_factor(0.7, 1000) == pytest.approx(0.505) and rate_factor(1.0, 1000) == pytest.approx(0.01)
    assert [match_factor(share) for share in (0.2, 0.5, 0.625, 0.75, 1.0)] == [1, 1, 0.5, 0, 0]
    assert Progress(None, 10, step=5).share() == 0.5
    assert 0.5 < Progress(100.0, None, elapsed=50.0).share() < 0.6
    with pytest.raises(ValueError, match="seconds or steps"):
        Progress(None, None)


def test_batches_get_longer(monkeypatch: pytest.MonkeyPatch):
    import random

    seen: dict[float, set[int]] = {}
    monkeypatch.setattr(curriculum, "make_scenes", lambda batch, frames, draws, **options: (batch, frames))
    for progress in (0.0, 0.3, 0.9):
        host = random.Random(0)
        drawn = [curriculum.draw_batch(progress, 96, (2, 48), SIZE, host, Draws(0)) for _ in range(200)]
        assert {batch * frames for batch, frames in drawn} == {96}
        seen[progress] = {frames for _, frames in drawn}
    assert max(seen[0.0]) == 8 and max(seen[0.3]) == 24 and max(seen[0.9]) == 48
    with pytest.raises(ValueError, match=r"none of these is from 1 to 1 and divides the 96"):
        curriculum.draw_batch(0.0, 96, (1, 1), SIZE, random.Random(0), Draws(0))
