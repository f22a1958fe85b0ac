"""The report of whole models: a Markdown table and a figure, `python -m benchmarks model-report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .models import ModelCase
from .record import Line, read_lines

PANELS = (("seconds_full", "seconds, full forward"), ("peak_gib", "peak memory, GiB"))


def read(files: Sequence[Path]) -> list[Line]:
    """Return the latest measured line of each case and system, by frames.

    A process holds either upstream's code or FastVGGT's, so lines of several runs stand side by side here.

    Raises:
        ValueError: If a file is missing or the files hold no such line.
    """
    measured = [line for line in read_lines(files, "model") if line.get("measured")]
    measured.sort(key=lambda line: line["date"])
    latest = {(line["case"], series(line)): line for line in measured}
    if not latest:
        raise ValueError(f"there is no measured line of `model` in {[*map(str, files)]}")
    return sorted(latest.values(), key=lambda line: (ModelCase.parse(line["case"]).frames, -line["seconds_full"]))


def series(line: Line) -> str:
    """Return the system of a line, and whether its special tokens were masked; older lines say so in their command."""
    masked = line.get("special_tokens", "masked" if "--special-tokens masked" in line["command"] else None) == "masked"
    return line["system"] + (", masked" if masked else "")


def write(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Write `models.md` and `models.png` to the folder, made if it is missing, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, figure = folder / "models.md", folder / "models.png"
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
        shown = ("-" if line[key] is None else format(line[key], spec) for key, spec in numbers)
        rows.append(f"| {line['case']} | {series(line)} | {' | '.join(shown)} |")
    return "\n".join([*rows, ""])


def _plot(lines: Sequence[Line], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (key, heading) in zip(axes, PANELS, strict=True):
        for system in dict.fromkeys(map(series, lines)):
            points = [
                (ModelCase.parse(line["case"]).frames, line[key])
                for line in lines
                if series(line) == system and line[key] is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=system)
        axis.set(xlabel="frames", ylabel=heading, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(file, dpi=110)
