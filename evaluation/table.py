"""`table`: result lines as Markdown, means over scenes with their intervals, and differences from one layout, dense."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from svggt_kernels.measure.accuracy import Interval

from .groups import STUDY, lines_of
from .results import DENSE, ENOUGH_SCENES, METRICS, SHOWN, Section, read_results, sections


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "table",
        help="show result lines as Markdown",
        description="Prints a table for each kind of scene, and one of the differences from a layout.",
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what curve or study wrote")
    add_choice(parser)
    parser.add_argument(
        "--base", default=DENSE, metavar="NAME", help=f"what layouts are compared with (default: {DENSE})"
    )
    parser.add_argument("--ratio", action="store_true", help="ratios to it in place of differences from it")
    parser.add_argument("--median", action="store_true", help="medians over scenes in place of means")
    parser.set_defaults(run_command=run)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose metrics and lines."""
    parser.add_argument("--group", choices=STUDY, help="only what belongs to this group of the study")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=["all", *METRICS],
        default=SHOWN,
        metavar="NAME",
        help=f"all, or of {', '.join(METRICS)} (default: {' '.join(SHOWN)})",
    )


def chosen_metrics(options: argparse.Namespace) -> Sequence[str]:
    """Return the names of the metrics that are asked for."""
    return tuple(METRICS) if "all" in options.metrics else options.metrics


def run(options: argparse.Namespace) -> int:
    """Print the tables; return the exit code."""
    lines = lines_of(options.group, (line for file in options.results for line in read_results(file)))
    statistic = np.median if options.median else np.mean
    for section in sections(lines):
        print(markdown(section, chosen_metrics(options), statistic, options.ratio, options.base))
    return 0


def markdown(
    section: Section,
    metrics: Sequence[str],
    statistic: Callable[..., np.ndarray] = np.mean,
    ratio: bool = False,
    base: str = DENSE,
) -> str:
    """Return the tables of one kind of scene.

    Args:
        section: The lines.
        metrics: Names of what to show; what the scenes do not have is left out.
        statistic: Over scenes.
        ratio: Show ratios to the base, always of means, in place of differences from it.
        base: The layout that others are compared with.
    """
    names = section.names(metrics)
    labels = [METRICS[name].label for name in names]
    parts = [f"### {section.title}", _about(section, statistic)]
    rows = []
    for layout, lines in section.layouts.items():
        cells = [_cell(section.interval(layout, name, statistic), METRICS[name].digits) for name in names]
        pairs = section.interval(layout, "pairs").mean
        seconds = section.interval(layout, "seconds", np.median).mean
        rows.append([layout, f"{pairs:.3f}", *cells, f"{seconds:.3f}", str(len(lines))])
    parts.append(_table(["layout", "pairs", *labels, "seconds", "scenes"], rows))
    others = [layout for layout in section.layouts if layout != base]
    if others and base in section.layouts:
        enough = section.scenes >= ENOUGH_SCENES
        bold = f"; bold where the interval leaves {int(ratio)} out" * enough
        parts.append(f"{'Ratio to' if ratio else 'Difference from'} {base} on the same scenes{bold}:")
        rows = []
        for layout in others:
            compared = [
                section.ratio(layout, name, base) if ratio else section.difference(layout, name, statistic, base)
                for name in names
            ]
            digits = [2 if ratio else METRICS[name].digits for name in names]
            both = zip(compared, digits, strict=True)
            rows.append([layout, *(_compared(interval, places, ratio, enough) for interval, places in both)])
        parts.append(_table(["layout", *labels], rows))
    elif others:
        parts.append(f"{base} was not measured, so there are no differences from it.")
    return "\n\n".join(parts) + "\n"


def _about(section: Section, statistic: Callable[..., np.ndarray]) -> str:
    common = section.common
    lines = [line for layout in section.layouts.values() for line in layout.values()]
    commits = ", ".join(dict.fromkeys(str(line["commit"]) for line in lines))
    what = "Medians" if statistic is np.median else "Means"
    text = (
        f"{what} over scenes, 95 % intervals; pairs are means, seconds medians. Weights `{common['weights'][:12]}`, "
        f"{common['height']} x {common['width']} pixels, {common['device']}, {common['precision']}, commit {commits}."
    )
    if section.scenes < ENOUGH_SCENES:
        text += f" **Only {section.scenes} scenes: too few for a claim, which takes {ENOUGH_SCENES}.**"
    return text


def _compared(interval: Interval | None, digits: int, ratio: bool, enough: bool) -> str:
    if interval is None:
        return "-"
    text = _cell(interval, digits, sign="" if ratio else "+")
    return f"**{text}**" if enough and not interval.low <= int(ratio) <= interval.high else text


def _cell(interval: Interval, digits: int, sign: str = "") -> str:
    mean, low, high = (f"{number:{sign}.{digits}f}" for number in interval[:3])
    return f"{mean} [{low}, {high}]"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in heading[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, rule, *rows))
