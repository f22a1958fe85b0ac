"""What the package promises as a package: floors, a light import, and what a wheel holds."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "svggt_kernels"

# A module may import from its own floor's folder and from lower floors, never from a higher one or a sibling.
FLOORS = [
    {"covisibility", "models", "toy", "scenes", "photos", "video"},
    {"layout"},
    {"budget"},
    {"backends"},
    {"attention"},
    {"verify", "patching"},
    {"cli"},
    {"__init__", "__main__"},
]


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
    families = {path.stem for path in folder.iterdir()} - {"__init__", "__pycache__"}
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        if own != "__init__":
            others = {parts[1] for parts in imported_modules(path) if parts[0] == "backends" and len(parts) > 1}
            assert others & families <= {own}, path


def test_import_is_light():
    program = (
        "import socket, sys\n"
        "def refuse(*arguments): raise OSError('no network at import')\n"
        "socket.socket.connect = refuse\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "import svggt_kernels\n"
        "heavy = {'triton', 'matplotlib', 'PIL', 'rich', 'scipy', 'huggingface_hub', 'safetensors', 'pycolmap', 'av'}\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} & heavy))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_exist():
    import svggt_kernels

    assert all(hasattr(svggt_kernels, name) for name in svggt_kernels.__all__)
    assert list(svggt_kernels.__all__) == sorted(svggt_kernels.__all__)


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("svggt_kernels", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("svggt_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    expected = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*") if p.suffix == ".py" or p.name == "py.typed"}
    sources = {f"svggt_kernels/{p.relative_to(ROOT)}" for p in (ROOT / "csrc").rglob("*.*")}
    assert sources and inside == expected | sources
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_modules_are_of_readable_length():
    folders = (PACKAGE, ROOT / "tests", ROOT / "benchmarks")
    long = {str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py") if lines(path) > 620}
    assert long == set()


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())
