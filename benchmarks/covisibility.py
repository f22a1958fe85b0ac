"""Covisibility: how fast it is found, and how many true pairs each source finds at the same density.

    python -m benchmarks.covisibility graph --frames 10000 100000 --device cuda
    python -m benchmarks.covisibility describe --images 1000 --dtype bf16 --device cuda
    python -m benchmarks.covisibility decode --photos DIR
    python -m benchmarks.covisibility sources --photos DIR --truth CSV --truth-above 30

Lines of JSON are printed, and appended to `--output`. What fails its check gets no time. Weights are random unless
`--megaloc FILE` names MegaLoc's: time does not depend on them, and `sources` leaves MegaLoc out without. `graph` and
`describe` need no more than PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svggt_kernels import CovisibilityGraph, MegaLoc, TokenSimilarity, patch
from svggt_kernels.io.photos import find_photos, load_photos
from svggt_kernels.measure.cost import PeakMemory, timed
from svggt_kernels.measure.truth import read_pairs
from svggt_kernels.models.loading import load_model
from svggt_kernels.sources.colmap import shared_features
from svggt_kernels.sources.megaloc.network import SIZE
from svggt_kernels.sources.poses import frustum_overlap
from svggt_kernels.sources.thumbnails import thumbnails

from .record import RESULTS, Line, provenance, write

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHANNELS = 8448
NEIGHBOURS = 10
FRAMES_PER_PLACE = 30  # more than there are neighbours: each place is a part of its own, and all must be bridged
SCORES_TELL_APART = 1e-6
ROUNDING = 1e-5  # error of a descriptor that is always granted
DENSITIES = (0.1, 0.2, 0.3, 0.4)
PROVENANCE = ("device", "torch", "triton", "commit", "command", "run", "date")
KEYS = {
    "graph": ("case", "frames", "channels", "edges", "bridges", "seconds", "peak_gib", "check", *PROVENANCE),
    "describe": ("case", "images", "size", "dtype", "batch_size", "seconds", "peak_gib", "check", *PROVENANCE),
    "decode": ("case", "photos", "height", "width", "seconds", *PROVENANCE),
    "source": ("case", "photos", "true_pairs", "source", "recall", *PROVENANCE),
}
"""What each line holds, by case."""
GIB = 2**30


def time_graph(options: argparse.Namespace) -> Iterator[Line]:
    """Time the default recipe on descriptors of MegaLoc's size, of places that must be bridged."""
    device = torch.device(options.device)
    CovisibilityGraph.from_descriptors(clustered(2 * FRAMES_PER_PLACE, device))
    for frames in options.frames:
        descriptors = clustered(frames, device)
        cost, graph = costing(lambda given=descriptors: CovisibilityGraph.from_descriptors(given), device)
        bridges = 0 if graph.origin is None else len(graph.origin.bridges)
        sizes = {"frames": frames, "channels": CHANNELS, "edges": graph.num_edges, "bridges": bridges}
        yield checked({"case": "graph", **sizes, **cost}, fault_of_graph(graph, descriptors))


def fault_of_graph(graph: CovisibilityGraph, descriptors: Tensor) -> str | None:
    """Say what is wrong with a graph; None if it is connected and some frames see all that are most similar to them.

    Similarity is computed again in float64, plainly, for 64 frames evenly spread.
    """
    if not graph.is_connected():
        return "the graph is not connected"
    frames = torch.linspace(0, len(descriptors) - 1, min(64, len(descriptors)), device=descriptors.device).long()
    unit = torch.nn.functional.normalize(descriptors[frames].double(), dim=1)
    parts = (torch.nn.functional.normalize(part.double(), dim=1) for part in descriptors.split(1024))
    scores = torch.cat([unit @ part.T for part in parts], dim=1)
    scores.scatter_(1, frames[:, None], -torch.inf)
    count = min(NEIGHBOURS, len(descriptors) - 1)
    least = scores.topk(count + 1, dim=1).values[:, count:] + SCORES_TELL_APART
    sampled, nearest = (scores > least).nonzero(as_tuple=True)
    edges = graph.rows.long() * len(descriptors) + graph.indices
    seen = torch.isin(frames[sampled] * len(descriptors) + nearest, edges)
    return None if bool(seen.all()) else f"{int((~seen).sum())} of {len(seen)} nearest neighbours are not seen"


def time_describe(options: argparse.Namespace) -> Iterator[Line]:
    """Time descriptors of decoded images, which lie in the host's memory, as bytes."""
    device = torch.device(options.device)
    model = MegaLoc.from_pretrained(options.megaloc) if options.megaloc else MegaLoc.random_init()
    model.to(device, DTYPES[options.dtype])
    generator = torch.Generator().manual_seed(0)
    shape = (options.images, 3, options.size, options.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def describe(given: Tensor = images) -> Tensor:
        return model.describe(given, size=options.size, batch_size=options.batch_size)

    describe(images[: options.batch_size])
    cost, described = costing(describe, device)
    sizes = {"images": options.images, "size": options.size, "dtype": options.dtype, "batch_size": options.batch_size}
    sample = torch.linspace(0, len(images) - 1, min(8, len(images))).long()
    yield checked({"case": "describe", **sizes, **cost}, fault_of_descriptors(model, images[sample], described[sample]))


def fault_of_descriptors(model: MegaLoc, images: Tensor, described: Tensor) -> str | None:
    """Say what is wrong with descriptors; None if they are as near to those in float32 as a plain computation's.

    Plain is one image at a time, with attention written out, in the model's dtype; twice its error is granted. Each
    descriptor must be nearer to its own image's than to any other.
    """
    size = images.shape[-1]
    exact = copy.deepcopy(model).float().describe(images, size=size, batch_size=1)
    with sdpa_kernel(SDPBackend.MATH):
        plain = model.describe(images, size=size, batch_size=1)
    error, granted = ((found - exact).norm(dim=1).max().item() for found in (described, plain))
    if not error <= max(2 * granted, ROUNDING):
        return f"descriptors are off by {error:.2g}, those of a plain computation by {granted:.2g}"
    apart = (described[:, None] - exact).norm(dim=2)
    if not torch.equal(apart.argmin(dim=1).cpu(), torch.arange(len(images))):
        return "a descriptor is nearer to that of another image"
    return None


def checked(line: Line, fault: str | None) -> Line:
    """Return the line with what its check found; without a time if that is a fault."""
    if fault is None:
        return {**line, "check": "passed"}
    return {**line, "seconds": None, "check": "failed", "reason": fault}


def time_decode(options: argparse.Namespace) -> Iterator[Line]:
    """Time reading photos into frames of MegaLoc's size, by as many threads as `load_photos` takes."""
    photos = find_photos(options.photos)
    cost, frames = costing(lambda: load_photos(photos, long_side=SIZE), torch.device("cpu"))
    height, width = frames.shape[-2:]
    yield {"case": "decode", "photos": len(photos), "height": height, "width": width, "seconds": cost["seconds"]}


def compare_sources(options: argparse.Namespace) -> Iterator[Line]:
    """Rank all pairs by each source, and count the true ones among the best."""
    photos = find_photos(options.photos)
    pairs = read_pairs(options.truth, photos, above=options.truth_above)
    truth = torch.zeros(len(photos), len(photos), dtype=torch.bool)
    truth[pairs[:, 0], pairs[:, 1]] = True
    for name, scores in rankings(options, photos).items():
        yield {
            "case": "source",
            "photos": len(photos),
            "true_pairs": int(truth.sum()) // 2,
            "source": name,
            "recall": {str(density): recall_at(scores, truth, density) for density in DENSITIES},
        }


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
    """Return unit descriptors of places with 30 frames each, `[S, 8448]` float32, made in parts."""
    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn(max(1, frames // FRAMES_PER_PLACE), CHANNELS, generator=generator, device=device)
    descriptors = torch.empty(frames, CHANNELS, device=device)
    for start in range(0, frames, 4096):
        part = descriptors[start : start + 4096]
        part.normal_(generator=generator)
        part += centres[torch.arange(start, start + len(part), device=device) % len(centres)]
        part /= part.norm(dim=1, keepdim=True)
    return descriptors


def costing(call: Callable[[], Any], device: torch.device) -> tuple[Line, Any]:
    """Return the seconds and the peak of memory of one call, what was held before included, and what it returns."""
    memory = PeakMemory(device)
    result, elapsed_ms = timed(call, device)
    peak_mib = memory.highest_mib
    return {"seconds": elapsed_ms / 1000, "peak_gib": None if peak_mib is None else peak_mib / 1024}, result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; return 0, 1 if a check failed, or 2 for a wrong request."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda needs a CUDA device, and PyTorch sees none here", file=sys.stderr)
        return 2
    origin = provenance(arguments, device)
    origin["command"] = origin["command"].replace("benchmarks", "benchmarks.covisibility", 1)
    failed = False
    for line in options.run(options):
        failed |= line.get("check") == "failed"
        write({**line, **origin}, options.output or RESULTS / f"covisibility-{device.type}.jsonl")
        print(json.dumps({**line, **origin}), flush=True)
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time covisibility, and compare its sources.")
    commands = parser.add_subparsers(required=True)
    graph = commands.add_parser("graph", help="time from_descriptors")
    graph.add_argument("--frames", type=int, nargs="+", default=[10000])
    graph.set_defaults(run=time_graph)
    describe = commands.add_parser("describe", help="time MegaLoc.describe")
    describe.add_argument("--images", type=int, default=1000)
    describe.add_argument("--size", type=int, default=SIZE)
    describe.add_argument("--batch-size", type=int, default=32)
    describe.add_argument("--dtype", choices=DTYPES, default="fp32")
    describe.set_defaults(run=time_describe)
    decode = commands.add_parser("decode", help="time load_photos")
    decode.set_defaults(run=time_decode)
    sources = commands.add_parser("sources", help="recall of true pairs at equal density")
    sources.add_argument("--truth", type=Path, required=True, help="as svggt-kernels layout takes it")
    sources.add_argument("--truth-above", type=float, default=0.0)
    sources.add_argument("--poses", type=Path, help="an .npz with poses, intrinsics and depths")
    sources.add_argument("--colmap", action="store_true", help="run COLMAP on the photos (needs pycolmap)")
    sources.set_defaults(run=compare_sources)
    for command in (decode, sources):
        command.add_argument("--photos", type=Path, required=True)
    for command in (describe, sources):
        command.add_argument("--megaloc", type=Path, help="MegaLoc's weights")
    for command in (graph, describe, decode, sources):
        command.add_argument("--device", default="cpu")
        command.add_argument("--output", type=Path, help="default: benchmarks/results/covisibility-<device>.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
