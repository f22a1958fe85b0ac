"""Every kernel of the Hopper backend compiles for sm_90a, without a GPU, into registers alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiers import every

from svggt_kernels.backends import _nvrtc as runtime
from svggt_kernels.backends.contract import SOURCES
from svggt_kernels.backends.hopper import backward_pass, forward_pass

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
triton = pytest.importorskip("triton", reason="triton, which carries cuobjdump, is not installed")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES_OF_A_BLOCK = 227 * 1024

FORWARD = [
    forward_pass.kernel(dtype, head_size, variant, with_lse, weighted)
    for weighted in (False, True)
    for with_lse in (False, True)
    for head_size in forward_pass.CONFIGS
    for dtype, variant in (*((torch.bfloat16, kind) for kind in forward_pass.VARIANTS), (torch.float16, "online"))
]
BACKWARD = {
    kernel: None  # each once
    for head_size in forward_pass.CONFIGS
    for dtype in (torch.bfloat16, torch.float16)
    for accumulate in (False, True)
    for kernel in backward_pass.kernels(dtype, head_size, accumulate)
}


def name(kernel: runtime.Kernel) -> str:
    return "-".join([kernel.name, *(f"{key}{value}".lower() for key, value in kernel.defines)])


@pytest.mark.parametrize("extra", [{}, {"EVERY_LANE_ARRIVES": 1}], ids=["as it runs", "for racecheck"])
@pytest.mark.parametrize("kernel", every(7, [*FORWARD, *BACKWARD]), ids=name)
def test_compiles_without_spills_and_without_a_warning(kernel: runtime.Kernel, extra: dict[str, int], tmp_path: Path):
    cubin = tmp_path / "kernel.cubin"
    code, log = runtime.compile_to_cubin(kernel.source, kernel.architecture, {**dict(kernel.defines), **extra})
    assert log == ""
    cubin.write_bytes(code)
    report = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"(\w+):(\d+)", report.stdout.split(f"Function {kernel.name}:")[1].splitlines()[1]))
    # setmaxnreg shares these out anew; all must fit into the 65536 of a multiprocessor.
    assert int(usage["REG"]) * kernel.threads <= 65536
    assert int(usage["STACK"]) == 0 and int(usage["LOCAL"]) == 0
    assert kernel.shared_bytes <= SHARED_BYTES_OF_A_BLOCK


@pytest.mark.parametrize("with_lse", [False, True], ids=["output alone", "with LSE"])
def test_the_log_says_that_products_are_serialized(with_lse: bool, tmp_path: Path, monkeypatch):
    sources = shutil.copytree(SOURCES / "hopper", tmp_path / "hopper")
    source = (sources / "forward.cu").read_text()
    assert "if (takes_sums) state.take_sums();" in source
    (sources / "forward.cu").write_text(source.replace("if (takes_sums) state.take_sums();", "state.take_sums();"))
    kernel = forward_pass.kernel(torch.bfloat16, 64, "bounded", with_lse)
    assert "serialized" in runtime.compile_to_cubin(sources / "forward.cu", "sm_90a", dict(kernel.defines))[1]


def test_a_source_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"forward.cu did not compile with .*error"):
        runtime.compile_to_cubin(SOURCES / "hopper" / "forward.cu", "sm_90a", {"HEAD_SIZE": 64})


def test_threads_that_want_the_same_kernel_compile_it_once(monkeypatch: pytest.MonkeyPatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    fine, compiled, start = SimpleNamespace(value=0), [], threading.Barrier(4)

    def compile_to_cubin(*_: object) -> tuple[bytes, str]:
        compiled.append(threading.current_thread())
        time.sleep(0.2)
        return b"", ""

    for name in ("cuCtxSetCurrent", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"):
        monkeypatch.setattr(driver, name, lambda *_: (fine, object()))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(runtime, "_context", lambda _: None)
    monkeypatch.setattr(runtime, "compile_to_cubin", compile_to_cubin)
    kernel = FORWARD[0]._replace(name="one that is loaded by this test alone")

    def load(_: int) -> object:
        start.wait()
        return runtime.load(kernel, torch.device("cuda", 0))

    with ThreadPoolExecutor(4) as pool:
        functions = set(pool.map(load, range(4)))
    assert len(compiled) == len(functions) == 1
