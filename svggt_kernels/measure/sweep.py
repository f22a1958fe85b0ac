"""Which layout keeps the accuracy of a model on a user's own frames: several beside dense, and a recommendation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.loading import LoadedModel
from ..sources import PatchSimilarity, Similarity
from ..sources.core import CORE_SIZE
from ..user_warnings import warn
from .compare import Stage, silent
from .cost import is_out_of_memory
from .layouts import DENSE, Outcome, Reference, layouts_named, run_layouts
from .wording import count, milliseconds, percent

CORES = (16, 32, 52, 64)
KEEPS_AUC, KEEPS_ABSREL = 0.95, 1.15
LEAST_AUC = 0.1
"""Of dense against the truth; below, there is no accuracy to keep."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """What came of every layout.

    Attributes:
        outcomes: Of dense, then of the others.
        asked: Frames that were given.
        frames: The first of them, as many as memory sufficed for.
        against_truth: Whether scores are against the truth; else against dense, which then has no error.
    """

    outcomes: list[Outcome]
    asked: int
    frames: int
    against_truth: bool

    @property
    def dense(self) -> Outcome:
        """The model as it is."""
        return self.outcomes[0]

    @property
    def sparse(self) -> list[Outcome]:
        """The layouts in which not every token sees every token."""
        return [outcome for outcome in self.outcomes if outcome.pairs < 1]

    @property
    def kept(self) -> list[Outcome]:
        """Those of them that keep accuracy, the fastest first.

        Their AUC@30 is at least 0.95 of dense's; against the truth their AbsRel, where known, is at most 1.15 of it.
        """
        kept = [outcome for outcome in self.sparse if self._share(outcome) >= KEEPS_AUC]
        if self.against_truth and "absrel" in self.dense.scores:
            kept = [x for x in kept if x.scores["absrel"] <= KEEPS_ABSREL * self.dense.scores["absrel"]]
        return sorted(kept, key=lambda outcome: outcome.cost.min_ms)

    @property
    def recommended(self) -> Outcome | None:
        """The layout to take; None if it is dense, or the runs do not tell."""
        if self.dense.auc30 < LEAST_AUC or not self.kept or self.kept[0].cost.min_ms >= self.dense.cost.min_ms:
            return None
        return self.kept[0]

    @property
    def advice(self) -> str:
        """What to take and why, in a sentence."""
        what = "of dense's AUC@30" if self.against_truth else "of AUC@30 between it and dense"
        if self.against_truth and "absrel" in self.dense.scores:
            what += f" and at most {KEEPS_ABSREL:g} of its AbsRel"
        if self.dense.auc30 < LEAST_AUC:
            return (
                f"Nothing can be recommended: dense itself has an AUC@30 of {self.dense.auc30:.3f}, so there is no "
                "accuracy to keep."
            )
        if not self.sparse:
            return (
                f"Nothing can be recommended: every layout lets each of the {self.frames} frames see all; give more "
                "photos, or smaller cores."
            )
        if not self.kept:
            best = max(self.sparse, key=lambda outcome: outcome.auc30)
            return (
                f"Stay with dense: no layout keeps {KEEPS_AUC:g} {what}; {best.layout.name} comes closest in AUC@30, "
                f"with {self._share(best):.3g}."
            )
        fastest, dense = self.kept[0], self.dense
        took = f"{milliseconds(fastest.cost.min_ms)} where dense takes {milliseconds(dense.cost.min_ms)}"
        if self.recommended is None:
            return (
                f"Stay with dense for {count(self.frames, 'photo')}: {fastest.layout.name} is the fastest that keeps "
                f"{KEEPS_AUC:g} {what}, and is no faster ({took})."
            )
        return (
            f"Take {fastest.layout.name}: it is the fastest that keeps {KEEPS_AUC:g} {what} "
            f"({self._share(fastest):.3g}), at {percent(fastest.pairs)} of the pairs, and takes {took}."
        )

    def _share(self, outcome: Outcome) -> float:
        return outcome.auc30 / self.dense.auc30


def default_names(frames: int) -> list[str]:
    """Return the names of the layouts to compare on so many frames.

    Raises:
        ValueError: If every one would let every frame see all.
    """
    sizes = [size for size in CORES if size < frames]
    if not sizes:
        raise ValueError(
            f"the least core that a sweep tries has {CORES[0]} frames, so it needs more photos than that, got "
            f"{frames}; give more, or --layouts with smaller cores, such as core-{max(1, frames // 3)}-covering"
        )
    return [*(f"core-{size}-covering" for size in sizes), f"core-{min(CORE_SIZE, sizes[-1])}-evenly", "nearest-10"]


def sweep(
    model: LoadedModel,
    frames: Tensor,  # [S, 3, H, W]
    names: Sequence[str] | None,
    similarity: Callable[[], Similarity | PatchSimilarity],
    truth: Reference | None = None,
    *,
    backend: str | None = None,
    rounds: int = 3,
    stage: Stage = silent,
) -> Sweep:
    """Run a model dense and with each layout; where memory runs out, all again on the first half of the frames.

    Args:
        model: The model, on its device.
        frames: RGB in [0, 1], on the same device.
        names: Of the layouts, see `layouts`; None for `default_names`.
        similarity: Returns what chooses cores and neighbours, if one of the layouts needs it.
        truth: What is known of the frames; None to compare with dense.
        backend: As `patch` takes it.
        rounds: As `run_layouts` takes it.
        stage: Is told each stage of the work.

    Raises:
        ValueError: If a name has no meaning, there are too few frames, or a layout cannot be made of them.
        MemoryError, RuntimeError: If memory does not suffice for twice as many frames as a sweep needs.
    """
    used = len(frames)
    while True:
        layouts = [DENSE, *layouts_named([x for x in names or default_names(used) if x != DENSE.name], similarity)]
        known = None if truth is None else truth.first(used)
        try:
            outcomes = run_layouts(model, frames[:used], layouts, known, backend=backend, rounds=rounds, stage=stage)
            return Sweep(outcomes, len(frames), used, truth is not None)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or used // 2 <= (CORES[0] if names is None else 1):
                raise
        # The traceback, which held the tensors of that run, is gone here.
        gc.collect()
        if frames.device.type == "cuda":
            torch.cuda.empty_cache()
        warn(f"memory ran out with {used} frames; all runs again with the first {used // 2}")
        used //= 2
