"""Building the model: what transformers refuses of a config is one line too."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import ConfigError, StoreError
from common.store import Store, StoreWriter
from engine.model import build_model
from tests.stores import CONFIG, DTYPES, add_everything

CPU: Any = SimpleNamespace(
    device=torch.device("cpu")
)  # as much of a memory as is looked at by then
NOBODY: Any = None  # no feeder is asked


@pytest.mark.parametrize(
    "changes",
    [
        {"initializer_range": "wide"},
        {"pad_token_id": 10**6},
        {"max_position_embeddings": None},
        {"attention_dropout": {}},
    ],
)
def test_a_config_that_only_transformers_refuses(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = CONFIG | {"max_position_embeddings": 512} | changes
    with StoreWriter(tmp_path / "store", config, DTYPES) as writer:
        add_everything(writer)
        writer.commit()
    store = Store.open(tmp_path / "store")
    with pytest.raises(ConfigError) as caught:
        build_model(store, NOBODY, CPU, torch.float32)
    text = str(caught.value)
    assert (
        f"{tmp_path / 'store' / 'config.json'}: transformers " in text and " refuses it: " in text
    )
    assert text.splitlines() == [text]


def test_the_stores_config_stays_as_it_is(tmp_path: Path) -> None:
    """transformers completes what it is given; the store's is what its fingerprint is of."""
    config = CONFIG | {
        "rope_parameters": None,
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    empty: Any = SimpleNamespace(
        path=tmp_path, config=copy.deepcopy(config), weights=(), residents=(), tied=False
    )
    with pytest.raises(StoreError, match="lacks model.embed_tokens.weight"):
        build_model(empty, NOBODY, CPU, torch.float32)
    assert empty.config == config
