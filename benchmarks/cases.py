"""The problems: frozen cases, each with a name that says everything about it, and the model of useful work.

A name reads `s64-p1374-band2-special5-hd64-h16-b1`: 64 frames of 1374 tokens, a graph, and then, where they differ from
the default, the special tokens of each frame (dense both ways; default 0), the head size (64), the heads (16) and the
batch (1). With `-log2` at the end q comes multiplied by `D ** -0.5 * log2(e)`, as a fused norm can give it, and the
scale is ln 2. Any size can be asked for by its name; `GROUPS` holds the ones we publish.

Graphs, all with every frame seeing itself, all symmetric but those with a core:

    dense        every frame sees every frame
    bandR        frames i and j see each other when |i - j| <= R: a video
    loopR        a band whose last frame is next to the first one: a video that closes its loop
    starR        a band, and frame 0 sees and is seen by all: a video with VGGT's reference frame
    scatteredK   every frame sees K frames drawn at random (seed 0), made symmetric: nothing in common, the worst case
    shuffledR    a band whose frames come in a random order (seed 0): a photo collection
    coreK        every frame sees K frames that lie evenly among all; these see one another alone
    firstK       the same with the first K frames as the core
    coreK+L@s    K + L frames lie evenly among all; every frame sees K of them, that lie evenly among these, in full,
                 and the others at a stride s of their patch grid: see `svggt_kernels.CoarseLayout`; with L = all it
                 sees all others so. Each frame then has 5 special tokens, which are ordinary tokens of it, and the most
                 square grid of patches that its tokens allow (28 x 37 of 1041)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from svggt_kernels import BlockLayout, CoarseGraph, CoarseLayout, CovisibilityGraph
from svggt_kernels.graph.core import spread_evenly

GRAPH = r"dense|(?:band|loop|star|scattered|shuffled|core|first)\d+|core\d+\+(?:\d+|all)@[1-9]\d*"
NAME = re.compile(rf"s(\d+)-p(\d+)-({GRAPH})((?:-(?:special|hd|h|b)\d+)*)(-log2)?")
SUFFIX = re.compile(r"-(special|hd|h|b)(\d+)")

SPECIAL = 5
"""Special tokens of a frame where frames are seen at a stride: VGGT's camera token and registers."""

WORK = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}
"""Useful work of each direction in units of the forward's: two products forward, five backward."""


@dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes:
        frames: Frames, S.
        tokens: Tokens of each frame, P, special ones included.
        graph: Which frames see each other, as in the module's table.
        special: Special tokens of each frame, R; they see and are seen by everything.
        head_size: D.
        heads: H.
        batch: B.
        log2: Whether q is such that scores come in units of log2.
    """

    frames: int
    tokens: int
    graph: str
    special: int = 0
    head_size: int = 64
    heads: int = 16
    batch: int = 1
    log2: bool = False

    def __post_init__(self) -> None:
        if min(self.frames, self.tokens, self.head_size, self.heads, self.batch) < 1:
            raise ValueError(f"{self.name}: frames, tokens, head size, heads and batch must be at least 1")
        if self.special > self.tokens:
            raise ValueError(f"{self.name}: {self.special} special tokens do not fit into {self.tokens} tokens a frame")
        if not re.fullmatch(GRAPH, self.graph):
            raise ValueError(f"graph must be one of the table in benchmarks/cases.py, as band2, got {self.graph!r}")
        if self.stride and (self.special or self.tokens <= SPECIAL):
            raise ValueError(
                f"{self.name}: frames that are seen at a stride have {SPECIAL} special tokens, which are not dense, "
                "and patches; leave special out, and give more tokens than that"
            )

    @classmethod
    def parse(cls, name: str) -> Case:
        """Read a case from its name.

        Raises:
            ValueError: If the name does not follow the grammar in the module's docstring.
        """
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"a case is called like s64-p1374-band2 or s8-p64-dense-special5-hd128-h4-b2, got {name!r}; graphs are "
                "dense, bandR, loopR, starR, scatteredK, shuffledR, coreK, firstK and coreK+L@s; -log2 at the end "
                "stands for q in units of log2"
            )
        frames, tokens, graph, rest, log2 = match.groups()
        fields = {"special": "special", "hd": "head_size", "h": "heads", "b": "batch"}
        suffixes = SUFFIX.findall(rest)
        if len({key for key, _ in suffixes}) < len(suffixes):
            raise ValueError(f"each suffix may be given once, got {name!r}")
        options = {fields[key]: int(value) for key, value in suffixes}
        return cls(int(frames), int(tokens), graph, **options, log2=log2 is not None)

    @property
    def name(self) -> str:
        """The shortest name of the case; `parse` reads it back."""
        suffixes = [
            f"-{key}{value}"
            for key, value, default in (
                ("special", self.special, 0),
                ("hd", self.head_size, 64),
                ("h", self.heads, 16),
                ("b", self.batch, 1),
            )
            if value != default
        ]
        return f"s{self.frames}-p{self.tokens}-{self.graph}{''.join(suffixes)}{'-log2' if self.log2 else ''}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of q, k, v and the output, (B, H, N, D)."""
        return self.batch, self.heads, self.frames * self.tokens, self.head_size

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return math.log(2) if self.log2 else self.head_size**-0.5

    @property
    def is_dense(self) -> bool:
        """Whether every token sees every token."""
        return self.visible_pairs == self.dense_pairs

    @property
    def stride(self) -> int:
        """The stride at which some frames are seen; 0 if all are seen in full."""
        return int(self.graph.partition("@")[2] or 0)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a frame, where frames are seen at a stride."""
        patches = self.tokens - SPECIAL
        rows = next(rows for rows in range(math.isqrt(patches), 0, -1) if patches % rows == 0)
        return rows, patches // rows

    @cached_property
    def visible_coarsely(self) -> Tensor:
        """Which frames see which at a stride, bool `[S, S]`."""
        if not self.stride:
            return torch.zeros_like(self.visible)
        return torch.isin(torch.arange(self.frames), self._cores[1]) & ~self.visible

    @property
    def _cores(self) -> tuple[Tensor, Tensor]:
        """The frames that all see in full, and those that all see at least at a stride."""
        in_full, _, coarsely = self.graph.removeprefix("core").partition("@")[0].partition("+")
        further = self.frames if coarsely == "all" else int(coarsely or 0)
        both = spread_evenly(self.frames, int(in_full) + further)
        return both[spread_evenly(len(both), int(in_full))], both

    @cached_property
    def weights_of_frame(self) -> Tensor:
        """How many tokens each token of a frame stands for that is seen at a stride, 0 if it is not seen, `[P]`."""
        rows, columns = self.patch_grid
        seen = torch.zeros(rows, columns, dtype=torch.float64)
        first = [min(self.stride // 2, side // 2) for side in (rows, columns)]
        seen[first[0] :: self.stride, first[1] :: self.stride] = 1
        seen *= rows * columns / seen.sum()
        return torch.cat([torch.ones(SPECIAL, dtype=torch.float64), seen.flatten()])

    @cached_property
    def visible(self) -> Tensor:
        """Which frames see which in full, bool `[S, S]`."""
        full = self.graph.partition("+")[0]
        kind = full.rstrip("0123456789")
        number = int(full.removeprefix(kind) or 0)
        frame = torch.arange(self.frames)
        distance = (frame[:, None] - frame[None]).abs()
        if kind == "dense":
            return torch.ones(self.frames, self.frames, dtype=torch.bool)
        if kind == "loop":
            return torch.minimum(distance, self.frames - distance) <= number
        if kind == "scattered":
            generator = torch.Generator().manual_seed(0)
            seen = torch.eye(self.frames, dtype=torch.bool)
            for row in seen:
                row[torch.randperm(self.frames, generator=generator)[:number]] = True
            return seen | seen.T
        if kind in ("core", "first"):
            core = self._cores[0] if kind == "core" else frame[:number]
            return CovisibilityGraph.core(self.frames, core).to_dense()
        band = distance <= number
        if kind == "shuffled":
            order = torch.randperm(self.frames, generator=torch.Generator().manual_seed(0))
            return band[order][:, order]
        if kind == "star":
            band[0] = band[:, 0] = True
        return band

    @cached_property
    def edges(self) -> int:
        """Pairs of frames of which the first sees the second, in full or at a stride."""
        return int(self.visible.sum() + self.visible_coarsely.sum())

    @property
    def dense_pairs(self) -> int:
        """Pairs of a query token and a key token."""
        return (self.frames * self.tokens) ** 2

    @cached_property
    def visible_pairs(self) -> int:
        """Pairs of a query token and a key token that it sees; counted here, not asked of the layout."""
        if self.stride:
            seen = int((self.weights_of_frame > 0).sum())
            of_frames = int(self.visible.sum()) * self.tokens + int(self.visible_coarsely.sum()) * seen
            return self.tokens * of_frames
        patches = self.tokens - self.special
        patch_patch = self.edges * patches**2
        special_any = self.frames * self.special * self.frames * self.tokens
        patch_special = self.frames * patches * self.frames * self.special
        return patch_patch + special_any + patch_special

    @property
    def density(self) -> float:
        """Visible pairs / all pairs, over tokens."""
        return self.visible_pairs / self.dense_pairs

    @property
    def ideal_speedup(self) -> float:
        """Dense pairs / visible pairs: what skipping exactly the invisible work would give."""
        return self.dense_pairs / self.visible_pairs

    def useful_flops(self, direction: str = "fwd") -> float:
        """Floating-point operations that the visible pairs need; padding and masked work do not count.

        Args:
            direction: "fwd": 4 * D * H * B * visible pairs; "bwd": 2.5 times that; "fwd+bwd": both.
        """
        return WORK[direction] * 4 * self.head_size * self.heads * self.batch * self.visible_pairs

    def layout(self, device: torch.device | str = "cpu") -> BlockLayout | CoarseLayout:
        """Return the layout of the case on `device`.

        Raises:
            RuntimeError: If the layout's own count of visible pairs is not the case's: no number could be trusted.
        """
        graph = CovisibilityGraph.from_dense(self.visible, square=True)
        layout: BlockLayout | CoarseLayout
        if self.visible_coarsely.any():
            coarse = CovisibilityGraph.from_dense(self.visible_coarsely, square=True)
            both = CoarseGraph.from_graphs(graph, coarse, stride=self.stride)
            layout = CoarseLayout.from_graph(both, self.patch_grid, special_tokens=SPECIAL).to(device)
        else:
            layout = BlockLayout.from_graph(graph, self.tokens, special_tokens=self.special).to(device)
        if layout.visible_pairs != self.visible_pairs:
            raise RuntimeError(f"{self.name} has {self.visible_pairs} visible pairs, its layout {layout.visible_pairs}")
        return layout


def _cases(*names: str) -> tuple[Case, ...]:
    return tuple(map(Case.parse, names))


GROUPS: dict[str, tuple[Case, ...]] = {
    # Seconds on two CPU cores.
    "cpu": _cases("s12-p197-dense-h4", "s12-p197-band2-h4", "s12-p197-scattered2-h4", "s8-p101-star1-special5-h4"),
    # VGGT at 518 x 518, 518 x 392, 518 x 336 and 518 x 294 pixels.
    "p1374": _cases("s64-p1374-dense", "s64-p1374-band2", "s64-p1374-scattered6"),
    "p1041": _cases("s64-p1041-dense", "s64-p1041-band2", "s64-p1041-scattered6"),
    "p893": _cases("s64-p893-dense", "s64-p893-band2", "s64-p893-scattered6"),
    "p782": _cases("s64-p782-dense", "s64-p782-band2", "s64-p782-scattered6"),
    "variants": _cases(
        "s64-p1374-band2-special5",
        "s64-p1374-scattered6-special5",
        "s64-p1374-loop2",
        "s64-p1374-star2",
        "s64-p1374-dense-hd128",
        "s64-p1374-band2-hd128",
    ),
    # A core of the first frames has its keys in one place, one of frames among all has not.
    "core": _cases(*(f"s64-p{tokens}-{graph}" for tokens in (1374, 1041) for graph in ("core16", "first16"))),
    # A few frames in full, and as many keys again at a stride; and the same number of pairs in full.
    "coarse": _cases(*(f"s{frames}-p1041-core{core}" for frames in (64, 100, 1000) for core in ("16+48@3", "21"))),
    "log2": _cases("s64-p1374-dense-log2", "s64-p1374-band2-log2", "s64-p1374-scattered6-log2"),
    "backward": _cases("s16-p1374-dense", "s16-p1374-band2", "s16-p1374-scattered3"),
    # 2.25e9 elements in each of q, k, v and the output: offsets do not fit into 32 bits.
    "large": _cases("s1600-p1374-band2"),
    # What does not fit into the GPU's cache: a video, a photo collection, and frames that have nothing in common.
    "order": _cases(*(f"s1000-p1041-{graph}" for graph in ("band15", "shuffled15", "scattered15"))),
    # 16 and 32 neighbours: time and extra memory by edge should not depend on the number of frames.
    "scaling": _cases(
        *(f"s{frames}-p1374-band8" for frames in (16, 32, 64, 125, 250, 500, 1000, 2000)),
        *(f"s{frames}-p1374-band16" for frames in (32, 64, 125, 250, 500, 1000, 2000)),
    ),
}
"""The published cases by group, dense ones first."""


def select(names: list[str]) -> list[Case]:
    """Return the cases of the given group or case names, in order, each once.

    Raises:
        ValueError: If a name is neither a group nor follows the grammar of cases.
    """
    cases = [case for name in names for case in GROUPS.get(name) or (Case.parse(name),)]
    return list(dict.fromkeys(cases))
