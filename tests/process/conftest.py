"""Every test here gets a room of its own, and fails if anything stays behind in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feeder.quantize import quantize_checkpoint
from tests import processes
from tests.checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def room() -> Iterator[processes.Room]:
    with processes.room() as place:
        yield place


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, quantized."""
    path = tmp_path_factory.mktemp("demo") / "store"
    quantize_checkpoint(processes.DEMO, path, "cpu", progress=False)
    return path


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights without a tokenizer: prompts are token ids."""
    path = tmp_path_factory.mktemp("small")
    quantize_checkpoint(make_checkpoint(path / "model"), path / "store", "cpu", progress=False)
    return path / "store"
