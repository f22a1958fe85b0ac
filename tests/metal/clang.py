"""Lets clang check the address spaces of a Metal source, in the C++ of Metal 3 and of Metal 4."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from .source import THREADGROUP_ARRAY

FOLDER = Path(__file__).parent
STANDARDS = ("c++14", "c++17")
NAMES = (*(f"clang++-{version}" for version in range(22, 16, -1)), "clang++")
CLANG = next((path for name in NAMES if (path := shutil.which(name))), None)

WARNINGS = ("-Wall", "-Wextra", "-Wc++17-extensions", "-Wdouble-promotion", "-Werror")
QUIET = ("-Wno-unknown-attributes", "-Wno-unused-function", "-Wno-unused-const-variable")


def complaints(text: str, standard: str) -> list[str]:
    """What clang says about a source; nothing is right."""
    # A local variable cannot have an address space in C++, a static one can.
    body = THREADGROUP_ARRAY.sub(r"\1static threadgroup \2 \3[\4];", text)
    command = [
        CLANG,
        f"-std={standard}",
        "-fsyntax-only",
        *WARNINGS,
        *QUIET,
        f"-I{FOLDER / 'spaces'}",
        "-x",
        "c++",
        "-",
    ]
    done = subprocess.run(command, input=body, capture_output=True, text=True)
    return [line for line in done.stderr.splitlines() if "error:" in line]
