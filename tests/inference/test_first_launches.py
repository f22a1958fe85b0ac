"""What is launched beforehand is what a fused forward then launches, and it disturbs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.fused import IMAGES, model
from torch import Tensor, nn

import svggt_kernels
from svggt_kernels import packages
from svggt_kernels.inference import first_launches, fused_forward
from svggt_kernels.inference.first_launches import FirstLaunches

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys
import torch
from functools import partial
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from doubles.dpt import random_head
from doubles.vggt import VGGT
from svggt_kernels.inference import aggregator, dpt, first_launches, fused_forward, heads, ops, ops_triton
from svggt_kernels.inference import within_frames
from svggt_kernels.inference.layer_outputs import LayerOutputs

class Recorder:
    # Stands for a kernel: notes as what it would be compiled, and leaves what is there as the result.
    def __init__(self, name, kernel):
        self.name = name
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            _, specialisation, used = self.bind(*arguments, debug=False, **options)
            compiled.add(f"{self.name}{specialisation}{used}")
        return launch

compiled = set()
for name, value in list(vars(ops_triton).items()):
    if isinstance(value, JITFunction):
        setattr(ops_triton, name, Recorder(name, value))
ops._by_triton = lambda x: x.dtype != torch.float64
torch.is_autocast_enabled = lambda device: False  # the meta device has none

def forward(network, dtype, frames, height, width):
    images = torch.empty(1, frames, 3, height, width, device="meta")
    ready = aggregator.ReadyAggregator(network)
    for own in {None, dtype}:
        outputs = LayerOutputs(len(network.global_blocks), None, torch.float32)
        aggregator.aggregate(ready, images, outputs, attend=fused_forward._dense, dtype=own,
            attend_within_frames=within_frames.by_pytorch, tokens_together=40)

def head_forward(head, frames, height, width):
    size = head.patch_size
    tokens = torch.empty(1, frames, 5 + height * width, len(head.norm.weight), device="meta")
    images = torch.empty(1, frames, 3, height * size, width * size, device="meta")
    line = lambda of, n: torch.empty(n, of, device="meta")
    maps = [(project.out_channels, height, width) for project in head.projects]
    maps.append((head.scratch.output_conv1.out_channels, height * size, width * size))
    tables = [(line(channels, columns), line(channels, rows)) for channels, rows, columns in maps]
    dpt.ReadyHead(head, tables, torch.float32)(dict.fromkeys(head.intermediate_layer_idx, tokens), images, 5)

def both(launches, forward):
    compiled.clear()
    for call in launches:
        call()
    beforehand = compiled.copy()
    compiled.clear()
    forward()
    print(json.dumps([sorted(beforehand), sorted(compiled)]))

with torch.no_grad():
    with torch.device("meta"):
        network = VGGT().aggregator
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()  # as autocast would multiply
    for dtype in (None, torch.bfloat16):
        x = torch.empty(1, first_launches.TOKENS, network.camera_token.shape[-1], device="meta")
        calls = [call for own in {None, dtype} for call in aggregator.launches(network, x, own)]
        for sizes in ((3, 28, 42), (16, 56, 56), (1, 14, 14)):
            both(calls, partial(forward, network, dtype, *sizes))
    for activation in ("exp", "inv_log"):
        head = random_head(activation=activation, features=16, pos_embed=False).to("meta")
        for sizes in ((3, 2, 3), (16, 4, 4), (1, 16, 16)):
            both(dpt.launches(head), partial(head_forward, head, *sizes))
"""


def test_what_is_launched_beforehand_is_what_a_forward_launches():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == 2 * 3 + 2 * 3
    for beforehand, needed in lines:
        assert beforehand == needed, set(beforehand) ^ set(needed)
        assert len(needed) >= 4


def test_calls_of_one_function_follow_one_another_and_others_run_beside_them():
    meet, order, at_work = threading.Barrier(2, timeout=30), [], threading.Lock()

    def first(index: int) -> None:
        assert at_work.acquire(blocking=False)
        if index == 0:
            meet.wait()  # for the other function, which runs at the same time
        order.append(index)
        at_work.release()

    def second() -> None:
        meet.wait()

    FirstLaunches([*(partial(first, index) for index in range(20)), partial(second)], None).wait()
    assert order == list(range(20)) and not meet.broken


def test_calls_begin_after_those_before_and_what_raises_stops_no_other():
    order, may_go = [], threading.Event()

    def fail() -> None:
        assert may_go.wait(30)
        order.append("failed")
        raise RuntimeError("it does not compile")

    def follow(grad_is_on: bool) -> None:
        order.append(torch.is_grad_enabled() == grad_is_on)

    before = FirstLaunches([partial(fail)], None)
    after = FirstLaunches([partial(follow, False)], None, before)
    assert order == []
    may_go.set()
    after.wait()
    assert order == ["failed", True]


def test_a_verification_waits_before_a_forward_of_our_own_and_a_forward_leaves_nothing_running(monkeypatch):
    events, network = [], model()

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self) -> None:
            events.append(self.name)

    def start(aggregator: nn.Module, heads: Iterable[nn.Module], *settings: object) -> dict[nn.Module, Recorded]:
        assert settings == (torch.device("cpu"), torch.bfloat16, "reference")
        return {aggregator: Recorded("aggregator"), **dict.fromkeys(heads, Recorded("heads"))}

    aggregate = fused_forward.aggregate
    monkeypatch.setattr(first_launches, "start", start)

    def noted(aggregator: nn.Module, images: Tensor, *given: object, **named: object) -> None:
        events.append(images.dtype)
        aggregate(aggregator, images, *given, **named)

    monkeypatch.setattr(fused_forward, "aggregate", noted)
    options = {"precision": "bf16", "backend": "reference", "fused": True}
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", **options) as handle:
        network(IMAGES)
        assert handle.report().inference.reason is None
        first, events[:] = events.copy(), []
        network(IMAGES)
    single, double = torch.float32, torch.float64
    assert first == [double, "aggregator", single, single, "aggregator", "heads"]
    assert events == [single]


def test_nothing_is_launched_beforehand_on_the_cpu():
    network = model()
    assert first_launches.start(network.aggregator, [], torch.device("cpu"), None, None) == {}


@pytest.mark.gpu
def test_a_forward_compiles_nothing_that_was_not_launched_beforehand(monkeypatch: pytest.MonkeyPatch):
    if not packages.runs_triton(device := torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("its kernels are PyTorch's")
    from triton import JITFunction, knobs

    from svggt_kernels.inference import ops_triton

    for kernel in vars(ops_triton).values():
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()
    compiled, network = [], model().cuda()

    def note(*, fn: Any, repr: str, **_: object) -> None:
        if fn.module == ops_triton.__name__:
            compiled.append(repr)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for launches in first_launches.start(network.aggregator, [], device, None, None).values():
            launches.wait()
        beforehand, compiled[:] = compiled.copy(), []
        with svggt_kernels.patch(network, covisibility="all") as handle:
            network(IMAGES.cuda())
    assert handle.report().inference.reason is None
    assert len(beforehand) >= 5 and compiled == []
