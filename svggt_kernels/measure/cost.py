"""What a call costs: its time, and the memory that it adds.

Wall times run from an idle device to an idle device. Memory is that of PyTorch's allocator on CUDA and that of the
process on the CPUs of Linux; elsewhere it cannot be measured.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")
Tell = Callable[[str], None]

ENOUGH_SECONDS = 100.0
FEWEST_REPEATS, MOST_REPEATS = 5, 400
MIB = 2**20
# How PyTorch's CPU allocator begins to say that memory ran out; it raises a plain RuntimeError.
CPU_ALLOCATOR = "DefaultCPUAllocator"


@dataclass(frozen=True)
class Cost:
    """What one run costs.

    Attributes:
        median_ms: Median time, ms.
        min_ms: Shortest run, ms.
        max_ms: Longest run, ms.
        low_ms: 20th percentile, ms.
        high_ms: 80th percentile, ms.
        runs: Timed runs.
        peak_mib: Highest memory during one run beyond what was held before it, MiB; None where it cannot be measured.
    """

    median_ms: float
    min_ms: float
    max_ms: float
    low_ms: float
    high_ms: float
    runs: int
    peak_mib: float | None

    @classmethod
    def of(cls, times_ms: Sequence[float], peak_mib: float | None) -> Cost:
        """Sum up the times of several runs, ms, and the peak of their memory."""
        shares = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64, device="cpu")
        median, low, high = torch.tensor(times_ms, dtype=torch.float64, device="cpu").quantile(shares).tolist()
        return cls(median, min(times_ms), max(times_ms), low, high, len(times_ms), peak_mib)


class Meter:
    """Measures runs of one thing, one after another; warm up before.

    Args:
        device: Where the runs take place.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times_ms: list[float] = []
        self.peaks_mib: list[float] = []

    def __call__(self, run: Callable[[], T]) -> T:
        """Measure one run and return its result."""
        memory = PeakMemory(self.device)
        result, elapsed_ms = timed(run, self.device)
        self.times_ms.append(elapsed_ms)
        if memory.added_mib is not None:
            self.peaks_mib.append(memory.added_mib)
        return result

    def cost(self) -> Cost:
        """Return what a run costs."""
        return Cost.of(self.times_ms, max(self.peaks_mib, default=None))


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Return the result of a call, and its wall time in ms, from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return result, 1000 * (time.perf_counter() - started)


def alternate(
    first: Callable[[], S], second: Callable[[], T], device: torch.device, repeats: int, tell: Tell | None = None
) -> tuple[S, Cost, T, Cost]:
    """Run two things in turn, so that other work on the machine meets both alike; warm up before.

    Args:
        first: One thing to run.
        second: The other.
        device: Where they run.
        repeats: Runs of each, at least 1; fewer if they take more than `ENOUGH_SECONDS` together.
        tell: Is told before each run how many there are and how long the rest will take.

    Returns:
        The last result and the cost of the first, then of the second.
    """
    calls: tuple[Callable[[], Any], ...] = (first, second)
    (first_result, first_cost), (second_result, second_cost) = in_turn(calls, device, repeats, tell)
    return first_result, first_cost, second_result, second_cost


def in_turn(
    calls: Sequence[Callable[[], T]], device: torch.device, repeats: int, tell: Tell | None = None
) -> list[tuple[T, Cost]]:
    """Run any number of things in turn, as `alternate` does two; return the last result and the cost of each."""
    meters = [Meter(device) for _ in calls]
    spent = 0.0
    for done in range(repeats):
        if tell is not None:
            left = f", about {spent / done * (repeats - done):.0f} s left" if done else ""
            tell(f"run {done + 1} of {repeats}{left}")
        results = [meter(call) for meter, call in zip(meters, calls, strict=True)]
        spent = sum(sum(meter.times_ms) for meter in meters) / 1000
        if spent > ENOUGH_SECONDS:
            break
    return [(result, meter.cost()) for result, meter in zip(results, meters, strict=True)]


def repeated(call: Callable[[], object], device: torch.device, seconds: float = 1.0) -> Cost:
    """Measure a short call: warm up, then repeat it for about `seconds`.

    On CUDA each repeat lies between two events on the stream and starts with a cold L2 cache: a buffer larger than the
    cache is written before it, outside the events. Elsewhere each repeat is `timed`.

    Args:
        call: What to measure; its results are dropped.
        device: Where it runs.
        seconds: How long to repeat, after a warm-up of a quarter of that. At least 5 and at most 400 repeats.

    Returns:
        The cost. Its peak is that of the tensors during one call on CUDA; None elsewhere, because the memory of the
        process is too coarse for a short call.
    """
    call()
    once_ms = timed(call, device)[1]
    repeats = min(MOST_REPEATS, max(FEWEST_REPEATS, round(1000 * seconds / max(once_ms, 1e-6))))
    for _ in range(repeats // 4):
        call()
    if device.type != "cuda":
        return Cost.of([timed(call, device)[1] for _ in range(repeats)], None)
    meter = Meter(device)
    meter(call)
    return Cost.of(_between_events(call, device, repeats), meter.cost().peak_mib)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


def allocated_mib(device: torch.device) -> float | None:
    """Return the memory that tensors on a CUDA device hold, MiB; None for other devices."""
    gc.collect()
    synchronize(device)
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine ran out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    )


class PeakMemory:
    """The most memory held since this was made.

    Args:
        device: Whose memory; PyTorch's on CUDA, for a CPU that of the process.

    Attributes:
        held_mib: What was held then, MiB; None where memory cannot be measured.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._highest: Callable[[], float | None] = lambda: None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._highest = lambda: torch.cuda.max_memory_allocated(device) / MIB
        elif device.type == "cpu" and _reset_resident_peak():
            self._highest = _resident_peak_mib
        self.held_mib = self.highest_mib

    @property
    def highest_mib(self) -> float | None:
        """The most memory held since, MiB; None where it cannot be measured."""
        return self._highest()

    @property
    def added_mib(self) -> float | None:
        """The same beyond what was held at first."""
        highest = self.highest_mib
        return None if highest is None or self.held_mib is None else highest - self.held_mib


def _between_events(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    cache_size = torch.cuda.get_device_properties(device).L2_cache_size
    cache = torch.empty(2 * cache_size, dtype=torch.int8, device=device)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        cache.zero_()
        start.record()
        call()
        end.record()
    synchronize(device)
    return [start.elapsed_time(end) for start, end in pairs]


def _reset_resident_peak() -> bool:
    """Give freed memory back to the system and start the process's peak anew; False where the system cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident_peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
