"""`open_scene(model, images)` and `open_saved_scene(model, path)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from ..graph import AnyGraph, ClosedCore, CoarseGraph, CovisibilityGraph, closed_core
from ..graph.arguments import integer
from ..graph.core import checked_core
from ..inference.memory import MemoryBudget
from ..io.pixels import require_unit_range
from ..patching.chunks.layouts import ClosedFrames
from ..patching.chunks.session import CHUNK, Outputs, Session
from ..sources import Core, PatchSimilarity, Scene, TokenSimilarity
from ..sources.core import SIMILARITIES, By
from ..sources.similarity import Similarity
from .apart import described, likeness_of
from .frames import BUFFERED, Frames, Images, buffered, open_frames
from .progress import Progress
from .saved import SavedScene
from .scene import OpenScene

CORES = (
    f"a Core, one of the words {', '.join(map(repr, SIMILARITIES))}, a similarity, a number of frames, the indices of "
    "frames, or the graph of a closed core"
)
"""What a core may be given as, in words."""


def open_scene(
    model: nn.Module,
    images: Images,
    *,
    core: Core | By | Similarity | PatchSimilarity | AnyGraph | Sequence[int] | int | None = None,
    chunk: int | None = None,
    memory_budget: MemoryBudget = None,
    long_side: int | None = None,
    feed: Callable[[Tensor], Any] | None = None,
    read: Callable[[Any], Outputs] | None = None,
    fused: bool | None = None,
    backend: str | None = None,
    tell: Callable[[str], object] | None = None,
) -> OpenScene:
    """Run a model on the core of a scene and keep what further frames need of it: their keys and values in each layer.

    Memory follows the core and the chunk, not the number of frames. What is computed is one forward of all frames with
    a closed core, in which everything that looks across frames follows the core (docs/many-photos.md). Inference only;
    the dtype is that of autocast where it is on at this call, else the model's.

        with torch.autocast("cuda", torch.bfloat16):
            scene = svggt_kernels.open_scene(model, "photos/")
        predictions = scene.predict()
        more = scene.add("photos-of-tomorrow/")

    Args:
        model: A model that a record knows, or any module that holds one, in eval mode.
        images: Frames `[S, 3, H, W]` in [0, 1]; a photo, a list of them, or their folder; a video; or an iterable of
            frames. All but tensors are read as they go. An iterator is read once: the core is chosen among its first
            256 frames, which are held in memory.
        core: A `Core`, which chooses its frames by descriptors of all; with `coarse` all frames also see so many more
            at a stride of their patches, and of their keys and values those are kept. No frame is described where no
            more than it holds are given, as a tensor or photos. A word or a similarity stands for `Core(by=it)`, a
            number for `Core(number)`. Or the graph of a closed core over the frames, `CovisibilityGraph.core` or
            `CoarseGraph.core`, whose first frame in the order of the images is the reference frame; or the indices of
            the core's frames, the reference frame first. None for `Core()`, as in `patch`.
        chunk: Frames that run together; 32 by default, or as many as `memory_budget` allows.
        memory_budget: GiB that a run may allocate on the device in all, or "auto", as in `patch`: the core's and each
            chunk's. Needs CUDA and a model of VGGT's shape; elsewhere give `chunk`.
        long_side: Pixels of the longer side to which photos and videos are brought; None as the model takes them.
        feed: Turns frames `[S, 3, H, W]` into the argument of the model's forward; None as its record says, else
            `[1, S, 3, H, W]`.
        read: Reads what the model returns into named tensors `[S, ...]`; None for all tensors `[1, S, ...]` of a
            mapping.
        fused: As in `patch`.
        backend: As in `patch`.
        tell: Is told in a line how far a long run is, after each chunk; None shows it on stderr where that is a
            terminal.

    Raises:
        ValueError: If the model is not known, patched, or in training mode; if it does something across frames that
            does not follow a core, which is tried out: frames of the core run again as a chunk; or an argument has no
            meaning.
        TypeError: If an argument is of another type.
        FileNotFoundError: If there is no such file, or MegaLoc's weights cannot be had where frames are described.
        ImportError: If a package is missing.
    """
    chosen_by = as_core(core)
    if isinstance(chosen_by, Core) and (chosen_by.nearest or chosen_by.coarse == "all"):
        raise ValueError(
            "a scene keeps the keys of frames that all see, so give a Core without `nearest`, whose `coarse` is a "
            f'number and not "all", got nearest={chosen_by.nearest}, coarse={chosen_by.coarse!r}'
        )
    if chunk is not None:
        chunk = integer("chunk", chunk, 1)
    session = Session(
        model, feed=feed, read=_of_any_count(read), fused=fused, backend=backend, memory_budget=memory_budget
    )
    frame_size = session.frame_size(long_side)
    frames = open_frames(images, frame_size)
    if isinstance(core, CovisibilityGraph | CoarseGraph) and frames.count not in (core.num_frames, None):
        raise ValueError(f"core must be a graph over the {frames.count} frames of the scene, got {core!r}")
    if isinstance(chosen_by, Core):
        chosen_by = _ready(chosen_by, frames.count)
    among = frames
    if not frames.again:
        among, frames = buffered(frames, BUFFERED)
    indices, coarse, likeness = chosen_core(chosen_by, among, session, tell)
    core_frames = among.pick([*indices, *coarse])
    require_unit_range(core_frames, "frames of the core")
    return OpenScene(
        session,
        frames,
        [*indices, *coarse],
        core_frames,
        closed=ClosedFrames(len(indices), len(coarse), chosen_by.stride),
        chunk=chunk,
        frame_size=frame_size,
        similarity=chosen_by.similarity if isinstance(chosen_by, Core) else None,
        likeness=likeness,
        tell=tell,
    )


def open_saved_scene(
    model: nn.Module,
    path: str | Path,
    *,
    chunk: int | None = None,
    feed: Callable[[Tensor], Any] | None = None,
    read: Callable[[Any], Outputs] | None = None,
    fused: bool | None = None,
    backend: str | None = None,
) -> OpenScene:
    """Open a scene that `OpenScene.save` wrote, to add frames to it; the core runs again unless its keys are there.

    The dtype is that of the scene when it was saved. Frames are told to be apart by their confidence alone, and
    `predict` gives the core's.

    Args:
        model: The model, with the weights that it had.
        path: The file.
        chunk: Frames that run together; None for as many as before.
        feed: As in `open_scene`, and likewise the others.
        read: Likewise.
        fused: Likewise.
        backend: Likewise.

    Raises:
        ValueError: If the model is another one, or the file is damaged or something else; and as `open_scene` does.
        FileNotFoundError: If there is no such file.
    """
    saved = SavedScene(Path(path))
    session = Session(model, feed=feed, read=_of_any_count(read), fused=fused, backend=backend)
    saved.require(session)
    frame_size = saved.settings["frame_size"]
    return OpenScene(
        session,
        open_frames(saved.frames, frame_size),
        range(len(saved.frames)),
        saved.frames,
        chunk=saved.settings["chunk"] if chunk is None else integer("chunk", chunk, 1),
        closed=saved.closed,
        frame_size=frame_size,
        core_outputs=saved.restore(session),
    )


def as_core(core: object) -> Core | ClosedCore:
    """Return what chooses a core, or its frames, from what `open_scene` takes.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is another word, a graph that is not that of a closed core, or frames that are no core.
    """
    if core is None:
        return Core()
    if isinstance(core, Core):
        return core
    if isinstance(core, Similarity | PatchSimilarity):
        return Core(by=core)
    if isinstance(core, str):
        if core in SIMILARITIES:
            return Core(by=core)
        raise ValueError(f"core must be {CORES}, got {core!r}")
    if _is_index(core):
        return Core(int(core))
    if isinstance(core, CovisibilityGraph | CoarseGraph):
        if (closed := closed_core(core)) is None:
            raise ValueError(
                "core must be a graph in which every frame sees a closed core and itself, and nothing besides, as "
                f"CovisibilityGraph.core makes it without nearest, got {core!r}, which says otherwise; give such a "
                "graph, a Core, or the indices of the core's frames"
            )
        return closed
    given = type(core).__name__
    if isinstance(core, Tensor | np.ndarray):
        given = f"{given} of {core.dtype}, shape {tuple(core.shape)}"
        core = core.tolist()
    elif isinstance(core, Sequence):
        given = f"{given} of {', '.join(sorted({type(frame).__name__ for frame in core}))}"
    if isinstance(core, Sequence) and all(map(_is_index, core)):
        frames = [int(frame) for frame in core]
        if not frames:
            raise ValueError("the core must hold at least 2 frames, got none")
        if min(frames) < 0:
            raise ValueError(f"the frames of a core are counted from 0, got {min(frames)}")
        return ClosedCore(checked_core(max(frames) + 1, frames), torch.empty(0, dtype=torch.int64), 1)
    raise TypeError(f"core must be {CORES}, got {given}")


def _is_index(value: object) -> TypeGuard[int | np.integer]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def chosen_core(
    core: Core | ClosedCore, frames: Frames, session: Session, tell: Callable[[str], object] | None = None
) -> tuple[list[int], list[int], float | None]:
    """Return the frames of a core, the reference frame first, and those that are seen at a stride.

    Also the least likeness to all of these of the frames that were described; None if there are no others.

    Args:
        core: How it is chosen, or its frames.
        frames: Among which it is; they are read once if they must be described or counted.
        session: Describes frames by the model's tokens.
        tell: As in `open_scene`.
    """
    if not isinstance(core, Core):
        return core.core.tolist(), core.coarse.tolist(), None
    similarity, count, parts = core.similarity, frames.count, []
    if similarity is None and count is not None:
        return *_rising(core.spread(count, None)), None
    reader = similarity if isinstance(similarity, TokenSimilarity | PatchSimilarity) else None
    if reader is None and similarity is not None and similarity.needs == "tokens":
        raise ValueError(f'a scene reads tokens for Core(by="tokens") and "patches" alone, got {similarity.by}')
    with Progress("descriptors", count, tell) as progress:
        count, first = 0, torch.empty(0)
        for part in frames.chunks(CHUNK, None if similarity is None else session.device):
            reference, first = (first, first) if count else (part[:0], part[:1].clone())
            made = described(similarity, part) if reader is None else session.describe(reference, part, reader.read)
            parts.append(None if made is None else made.to("cpu"))
            count += len(part)
            progress.add(len(part))
    if similarity is None:
        return *_rising(core.spread(count, None)), None
    compared = torch.cat([part for part in parts if part is not None]).to(session.device)
    if reader is None:
        chosen = core.chosen(compared, 0)
        places = torch.cat(chosen)
        if len(places) == len(compared):
            return *_rising(chosen), None
        return *_rising(chosen), float(likeness_of(compared, compared[places]).min())
    scores = reader.compared(Scene(len(compared), tokens=compared))
    return *_rising(core.chosen(scores, 0)), None


def _ready(core: Core, num_frames: int | None) -> Core:
    """Return the same core, with weights that describe frames; without a similarity if it holds so many frames."""
    return replace(core, by=None) if num_frames is not None and num_frames <= core.size else core.opened()


def _of_any_count(read: Callable[[Any], Outputs] | None) -> Callable[[Any, int], Outputs] | None:
    """Return what reads a result as `read` does, and is told how many frames it is of."""
    return None if read is None else lambda result, frames: read(result)


def _rising(chosen: tuple[Tensor, Tensor]) -> tuple[list[int], list[int]]:
    """Return frames that were chosen in the order of the images; frame 0 is the first of the core."""
    core, coarse = (sorted(frames.tolist()) for frames in chosen)
    return core, coarse
