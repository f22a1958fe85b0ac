"""`patch(model)` with MegaLoc: described once, remembered by content, in the images' own order."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import doubles
import pytest
import torch
from doubles import BAND, FAMILY, images
from tiny import SIZE, megaloc
from torch import Tensor

from svggt_kernels import (
    Core,
    CovisibilityGraph,
    MegaLoc,
    MegaLocSimilarity,
    TokenSimilarity,
    patch,
)
from svggt_kernels.sources import fingerprint as fingerprints
from svggt_kernels.sources.base import IMAGENET_DEVIATION, IMAGENET_MEAN
from svggt_kernels.sources.fingerprint import fingerprint

MEGALOC = MegaLocSimilarity(weights=megaloc(), size=SIZE, neighbours=1, anchors=0)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What MegaLoc was given, call after call."""
    given: list[Tensor] = []
    describe = MegaLoc.describe

    def spy(self: MegaLoc, pictures: Tensor, **options: int) -> Tensor:
        given.append(pictures)
        return describe(self, pictures, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(MegaLoc, "describe", spy)
    return given


def test_the_default_is_megaloc(monkeypatch: pytest.MonkeyPatch, described: list[Tensor]):
    asked = []

    def from_pretrained(source: str) -> MegaLoc:
        asked.append(source)
        return megaloc()

    monkeypatch.setattr(MegaLoc, "from_pretrained", from_pretrained)
    model = FAMILY["vggt"].create()
    with patch(model, backend="reference"):
        assert asked == ["gberton/MegaLoc"]
        model(images())
        assert not described  # few frames see all
        model(images(Core().size + 1))
    assert len(described) == 1


def test_unreachable_weights_leave_the_model_alone(monkeypatch: pytest.MonkeyPatch):
    def from_pretrained(source: str) -> MegaLoc:
        raise FileNotFoundError("out of reach")

    monkeypatch.setattr(MegaLoc, "from_pretrained", from_pretrained)
    model = FAMILY["vggt"].create()
    with pytest.raises(FileNotFoundError, match="out of reach"):
        patch(model)
    assert "forward" not in model.aggregator.__dict__


def test_weights_of_another_type_are_refused_when_the_model_is_patched():
    model = FAMILY["vggt"].create()
    with pytest.raises(TypeError, match=r"must be given as a path .*, got int"):
        patch(model, covisibility=MegaLocSimilarity(weights=3))  # type: ignore[arg-type]
    assert "forward" not in model.aggregator.__dict__


@pytest.mark.parametrize("name", ["size", "batch_size", "neighbours", "window", "anchors"])
def test_counts_of_another_type_are_refused(name: str):
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=dataclasses.replace(MEGALOC, **{name: "many"}), backend="reference"):
        with pytest.raises(TypeError, match=f"^{name} must be an integer, got 'many'"):
            model(images())


def test_graph_is_that_of_the_descriptors():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=MEGALOC) as handle:
        model(images())
    descriptors = megaloc().describe(images()[0].float(), size=SIZE)
    expected = CovisibilityGraph.from_descriptors(descriptors, neighbours=1, anchors=0)
    assert torch.equal(handle.graph.to_dense(), expected.to_dense())


def test_described_once_and_remembered(described: list[Tensor]):
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=MEGALOC) as handle:
        model(images())
        first = (handle.graph, handle.layout)
        assert list(handle.report().step_seconds) == ["look-up", "descriptors", "graph", "layout", "tables"]
        assert "descriptors" in str(handle.report())
        model(images().clone())
        assert (handle.graph, handle.layout) == first
        assert "descriptors" not in handle.report().step_seconds
        model(images(seed=1))
        assert handle.graph is not first[0]
    assert len(described) == 2


def test_each_sample_has_its_graph(described: list[Tensor]):
    model = FAMILY["vggt"].create()
    both = torch.cat([images(seed=3), images(seed=4)])
    with patch(model, covisibility=MEGALOC) as handle:
        out = model(both)
        assert len(handle.graphs) == 2
        torch.testing.assert_close(model(both[1:]), out[1:])
    assert len(described) == 2


def test_modes_of_the_caller_do_not_taint_what_is_kept():
    model = FAMILY["vggt"].create().float()
    with patch(model, covisibility=MEGALOC):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model(images(dtype=torch.float32))
        model(images(dtype=torch.float32)).sum().backward()


def test_reordered_frames_keep_their_own_graph():
    """DA3 moves image 2 to the front: the graph stays one of the images, and image 2 is its reference."""
    model = FAMILY["da3"].create()
    for source in (MEGALOC, TokenSimilarity(neighbours=1, anchors=0)):
        with patch(model, covisibility=source) as handle:
            model(images())
        visible = handle.graph.to_dense()
        order = FAMILY["da3"].order(5)
        assert order[0] != 0
        assert visible[order[0]].all() and visible[:, order[0]].all()
        assert not visible.all()
        assert torch.equal(handle.layout.graph.to_dense(), visible[order][:, order])


def test_normalisation_of_the_model_is_undone(described: list[Tensor]):
    model = FAMILY["da3"].create()
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    with patch(model, covisibility=MEGALOC):
        model((images() - mean) / deviation)
    torch.testing.assert_close(described[0].double(), images()[0])


def test_edges_of_another_graph_are_added():
    model = FAMILY["vggt"].create()
    source = MegaLocSimilarity(weights=megaloc(), size=SIZE, neighbours=0, anchors=0, bridge=False, also=BAND)
    with patch(model, covisibility=source) as handle:
        model(images())
    expected = BAND.to_dense()
    expected[0] = expected[:, 0] = True
    assert torch.equal(handle.graph.to_dense(), expected)


def test_sequential_is_a_word():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility="sequential") as handle:
        model(images(14))
    expected = CovisibilityGraph.sequential(14, 10).to_dense()
    expected[0] = expected[:, 0] = True
    assert torch.equal(handle.graph.to_dense(), expected)


def test_a_model_without_images_is_refused():
    model = FAMILY["mapanything"].create()
    expected = r"given a list; use covisibility=.patches"
    with patch(model, covisibility=MEGALOC), pytest.raises(ValueError, match=expected):
        model(images())


def test_nan_image_is_named():
    model = FAMILY["vggt"].create()
    pictures = images()
    pictures[0, 3] = torch.nan
    with patch(model, covisibility=MEGALOC), pytest.raises(ValueError, match="but images 3 do"):
        model(pictures)


def test_one_image_and_the_same_image():
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=MEGALOC) as handle:
        model(images(1))
        assert handle.graph.num_edges == 1
        assert model(images(1).expand(-1, 6, -1, -1, -1)).isfinite().all()
        assert handle.graph.is_connected()


def test_copies_describe_for_themselves(described: list[Tensor]):
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=MEGALOC):
        expected = model(images())
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(again(images()), expected)
    assert len(described) == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64], ids=str)
def test_fingerprint_sees_every_bit(dtype: torch.dtype):
    pictures = (255 * images()[0]).to(dtype)
    for index in ((0, 0, 0, 0), (4, 2, doubles.HEIGHT - 1, doubles.WIDTH - 1), (2, 1, 3, 5)):
        other = pictures.clone()
        other.view(torch.uint8)[index[:3] + (index[3] * dtype.itemsize,)] ^= 1
        assert fingerprint(other) != fingerprint(pictures)
    assert fingerprint(pictures.clone()) == fingerprint(pictures)
    assert fingerprint(pictures[[1, 0, 2, 3, 4]]) != fingerprint(pictures)
    assert fingerprint(pictures[:4]) != fingerprint(pictures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fingerprint_sees_signs(dtype: torch.dtype):
    """Differences in the highest bits of words alone."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(1, 3, 14, 14, dtype=dtype, generator=generator)
    signs = 1 - 2 * torch.randint(2, (50, *pictures.shape), dtype=dtype, generator=generator)
    assert len({fingerprint(pictures * sign) for sign in signs}) == 50


def test_fingerprint_tells_dtypes_of_equal_bits_apart():
    pictures = images()[0].half()
    assert fingerprint(pictures) != fingerprint(pictures.view(torch.bfloat16))
    assert fingerprint(pictures) != fingerprint(pictures.view(torch.int16))


def test_factors_of_the_fingerprint_are_drawn_once():
    fingerprints._factors.cache_clear()
    for seed in range(3):
        fingerprint(images(seed=seed)[0])
    assert fingerprints._factors.cache_info().misses == 1


def test_fingerprint_ignores_the_default_device():
    expected = fingerprint(images()[0])
    fingerprints._factors.cache_clear()
    pictures = images()[0]
    with torch.device("meta"):
        assert fingerprint(pictures) == expected


def test_normalisation_ignores_the_default_dtype(described: list[Tensor]):
    model = FAMILY["da3"].create().float()
    pictures = images(dtype=torch.float32)
    with patch(model, covisibility=MEGALOC):
        model(pictures)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model(pictures.flip(-1))
        finally:
            torch.set_default_dtype(default)
    torch.testing.assert_close(described[1].flip(-1), described[0], rtol=0, atol=0)
