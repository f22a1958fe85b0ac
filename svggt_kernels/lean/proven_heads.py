"""Which DPT heads run lean, and the proof that they compute what their own forward does."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import heads, inference

PROOF_FRAMES = 2
PROOF_PATCHES = 6
"""Patches of such a frame, down and across."""

UNKNOWN_POSITIONS = "what it adds to pixels is no sum over their columns and rows"

FACTOR = 4
"""How many times as far from float64 as the other either forward may be, see `ProvenHeads._agree`."""

NEGLIGIBLE = {torch.float32: 50, torch.float64: 2**16}
"""Roundings; many of float64, with which there is nothing better to compare, and still far below another formula."""


class ProvenHeads:
    """Makes heads ready to run lean.

    Attributes:
        ran: Names of the heads that ran lean in the last forward.
        not_lean: Why others did not, by name.
    """

    def __init__(self) -> None:
        self.ran: set[str] = set()
        self.not_lean: dict[str, str] = {}
        self._positions = heads.Positions()
        self._refusals: dict[Hashable, str | None] = {}

    def begin(self) -> None:
        """Begin a forward."""
        self.ran.clear()
        self.not_lean.clear()

    def ready(self, name: str, head: Any, layers: Sequence[Any], images: Tensor, first: int) -> heads.ReadyHead | None:
        """Return a head, ready to run lean in this call, or None if it must run as it is.

        Args:
            name: Its name, for the report.
            head: A module whose forward takes what those of VGGT's DPT heads take.
            layers: Outputs `[B, S, P, C]` of the layers, or holes.
            images: `[B, S, 3, H, W]`.
            first: The first token of a frame that is a patch.
        """
        ready, reason = None, heads.obstacle(head) or inference.obstacle(head) or _mismatch(head, layers, images, first)
        if reason is None:
            weight, (height, width) = head.norm.weight, images.shape[-2:]
            kind = heads.anatomy(head)
            tables = self._positions.of(head, kind, (height, width), weight)
            reason = UNKNOWN_POSITIONS if tables is None else self._disproof(head, kind, layers, images, first)
            if tables is not None and reason is None:
                ready = heads.ReadyHead(head, tables, weight.dtype)
        if reason is None:
            self.ran.add(name)
        else:
            self.not_lean[name] = reason
        return ready

    def _disproof(self, head: Any, kind: Hashable, layers: Sequence[Any], images: Tensor, first: int) -> str | None:
        """Return why a head like this one does not compute what its own forward does; None if it does.

        Both are run on a corner of few frames, once for each kind of head, dtype and precision of products.
        """
        weight = head.norm.weight
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        key = (kind, weight.dtype, weight.device, precision)
        if key not in self._refusals:
            some, corner = _corner(head, layers, images, first)
            try:
                agree = self._agree(head, some, corner)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # cuDNN may lack a convolution with its ReLU
                self._refusals[key] = f"it failed: {error}"
            else:
                if agree is None:
                    return "its output is not finite, which proves nothing"
                self._refusals[key] = None if agree else "its forward computes something else than the lean head"
        return self._refusals[key]

    @staticmethod
    def _agree(head: Any, layers: Sequence[Any], images: Tensor) -> bool | None:
        """Whether the head's own forward and the lean one give the same; None if the tokens given cannot tell.

        The lean one in float64 is what both are compared with. As they compute the same with the same roundings, if in
        another order, their distances from it are alike: more than `FACTOR` times the other's is another formula. How
        large they are depends on the precision of products, such as TF32, and on the weights. Within `NEGLIGIBLE`
        roundings they need not be alike. Compared are logarithms, as values may differ by orders of magnitude.
        """
        weight, (height, width) = head.norm.weight, images.shape[-2:]
        theirs = type(head).forward(head, layers, images, 0, PROOF_FRAMES)
        results = []
        for dtype in (weight.dtype, torch.float64):
            tables = heads.Positions().of(head, heads.anatomy(head), (height, width), weight.to(dtype))
            if tables is None:
                return False
            given = [each if each is None else each.to(dtype) for each in layers]
            results.append(heads.ReadyHead(head, tables, dtype)(given, images, 0))
        for results_of_one in zip(theirs, *results, strict=True):
            their, our, exact = (each.double().sign() * each.double().abs().log1p() for each in results_of_one)
            norm = exact.norm()
            if not norm.isfinite():
                return None
            errors = torch.stack([(each - exact).norm() for each in (their, our)])  # whose extremes are NaN if one is
            negligible = NEGLIGIBLE[weight.dtype] * torch.finfo(weight.dtype).eps * norm
            if not errors.max() <= FACTOR * errors.min() + negligible:
                return False
        return True


def _mismatch(head: Any, layers: Sequence[Any], images: Tensor, first: int) -> str | None:
    """Return what keeps a head, for which `obstacle` is None, from running lean on what it was given, or None."""
    weight = head.norm.weight
    if weight.device.type not in ("cpu", "cuda"):
        return f"it is on {weight.device}, and lean heads are for CPU and CUDA"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is on"
    dtypes = {each.dtype for each in head.parameters()}
    if dtypes not in ({torch.float32}, {torch.float64}):
        return f"its weights are {', '.join(sorted(map(str, dtypes)))}, not torch.float32 or torch.float64"
    rows, columns = (each // head.patch_size for each in images.shape[-2:])
    tokens = (*images.shape[:2], first + rows * columns, len(head.norm.weight))
    for index in head.intermediate_layer_idx:
        layer = layers[index]
        if tuple(layer.shape) != tokens or layer.dtype != weight.dtype or layer.device != weight.device:
            return "the layer outputs are not of its dtype, on its device, and one token for each patch"
    return None


def _corner(head: Any, layers: Sequence[Any], images: Tensor, first: int) -> tuple[list[Tensor | None], Tensor]:
    """Return the patch tokens of the upper left corner of few frames, and its images."""
    rows, columns = (each // head.patch_size for each in images.shape[-2:])
    corner: list[Tensor | None] = [None] * len(layers)
    for index in head.intermediate_layer_idx:
        tokens = layers[index][:1, :PROOF_FRAMES, first:].unflatten(2, (rows, columns))
        corner[index] = tokens[:, :, :PROOF_PATCHES, :PROOF_PATCHES].flatten(2, 3)
    side = PROOF_PATCHES * head.patch_size
    return corner, images[:1, :PROOF_FRAMES, :, :side, :side]
