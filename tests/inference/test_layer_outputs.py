"""What is kept of an aggregator's layer outputs, and how it is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svggt_kernels.inference.layer_outputs import LayerOutputs

DEPTH, SHAPE = 4, (2, 5, 7, 6)  # B, S, P, C
KEPT = (1, 3)


def halves(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Tokens after the frame block and after the global block of each layer."""
    generator = torch.Generator().manual_seed(0)
    return [(*torch.randn(2, *SHAPE, generator=generator).to(device, dtype),) for _ in range(DEPTH)]


def filled(tokens: list[tuple[Tensor, Tensor]], *arguments: object, **options: object) -> LayerOutputs:
    outputs = LayerOutputs(DEPTH, *arguments, **options)
    for layer, pair in enumerate(tokens):
        for half in pair:
            outputs.keep(layer, half)
    outputs.settle()
    return outputs


def test_a_layer_is_both_halves_side_by_side():
    tokens = halves()
    outputs = filled(tokens)
    assert len(outputs) == DEPTH
    for layer, (pair, output) in enumerate(zip(tokens, outputs, strict=True)):
        assert torch.equal(output, torch.cat(pair, -1))
        assert output.shape == outputs.shape(layer) == outputs.shape(layer - DEPTH) == (*SHAPE[:3], 2 * SHAPE[3])
        assert outputs[layer - DEPTH] is output


@pytest.mark.parametrize("layer", [0, 2, -2, -4])
def test_reading_a_layer_that_was_not_kept_is_refused_in_words(layer: int):
    outputs = filled(halves(), KEPT)
    message = rf'the output of layer {layer % DEPTH} was not kept.*outputs="all"\) keeps every layer'
    for read in (
        lambda: outputs[layer],
        lambda: outputs.shape(layer),
        lambda: outputs.special_tokens(layer, 1),
        lambda: next(outputs.frames([1, layer], [slice(0, 1)])),
    ):
        with pytest.raises(RuntimeError, match=message):
            read()
    assert torch.equal(outputs[1], outputs[-3]) and len(outputs) == DEPTH


@pytest.mark.parametrize("layer", [DEPTH, -DEPTH - 1])
def test_there_are_no_layers_beyond_the_depth(layer: int):
    with pytest.raises(IndexError, match=f"layer must be one of {DEPTH}, got {layer}"):
        filled(halves())[layer]


def test_layers_that_nobody_reads_are_not_held():
    tokens = halves()
    outputs = filled(tokens, KEPT)
    held = {half.data_ptr() for each in outputs._halves.values() for half in each}
    assert held == {half.data_ptr() for layer in KEPT for half in tokens[layer]}


def test_outputs_are_read_in_the_dtype_of_the_model():
    tokens = halves(torch.bfloat16)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        outputs = filled(tokens, KEPT, dtype)
        (part,) = outputs.frames(KEPT, [slice(0, 2)])
        assert outputs.read_dtype == expected
        for read in (part[1], part[3], outputs.special_tokens(1, 2), outputs[1]):
            assert read.dtype == expected
        assert torch.equal(outputs[1], torch.cat(tokens[1], -1).to(expected))
        assert outputs.read_dtype == expected


def test_special_tokens_are_the_first_of_each_frame():
    tokens = halves()
    special = filled(tokens, KEPT).special_tokens(-1, 2)
    assert torch.equal(special, torch.cat(tokens[-1], -1)[:, :, :2])


def test_frames_come_part_by_part():
    tokens = halves()
    outputs, parts = filled(tokens, KEPT), [slice(0, 2), slice(2, 4), slice(4, 5)]
    for part, layers in zip(parts, outputs.frames([-1, 1], parts), strict=True):
        assert set(layers) == {-1, 1}
        for layer, read in layers.items():
            assert torch.equal(read, torch.cat(tokens[layer], -1)[:, part])
            read.zero_()  # they are copies
    assert torch.equal(outputs[1], torch.cat(tokens[1], -1))


def test_who_changes_a_layer_in_place_changes_what_heads_read():
    tokens = halves()
    outputs = filled(tokens, KEPT)
    before = tokens[1][0].clone()
    outputs[1].mul_(2)
    expected = 2 * torch.cat(tokens[1], -1)
    (part,) = outputs.frames([1], [slice(0, SHAPE[1])])
    for read in (outputs[1], outputs[-3], part[1]):
        assert torch.equal(read, expected)
    assert torch.equal(outputs.special_tokens(1, 3), expected[:, :, :3])
    assert torch.equal(tokens[1][0], before)


def test_on_a_cpu_nothing_waits_elsewhere():
    tokens = halves()
    outputs = filled(tokens, KEPT, None, KEPT)
    assert torch.equal(outputs[3], torch.cat(tokens[3], -1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_layers_in_host_memory_are_read_as_those_on_the_device(dtype: torch.dtype | None):
    tokens = halves(torch.bfloat16, "cuda")
    expected = filled(tokens, KEPT, dtype)
    before = torch.cuda.memory_allocated()
    outputs = filled(tokens, KEPT, dtype, (1,))
    assert torch.cuda.memory_allocated() == before
    assert all(half.pinned.is_pinned() for half in outputs._halves[1])
    parts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    for ours, theirs in zip(outputs.frames(KEPT, parts), expected.frames(KEPT, parts), strict=True):
        for layer in KEPT:
            assert ours[layer].is_cuda and torch.equal(ours[layer], theirs[layer])
    for layer in KEPT:
        assert outputs.shape(layer) == expected.shape(layer) and outputs.read_dtype == expected.read_dtype
        assert torch.equal(outputs.special_tokens(layer, 2), expected.special_tokens(layer, 2))
        assert torch.equal(outputs[layer], expected[layer])


@pytest.mark.gpu
def test_copies_to_the_host_see_tokens_before_their_memory_is_used_again():
    outputs, expected = LayerOutputs(DEPTH, range(DEPTH), None, range(DEPTH)), []
    for layer in range(DEPTH):
        for half in range(2):
            tokens = torch.full((1, 64, 1024, 256), float(2 * layer + half), device="cuda")
            expected.append(float(2 * layer + half))
            outputs.keep(layer, tokens)
            del tokens
    outputs.settle()
    torch.full((1, 64, 1024, 256), -1.0, device="cuda")
    for layer in range(DEPTH):
        first, second = outputs[layer].chunk(2, -1)
        assert bool((first == expected[2 * layer]).all()) and bool((second == expected[2 * layer + 1]).all())


def test_outputs_are_sliced_and_replaced_as_those_of_a_list():
    outputs = filled(halves())
    assert [torch.equal(a, b) for a, b in zip(outputs[-2:], [outputs[-2], outputs[-1]], strict=True)] == [True, True]
    outputs[1] += 1
    outputs[-1] = torch.zeros_like(outputs[1])
    assert torch.equal(outputs[1][:, 1:2], next(iter(outputs.frames([1], [slice(1, 2)])))[1])
    assert not outputs[-1].any()
