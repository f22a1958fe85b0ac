"""The tiers of tests, the summary of what did not run, and what is compiled once for all workers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import builds
import pytest
from tiers import every, full

CASES = """
import os, pytest, torch
from tiers import every, full

@pytest.mark.parametrize(("a", "b"), every(3, [(i, -i) for i in range(7)]))
def test_cases(a, b):
    assert a == -b

@full
def test_long(): pass

@pytest.mark.skip(reason="no such machine")
def test_elsewhere(): pass

def test_threads():
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"

def test_folder():
    from pathlib import Path
    from builds import once
    once("shared/name", lambda path: path.write_text("built"))
    assert once("shared/name", lambda path: pytest.fail("built twice")).read_text() == "built"
"""
LEFT_OUT = "in the full tier alone: make test-all, or pytest --full"


def ran(folder: Path, *options: str) -> str:
    """What pytest prints about CASES."""
    here = Path(__file__).parent
    for name in ("conftest.py", "tiers.py", "builds.py"):
        shutil.copy(here / name, folder)
    shutil.copy(here.parent / "pyproject.toml", folder)
    (folder / "test_cases.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "test_cases.py", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("options", "passed", "skipped", "reasons"),
    [
        (("-n", "1", "--dist", "worksteal"), 5, 6, [f"5  {LEFT_OUT}", "1  no such machine"]),
        pytest.param(("--full",), 10, 1, ["1  no such machine"], marks=full),
    ],
    ids=["quick, a worker", "full, one process"],
)
def test_a_run_ends_with_what_did_not_run(options, passed: int, skipped: int, reasons: list[str], tmp_path: Path):
    *lines, closing = filter(None, ran(tmp_path, *options).splitlines())
    assert re.search(rf"{passed} passed, {skipped} skipped in ", closing)
    assert [line.strip() for line in lines[-len(reasons) :]] == reasons
    assert "not run, and why" in lines[-len(reasons) - 1]


def test_every():
    assert every(2, range(4)) == [0, pytest.param(1, marks=full), 2, pytest.param(3, marks=full)]
    assert every(2, [(0, 1), (2, 3)]) == [(0, 1), pytest.param(2, 3, marks=full)]


def test_what_is_compiled_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builds, "FOLDER", tmp_path)
    calls, both = [], threading.Barrier(2)

    def build(path: Path) -> None:
        calls.append(path)
        path.write_text("built")

    def ask() -> None:
        both.wait(timeout=30)
        builds.once("folder/name", build)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (tmp_path / "folder" / "name").read_text() == "built"


def test_what_fails_to_compile_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builds, "FOLDER", tmp_path)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        builds.once("name", fail)
    assert builds.once("name", lambda path: path.write_text("built")).read_text() == "built"
