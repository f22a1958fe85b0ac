"""Which packages are installed, told without importing them."""

from __future__ import annotations

import importlib.metadata


def installed(package: str) -> str:
    """Return the version of a package, or `not installed`; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
