"""Attention over several sets of keys from attention over each: `merge`, with its contract and autograd.

With out_i and lse_i of the same queries on disjoint sets of keys:

    lse = log sum_i exp lse_i        w_i = exp(lse_i - lse)        out = sum_i w_i out_i

and, with gradients dO and dLSE:

    dout_i = w_i dO        dlse_i = w_i (dO . out_i - dO . out + dLSE)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..derivatives import require_reverse_mode
from ..packages import runs_triton


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return attention over the keys of all parts, from attention over the keys of each.

    What `block_sparse_attention(..., return_lse=True)` returns for the same queries and several disjoint sets of keys
    becomes what it returns for all of these keys. A constant that is added to an LSE weighs the keys of its part:
    log n, as if each of them were there n times. The order of the parts does not matter but for rounding, and parts may
    be merged again. Sums are in float32, for float64 in float64. Differentiable in reverse mode, once.

    Args:
        outs: Outputs `[B, H, N, D]`, one for each part, all of one dtype and device.
        lses: Log-sum-exp of each part `[B, H, N]`, natural logarithm, float32, or float64 for float64 outputs. Where it
            is -inf the part sees nothing, and its output is not looked at.

    Returns:
        Output `[B, H, N, D]`, in memory as `[B, N, H, D]`, in the dtype of the parts, and LSE `[B, H, N]`; 0 and -inf
        where no part sees anything.

    Raises:
        ValueError: If there is no part, not as many LSEs as outputs, or shapes or devices differ.
        TypeError: If a part is no tensor, or dtypes differ.
        RuntimeError: If differentiated twice or in forward mode, or inside a transform of torch.func.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be one for each part, at least one, got {len(outs)} and {len(lses)}")
    for name, parts in (("outs", outs), ("lses", lses)):
        for i, x in enumerate(parts):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}[{i}] must be a torch.Tensor, got {type(x).__name__}")
    first, wide = outs[0], _wide(outs[0].dtype)
    if first.dim() != 4:
        raise ValueError(f"outs must have shape [B, H, N, D], got {list(first.shape)}")
    for name, parts, shape, dtype in (("outs", outs, first.shape, first.dtype), ("lses", lses, first.shape[:-1], wide)):
        for i, x in enumerate(parts):
            if x.shape != shape or x.device != first.device:
                raise ValueError(
                    f"{name}[{i}] must be {list(shape)} on {first.device} to fit outs[0], got {list(x.shape)} on "
                    f"{x.device}"
                )
            if x.dtype != dtype:
                raise TypeError(f"{name}[{i}] must be {dtype} to fit outs[0], got {x.dtype}; cast it first")
    require_reverse_mode("merge", "a part", *outs, *lses)
    out, lse = torch.ops.svggt_kernels.merge(outs, lses)
    return out, lse


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _weights(lses: list[Tensor]) -> list[Tensor]:
    """Return exp(lse_i - lse), 0 where a part sees nothing; lse, whose rounding all would share, is not rounded."""
    parts = torch.stack(lses)
    return list(parts.softmax(0).masked_fill(parts == -torch.inf, 0))


def merge_by_pytorch(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute `merge` by its formula."""
    lse = torch.stack(lses).logsumexp(0)
    B, H, N, D = outs[0].shape
    total = lse.new_zeros(B, N, H, D).transpose(1, 2)
    for out, lse_of_part, weight in zip(outs, lses, _weights(lses), strict=True):
        seen = out.to(lse.dtype).masked_fill((lse_of_part == -torch.inf)[..., None], 0)
        total.addcmul_(weight[..., None], seen)
    return total.to(outs[0].dtype), lse


_library = torch.library.Library("svggt_kernels", "FRAGMENT")
_library.define("merge(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)")
_library.define(
    "merge_backward(Tensor grad_out, Tensor? grad_lse, Tensor[] outs, Tensor[] lses) -> (Tensor[], Tensor[])"
)


@torch.library.impl(_library, "merge", "CompositeExplicitAutograd")
def _merge(outs, lses):  # type: ignore[no-untyped-def]
    if outs[0].is_cuda and runs_triton(outs[0].device):
        from . import kernel

        if kernel.obstacle(outs) is None:
            return kernel.merge(outs, lses)
    return merge_by_pytorch(outs, lses)


@torch.library.impl(_library, "merge_backward", "CompositeExplicitAutograd")
def _merge_backward(grad_out, grad_lse, outs, lses):  # type: ignore[no-untyped-def]
    wide_grad = grad_out.to(lses[0].dtype)
    weights = _weights(lses)
    inner = [(wide_grad * out).sum(-1).masked_fill(x == -torch.inf, 0) for out, x in zip(outs, lses, strict=True)]
    total = sum(weight * of_part for weight, of_part in zip(weights, inner, strict=True))
    if grad_lse is not None:
        total = total - grad_lse
    grads = [(weight[..., None] * wide_grad).to(grad_out.dtype) for weight in weights]
    return grads, [weight * (of_part - total) for weight, of_part in zip(weights, inner, strict=True)]


@torch.library.register_fake("svggt_kernels::merge", lib=_library)
def _merge_fake(outs, lses):  # type: ignore[no-untyped-def]
    B, H, N, D = outs[0].shape
    return outs[0].new_empty(B, N, H, D).transpose(1, 2), lses[0].new_empty(B, H, N)


# Where its results lie in memory follows from its arguments as PyTorch's operators say.
torch.library.register_fake("svggt_kernels::merge_backward", _merge_backward, lib=_library)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    outs, lses = inputs
    ctx.save_for_backward(*outs, *lses)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    parts = list(ctx.saved_tensors)
    outs, lses = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    if grad_out is None:
        grad_out = torch.zeros_like(outs[0])
    return torch.ops.svggt_kernels.merge_backward(grad_out, grad_lse, outs, lses)


torch.library.register_autograd("svggt_kernels::merge", _differentiate, setup_context=_save, lib=_library)


def _refuse(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError("merge can be differentiated once only; create_graph=True is not supported")


torch.library.register_autograd("svggt_kernels::merge_backward", _refuse, lib=_library)
