"""Builds svggt_kernels; all metadata is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# What csrc/cpu/kernel.cpp is compiled for; the extension chooses among them where it runs.
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}

WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized"
NOT_BUILT = Path("svggt_kernels", "backends", "cpu", "not_built.txt")


class BuildWithSources(build_py):
    """Copies csrc/hopper into the package: its kernels are compiled where they run."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in sorted(Path("csrc").rglob("*.cu*")):
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
            why = f"it was not built when the package was installed: {error}"
            print(f"warning: no CPU kernels: {why}", file=sys.stderr)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{why}\n")

    def build_extension(self, extension: Extension) -> None:
        import ninja
        import pybind11

        if os.environ.get("SVGGT_KERNELS_NO_EXTENSION"):
            raise OSError("SVGGT_KERNELS_NO_EXTENSION is set")
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        (folder / "build.ninja").write_text(rules(target, includes))
        subprocess.run([Path(ninja.BIN_DIR, "ninja")], cwd=folder, check=True)


def rules(target: Path, includes: list[str]) -> str:
    """Return what ninja builds the extension by."""
    source = Path("csrc", "cpu").absolute()
    link = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    compile_flags = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -pthread {WARNINGS}"
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"cflags = {compile_flags} {' '.join(f'-isystem {path}' for path in includes)}",
        "rule compile",
        "  command = $cxx $cflags $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx {link} -pthread $in -o $out",
    ]
    objects = ["bindings.o", "block_sparse_attention.o"]
    lines += [f"build {name}: compile {source / name.replace('.o', '.cpp')}" for name in objects]
    for name, flags in INSTRUCTION_SETS.items():
        objects.append(f"kernel_{name}.o")
        lines += [f"build {objects[-1]}: compile {source / 'kernel.cpp'}", f"  flags = -DSVGGT_ISA={name} {flags}"]
    lines += [f"build {target}: link {' '.join(objects)}", f"default {target}"]
    return "\n".join(lines) + "\n"


setup(
    cmdclass={"build_py": BuildWithSources, "build_ext": BuildWithNinja},
    ext_modules=[Extension("svggt_kernels.backends.cpu._native", sources=[], optional=True)],
)
