"""Patching real models from PyPI, with random weights: Depth Anything 3 (small) and MapAnything's transformer."""

from __future__ import annotations

import copy
import importlib.util
import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from svggt_kernels import CovisibilityGraph, Patch, patch
from svggt_kernels.models import RUNNABLE

DA3_NEEDS = ("depth_anything_3", "omegaconf", "addict", "einops")
UNICEPTION_NEEDS = ("uniception", "jaxtyping")
BAND = CovisibilityGraph.from_pairs(5, [(0, 1), (1, 0), (1, 2), (2, 3), (3, 2), (4, 0)])
ONE_WAY = CovisibilityGraph.from_pairs(5, [(1, 0), (2, 3)])
"""No reordering that moves one photo to the front gives what another gives."""
ISLANDS = CovisibilityGraph.from_pairs(5, [(0, 1), (1, 0), (2, 3), (3, 2)])


def require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not installed: pip install --no-deps depth-anything-3 uniception && "
            "pip install omegaconf addict einops jaxtyping"
        )


def randomized(model: nn.Module) -> nn.Module:
    """Weights large enough for attention to matter: upstream starts with LayerScale and tokens near zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.05, generator=generator)
            elif name.endswith("gamma"):
                weight.fill_(0.5)
    return model.eval()


@pytest.fixture(scope="module")
def da3() -> nn.Module:
    require(*DA3_NEEDS)
    return randomized(RUNNABLE["da3-small"].build())


@pytest.fixture
def photos() -> Tensor:
    return torch.rand(1, 5, 3, 42, 56)


@pytest.fixture(autouse=True)
def without_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


class TestDepthAnything3:
    def test_full_graph_is_dense(self, da3: nn.Module, photos: Tensor):
        model, photos = copy.deepcopy(da3), photos.double()
        model.backbone.double()
        dense = model.backbone(photos)[0]
        with patch(model, covisibility="all") as handle:
            full = model.backbone(photos)[0]
        for layer, expected in zip(full, dense, strict=True):
            for tokens, expected_tokens in zip(layer, expected, strict=True):
                torch.testing.assert_close(tokens, expected_tokens)
        report = handle.report()
        assert report.model == "Depth Anything 3"
        assert report.modules == tuple(f"backbone.pretrained.blocks.{i}.attn" for i in (5, 7, 9, 11))
        assert report.calls_last_forward == 4

    @pytest.mark.parametrize("strategy", ["first", "middle", "saddle_balanced", "saddle_sim_range"])
    def test_graph_of_the_photos_holds_whichever_view_is_the_reference(
        self, da3: nn.Module, photos: Tensor, strategy: str
    ):
        """Changing photo 4, which nobody sees, changes no other; changing photo 3 changes only 2, which sees it."""
        with patch(da3, covisibility=ONE_WAY, special_tokens="masked") as handle:
            clean = da3.backbone(photos, ref_view_strategy=strategy)[0]
            reference = self.reference(handle)
            for changed, touched in ((4, {4}), (3, {2, 3})):
                other = photos.clone()
                other[:, changed] = torch.rand(3, 42, 56)
                out = da3.backbone(other, ref_view_strategy=strategy)[0]
                if self.reference(handle) != reference:
                    continue  # the change made another photo the reference, which changes everything
                differs = {i for i in range(5) if not torch.equal(out[-1][0][:, i], clean[-1][0][:, i])}
                assert differs == touched

    @staticmethod
    def reference(handle: Patch) -> int:
        """The photo that the model moved to the front."""
        places = handle.layout.graph.to_dense()
        for photo in range(5):
            order = [photo, *(i for i in range(5) if i != photo)]
            if torch.equal(places, ONE_WAY.to_dense()[order][:, order]):
                return photo
        raise AssertionError("the layout is no reordering of the graph")

    def test_reference_view_in_the_middle(self, da3: nn.Module, photos: Tensor):
        with patch(da3, covisibility=BAND) as handle:
            da3(photos, ref_view_strategy="middle")
        order = [2, 0, 1, 3, 4]
        assert handle.graph is BAND
        assert torch.equal(handle.layout.graph.to_dense(), BAND.to_dense()[order][:, order])

    def test_default_graph_shows_the_reference_view_to_all(self, da3: nn.Module):
        with patch(da3, covisibility="tokens") as handle:
            da3(torch.rand(1, 14, 3, 28, 28), ref_view_strategy="middle")
        visible = handle.graph.to_dense()
        assert visible[7].all()
        assert visible[:, 7].all()

    def test_half_precision(self, da3: nn.Module, photos: Tensor):
        with torch.autocast("cpu", torch.bfloat16):
            with patch(da3, covisibility="all"):
                features = da3.backbone(photos)[0][-1][0]
            dense = da3.backbone(photos)[0][-1][0]
        exact = da3.backbone(photos)[0][-1][0]
        assert (features - exact).norm() <= 2 * (dense - exact).norm()

    def test_copies_and_undo(self, da3: nn.Module, photos: Tensor):
        dense, keys = da3(photos)["depth"], list(da3.state_dict())
        with patch(da3, covisibility=BAND):
            sparse = da3(photos)["depth"]
            assert list(da3.state_dict()) == keys
            twin, file = copy.deepcopy(da3), io.BytesIO()
            torch.save(da3, file)
        file.seek(0)
        assert not torch.equal(sparse, dense)
        assert torch.equal(da3(photos)["depth"], dense)
        assert torch.equal(twin(photos)["depth"], sparse)
        assert torch.equal(torch.load(file, weights_only=False)(photos)["depth"], sparse)

    def test_gradients(self, da3: nn.Module, photos: Tensor):
        def gradients() -> list[Tensor]:
            features = da3.backbone(photos[:, :3])[0][-1][0]
            weights = [da3.backbone.pretrained.blocks[5].attn.qkv.weight, da3.backbone.pretrained.cls_token]
            return list(torch.autograd.grad(features.square().mean(), weights))

        dense = gradients()
        with patch(da3, covisibility="all"):
            full = gradients()
        for gradient, expected in zip(full, dense, strict=True):
            torch.testing.assert_close(gradient, expected)


class TestUniCeption:
    @pytest.fixture(
        params=[
            {},
            {"indices": [1, 3]},
            {"use_entropy_scaling": True},
            {"use_scalable_softmax": True, "qk_norm": True, "init_values": 0.5},
            {"gradient_checkpointing": True},
        ],
        ids=["plain", "intermediate", "entropy", "scalable", "checkpointing"],
    )
    def model(self, request: pytest.FixtureRequest) -> nn.Module:
        require(*UNICEPTION_NEEDS)
        allow_tf32 = torch.backends.cuda.matmul.allow_tf32
        from uniception.models.info_sharing import alternating_attention_transformer as module

        torch.backends.cuda.matmul.allow_tf32 = allow_tf32  # importing the package turns it on for the whole process
        name = "MultiViewAlternatingAttentionTransformer" + ("IFR" if "indices" in request.param else "")
        return getattr(module, name)(
            name="test", input_embed_dim=32, dim=32, depth=4, num_heads=2, **request.param
        ).eval()

    @staticmethod
    def run(
        model: nn.Module, per_view: int = 3, trailing: int = 1, seed: int = 0, changed: int | None = None
    ) -> Tensor:
        """Returns the features `[B, S, C, h, w]` of five views, two samples; another view `changed` if given."""
        from uniception.models.info_sharing.base import MultiViewTransformerInput

        generator = torch.Generator().manual_seed(0)
        features = [torch.randn(2, 32, 3, 4, generator=generator) for _ in range(5)]
        if changed is not None:
            features[changed] = torch.randn(2, 32, 3, 4, generator=generator)
        out = model(
            MultiViewTransformerInput(
                features=features,
                additional_input_tokens_per_view=[torch.ones(2, 32, per_view)] * 5 if per_view else None,
                additional_input_tokens=torch.ones(2, 32, trailing) if trailing else None,
            )
        )
        return torch.stack((out[0] if isinstance(out, tuple) else out).features, dim=1)

    @pytest.mark.parametrize(("per_view", "trailing"), [(3, 1), (0, 1), (3, 0), (0, 0)])
    def test_full_graph_is_dense(self, model: nn.Module, per_view: int, trailing: int):
        dense = self.run(model, per_view, trailing)
        with patch(model, covisibility="all") as handle:
            torch.testing.assert_close(self.run(model, per_view, trailing), dense)
        assert handle.modules == ("self_attention_blocks.0.attn", "self_attention_blocks.2.attn")
        assert handle.layout.num_tokens == 5 * (12 + per_view) + trailing
        special = 5 * per_view + trailing
        with patch(model, covisibility=CovisibilityGraph.from_pairs(5, [])) as handle:
            assert not torch.allclose(self.run(model, per_view, trailing), dense)
        assert handle.layout.visible_pairs == 5 * 12 * 12 + special * (2 * 5 * 12 + special)

    def test_views_that_do_not_see_each_other(self, model: nn.Module):
        with patch(model, covisibility=ISLANDS, special_tokens="masked"):
            before = self.run(model, trailing=0)
            after = self.run(model, trailing=0, changed=3)
        differs = [not torch.equal(before[:, i], after[:, i]) for i in range(5)]
        assert differs == [False, False, True, True, False]

    def test_gradients(self, model: nn.Module):
        def gradient() -> Tensor:
            weight = model.self_attention_blocks[0].attn.qkv.weight
            return torch.autograd.grad(self.run(model).square().mean(), weight)[0]

        dense = gradient()
        with patch(model, covisibility="all") as handle:
            torch.testing.assert_close(gradient(), dense)
        assert handle.report().calls_last_forward == 2
