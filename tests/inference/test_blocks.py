"""Fused blocks against the blocks' own forward, and what keeps a block from being fused."""

from __future__ import annotations

import copy

import pytest
import torch
from doubles.vggt import DIM, HEADS, Attention, Block, Rotary
from torch import Tensor, nn

from svggt_kernels.inference import blocks, within_frames

TOKENS, POSITIONS = torch.randn(2, 11, DIM), torch.randint(0, 9, (2, 11, 2))


def block_of(change=None) -> nn.Module:
    block = Block(Rotary())
    if change is not None:
        change(block)
    return block.eval().requires_grad_(False)


def run(block: nn.Module, x: Tensor, dtype: torch.dtype | None = None, together: int = 1024) -> Tensor:
    return blocks.run(blocks.ReadyBlock(block), x, POSITIONS, within_frames.by_pytorch, dtype, together)


def not_normalised(block: nn.Module) -> None:
    block.attn.q_norm = block.attn.k_norm = nn.Identity()


def not_scaled(block: nn.Module) -> None:
    block.ls1 = block.ls2 = nn.Identity()


def other_mlp(block: nn.Module) -> None:
    block.mlp = nn.Sequential(nn.Linear(DIM, 64), nn.SiLU(), nn.Linear(64, DIM))


SHAPES = [None, not_normalised, not_scaled, other_mlp]


@pytest.mark.parametrize("together", [7, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", SHAPES, ids=lambda change: getattr(change, "__name__", "vggt"))
def test_a_block_is_its_forward(change, dtype: torch.dtype, together: int):
    block, before = block_of(change), TOKENS.clone()
    block, tokens = block.to(dtype), TOKENS.to(dtype)
    assert blocks.obstacle(block) is None
    expected = copy.deepcopy(block).double()(tokens.double(), POSITIONS)
    out = run(block, tokens, together=together)
    assert out.dtype == dtype
    allowed = torch.finfo(dtype).eps * expected.norm() + 2 * (block(tokens, POSITIONS).double() - expected).norm()
    assert (out.double() - expected).norm() <= allowed
    assert torch.equal(tokens, before.to(dtype))


def test_a_block_is_its_forward_under_autocast():
    block = block_of()
    exact = copy.deepcopy(block).double()(TOKENS.double(), POSITIONS)
    with torch.autocast("cpu", torch.bfloat16):
        plain, fused, narrow = block(TOKENS, POSITIONS), run(block, TOKENS), run(block, TOKENS, torch.bfloat16)
    assert (fused.dtype, narrow.dtype) == (plain.dtype, torch.bfloat16)
    assert (fused.double() - exact).norm() <= 2 * (plain.double() - exact).norm()
    assert (narrow.double() - exact).norm() <= 0.02 * exact.norm()


def test_scales_that_are_wider_than_the_weights_widen_the_sums():
    block = block_of().to(torch.bfloat16)
    for wider in (block.ls1, block.ls2, block.norm2):
        wider.float()
    tokens = TOKENS.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert run(block, tokens).dtype == block(tokens, POSITIONS).dtype == torch.float32


class Int8(nn.Linear):
    """Weights of 8 bits, which are parameters of a Linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


class CroCoRotary(nn.Module):
    """Of pi3: the base under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.base = 100.0


def put(path: str, value: object):
    """Return what puts a value into the attention of a block, or into what `path` names."""
    name, _, attribute = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(name), attribute, value)


def quantize(block: nn.Module) -> None:
    block.attn.qkv = Int8(block.attn.qkv)


STRANGERS = {
    "a norm of another kind": (put("norm1", nn.Identity()), "norm1 and norm2"),
    "a scale of another kind": (put("ls2", nn.Linear(2, 2)), "ls1 and ls2"),
    "no projection": (put("attn.proj", nn.Identity()), "attn.qkv and attn.proj"),
    "integer weights": (quantize, "floating-point weights"),
    "queries alone are normalised": (put("attn.k_norm", nn.Identity()), "attn.q_norm and attn.k_norm"),
    "another rotation": (put("attn.rope", CroCoRotary()), "no base_frequency"),
    "heads of another size": (put("attn.head_dim", 32), "attn.head_dim is 32, not 64"),
    "another scale": (put("attn.scale", 0.25), "attn.scale is 0.25, not 64 ** -0.5"),
    "a temperature": (put("attn.temperature", 4.0), "attn holds temperature"),
    "a gate": (put("attn.gate", nn.Parameter(torch.tensor(0.3))), "attn holds gate"),
    "a buffer": (lambda block: block.attn.register_buffer("gate", torch.tensor(0.3)), "attn holds gate"),
    "a tensor": (put("attn.gate", torch.tensor(0.3)), "attn holds gate"),
    "an adapter": (put("attn.adapter", nn.Linear(DIM // HEADS, DIM // HEADS)), "attn holds adapter"),
    "a third part": (put("cross", nn.Linear(2, 2)), "the block holds cross"),
    "an object in the MLP": (put("mlp.plan", object()), "mlp.plan is of object"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_blocks_of_another_shape_are_told_apart(kind: str):
    change, reason = STRANGERS[kind]
    assert reason in str(blocks.obstacle(block_of(change)))


def test_what_passes_through_or_is_switched_off_is_no_stranger():
    def change(block: nn.Module) -> None:
        block.drop_path1, block.attn.attn_drop, block.attn.gate = nn.Identity(), nn.Dropout(0.5), None
        block.sample_drop_ratio, block.attn.scale, block.attn.head_dim = 0.1, (DIM // HEADS) ** -0.5, DIM // HEADS
        block.attn.is_causal = False

    block = block_of(change)
    assert blocks.obstacle(block) is None
    torch.testing.assert_close(run(block, TOKENS), block(TOKENS, POSITIONS))


def test_what_has_no_attention_or_mlp_is_no_block():
    assert blocks.obstacle(Attention(Rotary())) == "it has no attn and mlp"
