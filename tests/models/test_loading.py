"""Weights: random ones are always the same, and those of a file are used or refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.weights import write_weights
from svggt_kernels.models import RUNNABLE, RunnableModel
from svggt_kernels.models.loading import RANDOM_WEIGHTS, build, load_model

CPU = torch.device("cpu")


@pytest.fixture
def tiny_toy(monkeypatch: pytest.MonkeyPatch) -> RunnableModel:
    """Makes the toy model small and random, and lets it take weights of any file."""
    kind = dataclasses.replace(
        RUNNABLE["toy"],
        build=lambda: RoomsModel(dim=16, depth=2, num_heads=2),
        trained=None,
        key_prefix="model.",
    )
    monkeypatch.setitem(RUNNABLE, "toy", kind)
    return kind


def test_weights_of_a_file_are_used(tmp_path: Path, tiny_toy: RunnableModel):
    trained = tiny_toy.build().state_dict()
    torch.save({f"model.{name}": value for name, value in trained.items()}, tmp_path / "w.pt")
    model = load_model("toy", tmp_path / "w.pt", CPU)
    assert model.warning is None
    assert model.weights == str(tmp_path / "w.pt")
    assert all(torch.equal(value, trained[name]) for name, value in model.module.state_dict().items())


def test_weights_of_half_precision_are_used(tmp_path: Path, tiny_toy: RunnableModel):
    trained = {name: value.half() for name, value in tiny_toy.build().state_dict().items()}
    torch.save(trained, tmp_path / "w.pt")
    loaded = load_model("toy", tmp_path / "w.pt", CPU).module.state_dict()
    assert all(torch.equal(value, trained[name].float()) for name, value in loaded.items())


def test_random_weights_are_always_the_same(tiny_toy: RunnableModel):
    first = build(tiny_toy, CPU).state_dict()
    state = torch.manual_seed(1).get_state()
    second = load_model("toy", None, CPU).module.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: {}, "missing: aggregator.camera_token, aggregator.register_token, .* and .* more"),
        (
            lambda state: state | {"aggregator.camera_token": torch.zeros(1)},
            r"shape: aggregator.camera_token \[1\] \(must be \[1, 2, 1, 16\]\)",
        ),
        (lambda state: [1, 2], "must hold a mapping"),
        (lambda state: {"model": state, "epoch": 3}, "'model' stands for OrderedDict"),
        (lambda state: dict(enumerate(state.values())), "0 stands for Tensor"),
        (
            lambda state: {name: value.to(torch.int8) for name, value in state.items()},
            r"number: .* \(torch\.int8\)",
        ),
        (lambda state: {name: value.to(torch.complex64) for name, value in state.items()}, r"\(torch\.complex64\)"),
        (lambda state: state | {"more.weight": torch.zeros(1)}, "not known: more.weight"),
    ],
    ids=["missing", "shape", "no mapping", "nested", "numbered", "int8", "complex", "larger"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, tiny_toy: RunnableModel, spoil, message: str):
    torch.save(spoil(tiny_toy.build().state_dict()), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        load_model("toy", tmp_path / "w.pt", CPU)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "nothing.pt"])
def test_weights_that_cannot_be_read_are_refused(tmp_path: Path, tiny_toy: RunnableModel, name: str):
    for suffix in ("pt", "safetensors"):
        (tmp_path / f"w.{suffix}").write_text("not weights")
    with pytest.raises(ValueError, match=r"cannot be read as weights|but .* is none"):
        load_model("toy", tmp_path / name, CPU)


def test_what_there_is_not_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"must be one of .*vggt.*, got vgg16"):
        load_model("vgg16", None, CPU)
    with pytest.raises(FileNotFoundError, match=r"no trained weights at .*w\.npz"):
        load_model("toy", tmp_path / "w.npz", CPU)


def test_the_toy_reads_the_file_of_a_training(tmp_path: Path):
    trained = RoomsModel.create(3, dim=16, depth=2, num_heads=2)
    write_weights(tmp_path / "w.npz", trained.state_dict(), trained.sizes)
    loaded = load_model("toy", tmp_path / "w.npz", CPU)
    assert (loaded.weights, loaded.warning) == (str(tmp_path / "w.npz"), None)
    assert loaded.module.sizes == trained.sizes


@pytest.mark.parametrize("name", [name for name, kind in RUNNABLE.items() if kind.requirement])
def test_missing_package_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch, name: str):
    for package in ("depth_anything_3", "vggt", "pi3"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"the model {name} cannot be imported .* Install it: pip install"):
        load_model(name, None, CPU)


@pytest.mark.parametrize("is_fastvggt", [False, True], ids=["upstream", "FastVGGT"])
def test_vggt_has_its_point_head_in_either_package(monkeypatch: pytest.MonkeyPatch, is_fastvggt: bool):
    class Upstream(nn.Module):
        def __init__(self, enable_point: bool = True):
            super().__init__()
            self.point_head = nn.Linear(1, 1) if enable_point else None

    class FastVGGT(Upstream):
        def __init__(self, enable_point: bool = False, merging: int = 0):
            super().__init__(enable_point)

    package = ModuleType("vggt.models.vggt")
    package.VGGT = FastVGGT if is_fastvggt else Upstream
    for name in ("vggt", "vggt.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert load_model("vggt", None, CPU).module.point_head is not None


@pytest.mark.parametrize("weights", ["random", None])
def test_random_weights_of_a_model_without_others(tiny_toy: RunnableModel, weights: str | None):
    model = load_model("toy", weights, CPU)
    assert (model.weights, model.warning) == ("random, seed 0", RANDOM_WEIGHTS)


def test_random_weights_of_a_model_that_has_trained_ones(monkeypatch: pytest.MonkeyPatch):
    kind = dataclasses.replace(RUNNABLE["toy"], build=lambda: RoomsModel(dim=16, depth=2, num_heads=2))
    monkeypatch.setitem(RUNNABLE, "toy", kind)
    assert load_model("toy", "random", CPU).warning == RANDOM_WEIGHTS


def test_weights_of_the_hub_are_fetched(tmp_path: Path, tiny_toy: RunnableModel, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    torch.save(tiny_toy.build().state_dict(), tmp_path / "w.pt")
    asked = []

    def download(name: str, file: str, **how: bool) -> str:
        asked.append((name, file, *how.values()))
        return str(tmp_path / "w.pt")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model = load_model("toy", "owner/model", CPU)
    assert asked == [("owner/model", "model.safetensors", True)]
    assert (model.weights, model.warning) == ("owner/model", None)


def test_weights_that_the_hub_does_not_give(tiny_toy: RunnableModel, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    errors = pytest.importorskip("huggingface_hub.errors", reason="huggingface_hub is not installed")

    def missing(*names: str, **how: bool) -> None:
        raise errors.LocalEntryNotFoundError("not in the cache")

    def unreachable(url: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "hf_hub_download", missing)
    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors of owner/model is neither .*no route to host"):
        load_model("toy", "owner/model", CPU)
