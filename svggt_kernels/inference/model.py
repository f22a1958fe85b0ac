"""Which parts of one patched model run lean, and the proof that they compute what upstream does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.wrappers import unwrapped
from . import blocks, inference, memory, outputs
from .embedding import embed
from .proof import Proofs, disagreement
from .proven_heads import ProvenHeads
from .settings import Settings, twin
from .within_frames import AttentionWithinFrames, by_pytorch

Precision = Literal["upstream", "bf16"]
Outputs = Literal["read", "all"]
PROOF_TOKENS = 1024
"""Tokens of each of two samples by which a block is proven: all of a frame of most sizes."""


class Lean:
    """The lean parts of a model.

    Args:
        model: The model that was given to `patch`, with its heads.
        root: The module in it that runs the blocks.
        precision: Dtype of the residual stream and of the layer outputs kept: upstream's, or bfloat16.
        keep: Keep the layer outputs that heads read, or all.
        backend: The backend that the patch was given, or None.
        memory_budget: What one forward may allocate, see `memory`.

    Attributes:
        blocks: The blocks that can run lean, by name in `root`.
        layers: The layers whose outputs are kept; None for all.
        keeps: Whether outputs that are kept are not tensors but `outputs.Output`.
        heads: The DPT heads, by name in `model`; they run some frames at a time if `keeps`.
        embedding: The patch embedding, if it runs some images at a time.
        not_lean: Why blocks with an attention cannot, by name of their class.
        plan: How the last forward kept to its budget; None without one.
        keeper: Who keeps the outputs of the forward that is running.
        within_frames: The attention of the blocks whose attention is not patched.
        proven_heads: Makes heads ready to run lean.

    Raises:
        ValueError: If residuals should be bfloat16 and no block can run lean, or a budget is given for a model whose
            memory is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        root: nn.Module,
        precision: Precision,
        keep: Outputs,
        backend: str | None,
        memory_budget: memory.MemoryBudget,
    ) -> None:
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.budget = memory_budget
        self.blocks: dict[str, nn.Module] = {}
        self._obstacles: dict[str, str] = {}
        for name, module in root.named_modules():
            # A wrapper passes the attention of the block inside on.
            if isinstance(getattr(module, "attn", None), nn.Module) and unwrapped(module) is module:
                reason = blocks.obstacle(module)
                if reason is None:
                    self.blocks[name] = module
                else:
                    self._obstacles[type(module).__name__] = reason
        self.not_lean = dict(self._obstacles)
        staged = outputs.are_upstreams(type(root))
        reasons = [f"{name}: {reason}" for name, reason in self.not_lean.items()]
        reasons += [] if staged else [f"{type(root).__name__} lacks {' and '.join(outputs.STAGES)}"]
        if self.dtype is not None and not (self.blocks and staged):
            raise ValueError(
                "precision=\"bf16\" needs blocks of VGGT's shape and an aggregator that runs them as VGGT's does, and "
                f'{type(root).__name__} has none ({"; ".join(reasons)}); leave precision="upstream"'
            )
        self.depth = len(getattr(root, "global_blocks", ()))
        self.layers = outputs.layers_read(model, self.depth) if staged and keep == "read" else None
        foreign = {
            name: f"the forward of {type(module).__name__} does not take what VGGT's DPT heads take"
            for name, module in model.named_modules()
            if hasattr(module, "intermediate_layer_idx") and not outputs.reads_some_frames(module)
        }
        reasons += foreign.values()
        if memory_budget is not None and (reasons or self.layers is None):
            if self.layers is None:
                reasons.append(
                    'outputs="all" keeps every layer' if keep == "all" else "no head says which layers it reads"
                )
            raise ValueError(
                "memory_budget needs a model of VGGT's shape with its heads, whose memory is known, and that of "
                f"{type(model).__name__} is not ({'; '.join(reasons)}); leave memory_budget=None"
            )
        self.keeps = self.dtype is not None or memory_budget is not None
        self.heads = {name: head for name, head in model.named_modules() if outputs.reads_some_frames(head)}
        self.plan: memory.Plan | None = None
        self.keeper: outputs.Keeper | None = None
        embedding = getattr(root, "patch_embed", None)
        self.embedding = embedding if memory_budget is not None and isinstance(embedding, nn.Module) else None
        self._root = root
        # A copy of `root` alone shall copy no more than DPT heads.
        self._model = None if memory_budget is None else model
        self.within_frames = AttentionWithinFrames(backend)
        self.proven_heads = ProvenHeads(foreign)
        self._settings, self._proofs = Settings(), Proofs()
        self._ran: set[nn.Module] = set()

    @property
    def runs(self) -> int:
        """Blocks run lean in the last forward."""
        return len(self._ran)

    def begin(self, images: Tensor, tokens_per_frame: int | None, tokens_describe: bool) -> None:
        """Begin a forward: make its plan.

        Args:
            images: `[B, S, 3, H, W]`.
            tokens_per_frame: P.
            tokens_describe: Whether the graph is made of tokens.

        Raises:
            ValueError: If the budget cannot be kept, as on other devices than CUDA, or the forward is not one of
                inference.
        """
        self._ran.clear()
        self._settings.begin()
        self.within_frames.ran.clear()
        self.proven_heads.begin()
        self.not_lean = dict(self._obstacles)
        self.plan = None
        if not self.keeps:
            return
        if self.budget is not None:
            model = self._model
            assert model is not None
            if tokens_per_frame is None:
                raise ValueError(
                    f"memory_budget needs the tokens of a frame, and {type(self._root).__name__} does not say its "
                    "patch_size; leave memory_budget=None"
                )
            if torch.is_grad_enabled() or model.training:
                raise ValueError(
                    "memory_budget plans inference; call model.eval(), and the model inside torch.no_grad(), or "
                    "patch(model, memory_budget=None)"
                )
            sizes = self._sizes(model, images, tokens_per_frame, tokens_describe)
            if images.device.type not in memory.DEVICES:
                raise ValueError(
                    "memory_budget is kept on CUDA, whose layer outputs can wait in host memory, and the images are "
                    f"on {images.device}; leave memory_budget=None (on CUDA the budget must be at least "
                    f"{memory.least(sizes):.1f} GiB)"
                )
            self.plan = memory.make_plan(sizes, memory.allowed(self.budget, images.device, sizes.present))
        upstreams = None if self.dtype is None else next(self._root.parameters()).dtype
        if self.plan is None:
            self.keeper = outputs.Keeper(upstreams, (), None)
        else:
            self.keeper = outputs.Keeper(upstreams, self.plan.offloaded, self.plan.frames_at_once)

    def end(self) -> None:
        """End a forward, also one that raised."""
        if self.keeper is not None:
            self.keeper.settle()
        self.keeper = None

    def keep(self, made: list[Tensor], after: int) -> list[Any]:
        """Return the outputs of a stage as they are kept; `after` is the index of the next block."""
        if self.keeper is not None:
            self.keeper.settle()
        return outputs.kept(made, after, self.layers, self.keeper)

    def embed(self, original: Callable[[Tensor], Any], images: Tensor) -> Any:
        """Run the patch embedding on images `[B S, 3, H, W]` as the plan says."""
        assert self.plan is not None
        return embed(original, images, self.plan.images_at_once)

    def _sizes(self, model: nn.Module, images: Tensor, tokens: int, tokens_describe: bool) -> memory.Sizes:
        block: Any = self._root.get_submodule("global_blocks.0")
        product = blocks.compute_dtype(block)
        weights = block.attn.qkv.weight.dtype
        cast = [p for p in self._root.parameters() if p.requires_grad and p.dtype == torch.float32 != product]
        present = {id(x): x.nbytes for x in (images, *model.parameters(), *model.buffers())}
        assert self.layers is not None
        return memory.Sizes(
            samples=images.shape[0],
            frames=images.shape[1],
            tokens=tokens,
            channels=block.attn.qkv.in_features,
            pixels=images.shape[3] * images.shape[4],
            depth=self.depth,
            layers=tuple(sorted(self.layers)),
            heads=sum(not getattr(head, "feature_only", False) for head in self.heads.values()),
            wide=weights.itemsize,
            residual=(self.dtype or weights).itemsize,
            product=product.itemsize,
            present=sum(present.values()),
            casts=sum(p.numel() * product.itemsize for p in cast),
            tokens_describe=tokens_describe,
        )

    def arguments(
        self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return the tokens of a block and their positions, or None if it must run as it is on what it is given."""
        given = blocks.arguments(block, args, kwargs)
        if isinstance(given, str):
            self._note(block, given)
            return None
        return given

    def run(self, block: Any, x: Tensor, pos: Tensor | None, attend: blocks.Attend | None) -> Tensor | None:
        """Run a block lean, or return None if it must run as it is.

        Args:
            block: One of `blocks`.
            x: Its tokens `[B, N, C]`.
            pos: Their positions, or None.
            attend: Its attention if that is patched, else None.
        """
        reason = inference.obstacle() or self._disproof(block, x, pos)
        if reason is not None:
            self._note(block, reason)
            return None
        self._ran.add(block)
        at_once = memory.TOKENS_AT_ONCE if self.plan is None else self.plan.tokens_at_once
        return blocks.run(block, x, pos, attend or self.within_frames, self.dtype, at_once)

    def _note(self, block: nn.Module, reason: str) -> None:
        name = type(block).__name__
        known = self.not_lean.get(name)
        if known is None or reason not in known:
            self.not_lean[name] = reason if known is None else f"{known}; {reason}"

    def _disproof(self, block: Any, x: Tensor, pos: Tensor | None) -> str | None:
        """Return why a block must run as it is, or None if it computes what blocks do, with the settings that it has.

        Asked once for blocks of the same settings, dtype of products and number of tokens in the proof.
        """
        settings = self._settings.of(block)
        reason = self._proofs.reason(settings, lambda: inference.obstacle_inside(block) or blocks.obstacle(block))
        if reason is not None:
            return reason
        x = x[:2, :PROOF_TOKENS].to(blocks.stream_dtype(block, x))
        pos = None if pos is None else pos[:2, :PROOF_TOKENS]
        precision = torch.backends.cuda.matmul.fp32_precision
        key = settings, blocks.compute_dtype(block), x.dtype, x.shape, None if pos is None else pos.shape, precision
        return self._proofs.reason(key, lambda: _disagreement(block, x, pos))


def _disagreement(block: Any, x: Tensor, pos: Tensor | None) -> str | None:
    """Return what speaks against running a block lean, by some of its tokens, or None.

    First the formula, in float64 and within what float32 rounds; then how it is computed in this call.
    """
    with torch.autocast(x.device.type, enabled=False):
        exactly, weight = twin(block, torch.float64), block.attn.qkv.weight
        exact = blocks.own_forward(exactly, x.double(), pos)
        size = (exact - x.double()).norm()
        wide = torch.promote_types(weight.dtype, torch.float32)
        own = blocks.own_forward(twin(block, wide), x.to(wide), pos)
        fused = _in_parts(exactly, x.double(), pos)
    reason = disagreement(exact, own, fused.to(wide), size, wide, "block")
    if reason is None and (dtype := blocks.compute_dtype(block)) != torch.float64:
        as_it_runs = twin(block)
        own, fused = blocks.own_forward(as_it_runs, x, pos), _in_parts(as_it_runs, x, pos)
        reason = disagreement(exact, own, fused, size, dtype, "block")
    return reason


def _in_parts(block: Any, x: Tensor, pos: Tensor | None) -> Tensor:
    """Run a block lean, in parts of which one ends within a sample: what mixes tokens after the attention is seen."""
    return blocks.run(block, x, pos, by_pytorch, None, 2 * x.shape[1] // 3 + 1)
