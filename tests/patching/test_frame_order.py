"""The order into which a model put its frames, read off their tokens."""

from __future__ import annotations

import pytest
import torch

from svggt_kernels.patching.order import frame_order


@pytest.mark.parametrize("front", range(6))
def test_one_frame_to_the_front_although_photos_repeat(front: int):
    """Photos 0, 2 and 5 are one; the model moves one frame to the front and leaves the rest in order."""
    before = torch.randn(3, 4)[[0, 1, 0, 2, 1, 0]]
    order = [front, *(frame for frame in range(6) if frame != front)]
    read = frame_order(before, before[order]) or tuple(range(6))
    assert torch.equal(before[list(read)], before[order])
    assert list(read[1:]) == sorted(read[1:])


def test_middle_photo_that_is_also_the_first():
    before = torch.randn(4, 4)[[0, 1, 0, 2, 3]]
    assert frame_order(before, before[[2, 0, 1, 3, 4]]) == (2, 0, 1, 3, 4)


def test_any_other_order():
    before = torch.randn(5, 4)
    assert frame_order(before, before[[4, 2, 3, 0, 1]]) == (4, 2, 3, 0, 1)
    assert frame_order(before, before) is None
    twins = before[[0, 1, 0, 1, 2]]
    assert frame_order(twins, twins[[4, 1, 0, 3, 2]]) == (4, 1, 0, 3, 2)


def test_float64_tokens_are_told_apart_by_every_bit():
    before = torch.ones(3, 4, dtype=torch.float64) + torch.tensor([[0.0], [1e-12], [2e-12]])
    assert frame_order(before, before[[1, 2, 0]]) == (1, 2, 0)


def test_other_tokens_are_refused():
    before = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="order of the frames inside the model could not be read"):
        frame_order(before, before + 1)
