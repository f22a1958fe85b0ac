"""What a command found: in words, as JSON, and as files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph import CovisibilityGraph, CovisibilityReport
from ..measure.compare import Comparison, Outputs
from ..measure.cost import Cost
from ..measure.machine import versions
from ..measure.pictures import draw_comparison, draw_graph
from ..measure.wording import count, mebibytes, milliseconds, percent, printable, times
from .files import write_files
from .text import table

ROWS = 4


def as_json(command: str, content: dict[str, Any]) -> str:
    """Return a report with what a reader needs to make it again.

    Numbers that JSON does not have become null, and file names that are no text become `printable`.
    """
    return json.dumps(_plain({"command": command, "versions": versions(), **content}), indent=2) + "\n"


def write_results(
    folder: Path,
    comparison: Comparison,
    outputs: Outputs,
    frames: Tensor,  # [S, 3, H, W]
    names: Sequence[str],
    *,
    command: str,
    pairs: Tensor | None = None,  # [E, 2]
) -> str:
    """Write report.json, comparison.png and graph.png, and return words that say where they are.

    Args:
        folder: Where to.
        comparison: The facts.
        outputs: The depth of both runs, and the graph.
        frames: What the model saw, RGB in [0, 1].
        names: What to call each frame.
        command: The command that makes it again.
        pairs: Pairs of frames that are known to share a view, if they are.

    Raises:
        CommandError: They cannot be written.
    """
    shown = torch.linspace(0, len(frames) - 1, min(ROWS, len(frames))).round().int().tolist()
    compared = draw_comparison(
        frames[shown],
        outputs.dense["depth"][shown],
        outputs.sparse["depth"][shown],
        frames=[names[i] for i in shown],
        title=headline(comparison),
        warning=comparison.warning,
    )
    graph = draw_graph(
        outputs.graph,
        f"{count(comparison.frames, 'frame')}, {comparison.covisibility}",
        None if pairs is None else CovisibilityGraph.from_pairs(comparison.frames, pairs),
    )
    ratios = {
        "speedup": comparison.speedup,
        "attention_speedup": comparison.attention.speedup,
        "ideal_reached": comparison.reached,
        "attention_share": comparison.attention_share,
    }
    report = {**asdict(comparison), "ratios": ratios, "frame_names": list(names)}
    if pairs is not None:
        report["truth"] = against_truth(CovisibilityReport.of(outputs.graph, pairs))
    write_files(
        folder, {"comparison.png": compared, "graph.png": graph, "report.json": as_json(command, report).encode()}
    )
    return f"Pictures: {folder / 'comparison.png'}, {folder / 'graph.png'}\nReport: {folder / 'report.json'}"


def against_truth(judged: CovisibilityReport) -> dict[str, float | None]:
    """Return what a graph keeps of the pairs that share a view, and how many chance would give it."""
    return {
        "pairs": judged.true_pairs,
        "recall": judged.recall,
        "precision": judged.precision,
        "chance": judged.chance,
    }


def as_text(comparison: Comparison) -> str:
    """Return the comparison as a page of text."""
    c = comparison
    lines = [
        f"{c.model}, weights: {c.weights}" + (f", autocast {c.autocast}" if c.autocast else ", float32"),
        f"{count(c.frames, 'frame')} of {c.width} x {c.height} px, {c.tokens_per_frame} tokens each, on {c.device} "
        f"({c.device_name})",
        f"Who sees whom: {c.covisibility}; density {percent(c.density)} over frames, {percent(c.token_density)} over "
        "tokens",
        f"Backend: {c.backend}" + "".join(f"; not {name}: {reason}" for name, reason in c.passed_over.items()),
        *(f"Note: {warning}" for warning in c.graph["warnings"]),
        "",
        _costs(c),
        "  The ideal counts work alone, but the kernels differ too: dense attention is PyTorch's, sparse that of "
        f"backend {c.backend}.",
        _share(c),
        *_doubts(c),
        "",
        "Sparse against dense output:",
        _deviations(c),
    ]
    if c.warning:
        lines += ["", c.warning]
    return "\n".join(lines)


def _doubts(c: Comparison) -> list[str]:
    if c.dense.runs == 1:
        return ["  Each was timed once, so nothing tells how far runs differ: the times are rough."]
    return [f"  Runs of the same thing differ by {times(c.unrest)}, so the times are rough."] if c.unrest > 1.5 else []


def _share(c: Comparison) -> str:
    layers = f"  The model has {c.layers} global attention layers; "
    if c.attention_share > 1:
        return (
            layers + "timed alone they take longer than the whole model, so the machine was busy and times are rough."
        )
    return layers + f"they take {percent(c.attention_share)} of the dense time, the rest stays."


def _costs(c: Comparison) -> str:
    once = c.dense.runs == 1
    attention = f"{times(c.attention.speedup)} of {times(c.ideal_speedup)} ideal: {percent(c.reached)} reached"
    return table(
        [
            ("", "dense", "sparse", "speed-up"),
            (f"whole model, {_kind_of_time(c)}", *_medians(c.dense, c.sparse), times(c.speedup)),
            *([] if once else [("  shortest to longest run", _range(c.dense), _range(c.sparse), "")]),
            ("  first run, not among them", milliseconds(c.first_dense_ms), milliseconds(c.first_sparse_ms), ""),
            ("    of it graph and layout", "", milliseconds(c.first_planning_ms), ""),
            ("one global attention", *_medians(c.attention.dense, c.attention.sparse), attention),
            ("peak memory that a run adds", mebibytes(c.dense.peak_mib), mebibytes(c.sparse.peak_mib), ""),
            *([] if c.kept_mib is None else [("kept from run to run", "", mebibytes(c.kept_mib), "")]),
        ]
    )


def _deviations(c: Comparison) -> str:
    rows = [("output", "relative L2", "largest difference")]
    for name, d in c.deviations.items():
        broken = f" ({d.not_finite} values not finite)" if d.not_finite else ""
        rows.append((name, f"{d.relative_l2:.2e}", f"{d.max_abs:.2e}{broken}"))
    median, largest = c.rotation_degrees["median"], c.rotation_degrees["max"]
    return f"{table(rows)}\n  The cameras turn by {median:.3g} degrees (median), {largest:.3g} at most."


def headline(comparison: Comparison) -> str:
    """Return the facts for the top of the picture."""
    c = comparison
    model = f"whole model, {_kind_of_time(c)}: dense {milliseconds(c.dense.median_ms)}, sparse "
    attention = f"attention, PyTorch against {c.backend}: {times(c.attention.speedup)} of {times(c.ideal_speedup)}"
    return (
        f"{c.model}, {count(c.frames, 'frame')} of {c.width} x {c.height} px on {c.device_name}; density "
        f"{percent(c.token_density)} over tokens\n{model}{milliseconds(c.sparse.median_ms)} ({times(c.speedup)}); "
        f"{attention} ideal\ndepth of all frames differs by {percent(c.deviations['depth'].relative_l2)} (relative "
        "L2 over pixels)"
    )


def _kind_of_time(c: Comparison) -> str:
    return "one run" if c.dense.runs == 1 else f"median of {c.dense.runs} runs"


def _medians(*costs: Cost) -> tuple[str, ...]:
    return tuple(milliseconds(cost.median_ms) for cost in costs)


def _range(cost: Cost) -> str:
    return f"{milliseconds(cost.min_ms)} to {milliseconds(cost.max_ms)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {printable(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return printable(value)
    return value
