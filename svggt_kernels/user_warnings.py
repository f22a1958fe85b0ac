"""Warnings of the user's line, however far inside they come from."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["warn"]

PACKAGE = __name__.partition(".")[0]
BETWEEN = {PACKAGE, "torch", "contextlib"}
"""Packages whose lines lie between the user's and ours."""

CALLS_FORWARDS = "torch.nn.modules.module"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as `warnings.warn` does, of the line by which this package was entered from outside.

    Where it was entered from the forward of a module, as the patched part of a model is, it is the line that called the
    model.
    """
    inside = sys._getframe(1)
    line: FrameType | None = inside
    while line is not None:
        inside = line if _package(line) == PACKAGE else inside
        line = line.f_back
    frame = inside
    while (caller := frame.f_back) is not None and (
        _package(frame) in BETWEEN or caller.f_globals.get("__name__") == CALLS_FORWARDS
    ):
        frame = caller
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    name = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, name, registry)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
