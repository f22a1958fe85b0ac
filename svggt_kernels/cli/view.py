"""`view DIR`: a page with the points, the cameras and who sees whom of a reconstruction."""

from __future__ import annotations

import argparse
import sys

from ..reconstruction import Reconstruction
from ..reconstruction.scene import RUN
from ..reconstruction.view import Viewer
from .errors import CommandError, refusals

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted; return the exit code."""
    if not arguments.folder.is_dir():
        raise CommandError(f"DIR must be a folder that reconstruct has written, but {arguments.folder} is none")
    with refusals():
        viewer = Viewer(Reconstruction.load(arguments.folder / RUN), arguments.host, arguments.port)
    for note in viewer.diagnosis.notes:
        print(f"Note: {note}")
    if arguments.host not in LOOPBACK:
        print(f"  warning: everybody who reaches {arguments.host} can look at these photos", file=sys.stderr)
    print(f"Open {viewer.url} in a browser; Ctrl-C ends it.", flush=True)
    try:
        viewer.serve()
    finally:
        viewer.stop()
    return 0
