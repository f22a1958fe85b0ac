"""What a patch did, for programs and for people."""

from __future__ import annotations

from dataclasses import dataclass

from ..coarse import CoarseLayout
from ..graph import GraphSummary
from ..inference.report import InferenceReport
from .chunks.report import ChunksReport
from .forwards import PlannedLayers


@dataclass(frozen=True)
class LayersReport:
    """What some global layers of the last forward attended over, all the same.

    Attributes:
        layers: Their numbers, from 0, in the order in which the model runs them.
        covisibility: How their graphs were made, in words.
        graphs: Summary of each graph: one per sample, or one for all.
        visible_pairs: (query token, key token) pairs that attend in one such layer, summed over `graphs`.
        coarse_pairs: How many of them are with keys of frames that are seen at a stride.
        dense_pairs: Those under dense attention.
    """

    layers: tuple[int, ...]
    covisibility: str
    graphs: tuple[GraphSummary, ...]
    visible_pairs: int
    coarse_pairs: int
    dense_pairs: int

    @classmethod
    def of(cls, planned: PlannedLayers) -> LayersReport:
        """Measure what some layers attended over; reads graphs from their device."""
        layouts = planned.layouts
        coarse = [layout.coarse_pairs if isinstance(layout, CoarseLayout) else 0 for layout in layouts]
        return cls(
            planned.layers,
            planned.covisibility,
            tuple(graph.summary() for graph in planned.graphs),
            planned.over_graphs([layout.visible_pairs for layout in layouts]),
            planned.over_graphs(coarse),
            planned.over_graphs([layout.num_tokens * layout.num_key_tokens for layout in layouts]),
        )

    def __str__(self) -> str:
        lines = ["graph: " + str(graph).replace("\n", "\n  ") for graph in self.graphs]
        density, at_a_stride = self.visible_pairs / self.dense_pairs, self.coarse_pairs / self.dense_pairs
        coarse = f" ({density - at_a_stride:.3g} in full, {at_a_stride:.3g} at a stride)" if self.coarse_pairs else ""
        return "\n".join([*lines, f"tokens: density {density:.3g}{coarse}, ideal speed-up {1 / density:.3g}x"])


@dataclass(frozen=True)
class PatchReport:
    """What a patch did; `str` of it is for people.

    Attributes:
        model: Name of the model's record.
        modules: Names of the patched attention modules.
        special_tokens: "dense" or "masked".
        calls_last_forward: Attention calls answered in the last forward; of one that raised nothing is told.
        calls_total: Attention calls answered since the patch, those that checkpointing ran again included.
        layers: What global layers of the last forward attended over, those together that agree; empty before the first.
        dense_modules: Names of attention modules that are not patched and read tokens of several frames, for others
            than tokens of frames: what they compute depends on all frames.
        backend: The backend that ran; None before the first forward.
        passed_over: Each better backend, or instruction set of the CPU, and why it did not run.
        step_seconds: Time spent on each step of the last forward that leads to the tables of its layouts, on the host:
            "look-up" (have these images come before?), "descriptors", "graph", "layout", "tables".
        inference: What the fused forward did; None if the patch was made without.
        chunks: How the last forward ran in chunks; None if it ran as one.
    """

    model: str
    modules: tuple[str, ...]
    special_tokens: str
    calls_last_forward: int
    calls_total: int
    layers: tuple[LayersReport, ...]
    dense_modules: tuple[str, ...]
    backend: str | None
    passed_over: dict[str, str]
    step_seconds: dict[str, float]
    inference: InferenceReport | None
    chunks: ChunksReport | None = None

    @property
    def planning_seconds(self) -> float:
        """Time spent on all of these steps."""
        return sum(self.step_seconds.values())

    @property
    def graphs(self) -> tuple[GraphSummary, ...]:
        """Summary of each graph of the last forward: one per sample, or one for all; where layers differ, of each."""
        return tuple(graph for layers in self.layers for graph in layers.graphs)

    @property
    def visible_pairs(self) -> int:
        """(query token, key token) pairs that attend in a global layer, summed over graphs; a mean if layers differ."""
        return self._in_one_layer([layers.visible_pairs for layers in self.layers])

    @property
    def dense_pairs(self) -> int:
        """The same under dense attention."""
        return self._in_one_layer([layers.dense_pairs for layers in self.layers])

    def _in_one_layer(self, pairs: list[int]) -> int:
        """Return the rounded mean over layers; a graph for all samples counts as often as there are in other layers."""
        if not pairs:
            return 0
        graphs = max(len(layers.graphs) for layers in self.layers)
        of_layers = [
            len(layers.layers) * count * graphs // len(layers.graphs)
            for layers, count in zip(self.layers, pairs, strict=True)
        ]
        return round(sum(of_layers) / sum(len(layers.layers) for layers in self.layers))

    @property
    def token_density(self) -> float | None:
        """Visible pairs / dense pairs of tokens; None before the first forward."""
        return self.visible_pairs / self.dense_pairs if self.dense_pairs else None

    @property
    def ideal_speedup(self) -> float | None:
        """Dense pairs / visible pairs of tokens: the speed-up of attention if time followed the work."""
        return self.dense_pairs / self.visible_pairs if self.visible_pairs else None

    def __str__(self) -> str:
        where = self.modules if len(self.modules) <= 3 else (self.modules[0], "...", self.modules[-1])
        lines = [
            f"{self.model}: {len(self.modules)} global attention modules patched ({', '.join(where)})",
            f"special tokens: {self.special_tokens}",
        ]
        if self.backend is None:
            return "\n".join([*lines, "no forward yet, or the last one raised"])
        lines.append(f"last forward: {self.calls_last_forward} calls answered ({self.calls_total} in total)")
        if self.chunks is not None:
            lines.append(str(self.chunks))
        if len(self.layers) == 1:
            lines.append(str(self.layers[0]))
        else:
            for layers in self.layers:
                lines.append(f"layers {_ranges(layers.layers)}: {layers.covisibility}")
                lines.append("  " + str(layers).replace("\n", "\n  "))
            lines.append(f"all layers: density {self.token_density:.3g}, ideal speed-up {self.ideal_speedup:.3g}x")
        if self.dense_modules:
            lines.append(f"dense over all frames, not patched: {', '.join(self.dense_modules)}")
        steps = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in self.step_seconds.items())
        lines.append(f"graph and layout: {1e3 * self.planning_seconds:.1f} ms ({steps})")
        if self.inference is not None:
            lines.append(str(self.inference))
        lines.append(f"backend: {self.backend}")
        lines.extend(f"  not {name}: {reason}" for name, reason in self.passed_over.items())
        return "\n".join(lines)


def _ranges(layers: tuple[int, ...]) -> str:
    """Return rising numbers as ranges: "0-3, 7"."""
    first = [layer for layer in layers if layer - 1 not in layers]
    last = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))
