"""The forward of a patched model, run in chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ...compiling import uncompiled
from ...graph import AnyGraph, closed_core
from ...inference.fused_forward import Precision
from ...inference.memory import GIB, BudgetTooSmall, MemoryBudget
from ...inference.report import InferenceReport
from ...models import ForwardInputs
from ...models.wrappers import arguments_of, unwrapped
from ...sources import SOURCES, Core, PatchSimilarity, Scene, TokenSimilarity
from ...streams import is_capturing
from ..forwards import Forward
from ..interception import StandIn
from ..plan import Planner, graph_of
from .cameras import CameraHeads
from .layouts import ClosedFrames
from .report import ChunksReport
from .results import WholeResult
from .session import CHUNK, Session

TOKENS = "camera tokens of "
"""Before the name of a camera head, what its camera tokens are called among the outputs of frames."""


class ChunkedForward:
    """Runs a model on its closed frames, and on all others in chunks, as `open_scene` does; each sample by itself.

    Args:
        model: The model that was given to `patch`, with its heads.
        planner: Finds the graphs of its forwards.
        chunk: Frames of a chunk; None for as many as the budget allows, and to run so only where it must be.
        fused: As in `patch`.
        precision: As in `patch`.
        backend: As in `patch`.
        memory_budget: As in `patch`, of the core's run and of each chunk's, with the images and results of all frames.

    Attributes:
        model: The module whose forward is run in chunks.
        chunk: Frames of a chunk, if that was given.

    Raises:
        ValueError: If the graphs of the planner are not those of a closed core, or the model is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        planner: Planner,
        chunk: int | None,
        *,
        fused: bool | None,
        precision: Precision,
        backend: str | None,
        memory_budget: MemoryBudget,
    ) -> None:
        self.model, self.planner, self.chunk = unwrapped(model), planner, chunk
        self._settings: dict[str, Any] = {
            "fused": fused,
            "precision": precision,
            "backend": backend,
            "memory_budget": memory_budget,
        }
        if (reason := not_closed(planner)) is not None:
            raise ValueError(f"in chunks frames see a core and themselves, {reason}; give a Core, or leave chunk out")
        self._heads = CameraHeads(self.model)
        self._places: dict[str, dict[str, int]] = {}
        self._over: dict[str, Callable[[Tensor], list[Tensor]]] = {}
        self._derived: dict[tuple[Any, ...], bool] = {}
        self._result: WholeResult | None = None
        self._session: Session | None = self._new_session()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "_result": None, "_over": {}}

    def _new_session(self) -> Session:
        return Session(
            self.model, feed=self._feed, read=self._read, parts=[self._heads], within_call=True, **self._settings
        )

    @property
    def session(self) -> Session:
        """What runs the model; a copy makes its own."""
        if self._session is None:
            self._session = self._new_session()
        return self._session

    @uncompiled(recursive=False)
    def around(
        self,
        stand_in: StandIn,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        aside: Callable[[], AbstractContextManager[None]],
    ) -> tuple[Any, Forward | None]:
        """Run one forward of the model; return what it returns, and what it was if it ran in chunks.

        Args:
            stand_in: Runs one forward of all frames.
            args: Arguments of the model's forward.
            kwargs: Likewise.
            aside: Inside this context this thread runs the model as it is without the patch; raises where a forward
                runs in another thread.
        """
        if self.chunk is None:
            try:
                return stand_in.original(*args, **kwargs), None
            except BudgetTooSmall as error:
                too_small = error.with_traceback(None)  # which would keep what the forward held
            reason = f"one forward needs {too_small.least:.1f} GiB, memory_budget is {too_small.budget:.2f}"
        else:
            too_small, reason = None, f"chunk={self.chunk}"
        try:
            with aside():
                done = self.run(args, kwargs, reason)
        except ValueError as error:
            if too_small is None:
                raise
            raise ValueError(f"{too_small}; nor can it run in chunks: {error}") from error
        return (stand_in.original(*args, **kwargs), None) if done is None else done

    @property
    def report(self) -> InferenceReport | None:
        """What the fused forward did in the last run."""
        return self.session.inference

    def _feed(self, frames: Tensor) -> Tensor:
        assert self._result is not None
        self._heads.runs.clear()
        return self._result.feed(frames)

    def _read(self, result: Any, frames: int) -> dict[str, Tensor]:
        """Read a result; beside its tensors also the camera tokens of the heads that gave some of them."""
        assert self._result is not None
        named = self._result.read(result, frames)
        self._places = self._heads.places(self._result.leaves)
        for name, run in self._heads.runs.items():
            if run is not None and name in self._places:
                named[TOKENS + name], self._over[name] = run.tokens[0], run.over
        self._heads.runs.clear()
        self._result.leaves.clear()
        return named

    def _joined(self, core: Tensor, outputs: dict[str, Tensor]) -> dict[str, dict[str, int]]:
        """Return the camera heads that run over all frames at once, and which outputs are theirs.

        They are those that give the core, by its camera tokens alone, what they gave in its run, if no other output
        follows from theirs: such an output would stay as the chunks give it.

        Args:
            core: Its frames.
            outputs: Theirs.
        """
        session, places = self.session, self._places
        if not places:
            return {}
        key = core.shape[-2:], session.dtype
        if key not in self._derived:
            plain, disturbed = self._last_again(core, False), self._last_again(core, True)
            others = set(plain) - {leaf for of_head in places.values() for leaf in of_head}
            self._derived[key] = not all(session.agree(plain[name], disturbed[name]) for name in others)
        if self._derived[key]:
            return {}
        joined = {}
        for head, leaves in places.items():
            try:
                results = self._over[head](outputs[TOKENS + head][None])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a head that reads more may raise anything without
                continue
            if all(session.agree(outputs[leaf], results[place][0]) for leaf, place in leaves.items()):
                joined[head] = leaves
        return joined

    def _last_again(self, core: Tensor, disturbed: bool) -> dict[str, Tensor]:
        """Return the outputs of the last frame of the core in a chunk."""
        self._heads.disturbed = disturbed
        try:
            return self.session.run_chunk(core[:1], core[-1:])
        finally:
            self._heads.disturbed = False

    @uncompiled(recursive=True)
    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], reason: str) -> tuple[Any, Forward] | None:
        """Run one forward of the model as it is; None if all frames are closed, so that nothing is gained.

        Args:
            args: Arguments of the model's forward.
            kwargs: Likewise.
            reason: Why it runs in chunks.

        Raises:
            ValueError: If gradients are on, the arguments are more than images, the graph is not that of a closed core
                with the reference frame in it, or the model cannot be opened (see `open_scene`).
            RuntimeError: If a CUDA graph captures it.
        """
        session, images = self.session, self._images(args, kwargs)
        if torch.is_grad_enabled():
            raise ValueError(
                "in chunks a model runs without gradients; call it inside torch.no_grad(), or leave chunk out"
            )
        if is_capturing(session.device):
            raise RuntimeError(
                "a CUDA graph cannot capture chunks, which read who sees whom from the device; leave chunk out"
            )
        session.follow_autocast()
        self._result = WholeResult(images, type(self.model).__name__)
        forward = Forward(ForwardInputs(images, images.shape[1]))
        self.planner.begin(forward)
        try:
            with torch.no_grad():
                graphs = [self._graph(forward, sample) for sample in range(len(images))]
                return self._run(forward, images, graphs, reason)
        finally:
            session.forget()
            self._heads.runs.clear()
            self._over.clear()
            self._result = None

    def _run(self, forward: Forward, images: Tensor, graphs: list[AnyGraph], reason: str) -> tuple[Any, Forward] | None:
        session, whole = self.session, self._result
        assert whole is not None
        of_samples = [self._closed(graph) for graph in graphs]
        if all(closed.count == images.shape[1] for _, closed in of_samples):
            return None
        present = images.nbytes if images.device == session.device else 0
        answered, chunks, kept, chunk = session.attention.answered, 0, 0.0, self.chunk or CHUNK
        joined: dict[str, dict[str, int]] = {}
        for sample, (places, closed) in enumerate(of_samples):
            frames, places = images[sample], places.to(images.device)
            core, others = frames[places], _others(places, len(frames))
            session.hold(present + whole.nbytes)
            outputs = session.run_core(core, closed)
            whole.put(sample, places, outputs)
            session.hold(present + whole.nbytes)
            kept = max(kept, session.attention.kept_bytes / GIB)
            chunk = self.chunk or session.frames_of_chunk(core) or CHUNK
            joined = self._joined(core, outputs)
            del outputs
            for some in others.split(chunk) if len(others) else ():
                whole.put(sample, some, session.run_chunk(core[:1], frames[some]))
                chunks += 1
            for head, leaves in joined.items():
                results = self._over[head](whole.of_sample(TOKENS + head, sample)[None])
                every = torch.arange(len(frames), device=places.device)
                whole.put(sample, every, {leaf: results[place][0] for leaf, place in leaves.items()})
        assert session.inputs is not None and session.attention.kind is not None
        inputs, device = session.inputs, session.attention.kind[0]
        self.planner.plan_graphs(forward, graphs, session.attention.per_frame, inputs, device)
        forward.kind = session.attention.kind
        forward.answered["in chunks"] = session.attention.answered - answered
        _, closed = max(of_samples, key=lambda of_sample: of_sample[1].count)
        closed_over_core = tuple(
            name for name in session.attention.followers if not any(name.startswith(f"{head}.") for head in joined)
        )
        forward.dense = set(session.attention.followers) - set(closed_over_core)
        forward.chunks = ChunksReport(reason, chunk, chunks, closed.full, closed.coarse, kept, closed_over_core)
        forward.inputs = ForwardInputs(None, images.shape[1])
        return whole.whole(), forward

    def _images(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the images `[B, S, 3, H, W]` of a call.

        Raises:
            ValueError: If it has other arguments.
        """
        arguments = arguments_of(self.model, args, dict(kwargs))
        images = [value for value in arguments.values() if isinstance(value, Tensor) and value.dim() in (4, 5)]
        more = [
            name
            for name, value in arguments.items()
            if value is not None and not isinstance(value, Tensor) and self.session.options.get(name) != value
        ]
        more += [name for name, value in arguments.items() if isinstance(value, Tensor) and value.dim() not in (4, 5)]
        if len(images) != 1 or images[0].shape[-3] != 3 or more:
            given = ", ".join(f"{name}: {_described(value)}" for name, value in arguments.items())
            raise ValueError(
                f"in chunks {type(self.model).__name__} is called with images [B, S, 3, H, W] alone, got "
                f"{given or 'none'}; leave out what looks at some frames only, or chunk"
            )
        return images[0] if images[0].dim() == 5 else images[0][None]

    def _graph(self, forward: Forward, sample: int) -> AnyGraph:
        """Return who sees whom in a sample."""
        images, source, record = forward.inputs.images, self.planner.source, self.planner.record
        assert source is not None
        frames = images[sample]
        scene = Scene(
            len(frames),
            images=frames,
            images_are_normalised=record.images_are_normalised,
            tokens=lambda: self._tokens(frames),
            reference_frame=record.reference_frame,
            word_sums=forward.word_sums[sample] if forward.word_sums else None,
            sample=(sample, len(images)),
            step=forward.step,
        )
        return graph_of(source, scene)

    def _tokens(self, frames: Tensor) -> Tensor:
        """Return what describes frames by the model's tokens, as these are in one forward."""
        similarity = getattr(self.planner.source, "similarity", None)
        reader = similarity if isinstance(similarity, TokenSimilarity | PatchSimilarity) else None
        size = min(self.chunk or CHUNK, CHUNK)

        def described(some: Tensor, first: bool) -> Tensor:
            reference = frames[: 0 if first else 1]
            return self.session.describe(reference, some, lambda x: x if reader is None else reader.read(x))

        return torch.cat([described(some, place == 0) for place, some in enumerate(frames.split(size))])

    def _closed(self, graph: AnyGraph) -> tuple[Tensor, ClosedFrames]:
        """Return the closed frames of a graph, the reference frame first, and how many of them are seen how.

        Raises:
            ValueError: If frames see something else besides, or the reference frame is not in the core.
        """
        closed = closed_core(graph)
        if closed is None:
            raise ValueError(
                "in chunks all frames see a closed core and themselves, and nothing besides, but the graph of this "
                "forward says otherwise; give a Core or CovisibilityGraph.core, or leave chunk out"
            )
        core = closed.core
        if (reference := self.planner.record.reference_frame) is not None:
            if not bool((core == reference).any()):
                raise ValueError(
                    f"in chunks the core must hold frame {reference}, the reference frame of "
                    f"{self.planner.record.name}, got {core.tolist()}"
                )
            core = torch.cat([core[core == reference], core[core != reference]])
        return torch.cat([core, closed.coarse]), ClosedFrames(len(core), len(closed.coarse), closed.stride)


def _others(places: Tensor, frames: int) -> Tensor:
    """Return the places of all other frames, rising."""
    rest = torch.ones(frames, dtype=torch.bool, device=places.device)
    rest[places] = False
    return rest.nonzero()[:, 0]


def _described(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def not_closed(planner: Planner) -> str | None:
    """Return why the graphs of a planner cannot be those of a closed core, or None if they may be."""
    source, record = planner.source, planner.record
    if source is None:
        return "but layers differ"
    if planner.dense_special:
        return 'but special_tokens="dense" lets special tokens see everything'
    if record.causal:
        return f"but {record.name} is causal, so frames before a frame of the core do not see it"
    if isinstance(source, Core):
        is_open = source.nearest > 0 or source.coarse == "all"
    else:
        is_open = isinstance(source, tuple(SOURCES.values()))
    return f"but covisibility is {source.label}" if is_open else None
