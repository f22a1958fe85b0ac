"""Sources of covisibility in a patched model: those of the package by word, and those that a user writes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from device_waits import no_device_waits
from doubles import BAND, FAMILY, images
from torch import Tensor

from svggt_kernels import CovisibilityGraph, patch
from svggt_kernels.patching import plan
from svggt_kernels.sources import SOURCES, PatchSimilarity, Scene, Source, fingerprint, similarity
from svggt_kernels.sources.base import IMAGENET_DEVIATION, IMAGENET_MEAN
from svggt_kernels.sources.cache import LRUCache
from svggt_kernels.sources.thumbnails import thumbnails


@dataclass
class Noting:
    """A user's source, which notes the scenes that it is asked about."""

    needs: Literal["nothing", "images", "tokens"] = "nothing"
    label: str = "a band"
    scenes: list[Scene] = field(default_factory=list)

    def graph(self, scene: Scene) -> CovisibilityGraph:
        self.scenes.append(scene)
        return BAND


@pytest.mark.parametrize("source", [*SOURCES.values(), Noting])
def test_every_source_is_one(source: type[Source]):
    assert isinstance(source(), Source)


@pytest.mark.parametrize("source", [*SOURCES.values(), Noting, 3, [], [0, 2], [BAND, None]])
def test_what_is_no_source_is_refused_when_the_model_is_patched(source: object):
    words = r"^covisibility must be a CovisibilityGraph, .*\"patches\".* Core\(8\) .*CovisibilityGraph\.core$"
    with pytest.raises(TypeError, match=words):
        patch(FAMILY["vggt"].create(), covisibility=source)  # type: ignore[arg-type]


def test_what_only_compares_frames_is_refused_with_what_to_write():
    with pytest.raises(TypeError, match=r"write Core\(by=PatchSimilarity\(\)\)"):
        patch(FAMILY["vggt"].create(), covisibility=PatchSimilarity())  # type: ignore[arg-type]


def test_a_source_of_the_user_is_asked_about_each_sample():
    source, pictures = Noting(), images(batch=2)
    model = FAMILY["vggt"].create()
    with patch(model, covisibility=source) as handle:
        model(pictures)
    assert handle.graph is BAND
    assert [scene.sample for scene in source.scenes] == [(0, 2), (1, 2)]
    for scene, picture in zip(source.scenes, pictures, strict=True):
        assert torch.equal(scene.images, picture)
        assert (scene.num_frames, scene.reference_frame) == (5, 0)


def test_a_scene_is_in_the_order_of_the_images():
    """DA3 moves a frame to the front: the tokens and the reference frame of a scene are those of the images."""
    seen: list[Tensor] = []

    class Reading(Noting):
        def graph(self, scene: Scene) -> CovisibilityGraph:
            seen.append(scene.tokens)
            return super().graph(scene)

    source, pictures = Reading("tokens"), images(1) + 1e-3 * images(5, seed=2)
    pictures[:, 0] = images(1, seed=1)
    model, order = FAMILY["da3"].create(), FAMILY["da3"].order(5)
    with patch(model, covisibility=source):
        model(pictures)
    assert source.scenes[0].reference_frame == order[0] == 2
    pooled = seen[0].mean(dim=1)
    assert (pooled - pooled.median(dim=0).values).norm(dim=1).argmax() == 0


def test_a_source_that_needs_images_is_refused_where_there_are_none():
    model = FAMILY["mapanything"].create()
    with patch(model, covisibility=Noting("images")), pytest.raises(ValueError, match=r"a band.* is given a list"):
        model(images())


def test_a_source_that_gives_no_graph_is_refused():
    class Wrong(Noting):
        def graph(self, scene: Scene) -> CovisibilityGraph:
            return BAND.to_dense()  # type: ignore[return-value]

    model = FAMILY["vggt"].create()
    with patch(model, covisibility=Wrong()), pytest.raises(TypeError, match="but a band gave a Tensor"):
        model(images())


def test_thumbnails_is_a_word():
    """Normalisation is undone first, and images of the same content give the same graph and layout."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    for name, pictures in (("pi3", images(24)), ("da3", (images(24) - mean) / deviation)):
        model = FAMILY[name].create()
        with patch(model, covisibility="thumbnails") as handle:
            model(pictures)
            first = handle.graph, handle.layout
            model(pictures.clone())
            assert (handle.graph, handle.layout) == first
        reference = {"pi3": None, "da3": 12}[name]
        expected = CovisibilityGraph.from_descriptors(thumbnails(images(24)[0]), reference_frame=reference)
        assert torch.equal(handle.graph.to_dense(), expected.to_dense())


def test_fingerprints_are_begun_before_the_model_runs(monkeypatch: pytest.MonkeyPatch):
    """So what the host waits for at the first global attention is done by then."""
    happened: list[str] = []
    sums, read = plan.word_sums, similarity.fingerprint
    monkeypatch.setattr(plan, "word_sums", lambda images: happened.append("sums") or sums(images))
    monkeypatch.setattr(similarity, "fingerprint", lambda *given: happened.append("read") or read(*given))
    model, pictures = FAMILY["vggt"].create(), images(batch=2)
    model.aggregator.patch_embed.register_forward_pre_hook(lambda *_: happened.append("model"))
    with patch(model, covisibility="thumbnails") as handle:
        model(pictures)
        assert happened == ["sums", "sums", "model", "read", "read"]
        graphs = handle.graphs
        model(pictures.clone())
        assert handle.graphs == graphs


@pytest.mark.gpu
def test_fingerprints_are_begun_without_waiting():
    pictures = images(24)[0].cuda()
    plan.word_sums(pictures)
    with no_device_waits():
        sums = plan.word_sums(pictures)
    assert fingerprint.fingerprint(pictures, sums) == fingerprint.fingerprint(pictures)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_images_changed_in_place_are_read_again(mode):
    model, pictures = FAMILY["vggt"].create(), images(24)
    with mode(), patch(model, covisibility="thumbnails") as handle:
        model(pictures)
        before = handle.graph
        for change in (lambda: pictures.copy_(images(24, seed=1)), lambda: pictures.data[0, 3].mul_(0.5)):
            change()
            model(pictures)
            assert handle.graph is not before
            before = handle.graph


def test_memory_shared_with_numpy_is_read_each_time():
    model, pictures = FAMILY["vggt"].create(), images(24)
    with patch(model, covisibility="thumbnails") as handle:
        model(pictures)
        before = handle.graph
        pictures.numpy()[:] = images(24, seed=1).numpy()
        model(pictures)
        assert handle.graph is not before


def test_a_cache_keeps_what_was_used_last_and_a_copy_keeps_nothing():
    cache: LRUCache[int] = LRUCache(2)
    made: list[str] = []
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.get(key, lambda key=key: made.append(key) or 0)  # type: ignore[misc]
    assert made == ["a", "b", "c", "b"]
    copy.deepcopy(cache).get("b", lambda: made.append("copy") or 0)
    assert made[-1] == "copy"
