"""Patching whole models: what comes out, that it acts, and that it leaves."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import doubles
import pytest
import torch
import torch.nn.functional as F
from doubles import FAMILY, Double, images
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from svggt_kernels import CovisibilityGraph
from svggt_kernels.frame_graphs import TokenSimilarity
from svggt_kernels.models import RECORDS
from svggt_kernels.patch import Patch, patch
from svggt_kernels.toy import ToyMultiViewTransformer

ALONE = CovisibilityGraph.from_pairs(5, [])
# Directed; {0, 1} and {2, 3, 4} never see each other.
ISLANDS = CovisibilityGraph.from_pairs(5, [(0, 1), (2, 3), (3, 2), (3, 4), (4, 2)])
# Directed and connected.
BAND = CovisibilityGraph.from_pairs(5, [(0, 1), (1, 0), (1, 2), (2, 3), (3, 2), (4, 0)])

family = pytest.mark.parametrize("double", FAMILY.values(), ids=FAMILY)
# Elsewhere some tokens always meet: VGGT-Omega's registers in layers of their own, MapAnything's scale token.
ISOLATING = {name: double for name, double in FAMILY.items() if name not in ("vggt-omega", "mapanything")}
isolating = pytest.mark.parametrize("double", ISOLATING.values(), ids=ISOLATING)


class MaskedAttention(TorchFunctionMode):
    """Dense attention with a mask, in calls over all tokens: what a patched model must equal."""

    def __init__(self, double: Double, *graphs: CovisibilityGraph, dense_special: bool) -> None:
        super().__init__()
        self.mask = torch.stack([token_mask(double, graph, dense_special) for graph in graphs])[:, None]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and args[0].shape[2] == self.mask.shape[-1]:
            kwargs["attn_mask"] = self.mask
        return func(*args, **kwargs)


def token_mask(double: Double, graph: CovisibilityGraph, dense_special: bool) -> Tensor:
    """Who sees whom, token by token, from the definition: bool `[N, N]`."""
    frames = graph.num_frames
    order = double.order(frames)
    per_frame = double.tokens_per_frame
    place = torch.arange(per_frame)
    special = (place < double.first) | (place >= per_frame - double.last)
    dense = torch.cat([special.repeat(frames) & dense_special, torch.ones(double.trailing, dtype=torch.bool)])
    mask = torch.ones(len(dense), len(dense), dtype=torch.bool)
    visible = graph.to_dense()[order][:, order]
    in_frames = frames * per_frame
    mask[:in_frames, :in_frames] = visible.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
    return mask | dense | dense[:, None]


def sparse(model: nn.Module, double: Double, **options) -> Patch:
    return patch(model, **{**double.options, **options})


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def attributes(model: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(module.__dict__) for name, module in model.named_modules()}


# What comes out


@family
def test_full_graph_is_dense_attention(double: Double):
    model = double.create()
    dense = model(images())
    with sparse(model, double, covisibility="all") as handle:
        torch.testing.assert_close(model(images()), dense)
    assert handle.report().token_density == 1
    with sparse(model, double, covisibility=CovisibilityGraph.all_visible(5), special_tokens="masked"):
        torch.testing.assert_close(model(images()), dense)


@family
@pytest.mark.parametrize("special", ["dense", "masked"])
@pytest.mark.parametrize("graph", [ALONE, ISLANDS, BAND], ids=["alone", "islands", "band"])
def test_any_graph_is_dense_attention_with_its_mask(double: Double, graph: CovisibilityGraph, special: str):
    model = double.create()
    dense = model(images())
    with MaskedAttention(double, graph, dense_special=special == "dense"):
        expected = model(images())
    assert not torch.allclose(expected, dense)
    with sparse(model, double, covisibility=graph, special_tokens=special):
        torch.testing.assert_close(model(images()), expected)


@isolating
def test_frames_that_see_only_themselves_are_isolated(double: Double):
    model = double.create()
    other = images()
    other[:, [1, 4]] = images(seed=1)[:, [1, 4]]
    with sparse(model, double, covisibility=ALONE, special_tokens="masked"):
        before, after = model(images()), model(other)
    assert torch.equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]])
    assert not torch.isclose(before[:, [1, 4]], after[:, [1, 4]]).any(dim=-1).all()


def test_pi3_frames_alone_are_single_images():
    """Without a reference frame a frame that sees only itself is the model run on it alone."""
    model = FAMILY["pi3"].create()
    single = torch.cat([model(images()[:, i : i + 1]) for i in range(5)], dim=1)
    with patch(model, covisibility=ALONE, special_tokens="masked"):
        torch.testing.assert_close(model(images()), single)


@isolating
def test_keys_and_values_of_invisible_frames_are_never_read(double: Double):
    model = double.create()
    poisoned = [i for i, image in enumerate(double.order(5)) if image >= 2]

    def poison(module: nn.Module, inputs: object, qkv: Tensor) -> Tensor:
        frames = qkv.clone().unflatten(1, (5, double.tokens_per_frame))
        frames[:, poisoned, :, doubles.DIM :] = torch.nan
        return frames.flatten(1, 2)

    with sparse(model, double, covisibility=ISLANDS, special_tokens="masked"):
        clean = model(images())
        for name in double.modules:
            model.get_submodule(f"{name}.qkv").register_forward_hook(poison)
        out = model(images())
    assert torch.equal(out[:, :2], clean[:, :2])
    assert out[:, 2:].isnan().all()


def test_toy_model_with_every_output():
    model = ToyMultiViewTransformer.create(dim=16, depth=2, num_heads=1).double()
    pictures = torch.rand(4, 3, 28, 42, dtype=torch.float64)
    dense = model(pictures)
    with patch(model, covisibility="all") as handle:
        for name, value in model(pictures).items():
            torch.testing.assert_close(value, dense[name])
    assert handle.report().model == "toy"


def test_one_frame():
    double = FAMILY["vggt"]
    model = double.create()
    dense = model(images(1))
    for source in ("tokens", "all", CovisibilityGraph.all_visible(1)):
        with patch(model, covisibility=source) as handle:
            torch.testing.assert_close(model(images(1)), dense)
        assert handle.graph.num_edges == 1


def test_images_without_a_batch_axis():
    model = FAMILY["vggt"].create()
    dense = model(images()[0])
    with patch(model, covisibility="all"):
        torch.testing.assert_close(model(images()[0]), dense)


def test_scale_of_the_call_is_kept():
    model, tokens = OneCall(scale=0.7).double(), torch.randn(1, 12, 8, dtype=torch.float64)
    dense = model(tokens)
    with patch(model, modules=["attn"], tokens_per_frame=4, covisibility="all"):
        torch.testing.assert_close(model(tokens), dense)


# dtypes, autograd, checkpointing


@family
def test_autocast_is_within_twice_the_error_of_the_unpatched_model(double: Double):
    model = double.create()
    exact = model(images())
    model, pictures = model.float(), images(dtype=torch.float32)

    def error(out: Tensor) -> Tensor:
        return (out - exact).square().mean().sqrt()

    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        plain = error(model(pictures))
        with sparse(model, double, covisibility="all"):
            assert error(model(pictures)) <= 2 * plain


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients(guard):
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=BAND):
        with_gradients = model(images())
        with guard():
            assert torch.equal(model(images()), with_gradients)


@family
def test_gradients_are_those_of_masked_attention(double: Double):
    model = double.create()
    with MaskedAttention(double, BAND, dense_special=True):
        expected = gradients(model, lambda: model(images()))
    with sparse(model, double, covisibility=BAND):
        actual = gradients(model, lambda: model(images()))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing(reentrant: bool, monkeypatch: pytest.MonkeyPatch):
    double = FAMILY["vggt"]
    model = double.create()
    original = doubles.checkpoint
    monkeypatch.setattr(doubles, "checkpoint", lambda *args, **_: original(*args, use_reentrant=reentrant))
    with patch(model, covisibility="tokens") as handle:
        expected = gradients(model, lambda: model(images()))
        model.train()
        actual = gradients(model, lambda: model(images()))
        assert handle.report().calls_last_forward == 2
        assert handle.report().calls_total == 2 + 2 * 2
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


def test_checkpointing_runs_each_forward_again_with_its_own_layout():
    """Three forwards with three graphs, one of them without gradients, before one backward."""
    model = FAMILY["vggt"].create()
    graphs = {0: ALONE, 1: BAND, 2: ISLANDS}
    pictures = {seed: images(seed=seed) for seed in graphs}

    def covisibility(given: Tensor) -> CovisibilityGraph:
        return next(graphs[seed] for seed in graphs if torch.equal(given, pictures[seed]))

    with patch(model, covisibility=covisibility):
        expected = gradients(model, lambda: model(pictures[0]) + model(pictures[1]))
        model.train()

        def run() -> Tensor:
            out = model(pictures[0]) + model(pictures[1])
            with torch.no_grad():
                model(pictures[2])
            return out

        actual = gradients(model, run)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


def test_checkpointing_of_a_forgotten_forward_is_refused():
    model = FAMILY["vggt"].create().train()
    graphs = iter([ALONE, BAND] * 20)
    with patch(model, covisibility=lambda _: next(graphs)):
        first = model(images(seed=99))
        for seed in range(17):
            model(images(seed=seed))
        with pytest.raises(RuntimeError, match="none of the last 16"):
            first.sum().backward()


# Batches


def test_one_graph_per_sample():
    double = FAMILY["vggt"]
    model = double.create()
    pictures = images(batch=2)
    with MaskedAttention(double, BAND, ISLANDS, dense_special=True):
        expected = model(pictures)
    with patch(model, covisibility=[BAND, ISLANDS]) as handle:
        torch.testing.assert_close(model(pictures), expected)
        assert handle.graphs == (BAND, ISLANDS)
        assert len(handle.layouts) == 2
        with pytest.raises(ValueError, match=r"2 graphs, one per sample; use handle\.graphs"):
            _ = handle.graph
        assert handle.report().visible_pairs == sum(layout.visible_pairs for layout in handle.layouts)
        with pytest.raises(ValueError, match="one for each of 3 samples, got 2"):
            model(images(batch=3))


def test_one_graph_for_the_batch_is_one_layout():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=BAND) as handle:
        model(images(batch=3))
    assert len(handle.layouts) == 1


def test_each_sample_finds_its_own_graph_in_its_tokens():
    model = FAMILY["vggt"].create()
    pictures = images(batch=2)
    with patch(model, covisibility=TokenSimilarity(neighbours=1)) as handle:
        both = model(pictures)
        assert len(handle.graphs) == 2
        for i in range(2):
            torch.testing.assert_close(model(pictures[i : i + 1]), both[i : i + 1])


# Which frames see which


def two_scenes() -> Tensor:
    """Frames 0, 2, 4 show one scene and frames 1, 3, 5 another."""
    scenes = images(2, seed=3)[:, [0, 1, 0, 1, 0, 1]]
    return scenes + 0.01 * images(6, seed=4)


def test_token_similarity_finds_the_scenes():
    model = FAMILY["vggt"].create()
    source = TokenSimilarity(neighbours=2, anchors=0, bridge=False, reference_frame=None)
    with patch(model, covisibility=source) as handle:
        model(two_scenes())
    scene = torch.arange(6) % 2
    assert torch.equal(handle.graph.to_dense(), scene[:, None] == scene)


@pytest.mark.parametrize(
    ("name", "reference", "sees_all"),
    [("vggt", "model", True), ("vggt", None, False), ("pi3", "model", False), ("pi3", 0, True)],
)
def test_reference_frame(name: str, reference, sees_all: bool):
    model = FAMILY[name].create()
    source = TokenSimilarity(neighbours=1, anchors=0, reference_frame=reference)
    with patch(model, covisibility=source) as handle:
        model(two_scenes())
    visible = handle.graph.to_dense()
    assert bool(visible[0].all() & visible[:, 0].all()) == sees_all


def test_the_same_image_many_times():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=TokenSimilarity(neighbours=1)) as handle:
        assert model(images(1).expand(-1, 6, -1, -1, -1)).isfinite().all()
    assert handle.graph.is_connected()


def test_function_of_the_images():
    seen = []

    def covisibility(given: Tensor) -> CovisibilityGraph:
        seen.append(given)
        return BAND

    model = FAMILY["vggt"].create()
    with patch(model, covisibility=covisibility) as handle:
        model(images()[0])
    assert torch.equal(seen[0], images())
    assert handle.graph is BAND


def test_function_for_a_model_whose_transformer_sees_no_images():
    shapes = []
    model = FAMILY["mapanything"].create()
    with patch(model, covisibility=lambda features: shapes.extend(f.shape for f in features) or BAND):
        model(images())
    assert shapes == [(1, doubles.DIM, 2, 3)] * 5


def test_layouts_are_made_once():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=BAND) as handle:
        model(images())
        first = handle.layout
        assert first.graph is BAND
        model(images(seed=1))
        assert handle.layout is first
        model(images(seed=1)[..., :8])
        assert handle.layout is not first
        model(images())
        assert handle.layout is first


@pytest.mark.parametrize(
    ("covisibility", "error", "message"),
    [
        ("megaloc", ValueError, "got 'megaloc'"),
        (None, TypeError, "got NoneType"),
        ([], TypeError, "got list"),
        ([BAND, "all"], TypeError, "got list"),
        (torch.eye(5, dtype=torch.bool), TypeError, "from_dense"),
    ],
    ids=["word", "none", "empty", "mixed", "matrix"],
)
def test_covisibility_that_means_nothing(covisibility, error: type[Exception], message: str):
    model = FAMILY["vggt"].create()
    with pytest.raises(error, match=message):
        patch(model, covisibility=covisibility)
    assert "forward" not in model.aggregator.__dict__


@pytest.mark.parametrize(
    ("covisibility", "error", "message"),
    [
        (CovisibilityGraph.all_visible(4), ValueError, "over the 5 frames of this forward, got 4 x 4"),
        (CovisibilityGraph.all_visible(5, 6), ValueError, "got 5 x 6"),
        (lambda _: None, TypeError, "what the covisibility function returns must be a CovisibilityGraph"),
    ],
    ids=["frames", "rectangular", "function"],
)
def test_covisibility_that_does_not_fit_the_forward(covisibility, error: type[Exception], message: str):
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=covisibility), pytest.raises(error, match=message):
        model(images())


# DA3 moves its reference view to the front


def test_graph_follows_the_reordering_of_each_sample():
    double = FAMILY["da3"]
    model = double.create()
    pictures = images(batch=2)
    with patch(model, covisibility=BAND) as handle:
        both = model(pictures, reference=[3, 0])
        moved, kept = handle.layouts
        assert handle.graph is BAND
        assert kept.graph is BAND
        order = [3, 0, 1, 2, 4]
        assert torch.equal(moved.graph.to_dense(), BAND.to_dense()[order][:, order])
        for i, reference in enumerate((3, 0)):
            torch.testing.assert_close(model(pictures[i : i + 1], reference=[reference]), both[i : i + 1])


def test_graph_from_tokens_is_told_in_the_order_of_the_images():
    model = FAMILY["da3"].create()
    source = TokenSimilarity(neighbours=2, anchors=0, bridge=False, reference_frame=None)
    scene = torch.arange(6) % 2
    with patch(model, covisibility=source) as handle:
        model(two_scenes(), reference=[3])
        assert torch.equal(handle.graph.to_dense(), scene[:, None] == scene)
        moved = scene[[3, 0, 1, 2, 4, 5]]
        assert torch.equal(handle.layout.graph.to_dense(), moved[:, None] == moved)
    with patch(model, covisibility=TokenSimilarity(neighbours=1, anchors=0)) as handle:
        model(two_scenes(), reference=[3])
    assert handle.graph.to_dense()[3].all(), "the reference view, wherever it was"


def test_two_frames_are_not_reordered():
    double = FAMILY["da3"]
    model = double.create()
    one_way = CovisibilityGraph.from_pairs(2, [(0, 1)])
    with MaskedAttention(double, one_way, dense_special=True):
        expected = model(images(2))
    with patch(model, covisibility=one_way) as handle:
        torch.testing.assert_close(model(images(2)), expected)
    assert handle.layout.graph is one_way


def test_a_model_that_does_more_than_reorder_is_refused():
    model = FAMILY["da3"].create()
    model.backbone.pretrained.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with patch(model, covisibility=BAND), pytest.raises(RuntimeError, match="order of the frames"):
        model(images())


# StreamVGGT: causal, by a mask


def test_streaming_model_runs_causally():
    model = doubles.StreamVGGT().double().eval()
    dense = model(images())
    with patch(model, covisibility="all", special_tokens="masked") as handle:
        torch.testing.assert_close(model(images()), dense)
        assert handle.report().model == "StreamVGGT"
    assert torch.equal(handle.layout.graph.to_dense(), torch.ones(5, 5, dtype=torch.bool).tril())
    with patch(model, covisibility=BAND, special_tokens="masked") as handle:
        assert not torch.allclose(model([{"img": image} for image in images().unbind(1)]), dense)
    assert torch.equal(handle.layout.graph.to_dense(), BAND.to_dense().tril())


def test_streaming_model_refuses_what_is_not_causal_or_cached():
    model = doubles.StreamVGGT().double().eval()
    with pytest.raises(ValueError, match='special_tokens="masked"'):
        patch(model)
    with patch(model, special_tokens="masked"), pytest.raises(ValueError, match="use_cache=True"):
        model.aggregator(images(1), past_key_values=[None, None], use_cache=True)


def test_masks_pass_only_where_the_graph_shows_no_more():
    model = doubles.StreamVGGT().double().eval()
    dense = model(images())
    modules = [block.attn for block in model.aggregator.global_blocks]
    causal = CovisibilityGraph.from_dense(torch.ones(5, 5, dtype=torch.bool).tril())
    with patch(model, modules=modules, covisibility=causal):
        torch.testing.assert_close(model(images()), dense)
    with patch(model, modules=modules, covisibility=BAND), pytest.raises(ValueError, match="attn_mask that hides"):
        model(images())


# Attention that a layout cannot express


class Call(nn.Module):
    """One call of attention, with what the caller wants in it."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        k = q[:, :, : self.options.pop("keys", None)]
        return F.scaled_dot_product_attention(q, k, k, **self.options)[:, 0]


class OneCall(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attn = Call(**options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"is_causal": True}, "is_causal=True"),
        ({"enable_gqa": True}, "enable_gqa=True"),
        ({"keys": 6}, r"queries are \[1, 1, 12, 8\] and its keys \[1, 1, 6, 8\]"),
        ({"attn_mask": torch.eye(12, dtype=torch.bool)}, "attn_mask that hides"),
        ({"attn_mask": torch.eye(12)}, "attn_mask that hides or weighs"),
    ],
    ids=["dropout", "causal", "gqa", "cross", "mask", "bias"],
)
def test_attention_that_cannot_be_answered_raises(options: dict, message: str):
    model = OneCall(**options)
    with patch(model, modules=["attn"], tokens_per_frame=4), pytest.raises(ValueError, match=message):
        model(torch.randn(1, 12, 8))


def test_dropout_of_a_module_in_training():
    model = FAMILY["vggt"].create()
    model.aggregator.global_blocks[1].attn.attn_drop.p = 0.2
    with patch(model, covisibility="all"):
        model(images())
        model.train()
        with pytest.raises(ValueError, match=r"global_blocks\.1\.attn uses dropout_p=0\.2"):
            model(images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_frame": 8}, "35 tokens, which is not 4 frames of 8 tokens and 0 trailing"),
        ({"tokens_per_frame": 7, "trailing_tokens": 1}, "35 tokens, which is not 4 frames of 7 tokens and 1 trailing"),
        ({"covisibility": CovisibilityGraph.all_visible(4)}, "35 tokens, which is not 4 frames of 8 tokens"),
        ({}, "tokens_per_frame="),
    ],
    ids=["length", "trailing", "graph", "nothing"],
)
def test_tokens_that_are_not_whole_frames(options: dict, message: str):
    model = FAMILY["stranger"].create()
    handle = patch(model, modules=FAMILY["stranger"].modules, **options)
    with handle, pytest.raises(ValueError, match=message):
        model(images())


def test_layers_that_disagree():
    model = FAMILY["stranger"].create()
    model.layers[1]["within"].register_forward_hook(lambda module, args, out: out[:, :-1])
    with pytest.raises(ValueError, match="layers of a patched model must agree"):
        with patch(model, modules=FAMILY["stranger"].modules, covisibility=BAND):
            model(images())


# Proof that it acts


def test_attention_that_is_not_fused_is_noticed_at_once():
    model = FAMILY["vggt"].create()
    dense = model(images())
    handle = patch(model, covisibility="all")
    model.aggregator.global_blocks[0].attn.fused_attn = False
    with pytest.raises(RuntimeError, match=r"aggregator\.global_blocks\.0\.attn did not call .*fused_attn = True"):
        model(images())
    model.aggregator.global_blocks[0].attn.fused_attn = True
    torch.testing.assert_close(model(images()), dense)
    handle.undo()


def test_modules_that_were_not_called_are_noticed():
    model = FAMILY["stranger"].create()
    model.spare = doubles.Block().double()
    options = {**FAMILY["stranger"].options, "modules": [*FAMILY["stranger"].modules, "spare.attn"]}
    with patch(model, **options), pytest.raises(RuntimeError, match=r"1 of 3 patched modules .*: spare\.attn"):
        model(images())


def test_errors_of_the_model_are_not_hidden():
    model = FAMILY["vggt"].create()
    with patch(model):
        with pytest.raises(RuntimeError, match="channels"):
            model(images()[:, :, :2])
        model(images())


@family
def test_report(double: Double):
    model = double.create()
    handle = sparse(model, double, covisibility=BAND)
    assert "no forward yet" in str(handle.report())
    with pytest.raises(RuntimeError, match="before the first forward"):
        _ = handle.layout
    model(images())
    model(images())
    report = handle.report()
    assert report.model == (double.record or "Stranger")
    assert report.modules == double.modules
    assert (report.calls_last_forward, report.calls_total) == (2, 4)
    assert report.graphs[0].edges == BAND.num_edges
    mask = token_mask(double, BAND, dense_special=True)
    assert report.visible_pairs == int(mask.sum())
    assert report.token_density == pytest.approx(mask.double().mean().item())
    assert report.ideal_speedup == pytest.approx(1 / report.token_density)
    assert report.backend == "sdpa"
    assert report.planning_seconds > 0
    text = str(report)
    for fact in (
        double.modules[0],
        "2 calls answered (4 in total)",
        "5 frames, 11 edges",
        "backend: sdpa",
        "not triton",
    ):
        assert fact in text


def test_named_backend():
    model = FAMILY["vggt"].create(torch.float32)
    with patch(model, covisibility=BAND, backend="sdpa") as handle:
        model(images(dtype=torch.float32))
    assert handle.report().backend == "sdpa"
    with pytest.raises(ValueError, match="backend must be one of"):
        patch(model, backend="cuda")


# It leaves


@family
def test_undo_leaves_no_trace(double: Double):
    model = double.create()
    dense, keys, before, text = model(images()), list(model.state_dict()), attributes(model), repr(model)
    handle = sparse(model, double, covisibility=BAND)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    model(images())
    handle.undo()
    assert attributes(model) == before
    assert torch.equal(model(images()), dense)
    with pytest.raises(RuntimeError, match="undone already"):
        handle.undo()
    assert handle.report().calls_total == 2


def test_context_manager_undoes_even_after_an_error():
    model = FAMILY["vggt"].create()
    before = attributes(model)
    with pytest.raises(ZeroDivisionError), patch(model):
        raise ZeroDivisionError
    assert attributes(model) == before
    with patch(model) as handle:
        handle.undo()
    assert attributes(model) == before


def test_patching_twice_is_refused():
    model = FAMILY["vggt"].create()
    with patch(model):
        for again in (model, model.aggregator):
            with pytest.raises(ValueError, match="patched already"):
                patch(again)
        with pytest.raises(ValueError, match="patched already"):
            patch(model, modules=["aggregator.global_blocks.0.attn"])
        model(images())
    patch(model).undo()


def test_forwards_that_others_replaced_are_kept():
    model = FAMILY["vggt"].create()
    attention = model.aggregator.global_blocks[0].attn
    calls = []
    hooked = attention.forward

    def theirs(*args, **kwargs):
        calls.append(1)
        return hooked(*args, **kwargs)

    attention.forward = theirs
    with patch(model, covisibility="all"):
        model(images())
    assert calls == [1]
    assert attention.forward is theirs
    handle = patch(model)
    ours = attention.forward
    attention.forward = theirs
    with pytest.raises(RuntimeError, match=r"global_blocks\.0\.attn was replaced after"):
        handle.undo()
    attention.forward = ours
    handle.undo()
    assert attention.forward is theirs


# Copies


def test_deep_copy_is_patched_by_itself():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=BAND) as handle:
        expected = model(images())
        twin = copy.deepcopy(model)
        assert torch.equal(twin(images()), expected)
        with torch.no_grad():
            for weight in twin.parameters():
                weight.mul_(1.1)
        changed = twin(images())
        assert not torch.allclose(changed, expected)
        assert torch.equal(model(images()), expected)
        assert Patch.of(twin) is not handle
    assert torch.equal(twin(images()), changed), "the copy stays patched"
    Patch.of(twin).undo()
    assert not torch.allclose(twin(images()), changed)
    with pytest.raises(ValueError, match="not patched"):
        Patch.of(twin)


@family
def test_pickled_copy_is_patched(double: Double):
    model = double.create()
    with sparse(model, double, covisibility=BAND):
        expected = model(images())
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(images()), expected)
    assert Patch.of(loaded).modules == double.modules


def test_pickled_copy_in_another_process(tmp_path: Path):
    model = ToyMultiViewTransformer.create(dim=16, depth=2, num_heads=1)
    pictures = torch.rand(5, 3, 28, 42)
    with patch(model, covisibility=BAND):
        torch.save({"model": model, "images": pictures, "depth": model(pictures)["depth"]}, tmp_path / "saved.pt")
    script = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(saved['model'](saved['images'])['depth'], saved['depth'])\n"
        "from svggt_kernels.patch import Patch\n"
        "print(Patch.of(saved['model']).report().calls_last_forward)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved.pt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


# Finding the model


@family
def test_records_find_their_modules(double: Double):
    model = double.create()
    handle = sparse(model, double)
    assert handle.record.name == (double.record or "Stranger")
    assert handle.modules == double.modules
    handle.undo()


def test_patching_a_part_of_the_model():
    model = FAMILY["vggt"].create()
    whole = model(images())
    with patch(model.aggregator, covisibility="all") as handle:
        torch.testing.assert_close(model(images()), whole)
    assert handle.modules == ("global_blocks.0.attn", "global_blocks.1.attn")
    with patch(model, covisibility="all") as handle:
        model.aggregator(images())
        assert handle.report().calls_last_forward == 2


def test_attention_outside_a_forward_is_refused():
    model = FAMILY["vggt"].create()
    with patch(model):
        model(images())
        with pytest.raises(RuntimeError, match="was called outside a forward of aggregator"):
            model.aggregator.global_blocks[0](torch.randn(1, 45, doubles.DIM, dtype=torch.float64))


def test_unknown_model():
    with pytest.raises(ValueError, match="no record knows the model Sequential") as error:
        patch(nn.Sequential(nn.Linear(2, 2)))
    for record in RECORDS:
        assert record.name in str(error.value)
    assert "patch(model, modules=" in str(error.value)


def test_model_that_holds_two():
    pair = nn.ModuleDict({"teacher": FAMILY["vggt"].create(), "student": FAMILY["pi3"].create()})
    with pytest.raises(ValueError, match=re.escape("teacher.aggregator (VGGT), student (Pi3)")):
        patch(pair)
    with patch(pair["teacher"]), patch(pair["student"]):
        pair["teacher"](images()), pair["student"](images())


def test_wrapper_that_passes_attributes_on():
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def __getattr__(self, name: str):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images)

    model = Wrapper(FAMILY["pi3"].create())
    with patch(model) as handle:
        model(images())
    assert handle.modules == ("inner.decoder.1.attn", "inner.decoder.3.attn")


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        (["layers.9.across.attn"], ValueError, "a module called 'layers.9.across.attn'"),
        ([nn.Linear(2, 2)], ValueError, "this Linear"),
        (["layers.0.across.attn"] * 2, ValueError, "given twice"),
        ([], ValueError, "empty"),
        ("layers.0.across.attn", TypeError, "must be a list"),
    ],
    ids=["name", "foreign", "twice", "empty", "string"],
)
def test_modules_that_mean_nothing(modules, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        patch(FAMILY["stranger"].create(), modules=modules, tokens_per_frame=7)


def test_modules_by_reference_and_frames_by_graph():
    double = FAMILY["stranger"]
    model = double.create()
    modules = [layer["across"].attn for layer in model.layers]
    with MaskedAttention(double, BAND, dense_special=True):
        expected = model(images())
    with patch(model, modules=modules, covisibility=BAND, num_special_tokens=1):
        torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize(
    "options", [{"tokens_per_frame": 9}, {"num_special_tokens": 3}, {"trailing_tokens": 1}], ids=lambda o: next(iter(o))
)
def test_token_counts_of_a_known_model_are_not_the_callers(options: dict):
    with pytest.raises(ValueError, match="give them together with modules="):
        patch(FAMILY["vggt"].create(), **options)


def test_special_tokens_must_be_one_of_two():
    with pytest.raises(ValueError, match="got 'sparse'"):
        patch(FAMILY["vggt"].create(), special_tokens="sparse")


def test_compiled_model():
    """Attention runs outside the compiled graphs, whether the model was compiled before or after."""
    model = ToyMultiViewTransformer.create(dim=16, depth=1, num_heads=1)
    pictures = torch.rand(5, 3, 14, 28)
    with torch.no_grad():
        with patch(model, covisibility=BAND):
            expected = model(pictures)["depth"]
            torch.testing.assert_close(torch.compile(model, backend="eager")(pictures)["depth"], expected)
        compiled = torch.compile(model, backend="eager")
        dense = compiled(pictures)["depth"]
        with patch(compiled, covisibility=BAND):
            torch.testing.assert_close(compiled(pictures)["depth"], expected)
        torch.testing.assert_close(compiled(pictures)["depth"], dense)
