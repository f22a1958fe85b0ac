"""`reconstruct` says what it did, goes on where it was stopped, and refuses in one sentence what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from walks import walk

from svggt_kernels.cli import main
from svggt_kernels.reconstruction import pipeline

SPARSE = ("--covisibility", "sequential", "--core", 3)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return walk(tmp_path / "walk").photos[0].parent


def run(photos: Path, output: Path, *words: object) -> int:
    common = ("--model", "toy", "--device", "cpu", "--export", "tum", "ply", *SPARSE, "--output", output)
    return main([str(word) for word in ("reconstruct", photos, *common, *words)])


def test_it_says_what_was_done(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(photos, tmp_path / "out", "--max-points", 100) == 0
    said = capsys.readouterr()
    assert "6 photos as frames of 154 x 112 px on" in said.out
    assert "Who sees whom: a core of 3 frames at equal distances; 58.3 % of the pairs of tokens" in said.out
    assert "Photos of 42 x 28 px were scaled to frames; at most 8.33 % of a photo was cut off (000000.png)" in said.out
    assert "nothing says how many metres it is" in said.out
    assert "trajectory.txt (trajectory, TUM), points.ply (points, PLY)" in said.out
    assert said.out.endswith("of photos depth and cameras mean little.\n")
    assert "reading 6 photos" in said.err
    assert "running toy on 6 frames" in said.err
    assert b"element vertex 100\n" in (tmp_path / "out/points.ply").read_bytes()
    assert run(photos, tmp_path / "out", "--max-points", 100) == 0
    assert "running" not in capsys.readouterr().err


def test_what_is_not_installed_is_left_out_and_said(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("svggt_kernels.reconstruction.formats.base.find_spec", lambda module: None)
    words = ("reconstruct", photos, "--model", "toy", "--device", "cpu", *SPARSE, "--output", tmp_path / "out")
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "Not written: sparse, which needs pycolmap: pip install 'svggt-kernels[colmap]'" in said
    assert "Not written: points.glb, which needs trimesh: pip install 'svggt-kernels[glb]'" in said
    assert not (tmp_path / "out/sparse").exists()
    assert "depth_file_path" in (tmp_path / "out/transforms.json").read_text()


def test_in_chunks_it_counts(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(photos, tmp_path / "out", "--chunk", 4) == 0
    said = capsys.readouterr()
    assert "  running toy on 6 frames, outputs: 4 of 6 frames, " in said.err
    assert "  running toy on 6 frames, outputs: 6 of 6 frames, 0 s left" in said.err
    assert "58.3 % of the pairs of tokens; backend " in said.out
    assert "; 4 photos at a time\n" in said.out


def refusal(capsys: pytest.CaptureFixture[str], photos: Path, output: Path, *words: object) -> str:
    assert run(photos, output, *words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


def test_another_reconstruction_needs_force(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(photos, tmp_path / "out") == 0
    capsys.readouterr()
    assert "another max_frames" not in refusal(capsys, photos, tmp_path / "out", "--max-frames", 4)
    assert run(photos, tmp_path / "out", "--max-frames", 4, "--force") == 0
    report = json.loads((tmp_path / "out/reconstruction.json").read_text())
    assert len(report["photos"]) == 4


def test_an_interrupt_keeps_what_is_finished(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write = pipeline.OutputFolder.export

    def interrupted(folder: pipeline.OutputFolder, name: str, *rest: object) -> object:
        if name == "ply":
            raise KeyboardInterrupt
        return write(folder, name, *rest)

    monkeypatch.setattr(pipeline.OutputFolder, "export", interrupted)
    assert run(photos, tmp_path / "out") == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("svggt-kernels reconstruct: interrupted; the same")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "reconstruction.npz",
        "reconstruction.json",
        "trajectory.txt",
    }


def test_fps_is_for_videos(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    message = refusal(capsys, photos, tmp_path / "out", "--fps", 2)
    assert "--fps is for videos, and" in message


def test_a_photo_alone(tmp_path: Path):
    (tmp_path / "one").mkdir()
    Image.effect_noise((308, 224), 60).convert("RGB").save(tmp_path / "one/1.png")
    assert run(tmp_path / "one", tmp_path / "out") == 0
    assert len((tmp_path / "out/trajectory.txt").read_text().splitlines()) == 2
