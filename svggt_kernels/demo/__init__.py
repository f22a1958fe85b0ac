"""Rendered rooms and a small model that has learned them: for the demo, for tests, and to measure accuracy."""
