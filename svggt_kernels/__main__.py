"""Runs the command line: `python -m svggt_kernels`."""

import sys

from svggt_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
