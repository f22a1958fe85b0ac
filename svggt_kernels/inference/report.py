"""What the forward of our own did in the last forward of a patched model."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import memory
from .verification import Verification


@dataclass(frozen=True)
class InferenceReport:
    """What the forward of our own did in the last forward.

    Attributes:
        reason: Why it did not run; None if it did.
        layers_kept: The layers whose outputs are kept; None for all.
        verification: Its comparison with the model's own forward, also one of an earlier patch of the model; None if
            there was none.
        within_frames: What computed the attention within frames: names of backends, or "pytorch".
        heads: The DPT heads, by name: None if the head ran fused, or why it did not.
        memory: How the forward kept to its budget; None without one.
    """

    reason: str | None
    layers_kept: tuple[int, ...] | None
    verification: Verification | None = None
    within_frames: tuple[str, ...] = ()
    heads: dict[str, str | None] = field(default_factory=dict)
    memory: memory.Plan | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"not fused, attention alone is sparse: {self.reason}"
        lines = [f"fused forward, attention within frames by {' and '.join(self.within_frames) or 'none'}"]
        if self.verification is not None:
            found = self.verification
            lines.append(
                f"  verified: {found.ratio:.2f} of the error of the model's own forward, {found.seconds:.1f} s, "
                f"{found.gib:.1f} GiB"
            )
        for name, reason in self.heads.items():
            lines.append(f"  {name}: {'fused' if reason is None else f'runs as it is: {reason}'}")
        if self.layers_kept is not None:
            lines.append(f"  layer outputs kept: {', '.join(map(str, self.layers_kept))}")
        if self.memory is not None:
            lines.append(f"  memory: {self.memory}")
        return "\n".join(lines)
