"""Is a backend repeatable? `python -m benchmarks repeat` runs it many times and compares what it returns bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import inputs
from .cases import Case
from .peers import Contender
from .record import Line

DIRECTIONS = ("fwd", "bwd")

COLUMNS = {
    "case": "case",
    "direction": "direction",
    "backend": "backend",
    "softmax": "softmax",
    "gradients": "gradients",
    "times": "times:d",
    "bitwise_equal": "bitwise equal",
    "check": "check",
}

KEYS = (
    "case",
    "direction",
    "backend",
    "softmax",
    "gradients",
    "dtype",
    "shape",
    "times",
    "bitwise_equal",
    "check",
    "device",
    "torch",
    "triton",
    "commit",
    "command",
    "run",
    "date",
)
"""The keys of a line, in order; a line whose check failed also has a `reason`."""


def repeat(
    cases: Sequence[Case],
    contender: Contender,
    directions: Sequence[str],
    times: int,
    device: torch.device,
    dtype: torch.dtype,
    provenance: Line,
    write: Callable[[Line], None],
) -> tuple[list[Line], list[str]]:
    """Run the contender `times` times on each case and direction; return the lines, and what was not run and why.

    "fwd" compares the output, and the LSE where the contender offers it; "bwd" the gradients of q, k and v, with the
    forward run anew each time.
    """
    lines, not_run = [], []
    for case in cases:
        for direction in directions:
            q, k, v, grad = inputs(case, device, dtype, contender.storage)
            for x in (q, k, v):
                x.requires_grad_(direction == "bwd")
            if reason := contender.obstacle(case, q):
                not_run.append(f"{contender.name} on {case.name}, {direction}: not run: {reason}")
                continue
            with contender.chosen():
                call = contender.prepare(case, q, k, v)
                first = _results(contender, case, call, (q, k, v), grad)
                changed = sum(
                    not _equal(first, _results(contender, case, call, (q, k, v), grad)) for _ in range(times - 1)
                )
            line = {
                "case": case.name,
                "direction": direction,
                **contender.labels(dtype, direction),
                "dtype": str(dtype).removeprefix("torch."),
                "shape": list(case.shape),
                "times": times,
                "bitwise_equal": changed == 0,
                "check": "failed" if changed else "passed",
                **provenance,
            }
            lines.append({key: line[key] for key in KEYS})
            if changed:
                lines[-1]["reason"] = f"{changed} of {times - 1} repeats differ from the first"
            write(lines[-1])
    return lines, not_run


def _results(
    contender: Contender, case: Case, call: Callable[[], Tensor], leaves: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    out = call()
    if out.requires_grad:
        return torch.autograd.grad(out, leaves, grad)
    return (out,) if contender.lse is None else (out, contender.lse(case, *leaves))


def _equal(first: tuple[Tensor, ...], again: tuple[Tensor, ...]) -> bool:
    """Return whether all bits are the same; NaN is never."""
    return all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
