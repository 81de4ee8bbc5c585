"""Every test here gets a room of its own, and fails if anything stays behind in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feeder.quantize import quantize_checkpoint
from tests import lives, processes
from tests.checkpoints import edit_config, make_checkpoint

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What fails with real processes is run once more, and the summary names it: several processes,
    signals and terminals on two shared cores meet in ways that no test means. Not so where such meetings
    are what is tested."""
    for item in items:
        if HERE in item.path.parents and not item.path.name.startswith("test_lives_"):
            item.add_marker(pytest.mark.flaky(reruns=1))


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
    """Two layers of random weights without a tokenizer: prompts are token ids. None can be packed."""
    path = tmp_path_factory.mktemp("small")
    quantize_checkpoint(make_checkpoint(path / "model"), path / "store", "cpu", progress=False)
    return path / "store"


@pytest.fixture(scope="session")
def long_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that goes on for as long as it is asked to. Slots may be packed."""
    path = tmp_path_factory.mktemp("long")
    checkpoint = make_checkpoint(path / "model", hidden=128, intermediate=192, layers=lives.LAYERS)
    edit_config(checkpoint, max_position_embeddings=2 * lives.LONGEST)
    (checkpoint / "generation_config.json").write_text('{"bos_token_id": 0}')
    quantize_checkpoint(checkpoint, path / "store", "cpu", progress=False)
    return path / "store"


@pytest.fixture(scope="session")
def long_text(long_store: Path) -> list[str]:
    """The tokens of an undisturbed generation; that of fewer tokens begins in the same way."""
    with processes.room() as place:
        place.feeder(*lives.feeder_flags(long_store, cache=-1, slots=lives.SLOTS[-1]))
        ended = place.engine(*lives.engine_flags(lives.LONGEST)).wait()
    assert ended.code == 0, ended.err
    tokens = ended.out.split()
    assert len(tokens) == lives.LONGEST
    # It is no loop of a few tokens; a deeper model is surer of itself.
    assert len(set(tokens)) > (100 if lives.DEVICE == "cpu" else 50)
    return tokens


@pytest.fixture
def device_as_before() -> Iterator[None]:
    """At the end as much device memory is free as before. Nothing to see on the CPU."""
    before = lives.device_free_bytes()
    yield
    if before:
        lives.until_device_free(before)
