"""What files say of cameras and depth is what was rendered, and what they cannot say is refused in words."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import walks
from walks import Walk

from svggt_kernels.measure.ground_truth import Truth, read_truth, with_depth_maps
from svggt_kernels.measure.scores import depth_scores, pose_scores

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

EXPORTS: dict[str, Callable[[Path, Walk], Path]] = {
    "COLMAP, text": lambda folder, walk: walks.as_colmap_text(folder / "sparse", walk),
    "COLMAP, text, under images": lambda folder, walk: walks.as_colmap_text(folder / "sparse", walk, "images/"),
    "COLMAP, binary": lambda folder, walk: walks.as_colmap_binary(folder / "sparse", walk),
    "TUM, by name": lambda folder, walk: walks.as_tum(folder / "groundtruth.txt", walk, range(len(walk.photos))),
    "TUM, by order": lambda folder, walk: walks.as_tum(folder / "t.txt", walk, 17.5 + np.arange(len(walk.photos))),
    "KITTI": lambda folder, walk: walks.as_kitti(folder / "poses.txt", walk),
    "transforms.json": lambda folder, walk: walks.as_transforms(folder / "transforms.json", walk),
}


@pytest.fixture
def walk(tmp_path: Path) -> Walk:
    return walks.walk(tmp_path)


def predictions(walk: Walk) -> tuple[torch.Tensor, torch.Tensor]:
    """Poses and depth that a mediocre model might give, in another coordinate system."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.03 * torch.randn(len(walk.poses), 3, 4, generator=generator, dtype=torch.float64)
    poses = walk.poses.clone()
    left, _, right = torch.linalg.svd(poses[:, :3, :3] + noise[..., :3])
    poses[:, :3, :3], poses[:, :3, 3] = left @ right, 0.3 * (poses[:, :3, 3] + noise[..., 3])
    return poses, walk.depth * (2 + 0.3 * torch.rand(walk.depth.shape, generator=generator))


@pytest.mark.parametrize("kind", EXPORTS)
def test_every_file_gives_the_figures_of_what_was_rendered(kind: str, tmp_path: Path, walk: Walk):
    truth = read_truth(EXPORTS[kind](tmp_path, walk), walk.photos)
    assert truth.photos == walk.photos and truth.known == list(range(6)) and truth.unused == 0
    assert truth.label.startswith(str(tmp_path)) and kind.partition(",")[0] in truth.label
    assert truth.poses.dtype == torch.float64
    poses, depth = predictions(walk)
    expected = pose_scores(poses, walk.poses)
    assert 0 < expected["auc3"] < expected["auc30"] < 1
    assert pose_scores(poses, truth.poses) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    if kind == "transforms.json":
        true_depth = truth.depth_of_frames(walk.depth.shape[-2:])
        assert depth_scores(depth, true_depth) == pytest.approx(depth_scores(depth, walk.depth), rel=1e-6)
    else:
        assert truth.depth == [None] * 6


def test_a_model_that_colmap_wrote(tmp_path: Path, walk: Walk):
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera.create_from_model_name(1, "PINHOLE", 30.0, 42, 28)
    model.add_camera_with_trivial_rig(camera)
    for i, (photo, pose) in enumerate(zip(walk.photos, walk.poses, strict=True)):
        motion = pycolmap.Rigid3d(np.linalg.inv(pose.numpy())[:3])
        model.add_image_with_trivial_frame(pycolmap.Image(photo.name, camera_id=1, image_id=i + 1), motion)
    for write in (model.write_text, model.write_binary):
        folder = tmp_path / write.__name__
        folder.mkdir()
        write(folder)
        torch.testing.assert_close(read_truth(folder, walk.photos).poses, walk.poses)


class TestTurnedPhotos:
    @pytest.fixture
    def walk(self, tmp_path: Path) -> Walk:
        return walks.walk(tmp_path, names=[f"{i:06d}.jpg" for i in range(6)])

    @pytest.mark.parametrize("kind", EXPORTS)
    def test_are_refused(self, kind: str, tmp_path: Path, walk: Walk):
        for photo in walk.photos[3:5]:
            walks.tag(photo, 6)
        with pytest.raises(
            ValueError,
            match=r"must be stored upright .* 2 of 6 are not \(.*000003.jpg: EXIF orientation 6\); write them",
        ):
            read_truth(EXPORTS[kind](tmp_path, walk), walk.photos)

    @pytest.mark.parametrize("orientation", range(2, 9))
    def test_mirrored_or_upside_down(self, orientation: int, tmp_path: Path, walk: Walk):
        walks.tag(walk.photos[0], orientation)
        with pytest.raises(ValueError, match=rf"1 of 6 are not .*000000.jpg: EXIF orientation {orientation}"):
            read_truth(walks.as_colmap_text(tmp_path / "sparse", walk), walk.photos)

    @pytest.mark.parametrize("orientation", [0, 1, 9])
    def test_what_turns_nothing_is_read(self, orientation: int, tmp_path: Path, walk: Walk):
        walks.tag(walk.photos[0], orientation)
        assert read_truth(walks.as_colmap_text(tmp_path / "sparse", walk), walk.photos).known == list(range(6))

    def test_photos_without_a_pose_may_be_turned(self, tmp_path: Path, walk: Walk):
        walks.tag(walk.photos[5], 6)
        model = walks.as_colmap_text(tmp_path / "sparse", walk._replace(photos=walk.photos[:5], poses=walk.poses[:5]))
        assert read_truth(model, walk.photos).known == list(range(5))


class TestWhichPhoto:
    def test_photos_and_poses_that_have_no_counterpart_are_told(self, tmp_path: Path, walk: Walk):
        model = walks.as_colmap_text(tmp_path / "sparse", walk)
        stranger = tmp_path / "images" / "z.png"
        truth = read_truth(model, [*walk.photos[2:], stranger])
        assert (truth.known, truth.unused, truth.photos[-1]) == ([0, 1, 2, 3], 2, stranger)
        torch.testing.assert_close(truth.poses, walk.poses[2:])
        first = truth.first(2)
        assert (first.known, len(first.photos), len(first.poses), len(first.depth)) == ([0, 1], 2, 2, 2)

    def test_names_without_suffix(self, tmp_path: Path, walk: Walk):
        file = walks.as_transforms(tmp_path / "transforms.json", walk)
        file.write_text(file.read_text().replace('.png"', '"'))
        assert read_truth(file, walk.photos).known == list(range(6))

    def test_frames_in_another_order(self, tmp_path: Path, walk: Walk):
        file = walks.as_transforms(tmp_path / "transforms.json", walk)
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "frames": content["frames"][::-1]}))
        truth = read_truth(file, walk.photos)
        torch.testing.assert_close(truth.poses, walk.poses)
        assert torch.equal(truth.depth_of_frames(walk.depth.shape[-2:]), walk.depth)

    def test_a_path_that_leaves_the_folder(self, tmp_path: Path, walk: Walk):
        (tmp_path / "nerf").mkdir()
        file = walks.as_transforms(tmp_path / "nerf" / "transforms.json", walk)
        file.write_text(file.read_text().replace("./images", "../images"))
        assert read_truth(file, walk.photos).known == list(range(6))

    def test_another_folder_is_not_passed_over(self, tmp_path: Path, walk: Walk):
        model = walks.as_colmap_text(tmp_path / "sparse", walk, "left/")
        with pytest.raises(ValueError, match=r"knows none of 6 photos .*left/000000.png.* lay them into folders"):
            read_truth(model, walk.photos)

    def test_times_in_a_table(self, tmp_path: Path):
        walk = walks.walk(tmp_path, names=[f"{letter}.png" for letter in "fedcba"])
        times = 1305031102.1 + 0.1 * np.arange(6)
        (tmp_path / "rgb.txt").write_text(
            "# time file\n" + "\n".join(f"{t + 0.01} images/{p.name}" for t, p in zip(times, walk.photos, strict=True))
        )
        truth = read_truth(walks.as_tum(tmp_path / "groundtruth.txt", walk, times), sorted(walk.photos))
        torch.testing.assert_close(truth.poses, walk.poses.flip(0))

    def test_times_are_names_and_poses_come_more_often(self, tmp_path: Path):
        walk = walks.walk(tmp_path, names=[f"{100 + i / 8}.png" for i in range(6)])
        file = walks.as_tum(tmp_path / "groundtruth.txt", walk, 100.01 + np.arange(6) / 8)
        between = [line.replace("100.01", "100.05", 1) for line in file.read_text().splitlines() if "100.01 " in line]
        file.write_text(file.read_text() + between[0])
        truth = read_truth(file, walk.photos)
        assert (truth.known, truth.unused) == (list(range(6)), 1)
        torch.testing.assert_close(truth.poses, walk.poses)

    def test_whole_seconds_that_number_no_lines_are_times(self, tmp_path: Path):
        walk = walks.walk(tmp_path, names=[f"{1700000000 + i}.png" for i in range(6)])
        more = walk._replace(poses=walk.poses.repeat_interleave(2, dim=0))
        truth = read_truth(walks.as_tum(tmp_path / "t.txt", more, 1700000000 + np.arange(12) / 2), walk.photos)
        torch.testing.assert_close(truth.poses, walk.poses)

    def test_a_pose_goes_to_the_nearest_of_several_photos(self, tmp_path: Path):
        walk = walks.walk(tmp_path, names=["0.png", "1.png", "1.01.png", "2.png", "2.01.png", "4.03.png"])
        four = walk._replace(poses=walk.poses[:4])
        truth = read_truth(walks.as_tum(tmp_path / "t.txt", four, [0, 1.001, 2.009, 4]), walk.photos)
        assert (truth.known, truth.unused) == ([0, 1, 4], 1)
        torch.testing.assert_close(truth.poses, walk.poses[:3])

    def test_lines_are_names(self, tmp_path: Path, walk: Walk):
        truth = read_truth(walks.as_kitti(tmp_path / "poses.txt", walk), walk.photos[1::2])
        torch.testing.assert_close(truth.poses, walk.poses[1::2])

    @pytest.mark.parametrize(
        ("names", "times", "message"),
        [
            ([f"{i}.png" for i in range(1, 7)], range(6), "by the times that are their names only 5 of them have one"),
            ([f"{letter}.png" for letter in "abcdef"], range(7), "7 poses for 6 photos whose names are not its times"),
            ([f"{i}.png" for i in range(6)], range(50, 57), "7 poses for 6 photos whose names are not its times"),
            ([f"{i:06d}.png" for i in range(6)], np.arange(121) / 30, "121 poses for 6 photos, but .* only 5 of them"),
            ([f"{i:06d}.png" for i in range(6)], np.arange(300) / 30, "300 poses for 6 photos, .* give other poses"),
        ],
    )
    def test_what_might_be_either_is_refused(
        self, tmp_path: Path, names: list[str], times: Sequence[float], message: str
    ):
        walk = walks.walk(tmp_path, names=names)
        more = walk._replace(poses=walk.poses[torch.arange(len(times)) % 6])
        with pytest.raises(ValueError, match=message):
            read_truth(walks.as_tum(tmp_path / "t.txt", more, times), walk.photos)

    def test_lines_that_names_do_not_tell(self, tmp_path: Path):
        walk = walks.walk(tmp_path, names=[f"{letter}.png" for letter in "abcdef"])
        with pytest.raises(ValueError, match=r"6 poses for 5 photos whose names are not its lines"):
            read_truth(walks.as_kitti(tmp_path / "poses.txt", walk), walk.photos[:5])


def changed(line: int, column: int, word: str) -> Callable[[str], str]:
    """Put another word into a line, or with "" take it out."""

    def change(text: str) -> str:
        lines = text.splitlines()
        fields = lines[line].split()
        fields[column : column + 1] = [word] if word else []
        return "\n".join([*lines[:line], " ".join(fields), *lines[line + 1 :]])

    return change


BROKEN = [
    ("TUM, by name", changed(2, 3, ""), r"8 numbers .* all lines alike; line 3 has 7"),
    ("TUM, by name", changed(2, 3, "nan"), r"all of them finite; line 3 is '1.0 .*nan"),
    ("TUM, by name", changed(2, 3, "east"), r"all of them finite; line 3 is '1.0 .*east"),
    ("TUM, by name", changed(2, 0, "0.0"), r"give each time once, but 0.0 stands there several times"),
    (
        "COLMAP, text",
        lambda text: "\n".join(text.splitlines()[:2]),
        r"poses of two photos or more must be known, .* 1 are",
    ),
    ("TUM, by name", lambda text: "# nothing\n", r"holds no line"),
    ("KITTI", changed(1, 3, ""), r"KITTI's 12 .* all lines alike; line 2 has 11"),
    ("KITTI", changed(1, 0, "7"), r"poses.txt, line 2 must be a rigid motion"),
    ("COLMAP, text", changed(1, 9, "000001.png"), r"name each photo once, but '000001.png' and '000001.png' both are"),
    ("COLMAP, text", changed(1, 8, ""), r"two lines an image: .* image 1 is .*9 fields"),
    ("COLMAP, text", lambda text: re.sub("\n(\n|1.5.*\n)", "\n", text), r"image 1 is .*follows holds no points"),
    ("COLMAP, text", changed(3, 6, "nan"), r"a finite translation, got .*nan"),
    (
        "transforms.json",
        lambda text: text.replace("transform_matrix", "matrix", 1),
        r"frame 0, transform_matrix must be",
    ),
    ("transforms.json", lambda text: text.replace("file_path", "path", 1), r"frame 0 must have a file_path"),
    ("transforms.json", lambda text: text.replace('"frames"', '"views"'), r"must be a transforms.json with frames"),
    ("transforms.json", lambda text: text[:-5], r"must be a transforms.json with frames"),
    (
        "transforms.json",
        lambda text: text.replace("depth/000003", "depth/3"),
        r"frame 3 names .*3.npy, which is no file",
    ),
    ("transforms.json", lambda text: text.replace('factor": 1.0', 'factor": 0'), r"depth_unit_scale_factor above 0"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BROKEN)
def test_broken_files_are_refused(kind: str, change: Callable[[str], str], message: str, tmp_path: Path, walk: Walk):
    file = EXPORTS[kind](tmp_path, walk)
    file = file / "images.txt" if file.is_dir() else file
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=message):
        read_truth(file.parent if file.name == "images.txt" else file, walk.photos)


@pytest.mark.parametrize("kind", ["TUM, by name", "COLMAP, text"])
def test_a_quaternion_of_no_length_is_refused(kind: str, tmp_path: Path, walk: Walk):
    file = EXPORTS[kind](tmp_path, walk)
    file = file / "images.txt" if file.is_dir() else file
    lines, first = file.read_text().splitlines(), 4 if kind.startswith("TUM") else 1
    fields = lines[1].split()
    lines[1] = " ".join([*fields[:first], "0", "0", "0", "0", *fields[first + 4 :]])
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"must have a quaternion of length 1 .* of length 0 and .*; correct it"):
        read_truth(file.parent if file.name == "images.txt" else file, walk.photos)


def test_a_binary_model_that_is_cut_off_or_too_long(tmp_path: Path, walk: Walk):
    file = walks.as_colmap_binary(tmp_path / "sparse", walk) / "images.bin"
    content = file.read_bytes()
    huge = content.replace(struct.pack("<Q", 3) + struct.pack("<d", 1.5), b"\xff" * 16)  # points of one image
    for damaged in (content[:-3], content[:50], content + b"\0", struct.pack("<Q", 7) + content[8:], huge):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"images.bin must be the images of a COLMAP model"):
            read_truth(file.parent, walk.photos)


def test_what_is_no_truth(tmp_path: Path, walk: Walk):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        read_truth(tmp_path / "nowhere", walk.photos)
    with pytest.raises(ValueError, match=r"must be one of: .*COLMAP.*TUM.*KITTI"):
        read_truth(tmp_path, walk.photos)
    with pytest.raises(ValueError, match=r"must be a trajectory, and is no text"):
        read_truth(walk.photos[0], walk.photos)


class TestDepthMaps:
    @pytest.fixture
    def truth(self, tmp_path: Path, walk: Walk) -> Truth:
        return read_truth(walks.as_kitti(tmp_path / "poses.txt", walk), walk.photos)

    def test_millimetres_by_name(self, tmp_path: Path, walk: Walk, truth: Truth):
        (tmp_path / "depth").mkdir()
        for photo, depth in zip(walk.photos[1:], walk.depth[1:], strict=True):
            levels = (1000 * depth).round().numpy().astype(np.uint16)
            Image.fromarray(levels).save(tmp_path / "depth" / photo.name)
        frames = with_depth_maps(truth, tmp_path / "depth").depth_of_frames(walk.depth.shape[-2:])
        assert not frames[0].any()
        torch.testing.assert_close(frames[1:], walk.depth[1:], atol=5.1e-4, rtol=0)
        twice = with_depth_maps(truth, tmp_path / "depth", 0.002).depth_of_frames(walk.depth.shape[-2:])
        torch.testing.assert_close(twice, 2 * frames)

    def test_refusals(self, tmp_path: Path, walk: Walk, truth: Truth):
        folder = tmp_path / "depth"
        with pytest.raises(ValueError, match=r"must hold depth maps, .* but holds none"):
            with_depth_maps(truth, folder)
        own = read_truth(walks.as_transforms(tmp_path / "transforms.json", walk), walk.photos)
        with pytest.raises(ValueError, match=r"comes with depth maps of its own"):
            with_depth_maps(own, folder)
        np.save(folder / "000000.npy", np.ones((2, 28, 42)))
        with pytest.raises(ValueError, match=re.escape("000000.npy must hold a depth map [H, W]")):
            with_depth_maps(truth, folder).depth_of_frames((28, 42))
        np.save(folder / "000000.npy", np.ones((28, 28)))
        with pytest.raises(
            ValueError, match=r"depth map of .*000000.png: .* 28 x 28 pixels and the upright photo 42 x 28"
        ):
            with_depth_maps(truth, folder).depth_of_frames((28, 42))
        Image.new("I;16", (42, 28)).save(folder / "000000.png")
        with pytest.raises(ValueError, match=r"one depth map a photo, but two are called 000000"):
            with_depth_maps(truth, folder)


def test_a_scale_of_depth_is_that_of_millimetres_unless_given(tmp_path: Path, walk: Walk):
    file = walks.as_transforms(tmp_path / "transforms.json", walk)
    content = json.loads(file.read_text())
    del content["depth_unit_scale_factor"]
    file.write_text(json.dumps(content))
    torch.testing.assert_close(read_truth(file, walk.photos).depth_of_frames((28, 42)), walk.depth / 1000)
