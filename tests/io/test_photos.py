"""Photos become upright RGB frames of one common size, or an error that names the file."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from svggt_kernels.io import photos
from svggt_kernels.io.photos import crop_of, find_photos, load_photos, read_photos

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

ORIENTATION = 0x0112


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def flat(height: int, width: int, *colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, dtype=np.uint8), (height, width, len(colour))).copy()


def left_red_right_blue(height: int = 28, width: int = 56) -> np.ndarray:
    pixels = flat(height, width, 255, 0, 0)
    pixels[:, width // 2 :] = (0, 0, 255)
    return pixels


class TestFind:
    def test_orders_numbers_by_value_and_takes_suffixes_in_any_case(self, tmp_path: Path) -> None:
        for name in ("10.JPG", "2.jpeg", "1.png", "b.TIFF", "a.webp", "c.bmp", "notes.txt", ".hidden.jpg"):
            (tmp_path / name).touch()
        (tmp_path / "folder.png").mkdir()
        names = [path.name for path in find_photos(tmp_path)]
        assert names == ["1.png", "2.jpeg", "10.JPG", "a.webp", "b.TIFF", "c.bmp"]

    def test_equal_numbers_have_one_order(self, tmp_path: Path) -> None:
        for name in ("1.png", "001.png", "01.png"):
            (tmp_path / name).touch()
        assert [path.name for path in find_photos(tmp_path)] == ["001.png", "01.png", "1.png"]

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            find_photos(tmp_path / "nowhere")

    @pytest.mark.parametrize(("name", "advice"), [("a.png", "give the folder it lies in"), ("a.mp4", "read videos")])
    def test_file_instead_of_folder(self, tmp_path: Path, name: str, advice: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(NotADirectoryError, match=f"is a file: .*{advice}"):
            find_photos(tmp_path / name)

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no file at all"):
            find_photos(tmp_path)

    def test_folder_of_other_files_says_what_it_holds(self, tmp_path: Path) -> None:
        (tmp_path / "1.heic").touch()
        (tmp_path / "2.HEIC").touch()
        with pytest.raises(FileNotFoundError, match=r"only 2 x \.heic"):
            find_photos(tmp_path)

    def test_folder_of_subfolders_names_them(self, tmp_path: Path) -> None:
        for i in range(7):
            (tmp_path / f"cam{i}").mkdir()
        (tmp_path / ".hidden").mkdir()
        with pytest.raises(FileNotFoundError, match=r"only subfolders.*\(cam0, cam1, cam2, cam3, cam4 and 2 more\)"):
            find_photos(tmp_path)
        (tmp_path / "notes.txt").touch()
        with pytest.raises(FileNotFoundError, match=r"only 1 x \.txt and subfolders"):
            find_photos(tmp_path)

    def test_photos_that_cannot_be_read_are_counted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("1.jpg", "2.HEIC", "3.heic", "4.NEF", "notes.txt"):
            (tmp_path / name).touch()
        with pytest.warns(UserWarning, match=r"taken: 1, left out .*: 3 \(2 x \.heic, 1 x \.nef\)"):
            assert [path.name for path in find_photos(tmp_path)] == ["1.jpg"]
        monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")  # as pillow-heif registers itself
        with pytest.warns(UserWarning, match=r"taken: 3, left out .*: 1 \(1 x \.nef\)"):
            assert [path.name for path in find_photos(tmp_path)] == ["1.jpg", "2.HEIC", "3.heic"]


class TestSize:
    def test_long_side_and_multiples_of_the_patch(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", flat(300, 400, 10, 20, 30))
        frames = load_photos([path], long_side=112, patch_size=14)
        assert frames.shape == (1, 3, 84, 112)
        assert frames.dtype == torch.float32
        torch.testing.assert_close(frames[0, :, 0, 0], torch.tensor([10.0, 20.0, 30.0]) / 255)

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 500), (500, 3), (15, 14)], ids=str)
    def test_every_shape_fits(self, tmp_path: Path, height: int, width: int) -> None:
        path = save(tmp_path / "a.png", flat(height, width, 255, 255, 255))
        frames = load_photos([path], long_side=56, patch_size=14)
        assert frames.shape[2] % 14 == 0
        assert frames.shape[3] % 14 == 0
        assert max(frames.shape[2:]) == 56
        assert frames.min() == 1

    def test_mixed_shapes_take_the_median_and_lose_both_ends_equally(self, tmp_path: Path) -> None:
        squares = [save(tmp_path / f"{i}.png", left_red_right_blue(28, 28)) for i in range(2)]
        wide = flat(28, 84, 0, 255, 0)
        wide[:, 28:42] = (255, 0, 0)
        wide[:, 42:56] = (0, 0, 255)
        paths = [save(tmp_path / "wide.png", wide), *squares]
        with pytest.warns(UserWarning, match=r"more than 15% of their area: 1 of 3, .*wide\.png loses 67%;"):
            frames = load_photos(paths, long_side=28, patch_size=14)
        assert frames.shape == (3, 3, 28, 28)
        torch.testing.assert_close(frames[0], frames[1])

    def test_photos_that_lose_little_are_not_named(self, tmp_path: Path) -> None:
        load_photos([save(tmp_path / f"{w}.png", flat(84, w, 0, 0, 0)) for w in (75, 84, 95)], long_side=84)

    def test_default_dtype_and_device_change_nothing(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
        expected = load_photos([path], long_side=28)
        with torch.device("meta"):
            torch.set_default_dtype(torch.bfloat16)
            try:
                frames = load_photos([path], long_side=28)
            finally:
                torch.set_default_dtype(torch.float32)
        assert frames.dtype == torch.float32
        assert torch.equal(frames, expected)

    def test_order_of_paths_is_kept(self, tmp_path: Path) -> None:
        paths = [save(tmp_path / f"{i}.png", flat(14, 14, 50 * i, 0, 0)) for i in range(4)]
        frames = load_photos(paths[::-1], long_side=14)
        assert (frames[:, 0, 0, 0] * 255).round().tolist() == [150, 100, 50, 0]

    def test_photos_are_read_at_the_same_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = [save(tmp_path / f"{i}.png", flat(28, 28, 80 * i, 0, 0)) for i in range(3)]
        all_here, read = threading.Barrier(len(files)), photos._read

        def reading(path: Path) -> object:
            all_here.wait(timeout=30)
            return read(path)

        monkeypatch.setattr(photos, "_read", reading)
        levels = load_photos(files, long_side=28)[:, 0].mean(dim=(1, 2)) * 255
        assert levels.round().tolist() == [0, 80, 160]

    def test_photos_of_the_next_part_are_read_before_one_is_given(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = [save(tmp_path / f"{i}.png", flat(14, 14, 50 * i, 0, 0)) for i in range(5)]
        both_parts, later, read = threading.Barrier(4), threading.Event(), photos._read

        def reading(path: Path) -> object:
            if path in files[:4]:
                both_parts.wait(timeout=30)
            else:
                later.set()
            return read(path)

        monkeypatch.setattr(photos, "_read", reading)
        parts = read_photos(files, (14, 14), 2)
        assert (next(parts)[:, 0, 0, 0] * 255).round().tolist() == [0, 50]
        assert not later.is_set()  # no more than one part is held beside the one that is given
        assert [(part[:, 0, 0, 0] * 255).round().tolist() for part in parts] == [[100, 150], [200]]

    @pytest.mark.parametrize(("late", "expected"), [(0, [4]), (2, [4]), (20, [4, 8, 12])])
    def test_there_are_no_more_threads_than_keep_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int, expected: list[int]
    ) -> None:
        """Of photos in parts of 2, of which so many are late; the first part is always waited for."""
        files, pools = [save(tmp_path / f"{i}.png", flat(14, 14, 0, 0, 0)) for i in range(20)], list[int]()

        class Threads:
            def __init__(self, count: int) -> None:
                pools.append(count)

            def submit(self, call: Callable[..., None], *args: object) -> SimpleNamespace:
                return SimpleNamespace(done=lambda: args[1] not in files[:late], result=lambda: call(*args))

            def shutdown(self, **options: object) -> None: ...

        monkeypatch.setattr(photos, "ThreadPoolExecutor", Threads)
        monkeypatch.setattr(photos.os, "cpu_count", lambda: 12)
        assert len(list(read_photos(files, (14, 14), 2))) == 10
        assert pools == expected
        assert len(next(read_photos(files, (14, 14), 20))) == 20  # nothing else runs meanwhile
        assert pools[len(expected) :] == [12]

    def test_reading_ends_with_whoever_asks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Photos that threads have begun are read to their end, and no more."""
        files = [save(tmp_path / f"{i}.png", flat(14, 14, 0, 0, 0)) for i in range(12)]
        before, closing, begun, read = threading.active_count(), threading.Event(), list[Path](), photos._read

        def reading(path: Path) -> object:
            begun.append(path)
            if path in files[6:]:
                closing.wait(timeout=30)
            return read(path)

        monkeypatch.setattr(photos, "_read", reading)
        parts = read_photos(files, (14, 14), 6)
        next(parts)
        timer = threading.Timer(0.1, closing.set)
        timer.start()
        parts.close()
        timer.join()
        assert threading.active_count() == before
        assert len(begun) <= 6 + photos.FEW_THREADS

    def test_a_photo_that_cannot_be_read_is_named_when_its_part_is_due(self, tmp_path: Path) -> None:
        good = save(tmp_path / "good.png", flat(14, 14, 0, 0, 0))
        (tmp_path / "bad.png").write_bytes(b"nothing")
        parts = read_photos([good, tmp_path / "bad.png"], (14, 14), 1)
        assert len(next(parts)) == 1
        with pytest.raises(ValueError, match=r"bad\.png cannot be read"):
            next(parts)

    def test_twice_is_the_same(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        path = save(tmp_path / "a.jpg", noise)
        assert torch.equal(load_photos([path], long_side=42), load_photos([path], long_side=42))

    @pytest.mark.parametrize(("long_side", "patch_size"), [(13, 14), (0, 14), (-5, 14), (14, 0)], ids=str)
    def test_impossible_sizes(self, tmp_path: Path, long_side: int, patch_size: int) -> None:
        path = save(tmp_path / "a.png", flat(14, 14, 0, 0, 0))
        with pytest.raises(ValueError, match="must be at least"):
            load_photos([path], long_side=long_side, patch_size=patch_size)

    def test_no_photo(self) -> None:
        with pytest.raises(ValueError, match="at least one photo"):
            load_photos([])


class TestOrientation:
    @pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp", "mpo"])
    @pytest.mark.parametrize(
        ("orientation", "turned"),
        [
            (1, lambda a: a),
            (2, np.fliplr),
            (3, lambda a: np.rot90(a, 2)),
            (4, np.flipud),
            (5, lambda a: a.transpose(1, 0, 2)),
            (6, lambda a: np.rot90(a, -1)),
            (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
            (8, lambda a: np.rot90(a, 1)),
        ],
        ids=lambda value: f"exif{value}" if isinstance(value, int) else "",
    )
    def test_every_container(
        self, tmp_path: Path, suffix: str, orientation: int, turned: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        pixels = left_red_right_blue(32, 64)
        pixels[:16] //= 2  # the upper half is darker, so no two orientations agree
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        lossless = {"quality": 100, "subsampling": 0} if suffix in ("jpg", "mpo") else {"lossless": True}
        path = save(tmp_path / f"a.{suffix}", pixels, exif=exif, **lossless)
        frames = load_photos([path], long_side=64, patch_size=16)
        expected = torch.from_numpy(np.ascontiguousarray(turned(pixels))).permute(2, 0, 1) / 255
        torch.testing.assert_close(frames[0], expected, atol=3 / 255, rtol=0)

    def test_exif_that_cannot_be_written_again(self, tmp_path: Path) -> None:
        fields = ((ORIENTATION, 3, 1, 6), (0x011A, 10, 1, 38))  # the resolution is a signed rational, at byte 38
        table = struct.pack("<H", len(fields)) + b"".join(struct.pack("<HHII", *field) for field in fields) + bytes(4)
        exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + table + struct.pack("<ii", -72, 1)
        path = save(tmp_path / "a.jpg", left_red_right_blue(), exif=exif)
        frames = load_photos([path], long_side=56)
        assert frames.shape == (1, 3, 56, 28)
        assert frames[0, 0, 0].min() > 0.9  # red is at the top

    @pytest.mark.parametrize("suffix", ["png", "webp"])
    def test_exif_that_cannot_be_read(self, tmp_path: Path, suffix: str) -> None:
        path = save(tmp_path / f"a.{suffix}", left_red_right_blue(), exif=b"Exif\0\0no table")
        assert load_photos([path], long_side=56).shape == (1, 3, 28, 56)


class TestCrop:
    @pytest.mark.parametrize("size", [(250, 100), (100, 250), (130, 130)], ids=str)
    def test_it_says_where_the_pixels_of_a_frame_come_from(self, tmp_path: Path, size: tuple[int, int]) -> None:
        """A photo whose red grows with x and whose green grows with y tells at which x and y a frame shows it."""
        (width, height), (columns, rows) = size, (56, 28)
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        path = save(tmp_path / "a.png", np.stack([x, y, 0 * x], -1).astype(np.uint8))
        with pytest.warns(UserWarning, match="cropped by more than 15% .* the model has learned frames of 56 x 28 px"):
            frame = 255 * load_photos([path], size=(columns, rows))[0].double()
        scale = min(width / columns, height / rows)
        left, top = (width - scale * columns) / 2, (height - scale * rows) / 2
        crop = crop_of(size, (columns, rows))
        assert crop == pytest.approx((left, top, scale))
        assert crop.lost(size) == pytest.approx(1 - scale**2 * columns * rows / (width * height))
        inside = slice(2, -2)  # Pillow repeats what lies at the border
        shown = left + scale * (torch.arange(columns) + 0.5) - 0.5, top + scale * (torch.arange(rows) + 0.5) - 0.5
        for level, place in zip((frame[0].mean(0), frame[1].mean(1)), shown, strict=True):
            error = (level - place)[inside]
            assert error.abs().max() < 0.7  # 8 bits
            assert abs(error.mean()) < 0.1

    @pytest.mark.parametrize("size", [(4032, 3024), (1, 1), (333, 1000), (1000, 333), (517, 391)], ids=str)
    @pytest.mark.parametrize("frame", [(518, 392), (154, 112), (14, 518)], ids=str)
    def test_its_box_lies_in_the_photo(self, size: tuple[int, int], frame: tuple[int, int]) -> None:
        left, top, right, bottom = crop_of(size, frame).box(size, frame)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


class TestConversion:
    @pytest.mark.parametrize("mode", ["L", "1", "LA"])
    def test_grey_is_repeated(self, tmp_path: Path, mode: str) -> None:
        path = save(tmp_path / "a.png", flat(14, 14, 255, 255, 255), mode)
        frames = load_photos([path], long_side=14)
        assert frames.shape == (1, 3, 14, 14)
        assert frames.min() == 1

    @pytest.mark.parametrize("suffix", ["png", "tiff"])
    def test_16_bit_grey_is_scaled(self, tmp_path: Path, suffix: str) -> None:
        levels = np.full((14, 14), 32768, dtype=np.uint16)
        levels[:, 7:] = 65535
        frames = load_photos([save(tmp_path / f"a.{suffix}", levels)], long_side=14)
        torch.testing.assert_close(frames[0, :, 0, 0], torch.full((3,), 128 / 255))
        torch.testing.assert_close(frames[0, :, 0, 13], torch.ones(3))

    def test_16_bit_grey_in_32_bits_is_scaled(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.tiff", np.full((14, 14), 65535, dtype=np.int32))
        assert load_photos([path], long_side=14).min() == 1

    @pytest.mark.parametrize("level", [-1, 65536])
    def test_levels_beyond_16_bits_are_refused(self, tmp_path: Path, level: int) -> None:
        path = save(tmp_path / "a.tiff", np.full((14, 14), level, dtype=np.int32))
        with pytest.raises(ValueError, match="no known white level"):
            load_photos([path], long_side=14)

    def test_palette_is_looked_up(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", left_red_right_blue(14, 28), "P")
        frames = load_photos([path], long_side=28)
        assert frames[0, :, 0, 0].tolist() == [1, 0, 0]
        assert frames[0, :, 0, 27].tolist() == [0, 0, 1]

    @pytest.mark.parametrize("alpha", [0, 255], ids=["transparent", "opaque"])
    def test_transparency_lies_on_white(self, tmp_path: Path, alpha: int) -> None:
        path = save(tmp_path / "a.png", flat(14, 14, 255, 0, 0, alpha))
        expected = [1, 0, 0] if alpha else [1, 1, 1]
        assert load_photos([path], long_side=14)[0, :, 7, 7].tolist() == expected

    def test_transparent_palette_colour_lies_on_white(self, tmp_path: Path) -> None:
        image = Image.fromarray(left_red_right_blue(14, 28)).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        image.info["transparency"] = image.getpixel((0, 0))
        image.save(tmp_path / "a.png")
        frames = load_photos([tmp_path / "a.png"], long_side=28)
        assert frames[0, :, 0, 0].tolist() == [1, 1, 1]
        assert frames[0, :, 0, 27].tolist() == [0, 0, 1]

    def test_cmyk_becomes_rgb(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.jpg", flat(14, 14, 255, 255, 255), "CMYK")
        assert load_photos([path], long_side=14).min() > 0.98

    def test_first_image_of_an_animation(self, tmp_path: Path) -> None:
        first, second = (Image.fromarray(flat(14, 14, *colour)) for colour in ((255, 0, 0), (0, 255, 0)))
        first.save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
        assert load_photos([tmp_path / "a.webp"], long_side=14)[0, :, 0, 0].tolist() == [1, 0, 0]


class TestBroken:
    def test_truncated_photo_is_named(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        good, path = (save(tmp_path / name, noise) for name in ("good.jpg", "cut.jpg"))
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"cut\.jpg cannot be read as a photo"):
            load_photos([good, path])

    @pytest.mark.parametrize(
        "content", [b"", b"not a photo", b"\x89PNG\r\n\x1a\n" + bytes(40)], ids=["empty", "text", "png"]
    )
    def test_file_without_photo_is_named(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.png cannot be read as a photo"):
            load_photos([tmp_path / "bad.png"])

    @pytest.mark.parametrize("limit", [300, 100], ids=["warning", "error"])  # Pillow raises above twice the limit
    def test_too_many_pixels_name_the_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        path = save(tmp_path / "a.png", flat(14, 28, 255, 255, 255))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"a\.png .*392 pixels.*raise PIL\.Image\.MAX_IMAGE_PIXELS"):
            load_photos([path], long_side=28)

    def test_missing_photo_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"gone\.png cannot be read"):
            load_photos([tmp_path / "gone.png"])

    def test_float_pixels_are_refused(self, tmp_path: Path) -> None:
        path = save(tmp_path / "depth.tiff", np.ones((14, 14), dtype=np.float32))
        with pytest.raises(ValueError, match=r"depth\.tiff .* no known white level"):
            load_photos([path], long_side=14)

    def test_without_pillow_the_error_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = save(tmp_path / "a.png", flat(14, 14, 0, 0, 0))
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match=r"pip install 'svggt-kernels\[viz\]'"):
            load_photos([path])
