"""Time, memory and deviation of two runs of one model."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .text import Tell

S = TypeVar("S")
T = TypeVar("T")

ENOUGH_SECONDS = 100.0


@dataclass(frozen=True)
class Cost:
    """What one run costs.

    Attributes:
        median_ms: Median wall time, ms.
        min_ms: Shortest run, ms.
        max_ms: Longest run, ms.
        runs: Timed runs.
        peak_mib: Highest memory during one run beyond what was held before it, MiB; None where it cannot be measured.
    """

    median_ms: float
    min_ms: float
    max_ms: float
    runs: int
    peak_mib: float | None


@dataclass(frozen=True)
class Deviation:
    """How far an output of the sparse model is from the dense one.

    Attributes:
        relative_l2: `||sparse - dense|| / ||dense||` over the values finite in both.
        max_abs: Largest absolute difference over the same values.
        not_finite: Values that are infinite or NaN in either output.
    """

    relative_l2: float
    max_abs: float
    not_finite: int


class Meter:
    """Measures runs of one thing, one after another; warm up before.

    Args:
        device: Where the runs take place.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elapsed_ms: list[float] = []
        self.peaks_mib: list[float] = []

    def __call__(self, run: Callable[[], T]) -> T:
        """Measure one run and return its result."""
        memory = _PeakMemory(self.device)
        _synchronize(self.device)
        started = time.perf_counter()
        result = run()
        _synchronize(self.device)
        self.elapsed_ms.append(1000 * (time.perf_counter() - started))
        self.peaks_mib.append(memory.mib())
        return result

    def cost(self) -> Cost:
        """Return what a run costs."""
        times, peak = self.elapsed_ms, max(self.peaks_mib)
        return Cost(statistics.median(times), min(times), max(times), len(times), None if math.isnan(peak) else peak)


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
    meters = Meter(device), Meter(device)
    spent = 0.0
    for done in range(repeats):
        if tell is not None:
            left = f", about {spent / done * (repeats - done):.0f} s left" if done else ""
            tell(f"run {done + 1} of {repeats}{left}")
        results = meters[0](first), meters[1](second)
        spent = sum(sum(meter.elapsed_ms) for meter in meters) / 1000
        if spent > ENOUGH_SECONDS:
            break
    return results[0], meters[0].cost(), results[1], meters[1].cost()


def allocated_mib(device: torch.device) -> float | None:
    """Return the memory that tensors on a CUDA device hold, MiB; None for other devices."""
    gc.collect()
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else None


def deviation(dense: Tensor, sparse: Tensor) -> Deviation:
    """Compare an output of the sparse model with the same output of the dense one, in float64."""
    if dense.shape != sparse.shape:
        raise ValueError(f"both outputs must have one shape, got {list(dense.shape)} and {list(sparse.shape)}")
    finite = dense.isfinite() & sparse.isfinite()
    reference, other = dense[finite].double(), sparse[finite].double()
    difference, norm = other - reference, float(reference.norm())
    distance = float(difference.norm())
    return Deviation(
        relative_l2=distance / norm if norm else (math.inf if distance else 0.0),
        max_abs=float(difference.abs().max()) if difference.numel() else 0.0,
        not_finite=int((~finite).sum()),
    )


def rotation_degrees(
    dense: Tensor,  # [..., 4] quaternions or [..., 3, 3] matrices
    sparse: Tensor,
) -> Tensor:
    """Return the angle between two rotations, degrees `[...]` float64; quaternions need not be of unit length."""
    dense, sparse = dense.double(), sparse.double()
    if dense.shape[-2:] == (3, 3):
        # |R - R'| = 2 sqrt(2) sin(angle / 2)
        chord = torch.linalg.matrix_norm(dense - sparse) / (2 * math.sqrt(2))
        return torch.rad2deg(2 * torch.asin(chord.clamp(max=1)))
    a, b = (torch.nn.functional.normalize(q, dim=-1) for q in (dense, sparse))
    near, far = (a - b).norm(dim=-1), (a + b).norm(dim=-1)
    return torch.rad2deg(4 * torch.atan2(torch.minimum(near, far), torch.maximum(near, far)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class _PeakMemory:
    """The most memory held since its making, beyond that held then: torch's on CUDA, the process's on Linux CPUs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.held = torch.cuda.memory_allocated(device) / 2**20
        elif device.type == "cpu" and _reset_resident_peak():
            self.held = _resident_mib("VmRSS")
        else:
            self.held = math.nan

    def mib(self) -> float:
        """Return it in MiB, NaN where it cannot be measured."""
        if math.isnan(self.held):
            return math.nan
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.held
        return _resident_mib("VmHWM") - self.held


def _reset_resident_peak() -> bool:
    """Give freed memory back to the system and starts the process's peak anew; False where the system cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 2**10
