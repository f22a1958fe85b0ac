"""Pictures of a graph and of a comparison, as the bytes of a PNG; matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph import CovisibilityGraph
from ..packages import optional
from .wording import percent, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNSEEN, SEEN, SEEN_IN_VAIN, MISSED = range(4)
MOSAIC_ROWS, MOSAIC_COLUMNS = 24, 10
PAIR_COLOURS = ("#ffffff", "#1f4e79", "#a9c4de", "#d62728")
TRUE_COLOUR, MARK_COLOUR = "#8a8a8a", "#e08a00"
BESIDE = 1.5  # metres beside a flat that a floor plan shows


def require_matplotlib() -> None:
    """Raise an ImportError, before any work is done, if pictures cannot be drawn here."""
    optional("matplotlib", "drawing", "matplotlib", "'svggt-kernels[viz]'")


@contextmanager
def _plain_text() -> Iterator[None]:
    """Draw every text as it is: a file name may hold `$` or `_`, which are no formula, and signs that no font has."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


@_plain_text()
def draw_graph(graph: CovisibilityGraph, title: str, truth: CovisibilityGraph | None = None) -> bytes:
    """Draw who sees whom as a matrix, and how many others a frame sees as a histogram.

    Args:
        graph: A square graph of `S` frames.
        title: One line above the picture; the density is added.
        truth: Which frames do share a view; the matrix then shows which of those pairs the graph misses.
    """
    visible = graph.to_dense().cpu().numpy()
    kinds = np.where(visible, SEEN, UNSEEN)
    labels = {SEEN: "sees"}
    if truth is not None:
        true = truth.to_dense().cpu().numpy()
        kinds = np.select([visible & true, visible, true], [SEEN, SEEN_IN_VAIN, MISSED], UNSEEN)
        labels = {SEEN: "sees, and shares a view", SEEN_IN_VAIN: "sees, shares no view", MISSED: "misses"}

    figure = _figure(10.5, 5.6, f"{title}: density {percent(graph.density)} over frames")
    matrix, histogram = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_matrix(matrix, kinds, labels)
    degrees = visible.sum(1) - visible.diagonal()
    lowest, highest = int(degrees.min()), int(degrees.max())
    step = max(1, -(-(highest - lowest + 1) // 40))
    histogram.hist(
        degrees, bins=np.arange(lowest, highest + step + 1, step) - 0.5, color=PAIR_COLOURS[SEEN], rwidth=0.85
    )
    histogram.axvline(
        np.median(degrees), color="black", linestyle="--", linewidth=1, label=f"median {np.median(degrees):g}"
    )
    histogram.set(title="Degree", xlabel="other frames that a frame sees", ylabel="number of frames")
    histogram.legend(frameon=False)
    for axis in (histogram.xaxis, histogram.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return _png(figure, dpi=120)


@_plain_text()
def draw_neighbours(
    graph: CovisibilityGraph,
    photos: Tensor,  # [S, 3, H, W]
    names: Sequence[str],
    pairs: Tensor | None = None,  # [E, 2]
) -> bytes:
    """Draw one row per frame: its photo, and the photos that it was found to be most similar to, the most alike first.

    At most 24 frames are shown, evenly spread, with 10 neighbours each and how many more there are. A graph that does
    not come from descriptors has no most similar ones; the frames that it sees stand in for them, nearest first in the
    order of the frames.

    Args:
        graph: A square graph of `S` frames.
        photos: RGB in [0, 1].
        names: What to call each frame.
        pairs: Pairs that share a view: neighbours get a frame, blue where they are among them and red where not.
    """
    rows = torch.linspace(0, len(photos) - 1, min(MOSAIC_ROWS, len(photos))).round().int().tolist()
    true = None if pairs is None else set(map(tuple, pairs.tolist()))
    height, width = (max(1, round(side * 96 / max(photos.shape[-2:]))) for side in photos.shape[-2:])
    small = F.interpolate(photos.float().cpu(), size=(height, width), mode="area")
    others = "those most like it, most alike first" if _ranked(graph) else "those that it sees, nearest first"
    few = len(rows) < len(photos)
    title = f"{f'{len(rows)} of {len(photos)} frames, each' if few else 'Each frame'} with {others}"
    if true is not None:
        title += "\nblue: known to share a view; red: not"
    figure = _figure(1.1 * (MOSAIC_COLUMNS + 1), 0.55 + len(rows) * 1.25, title)
    grid = figure.subplots(len(rows), MOSAIC_COLUMNS + 1, squeeze=False)
    for axes, frame in zip(grid, rows, strict=True):
        for axis in axes:
            axis.set_axis_off()
        neighbours = _neighbours(graph, frame)
        for axis, shown in zip(axes, [frame, *neighbours[:MOSAIC_COLUMNS]], strict=False):
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            axis.set_title(_label(names[shown], 14), fontsize=7, pad=2)
            axis.imshow(small[shown].permute(1, 2, 0).clamp(0, 1).numpy())
            if true is not None and shown != frame:
                colour = PAIR_COLOURS[SEEN if (frame, shown) in true else MISSED]
                for side in axis.spines.values():
                    side.set(color=colour, linewidth=2.5)
        if len(neighbours) > MOSAIC_COLUMNS:
            axes[-1].yaxis.set_label_position("right")
            axes[-1].set_ylabel(f"+{len(neighbours) - MOSAIC_COLUMNS} more", fontsize=7)
    return _png(figure, dpi=110)


def _ranked(graph: CovisibilityGraph) -> bool:
    return graph.origin is not None and graph.origin.nearest.shape[1] > 0


def _neighbours(graph: CovisibilityGraph, frame: int) -> list[int]:
    if graph.origin is not None and _ranked(graph):
        return graph.origin.nearest[frame].tolist()
    row = graph.indices[int(graph.indptr[frame]) : int(graph.indptr[frame + 1])].tolist()
    return sorted((other for other in row if other != frame), key=lambda other: abs(other - frame))


@_plain_text()
def draw_comparison(
    photos: Tensor,  # [F, 3, H, W]
    dense: Tensor,  # [F, H, W]
    sparse: Tensor,  # [F, H, W]
    *,
    frames: Sequence[str],
    title: str,
    warning: str | None = None,
) -> bytes:
    """Draw one row per frame: photo, dense depth, sparse depth, and the difference relative to the dense depth.

    Args:
        photos: RGB in [0, 1].
        dense: Depth of the unpatched model.
        sparse: Depth of the patched model.
        frames: A label for each row.
        title: Lines above the picture.
        warning: A line in red beneath the picture.
    """
    depths = torch.stack([dense, sparse]).float().cpu().numpy()  # [2, F, H, W]
    finite = np.isfinite(depths)
    low, high = np.percentile(depths[finite], (2, 98)) if finite.any() else (0.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = 100 * (depths[1] - depths[0]) / np.abs(depths[0])
    finite_change = np.abs(change[np.isfinite(change)])
    limit = max(float(np.percentile(finite_change, 98)), 1e-6) if finite_change.size else 1.0

    rows, (height, width) = len(photos), photos.shape[-2:]
    column_width, bar_height = 2.9, 0.14
    row_height = column_width * height / width
    figure = _figure(4 * column_width + 0.5, rows * (row_height + 0.1) + bar_height + 1.7, title, warning)
    grid = figure.add_gridspec(rows + 1, 4, height_ratios=[row_height] * rows + [bar_height])
    panels = ("photo", "dense depth", "sparse depth", "sparse - dense")
    for row, frame in enumerate(frames):
        axes = [figure.add_subplot(grid[row, column]) for column in range(4)]
        axes[0].imshow(photos[row].permute(1, 2, 0).clamp(0, 1).cpu().numpy())
        axes[0].set_ylabel(_label(frame, 24), fontsize=9)
        for axis, depth in zip(axes[1:3], depths[:, row], strict=True):
            depth_image = axis.imshow(depth, cmap="viridis", vmin=low, vmax=high)
        change_image = axes[3].imshow(change[row], cmap="RdBu_r", vmin=-limit, vmax=limit)
        for axis, panel in zip(axes, panels, strict=True):
            axis.set(xticks=[], yticks=[], title=panel if row == 0 else "")
    for image, columns, label in (
        (depth_image, slice(1, 3), "depth, in the model's unit"),
        (change_image, 3, "% of dense"),
    ):
        bar = figure.add_subplot(grid[rows, columns])
        figure.colorbar(image, cax=bar, orientation="horizontal", extend="both", label=label)
    return _png(figure, dpi=110)


@_plain_text()
def draw_depths(
    photos: Tensor,  # [F, 3, H, W]
    truth: Tensor,  # [F, H, W]
    depths: Mapping[str, Tensor],  # [F, H, W] each
    *,
    frames: Sequence[str],
    title: str,
    note: str,
) -> bytes:
    """Draw one row per frame: photo, true depth, each depth, and how far each is from the truth; all in metres.

    Depth has one colour bar, and so has what it is off; pixels without true depth are white.

    Args:
        photos: RGB in [0, 1].
        truth: True depth, metres; 0 where it is not known.
        depths: Predicted depth by name, metres.
        frames: A label for each row.
        title: Lines above the picture.
        note: A line beneath it.
    """
    true = truth.float().cpu().where(truth.cpu() > 0, torch.nan)
    predicted = [depth.float().cpu() for depth in depths.values()]
    errors = [(depth - true).abs() for depth in predicted]
    far, off = (float(torch.stack(values).nan_to_num().flatten().quantile(0.98)) for values in ([true], errors))
    names, rows = list(depths), len(photos)
    panels = ["photo", "true depth", *(f"depth, {name}" for name in names), *(f"|error|, {name}" for name in names)]
    width, bar_height = 1.9, 0.1
    row_height = width * photos.shape[-2] / photos.shape[-1]
    figure = _figure(width * len(panels) + 0.4, rows * (row_height + 0.08) + bar_height + 1.45, title)
    figure.supxlabel(note, fontsize=9)
    grid = figure.add_gridspec(rows + 1, len(panels), height_ratios=[row_height] * rows + [bar_height])
    for row, frame in enumerate(frames):
        axes = [figure.add_subplot(grid[row, column]) for column in range(len(panels))]
        axes[0].imshow(photos[row].permute(1, 2, 0).clamp(0, 1).cpu().numpy())
        axes[0].set_ylabel(_label(frame, 24), fontsize=9)
        for axis, depth in zip(axes[1:], [true, *predicted], strict=False):
            depth_image = axis.imshow(depth[row].numpy(), cmap="viridis", vmin=0, vmax=far)
        for axis, error in zip(axes[2 + len(names) :], errors, strict=True):
            error_image = axis.imshow(error[row].numpy(), cmap="magma", vmin=0, vmax=max(off, 1e-6))
        for axis, panel in zip(axes, panels, strict=True):
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(panel, fontsize=9)
    first_error = 2 + len(names)
    for image, columns, label in (
        (depth_image, slice(1, first_error), "depth, metres"),
        (error_image, slice(first_error, None), "|predicted - true depth|, metres"),
    ):
        bar = figure.add_subplot(grid[rows, columns])
        figure.colorbar(image, cax=bar, orientation="horizontal", extend="max", label=label)
    return _png(figure, dpi=110)


@_plain_text()
def draw_trade_offs(
    names: Sequence[str],
    costs: Mapping[str, Sequence[float]],
    figures: Mapping[str, Sequence[float]],
    *,
    title: str,
    note: str,
) -> bytes:
    """Draw each figure against each cost: a row for a figure, a column for a cost, a dot for each layout.

    Args:
        names: What to call the layouts; the figures of the first, dense, are drawn as lines too.
        costs: What each layout costs, by what that is.
        figures: How accurate each layout is, likewise.
        title: Lines above the picture.
        note: A line beneath it.
    """
    figure = _figure(4.2 * len(costs) + 0.4, 3.1 * len(figures) + 1.4, title)
    rows = figure.subplots(len(figures), len(costs), squeeze=False)
    for axes, (figure_name, heights) in zip(rows, figures.items(), strict=True):
        for axis, (cost, widths) in zip(axes, costs.items(), strict=True):
            axis.axhline(heights[0], color=TRUE_COLOUR, linewidth=1, linestyle="--")
            for number, (name, *place) in enumerate(zip(names, widths, heights, strict=True)):
                axis.scatter(*place, s=34, color=TRUE_COLOUR if number == 0 else f"C{number - 1}", label=name, zorder=3)
            axis.set(xlabel=cost, ylabel=figure_name, xlim=(0, 1.08 * max(widths) or 1))
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = rows[0, 0].get_legend_handles_labels()
    beneath = {"loc": "outside lower center", "ncols": min(len(names), 8), "frameon": False, "fontsize": 9}
    figure.legend(handles, labels, title=note, title_fontsize=9, **beneath)
    return _png(figure, dpi=110)


class Cameras(NamedTuple):
    """Cameras for a floor plan.

    Attributes:
        title: What to write above them.
        poses: Camera to world, `[S, 4, 4]` metres.
        marked: Frames that all frames see.
    """

    title: str
    poses: Tensor
    marked: Sequence[int] = ()


@_plain_text()
def draw_floor_plan(
    walls: Tensor,  # [n, 4, 2]
    things: Tensor,  # [m, 4, 2]
    truth: Tensor,  # [S, 4, 4]
    predictions: Sequence[Cameras],
    *,
    title: str,
    note: str,
) -> bytes:
    """Draw a flat from above, once for each prediction: true cameras, predicted ones, and a line from each to its own.

    Args:
        walls: Corners, metres.
        things: Corners of furniture, metres.
        truth: True poses, camera to world, metres.
        predictions: Predicted cameras in the same world.
        title: Lines above the picture.
        note: A line beneath it.
    """
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.lines import Line2D

    corners = walls.flatten(0, 1).cpu()
    low, high = corners.amin(0), corners.amax(0)
    # Cameras that are predicted outside the flat are shown up to a distance from its walls.
    placed = torch.cat([cameras.poses[:, :2, 3].cpu().to(corners) for cameras in predictions])
    low = torch.minimum(low, torch.maximum(placed.amin(0), low - BESIDE)) - 0.3
    high = torch.maximum(high, torch.minimum(placed.amax(0), high + BESIDE)) + 0.3
    (left, bottom), (right, top) = low.tolist(), high.tolist()
    width = 4.6
    height = width * (top - bottom) / (right - left)
    figure = _figure(width * len(predictions), height + 1.5, title)
    true_eyes = truth[:, :2, 3].cpu().numpy()
    for axis, cameras in zip(figure.subplots(1, len(predictions), squeeze=False)[0], predictions, strict=True):
        axis.add_collection(PolyCollection(list(things.cpu().numpy()), facecolor="#e8e4da", edgecolor="#c8c2b2"))
        axis.add_collection(PolyCollection(list(walls.cpu().numpy()), facecolor="#3c3c3c", edgecolor="#3c3c3c"))
        eyes = cameras.poses[:, :2, 3].cpu().numpy()
        axis.add_collection(
            LineCollection(list(np.stack([true_eyes, eyes], 1)), colors=PAIR_COLOURS[MISSED], linewidths=0.8)
        )
        _draw_cameras(axis, truth, TRUE_COLOUR)
        _draw_cameras(axis, cameras.poses, PAIR_COLOURS[SEEN])
        marked = eyes[list(cameras.marked)]
        axis.scatter(marked[:, 0], marked[:, 1], s=42, facecolor="none", edgecolor=MARK_COLOUR, linewidth=1.4, zorder=4)
        axis.plot([left + 0.6, left + 2.6], [bottom + 0.02] * 2, color="black", linewidth=2, solid_capstyle="butt")
        axis.annotate("2 m", (left + 2.7, bottom + 0.02), va="center", fontsize=8)
        axis.set(xlim=(left, right), ylim=(bottom - 0.2, top), aspect="equal", xticks=[], yticks=[])
        axis.set_title(cameras.title, fontsize=10)
        axis.spines[:].set_visible(False)
    dot = partial(Line2D, [], [], linestyle="", marker="o")
    handles = [
        dot(color=TRUE_COLOUR, label="true cameras"),
        dot(color=PAIR_COLOURS[SEEN], label="predicted cameras"),
        Line2D([], [], color=PAIR_COLOURS[MISSED], label="from true to predicted"),
        dot(color=MARK_COLOUR, fillstyle="none", label="frames that all frames see"),
    ]
    beneath = {"loc": "outside lower center", "ncols": len(handles), "frameon": False, "fontsize": 9}
    figure.legend(handles=handles, title=note, title_fontsize=9, alignment="center", **beneath)
    return _png(figure, dpi=110)


def _draw_cameras(axis: Axes, poses: Tensor, colour: str) -> None:
    """Draw a dot where each camera stands and a line of half a metre where it looks."""
    eyes, ahead = poses[:, :2, 3].cpu().numpy(), poses[:, :2, 2].cpu().numpy()
    axis.quiver(*eyes.T, *ahead.T, color=colour, units="xy", scale=2, width=0.045, headwidth=4, zorder=3)
    axis.scatter(eyes[:, 0], eyes[:, 1], s=7, color=colour, zorder=3)


def _figure(width: float, height: float, title: str, warning: str | None = None) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11)
    if warning:
        figure.supxlabel(warning, fontsize=11, color="#c00000", weight="bold")
    return figure


def _png(figure: Figure, dpi: int) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def _label(name: str, length: int) -> str:
    """Return the name, or its end where it is longer than that."""
    name = printable(name)
    return name if len(name) <= length else f"...{name[3 - length :]}"


def _draw_matrix(axis, kinds: np.ndarray, labels: dict[int, str]) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    axis.imshow(kinds, cmap=ListedColormap(PAIR_COLOURS), vmin=0, vmax=3, interpolation="nearest")
    axis.set(title="Who sees whom", xlabel="key frame", ylabel="query frame")
    handles = [
        Patch(facecolor=PAIR_COLOURS[kind], label=f"{label}: {percent((kinds == kind).mean())} of pairs")
        for kind, label in labels.items()
    ]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, fontsize=9)
