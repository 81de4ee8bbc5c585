"""Tests with the mark ``gpu`` are skipped where there is no CUDA device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same cases each time, however slow the machine is: a red check means a change, not chance. New
# cases are looked for with --hypothesis-profile=explore.
_SLOW = [HealthCheck.too_slow]
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("explore", deadline=None, suppress_health_check=_SLOW)
settings.load_profile("steady")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small tensors: threads of torch's would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
