"""From a forward to its layouts: what is kept, checked once, warned of and reported."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import doubles
import pytest
import torch
import torch.nn.functional as F
from doubles import BAND, FAMILY, ISLANDS, images, sparse
from doubles import vggt as vggt_double
from tiny import SIZE, megaloc
from torch import Tensor, nn

from svggt_kernels import BlockLayout, CovisibilityGraph, MegaLocSimilarity, patch
from svggt_kernels.models import ForwardInputs
from svggt_kernels.models.vggt import VGGT
from svggt_kernels.patching import masks, plan
from svggt_kernels.patching.plan import Forward, Planner
from svggt_kernels.sources import MegaLoc

FRAMES, TOKENS = 6, 4


class Attention(nn.Module):
    """Attention that is given q, k, v, and what else the call takes."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)


class Layers(nn.Module):
    """Two layers of attention over 4 heads of queries."""

    def __init__(self, key_heads: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.key_heads = Attention(), Attention(), key_heads

    def forward(self, x: Tensor, **options: object) -> Tensor:
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        k = q[:, : self.key_heads].flip(-1)
        return self.b(self.a(q, k, k, **options), k, k, **options)


def patched(model: Layers, covisibility):
    return patch(model, modules=["a", "b"], tokens_per_frame=TOKENS, covisibility=covisibility)


def tokens(batch: int = 1) -> Tensor:
    return torch.randn(batch, FRAMES * TOKENS, 16, dtype=torch.float64)


GRAPH = CovisibilityGraph.sequential(FRAMES, 1)
LAYOUT = BlockLayout.from_graph(GRAPH, TOKENS)
MASK = LAYOUT.to_dense()


# Graphs by order


@pytest.mark.parametrize("name", ["vggt", "da3", "pi3"])
def test_sequential_is_laid_out_once(name: str):
    """Frames at most 10 apart, and the model's reference frame, wherever the model moves it."""
    model = FAMILY[name].create()
    with patch(model, covisibility="sequential") as handle:
        model(images(24))
        first = handle.layout
        model(images(24, seed=1))
        assert handle.layout is first
        apart = (torch.arange(24)[:, None] - torch.arange(24)).abs() <= 10
        reference = {"vggt": [0], "da3": [12], "pi3": []}[name]
        apart[:, reference] = True
        apart[reference] = True
        assert torch.equal(handle.graph.to_dense(), apart)
        model(images(3))
        assert handle.graph.num_frames == 3


def test_sequential_needs_no_tokens():
    model = Layers()
    with patched(model, "sequential") as handle:
        model(tokens())
    assert handle.graph.num_frames == FRAMES


# Grouped queries and masks


def test_grouped_queries_are_expanded():
    model, x = Layers(key_heads=2), tokens()
    expected = model(x, enable_gqa=True, attn_mask=MASK)
    with patched(model, GRAPH):
        torch.testing.assert_close(model(x, enable_gqa=True), expected)
        model.key_heads = 3
        with pytest.raises(ValueError, match=r"4 heads of queries must be a multiple .* but a has 3"):
            model(x, enable_gqa=True)


@pytest.mark.parametrize("rows", [2**24, 1, 5 * FRAMES * TOKENS], ids=["at once", "one by one", "five"])
def test_masks_that_hide_a_visible_pair_are_found(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks, "PAIRS_AT_ONCE", rows)
    model, x = Layers(), tokens()
    with patched(model, GRAPH):
        expected = model(x)
        columns = MASK[:1] | True
        for mask in (MASK, (~MASK).double() * -1e9, torch.zeros(1, 1), columns, MASK[None, None], MASK | True):
            assert torch.equal(model(x, attn_mask=mask), expected)
        for row, column in ((0, 0), (23, 16), (11, 12)):
            mask = MASK.clone()
            mask[row, column] = False
            for hiding in (mask, mask[None], (~mask).double()):
                with pytest.raises(ValueError, match="a is given an attn_mask that hides"):
                    model(x, attn_mask=hiding)
        columns = columns.clone()
        columns[0, 3] = False
        with pytest.raises(ValueError, match="hides"):
            model(x, attn_mask=columns.expand(FRAMES * TOKENS, -1))
        with pytest.raises(ValueError, match=r"must have shape \[\.\.\., N, N\] with N = 24, got \[24, 23\]"):
            model(x, attn_mask=MASK[:, :-1])


def test_a_mask_for_each_sample():
    model, x = Layers(), tokens(batch=2)
    graphs = [GRAPH, CovisibilityGraph.sequential(FRAMES, 2)]
    each = torch.stack([BlockLayout.from_graph(graph, TOKENS).to_dense() for graph in graphs])[:, None]
    with patched(model, graphs):
        model(x, attn_mask=each)
        for wrong in (each.flip(0), each[:1]):
            with pytest.raises(ValueError, match="hides"):
                model(x, attn_mask=wrong)
    with patched(model, graphs[1]), pytest.raises(ValueError, match="hides"):
        model(x, attn_mask=each)


def test_a_mask_is_checked_once_for_all_layers(monkeypatch: pytest.MonkeyPatch):
    checked, changed, hides = [], [], masks._hides
    monkeypatch.setattr(masks, "_hides", lambda *args: checked.append(1) or hides(*args))
    model, x, mask = Layers(), tokens(), MASK.clone()
    with patched(model, GRAPH):
        model(x, attn_mask=mask)
        assert len(checked) == 1
        model.b.register_forward_pre_hook(lambda *_: changed.append(mask.zero_()))
        with pytest.raises(ValueError, match="b is given an attn_mask that hides"):
            model(x, attn_mask=mask)


def test_a_mask_of_zeros_needs_no_dense_layout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BlockLayout, "to_dense", lambda *_: pytest.fail("the layout was made dense"))
    model = Layers()
    with patched(model, GRAPH):
        model(tokens(), attn_mask=torch.zeros(FRAMES * TOKENS, FRAMES * TOKENS))


# The range of images


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: 4 * x - 2], ids=["8 bits", "normalised"])
def test_images_outside_the_range_that_a_model_is_known_to_take(name: str, change: Callable[[Tensor], Tensor]):
    model, takes_others = FAMILY[name].create(), name in ("da3", "mapanything", "stranger")
    raised = nullcontext() if takes_others else pytest.raises(ValueError, match=r"must be in \[0, 1\], got values from")
    with sparse(model, FAMILY[name], covisibility="all"):
        model(images() * 1.2 - 0.1)  # as interpolation overshoots
        with raised:
            model(change(images()))
        assert model(images() * torch.nan) is not None


def test_a_device_is_waited_for_once_and_not_while_a_cuda_graph_captures(monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []
    monkeypatch.setattr(plan, "require_unit_range", lambda pictures, **_: seen.append(pictures))
    for device, capturing, expected in (("meta", True, 0), ("meta", False, 1), ("cpu", False, 2)):
        monkeypatch.setattr(plan, "is_capturing", lambda device, capturing=capturing: capturing)
        planner, pictures = Planner(VGGT, "all", None), torch.rand(1, 5, 3, 28, 42, device=device)
        for _ in range(2):
            planner.begin(Forward(ForwardInputs(pictures, 5)))
        assert len(seen) == expected
        seen.clear()


# Warnings


@pytest.mark.filterwarnings("always:the covisibility graph:UserWarning")
@pytest.mark.parametrize("by_function", [False, True])
def test_a_reference_frame_that_is_not_seen_is_told_once(by_function: bool):
    graph = CovisibilityGraph.sequential(24, window=10)
    model = FAMILY["vggt"].create()
    with (
        pytest.warns(
            UserWarning, match=r"hides frame 0, the reference frame of VGGT, from 13 of 24 frames \(11, "
        ) as said,
        patch(model, covisibility=(lambda _: graph) if by_function else graph),
    ):
        model(images(24))
        model(images(24, seed=1))
    assert len(said) == 1


@pytest.mark.filterwarnings("always:the covisibility graph:UserWarning")
def test_a_graph_in_parts_is_told():
    model = FAMILY["pi3"].create()
    with pytest.warns(
        UserWarning, match=r"^the covisibility graph is in 2 parts that cannot see one another; "
    ) as said:
        with patch(model, covisibility=ISLANDS):
            model(images())
    assert len(said) == 1


def test_graphs_that_need_no_word():
    """Whole graphs; what was asked for by options of a similarity."""
    warnings.simplefilter("error")
    anchored = CovisibilityGraph.from_pairs(5, [(i, 0) for i in range(1, 5)])
    for covisibility in ("all", "sequential", "tokens", anchored, MegaLocSimilarity(weights=megaloc(), size=SIZE)):
        model = FAMILY["vggt"].create(torch.float32)
        special = "masked" if covisibility is anchored else "dense"
        with patch(model, covisibility=covisibility, special_tokens=special):
            model(images(dtype=torch.float32))


# Reports


def test_pairs_are_those_of_all_graphs():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=BAND) as handle:
        model(images())
        one = handle.report()
        model(images(batch=3))
        assert handle.report().visible_pairs == one.visible_pairs
    with patch(model, covisibility=[BAND, BAND.to("cpu")]) as handle:
        model(images(batch=2))
        two = handle.report()
    assert len(two.graphs) == 2
    assert (two.visible_pairs, two.dense_pairs) == (2 * one.visible_pairs, 2 * one.dense_pairs)
    model = FAMILY["da3"].create()
    with patch(model, covisibility=BAND) as handle:
        model(images(batch=2), reference=[3, 0])
        moved = handle.report()
        model(images(), reference=[3])
        alone = handle.report()
    assert len(moved.graphs) == 1
    assert moved.visible_pairs == alone.visible_pairs


def test_after_a_forward_that_raised_nothing_is_told():
    model = vggt_double.VGGT().eval()
    pictures = torch.rand(1, 5, 3, 28, 28)
    with torch.no_grad(), patch(model, covisibility=BAND, fused=True) as handle:
        model(pictures)
        assert handle.report().inference.reason is None
        hook = model.aggregator.global_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(pictures)
        hook.remove()
        report = handle.report()
        assert (report.calls_last_forward, report.inference, report.graphs, report.backend) == (0, None, (), None)
        with pytest.raises(RuntimeError, match="nor after one that raised"):
            _ = handle.graph
        model(pictures)
        assert handle.report().inference.reason is None


def test_the_graph_of_a_causal_model_is_told_after_its_cut():
    model = doubles.StreamVGGT().double().eval()
    with patch(model, covisibility=BAND, special_tokens="masked") as handle:
        model(images())
        first = handle.layout
        model(images(seed=1))
        assert handle.layout is first
    lower = BAND.to_dense().tril()
    assert torch.equal(handle.graph.to_dense(), lower)
    assert handle.report().graphs[0].edges == int(lower.sum())


def test_undo_frees_what_describes_images(monkeypatch: pytest.MonkeyPatch):
    loaded = []
    monkeypatch.setattr(MegaLoc, "from_pretrained", lambda _: loaded.append(megaloc()) or loaded[-1])
    model = FAMILY["vggt"].create(torch.float32)
    handle = patch(model, covisibility=MegaLocSimilarity(size=SIZE))
    model(images(dtype=torch.float32))
    described = weakref.ref(loaded.pop())
    assert described() is not None
    handle.undo()
    gc.collect()
    assert described() is None
