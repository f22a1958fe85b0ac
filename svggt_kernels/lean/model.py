"""Which parts of one patched model run lean, and the proof that they compute what upstream does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..modules import unwrapped
from . import blocks, inference, memory, outputs
from .embedding import embed
from .proven_heads import ProvenHeads
from .within_frames import AttentionWithinFrames, by_pytorch

Precision = Literal["upstream", "bf16"]
Outputs = Literal["read", "all"]
PROOF_TOKENS = 2048


class Lean:
    """The lean parts of a model.

    Args:
        model: The model that was given to `patch`, with its heads.
        root: The module in it that runs the blocks.
        attention: The attention modules that are patched.
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
        attention: Collection[nn.Module],
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
        reasons += [
            f"the forward of {type(module).__name__} does not take what VGGT's DPT heads take"
            for module in model.modules()
            if hasattr(module, "intermediate_layer_idx") and not outputs.reads_some_frames(module)
        ]
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
        self.proven_heads = ProvenHeads()
        self._unpatched = [block for block in self.blocks.values() if block.attn not in attention]
        self._ran: set[nn.Module] = set()
        self._refusals: dict[Hashable, str | None] = {}

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
            ValueError: If the budget cannot be kept, or the forward is not one of inference.
        """
        self._ran.clear()
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

    def run(self, block: Any, x: Tensor, pos: Tensor | None, attend: blocks.Attend | None) -> Tensor | None:
        """Run a block lean, or return None if it must run as it is.

        Args:
            block: One of `blocks`.
            x: Its tokens `[B, N, C]`.
            pos: Their positions, or None.
            attend: Its attention if that is patched, else None.
        """
        if inference.obstacle(block) is not None or not self._is_proven(block, x, pos):
            return None
        self._ran.add(block)
        at_once = memory.TOKENS_AT_ONCE if self.plan is None else self.plan.tokens_at_once
        return blocks.run(block, x, pos, attend or self.within_frames, self.dtype, at_once)

    def _is_proven(self, block: Any, x: Tensor, pos: Tensor | None) -> bool:
        """Whether a block like this, run lean on a few of its tokens, once, gave what its own forward gives.

        They are compared for each kind of block and dtype of products. A block whose attention is patched has no
        forward of its own to compare with; another stands in for it.
        """
        key = blocks.anatomy(block), blocks.compute_dtype(block)
        if key not in self._refusals:
            alike = [other for other in self._unpatched if blocks.anatomy(other) == key[0]]
            if not alike:
                self._refusals[key] = "no block like it attends within frames, where it could be compared"
            else:
                other = next((other for other in alike if inference.obstacle(other) is None), None)
                positions = None if pos is None else pos[:2, :PROOF_TOKENS]
                agrees = None if other is None else self._agrees(other, x[:2, :PROOF_TOKENS], positions)
                if agrees is None:
                    return False  # in this call; it proves nothing
                self._refusals[key] = None if agrees else "its forward computes something else than the fused block"
        reason = self._refusals[key]
        if reason is not None:
            self.not_lean[type(block).__name__] = reason
        return reason is None

    @staticmethod
    def _agrees(block: Any, x: Tensor, pos: Tensor | None) -> bool | None:
        """Whether a block that is not patched gives the same run lean, in parts; None if these tokens cannot tell."""
        expected = type(block).forward(block, x) if pos is None else type(block).forward(block, x, pos)
        # A part that ends within a sample: what mixes tokens after the attention is seen.
        actual = blocks.run(block, x, pos, by_pytorch, None, 2 * x.shape[1] // 3 + 1)
        # Rounding of what a block adds, a few times over; another formula is wrong by as much as it adds.
        allowed = min(50 * torch.finfo(blocks.compute_dtype(block)).eps, 0.1)
        error, added = (actual - expected).float().norm(), (expected - x).float().norm()
        if not error.isfinite():
            return None
        return actual.dtype == expected.dtype and bool(error <= allowed * added)
