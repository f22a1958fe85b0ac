"""A page with the points, the cameras and who sees whom, for a browser on this machine."""

from __future__ import annotations

import io
import math
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import numpy as np
import torch

from ..measure.wording import count, percent
from ..packages import optional
from ..rigid_motions import quaternion_of
from .diagnosis import SHARED, WEAK, diagnose
from .pictures import near_is_bright, smaller
from .points import PointChoice, point_cloud
from .scene import Reconstruction

INSTALL = "'svggt-kernels[view]'"
POINTS = 400_000
NEAR = 0.3
"""Of the median depth; nearer than that to the side, what is above a camera is a roof."""

UP = "-y"
"""The world's y points down where the first camera is level."""

PARTS = ((46, 125, 190), (220, 120, 30), (60, 150, 70), (160, 80, 170), (120, 100, 80))
CHOSEN, SEEN, STRONG_LINK, WEAK_LINK = (250, 210, 0), (0, 190, 190), (90, 160, 110), (200, 40, 40)
LARGEST_PICTURE = 320
LISTED = 12


class Viewer:
    """The page of one reconstruction; it is served until `stop`.

    Cameras of a part that shares views have one colour. Lines are the strongest links that hold photos together; weak
    ones are red. A click on a camera shows its photo, its depth, whom it saw and with whom it shares views.

    Args:
        scene: The reconstruction.
        host: Where to serve; only this machine by default.
        port: Where to serve; another one is taken if it is not free.

    Raises:
        ImportError: viser is not installed.
        ValueError: No pixel has a depth that is finite and above 0.
    """

    def __init__(self, scene: Reconstruction, host: str = "127.0.0.1", port: int = 8080) -> None:
        viser = optional("viser", "looking at a reconstruction", "viser", INSTALL)
        self.scene, self.diagnosis = scene, diagnose(scene)
        self.chosen: int | None = None
        self._cloud = point_cloud(scene, PointChoice(max_points=POINTS))
        self._heights = -self._cloud.points[:, 1]
        self._reach = scene.typical_depth
        with redirect_stdout(io.StringIO()):  # it greets on stdout
            self._server = viser.ViserServer(host=host, port=port, label="svggt-kernels", verbose=False)
        # A share button would send the scene to somebody else's server.
        self._server.gui.configure_theme(show_logo=False, show_share_button=False, control_width="large")
        self._server.scene.set_up_direction(UP)
        self._point_handle = self._draw_points()
        self._links: Any = None
        self._cameras = [self._draw_camera(photo) for photo in range(len(scene.names))]
        self._draw_links()
        self._build_panel()
        self._look_from_above()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self._server.get_host()}:{self._server.get_port()}"

    def stop(self) -> None:
        """End the page."""
        with redirect_stdout(io.StringIO()):
            self._server.stop()

    def serve(self) -> None:
        """Wait until interrupted."""
        self._server.sleep_forever()

    def choose(self, photo: int | None) -> None:
        """Show what is known of a photo in the panel, and mark it and the photos that it saw; None shows none."""
        self.chosen = photo
        self._about.content = self._words_of(photo)
        for handle in self._pictures:
            handle.visible = photo is not None
        if photo is not None:
            colours, depth = self._pictures_of(photo)
            self._pictures[0].image, self._pictures[1].image = colours, depth
        for place, handle in enumerate(self._cameras):
            handle.color = self._colour(place)

    def _build_panel(self) -> None:
        gui = self._server.gui
        gui.add_markdown(self._summary())
        roof = self._roof()
        cut = gui.add_slider("cut from above, %", min=0, max=95, step=5, initial_value=roof)
        cut.on_update(lambda event: self._cut(cut.value))
        self._cut(roof)
        size = gui.add_slider("point size", min=0.2, max=5.0, step=0.1, initial_value=1.0)
        size.on_update(lambda event: setattr(self._point_handle, "point_size", self._point_size * size.value))
        if self._links is not None:
            links, drawn = gui.add_checkbox("strongest links", initial_value=True), self._links
            links.on_update(lambda event: setattr(drawn, "visible", links.value))
        self._about = gui.add_markdown(self._words_of(None))
        blank = np.zeros((8, 8, 3), np.uint8)
        self._pictures = [
            gui.add_image(blank, label=label, visible=False) for label in ("photo", "depth, near is bright")
        ]
        back = gui.add_button("look from this camera")
        back.on_click(self._look_through)

    @property
    def _point_size(self) -> float:
        return 0.004 * self._reach

    def _draw_points(self) -> Any:
        return self._server.scene.add_point_cloud(
            "/points",
            self._cloud.points.numpy().astype(np.float32),
            self._cloud.colours.numpy(),
            point_size=self._point_size,
            precision="float32",
            point_shading="flat",
        )

    def _cut(self, share: float) -> None:
        """Leave out the highest points, in percent, so that rooms can be seen from above."""
        kept = self._heights <= torch.from_numpy(np.quantile(self._heights.numpy(), [1 - share / 100]))
        self._point_handle.points = self._cloud.points[kept].numpy().astype(np.float32)
        self._point_handle.colors = self._cloud.colours[kept].numpy()

    def _roof(self) -> int:
        """Return how much to cut so that rooms are seen from above, in percent; 0 if most cameras stand in the open."""
        points, eyes = self._cloud.points, self.scene.poses[:, :3, 3]
        roofed = 0
        for eye in eyes:
            aside = (points[:, [0, 2]] - eye[[0, 2]]).norm(dim=1)
            roofed += bool(((aside < NEAR * self._reach) & (points[:, 1] < eye[1] - NEAR * self._reach)).any())
        if 2 * roofed < len(eyes):
            return 0
        above = (self._heights > float(-eyes[:, 1].median())).double().mean()
        return min(95, 5 * round(20 * float(above)))

    def _draw_camera(self, photo: int) -> Any:
        pose, intrinsics = self.scene.poses[photo], self.scene.intrinsics[photo]
        width, height = self.scene.frame_size
        x, y, z, w = quaternion_of(pose[:3, :3]).tolist()
        handle = self._server.scene.add_camera_frustum(
            f"/cameras/{photo}",
            fov=2 * math.atan(height / 2 / float(intrinsics[1, 1])),
            aspect=width / height,
            scale=0.04 * self._reach,
            thickness=1.5,
            thickness_units="screen",
            color=self._colour(photo),
            image=smaller(self.scene.colours[photo].numpy(), 64),
            wxyz=(w, x, y, z),
            position=tuple(pose[:3, 3].tolist()),
        )
        handle.on_click(partial(self._clicked, photo))
        return handle

    def _clicked(self, photo: int, event: object) -> None:
        self.choose(None if self.chosen == photo else photo)

    def _draw_links(self) -> None:
        links = self.diagnosis.links
        if not links:
            return
        centres = self.scene.poses[:, :3, 3].numpy().astype(np.float32)
        weak = [float(self.diagnosis.shares[link]) < WEAK for link in links]
        colours = np.array([WEAK_LINK if is_weak else STRONG_LINK for is_weak in weak], np.uint8)
        self._links = self._server.scene.add_line_segments(
            "/links",
            centres[np.array(links)],
            np.repeat(colours[:, None], 2, 1),
            thickness=2.0,
            thickness_units="screen",
        )

    def _colour(self, photo: int) -> tuple[int, int, int]:
        if photo == self.chosen:
            return CHOSEN
        if self.chosen is not None and photo in self._seen_by(self.chosen):
            return SEEN
        part = next(number for number, members in enumerate(self.diagnosis.parts) if photo in members)
        return PARTS[min(part, len(PARTS) - 1)]

    def _seen_by(self, photo: int) -> list[int]:
        start, end = self.scene.graph.indptr[photo : photo + 2].tolist()
        return [other for other in self.scene.graph.indices[start:end].tolist() if other != photo]

    def _summary(self) -> str:
        facts, photos = self.scene.facts, len(self.scene.names)
        lines = [f"**{count(photos, 'photo')}**, {facts.get('model', 'a model')}, weights: {facts.get('weights', '?')}"]
        warnings = [facts["warning"]] if facts.get("warning") else []
        lines += [f"**Mind:** {note}" for note in (*self.diagnosis.notes, *warnings)]
        if not self.diagnosis.notes:
            lines.append("Every photo shares a view with others, and nothing hangs on a weak link.")
        return "\n\n".join(lines)

    def _words_of(self, photo: int | None) -> str:
        if photo is None:
            return "Click a camera: its photo, its depth and what it sees appear here."
        names, shares = self.scene.names, self.diagnosis.shares[photo].clone()
        seen = self._seen_by(photo)
        shares[photo] = 0
        together = [other for other in shares.argsort(descending=True).tolist() if shares[other] >= SHARED]
        views = [f"{names[other]} ({percent(float(shares[other]))})" for other in together]
        return "\n\n".join(
            [
                f"**{names[photo]}**",
                f"In attention it saw {count(len(seen), 'other photo')}: {_listed([names[other] for other in seen])}.",
                f"It shares views with {count(len(together), 'photo')}: {_listed(views)}."
                if together
                else "**It shares no view with any other photo**: its camera may be wrong.",
            ]
        )

    def _pictures_of(self, photo: int) -> tuple[np.ndarray, np.ndarray]:
        colours = smaller(self.scene.colours[photo].numpy(), LARGEST_PICTURE)
        return colours, smaller(near_is_bright(self.scene.depth[photo]), LARGEST_PICTURE)

    def _look_from_above(self) -> None:
        """Begin above and behind the points of the largest part, from the side of the first camera."""
        points = self._cloud.points[torch.isin(self._cloud.frames, torch.tensor(self.diagnosis.parts[0]))]
        middle = points.median(0).values
        extent = float(np.quantile((points - middle).norm(dim=1).numpy(), 0.9))
        behind = self.scene.poses[0, :3, 2] * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
        above = torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)
        camera = self._server.initial_camera
        camera.position = tuple((middle + extent * (1.7 * above - 0.9 * behind)).tolist())
        camera.look_at = tuple(middle.tolist())

    def _look_through(self, event: Any) -> None:
        pose = self.scene.poses[self.chosen or 0]
        with event.client.atomic():
            event.client.camera.position = pose[:3, 3].numpy()
            event.client.camera.look_at = (pose[:3, 3] + self._reach * pose[:3, 2]).numpy()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(names[:LISTED]) or "none") + more
