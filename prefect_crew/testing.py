"""Fixtures for your own tests. pytest finds them when this package is installed.

    async def test_my_flow(crew_server, instant_polling):
        server = crew_server("my-crew.yaml", faults=["status:500@1"])
        result = await arun_crew(server.crew(), {"topic": "Lisbon"})
        assert server.kickoffs == 1

Every pytest run in an environment with this package imports this module at its start, so the fixtures import the heavy
modules.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

if TYPE_CHECKING:
    from prefect_crew.devserver import CrewServer

__all__ = ["CrewServerFactory", "crew_database", "crew_server", "instant_polling", "scripted_crew"]

CrewServerFactory: TypeAlias = "type[CrewServer]"
"""The type of the fixture `crew_server`: a `CrewServer` that starts when it is made."""


@pytest.fixture
def crew_database(tmp_path: Path) -> Iterator[Path]:
    """Give the test, and the processes that it starts, a crew database of its own; provide its file."""
    path = tmp_path / "crew.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_INTEGRATIONS_CREW_DATABASE_URL", f"sqlite:///{path}")
        yield path
        if (database := sys.modules.get("prefect_crew.runs.database")) is not None:
            database.forget_stores()


@pytest.fixture
def crew_server(crew_database: Path) -> Iterator[CrewServerFactory]:
    """Provide a function that starts crew servers on ports of 127.0.0.1; they stop at the end of the test.

    The test has a crew database of its own (`crew_database`).

    The function takes the arguments of `prefect_crew.devserver.CrewServer` and returns one. The first is a script (its
    YAML text, a file, or the name of a crew of this package such as "echo" or "travel"), a `module:factory` of CrewAI
    code, or a program. The options are, among others, `faults`, `response_format` and `speed`.
    """
    from prefect_crew.devserver import CrewServer

    with contextlib.ExitStack() as running:

        class Started(CrewServer):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                running.enter_context(self)

        yield Started


@pytest.fixture
def scripted_crew(crew_server: CrewServerFactory) -> CrewServer:
    """Provide a running server. Its crew has one input, `text`, and immediately returns it as its output."""
    return crew_server("echo")


@pytest.fixture
def instant_polling() -> Iterator[None]:
    """Make every wait for a crew poll every 10 ms, whatever its `WaitPolicy` says. The time limits stay."""
    from prefect_crew.crew import fast_polling

    with fast_polling():
        yield
