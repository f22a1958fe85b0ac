"""Photos in, reconstruction out: cameras, depth and points, and the files that others open (docs/reconstruct.md).

`reconstruct` reads photos, runs a model on them once (`prediction`) and writes a `Reconstruction` (`scene`) in several
`formats`. `cameras` goes from a frame to the photo that it was made of, `points` from depth to points.
"""

from .pipeline import frames_of, reconstruct
from .points import PointChoice
from .scene import Reconstruction

__all__ = ["PointChoice", "Reconstruction", "frames_of", "reconstruct"]
