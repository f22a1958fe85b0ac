"""What others do in place of a graph of frames, in our own writing after their descriptions, to compare with.

| function | after | source of the facts |
|---|---|---|
| `shared` | Good Token Hunting, arXiv 2605.23892 | what third parties say of zsh2000/gotohunt (2026-05-28) |
| `subsampled` | AVGGT, arXiv 2512.02541 | its abstract: diagonal preservation and a mean-fill component |
| `pooled` | Faster VGGT, arXiv 2509.07120 | the code of brianwang00001/sparse-vggt (2025-11-09) |
| `merged` | FastVGGT, arXiv 2509.02560 | the code of mystorm16/FastVGGT (2025-09-10) |

What AVGGT's diagonal and mean are of is read from these words alone. FastVGGT also keeps every tenth token unmerged.
Good Token Hunting and AVGGT also let the first global layers attend within frames: `layers(0-1:own,...)`. None of these
adds log n to the score of a key that stands for n.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svggt_kernels import BlockLayout, CovisibilityGraph, block_sparse_attention
from svggt_kernels.attention import choose_backend
from svggt_kernels.sources.base import Scene

from .answered import Answered
from .base import Attended, Attention, Known, TokenGrid
from .coarse import kept_patches
from .graphs import Choice, choice_words, core_frames

QUERIES, KEYS = 128, 64
"""Tokens of a block of queries and of keys where none are named, those of sparse-vggt."""

REGION = 2
"""Side of the square of patches of which one is a destination, that of FastVGGT."""

GROUP_AT_ONCE = 2**28
"""Numbers of the keys that are gathered at once."""


def shared(frames: int, choice: Choice = "tokens", stride: int = 1, *, covering: bool = False) -> Answered:
    """Return the layout in which the tokens of a few frames are the keys of all queries; no frame sees itself besides.

    Args:
        frames: Frames whose tokens are keys, frame 0 among them.
        choice: How they are chosen.
        stride: Keys are their special tokens and one patch in stride x stride.
        covering: As for `graphs.core`.

    Raises:
        ValueError: If there is no frame or no stride, or frames shall cover others without being compared.
    """
    if min(frames, stride) < 1:
        raise ValueError(f"keys are those of at least one frame at a stride of 1 or more, got {frames} at {stride}")

    def make(scene: Scene, known: Known, grid: TokenGrid) -> Attention:
        chosen = core_frames(frames, choice, covering, scene, known)
        columns = _tokens_of(chosen, grid, stride).to(scene.tokens.device)

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: Tensor) -> Attended:
            keys, values = k.index_select(2, columns), v.index_select(2, columns)
            out = F.scaled_dot_product_attention(q, keys, values, scale=scale)
            return Attended(out, grid.tokens * len(columns))

        return attend

    return Answered(f"shared-{frames}{choice_words(choice, covering)}" + f"-stride{stride}" * (stride > 1), make)


def subsampled(stride: int) -> Answered:
    """Return the layout in which keys are the special tokens of all frames and one patch in stride x stride.

    A query also sees its own key, if a stride does not keep it, and one key and value more: the mean of the keys and
    values that are left out.

    Raises:
        ValueError: If there is no stride.
    """
    if stride < 1:
        raise ValueError(f"a stride is 1 or more, got {stride}")

    def make(scene: Scene, known: Known, grid: TokenGrid) -> Attention:
        columns = _tokens_of(torch.arange(grid.frames), grid, stride).to(scene.tokens.device)
        dropped = torch.ones(grid.tokens, dtype=torch.bool, device=columns.device)
        dropped[columns] = False
        left_out = grid.tokens - len(columns)
        whole = CovisibilityGraph.all_visible(1, 1).to(columns.device)
        layout = BlockLayout.from_graph(whole, [grid.tokens], key_tokens_per_frame=[len(columns)])

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: Tensor) -> Attended:
            keys, values = k.index_select(2, columns), v.index_select(2, columns)
            out, lse = block_sparse_attention(q, keys, values, layout, scale=scale, return_lse=True)
            of_own = (q.to(lse.dtype) * k).sum(-1) * scale
            of_own = of_own.masked_fill(~dropped, -torch.inf)
            parts, scores = [out, v], [lse, of_own]
            if left_out:
                key, value = (x[:, :, dropped].mean(2, keepdim=True) for x in (k, v))
                parts.append(value.expand_as(v))
                scores.append((q.to(lse.dtype) * key).sum(-1) * scale)
            weights = torch.stack(scores).softmax(0)[..., None]
            merged = sum(weight * part for weight, part in zip(weights, parts, strict=True))
            pairs = grid.tokens * len(columns) + left_out + grid.tokens * (left_out > 0)
            return Attended(merged.to(q.dtype), pairs, choose_backend(q.device, q.dtype, q.shape[-1]))

        return attend

    return Answered(f"subsampled-{stride}", make)


def pooled(percent: int, queries: int = QUERIES, keys: int = KEYS) -> Answered:
    """Return the layout in which each head chooses blocks of keys by pooled queries and keys.

    Patches of all frames, in order, are cut into blocks. A block of queries sees the blocks of keys with the highest
    products of mean query and mean key, and all special tokens; queries of special tokens see everything.

    Args:
        percent: Share of the blocks of keys that a block of queries sees, rounded to blocks, at least one.
        queries: Tokens of a block of queries.
        keys: Tokens of a block of keys.

    Raises:
        ValueError: If the share is not between 1 and 100, or a block is empty.
    """
    if not 1 <= percent <= 100 or min(queries, keys) < 1:
        raise ValueError(f"blocks have one token or more and 1 to 100 % of them are seen, got {percent} %")

    def make(scene: Scene, known: Known, grid: TokenGrid) -> Attention:
        is_special = torch.arange(grid.tokens, device=scene.tokens.device) % grid.per_frame < grid.special
        patches, special = (where.nonzero()[:, 0] for where in (~is_special, is_special))

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: Tensor) -> Attended:
            out = torch.empty_like(q)
            out[:, :, special] = F.scaled_dot_product_attention(q[:, :, special], k, v, scale=scale)
            seen = torch.zeros((), device=q.device)
            for head in range(q.shape[1]):
                of_patches = [x[0, head, patches] for x in (q, k, v)]
                of_special = [x[0, head, special] for x in (k, v)]
                out[0, head, patches], pairs = _by_blocks(of_patches, of_special, (percent, queries, keys), scale)
                seen = seen + pairs
            return Attended(out, seen / q.shape[1] + len(special) * grid.tokens)

        return attend

    words = f"-{queries}x{keys}" * ((queries, keys) != (QUERIES, KEYS))
    return Answered(f"pooled-{percent}{words}", make)


def _by_blocks(
    of_patches: list[Tensor], of_special: list[Tensor], sizes: tuple[int, int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Attend within one head from blocks of queries to the blocks of keys that they choose, and to special tokens.

    Args:
        of_patches: q, k and v of patches, `[n, D]`.
        of_special: k and v of special tokens, `[m, D]`.
        sizes: Percent of the blocks of keys that are seen, and tokens of a block of queries and of keys.
        scale: Factor on the scores.

    Returns:
        Outputs `[n, D]` and the number of pairs.
    """
    percent, rows, columns = sizes
    number = len(of_patches[0])
    q = _blocks(of_patches[0], rows)
    k, v = (_blocks(x, columns) for x in of_patches[1:])
    real = _blocks(q.new_ones(number, 1), columns)[..., 0]  # the last block may be filled up
    real_rows = _blocks(q.new_ones(number, 1), rows)[..., 0].sum(1)
    mean_q, mean_k = q.sum(1) / real_rows[:, None], k.sum(1) / real.sum(1, keepdim=True)
    count = max(1, round(percent / 100 * len(k)))
    chosen = (mean_q.float() @ mean_k.float().T).topk(count, dim=1).indices  # [blocks of queries, count]
    at_once = max(1, GROUP_AT_ONCE // (count * k[0].numel()))
    parts = []
    for places, part in zip(chosen.split(at_once), q.split(at_once), strict=True):
        keys, values = (
            torch.cat([x[places].flatten(1, 2), special.expand(len(places), -1, -1)], 1)[:, None]
            for x, special in zip((k, v), of_special, strict=True)
        )  # [blocks, 1, keys, D]: fused kernels take four dimensions
        shown = F.pad(real[places].flatten(1, 2) > 0, (0, len(of_special[0])), value=True)[:, None, None]
        out = F.scaled_dot_product_attention(part[:, None], keys, values, attn_mask=shown, scale=scale)
        parts.append(out[:, 0])
    pairs = (real.sum(1)[chosen].float().sum(1) * real_rows.float()).sum() + number * len(of_special[0])
    return torch.cat(parts).flatten(0, 1)[:number], pairs


def _blocks(x: Tensor, size: int) -> Tensor:
    """Return `[n, D]` as blocks `[ceil(n / size), size, D]`, the last filled up with zeros."""
    return F.pad(x, (0, 0, 0, -len(x) % size)).unflatten(0, (-1, size))


def merged(percent: int, region: int = REGION) -> Answered:
    """Return the layout in which tokens are merged before attention, and outputs copied back to all that were merged.

    Destinations are all tokens of frame 0, all special tokens, and of every other frame one patch of each square of
    `region` x `region`, drawn. Each other token has a destination, the one with the most similar token before the
    layer's projections; those most similar to theirs are merged, queries, keys and values each into a mean.

    Args:
        percent: Share of all tokens that are merged away, as far as there are tokens that are no destination.
        region: Side of a square in patches.

    Raises:
        ValueError: If the share is not between 1 and 99, or the region is empty.
    """
    if not 1 <= percent <= 99 or region < 1:
        raise ValueError(f"1 to 99 % of the tokens are merged, and a region has a patch, got {percent} % and {region}")

    def make(scene: Scene, known: Known, grid: TokenGrid) -> Attention:
        is_destination = destinations_of(grid, region, known).to(scene.tokens.device)
        sources, destinations = (~is_destination).nonzero()[:, 0], is_destination.nonzero()[:, 0]
        away = min(grid.tokens * percent // 100, len(sources))

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: Tensor) -> Attended:
            place = _merged_places(tokens[0], sources, destinations, away)
            left = grid.tokens - away
            q, k, v = (_means(x, place, left) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
            return Attended(out.index_select(2, place), left**2)

        return attend

    return Answered(f"merged-{percent}" + f"-region{region}" * (region != REGION), make)


def destinations_of(grid: TokenGrid, region: int, known: Known) -> Tensor:
    """Return which tokens others may be merged into, `[N]` bool."""
    down, right = grid.rows // region, grid.columns // region
    drawn = torch.from_numpy(known.numbers().integers(0, region, (2, grid.frames, down, right)))
    rows = drawn[0] + region * torch.arange(down)[:, None]
    columns = drawn[1] + region * torch.arange(right)
    patches = torch.zeros(grid.frames, grid.patches, dtype=torch.bool)
    patches.scatter_(1, (rows * grid.columns + columns).flatten(1), True)
    is_destination = F.pad(patches, (grid.special, 0), value=True)
    is_destination[0] = True
    return is_destination.flatten()


def _merged_places(tokens: Tensor, sources: Tensor, destinations: Tensor, away: int) -> Tensor:
    """Return which of the tokens that are left stands for each token, `[N]`.

    Those that are left are the destinations, in order, then the sources that are not merged.

    Args:
        tokens: `[N, C]`.
        sources: Tokens that may be merged.
        destinations: Tokens into which they may be merged.
        away: How many are merged.
    """
    unit = F.normalize(tokens, dim=-1)
    target = unit[destinations]
    rows = max(1, GROUP_AT_ONCE // len(destinations))
    best = [(part @ target.T).max(1) for part in unit[sources].split(rows)]
    similarity, nearest = (torch.cat(values) for values in zip(*best, strict=True))
    order = similarity.argsort(descending=True, stable=True)
    place = torch.empty(len(tokens), dtype=torch.int64, device=tokens.device)
    place[destinations] = torch.arange(len(destinations), device=tokens.device)
    place[sources[order[:away]]] = nearest[order[:away]]
    stay = order[away:]
    place[sources[stay]] = len(destinations) + torch.arange(len(stay), device=tokens.device)
    return place


def _means(x: Tensor, place: Tensor, left: int) -> Tensor:
    """Return the mean of what is in each place, of `[1, H, N, D]` as `[1, H, left, D]`."""
    sums = x.new_zeros(*x.shape[:2], left, x.shape[-1], dtype=torch.float32).index_add_(2, place, x.float())
    counts = torch.zeros(left, device=x.device).index_add_(0, place, torch.ones_like(place, dtype=torch.float32))
    return (sums / counts[:, None]).to(x.dtype)


def _tokens_of(frames: Tensor, grid: TokenGrid, stride: int) -> Tensor:
    """Return the special tokens of some frames and the patches of theirs that a stride keeps, rising `[n]` int64."""
    in_frame = torch.cat([torch.arange(grid.special), grid.special + kept_patches(grid.rows, grid.columns, stride)])
    return (frames.sort().values[:, None] * grid.per_frame + in_frame).flatten()
