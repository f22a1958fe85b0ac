"""What the command line measures and how it writes numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

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

    def test_report_has_no_number_that_json_does_not_have(self) -> None:
        printed = report.as_json("command", {"a": math.nan, "b": [math.inf, 1.0]})
        assert json.loads(printed)["a"] is None
        assert json.loads(printed)["b"] == [None, 1.0]
