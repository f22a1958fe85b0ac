"""The command line as a process: what it imports, what it says, and what it leaves on the disk."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from svggt_kernels import cli
from svggt_kernels.cli import files, info, main
from svggt_kernels.cli import layout as layout_command
from svggt_kernels.cli.errors import CommandError

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

WITHOUT_TORCH = """
import os, signal, sys, time

def lost():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        return RuntimeError("as NumPy raises when its import is interrupted")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise {error}

# A shell starts its background jobs with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Absent())
from svggt_kernels.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run_without_torch(error: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process in which `import torch` raises that error."""
    script = WITHOUT_TORCH.format(error=error)
    return subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        Image.effect_noise((56, 42), 60).convert("RGB").save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def quick_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no mosaic of photos, which takes long and has tests of its own."""
    monkeypatch.setattr(layout_command, "draw_neighbours", lambda *arguments: b"")


def layout(folder: Path, output: Path, *words: str) -> int:
    small = ["--covisibility", "sequential", "--window", "1", "--long-side", "56"]
    return main(["layout", str(folder), *small, "--output", str(output), *words])


class TestImports:
    @pytest.mark.parametrize(
        ("words", "code"),
        [
            (["--help"], 0),
            (["--version"], 0),
            (["compare", "--help"], 0),
            (["fly"], 2),
            (["compare", "photos", "--model", "gpt"], 2),
            (["layout", "photos", "--covisibility", "all", "--window", "2"], 2),
            (["layout", "photos", "--output", __file__], 2),
        ],
        ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
    )
    def test_what_is_wrong_with_the_words_needs_no_torch(self, words: list[str], code: int) -> None:
        ended = run_without_torch("ImportError('torch was imported')", *words)
        assert ended.returncode == code, ended.stderr
        assert "torch was imported" not in ended.stderr

    @pytest.mark.parametrize("error", ["KeyboardInterrupt", "lost()"])
    def test_interrupted_while_torch_is_imported(self, error: str) -> None:
        ended = run_without_torch(error, "info")
        assert ended.returncode == 130
        assert ended.stderr == "svggt-kernels info: interrupted\n"


class TestFolder:
    def test_none_is_made_before_there_are_results(self, tmp_path: Path) -> None:
        files.require_folder(tmp_path / "a" / "b")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("below", [".", "deeper/still"])
    def test_a_file_is_none(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CommandError, match=r"--output must be a folder, but .*file is a file"):
            files.require_folder(tmp_path / "file" / below)

    def test_one_that_cannot_be_written_to(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**where: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        with pytest.raises(CommandError, match=r"can be written to, but .* cannot \(Permission denied\)"):
            files.require_folder(tmp_path / "out")


class TestWriting:
    @pytest.fixture
    def full_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only the report no longer fits on it."""
        write = Path.write_bytes

        def until_full(path: Path, content: bytes) -> int:
            write(path, content[:3])
            if "report" in path.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(path, content)

        monkeypatch.setattr(Path, "write_bytes", until_full)

    def test_all_or_none(self, tmp_path: Path, full_disk: None) -> None:
        with (tmp_path / "a.png").open("wb") as before:
            before.write(b"before")
        with pytest.raises(CommandError, match="No space left on device"):
            files.write_files(tmp_path, {"a.png": b"after", "report.json": b"{}"})
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
        assert (tmp_path / "a.png").read_bytes() == b"before"

    def test_a_full_disk_ends_in_a_sentence(
        self, photos: Path, tmp_path: Path, full_disk: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert layout(photos, tmp_path / "out") == 2
        captured = capsys.readouterr()
        assert captured.err.endswith("(No space left on device); free some space or name another folder\n")
        assert "Report:" not in captured.out
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_full_disk_under_stdout_ends_in_a_sentence(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Full(io.StringIO):
            def flush(self) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(info, "run", lambda arguments: print("...") or 0)
        monkeypatch.setattr(sys, "stdout", Full())
        assert main(["info"]) == 2
        sys.stdout.close()
        assert (
            capsys.readouterr().err
            == "svggt-kernels info: the output cannot be read or written: no space left on device\n"
        )


def test_names_that_are_no_text(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "0.png").rename(photos / "caf\udce9.png")
    (photos / "1.png").rename(photos / "a$b^$[red].png")
    output = tmp_path / "r\udce9sultat"
    assert layout(photos, output) == 0
    assert r"r\udce9sultat/report.json" in capsys.readouterr().out
    written = json.loads((output / "report.json").read_text())
    assert written["photos"] == ["2.png", "3.png", "a$b^$[red].png", r"caf\udce9.png"]


def test_json_needs_no_matplotlib(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert layout(photos, tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["graph"]["frames"] == 4
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.json", "graph.npz", "pairs.txt"}


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ("1", "1 photo as 56 x 42 px"),
        ("2", "2 photos as 56 x 42 px"),
        ("2", "Global attention gains nothing;"),
        ("4", "as fast at best;"),
    ],
)
def test_one_and_many(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], frames: str, said: str) -> None:
    assert layout(photos, tmp_path / "out", "--max-frames", frames) == 0
    assert said in capsys.readouterr().out


def test_warnings_are_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(arguments: object) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("two photos are dark", stacklevel=1)
        return 0

    monkeypatch.setattr(info, "run", warn)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "  warning: two photos are dark\n"


@pytest.mark.parametrize(
    "raised",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError(), MemoryError()],
    ids=["cpu", "cuda", "python"],
)
def test_memory_that_runs_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: Exception
) -> None:
    def exhausted(arguments: object) -> None:
        raise raised

    monkeypatch.setattr(info, "run", exhausted)
    assert main(["info"]) == 2
    assert "memory ran out; use fewer frames" in capsys.readouterr().err
