"""Transformer blocks of VGGT's shape, run with the modules' own parameters but few passes over memory.

A block is `x + gamma1 attention(norm1(x))`, then `x + gamma2 mlp(norm2(x))`; DINOv2's blocks are the same without
normalised and rotated queries and keys. What is computed is upstream's, up to rounding, at inference only: products as
the modules compute them, under autocast in its dtype, and everything else in float32, rounded once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .arithmetic import add_scaled, layer_norm, normalise_and_rotate_

TOKENS_AT_ONCE = 2**16
"""Tokens whose hidden activations of an MLP are held at once: 512 MiB of 4096 in 16 bits."""

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Attention of q, k and v `[B, H, N, D]` with a scale."""

BLOCK_FORWARDS = (("self", "x", "pos"), ("self", "x_or_x_list"))
ATTENTION_FORWARDS = (("self", "x", "pos"), ("self", "x", "attn_bias", "pos"))


def obstacle(block: Any) -> str | None:
    """Return why a module is not a block that `run` can run, or None if it is."""
    if not all(isinstance(getattr(block, name, None), nn.Module) for name in ("attn", "mlp")):
        return "it has no attn and mlp"
    attn: Any = block.attn
    for owner, allowed in ((block, BLOCK_FORWARDS), (attn, ATTENTION_FORWARDS)):
        arguments = tuple(inspect.signature(type(owner).forward).parameters)
        if arguments not in allowed:
            return f"the forward of {type(owner).__name__} takes {', '.join(arguments[1:])}"
    if not all(_is_affine(getattr(block, name, None)) for name in ("norm1", "norm2")):
        return "norm1 and norm2 are not LayerNorm with weight and bias"
    if not all(_is_scale(getattr(block, name, None)) for name in ("ls1", "ls2")):
        return "ls1 and ls2 are not LayerScale"
    if not all(isinstance(getattr(attn, name, None), nn.Linear) for name in ("qkv", "proj")):
        return "attn.qkv and attn.proj are not Linear"
    if not isinstance(getattr(attn, "num_heads", None), int) or attn.qkv.out_features != 3 * attn.qkv.in_features:
        return "attn does not say its num_heads, or its qkv is not three times as wide as its tokens"
    return _obstacle_of_embedding(attn)


def _obstacle_of_embedding(attn: Any) -> str | None:
    head_size = attn.qkv.in_features // attn.num_heads
    norms: list[Any] = [getattr(attn, name, None) for name in ("q_norm", "k_norm")]
    if getattr(attn, "rope", None) is None and all(isinstance(norm, nn.Identity) for norm in norms):
        return None
    if not all(_is_affine(norm) and norm.normalized_shape == (head_size,) for norm in norms):
        return "attn.q_norm and attn.k_norm are not LayerNorm over a head"
    if not isinstance(getattr(attn.rope, "base_frequency", None), (int, float)):
        return "attn.rope does not say its base_frequency"
    if head_size % 4 or (head_size // 4) & (head_size // 4 - 1):
        return f"a head of {head_size} cannot be rotated in two dimensions by a power of 2 of frequencies"
    return None


def can_run_now(block: Any) -> bool:
    """Whether a block may be run so in this call: at inference, and if nobody hooks into what is inside it.

    Modules inside are passed over, see a part of the tokens, or return what is changed in place.
    """
    if torch.is_grad_enabled() or block.training:
        return False
    return not any(_is_hooked(module) for module in block.modules() if module is not block)


def run(block: Any, x: Tensor, pos: Any, attend: Attend, dtype: torch.dtype | None) -> Tensor:
    """Run a block, for which `obstacle` is None.

    Args:
        block: The block.
        x: Tokens `[B, N, C]`; not changed.
        pos: Positions of the tokens `[B, N, 2]`, or None for a block that does not rotate.
        attend: The attention.
        dtype: Dtype of the residual stream, or None for that of x.

    Returns:
        New tokens `[B, N, C]` in `dtype`.
    """
    attn, (B, N, C) = block.attn, x.shape
    x = x if dtype is None else x.to(dtype)
    kind = compute_dtype(block)
    qkv = attn.qkv(layer_norm(x, block.norm1, kind)).view(B, N, 3, attn.num_heads, C // attn.num_heads)
    scale = qkv.shape[-1] ** -0.5
    if attn.rope is not None:
        # Scores in units of log2 spare the kernels a multiplication, and queries are rounded once even so.
        factor, scale = scale / math.log(2), math.log(2)
        normalise_and_rotate_(qkv, pos, attn.q_norm, attn.k_norm, attn.rope.base_frequency, factor)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = attend(q, k, v, scale)
    del q, k, v, qkv
    x = add_scaled(x, attn.proj(out.transpose(1, 2).reshape(B, N, C)), _gamma(block.ls1))
    del out
    rows = x.view(B * N, C)
    for part in rows.split(TOKENS_AT_ONCE):
        add_scaled(part, block.mlp(layer_norm(part, block.norm2, kind)), _gamma(block.ls2), out=part)
    return x


def entering(block: Any, x: Tensor) -> Tensor:
    """Return the tokens that enter a block's attention, `[B, N, C]`, in float32."""
    return layer_norm(x, block.norm1, torch.float32)


def compute_dtype(block: Any) -> torch.dtype:
    """Return the dtype in which a block's products are computed: autocast's, or that of its weights."""
    weight = block.attn.qkv.weight
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _is_hooked(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")  # tools that offload weights put theirs here
    is_replaced = forward is not None and getattr(forward, "replaced", forward) is not None  # by more than a patch
    return is_replaced or bool(module._forward_hooks or module._forward_pre_hooks)


def _is_affine(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None


def _is_scale(module: object) -> bool:
    if isinstance(module, nn.Identity):
        return True
    return type(module).__name__ == "LayerScale" and isinstance(getattr(module, "gamma", None), nn.Parameter)


def _gamma(scale: Any) -> Tensor | None:
    return getattr(scale, "gamma", None)
