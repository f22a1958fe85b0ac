"""Warnings name the line of whoever called the package, however far inside they come from."""

from __future__ import annotations

import ast
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import FAMILY, images
from doubles.vggt import VGGT
from PIL import Image
from torch import Tensor

from svggt_kernels import CovisibilityGraph, OpenScene, block_sparse_attention, open_scene, patch, reconstruct
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.io.photos import find_photos, load_photos
from svggt_kernels.layout import BlockLayout
from svggt_kernels.models.loading import load_model
from svggt_kernels.sources import GraphFile, from_poses, read_graph
from svggt_kernels.streaming.apart import Yardstick

PACKAGE = Path(__file__).parent.parent / "svggt_kernels"
ISLANDS = CovisibilityGraph.from_pairs(5, [])
FRAMES = torch.rand(5, 3, 28, 42, generator=torch.Generator().manual_seed(0))


def photos(folder: Path) -> Path:
    """Three photos of which one is of another shape, and one that cannot be read."""
    (folder / "photos").mkdir()
    for place, size in enumerate([(56, 42), (56, 42), (14, 98)]):
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(folder / f"photos/{place}.png")
    (folder / "photos/3.nef").touch()
    return folder / "photos"


def with_pairs(folder: Path) -> Path:
    (folder / "pairs.txt").write_text("0.png 1.png\n")
    return folder / "pairs.txt"


def small_toy() -> RoomsModel:
    return RoomsModel.create(5, dim=16, depth=2, num_heads=2)


def scene() -> OpenScene:
    return open_scene(small_toy(), FRAMES, core=[0, 2, 4])


def of_an_upstream_model(folder: Path) -> None:
    """Whose forward, a line of another package, calls the module that is patched."""
    model = VGGT().eval()
    with patch(model, covisibility=ISLANDS):
        model(FRAMES[None])


def of_a_whole_model(folder: Path) -> None:
    model = FAMILY["pi3"].create()
    with patch(model, covisibility=ISLANDS):
        model(images())


def of_a_reconstruction(folder: Path) -> None:
    covisibility = GraphFile(with_pairs(folder))
    model = dataclasses.replace(load_model("toy", "random", torch.device("cpu")), module=small_toy())
    reconstruct(photos(folder), model, covisibility=covisibility, long_side=28)


def of_a_scene_of_photos(folder: Path) -> None:
    open_scene(small_toy(), photos(folder), core=[0, 2], chunk=1, long_side=42).predict()


def of_attention(folder: Path) -> None:
    q = torch.rand(1, 1, 4, 8)
    block_sparse_attention(q, q, q, BlockLayout.from_graph(CovisibilityGraph.all_visible(2), 2), backend="sdpa")


def of_a_name_of_a_backend(folder: Path) -> None:
    patch(FAMILY["pi3"].create(), covisibility="all", backend="sdpa").undo()


def of_a_name_of_an_option(folder: Path) -> None:
    patch(FAMILY["pi3"].create(), covisibility="all", lean=False).undo()


def of_poses(folder: Path) -> None:
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[:, 0, 3] = 5_334_321.9
    from_poses(poses, torch.tensor([[50.0, 0, 50], [0, 50, 50], [0, 0, 1]]), (1, 10), (100, 100))


CALLS: dict[str, Callable[[Path], object]] = {
    "an upstream model": of_an_upstream_model,
    "a whole model": of_a_whole_model,
    "predict": lambda folder: scene().predict(),
    "stream": lambda folder: list(scene().stream()),
    "add": lambda folder: scene().add(FRAMES[:3]),
    "write": lambda folder: scene().write(folder / "outputs"),
    "open_scene": of_a_scene_of_photos,
    "find_photos": lambda folder: find_photos(photos(folder)),
    "load_photos": lambda folder: load_photos(sorted(photos(folder).glob("*.png")), long_side=28),
    "read_graph": lambda folder: read_graph(with_pairs(folder), ["0.png", "1.png", "2.png"]),
    "reconstruct": of_a_reconstruction,
    "block_sparse_attention": of_attention,
    "backend": of_a_name_of_a_backend,
    "lean": of_a_name_of_an_option,
    "from_poses": of_poses,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_they_name_the_line_of_the_user(call: Callable[[Path], object], tmp_path: Path, monkeypatch):
    def apart(yardstick: Yardstick, outputs: dict[str, Tensor], descriptors: Tensor | None) -> Tensor:
        return torch.ones(len(outputs["depth"]), dtype=torch.bool)

    monkeypatch.setattr(Yardstick, "apart", apart)
    monkeypatch.setattr("svggt_kernels.streaming.scene.more_than_by_chance", lambda apart, frames, core: apart > 0)
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        call(tmp_path)
    assert said
    assert {warning.filename for warning in said} == {__file__}


def test_photos_of_a_scene_are_named_once(tmp_path: Path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        of_a_scene_of_photos(tmp_path)
    (cropped,) = [str(warning.message) for warning in said if "cropped" in str(warning.message)]
    assert "1 of 3, because all frames take the shape of the median photo: " in cropped


def test_there_is_no_other_way():
    calls = [
        path
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "warn" and getattr(node.value, "id", "") == "warnings"
    ]
    assert calls == []
