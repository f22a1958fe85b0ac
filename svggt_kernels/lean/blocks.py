"""Transformer blocks of VGGT's kind, run with the modules' own parameters but few passes over memory.

A block is `x + gamma1 attention(norm1(x))`, then `x + gamma2 mlp(norm2(x))`. Blocks may differ in whether queries and
keys are normalised or rotated, whether there are gammas, and in their MLP, which must take each token by itself;
`anatomy` says how. What is computed is upstream's, up to rounding, at inference only: products as the modules compute
them, under autocast in its dtype, and everything else in float32, rounded once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from .arithmetic import add_scaled, add_scaled_and_normalise, gelu_, layer_norm, normalise_and_rotate_

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Attention of q, k and v `[B, H, N, D]` with a scale."""

TOKENS = ("x", "x_or_x_list")
POSITIONS = ("pos", "xpos")
BLOCK_FORWARDS = (("x", "pos"), ("x", "xpos"), ("x_or_x_list",), ("x", "pos", "attn_mask"))
ATTENTION_FORWARDS = (
    ("x", "pos"),
    ("x", "xpos"),
    ("x", "attn_bias"),
    ("x", "attn_bias", "pos"),
    ("x", "attn_bias", "xpos"),
    ("x", "pos", "attn_mask"),
)


def obstacle(block: Any) -> str | None:
    """Return why a module is not a block that `run` can run, or None if it is."""
    if not all(isinstance(getattr(block, name, None), nn.Module) for name in ("attn", "mlp")):
        return "it has no attn and mlp"
    attn: Any = block.attn
    for owner, allowed in ((block, BLOCK_FORWARDS), (attn, ATTENTION_FORWARDS)):
        arguments = tuple(inspect.signature(type(owner).forward).parameters)[1:]
        if arguments not in allowed:
            return f"the forward of {type(owner).__name__} takes {', '.join(arguments)}"
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
    rotation = _rotation(attn)
    if all(norm is None or isinstance(norm, nn.Identity) for norm in norms):
        if rotation is None:
            return None
    elif not all(_is_affine(norm) and norm.normalized_shape == (head_size,) for norm in norms):
        return "attn.q_norm and attn.k_norm are not LayerNorm over a head"
    if rotation is not None and _base(rotation) is None:
        return "its rotation is of another kind: attn.rope has no base_frequency (VGGT), nor F0 = 1 and base (CroCo)"
    if head_size % 4 or (head_size // 4) & (head_size // 4 - 1):
        return f"a head of {head_size} cannot be rotated in two dimensions by a power of 2 of frequencies"
    return None


def anatomy(block: Any) -> Hashable:
    """Return what blocks that compute the same formula, for which `obstacle` is None, have in common."""
    attn = block.attn
    return (
        *(type(part) for part in (block, attn, block.mlp, _norm(attn, "q_norm"), _rotation(attn))),
        *(_gamma(block, name) is None for name in ("ls1", "ls2")),
        *(getattr(attn, name, False) for name in ("use_scalable_softmax", "use_entropy_scaling")),
        attn.qkv.weight.device,
    )


def arguments(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """Return the tokens that a block is called with and the positions by which it rotates them, None if it does not.

    None if it is called with more, such as a mask, or without such positions.
    """
    given = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
    x = next(given.pop(name) for name in TOKENS if name in given)
    pos = next((given.pop(name) for name in POSITIONS if name in given), None)
    _, *others = given.values()
    if not isinstance(x, Tensor) or any(other is not None for other in others):
        return None
    if _rotation(block.attn) is None:
        return x, None
    return (x, pos) if isinstance(pos, Tensor) else None


def run(
    block: Any,
    x: Tensor,
    pos: Tensor | None,
    attend: Attend,
    dtype: torch.dtype | None,
    tokens_at_once: int,
) -> Tensor:
    """Run a block, for which `obstacle` is None.

    Args:
        block: The block.
        x: Tokens `[B, N, C]`; not changed.
        pos: Positions of the tokens `[B, N, 2]`, or None for a block that does not rotate.
        attend: The attention.
        dtype: Dtype of the residual stream, or None for upstream's.
        tokens_at_once: Tokens that go through what follows the attention at once.

    Returns:
        New tokens `[B, N, C]` in `dtype`.
    """
    attn, (B, N, C) = block.attn, x.shape
    gamma1, gamma2 = _gamma(block, "ls1"), _gamma(block, "ls2")
    kind = compute_dtype(block)
    x = x.to(_stream_dtype(x, kind, gamma1, gamma2) if dtype is None else dtype)
    qkv = attn.qkv(layer_norm(x, block.norm1, kind)).view(B, N, 3, attn.num_heads, C // attn.num_heads)
    scale = qkv.shape[-1] ** -0.5 * _temperature(attn, N)
    q_norm, k_norm, rotation = _norm(attn, "q_norm"), _norm(attn, "k_norm"), _rotation(attn)
    if q_norm is not None or rotation is not None:
        # Scores in units of log2 spare the kernels a multiplication, and queries are rounded once even so.
        factor, scale = scale / math.log(2), math.log(2)
        base = None if rotation is None else _base(rotation)
        normalise_and_rotate_(qkv, pos, q_norm, k_norm, base, factor)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attended = attend(q, k, v, scale).transpose(1, 2).reshape(B * N, C)
    del q, k, v, qkv
    # From here on every token is on its own: some at a time, so that what is between is small and stays in the cache.
    out = torch.empty((B * N, C), dtype=x.dtype, device=x.device)
    parts = (rows.split(tokens_at_once) for rows in (x.reshape(B * N, C), attended, out))
    for before, some, after in zip(*parts, strict=True):
        normed = add_scaled_and_normalise(before, attn.proj(some), gamma1, block.norm2, kind, after)
        add_scaled(after, _mlp(block.mlp, normed), gamma2, after)
    return out.view(B, N, C)


def entering(block: Any, x: Tensor) -> Tensor:
    """Return the tokens that enter a block's attention, `[B, N, C]`, in float32."""
    return layer_norm(x, block.norm1, torch.float32)


def compute_dtype(block: Any) -> torch.dtype:
    """Return the dtype in which a block's products are computed: autocast's, or that of its weights."""
    weight = block.attn.qkv.weight
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _stream_dtype(x: Tensor, kind: torch.dtype, *gammas: Tensor | None) -> torch.dtype:
    """Return the dtype that upstream's sums have."""
    dtype = torch.promote_types(x.dtype, kind)
    for gamma in gammas:
        dtype = dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
    return dtype


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """Run an MLP; where it is two products with GELU between them, without a second tensor for its hidden values."""
    parts = dict(mlp.named_children())
    fc1, act, fc2 = (parts.pop(name, None) for name in ("fc1", "act", "fc2"))
    plain = isinstance(fc1, nn.Linear) and type(act) is nn.GELU and isinstance(fc2, nn.Linear)
    if (
        plain
        and act.approximate == "none"
        and all(isinstance(part, (nn.Dropout, nn.Identity)) for part in parts.values())
    ):
        return fc2(gelu_(fc1(x)))
    return mlp(x)


def _temperature(attn: Any, tokens: int) -> float:
    """Return by what UniCeption's attention multiplies its scores, which depends on the number of tokens.

    Scalable softmax (arXiv 2501.19399) and entropy scaling (arXiv 2502.07785).
    """
    factor = math.log(tokens) if getattr(attn, "use_scalable_softmax", False) else 1.0
    if getattr(attn, "use_entropy_scaling", False):
        growth, base = attn.entropy_scaling_growth_factor, attn.base_token_count_for_entropy_scaling
        factor *= math.sqrt(growth * math.log(tokens) / math.log(base))
    return factor


def _is_affine(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None


def _is_scale(module: object) -> bool:
    if module is None or isinstance(module, nn.Identity):
        return True
    return type(module).__name__ == "LayerScale" and isinstance(getattr(module, "gamma", None), nn.Parameter)


def _gamma(block: Any, name: str) -> Tensor | None:
    return getattr(getattr(block, name, None), "gamma", None)


def _norm(attn: Any, name: str) -> nn.LayerNorm | None:
    norm = getattr(attn, name, None)
    return norm if isinstance(norm, nn.LayerNorm) else None


def _rotation(attn: Any) -> Any:
    """Return what rotates queries and keys, or None; UniCeption calls it otherwise."""
    return next(
        (found for name in ("rope", "custom_positional_encoding") if (found := getattr(attn, name, None))), None
    )


def _base(rotation: Any) -> float | None:
    """Return the base of the frequencies, which VGGT's rotary embedding and CroCo's call by different names."""
    base = getattr(rotation, "base_frequency", None)
    if base is None and getattr(rotation, "F0", None) == 1:
        base = getattr(rotation, "base", None)
    return float(base) if isinstance(base, (int, float)) else None
