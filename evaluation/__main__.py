"""The command line: `python -m evaluation train`, `curve`, `study`, `table` and `figure`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import curve, figure, study, table, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 for a wrong request."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m evaluation", description="Accuracy on rendered flats.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (train, curve, study, table, figure):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    options.arguments = arguments
    try:
        code = options.run_command(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has left (`| head`)
        sys.stdout = open(os.devnull, "w")
        return 0
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
