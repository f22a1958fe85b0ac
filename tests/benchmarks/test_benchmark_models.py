"""The benchmarks of whole models: what a case is, what a line holds, and that a model that strays is never timed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from doubles.vggt import VGGT

from benchmarks import model_report, models
from benchmarks.__main__ import main
from svggt_kernels.inference import memory
from svggt_kernels.models.base import first_sample


@pytest.mark.parametrize("name", ["toy-16f-4n", "vggt-1b-100f-10n", "vggt-1b-100f-10n-random"])
def test_model_graph_has_its_neighbours_and_frame_0(name):
    case = models.ModelCase.parse(name)
    assert case.name == name
    visible = case.graph().to_dense()
    assert visible[0].all()
    assert visible[:, 0].all()
    assert torch.equal(visible, visible.T)
    others = visible.sum(1)[case.neighbours : -case.neighbours].double() - 2
    assert (others.mean() if case.random else others).sub(case.neighbours).abs().max() <= (1 if case.random else 0)


def test_all_frames_see_the_anchors():
    case = models.ModelCase.parse("toy-30f-2n-2a")
    assert case.name == "toy-30f-2n-2a"
    visible = case.graph().to_dense()
    assert visible[:, [0, 10, 20]].all()
    assert visible[5].nonzero().flatten().tolist() == [0, 4, 5, 6, 10, 20]
    assert visible[10].nonzero().flatten().tolist() == [0, 9, 10, 11, 20]


def test_cores_in_place_of_neighbours():
    case = models.ModelCase.parse("toy-9f-core2+3@2")
    assert case.name == "toy-9f-core2+3@2" and "a core of 2 frames" in case.about
    graph = case.graph()
    assert graph.full.core_frames.tolist() == [0, 8] and graph.frames.tolist() == [2, 4, 6] and graph.stride == 2
    assert models.ModelCase.parse("toy-9f-core3").graph().core_frames.tolist() == [0, 4, 8]
    assert models.ModelCase.parse("vggt-1b-9f-core3+all@4").graph().num_edges == 81
    for name in ("toy-9f-core0", "toy-9f-core2+3", "toy-9f-core2-random", "toy-9f-4n-core2"):
        with pytest.raises(ValueError, match="is called like"):
            models.ModelCase.parse(name)


def test_frames_at_a_stride_are_measured(tmp_path):
    file = tmp_path / "out.jsonl"
    words = "model --cases toy-7f-core2+3@3 --systems svggt --device cpu --repeats 1 --output".split()
    assert main([*words, str(file)]) == 0
    line = json.loads(file.read_text())
    assert (line["check"], line["measured"], line["special_tokens"]) == ("passed", True, "masked")
    assert 0 < line["density"] < 1


def test_model_lines_are_complete(tmp_path):
    file = tmp_path / "out.jsonl"
    assert main([*"model --cases toy-5f-2n --device cpu --repeats 1 --output".split(), str(file)]) == 0
    upstream, ours = [json.loads(line) for line in file.read_text().splitlines()]
    for line in (upstream, ours):
        assert tuple(line) == models.KEYS
        assert line["measured"]
        assert line["seconds_full"] > 0
        assert line["case"] == "toy-5f-2n"
        assert line["shape"] == [5, 3, 112, 154]
    assert (upstream["system"], upstream["density"], upstream["check"]) == ("upstream", 1.0, None)
    assert (ours["system"], ours["check"]) == ("svggt", "passed")
    assert ours["density"] < 1
    assert 0 <= ours["deviation"] < 1e-4


def test_model_report_shows_the_latest_line_of_each_system_and_kind_of_special_tokens(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    line = {
        "case": "toy-8f-2n",
        "system": "svggt",
        "backend": "reference",
        "density": 0.5,
        "seconds_aggregator": None,
        "peak_gib": None,
    }
    line |= {"measured": True, "seconds_full": 2.0, "date": "2026-01-01", "command": "python -m benchmarks model"}
    lines = [line, line | {"seconds_full": 1.0, "date": "2026-01-02"}, line | {"system": "upstream"}]
    lines += [line | {"command": "python -m benchmarks model --special-tokens masked", "seconds_full": 1.5}]
    lines += [line | {"case": "toy-4f-2n"}, line | {"measured": False}]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["model-report", "--results", str(file), "--output", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "report" / name) for name in ("models.md", "models.png")]
    rows = (tmp_path / "report" / "models.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| toy-4f-2n", "svggt"],
        ["| toy-8f-2n", "upstream"],
        ["| toy-8f-2n", "svggt, masked"],
        ["| toy-8f-2n", "svggt"],
    ]
    assert "| 1.00 |" in rows[3]
    file.write_text("")
    assert main(["model-report", "--results", str(file), "--output", str(tmp_path)]) == 2


def test_model_report_extrapolates_dense_systems():
    lines = [
        {
            "system": "upstream",
            "backend": None,
            "case": f"toy-{S}f-2n",
            "density": 1.0,
            "measured": True,
            "peak_gib": 1.0,
        }
        | {"seconds_aggregator": 2 * S + 3 * S**2, "seconds_full": 5 * S + 3 * S**2, "command": ""}
        for S in (10, 20, 30)
    ]
    ours = [lines[0] | {"system": "svggt", "backend": "reference", "case": f"toy-{S}f-8n"} for S in (4, 6, 8)]
    lines += [*ours, ours[0] | {"case": "toy-100f-4n-8a"}, ours[0] | {"case": "toy-100f-4n"}]
    [line] = model_report.extrapolated(lines)
    assert (line["system"], line["case"], line["measured"]) == ("upstream", "toy-100f-4n", False)
    assert line["seconds_aggregator"] == pytest.approx(30200)
    assert line["seconds_full"] == pytest.approx(30500)
    assert "| toy-100f-4n | upstream (extrapolated) | 1.000 | 30200.00 | 30500.00 | - |" in model_report.markdown(
        [line]
    )
    assert model_report.extrapolated(lines[1:]) == []


def test_model_that_strays_is_never_timed(tmp_path, monkeypatch):
    patch = models.patch

    def wrong(model, *, covisibility, **options):
        graph = models.CovisibilityGraph.sequential(models.CHECKED_FRAMES, 0) if covisibility == "all" else covisibility
        return patch(model, covisibility=graph, **options)

    monkeypatch.setattr(models, "patch", wrong)
    file = tmp_path / "out.jsonl"
    assert main([*"model --cases toy-5f-2n --systems svggt --device cpu --output".split(), str(file)]) == 1
    [line] = [json.loads(line) for line in file.read_text().splitlines()]
    assert (line["check"], line["measured"], line["seconds_full"]) == ("failed", False, None)
    assert "at most 2x" in line["reason"]


def test_a_model_over_its_budget_has_no_numbers(tmp_path, monkeypatch):
    outputs = partial(first_sample, names=("depth", "confidence", "pose"))
    kind = replace(models.KINDS["toy"], name="double", build=VGGT, outputs=outputs, trained=None)
    monkeypatch.setitem(models.KINDS, "toy", kind)
    monkeypatch.setitem(models.SYSTEMS, "svggt-40gib", {"memory_budget": 2})
    monkeypatch.setattr(memory, "DEVICES", ("cpu",))
    measure, peak = models.ModelRunner._measure, 1.9

    def measured(self, case, model, line):
        measure(self, case, model, line)
        line["peak_gib"] = peak

    monkeypatch.setattr(models.ModelRunner, "_measure", measured)
    file = tmp_path / "out.jsonl"
    command = [*"model --cases toy-5f-2n --systems svggt-40gib --device cpu --repeats 1 --output".split(), str(file)]
    assert main(command) == 0
    peak = 2.1
    assert main(command) == 1
    within, over = [json.loads(line) for line in file.read_text().splitlines()]
    assert (within["check"], within["peak_gib"]) == ("passed", 1.9)
    assert (over["check"], over["peak_gib"]) == ("failed", None)
    assert "within the budget of 2 GiB, got 2.10; 1." in over["reason"] and "in host memory" in over["reason"]


def test_out_of_memory_is_a_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("there is none left")

    monkeypatch.setattr(models.ModelRunner, "_seconds", full)
    file = tmp_path / "out.jsonl"
    assert main([*"model --cases toy-5f-2n --systems upstream --device cpu --output".split(), str(file)]) == 0
    [line] = [json.loads(line) for line in file.read_text().splitlines()]
    assert (line["measured"], line["seconds_full"], line["reason"]) == (False, None, "out of memory")
