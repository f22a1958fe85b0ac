"""Files of the Hugging Face hub: from its cache, or else downloaded."""

from __future__ import annotations

from pathlib import Path

from .tensor_files import PICKLES

FILE = "model.safetensors"


def is_repository(name: str) -> bool:
    """Tell whether a text can only be the name of a repository of the hub, `owner/name`, and no path of a file."""
    path = Path(name)
    named = name.count("/") == 1 and not name.startswith((".", "~", "/")) and not name.endswith("/")
    return named and path.suffix not in {*PICKLES, ".safetensors", ".npz"}


def from_hub(name: str, what: str, *, install: str, advice: str, otherwise: str = "") -> Path:
    """Return the path of a repository's `model.safetensors`, downloaded if it is not in the hub's cache.

    Args:
        name: Of the repository.
        what: What messages call the file, in the plural.
        install: How to install huggingface_hub.
        advice: What to do where the file cannot be had.
        otherwise: What to do where huggingface_hub is not installed and cannot be.

    Raises:
        FileNotFoundError: If it is in neither.
        ImportError: If huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{what}, {FILE} of {name}, come from the Hugging Face hub, which needs huggingface_hub: {install}"
            + (f"; {otherwise}" if otherwise else "")
        ) from error
    try:
        return Path(hf_hub_download(name, FILE, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except ValueError as error:  # a name that the hub cannot have
        raise FileNotFoundError(f"{what} must be a file or a repository of the Hugging Face hub, got {name}") from error
    try:
        # Without a network hf_hub_download tries for 23 s; this asks for the file's size and fails at once.
        get_hf_file_metadata(hf_hub_url(name, FILE))
        return Path(hf_hub_download(name, FILE))
    except Exception as error:  # of several HTTP libraries
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{what} must be in the cache of the Hugging Face hub or within reach, but {FILE} of {name} is "
            f"neither ({type(error).__name__}: {reason}); {advice}"
        ) from error
