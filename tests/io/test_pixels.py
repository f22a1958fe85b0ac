"""Which values images may hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from svggt_kernels.io import pixels
from svggt_kernels.io.pixels import require_unit_range

PATTERNS = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).round()  # of black and white


@pytest.mark.parametrize("scale", [0.8, 1.5, 2])
@pytest.mark.parametrize("antialias", [False, True])
def test_bicubic_interpolation_may_overshoot(scale: float, antialias: bool):
    overshot = F.interpolate(PATTERNS, scale_factor=scale, mode="bicubic", antialias=antialias)
    assert overshot.max() > 1.1
    require_unit_range(overshot)


@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: 2 * x - 1, lambda x: (x - 0.48) / 0.23])
def test_other_ranges(change):
    with pytest.raises(ValueError, match=r"frames must be in \[0, 1\], got values from"):
        require_unit_range(change(PATTERNS), "frames")


def test_nan():
    broken = PATTERNS.clone()
    broken[3, 0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"must not hold NaN, but images 3 do"):
        require_unit_range(broken)
    require_unit_range(broken, nan=True)


def test_every_frame_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pixels, "FRAMES_AT_ONCE", 2)
    for place in range(5):
        frames = torch.full((5, 3, 2, 2), 0.5)
        frames[place, 1, 1, 0] = -2 if place % 2 else 3
        with pytest.raises(ValueError, match=r"got values from (0\.5 to 3|-2 to 0\.5)"):
            require_unit_range(frames)
