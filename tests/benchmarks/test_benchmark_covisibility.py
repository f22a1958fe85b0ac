"""The comparison of covisibility sources counts what it says it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from benchmarks import covisibility, record
from svggt_kernels import CovisibilityGraph


def test_recall_at_a_density():
    """Of six pairs two are true; the best three by score hold one of them."""
    scores = torch.zeros(4, 4, dtype=torch.float64)
    scores[0, 1], scores[3, 2], scores[1, 3] = 3, 2, 1  # one direction is enough
    truth = torch.zeros(4, 4, dtype=torch.bool)
    truth[2, 3] = truth[3, 2] = truth[0, 2] = truth[2, 0] = True
    assert covisibility.recall_at(scores, truth, 0.5) == 0.5
    assert covisibility.recall_at(scores, truth, 1 / 6) == 0
    assert covisibility.recall_at(scores, truth, 1) == 1


def test_lines_hold_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny.megaloc()
    monkeypatch.setattr(covisibility.MegaLoc, "random_init", lambda: model)
    words = {
        "graph": ["--frames", "70", "100"],
        "describe": ["--images", "3", "--size", "42", "--batch-size", "2", "--dtype", "bf16"],
    }
    for case, given in words.items():
        assert covisibility.main([case, *given, "--output", str(tmp_path / "lines")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["case"] for line in lines] == ["graph", "graph", "describe"]
    for line in lines:
        assert tuple(line) == covisibility.KEYS[line["case"]]
        assert line["check"] == "passed" and line["seconds"] > 0
    assert [line["bridges"] for line in lines[:2]] == [1, 2]
    assert lines[2]["command"].startswith("python -m benchmarks.covisibility describe")


def test_decoding_is_timed(tmp_path: Path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for name in "ab":
        image.new("RGB", (64, 48)).save(tmp_path / f"{name}.jpg")
    assert covisibility.main(["decode", "--photos", str(tmp_path), "--output", str(tmp_path / "lines")]) == 0
    line = json.loads((tmp_path / "lines").read_text())
    assert tuple(line) == covisibility.KEYS["decode"]
    assert (line["photos"], line["height"], line["width"]) == (2, 238, 322)


def test_a_missed_neighbour_is_a_fault():
    descriptors = covisibility.clustered(70, torch.device("cpu"))
    assert covisibility.fault_of_graph(CovisibilityGraph.from_descriptors(descriptors), descriptors) is None
    fewer = CovisibilityGraph.from_descriptors(descriptors, neighbours=9, anchors=0)
    assert "nearest neighbours are not seen" in str(covisibility.fault_of_graph(fewer, descriptors))
    apart = CovisibilityGraph.from_pairs(70, [])
    assert covisibility.fault_of_graph(apart, descriptors) == "the graph is not connected"


def test_wrong_descriptors_are_a_fault():
    model = tiny.megaloc().bfloat16()
    images = torch.randint(0, 256, (3, 3, tiny.SIZE, tiny.SIZE), dtype=torch.uint8)
    described = model.describe(images, size=tiny.SIZE)
    assert covisibility.fault_of_descriptors(model, images, described) is None
    assert "are off by" in str(covisibility.fault_of_descriptors(model, images, described.flip(0)))
    assert "are off by" in str(covisibility.fault_of_descriptors(model, images, described * torch.nan))


def test_a_fault_takes_the_time_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(covisibility, "fault_of_graph", lambda graph, descriptors: "wrong")
    assert covisibility.main(["graph", "--frames", "40", "--output", str(tmp_path / "lines")]) == 1
    line = json.loads((tmp_path / "lines").read_text())
    assert (line["seconds"], line["check"], line["reason"]) == (None, "failed", "wrong")


def test_timing_needs_no_more_than_torch(tmp_path: Path):
    """A machine that only measures has no packages for photos, weights or pictures."""
    program = (
        "import sys\n"
        "packages = 'PIL matplotlib rich safetensors huggingface_hub tqdm pycolmap av depth_anything_3'\n"
        "sys.modules.update(dict.fromkeys(packages.split()))\n"
        "from benchmarks.covisibility import main\n"
        f"sys.exit(main(['graph', '--frames', '40', '--output', {str(tmp_path / 'lines')!r}]))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=record.ROOT, capture_output=True)
