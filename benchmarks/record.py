"""Result lines: what a line holds, where it came from, and how lines are written and shown."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from svggt_kernels.measure.machine import device_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Line = dict[str, Any]


def provenance(arguments: Sequence[str], device: torch.device, program: str = "benchmarks") -> Line:
    """Return what every line of a run says about the run: versions, commit, command, run and date.

    Args:
        arguments: The command-line arguments; the output file is left out of the command, it changes no number.
        device: Where the run measures.
        program: The module that is run.
    """
    now = datetime.now(timezone.utc).replace(microsecond=0)
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith("--output"):
            kept.append(argument)
        skip = argument == "--output"
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit(),
        "command": shlex.join(["python", "-m", program, *kept]),
        "run": f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
        "date": now.isoformat(),
    }


def commit() -> str:
    """Return the commit of this checkout, "-dirty" if files other than results differ from it, or "unknown".

    `SVGGT_COMMIT` overrides it, for a machine that receives a copy without the git directory.
    """
    if given := os.environ.get("SVGGT_COMMIT"):
        return given
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        dirty = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results", ":(exclude)evaluation/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if dirty else "")


def write(line: Line, file: Path) -> None:
    """Append one line of JSON to the file, whose folder is made if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, allow_nan=False) + "\n")


def read_lines(files: Sequence[Path], command: str) -> list[Line]:
    """Return the lines of all files.

    Args:
        files: Files of result lines.
        command: The command that writes such files, for the message where one is missing.

    Raises:
        ValueError: If a file is missing.
    """
    for file in files:
        if not file.exists():
            raise ValueError(
                f"{file} must be a file of result lines, and there is none; make it with `python -m benchmarks "
                f"{command} --output {file}`, or name another with --results"
            )
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def table(lines: Iterable[Line], columns: dict[str, str]) -> str:
    """Return a table for the terminal.

    Args:
        lines: The result lines.
        columns: Heading and format of each key to show, as `{"ms_median": "ms:.3f"}`.
    """
    keys = [(key, *column.split(":")) for key, column in columns.items()]
    rows = [[heading for _, heading, *_ in keys]]
    for line in lines:
        rows.append(["-" if line.get(key) is None else format(line[key], *spec) for key, _, *spec in keys])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ["<" if len(key) == 2 else ">" for key in keys]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)).rstrip()
        for row in rows
    )


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
