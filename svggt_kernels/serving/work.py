"""What tools do, without the protocol: each piece of work takes what was asked and returns a small answer."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..graph import CovisibilityGraph, united
from ..io.hub import is_repository
from ..io.photos import find_photos, load_photos
from ..io.video import load_video
from ..io.writing import write_all
from ..layout import BlockLayout
from ..measure.compare import Comparison, Stage, compare, run_sparse
from ..measure.machine import devices, versions
from ..measure.sweep import sweep
from ..models import RUNNABLE
from ..models.loading import HEAD_SIZE, RANDOM, LoadedModel, load_model, running_dtype
from ..packages import optional
from ..patching import patch
from ..reconstruction import PointChoice, Reconstruction, frames_of, reconstruct
from ..reconstruction.diagnosis import diagnose
from ..reconstruction.folder import CHUNKS, REPORT
from ..reconstruction.formats import DEFAULT, FORMATS
from ..reconstruction.photos import IMAGES, is_video, photos_of_video, request_of_video
from ..reconstruction.pictures import near_is_bright, smaller
from ..reconstruction.scene import RUN
from ..sources import GraphFile, MegaLoc, PatchSimilarity, Scene, Similarity, Source, graph_bytes, hloc_pairs
from ..sources.named import named_similarity, named_source
from .answers import Compared, Export, Frames, Info, Layout, LayoutOutcome, Reconstructed, Run, Sparse, Swept
from .folders import Folders

MOST_PICTURES, PICTURE_SIDE = 16, 320
LONG_SIDE, PATCH_SIZE, SPECIAL_TOKENS = 518, 14, 5
GRAPHS = ("graph.npz", "pairs.txt")


class Workshop:
    """Does what is asked with the files of some folders; a model is loaded once.

    Args:
        folders: What may be read and written.
    """

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self._models: dict[tuple[str, str | None, str], LoadedModel] = {}

    def info(self) -> Info:
        """Return what is here."""
        return Info(
            versions=versions(),
            devices=devices(),
            folders=[str(folder) for folder in self.folders.allowed],
            models={name: kind.published or "in the package" for name, kind in RUNNABLE.items()},
            formats={name: form.is_available for name, form in FORMATS.items()},
        )

    def layout(self, photos: str, sparse: Sparse, run: Run | None, output: str | None, stage: Stage) -> Layout:
        """Return who sees whom; write the graph if an output is given."""
        source = self._source(photos, sparse)
        folder = None if output is None else self.folders.output(output, GRAPHS)
        if run is None and source.needs == "tokens":
            raise ValueError("patches and tokens are those of a model; say which runs, or compare by thumbnails")
        frames, names, kind = self._frames(photos, run)
        if run is not None:
            model = self._model(run)
            with stage(f"running {model.name}"), patch(model.module, covisibility=source) as handle:
                model(frames.to(self._device(run)))
                layout, graph = handle.layout.to("cpu"), united(handle.graph.to("cpu"))
        else:
            with stage(source.label):
                graph = united(source.graph(Scene(len(frames), images=frames, reference_frame=0)).to("cpu"))
            tokens = (frames.shape[-2] // kind) * (frames.shape[-1] // kind) + SPECIAL_TOKENS
            layout = BlockLayout.from_graph(graph, tokens, special_tokens=SPECIAL_TOKENS)
        return Layout(
            frames=len(frames),
            density=graph.density,
            token_density=layout.density,
            ideal_speedup=1 / layout.density,
            sees=source.label,
            warnings=list(graph.summary().warnings),
            files=[] if folder is None else _write_graph(folder, graph, names),
        )

    def reconstruct(
        self, photos: str, output: str, run: Run, sparse: Sparse, export: Export, chunk: int | None, stage: Stage
    ) -> Reconstructed:
        """Reconstruct photos, and say what was written."""
        self._require(run)
        pictures = self.folders.pictures(photos)
        targets = [form.target for form in FORMATS.values()]
        folder = self.folders.output(output, [*targets, RUN, REPORT, IMAGES, CHUNKS])
        scene = reconstruct(
            pictures,
            self._model(run),
            output=folder,
            formats=export.formats,
            covisibility=self._source(photos, sparse),
            points=PointChoice(export.max_points, export.least_confident / 100),
            max_frames=run.max_frames,
            frames_per_second=run.frames_per_second,
            long_side=run.long_side,
            device=self._device(run),
            backend=run.backend,
            chunk=chunk,
            force=export.force,
            stage=stage,
        )
        wanted = [FORMATS[name] for name in export.formats or DEFAULT]
        return Reconstructed(
            output=str(folder),
            files={form.name: str(folder / form.target) for form in wanted if form.is_available},
            not_installed={form.name: f"pip install {form.install}" for form in wanted if not form.is_available},
            photos=len(scene.names),
            frame_width=scene.frame_size[0],
            frame_height=scene.frame_size[1],
            cropped_at_most=max(crop.lost(size) for crop, size in zip(scene.crops, scene.sizes, strict=True)),
            notes=[*scene.facts["warnings"], *diagnose(scene).notes],
            **{name: scene.facts[name] for name in ("seconds", "token_density", "backend", "weights", "warning")},
        )

    def compare(self, photos: str, run: Run, sparse: Sparse, dense: bool, repeats: int, stage: Stage) -> Compared:
        """Run a model dense and sparse, or sparse alone."""
        self._require(run)
        source, (frames, _, _), model = self._source(photos, sparse), self._frames(photos, run), self._model(run)
        found, _ = (compare if dense else run_sparse)(
            model,
            frames.to(self._device(run)),
            source,
            described=source.label,
            backend=run.backend,
            repeats=repeats,
            stage=stage,
        )
        both = found if isinstance(found, Comparison) else None
        return Compared(
            frames=found.frames,
            sees=found.covisibility,
            token_density=found.token_density,
            backend=found.backend,
            sparse_ms=found.sparse.median_ms,
            dense_ms=None if both is None else both.dense.median_ms,
            speedup=None if both is None else both.speedup,
            ideal_speedup=found.ideal_speedup,
            relative_l2={name: far.relative_l2 for name, far in both.deviations.items()} if both else {},
            cameras_turn_degrees=both.rotation_degrees if both else {},
            weights=found.weights,
            warning=found.warning,
        )

    def sweep(self, photos: str, run: Run, layouts: Sequence[str] | None, by: str, rounds: int, stage: Stage) -> Swept:
        """Run a model dense and with several layouts, and say which to take."""
        self._require(run)
        (frames, _, _), model = self._frames(photos, run), self._model(run)

        def similarity() -> Similarity | PatchSimilarity:
            return named_similarity(by, megaloc=lambda: self._megaloc)

        swept = sweep(
            model,
            frames.to(self._device(run)),
            layouts,
            similarity,
            backend=run.backend,
            rounds=rounds,
            stage=stage,
        )
        outcomes = [
            LayoutOutcome(
                layout=outcome.layout.name,
                sees=outcome.layout.sees,
                ms=outcome.cost.min_ms,
                peak_mib=outcome.cost.peak_mib,
                pairs=outcome.pairs,
                scores={name: score for name, score in outcome.scores.items() if math.isfinite(score)},
            )
            for outcome in swept.outcomes
        ]
        return Swept(
            frames=swept.frames,
            outcomes=outcomes,
            recommended=None if swept.recommended is None else swept.recommended.layout.name,
            advice=swept.advice,
            weights=model.weights,
            warning=model.warning,
        )

    def frames(self, video: str, output: str, frames_per_second: float, most: int | None) -> Frames:
        """Write frames of a video as photos into a folder."""
        file, folder = self.folders.inside(video), self.folders.output(output)
        if not is_video(file):
            raise ValueError(f"{video} must be a video, and is a photo or no file")
        taken = photos_of_video(file, request_of_video(file, frames_per_second, most), folder)
        assert taken.times is not None
        return Frames(
            folder=str(folder),
            frames=len(taken.files),
            first=taken.files[0].name,
            last=taken.files[-1].name,
            seconds=[taken.times[0], taken.times[-1]],
        )

    def thumbnails(self, photos: str, most: int) -> list[tuple[str, bytes]]:
        """Return small pictures of photos, evenly among them, as name and PNG."""
        folder = self.folders.pictures(photos)
        files = find_photos(folder)
        chosen = [files[place] for place in _evenly(len(files), most)]
        pictures = (load_photos([file], long_side=PICTURE_SIDE, patch_size=1)[0] for file in chosen)
        return [
            (file.name, _png((255 * picture).round().byte().permute(1, 2, 0).numpy()))
            for file, picture in zip(chosen, pictures, strict=True)
        ]

    def depth_pictures(self, output: str, photos: Sequence[str] | None, most: int) -> list[tuple[str, bytes]]:
        """Return the depth of photos of a reconstruction as pictures in which near is bright, as name and PNG."""
        scene = Reconstruction.load(self.folders.inside(f"{output}/{RUN}"))
        unknown = sorted(set(photos or ()) - set(scene.names))
        if unknown:
            raise ValueError(f"{output} holds no photo {unknown[0]!r}; it holds {', '.join(scene.names[:5])}, ...")
        places = [scene.names.index(name) for name in photos] if photos else _evenly(len(scene.names), most)
        return [
            (scene.names[place], _png(smaller(near_is_bright(scene.depth[place]), PICTURE_SIDE)))
            for place in places[:MOST_PICTURES]
        ]

    def _frames(self, photos: str, run: Run | None) -> tuple[Tensor, list[str] | None, int]:
        """Return frames, the names of photos, none of a video, and pixels of a patch."""
        path, kind = self.folders.pictures(photos), None if run is None else RUNNABLE[run.model]
        long_side = (run.long_side if run else None) or (kind.long_side if kind else LONG_SIDE)
        patch_size, most = kind.patch_size if kind else PATCH_SIZE, run.max_frames if run else None
        if is_video(path):
            rate = {} if run is None else {"frames_per_second": run.frames_per_second}
            frames, _ = load_video(path, max_frames=most, long_side=long_side, patch_size=patch_size, **rate)
            return frames, None, patch_size
        files = find_photos(path)[:most]
        if kind is not None and run is not None:
            return frames_of(files, kind, run.long_side), [file.name for file in files], patch_size
        frames = load_photos(files, long_side=long_side, patch_size=patch_size)
        return frames, [file.name for file in files], patch_size

    def _source(self, photos: str, sparse: Sparse) -> Source:
        others = {name: value for name, value in sparse if name != "graph" and value is not None}
        if sparse.graph is not None:
            if others:
                raise ValueError(f"graph and {next(iter(others))} both say what each photo sees; give one of them")
            path = self.folders.pictures(photos)
            files = None if is_video(path) else find_photos(path)
            return GraphFile(self.folders.whole(sparse.graph)).of(files)
        word = others.pop("covisibility", "core")
        return named_source(word, **others, megaloc=lambda: self._megaloc)

    def _require(self, run: Run) -> None:
        """Refuse before any work what cannot run: no such device or backend, or weights that were not named."""
        device = self._device(run)
        if run.backend is not None:
            name = backends.load(run.backend).NAME
            reason = backends.reasons(device, running_dtype(device), HEAD_SIZE)[name]
            if reason is not None:
                raise ValueError(f"backend {name} cannot run here: {reason}; leave it out")
        kind = RUNNABLE[run.model]
        if run.weights is None and kind.trained is None:
            raise ValueError(
                f"{run.model} needs weights: a file in the folders, the Hugging Face hub's {kind.published}, or random "
                "to try how it runs, whose results mean nothing"
            )

    def _model(self, run: Run) -> LoadedModel:
        weights, device = run.weights, self._device(run)
        if weights is not None and weights != RANDOM:
            is_here = (self.folders.allowed[0] / weights).exists()
            weights = str(self.folders.inside(weights)) if is_here or not is_repository(weights) else weights
        key = run.model, weights, str(device)
        if key not in self._models:
            self._models.clear()  # one at a time: they are large
            self._models[key] = load_model(run.model, weights, device)
        return self._models[key]

    def _device(self, run: Run) -> torch.device:
        known = devices()
        if run.device is not None and run.device not in (*known, "cuda"):
            raise ValueError(f"device must be one of {', '.join(known)} on this machine, got {run.device}")
        return torch.device(run.device or next(iter(known)))

    @cached_property
    def _megaloc(self) -> MegaLoc:
        return MegaLoc.from_pretrained()


def _write_graph(folder: Path, graph: CovisibilityGraph, names: Sequence[str] | None) -> list[str]:
    npz, pairs = GRAPHS
    files = {npz: graph_bytes(graph, names)}
    if names is not None:
        files[pairs] = hloc_pairs(graph, names).encode(errors="surrogateescape")
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise FileExistsError(f"{folder} holds {', '.join(there)} already; name another output folder")
    write_all(folder, files)
    return [str(folder / name) for name in files]


def _evenly(count: int, most: int) -> list[int]:
    return torch.linspace(0, count - 1, min(count, most, MOST_PICTURES)).round().int().tolist()


def _png(pixels: Any) -> bytes:
    pillow, file = optional("PIL.Image", "pictures", "Pillow", "'svggt-kernels[viz]'"), io.BytesIO()
    pillow.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
