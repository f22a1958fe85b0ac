"""What `study` measures: questions, the layouts and scenes that answer them, and what was expected.

The predictions were written on 2026-11-29, before any line of the study was measured. What was known then: 20 scenes of
walks and photos of 24, 96 and 192 frames with cores of 8 to 56 frames and neighbours (`results/curve-*.jsonl`), and
trials of an earlier model. They stay as they are, whatever comes out; layouts were added to `stride` and `peers` after
trials on two walks of 48 frames.

Groups `default` and `fifth` were added on the same day after the others had been measured, with their predictions; in
`fifth` a layout is chosen by the same rule.

How the default is to be chosen was written then too: of the choices in group `choice` that need no truth, at 52 of 96
and 56 of 192 frames, the one whose worst of (ratio of AUC@30 / 0.95, ratio of AUC@5 / 0.8, 1.15 / ratio of AbsRel)
over walks and photos is best. Then `heldout` tells.

Ratios are to dense on the same scenes unless another layout is named. `layers` names the six global layers of the
shipped model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from svggt_kernels.demo.scenes import HELD_OUT

from .measuring import ROOMS, SceneSet
from .results import Line

LONGEST_DENSE = 384
"""Dense attention over more frames is measured only where it is asked for."""


@dataclass(frozen=True)
class Part:
    """Layouts on kinds of scenes.

    Attributes:
        layouts: Names, between spaces; dense is always among them.
        families: Likewise; a family and its rooms, like walk/16, where they are not the usual ones.
        frames: Of each scene.
    """

    layouts: str
    families: str = "walk photos"
    frames: tuple[int, ...] = (96, 192)

    def kinds(self) -> Iterator[SceneSet]:
        """Yield the kinds of scenes."""
        for word in self.families.split():
            family, _, rooms = word.partition("/")
            for frames in self.frames:
                yield SceneSet(family, int(rooms or ROOMS[family]), frames)

    def names(self, frames: int, long_dense: bool) -> list[str]:
        """Return the layouts of scenes of so many frames, dense first; where it is left out `table --base` compares."""
        return ["dense"] * (long_dense or frames <= LONGEST_DENSE) + self.layouts.split()


@dataclass(frozen=True)
class Group:
    """A question.

    Attributes:
        question: What the group tells.
        prediction: What was expected, see the head of this file.
        parts: What is measured.
    """

    question: str
    prediction: str
    parts: tuple[Part, ...]


def _each(form: str, *values: object) -> str:
    """Return the form once for each value."""
    return " ".join(form.format(value) for value in values)


def _sizes(*sizes: int) -> str:
    return _each("core-{}-covering", *sizes)


_TWO_LEVELS = (
    "twolevel-24-4x12-covering twolevel-24-4x24-covering twolevel-16-8x16-covering twolevel-24-4x24-covering-ordered "
    "twolevel-32-8x16-covering core-36-covering core-48-covering"
)

CHOICES = (
    *("", "-covering", "-patches", "-patches-covering", "-thumbnails", "-thumbnails-covering"),
    *("-overlap", "-overlap-covering", "-evenly", "-random"),
)
"""How the frames of a core are chosen, as names of layouts say it."""

DEFAULT = "core-52-patches-covering"
"""What the study chose."""

FIFTH = (
    "core-37-covering core-37-patches-covering core-37-patches core-37-thumbnails-covering "
    "core-32-patches-covering-stride2of18 core-24-patches-covering-stride2of48 core-16-patches-covering-stride2of78 "
    "layers(0:core-24-patches-covering,1-5:core-40-patches-covering)"
)
"""Layouts with 0.20 of the pairs of 192 frames at most."""

STUDY = {
    "size": Group(
        "How many frames does a core need?",
        "0.95 of AUC@30 takes 40 frames on walks of 96 and 48 on walks of 192, 24 on photos; 0.8 of AUC@5 takes 40 and "
        "48 on walks, 32 on photos. From 48 to 64 frames AUC@30 gains less than 0.03. Below 24 it falls faster than "
        "pairs.",
        (Part(f"{_each('core-{}', 16, 24, 32, 48, 64)} {_sizes(8, 16, 24, 32, 40, 48, 52, 56, 64)}"),),
    ),
    "choice": Group(
        "How are the frames of a core chosen, and by what?",
        "Of 52 and 56 frames all but random and evenly on photos lie within 0.05 of AUC@30; far apart is best on walks "
        "of 96 and worst on walks of 192. At 24 frames random is 0.05 or more below covering. Thumbnails lose less "
        "than 0.05 to tokens, and true overlap gains less than 0.05 on them. Patches that find one another gain less "
        "than 0.05 too, and more far apart than covering.",
        (
            Part(_each("core-24{0} core-52{0}", *CHOICES), frames=(96,)),
            Part(_each("core-24{0} core-56{0}", *CHOICES), frames=(192,)),
        ),
    ),
    "special": Group(
        "Shall special tokens see everything?",
        "Not with a core: dense ones change AUC@30 by less than 0.03 and lower AUC@5, at 0.1 more of the pairs. With "
        "neighbours they help, and not enough.",
        (Part("core-24 core-24-dense core-48 core-48-dense nearest-10 nearest-10-ordinary own own-dense"),),
    ),
    "near": Group(
        "Do nearest frames help beside a core?",
        "A closed core of 24 with 2 to 8 nearest frames stays within 0.03 of AUC@30 of the core alone; an open one "
        "loses 0.2 or more.",
        (
            Part(
                "core-24 core-24-near2 core-24-near4 core-24-near8 core-24-near4-open core-48 core-48-near4",
                frames=(192,),
            ),
        ),
    ),
    "layers": Group(
        "Which global layers need other frames, and how many of them?",
        "None is free: frames alone in one layer cost 0.1 of AUC@30 or more, most in the first and the last. A core of "
        "24 in one layer, with the others dense, costs less than 0.05 in each.",
        (
            Part(
                "layers(0:own,1-5:dense) layers(0:dense,1:own,2-5:dense) layers(0-1:dense,2:own,3-5:dense) "
                "layers(0-2:dense,3:own,4-5:dense) layers(0-3:dense,4:own,5:dense) layers(0-4:dense,5:own) "
                "layers(0:core-24-covering,1-5:dense) layers(0-1:core-24-covering,2-5:dense) "
                "layers(0-1:dense,2-3:core-24-covering,4-5:dense) layers(0-3:dense,4-5:core-24-covering) "
                "layers(0:own,1-5:core-48-covering) layers(0-1:own,2-5:core-48-covering) "
                "layers(0-4:core-48-covering,5:own) layers(0-1:core-24-covering,2-5:core-48-covering) "
                "layers(0-3:core-48-covering,4-5:core-24-covering)",
                frames=(192,),
            ),
        ),
    ),
    "stride": Group(
        "Are few frames in full and many at a stride better than a core at equal pairs?",
        "8 frames in full and all others at stride 3 (0.26 of the pairs at 96 frames, 0.22 at 192) are 0.05 or more of "
        "AUC@30 above a core of as many pairs at 96, and within 0.03 of a core of 48 at 192. Stride 4 loses 0.05 to "
        "stride 3. Frame 0 in full is worth 0.05 at stride 3. A closed core of 24 in full and 72 at stride 3 is within "
        "0.03 of a core of 48 at 192.",
        (
            Part(
                f"{_each('core-{}-stride2', 0, 1)} {_each('core-{}-stride3', 0, 1)} "
                f"{_each('core-8-evenly-stride{}', 2, 3, 4)} {_each('core-8-covering-stride{}', 2, 3)} "
                f"core-16-covering-stride3 {_each('core-8-covering-stride2of{}', 40, 56, 88)} "
                f"{_each('core-{}-covering-stride2of64', 16, 32)} core-24-covering-stride3of72 "
                "layers(0-1:core-8-covering-stride2of88,2-5:core-24-covering) "
                "layers(0-1:core-48-covering,2-5:core-8-covering-stride2of56) "
                "core-16-covering-stride4 core-32-covering-stride3of64 layers(0:own,1-5:core-8-covering-stride3) "
                "core-24-covering core-40-covering core-48-covering"
            ),
        ),
    ),
    "twolevel": Group(
        "Does a core for each region help where one core cannot cover the scene?",
        "In 8 rooms two levels lie within 0.03 of AUC@30 of one core of as many pairs. In 32 rooms of 384 frames they "
        "gain 0.05 or more.",
        (
            Part(_TWO_LEVELS, frames=(192,)),
            Part(_TWO_LEVELS, "walk walk/16 walk/32", (384,)),
        ),
    ),
    "peers": Group(
        "What would others do with as many pairs?",
        "At the pairs of a core of 48: keys of 48 frames that all queries share, without their own frame, lose 0.05 of "
        "AUC@30 to it; blocks by pooled queries and keys keep 0.95 of AUC@30 and less than 0.8 of AUC@5; merged tokens "
        "keep 0.9; first layers within frames and later ones at a stride keep less than 0.5.",
        (
            Part(
                "core-48-covering shared-48 shared-48-covering pooled-45 pooled-45-16x8 merged-29 subsampled-2 "
                "layers(0-1:own,2-5:subsampled-2) layers(0:own,1-2:shared-48-stride2,3-5:shared-48)",
                frames=(96,),
            ),
            Part(
                "core-48-covering shared-48 shared-48-covering pooled-16 pooled-16-16x8 merged-50 merged-75 "
                "subsampled-2 layers(0-1:own,2-5:subsampled-2) layers(0:own,1-2:shared-48-stride2,3-5:shared-48)",
                frames=(192,),
            ),
        ),
    ),
    "families": Group(
        "Does one core serve all kinds of scenes?",
        "A covering core of 56 of 192 frames keeps 0.95 of AUC@30 on photos, revisits and one room and 0.9 on motion "
        "straight ahead; rotations keep 0.95 of the AUC@30 of rotation; walks through 16 and 32 rooms keep 0.85 and "
        "0.75.",
        (
            Part(
                "core-56 core-56-covering core-56-patches-covering core-56-evenly core-32-covering nearest-10",
                "walk walk/16 walk/32 room photos revisit forward rotation",
                (192,),
            ),
        ),
    ),
    "length": Group(
        "How does the size that a core needs grow with the frames?",
        "More slowly than the frames: 0.95 of AUC@30 on walks takes 20 of 24 frames, 32 of 48, 44 of 96, 48 of 192 and "
        "64 of 384. Of 1000 frames a core of 128 is 0.05 of AUC@30 above one of 64.",
        (
            Part(f"{_sizes(8, 12, 16, 20)} core-16 core-16-evenly", frames=(24,)),
            Part(f"{_sizes(12, 16, 24, 32, 40)} core-32 core-32-evenly", frames=(48,)),
            Part(f"{_sizes(24, 32, 40, 48, 52, 64)} core-48 core-48-evenly", frames=(96,)),
            Part(f"{_sizes(32, 40, 48, 56, 64, 96)} core-48 core-48-evenly", frames=(192,)),
            Part(f"{_sizes(32, 48, 64, 96, 128)} core-64 core-64-evenly", frames=(384,)),
            Part(f"{_sizes(48, 64, 96, 128, 192)} core-96 core-96-evenly", frames=(1000,)),
        ),
    ),
    "default": Group(
        "Does what was chosen hold for every length and family?",
        "It keeps 0.95 of AUC@30 and 0.8 of AUC@5, with AbsRel up by 5 % at most, on walks and photos of 96 and 192 "
        "frames, on one room, revisits and motion straight ahead; rotations keep 0.97 of the AUC@30 of rotation. On "
        "walks of 384 frames it keeps 0.9 of AUC@30 and 0.75 of AUC@5. Of 1000 frames a core of 128 by patches is 0.03 "
        "of AUC@30 above it.",
        (
            Part(f"{DEFAULT} nearest-10", frames=(96, 192)),
            Part(f"{DEFAULT} nearest-10", "walk walk/16 walk/32 room revisit forward rotation", (192,)),
            Part(f"{DEFAULT} core-96-patches-covering nearest-10", frames=(384,)),
            Part(f"{DEFAULT} core-128-patches-covering core-52-evenly", frames=(1000,)),
        ),
    ),
    "fifth": Group(
        "Which layout keeps most at a fifth of the pairs of 192 frames?",
        "A core of 37 by patches, covering, keeps 0.97 of AUC@30, 0.8 of AUC@5 and AbsRel up by 6 % on walks, 0.97, "
        "0.92 and 2 % on photos. Strides of 2 lose 0.05 of AUC@5 to it on walks. A core of 24 in the first layer and "
        "of 40 in the others is within 0.02 of it.",
        (Part(FIFTH, frames=(192,)),),
    ),
    "heldout": Group(
        "Does the rule hold on scenes that nobody has looked at?",
        "A covering core of 52 of 96 frames and of 56 of 192 keeps 0.95 of AUC@30 and 0.8 of AUC@5, and AbsRel rises "
        "by less than 10 %.",
        (
            Part(f"core-48-covering {_each('core-52{}', *CHOICES)} nearest-10", HELD_OUT, (96,)),
            Part(f"core-48-covering {_each('core-56{}', *CHOICES)} nearest-10 {DEFAULT} {FIFTH}", HELD_OUT, (192,)),
        ),
    ),
}
"""The groups by name. `heldout` is measured only where it is named: once, at the end."""


def lines_of(group: str | None, lines: Iterable[Line]) -> list[Line]:
    """Return those result lines that belong to a group, dense among them; all if there is no group."""
    if group is None:
        return list(lines)
    names: dict[SceneSet, set[str]] = {}
    for part in STUDY[group].parts:
        for chosen in part.kinds():
            names.setdefault(chosen, set()).update(part.names(chosen.frames, True))
    return [
        line
        for line in lines
        if line["layout"] in names.get(SceneSet(line["family"], line["rooms"], line["frames"]), ())
    ]
