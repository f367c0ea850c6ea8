from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from flops_lightning.allocators.base import one_thread


@pytest.fixture(autouse=True)
def _quiet_and_on_one_thread(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    for name in ("lightning.pytorch", "lightning.fabric"):
        caplog.set_level(logging.ERROR, logger=name)
    with one_thread():
        yield
