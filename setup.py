"""Builds svggt_kernels; all metadata is in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "csrc" / "cpu"))
from rules import SHARED, rules

NOT_BUILT = Path("svggt_kernels", "backends", "cpu", "not_built.txt")


class BuildWithSources(build_py):
    """Copies into the package the sources of the kernels that are compiled where they run."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in sorted(p for p in Path("csrc").rglob("*.*") if p.suffix in (".cu", ".cuh", ".metal")):
            target = Path(self.build_lib, "svggt_kernels", source)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


class BuildWithNinja(build_ext):
    """Builds the CPU kernels if there is a compiler, else leaves a note that says why not."""

    def run(self) -> None:
        root = Path() if self.editable_mode else Path(self.build_lib)
        note = root / NOT_BUILT
        note.unlink(missing_ok=True)
        try:
            super().run()
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            why = f"it was not built at installation: {error}; it needs a C++17 compiler, pybind11 and ninja"
            print(f"warning: no CPU kernels: {why}", file=sys.stderr)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{why}\n")

    def build_extension(self, extension: Extension) -> None:
        import ninja
        import pybind11

        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        (folder / "build.ninja").write_text(rules(target, "bindings.cpp", "-O3", SHARED, includes))
        subprocess.run([Path(ninja.BIN_DIR, "ninja")], cwd=folder, check=True)


setup(
    cmdclass={"build_py": BuildWithSources, "build_ext": BuildWithNinja},
    ext_modules=[Extension("svggt_kernels.backends.cpu._native", sources=[], optional=True)],
)
