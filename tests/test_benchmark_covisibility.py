"""The comparison of covisibility sources counts what it says it counts."""

from __future__ import annotations

import argparse

import pytest
import tiny
import torch

from benchmarks import covisibility


def test_recall_at_a_density():
    """Of six pairs two are true; the best three by score hold one of them."""
    scores = torch.zeros(4, 4, dtype=torch.float64)
    scores[0, 1], scores[3, 2], scores[1, 3] = 3, 2, 1  # one direction is enough
    truth = torch.zeros(4, 4, dtype=torch.bool)
    truth[2, 3] = truth[3, 2] = truth[0, 2] = truth[2, 0] = True
    assert covisibility.recall_at(scores, truth, 0.5) == 0.5
    assert covisibility.recall_at(scores, truth, 1 / 6) == 0
    assert covisibility.recall_at(scores, truth, 1) == 1


@pytest.mark.parametrize("case", ["graph", "describe"])
def test_lines_hold_their_keys(case: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny.megaloc()
    monkeypatch.setattr(covisibility.MegaLoc, "random_init", lambda: model)
    options = argparse.Namespace(frames=[50], images=3, size=42, batch_size=2, dtype="bf16", device="cpu", megaloc=None)
    run = {"graph": covisibility.time_graph, "describe": covisibility.time_describe}[case]
    [line] = run(options)
    assert (*line, *covisibility.PROVENANCE) == covisibility.KEYS[case]
    assert line["seconds"] > 0
