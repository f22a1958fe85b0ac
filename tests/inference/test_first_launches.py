"""What is launched beforehand is what a fused forward then launches, and it disturbs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from doubles.dpt import random_head
from doubles.fused import IMAGES, model

import svggt_kernels
from svggt_kernels.inference import first_launches, ops
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
from svggt_kernels.inference import aggregator, dpt, first_launches, heads, ops, ops_triton, within_frames
from svggt_kernels.inference.layer_outputs import LayerOutputs

class Recorder:
    # Stands for a kernel: notes as what it would be compiled, and leaves what is there as the result.
    def __init__(self, name, kernel):
        self.name = name
        self.bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))

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
    for own in {None, dtype}:
        outputs = LayerOutputs(len(network.global_blocks), None, torch.float32)
        aggregator.aggregate(network, images, outputs, attend=within_frames.DenseAttention(), dtype=own,
            attend_within_frames=within_frames.by_pytorch, parts=aggregator.ChunkSizes(2, 40))

def head_forward(head, frames, height, width):
    size = head.patch_size
    tokens = torch.empty(1, frames, 5 + height * width, len(head.norm.weight), device="meta")
    images = torch.empty(1, frames, 3, height * size, width * size, device="meta")
    line = lambda of, n: torch.empty(n, of, device="meta")
    maps = [(project.out_channels, height, width) for project in head.projects]
    maps.append((head.scratch.output_conv1.out_channels, height * size, width * size))
    tables = [(line(channels, columns), line(channels, rows)) for channels, rows, columns in maps]
    dpt.ReadyHead(head, tables, torch.float32)([tokens] * 4, images, 5)

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
