"""Models ready to run, with random weights or those of a file; what is downloaded was named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..io.hub import from_hub, is_repository
from ..io.tensor_files import mismatch, read_tensors
from . import RUNNABLE
from .base import RunnableModel

SEED = 0
RANDOM = "random"
HEAD_SIZE = 64  # of all models that can be built
RANDOM_WEIGHTS = "The weights are random: depth and cameras mean nothing; only dense against sparse can be compared."
ROOMS_WEIGHTS = "The weights are trained on rendered rooms: of photos depth and cameras mean little."


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        kind: How to feed and read it.
        module: The model, in eval mode, on its device.
        weights: Where the weights come from, in words.
        warning: What weights that never met photos mean for the outputs; None for weights from elsewhere.
        autocast: The dtype of autocast, or None for float32 throughout.
    """

    kind: RunnableModel
    module: nn.Module
    weights: str
    warning: str | None
    autocast: torch.dtype | None

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return self.kind.name

    def __call__(self, frames: Tensor) -> dict[str, Tensor]:
        """Run the model on frames `[S, 3, H, W]` and return its named outputs."""
        enabled = self.autocast is not None
        with torch.inference_mode(), torch.autocast(frames.device.type, dtype=self.autocast, enabled=enabled):
            return self.kind.outputs(self.module(self.kind.feed(frames)))


def running_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of attention there: bfloat16 on CUDA, by autocast, as these models are used; else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build(kind: RunnableModel, device: torch.device) -> nn.Module:
    """Build a model on the device, in eval mode, with the random weights of a fixed seed.

    The weights differ between kinds of devices. The global random state is left as it was.

    Raises:
        ImportError: If a package is missing; the message says how to install it.
    """
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type), device:
        torch.default_generator.manual_seed(SEED)
        if accelerators:
            torch.get_device_module(device).manual_seed(SEED)
        try:
            module = kind.build()
        except ImportError as error:
            raise ImportError(
                f"the model {kind.name} cannot be imported ({error}). Install it: {kind.requirement}"
            ) from error
    # A constructor may place tensors by itself.
    return module.eval().to(device)


def load_model(name: str, weights: str | Path | None, device: torch.device) -> LoadedModel:
    """Build the model called `name` with the weights of a file or of the hub, of the package, or random ones.

    Args:
        name: One of `RUNNABLE`.
        weights: A file; the name of a repository of the Hugging Face hub, whose `model.safetensors` is downloaded if it
            is not in the hub's cache; "random", which are the same on every device; None for those of the package, or
            random ones if it has none.
        device: Where the model runs.

    Raises:
        ValueError: If the name is unknown, or the weights cannot be read or do not fit.
        FileNotFoundError: If the weights cannot be had.
        ImportError: If a package is missing; the message says how to install it.
    """
    if name not in RUNNABLE:
        raise ValueError(f"the model must be one of {', '.join(RUNNABLE)}, got {name}")
    kind = RUNNABLE[name]
    path = None if weights is None or weights == RANDOM else _file_of(kind, str(weights))
    if kind.trained is not None and weights != RANDOM:
        module, source, warning = kind.trained(path), "trained, of the package", ROOMS_WEIGHTS
    else:
        module, source, warning = build(kind, torch.device("cpu")), f"random, seed {SEED}", RANDOM_WEIGHTS
        if path is not None:
            _load_weights(module, path, kind.key_prefix)
    dtype = running_dtype(device)
    return LoadedModel(
        kind=kind,
        module=module.to(device),
        weights=source if path is None else str(weights),
        warning=warning if path is None else None,
        autocast=None if dtype == torch.float32 else dtype,
    )


def _file_of(kind: RunnableModel, weights: str) -> Path:
    """Return the file of weights that a path or the name of a repository of the hub stands for."""
    path = Path(weights).expanduser()
    if path.exists() or not is_repository(weights) or kind.trained is not None:
        return path
    return from_hub(
        weights,
        "weights",
        install="pip install huggingface_hub",
        advice="download it where there is a network, and give the file",
    )


def _load_weights(module: nn.Module, path: Path, key_prefix: str) -> None:
    """Put a file's weights into the module: each of its tensors must be there, of its shape and kind, and no other.

    Raises:
        ValueError: The file cannot be read, holds something else, or does not fit the model.
        ImportError: safetensors is needed and not installed.
    """
    if not path.is_file():
        raise ValueError(f"the weights must be a file, but {path} is none")
    state = read_tensors(path)
    if all(name.startswith(key_prefix) for name in state):
        state = {name.removeprefix(key_prefix): tensor for name, tensor in state.items()}
    expected = module.state_dict()
    fault = mismatch(state, expected)
    if fault is not None:
        raise ValueError(
            f"{path} must hold the {len(expected)} tensors of the model and nothing else, but {fault}; give the "
            "weights of this very model, neither quantised nor part of a larger one"
        )
    module.load_state_dict(state)
