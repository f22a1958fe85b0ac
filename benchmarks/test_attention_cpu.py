"""`pytest benchmarks --benchmark-only`: the CPU-sized cases, each checked before it is timed."""

from __future__ import annotations

import pytest
import torch

from svggt_kernels.backends import BACKENDS

from .attention import inputs
from .cases import GROUPS
from .check import check_forward, check_gradients
from .peers import PEERS, backend

CPU = torch.device("cpu")
CONTENDERS = [*map(backend, BACKENDS), PEERS["sdpa-dense-flash"], PEERS["sdpa-gather"]]


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", GROUPS["cpu"], ids=lambda case: case.name)
def test_forward(benchmark, case, contender):
    q, k, v, _ = inputs(case, CPU, torch.float32, contender.storage)
    if reason := contender.obstacle(case, q):
        pytest.skip(reason)
    assert check_forward(contender, case, q, k, v) is None
    with torch.no_grad():
        benchmark(contender.prepare(case, q, k, v))
    benchmark.extra_info["useful_gflops"] = case.useful_flops() / benchmark.stats["median"] / 1e9


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", GROUPS["cpu"], ids=lambda case: case.name)
def test_backward(benchmark, case, contender):
    q, k, v, grad = inputs(case, CPU, torch.float32, contender.storage)
    for x in (q, k, v):
        x.requires_grad_()
    if reason := contender.obstacle(case, q):
        pytest.skip(reason)
    assert check_gradients(contender, case, q, k, v, grad) is None
    out = contender.prepare(case, q, k, v)()
    benchmark(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    benchmark.extra_info["useful_gflops"] = case.useful_flops("bwd") / benchmark.stats["median"] / 1e9
