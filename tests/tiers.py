"""Two tiers of tests: `pytest` runs the quick one, `pytest --full` also what is marked `full`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

full = pytest.mark.full


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """Return cases for `parametrize`: every `step`-th, from the first on, is in the quick tier, the rest are `full`.

    A plain tuple is a case of several arguments; a named one is a single argument.
    """
    return [
        case if place % step == 0 else pytest.param(*(case if type(case) is tuple else (case,)), marks=full)
        for place, case in enumerate(cases)
    ]
