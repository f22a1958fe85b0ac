"""CUDA C++ at run time: compile with the NVRTC that torch ships, and launch.

No nvcc is needed where the package is installed. A kernel compiles in about a second, once per process and device.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

_loading = threading.Lock()
"""Held while a kernel is compiled, so that a second thread that wants it waits and does not compile it too."""


class Kernel(NamedTuple):
    """One kernel as it is compiled and launched.

    Attributes:
        source: Its source; headers lie beside it.
        architecture: What it is compiled for, as "sm_90a".
        name: Its name in the source.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
        defines: Macros, by name.
    """

    source: Path
    architecture: str
    name: str
    threads: int
    shared_bytes: int
    defines: tuple[tuple[str, int], ...]


@cache
def parameter_bytes(parameters: type[ctypes.Structure]) -> int:
    """Return the size of a kernel's struct of parameters, which is aligned as its fields are, or by `ALIGNMENT`."""
    return -(-ctypes.sizeof(parameters) // (alignment := _alignment(parameters))) * alignment


def _alignment(kind: Any) -> int:
    if issubclass(kind, ctypes.Array):
        return _alignment(kind._type_)
    if issubclass(kind, ctypes.Structure):
        fields = (_alignment(of_field) for _, of_field, *_ in kind._fields_)
        return getattr(kind, "ALIGNMENT", None) or max(fields)
    return ctypes.alignment(kind)


def multiprocessors(device: torch.device) -> int:
    """Return how many blocks run at once, at one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Kernel, blocks: int, parameters: ctypes.Structure, device: torch.device) -> None:
    """Launch on the device's current stream."""
    from cuda.bindings import driver

    passed = ctypes.create_string_buffer(bytes(parameters), parameter_bytes(type(parameters)))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(passed))
    stream = torch.cuda.current_stream(device).cuda_stream
    checked(
        driver.cuLaunchKernel(
            load(kernel, device), blocks, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes, stream,
            ctypes.addressof(pointers), 0,
        )
    )  # fmt: skip


def load(kernel: Kernel, device: torch.device) -> Any:
    """Make the device's context current and return the kernel's function, compiled and loaded at the first call only.

    Raises:
        RuntimeError: If the first call comes while a CUDA graph captures.
    """
    from cuda.bindings import driver

    # A thread that has not called the runtime yet, as autograd's, has no current context.
    checked(driver.cuCtxSetCurrent(_context(device.index)))
    with _loading:
        return _function(kernel, device.index)


@cache
def _context(device: int) -> Any:
    from cuda.bindings import driver

    return checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(device))))


@cache
def _function(kernel: Kernel, device: int) -> Any:
    from cuda.bindings import driver

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a kernel must be loaded before a CUDA graph captures it, {kernel.name} {dict(kernel.defines)} is not; "
            "call svggt_kernels.prepare with a new layout, or run attention once, under the same softmax and gradients"
        )
    cubin, _ = compile_to_cubin(kernel.source, kernel.architecture, dict(kernel.defines))
    module = checked(driver.cuModuleLoadData(cubin))
    function = checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(function, attribute, kernel.shared_bytes))
    return function


def nvrtc_version() -> str:
    """Return the version of NVRTC.

    Raises:
        ImportError: If its bindings cannot be imported.
        RuntimeError: If its library cannot be loaded.
    """
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    checked((status,))
    return f"{major}.{minor}"


def compile_to_cubin(source: Path, architecture: str, defines: Mapping[str, int]) -> tuple[bytes, str]:
    """Compile one source, with the headers beside it, and return the cubin and the compiler's log; needs no GPU.

    Raises:
        RuntimeError: If it does not compile, with the compiler's log.
    """
    from cuda.bindings import nvrtc

    headers = sorted(source.parent.glob("*.cuh"))
    program = checked(
        nvrtc.nvrtcCreateProgram(
            source.read_bytes(),
            source.name.encode(),
            len(headers),
            [header.read_bytes() for header in headers],
            [header.name.encode() for header in headers],
        )
    )
    macros = (f"-D{name}={value}" for name, value in defines.items())
    options = [text.encode() for text in (f"--gpu-architecture={architecture}", "--std=c++17", *macros)]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    said = log.rstrip(b"\0").decode().strip()
    try:
        checked(result)
    except RuntimeError as error:
        raise RuntimeError(f"{source.name} did not compile with {dict(defines)}: {said}") from error
    cubin = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return bytes(cubin), said


def checked(result: tuple[Any, ...]) -> Any:
    """Return what a call of the driver or of NVRTC gave, without its status.

    Raises:
        RuntimeError: If the status is an error.
    """
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"CUDA answered {status.name}")
    return values[0] if values else None
