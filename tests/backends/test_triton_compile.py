"""The Triton kernels compile for the GPUs they are meant for; checked without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import full

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys, torch
from dataclasses import asdict
from benchmarks.resources import shipped
for used in shipped(int(sys.argv[1]), (torch.bfloat16,), (64,)):
    print(json.dumps(asdict(used)))
"""


@pytest.mark.parametrize(
    ("capability", "shared_limit"),
    [(90, 227), *(pytest.param(*other, marks=full) for other in [(80, 163), (89, 99), (100, 227), (120, 99)])],
)
def test_shipped_configurations_fit(capability: int, shared_limit: int):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert [used["kernel"] for used in kernels] == ["forward", "backward_queries", "backward_keys"]
    for used in kernels:
        assert used["shared_bytes"] <= shared_limit * 1024, used
        assert used["tensor_products"] > 0, used
        if capability == 90:
            # What the keys kernel spills costs less than smaller tiles would: measured.
            assert used["spill_bytes"] <= (128 if used["kernel"] == "backward_keys" else 0), used
            assert used["tensor_copies"] > 0, used


LEAN = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from svggt_kernels.inference import ops_triton as triton_kernels
from svggt_kernels.merging import kernel as merging

def compiled(name, warps, module=triton_kernels, **arguments):
    kernel = getattr(module, name)
    typed = {argument: given for argument, given in arguments.items() if isinstance(given, str)}
    signature = {argument: typed.get(argument, "constexpr") for argument in kernel.arg_names}
    places = {argument: (place,) for place, argument in enumerate(kernel.arg_names)}
    constants = {places[argument]: given for argument, given in arguments.items() if argument not in typed}
    divisible = [argument for argument in typed if typed[argument].startswith("*") or argument == "n"]
    aligned = {places[argument]: [["tt.divisibility", 16]] for argument in divisible}
    source = ASTSource(kernel, signature, constants, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": warps})
    ptx = code.asm["ptx"]
    wide = {"wide_loads": ptx.count("ld.global.v"), "wide_stores": ptx.count("st.global.v")}
    print(json.dumps({"kernel": name, **wide}))

norm = {"weight": "*fp32", "bias": "*fp32", "eps": "fp32", "C": 1024, "BLOCK": 1024}
heads = {"q_eps": "fp32", "k_eps": "fp32", "frequencies": "*fp32", "factor": "fp32", "tokens": "i32"}
heads |= {"qkv": "*bf16", "H": 16, "QUARTER": 16, "ROWS": 32}
norms = ("q_weight", "q_bias", "k_weight", "k_bias")
for gamma in ("*fp32", None):
    given = {"x": "*fp32", "y": "*bf16", "gamma": gamma, "out": "*fp32"}
    compiled("_add_scaled", 8, **given, n="i32", C=1024, BLOCK=4096)
    compiled("_add_scaled_and_normalise", 4, **given, **norm, normed="*bf16")
strides = dict.fromkeys(("rows", "group_stride", "row_stride"), "i32")
compiled("_layer_norm", 4, x="*fp32", out="*bf16", **strides, **norm)
compiled("_gelu", 8, x="*bf16", n="i32", BLOCK=4096)
for normalise, rotate in ((True, True), (True, False), (False, True)):
    given = dict.fromkeys(norms, "*fp32" if normalise else None) | {"positions": "*i64" if rotate else None}
    compiled("_queries_and_keys", 4, **heads, **given, NORMALISE=normalise, ROTATE=rotate)
sizes = dict.fromkeys(("height", "width", "out_height", "out_width"), "i32") | {"y_scale": "fp32", "x_scale": "fp32"}
maps = dict.fromkeys(("x", "bias", "out"), "*fp32")
for channels, added in ((256, ("plus",)), (256, ()), (128, ("columns", "rows"))):
    given = {name: "*fp32" if name in added else None for name in ("plus", "columns", "rows")}
    compiled("_upsample", 8, **maps, **given, **sizes, C=channels, BLOCK=channels, PIXELS=4096 // channels)
arrays = dict.fromkeys(("x", "weight", "bias", "values", "confidence"), "*fp32")
for signed, values in ((False, 1), (True, 3)):
    compiled("_predict", 8, **arrays, n="i32", SIGNED=signed, VALUES=values, C=32, BLOCK=32, PIXELS=128)
outs = dict.fromkeys(("out", *(f"out{i}" for i in range(4))), "*bf16")
lses = dict.fromkeys(("lse", *(f"lse{i}" for i in range(4))), "*fp32")
for mixed in ({}, {"out": "*fp32"}, {"out0": "*fp32"}):  # four parts, or some of more and what they became
    given = {**outs, **mixed, **lses}
    compiled("_merge", 4, merging, **given, tokens="i32", PARTS=4, HEADS=16, D=64, BLOCK_D=64, ROWS=merging.ROWS)
"""


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=full)])
def test_kernels_of_blocks_heads_and_merges_compile(capability: int):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", LEAN, str(capability)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) == 17
    # A prediction of one value is stored by itself; what matters there is what is read.
    assert all(used["wide_loads"] > 0 for used in kernels), kernels
    assert all(used["wide_stores"] > 0 for used in kernels if used["kernel"] != "_predict"), kernels
