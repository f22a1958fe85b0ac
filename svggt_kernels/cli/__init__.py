"""The command line: `python -m svggt_kernels`, installed as `svggt-kernels`."""

from __future__ import annotations

import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from .errors import CommandError, enough_memory
from .files import require_folder
from .parser import build_parser, refuse_unread


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after the program's name; by default those it was started with.

    Returns:
        The exit code: 0 if all is well, 1 if a check failed, 2 if the request cannot be carried out (one line on stderr
        says why), 130 if interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name need not be text that stdout can encode.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = build_parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    arguments.command_line = shlex.join(["svggt-kernels", *words])
    try:
        refuse_unread(arguments)
        if hasattr(arguments, "output"):
            require_folder(arguments.output)
        # The import of a command is that of torch, which takes seconds.
        command = import_module(f".{arguments.command}", __name__)
        with warnings.catch_warnings(), enough_memory():
            warnings.showwarning = _say_warning
            code = command.run(arguments)
        sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"svggt-kernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output has left (`| head`); nothing more can be said to it.
        sys.stdout = open(os.devnull, "w")
        return 0
    except OSError as error:
        # Such as a full disk under stdout, which then takes no last words either.
        print(f"svggt-kernels {arguments.command}: {error}", file=sys.stderr)
        sys.stdout = open(os.devnull, "w")
        return 2
    except KeyboardInterrupt:
        print(f"svggt-kernels {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _say_warning(message: Warning | str, *where: object, **more: object) -> None:
    """Say a warning in a line; the place in the code that it comes from means nothing to a user."""
    print(f"  warning: {message}", file=sys.stderr)
