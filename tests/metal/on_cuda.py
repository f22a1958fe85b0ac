"""The Metal source as CUDA C++, compiled by NVRTC, and a stand-in for `torch.mps.compile_shader` that launches it."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor

from .source import BUILTIN_TYPES, THREADGROUP_ARRAY, THREADS_ATTRIBUTE

SHIM = Path(__file__).parent / "cuda" / "shim.cuh"
KERNEL = re.compile(THREADS_ATTRIBUTE + r" void (\w+)\(([^{]*)\) \{")
BUILTINS = {
    "threadgroup_position_in_grid": "uint3{blockIdx.x, blockIdx.y, blockIdx.z}",
    "threadgroups_per_grid": "uint3{gridDim.x, gridDim.y, gridDim.z}",
    "simdgroup_index_in_threadgroup": "threadIdx.x / 32",
    "thread_index_in_simdgroup": "threadIdx.x % 32",
}


def program(text: str) -> str:
    """The source as CUDA C++, with a `run_` kernel for each of its own."""
    body = re.sub(r"^#include.*$", "", text, flags=re.MULTILINE)
    body = body.replace('_Pragma("clang loop unroll(full)")', '_Pragma("unroll")')
    body = THREADGROUP_ARRAY.sub(r"\1__shared__ \2 \3[\4];", body)
    body = KERNEL.sub(_with_entry, body)
    # CUDA's own attributes use these words, so they cannot be macros.
    body = re.sub(r"\b(?:device|constant|thread|threadgroup)\b ?", "", body)
    return SHIM.read_text() + body


def _with_entry(match: re.Match[str]) -> str:
    threads, name, declarations = match.groups()
    taken, given = [], []
    for declaration in declarations.split(",\n"):
        kind, attribute = re.fullmatch(r"\s*(.+) \[\[(\w+)(?:\(\d+\))?\]\]\s*", declaration).groups()
        if attribute in BUILTIN_TYPES:
            given.append(BUILTINS[attribute])
        else:
            taken.append(kind.replace("&", ""))  # what is no tensor is passed by value
            given.append(kind.split()[-1])
    parameters = re.sub(r" \[\[[^\]]*\]\]", "", declarations)
    return (
        f"__device__ void {name}({parameters});\n"
        f'extern "C" __global__ void __launch_bounds__({threads}) run_{name}({", ".join(taken)}) {{\n'
        f"  {name}({', '.join(given)});\n}}\n"
        f"__device__ void {name}({parameters}) {{"
    )


def compile_to_cubin(text: str, architecture: str = "sm_90") -> bytes:
    """Compile the source; needs no GPU."""
    handle = _checked(nvrtc.nvrtcCreateProgram(program(text).encode(), b"shader.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", b"-lineinfo"]
    (status,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
    if status.value != 0:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(handle)))
        _checked(nvrtc.nvrtcGetProgramLog(handle, log))
        raise SyntaxError(log.decode())
    cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(handle)))
    _checked(nvrtc.nvrtcGetCUBIN(handle, cubin))
    return bytes(cubin)


class Library:
    """What `compile_shader` gives, on a CUDA device: kernels as attributes."""

    def __init__(self, text: str) -> None:
        _make_current()
        self.module = _checked(driver.cuModuleLoadData(compile_to_cubin(text)))

    def __getattr__(self, name: str) -> Kernel:
        return Kernel(_checked(driver.cuModuleGetFunction(self.module, f"run_{name}".encode())))


class Kernel:
    """A kernel that takes the arguments of torch's."""

    thread_execution_width = 32
    max_threads_per_threadgroup = 1024

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *arguments: Any, threads: list[int], group_size: list[int]) -> None:
        """Launch on the current stream."""
        _make_current()
        values = [_as_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        blocks = [t // g for t, g in zip(threads, group_size, strict=True)]
        stream = torch.cuda.current_stream().cuda_stream
        launched = driver.cuLaunchKernel(self.function, *blocks, *group_size, 0, stream, ctypes.addressof(pointers), 0)
        _checked(launched)


def _make_current() -> None:
    """Make the device's context current: a thread that has not called the runtime yet, as autograd's, has none."""
    _checked(driver.cuCtxSetCurrent(_context(torch.cuda.current_device())))


@cache
def _context(device: int) -> Any:
    return _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))


def _as_value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, list):
        return (ctypes.c_int64 * len(argument))(*argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"CUDA answered {status.name}")
    return values[0] if values else None
