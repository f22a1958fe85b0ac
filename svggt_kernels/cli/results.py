"""What a command found: in words, as JSON, and as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph import CovisibilityReport
from ..measure.compare import Comparison, Outputs, SparseRun
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
    found: SparseRun,
    outputs: Outputs,
    frames: Tensor,  # [S, 3, H, W]
    names: Sequence[str],
    *,
    command: str,
) -> str:
    """Write report.json, graph.png, and of a comparison comparison.png; return words that say where they are.

    Args:
        folder: Where to.
        found: The facts.
        outputs: The depth of the runs, and the graph.
        frames: What the model saw, RGB in [0, 1].
        names: What to call each frame.
        command: The command that makes it again.

    Raises:
        CommandError: They cannot be written.
    """
    report, files = {**asdict(found), "frame_names": list(names)}, dict[str, bytes]()
    if isinstance(found, Comparison) and outputs.dense is not None:
        shown = torch.linspace(0, len(frames) - 1, min(ROWS, len(frames))).round().int().tolist()
        files["comparison.png"] = draw_comparison(
            frames[shown],
            outputs.dense["depth"][shown],
            outputs.sparse["depth"][shown],
            frames=[names[i] for i in shown],
            title=headline(found),
            warning=found.warning,
        )
        report["ratios"] = {
            "speedup": found.speedup,
            "attention_speedup": found.attention.speedup,
            "ideal_reached": found.reached,
            "attention_share": found.attention_share,
        }
    files["graph.png"] = draw_graph(outputs.graph, f"{count(found.frames, 'frame')}, {found.covisibility}")
    files["report.json"] = as_json(command, report).encode()
    write_files(folder, files)
    *pictures, written = (str(folder / name) for name in files)
    return f"Pictures: {', '.join(pictures)}\nReport: {written}"


def against_truth(judged: CovisibilityReport) -> dict[str, float | None]:
    """Return what a graph keeps of the pairs that share a view, and how many chance would give it."""
    return {
        "pairs": judged.true_pairs,
        "recall": judged.recall,
        "precision": judged.precision,
        "chance": judged.chance,
    }


def as_text(found: SparseRun) -> str:
    """Return a comparison, or a sparse run alone, as a page of text."""
    c = found
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
        *(_shares(c) if isinstance(c, Comparison) else ["  Dense did not run, so nothing is compared."]),
        *_doubts(c),
        *(["", "Sparse against dense output:", _deviations(c)] if isinstance(c, Comparison) else []),
    ]
    if c.warning:
        lines += ["", c.warning]
    return "\n".join(lines)


def _doubts(c: SparseRun) -> list[str]:
    if c.sparse.runs == 1:
        return ["  Each was timed once, so nothing tells how far runs differ: the times are rough."]
    return [f"  Runs of the same thing differ by {times(c.unrest)}, so the times are rough."] if c.unrest > 1.5 else []


def _shares(c: Comparison) -> list[str]:
    kernels = (
        "  The ideal counts work alone, but the kernels differ too: dense attention is PyTorch's, sparse that of "
        f"backend {c.backend}."
    )
    layers = f"  The model has {c.layers} global attention layers; "
    if c.attention_share > 1:
        share = "timed alone they take longer than the whole model, so the machine was busy and times are rough."
    else:
        share = f"they take {percent(c.attention_share)} of the dense time, the rest stays."
    return [kernels, layers + share]


def _costs(c: SparseRun) -> str:
    costs, compared = c.costs, c if isinstance(c, Comparison) else None

    def row(label: str, cells: Mapping[str, str], last: str = "") -> tuple[str, ...]:
        return (label, *(cells.get(name, "") for name in costs), *([last] if compared else []))

    firsts = {"sparse": milliseconds(c.first_sparse_ms)}
    rows = [row("", {name: name for name in costs}, "speed-up")]
    rows.append(row(f"whole model, {_kind_of_time(c)}", _medians(costs), times(compared.speedup) if compared else ""))
    if c.sparse.runs > 1:
        rows.append(row("  shortest to longest run", {name: _range(cost) for name, cost in costs.items()}))
    rows.append(row("  of it graph and layout", {"sparse": milliseconds(c.planning_ms)}))
    if compared:
        firsts["dense"] = milliseconds(compared.first_dense_ms)
    rows.append(row("  first run, not among them", firsts))
    for step, spent in c.first_steps_ms.items():
        rows.append(row(f"    of it {step}", {"sparse": milliseconds(spent)}))
    if compared:
        alone = {"dense": compared.attention.dense, "sparse": compared.attention.sparse}
        reached = f"{times(compared.attention.speedup)} of {times(c.ideal_speedup)} ideal: "
        rows.append(row("one global attention", _medians(alone), f"{reached}{percent(compared.reached)} reached"))
    rows.append(row("peak memory that a run adds", {name: mebibytes(cost.peak_mib) for name, cost in costs.items()}))
    if c.kept_mib is not None:
        rows.append(row("kept from run to run", {"sparse": mebibytes(c.kept_mib)}))
    return table(rows)


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


def _kind_of_time(c: SparseRun) -> str:
    return "one run" if c.sparse.runs == 1 else f"median of {c.sparse.runs} runs"


def _medians(costs: Mapping[str, Cost]) -> dict[str, str]:
    return {name: milliseconds(cost.median_ms) for name, cost in costs.items()}


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
