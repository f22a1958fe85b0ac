"""What is weak about a reconstruction, in words: photos that share no view, parts that hang on a thread.

Which photos share a view is read from the reconstruction itself, where depth and cameras of two photos agree. So it
says where the result is held together, and not what the photos show: a wrong camera shares no view with anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..measure.wording import count, percent
from ..models.loading import RANDOM_WEIGHTS
from .points import PointChoice, PointCloud, point_cloud, sightings
from .scene import Reconstruction

POINTS = 20_000
SHARED = 0.02
"""Share of the points of one photo that another must see for the two to share a view."""

WEAK = 0.1
"""Share below which a link that alone holds two parts together is weak."""

NAMED = 3


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Which photos share views, and what follows.

    Attributes:
        shares: `[S, S]`: the share of the points of photo i that photo j sees, or of j that i sees, the larger.
        parts: Photos that share views, directly or by way of others, the largest part first; a photo that shares none
            is a part by itself.
        links: The strongest links (i, j) that hold all parts together, the weakest first.
        notes: What a user should know, a sentence each; empty if nothing is weak, and of random weights, of which
            nothing follows.
    """

    shares: Tensor
    parts: list[list[int]]
    links: list[tuple[int, int]]
    notes: list[str]


def diagnose(scene: Reconstruction) -> Diagnosis:
    """Return which photos of a reconstruction share views.

    Raises:
        ValueError: If no pixel has a depth that is finite and above 0.
    """
    shares = shared_views(scene, point_cloud(scene, PointChoice(max_points=POINTS)))
    links, parts = _strongest_links(shares)
    is_random = scene.facts.get("warning") == RANDOM_WEIGHTS
    return Diagnosis(shares, parts, links, [] if is_random else _notes(scene.names, shares, parts, links))


def shared_views(scene: Reconstruction, cloud: PointCloud) -> Tensor:
    """Return for each two photos the share of the points of one that the other sees, the larger of both, `[S, S]`."""
    photos = len(scene.names)
    point, photo, _ = sightings(scene, cloud)
    seen = torch.zeros(photos, photos, dtype=torch.float64)
    seen.index_put_((cloud.frames[point], photo), torch.ones(len(point), dtype=torch.float64), accumulate=True)
    shares = seen / cloud.frames.bincount(minlength=photos).clamp(min=1)[:, None]
    return torch.maximum(shares, shares.mT).fill_diagonal_(1.0)


def _strongest_links(shares: Tensor) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Return a maximum spanning forest over photos that share a view, weakest link first, and its parts (Kruskal)."""
    photos = len(shares)
    i, j = torch.triu_indices(photos, photos, 1)
    strength = shares[i, j]
    part = list(range(photos))

    def root(photo: int) -> int:
        while part[photo] != photo:
            part[photo] = part[part[photo]]
            photo = part[photo]
        return photo

    links = []
    for pair in strength.argsort(descending=True, stable=True).tolist():
        if strength[pair] < SHARED:
            break
        one, other = int(i[pair]), int(j[pair])
        if root(one) != root(other):
            part[root(one)] = root(other)
            links.append((one, other))
    members: dict[int, list[int]] = {}
    for photo in range(photos):
        members.setdefault(root(photo), []).append(photo)
    return links[::-1], sorted(members.values(), key=len, reverse=True)


def _notes(names: Sequence[str], shares: Tensor, parts: list[list[int]], links: list[tuple[int, int]]) -> list[str]:
    notes, together = [], [part for part in parts if len(part) > 1]
    alone = [part[0] for part in parts if len(part) == 1]
    if len(together) > 1:
        listed = "; ".join(f"{count(len(part), 'photo')} ({_listed(names, part)})" for part in together)
        notes.append(
            f"The photos fall into {len(together)} parts that share no view: {listed}. How the parts lie to one "
            "another rests on the model alone; take photos that show what is between them."
        )
    if alone and len(names) > 1:
        notes.append(
            f"{count(len(alone), 'photo')} of {len(names)} share{'s' * (len(alone) == 1)} no view with any other "
            f"({_listed(names, alone)}): their cameras may be wrong; take them out, or more photos around them."
        )
    for one, other in links:
        strength = float(shares[one, other])
        sizes = _sides(links, (one, other))
        if strength >= WEAK or min(sizes) < 2:
            continue
        notes.append(
            f"{names[one]} and {names[other]} are the strongest link between {sizes[0]} photos and {sizes[1]} others, "
            f"and share only {percent(strength)} of what they see: a weak bridge; take more photos there."
        )
        break
    return notes


def _sides(links: list[tuple[int, int]], cut: tuple[int, int]) -> tuple[int, int]:
    """Return how many photos hang on each end of a link of a forest."""
    near: dict[int, list[int]] = {}
    for one, other in links:
        if (one, other) != cut:
            near.setdefault(one, []).append(other)
            near.setdefault(other, []).append(one)

    def reached(start: int) -> int:
        seen, waiting = {start}, [start]
        while waiting:
            for photo in near.get(waiting.pop(), []):
                if photo not in seen:
                    seen.add(photo)
                    waiting.append(photo)
        return len(seen)

    return reached(cut[0]), reached(cut[1])


def _listed(names: Sequence[str], photos: Sequence[int]) -> str:
    return ", ".join(names[photo] for photo in photos[:NAMED]) + (", ..." if len(photos) > NAMED else "")
