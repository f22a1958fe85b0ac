"""Layouts measured on rendered scenes, one result line for each scene and layout: what `curve` and `study` do.

A scene is drawn from its own seed, so it does not depend on what else is measured, and layouts are compared on the
same scenes. Scenes are in the outermost loop: a run that is cut short has all layouts and all kinds of scenes. Lines
that are in the file already are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import provenance, write
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.model import TRAINED
from svggt_kernels.demo.scenes import SIZE, Draws
from svggt_kernels.measure.cost import timed

from .layouts import Known, Layout
from .measuring import DIFFICULTY, SceneSet, metrics_of, precision_on, predict
from .results import ENOUGH_SCENES, Line, identity, read_results

Plan = Mapping[SceneSet, Sequence[Layout]]
"""The layouts that are measured on each kind of scenes."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is measured where."""
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="lines go here; those in it stay")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of the model (default: those that are shipped)")
    parser.add_argument("--scenes", type=int, default=ENOUGH_SCENES, help=f"of each kind (default: {ENOUGH_SCENES})")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("HEIGHT", "WIDTH"), help="of images")
    parser.add_argument("--session", type=float, metavar="SECONDS", help="begin no further scene after so long")
    parser.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="measure the I-th of N parts of the scenes, I from 0: N processes may write to one file, and share a GPU",
    )


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"a part is like 0/2 or 1/2, got {text}")
    return int(match[1]), int(match[2])


def measure(plan: Plan, options: argparse.Namespace, *, warm_up: bool = True, go_on: bool = False) -> int:
    """Measure what is not in the file yet; return the exit code, 1 if something could not be measured.

    Args:
        plan: What is measured.
        options: Of the command line, those of `add_options` among them.
        warm_up: Whether each layout runs once before on CUDA, for each kind of scenes, so that seconds mean something.
        go_on: Whether a layout that raises an error is told, and the others are measured all the same.

    Raises:
        ValueError: If there shall be no scene, or one of fewer than 2 frames; without `go_on` also if a prediction is
            not finite.
    """
    if options.scenes < 1 or min((chosen.frames for chosen in plan), default=2) < 2:
        raise ValueError("a scene has 2 frames or more, and there must be a scene")
    started = time.monotonic()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    file = TRAINED if options.weights is None else options.weights
    model = RoomsModel.trained(file).to(device)
    common = {
        "seed": options.seed,
        "difficulty": DIFFICULTY,
        "height": options.size[0],
        "width": options.size[1],
        "weights": hashlib.sha256(file.read_bytes()).hexdigest(),
        "precision": precision_on(device),
        **provenance(options.arguments, device, "evaluation"),
    }
    if options.output.suffix == ".gz":
        raise ValueError(
            f"lines are added to a file as text, and {options.output} is packed; give another, or unpack it"
        )
    done = {identity(line) for line in read_results(options.output)} if options.output.exists() else set()
    measured, failed, measurer = 0, 0, Measurer(model, device, warm_up=warm_up)
    part, parts = options.part
    for scene in range(options.scenes):
        for number, (chosen, layouts) in enumerate(plan.items()):
            if (scene + number) % parts != part:
                continue
            here = {"family": chosen.family, "rooms": chosen.rooms, "frames": chosen.frames, "scene": scene, **common}
            missing = [layout for layout in layouts if identity({**here, "layout": layout.name}) not in done]
            if not missing:
                continue
            if options.session is not None and time.monotonic() - started > options.session:
                print(f"not done: {measured} measured, then the session ended; the same command continues")
                return 0
            known = measurer.draw(chosen, here)
            for layout in missing:
                try:
                    write(measurer.line(layout, known, here), options.output)
                    measured += 1
                except Exception as error:
                    if not go_on:
                        raise
                    failed += 1
                    print(f"not measured: {layout.name} on {chosen.name} scene {scene}: {error}", file=sys.stderr)
    print(f"{measured} measured, {len(done)} were there; `python -m evaluation table {options.output}` shows them")
    if failed:
        print(f"{failed} could not be measured", file=sys.stderr)
    return int(failed > 0)


def scene_seed(chosen: SceneSet, seed: int, scene: int) -> int:
    """Return the seed of a scene, 56 bits that training and validation would meet by chance alone."""
    return int.from_bytes(hashlib.sha256(f"{chosen.name} {seed} {scene}".encode()).digest()[:7], "big")


class Measurer:
    """Renders scenes and measures layouts on them.

    Args:
        model: A `RoomsModel` in eval mode.
        device: Where it is.
        warm_up: See `measure`.
    """

    def __init__(self, model: Any, device: torch.device, *, warm_up: bool = True) -> None:
        self.model, self.device, self.warm_up = model, device, warm_up and device.type == "cuda"
        self._warm: set[tuple[Any, ...]] = set()

    def draw(self, chosen: SceneSet, here: Line) -> Known:
        """Render one scene.

        Args:
            chosen: The kind of scene.
            here: What all lines of the scene have in common.
        """
        seed = scene_seed(chosen, here["seed"], here["scene"])
        return Known(chosen.draw(1, Draws(seed, self.device), (here["height"], here["width"])), seed)

    def line(self, layout: Layout, known: Known, here: Line) -> Line:
        """Return the result line of a layout on one scene.

        Args:
            layout: What to measure.
            known: The scene.
            here: What all lines of the scene have in common.

        Raises:
            ValueError: If a prediction is not finite.
        """
        scenes = known.scenes
        with layout.put_into(self.model, known) as counted:
            kind = (layout.name, *scenes.images.shape)
            if self.warm_up and kind not in self._warm:  # the first forward of a shape compiles kernels
                self._warm.add(kind)
                predict(self.model, scenes.images)
            prediction, milliseconds = timed(lambda: predict(self.model, scenes.images), self.device)
            what = counted()
        name = SceneSet(here["family"], here["rooms"], here["frames"]).name
        if not prediction.is_finite:
            raise ValueError(f"what the model predicts must be finite, and is not: {layout.name} on {name}")
        (metrics,) = metrics_of(prediction, scenes)
        shown = ", ".join(f"{metric} {metrics[metric]:.3f}" for metric in ("auc30", "absrel") if metric in metrics)
        share = what.pairs / what.dense_pairs
        print(f"{name} scene {here['scene']} {layout.name}: pairs {share:.3f}, {shown}", flush=True)
        seconds = {"seconds": milliseconds / 1000}
        return {"layout": layout.name, **here, **what._asdict(), **seconds, "metrics": metrics}
