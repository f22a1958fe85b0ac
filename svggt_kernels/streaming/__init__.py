"""Any number of photos in constant memory, and more tomorrow: a model that is opened for the core of a scene.

The core runs once and further frames in chunks, by `patching.chunks`. `frames` reads what comes in, as it goes;
`apart` tells frames that may share nothing with the core; `scene` puts this together. docs/many-photos.md has the rules
for each model.
"""

from __future__ import annotations

from .opening import open_saved_scene, open_scene
from .outputs import read_outputs
from .scene import OpenScene

__all__ = ["OpenScene", "open_saved_scene", "open_scene", "read_outputs"]
