"""Attention of a scene's core to itself, and of further frames to the core's kept keys and to themselves.

A closed core sees the core alone, and a frame outside it sees the core and itself. So a chunk of further frames needs
of the core no more than its keys and values at each attention across frames: what they give each frame is what one
forward of all frames would give, whichever frames run together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import block_sparse_attention, choose_backend
from ...compiling import uncompiled
from ...graph import CovisibilityGraph
from ...layout import BlockLayout
from ...models import ForwardInputs, ModelRecord
from ...sources.cache import LRUCache
from ..interception import Answering, StandIn
from ..masks import require_redundant

Call = tuple[str, int]
"""An attention call in a forward: the module's name, and how often it was called before."""

LAYOUTS_KEPT = 16


@dataclass(eq=False)
class Run:
    """One forward, of the core or of a chunk.

    Attributes:
        frames: Frames S that the model is given.
        sees_itself: Of a chunk, whether each frame sees itself beside the core; a frame of the core that runs again
            does not, as the core holds it already. None for the core's own run.
        describes: Of a run that ends at the first attention across frames, by `Described`: what is read of the frames'
            patch tokens there, `[S, P, C]`.
        inputs: What the record reads from the forward's arguments.
        calls: Attention calls so far, by module.
        before, after: Values of the frames' tokens before and after the model may reorder its frames.
    """

    frames: int
    sees_itself: tuple[bool, ...] | None = None
    describes: Callable[[Tensor], Tensor] | None = None
    inputs: ForwardInputs = field(default_factory=lambda: ForwardInputs(None, None))
    calls: Counter[str] = field(default_factory=Counter)
    before: Tensor | None = None
    after: Tensor | None = None


class Described(Exception):
    """Ends a forward that was run for the tokens that enter its first attention across frames.

    Attributes:
        tokens: What was read of the patch tokens of each frame.
    """

    def __init__(self, tokens: Tensor) -> None:
        super().__init__("the frames are described")
        self.tokens = tokens


@dataclass
class Kept:
    """Keys and values of the core at one attention call.

    Attributes:
        keys: `[B, H, N, D]`, whose memory lies as `[B, N, H, D]`.
        values: Likewise.
    """

    keys: Tensor
    values: Tensor


class CoreAttention:
    """Answers the attention across frames of one model, in runs of the core and of chunks.

    Args:
        record: What is known about the model.
        modules: Its global attention modules by name, in the order in which they run.
        followers: Its further attention modules that look across frames.
        backend: The backend that must run the global attention, or None for the best that can.

    Attributes:
        kept: Of the core, by attention call; empty before the core has run.
        run: The forward that runs, or None.
    """

    def __init__(
        self,
        record: ModelRecord,
        modules: Mapping[str, nn.Module],
        followers: Mapping[str, nn.Module],
        backend: str | None,
    ) -> None:
        self.record, self.backend = record, backend
        self.modules, self.followers = dict(modules), dict(followers)
        self.kept: dict[Call, Kept] = {}
        self.run: Run | None = None
        self._kind: tuple[torch.device, torch.dtype, int] | None = None
        self._layouts: LRUCache[BlockLayout] = LRUCache(LAYOUTS_KEPT)

    @property
    def chosen_backend(self) -> str | None:
        """The backend that runs the global attention; None before it has run."""
        return None if self._kind is None else choose_backend(*self._kind, self.backend)

    @property
    def kept_bytes(self) -> int:
        """Bytes of all keys and values that are kept."""
        return sum(kept.keys.nbytes + kept.values.nbytes for kept in self.kept.values())

    def sites(self) -> Iterable[tuple[nn.Module, str, Callable[..., Any]]]:
        """Return the attention modules, their names and what runs around them."""
        both = {**self.modules, **self.followers}
        return [(module, name, self._intercept) for name, module in both.items()]

    @uncompiled(recursive=True)
    def _intercept(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run a module and answer the attention calls in it."""

        def answer(*of_call: Any, **options: Any) -> Tensor:
            return self._answer(stand_in.name, lambda: (*args, *kwargs.values()), *of_call, **options)

        with Answering(stand_in.name, answer) as answering:
            output = stand_in.original(*args, **kwargs)
        answering.check()
        return output

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [B, H, N, D]
        k: Tensor,  # [B, H, N, D]
        v: Tensor,  # [B, H, N, D]
        scale: float,
        *,
        tokens: Callable[[], Tensor],
    ) -> Tensor:
        """Return the output `[B, H, N, D]` of a global layer of a forward of our own; see `GlobalAttention`."""
        return self._answer(list(self.modules)[layer], lambda: (tokens(),), q, k, v, scale=scale)

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
        """Answer one call of scaled_dot_product_attention, whose parameters these are after the first two.

        Raises:
            Described: If the run is to describe its frames.
            ValueError: If it is attention that does not follow a closed core.
        """
        run = self.run
        assert run is not None
        if dropout_p > 0 or is_causal or enable_gqa or query.dim() != 4 or key.shape != query.shape:
            raise ValueError(
                f"{name} must attend from [B, H, N, D] to the same tokens without dropout, is_causal and enable_gqa, "
                f"got queries {list(query.shape)} and keys {list(key.shape)}, dropout_p={dropout_p}, "
                f"is_causal={is_causal}, enable_gqa={enable_gqa}; run this model by patch(model)"
            )
        trailing = run.inputs.trailing_tokens if name in self.modules else 0
        per_frame, rest = divmod(query.shape[2] - trailing, run.frames)
        if rest or per_frame < 1:
            raise ValueError(
                f"{name} attends over {query.shape[2]} tokens, which is not the same number for each of {run.frames} "
                f"frames and {trailing} trailing tokens; turn off what merges tokens"
            )
        if run.describes is not None:
            raise Described(run.describes(_patch_tokens(module_inputs(), run, per_frame)))
        query, key, value = _as_computed(query, key, value)
        call = name, run.calls[name]
        run.calls[name] += 1
        if run.sees_itself is None:
            self.kept[call] = Kept(_own_memory(key), _own_memory(value))
            layout = self._of_core(run.frames, per_frame, trailing, query.device)
            if attn_mask is not None:
                require_redundant(name, attn_mask, (layout,), {})
        else:
            if call not in self.kept:
                raise ValueError(
                    f"{name} attends {call[1] + 1} times in this forward, but less often in that of the core, so "
                    "what it should see is not known; this model cannot be opened"
                )
            if attn_mask is not None:
                alone = self._of_frames(run.frames, per_frame, query.device)
                require_redundant(name, attn_mask, (alone,), {})
            kept = self.kept[call]
            scale = self._scale(name, scale, query, kept)
            key, value = _behind(kept.keys, key), _behind(kept.values, value)
            layout = self._of_chunk(run.sees_itself, per_frame, trailing, kept.keys.shape[2], query.device)
        # Camera heads run in float32, which the backend that was named may not take.
        backend = None
        if name in self.modules:
            backend, self._kind = self.backend, (query.device, query.dtype, query.shape[3])
        out = block_sparse_attention(query, key, value, layout, scale=scale, backend=backend)
        assert isinstance(out, Tensor)
        return out

    def _scale(self, name: str, scale: float | None, query: Tensor, kept: Kept) -> float | None:
        """Return the scale with which scores grow as they did in the run of the core."""
        growth = self.record.growth
        if growth is None or name not in self.modules:
            return scale
        module, (tokens, head_size) = self.modules[name], query.shape[2:]
        factor = growth(module, kept.keys.shape[2]) / growth(module, tokens)
        return (head_size**-0.5 if scale is None else scale) * factor

    def _of_core(self, frames: int, per_frame: int, trailing: int, device: torch.device) -> BlockLayout:
        """Return the layout of the core: everything sees everything, or in causal models what came before."""

        def new_layout() -> BlockLayout:
            if not self.record.causal:
                return BlockLayout.from_graph(CovisibilityGraph.all_visible(1), frames * per_frame + trailing)
            earlier = [(i, j) for i in range(frames) for j in range(i)]
            return BlockLayout.from_graph(CovisibilityGraph.from_pairs(frames, earlier), per_frame)

        return self._layout(("core", frames, per_frame, trailing, device), new_layout)

    def _of_frames(self, frames: int, per_frame: int, device: torch.device) -> BlockLayout:
        """Return the layout in which each frame sees itself alone."""

        def new_layout() -> BlockLayout:
            return BlockLayout.from_graph(CovisibilityGraph.from_pairs(frames, []), per_frame)

        return self._layout(("frames", frames, per_frame, device), new_layout)

    def _of_chunk(
        self, sees_itself: tuple[bool, ...], per_frame: int, trailing: int, core: int, device: torch.device
    ) -> BlockLayout:
        """Return the layout of a chunk, whose first key frame is all that is kept of the core."""

        def new_layout() -> BlockLayout:
            lengths = [per_frame] * len(sees_itself) + [trailing] * (trailing > 0)
            pairs = [(row, 0) for row in range(len(lengths))]
            pairs += [(row, 1 + row) for row, itself in enumerate(sees_itself) if itself]
            graph = CovisibilityGraph.from_pairs(len(lengths), sorted(pairs), num_key_frames=1 + len(lengths))
            return BlockLayout.from_graph(graph, lengths, key_tokens_per_frame=[core, *lengths], dense_special=False)

        return self._layout((sees_itself, per_frame, trailing, core, device), new_layout)

    def _layout(self, key: tuple[Any, ...], new_layout: Callable[[], BlockLayout]) -> BlockLayout:
        return self._layouts.get(key, lambda: new_layout().to(key[-1]))


def _patch_tokens(module_inputs: tuple[Any, ...], run: Run, per_frame: int) -> Tensor:
    """Return the patch tokens of each frame, `[S, P, C]`, of the tokens that enter an attention module."""
    count = run.frames * per_frame
    special = run.inputs.special_tokens
    first, last = special if isinstance(special, tuple) else (special, 0)
    for tokens in module_inputs:
        if isinstance(tokens, Tensor) and tokens.is_floating_point() and tokens.dim() == 3 and len(tokens) == 1:
            return tokens[0, :count].unflatten(0, (run.frames, per_frame))[:, first : per_frame - last]
    raise ValueError(
        'the core cannot be chosen by the tokens of this model; give core= as indices, or Core(by="thumbnails")'
    )


def _as_computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors as the operator casts them under autocast, so that what is kept takes no more memory."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _own_memory(heads: Tensor) -> Tensor:
    """Return a copy of `[B, H, N, D]` that holds no more memory than itself, lying as `[B, N, H, D]`."""
    return heads.detach().transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _behind(core: Tensor, own: Tensor) -> Tensor:
    """Return a chunk's keys or values behind those of the core.

    A copy for one layer at a time: room behind the core's in each layer would be as much as the chunk's times the
    layers.
    """
    return torch.cat([core.transpose(1, 2), own.transpose(1, 2)], dim=1).transpose(1, 2)
