"""Words of the command line that say which frames see each other, and what they stand for."""

from __future__ import annotations

import argparse

import pytest
import tiny
import torch

from svggt_kernels import (
    CovisibilityGraph,
    MegaLoc,
    MegaLocSimilarity,
    TokenSimilarity,
    patching,
)
from svggt_kernels.cli import options, parser
from svggt_kernels.models import RUNNABLE


def test_the_parser_knows_what_the_package_has():
    assert set(parser.MODELS) == set(RUNNABLE)
    assert parser.SEQUENTIAL_WINDOW == patching.SEQUENTIAL_WINDOW
    assert parser.NEIGHBOURS == MegaLocSimilarity().neighbours


def test_thumbnails_of_one_colour_have_a_direction():
    frames = torch.stack([torch.full((3, 28, 28), level) for level in (0.0, 0.5, 1.0)])
    assert CovisibilityGraph.from_descriptors(options.thumbnails(frames)).num_frames == 3


def test_each_word_means_its_own_similarity(monkeypatch: pytest.MonkeyPatch):
    model = tiny.megaloc()
    monkeypatch.setattr(MegaLoc, "from_pretrained", lambda source: model)
    given = {"window": None, "neighbours": 3, "megaloc": None, "device": "cpu"}

    def meant(word: str) -> object:
        return options.covisibility(argparse.Namespace(covisibility=word, **given))

    assert meant("tokens") == TokenSimilarity(neighbours=3)
    assert meant("sequential") == TokenSimilarity(neighbours=0, window=10, anchors=0, bridge=False)
    assert meant("megaloc") == MegaLocSimilarity(neighbours=3, weights=model)
    assert meant("all") == "all"


def test_sequential_is_the_same_for_photos_and_for_a_model():
    arguments = argparse.Namespace(covisibility="sequential", window=2, neighbours=10)
    of_photos = options.from_images(arguments)(torch.rand(1, 40, 3, 28, 28))[0]
    of_model = options.covisibility(arguments).graph(torch.rand(40, 5, 8), reference_frame=0)
    expected = CovisibilityGraph.sequential(40, 2).to_dense()
    expected[0] = expected[:, 0] = True
    assert torch.equal(of_photos.to_dense(), expected)
    assert torch.equal(of_model.to_dense(), expected)
