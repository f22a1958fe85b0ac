"""What the kernels of csrc/hopper are compiled and launched with: macros, strides and tensor maps."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from .._nvrtc import Kernel, checked, parameter_bytes
from ..contract import SOURCES


def kernel(file: str, name: str, threads: int, shared_bytes: int, macros: tuple[tuple[str, int], ...]) -> Kernel:
    """Return the kernel `name` of a file of csrc/hopper."""
    return Kernel(SOURCES / "hopper" / file, "sm_90a", name, threads, shared_bytes, macros)


class TensorMap(ctypes.Structure):
    """What the copy engine must know of a tensor: the driver's CUtensorMap."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)
    ALIGNMENT = 64


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
    encoded = checked(
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
