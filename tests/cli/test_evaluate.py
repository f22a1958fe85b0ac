"""`evaluate` scores both runs against whatever the truth was written by, and refuses in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import walks
from commands import files_of
from walks import Walk

from svggt_kernels.cli import main
from svggt_kernels.io.photos import load_photos
from svggt_kernels.measure.scores import scene_scores
from svggt_kernels.models.loading import load_model

pytest.importorskip("PIL.Image", reason="Pillow is not installed")

TOY = ("--model", "toy", "--device", "cpu", "--long-side", "42", "--repeats", "1")
CHAIN = ("--covisibility", "sequential", "--window", "1")


@pytest.fixture
def walk(tmp_path: Path) -> Walk:
    return walks.walk(tmp_path)


def evaluate(tmp_path: Path, *words: object, graph: tuple[str, ...] = CHAIN) -> dict:
    output = tmp_path / "output"
    words = ("evaluate", tmp_path / "images", *TOY, *graph, "--output", output, "--force", *words)
    assert main([str(word) for word in words]) == 0
    assert {file.name for file in output.iterdir()} == set(files_of("evaluate"))
    return json.loads((output / "report.json").read_text())


def accuracy(report: dict) -> tuple[dict[str, float], dict[str, float]]:
    """The scores of dense, then of sparse."""
    cost = ("layout", "sees", "ms", "runs", "peak_mib", "pairs", "frame_pairs", "backend")
    dense, sparse = ({key: x for key, x in layout.items() if key not in cost} for layout in report["layouts"])
    return dense, sparse


def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: object) -> str:
    words = ("evaluate", tmp_path / "images", *TOY, *CHAIN, "--output", tmp_path / "output", *words)
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def of_model(photos: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Poses and depth of the model as it is."""
    model = load_model("toy", None, torch.device("cpu"))
    outputs = model(load_photos(photos, long_side=42))
    return model.kind.cameras(outputs), outputs["depth"]


def test_every_truth_gives_the_figures_of_what_was_rendered(
    tmp_path: Path, walk: Walk, capsys: pytest.CaptureFixture[str]
):
    truths = [
        walks.as_transforms(tmp_path / "transforms.json", walk),
        walks.as_colmap_text(tmp_path / "text", walk),
        walks.as_tum(tmp_path / "groundtruth.txt", walk, range(6)),
        walks.as_kitti(tmp_path / "poses.txt", walk),
    ]
    poses, depth = of_model(walk.photos)
    expected = scene_scores(poses, walk.poses, depth, walk.depth)
    for truth in truths:
        more = () if truth.suffix == ".json" else ("--depth", tmp_path / "depth")
        report = evaluate(tmp_path, "--truth", truth, *more)
        dense, sparse = accuracy(report)
        assert dense == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert sparse["rotation_median"] != dense["rotation_median"] and set(sparse) == set(dense)
        assert report["truth"]["scored_pairs"] == 15 and report["truth"]["depth_maps"] == 6
        assert report["truth"]["unscored_photos"] == [] and len(report["truth"]["scored_photos"]) == 6
        # Each sees its two neighbours and frame 0, and frame 0 sees all.
        assert report["layouts"][1]["frame_pairs"] == 6 + 10 + 8
    said = capsys.readouterr().out
    assert "poses of 6 of 6 photos, depth maps of 6" in said and "Over 15 pairs of photos" in said
    assert re.search(r"frame pairs in global attention +36 +24\n", said)
    for row in ("pose AUC@3", "pose AUC@30", "ATE", "RPE, translation", "AbsRel", "time", "peak memory"):
        assert row in said
    assert load_model("toy", None, torch.device("cpu")).warning in said


def test_all_visible_is_as_accurate_as_dense(tmp_path: Path, walk: Walk):
    file = walks.as_kitti(tmp_path / "poses.txt", walk)
    report = evaluate(tmp_path, "--truth", file, graph=("--covisibility", "all"))
    dense, sparse = accuracy(report)
    assert dense == pytest.approx(sparse, rel=1e-3) and "absrel" not in dense


def test_what_is_not_known_is_said(tmp_path: Path, walk: Walk, capsys: pytest.CaptureFixture[str]):
    truth = walks.as_transforms(tmp_path / "transforms.json", walk)
    stranger = walk.photos[1].rename(walk.photos[1].with_name("0.png"))
    report = evaluate(tmp_path, "--truth", truth)
    said = capsys.readouterr().out
    assert "poses of 5 of 6 photos, depth maps of 5" in said
    assert "Run but not scored, because their poses are not known: 0.png" in said
    assert "Not used, because they are of no photo here: 1 pose\n" in said
    assert report["truth"]["unscored_photos"] == ["0.png"] and report["truth"]["scored_pairs"] == 10
    assert report["frames"] == 6
    rest = [0, 2, 3, 4, 5]
    poses, depth = of_model([stranger, *(walk.photos[i] for i in rest)])
    expected = scene_scores(poses[1:], walk.poses[rest], depth[1:], walk.depth[rest])
    assert accuracy(report)[0] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_first_photos_of_a_data_set(tmp_path: Path, walk: Walk):
    for i, (photo, pose) in enumerate(zip(walk.photos, walk.poses.numpy(), strict=True)):
        photo.rename(photo.with_name(f"frame-{i:06d}.color.png"))
        np.savetxt(photo.with_name(f"frame-{i:06d}.pose.txt"), pose)
    report = evaluate(tmp_path, "--max-frames", 3)
    assert report["truth"]["scored_photos"] == [f"frame-{i:06d}.color.png" for i in range(3)]


def test_refusals(tmp_path: Path, walk: Walk, capsys: pytest.CaptureFixture[str]):
    file = walks.as_kitti(tmp_path / "poses.txt", walk)
    assert "give --truth: " in refusal(capsys, tmp_path)
    assert "must be known, but of 1 photo (" in refusal(capsys, tmp_path, "--truth", file, "--max-frames", 1)
    assert "does not exist" in refusal(capsys, tmp_path, "--truth", tmp_path / "nowhere")
    assert "give --depth too" in refusal(capsys, tmp_path, "--truth", file, "--depth-scale", 2)
    assert "must be above 0" in refusal(capsys, tmp_path, "--truth", file, "--depth", tmp_path, "--depth-scale", 0)
    assert "holds poses.txt" not in refusal(capsys, tmp_path, "--truth", file, "--depth", tmp_path)
    assert "does not go with --covisibility sequential" in refusal(capsys, tmp_path, "--truth", file, "--neighbours", 3)
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth" / "000000.npy", np.ones((9, 9)))
    message = refusal(capsys, tmp_path, "--truth", file, "--depth", tmp_path / "depth")
    assert "depth map of" in message and "9 x 9 pixels and the upright photo 42 x 28" in message
