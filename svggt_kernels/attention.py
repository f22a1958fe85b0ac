"""The operator: attention over the visible key tokens only, with its contract, choice of backend and autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends
from .coarse import CoarseLayout
from .compiling import uncompiled
from .derivatives import require_reverse_mode
from .layout import BlockLayout
from .merging import merge
from .streams import is_capturing

LOG2_E = math.log2(math.e)
SMALLEST_SCALE = 2.0**-120
"""Of kernels, which hold it in float32, and the logarithm of how many tokens a key stands for divided by it."""


def block_sparse_attention(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N', D]
    v: Tensor,  # [B, H, N', D]
    layout: BlockLayout | CoarseLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query token to the key tokens that the layout lets it see, and to no other.

    The softmax runs over the visible keys only and is exact, in float32 or better inside. Keys that nobody sees are
    never used. A query that sees nothing gives 0 and LSE -inf, and its gradient is 0; a key that nobody sees gets
    gradient 0. Under autocast the inputs are cast as PyTorch's scaled_dot_product_attention casts them. Differentiable
    in reverse mode, once. A query whose visible scores hold NaN gives NaN and LSE NaN. What infinite inputs give is not
    defined.

    Args:
        q: Queries `[B, H, N, D]`; any strides. float16, bfloat16 or float32, with the reference backend also float64.
        k: Keys `[B, H, N', D]`, same dtype and device; N' = N unless the layout is rectangular.
        v: Values `[B, H, N', D]`, likewise.
        layout: Who sees whom, on the device of q. A `CoarseLayout` also lets queries see frames at a stride of their
            patches; its LSE then counts a key for as many as it stands for.
        scale: Factor on the scores, by default `D ** -0.5`. With ln 2, q.k comes in units of log2, which saves the
            hopper backend a multiplication for each in the forward pass of bfloat16 with the bounded softmax: worth it
            where q is computed anyway and can be multiplied by `D ** -0.5 * log2(e)` before it is rounded. The LSE
            stays in natural logarithm.
        return_lse: If True also return the log-sum-exp of the scaled scores over the visible keys.
        backend: "hopper", "triton", "metal", "cpu", "reference", or None for the first of them that can run these
            inputs (on Apple's GPUs the faster one). A named backend runs or raises.

    Returns:
        The output `[B, H, N, D]` in the dtype of q; its memory lies as `[B, N, H, D]`, so that merging the heads
        copies nothing. With `return_lse` also the LSE `[B, H, N]`, natural logarithm, float32 (float64 for float64
        inputs). Both are differentiable.

    Raises:
        ValueError: If shapes, devices or the layout do not fit together, or the named backend cannot run the inputs.
        TypeError: If dtypes differ or no backend runs them.
        RuntimeError: If traced by torch.compile or captured into a CUDA graph with a layout that was not prepared, see
            `prepare`; if differentiated twice or in forward mode; or inside a transform of torch.func.
    """
    _validate(q, k, v, layout)
    require_reverse_mode("block_sparse_attention", "q, k or v", q, k, v)
    q, k, v = _autocast(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them first")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        q, scale = _with_normal_scale(q, scale)
    name = choose_backend(q.device, q.dtype, q.shape[-1], backend)
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if isinstance(layout, CoarseLayout) and (training or not _takes_coarse(name)):
        out, lse = _attend_to_parts(q, k, v, layout, scale, training, name)
    else:
        out, lse = _attend(q, k, v, layout, scale, training, return_lse, name)
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout | CoarseLayout,
    scale: float,
    training: bool,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output, and the LSE if it is asked for."""
    tables, backward_tables = _tables(layout, backend, q.dtype, q.shape[-1], training)
    need_lse = return_lse or (training and backends.load(backend).TRAITS.saves_lse)
    return torch.ops.svggt_kernels.attention(q, k, v, tables, backward_tables, float(scale), need_lse, backend)


def _attend_to_parts(
    q: Tensor, k: Tensor, v: Tensor, layout: CoarseLayout, scale: float, training: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the output and the LSE over the keys of all parts of a layout."""
    if not torch.compiler.is_compiling():
        layout.order.before_use(layout.device, layout.kept)
    outs, lses = [], []
    for part in layout.parts:
        out, lse = _attend(q, part.packed(k), part.packed(v), part.layout, scale, training, True, backend)
        outs.append(out)
        lses.append(lse if part.weight == 1 else lse + part.added_score)
    return merge(outs, lses)


def _takes_coarse(backend: str) -> bool:
    """Whether a backend attends to all parts of a CoarseLayout in one pass."""
    return backends.load(backend).TRAITS.coarse_tables is not None


def _with_normal_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return q and a scale with the same scores, which is positive and, but for float64, at least `SMALLEST_SCALE`.

    Kernels take the maximum of the unscaled scores, and multiply a hidden score of -inf by the scale.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if scale < 0:
        q, scale = -q, -scale
    if q.dtype != torch.float64:
        float32 = torch.finfo(torch.float32)
        if scale * LOG2_E > float32.max:
            raise ValueError(f"scale * log2(e) must be finite in float32, got a scale of {scale}; multiply q instead")
        if scale <= 2.0**-150 or (scale < SMALLEST_SCALE and q.dtype == torch.float16):
            scale = 0.0  # float32 rounds to 0 the scale, or all scores that float16 can have
        elif scale < SMALLEST_SCALE:
            scale, exponent = math.frexp(scale)
            q = q * 2.0**exponent
    if scale == 0:
        # Not q * 0, whose gradient would be NaN where that of q overflows.
        return q.masked_fill(~q.isnan(), 0), 1.0
    return q, scale


def prepare(
    layout: BlockLayout | CoarseLayout,
    dtype: torch.dtype,
    head_size: int,
    *,
    backend: str | None = None,
    training: bool = False,
) -> str:
    """Make the tables of a layout that a backend walks, and return the name of the backend.

    The operator does this by itself on first use. Only before torch.compile traces or a CUDA graph captures it, this
    must be called, because the tables do not belong into that graph.

    Any CUDA stream may use the layout: one that did not make the tables waits for them. What is compiled or captured
    does not wait: prepare on the stream that will run it, or synchronise. A CUDA graph reads the tables wherever it is
    replayed, so the layout must be kept for as long.

    Args:
        layout: The layout, on the device where attention will run.
        dtype: Dtype of q, k and v at the kernel.
        head_size: D.
        backend: As in `block_sparse_attention`.
        training: If True also make the tables of the backward pass, which takes a `CoarseLayout` by parts; needed too
            where a CUDA graph captures the hopper backend with `return_lse` and a `BlockLayout`: the LSE has kernels of
            its own.

    Raises:
        ValueError: If `backend` is unknown or cannot run such inputs.
        TypeError: If no backend can, or an argument is of another type.
    """
    _require_layout(layout)
    for name, value, kind in (("dtype", dtype, torch.dtype), ("head_size", head_size, int)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r} ({type(value).__name__})")
    name = choose_backend(layout.device, dtype, head_size, backend)
    if isinstance(layout, BlockLayout):
        _tables(layout, name, dtype, head_size, training)
        return name
    layout.order.before_use(layout.device, layout.kept)
    if _takes_coarse(name):
        _tables(layout, name, dtype, head_size, training=False)
    if training or not _takes_coarse(name):
        for part in layout.parts:
            _tables(part.layout, name, dtype, head_size, training)
    return name


def choose_backend(device: torch.device, dtype: torch.dtype, head_size: int, backend: str | None = None) -> str:
    """Return the name of the backend that runs such q, k, v: `backend` itself if given, else the best one.

    Raises:
        ValueError: If `backend` is unknown or cannot run such inputs.
        TypeError: If no backend can.
    """
    if backend is not None:
        kernels = backends.load(backend)
        reason = kernels.unsupported(device, dtype, head_size)
        if reason is not None:
            raise ValueError(f"backend {backend} cannot run this: {reason}; choose another backend or backend=None")
        return kernels.NAME
    name = backends.preferred(device, dtype, head_size)
    if name is not None:
        return name
    why = backends.reasons(device, dtype, head_size, unnamed=True)
    raise TypeError(
        f"no backend can run {dtype} on {device} with head size {head_size}: "
        + "; ".join(f"{name}: {reason}" for name, reason in why.items())
    )


def _tables(
    layout: BlockLayout | CoarseLayout, backend: str, dtype: torch.dtype, head_size: int, training: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tables for forward and, if training, for backward; made once and kept in the layout."""
    found = []
    for direction in ("forward", "backward") if training else ("forward",):
        key = (backend, dtype, head_size, direction)
        if key not in layout.tables:
            _make_tables(layout, key)
        found.append(layout.tables[key])
    if not torch.compiler.is_compiling():
        layout.order.before_use(layout.device, layout.kept)
    return (found[0], found[1]) if training else (found[0], [])


@uncompiled(
    recursive=True,
    reason="a layout must have its tables before torch.compile traces attention over it as one graph; call "
    "svggt_kernels.prepare(layout, dtype, head_size) first, with training=True for gradients",
)
def _make_tables(layout: BlockLayout | CoarseLayout, key: tuple[str, torch.dtype, int, str]) -> None:
    backend, dtype, head_size, direction = key
    if is_capturing(layout.device):
        raise RuntimeError(
            "a layout must have its tables before a CUDA graph captures attention over it; call "
            f"svggt_kernels.prepare(layout, {dtype}, {head_size}, backend={backend!r}, "
            f"training={direction == 'backward'}) first, or run once before with inputs of these sizes"
        )
    kernels = backends.load(backend)
    # As in BlockLayout.runs: a later backward pass must be able to save them.
    with layout.order.lock, torch.inference_mode(False), torch.no_grad():
        if key in layout.tables:  # by another thread, meanwhile
            return
        layout.order.before_use(layout.device, layout.kept)
        if isinstance(layout, CoarseLayout):
            assert kernels.TRAITS.coarse_tables is not None
            made = kernels.TRAITS.coarse_tables(layout, dtype, head_size)
        else:
            make = kernels.tables if direction == "forward" else kernels.backward_tables
            made = make(layout, dtype, head_size)
        layout.order.after_making(layout.device)
        layout.tables[key] = made


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _require_layout(layout: object) -> None:
    if not isinstance(layout, BlockLayout | CoarseLayout):
        raise TypeError(
            f"layout must be a BlockLayout or a CoarseLayout, got {type(layout).__name__}; build one with from_graph"
        )


def _validate(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout | CoarseLayout) -> None:
    _require_layout(layout)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape [B, H, N, D], got {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    B, H, _, D = q.shape
    if D == 0:
        raise ValueError(f"the head size must be 1 or more, got q of shape {list(q.shape)}")
    for name, x, tokens in (
        ("q", q, layout.num_tokens),
        ("k", k, layout.num_key_tokens),
        ("v", v, layout.num_key_tokens),
    ):
        if x.shape[1] == tokens != x.shape[2]:
            raise ValueError(
                f"{name} must have shape [B, H, N, D] with N = {tokens}, the layout's tokens, got {list(x.shape)}; "
                "these look like [B, N, H, D]; transpose(1, 2) first"
            )
        if x.shape != (B, H, tokens, D):
            raise ValueError(
                f"{name} must have shape {[B, H, tokens, D]} to fit q and the layout "
                f"({layout.num_tokens} query tokens, {layout.num_key_tokens} key tokens), got {list(x.shape)}"
                + ("; expand k and v to the heads of q" if x.shape[1] != H else "")
            )
    if layout.device != q.device:
        raise ValueError(
            f"the layout must be on the device of q, got {layout.device} and {q.device}; use layout.to('{q.device}')"
        )


_library = torch.library.Library("svggt_kernels", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] tables, Tensor[] backward_tables, float scale, bool need_lse, "
    "str backend) -> (Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor[] tables, float scale, str backend) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _attention(q, k, v, tables, backward_tables, scale, need_lse, backend):  # type: ignore[no-untyped-def]
    if q.numel() == 0:
        return _attention_fake(q, k, v, tables, backward_tables, scale, need_lse, backend)
    with torch.autocast(q.device.type, enabled=False):
        return backends.load(backend).forward(q, k, v, tables, scale, need_lse)


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(grad_out, grad_lse, q, k, v, o, lse, tables, scale, backend):  # type: ignore[no-untyped-def]
    if q.numel() == 0:
        return _attention_backward_fake(grad_out, grad_lse, q, k, v, o, lse, tables, scale, backend)
    with torch.autocast(q.device.type, enabled=False):
        return backends.load(backend).backward(grad_out, grad_lse, q, k, v, o, lse, tables, scale)


@torch.library.register_fake("svggt_kernels::attention", lib=_library)
def _attention_fake(q, k, v, tables, backward_tables, scale, need_lse, backend):  # type: ignore[no-untyped-def]
    B, H, N, D = q.shape
    lse = q.new_empty((B, H, N) if need_lse else (0,), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(B, N, H, D).transpose(1, 2), lse


@torch.library.register_fake("svggt_kernels::attention_backward", lib=_library)
def _attention_backward_fake(grad_out, grad_lse, q, k, v, o, lse, tables, scale, backend):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, tables, backward_tables, scale, _, backend = inputs
    ctx.save_for_backward(q, k, v, *output, *backward_tables)
    ctx.num_tables, ctx.scale, ctx.backend = len(tables), scale, backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, *tables = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.svggt_kernels.attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, tables, ctx.scale, ctx.backend
    )
    return *grads, [None] * ctx.num_tables, [None] * len(tables), None, None, None


torch.library.register_autograd("svggt_kernels::attention", _differentiate, setup_context=_save, lib=_library)


def _refuse(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError("block_sparse_attention can be differentiated once only; create_graph=True is not supported")


torch.library.register_autograd("svggt_kernels::attention_backward", _refuse, lib=_library)
