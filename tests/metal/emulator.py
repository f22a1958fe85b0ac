"""Runs a Metal source on the CPU, and stands in for `torch.mps.compile_shader`, stricter than the original."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from builds import once
from torch import Tensor

from . import source
from .lint import complaints

FOLDER = Path(__file__).parent

WARNINGS = ("-Wall", "-Wextra", "-Wdouble-promotion", "-Werror", "-Wno-attributes", "-Wno-unknown-pragmas")
COMMON = ("-std=c++17", "-fno-strict-aliasing", *WARNINGS)
PLAIN = ("-O1", "-march=native", "-ffp-contract=off")
FAST_MATH = ("-O1", "-march=native", "-ffast-math")
SANITIZED = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

DTYPES = {
    "half": (torch.float16, 1),
    "bfloat": (torch.bfloat16, 1),
    "float": (torch.float32, 1),
    "int": (torch.int32, 1),
    "int2": (torch.int32, 2),
    "int4": (torch.int32, 4),
}
ALL_SCHEDULES = 4

AVAILABLE = shutil.which("g++") is not None


class EmulatorError(Exception):
    """A kernel that did not compile, or did what Metal does not allow."""


@cache
def _program(text: str, flags: tuple[str, ...]) -> Path:
    """The source compiled as a program for the CPU."""
    program = source.cpu_program(text)

    def build(path: Path) -> None:
        cpp = path.with_suffix(".cpp")
        cpp.write_text(program)
        _compile(str(cpp), f"-I{_headers(flags)}", *flags, to=path)

    return once(f"shader-{_digest(program, *flags)}", build)


def _headers(flags: tuple[str, ...]) -> Path:
    """A folder with the emulator's own headers, compiled for these flags: half the time of a program."""
    main = str(FOLDER / "cpu" / "main.h")
    compiled = once(
        f"headers-{_digest(*flags)}/main.h.gch", lambda path: _compile("-x", "c++-header", main, *flags, to=path)
    )
    return compiled.parent


def _compile(*arguments: str, to: Path) -> None:
    command = ["g++", *COMMON, *arguments, f"-I{FOLDER / 'cpu'}", "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise EmulatorError(f"the shader did not compile: {done.stderr[:4000]}")


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


class Library:
    """What `compile_shader` gives: kernels as attributes."""

    def __init__(self, text: str, flags: tuple[str, ...] = PLAIN, schedules: int = ALL_SCHEDULES) -> None:
        found = complaints(text)
        if found:
            raise SyntaxError("\n".join(found))
        for kernel in source.kernels(text):
            setattr(self, kernel.name, EmulatedKernel(text, kernel, flags, schedules))


class EmulatedKernel:
    """A kernel that takes the arguments of torch's, and checks what torch does not."""

    thread_execution_width = 32

    def __init__(self, text: str, kernel: source.Kernel, flags: tuple[str, ...], schedules: int) -> None:
        self.text, self.kernel, self.schedules = text, kernel, schedules
        self.max_threads_per_threadgroup = kernel.threads
        self.program = _program(text, flags)

    def __call__(self, *arguments: Any, threads: list[int], group_size: list[int]) -> None:
        """Run the kernel now; its tensors must be those that its signature asks for."""
        name, parameters = self.kernel.name, self.kernel.buffers
        if len(arguments) != len(parameters):
            raise EmulatorError(f"{name} has {len(parameters)} buffers, got {len(arguments)} arguments")
        if len(threads) != len(group_size) or any(t <= 0 or t % g for t, g in zip(threads, group_size, strict=True)):
            raise EmulatorError(f"threads {threads} must be whole groups of {group_size}")
        if math.prod(group_size) != self.kernel.threads:
            raise EmulatorError(f"a group must have {self.kernel.threads} threads, got {group_size}")
        contents = [self._content(p, argument) for p, argument in zip(parameters, arguments, strict=True)]
        inline = sum(len(content) for p, content in zip(parameters, contents, strict=True) if not p.is_tensor)
        if inline > 4096:
            raise EmulatorError(f"arguments that are no tensors may have 4096 bytes, got {inline}")
        grid = [t // g for t, g in zip(threads, group_size, strict=True)]
        written = iter(self._run(contents, grid))
        for parameter, argument, content in zip(parameters, arguments, contents, strict=True):
            if parameter.is_written:
                _bytes_of(argument).copy_(torch.frombuffer(bytearray(next(written)), dtype=torch.uint8))
                assert len(content) == _bytes_of(argument).numel()

    def _run(self, contents: list[bytes], grid: list[int]) -> list[bytes]:
        words = [self.kernel.name, *map(str, grid), str(self.kernel.threads), str(self.schedules), "1"]
        done = subprocess.run(
            [self.program, *words],
            input=b"".join(struct.pack("<Q", len(content)) + content for content in contents),
            capture_output=True,
            timeout=300,
            env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"},
        )
        if done.returncode != 0:
            raise EmulatorError(f"{self.kernel.name}: {done.stderr.decode(errors='replace')[:3000]}")
        written, begin = [], 0
        for parameter, content in zip(self.kernel.buffers, contents, strict=True):
            if parameter.is_written:
                written.append(done.stdout[begin : begin + len(content)])
                begin += len(content)
        return written

    def _content(self, parameter: source.Parameter, argument: Any) -> bytes:
        """The bytes that the kernel would find behind the argument."""
        where = f"{self.kernel.name}, buffer {parameter.buffer} ({parameter.type} {parameter.name})"
        if parameter.is_tensor:
            dtype, width = DTYPES[parameter.element]
            if not isinstance(argument, Tensor) or argument.dim() == 0 or argument.numel() == 0:
                raise EmulatorError(f"{where} takes a tensor that is not empty, got {argument!r}")
            if argument.dtype != dtype:
                raise EmulatorError(f"{where} takes {dtype}, got {argument.dtype}")
            if width > 1 and not (argument.is_contiguous() and argument.shape[-1] == width):
                raise EmulatorError(f"{where} takes rows of {width}, got {list(argument.shape)}")
            if argument.dim() in (1, 3) and not argument.is_contiguous():
                raise EmulatorError(f"{where} has no strides of its own, so the tensor must be contiguous")
            if argument.dim() == 4 and argument.stride(-1) != 1:
                raise EmulatorError(f"{where} must have an adjacent last axis, got strides {argument.stride()}")
            return _bytes_of(argument).numpy().tobytes()
        if parameter.element == "float" and isinstance(argument, float):
            return struct.pack("<f", argument)
        if parameter.element != "float":
            numbers = argument if isinstance(argument, list) else [argument]
            count = source.longs_of(self.text, parameter.element)
            if all(type(n) is int for n in numbers) and len(numbers) == count:
                return struct.pack(f"<{count}q", *numbers)
            raise EmulatorError(f"{where} takes {count} integers, got {argument!r}")
        raise EmulatorError(f"{where} takes a float, got {argument!r}")


def _bytes_of(x: Tensor) -> Tensor:
    """From the first to the last element of x, as bytes that share its memory."""
    elements = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.detach().as_strided((elements,), (1,)).view(torch.uint8)
