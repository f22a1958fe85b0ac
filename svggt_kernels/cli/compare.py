"""`compare DIR`: a model on a folder of photos, dense against sparse."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from .. import backends
from ..measure.compare import compare, run_sparse
from ..measure.pictures import require_matplotlib
from ..models.loading import HEAD_SIZE, LoadedModel, running_dtype
from .device import pick_device
from .errors import CommandError, refusals
from .footage import Footage
from .models import load_model
from .options import source
from .results import as_text, write_results
from .text import stage


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the result and write report and pictures; return the exit code."""
    with refusals():
        require_matplotlib()
    footage = Footage.of(arguments)
    device = pick_device(arguments.device)
    pick_backend(arguments, device)
    covisibility = source(arguments, footage.files)
    model, frames, names = load(arguments, footage, device)
    run_it = run_sparse if arguments.no_dense else compare
    with refusals():
        found, outputs = run_it(
            model,
            frames.to(device),
            covisibility,
            described=covisibility.label,
            backend=arguments.backend,
            repeats=arguments.repeats,
            stage=stage,
        )
    print(as_text(found))
    print(write_results(arguments.output, found, outputs, frames, names, command=arguments.command_line))
    return 0


def pick_backend(arguments: argparse.Namespace, device: torch.device) -> None:
    """Refuse a `--backend` that cannot run there before any work is done; put its full name into the arguments."""
    if arguments.backend is None:
        return
    with refusals():
        arguments.backend = backends.load(arguments.backend).NAME
    reason = backends.reasons(device, running_dtype(device), HEAD_SIZE)[arguments.backend]
    if reason is not None:
        raise CommandError(f"--backend {arguments.backend} cannot run here: {reason}; leave --backend out")


def load(
    arguments: argparse.Namespace, footage: Footage, device: torch.device
) -> tuple[LoadedModel, Tensor, list[str]]:
    """Return the model on the device, frames in its resolution, `[S, 3, H, W]` on the CPU, and what to call each."""
    model = load_model(arguments.model, arguments.weights, device)
    frames, names = footage.frames(arguments.long_side or model.kind.long_side, model.kind.patch_size)
    return model, frames, names
