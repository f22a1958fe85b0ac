"""`figure`: accuracy against counted pairs and against seconds, as a PNG."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svggt_kernels.measure.pictures import require_matplotlib

from .groups import lines_of
from .results import DENSE, ENOUGH_SCENES, METRICS, Section, read_results, section_key, sections
from .table import add_choice, chosen_metrics

DPI = 110
RADIUS = 3.0
"""Of a point, in pixels."""
PLACES = ((3, 3), (3, -3))
"""Where a label may stand beside its point, in points."""
AXES = {"pairs": "share of token pairs", "seconds": "seconds of a forward"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "figure",
        help="draw result lines",
        description="Draws each metric against counted pairs and against seconds, for each kind of scene.",
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what curve or study wrote")
    parser.add_argument("--output", type=Path, default=Path("curve.png"), help="the picture (default: curve.png)")
    parser.add_argument("--against", nargs="+", choices=AXES, default=list(AXES), help="a row for each (default: both)")
    add_choice(parser)
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="KIND",
        help="with --group, kinds of layouts of other groups on the same scenes, such as core-K-patches-covering",
    )
    parser.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> int:
    """Draw; return the exit code."""
    require_matplotlib()
    every = [line for file in options.results for line in read_results(file)]
    lines = list(lines_of(options.group, every))
    shown = {section_key(line) for line in lines}
    beside = [line for line in every if _kind(line["layout"]) in options.also and section_key(line) in shown]
    if missing := set(options.also) - {_kind(line["layout"]) for line in beside}:
        raise ValueError(f"--also must name kinds of layouts that these scenes have, got {', '.join(sorted(missing))}")
    draw(sections([*lines, *beside]), chosen_metrics(options), options.against, options.output)
    print(options.output)
    return 0


def draw(shown: Sequence[Section], metrics: Sequence[str], axes: Sequence[str], file: Path) -> None:
    """Draw a row of panels for each kind of scene and each of `axes`, of `AXES`: a panel for each metric.

    The grey band is dense with its 95 % interval over scenes. Bars are 95 % intervals of the difference from dense on
    the same scenes, which are narrower; of the mean itself where dense was not measured.
    """
    from matplotlib.figure import Figure

    rows = len(axes) * len(shown)
    figure = Figure(figsize=(3.4 * len(metrics), 0.4 + 3.0 * rows), layout="constrained", facecolor="white")
    kinds = list(dict.fromkeys(_kind(layout) for section in shown for layout in section.layouts if layout != DENSE))
    grid = figure.subplots(rows, len(metrics), squeeze=False)
    for number, section in enumerate(shown):
        names = section.names(metrics)
        for row, axis_name in enumerate(axes):
            for panel, name in zip(grid[len(axes) * number + row], metrics, strict=True):
                if name not in names:
                    panel.set_axis_off()
                    continue
                _draw_panel(panel, section, axis_name, name, kinds)
                panel.set(xlabel=AXES[axis_name], ylabel=METRICS[name].label)
                panel.set_xlim(0, 1.03 if axis_name == "pairs" else None)
        few = "" if section.scenes >= ENOUGH_SCENES else ": too few"
        grid[len(axes) * number, 0].set_title(
            f"{section.title} ({section.scenes} scenes{few})", loc="left", fontsize=10
        )
    handles: dict[str, Any] = {}
    for panel in grid.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize="small")
    figure.suptitle("bars: 95 % intervals of the difference from dense on the same scenes", fontsize=9)
    figure.set_dpi(DPI)
    figure.draw_without_rendering()  # panels are then where they will be
    for panel in grid.flat:
        _separate(panel.texts, [line.get_xydata() for line in panel.lines if line.get_marker() == "o"])
    figure.savefig(file, dpi=DPI)


def _draw_panel(panel: Any, section: Section, axis_name: str, name: str, kinds: Sequence[str]) -> None:
    labelled: set[tuple[str, float]] = set()
    for kind in kinds:
        layouts = [layout for layout in section.layouts if layout != DENSE and _kind(layout) == kind]
        if not layouts:
            continue
        x = [section.interval(layout, axis_name, np.median).mean for layout in layouts]
        y = np.array([section.interval(layout, name).mean for layout in layouts])
        spread = [section.difference(layout, name) or section.interval(layout, name) for layout in layouts]
        bars = np.array([(between.mean - between.low, between.high - between.mean) for between in spread]).T
        colour = f"C{kinds.index(kind) % 10}"
        order = np.argsort(x)
        panel.plot(np.array(x)[order], y[order], color=colour, linewidth=1, alpha=0.6)
        panel.errorbar(x, y, yerr=bars, fmt="o", color=colour, markersize=4, linewidth=1, label=kind)
        for layout, at, mean in zip(layouts, x, y, strict=True):
            number = re.search(r"\d+", layout)
            # Kinds of the same size stand above one another.
            if number and kind != layout and (number[0], round(at, 2)) not in labelled:
                labelled.add((number[0], round(at, 2)))
                panel.annotate(number[0], (at, mean), xytext=PLACES[0], textcoords="offset points", fontsize=7)
    if DENSE in section.layouts:
        mean, low, high, _ = section.interval(DENSE, name)
        panel.axhspan(low, high, color="0.85", zorder=0)
        panel.axhline(mean, color="0.4", linewidth=1, label="dense, and its interval")
        panel.plot(section.interval(DENSE, axis_name, np.median).mean, mean, "o", color="0.4", markersize=4)
    panel.grid(alpha=0.3)


def _separate(labels: Sequence[Any], points: Sequence[np.ndarray]) -> None:
    """Move labels that would cover a point or another label, from left to right; hide those that find no room."""
    if not labels:
        return
    from matplotlib.transforms import Bbox

    panel = labels[0].axes
    centres = panel.transData.transform(np.concatenate(points))
    taken = [Bbox.from_bounds(x - RADIUS, y - RADIUS, 2 * RADIUS, 2 * RADIUS) for x, y in centres]
    for label in sorted(labels, key=lambda one: one.xy[0]):
        for place in PLACES:
            label.set(position=place, verticalalignment="bottom" if place[1] > 0 else "top")
            box = label.get_window_extent()
            if not box.count_overlaps(taken):
                taken.append(box)
                break
        else:
            label.set_visible(False)


def _kind(layout: str) -> str:
    """Return the name of a layout without its size: `core-K` for `core-24`; layers of their own are a kind each."""
    return layout if layout.startswith("layers(") else re.sub(r"\d+", "K", layout, count=1)
