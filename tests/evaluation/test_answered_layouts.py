"""Layouts that answer attention themselves: each against a mask of all tokens, made by hand in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from evaluation.layouts import Known, TokenGrid, named
from evaluation.layouts.coarse import kept_patches
from evaluation.layouts.peers import destinations_of
from evaluation.measuring import SceneSet, predict
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.scenes import Draws
from svggt_kernels.graph.core import choose_core
from svggt_kernels.sources.base import Scene

FRAMES, HEADS, SIZE = 6, 2, 4
GRID = TokenGrid(FRAMES, 5, 4, 6)
P = GRID.per_frame
HIDDEN = -math.inf


@pytest.fixture(scope="module")
def known() -> Known:
    return Known(SceneSet("walk", 4, FRAMES).draw(1, Draws(0), (56, 84)), seed=3)


@pytest.fixture(scope="module")
def scene(known: Known) -> Scene:
    tokens = torch.randn(FRAMES, GRID.patches, 32, generator=torch.Generator().manual_seed(0))
    return Scene(FRAMES, images=known.scenes.images[0], tokens=tokens, reference_frame=0)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
    """q, k, v, scale and tokens."""
    q, k, v = torch.randn(3, 1, HEADS, GRID.tokens, SIZE, dtype=torch.float64)
    return 3 * q, k, v, 0.7, torch.randn(1, GRID.tokens, 8)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Tensor:
    return (q @ k.mT * scale + bias).softmax(-1) @ v


def frame_and_patch(token: int) -> tuple[int, int]:
    """The frame of a token and its patch, below 0 for a special token."""
    return token // P, token % P - GRID.special


def coarse_bias(in_full: set[int], coarsely: set[int], kept: set[int]) -> Tensor:
    bias = torch.full((GRID.tokens, GRID.tokens), HIDDEN, dtype=torch.float64)
    for query, key in itertools.product(range(GRID.tokens), repeat=2):
        ours, (theirs, patch) = query // P, frame_and_patch(key)
        if theirs == ours or theirs in in_full or (theirs in coarsely and patch < 0):
            bias[query, key] = 0
        elif theirs in coarsely and patch in kept:
            bias[query, key] = math.log(GRID.patches / len(kept))
    return bias


def test_a_stride_keeps_the_middle_of_each_square():
    grid = torch.arange(24).view(4, 6)
    assert kept_patches(4, 6, 2).tolist() == grid[1::2, 1::2].flatten().tolist()
    assert kept_patches(4, 6, 3).tolist() == grid[1::3, 1::3].flatten().tolist()
    assert kept_patches(4, 6, 4).tolist() == grid[2::4, 2::4].flatten().tolist()
    assert kept_patches(1, 2, 5).tolist() == [1]


@pytest.mark.parametrize(
    ("name", "in_full", "coarsely"),
    [
        ("core-2-evenly-stride2", {0, 5}, set(range(FRAMES))),
        ("core-1-stride3", {0}, set(range(FRAMES))),
        ("core-0-stride2", set(), set(range(FRAMES))),
        ("core-1-evenly-stride2of2", {0}, {0, 2, 5}),
        ("core-2-evenly-stride3of2", {0, 5}, {0, 2, 3, 5}),
    ],
)
def test_coarse_keys(name: str, in_full: set[int], coarsely: set[int], inputs: tuple, scene: Scene, known: Known):
    stride = int(name.split("stride")[1][0])
    bias = coarse_bias(in_full, coarsely, set(kept_patches(GRID.rows, GRID.columns, stride).tolist()))
    attended = named(name).attention(scene, known, GRID)(*inputs)
    torch.testing.assert_close(attended.out, attend(*inputs[:4], bias), atol=1e-12, rtol=0)
    assert attended.pairs == int((bias > HIDDEN).sum())


def test_the_first_that_are_chosen_are_seen_in_full(inputs: tuple, scene: Scene, known: Known):
    chosen = choose_core(known.descriptors("tokens", scene), 4, choice="covering").tolist()
    kept = set(kept_patches(GRID.rows, GRID.columns, 2).tolist())
    bias = coarse_bias(set(chosen[:1]), set(chosen), kept)
    attended = named("core-1-covering-stride2of3").attention(scene, known, GRID)(*inputs)
    torch.testing.assert_close(attended.out, attend(*inputs[:4], bias), atol=1e-12, rtol=0)


def sees(name: str, scene: Scene, known: Known) -> list[set[int]]:
    layout = named(name)
    return [set(row.nonzero()[:, 0].tolist()) for row in layout.graph(scene, known).to_dense()]  # type: ignore[attr-defined]


def test_two_levels_are_closed_over_one_another(scene: Scene, known: Known):
    # Frames 0 to 2 and 3 to 5 are the regions; frame 0 is the global core, one frame of the others each region's.
    assert sees("twolevel-1-2x1-evenly-ordered", scene, known) == [
        *({0}, {0, 1}, {0, 1, 2}),
        *({0, 3}, {0, 3, 4}, {0, 3, 5}),
    ]
    everyone = set(range(FRAMES))
    assert sees("twolevel-6-2x1", scene, known) == [everyone] * FRAMES
    found = sees("twolevel-1-3x1-covering", scene, known)
    middle = {frame for frame in everyone if sum(frame in row for row in found) > 1} - {0}
    unit = torch.nn.functional.normalize(known.descriptors("tokens", scene).double(), dim=1)
    middles = choose_core(known.descriptors("tokens", scene), 3, choice="covering")
    region = (unit @ unit[middles].T).argmax(1)
    for frame, row in enumerate(found):
        assert row - {0, frame} <= middle and all(region[other] == region[frame] for other in row - {0})
        assert frame != 0 or row == {0}
        assert frame not in middle or row == {0, frame}


def test_shared_keys_are_those_of_the_set_alone(inputs: tuple, scene: Scene, known: Known):
    for name, patches in (("shared-2-evenly", range(GRID.patches)), ("shared-2-evenly-stride2", kept_patches(4, 6, 2))):
        seen = {frame * P + GRID.special + int(patch) for frame in (0, 5) for patch in patches}
        seen |= {frame * P + special for frame in (0, 5) for special in range(GRID.special)}
        bias = torch.full((GRID.tokens,), HIDDEN, dtype=torch.float64)
        bias[list(seen)] = 0
        attended = named(name).attention(scene, known, GRID)(*inputs)
        torch.testing.assert_close(attended.out, attend(*inputs[:4], bias), atol=1e-12, rtol=0)
        assert attended.pairs == GRID.tokens * len(seen)


def test_subsampled_keys_keep_the_own_key_and_the_mean_of_the_others(inputs: tuple, scene: Scene, known: Known):
    q, k, v, scale, _ = inputs
    kept = set(kept_patches(GRID.rows, GRID.columns, 3).tolist())
    is_kept = torch.tensor([patch < 0 or patch in kept for _, patch in map(frame_and_patch, range(GRID.tokens))])
    bias = torch.full((GRID.tokens, GRID.tokens + 1), HIDDEN, dtype=torch.float64)
    bias[:, :-1][:, is_kept] = 0
    bias[:, :-1].fill_diagonal_(0)
    bias[:, -1] = 0
    k, v = (torch.cat([x, x[:, :, ~is_kept].mean(2, keepdim=True)], 2) for x in (k, v))
    attended = named("subsampled-3").attention(scene, known, GRID)(*inputs)
    torch.testing.assert_close(attended.out, attend(q, k, v, scale, bias), atol=1e-12, rtol=0)
    assert attended.pairs == int((bias > HIDDEN).sum())
    everything = named("subsampled-1").attention(scene, known, GRID)(*inputs)
    torch.testing.assert_close(everything.out, attend(*inputs[:4], torch.zeros(1)), atol=1e-12, rtol=0)
    assert everything.pairs == GRID.tokens**2


def test_blocks_are_chosen_by_each_head(inputs: tuple, scene: Scene, known: Known):
    q, k, _, _, _ = inputs
    patches = [token for token in range(GRID.tokens) if token % P >= GRID.special]  # 144: blocks of 32 leave 16
    rows, columns = ([patches[at : at + size] for at in range(0, len(patches), size)] for size in (32, 20))
    bias = torch.full((HEADS, GRID.tokens, GRID.tokens), HIDDEN, dtype=torch.float64)
    special = torch.arange(GRID.tokens) % P < GRID.special
    bias[:, special] = 0
    bias[:, :, special] = 0
    for head, row in itertools.product(range(HEADS), rows):
        scores = torch.stack([q[0, head, row].mean(0) @ k[0, head, column].mean(0) for column in columns])
        for best in scores.topk(2).indices.tolist():  # 30 % of 8 blocks
            bias[head, torch.tensor(row)[:, None], torch.tensor(columns[best])] = 0
    attended = named("pooled-30-32x20").attention(scene, known, GRID)(*inputs)
    torch.testing.assert_close(attended.out, attend(*inputs[:4], bias), atol=1e-12, rtol=0)
    assert float(attended.pairs) == float((bias > HIDDEN).sum()) / HEADS
    everything = named("pooled-100").attention(scene, known, GRID)(*inputs)
    torch.testing.assert_close(everything.out, attend(*inputs[:4], torch.zeros(1)), atol=1e-12, rtol=0)
    assert float(everything.pairs) == GRID.tokens**2


def test_a_destination_is_drawn_in_each_square(known: Known):
    is_destination = destinations_of(GRID, 2, known).view(FRAMES, P)
    assert is_destination[0].all() and is_destination[:, : GRID.special].all()
    squares = is_destination[1:, GRID.special :].view(FRAMES - 1, 2, 2, 3, 2).sum((2, 4))
    assert (squares == 1).all()
    assert len({tuple(frame.tolist()) for frame in is_destination}) > 2


def test_merged_tokens_are_means_and_their_outputs_copies(inputs: tuple, scene: Scene, known: Known):
    q, k, v, scale, tokens = inputs
    is_destination = destinations_of(GRID, 2, known).tolist()
    sources, destinations = ([i for i in range(GRID.tokens) if is_destination[i] == kind] for kind in (False, True))
    unit = torch.nn.functional.normalize(tokens[0], dim=1)
    nearest = {source: destinations[int((unit[destinations] @ unit[source]).argmax())] for source in sources}
    by_similarity = sorted(sources, key=lambda source: -float(unit[source] @ unit[nearest[source]]))
    for percent in (40, 99):
        merged = by_similarity[: GRID.tokens * percent // 100]
        groups = {token: [token] for token in range(GRID.tokens) if token not in merged}
        for token in merged:
            groups[nearest[token]].append(token)
        means = [torch.cat([x[:, :, group].mean(2, keepdim=True) for group in groups.values()], 2) for x in (q, k, v)]
        expected = torch.empty_like(q)
        for place, group in enumerate(groups.values()):
            expected[:, :, group] = attend(*means, scale, torch.zeros(1))[:, :, place : place + 1]
        attended = named(f"merged-{percent}").attention(scene, known, GRID)(*inputs)
        # Means are rounded to float32.
        torch.testing.assert_close(attended.out, expected, atol=1e-5, rtol=0)
        assert attended.pairs == len(groups) ** 2


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        *("core-2-evenly-stride2", "core-1-stride3of3", "shared-3", "subsampled-2", "pooled-30-16x8", "merged-50"),
        *("twolevel-1-2x1", "layers(0:own,1:core-3)", "layers(0:dense,1:core-2-stride2)"),
    ],
)
def test_a_layout_acts_in_a_model_which_is_then_as_before(name: str, known: Known):
    model, images = RoomsModel.create(dim=32, depth=2, num_heads=2), known.scenes.images
    before = predict(model, images)
    layout = named(name)
    assert layout.name == name
    with layout.put_into(model, known) as counted:
        predict(model, images)
        prediction, what = predict(model, images), counted()
    assert 0 < what.pairs < what.dense_pairs == GRID.tokens**2
    assert (prediction.depth - before.depth).abs().max() > 1e-6 and prediction.is_finite
    assert torch.equal(predict(model, images).depth, before.depth)
    assert all("forward" not in vars(block.attn) for block in model.aggregator.global_blocks)


@torch.no_grad()
def test_layers_have_their_own_layouts_and_pairs_are_their_mean(known: Known):
    model, images = RoomsModel.create(dim=32, depth=3, num_heads=2), known.scenes.images
    outcomes = {}
    for name in ("core-3", "layers(0-2:core-3)", "layers(0-2:dense)", "dense", "layers(0:own,1-2:core-3)", "own"):
        with named(name).put_into(model, known) as counted:
            outcomes[name] = predict(model, images).depth, counted()
    for one, other in (("layers(0-2:core-3)", "core-3"), ("layers(0-2:dense)", "dense")):
        torch.testing.assert_close(outcomes[one][0], outcomes[other][0], atol=1e-5, rtol=1e-4)
        assert outcomes[one][1].pairs == outcomes[other][1].pairs
        assert outcomes[one][1].backend == outcomes[other][1].backend
    mixed = outcomes["layers(0:own,1-2:core-3)"]
    assert mixed[1].pairs == round((outcomes["own"][1].pairs + 2 * outcomes["core-3"][1].pairs) / 3)
    assert (mixed[0] - outcomes["core-3"][0]).abs().max() > 1e-6

    # By hand: a mask in each layer.
    def masked(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        graph = named("own" if layer == 0 else "core-3").graph(scene_of(tokens[0]), known).to_dense()  # type: ignore[attr-defined]
        bias = torch.zeros(GRID.tokens, GRID.tokens).masked_fill(
            ~graph.repeat_interleave(P, 0).repeat_interleave(P, 1), HIDDEN
        )
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def scene_of(entered: Tensor) -> Scene:
        return Scene(FRAMES, tokens=entered[0].unflatten(0, (FRAMES, P))[:, GRID.special :], reference_frame=0)

    tokens: list[Tensor] = []
    for layer, block in enumerate(model.aggregator.global_blocks):
        attention = block.attn

        def forward(x: Tensor, pos: Tensor, layer: int = layer, attention: torch.nn.Module = attention) -> Tensor:
            tokens.append(x)
            q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            q, k = attention.rope(attention.q_norm(q), pos), attention.rope(attention.k_norm(k), pos)
            return attention.proj(masked(layer, q, k, v).transpose(1, 2).flatten(2))

        attention.forward = forward
    torch.testing.assert_close(predict(model, images).depth, mixed[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers(0:own,2:dense)", "each layer from 0 on"),
        ("layers(0-1:own,1:dense)", "each layer from 0 on"),
        ("layers(0:layers(0:own))", "part of layers"),
        ("layers(own)", "part of layers"),
        ("core-2-stride1", "a stride is 2 or more"),
        ("core-2-stride2of0", "a stride is 2 or more"),
        ("twolevel-2-1x2", "at least two regions"),
        ("shared-2-evenly-covering", "by similarity can be covering"),
        ("shared-0", "at least one frame"),
        ("subsampled-0", "a stride is 1 or more"),
        ("pooled-0", "1 to 100 %"),
        ("merged-100", "1 to 99 %"),
        ("core-2-near1-stride2", "is no layout"),
    ],
)
def test_names_without_a_meaning_are_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        named(name)


def test_a_model_of_another_depth_and_another_scene_are_refused(known: Known):
    model = RoomsModel.create(dim=32, depth=2, num_heads=2)
    with pytest.raises(ValueError, match="2 global layers"), named("layers(0-2:own)").put_into(model, known):
        pass
    with named("core-2-stride2").put_into(model, known), pytest.raises(ValueError, match="one scene of 174 tokens"):
        predict(model, known.scenes.images[:, :3])
