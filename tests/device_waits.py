"""What a test does without waiting for the CUDA device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_device_waits() -> Iterator[None]:
    """Raise inside the context where the host would wait for the device."""
    with warnings.catch_warnings():
        # PyTorch says so of the mode itself, once a process.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
