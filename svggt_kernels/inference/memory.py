"""How much memory one forward takes, moment by moment, and the plan that keeps it within a budget.

Plans are functions of sizes alone, so they can be made and tested without a device. What is counted, and how it was
checked, is in docs/whole-model.md, "What is alive when".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

MemoryBudget = Literal["auto"] | float | None
"""What one forward may allocate, in GiB; "auto": what is free when it begins; None: whatever it takes."""

GIB = 2**30

TOKENS_TOGETHER = 2**16
"""Tokens that run together in the MLP of a block: 512 MiB of 4096 hidden activations in 16 bits."""

FRAMES_TOGETHER = 8
"""Frames that run together in heads, as VGGT's do by default."""

FEW = 32
"""Frames of one forward of a long run for which layer outputs may go to host memory and parts be halved."""

HALVINGS = 4
"""How often both may be halved: to 4096 tokens, and to 1 frame after three."""

DEVICES = ("cuda",)
"""Types of the devices on which a budget can be kept: those whose tensors can wait in host memory."""

MARGIN = GIB
"""What "auto" leaves free: the allocator cannot use every hole."""

WORKSPACE = GIB
"""For what has no size here: workspaces of products and convolutions, tables of layouts, MegaLoc's network."""

BYTES_PER_TOKEN = 128
"""Positions of a token, and the log-sum-exp of its heads."""

BYTES_PER_PIXEL = 1536
"""What a DPT head holds for each pixel of a frame that it runs: three feature maps of 128 channels in float32."""

OUTPUTS_PER_PIXEL = 16
"""What it returns for each pixel: a point and its confidence, in float32."""


class BudgetTooSmall(ValueError):
    """No plan of a forward fits its budget.

    Attributes:
        least: The least budget that one fits, in GiB.
        budget: What was given, in GiB.
    """

    def __init__(self, message: str, least: float, budget: float) -> None:
        super().__init__(message)
        self.least, self.budget = least, budget

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.least, self.budget)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one forward from which its memory follows.

    Attributes:
        samples: B.
        frames: S.
        tokens: Tokens P of a frame, special ones included.
        channels: C of a token; a layer's output has twice as many.
        pixels: Pixels of a frame.
        depth: Layers.
        layers: Those whose outputs are kept, in order.
        heads: Heads that return something for each pixel.
        wide: Bytes of a value of the patch tokens, and of what heads read.
        residual: Bytes of a value of the residual stream.
        product: Bytes of a value that matrix products take and give.
        present: Bytes that are there when the forward begins: weights and images.
        casts: Bytes of the weights that autocast keeps in its dtype.
        tokens_describe: Whether the graph is made of the tokens that enter the first global attention.
        parts: Parts of keys over which a global layer attends, one after another, before they are merged.
        packed: Keys of all samples that are copied for one of these parts.
    """

    samples: int
    frames: int
    tokens: int
    channels: int
    pixels: int
    depth: int
    layers: tuple[int, ...]
    heads: int
    wide: int
    residual: int
    product: int
    present: int
    casts: int
    tokens_describe: bool = False
    parts: int = 1
    packed: int = 0

    @property
    def output(self) -> int:
        """Bytes of one layer's output as it is kept."""
        return 2 * self.samples * self.frames * self.tokens * self.channels * self.residual


@dataclass(frozen=True)
class Plan:
    """What one forward does to stay within its budget.

    Attributes:
        offloaded: Layers whose outputs lie in host memory until heads read them.
        tokens_together: Tokens that run together in the MLP of a block; images of about as many in the patch embedding.
        frames_together: Frames that run together in heads, or fewer if they ask for fewer.
        host_bytes: What is in host memory at the end of the aggregator.
        moments: Bytes alive on the device at the moments that may be the highest, by name.
    """

    offloaded: tuple[int, ...]
    tokens_together: int
    frames_together: int
    host_bytes: int
    moments: dict[str, int]

    @classmethod
    def without_budget(cls) -> Plan:
        """Return what a forward does that may take whatever memory it takes."""
        return cls((), TOKENS_TOGETHER, FRAMES_TOGETHER, 0, {})

    @property
    def peak_bytes(self) -> int:
        """Bytes alive at the highest moment."""
        return max(self.moments.values())

    def __str__(self) -> str:
        where = "no layer output in host memory"
        if self.offloaded:
            listed = ", ".join(map(str, self.offloaded))
            where = f"layer outputs {listed} in host memory ({self.host_bytes / GIB:.1f} GiB)"
        return (
            f"{self.peak_bytes / GIB:.1f} GiB by plan; {where}; {self.tokens_together} tokens of a block and "
            f"{self.frames_together} frames of heads run together"
        )


def make_plan(sizes: Sizes, budget: int) -> Plan:
    """Return the first plan that fits a budget in bytes.

    Outputs are offloaded only if they must be: as few layers as suffice, the earliest first, whose copies have the most
    time, and the last at the very end, as it costs nothing until the blocks are done. If that does not suffice, tokens
    and frames that run together are halved, both, up to four times.

    Raises:
        BudgetTooSmall: If no plan fits.
    """
    for plan in _plans(sizes):
        if plan.peak_bytes <= budget:
            return plan
    raise BudgetTooSmall(
        f"memory_budget must be at least {least(sizes):.1f} GiB for {sizes.frames} frames of {sizes.tokens} tokens"
        + (f" in each of {sizes.samples} samples" if sizes.samples > 1 else "")
        + f', got {budget / GIB:.2f} GiB; give fewer or smaller images, or precision="bf16"',
        least(sizes),
        budget / GIB,
    )


def most_frames(sizes: Callable[[int], Sizes], budget: int, most: int) -> int:
    """Return how many frames of a long run go through one forward, which keeps to a budget; at least 1.

    As many as fit without host memory and with full parts. Where these are few, up to `FEW` that fit in any way, as
    every forward reads all weights.

    Args:
        sizes: The sizes of a forward of so many frames.
        budget: In bytes.
        most: No more frames than these.
    """
    full = [n for n in range(1, most + 1) if next(_plans(sizes(n))).peak_bytes <= budget]
    few = [n for n in range(1, min(FEW, most) + 1) if min(plan.peak_bytes for plan in _plans(sizes(n))) <= budget]
    return max([1, *full, *few])


def least_bytes(sizes: Sizes) -> int:
    """Return the least budget that a plan fits."""
    return min(plan.peak_bytes for plan in _plans(sizes))


def least(sizes: Sizes) -> float:
    """Return the least budget that a plan fits, in GiB, rounded up to a tenth."""
    return rounded_up(least_bytes(sizes))


def rounded_up(size: int) -> float:
    """Return bytes in GiB, rounded up to a tenth."""
    return -(-size * 10 // GIB) / 10


def _plans(sizes: Sizes) -> Iterator[Plan]:
    """Yield plans, from the one that changes least to the one that needs least."""
    for count in range(len(sizes.layers) + 1):
        yield _plan(sizes, sizes.layers[:count], TOKENS_TOGETHER, FRAMES_TOGETHER)
    for halvings in range(1, HALVINGS + 1):
        yield _plan(sizes, sizes.layers, TOKENS_TOGETHER >> halvings, max(1, FRAMES_TOGETHER >> halvings))


def _plan(sizes: Sizes, offloaded: tuple[int, ...], tokens_together: int, frames_together: int) -> Plan:
    frames = sizes.samples * sizes.frames
    tokens = frames * sizes.tokens
    values = tokens * sizes.channels
    residual, product = values * sizes.residual, values * sizes.product
    staying = [layer for layer in sizes.layers if layer not in offloaded]
    base = sizes.present + sizes.casts + WORKSPACE

    # Of an MLP on some tokens: projection of attention, norm, hidden activations, sum.
    some = max(min(tokens, tokens_together), sizes.tokens) * sizes.channels
    of_mlp = 7 * some * sizes.product
    # Of some images: two copies, as they are normalised, and the stream of DINOv2 before and after a block.
    of_images = 2 * 3 * min(frames, max(1, tokens_together // sizes.tokens)) * sizes.pixels * sizes.wide
    of_embedding = of_images + 2 * some * sizes.wide + of_mlp
    # Of the global attention: what enters it, queries, keys and values, and its output.
    attention = residual + 4 * product + tokens * BYTES_PER_TOKEN
    # Of several parts the output and log-sum-exp of each; then what is merged, or before that keys and values of one.
    if sizes.parts > 1:
        attention += sizes.parts * (product + tokens * BYTES_PER_TOKEN)
        attention += max(0, 2 * sizes.packed * sizes.channels * sizes.product - product)
    # Beside it, as the last global block runs, the outputs that stay; of the last layer nothing but what enters.
    earlier = sizes.output * sum(layer != sizes.depth - 1 for layer in staying)

    # Of heads on some frames: the outputs that they read, as two halves, joined, and the next halves.
    of_frame = len(sizes.layers) * 3 * 2 * sizes.tokens * sizes.channels * sizes.wide + BYTES_PER_PIXEL * sizes.pixels
    of_heads = sizes.samples * min(sizes.frames, frames_together) * of_frame
    returned = frames * sizes.pixels * OUTPUTS_PER_PIXEL * sizes.heads
    moments = {
        "patch embedding": base + residual + of_embedding,
        "last block": base + earlier + max(attention, 2 * residual + product + of_mlp),
        "heads": base + sizes.output * len(staying) + of_heads + returned,
    }
    if sizes.tokens_describe:
        moments["graph"] = base + residual + 3 * product + 4 * values
    return Plan(offloaded, tokens_together, frames_together, sizes.output * len(offloaded), moments)


def check(budget: object) -> None:
    """Raise unless a budget has a meaning.

    Raises:
        ValueError: If it is a number that is not positive, or another word than "auto".
        TypeError: If it is something else.
    """
    if budget is None or budget == "auto":
        return
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(f'memory_budget must be a number of GiB, "auto" or None, got {type(budget).__name__}')
    if isinstance(budget, str) or not 0 < budget < float("inf"):
        raise ValueError(f'memory_budget must be a positive number of GiB, "auto" or None, got {budget!r}')


def allowed(budget: Literal["auto"] | float, device: torch.device, present: int) -> int:
    """Return a budget in bytes.

    Args:
        budget: In GiB, or "auto".
        device: Where the forward runs, one of `DEVICES`.
        present: Bytes of weights and images, which are there.
    """
    if budget != "auto":
        return int(budget * GIB)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return present + max(0, free + unused - MARGIN)
