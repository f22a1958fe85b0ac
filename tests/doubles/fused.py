"""Runs of the double of VGGT through `patch`, fused and as it is."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import svggt_kernels
from svggt_kernels.inference.fused_forward import InferenceReport

from .vggt import VGGT

IMAGES = torch.rand(1, 6, 3, 28, 42, generator=torch.Generator().manual_seed(0))


def model() -> VGGT:
    torch.manual_seed(0)
    return VGGT().eval()


def blocks_of(network: nn.Module) -> list[nn.Module]:
    return [*network.aggregator.frame_blocks, *network.aggregator.global_blocks]


def outputs(network: nn.Module, change=None, **options: object) -> tuple[dict[str, Tensor], InferenceReport]:
    """Run a copy, changed after a first forward if there is a change, and return what it gives and the report."""
    network = copy.deepcopy(network)
    options = {"covisibility": "all", "fused": True, **options}
    with torch.no_grad(), svggt_kernels.patch(network, **options) as handle:
        if change is not None:
            network(IMAGES)
            change(network)
        return network(IMAGES), handle.report().inference


def as_without(network: nn.Module, change=None, **options: object) -> InferenceReport:
    """Assert that a model gives what it gives with fused=False, and return its report."""
    expected, _ = outputs(network, change, fused=False)
    actual, report = outputs(network, change, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    return report
