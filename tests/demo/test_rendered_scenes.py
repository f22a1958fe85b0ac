"""Rendered flats: exact depth, consistent cameras, one renderer in two languages, families as they are called."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from svggt_kernels.demo.scenes import FAMILIES, HELD_OUT, PLANS, Draws, Scenes, correspond, make_scenes
from svggt_kernels.demo.scenes.boxes import outlines
from svggt_kernels.demo.scenes.flats import draw_flats
from svggt_kernels.demo.scenes.renderer import render_by_pytorch

SIZE = (21, 28)


def scenes(family: str, rooms: int, batch: int = 1, frames: int = 3, size: tuple[int, int] = SIZE) -> Scenes:
    return make_scenes(batch, frames, Draws(rooms), families=family, rooms=rooms, size=size)


def cast(boxes: np.ndarray, eye: np.ndarray, ray: np.ndarray) -> float:
    """The nearest point where a ray meets one of the six faces of a box, face by face, in units of the ray."""
    nearest = math.inf
    for box in boxes.astype(np.float64):
        half, cos, sin = box[3:6], box[6], box[7]
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        origin, direction = turn @ (eye - box[:3]), turn @ ray
        for axis in range(3):
            across = [other for other in range(3) if other != axis]
            for face in (-half[axis], half[axis]):
                t = (face - origin[axis]) / direction[axis]
                point = origin + t * direction
                if 0.01 < t < nearest and half.all() and (abs(point[across]) <= half[across] + 1e-6).all():
                    nearest = t
    return nearest


def ray(made: Scenes, scene: int, frame: int, u: float, v: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a camera stands and where the pixel (u, v) looks; the ray is 1 long along the optical axis."""
    fx, fy, cx, cy = made.intrinsics[scene].double().numpy()
    pose = made.poses[scene, frame].double().numpy()
    return pose[:3, 3], pose[:3, :3] @ np.array([(u - cx) / fx, (v - cy) / fy, 1.0])


@pytest.mark.parametrize(
    ("family", "rooms"),
    [
        *(("walk", 3), ("room", 1), ("photos", 8), ("revisit", 6), ("forward", 4), ("rotation", 2)),
        *(("walk", 16), ("photos", 32), (HELD_OUT, 5), (HELD_OUT, 7)),
    ],
)
def test_depth_is_that_of_an_independent_intersection(family: str, rooms: int):
    made = scenes(family, rooms)
    assert (made.depth > 0.1).all() and (made.images >= 0).all() and (made.images <= 1).all()
    boxes = made.boxes[0].numpy()
    for number in range(12):
        frame, row, column = number % 3, (5 * number + 2) % SIZE[0], (11 * number + 3) % SIZE[1]
        expected = cast(boxes, *ray(made, 0, frame, column, row))
        assert made.depth[0, frame, row, column].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("family", "rooms", "frames"), [("photos", 1, 3), ("forward", 4, 3), ("rotation", 2, 8)])
def test_a_point_seen_in_two_frames_projects_back_to_its_pixel(family: str, rooms: int, frames: int):
    """From a pixel to the world by depth, into another frame, along that frame's ray to a surface, and back again."""
    made = scenes(family, rooms, frames=frames, size=(28, 42))
    boxes, step = made.boxes[0].numpy(), 7
    found = correspond(made.depth, made.poses, made.intrinsics, step)
    columns = len(range(step // 2, 42, step))
    fx, fy, cx, cy = made.intrinsics[0].double().numpy()
    distances = []
    for frame, pixel, other in found.seen[0].nonzero().tolist():
        if frame == other:
            continue
        eye, direction = ray(made, 0, other, found.u[0, frame, pixel, other], found.v[0, frame, pixel, other])
        point = eye + cast(boxes, eye, direction) * direction
        if np.linalg.norm(point - found.points[0, frame, pixel].numpy()) > 0.1:
            continue  # behind an edge that lies between pixels
        pose = made.poses[0, frame].double().numpy()
        x, y, z = pose[:3, :3].T @ (point - pose[:3, 3])
        u, v = step // 2 + step * (pixel % columns), step // 2 + step * (pixel // columns)
        distances.append(math.hypot(fx * x / z + cx - u, fy * y / z + cy - v))
    assert len(distances) > 0.8 * (found.seen[0].sum().item() - frames * found.seen.shape[2])
    assert len(distances) > 20 and max(distances) < 0.5


def test_a_frame_sees_all_of_itself_and_covisibility_is_about_mutual():
    made = scenes("room", 1, frames=4)
    overlap = made.overlap()[0]
    assert (overlap.diagonal() > 0.99).all()
    assert (
        0.1 < overlap.mean() < 1 and torch.corrcoef(torch.stack([overlap.flatten(), overlap.mT.flatten()]))[0, 1] > 0.5
    )


def test_what_a_wall_hides_is_not_seen():
    """Two cameras at one place that look in opposite directions share nothing."""
    made = scenes("rotation", 4, frames=2)
    turned = made.poses[:, :1].clone()
    turned[..., :3, 0], turned[..., :3, 2] = -turned[..., :3, 0], -turned[..., :3, 2]
    poses = torch.cat([made.poses[:, :1], turned], 1)
    _, depth = render_by_pytorch(made.boxes, poses, made.intrinsics, SIZE)
    assert correspond(depth, poses, made.intrinsics, 4).seen.float().mean(2)[0].tolist() == [[1, 0], [0, 1]]


def test_the_kernel_is_the_torch_renderer():
    pytest.importorskip("triton", reason="triton is not installed")
    from svggt_kernels.demo.scenes.kernel import render_by_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = make_scenes(2, 1, Draws(5), families="room", rooms=2, size=(10, 14))
    arguments = [x.to(device) for x in (made.boxes, made.poses, made.intrinsics)]
    images, depth = (x.cpu() for x in render_by_triton(*arguments, (10, 14)))
    # At a silhouette the last bit decides which box is hit.
    same = (depth / made.depth - 1).abs() < 1e-4
    assert same.float().mean() > 0.99
    assert ((images - made.images).abs().amax(2)[same] < 0.01).float().mean() > 0.98


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from svggt_kernels.demo.scenes.kernel import PIXELS, _render

pointers = {name: "*fp32" for name in ("boxes", "cameras", "images", "depths")}
numbers = {name: "i32" for name in ("count", "frames", "height", "width")}
source = ASTSource(_render, {**pointers, **numbers, "BLOCK": "constexpr"}, {(8,): PIXELS})
code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
print(code.metadata.shared, code.asm["ptx"].count("st.global"))
"""


def test_the_kernel_compiles():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shared, stores = map(int, run.stdout.split())
    assert shared == 0 and stores >= 4


def test_scenes_are_those_of_their_seed():
    first, again, other = (make_scenes(1, 2, Draws(seed), families="photos", rooms=1, size=SIZE) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images) and torch.equal(first.poses, again.poses)
    assert not torch.equal(first.poses, other.poses)


# Families


def paths(family: str, frames: int = 24, rooms: int = 4, difficulty: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, optical axes `[B, S, 3]` and covisibility of a few scenes."""
    made = make_scenes(4, frames, Draws(7), families=family, rooms=rooms, difficulty=difficulty, size=(14, 21))
    return made.poses[..., :3, 3], made.poses[..., :3, 2], made.overlap()


def to_motion(centre: Tensor, axis: Tensor) -> Tensor:
    """The angle from the optical axis to the motion to the next frame, in degrees, seen from above."""
    motion = torch.nn.functional.normalize((centre[:, 1:] - centre[:, :-1])[..., :2], dim=-1)
    forward = torch.nn.functional.normalize(axis[:, :-1, :2], dim=-1)
    return torch.rad2deg((motion * forward).sum(-1).clamp(-1, 1).acos())


def test_a_walk_goes_from_room_to_room():
    centre, _, overlap = paths("walk", frames=48)
    assert (centre[:, 1:] - centre[:, :-1]).norm(dim=-1).max() < 1.0
    assert ((centre.amax(1) - centre.amin(1))[:, :2].amax(1) > 3).all()
    assert overlap[:, 0, 1].mean() > 0.4 > overlap[:, 0, 24:].mean()


@pytest.mark.parametrize("rooms", [16, 32])
def test_a_large_flat_is_large(rooms: int):
    flats = draw_flats(8, rooms, Draws(0))
    apart = torch.cdist(flats.middle, flats.middle)
    assert flats.path_length().min() > 2 * rooms and apart.amax((1, 2)).min() > 2 * math.sqrt(rooms)
    assert (apart + 100 * torch.eye(rooms)).min() > 1.5
    centre, _, overlap = paths("walk", frames=32, rooms=rooms)
    assert (overlap[:, 0, 16:] < 0.3).all() and ((centre.amax(1) - centre.amin(1))[:, :2].amax(1) > 3).all()


def test_an_orbit_stays_in_one_room_and_turns():
    centre, axis, _ = paths("room")
    assert ((centre.amax(1) - centre.amin(1))[:, :2] < 5.2).all()
    assert (axis[:, 0] * axis[:, 12]).sum(-1).min() < 0.5


def test_photos_have_no_order():
    centre, _, overlap = paths("photos", frames=48)
    steps, pairs = (centre[:, 1:] - centre[:, :-1]).norm(dim=-1).mean(), torch.cdist(centre, centre).mean()
    assert steps > 0.7 * pairs
    near, far = overlap.diagonal(1, 1, 2).mean(), overlap.diagonal(24, 1, 2).mean()
    assert near < 1.5 * far


def test_a_revisit_sees_again_what_it_saw():
    _, _, overlap = paths("revisit")
    back = torch.arange(12)
    assert overlap[:, back, 23 - back].mean() > 0.6
    assert overlap[:, back, 23 - back].mean() > overlap[:, back, back + 12].mean() + 0.1


def test_forward_motion_is_along_the_optical_axis():
    centre, axis, _ = paths("forward")
    assert to_motion(centre, axis).quantile(0.9) < 20
    assert (centre[:, 1:] - centre[:, :-1]).norm(dim=-1).min() > 0.1


def test_rotation_is_nothing_but_rotation():
    centre, axis, _ = paths("rotation")
    assert torch.equal(centre, centre[:, :1].expand_as(centre))
    assert (axis[:, 0] * axis[:, 12]).sum(-1).max() < 0.9


def test_the_held_out_family_looks_to_a_side_in_a_row_of_rooms():
    centre, axis, _ = paths(HELD_OUT, rooms=5)
    assert 40 < to_motion(centre, axis).median() < 100
    assert {row for _, row in PLANS[5].cells} == {0}


def test_frames_can_be_shuffled_and_families_mixed():
    options = {"families": "walk", "rooms": 4, "size": (14, 21)}
    walk, shuffled = (make_scenes(1, 16, Draws(0), shuffled=share, **options) for share in (0.0, 1.0))
    steps, jumps = ((x.poses[:, 1:, :3, 3] - x.poses[:, :-1, :3, 3]).norm(dim=-1).mean() for x in (walk, shuffled))
    assert jumps > 2 * steps
    mixed = make_scenes(12, 3, Draws(0), families={"rotation": 1.0, "photos": 1.0}, rooms=1, size=(7, 7))
    still = (mixed.poses[:, 0, :3, 3] == mixed.poses[:, 1, :3, 3]).all(-1)
    assert 2 < still.sum() < 10


@pytest.mark.parametrize("rooms", PLANS)
def test_plans_are_closed_walks_through_every_room(rooms: int):
    plan = PLANS[rooms]
    assert len(set(plan.cells)) == len(plan.cells) == rooms and set(plan.tour) == set(range(rooms))
    for a, b in plan.legs:
        (x, y), (u, v) = plan.cells[a], plan.cells[b]
        assert abs(x - u) + abs(y - v) == (a != b)
    flats = draw_flats(2, rooms, Draws(0))
    at = flats.along(torch.linspace(0, 1, 50)[None] * flats.path_length())
    torch.testing.assert_close(at[:, 0], flats.path[:, 0])
    torch.testing.assert_close(at[:, -1], flats.path[:, 0], atol=1e-2, rtol=0)
    low, high = flats.inner[..., :2], flats.inner[..., 2:]
    in_room = ((at[:, :, None] > low[:, None]) & (at[:, :, None] < high[:, None])).all(-1).any(-1)
    in_door = (at[:, :, None] - flats.doors.position[:, None]).norm(dim=-1)
    assert (in_room | (in_door < 0.9).any(-1)).all()


def test_training_never_draws_what_is_held_out():
    curriculum = pytest.importorskip("evaluation.training.curriculum")
    assert HELD_OUT in FAMILIES and HELD_OUT not in curriculum.FAMILIES
    assert not {5, 7} & {rooms for stage in curriculum.STAGES for rooms in stage.rooms}


def test_unknown_families_and_plans_are_refused():
    with pytest.raises(ValueError, match=r"families must be among walk, .*, got flight"):
        make_scenes(1, 2, Draws(0), families="flight")
    with pytest.raises(ValueError, match=r"rooms must be one of 1, 2, .*, got 9"):
        make_scenes(1, 2, Draws(0), rooms=9)


def beyond(points: Tensor, outlines: Tensor) -> Tensor:
    """How far points `[n, 2]` are outside of the nearest of convex outlines `[m, 4, 2]`; negative inside."""
    edges = outlines.roll(-1, 1) - outlines
    outwards = torch.stack([edges[..., 1], -edges[..., 0]], -1) / edges.norm(dim=-1, keepdim=True)
    return ((points[:, None, None] - outlines) * outwards).sum(-1).amax(-1).amin(-1)


def test_a_floor_plan_has_walls_with_doors_and_what_stands_between_them():
    scene = scenes("walk", 8, frames=40)
    walls, things = outlines(scene.boxes[0], height=1.2)
    sides = [(walls[:, corner] - walls[:, corner + 1]).norm(dim=-1) for corner in (0, 1)]
    torch.testing.assert_close(torch.minimum(*sides), torch.full_like(sides[0], 0.1))  # each room's own shell
    assert len(walls) > 8 * 4 and len(things) > 8

    eyes = scene.poses[0, :, :2, 3]
    route = torch.cat([torch.lerp(eyes[:-1], eyes[1:], share) for share in (0.0, 0.25, 0.5, 0.75)])
    assert beyond(route, torch.cat([walls, things])).min() > 0, "the walk leads through walls or furniture"
    points = correspond(scene.depth, scene.poses, scene.intrinsics, 4).points[0].flatten(0, 1)
    standing = points[(points[:, 2] > 0.1) & (points[:, 2] < 1.1)]
    assert len(standing) > 100
    assert beyond(standing[:, :2], torch.cat([walls, things])).max() < 0.01, (
        "something is seen where the plan has nothing"
    )
