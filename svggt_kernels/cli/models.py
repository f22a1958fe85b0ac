"""Models by their names on the command line; one that cannot be loaded is refused."""

from __future__ import annotations

import torch

from ..models import loading
from .errors import refusals


def load_model(name: str, weights: str | None, device: torch.device) -> loading.LoadedModel:
    """Build the model called `name`, with the weights that `models.loading.load_model` takes.

    Raises:
        CommandError: A package is missing (the message says how to install it), or the weights do not fit.
    """
    with refusals():
        return loading.load_model(name, weights, device)
