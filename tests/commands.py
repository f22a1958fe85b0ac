"""What the parser says of a command."""

from __future__ import annotations

from svggt_kernels.cli.parser import build_parser

REQUIRED = {
    "layout": ["photos"],
    "compare": ["photos", "--model", "toy"],
    "evaluate": ["photos", "--model", "toy"],
    "sweep": ["photos", "--model", "toy"],
    "reconstruct": ["photos", "--model", "toy"],
    "view": ["folder"],
    "mcp": ["folder"],
}


def files_of(command: str) -> tuple[str, ...]:
    """The files that a command writes, which are not replaced without --force."""
    arguments = build_parser().parse_args([command, *REQUIRED.get(command, [])])
    return getattr(arguments, "files", ())
