"""MegaLoc against its original implementation, with the same random weights.

The original is not part of this repository. Clone https://github.com/gmberton/MegaLoc (written against 1af071c),
install torchvision, which it resizes with, and name the folder:

    MEGALOC_ORIGINAL=path/to/MegaLoc python -m pytest tests/sources/test_megaloc_original.py
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from svggt_kernels.sources.megaloc.network import IMAGENET_DEVIATION, IMAGENET_MEAN, MegaLoc

FOLDER = os.environ.get("MEGALOC_ORIGINAL")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="MEGALOC_ORIGINAL does not name a clone of gmberton/MegaLoc")
SIZES = [(224, 224), (322, 322), (518, 518), (322, 448), (392, 210), (301, 333), (126, 112), (225, 517)]


@pytest.fixture(scope="module")
def ours() -> MegaLoc:
    model = MegaLoc.random_init()
    # Scores far apart, so that three rounds of Sinkhorn's iteration and four do not agree.
    model.aggregator["agg"].score[3].weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def original(ours: MegaLoc) -> nn.Module:
    pytest.importorskip("torchvision", reason="the original resizes with torchvision, which is not installed")
    spec = importlib.util.spec_from_file_location("megaloc_model", Path(str(FOLDER)) / "megaloc_model.py")
    assert spec and spec.loader
    sys.modules["megaloc_model"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.MegaLoc().eval()
    model.load_state_dict(ours.state_dict(), strict=True)
    return model


def normalised(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (images - mean) / deviation


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@torch.no_grad()
def test_descriptors_are_the_same(ours: MegaLoc, original: nn.Module, size: tuple[int, int]):
    # More than one image: the original squeezes a batch of one away inside its Sinkhorn iteration, and broadcasts back.
    images = torch.rand(2, 3, *size)
    expected, actual = original(normalised(images)), ours(images)
    assert expected.shape == actual.shape == (2, 8448)
    # Random weights must tell images apart, or agreement would say nothing.
    assert float((expected[0] - expected[1]).abs().max()) > 1e-4
    print(f"{size}: largest difference {float((actual - expected).abs().max()):.2e}")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_image_alone(ours: MegaLoc, original: nn.Module):
    image = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(ours(image), original(normalised(image)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_reduced_precision_is_within_twice_the_error_of_the_original(
    ours: MegaLoc, original: nn.Module, dtype: torch.dtype
):
    images = torch.rand(4, 3, 224, 224)
    exact = original(normalised(images))
    # The original runs in reduced precision under autocast only; ours by its own dtype.
    with torch.autocast("cpu", dtype):
        plain = (original(normalised(images)).float() - exact).square().mean().sqrt()
    error = (copy.deepcopy(ours).to(dtype)(images) - exact).square().mean().sqrt()
    print(f"{dtype}: error {float(error):.2e}, of the original {float(plain):.2e}")
    assert error <= 2 * plain
