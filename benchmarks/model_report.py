"""The report of whole models: a Markdown table and a figure, `python -m benchmarks model-report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .models import ModelCase
from .record import Line, read_lines

PANELS = (("seconds_full", "seconds, full forward"), ("peak_gib", "peak memory, GiB"))


def read(files: Sequence[Path]) -> list[Line]:
    """Return the latest measured line of each case and system.

    A process holds either upstream's code or FastVGGT's, so lines of several runs stand side by side here.

    Raises:
        ValueError: If a file is missing or the files hold no such line.
    """
    measured = [line for line in read_lines(files, "model") if line.get("measured")]
    measured.sort(key=lambda line: line["date"])
    latest = {(line["case"], series(line)): line for line in measured}
    if not latest:
        raise ValueError(f"there is no measured line of `model` in {[*map(str, files)]}")
    return list(latest.values())


def series(line: Line) -> str:
    """Return the system of a line, whether its special tokens were masked, and the anchors of its graph.

    Older lines say in their command that special tokens were masked.
    """
    masked = line.get("special_tokens", "masked" if "--special-tokens masked" in line["command"] else None) == "masked"
    anchors = ModelCase.parse(line["case"]).anchors
    return line["system"] + (", masked" if masked else "") + (f", {anchors} anchors" if anchors else "")


def extrapolated(lines: Sequence[Line]) -> list[Line]:
    """Return a line for each system without a graph that was not measured at the most frames, but at three others.

    Seconds are those of `b S + c S^2`, fitted to the seconds of a frame; memory is not extrapolated.
    """
    largest = max(lines, key=lambda line: (_frames(line), -ModelCase.parse(line["case"]).anchors))
    added = []
    for system in dict.fromkeys(line["system"] for line in lines if line["backend"] is None):
        known = {_frames(line): line for line in lines if line["system"] == system}
        if len(known) >= 3 and _frames(largest) not in known:
            line = known[max(known)] | {"case": largest["case"], "measured": False, "peak_gib": None}
            frames = np.array(list(known))
            for key in ("seconds_aggregator", "seconds_full"):
                c, b = np.polyfit(frames, [each[key] / S for S, each in known.items()], 1)
                line[key] = float(b * _frames(largest) + c * _frames(largest) ** 2)
            added.append(line)
    return added


def _frames(line: Line) -> int:
    return ModelCase.parse(line["case"]).frames


def write(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Write `models.md` and `models.png` to the folder, made if it is missing, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, figure = folder / "models.md", folder / "models.png"
    lines = sorted([*lines, *extrapolated(lines)], key=lambda line: (_frames(line), -line["seconds_full"]))
    _plot(lines, figure)
    table.write_text(markdown(lines), encoding="utf-8")
    return [table, figure]


def markdown(lines: Sequence[Line]) -> str:
    """Return the lines as a Markdown table."""
    rows = ["| case | system | density | aggregator, s | full, s | peak, GiB |", "|---|---|---:|---:|---:|---:|"]
    for line in lines:
        numbers = (
            ("density", ".3f"), ("seconds_aggregator", ".2f"), ("seconds_full", ".2f"), ("peak_gib", ".1f"),
        )  # fmt: skip
        name = series(line) + ("" if line["measured"] else " (extrapolated)")
        shown = ("-" if line[key] is None else format(line[key], spec) for key, spec in numbers)
        rows.append(f"| {line['case']} | {name} | {' | '.join(shown)} |")
    return "\n".join([*rows, ""])


def _plot(lines: Sequence[Line], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (key, heading) in zip(axes, PANELS, strict=True):
        for system in dict.fromkeys(map(series, lines)):
            points = [
                (_frames(line), line[key], line["measured"])
                for line in lines
                if series(line) == system and line[key] is not None
            ]
            if points:
                *xy, measured = zip(*points, strict=True)
                [drawn] = axis.plot(*xy, linestyle=":", label=system)
                axis.scatter(
                    *xy, edgecolors=drawn.get_color(), c=[drawn.get_color() if m else "white" for m in measured]
                )
        axis.set(xlabel="frames", ylabel=heading, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.suptitle("filled: measured; white: extrapolated; dotted: nothing was measured between", fontsize="small")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(file, dpi=110)
