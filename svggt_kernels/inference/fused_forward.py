"""The forward of our own in one patched model: where it stands in, whether it may run, and what it did."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..compiling import uncompiled
from ..streams import is_capturing
from . import blocks, dpt, first_launches, heads, memory
from .aggregator import ChunkSizes, GlobalAttention, aggregate, tokens_of_frame
from .aggregator import obstacle as obstacle_of_aggregator
from .layer_outputs import LayerOutputs
from .report import InferenceReport
from .settings import Settings, Snapshot, has_values, is_replaced, is_watched
from .verification import Verification, verify
from .within_frames import AttentionWithinFrames, DenseAttention, by_pytorch

__all__ = ["FusedForward", "Outputs", "Precision"]

Precision = Literal["upstream", "bf16"]
Outputs = Literal["read", "all"]

FRAMES = 3
"""Frames of a forward on which it is verified: the reference frame and others."""

PART = 0.4
"""Of these tokens so many run together, so that what mixes tokens of different parts is seen."""

CAPTURED = "it was not verified before this CUDA graph was captured; run the model once, then capture"
ON_THE_CPU = "on the CPU it gains nothing; patch(model, fused=True) runs it all the same"


class Original(Protocol):
    """What stands in the place of a module's forward; `original` runs that."""

    name: str

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""


class FusedForward:
    """Runs the aggregator and the heads of a model of VGGT's shape by our own code, at inference.

    An aggregator runs so once it was verified for its settings, for the height and width of the images and the dtypes
    of the call; a head likewise. What cannot be verified runs as it is, with the reason in the report.

    Args:
        model: The model that was given to `patch`, with its heads.
        aggregator: The module in it that runs the blocks.
        attention: The attention modules that are patched; all of its global blocks' must be.
        fused: Whether to run at all; None for CUDA devices only.
        precision: Dtype of the residual stream and of the layer outputs kept: the model's own, or bfloat16.
        keep: Keep the layer outputs that heads read, or all.
        backend: The backend that the patch was given, or None.
        memory_budget: What one forward may allocate, see `memory`.

    Raises:
        ValueError: If residuals should be bfloat16, or a budget is given, and the model is not of VGGT's shape.
    """

    def __init__(
        self,
        model: nn.Module,
        aggregator: Any,
        attention: tuple[nn.Module, ...],
        *,
        fused: bool | None,
        precision: Precision,
        keep: Outputs,
        backend: str | None,
        memory_budget: memory.MemoryBudget,
    ) -> None:
        self.aggregator = aggregator
        self.fused = fused
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.budget = memory_budget
        self._obstacle = obstacle_of_aggregator(aggregator)
        if self._obstacle is None and attention != tuple(block.attn for block in aggregator.global_blocks):
            self._obstacle = f"its global attention is not that of the global_blocks of {type(aggregator).__name__}"
        self.depth: int = 0 if self._obstacle else len(self.aggregator.global_blocks)
        stated = heads.layers_read(model, self.depth) if self.depth else None
        self.layers = stated if keep == "read" else None
        self._dpt = {name: head for name, head in model.named_modules() if heads.is_dpt_head(head)}
        self._cameras = {name: head for name, head in model.named_children() if heads.is_camera_head(head)}
        self._name = (
            next(name for name, module in model.named_modules() if module is aggregator) or type(model).__name__
        )
        self._refuse_what_cannot_be(model, precision, keep)
        # A copy of the aggregator alone shall copy no more than heads.
        self._model = None if memory_budget is None else model
        self._within_frames = AttentionWithinFrames(backend)
        self._positions = dpt.Positions()
        self._forget()

    def _refuse_what_cannot_be(self, model: nn.Module, precision: Precision, keep: Outputs) -> None:
        name = type(model).__name__
        if self._obstacle and precision == "bf16":
            raise ValueError(
                f'precision="bf16" needs a model of VGGT\'s shape, and {name} is none: {self._obstacle}; leave '
                'precision="upstream"'
            )
        if self.budget is None:
            return
        reasons = [self._obstacle] if self._obstacle else []
        reasons += [
            f"the forward of {type(module).__name__} does not take what VGGT's DPT heads take"
            for module in model.modules()
            if hasattr(module, "intermediate_layer_idx") and not heads.is_dpt_head(module)
        ]
        if self.layers is None:
            reasons.append('outputs="all" keeps every layer' if keep == "all" else "no head says which layers it reads")
        if reasons:
            raise ValueError(
                "memory_budget needs a model of VGGT's shape with its heads, whose memory is known, and that of "
                f"{name} is not ({'; '.join(reasons)}); leave memory_budget=None"
            )

    def _forget(self) -> None:
        self._settings = Settings()
        self._snapshots: dict[nn.Module, tuple[Snapshot, Hashable, str | None]] = {}
        self._verified: dict[Hashable, Verification] = {}
        self._attend: GlobalAttention | None = None
        self._outputs: LayerOutputs | None = None
        self._plan: memory.Plan | None = None
        self._launches: dict[nn.Module, first_launches.FirstLaunches] = {}
        self.report = InferenceReport("no forward yet", None, (), {}, self._layers_kept, None)

    def __getstate__(self) -> dict[str, Any]:
        forgotten = ("_settings", "_snapshots", "_verified", "_attend", "_outputs", "_plan", "_launches", "report")
        return {name: value for name, value in self.__dict__.items() if name not in forgotten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def _layers_kept(self) -> tuple[int, ...] | None:
        return None if self.layers is None else tuple(sorted(self.layers))

    def sites(self) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
        """Yield each module whose forward is stood in for, its name, and what runs around that forward."""
        if self._obstacle is None:
            yield self.aggregator, self._name, self._run_aggregator
            for name, head in self._dpt.items():
                yield head, name, self._run_dpt_head
            for name, head in self._cameras.items():
                yield head, name, self._run_camera_head

    def begin(self, images: Any, tokens_per_frame: int | None, tokens_describe: bool, attend: GlobalAttention) -> None:
        """Begin a forward: make its plan.

        Args:
            images: `[B, S, 3, H, W]`.
            tokens_per_frame: P.
            tokens_describe: Whether the graph is made of tokens.
            attend: The attention of its global layers.

        Raises:
            ValueError: If the budget cannot be kept, or the forward is not one of inference.
        """
        self._attend, self._plan = attend, None
        self._within_frames.ran.clear()
        self.report = replace(
            self.report, reason=self._obstacle, verification=None, within_frames=(), heads={}, memory=None
        )
        if self.budget is not None:
            self._plan = self._make_plan(images, tokens_per_frame, tokens_describe)
            self.report = replace(self.report, memory=self._plan)

    def end(self) -> None:
        """End a forward of the aggregator, also one that raised."""
        if self._outputs is not None:
            self._outputs.settle()
        self._attend = self._outputs = None
        self._finish_launches()

    def _finish_launches(self) -> None:
        for launches in self._launches.values():
            launches.wait()
        self._launches = {}

    def _make_plan(self, images: Tensor, tokens_per_frame: int | None, tokens_describe: bool) -> memory.Plan:
        model = self._model
        assert model is not None and self.budget is not None and self.layers is not None
        if tokens_per_frame is None:
            raise ValueError(
                f"memory_budget needs the tokens of a frame, and {type(self.aggregator).__name__} does not say its "
                "patch_size; leave memory_budget=None"
            )
        if torch.is_grad_enabled() or model.training:
            raise ValueError(
                "memory_budget plans inference; call model.eval(), and the model inside torch.no_grad(), or "
                "patch(model, memory_budget=None)"
            )
        block = self.aggregator.global_blocks[0]
        product, weights = blocks.compute_dtype(block), block.attn.qkv.weight.dtype
        cast = [p for p in self.aggregator.parameters() if p.requires_grad and p.dtype == torch.float32 != product]
        present = {id(x): x.nbytes for x in (images, *model.parameters(), *model.buffers())}
        sizes = memory.Sizes(
            samples=images.shape[0],
            frames=images.shape[1],
            tokens=tokens_per_frame,
            channels=block.attn.qkv.in_features,
            pixels=images.shape[3] * images.shape[4],
            depth=self.depth,
            layers=tuple(sorted(self.layers)),
            heads=sum(not getattr(head, "feature_only", False) for head in self._dpt.values()),
            wide=weights.itemsize,
            residual=(self.dtype or weights).itemsize,
            product=product.itemsize,
            present=sum(present.values()),
            casts=sum(p.numel() * product.itemsize for p in cast),
            tokens_describe=tokens_describe,
        )
        if images.device.type not in memory.DEVICES:
            raise ValueError(
                "memory_budget is kept on CUDA, whose layer outputs can wait in host memory, and the images are on "
                f"{images.device}; leave memory_budget=None (on CUDA the budget must be at least "
                f"{memory.least(sizes):.1f} GiB)"
            )
        return memory.make_plan(sizes, memory.allowed(self.budget, images.device, sizes.present))

    @uncompiled(recursive=False)
    def _run_aggregator(self, stand_in: Original, *args: Any, **kwargs: Any) -> Any:
        """Run the aggregator by our own code where that may be."""
        ours = None if self._attend is None else self._aggregated(*args, **kwargs)
        return stand_in.original(*args, **kwargs) if ours is None else ours

    @uncompiled(recursive=True)
    def _aggregated(self, *args: Any, **kwargs: Any) -> tuple[LayerOutputs, int] | None:
        """Return what the aggregator returns, or None if it must run as it is."""
        assert self._attend is not None
        images = [*args, *kwargs.values()][0] if len(args) + len(kwargs) == 1 else None
        reason, found = self._may_run(images)
        self.report = replace(self.report, reason=reason, verification=found)
        if reason is not None and self._plan is not None:
            raise ValueError(
                f"memory_budget is kept by the fused forward, which cannot run: {reason}; mend that, or leave "
                "memory_budget=None"
            )
        if reason is not None:
            return None
        assert isinstance(images, Tensor)
        if self._plan is None:
            parts = ChunkSizes.of(self.aggregator, images, memory.TOKENS_TOGETHER)
        else:
            parts = ChunkSizes(self._plan.images_together, self._plan.tokens_together)
        own_dtype = None if self.dtype is None else self.aggregator.camera_token.dtype
        offloaded = () if self._plan is None else self._plan.offloaded
        self._outputs = outputs = LayerOutputs(self.depth, self.layers, own_dtype, offloaded)
        aggregate(
            self.aggregator,
            images,
            outputs,
            attend=self._attend,
            attend_within_frames=self._within_frames,
            parts=parts,
            dtype=self.dtype,
        )
        self.report = replace(self.report, within_frames=tuple(sorted(self._within_frames.ran)))
        return outputs, self.aggregator.patch_start_idx

    def _may_run(self, images: Any) -> tuple[str | None, Verification | None]:
        """Return why the aggregator must run as it is in this call, or None, and how it was verified."""
        if not isinstance(images, Tensor) or images.dim() != 5:
            return "its forward is given more than images [B, S, 3, H, W]", None
        if self.fused is None and images.device.type != "cuda":
            return ON_THE_CPU, None
        reason = _obstacle_of_call() or self._unsettled(self.aggregator, obstacle_of_aggregator)
        if reason is not None:
            return reason, None
        some = images[:1, :FRAMES]

        def own(aggregator: Any, some: Tensor) -> tuple[LayerOutputs, int]:
            outputs = LayerOutputs(len(aggregator.global_blocks), self.layers)
            tokens = int(PART * some.shape[1] * tokens_of_frame(aggregator, some))
            aggregate(
                aggregator,
                some,
                outputs,
                attend=DenseAttention(),
                attend_within_frames=by_pytorch,
                parts=ChunkSizes.of(aggregator, some, tokens),
            )
            return outputs, aggregator.patch_start_idx

        def read(result: Any) -> list[Tensor]:
            layers, first = result
            if not isinstance(layers, (list, LayerOutputs)):
                raise TypeError(f"it returns layers in a {type(layers).__name__}, not in a list")
            if first != self.aggregator.patch_start_idx or len(layers) != self.depth:
                raise ValueError(f"it returns {len(layers)} layers with patches from {first}")
            return [layers[layer] for layer in sorted(self.layers or range(self.depth))]

        found = self._verify(self.aggregator, own, read, lambda: (some,), images)
        return (CAPTURED, None) if found is None else (found.reason, found)

    def _unsettled(self, module: nn.Module, obstacle: Callable[[Any], str | None]) -> str | None:
        """Return why a module must run as it is with the settings that it has, or None; asked again if they change."""
        self._settings.begin()
        known = self._snapshots.get(module)
        if known is None or not known[0].holds():
            if is_capturing(next(module.parameters()).device):
                return CAPTURED
            reason = obstacle(module) or _obstacle_inside(module)
            settings = (self._settings.of(module), has_values(module)) if reason is None else None
            known = self._snapshots[module] = Snapshot(module), settings, reason
        return known[2]

    def _verify(
        self,
        module: nn.Module,
        own: Callable[..., Any],
        read: Callable[[Any], Any],
        inputs: Callable[[], tuple[Any, ...]],
        images: Tensor,
    ) -> Verification | None:
        """Return the verification of a module for its settings, the size of images and dtypes; None while captured.

        `own`, `read` and what `inputs` returns are those of `verify`, which runs once.
        """
        device = images.device.type
        key = (
            self._snapshots[module][1],
            (min(FRAMES, images.shape[1]), *images.shape[2:], images.dtype, images.device),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        )
        if key not in self._verified:
            if is_capturing(images.device):
                return None
            if module is self.aggregator:
                self._finish_launches()
                fused_heads, backend = self._dpt.values(), self._within_frames.backend
                self._launches = first_launches.start(module, fused_heads, images.device, self.dtype, backend)
            launches = self._launches.get(module)
            found = verify(module, own, read, inputs(), *([launches.wait] if launches else []))
            if not found.is_final:
                return found
            self._verified[key] = found
        return self._verified[key]

    @uncompiled(recursive=False)
    def _run_camera_head(self, stand_in: Original, *args: Any, **kwargs: Any) -> Any:
        """Run a camera head; if it reads special tokens of the last layer alone, only those are brought together."""
        outputs, *others = args or (kwargs.pop(heads.LAYERS, None),)
        if isinstance(outputs, LayerOutputs):
            outputs = self._read_by_camera(stand_in.module, outputs)  # type: ignore[attr-defined]
        return stand_in.original(outputs, *others, **kwargs)

    @uncompiled(recursive=True)
    def _read_by_camera(self, head: nn.Module, outputs: LayerOutputs) -> Sequence[Tensor]:
        """Return the special tokens of the last layer if a camera head returns the same for these, or all layers."""
        count = self.aggregator.patch_start_idx
        special = outputs.special_tokens(-1, count)

        def own(head: nn.Module, layers: list[Tensor]) -> Any:
            return head([layers[-1][:, :, :count]])

        def inputs() -> tuple[Any, ...]:
            return (_first_frames(outputs, sorted(outputs.layers)),)

        if self._unsettled(head, lambda _: None) is not None:
            return outputs
        found = self._verify(head, own, heads.tensors, inputs, special)
        return outputs if found is None or found.reason is not None else [special]

    @uncompiled(recursive=False)
    def _run_dpt_head(self, stand_in: Original, *args: Any, **kwargs: Any) -> Any:
        """Run a DPT head on kept layer outputs, some frames at a time, fused where that may be."""
        head: Any = stand_in.module  # type: ignore[attr-defined]
        bound = inspect.signature(type(head).forward).bind(head, *args, **kwargs)
        bound.apply_defaults()
        _, outputs, images, first_patch, frames = bound.arguments.values()
        if not isinstance(outputs, LayerOutputs):
            return stand_in.original(*args, **kwargs)
        return self._run_on_kept(stand_in, head, outputs, images, first_patch, frames or images.shape[1])

    @uncompiled(recursive=True)
    def _run_on_kept(
        self, stand_in: Original, head: Any, outputs: LayerOutputs, images: Tensor, first_patch: int, frames: int
    ) -> Any:
        reason = self._may_run_fused(head, outputs, images, first_patch)
        self.report = replace(self.report, heads=self.report.heads | {stand_in.name: reason})
        ready = None
        if reason is None:
            height, width = images.shape[-2:]
            tables = self._positions.of(head, self._snapshots[head][1], (height, width), head.norm.weight)
            assert tables is not None
            ready = dpt.ReadyHead(head, tables, head.norm.weight.dtype)
        together = memory.FRAMES_TOGETHER if self._plan is None else self._plan.frames_together
        return heads.run_dpt_head(stand_in.original, ready, head, outputs, images, first_patch, min(frames, together))

    def _may_run_fused(self, head: Any, outputs: LayerOutputs, images: Tensor, first_patch: int) -> str | None:
        reason = (
            _obstacle_of_call()
            or self._unsettled(head, dpt.obstacle)
            or heads.mismatch(head, outputs, images, first_patch)
        )
        if reason is not None:
            return reason

        def inputs() -> tuple[Any, ...]:
            return _first_frames(outputs, head.intermediate_layer_idx), images[:1, :FRAMES], first_patch

        found = self._verify(head, heads.run_fused, heads.compared, inputs, images)
        return CAPTURED if found is None else found.reason


def _first_frames(outputs: LayerOutputs, layers: Sequence[int]) -> list[Tensor | None]:
    """Return the outputs of some layers for the first frames of the first sample, in a list by layer."""
    (tokens,) = outputs.frames(layers, [slice(FRAMES)])
    return heads.as_list({layer: each[:1] for layer, each in tokens.items()}, len(outputs))


def _obstacle_of_call() -> str | None:
    """Return why every module must run as it is in this call, or None."""
    if torch.is_grad_enabled():
        return "gradients are on"
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "there is a hook on all modules"
    return None


def _obstacle_inside(module: nn.Module) -> str | None:
    """Return why a module must run as it is with its settings, or None.

    Modules inside are passed over, see a part of what they would, or return what is changed in place. Hooks on the
    module itself run around it as ever.
    """
    for name, inner in module.named_modules():
        if inner.training:
            return f"{name or 'it'} is in training mode"
        if is_replaced(inner):
            return f"another forward was put on {name or 'it'}"
        if inner is not module and is_watched(inner):
            return f"there is a hook on {name}"
    return None
