"""The command line: `python -m svggt_kernels`, installed as `svggt-kernels`."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from .errors import CommandError, enough_memory, sentence
from .files import require_folder
from .parser import build_parser, refuse_unread

INTERRUPTED = 130  # the exit code of what Ctrl-C ended


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
            require_folder(arguments.output, () if arguments.force else arguments.files)
        # The import of a command is that of torch, which takes seconds.
        with _ended_by_an_interrupt(arguments.command):
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
        print(f"svggt-kernels {arguments.command}: {sentence(error)}", file=sys.stderr)
        sys.stdout = open(os.devnull, "w")
        return 2
    except KeyboardInterrupt as interrupt:
        advice = f"; {interrupt}" if interrupt.args else ""
        print(f"{_interrupted(arguments.command)}{advice}", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _ended_by_an_interrupt(command: str) -> Iterator[None]:
    """End the process at once at Ctrl-C, with one line: NumPy's and torch's imports lose a KeyboardInterrupt.

    What else handles or ignores the signal stays as it is.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{_interrupted(command)}\n".encode())
        os._exit(INTERRUPTED)

    if (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(command: str) -> str:
    return f"svggt-kernels {command}: interrupted"


def _say_warning(message: Warning | str, *where: object, **more: object) -> None:
    """Say a warning in a line; the place in the code that it comes from means nothing to a user."""
    print(f"  warning: {message}", file=sys.stderr)
