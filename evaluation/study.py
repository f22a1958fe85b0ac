"""`study`: the study of which layout keeps accuracy, made again; its questions are in `groups`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .groups import LONGEST_DENSE, STUDY
from .layouts import Layout, named
from .measuring import SceneSet
from .running import add_options, measure

HELD_OUT_GROUP = "heldout"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    usual = [name for name in STUDY if name != HELD_OUT_GROUP]
    parser = commands.add_parser(
        "study",
        help="measure everything that the choice of a layout rests on",
        description="Measures groups of layouts, each of which answers a question, and appends a line of JSON for each "
        "scene and layout. Layouts are not run before they are measured, so seconds say little: `curve` measures them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["groups:", *(f"  {name:10}{group.question}" for name, group in STUDY.items())]),
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=STUDY,
        default=usual,
        metavar="NAME",
        help=f"see below (default: all but {HELD_OUT_GROUP}, which is measured once, at the end)",
    )
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help="of these alone")
    parser.add_argument("--frames", type=int, nargs="+", metavar="N", help="of scenes of so many frames alone")
    parser.add_argument(
        "--long-dense", action="store_true", help=f"measure dense attention over more than {LONGEST_DENSE} frames too"
    )
    add_options(parser)
    parser.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> int:
    """Measure what is not in the file yet; return the exit code, 1 if something could not be measured.

    Raises:
        ValueError: If nothing is left of the groups.
    """
    plan = {
        chosen: layouts
        for chosen, layouts in planned(options.groups, options.long_dense).items()
        if (not options.families or chosen.family in options.families)
        and (not options.frames or chosen.frames in options.frames)
    }
    if not plan:
        raise ValueError("these groups have no scenes of such families and frames; evaluation/groups.py has them")
    return measure(plan, options, warm_up=False, go_on=True)


def planned(groups: Sequence[str], long_dense: bool) -> dict[SceneSet, list[Layout]]:
    """Return the layouts of each kind of scenes, each once.

    Args:
        groups: Names of the groups.
        long_dense: Whether dense attention over many frames is among them.
    """
    names: dict[SceneSet, dict[str, None]] = {}
    for group in groups:
        for part in STUDY[group].parts:
            for chosen in part.kinds():
                names.setdefault(chosen, {}).update(dict.fromkeys(part.names(chosen.frames, long_dense)))
    return {chosen: [named(name) for name in of_kind] for chosen, of_kind in names.items()}
