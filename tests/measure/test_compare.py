"""Dense against sparse: one patch serves all timed runs, and the model stays as it was."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from svggt_kernels import Patch, patch
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.measure import compare
from svggt_kernels.models import RUNNABLE
from svggt_kernels.models.loading import LoadedModel

FRAMES = torch.rand(3, 3, 28, 28)


@pytest.fixture
def toy() -> LoadedModel:
    module = RoomsModel(dim=16, depth=2, num_heads=2).eval()
    return LoadedModel(RUNNABLE["toy"], module, weights="random", warning=None, autocast=None)


def test_one_patch_serves_all_timed_runs(monkeypatch: pytest.MonkeyPatch, toy: LoadedModel):
    patched: list[nn.Module] = []

    def slowly(module: nn.Module, **options: object) -> Patch:
        patched.append(module)
        time.sleep(1)
        return patch(module, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(compare, "patch", slowly)
    comparison, _ = compare.compare(toy, FRAMES, "tokens", described="", repeats=3)
    assert len(patched) == 1
    assert comparison.first_sparse_ms > 1000 > comparison.sparse.max_ms
    assert comparison.sparse.runs == 3
    assert set(comparison.first_steps_ms) == {"descriptors", "graph", "layout", "tables"}
    assert sum(comparison.first_steps_ms.values()) < comparison.first_sparse_ms
    weights = [parameter.data_ptr() for parameter in toy.module.parameters()]
    assert [parameter.data_ptr() for parameter in patched[0].parameters()] == weights


def test_the_model_is_as_before(toy: LoadedModel):
    before = toy(FRAMES)
    compare.compare(toy, FRAMES, "tokens", described="", repeats=1)
    assert torch.equal(toy(FRAMES)["depth"], before["depth"])


def test_stages_are_told(toy: LoadedModel):
    told: list[str] = []

    @contextmanager
    def stage(what: str) -> Iterator[compare.Tell]:
        told.append(what)
        yield told.append

    compare.compare(toy, FRAMES, "all", described="", repeats=1, stage=stage)
    assert told == [
        "dense, first run",
        "sparse, first run",
        "dense and sparse in turn",
        "run 1 of 1",
        "one global attention by itself",
    ]


def test_what_the_frames_cannot_have_is_refused(toy: LoadedModel):
    with pytest.raises(ValueError, match="covisibility"):
        compare.compare(toy, FRAMES, "nonsense", described="")


def test_sparse_alone_is_the_sparse_run_of_a_comparison(toy: LoadedModel):
    comparison, outputs = compare.compare(toy, FRAMES, "sequential", described="in order", repeats=1)
    run, alone = compare.run_sparse(toy, FRAMES, "sequential", described="in order", repeats=2)
    assert alone.dense is None
    assert all(torch.equal(alone.sparse[name], output) for name, output in outputs.sparse.items())
    measured = {"sparse", "first_sparse_ms", "planning_ms", "first_steps_ms", "kept_mib"}
    for name in {field.name for field in dataclasses.fields(run)} - measured:
        assert getattr(run, name) == getattr(comparison, name), name
    assert run.sparse.runs == 2
    assert run.unrest >= 1
