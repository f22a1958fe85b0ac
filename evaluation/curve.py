"""`curve`: accuracy of named layouts on kinds of scenes; see `running`."""

from __future__ import annotations

import argparse

from svggt_kernels.demo.scenes import FAMILIES, HELD_OUT, PLANS

from .layouts import named
from .measuring import ROOMS, SceneSet
from .running import add_options, measure

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
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="NAME", help=f"default: {' '.join(LAYOUTS)}")
    parser.add_argument("--families", nargs="+", choices=tuned, metavar="FAMILY", help=f"of {', '.join(tuned)}")
    parser.add_argument(
        "--held-out", action="store_true", help=f"measure {HELD_OUT} (too): never while anything is chosen by it"
    )
    parser.add_argument("--rooms", type=int, nargs="+", choices=sorted(PLANS), metavar="N", help="rooms of a flat")
    parser.add_argument("--frames", type=int, nargs="+", default=[24], metavar="N", help="of a scene (default: 24)")
    add_options(parser)
    parser.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> int:
    """Measure what is not in the file yet; return the exit code."""
    layouts = list({layout.name: layout for layout in map(named, options.layouts)}.values())
    return measure(dict.fromkeys(scene_sets(options), layouts), options)


def scene_sets(options: argparse.Namespace) -> list[SceneSet]:
    """Return the kinds of scenes that are asked for.

    Raises:
        ValueError: If flats of the held-out family are asked for with another one, or the reverse.
    """
    families = list(options.families or ([] if options.held_out else ["walk"]))
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
