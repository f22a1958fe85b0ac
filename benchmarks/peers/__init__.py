"""What is measured: the backends of svggt_kernels and the peers they are compared with, behind one small interface.

A contender is asked whether it can run a case, then prepares a call without arguments: layouts, masks and tables are
made in `prepare`, outside the timed region. A peer's package is imported when it is first asked, and a package that is
missing is a reason. Adding a peer is one entry in the `CONTENDERS` of a module here.
"""

from __future__ import annotations

from . import flash_attention_4, flashinfer, flex, magi, sdpa
from .contender import Contender
from .ours import backend, names

PEERS: dict[str, Contender] = {
    peer.name: peer for module in (sdpa, flex, flash_attention_4, flashinfer, magi) for peer in module.CONTENDERS
}
"""The peers by name."""

__all__ = ["PEERS", "Contender", "backend", "names"]
