"""A scene in a file: its core's frames and settings, and if wanted the keys and values, to add photos another day."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..io.tensor_files import read_tensors
from ..patching.chunks.attention import Kept
from ..patching.chunks.layouts import ClosedFrames
from ..patching.chunks.session import Outputs, Session
from .identity import as_tensor, as_text, of_model

if TYPE_CHECKING:
    from .scene import OpenScene

VERSION = 1
SETTINGS, BYTES, FLOATS = "settings", "core frames, bytes", "core frames"
OUTPUT, KEYS, VALUES, PATCHES = "output/", "keys/", "values/", "patches/"


def save_scene(scene: OpenScene, path: Path, keys: bool) -> None:
    """Write a scene to a file; see `OpenScene.save`."""
    session, frames = scene.session, scene.core_frames.cpu()
    settings = {
        "version": VERSION,
        "record": session.record.name,
        "model": of_model(session.model),
        "autocast": [session.autocast[0], str(session.autocast[1]).removeprefix("torch.")],
        "core": [*scene.core, *scene.coarse],
        "coarse": scene.closed.coarse,
        "stride": scene.closed.stride,
        "chunk": scene.chunk,
        "frame_size": scene.frame_size,
        "keys": keys,
    }
    tensors = {SETTINGS: as_tensor(json.dumps(settings))}
    in_bytes = (frames * 255).round().to(torch.uint8)
    if torch.equal((in_bytes.float() / 255).to(frames.dtype), frames):
        tensors[BYTES] = in_bytes
    else:
        tensors[FLOATS] = frames
    if keys:
        tensors |= {OUTPUT + name: tensor for name, tensor in scene.core_outputs.items()}
        for (name, call), kept in session.attention.kept.items():
            for kind, each in (("", kept), (PATCHES, kept.patches)):
                if each is not None:
                    tensors[f"{kind}{KEYS}{call}/{name}"] = each.keys.transpose(1, 2).cpu()
                    tensors[f"{kind}{VALUES}{call}/{name}"] = each.values.transpose(1, 2).cpu()
    beside = path.with_name(f".{path.name}.part")
    try:
        torch.save(tensors, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class SavedScene:
    """What a file that `save_scene` wrote holds.

    Args:
        path: The file.

    Raises:
        ValueError: If it is damaged, or another kind of file.
        FileNotFoundError: If there is none.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"a saved scene is needed, but {path} is no file")
        self.path = path
        try:
            self._tensors = read_tensors(path)
            self.settings: dict[str, Any] = json.loads(as_text(self._tensors[SETTINGS]))
            self.frames = self._tensors[BYTES].float() / 255 if BYTES in self._tensors else self._tensors[FLOATS]
            version = self.settings["version"]
        except (KeyError, ValueError, TypeError, ImportError) as error:  # of safetensors, for another kind of file
            raise ValueError(
                f"{path} holds no scene: it must be a file that OpenScene.save wrote, and is damaged or something else"
            ) from error
        if version != VERSION:
            raise ValueError(f"{path} holds a scene of version {version}, and version {VERSION} is read here")

    @property
    def closed(self) -> ClosedFrames:
        """How many of the frames are seen how."""
        coarse = self.settings.get("coarse", 0)
        return ClosedFrames(len(self.frames) - coarse, coarse, self.settings.get("stride", 1))

    def require(self, session: Session) -> None:
        """Take over the dtype of a scene.

        Raises:
            ValueError: If the model is another one.
        """
        name, expected = session.record.name, self.settings["record"]
        if name != expected or of_model(session.model) != self.settings["model"]:
            raise ValueError(
                f"{self.path} is a scene of another model than this one ({name}): the model must be a {expected} with "
                "the same weights in the same dtype; open the scene anew with this model"
            )
        enabled, dtype = self.settings["autocast"]
        session.autocast = enabled, getattr(torch, dtype)

    def restore(self, session: Session) -> Outputs | None:
        """Give a session the keys and values that were kept, and return the core's outputs; None if there are none."""
        if not self.settings["keys"]:
            return None
        session.attention.closed = self.closed
        for name in self._tensors:
            if name.startswith(KEYS):
                call, _, module = name.removeprefix(KEYS).partition("/")
                kept = self._kept(f"{call}/{module}", session.device)
                if PATCHES + name in self._tensors:
                    kept.patches = self._kept(f"{call}/{module}", session.device, PATCHES)
                session.attention.kept[module, int(call)] = kept
        return {name.removeprefix(OUTPUT): tensor for name, tensor in self._tensors.items() if name.startswith(OUTPUT)}

    def _kept(self, name: str, device: torch.device, kind: str = "") -> Kept:
        keys, values = (self._tensors[kind + which + name].to(device).transpose(1, 2) for which in (KEYS, VALUES))
        return Kept(keys, values)
