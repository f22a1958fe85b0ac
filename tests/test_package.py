"""What the package promises as a package: floors, a light import, and what a wheel holds."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiers import full

from svggt_kernels.backends import BACKENDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "svggt_kernels"
COMPILER = os.environ.get("CXX", "c++")

# A module may import from its own floor's folder and from lower floors, never from a higher one or a sibling.
FLOORS = [
    {"packages", "rigid_motions", "user_warnings"},
    {"graph", "streams", "compiling", "derivatives", "io", "demo"},
    {"sources", "models", "layout"},
    {"coarse"},
    {"proof", "merging"},
    {"backends"},
    {"attention"},
    {"inference"},
    {"backend_errors", "patching"},
    {"streaming"},
    {"measure"},
    {"reconstruction"},
    {"serving"},
    {"cli"},
    {"__init__", "__main__"},
]

# The most lines of a module, by the folder or file that the limit is for.
MOST_LINES = {
    "svggt_kernels": 450,
    "svggt_kernels/patching/handle.py": 250,
    "tests": 620,
    "benchmarks": 620,
    "evaluation": 450,
}


def room(path: Path) -> str:
    """The part of the package that a file belongs to: a top-level module or a folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports, anywhere in its code, as paths below the package."""
    package = ["svggt_kernels", *path.relative_to(PACKAGE).parent.parts]
    modules: list[list[str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = base + (node.module.split(".") if node.module else [])
            modules += [[*stem, alias.name] for alias in node.names]
    return {tuple(parts[1:]) for parts in modules if parts[0] == "svggt_kernels" and len(parts) > 1}


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports, other than its own."""
    known = {room(file) for file in PACKAGE.rglob("*.py")}
    return {parts[0] if parts[0] in known else "__init__" for parts in imported_modules(path)} - {room(path)}


def test_every_module_has_a_floor():
    assert {room(path) for path in PACKAGE.rglob("*.py")} == set().union(*FLOORS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    floor = next(i for i, rooms in enumerate(FLOORS) if room(path) in rooms)
    below = set().union(*FLOORS[:floor])
    assert imported_rooms(path) <= below


def test_backends_do_not_import_one_another():
    folder = PACKAGE / "backends"
    families = {path.stem for path in folder.iterdir()} - {"__init__", "__pycache__", "_nvrtc", "contract"}
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        if own != "__init__":
            others = {parts[1] for parts in imported_modules(path) if parts[0] == "backends" and len(parts) > 1}
            assert others & families <= {own}, path


def names_of_backends(path: Path) -> set[str]:
    """What a file says of a single backend: a module of it, an attribute of `backends`, its name as a string.

    "cpu" and "triton" as strings name a device and a package too, and are left out.
    """
    names = set(BACKENDS)
    modules = {parts[1] for parts in imported_modules(path) if parts[0] == "backends" and len(parts) > 1}
    said = modules & names
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "backends":
            said |= {node.attr} & names
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said |= {node.value} & (names - {"cpu", "triton"})
    return said


def test_no_backend_is_named_above_its_folder():
    files = [path for path in PACKAGE.rglob("*.py") if room(path) != "backends"]
    assert {str(path): said for path in files if (said := names_of_backends(path))} == {}


def test_import_is_light():
    program = (
        "import socket, sys\n"
        "def refuse(*arguments): raise OSError('no network at import')\n"
        "socket.socket.connect = refuse\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "import svggt_kernels\n"
        "heavy = {'triton', 'matplotlib', 'PIL', 'rich', 'scipy', 'huggingface_hub', 'safetensors', 'pycolmap', 'av'}\n"
        "heavy |= {'trimesh', 'viser', 'mcp', 'pydantic'}\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} & heavy))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_exist():
    import svggt_kernels

    assert all(hasattr(svggt_kernels, name) for name in svggt_kernels.__all__)
    assert list(svggt_kernels.__all__) == sorted(svggt_kernels.__all__)


def contents_of_wheel(folder: Path) -> zipfile.ZipFile:
    """A wheel built in `folder` from a copy of the sources."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = shutil.ignore_patterns("__pycache__", "*.so", "not_built.txt")
    for name in ("svggt_kernels", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=built)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("svggt_kernels-*.whl")
    return zipfile.ZipFile(wheel)


def expected_in_wheel() -> set[str]:
    """What every wheel holds: Python, the trained weights, and sources of kernels that are compiled where they run."""
    suffixes, names = (".py", ".npz", ".json"), ("py.typed",)
    own = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*") if p.suffix in suffixes or p.name in names}
    shipped = [p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in (".cu", ".cuh", ".metal")]
    sources = {f"svggt_kernels/{p.relative_to(ROOT)}" for p in shipped}
    assert sources
    return own | sources


@full
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler, {COMPILER} is not there")
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path):
    names = contents_of_wheel(tmp_path).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    (compiled,) = inside - expected_in_wheel()
    assert expected_in_wheel() <= inside
    assert compiled.startswith("svggt_kernels/backends/cpu/_native.") and compiled.endswith(".so")
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    wheel = contents_of_wheel(tmp_path)
    note = "svggt_kernels/backends/cpu/not_built.txt"
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected_in_wheel() | {note}
    assert "it needs a C++17 compiler" in wheel.read(note).decode()


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler, {COMPILER} is not there")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86")
def test_a_compiler_that_does_not_know_amx_builds_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) exit 1; esac\nexec {COMPILER} "$@"\n')
    old.chmod(0o755)
    monkeypatch.syspath_prepend(ROOT / "csrc" / "cpu")
    from rules import rules

    monkeypatch.setenv("CXX", str(old))
    without = rules(tmp_path / "target", "bindings.cpp", "", "")
    assert "SVGGT_HAS_AMX_BF16" not in without and "tiles.cpp" not in without
    assert "SVGGT_HAS_AVX512 " in without and "-DSVGGT_ISA=avx512 " in without


@pytest.mark.parametrize("where", MOST_LINES)
def test_modules_are_of_readable_length(where: str):
    files = [ROOT / where] if where.endswith(".py") else (ROOT / where).rglob("*.py")
    lines = {str(file): len(file.read_text().splitlines()) for file in files}
    assert {file: count for file, count in lines.items() if count > MOST_LINES[where]} == {}
