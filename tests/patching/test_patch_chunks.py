"""Forwards of a patched model in chunks: what one forward of all frames returns, in its form."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closed_core import joint
from doubles import FAMILY, HEIGHT, PATCH, WIDTH, StreamVGGT, images
from tiers import every, full
from torch import Tensor, nn

from svggt_kernels import CoarseGraph, Core, CovisibilityGraph, Patch, PerLayer, open_scene, patch
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.inference import memory
from svggt_kernels.patching.chunks.results import WholeResult

CORE = Core(3, by=None)
CORE_FRAMES = [0, 4, 9]
GRID = (HEIGHT // PATCH, WIDTH // PATCH)
KNOWN = {name: double for name, double in FAMILY.items() if double.record is not None}
FRAMES = torch.rand(10, 3, 28, 42, generator=torch.Generator().manual_seed(0))


CAMERAS = ("camera_head.trunk.0.attn", "camera_head.trunk.1.attn")


def toy() -> RoomsModel:
    """Two gains, so that attention in its camera head matters."""
    model = RoomsModel.create(0, dim=64, depth=2, num_heads=1)
    with torch.no_grad():
        for block in model.camera_head.trunk:
            block.attn.q_norm.weight.fill_(3.0)
        model.camera_head.camera.weight.mul_(50)
    return model


def options(name: str) -> dict[str, Any]:
    return {"ref_view_strategy": "first"} if name == "da3" else {}


def same_form(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name in expected:
            same_form(actual[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same_form(one, other)
    else:
        assert actual == expected


@pytest.mark.parametrize("name", every(3, KNOWN))
def test_doubles_return_what_one_forward_returns(name: str):
    double, pictures = KNOWN[name], images(10, batch=2)
    model = double.create()
    expected = [
        joint(model, sample, CORE_FRAMES, trailing=double.trailing, **options(name))["output"] for sample in pictures
    ]
    with torch.no_grad(), patch(model, covisibility=CORE) as handle:
        plain = model(pictures, **options(name))
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=3) as handle:
        actual = model(pictures, **options(name))
        report = handle.report()
    same_form(actual, plain)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert (report.chunks.core, report.chunks.chunk, report.chunks.chunks) == (3, 3, 6)
    assert handle.graph.core_frames.tolist() == CORE_FRAMES


@pytest.mark.parametrize("name", every(6, KNOWN))
def test_frames_at_a_stride(name: str):
    double, pictures = KNOWN[name], images(10)
    model, core = double.create(), Core(3, by=None, coarse=2, stride=2)
    seen = [(row % 2 == 1) and (column % 2 == 1) for row in range(GRID[0]) for column in range(GRID[1])]
    weights = [1.0] * double.first + [len(seen) / sum(seen) if each else 0.0 for each in seen] + [1.0] * double.last
    expected = joint(
        model, pictures[0], CORE_FRAMES, trailing=double.trailing, coarse=[2, 7], weights=weights, **options(name)
    )["output"]
    with torch.no_grad(), patch(model, covisibility=core, chunk=4) as handle:
        torch.testing.assert_close(model(pictures, **options(name))[0], expected, rtol=1e-9, atol=1e-9)
    assert isinstance(handle.graph, CoarseGraph)
    assert "a core of 3 frames and 2 frames at a stride" in str(handle.report().chunks)


@pytest.mark.parametrize("fused", [False, True])
def test_named_outputs(fused: bool):
    model = toy()
    with torch.no_grad(), patch(model, covisibility=CORE, fused=fused):
        plain = model(FRAMES)
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4, fused=fused) as handle:
        actual = model(FRAMES)
        first = handle.report()
        model(FRAMES)
    same_form(actual, plain)
    for name, tensor in plain.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5)
    of_scene = joint(model, FRAMES, CORE_FRAMES)["pose_enc"]
    assert (of_scene - plain["pose_enc"][0]).abs().max() > 1e-3  # where the camera head follows the core
    report = handle.report()
    assert report.inference is None if not fused else report.inference.reason is None
    assert "in chunks (chunk=4): a core of 3 frames" in str(report)
    assert report.dense_modules == CAMERAS
    assert report.chunks.followers == ()
    # The core, a trial, once whether outputs follow from the cameras, and two chunks.
    assert (first.calls_last_forward, report.calls_last_forward) == (2 * (1 + 1 + 2 + 2), 2 * (1 + 1 + 2))
    assert report.calls_total == first.calls_last_forward + report.calls_last_forward


class Earlier(nn.Module):
    """A camera head that reads another layer than the last."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.inner = head.trunk, [head]

    def forward(self, aggregated_tokens_list: list[Tensor], num_iterations: int = 4) -> list[Tensor]:
        return [each.clone() for each in self.inner[0]([aggregated_tokens_list[-2]], num_iterations)]


class Derived(nn.Module):
    """Returns what follows from the cameras beside them, or looks at them twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model, self.kind = toy().double(), kind
        if kind == "earlier":
            self.model.camera_head = Earlier(self.model.camera_head)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.kind == "earlier":
            return self.model(images)
        if self.kind == "twice":
            layers, _ = self.model.aggregator(images)
            return {"first": self.model.camera_head(layers)[-1], "pose_enc": self.model.camera_head(layers, 2)[-1]}
        outputs = self.model(images)
        if self.kind == "copied":
            return {"depth": outputs["depth"], "pose_enc": outputs["pose_enc"].clone()}
        return outputs | {"centres": outputs["pose_enc"][..., :3] * 2}


@pytest.mark.parametrize("kind", every(4, ["derived", "twice", "copied", "earlier"]))
def test_camera_heads_follow_the_core_where_they_cannot_be_joined(kind: str):
    model, frames = Derived(kind).eval(), FRAMES.double()
    expected = joint(model, frames, CORE_FRAMES)
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4) as handle:
        actual = model(frames[None])
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name][0], tensor, rtol=1e-9, atol=1e-9)
    report = handle.report()
    assert report.dense_modules == ()
    assert "closed over the core: model.camera_head.trunk.0.attn, model.camera_head.trunk.1.attn" in str(report)


class Nested(nn.Module):
    """Returns the images, lists, tuples and numbers beside its tokens."""

    def __init__(self, returned: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.returned = FAMILY["vggt"].create(), returned

    def forward(self, images: Tensor, query_points: Tensor | None = None) -> Any:
        return self.returned(images, self.model(images))


def nested(images: Tensor, tokens: Tensor) -> dict[str, Any]:
    return {"images": images, "layers": [tokens, (tokens.float(), None)], "start": 3, "kind": "toy"}


def test_results_of_any_form():
    model, pictures = Nested(nested).eval(), images(10)
    with torch.no_grad(), patch(model, covisibility=CORE):
        plain = model(pictures)
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4):
        actual = model(pictures)
    same_form(actual, plain)
    assert actual["images"] is pictures
    torch.testing.assert_close(actual["layers"], plain["layers"])


def mean_beside(images: Tensor, tokens: Tensor) -> dict[str, Any]:
    return {"tokens": tokens, "scale": tokens.new_ones(1, 1)}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (mean_beside, r"its scale is \[1, 1\]; leave chunk out"),
        (lambda images, tokens: {"tokens": tokens, "all": object()}, "its all is a object"),
        (lambda images, tokens: tokens[0], r"its output is \[3, 6, 32\]"),
        (lambda images, tokens: [tokens] * images.shape[1], "for each of them what it returns for the core"),
        (
            lambda images, tokens: [tokens, tokens.new_ones(1, *[images.shape[1]] * 2)],
            r"'1', shape=torch.Size\(\[4\]\).* beside .*'1', shape=torch.Size\(\[3\]\)",
        ),
        (lambda images, tokens: tokens / tokens.mean(), "looks across frames that does not follow the core"),
    ],
)
def test_results_that_cannot_be_put_together_are_refused(returned: Callable[..., Any], message: str):
    model = Nested(returned).eval()
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=3), pytest.raises(ValueError, match=message):
        model(images(10))


@pytest.mark.parametrize("reference", [True, False], ids=["vggt", "pi3"])
def test_numbers_that_follow_from_how_many_frames_run_are_refused(reference: bool):
    """Also where chunks, with the reference frame beside them, hold as many frames as the core."""
    model = Nested(lambda images, tokens: [tokens, images.shape[1]]).eval()
    model.model = FAMILY["vggt" if reference else "pi3"].create()
    core, chunk = Core(2 + reference, by=None), 2
    with torch.no_grad(), patch(model, covisibility=core, chunk=chunk), pytest.raises(ValueError, match="for each of"):
        model(images(8 + reference))


@pytest.mark.parametrize("by", every(3, ["tokens", "patches", "thumbnails"]))
def test_the_core_is_that_of_one_forward(by: str):
    model, graphs = toy(), []
    for chunk in (None, 2):
        with torch.no_grad(), patch(model, covisibility=Core(3, by=by), chunk=chunk) as handle:
            model(FRAMES)
            graphs.append(handle.graph.core_frames.tolist())
    assert graphs[0] == graphs[1]


def test_few_frames_run_at_once():
    model = toy()
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4) as handle:
        model(FRAMES[:3])
        assert handle.report().chunks is None
        model(FRAMES[:4])
        assert handle.report().chunks.chunks == 1
        model(FRAMES[:1])
        assert handle.report().chunks is None


def test_copies_and_undo():
    model = toy()
    with torch.no_grad():
        before = model(FRAMES)["depth"]
        handle = patch(model, covisibility=CORE, chunk=4)
        expected = model(FRAMES)["depth"]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(FRAMES)["depth"], expected)
            assert Patch.of(other).report().chunks is not None
            assert Patch.of(other) is not handle
        handle.undo()
        assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())
        torch.testing.assert_close(model(FRAMES)["depth"], before, rtol=0, atol=0)


def test_hooks_of_the_model_itself_run_once():
    model, results = toy().double(), []
    model.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    model.register_forward_hook(lambda module, args, output: {**output, "depth": output["depth"] * 2})
    for chunk in (None, 4):
        with torch.no_grad(), patch(model, covisibility=CORE, chunk=chunk):
            results.append(model(FRAMES.double()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_images_are_given_as_they_are():
    model = toy()
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4):
        with pytest.raises(TypeError, match=r"must be floating point in \[0, 1\], got torch.uint8"):
            model(FRAMES.round().byte())


def test_a_forward_that_raised_leaves_the_patch_as_it_was():
    model = toy()
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4) as handle:
        expected = model(FRAMES)["depth"]
        with pytest.raises(ValueError, match="images"):
            model(FRAMES[:, :2])
        assert handle.report().backend is None
        torch.testing.assert_close(model(FRAMES)["depth"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", every(2, ["pi3", "vggt"]))
def test_another_thread_is_told_that_a_forward_runs(name: str):
    """It does not find the model without its patch, between chunks or in one."""
    model, told = FAMILY[name].create(), []

    def call() -> None:
        try:
            with torch.no_grad():
                model(images(10))
        except RuntimeError as error:
            told.append(str(error))

    def call_from_elsewhere(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4):
        expected = model(images(10))
        hook = next(model.children()).register_forward_hook(call_from_elsewhere)
        torch.testing.assert_close(model(images(10)), expected)
        hook.remove()
    assert len(told) == 4
    assert all("is running already" in text for text in told)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, handle: model.aggregator(FRAMES[None]), "is running already, so it cannot be called now"),
        (lambda model, handle: patch(model, covisibility=CORE), "is patched already"),
        (lambda model, handle: open_scene(model, FRAMES, core=CORE), "is patched already"),
        (lambda model, handle: handle.undo(), "is running already, so the patch cannot be undone now"),
    ],
    ids=["a module inside", "patch", "open_scene", "undo"],
)
def test_between_chunks_the_patch_is_in_place_for_other_threads(
    call: Callable[[nn.Module, Patch], object], message: str, monkeypatch: pytest.MonkeyPatch
):
    model, told, put = toy(), [], WholeResult.put

    def call_it() -> None:
        try:
            with torch.no_grad():
                told.append(call(model, handle))
        except (RuntimeError, ValueError) as error:
            told.append(str(error))

    def put_as_another_thread_calls(self: WholeResult, *args: Any) -> None:
        thread = threading.Thread(target=call_it)
        thread.start()
        thread.join()
        put(self, *args)

    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4) as handle:
        expected = model(FRAMES)
        monkeypatch.setattr(WholeResult, "put", put_as_another_thread_calls)
        torch.testing.assert_close(model(FRAMES), expected, rtol=0, atol=0)
    assert len(told) == 4
    assert all(message in str(answer) for answer in told)


def test_what_runs_in_chunks_is_not_compiled():
    model, compiled = toy(), []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4):
        expected = model(FRAMES)
        torch.testing.assert_close(torch.compile(model, backend=backend)(FRAMES), expected, rtol=0, atol=0)
    assert not compiled


@full
def test_a_module_that_is_compiled_by_itself_is_compiled_in_chunks():
    model, compiled = toy(), []
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4):
        expected = model(FRAMES)
    model.aggregator.compile(backend=lambda module, inputs: compiled.append(module) or module.forward)
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4):
        torch.testing.assert_close(model(FRAMES), expected, rtol=0, atol=0)
    assert compiled


# What is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"covisibility": "sequential"}, "frames see a core and themselves, but covisibility is"),
        ({"covisibility": "all"}, "frames see a core and themselves, but covisibility is"),
        ({"covisibility": Core(3, by="thumbnails", nearest=2)}, "and 2 nearest frames; give a Core"),
        ({"covisibility": Core(3, by=None, coarse="all")}, "and all others at stride 3; give a Core"),
        ({"covisibility": PerLayer([CORE, "all"])}, "but layers differ"),
        ({"special_tokens": "dense"}, "lets special tokens see everything"),
        ({"outputs": "all"}, 'leave out outputs="all"'),
        ({"modules": ["aggregator.global_blocks.0.attn"]}, "leave out modules"),
    ],
    ids=str,
)
def test_what_is_refused_before_the_model_is_touched(given: dict[str, Any], message: str):
    model = FAMILY["vggt"].create()
    with pytest.raises(ValueError, match=message):
        patch(model, **{"covisibility": CORE, "chunk": 3, **given})
    patch(model, covisibility="all").undo()


def test_causal_models_are_refused():
    with pytest.raises(ValueError, match="StreamVGGT is causal"):
        patch(StreamVGGT(), covisibility=CORE, chunk=3)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (CovisibilityGraph.core(10, [4, 0], nearest=[[1]] * 10), "a closed core and themselves, and nothing besides"),
        (CovisibilityGraph.from_pairs(10, [(0, 1)]), "a closed core and themselves, and nothing besides"),
        (CovisibilityGraph.core(10, [4, 5]), r"must hold frame 0, the reference frame of VGGT, got \[4, 5\]"),
        (CovisibilityGraph.core(8, [0, 2]), "must be over the 10 frames of this forward, got 8 x 8 frames"),
        (CovisibilityGraph.core(12, [0, 11]), "must be over the 10 frames of this forward, got 12 x 12 frames"),
        (CoarseGraph.core(12, [0, 2], [4], stride=2), "must be over the 10 frames of this forward, got 12 x 12 frames"),
    ],
    ids=["nearest", "none", "reference", "fewer frames", "more frames", "more frames, some at a stride"],
)
def test_graphs_that_do_not_fit_are_refused(graph: CovisibilityGraph, message: str):
    model = FAMILY["vggt"].create()
    with torch.no_grad(), patch(model, covisibility=lambda _: graph, chunk=3), pytest.raises(ValueError, match=message):
        model(images(10))


def test_a_graph_that_is_given():
    model, graph = FAMILY["vggt"].create(), CovisibilityGraph.core(10, [7, 0, 2])
    expected = joint(model, images(10)[0], [0, 2, 7])["output"]
    with torch.no_grad(), patch(model, covisibility=graph, chunk=3) as handle:
        torch.testing.assert_close(model(images(10))[0], expected, rtol=1e-9, atol=1e-9)
    assert handle.graph is graph


def test_calls_that_cannot_run_in_chunks_are_refused():
    model = Nested(nested).eval()
    with patch(model, covisibility=CORE, chunk=3):
        with pytest.raises(ValueError, match=r"without gradients; call it inside torch\.no_grad"):
            model(images(10))
        with torch.no_grad(), pytest.raises(ValueError, match=r"images \[B, S, 3, H, W\] alone, got images: .*query_p"):
            model(images(10), torch.zeros(1, 4, 2))
        model.train()
        with torch.no_grad(), pytest.raises(ValueError, match=r"eval\(\)"):
            model(images(10))


def test_a_cuda_graph_cannot_capture_chunks(monkeypatch: pytest.MonkeyPatch):
    model = toy()
    monkeypatch.setattr("svggt_kernels.patching.chunks.forward.is_capturing", lambda device: True)
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=4):
        with pytest.raises(RuntimeError, match="a CUDA graph cannot capture chunks"):
            model(FRAMES)


# A memory budget


@pytest.fixture
def budgets_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans follow from sizes, so they can be made without a GPU; with less beside them, so that tiny sizes count."""
    monkeypatch.setattr(memory, "DEVICES", ("cpu",))
    monkeypatch.setattr(memory, "WORKSPACE", 0)


def least_peak(frames: Tensor) -> int:
    """The bytes of the plan of one forward that needs least."""
    with pytest.MonkeyPatch.context() as watched, torch.no_grad():
        seen: list[memory.Sizes] = []
        watched.setattr(memory, "make_plan", lambda sizes, budget: seen.append(sizes) or next(memory._plans(sizes)))
        with patch(toy(), covisibility="all", memory_budget=1) as handle:
            handle._own.begin(frames[None], toy().tokens_per_frame(28, 42), False, handle._attention)
    return min(plan.peak_bytes for plan in memory._plans(seen[0]))


def test_what_does_not_fit_the_budget_runs_in_chunks(budgets_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "GIB", 2**20)  # a plan's least is rounded up to a tenth
    model, frames = toy(), FRAMES.repeat(12, 1, 1, 1)
    least = least_peak(frames) / memory.GIB
    with torch.no_grad():
        with patch(model, covisibility=CORE, chunk=7):
            expected = model(frames)
        for budget in (1.001 * least, 0.9 * least):
            with patch(model, covisibility=CORE, memory_budget=budget) as handle:
                actual, report = model(frames), handle.report()
            assert (report.chunks is None) is (budget > least)
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert re.fullmatch(r"one forward needs \d+\.\d GiB, memory_budget is \d+\.\d\d", report.chunks.reason)
    assert report.inference.memory.peak_bytes <= budget * memory.GIB
    assert 1 < report.chunks.chunk < 117


def test_what_fits_in_no_way_says_both(budgets_on_the_cpu: None):
    model = toy()
    with torch.no_grad(), patch(model, covisibility=CORE, memory_budget=1e-6):
        with pytest.raises(ValueError, match=r"at least .* for 10 frames .*; nor can it run in chunks: memory_bud"):
            model(FRAMES)
    with torch.no_grad(), patch(model, covisibility="sequential", memory_budget=1e-6):
        with pytest.raises(ValueError, match=r"at least .* for 10 frames .*bf16\"$"):
            model(FRAMES)


@full
def test_results_and_images_of_all_frames_count(budgets_on_the_cpu: None):
    held = []
    model, frames = toy(), FRAMES.repeat(4, 1, 1, 1)
    with torch.no_grad(), patch(model, covisibility=CORE, chunk=9, memory_budget=50) as handle:
        budget = handle._chunks.session.budget
        begin = budget.begin
        budget.begin = lambda run: (held.append(budget.held), begin(run))
        result = model(frames)
    of_images, of_results = frames.nbytes, sum(tensor.nbytes for tensor in result.values())
    of_cameras = 40 * 2 * 64 * 4
    assert held == [of_images] * 2 + [of_images + of_results + of_cameras] * 7
