"""The forwards of one patched model: one runs at a time, and backward may run parts of earlier ones again."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from ..coarse import CoarseLayout
from ..compiling import uncompiled
from ..graph import AnyGraph
from ..layout import BlockLayout
from ..models import ForwardInputs
from .chunks.report import ChunksReport
from .masks import CheckedMasks

FORWARDS_KEPT = 16
"""Forwards that activation checkpointing can run again in their backward."""


@dataclass(frozen=True, eq=False)
class PlannedLayers:
    """What some global layers of one forward attend over.

    Attributes:
        layers: Their numbers, from 0, in the order in which the model runs them.
        covisibility: How their graphs were made, in words.
        graphs: Who sees whom, frames in the order of the images; one per sample or one for all.
        layouts: The same over tokens, frames in the order of the model.
    """

    layers: tuple[int, ...]
    covisibility: str
    graphs: tuple[AnyGraph, ...]
    layouts: tuple[BlockLayout | CoarseLayout, ...]

    def over_graphs(self, of_layouts: list[int]) -> int:
        """Return the sum over graphs of what is told for each layout; samples may share their graph or their layout."""
        return sum(of_layouts) * len(self.graphs) // len(of_layouts)


@dataclass(eq=False)
class Forward:
    """One forward of a patched model.

    Attributes:
        inputs: What the record read from its arguments.
        recomputable: Whether gradients were on, so that checkpointing may run parts of it again.
        reorders: Whether the model reorders its frames inside.
        planned: What its global layers attend over, those that agree together; empty until the first global attention.
        seconds: Time spent on each step towards both, on the host.
        answered: Calls answered, by module.
        dense: Names of modules that are not patched and read tokens of several frames.
        num_images: Frames of all samples together; None if not known yet.
        tokens_per_frame: Tokens of each.
        kind: Device, dtype and head size of those calls.
        before: Some values of each frame's tokens before the model reordered its frames.
        after: The same values after.
        word_sums: Sums that tell the content of each sample's images, where a graph is kept for it.
        masks: The masks of its attention that were checked, by the layouts that they were checked for.
        awaiting: Names of modules that ran without gradients though these were on: backward will run them again.
        chunks: How it ran in chunks; None if it ran as one.
        nodes: Numbers of the autograd nodes made in it.
        caller: The thread and the backward that run it.
    """

    inputs: ForwardInputs
    recomputable: bool = False
    reorders: bool = False
    planned: tuple[PlannedLayers, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    answered: Counter[str] = field(default_factory=Counter)
    dense: set[str] = field(default_factory=set)
    num_images: int | None = None
    tokens_per_frame: int = 0
    kind: tuple[torch.device, torch.dtype, int] | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    word_sums: list[Tensor] = field(default_factory=list)
    masks: dict[PlannedLayers, CheckedMasks] = field(default_factory=dict)
    awaiting: set[str] = field(default_factory=set)
    chunks: ChunksReport | None = None
    nodes: range = range(0)
    caller: tuple[int, int] = (0, -1)

    def __post_init__(self) -> None:
        images, tokens = self.inputs.images, self.inputs.tokens_per_frame
        if tokens is not None and isinstance(images, Tensor) and images.dim() == 5:
            self.num_images, self.tokens_per_frame = images.shape[0] * images.shape[1], tokens

    def spans_frames(self, sequences: int, tokens: int) -> bool:
        """Whether so many sequences, of so many tokens each, hold several frames each."""
        return self.num_images is not None and sequences < self.num_images and tokens > self.tokens_per_frame

    @property
    def layouts(self) -> tuple[BlockLayout | CoarseLayout, ...]:
        """The layouts of all layers, each once."""
        return tuple(layout for planned in self.planned for layout in planned.layouts)

    def of_layer(self, layer: int) -> PlannedLayers:
        """Return what a global layer attends over."""
        return next(planned for planned in self.planned if layer in planned.layers)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time spent inside to that of a step."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Forwards:
    """Says which forward a call of a patched module belongs to.

    Activation checkpointing runs a module again when backward comes to a node that was made in the module's first run.
    Autograd numbers its nodes in the order in which a thread makes them, so the number of that node tells the forward,
    whatever the module computes. A copy knows of no forward.

    Args:
        name: What messages call the model.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._turn = threading.Lock()
        self._running: Forward | None = None
        self._history: deque[Forward] = deque(maxlen=FORWARDS_KEPT)
        self._all_alike = True

    def __reduce__(self) -> tuple[Any, ...]:
        return Forwards, (self.name,)

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Nothing else runs inside this context that needs it too: a forward, or to undo the patch.

        Raises:
            RuntimeError: If something does; `what` says what cannot be done now.
        """
        with self.pause() as paused:
            if not paused:
                raise RuntimeError(
                    f"{self.name} is running already, so {what}; a patched model runs one forward at a time. "
                    "Give each thread its own copy.deepcopy(model)"
                )
            yield

    @contextmanager
    def pause(self) -> Iterator[bool]:
        """No forward begins inside this context; tells whether none runs, and waits for none."""
        paused = self._turn.acquire(blocking=False)
        try:
            yield paused
        finally:
            if paused:
                self._turn.release()

    @contextmanager
    def run(self, forward: Forward) -> Iterator[None]:
        """Run one forward inside this context, which needs a turn."""
        first, forward.caller = torch.autograd._get_sequence_nr(), _caller()
        self._running = forward
        try:
            yield
        finally:
            self._running = None
            forward.masks.clear()
        if forward.recomputable:
            forward.nodes = range(first, torch.autograd._get_sequence_nr())
            self._all_alike &= not self._history or self._history[-1].layouts == forward.layouts
            self._history.append(forward)

    def note(self, module: str) -> None:
        """Note that a module attends: in a first run that backward will repeat, or in that repetition."""
        running = self.running
        if running is None:
            first = next((forward for forward in self._history if module in forward.awaiting), None)
            if first is not None:
                first.awaiting.remove(module)
        elif running.recomputable and not torch.is_grad_enabled():
            running.awaiting.add(module)

    @property
    def awaiting(self) -> set[str]:
        """Names of the modules that backward has still to run again, as reentrant checkpoints make it do."""
        return set().union(*(forward.awaiting for forward in self._history))

    def forget(self) -> None:
        """Drop the forwards kept."""
        self._history.clear()

    @property
    def running(self) -> Forward | None:
        """The forward that the caller is in; none while backward, or another thread, runs a part of another one."""
        forward = self._running
        return forward if forward is not None and forward.caller == _caller() else None

    def recomputed(self, module: str) -> Forward:
        """Return the forward of which backward runs a part again.

        Args:
            module: What messages call the part.

        Raises:
            RuntimeError: If no backward runs, or the forward is not known any more.
        """
        node = _node()
        if node is None or not self._history:
            raise RuntimeError(
                f"{module} was called outside a forward of {self.name}, where its frames are not known; call "
                f"{self.name} instead, or patch the module that you call: patch(module, modules=[...])"
            )
        if self._all_alike:
            return self._history[-1]
        found = [forward for forward in self._history if node._sequence_nr() in forward.nodes]
        # Threads number their nodes each by itself.
        if not found or any(forward.layouts != found[0].layouts for forward in found):
            which = "one of several threads, it is not known which" if found else f"none of the last {FORWARDS_KEPT}"
            raise RuntimeError(
                f"activation checkpointing runs {module} again for a forward that is {which}; run backward sooner, in "
                "the order of the forwards, or give one covisibility graph for all forwards"
            )
        return found[0]


@uncompiled(recursive=True)
def _caller() -> tuple[int, int]:
    """Return the thread and the backward (-1 if none) that the caller is in."""
    return threading.get_ident(), torch._C._current_graph_task_id()


def _node() -> Any:
    """Return the node of a first run at which backward is, or None.

    A reentrant checkpoint makes nodes in its backward and runs another backward over those; the node that it began at
    is in the outermost such call.
    """
    node: Any = torch._C._current_autograd_node()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            node = frame.f_locals["ctx"]
        frame = frame.f_back
    return node
