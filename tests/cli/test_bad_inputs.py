"""Whatever is wrong with what `reconstruct` is given ends in one sentence, and nothing written before is lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from svggt_kernels import CovisibilityGraph
from svggt_kernels.cli import main
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.weights import write_weights
from svggt_kernels.models import RUNNABLE
from svggt_kernels.reconstruction import pipeline
from svggt_kernels.sources import graph_bytes


class Place(NamedTuple):
    """Where a case works.

    Attributes:
        folder: Holds the folder `photos` and whatever a case adds.
        monkeypatch: Breaks what a case breaks.
    """

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    @property
    def output(self) -> Path:
        return self.folder / "out"


class Case(NamedTuple):
    """One thing that is wrong.

    Attributes:
        name: What.
        message: What the sentence says, a pattern.
        words: Words of the command beside the usual ones.
        make: Makes it so.
    """

    name: str
    message: str
    words: tuple[object, ...] = ()
    make: Callable[[Place], Any] = lambda place: None


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Four photos, and a toy that is small and counts as trained."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        Image.effect_noise((56, 42), 60).convert("RGB").save(photos / f"{number}.png")
    small = RoomsModel.create(5, dim=16, depth=2, num_heads=2)
    kind = dataclasses.replace(
        RUNNABLE["toy"],
        trained=lambda path: small if path is None else RoomsModel.trained(path),
        one_size=None,
        long_side=56,
    )
    monkeypatch.setitem(RUNNABLE, "toy", kind)
    return Place(tmp_path, monkeypatch)


def empty(place: Place) -> None:
    for photo in place.photos.iterdir():
        photo.unlink()


def only(name: str, content: bytes = b"") -> Callable[[Place], None]:
    def make(place: Place) -> None:
        empty(place)
        (place.photos / name).write_bytes(content)

    return make


def beside(name: str, content: bytes) -> Callable[[Place], object]:
    return lambda place: (place.folder / name).write_bytes(content)


def video(content: bytes) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        pytest.importorskip("av", reason="PyAV is not installed")
        (place.folder / "walk.mp4").write_bytes(content)

    return make


def cut_photo(place: Place) -> None:
    photo = place.photos / "2.png"
    photo.write_bytes(photo.read_bytes()[:200])


def mirrored_photo(place: Place) -> None:
    exif = Image.Exif()
    exif[0x0112] = 5
    Image.new("RGB", (56, 42)).save(place.photos / "2.png", exif=exif)


def float_photo(place: Place) -> None:
    Image.fromarray(np.random.default_rng(0).random((42, 56), dtype=np.float32)).save(place.photos / "2.tif")


def only_folders(place: Place) -> None:
    empty(place)
    (place.photos / "day 1").mkdir()


def output_of_another(place: Place) -> None:
    assert run(place, "--covisibility", "all") == 0


def damaged_output(place: Place) -> None:
    assert run(place) == 0
    (place.output / "reconstruction.npz").write_bytes(b"damaged")


def file_of_somebody(place: Place) -> None:
    place.output.mkdir()
    (place.output / "trajectory.txt").write_text("mine")


def disk_full_at(part: str) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        write_bytes, savez = Path.write_bytes, np.savez

        def write(path: Path, content: bytes) -> int:
            if part in path.name:
                write_bytes(path, content[:3])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write_bytes(path, content)

        def save(file: Any, **arrays: Any) -> None:
            if part in getattr(file, "name", ""):
                file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            savez(file, **arrays)

        place.monkeypatch.setattr(Path, "write_bytes", write)
        place.monkeypatch.setattr(np, "savez", save)

    return make


def raising(target: object, name: str, error: BaseException) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        def fail(*arguments: object, **more: object) -> None:
            raise error

        place.monkeypatch.setattr(target, name, fail)

    return make


def cameras_of_nan(place: Place) -> None:
    def cameras(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.full((len(outputs["depth"]), 4, 4), torch.nan)

    place.monkeypatch.setitem(RUNNABLE, "toy", dataclasses.replace(RUNNABLE["toy"], cameras=cameras))


def depth_of_nothing(place: Place) -> None:
    def outputs(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        depth = torch.full_like(result["depth"][0, ..., 0], torch.nan)
        return {"pose_enc": result["pose_enc"][0], "depth": depth, "depth_conf": result["depth_conf"][0]}

    place.monkeypatch.setitem(RUNNABLE, "toy", dataclasses.replace(RUNNABLE["toy"], outputs=outputs))


def other_weights(place: Place) -> None:
    """Weights whose sizes say that they are of another model than their tensors."""
    other = RoomsModel.create(0, dim=32, depth=2, num_heads=2)
    write_weights(place.folder / "w.npz", other.state_dict(), {**other.sizes, "depth": 3})


def graph_of_others(place: Place) -> None:
    (place.folder / "graph.npz").write_bytes(graph_bytes(CovisibilityGraph.all_visible(2), ["a.png", "b.png"]))


def graph_of_fewer(place: Place) -> None:
    (place.folder / "graph.npz").write_bytes(graph_bytes(CovisibilityGraph.all_visible(2), None))


def without_package(name: str) -> Callable[[Place], None]:
    return lambda place: place.monkeypatch.setitem(sys.modules, name, None)


def without_formats(place: Place) -> None:
    place.monkeypatch.setattr("svggt_kernels.reconstruction.formats.base.find_spec", lambda module: None)


def without_hub(place: Place) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    pytest.importorskip("huggingface_hub.errors", reason="huggingface_hub is not installed")
    missing = hub.errors.LocalEntryNotFoundError("not in the cache")
    raising(hub, "hf_hub_download", missing)(place)
    raising(hub, "get_hf_file_metadata", OSError("no route to host"))(place)


def name_that_is_no_text(place: Place) -> None:
    (place.photos / "1.png").rename(place.photos / "caf\udce9.png")


CASES = [
    Case("no such folder", "nowhere does not exist", ("nowhere",)),
    Case("an empty folder", "photos holds no photo .*: it holds no file at all", make=empty),
    Case("no photo in it", r"photos holds no photo .*: it holds only 1 x \.txt", make=only("notes.txt")),
    Case("folders in it", r"only subfolders, which are not looked into \(day 1\): give one of them", make=only_folders),
    Case("a photo for a folder", "is a file: give the folder it lies in", ("photos/1.png",)),
    Case("text for a photo", r"1\.jpg cannot be read as a photo \(Unid.*: replace it", make=only("1.jpg", b"text")),
    Case("an empty photo", r"1\.jpg cannot be read as a photo", make=only("1.jpg")),
    Case("a photo that is cut off", r"2\.png cannot be read as a photo .*: replace it or take it out", make=cut_photo),
    Case(
        "a photo without a white level", r"2\.tif cannot be read .*mode F have no known white level", make=float_photo
    ),
    Case("a mirrored photo", r"must not be mirror images .* 1 of 4 are \(first .*2\.png", make=mirrored_photo),
    Case("text for a video", "cannot be read as a video", ("walk.mp4",), video(b"no video at all")),
    Case("an empty video", "cannot be read as a video", ("walk.mp4",), video(b"")),
    Case("no such weights", r"no trained weights at nowhere\.npz", ("--weights", "nowhere.npz")),
    Case("weights that are text", "does not hold weights in eight bits", ("--weights", "w.npz"), beside("w.npz", b"-")),
    Case("weights of another model", "are not those of this model", ("--weights", "w.npz"), other_weights),
    Case("no weights", "da3-small needs weights: a file, .* or random", ("--model", "da3-small")),
    Case(
        "a hub out of reach",
        "is neither .*no route to host.*; download it where there is a network, and give the file",
        ("--model", "da3-small", "--weights", "depth-anything/DA3-SMALL"),
        without_hub,
    ),
    Case(
        "a missing package",
        r"the model vggt cannot be imported \(.*Install it: pip install --no-deps",
        ("--model", "vggt", "--weights", "random"),
        without_package("vggt"),
    ),
    Case("no such device", "--device must be auto or one of .*, got abacus", ("--device", "abacus")),
    Case("no such backend", "must be .*, got 'abacus'", ("--backend", "abacus")),
    Case("a backend of another machine", "--backend hopper cannot run here", ("--backend", "hopper")),
    Case("a budget without a GPU", "CUDA", ("--memory-budget", "4")),
    Case("chunks without a core", "needs a closed core, .*got the 10 frames", ("--chunk", 2)),
    Case("chunks within a budget without a GPU", "CUDA", ("--core", 2, "--chunk", 2, "--memory-budget", 4)),
    Case("frames below a patch", "long_side must be at least one patch", ("--long-side", "5")),
    Case(
        "a core and neighbours", "--core and --window both say|say both what each frame", ("--core", 2, "--window", 1)
    ),
    Case("frames of photos", "--fps is for videos", ("--fps", 2)),
    Case("a graph that is not there", r"graph\.npz does not exist", ("--graph", "graph.npz")),
    Case("a graph that is text", "is damaged or something else", ("--graph", "graph.npz"), beside("graph.npz", b"-")),
    Case("a graph of other photos", "knows none of the 4 images", ("--graph", "graph.npz"), graph_of_others),
    Case("a graph of fewer frames", "a graph over 2 frames", ("--graph", "graph.npz"), graph_of_fewer),
    Case("pairs that are none", "pair 1 is 'a b c'", ("--graph", "pairs.txt"), beside("pairs.txt", b"a b c\n")),
    Case("points of no format", "--max-points is for colmap, .* names none", ("--max-points", 9, "--export", "tum")),
    Case("a format that is not installed", "needs trimesh, which is not", ("--export", "glb"), without_formats),
    Case("an output that is a file", "--output must be a folder, but .*out is a file", make=beside("out", b"mine")),
    Case("an output of another run", 'another graph .*now "the 10 frames', make=output_of_another),
    Case("an output of somebody", r"trajectory\.txt is there and was not written by this", make=file_of_somebody),
    Case("a damaged output", "is damaged or something else .*; give --force", make=damaged_output),
    Case("a full disk, the run", "cannot be read or written: no space left on device", make=disk_full_at("npz")),
    Case("a full disk, an export", r"trajectory.*: no space left on device", make=disk_full_at("trajectory")),
    Case("a full disk, the report", r"reconstruction\.json.*: no space left on device", make=disk_full_at("json")),
    Case("memory that runs out", "memory ran out; use fewer", make=raising(pipeline, "predict", MemoryError())),
    Case("cameras that are none", "cameras must be finite with focal lengths above 0", make=cameras_of_nan),
    Case("depth that is none", "no pixel has a depth that is finite and above 0", make=depth_of_nothing),
    Case("a name that is no text", r"must be UTF-8, .* but caf.udce9\.png is not", make=name_that_is_no_text),
]


def run(place: Place, *words: object) -> int:
    return main(command(place, *words))


def command(place: Place, *words: object) -> list[str]:
    """The words of a command; the first replaces the photos if it is no option."""
    photos: object = place.photos
    if words and not str(words[0]).startswith("--"):
        photos, words = place.folder / str(words[0]), words[1:]
    files = ("--graph", "--weights")
    placed = [
        place.folder / str(word) if before in files and "." in str(word) and word != "nowhere.npz" else word
        for before, word in zip((None, *words), words, strict=False)
    ]
    given = {str(word) for word in words}
    common = ["--model", "toy"] * ("--model" not in given) + ["--device", "cpu"] * ("--device" not in given)
    if not given & {"--graph", "--covisibility", "--core"}:
        common += ["--covisibility", "sequential"]
    if "--core" in given:
        common += ["--covisibility", "thumbnails"]
    exports = ["--export", "tum"] * ("--export" not in given)
    return [str(word) for word in ("reconstruct", photos, *common, *placed, *exports, "--output", place.output)]


def kept(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_it_ends_in_one_sentence(case: Case, place: Place, capsys: pytest.CaptureFixture[str]):
    case.make(place)
    before = kept(place.folder)
    capsys.readouterr()
    assert run(place, *case.words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err and "[Errno" not in said.err
    *progress, sentence = said.err.splitlines()
    assert sentence.startswith("svggt-kernels reconstruct: ")
    assert all(line.startswith("  ") for line in progress), progress
    assert re.search(case.message, sentence), sentence
    after = kept(place.folder)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if name.endswith(".part")]


def test_there_are_enough():
    assert len(CASES) >= 30


@pytest.mark.parametrize(
    "words", [("--model", "gpt"), ("--export", "obj"), ("--max-frames", 0), ("--memory-budget", "x")]
)
def test_words_that_mean_nothing(words: tuple[object, ...], place: Place, capsys: pytest.CaptureFixture[str]):
    assert run(place, *words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("svggt-kernels reconstruct: argument ")


@pytest.mark.parametrize("stage", ["frames_of", "predict", "save", "export", "load_model"])
def test_an_interrupt_at_each_stage(stage: str, place: Place, capsys: pytest.CaptureFixture[str]):
    target = pipeline.OutputFolder if stage in ("save", "export") else pipeline
    raising(target, stage, KeyboardInterrupt())(place)
    assert run(place) == 130
    advice = "the same command goes on, and does not do again what is finished"
    assert capsys.readouterr().err.splitlines()[-1] == f"svggt-kernels reconstruct: interrupted; {advice}"
    place.monkeypatch.undo()
    left = {file.name for file in place.output.iterdir()} if place.output.exists() else set()
    assert left == ({"reconstruction.npz", "reconstruction.json"} if stage == "export" else set())


def test_a_report_that_is_no_json_is_written_anew(place: Place):
    assert run(place) == 0
    (place.output / "reconstruction.json").write_text("{")
    assert run(place, "--force") == 0
    assert json.loads((place.output / "reconstruction.json").read_text())["exports"]["tum"]["finished"]
