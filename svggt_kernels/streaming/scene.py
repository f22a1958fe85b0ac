"""A scene that is open: any number of its photos in chunks, and more later."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..layout import on_device
from ..patching.chunks.layouts import ClosedFrames
from ..patching.chunks.session import CHUNK, Outputs, Session
from ..sources import PatchSimilarity
from ..sources.similarity import Similarity
from ..user_warnings import warn
from .apart import Yardstick, described, more_than_by_chance
from .frames import Frames, Images, open_frames
from .identity import of_frames, of_model, same_frames
from .outputs import OutputFolder, frames_of
from .progress import Progress
from .saved import save_scene
from .transfers import Downloads, Item, finished


class OpenScene:
    """A scene whose core has run: further frames run in chunks, in the same coordinates, now or later.

    `open_scene` makes it. Frames outside the core see the core and themselves, so what a frame gets does not depend on
    which frames run with it. The model must stay as it is while the scene is open; between calls nothing is put on it.

    Outputs are tensors `[n, ...]` in host memory by the names that the model gives them, without the axis of samples,
    and "apart", bool `[n]`: whether a frame may share nothing with the core (see `apart`). Such frames are placed all
    the same, and warned of.

    Attributes:
        core: The frames of the core among the images that the scene was opened with; the first sets the axes.
        coarse: The frames among these that all see at a stride.
        core_outputs: Outputs of the frames of the core and behind them of those that are seen at a stride.
        core_frames: These frames, `[K, 3, H, W]`.
        closed: How many of them are seen how.
        chunk: Frames of a chunk.
        frame_size: Pixels of the longer side of photos and videos, and of a patch.
    """

    def __init__(
        self,
        session: Session,
        frames: Frames,
        core: Sequence[int],
        core_frames: Tensor,
        *,
        closed: ClosedFrames,
        chunk: int | None,
        frame_size: tuple[int, int],
        similarity: Similarity | PatchSimilarity | None = None,
        likeness: float | None = None,
        core_outputs: Outputs | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self.session, self.closed = session, closed
        # Stand-ins refer to the session in a circle, which the garbage collector would only find some time.
        weakref.finalize(self, session.attention.kept.clear).atexit = False
        self.core, self.coarse = tuple(core[: closed.full]), tuple(core[closed.full :])
        self.core_frames, self.similarity = core_frames, similarity
        self._frames, self.frame_size, self._tell = frames, frame_size, tell
        on_device = core_frames.to(session.device)
        self._reference = on_device[:1].clone()
        outputs = session.run_core(on_device, closed) if core_outputs is None else core_outputs
        self.yardstick = Yardstick.of(outputs, described(similarity, on_device), likeness)
        self.core_outputs: Outputs = {name: tensor.to("cpu") for name, tensor in outputs.items()}
        self.core_outputs["apart"] = torch.zeros(closed.count, dtype=torch.bool)
        self.chunk = chunk or session.frames_of_chunk(core_frames) or CHUNK

    @property
    def core_gib(self) -> float:
        """Memory of the kept keys and values of the core, GiB: about 2 L K P C values of the dtype that attends."""
        return self.session.attention.kept_bytes / 2**30

    @property
    def backend(self) -> str | None:
        """The backend that runs the global attention; None before it has run."""
        return self.session.attention.chosen_backend

    def add(self, images: Images) -> Outputs:
        """Return the outputs of further frames, in their order.

        Args:
            images: Frames, as `open_scene` takes them, of the height and width of the core's.

        Raises:
            ValueError: If they are of another size, or there is none.
        """
        return _joined(list(self.stream(images)))

    def predict(self) -> Outputs:
        """Return the outputs of all images that the scene was opened with, in their order, the core's among them.

        Raises:
            ValueError: If these came from an iterator, and have been read.
        """
        return _joined(list(self.stream()))

    def stream(self, images: Images | None = None) -> Iterator[Outputs]:
        """Yield what `add` returns, or without images what `predict` returns, one chunk after another as they come."""
        frames = self._frames if images is None else self._open(images)
        yield from self._run(frames, images is not None, lambda part, start: None, lambda outputs, part, start: outputs)

    def write(
        self, folder: str | Path, images: Images | None = None, *, names: Collection[str] | None = None
    ) -> list[Path]:
        """Write the outputs of all images that the scene was opened with, or of further ones, a file for each chunk.

        Files are written as chunks are finished. What was finished is not lost where this is interrupted, and is not
        run again when it is called again: the frames are read again, and compared with those of the file.

        Args:
            folder: Where to, for these images alone; made if it is not there.
            images: Further frames, as `add` takes them.
            names: The outputs that are written; None for all.

        Returns:
            The files in the order of the frames, for `svggt_kernels.read_outputs`.

        Raises:
            ValueError: If the folder holds outputs of another scene or other frames, or there is no such output; and as
                `add` does.
            OSError: If a file cannot be written.
        """
        if isinstance(names, str):
            raise TypeError(f"names must be a collection of outputs, got {names!r}; write [{names!r}]")
        if names is not None:
            names, known = set(names), ", ".join(self.core_outputs)
            if not names:
                raise ValueError(f"names must hold at least one of the outputs {known}, got none; None is for all")
            if unknown := sorted(names - set(self.core_outputs)):
                raise ValueError(f"the outputs are {known}; there is no {', '.join(unknown)}")
        kind = ",".join(sorted(names)) if names is not None else "all"
        target = OutputFolder(Path(folder), f"{self.identity()} chunk {self.chunk} outputs {kind}", self.chunk)
        frames = self._frames if images is None else self._open(images)
        if frames.count is not None:
            target.require(frames.count)

        def done(part: Tensor, start: int) -> Future[Path] | None:
            path = target.written(part, start)
            return None if path is None else finished(path)

        def then(outputs: Outputs, part: Tensor, start: int) -> Path:
            chosen = {name: tensor for name, tensor in outputs.items() if names is None or name in names}
            return target.write(chosen, of_frames(part), start)

        written = list(self._run(frames, images is not None, done, then, names))
        target.require(frames_of(written[-1])[1])
        return written

    def save(self, path: str | Path, *, keys: bool = False) -> None:
        """Write the scene to a file, from which `open_saved_scene` opens it again: another day, on another machine.

        The file holds the frames of the core, settings, and what tells the model's weights from others.

        Args:
            path: The file; replaced if it is there.
            keys: Whether it holds the core's keys and values too (`core_gib`), so that the core need not run again.
        """
        save_scene(self, Path(path), keys)

    def extended(self, images: Images) -> OpenScene:
        """Return a new scene, whose core is this one's and further frames; this one stays as it is.

        All outputs of this scene are stale beside those of the new one: its larger core gives every frame other ones,
        in other coordinates. Predict the frames again.

        Args:
            images: The frames to add to the core, as `add` takes them.
        """
        further = [part.to(self.core_frames) for part in map(self._require_size, self._open(images).chunks(CHUNK))]
        core, coarse = self.core_frames.split([self.closed.full, self.closed.coarse])
        frames = torch.cat([core, *further, coarse])
        known = open_frames(frames, self.frame_size)
        return OpenScene(
            self.session.again(),
            known,
            range(len(frames)),
            frames,
            closed=replace(self.closed, full=len(frames) - len(coarse)),
            chunk=self.chunk,
            frame_size=self.frame_size,
            similarity=self.similarity,
            tell=self._tell,
        )

    def identity(self) -> str:
        """Return what tells this scene from others: its model and weights, the dtype, and the frames of its core."""
        session = self.session
        core = of_frames(self.core_frames)
        if self.closed.coarse:
            core += f" of which {self.closed.coarse} at stride {self.closed.stride}"
        return f"{session.record.name} {of_model(session.model)} {session.dtype} core {core}"

    def _run(
        self,
        frames: Frames,
        given: bool,
        done: Callable[[Tensor, int], Future[Item] | None],
        then: Callable[[Outputs, Tensor, int], Item],
        names: Collection[str] | None = None,
    ) -> Iterator[Item]:
        """Run chunk after chunk, and copy the outputs of each to the host while the next one runs.

        Args:
            frames: The frames.
            given: Whether they are further ones; else those that the scene was opened with.
            done: Is asked of each chunk, and of where it begins; returns what is yielded if it was done before.
            then: Turns outputs in host memory into what is yielded, in a thread; is given the frames and the place of
                the first one, too.
            names: The outputs that are copied, and "apart"; None for all.
        """
        if not given and not frames.again:
            self._frames = Frames(_read_already, None)
        start = 0
        apart: list[int] = []

        def complete(outputs: Outputs, part: Tensor, first: int) -> Item:
            whole = self._as_in_core(outputs, part) if given else self._with_core(outputs, len(part), first)
            apart.append(int(whole["apart"].sum()))
            return then(whole, part, first)

        coming: list[tuple[Future[Item], int, bool]] = []
        device = self.session.device
        with Progress("outputs", frames.count, self._tell) as progress, Downloads(device, complete) as downloads:

            def arrived() -> Item:
                future, count, skipped = coming.pop(0)
                result = future.result()
                progress.add(count, skipped)
                return result

            for part in frames.chunks(self.chunk, device):
                self._require_size(part)
                future = done(part, start)
                skipped = future is not None
                if future is None:
                    outputs = self._begin(part, None if given else start)
                    if names is not None:
                        outputs = {name: outputs[name] for name in outputs if name in (*names, "apart")}
                    future = downloads.begin(outputs, part, start)
                coming.append((future, len(part), skipped))
                start += len(part)
                if len(coming) > 1:
                    yield arrived()
            while coming:
                yield arrived()
        if not start:
            raise ValueError("at least one image is needed, none was given")
        self._warn(sum(apart), start)

    def _open(self, images: Images) -> Frames:
        height, width = self.core_frames.shape[-2:]
        return open_frames(images, self.frame_size, size=(width, height))

    def _require_size(self, part: Tensor) -> Tensor:
        """Return frames; raise unless they are of the size of the core's."""
        height, width = self.core_frames.shape[-2:]
        if part.shape[-2:] != (height, width):
            raise ValueError(
                f"frames must be {height} x {width} pixels as those of the core, got "
                f"{' x '.join(map(str, part.shape[-2:]))}; resize or crop them"
            )
        return part

    def _begin(self, part: Tensor, start: int | None) -> Outputs:
        """Begin to run the frames of a chunk that are not of the core, and return their outputs on the device."""
        known = self._known(len(part), start)
        others = [index for index in range(len(part)) if index not in known]
        if not others:
            return {}
        further = part[on_device(np.array(others), part.device)] if known else part
        outputs = self.session.run_chunk(self._reference, further)
        return outputs | {"apart": self.yardstick.apart(outputs, described(self.similarity, further))}

    def _with_core(self, outputs: Outputs, count: int, start: int | None) -> Outputs:
        """Return the outputs of a chunk of so many frames, those of the core among them, in host memory."""
        known = self._known(count, start)
        if not known:
            return outputs
        order = torch.tensor([*(index for index in range(count) if index not in known), *known]).argsort()
        rows = {name: tensor[list(known.values())] for name, tensor in self.core_outputs.items()}
        return {name: tensor[order] for name, tensor in _joined([outputs, rows] if outputs else [rows]).items()}

    def _as_in_core(self, outputs: Outputs, part: Tensor) -> Outputs:
        """Return the outputs of further frames in host memory, of frames of the core that come again the core's."""
        same = same_frames(part, self.core_frames)
        if not same:
            return outputs
        again, places = list(same), list(same.values())
        whole = {name: tensor.clone() for name, tensor in outputs.items()}
        for name, tensor in whole.items():
            tensor[again] = self.core_outputs[name][places]
        return whole

    def _known(self, count: int, start: int | None) -> dict[int, int]:
        """Return the places in the core of frames of a chunk that belong to it, by their places in the chunk.

        Args:
            count: Frames of the chunk.
            start: The place of its first one among the images that the scene was opened with; None for others.
        """
        if start is None:
            return {}
        closed = enumerate((*self.core, *self.coarse))
        return {frame - start: place for place, frame in closed if start <= frame < start + count}

    def _warn(self, apart: int, frames: int) -> None:
        """Warn of frames that are apart where there are more than by chance."""
        if more_than_by_chance(apart, frames, self.closed.count):
            warn(
                f'{apart} of {frames} frames may share nothing with the core (outputs["apart"] says which): what is '
                "said of them cannot be trusted; open a scene whose core shows that place too",
            )

    def __repr__(self) -> str:
        return (
            f"OpenScene({self.session.record.name}, core of {len(self.core)} frames"
            + (f" and {len(self.coarse)} at stride {self.closed.stride}" if self.coarse else "")
            + f" in {self.core_gib:.2f} GiB, "
            f"chunks of {self.chunk})"
        )


def _joined(parts: list[Outputs]) -> Outputs:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _read_already(size: int) -> Iterator[Tensor]:
    raise ValueError("the images of this scene came from an iterator, which has been read; give them again to add()")
