"""MegaLoc: one global descriptor per image, by which images of one place are found.

Berton and Masone, "MegaLoc: One Retrieval to Place Them All", CVPR 2025 Workshops: a fine-tuned DINOv2 ViT-B/14, the
optimal-transport aggregation of Izquierdo and Civera, "Optimal Transport Aggregation for Visual Place Recognition",
CVPR 2024 (SALAD), and a linear layer. Written from these papers; parameters bear the names of the published weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...graph.arguments import integer
from ...io.pixels import require_unit_range
from ...packages import optional
from ..base import IMAGENET_DEVIATION, IMAGENET_MEAN
from .dinov2 import PATCH, DINOv2
from .weights import PUBLISHED, read_weights

SINKHORN_ROUNDS = 3
SIZE = 322  # pixels on each side; what MegaLoc was evaluated with


@dataclass(frozen=True)
class MegaLocConfig:
    """Sizes of a MegaLoc; the defaults are those of the published weights.

    Attributes:
        dim: Channels of a token.
        depth: Blocks of the transformer.
        num_heads: Heads of each attention.
        grid: Patches on each side of the learned grid of positions.
        clusters: Clusters m that patches are assigned to.
        cluster_dim: Channels of a cluster.
        token_dim: Channels of the class token's part.
        hidden: Channels inside the three small networks of the aggregation.
        descriptor_dim: Channels D of a descriptor.
    """

    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    grid: int = 37
    clusters: int = 64
    cluster_dim: int = 256
    token_dim: int = 256
    hidden: int = 512
    descriptor_dim: int = 8448


STANDARD = MegaLocConfig()


class MegaLoc(nn.Module):
    """Images to descriptors of unit length; the more two agree, the likelier their images show one place.

    `from_pretrained` makes one. The constructor leaves every parameter on the meta device, where nothing can be
    computed, so that no descriptor ever comes from weights that nobody has loaded. It has no dropout and needs no
    gradients: training and evaluation are the same.
    """

    def __init__(self, config: MegaLocConfig = STANDARD) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.backbone = DINOv2(config.dim, config.depth, config.num_heads, config.grid)
            self.aggregator = nn.ModuleDict(
                {
                    "agg": Aggregation(config),
                    "linear": nn.Linear(config.token_dim + config.clusters * config.cluster_dim, config.descriptor_dim),
                }
            )
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, source: str | Path = PUBLISHED, *, config: MegaLocConfig = STANDARD) -> MegaLoc:
        """Load published weights, on the CPU in float32.

        Args:
            source: A file (safetensors, or a pickle of tensors such as `megaloc.torch` of MegaLoc's first release), a
                folder that holds `model.safetensors`, or the name of a repository of the Hugging Face hub. The hub's
                local cache is looked at first; only what is not there is downloaded.
            config: Sizes that the weights must have.

        Raises:
            FileNotFoundError: If the weights can be had neither here nor from the hub. The message says what to do.
            ValueError: If the file is damaged, or does not hold exactly the parameters of MegaLoc.
            TypeError: If `source` is neither a path nor a name.
            ImportError: If the package that reads the file is not installed.
        """
        model = cls(config)
        model.load_state_dict(read_weights(source, model.state_dict()), assign=True)
        return model.requires_grad_(False)

    @classmethod
    def random_init(cls, config: MegaLocConfig = STANDARD, *, seed: int = 0) -> MegaLoc:
        """Make a MegaLoc with random weights, for tests: its descriptors say nothing about places.

        Args:
            config: Sizes.
            seed: Where the random numbers start.
        """
        model = cls(config).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_token", "pos_embed")):
                parameter.normal_(generator=generator)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                around = 1.0 if ("norm" in name and name.endswith("weight")) or name.endswith("gamma") else 0.0
                parameter.normal_(around, 0.1, generator=generator)
        return model

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:
        """Return the descriptors of one batch, `[B, D]` float32 of unit length.

        Sides that are not multiples of 14 pixels are resampled to the nearest ones. Descriptors of images of another
        size or aspect ratio can be compared, but are not the same; `describe` brings all images to one size.

        Args:
            images: RGB in [0, 1], floating point; ImageNet's mean and deviation are taken out here.

        Raises:
            ValueError: If images are not `[B, 3, H, W]`, or hold no more patches of 14 x 14 than there are clusters.
        """
        _require_rgb(images)
        sides = [round(side / PATCH) * PATCH for side in images.shape[-2:]]
        patches = sides[0] * sides[1] // PATCH**2
        if patches <= self.config.clusters:
            raise ValueError(
                f"an image must hold more than {self.config.clusters} patches of {PATCH} x {PATCH} pixels, but "
                f"{images.shape[-2]} x {images.shape[-1]} pixels hold {patches}; enlarge the images, as "
                f"describe() does to {SIZE} x {SIZE} unless it is told another size"
            )
        weight = self.backbone.cls_token
        images = _resampled(images.to(weight.device, torch.float32), sides)
        # Channel by channel: a tensor of three numbers would have to be sent to the device, which waits for it.
        channels = zip(images.unbind(1), IMAGENET_MEAN, IMAGENET_DEVIATION, strict=True)
        normalised = torch.stack([(channel - mean) / deviation for channel, mean, deviation in channels], dim=1)
        class_token, tokens = self.backbone(normalised.to(weight.dtype))
        gathered = self.aggregator["agg"](class_token, tokens)
        return F.normalize(self.aggregator["linear"](gathered.to(weight.dtype)).float(), dim=1)

    def describe(
        self,
        images: Tensor,  # [S, 3, H, W]
        *,
        size: int = SIZE,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Tensor:
        """Return one descriptor per image, `[S, D]` float32 on the device of this model, batch after batch.

        Each image is resampled to `size` x `size` pixels, whatever its aspect ratio. Where the parameters of this model
        are and their dtype decide device and precision; autocast does not. No gradients are recorded. The images are
        checked before the first batch and the descriptors after the last; between them nothing waits for the device.

        Args:
            images: RGB, uint8, or floating point in [0, 1]; on any device.
            size: Pixels on each side that the network sees.
            batch_size: Images at a time.
            progress: Whether to show a bar on stderr (needs tqdm).

        Raises:
            ValueError: If images are not `[S, 3, H, W]`, hold NaN, or leave [0, 1]; if `size` gives too few patches or
                `batch_size` is below 1; or if a descriptor is not finite.
            TypeError: If they are neither uint8 nor floating point, or `size` or `batch_size` is not an integer.
        """
        _require_rgb(images)
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
        size, batch_size = integer("size", size, 1), integer("batch_size", batch_size, 1)
        if images.is_floating_point():
            require_unit_range(images)
        device = self.backbone.cls_token.device
        described = []
        # A descriptor outlives the call, so it must not be a tensor of inference mode.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            for batch in _with_bar(images.split(batch_size), progress):
                batch = _sent(batch, device)
                batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
                described.append(self(_resampled(batch, [size, size])))
            descriptors = torch.cat(described)
            sound = descriptors.isfinite().all(dim=1)
        if not bool(sound.all()):
            raise ValueError(
                f"the descriptors of images {_listed(~sound)} are not finite in {self.backbone.cls_token.dtype}; "
                "use float32 or bfloat16, or load the weights again"
            )
        return descriptors


class Aggregation(nn.Module):
    """SALAD's aggregation: patches are shared out among clusters, and each cluster sums what it is given."""

    def __init__(self, config: MegaLocConfig) -> None:
        super().__init__()
        self.dust_bin = nn.Parameter(torch.empty(()))
        self.token_features = nn.Sequential(
            nn.Linear(config.dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.token_dim)
        )
        self.cluster_features = _per_patch(config.dim, config.hidden, config.cluster_dim)
        self.score = _per_patch(config.dim, config.hidden, config.clusters)

    def forward(
        self,
        class_token: Tensor,  # [B, C]
        tokens: Tensor,  # [B, n, C]
    ) -> Tensor:
        """Return `[B, token_dim + cluster_dim * clusters]` float32 of unit length, clusters running fastest."""
        shares = assign(self.score(tokens).mT.float(), self.dust_bin.float())
        clusters = torch.einsum("bnd,bmn->bdm", self.cluster_features(tokens).float(), shares)
        of_image = F.normalize(self.token_features(class_token).float(), dim=1)
        return F.normalize(torch.cat([of_image, F.normalize(clusters, dim=1).flatten(1)], dim=1), dim=1)


class PatchLinear(nn.Module):
    """A linear layer whose weight has the shape in which it was published, that of a 1 x 1 convolution."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, dim, 1, 1))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(
        self,
        tokens: Tensor,  # [B, n, C]
    ) -> Tensor:
        """Return `[B, n, out]`."""
        return F.linear(tokens, self.weight.flatten(1), self.bias)


def assign(
    scores: Tensor,  # [B, m, n]
    dust_bin: Tensor,  # []
) -> Tensor:
    """Share out n patches among m clusters and a dustbin by entropic optimal transport; `[B, m, n]`.

    Every patch has mass 1 to give, every cluster takes 1, and the dustbin the n - m that are left (SALAD, section 3.2;
    Sinkhorn's iteration in log space, Cuturi 2013). The masses' common factor cancels and is left out.

    Args:
        scores: How well each patch suits each cluster.
        dust_bin: The same for the dustbin, one score for all patches.
    """
    batch, clusters, patches = scores.shape
    log_shares = torch.cat([scores, dust_bin.expand(batch, 1, patches)], dim=1)
    log_mass = F.pad(scores.new_zeros(clusters, 1), (0, 0, 0, 1), value=math.log(patches - clusters))
    for _ in range(SINKHORN_ROUNDS):
        log_shares = log_shares.log_softmax(dim=2) + log_mass
        log_shares = log_shares.log_softmax(dim=1)
    return log_shares[:, :clusters].exp()


def _per_patch(dim: int, hidden: int, out: int) -> nn.Sequential:
    """Two linear layers; the second place is that of the dropout with which the weights were trained."""
    return nn.Sequential(PatchLinear(dim, hidden), nn.Identity(), nn.ReLU(), PatchLinear(hidden, out))


def _resampled(images: Tensor, sides: list[int]) -> Tensor:
    if list(images.shape[-2:]) == sides:
        return images
    return F.interpolate(images, size=sides, mode="bilinear", antialias=True)


def _require_rgb(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"images must be RGB, [S, 3, H, W], with at least one image, got shape {tuple(images.shape)}; repeat the "
            "channel of grey images (images.expand(-1, 3, -1, -1)), and drop an alpha channel (images[:, :3])"
        )


def _listed(chosen: Tensor) -> str:
    return ", ".join(map(str, chosen.nonzero().flatten().tolist()[:8]))


def _sent(batch: Tensor, device: torch.device) -> Tensor:
    """Return the batch on the device; to CUDA through pinned memory, from which it is copied while others are seen."""
    if device.type == "cuda" and batch.device.type == "cpu":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


def _with_bar(batches: tuple[Tensor, ...], progress: bool) -> tuple[Tensor, ...]:
    if not progress:
        return batches
    tqdm = optional("tqdm", "a progress bar", "tqdm", "'svggt-kernels[megaloc]'")
    return tqdm.tqdm(batches, desc="MegaLoc", unit="batch")
