"""One model on the same frames, under several layouts: what each costs, and how far it is from the truth or from dense.

| name | each frame sees |
|---|---|
| `dense` | every frame: the model as it is |
| `core-K` | itself and a core of K frames, which see one another alone; the frames of the core lie far apart |
| `core-K-covering` | the same, but the frames of the core resemble as many others as they can |
| `core-K-evenly` | the same, but the frames of the core are spread over the order of the frames |
| `nearest-K` | the K frames most like it, the reference frame, anchors, and all special tokens |

Where cores are by patches of the model, which choose cores alone, neighbours are by its tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..graph import AnyGraph, CoarseGraph
from ..models.loading import LoadedModel
from ..patching import Patch, patch
from ..sources import Core, PatchSimilarity, Similarity, Source, TokenSimilarity
from .accuracy import align
from .compare import Stage, silent
from .cost import Cost, Meter
from .scores import scene_scores

WARM_UP_FRAMES = 4
ENOUGH_SECONDS = 20.0
FORM = re.compile(r"core-(?P<core>[1-9]\d*)(?P<choice>-covering|-evenly)?|nearest-(?P<nearest>[1-9]\d*)")


@dataclass(frozen=True)
class Layout:
    """Who sees whom.

    Attributes:
        name: What to call it.
        sees: Who sees whom, in words.
        covisibility: Where its graph comes from; None leaves the model as it is.
    """

    name: str
    sees: str
    covisibility: Source | None = None

    def on(self, model: LoadedModel, backend: str | None = None) -> Patch | nullcontext[None]:
        """Return a context in which the model attends like this; its value is the handle of the patch, or None."""
        if self.covisibility is None:
            return nullcontext()
        return patch(model.module, covisibility=self.covisibility, backend=backend)


DENSE = Layout("dense", "every frame sees every frame")


def layouts_named(names: Sequence[str], similarity: Callable[[], Similarity | PatchSimilarity]) -> list[Layout]:
    """Return the layouts of these names.

    Args:
        names: As in the table above.
        similarity: Returns what frames are compared by; called once all names were read, for layouts that compare.

    Raises:
        ValueError: If a name has no meaning.
    """
    forms = [FORM.fullmatch(name) for name in names]
    for name, form in zip(names, forms, strict=True):
        if form is None and name != DENSE.name:
            raise ValueError(
                f"a layout must be called dense, core-K, core-K-covering, core-K-evenly or nearest-K, got {name!r}"
            )
    return [DENSE if form is None else _layout(form, similarity) for form in forms]


def _layout(form: re.Match[str], similarity: Callable[[], Similarity | PatchSimilarity]) -> Layout:
    source: Source
    if form["nearest"]:
        compared = similarity()
        neighbours = TokenSimilarity() if isinstance(compared, PatchSimilarity) else compared
        source = replace(neighbours, neighbours=int(form["nearest"]))
        return Layout(form[0], f"every frame sees {source.label}", source)
    size, choice = int(form["core"]), form["choice"]
    if choice == "-evenly":
        source = Core(size, by=None)
    else:
        source = Core(size, by=similarity(), choice="covering" if choice else "farthest")
    return Layout(form[0], f"every frame sees itself and {source.label}, which see one another alone", source)


@dataclass(frozen=True, eq=False)
class Reference:
    """Cameras, and depth where it is known, that runs are compared with; on the CPU.

    Attributes:
        poses: Camera to world `[n, 4, 4]`, n of 2 or more.
        depth: `[n, H, W]` in the same unit, 0 where it is not known; None if no depth is known.
        frames: Places of these frames among those that run; None for all.
    """

    poses: Tensor
    depth: Tensor | None = None
    frames: Sequence[int] | None = None

    @classmethod
    def of_run(cls, poses: Tensor, depth: Tensor | None) -> Reference:
        """Return a run as the reference for others; its unit is the extent of its cameras.

        The extent is the root mean square distance of the camera centres from their mean.

        Args:
            poses: Camera to world `[S, 4, 4]`.
            depth: `[S, H, W]` in the same unit.

        Raises:
            ValueError: If a pose is not finite.
        """
        if not poses.isfinite().all():
            raise ValueError("the cameras of the model as it is must be finite, and are not; check weights and images")
        centres = poses[:, :3, 3]
        extent = float((centres - centres.mean(0)).square().sum(1).mean().sqrt()) or 1.0
        poses = poses.clone()
        poses[:, :3, 3] /= extent
        return cls(poses, None if depth is None else depth / extent)

    def first(self, frames: int) -> Reference:
        """Return what is known of the first so many frames that run."""
        places = range(len(self.poses)) if self.frames is None else self.frames
        kept = [place for place in places if place < frames]
        depth = None if self.depth is None else self.depth[: len(kept)]
        return Reference(self.poses[: len(kept)], depth, kept)

    def of_frames(self, values: Tensor) -> Tensor:
        """Return the part of `[S, ...]` values that is of these frames, `[n, ...]`."""
        return values if self.frames is None else values[list(self.frames)]

    def scores(self, poses: Tensor, depth: Tensor | None) -> dict[str, float]:
        """Return `scene_scores` of the poses `[S, 4, 4]` and the depth `[S, H, W]` of a run."""
        return scene_scores(
            self.of_frames(poses), self.poses, None if depth is None else self.of_frames(depth), self.depth
        )

    def aligned(self, poses: Tensor) -> Tensor:
        """Return poses `[S, 4, 4]` after the similarity that brings centres closest; as they are if not finite."""
        if not poses.isfinite().all():
            return poses
        return align(self.of_frames(poses)[:, :3, 3], self.poses[:, :3, 3]).poses(poses)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of one layout, on the CPU.

    Attributes:
        layout: The layout.
        cost: Of the whole model, the choice of the graph included.
        pairs: Visible / all pairs of tokens in global attention.
        backend: What ran it; None for PyTorch's attention.
        graph: Who sees whom; None for the model as it is.
        poses: Camera to world `[S, 4, 4]`, as `Reference.aligned` moves them.
        depth: `[S, H, W]`, by one scale: the median of known / predicted over all pixels.
        scores: How far it is from the reference, as `scene_scores` names it.
    """

    layout: Layout
    cost: Cost
    pairs: float
    backend: str | None
    graph: AnyGraph | None
    poses: Tensor
    depth: Tensor
    scores: dict[str, float]

    @property
    def core(self) -> list[int]:
        """The frames that every frame sees in full, if not all frames do."""
        full = self.graph.full if isinstance(self.graph, CoarseGraph) else self.graph
        return [] if full is None else full.to_dense().all(0).nonzero()[:, 0].tolist()

    @property
    def auc30(self) -> float:
        """Pose AUC at 30 degrees; that of rotation alone where no camera of the reference moves."""
        return self.scores.get("auc30", self.scores["rotation_auc30"])

    @property
    def is_full(self) -> bool:
        """Whether it is a graph in which every token sees every token, so that it computes what dense does."""
        return self.graph is not None and self.pairs == 1

    @property
    def frame_pairs(self) -> int:
        """Pairs of frames of which one sees the other, a frame and itself included."""
        return len(self.poses) ** 2 if self.graph is None else self.graph.num_edges

    def facts(self) -> dict[str, Any]:
        """Return what a report holds."""
        return {
            "layout": self.layout.name,
            "sees": self.layout.sees,
            "ms": self.cost.min_ms,
            "runs": self.cost.runs,
            "peak_mib": self.cost.peak_mib,
            "pairs": self.pairs,
            "frame_pairs": self.frame_pairs,
            "backend": self.backend,
            **self.scores,
        }


def run_layouts(
    model: LoadedModel,
    frames: Tensor,  # [S, 3, H, W]
    layouts: Sequence[Layout],
    truth: Reference | None = None,
    *,
    backend: str | None = None,
    rounds: int = 3,
    stage: Stage = silent,
) -> list[Outcome]:
    """Run a model with each layout in turn, a few rounds, so that other work on the machine meets all alike.

    A timed run chooses its graph anew. Elsewhere than on CPUs a patched model runs once before, on the frames in
    reverse order, as kernels are compiled and the fused forward is verified then.

    Args:
        model: The model, on its device.
        frames: RGB in [0, 1], on the same device.
        layouts: What to run.
        truth: What runs are compared with; None for the run of the first layout.
        backend: As `patch` takes it.
        rounds: Runs of each at most, 1 or more; no round begins after `ENOUGH_SECONDS`.
        stage: Is told each stage of the work.

    Raises:
        ValueError: If there are fewer than two frames, or a layout cannot be made of them.
    """
    if len(frames) < 2:
        raise ValueError(f"cameras are compared in pairs, so two frames or more are needed, got {len(frames)}")
    meters, reference = [Meter(frames.device) for _ in layouts], truth
    model(frames[:WARM_UP_FRAMES])
    outcomes: list[Outcome] = []
    while not outcomes or (len(meters[0].times_ms) < rounds and _seconds(meters) < ENOUGH_SECONDS):
        outcomes = []
        for layout, meter in zip(layouts, meters, strict=True):
            with layout.on(model, backend) as handle:
                with stage(f"{layout.name}, run {len(meter.times_ms) + 1}"):
                    if handle is not None and frames.device.type != "cpu":
                        model(frames.flip(0))
                    outputs = meter(lambda: model(frames))
                poses, depth = model.kind.cameras(outputs).cpu(), outputs["depth"].cpu()
                del outputs
                reference = reference or Reference.of_run(poses, depth)
                outcomes.append(_outcome(layout, meter.cost(), handle, poses, depth, reference))
    return outcomes


def _seconds(meters: Sequence[Meter]) -> float:
    return sum(sum(meter.times_ms) for meter in meters) / 1000


def _outcome(
    layout: Layout, cost: Cost, handle: Patch | None, poses: Tensor, depth: Tensor, reference: Reference
) -> Outcome:
    scores = reference.scores(poses, depth)
    return Outcome(
        layout=layout,
        cost=cost,
        pairs=1.0 if handle is None else handle.report().token_density or 1.0,
        backend=None if handle is None else handle.report().backend,
        graph=None if handle is None else handle.graph.to("cpu"),
        poses=reference.aligned(poses),
        depth=scores.get("depth_scale", 1.0) * depth,
        scores=scores,
    )
