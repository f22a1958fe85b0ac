"""Photos in, reconstruction out: what is finished is kept, what is others' is not touched, errors are evaluation's."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from walks import render, walk

from svggt_kernels import Core, CovisibilityGraph
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.scenes import Draws, make_scenes
from svggt_kernels.io.photos import crop_of
from svggt_kernels.measure.accuracy import trajectory_error
from svggt_kernels.measure.ground_truth import read_truth
from svggt_kernels.measure.layouts import Layout, Reference, run_layouts
from svggt_kernels.models import RUNNABLE
from svggt_kernels.models.loading import ROOMS_WEIGHTS, load_model
from svggt_kernels.reconstruction import PointChoice, Reconstruction, reconstruct
from svggt_kernels.reconstruction.formats import FORMATS
from svggt_kernels.reconstruction.pipeline import _stated_graph
from svggt_kernels.sources import GraphFile, Sequential

CPU = torch.device("cpu")
LIGHT = ("nerfstudio", "ply", "tum", "depth", "depth-npy")
"""Formats that need no package beside those of the tests."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return walk(tmp_path / "walk").photos[0].parent


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the toy small; its weights count as trained."""
    small = RoomsModel.create(5, dim=16, depth=2, num_heads=2)
    kind = dataclasses.replace(RUNNABLE["toy"], trained=lambda path: small, one_size=None, long_side=42)
    monkeypatch.setitem(RUNNABLE, "toy", kind)


def run(photos: Path, output: Path | None, **options: Any) -> Reconstruction:
    settings: dict[str, Any] = {"covisibility": Core(3, by=None), "formats": LIGHT, "device": "cpu"}
    return reconstruct(photos, "toy", output=output, **{**settings, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_times(files: dict[str, bytes]) -> dict[str, Any]:
    """What runs alike write alike: all but how long they took."""
    alike: dict[str, Any] = dict(files)
    report = json.loads(alike.pop("reconstruction.json"))
    del report["facts"]["seconds"], alike["reconstruction.npz"]
    return alike | {"report": report}


def test_the_trajectory_is_as_far_off_as_evaluation_says(tmp_path: Path):
    """On photos of the toy's own size the files hold what the model says, and their error is that of `evaluate`."""
    drawn = make_scenes(1, 10, Draws(2), rooms=2)
    folder = tmp_path / "photos"
    folder.mkdir()
    for place, image in enumerate(drawn.images[0]):
        Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{place}.png")
    scene = run(folder, tmp_path / "out", covisibility=Core(6, by="tokens"))
    assert scene.frame_size == (154, 112)
    assert scene.facts["warning"] == ROOMS_WEIGHTS
    frames = scene.colours.permute(0, 3, 1, 2) / 255
    truth = Reference(drawn.poses[0].double())
    [outcome] = run_layouts(load_model("toy", None, CPU), frames, [Layout("core", "", Core(6, by="tokens"))], truth)
    for file in ("trajectory.txt", "transforms.json"):
        poses = read_truth(tmp_path / "out" / file, scene.photos).poses
        assert trajectory_error(poses, drawn.poses[0]) == pytest.approx(outcome.scores["ate"], abs=1e-5)
    assert 0 < outcome.scores["ate"] < 1
    depth = read_truth(tmp_path / "out/transforms.json", scene.photos).depth_of_frames((112, 154))
    torch.testing.assert_close(depth, scene.depth, atol=float(depth.max()) / 65535, rtol=0)


def test_photos_are_fitted_to_a_model_of_one_size(tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for place, size in enumerate([(300, 200), (200, 300), (308, 224)]):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{place}.png")
    with pytest.warns(
        UserWarning, match=r"1 of 3, because the model has learned frames of 154 x 112 px alone: .*1\.png"
    ):
        scene = run(folder, None)
    assert scene.colours.shape == (3, 112, 154, 3)
    assert scene.crops == [crop_of(size, (154, 112)) for size in [(300, 200), (200, 300), (308, 224)]]
    assert scene.crops[2] == (0, 0, 2)
    for camera, size, intrinsics in zip(scene.cameras, scene.sizes, scene.intrinsics, strict=True):
        assert camera.size == size
        assert camera.intrinsics[:2, 2].tolist() == pytest.approx([size[0] / 2, size[1] / 2])
        scale = min(size[0] / 154, size[1] / 112)
        assert camera.intrinsics[0, 0] == pytest.approx(float(scale * intrinsics[0, 0]))


@pytest.mark.usefixtures("tiny")
class TestFolder:
    def test_what_is_finished_is_not_done_again(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = run(photos, tmp_path / "out", formats=["tum"])
        before = contents(tmp_path / "out")
        self.forbid_models(monkeypatch)
        again = run(photos, tmp_path / "out", formats=["tum", "ply"])
        assert torch.equal(again.depth, first.depth)
        assert again.photos == first.photos
        after = contents(tmp_path / "out")
        assert set(after) - set(before) == {"points.ply"}
        assert all(after[name] == content for name, content in before.items() if name != "reconstruction.json")

    def test_a_word_asks_for_what_its_source_does(self) -> None:
        assert _stated_graph("patches") == _stated_graph(Core(by="patches")) != _stated_graph("core")

    def test_a_folder_is_loaded_and_shown_in_a_line(self, photos: Path, tmp_path: Path) -> None:
        run(photos, tmp_path / "out")
        assert repr(Reconstruction.load(tmp_path / "out")).startswith("Reconstruction(6 photos of ")

    @staticmethod
    def forbid_models(monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: object) -> None:
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("svggt_kernels.reconstruction.pipeline.load_model", refuse)

    @pytest.mark.parametrize(
        ("options", "difference"),
        [
            (
                {"covisibility": "all"},
                r'another graph \("a core of 3 frames at equal distances", now "every frame sees every other"\)',
            ),
            ({"max_frames": 4}, "another photos"),
            ({"long_side": 28}, r"another long_side \(null, now 28\)"),
            (
                {"covisibility": CovisibilityGraph.sequential(6, 1).symmetrized()},
                'another graph .* now "a given graph, ',
            ),
        ],
        ids=["graph", "frames", "size", "given"],
    )
    def test_another_reconstruction_is_refused(
        self, photos: Path, tmp_path: Path, options: dict[str, Any], difference: str
    ) -> None:
        run(photos, tmp_path / "out")
        before = contents(tmp_path / "out")
        with pytest.raises(FileExistsError, match=f"holds a reconstruction of {difference}.*; give --force"):
            run(photos, tmp_path / "out", **options)
        assert contents(tmp_path / "out") == before
        forced = run(photos, tmp_path / "out", **options, formats=["tum"], force=True)
        assert set(contents(tmp_path / "out")) == {"reconstruction.npz", "reconstruction.json", "trajectory.txt"}
        assert torch.equal(Reconstruction.load(tmp_path / "out/reconstruction.npz").depth, forced.depth)

    def test_a_photo_that_changed_is_another(self, photos: Path, tmp_path: Path) -> None:
        run(photos, tmp_path / "out")
        Image.new("RGB", (42, 28)).save(photos / "000002.png")
        with pytest.raises(FileExistsError, match="another photos"):
            run(photos, tmp_path / "out")

    def test_exports_with_other_points_are_refused(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(photos, tmp_path / "out")
        before = contents(tmp_path / "out")
        self.forbid_models(monkeypatch)
        fewer = PointChoice(max_points=50)
        with pytest.raises(FileExistsError, match=r"holds ply of another max_points \(1000000, now 50\)"):
            run(photos, tmp_path / "out", points=fewer)
        assert contents(tmp_path / "out") == before
        run(photos, tmp_path / "out", points=fewer, force=True)
        assert b"element vertex 50\n" in (tmp_path / "out/points.ply").read_bytes()

    @pytest.mark.parametrize("name", ["points.ply", "depth/of_somebody.png"])
    def test_files_of_others_are_not_written_over(self, photos: Path, tmp_path: Path, name: str) -> None:
        file = tmp_path / "out" / name
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        with pytest.raises(FileExistsError, match="is there and was not written by this"):
            run(photos, tmp_path / "out")
        assert contents(tmp_path / "out") == {name: b"mine"}

    def test_a_damaged_run_is_refused(self, photos: Path, tmp_path: Path) -> None:
        run(photos, tmp_path / "out")
        (tmp_path / "out/reconstruction.npz").write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"must be a reconstruction as .* give --force"):
            run(photos, tmp_path / "out")
        run(photos, tmp_path / "out", force=True)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
    @pytest.mark.parametrize("stage", ["predict", "save", "first export", "second depth map", "report"])
    def test_whatever_stops_it_nothing_finished_is_lost(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
    ) -> None:
        run(photos, tmp_path / "whole")
        expected = without_times(contents(tmp_path / "whole"))
        with monkeypatch.context() as broken:
            break_at(stage, error, broken)
            with pytest.raises(type(error)):
                run(photos, tmp_path / "out")
        left = contents(tmp_path / "out") if (tmp_path / "out").exists() else {}
        assert not [name for name in left if name.endswith(".part")]
        assert ("reconstruction.npz" in left) == (stage not in ("predict", "save"))
        for name, content in left.items():
            assert name.startswith("reconstruction.") or content == expected[name]
        if "reconstruction.npz" in left:
            self.forbid_models(monkeypatch)
        run(photos, tmp_path / "out")
        assert without_times(contents(tmp_path / "out")) == expected

    @pytest.mark.parametrize("file", ["../mine.txt", "depth/../../mine.txt", "mine.txt"])
    def test_a_report_that_names_files_of_others_removes_none(self, photos: Path, tmp_path: Path, file: str) -> None:
        run(photos, tmp_path / "out", formats=["depth"])
        mine = [tmp_path / "mine.txt", tmp_path / "out/mine.txt"]
        for kept in mine:
            kept.write_text("mine")
        report = json.loads((tmp_path / "out/reconstruction.json").read_text())
        report["exports"]["depth"]["files"].append(file)
        (tmp_path / "out/reconstruction.json").write_text(json.dumps(report))
        run(photos, tmp_path / "out", formats=["depth"], covisibility="all", force=True)
        assert all(kept.read_text() == "mine" for kept in mine)

    def test_a_forced_run_that_fails_leaves_the_one_before(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(photos, tmp_path / "out")
        before = contents(tmp_path / "out")
        break_at("save", OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
        with pytest.raises(OSError, match="No space left"):
            run(photos, tmp_path / "out", covisibility="all", force=True)
        assert contents(tmp_path / "out") == before

    def test_the_report_says_what_became_of_each_photo(self, photos: Path, tmp_path: Path) -> None:
        scene = run(photos, tmp_path / "out", long_side=28)
        report = json.loads((tmp_path / "out/reconstruction.json").read_text())
        assert [photo["name"] for photo in report["photos"]] == [photo.name for photo in scene.photos]
        left, top, scale = crop_of((42, 28), scene.frame_size)
        assert report["photos"][0]["crop"] == {"left": left, "top": top, "scale": scale}
        assert report["frame"] == {"width": 28, "height": 14}
        assert report["photos"][0]["lost"] == pytest.approx(0.25)
        assert set(report["exports"]) == set(LIGHT)
        assert report["facts"]["token_density"] < 1


def break_at(stage: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a call of `run` end with this error at that stage."""

    def failing(*arguments: object, **more: object) -> None:
        raise error

    if stage == "predict":
        monkeypatch.setattr("svggt_kernels.reconstruction.pipeline.predict", failing)
        return
    if stage == "save":
        write = np.savez

        def in_part(file: Any, **arrays: object) -> None:
            file.write(b"half of it")
            raise error

        assert write is not None
        monkeypatch.setattr(np, "savez", in_part)
        return
    wanted: Callable[[str], bool] = {
        "first export": lambda name: "transforms.json" in name,
        "second depth map": lambda name: "000001.png" in name,
        "report": lambda name: "reconstruction.json" in name,
    }[stage]
    write_bytes = Path.write_bytes

    def until(path: Path, content: bytes) -> int:
        if wanted(path.name):
            write_bytes(path, content[:3])
            raise error
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", until)


class TestRefusals:
    def test_random_weights_have_to_be_said(self, photos: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"da3-small needs weights: a file, .*DA3-SMALL, or random to try"):
            reconstruct(photos, "da3-small", output=tmp_path / "out", covisibility="all")
        assert not (tmp_path / "out").exists()

    def test_said_they_run_and_warn(self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        small = dataclasses.replace(RUNNABLE["toy"], build=lambda: RoomsModel(dim=16, depth=2, num_heads=2))
        monkeypatch.setitem(RUNNABLE, "toy", small)
        scene = run(photos, None, weights="random", covisibility="all")
        assert scene.facts["weights"] == "random, seed 0"
        assert scene.facts["warning"].startswith("The weights are random")

    def test_a_model_that_is_not_known(self, photos: Path) -> None:
        with pytest.raises(ValueError, match=r"the model must be one of .*, got gpt"):
            reconstruct(photos, "gpt", covisibility="all")

    def test_weights_beside_a_loaded_model(self, photos: Path) -> None:
        with pytest.raises(ValueError, match="leave weights out"):
            reconstruct(photos, load_model("toy", None, CPU), weights="random", covisibility="all")

    def test_a_format_that_is_not_known(self, photos: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"formats must be among colmap, .*, got obj"):
            run(photos, tmp_path / "out", formats=["obj"])

    @pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.needs])
    def test_a_format_whose_package_is_missing(
        self, photos: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svggt_kernels.reconstruction.formats.base.find_spec", lambda module: None)
        with pytest.raises(ImportError, match=r"which is not installed: pip install 'svggt-kernels\["):
            run(photos, tmp_path / "out", formats=[name])

    def test_mirrored_photos(self, photos: Path) -> None:
        file = photos / "000003.png"
        exif = Image.Exif()
        exif[0x0112] = 2
        with Image.open(file) as image:
            image.load()
        image.save(file, exif=exif)
        with pytest.raises(ValueError, match=r"1 of 6 are \(first .*000003\.png: EXIF orientation 2\)"):
            run(photos, None)

    def test_a_function_as_covisibility(self, photos: Path) -> None:
        with pytest.raises(TypeError, match="a word, a source or one graph"):
            run(photos, None, covisibility=lambda images: CovisibilityGraph.all_visible(6))

    def test_an_output_that_is_a_file(self, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "out").touch()
        with pytest.raises(FileExistsError, match=r"the output must be a folder, but .*out is a file"):
            run(photos, tmp_path / "out")

    def test_cameras_that_are_not_finite(self, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = RoomsModel.create(5, dim=16, depth=2, num_heads=2)
        with torch.no_grad():
            broken.camera_head.requires_grad_(False)
            for parameter in broken.camera_head.parameters():
                parameter.fill_(torch.nan)
        monkeypatch.setitem(RUNNABLE, "toy", dataclasses.replace(RUNNABLE["toy"], trained=lambda path: broken))
        with pytest.raises(ValueError, match="must be finite with focal lengths above 0, but that of frame 0 is not"):
            run(photos, None)

    @pytest.mark.parametrize(
        "choice", [{"max_points": 0}, {"least_confident": 1.0}, {"least_confident": -0.1}], ids=str
    )
    def test_points_that_are_none(self, choice: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="max_points must be at least 1 and least_confident in"):
            PointChoice(**choice)


class TestVideo:
    @pytest.fixture
    def video(self, tmp_path: Path) -> Path:
        av = pytest.importorskip("av", reason="PyAV is not installed")
        images, _, _ = render(6, (56, 84))
        path = tmp_path / "walk.mp4"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
            for image in images:
                pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                for packet in stream.encode(frame):
                    file.mux(packet)
            for packet in stream.encode():
                file.mux(packet)
        return path

    @pytest.mark.usefixtures("tiny")
    def test_frames_become_photos(self, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scene = run(video, tmp_path / "out", frames_per_second=4.0)
        frames = sorted((tmp_path / "out/images").glob("*.jpg"))
        assert scene.photos == frames
        assert scene.sizes[0] == (84, 56)
        assert scene.times == tuple(0.25 * place for place in range(len(frames)))
        lines = (tmp_path / "out/trajectory.txt").read_text().splitlines()[1:]
        assert [float(line.split()[0]) for line in lines] == list(scene.times)
        held = json.loads((tmp_path / "out/transforms.json").read_text())
        assert held["frames"][0]["file_path"] == "images/frame_000001.jpg"

        def refuse(*arguments: object, **more: object) -> None:
            raise AssertionError("the video was read again")

        monkeypatch.setattr("svggt_kernels.reconstruction.photos.kept_pictures", refuse)
        again = run(video, tmp_path / "out", frames_per_second=4.0)
        assert again.times == scene.times
        with pytest.raises(FileExistsError, match=r"another frames_per_second \(4.0, now 2.0\)"):
            run(video, tmp_path / "out")

    @pytest.mark.usefixtures("tiny")
    def test_one_that_was_stopped_is_taken_anew(
        self, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as broken:
            write_bytes = Path.write_bytes

            def until(path: Path, content: bytes) -> int:
                if "frame_000003" in path.name:
                    raise KeyboardInterrupt
                return write_bytes(path, content)

            broken.setattr(Path, "write_bytes", until)
            with pytest.raises(KeyboardInterrupt):
                run(video, tmp_path / "out")
        scene = run(video, tmp_path / "out", frames_per_second=4.0)
        assert len(scene.photos) == len(list((tmp_path / "out/images").glob("*.jpg")))

    def test_photos_of_others_are_not_written_over(self, video: Path, tmp_path: Path) -> None:
        (tmp_path / "out/images").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "out/images/frame_000001.jpg")
        with pytest.raises(FileExistsError, match="holds photos that are not frames of"):
            run(video, tmp_path / "out", force=True)

    def test_it_needs_an_output(self, video: Path) -> None:
        with pytest.raises(ValueError, match="give an output folder for them"):
            run(video, None)


def test_sources_have_names_of_their_own(photos: Path):
    assert run(photos, None, covisibility=Sequential(1)).request["graph"] == Sequential(1).label


def test_a_graph_of_a_file_says_who_sees_whom(photos: Path, tmp_path: Path):
    (tmp_path / "pairs.txt").write_text("000001.png 000002.png\n000003.png 000004.png\n")
    with pytest.warns(UserWarning, match=r"does not know 2 of the 6 images"):
        scene = run(photos, tmp_path / "out", covisibility=GraphFile(tmp_path / "pairs.txt"))
    expected = torch.eye(6, dtype=torch.bool)
    expected[0] = expected[:, 0] = expected[1, 2] = expected[2, 1] = expected[3, 4] = expected[4, 3] = True
    assert torch.equal(scene.graph.to_dense(), expected)
    again = run(photos, tmp_path / "again", covisibility=GraphFile(tmp_path / "out/reconstruction.npz"))
    assert torch.equal(again.graph.to_dense(), expected)
    (tmp_path / "pairs.txt").write_text("000001.png 000002.png\n")
    with pytest.raises(FileExistsError, match="another graph"):
        run(photos, tmp_path / "out", covisibility=GraphFile(tmp_path / "pairs.txt"))


@pytest.mark.usefixtures("tiny")
def test_frames_that_are_seen_coarsely_are_seen(photos: Path):
    source = Core(2, by=None, coarse=2, stride=2)
    scene = run(photos, None, covisibility=source, long_side=84)
    dense = scene.graph.to_dense()
    assert dense.all(0).sum() == 4
    assert scene.request["graph"] == source.label
    assert scene.facts["token_density"] < 1
