"""The runner: checks every contender on every case, times what passed, writes one line of JSON per measurement."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from svggt_kernels.measure.cost import MIB, Cost, allocated_mib, repeated
from svggt_kernels.measure.machine import dtype_name

from .cases import Case
from .check import check_forward, check_gradients
from .peers import Contender
from .record import Line

KEYS = (
    "case",
    "direction",
    "backend",
    "device",
    "dtype",
    "shape",
    "density",
    "ms_median",
    "ms_spread",
    "useful_tflops",
    "fraction_of_ideal",
    "peak_mib",
    "torch",
    "triton",
    "commit",
    "command",
    "run",
    "date",
    "check",
    "softmax",
    "gradients",
    "edges",
    "ms_per_edge",
    "extra_mib",
)
"""The keys of a line, in order; a line whose check failed also has a `reason`."""

RESULTS_HELD = {"fwd": 1, "bwd": 5, "fwd+bwd": 4}
"""Tensors like q that every contender needs for a direction beyond its inputs: output, its gradient, dQ, dK and dV."""

COLUMNS = {
    "case": "case",
    "direction": "direction",
    "backend": "backend",
    "softmax": "softmax",
    "gradients": "gradients",
    "ms_median": "ms:.3f",
    "useful_tflops": "TFLOP/s:.3g",
    "fraction_of_ideal": "of ideal:.3f",
    "peak_mib": "peak MiB:.0f",
    "ms_per_edge": "ms/edge:.4f",
    "extra_mib": "extra MiB:.1f",
    "check": "check",
}


class Runner:
    """Runs contenders on cases in one process, so that their numbers may be compared.

    Args:
        device: Where to run.
        dtype: Of q, k, v and the output.
        provenance: What every line says about the run.
        write: Called with each line as soon as it is known.
        seconds: Time to repeat each measurement.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        provenance: Line,
        write: Callable[[Line], None],
        seconds: float = 1.0,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.provenance = provenance
        self.write = write
        self.seconds = seconds
        self.lines: list[Line] = []
        self.not_run: dict[str, list[str]] = {}
        self._dense_tflops: dict[tuple[str, str, tuple[int, ...], bool], float] = {}

    def run(self, cases: Sequence[Case], contenders: Sequence[Contender], directions: Sequence[str]) -> None:
        """Check and time every contender on every case; dense cases first, as `fraction_of_ideal` needs them."""
        for case in sorted(cases, key=lambda case: not case.is_dense):
            for contender in contenders:
                for direction in directions:
                    self._run_one(case, contender, direction)

    def _run_one(self, case: Case, contender: Contender, direction: str) -> None:
        reason = cost = extra = None
        try:
            q, k, v, grad = inputs(case, self.device, self.dtype, contender.storage)
            for x in (q, k, v):
                x.requires_grad_(direction != "fwd")
            unsupported = contender.obstacle(case, q)
            if unsupported is not None:
                what = self.not_run.setdefault(f"{contender.name}: not run: {unsupported}", [])
                what.append(f"{case.name}, {direction}")
                return
            print(f"{contender.name} on {case.name}, {direction} ...", file=sys.stderr, flush=True)
            reason = self._wrong(case, contender, direction, (q, k, v, grad))
            if reason is None:
                cost, extra = self._time(case, contender, direction, (q, k, v, grad))
        except Exception as error:  # whatever a contender raises, the others still run, and the line says what it was
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self._add(case, contender, direction, cost, extra, reason)

    def _wrong(self, case: Case, contender: Contender, direction: str, tensors: tuple[Tensor, ...]) -> str | None:
        q, k, v, grad = tensors
        reason = check_forward(contender, case, q, k, v)
        if reason is None and direction != "fwd":
            reason = check_gradients(contender, case, q, k, v, grad)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return reason

    def _time(
        self, case: Case, contender: Contender, direction: str, tensors: tuple[Tensor, ...]
    ) -> tuple[Cost, float | None]:
        """Return the times, and the memory in MiB beyond the inputs and what any contender needs."""
        q, k, v, grad = tensors
        before = allocated_mib(self.device)
        with contender.chosen():
            call = contender.prepare(case, q, k, v)
            if direction == "fwd":
                with torch.no_grad():
                    cost = repeated(call, self.device, self.seconds)
            elif direction == "bwd":
                backward = _backward(call(), (q, k, v), grad)
                cost = repeated(backward, self.device, self.seconds)
            else:
                cost = repeated(lambda: torch.autograd.grad(call(), (q, k, v), grad), self.device, self.seconds)
        after = allocated_mib(self.device)
        if cost.peak_mib is None or before is None or after is None:
            return cost, None
        needed = RESULTS_HELD[direction] * q.numel() * q.element_size() / MIB
        return cost, cost.peak_mib + after - before - needed

    def _add(
        self,
        case: Case,
        contender: Contender,
        direction: str,
        cost: Cost | None,
        extra: float | None,
        reason: str | None,
    ) -> None:
        tflops = fraction = None
        if cost is not None:
            tflops = case.useful_flops(direction) / cost.median_ms / 1e9
            problem = contender.name, direction, case.shape, case.log2
            if case.is_dense:
                self._dense_tflops[problem] = tflops
            dense = self._dense_tflops.get(problem)
            fraction = None if dense is None else tflops / dense
        line = {
            "case": case.name,
            "direction": direction,
            "dtype": dtype_name(self.dtype),
            "shape": list(case.shape),
            "density": case.density,
            "ms_median": cost and cost.median_ms,
            "ms_spread": cost and [cost.low_ms, cost.high_ms],
            "useful_tflops": tflops,
            "fraction_of_ideal": fraction,
            "peak_mib": cost and cost.peak_mib,
            "check": "passed" if reason is None else "failed",
            **contender.labels(self.dtype, direction),
            "edges": case.edges,
            "ms_per_edge": cost and cost.median_ms / case.edges,
            "extra_mib": extra,
            **self.provenance,
        }
        line = {key: line[key] for key in KEYS} | ({} if reason is None else {"reason": reason})
        self.lines.append(line)
        self.write(line)


def _backward(out: Tensor, leaves: tuple[Tensor, ...], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    grad = torch.empty_like(out).copy_(grad)  # lies in memory as the output does
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def inputs(
    case: Case, device: torch.device, dtype: torch.dtype, storage: str = "bhnd"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and the gradient of the output, `[B, H, N, D]`, normally distributed, the same at every call.

    Where scores come in units of log2, q has the factor that the scale lacks.

    Args:
        case: The problem.
        device: Where they are made.
        dtype: Their dtype.
        storage: "bhnd" or "bnhd", the order of the axes in memory.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        x = torch.randn(case.shape, device=device, dtype=dtype, generator=generator)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if storage == "bnhd" else x

    q, k, v, grad = draw(), draw(), draw(), draw()
    if case.log2:
        q *= case.head_size**-0.5 / math.log(2)
    return q, k, v, grad
