"""The output folder: what is in it and whose it is, so that nothing finished is computed twice or lost.

`reconstruction.npz` is the run, put in place once it is finished, and holds what was asked for. `reconstruction.json`
says the same in words for people, and which exports are finished; an export that is not is written again. Until a run
in chunks is finished, `chunks` holds what it asks for and the chunks that are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..io.writing import replacing, write_all
from .formats import FORMATS, Files
from .scene import RUN, Reconstruction

LONGEST = 100  # of two values that a message quotes
REPORT = "reconstruction.json"
CHUNKS, REQUEST, CHUNK = "chunks", "request.json", "frames-*.npz"
UNCHANGED = "; give --force (force=True) to replace it, or name another output folder"


class OutputFolder:
    """A folder that holds one reconstruction.

    Args:
        path: The folder; made when something is written.
        request: What is asked for: equal requests have equal results.
        force: Whether what was written for another request may be replaced.

    Raises:
        FileExistsError: It holds another reconstruction, finished or interrupted, or is no folder.
        ValueError: Its reconstruction cannot be read.
    """

    def __init__(self, path: Path, request: Mapping[str, Any], *, force: bool) -> None:
        self.path, self.force = path, force
        self._request = json.loads(json.dumps(request))
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"the output must be a folder, but {path} is a file; name another one")
        held = None
        if (path / RUN).exists():
            try:
                held = Reconstruction.request_of(path / RUN)
            except ValueError as error:
                if not force:
                    raise ValueError(f"{error}{UNCHANGED}") from error
        self.has_run = held == self._request
        if held is not None and not self.has_run and not force:
            raise FileExistsError(f"{path} holds a reconstruction of {_differences(held, self._request)}{UNCHANGED}")
        begun = self._begun()
        if begun and begun != self._request and not self.has_run and not force:
            raise FileExistsError(f"{path} holds an interrupted run of {_differences(begun, self._request)}{UNCHANGED}")
        self._report = _read(path / REPORT)
        self._exports = _sound(self._report.get("exports"))

    def load(self) -> Reconstruction:
        """Return the finished run."""
        scene = Reconstruction.load(self.path / RUN)
        if self._begun() == self._request:
            self._remove_chunks()
        return scene

    def chunks(self) -> Path:
        """Return the folder for the chunks of this run, where those that are finished are; others are taken away.

        Raises:
            FileExistsError: It holds what no reconstruction wrote.
            OSError: It cannot be made.
        """
        folder = self.path / CHUNKS
        if self._begun() != self._request:
            if not (folder / REQUEST).is_file():
                self.refuse_strangers([CHUNKS])
            self._remove_chunks()
            write_all(folder, {REQUEST: json.dumps(self._request).encode()})
        return folder

    def save(self, scene: Reconstruction) -> None:
        """Put a run in place, and take away its chunks and what was exported of another."""
        with replacing([self.path / RUN]) as [part]:
            scene.save(part)
            for name in list(self._exports):
                self._remove(name)
        if (self.path / CHUNKS / REQUEST).is_file():
            self._remove_chunks()
        self.has_run = True

    def finished(self, name: str, options: Mapping[str, Any]) -> bool:
        """Whether an export with these options is there.

        Raises:
            FileExistsError: It is there with other options, which may not be replaced.
        """
        export = self._exports.get(name)
        if export is None or not export["finished"]:
            return False
        if export["options"] != json.loads(json.dumps(options)):
            if not self.force:
                raise FileExistsError(
                    f"{self.path} holds {name} of {_differences(export['options'], dict(options))}{UNCHANGED}"
                )
            return False
        return all((self.path / file).is_file() for file in export["files"])

    def refuse_strangers(self, names: Iterable[str]) -> None:
        """Refuse to write over files that no reconstruction of this folder wrote.

        Args:
            names: Files or folders below this one that would be written to.

        Raises:
            FileExistsError: One is there.
        """
        own = {file.split("/")[0] for export in self._exports.values() for file in export["files"]}
        for name in names:
            if (self.path / name).exists() and name not in own and not self.force:
                raise FileExistsError(f"{self.path / name} is there and was not written by this{UNCHANGED}")

    def export(self, name: str, options: Mapping[str, Any], groups: Iterable[Files]) -> list[str]:
        """Write an export, file after file, and note that it is finished; return the names of its files.

        Raises:
            OSError: A file cannot be written; those written before stay.
        """
        files: list[str] = []
        before = self._exports.pop(name, {"files": []})["files"]
        self._exports[name] = {"options": dict(options), "finished": False, "files": before}
        for group in groups:
            # Told before it is written, so that the folder knows every file as its own.
            new = [file for file in group if file.split("/")[0] not in {known.split("/")[0] for known in files}]
            files += group
            self._exports[name]["files"] = sorted({*before, *files})
            if new:
                self.tell({})
            write_all(self.path, group)
        for file in set(before) - set(files):
            with suppress(OSError):
                (self.path / file).unlink()
        self._exports[name] = {"options": dict(options), "finished": True, "files": files}
        self.tell({})
        return files

    def tell(self, facts: Mapping[str, Any]) -> None:
        """Write `reconstruction.json`, with further facts.

        Raises:
            OSError: It cannot be written.
        """
        self._report = {**self._report, **facts, "exports": self._exports}
        write_all(self.path, {REPORT: (json.dumps(self._report, indent=1) + "\n").encode()})

    def _begun(self) -> dict[str, Any]:
        """Return the request of the chunks that are there; empty if there is none."""
        folder = self.path / CHUNKS
        return _read(folder / REQUEST) if any(folder.glob(CHUNK)) else {}

    def _remove_chunks(self) -> None:
        folder = self.path / CHUNKS
        with suppress(OSError):
            for file in [*folder.glob(CHUNK), folder / REQUEST]:
                file.unlink(missing_ok=True)
            folder.rmdir()

    def _remove(self, name: str) -> None:
        for file in self._exports.pop(name)["files"]:
            with suppress(OSError):
                (self.path / file).unlink()


def _sound(exports: Any) -> dict[str, Any]:
    """Return what a report says of exports, as far as it can have been written here: files are removed by it."""
    sound = {}
    for name, export in exports.items() if isinstance(exports, dict) else ():
        with suppress(KeyError, TypeError, AttributeError):
            parts = [PurePosixPath(file).parts for file in export["files"]]
            own = name in FORMATS and all(file[0] == FORMATS[name].target and ".." not in file for file in parts)
            if own and isinstance(export["options"], dict) and isinstance(export["finished"], bool):
                sound[name] = export
    return sound


def _read(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Say in what two requests differ, shortly."""
    names = [name for name in {**held, **asked} if held.get(name) != asked.get(name)]
    return "; ".join(f"another {name}" + _values(held.get(name), asked.get(name)) for name in names)


def _values(held: Any, asked: Any) -> str:
    texts = [json.dumps(value) for value in (held, asked)]
    return f" ({texts[0]}, now {texts[1]})" if max(map(len, texts)) <= LONGEST else ""
