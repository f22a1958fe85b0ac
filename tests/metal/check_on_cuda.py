"""Checks the Metal source as CUDA C++ on an NVIDIA GPU, through the launcher; see cuda/run.sh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from layouts import random_layout
from torch import Tensor

from svggt_kernels import BlockLayout, CovisibilityGraph, block_sparse_attention
from svggt_kernels.backend_errors import error_ratios
from svggt_kernels.backends import metal
from svggt_kernels.backends.metal import shader, trial
from svggt_kernels.proof import within_budget

from . import on_cuda

VARIANTS = [(dtype, head_size) for dtype in shader.ELEMENTS for head_size in shader.HEAD_SIZES]
TOOLS = {
    "memcheck": ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no"],
    "racecheck": ["compute-sanitizer", "--tool", "racecheck", "--racecheck-report", "all"],
}
Result = dict[str, Any]


def use_cuda() -> None:
    """Let the Metal backend run on CUDA tensors."""
    metal.DEVICE = "cuda"
    trial.failure = lambda *_: None
    torch.mps.compile_shader = on_cuda.Library
    torch.mps.synchronize = torch.cuda.synchronize


def inputs(tokens: int, heads: int, dtype: torch.dtype, head_size: int = 64) -> list[Tensor]:
    """Return q, k, v and a gradient of the output."""
    return [torch.randn(1, heads, tokens, head_size, device="cuda", dtype=dtype) for _ in range(4)]


def band(frames: int, tokens: int, reach: int, **options: Any) -> BlockLayout:
    return BlockLayout.from_graph(CovisibilityGraph.sequential(frames, reach).to("cuda"), tokens, **options)


def run(layout: BlockLayout, *tensors: Tensor, backend: str = "metal") -> list[Tensor]:
    """Return output, LSE and the gradients of q, k and v; the last tensor is the gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out, lse = block_sparse_attention(*leaves, layout, return_lse=True, backend=backend)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def random_layouts(dtype: torch.dtype, head_size: int) -> Result:
    """25 random layouts; the worst ratio of each quantity."""
    worst: dict[str, float] = {}
    for seed in range(25):
        layout = random_layout(seed, max_tokens=200, device="cuda")
        ratios = error_ratios(layout, dtype, head_size=head_size, backend="metal", batch=1 + seed % 2, seed=seed)
        worst = {name: max(worst.get(name, 0.0), ratio, key=lambda x: (x != x, x)) for name, ratio in ratios.items()}
    return {"ratios": worst, "passed": within_budget(worst)}


def frames_of(tokens: int, dtype: torch.dtype, head_size: int) -> Result:
    """Four frames with special tokens."""
    layout = band(4, tokens, 1, special_tokens=5)
    ratios = error_ratios(layout, dtype, head_size=head_size, backend="metal", heads=1)
    return {"ratios": ratios, "passed": within_budget(ratios)}


def full_size(dtype: torch.dtype) -> Result:
    """32 frames of VGGT, all heads: two of them against float64, all of them twice."""
    layout = band(32, 1374, 2, special_tokens=5)
    tensors = inputs(layout.num_tokens, 16, dtype)
    first = run(layout, *tensors)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    second = run(layout, *tensors)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    ratios = {}
    two = [x[:, ::15] for x in tensors]
    exact = run(layout, *(x.double() for x in two), backend="reference")
    plain = run(layout, *two, backend="reference")
    for i, name in enumerate(("out", "lse", "grad q", "grad k", "grad v")):
        # A plain implementation rounds its result to the dtype, whatever else it does.
        others = (plain[i], exact[i].to(dtype))
        error, *allowed = (float((x.double() - exact[i]).square().mean().sqrt()) for x in (first[i][:, ::15], *others))
        ratios[name] = error / max(allowed)
    return {"ratios": ratios, "bitwise repeatable": same, "seconds": seconds, "passed": same and within_budget(ratios)}


def far_apart() -> Result:
    """Tokens so far apart that offsets pass 2^31 elements; the bits must be those of adjacent tokens."""
    layout = band(3, 32, 1)
    tensors = inputs(96, 1, torch.float16)
    stride = 2**25
    memory = torch.empty(96 * stride, device="cuda", dtype=torch.float16)
    far = [memory[64 * i :].as_strided((1, 1, 96, 64), (1, 1, stride, 1)) for i in range(4)]
    for target, source in zip(far, tensors, strict=True):
        target.copy_(source)
    return {"passed": all(torch.equal(a, b) for a, b in zip(run(layout, *far), run(layout, *tensors), strict=True))}


def many_tokens() -> Result:
    """1600 frames alone, 2.25e9 elements: the last one must be as it is by itself."""
    q, k, v, _ = inputs(1600 * 1374, 16, torch.float16)
    out = block_sparse_attention(q, k, v, band(1600, 1374, 0), backend="metal")
    last = [x[:, :, -1374:] for x in (q, k, v)]
    return {"passed": torch.equal(out[:, :, -1374:], block_sparse_attention(*last, band(1, 1374, 0), backend="metal"))}


def cases() -> Iterator[tuple[Result, Callable[[], Result]]]:
    """Yield what each case is, and the case."""
    for dtype, head_size in VARIANTS:
        variant = {"dtype": str(dtype), "head_size": head_size}
        yield {"case": "random layouts", **variant}, lambda d=dtype, h=head_size: random_layouts(d, h)
        for tokens in (782, 1041, 1374):
            name = {"case": f"4 frames of {tokens}", **variant}
            yield name, lambda t=tokens, d=dtype, h=head_size: frames_of(t, d, h)
    for dtype in shader.ELEMENTS:
        name = {"case": "32 frames of 1374, 16 heads", "dtype": str(dtype), "head_size": 64}
        yield name, lambda d=dtype: full_size(d)
    yield {"case": "offsets beyond 2^31", "dtype": "torch.float16", "head_size": 64}, far_apart
    yield {"case": "1600 frames of 1374, 16 heads", "dtype": "torch.float16", "head_size": 64}, many_tokens


def sanitized() -> None:
    """Run what a sanitizer watches: forward and backward with tails, dense tokens and several heads."""
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), 75, special_tokens=2)
    tensors = [x.cuda() for x in torch.randn(4, 1, 2, layout.num_tokens, 64, dtype=torch.float16)]
    run(layout.to("cuda"), *tensors)
    torch.cuda.synchronize()


def start(tool: str) -> subprocess.Popen[str]:
    """Start a sanitizer on this module; every tensor gets memory of its own, so that no overrun stays unseen."""
    return subprocess.Popen(
        [*TOOLS[tool], "--error-exitcode", "9", sys.executable, "-m", __spec__.name, "sanitized"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def machine() -> Result:
    """Return what every line carries."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": os.environ.get("SVGGT_COMMIT") or git.stdout.strip() or "unknown",
        "command": "tests/metal/cuda/run.sh",
    }


def main() -> int:
    """Print one JSON line per case; return the exit code."""
    use_cuda()
    if sys.argv[1:] == ["sanitized"]:
        sanitized()
        return 0
    tools = {tool: start(tool) if shutil.which("compute-sanitizer") else None for tool in TOOLS}
    with ThreadPoolExecutor() as pool:  # compiling takes longest
        texts = [shader.source(*variant, backward) for variant in VARIANTS for backward in (False, True)]
        cubins = dict(zip(texts, pool.map(on_cuda.compile_to_cubin, texts), strict=True))
    on_cuda.compile_to_cubin = cubins.__getitem__
    about, passed = machine(), True

    def report(result: Result) -> None:
        nonlocal passed
        passed &= result["passed"]
        print(json.dumps(result | about), flush=True)

    for name, case in cases():
        begin = time.perf_counter()
        try:
            result = case()
        except Exception as error:  # whatever a kernel raises is the finding
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
        report(name | result | {"wall seconds": round(time.perf_counter() - begin, 2)})
    for tool, process in tools.items():
        if process is None:
            report({"case": tool, "passed": False, "error": "compute-sanitizer is not on the path"})
            continue
        output = process.communicate(timeout=300)[0]
        lines = [line for line in output.splitlines() if line.startswith("=========")]
        report({"case": tool, "passed": process.returncode == 0, "output": lines[-20:]})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
