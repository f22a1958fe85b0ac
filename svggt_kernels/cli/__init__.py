"""The command line: `python -m svggt_kernels`, installed as `svggt-kernels`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from . import check, compare, demo, info, layout
from .environment import installed
from .errors import CommandError

COMMANDS = (info, check, layout, compare, demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after the program's name; by default those it was started with.

    Returns:
        The exit code: 0 if all is well, 1 if a check failed, 2 if the request cannot be carried out (one line on stderr
        says why), 130 if interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = build_parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    arguments.command_line = shlex.join(["svggt-kernels", *words])
    try:
        return arguments.run(arguments)
    except CommandError as error:
        print(f"svggt-kernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output has left (`| head`); nothing more can be said to it.
        sys.stdout = open(os.devnull, "w")
        return 0
    except KeyboardInterrupt:
        print(f"svggt-kernels {arguments.command}: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="svggt-kernels",
        description="Attention for multi-view transformers in which only frames that can see each other attend to each "
        "other.",
        epilog="'svggt-kernels COMMAND --help' shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=installed("svggt-kernels"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
