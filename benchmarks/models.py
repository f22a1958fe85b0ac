"""Whole models, patched and not: seconds, peak memory, and how far the patched output strays when it should not.

A name reads `vggt-1b-100f-10n`: the model, 100 frames, 10 neighbours of each frame, and frame 0 dense both ways. The
neighbours are the five frames before and after; with the suffix `-random` each frame draws five others (seed 0) and
sees those and the frames that drew it, ten on average. With `-8a` behind the neighbours all frames also see 8 anchors,
evenly spread.

In `vggt-1b-1000f-core32` each frame sees a closed core of 32 frames in place of neighbours, and in `-core16+48@3` 16 in
full and 48 more at a stride of 3 patches, as `Core(by=None)` chooses them; special tokens are then ordinary tokens of
their frames.

Models have random weights: time and memory do not depend on them. `vggt-1b` is the model `vggt` of the package's table,
at 518 x 392 pixels (1041 tokens a frame); `toy` is the package's own small model, at 154 x 112 pixels (93 tokens).
"""

from __future__ import annotations

import contextlib
import copy
import re
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svggt_kernels import Core, CovisibilityGraph, patch
from svggt_kernels.graph import AnyGraph
from svggt_kernels.measure.cost import PeakMemory, timed
from svggt_kernels.measure.machine import dtype_name
from svggt_kernels.models import RUNNABLE
from svggt_kernels.models.loading import build
from svggt_kernels.sources import Scene

from .record import Line

CORE = r"core([1-9]\d*)(?:\+([1-9]\d*|all)@([1-9]\d*))?"
NAME = re.compile(rf"(toy|vggt-1b)-(\d+)f-(?:(\d+)n(?:-(\d+)a)?(-random)?|({CORE}))")
PIXELS = {"toy": (112, 154), "vggt-1b": (392, 518)}
"""Height and width of the images of each model."""

KINDS = {"toy": RUNNABLE["toy"], "vggt-1b": RUNNABLE["vggt"]}
"""How to build, feed and read each model."""

SYSTEMS: dict[str, dict[str, Any]] = {
    "upstream": {},
    "svggt-attention": {"fused": False},
    "svggt": {},
    "svggt-bf16": {"precision": "bf16"},
    "svggt-40gib": {"memory_budget": 40},
    "svggt-24gib": {"memory_budget": 24},
}
"""The model as it is, with its global attention patched, with all that `patch` does, with residuals and kept layers in
bfloat16, and within a budget of memory; with the options of `patch` that make the difference."""

FASTVGGT: dict[str, int | None] = {"pruned-dense": None, "fastvggt": 0}
"""FastVGGT's code, with the first layer that merges tokens: none, its baseline VGGT*, and the first, as published. It
calls itself `vggt` too, so a process has either."""

CHECKED_FRAMES = 4

KEYS = (
    "case",
    "system",
    "backend",
    "device",
    "dtype",
    "shape",
    "special_tokens",
    "density",
    "seconds_aggregator",
    "seconds_full",
    "peak_gib",
    "deviation",
    "measured",
    "torch",
    "triton",
    "commit",
    "command",
    "run",
    "date",
    "check",
)
"""The keys of a line, in order; a line that is not measured also has a `reason`."""

COLUMNS = {
    "case": "case",
    "system": "system",
    "backend": "backend",
    "density": "density:.4f",
    "seconds_aggregator": "aggregator s:.3f",
    "seconds_full": "full s:.3f",
    "peak_gib": "peak GiB:.1f",
    "deviation": "deviation, full graph:.1e",
    "check": "check",
}


@dataclass(frozen=True)
class ModelCase:
    """A model, the number of frames and the graph between them.

    Attributes:
        model: "toy" or "vggt-1b".
        frames: Frames, S.
        neighbours: Frames that each frame sees besides itself and frame 0; even.
        anchors: Frames that all frames see, besides frame 0.
        random: Whether neighbours are drawn at random; by default they are the nearest in order.
        core: A core in place of all of these, as in its name; empty for none.
    """

    model: str
    frames: int
    neighbours: int
    anchors: int = 0
    random: bool = False
    core: str = ""

    @classmethod
    def parse(cls, name: str) -> ModelCase:
        """Read a case from its name.

        Raises:
            ValueError: If the name does not follow the grammar in the module's docstring.
        """
        match = NAME.fullmatch(name)
        if match is None or int(match[2]) < 1 or int(match[3] or 0) % 2 or int(match[4] or 0) >= int(match[2]):
            raise ValueError(
                "a case of a model is called like toy-16f-4n or vggt-1b-100f-10n-4a-random, with an even number of "
                "neighbours and fewer anchors than frames, or like toy-16f-core4 or vggt-1b-1000f-core16+48@3, got "
                f"{name!r}"
            )
        return cls(
            match[1], int(match[2]), int(match[3] or 0), int(match[4] or 0), match[5] is not None, match[6] or ""
        )

    @property
    def name(self) -> str:
        """The name of the case; `parse` reads it back."""
        if self.core:
            return f"{self.model}-{self.frames}f-{self.core}"
        anchors = f"-{self.anchors}a" if self.anchors else ""
        return f"{self.model}-{self.frames}f-{self.neighbours}n{anchors}{'-random' if self.random else ''}"

    @property
    def about(self) -> str:
        """One line on the case."""
        height, width = PIXELS[self.model]
        if self.core:
            return f"{self.frames} images of {width} x {height}, {self._source.label}"
        kind = "random" if self.random else "nearest"
        anchors = f", {self.anchors} anchors" if self.anchors else ""
        return f"{self.frames} images of {width} x {height}, {self.neighbours} {kind} neighbours{anchors} and frame 0"

    @property
    def _source(self) -> Core:
        size, coarse, stride = re.fullmatch(CORE, self.core).groups()  # type: ignore[union-attr]
        if coarse is None:
            return Core(int(size), by=None)
        return Core(int(size), by=None, coarse="all" if coarse == "all" else int(coarse), stride=int(stride))

    def graph(self) -> AnyGraph:
        """Return which frames see which."""
        if self.core:
            return self._source.graph(Scene(self.frames, reference_frame=0))
        half = self.neighbours // 2
        frame = torch.arange(self.frames)
        visible = torch.eye(self.frames, dtype=torch.bool)
        if self.random:
            generator = torch.Generator().manual_seed(0)
            for i in range(self.frames):
                others = torch.randperm(self.frames, generator=generator)
                visible[i, others[others != i][:half]] = True
            visible |= visible.T.clone()
        else:
            visible |= (frame[:, None] - frame).abs() <= half
        visible[0] = visible[:, 0] = True
        visible[:, torch.arange(1, self.anchors + 1) * self.frames // (self.anchors + 1)] = True
        return CovisibilityGraph.from_dense(visible)


PUBLISHED = tuple(
    map(
        ModelCase.parse,
        (
            "toy-16f-4n",
            "vggt-1b-8f-10n",
            "vggt-1b-50f-10n",
            "vggt-1b-100f-10n",
            "vggt-1b-100f-10n-random",
            "vggt-1b-200f-10n",
            "vggt-1b-300f-30n",
            "vggt-1b-1000f-30n",
            "vggt-1b-1000f-30n-8a",
        ),
    )
)


class ModelRunner:
    """Runs model cases in one process, so that their numbers may be compared.

    Args:
        device: Where to run.
        dtype: float32, or the dtype of autocast.
        provenance: What every line says about the run.
        write: Called with each line as soon as it is known.
        repeats: Timed runs of each measurement, after one warm-up.
        aggregator: Whether the aggregator is also timed on its own.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        provenance: Line,
        write: Callable[[Line], None],
        repeats: int = 3,
        aggregator: bool = True,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.provenance = provenance
        self.write = write
        self.repeats, self.aggregator = repeats, aggregator
        self.lines: list[Line] = []
        self.not_run: list[str] = []
        self._models: dict[str, nn.Module] = {}

    def run(self, case: ModelCase, systems: Sequence[str], **options: Any) -> None:
        """Time the model of the case unpatched ("upstream") and patched, the latter after its check.

        Args:
            case: The model and its frames.
            systems: Which of `SYSTEMS` and `FASTVGGT`, in order.
            **options: Of `patch`: backend, special_tokens.
        """
        try:
            model = self._model(case.model)
        except ImportError as error:
            self.not_run.append(f"{case.name}: not run: {error}")
            return
        is_fastvggt = _is_fastvggt(model)
        for system in systems:
            if is_fastvggt != (system in FASTVGGT):
                package = "FastVGGT's" if system in FASTVGGT else "upstream's"
                self.not_run.append(f"{case.name}, {system}: not run: the package vggt must be {package}")
                continue
            print(f"{system} on {case.name} ...", file=sys.stderr, flush=True)
            line: Line = {"check": None, "measured": False}
            try:
                if system in FASTVGGT:
                    model.aggregator.merging = FASTVGGT[system]  # type: ignore[union-attr]
                if system == "upstream" or system in FASTVGGT:
                    self._measure(case, model, line)
                else:
                    ordinary = {"special_tokens": None} if case.core else {}
                    self._measure_patched(case, model, line, options | SYSTEMS[system] | ordinary)
            except torch.OutOfMemoryError:
                line["reason"] = "out of memory"
            except Exception as error:  # the line says what it was, the other systems still run
                traceback.print_exc()
                line |= {"reason": f"{type(error).__name__}: {error}".splitlines()[0], "check": "failed"}
            if "reason" in line:
                line |= dict.fromkeys(("seconds_aggregator", "seconds_full", "peak_gib")) | {"measured": False}
            self._add(case, system, line)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure_patched(self, case: ModelCase, model: nn.Module, line: Line, options: dict[str, Any]) -> None:
        line["deviation"], reason = self._deviation(case, model, options)
        if "precision" in options:
            reason = None  # not upstream's: how far it strays is told, no more
        else:
            line["check"] = "passed" if reason is None else "failed"
        if reason is not None:
            line["reason"] = reason
            return
        graph = case.graph()
        with patch(model, covisibility=graph, **options) as handle:
            self._measure(case, model, line)
            report = handle.report()
        peak, budget = line.get("peak_gib"), options.get("memory_budget")
        if peak is not None and budget is not None and peak > budget:
            plan = None if report.inference is None else report.inference.memory
            raise RuntimeError(f"the peak must be within the budget of {budget} GiB, got {peak:.2f}; {plan}")
        edges = sum(summary.edges + (summary.coarse_edges or 0) for summary in report.graphs)
        if report.calls_last_forward != len(report.modules) or edges != graph.num_edges:
            raise RuntimeError(
                f"each of {len(report.modules)} patched modules must have attended over {graph.num_edges} edges once, "
                f"got {report.calls_last_forward} calls over {edges} edges"
            )
        line["backend"] = report.backend
        line["special_tokens"] = report.special_tokens
        line["density"] = report.token_density

    def _measure(self, case: ModelCase, model: nn.Module, line: Line) -> None:
        images = KINDS[case.model].feed(self._images(case.model, case.frames))
        with self._inference():
            if self.aggregator and hasattr(model, "aggregator"):
                line["seconds_aggregator"] = self._seconds(lambda: model.aggregator(images))
            memory = PeakMemory(self.device)
            line["seconds_full"] = self._seconds(lambda: model(images))
            if self.device.type == "cuda":
                line["peak_gib"] = memory.highest_mib / 1024
        line["measured"] = True

    def _seconds(self, call: Callable[[], object]) -> float:
        times_ms = [timed(call, self.device)[1] for _ in range(1 + self.repeats)]
        return statistics.median(times_ms[1:]) / 1000

    def _deviation(self, case: ModelCase, model: nn.Module, options: dict[str, Any]) -> tuple[float, str | None]:
        """Return how far the output strays when patched with the full graph, and why that is too far, or None.

        The budget is that of the operator: the error against higher precision may be at most twice that of the
        unpatched model, for each output.
        """
        kind = KINDS[case.model]
        images = kind.feed(self._images(case.model, CHECKED_FRAMES))
        with self._inference():
            plain = kind.outputs(model(images))
            with patch(model, covisibility="all", **options):
                patched = kind.outputs(model(images))
        with torch.no_grad():
            if self.dtype == torch.float32:
                exact = kind.outputs(copy.deepcopy(model).double()(images.double()))
            else:
                exact = kind.outputs(model(images))
        deviation, reason = 0.0, None
        for name, expected in exact.items():
            error, allowed = (float((x.double() - expected.double()).norm()) for x in (patched[name], plain[name]))
            if not error <= 2 * allowed and reason is None:
                reason = (
                    f"{name}: with every frame visible the error against higher precision may be at most 2x that of "
                    f"the unpatched model, got {error / max(allowed, 1e-300):.3g}x"
                )
            difference = (patched[name].double() - plain[name].double()).abs().max()
            deviation = max(deviation, float(difference / plain[name].double().abs().max()))
        return deviation, reason

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        cast = self.dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype if cast else None, enabled=cast):
            yield

    def _images(self, model: str, frames: int) -> Tensor:
        height, width = PIXELS[model]
        generator = torch.Generator().manual_seed(0)
        return torch.rand(frames, 3, height, width, generator=generator).to(self.device)

    def _model(self, name: str) -> nn.Module:
        if name not in self._models:
            self._models.clear()
            model: Any = build(KINDS[name], self.device)
            if _is_fastvggt(model):
                model.to(torch.bfloat16)
                model.update_patch_dimensions(*(side // 14 for side in reversed(PIXELS[name])))
            self._models[name] = model
        return self._models[name]

    def _add(self, case: ModelCase, system: str, line: Line) -> None:
        height, width = PIXELS[case.model]
        line |= {
            "case": case.name,
            "system": system,
            "dtype": dtype_name(self.dtype),
            "shape": [case.frames, 3, height, width],
            **self.provenance,
        }
        if system == "upstream" or system in FASTVGGT:
            line["density"] = 1.0
        ordered = {key: line.get(key) for key in KEYS} | ({"reason": line["reason"]} if "reason" in line else {})
        self.lines.append(ordered)
        self.write(ordered)


def _is_fastvggt(model: nn.Module) -> bool:
    return hasattr(getattr(model, "aggregator", None), "merging")
