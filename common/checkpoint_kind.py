"""Whether a path is a GGUF file, or a directory that holds one and nothing else to read. No torch.

Knows file names only, and nothing of what is in the files.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import CheckpointError

_SUFFIX = ".gguf"


def gguf_file(path: Path) -> Path | None:
    """The GGUF file at `path`; None if it holds something else. CheckpointError if it holds several."""
    if path.is_file():
        return path if path.suffix == _SUFFIX else None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(path.glob(f"*{_SUFFIX}"))
    if len(found) > 1:
        raise CheckpointError(
            f"{path} has {len(found)} GGUF files, expected one; "
            f"name the one that is meant, such as {found[0]}"
        )
    return found[0] if found else None


def is_checkpoint(path: Path) -> bool:
    """Whether a model may lie at `path`: a directory, or a GGUF file."""
    return path.is_dir() or (path.is_file() and path.suffix == _SUFFIX)
