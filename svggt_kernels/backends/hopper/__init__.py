"""The Hopper backend: CUDA C++ with TMA, wgmma and warp specialisation, compiled at run time for sm_90a."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from ...coarse import CoarseLayout
from ...layout import BlockLayout
from .. import _nvrtc as runtime
from ..contract import Traits, readable, unfit
from . import backward_pass, forward_pass
from .operands import Tables, Weights, make_coarse_tables, make_tables

NAME = "hopper"

DTYPES = (torch.float16, torch.bfloat16)
HEAD_SIZES = (64, 128)
CHOICES = {"softmax": ("bounded", "online"), "gradients": ("deterministic", "accumulated")}

_chosen = {"softmax": "bounded", "gradients": "deterministic"}
_nvrtc: dict[str, str | None] = {}


def unsupported(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why these kernels cannot run such inputs, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    if torch.version.hip is not None:
        return "it was written for NVIDIA GPUs, this is ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it needs compute capability 9.0 (H100, H200), this device has {capability[0]}.{capability[1]}"
    if (reason := _without_bindings(str(torch.version.cuda)) or _without_compiler()) is not None:
        return reason
    return unfit(dtype, DTYPES, head_size, HEAD_SIZES)


@cache
def _without_bindings(cuda: str) -> str | None:
    """Return why there are no cuda-bindings for a torch that was built for CUDA `cuda`, as "13.0", or None."""
    major = cuda.partition(".")[0]
    install = f'pip install "cuda-bindings=={major}.*"'
    try:
        found = version("cuda-bindings") if find_spec("cuda.bindings") else None
    except (ImportError, ValueError):  # there is no package `cuda`, or another module has its name
        found = None
    if found is None:
        return f"cuda-bindings cannot be imported; torch 2.11 and newer for CUDA bring it: {install}"
    if found.partition(".")[0] != major:
        return f"it needs cuda-bindings of the CUDA that torch was built for, {cuda}, got {found}: {install}"
    return None


def _without_compiler() -> str | None:
    """Return why NVRTC cannot be loaded, or None; tried once, and never while torch.compile traces, as it cannot."""
    if not _nvrtc and not torch.compiler.is_compiling():
        try:
            runtime.nvrtc_version()
            _nvrtc["reason"] = None
        except (ImportError, RuntimeError) as error:
            _nvrtc["reason"] = f"NVRTC, which torch for CUDA brings, cannot be loaded: {error}".splitlines()[0]
    return _nvrtc.get("reason")


def softmax(kind: str) -> contextlib.AbstractContextManager[None]:
    """Choose how the forward kernel computes the softmax while the context lasts.

    The choice holds for the whole process, not for the calling thread alone.

    Args:
        kind: "bounded", the default: without a running maximum, and tiles with rows that this does not suit again with
            it; "online": all with a running maximum. float16 is always "online". The results agree to rounding.

    Raises:
        ValueError: If `kind` is neither.
    """
    return _choose("softmax", kind)


def gradients(kind: str) -> contextlib.AbstractContextManager[None]:
    """Choose how the backward pass computes the gradient of q while the context lasts.

    The choice holds for the whole process, as autograd calls the backward pass in a thread of its own. It acts when the
    backward pass runs; what was chosen when the forward pass ran does not matter.

    Args:
        kind: "deterministic", the default: in a pass of its own, bitwise repeatable; "accumulated": together with the
            gradients of k and v, by adding in float32, which is faster, but in no fixed order and hence not repeatable
            bit by bit.

    Raises:
        ValueError: If `kind` is neither.
    """
    return _choose("gradients", kind)


@contextlib.contextmanager
def _choose(what: str, kind: str) -> Iterator[None]:
    if kind not in CHOICES[what]:
        raise ValueError(f"{what} must be one of {', '.join(CHOICES[what])}, got {kind!r}")
    before, _chosen[what] = _chosen[what], kind
    try:
        yield
    finally:
        _chosen[what] = before


def choices(dtype: torch.dtype) -> Mapping[str, str]:
    """Return the softmax and the gradients that are chosen now."""
    return _chosen | ({} if dtype == torch.bfloat16 else {"softmax": "online"})


def tables(layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the row tiles of the layout and its runs; on a CUDA device also load the kernels that walk them.

    So a CUDA graph can capture the forward pass next, without its LSE. Only the kernels of the softmax that is chosen
    now are loaded, as each takes about a second, once per process and device.
    """
    _load(_forward_kernels(dtype, head_size, with_lse=False), layout.device)
    return list(make_tables(layout, forward_pass.ROWS))


def backward_tables(layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the same for the gradient of q, and those of the transposed layout for the gradients of k and v.

    Likewise only the kernels of the softmax and the gradients that are chosen now are loaded: those of the forward pass
    with its LSE, which the backward pass reads, and three more.
    """
    _load(_forward_kernels(dtype, head_size, with_lse=True), layout.device)
    _load(_backward_kernels(dtype, head_size), layout.device)
    return [*make_tables(layout, backward_pass.ROWS), *make_tables(layout.transposed(), backward_pass.ROWS)]


def coarse_tables(layout: CoarseLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the tables of all parts of the layout as one; on a CUDA device also load the kernels that walk them.

    Likewise under the softmax that is chosen now; those with the LSE and those without.
    """
    for with_lse in (False, True):
        _load(_forward_kernels(dtype, head_size, with_lse, weighted=True), layout.device)
    return [tensor for tables in make_coarse_tables(layout, forward_pass.ROWS) for tensor in tables]


TRAITS = Traits(
    # With fewer the host takes longer to launch the operator than the device to run PyTorch's attention.
    beats_dense_from=2**15,
    choices=choices,
    coarse_tables=coarse_tables,
    variants={"online": partial(softmax, "online"), "accumulated": partial(gradients, "accumulated")},
)


def _forward_kernels(
    dtype: torch.dtype, head_size: int, with_lse: bool, weighted: bool = False
) -> list[runtime.Kernel]:
    """Return what the forward pass launches under the chosen softmax."""
    variants = forward_pass.VARIANTS if _is_bounded(dtype) else ("online",)
    return [forward_pass.kernel(dtype, head_size, variant, with_lse, weighted) for variant in variants]


def _backward_kernels(dtype: torch.dtype, head_size: int) -> list[runtime.Kernel]:
    """Return what the backward pass launches under what is chosen."""
    return backward_pass.kernels(dtype, head_size, _accumulates())


def _load(kernels: Iterable[runtime.Kernel], device: torch.device) -> None:
    if device.type == "cuda":
        with torch.cuda.device(device):
            for kernel in kernels:
                runtime.load(kernel, device)


def _is_bounded(dtype: torch.dtype) -> bool:
    return choices(dtype)["softmax"] == "bounded"


def _accumulates() -> bool:
    return _chosen["gradients"] == "accumulated"


def forward(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N', D]
    v: Tensor,  # [B, H, N', D]
    tables: list[Tensor],
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, N, D]` and, if needed, LSE `[B, H, N]`."""
    walk, weights = tables[: len(Tables._fields)], tables[len(Tables._fields) :]
    with torch.cuda.device(q.device):
        q, k, v = (readable(x) for x in (q, k, v))
        return forward_pass.forward(
            q, k, v, Tables(*walk), Weights(*weights) if weights else None, scale, _is_bounded(q.dtype), need_lse
        )


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
    """Return the gradients of q, k, v; bitwise the same from run to run unless `gradients` says otherwise."""
    grad, q, k, v, out = (readable(x) for x in (grad_out, q, k, v, out))
    half = len(Tables._fields)
    with torch.cuda.device(q.device):
        return backward_pass.backward(
            grad, None if grad_lse is None else grad_lse.contiguous(), q, k, v, out, lse.contiguous(),
            Tables(*tables[:half]), Tables(*tables[half:]), scale, _accumulates(),
        )  # fmt: skip
