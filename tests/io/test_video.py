"""Frames of a video: as a player shows them, even in time, and no near-duplicates."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from svggt_kernels.io import video
from svggt_kernels.io.video import load_video

av = pytest.importorskip("av", reason="PyAV is not installed")


def pictures(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return noise in coarse blocks, which survives lossy codecs: no two pictures are near-duplicates."""
    blocks = np.random.default_rng(0).integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def write(
    path: Path,
    shown: Sequence[np.ndarray] | np.ndarray,
    *,
    codec: str = "mpeg4",
    pixels: str = "yuv420p",
    rate: int = 10,
    container: str | None = None,
    pixel_aspect: Fraction | None = None,
) -> Path:
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = shown[0].shape[:2]
        stream.pix_fmt = pixels
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for picture in shown:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Four seconds at 10 frames a second: one picture a second, but second 2 repeats second 1."""
    different = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    return write(tmp_path / "clip.mkv", different[[0, 1, 1, 2]].repeat(10, axis=0), codec="ffv1", pixels="bgr0")


def test_near_duplicates_are_left_out(clip: Path):
    frames, times = load_video(clip, frames_per_second=5, long_side=56)
    assert times == pytest.approx([0, 1, 3], abs=0.01)
    assert frames.shape == (3, 3, 42, 56)
    assert 0 <= float(frames.min()) and float(frames.max()) <= 1


def test_default_dtype_and_device_change_nothing(clip: Path):
    expected, _ = load_video(clip, long_side=56)
    with torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            frames, _ = load_video(clip, long_side=56)
        finally:
            torch.set_default_dtype(torch.float32)
    assert frames.dtype == torch.float32
    assert torch.equal(frames, expected)


class TestTimes:
    def test_even(self, clip: Path):
        _, times = load_video(clip, frames_per_second=2, min_change=0, long_side=28)
        assert times == pytest.approx(np.arange(8) / 2, abs=0.06)
        assert len(load_video(clip, min_change=0, max_frames=3, long_side=28)[0]) == 3

    @pytest.mark.parametrize("container", ["mp4", "matroska"])  # matroska rounds times to milliseconds
    @pytest.mark.parametrize(("asked", "right"), [(2, 2), (7, 7), (12, 12), (20, 20), (25, 25), (30, 30), (60, 30)])
    def test_the_rate_that_was_asked_for(self, tmp_path: Path, container: str, asked: int, right: int):
        path = write(tmp_path / "a", pictures(120), rate=30, container=container)
        _, times = load_video(path, frames_per_second=asked, min_change=0, long_side=14)
        assert len(times) / 4 == pytest.approx(right, rel=0.05)
        assert np.diff(times) == pytest.approx(1 / right, abs=1 / 30 + 0.002)

    def test_a_file_without_times(self, tmp_path: Path):
        path = write(tmp_path / "a.h264", pictures(40), codec="libx264")
        assert load_video(path, long_side=28)[1] == pytest.approx(np.arange(8) / 2)

    def test_a_clock_that_starts_again(self, tmp_path: Path):
        clips = [write(tmp_path / f"{i}.ts", pictures(40)[::step]) for i, step in enumerate((1, -1))]
        joined = tmp_path / "joined.ts"
        joined.write_bytes(b"".join(path.read_bytes() for path in clips))
        assert load_video(joined, long_side=28)[1] == pytest.approx(np.arange(16) / 2, abs=0.11)

    def test_times_of_another_order(self, tmp_path: Path):
        path = write(tmp_path / "a.avi", pictures(40), codec="libx264")  # avi knows when frames are decoded only
        times = load_video(path, min_change=0, long_side=28)[1]
        assert times == pytest.approx(np.arange(len(times)) / 2, abs=0.11)
        assert len(times) == pytest.approx(8, abs=1)

    @pytest.mark.parametrize(
        ("stored", "right"),
        [
            ([5, 6, 7], [0, 1, 2]),
            ([None, None, None], [0, 1, 2]),
            ([3, None, 5], [0, 1, 2]),
            ([0, 2, 1, 4, 3], [0, 2, 3, 4, 5]),
            ([0, 1, 1, 2], [0, 1, 2, 3]),
            ([100, 101, 0, 1, 9], [0, 1, 2, 3, 11]),
        ],
        ids=["late", "none", "partly", "order", "equal", "restart"],
    )
    def test_seconds_rise(self, stored: list[float | None], right: list[float]):
        frames = [SimpleNamespace(time=time) for time in stored]
        assert [time for time, _ in video._timed(frames, 1.0, Path("a"))] == right

    def test_neither_times_nor_a_rate(self):
        with pytest.raises(ValueError, match="neither times nor a frame rate"):
            list(video._timed([SimpleNamespace(time=None)], 0.0, Path("a")))


class TestDisplay:
    @pytest.mark.parametrize(
        ("matrix", "turned"),
        [
            ((1, 0, 0, 1), lambda a: a),
            ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
            ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
            ((0, -1, 1, 0), lambda a: np.rot90(a, 1)),
            ((-1, 0, 0, 1), np.fliplr),
            ((1, 0, 0, -1), np.flipud),
            ((0, 1, 1, 0), lambda a: a.transpose(1, 0, 2)),
            ((0, -1, -1, 0), lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        ],
        ids=["upright", "right", "half", "left", "mirrored", "flipped", "transposed", "transversed"],
    )
    @pytest.mark.parametrize("pixel_aspect", [1, 2], ids=["square", "wide"])
    def test_matrix_and_pixel_aspect(
        self,
        tmp_path: Path,
        matrix: tuple[int, int, int, int],
        turned: Callable[[np.ndarray], np.ndarray],
        pixel_aspect: int,
    ):
        stored = np.random.default_rng(0).integers(0, 256, (1, 28, 56, 3), dtype=np.uint8)
        path = write(tmp_path / "a.mov", stored, codec="png", pixels="rgb24", pixel_aspect=Fraction(pixel_aspect))
        data = bytearray(path.read_bytes())
        a, b, c, d = (value << 16 for value in matrix)
        # The track header: 4 bytes of name, then the matrix after 40 bytes of its version 0.
        struct.pack_into(">6i", data, data.index(b"tkhd") + 4 + 40, a, b, 0, c, d, 0)
        path.write_bytes(data)
        frames, _ = load_video(path, long_side=56 * pixel_aspect)
        right = torch.from_numpy(turned(stored[0]).copy()).permute(2, 0, 1) / 255
        if pixel_aspect == 1:
            torch.testing.assert_close(frames[0], right)
        else:
            longer = int(right.shape[2] < right.shape[1])
            assert frames.shape[3 - longer] == 2 * right.shape[2 - longer]
            assert frames.shape[2 + longer] == right.shape[1 + longer]
            shrunk = torch.nn.functional.interpolate(frames, size=right.shape[1:], mode="area")[0]
            assert float((shrunk - right).abs().mean()) < 0.1  # another turn: 0.3

    def test_the_cover_of_a_song_is_no_video(self, tmp_path: Path):
        with av.open(str(tmp_path / "a.mp3"), "w") as output:
            cover, sound = output.add_stream("mjpeg", rate=10), output.add_stream("libmp3lame", rate=44100)
            cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
            output.mux(cover.encode(av.VideoFrame.from_ndarray(pictures(1)[0], format="rgb24")) + cover.encode())
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 1152), np.float32), format="fltp")
            silence.rate = 44100
            output.mux(sound.encode(silence) + sound.encode())
        with pytest.raises(ValueError, match=r"a\.mp3 must hold a video, but has only still pictures"):
            load_video(tmp_path / "a.mp3")

    def test_a_cover_is_passed_over(self):
        from av.stream import Disposition

        cover = SimpleNamespace(disposition=Disposition.attached_pic | Disposition.default, codec_context="mjpeg")
        streams = [cover, SimpleNamespace(disposition=Disposition(0), codec_context="h264")]
        container = SimpleNamespace(streams=SimpleNamespace(video=streams, best=lambda kind: cover))
        assert video._video_stream(container, Path("a")) is streams[1]


class TestFiles:
    @pytest.mark.parametrize(
        "name", ["clip-12:30:05.mkv", "100%d.mkv", "walk%03d.gif", "file:x", "concat:a|b", "a.MTS"]
    )
    def test_names_mean_nothing(self, clip: Path, monkeypatch: pytest.MonkeyPatch, name: str):
        monkeypatch.chdir(clip.parent)
        clip.rename(name)
        assert len(load_video(name, long_side=28)[1]) == 3

    def test_damaged_packets_are_counted(self, tmp_path: Path):
        path = write(tmp_path / "a.mp4", pictures(60), codec="libx264")
        data = bytearray(path.read_bytes())
        start = data.index(b"mdat") + len(data) // 4
        data[start : start + 600] = bytes(i * 7919 % 251 for i in range(600))
        path.write_bytes(data)
        with pytest.warns(UserWarning, match=r"damaged packets or frames of .*a\.mp4 that were left out: [1-9]"):
            _, times = load_video(path, long_side=28)
        assert 3 <= len(times) <= 12

    def test_nothing_but_damage(self, tmp_path: Path):
        path = write(tmp_path / "a.mp4", pictures(10), codec="libx264")
        data = bytearray(path.read_bytes())
        start = data.index(b"mdat") + 4
        data[start : data.index(b"moov") - 4] = b"\xff" * (data.index(b"moov") - 4 - start)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"no frame could be read from it: \d+ packets are damaged \(Invalid data"):
            load_video(path)

    def test_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        with pytest.raises(FileNotFoundError, match="is none"):
            load_video(tmp_path / "none.mp4")
        (tmp_path / "text.mp4").write_text("no video")
        with pytest.raises(ValueError, match=r"cannot be read as a video \(FFmpeg: Invalid data found"):
            load_video(tmp_path / "text.mp4")
        (tmp_path / "notes.txt").write_text("FFmpeg shows text files as a terminal would\n" * 99)
        with pytest.raises(ValueError, match="cannot be read as a video"):
            load_video(tmp_path / "notes.txt")
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match=r"svggt-kernels\[video\]"):
            load_video(tmp_path / "text.mp4")

    def test_refuses_a_codec_without_decoder(self, tmp_path: Path):
        path = write(tmp_path / "a.mp4", pictures(10), codec="libx264")
        path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
        with pytest.raises(ValueError, match="its codec is unknown"):
            load_video(path)


@pytest.mark.parametrize(
    "options", [{"frames_per_second": 0}, {"min_change": 2}, {"max_frames": 0}, {"long_side": 3}, {"patch_size": 0}]
)
def test_refuses_options(clip: Path, options: dict[str, float]):
    with pytest.raises(ValueError, match="must be"):
        load_video(clip, **options)
