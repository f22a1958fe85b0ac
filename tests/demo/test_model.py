"""The model for rooms has VGGT's shape: its names, tokens, two kinds of attention, reference frame and outputs."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from tiers import full
from torch.overrides import TorchFunctionMode

from svggt_kernels import patch
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.blocks import Attention, Rotary2D
from svggt_kernels.demo.model.heads import Cameras, DepthHead, cameras
from svggt_kernels.demo.model.poses import decode_poses, encode_poses
from svggt_kernels.inference import blocks as fused

SIZES = {"dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def model():
    return RoomsModel.create(seed=0, **SIZES)


@pytest.fixture
def images():
    return torch.rand(4, 3, 28, 42, generator=torch.Generator().manual_seed(0))


class RecordedAttention(TorchFunctionMode):
    """Notes the query shape and dtypes of every attention call."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_default_size_has_heads_of_64_and_fits_into_12_megabytes():
    model = RoomsModel()
    aggregator = model.aggregator
    assert len(aggregator.frame_blocks) == len(aggregator.global_blocks) == 6
    assert aggregator.global_blocks[0].attn.head_dim == 64
    assert (aggregator.patch_start_idx, aggregator.patch_size, model.reference_frame) == (5, 14, 0)
    assert model.tokens_per_frame(112, 154) == 93
    assert 11e6 < sum(parameter.numel() for parameter in model.parameters()) < 11.8e6


@torch.no_grad()
def test_outputs_have_the_promised_shapes_and_ranges(model, images):
    out = model(images)
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "pose_enc": (1, 4, 9),
        "depth": (1, 4, 28, 42, 1),
        "depth_conf": (1, 4, 28, 42),
    }
    assert all(value.isfinite().all() for value in out.values())
    assert (out["depth"] > 0).all() and (out["depth_conf"] > 1).all()
    torch.testing.assert_close(out["pose_enc"][..., 3:7].norm(dim=-1), torch.ones(1, 4))
    assert (out["pose_enc"][..., 7:] > 0).all() and (out["pose_enc"][..., 7:] < torch.pi).all()


@torch.no_grad()
def test_scenes_of_a_batch_do_not_mix(model, images):
    batch = torch.stack([images, images.flip(0)])
    together = model(batch)
    for scene in range(2):
        alone = model(batch[scene])
        for name, value in together.items():
            torch.testing.assert_close(value[scene], alone[name][0])


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_attention_alternates_between_frames_and_all_tokens(model, images, frames):
    with RecordedAttention() as recorded:
        layers, start = model.aggregator(images[None, :frames])
    per_frame = model.tokens_per_frame(28, 42)
    assert per_frame == 5 + 2 * 3 and start == 5
    assert [layer.shape for layer in layers] == [(1, frames, per_frame, 2 * 48)] * 2
    assert recorded.shapes == [(frames, 3, per_frame, 16), (1, 3, frames * per_frame, 16)] * 2


@torch.no_grad()
def test_a_layer_is_the_input_of_a_global_block_beside_its_output(model, images):
    entered, left = [], []
    block = model.aggregator.global_blocks[1]
    block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    block.register_forward_hook(lambda module, args, out: left.append(out))
    layers, _ = model.aggregator(images[None])
    assert torch.equal(layers[1].flatten(1, 2), torch.cat([entered[0], left[0]], -1))


@torch.no_grad()
def test_cameras_are_refined_across_frames(model, images):
    layers, _ = model.aggregator(images[None])
    first, second = model.camera_head(layers, num_iterations=2)
    assert torch.equal(model.camera_head(layers, num_iterations=1)[0], first)
    assert (first - second).abs().max() > 1e-4
    changed = [layer.clone() for layer in layers]
    changed[-1][:, 2, 0] += torch.randn(96, generator=torch.Generator().manual_seed(0))
    difference = (model.camera_head(changed)[-1] - model.camera_head(layers)[-1]).abs().amax((0, 2))
    assert (difference > 1e-4).all()


@torch.no_grad()
def test_depth_of_a_frame_does_not_depend_on_the_chunk(model, images):
    layers, start = model.aggregator(images[None])
    whole = model.depth_head(layers, images[None], start, frames_chunk_size=None)
    for some in (1, 3):
        torch.testing.assert_close(model.depth_head(layers, images[None], start, frames_chunk_size=some), whole)


@torch.no_grad()
def test_patch_knows_it(images):
    model = RoomsModel.create(dim=128, depth=2, num_heads=2)
    dense = model(images)
    with patch(model, covisibility="all") as handle:
        patched = model(images)
    report = handle.report()
    assert report.model == "toy" and report.calls_last_forward == 2
    for name, value in dense.items():
        torch.testing.assert_close(patched[name], value, atol=1e-4, rtol=1e-4)


def test_the_aggregator_is_what_a_fused_forward_for_vggt_reads(model):
    """Names, shapes and order by which code that runs VGGT over its parameters knows an aggregator."""
    aggregator = model.aggregator
    assert list(inspect.signature(type(aggregator).forward).parameters) == ["self", "images"]
    assert aggregator.camera_token.shape == (1, 2, 1, 48) and aggregator.register_token.shape == (1, 2, 4, 48)
    assert aggregator.aa_order == ["frame", "global"] and aggregator.aa_block_size == 1
    assert aggregator._resnet_mean.shape == aggregator._resnet_std.shape == (1, 1, 3, 1, 1)
    assert aggregator.rope.base_frequency == 100 and isinstance(aggregator.patch_embed, torch.nn.Module)
    assert [fused.obstacle(block) for block in (*aggregator.frame_blocks, *aggregator.global_blocks)] == [None] * 4
    layers = "aggregated_tokens_list"
    for head, names in (
        (model.camera_head, [layers, "num_iterations"]),
        (model.depth_head, [layers, "images", "patch_start_idx", "frames_chunk_size"]),
    ):
        assert list(inspect.signature(type(head).forward).parameters)[1:] == names


@torch.no_grad()
def test_all_frames_but_the_reference_can_be_reordered(model, images):
    out = model(images)
    order = [0, 3, 1, 2]
    for name, value in model(images[order]).items():
        torch.testing.assert_close(value, out[name][:, order])
    order = [1, 0, 2, 3]
    assert (model(images[order])["pose_enc"] - out["pose_enc"][:, order]).abs().max() > 1e-3


@torch.no_grad()
def test_frames_influence_one_another(model, images):
    changed = images.clone()
    changed[2] = 1 - changed[2]
    difference = (model(changed)["depth"] - model(images)["depth"]).abs().amax((0, 2, 3, 4))
    assert (difference > 1e-3).all()


@torch.no_grad()
def test_special_tokens_come_first_at_position_zero(model, images):
    entered = []
    model.aggregator.frame_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append((args[0], kwargs["pos"])), with_kwargs=True
    )
    model(images)
    ((tokens, positions),) = entered
    assert tokens.shape == (4, 11, 48) and positions.shape == (4, 11, 2)
    assert (positions[:, :5] == 0).all()
    assert positions[0, 5:].tolist() == [[row, column] for row in (1, 2) for column in (1, 2, 3)]
    assert not torch.equal(tokens[0, :5], tokens[1, :5])
    assert torch.equal(tokens[1, :5], tokens[3, :5])


def test_rotary_embedding_sees_only_position_differences():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 6, 16, dtype=torch.float64, generator=generator)
    at_q, at_k = torch.randint(0, 20, (2, 1, 6, 2), generator=generator)
    rope, shift = Rotary2D(), torch.tensor([3, 11])
    scores = rope(q, at_q) @ rope(k, at_k).mT
    torch.testing.assert_close(rope(q, at_q + shift) @ rope(k, at_k + shift).mT, scores, atol=1e-5, rtol=0)
    assert (rope(q, at_q + shift) @ rope(k, at_k).mT - scores).abs().max() > 0.1
    assert torch.equal(rope(q, torch.zeros_like(at_q)), q)


def test_rotary_embedding_turns_the_first_half_by_row_and_the_second_by_column():
    x = torch.ones(1, 1, 1, 16)
    rope = Rotary2D()
    by_row, by_column = rope(x, torch.tensor([[[2, 0]]])), rope(x, torch.tensor([[[0, 2]]]))
    assert torch.equal(by_row[..., 8:], x[..., 8:]) and torch.equal(by_column[..., :8], x[..., :8])
    assert torch.equal(by_row[..., :8], by_column[..., 8:])
    angle = torch.tensor(2.0)
    torch.testing.assert_close(
        by_row[0, 0, 0, [0, 4]], torch.stack([angle.cos() - angle.sin(), angle.sin() + angle.cos()])
    )


@torch.no_grad()
def test_a_patch_token_paints_its_own_square():
    head = DepthHead(4, 1, patch_size=14)
    generator = torch.Generator().manual_seed(0)
    tokens, images = torch.randn(1, 1, 6, 8, generator=generator), torch.rand(1, 1, 3, 28, 42, generator=generator)
    before, _ = head([tokens], images, 0)
    tokens[0, 0, 4] += torch.linspace(-1, 1, 8)  # row 1, column 1 of 2 x 3 patches
    after, _ = head([tokens], images, 0)
    changed = (after != before)[0, 0, :, :, 0]
    assert changed[14:, 14:28].float().mean() > 0.9
    changed[10:, 10:32] = False  # two convolutions at half resolution reach four pixels further
    assert not changed.any()


def test_poses_survive_their_encoding():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(500, 11, dtype=torch.float64, generator=generator)
    numbers[:4, 3:9] = torch.tensor(
        [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, -1, 0], [-1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0]]
    )
    made = cameras(numbers)
    poses, intrinsics = decode_poses(encode_poses(*made), height=30, width=40)
    torch.testing.assert_close(poses[:, :3, :3], made.rotation)
    torch.testing.assert_close(poses[:, :3, 3], made.centre)
    focal = torch.stack([20 / made.half_view[:, 1], 15 / made.half_view[:, 0]], -1)
    torch.testing.assert_close(intrinsics, torch.cat([focal, torch.tensor([[19.5, 14.5]]).expand(500, -1)], -1))


def test_an_encoding_is_of_the_motion_from_the_world_to_the_camera():
    """A quarter turn about y: the camera looks along x and stands at (2, 0, 0), so the origin lies 2 behind it."""
    rotation = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    encoding = encode_poses(*Cameras(rotation, torch.tensor([2.0, 0.0, 0.0]), torch.tensor([1.0, 1.0])))
    root = 0.5**0.5
    torch.testing.assert_close(encoding, torch.tensor([0, 0, -2, 0, -root, 0, root, torch.pi / 2, torch.pi / 2]))


def test_create_is_deterministic_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, again, other = (RoomsModel.create(seed, **SIZES).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["aggregator.camera_token"], other["aggregator.camera_token"])


def test_gradients_reach_every_parameter_and_the_images(model, images):
    model.train()
    images.requires_grad_()
    out = model(images)
    sum(value.square().sum() for value in out.values()).backward()
    for name, value in [*model.named_parameters(), ("images", images)]:
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.any(), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_weight_dtypes_agree_with_float32(model, images, dtype):
    expected = model(images)
    for name, value in copy.deepcopy(model).to(dtype)(images).items():
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        error = (value - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps), name


@torch.no_grad()
def test_autocast_agrees_with_float32(model, images):
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    for name, value in out.items():
        assert value.dtype == torch.float32
        assert (value - expected[name]).abs().max() / expected[name].abs().max() < 16 * 2**-8, name


@full
@torch.no_grad()
def test_attention_compiles_without_graph_breaks():
    torch.manual_seed(0)
    attention = Attention(48, 3)
    x, pos = torch.randn(1, 22, 48), torch.randint(0, 5, (1, 22, 2))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, pos), attention(x, pos))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 28, 43), ValueError, "28 x 43; resize or crop, for example to 28 x 42"),
        (torch.zeros(2, 3, 5, 28), ValueError, "for example to 14 x 28"),
        (torch.zeros(3, 28, 28), ValueError, r"got \[3, 28, 28\]"),
        (torch.zeros(2, 28, 28, 3), ValueError, r"\[S, 3, H, W\]"),
        (torch.zeros(0, 3, 28, 28), ValueError, "not empty"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), TypeError, "divide bytes by 255"),
    ],
    ids=["width", "height", "no-frames-axis", "channels-last", "no-frames", "bytes"],
)
def test_bad_images_are_refused(model, images, error, message):
    with pytest.raises(error, match=message):
        model(images)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 99}, "multiple of 4"),
        ({"dim": 30}, "multiple of 4"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"patch_size": 7}, "patch_size must be even"),
    ],
    ids=["heads", "head-size", "depth", "patch"],
)
def test_bad_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        RoomsModel(**sizes)
