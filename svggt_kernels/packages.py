"""Other packages: which are installed, told without importing them, and the import of one that is optional."""

from __future__ import annotations

import functools
import importlib.metadata
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def installed(package: str) -> str:
    """Return the version of a package, or `not installed`; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def optional(module: str, purpose: str, package: str, install: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Its name, as in `import`.
        purpose: What it is needed for.
        package: The name of its package.
        install: What pip installs.

    Raises:
        ImportError: It is not installed; the message says what it is for and how to install it.
    """
    try:
        import_module(module.partition(".")[0])
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package}, which is not installed: pip install {install}") from error


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and runs on a CUDA device: on NVIDIA's since Ampere; on AMD's none was tried."""
    import torch

    if find_spec("triton") is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
