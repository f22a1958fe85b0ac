"""Camera heads of a model that runs in chunks: at the end they run over the camera tokens of all frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...compiling import uncompiled
from ...inference.heads import LAYERS, is_camera_head, tensors
from ...inference.layer_outputs import LayerOutputs
from ..interception import StandIn
from ..parts import Around


@dataclass(eq=False)
class HeadRun:
    """What a camera head read and gave in one run.

    Attributes:
        tokens: The camera token of each frame, in the last layer, `[1, n, 1, 2 C]`.
        results: What the head gave, `[1, n, ...]`.
        over: Runs the head over the camera tokens of other frames, as it was called.
    """

    tokens: Tensor
    results: list[Tensor]
    over: Callable[[Tensor], list[Tensor]]


class CameraHeads:
    """Looks on as camera heads run.

    A head is followed where it is called once, with the outputs of all layers. What a model derives from its results
    is found by disturbing them.

    Args:
        model: Holds the heads.

    Attributes:
        disturbed: Whether 1 is added to what heads give.
        runs: What heads did in the forward that runs or ran last, by name; None for one that was called twice.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: module for name, module in model.named_modules() if is_camera_head(module)}
        self.disturbed = False
        self.runs: dict[str, HeadRun | None] = {}

    def sites(self) -> Iterable[tuple[nn.Module, str, Around]]:
        """Return the heads."""
        return [(module, name, self._look_on) for name, module in self.modules.items()]

    def places(self, leaves: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
        """Return of each head which tensors of a result it gave, by name, and their places in what it gave.

        Args:
            leaves: The tensors of the result of the last forward, by name.
        """
        found: dict[str, dict[str, int]] = {}
        for name, run in self.runs.items():
            places = {id(tensor): place for place, tensor in enumerate(run.results)} if run is not None else {}
            if of_head := {leaf: places[id(tensor)] for leaf, tensor in leaves.items() if id(tensor) in places}:
                found[name] = of_head
        return found

    @uncompiled(recursive=False)
    def _look_on(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        layers, *others = args or (kwargs.pop(LAYERS),)
        result = stand_in.original(layers, *others, **kwargs)
        if not isinstance(result, Tensor) and not (
            isinstance(result, (list, tuple)) and all(isinstance(each, Tensor) for each in result)
        ):
            return result
        if self.disturbed:
            result = result + 1 if isinstance(result, Tensor) else [each + 1 for each in result]
        last = layers.special_tokens(-1, 1) if isinstance(layers, LayerOutputs) else layers[-1][:, :, :1].clone()
        kind = last.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def over(tokens: Tensor) -> list[Tensor]:
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                return tensors(stand_in.module([tokens], *others, **kwargs))

        called_before = stand_in.name in self.runs
        self.runs[stand_in.name] = None if called_before else HeadRun(last, tensors(result), over)
        return result
