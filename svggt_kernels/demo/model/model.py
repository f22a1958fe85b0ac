"""A small multi-view transformer of VGGT's shape that has learned rendered flats, where accuracy can be measured.

Read `model`, `aggregator`, `blocks` and `heads` in this order to see what the family has in common: frames become
tokens, blocks alternate between attention inside each frame and attention over all frames, and small heads read cameras
and depth from the tokens. With random weights **the outputs mean nothing geometrically**. The shape follows Wang et
al., "VGGT: Visual Geometry Grounded Transformer" (CVPR 2025, arXiv 2503.11651); the code is our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .aggregator import Aggregator
from .heads import CameraHead, DepthHead
from .weights import read_weights

TRAINED = Path(__file__).with_name("trained.npz")


class RoomsModel(nn.Module):
    """Turns the images of one scene into cameras and depth maps, the way VGGT does.

    Attributes:
        aggregator: Turns images into tokens; every attention across the patches of several frames is in it.
        camera_head: Reads cameras.
        depth_head: Reads depth.
        sizes: The arguments of the constructor.

    Args:
        dim: Channels of a token, `C`.
        depth: Number of frame blocks, and of global blocks.
        num_heads: Attention heads; `dim / num_heads` must be a multiple of 4, for the rotary embedding.
        mlp_ratio: Hidden channels of an MLP per channel of a token.
        patch_size: Side of a square image patch in pixels, even.
        num_registers: Register tokens per frame.

    Raises:
        ValueError: If `depth` is 0, `patch_size` is odd, or `dim` does not split into heads whose size is a multiple
            of 4.
    """

    reference_frame = 0

    def __init__(
        self,
        dim: int = 320,
        depth: int = 6,
        num_heads: int = 5,
        mlp_ratio: float = 1.5,
        patch_size: int = 14,
        num_registers: int = 4,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if dim % num_heads or dim // num_heads % 4:
            raise ValueError(
                f"dim / num_heads must be a multiple of 4, got dim={dim} and num_heads={num_heads}; "
                f"dim={64 * num_heads} gives heads of size 64"
            )
        if patch_size < 2 or patch_size % 2:
            raise ValueError(f"patch_size must be even, as features have half the resolution, got {patch_size}")
        self.sizes = {
            "dim": dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "patch_size": patch_size,
            "num_registers": num_registers,
        }
        self.aggregator = Aggregator(dim, depth, num_heads, mlp_ratio, patch_size, num_registers)
        self.camera_head = CameraHead(dim, num_heads, mlp_ratio)
        self.depth_head = DepthHead(dim, depth, patch_size)

    @classmethod
    def create(cls, seed: int = 0, **sizes: Any) -> RoomsModel:
        """Build the model on the CPU, in eval mode, with the random weights that `seed` determines.

        Args:
            seed: Seed of the weights. The global random state is left as it was.
            **sizes: Arguments of the constructor.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            return cls(**sizes).eval()

    @classmethod
    def trained(cls, path: Path | None = None) -> RoomsModel:
        """Build the model on the CPU, in eval mode, with trained weights.

        Args:
            path: A file that `weights.write_weights` has written; None for `trained.npz` beside this module.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else.
        """
        path = TRAINED if path is None else Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there are no trained weights at {path}; train some with `python -m evaluation train` and give their "
                "weights.npz as path, or use RoomsModel.create() for random ones"
            )
        state, sizes = read_weights(path)
        model = cls.create(0, **sizes)
        expected = model.state_dict()
        odd = [name for name in expected | state if name not in state or _shape(expected, name) != _shape(state, name)]
        if odd:
            raise ValueError(
                f"the weights in {path} are not those of this model: missing, not known or of another shape are "
                f"{len(odd)} tensors, such as {odd[0]}; give the weights.npz of a training"
            )
        model.load_state_dict(state)
        return model

    @staticmethod
    def provenance() -> dict[str, Any]:
        """Return what a training wrote beside the weights that `trained()` reads: seed, seconds, device, metrics.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        return json.loads(TRAINED.with_suffix(".json").read_text())

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Return `P`, the number of tokens of one frame of `height` x `width` pixels, special tokens included."""
        patch = self.aggregator.patch_size
        return self.aggregator.patch_start_idx + (height // patch) * (width // patch)

    def forward(
        self,
        images: Tensor,  # [S, 3, H, W] or [B, S, 3, H, W]
    ) -> dict[str, Tensor]:
        """Predict cameras and depth maps of all frames at once.

        Args:
            images: RGB in [0, 1]; height and width are multiples of `patch_size`.

        Returns:
            `pose_enc` `[B, S, 9]`: see `poses`; `depth` `[B, S, H, W, 1]`: positive, in the unit of the translations;
            `depth_conf` `[B, S, H, W]`: confidence, above 1. At least float32.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If the shape is not one of the above.
        """
        images = self._checked(images)
        layers, patch_start_idx = self.aggregator(images)
        depth, confidence = self.depth_head(layers, images=images, patch_start_idx=patch_start_idx)
        return {"pose_enc": self.camera_head(layers)[-1], "depth": depth, "depth_conf": confidence}

    def _checked(self, images: Tensor) -> Tensor:
        """Return the images as `[B, S, 3, H, W]` in the dtype of the weights."""
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; divide bytes by 255")
        if images.dim() not in (4, 5) or images.shape[-3] != 3 or 0 in images.shape:
            raise ValueError(f"images must be [S, 3, H, W] or [B, S, 3, H, W] and not empty, got {list(images.shape)}")
        height, width = images.shape[-2:]
        patch = self.aggregator.patch_size
        if height % patch or width % patch:
            nearest = " x ".join(str(max(1, round(n / patch)) * patch) for n in (height, width))
            raise ValueError(
                f"image height and width must be multiples of the patch size {patch}, "
                f"got {height} x {width}; resize or crop, for example to {nearest}"
            )
        return images.reshape(-1, *images.shape[-4:]).to(self.aggregator.camera_token.dtype)


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
