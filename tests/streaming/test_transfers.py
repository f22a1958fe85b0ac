"""What goes to a device while it computes something else."""

from __future__ import annotations

from typing import Any, cast

import torch

from svggt_kernels.streaming.transfers import read_ahead


class Part:
    """Stands in for a tensor, and notes how it is copied."""

    is_cuda = False

    def __init__(self) -> None:
        self.copied: list[tuple[torch.device, bool]] = []

    def to(self, device: torch.device, non_blocking: bool = False) -> Part:
        self.copied.append((device, non_blocking))
        return self


def test_where_there_are_no_streams_copies_are_waited_for():
    """A copy to an Apple GPU that nobody waits for would read the frames of a chunk after they were freed."""
    device, part = torch.device("mps"), Part()
    assert list(read_ahead(cast(Any, iter([part])), device)) == [part]
    assert part.copied == [(device, False)]
