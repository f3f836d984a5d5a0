"""Fixtures for your own tests; pytest finds them by itself once this package is installed.

    async def test_my_flow(crew_server, instant_polling):
        server = crew_server("my-crew.yaml", faults=["status:500@1"])
        result = await arun_crew(server.crew(), {"topic": "Lisbon"})
        assert server.kickoffs == 1

This module is imported at the start of every pytest run in an environment with this package: what is heavy is imported
within the fixtures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import pytest

if TYPE_CHECKING:
    from prefect_crew.devserver.faults import Fault
    from prefect_crew.devserver.server import CrewServer, InProcessCrewServer, Spec


class CrewServerFactory(Protocol):
    """What the fixture `crew_server` gives: call it as often as you like, each call is a running server."""

    @overload
    def __call__(
        self,
        spec: Spec | Mapping[str, Spec] = ...,
        *,
        port: Literal[False] = ...,
        faults: Iterable[Fault | str] = ...,
        **options: Any,
    ) -> InProcessCrewServer: ...
    @overload
    def __call__(
        self,
        spec: Spec | Mapping[str, Spec] = ...,
        *,
        port: Literal[True] | int,
        faults: Iterable[Fault | str] = ...,
        **options: Any,
    ) -> CrewServer: ...


@pytest.fixture
def crew_server() -> Generator[CrewServerFactory, None, None]:
    """Give a function that starts crew servers; they are stopped when the test ends.

    `crew_server(spec, *, port=False, faults=(), **options)`: `spec` is a script (its YAML text, a file, or the name of
    a crew of this package such as "echo" or "travel"), a `module:factory` of CrewAI code, a `Program`, or a mapping of
    paths to those. Without a port only this process reaches it, through our own client; `port=True` takes a free port
    of the loopback interface, which any client and any other process can use. `options` are those of
    `prefect_crew.devserver.CrewServer`: token, seed, speed, dialect, generation, journal, inspect, max_runs and so on.

    The server has url, token, headers, runs, run(id), kickoffs, kickoffs_by_key, requests, counters, faults,
    restart(), and crew(**fields), which is a `DeployedCrew` block for it.
    """
    from prefect_crew.devserver.server import CrewServer, InProcessCrewServer

    with contextlib.ExitStack() as running:

        def start(
            spec: Spec | Mapping[str, Spec] = "echo",
            *,
            port: bool | int = False,
            faults: Iterable[Fault | str] = (),
            **options: Any,
        ) -> CrewServer | InProcessCrewServer:
            if port is False:
                return running.enter_context(InProcessCrewServer(spec, faults=faults, **options))
            number = 0 if port is True else port
            return running.enter_context(CrewServer(spec, port=number, faults=faults, **options))

        yield start  # pyright: ignore[reportReturnType] - the overloads say which of the two it is


@pytest.fixture
def scripted_crew(crew_server: CrewServerFactory) -> InProcessCrewServer:
    """Give a running server, without a port, whose crew has one input `text` and at once returns it as its output."""
    return crew_server("echo")


@pytest.fixture
def instant_polling() -> Generator[None, None, None]:
    """Make every wait for a crew look each 10 ms, whatever its `WaitPolicy` says; its time limits stay."""
    from prefect_crew.crew import fast_polling

    with fast_polling():
        yield
