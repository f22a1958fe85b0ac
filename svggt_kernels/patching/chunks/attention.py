"""Attention of a scene's core to itself, and of further frames to the core's kept keys and to themselves.

A closed core sees the core alone, and a frame outside it sees the core and itself. So a chunk of further frames needs
of the core no more than its keys and values at each attention across frames: what they give each frame is what one
forward of all frames would give, whichever frames run together.

Frames that all see at a stride (`CoarseGraph.core`) are closed with the core. They run with it, and of their keys and
values those are kept that are seen: of special tokens, which lie among the core's, as each stands for itself, and of
patches, which are a part of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import block_sparse_attention, choose_backend
from ...coarse import CoarseLayout
from ...compiling import uncompiled
from ...layout import BlockLayout
from ...merging import merge
from ...models import ForwardInputs, ModelRecord
from ..interception import Answering, StandIn
from ..masks import require_redundant
from .layouts import ChunkLayouts, ClosedFrames, FrameTokens

Call = tuple[str, int]
"""An attention call in a forward: the module's name, and how often it was called before."""


@dataclass(eq=False)
class Run:
    """One forward, of the closed frames or of a chunk.

    Attributes:
        frames: Frames S that the model is given.
        sees_itself: Of a chunk, whether each frame sees itself beside the core; a frame of the core that runs again
            does not, as the core holds it already. None for the run of the closed frames.
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
    """Keys and values of the closed frames at one attention call.

    Attributes:
        keys: `[B, H, N, D]`, whose memory lies as `[B, N, H, D]`; each stands for itself.
        values: Likewise.
        patches: Those of patches that are seen at a stride, each of which stands for several; None if there are none.
    """

    keys: Tensor
    values: Tensor
    patches: Kept | None = None

    @classmethod
    def of(cls, key: Tensor, value: Tensor, tokens: Tensor | None = None) -> Kept:
        """Keep the keys and values of some tokens, or of all, in memory of their own."""
        return cls(_own_memory(key, tokens), _own_memory(value, tokens))

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.keys.nbytes + self.values.nbytes + (0 if self.patches is None else self.patches.nbytes)


class CoreAttention:
    """Answers the attention across frames of one model, in runs of the core and of chunks.

    Args:
        record: What is known about the model.
        modules: Its global attention modules by name, in the order in which they run.
        followers: Its further attention modules that look across frames.
        backend: The backend that must run the global attention, or None for the best that can.

    Attributes:
        closed: The frames of which keys and values are kept; None before they have run.
        kept: Theirs, by attention call.
        run: The forward that runs, or None.
        kind: Device, dtype and head size of global attention; None before it has run.
        answered: Calls of global attention answered so far, of all runs.
        per_frame: Tokens of a frame in it; 0 before it has run.
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
        self._names = tuple(self.modules)
        self.closed: ClosedFrames | None = None
        self.kept: dict[Call, Kept] = {}
        self.run: Run | None = None
        self.answered = self.per_frame = 0
        self.kind: tuple[torch.device, torch.dtype, int] | None = None
        self._layouts = ChunkLayouts()

    @property
    def chosen_backend(self) -> str | None:
        """The backend that runs the global attention; None before it has run."""
        return None if self.kind is None else choose_backend(*self.kind, self.backend)

    @property
    def kept_bytes(self) -> int:
        """Bytes of all keys and values that are kept."""
        return sum(kept.nbytes for kept in self.kept.values())

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
        return self._answer(self._names[layer], lambda: (tokens(),), q, k, v, scale=scale)

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
        # Camera heads run in float32, which the backend that was named may not take.
        backend = None
        if name in self.modules:
            backend, self.kind = self.backend, (query.device, query.dtype, query.shape[3])
            self.answered, self.per_frame = self.answered + 1, per_frame
        tokens = FrameTokens(run.frames, per_frame, trailing, query.device)
        if run.sees_itself is None:
            layout = self._of_closed(name, tokens, run.inputs)
            if attn_mask is not None:
                require_redundant(name, attn_mask, (layout,), {})
            self.kept[call] = self._keep(tokens, layout, key, value)
            out = block_sparse_attention(query, key, value, layout, scale=scale, backend=backend)
            assert isinstance(out, Tensor)
            return out
        if call not in self.kept:
            raise ValueError(
                f"{name} attends {call[1] + 1} times in this forward, but less often in that of the core, so "
                "what it should see is not known; this model cannot be opened"
            )
        if attn_mask is not None:
            require_redundant(name, attn_mask, (self._layouts.of_frames_alone(tokens),), {})
        kept = self.kept[call]
        scale = self._scale(name, scale, tokens, query)
        key, value = _behind(kept.keys, key), _behind(kept.values, value)
        parts = [(key, value, self._layouts.of_chunk(tokens, run.sees_itself, kept.keys.shape[2]), 1.0)]
        if (patches := kept.patches) is not None:
            count = patches.keys.shape[2]
            weight = self._coarse_patches(run.inputs) / count
            parts.append((patches.keys, patches.values, self._layouts.of_all(tokens, count), weight))
        return _attend(query, parts, scale, backend)

    def _of_closed(self, name: str, tokens: FrameTokens, inputs: ForwardInputs) -> BlockLayout | CoarseLayout:
        """Return the layout of the closed frames, which all see one another, or in causal models what came before.

        Global attention sees some of them at a stride. Modules that follow it attend over special tokens, which are all
        seen.
        """
        closed = self.closed
        assert closed is not None
        if closed.coarse and name in self.modules:
            return self._layouts.of_closed(tokens, closed, inputs, self.record.name)
        if self.record.causal:
            return self._layouts.of_earlier_frames(tokens)
        return self._layouts.of_all(tokens, tokens.total)

    def _keep(
        self,
        tokens: FrameTokens,
        layout: BlockLayout | CoarseLayout,
        key: Tensor,  # [B, H, N, D]
        value: Tensor,  # [B, H, N, D]
    ) -> Kept:
        """Keep the keys and values of closed frames that further frames see."""
        if not isinstance(layout, CoarseLayout):
            return Kept.of(key, value)
        assert self.closed is not None
        every = torch.arange(tokens.total, device=tokens.device)
        core, trailing = every[: self.closed.full * tokens.per_frame], every[tokens.total - tokens.trailing :]
        _, *special, patches = (part.tokens for part in layout.parts)
        kept = Kept.of(key, value, torch.cat([core, trailing, *(each for each in special if each is not None)]))
        kept.patches = Kept.of(key, value, patches)
        return kept

    def _coarse_patches(self, inputs: ForwardInputs) -> int:
        """Return how many patches the frames have that are seen at a stride."""
        assert self.closed is not None and inputs.patch_grid is not None
        return self.closed.coarse * inputs.patch_grid[0] * inputs.patch_grid[1]

    def _scale(self, name: str, scale: float | None, tokens: FrameTokens, query: Tensor) -> float | None:
        """Return the scale with which scores grow as they did in the run of the closed frames."""
        growth = self.record.growth
        if growth is None or name not in self.modules:
            return scale
        module, closed = self.modules[name], self.closed
        assert closed is not None
        factor = growth(module, tokens._replace(frames=closed.count).total) / growth(module, tokens.total)
        return (query.shape[3] ** -0.5 if scale is None else scale) * factor


def _attend(
    query: Tensor,  # [B, H, N, D]
    parts: Sequence[tuple[Tensor, Tensor, BlockLayout, float]],
    scale: float | None,
    backend: str | None,
) -> Tensor:
    """Return attention `[B, H, N, D]` over parts: keys, values, layout, and how many keys each of them stands for."""
    if len(parts) == 1:
        key, value, layout, _ = parts[0]
        out = block_sparse_attention(query, key, value, layout, scale=scale, backend=backend)
        assert isinstance(out, Tensor)
        return out
    outs, lses = [], []
    for key, value, layout, weight in parts:
        out, lse = block_sparse_attention(query, key, value, layout, scale=scale, return_lse=True, backend=backend)
        outs.append(out)
        lses.append(lse + math.log(weight))
    return merge(outs, lses)[0]


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


def _own_memory(heads: Tensor, tokens: Tensor | None) -> Tensor:
    """Return a copy of some tokens of `[B, H, N, D]` that holds no more memory than itself, lying as `[B, N, H, D]`."""
    lying = heads.detach().transpose(1, 2)
    if tokens is None:
        return lying.clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return lying.index_select(1, tokens).transpose(1, 2)


def _behind(core: Tensor, own: Tensor) -> Tensor:
    """Return a chunk's keys or values behind those of the core.

    A copy for one layer at a time: room behind the core's in each layer would be as much as the chunk's times the
    layers.
    """
    B, H, N, D = core.shape
    both = core.new_empty(B, N + own.shape[2], H, D).transpose(1, 2)
    both[:, :, :N] = core  # torch.cat takes longer where what it is given is laid out in two ways
    both[:, :, N:] = own
    return both
