"""The page of a reconstruction: what it says of photos, and a picture of it in a browser."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import BROWSER, picture_of
from scenes_in_files import FRAMES, Exact, exact_walk
from tiers import full

from svggt_kernels import CovisibilityGraph
from svggt_kernels.cli import main
from svggt_kernels.reconstruction.view import Viewer

pytest.importorskip("viser", reason="viser is not installed")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    return exact_walk(tmp_path_factory.mktemp("walk") / "photos")


@pytest.fixture
def viewer(exact: Exact) -> Iterator[Viewer]:
    """A view of six photos, of which the third stands far away from the others."""
    poses = exact.scene.poses.clone()
    poses[2, 0, 3] += 100
    facts = {"model": "toy", "weights": "trained", "warning": "They mean little."}
    graph = CovisibilityGraph.core(FRAMES, [0, 4])
    viewer = Viewer(dataclasses.replace(exact.scene, poses=poses, facts=facts, graph=graph), port=8271)
    yield viewer
    viewer.stop()


def test_only_this_machine_is_served(viewer: Viewer):
    assert viewer.url.startswith("http://127.0.0.1:")


def test_it_says_what_is_weak(viewer: Viewer):
    said = viewer._summary()
    assert "**6 photos**, toy, weights: trained" in said
    assert "**Mind:** 1 photo of 6 shares no view with any other (02.png)" in said
    assert "**Mind:** They mean little." in said


def test_a_photo_is_told_with_what_it_sees(viewer: Viewer):
    colours = [handle.color for handle in viewer._cameras]
    assert colours[2] != colours[0] == colours[1]
    viewer.choose(1)
    assert viewer._about.content.startswith("**01.png**\n\nIn attention it saw 2 other photos: 00.png, 04.png.")
    assert "It shares views with 4 photos:" in viewer._about.content
    assert all(handle.visible for handle in viewer._pictures)
    assert np.array_equal(viewer._pictures[0].image, viewer.scene.colours[1].numpy())
    marked = [place for place, handle in enumerate(viewer._cameras) if handle.color == (0, 190, 190)]
    assert marked == [0, 4]
    assert viewer._cameras[1].color == (250, 210, 0)
    viewer.choose(2)
    assert "shares no view with any other photo**: its camera may be wrong" in viewer._about.content
    viewer.choose(None)
    assert not any(handle.visible for handle in viewer._pictures)
    assert [handle.color for handle in viewer._cameras] == colours


def test_near_is_bright(viewer: Viewer):
    colours, depth = viewer._pictures_of(0)
    assert colours.shape == depth.shape == (70, 84, 3)
    order = viewer.scene.depth[0].flatten().argsort().numpy()
    bright = depth[..., 0].flatten().astype(float)
    assert bright[order[:500]].mean() > bright[order[-500:]].mean() + 50


def test_rooms_are_opened_from_above(viewer: Viewer):
    points = torch.from_numpy(np.array(viewer._point_handle.points))
    viewer._cut(50)
    fewer = torch.from_numpy(np.array(viewer._point_handle.points))
    assert len(fewer) == pytest.approx(len(viewer._cloud) / 2, rel=0.01)
    assert fewer[:, 1].min() > points[:, 1].min()  # y points down


@full
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_draws_it(viewer: Viewer, tmp_path: Path):
    viewer.choose(1)

    def has_points(picture: np.ndarray) -> bool:
        scene = picture[:, : picture.shape[1] // 2].reshape(-1, 3).astype(int)
        coloured = scene.max(1) - scene.min(1) > 30
        return bool(coloured.mean() > 0.01)

    picture = picture_of(viewer.url, tmp_path, has_points)
    assert has_points(picture)
    panel = picture[:, -picture.shape[1] // 3 :].reshape(-1, 3).astype(int)
    assert (panel.max(1) < 60).mean() > 0.005  # text


class TestCommand:
    def test_it_serves_until_interrupted(
        self, exact: Exact, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exact.scene.save(tmp_path / "reconstruction.npz")

        def interrupted(viewer: Viewer) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Viewer, "serve", interrupted)
        assert main(["view", str(tmp_path), "--port", "8272"]) == 130
        said = capsys.readouterr()
        assert said.out == "Open http://127.0.0.1:8272 in a browser; Ctrl-C ends it.\n"
        assert said.err == "svggt-kernels view: interrupted\n"

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda path: None, "DIR must be a folder that reconstruct has written, but .*nothing is none"),
            (lambda path: path.mkdir(), r"a saved reconstruction is needed, but .*reconstruction\.npz is no file"),
        ],
    )
    def test_what_is_no_reconstruction(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, message: str
    ) -> None:
        import re

        make(tmp_path / "nothing")  # type: ignore[operator]
        assert main(["view", str(tmp_path / "nothing")]) == 2
        assert re.search(message, capsys.readouterr().err)
