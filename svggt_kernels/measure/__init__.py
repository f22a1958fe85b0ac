"""Measuring: time and memory, accuracy of cameras, depth and points, and dense against sparse."""
