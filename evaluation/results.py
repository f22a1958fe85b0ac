"""Result lines of the curve: what they hold, which belong together, and their means over scenes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from svggt_kernels.measure.accuracy import Interval, mean_interval, ratio_interval

Line = dict[str, Any]
SceneKey = tuple[int, int]
"""Seed and number of a scene."""

DENSE = "dense"
ENOUGH_SCENES = 20
"""Fewer scenes are too few to claim anything."""

IDENTITY = (
    *("family", "rooms", "frames", "scene", "layout", "seed", "difficulty", "height", "width", "weights", "device"),
)
"""What tells a measurement from every other one: where all are equal, it need not be made again."""

SECTION = ("family", "rooms", "frames", "difficulty", "height", "width", "weights", "device", "precision")
"""What lines of one table have in common."""


class Metric(NamedTuple):
    """How a metric is shown.

    Attributes:
        label: What tables and figures call it.
        digits: Behind the point.
        larger_is_better: Otherwise smaller is.
    """

    label: str
    digits: int
    larger_is_better: bool = False


METRICS = {
    "auc3": Metric("AUC@3", 3, True),
    "auc5": Metric("AUC@5", 3, True),
    "auc15": Metric("AUC@15", 3, True),
    "auc30": Metric("AUC@30", 3, True),
    "rotation_auc30": Metric("rotation AUC@30", 3, True),
    "rotation_median": Metric("rotation median, °", 2),
    "translation_median": Metric("translation median, °", 2),
    "ate": Metric("ATE, m", 3),
    "rpe_translation": Metric("RPE, m", 3),
    "rpe_rotation": Metric("RPE, °", 2),
    "absrel": Metric("AbsRel", 3),
    "delta125": Metric("δ < 1.25", 3, True),
    "accuracy": Metric("accuracy, m", 3),
    "accuracy_median": Metric("accuracy median, m", 3),
    "completeness": Metric("completeness, m", 3),
    "completeness_median": Metric("completeness median, m", 3),
    "depth_scale": Metric("scale of depth", 3),
    "camera_scale": Metric("scale of cameras", 3),
    "scale_ratio": Metric("scale of depth / scale of cameras", 3),
}
"""The metrics of a line; docs/accuracy.md defines them."""

SHOWN = ("auc3", "auc5", "auc30", "ate", "absrel")
"""What is shown where nobody chooses."""


def read_results(file: Path) -> list[Line]:
    """Return the lines of a file that `curve` wrote; one whose name ends in .gz is unpacked.

    Raises:
        ValueError: If there is no such file, or a line is something else.
    """
    if not file.is_file():
        raise ValueError(f"{file} must be a file of result lines, and there is none; `curve --output {file}` makes it")
    lines = []
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    for number, text in enumerate(content.decode().splitlines(), start=1):
        try:
            line = json.loads(text)
            missing = [key for key in (*IDENTITY, *SECTION, "pairs", "dense_pairs", "metrics") if key not in line]
        except (json.JSONDecodeError, TypeError):
            missing = ["everything"]
        if missing:
            raise ValueError(
                f"line {number} of {file} must be a result line of `curve`, but lacks {', '.join(missing)}; remove the "
                "line: `curve` measures again what is missing"
            )
        lines.append(line)
    return lines


def identity(line: Line) -> tuple[Any, ...]:
    """Return what tells this measurement from others."""
    return tuple(line[key] for key in IDENTITY)


@dataclass
class Section:
    """The lines of scenes of one kind, by one model on one device.

    Attributes:
        common: What all lines have in common, see `SECTION`.
        layouts: Lines by layout and scene; layouts of many pairs first.
    """

    common: Line
    layouts: dict[str, dict[SceneKey, Line]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The kind of scenes."""
        rooms = f"{self.common['rooms']} room{'s' * (self.common['rooms'] != 1)}"
        return f"{self.common['family']}, {rooms}, {self.common['frames']} frames"

    @property
    def scenes(self) -> int:
        """How many scenes each layout was measured on, at least."""
        return min(len(lines) for lines in self.layouts.values())

    def names(self, metrics: Sequence[str]) -> list[str]:
        """Return those of the metrics that all lines have: where no camera moves there are fewer."""
        lines = [line for layout in self.layouts.values() for line in layout.values()]
        return [name for name in metrics if all(name in line["metrics"] for line in lines)]

    def interval(self, layout: str, name: str, statistic: Callable[..., np.ndarray] = np.mean) -> Interval:
        """Return the mean of a value over the scenes of a layout; `name` is a metric's, "pairs" or "seconds"."""
        return mean_interval([value(line, name) for line in self.layouts[layout].values()], statistic=statistic)

    def difference(
        self, layout: str, name: str, statistic: Callable[..., np.ndarray] = np.mean, base: str = DENSE
    ) -> Interval | None:
        """Return the mean of the differences from another layout, scene by scene; None if they share no scene."""
        pairs = self._paired(layout, name, base)
        return mean_interval([one - other for one, other in pairs], statistic=statistic) if pairs else None

    def ratio(self, layout: str, name: str, base: str = DENSE) -> Interval | None:
        """Return the mean over that of another layout on the same scenes; None if there is none, or its mean is 0."""
        pairs = self._paired(layout, name, base)
        ours, theirs = [one for one, _ in pairs], [other for _, other in pairs]
        return ratio_interval(ours, theirs) if sum(theirs) > 0 else None

    def _paired(self, layout: str, name: str, base: str) -> list[tuple[float, float]]:
        these, those = self.layouts[layout], self.layouts.get(base, {})
        return [(value(line, name), value(those[scene], name)) for scene, line in these.items() if scene in those]


def value(line: Line, name: str) -> float:
    """Return a metric of a line, "pairs" (as a share of all) or "seconds"."""
    if name == "pairs":
        return line["pairs"] / line["dense_pairs"]
    return line["seconds"] if name == "seconds" else line["metrics"][name]


def section_key(line: Line) -> tuple[Any, ...]:
    """Return what tells the section of a line from others."""
    return tuple(line[key] for key in SECTION)


def sections(lines: Iterable[Line]) -> list[Section]:
    """Return the lines by kind of scene, model and device, in the order in which they first come."""
    found: dict[tuple[Any, ...], Section] = {}
    for line in lines:
        key = section_key(line)
        section = found.setdefault(key, Section(dict(zip(SECTION, key, strict=True))))
        section.layouts.setdefault(line["layout"], {})[line["seed"], line["scene"]] = line
    for section in found.values():
        density = {layout: section.interval(layout, "pairs").mean for layout in section.layouts}
        order = sorted(section.layouts, key=lambda layout: (layout != DENSE, -density[layout]))
        section.layouts = {layout: section.layouts[layout] for layout in order}
    return list(found.values())
