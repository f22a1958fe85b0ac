"""`info`: what is installed, and which backend can run on which device, or why not."""

from __future__ import annotations

import argparse
import json

import torch

from ..measure.machine import backend_answers, by_reason, devices, instruction_sets, versions
from ..packages import installed
from .text import table

OPTIONAL_PACKAGES = {
    "matplotlib": "pictures",
    "pillow": "photos",
    "rich": "progress",
    "safetensors": "MegaLoc's weights",
    "huggingface_hub": "MegaLoc's weights from the hub",
    "tqdm": "MegaLoc's progress",
    "pycolmap": "graphs from COLMAP models",
    "trimesh": "points as GLB",
    "viser": "view",
    "mcp": "the MCP server",
    "av": "videos",
    "depth-anything-3": "--model da3-small",
}


def run(arguments: argparse.Namespace) -> int:
    """Print what this machine offers; return the exit code."""
    found = devices()
    answers = {device: backend_answers(torch.device(device), arguments.head_size) for device in found}
    optional = {package: installed(package) for package in OPTIONAL_PACKAGES}
    if arguments.json:
        answer = {
            "versions": versions(),
            "devices": found,
            "backends": answers,
            "instruction_sets": instruction_sets(),
            "optional_packages": optional,
        }
        print(json.dumps(answer, indent=2))
        return 0
    print(table([(name, version) for name, version in versions().items()], indent=""))
    print(f"\nBackends at head size {arguments.head_size}, best first; without a request the first that can run does.")
    for device, name in found.items():
        print(f"\n{device} ({name})")
        print(
            table(
                [
                    (backend, dtypes, "runs" if reason is None else f"cannot run: {reason}")
                    for backend, by_dtype in answers[device].items()
                    for reason, dtypes in by_reason(by_dtype).items()
                ]
            )
        )
    if sets := instruction_sets():
        print("\nInstruction sets of the CPU")
        print(table([(name, "used" if why is None else f"not used: {why}") for name, why in sets.items()]))
    print("\nOptional packages")
    print(table([(package, version, f"for {OPTIONAL_PACKAGES[package]}") for package, version in optional.items()]))
    return 0
