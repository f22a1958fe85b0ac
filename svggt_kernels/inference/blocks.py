"""Transformer blocks of VGGT's kind, run with the modules' own parameters but few passes over memory.

A block is `x + gamma1 attention(norm1(x))`, then `x + gamma2 mlp(norm2(x))`. Blocks may differ in whether queries and
keys are normalised or rotated, whether there are gammas, and in their MLP, which must take each token by itself. What
is computed is what the block's forward computes, up to rounding, at inference only: products as the modules compute
them, under autocast in its dtype, and everything else in float32, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .ops import (
    add_scaled,
    add_scaled_and_normalise,
    gelu_,
    layer_norm,
    normalise_and_rotate_,
)
from .settings import CACHES, attributes_of, is_setting, stranger

AttendFunction = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Attention of q, k and v `[B, H, N, D]` with a scale."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

OF_COMPILE = frozenset({"_compiled_call_impl", "_is_torch_compile"})
"""What torch.compile puts on a module that it wraps."""

KNOWN_OF_BLOCK = frozenset({"norm1", "norm2", "ls1", "ls2", "attn", "mlp", "sample_drop_ratio"}) | OF_COMPILE
KNOWN_OF_ATTENTION = frozenset(
    {"qkv", "proj", "q_norm", "k_norm", "rope", "num_heads", "head_dim", "scale", "fused_attn"}
)
KNOWN_OF_SCALE = frozenset({"gamma", "dim", "init_values", "inplace"})
KNOWN_OF_ROTATION = CACHES | {"base_frequency", "scaling_factor"}
"""What the formula reads, and what in known models has no effect on it: names of what modules may hold."""


def obstacle(block: Any) -> str | None:
    """Return why a module is not a block that `run` can run, or None if it is.

    A block, its attention, rotation and scales may hold nothing but what the formula reads, as what else they hold may
    matter to more tokens than a proof sees: no other parameters, buffers or submodules, and other attributes only if
    these are None or False.
    """
    attn: Any = getattr(block, "attn", None)
    parts = (
        (block, ("attn", "mlp"), _is_module, "it has no attn and mlp"),
        (block, ("norm1", "norm2"), _is_affine, "norm1 and norm2 are not LayerNorm with weight and bias"),
        (block, ("ls1", "ls2"), _is_scale, "ls1 and ls2 are not LayerScale"),
        (attn, ("qkv", "proj"), _is_linear, "attn.qkv and attn.proj are not Linear with floating-point weights"),
    )
    for holder, names, fits, reason in parts:
        if not all(fits(getattr(holder, name, None)) for name in names):
            return reason
    if not isinstance(getattr(attn, "num_heads", None), int) or attn.qkv.out_features != 3 * attn.qkv.in_features:
        return "attn does not say its num_heads, or its qkv is not three times as wide as its tokens"
    head_size = attn.qkv.in_features // attn.num_heads
    if getattr(attn, "head_dim", head_size) != head_size:
        return f"attn.head_dim is {attn.head_dim}, not {head_size}"
    scale = getattr(attn, "scale", head_size**-0.5)
    if not isinstance(scale, float) or not math.isclose(scale, head_size**-0.5):
        return f"attn.scale is {scale}, not {head_size} ** -0.5"
    return _obstacle_of_embedding(attn, head_size) or _stranger_in(block) or _obstacle_of_mlp(block.mlp)


def _obstacle_of_embedding(attn: Any, head_size: int) -> str | None:
    norms: list[Any] = [getattr(attn, name, None) for name in ("q_norm", "k_norm")]
    rotation = _rotation(attn)
    if all(norm is None or isinstance(norm, nn.Identity) for norm in norms):
        if rotation is None:
            return None
    elif not all(_is_affine(norm) and norm.normalized_shape == (head_size,) for norm in norms):
        return "attn.q_norm and attn.k_norm are not LayerNorm over a head"
    if rotation is not None and _base(rotation) is None:
        return "its rotation is of another kind: attn.rope has no base_frequency"
    if head_size % 4 or (head_size // 4) & (head_size // 4 - 1):
        return f"a head of {head_size} cannot be rotated in two dimensions by a power of 2 of frequencies"
    return None


def _stranger_in(block: Any) -> str | None:
    """Return what a block holds that the formula does not read."""
    rotation = _rotation(block.attn)
    parts = [("the block", block, KNOWN_OF_BLOCK), ("attn", block.attn, KNOWN_OF_ATTENTION)]
    parts += [(name, getattr(block, name, None), KNOWN_OF_SCALE) for name in ("ls1", "ls2")]
    parts += [("its rotation", rotation, KNOWN_OF_ROTATION)]
    for where, part, known in parts:
        if part is not None and (name := stranger(part, known, _has_no_effect)) is not None:
            return f"{where} holds {name}, which the fused block does not know"
    return None


def _has_no_effect(value: object) -> bool:
    """Whether an attribute is off, or a module that returns what it is given in evaluation mode."""
    passes_through = type(value) in (nn.Identity, nn.Dropout) or type(value).__name__ == "DropPath"
    return value is False or (isinstance(value, nn.Module) and passes_through)


def _obstacle_of_mlp(mlp: nn.Module) -> str | None:
    """Return why an MLP, which runs by itself on some tokens at a time, may depend on more than them."""
    for path, module in mlp.named_modules(prefix="mlp"):
        for name, value in attributes_of(module).items():
            if not is_setting(value):
                return f"{path}.{name} is of {type(value).__name__}, in which anything may be"
    return None


class ReadyBlock:
    """What `run` reads of a block for which `obstacle` is None; holds as long as nothing in the block is replaced.

    A forward has a hundred blocks, and reading one of them anew takes the host as long as launching it.

    Args:
        block: The block.
    """

    def __init__(self, block: Any) -> None:
        attn, mlp = block.attn, block.mlp
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, mlp
        self.qkv, self.proj, self.num_heads = attn.qkv, attn.proj, attn.num_heads
        self.q_norm, self.k_norm = _norm(attn, "q_norm"), _norm(attn, "k_norm")
        rotation = _rotation(attn)
        self.base = None if rotation is None else _base(rotation)
        self.gammas = _gamma(block, "ls1"), _gamma(block, "ls2")
        self.weight: Tensor = attn.qkv.weight
        self._products = (mlp.fc1, mlp.fc2) if _is_two_products(mlp) else ()

    def stream_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype that upstream's sums have, for tokens x."""
        dtype = torch.promote_types(x.dtype, compute_dtype(self.weight))
        for gamma in self.gammas:
            dtype = dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
        return dtype

    def run_mlp(self, x: Tensor) -> Tensor:
        """Run the MLP; where it is two products with GELU between them, without a second tensor for hidden values."""
        if not self._products:
            return self.mlp(x)
        first, second = self._products
        return second(gelu_(first(x)))


def run(
    block: ReadyBlock,
    x: Tensor,
    pos: Tensor | None,
    attend: AttendFunction,
    dtype: torch.dtype | None,
    tokens_together: int,
) -> Tensor:
    """Run a block.

    Args:
        block: The block.
        x: Tokens `[B, N, C]`; not changed.
        pos: Positions of the tokens `[B, N, 2]`, which a block that does not rotate leaves aside.
        attend: The attention.
        dtype: Dtype of the residual stream, or None for upstream's.
        tokens_together: Tokens that go through what follows the attention at once.

    Returns:
        New tokens `[B, N, C]` in `dtype`.
    """
    B, N, C = x.shape
    gamma1, gamma2 = block.gammas
    kind = torch.float64 if x.dtype == torch.float64 else compute_dtype(block.weight)
    x = x.to(block.stream_dtype(x) if dtype is None else dtype)
    qkv = block.qkv(layer_norm(x, block.norm1, kind)).view(B, N, 3, block.num_heads, C // block.num_heads)
    scale = qkv.shape[-1] ** -0.5
    pos = None if block.base is None else pos
    if block.q_norm is not None or block.base is not None:
        # Scores in units of log2 spare the kernels a multiplication, and queries are rounded once even so.
        factor, scale = scale / math.log(2), math.log(2)
        normalise_and_rotate_(qkv, pos, block.q_norm, block.k_norm, block.base, factor)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attended = attend(q, k, v, scale).transpose(1, 2).reshape(B * N, C)
    del q, k, v, qkv
    # From here on every token is on its own: some at a time, so that what is between is small and stays in the cache.
    out = torch.empty((B * N, C), dtype=x.dtype, device=x.device)
    for before, some, after in _in_parts(tokens_together, x.reshape(B * N, C), attended, out):
        normed = add_scaled_and_normalise(before, block.proj(some), gamma1, block.norm2, kind, after)
        add_scaled(after, block.run_mlp(normed), gamma2, after)
    return out.view(B, N, C)


def _in_parts(count: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Return tensors of as many rows, so many rows at a time."""
    return [tensors] if len(tensors[0]) <= count else zip(*(rows.split(count) for rows in tensors), strict=True)


def launches(block: Any, x: Tensor, dtype: torch.dtype | None) -> Iterator[partial[Any]]:
    """Yield a call of each operation that `run` makes with x `[1, N, C]`, so that its kernel is compiled."""
    ready, (_, N, C) = ReadyBlock(block), x.shape
    kind = compute_dtype(ready.weight)
    x = x.to(ready.stream_dtype(x) if dtype is None else dtype)
    product = x.new_zeros(1, N, C, dtype=kind)
    qkv = x.new_zeros(1, N, 3, ready.num_heads, C // ready.num_heads, dtype=kind)
    if ready.q_norm is not None or ready.base is not None:
        pos = None if ready.base is None else torch.zeros(1, N, 2, dtype=torch.int64, device=x.device)
        yield partial(normalise_and_rotate_, qkv, pos, ready.q_norm, ready.k_norm, ready.base)
    yield partial(layer_norm, x, ready.norm1, kind)
    gammas, outs = ready.gammas, (torch.empty_like(x), torch.empty_like(x))
    yield partial(add_scaled_and_normalise, x, product, gammas[0], ready.norm2, kind, outs[0])
    yield partial(add_scaled, x, product, gammas[1], outs[1])
    yield partial(gelu_, product.clone())


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which products with a weight are computed: autocast's, or its own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _is_two_products(mlp: Any) -> bool:
    """Whether an MLP is two products with GELU between them."""
    fc1, act, fc2 = (getattr(mlp, name, None) for name in ("fc1", "act", "fc2"))
    return (
        _is_linear(fc1)
        and _is_linear(fc2)
        and type(act) is nn.GELU
        and act.approximate == "none"
        and stranger(mlp, frozenset({"fc1", "act", "fc2"}), _has_no_effect) is None
    )


def _is_module(module: object) -> bool:
    return isinstance(module, nn.Module)


def _is_affine(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None and _has_floats(norm)


def _is_linear(module: object) -> bool:
    return type(module) is nn.Linear and _has_floats(module)


def _has_floats(module: nn.Module) -> bool:
    """Whether the parameters of a module are ordinary ones, of floating-point numbers."""
    return all(type(each) is nn.Parameter and each.dtype in FLOATS for each in module.parameters(recurse=False))


def _is_scale(module: object) -> bool:
    if module is None or isinstance(module, nn.Identity):
        return True
    return type(module).__name__ == "LayerScale" and type(getattr(module, "gamma", None)) is nn.Parameter


def _gamma(block: Any, name: str) -> Tensor | None:
    return getattr(getattr(block, name, None), "gamma", None)


def _norm(attn: Any, name: str) -> nn.LayerNorm | None:
    norm = getattr(attn, name, None)
    return norm if isinstance(norm, nn.LayerNorm) else None


def _rotation(attn: Any) -> Any:
    """Return what rotates queries and keys, or None."""
    return getattr(attn, "rope", None)


def _base(rotation: Any) -> float | None:
    """Return the base of the frequencies of VGGT's rotary embedding."""
    base = getattr(rotation, "base_frequency", None)
    return float(base) if isinstance(base, (int, float)) else None
