#!/usr/bin/env bash
# Runs the Metal shader as CUDA C++ on an NVIDIA GPU: one JSON line per case, exit code 1 if one failed. Needs torch for
# CUDA, cuda-bindings, and compute-sanitizer on the path. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../../.."
PYTHONPATH=.:tests exec "${PYTHON:-python3}" -m metal.check_on_cuda "$@"
