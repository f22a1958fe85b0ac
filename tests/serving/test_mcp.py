"""A session of the SDK's own client with the MCP server, over stdio, over HTTP and in memory."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mcp", reason="mcp is not installed")

import anyio
import walks
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from svggt_kernels.cli import main
from svggt_kernels.serving.server import build_server

ROOT = Path(__file__).parent.parent.parent
RUN = {"model": "toy", "device": "cpu"}
SPARSE = {"covisibility": "sequential", "core": 3}
TOOLS = {
    "info",
    "layout",
    "reconstruct",
    "compare",
    "sweep",
    "job_status",
    "job_result",
    "video_frames",
    "thumbnails",
    "depth_pictures",
}

Told = list[tuple[float, str | None]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder `shared`, which a server may use, with six photos; and one beside it, which it may not."""
    walks.walk(tmp_path / "shared/walk")
    walks.walk(tmp_path / "private/walk")
    return tmp_path / "shared"


def session(server: Any, use: Callable[[Client], Awaitable[None]]) -> None:
    async def talk() -> None:
        async with Client(server, read_timeout_seconds=120) as client:
            await use(client)

    anyio.run(talk)


def in_memory(folder: Path, use: Callable[[Client], Awaitable[None]]) -> None:
    session(build_server([folder]), use)


async def answer(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """The structured result of a tool that must do what it is told."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert result.structured_content is not None
    return result.structured_content


async def refusal(client: Client, tool: str, **arguments: Any) -> str:
    """What a tool says that must refuse."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    assert result.structured_content is None
    [content] = result.content
    return content.text


async def whole_session(client: Client) -> None:
    """List tools, lay out, reconstruct with progress, read the result, look at it; leave the folder in vain."""
    assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS
    assert "no tracks of points" in (client.instructions or "")
    [shared] = (await answer(client, "info"))["folders"]
    laid = await answer(client, "layout", photos="walk/images", sparse=SPARSE)
    assert (laid["frames"], laid["sees"]) == (6, "a core of 3 frames at equal distances")
    assert laid["density"] == pytest.approx(21 / 36)
    told: Told = []

    async def tell(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, message))

    arguments = {"photos": "walk/images", "output": "out", "run": RUN, "sparse": SPARSE, "export": {"formats": ["tum"]}}
    result = await client.call_tool("reconstruct", arguments, progress_callback=tell)
    assert not result.is_error, result.content
    made = result.structured_content
    assert made["job"]["state"] == "done"
    assert made["result"]["files"] == {"tum": f"{shared}/out/trajectory.txt"}
    assert made["result"]["photos"] == 6
    assert "trained on rendered rooms" in made["result"]["warning"]
    assert [number for number, _ in told] == sorted(number for number, _ in told)
    assert "running toy on 6 frames" in [message for _, message in told]
    assert len(Path(made["result"]["files"]["tum"]).read_text().splitlines()) == 7
    again = await answer(client, "job_result", job=made["job"]["job"])
    assert again["reconstructed"] == made["result"]
    shown = await client.call_tool("depth_pictures", {"output": "out", "photos": ["000002.png"]})
    name, picture = shown.content
    assert name.text == "000002.png"
    assert np.array(Image.open(io.BytesIO(base64.b64decode(picture.data)))).shape == (112, 154, 3)
    for path in ("../private/walk/images", f"{shared}/../private/walk/images", "/etc"):
        said = await refusal(client, "layout", photos=path, sparse=SPARSE)
        assert "must lie in one of the folders that this server was started with" in said


def test_over_stdio(folder: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["-m", "svggt_kernels", "mcp", str(folder)]
    session(StdioServerParameters(command=sys.executable, args=words, env=environment), whole_session)


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """A server over HTTP, as a process."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "svggt_kernels", "mcp", str(folder), "--http", "--port", str(port)]
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as server:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/mcp"
        server.terminate()


def test_over_http(address: str):
    session(address, whole_session)


def test_long_work_is_started_asked_about_and_fetched(folder: Path):
    async def use(client: Client) -> None:
        started = await answer(client, "compare", photos="walk/images", run=RUN, sparse=SPARSE, repeats=1, wait=False)
        number = started["job"]["job"]
        assert started["result"] is None
        assert started["job"]["state"] in ("waiting", "running")
        # A second piece of work waits for the first.
        second = await answer(
            client, "compare", photos="walk/images", run=RUN, sparse=SPARSE, dense=False, repeats=1, wait=False
        )
        done = await answer(client, "job_result", job=number, wait=True)
        compared = done["compared"]
        assert compared["frames"] == 6
        assert compared["speedup"] == pytest.approx(compared["dense_ms"] / compared["sparse_ms"])
        assert set(compared["relative_l2"]) == {"depth", "depth_conf", "pose_enc"}
        alone = await answer(client, "job_result", job=second["job"]["job"], wait=True)
        assert alone["compared"]["dense_ms"] is None
        status = await answer(client, "job_status", job=number)
        assert (status["state"], status["error"]) == ("done", None)
        assert "there is no job 'job-9'; there are job-1, job-2" in await refusal(client, "job_status", job="job-9")

    in_memory(folder, use)


def test_a_sweep_says_which_layout_to_take(folder: Path):
    async def use(client: Client) -> None:
        made = await answer(
            client, "sweep", photos="walk/images", run=RUN, layouts=["core-3", "core-3-evenly"], by="tokens", repeats=1
        )
        swept = made["result"]
        assert [outcome["layout"] for outcome in swept["outcomes"]] == ["dense", "core-3", "core-3-evenly"]
        assert swept["advice"]

    in_memory(folder, use)


def test_a_model_is_loaded_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from svggt_kernels.serving import work

    loaded = []
    load = work.load_model
    monkeypatch.setattr(work, "load_model", lambda *what: loaded.append(what) or load(*what))

    async def use(client: Client) -> None:
        for output in ("one", "two"):
            export = {"formats": ["tum"]}
            await answer(
                client, "reconstruct", photos="walk/images", output=output, run=RUN, sparse=SPARSE, export=export
            )

    in_memory(folder, use)
    assert len(loaded) == 1


def test_photos_run_in_chunks(folder: Path):
    async def use(client: Client) -> None:
        asked = {"photos": "walk/images", "output": "out", "run": RUN, "sparse": SPARSE, "export": {"formats": ["tum"]}}
        made = await answer(client, "reconstruct", **asked, chunk=2)
        assert made["result"]["photos"] == 6
        assert json.loads((folder / "out/reconstruction.json").read_text())["facts"]["chunk"] == 2
        assert "another chunk (2, now null)" in await refusal(client, "reconstruct", **asked)

    in_memory(folder, use)


def test_a_graph_is_written_and_read(folder: Path):
    async def use(client: Client) -> None:
        laid = await answer(client, "layout", photos="walk/images", sparse=SPARSE, output="graph")
        assert [Path(file).name for file in laid["files"]] == ["graph.npz", "pairs.txt"]
        again = await answer(client, "layout", photos="walk/images", sparse={"graph": "graph/graph.npz"})
        assert again["density"] == laid["density"]
        said = await refusal(client, "layout", photos="walk/images", sparse={"graph": "graph/graph.npz", "core": 2})
        assert "graph and core both say what each photo sees" in said
        said = await refusal(client, "layout", photos="walk/images", sparse=SPARSE, output="graph")
        assert "holds graph.npz, pairs.txt already" in said

    in_memory(folder, use)


def test_photos_are_shown(folder: Path):
    async def use(client: Client) -> None:
        shown = await client.call_tool("thumbnails", {"photos": "walk/images", "most": 2})
        first, picture, last, _ = shown.content
        assert (first.text, last.text) == ("000000.png", "000005.png")
        assert picture.mime_type == "image/png"

    in_memory(folder, use)


def test_frames_of_a_video(folder: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from svggt_kernels.reconstruction import photos

    (folder / "walk.mp4").touch()
    clip = [(0.5 * place, torch.rand(3, 28, 42)) for place in range(3)]
    monkeypatch.setattr(photos, "kept_pictures", lambda video, **options: iter(clip))

    async def use(client: Client) -> None:
        taken = await answer(client, "video_frames", video="walk.mp4", output="frames")
        assert (taken["frames"], taken["last"], taken["seconds"]) == (3, "frame_000003.jpg", [0.0, 1.0])
        assert "must be a video" in await refusal(client, "video_frames", video="walk/images/000000.png", output="x")

    in_memory(folder, use)


OUTSIDE = {
    "photos": ("layout", {"photos": "../private/walk/images", "sparse": SPARSE}),
    "a link to photos": ("layout", {"photos": "linked", "sparse": SPARSE}),
    "a photo that is a link": ("thumbnails", {"photos": "one linked"}),
    "an output": ("reconstruct", {"photos": "walk/images", "output": "../private/out", "run": RUN, "sparse": SPARSE}),
    "an output that is a link": (
        "reconstruct",
        {"photos": "walk/images", "output": "linked", "run": RUN, "sparse": SPARSE},
    ),
    "an output with a link": (
        "reconstruct",
        {"photos": "walk/images", "output": "holds a link", "run": RUN, "sparse": SPARSE},
    ),
    "an output whose chunks are a link": (
        "reconstruct",
        {"photos": "walk/images", "output": "links chunks", "run": RUN, "sparse": SPARSE, "chunk": 2},
    ),
    "weights": ("compare", {"photos": "walk/images", "run": {**RUN, "weights": "/etc/passwd"}, "sparse": SPARSE}),
    "weights at home": ("compare", {"photos": "walk/images", "run": {**RUN, "weights": "../w.npz"}, "sparse": SPARSE}),
    "a graph": ("layout", {"photos": "walk/images", "sparse": {"graph": "../private/pairs.txt"}}),
    "a reconstruction": ("depth_pictures", {"output": "../private"}),
    "a video": ("video_frames", {"video": "../private/walk.mp4", "output": "frames"}),
}


@pytest.mark.parametrize(("tool", "arguments"), OUTSIDE.values(), ids=OUTSIDE)
def test_nothing_outside_is_read_or_written(folder: Path, tool: str, arguments: dict[str, Any]):
    private = folder.parent / "private"
    (folder / "linked").symlink_to(private / "walk/images")
    (folder / "one linked").mkdir()
    (folder / "one linked/1.png").symlink_to(private / "walk/images/000000.png")
    (folder / "holds a link").mkdir()
    (folder / "holds a link/sparse").symlink_to(private)
    (folder / "links chunks").mkdir()
    (folder / "links chunks/chunks").symlink_to(private)
    before = sorted(str(file) for file in private.rglob("*"))

    async def use(client: Client) -> None:
        assert "that this server was started with" in await refusal(client, tool, **arguments)

    in_memory(folder, use)
    assert sorted(str(file) for file in private.rglob("*")) == before


REFUSED = {
    "no photos": ("layout", {"photos": "nowhere", "sparse": SPARSE}, "does not exist"),
    "no weights": ("compare", {"photos": "walk/images", "run": {"model": "vggt"}}, "vggt needs weights"),
    "no device": ("compare", {"photos": "walk/images", "run": {**RUN, "device": "abacus"}}, "device must be one of"),
    "no backend": (
        "compare",
        {"photos": "walk/images", "run": {**RUN, "backend": "hopper"}},
        "backend hopper cannot run here",
    ),
    "no model": ("compare", {"photos": "walk/images", "run": {"model": "gpt"}}, "gpt"),
    "both": ("layout", {"photos": "walk/images", "sparse": {**SPARSE, "window": 1}}, "core and window say both"),
    "tokens of nobody": ("layout", {"photos": "walk/images", "sparse": {"covisibility": "tokens"}}, "say which runs"),
    "no such format": (
        "reconstruct",
        {"photos": "walk/images", "output": "out", "run": RUN, "sparse": SPARSE, "export": {"formats": ["obj"]}},
        "formats must be among",
    ),
    "no reconstruction": ("depth_pictures", {"output": "walk"}, "a saved reconstruction is needed"),
}


@pytest.mark.parametrize(("tool", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_a_tool_error(folder: Path, tool: str, arguments: dict[str, Any], message: str):
    async def use(client: Client) -> None:
        assert message in await refusal(client, tool, **arguments)

    in_memory(folder, use)


def test_a_fault_of_the_program_is_no_result(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from svggt_kernels.serving.work import Workshop

    def fault(*arguments: object) -> None:
        raise AssertionError("a secret of the program")

    monkeypatch.setattr(Workshop, "compare", fault)

    async def use(client: Client) -> None:
        assert "secret" not in await refusal(client, "compare", photos="walk/images", run=RUN, sparse=SPARSE)
        status = await answer(client, "job_status", job="job-1")
        assert (status["state"], status["error"]) == ("failed", "a fault of the program; see the server's log")

    in_memory(folder, use)


class TestCommand:
    def test_a_folder_that_is_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["mcp", str(tmp_path / "nowhere")]) == 2
        assert "must be given folders that exist" in capsys.readouterr().err

    def test_a_port_without_http(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["mcp", str(tmp_path), "--port", "8000"]) == 2
        assert "--port is that of --http" in capsys.readouterr().err

    def test_a_missing_package(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "mcp", None)
        assert main(["mcp", str(tmp_path)]) == 2
        assert "pip install 'svggt-kernels[mcp]'" in capsys.readouterr().err


def test_an_answer_is_small(folder: Path):
    async def use(client: Client) -> None:
        made = await answer(
            client,
            "reconstruct",
            photos="walk/images",
            output="out",
            run=RUN,
            sparse=SPARSE,
            export={"formats": ["tum"]},
        )
        assert len(json.dumps(made)) < 2000

    in_memory(folder, use)
