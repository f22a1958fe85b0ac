"""The MCP server: tools for agents, on the official SDK."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from ..packages import installed
from .answers import (
    AnyAnswer,
    CompareAnswer,
    Compared,
    Export,
    Frames,
    Info,
    JobState,
    Layout,
    ReconstructAnswer,
    Reconstructed,
    Run,
    Sparse,
    SweepAnswer,
    Swept,
)
from .folders import Folders
from .jobs import Job, Jobs, refusal
from .work import Workshop

NAME = "svggt-kernels"
POLL_SECONDS = 0.1
INSTRUCTIONS = """\
Turns photos or a video into cameras, depth and points, with attention that a graph of photos makes sparse.
Begin with `info`. `layout` says who would see whom; `reconstruct` writes a COLMAP model, PLY, GLB and more into a
folder; `compare` and `sweep` say what sparse costs and keeps. Long work: give wait=false, ask `job_status`, fetch
`job_result`.
Only the folders that `info` lists can be read and written. Results are paths and small summaries; photos and depth are
shown as pictures. There are no tracks of points through photos, as no model here makes any. Weights that are random,
or learned on another kind of picture, say so in `warning`: then cameras and depth mean little; conclude nothing.
"""


def build_server(folders: list[Path]) -> MCPServer[Any]:
    """Return the server.

    Args:
        folders: What it may read and write.

    Raises:
        ValueError: There is no folder.
        NotADirectoryError: One is none.
    """
    workshop, jobs = Workshop(Folders(folders)), Jobs()
    server: MCPServer[Any] = MCPServer(
        NAME, instructions=INSTRUCTIONS, version=installed("svggt-kernels"), log_level="WARNING"
    )

    @server.tool()
    @_in_words
    async def info() -> Info:
        """Versions, devices, models, formats, and the folders that may be used."""
        return await anyio.to_thread.run_sync(workshop.info)

    @server.tool()
    @_in_words
    async def layout(
        context: Context,
        photos: str,
        sparse: Sparse = Sparse(),  # noqa: B008
        run: Run | None = None,
        output: str | None = None,
    ) -> Layout:
        """Say which photos of a folder or video would attend to which, and what speed-up of attention that allows.

        With `run`, whose model runs once, its tokens may compare the photos. With `output` the graph is written there.
        """
        work = functools.partial(workshop.layout, photos, sparse, run, output)
        return await _awaited(jobs.start(f"layout of {photos}", work), context)

    @server.tool()
    @_in_words
    async def reconstruct(
        context: Context,
        photos: str,
        output: str,
        run: Run,
        sparse: Sparse = Sparse(),  # noqa: B008
        export: Export = Export(),  # noqa: B008
        chunk: int | None = None,
        wait: bool = True,
    ) -> ReconstructAnswer:
        """Turn a folder of photos or a video into cameras, depth and points in files that other tools open.

        What is finished is kept: the same call again goes on where it was stopped. With chunk, so many photos run at a
        time, and chunks are kept too; it needs a core.
        """
        work = functools.partial(workshop.reconstruct, photos, output, run, sparse, export, chunk)
        job = jobs.start(f"reconstruct {photos}", work)
        result = await _awaited(job, context) if wait else None
        return ReconstructAnswer(job=_state(job), result=result)

    @server.tool()
    @_in_words
    async def compare(
        context: Context,
        photos: str,
        run: Run,
        sparse: Sparse = Sparse(),  # noqa: B008
        dense: bool = True,
        repeats: int = 3,
        wait: bool = True,
    ) -> CompareAnswer:
        """Run a model dense and sparse on photos and compare time and outputs; dense=false runs sparse alone."""
        work = functools.partial(workshop.compare, photos, run, sparse, dense, repeats)
        job = jobs.start(f"compare on {photos}", work)
        result = await _awaited(job, context) if wait else None
        return CompareAnswer(job=_state(job), result=result)

    @server.tool()
    @_in_words
    async def sweep(
        context: Context,
        photos: str,
        run: Run,
        layouts: list[str] | None = None,
        by: str = "megaloc",
        repeats: int = 3,
        wait: bool = True,
    ) -> SweepAnswer:
        """Run a model dense and with several layouts, and say which keeps its accuracy and what each costs.

        Layouts are core-K, core-K-covering, core-K-evenly and nearest-K; photos are compared by megaloc, tokens or
        thumbnails.
        """
        work = functools.partial(workshop.sweep, photos, run, layouts, by, repeats)
        job = jobs.start(f"sweep on {photos}", work)
        result = await _awaited(job, context) if wait else None
        return SweepAnswer(job=_state(job), result=result)

    @server.tool()
    @_in_words
    async def job_status(job: str) -> JobState:
        """How far a piece of work is that was started with wait=false."""
        return _state(jobs.find(job))

    @server.tool()
    @_in_words
    async def job_result(context: Context, job: str, wait: bool = False) -> AnyAnswer:
        """What came of a piece of work; with wait=true once it is over."""
        found = jobs.find(job)
        if wait or found.is_over:
            await _awaited(found, context)
        result = found.result
        return AnyAnswer(
            job=_state(found),
            reconstructed=result if isinstance(result, Reconstructed) else None,
            compared=result if isinstance(result, Compared) else None,
            swept=result if isinstance(result, Swept) else None,
        )

    @server.tool()
    @_in_words
    async def video_frames(
        video: str, output: str, frames_per_second: float = 2.0, max_frames: int | None = None
    ) -> Frames:
        """Write frames of a video as photos into a folder, those that differ from the one before."""
        return await anyio.to_thread.run_sync(workshop.frames, video, output, frames_per_second, max_frames)

    @server.tool(structured_output=False)
    @_in_words
    async def thumbnails(photos: str, most: int = 8) -> list[Any]:
        """Show photos of a folder, evenly among them, small."""
        return _pictures(await anyio.to_thread.run_sync(workshop.thumbnails, photos, most))

    @server.tool(structured_output=False)
    @_in_words
    async def depth_pictures(output: str, photos: list[str] | None = None, most: int = 4) -> list[Any]:
        """Show the depth of photos of a reconstruction as grey pictures in which near is bright."""
        return _pictures(await anyio.to_thread.run_sync(workshop.depth_pictures, output, photos, most))

    return server


def _in_words(tool: Callable[..., Awaitable[Any]]) -> Any:
    """Let errors about what was asked reach whoever asked, as tool errors in words."""

    @functools.wraps(tool)
    async def told(*arguments: Any, **named: Any) -> Any:
        try:
            return await tool(*arguments, **named)
        except ToolError:
            raise
        except Exception as error:
            words = refusal(error)
            if words is None:
                raise
            raise ToolError(words) from error

    return told


async def _awaited(job: Job, context: Context) -> Any:
    """Tell the client what a job does until it is over; return its result, or raise why it failed."""
    told = 0
    while True:
        is_over, said = job.is_over, job.said[told:]
        for text in said:
            told += 1
            await context.report_progress(told, None, text)
        if is_over:
            break
        await anyio.sleep(POLL_SECONDS)
    if job.error is not None:
        raise job.error
    return job.result


def _state(job: Job) -> JobState:
    doing = job.said[-1] if job.said else "waiting for its turn"
    error = None if job.error is None else refusal(job.error) or "a fault of the program; see the server's log"
    return JobState(
        job=job.number,
        what=job.what,
        state=job.state,
        seconds=job.seconds,
        doing=doing,
        steps=len(job.said),
        error=error,
    )


def _pictures(named: list[tuple[str, bytes]]) -> list[Any]:
    return [part for name, content in named for part in (name, Image(data=content, format="png"))]
