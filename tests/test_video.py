"""Frames of a video: even in time, and no near-duplicates."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from svggt_kernels.video import load_video

av = pytest.importorskip("av", reason="PyAV is not installed")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Four seconds at 10 frames a second: one picture a second, but second 2 repeats second 1."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for second in (0, 1, 1, 2):
            for _ in range(10):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures[second], format="rgb24")))
        container.mux(stream.encode())
    return path


def test_near_duplicates_are_left_out(clip: Path):
    frames, times = load_video(clip, frames_per_second=5, long_side=56)
    assert times == pytest.approx([0, 1, 3], abs=0.01)
    assert frames.shape == (3, 3, 42, 56)
    assert 0 <= float(frames.min()) and float(frames.max()) <= 1


def test_evenly_in_time(clip: Path):
    _, times = load_video(clip, frames_per_second=2, min_change=0, long_side=28)
    assert times == pytest.approx(np.arange(8) / 2, abs=0.06)
    assert len(load_video(clip, min_change=0, max_frames=3, long_side=28)[0]) == 3


@pytest.mark.parametrize("options", [{"frames_per_second": 0}, {"min_change": 2}, {"max_frames": 0}, {"long_side": 3}])
def test_refuses_options(clip: Path, options: dict[str, float]):
    with pytest.raises(ValueError, match="must be"):
        load_video(clip, **options)


def test_refuses_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match="is none"):
        load_video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        load_video(tmp_path / "text.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"svggt-kernels\[video\]"):
        load_video(tmp_path / "text.mp4")
