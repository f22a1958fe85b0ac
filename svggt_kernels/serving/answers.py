"""What tools take and answer: small, typed, with paths in place of arrays."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

Word = Literal["core", "patches", "megaloc", "tokens", "thumbnails", "sequential", "all"]


class Sparse(BaseModel):
    """Which photos attend to which; cost follows it."""

    covisibility: Word | None = Field(
        default=None,
        description="How to tell which photos see each other: core (all see a few that represent all, chosen by "
        "MegaLoc; the default), patches (the same, chosen by patches of the model), megaloc, tokens (of the model) or "
        "thumbnails (the most similar), sequential (neighbours in order), all (dense). Only core and megaloc need a "
        "download.",
    )
    core: int | None = Field(
        default=None, ge=1, description="Photos of a closed core in place of neighbours (default 52)."
    )
    neighbours: int | None = Field(
        default=None, ge=0, description="Most similar photos that each sees, without a core."
    )
    window: int | None = Field(
        default=None, ge=0, description="Photos before and after that each sees, without a core."
    )
    graph: str | None = Field(
        default=None,
        description="Path of a graph in place of all these: .npz, hloc's pairs.txt, COLMAP database or model.",
    )


class Run(BaseModel):
    """Which model runs, and how."""

    model: Literal["toy", "da3-small", "vggt", "pi3"] = Field(
        description="toy is the small model of the package, trained on rendered rooms alone."
    )
    weights: str | None = Field(
        default=None,
        description="Path of a file, OWNER/NAME of the Hugging Face hub, or 'random', whose results mean nothing. Only "
        "toy runs without.",
    )
    long_side: int | None = Field(default=None, ge=1, description="Pixels of the longer side of a frame.")
    max_frames: int | None = Field(default=None, ge=1, description="Use the first so many photos.")
    frames_per_second: float = Field(
        default=2.0, gt=0, description="Of a video, how many frames of a second to look at."
    )
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, mps; the fastest if left out.")
    backend: str | None = Field(default=None, description="The attention backend that must run.")


class Export(BaseModel):
    """What is written of a reconstruction, and how."""

    formats: list[str] | None = Field(default=None, description="Of those that info lists; the usual ones if left out.")
    max_points: int = Field(default=1_000_000, ge=1, description="Points at most.")
    least_confident: float = Field(
        default=30, ge=0, lt=100, description="Percent of the pixels, the least sure ones, that become no points."
    )
    force: bool = Field(default=False, description="Replace what is in the output folder of another reconstruction.")


class JobState(BaseModel):
    """How far a piece of work is."""

    job: str
    what: str
    state: Literal["waiting", "running", "done", "failed"]
    seconds: float
    doing: str = Field(description="What is or was being done last.")
    steps: int = Field(description="How many steps were begun.")
    error: str | None = None


class Info(BaseModel):
    """What is here."""

    versions: dict[str, str]
    devices: dict[str, str]
    folders: list[str] = Field(description="Folders that may be read and written; relative paths begin at the first.")
    models: dict[str, str] = Field(description="Models by name, and where their published weights are.")
    formats: dict[str, bool] = Field(description="Formats of export, and whether the package that each needs is here.")


class Layout(BaseModel):
    """Who sees whom, and what that allows."""

    frames: int
    density: float = Field(description="Share of the pairs of frames that attend.")
    token_density: float = Field(description="Share of the pairs of tokens that attend.")
    ideal_speedup: float = Field(description="Of global attention, at best.")
    sees: str
    warnings: list[str]
    files: list[str] = Field(description="What was written: the graph as .npz and as hloc's pairs.")


class Reconstructed(BaseModel):
    """What `reconstruct` made."""

    output: str
    files: dict[str, str] = Field(description="What was written, by format.")
    not_installed: dict[str, str] = Field(description="Formats that were left out, and what to install.")
    photos: int
    frame_width: int
    frame_height: int
    cropped_at_most: float = Field(description="Largest share of a photo that was cut off to fit the frame.")
    seconds: float
    token_density: float
    backend: str | None
    weights: str
    warning: str | None = Field(description="What weights that never met photos mean for the result.")
    notes: list[str] = Field(description="What is weak: photos that share no view, split scenes, weak bridges.")


class Compared(BaseModel):
    """What sparse costs beside dense, and how far it is from it."""

    frames: int
    sees: str
    token_density: float
    backend: str
    sparse_ms: float
    dense_ms: float | None = Field(description="None if dense did not run.")
    speedup: float | None
    ideal_speedup: float = Field(description="Of attention alone.")
    relative_l2: dict[str, float] = Field(description="Of each output, sparse against dense.")
    cameras_turn_degrees: dict[str, float] = Field(description="Median and largest.")
    weights: str
    warning: str | None


class LayoutOutcome(BaseModel):
    """What one layout costs and keeps."""

    layout: str
    sees: str
    ms: float
    peak_mib: float | None
    pairs: float = Field(description="Share of the pairs of tokens that attend.")
    scores: dict[str, float] = Field(
        description="Against dense: pose AUC, ATE in the extent of dense's cameras, AbsRel."
    )


class Swept(BaseModel):
    """Which layout to take."""

    frames: int
    outcomes: list[LayoutOutcome]
    recommended: str | None = Field(description="None for dense.")
    advice: str
    weights: str
    warning: str | None


class Frames(BaseModel):
    """Frames that were taken of a video."""

    folder: str
    frames: int
    first: str
    last: str
    seconds: list[float] = Field(description="Of the first and of the last.")


class ReconstructAnswer(BaseModel):
    """A job, and what came of it once it is done."""

    job: JobState
    result: Reconstructed | None = None


class CompareAnswer(BaseModel):
    """A job, and what came of it once it is done."""

    job: JobState
    result: Compared | None = None


class SweepAnswer(BaseModel):
    """A job, and what came of it once it is done."""

    job: JobState
    result: Swept | None = None


class AnyAnswer(BaseModel):
    """A job, and what came of it: the one of these that it is."""

    job: JobState
    reconstructed: Reconstructed | None = None
    compared: Compared | None = None
    swept: Swept | None = None
