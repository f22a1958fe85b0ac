"""The words of the command line: every command and its options.

Nothing here imports torch, so `--help` and what is wrong with the words themselves are answered at once. What the help
says of the package (models, backends, sizes) is therefore stated here too; a test compares the two.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..packages import installed
from .arguments import (
    COMPARING,
    CORE_SIZE,
    DEFAULT_GRAPH,
    DEMO_FRAMES,
    DOUBTED,
    EXPORTED,
    FORMATS,
    LONG_SIDE,
    MCP_PORT,
    MODELS,
    MOST_POINTS,
    NEIGHBOURS,
    PATCH_SIZE,
    SPECIAL_TOKENS,
    SWEPT_CORES,
    WEIGHTS,
    WITH_POINTS,
    add_device,
    add_graph,
    add_megaloc,
    add_output,
    add_photos,
    add_run,
    add_truth,
)
from .errors import CommandError
from .values import budget, natural, number, percentage, positive

BESIDE_A_GRAPH = "a graph of a file"

# The graphs that read an option; with others the option would have no effect.
READ_BY = {
    "--neighbours": ("megaloc", "tokens", "thumbnails"),
    "--window": ("megaloc", "tokens", "thumbnails", "sequential"),
    "--megaloc": ("core", "megaloc"),
    "--core": ("core", "patches", "megaloc", "tokens", "thumbnails", "sequential"),
}
READ_BY_IN_SWEEP = {"--megaloc": ("megaloc",)}
READ_BY_IN_LAYOUT = {
    **READ_BY,
    "--model": ("patches", "tokens"),
    "--weights": ("patches", "tokens"),
    "--device": ("core", "patches", "megaloc", "tokens"),
    "--patch-size": ("core", "megaloc", "thumbnails", "sequential", "all", BESIDE_A_GRAPH),
    "--special-tokens": ("core", "megaloc", "thumbnails", "sequential", "all", BESIDE_A_GRAPH),
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the words of a command and how to ask for its help; exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Refuse what was asked."""
        self.exit(2, f"{self.prog}: {message}; '{self.prog} --help' says more\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, unknown words refused by the command that they were given to rather than by the program."""
        arguments, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return arguments, unknown


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = Parser(
        prog="svggt-kernels",
        description="Attention for multi-view transformers in which a graph says which frame attends to which.",
        epilog="'svggt-kernels COMMAND --help' shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=installed("svggt-kernels"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        _add_info,
        _add_check,
        _add_layout,
        _add_reconstruct,
        _add_view,
        _add_mcp,
        _add_compare,
        _add_evaluate,
        _add_sweep,
        _add_demo,
    ):
        add(commands)
    return parser


def refuse_unread(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect on this command.

    Raises:
        CommandError: One was given; the message says what it is for.
    """
    readers: Mapping[str, Sequence[str]] = getattr(arguments, "read_by", {})
    given = {
        option: graphs
        for option, graphs in readers.items()
        if getattr(arguments, option.removeprefix("--").replace("-", "_")) is not None
    }
    if getattr(arguments, "graph", None) is not None:
        _refuse_beside_a_graph(arguments, given)
    elif getattr(arguments, "depth_range", None) is not None:
        raise CommandError("--depth-range belongs to the transforms.json of --graph; give --graph too, or leave it out")
    elif hasattr(arguments, "covisibility") and arguments.covisibility is None:
        arguments.covisibility = DEFAULT_GRAPH
    for option, graphs in given.items():
        if arguments.covisibility not in graphs:
            raise CommandError(
                f"{option} does not go with --covisibility {arguments.covisibility}; it is for --covisibility "
                f"{' or '.join(graphs)}"
            )
    if getattr(arguments, "truth_above", None) is not None and arguments.truth is None:
        raise CommandError("--truth-above is the least score of --truth; give --truth too, or leave it out")
    if arguments.command == "mcp" and arguments.port is not None and not arguments.http:
        raise CommandError("--port is that of --http; give --http too, or leave it out")
    if arguments.command == "sweep" and arguments.depth is not None and arguments.truth is None:
        raise CommandError("--depth belongs to --truth, the cameras of the same photos; give --truth too")
    if arguments.command == "reconstruct" and arguments.export is not None and not set(arguments.export) & WITH_POINTS:
        for option in ("max_points", "least_confident"):
            if getattr(arguments, option) is not None:
                raise CommandError(
                    f"--{option.replace('_', '-')} is for {', '.join(sorted(WITH_POINTS))}, and --export names none of "
                    "these; leave it out"
                )
    if getattr(arguments, "depth_scale", None) is not None and arguments.depth is None:
        raise CommandError("--depth-scale is the scale of the maps in --depth; give --depth too, or leave it out")


def _refuse_beside_a_graph(arguments: argparse.Namespace, given: Mapping[str, Sequence[str]]) -> None:
    """Refuse what says who sees whom besides `--graph`."""
    if arguments.covisibility is not None:
        raise CommandError("--graph and --covisibility both say what each frame sees; give one of them")
    for option, graphs in dict(given).items():
        if BESIDE_A_GRAPH not in graphs:
            raise CommandError(f"{option} does not go with --graph, which says what each frame sees; leave it out")
    arguments.covisibility = BESIDE_A_GRAPH


def _add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "info",
        help="show versions, devices and which backends can run here",
        description="Shows versions, devices and which backends can run on each device, or why not.",
    )
    parser.add_argument(
        "--head-size", type=positive, default=64, help="head size D to ask the backends about (default: 64)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_check(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "check",
        help="check the numbers of every backend on this machine, in a minute or two",
        description="Runs every backend that can run here, forward and backward, on a few small layouts, and compares "
        "with plain attention in float64. The error may be at most a small multiple of that of plain attention in the "
        "same dtype; the table says which. Exit code 0 if all is well, 1 if not.",
    )
    add_device(parser)


def _add_layout(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "layout",
        help="show who sees whom in a folder of photos or a video, and the speed-up to hope for",
        description="Makes the covisibility graph of a folder of photos, or of a video's frames, says how dense it is "
        "and what speed-up of global attention it allows at best, and draws it, with each frame's neighbours.",
    )
    add_photos(parser, videos=True)
    add_graph(parser)
    parser.add_argument(
        "--model", choices=MODELS, help="whose tokens --covisibility patches and tokens take (default: toy)"
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="weights of that model, as for compare; without them they are random, but those of toy trained",
    )
    add_device(parser, "where that model or MegaLoc runs: ")
    parser.add_argument(
        "--long-side",
        type=positive,
        metavar="PIXELS",
        help=f"longer side of a frame (default: {LONG_SIDE}; with tokens the model's)",
    )
    parser.add_argument(
        "--patch-size",
        type=positive,
        metavar="PIXELS",
        help=f"pixels of a token (default: {PATCH_SIZE}; the model's with tokens)",
    )
    parser.add_argument(
        "--special-tokens",
        type=natural,
        metavar="R",
        help=f"camera and register tokens per frame (default: {SPECIAL_TOKENS}; the model's with tokens)",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="CSV",
        help="pairs known to share a view, a line each: photo, photo, score; shows recall and precision",
    )
    parser.add_argument("--truth-above", type=number, metavar="X", help="score a pair must exceed (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and draw no pictures")
    add_output(parser, "layout-output", ["graph.npz", "pairs.txt", "graph.png", "neighbours.png", "report.json"])
    parser.set_defaults(read_by=READ_BY_IN_LAYOUT)


def _add_reconstruct(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "reconstruct",
        help="turn a folder of photos or a video into cameras, depth and points that other tools open",
        description="Runs a model once on a folder of photos, or on frames of a video, and writes cameras, depth and "
        "points: as a COLMAP model, transforms.json, PLY, GLB, a trajectory and depth maps. What is finished is kept: "
        "the same command again goes on where it was stopped.",
    )
    add_photos(parser, videos=True)
    add_graph(parser)
    parser.add_argument("--model", choices=MODELS, required=True, help="the model to run")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help=f"{WEIGHTS}; or random, whose results mean nothing (default: of toy those of the package; other models "
        "need this)",
    )
    parser.add_argument(
        "--long-side", type=positive, metavar="PIXELS", help="longer side of a frame (default: the model's)"
    )
    add_device(parser)
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="the backend that must run, of those that info lists (default: the best that can)",
    )
    parser.add_argument(
        "--memory-budget",
        type=budget,
        metavar="GIB",
        help="what one run may allocate on the GPU, or auto for what is free; for models of VGGT's shape (default: "
        "whatever it takes)",
    )
    parser.add_argument(
        "--chunk",
        type=positive,
        metavar="N",
        help="run so many photos at a time, after those of the core: memory of the device does not grow with photos, "
        "and chunks that are finished are kept; for graphs of a core (default: all in one forward)",
    )
    parser.add_argument(
        "--export",
        nargs="+",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"what to write: {', '.join(FORMATS)} (default: {', '.join(EXPORTED)}, as far as installed)",
    )
    parser.add_argument(
        "--max-points", type=positive, metavar="N", help=f"points at most (default: {MOST_POINTS}; COLMAP 50000)"
    )
    parser.add_argument(
        "--least-confident",
        type=percentage,
        metavar="PERCENT",
        help="share of the pixels, those that the model is least sure of, that become no points (default: "
        f"{DOUBTED:g})",
    )
    add_output(parser, "reconstruct-output", [])
    parser.set_defaults(read_by=READ_BY)


def _add_view(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "view",
        help="look at a reconstruction in a browser: points, cameras, who sees whom, and what is weak",
        description="Serves a page with the points and cameras of a folder that reconstruct has written. A click on a "
        "camera shows its photo, its depth and what it sees. Photos that see nothing, parts that share no view and "
        "weak bridges are said in words. Only this machine can open the page unless --host says otherwise.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that reconstruct has written")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine)")
    parser.add_argument(
        "--port", type=positive, default=8080, help="port to serve at, or the next that is free (default: 8080)"
    )


def _add_mcp(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "mcp",
        help="serve the same to agents: an MCP server over stdio, or over HTTP on this machine",
        description="Serves tools to agents by the Model Context Protocol: info, layout, reconstruct, compare, sweep, "
        "pictures of photos and depth, frames of a video. Only files below the folders that are named can be read and "
        "written; symbolic links and .. are resolved first.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders that may be read and written")
    parser.add_argument(
        "--http", action="store_true", help="serve streamable HTTP at http://127.0.0.1:PORT/mcp in place of stdio"
    )
    parser.add_argument("--port", type=positive, help=f"port of --http (default: {MCP_PORT})")


def _add_compare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare",
        help="run a model on a folder of photos, dense and sparse, and compare time, memory and outputs",
        description="Runs a model on a folder of photos, as it is and patched, and compares time, memory and every "
        "output. Writes a report and pictures. Without --weights the model's weights are random, but those of toy "
        "trained; only MegaLoc's are downloaded, where its graph is asked for.",
    )
    add_photos(parser, videos=True)
    add_graph(parser)
    add_run(parser)
    parser.add_argument(
        "--no-dense", action="store_true", help="run sparse alone, where dense takes too long or too much memory"
    )
    add_output(parser, "compare-output", ["comparison.png", "graph.png", "report.json"])
    parser.set_defaults(read_by=READ_BY)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="run a model on photos whose cameras are known, dense and sparse, and say how accurate each is",
        description="Runs a model on a folder of photos, as it is and patched, and compares the cameras of each with "
        "the true ones (pose AUC, ATE, RPE), and its depth where true depth is known (AbsRel). Writes a report. The "
        "truth may be a COLMAP model, a TUM or KITTI trajectory, nerfstudio's transforms.json, or that of a data set.",
    )
    add_photos(parser, videos=False)
    add_truth(parser, "where 7-Scenes, ETH3D, CO3D and HiRoom keep it for the photos in DIR")
    add_graph(parser)
    add_run(parser)
    add_output(parser, "evaluate-output", ["report.json"])
    parser.set_defaults(read_by=READ_BY)


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sweep",
        help="find out which layout keeps the accuracy of a model on a folder of photos, and what it costs",
        description="Runs a model on a folder of photos as it is, and with several layouts, and says what each costs "
        "and how far it is from dense, or with --truth from the truth, and which to take. Where memory runs out, all "
        "run again on the first half of the photos. Writes a report and a picture.",
    )
    add_photos(parser, videos=True)
    parser.add_argument(
        "--layouts",
        nargs="+",
        metavar="NAME",
        help="core-K, core-K-covering, core-K-evenly (a core of K frames far apart, resembling many, or at equal "
        f"distances) and nearest-K (the K most similar frames) (default: covering ones of "
        f"{', '.join(map(str, SWEPT_CORES))} as far as there are more photos, one evenly, and nearest-{NEIGHBOURS})",
    )
    add_truth(parser, "compare with dense")
    parser.add_argument(
        "--covisibility",
        choices=COMPARING,
        default="megaloc",
        help="what frames are compared by, to choose cores and neighbours: MegaLoc, patches of the model (for cores "
        "alone: neighbours then by its tokens), the mean of its tokens, or thumbnails (default: megaloc)",
    )
    add_megaloc(parser)
    add_run(parser)
    add_output(parser, "sweep-output", ["trade-offs.png", "report.json"])
    parser.set_defaults(read_by=READ_BY_IN_SWEEP)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="run a small trained model on a rendered walk, dense and sparse, against the truth; needs nothing else",
        description="Renders a walk through eight rooms, so that depth and cameras are known exactly, and runs the "
        "small trained model of the package on it: dense, with a core of frames that all see, and with the frames most "
        "like each. Needs no photos, no weights and no network.",
    )
    parser.add_argument(
        "--frames", type=positive, default=DEMO_FRAMES, metavar="S", help=f"frames of the walk (default: {DEMO_FRAMES})"
    )
    parser.add_argument(
        "--core", type=positive, default=CORE_SIZE, metavar="K", help=f"frames that all see (default: {CORE_SIZE})"
    )
    add_device(parser)
    add_output(parser, "demo-output", ["floor-plan.png", "depth.png", "report.json"])
