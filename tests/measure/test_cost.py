"""Time and memory of a call, and how the numbers are written."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svggt_kernels.measure import cost, wording

CPU = torch.device("cpu")


def test_two_things_run_in_turn_until_it_is_enough(monkeypatch: pytest.MonkeyPatch):
    runs: list[str] = []
    first, cost_of_first, second, _ = cost.alternate(
        lambda: runs.append("a") or len(runs), lambda: runs.append("b") or len(runs), CPU, 3
    )
    assert runs == ["a", "b", "a", "b", "a", "b"]
    assert (first, second, cost_of_first.runs) == (5, 6, 3)
    monkeypatch.setattr(cost, "ENOUGH_SECONDS", 0.0)
    assert cost.alternate(lambda: 1, lambda: 2, CPU, 3)[3].runs == 1


def test_runs_are_counted_and_their_end_is_estimated(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(perf_counter=itertools.count(0, 10).__next__)  # every run takes 10 s
    monkeypatch.setattr(cost, "time", clock)
    said: list[str] = []
    cost.alternate(lambda: 1, lambda: 2, CPU, 3, said.append)
    assert said == ["run 1 of 3", "run 2 of 3, about 40 s left", "run 3 of 3, about 20 s left"]


def test_times_are_summed_up():
    summed = cost.Cost.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0], 7.0)
    assert summed == cost.Cost(3.5, 1.0, 6.0, pytest.approx(2.0), pytest.approx(5.0), 6, 7.0)


def test_a_call_is_warmed_up_and_repeated():
    calls: list[None] = []
    repeated = cost.repeated(lambda: calls.append(None), CPU, seconds=1e-6)
    assert repeated.runs >= cost.FEWEST_REPEATS
    assert len(calls) >= repeated.runs + 2
    assert 0 <= repeated.min_ms <= repeated.low_ms <= repeated.median_ms <= repeated.high_ms <= repeated.max_ms
    assert repeated.peak_mib is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_peak_memory_of_a_run():
    def run() -> float:
        return float(torch.ones(64 * 2**20 // 4).sum())  # 64 MiB

    run()
    meter = cost.Meter(CPU)
    meter(run)
    peak_mib = meter.cost().peak_mib
    assert peak_mib is not None
    assert 60 < peak_mib < 90


@pytest.mark.gpu
def test_cost_on_a_gpu():
    device = torch.device("cuda")
    large = torch.ones(2**22, device=device)  # 16 MiB
    *_, in_turn = cost.alternate(list, lambda: large + 1, device, 1)
    for measured in (cost.repeated(lambda: large + 1, device, 0.01), in_turn):
        assert measured.peak_mib == 16
        assert measured.median_ms > 0
    memory = cost.PeakMemory(device)
    assert memory.highest_mib == memory.held_mib == cost.allocated_mib(device)


def test_numbers_have_units():
    assert wording.milliseconds(12.34) == "12.3 ms"
    assert wording.milliseconds(12340) == "12.3 s"
    assert wording.mebibytes(None) == "not measured"
    assert wording.percent(0.123) == "12.3 %"
    assert [wording.count(number, "photo") for number in (0, 1, 2)] == ["0 photos", "1 photo", "2 photos"]
