"""The forward of our own in one patched model: where it stands in, and what it did."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..compiling import uncompiled
from ..sources.cache import LRUCache
from . import blocks, dpt, first_launches, heads, memory
from .aggregator import GlobalAttention, ReadyAggregator, aggregate, tokens_of_frame
from .aggregator import obstacle as obstacle_of_aggregator
from .layer_outputs import LayerOutputs
from .proofs import FRAMES, Proofs
from .report import InferenceReport
from .settings import tensors_of
from .verification import Verification
from .within_frames import AttentionWithinFrames, by_pytorch

Precision = Literal["upstream", "bf16"]
Outputs = Literal["read", "all"]

PART = 0.4
"""In a verification so many of the tokens run together, so that what mixes tokens of different parts is seen."""

ON_THE_CPU = "on the CPU fusing gains nothing; patch(model, fused=True) fuses all the same"


class FusedForward:
    """Runs the aggregator and the heads of a model of VGGT's shape by our own code, at inference.

    An aggregator runs so once it was verified for its settings, for the height and width of the images and the dtypes
    of the call; a head likewise. What cannot be verified runs as it is, with the reason in the report.

    Args:
        model: The model that was given to `patch`, with its heads.
        path: The name in it of the aggregator, the module that runs the blocks; empty for the model itself.
        attention: The attention modules that are patched; all of its global blocks' must be.
        fused: Whether to run at all; None for CUDA devices only.
        precision: Dtype of the residual stream and of the layer outputs kept: the model's own, or bfloat16.
        keep: Keep the layer outputs that heads read, or all.
        backend: The backend that the patch was given, or None.
        memory_budget: What one forward may allocate, see `memory`.

    Attributes:
        reference: Whether frame 0 of the forwards to come is the reference frame; the model's own forward knows no
            other, so if not, a report with a reason says that what was computed is of no use.
        key_parts: Over how many parts of keys global layers attend in the forwards to come, and how many keys are
            packed for one of them, as `memory.Sizes` counts them.

    Raises:
        ValueError: If residuals should be bfloat16, or a budget is given, and the model is not of VGGT's shape.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        attention: tuple[nn.Module, ...],
        *,
        fused: bool | None,
        precision: Precision,
        keep: Outputs,
        backend: str | None,
        memory_budget: memory.MemoryBudget,
    ) -> None:
        aggregator: Any = model.get_submodule(path)
        self.aggregator = aggregator
        self.fused = fused
        self.reference = True
        self.key_parts = (1, 0)
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.budget = memory_budget
        self._obstacle = obstacle_of_aggregator(aggregator)
        if self._obstacle is None and attention != tuple(block.attn for block in aggregator.global_blocks):
            self._obstacle = f"its global attention is not that of the global_blocks of {type(aggregator).__name__}"
        self.depth = 0 if self._obstacle else len(aggregator.global_blocks)
        self.layers = heads.layers_read(model, self.depth) if self.depth and keep == "read" else None
        self._dpt = {name: head for name, head in model.named_modules() if heads.is_dpt_head(head)}
        self._cameras = {name: head for name, head in model.named_children() if heads.is_camera_head(head)}
        self._name = path or type(model).__name__
        self._refuse_what_cannot_be(model, precision, keep)
        # A copy of the aggregator alone shall copy no more than heads.
        self._model = None if memory_budget is None else model
        self._within_frames = AttentionWithinFrames(backend)
        self._positions: LRUCache[list[dpt.Table]] = LRUCache(sys.maxsize)  # CUDA graphs read them: none is dropped
        self._proofs = Proofs()
        self._rehearsed: set[Hashable] = set()
        self._attend: GlobalAttention | None = None
        self._outputs: LayerOutputs | None = None
        self._launches: dict[nn.Module, first_launches.FirstLaunches] = {}
        self._plan = memory.Plan.without_budget()
        self.report = InferenceReport(self._obstacle, self.layers)

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
        self._attend = attend
        self._within_frames.ran.clear()
        self.report = InferenceReport(self._obstacle, self.layers)
        if self.budget is None:
            self._plan = memory.Plan.without_budget()
        else:
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
        assert model is not None and self.budget is not None
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
        sizes = self.sizes(images.shape, images.itemsize, tokens_per_frame, tokens_describe)
        if images.device.type not in memory.DEVICES:
            raise ValueError(
                "memory_budget is kept on CUDA, whose layer outputs can wait in host memory, and the images are on "
                f"{images.device}; leave memory_budget=None (on CUDA the budget must be at least "
                f"{memory.least(sizes):.1f} GiB)"
            )
        return memory.make_plan(sizes, memory.allowed(self.budget, images.device, sizes.present))

    def sizes(
        self, shape: Sequence[int], itemsize: int, tokens_per_frame: int, tokens_describe: bool = False
    ) -> memory.Sizes:
        """Return the sizes from which the memory of a forward follows, where there is a budget.

        Args:
            shape: Of its images, `[B, S, 3, H, W]`.
            itemsize: Bytes of one of their values.
            tokens_per_frame: P.
            tokens_describe: Whether the graph is made of tokens.
        """
        model, layers = self._model, self.layers
        assert model is not None and layers is not None
        block = self.aggregator.global_blocks[0]
        weight = block.attn.qkv.weight
        product, weights = blocks.compute_dtype(weight), weight.dtype
        cast = [x for x in tensors_of(self.aggregator) if x.requires_grad and x.dtype == torch.float32 != product]
        return memory.Sizes(
            samples=shape[0],
            frames=shape[1],
            tokens=tokens_per_frame,
            channels=block.attn.qkv.in_features,
            pixels=shape[3] * shape[4],
            depth=self.depth,
            layers=layers,
            heads=sum(not getattr(head, "feature_only", False) for head in self._dpt.values()),
            wide=weights.itemsize,
            residual=(self.dtype or weights).itemsize,
            product=product.itemsize,
            present=sum(x.nbytes for x in tensors_of(model)) + math.prod(shape) * itemsize,
            casts=sum(x.numel() * product.itemsize for x in cast),
            tokens_describe=tokens_describe,
            parts=self.key_parts[0],
            packed=self.key_parts[1],
        )

    @uncompiled(recursive=False)
    def _run_aggregator(self, stand_in: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the aggregator by our own code where that may be."""
        ours = self._aggregated(*args, **kwargs)
        return stand_in.original(*args, **kwargs) if ours is None else ours

    @uncompiled(recursive=True)
    def _aggregated(self, *args: Any, **kwargs: Any) -> tuple[LayerOutputs, int] | None:
        """Return what the aggregator returns, or None if it must run as it is."""
        images = [*args, *kwargs.values()][0] if len(args) + len(kwargs) == 1 else None
        reason, found = self._may_run(images)
        self.report = replace(self.report, reason=reason, verification=found)
        if reason is not None:
            if self.budget is None:
                return None
            raise ValueError(
                f"memory_budget is kept by the fused forward, which cannot run: {reason}; mend that, or leave "
                "memory_budget=None"
            )
        assert isinstance(images, Tensor) and self._attend is not None
        if self.budget is not None and self.reference:
            self._verify_heads(images)
        self._outputs = outputs = LayerOutputs(self.depth, self.layers, self._own_dtype, self._plan.offloaded)
        aggregate(
            self._proofs.ready(self.aggregator, ReadyAggregator),
            images,
            outputs,
            attend=self._attend,
            attend_within_frames=self._within_frames,
            tokens_together=self._plan.tokens_together,
            dtype=self.dtype,
            reference=self.reference,
        )
        self.report = replace(self.report, within_frames=tuple(sorted(self._within_frames.ran)))
        return outputs, self.aggregator.patch_start_idx

    @property
    def _own_dtype(self) -> torch.dtype | None:
        """What layer outputs are read in where that is not the dtype of the tokens."""
        return None if self.dtype is None else self.aggregator.camera_token.dtype

    def _verify_heads(self, images: Tensor) -> None:
        """Verify the heads on the first frames, once for their size and dtype.

        Beside the outputs of all frames that would take more memory than a plan counts.
        """
        some = images[:1, :FRAMES]
        kind = (some.shape, some.dtype, some.device, torch.is_autocast_enabled(some.device.type))
        if kind in self._rehearsed:
            return
        outputs, first_patch = LayerOutputs(self.depth, self.layers, self._own_dtype), self.aggregator.patch_start_idx
        aggregate(
            self._proofs.ready(self.aggregator, ReadyAggregator),
            some,
            outputs,
            attend=_dense,
            attend_within_frames=by_pytorch,
            tokens_together=self._plan.tokens_together,
            dtype=self.dtype,
        )
        for head in self._dpt.values():
            self._may_run_fused(head, outputs, some, first_patch)
        for head in self._cameras.values():
            self._read_by_camera(head, outputs)
        self._rehearsed.add(kind)

    def _may_run(self, images: Any) -> tuple[str | None, Verification | None]:
        """Return why the aggregator must run as it is in this call, or None, and how it was verified."""
        if not isinstance(images, Tensor) or images.dim() != 5:
            return "its forward is given more than images [B, S, 3, H, W]", None
        if self.fused is None and images.device.type != "cuda":
            return ON_THE_CPU, None
        reason = self._proofs.obstacle(self.aggregator, obstacle_of_aggregator)
        if reason is not None:
            return reason, None

        def own(aggregator: Any, some: Tensor) -> tuple[LayerOutputs, int]:
            outputs = LayerOutputs(len(aggregator.global_blocks), self.layers)
            tokens = max(1, int(PART * some.shape[1] * tokens_of_frame(aggregator, some)))
            ready = ReadyAggregator(aggregator)
            aggregate(ready, some, outputs, attend=_dense, attend_within_frames=by_pytorch, tokens_together=tokens)
            return outputs, aggregator.patch_start_idx

        def read(result: Any) -> list[Tensor]:
            layers, first = result
            if not isinstance(layers, (list, LayerOutputs)):
                raise TypeError(f"it returns layers in a {type(layers).__name__}, not in a list")
            if first != self.aggregator.patch_start_idx or len(layers) != self.depth:
                raise ValueError(f"it returns {len(layers)} layers with patches from {first}")
            return [layers[layer] for layer in self.layers or range(self.depth)]

        return self._proofs.verify(
            self.aggregator,
            own,
            read,
            lambda: (images[:1, :FRAMES],),
            images,
            partial(self._start_launches, images.device),
            depends=self.layers,
            is_part=not self.reference,
        )

    def _start_launches(self, device: torch.device) -> Callable[[], None]:
        """Start to compile what a forward launches; return what waits for the kernels of the aggregator."""
        self._finish_launches()
        heads_to_run, backend = self._dpt.values(), self._within_frames.backend
        self._launches = first_launches.start(self.aggregator, heads_to_run, device, self.dtype, backend)
        return self._wait_for(self.aggregator)

    def _wait_for(self, module: nn.Module) -> Callable[[], None]:
        """Return what waits until the kernels of a module are compiled, if they are being compiled."""
        launches = self._launches.get(module)
        return (lambda: None) if launches is None else launches.wait

    @uncompiled(recursive=False)
    def _run_camera_head(self, stand_in: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a camera head; if it reads special tokens of the last layer alone, only those are brought together."""
        outputs, *others = args or (kwargs.pop(heads.LAYERS, None),)
        if isinstance(outputs, LayerOutputs):
            outputs = self._read_by_camera(stand_in.module, outputs)
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

        reason = self._proofs.obstacle(head, lambda _: None)
        if reason is None:
            reason, _ = self._proofs.verify(
                head,
                own,
                heads.tensors,
                inputs,
                special,
                depends=tuple(sorted(outputs.layers)),
                is_part=not self.reference,
            )
        return [special] if reason is None else outputs

    @uncompiled(recursive=False)
    def _run_dpt_head(self, stand_in: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a DPT head on kept layer outputs, some frames at a time, fused where that may be."""
        head = stand_in.module
        bound = inspect.signature(type(head).forward).bind(head, *args, **kwargs)
        bound.apply_defaults()
        _, outputs, images, first_patch, frames = bound.arguments.values()
        if not isinstance(outputs, LayerOutputs):
            return stand_in.original(*args, **kwargs)
        return self._run_on_kept(stand_in, outputs, images, first_patch, frames or images.shape[1])

    @uncompiled(recursive=True)
    def _run_on_kept(self, stand_in: Any, outputs: LayerOutputs, images: Tensor, first_patch: int, frames: int) -> Any:
        head = stand_in.module
        reason = self._may_run_fused(head, outputs, images, first_patch)
        self.report = replace(self.report, heads=self.report.heads | {stand_in.name: reason})
        if reason is None:
            size, weight = tuple(images.shape[-2:]), head.norm.weight
            key = self._proofs.settings(head), size
            tables = self._positions.get(key, lambda: dpt.position_tables(head, size, weight))
            run: Callable[..., Any] = dpt.ReadyHead(head, tables, weight.dtype)
        else:
            run = partial(heads.run_original, stand_in.original, len(outputs))
        together = min(frames, self._plan.frames_together)
        return heads.run_dpt_head(run, head.intermediate_layer_idx, outputs, images, first_patch, together)

    def _may_run_fused(self, head: Any, outputs: LayerOutputs, images: Tensor, first_patch: int) -> str | None:
        """Return why a DPT head must run as it is in this call, or None."""

        def inputs() -> tuple[Any, ...]:
            return _first_frames(outputs, head.intermediate_layer_idx), images[:1, :FRAMES], first_patch

        reason = self._proofs.obstacle(head, dpt.obstacle) or heads.mismatch(head, outputs, images, first_patch)
        if reason is not None:
            return reason
        reason, _ = self._proofs.verify(
            head,
            heads.run_fused,
            heads.compared,
            inputs,
            images,
            partial(self._wait_for, head),
            depends=(len(outputs), first_patch),
            is_part=not self.reference,
        )
        return reason


def _first_frames(outputs: LayerOutputs, layers: Sequence[int]) -> list[Tensor | None]:
    """Return the outputs of some layers for the first frames of the first sample, in a list by layer."""
    (tokens,) = outputs.frames(layers, [slice(FRAMES)])
    return heads.as_list({layer: each[:1] for layer, each in tokens.items()}, len(outputs))


def _dense(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, *, tokens: Callable[[], Tensor]) -> Tensor:
    """Attend densely in every global layer."""
    return by_pytorch(q, k, v, scale)
