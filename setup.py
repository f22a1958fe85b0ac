"""Builds svggt_kernels; all metadata is in pyproject.toml."""

from setuptools import setup

setup()
