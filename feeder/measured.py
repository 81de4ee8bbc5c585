"""Measure a store against its checkpoint and note the figures in its index."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from common.errors import MemoryShortageError, StoreError
from common.log import log
from common.store import Store
from common.store_quality import record_quality
from feeder.texts import Excerpt

if TYPE_CHECKING:
    import torch

    from feeder.checkpoints.source import Source


def measure(
    source: Source, store: Store, excerpt: Excerpt, device: torch.device, poll: Callable[[], None]
) -> Store:
    """The same store, with its quality in the index. The store has a tokenizer. Raises
    WeightFeederError; the store then stays as it was."""
    import torch

    from feeder.divergence import compare
    from feeder.layerwise import of_source, of_store

    text, rows = excerpt.text(), excerpt.rows(store.path, store.config)
    log.info("measuring on %d tokens of %s", rows.tokens, text.name)
    models = of_source(source, device, torch.float32), of_store(store, device, torch.float32)
    try:
        quality = compare(store.config, models, text, rows, device, poll)
    except ValueError as error:
        raise StoreError(f"{store.path}: measured, and {error}; nothing is noted") from error
    except torch.OutOfMemoryError as error:
        raise MemoryShortageError(
            "the GPU has no room for a layer, or the heads, of both models: use --device cpu"
        ) from error
    finally:
        store.close()
    record_quality(store.path, quality)
    return Store.open(store.path)
