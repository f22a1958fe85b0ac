"""What is written is read again by others, and each point lies where another photo that sees it shows it."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes_in_files import FRAMES, PHOTO, Exact, exact_walk, ply_vertices

from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.measure.accuracy import depth_errors
from svggt_kernels.measure.ground_truth import read_truth
from svggt_kernels.reconstruction import PointChoice, Reconstruction
from svggt_kernels.reconstruction.formats import FORMATS, Material
from svggt_kernels.reconstruction.points import sightings
from svggt_kernels.sources import from_colmap

HALF_A_PIXEL = 0.5
ROUNDING = 0.05  # of the renderer's float32, in pixels

TURNED = (1, 3, 6, 8, 1, 6)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    return exact_walk(tmp_path_factory.mktemp("upright") / "photos")


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    return exact_walk(tmp_path_factory.mktemp("turned") / "photos", TURNED)


def export(scene: Reconstruction, folder: Path, *names: str) -> Path:
    material = Material(scene, PointChoice(max_points=4000, least_confident=0.0), folder, names)
    for name in names:
        for group in FORMATS[name].write(material):
            for file, content in group.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
    return folder


def upright(pixels: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Pixels of a stored photo of that width and height as pixels of the upright one."""
    (x, y), (width, height) = pixels.T, size
    turned = {1: (x, y), 3: (width - x, height - y), 6: (height - y, x), 8: (y, width - x)}[orientation]
    return np.stack(turned, 1)


def check_model(folder: Path, exact: Exact) -> None:
    """Compares a model of COLMAP, as pycolmap reads it, with rays that the renderer casts."""
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    model, scene = pycolmap.Reconstruction(folder), exact.scene
    assert model.num_images() == model.num_reg_images() == FRAMES
    assert model.compute_mean_reprojection_error() < 1e-3
    images = {image.image_id: image for image in model.images.values()}
    assert {image.name for image in images.values()} == set(scene.names)
    pairs: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for point in model.points3D.values():
        seen = {element.image_id: element.point2D_idx for element in point.track.elements}
        for one, other in ((one, other) for one in seen for other in seen if one != other):
            observed = [images[image].points2D[seen[image]].xy for image in (one, other)]
            pairs.setdefault((one, other), []).append((point.xyz, *observed))
    assert sum(map(len, pairs.values())) > 5000
    for (one, other), found in pairs.items():
        xyz, first, second = (np.stack(part) for part in zip(*found, strict=True))
        places = [scene.names.index(images[image].name) for image in (one, other)]
        sizes = [(images[image].camera.width, images[image].camera.height) for image in (one, other)]
        first, second = (
            upright(pixels, size, scene.orientations[place])
            for pixels, size, place in zip((first, second), sizes, places, strict=True)
        )
        projected = upright(
            np.stack([images[other].project_point(point) for point in xyz]), sizes[1], scene.orientations[places[1]]
        )
        assert np.abs(projected - second).max() < 1e-3
        true = exact.pixels(places[1], exact.hit(places[0], torch.from_numpy(first))).numpy()
        # A ray through a rounded pixel may pass an edge that the exact one hits.
        distance = np.linalg.norm(projected - true, axis=1)
        assert np.quantile(distance, 0.99) < ROUNDING
        assert (distance < HALF_A_PIXEL).mean() > 0.99


@pytest.mark.parametrize(("form", "folder"), [("colmap", "sparse/0"), ("colmap-text", "sparse-text/0")])
def test_points_of_a_colmap_model_lie_where_another_photo_shows_them(
    form: str, folder: str, exact: Exact, tmp_path: Path
):
    pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    check_model(export(exact.scene, tmp_path, form) / folder, exact)


def test_cameras_are_those_of_the_photos_as_they_are_stored(turned: Exact, tmp_path: Path):
    pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    check_model(export(turned.scene, tmp_path, "colmap") / "sparse/0", turned)


def depth_of_the_toy(scene: Reconstruction) -> torch.Tensor:
    """What the trained toy takes for depth, by one scale, over true depth."""
    with torch.inference_mode():
        depth = RoomsModel.trained()(scene.colours.permute(0, 3, 1, 2) / 255)["depth"][0, ..., 0]
    return depth * depth_errors(depth, scene.depth).scale / scene.depth


@pytest.mark.parametrize("depth", ["made", "of the toy"])
def test_points_are_off_by_what_the_depth_is_off(depth: str, exact: Exact, tmp_path: Path):
    """A point moves along the ray of its pixel as far as its depth is wrong, and nothing else moves it."""
    wrong = depth_of_the_toy(exact.scene)
    if depth == "made":
        wrong = torch.linspace(0.9, 1.1, wrong[0].numel()).view_as(wrong[0]).expand_as(wrong)
    assert (wrong - 1).abs().mean() > 0.03
    scene = dataclasses.replace(exact.scene, depth=exact.scene.depth * wrong)
    written = torch.tensor(ply_vertices((export(scene, tmp_path, "ply") / "points.ply").read_bytes())[0])
    cloud = Material(scene, PointChoice(4000, 0.0), tmp_path, ()).cloud
    for place, camera in enumerate(scene.cameras):
        mine = cloud.frames == place
        column, row = cloud.pixels[mine].long().unbind(1)
        eye = scene.poses[place, :3, 3]
        in_photo = cloud.pixels[mine] @ camera.of_frame[:, :2].mT + camera.of_frame[:, 2]
        moved = eye + wrong[place, row, column].double()[:, None] * (exact.hit(place, in_photo) - eye)
        for other in range(FRAMES):
            seen, depth = scene.cameras[other].pixels(written[mine])
            true = exact.pixels(other, moved)
            inside = (depth > 0.2) & (true > 0).all(1) & (true < torch.tensor(PHOTO)).all(1)
            if other == place:
                assert inside.all()
            distance = (seen - true)[inside].norm(dim=1)
            assert (distance < ROUNDING).double().mean() > 0.99 or not inside.any()


def test_points_that_photos_share_are_a_graph(exact: Exact, tmp_path: Path):
    pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    folder, scene = export(exact.scene, tmp_path, "colmap"), exact.scene
    graph = from_colmap(folder / "sparse/0", scene.names)
    point, photo, _ = sightings(scene, Material(scene, PointChoice(4000, 0.0), tmp_path, ()).cloud)
    seen = torch.zeros(4000, FRAMES, dtype=torch.int64)
    seen[point, photo] = 1
    shared = seen.mT @ seen >= 15
    assert shared.sum() > FRAMES
    assert torch.equal(graph.to_dense(), shared)


def check_cameras(path: Path, scene: Reconstruction, name: str) -> None:
    truth = read_truth(path, scene.photos)
    assert truth.known == list(range(FRAMES)), name
    torch.testing.assert_close(truth.poses, scene.poses, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("colmap", "sparse/0"),
        ("colmap-text", "sparse-text/0"),
        ("nerfstudio", "transforms.json"),
        ("tum", "trajectory.txt"),
    ],
)
def test_the_readers_of_truth_read_the_same_cameras(form: str, file: str, exact: Exact, tmp_path: Path):
    if not FORMATS[form].is_available:
        pytest.skip(f"{FORMATS[form].needs} is not installed")
    check_cameras(export(exact.scene, tmp_path, form) / file, exact.scene, form)


def test_transforms_hold_the_pinhole_of_each_photo_and_its_depth(exact: Exact, tmp_path: Path):
    folder = export(exact.scene, tmp_path, "nerfstudio", "depth", "ply")
    held = json.loads((folder / "transforms.json").read_text())
    fx, fy, cx, cy = exact.camera.tolist()
    for photo, frame in zip(exact.scene.photos, held["frames"], strict=True):
        assert (folder / frame["file_path"]).samefile(photo)
        assert (frame["w"], frame["h"]) == (200, 126)
        assert [frame[name] for name in ("fl_x", "fl_y", "cx", "cy")] == pytest.approx([fx, fy, cx + 0.5, cy + 0.5])
    assert (folder / held["ply_file_path"]).is_file()
    truth = read_truth(folder / "transforms.json", exact.scene.photos)
    depth = truth.depth_of_frames(exact.scene.depth.shape[1:])
    step = held["depth_unit_scale_factor"]
    same = (depth - exact.scene.depth).abs() <= 0.51 * step
    assert same.float().mean() > 1 - 1.5 / 84  # the frame begins between two pixels: one of 84 columns is not read


@pytest.mark.parametrize("form", ["depth", "depth-npy"])
def test_depth_maps_show_what_the_stored_photos_show(form: str, turned: Exact, tmp_path: Path):
    from PIL import Image

    folder = export(turned.scene, tmp_path, form)
    for place, photo in enumerate(turned.scene.photos):
        if form == "depth":
            depth = np.array(Image.open(folder / form / f"{photo.stem}.png"), np.float64)
            depth *= Material(turned.scene, PointChoice(), folder, ()).depth_step
        else:
            depth = np.load(folder / form / f"{photo.stem}.npy").astype(np.float64)
        with Image.open(photo) as image:
            width, height = image.size
        assert abs(depth.shape[1] / depth.shape[0] * height / width - 1) < 0.02
        rows, columns = np.nonzero(depth)
        scale = width / depth.shape[1], height / depth.shape[0]
        pixels = np.stack([(columns + 0.5) * scale[0], (rows + 0.5) * scale[1]], 1)
        size = (width, height)
        points = turned.hit(place, torch.from_numpy(upright(pixels, size, turned.scene.orientations[place])))
        pose = turned.scene.poses[place]
        true = ((points - pose[:3, 3]) @ pose[:3, :3])[:, 2].numpy()
        assert np.median(np.abs(depth[rows, columns] / true - 1)) < 0.01
        assert 0.6 < len(rows) / depth.size < 0.8  # the crop has lost a quarter


def test_points_of_a_ply(exact: Exact, tmp_path: Path):
    content = (export(exact.scene, tmp_path, "ply") / "points.ply").read_bytes()
    points, colours = ply_vertices(content)
    cloud = Material(exact.scene, PointChoice(4000, 0.0), tmp_path, ()).cloud
    np.testing.assert_allclose(points, cloud.points.numpy(), atol=1e-5)
    assert np.array_equal(colours, cloud.colours.numpy())
    assert len(points) == 4000


def test_others_read_the_ply_and_the_glb(exact: Exact, tmp_path: Path):
    trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")
    folder = export(exact.scene, tmp_path, "ply", "glb")
    points, colours = ply_vertices((folder / "points.ply").read_bytes())
    held = trimesh.load(io.BytesIO((folder / "points.ply").read_bytes()), file_type="ply")
    np.testing.assert_allclose(held.vertices, points, atol=1e-6)
    assert np.array_equal(held.colors[:, :3], colours)
    drawn = trimesh.load(folder / "points.glb")
    np.testing.assert_allclose(drawn.geometry["points"].vertices, points * [1, -1, -1], atol=1e-5)
    assert np.array_equal(drawn.geometry["points"].colors[:, :3], colours)
    tops = drawn.geometry["cameras"].vertices.reshape(FRAMES, 5, 3)[:, 0]
    np.testing.assert_allclose(tops, exact.scene.poses[:, :3, 3] * torch.tensor([1, -1, -1]), atol=1e-5)


def test_the_times_of_a_trajectory(exact: Exact, tmp_path: Path):
    scene = dataclasses.replace(exact.scene, times=tuple(0.5 * place for place in range(FRAMES)))
    lines = (export(scene, tmp_path, "tum") / "trajectory.txt").read_text().splitlines()[1:]
    assert [float(line.split()[0]) for line in lines] == list(scene.times or ())


def test_photos_of_one_stem_have_depth_maps_of_their_own(exact: Exact, tmp_path: Path):
    names = ("a/1.png", "a/1.jpg", "b/1.png", "2.png", "3.png", "4.png")
    folder = export(dataclasses.replace(exact.scene, names=names), tmp_path, "depth")
    files = {file.relative_to(folder / "depth").as_posix() for file in (folder / "depth").rglob("*.png")}
    assert files == {"a/1.png.png", "a/1.jpg.png", "b/1.png", "2.png", "3.png", "4.png"}


def test_what_is_saved_is_loaded(exact: Exact, tmp_path: Path):
    scene = dataclasses.replace(exact.scene, facts={"model": "toy"}, request={"photos": [1]}, times=(0.0,) * FRAMES)
    scene.save(tmp_path / "scene.npz")
    again = Reconstruction.load(tmp_path / "scene.npz")
    for field in dataclasses.fields(scene):
        held, read = getattr(scene, field.name), getattr(again, field.name)
        if isinstance(held, torch.Tensor):
            assert torch.equal(held, read), field.name
        elif field.name == "graph":
            assert torch.equal(held.to_dense(), read.to_dense())
        else:
            assert held == read, field.name


@pytest.mark.parametrize("spoil", ["text", "half", "array", "other"])
def test_what_is_no_saved_reconstruction_is_refused(spoil: str, exact: Exact, tmp_path: Path):
    file = tmp_path / "scene.npz"
    exact.scene.save(file)
    if spoil == "text":
        file.write_text("no archive")
    elif spoil == "half":
        file.write_bytes(file.read_bytes()[:-500])
    elif spoil == "array":
        with file.open("wb") as opened:
            np.save(opened, np.ones(3))
    else:
        np.savez(file, poses=np.ones(3))
    with pytest.raises(ValueError, match="must be a reconstruction as Reconstruction\\.save writes it"):
        Reconstruction.load(file)
