"""The handle of a patch: it refuses what it cannot do, proves that it acts, leaves no trace, and finds its model."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import doubles
import pytest
import torch
import torch.nn.functional as F
from doubles import BAND, FAMILY, Double, MaskedAttention, images, sparse, token_mask
from torch import Tensor, nn

from svggt_kernels import CovisibilityGraph, Patch, patch
from svggt_kernels.backends import cpu
from svggt_kernels.compiling import uncompiled
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.models import RECORDS
from svggt_kernels.sources import Core, TokenSimilarity

family = pytest.mark.parametrize("double", FAMILY.values(), ids=FAMILY)


def attributes(model: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(module.__dict__) for name, module in model.named_modules()}


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


def test_scale_of_the_call_is_kept():
    model, tokens = OneCall(scale=0.7).double(), torch.randn(1, 12, 8, dtype=torch.float64)
    dense = model(tokens)
    with patch(model, modules=["attn"], tokens_per_frame=4, covisibility="all"):
        torch.testing.assert_close(model(tokens), dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"is_causal": True}, "is_causal=True"),
        ({"keys": 6}, r"queries are \[1, 1, 12, 8\] and its keys \[1, 1, 6, 8\]"),
        ({"attn_mask": torch.eye(12, dtype=torch.bool)}, "attn_mask that hides"),
        ({"attn_mask": torch.eye(12)}, "attn_mask that hides or weighs"),
    ],
    ids=["dropout", "causal", "cross", "mask", "bias"],
)
def test_attention_that_cannot_be_answered_raises(options: dict, message: str):
    model = OneCall(**options)
    with (
        patch(model, modules=["attn"], tokens_per_frame=4, covisibility="all"),
        pytest.raises(ValueError, match=message),
    ):
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
        ({"tokens_per_frame": 8}, "35 tokens, which is not 5 frames of 8 tokens and 0 trailing"),
        ({"tokens_per_frame": 7, "trailing_tokens": 1}, "35 tokens, which is not 5 frames of 7 tokens and 1 trailing"),
        ({"covisibility": CovisibilityGraph.all_visible(4)}, "over the 5 frames of this forward, got 4 x 4"),
    ],
    ids=["length", "trailing", "graph"],
)
def test_tokens_that_are_not_whole_frames(options: dict, message: str):
    model = FAMILY["stranger"].create()
    handle = patch(model, modules=FAMILY["stranger"].modules, **{"covisibility": "tokens", **options})
    with handle, pytest.raises(ValueError, match=message):
        model(images())


def test_model_that_merges_tokens():
    """Tokens that a model drops are noticed even if what is left divides into frames."""
    model = FAMILY["vggt"].create()
    model.aggregator.global_blocks[0].norm1.register_forward_hook(lambda module, args, out: out[:, 5:])
    with (
        patch(model, covisibility="tokens"),
        pytest.raises(ValueError, match=r"40 tokens, which is not 5 frames of 9 tokens.*merges tokens \(FastVGGT"),
    ):
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
    with (
        patch(model, covisibility="tokens", **options),
        pytest.raises(RuntimeError, match=r"1 of 3 patched modules .*: spare\.attn"),
    ):
        model(images())


def test_errors_of_the_model_are_not_hidden():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility="tokens"):
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
    assert report.backend == "reference"
    assert report.planning_seconds > 0
    text = str(report)
    for fact in (
        double.modules[0],
        "2 calls answered (4 in total)",
        "5 frames, 11 edges",
        "backend: reference",
        "not triton",
    ):
        assert fact in text


def test_report_says_what_neighbours_cost_and_what_a_core_is():
    model = FAMILY["vggt"].create()
    said = {}
    for word, source in (("near", TokenSimilarity(neighbours=1)), ("core", Core(2, by="tokens")), ("given", BAND)):
        with patch(model, covisibility=source) as handle:
            model(images())
        said[word] = str(handle.report())
    assert ["a fifth to a half of its AUC@30" in text for text in said.values()] == [True, False, False]
    assert ["a core of 2 frames" in text for text in said.values()] == [False, True, False]
    assert ["special tokens: masked" in text for text in said.values()] == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_report_says_why_a_better_instruction_set_is_unused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    if why := cpu.unsupported(torch.device("cpu"), dtype, 64):
        pytest.skip(why)
    compiled = vars(cpu.extension()) | {"why_amx_is_unused": lambda: "the system refused them"}
    monkeypatch.setattr(cpu, "extension", lambda: SimpleNamespace(**compiled))
    model = FAMILY["vggt"].create(dtype)
    handle = patch(model, covisibility=BAND, backend="cpu")
    model(images(dtype=dtype))
    assert ("not amx_bf16: the system refused them" in str(handle.report())) == (dtype == torch.bfloat16)


def test_named_backend():
    model = FAMILY["vggt"].create(torch.float32)
    with patch(model, covisibility=BAND, backend="reference") as handle:
        model(images(dtype=torch.float32))
    assert handle.report().backend == "reference"
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
    with pytest.raises(ZeroDivisionError), patch(model, covisibility="tokens"):
        raise ZeroDivisionError
    assert attributes(model) == before
    with patch(model, covisibility="tokens") as handle:
        handle.undo()
    assert attributes(model) == before


def test_patching_twice_is_refused():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility="tokens"):
        for again in (model, model.aggregator):
            with pytest.raises(ValueError, match="patched already"):
                patch(again, covisibility="tokens")
        with pytest.raises(ValueError, match="patched already"):
            patch(model, modules=["aggregator.global_blocks.0.attn"], covisibility="tokens")
        model(images())
    patch(model, covisibility="tokens").undo()


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
    handle = patch(model, covisibility="tokens")
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


def test_what_forwards_leave_behind_is_not_pickled():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility="tokens"):
        size = len(pickle.dumps(model))
        model(images())
        assert len(pickle.dumps(model)) == size
        with pytest.raises(RuntimeError, match="before the first forward"):
            _ = Patch.of(copy.deepcopy(model)).layout


def test_pickled_copy_in_another_process(tmp_path: Path):
    model = RoomsModel.create(dim=16, depth=2, num_heads=1)
    pictures = torch.rand(5, 3, 28, 42)
    with patch(model, covisibility=BAND):
        torch.save({"model": model, "images": pictures, "depth": model(pictures)["depth"]}, tmp_path / "saved.pt")
    script = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(saved['model'](saved['images'])['depth'], saved['depth'])\n"
        "from svggt_kernels import Patch\n"
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
    with patch(model, covisibility="tokens"):
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
    with patch(pair["teacher"], covisibility="tokens"), patch(pair["student"], covisibility="tokens"):
        pair["teacher"](images()), pair["student"](images())


def test_branch_of_da3_without_global_attention_is_left_alone():
    both = nn.ModuleDict({"da3": FAMILY["da3"].create(), "da3_metric": FAMILY["da3"].create()})
    both["da3_metric"].backbone.pretrained.alt_start = -1
    with patch(both, covisibility="tokens") as handle:
        assert handle.modules == tuple(f"da3.{name}" for name in FAMILY["da3"].modules)
        both["da3"](images())


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
    with patch(model, covisibility="tokens") as handle:
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
        patch(FAMILY["stranger"].create(), modules=modules, tokens_per_frame=7, covisibility="tokens")


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
        patch(FAMILY["vggt"].create(), covisibility="tokens", **options)


def test_special_tokens_must_be_one_of_two():
    with pytest.raises(ValueError, match="got 'sparse'"):
        patch(FAMILY["vggt"].create(), special_tokens="sparse")


def test_compiled_model():
    """Attention runs outside the compiled graphs, whether the model was compiled before or after."""
    model, pictures = FAMILY["vggt"].create(), images()
    with torch.no_grad():
        with patch(model, covisibility=BAND):
            expected = model(pictures)
            torch.testing.assert_close(torch.compile(model, backend="eager")(pictures), expected)
        compiled = torch.compile(model, backend="eager")
        dense = compiled(pictures)
        with patch(compiled, covisibility=BAND):
            torch.testing.assert_close(compiled(pictures), expected)
        torch.testing.assert_close(compiled(pictures), dense)


def test_many_functions_that_stay_uncompiled_are_not_counted_as_one():
    def add_one(x: Tensor) -> Tensor:
        return x + 1

    functions = [uncompiled(recursive=True)(add_one) for _ in range(5)]

    @torch.compile(backend="eager")
    def add_all(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
        assert add_all(torch.zeros(1)) == len(functions)
