"""A sweep says which layout keeps accuracy and why, and goes on with fewer frames where memory runs out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiers import every
from torch import Tensor, nn

from svggt_kernels import TokenSimilarity
from svggt_kernels.cli import arguments
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.measure.layouts import Reference
from svggt_kernels.measure.sweep import CORES, Sweep, default_names, sweep
from svggt_kernels.models import RUNNABLE
from svggt_kernels.models.loading import LoadedModel

FRAMES = 9


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(FRAMES, 3, 28, 42, generator=torch.Generator().manual_seed(0))


class Limited(nn.Module):
    """A model on a device that holds so many frames."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.model, self.most, self.error = RoomsModel.create(0, dim=16, depth=2, num_heads=2).eval(), most, error
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.append(images.shape[1])
        if images.shape[1] > self.most:
            raise self.error
        return self.model(images)


def loaded(module: nn.Module) -> LoadedModel:
    return LoadedModel(RUNNABLE["toy"], module, weights="", warning=None, autocast=None)


def outcome(name: str, seconds: float, auc30: float, *, absrel: float = 0.1, pairs: float = 0.5) -> SimpleNamespace:
    return SimpleNamespace(
        layout=SimpleNamespace(name=name),
        cost=SimpleNamespace(min_ms=1000 * seconds),
        pairs=pairs,
        auc30=auc30,
        scores={"absrel": absrel},
    )


def swept(*outcomes: SimpleNamespace, against_truth: bool = True) -> Sweep:
    return Sweep(list(outcomes), asked=100, frames=100, against_truth=against_truth)  # type: ignore[arg-type]


def test_the_fastest_that_keeps_accuracy_is_recommended():
    dense = outcome("dense", 4, 0.8, pairs=1)
    blind, small, large = outcome("a", 1, 0.3), outcome("b", 2, 0.765, pairs=0.25), outcome("c", 3, 0.8)
    found = swept(dense, large, blind, small)
    assert found.recommended is small
    assert found.advice.startswith("Take b: it is the fastest that keeps 0.95 of dense's AUC@30 and at most 1.15 of")
    assert "(0.956), at 25 % of the pairs, and takes 2 s where dense takes 4 s." in found.advice
    assert swept(dense, large, outcome("b", 2, 0.765, absrel=0.12)).recommended is large
    assert swept(dense, large, outcome("b", 2, 0.75)).recommended is large


def test_dense_is_the_advice_where_no_layout_is_better():
    dense = outcome("dense", 4, 0.8, pairs=1)
    none = swept(dense, outcome("a", 1, 0.3), outcome("b", 2, 0.6))
    assert none.recommended is None
    assert none.advice == (
        "Stay with dense: no layout keeps 0.95 of dense's AUC@30 and at most 1.15 of its AbsRel; b comes closest in "
        "AUC@30, with 0.75."
    )
    slow = swept(dense, outcome("a", 5, 0.8))
    assert slow.recommended is None
    assert "a is the fastest that keeps" in slow.advice and "is no faster (5 s where dense takes 4 s)" in slow.advice


def test_what_the_runs_do_not_tell_is_said():
    full = swept(outcome("dense", 4, 0.8, pairs=1), outcome("a", 1, 0.8, pairs=1))
    assert full.recommended is None and "lets each of the 100 frames see all; give more photos" in full.advice
    lost = swept(outcome("dense", 4, 0.02, pairs=1), outcome("a", 1, 0.02))
    assert lost.recommended is None and "dense itself has an AUC@30 of 0.020" in lost.advice


def test_against_dense_agreement_counts_and_not_depth():
    dense = outcome("dense", 4, 1, absrel=0, pairs=1)
    found = swept(dense, outcome("a", 1, 0.94), outcome("b", 2, 0.96, absrel=0.05), against_truth=False)
    assert found.recommended is not None and found.recommended.layout.name == "b"
    assert "keeps 0.95 of AUC@30 between it and dense (0.96)" in found.advice


def test_default_layouts_are_cores_smaller_than_the_frames():
    assert default_names(40) == ["core-16-covering", "core-32-covering", "core-32-evenly", "nearest-10"]
    assert default_names(500) == [*(f"core-{size}-covering" for size in CORES), "core-52-evenly", "nearest-10"]
    assert arguments.SWEPT_CORES == CORES
    with pytest.raises(ValueError, match=r"needs more photos than that, got 16; .* such as core-5"):
        default_names(16)


@pytest.mark.parametrize(
    "error",
    every(2, [RuntimeError("[enforce] DefaultCPUAllocator: can't allocate"), torch.OutOfMemoryError("full")]),
    ids=type,
)
def test_where_memory_runs_out_all_run_on_fewer_frames(images: Tensor, error: Exception):
    model = Limited(5, error)
    truth = Reference(torch.eye(4).repeat(3, 1, 1) + torch.rand(3, 1, 1), None, [1, 3, 8])
    with pytest.warns(UserWarning, match="memory ran out with 9 frames; all runs again with the first 4"):
        found = sweep(loaded(model), images, ["core-2", "dense", "core-3-evenly"], TokenSimilarity, truth, rounds=1)
    assert (found.asked, found.frames, found.against_truth) == (9, 4, True)
    assert [x.layout.name for x in found.outcomes] == ["dense", "core-2", "core-3-evenly"]
    assert all(len(x.poses) == 4 for x in found.outcomes)
    assert model.seen == [4, 9, 4, 4, 4, 4]  # each time a few frames first


def test_other_errors_and_too_little_memory_are_raised(images: Tensor):
    with pytest.raises(RuntimeError, match="broken"):
        sweep(loaded(Limited(5, RuntimeError("broken"))), images, ["core-2"], TokenSimilarity)
    with pytest.warns(UserWarning, match="memory ran out"), pytest.raises(torch.OutOfMemoryError):
        sweep(loaded(Limited(1, torch.OutOfMemoryError("full"))), images, ["core-1"], TokenSimilarity)
    with pytest.raises(torch.OutOfMemoryError):  # of 17 to 33 frames half are too few for the least core
        sweep(loaded(Limited(8, torch.OutOfMemoryError("full"))), images.repeat(3, 1, 1, 1), None, TokenSimilarity)
