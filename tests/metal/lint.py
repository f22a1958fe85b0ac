"""Rules of Metal's language that neither compiler of these tests knows."""

from __future__ import annotations

import re

from . import source

HEADERS = {"metal_stdlib", "metal_simdgroup", "metal_simdgroup_matrix"}
ATTRIBUTES = {"kernel", "buffer", "max_total_threads_per_threadgroup", *source.BUILTINS}
MOST_BUFFERS = 31

# Words of Metal that C++ takes as names, words that have no business in a shader, and what Metal 3 does not have.
FORBIDDEN = {
    r"\b(?:std|c10|at)::": "nothing but Metal's own library may be used",
    r"\bdouble\b|\d\.\d*(?![\d.]*(?:f|e-?\d+f))(?=[^\w.])": "Metal has no double: write 1.0f",
    r"\b(?:assert|printf|new|delete|throw|try|goto|virtual|dynamic_cast|typeid)\b": "Metal has no such thing",
    r"\bif constexpr\b|\bauto \[|\[[&=]?\]\s*\(": "Metal 3.1 is C++14 without lambdas",
    r"\b(?:int|float|long|uint|bool|half|auto)[ *&]+(?:kernel|vertex|fragment|thread|device|constant|access)\b": (
        "this name is a word of Metal's"
    ),
    r"\bsimdgroup_async_copy\b|\batomic": "not in every Metal, or not repeatable",
    r"\bunsigned\b|\blong long\b|\bsize_t\b": "write int, uint or long, whose sizes Metal fixes",
}


def complaints(text: str) -> list[str]:
    """What is wrong with a source, each with its line; nothing is right."""
    found = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.isascii():
            found.append(f"line {number}: the source must be ASCII")
        if (include := re.match(r"#include\s*(.*)", line)) and include[1].strip("<>") not in HEADERS:
            found.append(f"line {number}: only headers of Metal's library may be included, got {include[1]}")
        code = line.partition("//")[0]
        found += [f"line {number}: {why}" for pattern, why in FORBIDDEN.items() if re.search(pattern, code)]
        if re.search(r"\bthreadgroup \w+ \w+(\[.*\])?\s*=", code):
            found.append(f"line {number}: a threadgroup variable cannot be initialised")
        if re.match(r"threadgroup\b", code):
            found.append(f"line {number}: a threadgroup variable must be inside a kernel")
        if re.match(r"(?:static |const )?(?:constexpr )?(?:int|uint|long|float|half|bool) \w+(?:\[.*\])? ?[=;]", code):
            found.append(f"line {number}: a global must be `constant constexpr`")
    expanded = source.expand(text)
    for attribute in re.findall(r"\[\[(\w+)|, (\w+)\(\w+\)\]\]", expanded):
        if "".join(attribute) not in ATTRIBUTES:
            found.append(f"attribute {''.join(attribute)} is not one that the shader should need")
    for parameters in re.findall(r"\w+\(([^()]*[*&][^()]*)\) ?\{", expanded):
        for parameter in parameters.split(","):
            # A pointer or reference without an address space is an error in Metal.
            if re.search(r"[*&]", parameter) and not re.search(r"\b(device|constant|thread|threadgroup)\b", parameter):
                found.append(f"parameter `{' '.join(parameter.split())}` needs an address space")
    for local in re.findall(r"^\s+((?:const )?\w+[*&] \w+) =", expanded, flags=re.MULTILINE):
        found.append(f"local `{local}` needs an address space")
    for kernel in source.kernels(text):
        found += _of_kernel(kernel)
    return found


def _of_kernel(kernel: source.Kernel) -> list[str]:
    found = []
    places = [parameter.buffer for parameter in kernel.buffers]
    if places != list(range(len(places))):
        found.append(f"{kernel.name}: buffers must be numbered 0, 1, ... in order, got {places}")
    if len(places) > MOST_BUFFERS:
        found.append(f"{kernel.name}: Metal has {MOST_BUFFERS} buffers, this takes {len(places)}")
    for parameter in kernel.parameters:
        if parameter.buffer is None:
            if source.BUILTIN_TYPES.get(parameter.attribute) != parameter.type:
                found.append(f"{kernel.name}: {parameter.name} has a type that {parameter.attribute} has not")
        elif not re.fullmatch(r"(?:const )?device \w+\*|const constant \w+&", parameter.type):
            found.append(f"{kernel.name}: {parameter.name} must be a device pointer or a constant reference")
        elif not parameter.is_tensor and parameter.element in ("int", "uint", "bool", "short"):
            found.append(f"{kernel.name}: {parameter.name} arrives as 8 bytes, so it must be long")
    return found
