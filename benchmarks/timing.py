"""How time and memory are taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FEWEST, MOST = 5, 400
"""Bounds on the repeats of a timed call."""

MIB = 2**20


class Timing(NamedTuple):
    """Times of one call, in ms, and the memory it took beyond what was held before it."""

    median: float
    low: float  # 20th percentile
    high: float  # 80th percentile
    peak_mib: float | None


def measure(call: Callable[[], object], device: torch.device, seconds: float = 1.0) -> Timing:
    """Time a call: warm up, repeat for about `seconds`, take the median and the 20th and 80th percentile.

    On CUDA each repeat lies between two events on the stream and starts with a cold L2 cache: a buffer larger than the
    cache is written before it, outside the events. Elsewhere the host clock is read after synchronising.

    Args:
        call: What to time; its results are dropped.
        device: Where it runs.
        seconds: How long to repeat, after a warm-up of a quarter of that. At least 5 and at most 400 repeats.

    Returns:
        The times, and on CUDA the peak of allocated memory during one call less what was allocated before it; None
        elsewhere, where no allocator keeps count.
    """
    call()
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    once = time.perf_counter() - started
    repeats = min(MOST, max(FEWEST, round(seconds / max(once, 1e-9))))
    for _ in range(repeats // 4):
        call()
    peak = _peak(call, device)
    times = _by_events(call, repeats) if device.type == "cuda" else _by_clock(call, device, repeats)
    low, median, high = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )
    return Timing(median, low, high, peak)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def allocated_mib(device: torch.device) -> float | None:
    """Return the memory that is allocated now; None where no allocator keeps count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() / MIB


def _by_events(call: Callable[[], object], repeats: int) -> list[float]:
    cache = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _by_clock(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return times


def _peak(call: Callable[[], object], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del held
    return peak / MIB
