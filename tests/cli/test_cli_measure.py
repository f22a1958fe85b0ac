"""What the command line measures and how it writes numbers."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svggt_kernels.cli import measure, report, text


class TestMeasure:
    def test_deviation(self) -> None:
        dense, sparse = torch.tensor([3.0, 4.0, math.inf]), torch.tensor([3.0, 4.5, 1.0])
        found = measure.deviation(dense, sparse)
        assert found.relative_l2 == pytest.approx(0.1)
        assert found.max_abs == 0.5
        assert found.not_finite == 1

    def test_deviation_from_zero(self) -> None:
        assert measure.deviation(torch.zeros(2), torch.zeros(2)).relative_l2 == 0
        assert measure.deviation(torch.zeros(2), torch.ones(2)).relative_l2 == math.inf

    @pytest.mark.parametrize("degrees", [0.0, 1e-5, 1.0, 90.0, 179.0])
    def test_rotation(self, degrees: float) -> None:
        half = math.radians(degrees) / 2
        turned = torch.tensor([math.sin(half), 0.0, 0.0, math.cos(half)], dtype=torch.float64)
        identity = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
        for sign, length in ((1, 1), (-1, 1), (1, 3)):
            angle = measure.rotation_degrees(identity, sign * length * turned)
            assert float(angle) == pytest.approx(degrees, abs=1e-12)
        cos, sin = math.cos(2 * half), math.sin(2 * half)
        matrix = torch.tensor([[1.0, 0, 0], [0, cos, -sin], [0, sin, cos]], dtype=torch.float64)
        assert float(measure.rotation_degrees(torch.eye(3), matrix)) == pytest.approx(degrees, abs=1e-9)

    def test_two_things_run_in_turn_until_it_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runs: list[str] = []
        first, cost, second, _ = measure.alternate(
            lambda: runs.append("a") or len(runs), lambda: runs.append("b") or len(runs), torch.device("cpu"), 3
        )
        assert runs == ["a", "b", "a", "b", "a", "b"]
        assert (first, second, cost.runs) == (5, 6, 3)
        assert cost.min_ms <= cost.median_ms <= cost.max_ms
        monkeypatch.setattr(measure, "ENOUGH_SECONDS", 0.0)
        assert measure.alternate(lambda: 1, lambda: 2, torch.device("cpu"), 3)[3].runs == 1

    def test_runs_are_counted_and_their_end_is_estimated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = SimpleNamespace(perf_counter=itertools.count(0, 10).__next__)  # every run takes 10 s
        monkeypatch.setattr(measure, "time", clock)
        said: list[str] = []
        measure.alternate(lambda: 1, lambda: 2, torch.device("cpu"), 3, said.append)
        assert said == ["run 1 of 3", "run 2 of 3, about 40 s left", "run 3 of 3, about 20 s left"]

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
    def test_peak_memory_of_a_run(self) -> None:
        def run() -> float:
            return float(torch.ones(64 * 2**20 // 4).sum())  # 64 MiB

        run()
        meter = measure.Meter(torch.device("cpu"))
        meter(run)
        peak = meter.cost().peak_mib
        assert peak is not None
        assert 60 < peak < 90


class TestText:
    def test_numbers(self) -> None:
        assert text.milliseconds(12.34) == "12.3 ms"
        assert text.milliseconds(12340) == "12.3 s"
        assert text.mebibytes(None) == "not measured"
        assert text.percent(0.123) == "12.3 %"

    def test_counts(self) -> None:
        assert [text.count(number, "photo") for number in (0, 1, 2)] == ["0 photos", "1 photo", "2 photos"]

    @pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
    def test_a_stage_says_names_as_they_are(
        self, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("rich", reason="rich is not installed")
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
            monkeypatch.setenv("COLUMNS", "200")
        with text.stage("reading [red] [/nothing] :smile:") as tell:
            tell("photo [bold]")
            time.sleep(0.2)  # the spinner draws at intervals
        said = capsys.readouterr().err
        assert "reading [red] [/nothing] :smile:" in said
        assert "photo [bold]" in said
        assert ("\x1b" in said) == terminal

    def test_a_report_holds_text_that_every_reader_of_json_takes(self) -> None:
        printed = report.as_json("command", {"names": ["caf\udce9.png", "é$_\n"]})
        assert json.loads(printed)["names"] == [r"caf\udce9.png", "é$_\n"]

    def test_report_has_no_number_that_json_does_not_have(self) -> None:
        printed = report.as_json("command", {"a": math.nan, "b": [math.inf, 1.0]})
        assert json.loads(printed)["a"] is None
        assert json.loads(printed)["b"] == [None, 1.0]
