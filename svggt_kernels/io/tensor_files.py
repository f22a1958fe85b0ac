"""Files of named tensors: what a model's weights come in, and what is kept of outputs."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..packages import optional

PICKLES = frozenset({".torch", ".pth", ".pt", ".bin", ".ckpt"})
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file that `torch.save` wrote (told by its content, or a suffix such as .pt) or a .safetensors file.

    It runs no code from it.

    Returns:
        The tensors by name, on the CPU, as they are in the file.

    Raises:
        ValueError: The file is damaged, or holds something else than named tensors.
        ImportError: safetensors is needed and not installed.
    """
    try:
        if path.suffix.lower() in PICKLES or zipfile.is_zipfile(path):
            held = torch.load(path, map_location="cpu", weights_only=True)
        else:
            held = optional("safetensors.torch", f"reading {path}", "safetensors", "safetensors").load_file(path)
    except ImportError:
        raise
    except Exception as error:  # both readers raise whatever the bytes lead them to
        raise ValueError(
            f"{path} cannot be read as weights ({type(error).__name__}): it must be a .safetensors or .pt file, and is "
            "damaged or something else"
        ) from error
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} must hold a mapping from names to tensors, got {type(held).__name__}")
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} must hold a mapping from names to tensors, but {name!r} stands for {type(tensor).__name__}; "
                "save the state_dict() of the model alone"
            )
    return dict(held)


def mismatch(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Say how named tensors differ from those expected in names, shapes or kind of number; None if they do not."""
    shared = [name for name in expected if name in tensors]
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "not known": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} (must be {list(expected[name].shape)})"
            for name in shared
            if tensors[name].shape != expected[name].shape
        ],
        "of another kind of number": [
            f"{name} ({tensors[name].dtype})" for name in shared if not _same_kind(tensors[name], expected[name].dtype)
        ],
    }
    return "; ".join(f"{fault}: {_first_three(names)}" for fault, names in faults.items() if names) or None


def _first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _same_kind(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the numbers of a tensor still mean the same in another dtype: quantised or complex ones do not."""
    return tensor.layout == torch.strided and (
        tensor.dtype == dtype or (tensor.dtype in FLOATING and dtype in FLOATING)
    )


def write_arrays(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as a NumPy file (.npz), bfloat16 as float32; the file is whole or not there.

    Raises:
        OSError: If it cannot be written.
    """
    arrays: dict[str, Any] = {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
        for name, tensor in tensors.items()
    }
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:  # np.savez would put .npz behind another name
            np.savez(file, **arrays)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read named tensors, or those of some names that it holds, from a file that `write_arrays` wrote.

    Raises:
        ValueError: If it is damaged or another kind of file.
    """
    try:
        # NumPy leaves a file open that it opens itself, where that is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            wanted = arrays.files if names is None else [name for name in names if name in arrays.files]
            return {name: torch.from_numpy(arrays[name]) for name in wanted}
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as named arrays ({type(error).__name__}): it must be an .npz file, and is damaged "
            "or something else; delete or replace it"
        ) from error
