"""One model, opened for the core of a scene: the forward of the core, and forwards of chunks that attend to it."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...compiling import uncompiled
from ...graph.arguments import integer
from ...inference import memory
from ...inference.fused_forward import FusedForward, Precision
from ...inference.memory import MemoryBudget
from ...inference.proofs import FRAMES as VERIFIED_FRAMES
from ...inference.report import InferenceReport
from ...models import ForwardInputs, find_model
from ...models.wrappers import arguments_of, each_once
from ..forwards import Forwards
from ..interception import StandIn, StandIns
from ..order import frame_order
from ..parts import FrameOrder, Part
from .attention import CoreAttention, Described, Run
from .budget import Budget
from .layouts import ClosedFrames

CHUNK = 32
"""Frames of a chunk, unless told otherwise."""

TF32_EPS = 2.0**-10
"""Of TensorFloat-32, in which CUDA may compute products and convolutions of float32."""

Outputs = dict[str, Tensor]
"""Named outputs of frames, `[n, ...]`."""


class Session:
    """Runs a model on the core of a scene and on chunks of further frames.

    The model is as it was before and after each forward: what stands in for its attention is there only meanwhile.

    Args:
        model: The model.
        feed: Turns frames `[S, 3, H, W]` in [0, 1] into the argument of its forward; None as its record says.
        read: Reads the result of its forward of so many frames into named tensors `[S, ...]`; None for `read_frames`.
        fused: As in `patch`.
        precision: As in `patch`.
        backend: As in `patch`.
        memory_budget: What a forward may allocate on a CUDA device in all, see `Budget`; None: whatever it takes.
        parts: Further parts that stand in for modules while it runs.
        within_call: Whether it runs within a call of the model: its own hooks have run then, on frames that are taken
            as they are.

    Attributes:
        record: What is known about the model.
        autocast: Whether it is on, and its dtype: those of the time when the session was made.
        options: Arguments of its forward by which its first frame is the reference frame.
        inputs: What its record read of the last run of the core.
        budget: Keeps to the memory budget, if there is one.
        attention: Holds what is kept of the core.

    Raises:
        ValueError: If no record knows the model, or an argument has no meaning.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        feed: Callable[[Tensor], Any] | None = None,
        read: Callable[[Any, int], Outputs] | None = None,
        fused: bool | None = None,
        precision: Precision = "upstream",
        backend: str | None = None,
        memory_budget: MemoryBudget = None,
        parts: Sequence[Part] = (),
        within_call: bool = False,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "model": model,
            "feed": feed,
            "read": read,
            "fused": fused,
            "precision": precision,
            "backend": backend,
            "memory_budget": memory_budget,
            "parts": parts,
            "within_call": within_call,
        }
        memory.check(memory_budget)
        if memory_budget is not None and fused is False:
            raise ValueError("memory_budget is kept by the fused forward; leave fused=None, or give True")
        self.model, self._within_call = model, within_call
        self.record, path, self.root = find_model(model)
        self.reference = self.record.reference_frame is not None
        runnable = self.record.runnable
        self._feed: Callable[[Tensor], Any] = feed or (one_sample if runnable is None else runnable.feed)
        self._read: Callable[[Any, int], Outputs] = read or read_frames
        accepted = inspect.signature(type(model).forward).parameters
        self.options = {name: value for name, value in self.record.first_is_reference.items() if name in accepted}

        def full(name: str) -> str:
            return f"{path}.{name}" if path else name

        attention = each_once(self.record.global_attention(self.root))
        followers = {} if self.record.followers is None else each_once(self.record.followers(model))
        self.attention = CoreAttention(
            self.record, {full(name): module for name, module in attention.items()}, followers, backend
        )
        self._own: FusedForward | None = None
        if fused is not False:
            self._own = FusedForward(
                model,
                path,
                tuple(attention.values()),
                fused=fused if memory_budget is None else True,
                precision=precision,
                keep="read",
                backend=backend,
                memory_budget=memory_budget,
            )
        self.budget: Budget | None = None
        if self._own is not None and memory_budget is not None:
            self.budget = Budget(self._own, self.attention, memory_budget)
        sites = [] if self._own is None else list(self._own.sites())
        sites += self.attention.sites()
        self._reorders = self.record.reorders_between and self.record.reorders_between(self.root)
        if self._reorders is not None:
            before, after = ((self.root.get_submodule(block), full(block)) for block in self._reorders)
            sites += FrameOrder(before, after, cast(Forwards, self)).sites()  # which asks for `running` alone
        sites += [site for part in parts for site in part.sites()]
        # The model's own comes last: it stands around what a part puts in the place of the same forward.
        self._stand_ins = StandIns([*sites, (self.root, path or type(self.root).__name__, self._run_root)])
        self._turn = threading.Lock()
        self._thread: int | None = None
        self.inputs: ForwardInputs | None = None
        self._runs_fused = False
        self.follow_autocast()

    def follow_autocast(self) -> None:
        """Compute from now on in the dtype that autocast has at this moment."""
        device = self._parameter.device.type
        self.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def forget(self) -> None:
        """Drop what is kept of the core."""
        self.attention.kept.clear()
        self.attention.closed = None

    def hold(self, held: int) -> None:
        """Count bytes that the caller holds on the device as part of the memory budget, if there is one."""
        if self.budget is not None:
            self.budget.held = held

    def again(self) -> Session:
        """Return a new session of the same model and settings, for another core."""
        session = Session(**self._arguments)
        session.autocast = self.autocast
        return session

    @property
    def _parameter(self) -> Tensor:
        return next(x for x in self.model.parameters() if x.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is computed: autocast's, or the model's."""
        return self.autocast[1] if self.autocast[0] else self._parameter.dtype

    def frame_size(self, long_side: int | None) -> tuple[int, int]:
        """Return the pixels of the longer side of photos, as given or usual for the model, and of its patch.

        Raises:
            TypeError: If it is not an integer.
            ValueError: If it is less than a patch.
        """
        runnable, patch_size = self.record.runnable, getattr(self.root, "patch_size", None)
        usual = (518, 14) if runnable is None else (runnable.long_side, runnable.patch_size)
        patch = patch_size if isinstance(patch_size, int) else usual[1]
        long_side = usual[0] if long_side is None else integer("long_side", long_side, 0)
        if long_side < patch:
            raise ValueError(f"long_side must be at least one patch of {patch} pixels, got {long_side}")
        return long_side, patch

    @property
    def eps(self) -> float:
        """How far apart neighbouring numbers near 1 are, in the coarsest dtype that computes."""
        values = [torch.finfo(self.dtype).eps, torch.finfo(self._parameter.dtype).eps]
        precisions = (
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        )
        if self.device.type == "cuda" and self._parameter.dtype == torch.float32 and "tf32" in precisions:
            values.append(TF32_EPS)
        return max(values)

    @property
    def inference(self) -> InferenceReport | None:
        """What the fused forward did in the last run; None with `fused=False`."""
        return None if self._own is None else self._own.report

    @property
    def running(self) -> Run | None:
        """The forward that runs, or None."""
        return self.attention.run

    def run_core(self, frames: Tensor, closed: ClosedFrames | None = None) -> Outputs:
        """Run the core, keep its keys and values, and return its outputs.

        Args:
            frames: `[K, 3, H, W]` in [0, 1], the model's reference frame first, those that are seen at a stride last.
            closed: How many of them are seen how; None for all in full.

        Raises:
            ValueError: If the model does something across frames that does not follow a core, there is one frame in
                full, or frames cannot be seen at a stride.
        """
        closed = ClosedFrames(len(frames)) if closed is None else closed
        self.attention.kept.clear()
        self.attention.closed = closed
        if closed.full < 2:
            raise ValueError(
                f"the core must hold at least 2 frames in full, got {closed.full}; give more, or run the model itself "
                "on one frame alone"
            )
        if closed.coarse and self.record.causal:
            raise ValueError(
                f"frames of a causal model ({self.record.name}) must be seen in full; give a Core without `coarse`"
            )
        run = Run(len(frames))
        outputs = self._forward(frames, run)
        self.inputs = replace(run.inputs, images=None)
        self._runs_fused = self._own is not None and self._own.report.reason is None
        self._test(frames[: closed.full], {name: tensor[: closed.full] for name, tensor in outputs.items()})
        return outputs

    def frames_of_chunk(self, core_frames: Tensor) -> int | None:
        """Return how many further frames run together within the memory budget, after the core; None without one."""
        if self.budget is None or self.inputs is None or self.inputs.tokens_per_frame is None:
            return None
        itemsize = self._parameter.itemsize
        return self.budget.frames_of_chunk(core_frames.shape, itemsize, self.inputs.tokens_per_frame, self.device)

    def run_chunk(self, reference: Tensor, frames: Tensor) -> Outputs:
        """Return the outputs of further frames.

        Args:
            reference: The first frame of the core, `[1, 3, H, W]`: models whose first frame sets the axes run it again,
                but for the fused forward, which is told that it is not there.
            frames: `[n, 3, H, W]` in [0, 1].
        """
        return self._run_chunk(reference, frames, (True,) * len(frames))

    def describe(self, reference: Tensor, frames: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what is read of the patch tokens of frames as they enter the first attention across frames.

        Args:
            reference: The first of all frames, `[1, 3, H, W]`, which models whose first frame sets the axes run too;
                none, `[0, 3, H, W]`, where `frames` begins with it.
            frames: `[n, 3, H, W]` in [0, 1].
            read: What is read of these tokens, `[n, P, C]`.
        """
        first = len(reference) if self.reference else 0
        both = torch.cat([reference.to(frames), frames]) if first else frames
        try:
            self._forward(both, Run(len(both), describes=read))
        except Described as described:
            return described.tokens[first:]
        raise AssertionError("a forward without global attention is refused")

    def _run_chunk(self, reference: Tensor, frames: Tensor, sees_itself: tuple[bool, ...]) -> Outputs:
        """Return the outputs of frames that see the core, and each itself beside it or not."""
        first = int(self.reference)
        if first and self._own is not None and self._runs_fused:
            self._own.reference = False
            try:
                outputs = self._forward(frames, Run(len(frames), sees_itself))
            finally:
                self._own.reference = True
            if self._own.report.reason is None:
                return outputs
        if first:
            frames, sees_itself = torch.cat([reference.to(frames), frames]), (False, *sees_itself)
        outputs = self._forward(frames, Run(len(frames), sees_itself))
        return {name: tensor[first:] for name, tensor in outputs.items()}

    def _test(self, frames: Tensor, outputs: Outputs) -> None:
        """Run the last frame of the core again in a chunk, which must give it what the run of the core gave it.

        Whatever looks across frames and does not follow the core (a mean over all frames, attention that no record
        knows) gives it something else: the other frames are missing, and its negative and its mirror image run with it,
        and one more if as many frames would run as with the core, for what follows from their number. Both must agree
        to half of the digits with which the model computes; values are compressed by the logarithm, as heads give some
        that differ by orders of magnitude.
        """
        assert self.attention.closed is not None
        last, reference = frames[-1:], int(self.reference and not self._runs_fused)
        others = [1 - last, last.flip(-1), 1 - last.flip(-1)]
        # At least as many as modules are verified with, so that chunks of fewer are verified by these too.
        number = VERIFIED_FRAMES + (reference + VERIFIED_FRAMES == self.attention.closed.count)
        again = self._run_chunk(frames[:1], torch.cat([last, *others[: number - 1]]), (False, *[True] * (number - 1)))
        for name, tensor in outputs.items():
            error, size = _deviation(tensor[-1], again[name][0])
            if not math.isfinite(size):
                raise ValueError(
                    f"what {type(self.model).__name__} says of a frame of the core must be finite, but its {name} is "
                    "not; check the weights and the images"
                )
            if not error <= self.eps**0.5 * size:
                raise ValueError(
                    f"{type(self.model).__name__} cannot be opened: a frame of its core that runs again without the "
                    f"others gets another {name} (by {error / max(size, 1e-300):.2g} of its size), so something in it "
                    "looks across frames that does not follow the core; use patch(model), which runs all frames at once"
                )

    def agree(self, expected: Tensor, actual: Tensor) -> bool:
        """Whether two outputs agree to half of the digits with which the model computes."""
        error, size = _deviation(expected, actual)
        return error <= self.eps**0.5 * size

    def _forward(self, frames: Tensor, run: Run) -> Outputs:
        """Run the model on frames `[S, 3, H, W]` and return its outputs.

        Raises:
            RuntimeError: If another forward of this session runs.
        """
        if not self._turn.acquire(blocking=False):
            raise RuntimeError("this scene is running already; a scene runs one chunk at a time")
        self.attention.run, self._thread = run, threading.get_ident()
        enabled, dtype = self.autocast
        try:
            with self._installed(), torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
                images = frames.to(self.device, None if self._within_call else self._parameter.dtype)
                call = self.model.forward if self._within_call else self.model
                result = call(self._feed(images), **self.options)
                self._check(run)
                return self._read(result, len(frames))
        finally:
            self.attention.run = None
            self._turn.release()

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """Inside this context the stand-ins are in the place of the model's forwards."""
        if self.model.training:
            raise ValueError("what runs in chunks is for inference; call model.eval() first")
        self._stand_ins.install()
        try:
            yield
        finally:
            self._stand_ins.remove()

    @uncompiled(recursive=False)
    def _run_root(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run the module that runs all global attention."""
        run = self.attention.run
        if run is None or self._thread != threading.get_ident():
            raise RuntimeError(
                f"{stand_in.name} is running already, in chunks of another thread; give each thread its own "
                "copy.deepcopy(model)"
            )
        run.inputs = self.record.read(self.root, arguments_of(self.root, args, kwargs))
        if run.inputs.frames not in (None, run.frames):
            raise ValueError(
                f"{stand_in.name} was given {run.inputs.frames} frames in a forward of {run.frames}; feed= must give "
                "the model all frames as one sample"
            )
        if self.budget is not None:
            self.budget.begin(run)
        if self._own is not None:
            self._own.begin(run.inputs.images, run.inputs.tokens_per_frame, False, self.attention)
        try:
            return stand_in.original(*args, **kwargs)
        finally:
            if self._own is not None:
                self._own.end()

    def _check(self, run: Run) -> None:
        """Raise if attention was passed over, or the model moved its frames."""
        names = (*self.attention.modules, *self.attention.followers)
        missed = [name for name in names if not run.calls[name]]
        if missed:
            raise RuntimeError(
                f"{len(missed)} of {len(names)} attention modules that look across frames were not called in this "
                f"forward: {', '.join(missed)}; this model cannot be opened"
            )
        if run.before is not None and run.after is not None and frame_order(run.before, run.after) is not None:
            raise ValueError(
                f"{self.record.name} chose another reference frame than the first of its frames, which a scene needs; "
                f"give the model a forward that takes {self.record.first_is_reference}"
            )


def _deviation(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """Return how far an output is from another, and how large that is, both compressed by the logarithm."""
    both = (each.cpu().double() for each in (expected, actual))
    expected, actual = (each.sign() * each.abs().log1p() for each in both)
    return float((actual - expected).norm()), float(expected.norm())


def one_sample(
    frames: Tensor,  # [S, 3, H, W]
) -> Tensor:
    """Return the frames as a batch of one sample, `[1, S, 3, H, W]`."""
    return frames[None]


def read_frames(result: Any, frames: int) -> Outputs:
    """Return the tensors `[1, S, ...]` of what a model returns, by name, without their first axis.

    Args:
        result: A mapping, a tensor (called "output"), or a sequence (called by number). What is no such tensor is left
            out, and so are "images".
        frames: S.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(result, Tensor):
        named: Mapping[str, Any] = {"output": result}
    elif isinstance(result, Mapping):
        named = result
    else:
        named = {str(i): each for i, each in enumerate(result)} if isinstance(result, Sequence) else {}
    outputs = {
        name: tensor[0].detach()
        for name, tensor in named.items()
        if isinstance(tensor, Tensor) and tensor.shape[:2] == (1, frames) and name != "images"
    }
    if not outputs:
        raise ValueError(
            f"the model must return tensors [1, {frames}, ...], got a {type(result).__name__}; give "
            "open_scene(read=...), a function that reads its result into named tensors [S, ...]"
        )
    return outputs
