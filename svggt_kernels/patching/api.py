"""`patch(model)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from .. import backends
from ..graph.arguments import integer
from ..inference import memory
from ..inference.fused_forward import FusedForward, Outputs, Precision
from ..models import find_model, stated_record
from ..models.wrappers import each_once, named_modules
from ..sources import PerLayer
from ..user_warnings import warn
from .chunks.forward import ChunkedForward, not_closed
from .handle import Patch
from .plan import Covisibility, Planner


def patch(
    model: nn.Module,
    *,
    covisibility: Covisibility | PerLayer = "core",
    special_tokens: Literal["dense", "masked"] | None = None,
    backend: str | None = None,
    fused: bool | None = None,
    precision: Precision = "upstream",
    outputs: Outputs = "read",
    chunk: int | None = None,
    memory_budget: memory.MemoryBudget = None,
    modules: Iterable[str | nn.Module] | None = None,
    tokens_per_frame: int | None = None,
    num_special_tokens: int | tuple[int, int] = 0,
    trailing_tokens: int = 0,
    lean: bool | None = None,
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
            "core", or a `Core` with other options: each sees itself and 52 frames that represent all, chosen by
            MegaLoc's descriptors; up to 52 frames see everything;
            "patches": the same, chosen by patches of the model itself, without other weights: what was measured to keep
            a model best (docs/accuracy.md);
            "megaloc", or a `MegaLocSimilarity` with other options: the frames most like it by MegaLoc's descriptors;
            "tokens", or a `TokenSimilarity` with other options: likewise by the model's own tokens;
            "thumbnails", or a `ThumbnailSimilarity`: likewise by images made small, crude but without weights; these
            three were measured to lose most of the poses of a model that was trained densely (docs/accuracy.md);
            "sequential": the 10 frames before and after, and the model's reference frame;
            "all": everything, which is dense attention;
            a `CovisibilityGraph` over the frames in the order of the images, or a list with one graph per sample;
            a `CoarseGraph`, likewise, or a `Core` with `coarse`: some frames are seen at a stride of their patch grid;
            a function of the images `[B, S, 3, H, W]` that returns either;
            `PerLayer`, with any of these for each global layer;
            any other `svggt_kernels.sources.Source` (docs/covisibility.md).
        special_tokens: "dense": camera, register and other special tokens see everything and are seen by everything;
            "masked": they are ordinary tokens of their frame. None: masked where the graph has a core, as they would
            make the cost quadratic again and were measured to do harm (docs/accuracy.md), and in causal models; else
            dense.
        backend: The backend that must run, or None for the best that can; see `block_sparse_attention`.
        fused: At inference run models of VGGT's shape, their heads included, by a forward of our own with the model's
            parameters, in few passes over memory. What is computed is the same up to rounding: that is verified against
            the model's own forward in float64, once for each size of images. None: on CUDA only, as on a CPU it gains
            nothing. Other models run as they are.
        precision: "upstream": the residual stream and the layer outputs kept have the model's own dtypes; "bf16":
            bfloat16, which halves them and deviates (docs/whole-model.md). Needs a model of VGGT's shape.
        outputs: "read": of VGGT's layer outputs the fused forward keeps those that the heads of `model` read; "all":
            all of them, as the model does.
        chunk: Run the core of each forward once, and all other frames so many at a time, as `open_scene` does: memory
            on the device then follows the core and the chunk, and what is returned. Needs a closed core (`Core` without
            `nearest`, with no or a number of `coarse`; `CovisibilityGraph.core`), inference, and images as the only
            argument of `model` itself; a module inside it that is called by itself runs all frames at once. Where
            `model` is compiled, chunks are not. VGGT's camera head runs once over all frames, as in one forward; what
            else looks across frames beside global attention follows the core (docs/many-photos.md). None: one forward
            of all frames, unless `memory_budget` says otherwise.
        memory_budget: What one forward may allocate on the device in all, in GiB; weights and images count. To keep to
            it, kept layer outputs wait in host memory until heads read them, and fewer tokens and frames run together;
            what is computed is the same up to rounding. "auto": what is free on the CUDA device when a forward begins,
            less 1 GiB. None: whatever it takes. Needs CUDA, `outputs="read"` and VGGT's shape (docs/whole-model.md).
            Where one forward of all frames does not fit and they see a closed core, they run in chunks of as many as
            fit; with `chunk`, of so many.
        modules: The global attention modules of a model that no record knows: modules of `model`, or their names.
        tokens_per_frame: With `modules`, the tokens P of a frame, special ones included. Not needed if `covisibility`
            gives graphs, whose number of frames tells.
        num_special_tokens: With `modules`, the number of tokens at the start of each frame that are special; (a, b)
            for the first a and the last b.
        trailing_tokens: With `modules`, the number of tokens after the last frame that belong to no frame.
        lean: The former name of `fused`.

    Returns:
        The handle: `undo()`, `report()`, and a context manager that undoes at its end.

    Raises:
        ValueError: If no record knows the model and `modules` is not given, the model is patched already, an argument
            has no meaning, or MegaLoc's weights are damaged. Calls of the patched model raise ValueError for attention
            that a layout cannot express: dropout, causal attention, masks that hide visible frames, keys that are not
            the queries' tokens; for images outside [0, 1] where the record knows that the model takes such, on CUDA in
            the first call alone, as the host waits for that; and for a `memory_budget` that is too small, before any
            work is done, in chunks before the core runs or after it.
        TypeError: If an argument is of another type.
        FileNotFoundError: If MegaLoc's weights cannot be had; nothing is patched then. The message names other ways.
        ImportError: If the packages that fetch and read them are missing; the message says how to install them.
    """
    if special_tokens not in ("dense", "masked", None):
        raise ValueError(f'special_tokens must be "dense", "masked" or None, got {special_tokens!r}')
    if precision not in ("upstream", "bf16") or outputs not in ("read", "all"):
        raise ValueError(
            'precision must be "upstream" or "bf16" and outputs "read" or "all", '
            f"got precision={precision!r}, outputs={outputs!r}"
        )
    memory.check(memory_budget)
    if lean is not None:
        if fused is not None:
            raise ValueError(f"lean is the former name of fused, give fused alone; got lean={lean}, fused={fused}")
        warn("patch(lean=...) is called fused=... now", DeprecationWarning)
        fused = lean
    for name, is_given in (('precision="bf16"', precision == "bf16"), ("memory_budget", memory_budget is not None)):
        if is_given and fused is False:
            raise ValueError(f"{name} is kept by the fused forward; leave fused=None, or give True")
        fused = True if is_given else fused
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
            'use patch(model, special_tokens="masked"), or leave it out'
        )
    dense_special = False if record.causal else None if special_tokens is None else special_tokens == "dense"
    if chunk is not None:
        chunk = integer("chunk", chunk, 1)
        if modules is not None or outputs == "all":
            raise ValueError(
                "chunk needs a model that a record knows, and heads that read its layer outputs; leave out "
                + ("modules" if modules is not None else 'outputs="all"')
            )
    planner = Planner(record, covisibility, dense_special, len(attention), counted=memory_budget is not None)
    own = None
    if fused is not False:
        own = FusedForward(
            model,
            path,
            tuple(attention.values()),
            fused=fused,
            precision=precision,
            keep=outputs,
            backend=backend,
            memory_budget=memory_budget,
        )
    chunks = None
    if chunk is not None or (memory_budget is not None and modules is None and not_closed(planner) is None):
        chunks = ChunkedForward(
            model, planner, chunk, fused=fused, precision=precision, backend=backend, memory_budget=memory_budget
        )
    return Patch(root, path, attention, planner, backend, own, chunks)
