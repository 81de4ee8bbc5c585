"""Measure a store against its checkpoint and note the figures in its index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.checkpoint import Checkpoint
from common.errors import MemoryShortageError, StoreError
from common.log import log
from common.store import Store
from common.store_quality import record_quality
from feeder.texts import Excerpt, load_tokenizer, tokenize


def measure(
    model_dir: Path, store: Store, excerpt: Excerpt, device: str, poll: Callable[[], None]
) -> Store:
    """The same store, with its quality in the index. Raises WeightFeederError; the store then stays
    as it was."""
    import torch

    from feeder.divergence import compare
    from feeder.layerwise import of_checkpoint, of_store
    from feeder.quantize import choose_device

    checkpoint, chosen, dtype = Checkpoint.open(model_dir), choose_device(device), torch.float32
    text = excerpt.text()
    rows = tokenize(text, load_tokenizer(checkpoint.path), checkpoint.config, excerpt)
    log.info("measuring on %d tokens of %s", rows.tokens, text.name)
    models = of_checkpoint(checkpoint, chosen, dtype), of_store(store, chosen, dtype)
    try:
        quality = compare(checkpoint.config, models, text, rows, chosen, poll)
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
