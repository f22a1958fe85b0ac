"""A patch among other tools and other models: wrappers, copies, threads, forks, what cannot be recorded."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from doubles import BAND, FAMILY, Aggregator, Block, MaskedAttention, Pi3, images
from doubles import vggt as vggt_double
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from svggt_kernels import CovisibilityGraph, Patch, patch

ALONE = CovisibilityGraph.sequential(5, 0)


class FullyShardedDouble(nn.Module):
    """Holds a module as FullyShardedDataParallel does, and passes its attributes on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_fsdp_wrapped_module"), name)

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


# Wrappers

wrappers = pytest.mark.parametrize(
    "wrap", [compiled, checkpoint_wrapper, FullyShardedDouble], ids=["compiled", "checkpointed", "sharded"]
)


@wrappers
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_blocks_wrapped_one_by_one(wrap, fused: bool):
    model = vggt_double.VGGT().eval()
    pictures, graph = torch.rand(1, 5, 3, 28, 28), CovisibilityGraph.sequential(5, 1)
    with torch.no_grad():
        with patch(model, covisibility=graph, fused=False):
            expected = model(pictures)["pose"]
        for blocks in (model.aggregator.frame_blocks, model.aggregator.global_blocks):
            for i, block in enumerate(blocks):
                blocks[i] = wrap(block)
        with patch(model, covisibility=graph, fused=fused) as handle:
            torch.testing.assert_close(model(pictures)["pose"], expected, atol=1e-4, rtol=1e-4)
            report = handle.report()
    assert report.calls_last_forward == vggt_double.DEPTH
    assert report.modules == tuple(f"aggregator.global_blocks.{i}.attn" for i in range(vggt_double.DEPTH))
    assert report.inference is None if not fused else "which the fused block does not know" in report.inference.reason


@wrappers
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own
def test_attention_wrapped_by_itself(wrap):
    model = FAMILY["vggt"].create()
    with MaskedAttention(FAMILY["vggt"], BAND, dense_special=True):
        out = model(images())
        expected = torch.autograd.grad(out.sum(), list(model.parameters()), allow_unused=True)
    for block in model.aggregator.global_blocks:
        block.attn = wrap(block.attn)
    with patch(model, covisibility=BAND):
        actual = torch.autograd.grad(model(images()).sum(), list(model.parameters()), allow_unused=True)
    for mine, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, right)


def test_modules_named_through_their_wrappers():
    model = FAMILY["stranger"].create()
    for layer in model.layers:
        layer["across"] = FullyShardedDouble(layer["across"])
    options = FAMILY["stranger"].options
    with patch(model, covisibility=BAND, **options) as handle:
        model(images())
    assert handle.modules == FAMILY["stranger"].modules
    modules = [layer["across"].attn for layer in model.layers]
    with patch(model, covisibility=BAND, **{**options, "modules": modules}):
        model(images())


def test_blocks_that_are_shared():
    """Of three global blocks two are one; numbered by place, none is left out."""
    model = FAMILY["vggt"].create()
    first, other = model.aggregator.global_blocks
    model.aggregator.global_blocks = nn.ModuleList([first, first, other])
    model.aggregator.frame_blocks.append(Block().double())
    with MaskedAttention(FAMILY["vggt"], BAND, dense_special=True):
        expected = model(images())
    with patch(model, covisibility=BAND) as handle:
        torch.testing.assert_close(model(images()), expected)
    assert handle.modules == ("aggregator.global_blocks.0.attn", "aggregator.global_blocks.2.attn")
    assert handle.report().calls_last_forward == 3


def test_one_module_under_two_names_is_told():
    model = FAMILY["stranger"].create()
    model.again = model.layers[0]["across"]
    with pytest.raises(ValueError, match=r"layers\.0\.across\.attn is given twice in modules: again\.attn is the same"):
        patch(model, modules=["layers.0.across.attn", "again.attn"], tokens_per_frame=7, covisibility="all")


# Copies


def shallow(module: nn.Module) -> nn.Module:
    """Copied as nn.DataParallel copies, with weights of its own that are zero."""
    twin = module._replicate_for_data_parallel()
    for name, weight in module._parameters.items():
        if weight is not None:
            setattr(twin, name, torch.zeros_like(weight))
    for name, child in module._modules.items():
        setattr(twin, name, shallow(child))
    return twin


def test_copies_that_share_attributes_are_refused():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=BAND):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"aggregator was called through a copy that shares"):
            shallow(model)(images())
        block, attention = model.aggregator.global_blocks[0], model.aggregator.global_blocks[0].attn
        block.attn = copy.copy(attention)
        with pytest.raises(RuntimeError, match=r"global_blocks\.0\.attn was called through a copy"):
            model(images())
        block.attn = attention
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(images()), model(images()))
        Patch.of(twin).undo()
    assert all(not module._forward_pre_hooks for each in (model, twin) for module in each.modules())


# Other functions in the place of PyTorch's


def test_attention_that_a_tool_has_wrapped_is_answered(monkeypatch: pytest.MonkeyPatch):
    own, calls = F.scaled_dot_product_attention, []

    def logged(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model = FAMILY["vggt"].create()
    with patch(model, covisibility=BAND):
        expected = model(images())
        monkeypatch.setattr(F, "scaled_dot_product_attention", logged)
        assert torch.equal(model(images()), expected)
    assert calls


def test_attention_that_a_tool_has_replaced_is_told(monkeypatch: pytest.MonkeyPatch):
    def theirs(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=BAND), pytest.raises(RuntimeError, match=r"was replaced by \S+theirs"):
        model(images())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "record",
    [
        lambda model: torch.jit.trace(model, images(), check_trace=False),
        lambda model: torch.export.export(model, (images(),)),
    ],
    ids=["trace", "export"],
)
def test_patched_models_cannot_be_recorded(record):
    model = FAMILY["vggt"].create()
    with (
        torch.no_grad(),
        patch(model, covisibility=BAND),
        pytest.raises(RuntimeError, match=r"patched model, which torch\.jit\.trace and torch\.export cannot record"),
    ):
        record(model)


# Threads


def test_a_model_runs_one_forward_at_a_time():
    """While one thread is inside a forward another is refused, and so is undo; what is told then is nothing."""
    model, inside, go_on = FAMILY["vggt"].create(), threading.Event(), threading.Event()

    def covisibility(_: Tensor) -> CovisibilityGraph:
        inside.set()
        go_on.wait(timeout=10)
        return BAND

    outputs: list[Tensor] = []
    with patch(model, covisibility=BAND):
        expected = model(images())
    handle = patch(model, covisibility=covisibility)
    thread = threading.Thread(target=lambda: outputs.append(model(images())))
    thread.start()
    assert inside.wait(timeout=10)
    for call in (lambda: model(images()), handle.undo):
        with pytest.raises(RuntimeError, match="runs one forward at a time"):
            call()
    assert handle.report().calls_last_forward == 0
    go_on.set()
    thread.join()
    assert torch.equal(outputs[0], expected)
    assert handle.report().calls_last_forward == 2
    handle.undo()


def test_attention_called_in_another_thread_is_not_of_this_forward():
    model, errors = FAMILY["vggt"].create(), []

    def call() -> None:
        try:
            model.aggregator.global_blocks[1].attn(torch.randn(1, 45, 32, dtype=torch.float64))
        except RuntimeError as error:
            errors.append(str(error))

    def in_a_thread(*_: object) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with patch(model, covisibility=BAND):
        model.aggregator.frame_blocks[1].register_forward_hook(in_a_thread)
        model(images())
    assert len(errors) == 1 and "was called outside a forward" in errors[0]


# Forks


class Star(Aggregator):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Renamed(Aggregator):
    def forward(self, imgs: Tensor, scale: float = 1.0):
        return super().forward(imgs * scale)


@pytest.mark.parametrize("fork", [Star, Renamed])
def test_forks_that_call_their_images_otherwise(fork: type[Aggregator]):
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=BAND):
        expected = model(images())
    model.aggregator.__class__ = fork
    with patch(model, covisibility=BAND):
        assert torch.equal(model(images()), expected)
        assert torch.equal(model.aggregator(images())[0][-1][:, :, 3:], expected)


def test_forks_without_images_are_told_what_is_expected():
    model = FAMILY["vggt"].create()
    model.aggregator.__class__ = Renamed
    with patch(model, covisibility=BAND):
        with pytest.raises(TypeError, match=r"must be given images \[B, S, 3, H, W\], as the argument images"):
            model.aggregator(None)
    model = FAMILY["pi3"].create()
    with patch(model, covisibility=BAND):
        with pytest.raises(TypeError, match=r"or \[S, 3, H, W\], got \[2, 2\]"):
            model(torch.zeros(2, 2))


class Pi3X(Pi3):
    """Pi3 with a block across frames for poses, and a token that reads all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.pose_inject_blk = nn.ModuleList([Block()])
        self.metric_decoder = nn.ModuleDict({"cross_attn": Reader()})

    def forward(self, imgs: Tensor, poses: Tensor | None = None) -> Tensor:
        hidden = super().forward(imgs)
        flat = hidden.flatten(1, 2)
        if poses is not None:
            flat = self.pose_inject_blk[0](flat)
        metric = self.metric_decoder["cross_attn"](flat[:, :1] * 0, flat)
        return flat.reshape(hidden.shape) + 0 * metric[:, None]


class Reader(nn.Module):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[:, None], context[:, None], context[:, None])[:, 0]


def test_attention_across_frames_that_no_record_names():
    torch.manual_seed(1)
    model = Pi3X().double().eval()
    with patch(model, covisibility=ALONE) as handle:
        model(images())
        assert handle.report().dense_modules == ("metric_decoder.cross_attn",)
        assert "not patched: metric_decoder.cross_attn" in str(handle.report())
        with pytest.raises(ValueError, match=r"pose_inject_blk\.0\.attn attends from 30 tokens of several frames"):
            model(images(), poses=torch.eye(4))
    modules = [model.decoder[i].attn for i in (1, 3)]
    with patch(model, modules=modules, covisibility=ALONE, num_special_tokens=2):
        model(images(), poses=torch.eye(4))


def test_unknown_model_is_told_the_way_out_first():
    with pytest.raises(ValueError, match="no record knows") as error:
        patch(nn.Sequential(nn.Linear(2, 2)))
    assert "patch(model, modules=" in str(error.value).splitlines()[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_special_tokens": (1, 1, 1)}, ValueError, "num_special_tokens must be an int or"),
        ({"num_special_tokens": [1, "a"]}, TypeError, "num_special_tokens must be an integer, got 'a'"),
        ({"num_special_tokens": -1}, ValueError, "num_special_tokens must be at least 0, got -1"),
        ({"trailing_tokens": "a"}, TypeError, "trailing_tokens must be an integer, got 'a'"),
        ({"tokens_per_frame": 7.0}, TypeError, "tokens_per_frame, .*, must be an integer, got 7.0"),
        ({"tokens_per_frame": True}, TypeError, "tokens_per_frame, .*, must be an integer, got True"),
        (
            {"tokens_per_frame": 2, "num_special_tokens": (2, 1)},
            ValueError,
            "must be at least 3, got 2",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_counts_of_tokens_that_mean_nothing(options: dict, error: type[Exception], message: str):
    double = FAMILY["stranger"]
    with pytest.raises(error, match=message):
        patch(double.create(), covisibility="all", **{**double.options, **options})


def test_a_list_of_special_tokens():
    double = FAMILY["stranger"]
    model = double.create()
    with patch(model, covisibility=BAND, **double.options):
        expected = model(images())
    with patch(model, covisibility=BAND, **{**double.options, "num_special_tokens": [1, 0]}):
        assert torch.equal(model(images()), expected)
