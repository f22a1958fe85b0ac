"""One model on frames of known geometry, under several layouts: what each costs, and how far it is from the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..graph import CovisibilityGraph
from ..models.loading import LoadedModel
from ..patching import Patch, patch
from ..sources import Core, TokenSimilarity
from .accuracy import align
from .compare import Stage, silent
from .cost import Cost, Meter
from .scores import scene_scores

WARM_UP_FRAMES = 4
ENOUGH_SECONDS = 20.0


@dataclass(frozen=True)
class Layout:
    """Who sees whom.

    Attributes:
        name: What to call it.
        sees: Who sees whom, in words.
        options: Arguments of `patch`; None leaves the model as it is.
    """

    name: str
    sees: str
    options: Mapping[str, Any] | None = None

    def on(self, model: LoadedModel) -> Patch | nullcontext[None]:
        """Return a context in which the model attends like this; its value is the handle of the patch, or None."""
        return nullcontext() if self.options is None else patch(model.module, **self.options)


DENSE = Layout("dense", "every frame sees every frame")
NEIGHBOURS = Layout(
    "neighbours",
    f"every frame sees the {TokenSimilarity.neighbours} frames most like it, frame 0, anchors, and all special tokens",
    {"covisibility": TokenSimilarity()},
)


def closed_core(frames: int) -> Layout:
    """Return the layout in which each frame sees itself and a core of frames, and the core sees the core alone.

    The core is frame 0 and then, one after another, the frame least similar to those before it, by the model's own
    tokens. Special tokens are tokens of their frame like all others, so nothing but the core joins the frames.
    """
    return Layout(
        f"core of {frames}",
        f"every frame sees itself and the {frames} frames that differ most; these see one another alone",
        {"covisibility": Core(frames, by=TokenSimilarity())},
    )


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of one layout, on the CPU.

    Attributes:
        layout: The layout.
        cost: Of the whole model.
        pairs: Visible / all pairs of tokens in global attention.
        backend: What ran it; None for PyTorch's attention.
        graph: Who sees whom; None for the model as it is.
        poses: Camera to world `[S, 4, 4]`, moved by the similarity that brings the centres closest to the true ones.
        depth: Metres `[S, H, W]`, by one scale: the median of true / predicted over all pixels.
        auc5: Pose AUC at 5 degrees.
        auc30: Pose AUC at 30 degrees.
        ate: Absolute trajectory error, metres.
        absrel: Relative error of depth.
    """

    layout: Layout
    cost: Cost
    pairs: float
    backend: str | None
    graph: CovisibilityGraph | None
    poses: Tensor
    depth: Tensor
    auc5: float
    auc30: float
    ate: float
    absrel: float

    @property
    def core(self) -> list[int]:
        """The frames that every frame sees, if not all frames do."""
        return [] if self.graph is None else self.graph.to_dense().all(0).nonzero()[:, 0].tolist()

    def facts(self) -> dict[str, Any]:
        """Return what a report holds."""
        cost = {"ms": self.cost.min_ms, "runs": self.cost.runs, "peak_mib": self.cost.peak_mib}
        accuracy = {"auc5": self.auc5, "auc30": self.auc30, "ate_m": self.ate, "absrel": self.absrel}
        return {
            "layout": self.layout.name,
            "sees": self.layout.sees,
            **cost,
            "pairs": self.pairs,
            "backend": self.backend,
            **accuracy,
        }


def run_layouts(
    model: LoadedModel,
    frames: Tensor,  # [S, 3, H, W]
    true_poses: Tensor,  # [S, 4, 4]
    true_depth: Tensor,  # [S, H, W]
    layouts: Sequence[Layout],
    *,
    rounds: int = 3,
    stage: Stage = silent,
) -> list[Outcome]:
    """Run a model with each layout in turn, a few rounds, so that other work on the machine meets all alike.

    Args:
        model: The model, on its device; outputs are VGGT's.
        frames: RGB in [0, 1], on the same device.
        true_poses: Camera to world, metres.
        true_depth: Metres along the optical axis, 0 where it is not known.
        layouts: What to run.
        rounds: Runs of each at most, 1 or more; no round begins after `ENOUGH_SECONDS`.
        stage: Is told each stage of the work.

    Raises:
        ValueError: If there are fewer than two frames, or a layout cannot be made of them.
    """
    if len(frames) < 2:
        raise ValueError(f"cameras are compared in pairs, so two frames or more are needed, got {len(frames)}")
    meters, true = [Meter(frames.device) for _ in layouts], (true_poses.cpu(), true_depth.cpu())
    model(frames[:WARM_UP_FRAMES])
    outcomes: list[Outcome] = []
    while not outcomes or (len(meters[0].times_ms) < rounds and _seconds(meters) < ENOUGH_SECONDS):
        outcomes = []
        for layout, meter in zip(layouts, meters, strict=True):
            with layout.on(model) as handle:
                with stage(f"{layout.name}, run {len(meter.times_ms) + 1}"):
                    outputs = meter(lambda: model(frames))
                outcomes.append(_outcome(model, layout, meter.cost(), handle, outputs, *true))
    return outcomes


def _seconds(meters: Sequence[Meter]) -> float:
    return sum(sum(meter.times_ms) for meter in meters) / 1000


def _outcome(
    model: LoadedModel,
    layout: Layout,
    cost: Cost,
    handle: Patch | None,
    outputs: Mapping[str, Tensor],
    true_poses: Tensor,
    true_depth: Tensor,
) -> Outcome:
    poses, depth = model.kind.cameras(outputs).cpu(), outputs["depth"].cpu()
    scores = scene_scores(poses, true_poses, depth, true_depth)
    return Outcome(
        layout=layout,
        cost=cost,
        pairs=1.0 if handle is None else handle.report().token_density or 1.0,
        backend=None if handle is None else handle.report().backend,
        graph=None if handle is None else handle.graph.to("cpu"),
        poses=align(poses[:, :3, 3], true_poses[:, :3, 3]).poses(poses),
        depth=scores["depth_scale"] * depth,
        auc5=scores["auc5"],
        auc30=scores["auc30"],
        ate=scores["ate"],
        absrel=scores["absrel"],
    )
