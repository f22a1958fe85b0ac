"""Photos in, reconstruction out."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph import AnyGraph, CoarseGraph, CovisibilityGraph
from ..graph.arguments import integer
from ..graph.arrays import as_arrays
from ..inference.memory import MemoryBudget
from ..io.photos import load_photos
from ..measure.compare import Stage, silent
from ..measure.cost import Tell
from ..measure.machine import device_name, devices, versions
from ..measure.wording import count, printable
from ..models import RUNNABLE, RunnableModel
from ..models.loading import RANDOM, LoadedModel, load_model
from ..sources import Core, Covisibility, GraphFile, Source
from ..sources.registry import named
from .folder import OutputFolder
from .formats import DEFAULT, FORMATS, Files, Format, Material
from .photos import IMAGES, Photos, is_video, photos_of, photos_of_video, request_of_video, stamp
from .points import PointChoice
from .prediction import core_to_stream, frames_at_once, predict, predict_in_chunks
from .scene import Reconstruction, relative_names

TELL_SECONDS = 2.0

CONVENTIONS = {
    "poses": "camera to world; cameras and world have x right, y down, z forward, as in OpenCV",
    "world": "the axes in which the model answers: for most models those of the first photo",
    "pixels": "from the top left corner of the photo as it is stored; the centre of the first is (0.5, 0.5)",
    "unit": "the model's own; nothing says how many metres it is",
}


@dataclass(frozen=True, eq=False)
class Settings:
    """How a model runs.

    Attributes:
        covisibility: As `patch` takes it.
        long_side: Pixels of the longer side of a frame; None for the model's usual one.
        device: Where.
        backend: As `patch` takes it.
        memory_budget: Likewise.
        chunk: Frames that run together; None for all, in one forward.
        core: The core that runs before chunks.
    """

    covisibility: Covisibility
    long_side: int | None
    device: torch.device
    backend: str | None
    memory_budget: MemoryBudget
    chunk: int | None
    core: Core | AnyGraph | None


def reconstruct(
    photos: str | Path | Sequence[str | Path],
    model: str | LoadedModel,
    *,
    weights: str | Path | None = None,
    output: str | Path | None = None,
    formats: Sequence[str] | None = None,
    covisibility: Covisibility = "core",
    points: PointChoice | None = None,
    max_frames: int | None = None,
    frames_per_second: float = 2.0,
    long_side: int | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    memory_budget: MemoryBudget = None,
    chunk: int | None = None,
    force: bool = False,
    stage: Stage = silent,
) -> Reconstruction:
    """Run a model on photos and return cameras, depth and confidence; with `output` also write what others open.

    What is finished is not done again: a second call with the same photos, model and options reads the run from
    `output` and writes the exports that are missing. The conventions are in docs/reconstruct.md.

    Args:
        photos: A folder, a list of files, or a video, whose frames are written into `output / "images"`.
        model: The name of a model that can be built here, or a loaded one.
        weights: As `load_model` takes them. A model other than the toy needs them: "random" has to be said.
        output: The folder for what is written; None writes nothing.
        formats: Words of `formats.FORMATS`; None for those of `formats.DEFAULT` whose packages are installed.
        covisibility: As `patch` takes it, but no function.
        points: Which pixels become points.
        max_frames: Use the first so many photos.
        frames_per_second: Of a video.
        long_side: Pixels of the longer side of a frame; None for the model's usual one.
        device: Where to run; None for the fastest kind there is.
        backend: As `patch` takes it.
        memory_budget: Likewise.
        chunk: Photos that run together, where there are more than those of the core; chunks that are finished are kept
            in `output`. Needs a `Core` without nearest, with no or a number of coarse, or the graph of a closed core.
            None runs all photos in one forward, unless `memory_budget` holds none.
        force: Replace what `output` holds of another request.
        stage: Is told each stage of the work.

    Raises:
        ValueError: Something cannot be read, or does not mean what it must; the message says what to do.
        TypeError: An argument is of another type.
        FileNotFoundError: Photos or weights are not there.
        FileExistsError: `output` holds something else.
        ImportError: A package is missing; the message says how to install it.
        OSError: A file cannot be written. What was written before stays.
    """
    kind = _kind_of(model, weights)
    chosen = _formats(formats) if output is not None else []
    points = points or PointChoice()
    if chunk is not None:
        integer("chunk", chunk, 1)
    found, source = None, Path(photos) if isinstance(photos, (str, os.PathLike)) else None
    if source is not None and is_video(source):
        if output is None:
            raise ValueError("the frames of a video are written as photos; give an output folder for them")
        asked = request_of_video(source, frames_per_second, max_frames)
    else:
        found = photos_of(photos, max_frames)
        asked = found.request
        if output is not None:
            _require_text(found)
        if isinstance(covisibility, GraphFile) and covisibility.photos is None:
            covisibility = covisibility.of(found.files)
    core = None if chunk is None else core_to_stream(covisibility)
    settings = Settings(covisibility, long_side, _device(device), backend, memory_budget, chunk, core)
    request = {
        **asked,
        "model": kind.name,
        "weights": _stated_weights(model, weights),
        "long_side": long_side,
        "graph": _stated_graph(covisibility),
        "chunk": chunk,
        "version": versions()["svggt_kernels"],
    }
    folder = None
    if output is not None:
        folder = OutputFolder(Path(output), request, force=force)
        options = {form.name: _options(form, points, chosen) for form in chosen}
        todo = [form for form in chosen if not (folder.has_run and folder.finished(form.name, options[form.name]))]
        folder.refuse_strangers([form.target for form in todo])
    if found is None:
        assert folder is not None
        with stage(f"taking frames of {source}") as tell:
            assert source is not None
            found = photos_of_video(source, asked, folder.path / IMAGES, tell)
    if folder is not None and folder.has_run:
        scene = replace(folder.load(), folder=relative_names(found.files)[0])
    else:
        loaded = load_model(model, weights, settings.device) if isinstance(model, str) else model
        scene = _run(found, loaded, settings, request, None if folder is None else folder.chunks, stage)
        if folder is not None:
            with stage("keeping the run"):
                folder.save(scene)
    if folder is not None:
        material = Material(scene, points, folder.path, tuple(form.name for form in chosen))
        folder.tell(_report(scene, material))
        for form in todo:
            with stage(f"writing {form.label}") as tell:
                folder.export(form.name, options[form.name], _counted(form, material, tell))
    return scene


def frames_of(photos: Sequence[Path], kind: RunnableModel, long_side: int | None) -> Tensor:
    """Return photos as frames for a model, `[S, 3, H, W]` in [0, 1] on the CPU.

    Args:
        photos: The files.
        kind: The model; one that has learned one size alone gets it, unless another is asked for.
        long_side: Pixels of the longer side; None for the model's usual one.
    """
    size = kind.one_size if long_side is None else None
    return load_photos(photos, long_side=long_side or kind.long_side, patch_size=kind.patch_size, size=size)


def _run(
    photos: Photos,
    model: LoadedModel,
    settings: Settings,
    request: dict[str, Any],
    chunks: Callable[[], Path] | None,
    stage: Stage,
) -> Reconstruction:
    with stage(f"reading {count(len(photos.files), 'photo')}"):
        frames = frames_of(photos.files, model.kind, settings.long_side)
    chunk, core = settings.chunk, settings.core
    how: dict[str, Any] = {"backend": settings.backend, "memory_budget": settings.memory_budget}
    with stage(f"running {model.name} on {count(len(frames), 'frame')}") as tell:
        if chunk is not None and core is not None and len(frames) > frames_at_once(core, len(frames)):
            predicted = predict_in_chunks(model, frames, core, chunk=chunk, folder=chunks, tell=tell, **how)
        else:
            predicted = predict(model, frames.to(settings.device), settings.covisibility, **how)
    folder, names = relative_names(photos.files)
    facts = {
        "model": model.name,
        "weights": model.weights,
        "warning": model.warning,
        "device": device_name(settings.device),
        **predicted.facts,
    }
    return Reconstruction(
        folder=folder,
        names=names,
        sizes=photos.sizes,
        orientations=photos.orientations,
        times=photos.times,
        poses=predicted.poses,
        intrinsics=predicted.intrinsics,
        depth=predicted.depth,
        confidence=predicted.confidence,
        colours=(255 * frames).round().byte().permute(0, 2, 3, 1).contiguous(),
        graph=predicted.graph,
        facts=facts,
        request=request,
    )


def _kind_of(model: str | LoadedModel, weights: str | Path | None) -> RunnableModel:
    """Return what is known of the model; refuse one that would run on random weights without having been told to."""
    if isinstance(model, LoadedModel):
        if weights is not None:
            raise ValueError("weights are for a model that is named; a loaded one has its own, so leave weights out")
        return model.kind
    if model not in RUNNABLE:
        raise ValueError(f"the model must be one of {', '.join(RUNNABLE)}, got {model}")
    kind = RUNNABLE[model]
    if weights is None and kind.trained is None:
        raise ValueError(
            f"{model} needs weights: a file, the Hugging Face hub's {kind.published}, or {RANDOM} to try how it runs, "
            "whose cameras and depth mean nothing"
        )
    return kind


def _formats(names: Sequence[str] | None) -> list[Format]:
    if names is None:
        return [FORMATS[name] for name in DEFAULT if FORMATS[name].is_available]
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise ValueError(f"formats must be among {', '.join(FORMATS)}, got {', '.join(unknown)}")
    for form in (FORMATS[name] for name in names):
        if not form.is_available:
            raise ImportError(
                f"writing {form.label} needs {form.needs}, which is not installed: pip install {form.install}"
            )
    return [FORMATS[name] for name in dict.fromkeys(names)]


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(next(iter(devices())) if device is None else device)


def _require_text(photos: Photos) -> None:
    for name in relative_names(photos.files)[1]:
        if printable(name) != name:
            raise ValueError(
                f"names of photos must be UTF-8, as files that name them hold text, but {printable(name)} is not; "
                "rename it"
            )


def _stated_weights(model: str | LoadedModel, weights: str | Path | None) -> Any:
    if isinstance(model, LoadedModel):
        return model.weights
    if weights is None or not Path(weights).is_file():
        return None if weights is None else str(weights)
    return stamp(Path(weights))


def _stated_graph(covisibility: Covisibility) -> Any:
    if isinstance(covisibility, str):
        covisibility = named(covisibility)
    if isinstance(covisibility, GraphFile):
        path = covisibility.path
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return {"files": [stamp(file) for file in files if not file.is_dir()], "depth_range": covisibility.depth_range}
    if isinstance(covisibility, CovisibilityGraph | CoarseGraph):
        digest = hashlib.sha256(_content(covisibility))
        return f"a given graph, {digest.hexdigest()[:16]}"
    if isinstance(covisibility, Source):
        return covisibility.label
    raise TypeError(
        "covisibility must be a word, a source or one graph, so that equal requests can be told; got "
        f"{type(covisibility).__name__}"
    )


def _content(graph: AnyGraph) -> bytes:
    """Return bytes that tell a graph from others."""
    if isinstance(graph, CovisibilityGraph):
        return b"".join(array.tobytes() for array in as_arrays(graph).values())
    seen_coarsely = f"{graph.frames.tolist()} at stride {graph.stride}"
    return _content(graph.full) + _content(graph.coarse) + seen_coarsely.encode()


def _options(form: Format, points: PointChoice, chosen: Sequence[Format]) -> dict[str, Any]:
    """Return what an export depends on beside the run."""
    if form.name == "nerfstudio":
        return {"names": [other.name for other in chosen if other.name in ("depth", "ply")]}
    return asdict(points) if form.has_points else {}


def _counted(form: Format, material: Material, tell: Tell) -> Iterator[Files]:
    """Yield what a format writes, and tell now and then how far it is."""
    photos, started = len(material.scene.names), time.monotonic()
    told = started
    for done, files in enumerate(form.write(material), 1):
        yield files
        now = time.monotonic()
        if done > 1 and now - told > TELL_SECONDS:
            told = now
            tell(f"{done} of {photos}, about {(now - started) / done * (photos - done):.0f} s left")


def _report(scene: Reconstruction, material: Material) -> dict[str, Any]:
    width, height = scene.frame_size
    photos = [
        {
            "name": name,
            "size": list(size),
            "orientation": orientation,
            "crop": crop._asdict(),
            "lost": crop.lost(size),
        }
        for name, size, orientation, crop in zip(scene.names, scene.sizes, scene.orientations, scene.crops, strict=True)
    ]
    return {
        "versions": versions(),
        "request": scene.request,
        "facts": scene.facts,
        "conventions": CONVENTIONS,
        "folder": str(scene.folder),
        "frame": {"width": width, "height": height},
        "depth_step": material.depth_step,
        "photos": photos,
    }
