"""What the command line writes: a line for each stage, and reports that every reader of JSON takes."""

from __future__ import annotations

import json
import math
import time

import pytest

from svggt_kernels.cli import results, text


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
def test_a_stage_says_names_as_they_are(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("rich", reason="rich is not installed")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
    with text.stage("reading [red] [/nothing] :smile:") as tell:
        tell("photo [bold]")
        time.sleep(0.2)  # the spinner draws at intervals
    said = capsys.readouterr().err
    assert "reading [red] [/nothing] :smile:" in said
    assert "photo [bold]" in said
    assert ("\x1b" in said) == terminal


def test_a_report_holds_text_that_every_reader_of_json_takes():
    printed = results.as_json("command", {"names": ["caf\udce9.png", "é$_\n"]})
    assert json.loads(printed)["names"] == [r"caf\udce9.png", "é$_\n"]


def test_report_has_no_number_that_json_does_not_have():
    printed = results.as_json("command", {"a": math.nan, "b": [math.inf, 1.0]})
    assert json.loads(printed)["a"] is None
    assert json.loads(printed)["b"] == [None, 1.0]
