"""The Metal backend: a shader for Apple's GPUs, compiled by torch on first use and tried before it is trusted."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from ...layout import BlockLayout
from ..contract import Traits, unfit
from . import shader, trial
from .shader import Work, make_work

NAME = "metal"

DTYPES = tuple(shader.ELEMENTS)
HEAD_SIZES = shader.HEAD_SIZES

# Tests on other machines set it to run the launcher on CPU tensors.
DEVICE = "mps"


def unsupported(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why the shader cannot run such inputs, or None."""
    if device.type != DEVICE:
        return f"it needs an Apple GPU (mps), got {device.type}"
    if not hasattr(torch.mps, "compile_shader"):
        return f"it needs torch 2.7 or newer, which compiles shaders, got {torch.__version__}: pip install -U torch"
    reason = unfit(dtype, DTYPES, head_size, HEAD_SIZES)
    if reason is not None or torch.compiler.is_compiling():  # it traces only what `prepare` has tried before
        return reason
    return trial.failure(_attend, device, dtype, head_size)


def slower(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why backend=None passes over the shader although it could run, or None; measured at the first call."""
    return None if torch.compiler.is_compiling() else trial.slower(_forward, device, dtype, head_size)


def trials(device: torch.device) -> list[dict[str, object]]:
    """Return for every dtype and head size what fails on an Apple GPU, or else the times of a trial."""
    if device.type != DEVICE:
        return []
    failures = {kind: unsupported(device, *kind) for kind in product(DTYPES, HEAD_SIZES)}
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "head_size": head_size,
            "failure": failure,
            "milliseconds": None if failure else trial.milliseconds(_forward, device, dtype, head_size),
        }
        for (dtype, head_size), failure in failures.items()
    ]


TRAITS = Traits(unpreferred=slower, trials=trials)


def _forward(layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    key = (NAME, q.dtype, q.shape[-1], "forward")
    if key not in layout.tables:
        layout.tables[key] = tables(layout, q.dtype, q.shape[-1])
    return forward(q, k, v, layout.tables[key], scale, need_lse=True)


def _attend(
    layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, ...]:
    out, lse = _forward(layout, q, k, v)
    walks, scale = backward_tables(layout, q.dtype, q.shape[-1]), q.shape[-1] ** -0.5
    return out, lse, *backward(grad_out, grad_lse.to(lse.dtype), q, k, v, out, lse, walks, scale)


def tables(layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the work of the forward kernel."""
    return list(make_work(layout.to("cpu"), layout.device))


def backward_tables(layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the work for the gradient of q, and that of the transposed layout for the gradients of k and v."""
    host = layout.to("cpu")
    return [*make_work(host, layout.device), *make_work(host.transposed(), layout.device)]


def forward(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N', D]
    v: Tensor,  # [B, H, N', D]
    tables: list[Tensor],
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, N, D]` and LSE `[B, H, N]`."""
    B, H, N, D = q.shape
    q, k, v = (_readable(x) for x in (q, k, v))
    out = q.new_empty(B, N, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, N, dtype=torch.float32)
    shader.launch("attention_forward", [q, k, v, out, lse], Work(*tables), [q, k, v, out], N, scale, products=2)
    return out, lse if need_lse else lse.new_empty(0)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v; bitwise the same from run to run."""
    N = q.shape[2]
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    q, k, v, out, grad = (_readable(x) for x in (q, k, v, out, grad_out))
    lse = lse.contiguous()
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
    inner = torch.empty_like(lse)
    half = len(Work._fields)
    shader.launch(
        "attention_backward_queries", [q, k, v, out, grad, lse, grad_lse, inner, dq], Work(*tables[:half]),
        [q, k, v, out, grad, dq], N, scale, products=3,
    )  # fmt: skip
    shader.launch(
        "attention_backward_keys", [q, k, v, grad, lse, inner, dk, dv], Work(*tables[half:]),
        [q, k, v, grad, dk, dv], N, scale, products=4,
    )  # fmt: skip
    return dq, dk, dv


def _readable(x: Tensor) -> Tensor:
    """Return x, copied if the last axis is not adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()
