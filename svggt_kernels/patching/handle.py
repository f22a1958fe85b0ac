"""`patch(model)` and the handle it returns."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import backends
from ..attention import block_sparse_attention, choose_backend, prepare
from ..compiling import uncompiled
from ..graph import CovisibilityGraph
from ..inference import blocks, memory
from ..inference.model import Lean, Outputs, Precision
from ..inference.outputs import STAGES, run_head
from ..layout import BlockLayout
from ..models import ForwardInputs, find_model, stated_record
from ..models.wrappers import arguments_of, each_once, named_modules
from .forwards import Forward, Forwards
from .interception import Answering, StandIn
from .plan import Covisibility, Planner
from .report import PatchReport


def patch(
    model: nn.Module,
    *,
    covisibility: Covisibility = "megaloc",
    special_tokens: Literal["dense", "masked"] = "dense",
    backend: str | None = None,
    lean: bool = True,
    precision: Precision = "upstream",
    outputs: Outputs = "read",
    memory_budget: memory.MemoryBudget = None,
    modules: Iterable[str | nn.Module] | None = None,
    tokens_per_frame: int | None = None,
    num_special_tokens: int | tuple[int, int] = 0,
    trailing_tokens: int = 0,
) -> Patch:
    """Make the global attention of `model` attend between covisible frames only, until `undo()`.

    Models that `svggt_kernels.models` has a record of need no more than `patch(model)`. Each call of the model then
    raises if any of its global attention did not come through here. For other models name the attention modules and
    say how their tokens lie; the last four arguments are for that:

        patch(model, modules=[block.attn for block in model.blocks], tokens_per_frame=P, num_special_tokens=R)

    A deep copy or a pickled copy of a patched model is patched too, by itself; `Patch.of(copy)` is its handle. Scale,
    autocast, gradients, grouped queries and activation checkpointing of blocks work as before; run backward before
    `undo()` where there is checkpointing. A temperature that a model derives from its number
    of tokens (UniCeption's entropy scaling) stays as the model computes it, from all tokens.

    Args:
        model: The model, or any module that holds it.
        covisibility: Which frames see which:
            "megaloc", or a `MegaLocSimilarity` with other options: similarity of the images by MegaLoc's descriptors;
            "tokens", or a `TokenSimilarity` with other options: similarity of the model's own tokens;
            "thumbnails", or a `ThumbnailSimilarity`: similarity of the images made small, crude but without weights;
            "sequential": the 10 frames before and after, and the model's reference frame;
            "all": everything, which is dense attention;
            a `CovisibilityGraph` over the frames in the order of the images, or a list with one graph per sample;
            a function of the images `[B, S, 3, H, W]` that returns either;
            any other `svggt_kernels.sources.Source` (docs/covisibility.md).
        special_tokens: "dense": camera, register and other special tokens see everything and are seen by everything;
            "masked": they are ordinary tokens of their frame.
        backend: The backend that must run, or None for the best that can; see `block_sparse_attention`.
        lean: At inference also run blocks and DPT heads in few passes over memory where they are of VGGT's kind. What
            is computed is the same up to rounding: proven by float64, once for blocks and heads of the same settings.
        precision: "upstream": the residual stream and the layer outputs kept have upstream's dtypes; "bf16": bfloat16,
            which halves them and deviates (docs/whole-model.md). Needs `lean`, and blocks of VGGT's shape.
        outputs: "read": of VGGT's layer outputs only those are kept that the heads of `model` read, the others are
            holes in the list that say so when read; "all": all, as upstream. Needs `lean` too.
        memory_budget: What one forward may allocate on the device in all, in GiB; weights and images count. To keep to
            it, kept layer outputs wait in host memory until heads read them, and fewer tokens and frames run at once;
            what is computed is the same up to rounding. "auto": what is free on the CUDA device when a forward begins,
            less 1 GiB. None: whatever it takes. Needs CUDA, `lean`, `outputs="read"` and VGGT's shape
            (docs/whole-model.md).
        modules: The global attention modules of a model that no record knows: modules of `model`, or their names.
        tokens_per_frame: With `modules`, the tokens P of a frame, special ones included. Not needed if `covisibility`
            gives graphs, whose number of frames tells.
        num_special_tokens: With `modules`, the number of tokens at the start of each frame that are special; (a, b)
            for the first a and the last b.
        trailing_tokens: With `modules`, the number of tokens after the last frame that belong to no frame.

    Returns:
        The handle: `undo()`, `report()`, and a context manager that undoes at its end.

    Raises:
        ValueError: If no record knows the model and `modules` is not given, the model is patched already, an argument
            has no meaning, or MegaLoc's weights are damaged. Calls of the patched model raise ValueError for attention
            that a layout cannot express: dropout, causal attention, masks that hide visible frames, keys that are not
            the queries' tokens; and for a `memory_budget` that is too small, before any work is done.
        TypeError: If an argument is of another type.
        FileNotFoundError: If MegaLoc's weights cannot be had; nothing is patched then. The message names other ways.
        ImportError: If the packages that fetch and read them are missing; the message says how to install them.
    """
    if special_tokens not in ("dense", "masked"):
        raise ValueError(f'special_tokens must be "dense" or "masked", got {special_tokens!r}')
    if precision not in ("upstream", "bf16") or outputs not in ("read", "all"):
        raise ValueError(
            'precision must be "upstream" or "bf16" and outputs "read" or "all", '
            f"got precision={precision!r}, outputs={outputs!r}"
        )
    if precision == "bf16" and not lean:
        raise ValueError('precision="bf16" is done by the lean blocks; leave lean=True')
    memory.check(memory_budget)
    if memory_budget is not None and not lean:
        raise ValueError("memory_budget is kept by the lean blocks; leave lean=True")
    if backend is not None:
        backend = backends.load(backend).NAME
    if modules is None:
        if tokens_per_frame is not None or num_special_tokens != 0 or trailing_tokens != 0:
            raise ValueError(
                "tokens_per_frame, num_special_tokens and trailing_tokens describe a model that no record knows; "
                "give them together with modules="
            )
        record, path, root = find_model(model)
        attention = each_once(record.global_attention(root))
    else:
        path, root, attention = "", model, named_modules(model, modules)
        record = stated_record(
            type(model).__name__,
            tokens_per_frame=tokens_per_frame,
            special_tokens=num_special_tokens,
            trailing_tokens=trailing_tokens,
        )
    if record.causal and special_tokens == "dense":
        raise ValueError(
            f"{record.name} is causal, and dense special tokens would show it later frames; "
            'use patch(model, special_tokens="masked")'
        )
    planner = Planner(record, covisibility, special_tokens == "dense")
    parts = Lean(model, root, precision, outputs, backend, memory_budget) if lean else None
    return Patch(root, path, attention, planner, backend, parts)


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
        lean: Lean | None,
    ) -> None:
        def full(name: str) -> str:
            return f"{path}.{name}" if path else name

        self.record = planner.record
        self.modules = tuple(full(name) for name in attention)
        self._planner = planner
        self._backend = backend
        self._names = {module: full(name) for name, module in attention.items()}
        self._root = StandIn(root, path or type(root).__name__, self._run_model)
        self._stand_ins = [self._root]
        self._stand_ins += [StandIn(module, full(name), self._attend) for name, module in attention.items()]
        self._lean = lean
        if lean is not None:
            self._stand_ins += [StandIn(block, full(name), self._run_block) for name, block in lean.blocks.items()]
            self._stand_ins += [StandIn(head, name, self._run_head) for name, head in lean.heads.items()]
            if lean.layers is not None or lean.keeps:
                self._stand_ins += [StandIn(root, full(stage), self._keep_outputs, stage) for stage in STAGES]
            if lean.embedding is not None:
                self._stand_ins.append(StandIn(lean.embedding, full("patch_embed"), self._embed))
        self._reorders = self.record.reorders_between(root)
        if self._reorders is not None:
            before, after = self._reorders
            self._stand_ins.append(StandIn(root.get_submodule(before), full(before), self._before_reordering))
            self._stand_ins.append(StandIn(root.get_submodule(after), full(after), self._after_reordering))
        self._unknown = {module: full(name) for name, module in self.record.unknown_attention(root).items()}
        self._stand_ins += [StandIn(module, name, self._watch) for module, name in self._unknown.items()]
        self._installed = False
        self._calls = 0
        self._forwards = Forwards(self._root.name)
        self._last: Forward | None = None
        self._install()

    @classmethod
    def of(cls, model: nn.Module) -> Patch:
        """Return the handle of a patched model, for example of a deep copy or of a model loaded from a file.

        Raises:
            ValueError: If the model is not patched.
        """
        for module in model.modules():
            stand_in = module.__dict__.get("forward")
            if isinstance(stand_in, StandIn):
                return stand_in.around.__self__  # type: ignore[attr-defined]
        raise ValueError(f"{type(model).__name__} is not patched")

    def undo(self) -> None:
        """Take the patch out and leave no trace of it in the model.

        Raises:
            RuntimeError: If it was undone already, something else has replaced the forward of a patched module, or a
                forward is running.
        """
        if not self._installed:
            raise RuntimeError("this patch was undone already; patch(model) makes a new one")
        covered = [stand_in.name for stand_in in self._stand_ins if stand_in.in_place not in self._stand_ins]
        if covered:
            raise RuntimeError(
                f"the forward of {', '.join(covered)} was replaced after patch(model); take that out first, then undo()"
            )
        with self._forwards.turn("the patch cannot be undone now"):
            if awaiting := self._forwards.awaiting:
                warnings.warn(
                    f"the patch is undone before backward has run, and a reentrant checkpoint will run {min(awaiting)} "
                    f"and {len(awaiting) - 1} other modules again, dense now; call backward() first, then undo()",
                    stacklevel=2,
                )
            for stand_in in reversed(self._stand_ins):
                stand_in.remove()
            self._installed = False
            self._forwards.forget()
            self._planner.forget()

    @property
    def graphs(self) -> tuple[CovisibilityGraph, ...]:
        """The graphs of the last forward, frames in the order of the images: one per sample, or one for all."""
        return self._finished().graphs

    @property
    def layouts(self) -> tuple[BlockLayout, ...]:
        """The layouts of the last forward, frames in the order of the model: one per sample, or one for all."""
        return self._finished().layouts

    @property
    def graph(self) -> CovisibilityGraph:
        """The graph of the last forward, if all samples had the same."""
        return _only(self.graphs, "graphs")

    @property
    def layout(self) -> BlockLayout:
        """The layout of the last forward, if all samples had the same."""
        return _only(self.layouts, "layouts")

    def report(self) -> PatchReport:
        """Tell what is patched and what ran in the last forward; reads the graph from its device.

        Nothing ran if that forward has raised, or is running.
        """
        with self._forwards.pause() as paused:
            return self._report(self._last if paused else None)

    def _report(self, last: Forward | None) -> PatchReport:
        forward, lean = last or Forward(ForwardInputs(None, None)), None if last is None else self._lean
        chosen, passed_over = None, {}
        if forward.kind is not None:
            chosen = choose_backend(*forward.kind, self._backend)
            passed_over = backends.passed_over(*forward.kind, chosen, named=self._backend is not None)
        return PatchReport(
            model=self.record.name,
            modules=self.modules,
            special_tokens="dense" if self._planner.dense_special else "masked",
            calls_last_forward=sum(forward.answered.values()),
            calls_total=self._calls,
            graphs=tuple(graph.summary() for graph in forward.graphs),
            visible_pairs=forward.over_graphs([layout.visible_pairs for layout in forward.layouts]),
            dense_pairs=forward.over_graphs([x.num_tokens * x.num_key_tokens for x in forward.layouts]),
            dense_modules=tuple(sorted(forward.dense)),
            backend=chosen,
            passed_over=passed_over,
            step_seconds=dict(forward.seconds),
            lean_blocks=0 if lean is None else lean.runs,
            within_frames=() if lean is None else tuple(sorted(lean.within_frames.ran)),
            not_lean={} if lean is None else dict(lean.not_lean),
            lean_heads=() if lean is None else tuple(sorted(lean.proven_heads.ran)),
            heads_not_lean={} if lean is None else dict(lean.proven_heads.not_lean),
            layers_kept=None if self._lean is None or self._lean.layers is None else tuple(sorted(self._lean.layers)),
            memory=None if lean is None else lean.plan,
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

    def _install(self) -> None:
        for stand_in in self._stand_ins:
            if isinstance(stand_in.in_place, StandIn):
                raise ValueError(
                    f"{stand_in.name} is patched already; call undo() on that patch first (Patch.of(model) returns it)"
                )
        for stand_in in self._stand_ins:
            stand_in.install()
        self._installed = True

    def _finished(self) -> Forward:
        if self._last is None:
            raise RuntimeError(
                "there is no graph or layout before the first forward of the patched model, nor after one that raised"
            )
        return self._last

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
                if self._lean is not None:
                    self._lean.end()
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
        if self._lean is not None:
            self._lean.begin(inputs.images, inputs.tokens_per_frame, self._planner.describes_tokens)
        self._planner.begin(forward)
        return forward

    @uncompiled(recursive=True)
    def _run_block(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run a block lean where that is possible."""
        lean, block = self._lean, stand_in.module
        attention: Any = block.attn
        assert lean is not None
        as_it_is = self._forwards.running is None or attention in self._unknown
        out, given = None, None if as_it_is else lean.arguments(block, args, kwargs)
        if given is not None:
            name = self._names.get(attention)
            attend = None if name is None else self._attend_lean(name, block, given[0])
            out = lean.run(block, *given, attend)
        return stand_in.original(*args, **kwargs) if out is None else out

    def _attend_lean(self, name: str, block: Any, x: Tensor) -> Callable[..., Tensor]:
        return lambda q, k, v, scale: self._answer(name, lambda: (blocks.entering(block, x),), q, k, v, scale=scale)

    @uncompiled(recursive=False)
    def _run_head(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run a head, lean where that is possible, on layer outputs that may lie elsewhere, or in bfloat16."""
        (layers, *others) = args or (kwargs.pop("aggregated_tokens_list"),)
        out = self._run_head_lean(stand_in, layers, *others, **kwargs)
        return run_head(stand_in.original, stand_in.module, layers, *others, **kwargs) if out is None else out

    @uncompiled(recursive=True)
    def _run_head_lean(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        lean, head = self._lean, stand_in.module
        assert lean is not None
        layers, images, first, *_ = inspect.signature(type(head).forward).bind(head, *args, **kwargs).args[1:]
        ready = lean.proven_heads.ready(stand_in.name, head, layers, images, first)
        return None if ready is None else run_head(ready, head, *args, **kwargs)

    @uncompiled(recursive=False)
    def _keep_outputs(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run a stage of the aggregator and keep the outputs that are read."""
        tokens, after, outputs = stand_in.original(*args, **kwargs)
        assert self._lean is not None
        return tokens, after, self._lean.keep(outputs, after)

    @uncompiled(recursive=False)
    def _embed(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run the patch embedding some images at a time."""
        if self._forwards.running is None or kwargs or len(args) != 1:
            return stand_in.original(*args, **kwargs)
        assert self._lean is not None
        return self._lean.embed(stand_in.original, *args)

    @uncompiled(recursive=True)
    def _attend(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run a global attention module, its attention call answered here."""
        answer = partial(self._answer, stand_in.name, lambda: (*args, *kwargs.values()))
        with Answering(stand_in.name, answer) as answering:
            output = stand_in.original(*args, **kwargs)
        answering.check()
        return output

    @uncompiled(recursive=False)
    def _watch(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run an attention module that the record does not know, unless it makes tokens of several frames attend."""
        forward = self._forwards.running
        tokens = [x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 3]
        if forward is not None and tokens:
            across = [forward.spans_frames(*shape[:2]) for shape in tokens]
            if across[0]:
                raise ValueError(
                    f"{stand_in.name} attends from {tokens[0][1]} tokens of several frames at once, and the record of "
                    f"{self.record.name} does not know it, so it would stay dense. Call the model without what needs "
                    "this module, or leave it dense and name those that shall be sparse: patch(model, modules=[...], "
                    "tokens_per_frame=P, num_special_tokens=R)"
                )
            if any(across):
                forward.dense.add(stand_in.name)
        return stand_in.original(*args, **kwargs)

    @uncompiled(recursive=True)
    def _answer(
        self,
        name: str,
        module_inputs: Callable[[], tuple[Any, ...]],
        query: Tensor,  # [B, H, N, D]
        key: Tensor,  # [B, H, N, D]
        value: Tensor,  # [B, H, N, D]
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Answer one call of scaled_dot_product_attention, whose parameters these are after the first two."""
        if dropout_p > 0:
            raise ValueError(
                f"attention dropout must be 0 in a patched model, but {name} uses dropout_p={dropout_p}; "
                "set it to 0 or call model.eval()"
            )
        if is_causal:
            raise ValueError(
                f"{name} uses is_causal=True, which hides later tokens within a frame too; a patch cannot do that. "
                "Turn it off, and hide later frames by the covisibility graph"
            )
        if enable_gqa and query.dim() == key.dim() == value.dim() == 4:
            key, value = (_expanded(name, heads, query) for heads in (key, value))
        if query.dim() != 4 or key.shape[:-1] != query.shape[:-1]:
            raise ValueError(
                f"{name} must attend from [B, H, N, D] to the same tokens, but its queries are {list(query.shape)} and "
                f"its keys {list(key.shape)}; caches of keys and cross-attention are not supported"
            )
        running = self._forwards.running
        forward = running or self._forwards.recomputed(name)
        if not forward.layouts:
            self._planner.plan(forward, name, query, module_inputs)
            forward.inputs = replace(forward.inputs, images=None)
            with forward.step("tables"):
                self._prepare(forward, query)
        layouts = forward.layouts
        if query.shape[2] != layouts[0].num_tokens or len(layouts) not in (1, len(query)):
            raise ValueError(
                f"{name} attends in {len(query)} samples of {query.shape[2]} tokens, but the first global attention of "
                f"this forward did so in {len(layouts)} of {layouts[0].num_tokens}; the layers of a patched model must "
                "agree; turn off what merges tokens (FastVGGT, ToMe) and stochastic depth over samples"
            )
        if attn_mask is not None and running is not None:  # what runs again was checked in its first run
            running.masks.require_redundant(name, attn_mask, layouts)
        if len(layouts) == 1:
            out = self._run(query, key, value, layouts[0], scale)
        else:
            samples = zip(query.split(1), key.split(1), value.split(1), layouts, strict=True)
            out = torch.cat([self._run(*sample, scale) for sample in samples])
        self._calls += 1
        self._forwards.note(name)
        if running is not None:
            running.answered[name] += 1
        return out

    def _prepare(self, forward: Forward, query: Tensor) -> None:
        """Make the tables that the backend walks, so that no layer has to."""
        device = query.device
        autocast = torch.is_autocast_enabled(device.type) and query.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device.type) if autocast else query.dtype
        forward.kind = (device, dtype, query.shape[-1])
        training = torch.is_grad_enabled() and query.requires_grad
        for layout in forward.layouts:
            prepare(layout, dtype, query.shape[-1], backend=self._backend, training=training)

    def _run(self, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float | None) -> Tensor:
        out = block_sparse_attention(query, key, value, layout, scale=scale, backend=self._backend)
        assert isinstance(out, Tensor)
        return out

    @uncompiled(recursive=False)
    def _before_reordering(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        output = stand_in.original(*args, **kwargs)
        if (forward := self._forwards.running) is not None:
            forward.before = _sample_frames(output)
        return output

    @uncompiled(recursive=False)
    def _after_reordering(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        if (forward := self._forwards.running) is not None:
            forward.after = _sample_frames(next(iter((*args, *kwargs.values()))))
        return stand_in.original(*args, **kwargs)


def _only(items: tuple[Any, ...], name: str) -> Any:
    if len(items) != 1:
        raise ValueError(f"the last forward had {len(items)} {name}, one per sample; use handle.{name}")
    return items[0]


def _expanded(name: str, heads: Tensor, query: Tensor) -> Tensor:
    """Return keys or values `[B, H / n, N, D]` repeated for each of n queries that share them, `[B, H, N, D]`."""
    times, rest = divmod(query.shape[1], max(1, heads.shape[1]))
    if rest or not times:
        raise ValueError(
            f"with enable_gqa=True the {query.shape[1]} heads of queries must be a multiple of the heads of keys and "
            f"values, but {name} has {heads.shape[1]}"
        )
    return heads.repeat_interleave(times, dim=1)


def _sample_frames(tokens: Tensor) -> Tensor:
    """Return some values of each frame's tokens `[B * S, P, C]`, as `[B * S, K]`."""
    return tokens.detach()[:, :4, :64].flatten(1).clone()
