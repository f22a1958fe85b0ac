"""What a model says of frames: cameras, depth and how sure it is, by one sparse forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph import CovisibilityGraph, united
from ..inference.memory import MemoryBudget
from ..measure.cost import timed
from ..models.loading import LoadedModel
from ..patching import patch
from ..sources import Covisibility


@dataclass(frozen=True, eq=False)
class Prediction:
    """The outputs of one run, on the CPU.

    Attributes:
        poses: Camera to world `[S, 4, 4]`, float64, axes as in OpenCV.
        intrinsics: Of the frames `[S, 3, 3]`, float64; the centre of the first pixel is (0.5, 0.5).
        depth: Along the optical axis `[S, H, W]`, float32, in the unit of the poses.
        confidence: Of each pixel's depth `[S, H, W]`, float32; its scale is the model's own.
        graph: Which frame saw which, in full or coarsely.
        facts: What ran: seconds, backend, densities.
    """

    poses: Tensor
    intrinsics: Tensor
    depth: Tensor
    confidence: Tensor
    graph: CovisibilityGraph
    facts: dict[str, Any]


def predict(
    model: LoadedModel,
    frames: Tensor,  # [S, 3, H, W]
    covisibility: Covisibility,
    *,
    backend: str | None = None,
    memory_budget: MemoryBudget = None,
) -> Prediction:
    """Run a model on frames, each of which sees those that the graph says.

    Args:
        model: The model, on its device; it is patched while it runs.
        frames: RGB in [0, 1], on the same device.
        covisibility: As `patch` takes it.
        backend: Likewise.
        memory_budget: Likewise.

    Raises:
        ValueError: The graph cannot be made of these frames, the backend or the budget cannot be kept to, or what the
            model says is not finite.
    """
    with patch(model.module, covisibility=covisibility, backend=backend, memory_budget=memory_budget) as handle:
        outputs, elapsed_ms = timed(lambda: model(frames), frames.device)
        report, graph = handle.report(), handle.graph.to("cpu")
        summary = graph.summary()
    kind, read = model.kind, _OnCPU(outputs)
    poses, intrinsics = kind.cameras(read), kind.intrinsics(read)
    _require_cameras(poses, intrinsics)
    facts = {
        "seconds": elapsed_ms / 1000,
        "backend": report.backend,
        "frame_density": summary.density,
        "token_density": report.token_density,
        "warnings": list(summary.warnings),
    }
    return Prediction(poses, intrinsics, read["depth"].float(), kind.confidence(read).float(), united(graph), facts)


class _OnCPU(Mapping[str, Tensor]):
    """The outputs of a model, each of which is moved to the CPU when it is read: others, such as points, are not."""

    def __init__(self, outputs: Mapping[str, Tensor]) -> None:
        self._outputs = outputs

    def __getitem__(self, name: str) -> Tensor:
        return self._outputs[name].cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)


def _require_cameras(poses: Tensor, intrinsics: Tensor) -> None:
    sound = poses.isfinite().flatten(1).all(1) & intrinsics.isfinite().flatten(1).all(1)
    sound &= (intrinsics.diagonal(dim1=1, dim2=2) > 0).all(1)
    if not sound.all():
        frame = int(torch.nonzero(~sound)[0])
        raise ValueError(
            f"the model's cameras must be finite with focal lengths above 0, but that of frame {frame} is not; check "
            "the weights and the photos"
        )
