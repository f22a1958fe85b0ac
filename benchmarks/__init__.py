"""Benchmarks of svggt_kernels: named cases, peers, one runner that checks before it times, raw results."""
