"""Photos in chunks: what one run gives, finished chunks kept, and one forward where there is nothing to divide."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from walks import render

from svggt_kernels import CoarseGraph, Core, CovisibilityGraph
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.scenes import Draws, make_scenes
from svggt_kernels.graph import united
from svggt_kernels.measure.accuracy import trajectory_error
from svggt_kernels.measure.ground_truth import read_truth
from svggt_kernels.models import RUNNABLE
from svggt_kernels.models.cameras import poses_of_encoding
from svggt_kernels.models.loading import load_model
from svggt_kernels.patching import patch
from svggt_kernels.patching.chunks.session import Session
from svggt_kernels.reconstruction import Reconstruction, reconstruct
from svggt_kernels.sources import GraphFile, graph_bytes
from svggt_kernels.streaming import open_scene
from svggt_kernels.streaming.apart import Yardstick
from svggt_kernels.streaming.outputs import OutputFolder

CORE = Core(3, by="thumbnails")
CHUNKED = ("frames-0000000-0000004.npz", "frames-0000004-0000008.npz", "frames-0000008-0000010.npz")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten photos."""
    return written(render(10)[0], tmp_path / "photos")


def written(images: Tensor, folder: Path) -> Path:
    folder.mkdir()
    for place, image in enumerate(images):
        pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{place:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the toy small, with a camera head in which attention matters; its weights count as trained."""
    if "photos" not in request.fixturenames:
        return
    small = RoomsModel.create(5, dim=16, depth=2, num_heads=2)
    with torch.no_grad():
        for block in small.camera_head.trunk:
            block.attn.q_norm.weight.fill_(3.0)
        small.camera_head.camera.weight.mul_(20)
    kind = dataclasses.replace(RUNNABLE["toy"], trained=lambda path: small, one_size=None, long_side=42)
    monkeypatch.setitem(RUNNABLE, "toy", kind)


def run(photos: Path, output: Path | None, **options: Any) -> Reconstruction:
    settings: dict[str, Any] = {"covisibility": CORE, "formats": ("tum", "ply", "depth"), "device": "cpu", "chunk": 4}
    return reconstruct(photos, "toy", output=output, **{**settings, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def finished_chunks(output: Path) -> list[str]:
    return sorted(file.name for file in (output / "chunks").glob("frames-*"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames beside the reference ran in each chunk, the trial's three among them."""
    sizes: list[int] = []
    own = Session._run_chunk

    def counting(session: Session, reference: Tensor, frames: Tensor, sees_itself: tuple[bool, ...]) -> Any:
        sizes.append(len(frames))
        return own(session, reference, frames, sees_itself)

    monkeypatch.setattr(Session, "_run_chunk", counting)
    return sizes


def interrupted(photos: Path, output: Path, chunks: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Run until so many chunks are written, and be interrupted at the next."""
    write, places = OutputFolder.write, iter(range(chunks))

    def until(folder: OutputFolder, *arguments: Any) -> Path:
        if next(places, None) is None:
            raise KeyboardInterrupt
        return write(folder, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(OutputFolder, "write", until)
        with pytest.raises(KeyboardInterrupt):
            run(photos, output, **options)


def alike(actual: Reconstruction, expected: Reconstruction) -> None:
    for name in ("poses", "intrinsics", "depth", "confidence"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(actual.colours, expected.colours)
    assert torch.equal(actual.graph.to_dense(), expected.graph.to_dense())


@pytest.mark.parametrize("output", ["out", None])
def test_the_size_of_chunks_changes_nothing(photos: Path, tmp_path: Path, output: str | None) -> None:
    folder = None if output is None else tmp_path / output
    chunked, whole = run(photos, folder, chunk=2), run(photos, None, chunk=10)
    alike(chunked, whole)
    assert chunked.facts["chunk"] == 2
    if folder is not None:
        alike(Reconstruction.load(folder / "reconstruction.npz"), chunked)
        assert not (folder / "chunks").exists()


def test_it_differs_from_one_forward_in_what_the_camera_head_sees_alone(photos: Path) -> None:
    chunked, joint = run(photos, None), run(photos, None, chunk=None)
    torch.testing.assert_close(chunked.depth, joint.depth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chunked.confidence, joint.confidence, rtol=1e-4, atol=1e-5)
    assert torch.equal(chunked.graph.to_dense(), joint.graph.to_dense())
    for fact in ("frame_density", "token_density", "backend", "weights"):
        assert chunked.facts[fact] == joint.facts[fact]
    assert (chunked.poses - joint.poses).abs().max() > 1e-3


def test_the_trajectory_is_as_far_off_as_that_of_a_scene(tmp_path: Path) -> None:
    """In chunks the error is that of `open_scene`, and near that of `evaluate`, which runs one forward."""
    drawn = make_scenes(1, 10, Draws(2), rooms=2)
    photos = written(drawn.images[0], tmp_path / "photos")
    scene = run(photos, tmp_path / "out", covisibility=Core(6, by="thumbnails"), formats=["tum"])
    model, frames = load_model("toy", None, torch.device("cpu")), scene.colours.permute(0, 3, 1, 2) / 255
    core = scene.graph.core_frames
    assert core is not None
    expected = poses_of_encoding(open_scene(model.module, frames, core=core.tolist(), chunk=10).predict())
    with patch(model.module, covisibility=CovisibilityGraph.core(10, core)):
        joint = poses_of_encoding(model(frames))
    errors = [trajectory_error(poses, drawn.poses[0]) for poses in (expected, joint)]
    poses = read_truth(tmp_path / "out/trajectory.txt", scene.photos).poses
    assert trajectory_error(poses, drawn.poses[0]) == pytest.approx(errors[0], abs=1e-5)
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.parametrize("by", [None, "thumbnails", "patches"])
def test_progress_is_told(photos: Path, by: Any) -> None:
    told: list[str] = []

    @contextmanager
    def stage(what: str) -> Iterator[Any]:
        yield told.append

    run(photos, None, covisibility=Core(3, by=by), stage=stage)
    described = [] if by is None else ["descriptors: 10 of 10 frames, 0 s left"]
    counted = [line for line in told if line.startswith(("descriptors", "outputs"))]
    assert [line.split(",")[0] for line in counted] == [
        *(line.split(",")[0] for line in described),
        *(f"outputs: {done} of 10 frames" for done in (4, 8, 10)),
    ]


@pytest.mark.parametrize("size", [10, 12])
def test_no_more_photos_than_the_core_run_in_one_forward(photos: Path, runs: list[int], size: int) -> None:
    core = Core(size, by=None)
    chunked, joint = run(photos, None, covisibility=core), run(photos, None, covisibility=core, chunk=None)
    assert chunked.facts["chunk"] is None
    assert runs == []
    for name in ("poses", "intrinsics", "depth", "confidence"):
        assert torch.equal(getattr(chunked, name), getattr(joint, name))


class TestInterrupted:
    def test_it_goes_on_where_it_was_stopped(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[int]
    ) -> None:
        whole = run(photos, tmp_path / "whole")
        core = whole.graph.core_frames
        assert core is not None
        others = [4 - sum(start <= frame < start + 4 for frame in core.tolist()) for start in (0, 4)]
        others.append(2 - sum(frame >= 8 for frame in core.tolist()))
        assert runs == [3, *(count for count in others if count)]
        interrupted(photos, tmp_path / "out", 1, monkeypatch)
        assert finished_chunks(tmp_path / "out") == [CHUNKED[0]]
        assert not (tmp_path / "out/reconstruction.npz").exists()
        runs.clear()
        again = run(photos, tmp_path / "out")
        assert runs == [3, *(count for count in others[1:] if count)]
        expected = contents(tmp_path / "whole")
        written = contents(tmp_path / "out")
        assert set(written) == set(expected)
        for name in set(expected) - {"reconstruction.json", "reconstruction.npz"}:  # which have the seconds
            assert written[name] == expected[name]
        for name in ("poses", "intrinsics", "depth", "confidence"):
            assert torch.equal(getattr(again, name), getattr(whole, name))
        assert {**again.facts, "seconds": 0} == {**whole.facts, "seconds": 0}

    def test_chunks_hold_no_more_than_is_read(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outputs = RUNNABLE["toy"].outputs

        def with_points(result: Any) -> dict[str, Tensor]:
            return {**outputs(result), "world_points": result["depth"][0].expand(-1, -1, -1, 3)}

        monkeypatch.setitem(RUNNABLE, "toy", dataclasses.replace(RUNNABLE["toy"], outputs=with_points))
        interrupted(photos, tmp_path / "out", 1, monkeypatch)
        with np.load(tmp_path / "out/chunks" / CHUNKED[0]) as held:
            assert set(held) == {"pose_enc", "depth", "depth_conf", "apart", "scene", "frames"}

    @pytest.mark.parametrize("options", [{"chunk": 3}, {"covisibility": Core(4, by=None)}, {"chunk": None}], ids=str)
    def test_another_request_is_refused_unless_forced(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
    ) -> None:
        interrupted(photos, tmp_path / "out", 2, monkeypatch)
        before = contents(tmp_path / "out")
        with pytest.raises(FileExistsError, match=r"holds an interrupted run of another .*; give --force"):
            run(photos, tmp_path / "out", **options)
        assert contents(tmp_path / "out") == before
        forced = run(photos, tmp_path / "out", force=True, **options)
        alike(forced, run(photos, None, **options))
        assert not (tmp_path / "out/chunks").exists()

    def test_before_its_first_chunk_is_written_it_leaves_nothing_in_the_way(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupted(photos, tmp_path / "out", 0, monkeypatch)
        run(photos, tmp_path / "out", chunk=None)
        assert not (tmp_path / "out/chunks").exists()

    def test_a_forced_run_leaves_the_finished_one(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[int]
    ) -> None:
        """Until it is finished itself; and the finished one does not take its chunks away."""
        run(photos, tmp_path / "out", chunk=None)
        before = (tmp_path / "out/reconstruction.npz").read_bytes()
        interrupted(photos, tmp_path / "out", 2, monkeypatch, force=True)
        run(photos, tmp_path / "out", chunk=None)
        assert (tmp_path / "out/reconstruction.npz").read_bytes() == before
        assert finished_chunks(tmp_path / "out") == list(CHUNKED[:2])
        runs.clear()
        run(photos, tmp_path / "out", force=True)
        assert len(runs) <= 2
        assert not (tmp_path / "out/chunks").exists()

    def test_after_the_run_was_put_in_place(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[int]
    ) -> None:
        """Chunks that could not be taken away then are taken away by the next call."""
        interrupted(photos, tmp_path / "out", 1, monkeypatch)
        chunk = (tmp_path / "out/chunks" / CHUNKED[0]).read_bytes()
        request = (tmp_path / "out/chunks/request.json").read_bytes()
        run(photos, tmp_path / "out")
        (tmp_path / "out/chunks").mkdir()
        (tmp_path / "out/chunks" / CHUNKED[0]).write_bytes(chunk)
        (tmp_path / "out/chunks/request.json").write_bytes(request)
        runs.clear()
        run(photos, tmp_path / "out")
        assert runs == []
        assert not (tmp_path / "out/chunks").exists()

    def test_a_photo_that_changed_is_another(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupted(photos, tmp_path / "out", 1, monkeypatch)
        Image.new("RGB", (42, 28)).save(photos / "02.png")
        with pytest.raises(FileExistsError, match="an interrupted run of another photos"):
            run(photos, tmp_path / "out")

    @pytest.mark.parametrize("name", ["chunks", "chunks/frames-0000000-0000004.npz", "chunks/notes.txt"])
    def test_files_of_others_are_not_written_over(self, photos: Path, tmp_path: Path, name: str) -> None:
        file = tmp_path / "out" / name
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        with pytest.raises(FileExistsError, match="chunks is there and was not written by this"):
            run(photos, tmp_path / "out")
        assert contents(tmp_path / "out") == {name: b"mine"}


def test_photos_at_a_stride_beside_the_core(photos: Path) -> None:
    core = Core(2, by=None, coarse=2, stride=2)
    one, chunked = (run(photos, None, covisibility=core, chunk=chunk) for chunk in (None, 3))
    np.testing.assert_allclose(chunked.depth, one.depth, rtol=1e-3, atol=1e-4)
    assert torch.equal(chunked.graph.to_dense(), one.graph.to_dense())
    assert chunked.facts["token_density"] == one.facts["token_density"]


@pytest.mark.parametrize(
    ("graph", "other"),
    [
        (CovisibilityGraph.core(10, [4, 0, 7]), CovisibilityGraph.core(10, [4, 0])),
        (CoarseGraph.core(10, [4, 0], [2, 7], stride=2), CoarseGraph.core(10, [4, 0], [2, 7], stride=3)),
    ],
    ids=["in full", "at a stride"],
)
def test_a_graph_that_is_given(
    photos: Path, tmp_path: Path, graph: CovisibilityGraph | CoarseGraph, other: CovisibilityGraph | CoarseGraph
) -> None:
    joint = run(photos, None, covisibility=graph, chunk=None)
    chunked = run(photos, tmp_path / "out", covisibility=graph)
    np.testing.assert_allclose(chunked.depth, joint.depth, rtol=1e-3, atol=1e-4)
    assert torch.equal(chunked.graph.to_dense(), united(graph).to_dense())
    assert chunked.facts["chunk"] == 4
    assert chunked.facts["token_density"] == joint.facts["token_density"]
    with pytest.raises(FileExistsError, match="another graph"):
        run(photos, tmp_path / "out", covisibility=other)


class TestGraphsOfFiles:
    def written(self, folder: Path, graph: CovisibilityGraph, names: list[str] | None = None) -> GraphFile:
        folder.mkdir(exist_ok=True)
        (folder / "graph.npz").write_bytes(graph_bytes(graph, names))
        return GraphFile(folder / "graph.npz")

    def test_photos_are_told_by_name(self, photos: Path, tmp_path: Path) -> None:
        """The reference frame is the first photo of the core, wherever that was in the order of the file."""
        names = [f"{place:02d}.png" for place in reversed(range(10))]
        file = self.written(tmp_path, CovisibilityGraph.core(10, [9, 2, 5]), names)
        alike(
            run(photos, None, covisibility=file), run(photos, None, covisibility=CovisibilityGraph.core(10, [0, 4, 7]))
        )

    @pytest.mark.parametrize("nearest", [None, [[2]] * 10])
    def test_others_are_refused(self, photos: Path, tmp_path: Path, nearest: Any) -> None:
        names = [f"{place:02d}.png" for place in range(10)]
        graph = (
            CovisibilityGraph.sequential(10, 2)
            if nearest is None
            else CovisibilityGraph.core(10, [0, 4], nearest=nearest)
        )
        with pytest.raises(ValueError, match=r"needs a closed core, .*, got a graph read from graph\.npz; give a core"):
            run(photos, tmp_path / "out", covisibility=self.written(tmp_path, graph, names))
        assert not (tmp_path / "out").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        "covisibility",
        [
            "all",
            "tokens",
            Core(3, by="thumbnails", nearest=1),
            Core(3, by=None, coarse="all"),
            CovisibilityGraph.sequential(10, 1),
            CovisibilityGraph.core(10, [0, 1], nearest=[[2]] * 10),
        ],
        ids=str,
    )
    def test_graphs_of_more_than_a_core(self, photos: Path, tmp_path: Path, covisibility: Any) -> None:
        with pytest.raises(ValueError, match=r"needs a closed core, .*, got .*; give a core .* or leave chunk out"):
            run(photos, tmp_path / "out", covisibility=covisibility)
        assert not (tmp_path / "out").exists()

    def test_no_frames_in_a_chunk(self, photos: Path) -> None:
        with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
            run(photos, None, chunk=0)

    def test_a_model_that_cannot_be_opened(self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not run another way than was asked for, and what was begun is in nobody's way."""
        outputs = RUNNABLE["toy"].outputs

        def of_all(result: Any) -> dict[str, Tensor]:
            each = outputs(result)
            return each | {"depth": each["depth"] - each["depth"].mean()}

        with monkeypatch.context() as broken:
            broken.setitem(RUNNABLE, "toy", dataclasses.replace(RUNNABLE["toy"], outputs=of_all))
            with pytest.raises(ValueError, match=r"cannot be opened: .* use patch\(model\)"):
                run(photos, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        run(photos, tmp_path / "out", chunk=None)

    def test_a_budget_without_a_gpu(self, photos: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="kept on CUDA"):
            run(photos, tmp_path / "out", memory_budget=4)
        assert not (tmp_path / "out").exists()

    def test_weights_of_nan(self, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = RoomsModel.create(5, dim=16, depth=2, num_heads=2)
        with torch.no_grad():
            for parameter in broken.camera_head.parameters():
                parameter.fill_(torch.nan)
        monkeypatch.setitem(RUNNABLE, "toy", dataclasses.replace(RUNNABLE["toy"], trained=lambda path: broken))
        with pytest.raises(ValueError, match="must be finite, but its pose_enc is not; check the weights"):
            run(photos, None)


def test_photos_of_another_place_are_told(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a note, with their places: also where the chunks that have them were finished before."""

    def apart(yardstick: Yardstick, outputs: dict[str, Tensor], descriptors: Tensor | None) -> Tensor:
        return torch.ones(len(outputs["depth"]), dtype=torch.bool)

    monkeypatch.setattr(Yardstick, "apart", apart)
    interrupted(photos, tmp_path / "out", 2, monkeypatch)
    scene = run(photos, tmp_path / "out")
    core = scene.graph.core_frames
    assert core is not None
    assert scene.facts["apart"] == [place for place in range(10) if place not in core.tolist()]
    assert "7 of 10 photos may share nothing with the core" in scene.facts["warnings"][-1]
    held = json.loads((tmp_path / "out/reconstruction.json").read_text())
    assert held["facts"]["apart"] == scene.facts["apart"]
