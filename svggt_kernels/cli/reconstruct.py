"""`reconstruct PHOTOS`: cameras, depth and points of a folder of photos or a video, in files that other tools open."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from ..measure.wording import count, percent
from ..reconstruction import PointChoice, Reconstruction, reconstruct
from ..reconstruction.diagnosis import diagnose
from ..reconstruction.formats import DEFAULT, FORMATS
from .arguments import DOUBTED, MOST_POINTS
from .compare import pick_backend
from .device import pick_device
from .errors import refusals
from .footage import Footage
from .options import source
from .text import stage

NAMED = 3


def run(arguments: argparse.Namespace) -> int:
    """Reconstruct, and say what was done and where it is; return the exit code."""
    footage = Footage.of(arguments)
    device = pick_device(arguments.device)
    pick_backend(arguments, device)
    covisibility = source(arguments, footage.files)
    points = PointChoice(
        max_points=arguments.max_points or MOST_POINTS,
        least_confident=(DOUBTED if arguments.least_confident is None else arguments.least_confident) / 100,
    )
    try:
        with refusals():
            scene = reconstruct(
                arguments.folder,
                arguments.model,
                weights=arguments.weights,
                output=arguments.output,
                formats=arguments.export,
                covisibility=covisibility,
                points=points,
                max_frames=arguments.max_frames,
                frames_per_second=footage.frames_per_second,
                long_side=arguments.long_side,
                device=device,
                backend=arguments.backend,
                memory_budget=arguments.memory_budget,
                chunk=arguments.chunk,
                force=arguments.force,
                stage=stage,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on, and does not do again what is finished") from None
    print(_as_text(scene, covisibility.label, arguments.output, arguments.export))
    return 0


def _as_text(scene: Reconstruction, sees: str, output: Path, asked: list[str] | None) -> str:
    facts, (width, height) = scene.facts, scene.frame_size
    formats = [FORMATS[name] for name in asked or DEFAULT]
    written = [form for form in formats if form.is_available]
    lines = [
        f"{facts['model']}, weights: {facts['weights']}; {count(len(scene.names), 'photo')} as frames of {width} x "
        f"{height} px on {facts['device']}: {facts['seconds']:.1f} s",
        f"Who sees whom: {sees}; {percent(facts['token_density'])} of the pairs of tokens; backend {facts['backend']}"
        + (f"; {facts['chunk']} photos at a time" if facts["chunk"] else ""),
        *(f"Note: {note}" for note in [*facts["warnings"], *diagnose(scene).notes]),
        _fitted(scene),
        "Cameras and depth are in the model's own unit; nothing says how many metres it is.",
        f"Written into {output}: " + ", ".join(f"{form.target} ({form.label})" for form in written),
        *(
            f"Not written: {form.target}, which needs {form.needs}: pip install {form.install}"
            for form in formats
            if not form.is_available
        ),
    ]
    lines.append(f"Look at it: svggt-kernels view {output}")
    return "\n".join([*lines, *([facts["warning"]] if facts["warning"] else [])])


def _fitted(scene: Reconstruction) -> str:
    """Say how photos became frames."""
    shapes = Counter(scene.sizes)
    sizes = [f"{width} x {height} px" for (width, height), _ in shapes.most_common(NAMED)]
    more = f" and {len(shapes) - NAMED} other sizes" if len(shapes) > NAMED else ""
    lost = [crop.lost(size) for crop, size in zip(scene.crops, scene.sizes, strict=True)]
    worst = max(range(len(lost)), key=lost.__getitem__)
    if lost[worst] < 1e-6:
        cut = "nothing was cut off"
    else:
        cut = f"at most {percent(lost[worst])} of a photo was cut off ({scene.names[worst]}), equally on both sides"
    return (
        f"Photos of {', '.join(sizes)}{more} were scaled to frames; {cut}. Cameras are those of the photos as they are."
    )
