"""`curve`: accuracy of layouts on rendered scenes, one result line for each scene and layout.

A scene is drawn from its own seed, so it does not depend on what else is measured, and layouts are compared on the
same scenes. Scenes are in the outermost loop: a run that is cut short has all layouts and all kinds of scenes. Lines
that are in the file already are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import provenance, write
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.model import TRAINED
from svggt_kernels.demo.scenes import FAMILIES, HELD_OUT, PLANS, SIZE, Draws
from svggt_kernels.measure.cost import timed

from .layouts import Known, Layout, named
from .measuring import DIFFICULTY, ROOMS, SceneSet, metrics_of, precision_on, predict
from .results import ENOUGH_SCENES, Line, identity, read_results

HELD_OUT_ROOMS = (5, 7)
LAYOUTS = ("dense", "core-8", "core-12", "nearest-8", "random-8", "own")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "curve",
        help="measure layouts on rendered scenes",
        description="Measures layouts on rendered scenes and appends a line of JSON for each scene and layout.",
    )
    tuned = sorted(set(FAMILIES) - {HELD_OUT})
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="lines go here; those in it stay")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of the model (default: those that are shipped)")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="NAME", help=f"default: {' '.join(LAYOUTS)}")
    parser.add_argument("--families", nargs="+", choices=tuned, metavar="FAMILY", help=f"of {', '.join(tuned)}")
    parser.add_argument(
        "--held-out", action="store_true", help=f"measure {HELD_OUT} (too): never while anything is chosen by it"
    )
    parser.add_argument("--rooms", type=int, nargs="+", choices=sorted(PLANS), metavar="N", help="rooms of a flat")
    parser.add_argument("--frames", type=int, nargs="+", default=[24], metavar="N", help="of a scene (default: 24)")
    parser.add_argument("--scenes", type=int, default=ENOUGH_SCENES, help=f"of each kind (default: {ENOUGH_SCENES})")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("HEIGHT", "WIDTH"), help="of images")
    parser.add_argument("--session", type=float, metavar="SECONDS", help="begin no further scene after so long")
    parser.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> int:
    """Measure what is not in the file yet; return the exit code."""
    started = time.monotonic()
    sets, layouts = scene_sets(options), {layout.name: layout for layout in map(named, options.layouts)}
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
    done = {identity(line) for line in read_results(options.output)} if options.output.exists() else set()
    measured, measurer = 0, Measurer(model, device)
    for scene in range(options.scenes):
        for chosen in sets:
            here = {"family": chosen.family, "rooms": chosen.rooms, "frames": chosen.frames, "scene": scene, **common}
            missing = [layout for name, layout in layouts.items() if identity({**here, "layout": name}) not in done]
            if not missing:
                continue
            if options.session is not None and time.monotonic() - started > options.session:
                print(f"not done: {measured} measured, then the session ended; the same command continues")
                return 0
            for line in measurer.lines(chosen, here, missing):
                write(line, options.output)
                measured += 1
    print(f"{measured} measured, {len(done)} were there; `python -m evaluation table {options.output}` shows them")
    return 0


def scene_sets(options: argparse.Namespace) -> list[SceneSet]:
    """Return the kinds of scenes that are asked for.

    Raises:
        ValueError: If flats of the held-out family are asked for with another one, or the reverse; or a number is not
            positive.
    """
    families = list(options.families or ([] if options.held_out else ["walk"]))
    if min(*options.frames, options.scenes) < 1 or min(options.frames) < 2:
        raise ValueError("a scene has 2 frames or more, and there must be a scene")
    sets = []
    for family in dict.fromkeys([*families, HELD_OUT] if options.held_out else families):
        for rooms in options.rooms or [ROOMS[family]]:
            if (rooms in HELD_OUT_ROOMS) != (family == HELD_OUT):
                raise ValueError(
                    f"flats of {' and '.join(map(str, HELD_OUT_ROOMS))} rooms are those of the held-out family "
                    f"{HELD_OUT} and of no other, got {family} in {rooms} rooms; measure --held-out by itself"
                )
            sets += [SceneSet(family, rooms, frames) for frames in options.frames]
    return sets


def scene_seed(chosen: SceneSet, seed: int, scene: int) -> int:
    """Return the seed of a scene, 56 bits that training and validation would meet by chance alone."""
    return int.from_bytes(hashlib.sha256(f"{chosen.name} {seed} {scene}".encode()).digest()[:7], "big")


class Measurer:
    """Renders scenes and measures layouts on them.

    Args:
        model: A `RoomsModel` in eval mode.
        device: Where it is.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self._warm: set[tuple[Any, ...]] = set()

    def lines(self, chosen: SceneSet, here: Line, layouts: Sequence[Layout]) -> Iterator[Line]:
        """Yield a result line for each layout on one scene.

        Args:
            chosen: The kind of scene.
            here: What all lines of the scene have in common.
            layouts: What to measure.
        """
        seed = scene_seed(chosen, here["seed"], here["scene"])
        scenes = chosen.draw(1, Draws(seed, self.device), (here["height"], here["width"]))
        known = Known(scenes, seed)
        for layout in layouts:
            with layout.put_into(self.model, known) as counted:
                # The first forward of a shape compiles kernels.
                kind = (layout.name, *scenes.images.shape)
                if self.device.type == "cuda" and kind not in self._warm:
                    self._warm.add(kind)
                    predict(self.model, scenes.images)
                prediction, milliseconds = timed(lambda: predict(self.model, scenes.images), self.device)
                what = counted()
            if not prediction.is_finite:
                raise ValueError(f"what the model predicts must be finite, and is not: {layout.name} on {chosen.name}")
            (metrics,) = metrics_of(prediction, scenes)
            shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("auc30", "absrel") if name in metrics)
            share = what.pairs / what.dense_pairs
            print(f"{chosen.name} scene {here['scene']} {layout.name}: pairs {share:.3f}, {shown}", flush=True)
            seconds = {"seconds": milliseconds / 1000}
            yield {"layout": layout.name, **here, **what._asdict(), **seconds, "metrics": metrics}
