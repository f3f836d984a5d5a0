"""Two stages for the session: flows that suspend, without webhooks and with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.stage import Stage


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, prefect_template: Path | None) -> Iterator[Stage]:
    """Flows that suspend, one worker, no webhooks."""
    with Stage(tmp_path_factory.mktemp("stage"), prefect_template) as stage:
        stage.worker()
        yield stage


@pytest.fixture(scope="session")
def hooked(tmp_path_factory: pytest.TempPathFactory, prefect_template: Path | None) -> Iterator[Stage]:
    """The same with webhooks on and a receiver, and no worker yet."""
    with Stage(tmp_path_factory.mktemp("hooked"), prefect_template, hooked=True) as stage:
        stage.start_receiver()
        yield stage
