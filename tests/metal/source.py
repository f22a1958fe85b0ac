"""What a Metal source says: its kernels and their parameters, and its text as a C++ program for the CPU."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache

# What Metal passes by attribute, and what stands for it on the CPU.
BUILTINS = {
    "threadgroup_position_in_grid": "metal::uint3{group.position[0], group.position[1], group.position[2]}",
    "threadgroups_per_grid": "metal::uint3{group.positions[0], group.positions[1], group.positions[2]}",
    "simdgroup_index_in_threadgroup": "group.running / emulator::LANES",
    "thread_index_in_simdgroup": "group.running % emulator::LANES",
}
BUILTIN_TYPES = {
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "simdgroup_index_in_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
}

THREADS_ATTRIBUTE = r"\[\[kernel, max_total_threads_per_threadgroup\((\w+)\)\]\]"
THREADGROUP_ARRAY = re.compile(r"^( *)threadgroup (\w+) (\w+)\[([^;]*)\];", re.MULTILINE)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    Attributes:
        type: Its type with address space, `const device half*`.
        element: The type alone, `half`.
        buffer: Its place among the arguments; None for what Metal passes by itself.
        attribute: How Metal passes it.
    """

    name: str
    type: str
    element: str
    buffer: int | None
    attribute: str

    @property
    def is_tensor(self) -> bool:
        return self.type.endswith("*")

    @property
    def is_written(self) -> bool:
        return self.is_tensor and not self.type.startswith("const ")


@dataclass(frozen=True)
class Kernel:
    name: str
    threads: int  # of a threadgroup, at most
    parameters: tuple[Parameter, ...]

    @property
    def buffers(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if parameter.buffer is not None]


@cache
def expand(text: str) -> str:
    """The text without comments, with its macros and conditions carried out."""
    own = re.sub(r"^#include.*$", "", text, flags=re.MULTILINE)
    command = ["g++", "-E", "-P", "-x", "c++", "-"]
    return subprocess.run(command, input=own, capture_output=True, text=True, check=True).stdout


def kernels(text: str) -> list[Kernel]:
    """The kernels of a source."""
    expanded = expand(text)
    found = []
    for match in re.finditer(THREADS_ATTRIBUTE + r" void (\w+)\(", expanded):
        end = expanded.index(") {", match.end())
        declarations = expanded[match.end() : end].split(",\n")
        parameters = tuple(_parameter(" ".join(declaration.split())) for declaration in declarations)
        found.append(Kernel(match[2], constant(text, match[1]), parameters))
    return found


def _parameter(declaration: str) -> Parameter:
    match = re.fullmatch(r"(.+?[*&]?) (\w+) \[\[(\w+)(?:\((\d+)\))?\]\]", declaration)
    if match is None:
        raise ValueError(f"a parameter must be `type name [[attribute]]`, got {declaration!r}")
    kind, name, attribute, buffer = match.groups()
    element = re.sub(r"\b(const|device|constant)\b|[*&]", "", kind).strip()
    return Parameter(name, kind, element, None if buffer is None else int(buffer), attribute)


def constant(text: str, name: str) -> int:
    """The value of a constant that is written as a product of numbers and constants."""
    if name.isdigit():
        return int(name)
    definition = re.search(rf"constant constexpr int {name} = ([\w *]+);", expand(text))
    if definition is None:
        raise ValueError(f"there is no constant {name}")
    value = 1
    for factor in definition[1].split("*"):
        value *= constant(text, factor.strip())
    return value


def longs_of(text: str, struct: str) -> int:
    """How many 8-byte integers a struct of such integers has."""
    if struct == "long":
        return 1
    definition = re.search(rf"struct {struct} \{{\s*(\w+) ([\w, ]+);\s*\}};", expand(text))
    if definition is None:
        raise ValueError(f"there is no struct {struct} of one kind of members")
    return longs_of(text, definition[1]) * len(definition[2].split(","))


def cpu_program(text: str) -> str:
    """The source as a C++ program that runs one of its kernels; line numbers stay."""
    body = THREADGROUP_ARRAY.sub(
        r"\1\2(&\3)[\4] = *(\2(*)[\4])emulator::threadgroup_memory(__LINE__, sizeof(\2[\4]));", text
    )
    calls, entries = [], []
    for kernel in kernels(text):
        arguments = ", ".join(
            BUILTINS[p.attribute]
            if p.buffer is None
            else f"({p.type})buffers[{p.buffer}]"
            if p.is_tensor
            else f"*({p.type.rstrip('&')}*)buffers[{p.buffer}]"
            for p in kernel.parameters
        )
        calls.append(
            f"static void call_{kernel.name}(char* const* buffers) {{\n"
            f"  const emulator::Threadgroup& group = emulator::Threadgroup::current();\n"
            f"  {kernel.name}({arguments});\n}}\n"
        )
        writes = ", ".join(str(p.is_written).lower() for p in kernel.buffers)
        entries.append(f'{{"{kernel.name}", call_{kernel.name}, {{{writes}}}}}')
    return (
        f'#include "main.h"\n#line 1 "shader.metal"\n{body}\n#line 1 "calls"\n{"".join(calls)}'
        f"int main(int count, char** words) {{\n"
        f"  return emulator::run_program({{{', '.join(entries)}}}, count, words);\n}}\n"
    )
