"""Options that several commands have, and what their help says of the package; imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .values import above_zero, natural, positive

MODELS = ("toy", "da3-small", "vggt", "pi3")
COVISIBILITY = ("core", "patches", "megaloc", "tokens", "thumbnails", "sequential", "all")
COMPARING = ("megaloc", "patches", "tokens", "thumbnails")
SEQUENTIAL_WINDOW = 10
NEIGHBOURS = 10
DEFAULT_GRAPH, CORE_SIZE = "core", 52
SWEPT_CORES = (16, 32, 52, 64)
DEMO_FRAMES = 192
FPS = 2.0
MCP_PORT = 8000
FORMATS = ("colmap", "colmap-text", "nerfstudio", "ply", "glb", "tum", "depth", "depth-npy")
WITH_POINTS = {"colmap", "colmap-text", "ply", "glb"}
EXPORTED = ("colmap", "nerfstudio", "ply", "glb", "tum", "depth")
MOST_POINTS, DOUBTED = 1_000_000, 30.0
LONG_SIDE, PATCH_SIZE, SPECIAL_TOKENS = 518, 14, 5
WEIGHTS = "its weights: a file, .safetensors or .pt, of toy .npz; or a repository of the Hugging Face hub, OWNER/NAME"


def add_photos(parser: argparse.ArgumentParser, *, videos: bool) -> None:
    """Add what names the pictures."""
    what = "a folder of photos, taken in the order of their names" + (", or a video" if videos else "")
    parser.add_argument("folder", type=Path, metavar="PHOTOS", help=what)
    parser.add_argument("--max-frames", type=positive, metavar="N", help="use the first N photos only")
    if videos:
        parser.add_argument(
            "--fps",
            type=above_zero,
            metavar="X",
            help=f"frames of each second of a video to look at; those that differ are taken (default: {FPS:g})",
        )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add what says which model runs, and how."""
    parser.add_argument("--model", choices=MODELS, required=True, help="the model to run")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help=f"{WEIGHTS} (default: random, but those of toy trained)",
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
        "--repeats",
        type=positive,
        default=3,
        metavar="N",
        help="timed runs of each kind, fewer if they take long; one alone does not tell how runs differ (default: 3)",
    )


def add_graph(parser: argparse.ArgumentParser) -> None:
    """Add what says which frames see each other."""
    parser.add_argument(
        "--graph",
        type=Path,
        metavar="FILE",
        help="who sees whom, read from a file: an .npz that layout or reconstruct wrote, hloc's pairs.txt, a COLMAP "
        "database or the folder of a model, or a transforms.json (with --depth-range)",
    )
    parser.add_argument(
        "--depth-range",
        type=above_zero,
        nargs=2,
        metavar=("NEAR", "FAR"),
        help="depth at which something may be seen, in the unit of the transforms.json",
    )
    parser.add_argument(
        "--covisibility",
        choices=COVISIBILITY,
        help="how to tell which frames see each other. core: all see a few frames that represent all, chosen by "
        "MegaLoc; patches: the same, chosen by patches of the model, without other weights; megaloc: similar images by "
        "MegaLoc; tokens: similar tokens of the model; thumbnails: similar when "
        "small, crude but without any weights; sequential: neighbours in the order of the names, for video; all: every "
        "frame sees every other (default: core)",
    )
    add_megaloc(parser)
    parser.add_argument(
        "--neighbours",
        type=natural,
        metavar="K",
        help=f"most similar frames that each frame sees (default: {NEIGHBOURS})",
    )
    parser.add_argument(
        "--core",
        type=positive,
        metavar="K",
        help="let each frame see itself and a core of K frames in place of neighbours: those that resemble most others "
        "by what --covisibility compares, with sequential those at equal distances; frames of the core see the core "
        f"alone (default with core and patches: {CORE_SIZE})",
    )
    parser.add_argument(
        "--window",
        type=natural,
        metavar="W",
        help=f"frames before and after that each frame sees, for ordered photos (default: 0; {SEQUENTIAL_WINDOW} with "
        "sequential)",
    )


def add_megaloc(parser: argparse.ArgumentParser) -> None:
    """Add where MegaLoc's weights are."""
    parser.add_argument(
        "--megaloc",
        type=Path,
        metavar="FILE",
        help="MegaLoc's weights (default: gberton/MegaLoc, from the cache of the Hugging Face hub or downloaded)",
    )


def add_device(parser: argparse.ArgumentParser, what: str = "") -> None:
    """Add where to run; `what` begins the help."""
    parser.add_argument("--device", help=f"{what}cpu, cuda, cuda:1, mps (default: the fastest that is here)")


def add_output(parser: argparse.ArgumentParser, default: str, files: Sequence[str]) -> None:
    """Add the folder for results, whose files are these, and whether they may replace earlier ones."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(default),
        metavar="DIR",
        help=f"folder for what it writes (default: {default})",
    )
    parser.add_argument("--force", action="store_true", help="replace what an earlier run wrote there")
    parser.set_defaults(files=tuple(files))


def add_truth(parser: argparse.ArgumentParser, default: str) -> None:
    """Add what is known of the photos."""
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="TRUTH",
        help=f"folder of a COLMAP model, a trajectory or a transforms.json (default: {default})",
    )
    parser.add_argument(
        "--depth", type=Path, metavar="DIR", help="true depth maps with the names of the photos, 16-bit .png or .npy"
    )
    parser.add_argument(
        "--depth-scale",
        type=above_zero,
        metavar="X",
        help="by what their numbers are multiplied to be in the unit of the truth (default: 0.001 for .png, which "
        "stands for millimetres, 1 for .npy)",
    )
