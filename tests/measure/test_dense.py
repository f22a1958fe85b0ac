"""`compare_dense`: a patched model against itself as it is, with nothing of the model or its patch changed."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from svggt_kernels import Patch, TokenSimilarity, compare_dense, patch
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.measure.layouts import Reference
from svggt_kernels.models import RUNNABLE
from svggt_kernels.sources import Core

FRAMES = 6


@pytest.fixture
def model() -> RoomsModel:
    return RoomsModel.create(0, dim=16, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(FRAMES, 3, 28, 42, generator=torch.Generator().manual_seed(0))


def test_scores_are_of_sparse_against_dense(model: RoomsModel, images: Tensor):
    kind = RUNNABLE["toy"]
    with torch.no_grad():
        dense = kind.outputs(model.eval()(images[None]))
        with patch(model, covisibility=Core(2, by="tokens")):
            sparse = kind.outputs(model(images[None]))
            compared = compare_dense(model, images)
    expected = Reference.of_run(kind.cameras(dense), dense["depth"]).scores(kind.cameras(sparse), sparse["depth"])
    assert compared.scores == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert compared.scores["absrel"] > 1e-4 and compared.scores["rotation_median"] > 0
    assert compared.frames == FRAMES and not compared.is_full
    assert compared.pairs == pytest.approx((2 * 2 + 4 * 3) / FRAMES**2)
    assert set(compared.deviations) == set(dense) and compared.deviations["depth"].relative_l2 > 0
    assert compared.dense.runs == compared.sparse.runs == 1
    said = str(compared)
    assert "6 frames, sparse against dense, 44.4 % of the pairs" in said
    assert "AUC@30" in said and "over 15 pairs" in said and "AbsRel" in said and "dense " in said


def test_model_and_patch_stay_as_they_are(model: RoomsModel, images: Tensor):
    model.train()
    model.aggregator.global_blocks[0].eval()
    modes = [module.training for module in model.modules()]
    with patch(model, covisibility=Core(2, by="tokens")) as handle:
        model(images[None, :4])
        before, graph, names = str(handle.report()), handle.graph, [sorted(x.__dict__) for x in model.modules()]
        compare_dense(model, images[None])
        assert Patch.of(model) is handle and handle.graph is graph and str(handle.report()) == before
        assert [sorted(x.__dict__) for x in model.modules()] == names
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert torch.is_grad_enabled()
        model(images[None])
        assert handle.report().visible_pairs < handle.report().dense_pairs


class Watched(nn.Module):
    """Notes of each call whether it trains, whether it keeps gradients, and where the first weights lie."""

    calls: ClassVar[list[tuple[bool, bool, int]]] = []

    def __init__(self, model: RoomsModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.calls.append((self.model.training, torch.is_grad_enabled(), next(self.parameters()).data_ptr()))
        return self.model(images)


def test_a_copy_runs_in_eval_mode_without_gradients_and_shares_the_weights(model: RoomsModel, images: Tensor):
    watched = Watched(model).train()
    with patch(watched, covisibility=Core(2, by="tokens")):
        compare_dense(watched, images)
    assert Watched.calls == [(False, False, next(model.parameters()).data_ptr())] * 4


def test_a_full_graph_says_so_and_has_no_figures(model: RoomsModel, images: Tensor):
    with patch(model, covisibility=Core(FRAMES, by="tokens")):
        compared = compare_dense(model, images)
    assert compared.is_full and compared.scores == {} and compared.deviations == {}
    assert "every frame sees every frame, so this says nothing" in str(compared) and "Core(2)" in str(compared)


class Unread(nn.Module):
    """Holds a model and returns what nobody can read."""

    def __init__(self, model: RoomsModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.model(images).values())


def test_refusals(model: RoomsModel, images: Tensor):
    with pytest.raises(ValueError, match="is not patched"):
        compare_dense(model, images)
    with patch(model, covisibility=TokenSimilarity(1)):
        with pytest.raises(ValueError, match=r"S of 2 or more, got \[1, 3, 28, 42\]; give one sample"):
            compare_dense(model, images[:1])
        with pytest.raises(ValueError, match=r"got \[2, 3, 3, 28, 42\]"):
            compare_dense(model, images.view(2, 3, 3, 28, 42))
    unread = Unread(model)
    with patch(unread, covisibility="sequential"), pytest.raises(ValueError, match="give the whole model, with its"):
        compare_dense(unread, images)
    with (
        patch(model, modules=[block.attn for block in model.aggregator.global_blocks], covisibility="sequential"),
        pytest.raises(ValueError, match="RoomsModel returns cameras and depth is not known"),
    ):
        compare_dense(model, images)
