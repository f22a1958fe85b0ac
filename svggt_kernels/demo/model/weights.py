"""Weights in eight bits: a file of NumPy arrays that is read without pickle.

A matrix, or the kernel of a convolution, is stored as int8 with one scale for each of its rows (output channels), so
that the largest number of a row is 127 times its scale. Vectors are few and stored in float16. What is read is float32.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZES = "sizes"  # JSON, as bytes
QUANTISED, SCALES, PLAIN = "int8/", "scales/", "float16/"
LARGEST = 127


def write_weights(path: Path, state: Mapping[str, Tensor], sizes: Mapping[str, int | float]) -> None:
    """Write the weights of a model in eight bits.

    Args:
        path: File to write, *.npz; replaced if it is there.
        state: The model's `state_dict()`, floating point.
        sizes: Arguments of the model's constructor.

    Raises:
        ValueError: If a tensor is not floating point or holds a number that is not finite, or float16 cannot hold it.
    """
    arrays: dict[str, Any] = {SIZES: np.frombuffer(json.dumps(dict(sizes)).encode(), np.uint8)}
    for name, tensor in state.items():
        values = tensor.detach().cpu()
        if not values.is_floating_point() or not values.to(torch.float16).isfinite().all():
            raise ValueError(f"{name} must hold finite floating-point numbers in the range of float16")
        if values.dim() < 2:
            arrays[PLAIN + name] = values.to(torch.float16).numpy()
            continue
        quantised, scales = quantise(values)
        arrays[QUANTISED + name], arrays[SCALES + name] = quantised.numpy(), scales.numpy()
    with open(path, "wb") as file:  # np.savez would put .npz behind another name
        np.savez_compressed(file, **arrays)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """Return the float32 weights of a file that `write_weights` wrote, by name, and the model's sizes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another kind of file.
    """
    state = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            sizes = json.loads(arrays[SIZES].tobytes())
            for key in arrays.files:
                kind, _, name = key.partition("/")
                if kind + "/" == PLAIN:
                    state[name] = torch.from_numpy(arrays[key]).float()
                elif kind + "/" == QUANTISED:
                    state[name] = dequantise(torch.from_numpy(arrays[key]), torch.from_numpy(arrays[SCALES + name]))
    except (KeyError, ValueError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        raise ValueError(
            f"{path} does not hold weights in eight bits as write_weights writes them ({type(error).__name__}: {error})"
        ) from error
    return state, sizes


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values of the same shape and the float32 scale of each row, `[rows]`.

    Args:
        values: Floating point, two dimensions or more; rows are the first.
    """
    values = values.float()
    scales = values.flatten(1).abs().amax(1) / LARGEST
    steps = values.flatten(1) / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().to(torch.int8).view_as(values), scales


def dequantise(quantised: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values that int8 values and the scales of their rows stand for."""
    return (quantised.float().flatten(1) * scales[:, None]).view_as(quantised)
