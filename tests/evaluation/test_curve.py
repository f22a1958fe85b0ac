"""From scenes and layouts to result lines, to a table and a figure; what is measured is not measured again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import curve, running
from evaluation.__main__ import main
from evaluation.figure import draw
from evaluation.layouts import named
from evaluation.measuring import SceneSet
from evaluation.results import IDENTITY, METRICS, SECTION, read_results, sections
from evaluation.table import markdown
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.weights import write_weights
from svggt_kernels.demo.scenes import HELD_OUT

RESULTS = Path(curve.__file__).parent / "results"
COMMON = "--scenes 2 --frames 4 --size 28 42 --device cpu".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.npz"
    model = RoomsModel.create(dim=32, depth=1, num_heads=2)
    write_weights(path, model.state_dict(), model.sizes)
    return path


@pytest.fixture(scope="module")
def results(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of two kinds of scenes and three layouts."""
    path = tmp_path_factory.mktemp("results") / "folder" / "curve.jsonl"
    words = ["--families", "walk", "rotation", "--rooms", "2", "--layouts", "dense", "core-2", "own"]
    assert measure(path, weights, *words) == 0
    return path


def measure(path: Path, weights: Path, *words: str) -> int:
    return main(["curve", "--output", str(path), "--weights", str(weights), *COMMON, *words])


def test_a_line_holds_what_is_needed_to_make_it_again(results: Path, weights: Path):
    lines = read_results(results)
    assert [(line["family"], line["scene"], line["layout"]) for line in lines] == [
        (family, scene, layout)
        for scene in (0, 1)
        for family in ("walk", "rotation")
        for layout in ("dense", "core-2", "own")
    ]
    line = lines[1]
    per_frame = 5 + 2 * 3
    assert line["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (line["pairs"], line["dense_pairs"]) == (per_frame**2 * (2 * 2 + 2 * 3), (4 * per_frame) ** 2)
    assert (line["seed"], line["height"], line["width"], line["precision"]) == (0, 28, 42, "float32")
    assert line["backend"] is not None and lines[0]["backend"] is None and line["seconds"] > 0
    assert line["command"].startswith("python -m evaluation curve --weights") and "--output" not in line["command"]
    assert set(line["metrics"]) == set(METRICS)
    assert {"commit", "device", "torch", "run", "date"} <= set(line)
    assert set(METRICS) - set(lines[3]["metrics"]) == {
        *(
            "auc3",
            "auc5",
            "auc15",
            "auc30",
            "translation_median",
            "ate",
            "rpe_translation",
            "camera_scale",
            "scale_ratio",
        )
    }


def test_what_is_there_is_not_measured_again(results: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    before, drawn = results.read_text(), []
    draw = SceneSet.draw
    monkeypatch.setattr(SceneSet, "draw", lambda self, *args: drawn.append(self.name) or draw(self, *args))
    assert measure(results, weights, "--rooms", "2", "--layouts", "own", "dense") == 0
    assert results.read_text() == before and drawn == []
    assert "0 measured, 12 were there" in capsys.readouterr().out
    # Another layout of scenes that are there: rendered again, and added.
    assert measure(results, weights, "--rooms", "2", "--layouts", "dense", "core-3", "--scenes", "1") == 0
    lines = read_results(results)
    assert drawn == ["walk-2r-4f"] and len(lines) == 13 and lines[12]["layout"] == "core-3"
    results.write_text(before)
    # Other scenes, another size or other weights are something else.
    assert running.scene_seed(SceneSet("walk", 2, 4), 0, 1) != running.scene_seed(SceneSet("walk", 2, 4), 1, 0)
    assert {"scene", "layout", "seed", "height", "weights", "device"} <= set(IDENTITY)


def test_a_scene_does_not_depend_on_what_else_is_measured(results: Path, weights: Path, tmp_path: Path):
    alone = tmp_path / "alone.jsonl"
    assert measure(alone, weights, "--rooms", "2", "--layouts", "core-2") == 0
    again = [line["metrics"] for line in read_results(alone)]
    of_both = [x["metrics"] for x in read_results(results) if (x["family"], x["layout"]) == ("walk", "core-2")]
    assert again == of_both and again[0] != again[1]


def test_a_session_ends_and_continues(weights: Path, tmp_path: Path, capsys):
    path = tmp_path / "parts.jsonl"
    assert measure(path, weights, "--rooms", "2", "--layouts", "own", "--session", "0") == 0
    assert not path.exists() and "the same command continues" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "core"], "is no layout"),
        (["--rooms", "5"], "held-out family"),
        (["--held-out", "--rooms", "8"], "held-out family"),
        (["--frames", "1"], "2 frames or more"),
        (["--weights", "none.npz"], "there are no trained weights at none.npz"),
    ],
)
def test_wrong_requests_are_refused(words: list[str], message: str, weights: Path, tmp_path: Path, capsys):
    assert measure(tmp_path / "none.jsonl", weights, *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "none.jsonl").exists()


def test_the_held_out_family_is_measured_only_where_it_is_asked_for(weights: Path, tmp_path: Path):
    with pytest.raises(SystemExit):
        measure(tmp_path / "none.jsonl", weights, "--families", HELD_OUT)
    assert measure(tmp_path / "held.jsonl", weights, "--held-out", "--layouts", "own", "--scenes", "1") == 0
    (line,) = read_results(tmp_path / "held.jsonl")
    assert (line["family"], line["rooms"]) == (HELD_OUT, 7)


# Tables and figures


def result(layout: str, scene: int, pairs: int, **metrics: float) -> dict:
    """A line as curve writes it."""
    line = {key: 0 for key in (*IDENTITY, *SECTION)}
    line |= {"family": "walk", "rooms": 8, "frames": 24, "weights": "abcdef" * 10, "device": "a device"}
    line |= {"layout": layout, "scene": scene, "pairs": pairs, "dense_pairs": 100, "seconds": 0.25, "commit": "c0ffee"}
    return line | {"metrics": {"auc30": 0.0, "ate": 0.0, **metrics}}


def test_means_and_paired_differences_by_hand():
    """Scenes differ much, layouts by 0.1 on each: the difference is certain, the mean is not."""
    scenes = [i / 20 for i in range(20)]
    lines = [result("core-8", i, 36, auc30=auc - 0.1, ate=auc) for i, auc in enumerate(scenes)]
    lines += [result("dense", i, 100, auc30=auc, ate=auc + (-1) ** i) for i, auc in enumerate(scenes)]
    (section,) = sections(lines)
    assert list(section.layouts) == ["dense", "core-8"] and section.scenes == 20
    mean = section.interval("dense", "auc30")
    assert mean.mean == pytest.approx(0.475) and mean.high - mean.low > 0.2
    difference = section.difference("core-8", "auc30")
    assert difference[:3] == pytest.approx((-0.1,) * 3) and difference.scenes == 20
    assert section.interval("core-8", "pairs").mean == pytest.approx(0.36)
    text = markdown(section, ["auc30", "ate", "absrel"])
    assert "### walk, 8 rooms, 24 frames" in text and "commit c0ffee" in text and "too few" not in text
    assert "| layout | pairs | AUC@30 | ATE, m | seconds | scenes |" in text and "AbsRel" not in text
    assert "| core-8 | 0.360 | 0.375 [" in text and text.count("| 0.250 | 20 |") == 2
    assert "| core-8 | **-0.100 [-0.100, -0.100]** | +0.000 [" in text
    ratio = section.ratio("core-8", "auc30")
    assert ratio.mean == pytest.approx(0.375 / 0.475) and 0.6 < ratio.low < ratio.high < 0.9
    text = markdown(section, ["auc30"], ratio=True)
    assert "Ratio to dense on the same scenes; bold where the interval leaves 1 out" in text
    assert "| core-8 | **0.79 [0." in text
    text = markdown(section, ["auc30"], base="core-8")
    assert "Difference from core-8 on" in text and "| dense | **+0.100 [+0.100, +0.100]** |" in text


def test_differences_are_over_shared_scenes_and_few_scenes_are_said():
    lines = [result("dense", i, 100, auc30=0.5) for i in (0, 1)]
    lines += [result("own", i, 10, auc30=0.5 - i / 10) for i in (1, 2, 3)]
    (section,) = sections(lines)
    assert section.difference("own", "auc30").mean == pytest.approx(-0.1)
    assert section.difference("own", "auc30").scenes == 1
    text = markdown(section, ["auc30"])
    assert "**Only 2 scenes: too few for a claim, which takes 20.**" in text and "**-0.1" not in text
    (section,) = sections(lines[2:])
    assert section.difference("own", "auc30") is None
    (section,) = sections([*lines[2:], result("core-2", 1, 20)])
    assert "dense was not measured" in markdown(section, ["auc30"])


def test_kinds_of_scenes_models_and_devices_are_not_mixed():
    lines = [result("dense", 0, 100), {**result("dense", 0, 100), "weights": "other"}]
    lines += [{**result("dense", 0, 100), "frames": 96}, {**result("dense", 0, 100), "seed": 1}]
    assert [len(section.layouts["dense"]) for section in sections(lines)] == [2, 1, 1]


def test_table_and_figure_of_a_run(results: Path, tmp_path: Path, capsys):
    assert main(["table", str(results), "--metrics", "all", "--median"]) == 0
    walk, rotation = capsys.readouterr().out.split("### ")[1:]
    assert "AUC@3 " in walk and "accuracy" in rotation and "AUC@3 " not in rotation and "Medians" in walk
    assert main(["figure", str(results), "--output", str(tmp_path / "curve.png"), "--metrics", "auc30", "absrel"]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_no_label_of_a_figure_covers_another_or_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figure = pytest.importorskip("matplotlib.figure", reason="the figure needs matplotlib")
    figures = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda drawn, file, **options: figures.append(drawn))
    lines = [result("dense", 0, 100, auc30=0.9)]
    for size in (8, 20, 21, 22, 23, 60):
        for kind, better in (("core-{}", 0.0), ("core-{}-covering", 0.002)):
            lines.append(result(kind.format(size), 0, size, auc30=size / 100 + better))
    draw(sections(lines), ["auc30"], ["pairs"], tmp_path / "curve.png")
    (panel,) = figures[0].axes
    shown = [label for label in panel.texts if label.get_visible()]
    assert {"8", "20", "60"} <= {label.get_text() for label in shown} < {"8", "20", "21", "22", "23", "60"}
    boxes = [label.get_window_extent() for label in shown]
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)  # itself
    places = [(line["pairs"] / 100, line["metrics"]["auc30"]) for line in lines]
    points = panel.transData.transform(np.array(places))
    assert not any(box.contains(*point) for box in boxes for point in points)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda file: file.name)
def test_result_lines_of_the_repository_can_be_read(file: Path):
    for line in read_results(file):
        assert named(line["layout"]).name == line["layout"] and set(line["metrics"]) <= set(METRICS)
        assert not line["commit"].endswith("-dirty") and "unknown" not in line["commit"]


def test_files_of_something_else_are_refused(tmp_path: Path, results: Path, capsys):
    assert main(["table", str(tmp_path / "none.jsonl")]) == 2
    assert "there is none; `curve --output" in capsys.readouterr().err
    broken = tmp_path / "broken.jsonl"
    broken.write_text(results.read_text() + '{"family": "wa')
    assert main(["table", str(broken)]) == 2
    assert f"line 13 of {broken} must be a result line" in capsys.readouterr().err
    broken.write_text(json.dumps({"case": "band"}) + "\n")
    assert main(["table", str(broken)]) == 2
    assert "lacks family" in capsys.readouterr().err


def test_what_is_not_finite_is_refused(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    predict = running.predict

    def broken(model: torch.nn.Module, images: torch.Tensor) -> object:
        prediction = predict(model, images)
        prediction.depth.fill_(torch.nan)
        return prediction

    monkeypatch.setattr(running, "predict", broken)
    assert measure(tmp_path / "none.jsonl", weights, "--rooms", "2", "--layouts", "own") == 2
    assert "must be finite, and is not: own on walk-2r-4f" in capsys.readouterr().err
