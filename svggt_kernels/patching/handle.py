"""The handle of a patched model: what stands in where, and what ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import backends
from ..attention import choose_backend
from ..coarse import CoarseLayout
from ..compiling import uncompiled
from ..graph import AnyGraph
from ..inference.fused_forward import FusedForward
from ..layout import BlockLayout
from ..models import ForwardInputs
from ..models.wrappers import arguments_of
from ..user_warnings import warn
from .chunks.forward import ChunkedForward
from .forwards import Forward, Forwards, PlannedLayers
from .graph_attention import GraphAttention
from .interception import StandIn, StandIns
from .parts import FrameOrder, Part, UnknownAttention
from .plan import Planner
from .report import LayersReport, PatchReport


class Patch:
    """The handle of a patched model. `patch` makes it; leaving it as a context manager undoes it.

    A CUDA graph that captured a forward reads tables that the handle keeps, also after `undo()`: keep the handle for as
    long as the graph is replayed.

    Attributes:
        record: What is known about the model.
        modules: Names of the patched attention modules.
    """

    def __init__(
        self,
        root: nn.Module,
        path: str,
        attention: dict[str, nn.Module],
        planner: Planner,
        backend: str | None,
        own: FusedForward | None,
        chunks: ChunkedForward | None = None,
    ) -> None:
        def full(name: str) -> str:
            return f"{path}.{name}" if path else name

        self.record = planner.record
        self.modules = tuple(full(name) for name in attention)
        self._planner, self._backend, self._own, self._chunks = planner, backend, own, chunks
        name = path or type(root).__name__
        self._forwards = Forwards(name)
        modules = dict(zip(self.modules, attention.values(), strict=True))
        self._attention = GraphAttention(planner, self._forwards, modules, backend)
        parts: list[Part] = [self._attention] if own is None else [own, self._attention]
        unknown = {module: full(name) for name, module in self.record.unknown_attention(root).items()}
        parts.append(UnknownAttention(unknown, self._forwards, self.record.name))
        self._reorders = self.record.reorders_between and self.record.reorders_between(root)
        if self._reorders is not None:
            before, after = ((root.get_submodule(block), full(block)) for block in self._reorders)
            parts.append(FrameOrder(before, after, self._forwards))
        # The model's own comes last: it stands around what a part puts in the place of the same forward.
        sites = [site for part in parts for site in part.sites()]
        sites.append((root, name, self._run_model))
        if chunks is not None:
            sites.append((chunks.model, type(chunks.model).__name__, self._run_whole))
        self._stand_ins = StandIns(sites)
        self._stand_ins.install()
        self._installed = True
        self._last: Forward | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Patch:
        """Return the handle of a patched model, for example of a deep copy or of a model loaded from a file.

        Raises:
            ValueError: If the model is not patched.
        """
        for module in model.modules():
            stand_in = module.__dict__.get("forward")
            owner = getattr(getattr(stand_in, "around", None), "__self__", None)
            if isinstance(owner, Patch):
                return owner
        raise ValueError(f"{type(model).__name__} is not patched")

    def undo(self) -> None:
        """Take the patch out and leave no trace of it in the model.

        Raises:
            RuntimeError: If it was undone already, something else has replaced the forward of a patched module, or a
                forward is running.
        """
        if not self._installed:
            raise RuntimeError("this patch was undone already; patch(model) makes a new one")
        with self._forwards.turn("the patch cannot be undone now"):
            self._stand_ins.require_in_place("undo()")
            if awaiting := self._forwards.awaiting:
                warn(
                    f"the patch is undone before backward has run, and a reentrant checkpoint will run {min(awaiting)} "
                    f"and {len(awaiting) - 1} other modules again, dense now; call backward() first, then undo()",
                )
            self._stand_ins.remove()
            self._installed = False
            self._forwards.forget()
            self._planner.forget()

    @property
    def layers(self) -> tuple[PlannedLayers, ...]:
        """What each global layer attended over in the last forward, in the order in which they run."""
        forward = self._finished()
        return tuple(forward.of_layer(layer) for layer in range(len(self.modules)))

    @property
    def graphs(self) -> tuple[AnyGraph, ...]:
        """The graphs of the last forward, frames in the order of the images: one per sample, or one for all."""
        return self._of_all_layers().graphs

    @property
    def layouts(self) -> tuple[BlockLayout | CoarseLayout, ...]:
        """The layouts of the last forward, frames in the order of the model: one per sample, or one for all."""
        return self._of_all_layers().layouts

    @property
    def graph(self) -> AnyGraph:
        """The graph of the last forward, if all samples had the same."""
        return _only(self.graphs, "graphs")

    @property
    def layout(self) -> BlockLayout | CoarseLayout:
        """The layout of the last forward, if all samples had the same."""
        return _only(self.layouts, "layouts")

    def report(self) -> PatchReport:
        """Tell what is patched and what ran in the last forward; reads the graph from its device.

        Nothing ran if that forward has raised, or is running.
        """
        with self._forwards.pause() as paused:
            last = self._last if paused else None
            forward = last or Forward(ForwardInputs(None, None))
            own = None if last is None else self._own if forward.chunks is None else self._chunks
            chosen, passed_over = None, {}
            if forward.kind is not None:
                chosen = choose_backend(*forward.kind, self._backend)
                passed_over = backends.passed_over(*forward.kind, chosen, named=self._backend is not None)
            return PatchReport(
                model=self.record.name,
                modules=self.modules,
                special_tokens=self._planner.special_tokens(forward.layouts),
                calls_last_forward=sum(forward.answered.values()),
                calls_total=self._attention.calls,
                layers=tuple(LayersReport.of(planned) for planned in forward.planned),
                dense_modules=tuple(sorted(forward.dense)),
                backend=chosen,
                passed_over=passed_over,
                step_seconds=dict(forward.seconds),
                inference=None if own is None else own.report,
                chunks=forward.chunks,
            )

    def __repr__(self) -> str:
        state = "active" if self._installed else "undone"
        return f"Patch({self.record.name}, {len(self.modules)} modules, {state})"

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            self.undo()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def _finished(self) -> Forward:
        if self._last is None:
            raise RuntimeError(
                "there is no graph or layout before the first forward of the patched model, nor after one that raised"
            )
        return self._last

    def _of_all_layers(self) -> PlannedLayers:
        planned = self._finished().planned
        if len(planned) != 1:
            raise ValueError("the global layers of the last forward had different graphs; use handle.layers")
        return planned[0]

    @uncompiled(recursive=False)
    def _run_whole(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run the whole model, in chunks where that is asked for or one forward of all frames does not fit."""
        assert self._chunks is not None
        output, forward = self._chunks.around(stand_in, args, kwargs, self._aside)
        if forward is not None:
            self._last = forward
            self._attention.calls += sum(forward.answered.values())
        return output

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Inside this context this thread runs the model as it is without the patch, and no other runs it."""
        with self._forwards.turn("it cannot be called now"), self._stand_ins.passing():
            self._last = None
            yield

    @uncompiled(recursive=False)
    def _run_model(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run one forward of the model and check that every patched attention was answered in it."""
        with self._forwards.turn("it cannot be called now"):
            self._last = None
            try:
                forward = self._begin(stand_in.module, args, kwargs)
                with self._forwards.run(forward):
                    output = stand_in.original(*args, **kwargs)
            finally:
                if self._own is not None:
                    self._own.end()
            missed = [name for name in self.modules if not forward.answered[name]]
            if missed:
                raise RuntimeError(
                    f"{len(missed)} of {len(self.modules)} patched modules were not called in this forward of "
                    f"{stand_in.name}: {', '.join(missed)}. Patch the modules that it calls: "
                    "patch(model, modules=[...])"
                )
            self._last = forward
        return output

    @uncompiled(recursive=True)
    def _begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
        """Read the arguments of a forward, and plan what can be planned before it runs."""
        inputs = self.record.read(root, arguments_of(root, args, kwargs))
        forward = Forward(inputs, recomputable=torch.is_grad_enabled(), reorders=self._reorders is not None)
        self._planner.begin(forward)
        if self._own is not None:
            self._own.key_parts = self._planner.key_parts(inputs)
            self._own.begin(inputs.images, inputs.tokens_per_frame, self._planner.describes_tokens, self._attention)
        return forward


def _only(items: tuple[Any, ...], name: str) -> Any:
    if len(items) != 1:
        raise ValueError(f"the last forward had {len(items)} {name}, one per sample; use handle.{name}")
    return items[0]
