"""The command line does what it says, and says in one line what it cannot do."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from commands import files_of
from tiers import every

from svggt_kernels import (
    CovisibilityGraph,
    MegaLoc,
    backends,
)
from svggt_kernels.cli import (
    arguments,
    check,
    compare,
    demo,
    footage,
    main,
    parser,
    results,
)
from svggt_kernels.demo.model import RoomsModel, model
from svggt_kernels.demo.model.weights import write_weights
from svggt_kernels.measure.layouts import DENSE
from svggt_kernels.models import RUNNABLE
from svggt_kernels.models.loading import RANDOM_WEIGHTS
from svggt_kernels.sources.thumbnails import thumbnails

COMMANDS = ("info", "check", "layout", "reconstruct", "view", "mcp", "compare", "evaluate", "sweep", "demo")
SEED = 0
TOY = ("--covisibility", "tokens", "--model", "toy", "--device", "cpu")

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six small photos; 1 to 3 are views of one texture, 4 to 6 of another."""
    photos = tmp_path / "photos"
    photos.mkdir()
    textures = np.random.default_rng(SEED).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    for i in range(6):
        texture = Image.fromarray(textures[i // 3]).resize((64, 48), Image.Resampling.BICUBIC)
        texture.crop((i % 3, 0, 56 + i % 3, 42)).save(photos / f"{i + 1}.png")
    return photos


@pytest.fixture
def tiny_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the toy model small and random."""
    kind = dataclasses.replace(
        RUNNABLE["toy"], build=lambda: RoomsModel(dim=16, depth=2, num_heads=2), trained=None, long_side=56
    )
    monkeypatch.setitem(RUNNABLE, "toy", kind)


def succeed(*words: object) -> None:
    """Runs a command that must do what it is told."""
    assert main([str(word) for word in words]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Runs a command that must refuse; returns what it says."""
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


class TestMain:
    @pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
    def test_help(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        assert main(words) == 0
        assert "usage: svggt-kernels" in capsys.readouterr().out

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out.count(".") == 2

    def test_interrupted(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*arguments: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(check, "judge", interrupt)
        assert main(["check", "--device", "cpu"]) == 130
        assert "interrupted" in capsys.readouterr().err

    def test_info_and_check_need_no_optional_package(self) -> None:
        script = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"matplotlib", "PIL", "rich", "depth_anything_3", "omegaconf"}:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
from svggt_kernels.cli import main
sys.exit(main(["info"]) or main(["check", "--device", "cpu"]) or main(["demo", "--output", "nowhere"]))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert "Every backend that can run here is within the budget" in done.stdout
        assert done.stderr == (
            "svggt-kernels demo: drawing needs matplotlib, which is not installed: pip install 'svggt-kernels[viz]'\n"
        )


class TestLayout:
    def test_writes_report_and_picture(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = tmp_path / "deep" / "output"
        made = ["--covisibility", "thumbnails", "--neighbours", 2, "--long-side", 56]
        succeed("layout", folder, *made, "--output", output)
        assert "2 neighbours by thumbnails" in capsys.readouterr().out
        written = json.loads((output / "report.json").read_text())
        assert written["command"].startswith("svggt-kernels layout")
        assert {path.name for path in output.iterdir()} == set(files_of("layout"))
        assert written["tokens_per_frame"] == 4 * 3 + 5
        assert written["ideal_speedup"] == pytest.approx(1 / written["token_density"])
        assert is_png(output / "graph.png")
        assert is_png(output / "neighbours.png")

    def test_thumbnails_find_the_frames_of_one_place(self, folder: Path) -> None:
        from svggt_kernels.io.photos import find_photos, load_photos

        descriptors = thumbnails(load_photos(find_photos(folder), long_side=56))
        graph = CovisibilityGraph.from_descriptors(
            descriptors, neighbours=2, reference_frame=None, anchors=0, bridge=False
        )
        place = torch.arange(6) // 3
        assert torch.equal(graph.to_dense(), place[:, None] == place)

    @pytest.mark.parametrize("kind", arguments.COVISIBILITY)
    def test_every_kind_of_graph(
        self,
        folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        tiny_toy: None,
    ) -> None:
        monkeypatch.setattr(MegaLoc, "from_pretrained", lambda source: tiny.megaloc())
        given = {"--device": "cpu"} | (
            {"--core": 2} if kind in ("core", "patches") else {"--window": 1, "--neighbours": 1}
        )
        read = [
            word for option in given if kind in parser.READ_BY_IN_LAYOUT[option] for word in (option, given[option])
        ]
        made = ["--covisibility", kind, *read, "--long-side", 28]
        succeed("layout", folder, *made, "--output", tmp_path, "--json")
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads((tmp_path / "report.json").read_text())
        assert printed["graph"]["frames"] == 6
        assert (printed["graph"]["density"] == 1) == (kind == "all")
        assert ("not learned from photos" in str(printed["note"])) == (kind in ("patches", "tokens"))

    def test_a_core_by_megaloc_is_the_default(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        monkeypatch.setattr(MegaLoc, "from_pretrained", lambda source: asked.append(source) or tiny.megaloc())
        words = ["layout", folder, "--core", 2, "--long-side", 56, "--device", "cpu", "--output", tmp_path]
        succeed(*words)
        succeed(*words, "--megaloc", tmp_path / "m.pt", "--force")
        assert asked == ["gberton/MegaLoc", tmp_path / "m.pt"]
        assert "a core of 2 frames that resemble most others by MegaLoc" in capsys.readouterr().out

    @pytest.mark.parametrize("command", [["layout"], ["compare", "--model", "toy"]], ids=["layout", "compare"])
    def test_megaloc_out_of_reach(self, folder: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
        said = refusal(capsys, *command, folder, "--megaloc", "nowhere.safetensors", "--device", "cpu")
        assert "there is no such file" in said and '"patches"' in said

    @pytest.mark.parametrize("name", ["walk.mp4", "walk.MTS", "walk.3gp", "walk"])  # every file that is no photo
    def test_video(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        (tmp_path / name).touch()
        clip = (torch.rand(4, 3, 42, 56), [0.0, 0.5, 1.0, 2.0])
        monkeypatch.setattr(footage, "load_video", lambda path, **options: clip)
        succeed("layout", tmp_path / name, "--covisibility", "sequential", "--output", tmp_path, "--json")
        assert json.loads(capsys.readouterr().out)["photos"] == ["0.00 s", "0.50 s", "1.00 s", "2.00 s"]

    def test_one_photo(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one = ["--covisibility", "all", "--max-frames", 1, "--long-side", 56]
        succeed("layout", folder, *one, "--output", tmp_path, "--json")
        assert json.loads(capsys.readouterr().out)["graph"]["density"] == 1

    def test_truth_gives_the_recall(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        table = tmp_path / "pairs.csv"
        table.write_text("a,b,matches\n3.png,4.png,50\n3,5,40\n6.png,1.png,3\n")
        made = ["--covisibility", "sequential", "--window", 1, "--long-side", 28]
        judged = ["--truth", table, "--truth-above", 10]
        succeed("layout", folder, *made, *judged, "--output", tmp_path, "--json")
        found = json.loads(capsys.readouterr().out)["truth"]
        # Neighbours and frame 0 are seen, both ways: 3-4 is in, 3-5 is not; 10 + 8 of 30 ordered pairs are in.
        assert found == {
            "pairs": 4,
            "recall": 0.5,
            "precision": pytest.approx(2 / 18),
            "chance": pytest.approx(18 / 30),
        }


class TestOverwriting:
    @pytest.mark.parametrize("command", [command for command in COMMANDS if files_of(command)])
    def test_what_is_there_is_refused_before_any_work(
        self, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        name = files_of(command)[0]
        (tmp_path / name).write_text("mine")
        photos = [] if command == "demo" else [tmp_path / "no photos"]
        model = ["--model", "toy"] if command in ("compare", "evaluate", "sweep") else []
        said = refusal(capsys, command, *photos, *model, "--output", tmp_path)
        assert f"holds {name} already; give --force to replace what an earlier run wrote" in said
        assert (tmp_path / name).read_text() == "mine"

    def test_force_replaces_it(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/report.json").write_text("earlier")
        words = ["layout", folder, "--covisibility", "sequential", "--json", "--output", tmp_path / "out"]
        succeed(*words, "--force")
        assert json.loads((tmp_path / "out/report.json").read_text())["height"] > 0


class TestGraphOfAFile:
    def made(self, folder: Path, tmp_path: Path) -> Path:
        succeed("layout", folder, "--covisibility", "sequential", "--core", 3, "--output", tmp_path / "made", "--json")
        return tmp_path / "made"

    @pytest.mark.parametrize("name", ["graph.npz", "pairs.txt"])
    def test_what_layout_writes_it_reads(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        made = self.made(folder, tmp_path)
        first = json.loads(capsys.readouterr().out)["graph"]
        succeed("layout", folder, "--graph", made / name, "--output", tmp_path / "again", "--json")
        again = json.loads(capsys.readouterr().out)
        assert again["covisibility"] == f"a graph read from {name}"
        # hloc's pairs have no direction: the core sees what sees it.
        assert again["graph"]["edges"] == first["edges"] + (9 if name == "pairs.txt" else 0)

    def test_compare_runs_with_it(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_toy: None
    ) -> None:
        made = self.made(folder, tmp_path)
        capsys.readouterr()
        words = ["--model", "toy", "--device", "cpu", "--repeats", 1, "--graph", made / "graph.npz"]
        succeed("compare", folder, *words, "--output", tmp_path / "out")
        assert "Who sees whom: a graph read from graph.npz; density 58.3 % over frames" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--covisibility", "all"], "--graph and --covisibility both say what each frame sees"),
            (["--core", 2], "--core does not go with --graph"),
            (["--neighbours", 2], "--neighbours does not go with --graph"),
            (["--megaloc", "file"], "--megaloc does not go with --graph"),
            (["--depth-range", 1, 5], "goes with the poses of a transforms.json, not with"),
        ],
    )
    def test_what_else_says_who_sees_whom_is_refused(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[object], message: str
    ) -> None:
        made = self.made(folder, tmp_path)
        capsys.readouterr()
        assert message in refusal(capsys, "layout", folder, "--graph", made / "graph.npz", *words)

    def test_a_range_of_depth_without_a_graph(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "belongs to the transforms.json of --graph" in refusal(capsys, "layout", folder, "--depth-range", 1, 2)

    def test_one_that_is_not_there(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        said = refusal(capsys, "compare", folder, "--model", "toy", "--graph", "nowhere.npz", "--device", "cpu")
        assert "but nowhere.npz does not exist" in said


class TestFramesOfAVideo:
    @pytest.fixture
    def clip(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A file of which four frames are read, and what was asked of them."""
        (tmp_path / "walk.mp4").touch()
        frames = torch.rand(4, 3, 42, 56, generator=torch.Generator().manual_seed(0))

        def load(path: Path, *, frames_per_second: float, max_frames: int | None, **size: int) -> object:
            assert (frames_per_second, size) == (3.0, {"long_side": 56, "patch_size": 14})
            return frames[:max_frames], [0.0, 0.5, 1.0, 2.0][:max_frames]

        monkeypatch.setattr(footage, "load_video", load)
        return tmp_path / "walk.mp4"

    def test_compare_and_sweep_take_one(
        self, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_toy: None
    ) -> None:
        common = [clip, "--model", "toy", "--device", "cpu", "--repeats", 1, "--fps", 3, "--covisibility", "tokens"]
        succeed("compare", *common, "--core", 2, "--max-frames", 3, "--output", tmp_path / "compared")
        written = json.loads((tmp_path / "compared/report.json").read_text())
        assert written["frame_names"] == ["0.00 s", "0.50 s", "1.00 s"]
        succeed("sweep", *common, "--layouts", "core-2", "--output", tmp_path / "swept")
        written = json.loads((tmp_path / "swept/report.json").read_text())
        assert written["photos"] == ["0.00 s", "0.50 s", "1.00 s", "2.00 s"]

    def test_fps_of_photos_is_refused(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--fps is for videos, and" in refusal(capsys, "layout", folder, "--fps", 3)


class TestCompare:
    def test_writes_report_and_pictures(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_toy: None
    ) -> None:
        succeed("compare", folder, *TOY, "--neighbours", 1, "--repeats", 2, "--output", tmp_path)
        out = capsys.readouterr().out
        assert "weights: random, seed 0" in out
        assert RANDOM_WEIGHTS in out
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(files_of("compare"))
        assert is_png(tmp_path / "comparison.png")
        assert is_png(tmp_path / "graph.png")
        written = json.loads((tmp_path / "report.json").read_text())
        assert written["warning"] == RANDOM_WEIGHTS
        assert written["backend"] in backends.BACKENDS
        assert f"dense attention is PyTorch's, sparse that of backend {written['backend']}." in out
        assert "CUDA" in written["passed_over"]["triton"]
        assert written["frame_names"] == [f"{i}.png" for i in range(1, 7)]
        assert written["attention"]["shape"] == [1, 2, 6 * (5 + 4 * 3), 8]
        assert written["dense"]["runs"] == written["sparse"]["runs"] == 2
        assert written["layers"] == 2
        assert set(written["deviations"]) == {"depth", "depth_conf", "pose_enc"}
        assert 0 < written["deviations"]["depth"]["relative_l2"] < 1
        assert written["ratios"]["ideal_reached"] == pytest.approx(
            written["ratios"]["attention_speedup"] * written["token_density"]
        )

    def test_picture_says_that_weights_are_random(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_toy: None
    ) -> None:
        drawn: dict[str, object] = {}
        monkeypatch.setattr(
            results, "draw_comparison", lambda *inputs, **labels: drawn.update(labels, photos=inputs[0]) or b""
        )
        succeed("compare", folder, *TOY, "--repeats", 1, "--output", tmp_path)
        assert drawn["warning"] == RANDOM_WEIGHTS
        assert "attention, PyTorch against " in str(drawn["title"])
        assert drawn["frames"] == ["1.png", "3.png", "4.png", "6.png"]
        assert len(drawn["photos"]) == 4  # type: ignore[arg-type]

    def test_sparse_alone(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_toy: None
    ) -> None:
        succeed("compare", folder, *TOY, "--core", 2, "--no-dense", "--repeats", 2, "--output", tmp_path)
        said = capsys.readouterr()
        assert "Dense did not run, so nothing is compared." in said.out
        assert "speed-up" not in said.out
        assert "dense" not in said.err
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"graph.png", "report.json"}
        written = json.loads((tmp_path / "report.json").read_text())
        assert written["sparse"]["runs"] == 2
        assert "dense" not in written

    def test_all_visible_is_dense(self, folder: Path, tmp_path: Path, tiny_toy: None) -> None:
        succeed("compare", folder, *TOY, "--covisibility", "all", "--repeats", 1, "--output", tmp_path)
        written = json.loads((tmp_path / "report.json").read_text())
        assert written["ideal_speedup"] == 1
        assert written["deviations"]["depth"]["relative_l2"] < 1e-5
        assert written["rotation_degrees"]["max"] < 0.01

    def test_one_photo(self, folder: Path, tmp_path: Path, tiny_toy: None) -> None:
        succeed("compare", folder, *TOY, "--max-frames", 1, "--repeats", 1, "--output", tmp_path)
        assert json.loads((tmp_path / "report.json").read_text())["density"] == 1

    @pytest.mark.parametrize("repeats", every(2, [1, 2]))
    def test_one_run_is_not_called_a_median(
        self,
        folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tiny_toy: None,
        repeats: int,
    ) -> None:
        titles: list[str] = []
        monkeypatch.setattr(results, "draw_comparison", lambda *inputs, title, **labels: titles.append(title) or b"")
        succeed("compare", folder, *TOY, "--repeats", repeats, "--output", tmp_path)
        for text in (capsys.readouterr().out, titles[0]):
            assert ("whole model, one run" in text) == (repeats == 1)
            assert ("median of 2 runs" in text) == (repeats == 2)

    @pytest.mark.parametrize(("device", "dtype"), [("cuda:0", torch.bfloat16), ("cpu", torch.float32)])
    def test_a_backend_is_asked_about_the_dtype_that_will_run(
        self,
        folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        def reasons(*kind: object) -> dict[str, str | None]:
            return dict.fromkeys(backends.BACKENDS, "that is the dtype" if kind[1] == dtype else None)

        monkeypatch.setattr(compare, "pick_device", lambda name: torch.device(device))
        monkeypatch.setattr(backends, "reasons", reasons)
        said = refusal(capsys, "compare", folder, *TOY, "--backend", "hopper", "--output", tmp_path)
        assert "that is the dtype; leave --backend out" in said

    def test_depth_anything_3(self, folder: Path, tmp_path: Path) -> None:
        pytest.importorskip("depth_anything_3", reason="depth-anything-3 is not installed")
        pytest.importorskip("omegaconf", reason="omegaconf, which depth-anything-3 needs, is not installed")
        small = ["--long-side", 56, "--max-frames", 4, "--neighbours", 1, "--repeats", 1]
        succeed("compare", folder, *TOY, "--model", "da3-small", *small, "--output", tmp_path)
        written = json.loads((tmp_path / "report.json").read_text())
        assert written["layers"] == 4
        assert set(written["deviations"]) == {"depth", "depth_conf", "extrinsics", "intrinsics"}
        assert 0 < written["deviations"]["depth"]["relative_l2"] < 1

    def test_out_of_memory(
        self,
        folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tiny_toy: None,
    ) -> None:
        def exhausted(*arguments: object) -> None:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(RoomsModel, "forward", exhausted)
        said = refusal(capsys, "compare", folder, *TOY, "--output", tmp_path)
        assert said.endswith("use fewer frames (--max-frames; in demo --frames) or smaller ones (--long-side)\n")


class TestRefusals:
    @pytest.mark.parametrize("command", [["layout"], ["compare", "--model", "toy"]], ids=["layout", "compare"])
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda path: None, "does not exist"),
            (lambda path: path.mkdir(), "holds no photo .*: it holds no file at all"),
            (lambda path: path.write_text(""), "cannot be read as a video|is a file: .* read videos"),
            (lambda path: path.mkdir() or (path / "1.jpg").write_text("oops"), r"1\.jpg cannot be read as a photo"),
        ],
        ids=["missing", "empty", "file", "broken photo"],
    )
    def test_folder(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        tiny_toy: None,
        command: list[str],
        make: object,
        message: str,
    ) -> None:
        make(tmp_path / "in")  # type: ignore[operator]
        said = refusal(capsys, *command, tmp_path / "in", "--covisibility", "all", "--output", tmp_path / "out")
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(said)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model", "gpt"], "invalid choice: 'gpt'"),
            (["--neighbours", "-1"], "--neighbours: must be at least 0, got -1"),
            (["--neighbours", "many"], "--neighbours: must be a whole number, got 'many'"),
            (["--max-frames", "0"], "--max-frames: must be at least 1, got 0"),
            (["--repeats", "0"], "--repeats: must be at least 1, got 0"),
            (["--long-side", "13"], "long_side must be at least one patch"),
            (["--device", "tpu"], "--device must be auto or one of"),
            (["--backend", "cuda"], "backend must be one of hopper, triton, metal, cpu, reference or None, got 'cuda'"),
            (["--weights", "w.pt"], "the weights must be a file, but w.pt is none"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_options(
        self,
        folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        tiny_toy: None,
        words: list[str],
        message: str,
    ) -> None:
        assert message in refusal(capsys, "compare", folder, *TOY, *words, "--output", tmp_path / "out")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["tokens", "--patch-size", "16"], "--patch-size does not go with --covisibility tokens"),
            (
                ["tokens", "--special-tokens", "9"],
                "it is for --covisibility core or megaloc or thumbnails or sequential or all",
            ),
            (["megaloc", "--model", "vggt"], "--model does not go with --covisibility megaloc"),
            (["all", "--megaloc", "m.pt"], "it is for --covisibility core or megaloc"),
            (["sequential", "--neighbours", "4"], "--neighbours does not go with --covisibility sequential"),
            (["all", "--window", "2"], "--window does not go with --covisibility all"),
            (["thumbnails", "--device", "cpu"], "it is for --covisibility core or patches or megaloc or tokens"),
            (["all", "--truth-above", "3"], "give --truth too"),
        ],
        ids=" ".join,
    )
    def test_options_that_would_be_ignored(
        self, folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
    ) -> None:
        assert message in refusal(capsys, "layout", folder, "--covisibility", *words)

    def test_options_that_a_comparison_would_ignore(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        said = refusal(capsys, "compare", folder, *TOY, "--megaloc", "m.pt")
        assert "--megaloc does not go with --covisibility tokens" in said

    def test_a_backend_that_cannot_run_here(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        said = refusal(capsys, "compare", folder, *TOY, "--backend", "triton")
        assert "it needs a CUDA device, got cpu; leave --backend out" in said

    def test_output_is_a_file(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "out").touch()
        assert "out" in refusal(capsys, "layout", folder, "--covisibility", "all", "--output", tmp_path / "out")

    def test_without_pillow(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        said = refusal(capsys, "layout", folder, "--covisibility", "all", "--output", tmp_path / "out")
        assert "pip install 'svggt-kernels[viz]'" in said

    def test_truth_without_a_pair_of_the_photos_in_use(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "pairs.csv").write_text("1,6,5\n")
        said = refusal(
            capsys, "layout", folder, "--covisibility", "all", "--truth", tmp_path / "pairs.csv", "--max-frames", 3
        )
        assert "raise --max-frames" in said

    @pytest.mark.parametrize("name", [name for name, kind in RUNNABLE.items() if kind.requirement])
    def test_missing_package(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        for package in ("depth_anything_3", "vggt", "vggt.models.vggt", "pi3", "pi3.models.pi3"):
            monkeypatch.setitem(sys.modules, package, None)
        said = refusal(capsys, "compare", folder, *TOY, "--model", name)
        assert "pip install --no-deps" in said


class TestDemo:
    @pytest.fixture
    def tiny_trained(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts a small random model in the place of the trained one, and makes images small."""
        network = RoomsModel.create(0, dim=16, depth=2, num_heads=2)
        write_weights(tmp_path / "trained.npz", network.state_dict(), network.sizes)
        (tmp_path / "trained.json").write_text('{"seconds": 1260, "device": "a machine"}')
        monkeypatch.setattr(model, "TRAINED", tmp_path / "trained.npz")
        monkeypatch.setattr(demo, "SIZE", (42, 56))

    def test_tells_the_story(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_trained: None) -> None:
        folder = tmp_path / "out"
        succeed("demo", "--frames", 8, "--core", 3, "--device", "cpu", "--output", folder)
        assert {path.name for path in folder.iterdir()} == set(files_of("demo"))
        out = capsys.readouterr().out
        assert "A rendered walk of 8 frames through 8 rooms" in out
        assert "trained on rendered rooms for 21 minutes on a machine" in out and "say nothing about VGGT's" in out
        names = next(line for line in out.splitlines() if "core-3" in line)
        assert names.split() == ["dense", "core-3-covering", "nearest-10"]
        assert sorted(path.name for path in folder.iterdir()) == ["depth.png", "floor-plan.png", "report.json"]
        assert is_png(folder / "depth.png") and is_png(folder / "floor-plan.png")
        written = json.loads((folder / "report.json").read_text())
        assert written["training"]["seconds"] == 1260
        dense, core, neighbours = written["layouts"]
        assert (dense["layout"], dense["pairs"], dense["backend"]) == ("dense", 1, None)
        assert core["pairs"] == pytest.approx((3 * 3 + 5 * 4) / 64)
        assert len(written["core"]) == 3 and written["core"][0] == 0
        for facts in (dense, core, neighbours):
            assert 0 <= facts["auc5"] <= facts["auc30"] <= 1
            assert facts["ms"] > 0 and facts["ate"] > 0 and facts["absrel"] > 0

    def test_missing_weights_are_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model, "TRAINED", tmp_path / "trained.npz")
        assert "no trained weights at" in refusal(capsys, "demo", "--output", tmp_path / "out")

    def test_a_walk_has_two_frames(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_trained: None
    ) -> None:
        said = refusal(capsys, "demo", "--frames", 1, "--output", tmp_path / "out")
        assert "two frames or more are needed, got 1" in said

    @pytest.mark.parametrize(
        ("dense_ms", "said"), [(30.0, "is 3x as fast as dense"), (5.0, "is no faster than dense here, 0.5x")]
    )
    def test_speed_is_told_as_it_is(self, dense_ms: float, said: str) -> None:
        dense, core = (SimpleNamespace(cost=SimpleNamespace(min_ms=ms)) for ms in (dense_ms, 10.0))
        core.layout, core.backend, core.pairs = DENSE, "cpu", 0.3
        assert said in demo._speed(dense, core)  # type: ignore[arg-type]
