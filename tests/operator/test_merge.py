"""Attention over several sets of keys from attention over each."""

from __future__ import annotations

import pytest
import torch
from tiers import every
from torch import Tensor
from torch.autograd import forward_ad

from svggt_kernels import merge
from svggt_kernels.merging import merge_by_pytorch
from svggt_kernels.packages import installed
from svggt_kernels.proof import BUDGET, error_ratio

HAS_TRITON = installed("triton") != "not installed"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parts_of(count: int, *, dtype=torch.float64, shape=(2, 3, 7, 8), blind: float = 0.3) -> tuple[list, list]:
    """Outputs and LSEs of parts that see nothing here and there, the first row nowhere."""
    wide = torch.promote_types(dtype, torch.float32)
    outs = [torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(count)]
    lses = [3 * torch.randn(shape[:-1], dtype=wide, device=DEVICE) for _ in range(count)]
    for lse in lses:
        lse[torch.rand(lse.shape, device=DEVICE) < blind] = -torch.inf
        lse[:, :, 0] = -torch.inf
    return outs, lses


def formula(outs: list[Tensor], lses: list[Tensor], dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """In one dtype, with exponentials that do not overflow at these sizes; differentiable."""
    weights = [lse.to(dtype).exp() for lse in lses]
    total = sum(weights)
    out = sum(weight[..., None] * out.to(dtype) for weight, out in zip(weights, outs, strict=True))
    return out / total.where(total > 0, 1)[..., None], total.log()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_against_the_formula(count: int):
    outs, lses = parts_of(count)
    out, lse = merge(outs, lses)
    expected, expected_lse = formula(outs, lses)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert bool((out[:, :, 0] == 0).all()) and bool((lse[:, :, 0] == -torch.inf).all())
    assert out.transpose(1, 2).is_contiguous()


def test_parts_merge_in_any_order_and_again():
    outs, lses = parts_of(4)
    out, lse = merge(outs, lses)
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        again = merge([outs[i] for i in order], [lses[i] for i in order])
        torch.testing.assert_close(again, (out, lse))
    first, rest = merge(outs[:2], lses[:2]), merge(outs[2:], lses[2:])
    torch.testing.assert_close(merge(*zip(first, rest, strict=True)), (out, lse))


def test_what_a_part_that_sees_nothing_holds_is_not_looked_at():
    outs, lses = parts_of(3)
    expected = merge(outs, lses)
    for out, lse in zip(outs, lses, strict=True):
        out[lse == -torch.inf] = torch.nan
    torch.testing.assert_close(merge(outs, lses), expected)


def test_nan_in_what_is_seen_is_nan():
    outs, lses = parts_of(2, blind=0)
    lses[1][1, 2, 3] = torch.nan
    out, lse = merge(outs, lses)
    assert bool(out[1, 2, 3].isnan().all()) and bool(lse[1, 2, 3].isnan())
    assert int(out.isnan().sum()) == 8 and int(lse.isnan().sum()) == 1


@pytest.mark.parametrize("asked", ["out", "lse", "both"])
def test_gradients(asked: str):
    outs, lses = parts_of(3)
    seen = torch.stack(lses).logsumexp(0) > -torch.inf
    inputs = [x.requires_grad_() for x in (*outs, *lses)]
    results = []
    for function in (merge, formula):
        out, lse = function(outs, lses)
        loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
        if asked != "lse":
            loss = loss + (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)).sum()
        if asked != "out":
            loss = loss + (lse * torch.linspace(-1, 1, lse.numel(), device=DEVICE).view(lse.shape))[seen].sum()
        results.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    for ours, theirs in zip(*results, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs.nan_to_num()  # d log 0
        torch.testing.assert_close(ours, theirs.to(ours.dtype))
    with pytest.raises(RuntimeError, match="once only"):
        out, _ = merge(outs, lses)
        (grad,) = torch.autograd.grad(out.square().sum(), outs[:1], create_graph=True)
        grad.sum().backward()


def by_triton(outs, lses):
    from svggt_kernels.merging import kernel

    return kernel.merge(outs, lses)


IMPLEMENTATIONS = {"torch": merge_by_pytorch, "triton": by_triton}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 4, 9])
@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_within_the_budget(kind: str, count: int, dtype: torch.dtype):
    if kind == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    if kind == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 and does not round")
    outs, lses = parts_of(count, dtype=dtype, shape=(2, 3, 37, 20))
    for out, lse in zip(outs, lses, strict=True):
        out[lse == -torch.inf] = torch.nan
    out, lse = IMPLEMENTATIONS[kind](outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    outs = [x.nan_to_num() for x in outs]
    (plain, plain_lse), (exact, exact_lse) = formula(outs, lses, torch.float32), formula(outs, lses)
    assert error_ratio(out, plain.to(dtype), exact) <= BUDGET
    assert error_ratio(lse, plain_lse, exact_lse) <= BUDGET


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_high_lses_cost_no_precision(kind: str):
    """The spacing of float32 at 60 is 4e-6, far above what a sum of outputs may be off."""
    if kind == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    outs, lses = parts_of(3, dtype=torch.float32)
    lses = [lse + 60 for lse in lses]
    out, _ = IMPLEMENTATIONS[kind](outs, lses)
    (plain, _), (exact, _) = formula(outs, lses, torch.float32), formula(outs, lses)
    assert error_ratio(out, plain, exact) <= BUDGET


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_what_the_kernel_leaves_to_pytorch():
    from svggt_kernels.merging import kernel

    out = torch.empty(1, 2, 7, 8, device="meta")
    assert kernel.obstacle([out] * 9) is None
    assert kernel.obstacle([out.double()]) is not None
    assert kernel.obstacle([out.expand(kernel.MOST_SAMPLES + 1, 2, 7, 8)]) is not None
    assert kernel.obstacle([torch.empty(1, 16, 2**27, 1, device="meta")]) is not None


def test_compiled():
    outs, lses = parts_of(3, dtype=torch.float32)
    outs[0].requires_grad_()
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    results = [function(outs, lses) for function in (merge, compiled)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(out.square().sum(), outs[0])[0] for out, _ in results]
    torch.testing.assert_close(*gradients)


def test_operators_are_registered_rightly():
    outs, lses = parts_of(3, dtype=torch.float32)
    torch.library.opcheck(torch.ops.svggt_kernels.merge.default, ([x.requires_grad_() for x in outs], lses))
    out, lse = (x.detach() for x in merge(outs, lses))
    torch.library.opcheck(
        torch.ops.svggt_kernels.merge_backward.default,
        (out, lse.nan_to_num(), [x.detach() for x in outs], lses),
    )


@pytest.mark.parametrize("moved", every(3, ["both", "outs", "lses"]))
def test_operators_are_registered_rightly_for_any_strides(moved: str):
    outs, lses = parts_of(3, dtype=torch.float32)
    if moved != "lses":
        outs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in outs]
    if moved != "outs":
        lses = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in lses]
    inputs = [x.requires_grad_() for x in (*outs, *lses)]
    torch.library.opcheck(torch.ops.svggt_kernels.merge.default, (inputs[:3], inputs[3:]))
    out, lse = (x.detach() for x in merge(outs, lses))
    parts = [x.detach() for x in inputs]
    for grad_lse in (None, lse.nan_to_num()):
        torch.library.opcheck(torch.ops.svggt_kernels.merge_backward.default, (out, grad_lse, parts[:3], parts[3:]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, from make_dual
@pytest.mark.parametrize("argument", [0, 3])
def test_forward_mode_is_refused(argument: int):
    outs, lses = parts_of(2)
    tensors = [*outs, *lses]
    with forward_ad.dual_level():
        tensors[argument] = forward_ad.make_dual(tensors[argument], torch.randn_like(tensors[argument]))
        with pytest.raises(RuntimeError, match="merge has derivatives in reverse mode only, and a part has"):
            merge(tensors[:2], tensors[2:])


@pytest.mark.parametrize("transform", [torch.func.vjp, lambda function, x: torch.func.vmap(function)(x[None])])
def test_transforms_of_torch_func_are_refused(transform):
    outs, lses = parts_of(2)
    with pytest.raises(RuntimeError, match=r"merge runs inside no transform of torch\.func"):
        transform(lambda out: merge([out, outs[1]], lses)[0], outs[0])


def test_bad_arguments_are_named():
    outs, lses = parts_of(2, dtype=torch.float32)
    with pytest.raises(ValueError, match="one for each part, at least one, got 0 and 0"):
        merge([], [])
    with pytest.raises(ValueError, match="got 2 and 1"):
        merge(outs, lses[:1])
    with pytest.raises(TypeError, match=r"lses\[1\] must be a torch.Tensor"):
        merge(outs, [lses[0], 0.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"outs\[1\] must be \[2, 3, 7, 8\]"):
        merge([outs[0], outs[1][:1]], lses)
    with pytest.raises(TypeError, match=r"lses\[0\] must be torch.float32"):
        merge(outs, [x.half() for x in lses])
    with pytest.raises(TypeError, match=r"outs\[1\] must be torch.float32"):
        merge([outs[0], outs[1].half()], lses)
    with pytest.raises(ValueError, match=r"outs must have shape \[B, H, N, D\]"):
        merge([outs[0][0]], lses[:1])
