"""What a model says of frames: cameras, depth and how sure it is, by one sparse forward or in chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..coarse import CoarseLayout
from ..graph import AnyGraph, CoarseGraph, CovisibilityGraph, closed_core, united
from ..inference.memory import MemoryBudget
from ..measure.cost import Tell, timed
from ..models import RunnableModel
from ..models.loading import LoadedModel
from ..patching import patch
from ..sources import SOURCES, Core, Covisibility, GraphFile
from ..streaming import OpenScene, open_scene, read_outputs
from ..streaming.apart import more_than_by_chance


@dataclass(frozen=True, eq=False)
class Prediction:
    """The outputs of one run, on the CPU.

    Attributes:
        poses: Camera to world `[S, 4, 4]`, float64, axes as in OpenCV.
        intrinsics: Of the frames `[S, 3, 3]`, float64; the centre of the first pixel is (0.5, 0.5).
        depth: Along the optical axis `[S, H, W]`, float32, in the unit of the poses.
        confidence: Of each pixel's depth `[S, H, W]`, float32; its scale is the model's own.
        graph: Which frame saw which, in full or coarsely.
        facts: What ran: seconds, frames of a chunk (None for one forward), backend, densities.
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
    facts = {
        "seconds": elapsed_ms / 1000,
        "chunk": None if report.chunks is None else report.chunks.chunk,
        "backend": report.backend,
        "frame_density": summary.density,
        "token_density": report.token_density,
        "warnings": list(summary.warnings),
    }
    return Prediction(*_read(model.kind, outputs), united(graph), facts)


def core_to_stream(covisibility: Covisibility) -> Core | AnyGraph:
    """Return how the core that a run in chunks needs is chosen, or its graph.

    Raises:
        ValueError: Frames see more than what all see and themselves; or the graph of a file cannot be read.
    """
    source = SOURCES[covisibility]() if isinstance(covisibility, str) and covisibility in SOURCES else covisibility
    if isinstance(source, Core) and not source.nearest and source.coarse != "all":
        return source
    graph = source.read() if isinstance(source, GraphFile) else source
    if isinstance(graph, CovisibilityGraph | CoarseGraph) and closed_core(graph) is not None:
        return graph
    label = getattr(source, "label", None) or type(source).__name__
    raise ValueError(
        f"a run in chunks needs a closed core, which every photo sees and nothing besides, got {label}; give a "
        "core (--core N, Core(N), Core(N, coarse=M)) or the graph of one, or leave chunk out"
    )


def frames_at_once(core: Core | AnyGraph, num_frames: int) -> int:
    """Return how many of so many frames run together as the core, those that are seen at a stride among them."""
    if isinstance(core, Core):
        return core.size + core.coarse_frames(num_frames)[0]
    closed = closed_core(core)
    assert closed is not None
    return closed.count


def predict_in_chunks(
    model: LoadedModel,
    frames: Tensor,  # [S, 3, H, W]
    core: Core | AnyGraph,
    *,
    chunk: int,
    folder: Callable[[], Path] | None,
    backend: str | None = None,
    memory_budget: MemoryBudget = None,
    tell: Tell = lambda progress: None,
) -> Prediction:
    """Run a model on a core of the frames and on the others in chunks, which see the core and each itself.

    Args:
        model: The model, on its device.
        frames: RGB in [0, 1], in host memory, more than the core's.
        core: How the core is chosen, or the graph of one, as `core_to_stream` returns it.
        chunk: Frames that run together.
        folder: Makes the folder for the outputs of finished chunks, which do not run again where they are there. Called
            once the scene is open. None keeps them in memory.
        backend: As `open_scene` takes it.
        memory_budget: Likewise.
        tell: Is told how many frames are done, and how long the rest takes.

    Raises:
        ValueError: The model cannot be opened, the backend or the budget cannot be kept to, or what it says is not
            finite.
        OSError: A chunk cannot be written.
    """
    device = next(model.module.parameters()).device

    def run() -> tuple[OpenScene, dict[str, Tensor]]:
        with torch.autocast(device.type, dtype=model.autocast, enabled=model.autocast is not None):
            scene = open_scene(
                model.module,
                frames,
                core=core,
                chunk=chunk,
                feed=model.kind.feed,
                read=model.kind.outputs,
                backend=backend,
                memory_budget=memory_budget,
                tell=tell,
            )
        of_core = _OnCPU(scene.core_outputs)
        _read(model.kind, of_core)
        names = [*of_core.names, "apart"]
        if folder is not None:
            return scene, read_outputs(scene.write(folder(), names=names))
        parts = [{name: part[name] for name in names} for part in scene.stream()]
        return scene, {name: torch.cat([part[name] for part in parts]) for name in names}

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*share nothing with the core", UserWarning)  # is a note among the facts
        (scene, outputs), elapsed_ms = timed(run, device)
    graph, token_density = _of_scene(scene, len(frames))
    summary, apart = graph.summary(), outputs["apart"].nonzero().flatten().tolist()
    notes = list(summary.warnings)
    if more_than_by_chance(len(apart), len(frames), scene.closed.count):
        notes.append(
            f'{len(apart)} of {len(frames)} photos may share nothing with the core ("apart" in reconstruction.json has '
            "their places, from 0): what is said of them cannot be trusted; a larger core may show their place"
        )
    facts = {
        "seconds": elapsed_ms / 1000,
        "chunk": chunk,
        "backend": scene.backend,
        "frame_density": summary.density,
        "token_density": token_density,
        "warnings": notes,
        "apart": apart,
    }
    return Prediction(*_read(model.kind, outputs), united(graph), facts)


def _of_scene(scene: OpenScene, frames: int) -> tuple[AnyGraph, float]:
    """Return the graph of a scene over all its frames, and the share of token pairs that attend."""
    inputs = scene.session.inputs
    if not scene.coarse:
        graph = CovisibilityGraph.core(frames, scene.core)
        return graph, graph.density
    assert inputs is not None and inputs.patch_grid is not None
    coarse = CoarseGraph.core(frames, scene.core, scene.coarse, stride=scene.closed.stride)
    layout = CoarseLayout.from_graph(
        coarse, inputs.patch_grid, special_tokens=inputs.special_tokens, trailing_tokens=inputs.trailing_tokens
    )
    return coarse, layout.density


def _read(kind: RunnableModel, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return poses, intrinsics, depth and confidence of a model's outputs, on the CPU."""
    read = outputs if isinstance(outputs, _OnCPU) else _OnCPU(outputs)
    poses, intrinsics = kind.cameras(read), kind.intrinsics(read)
    _require_cameras(poses, intrinsics)
    return poses, intrinsics, read["depth"].float(), kind.confidence(read).float()


class _OnCPU(Mapping[str, Tensor]):
    """The outputs of a model, each of which is moved to the CPU when it is read: others, such as points, are not.

    Attributes:
        names: Those that were read, in the order of the first reading.
    """

    def __init__(self, outputs: Mapping[str, Tensor]) -> None:
        self._outputs = outputs
        self.names: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            self.names.append(name)
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
