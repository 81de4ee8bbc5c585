"""Tests that need a CUDA device. Without one they are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def room() -> Iterator[processes.Room]:
    with processes.room() as place:
        yield place
