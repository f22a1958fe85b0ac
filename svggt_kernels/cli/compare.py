"""`compare DIR`: a model on a folder of photos, dense against sparse."""

from __future__ import annotations

import argparse

from .. import backends
from ..io.photos import find_photos, load_photos
from ..measure.compare import compare
from ..measure.pictures import require_matplotlib
from ..measure.wording import count
from ..models.loading import HEAD_SIZE, running_dtype
from .device import pick_device
from .errors import CommandError, refusals
from .models import load_model
from .options import source
from .results import as_text, write_results
from .text import stage


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the result and write report and pictures; return the exit code."""
    with refusals():
        require_matplotlib()
        photos = find_photos(arguments.folder)[: arguments.max_frames]
    device = pick_device(arguments.device)
    if arguments.backend is not None:
        with refusals():
            arguments.backend = backends.load(arguments.backend).NAME
        reason = backends.reasons(device, running_dtype(device), HEAD_SIZE)[arguments.backend]
        if reason is not None:
            raise CommandError(f"--backend {arguments.backend} cannot run here: {reason}; leave --backend out")
    covisibility = source(arguments)
    model = load_model(arguments.model, arguments.weights, device)
    with refusals(), stage(f"reading {count(len(photos), 'photo')}"):
        frames = load_photos(
            photos, long_side=arguments.long_side or model.kind.long_side, patch_size=model.kind.patch_size
        )
    with refusals():
        comparison, outputs = compare(
            model,
            frames.to(device),
            covisibility,
            described=covisibility.label,
            backend=arguments.backend,
            repeats=arguments.repeats,
            stage=stage,
        )
    print(as_text(comparison))
    names = [photo.name for photo in photos]
    print(write_results(arguments.output, comparison, outputs, frames, names, command=arguments.command_line))
    return 0
