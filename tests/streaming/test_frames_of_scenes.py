"""What comes into a scene and goes out of it: photos, videos, iterators; files, interrupted and gone on with."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import FAMILY, HEIGHT, WIDTH, images
from torch import Tensor

from svggt_kernels import Core, MegaLoc, OpenScene, open_scene, read_outputs
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.scenes import Draws, make_scenes
from svggt_kernels.graph.core import choose_core
from svggt_kernels.io.photos import load_photos
from svggt_kernels.patching.chunks.session import Session
from svggt_kernels.sources.thumbnails import thumbnails
from svggt_kernels.streaming import frames as frames_of_scenes
from svggt_kernels.streaming.apart import Yardstick, likeness_of
from svggt_kernels.streaming.identity import same_frames
from svggt_kernels.streaming.progress import Progress
from svggt_kernels.streaming.transfers import Downloads

FRAMES = images(10, dtype=torch.float32)[0]
CORE = [0, 4, 7]


def scene_of(pictures: object = FRAMES, **options: object) -> OpenScene:
    model = FAMILY["pi3"].create(torch.float32)
    return open_scene(model, pictures, **{"core": CORE, "chunk": 4, "feed": lambda x: x[None], **options})


def write_photos(folder: Path, pictures: Tensor) -> list[Path]:
    from PIL import Image

    paths = [folder / f"{index}.png" for index in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(path)
    return paths


# What comes in


@pytest.mark.parametrize("kind", ["list", "tuple", "iterator", "iterator of parts", "generator"])
def test_frames_come_in_any_form(kind: str):
    expected = scene_of().predict()["output"]
    forms = {
        "list": list(FRAMES),
        "tuple": tuple(FRAMES),
        "iterator": iter(FRAMES),
        "iterator of parts": iter(FRAMES.split(3)),
        "generator": (frame for frame in FRAMES),
    }
    torch.testing.assert_close(scene_of(forms[kind]).predict()["output"], expected)


def test_an_iterator_is_read_once_and_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("svggt_kernels.streaming.opening.BUFFERED", 8)
    read: list[int] = []

    def reading() -> Iterator[Tensor]:
        for index, frame in enumerate(FRAMES.repeat(3, 1, 1, 1)):
            read.append(index)
            yield frame

    scene = scene_of(reading())
    assert len(read) == 8  # among which the core is
    parts = scene.stream()
    first = next(parts)["output"]
    assert len(first) == 4
    assert len(read) <= 8 + 3 * 4  # and not all 30
    rest = torch.cat([first, *(part["output"] for part in parts)])
    assert len(rest) == len(read) == 30
    torch.testing.assert_close(rest[:10], scene_of().predict()["output"])
    torch.testing.assert_close(rest[18], scene_of().add(FRAMES[8:9])["output"][0])
    with pytest.raises(ValueError, match="came from an iterator, which has been read"):
        scene.predict()


def test_the_core_of_an_iterator_is_among_its_first_frames(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("svggt_kernels.streaming.opening.BUFFERED", 6)
    with pytest.raises(ValueError, match="the core must be among 6 frames"):
        scene_of(iter(FRAMES))
    assert max(scene_of(iter(FRAMES), core=Core(3, by="thumbnails")).core) < 6


def test_further_frames_of_another_range_are_refused_and_nan_stays_with_its_frame():
    scene, wrong = scene_of(), FRAMES.clone()
    wrong[5] *= 255
    for given in (wrong, list(wrong), iter(wrong)):
        with pytest.raises(ValueError, match=r"frames must be in \[0, 1\], got values from"):
            scene.add(given)
    wrong[5] = torch.nan
    actual, expected = scene.add(wrong)["output"], scene.add(FRAMES)["output"]
    assert actual[5].isnan().all()
    torch.testing.assert_close(actual[:5], expected[:5])


def test_photos_of_a_folder(tmp_path: Path):
    pictures = make_scenes(1, 6, Draws(seed=0), size=(28, 42)).images[0]
    paths = write_photos(tmp_path, pictures)
    model = RoomsModel.create(0, dim=64, depth=2, num_heads=1)
    frames = load_photos(paths, long_side=42)
    expected = open_scene(model, frames, core=[0, 3], chunk=2).predict()
    for source in (tmp_path, str(tmp_path), paths):
        scene = open_scene(model, source, core=[0, 3], chunk=2, long_side=42)
        torch.testing.assert_close(scene.predict()["depth"], expected["depth"])
    more = tmp_path / "more"
    more.mkdir()
    write_photos(more, torch.nn.functional.interpolate(pictures[4:], scale_factor=3))  # brought to the core's size
    assert scene.add(more)["depth"].shape == (2, 28, 42, 1)


def test_one_warning_for_all_photos_that_are_cropped(tmp_path: Path):
    write_photos(tmp_path, make_scenes(1, 6, Draws(seed=0), size=(28, 42)).images[0])
    (tmp_path / "tall").mkdir()
    write_photos(tmp_path / "tall", torch.rand(2, 3, 84, 28))
    files = sorted(tmp_path.rglob("*.png"))
    model = RoomsModel.create(0, dim=64, depth=2, num_heads=1)
    with pytest.warns(UserWarning, match="2 of 8") as warned:
        open_scene(model, files, core=[0, 3], chunk=2, long_side=42).predict()
    assert len([each for each in warned if "cropped" in str(each.message)]) == 1


def test_a_video(tmp_path: Path):
    av = pytest.importorskip("av", reason="reading videos needs PyAV")
    pictures = make_scenes(1, 12, Draws(seed=0), size=(28, 42)).images[0]
    with av.open(str(tmp_path / "walk.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=2)
        stream.width, stream.height, stream.pix_fmt = 42, 28, "bgr0"
        for picture in pictures:
            pixels = (picture * 255).byte().permute(1, 2, 0).contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    model = RoomsModel.create(0, dim=64, depth=2, num_heads=1)
    scene = open_scene(model, tmp_path / "walk.mkv", core=Core(4, by="thumbnails"), chunk=5, long_side=42)
    assert len(scene.predict()["depth"]) == 12
    assert open_scene(model, tmp_path / "walk.mkv", core=Core(4, by=None), long_side=42).core == (0, 4, 7, 11)


@pytest.mark.parametrize("by", ["thumbnails", "tokens", "patches", None])
def test_the_core_is_that_of_patch(by: str | None):
    import svggt_kernels

    model = FAMILY["pi3"].create(torch.float32)
    scene = scene_of(core=Core(4, by=by))
    with torch.no_grad(), svggt_kernels.patch(model, covisibility=Core(4, by=by)) as handle:
        model(FRAMES[None])
    assert handle.graph.core_frames is not None
    assert list(scene.core) == sorted(handle.graph.core_frames.tolist())


def test_what_is_no_image_is_refused():
    for wrong, kind in ((3, TypeError), (FRAMES.byte(), ValueError), (FRAMES[0], ValueError), ([1, 2], TypeError)):
        with pytest.raises(kind, match="images"):
            scene_of(wrong)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        scene_of("/no/such/folder")


def test_the_next_frames_are_read_while_the_last_are_in_use():
    read: list[int] = []

    def parts(size: int) -> Iterator[Tensor]:
        for index in range(4):
            read.append(index)
            yield torch.full((1,), float(index))

    chunks = frames_of_scenes.Frames(parts, None).chunks(1)
    assert next(chunks) == 0
    begun = time.monotonic()
    while len(read) < 2 and time.monotonic() < begun + 10:
        time.sleep(0.01)
    assert read == [0, 1]  # one ahead, and no more
    assert [float(part) for part in chunks] == [1, 2, 3]


# What goes out


def test_outputs_in_files(tmp_path: Path):
    scene = scene_of()
    expected = scene.predict()
    paths = scene.write(tmp_path / "outputs")
    assert [path.name for path in paths] == [
        "frames-0000000-0000004.npz",
        "frames-0000004-0000008.npz",
        "frames-0000008-0000010.npz",
    ]
    written = read_outputs(paths)
    assert set(written) == set(expected)
    torch.testing.assert_close(written, expected, rtol=0, atol=0)
    for name in ("apart", "output"):
        for names in ([name], iter([name])):  # which can be read once
            assert set(read_outputs(scene.write(tmp_path / name, FRAMES[3:6], names=names))) == {name}
    with pytest.raises(ValueError, match="the outputs are output, apart; there is no depth"):
        scene.write(tmp_path / "wrong", names=["depth"])
    with pytest.raises(ValueError, match="at least one of the outputs output, apart, got none"):
        scene.write(tmp_path / "wrong", names=[])
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("count", [9, 11, 4])
@pytest.mark.parametrize("kind", ["tensor", "iterator"])
def test_files_of_fewer_or_more_frames_are_not_mixed_with_others(tmp_path: Path, count: int, kind: str):
    scene = scene_of()
    scene.write(tmp_path, FRAMES, names=["apart"])
    others = torch.cat([FRAMES, FRAMES])[:count]
    with pytest.raises(ValueError, match=r"are no chunk .*: some were added or taken out"):
        scene.write(tmp_path, others if kind == "tensor" else iter(others), names=["apart"])
    assert len(read_outputs(scene.write(tmp_path, FRAMES, names=["apart"]))["apart"]) == 10


def test_files_are_read_in_the_order_of_their_frames_and_of_one_scene(tmp_path: Path):
    scene = scene_of()
    paths = scene.write(tmp_path / "one")
    expected = read_outputs(tmp_path / "one")
    torch.testing.assert_close(read_outputs(paths[::-1]), expected, rtol=0, atol=0)
    torch.testing.assert_close(read_outputs(paths[1:])["output"], expected["output"][4:], rtol=0, atol=0)
    for some, why in [(paths[::2], "frame 4 must follow"), ([paths[0]] * 2, "frame 4 must follow")]:
        with pytest.raises(ValueError, match=why):
            read_outputs(some)
    other = scene_of(core=[1, 2]).write(tmp_path / "two")
    with pytest.raises(ValueError, match="is of another scene"):
        read_outputs([paths[0], other[1]])
    np.savez(tmp_path / "frames-0-1.npz", a=np.ones(1))
    with pytest.raises(ValueError, match="is no file of outputs"):
        read_outputs(tmp_path / "frames-0-1.npz")
    with pytest.raises(ValueError, match=r"must be called frames-START-STOP\.npz"):
        read_outputs(tmp_path / "depth.npz")


def test_a_frame_of_the_core_that_comes_again_gets_what_the_core_got():
    scene = scene_of()
    expected, again = scene.predict(), scene.add(FRAMES)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    other = FRAMES.clone()
    other[list(scene.core), 0, 1, 1] += 0.5
    assert not torch.equal(scene.add(other)["output"][list(scene.core)], expected["output"][list(scene.core)])


def test_frames_are_the_same_if_all_pixels_are():
    known = torch.rand(3, 3, 40, 40)
    frames = torch.cat([known[[2, 1]], known[:1], torch.rand(1, 3, 40, 40)])
    frames[1, 0, 1, 1] += 0.5  # not among the pixels that are compared first
    assert same_frames(frames, known) == {0: 2, 2: 0}


def test_no_more_outputs_are_copied_than_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scene, copied = scene_of(), []
    begin = Downloads.begin

    def spied(downloads: Downloads[Path], outputs: dict[str, Tensor], *others: object) -> object:
        copied.append(set(outputs))
        return begin(downloads, outputs, *others)

    monkeypatch.setattr(Downloads, "begin", spied)
    paths = scene.write(tmp_path, FRAMES[:6], names=["apart"])
    assert copied == [{"apart"}] * len(paths)


def test_interrupted_finished_chunks_are_kept_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scene = scene_of()
    expected = scene.predict()
    ran: list[int] = []

    def counted(scene: OpenScene, stop: int) -> None:
        run_chunk = scene.session.run_chunk

        def run(reference: Tensor, frames: Tensor) -> dict[str, Tensor]:
            if len(ran) == stop:
                raise KeyboardInterrupt
            ran.append(len(frames))
            return run_chunk(reference, frames)

        monkeypatch.setattr(scene.session, "run_chunk", run)

    counted(scene, 2)
    with pytest.raises(KeyboardInterrupt):
        scene.write(tmp_path)
    assert len(sorted(tmp_path.glob("frames-*.npz"))) == 2
    ran.clear()
    again = scene_of()  # another process would open it again
    counted(again, 9)
    torch.testing.assert_close(read_outputs(again.write(tmp_path)), expected, rtol=0, atol=0)
    assert ran == [2]


def test_files_of_other_scenes_and_frames_are_left_alone(tmp_path: Path):
    scene_of().write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for other in (scene_of(chunk=5), scene_of(core=[0, 4, 8]), scene_of(FRAMES.flip(3))):
        with pytest.raises(ValueError, match="give another folder"):
            other.write(tmp_path)
    with pytest.raises(ValueError, match="holds outputs of other frames"):
        scene_of().write(tmp_path, FRAMES.flip(0))
    (tmp_path / "frames-0000000-0000004.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read as named arrays"):
        scene_of().write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before | {
        tmp_path / "frames-0000000-0000004.npz": b"PK"
    }


def test_a_file_that_cannot_be_written_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", full)
    with pytest.raises(OSError, match="No space left"):
        scene_of().write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_and_estimates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    now = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    progress = Progress("frames", 100)
    progress.add(40, skipped=True)
    progress.add(20)
    assert str(progress) == "frames: 60 of 100 frames, 20 s left"
    scene_of().predict()
    assert capsys.readouterr().err == ""  # no terminal


# Weights that describe frames


def test_weights_are_looked_for_where_frames_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And then before the model runs, or an iterator is read."""

    def from_pretrained(source: str) -> MegaLoc:
        raise FileNotFoundError("out of reach")

    monkeypatch.setattr(MegaLoc, "from_pretrained", from_pretrained)
    write_photos(tmp_path, FRAMES)
    for few, core in ((FRAMES, None), (FRAMES, 10), (tmp_path, None)):
        scene = scene_of(few, core=core, long_side=WIDTH)
        assert scene.core == tuple(range(10))
        assert not scene.add(FRAMES[:3])["apart"].any()
    monkeypatch.setattr(Session, "run_core", None)
    frames = iter(FRAMES)
    for many, core in ((FRAMES, Core(9)), (tmp_path, Core(9)), (frames, None)):
        with pytest.raises(FileNotFoundError, match="out of reach"):
            scene_of(many, core=core)
    assert len(list(frames)) == 10


# Frames that share nothing with the core


def test_frames_of_another_flat_are_told_apart():
    """By the model's confidence alone."""
    frames, other = (make_scenes(1, count, Draws(seed=seed), rooms=1).images[0] for count, seed in ((16, 41), (4, 141)))
    core = choose_core(thumbnails(frames), 8).sort().values.tolist()
    scene = open_scene(RoomsModel.trained(), frames, core=core)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = scene.predict()["apart"]
    assert not own[core].any()
    assert int(own.sum()) <= 2
    with pytest.warns(UserWarning, match="4 of 4 frames may share nothing with the core"):
        assert scene.add(other)["apart"].all()


@pytest.mark.parametrize(
    "core", [Core(8, by="thumbnails"), Core(4, by="thumbnails", coarse=4)], ids=["in full", "some at a stride"]
)
def test_where_all_frames_are_of_the_core_others_like_these_are_not_apart(core: Core):
    """Each of them is like itself; others are compared with how alike the frames of the core are to one another."""
    base = torch.rand(3, HEIGHT, WIDTH)
    alike = (base + 0.1 * torch.rand(8, 3, HEIGHT, WIDTH)).clamp(0, 1)
    assert not scene_of(alike, core=core).add(alike.mean(0, keepdim=True))["apart"].any()


def test_what_is_as_like_as_the_images_among_which_the_core_was_chosen_is_not_apart():
    scene = scene_of(core=Core(3, by="thumbnails"))
    compared = thumbnails(FRAMES)
    least = likeness_of(compared, compared[list(scene.core)]).min()
    assert scene.yardstick.likeness == pytest.approx(float(least))
    assert not scene.add(FRAMES)["apart"].any()


def test_rounding_tells_nothing_apart():
    descriptors = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    assert not Yardstick(None, descriptors, likeness=1.0).apart({"output": descriptors}, descriptors).any()


def test_frames_unlike_every_frame_of_the_core_are_told_apart():
    """By descriptors, where the model states no confidence: the core is alike, the new frame is its negative."""
    base = torch.rand(3, HEIGHT, WIDTH)
    alike = (base + 0.1 * torch.rand(8, 3, HEIGHT, WIDTH)).clamp(0, 1)
    scene = scene_of(alike, core=Core(4, by="thumbnails"))
    assert not scene.predict()["apart"].any()
    with pytest.warns(UserWarning, match="1 of 1 frames may share nothing"):
        assert scene.add(1 - alike[:1])["apart"].tolist() == [True]
