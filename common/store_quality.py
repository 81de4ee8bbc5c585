"""Writing measured figures into the index of a store that is there already.

The only change that a store ever sees: its index is replaced whole, or not at all. Content, and so the
fingerprint, stay as they are.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from common import store_json
from common.quality import Quality
from common.shard_files import refused
from common.store_check import read_checked
from common.store_index import INDEX_FILE


def record_quality(store_dir: Path, quality: Quality) -> None:
    """Put ``quality`` into store.json, in place of an earlier one. Raises StoreError."""
    path = store_dir / INDEX_FILE
    index, _ = read_checked(store_dir)
    content = store_json.to_json(replace(index, quality=quality))
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("xb") as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
