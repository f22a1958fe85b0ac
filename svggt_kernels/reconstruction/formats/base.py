"""What a format of export states, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from ..points import PointChoice, PointCloud, point_cloud
from ..scene import Reconstruction

Files = Mapping[str, bytes]
"""The contents of files by their names below the output folder, with slashes; put in place together."""


@dataclass(frozen=True)
class Material:
    """What exports are made of.

    Attributes:
        scene: The reconstruction.
        choice: Which pixels become points.
        folder: Where the files go, for paths that are relative to it.
        formats: Names of all formats that are written, for files that name others.
    """

    scene: Reconstruction
    choice: PointChoice
    folder: Path
    formats: tuple[str, ...]

    @cached_property
    def cloud(self) -> PointCloud:
        """The points."""
        return point_cloud(self.scene, self.choice)

    @cached_property
    def depth_step(self) -> float:
        """The depth that one level of a 16-bit depth map stands for."""
        farthest = FARTHEST * self.scene.typical_depth
        return min(float(self.scene.depth.nan_to_num(0, 0, 0).max()), farthest) / LEVELS


LEVELS = 65535
FARTHEST = 100.0
"""Of the median depth; what is farther away is written as not known in depth maps of 16 bits."""


@dataclass(frozen=True)
class Format:
    """One way to write a reconstruction.

    Attributes:
        name: Its word on the command line.
        label: What it is, in words.
        target: The file or folder that it writes, by its name below the output folder.
        write: Yields the files, those that belong together at once.
        has_points: Whether it depends on which pixels become points.
        needs: The optional package that it is written with; empty if none.
        install: What pip installs for that.
    """

    name: str
    label: str
    target: str
    write: Callable[[Material], Iterator[Files]]
    has_points: bool = False
    needs: str = ""
    install: str = ""

    @property
    def is_available(self) -> bool:
        """Whether the package that it needs is installed; imports nothing."""
        return not self.needs or find_spec(self.needs) is not None
