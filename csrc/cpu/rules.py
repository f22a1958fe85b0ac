"""What ninja builds from this folder: one object of kernel.cpp, or tiles.cpp, for every instruction set."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# What the kernels are compiled for, as far as the compiler knows it; the program chooses among them where it runs.
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": "-mavx2 -mfma",
        "avx512": AVX512,
        "avx512_bf16": f"{AVX512} -mavx512bf16",
        "amx_bf16": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
    }
# For tests, what is written in tiles on any CPU.
EMULATED_TILES = {"amx_bf16": "-DSVGGT_EMULATE_TILES"}

# GCC 12 takes the undefined operand inside its own intrinsics for a mistake.
WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
SHARED = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"


def rules(
    target: Path,
    main: str,
    flags: str,
    link: str,
    includes: Sequence[str] = (),
    sets: Mapping[str, str] = INSTRUCTION_SETS,
) -> str:
    """Return the ninja file that builds `target` from the source `main`, block_sparse_attention.cpp and the kernels.

    `flags` are for the compiler and the linker, `link` for the linker alone. `sets` are instruction sets and their
    flags; one that the compiler does not know is left out. block_sparse_attention.cpp learns by SVGGT_HAS_... which
    ones there are.

    Raises:
        OSError: There is no compiler.
    """
    source = Path(__file__).parent.absolute()
    compiler = os.environ.get("CXX", "c++")
    known = {name: instructions for name, instructions in sets.items() if _knows(compiler, instructions)}
    lines = [
        f"cxx = {compiler}",
        f"cflags = -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -pthread {WARNINGS} {flags} "
        + " ".join(f"-isystem {path}" for path in includes),
        "rule compile",
        "  command = $cxx $cflags $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx -pthread {flags} {link} $in -o $out",
    ]
    objects = []
    for name in (main, "block_sparse_attention.cpp"):
        objects.append(name.replace(".cpp", ".o"))
        lines.append(f"build {objects[-1]}: compile {source / name}")
    present = [f"-DSVGGT_HAS_{name.upper()}" for name in known]
    if known.items() >= EMULATED_TILES.items():
        present.extend(EMULATED_TILES.values())
    lines.append(f"  flags = {' '.join(present)}")
    for name, instructions in known.items():
        objects.append(f"kernel_{name}.o")
        lines += [
            f"build {objects[-1]}: compile {source / ('tiles.cpp' if name == 'amx_bf16' else 'kernel.cpp')}",
            f"  flags = -DSVGGT_ISA={name} {instructions}",
        ]
    lines += [f"build {target}: link {' '.join(objects)}", f"default {target}"]
    return "\n".join(lines) + "\n"


def _knows(compiler: str, flags: str) -> bool:
    """Return whether the compiler takes the flags: GCC takes those of bfloat16 from 10 on, those of AMX from 11 on."""
    command = [*shlex.split(compiler), *flags.split(), "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
