"""Data sets are read as they lie on the disk: tiny made-up copies of each layout hold the rendered walk."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import walks
from walks import Walk

from svggt_kernels.measure.ground_truth import find_truth, photos_of, read_truth

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

LEFT_UP = torch.diag(torch.tensor([-1.0, -1, 1, 1], dtype=torch.float64))


def move(walk: Walk, folder: Path, names: list[str]) -> list[Path]:
    folder.mkdir(parents=True)
    return [photo.rename(folder / name) for photo, name in zip(walk.photos, names, strict=True)]


def save_png(path: Path, numbers: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numbers).save(path)


def seven_scenes(root: Path, walk: Walk) -> Path:
    folder = root / "chess" / "seq-01"
    photos = move(walk, folder, [f"frame-{i:06d}.color.png" for i in range(6)])
    for photo, pose, depth in zip(photos, walk.poses.numpy(), walk.depth.numpy(), strict=True):
        frame = photo.name.removesuffix(".color.png")
        rows = ("\t".join(f"{number: .15e}" for number in row) + "\t" for row in pose)
        (folder / f"{frame}.pose.txt").write_text("\n".join(rows) + "\n")
        levels = (1000 * depth).round().astype(np.uint16)
        levels[:2] = 65535
        save_png(folder / f"{frame}.depth.png", levels)
    return folder


def eth3d(root: Path, walk: Walk) -> Path:
    scene = root / "courtyard"
    folder = scene / "images" / "dslr_images"
    walks.as_colmap_text(scene / "dslr_calibration_jpg", walk, "dslr_images/")
    photos = move(walk, folder, [photo.name for photo in walk.photos])
    (scene / "ground_truth_depth" / "dslr_images").mkdir(parents=True)
    for photo, depth in zip(photos, walk.depth.numpy(), strict=True):
        depth = depth.astype("<f4")
        depth[:2] = np.inf
        depth.tofile(scene / "ground_truth_depth" / "dslr_images" / photo.name)
    return folder


def hiroom(root: Path, walk: Walk) -> Path:
    scene = root / "data" / "828805" / "1"
    photos = move(walk, scene / "image", [f"{i}.png" for i in range(6)])
    (scene / "pose").mkdir()
    np.save(scene / "cam_K.npy", np.eye(3))
    for photo, pose, depth in zip(photos, walk.poses.numpy(), walk.depth.numpy(), strict=True):
        np.save(scene / "pose" / f"{photo.stem}.npy", np.linalg.inv(pose))
        save_png(scene / "depth" / photo.name, (depth / 100 * 65535).round().astype(np.uint16))
        mask = np.zeros(depth.shape, np.uint8)
        mask[:2] = 255
        save_png(scene / "aliasing_mask" / photo.name, mask)
    return scene / "image"


def co3d(root: Path, walk: Walk) -> Path:
    sequence = root / "apple" / "110_13051_23361"
    photos = move(walk, sequence / "images", [f"frame{i + 1:06d}.jpg" for i in range(6)])
    frames = []
    for i, (photo, pose, depth) in enumerate(zip(photos, walk.poses, walk.depth.numpy(), strict=True)):
        to_camera = (LEFT_UP @ pose.inverse()).numpy()
        depth_map, mask = (f"apple/{sequence.name}/{name}" for name in (f"depths/{photo.name}.png", f"masks/{i}.png"))
        save_png(root / depth_map, (depth / 2).astype(np.float16).view(np.uint16))
        inside = np.full(depth.shape, 255, np.uint8)
        inside[:2] = 0
        save_png(root / mask, inside)
        frames.append(
            {
                "sequence_name": sequence.name,
                "frame_number": i,
                "image": {"path": f"apple/{sequence.name}/images/{photo.name}", "size": list(depth.shape)},
                "depth": {"path": depth_map, "scale_adjustment": 2.0, "mask_path": mask},
                "viewpoint": {
                    "R": to_camera[:3, :3].T.tolist(),
                    "T": to_camera[:3, 3].tolist(),
                    "focal_length": [2.0, 2.0],
                    "principal_point": [0.0, 0.0],
                    "intrinsics_format": "ndc_isotropic",
                },
            }
        )
    stranger = {**frames[0], "sequence_name": "another", "image": {"path": "apple/another/images/frame000001.jpg"}}
    with gzip.open(root / "apple" / "frame_annotations.jgz", "wt") as file:
        json.dump([*frames, stranger], file)
    return sequence / "images"


DATA_SETS: dict[str, tuple[Callable[[Path, Walk], Path], float]] = {
    "7-Scenes": (seven_scenes, 5.1e-4),
    "ETH3D": (eth3d, 0.0),
    "HiRoom": (hiroom, 8e-4),
    "CO3D": (co3d, 4e-3),
}
"""How each is laid out, and how far its depth maps round, metres."""


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_truth_is_found_from_the_folder_of_photos(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lay_out, rounding = DATA_SETS[name]
    walk = walks.walk(tmp_path)
    folder = lay_out(tmp_path / "data", walk)
    monkeypatch.chdir(folder.parent)
    photos = photos_of(Path(folder.name))
    assert len(photos) == 6
    truth = read_truth(find_truth(Path(folder.name)), photos)
    assert f"({name}" in truth.label
    assert (truth.known, truth.unused) == (list(range(6)), 0)
    torch.testing.assert_close(truth.poses, walk.poses, atol=1e-9, rtol=0)
    frames = truth.depth_of_frames(walk.depth.shape[-2:])
    assert not frames[:, :2].any()
    torch.testing.assert_close(frames[:, 2:], walk.depth[:, 2:], atol=rounding, rtol=0)


def test_depth_of_eth3d_lies_in_the_rows_of_the_photo_as_it_is_stored(tmp_path: Path):
    """Where the scene's own photos have an orientation, copies without it are what can be given."""
    walk = walks.walk(tmp_path)
    folder = eth3d(tmp_path / "data", walk)
    copies = Path(shutil.copytree(folder.parents[1], tmp_path / "copies" / "courtyard")) / "images" / "dslr_images"
    for photo in photos_of(folder):
        walks.tag(photo, 6)
    truth = find_truth(folder)
    with pytest.raises(ValueError, match=r"must be stored upright .* 6 of 6 are not"):
        read_truth(truth, photos_of(folder))
    frames = read_truth(truth, photos_of(copies)).depth_of_frames((28, 42))
    assert torch.equal(frames[:, 2:], walk.depth[:, 2:])


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("7-Scenes", 0, r"others \(chess/seq-01/frame-000000.color.png, "),
        ("7-Scenes", 1, r"others \(chess/seq-01/frame-000000.color.png, "),
        ("HiRoom", 1, r"others \(828805/1/image/0, "),
        ("HiRoom", 2, r"others \(828805/1/image/0, "),
        ("ETH3D", 2, r"others \(courtyard/images/dslr_images/000000.png, "),
        ("CO3D", 1, r"no viewpoint of sequence 'other'"),
        ("CO3D", 2, r"others \(apple/110_13051_23361/images/frame000001.jpg, "),
    ],
)
def test_photos_of_another_sequence_or_scene_have_other_poses(name: str, level: int, message: str, tmp_path: Path):
    """The folder of the photos, the one around it and so on is copied under another name; file names are the same."""
    folder = DATA_SETS[name][0](tmp_path / "data", walks.walk(tmp_path))
    renamed = [folder, *folder.parents][level]
    shutil.copytree(renamed, other := renamed.with_name("other"))
    photos = photos_of(other / folder.relative_to(renamed))
    with pytest.raises(ValueError, match=message):
        read_truth(find_truth(folder), photos)


@pytest.mark.parametrize("name", DATA_SETS)
def test_photos_may_lie_elsewhere_in_folders_of_the_same_names(name: str, tmp_path: Path):
    folder = DATA_SETS[name][0](tmp_path / "data", walks.walk(tmp_path))
    copies = shutil.copytree(tmp_path / "data", tmp_path / "copies") / folder.relative_to(tmp_path / "data")
    assert read_truth(find_truth(folder), photos_of(copies)[1:4]).known == [0, 1, 2]


def test_undistorted_photos_of_eth3d_have_no_depth(tmp_path: Path):
    walk = walks.walk(tmp_path)
    scene = tmp_path / "courtyard"
    walks.as_colmap_text(scene / "dslr_calibration_undistorted", walk, "dslr_images_undistorted/")
    folder = scene / "images" / "dslr_images_undistorted"
    move(walk, folder, [photo.name for photo in walk.photos])
    truth = read_truth(find_truth(folder), photos_of(folder))
    assert (len(truth.known), truth.depth) == (6, [None] * 6)


def test_a_folder_of_no_data_set(tmp_path: Path):
    walk = walks.walk(tmp_path)
    with pytest.raises(ValueError, match=r"is not the folder of photos of a data set .* give --truth: .*HiRoom"):
        find_truth(walk.photos[0].parent)


BROKEN = [
    ("7-Scenes", "frame-000002.pose.txt", lambda file: file.write_text("1 2 3\n"), r"000002.pose.txt must be a matrix"),
    ("7-Scenes", "frame-000002.pose.txt", lambda file: file.write_text("-1.#IND " * 4), r"matrix of 4 x 4 numbers"),
    ("HiRoom", "../pose/2.npy", lambda file: np.save(file, np.full((4, 4), np.nan)), r"2.npy must be a rigid motion"),
    ("HiRoom", "../pose/2.npy", lambda file: file.write_bytes(b"oops"), r"2.npy cannot be read as an array"),
    ("CO3D", "../../frame_annotations.jgz", lambda file: file.write_bytes(b"oops"), r"must hold the frame annotations"),
    (
        "CO3D",
        "../../frame_annotations.jgz",
        lambda file: file.write_bytes(gzip.compress(b"[]")),
        r"has no viewpoint of sequence '110_13051_23361'",
    ),
    (
        "CO3D",
        "../../frame_annotations.jgz",
        lambda file: file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b'"R"', b'"S"'))),
        r"must hold frames with image and viewpoint",
    ),
]


@pytest.mark.parametrize(("name", "file", "damage", "message"), BROKEN)
def test_broken_data_sets_are_refused(
    name: str, file: str, damage: Callable[[Path], object], message: str, tmp_path: Path
):
    folder = DATA_SETS[name][0](tmp_path / "data", walks.walk(tmp_path))
    damage(folder / file)
    with pytest.raises(ValueError, match=message):
        read_truth(find_truth(folder), photos_of(folder))


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("ETH3D", "../../ground_truth_depth/dslr_images/000002.png", r"must hold 42 x 28 numbers of 4 bytes, .* got 1"),
        ("HiRoom", "../depth/2.png", r"cannot be read as a photo"),
        ("CO3D", "../depths/frame000002.jpg.png", r"cannot be read as a photo"),
    ],
)
def test_a_damaged_depth_map_is_refused(name: str, file: str, message: str, tmp_path: Path):
    folder = DATA_SETS[name][0](tmp_path / "data", walks.walk(tmp_path))
    (folder / file).write_bytes(b"oops")
    truth = read_truth(find_truth(folder), photos_of(folder))
    with pytest.raises(ValueError, match=rf"the depth map of .*: .*{message}"):
        truth.depth_of_frames((28, 42))
