"""The study: its groups are measurable, a run goes on where it stopped, and parts of it make a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation import figure, groups
from evaluation.__main__ import main
from evaluation.groups import STUDY, Group, Part
from evaluation.layouts import named
from evaluation.measuring import SceneSet
from evaluation.results import Section, read_results
from evaluation.study import planned
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.weights import write_weights
from svggt_kernels.demo.scenes import HELD_OUT

SMALL = {
    "cores": Group("Which?", "None.", (Part("core-2 core-3", "walk/2 rotation", (4,)), Part("own", "walk/2", (4, 5)))),
    "layers": Group("Where?", "There.", (Part("core-2 layers(0:own)", "walk/2", (4,)),)),
}
COMMON = "--scenes 2 --size 28 42 --device cpu".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.npz"
    model = RoomsModel.create(dim=32, depth=1, num_heads=2)
    write_weights(path, model.state_dict(), model.sizes)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the groups by small ones."""
    for name in list(STUDY):
        monkeypatch.delitem(STUDY, name)
    for name, group in SMALL.items():
        monkeypatch.setitem(STUDY, name, group)


def study(path: Path, weights: Path, *words: str) -> int:
    return main(["study", "--output", str(path), "--weights", str(weights), *COMMON, *words])


def measured(path: Path) -> list[tuple[str, int, int, str]]:
    return [(line["family"], line["frames"], line["scene"], line["layout"]) for line in read_results(path)]


def test_every_name_is_that_of_a_layout_and_every_kind_has_dense_first():
    plan = planned(list(STUDY), long_dense=False)
    for chosen, layouts in plan.items():
        names = [layout.name for layout in layouts]
        assert len(set(names)) == len(names) and all(named(name).name == name for name in names)
        assert (names[0] == "dense") == (chosen.frames <= groups.LONGEST_DENSE) and names.count("dense") <= 1
    assert max(chosen.frames for chosen in plan) == 1000
    longest = SceneSet("walk", 8, 1000)
    assert planned(["length"], long_dense=True)[longest][0].name == "dense"
    assert {chosen.family for chosen in planned(["heldout"], long_dense=False)} == {HELD_OUT}


def test_scenes_are_outermost_and_a_kind_is_rendered_once(
    small: None, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    drawn = []
    draw = SceneSet.draw
    monkeypatch.setattr(SceneSet, "draw", lambda self, *args: drawn.append(self.name) or draw(self, *args))
    path = tmp_path / "study.jsonl"
    assert study(path, weights) == 0
    of_a_scene = [
        *[("walk", 4, layout) for layout in ("dense", "core-2", "core-3", "own", "layers(0:own)")],
        *[("rotation", 4, layout) for layout in ("dense", "core-2", "core-3")],
        *[("walk", 5, layout) for layout in ("dense", "own")],
    ]
    whole = [(family, frames, scene, layout) for scene in (0, 1) for family, frames, layout in of_a_scene]
    assert measured(path) == whole and drawn == 2 * ["walk-2r-4f", "rotation-2r-4f", "walk-2r-5f"]

    # What is missing is measured, and nothing else.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))
    drawn.clear()
    assert study(path, weights) == 0
    assert drawn == ["walk-2r-4f"] and sorted(measured(path)) == sorted(whole)
    assert "1 measured, 19 were there" in capsys.readouterr().out

    # Parts into one file are the whole, and a part that is cut short goes on.
    parts = tmp_path / "parts.jsonl"
    assert study(parts, weights, "--part", "0/2", "--session", "0") == 0 and not parts.exists()
    for part in ("0/2", "1/2"):
        assert study(parts, weights, "--part", part) == 0
    assert sorted(measured(parts)) == sorted(whole)
    one, other = (
        {place: line["metrics"] for place, line in zip(measured(file), read_results(file), strict=True)}
        for file in (path, parts)
    )
    assert one == other

    # Some of it.
    some = tmp_path / "some.jsonl"
    assert study(some, weights, "--groups", "layers", "--scenes", "1") == 0
    assert [layout for *_, layout in measured(some)] == ["dense", "core-2", "layers(0:own)"]
    assert study(some, weights, "--families", "rotation", "--scenes", "1") == 0
    assert {family for family, *_ in measured(some)} == {"walk", "rotation"}


def test_what_cannot_be_measured_is_said(small: None, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert study(tmp_path / "none.jsonl", weights, "--frames", "7") == 2
    assert "no scenes of such families and frames" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study(tmp_path / "none.jsonl", weights, "--part", "2/2")
    with pytest.raises(SystemExit):
        study(tmp_path / "none.jsonl", weights, "--groups", "heldout")


def test_what_raises_is_told_and_the_rest_measured(
    small: None, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setitem(STUDY, "layers", Group("?", "!", (Part("layers(0-2:own) core-3", "walk/2", (4,)),)))
    path = tmp_path / "study.jsonl"
    assert study(path, weights, "--groups", "layers", "--scenes", "1") == 1
    assert [layout for *_, layout in measured(path)] == ["dense", "core-3"]
    told = capsys.readouterr().err
    assert "not measured: layers(0-2:own) on walk-2r-4f scene 0" in told and "the model's 1 global layers" in told


def test_tables_and_figures_of_a_group(
    small: None, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "study.jsonl"
    assert study(path, weights, "--scenes", "1") == 0
    capsys.readouterr()
    assert main(["table", str(path), "--group", "layers"]) == 0
    shown = capsys.readouterr().out
    assert "layers(0:own)" in shown and "core-3" not in shown and "rotation" not in shown and "dense" in shown
    assert main(["table", str(path)]) == 0
    assert "core-3" in capsys.readouterr().out
    picture = tmp_path / "curve.png"
    assert main(["figure", str(path), "--group", "layers", "--metrics", "absrel", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn: list[Section] = []
    monkeypatch.setattr(figure, "draw", lambda shown, *others: drawn.extend(shown))
    words = ["figure", str(path), "--group", "layers", "--also"]
    assert main([*words, "core-K"]) == 0
    (section,) = drawn
    assert {"core-3", "layers(0:own)"} <= set(section.layouts)
    assert main([*words, "core-K", "core-K-covering"]) == 2
    assert "that these scenes have, got core-K-covering" in capsys.readouterr().err
