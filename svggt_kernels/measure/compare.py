"""Dense against sparse: one model, the same frames, before and after `patch`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..attention import block_sparse_attention
from ..coarse import CoarseLayout
from ..graph import CovisibilityGraph, united
from ..layout import BlockLayout
from ..models.loading import LoadedModel
from ..patching import Patch, patch
from .cost import Cost, Tell, allocated_mib, alternate, in_turn, timed
from .deviation import Deviation, camera_rotation
from .machine import device_name, dtype_name

Stage = Callable[[str], AbstractContextManager[Tell]]
"""Is told what is being done while a context lasts; the context's value is told how far it is."""


@dataclass(frozen=True)
class AttentionCost:
    """What one global attention costs by itself, on random q, k and v of the model's shape.

    Attributes:
        shape: `[B, H, N, D]` of q, k and v.
        dtype: Their dtype.
        dense: PyTorch's scaled_dot_product_attention.
        sparse: block_sparse_attention with the layout of the run.
    """

    shape: tuple[int, ...]
    dtype: str
    dense: Cost
    sparse: Cost

    @property
    def speedup(self) -> float:
        """Dense / sparse median time."""
        return self.dense.median_ms / self.sparse.median_ms


@dataclass(frozen=True)
class SparseRun:
    """What was found of the patched model alone.

    Attributes:
        model: Name of the model.
        weights: Where its weights come from.
        warning: What weights that never met photos mean for the outputs; None for given weights.
        autocast: Dtype of autocast; None for float32 throughout.
        device: Where it ran.
        device_name: What that is.
        frames: Frames S.
        height: Pixels of a frame.
        width: Pixels of a frame.
        tokens_per_frame: Tokens P of a frame, special ones included.
        special_tokens: Special tokens at the start of a frame.
        covisibility: How the graph was made, in words.
        graph: Summary of the graph.
        density: Edges / S^2.
        token_density: Visible / all pairs of tokens.
        ideal_speedup: All / visible pairs of tokens: the speed-up of attention if time followed the work.
        backend: What ran the sparse attention.
        passed_over: Better backends, and why they did not run.
        layers: Global attention layers, all of them answered by the patch.
        planning_ms: Time for graph and layout in a sparse forward on frames that came before, ms; part of `sparse`.
        first_steps_ms: The same in the first sparse forward, by step, ms; frames that are new cost it again. MegaLoc's
            is "descriptors".
        sparse: Cost of the whole patched model, by one patch for all runs.
        first_sparse_ms: Wall time of `patch` and the first sparse run, ms: with what happens once, the verification of
            the fused forward, MegaLoc, graph and layout, tables, kernels compiled on first use. First runs are not
            among those of `sparse`, nor of `dense`.
        kept_mib: Memory that patch and MegaLoc hold from run to run, MiB; None where it cannot be measured.
    """

    model: str
    weights: str
    warning: str | None
    autocast: str | None
    device: str
    device_name: str
    frames: int
    height: int
    width: int
    tokens_per_frame: int
    special_tokens: int
    covisibility: str
    graph: dict[str, Any]
    density: float
    token_density: float
    ideal_speedup: float
    backend: str
    passed_over: dict[str, str]
    layers: int
    planning_ms: float
    first_steps_ms: dict[str, float]
    sparse: Cost
    first_sparse_ms: float
    kept_mib: float | None

    @property
    def costs(self) -> dict[str, Cost]:
        """Costs of the whole model, by what ran."""
        return {"sparse": self.sparse}

    @property
    def unrest(self) -> float:
        """Longest / shortest run of the same thing; much above 1 if something disturbed it."""
        return max(cost.max_ms / cost.min_ms for cost in self.costs.values())


@dataclass(frozen=True)
class Comparison(SparseRun):
    """Everything that a comparison found.

    Attributes:
        dense: Cost of the whole model as it is.
        first_dense_ms: Wall time of the first dense run, ms.
        attention: Cost of one global attention.
        deviations: For each output, how far sparse is from dense.
        rotation_degrees: Angle between the cameras of both, median and max.
    """

    dense: Cost
    first_dense_ms: float
    attention: AttentionCost
    deviations: dict[str, Deviation]
    rotation_degrees: dict[str, float]

    @property
    def costs(self) -> dict[str, Cost]:
        """Costs of the whole model, by what ran."""
        return {"dense": self.dense, "sparse": self.sparse}

    @property
    def speedup(self) -> float:
        """Dense / sparse median time of the whole model."""
        return self.dense.median_ms / self.sparse.median_ms

    @property
    def reached(self) -> float:
        """Share of the ideal speed-up that one global attention reaches; above 1 where its kernel is the faster one."""
        return self.attention.speedup / self.ideal_speedup

    @property
    def attention_share(self) -> float:
        """Share of the dense model's time that its global attention layers take."""
        return self.layers * self.attention.dense.median_ms / self.dense.median_ms


@dataclass(frozen=True, eq=False)
class Outputs:
    """The results of both runs, on the CPU.

    Attributes:
        dense: Outputs of the model as it is, by name; None if it did not run.
        sparse: Outputs of the patched model.
        graph: Who sees whom in the patched model, in full or coarsely, frames in the order given.
    """

    dense: dict[str, Tensor] | None
    sparse: dict[str, Tensor]
    graph: CovisibilityGraph


def silent(what: str) -> AbstractContextManager[Tell]:
    """Tell nobody what is being done."""
    return nullcontext(lambda progress: None)


def compare(
    model: LoadedModel,
    frames: Tensor,  # [S, 3, H, W]
    covisibility: Any,
    *,
    described: str,
    backend: str | None = None,
    repeats: int = 3,
    stage: Stage = silent,
) -> tuple[Comparison, Outputs]:
    """Run the model dense and sparse in turn, then one global attention of each kind by itself.

    A twin that shares the model's weights is patched once, so that a timed run is one of many and not the first.

    Args:
        model: The model, on its device.
        frames: RGB in [0, 1], on the same device.
        covisibility: As `patch` takes it.
        described: What that is, in words.
        backend: As `patch` takes it.
        repeats: Timed runs of each at most, after the first of each, which is told apart; see `alternate`.
        stage: Is told each stage of the work.

    Raises:
        ValueError: The graph cannot be made of these frames, or the backend cannot run.
    """
    device, calls = frames.device, _AttentionShapes()
    run_dense = partial(model, frames)
    with stage("dense, first run"), calls:
        first_dense_ms = timed(run_dense, device)[1]
    twin = _patched_twin(model, frames, covisibility, backend, stage)
    with stage("dense and sparse in turn") as tell:
        dense, dense_cost, sparse, sparse_cost = alternate(run_dense, twin.run, device, repeats, tell)
    dense, sparse = ({name: output.cpu() for name, output in outputs.items()} for outputs in (dense, sparse))
    facts, layout = twin.facts(model, frames, described), twin.handle.layout
    with stage("one global attention by itself"):
        attention = _attention_cost(calls.largest, layout, model.autocast, facts["backend"], repeats, device)
    return Comparison(
        **facts,
        sparse=sparse_cost,
        dense=dense_cost,
        first_dense_ms=first_dense_ms,
        attention=attention,
        deviations={name: Deviation.of(dense[name], sparse[name]) for name in dense},
        rotation_degrees=camera_rotation(model.kind.cameras(dense), model.kind.cameras(sparse)),
    ), Outputs(dense, sparse, united(twin.handle.graph))


def run_sparse(
    model: LoadedModel,
    frames: Tensor,  # [S, 3, H, W]
    covisibility: Any,
    *,
    described: str,
    backend: str | None = None,
    repeats: int = 3,
    stage: Stage = silent,
) -> tuple[SparseRun, Outputs]:
    """Run the patched model alone, for frames too many for a dense run.

    The arguments, and what is raised, are those of `compare`.
    """
    twin = _patched_twin(model, frames, covisibility, backend, stage)
    with stage("sparse") as tell:
        [(outputs, cost)] = in_turn([twin.run], frames.device, repeats, tell)
    sparse = {name: output.cpu() for name, output in outputs.items()}
    return SparseRun(**twin.facts(model, frames, described), sparse=cost), Outputs(
        None, sparse, united(twin.handle.graph)
    )


@dataclass(frozen=True, eq=False)
class _Twin:
    """A patched model that shares the weights of another, after its first run.

    Attributes:
        run: Runs it on the frames.
        handle: Of its patch.
        first_ms: Wall time of `patch` and the first run, ms.
        first_steps_ms: See `SparseRun`.
        kept_mib: See `SparseRun`.
    """

    run: Callable[[], dict[str, Tensor]]
    handle: Patch
    first_ms: float
    first_steps_ms: dict[str, float]
    kept_mib: float | None

    def facts(self, model: LoadedModel, frames: Tensor, described: str) -> dict[str, Any]:
        """Return what `SparseRun` says of it but for its cost."""
        report, layout, summary = self.handle.report(), self.handle.layout, self.handle.graph.summary()
        return {
            "model": model.name,
            "weights": model.weights,
            "warning": model.warning,
            "autocast": None if model.autocast is None else dtype_name(model.autocast),
            "device": str(frames.device),
            "device_name": device_name(frames.device),
            "frames": len(frames),
            "height": frames.shape[-2],
            "width": frames.shape[-1],
            "tokens_per_frame": layout.queries.lengths[0],
            "special_tokens": layout.queries.leading,
            "covisibility": described,
            "graph": asdict(summary),
            "density": summary.density,
            "token_density": report.token_density,
            "ideal_speedup": report.ideal_speedup,
            "backend": report.backend,
            "passed_over": report.passed_over,
            "layers": len(report.modules),
            "planning_ms": 1000 * report.planning_seconds,
            "first_steps_ms": self.first_steps_ms,
            "first_sparse_ms": self.first_ms,
            "kept_mib": self.kept_mib,
        }


def _patched_twin(model: LoadedModel, frames: Tensor, covisibility: Any, backend: str | None, stage: Stage) -> _Twin:
    """Patch a copy of the model that shares its weights, and run it once."""
    device = frames.device
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.module.parameters(), *model.module.buffers())}
    twin = copy.deepcopy(model, shared)
    run = partial(twin, frames)

    def patch_and_run() -> Patch:
        handle = patch(twin.module, covisibility=covisibility, backend=backend)
        run()
        return handle

    before = allocated_mib(device)
    with stage("sparse, first run"):
        handle, first_ms = timed(patch_and_run, device)
    after = allocated_mib(device)
    kept = None if before is None or after is None else after - before
    steps = {name: 1000 * seconds for name, seconds in handle.report().step_seconds.items()}
    return _Twin(run, handle, first_ms, steps, kept)


class _AttentionShapes(TorchFunctionMode):
    """Notes the shape and dtype of every attention call inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[tuple[int, ...], torch.dtype]] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else (kwargs or {})["query"]
            self.seen.add((tuple(query.shape), query.dtype))
        return func(*args, **(kwargs or {}))

    @property
    def largest(self) -> tuple[tuple[int, ...], torch.dtype]:
        """The call over most tokens: global attention."""
        return max(self.seen, key=lambda call: call[0][-2])


def _attention_cost(
    call: tuple[tuple[int, ...], torch.dtype],
    layout: BlockLayout | CoarseLayout,
    autocast: torch.dtype | None,
    backend: str | None,
    repeats: int,
    device: torch.device,
) -> AttentionCost:
    (batch, heads, _, head_size), dtype = call
    dtype = autocast or dtype
    shape = (batch, layout.num_tokens, heads, head_size)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))

    dense = partial(F.scaled_dot_product_attention, q, k, v)
    sparse = partial(block_sparse_attention, q, k, v, layout, backend=backend)
    with torch.inference_mode():
        for run in (dense, sparse):
            run()
        _, dense_cost, _, sparse_cost = alternate(dense, sparse, device, repeats)
    return AttentionCost((batch, heads, layout.num_tokens, head_size), dtype_name(dtype), dense_cost, sparse_cost)
