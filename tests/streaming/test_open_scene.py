"""A scene's frames get what one forward of all frames with a closed core gives them, however they come."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from closed_core import joint
from doubles import FAMILY, MultiViewAlternatingAttentionTransformer, StreamVGGT, images
from doubles import vggt as double_of_vggt
from tiers import every
from torch import Tensor, nn

import svggt_kernels
from svggt_kernels import CovisibilityGraph, open_saved_scene, open_scene
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.inference import proofs, verification
from svggt_kernels.sources.thumbnails import ThumbnailSimilarity

pytestmark = pytest.mark.filterwarnings("ignore:.* may share nothing with the core:UserWarning")  # random weights

CORE = [1, 6, 3]
KNOWN = {name: double for name, double in FAMILY.items() if double.record is not None}


def as_one_sample(frames: Tensor) -> Tensor:
    return frames[None]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double().eval()


def toy() -> nn.Module:
    """The toy, whose camera head looks across frames; gains so that attention in it matters."""
    model = RoomsModel.create(0, dim=64, depth=2, num_heads=1).double()
    with torch.no_grad():
        for block in model.camera_head.trunk:
            block.attn.q_norm.weight.fill_(3.0)
        model.camera_head.camera.weight.mul_(50)
    return model


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) - {"apart"} == set(expected) - {"apart"}
    for name in set(expected) - {"apart"}:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-9)


def rest(frames: Tensor) -> list[int]:
    return [frame for frame in range(len(frames)) if frame not in CORE]


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, object], dict[str, object]]] = {
    name: (
        double.create,
        images(10)[0],
        {"trailing": double.trailing} | ({"ref_view_strategy": "first"} if name == "da3" else {}),
        {"feed": as_one_sample},
    )
    for name, double in KNOWN.items()
}
CASES["toy"] = (toy, torch.rand(10, 3, 28, 42, generator=torch.Generator().manual_seed(0)).double(), {}, {})
CASES["toy-fused"] = (*CASES["toy"][:3], {"fused": True})
CASES["blocks-fused"] = (lambda: seeded(double_of_vggt.VGGT), CASES["toy"][1], {}, {"fused": True})


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, dict[str, Tensor], dict[str, object]]:
    """A model, frames, what a joint forward gives them, and options of `open_scene`."""
    build, frames, of_joint, options = CASES[request.param]
    model = build()
    expected = joint(model, frames, CORE, **of_joint)
    if request.param == "toy-fused":  # whose own forward has the frequencies of its rotation in float32
        one_chunk = open_scene(model, frames, core=CORE, chunk=len(frames), **options).predict()
        for name, tensor in expected.items():
            torch.testing.assert_close(one_chunk[name], tensor, rtol=1e-6, atol=1e-6)
        expected = one_chunk
    return model, frames, expected, options


@pytest.mark.parametrize("chunk", every(2, [3, 1, 10]))
def test_chunks_are_the_joint_forward(case, chunk: int):
    model, frames, expected, options = case
    scene = open_scene(model, frames, core=CORE, chunk=chunk, **options)
    same(scene.predict(), expected)
    same(scene.core_outputs, {name: tensor[CORE] for name, tensor in expected.items()})


def test_frames_added_later(case):
    model, frames, expected, options = case
    scene = open_scene(model, frames[CORE], core=[0, 1, 2], chunk=2, **options)
    for part in (rest(frames)[4:], rest(frames)[:4]):
        same(scene.add(frames[part]), {name: tensor[part] for name, tensor in expected.items()})


@pytest.mark.parametrize("keys", [False, True])
def test_saved_and_opened_again(case, keys: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, frames, expected, options = case
    scene = open_scene(model, frames, core=CORE, chunk=4, **options)
    scene.save(tmp_path / "kitchen.scene", keys=keys)  # of any name
    if keys:
        monkeypatch.setattr("svggt_kernels.patching.chunks.session.Session.run_core", None)
    again = open_saved_scene(copy.deepcopy(model), tmp_path / "kitchen.scene", **options)
    assert again.chunk == 4
    assert again.core_gib == scene.core_gib
    same(again.add(frames[rest(frames)]), {name: tensor[rest(frames)] for name, tensor in expected.items()})
    same(again.predict(), {name: tensor[CORE] for name, tensor in expected.items()})


def test_the_model_is_as_it_was(case):
    model, frames, _, options = case
    with torch.no_grad():
        before = model(frames[None])
        hooks = sum(len(module._forward_pre_hooks) + ("forward" in module.__dict__) for module in model.modules())
        open_scene(model, frames, core=CORE, **options).predict()
        after = model(frames[None])
    assert hooks == 0
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_causal_models_see_the_core_before_their_frames():
    model, frames = seeded(StreamVGGT), images(9)[0]
    scene = open_scene(model, frames, core=[0, 1, 2], chunk=4)
    same(scene.predict(), joint(model, frames, [0, 1, 2], causal=True))


class Scaling:
    """The forward of a double's attention, with queries that grow as UniCeption's with its options."""

    def __init__(self, attn: nn.Module, scalable: bool, entropy: bool) -> None:
        attn.use_scalable_softmax, attn.use_entropy_scaling = scalable, entropy
        attn.entropy_scaling_growth_factor, attn.base_token_count_for_entropy_scaling = 1.4, 444
        self.attn = attn

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.heads(x)
        tokens = torch.log(torch.tensor(x.shape[1]))
        if self.attn.use_scalable_softmax:
            q = q * tokens
        if self.attn.use_entropy_scaling:
            q = q * torch.sqrt(1.4 * tokens / torch.log(torch.tensor(444)))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.attn.proj(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("scalable", "entropy"), [(True, False), (False, True), (True, True)])
def test_scores_that_grow_with_the_number_of_tokens_are_fixed_by_the_core(scalable: bool, entropy: bool):
    model, frames = FAMILY["mapanything"].create(), images(10)[0]
    for block in model.info_sharing.self_attention_blocks[::2]:
        block.attn.forward = Scaling(block.attn, scalable, entropy)
    outputs = [open_scene(model, frames, core=CORE, chunk=chunk).predict() for chunk in (1, 10)]
    same(outputs[0], outputs[1])


def test_the_fused_forward_is_given_no_reference_frame_again():
    """Where it cannot run after all, the model's own forward is, as that takes its first frame for the reference."""
    model, frames = toy(), CASES["toy"][1]
    scene = open_scene(model, frames, core=CORE, chunk=4, fused=True)
    expected = joint(model, frames, CORE)["depth"]
    hook = model.aggregator.frame_blocks[0].mlp.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(scene.predict()["depth"], expected, rtol=1e-6, atol=1e-6)
    assert scene.session.inference is not None
    assert "there is a hook" in str(scene.session.inference.reason)
    hook.remove()
    torch.testing.assert_close(scene.predict()["depth"], expected, rtol=1e-6, atol=1e-6)
    assert scene.session.inference.reason is None


class WithScale(MultiViewAlternatingAttentionTransformer):
    """Multiplies what it gives by what its trailing token has become, as MapAnything does to be metric."""

    def forward(self, model_input: SimpleNamespace) -> Tensor:
        tokens: list[Tensor] = []
        last = self.self_attention_blocks[-2].register_forward_hook(lambda _, __, output: tokens.append(output[:, -1]))
        output = super().forward(model_input)
        last.remove()
        return output * tokens[0].mean(-1)[:, None, None, None]


def test_a_trailing_token_is_that_of_the_core():
    model, frames = FAMILY["mapanything"].create(), images(10)[0]
    scaled = WithScale().double()
    scaled.load_state_dict(model.info_sharing.state_dict())
    model.info_sharing = scaled.eval()
    expected = joint(model, frames, CORE, trailing=1)
    for chunk in (1, 4):
        same(open_scene(model, frames, core=CORE, chunk=chunk).predict(), expected)


# What is refused


class Leaking(nn.Module):
    """Divides by a mean over all frames, as who scales depth by a quantile of all does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = FAMILY["vggt"].create()

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return output / output.abs().mean(dim=1, keepdim=True)


def test_what_looks_across_frames_unseen_is_refused():
    with pytest.raises(ValueError, match="looks across frames that does not follow the core"):
        open_scene(Leaking().eval(), images(8)[0], core=CORE)


class Forgotten(nn.Module):
    """A camera head whose attention no record knows."""

    def __init__(self) -> None:
        super().__init__()
        self.aggregator = FAMILY["vggt"].create().aggregator
        self.head = FAMILY["vggt"].create().aggregator.global_blocks[0]

    def forward(self, images: Tensor) -> Tensor:
        layers, _ = self.aggregator(images)
        return self.head(layers[-1][:, :, 0])


def test_attention_that_no_record_knows_is_refused():
    with pytest.raises(ValueError, match="looks across frames that does not follow the core"):
        open_scene(Forgotten().eval(), images(8)[0], core=CORE)


def test_another_reference_frame_is_refused():
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = FAMILY["da3"].create()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    with pytest.raises(ValueError, match=r"another reference frame.*'ref_view_strategy': 'first'"):
        open_scene(Middle().eval(), images(8)[0], core=CORE)


def test_models_that_cannot_be_opened_say_why():
    model, frames = FAMILY["vggt"].create(), images(8)[0]
    with pytest.raises(ValueError, match="no record knows"):
        open_scene(FAMILY["stranger"].create(), frames, core=CORE)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        open_scene(copy.deepcopy(model).train(), frames, core=CORE)
    with (
        svggt_kernels.patch(model, covisibility="all"),
        pytest.raises(ValueError, match="is patched already; call"),
    ):
        open_scene(model, frames, core=CORE)
    with pytest.raises(ValueError, match="VGGT's shape"):
        open_scene(model, frames, core=CORE, memory_budget=8)
    with pytest.raises(ValueError, match="keys of frames that all see"):
        open_scene(model, frames, core=svggt_kernels.Core(by="thumbnails", nearest=2))
    for core in ([], [3], [0, 0], [8]):
        with pytest.raises(ValueError, match="core"):
            open_scene(model, frames, core=core)
    scene = open_scene(model, frames, core=CORE)
    with pytest.raises(ValueError, match="8 x 12 pixels as those of the core, got 8 x 16"):
        scene.add(torch.rand(2, 3, 8, 16))
    with pytest.raises(ValueError, match="8 x 12 pixels as those of the core, got 8 x 16"):
        scene.extended(torch.rand(2, 3, 8, 16))
    with pytest.raises(ValueError, match="at least one image"):
        scene.add([])


def test_a_saved_scene_of_another_model_is_refused(tmp_path: Path):
    model, frames = FAMILY["vggt"].create(), images(8)[0]
    open_scene(model, frames, core=CORE).save(tmp_path / "scene.pt")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.aggregator.global_blocks[1].mlp[0].weight[3, 4] += 1e-6
    for wrong in (other, copy.deepcopy(model).float(), FAMILY["pi3"].create()):
        with pytest.raises(ValueError, match="is a scene of another model"):
            open_saved_scene(wrong, tmp_path / "scene.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "0.jpg").write_bytes(b"a photo")
    for wrong in ("other.pt", "0.jpg"):
        with pytest.raises(ValueError, match=r"holds no scene: it must be a file that OpenScene\.save wrote"):
            open_saved_scene(model, tmp_path / wrong)
    with pytest.raises(FileNotFoundError):
        open_saved_scene(model, tmp_path / "none.pt")


def test_frames_that_overshoot_are_saved_as_they_are(tmp_path: Path):
    model, frames = toy().float(), (255 * CASES["toy"][1].float()).round() / 255
    frames[CORE[0], 0, 0, :2] = torch.tensor([-3.0, 258.0]) / 255
    scene = open_scene(model, frames, core=CORE)
    scene.save(tmp_path / "scene.pt")
    assert torch.equal(open_saved_scene(model, tmp_path / "scene.pt").core_frames, scene.core_frames)


# Dtypes, and a larger core


def test_the_dtype_is_that_of_the_time_when_the_scene_was_opened():
    model, frames = toy().float(), CASES["toy"][1].float()
    with torch.autocast("cpu", torch.bfloat16):
        scene = open_scene(model, frames, core=CORE, chunk=3)
    assert {kept.keys.dtype for name, kept in scene.session.attention.kept.items() if "global" in name[0]} == {
        torch.bfloat16
    }
    outside = scene.predict()
    with torch.autocast("cpu", torch.float16):
        again = scene.predict()
    same(again, outside)
    exact = open_scene(toy(), frames.double(), core=CORE).predict()
    with torch.autocast("cpu", torch.bfloat16):
        all_at_once = open_scene(model, frames, core=CORE, chunk=10).predict()
    for name in ("pose_enc", "depth"):
        budget = 2 * (all_at_once[name].double() - exact[name]).norm()
        assert (outside[name].double() - exact[name]).norm() <= budget, name


def test_a_larger_core_is_a_new_scene():
    model, frames = toy(), CASES["toy"][1]
    scene = open_scene(model, frames, core=CORE)
    before = scene.predict()
    larger = scene.extended(frames[[8, 2]])
    same(larger.add(frames[[4, 5]]), {k: x[[4, 5]] for k, x in joint(model, frames, [*CORE, 8, 2]).items()})
    same(scene.predict(), before)


def test_kept_memory_is_that_of_the_core():
    model, frames = toy(), CASES["toy"][1]
    scene = open_scene(model, frames, core=CORE, chunk=2)
    tokens, depth, channels, iterations, trunk = 3 * model.tokens_per_frame(28, 42), 2, 64, 4, 2
    expected = 2 * 8 * channels * (depth * tokens + iterations * trunk * 3)
    assert scene.core_gib == expected / 2**30
    scene.predict()
    assert scene.core_gib == expected / 2**30


def test_two_scenes_of_a_model_do_not_run_at_once(case):
    model, frames, _, options = case
    one, other = (open_scene(model, frames, core=CORE, **options) for _ in range(2))
    hook = next(model.children()).register_forward_hook(lambda *_: other.add(frames[:1]) and None)
    try:
        with pytest.raises(ValueError, match=r"a scene of this model is running, give each thread its own copy\.deep"):
            one.add(frames[:1])
    finally:
        hook.remove()


def test_a_scene_that_is_dropped_keeps_nothing_in_memory(case):
    model, frames, _, options = case
    scene = open_scene(model, frames, core=CORE, **options)
    scene.add(frames[:1])
    keys = [weakref.ref(kept.keys) for kept in scene.session.attention.kept.values()]
    gc.disable()  # what refers to itself in a circle would wait for it
    try:
        del scene
        assert {key() for key in keys} == {None}
    finally:
        gc.enable()


def test_opening_verifies_each_module_once(monkeypatch: pytest.MonkeyPatch):
    verified = []

    def watched(module, *rest):
        verified.append(type(module).__name__)
        return verification.verify(module, *rest)

    monkeypatch.setattr(proofs, "verify", watched)
    frames = CASES["toy"][1].float()
    open_scene(toy().float(), frames, core=CORE, fused=True).add(frames[:4])
    assert sorted(verified) == ["Aggregator", "CameraHead"]


def test_a_core_by_a_word_a_similarity_or_a_graph():
    model, frames = toy(), CASES["toy"][1]
    expected = open_scene(model, frames, core=CORE).add(frames[:2])
    for core in (torch.tensor(CORE), CovisibilityGraph.core(10, CORE)):
        same(open_scene(model, frames, core=core).add(frames[:2]), expected)
    graph = CovisibilityGraph.core(10, [6, 3, 1])  # of which the first one is the reference frame all the same
    same(open_scene(model, frames, core=graph).predict(), joint(model, frames, CORE))
    for core in ("thumbnails", ThumbnailSimilarity()):
        assert open_scene(model, frames, core=core).core == tuple(range(10))


@pytest.mark.parametrize(
    ("core", "error", "message"),
    [
        ("sequential", ValueError, "core must be a Core, one of the words 'megaloc', .*, got 'sequential'"),
        (CovisibilityGraph.sequential(10, 2), ValueError, r"closed core .*, got CovisibilityGraph\(frames=10"),
        (CovisibilityGraph.core(10, CORE, nearest=[[0]] * 10), ValueError, "a closed core and itself, and nothing"),
        (CovisibilityGraph.core(9, CORE), ValueError, r"over the 10 frames of the scene, got .*frames=9"),
        ([0, "1"], TypeError, "core must be a Core, .*, got list of int, str"),
        (torch.eye(10) > 0, TypeError, r"got Tensor of torch\.bool, shape \(10, 10\)$"),
        ([True, False], TypeError, "got list of bool"),
        ([-1, 3], ValueError, "counted from 0, got -1"),
        ([3], ValueError, "at least 2 frames in full, got 1; give more, or run the model itself"),
        (1.5, TypeError, "got float"),
        ([], ValueError, "at least 2 frames, got none"),
    ],
)
def test_cores_without_a_meaning(core: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        open_scene(toy(), CASES["toy"][1], core=core)


@pytest.mark.parametrize(("long_side", "error"), [("98", TypeError), (0, ValueError), (13, ValueError)])
def test_photos_of_less_than_a_patch_are_refused(long_side: object, error: type[Exception]):
    with pytest.raises(error, match=r"long_side must be (an integer, got '98'|at least one patch of 14 pixels, got)"):
        open_scene(toy(), "photos/", long_side=long_side)


@pytest.mark.parametrize("frames", [255 * CASES["toy"][1], 2 * CASES["toy"][1] - 1, CASES["toy"][1] / 0])
def test_frames_of_another_range_are_refused(frames: Tensor):
    with pytest.raises(
        ValueError, match=r"frames of the core must be in \[0, 1\], got values from .*; divide 8-bit images by 255"
    ):
        open_scene(toy(), frames, core=CORE)


def test_a_core_with_nan_is_refused():
    frames = CASES["toy"][1].clone()
    frames[CORE[1], 0, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="frames of the core must not hold NaN, but frames of the core 1 do"):
        open_scene(toy(), frames, core=CORE)


def test_a_folder_of_outputs_is_read_by_its_name(tmp_path: Path):
    frames = CASES["toy"][1]
    scene = open_scene(toy(), frames, core=CORE, chunk=4)
    with pytest.raises(TypeError, match=r"write \['depth'\]"):
        scene.write(tmp_path, names="depth")
    paths = scene.write(tmp_path)
    same(svggt_kernels.read_outputs(tmp_path), svggt_kernels.read_outputs(paths))
