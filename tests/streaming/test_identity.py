"""What tells frames and weights from others, whatever part of them differs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from svggt_kernels.streaming import identity
from svggt_kernels.streaming.identity import of_frames, of_model


@pytest.fixture(autouse=True)
def parts_of_four_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WORDS_AT_ONCE", 4)


def test_every_word_counts_and_so_does_its_place():
    frames = torch.rand(1, 3, 2, 3, generator=torch.Generator().manual_seed(0))  # of five parts
    others = [frames]
    for place in (0, 7, 17):
        others.append(frames.clone())
        others[-1].view(-1)[place] += 1
    for places in ([1, 0], [5, 0]):  # within a part, and across two
        others.append(frames.clone())
        others[-1].view(-1)[places] = frames.view(-1)[places[::-1]]
    assert len({of_frames(each) for each in others}) == len(others)
    assert of_frames(frames.clone()) == of_frames(frames)


def test_sums_are_modulo_two_to_the_64():
    words = torch.tensor([2**31 - 1, -(2**31), -1, 3] * 3, dtype=torch.int32)
    places = [start + place for start in (1, 17, 33) for place in range(4)]
    first = sum(words.tolist())
    second = sum(word * place for word, place in zip(words.tolist(), places, strict=True))
    assert identity._sums(words) == (first % 2**64, second % 2**64)


def test_models_of_other_weights_differ():
    model = nn.Linear(5, 3)
    before = of_model(model)
    with torch.no_grad():
        model.bias[2] += 1
    assert of_model(model) != before
