"""A frame's depth is that of the nearest pixel of the map, in the part of the photo that the frame shows."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from svggt_kernels.io.depth_maps import depth_of_frame, read_depth_map
from svggt_kernels.io.photos import load_photos, photo_size

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.mark.parametrize("frame", [(56, 42), (56, 56), (70, 28)])
@pytest.mark.parametrize("finer", [1, 2])
def test_depth_is_cropped_as_the_photo_is(
    frame: tuple[int, int], finer: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    """A photo that is red from left to right and green from top to bottom, and maps whose numbers say the same."""
    width, height = 64, 48
    right, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    pixels = (255 * np.stack([right, down, 0 * right], -1)).round().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.new("RGB", frame).save(tmp_path / "shape.png")
    # Three photos, of which two have the shape of the frame.
    files = [tmp_path / name for name in ("photo.png", "shape.png", "shape.png")]
    shown = load_photos(files, long_side=max(frame), patch_size=14)[0]
    assert shown.shape == (3, frame[1], frame[0])
    columns, rows = ((torch.arange(finer * side) + 0.5) / (finer * side) for side in (width, height))
    maps = torch.broadcast_tensors(columns, rows[:, None])
    inside = slice(3, -3)  # Pillow repeats what lies at the border
    for colour, depth, side in zip(shown, maps, (width, height), strict=False):
        depth = depth_of_frame(depth, photo_size(files[0]), frame)
        half_a_pixel = 0.5 / (finer * side) + 1 / 255
        torch.testing.assert_close(depth[inside, inside], colour[inside, inside], atol=half_a_pixel, rtol=0)


def test_nothing_is_mixed_at_an_edge():
    depth = torch.tensor([1.0, 1, 1, 9, 9, 9, 9, 9]).expand(6, 8)
    assert set(depth_of_frame(depth, (8, 6), (28, 21)).unique().tolist()) == {1.0, 9.0}
    assert torch.equal(depth_of_frame(depth, (8, 6), (8, 6)), depth)


def test_a_map_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"48 x 64 pixels and the upright photo 64 x 48; scale or crop it"):
        depth_of_frame(torch.ones(64, 48), (64, 48), (28, 28))


def test_what_is_not_known_is_zero(tmp_path: Path):
    np.save(tmp_path / "map.npy", np.array([[1.0, np.nan, np.inf], [-1, 1e300, 5]]))
    assert read_depth_map(tmp_path / "map.npy", 2.0).tolist() == [[2, 0, 0], [0, 0, 10]]
    Image.fromarray(np.array([[1000, 65535, 0]], np.uint16)).save(tmp_path / "map.png")
    assert read_depth_map(tmp_path / "map.png", 0.001, 65535).tolist() == [[1, 0, 0]]
    assert read_depth_map(tmp_path / "map.png").tolist() == [[1000, 65535, 0]]


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("a.png", np.zeros((4, 4, 3), np.uint8), r"got uint8 \[4, 4, 3\]"),
        ("a.png", np.zeros((4, 4), np.uint8), r"16 bits or more, .* got uint8 \[4, 4\]"),
        ("a.npy", np.zeros(4), r"got float64 \[4\]"),
        ("a.npy", np.array([["a"]]), r"got <U1"),
        ("a.npy", np.array([[None]]), r"cannot be read as an array of NumPy"),
    ],
)
def test_what_is_no_depth_map_is_refused(name: str, numbers: np.ndarray, message: str, tmp_path: Path):
    if name.endswith(".npy"):
        np.save(tmp_path / name, numbers)
    else:
        Image.fromarray(numbers).save(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_depth_map(tmp_path / name)


def test_an_archive_is_no_array(tmp_path: Path):
    np.savez(tmp_path / "a.npz", np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"a.npy cannot be read as an array of NumPy .*; write it with np.save"):
        read_depth_map((tmp_path / "a.npz").rename(tmp_path / "a.npy"))


def test_threads_read_one_array_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Python 3.11 fails now and then where two threads parse, which NumPy does with the header."""
    path = tmp_path / "depth.npy"
    np.save(path, np.ones((2, 3), np.float32))
    read, reading = np.lib.format.read_array, threading.Lock()

    def alone(*arguments: object, **options: object) -> np.ndarray:
        assert reading.acquire(blocking=False)
        time.sleep(1e-3)
        reading.release()
        return read(*arguments, **options)

    monkeypatch.setattr(np.lib.format, "read_array", alone)
    with ThreadPoolExecutor(8) as workers:
        maps = list(workers.map(read_depth_map, [path] * 32))
    assert all(torch.equal(depth, torch.ones(2, 3)) for depth in maps)
