"""A small multi-view transformer with VGGT's shape, trained on rendered rooms: for the demo, tests and accuracy."""

from .model import RoomsModel

__all__ = ["RoomsModel"]
