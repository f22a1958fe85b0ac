"""The C++ of the CPU backend under sanitizers, without Python: csrc/cpu/sanitize.cpp."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import ninja
import pytest
from tiers import full

SOURCE = Path(__file__).parents[2] / "csrc" / "cpu"
COMPILER = os.environ.get("CXX", "c++")


def flags_of(sanitizer: str) -> str:
    return f"-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize={sanitizer}"


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler, {COMPILER} is not there")
@pytest.mark.parametrize(
    ("sanitizer", "kernels"),
    [
        ("address,undefined", "tiles"),
        ("thread", "baseline"),
        pytest.param("address,undefined", "baseline", marks=full),
        pytest.param("thread", "tiles", marks=full),
        pytest.param("address,undefined", "the rest", marks=full),
        pytest.param("thread", "the rest", marks=full),
    ],
)
def test_sanitizer_is_clean(sanitizer: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SOURCE)
    from rules import EMULATED_TILES, INSTRUCTION_SETS, rules

    empty, program = tmp_path / "empty.cpp", tmp_path / "sanitize"
    empty.write_text("int main() {}\n")
    link = [COMPILER, *flags_of(sanitizer).split(), str(empty), "-o", str(tmp_path / "empty")]
    if subprocess.run(link, capture_output=True).returncode:
        pytest.skip(f"{COMPILER} has no {sanitizer} sanitizer")
    # Sanitizers do not see what the tiles of a CPU read and write.
    of_kernels = {"baseline": {"baseline": INSTRUCTION_SETS["baseline"]}, "tiles": EMULATED_TILES}
    rest = {
        name: flags for name, flags in INSTRUCTION_SETS.items() if name != "baseline" and name not in EMULATED_TILES
    }
    if not (sets := of_kernels.get(kernels, rest)):
        pytest.skip(f"the kernels are compiled for no instruction set but the baseline on {platform.machine()}")
    (tmp_path / "build.ninja").write_text(rules(program, "sanitize.cpp", flags_of(sanitizer), "", sets=sets))
    build = subprocess.run([Path(ninja.BIN_DIR, "ninja")], cwd=tmp_path, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == "", run.stderr
