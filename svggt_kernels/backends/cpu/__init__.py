"""The CPU backend: C++ kernels for every instruction set that matters, chosen where they run."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ...layout import BlockLayout
from ..contract import Traits, unfit
from .tables import walk

NAME = "cpu"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What setup.py writes where it could not build the extension: why.
NOT_BUILT = Path(__file__).with_name("not_built.txt")

# The instruction set to use, None for the best that this CPU has; set by tests.
INSTRUCTION_SET: str | None = None

# What runs on every CPU, only where INSTRUCTION_SET names it.
SLOW = "baseline"

# Backward holds more arrays in the same caches, so its column tiles are smaller.
BACKWARD_COLUMNS = 256


# What the machine lacks, by INSTRUCTION_SET.
_found: dict[str | None, str | None] = {}


@cache
def extension() -> ModuleType:
    """Return the compiled extension."""
    return import_module("._native", __name__)


def instruction_set() -> str:
    """Return the instruction set that the kernels use."""
    return INSTRUCTION_SET or extension().instruction_sets()[0]


def notes(dtype: torch.dtype) -> dict[str, str | None]:
    """Return the instruction set that the kernels use, and a better one that this CPU has, with why it is not used."""
    why = extension().why_amx_is_unused() if dtype == torch.bfloat16 else None
    return {instruction_set(): None} | ({"amx_bf16": why} if why else {})


TRAITS = Traits(notes=notes)


def unsupported(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why the CPU kernels cannot run such inputs, or None."""
    if device.type != "cpu":
        return f"it needs tensors on the CPU, got {device.type}"
    return unfit(dtype, DTYPES) or _missing()


def _missing() -> str | None:
    """Return what this machine lacks, or None; looked for once, and never while torch.compile traces, as it cannot."""
    if INSTRUCTION_SET not in _found and not torch.compiler.is_compiling():
        _found[INSTRUCTION_SET] = _look()
    return _found.get(INSTRUCTION_SET)


def _look() -> str | None:
    try:
        extension()
    except ImportError as error:
        not_installed = f"{error}; where this runs from a clone, pip install -e . builds it"
        why = NOT_BUILT.read_text().strip() if NOT_BUILT.exists() else not_installed
        return f"its C++ extension is not there: {why}"
    if instruction_set() == SLOW and INSTRUCTION_SET != SLOW:
        return "this CPU has no AVX2, and without it PyTorch is faster"
    return None


def tables(layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the tables of the layout that `forward` walks."""
    return list(walk(layout, extension().MOST_ROWS, extension().MOST_COLUMNS))


def backward_tables(layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the tables of the transposed layout: the backward pass owns keys and walks their queries."""
    return list(walk(layout.transposed(), extension().MOST_ROWS, BACKWARD_COLUMNS))


def forward(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N', D]
    v: Tensor,  # [B, H, N', D]
    tables: list[Tensor],
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, N, D]` and LSE `[B, H, N]`; bitwise the same for any number of threads."""
    dtype, (q, k, v) = q.dtype, _operands(q, k, v)
    out = _result(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    extension().forward(*map(_tensor, (q, k, v, out, lse)), *_how(q, k, tables, scale))
    return out.to(dtype), lse if need_lse else lse.new_empty(0)


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
    """Return the gradients of q, k, v; bitwise the same for any number of threads."""
    inner = (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        inner = inner - grad_lse
    dtype, (q, k, v, grad) = q.dtype, _operands(q, k, v, grad_out)
    dq, dk, dv = (_result(x) for x in (q, k, v))
    dq.zero_()  # queries that see nothing
    tensors = (q, k, v, grad, lse.contiguous(), inner.contiguous(), dq, dk, dv)
    extension().backward(*map(_tensor, tensors), *_how(k, q, tables, scale))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _operands(*tensors: Tensor) -> list[Tensor]:
    """Return tensors as the kernels read them: features contiguous; float32 if the CPU cannot multiply their dtype."""
    dtype = tensors[0].dtype
    if not (dtype == torch.bfloat16 and extension().has_bfloat16(instruction_set())):
        dtype = torch.float32
    converted = (x.to(dtype) for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in converted]


def _result(x: Tensor) -> Tensor:
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _tensor(x: Tensor) -> tuple[int, int, int, int]:
    """Return a `[B, H, N, D]` or `[B, H, N]` tensor as the extension takes it: address and strides."""
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _how(rows: Tensor, columns: Tensor, tables: list[Tensor], scale: float) -> tuple[object, ...]:
    """Return the arguments that all functions of the extension end with: tables, sizes, scale, options."""
    B, H, N, D = rows.shape
    options = (instruction_set(), rows.dtype == torch.bfloat16, torch.get_num_threads())
    return [(x.data_ptr(), x.numel()) for x in tables], (B, H, N, columns.shape[2], D), scale, options
