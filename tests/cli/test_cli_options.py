"""Words of the command line: which frames see each other, what they stand for, and what is said of wrong ones."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import fields

import pytest
import tiny
import torch

from svggt_kernels import CovisibilityGraph, MegaLoc, MegaLocSimilarity, PatchSimilarity, TokenSimilarity
from svggt_kernels.cli import arguments, main, options, parser
from svggt_kernels.cli.errors import CommandError
from svggt_kernels.models import RUNNABLE
from svggt_kernels.reconstruction import PointChoice, reconstruct
from svggt_kernels.reconstruction.formats import DEFAULT, FORMATS
from svggt_kernels.sources import SOURCES, AllFrames, Core, Scene, Sequential, ThumbnailSimilarity


def test_the_parser_knows_what_the_package_has():
    assert set(arguments.MODELS) == set(RUNNABLE)
    assert arguments.COVISIBILITY == tuple(SOURCES)
    assert arguments.SEQUENTIAL_WINDOW == Sequential().window
    assert arguments.NEIGHBOURS == MegaLocSimilarity().neighbours
    assert arguments.CORE_SIZE == Core().size
    assert arguments.FORMATS == tuple(FORMATS)
    assert arguments.EXPORTED == DEFAULT
    assert {name for name, form in FORMATS.items() if form.has_points} == arguments.WITH_POINTS
    assert arguments.MOST_POINTS == PointChoice().max_points
    assert arguments.DOUBTED / 100 == PointChoice().least_confident
    assert arguments.FPS == inspect.signature(reconstruct).parameters["frames_per_second"].default


@pytest.mark.parametrize(("option", "setting"), [("neighbours", "neighbours"), ("window", "window")])
def test_an_option_goes_with_the_sources_that_have_its_setting(option: str, setting: str):
    readers = [word for word, source in SOURCES.items() if setting in {field.name for field in fields(source)}]
    assert parser.READ_BY[f"--{option}"] == tuple(readers)


def test_each_word_means_its_own_source(monkeypatch: pytest.MonkeyPatch):
    model = tiny.megaloc()
    monkeypatch.setattr(MegaLoc, "from_pretrained", lambda source: model)

    def meant(word: str, **values: int) -> object:
        names = ("window", "neighbours", "core", "megaloc", "graph", "depth_range")
        unset = dict.fromkeys(names) | {"device": "cpu"}
        return options.source(argparse.Namespace(covisibility=word, **{**unset, **values}), None)

    assert meant("tokens", neighbours=3) == TokenSimilarity(neighbours=3)
    assert meant("thumbnails", window=2) == ThumbnailSimilarity(window=2)
    assert meant("sequential") == Sequential(window=10)
    assert meant("megaloc", neighbours=3) == MegaLocSimilarity(neighbours=3, weights=model)
    assert meant("all") == AllFrames()
    assert meant("core") == Core(52, by=MegaLocSimilarity(weights=model)) == meant("megaloc", core=52)
    assert meant("patches") == Core(52, by=PatchSimilarity())
    assert meant("tokens", core=7) == Core(7, by=TokenSimilarity())
    assert meant("sequential", core=7) == Core(7, by=None)
    with pytest.raises(CommandError, match="--core and --neighbours say both what each frame sees"):
        meant("tokens", core=7, neighbours=3)


def test_sequential_is_the_window_and_the_reference_frame():
    graph = Sequential(window=2).graph(Scene(40, reference_frame=0))
    expected = CovisibilityGraph.sequential(40, 2).to_dense()
    expected[0] = expected[:, 0] = True
    assert torch.equal(graph.to_dense(), expected)


@pytest.mark.parametrize(
    ("words", "asked", "message"),
    [
        ([], "svggt-kernels", "arguments are required: COMMAND"),
        (["--fast"], "svggt-kernels", "arguments are required: COMMAND"),
        (["fly"], "svggt-kernels", "invalid choice: 'fly'"),
        (["compare"], "svggt-kernels compare", "arguments are required: PHOTOS"),
        (["layout", "photos", "--fast"], "svggt-kernels layout", "unrecognized arguments: --fast"),
        (["view", "folder", "other"], "svggt-kernels view", "unrecognized arguments: other"),
        (
            ["demo", "--frames", "many"],
            "svggt-kernels demo",
            "argument --frames: must be a whole number, got 'many'",
        ),
        (["demo", "--frames"], "svggt-kernels demo", "argument --frames: expected one argument"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_words_end_in_a_line_that_says_how_to_ask_for_help(
    capsys: pytest.CaptureFixture[str], words: list[str], asked: str, message: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"{asked}: ") and message in line and line.endswith(f"; '{asked} --help' says more")
    assert not captured.out
