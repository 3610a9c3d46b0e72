"""A checkpoint named by its Hugging Face id, downloaded (or found in the cache) by huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from dsv4.errors import CheckpointError, ConfigError

# ``owner/name`` as the Hub allows them.
_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?/[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")

# Weights, configuration, tokenizer and chat template; no other formats of the same weights, no pictures.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def is_hub_id(path: str | Path) -> bool:
    """Whether ``path`` is to be looked up on the Hub: ``owner/name``, and nothing of this name here.

    A missing entry of a folder that exists is a mistyped path, not an id.
    """
    local = Path(path)
    text = str(path)
    if local.exists() or local.is_symlink() or local.parent.exists():
        return False
    return _ID.fullmatch(text) is not None and "--" not in text and ".." not in text


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """A local path for ``path``: itself, or the folder in the Hugging Face cache for an id.

    Args:
        path: a file or folder, or ``owner/name``.
        revision: branch, tag or commit of an id; None takes the default branch.

    Raises:
        CheckpointError: the repository cannot be had: no network and not in the cache, no such id, no access.
        ConfigError: an id without huggingface_hub installed, or a revision for something that is no id.
    """
    if not is_hub_id(path):
        if revision is not None:
            raise ConfigError(f"revision={revision!r} needs a Hugging Face id (owner/name), found {str(path)!r}")
        return Path(path)
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"{path}: no such file or folder; to load it as a Hugging Face id, install huggingface_hub (dsv4[hf])"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(str(path), revision=revision, allow_patterns=list(PATTERNS))
    except Exception as error:  # of the HTTP client, the file system, the cache: all say that it cannot be had
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: no such file or folder here, and as a Hugging Face id it cannot be had "
            f"({type(error).__name__}: {reason:.300}); without a network, name a local folder or fill the cache "
            f"first (hf download {path})"
        ) from error
    return Path(folder)
