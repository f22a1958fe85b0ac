"""MegaLoc's published weights: where they are found, and whether they are what they must be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...io.hub import FILE, from_hub, is_repository
from ...io.tensor_files import mismatch, read_tensors

PUBLISHED = "gberton/MegaLoc"
INSTALL = "pip install 'svggt-kernels[megaloc]'"
OTHERWISE = (
    'or choose the core in another way: by the model\'s own tokens with patch(model, covisibility="patches") or '
    'open_scene(model, images, core=Core(by="patches")), at equal distances in their order with Core(by=None) (on the '
    "command line --covisibility patches, sequential --core 52); graphs come from poses, COLMAP or any list of pairs, "
    "too (docs/covisibility.md)"
)
ADVICE = (
    f"download https://huggingface.co/{PUBLISHED}/resolve/main/{FILE} where there is a network and give its path, "
    "MegaLoc.from_pretrained(path), patch(model, covisibility=Core(by=MegaLocSimilarity(weights=path))), "
    "open_scene(model, images, core=MegaLocSimilarity(weights=path)), on the command line "
    f"--megaloc FILE; {OTHERWISE}"
)


def read_weights(source: str | Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the parameters of MegaLoc in float32, and only those.

    The first release named the backbone's parameters `backbone.model.*` and held a mask token that nothing reads; both
    are understood.

    Args:
        source: See `MegaLoc.from_pretrained`.
        expected: The parameters that must be there, on any device.

    Raises:
        FileNotFoundError: If there is no such file here or on the hub.
        ValueError: If the file is damaged or holds something else.
        TypeError: If the source is neither a path nor a name.
        ImportError: If safetensors or huggingface_hub is needed and not installed.
    """
    path = find_weights(source)
    try:
        held = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; download {FILE} of {PUBLISHED} again") from error
    weights = {
        name.replace("backbone.model.", "backbone.", 1): tensor
        for name, tensor in held.items()
        if not name.endswith("mask_token")
    }
    fault = mismatch(weights, expected)
    if fault is not None:
        raise ValueError(
            f"{path} must hold the {len(expected)} parameters of MegaLoc and nothing else, but {fault}; give the "
            f"{FILE} of {PUBLISHED}"
        )
    return {name: weights[name].float() for name in expected}


def find_weights(source: str | Path) -> Path:
    """Return the path of the weights, downloaded if they are neither here nor in the hub's cache.

    Args:
        source: A file, a folder that holds `model.safetensors`, or the name of a repository of the hub.

    Raises:
        FileNotFoundError: If there is no such file here or on the hub.
        TypeError: If the source is neither a path nor a name.
        ImportError: If huggingface_hub is needed and not installed.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            "MegaLoc's weights must be given as a path or as the name of a repository of the Hugging Face hub, got "
            f"{type(source).__name__}"
        )
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / FILE).is_file():
            return path / FILE
        raise FileNotFoundError(f"{path} must hold MegaLoc's weights as {FILE}, and does not; {ADVICE}")
    name = str(source)
    if not is_repository(name):
        raise FileNotFoundError(f"MegaLoc's weights must be at {path}, but there is no such file; {ADVICE}")
    return from_hub(name, "MegaLoc's weights", install=INSTALL, advice=ADVICE, otherwise=OTHERWISE)
