"""What a patch did, for programs and for people."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph import GraphSummary
from ..inference.report import InferenceReport


@dataclass(frozen=True)
class PatchReport:
    """What a patch did; `str` of it is for people.

    Attributes:
        model: Name of the model's record.
        modules: Names of the patched attention modules.
        special_tokens: "dense" or "masked".
        calls_last_forward: Attention calls answered in the last forward; of one that raised nothing is told.
        calls_total: Attention calls answered since the patch, those that checkpointing ran again included.
        graphs: Summary of each graph of the last forward: one per sample, or one for all.
        visible_pairs: (query token, key token) pairs that attend, summed over `graphs`.
        dense_pairs: The same under dense attention.
        dense_modules: Names of attention modules that are not patched and read tokens of several frames, for others
            than tokens of frames: what they compute depends on all frames.
        backend: The backend that ran; None before the first forward.
        passed_over: Each better backend, or instruction set of the CPU, and why it did not run.
        step_seconds: Time spent on each step of the last forward that leads to the tables of its layouts, on the host:
            "look-up" (have these images come before?), "descriptors", "graph", "layout", "tables".
        inference: What the fused forward did; None if the patch was made without.
    """

    model: str
    modules: tuple[str, ...]
    special_tokens: str
    calls_last_forward: int
    calls_total: int
    graphs: tuple[GraphSummary, ...]
    visible_pairs: int
    dense_pairs: int
    dense_modules: tuple[str, ...]
    backend: str | None
    passed_over: dict[str, str]
    step_seconds: dict[str, float]
    inference: InferenceReport | None

    @property
    def planning_seconds(self) -> float:
        """Time spent on all of these steps."""
        return sum(self.step_seconds.values())

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
        lines.extend("graph: " + str(graph).replace("\n", "\n  ") for graph in self.graphs)
        lines.append(f"tokens: density {self.token_density:.3g}, ideal speed-up {self.ideal_speedup:.3g}x")
        if self.dense_modules:
            lines.append(f"dense over all frames, not patched: {', '.join(self.dense_modules)}")
        steps = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in self.step_seconds.items())
        lines.append(f"graph and layout: {1e3 * self.planning_seconds:.1f} ms ({steps})")
        if self.inference is not None:
            lines.append(str(self.inference))
        lines.append(f"backend: {self.backend}")
        lines.extend(f"  not {name}: {reason}" for name, reason in self.passed_over.items())
        return "\n".join(lines)
