"""`check`: is attention right on this machine? Every backend against float64, within the error budget."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
from dataclasses import dataclass

import torch

from .. import backends
from ..backend_errors import error_ratios
from ..coarse import CoarseLayout
from ..graph import CoarseGraph, CovisibilityGraph
from ..layout import BlockLayout
from ..measure.machine import DTYPES, backend_answers, by_reason, device_name, dtype_name, versions
from ..proof import BUDGET, QUANTITIES, within_budget
from .device import pick_device
from .text import table

HEAD_SIZE = 64


@dataclass(frozen=True)
class Verdict:
    """How one backend did in one dtype, over all layouts.

    Attributes:
        ratios: The error of each quantity as a multiple of plain attention's; the worst layout counts, NaN above all.
        failure: What the backend raised, if it did.
    """

    ratios: dict[str, float]
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every quantity is within the budget."""
        return self.failure is None and within_budget(self.ratios)


def run(arguments: argparse.Namespace) -> int:
    """Check every backend and print a table; return the exit code."""
    device = pick_device(arguments.device)
    print(f"{device} ({device_name(device)}), head size {HEAD_SIZE}, layouts: {', '.join(layouts())}")
    print(
        f"Errors against float64, in multiples of plain attention's error in the same dtype; at most {BUDGET:g} passes."
    )
    rows: list[tuple[str, ...]] = [("backend", "dtype", *QUANTITIES, "")]
    passed = True
    verdicts: dict[str, dict[str, Verdict]] = {}
    for backend, answers in backend_answers(device, HEAD_SIZE).items():
        for reason, dtypes in by_reason({dtype: reason for dtype, reason in answers.items() if reason}).items():
            rows.append((backend, dtypes, *["-"] * len(QUANTITIES), f"cannot run: {reason}"))
        for dtype in (dtype for dtype in DTYPES if answers[dtype_name(dtype)] is None):
            verdict = judge(backend, device, dtype)
            verdicts.setdefault(backend, {})[dtype_name(dtype)] = verdict
            passed &= verdict.passed
            ratios = [f"{verdict.ratios[name]:.2f}" if name in verdict.ratios else "-" for name in QUANTITIES]
            rows.append(
                (backend, dtype_name(dtype), *ratios, "ok" if verdict.passed else f"WRONG {verdict.failure or ''}")
            )
    print(table(rows))
    print("Every backend that can run here is within the budget." if passed else "At least one backend is WRONG here.")
    if trials := [trial for backend in backends.BACKENDS.values() for trial in backend.TRAITS.trials(device)]:
        print("No such device was at hand when these kernels were written. Please paste this line into an issue:")
        print(json.dumps(report_for_issue(device, trials, verdicts)))
    return 0 if passed else 1


def judge(backend: str, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Compare one backend in one dtype with float64 on every layout, with gradients and without."""
    worst = dict.fromkeys(QUANTITIES, 0.0)
    for layout, gradients in itertools.product(layouts().values(), (True, False)):
        try:
            ratios = error_ratios(layout.to(device), dtype, head_size=HEAD_SIZE, backend=backend, gradients=gradients)
        except Exception as error:  # whatever a kernel raises here is the finding
            return Verdict({}, f"{type(error).__name__}: {error}".splitlines()[0])
        worst |= {name: max(worst[name], ratio, key=_nan_last) for name, ratio in ratios.items()}
    return Verdict(worst)


def report_for_issue(
    device: torch.device, trials: list[dict[str, object]], verdicts: dict[str, dict[str, Verdict]]
) -> dict[str, object]:
    """Return what is to know of kernels on a device that nobody had, as plain data: errors, failures and times."""
    return {
        "chip": device_name(device),
        "macos": platform.mac_ver()[0],
        "versions": versions(),
        "kernels": trials,
        "errors": {
            backend: {
                dtype: verdict.failure or {name: round(ratio, 3) for name, ratio in verdict.ratios.items()}
                for dtype, verdict in by_dtype.items()
            }
            for backend, by_dtype in verdicts.items()
        },
    }


def layouts() -> dict[str, BlockLayout | CoarseLayout]:
    """Return small layouts, on the CPU, that differ in everything a layout can differ in."""
    generator = torch.Generator().manual_seed(0)
    some = CovisibilityGraph.from_dense(torch.rand(7, 7, generator=generator) < 0.3, square=True)
    wide = CovisibilityGraph.from_dense(torch.rand(3, 8, generator=generator) < 0.4)
    video = CovisibilityGraph.sequential(9, 1)
    return {
        "random": BlockLayout.from_graph(some, 45, special_tokens=5),
        "ragged": BlockLayout.from_graph(some, [30, 70, 1, 64, 17, 128, 33], trailing_tokens=1),
        "video": BlockLayout.from_graph(video, 40, special_tokens=(1, 2)),
        "masked": BlockLayout.from_graph(video, 40, special_tokens=5, dense_special=False),
        "full": BlockLayout.from_graph(CovisibilityGraph.all_visible(4), 50),
        "alone": BlockLayout.from_graph(CovisibilityGraph.sequential(4, 0), 50),
        "rectangular": BlockLayout.from_graph(wide, 36),
        "coarse": CoarseLayout.from_graph(CoarseGraph.core(7, [0, 4], [2, 5], stride=3), (6, 7), special_tokens=3),
    }


def _nan_last(ratio: float) -> float:
    return math.inf if math.isnan(ratio) else ratio
