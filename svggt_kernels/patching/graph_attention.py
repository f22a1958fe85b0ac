"""The attention of one forward over its layouts: interception of modules' calls, and for a forward of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import block_sparse_attention, prepare
from ..coarse import CoarseLayout
from ..compiling import uncompiled
from ..layout import BlockLayout
from .forwards import Forward, Forwards
from .interception import Answering, StandIn
from .masks import require_redundant
from .parts import Around
from .plan import Planner


class GraphAttention:
    """Answers the global attention of forwards over the layouts that a planner makes at the first of its calls.

    Args:
        planner: Makes the layouts of a forward.
        forwards: Says which forward a call belongs to.
        modules: The global attention modules by name, in the order in which the model runs them.
        backend: The backend that must run, or None for the best that can.

    Attributes:
        calls: Calls answered so far, those that checkpointing ran again included.
    """

    def __init__(
        self, planner: Planner, forwards: Forwards, modules: Mapping[str, nn.Module], backend: str | None
    ) -> None:
        self.planner, self.forwards, self.modules, self.backend = planner, forwards, dict(modules), backend
        self._layer_of = {name: layer for layer, name in enumerate(self.modules)}
        self.calls = 0

    def sites(self) -> Iterable[tuple[nn.Module, str, Around]]:
        """Return the global attention modules."""
        return [(module, name, self._intercept) for name, module in self.modules.items()]

    @uncompiled(recursive=True)
    def _intercept(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        """Run a module and answer the one attention call in it."""

        def answer(*of_call: Any, **options: Any) -> Tensor:
            return self.answer(stand_in.name, lambda: (*args, *kwargs.values()), *of_call, **options)

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
        return self.answer(list(self.modules)[layer], lambda: (tokens(),), q, k, v, scale=scale)

    def answer(
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

        Args:
            name: What messages call the attention module.
            module_inputs: Returns the module's arguments, its tokens `[B, N, C]` among them.
            query: Its queries.
            key: Its keys; with `enable_gqa` of fewer heads.
            value: Its values, likewise.
            attn_mask: A mask that hides nothing that the layout shows, or None.
            dropout_p: Must be 0.
            is_causal: Must be False.
            scale: As in `block_sparse_attention`.
            enable_gqa: Whether heads of keys and values are shared by several of queries.

        Raises:
            ValueError: If a layout cannot express it.
        """
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
        running = self.forwards.running
        forward = running or self.forwards.recomputed(name)
        if not forward.planned:
            self.planner.plan(forward, name, query, module_inputs)
            forward.inputs = replace(forward.inputs, images=None)
            with forward.step("tables"):
                self._prepare(forward, query)
        planned = forward.of_layer(self._layer_of[name])
        layouts = planned.layouts
        if query.shape[2] != layouts[0].num_tokens or len(layouts) not in (1, len(query)):
            raise ValueError(
                f"{name} attends in {len(query)} samples of {query.shape[2]} tokens, but the first global attention of "
                f"this forward did so in {len(layouts)} of {layouts[0].num_tokens}; the layers of a patched model must "
                "agree; turn off what merges tokens (FastVGGT, ToMe) and stochastic depth over samples"
            )
        if attn_mask is not None and running is not None:  # what runs again was checked in its first run
            require_redundant(name, attn_mask, layouts, running.masks.setdefault(planned, {}))
        if len(layouts) == 1:
            out = self._run(query, key, value, layouts[0], scale)
        else:
            samples = zip(query.split(1), key.split(1), value.split(1), layouts, strict=True)
            out = torch.cat([self._run(*sample, scale) for sample in samples])
        self.calls += 1
        self.forwards.note(name)
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
            prepare(layout, dtype, query.shape[-1], backend=self.backend, training=training)

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout | CoarseLayout, scale: float | None
    ) -> Tensor:
        out = block_sparse_attention(query, key, value, layout, scale=scale, backend=self.backend)
        assert isinstance(out, Tensor)
        return out


def _expanded(name: str, heads: Tensor, query: Tensor) -> Tensor:
    """Return keys or values `[B, H / n, N, D]` repeated for each of n queries that share them, `[B, H, N, D]`."""
    times, rest = divmod(query.shape[1], max(1, heads.shape[1]))
    if rest or not times:
        raise ValueError(
            f"with enable_gqa=True the {query.shape[1]} heads of queries must be a multiple of the heads of keys and "
            f"values, but {name} has {heads.shape[1]}"
        )
    return heads.repeat_interleave(times, dim=1)
