"""`sweep` runs each layout against dense or the truth, says which to take, and refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import walks
from commands import files_of
from walks import Walk

from svggt_kernels.cli import main
from svggt_kernels.cli import sweep as command
from svggt_kernels.io.photos import load_photos
from svggt_kernels.measure.layouts import Reference
from svggt_kernels.models import loading

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("PIL.Image", reason="Pillow is not installed")

TOY = ("--model", "toy", "--device", "cpu", "--long-side", "42", "--covisibility", "tokens", "--repeats", "1")
LAYOUTS = ("--layouts", "core-2", "core-3-evenly", "nearest-1")


@pytest.fixture
def walk(tmp_path: Path) -> Walk:
    return walks.walk(tmp_path)


def sweep(tmp_path: Path, *words: object) -> dict:
    output = tmp_path / "output"
    assert main([str(word) for word in ("sweep", tmp_path / "images", *TOY, "--output", output, *words)]) == 0
    assert {file.name for file in output.iterdir()} == set(files_of("sweep"))
    assert (output / "trade-offs.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((output / "report.json").read_text())


def test_against_dense(tmp_path: Path, walk: Walk, capsys: pytest.CaptureFixture[str]):
    report = sweep(tmp_path, *LAYOUTS, "core-6")
    dense, core, evenly, nearest, full = report["layouts"]
    assert [x["layout"] for x in report["layouts"]] == ["dense", "core-2", "core-3-evenly", "nearest-1", "core-6"]
    assert (dense["auc30"], dense["pairs"], dense["frame_pairs"]) == (1, 1, 36) and dense["absrel"] < 1e-6
    for facts in (core, evenly, nearest):
        assert facts["absrel"] > 1e-6 and facts["auc5"] <= facts["auc30"] <= 1 and facts["ms"] > 0
    assert core["pairs"] == pytest.approx((2 * 2 + 4 * 3) / 36) and core["frame_pairs"] == 16
    assert report["truth"] is None and report["photos"] == [photo.name for photo in walk.photos]
    assert "extent of dense's cameras" in report["unit_of_ate"]
    said = capsys.readouterr().out
    assert full["pairs"] == 1 and said.count("of so few photos that is all, so it computes what dense does") == 1
    assert report["advice"] in said and "against dense; ATE is in the extent" in said and report["warning"] in said


def test_against_the_truth(tmp_path: Path, walk: Walk, capsys: pytest.CaptureFixture[str]):
    truth = walks.as_transforms(tmp_path / "transforms.json", walk)
    report = sweep(tmp_path, *LAYOUTS, "--truth", truth, "--max-frames", 5)
    model = loading.load_model("toy", None, torch.device("cpu"))
    outputs = model(load_photos(walk.photos[:5], long_side=42))
    expected = Reference(walk.poses[:5], walk.depth[:5]).scores(model.kind.cameras(outputs), outputs["depth"])
    assert {key: report["layouts"][0][key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert report["truth"]["depth_maps"] == 5 and report["unit_of_ate"] == "the unit of the truth"
    said = capsys.readouterr().out
    assert "poses of 5 of 5 photos, depth maps of 5" in said and "against the truth" in said


@pytest.mark.filterwarnings("default:memory ran out")
def test_memory_that_runs_out_is_said(
    tmp_path: Path, walk: Walk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = loading.LoadedModel.__call__

    def limited(model: loading.LoadedModel, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(frames) > 4:
            raise torch.OutOfMemoryError
        return run(model, frames)

    monkeypatch.setattr(loading.LoadedModel, "__call__", limited)
    report = sweep(tmp_path, "--layouts", "core-2", "--truth", walks.as_kitti(tmp_path / "poses.txt", walk))
    assert (report["frames"], report["photos_given"], report["truth"]["scored_pairs"]) == (3, 6, 3)
    captured = capsys.readouterr()
    assert "memory ran out with 6 frames; all runs again with the first 3" in captured.err
    assert "Memory ran out with all 6 photos: these are the first." in captured.out and "3 photos of 42" in captured.out


def test_refusals(tmp_path: Path, walk: Walk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def refusal(*words: object) -> str:
        assert main([str(word) for word in ("sweep", tmp_path / "images", *TOY, *words)]) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(command, "load", None)  # all is refused before a model is loaded
    assert "needs more photos than that, got 6" in refusal()
    assert "must be called dense, core-K, " in refusal("--layouts", "core-2", "window-3")
    assert "give --depth too" in refusal("--depth-scale", 2)
    assert "--depth belongs to --truth" in refusal("--layouts", "core-2", "--depth", tmp_path)
    assert "does not go with --covisibility tokens" in refusal("--megaloc", tmp_path / "none")
    message = refusal("--covisibility", "megaloc", "--megaloc", tmp_path / "none", "--layouts", "core-2")
    assert "none" in message and "MegaLoc" in message
