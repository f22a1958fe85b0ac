"""CUDA C++ at run time: compile with the NVRTC that torch ships, make tensor maps, launch.

No nvcc is needed where the package is installed. A kernel compiles in about a second, once per process and device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_IN_PACKAGE = Path(__file__).parents[2] / "csrc"
_IN_CHECKOUT = Path(__file__).parents[3] / "csrc"
SOURCES = (_IN_PACKAGE if _IN_PACKAGE.is_dir() else _IN_CHECKOUT) / "hopper"
"""Where the kernels' sources are: inside the installed package, or at the top of a checkout."""


class Kernel(NamedTuple):
    """One kernel as it is compiled and launched.

    Attributes:
        file: Its source in `SOURCES`.
        name: Its name there.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
        defines: Macros, by name.
    """

    file: str
    name: str
    threads: int
    shared_bytes: int
    defines: tuple[tuple[str, int], ...]


class TensorMap(ctypes.Structure):
    """What the copy engine must know of a tensor: the driver's CUtensorMap."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class Tensor4(ctypes.Structure):
    """A tensor `[B, H, N, D]` of which a kernel knows the strides of the first three axes."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor) -> Tensor4:
        """Describe x."""
        return cls(x.data_ptr(), *x.stride()[:3])


def defines(
    dtype: torch.dtype, head_size: int, parameters: type[ctypes.Structure], shared_bytes: int
) -> tuple[tuple[str, int], ...]:
    """Return the macros that every kernel takes; it checks its own sizes of parameters and shared memory by them."""
    sizes = (("PARAMETER_BYTES", parameter_bytes(parameters)), ("SHARED_BYTES", shared_bytes))
    return (("HEAD_SIZE", head_size), *((("BFLOAT16", 1),) if dtype == torch.bfloat16 else ()), *sizes)


def parameter_bytes(parameters: type[ctypes.Structure]) -> int:
    """Return the size of a kernel's struct of parameters, which is aligned as its fields are."""
    return -(-ctypes.sizeof(parameters) // (alignment := _alignment(parameters))) * alignment


def _alignment(kind: Any) -> int:
    if kind is TensorMap:
        return 64
    if issubclass(kind, ctypes.Array):
        return _alignment(kind._type_)
    if issubclass(kind, ctypes.Structure):
        return max(_alignment(of_field) for _, of_field, *_ in kind._fields_)
    return ctypes.alignment(kind)


def multiprocessors(device: torch.device) -> int:
    """Return how many blocks run at once, at one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def tensor_map(x: Tensor, tokens: int) -> TensorMap:
    """Return a map of x `[B, H, N, D]`, 16-bit, that reads boxes of `tokens` tokens and 64 columns of d.

    In shared memory they lie in the 128-byte swizzle. Tokens behind the last one read as zeros.
    """
    return _tensor_map(x.dtype, x.data_ptr(), tuple(x.shape), x.stride(), tokens)


# Making one takes longer than a launch, and from layer to layer tensors lie in the same places.
@lru_cache(maxsize=1024)
def _tensor_map(
    dtype: torch.dtype, address: int, shape: tuple[int, ...], strides: tuple[int, ...], tokens: int
) -> TensorMap:
    from cuda.bindings import driver

    B, H, N, D = shape
    # The stride of an axis of length 1 is never used, but must be valid.
    steps = [stride if n > 1 else D for n, stride in zip((N, H, B), (strides[i] for i in (2, 1, 0)), strict=True)]
    one = driver.cuuint32_t(1)
    # The second-level cache may fetch 256 bytes for the 128 of a box's row where the next belong to the same head.
    fetched = 256 if D > 64 or steps[0] == D else 128
    encoded = _checked(
        driver.cuTensorMapEncodeTiled(
            getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{str(dtype).removeprefix('torch.').upper()}"),
            4,
            address,
            [driver.cuuint64_t(n) for n in (D, N, H, B)],
            [driver.cuuint64_t(step * dtype.itemsize) for step in steps],
            [driver.cuuint32_t(n) for n in (64, tokens, 1, 1)],
            [one] * 4,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            getattr(driver.CUtensorMapL2promotion, f"CU_TENSOR_MAP_L2_PROMOTION_L2_{fetched}B"),
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return TensorMap.from_buffer_copy(ctypes.string_at(encoded.getPtr(), ctypes.sizeof(TensorMap)))


def launch(kernel: Kernel, blocks: int, parameters: ctypes.Structure, device: torch.device) -> None:
    """Launch on the device's current stream."""
    from cuda.bindings import driver

    passed = ctypes.create_string_buffer(bytes(parameters), parameter_bytes(type(parameters)))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(passed))
    stream = torch.cuda.current_stream(device).cuda_stream
    _checked(
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
    _checked(driver.cuCtxSetCurrent(_context(device.index)))
    return _function(kernel, device.index)


@cache
def _context(device: int) -> Any:
    from cuda.bindings import driver

    return _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))


@cache
def _function(kernel: Kernel, device: int) -> Any:
    from cuda.bindings import driver

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a kernel must be loaded before a CUDA graph captures it, {kernel.name} {dict(kernel.defines)} is not; "
            "call svggt_kernels.prepare with a new layout, or run attention once, under the same softmax and gradients"
        )
    cubin, _ = compile_to_cubin(kernel.file, dict(kernel.defines))
    module = _checked(driver.cuModuleLoadData(cubin))
    function = _checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, attribute, kernel.shared_bytes))
    return function


def nvrtc_version() -> str:
    """Return the version of NVRTC.

    Raises:
        ImportError: If its bindings cannot be imported.
        RuntimeError: If its library cannot be loaded.
    """
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    _checked((status,))
    return f"{major}.{minor}"


def compile_to_cubin(file: str, defines: Mapping[str, int]) -> tuple[bytes, str]:
    """Compile one source for compute capability 9.0a, and return the cubin and the compiler's log; needs no GPU.

    Raises:
        RuntimeError: If it does not compile, with the compiler's log.
    """
    from cuda.bindings import nvrtc

    headers = sorted(SOURCES.glob("*.cuh"))
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            (SOURCES / file).read_bytes(),
            file.encode(),
            len(headers),
            [header.read_bytes() for header in headers],
            [header.name.encode() for header in headers],
        )
    )
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17", *(f"-D{k}={v}".encode() for k, v in defines.items())]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    said = log.rstrip(b"\0").decode().strip()
    try:
        _checked(result)
    except RuntimeError as error:
        raise RuntimeError(f"{file} did not compile with {dict(defines)}: {said}") from error
    cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return bytes(cubin), said


def _checked(result: tuple[Any, ...]) -> Any:
    """Return what a call of the driver or of NVRTC gave, without its status.

    Raises:
        RuntimeError: If the status is an error.
    """
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"CUDA answered {status.name}")
    return values[0] if values else None
