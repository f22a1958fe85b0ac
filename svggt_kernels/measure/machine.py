"""The machine: versions, devices and which backends can run on them, each by its name."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from .. import backends
from ..packages import installed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def versions() -> dict[str, str]:
    """Return the versions that decide a result, and the operating system."""
    return {
        "svggt_kernels": installed("svggt-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "numpy": installed("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def devices() -> dict[str, str]:
    """Return every device that torch can use here, with its name."""
    names = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        names["mps"] = f"Apple GPU of {_processor()}"
    return names | {"cpu": f"{_processor()}, {torch.get_num_threads()} threads"}


def device_name(device: torch.device) -> str:
    """Return the device's name as `devices` lists it."""
    key = f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
    return devices()[key]


def backend_answers(device: torch.device, head_size: int) -> dict[str, dict[str, str | None]]:
    """Return for every backend and dtype why the backend cannot run there; None where it can."""
    by_dtype = {dtype_name(dtype): backends.reasons(device, dtype, head_size) for dtype in DTYPES}
    return {name: {dtype: reasons[name] for dtype, reasons in by_dtype.items()} for name in backends.BACKENDS}


def instruction_sets() -> dict[str, str | None]:
    """Return what backends that can run on the CPU use of it, and better sets that it has with why not."""
    dtype, found = torch.bfloat16, dict[str, str | None]()
    for backend in backends.BACKENDS.values():
        if backend.unsupported(torch.device("cpu"), dtype, 64) is None:
            found |= backend.TRAITS.notes(dtype)
    return found


def by_reason(answers: dict[str, str | None]) -> dict[str | None, str]:
    """Return the dtypes that share an answer, `{reason: "float16, bfloat16"}`."""
    grouped: dict[str | None, list[str]] = {}
    for dtype, reason in answers.items():
        grouped.setdefault(reason, []).append(dtype)
    return {reason: ", ".join(dtypes) for reason, dtypes in grouped.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def _processor() -> str:
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
