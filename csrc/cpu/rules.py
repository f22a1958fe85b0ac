"""What ninja builds from this folder: one object of kernel.cpp, or tiles.cpp, for every instruction set."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# What kernel.cpp is compiled for; the program chooses among them where it runs.
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": "-mavx2 -mfma",
        "avx512": AVX512,
        "avx512_bf16": f"{AVX512} -mavx512bf16",
        "amx_bf16": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
    }
# A build for tests: what is written in tiles, on any CPU.
EMULATE_TILES = "-DSVGGT_EMULATE_TILES"
EMULATED = {"baseline": "", "amx_bf16": ""}

# GCC 12 takes the undefined operand inside its own intrinsics for a mistake.
WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
SHARED = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"


def rules(target: Path, main: str, flags: str, link: str, includes: Sequence[str] = ()) -> str:
    """Return the ninja file that builds `target` from the source `main`, block_sparse_attention.cpp and the kernels.

    `flags` are for the compiler and the linker, `link` for the linker alone. With EMULATE_TILES among the flags there
    are only the kernels in tiles, emulated, and the baseline.
    """
    source = Path(__file__).parent.absolute()
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
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
    for name, instructions in (EMULATED if EMULATE_TILES in flags else INSTRUCTION_SETS).items():
        objects.append(f"kernel_{name}.o")
        lines += [
            f"build {objects[-1]}: compile {source / ('tiles.cpp' if name == 'amx_bf16' else 'kernel.cpp')}",
            f"  flags = -DSVGGT_ISA={name} {instructions}",
        ]
    lines += [f"build {target}: link {' '.join(objects)}", f"default {target}"]
    return "\n".join(lines) + "\n"
