"""What a patched model computes, against dense attention with a mask."""

from __future__ import annotations

import copy
from collections.abc import Callable

import doubles
import pytest
import torch
from device_waits import no_device_waits
from doubles import ALONE, BAND, FAMILY, ISLANDS, Double, MaskedAttention, images, sparse
from torch import Tensor, nn

from svggt_kernels import CovisibilityGraph, Patch, TokenSimilarity, patch
from svggt_kernels.attention import choose_backend
from svggt_kernels.demo.model import RoomsModel

family = pytest.mark.parametrize("double", FAMILY.values(), ids=FAMILY)
# Elsewhere some tokens always meet: VGGT-Omega's registers in layers of their own, MapAnything's scale token.
ISOLATING = {name: double for name, double in FAMILY.items() if name not in ("vggt-omega", "mapanything")}
isolating = pytest.mark.parametrize("double", ISOLATING.values(), ids=ISOLATING)


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


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
    model = RoomsModel.create(dim=16, depth=2, num_heads=1).double()
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
        ("magic", ValueError, "got 'magic'"),
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
        patch(model, covisibility="tokens", special_tokens="dense")
    with patch(model, covisibility="tokens") as handle:
        model(images(1))
        assert not handle.layout.queries.dense_special and "special tokens: masked" in str(handle.report())
    with (
        patch(model, covisibility="tokens"),
        pytest.raises(ValueError, match="use_cache=True"),
    ):
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


@pytest.mark.gpu
def test_on_a_gpu():
    """The best backend answers under autocast, and a fixed graph costs no wait for the device after the first call."""
    model = RoomsModel.create(dim=128, depth=2, num_heads=2)
    pictures = torch.rand(5, 3, 56, 70)
    with torch.inference_mode(), patch(model, covisibility=BAND):
        exact = copy.deepcopy(model).double()(pictures.double())["depth"]
        plain = copy.deepcopy(model).bfloat16()(pictures.bfloat16())["depth"]
        model, pictures = model.cuda(), pictures.cuda()
        with torch.autocast("cuda", torch.bfloat16):
            model(pictures)
            torch.cuda.synchronize()
            with no_device_waits():
                out = model(pictures)["depth"]
        handle = Patch.of(model)
        assert handle.report().backend == choose_backend(handle.layout.device, torch.bfloat16, head_size=64)
        assert handle.layout.device.type == "cuda"
        assert (out.cpu() - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.gpu
def test_token_similarity_on_a_gpu():
    model = FAMILY["da3"].create(torch.float32).cuda()
    with torch.inference_mode(), patch(model, covisibility=TokenSimilarity(neighbours=1)) as handle:
        model(two_scenes().float().cuda(), reference=[3])
    on_gpu = handle.graph.to_dense().cpu()
    model.cpu()
    with torch.inference_mode(), patch(model, covisibility=TokenSimilarity(neighbours=1)) as handle:
        model(two_scenes().float(), reference=[3])
    assert torch.equal(on_gpu, handle.graph.to_dense())


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        patch("vggt")
