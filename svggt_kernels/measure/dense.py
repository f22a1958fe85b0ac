"""A user's own check: how far a patched model is from the same model as it is, on their images."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.base import RunnableModel
from ..patching import Patch
from .cost import Cost, Meter
from .deviation import Deviation
from .layouts import Reference
from .wording import count, milliseconds, percent


@dataclass(frozen=True)
class DenseComparison:
    """How far a patched model is from dense.

    Attributes:
        frames: Frames S.
        pairs: Visible / all pairs of tokens in global attention.
        is_full: Whether every frame saw every frame. Then both runs compute the same, and `scores` and `deviations` are
            empty.
        scores: What `scores.scene_scores` returns of sparse with dense as the truth: auc5, auc30 (1 where both agree),
            rotation_median, translation_median (degrees, over all pairs of frames), absrel, delta125 (depth, after one
            scale), ate (in units of the extent of dense's cameras: their root mean square distance from their mean).
        deviations: For each output how far sparse is from dense, neither scaled nor aligned.
        dense: Cost of a forward of the model as it is.
        sparse: Cost of a forward of the patched model on images that came before.
    """

    frames: int
    pairs: float
    is_full: bool
    scores: dict[str, float]
    deviations: dict[str, Deviation]
    dense: Cost
    sparse: Cost

    def __str__(self) -> str:
        took = f"dense {milliseconds(self.dense.min_ms)}, sparse {milliseconds(self.sparse.min_ms)}"
        if self.is_full:
            return (
                f"{count(self.frames, 'frame')}: every frame sees every frame, so this says nothing about accuracy; "
                f"give more images than the core has frames, or patch with a smaller core: "
                f"patch(model, covisibility=Core({max(1, self.frames // 3)})). {took}"
            )
        scores, pairs = self.scores, math.comb(self.frames, 2)
        lines = [f"{count(self.frames, 'frame')}, sparse against dense, {percent(self.pairs)} of the pairs of tokens:"]
        if "auc30" in scores:
            lines.append(
                f"cameras: AUC@5 {scores['auc5']:.3f}, AUC@30 {scores['auc30']:.3f} over {count(pairs, 'pair')}; "
                f"ATE {percent(scores['ate'])} of their extent"
            )
        median = [f"{scores[key]:.3g}" for key in ("rotation_median", "translation_median") if key in scores]
        lines.append(f"rotation and direction of translation, median: {' and '.join(median)} degrees")
        if "absrel" in scores:
            lines.append(
                f"depth: AbsRel {scores['absrel']:.4f} after one scale, {percent(scores['delta125'])} of the pixels "
                "within a factor of 1.25"
            )
        others = (f"{name} {percent(deviation.relative_l2)}" for name, deviation in self.deviations.items())
        lines += [f"outputs as they are, relative L2: {', '.join(others)}", took]
        return "\n  ".join(lines)


def compare_dense(model: nn.Module, images: Tensor) -> DenseComparison:
    """Run a patched model as it is and with its patch on some images, and compare cameras, depth and other outputs.

    A copy runs that shares the weights of the model, in eval mode and without gradients, under the caller's autocast:
    model and patch, with what its handle reports, stay as they are. Each of the two runs twice, the second is timed.

    Args:
        model: The patched model with its heads, as it is called: `model(images)` must return cameras and depth.
        images: `[S, 3, H, W]` or `[1, S, 3, H, W]` as the model takes them, on its device; more of them than the core
            has frames, or the graph is full and there is no difference to see.

    Raises:
        ValueError: If the model is not patched, how its cameras and depth are read is not known, there are fewer than
            two frames, or a camera of the model as it is is not finite.
    """
    kind = Patch.of(model).record.runnable
    if kind is None:
        raise ValueError(
            f"how {Patch.of(model).record.name} returns cameras and depth is not known, so compare_dense cannot read "
            "them; compare the outputs of model(images) before and after handle.undo() yourself"
        )
    batch = images[None] if images.dim() == 4 else images
    if batch.dim() != 5 or batch.shape[0] != 1 or batch.shape[1] < 2:
        raise ValueError(
            f"images must be [S, 3, H, W] or [1, S, 3, H, W], S of 2 or more, got {list(images.shape)}; give one sample"
        )
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared).eval()
    handle = Patch.of(twin)
    with torch.no_grad():
        (sparse, sparse_poses), sparse_cost = _measured(twin, kind, batch)
        pairs = handle.report().token_density or 1.0
        handle.undo()
        (dense, dense_poses), dense_cost = _measured(twin, kind, batch)
    is_full = pairs == 1
    reference = Reference.of_run(dense_poses, dense.get("depth"))
    return DenseComparison(
        frames=batch.shape[1],
        pairs=pairs,
        is_full=is_full,
        scores={} if is_full else reference.scores(sparse_poses, sparse.get("depth")),
        deviations={} if is_full else {name: Deviation.of(dense[name], sparse[name]) for name in dense},
        dense=dense_cost,
        sparse=sparse_cost,
    )


def _measured(
    model: nn.Module, kind: RunnableModel, images: Tensor
) -> tuple[tuple[Mapping[str, Tensor], Tensor], Cost]:
    """Run a model twice; return its outputs and poses of one sample, on the CPU, and the cost of the second run."""
    result = model(images)
    try:
        outputs = kind.outputs(result)
        poses = kind.cameras(outputs)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{type(model).__name__} must return the cameras and the depth of a {kind.name}, and they cannot be read "
            f"from its {type(result).__name__} ({type(error).__name__}: {error}); give the whole model, with its heads"
        ) from error
    del result
    meter = Meter(images.device)
    meter(partial(model, images))
    return ({name: output.cpu() for name, output in outputs.items()}, poses.cpu()), meter.cost()
