"""The comparison of a forward of our own with the module's own forward in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from doubles.vggt import DIM, Attention, Block, Rotary
from torch import Tensor, nn

from svggt_kernels.inference import blocks, verification, within_frames
from svggt_kernels.inference.verification import verify, wider_copy

POSITIONS = torch.randint(0, 9, (2, 11, 2))


def block_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    return Block(Rotary()).to(dtype).eval().requires_grad_(False)


def fused(block: nn.Module, x: Tensor, positions: Tensor, factor: float = 1.0) -> Tensor:
    return factor * blocks.run(blocks.ReadyBlock(block), x, positions, within_frames.by_pytorch, None, 7)


def found(block: nn.Module, own: Callable[..., Any] = fused, x: Tensor | None = None) -> verification.Verification:
    x = torch.randn(2, 11, DIM) if x is None else x
    return verify(block, own, lambda out: [out], (x.to(block.attn.qkv.weight.dtype), POSITIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_right_forward_passes(dtype: torch.dtype):
    result = found(block_of(dtype))
    assert result.reason is None and result.is_final
    assert 0 < result.ratio <= 2 and result.seconds > 0 and result.gib == 0


def test_a_right_forward_passes_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert found(block_of()).reason is None


def test_products_in_tf32_are_verified(monkeypatch: pytest.MonkeyPatch):
    """Emulated: what is multiplied is rounded to the 10 bits that tensor cores read."""

    def tf32(x: Tensor) -> Tensor:
        return x if x.dtype != torch.float32 else ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(x.dtype)

    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, weight, bias=None: linear(tf32(x), tf32(weight), bias))
    block = block_of()
    assert found(block).reason is None
    block.attn.__class__ = Hotter
    assert "something else" in str(found(block).reason)


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_what_runs_in_float32_runs_so_once(cast: bool):
    dtypes, block = [], block_of()
    block.attn.__class__ = type("Noted", (Attention,), {"attend": lambda self, q, k, v: noted(self, q, k, v)})

    def noted(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtypes.append(v.dtype)
        return Attention.attend(attention, q, k, v)

    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        assert found(block).reason is None
    assert dtypes == ([torch.bfloat16, torch.float64, torch.float32] if cast else [torch.float32, torch.float64])


class Hotter(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(1.25 * q, k, v)


class LessTheMean(nn.Linear):
    """Mixes the tokens of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-2, keepdim=True))


class Halved(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def put(path: str, value: object) -> Callable[[nn.Module], None]:
    name, _, attribute = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(name), attribute, value)


WRONG = {
    "attention scaled by 1.25": put("attn.__class__", Hotter),
    "tokens mixed": put("mlp", LessTheMean(DIM, DIM)),
    "a class of a norm": put("norm1.__class__", Halved),
}


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_module_that_computes_something_else_fails(kind: str, cast: bool):
    block = block_of()
    WRONG[kind](block)
    block.eval().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        result = found(block)
    assert "the model computes something else" in str(result.reason) and result.is_final
    assert result.ratio > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 100])
def test_what_bfloat16_rounds_away_is_told_by_the_formula(dtype: torch.dtype, size: float):
    """Residuals a hundred times as large as what blocks add hide nothing either."""
    own = partial(fused, factor=1.001)
    x = size * torch.randn(2, 11, DIM)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert "something else" in str(found(block_of(dtype), own, x).reason)


def test_another_epsilon_fails():
    def own(block: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        twin = copy.deepcopy(block)
        twin.norm1.eps = 1e-3
        return fused(twin, x, positions)

    assert "something else" in str(found(block_of(), own).reason)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (
            lambda block, x, positions: x[:1],
            "its output 0 is torch.float32 [1, 11, 128], not torch.float32 [2, 11, 128]",
        ),
        (lambda block, x, positions: fused(block, x, positions).double(), "its output 0 is torch.float64"),
        (lambda block, x, positions: fused(block, x, positions) * math.nan, "nan times as far from float64"),
        (lambda block, x, positions: 1 / 0, "could not be compared with the forward of Block: division by zero"),
    ],
    ids=["shape", "dtype", "not a number", "raises"],
)
def test_why_a_forward_may_not_run(own, reason: str):
    result = found(block_of(), own)
    assert reason in str(result.reason) and result.is_final and not result.ratio <= 2


def test_another_number_of_tensors_is_told():
    block = block_of()
    result = verify(
        block, lambda *_: [], lambda out: out if isinstance(out, list) else [out], (torch.randn(2, 11, DIM), POSITIONS)
    )
    assert result.reason == "it returns 0 tensors, the model's forward 1"


def test_not_finite_and_out_of_memory_say_nothing_of_the_next_call():
    result = found(block_of(), x=torch.full((2, 11, DIM), math.nan))
    assert result.reason == verification.NOT_FINITE and not result.is_final

    def exhaust(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    result = found(block_of(), exhaust)
    assert result.reason == verification.NO_MEMORY and not result.is_final


class NoDouble(Block):
    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        if x.dtype == torch.float64:
            raise NotImplementedError("float64")
        return super().forward(x, pos)


class Otherwise(Block):
    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return super().forward(x, pos) * (2 if x.dtype == torch.float64 else 1)


class Noisy(Block):
    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return super().forward(x, pos) + 0.1 * torch.randn_like(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (NoDouble, "it could not be compared with the forward of NoDouble: float64"),
        (Otherwise, verification.ANOTHER),
        (Noisy, verification.ANOTHER),
    ],
)
def test_a_module_whose_float64_is_no_reference_is_not_verified(kind: type[Block], reason: str):
    """Its own error would allow anything."""
    block = block_of()
    block.__class__ = kind
    assert found(block).reason == reason
    assert found(block, lambda block, x, positions: x).reason == reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wider_copy_is_a_copy_in_float64(dtype: torch.dtype):
    block = block_of(dtype)
    block.register_buffer("unused", None)
    block.register_buffer("index", torch.arange(3))
    x = torch.randn(2, 11, DIM, dtype=torch.float64)
    wide = wider_copy(block, torch.float64)
    assert torch.equal(wide(x, POSITIONS), copy.deepcopy(block).double()(x, POSITIONS))
    assert all(a is b for a, b in zip(wide.parameters(), block.parameters(), strict=True))
    with pytest.raises(RuntimeError):
        wide(x[..., :3], POSITIONS)
    assert {each.dtype for each in wide.parameters()} == {dtype}


class Holding:
    """What may hold a patch, a model and more; a copy of it would be a copy of all that."""

    def __deepcopy__(self, memo: object) -> None:
        raise AssertionError("a hook was copied")

    def __call__(self, *args: object) -> None:
        pass


def test_nothing_is_written_to_the_module():
    block = block_of()
    block.attn.rope.frequency_cache = {}
    block.register_forward_hook(Holding())
    block.mlp.register_forward_pre_hook(Holding())
    block.register_buffer("unused", None)

    def contents() -> list[dict[str, Any]]:
        return [
            {**vars(module), **{name: dict(x) for name, x in vars(module).items() if isinstance(x, dict)}}
            for module in block.modules()
        ]

    def own(block: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        block.attn.rope.frequency_cache[x.dtype] = x
        return fused(block, x, positions)

    objects, values = contents(), copy.deepcopy(list(block.parameters()))
    assert found(block, own).reason is None
    assert contents() == objects
    for parameter, value in zip(block.parameters(), values, strict=True):
        assert torch.equal(parameter, value)
