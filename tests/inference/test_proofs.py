"""What was verified of a model is known as long as it lives, to whatever runs it fused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from doubles.fused import IMAGES, model
from doubles.vggt import DIM
from tiers import every
from torch import nn

import svggt_kernels
from svggt_kernels.inference import proofs, verification
from svggt_kernels.inference.settings import are_weak, settings_of

CORE = [0, 3, 4]
pytestmark = pytest.mark.filterwarnings("ignore:.* may share nothing with the core:UserWarning")  # random weights


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that are verified, in their order."""
    names: list[str] = []

    def noted(module: nn.Module, *given: object) -> verification.Verification:
        names.append(type(module).__name__)
        return verification.verify(module, *given)

    monkeypatch.setattr(proofs, "verify", noted)
    return names


def run(network: nn.Module, **options: object) -> None:
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True, **options) as handle:
        network(IMAGES)
    assert handle.report().inference.reason is None


def written(network: nn.Module) -> None:
    network.load_state_dict({name: 1.01 * tensor for name, tensor in network.state_dict().items()})


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weights that were loaded": written,
    "weights in the place of others": lambda network: network.load_state_dict(
        {name: tensor.clone() for name, tensor in network.state_dict().items()}, assign=True
    ),
    "weights that lie elsewhere": lambda network: setattr(
        network.aggregator.camera_token, "data", network.aggregator.camera_token.data.clone()
    ),
    "a setting": lambda network: setattr(network.aggregator.frame_blocks[0].norm1, "eps", 1e-3),
    "a submodule": lambda network: setattr(network.aggregator.frame_blocks[0], "norm1", nn.LayerNorm(DIM).eval()),
}


def test_a_second_patch_and_scenes_verify_nothing(verified: list[str]):
    network = model()
    run(network)
    assert sorted(verified) == ["Aggregator", "CameraHead"]
    run(network)
    scene = svggt_kernels.open_scene(network, IMAGES[0], core=CORE, fused=True)
    scene.extended(IMAGES[0, 1:2])
    svggt_kernels.open_scene(network, IMAGES[0], core=CORE, fused=True)
    assert len(verified) == 2


@pytest.mark.parametrize("count", every(2, [1, 2]))
def test_few_frames_of_a_scene_are_verified_with_more(verified: list[str], count: int):
    network = model()
    scene = svggt_kernels.open_scene(network, IMAGES[0], core=CORE, fused=True)
    before = len(verified)
    scene.add(IMAGES[0, :count])
    assert len(verified) == before
    assert scene.session.inference.reason is None
    run(network, precision="bf16")
    assert len(verified) == before
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True):
        network(IMAGES[:, :count])
    assert len(verified) > before


@pytest.mark.parametrize("kind", every(3, CHANGES))
def test_a_changed_model_is_verified_again(kind: str, verified: list[str]):
    network = model()
    run(network)
    verified.clear()
    with torch.no_grad():
        CHANGES[kind](network)
    run(network)
    assert "Aggregator" in verified
    verified.clear()
    run(network)
    assert not verified


def test_weights_written_within_a_patch_are_verified_by_the_next(verified: list[str]):
    network = model()
    run(network)
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True):
        network(IMAGES)
        written(network)
        network(IMAGES)
        assert verified.count("Aggregator") == 1
    run(network)
    assert verified.count("Aggregator") == 2


def test_what_a_comparison_depends_on_is_told_apart(verified: list[str]):
    network = model()
    run(network)
    run(network, outputs="all")
    assert verified.count("Aggregator") == verified.count("CameraHead") == 2
    with torch.autocast("cpu", torch.bfloat16):
        run(network)
    assert verified.count("Aggregator") == 3


def test_what_failed_is_tried_again(verified: list[str], monkeypatch: pytest.MonkeyPatch):
    network = model()
    noted = proofs.verify
    failed = verification.Verification("the model computes something else", 3.0, 0.0, 0.0)
    monkeypatch.setattr(proofs, "verify", lambda *given: failed)
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True) as handle:
        network(IMAGES)
    assert handle.report().inference.reason == failed.reason
    monkeypatch.setattr(proofs, "verify", noted)
    run(network)
    assert verified


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"]
)
def test_a_copy_knows_nothing(duplicate: Callable[[nn.Module], nn.Module], verified: list[str]):
    network = model()
    run(network)
    run(duplicate(network))
    assert verified.count("Aggregator") == 2


def test_weights_can_be_swapped(verified: list[str]):
    """As PyTorch does where modules are converted or loaded, if it is told so or tensors are of a subclass."""
    network = model()
    token = network.camera_head.listed = network.aggregator.camera_token
    for _ in range(2):
        run(network)
        torch.utils.swap_tensors(token, nn.Parameter(1.5 * token.detach()))
    assert verified.count("Aggregator") == 2


def test_weights_seen_in_another_order_are_others(verified: list[str]):
    network = model()
    run(network)
    product = network.aggregator.frame_blocks[0].attn.proj
    product.weight = nn.Parameter(product.weight.detach().T)
    run(network)
    assert verified.count("Aggregator") == 2


def test_weights_whose_writers_nobody_counts_are_verified_by_each_patch(verified: list[str]):
    with torch.inference_mode():
        network = model()
    run(network)
    run(network)
    assert verified.count("Aggregator") == 2


def test_weights_that_lie_nowhere_are_verified_by_each_patch(verified: list[str]):
    network = model()
    network.camera_head.register_buffer("sparse", torch.eye(2).to_sparse())
    run(network)
    run(network)
    assert verified.count("CameraHead") == 2 and verified.count("Aggregator") == 1


class Slotted:
    """What can be referred to by name alone."""

    __slots__ = ("owner",)


def held_by_a_closure(network: nn.Module) -> None:
    class Other(type(network.camera_head)):
        def forward(self, aggregated_tokens_list: list, num_iterations: int = 4) -> object:
            assert network is not None
            return super().forward(aggregated_tokens_list, num_iterations)

    network.camera_head.__class__ = Other


def held_by_what_has_no_weak_reference(network: nn.Module) -> None:
    network.camera_head.owner = Slotted()
    network.camera_head.owner.owner = network


HOLD: dict[str, Callable[[nn.Module], object]] = {
    "as it is": lambda network: None,
    "in a tuple of a head": lambda network: setattr(network.camera_head, "owner", (network,)),
    "by a method": lambda network: setattr(network.camera_head, "owner", network.forward),
    "by the class of a head": held_by_a_closure,
    "by an object without weak references": held_by_what_has_no_weak_reference,
}


@pytest.mark.parametrize("kind", every(3, HOLD))
def test_a_model_is_not_kept(kind: str, verified: list[str]):
    network = model()
    HOLD[kind](network)
    run(network)
    assert "CameraHead" in verified or "Other" in verified
    known, gone = len(proofs._shared), weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None
    assert len(proofs._shared) < known


def test_wrappers_of_functions_stand_for_these():
    class Wrapping(nn.Module):
        size: int | None = None

        @property
        def one(self) -> int:
            return 1

        @staticmethod
        def two() -> int:
            return 2

        @classmethod
        def three(cls) -> int:
            return 3

    before = settings_of(Wrapping())
    assert are_weak(before)
    Wrapping.one = property(Wrapping.one.fget)
    assert settings_of(Wrapping()) == before
    Wrapping.one = property(lambda self: 4)
    assert settings_of(Wrapping()) != before


def test_an_object_that_is_gone_equals_none_in_its_place():
    module = nn.Module()
    module.part = Slotted
    first = settings_of(module)
    module.part = type("Part", (), {})
    second = settings_of(module)
    assert first != second == settings_of(module)
    module.part = None
    gc.collect()
    module.part = type("Part", (), {})
    third = settings_of(module)
    module.part = None
    gc.collect()
    assert second != third  # though both are gone
