"""What the proofs share: a process that forks scripts, a look into the Prefect server, an idempotency key for each
test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from proof.zygote import Zygote
from support.prefect_server import PrefectServer
from support.seen import Seen


@pytest.fixture(scope="session")
def zygote(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Forks scripts that are clients of the session's Prefect server."""
    folder = tmp_path_factory.mktemp("scripts")
    with Zygote(prefect_server.env(home=folder / "home"), folder) as running:
        yield running


@pytest.fixture
def seen(prefect_server: PrefectServer) -> Iterator[Seen]:
    """What the session's Prefect server holds."""
    reader = Seen(prefect_server)
    yield reader
    reader.close()


@pytest.fixture
def idempotency_key(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An idempotency key that no other test has."""
    return f"{request.node.name[:200]} {tmp_path.name}"
