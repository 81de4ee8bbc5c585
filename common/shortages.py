"""Which errors say that device memory ran out. torch's allocator has a type for it; CUDA's libraries and the
driver, which load kernels and take workspaces past that allocator, have words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Of the driver (also by way of Triton), and of what cuBLAS and cuDNN return when they find no room.
_WORDS = ("out of memory", "_STATUS_ALLOC_FAILED")


@contextmanager
def shortages() -> Iterator[None]:
    """A lack of device memory in here is torch.OutOfMemoryError, whoever meets it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if any(words in str(error) for words in _WORDS):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
