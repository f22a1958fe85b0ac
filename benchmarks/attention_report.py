"""The report of a run: one Markdown table of its lines and one figure, `python -m benchmarks report`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import Case
from .record import Line, read_lines

COLUMNS = {
    "case": "case",
    "direction": "direction",
    "backend": "backend",
    "density": "density:.4f",
    "edges": "edges:d",
    "ms_median": "ms:.3f",
    "useful_tflops": "useful TFLOP/s:.1f",
    "fraction_of_ideal": "of ideal:.3f",
    "ms_per_edge": "ms/edge:.5f",
    "extra_mib": "extra MiB:.1f",
    "check": "check",
}

PANELS = (
    ("density", "useful_tflops", "useful TFLOP/s"),
    ("edges", "ms_median", "time, ms"),
    ("edges", "extra_mib", "extra memory, MiB"),
)
"""What lies on the two axes of each panel of the figure, and the heading of the second."""


def read(files: Sequence[Path], run: str | None = None) -> list[Line]:
    """Return the lines of `attention` of one run, by default the latest in the files.

    Raises:
        ValueError: If a file is missing or the files hold no such line.
    """
    lines = [line for line in read_lines(files, "attention") if "useful_tflops" in line]
    if run is None and lines:
        run = max(lines, key=lambda line: line["date"])["run"]
    lines = [line for line in lines if line["run"] == run]
    if not lines:
        raise ValueError(f"there is no line of `attention` {f'of run {run} ' if run else ''}in {[*map(str, files)]}")
    return lines


def write(lines: Sequence[Line], folder: Path, direction: str = "fwd") -> list[Path]:
    """Write `report.md` and `report.png` to the folder and return their paths.

    Args:
        lines: Lines of `attention` of one run.
        folder: Made if it is missing.
        direction: What the figure shows; the table shows all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, figure = folder / "report.md", folder / "report.png"
    _plot(lines, direction, figure)
    table.write_text(markdown(lines, figure.name), encoding="utf-8")
    return [table, figure]


def markdown(lines: Sequence[Line], figure: str) -> str:
    """Return the report of the lines as Markdown that shows the file `figure`."""
    first = lines[0]
    keys = [(key, *column.split(":")) for key, column in COLUMNS.items()]
    rows = [[heading for _, heading, *_ in keys], ["---" if len(key) == 2 else "---:" for key in keys]]
    for line in lines:
        shown = line | {"backend": name(line)}
        rows.append(["-" if shown.get(key) is None else format(shown[key], *spec) for key, _, *spec in keys])
    failed = [
        f"- {name(line)} on {line['case']}, {line['direction']}: {line['reason']}"
        for line in lines
        if line.get("reason")
    ]
    return "\n".join(
        [
            f"# Run {first['run']}",
            "",
            f"{first['device']}, {first['dtype']}, torch {first['torch']}, triton {first['triton']}, commit "
            f"{first['commit']}, {first['date']}.",
            "",
            f"    {first['command']}",
            "",
            f"![useful TFLOP/s against density; time and extra memory against edges]({figure})",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            *(["", "Checked, found wrong and therefore not timed:", "", *failed] if failed else []),
            "",
        ]
    )


def name(line: Line) -> str:
    """Return the backend of a line, with its softmax and gradients where it has several, and whether q was in log2."""
    names = [line[key] for key in ("backend", "softmax", "gradients") if line.get(key)]
    return ", ".join([*names, "log2"] if Case.parse(line["case"]).log2 else names)


def problem(lines: Sequence[Line]) -> tuple[Any, ...]:
    """Return what most lines have in common: tokens and special tokens of a frame, head size, heads, batch, log2."""
    return Counter(map(_problem, lines)).most_common(1)[0][0]


def _problem(line: Line) -> tuple[Any, ...]:
    case = Case.parse(line["case"])
    return case.tokens, case.special, case.head_size, case.heads, case.batch, case.log2


def _plot(lines: Sequence[Line], direction: str, file: Path) -> None:
    from matplotlib.figure import Figure

    lines = [line for line in lines if line["direction"] == direction and line["ms_median"] is not None]
    figure = Figure(figsize=(16, 5), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    shown = sorted({name(line) for line in lines})
    for axis, (x, y, heading) in zip(axes, PANELS, strict=True):
        # Edges of frames of different sizes cannot be compared.
        comparable = lines if x == "density" else [line for line in lines if _problem(line) == problem(lines)]
        for index, which in enumerate(shown):
            points = [(line.get(x), line.get(y)) for line in comparable if name(line) == which]
            points = sorted(point for point in points if None not in point)
            if points:
                style = {"color": f"C{index % 10}", "marker": "osv^D"[index // 10 % 5], "linewidth": 1}
                axis.plot(*zip(*points, strict=True), label=which, **style)
        axis.set(xlabel=x, ylabel=heading, xscale="log", yscale="linear" if y == "useful_tflops" else "log")
        axis.grid(alpha=0.3)
        if x == "edges" and comparable:
            axis.set_title(
                "{} tokens a frame, {} special, {} x {}".format(*problem(lines)[:2], *problem(lines)[3:1:-1])
            )
    axes[0].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize="small")
    figure.suptitle(f"{direction}, run {lines[0]['run'] if lines else '-'}")
    figure.savefig(file, dpi=120)
