"""The models that the command line can build: how to make each one, feed it and read its outputs.

| name | package | without --weights |
|---|---|---|
| toy | none: it is in svggt_kernels | random, it has no trained weights |
| da3-small | depth-anything-3 (PyPI) | random |
| vggt | vggt (from its repository) | random |
| pi3 | pi3 (from its repository) | random |

Nothing is downloaded. Weights are a file that the user has.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..demo.toy import ToyMultiViewTransformer
from ..io.tensor_files import read_tensors, same_kind
from ..measure.machine import dtype_name
from .errors import CommandError, refusals

SEED = 0
HEAD_SIZE = 64  # of all these models
RANDOM_WEIGHTS = "The weights are random: depth and cameras mean nothing; only dense against sparse can be compared."
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelKind:
    """What the command line knows about one model.

    Attributes:
        build: Makes the model with random weights.
        requirement: How to install what `build` imports; empty if nothing is needed.
        long_side: The model's usual resolution: pixels of the longer side.
        trainable: Whether trained weights exist for it.
        feed: Turns frames `[S, 3, H, W]` in [0, 1] into the argument of its forward.
        outputs: Reads its result into named tensors `[S, ...]`; "depth" is `[S, H, W]`.
        key_prefix: A prefix that weight files put before every name.
        patch_size: Pixels of a patch.
        cell: Side in pixels of the squares whose mean depth pictures show; above 1 where the head fills each token with
            noise.
    """

    build: Callable[[], nn.Module]
    requirement: str
    long_side: int
    trainable: bool
    feed: Callable[[Tensor], Tensor]
    outputs: Callable[[Any], dict[str, Tensor]]
    key_prefix: str = ""
    patch_size: int = 14
    cell: int = 1


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        name: Its name on the command line.
        module: The model, in eval mode, on its device.
        kind: How to feed and read it.
        weights: Where the weights come from, in words.
        warning: What random weights mean for the outputs; None for weights from a file.
        autocast: The dtype of autocast, or None for float32 throughout.
    """

    name: str
    module: nn.Module
    kind: ModelKind
    weights: str
    warning: str | None
    autocast: torch.dtype | None

    def __call__(self, frames: Tensor) -> dict[str, Tensor]:
        """Run the model on frames `[S, 3, H, W]` and return its named outputs."""
        enabled = self.autocast is not None
        with torch.inference_mode(), torch.autocast(frames.device.type, dtype=self.autocast, enabled=enabled):
            return self.kind.outputs(self.module(self.kind.feed(frames)))


def running_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of attention there: bfloat16 on CUDA, by autocast, as these models are used; else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(name: str, weights: Path | None, device: torch.device) -> LoadedModel:
    """Build the model called `name`, with random weights of a fixed seed or those of a file.

    Raises:
        CommandError: The name is unknown, a package is missing (the message says how to install it), or the weights do
            not fit.
    """
    if name not in KINDS:
        raise CommandError(f"--model must be one of {', '.join(KINDS)}, got {name}")
    kind = KINDS[name]
    if weights is not None and not kind.trainable:
        raise CommandError(f"--weights does not go with --model {name}: no trained weights exist for it")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        try:
            module = kind.build()
        except ImportError as error:
            raise CommandError(
                f"--model {name} cannot be imported ({error}). Install it: {kind.requirement}"
            ) from error
    if weights is not None:
        with refusals():
            _load_weights(module, weights, kind.key_prefix)
    dtype = running_dtype(device)
    return LoadedModel(
        name=name,
        module=module.eval().to(device),
        kind=kind,
        weights=f"random, seed {SEED}" if weights is None else str(weights),
        warning=RANDOM_WEIGHTS if weights is None else None,
        autocast=None if dtype == torch.float32 else dtype,
    )


def _load_weights(module: nn.Module, path: Path, key_prefix: str) -> None:
    """Put a file's weights into the module: each of its tensors must be there, of its shape and kind, and no other.

    Raises:
        ValueError: The file cannot be read, holds something else, or does not fit the model.
        ImportError: safetensors is needed and not installed.
    """
    if not path.is_file():
        raise ValueError(f"--weights must be a file, but {path} is none")
    state = read_tensors(path)
    if all(name.startswith(key_prefix) for name in state):
        state = {name.removeprefix(key_prefix): tensor for name, tensor in state.items()}
    expected = module.state_dict()
    faults = {
        "are missing": [name for name in expected if name not in state],
        "have another shape": [
            name for name, tensor in state.items() if name in expected and tensor.shape != expected[name].shape
        ],
        "hold another kind of numbers": [
            f"{name} ({dtype_name(tensor.dtype)})"
            for name, tensor in state.items()
            if name in expected and not same_kind(tensor, expected[name].dtype)
        ],
        "are not the model's": [name for name in state if name not in expected],
    }
    if any(faults.values()):
        counts = ", ".join(f"{len(names)} {fault}" for fault, names in faults.items() if names)
        example = next(names[0] for names in faults.values() if names)
        raise ValueError(
            f"{path} does not fit the model: of its {len(state)} tensors and the model's {len(expected)}, {counts}, "
            f"for example {example}; give the weights of this very model, neither quantised nor part of a larger one"
        )
    module.load_state_dict(state)


def _build_da3_small() -> nn.Module:
    os.environ.setdefault("DA3_LOG_LEVEL", "WARN")  # its notes would mix with the report
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its dependencies warn it of is not for our users
        import depth_anything_3
        from depth_anything_3.cfg import create_object, load_config

        return create_object(load_config(str(Path(depth_anything_3.__path__[0]) / "configs" / "da3-small.yaml")))


def _build_vggt() -> nn.Module:
    from vggt.models.vggt import VGGT

    return VGGT()


def _build_pi3() -> nn.Module:
    from pi3.models.pi3 import Pi3

    return Pi3()


def _feed_batch(frames: Tensor) -> Tensor:
    return frames[None]


def _feed_da3(frames: Tensor) -> Tensor:
    mean, std = (frames.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((frames - mean) / std)[None]


def _batched(result: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: result[name][0] for name in names if name in result}


def _toy_outputs(result: Any) -> dict[str, Tensor]:
    return _batched(result, ("depth", "depth_conf", "pose_enc"))


def _da3_outputs(result: Any) -> dict[str, Tensor]:
    return _batched(result, ("depth", "depth_conf", "extrinsics", "intrinsics"))


def _vggt_outputs(result: Any) -> dict[str, Tensor]:
    outputs = _batched(result, ("depth", "depth_conf", "pose_enc", "world_points", "world_points_conf"))
    return outputs | {"depth": outputs["depth"][..., 0]}


def _pi3_outputs(result: Any) -> dict[str, Tensor]:
    outputs = _batched(result, ("local_points", "points", "conf", "camera_poses"))
    return {"depth": outputs["local_points"][..., 2]} | outputs


KINDS = {
    "toy": ModelKind(ToyMultiViewTransformer, "", 336, False, _feed_batch, _toy_outputs, cell=14),
    "da3-small": ModelKind(
        _build_da3_small,
        "pip install --no-deps depth-anything-3 && pip install einops omegaconf addict huggingface_hub safetensors",
        504,
        True,
        _feed_da3,
        _da3_outputs,
        key_prefix="model.",
    ),
    "vggt": ModelKind(
        _build_vggt,
        "pip install --no-deps git+https://github.com/facebookresearch/vggt && pip install einops huggingface_hub "
        "safetensors",
        518,
        True,
        _feed_batch,
        _vggt_outputs,
    ),
    "pi3": ModelKind(
        _build_pi3,
        "pip install --no-deps git+https://github.com/yyfz/Pi3 && pip install huggingface_hub safetensors",
        518,
        True,
        _feed_batch,
        _pi3_outputs,
    ),
}
