"""What is weak about a reconstruction is said in words, of exact scenes whose weakness is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from scenes_in_files import FRAMES, Exact, exact_walk

from svggt_kernels.models.loading import RANDOM_WEIGHTS
from svggt_kernels.reconstruction import Reconstruction, diagnosis
from svggt_kernels.reconstruction.diagnosis import diagnose
from svggt_kernels.reconstruction.points import PointChoice, point_cloud


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    return exact_walk(tmp_path_factory.mktemp("walk") / "photos")


def moved(scene: Reconstruction, photos: list[int], metres: float = 1000.0) -> Reconstruction:
    """The same, with some cameras far away, where nobody else is."""
    poses = scene.poses.clone()
    poses[photos, 0, 3] += metres
    return dataclasses.replace(scene, poses=poses)


def test_a_walk_is_one_part(exact: Exact):
    found = diagnose(exact.scene)
    assert found.parts == [list(range(FRAMES))]
    assert len(found.links) == FRAMES - 1
    assert found.notes == []


def test_shares_are_those_of_the_renderer(exact: Exact):
    """Whether a photo sees a point is told by a ray from its camera to the point, which nothing stops."""
    cloud = point_cloud(exact.scene, PointChoice(max_points=3000))
    shares = diagnosis.shared_views(exact.scene, cloud)
    width, height = (84, 70)
    for one in range(FRAMES):
        points = cloud.points[cloud.frames == one]
        for other in range(FRAMES):
            pose, intrinsics = exact.scene.poses[other], exact.scene.intrinsics[other]
            seen = (points - pose[:3, 3]) @ pose[:3, :3] @ intrinsics.mT
            pixels, depth = seen[:, :2] / seen[:, 2:], seen[:, 2]
            inside = (depth > 0) & (pixels > 0).all(1) & (pixels[:, 0] < width) & (pixels[:, 1] < height)
            in_photo = (
                pixels @ exact.scene.cameras[other].of_frame[:, :2].mT + exact.scene.cameras[other].of_frame[:, 2]
            )
            hit = exact.hit(other, in_photo)
            true = inside & ((hit - points).norm(dim=1) < 0.05 * depth.clamp(min=0))
            assert float(shares[one, other]) >= float(true.double().mean()) - 0.03
    assert torch.equal(shares, shares.mT)


def test_photos_that_see_nothing_together(exact: Exact):
    found = diagnose(moved(exact.scene, [2]))
    assert found.parts[-1] == [2]
    [note] = found.notes
    assert note.startswith("1 photo of 6 shares no view with any other (02.png): their cameras may be wrong")


def test_of_random_weights_nothing_is_said(exact: Exact):
    scene = dataclasses.replace(moved(exact.scene, [2]), facts={"warning": RANDOM_WEIGHTS})
    assert diagnose(scene).notes == []


def test_a_scene_that_is_split(exact: Exact):
    found = diagnose(moved(exact.scene, [0, 1, 2]))
    assert found.parts == [[0, 1, 2], [3, 4, 5]]
    [note] = found.notes
    assert note.startswith(
        "The photos fall into 2 parts that share no view: 3 photos (00.png, 01.png, 02.png); 3 photos (03.png,"
    )


def test_a_weak_bridge(exact: Exact, monkeypatch: pytest.MonkeyPatch):
    shares = torch.eye(FRAMES, dtype=torch.float64)
    for one, other, share in [(0, 1, 0.8), (1, 2, 0.7), (0, 2, 0.6), (2, 3, 0.04), (3, 4, 0.5), (4, 5, 0.05)]:
        shares[one, other] = shares[other, one] = share
    monkeypatch.setattr(diagnosis, "shared_views", lambda scene, cloud: shares)
    found = diagnose(exact.scene)
    assert found.parts == [list(range(FRAMES))]
    assert found.links[0] == (2, 3)
    [note] = found.notes  # photo 5 alone hangs on a thread too, but that is one photo
    assert note.startswith("02.png and 03.png are the strongest link between 3 photos and 3 others, and share only 4 %")


def test_one_photo_has_no_weakness(exact: Exact, tmp_path: Path):
    one = {name: getattr(exact.scene, name)[:1] for name in ("names", "sizes", "orientations", "poses", "intrinsics")}
    pixels = {name: getattr(exact.scene, name)[:1] for name in ("depth", "confidence", "colours")}
    found = diagnose(dataclasses.replace(exact.scene, **one, **pixels))
    assert (found.parts, found.links, found.notes) == ([[0]], [], [])
