"""Whether a path is a GGUF file, its parts, or a directory that holds one and nothing else to read. No torch.

Knows file names only, and nothing of what is in the files.
"""

from __future__ import annotations

import re
from pathlib import Path

from common.checkpoint import require_inside
from common.errors import CheckpointError

_SUFFIX = ".gguf"
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MOST_PARTS = 1000


def gguf_files(path: Path) -> list[Path]:
    """The GGUF file at `path`, all its parts in order if it has several; none if it holds something else.

    CheckpointError if there is more than one, a part is missing, or one in a directory is a link out of it.
    """
    if path.is_file():
        return _parts(path) if path.suffix == _SUFFIX else []
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return []
    found = sorted(file for file in path.glob(f"*{_SUFFIX}") if file.is_file())
    if not found:
        return []
    parts = _parts(found[0])
    if len(found) > len(parts):
        raise CheckpointError(
            f"{path} has {len(found)} GGUF files, expected one; "
            f"name the one that is meant, such as {found[0]}"
        )
    return [require_inside(path, part) for part in parts]


def is_checkpoint(path: Path) -> bool:
    """Whether a model may lie at `path`: a directory, or a GGUF file."""
    return path.is_dir() or (path.is_file() and path.suffix == _SUFFIX)


def _parts(file: Path) -> list[Path]:
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    stem, count = match.group(1), int(match.group(3))
    if not 1 <= count <= _MOST_PARTS:
        raise CheckpointError(f"{file} has {count} parts by its name, expected 1 to {_MOST_PARTS}")
    parts = [
        file.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)
    ]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{part} is missing, expected all {count} parts of the model")
    return parts
