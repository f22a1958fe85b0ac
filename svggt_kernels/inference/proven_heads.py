"""Which DPT heads run lean, and the proof that they compute what their own forward does."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dpt as heads
from . import inference
from .proof import Proofs, disagreement
from .settings import Settings, twin

PROOF_FRAMES = 2

UNKNOWN_POSITIONS = "what it adds to pixels is no sum over their columns and rows"

Layers = Sequence[Any] | Mapping[int, Any]
"""Outputs `[B, S, P, C]` of layers, or holes, by their index."""


class ProvenHeads:
    """Makes heads ready to run lean.

    Attributes:
        ran: Names of the heads that ran lean in the last forward.
        not_lean: Why others did not, by name.
    """

    def __init__(self, foreign: Mapping[str, str] | None = None) -> None:
        self.ran: set[str] = set()
        self.not_lean: dict[str, str] = dict(foreign or {})
        self._foreign = dict(self.not_lean)
        self._positions = heads.Positions()
        self._settings, self._proofs = Settings(), Proofs()

    def begin(self) -> None:
        """Begin a forward."""
        self.ran.clear()
        self.not_lean = dict(self._foreign)

    def ready(self, name: str, head: Any, layers: Layers, images: Tensor, first: int) -> heads.ReadyHead | None:
        """Return a head, ready to run lean in this call, or None if it must run as it is.

        Args:
            name: Its name, for the report.
            head: A module whose forward takes what those of VGGT's DPT heads take.
            layers: Outputs `[B, S, P, C]` of the layers, or holes.
            images: `[B, S, 3, H, W]`.
            first: The first token of a frame that is a patch.
        """
        self._settings.begin()
        settings = self._settings.of(head)
        reason = (
            self._proofs.reason(settings, lambda: heads.obstacle(head) or inference.obstacle_inside(head))
            or inference.obstacle()
            or _mismatch(head, layers, images, first)
            or self._disproof(head, settings, layers, images, first)
        )
        if reason is not None:
            self.not_lean[name] = reason
            return None
        self.ran.add(name)
        tables = self._tables(head, settings, images)
        assert tables is not None
        return heads.ReadyHead(head, tables, head.norm.weight.dtype)

    def _tables(self, head: Any, settings: Hashable, images: Tensor) -> list[heads.Table] | None:
        height, width = images.shape[-2:]
        return self._positions.of(head, settings, (height, width), head.norm.weight)

    def _disproof(self, head: Any, settings: Hashable, layers: Layers, images: Tensor, first: int) -> str | None:
        """Return why a head does not compute what DPT heads do, or None if it does, with the settings that it has.

        Asked once for heads of the same settings, dtype and precision of products, and for images of each size: a head
        may do something else for images of another. Both ways run on few frames.
        """
        weight = head.norm.weight
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]

        def prove() -> str | None:
            tables = self._tables(head, settings, images)
            return UNKNOWN_POSITIONS if tables is None else _disagreement(head, tables, layers, images, first)

        return self._proofs.reason((settings, weight.dtype, images.shape[-2:], precision), prove)


def _disagreement(head: Any, tables: Sequence[heads.Table], layers: Layers, images: Tensor, first: int) -> str | None:
    """Return what speaks against running a head lean, or None.

    Compared are logarithms, log(1 + |value|), as values may differ by orders of magnitude.
    """
    dtype, images = head.norm.weight.dtype, images[:1, :PROOF_FRAMES]
    read = {index: layers[index][:1, :PROOF_FRAMES] for index in head.intermediate_layer_idx}

    def given(dtype: torch.dtype) -> tuple[Any, ...]:
        some: Any = dict.fromkeys(layers) if isinstance(layers, Mapping) else [None] * len(layers)
        for index, tokens in read.items():
            some[index] = tokens.to(dtype)
        return some, images.to(dtype), first, PROOF_FRAMES

    exact = type(head).forward(twin(head, torch.float64), *given(torch.float64))
    own = type(head).forward(twin(head), *given(dtype))
    fused = heads.ReadyHead(head, tables, dtype)(*given(dtype))
    if not len(exact) == len(own) == len(fused):
        return f"its forward returns {len(own)} results"
    for results in zip(exact, own, fused, strict=True):
        right, plain, lean = (each.sign() * each.abs().log1p() for each in results)
        reason = disagreement(right, plain, lean, right.norm(), dtype, "head")
        if reason is not None:
            return reason
    return None


def _mismatch(head: Any, layers: Layers, images: Tensor, first: int) -> str | None:
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
        try:
            layer = layers[index]
        except (KeyError, IndexError):
            return f"there is no output of layer {index}"
        if tuple(layer.shape) != tokens or layer.dtype != weight.dtype or layer.device != weight.device:
            return "the layer outputs are not of its dtype, on its device, and one token for each patch"
    return None
