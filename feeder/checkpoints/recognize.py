"""Which kind of checkpoint a path holds, and opening it as a Source.

Kinds are told apart by file names and config.json alone. Opening needs torch only for what it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.checkpoint import read_config, require_inside
from common.checkpoint_kind import gguf_files
from common.errors import CheckpointError
from common.store_index import CONFIG_FILE
from common.strict_json import read_object
from feeder.checkpoints.source import Source

# Where the settings are if config.json lacks them, and whose they are.
_OLD_SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_KINDS = ("gptq", "awq", "compressed-tensors")


def open_source(path: Path) -> Source:
    """Open what lies at `path`: a directory, or a GGUF file. Raises ConfigError or CheckpointError."""
    parts = gguf_files(path)
    if parts:
        from feeder.checkpoints.gguf_source import GgufSource

        return GgufSource(parts, path if path.is_dir() else None)
    config = read_config(path)
    kind, settings, where = _settings(path, config)
    if not kind:
        from feeder.checkpoints.original import Original

        return Original(path)
    from feeder.checkpoints.packed import Layout, PackedCheckpoint

    layout: Layout
    if kind == "gptq":
        from feeder.checkpoints.gptq import Gptq

        layout = Gptq(settings, where)
    elif kind == "awq":
        from feeder.checkpoints.awq import Awq

        layout = Awq(settings, where)
    else:
        from feeder.checkpoints.compressed import Compressed

        layout = Compressed(settings, where)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    return PackedCheckpoint(path, config, layout)


def model_config(path: Path) -> dict[str, Any]:
    """The config of the model at `path`, without opening the rest. Raises as `open_source` does."""
    parts = gguf_files(path)
    if not parts:
        return read_config(path)
    from feeder.checkpoints.gguf_source import read_gguf_config

    return read_gguf_config(parts)


def _settings(path: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str]:
    """The kind, its settings, and where they were found; the kind is empty for an original."""
    settings = config.get("quantization_config")
    where = f"{path / CONFIG_FILE}: quantization_config"
    if settings is None:
        for name, kind in _OLD_SETTINGS.items():
            if (path / name).exists():
                try:
                    return kind, read_object(require_inside(path, path / name)), str(path / name)
                except ValueError as error:
                    raise CheckpointError(f"{path / name}: {error}") from error
        return "", {}, ""
    found = settings.get("quant_method") if isinstance(settings, dict) else None
    if found not in _KINDS:
        raise CheckpointError(
            f"{where}: quant_method is {found!r:.60}, expected one of {', '.join(_KINDS)}; "
            "use a checkpoint of one of these, a GGUF file, or the original"
        )
    return str(found), settings, where
