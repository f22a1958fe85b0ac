"""Scenes of real models from PyPI with random weights: Depth Anything 3 (small) and MapAnything's transformer."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from svggt_kernels import open_scene
from svggt_kernels.models import RUNNABLE

pytestmark = pytest.mark.filterwarnings("ignore:.* may share nothing with the core:UserWarning")  # random weights

CORE = [1, 5, 3]


def require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: see tests/models/test_models_pypi.py")


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


class Backbone(nn.Module):
    """The transformer of Depth Anything 3 in float64, without its heads, which compute in float32."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.double()

    def forward(self, x: Tensor, ref_view_strategy: str = "saddle_balanced") -> Tensor:
        features = self.backbone(x, ref_view_strategy=ref_view_strategy)[0]
        return torch.cat([tokens for tokens, *_ in features], dim=-1)


def test_depth_anything_3():
    require("depth_anything_3", "omegaconf", "addict", "einops")
    model, frames = randomized(RUNNABLE["da3-small"].build()), torch.rand(8, 3, 28, 42)
    outputs = [open_scene(model, frames, core=CORE, chunk=chunk).predict() for chunk in (2, 8)]
    assert {"depth", "extrinsics", "intrinsics"} <= set(outputs[0])
    torch.testing.assert_close(outputs[0]["depth"], outputs[1]["depth"], rtol=1e-4, atol=1e-4)
    exact = [
        open_scene(Backbone(model.backbone).eval(), frames, core=CORE, chunk=chunk).predict() for chunk in (1, 3, 8)
    ]
    for each in exact[:2]:
        torch.testing.assert_close(each["output"], exact[2]["output"], rtol=1e-9, atol=1e-9)


class MapLike(nn.Module):
    """UniCeption's transformer over patches of images, with tokens of each view and a trailing token."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        from uniception.models.info_sharing.alternating_attention_transformer import (
            MultiViewAlternatingAttentionTransformer,
        )

        self.embed = nn.Conv2d(3, 32, 14, 14)
        self.transformer = MultiViewAlternatingAttentionTransformer(
            name="test", input_embed_dim=32, dim=32, depth=4, num_heads=2, **options
        )

    def forward(self, images: Tensor) -> Tensor:
        from uniception.models.info_sharing.base import MultiViewTransformerInput

        views = list(self.embed(images.flatten(0, 1)).unflatten(0, images.shape[:2]).unbind(1))
        ones = images.new_ones(len(images), 32, 1)
        out = self.transformer(
            MultiViewTransformerInput(
                features=views,
                additional_input_tokens_per_view=[ones.expand(-1, -1, 3)] * len(views),
                additional_input_tokens=ones,
            )
        )
        return torch.stack(out.features, dim=1)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_entropy_scaling": True}, {"use_scalable_softmax": True, "use_entropy_scaling": True, "qk_norm": True}],
    ids=["plain", "entropy", "both"],
)
def test_uniception(options: dict[str, object]):
    require("uniception", "jaxtyping")
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    model, frames = MapLike(**options).double().eval(), torch.rand(8, 3, 28, 42).double()
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32  # importing the package turns it on for the whole process
    scenes = [open_scene(model, frames, core=CORE, chunk=chunk, feed=lambda x: x[None]) for chunk in (1, 3, 8)]
    one, three, all_at_once = (scene.predict()["output"] for scene in scenes)
    torch.testing.assert_close(one, all_at_once, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(three, all_at_once, rtol=1e-9, atol=1e-9)
