"""Frames that are seen at a stride, and global layers that differ, in patched models."""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import dataclass

import pytest
import tiny
import torch
import torch.nn.functional as F
from doubles import BAND, FAMILY, HEIGHT, ISLANDS, PATCH, WIDTH, Double, fused, images, token_mask
from graphs import assert_same_graph
from torch import Tensor
from torch.overrides import TorchFunctionMode

from svggt_kernels import (
    CoarseGraph,
    CoarseLayout,
    Core,
    CovisibilityGraph,
    MegaLoc,
    Patch,
    PerLayer,
    compare_dense,
    patch,
)
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.sources import MegaLocSimilarity, PatchSimilarity, Scene

KNOWN = {name: double for name, double in FAMILY.items() if double.record is not None}
known = pytest.mark.parametrize("double", KNOWN.values(), ids=KNOWN)
GRID = (HEIGHT // PATCH, WIDTH // PATCH)  # 2 x 3: at stride 2 the patch in row 1 and column 1 alone
COARSE = CoarseGraph.core(5, [0, 3], [1, 4], stride=2)


class WeightedAttention(TorchFunctionMode):
    """Dense attention, in calls over all tokens with log weights added to its scores: one matrix for each layer."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.biases = itertools.cycle(matrix.double().log() for matrix in weights)
        self.tokens = len(weights[0])

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and args[0].shape[2] == self.tokens:
            kwargs["attn_mask"] = next(self.biases)
        return func(*args, **kwargs)


def token_weights(double: Double, graph: CoarseGraph) -> Tensor:
    """How many keys each key stands for, token by token, from the definition; float64 `[N, N]`."""
    in_full, seen = graph.full.to_dense(), graph.united().to_dense()
    order, per_frame = double.order(graph.num_frames), double.tokens_per_frame
    of_frame = torch.zeros(per_frame, dtype=torch.float64)
    of_frame[: double.first] = of_frame[per_frame - double.last :] = 1
    assert (GRID, graph.stride) == ((2, 3), 2)
    of_frame[double.first + 1 * GRID[1] + 1] = 6
    weights = in_full.double()[:, :, None] + (seen & ~in_full).double()[:, :, None] * of_frame
    weights = weights[order][:, order].flatten(1).repeat_interleave(per_frame, 0)
    if double.trailing:  # a frame more of the core
        row = weights[per_frame * order.index(int(graph.full.core_frames[0]))]
        weights = torch.cat([weights, row.expand(double.trailing, -1)])
        weights = F.pad(weights, (0, double.trailing), value=1.0)
    return weights


@known
def test_frames_at_a_stride_are_dense_attention_with_their_weights(double: Double):
    model = double.create()
    with WeightedAttention(token_weights(double, COARSE)):
        expected = model(images())
    with patch(model, covisibility=COARSE) as handle:
        torch.testing.assert_close(model(images()), expected)
    assert isinstance(handle.layout, CoarseLayout)
    report = handle.report()
    assert report.special_tokens == "masked"
    assert report.token_density == pytest.approx(float((token_weights(double, COARSE) > 0).double().mean()))
    assert "coarsely: 2 frames at stride 2, 8 edges besides" in str(report)
    assert f" in full, {handle.layout.coarse_pairs / handle.layout.num_tokens**2:.3g} at a stride)" in str(report)


def test_gradients_reach_the_weights_of_the_model():
    double = FAMILY["vggt"]
    model = double.create()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(images()).square().sum().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    with WeightedAttention(token_weights(double, COARSE)):
        expected = gradients()
    with patch(model, covisibility=COARSE):
        for actual, wanted in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


def test_a_core_with_frames_at_a_stride_is_closed():
    """What the frames outside hold does not reach the others."""
    model = RoomsModel.create(dim=16, depth=2, num_heads=1).double().eval()
    pictures = torch.rand(6, 3, 28, 42, dtype=torch.float64)
    others = pictures.clone()
    with torch.no_grad(), patch(model, covisibility=Core(2, by=None, coarse=2, stride=2)) as handle:
        before = model(pictures)["depth"]
        graph = handle.graph
        assert isinstance(graph, CoarseGraph)
        inside = sorted({*graph.full.core_frames.tolist(), *graph.frames.tolist()})
        outside = [frame for frame in range(6) if frame not in inside]
        assert len(inside) == 4 and inside[0] == 0
        others[outside[:1]] = 0.5
        after = model(others)["depth"]
    kept = [frame for frame in range(6) if frame != outside[0]]
    torch.testing.assert_close(before[:, kept], after[:, kept])
    assert not torch.isclose(before[:, outside[0]], after[:, outside[0]]).all()


def test_layers_that_differ_are_dense_attention_each_with_its_mask():
    double = FAMILY["vggt"]
    model = double.create()
    special_are_ordinary = token_mask(double, BAND, dense_special=False), token_weights(double, COARSE)
    with WeightedAttention(*special_are_ordinary):
        expected = model(images())
    given = PerLayer([BAND, COARSE])
    with patch(model, covisibility=given, special_tokens="masked") as handle:
        torch.testing.assert_close(model(images()), expected)
    assert [planned.graphs for planned in handle.layers] == [(BAND,), (COARSE,)]
    with pytest.raises(ValueError, match=r"different graphs; use handle\.layers"):
        _ = handle.graph


def test_a_report_of_layers_that_differ():
    model = RoomsModel.create(dim=16, depth=5, num_heads=1).eval()
    by_layer = PerLayer(lambda layer: "all" if layer in (0, 1, 4) else CovisibilityGraph.core(6, [0, 3]))
    graph = CovisibilityGraph.core(6, [0, 3])
    with torch.no_grad(), patch(model, covisibility=PerLayer(["all", "all", graph, graph, "all"])) as handle:
        model(torch.rand(6, 3, 28, 42))
    report = handle.report()
    full, core = report.layers
    assert (full.layers, core.layers) == ((0, 1, 4), (2, 3))
    assert report.dense_pairs == full.dense_pairs == core.dense_pairs
    assert report.visible_pairs == round((3 * full.dense_pairs + 2 * core.visible_pairs) / 5)
    assert "layers 0-1, 4: every frame sees every other" in str(report) and "layers 2-3: a given graph" in str(report)
    with torch.no_grad(), patch(model, covisibility=by_layer) as handle:
        model(torch.rand(6, 3, 28, 42))
        assert len(handle.report().layers) == 3  # two graphs that are equal are two objects


def test_pairs_of_layers_that_differ_count_every_sample():
    """Also where one layer has one graph for all samples."""
    double = FAMILY["vggt"]
    model, graphs = double.create(), [BAND, ISLANDS]
    with patch(model, covisibility=PerLayer([graphs, "all"]), special_tokens="masked") as handle:
        model(images(batch=2))
    report = handle.report()
    by_sample, full = report.layers
    assert (len(by_sample.graphs), len(full.graphs)) == (2, 1)
    assert report.dense_pairs == by_sample.dense_pairs == 2 * full.dense_pairs
    assert report.visible_pairs == round((by_sample.visible_pairs + 2 * full.visible_pairs) / 2)


@dataclass(frozen=True)
class Holding:
    """A user's source that holds a tensor."""

    weights: Tensor
    label: str = "a core"
    needs: str = "nothing"

    def graph(self, scene: Scene) -> CovisibilityGraph:
        return CovisibilityGraph.core(scene.num_frames, [0])


def test_layers_are_alike_where_their_sources_are():
    twice, other = Holding(torch.ones(3)), Holding(torch.ones(3))
    given = [twice, "patches", other, Core(by="patches"), twice, Core(by=PatchSimilarity()), "core", Core()]
    assert [layers for _, layers in PerLayer(given).by_layers(8)] == [(0, 4), (1, 3, 5), (2,), (6, 7)]


def test_layers_hold_no_layers():
    with pytest.raises(TypeError, match="PerLayer holds no PerLayer, got one for layer 1"):
        patch(FAMILY["vggt"].create(), covisibility=PerLayer(["all", PerLayer(["all", "all"])]))


def test_layers_that_say_the_same_share_their_layouts():
    model = RoomsModel.create(dim=16, depth=4, num_heads=1).eval()
    core, later = Core(2, by=None), Core(3, by=None)
    with torch.no_grad(), patch(model, covisibility=PerLayer([core, later, Core(2, by=None), "all"])) as handle:
        model(torch.rand(6, 3, 28, 42))
        first, second, third, last = handle.layers
        assert first is third and first is not second
        layouts = [planned.layouts[0] for planned in (first, second, last)]
        model(torch.rand(6, 3, 28, 42))
        again = [handle.layers[layer].layouts[0] for layer in (0, 1, 3)]
    assert all(one is other for one, other in zip(layouts, again, strict=True))


def test_frames_are_described_once_for_all_layers(monkeypatch: pytest.MonkeyPatch):
    described, loaded, network = [], [], tiny.megaloc()
    describe = MegaLocSimilarity.descriptors

    def noted(similarity: MegaLocSimilarity, scene: Scene) -> Tensor:
        described.append(scene.sample[0])
        return describe(similarity, scene)

    monkeypatch.setattr(MegaLoc, "from_pretrained", lambda source: loaded.append(source) or network)
    monkeypatch.setattr(MegaLocSimilarity, "descriptors", noted)
    model, pictures = RoomsModel.create(dim=16, depth=4, num_heads=1).eval(), torch.rand(6, 3, 28, 42)
    alone = []
    for one in (Core(2), Core(3, choice="farthest"), MegaLocSimilarity()):
        with torch.no_grad(), patch(model, covisibility=one) as handle:
            model(pictures)
            alone.append(handle.graph)
    described.clear(), loaded.clear()
    given = PerLayer([Core(2), Core(3, choice="farthest"), MegaLocSimilarity(), Core(3, by="thumbnails")])
    with torch.no_grad(), patch(model, covisibility=given) as handle:
        model(pictures)
        assert (len(loaded), described) == (1, [0])
        for planned, graph in zip(handle.layers, alone, strict=False):
            assert_same_graph(planned.graphs[0], graph)
        model(pictures)
        assert len(described) == 1
        model(pictures.flip(0))
        assert len(described) == 2


def test_layers_that_see_everything_are_dense():
    model = FAMILY["vggt"].create()
    dense = model(images())
    with patch(model, covisibility=PerLayer(lambda layer: "all")) as handle:
        torch.testing.assert_close(model(images()), dense)
    assert handle.graph.num_edges == 25 and handle.report().token_density == 1


def test_functions_of_the_images_and_samples_with_graphs_of_their_own():
    double = FAMILY["vggt"]
    model = double.create()
    both = images(batch=2)
    expected = []
    for sample, graph in enumerate((BAND, ISLANDS)):
        with WeightedAttention(token_weights(double, COARSE), token_mask(double, graph, dense_special=False)):
            expected.append(model(both[sample : sample + 1]))
    given = PerLayer([COARSE, lambda pictures: [BAND, ISLANDS]])
    with patch(model, covisibility=given, special_tokens="masked"):
        torch.testing.assert_close(model(both), torch.cat(expected))


@pytest.mark.parametrize(
    "covisibility", [Core(2, by=None, coarse="all", stride=2), PerLayer(["all", ISLANDS])], ids=str
)
def test_the_fused_forward_attends_likewise(covisibility):
    network, results = fused.model(), []
    graph = CovisibilityGraph.core(6, [0, 4])
    if isinstance(covisibility, PerLayer):
        covisibility = PerLayer([graph, "all", *["all"] * (len(network.aggregator.global_blocks) - 2)])
    for is_fused in (True, False):
        with torch.no_grad(), patch(network, covisibility=covisibility, fused=is_fused) as handle:
            results.append(network(fused.IMAGES))
            assert not is_fused or handle.report().inference.reason is None
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_layers_run_again_by_checkpoints_see_what_they_saw():
    double = FAMILY["vggt"]
    model = double.create()
    with patch(model, covisibility=PerLayer([BAND, COARSE]), special_tokens="masked"):
        model(images()).square().sum().backward()
        wanted = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        model.zero_grad()
        for block in model.aggregator.global_blocks:
            forward = block.forward
            block.forward = lambda *args, forward=forward, **kwargs: torch.utils.checkpoint.checkpoint(
                forward, *args, use_reentrant=False, **kwargs
            )
        model(images()).square().sum().backward()
    found = [weight.grad for weight in model.parameters() if weight.grad is not None]
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_are_patched_too(duplicate):
    model = FAMILY["vggt"].create()
    patch(model, covisibility=PerLayer(["all", COARSE]))
    expected = model(images())
    twin = duplicate(model)
    torch.testing.assert_close(twin(images()), expected)
    assert len(Patch.of(twin).layers) == 2


def test_masks_are_checked_for_each_layer():
    """A mask that hides nothing of one layer may hide what another shows."""
    double = FAMILY["vggt"]
    model = double.create()
    mask = token_mask(double, BAND, dense_special=False)

    for block in model.aggregator.global_blocks:
        block.attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attn_mask": mask}), with_kwargs=True
        )
    with patch(model, covisibility=PerLayer([BAND, BAND]), special_tokens="masked"):
        model(images())
    with (
        patch(model, covisibility=PerLayer([BAND, "all"]), special_tokens="masked"),
        pytest.raises(ValueError, match="hides or weighs tokens"),
    ):
        model(images())


def test_compared_with_dense():
    model = RoomsModel.create(dim=16, depth=2, num_heads=1).eval()
    with patch(model, covisibility=PerLayer(["all", Core(1, by=None, coarse="all", stride=2)])):
        comparison = compare_dense(model, torch.rand(6, 3, 28, 42))
    assert 0 < comparison.pairs < 1 and not comparison.is_full


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"covisibility": PerLayer(["all"])}, ValueError, "each of the 2 global layers of this model, got 1"),
        ({"covisibility": PerLayer("all")}, TypeError, "a sequence or a function of the layer, got str"),
        ({"covisibility": PerLayer(["all", "neighbors"])}, ValueError, "got 'neighbors'"),
        ({"covisibility": PerLayer(["all", 3])}, TypeError, "covisibility must be"),
    ],
    ids=str,
)
def test_what_is_refused_before_the_model_is_touched(options: dict, error: type[Exception], message: str):
    model = FAMILY["vggt"].create()
    with pytest.raises(error, match=message):
        patch(model, **options)
    patch(model, covisibility="all")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stranger", {**FAMILY["stranger"].options}, "patch grid, which is not known of Stranger; give a Covis"),
        ("vggt", {"special_tokens": "dense"}, 'leave special_tokens="dense" out'),
    ],
)
def test_what_is_refused_in_a_forward(name: str, options: dict, message: str):
    model = FAMILY[name].create()
    with patch(model, covisibility=COARSE, **options), pytest.raises(ValueError, match=message):
        model(images())


def test_causal_models_see_frames_in_full():
    from doubles import StreamVGGT

    model = StreamVGGT().double().eval()
    with patch(model, covisibility=COARSE), pytest.raises(ValueError, match="causal model must be seen in full"):
        model(images())


def test_a_graph_over_other_frames_is_refused():
    model = FAMILY["vggt"].create()
    with (
        patch(model, covisibility=COARSE),
        pytest.raises(ValueError, match="over the 4 frames of this forward, got 5 x 5"),
    ):
        model(images(frames=4))


def test_a_reference_frame_that_is_seen_coarsely_is_told():
    graph = CoarseGraph.core(5, [3], "all", stride=2)
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=graph), pytest.warns(UserWarning, match="hides frame 0, .* from 4 of 5 frames"):
        model(images())
