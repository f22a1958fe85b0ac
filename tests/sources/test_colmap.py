"""COLMAP as a source: databases of old and new schemas, sparse models, and which frame each of their images is."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from graphs import assert_same_graph

from svggt_kernels import CovisibilityGraph
from svggt_kernels.sources import from_colmap
from svggt_kernels.sources.colmap import MAX_IMAGES, shared_features

KEYPOINTS = 200
# The tables that are read, as COLMAP made them before version 3.12.
SCHEMA = """
CREATE TABLE images(image_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, camera_id INTEGER NOT NULL);
CREATE TABLE keypoints(image_id INTEGER PRIMARY KEY, rows INTEGER NOT NULL, cols INTEGER NOT NULL, data BLOB);
CREATE TABLE matches(pair_id INTEGER PRIMARY KEY, rows INTEGER NOT NULL, cols INTEGER NOT NULL, data BLOB);
CREATE TABLE two_view_geometries(pair_id INTEGER PRIMARY KEY, rows INTEGER NOT NULL, cols INTEGER NOT NULL, data BLOB,
  config INTEGER NOT NULL, F BLOB, E BLOB, H BLOB);
"""


def written(
    path: Path, names: Sequence[str], pairs: Mapping[tuple[int, int], int], *, matched: int = 0, mode: str = "delete"
) -> Path:
    """Write a database of images 1, 2, ... with inliers by pair, and the first `matched` pairs matched only."""
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA journal_mode={mode}")
        database.executescript(SCHEMA)
        database.executemany("INSERT INTO images VALUES (?, ?, 1)", enumerate(names, start=1))
        database.executemany(
            "INSERT INTO keypoints VALUES (?, ?, 2, x'')", [(image, KEYPOINTS) for image in range(1, len(names) + 1)]
        )
        database.executemany("INSERT INTO matches VALUES (?, 120, 2, x'')", [(pair,) for pair in range(matched)])
        rows = [(MAX_IMAGES * first + second, inliers) for (first, second), inliers in pairs.items()]
        database.executemany("INSERT INTO two_view_geometries VALUES (?, ?, 2, x'', 2, x'', x'', x'')", rows)
        database.commit()
    return path


def all_pairs(images: int, inliers: int) -> dict[tuple[int, int], int]:
    return {(first, second): inliers for second in range(1, images + 1) for first in range(1, second)}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, set[int]]]:
    """A database and a model of five images, and the points that each image sees."""
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    folder = tmp_path_factory.mktemp("colmap")
    options = pycolmap.SyntheticDatasetOptions(num_rigs=1, num_cameras_per_rig=1, num_frames_per_rig=5)
    options.num_points3D = 60
    options.num_points2D_without_point3D = 3
    options.track_length = 3
    with pycolmap.Database.open(folder / "database.db") as database:
        model = pycolmap.synthesize_dataset(options, database)
    (folder / "sparse").mkdir()
    model.write(folder / "sparse")
    seen = {
        image.name: {point.point3D_id for point in image.points2D if point.has_point3D()}
        for image in model.images.values()
    }
    return folder / "database.db", folder / "sparse", seen


class TestColmap:
    def test_model_gives_shared_points(self, scene: tuple[Path, Path, dict[str, set[int]]]) -> None:
        _, model, seen = scene
        order = [3, 0, 4, 1, 2]  # that of the images given, not of the model
        names = [list(seen)[i] for i in order]
        shared = torch.tensor([[len(seen[a] & seen[b]) for b in names] for a in names]).fill_diagonal_(0)
        paths = [Path("photos") / name for name in names]
        assert torch.equal(shared_features(model, paths), shared)
        middle = int(shared[shared > 0].median())
        expected = CovisibilityGraph.from_dense(shared >= middle)
        assert expected.density < 1
        assert_same_graph(from_colmap(model, paths, min_shared=middle), expected)

    def test_database_gives_verified_inliers(self, scene: tuple[Path, Path, dict[str, set[int]]]) -> None:
        database, _, seen = scene
        assert from_colmap(database, list(seen)).density == 1
        assert from_colmap(database, list(seen), min_shared=10**6).num_edges == 5

    def test_unknown_image_sees_itself(self, scene: tuple[Path, Path, dict[str, set[int]]]) -> None:
        database, _, seen = scene
        with pytest.warns(UserWarning, match=r"does not know 1 of the 6 images \(new\.jpg\)"):
            graph = from_colmap(database, [*seen, "new.jpg"])
        assert graph.to_dense()[5].tolist() == [False] * 5 + [True]

    @pytest.mark.parametrize("kind", [0, 1], ids=["database", "model"])
    def test_another_image_set(self, scene: tuple[Path, Path, dict[str, set[int]]], kind: int) -> None:
        with pytest.raises(ValueError, match=r"knows none of the 2 images \(a\.jpg, b\.jpg.* it is of 5 others"):
            from_colmap(scene[kind], ["a.jpg", "b.jpg"])

    def test_what_is_no_colmap(self, tmp_path: Path) -> None:
        pytest.importorskip("pycolmap", reason="pycolmap is not installed")
        (tmp_path / "database.db").write_text("something else")
        sqlite3.connect(tmp_path / "empty.db").close()
        for name in ("database.db", "empty.db"):
            with pytest.raises(ValueError, match=f"{name} must be a database of COLMAP"):
                from_colmap(tmp_path / name, ["a.jpg"])
        with pytest.raises(ValueError, match="must be a sparse model of COLMAP"):
            from_colmap(tmp_path, ["a.jpg"])
        with pytest.raises(FileNotFoundError, match="does not exist"):
            from_colmap(tmp_path / "none.db", ["a.jpg"])

    def test_model_without_points(self, tmp_path: Path) -> None:
        pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
        pycolmap.Reconstruction().write(tmp_path)
        with pytest.raises(ValueError, match="holds 0 points and 0 images, and no point that two images share"):
            from_colmap(tmp_path, ["a.jpg"])

    def test_only_models_need_pycolmap(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pycolmap", None)
        database = written(tmp_path / "database.db", ["a.jpg", "b.jpg"], {(1, 2): 20})
        assert from_colmap(database, ["a.jpg", "b.jpg"]).density == 1
        with pytest.raises(ImportError, match=r"svggt-kernels\[colmap\]"):
            from_colmap(tmp_path, ["a.jpg"])


class TestDatabase:
    def test_agrees_with_pycolmap(self, scene: tuple[Path, Path, dict[str, set[int]]], tmp_path: Path) -> None:
        pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
        names = list(scene[2])
        copy = shutil.copy(scene[0], tmp_path / "copy.db")
        expected = torch.zeros(5, 5, dtype=torch.int64)
        with pycolmap.Database.open(copy) as database:
            place = {image.image_id: names.index(image.name) for image in database.read_all_images()}
            for pair, inliers in zip(*database.read_two_view_geometry_num_inliers(), strict=True):
                i, j = (place[image] for image in pycolmap.pair_id_to_image_pair(pair))
                expected[i, j] = expected[j, i] = inliers
        assert expected.count_nonzero() == 20
        assert torch.equal(shared_features(scene[0], names), expected)

    @pytest.mark.parametrize("mode", ["delete", "wal"])
    @pytest.mark.parametrize("folder", ["plain", "50% of #1? \u00e9"])
    def test_reading_changes_nothing(self, tmp_path: Path, mode: str, folder: str) -> None:
        (tmp_path / folder).mkdir()
        database = written(tmp_path / folder / "a.db", ["a.jpg", "b.jpg"], {(1, 2): 50}, mode=mode)
        before = database.read_bytes()
        database.chmod(0o444)
        database.parent.chmod(0o555)
        try:
            assert shared_features(database, ["a.jpg", "b.jpg"]).tolist() == [[0, 50], [50, 0]]
        finally:
            database.parent.chmod(0o755)
        assert database.read_bytes() == before
        assert os.listdir(database.parent) == ["a.db"]

    def test_reads_what_is_only_in_the_log_of_a_writer(self, tmp_path: Path) -> None:
        database = written(tmp_path / "a.db", ["a.jpg", "b.jpg"], {(1, 2): 50}, mode="wal")
        with closing(sqlite3.connect(database)) as writer:
            writer.execute("UPDATE two_view_geometries SET rows = 70")
            writer.commit()
            assert (tmp_path / "a.db-wal").stat().st_size > 0
            assert shared_features(database, ["a.jpg", "b.jpg"])[0, 1] == 70

    @pytest.mark.parametrize(("matched", "advice"), [(10, "verification$"), (0, "verification after matching$")])
    def test_matches_that_were_never_verified(self, tmp_path: Path, matched: int, advice: str) -> None:
        database = written(tmp_path / "a.db", ["a.jpg", "b.jpg"], {(1, 2): 0}, matched=matched)
        with pytest.raises(ValueError, match=f"{matched} matched pairs of 2 images and no verified pair; .*{advice}"):
            from_colmap(database, ["a.jpg", "b.jpg"])

    def test_warns_if_the_known_images_share_nothing(self, tmp_path: Path) -> None:
        database = written(tmp_path / "a.db", ["a.jpg", "b.jpg", "c.jpg"], {(1, 2): 50})
        with pytest.warns(UserWarning, match="no feature that two of the 2 images share"):
            assert from_colmap(database, ["a.jpg", "c.jpg"]).num_edges == 2


class TestWhichImageAFrameIs:
    CAMERAS = tuple(f"cam{camera}/{i}.jpg" for camera in range(2) for i in range(3))

    def test_another_folder_takes_nothing(self, tmp_path: Path) -> None:
        """COLMAP knows cam0 only; the frames of cam1 have the same file names."""
        database = written(tmp_path / "a.db", self.CAMERAS[:3], all_pairs(3, 50))
        with pytest.warns(UserWarning, match=r"does not know 3 of the 6 images \(cam1/0.jpg, cam1/1.jpg, cam1/2.jpg\)"):
            shared = shared_features(database, self.CAMERAS)
        expected = torch.zeros(6, 6, dtype=torch.int64)
        expected[:3, :3] = 50
        assert torch.equal(shared, expected.fill_diagonal_(0))

    @pytest.mark.parametrize("root", ["", "./", "/photos/", "..\\photos\\"])
    def test_longest_end_of_a_path(self, tmp_path: Path, root: str) -> None:
        database = written(tmp_path / "a.db", (*self.CAMERAS, "0.jpg"), all_pairs(7, 60))
        assert from_colmap(database, [root + name for name in (*self.CAMERAS, "0.jpg")]).density == 1

    def test_end_of_a_name_that_is_unique(self, tmp_path: Path) -> None:
        database = written(tmp_path / "a.db", ["walk/cam0/0.jpg", "walk/cam0/1.jpg"], {(1, 2): 30})
        assert from_colmap(database, ["0.jpg", Path("cam0/1.jpg")]).density == 1

    def test_names_that_fit_several_images(self, tmp_path: Path) -> None:
        database = written(tmp_path / "a.db", self.CAMERAS, all_pairs(6, 60))
        with pytest.raises(ValueError, match=r"'0.jpg' must mean one image, but fits cam0/0.jpg, cam1/0.jpg"):
            from_colmap(database, ["0.jpg", "1.jpg"])

    def test_two_files_are_never_one_image(self, tmp_path: Path) -> None:
        database = written(tmp_path / "a.db", ["0.jpg", "1.jpg"], {(1, 2): 60})
        with pytest.raises(ValueError, match=r"'cam0/0.jpg' and 'cam1/0.jpg' would both be the image '0.jpg'"):
            from_colmap(database, ["cam0/0.jpg", "cam0/1.jpg", "cam1/0.jpg"])

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=str)
    def test_exact_name_never_loses(self, tmp_path: Path, order: tuple[int, ...]) -> None:
        database = written(tmp_path / "a.db", ["0.jpg", "1.jpg"], {(1, 2): 60})
        names = ["0.jpg", "1.jpg", "cam1/0.jpg"]
        with pytest.warns(UserWarning, match=r"does not know 1 of the 3 images \(cam1/0.jpg\)"):
            shared = shared_features(database, [names[i] for i in order])
        place = [order.index(i) for i in range(3)]
        assert shared[place][:, place].tolist() == [[0, 60, 0], [60, 0, 0], [0, 0, 0]]

    def test_one_image_for_several_frames(self, tmp_path: Path) -> None:
        database = written(tmp_path / "a.db", ["a.jpg", "b.jpg"], {(1, 2): 80})
        shared = shared_features(database, ["a.jpg", "b.jpg", "./a.jpg"])
        assert shared.tolist() == [[0, 80, KEYPOINTS], [80, 0, 80], [KEYPOINTS, 80, 0]]

    def test_one_file_under_two_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "a.jpg").touch()
        database = written(tmp_path / "a.db", ["a.jpg", "b.jpg"], {(1, 2): 80})
        shared = shared_features(database, ["photos/a.jpg", "b.jpg", tmp_path / "photos" / "a.jpg"])
        assert shared[:, 1].tolist() == [80, 0, 80]

    def test_unicode_forms_are_one_name(self, tmp_path: Path) -> None:
        names = ["a.jpg", "caf\u00e9/\u00fc.jpg"]
        for known, given in (("NFC", "NFD"), ("NFD", "NFC")):
            database = written(tmp_path / known, [unicodedata.normalize(known, name) for name in names], {(1, 2): 60})
            assert from_colmap(database, [unicodedata.normalize(given, f"/x/{name}") for name in names]).density == 1

    def test_names_that_are_no_utf8(self, tmp_path: Path) -> None:
        database = written(tmp_path / "a.db", ["a.jpg", "b.jpg"], {(1, 2): 60})
        with closing(sqlite3.connect(database)) as writer:
            writer.execute("UPDATE images SET name = CAST(x'FF2E6A7067' AS TEXT) WHERE image_id = 1")
            writer.commit()
        assert from_colmap(database, [os.fsdecode(b"\xff.jpg"), "b.jpg"]).density == 1
