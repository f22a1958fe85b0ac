"""Registers, spills and shared memory of every launch configuration, compiled offline: no GPU is needed.

    python -m benchmarks.resources [--capability 90 80] [--json]

Compiles the Triton kernels for each compute capability, dtype and head size with the configurations that the backend
ships, and reads what the assembler made of them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svggt_kernels.backends import triton as backend
from svggt_kernels.backends.triton import kernels

KERNELS = ("forward", "backward_queries", "backward_keys")
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        kernel: Name of the kernel.
        capability: Compute capability, 90 for 9.0.
        dtype: Dtype of the inputs, as Triton writes it.
        head_size: D.
        configuration: Rows x columns of a tile, warps and pipeline stages.
        registers: Registers per thread.
        spill_bytes: Local memory per thread, bytes.
        shared_bytes: Shared memory per program, bytes.
        tensor_copies: TMA loads in the machine code.
        tensor_products: Tensor core instructions in the machine code.
    """

    kernel: str
    capability: int
    dtype: str
    head_size: int
    configuration: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_copies: int
    tensor_products: int


def shipped(
    capability: int,
    dtypes: Iterable[torch.dtype] = tuple(TYPES),
    head_sizes: Iterable[int] = backend.HEAD_SIZES,
) -> Iterator[Resources]:
    """Compile every kernel as the backend launches it on one compute capability."""
    major_minor = (capability // 10, capability % 10)
    for dtype in dtypes:
        for head_size in head_sizes:
            with mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: major_minor):
                device = torch.device("cuda")
                config = backend.configs(device, dtype, head_size)
                descriptors = backend.uses_descriptors(device, dtype)
            for name in KERNELS:
                yield _compiled(name, capability, dtype, head_size, config, descriptors)


def _compiled(
    name: str, capability: int, dtype: torch.dtype, head_size: int, config: backend.Configs, descriptors: bool
) -> Resources:
    kernel, launch = getattr(kernels, name), getattr(config, name)
    constants = {
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "TAIL": config.tail,
        "D": head_size,
        "DESCRIPTORS": descriptors,
    }
    signature, values, attributes = {}, {}, {}
    for position, argument in enumerate(kernel.arg_names):
        aligned = [["tt.divisibility", 16]]
        if argument in constants:
            signature[argument], values[position,] = "constexpr", constants[argument]
        elif argument.endswith("_tiles") and not argument.startswith("num"):
            if descriptors:
                tokens = config.tail if "dense" in argument else launch.columns
                signature[argument] = f"tensordesc<{TYPES[dtype]}[1, 1, {tokens}, {head_size}]>"
            else:
                signature[argument], values[position,] = "constexpr", None
        elif argument.endswith("_ptr"):
            statistics = argument in ("lse_ptr", "inner_ptr")
            table = argument.startswith(("rows", "full", "tail", "dense_"))
            signature[argument] = "*fp32" if statistics else "*i32" if table else f"*{TYPES[dtype]}"
            attributes[position,] = aligned
        elif argument == "scale":
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument not in (*kernels.COUNTS, "lse_head"):
                attributes[position,] = aligned
    compiled = triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    usage, code = (_disassembled(compiled.asm["cubin"], option) for option in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return Resources(
        kernel=name,
        capability=capability,
        dtype=TYPES[dtype],
        head_size=head_size,
        configuration=f"{launch.rows}x{launch.columns}, {launch.num_warps} warps, {launch.num_stages} stages",
        registers=int(registers),
        spill_bytes=int(stack),
        shared_bytes=compiled.metadata.shared,
        tensor_copies=code.count("UTMALDG"),
        tensor_products=code.count("HGMMA") + code.count("HMMA"),
    )


def _disassembled(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print one line per compiled kernel."""
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of the Triton kernels.")
    parser.add_argument("--capability", type=int, nargs="+", default=[90, 80], help="compute capabilities (90 80)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    for capability in arguments.capability:
        for used in shipped(capability):
            if arguments.json:
                print(json.dumps(asdict(used)), flush=True)
            else:
                print(
                    f"{used.kernel:17} sm_{used.capability} {used.dtype} D {used.head_size:3} {used.configuration:26} "
                    f"{used.registers:3} registers, {used.spill_bytes:4} B spilled, {used.shared_bytes:6} B shared, "
                    f"{used.tensor_copies:2} TMA loads, {used.tensor_products:3} tensor core instructions",
                    flush=True,
                )


if __name__ == "__main__":
    main()
