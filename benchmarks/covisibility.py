"""Covisibility: how fast it is found, and how many true pairs each source finds at the same density.

    python -m benchmarks.covisibility graph --frames 10000 100000 --device cuda
    python -m benchmarks.covisibility describe --images 1000 --dtype bf16 --device cuda
    python -m benchmarks.covisibility sources --photos DIR --truth CSV --truth-above 30

Each prints one JSON object a line. Weights are random unless `--megaloc FILE` names MegaLoc's: time does not depend on
them, and `sources` leaves MegaLoc out without.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from svggt_kernels import CovisibilityGraph, MegaLoc, TokenSimilarity, patch
from svggt_kernels.cli.models import load_model
from svggt_kernels.cli.options import thumbnails
from svggt_kernels.cli.truth import read_pairs
from svggt_kernels.covisibility.colmap import shared_features
from svggt_kernels.covisibility.poses import frustum_overlap
from svggt_kernels.photos import find_photos, load_photos

from .record import Line, provenance
from .timing import synchronize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHANNELS = 8448
DENSITIES = (0.1, 0.2, 0.3, 0.4)
PROVENANCE = ("device", "torch", "triton", "commit", "command", "run", "date")
KEYS = {
    "graph": ("case", "frames", "channels", "edges", "neighbours", "seconds", "peak_gib", *PROVENANCE),
    "describe": ("case", "images", "size", "dtype", "batch_size", "seconds", "peak_gib", *PROVENANCE),
    "source": ("case", "photos", "true_pairs", "source", "recall", *PROVENANCE),
}
"""What each line holds, by case."""
GIB = 2**30


def time_graph(options: argparse.Namespace) -> list[Line]:
    """Time the default recipe on clustered descriptors of MegaLoc's size."""
    lines = []
    for frames in options.frames:
        descriptors = clustered(frames, torch.device(options.device))
        seconds, graph = timed(lambda given=descriptors: CovisibilityGraph.from_descriptors(given), options.device)
        sizes = {"frames": frames, "channels": CHANNELS, "edges": graph.num_edges, "neighbours": 10}
        lines.append({"case": "graph", **sizes, "seconds": seconds, "peak_gib": peak_gib(options.device)})
    return lines


def time_describe(options: argparse.Namespace) -> list[Line]:
    """Time descriptors of decoded images, which are on the device already, as bytes."""
    model = MegaLoc.from_pretrained(options.megaloc) if options.megaloc else MegaLoc.random_init()
    model.to(options.device, DTYPES[options.dtype])
    shape = (options.images, 3, options.size, options.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=options.device)

    def describe(given: Tensor = images) -> Tensor:
        return model.describe(given, size=options.size, batch_size=options.batch_size)

    describe(images[: options.batch_size])
    seconds, _ = timed(describe, options.device)
    sizes = {"images": options.images, "size": options.size, "dtype": options.dtype, "batch_size": options.batch_size}
    return [{"case": "describe", **sizes, "seconds": seconds, "peak_gib": peak_gib(options.device)}]


def compare_sources(options: argparse.Namespace) -> list[Line]:
    """Rank all pairs by each source, and count the true ones among the best."""
    photos = find_photos(options.photos)
    pairs = read_pairs(options.truth, photos, above=options.truth_above)
    truth = torch.zeros(len(photos), len(photos), dtype=torch.bool)
    truth[pairs[:, 0], pairs[:, 1]] = True
    return [
        {
            "case": "source",
            "photos": len(photos),
            "true_pairs": int(truth.sum()) // 2,
            "source": name,
            "recall": {str(density): recall_at(scores, truth, density) for density in DENSITIES},
        }
        for name, scores in rankings(options, photos).items()
    ]


def rankings(options: argparse.Namespace, photos: Sequence[Path]) -> dict[str, Tensor]:
    """Return the scores `[S, S]` of every source that can be had, higher for likelier pairs."""
    frames = load_photos(photos, long_side=378)
    place = torch.arange(len(photos))
    found = {
        "sequential": -(place[:, None] - place).abs().double(),
        "thumbnails": cosines(thumbnails(frames)),
        "tokens (DA3 small, random weights)": cosines(tokens(frames)),
    }
    if options.megaloc:
        model = MegaLoc.from_pretrained(options.megaloc).to(options.device)
        found["megaloc"] = cosines(model.describe(frames).cpu())
    if options.poses:
        found["poses"] = overlap(options.poses)
    if options.colmap:
        found["COLMAP (SIFT, verified)"] = verified_matches(photos).double()
    return found


def recall_at(scores: Tensor, truth: Tensor, density: float) -> float:
    """Return the share of true pairs among the best pairs; of equal scores, those of the earlier frames."""
    first, second = torch.triu_indices(*truth.shape, offset=1)
    either = torch.maximum(scores, scores.T)[first, second]
    best = either.argsort(descending=True, stable=True)[: round(density * len(first))]
    true = truth[first, second]
    return float(true[best].sum() / true.sum())


def cosines(descriptors: Tensor) -> Tensor:
    """Return the cosine of each two descriptors, `[S, S]` float64."""
    unit = torch.nn.functional.normalize(descriptors.double(), dim=1)
    return unit @ unit.T


def tokens(frames: Tensor) -> Tensor:
    """Return the descriptors that `TokenSimilarity` ranks by, `[S, C]`."""
    seen: list[Tensor] = []

    class Watched(TokenSimilarity):
        def from_descriptors(self, descriptors: Tensor, reference_frame: int | None) -> CovisibilityGraph:
            seen.append(descriptors)
            return super().from_descriptors(descriptors, reference_frame)

    model = load_model("da3-small", None, torch.device("cpu"))
    with patch(model.module, covisibility=Watched()):
        model(frames)
    return seen[0]


def overlap(file: Path) -> Tensor:
    """Return the overlap of frusta from an archive with `poses` [S, 4, 4], `intrinsics` and `depths` [S, H, W]."""
    held = np.load(file)
    depths = torch.from_numpy(held["depths"])
    near, far = depths[depths > 0].quantile(torch.tensor([0.02, 0.98])).tolist()
    poses, intrinsics = (torch.from_numpy(held[name]) for name in ("poses", "intrinsics"))
    return frustum_overlap(poses, intrinsics, (near, far), tuple(depths.shape[1:])).double()


def verified_matches(photos: Sequence[Path]) -> Tensor:
    """Run COLMAP's SIFT, exhaustive matching and verification; return inliers, `[S, S]`."""
    import pycolmap

    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "database.db"
        pycolmap.extract_features(database, photos[0].parent, image_names=[photo.name for photo in photos])
        pycolmap.match_exhaustive(database)
        return shared_features(database, photos)


def clustered(frames: int, device: torch.device) -> Tensor:
    """Return unit descriptors of places with ten frames each, `[S, 8448]` float32, made in parts."""
    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn(max(1, frames // 10), CHANNELS, generator=generator, device=device)
    descriptors = torch.empty(frames, CHANNELS, device=device)
    for start in range(0, frames, 4096):
        part = descriptors[start : start + 4096]
        part.normal_(generator=generator)
        part += centres[torch.arange(start, start + len(part), device=device) % len(centres)]
        part /= part.norm(dim=1, keepdim=True)
    return descriptors


def timed(call, device: str):  # type: ignore[no-untyped-def]
    """Return the seconds that one call takes, and what it returns."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    synchronize(torch.device(device))
    start = time.perf_counter()
    result = call()
    synchronize(torch.device(device))
    return time.perf_counter() - start, result


def peak_gib(device: str) -> float:
    """Return the most memory held so far: of the allocator on CUDA, of the process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    """Run one benchmark and print its lines."""
    parser = argparse.ArgumentParser(description="Time covisibility, and compare its sources.")
    commands = parser.add_subparsers(required=True)
    graph = commands.add_parser("graph", help="time from_descriptors")
    graph.add_argument("--frames", type=int, nargs="+", default=[10000])
    graph.set_defaults(run=time_graph)
    describe = commands.add_parser("describe", help="time MegaLoc.describe")
    describe.add_argument("--images", type=int, default=1000)
    describe.add_argument("--size", type=int, default=322)
    describe.add_argument("--batch-size", type=int, default=32)
    describe.add_argument("--dtype", choices=DTYPES, default="fp32")
    describe.set_defaults(run=time_describe)
    sources = commands.add_parser("sources", help="recall of true pairs at equal density")
    sources.add_argument("--photos", type=Path, required=True)
    sources.add_argument("--truth", type=Path, required=True, help="as svggt-kernels layout takes it")
    sources.add_argument("--truth-above", type=float, default=0.0)
    sources.add_argument("--poses", type=Path, help="an .npz with poses, intrinsics and depths")
    sources.add_argument("--colmap", action="store_true", help="run COLMAP on the photos (needs pycolmap)")
    sources.set_defaults(run=compare_sources)
    for command in (graph, describe, sources):
        command.add_argument("--device", default="cpu")
        command.add_argument("--megaloc", type=Path, help="MegaLoc's weights")
    options = parser.parse_args()
    origin = provenance(sys.argv[1:], torch.device(options.device))
    origin["command"] = origin["command"].replace("benchmarks", "benchmarks.covisibility", 1)
    for line in options.run(options):
        print(json.dumps({**line, **origin}), flush=True)


if __name__ == "__main__":
    main()
