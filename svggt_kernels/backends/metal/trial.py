"""First use on a GPU: is the shader right there, and is it faster than PyTorch's attention, one call per frame?

Nobody has run the shader on every Mac, so none is trusted: a virtual machine's GPU, a new chip or a new compiler may
differ. What is found holds for this process, and so for one chip and one torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from ...graph import CovisibilityGraph
from ...layout import BlockLayout
from ...proof import BUDGET, error_ratios_of, within_budget
from ...user_warnings import warn

VARIABLE = "SVGGT_KERNELS_MPS"
CHOICES = ("metal", "reference")

Attend = Callable[[BlockLayout, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""Takes a layout, q, k, v and the gradients of output and LSE; returns output, LSE and the gradients of q, k, v."""

_lock = Lock()
_failures: dict[tuple[torch.dtype, int], str | None] = {}
_milliseconds: dict[tuple[torch.dtype, int], dict[str, float]] = {}


def failure(attend: Attend, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return what is wrong with the shader's results on this GPU, None if nothing is; warn when that is found."""
    key = (dtype, head_size)
    with _lock:
        if key in _failures:
            return _failures[key]
        _failures[key] = found = _find_failure(attend, device, dtype, head_size)
    if found is not None:
        warn(
            f"the Metal kernels do not work here for {dtype} and head size {head_size}: {found}. PyTorch's "
            "attention, one call per frame, serves instead. Please open an issue with what "
            "`python -m svggt_kernels check --device mps` prints",
            RuntimeWarning,
        )
    return found


def slower(
    forward: Callable[[BlockLayout, Tensor, Tensor, Tensor], object],
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
) -> str | None:
    """Return why the shader, which works, should not be chosen for its speed; None if it should.

    Raises:
        ValueError: If the environment variable is set to anything but a backend.
    """
    wanted = os.environ.get(VARIABLE)
    wanted = "reference" if wanted == "sdpa" else wanted  # its name before
    if wanted is not None and wanted not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, or not set, got {wanted!r}")
    if wanted is not None:
        return None if wanted == "metal" else f"{VARIABLE} is {wanted}"
    found = milliseconds(forward, device, dtype, head_size)
    if found["metal"] <= found["pytorch"]:
        return None
    return (
        f"it took {found['metal']:.2f} ms in a trial, PyTorch's attention {found['pytorch']:.2f} ms; to run it all the "
        f"same, name it or set {VARIABLE}=metal"
    )


def milliseconds(
    forward: Callable[[BlockLayout, Tensor, Tensor, Tensor], object],
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
) -> dict[str, float]:
    """Return how long the shader ("metal") and PyTorch's attention ("pytorch") take.

    Timed are 4 heads of 6 frames of 1374 tokens that see their neighbours.
    """
    key = (dtype, head_size)
    with _lock:
        if key in _milliseconds:
            return _milliseconds[key]
        frames, tokens = 6, 1374
        layout = BlockLayout.from_graph(CovisibilityGraph.sequential(frames, 1), tokens).to(device)
        q, k, v = (torch.randn(1, 4, frames * tokens, head_size).to(device, dtype) for _ in range(3))

        def per_frame() -> None:
            for frame in range(frames):
                rows = slice(frame * tokens, (frame + 1) * tokens)
                columns = slice(max(frame - 1, 0) * tokens, (frame + 2) * tokens)
                # A copy, as scattered neighbours would need one.
                F.scaled_dot_product_attention(q[:, :, rows], k[:, :, columns].clone(), v[:, :, columns].clone())

        _milliseconds[key] = {"metal": _time(lambda: forward(layout, q, k, v)), "pytorch": _time(per_frame)}
        return _milliseconds[key]


def _find_failure(attend: Attend, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    for name, layout in _layouts().items():
        here = layout.to(device)

        def run(*inputs: Tensor, here: BlockLayout = here) -> tuple[Tensor, ...]:
            return attend(here, *inputs)

        try:
            ratios = error_ratios_of(run, here, dtype, head_size=head_size, heads=4)
        except (RuntimeError, SyntaxError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        if not within_budget(ratios):
            errors = ", ".join(f"{quantity} {ratio:.1f}" for quantity, ratio in ratios.items())
            return f"errors beyond {BUDGET:g} times those of plain attention for the layout {name!r}: {errors}"
    return None


def _layouts() -> dict[str, BlockLayout]:
    """Return small layouts, on the CPU, with tails, frames of one token, dense tokens, blind rows and unseen keys."""
    pairs = [(0, 0), (0, 2), (1, 1), (3, 0), (3, 1), (3, 2)]
    return {
        "blind": BlockLayout.from_graph(
            CovisibilityGraph.from_pairs(4, pairs, num_key_frames=4),
            [45, 1, 33, 64],
            key_tokens_per_frame=[39, 1, 70, 5],
        ),
        "dense": BlockLayout.from_graph(CovisibilityGraph.sequential(4, 1), 41, special_tokens=(2, 1)),
    }


def _time(run: Callable[[], object], repeats: int = 3) -> float:
    """Return the milliseconds of the fastest of some runs after a first one."""
    run()
    torch.mps.synchronize()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        torch.mps.synchronize()
        times.append(time.perf_counter() - begin)
    return 1000 * min(times)
