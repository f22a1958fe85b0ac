"""A small multi-view transformer with VGGT's shape, trained on rendered rooms to measure accuracy."""

from .model import RoomsModel

__all__ = ["RoomsModel"]
